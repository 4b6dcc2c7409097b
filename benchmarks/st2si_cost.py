"""What ST2SI costs: ranking one user against a bare forward pass, and tuning its head from stored states against forwards.

    python benchmarks/st2si_cost.py                                  # ml-100k, which comes with RecBole, all 30 layers
    python benchmarks/st2si_cost.py --backbone_layers=2 --users=128 --rounds=5

    ranking one user    from a history to the ranks of all items, one user at a time / the same LLM run by plain transformers
                        on a prompt of as many tokens
    epoch               optimizer steps of the head on ``users`` users and their share of the ID alignment: with forwards of the
                        LLM / from stored states (made before, and not counted)

What is left of an epoch is the softmax over all items, which no LLM's size changes: the gain grows with the LLM, and with 2
layers it is small.

Everything is measured in turns in one process, so that a ratio does not depend on how busy the machine is; each figure is the
median over the rounds.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

if {"-h", "--help"} & set(sys.argv[1:]):
    sys.exit(print(__doc__))

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from recbole.utils import get_model, get_trainer, init_seed  # noqa: E402
from step_cost import in_turns, show, step_batches  # noqa: E402

from recbole_llm.config.command_line import parse_command_line  # noqa: E402
from recbole_llm.config.settings import make_config  # noqa: E402
from recbole_llm.data.loaders import dataloaders  # noqa: E402
from recbole_llm.data.shared import SharedData  # noqa: E402

AT_MOST = {"ranking one user / bare forward": 1.05}
AT_LEAST = {"epoch with forwards / epoch from stored states": 50.0}


def build(dataset: str, settings: dict, data: SharedData, **own):
    config = make_config("ST2SI", dataset, config_dict={**settings, **own})
    splits, train = data.splits(config), data.train(config)
    init_seed(config["seed"], True)
    return config, splits, train, get_model("ST2SI")(config, train).to(config["device"])


def one_user(dataset: str, settings: dict, data: SharedData, users: int, rounds: int) -> dict:
    """Full ranking at batch 1, the paper's Table 7."""
    config, splits, _, model = build(dataset, settings, data, tuning="frozen")
    model.eval()
    split = splits["test"]
    rows = np.sort(np.random.default_rng(0).permutation(len(split.inter_feat))[:users])
    batches = [split.inter_feat[torch.from_numpy(rows[place : place + 1])].to(config["device"]) for place in range(users)]
    lengths = [int(model.prompts.sequences(*model.history_items(batch)).lengths[0]) for batch in batches]
    tokens = [torch.randint(100, 1000, (1, length), device=config["device"]) for length in lengths]

    def ours():
        for batch in batches:
            model.full_sort_predict(batch).topk(10)

    @torch.no_grad()
    def bare():
        for prompt in tokens:
            model.backbone.model(input_ids=prompt, use_cache=False)

    seconds = in_turns({"ours": ours, "bare": bare}, rounds, torch.device(config["device"]))
    return {
        "users": users,
        "tokens_per_user": float(np.mean(lengths)),
        "seconds_per_user": {name: value / users for name, value in seconds.items()},
        "ranking one user / bare forward": seconds["ours"] / seconds["bare"],
    }


def head_tuning(dataset: str, settings: dict, data: SharedData, users: int, rounds: int) -> dict:
    """Optimizer steps of the head, with and without the LLM."""
    works, costs, steps = {}, {}, 0
    for name, tuning in (("stored", "ilp"), ("forwards", "frozen")):
        config, splits, train, model = build(dataset, settings, data, tuning=tuning, windows="fixed")
        # [Q] stays as well where the states are not stored: else there would be a backward pass through the LLM.
        model.query.requires_grad_(False)
        chosen = np.sort(np.random.default_rng(0).permutation(len(train.inter_feat))[:users])
        model._dataset = train.copy(train.inter_feat[torch.from_numpy(chosen)])
        trainer = get_trainer(config["MODEL_TYPE"], "ST2SI")(config, model)
        train_data, *_ = dataloaders(config, train, splits)
        per_epoch = -(-len(train.inter_feat) // config["train_batch_size"])
        batches = step_batches(model, config, model._dataset, -(-users // config["train_batch_size"]))
        steps = len(batches)

        def epoch(trainer=trainer, train_data=train_data, batches=batches, per_epoch=per_epoch):
            for number, batch in enumerate(batches):
                trainer.step = number
                trainer._train_step(train_data, batch, per_epoch, 1)

        works[name], costs[name] = epoch, model.encoder.counts
    works["stored"]()  # the states are computed here
    before = costs["stored"].calls
    seconds = in_turns(works, rounds, torch.device(config["device"]))
    assert costs["stored"].calls == before, "an epoch from stored states ran the LLM"
    return {
        "users": users,
        "steps": steps,
        "seconds_per_step": {name: value / steps for name, value in seconds.items()},
        "epoch with forwards / epoch from stored states": seconds["forwards"] / seconds["stored"],
    }


def main() -> int:
    settings = parse_command_line(sys.argv[1:])
    rounds, users = (settings.pop(key, default) for key, default in (("rounds", 3), ("users", 32)))
    dataset, file = settings.pop("dataset", "ml-100k"), settings.pop("results_file", None)
    sys.argv = sys.argv[:1]
    settings = {"show_progress": False, **settings}
    data = SharedData()
    results = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dataset": dataset, "settings": settings}
    with tempfile.TemporaryDirectory() as folder:
        settings = {**settings, "checkpoint_dir": folder}
        results["inference"] = one_user(dataset, settings, data, users, rounds)
        results["head tuning"] = head_tuning(dataset, settings, data, users, rounds)
    show(results, file)
    print()
    within = True
    for part in ("inference", "head tuning"):
        for name, value in results[part].items():
            if " / " not in name:
                continue
            bound = AT_MOST.get(name, AT_LEAST.get(name))
            met = value <= bound if name in AT_MOST else value >= bound
            within &= met
            print(f"{name:<50} {value:8.2f}   bound {bound:.2f}: {'met' if met else 'MISSED'}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
