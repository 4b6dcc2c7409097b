"""Kills, simultaneous runs and full disks: what ends is what an undisturbed run gives, and nothing is left behind.

    python tests/robustness/torture.py --kills=50 --pairs=12 --disks=20 --seed=0

The pipelines train teachers, models and LLMs, evaluate, store hidden states, convert an LLM and merge adapters.

* A kill: a command is killed (SIGKILL) at a random moment and given again with ``--resume=True`` until it ends. Its results
  must be those of a run that was not killed, to the last digit, and nothing may be left that ``recbole-llm clean`` removes.
* A pair: the same command twice at the same time in one folder. Both must give the undisturbed results.
* A full disk: no file may grow beyond a random size. The command ends with a sentence, and given again without the limit
  it ends with the undisturbed results.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import forks

SMALL = """
    --dataset=chain --backbone=tiny --backbone_dtype=float32 --use_gpu=False --show_progress=False --train_batch_size=8
    --eval_step=0.5 --SASRec.epochs=2 --results_file=results.json --per_user_file=users.tsv
""".split()
RANKED = ["--head_hidden_size=8", "--representation_size=8", "--eval_args={mode: uni9}", "--topk=[5]", "--valid_metric=Hit@5"]
CONVERTED = "--backbone=smollm2-135m"
PIPELINES = {
    "conversion": ["--model=TALLRec", "--epochs=1", CONVERTED, *RANKED],
    "teacher and frozen LLM": ["--model=SASRec,LLMSTAR", "--epochs=2", *RANKED],
    "LoRA, merged": ["--model=TALLRec", "--epochs=2", "--merge_adapter=True", *RANKED],
    "stages": ["--model=CoLLM", "--epochs=1", *RANKED],
    "alignment": ["--model=ALLMRec", "--epochs=1", "--alignment_epochs=2", *RANKED],
    "stored states": ["--model=ST2SI", "--tuning=ilp", "--epochs=2"],
    "pre-training": ["--model=ST2SI", "--epochs=1", "--pretrain_datasets=[chain2]", "--pretrain_settings={epochs: 1}"],
}
VOLATILE = ("minutes", "resume", "seconds", "started", "finished", "command", "peak_memory_bytes", "folder")


def results(folder: Path) -> Any:
    """What a run measured: results and ranks, without times."""

    def stable(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: stable(entry) for key, entry in value.items() if not key.endswith(VOLATILE)}
        return [stable(entry) for entry in value] if isinstance(value, list) else value

    rows = json.loads((folder / "results.json").read_text())
    return stable(rows), (folder / "users.tsv").read_text()


def leftovers(folder: Path) -> list[str]:
    """What no process is writing any more, and none will read: temporary files, states of trainings that have ended, stored
    hidden states of no model."""
    from recbole_llm.results.clean import find_orphans

    kinds = (".tmp", ".part", ".pth")
    found = {path for path in folder.rglob("*") if path.suffix in kinds or path.name == "resume"}
    found |= {orphan.path for orphan in find_orphans(folder / "saved", unfinished=True) if orphan.kind != "lock"}
    return sorted(str(path.relative_to(folder)) for path in found)


def convert_a_tiny_llm() -> None:
    """Let smollm2-135m be a tiny random LLM, which is converted in each run's own folder in as many steps as the real one."""
    import torch

    from recbole_llm.backbone import built_in
    from recbole_llm.backbone.fetch import Wheel
    from recbole_llm.backbone.settings import read_settings

    def convert(source: Path, target: Path) -> None:
        tokenizer = built_in.make_tiny_tokenizer()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, _ = built_in.make_tiny(tokenizer, read_settings({"backbone": "tiny", "device": "cpu"}), torch.float32)
        model.save_pretrained(target)
        time.sleep(0.5)  # so that a kill finds it half done
        tokenizer.save_pretrained(target)

    class OwnWheel(Wheel):
        def folder(self, name: str, write: Any) -> Path:
            with patch.dict(os.environ, RECBOLE_LLM_CACHE="cache"):
                return super().folder(name, write)

        def _published(self, scratch: Path) -> Path:
            return scratch

    built_in.SMOLLM2, built_in._convert = OwnWheel(**vars(built_in.SMOLLM2)), convert


