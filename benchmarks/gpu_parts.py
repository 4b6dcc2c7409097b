"""The parts of ``gpu.py``: each is a function that measures one thing and adds its figures to a report as it has them."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import step_cost  # noqa: E402
import targets  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from recbole_llm.backbone import load as loading  # noqa: E402
from recbole_llm.backbone.built_in import make_tiny_tokenizer, smollm2_folder  # noqa: E402
from recbole_llm.backbone.encoder import _tree_of  # noqa: E402
from recbole_llm.backbone.settings import read_settings, resolved_dtype  # noqa: E402
from recbole_llm.data.prepare import generate_chain  # noqa: E402
from recbole_llm.data.shared import SharedData  # noqa: E402
from recbole_llm.data.windows import TrainingWindows  # noqa: E402
from recbole_llm.errors import UserError  # noqa: E402
from recbole_llm.quick_start import compare  # noqa: E402

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "recbole-llm", "recbole", "torch", "transformers", "peft", "accelerate", "numpy", "pandas", "triton", "bitsandbytes",
    "flash-attn", "safetensors", "tokenizers",
)  # fmt: skip
SHAPES = {
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100000.0,
    },
    "llama": {
        "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
}  # fmt: skip
TINY_SHAPE = {
    "vocab_size": 600, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 2048,
}  # fmt: skip
# Dense matrix products in bfloat16, TFLOP/s, as NVIDIA publishes them; the first name that is in the card's holds.
PUBLISHED = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165,
    "A10G": 70, "A10": 125, "L4": 121,
}  # fmt: skip
# LLM-STAR with windows on ml-100k, two epochs, on a CPU: docs/results/window.md.
ON_CPU = {"ndcg@10": 0.3599, "hit@10": 0.6426}
QUALITY_BOUND = 0.03  # three standard errors of 943 users


class Skipped(Exception):
    """A part that this machine cannot run, and why."""


@dataclass(frozen=True)
class Check:
    """Where and at which size the parts run.

    Attributes:
        device: ``cuda`` or ``cpu``.
        tiny: whether everything is in miniature.
        folder: where parts write; what one leaves (the teacher, a folder of an LLM) the next finds.
    """

    device: str
    tiny: bool
    folder: Path

    @property
    def rounds(self) -> int:
        return 1 if self.tiny else 3

    def dataset(self) -> tuple[str, dict[str, Any]]:
        """The data set, and the settings of all models on it."""
        settings: dict[str, Any] = {
            "checkpoint_dir": str(self.folder / "saved"),
            "use_gpu": self.device == "cuda",
            "show_progress": False,
            "teacher_settings": {"epochs": 1},
            "valid_users": 150,
        }
        if not self.tiny:
            return "ml-100k", settings
        if not (self.folder / "chain").exists():
            generate_chain(self.folder, "chain", users=40, items=150, seed=1, noise=0.1)
        small = {"epochs": 1, "hidden_size": 8, "inner_size": 16, "n_layers": 1, "train_batch_size": 256}
        return "chain", settings | {
            "data_path": str(self.folder), "teacher_settings": small, "head_hidden_size": 16, "representation_size": 8,
            "item_projection_hidden_size": 16, "train_batch_size": 8, "valid_users": 10, "history_length": 4,
        }  # fmt: skip


class Report:
    """Figures of a part, on disk as soon as they are known, so that a part that is ended keeps them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rows: list[dict[str, Any]] = []
        self.raw: dict[str, Any] = {}

    def add(self, what: str, value: Any, unit: str = "", at_most: float | None = None, at_least: float | None = None) -> None:
        """One row of the table, with a bound where there is one."""
        bound = at_most if at_least is None else at_least
        side = "at most" if at_least is None else "at least"
        met = None if bound is None else bool(value <= bound if at_least is None else value >= bound)
        named = None if bound is None else f"{side} {bound:g}"
        self.rows.append({"what": what, "value": value, "unit": unit, "bound": named, "met": met})
        self.end(None)

    def end(self, status: str | None) -> None:
        """Write what is known."""
        text = json.dumps({"status": status, "rows": self.rows, "raw": self.raw}, default=str)
        part = self._file.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(self._file)


