"""One training step and one ranking with an item head over a million items: seconds and peak memory.

    python benchmarks/million_items.py [--items=1000000] [--hidden_size=576] [--positions=512] [--users=256] [--k=10]
                                       [--chunk_items=8192] [--draws=8192] [--steps=1] [--device=cpu]

The catalogue is generated: random vectors, popularity that falls as one over the rank. A step is the loss forward and
backward to the hidden states and the head, and Adam on the head; an LLM before it would come on top. Each part runs in a
process of its own, after one step or one ranking that does not count. CPU seconds are the process's own, which others on
the machine do not change as they change seconds by the clock. Memory is on CUDA the most that torch has
allocated, on a CPU the most that the whole process held, Python and libraries included; beside it stands what the part
cannot do without: the head, and in training its gradient and Adam's two moments.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

if {"-h", "--help"} & set(sys.argv[1:]):
    sys.exit(print(__doc__))

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from step_cost import clock  # noqa: E402

from recbole_llm.config.command_line import parse_command_line  # noqa: E402
from recbole_llm.loss.softmax import (  # noqa: E402
    NegativeSampler,
    full_softmax_loss,
    sampled_softmax_loss,
    target_counts,
    top_items,
)

DEFAULTS = {
    "items": 1_000_000,
    "hidden_size": 576,
    "positions": 512,
    "users": 256,
    "k": 10,
    "chunk_items": 8192,
    "draws": 8192,
    "steps": 1,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
}


def training(kind: str, settings: dict) -> dict[str, Callable[[], object]]:
    """The works of one training step, in order."""
    items, device, rng = settings["items"], settings["device"], np.random.default_rng(0)
    popularity = items / np.arange(1, items + 1)
    chosen = rng.choice(items, settings["positions"], p=popularity / popularity.sum())
    targets = torch.from_numpy(chosen).to(device)
    hidden = torch.randn(len(targets), settings["hidden_size"], device=device, requires_grad=True)
    weight = item_head(settings).requires_grad_()
    adam = torch.optim.Adam([weight], lr=1e-3, fused=True)  # the default makes temporary tensors of W's size
    if kind == "sampled":
        sampler = NegativeSampler(popularity, items, settings["draws"])
        log_expected_counts = sampler.log_expected_counts.to(device)

    def loss_and_gradients() -> None:
        hidden.grad = weight.grad = None
        if kind == "full":
            loss = full_softmax_loss(hidden, weight, targets, settings["chunk_items"])
        else:
            loss = sampled_softmax_loss(hidden, weight, targets, sampler.draw(rng).to(device), log_expected_counts)
        loss.mean().backward()

    return {f"{kind} softmax": loss_and_gradients, f"{kind} softmax: Adam": adam.step}


def ranking(settings: dict) -> dict[str, Callable[[], object]]:
    users = torch.randn(settings["users"], settings["hidden_size"], device=settings["device"])
    targets = torch.from_numpy(np.random.default_rng(0).integers(settings["items"], size=len(users))).to(users.device)
    weight, chunk = item_head(settings), settings["chunk_items"]
    return {
        f"ranks of {len(users)} users' targets": lambda: target_counts(users, weight, targets, chunk),
        f"top {settings['k']} of {len(users)} users": lambda: top_items(users, weight, settings["k"], chunk),
    }


def item_head(settings: dict) -> torch.Tensor:
    """W, float32 ``[items, hidden size]``, filled in place."""
    return torch.empty(settings["items"], settings["hidden_size"], device=settings["device"]).normal_(std=0.02)


def measure(part: str, settings: dict) -> tuple[dict[str, np.ndarray], int]:
    """Seconds and CPU seconds of each work of a part, and the process's peak of memory in bytes."""
    torch.manual_seed(0)
    device = torch.device(settings["device"])
    works = ranking(settings) if part == "ranking" else training(part, settings)
    taken: dict[str, list] = {name: [] for name in works}
    for _ in range(settings["steps"] + 1):
        for name, work in works.items():
            started = time.process_time()
            taken[name].append((clock(work, device), time.process_time() - started))
    seconds = {name: np.mean(values[1:], axis=0) for name, values in taken.items()}
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated()
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    given = parse_command_line(sys.argv[1:])
    if unknown := given.keys() - DEFAULTS.keys():
        raise SystemExit(f"unknown options: {', '.join(sorted(unknown))}; see the head of this file.")
    settings = {**DEFAULTS, **given}
    head = settings["items"] * settings["hidden_size"] * 4
    print(f"{settings}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    print(f"{'':<32}{'seconds':>10}{'CPU seconds':>13}{'GB at peak':>12}{'GB needed':>12}", flush=True)
    started = time.perf_counter()
    for part in ("sampled", "full", "ranking"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            seconds, peak = process.submit(measure, part, settings).result()
        needed = head * (1 if part == "ranking" else 4)
        for name, (wall, cpu) in seconds.items():
            print(f"{name:<32}{wall:>10.3f}{cpu:>13.3f}{peak / 1e9:>12.2f}{needed / 1e9:>12.2f}", flush=True)
    print(f"all parts: {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
