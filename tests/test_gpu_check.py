"""``make gpu``: what it counts, and that a part that fails or takes too long becomes a row while the others go on."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recbole_llm.backbone.load import load_backbone

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_parts  # noqa: E402
import step_cost  # noqa: E402


def test_operations_are_those_that_pytorch_counts():
    """PyTorch counts attention as if every token saw every other one; the formula counts those that it sees."""
    backbone = load_backbone({"backbone": "tiny", "device": "cpu", "attn_implementation": "eager"})
    length, rows = 7, 3
    inputs = torch.randn(rows, length, backbone.input_size, requires_grad=True)
    positions = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        hidden, _ = backbone(inputs, positions)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        hidden.sum().backward()
    lengths = np.full(rows, length)
    attention = 4 * rows * length * backbone.hidden_size * backbone.layers  # per token that a token sees
    unseen = attention * (length - (length + 1) / 2)
    rotary = forward - step_cost.decoder_flops(backbone, lengths, lengths, False) - unseen
    assert 0 <= rotary < 0.01 * forward  # the table of angles
    whole = step_cost.decoder_flops(backbone, lengths, lengths, True) + 3 * unseen
    assert forward + counter.get_total_flops() - rotary == whole

    # The last 2 tokens alone: each part of the whole, and of the tokens that they see.
    tail = step_cost.decoder_flops(backbone, lengths, np.full(rows, 2), False)
    head = step_cost.decoder_flops(backbone, lengths - 2, lengths - 2, False)
    assert tail + head == step_cost.decoder_flops(backbone, lengths, lengths, False)


def test_evened_prompts_are_as_many_with_as_many_tokens():
    even = step_cost.evened(np.array([3, 9, 5]))
    assert sorted(even) == [5, 6, 6]


@pytest.fixture
def run_part(tmp_path, monkeypatch):
    """A function (what the part does, its seconds) -> what becomes of it. The part is a fork of this process."""

    def run(work, seconds=60.0, device="cpu"):
        monkeypatch.setitem(gpu.PARTS, "some", (seconds, "for this test"))
        monkeypatch.setattr(gpu_parts, "run", lambda name, check, report: work(report))
        arguments = argparse.Namespace(device=device, size="tiny")
        return gpu.run_part(multiprocessing.get_context("fork"), "some", arguments, tmp_path, tmp_path, seconds)

    return run


def test_a_part_that_fails_keeps_its_figures_and_says_why(run_part, tmp_path):
    def fails(report):
        report.add("seconds", 1.5, "s", at_most=1)
        print("on the way")
        raise RuntimeError("\nno such kernel\nat all")

    part = run_part(fails)
    assert part["status"] == "failed: RuntimeError: no such kernel"
    assert part["rows"] == [{"what": "seconds", "value": 1.5, "unit": "s", "bound": "at most 1", "met": False}]
    log = (tmp_path / "some.log").read_text()
    assert "on the way" in log and "Traceback" in log
    table = gpu.format_table({"device": "cpu", "size": "full", "seconds": 2.0, "parts": {"some": part}})
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["some", "seconds", "1.5", "s", "at", "most", "1:", "MISSED"],
        ["failed:", "RuntimeError:", "no", "such", "kernel"],
    ]


def test_a_part_that_dies_or_cannot_run_is_a_row(run_part):
    assert run_part(lambda report: os._exit(9))["status"].startswith("failed: the process ended with code 9")

    def skips(report):
        raise gpu_parts.Skipped("flash-attn is not installed")

    assert run_part(skips)["status"] == "skipped: flash-attn is not installed"


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(run_part, tmp_path):
    def sleeps(report):
        child = subprocess.Popen(["sleep", "60"])
        report.add("child", child.pid)
        time.sleep(60)

    begun = time.monotonic()
    part = run_part(sleeps, seconds=1)
    assert part["status"] == "over its time of 1 s" and time.monotonic() - begun < 20
    child = part["rows"][0]["value"]
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2][:3]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the part started goes on")


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--parts=smollm"])
    assert ended.value.code == 2 and "there is no smollm" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_check_runs_in_miniature(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device=cpu", "--size=tiny", "--output=gpu.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: part["status"] for name, part in found["parts"].items()} == dict.fromkeys(gpu.PARTS, "done")
    assert all(part["rows"] for part in found["parts"].values())
    assert found["parts"]["machine"]["raw"]["versions"]["torch"] == torch.__version__
    assert found["parts"]["training"]["rows"][1]["value"] == 0  # the same device: the same figures
    for name in gpu.PARTS:
        assert f"\n{name} " in done.stdout
