"""Small trained networks between the teacher's space, the LLM's space and the recommendation space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_NEWEST = 0.3  # weight of the newest batch in the moving averages
ACTIVATIONS = {"leaky_relu": nn.LeakyReLU, "gelu": nn.GELU, "relu": nn.ReLU}


def projection(input_size: int, hidden_size: int, output_size: int, activation: str = "leaky_relu") -> nn.Sequential:
    """Build Linear, LayerNorm, activation, Linear: the projection of the public LLM-SRec code.

    Used for f_I (teacher's item vectors into the LLM), f_item and f_user (hidden states into the recommendation space)
    and f_CF-user (teacher's user vectors into the recommendation space, with GELU). Weights are Xavier-normal, biases 0.

    Args:
        input_size, hidden_size, output_size: widths.
        activation: ``leaky_relu`` or ``gelu``.
    """
    network = nn.Sequential(
        nn.Linear(input_size, hidden_size),
        nn.LayerNorm(hidden_size),
        ACTIVATIONS[activation](),
        nn.Linear(hidden_size, output_size),
    )
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


def perceptron(input_size: int, hidden_size: int, output_size: int, activation: str = "gelu") -> nn.Sequential:
    """Build Linear, activation, Linear: the projector of item vectors into the LLM in LLaRA's public code, and in RSLLM.

    Args:
        input_size, hidden_size, output_size: widths.
        activation: ``gelu``, or ``relu`` as in CoLLM's public code.
    """
    return nn.Sequential(
        nn.Linear(input_size, hidden_size), ACTIVATIONS[activation](), nn.Linear(hidden_size, output_size)
    )


class Standardize(nn.Module):
    """Center and scale each dimension of the states that a head reads.

    What the hidden states at out tokens have in common is a hundred times what tells them apart: read as they are, a head sees
    nearly the same vector for every user. Mean and deviation are those of the first batch of the training; or of each batch,
    and their moving averages afterwards, which is batch normalization without trained factors. They are kept with the trained
    parameters, and no gradient moves them. Before they are measured the states pass as they are.

    Args:
        size: width of the states.
        by: ``first`` or ``each``.

    References:
        Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift", 2015.
    """

    def __init__(self, size: int, by: str = "first") -> None:
        super().__init__()
        self.by = by
        self.center = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.zeros(size))  # 1 / deviation; 0 until measured
        self._measured = False

    def forward(self, states: Tensor) -> Tensor:
        self._measured = self._measured or bool(self.scale.any())
        if self.training and self.by == "each" and len(states) > 1:
            center, deviation = states.mean(dim=0), _deviation(states)
            self._keep(center.detach(), deviation.detach())
            return (states - center) / deviation
        if not self._measured:
            if not self.training:
                return states
            self._keep(states.detach().mean(dim=0), _deviation(states.detach()))
        return (states - self.center.detach()) * self.scale.detach()

    @torch.no_grad()
    def _keep(self, center: Tensor, deviation: Tensor) -> None:
        share = _NEWEST if self._measured else 1.0
        self.center.lerp_(center, share)
        before = 1 / self.scale if self._measured else deviation
        self.scale.copy_(1 / before.lerp(deviation, share))
        self._measured = True


def _deviation(states: Tensor) -> Tensor:
    """The deviation of each dimension, ``[size]``; one in which a small batch hardly differs must not outweigh the others."""
    deviation = (states - states.mean(dim=0)).square().mean(dim=0).clamp_min(1e-12).sqrt()
    return deviation.clamp_min(max(0.01 * deviation.mean().item(), 1e-6))


class Scale(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: Tensor) -> Tensor:
        return self.factor * values


def standardized_projection(input_size: int, hidden_size: int, output_size: int, by: str = "first") -> nn.Sequential:
    """:func:`projection` of standardized states, so scaled that scores of two such heads begin with a deviation of about 1.

    Args:
        input_size, hidden_size, output_size: widths.
        by: see :class:`Standardize`.
    """
    return nn.Sequential(
        Standardize(input_size, by), projection(input_size, hidden_size, output_size), Scale(output_size**-0.25)
    )
