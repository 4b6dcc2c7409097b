"""A checkpoint's record may come from anyone: what it may say, and what is refused or not taken from it."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recbole_llm import cli, loading, recommend, registry
from recbole_llm.config.schema import known_keys
from recbole_llm.config.settings import make_config
from recbole_llm.errors import UserError
from recbole_llm.files import replace_file

CODE = "__import__('pathlib').Path({canary!r}).touch()"


@pytest.fixture
def canary(tmp_path):
    """A file that code from a record would make."""
    return tmp_path / "code-has-run"


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def pickled(tmp_path, canary):
    """A file that makes the canary when it is unpickled."""
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": Touch(canary)}, file)
    return file


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the trained LLM recommender beside a copy of its teacher: {"LLMSRec": folder, "SASRec": folder}."""
    folders = {name: tmp_path / "downloaded" / folder.name for name, folder in trained.items()}
    for name, folder in folders.items():
        shutil.copytree(trained[name], folder)
    return folders


def ids_of(found):
    return [[item.item for item in best] for best in found]


def edit(folder: Path, **changes) -> None:
    """Change a record; ``settings`` and ``teacher`` are merged into what is there, a value of None removes nothing."""
    file = folder / "recbole_llm.json"
    record = json.loads(file.read_text())
    for key, value in changes.items():
        merges = key in ("settings", "teacher") and isinstance(value, dict) and isinstance(record.get(key), dict)
        record[key] = {**record[key], **value} if merges else value
    file.write_text(json.dumps(record))


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(folder: Path, capsys, *arguments: str) -> str:
    """The one sentence with which ``recommend`` refuses a checkpoint, without writing anything."""
    before = files_below(folder.parent), files_below(Path.cwd())
    assert cli.main(["recommend", f"--checkpoint={folder}", "--user=u1", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"Error: [^\n]+\n", error) and error.rstrip("\n").isprintable(), error
    assert (files_below(folder.parent), files_below(Path.cwd())) == before
    return error


def test_a_copy_is_loaded_with_the_teacher_beside_it(copied, trained, monkeypatch):
    expected = recommend.load(trained["LLMSRec"]).recommend(users="u1", topk=3)
    moved = [shutil.move(folder, f"{folder}.away") for folder in trained.values()]
    try:
        assert ids_of(recommend.load(copied["LLMSRec"]).recommend(users="u1", topk=3)) == ids_of(expected)
    finally:
        for folder in moved:
            shutil.move(folder, folder.removesuffix(".away"))


def test_nothing_is_written_where_a_model_is_loaded_from(copied, tmp_path):
    before = files_below(tmp_path)
    recommend.load(copied["LLMSRec"])
    assert files_below(tmp_path) == before


# --- what a record may name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "KD_DAGFM", "settings": {"teacher": CODE}}, "KD_DAGFM.*no LLM recommender"),
        ({"model": "SASRec"}, "SASRec.*no LLM recommender"),
        ({"model": "Nobody\x1b[2J"}, "Nobody.*no LLM recommender"),
        ({"model": ["LLMSRec"]}, "not a checkpoint"),
        ({"model": "LLMSTAR"}, "does not fit|has model|does not know"),
        ({"kind": "stock"}, "no sequential or general recommender"),
        ({"kind": "foundation"}, "pre-trained LLM"),
        ({"kind": {"llm": 1}}, "no LLM recommender"),
        ({"dataset": "../../chain"}, "plain name"),
        ({"dataset": None}, "plain name"),
        ({"settings": None}, "damaged.*settings"),
        ({"fingerprint": 7}, "damaged.*fingerprint"),
        ({"fingerprint": "0" * 64}, "other data"),
        ({"teacher": "SASRec"}, "damaged.*teacher"),
        ({"teacher": {"folder": 3}}, "damaged.*teacher"),
        ({"foundation": {"folder": "x"}}, "damaged.*foundation"),
        ({"settings": {"no_such_key": 1}}, "no_such_key.*does not know"),
        ({"settings": {"train_negatives": "many"}}, "train_negatives must be"),
        ({"settings": {"train_negatives": 0}}, "train_negatives must be"),
        ({"settings": {"seed": CODE}}, "seed must be"),
        ({"settings": {"USER_ID_FIELD": []}}, "USER_ID_FIELD must be"),
        ({"settings": {"teacher": "KD_DAGFM", "teacher_settings": {"teacher": CODE}}}, "KD_DAGFM"),
        ({"settings": {"teacher_settings": {"hidden_size": CODE}}}, "hidden_size must be"),
        ({"settings": {"teacher_settings": {"no_such_key": 1}}}, "no_such_key.*SASRec does not know"),
        ({"settings": {"teacher_settings": [1]}}, "teacher_settings"),
        ({"settings": {"teacher": CODE, "teacher_settings": {"epochs": 1}}}, "teacher"),
        ({"settings": {"endpoint_url": "http://localhost:9"}}, "endpoint_url"),
    ],
)
def test_a_record_that_asks_for_more_is_refused_in_one_sentence(copied, canary, capsys, changes, message):
    code = json.dumps(CODE.format(canary=str(canary)))
    edit(copied["LLMSRec"], **json.loads(json.dumps(changes).replace(json.dumps(CODE), code)))
    assert re.search(message, refusal(copied["LLMSRec"], capsys))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "KD_DAGFM", "given": {"teacher": CODE}}, "no sequential or general recommender"),
        ({"model": "FM"}, "no sequential or general recommender"),
        ({"model": "Pop"}, "keeps no weights"),
        ({"model": CODE}, "no sequential or general recommender"),
        ({"model": "S3Rec", "given": {"pre_model_path": "weights.pth"}}, "pre_model_path, which would be unpickled"),
        ({"given": {"hidden_size": CODE}}, "hidden_size must be"),
        ({"given": {"no_such_key": 1}}, "no_such_key.*does not know"),
        ({"given": None}, "train it again"),
        ({"dataset": "../../chain"}, "plain name"),
        ({"fingerprint": "0" * 64}, "other data"),
    ],
)
def test_a_stock_record_that_asks_for_more_is_refused_in_one_sentence(copied, canary, capsys, changes, message):
    code = json.dumps(CODE.format(canary=str(canary)))
    edit(copied["SASRec"], **json.loads(json.dumps(changes).replace(json.dumps(CODE), code)))
    assert re.search(message, refusal(copied["SASRec"], capsys)) and not canary.exists()


