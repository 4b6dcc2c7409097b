"""What one recommendation costs beside one forward pass of its prompt.

    python benchmarks/recommend_cost.py saved/LLMSTAR-ml-100k-seed2020-0a1b2c3d4e [--rounds=50]

A trained model is loaded and asked once (which encodes the items, or reads their vectors); then, in turns, one user's
recommendation and the bare forward pass of that user's prompt through the LLM are timed. Prints the medians and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import recbole_llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a trained LLM recommender, by retrieval")
    parser.add_argument("--rounds", type=int, default=50, help="users asked for (default 50)")
    arguments = parser.parse_args()
    started = time.perf_counter()
    trained = recbole_llm.load(arguments.checkpoint)
    loaded = time.perf_counter()
    tokens = trained.dataset.field2id_token[trained.dataset.uid_field][1 : arguments.rounds + 1]
    users = [str(token) for token in tokens]
    trained.recommend(users=users[0])
    print(f"{trained}: loaded in {loaded - started:.1f} s, first answer after {time.perf_counter() - loaded:.2f} s more")
    model, costs = trained.model, {"recommend": [], "prompt": []}
    for user in users:
        sequence = trained.sequence_of_user(trained.user_number(user))
        interaction = trained.rows([sequence], torch.zeros(1, dtype=torch.long))
        prompts = model.prompts.user_prompts(model.histories(interaction))
        vectors = model.vectors(prompts, model.user_out, model.user_inputs(interaction)).detach()
        started = time.perf_counter()
        with torch.no_grad():
            model.encoder(prompts, vectors)
        between = time.perf_counter()
        trained.recommend(users=user)
        costs["prompt"].append(between - started)
        costs["recommend"].append(time.perf_counter() - between)
    recommend, prompt = (statistics.median(costs[name]) for name in ("recommend", "prompt"))
    print(f"forward of the prompt {1000 * prompt:.1f} ms, recommend {1000 * recommend:.1f} ms, ratio {recommend / prompt:.2f}")


if __name__ == "__main__":
    main()
