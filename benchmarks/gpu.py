"""What a CPU cannot show, in one command of at most ten minutes on one GPU: ``make gpu``, or

    python benchmarks/gpu.py                              # the first GPU
    python benchmarks/gpu.py --device=cpu --size=tiny     # the same code on a CPU, on tiny data and LLMs: does it run?
    python benchmarks/gpu.py --parts=smollm2,llama        # some of it

Prints one table and writes ``gpu.json`` (``--output=FILE``), with the versions of everything, the card and its driver. Each
part is a process with a time of its own; one that fails, or takes too long, is a row that says so, with the figures that it
had, and the others go on. Nothing but the installed library is needed: what is not there (bitsandbytes, flash-attn, pytest) is
a row, and SmolLM2, where it cannot be fetched, is one of its shape with random weights. ``--logs=FOLDER`` keeps what the parts
print.
Exit code 1: a part failed, or a figure is beyond its bound; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# In order of worth, where time is short: seconds that each may take, and what it shows. gpu_parts.py has a function for each.
PARTS = {
    "machine": (60, "versions, and what the device computes in a second"),
    "smollm2": (100, "cost of steps and evaluation, SmolLM2"),
    "llama": (150, "the same for Llama-3.2-3B's shape, random weights"),
    "training": (180, "LLM-STAR with windows on ml-100k, beside its figures on a CPU"),
    "tests": (90, "tests that are marked gpu"),
    "quantization": (60, "4 and 8 bits by bitsandbytes"),
    "flash": (45, "flash_attention_2 beside sdpa"),
    "flex": (60, "FlexAttention on the masks of windows"),
}


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    names = list(PARTS) if arguments.parts is None else ["machine", *(name for name in arguments.parts if name != "machine")]
    begun, results = time.monotonic(), {}
    context = start_method(arguments.device)
    with tempfile.TemporaryDirectory(prefix="recbole-llm-gpu-") as folder:
        logs = arguments.logs or Path(folder) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        for name in names:
            left = arguments.minutes * 60 - (time.monotonic() - begun)
            seconds = min(PARTS[name][0], left)
            print(f"{name}: {PARTS[name][1]} ...", end="", flush=True, file=sys.stderr)
            results[name] = run_part(context, name, arguments, Path(folder), logs, seconds)
            print(f" {results[name]['status']}, {results[name]['seconds']:.0f} s", file=sys.stderr)
            if name == "machine" and results[name]["status"] != "done":
                break
    found = {"device": arguments.device, "size": arguments.size, "seconds": time.monotonic() - begun, "parts": results}
    table = format_table(found)
    print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten: {arguments.output}")
    if results["machine"]["status"].startswith("skipped"):
        return 2
    beyond = any(row["met"] is False for part in results.values() for row in part["rows"])
    return 1 if beyond or any(part["status"].startswith(("failed", "over")) for part in results.values()) else 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    parser.add_argument("--parts", help=f"with commas, of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--minutes", type=float, default=10, help="all parts together (default 10)")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="JSON file (default gpu.json)")
    parser.add_argument("--logs", type=Path, help="folder for what the parts print")
    arguments = parser.parse_args(argv)
    if arguments.parts is not None:
        arguments.parts = arguments.parts.split(",")
        unknown = set(arguments.parts) - set(PARTS)
        if unknown:
            parser.error(f"--parts: there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}.")
    return arguments


def start_method(device: str) -> Any:
    """How parts start: on a GPU, whose state no fork survives, a new Python each; else forks of one that has imported all."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recbole_llm.quick_start", "gpu_parts"])
    return context


def run_part(context, name: str, arguments: argparse.Namespace, folder: Path, logs: Path, seconds: float) -> dict[str, Any]:
    """Run one part in a process of its own, and end it with all that it started once its time is over."""
    file = folder / f"{name}.json"
    begun = time.monotonic()
    if seconds < min(5, PARTS[name][0]):
        return {"status": "skipped: no time was left", "seconds": 0.0, "rows": [], "raw": {}}
    work = (name, arguments.device, arguments.size, str(folder), str(file), str(logs / f"{name}.log"))
    process = context.Process(target=_part, args=work)
    process.start()
    process.join(seconds)
    late = process.is_alive()
    if late:
        _end(process)
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": [], "raw": {}}
    status = found.pop("status", None) or f"failed: the process ended with code {process.exitcode}; --logs=FOLDER keeps its log"
    if late:
        status = f"over its time of {seconds:.0f} s"
    return {"status": status, "seconds": time.monotonic() - begun, **found}


def _end(process: Any) -> None:
    """Kill a process and its group, which it made for itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            if os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, number)
            else:
                os.kill(process.pid, number)
        except ProcessLookupError:
            return
        process.join(5)
        if not process.is_alive():
            return


def _part(name: str, device: str, size: str, folder: str, file: str, log: str) -> None:
    """A part's process."""
    os.setpgid(0, 0)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(target, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = sys.argv[:1]  # RecBole reads it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import gpu_parts

    report = gpu_parts.Report(Path(file))
    try:
        work = Path(folder) / "work"
        work.mkdir(exist_ok=True)
        os.chdir(work)
        gpu_parts.run(name, gpu_parts.Check(device, size == "tiny", work), report)
        report.end("done")
    except gpu_parts.Skipped as reason:
        report.end(f"skipped: {reason}")
    except BaseException as error:
        traceback.print_exc()
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        report.end(f"failed: {type(error).__name__}: {line[:300]}")


def format_table(found: dict[str, Any]) -> str:
    """One table of all parts: figures, bounds where there are some, and how a part ended where it did not end well."""
    lines = []
    for name, part in found["parts"].items():
        first = name
        for row in part["rows"]:
            value = f"{row['value']:,.3g}" if isinstance(row["value"], float) else str(row["value"])
            verdict = "" if row["met"] is None else f"{row['bound']}: {'met' if row['met'] else 'MISSED'}"
            lines.append((first, row["what"], f"{value} {row['unit']}".rstrip(), verdict))
            first = ""
        if part["status"] != "done":
            lines.append((first, part["status"], "", ""))
    widths = [max(map(len, column), default=0) for column in zip(*lines, strict=True)]
    width = min(widths[1], 72)
    text = "\n".join(f"{a:<{widths[0]}}  {b:<{width}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in lines)
    size = "" if found["size"] == "full" else ", in miniature: these figures say nothing but that it runs"
    return f"GPU check on {found['device']}{size}, {found['seconds']:.0f} s\n\n{text}"


if __name__ == "__main__":
    sys.exit(main())
