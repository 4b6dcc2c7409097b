"""Vectors of the items' texts: from a sentence encoder, from an LLM's hidden states or from a file; whitened or reduced.

What an encoder computes is stored and found again: a file's name holds a digest of the texts and of the encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.encoder import EncoderSettings, PromptEncoder
from recbole_llm.backbone.load import fetch_backbone, load_backbone
from recbole_llm.backbone.sentence_encoder import load_sentence_encoder, sentence_encoder_source
from recbole_llm.backbone.settings import BackboneSettings, read_settings, resolved_dtype
from recbole_llm.backbone.text import encode_text
from recbole_llm.errors import UserError, first_line, printable
from recbole_llm.files import replace_file
from recbole_llm.lock import held
from recbole_llm.prompt.batch import OUT_TOKEN, PromptBatch

__all__ = ["VectorSource", "item_vectors", "pooled_states_of_texts", "transformed", "write_item_vectors"]

MAX_TEXT_TOKENS = 512  # of a text that an LLM reads; a sentence encoder has a limit of its own
SUFFIXES = (".npy", ".safetensors")
TENSOR, ITEMS = "vectors", "items"  # in a .safetensors file: the tensor, and the items' ids as a JSON list in its metadata
_TEXTS_AT_ONCE = 256
_LEAST_VARIANCE = 1e-8  # of a principal component, as a share of the largest: less is rounding
_NAMED = 3


@dataclass(frozen=True)
class VectorSource:
    """Where the vectors of a catalogue come from; each field is the key of the same name."""

    item_vectors: str
    item_vectors_rows: str
    item_vectors_pooling: str
    sentence_encoder: str
    backbone: str
    backbone_layers: int | None
    backbone_dtype: str
    backbone_revision: str | None
    checkpoint_dir: str
    dataset: str
    device: torch.device
    seed: int

    @property
    def is_file(self) -> bool:
        return self.item_vectors not in ("text", "llm")

    def llm(self) -> BackboneSettings:
        """The settings of the LLM."""
        names = ("backbone", "backbone_layers", "backbone_dtype", "backbone_revision", "device", "seed")
        return read_settings({name: getattr(self, name) for name in names})

    def identity(self) -> dict[str, Any]:
        """What tells the encoder's vectors from another's; its files are fetched, and no weight is read.

        Raises:
            UserError: an encoder that does not exist or cannot be fetched.
        """
        if self.item_vectors == "text":
            return sentence_encoder_source(self.sentence_encoder)
        llm = self.llm()
        of_llm = {"layers": llm.layers, "dtype": str(resolved_dtype(llm)), "max_tokens": MAX_TEXT_TOKENS}
        return {**fetch_backbone(llm), **of_llm, "pooling": self.item_vectors_pooling}

    def stored_file(self, texts: Sequence[str]) -> Path:
        """Where the vectors of ``texts`` are kept."""
        identity = json.dumps(["item vectors 1", self.identity(), *texts], sort_keys=True)
        digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()
        return Path(self.checkpoint_dir) / "states" / f"{self.dataset}-texts-{digest[:16]}.npy"


def item_vectors(source: VectorSource, items: Sequence[str], texts: Sequence[str], lines: Sequence[str]) -> np.ndarray:
    """The vectors of a catalogue; from an encoder, they are computed once and kept in the folder of checkpoints.

    Args:
        source: where they come from.
        items: ids of the items in the files, by internal id, padding first.
        texts: of the same items.
        lines: ids in the order of the ``.item`` file.

    Returns:
        float32 ``[items - 1, width]``, in the order of internal ids, without the padding.

    Raises:
        UserError: a file that cannot be read, or has not one vector for each item; or an encoder that cannot be read.
    """
    if source.is_file:
        return read_item_vectors(Path(source.item_vectors), items, lines, source.item_vectors_rows)
    file = source.stored_file(texts[1:])
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with held(file):
            if not file.is_file():  # else another process was faster
                getLogger().info(f"Vectors of {len(texts) - 1:,} texts: computing them once; they will be stored in {file}")
                vectors = _encoded(source, list(texts[1:])).astype("<f4")
                replace_file(file, lambda temporary: _write_array(temporary, vectors))
    try:
        vectors = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        vectors = None
    if not isinstance(vectors, np.ndarray) or len(vectors) != len(texts) - 1:
        raise UserError(f"item_vectors: {file}, which was stored here, is damaged: remove it, and it is computed again.")
    return _checked(vectors, items[1:], file)


def _encoded(source: VectorSource, texts: list[str]) -> np.ndarray:
    if source.item_vectors == "text":
        return load_sentence_encoder(source.sentence_encoder, source.device).encode(texts).cpu().numpy()
    return pooled_states_of_texts(load_backbone(source.llm()), texts, source.item_vectors_pooling)


def _write_array(temporary: Path, vectors: np.ndarray) -> None:
    with open(temporary, "wb") as file:  # np.save would add a suffix to the name
        np.save(file, vectors, allow_pickle=False)


@torch.no_grad()
def pooled_states_of_texts(backbone: Backbone, texts: Sequence[str], pooling: str = "mean") -> np.ndarray:
    """The pooled last hidden states of texts, each distinct one read once, alone.

    Args:
        backbone: a causal LLM.
        texts: n strings; of a longer one :data:`MAX_TEXT_TOKENS` tokens are read; one of no tokens is the zero vector.
        pooling: ``mean`` of the states of the text's tokens, or the state of its ``last`` token, which has seen them all.

    Returns:
        float32 ``[n, hidden size]``.
    """
    encoder = PromptEncoder(backbone, EncoderSettings(share_header=False, skip_unread=pooling == "last"))
    distinct = list(dict.fromkeys(texts))
    ids = [found[:MAX_TEXT_TOKENS] for found in encode_text(backbone.tokenizer, distinct)]
    by_length = sorted((row for row, found in enumerate(ids) if found), key=lambda row: len(ids[row]))
    vectors = np.zeros((len(distinct), backbone.hidden_size), np.float32)
    nothing = torch.zeros(0, backbone.input_size, device=backbone.device)
    for start in range(0, len(by_length), _TEXTS_AT_ONCE):
        rows = by_length[start : start + _TEXTS_AT_ONCE]
        lengths = np.array([len(ids[row]) for row in rows])
        batch = _read_at_texts([ids[row] for row in rows], backbone.prefix_ids, pooling)
        states = encoder(batch, nothing)
        if pooling == "mean":
            kept = torch.arange(states.shape[1], device=states.device) < torch.from_numpy(lengths).to(states.device)[:, None]
            states = (states * kept[:, :, None]).sum(dim=1) / kept.sum(dim=1, keepdim=True)
        vectors[rows] = states.reshape(len(rows), -1).cpu().numpy()
    row_of = {text: row for row, text in enumerate(distinct)}
    return vectors[[row_of[text] for text in texts]]


def _read_at_texts(ids: list[list[int]], prefix: list[int], pooling: str) -> PromptBatch:
    """Prompts of the tokens alone, read at all of a text's tokens or at its last; no vector goes in."""
    whole = [[*prefix, *tokens] for tokens in ids]
    offsets = np.r_[0, np.cumsum([len(tokens) for tokens in whole])]
    tokens = np.concatenate(whole).astype(np.int32)
    assert OUT_TOKEN not in tokens
    lengths = np.array([len(found) for found in ids])
    column = np.arange(lengths.max()) if pooling == "mean" else lengths[:, None] - 1
    out = offsets[:-1, None] + len(prefix) + np.minimum(column, lengths[:, None] - 1)
    return PromptBatch(
        tokens=tokens,
        offsets=offsets,
        slot_items=np.zeros(0, np.int64),
        vector_items=np.zeros(0, np.int64),
        vector_index=np.full(len(tokens), -1, dtype=np.int64),
        out_positions=out,
        header_length=0,
        parent=np.full(len(ids), -1, dtype=np.int64),
        shared=np.zeros(len(ids), dtype=np.int64),
    )


