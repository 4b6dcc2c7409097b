"""An export recommends what its run does, without the run's data; what is in it is not trusted."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from recbole_llm import cli, exported
from recbole_llm.errors import UserError
from recbole_llm.quick_start import compare
from recbole_llm.recommend import load
from recbole_llm.serving.export import export
from recbole_llm.serving.service import Service
from recbole_llm.serving.vectors import vectors_of

MODELS = ("LLMSRec", "SASRec")


@pytest.fixture(scope="session")
def exports(trained, tmp_path_factory):
    """Exports of the two trained models, one of them with users: name -> folder."""
    folder = tmp_path_factory.mktemp("exports")
    for name in MODELS:
        export(trained[name], folder / name, with_users=name == "LLMSRec")
    return {name: folder / name for name in MODELS}


@pytest.fixture
def copied(exports, tmp_path):
    return {name: Path(shutil.copytree(folder, tmp_path / f"copy-{name}")) for name, folder in exports.items()}


def assert_same(found, expected):
    for best, wanted in zip(found, expected, strict=True):
        assert [item[:2] for item in best] == [item[:2] for item in wanted]
        assert [item.score for item in best] == pytest.approx([item.score for item in wanted], rel=1e-4)


def histories_of(run):
    return [run.history_of(user) for user in ("u1", "u9", "u30")]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_answers_without_the_data(trained, copied, name, chain_data):
    run = load(trained[name])
    histories = histories_of(run)
    expected = run.recommend(histories=histories, topk=6)
    moved = [shutil.move(folder, f"{folder}.away") for folder in (chain_data, *trained.values())]
    try:
        alone = load(copied[name])
        assert_same(alone.recommend(histories=histories, topk=6), expected)
        if name == "LLMSRec":
            assert alone.model.item_table.encoded == 0, "no item was encoded again"
        service = Service(alone)
        asked = [service.query(history=history, topk=6) for history in histories]
        assert_same([answer.items for answer in service.answer(asked)], expected)
    finally:
        for folder in moved:
            shutil.move(folder, folder.removesuffix(".away"))


def test_users_are_there_where_they_were_asked_for(trained, exports):
    run, alone = load(trained["LLMSRec"]), load(exports["LLMSRec"])
    assert alone.history_of("u7") == run.history_of("u7")
    assert_same(alone.recommend(users=["u1", "u7"], topk=4), run.recommend(users=["u1", "u7"], topk=4))
    without = load(exports["SASRec"])
    with pytest.raises(UserError, match="holds no users.*--with_users=True"):
        without.recommend(users="u1")
    with pytest.raises(UserError, match="holds no users"):
        Service(without).query(user="u1")
    assert not (exports["SASRec"] / "users.parquet").exists()


def test_scores_are_products_of_the_vectors_in_it(trained, exports):
    run = load(trained["LLMSRec"])
    vectors = load_file(exports["LLMSRec"] / "item_vectors.safetensors")
    table = pl.read_parquet(exports["LLMSRec"] / "items.parquet")
    rows = run.rows([run.sequence_of_user(run.user_number("u5"))], torch.zeros(1, dtype=torch.long))
    scores = (vectors_of(run).encode(rows) @ vectors["items"].T)[0]
    (best,) = run.recommend(users="u5", filter=None, topk=3)
    assert [table["item"][int(row) - 1] for row in scores[1:].topk(3).indices + 1] == [item.item for item in best]
    assert table["title"].to_list() == run.dataset.item_texts[1:] and not vectors["items"][0].any()
    assert vectors["sample"].shape == (60, 8)


def test_it_names_nothing_of_this_machine(exports, trained):
    for folder in exports.values():
        for file in [*folder.rglob("*.json"), *folder.rglob("*.md")]:
            text = file.read_text()
            assert str(trained["SASRec"].parent.parent) not in text and "/tmp" not in text, file
    assert "sha256" in (exports["LLMSRec"] / "README.md").read_text()


def test_recommend_reads_an_export(exports, capsys):
    assert cli.main(["recommend", f"--checkpoint={exports['LLMSRec']}", "--user=u1", "--topk=3", "--format=json"]) == 0
    assert [row["rank"] for row in json.loads(capsys.readouterr().out)] == [1, 2, 3]


# --- the LLM's copy -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_copy_of_the_llm_is_read_in_its_place(untied_backbone, tiny_settings, chain_data, tmp_path):
    """So are settings that lay beside the data set's files."""
    llm = shutil.copytree(untied_backbone[0], tmp_path / "llm-of-mine")
    data = shutil.copytree(chain_data, tmp_path / "data")
    (data / "chain" / "chain.yaml").write_text("history_length: 3\n")
    keys = ("item_projection_hidden_size", "head_hidden_size", "representation_size", "teacher_settings", "learning_rate")
    settings = {name: value for name, value in tiny_settings.items() if name not in keys}
    (row,) = compare(["LLMRec"], "chain", settings={**settings, "data_path": str(data), "backbone": str(llm), "epochs": 1})
    run = load(row["checkpoint"])
    history = run.history_of("u1")
    expected = run.recommend(histories=[history], topk=4)
    export(row["checkpoint"], tmp_path / "named")
    export(row["checkpoint"], tmp_path / "whole", with_backbone=True)
    assert_same(load(tmp_path / "named").recommend(histories=[history], topk=4), expected)
    llm.rename(tmp_path / "elsewhere")
    shutil.rmtree(data)
    whole = load(tmp_path / "whole")
    assert_same(whole.recommend(histories=[history], topk=4), expected)
    assert whole.config["history_length"] == 3
    with pytest.raises(UserError, match="llm-of-mine"):
        load(tmp_path / "named")
    weights = next((tmp_path / "whole" / "llm").glob("*.safetensors"))
    tensors = load_file(weights)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] + 1}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not the LLM that was copied"):
        load(tmp_path / "whole")


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name the folder of a run"),
        (["RUN"], "name the folder to write"),
        (["RUN", "--output=RUN"], "lie in each other"),
        (["RUN", "--output=RUN/export"], "lie in each other"),
        (["RUN", "--output=file"], "is a file or a link"),
        (["RUN", "--output=full"], "holds something else"),
        (["RUN", "--output=new", "--with_backbone=True"], "tiny LLM is made from its seed"),
        (["RUN", "--output=new", "--with_users=many"], "with_users is 'many'"),
        (["RUN", "--output=new", "--with_user=True"], "did you mean --with_users"),
        (["nowhere", "--output=new"], "nowhere.recbole_llm.json does not exist"),
        (["EXPORT", "--output=new"], "is an export"),
    ],
)
def test_mistakes_write_nothing(trained, exports, tmp_path, capsys, arguments, sentence):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    before = sorted(tmp_path.rglob("*")), sorted(trained["LLMSRec"].parent.rglob("*"))
    places = {"RUN": str(trained["LLMSRec"]), "EXPORT": str(exports["LLMSRec"])}
    words = [re.sub("RUN|EXPORT", lambda match: places[match[0]], word) for word in arguments]
    assert cli.main(["export", *words]) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert (sorted(tmp_path.rglob("*")), sorted(trained["LLMSRec"].parent.rglob("*"))) == before