class Torture:
    """Runs the pipelines undisturbed first, then disturbed.

    Args:
        folder: where everything is written.
        seed: of the moments, the sizes and the order of the pipelines.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        from recbole_llm.data.prepare import generate_chain

        forks.import_library()
        convert_a_tiny_llm()
        self.folder, self.random = folder, random.Random(seed)
        for name, data_seed in (("chain", 0), ("chain2", 1)):
            generate_chain(folder / "data", name, users=24, items=24, seed=data_seed, noise=0.1)
        self.wrong: list[str] = []
        self.expected: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        for name in PIPELINES:
            ended = self._run(name, self.folder / "undisturbed" / self._short(name))
            if ended.code != 0:
                raise SystemExit(f"{name} fails undisturbed: {ended.errors[-2000:]}{ended.output[-2000:]}")
            self.expected[name] = results(self.folder / "undisturbed" / self._short(name))
            self.seconds[name] = ended.seconds

    @staticmethod
    def _short(name: str) -> str:
        return name.replace(" ", "-").replace(",", "")

    def _words(self, name: str) -> list[str]:
        own = PIPELINES[name]
        shared = [word for word in SMALL if CONVERTED not in own or not word.startswith("--backbone=")]
        return ["run", f"--data_path={self.folder / 'data'}", *shared, *own]

    def _run(self, name: str, folder: Path, *more: str, **limits: int | None) -> forks.Ended:
        return forks.run([*self._words(name), *more], folder, folder / "logs", **limits)

    def _judge(self, what: str, name: str, folder: Path, ended: forks.Ended) -> None:
        if ended.code != 0:
            self.wrong.append(f"{what}: {name} ends with {ended.code}: {(ended.errors or ended.output)[-600:]}")
        elif results(folder) != self.expected[name]:
            self.wrong.append(f"{what}: {name} gives other results")
        elif left := leftovers(folder):
            self.wrong.append(f"{what}: {name} leaves {left[:3]}")

    def kill(self, number: int) -> None:
        """Kill a pipeline once or twice at random moments, then let it end."""
        name = list(PIPELINES)[number % len(PIPELINES)]
        folder = self.folder / f"kill{number}"
        for _ in range(self.random.choice((1, 1, 2))):
            moment = self.random.uniform(0.05, self.seconds[name])
            child = forks.start([*self._words(name), "--resume=True"], folder, folder / "logs")
            time.sleep(moment)
            forks.kill(child)
        self._judge(f"kill {number}", name, folder, self._run(name, folder, "--resume=True"))

    def pair(self, number: int) -> None:
        """Start a pipeline twice at nearly the same time in one folder."""
        name = list(PIPELINES)[number % len(PIPELINES)]
        folder = self.folder / f"pair{number}"
        children = []
        for place in range(2):
            words = [word for word in self._words(name) if not word.startswith(("--results_file", "--per_user_file"))]
            words += [f"--results_file=results{place}.json", f"--per_user_file=users{place}.tsv"]
            children.append(forks.start(words, folder, folder / f"logs{place}"))
            time.sleep(self.random.uniform(0, 1))
        for place, child in enumerate(children):
            ended = forks.wait(child, folder / f"logs{place}", 600)
            for kind in ("results.json", "users.tsv"):
                stem, suffix = kind.split(".")
                if (folder / f"{stem}{place}.{suffix}").exists():
                    os.replace(folder / f"{stem}{place}.{suffix}", folder / kind)
            if ended.code == 2 and "in use by" in ended.errors:
                continue  # told who holds it
            self._judge(f"pair {number}, process {place}", name, folder, ended)

    def full_disk(self, number: int) -> None:
        """Limit the size of every file, then let the pipeline end without the limit."""
        name = list(PIPELINES)[number % len(PIPELINES)]
        folder = self.folder / f"disk{number}"
        size = int(2 ** self.random.uniform(6, 20))
        ended = self._run(name, folder, file_size=size)
        if not ended.is_clean:
            self.wrong.append(f"disk {number}: {name} with {size} bytes: {ended.code} {(ended.errors or ended.output)[-900:]}")
        self._judge(f"disk {number}, after", name, folder, self._run(name, folder, "--resume=True"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("kills", 50), ("pairs", 12), ("disks", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torture = Torture(Path(folder), options.seed)
        for disturb, number in (
            (torture.kill, options.kills),
            (torture.pair, options.pairs),
            (torture.full_disk, options.disks),
        ):
            before = len(torture.wrong)
            for place in range(number):
                disturb(place)
            wrong = torture.wrong[before:]
            print(f"{disturb.__name__}: {number} cases, {len(wrong)} wrong", flush=True)
            for line in wrong:
                print(f"  {line}", flush=True)
    return 1 if torture.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
