"""The table of models: ours, and those that other packages add by :func:`register_model` or an entry point.

An entry names its classes by strings, which are imported when somebody asks for the model, so that ``import recbole_llm``
stays fast.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from recbole_llm.errors import UserError, first_line

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "recbole_llm.models"
_PASSED_ON = "RECBOLE_LLM_MODELS"  # environment variable that tells worker processes of registered models


@dataclass(frozen=True)
class Entry:
    """Where the parts of a model are.

    Attributes:
        model: ``module:class`` of the recommender.
        properties: its default settings, a YAML file; a relative path is within :func:`properties_folder`.
        paper: what it implements.
        dataset: ``module:class`` of its dataset.
        trainer: ``module:class`` of its trainer.
    """

    model: str
    properties: str
    paper: str = ""
    dataset: str = "recbole_llm.data.dataset:TextSequentialDataset"
    trainer: str = "recbole_llm.trainer.trainer:LLMTrainer"


MODELS: dict[str, Entry] = {
    "LLMSRec": Entry(
        model="recbole_llm.model.llmsrec:LLMSRec",
        properties="model/LLMSRec.yaml",
        paper="Kim et al., Lost in Sequence: Do Large Language Models Understand Sequential Recommendation?, KDD 2025",
    ),
    "LLMSTAR": Entry(
        model="recbole_llm.model.llmstar:LLMSTAR",
        properties="model/LLMSTAR.yaml",
        paper="LLM-STAR: Sequence-Teacher-Anchored LLM Recommender with Adaptive Regularization, under review",
    ),
    "TALLRec": Entry(
        model="recbole_llm.model.tallrec:TALLRec",
        properties="model/TALLRec.yaml",
        paper="Bao et al., TALLRec: An Effective and Efficient Tuning Framework to Align LLM with Recommendation, RecSys 2023",
    ),
    "LLaRA": Entry(
        model="recbole_llm.model.llara:LLaRA",
        properties="model/LLaRA.yaml",
        paper="Liao et al., LLaRA: Large Language-Recommendation Assistant, SIGIR 2024",
    ),
    "CoLLM": Entry(
        model="recbole_llm.model.collm:CoLLM",
        trainer="recbole_llm.trainer.staged:StagedTrainer",
        properties="model/CoLLM.yaml",
        paper="Zhang et al., CoLLM: Integrating Collaborative Embeddings into LLMs for Recommendation, IEEE TKDE 2025",
    ),
    "ALLMRec": Entry(
        model="recbole_llm.model.allmrec:ALLMRec",
        properties="model/ALLMRec.yaml",
        paper="Kim et al., Large Language Models meet Collaborative Filtering (A-LLMRec), KDD 2024",
    ),
    "RSLLM": Entry(
        model="recbole_llm.model.rsllm:RSLLM",
        trainer="recbole_llm.trainer.staged:StagedTrainer",
        properties="model/RSLLM.yaml",
        paper="RSLLM: Integrating Recommendation Systems as a New Language in Large Models",
    ),
    "ST2SI": Entry(
        model="recbole_llm.model.st2si:ST2SI",
        trainer="recbole_llm.trainer.linear_head:LinearHeadTrainer",
        properties="model/ST2SI.yaml",
        paper="Zhai et al., Learning Transition Patterns by LLMs for Sequential Recommendation (ST2SI), 2025",
    ),
    "HLLM": Entry(
        model="recbole_llm.model.hllm:HLLM",
        properties="model/HLLM.yaml",
        paper="Chen et al., HLLM: Enhancing Sequential Recommendations via Hierarchical Large Language Models, 2024",
    ),
    "LLMRec": Entry(
        model="recbole_llm.model.llmrec:LLMRec",
        properties="model/LLMRec.yaml",
        paper="Tang et al., One Model for All: LLMs are Domain-Agnostic Recommendation Systems (LLM-Rec), 2023",
    ),
    "MoRec": Entry(
        model="recbole_llm.model.morec:MoRec",
        properties="model/MoRec.yaml",
        paper="Yuan et al., Where to Go Next for Recommender Systems? ID- vs. Modality-based Models (MoRec), SIGIR 2023",
    ),
    "Recformer": Entry(
        model="recbole_llm.model.recformer:Recformer",
        trainer="recbole_llm.trainer.item_matrix:ItemMatrixTrainer",
        properties="model/Recformer.yaml",
        paper="Li et al., Text Is All You Need: Learning Language Representations for SR (Recformer), KDD 2023",
    ),
    "ZeroShot": Entry(
        model="recbole_llm.model.zeroshot:ZeroShot",
        properties="model/ZeroShot.yaml",
        paper="the un-tuned LLM on the generation prompts of RSLLM and LLaRA",
    ),
}

# Models of this library without an LLM. They are trained, kept, evaluated and used as teachers as RecBole's own models are, so
# that everything here calls them stock models.
BASELINES: dict[str, Entry] = {
    "CTRL": Entry(
        model="recbole_llm.model.ctrl:CTRL",
        properties="model/CTRL.yaml",
        paper="Li et al., CTRL: Connect Collaborative and Language Model for CTR Prediction, 2023, as LLM-SRec runs it",
        trainer="recbole.trainer:Trainer",
    ),
    "UniSRec": Entry(
        model="recbole_llm.model.unisrec:UniSRec",
        properties="model/UniSRec.yaml",
        paper="Hou et al., Towards Universal Sequence Representation Learning for Recommender Systems (UniSRec), KDD 2022",
        trainer="recbole.trainer:PretrainTrainer",
    ),
    "ZESRec": Entry(
        model="recbole_llm.model.zesrec:ZESRec",
        properties="model/ZESRec.yaml",
        paper="Ding et al., Zero-Shot Recommender Systems (ZESRec), 2021",
        trainer="recbole.trainer:Trainer",
    ),
    "eSASRec": Entry(
        model="recbole_llm.model.esasrec:eSASRec",
        properties="model/eSASRec.yaml",
        paper="Tikhonovich et al., eSASRec: Enhancing Transformer-based Recommendations in a Modular Fashion, RecSys 2025",
        dataset="recbole.data.dataset:SequentialDataset",
        trainer="recbole.trainer:Trainer",
    ),
    "TIGER": Entry(
        model="recbole_llm.model.tiger:TIGER",
        properties="model/TIGER.yaml",
        paper="Rajput et al., Recommender Systems with Generative Retrieval (TIGER), NeurIPS 2023",
        trainer="recbole.trainer:Trainer",
    ),
}


def register_model(
    name: str,
    model: str | type,
    properties: str | os.PathLike,
    dataset: str | type = Entry.dataset,
    trainer: str | type = Entry.trainer,
    paper: str = "",
) -> None:
    """Make a model of another package known to RecBole and to everything here: ``--model=``, ``--help``, checks, workers.

    A package that is installed calls it from the entry-point group ``recbole_llm.models``: the entry point is named like the
    model, and its value is a function without arguments that makes this call (docs/add-a-model.md).

    Args:
        name: what ``--model=`` says; letters, digits and underscores.
        model: the recommender class, or ``"module:class"``, which is imported when the model is asked for.
        properties: YAML file with the model's own settings; see ``properties/model`` for the comments that describe a key.
        dataset: class of the dataset, or ``"module:class"``.
        trainer: class of the trainer, or ``"module:class"``.
        paper: one line for ``--help``.

    Raises:
        UserError: the name is taken or no name, or the file does not exist.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise UserError(f"register_model: {name!r} is no name for a model; use letters, digits and underscores.")
    file = Path(properties).resolve()
    if not file.is_file():
        raise UserError(f"register_model: {name} names {file} as its properties, which is no file.")
    entry = Entry(_reference(name, model), str(file), paper, _reference(name, dataset), _reference(name, trainer))
    if MODELS.get(name, entry) != entry or name in stock_models():
        raise UserError(f"register_model: there is a model named {name} already; choose another name.")
    MODELS[name] = entry
    passed_on = json.loads(os.environ.get(_PASSED_ON, "{}"))
    os.environ[_PASSED_ON] = json.dumps({**passed_on, name: asdict(entry)})


