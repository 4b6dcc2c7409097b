"""The command line: ``recbole-llm run``, ``tune``, ``table``, ``report``, ``runs``, ``recommend``, ``export``, ``serve``,
``prepare``, ``analyze`` and ``clean``.

Invalid input ends with one sentence on standard error and exit code 2; so do Ctrl-C and the signals that end a process.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from recbole_llm._version import __version__
from recbole_llm.errors import UserError, closest, say, sentence_for
from recbole_llm.processes import ending, environment

USAGE = """\
recbole-llm: LLM-based sequential recommenders in RecBole

  recbole-llm run --model=SASRec,LLMSRec,LLMSTAR --dataset=ml-100k [--seed=1,2,3] [--key=value ...]
      train and compare models; --help lists models, datasets and backbones, --help --model=LLMSTAR its keys;
      --protocol=retrieval,full trains once and tests under both; --tuned=True takes settings that were tuned for the dataset
  recbole-llm tune --model=SASRec --dataset=ml-100k [--trials=20] [--params_file=FILE] [--algo=bayes|random|exhaustive]
      search for a model's settings by validation, test the best; writes them as a YAML file for --config_files
  recbole-llm table RUN ... [--against=SASRec] [--metric=ndcg@10] [--format=text|md|latex|csv]
      print one table, with tests, of runs that were made apart: their folders, or their results_file and per_user_file
  recbole-llm report RUN ... [--output=report.html] [--against=SASRec] [--metric=ndcg@10] [--title=TITLE]
      write one HTML file with table, plots, commands and settings of runs and of files of analyze; it opens offline
  recbole-llm runs [FOLDER] [--model=LLMSTAR] [--delete=NAME,NAME]
      list what was trained, with results, time and size; --help has the rest
  recbole-llm recommend --checkpoint=saved/... (--user=196 | --users=FILE | --history='[Toy Story, GoldenEye]') [--topk=10]
      print the top items of a trained model (--format=text|json) or write them (--output=out.parquet|csv|json); where its
      files have moved, name them by --data_path, --teacher_checkpoint, --pretrained and --backbone
  recbole-llm export RUN --output=FOLDER [--with_backbone=True] [--with_users=True]
      write what recommends of a trained model, without its data: item vectors, ids, titles, trained weights
  recbole-llm serve RUN_OR_EXPORT [--host=127.0.0.1] [--port=8000] [--search=auto|exact|faiss]
      answer over HTTP, with a page to try it; --help has the limits
  recbole-llm prepare amazon-cds [--raw-dir=FOLDER]
      make a dataset of a public source, or of your own tables; --help lists them
  recbole-llm analyze NAME --dataset=ml-100k [--model=SASRec,LLMSTAR] [--key=value ...]
      does the data have order, and do the models use it? analyze --help lists the analyses
  recbole-llm clean [--checkpoint_dir=saved] [--unfinished=True] [--yes=True]
      show what killed runs left and no run reads any more, with sizes; --yes removes it, --unfinished counts the states
      from which interrupted runs would go on
