"""Latency and throughput of `recbole-llm serve`, beside the bare forward passes of the same prompts.

    python benchmarks/serving.py saved/LLMSRec-ml-100k-seed2020-0a1b2c3d4e [--questions=200] [--threads=1] [--items=1000000]

A server is started for a trained LLM recommender, by retrieval. At each concurrency that many clients ask for users of the
data set, one question after the other. The floor is one forward pass of the LLM's plain decoder over as many of these users'
prompts, padded to the longest, in the process of the clients, before and after each round. Prints a table in Markdown. With
--items, exact search and FAISS among that many random vectors are timed, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import httpx2 as httpx
import numpy as np
import torch

import recbole_llm
from recbole_llm.serving.index import ExactIndex, FaissIndex

CONCURRENCY = (1, 8, 32)


def floor(model, lengths: Sequence[int], together: int, seconds: float = 5.0) -> float:
    """Seconds of a plain forward pass over ``together`` prompts, the median of passes over different ones."""
    times, place, end = [], 0, time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        chosen = [lengths[(place + number) % len(lengths)] for number in range(together)]
        place += together
        inputs = torch.randn(together, max(chosen), model.backbone.input_size, dtype=model.backbone.dtype)
        started = time.perf_counter()
        with torch.no_grad():
            model.backbone.model(inputs_embeds=inputs, use_cache=False)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


async def ask(address: str, users: Sequence[str], together: int) -> tuple[list[float], float]:
    """Seconds of each question, and of all."""
    waiting, times = list(users), []
    limits = httpx.Limits(max_connections=together)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=600) as client:

        async def one_client() -> None:
            while waiting:
                started = time.perf_counter()
                answer = await client.post("/recommend", json={"user": waiting.pop(), "topk": 10})
                answer.raise_for_status()
                times.append(time.perf_counter() - started)

        started = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(together)))
        return times, time.perf_counter() - started


def serve(folder: str, threads: int) -> tuple[subprocess.Popen, str]:
    """Start a server; its process and address."""
    command = [sys.executable, "-m", "recbole_llm", "serve", folder, "--port=0", "--max_seconds=600"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stderr:
        if line.startswith("Ready"):
            return process, re.search(r"http://[\d.:]+", line)[0]
    sys.exit("the server did not start")


def search(items: int, size: int = 64) -> None:
    """Time exact search and FAISS among random vectors around 2,000 centers."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(2000, size)).astype(np.float32)
    vectors = centers[rng.integers(2000, size=items + 1)] + 0.5 * rng.normal(size=(items + 1, size)).astype(np.float32)
    vectors[0] = 0
    queries = vectors[rng.integers(1, items, size=256)] + 0.5 * rng.normal(size=(256, size)).astype(np.float32)
    vectors, queries = torch.from_numpy(vectors), torch.from_numpy(queries.astype(np.float32))
    started = time.perf_counter()
    approximate = FaissIndex(vectors, queries[:128])
    built, nothing = time.perf_counter() - started, [np.zeros(0, dtype=np.int64)]
    print(f"\n{items:,} items, {size} wide: {approximate.name}, built in {built:.0f} s")
    for index in (ExactIndex(vectors), approximate):
        times = []
        for query in queries[128:192]:
            started = time.perf_counter()
            index.search(query[None], [10], nothing)
            times.append(time.perf_counter() - started)
        print(f"{index.name.split(',')[0]}: {1000 * statistics.median(times):.2f} ms a user")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a trained LLM recommender, by retrieval, or of its export with users")
    parser.add_argument("--questions", type=int, default=200, help="at each concurrency (default 200)")
    parser.add_argument("--threads", type=int, default=1, help="of the server, and of the floor (default 1)")
    parser.add_argument("--items", type=int, default=0, help="time the search among as many random vectors (default: not)")
    parser.add_argument("--output", help="write the figures as JSON, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trained = recbole_llm.load(arguments.run)
    model = trained.model
    numbers = trained.users()
    numbers = numbers[np.random.default_rng(0).permutation(len(numbers))[: arguments.questions]]
    names = trained.dataset.field2id_token[trained.dataset.uid_field]
    users = [str(names[number]) for number in numbers]
    rows = trained.rows([trained.sequence_of_user(int(number)) for number in numbers], torch.from_numpy(numbers))
    prompts = model.prompts.user_prompts(model.histories(rows))
    lengths = np.diff(prompts.offsets).tolist()
    process, address = serve(arguments.run, arguments.threads)
    figures = []
    try:
        asyncio.run(ask(address, users[:16], 4))  # the first answers keep what all prompts share
        for together in CONCURRENCY:
            before = floor(model, lengths, together)
            times, whole = asyncio.run(ask(address, (users * 32)[: max(arguments.questions, 4 * together)], together))
            plain = (before + floor(model, lengths, together)) / 2
            p50, p99 = np.percentile(times, [50, 99])
            row = {"concurrency": together, "floor": plain, "p50": p50, "p99": p99, "users_per_second": len(times) / whole}
            figures.append(row)
    finally:
        process.terminate()
        process.wait()
    what = f"{trained.config['model']} on {trained.config['dataset']}, {model.backbone.identity['name']}"
    size = f"{model.backbone.layers} layers, {np.mean(lengths):.0f} tokens a prompt, {arguments.threads} thread(s)"
    print(f"{what}, {size}\n")
    print("| at a time | floor, ms | p50, ms | p99, ms | users/s | floor, users/s | p50 / floor |")
    print("|---|---|---|---|---|---|---|")
    for row in figures:
        plain = row["floor"]
        print(
            f"| {row['concurrency']} | {1000 * plain:.0f} | {1000 * row['p50']:.0f} | {1000 * row['p99']:.0f} | "
            f"{row['users_per_second']:.1f} | {row['concurrency'] / plain:.1f} | {row['p50'] / plain:.2f} |"
        )
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump({"run": str(trained), "tokens": float(np.mean(lengths)), "rows": figures}, file, indent=1)
    if arguments.items:
        search(arguments.items)


if __name__ == "__main__":
    main()