def _reference(name: str, part: str | type) -> str:
    """A class as ``module:class``, by which other processes find it, too."""
    reference = part if isinstance(part, str) else f"{part.__module__}:{part.__qualname__}"
    if not re.fullmatch(r"[\w.]+:\w+", reference):
        raise UserError(f"register_model: {name} names {reference!r}, which is no module:class at the top of a module.")
    return reference


def _receive_models() -> None:
    """In a worker process: take over the models that the process which started it registered."""
    for name, entry in json.loads(os.environ.get(_PASSED_ON, "{}")).items():
        MODELS.setdefault(name, Entry(**entry))


def _installed() -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points of other packages by the name of their model."""
    folders = tuple((folder, os.stat(folder).st_mtime_ns if os.path.isdir(folder) else 0) for folder in sys.path)
    return _entry_points(folders)


@lru_cache(maxsize=8)
def _entry_points(folders: tuple[tuple[str, int], ...]) -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points found in ``folders``: those of ``sys.path``, each with its time of change. A search takes 10 ms."""
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _load_entry_point(point: importlib.metadata.EntryPoint) -> None:
    """Have another package register its model.

    Raises:
        UserError: its code fails, or registers no model of that name.
    """
    try:
        point.load()()
    except Exception as error:
        raise UserError(f"model: {point.name} cannot be registered by {point.value} ({first_line(error)}).") from error
    if point.name not in MODELS:
        raise UserError(f"model: {point.value} registers no model named {point.name}: call register_model there.")


