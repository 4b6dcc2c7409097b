"""Small runs and analyses for tests of the report, with texts that try to be more than text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from recbole_llm.evaluation.ranking import metrics_from_ranks
from recbole_llm.results.run import Run, write_run

EVIL = "<script>window.evil=1</script><img src=x onerror=window.evil=1>&amp;\"'"


def make_run(folder: Path, model: str, seed: int = 1, shift: int = 0, settings: dict | None = None, **changes) -> Run:
    """A run of 200 users with 100 candidates; a higher ``shift`` ranks the targets lower."""
    generator = np.random.default_rng(seed + 10 * shift)
    ranks = np.clip(generator.geometric(0.08, 200) + shift, 1, 100)
    test = metrics_from_ranks(ranks, ("ndcg", "hit"), (10,))
    curve = [
        {
            "step": 10 * step,
            "epoch": step / 4,
            "seconds": 33.0 * step,
            "losses": {"retrieval": 2 / step, "sequence": 0.4 / step},
            "valid": {"ndcg@10": test["ndcg@10"] * (1 - 0.5 / step), "hit@10": 0.5} if step % 2 == 0 else None,
        }
        for step in range(1, 9)
    ]
    record = {
        "model": model,
        "dataset": "ml-100k",
        "protocol": "retrieval",
        "seed": seed,
        "settings": {"learning_rate": 0.001, "epochs": 2, "device": "cpu", **(settings or {})},
        "changed": {"epochs": 2, **(settings or {})},
        "command": f"recbole-llm run --model={model} --dataset=ml-100k --seed={seed}",
        "versions": {"recbole_llm": "1.0", "torch": "2.13", "python": "3.11"},
        "git": {"commit": "0123abc", "dirty": False},
        "data": {"fingerprint": "77aa", "users": 200, "items": 1682, "interactions": 99999},
        "backbone": None,
        "teacher": None,
        "machine": {"platform": "Linux", "cpu": "a CPU", "cores": 2, "memory_bytes": 8_000_000_000, "gpu": None},
        "started": "2026-01-01T10:00:00+00:00",
        "finished": "2026-01-01T10:10:00+00:00",
        "seconds": {"train": 264.0 + 60 * shift, "evaluate": 12.0},
        "peak_memory_bytes": {"cpu": 1_500_000_000, "gpu": None},
        "trained_parameters": 1_234_567,
        "users": 200,
        "test_set": f"seed {seed}",
        "valid_metric": "NDCG@10",
        "metrics": {"valid": {"ndcg@10": test["ndcg@10"]}, "test": test},
        **changes,
    }
    return write_run(folder, record, curve, [f"u{user}" for user in range(200)], ranks=ranks)


def make_runs(folder: Path) -> list[Path]:
    """Runs of a baseline and of one model with two settings, two seeds each."""
    made = []
    for seed in (1, 2):
        made.append(make_run(folder / f"SASRec-{seed}", "SASRec", seed))
        for beta, shift in ((0, 4), (0.5, 1)):
            made.append(make_run(folder / f"LLMSTAR-{beta}-{seed}", "LLMSTAR", seed, shift, {"beta": beta, "note": EVIL}))
    return [run.folder for run in made]


def _compared(original: float, perturbed: float) -> dict:
    change = perturbed / original - 1
    return {
        "original": original, "perturbed": perturbed, "difference": perturbed - original,
        "difference_interval": [perturbed - original - 0.01, perturbed - original + 0.01],
        "change": change, "change_interval": [change - 0.05, change + 0.05], "p_value": 0.0004,
    }  # fmt: skip


def _condition(name: str, original: float, perturbed: float) -> dict:
    metrics = {"ndcg@10": _compared(original, perturbed), "hit@10": _compared(2 * original, 2 * perturbed)}
    return {"condition": name, "draws": 2, "metrics": metrics, "jaccard": {"jaccard@10": 0.4}, "unchanged": 3, "other": {}}


def _each(analysis: str, **parts) -> list[dict]:
    return [{"analysis": analysis, "model": model, "dataset": "ml-100k", "seed": 1, **parts} for model in ("SASRec", EVIL)]


def _layers(within: float) -> dict:
    found = {"shares": {"within": within, "across": 0.5 - within, "rest": 0.5}}
    found["tokens"] = [{"token": "[out]", "attends_to": [[EVIL, 3, 0.5], [" toy", 1, 0.2]]}]
    return {"first": found, "last": found}


def analysis_results() -> dict[str, list[dict]]:
    """A result of each analysis, in the form in which it is kept."""
    conditions = [_condition("inference whole", 0.4, 0.2), _condition("inference reverse", 0.4, 0.39)]
    groups = [
        {
            "model": model, "seed": "1", "grouping": grouping, "group": group, "users": 100, "metrics": {"ndcg@10": 0.3},
            "conditions": {"inference whole": {"ndcg@10": _compared(0.3, 0.2)}},
        }
        for model in ("SASRec", EVIL)
        for grouping, names in (("target", ("warm", "between", "cold")), ("length", ("up to 5", "6 to 10", EVIL)))
        for group in names
    ]  # fmt: skip
    dataset = {
        "analysis": "dataset", "dataset": "ml-100k", "users": 943, "items": 1682, "interactions": 99999, "density": 0.063,
        "length": {"mean": 106.0, "min": 20.0, "median": 65.0, "90 %": 244.0, "max": 737.0},
        "popularity": {"mean": 59.4, "min": 1.0, "median": 27.0, "max": 583.0, "gini": 0.629, "top_10_percent": 0.42},
        "ties": {"pairs": 0.5, "users": 1.0, "test_items": 0.44},
        "repeats": {"consecutive": 0.0, "interactions": 0.0, "test_items": 0.0},
        "rules": {"2-grams": {"before": 9, "after": 0.5, "change": -0.94}, "3-grams": {"before": 4, "after": 0, "change": -1}},
        "reachable": {"from_last": 0.06, "from_any": 0.6},
        "settings": {"support": 5, "confidence": 0.1, "draws": 5, "keep_repeats": False, "seed": 0},
    }  # fmt: skip
    cosines = [
        {"condition": f"inference {kind}", "users": 900, "cosine": cosine, "quantiles": [cosine - 0.1, cosine, cosine + 0.02]}
        for kind, cosine in (("whole", 0.8), ("reverse", 0.6))
    ]
    costs = {
        "device": "cpu", "threads": 2, "users": 943, "train_minutes": 3.5, "epochs": None, "minutes_per_epoch": None,
        "inference_seconds": 2.0, "users_per_second": 471.5, "tokens_per_second": None, "trained_parameters": 200_000,
        "peak_memory_gb": 1.2,
    }  # fmt: skip
    validations = [{"step": 10 * n, "epoch": n / 4, "ndcg@10": 0.1 * n, "hit@10": 0.2 * n} for n in (1, 2, 3)]
    history = [["Toy Story", "1997-12-04"], [EVIL, ""]]
    shown = {"history": history, "best": [EVIL, "GoldenEye"], "rank": 2}
    case = {"user": "196", "truth": "GoldenEye", "conditions": {"original": shown, "inference whole": {**shown, "rank": 7}}}
    attention = {"original": _layers(0.3), "inference whole": _layers(0.2)}
    shares = {name: {layer: found["shares"] for layer, found in layers.items()} for name, layers in attention.items()}
    against = {"against": EVIL, "condition": "inference whole", "metric": "ndcg@10", "difference": -0.1, "interval": [-0.2, 0]}
    order = _each("order", protocol="retrieval", users=943, conditions=conditions, settings={"bootstrap": 10_000})
    order[1]["against"] = [against, {**against, "difference": None, "interval": None}]
    return {
        "order": order,
        "dataset": [dataset],
        "groups": [{"analysis": "groups", "dataset": "ml-100k", "groups": groups}],
        "representations": _each(
            "representations", users=943, conditions=cosines, distance=3.2, unit_distance=0.4, cosine_between_users=0.3
        ),
        "attention": _each("attention", users=[{"user": "196", "conditions": attention}], shares=shares),
        "efficiency": _each("efficiency", **costs),
        "curve": _each("curve", best_step=20, validations=validations),
        "cases": _each("cases", cases=[case]),
        "crossdomain": _each(
            "crossdomain", train=EVIL, users=943, protocol="retrieval", untrained={"ndcg@10": 0.1},
            conditions=[{"vectors": vectors, "metrics": {"ndcg@10": _compared(0.1, 0.2)}} for vectors in ("without", "own")],
        ),
        "position": _each(
            "position", users=40, chosen=[30, 5, 3], hits=[9, 1, 0], targets=[13, 14, 13], invalid=1, ambiguous=1,
            expected=38 / 3, chi_square=35.9, p_value=1e-8,
        ),
        "memorization": [
            {
                "analysis": "memorization", "dataset": "ml-100k", "backbone": EVIL, "layers": 2, "settings": {"shown": 5},
                "questions": {
                    "titles": {"asked": 40, "right": 1, "share": 0.025, "interval": [0.004, 0.13], "guess": 0.0,
                               "examples": [["196", EVIL]]},
                },
            }
        ],
        "sweep": [
            {**result, "seed": seed, "key": "beta", "value": value, "metrics": {"ndcg@10": 0.2 + value / 10 + seed / 100}}
            for result in _each("sweep")
            for value in (0, 0.5)
            for seed in (1, 2)
        ]
        + [{**_each("sweep")[1], "key": "beta", "value": 1, "error": EVIL}],
    }


def write_analyses(folder: Path) -> Path:
    """The files that ``recbole-llm analyze`` leaves in its folder."""
    folder.mkdir(parents=True)
    for name, results in analysis_results().items():
        content = {"command": ["recbole-llm", "analyze", name, f"--note={EVIL}"], "analysis": name, "results": results}
        if name in ("dataset", "groups"):
            content["results"] = results[0]
        (folder / f"{name}-ml-100k.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