"""

INTERRUPTED = "Interrupted: what was trained is kept; the same command with --resume=True goes on with the rest."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            say(USAGE.rstrip("\n"))
            return 0
        if argv[0] == "--version":
            say(f"recbole-llm {__version__}")
            return 0
        command, rest = argv[0], argv[1:]
        commands = {
            "run": run,
            "tune": tune,
            "table": table,
            "report": report,
            "runs": runs,
            "recommend": recommend,
            "export": export,
            "serve": serve,
            "prepare": prepare,
            "analyze": analyze,
            "clean": clean,
        }
        if command not in commands:
            near, known = closest(command, commands), tuple(commands)
            raise UserError(f"unknown command {command!r}" + (f"; did you mean {near}?" if near else f"; choose {known}."))
        if command != "run" and environment.size() > 1:
            raise UserError(f"{command} is for one process, and {environment.size()} were launched together: start one.")
        with _signals_as_interrupts():
            code = commands[command](rest)
        ending.leave(None, code)
        return code
    except KeyboardInterrupt:
        lost = ending.lost_processes()
        if lost is not None and INTERRUPTED not in lost:  # a launcher ends the other processes where one was lost
            return _fail(f"Error: {lost}", 1)
        return _fail(INTERRUPTED)
    except Exception as error:
        sentence = sentence_for(error)
        if sentence is None:
            ending.leave(f"{type(error).__name__}: {error}", 1, error)
            raise
        return _fail(f"Error: {sentence}", getattr(error, "code", 2))


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Within the context, SIGTERM, SIGHUP and SIGQUIT end the program as Ctrl-C does, unless it was told to ignore them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def interrupt(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    previous = {}
    for name in ("SIGTERM", "SIGHUP", "SIGQUIT"):
        number = getattr(signal, name, None)  # Windows has SIGTERM alone
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup ignores SIGHUP
            previous[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(argv: Sequence[str]) -> int:
    """``recbole-llm run``: train and compare models, print one table."""
    from recbole_llm.config.command_line import parse_command_line
    from recbole_llm.config.first_look import first_look
    from recbole_llm.config.help import help_text
    from recbole_llm.config.schema import load_yaml
    from recbole_llm.processes import launch

    settings = parse_command_line(argv)
    if settings.pop("help", False):
        say(help_text(settings.get("data_path", "dataset/"), settings.get("model"), settings.get("dataset")).rstrip("\n"))
        return 0
    files = [file for file in str(settings.pop("config_files", "") or "").replace(",", " ").split() if file]
    from_files: dict[str, Any] = {}
    for file in files:
        from_files.update(load_yaml(file))

    def setting(name: str) -> Any:
        return settings.pop(name, from_files.get(name))

    models = [name.strip() for name in str(setting("model") or "").split(",") if name.strip()]
    if not models:
        raise UserError("name the models to run: --model=SASRec,LLMSTAR (--help lists them).")
    dataset = setting("dataset")
    if not dataset:
        raise UserError("name a dataset: --dataset=ml-100k (--help lists them).")
    if setting("tuned"):
        from recbole_llm.config.tuned import files_for

        files = [*files_for(models, str(dataset)), *files]
    seeds = _seeds(setting("seed"))
    results_file, per_user_file = setting("results_file"), setting("per_user_file")

    first_look(models, str(dataset), settings, files)
    together = {**from_files, **settings}
    if launch.is_asked(together):
        return launch.launch(["run", *argv], together)

    from recbole_llm.quick_start import compare
    from recbole_llm.results import files as results
    from recbole_llm.results import table as report
    from recbole_llm.results.log import LOGS, TENSORBOARD

    both = {**from_files, **settings}
    results.check_outputs(
        {"results_file": results_file, "per_user_file": per_user_file},
        {**{name: both.get(name) for name in ("endpoint_answers", "candidates_file")}, **{file: file for file in files}},
        {"checkpoint_dir": both.get("checkpoint_dir") or "saved", "the log": LOGS, "TensorBoard": TENSORBOARD},
    )

    def keep(rows: list[Mapping[str, Any]]) -> None:
        if results_file:
            results.write_json(rows, results_file)
        if per_user_file:
            results.write_per_user(rows, per_user_file)

    rows = compare(models, str(dataset), seeds, files, settings, on_row=keep)
    if environment.rank() != 0:
        return 0  # the main process has the rows
    keep(rows)
    say()
    say(report.format_table(rows))
    places = [f"{row['model']} (seed {row['seed']}): {row['checkpoint']}" for row in rows if row.get("checkpoint")]
    for place in dict.fromkeys(places):  # a run has a row under each protocol
        say(place)
    return 2 if any("error" in row for row in rows) else 0


def tune(argv: Sequence[str]) -> int:
    """``recbole-llm tune``: search for a model's settings."""
    from recbole_llm.tuning.command import run as run_search

    return run_search(argv)


