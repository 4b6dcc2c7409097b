"""Odd values for every key: each ends as a run, or with exit code 2 and one sentence.

    python tests/robustness/fuzz.py                          # all of them
    python tests/robustness/fuzz.py --per-key=20 --seed=1    # of each key as many, evenly of all sorts of values
    python tests/robustness/fuzz.py --keys=seed,clip_grad_norm

One process imports the library, reads its settings files and prepares a small data set with a trained SASRec; every case is a
fork of it with limits of memory and of the processor's time, so that a case costs what its own checks and training cost.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import forks

SECONDS = 20  # of the processor: a refusal takes no longer; a run may take RUN_SECONDS
RUN_SECONDS = 120
WAITING = 3  # times as long may pass on the clock, where other programs use the processor
MEMORY = 8 << 30
MARK = "executed-by-fuzz"  # a file that evaluated text would make

NUMBERS = """
    0 -0 1 -1 2 3 7 20 99 1000 65536 1000000000 4294967296 -4294967297 1000000000000000000000000 0.0 0.1 0.5 1.0 1.5 -0.5
    1e-300 1e308 1e400 -1e400 .inf -.inf .nan nan inf 0x10 1_000 007 1e3 1,5
"""
WORDS = """
    x None null ~ True false yes tiny SASRec LLMSTAR Nobody = -- - * &a %s {0} {history} 2020-01-01 <|im_end|> ../x / . saved
    /dev/null /dev/full /proc/self/mem no/such/folder/file.json tiny.gguf http://127.0.0.1:9/v1
