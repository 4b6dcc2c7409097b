"""Seconds and memory of each stage on generated data sets of growing size: loading, tokens, training, evaluation.

    python benchmarks/scale.py [--sizes=10000,100000,1000000] [--interactions=20] [--steps=100] [--users=10000]
                               [--limit_gb=12] [--results=FILE]

A data set of size n has n users, n items with titles of a few words, and 20 n interactions, popularity that falls as one over
the rank. A model by retrieval with a tiny random LLM trains 100 steps of 20 users and ranks 10,000 users' targets among 100
candidates: what an LLM of real size costs comes on top, and does not depend on the number of users and items. Each size runs
in a process of its own, twice, the second time as a second start of the same run; it may not take more memory than
``limit_gb`` (address space aside, what it holds is what is limited: the run ends where it is more). ``growth`` is how a
stage's seconds grow from one size to the next: 10 is linear.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

if {"-h", "--help"} & set(sys.argv[1:]):
    sys.exit(print(__doc__))

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from recbole_llm.config.command_line import parse_command_line  # noqa: E402

DEFAULTS = {
    "sizes": "10000,100000,1000000",
    "interactions": 20,
    "steps": 100,
    "users": 10_000,
    "limit_gb": 12.0,
    "results": None,
}
WORDS = "red blue small large old new light heavy wooden steel lamp table chair guitar piano record album film book".split()
STAGES = ("load", "model and tokens", "training", "evaluation")


def generate(folder: Path, size: int, interactions: int) -> None:
    """Write the atomic files of a data set, 2**20 lines at a time."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    weights = np.cumsum(1 / np.arange(1, size + 1))
    with open(folder / f"{folder.name}.inter", "w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        users_at_once = max(1, 2**20 // interactions)
        for first in range(0, size, users_at_once):
            users = np.arange(first, min(first + users_at_once, size)).repeat(interactions)
            items = np.searchsorted(weights, rng.random(len(users)) * weights[-1])
            times = 1_500_000_000 + rng.integers(0, 10**8, len(users))
            file.writelines(map("u{}\ti{}\t{}\n".format, users.tolist(), items.tolist(), times.tolist()))
    with open(folder / f"{folder.name}.item", "w") as file:
        file.write("item_id:token\ttitle:token_seq\n")
        words = rng.integers(0, len(WORDS), (size, 4)).tolist()
        file.writelines(f"i{item}\t{' '.join(WORDS[word] for word in row)} {item}\n" for item, row in enumerate(words))


def memory() -> tuple[float, float]:
    """GB that this process holds, and the most that it held."""
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return held / 1e9, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def stages(data_path: str, checkpoints: str, size: int, settings: dict) -> dict[str, dict[str, float]]:
    """Seconds and memory of each stage."""
    import torch
    from recbole.utils import get_model, get_trainer, init_seed

    import recbole_llm  # noqa: F401  (registers the models)
    from recbole_llm.config.settings import make_config
    from recbole_llm.data.loaders import dataloaders
    from recbole_llm.data.shared import SharedData
    from recbole_llm.evaluation.evaluate import evaluate_ranking, sample_rows

    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    mark = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal mark
        held, most = memory()
        found[stage] = {"seconds": round(time.perf_counter() - mark, 1), "held_gb": round(held, 2), "most_gb": round(most, 2)}
        print(f"{size:,} {stage}: {found[stage]}", file=sys.stderr, flush=True)
        if most > settings["limit_gb"]:
            sys.exit(f"{stage} took {most:.1f} GB, more than limit_gb: {settings['limit_gb']:g}")
        mark = time.perf_counter()

    given = {
        "data_path": data_path,
        "checkpoint_dir": checkpoints,
        "backbone": "tiny",
        "protocol": "retrieval",
        "seed": 1,
        "show_progress": False,
        "state": "WARNING",
        "use_gpu": False,
    }
    config = make_config("TALLRec", f"scale-{size}", config_dict=given)
    data = SharedData()
    splits, train = data.splits(config), data.train(config)
    done("load")
    init_seed(config["seed"], True)
    model = get_model("TALLRec")(config, train)
    trainer = get_trainer(config["MODEL_TYPE"], "TALLRec")(config, model)
    done("model and tokens")
    train_data, *_ = dataloaders(config, train, splits)
    order, batch = np.random.default_rng(0).permutation(len(train)), config["train_batch_size"]
    for step in range(settings["steps"]):
        places = np.arange(step * batch, (step + 1) * batch) % len(order)  # around again where there are fewer users
        rows = train.inter_feat[torch.from_numpy(order[places])]
        trainer._train_step(train_data, rows, len(order), 1)
        trainer.step += 1
    done("training")
    model.eval()
    evaluate_ranking(model.score, splits["test"], config, "test", sample_rows(splits["test"], settings["users"], 1))
    done("evaluation")
    return found


def main() -> None:
    settings = {**DEFAULTS, **parse_command_line(sys.argv[1:])}
    sizes = [int(size) for size in str(settings["sizes"]).split(",")]
    table: dict[str, dict] = {}
    folder = Path(tempfile.mkdtemp())
    try:
        for size in sizes:
            generate(folder / f"scale-{size}", size, settings["interactions"])
            for start in ("first start", "second start"):
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    arguments = str(folder), str(folder / "saved"), size, settings
                    table.setdefault(str(size), {})[start] = process.submit(stages, *arguments).result()
            shutil.rmtree(folder / f"scale-{size}")
        print(f"{'users and items':>16} {'stage':<18} {'seconds':>8} {'again':>8} {'held GB':>8} {'most GB':>8} {'growth':>7}")
        for place, size in enumerate(map(str, sizes)):
            for stage in STAGES:
                first, second = table[size]["first start"][stage], table[size]["second start"][stage]
                before = table[str(sizes[place - 1])]["first start"][stage]["seconds"] if place else None
                growth = f"{first['seconds'] / max(before, 0.1):.1f}" if before is not None else ""
                print(
                    f"{int(size):>16,} {stage:<18} {first['seconds']:>8} {second['seconds']:>8} {first['held_gb']:>8} "
                    f"{first['most_gb']:>8} {growth:>7}"
                )
        if settings["results"]:
            Path(settings["results"]).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
