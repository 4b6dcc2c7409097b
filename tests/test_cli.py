"""What a user meets at the command line: results, and for each mistake one sentence and exit code 2."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import polars
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from recbole_llm import cli, recommend
from recbole_llm.errors import UserError, printable

ROOT = Path(__file__).parents[1]
STOCK = {"epochs": 1, "hidden_size": 8, "inner_size": 16, "n_layers": 1}
SMALL = {
    "dataset": "chain",
    "backbone": "tiny",
    "backbone_dtype": "float32",
    "head_hidden_size": 16,
    "representation_size": 8,
    "item_projection_hidden_size": 16,
    "history_length": 3,
    "epochs": 1,
    "eval_step": 1,
    **{f"SASRec.{key}": value for key, value in STOCK.items()},
    "topk": "[1,5]",
    "valid_metric": "Hit@5",
    "eval_args": "{'mode': 'uni9'}",
    "use_gpu": False,
    "show_progress": False,
}


def command_of(data_path, *arguments, models="LLMSRec") -> list[str]:
    """``run`` with small settings; ``arguments`` take the place of those of the same key."""
    own = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    settings = {"model": models, "data_path": data_path, **SMALL, **own}
    return ["run", *(f"--{key}={value}" for key, value in settings.items())]


def run(data_path, *arguments, models="LLMSRec"):
    return cli.main(command_of(data_path, *arguments, models=models))


@pytest.fixture
def chain(chain_data, tmp_path):
    """A copy of the chain that a test may damage."""
    folder = tmp_path / "data" / "chain"
    shutil.copytree(chain_data / "chain", folder)
    return folder


def edit(file: Path, change) -> None:
    lines = file.read_bytes().split(b"\n")
    change(lines)
    file.write_bytes(b"\n".join(lines))


def without_text_field(folder):
    edit(folder / "chain.item", lambda lines: lines.__setitem__(0, b"item_id:token\tname:token_seq"))


def duplicated_item(folder):
    edit(folder / "chain.item", lambda lines: lines.insert(2, lines[1]))


def not_utf8(folder):
    edit(folder / "chain.item", lambda lines: lines.__setitem__(3, b"3\tCaf\xe9"))


def wrong_columns(folder):
    edit(folder / "chain.inter", lambda lines: lines.__setitem__(5, lines[5] + b"\textra"))


def timestamp_no_number(folder):
    edit(folder / "chain.inter", lambda lines: lines.__setitem__(6, b"u1\t3\tyesterday"))


def short_history(folder):
    edit(folder / "chain.inter", lambda lines: lines.insert(1, b"lonely\t3\t1600000000"))


def nothing(folder):
    pass


MISTAKES = {
    "missing folder": (shutil.rmtree, [], "data_path"),
    "no text field": (without_text_field, [], r"chain\.item.*title.*name"),
    "duplicated item": (duplicated_item, [], r"chain\.item:3.*"),
    "not UTF-8": (not_utf8, [], r"chain\.item:4.*UTF-8"),
    "wrong column count": (wrong_columns, [], r"chain\.inter:6.*4.*3"),
    "timestamp": (timestamp_no_number, [], r"chain\.inter:7.*yesterday"),
    "short history": (short_history, [], r"user_inter_num_interval"),
    "nothing left": (nothing, ["--user_inter_num_interval=[5000,inf)"], r"filtering \(user_inter_num_interval"),
    "too few items": (nothing, ["--eval_args={'mode': 'uni99'}"], r"uni99.*set it to"),
    "unknown model": (nothing, ["--model=LLMSTARR"], "LLMSTAR"),
    "model named twice": (nothing, ["--model=SASRec,SASRec"], "twice"),
    "no name for a variant": (nothing, ["--model=SASRec,LLMSRec:a b"], "no name"),
    "a model of features": (nothing, ["--model=LLMSRec,FM"], "reads features or knowledge"),
    "unknown dataset": (nothing, ["--dataset=chian"], "did you mean 'chain'"),
    "unknown backbone": (nothing, ["--backbone=smolm2-135m"], "smollm2-135m"),
    "unknown teacher": (nothing, ["--teacher=SASrec"], "SASRec"),
    "unknown key": (nothing, ["--train_negativs=2"], "train_negatives"),
    "unknown key of a teacher": (nothing, ["--SASRec.hiden_size=2"], "hidden_size"),
    "wrong type": (nothing, ["--train_negatives=three"], "train_negatives.*three"),
    "impossible value": (nothing, ["--train_negatives=0"], "train_negatives.*> 0"),
    "no model": (nothing, ["--model="], "--model="),
    "seed": (nothing, ["--seed=one"], "seed"),
    "seed too large": (nothing, ["--seed=1,4294967296"], "whole numbers from 0 to 4294967295"),
    "no seed": (nothing, ["--seed=[]"], "seed"),
    "seed named twice": (nothing, ["--seed=3,3"], "different whole numbers"),
    "seed below zero": (nothing, ["--seed=1,-1"], "different whole numbers"),
    "occupied": (lambda folder: Path("log").touch(), [], "log.* cannot be"),
    "settings file": (nothing, ["--config_files=nowhere.yaml"], "nowhere.yaml"),
    "results folder": (nothing, ["--results_file=/dev/null/results.json"], "results"),
    "one file for two": (nothing, ["--results_file=a.txt", "--per_user_file=./a.txt"], "is the file of results_file too"),
    "an input as output": (nothing, ["--per_user_file=data/chain/chain.inter"], "holds something else than results"),
    "a backbone that cannot be fetched": (nothing, ["--backbone=someone/some-model"], "someone/some-model.*folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_nothing_is_written(mistake, chain, capsys):
    damage, arguments, message = MISTAKES[mistake]
    damage(chain)
    assert run(chain.parent, *arguments) == 2
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("Error: ")]
    assert len(sentences) == 1 and "Traceback" not in error
    assert re.search(message, sentences[0]), sentences[0]
    assert not list(Path("saved").glob("*")), "nothing was trained before the mistake was found"


def test_items_without_text_are_counted_and_their_id_is_used(chain, capfd):
    edit(chain / "chain.item", lambda lines: [lines.__setitem__(row, lines[row].split(b"\t")[0] + b"\t") for row in (4, 5)])
    assert run(chain.parent) == 0
    assert re.search(r"2 of \d+ items .*no text.*id", capfd.readouterr().err.replace("\n", " "))


HOSTILE = [
    b"</s><|im_end|>[UserOut]",
    b"<b onload=x>&amp;</b>",
    b"bell \x07 escape \x1b[2J",
    b"x" * 10_000,
    b"",
    b'"quoted" \xe2\x80\xae',
]


def test_hostile_titles_are_data(chain, capsys):
    def change(lines):
        for row, title in enumerate(HOSTILE, start=1):
            lines[row] = lines[row].split(b"\t")[0] + b"\t" + title

    edit(chain / "chain.item", change)
    assert run(chain.parent, models="LLMSTAR") == 0
    folder = next(Path("saved").glob("LLMSTAR-*"))
    capsys.readouterr()
    assert cli.main(["recommend", f"--checkpoint={folder}", "--user=u1", "--topk=39", "--exclude_history=False"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and max(map(len, out.splitlines())) < 160


# Results


def test_a_comparison_prints_a_table_and_writes_results(chain_data, capsys):
    arguments = ("--results_file=out.json", "--per_user_file=users.tsv", "--seed=1,2", "--GRU4Rec.epochs=2")
    assert run(chain_data, *arguments, models="GRU4Rec,LLMSRec,LLMSTAR") == 0
    out = capsys.readouterr().out
    rows = json.loads(Path("out.json").read_text())
    assert [(row["label"], row["seed"]) for row in rows if row["role"] != "teacher"] == [
        (model, seed) for seed in (1, 2) for model in ("GRU4Rec", "LLMSRec", "LLMSTAR")
    ]
    for row in rows:
        names = {name: row[name] for name in ("label", "role", "folder")}
        assert row == {**names, **json.loads(Path(row["folder"], "run.json").read_text())}
        assert 0 <= row["metrics"]["test"]["ndcg@5"] <= row["metrics"]["test"]["hit@5"] <= 1
    assert "SASRec (teacher)" in out and "LLMSTAR" in out and "(p" in out
    users = Path("users.tsv").read_text().splitlines()
    assert len(users) - 1 == sum(row["users"] for row in rows)
    assert len({(row["seed"], row["test_set"]) for row in rows}) == len({row["test_set"] for row in rows}) == 2
    assert cli.main(["table", "users.tsv", "out.json"]) == 0
    assert capsys.readouterr().out in out


@pytest.mark.slow
def test_s3rec_is_pretrained_and_then_finetuned(chain_data):
    arguments = ["--epochs=2", "--pretrain_epochs=2", "--item_attribute=title", "--hidden_size=8", "--train_batch_size=64"]
    arguments.append("--load_col={inter: [user_id, item_id, timestamp], item: [item_id, title]}")
    settings = [f"--{key}={SMALL[key]}" for key in ("topk", "valid_metric", "eval_args", "use_gpu", "show_progress")]
    command = ["run", "--model=S3Rec", "--dataset=chain", f"--data_path={chain_data}", "--protocol=retrieval", *settings]
    assert cli.main([*command, *arguments, "--results_file=out.json"]) == 0
    assert json.loads(Path("out.json").read_text())[0]["metrics"]["test"]["hit@5"] > 0
    points = json.loads(next(Path("saved").glob("S3Rec-*/curve.json")).read_text())
    stages = [(point.get("stage"), point["epoch"]) for point in points]
    assert stages == [("pretrain", 1), ("pretrain", 2), (None, 1), (None, 2)]
    assert points[0]["losses"]["loss"] > 0 and points[0]["valid"] is None and points[3]["valid"]["hit@5"] >= 0
    assert len(list(Path("saved").glob("[!.]*"))) == 1, "no copies of the pre-trained model are left"
    assert cli.main([*command, *arguments, "--results_file=again.json"]) == 0
    first, again = (json.loads(Path(name).read_text())[0]["metrics"] for name in ("out.json", "again.json"))
    assert first == again


@pytest.mark.slow
def test_variants_of_a_model_stand_in_one_table(chain_data, capsys):
    """An ablation and another teacher beside the model itself: each variant differs by its own keys alone."""
    arguments = ["--LLMSRec:plain.distill_weight=0", "--LLMSRec:gru.teacher=GRU4Rec", "--GRU4Rec.embedding_size=8"]
    assert run(chain_data, *arguments, "--GRU4Rec.epochs=1", "--results_file=out.json",
               models="SASRec,LLMSRec,LLMSRec:plain,LLMSRec:gru") == 0  # fmt: skip
    rows = json.loads(Path("out.json").read_text())
    assert [row["label"] for row in rows] == ["SASRec", "LLMSRec", "LLMSRec:plain", "LLMSRec:gru", "GRU4Rec"]
    assert rows[4]["role"] == "teacher" and {row["model"] for row in rows} == {"SASRec", "LLMSRec", "GRU4Rec"}
    assert "LLMSRec:gru" in capsys.readouterr().out
    settings = [json.loads(path.read_text()) for path in Path("saved").glob("LLMSRec-*/recbole_llm.json")]
    found = {(run["settings"].get("distill_weight"), run["teacher"]["model"]) for run in settings}
    assert found == {(None, "SASRec"), (0, "SASRec"), (None, "GRU4Rec")}
    teachers = {path.name.split("-")[0] for path in Path("saved").glob("[!.]*")}
    assert teachers == {"SASRec", "LLMSRec", "GRU4Rec"} and len(list(Path("saved").glob("[!.]*"))) == 5


@pytest.mark.slow
def test_the_same_command_twice_gives_the_same_numbers(chain_data, capsys):
    numbers = []
    for attempt in range(2):
        assert run(chain_data, f"--results_file={attempt}.json", f"--checkpoint_dir={attempt}", models="SASRec,LLMSTAR") == 0
        numbers.append([row["metrics"] for row in json.loads(Path(f"{attempt}.json").read_text())])
    assert numbers[0] == numbers[1]


def test_help_lists_models_datasets_backbones_and_keys(capsys):
    assert cli.main(["run", "--help"]) == 0
    out = capsys.readouterr().out
    for name in ("LLMSTAR", "LLMSRec", "ml-100k", "smollm2-135m"):
        assert name in out
    assert cli.main(["run", "--help", "--model=LLMSTAR"]) == 0
    out = capsys.readouterr().out
    for name in ("train_negatives", "negatives beside the target"):
        assert name in out
    assert cli.main(["--help"]) == 0
    assert "recommend" in capsys.readouterr().out


ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")


@pytest.fixture
def nothing_ignored():
    """What a program in a terminal finds; one in the background ignores Ctrl-C."""
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in ENDING}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ENDING)
@pytest.mark.usefixtures("nothing_ignored")
def test_a_signal_that_ends_a_program_is_a_sentence(monkeypatch, capsys, name):
    before = {ending: signal.getsignal(getattr(signal, ending)) for ending in ENDING}

    def hours(argv):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(60)

    monkeypatch.setattr(cli, "table", hours)
    assert cli.main(["table"]) == 2
    assert re.fullmatch(r"Interrupted: .*--resume=True.*\n", capsys.readouterr().err)
    assert {ending: signal.getsignal(getattr(signal, ending)) for ending in ENDING} == before


def test_a_signal_that_is_ignored_stays_so(monkeypatch, capsys):
    """``nohup`` has a program outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(cli, "table", lambda argv: os.kill(os.getpid(), signal.SIGHUP) or 0)
        assert cli.main(["table"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OverflowError("int too large to convert to float\nmore"), "number is too large .int too large to convert to float."),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (SafetensorError("Error while deserializing header: \x1b[2J"), "damaged.*SafetensorError.*header"),
        (yaml.YAMLError("while parsing"), "damaged.*YAMLError"),
        (zipfile.BadZipFile("File is not a zip file"), "damaged.*BadZipFile"),
        (OSError(errno.ENOSPC, "No space left on device"), "no room left"),
        (PermissionError(errno.EACCES, "Permission denied", "/nowhere"), "/nowhere cannot be read or written"),
        (UserError("a\nname \x1b[31m and \u202e"), "a name "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_that_are_no_defect_are_one_sentence(monkeypatch, capsys, error, message):
    def fail(argv):
        raise error

    monkeypatch.setattr(cli, "table", fail)
    assert cli.main(["table"]) == 2
    shown = capsys.readouterr().err
    assert re.fullmatch(r"Error: [^\n]+\n", shown) and shown[:-1].isprintable() and re.search(message, shown)


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail(argv):
        raise KeyError("x")

    monkeypatch.setattr(cli, "table", fail)
    with pytest.raises(KeyError):
        cli.main(["table"])


HOSTILE_TEXT = st.text(alphabet="a\x1b\x07\n\r\u202e\u2028\ud800", max_size=300)


@given(st.text(max_size=300) | HOSTILE_TEXT, st.integers(3, 200) | st.none())
def test_printable_text_is_one_line_without_effect(text, limit):
    shown = printable(text, limit)
    assert shown.isprintable() and printable(shown, limit) == shown
    assert limit is None or len(shown) <= limit
    if text.isprintable() and (limit is None or len(text) <= limit):
        assert shown == text


def test_the_script_of_the_readme(chain_data):
    """In a process of its own: exit code, and the sentence on standard error."""
    command = [sys.executable, str(ROOT / "run_recbole_llm.py"), "--model=Nobody", "--dataset=chain"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"Error: .*Nobody.*\n", done.stderr)


# Interruptions


@pytest.mark.slow
def test_a_signal_ends_with_a_sentence_and_keeps_what_was_trained(chain_data):
    """In a process of its own, by SIGTERM: Ctrl-C and the others take the same way (above)."""
    arguments = command_of(chain_data, "--epochs=10000", "--stopping_step=10000", models="SASRec,LLMSRec")[1:]
    command = [sys.executable, str(ROOT / "run_recbole_llm.py"), *arguments]
    with open("err.txt", "w") as error:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=error,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            deadline = time.time() + 120
            while not list(Path("saved").glob("LLMSRec-*/resume/state.json")):
                assert process.poll() is None and time.time() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 2
        finally:
            process.kill()
    text = Path("err.txt").read_text()
    assert "Interrupted" in text and "--resume=True" in text and "Traceback" not in text
    assert list(Path("saved").glob("SASRec-*/recbole_llm.json")) and not list(Path("saved").rglob("*.tmp"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_out_of_memory_says_which_key_to_lower(chain_data, monkeypatch, capsys, error):
    def full(self, interaction):
        raise error

    monkeypatch.setattr("recbole_llm.model.llmsrec.LLMSRec.calculate_loss", full)
    assert run(chain_data) == 2
    assert re.search("Error: out of memory.*micro_batch_tokens", capsys.readouterr().err)


# Recommending


def test_recommend_for_a_user_and_for_titles(trained, tmp_path, capsys):
    checkpoint = f"--checkpoint={trained['LLMSRec']}"
    assert cli.main(["recommend", checkpoint, "--user=u1", "--topk=3"]) == 0
    out = capsys.readouterr().out
    model = recommend.load(trained["LLMSRec"])
    titles, (best,) = model.history_of("u1"), model.recommend(users="u1", topk=3)
    assert [len(best), len(re.findall(r"^ +\d+ ", out, re.M))] == [3, 3] and best[0].title in out
    assert cli.main(["recommend", checkpoint, f"--history=[{', '.join(titles[-3:])}]", "--format=json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["rank"] for record in records] == list(range(1, 11)) and records[0]["query"] == 0

    users, other = tmp_path / "users.txt", tmp_path / "sales.csv"
    users.write_text("u1\n\nu7\n")
    other.write_text("day,sales\n1,2\n")
    assert cli.main(["recommend", checkpoint, "--user=u1", f"--output={other}"]) == 2
    assert "holds something else than recommendations" in capsys.readouterr().err and other.read_text().startswith("day")
    for kind, read in (("parquet", polars.read_parquet), ("csv", polars.read_csv), ("json", polars.read_json)):
        file = tmp_path / f"out.{kind}"
        for _ in range(2):  # earlier recommendations are replaced
            assert cli.main(["recommend", checkpoint, f"--users={users}", "--topk=3", f"--output={file}"]) == 0
        table = read(file)
        assert table["user"].to_list() == ["u1"] * 3 + ["u7"] * 3
        assert table["title"][:3].to_list() == [item.title for item in best]


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def foreign(folder):
    (folder / "recbole_llm.json").write_text('{"architectures": ["LlamaForCausalLM"]}')


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (nothing, ["--user=u1", "--history=[a]"], "either"),
        (nothing, [], "either"),
        (nothing, ["--user=nobody"], "nobody"),
        (nothing, ["--history=[No such title]"], "No such title"),
        (nothing, ["--user=u1", "--topk=0"], "topk"),
        (nothing, ["--user=u1", "--topk=many"], "topk"),
        (nothing, ["--usr=u1"], "did you mean --user"),
        (nothing, ["--user=u1", "--format=xml"], "format"),
        (nothing, ["--user=u1", "--output=best.xls"], "must end in .parquet, .csv or .json"),
        (nothing, ["--user=u1", "--output=/dev/null/best.csv"], "cannot be written in /dev/null"),
        (nothing, ["--users=no-such-file"], "no-such-file cannot be read"),
        (truncated, ["--user=u1"], "truncated"),
        (foreign, ["--user=u1"], "not a checkpoint"),
        (shutil.rmtree, ["--user=u1"], "does not exist"),
    ],
)
def test_recommend_mistakes(trained, tmp_path, capsys, damage, arguments, message):
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained["LLMSRec"], folder)
    damage(folder)
    assert cli.main(["recommend", f"--checkpoint={folder}", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"Error: [^\n]+\n", error) and re.search(message, error)


def test_a_teacher_of_other_data_is_refused(trained, chain, capsys):
    edit(chain / "chain.inter", lambda lines: lines.__delitem__(slice(10, 40)))
    assert run(chain.parent, f"--teacher_checkpoint={trained['SASRec']}") == 2
    assert re.search("Error: .*other data", capsys.readouterr().err)