@pytest.mark.slow
def test_no_string_of_a_record_is_evaluated(chain_data, canary):
    """The same code for every setting: it stays a text or is refused, whether or not its type is checked first."""
    code, given = CODE.format(canary=str(canary)), {"data_path": str(chain_data), "use_gpu": False}
    as_text = 0
    for name in known_keys("LLMSRec"):
        for values in ({name: code}, {"teacher_settings": {name: code}}):
            with contextlib.suppress(UserError):
                loading.recorded_settings(values, "LLMSRec", Path("folder"))
            # RecBole's own checks raise all sorts of errors for a text in the wrong place.
            with contextlib.suppress(Exception):
                as_text += make_config("LLMSRec", "chain", config_dict={**given, **values})[name] == code
            assert not canary.exists(), name
    assert as_text > 20


@pytest.mark.parametrize("model", ["S3Rec", "SASRec"])
@pytest.mark.parametrize(
    "key", ["pre_model_path", "mf_pretrain_path", "mlp_pretrain_path", "pretrain_path", "warm_up"]
)
def test_no_file_that_a_record_names_is_unpickled(copied, canary, pickled, capsys, model, key):
    settings = {"train_stage": "finetune", "item_attribute": "title"} if model == "S3Rec" else {}
    settings = {"teacher": model, "teacher_settings": {**settings, key: str(pickled)}, "trust_files": True}
    edit(copied["LLMSRec"], settings=settings)
    assert f"{key}, which would be unpickled" in refusal(copied["LLMSRec"], capsys)
    assert not canary.exists()


