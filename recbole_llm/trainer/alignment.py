"""Alignment of item vectors with text vectors: one joint vector for who bought an item and what it is called.

Stage 1 of Sein Kim et al., "Large Language Models meet Collaborative Filtering", KDD 2024, section 4.1. It is
trained before the recommender that uses it, from tensors alone: the teacher's vectors, the texts' vectors and, for each
training sequence, the teacher's user representation and the item that came next.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recbole_llm.checkpoint import write_tensors
from recbole_llm.loss.alignment import AlignmentLosses, alignment_loss

_BETAS = (0.9, 0.98)  # of Adam, in the public code
_TRIES = 10


class AlignmentOutput(NamedTuple):
    """What the auto-encoders make of ``[..., d]`` item vectors and ``[..., t]`` text vectors.

    Attributes:
        item_latent, text_latent: e and q, ``[..., latent size]``.
        item_reconstructed, text_reconstructed: E' and Q', ``[..., d]`` and ``[..., t]``.
    """

    item_latent: Tensor
    item_reconstructed: Tensor
    text_latent: Tensor
    text_reconstructed: Tensor


class ItemAlignment(nn.Module):
    """Two auto-encoders with one latent space: Linear and sigmoid there, Linear back (the paper's public code).

    Args:
        item_size: width d of the teacher's item vectors.
        text_size: width t of the texts' vectors.
        latent_size: width of the joint vectors, 128 in the public code.
    """

    def __init__(self, item_size: int, text_size: int, latent_size: int = 128) -> None:
        super().__init__()
        self.item_encoder = nn.Sequential(nn.Linear(item_size, latent_size), nn.Sigmoid())
        self.item_decoder = nn.Linear(latent_size, item_size)
        self.text_encoder = nn.Sequential(nn.Linear(text_size, latent_size), nn.Sigmoid())
        self.text_decoder = nn.Linear(latent_size, text_size)

    def joint(self, item_vectors: Tensor) -> Tensor:
        """The joint vectors of items that the teacher knows: ``[..., d]`` to ``[..., latent size]``, each in (0, 1)."""
        return self.item_encoder(item_vectors)

    def forward(self, item_vectors: Tensor, text_vectors: Tensor) -> AlignmentOutput:
        """Encode and decode ``[..., d]`` item vectors and ``[..., t]`` text vectors."""
        item_latent, text_latent = self.item_encoder(item_vectors), self.text_encoder(text_vectors)
        return AlignmentOutput(
            item_latent, self.item_decoder(item_latent), text_latent, self.text_decoder(text_latent)
        )


def draw_negatives(
    positives: np.ndarray, histories: np.ndarray | None, items: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw for each user an item, uniformly among those that are neither the next one nor in the history.

    A user who has had every item gets any other than the next one.

    Args:
        positives: next items, int64 ``[N]``.
        histories: items not to draw, 0 = padding, int64 ``[N, L]``; None: only the next item is not drawn.
        items: size of the catalog with item 0, the padding; at least 3.
        generator: source of randomness.

    Returns:
        int64 ``[N]``, from 1 to ``items - 1``.
    """
    known = positives[:, None] if histories is None else np.concatenate([positives[:, None], histories], axis=1)
    negatives = generator.integers(1, items, len(positives))
    for _ in range(_TRIES):
        again = np.flatnonzero((known == negatives[:, None]).any(axis=1))
        if len(again) == 0:
            return negatives
        negatives[again] = generator.integers(1, items, len(again))
    # Who is left has most of the catalog: list what remains.
    for row in np.flatnonzero((known == negatives[:, None]).any(axis=1)):
        free = np.setdiff1d(np.arange(1, items), known[row])
        if len(free) == 0:
            free = np.setdiff1d(np.arange(1, items), positives[row])
        negatives[row] = generator.choice(free)
    return negatives


def train_alignment(
    teacher_vectors: Tensor,
    text_vectors: Tensor,
    users: Tensor,
    positives: Tensor,
    histories: Tensor | None = None,
    *,
    latent_size: int = 128,
    epochs: int = 10,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    weights: Mapping[str, float] | None = None,
    score: str = "mean",
    seed: int = 2020,
    device: str | torch.device = "cpu",
    progress: Callable[[int, dict[str, float]], None] | None = None,
    checkpoint: str | Path | None = None,
) -> ItemAlignment:
    """Train the two auto-encoders.

    One row is one training sequence: the paper and its public code take the last position of each user's. Each epoch
    goes through the rows in a new order and draws a new negative for each.

    The public code also fine-tunes the sentence encoder; here the texts' vectors are given, so that they are computed
    once and the text reconstruction has a target that stays. It goes through the users in one fixed order; here the
    order is drawn. Defaults are its settings: Adam at 1e-4 with betas 0.9 and 0.98, batches of 16, and the 10 epochs
    after which it goes on to stage 2.

    Args:
        teacher_vectors: the teacher's item vectors, ``[items, d]``, row 0 the padding; not changed.
        text_vectors: the items' texts' vectors, ``[items, t]``; not changed.
        users: the teacher's user representation of each row, ``[N, d]``; not changed.
        positives: the item that came next, int64 ``[N]``, from 1 to ``items - 1``.
        histories: items of each row that are no negatives, 0 = padding, int64 ``[N, L]``; None: any item but the next
            one may be.
        latent_size: width of the joint vectors.
        epochs: passes over the rows; 0 gives the auto-encoders as they begin.
        batch_size: rows in a step.
        learning_rate: of Adam.
        weights: of the parts of the loss, by the names that ``alignment_loss`` has: ``matching_weight`` and so on.
        score: see :func:`recbole_llm.loss.alignment.recommendation_loss`.
        seed: of first weights, order and negatives; the global random states are left as they were.
        device: where it is trained, and where the result lies.
        progress: is called after each epoch with its number, from 1, and the mean of each part of the loss.
        checkpoint: a safetensors file, written after each epoch. A later call with the same data and settings goes on
            from it, whatever its ``epochs``; one with others begins anew and overwrites it. Training that went on gives
            what training in one go gives.

    Returns:
        the trained auto-encoders, frozen, in evaluation mode.

    Raises:
        ValueError: tensors that do not belong together, or settings that make no sense.
    """
    device = torch.device(device)
    items, weights = len(teacher_vectors), dict(weights or {})
    _check(teacher_vectors, text_vectors, users, positives, histories, epochs, batch_size)
    item_table, text_table, states = (
        tensor.detach().to(device, torch.float32) for tensor in (teacher_vectors, text_vectors, users)
    )
    next_items = positives.detach().cpu().numpy().astype(np.int64)
    seen = None if histories is None else histories.detach().cpu().numpy().astype(np.int64)

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = ItemAlignment(item_table.shape[1], text_table.shape[1], latent_size).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=_BETAS)

    done = 0
    if checkpoint is not None:
        settings = [latent_size, batch_size, learning_rate, sorted(weights.items()), score, seed]
        arrays = [tensor.cpu().numpy() for tensor in (item_table, text_table, states)]
        digest = _digest(settings, [*arrays, next_items, *([] if seen is None else [seen])])
        done = _restore(Path(checkpoint), digest, model, optimizer, epochs)
    for epoch in range(done + 1, epochs + 1):
        # Each epoch has randomness of its own, so that it does not matter where the training was taken up.
        generator = np.random.default_rng([seed, epoch])
        order = generator.permutation(len(next_items))
        candidates = np.stack([next_items, draw_negatives(next_items, seen, items, generator)], axis=1)
        sums = torch.zeros(len(AlignmentLosses._fields), device=device)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            chosen = torch.from_numpy(candidates[rows]).to(device)
            item, text = item_table[chosen], text_table[chosen]
            output = model(item, text)
            user = states[torch.from_numpy(rows).to(device)]
            losses = alignment_loss(
                user,
                item,
                output.item_latent,
                output.item_reconstructed,
                text,
                output.text_latent,
                output.text_reconstructed,
                score=score,
                **weights,
            )
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
            sums += torch.stack(losses).detach() * len(rows)
        means = dict(zip(AlignmentLosses._fields, (sums / len(order)).tolist(), strict=True))
        if not all(map(math.isfinite, means.values())):
            raise ValueError(f"the alignment's loss is not finite in epoch {epoch}: {means}; lower learning_rate")
        if checkpoint is not None:
            _save(Path(checkpoint), digest, model, optimizer, epoch)
        if progress is not None:
            progress(epoch, means)
    return model.requires_grad_(False).eval()


