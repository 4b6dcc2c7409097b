"""What tuning by LoRA and answering by titles cost, as multiples of plain transformers and peft on the same prompts.

    python benchmarks/generation_cost.py [--dataset=ml-100k] [--backbone_layers=2] [--rounds=3] [--users=6]

    LoRA step       title_loss forward and backward / the model's own loss on the same tokens without padding
    LoRA floor      the same / the bare decoder on the same tokens, vocabulary logits where a title is predicted alone
    likelihood      20 candidates behind shared keys and values / 20 whole prompts, grouped by equal length
    greedy          batched decoding / ``model.generate`` on the same prompts, sorted by length and padded on the left

Everything is measured in turns in one process; each figure is the median over the rounds.
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

from step_cost import build, in_turns, show, step_batches  # noqa: E402

from recbole_llm.backbone.generation import greedy, score_titles, title_loss  # noqa: E402
from recbole_llm.config.command_line import parse_command_line  # noqa: E402
from recbole_llm.data.shared import SharedData  # noqa: E402

BOUNDS = {"LoRA step": 1.15, "LoRA floor": 1.15, "likelihood": 0.25, "greedy": 1.20}


def by_length(sequences: list[list[int]], most_tokens: int) -> list[list[int]]:
    """Indices of sequences of equal length, at most so many tokens together: batches without padding."""
    lengths = np.array([len(sequence) for sequence in sequences])
    groups = []
    for length in np.unique(lengths)[::-1]:
        rows = np.flatnonzero(lengths == length)
        step = max(1, most_tokens // int(length))
        groups += [rows[start : start + step].tolist() for start in range(0, len(rows), step)]
    return groups


def main() -> int:
    settings = parse_command_line(sys.argv[1:])
    rounds, dataset = settings.pop("rounds", 3), settings.pop("dataset", "ml-100k")
    users = settings.pop("users", 6)
    new_tokens, file = settings.pop("new_tokens", 16), settings.pop("results_file", None)
    sys.argv = sys.argv[:1]
    with tempfile.TemporaryDirectory() as folder:
        settings = {"backbone_layers": 2, "show_progress": False, "checkpoint_dir": folder, **settings}
        settings |= {"recommend_by": "generation", "protocol": "generation", "lora_dropout": 0.0}
        config, _, train, model, _ = build("TALLRec", dataset, settings, SharedData())
        interaction = step_batches(model, config, train, 1)[0][torch.arange(users)]
        model.seed_step(0)
        candidates = model.training_candidates(interaction, 19)
        history, lengths = model.history_items(interaction)
        batch = model.form.prompts.prompts(history, lengths, candidates)
        backbone, cost = model.backbone, model.form.generator.cost
        causal_lm, device = backbone.causal_lm, backbone.device
        vectors = model.vectors(batch)
        answers = model.form.prompts.answers(candidates[:, 0])
        titles = [model.form.prompts.answers(row) for row in candidates]
        prompts = [batch.tokens[a:b].tolist() for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]

        def ours_lora():
            losses, counts = title_loss(backbone, batch, vectors, answers, **cost)
            (losses.sum() / counts.sum()).backward()

        def plain_lora():
            whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
            for group in by_length(whole, cost["micro_batch_tokens"]):
                ids = torch.tensor([whole[row] for row in group], device=device)
                labels = ids.clone()
                for place, row in enumerate(group):
                    labels[place, : len(prompts[row])] = -100
                causal_lm(input_ids=ids, labels=labels).loss.backward()

        def floor_lora():
            whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
            for group in by_length(whole, cost["micro_batch_tokens"]):
                ids = torch.tensor([whole[row] for row in group], device=device)
                hidden = backbone.model(input_ids=ids).last_hidden_state
                read = torch.zeros(ids.shape, dtype=torch.bool, device=device)
                for place, row in enumerate(group):
                    read[place, len(prompts[row]) - 1 : -1] = True
                scores = causal_lm.get_output_embeddings()(hidden[read]).float()
                torch.nn.functional.cross_entropy(scores, ids[:, 1:][read[:, :-1]]).backward()

        def ours_likelihood():
            with torch.no_grad():
                score_titles(backbone, batch, vectors, titles, **cost)

        def plain_likelihood():
            whole = [prompt + title for prompt, row in zip(prompts, titles, strict=True) for title in row]
            with torch.no_grad():
                for group in by_length(whole, cost["micro_batch_tokens"]):
                    ids = torch.tensor([whole[row] for row in group], device=device)
                    hidden = backbone.model(input_ids=ids).last_hidden_state
                    causal_lm.get_output_embeddings()(hidden[:, -16:]).float().log_softmax(dim=-1)

        def ours_greedy():
            greedy(backbone, batch, vectors, new_tokens, [], **cost)

        def plain_greedy():
            order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
            for start in range(0, len(order), 10):
                rows = order[start : start + 10]
                width = max(len(prompts[row]) for row in rows)
                pad = [width - len(prompts[row]) for row in rows]
                ids = torch.tensor([[0] * p + prompts[row] for p, row in zip(pad, rows, strict=True)], device=device)
                mask = torch.tensor([[0] * p + [1] * (width - p) for p in pad], device=device)
                causal_lm.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, min_new_tokens=new_tokens,
                    pad_token_id=0,
                )  # fmt: skip

        model.train()
        works = {"LoRA step": (ours_lora, plain_lora), "LoRA floor": (ours_lora, floor_lora)}
        tests = {"likelihood": (ours_likelihood, plain_likelihood), "greedy": (ours_greedy, plain_greedy)}
        ratios = {}
        for group in (works, tests):
            for name, (ours, plain) in group.items():
                seconds = in_turns({"ours": ours, "plain": plain}, rounds, torch.device(config["device"]))
                ratios[name] = {**seconds, "ratio": seconds["ours"] / seconds["plain"], "bound": BOUNDS[name]}
            model.eval()
    show({"torch": torch.__version__, "dataset": dataset, "settings": settings, **ratios}, file)
    for name, found in ratios.items():
        verdict = "met" if found["ratio"] <= found["bound"] else "MISSED"
        print(f"{name:<12} {found['ratio']:.2f}   bound {found['bound']:.2f}: {verdict}")
    return 0 if all(found["ratio"] <= found["bound"] for found in ratios.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
