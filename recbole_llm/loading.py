"""Load a trained model from its folder, whoever made it: a record is checked, nothing is trained, unpickled or evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole.config import Config
from recbole.utils import ModelType, get_model, init_seed

from recbole_llm import checkpoint, registry
from recbole_llm.config.checks import ENDPOINT, UNPICKLED, fitted, stock_class
from recbole_llm.config.schema import is_file_name, known_keys
from recbole_llm.config.settings import make_config
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.loaders import dataloaders
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError, first_line
from recbole_llm.teacher import stock
from recbole_llm.trainer.checkpoint import load_trained_weights

# Settings that a record does not decide: what is read and written where, on which machine, by whom, and what is trusted.
NOT_FROM_A_RECORD = frozenset(
    "model dataset data_path checkpoint_dir results_file per_user_file candidates_file resume teacher_checkpoint pretrained "
    "pretrain_datasets pretrain_settings head trust_files endpoint_answers save_dataset dataset_save_path save_dataloaders "
    "dataloaders_save_path "
    "benchmark_filename additional_feat_suffix log_wandb wandb_project log_mlflow mlflow_experiment "
    "config_file config_files config_file_list nproc "
    "world_size ip port offset group_offset local_rank single_spec device gpu_id worker state show_progress verbose "
    "MODEL_TYPE MODEL_INPUT_TYPE eval_type".split()
)


def load_data_and_model(
    model_file: str | Path, given: Mapping[str, Any] | None = None
) -> tuple[Config, Any, TextSequentialDataset, Any, Any, Any]:
    """Load a trained model with its data; the same six things as RecBole's ``load_data_and_model``.

    The record in the folder may come from somebody else and is not trusted. It may name a registered LLM recommender, or a
    sequential or general recommender of RecBole, a dataset by its plain name, and values for settings that this model has,
    which are checked by type and never evaluated. Nothing is trained or written on its word, and what it says of files holds
    for reading alone:

    - the dataset is read from ``data_path/<dataset>``, the record's ``data_path`` where such a dataset lies there, else the
      default one;
    - the teacher, and the LLM that was pre-trained for ST2SI, are read from the folder of the recorded name beside the
      checkpoint, else from the recorded folder: checkpoints of this library, in safetensors;
    - the LLM is the recorded ``backbone``: safetensors or GGUF, without code;
    - an endpoint is asked only where the caller names it.

    Args:
        model_file: a checkpoint folder of this library, or the weights file in it.
        given: settings in place of the record's, of :data:`recbole_llm.config.checks.GIVEN`.

    Raises:
        UserError: no checkpoint, a truncated or foreign one, a record that asks for more than the above, data that is no longer
            the same, or a teacher that is missing.
    """
    folder = checkpoint.folder_of(model_file)
    given = dict(given or {})
    if checkpoint.read_record(folder).get("kind") == "stock":
        return _load_stock(folder, given)
    record = checked_record(folder)
    model_name, dataset = record["model"], record["dataset"]
    settings = recorded_settings(record["settings"], model_name, folder)
    for name in ENDPOINT:
        if settings.pop(name, None) is not None and name not in given:
            raise UserError(f"{folder} was made with {name}, which is not taken from a record: give {name} yourself.")
    settings["teacher_settings"] = teacher_settings(record["settings"], model_name, folder)
    settings["data_path"] = record["settings"].get("data_path")
    if not _holds_dataset(settings["data_path"], dataset):
        del settings["data_path"]
    settings["checkpoint_dir"] = str(folder.parent)  # where a teacher of the same identity is looked for
    for key, kept in (("teacher_checkpoint", record["teacher"]), ("pretrained", record["foundation"])):
        if kept is not None and key not in given:
            settings[key] = str(_recorded_folder(kept["folder"], folder, key))
    settings = {key: value for key, value in settings.items() if key in known_keys(model_name)}
    try:
        config = make_config(model_name, dataset, config_dict=settings, command_line=given)
    except UserError:
        raise
    except Exception as error:  # RecBole's own, of whatever kind, for values that it does not check
        raise UserError(f"the settings in {folder / checkpoint.RECORD} cannot be used ({first_line(error)}).") from error
    data = SharedData()
    splits, train = data.splits(config), data.train(config)
    checkpoint.check(record, folder, fingerprint=splits["train"].text_fingerprint)  # before any weight is read
    init_seed(config["seed"], config["reproducibility"])
    with stock.without_training():
        model = get_model(model_name)(config, train).to(config["device"])
    load_trained_weights(model, folder, model_name)
    model.eval()
    return config, model, splits["train"], *dataloaders(config, train, splits)


def _load_stock(folder: Path, given: dict[str, Any]) -> tuple[Config, Any, TextSequentialDataset, Any, Any, Any]:
    """:func:`load_data_and_model` of a model of RecBole that this library trained.

    Raises:
        UserError: see there; and where the model keeps no weights.
    """
    record = checkpoint.read_record(folder)
    name, dataset, recorded = record["model"], record.get("dataset"), record.get("given")
    model_class = stock_class(name)
    if getattr(model_class, "type", None) == ModelType.TRADITIONAL:
        raise UserError(f"{folder}: {name} keeps no weights, it counts anew in each run: compare it by recbole-llm run.")
    if getattr(model_class, "type", None) not in (ModelType.SEQUENTIAL, ModelType.GENERAL):
        raise UserError(
            f"{folder / checkpoint.RECORD} names the model {name!r}, which is no sequential or general recommender of RecBole."
        )
    if not is_file_name(dataset) or not isinstance(recorded, dict):
        raise UserError(f"{folder / checkpoint.RECORD} lacks a dataset's plain name or the settings given: train it again.")
    settings = {"protocol": "retrieval", **recorded_settings(recorded, name, folder)}
    if _holds_dataset(recorded.get("data_path"), str(dataset)):
        settings["data_path"] = recorded["data_path"]
    settings["checkpoint_dir"] = str(folder.parent)
    given = {key: value for key, value in given.items() if key == "data_path"}
    try:
        config = make_config(name, str(dataset), config_dict=settings, command_line=given)
    except UserError:
        raise
    except Exception as error:  # RecBole's own, of whatever kind, for values that it does not check
        raise UserError(f"the settings in {folder / checkpoint.RECORD} cannot be used ({first_line(error)}).") from error
    splits = SharedData().splits(config)
    run = stock.load(folder, config, splits)
    return config, run.model, splits["train"], *dataloaders(config, splits["train"], splits)


def checked_record(folder: Path) -> dict[str, Any]:
    """The record of an LLM recommender's checkpoint, its parts of the types that they must have.

    Raises:
        UserError: it is of something else, or damaged.
    """
    record = checkpoint.read_record(folder)
    if record.get("kind") == "foundation":
        raise UserError(f"{folder} holds a pre-trained LLM, not an LLM recommender: give the folder of one.")
    if record.get("kind") != "llm" or not registry.is_ours(record["model"]):
        raise UserError(
            f"{folder / checkpoint.RECORD} names the model {record['model']!r}, which is no LLM recommender that is installed "
            f"here: give the folder of one, or install the package that the model is of."
        )
    if not is_file_name(record.get("dataset")):
        raise UserError(f"{folder / checkpoint.RECORD} names the dataset {record.get('dataset')!r}: a plain name is needed.")
    record.setdefault("foundation", None)
    for key, needed in (("teacher", "vectors"), ("foundation", "sha256")):
        part = record.get(key, "")
        is_whole = isinstance(part, dict) and all(isinstance(part.get(name), str) for name in ("folder", needed))
        if part is not None and not is_whole:
            raise UserError(f"{folder / checkpoint.RECORD} is damaged: its {key} is {part!r}.")
    if not isinstance(record.get("settings"), dict) or not isinstance(record.get("fingerprint"), str):
        raise UserError(f"{folder / checkpoint.RECORD} is damaged: it lacks settings or fingerprint.")
    return record


def recorded_settings(settings: Mapping[str, Any], model: str, folder: Path) -> dict[str, Any]:
    """The settings in a record that may be taken from it, each in its key's type.

    Raises:
        UserError: a key that ``model`` has not, one whose file would be unpickled, or a value of another type.
    """
    where = str(folder / checkpoint.RECORD)
    known = known_keys(model, stock_class(model))
    taken = {}
    for name, value in settings.items():
        if name in UNPICKLED and value:
            raise UserError(f"{where} names a file in {name}, which would be unpickled: a record may not.")
        if name in NOT_FROM_A_RECORD:
            continue
        if name not in known:
            raise UserError(f"{where} has the setting {name!r}, which {model} does not know.")
        taken[name] = fitted(known[name], value, where)
    return taken


def teacher_settings(settings: Mapping[str, Any], model: str, folder: Path) -> dict[str, Any] | None:
    """As :func:`recorded_settings`, of the teacher."""
    recorded = settings.get("teacher_settings")
    if recorded is None:
        return None
    where, key = str(folder / checkpoint.RECORD), known_keys(model).get("teacher")
    teacher = settings.get("teacher", key and key.default)
    if not isinstance(recorded, dict) or stock_class(teacher) is None:
        raise UserError(f"{where}: its teacher {teacher!r} and teacher_settings are none of a RecBole model.")
    return recorded_settings(recorded, teacher, folder)


def _holds_dataset(data_path: Any, dataset: str) -> bool:
    return isinstance(data_path, str) and (Path(data_path) / dataset / f"{dataset}.inter").is_file()


def _recorded_folder(place: str, folder: Path, key: str) -> Path:
    """The checkpoint that a record names: beside its own folder, else where the record says.

    Raises:
        UserError: there is none.
    """
    for candidate in (folder.parent / Path(place).name, Path(place)):
        if checkpoint.exists(candidate):
            return candidate
    raise UserError(
        f"{folder} belongs with the checkpoint {place}, which is not there: give its folder as {key}, or put it beside "
        f"{folder}."
    )
