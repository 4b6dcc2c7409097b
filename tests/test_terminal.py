"""Nothing that was read from data or files steers a terminal: everything that is printed or logged is made printable first."""

from __future__ import annotations

import ast
import json
import logging
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from recbole_llm import answers, cli, lock
from recbole_llm.analysis import cases
from recbole_llm.data.prepare import generate_chain
from recbole_llm.errors import UserError, printable_json, printable_lines, say
from recbole_llm.recommend import Recommendation
from recbole_llm.results import log
from recbole_llm.results.comparison import sentence
from recbole_llm.results.run import RECORD
from recbole_llm.results.table import format_table
from recbole_llm.run_model import failure

PACKAGE = Path(cli.__file__).parent
# An escape sequence, the same by one character, an override of the direction, a bell, half a surrogate pair.
HOSTILE = "a\x1b[31mred\x9b2J\u202eb\x07\ud800c"
ON_DISK = HOSTILE.replace("\ud800", "")
FOUND = [[Recommendation(HOSTILE, HOSTILE, 0.5)]]
RECORD_OF_MODEL = {"format": 1, "kind": "stock", "model": ON_DISK, "dataset": ON_DISK, "seed": 1, "train_seconds": 1.0}


def rows():
    row = {"seed": 1, "users": 3, "metrics": {HOSTILE: 0.5}, "dataset": HOSTILE, "valid_metric": HOSTILE, "test_set": HOSTILE}
    failed = {"model": f"{HOSTILE}2", "dataset": HOSTILE, "seed": 1, "error": HOSTILE, "metrics": {}}
    return [{**row, "model": HOSTILE}, failed]


def a_run(folder: Path, **changes) -> Path:
    """The folder of a trained model, of a hostile name, with a hostile record."""
    place = folder / "saved" / ON_DISK
    place.mkdir(parents=True)
    (place / "recbole_llm.json").write_text(json.dumps({**RECORD_OF_MODEL, **changes}))
    return place


def a_damaged_run(folder: Path) -> Path:
    place = a_run(folder)
    (place / RECORD).write_text(json.dumps({"format": "recbole-llm run", "model": ON_DISK, "metrics": {ON_DISK: ON_DISK}}))
    return place


def of_command(*words: str):
    def drive(folder: Path) -> None:
        cli.main([word.replace("FOLDER", str(folder)) for word in words])

    return drive


def of_table(form: str):
    return lambda folder: say(format_table(rows(), format=form))


def of_clean(folder: Path) -> None:
    (a_run(folder) / f"{ON_DISK}.999999999.tmp").write_text("half")
    cli.main(["clean"])


def of_runs(form: str):
    def drive(folder: Path) -> None:
        a_run(folder)
        cli.main(["runs", f"--format={form}"])

    return drive


def of_help(folder: Path) -> None:
    place = folder / "data" / ON_DISK
    place.mkdir(parents=True)
    (place / f"{ON_DISK}.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n")
    cli.main(["run", "--help", f"--data_path={folder / 'data'}"])
    cli.main(["run", "--help", "--dataset=all", f"--data_path={folder / 'data'}"])