"""
TEXTS = ["", " ", "a b", "é", "\u202e", "\U0001f984" * 40, "\x1b[31mred", "line\nbreak", "\x01", "a" * 5000, "lambda: 0"]
TEXTS += [f"__import__('os').system('touch {MARK}')", "!!python/object/apply:os.getcwd []"]
LISTS = """
    [] | [[]] | [1] | [1, 2] | [0] | [-1] | [None] | [true, x] | [[1, 2], [3]] | [a, a] | [0.9, 2.0] | [.nan, 0.9] | {} | {a: 1}
    | {a: {b: [1]}} | {mode: uni9} | {mode: full} | {max_norm: -1} | {max_norm: 1.0} | {epochs: 0} | {hidden_size: 7}
    | [{name: a}] | [{name: a, trains: [lora], vectors: False}] | [ | { | '
"""
SORTS = [NUMBERS.split(), WORDS.split(), TEXTS, [value.strip() for value in LISTS.split("|")]]
VALUES = [value for sort in SORTS for value in sort]

SMALL = """
    --dataset=chain --backbone=tiny --backbone_dtype=float32 --head_hidden_size=8 --representation_size=8 --epochs=1
    --train_batch_size=16 --use_gpu=False --show_progress=False --history_length=4 --valid_users=8 --eval_step=1
    --SASRec.epochs=1
""".split()
OF_PROTOCOL = {
    "retrieval": ["--eval_args={mode: uni9}", "--topk=[5]", "--valid_metric=Hit@5"],
    "generation": ["--protocol=generation", "--recommend_by=generation", "--eval_args={mode: uni4}", "--train_candidates=5"],
    "full": [],
}


class Outcome(NamedTuple):
    """What became of a case: ``run``, ``refused``, or what is wrong with it."""

    kind: str
    text: str
    seconds: float


def keys() -> dict[str, list[str]]:
    """Every key that a run can be given, with the models that it is tried on: the first of ours that knows it, and SASRec."""
    from recbole_llm import registry
    from recbole_llm.config.schema import known_keys

    owners: dict[str, list[str]] = {}
    for model in registry.MODELS:
        for key in known_keys(model):
            owners.setdefault(key, [model])
    for key in known_keys("SASRec"):
        owners.setdefault(key, []).append("SASRec")
    return owners


def cases(number: int | None, seed: int, per_key: int | None = None, only: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """Draws of (model, key, value), without repeats.

    Args:
        number: most of them; None: all.
        seed: of the draw.
        per_key: values of each key; None: all of them.
        only: these keys; none: every key.
    """
    chance = random.Random(seed)
    everything = [
        (chance.choice(models), key, value)
        for key, models in keys().items()
        if not only or key in only
        for value in (VALUES if per_key is None else sample(chance, per_key))
    ]
    chance.shuffle(everything)
    return everything[:number]


def sample(chance: random.Random, number: int) -> list[str]:
    """So many of the values, evenly of all sorts."""
    shuffled = [chance.sample(sort, len(sort)) for sort in SORTS]
    chance.shuffle(shuffled)
    return [value for turn in zip_longest(*shuffled) for value in turn if value is not None][:number]


def arguments(model: str, key: str, value: str, data: Path) -> list[str]:
    """The command line of a case."""
    from recbole_llm.config.schema import known_keys

    protocol = {"ZeroShot": "generation", "ST2SI": "full"}.get(model, "retrieval")
    given = [*SMALL, *OF_PROTOCOL[protocol]]
    if model == "SASRec":
        given.append("--protocol=retrieval")
    else:
        model = f"SASRec,{model}"
    known = {"dataset", "SASRec.epochs", *known_keys(model.rpartition(",")[2])}
    given = [word for word in given if word[2:].partition("=")[0] in known - {key}]
    return [f"--model={model}", f"--data_path={data}", *given, f"--{key}={value}"]


def judge(code: int | None, output: str, errors: str, seconds: float, folder: Path) -> Outcome:
    """Decide what a finished case was."""
    said = [line for line in errors.splitlines() if line.strip()]
    sentence = next((line for line in reversed(said) if line.startswith(("Error:", "Interrupted:"))), "")
    if (folder / MARK).exists():
        return Outcome("evaluated text", errors, seconds)
    if code is None:
        return Outcome("too slow", errors[-300:], seconds)
    if "Traceback (most recent call last)" in errors + output:
        return Outcome("traceback", errors[-2000:], seconds)
    if "\x1b[31mred" in errors + output or "\u202e" in errors + output:
        return Outcome("raw escape", errors[-500:], seconds)
    if code == 0:
        return Outcome("run", "", seconds)
    if code != 2:
        return Outcome(f"exit code {code}", errors[-500:], seconds)
    if "FAILED" in output:
        return Outcome("refused", sentence, seconds)
    if not sentence:
        return Outcome("no sentence", errors[-500:], seconds)
    if seconds > SECONDS:
        return Outcome("slow refusal", sentence, seconds)
    return Outcome("refused", sentence, seconds)


def run_case(words: Sequence[str], folder: Path) -> Outcome:
    """Run a command line in a fork with limits."""
    limits = {"memory": MEMORY, "file_size": 1 << 30, "processor": RUN_SECONDS}
    ended = forks.run(["run", *words], folder, folder / "logs", WAITING * RUN_SECONDS, **limits)
    seconds = max(ended.processor, ended.seconds / WAITING)
    return judge(ended.code, ended.output, ended.errors, seconds, folder)


def prepare(folder: Path) -> Path:
    """A small data set, and beside it ``saved`` with SASRec trained on it under each protocol; its path."""
    from recbole_llm.config.first_look import first_look
    from recbole_llm.configure import configure
    from recbole_llm.data.prepare import generate_chain
    from recbole_llm.registry import MODELS

    data = folder / "data"
    generate_chain(data, "chain", users=24, items=24, seed=0, noise=0.1)
    for protocol, key in (("retrieval", "LLMSRec"), ("generation", "ZeroShot"), ("full", "ST2SI")):
        words = [word for word in arguments(key, "seed", "2020", data) if not word.startswith("--model=")]
        ended = forks.run(["run", f"--model=SASRec,{key}", *words], folder, folder / "logs" / protocol)
        if ended.code != 0:
            raise SystemExit(f"{key} fails without an odd value: {ended.errors[-2000:]}{ended.output[-2000:]}")
    for other in [*folder.glob("saved/[!S]*"), *folder.glob("saved/ST2SI*")]:
        shutil.rmtree(other)
    for model in MODELS:  # the settings files, which are read once for all cases
        settings = {"data_path": str(data), "backbone": "tiny"}
        first_look([model], "chain", settings, [])
        configure(model, "chain", ["SASRec", model], None, None, settings)
    return data


def fuzz(drawn: Sequence[tuple[str, str, str]], folder: Path) -> tuple[Counter, list[tuple[list[str], Outcome]]]:
    """Run cases of :func:`cases`; returns how many ended how, and those that ended wrongly."""
    forks.import_library()
    data = prepare(folder)
    counts, wrong = Counter(), []
    for place, (model, key, value) in enumerate(drawn):
        words = arguments(model, key, value, data)
        if "\x00" in value:
            words[-1] = words[-1].replace("\x00", "\x01")  # no process gets a NUL in its arguments
        shutil.copytree(folder / "saved", folder / f"case{place}" / "saved")
        outcome = run_case(words, folder / f"case{place}")
        shutil.rmtree(folder / f"case{place}", ignore_errors=True)
        if place % 500 == 499:
            print(f"{place + 1} of {len(drawn)}: {dict(counts)}")
        counts[outcome.kind] += 1
        if outcome.kind not in ("run", "refused"):
            wrong.append((words, outcome))
            print(
                json.dumps({"key": key, "value": value[:80], "model": model, "kind": outcome.kind, "text": outcome.text[-700:]})
            )
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, help="most cases")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many cases, which were run before")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--per-key", type=int, help="values of each key")
    parser.add_argument("--keys", default="", help="these keys alone, with commas between them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        drawn = cases(options.cases, options.seed, options.per_key, [key for key in options.keys.split(",") if key])
        drawn = drawn[options.skip :]
        counts, wrong = fuzz(drawn, Path(folder))
    print(
        f"{len({key for _, key, _ in drawn})} keys, {sum(counts.values())} cases in {time.monotonic() - started:.0f} s: "
        + ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, errors="replace", line_buffering=True)
    sys.exit(main())
