"""The sections of a report about the runs themselves: training curves; what was run, by which command, where and how long."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from recbole_llm.results.comparison import Row as ResultRow
from recbole_llm.results.comparison import differing_keys, groups_of, line_names, settings_of
from recbole_llm.results.report import plots
from recbole_llm.results.report.parts import Cell, Code, Details, Facts, Plot, Row, Section, Table, Text, number

_MOST_CURVES = 32


def names_of(rows: Sequence[ResultRow]) -> list[str]:
    """A name for each run: its model's, with protocol, dataset and seed where these differ."""
    several_seeds = len({row["seed"] for row in rows}) > 1
    names = []
    for name, row in zip(_without_seed(rows), rows, strict=True):
        names.append(f"{name} · seed {row['seed']}" if several_seeds else name)
    return plots.distinct(names)


def _without_seed(rows: Sequence[ResultRow]) -> list[str]:
    several = len({row["dataset"] for row in rows}) > 1
    names: dict[int, str] = {}
    for protocol, group in groups_of(rows):
        for name, row in zip(line_names(group), group, strict=True):
            extra = ([str(row["dataset"])] if several else []) + ([protocol] if protocol else [])
            names[id(row)] = " · ".join([name, *extra])
    return [names[id(row)] for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Training curves
# ---------------------------------------------------------------------------------------------------------------------


def curves(rows: Sequence[ResultRow]) -> Section | None:
    """Validation in the course of the training, all runs in one plot, then each run's losses; None without a curve."""
    models = _without_seed(rows)
    colors = {model: place for place, model in enumerate(dict.fromkeys(models))}  # as in the plots of the table
    named = []
    for place, (name, row) in enumerate(zip(names_of(rows), rows, strict=True)):
        if row.get("curve"):
            named.append((name, row, (colors[models[place]], models[:place].count(models[place]))))
    if not named:
        return None
    parts: list[Any] = []
    validations = _validations(named[:_MOST_CURVES])
    if validations:
        parts.append(Row(validations))
    losses = [plot for name, row, _ in named[:_MOST_CURVES] if (plot := _losses(name, row["curve"])) is not None]
    if losses:
        parts.append(Details(f"Training losses of {len(losses)} runs", [Row(losses)]) if len(losses) > 4 else Row(losses))
    if len(named) > _MOST_CURVES:
        parts.append(Text(f"The curves of the first {_MOST_CURVES} of {len(named)} runs."))
    return Section("Training curves", parts) if parts else None


def _validations(named: Sequence[tuple[str, ResultRow, tuple[int, int]]]) -> list[Plot]:
    """The metric that models are chosen by, against epochs and against minutes: a color per model, a dash per seed."""
    metrics = [str(row.get("valid_metric") or "").lower() for _, row, _ in named]
    metric = next((name for name in metrics if name), None)
    plotted = []
    for x, of in (("epoch", _epoch), ("minutes of training", _minutes)):
        traces: list[Any] = []
        for name, row, look in named:
            points = [point for point in row["curve"] if _valid(point, metric) is not None and of(point) is not None]
            if points:
                values = [_valid(point, metric) for point in points]
                traces.append(plots.line(name, [of(point) for point in points], values, *look))
        if traces:
            figure = plots.figure(traces, x=x, y=f"validation {metric}")
            figure.update_xaxes(rangemode="tozero")
            plotted.append(Plot(figure, f"Validation by {x.split()[0]}"))
    return plotted


def _epoch(point: Mapping[str, Any]) -> float | None:
    return point.get("epoch")


def _minutes(point: Mapping[str, Any]) -> float | None:
    seconds = point.get("seconds")
    return None if seconds is None else seconds / 60


def _valid(point: Mapping[str, Any], metric: str | None) -> float | None:
    values = {name.lower(): value for name, value in (point.get("valid") or {}).items()}
    return values.get(metric) if metric else None


def _losses(name: str, curve: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Each part of the loss."""
    points = [point for point in curve if point.get("losses")]
    parts = list(dict.fromkeys(part for point in points for part in point["losses"]))
    stages = list(dict.fromkeys(point.get("stage", "") for point in points))
    traces: list[Any] = []
    for stage in stages:
        for part in parts:
            found = [point for point in points if point.get("stage", "") == stage and point["losses"].get(part) is not None]
            if found:
                label = " ".join(word for word in (stage, part) if word)
                x, y = [_epoch(point) for point in found], [point["losses"][part] for point in found]
                traces.append(plots.line(label, x, y, len(traces)))
    if not traces:
        return None
    return Plot(plots.figure(traces, x="epoch", y="training loss"), f"Training loss: {name}", height=300)


# ---------------------------------------------------------------------------------------------------------------------
# What was run
# ---------------------------------------------------------------------------------------------------------------------


def provenance(rows: Sequence[ResultRow]) -> Section | None:
    """Every run with its seed, times and machine; the settings in which runs differ; commands, settings and versions."""
    if not rows:
        return None
    parts: list[Any] = [_runs_table(rows)]
    settings = _differing_table(rows)
    if settings is not None:
        parts.append(settings)
    commands: dict[str, list[str]] = {}
    for name, row in zip(names_of(rows), rows, strict=True):
        command = _record(row).get("command")
        if isinstance(command, str) and command:
            commands.setdefault(command, []).append(name)
    parts += [Code(command, f"Command of {_shortened(names)}") for command, names in commands.items()]
    parts += [_details(name, row) for name, row in zip(names_of(rows), rows, strict=True) if _record(row)]
    return Section("Runs", parts)


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _record(row: ResultRow) -> Mapping[str, Any]:
    record = row.get("record")
    return record if isinstance(record, Mapping) else {}


def _part(row: ResultRow, name: str) -> Mapping[str, Any]:
    """A mapping of a record; empty where it has none."""
    found = _record(row).get(name)
    return found if isinstance(found, Mapping) else {}


def _runs_table(rows: Sequence[ResultRow]) -> Table:
    header = ["run", "dataset", "seed", "tuning", "started (UTC)", "training", "test", "peak memory", "machine", "version"]
    body = []
    for name, row in zip(_without_seed(rows), rows, strict=True):
        memory, machine = _part(row, "peak_memory_bytes"), _part(row, "machine")
        used = memory.get("gpu") or memory.get("cpu")
        where = [machine.get("gpu") or machine.get("cpu") or machine.get("platform")]
        where += [f"{machine['cores']} cores"] if machine.get("cores") and not machine.get("gpu") else []
        body.append(
            [
                name,
                row["dataset"],
                str(row["seed"]),
                _budget(row),
                _moment(_record(row).get("started")),
                _duration(row.get("train_seconds")),
                _duration(row.get("eval_seconds")),
                number(used, f"{used / 1e9:.2f} GB" if isinstance(used, (int, float)) else None),
                ", ".join(str(word) for word in where if word),
                _part(row, "versions").get("recbole_llm"),
            ]
        )
    kept = [place for place in range(len(header)) if place == 0 or any(_shown(row[place]) for row in body)]
    return Table([header[place] for place in kept], [[row[place] for place in kept] for row in body], "All runs", left=2)


def _budget(row: ResultRow) -> str:
    """How many trials a run's settings were the best of; empty where they are not known to have been searched for."""
    tuned_by = settings_of(row).get("tuned_by")
    trials = tuned_by.get("trials") if isinstance(tuned_by, Mapping) else None
    return f"{trials} trials" if isinstance(trials, int) else ""


def _shown(value: Any) -> bool:
    return value not in (None, "") and not (isinstance(value, Cell) and value.text == "-")


def _moment(text: Any) -> Cell:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return Cell("-", None)
    return Cell(moment.strftime("%Y-%m-%d %H:%M"), moment.timestamp())


def _duration(seconds: Any) -> Cell:
    if not isinstance(seconds, (int, float)):
        return Cell("-", None)
    if seconds < 60:
        return number(seconds, f"{seconds:.1f} s")
    minutes = round(seconds / 60)
    return number(seconds, f"{seconds / 60:.1f} min" if seconds < 3600 else f"{minutes // 60} h {minutes % 60:02d} min")


def _differing_table(rows: Sequence[ResultRow]) -> Table | None:
    """The settings in which runs differ, among those that have them: one line per key, one column per model and variant."""
    known: dict[str, ResultRow] = {}
    for name, row in zip(_without_seed(rows), rows, strict=True):
        if settings_of(row):
            known.setdefault(name, row)
    if len(known) < 2:
        return None
    body = []
    for key in sorted(differing_keys(list(known.values()))):
        shown = [_setting(settings_of(row)[key]) if key in settings_of(row) else "" for row in known.values()]
        if len(set(shown) - {""}) > 1:
            body.append([key, *shown])
    return Table(["setting", *known], body, "Settings in which runs differ", left=1 + len(known)) if body else None


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _details(name: str, row: ResultRow) -> Details:
    record = _record(row)
    facts = {
        "protocol": record.get("protocol"),
        "folder": row.get("checkpoint"),
        "started": record.get("started"),
        "finished": record.get("finished"),
        "data": record.get("data"),
        "backbone": record.get("backbone"),
        "teacher": record.get("teacher"),
        "machine": record.get("machine"),
        "git": record.get("git"),
        "test set": row.get("test_set"),
        "tuned by": settings_of(row).get("tuned_by"),
        "versions": record.get("versions"),
    }
    parts: list[Any] = [Facts(facts)]
    changed = record.get("changed") if isinstance(record.get("changed"), Mapping) else None
    if changed:
        parts.append(Table(["setting", "value"], [[key, _setting(value)] for key, value in changed.items()], "Changed", left=2))
    if settings_of(row):
        body = [[key, _setting(value)] for key, value in sorted(settings_of(row).items())]
        parts.append(Details(f"All {len(body)} settings", [Table(["setting", "value"], body, left=2)], long=True))
    return Details(name, parts)