def table(argv: Sequence[str]) -> int:
    """``recbole-llm table``: one table of runs that were made apart, on several machines, say."""
    from recbole_llm.results.reading import read_inputs
    from recbole_llm.results.table import format_table

    sources, settings = _sources(argv, {"against", "metric", "format"})
    if settings is None:
        return 0
    inputs = read_inputs(sources)
    if not inputs.rows:
        raise UserError(f"there is no run in {', '.join(sources)}; give the folders of runs, or the results_file of each.")
    for note in inputs.notes:
        say(note, sys.stderr)
    form = {"format": settings["format"]} if "format" in settings else {}
    say(format_table(inputs.rows, settings.get("metric"), against=settings.get("against"), **form))
    return 0


def report(argv: Sequence[str]) -> int:
    """``recbole-llm report``: one HTML file of runs and analyses."""
    from recbole_llm.results.report.write import DEFAULT_OUTPUT, write_report

    sources, settings = _sources(argv, {"against", "metric", "output", "title"})
    if settings is None:
        return 0
    output = settings.pop("output", DEFAULT_OUTPUT)
    say(write_report(sources, output, **settings))
    return 0


def _sources(argv: Sequence[str], known: set[str]) -> tuple[list[str], dict[str, str] | None]:
    """Files and folders on the command line, and the options beside them as text; None for these where help was asked for."""
    from recbole_llm.config.command_line import parse_command_line, refuse_unknown

    sources = [word for word in argv if not word.startswith("-")]
    settings = parse_command_line([word for word in argv if word.startswith("-")])
    refuse_unknown(settings, known | {"help"})
    if settings.get("help"):
        say(USAGE.rstrip("\n"))
        return sources, None
    if not sources:
        raise UserError("name runs: the folders saved/SASRec-... and saved/LLMSTAR-..., say, or files: sasrec.json sasrec.tsv.")
    return sources, {name: str(value) for name, value in settings.items() if value is not None}


def runs(argv: Sequence[str]) -> int:
    """``recbole-llm runs``: list the runs in a folder, or remove some."""
    from recbole_llm.results.listing import command

    say(command(argv))
    return 0


def recommend(argv: Sequence[str]) -> int:
    """``recbole-llm recommend``: the top items for users or a history, on the screen or in a file."""
    from recbole_llm.config.checks import GIVEN
    from recbole_llm.config.command_line import parse_command_line, refuse_unknown

    settings = parse_command_line(argv)
    known = {"checkpoint", "user", "users", "history", "unknown_titles", "candidates", "topk", "exclude_history"}
    known |= {"format", "output", "help"}
    refuse_unknown(settings, known.union(GIVEN))
    if settings.get("help"):
        say(USAGE.rstrip("\n"))
        return 0
    if "checkpoint" not in settings:
        raise UserError("name a trained model: --checkpoint=saved/<folder>.")
    layout, output = settings.get("format", "text"), settings.get("output")
    if layout not in ("text", "json"):
        raise UserError(f"--format is {layout!r}: give text or json.")
    questions = [name for name in ("user", "users", "history") if settings.get(name) is not None]
    if len(questions) != 1:
        raise UserError("give either --user=<id>, --users=<file with an id a line> or --history='[title, title]'.")

    from recbole_llm import answers

    if output is not None:
        answers.check_output(str(output), *([str(settings["users"])] if "users" in questions else []))
    users = answers.read_users(str(settings["users"])) if "users" in questions else None
    user, history, candidates = (settings.get(name) for name in ("user", "history", "candidates"))

    from recbole_llm.recommend import load

    model = load(str(settings["checkpoint"]), **{name: settings[name] for name in GIVEN if name in settings})
    asked = users if users is not None else None if user is None else [str(user)]
    found = model.recommend(
        users=asked,
        histories=None if history is None else [[history] if isinstance(history, str) else [str(title) for title in history]],
        topk=settings.get("topk", 10),
        filter="history" if settings.get("exclude_history", True) else None,
        candidates=[candidates] if isinstance(candidates, str) else candidates,
        unknown_titles=str(settings.get("unknown_titles", "error")),
    )
    if output is not None:
        answers.write(str(output), asked, found)
        say(f"{len(found)} lists of recommendations are in {output}")
    elif layout == "json":
        say(answers.as_json(asked, found))
    else:
        for number, best in enumerate(found):
            titles = model.history_of(asked[number]) if asked is not None else [str(title) for title in history or ()]
            say(answers.as_text(titles, best))
    return 0