def test_files_and_folders_of_a_record_are_not_used(copied, tmp_path, canary):
    """All that would be read or written elsewhere is dropped, for the teacher as well."""
    expected = recommend.load(copied["LLMSRec"]).recommend(users="u1", topk=3)
    elsewhere = tmp_path / "elsewhere"
    paths = {
        name: str(elsewhere / name)
        for name in ("checkpoint_dir", "dataset_save_path", "dataloaders_save_path", "results_file", "per_user_file",
                     "endpoint_answers", "head", "teacher_checkpoint", "config_file")
        if name in known_keys("LLMSRec")
    }  # fmt: skip
    assert len(paths) >= 7
    machine = {"nproc": 4, "world_size": 4, "ip": "localhost", "port": "1", "local_rank": 0, "save_dataset": True}
    more = {**paths, **machine, "save_dataloaders": True, "log_wandb": True, "trust_files": True, "worker": 7}
    kept = json.loads((copied["LLMSRec"] / "recbole_llm.json").read_text())["settings"]["teacher_settings"]
    edit(copied["LLMSRec"], settings={**more, "teacher_settings": {**kept, **more}})
    config = recommend.load(copied["LLMSRec"]).config
    assert not config["trust_files"] and config["world_size"] is None and config["worker"] == 0
    assert config["checkpoint_dir"] == str(copied["LLMSRec"].parent)
    again = recommend.load(copied["LLMSRec"]).recommend(users="u1", topk=3)
    assert not elsewhere.exists() and ids_of(again) == ids_of(expected)


# --- data ---------------------------------------------------------------------------------------------------------------


def test_data_that_moved_are_found_by_data_path(copied, chain_data, tmp_path, capsys):
    edit(copied["LLMSRec"], settings={"data_path": str(tmp_path / "gone")})
    assert "data_path" in refusal(copied["LLMSRec"], capsys)
    assert not (tmp_path / "gone").exists()
    command = ["recommend", f"--checkpoint={copied['LLMSRec']}", "--user=u1", f"--data_path={chain_data}"]
    assert cli.main(command) == 0
    (tmp_path / "dataset").symlink_to(chain_data)  # where data lie that nobody names
    assert cli.main(command[:-1]) == 0


def test_the_data_are_checked_before_any_weight_is_read(copied, monkeypatch, capsys):
    edit(copied["LLMSRec"], fingerprint="0" * 64)
    monkeypatch.setattr("recbole_llm.checkpoint.load_file", lambda *args, **kwargs: pytest.fail("weights were read"))
    assert "other data" in refusal(copied["LLMSRec"], capsys)


def test_titles_that_changed_under_a_checkpoint_are_other_data(copied, chain_data, tmp_path, capsys):
    shutil.copytree(chain_data, tmp_path / "data")
    file = tmp_path / "data" / "chain" / "chain.item"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], f"{lines[-1]} II"]) + "\n")
    assert "other data" in refusal(copied["LLMSRec"], capsys, f"--data_path={tmp_path / 'data'}")


# --- teachers -----------------------------------------------------------------------------------------------------------


def test_loading_trains_nothing(copied, trained, capsys, monkeypatch):
    monkeypatch.setattr("recbole.trainer.Trainer.fit", lambda *args, **kwargs: pytest.fail("something was trained"))
    shutil.rmtree(copied["SASRec"])
    edit(copied["LLMSRec"], teacher={"folder": "saved/gone"})
    assert "teacher_checkpoint" in refusal(copied["LLMSRec"], capsys)
    edit(copied["LLMSRec"], teacher=None)
    assert "teacher_checkpoint" in refusal(copied["LLMSRec"], capsys)
    command = ["recommend", f"--checkpoint={copied['LLMSRec']}", "--user=u1"]
    record = json.loads((trained["LLMSRec"] / "recbole_llm.json").read_text())
    edit(copied["LLMSRec"], teacher={**record["teacher"], "folder": "saved/gone"})
    assert cli.main([*command, f"--teacher_checkpoint={trained['SASRec']}"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "llm"}, "no stock model"),
        ({"model": "GRU4Rec"}, "has model"),
        ({"fingerprint": "0" * 64}, "other data"),
        ({"valid_result": "\x1b[2J"}, "damaged"),
        ({"valid_result": {"hit@5": "\x1b[2J"}}, "damaged"),
        ({"train_seconds": None}, "damaged"),
    ],
)
def test_a_teacher_with_an_odd_record_is_refused(copied, capsys, changes, message):
    edit(copied["SASRec"], **changes)
    assert re.search(message, refusal(copied["LLMSRec"], capsys))


