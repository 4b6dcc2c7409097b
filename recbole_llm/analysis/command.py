"""``recbole-llm analyze NAME``: the analyses of order from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.analysis import (
    attention,
    cases,
    crossdomain,
    curve,
    dataset,
    efficiency,
    groups,
    memorization,
    order,
    position,
    representations,
    sweep,
)
from recbole_llm.analysis.job import Job
from recbole_llm.analysis.tables import plain
from recbole_llm.checkpoint import write_json
from recbole_llm.config.command_line import parse_command_line
from recbole_llm.config.schema import load_yaml
from recbole_llm.errors import UserError, closest, say
from recbole_llm.quick_start import start_logging

USAGE = """\
recbole-llm analyze NAME --dataset=ml-100k [--model=SASRec,LLMSRec] [--seed=1,2] [--key=value ...] [--output=analyses]

  dataset          lengths, popularity, ties in time, repeats, sequential rules, transitions seen in training
                   [--support=5] [--confidence=0.1] [--draws=5] [--keep_repeats=False]
  order            metrics when test histories, or training sequences, are put into another order
                   [--inference=whole,window,last,reverse] [--training=whole] [--draws=3] [--within=10]
  groups           the same by groups of users [--results=per_user.tsv] [the options of order]
  representations  user representations of original and perturbed histories; distances between users [--inference=...]
  attention        what the LLM's tokens attend to, original against shuffled [--users=3] [--inference=whole]
  efficiency       minutes per epoch, users per second, trained parameters, memory
  curve            validation figures in the course of the training
  cases            some users' histories, each model's best items, and what changes in another order [--users=3] [--topk=5]
  crossdomain      trained on one dataset, tested on another [--train=A] [--vectors=without,own]
  position         at which places of the prompt the chosen candidates stand [--recommend_by=generation]
  memorization     how often the bare LLM goes on with a data set's own lines [--backbone=smollm2-135m] [--questions=200]
  sweep            test metrics over values of a key, seeds as bands [--over=beta:0,0.3,0.7] [--seed=1,2,3]

Models that were trained before are found again; results of before are read. All results are kept in the folder --output.
"""


def run(argv: Sequence[str]) -> int:
    """Run an analysis, print its table, keep its result as JSON; return the exit code."""
    words = list(argv)
    if not words or words[0] in ("-h", "--help") or "--help" in words or "-h" in words:
        say(USAGE.rstrip("\n"))
        return 0
    name, rest = words[0], words[1:]
    if name not in ANALYSES:
        near = closest(name, ANALYSES)
        hint = f"did you mean {near}?" if near else f"choose {', '.join(ANALYSES)}."
        raise UserError(f"unknown analysis {name!r}; {hint}")
    settings = parse_command_line(rest)
    files = _words(settings.pop("config_files", None))
    from_files: dict[str, Any] = {}
    for file in files:
        from_files.update(load_yaml(file))

    def setting(key: str, default: Any = None) -> Any:
        return settings.pop(key, from_files.get(key, default))

    dataset_name = setting("dataset")
    if not dataset_name:
        raise UserError("name a dataset: --dataset=ml-100k.")
    models, seeds, output = _words(setting("model")), _seeds(setting("seed")), str(settings.pop("output", "analyses"))
    options, analyze = ANALYSES[name]
    chosen = [kind(**_options(kind, settings)) for kind in options]
    for kind in options:
        for field in dataclasses.fields(kind):
            settings.pop(field.name, None)
    job = Job(str(dataset_name), models, seeds, files, settings, output)
    if models and name not in ("dataset", "memorization"):
        start_logging(job.configs()[0][1], models)
    result, text = analyze(job, *chosen)
    file = Path(output) / f"{name}-{dataset_name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"command": ["recbole-llm", "analyze", *words], "analysis": name, "results": plain(result)})
    say(text)
    say(f"\n{file}")
    return 0


def _options(kind: type, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``kind`` that the user set."""
    found = {}
    for field in dataclasses.fields(kind):
        if field.name not in settings:
            continue
        value = settings[field.name]
        if isinstance(field.default, tuple):
            value = tuple(word for word in _words(value) if word != "none")
        found[field.name] = value
    return found


def _words(value: Any) -> list[str]:
    """Names from ``a,b``, ``a b`` or a YAML list."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [str(word) for word in value]
    return str(value).replace(",", " ").split()


def _seeds(value: Any) -> list[int]:
    seeds = _words(value)
    if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) != len(seeds):
        raise UserError(f"seed: {value!r} must be different whole numbers, 0 or above; write --seed=1,2,3.")
    return [int(seed) for seed in seeds]


def _dataset(job: Job, settings: Any) -> tuple[Any, str]:
    result = dataset.analyze(job, settings)
    return result, dataset.format_result(result)


def _groups(job: Job, settings: Any, of_order: Any) -> tuple[Any, str]:
    result = groups.analyze(job, settings, of_order)
    return result, groups.format_result(result)


def _with_table(module: Any) -> Callable[..., tuple[Any, str]]:
    def analyze(job: Job, *settings: Any) -> tuple[Any, str]:
        results = module.analyze(job, *settings)
        return results, module.format_results(results)

    return analyze


# Each analysis: the kinds of its options, and what computes its result and its table.
ANALYSES: dict[str, tuple[tuple[type, ...], Callable[..., tuple[Any, str]]]] = {
    "dataset": ((dataset.DatasetSettings,), _dataset),
    "order": ((order.OrderSettings,), _with_table(order)),
    "groups": ((groups.GroupSettings, order.OrderSettings), _groups),
    "representations": ((order.OrderSettings,), _with_table(representations)),
    "attention": ((attention.AttentionSettings, order.OrderSettings), _with_table(attention)),
    "efficiency": ((), _with_table(efficiency)),
    "curve": ((), _with_table(curve)),
    "cases": ((cases.CaseSettings, order.OrderSettings), _with_table(cases)),
    "crossdomain": ((crossdomain.CrossSettings,), _with_table(crossdomain)),
    "memorization": ((memorization.MemorizationSettings,), _with_table(memorization)),
    "position": ((position.PositionSettings,), _with_table(position)),
    "sweep": ((sweep.SweepSettings,), _with_table(sweep)),
}