def run(name: str, check: Check, report: Report) -> None:
    """Run the part of a name."""
    if check.device == "cuda" and not torch.cuda.is_available():
        raise Skipped("PyTorch finds no CUDA GPU; --device=cpu --size=tiny tries this in miniature")
    {
        "machine": machine, "tests": tests, "training": training, "quantization": quantization, "flash": flash, "flex": flex,
        "smollm2": lambda *both: cost("smollm2", *both), "llama": lambda *both: cost("llama", *both),
    }[name](check, report)  # fmt: skip


@contextmanager
def peak_memory(check: Check) -> Iterator[Callable[[], float]]:
    """Within the context, a function that tells the most GB held: of the GPU since its start, without one of the process."""
    if check.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() / 1e9
    else:  # kilobytes on Linux, bytes on macOS
        unit = 1 if sys.platform == "darwin" else 1024
        yield lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- The machine


def machine(check: Check, report: Report) -> None:
    """Versions, card and driver; and the rate of a large matrix product, beside which the LLM's is put."""
    versions = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    card = torch.cuda.get_device_name(0) if check.device == "cuda" else platform.processor() or platform.machine()
    report.raw |= {
        "versions": versions, "card": card, "driver": driver(), "commit": commit(), "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    report.add("card", card)
    if check.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        report.raw["memory"] = memory
        report.add("its memory", memory, "GB")
        report.add("driver", report.raw["driver"] or "unknown")
        report.add("CUDA of PyTorch", torch.version.cuda)
    for name in ("python", "torch", "transformers", "peft", "bitsandbytes", "flash-attn"):
        report.add(name, versions[name] or "not installed")
    dtype = weights_type(check)
    rate = matrix_product(check, dtype)
    (check.folder / "rate.json").write_text(json.dumps({"card": card, "rate": rate}))
    report.raw["matrix_product"] = {"dtype": str(dtype), "tflops": rate / 1e12}
    report.add(f"matrix product, {str(dtype).removeprefix('torch.')}", rate / 1e12, "TFLOP/s")


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(ask, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def commit() -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def weights_type(check: Check) -> torch.dtype:
    """In which type the LLM computes on this device by default."""
    return torch.float32 if check.tiny else resolved_dtype(read_settings({"backbone": "any", "device": check.device}))


def matrix_product(check: Check, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of two large square matrices."""
    size, repeats = (128, 2) if check.tiny else (8192, 20)
    left, right = (torch.randn(size, size, device=check.device, dtype=dtype) for _ in range(2))

    def work() -> None:
        for _ in range(repeats):
            left @ right

    work()
    return 2.0 * size**3 * repeats / step_cost.clock(work, torch.device(check.device))


# ---- LLMs


def shaped_folder(check: Check, name: str, weights: bool = False) -> Path:
    """A folder with an LLM's shape and a tokenizer, for :func:`random_weights`, or with random weights of its own."""
    folder = check.folder / f"{name}-shape{'-weights' if weights else ''}"
    if not (folder / "config.json").exists():
        shape = TINY_SHAPE if check.tiny else SHAPES[name]
        config = LlamaConfig(**shape, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2)
        tokenizer = make_tiny_tokenizer()
        if weights:
            with torch.device(check.device):
                model = AutoModelForCausalLM.from_config(config, dtype=weights_type(check))
            model.save_pretrained(folder)
        else:
            config.save_pretrained(folder)
            (folder / "model.safetensors").touch()  # a folder without is no LLM's; it is not read
        tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def random_weights() -> Iterator[None]:
    """Within the context, LLMs are made of their configuration, on the device, and no weights are read."""

    def make(folder, gguf_file, settings, dtype):
        config = LlamaConfig.from_pretrained(folder)
        if settings.layers is not None:
            config.num_hidden_layers = settings.layers
        kernel = "sdpa" if settings.attn_implementation == "auto" else settings.attn_implementation
        with torch.device(settings.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel)
        model.lacks_output_head = False
        return model, kernel

    with mock.patch.object(loading, "read_model", make):
        yield


@contextmanager
def named_llm(name: str, check: Check, report: Report) -> Iterator[str]:
    """What ``backbone`` is within the context: SmolLM2, or random weights in miniature and where it cannot be had."""
    if name == "smollm2" and has_smollm2(check, report):
        yield "smollm2-135m"
        return
    with random_weights():
        yield str(shaped_folder(check, name))


def has_smollm2(check: Check, report: Report) -> bool:
    """Whether SmolLM2 is there, or can be fetched; a row says where it cannot."""
    if check.tiny:
        return False
    try:
        smollm2_folder()
    except UserError as error:
        report.add("SmolLM2 cannot be had", "random weights")
        report.raw["smollm2"] = str(error)
        return False
    return True


# ---- Cost


def cost(name: str, check: Check, report: Report) -> None:
    """Steps, negatives, windows and an evaluation as multiples of the floor, their share of the peak, and memory."""
    dataset, settings = check.dataset()
    data, bounds, steps = SharedData(), {} if check.tiny else step_cost.BOUNDS, 1 if check.tiny else 4
    rate_file = check.folder / "rate.json"
    rate = json.loads(rate_file.read_text()) if rate_file.exists() else None

    def measure(part: str, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """Run one of the measurements; where memory does not hold the activations, they are computed again."""
        for again in (False, True):
            with peak_memory(check) as memory:
                try:
                    found = {**work(dataset, settings, *arguments), "peak_memory_gb": memory()}
                    break
                except torch.OutOfMemoryError:
                    if again or settings.get("recompute_activations"):
                        raise
            report.add(f"{part}: out of memory, again with", "recompute_activations")
            settings["recompute_activations"] = True
            gc.collect()
        report.raw[part] = {**found, "recompute_activations": settings.get("recompute_activations", False)}
        for what, value in found.items():
            if " / " in what and "ten validations" not in what and "padded and batched" not in what:
                report.add(what, value, at_most=bounds.get(what))
        report.add(f"{part}: most memory", found["peak_memory_gb"], "GB")
        return found

    def share(what: str, flops: float, seconds: float) -> None:
        """The model's floating-point operations in a second, as a share of what the device can do (MFU)."""
        report.add(f"{what}: {seconds * 1e3:,.0f} ms", flops / seconds / 1e12, "TFLOP/s")
        if rate is None:
            return
        report.add(f"{what}: MFU, of the matrix product's rate", flops / seconds / rate["rate"])
        published = next((tera for card, tera in PUBLISHED.items() if card in rate["card"]), None)
        if published is not None and weights_type(check) == torch.bfloat16:
            report.add(f"{what}: MFU, of the published {published} TFLOP/s", flops / seconds / published / 1e12)

    with named_llm(name, check, report) as backbone:
        settings |= {"backbone": backbone, "backbone_dtype": str(weights_type(check)).removeprefix("torch.")}
        found = measure("LLM-SRec step", step_cost.training_step, data, steps, check.rounds)
        seconds = found["seconds_per_step"]["ours"]
        share("LLM-SRec step", found["flops_per_step"], seconds)
        found = measure("LLM-STAR step", step_cost.negatives, data, max(1, steps // 2), check.rounds)
        share("LLM-STAR user prompts", found["flops_per_step"], found["seconds_per_step"]["ours"])
        found = measure("evaluation", step_cost.evaluation, data, 5 if check.tiny else 100, check.rounds, seconds)
        share("evaluation", found["flops"], found["seconds"]["ours"])
        measure("windows", targets.measure, 2 if check.tiny else 8, check.rounds)


# ---- Training


def training(check: Check, report: Report) -> None:
    """LLM-STAR with windows, beside the same on a CPU: measured before at full size, in miniature trained here."""
    dataset, settings = check.dataset()
    begun = time.monotonic()
    if check.tiny:
        settings |= {"backbone": "tiny", "epochs": 1, "eval_step": 1, "train_targets": "window", "train_negatives": 10}
        files: list[str] = []
        on_cpu = figures(dataset, files, settings | {"use_gpu": False, "checkpoint_dir": str(check.folder / "on-cpu")})
    else:
        settings |= {"train_targets": "window", "learning_rate": 1e-3, "epochs": 2, "checkpoint_dir": "trained"}
        del settings["teacher_settings"], settings["valid_users"]
        files, on_cpu = [str(ROOT / "properties" / "quickstart.yaml")], {"metrics": ON_CPU}
    with peak_memory(check) as memory:
        found = figures(dataset, files, settings)
        report.raw["training"] = {**found, "on_cpu": on_cpu, "peak_memory_gb": memory()}
        for metric in ("ndcg@10", "hit@10"):
            ours, theirs = (row["metrics"][metric] for row in (found, on_cpu))
            report.add(f"{metric} (on a CPU {theirs:.4f})", f"{ours:.4f}")
            report.add(f"{metric}: distance", abs(ours - theirs), at_most=QUALITY_BOUND)
        report.add("training", found["train"], "s")
        report.add("test of all users", found["evaluate"], "s")
        report.add("with the teacher, data and LLM", time.monotonic() - begun, "s")
        report.add("most memory", memory(), "GB")


def figures(dataset: str, files: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Metrics and seconds of LLM-STAR's run."""
    rows = compare(["LLMSTAR"], dataset, config_file_list=files, settings=settings)  # its teacher has one, too
    row = next(row for row in rows if row["model"] == "LLMSTAR")
    return {"metrics": dict(row["metrics"]), "train": row["train_seconds"], "evaluate": row["eval_seconds"]}


# ---- Tests


def tests(check: Check, report: Report) -> None:
    """The tests that are marked gpu, of the files that hold the mark."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed (pip install pytest)")
    import pytest

    os.environ["RECBOLE_LLM_TEST_DEVICE"] = check.device
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8"))
    counts = {"passed": 0, "failed": 0, "skipped": 0}

    class Count:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] += 1

    words = ["-m", "gpu and not slow" if check.tiny else "gpu", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    code = pytest.main([*words, *files], plugins=[Count()])
    report.raw["tests"] = {**counts, "exit_code": int(code)}
    report.add("passed", counts["passed"], at_least=1)
    report.add("failed", counts["failed"], at_most=0)
    report.add("skipped", counts["skipped"])


# ---- Quantization


def quantization(check: Check, report: Report) -> None:
    """SmolLM2's weights in 4 and 8 bits: size, time, and how far its states move. In miniature no bits are saved."""
    if check.device == "cuda" and importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed (pip install 'recbole-llm[quantization]')")
    backbone = "smollm2-135m" if has_smollm2(check, report) else str(shaped_folder(check, "smollm2", weights=True))
    settings = {"backbone": backbone, "device": check.device, "backbone_dtype": str(weights_type(check)).removeprefix("torch.")}
    kinds = (None, "4bit", "8bit") if check.device == "cuda" else (None, None)
    width = 32 if check.tiny else 256
    states: list[torch.Tensor] = []
    for kind in kinds:
        with peak_memory(check) as memory:
            llm = loading.load_backbone(settings | {"backbone_quantization": kind})
            torch.manual_seed(0)
            inputs = llm.embedding(torch.randint(3, 500, (8, width), device=check.device)).detach().requires_grad_()
            where = torch.arange(width, device=check.device)[None]

            def step(llm=llm, inputs=inputs, where=where) -> torch.Tensor:
                hidden, _ = llm(inputs, where)
                hidden.float().square().mean().backward()
                return hidden.detach().float()

            states.append(step())
            seconds = step_cost.in_turns({"step": step}, check.rounds, torch.device(check.device))["step"]
            size = sum(tensor.numel() * tensor.element_size() for tensor in llm.parameters()) / 1e9
            name = kind or settings["backbone_dtype"]
            cosine = float(torch.nn.functional.cosine_similarity(states[0], states[-1], dim=-1).mean())
            report.raw[f"{name}-{len(states)}"] = {
                "seconds": seconds, "weights_gb": size, "peak_memory_gb": memory(), "cosine": cosine,
            }  # fmt: skip
            report.add(f"{name}: weights", size, "GB")
            report.add(f"{name}: forward and backward of 8 x {width} tokens", seconds * 1e3, "ms")
            report.add(f"{name}: states' cosine with {settings['backbone_dtype']}", cosine, at_least=0.9)
        del llm


# ---- Attention


def flash(check: Check, report: Report) -> None:
    """flash_attention_2 beside sdpa: the same states, and time. In miniature eager takes its place."""
    kernel = "flash_attention_2" if check.device == "cuda" else "eager"
    if kernel == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise Skipped("flash-attn is not installed")
    with random_weights():
        folder = shaped_folder(check, "smollm2")
        settings = {"backbone": str(folder), "device": check.device, "backbone_dtype": "float32" if check.tiny else "bfloat16"}
        plain = loading.load_backbone(settings | {"attn_implementation": "sdpa"})
        other = loading.load_backbone(settings | {"attn_implementation": kernel})
        other.causal_lm.load_state_dict(plain.causal_lm.state_dict())
    rows, width = (2, 32) if check.tiny else (16, 1024)
    torch.manual_seed(0)
    inputs = plain.embedding(torch.randint(3, 500, (rows, width), device=check.device)).detach().requires_grad_()
    where = torch.arange(width, device=check.device)[None]

    def step(llm: Any) -> torch.Tensor:
        hidden, _ = llm(inputs, where)
        hidden.float().square().mean().backward()
        return hidden.detach().float()

    one, two = step(plain), step(other)
    distance = float((one - two).norm() / one.norm())
    works = {"sdpa": lambda: step(plain), kernel: lambda: step(other)}
    seconds = step_cost.in_turns(works, check.rounds, torch.device(check.device))
    report.raw[kernel] = {"seconds": seconds, "distance": distance, "rows": rows, "width": width}
    report.add(f"{kernel}: distance of its states from sdpa's", distance, at_most=0.05)
    report.add(f"{kernel} / sdpa: forward and backward of {rows} x {width} tokens", seconds[kernel] / seconds["sdpa"])


def flex(check: Check, report: Report) -> None:
    """FlexAttention on windows, whose masks are known by position: one layer's attention beside sdpa with a dense mask."""
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        raise Skipped("this PyTorch has no FlexAttention")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    with random_weights():
        dataset, settings = check.dataset()
        settings |= {"backbone": str(shaped_folder(check, "smollm2")), "train_targets": "window", "backbone_layers": 1}
        config, _, train, model, _ = step_cost.build("LLMSRec", dataset, settings, SharedData())
    windows = TrainingWindows(train, config["history_length"])
    windows.draw(np.random.default_rng(0))
    batch = model.prompts.user_prompts(model.histories(windows.rows(np.arange(2 if check.tiny else 16))))
    originals, branches = (np.flatnonzero(batch.parent < 0), np.flatnonzero(batch.parent >= 0))
    tree = _tree_of(batch, originals, branches, 0)
    segment, position, limit = (
        torch.from_numpy(table).to(check.device) for table in (tree.segment, tree.position, tree.limit)
    )
    count = len(originals)

    def seen(row, _head, query, key):
        own = (segment[row, query] == segment[row, key]) & (key <= query)
        trunk = (segment[row, key] >= 0) & (segment[row, key] < count) & (position[row, key] < limit[row, query])
        return own | trunk

    rows, width = segment.shape
    shape = TINY_SHAPE if check.tiny else SHAPES["llama"]
    heads, key_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    size = shape.get("head_dim", shape["hidden_size"] // heads)
    dtype = weights_type(check)
    # Without a GPU it has no backward pass: uncompiled, forward.
    backward = check.device == "cuda"
    flexible = torch.compile(flex_attention) if backward else flex_attention
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(rows, number, width, size, device=check.device, dtype=dtype, requires_grad=backward)
        for number in (heads, key_heads, key_heads)
    )
    places = torch.arange(width, device=check.device)
    row_places = torch.arange(rows, device=check.device)[:, None, None]
    dense = seen(row_places, None, places[:, None], places[None, :])[:, None]
    blocks = create_block_mask(seen, rows, None, width, width, device=check.device)

    def plain() -> torch.Tensor:
        result = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense, enable_gqa=True)
        if backward:
            result.float().square().mean().backward()
        return result

    def sparse() -> torch.Tensor:
        result = flexible(query, key, value, block_mask=blocks, enable_gqa=True)
        if backward:
            result.float().square().mean().backward()
        return result

    one, two = plain().detach().float(), sparse().detach().float()
    distance = float((one - two).norm() / one.norm())
    seconds = step_cost.in_turns({"sdpa": plain, "flex": sparse}, check.rounds, torch.device(check.device))
    share = float(dense.float().mean())
    report.raw["flex"] = {"seconds": seconds, "distance": distance, "rows": rows, "width": width, "seen": share}
    report.add("distance from sdpa", distance, at_most=0.02)
    report.add(f"pairs of tokens that see each other, {rows} windows of at most {width} tokens", share)
    what = "forward and backward" if backward else "forward"
    report.add(f"FlexAttention / sdpa: a layer's attention, {what}", seconds["flex"] / seconds["sdpa"])
