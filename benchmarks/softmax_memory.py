"""Memory and time of the cross-entropy over a whole catalogue, in chunks against plain.

    python benchmarks/softmax_memory.py [--items=200000] [--hidden_size=576] [--positions=512] [--chunk_items=8192]
                                        [--chunk_positions=1024] [--rounds=3] [--device=cpu]

One call is the loss forward and backward, with gradients of the hidden states and of the item head. Its memory is the
highest sum of what torch's allocator has handed out during the call, beyond what was there before, less the gradients that
stay: on CUDA by the allocator's own statistics, on a CPU by torch.profiler, which records each allocation and release
(scratch space inside the matrix library is in neither). The plain loss reaches its peak before the head's
gradient exists, so that the subtraction favours it. Time is the median over rounds, measured in turns without the profiler.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

if {"-h", "--help"} & set(sys.argv[1:]):
    sys.exit(print(__doc__))

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from step_cost import in_turns  # noqa: E402

from recbole_llm.config.command_line import parse_command_line  # noqa: E402
from recbole_llm.loss.softmax import full_softmax_loss  # noqa: E402

BOUND = 0.25


def memory(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes that ``work`` holds at its peak and at its end, beyond those before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event["args"] for event in events if event["name"] == "[memory]"]
    held = [change["Total Allocated"] for change in changes]
    before = held[0] - changes[0]["Bytes"]  # the count goes on from an earlier profile
    return max(held) - before, held[-1] - before


def main() -> int:
    settings = parse_command_line(sys.argv[1:])
    items, size = settings.pop("items", 200_000), settings.pop("hidden_size", 576)
    positions, rounds = settings.pop("positions", 512), settings.pop("rounds", 3)
    chunks = {"chunk_items": settings.pop("chunk_items", 8192), "chunk_positions": settings.pop("chunk_positions", 1024)}
    device = torch.device(settings.pop("device", "cuda" if torch.cuda.is_available() else "cpu"))
    if settings:
        raise SystemExit(f"unknown options: {', '.join(settings)}; see the head of this file.")
    torch.manual_seed(0)
    hidden = torch.randn(positions, size, device=device, requires_grad=True)
    weight = (torch.randn(items, size, device=device) * 0.02).requires_grad_()
    targets = torch.randint(items, (positions,), device=device)

    def call(**chunks) -> Callable[[], None]:
        def work() -> None:
            hidden.grad = weight.grad = None
            full_softmax_loss(hidden, weight, targets, **chunks).mean().backward()

        return work

    works = {"chunked": call(**chunks), "plain": call(chunk_items=None)}
    peaks = {}
    for name, work in works.items():
        work()  # libraries take their workspace
        hidden.grad = weight.grad = None
        peak, kept = memory(work, device)
        peaks[name] = peak - kept
        print(f"{name:<8} peak {peak / 1e6:8.1f} MB, of which gradients {kept / 1e6:8.1f} MB", flush=True)
    seconds = in_turns(works, rounds, device)
    share = peaks["chunked"] / peaks["plain"]
    print(f"\n{items:,} items, {positions} positions, hidden {size}, {chunks}, {device}, {torch.get_num_threads()} threads")
    print(f"{'':<12}{'MB beyond inputs and gradients':>32}{'seconds':>10}")
    for name in works:
        print(f"{name:<12}{peaks[name] / 1e6:>32.1f}{seconds[name]:>10.3f}")
    print(f"memory, chunked / plain   {share:6.3f}   bound {BOUND:.2f}: {'met' if share <= BOUND else 'MISSED'}")
    print(f"time, chunked / plain     {seconds['chunked'] / seconds['plain']:6.3f}")
    return 0 if share <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
