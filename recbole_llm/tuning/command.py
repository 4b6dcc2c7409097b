"""``recbole-llm tune``: the search from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recbole_llm.analysis.tables import decimal, format_columns
from recbole_llm.config.command_line import parse_command_line
from recbole_llm.config.first_look import first_look
from recbole_llm.config.schema import known_keys, load_yaml
from recbole_llm.config.settings import model_of
from recbole_llm.errors import UserError, printable, say
from recbole_llm.tuning.search import ALGORITHMS, Request, Tuned, tune
from recbole_llm.tuning.space import built_in, read_space

USAGE = """\
recbole-llm tune --model=SASRec --dataset=ml-100k [--trials=20] [--params_file=FILE] [--algo=bayes] [--key=value ...]

  --trials       settings that are tried
  --params_file  what is searched: YAML (choice: {hidden_size: [64, 128]}) or RecBole's hyper.test; left out: usual ranges
  --algo         bayes, random or exhaustive
  --output       folder of the results [tuned]

Any other key holds for every trial. A trial that was finished before is found again, so that the same command goes on, and more
trials add to those that there are.
"""


def run(argv: Sequence[str]) -> int:
    """Search, print the trials and the winner's test; return the exit code."""
    words = list(argv)
    settings = parse_command_line(words)
    if settings.pop("help", False) or not words:
        say(USAGE.rstrip("\n"))
        return 0
    files = [file for file in str(settings.pop("config_files", "") or "").replace(",", " ").split() if file]
    from_files: dict[str, Any] = {}
    for file in files:
        from_files.update(load_yaml(file))

    def setting(name: str, default: Any = None) -> Any:
        return settings.pop(name, from_files.get(name, default))

    model, dataset = str(setting("model") or ""), setting("dataset")
    if not model or "," in model or "+" in model:
        raise UserError("name one model to tune: --model=SASRec.")
    if not dataset:
        raise UserError("name a dataset: --dataset=ml-100k.")
    trials, algorithm = settings.pop("trials", 20), str(settings.pop("algo", "bayes"))
    output, params_file = str(settings.pop("output", "tuned")), settings.pop("params_file", None)
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise UserError(f"trials: {trials!r} is no whole number above 0.")
    if algorithm not in ALGORITHMS:
        raise UserError(f"algo: {algorithm!r} must be one of {', '.join(ALGORITHMS)}.")
    first_look([model], str(dataset), settings, files)
    space_file = params_file or built_in(model_of(model))
    if space_file is None:
        raise UserError(f"there are no built-in ranges for {model}: give the ranges to search as --params_file=FILE.")
    space = read_space(space_file, known_keys(model_of(model)))
    name = str(params_file) if params_file else f"properties/tune/{model_of(model)}.yaml"
    command = ["recbole-llm", "tune", *words]
    found = tune(Request(model, str(dataset), space, name, trials, algorithm, files, settings, output, command))
    say(format_result(model, found))
    return 0


def format_result(model: str, found: Tuned) -> str:
    """The trials, the best first, and the winner's test."""
    names = list(dict.fromkeys(name for trial in found.trials for name in trial["params"]))
    metrics = list(found.best["valid"])
    finished = [trial for trial in found.trials if "error" not in trial]
    finished.sort(key=lambda trial: abs(trial["value"] - found.best["value"]))
    rows = [
        [
            *(str(trial["params"].get(name, "")) for name in names),
            *(decimal(trial["valid"][metric]) if metric in trial["valid"] else "-" for metric in metrics),
            f"{trial['seconds'] / 60:.1f}",
        ]
        for trial in finished
    ]
    failed = [f"FAILED: {trial['params']}: {trial['error']}" for trial in found.trials if "error" in trial]
    test = ", ".join(f"{name} {decimal(value)}" for name, value in found.row["metrics"].items())
    lines = ["", f"{model}: {len(found.trials)} trials, by validation", ""]
    lines += [format_columns([*names, *metrics, "minutes"], rows, left=len(names)), *failed, ""]
    lines += [f"Test of the best: {test}", f"Its settings, for --config_files: {found.file}"]
    return "\n".join(printable(line, None) if line in failed else line for line in lines)
