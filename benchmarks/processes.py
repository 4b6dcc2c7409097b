"""What several processes gain: the same training and test by one process and by more, each of one thread.

    python benchmarks/processes.py [--processes=1,2] [--model=LLMSTAR] [--layers=2] [--key=value ...]

Every further key is one of ``run_recbole_llm.py``. The training takes steps of 32 users for one epoch, without validation;
data set and LLM are ml-100k and the built-in one unless keys say otherwise. The teacher is trained first and found by all.
Prints seconds of the training steps and of the test, and how many times as fast they are as with the first number of
processes. To be run on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from recbole_llm.results.run import read_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2", help="numbers of processes, with commas (default 1,2)")
    parser.add_argument("--model", default="LLMSTAR", help="an LLM recommender (default LLMSTAR)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the LLM (default 2)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments, keys = parser.parse_known_args()
    given = {key.partition("=")[0].removeprefix("--"): key.partition("=")[2] for key in keys}
    settings = {"dataset": "ml-100k", "epochs": 1, "eval_step": 0, "train_batch_size": 32, "use_gpu": False} | given
    settings |= {"model": arguments.model, "backbone_layers": arguments.layers, "show_progress": False}
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for count in map(int, arguments.processes.split(",")):
            seconds = measure(count, settings, Path(folder))
            figures.append({"processes": count, **seconds})
    first = figures[0]
    print(f"{arguments.model}, {settings['dataset']}, {arguments.layers} layers, one thread a process, {os.cpu_count()} cores")
    for row in figures:
        parts = [f"{name} {row[name]:.1f} s ({first[name] / row[name]:.2f} x)" for name in ("train", "test")]
        print(f"{row['processes']} processes: {', '.join(parts)}")
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(count: int, settings: dict, folder: Path) -> dict[str, float]:
    """Seconds of training and test of a new run by ``count`` processes; its teacher is kept for the next."""
    words = [f"--{key}={value}" for key, value in {**settings, "nproc": count, "fresh": True}.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "recbole_llm", "run", *words, f"--checkpoint_dir={folder / 'saved'}"]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    run = next(path for path in (folder / "saved").iterdir() if path.name.startswith(f"{settings['model']}-"))
    seconds = read_run(run).record["seconds"]
    return {"train": seconds["train"], "test": seconds["evaluate"]}


if __name__ == "__main__":
    main()