def models() -> dict[str, Entry]:
    """All models, ours first, then those of other packages; one that cannot be registered is left out with a warning."""
    for name, point in _installed().items():
        if name not in MODELS:
            try:
                _load_entry_point(point)
            except UserError as error:
                _warn_once(str(error))
    return MODELS


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def is_ours(model_name: Any) -> bool:
    """Whether ``model_name`` is a model of this library, or one that was registered with it."""
    if not isinstance(model_name, str):
        return False
    if model_name not in MODELS and model_name in _installed() and model_name not in stock_models():
        _load_entry_point(_installed()[model_name])
    return model_name in MODELS


def properties_of(model_name: str) -> Path:
    """The file of a model's own settings."""
    entry = MODELS.get(model_name) or BASELINES[model_name]
    return properties_folder() / entry.properties  # an absolute path stays as it is


def resolve(reference: str) -> Any:
    """Import what a string such as ``recbole_llm.trainer.trainer:LLMTrainer`` names.

    Raises:
        ImportError: it cannot be imported. (RecBole would take an AttributeError for "this model has no trainer of its
            own" and use the stock trainer in silence.)
    """
    module, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise ImportError(f"{reference} cannot be imported: {error}") from error


def properties_folder() -> Path:
    """The folder of the default settings: within the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "properties", package.parent / "properties"):
        if (folder / "model").is_dir():
            return folder
    raise UserError(f"The folder 'properties' is missing beside {package}: install recbole-llm again.")


def recbole_folder() -> Path:
    """Where RecBole is installed. It is not imported."""
    found = importlib.util.find_spec("recbole")
    if found is None or not found.submodule_search_locations:
        raise UserError("RecBole is not installed: pip install recbole==1.2.1.")
    return Path(found.submodule_search_locations[0])


def stock_models() -> list[str]:
    """The names of RecBole's own models and of ``BASELINES``, sorted."""
    return sorted([*_stock_models(), *BASELINES], key=str.lower)


@lru_cache(maxsize=1)
def _stock_models() -> tuple[str, ...]:
    # RecBole has one settings file per model, named like it; but the two for libraries of others, and none for Random.
    files = (recbole_folder() / "properties" / "model").glob("*.yaml")
    other_names = {"lightgbm": "LightGBM", "xgboost": "XGBoost"}
    return tuple(sorted({other_names.get(file.stem, file.stem) for file in files} | {"Random"}))


def known_models() -> list[str]:
    """The names of all models, LLM recommenders first."""
    return [*models(), *stock_models()]


_receive_models()