def export(argv: Sequence[str]) -> int:
    """``recbole-llm export``: write what recommends of a trained model."""
    from recbole_llm.serving.command import export as write

    return write(argv)


def serve(argv: Sequence[str]) -> int:
    """``recbole-llm serve``: answer questions over HTTP."""
    from recbole_llm.serving.command import serve as answer

    return answer(argv)


def prepare(argv: Sequence[str]) -> int:
    """``recbole-llm prepare``: make a dataset."""
    from recbole_llm.data.prepare.command import prepare as make

    make(argv)
    return 0


def analyze(argv: Sequence[str]) -> int:
    """``recbole-llm analyze``: whether the data has order, and whether the models use it."""
    from recbole_llm.analysis.command import run as run_analysis

    return run_analysis(argv)


def clean(argv: Sequence[str]) -> int:
    """``recbole-llm clean``: show, and remove, what killed runs left in a folder of checkpoints."""
    from recbole_llm.config.command_line import parse_command_line, refuse_unknown
    from recbole_llm.files import format_size
    from recbole_llm.results.clean import KINDS, find_orphans, remove

    settings = parse_command_line(argv, flags=("unfinished", "yes"))
    refuse_unknown(settings, {"checkpoint_dir", "unfinished", "yes", "help"})
    if settings.get("help"):
        say(USAGE.rstrip("\n"))
        return 0
    for key in ("unfinished", "yes"):
        if not isinstance(settings.get(key, False), bool):
            raise UserError(f"--{key} is {settings[key]!r}: give True or False.")
    orphans = find_orphans(str(settings.get("checkpoint_dir") or "saved"), settings.get("unfinished", False))
    gone = remove(orphans) if settings.get("yes") else []
    for kind, meaning in KINDS.items():
        of_kind = [orphan for orphan in orphans if orphan.kind == kind]
        if of_kind:
            say(f"{kind}: {meaning}")
        for orphan in of_kind:
            left = "   (in use now, or not yours: left)" if settings.get("yes") and orphan not in gone else ""
            say(f"  {format_size(orphan.size):>9}  {orphan.path}{left}")
    total = f"{len(orphans)} in all, {format_size(sum(orphan.size for orphan in orphans))}"
    if not orphans:
        say("Nothing to clean.")
    elif settings.get("yes"):
        say(f"{total}; {len(gone)} removed.")
    else:
        say(f"{total}; nothing was removed: --yes=True removes them.")
    return 0


def _seeds(value: Any) -> list[int]:
    """Seeds from ``--seed=7``, ``--seed=1,2,3`` or a YAML list."""
    if value is None:
        return []
    entries = value if isinstance(value, (list, tuple)) else str(value).split(",")
    seeds = []
    for entry in entries:
        try:
            seeds.append(int(str(entry)))
        except ValueError:
            raise UserError(f"seed: {value!r} is no whole number or list of them; write --seed=1,2,3.") from None
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) >= 2**32:
        raise UserError(f"seed: {value!r} must be different whole numbers from 0 to {2**32 - 1}.")
    return seeds


def _fail(sentence: str, code: int = 2) -> int:
    if not ending.is_told_elsewhere():
        with suppress(OSError):  # its disk may be the full one
            say(sentence, sys.stderr)
    ending.leave(sentence, code)
    return code
