"""Load a trained LLM recommender from its folder and recommend items with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.utils import get_model, init_seed

from recbole_llm import checkpoint, registry
from recbole_llm.config.checks import UNPICKLED, fitted, stock_class
from recbole_llm.config.schema import is_file_name, known_keys
from recbole_llm.config.settings import make_config
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.loaders import dataloaders
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError, closest, first_line
from recbole_llm.teacher import stock
from recbole_llm.trainer.checkpoint import load_trained_weights

# Settings that a record does not decide: what is read and written where, on which machine, by whom, and what is trusted.
_NOT_FROM_A_RECORD = frozenset(
    "model dataset data_path checkpoint_dir results_file per_user_file resume teacher_checkpoint pretrained pretrain_datasets "
    "pretrain_settings head trust_files endpoint_answers save_dataset dataset_save_path save_dataloaders dataloaders_save_path "
    "benchmark_filename additional_feat_suffix log_wandb wandb_project config_file config_files config_file_list nproc "
    "world_size ip port offset group_offset local_rank single_spec device gpu_id worker state show_progress verbose "
    "MODEL_TYPE MODEL_INPUT_TYPE eval_type".split()
)
_ENDPOINT = ("endpoint_url", "endpoint_model", "endpoint_key_variable")

# What the caller may say in place of the record.
GIVEN = ("data_path", "teacher_checkpoint", "pretrained", "backbone", *_ENDPOINT)


def load(
    model_file: str | Path, given: Mapping[str, Any] | None = None
) -> tuple[Config, Any, TextSequentialDataset, Any, Any, Any]:
    """Load a trained LLM recommender with its data; the same six things as RecBole's ``load_data_and_model``.

    The record in the folder may come from somebody else and is not trusted. It may name a registered LLM recommender, a dataset
    by its plain name, and values for settings that this model has, which are checked by type and never evaluated. Nothing is
    trained or written on its word, and what it says of files holds for reading alone:

    - the dataset is read from ``data_path/<dataset>``, the record's ``data_path`` where such a dataset lies there, else the
      default one;
    - the teacher, and the LLM that was pre-trained for ST2SI, are read from the folder of the recorded name beside the
      checkpoint, else from the recorded folder: checkpoints of this library, in safetensors;
    - the LLM is the recorded ``backbone``: safetensors or GGUF, without code;
    - an endpoint is asked only where the caller names it.

    Args:
        model_file: a checkpoint folder of this library, or the weights file in it.
        given: settings in place of the record's, of :data:`GIVEN`.

    Raises:
        UserError: no checkpoint, a truncated or foreign one, a record that asks for more than the above, data that is no longer
            the same, or a teacher that is missing.
    """
    folder = checkpoint.folder_of(model_file)
    record = _checked_record(folder)
    given = dict(given or {})
    model_name, dataset = record["model"], record["dataset"]
    settings = _recorded_settings(record["settings"], model_name, folder)
    for name in _ENDPOINT:
        if settings.pop(name, None) is not None and name not in given:
            raise UserError(f"{folder} was made with {name}, which is not taken from a record: give {name} yourself.")
    settings["teacher_settings"] = _teacher_settings(record["settings"], model_name, folder)
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


def _checked_record(folder: Path) -> dict[str, Any]:
    """The record of an LLM recommender's checkpoint, its parts of the types that they must have.

    Raises:
        UserError: it is of something else, or damaged.
    """
    record = checkpoint.read_record(folder)
    if record.get("kind") in ("stock", "foundation"):
        what = f"a stock {record['model']}" if record["kind"] == "stock" else "a pre-trained LLM"
        raise UserError(f"{folder} holds {what}, not an LLM recommender: give the folder of one.")
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


def _recorded_settings(settings: Mapping[str, Any], model: str, folder: Path) -> dict[str, Any]:
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
        if name in _NOT_FROM_A_RECORD:
            continue
        if name not in known:
            raise UserError(f"{where} has the setting {name!r}, which {model} does not know.")
        taken[name] = fitted(known[name], value, where)
    return taken


def _teacher_settings(settings: Mapping[str, Any], model: str, folder: Path) -> dict[str, Any] | None:
    """As :func:`_recorded_settings`, of the teacher."""
    recorded = settings.get("teacher_settings")
    if recorded is None:
        return None
    where, key = str(folder / checkpoint.RECORD), known_keys(model).get("teacher")
    teacher = settings.get("teacher", key and key.default)
    if not isinstance(recorded, dict) or stock_class(teacher) is None:
        raise UserError(f"{where}: its teacher {teacher!r} and teacher_settings are none of a RecBole model.")
    return _recorded_settings(recorded, teacher, folder)


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


def recommend(
    model_file: str | Path,
    user: str | None = None,
    history: Sequence[str] | None = None,
    topk: int = 10,
    exclude_history: bool = True,
    given: Mapping[str, Any] | None = None,
) -> tuple[list[str], list[tuple[str, str, float]]]:
    """Recommend items to a user of the dataset, or for a history given by titles.

    Args:
        model_file: a checkpoint folder.
        user: the user's id in the dataset; their whole history is read, the test item included.
        history: titles, oldest first.
        topk: how many items.
        exclude_history: leave out items of the history.
        given: settings in place of those in the checkpoint's record, see :func:`load`.

    Returns:
        the history's titles, and (item id, title, score) of the best items, best first.

    Raises:
        UserError: unknown user or title, or neither or both of them given.
    """
    if (user is None) == (history is None):
        raise UserError("Give either --user=<id> or --history='[title, title]'.")
    if topk < 1:
        raise UserError(f"topk is {topk}: give a whole number above 0.")
    config, model, dataset, *_ = load(model_file, given)
    splits = dataset.splits
    items = _items_of_user(splits["test"], user) if user is not None else _items_of_titles(dataset, history or ())
    length = config["MAX_ITEM_LIST_LENGTH"]
    latest = items[-length:]
    row = np.zeros((1, length), dtype=np.int64)
    row[0, : len(latest)] = latest
    interaction = Interaction(
        {
            model.USER_ID: torch.zeros(1, dtype=torch.long),
            model.ITEM_SEQ: torch.from_numpy(row),
            model.ITEM_SEQ_LEN: torch.tensor([len(latest)]),
        }
    )
    if user is not None:
        times = _with_target(splits["test"], user, dataset.time_field)[-length:]
    else:  # titles come without dates: the history ends where the data ends
        times = splits["test"].inter_feat[dataset.time_field].max().expand(len(latest))
    times = torch.nn.functional.pad(times, (0, length - len(times)))[None]
    interaction.update(Interaction({model.time_list_field: times}))
    scores = model.score(interaction.to(config["device"]), None)[0].cpu()
    if exclude_history:
        scores[torch.from_numpy(np.unique(items))] = float("-inf")
    best = scores.topk(min(topk, int(torch.isfinite(scores).sum())))
    tokens = dataset.field2id_token[dataset.iid_field]
    found = [
        (str(tokens[item]), dataset.item_texts[item], float(score))
        for score, item in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return [dataset.item_texts[item] for item in items], found


def _row_of_user(test: TextSequentialDataset, user: str) -> int:
    known = test.field2token_id[test.uid_field]
    if str(user) not in known or known[str(user)] == 0:
        near = closest(str(user), list(known)[1:])
        raise UserError(f"user: {test.dataset_name} has no user {user!r}" + (f"; the nearest is {near!r}." if near else "."))
    rows = np.flatnonzero(test.inter_feat[test.uid_field].numpy() == known[str(user)])
    if len(rows) == 0:
        raise UserError(f"user: {user!r} has too short a history in {test.dataset_name} to recommend from.")
    return int(rows[-1])


def _with_target(test: TextSequentialDataset, user: str, field: str) -> torch.Tensor:
    """A user's history in the test row with the test item behind it."""
    row = _row_of_user(test, user)
    length = int(test.inter_feat[test.item_list_length_field][row])
    history = test.inter_feat[field + test.config["LIST_SUFFIX"]][row, :length]
    return torch.cat([history, test.inter_feat[field][row : row + 1]])


def _items_of_user(test: TextSequentialDataset, user: str) -> np.ndarray:
    return _with_target(test, user, test.iid_field).numpy()


def _items_of_titles(dataset: TextSequentialDataset, titles: Sequence[str]) -> np.ndarray:
    if not titles:
        raise UserError("history: give at least one title.")
    by_title: dict[str, int] = {}
    for number, text in enumerate(dataset.item_texts[1:], start=1):
        by_title.setdefault(text.strip().casefold(), number)
    items = []
    for title in titles:
        item = by_title.get(str(title).strip().casefold())
        if item is None:
            near = closest(str(title), [text for text in dataset.item_texts[1:]])
            hint = f"; the nearest is {near!r}." if near else "."
            raise UserError(f"history: {dataset.dataset_name} has no item titled {title!r}{hint}")
        items.append(item)
    return np.array(items, dtype=np.int64)
