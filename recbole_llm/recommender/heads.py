"""Small trained networks between the teacher's space, the LLM's space and the recommendation space."""

from __future__ import annotations

from torch import nn

ACTIVATIONS = {"leaky_relu": nn.LeakyReLU, "gelu": nn.GELU}


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


def perceptron(input_size: int, hidden_size: int, output_size: int) -> nn.Sequential:
    """Build Linear, GELU, Linear: the projector of item vectors into the LLM in LLaRA's public code, and in RSLLM.

    Args:
        input_size, hidden_size, output_size: widths.
    """
    return nn.Sequential(nn.Linear(input_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, output_size))