def test_an_export_is_replaced_and_one_that_fails_leaves_the_old(trained, copied, monkeypatch, tmp_path):
    folder = copied["SASRec"]
    (folder / "README.md").write_text("old")

    def differs(*given):
        raise UserError("other scores")

    monkeypatch.setattr("recbole_llm.serving.export._check_same", differs)
    with pytest.raises(UserError, match="other scores"):
        export(trained["SASRec"], folder)
    assert (folder / "README.md").read_text() == "old" and not list(tmp_path.glob("*.part"))
    monkeypatch.undo()
    export(trained["SASRec"], folder)
    assert "SASRec on chain" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_a_model_without_a_product_of_vectors_is_refused(tiny_settings, tmp_path):
    keys = ("data_path", "checkpoint_dir", "topk", "valid_metric", "eval_args", "use_gpu")
    settings = {**{key: tiny_settings[key] for key in keys}, "epochs": 1, "show_progress": False}
    rows = compare(["BPR", "BERT4Rec", "GRU4Rec", "Caser"], "chain", settings=settings)
    folders = {row["model"]: row["checkpoint"] for row in rows}
    for name in ("BPR", "BERT4Rec"):
        with pytest.raises(UserError, match=f"{name} does not score by a product"):
            export(folders[name], tmp_path / name)
    with pytest.raises(UserError, match="Caser (does not score|needs the interactions)"):
        export(folders["Caser"], tmp_path / "Caser")
    assert "40 items" in export(folders["GRU4Rec"], tmp_path / "GRU4Rec")
    assert not (tmp_path / "BPR").exists()


def edited(folder, file=exported.MANIFEST, **changes):
    """Change a JSON file of an export, and the digest of it that the manifest has."""
    path = folder / file
    record = json.loads(path.read_text())
    for key, value in changes.items():
        merges = key in ("settings", "times", "dataset_settings") and isinstance(value, dict)
        record[key] = {**record[key], **value} if merges else value
    path.write_text(json.dumps(record))
    signed(folder)


