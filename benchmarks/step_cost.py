"""What a training step and an evaluation cost, as multiples of what the LLM itself costs on the same tokens.

    python benchmarks/step_cost.py                                   # ml-100k, which comes with RecBole
    python benchmarks/step_cost.py --dataset=amazon-scientific-2018 --data_path=<folder> --backbone_layers=30

The floor is the same backbone run by plain transformers on exactly the tokens that must be computed: forward, and in
training backward to the inputs, no padding, prompts of equal length together. Three floors are timed:

    whole    every prompt from its first token
    needed   without the instruction header, which is constant and need not be computed again

    even     as needed, the same tokens in prompts of about one length: what a GPU does with few and large calls

Ours is measured against ``needed``, the lowest on a CPU. Everything is measured in turns in one process, so that a
ratio does not depend on how busy the machine is; each figure is the median over the rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

if {"-h", "--help"} & set(sys.argv[1:]):
    sys.exit(print(__doc__))

sys.path.insert(0, str(Path(__file__).parents[1]))

from recbole.data.dataloader import TrainDataLoader  # noqa: E402
from recbole.utils import get_model, get_trainer, init_seed  # noqa: E402

from recbole_llm.config.command_line import parse_command_line  # noqa: E402
from recbole_llm.config.settings import make_config  # noqa: E402
from recbole_llm.data.loaders import dataloaders  # noqa: E402
from recbole_llm.data.perturbation import draw_negatives  # noqa: E402
from recbole_llm.data.shared import SharedData  # noqa: E402
from recbole_llm.evaluation.candidates import draw_candidates  # noqa: E402
from recbole_llm.evaluation.evaluate import evaluate_ranking  # noqa: E402
from recbole_llm.prompt.batch import PromptBatch  # noqa: E402

BOUNDS = {
    "LLM-SRec step / floor": 1.20,
    "LLM-STAR user prompts / four separate prompts": 0.80,
    "evaluation / floor": 1.15,
    "ten validations / epoch": 0.50,
}


def show(results: dict, file: str | None) -> None:
    """Print the results as JSON, and write them to ``file`` where one is named."""
    text = json.dumps(results, indent=2, default=str)
    print(text)
    if file:
        Path(file).write_text(text + "\n", encoding="utf-8")


def clock(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``work`` takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(works: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each work, measured in turns after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for count in range(rounds + 1):
        for name, work in works.items():
            taken = clock(work, device)
            if count:
                seconds[name].append(taken)
        print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return {name: statistics.median(values) for name, values in seconds.items()}


def plain_transformers(model, lengths: np.ndarray, backward: bool, most_tokens: int) -> None:
    """The bare LLM on sequences of the given lengths, those of equal length together: no padding, no mask, no logits."""
    backbone = model.backbone
    device, hidden = backbone.embedding.weight.device, backbone.input_size
    for length in np.unique(lengths)[::-1]:
        rows = int((lengths == length).sum())
        step = max(1, most_tokens // int(length))
        for start in range(0, rows, step):
            size = (min(step, rows - start), int(length), hidden)
            inputs = torch.randn(size, device=device, dtype=backbone.dtype, requires_grad=backward)
            with torch.set_grad_enabled(backward):
                output = backbone.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            if backward:
                output[:, -1].float().sum().backward()


def decoder_flops(backbone, lengths: np.ndarray, computed: np.ndarray, backward: bool) -> float:
    """Floating-point operations of the decoder on the last ``computed`` tokens of prompts of some ``lengths``.

    Two for each weight of a linear layer and token, and in attention four for each token that a token sees and each
    dimension of its queries. Backward to the inputs, with no gradients of weights: as many again in the linear layers, twice
    as many in attention. No output head.
    """
    config = backbone.causal_lm.config.get_text_config(decoder=True)
    weights = sum(module.weight.numel() for module in backbone.model.modules() if isinstance(module, torch.nn.Linear))
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    lengths, before = lengths.astype(np.float64), (lengths - computed).astype(np.float64)
    seen = float((lengths * (lengths + 1) - before * (before + 1)).sum()) / 2
    linear, attention = 2.0 * weights * float(computed.sum()), 4.0 * width * seen * backbone.layers
    return linear * (2 if backward else 1) + attention * (3 if backward else 1)


def evened(lengths: np.ndarray) -> np.ndarray:
    """As many prompts with as many tokens, all of about the same length: few calls of the LLM, and large ones."""
    total, count = int(lengths.sum()), len(lengths)
    return np.full(count, total // count) + (np.arange(count) < total % count)


def needed(batch: PromptBatch) -> np.ndarray:
    """Tokens of each prompt after the header and after what it shares with its parent."""
    return batch.lengths - np.maximum(batch.header_length, batch.shared)


def step_batches(model, config, train, count: int) -> list:
    """Interactions of ``count`` training steps."""
    loader = TrainDataLoader(config, train, None, shuffle=False)
    rows = np.random.default_rng(0).permutation(len(train.inter_feat))
    size = config["train_batch_size"]
    return [
        loader.transform(train, train.inter_feat[torch.from_numpy(rows[i * size : (i + 1) * size])]).to(config["device"])
        for i in range(count)
    ]


def build(name: str, dataset: str, settings: dict, data: SharedData):
    config = make_config(name, dataset, config_dict=settings)
    splits, train = data.splits(config), data.train(config)
    init_seed(config["seed"], True)
    model = get_model(name)(config, train).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
    return config, splits, train, model, trainer


def training_step(dataset: str, settings: dict, data: SharedData, steps: int, rounds: int) -> dict:
    """LLM-SRec: whole optimizer steps (prompts, encoder, heads, losses, backward, Adam) against the floor."""
    config, splits, train, model, trainer = build("LLMSRec", dataset, settings, data)
    batches = step_batches(model, config, train, steps)
    train_data, *_ = dataloaders(config, train, splits)
    per_epoch = -(-len(train.inter_feat) // config["train_batch_size"])
    whole, short = [], []
    for number, batch in enumerate(batches):
        model.seed_step(number)
        items = np.unique(model.training_candidates(batch))
        for prompts in (model.prompts.item_prompts(items), model.prompts.user_prompts(model.histories(batch))):
            whole.append(prompts.lengths)
            short.append(needed(prompts))
    whole, short = np.concatenate(whole), np.concatenate(short)

    def ours():
        for number, batch in enumerate(batches):
            trainer.step = number
            trainer._train_step(train_data, batch, per_epoch, 1)

    budget = config["micro_batch_tokens"]
    seconds = in_turns(
        {
            "ours": ours,
            "needed": lambda: plain_transformers(model, short, True, budget),
            "whole": lambda: plain_transformers(model, whole, True, budget),
            "even": lambda: plain_transformers(model, evened(short), True, budget),
        },
        rounds,
        torch.device(config["device"]),
    )
    return {
        "steps": steps,
        "users_per_step": config["train_batch_size"],
        "tokens_whole": int(whole.sum()),
        "tokens_needed": int(short.sum()),
        "flops_per_step": decoder_flops(model.backbone, whole, short, True) / steps,
        "seconds_per_step": {name: value / steps for name, value in seconds.items()},
        "LLM-SRec step / floor": seconds["ours"] / seconds["needed"],
        "LLM-SRec step / whole prompts": seconds["ours"] / seconds["whole"],
        "LLM-SRec step / floor with prompts of equal length": seconds["ours"] / seconds["even"],
    }


def negatives(dataset: str, settings: dict, data: SharedData, steps: int, rounds: int) -> dict:
    """LLM-STAR: the user prompts with their negatives, encoded together, against four separate prompts each."""
    config, splits, train, model, trainer = build("LLMSTAR", dataset, settings, data)
    batches = step_batches(model, config, train, steps)
    train_data, *_ = dataloaders(config, train, splits)
    per_epoch = -(-len(train.inter_feat) // config["train_batch_size"])
    prompts = []
    for number, batch in enumerate(batches):
        model.seed_step(number)
        histories = model.histories(batch)
        perturbed, parents = draw_negatives(histories.items, histories.lengths, model.rng, **model.perturbations)
        prompts.append(model.prompts.perturbed_prompts(histories, perturbed, parents))
    lengths = np.concatenate([batch.lengths for batch in prompts])
    computed = np.concatenate([needed(batch) for batch in prompts])

    def ours():
        for batch in prompts:
            model.represent_prompts(batch).square().sum().backward()

    def separately():
        model.encoder.settings.share_prefix = model.encoder.settings.share_header = False
        ours()
        model.encoder.settings.share_prefix = model.encoder.settings.share_header = True

    def whole_step():
        for number, batch in enumerate(batches):
            trainer.step = number
            trainer._train_step(train_data, batch, per_epoch, 1)

    seconds = in_turns(
        {
            "ours": ours,
            "separately": separately,
            "plain": lambda: plain_transformers(model, lengths, True, config["micro_batch_tokens"]),
            "step": whole_step,
        },
        rounds,
        torch.device(config["device"]),
    )
    return {
        "steps": steps,
        "negatives_per_user": sum(int((batch.parent >= 0).sum()) for batch in prompts)
        / sum(int((batch.parent < 0).sum()) for batch in prompts),
        "tokens_separate": int(lengths.sum()),
        "tokens_needed": int(computed.sum()),
        "flops_per_step": decoder_flops(model.backbone, lengths, computed, True) / steps,
        "seconds_per_step": {name: value / steps for name, value in seconds.items()},
        "LLM-STAR user prompts / four separate prompts": seconds["ours"] / seconds["plain"],
        "LLM-STAR user prompts / four separate prompts, padded and batched as ours": seconds["ours"] / seconds["separately"],
        "LLM-STAR whole step with items / four separate prompts": seconds["step"] / seconds["plain"],
    }


def evaluation(dataset: str, settings: dict, data: SharedData, users: int, rounds: int, step_seconds: float) -> dict:
    """Sampled evaluation against the floor on its histories and its candidates; validation against an epoch."""
    config, splits, train, model, trainer = build("LLMSRec", dataset, settings, data)
    split = splits["test"]
    rows = np.sort(np.random.default_rng(0).permutation(len(split.inter_feat))[:users])
    drawn = draw_candidates(split, 99, config["seed"], "test", rows=rows)
    histories = model.prompts.user_prompts(model.histories(split.inter_feat[torch.from_numpy(rows)]))
    items = model.prompts.item_prompts(np.unique(drawn))
    lengths = np.concatenate([needed(histories), needed(items)])
    flops = decoder_flops(model.backbone, np.concatenate([histories.lengths, items.lengths]), lengths, False)
    model.eval()

    def ours():
        with torch.no_grad():  # new weights, as after a training step: the item table is computed again
            model.user_out.add_(0.0)
        evaluate_ranking(model.score, split, config, "test", rows=rows, eval_batch_rows=config["eval_batch_rows"])

    valid_data = dataloaders(config, train, splits)[1]
    seconds = in_turns(
        {
            "ours": ours,
            "floor": lambda: plain_transformers(model, lengths, False, config["micro_batch_tokens"]),
            "even": lambda: plain_transformers(model, evened(lengths), False, config["micro_batch_tokens"]),
            "validation": lambda: (model.user_out.data.add_(0.0), trainer.evaluate(valid_data, load_best_model=False)),
        },
        rounds,
        torch.device(config["device"]),
    )
    per_epoch = -(-len(train.inter_feat) // config["train_batch_size"])
    return {
        "users": len(rows),
        "distinct_candidates": len(items),
        "tokens_needed": int(lengths.sum()),
        "flops": flops,
        "seconds": seconds,
        "evaluation / floor": seconds["ours"] / seconds["floor"],
        "evaluation / floor with prompts of equal length": seconds["ours"] / seconds["even"],
        "epoch_steps": per_epoch,
        "validation_users": config["valid_users"],
        "ten validations / epoch": 10 * seconds["validation"] / (per_epoch * step_seconds),
    }


def main() -> int:
    settings = parse_command_line(sys.argv[1:])
    rounds, steps, users = (settings.pop(key, default) for key, default in (("rounds", 5), ("steps", 4), ("users", 100)))
    dataset, file = settings.pop("dataset", "ml-100k"), settings.pop("results_file", None)
    sys.argv = sys.argv[:1]
    settings = {"backbone_layers": 2, "show_progress": False, "teacher_settings": {"epochs": 1}, **settings}
    with tempfile.TemporaryDirectory() as folder:
        settings.setdefault("checkpoint_dir", folder)
        os.chdir(folder) if not file else None
        data = SharedData()
        results = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dataset": dataset, "settings": settings}
        results["training"] = training_step(dataset, settings, data, steps, rounds)
        results["negatives"] = negatives(dataset, settings, data, max(1, steps // 2), rounds)
        step_seconds = results["training"]["seconds_per_step"]["ours"]
        results["evaluation"] = evaluation(dataset, settings, data, users, rounds, step_seconds)
    show(results, file)
    print()
    within = True
    for part in ("training", "negatives", "evaluation"):
        for name, value in results[part].items():
            if " / " in name:
                bound = BOUNDS.get(name)
                within &= bound is None or value <= bound
                verdict = "" if bound is None else f"   bound {bound:.2f}: {'met' if value <= bound else 'MISSED'}"
                print(f"{name:<74} {value:6.2f}{verdict}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
