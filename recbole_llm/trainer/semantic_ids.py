"""Semantic ids: a tuple of codes for each item, by a residual-quantized auto-encoder (RQ-VAE) of its text's vector.

Stage 1 of Shashank Rajput et al., "Recommender Systems with Generative Retrieval" (TIGER), NeurIPS 2023, section 3.1. It is
trained before the recommender that uses it, from the texts' vectors alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger

import numpy as np
import torch
from torch import Tensor, nn

from recbole_llm.errors import UserError
from recbole_llm.loss.quantization import quantization_loss

KMEANS_ROUNDS = 10


@dataclass(frozen=True)
class QuantizerSettings:
    """What the auto-encoder and its training are.

    Attributes:
        levels: codes of an item, without the one that tells items of the same codes apart.
        codebook_size: code vectors of a level.
        hidden_sizes: hidden widths of the encoder; the decoder has them in reverse.
        latent_size: width of code vectors.
        commitment_weight: beta of :func:`~recbole_llm.loss.quantization.quantization_loss`.
        epochs: passes over the items.
        batch_size: items in a step.
        learning_rate: of Adam.
    """

    levels: int
    codebook_size: int
    hidden_sizes: Sequence[int]
    latent_size: int
    commitment_weight: float
    epochs: int
    batch_size: int
    learning_rate: float


def _perceptron(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class ResidualQuantizer(nn.Module):
    """Encoder, codebooks, decoder. At each level the nearest code vector is taken, and the next one codes what is left.

    Args:
        size: width of the vectors that are coded.
        settings: see :class:`QuantizerSettings`.
    """

    def __init__(self, size: int, settings: QuantizerSettings) -> None:
        super().__init__()
        sizes = [size, *settings.hidden_sizes, settings.latent_size]
        self.settings = settings
        self.encoder, self.decoder = _perceptron(sizes), _perceptron(sizes[::-1])
        self.codebooks = nn.Parameter(torch.zeros(settings.levels, settings.codebook_size, settings.latent_size))

    @torch.no_grad()
    def begin_codebooks(self, vectors: Tensor) -> None:
        """Begin the code vectors of each level at the centers that k-means finds in the residuals of vectors ``[n, size]``."""
        residual = self.encoder(vectors)
        for level in range(self.settings.levels):
            # Centers begin at random rows, repeated where there are too few, and slightly apart.
            rows = torch.cat([torch.randperm(len(residual)) for _ in range(-(-self.settings.codebook_size // len(residual)))])
            centers = residual[rows[: self.settings.codebook_size]].clone()
            centers += 1e-4 * residual.std() * torch.randn(centers.shape).to(centers.device)
            for _ in range(KMEANS_ROUNDS):
                nearest = torch.cdist(residual, centers).argmin(dim=1)
                sums = torch.zeros_like(centers).index_add_(0, nearest, residual)
                counts = torch.bincount(nearest, minlength=len(centers))[:, None]
                centers = torch.where(counts > 0, sums / counts.clamp_min(1), centers)
            self.codebooks[level] = centers
            residual = residual - centers[torch.cdist(residual, centers).argmin(dim=1)]

    def quantize(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The codes of ``[B, d]``: int64 ``[B, levels]``, with the residuals and the code vectors ``[B, levels, d]``."""
        codes, residuals, vectors, residual = [], [], [], latent
        for codebook in self.codebooks:
            code = torch.cdist(residual.detach(), codebook.detach()).argmin(dim=1)
            codes.append(code)
            residuals.append(residual)
            vectors.append(codebook[code])
            residual = residual - vectors[-1]
        return torch.stack(codes, 1), torch.stack(residuals, 1), torch.stack(vectors, 1)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of the loss of vectors ``[B, size]``: reconstruction, with the gradient passed straight through the
        codes, and quantization."""
        latent = self.encoder(vectors)
        _, residuals, chosen = self.quantize(latent)
        straight = latent + (chosen.sum(dim=1) - latent).detach()
        reconstruction = (self.decoder(straight) - vectors).square().sum(dim=1).mean()
        return reconstruction, quantization_loss(residuals, chosen, self.settings.commitment_weight)


def tell_apart(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """Append to codes int64 ``[N, levels]`` a last one, which counts the items of the same codes: int64 ``[N, levels + 1]``.

    Raises:
        UserError: more items share their codes than a last code can count.
    """
    _, group = np.unique(codes, axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) != 0])
    last = np.empty(len(codes), dtype=np.int64)
    last[order] = np.arange(len(codes)) - np.repeat(starts, np.diff(np.r_[starts, len(codes)]))
    if last.max() >= codebook_size:
        raise UserError(
            f"codebook_size: {last.max() + 1} items have the same semantic id, and the code that tells them apart has "
            f"{codebook_size} values: raise rqvae_epochs or codebook_size, or give items other texts (item_text)."
        )
    return np.concatenate([codes, last[:, None]], axis=1)


def semantic_ids(vectors: Tensor, settings: QuantizerSettings, seed: int, device: torch.device | str) -> np.ndarray:
    """Train an RQ-VAE on the vectors of items' texts ``[N, size]`` and return each item's codes.

    Args:
        vectors: not changed.
        seed: of first weights and of the order; the global random state is left as it was.
        device: where it is trained.

    Returns:
        int64 ``[N, levels + 1]``, distinct rows, each code from 0 to below ``codebook_size``.

    Raises:
        UserError: a loss that is not finite, or too many items of one id.
    """
    vectors = vectors.detach().to(device, torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = ResidualQuantizer(vectors.shape[1], settings).to(device)
        model.begin_codebooks(vectors)
        optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
        total = torch.zeros(())
        for _ in range(settings.epochs):
            for rows in torch.randperm(len(vectors)).split(settings.batch_size):
                reconstruction, quantization = model(vectors[rows.to(vectors.device)])
                total = reconstruction + quantization
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
        if not torch.isfinite(total):
            raise UserError("rqvae_learning_rate: the loss of the semantic ids is not finite; lower it.")
    with torch.no_grad():
        codes = model.quantize(model.encoder(vectors))[0].cpu().numpy()
    distinct = len(np.unique(codes, axis=0))
    getLogger().info(f"Semantic ids: {distinct} tuples of {settings.levels} codes for {len(codes)} items")
    return tell_apart(codes, settings.codebook_size)