def of_prepare(folder: Path) -> None:
    (folder / "log.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"{n % 3},{n},{n}\n" for n in range(9)))
    cli.main(["prepare", ON_DISK, "--interactions=log.csv", f"--data-path={folder / ON_DISK}"])


def of_a_file(name: str, content: str, *words: str):
    def drive(folder: Path) -> None:
        (folder / name).write_text(content)
        cli.main([*words])

    return drive


def of_item_ids(folder: Path) -> None:
    generate_chain(folder / "data", "chain", users=12, items=12, seed=1, noise=0.1)
    file = folder / "data" / "chain" / "chain.inter"
    lines = file.read_text().splitlines()
    user, rest = lines[1].split("\t", 1)
    file.write_text("\n".join([*lines, f"{ON_DISK}\t{rest}", f"{ON_DISK}\t{rest.replace(rest.split()[0], ON_DISK, 1)}"]) + "\n")
    cli.main(["run", "--model=SASRec", "--protocol=retrieval", "--dataset=chain", f"--data_path={folder / 'data'}"])


def of_cases(folder: Path) -> None:
    first = {"history": [(HOSTILE, HOSTILE)], "rank": 1, "best": [HOSTILE]}
    case = {"user": HOSTILE, "truth": HOSTILE, "conditions": {HOSTILE: first}}
    say(cases.format_results([{"dataset": HOSTILE, "model": HOSTILE, "seed": 1, "cases": [case]}]))


def of_a_holder(folder: Path) -> None:
    """A second process is told who holds a folder, by a note that a file has."""
    note = folder / "note.json"
    note.write_text(json.dumps({"pid": 1, "host": HOSTILE, "since": HOSTILE}))
    logging.getLogger().info(f"{ON_DISK} is in use by {lock._holder(note)}")


PRINTED = {
    "recommendations": lambda folder: say(answers.as_text([HOSTILE], FOUND[0])),
    "recommendations as JSON": lambda folder: say(answers.as_json([HOSTILE], FOUND)),
    **{f"a table as {form}": of_table(form) for form in ("text", "md", "latex", "csv")},
    "runs": of_runs("text"),
    "runs as JSON": of_runs("json"),
    "runs of a folder": of_command("runs", f"FOLDER/{ON_DISK}"),
    "damaged runs": lambda folder: (a_damaged_run(folder), cli.main(["runs"])),
    "the record of a run": lambda folder: cli.main(["table", str(a_damaged_run(folder))]),
    "the record of a model": lambda folder: cli.main(["recommend", f"--checkpoint={a_run(folder)}", "--user=1"]),
    "the dataset in a record": lambda folder: cli.main(
        ["recommend", f"--checkpoint={a_run(folder, kind='llm', model='LLMSTAR', dataset=f'../{ON_DISK}')}", "--user=1"]
    ),
    "orphans": of_clean,
    "data sets": of_help,
    "a new data set": of_prepare,
    "a model's name": of_command("run", f"--model={ON_DISK}", "--dataset=x"),
    "a data set's name": of_command("run", "--model=SASRec", f"--dataset={ON_DISK}"),
    "a value": of_command("run", "--model=SASRec", "--dataset=x", f"--epochs={ON_DISK}"),
    "a metric's name": of_command("run", "--model=Pop", "--dataset=ml-100k", f"--metrics=[{ON_DISK!r}]"),
    "a command": of_command(ON_DISK),
    "item and user ids": of_item_ids,
    "settings in a file": of_a_file(
        "odd.yaml", json.dumps({ON_DISK: ON_DISK}), "run", "--model=SASRec", "--dataset=x", "--config_files=odd.yaml"
    ),
    "a results file": of_a_file(f"{ON_DISK}.json", json.dumps([{"model": ON_DISK}]), "table", f"{ON_DISK}.json"),
    "a line of results by user": of_a_file("u.tsv", f"model\tseed\tuser\trank\n{ON_DISK}\t1\t{ON_DISK}\t1\n", "table", "u.tsv"),
    "an analysis": of_cases,
    "a failure": lambda folder: say(sentence(failure(ZeroDivisionError(HOSTILE)))),
    "a message": lambda folder: logging.getLogger().warning("%s", ON_DISK),
    "a message with a traceback": lambda folder: with_traceback(),
    "who holds a folder": of_a_holder,
}  # fmt: skip


def with_traceback() -> None:
    try:
        raise ZeroDivisionError(HOSTILE)
    except ZeroDivisionError:
        logging.getLogger().exception(HOSTILE)


def steering(text: str) -> list[str]:
    """The characters of a text that a terminal obeys; colors of whole words, which RecBole's messages have, are none."""
    plain = log._COLORED.sub(r"\2", text)
    plain = re.sub(r"(?m)^\x1b\[\d+m|\x1b\[0m$", "", plain)  # of a line on the console, by its level
    return sorted({character for line in plain.split("\n") for character in line if not character.isprintable()})


@pytest.mark.parametrize("what", PRINTED)
def test_nothing_that_is_printed_or_logged_steers_a_terminal(what, tmp_path, capsys):
    log.start_console("info")
    with log.run_log("SASRec", "run") as file:
        PRINTED[what](tmp_path)
    printed = capsys.readouterr()
    text = printed.out + printed.err + file.read_text()
    assert "red" in text, "the hostile text, or the rest of it, was not shown at all"
    assert steering(text) == []


def test_a_word_in_color_stays_and_no_more():
    assert log.readable("\x1b[1;32mepoch 1\x1b[0m [\x1b[31mred\x1b[2J\n\x1b[1;35mno end") == (
        "\x1b[1;32mepoch 1\x1b[0m [ [31mred [2J\n [1;35mno end"
    )


def test_json_says_the_same():
    values = [HOSTILE, "é 🦄 \x7f", "\U000e0001"]
    text = printable_json(json.dumps(values, ensure_ascii=False, indent=1))
    assert json.loads(text) == values and not steering(text) and "é 🦄" in text


def test_trackers_get_printable_names(monkeypatch):
    named = []

    def init(**given):
        named.append(given["name"])
        return SimpleNamespace(id="1")

    fake = SimpleNamespace(run=None, init=init, finish=lambda **given: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with log.tracked(HOSTILE, {"log_wandb": True}):
        pass
    log.note_settings(HOSTILE, {"epochs": 1})
    assert len(named) == 1 and "red" in named[0] and not steering(named[0])
    assert [steering(path.name) for path in Path("log_tensorboard").iterdir()] == [[]]


def test_sentences_of_errors_are_printable():
    assert steering(str(UserError(HOSTILE))) == [] and printable_lines("a\nb\x1b") == "a\nb "


def test_one_function_prints():
    """Another call of print, or of a stream, would be a second way to a terminal."""
    calls = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write"):
                calls.append(f"{file.relative_to(PACKAGE)}: {ast.unparse(node)}")
    assert len(calls) == 1 and calls[0].startswith("errors.py: print(printable_lines(text)")


def test_long_texts_take_no_time():
    started = time.process_time()
    log.readable("\x1b[1;32m" * 100_000), printable_json("\x1b" * 100_000)
    assert time.process_time() - started < 2
