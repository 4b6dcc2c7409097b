"""Results in files: written as worked out by hand, and read back for one table of runs that were made apart."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from test_run import CURVE, RECORD
from test_table import failed_row, judged_row, make_row

from recbole_llm import cli
from recbole_llm.errors import UserError
from recbole_llm.results.files import check_outputs, read_rows, write_json, write_per_user
from recbole_llm.results.run import write_run
from recbole_llm.results.table import format_table


def test_json_by_hand(tmp_path):
    file = tmp_path / "new" / "results.json"
    first = make_row("SASRec", [1, 2, 3, 3], checkpoint="saved/SASRec", test_set="3fa9")
    first["users"], first["seed"] = np.int64(4), np.int32(7)
    write_json([first, make_row("SASRec", [1, 3], role="teacher", train_seconds=float("nan")), failed_row("B")], file)
    text = file.read_text(encoding="utf-8")
    assert "NaN" not in text and text.endswith("]\n")
    first, teacher, failed = json.loads(text)
    assert first == {
        "format": "recbole-llm run",
        "version": 2,
        "label": "SASRec",
        "role": "model",
        "folder": "saved/SASRec",
        "model": "SASRec",
        "dataset": "ml-100k",
        "protocol": None,
        "seed": 7,
        "settings": {},
        "changed": {},
        "command": None,
        "versions": {},
        "git": None,
        "data": {},
        "backbone": None,
        "teacher": None,
        "machine": {},
        "started": None,
        "finished": None,
        "seconds": {"train": 90.0, "evaluate": 12.0},
        "peak_memory_bytes": {},
        "trained_parameters": 123456,
        "users": 4,
        "test_set": "3fa9",
        "valid_metric": "NDCG@2",
        "metrics": {"valid": {}, "test": {"ndcg@2": pytest.approx((1 + 0.63093) / 4, abs=1e-5), "hit@2": 0.5}},
            "tests": {},
    }
    assert (teacher["role"], teacher["folder"], teacher["seconds"]["train"]) == ("teacher", None, None)
    assert failed == {
        "format": "recbole-llm run",
        "version": 2,
        "label": "B",
        "role": "model",
        "folder": None,
        "model": "B",
        "dataset": "ml-100k",
        "seed": 1,
        "error": "no such file: bring one.",
    }


def test_a_run_is_reported_by_its_record(tmp_path):
    run = write_run(tmp_path / "run", RECORD, CURVE, ["a", "b", "c"], ranks=[1, 2, 3])
    write_json([run.row("LLMSTAR:plain")], tmp_path / "results.json")
    (reported,) = json.loads((tmp_path / "results.json").read_text())
    names = {"label": "LLMSTAR:plain", "role": "model", "folder": str(run.folder)}
    assert reported == {**names, **json.loads((run.folder / "run.json").read_text())}
    (row,) = read_rows([tmp_path / "results.json"])
    assert row.keys() == run.row().keys() - {"user_ids", "ranks"} and row["model"] == "LLMSTAR:plain"
    assert (row["checkpoint"], row["users"], row["metrics"]["ndcg@10"]) == (str(run.folder), 3, 0.25)


EARLIER = """[{"model": "SASRec (teacher)", "dataset": "ml-100k", "seed": 1, "metrics": {"ndcg@2": 0.5, "hit@2": null},
  "valid_metric": "NDCG@2", "users": 2, "test_set": null, "trained_parameters": 9, "train_seconds": null, "eval_seconds": 1.5},
 {"model": "B", "dataset": "ml-100k", "seed": 1, "metrics": {}, "valid_metric": null, "users": null, "test_set": null,
  "trained_parameters": null, "train_seconds": null, "eval_seconds": null, "error": "no such file: bring one."}]"""


def test_files_of_earlier_versions_are_read(tmp_path):
    (tmp_path / "old.json").write_text(EARLIER)
    write_json([make_row("A", [1, 2])], tmp_path / "new.json")
    teacher, failed, new = read_rows([tmp_path / "old.json", tmp_path / "new.json"])
    assert (teacher["model"], teacher["role"], teacher["metrics"]["ndcg@2"]) == ("SASRec", "teacher", 0.5)
    assert failed["error"] == "no such file: bring one." and new["model"] == "A"
    assert "SASRec (teacher)" in format_table([teacher, failed, new])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"label": "\x1b[2J"}, "run 1 is damaged: its label, role or folder"),
        ({"folder": 5}, "run 1 is damaged: its label, role or folder"),
        ({"version": 9}, "newer version"),
        ({"users": "many"}, "its users is missing"),
        ({"error": "it failed", "seed": None}, "its seed is missing"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, changes, sentence):
    write_json([make_row("A", [1])], tmp_path / "a.json")
    (record,) = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps([{**record, **changes}]))
    with pytest.raises(UserError, match=sentence):
        read_rows([tmp_path / "a.json"])


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    write_json([make_row("A", [1])], file)
    before = file.read_text()

    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, no_space)
            with pytest.raises(UserError, match="results_file: .*results.json cannot be written .No space left"):
                write_json([make_row("B", [1])], file)
        assert file.read_text() == before
        assert os.listdir(tmp_path) == ["results.json"]
    write_json([make_row("B", [1])], file)
    assert json.loads(file.read_text())[0]["model"] == "B" and os.listdir(tmp_path) == ["results.json"]


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="per_user_file: .* cannot be written"):
        write_per_user([make_row("A", [1])], tmp_path / "taken" / "users.tsv")


def test_judged_labels_by_hand(tmp_path):
    file = tmp_path / "users.tsv"
    write_per_user([judged_row("SASRec", [5.0, -1.25], labels=(1, 0)), failed_row("LLMSTAR")], file)
    assert file.read_text() == "model\tseed\tuser\tlabel\tvalue\nSASRec\t1\tu0\t1\t5\nSASRec\t1\tu1\t0\t-1.25\n"


def test_per_user_by_hand(tmp_path):
    file = tmp_path / "users.tsv"
    rows = [
        make_row("A", [1, 2, 3], users=["u1", "tab\tin it", "ü"]),
        make_row("A", [2], role="teacher", metrics=("mrr",), seed=2),
        failed_row("B"),
    ]
    write_per_user(rows, file)
    assert file.read_text(encoding="utf-8") == (
        "model\tseed\tuser\trank\tndcg@2\thit@2\tmrr@2\n"
        "A\t1\tu1\t1\t1\t1\t\n"
        'A\t1\t"tab\tin it"\t2\t0.63093\t1\t\n'
        "A\t1\tü\t3\t0\t0\t\n"
        "A (teacher)\t2\tu0\t2\t\t\t0.5\n"
    )


def test_figures_of_a_whole_run_have_no_column_per_user(tmp_path):
    row = make_row("A", [1, 2, 3])
    write_per_user([{**row, "metrics": {**row["metrics"], "validratio": 0.5, "ilp_accuracy@1": 0.9}}], tmp_path / "users.tsv")
    assert (tmp_path / "users.tsv").read_text().splitlines()[0] == "model\tseed\tuser\trank\tndcg@2\thit@2"
    assert "validratio" in format_table([{**row, "metrics": {**row["metrics"], "validratio": 0.5}}])


# --- read back ---------------------------------------------------------------------------------------------------------


def written(folder, name, rows):
    write_json(rows, folder / f"{name}.json")
    write_per_user(rows, folder / f"{name}.tsv")
    return [str(folder / f"{name}.json"), str(folder / f"{name}.tsv")]


def test_runs_made_apart_give_the_table_of_one_run(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [
        make_row(name, rng.integers(1, 5, 30), seed, role=role, test_set=f"{seed}a")
        for name, role in (("SASRec", "model"), ("LLMSTAR:plain", "model"), ("GRU4Rec", "teacher"))
        for seed in (1, 2)
    ]
    rows[2]["metrics"]["validratio"] = rows[3]["metrics"]["validratio"] = 0.25
    rows.append(failed_row("LLMSRec"))
    files = [file for place, row in enumerate(rows) for file in written(tmp_path, str(place), [row])]
    assert cli.main(["table", *files]) == 0
    assert capsys.readouterr().out == format_table(rows) + "\n"
    assert "p=" in format_table(rows)
    assert cli.main(["table", *files, "--against=LLMSTAR:plain"]) == 0
    assert capsys.readouterr().out == format_table([*rows[2:4], *rows[:2], *rows[4:]]) + "\n"
    assert cli.main(["table", *(file for file in files if file.endswith(".json"))]) == 0
    assert "(no test)" in capsys.readouterr().out


def test_judged_labels_are_read_back(tmp_path):
    rows = [judged_row("SASRec", [5, -1, 2, 3, 1, 4]), judged_row("TALLRec", [0.9, 0.8, 0.4, 0.5, 0.2, 0.1])]
    assert format_table(read_rows(written(tmp_path, "both", rows))) == format_table(rows)


def test_results_by_user_find_their_run_by_what_they_say(tmp_path):
    here, there = make_row("A", [1, 2, 3]), {**make_row("A", [1, 1, 3]), "dataset": "scientific"}
    files = [*written(tmp_path, "here", [here]), *written(tmp_path, "there", [there])]
    read = read_rows(reversed(files))
    assert {row["dataset"]: row["ranks"].tolist() for row in read} == {"ml-100k": [1, 2, 3], "scientific": [1, 1, 3]}
    assert [row["user_ids"].tolist() for row in read] == [["u0", "u1", "u2"]] * 2
    with pytest.raises(UserError, match="here.tsv: its results of A .seed 1. are of none of the runs"):
        read_rows(files[1:])


def test_a_figure_that_was_no_number_stays_a_dash(tmp_path):
    row = make_row("A", [1, 2])
    row["metrics"]["ndcg@2"] = float("nan")
    write_json([row], tmp_path / "a.json")
    assert format_table(read_rows([tmp_path / "a.json"])).splitlines()[4].split()[:2] == ["A", "-"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read (No such file or directory)."),
        (b"\xff\xfe", "cannot be read (it is no text)."),
        (b"model: A", "is neither a run nor a results_file, per_user_file or analysis"),
        (b'{"model": "A"}', "is neither a run nor a results_file, per_user_file or analysis"),
        (b'[{"model": "A"}]', "was not written by results_file or per_user_file."),
        (b"model\tseed\tuser\trank\nA\t1\tu1\tfirst\n", "line 2: this is no line of a per_user_file."),
        (b"model\tseed\tuser\tfirst\nA\t1\tu1\t2\n", "line 2: this is no line of a per_user_file."),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, capsys, content, sentence):
    file = tmp_path / "odd"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["table", str(file)]) == 2
    assert sentence in capsys.readouterr().err


def test_names_cannot_steer_the_terminal(tmp_path):
    write_json([make_row("A", [1]) | {"model": "\x1b[2J"}], tmp_path / "a.json")
    with pytest.raises(UserError, match="is damaged"):
        read_rows([tmp_path / "a.json"])
    (tmp_path / "a.json").write_text(EARLIER.replace("SASRec", "\\u001b[2J"))
    with pytest.raises(UserError, match="was not written by"):
        read_rows([tmp_path / "a.json"])


def test_mistakes_in_the_command(tmp_path, capsys):
    write_json([make_row("A", [1])], tmp_path / "a.json")
    write_json([], tmp_path / "none.json")
    for words, sentence in (
        ([], "name runs: the folders"),
        ([str(tmp_path / "none.json")], "there is no run in"),
        ([str(tmp_path / "a.json"), "--against=B"], "against: there is no 'B' among A."),
        ([str(tmp_path / "a.json"), "--agains=A"], "did you mean --against?"),
    ):
        assert cli.main(["table", *words]) == 2
        assert sentence in capsys.readouterr().err
    assert cli.main(["table", "--help"]) == 0


@pytest.mark.parametrize("key", ["results_file", "per_user_file"])
@pytest.mark.parametrize("content", ["user_id:token\titem_id:token\n", "epochs: 3\n", '{"format": 1}', "notes"])
def test_a_file_that_holds_something_else_is_not_replaced(tmp_path, key, content):
    (tmp_path / "shop.inter").write_text(content)
    (tmp_path / "link").symlink_to(tmp_path / "shop.inter")
    for name in ("shop.inter", "link"):
        with pytest.raises(UserError, match=f"{key}: .*{name} holds something else than results, and is not replaced"):
            check_outputs({key: tmp_path / name})


def test_a_file_of_results_is_replaced(tmp_path):
    write_json([], tmp_path / "results.json")
    write_per_user([], tmp_path / "users.tsv")
    (tmp_path / "empty").touch()
    for names in (("results.json", "users.tsv"), ("empty", "new/users.tsv"), (None, None)):
        files = [None if name is None else tmp_path / name for name in names]
        check_outputs(dict(zip(("results_file", "per_user_file"), files, strict=True)))
    with pytest.raises(UserError, match="per_user_file: .* holds something else"):
        check_outputs({"per_user_file": tmp_path / "results.json"})


def test_outputs_are_not_each_other(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "one")
    with pytest.raises(UserError, match="per_user_file: .*link is the file of results_file too"):
        check_outputs({"results_file": tmp_path / "one", "per_user_file": tmp_path / "link"})
    with pytest.raises(UserError, match="results_file: .*one is the file of endpoint_answers too"):
        check_outputs({"results_file": tmp_path / "one"}, {"endpoint_answers": str(tmp_path / "here" / ".." / "one")})


@pytest.mark.parametrize("file", ["saved", "./log", "link"])
def test_outputs_are_not_the_folders_of_a_run(tmp_path, file):
    (tmp_path / "link").symlink_to(tmp_path / "saved")
    folders = {"checkpoint_dir": tmp_path / "saved" / "runs", "the log": tmp_path / "log"}
    with pytest.raises(UserError, match="results_file: .* is to be a folder, that of (checkpoint_dir|the log); name another"):
        check_outputs({"results_file": tmp_path / file}, folders=folders)
    check_outputs({"results_file": tmp_path / "saved" / "results.json"}, folders=folders)


@pytest.mark.parametrize("key", ["results_file", "per_user_file"])
@pytest.mark.parametrize("name", ["saved", "log", "log_tensorboard", "odd.yaml", "sets.parquet"])
def test_a_command_refuses_such_outputs_before_anything_is_trained(chain_data, capsys, key, name):
    Path("odd.yaml").write_text("{}")
    words = [f"--data_path={chain_data}", "--config_files=odd.yaml", "--candidates_file=sets.parquet", f"--{key}={name}"]
    assert cli.main(["run", "--model=SASRec", "--protocol=retrieval", "--dataset=chain", *words]) == 2
    assert re.search(f"^Error: {key}: {name} (is|holds) ", capsys.readouterr().err)
    assert sorted(path.name for path in Path().iterdir()) == ["odd.yaml"]


@pytest.mark.parametrize("kind", ["pipe", "device", "circle", "link to a device", "socket"])
def test_what_is_no_regular_file_is_never_replaced(tmp_path, kind):
    place = tmp_path / "place"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(place))
    elif kind != "device":
        place.symlink_to(place if kind == "circle" else "/dev/null")
    place = Path("/dev/null") if kind == "device" else place
    before = os.lstat(place).st_mode
    with pytest.raises(UserError, match="results_file: .* is no regular file"):
        check_outputs({"results_file": place})
    with pytest.raises(UserError, match="is no regular file, and is not replaced"):
        write_json([], place)
    assert os.lstat(place).st_mode == before and not list(tmp_path.glob("*.tmp"))


def test_a_link_stays_and_its_file_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "results.json")
    write_json([], tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "results.json").read_text() == "[]\n"