def test_settings_in_a_teachers_record_are_not_used(copied, canary):
    expected = recommend.load(copied["LLMSRec"]).recommend(users="u1", topk=3)
    edit(copied["SASRec"], settings={"hidden_size": CODE.format(canary=str(canary)), "pre_model_path": str(canary)})
    again = recommend.load(copied["LLMSRec"]).recommend(users="u1", topk=3)
    assert ids_of(again) == ids_of(expected) and not canary.exists()


def test_weights_that_are_pickles_are_not_read(copied, canary, capsys):
    (copied["LLMSRec"] / "model.safetensors").write_bytes(pickle.dumps(Touch(canary)))
    assert "truncated or no safetensors file" in refusal(copied["LLMSRec"], capsys)
    assert not canary.exists()


def test_a_record_that_is_nested_without_end_is_refused(copied, capsys):
    (copied["LLMSRec"] / "recbole_llm.json").write_text('{"a":' * 100_000)
    assert "truncated" in refusal(copied["LLMSRec"], capsys)


def test_other_weights_are_refused(copied, capsys):
    file = copied["LLMSRec"] / "model.safetensors"
    weights = {name: torch.zeros(2) for name in load_file(file)}
    replace_file(file, lambda temporary: save_file(weights, str(temporary)))
    assert "does not fit" in refusal(copied["LLMSRec"], capsys)


# --- files that the user names ------------------------------------------------------------------------------------------

STOCK = ["run", "--model=S3Rec", "--dataset=chain", "--train_stage=finetune", "--item_attribute=title", "--use_gpu=False",
         "--load_col={inter: [user_id, item_id, timestamp], item: [item_id, title]}", "--eval_args={mode: uni9}",
         "--topk=[1,5]", "--valid_metric=Hit@5"]  # fmt: skip


def test_a_file_that_would_be_unpickled_needs_trust(chain_data, canary, pickled, capsys):
    command = [*STOCK, f"--data_path={chain_data}", f"--pre_model_path={pickled}"]
    assert cli.main(command) == 2
    assert re.search("Error: pre_model_path: .*unpickled.*trust_files", capsys.readouterr().err)
    of_teacher = {"teacher": "S3Rec", "data_path": str(chain_data), "teacher_settings": {"pre_model_path": str(pickled)}}
    with pytest.raises(UserError, match="teacher_settings: pre_model_path: .*trust_files"):
        make_config("LLMSRec", "chain", config_dict=of_teacher)
    assert not canary.exists()
    # Vouched for, it is read as RecBole does; what is in it is no model.
    assert cli.main([*command, "--trust_files=True"]) == 2
    assert re.search("S3Rec +FAILED: .*(state_dict|NoneType|keys)", capsys.readouterr().out)
    assert canary.exists()
    assert make_config("LLMSRec", "chain", config_dict={**of_teacher, "trust_files": True})["trust_files"] is True


def test_kd_dagfm_is_given_a_name_and_no_code(chain_data, canary):
    settings = {"data_path": str(chain_data), "protocol": "retrieval", "teacher": CODE.format(canary=str(canary))}
    with pytest.raises(UserError, match="teacher: "):
        make_config("KD_DAGFM", "chain", config_dict=settings)
    assert not canary.exists()


def test_models_of_other_packages_are_loaded_by_their_record(copied, monkeypatch, capsys):
    """A registered model is one, whoever wrote it; without its package it is a sentence."""
    monkeypatch.setitem(registry.MODELS, "Outside", registry.MODELS["LLMSRec"])
    edit(copied["LLMSRec"], model="Outside")
    config = recommend.load(copied["LLMSRec"]).config
    assert config["model"] == "Outside"
    monkeypatch.delitem(registry.MODELS, "Outside")
    assert "Outside" in refusal(copied["LLMSRec"], capsys)
