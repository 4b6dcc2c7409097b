"""Small trained networks between the teacher's space, the LLM's space and the recommendation space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
    nearly the same vector for every user. Mean and deviation are those of the first batch of the training. They are kept with
    the trained parameters, and no gradient moves them. Before they are measured the states pass as they are.

    Args:
        size: width of the states.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.zeros(size))  # 1 / deviation; 0 until measured
        self._measured = False

    def forward(self, states: Tensor) -> Tensor:
        self._measured = self._measured or bool(self.scale.any())
        if not self._measured:
            if not self.training:
                return states
            self._measure(states.detach())
        return (states - self.center.detach()) * self.scale.detach()

    @torch.no_grad()
    def _measure(self, states: Tensor) -> None:
        deviation = states.std(dim=0, correction=0)
        self.center.copy_(states.mean(dim=0))
        # A dimension in which a small batch hardly differs must not come to outweigh the others.
        self.scale.copy_(1 / deviation.clamp_min(max(0.01 * deviation.mean().item(), 1e-6)))
        self._measured = True


class Scale(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: Tensor) -> Tensor:
        return self.factor * values


def standardized_projection(input_size: int, hidden_size: int, output_size: int) -> nn.Sequential:
    """:func:`projection` of standardized states, so scaled that scores of two such heads begin with a deviation of about 1.

    Args:
        input_size, hidden_size, output_size: widths.
    """
    return nn.Sequential(
        Standardize(input_size), projection(input_size, hidden_size, output_size), Scale(output_size**-0.25)
    )
