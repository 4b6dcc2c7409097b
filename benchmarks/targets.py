"""What a target costs: every position of a window in one row, against a row for each prefix, and one target for each user.

    python benchmarks/targets.py                                     # ml-100k, which comes with RecBole
    python benchmarks/targets.py --dataset=amazon-scientific-2018 --data_path=<folder> --backbone_layers=30

The user prompts of LLM-SRec's training steps, forward and backward to the item vectors; items and losses are left out, since
they do not depend on how targets are arranged. For the same users:

    window   one window of history_length + 1 items, all positions in one row (train_targets: window)
    rows     the same prompts, each a row of its own
    last     each user's last training item (train_targets: last)
    all      rows of train_targets: all, which show up to history_length items each, as many as the window has targets

Everything is measured in turns in one process; each figure is the median over the rounds.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

if {"-h", "--help"} & set(sys.argv[1:]):
    sys.exit(print(__doc__))

sys.path.insert(0, str(Path(__file__).parents[1]))

from recbole.utils import get_model, init_seed  # noqa: E402
from step_cost import in_turns, show  # noqa: E402

from recbole_llm.config.command_line import parse_command_line  # noqa: E402
from recbole_llm.config.settings import make_config  # noqa: E402
from recbole_llm.data.shared import SharedData  # noqa: E402
from recbole_llm.data.windows import TrainingWindows  # noqa: E402

BOUNDS = {
    "tokens of a window / tokens of its longest prompt": (1.5, "at most"),
    "seconds per target, all / window": (5.0, "at least"),
}


def measure(dataset: str, settings: dict, users: int, rounds: int) -> dict:
    """Tokens and seconds of each arrangement, and their ratios."""
    config = make_config("LLMSRec", dataset, config_dict={**settings, "train_targets": "window"})
    train = SharedData().train(config)
    init_seed(config["seed"], True)
    model = get_model("LLMSRec")(config, train).to(config["device"])
    rng = np.random.default_rng(0)
    windows = TrainingWindows(train, config["history_length"])
    windows.draw(rng)
    chosen = rng.permutation(len(train.inter_feat))[:users]
    window = windows.rows(chosen)
    several = torch.from_numpy(rng.permutation(len(train.all_rows.inter_feat))[: len(window)])
    batches = {
        "window": window,
        "rows": window,
        "last": train.inter_feat[torch.from_numpy(chosen)],
        "all": train.all_rows.inter_feat[several],
    }
    prompts = {name: model.prompts.user_prompts(model.histories(rows)) for name, rows in batches.items()}

    def step(name: str) -> None:
        model.encoder.settings.share_prefix = name == "window"
        model.represent_prompts(prompts[name]).square().sum().backward()

    works = {name: lambda name=name: step(name) for name in batches}
    seconds = in_turns(works, rounds, torch.device(config["device"]))
    computed = {}
    for name in batches:
        before = model.encoder.counts.computed - model.encoder.counts.padding
        step(name)
        computed[name] = model.encoder.counts.computed - model.encoder.counts.padding - before
    targets = {name: len(rows) for name, rows in batches.items()}
    ends = np.unique(model.window_ends(window))
    whole = int((prompts["window"].lengths[ends] - prompts["window"].header_length).sum())
    results = {
        "users": users, "targets": targets, "tokens": computed, "seconds": seconds,
        "tokens_per_target": {name: computed[name] / targets[name] for name in batches},
        "seconds_per_target": {name: seconds[name] / targets[name] for name in batches},
        "tokens of a window / tokens of its longest prompt": computed["window"] / whole,
    }  # fmt: skip
    for kind in ("tokens", "seconds"):
        each = results[f"{kind}_per_target"]
        results |= {f"{kind} per target, {name} / window": each[name] / each["window"] for name in ("rows", "last", "all")}
    return results


def main() -> int:
    settings = parse_command_line(sys.argv[1:])
    rounds, users = (settings.pop(key, default) for key, default in (("rounds", 3), ("users", 4)))
    dataset, file = settings.pop("dataset", "ml-100k"), settings.pop("results_file", None)
    sys.argv = sys.argv[:1]
    defaults = {"backbone_layers": 2, "show_progress": False, "teacher_settings": {"epochs": 1}}
    with tempfile.TemporaryDirectory() as folder:
        settings = {**defaults, "checkpoint_dir": folder, **settings}
        if not file:
            os.chdir(folder)
        results = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dataset": dataset, "settings": settings}
        results |= measure(dataset, settings, users, rounds)
    show(results, file)
    print()
    within = True
    for name, value in results.items():
        if " / " in name:
            bound, side = BOUNDS.get(name, (None, ""))
            met = bound is None or (value <= bound if side == "at most" else value >= bound)
            within &= met
            print(f"{name:<56} {value:6.2f}" + ("" if bound is None else f"   {side} {bound}: {'met' if met else 'MISSED'}"))
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