def _check(
    teacher_vectors: Tensor,
    text_vectors: Tensor,
    users: Tensor,
    positives: Tensor,
    histories: Tensor | None,
    epochs: int,
    batch_size: int,
) -> None:
    items, rows = len(teacher_vectors), len(users)
    if items < 3:
        raise ValueError(f"negatives need a catalog of at least 2 items beside the padding, not {items - 1}")
    if len(text_vectors) != items:
        raise ValueError(f"there are {items} item vectors and {len(text_vectors)} text vectors")
    if users.shape[1:] != teacher_vectors.shape[1:]:
        raise ValueError(f"users are {tuple(users.shape)}, items {tuple(teacher_vectors.shape)}: widths differ")
    if rows == 0 or positives.shape != (rows,) or (histories is not None and len(histories) != rows):
        raise ValueError(
            f"users, positives and histories must have one row for each sequence, at least one: {tuple(users.shape)}, "
            f"{tuple(positives.shape)}, {None if histories is None else tuple(histories.shape)}"
        )
    if positives.min() < 1 or positives.max() >= items:
        raise ValueError(f"positives must be from 1 to {items - 1}")
    if epochs < 0 or batch_size < 1:
        raise ValueError(f"epochs must be at least 0 and batch_size at least 1, not {epochs} and {batch_size}")


# ---- Checkpoints


def _digest(settings: list, arrays: list[np.ndarray]) -> Tensor:
    """Sha256 of what decides the training, as a tensor of 32 bytes."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _save(file: Path, digest: Tensor, model: ItemAlignment, optimizer: torch.optim.Adam, epoch: int) -> None:
    tensors = {"digest": digest, "epoch": torch.tensor(epoch)}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, tensors)


def _restore(file: Path, digest: Tensor, model: ItemAlignment, optimizer: torch.optim.Adam, epochs: int) -> int:
    """Take up a checkpoint's weights and optimizer state, if it is of this training.

    Returns:
        how many epochs it has; 0 where there is none, it is of other data or settings, has more epochs or is damaged.
    """
    if not file.is_file():
        return 0
    try:
        tensors = load_file(file)
        epoch = int(tensors["epoch"])
        if not torch.equal(tensors["digest"], digest) or epoch > epochs:
            return 0
    except (OSError, SafetensorError, KeyError, ValueError):
        return 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"weight/{name}"])
    state = {
        index: {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for index, (name, _) in enumerate(model.named_parameters())
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return epoch