def signed(folder):
    """Let the manifest name the files as they are: whoever changes an export can do so, too."""
    path = folder / exported.MANIFEST
    manifest = json.loads(path.read_text())
    if not isinstance(manifest.get("files"), dict):
        return
    manifest["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in manifest["files"]}
    path.write_text(json.dumps(manifest))


CODE = "__import__('pathlib').Path('code-has-run').touch()"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (exported.MANIFEST, {"format": "other"}, "not of an export"),
        (exported.MANIFEST, {"version": 2}, "newer version"),
        (exported.MANIFEST, {"model": CODE}, "names another model"),
        (exported.MANIFEST, {"dataset": "../../data"}, "damaged.*dataset"),
        (exported.MANIFEST, {"kind": "foundation"}, "damaged.*kind"),
        (exported.MANIFEST, {"kind": "stock"}, "no model of RecBole"),
        (exported.MANIFEST, {"items": 41}, "40|41 different ids"),
        (exported.MANIFEST, {"items": -1}, "damaged.*items"),
        (exported.MANIFEST, {"size": 9}, "vectors of 40 items, 9 wide"),
        (exported.MANIFEST, {"times": {"scale": CODE}}, "damaged.*times"),
        (exported.MANIFEST, {"times": {"more": 1}}, "damaged.*times"),
        (exported.MANIFEST, {"fingerprints": {}}, "damaged.*fingerprints"),
        (exported.MANIFEST, {"files": []}, "damaged.*files"),
        (exported.MANIFEST, {"files": {}}, "not the file that export.json names"),
        (exported.MANIFEST, {"llm_copy": {"file": "../x.gguf", "sha256": ""}}, "names no .gguf"),
        (exported.MANIFEST, {"llm_copy": {"file": None, "sha256": "0"}}, "not the LLM that was copied"),
        (exported.MANIFEST, {"dataset_settings": {"pre_model_path": "x"}}, "unpickled"),
        (exported.MANIFEST, {"dataset_settings": {"history_length": CODE}}, "history_length must be"),
        ("model/recbole_llm.json", {"model": "SASRec"}, "no LLM recommender"),
        ("model/recbole_llm.json", {"kind": "stock"}, "no LLM recommender"),
        ("model/recbole_llm.json", {"settings": {"no_such_key": 1}}, "does not know"),
        ("model/recbole_llm.json", {"settings": {"seed": CODE}}, "seed must be"),
        ("model/recbole_llm.json", {"settings": {"endpoint_url": "http://localhost:9"}}, "does not know"),
        ("model/recbole_llm.json", {"fingerprint": "0" * 64}, "other data"),
        ("model/recbole_llm.json", {"teacher": {"folder": "/", "vectors": "0"}}, "another teacher"),
        ("teacher/recbole_llm.json", {"model": "GRU4Rec"}, "has model"),
        ("teacher/recbole_llm.json", {"valid_result": CODE}, "damaged"),
    ],
)
def test_what_an_export_may_not_say_is_one_sentence(copied, file, changes, message, capsys):
    edited(copied["LLMSRec"], file, **changes)
    assert cli.main(["recommend", f"--checkpoint={copied['LLMSRec']}", "--user=u1"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and re.fullmatch(r"Error: [^\n]+\n", error) and error.rstrip("\n").isprintable(), error
    assert not Path("code-has-run").exists()


def test_files_that_are_others_are_refused_before_they_are_read(copied, monkeypatch):
    for name in exported.FILES:
        file = copied["LLMSRec"] / name
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        with monkeypatch.context() as patch:
            for reader in ("polars.read_parquet", "recbole_llm.checkpoint.load_file"):
                patch.setattr(reader, lambda *given, **more: pytest.fail("it was read"))
            with pytest.raises(UserError, match="not the file that export.json names"):
                load(copied["LLMSRec"])
        file.write_bytes(content)
    load(copied["LLMSRec"])


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("items.parquet", {"item": ["1"] * 40, "title": ["x"] * 40}, "different ids"),
        ("items.parquet", {"item": [None, *map(str, range(39))], "title": ["x"] * 40}, "without gaps"),
        ("items.parquet", {"item": list(range(40)), "title": ["x"] * 40}, "its columns"),
        ("users.parquet", {"user": ["u"], "items": [[41]], "times": [[1.0]]}, "items of the catalog"),
        ("users.parquet", {"user": ["u"], "items": [[1, 2]], "times": [[1.0]]}, "items of the catalog"),
        ("users.parquet", {"user": ["u"], "items": [[1]], "times": [[float("nan")]]}, "items of the catalog"),
    ],
)
def test_tables_are_checked(copied, name, table, message):
    pl.DataFrame(table).write_parquet(copied["LLMSRec"] / name)
    signed(copied["LLMSRec"])
    with pytest.raises(UserError, match=message):
        load(copied["LLMSRec"])


@pytest.mark.parametrize("name", ["item_vectors.safetensors", "items.parquet", "model/model.safetensors"])
def test_nothing_is_unpickled(copied, name):
    class Touch:
        def __reduce__(self):
            return Path.touch, (Path("code-has-run"),)

    (copied["LLMSRec"] / name).write_bytes(pickle.dumps(Touch()))
    signed(copied["LLMSRec"])
    with pytest.raises(UserError):
        load(copied["LLMSRec"])
    assert not Path("code-has-run").exists()


def test_titles_are_those_of_the_export(copied):
    """Another title is another prompt: vectors and titles belong together by the manifest's digests."""
    table = pl.read_parquet(copied["LLMSRec"] / "items.parquet")
    table.with_columns(title=pl.lit("\x1b[2J<script>")).write_parquet(copied["LLMSRec"] / "items.parquet")
    with pytest.raises(UserError, match="not the file"):
        load(copied["LLMSRec"])


def test_of_settings_beside_the_data_those_are_taken_that_a_model_has(tmp_path):
    beside = {"history_length": 7, "prompt_sentence": "Seen:", "unheard": 1, "data_path": "/", "checkpoint_dir": "/"}
    taken = exported._dataset_settings(beside, ["LLMSRec", "SASRec"], tmp_path)
    assert taken == {"history_length": 7, "prompt_sentence": "Seen:"}