# ---- A user's file


def write_item_vectors(file: str | Path, items: Sequence[str], vectors: np.ndarray) -> None:
    """Write a ``.safetensors`` file for ``item_vectors``.

    Args:
        file: where to.
        items: the items' ids as in the data set's files, n of them.
        vectors: one for each, ``[n, width]``.
    """
    if len(items) != len(vectors):
        raise ValueError(f"there are {len(items)} items and {len(vectors)} vectors")
    ready = {TENSOR: np.ascontiguousarray(vectors, np.float32)}
    named = {ITEMS: json.dumps(list(map(str, items)))}
    replace_file(Path(file), lambda temporary: save_file(ready, str(temporary), metadata=named))


def read_item_vectors(file: Path, items: Sequence[str], lines: Sequence[str], rows: str = "item_file") -> np.ndarray:
    """Read a user's file; nothing in it is unpickled. Arguments and result as of :func:`item_vectors`.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    if not file.is_file():
        raise UserError(f"item_vectors: there is no file {file}; it may also be text or llm.")
    if file.suffix == ".safetensors":
        named, vectors = _read_safetensors(file)
        return _checked(_of_items(vectors, named, items[1:], f"{file} has no vector"), items[1:], file)
    try:
        vectors = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"item_vectors: {file} cannot be read as a NumPy array of numbers ({first_line(error)}).") from None
    if not isinstance(vectors, np.ndarray):
        raise UserError(f"item_vectors: {file} holds several arrays: save one with numpy.save.")
    expected = len(lines) if rows == "item_file" else len(items)
    if vectors.ndim != 2 or len(vectors) != expected:
        what = "lines below the header of the .item file" if rows == "item_file" else "items with the padding, row 0,"
        other = " Its number of rows is that of item_vectors_rows: internal." if len(vectors) == len(items) != expected else ""
        raise UserError(
            f"item_vectors: {file} has the shape {vectors.shape}, and item_vectors_rows: {rows} needs [{expected}, width], one "
            f"row for each of the {what}.{other}"
        )
    if rows == "internal":
        return _checked(vectors[1:], items[1:], file)
    return _checked(_of_items(vectors, list(lines), items[1:], "the .item file has no line"), items[1:], file)


def _read_safetensors(file: Path) -> tuple[list[str], np.ndarray]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            named = json.loads((opened.metadata() or {}).get(ITEMS, "null"))
            tensor = opened.get_tensor(TENSOR) if TENSOR in opened.keys() else None
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"item_vectors: {file} cannot be read as safetensors ({first_line(error)}).") from None
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or not isinstance(named, list) or len(named) != len(tensor):
        raise UserError(
            f"item_vectors: {file} must hold a tensor '{TENSOR}' [n, width] and, in its metadata, '{ITEMS}': the ids of these "
            f"n items as a JSON list; recbole_llm.backbone.item_vectors.write_item_vectors writes such a file."
        )
    if len(set(map(str, named))) < len(named):
        raise UserError(f"item_vectors: {file} names an item twice: keep one vector for each.")
    return list(map(str, named)), tensor.float().numpy()


def _of_items(vectors: np.ndarray, named: Sequence[str], items: Sequence[str], lacking: str) -> np.ndarray:
    row_of = {name: row for row, name in enumerate(named)}
    missing = [item for item in items if item not in row_of]
    if missing:
        shown = ", ".join(printable(repr(item), 40) for item in missing[:_NAMED])
        more = f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else ""
        raise UserError(f"item_vectors: {lacking} for {len(missing):,} of {len(items):,} items: {shown}{more}; add them.")
    return vectors[[row_of[item] for item in items]]


def _checked(vectors: np.ndarray, items: Sequence[str], file: Path) -> np.ndarray:
    """Float32 vectors of a catalogue, if they are numbers and not all the same."""
    if vectors.dtype.kind not in "fiu" or vectors.ndim != 2 or vectors.shape[1] == 0:
        raise UserError(f"item_vectors: {file} holds {vectors.dtype} of shape {vectors.shape}, not vectors of numbers.")
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(vectors, np.float32)
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise UserError(
            f"item_vectors: the vector of item {printable(repr(items[broken[0]]), 40)} in {file} holds what is no float32 "
            f"number (so do {len(broken) - 1:,} others): correct it."
        )
    if (vectors == vectors[:1]).all():
        raise UserError(f"item_vectors: all vectors in {file} are the same, which tells no item from another.")
    return vectors


# ---- Whitening and reduction


def transformed(vectors: np.ndarray, kind: str, width: int | None = None) -> np.ndarray:
    """Whiten or reduce the vectors of a catalogue, by its own mean and covariance.

    With the eigenvectors U of the covariance and its eigenvalues s, largest first, vectors x and their mean m::

        pca     U^T (x - m)                                the first components
        whiten  s^(-1/2) U^T (x - m)                       the first components, each of variance 1 (BERT-whitening)
        zca     U s^(-1/2) U^T (x - m)                     all; of whitened vectors, those closest to the originals

    Components without variance, which a small catalogue has, are left out: of ``zca`` they are 0.

    Args:
        vectors: float32 ``[n, t]``.
        kind: one of these, or ``none``.
        width: most components of ``pca`` and ``whiten``; None: all.

    Returns:
        float32 ``[n, w]``, with w = t for ``none`` and ``zca``.

    References:
        Jianlin Su et al., "Whitening Sentence Representations for Better Semantics and Faster Retrieval", 2021.
        Junjie Huang et al., "WhiteningBERT: An Easy Unsupervised Sentence Embedding Approach", Findings of EMNLP 2021.
    """
    if kind == "none":
        return vectors
    centered = torch.from_numpy(vectors).double()
    centered = centered - centered.mean(dim=0)
    variances, axes = torch.linalg.eigh(centered.T @ centered / len(centered))
    variances, axes = variances.flip(0), axes.flip(1)
    # An eigenvector's sign is free: the entry of largest size is made positive, so that machines agree.
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    kept = int((variances > variances[0] * _LEAST_VARIANCE).sum())
    if kind != "zca" and width is not None:
        kept = min(kept, width)
    variances, axes = variances[:kept], axes[:, :kept]
    components = centered @ axes
    if kind != "pca":
        components = components * variances.rsqrt()
    return (components @ axes.T if kind == "zca" else components).float().numpy()
