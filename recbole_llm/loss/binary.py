"""Binary cross-entropy of the next item against a random one, SASRec's own loss (Kang and McAuley, 2018, equation 6)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def binary_loss(positive: Tensor, negative: Tensor) -> Tensor:
    r"""Each position's next item should have a high score, an item that the user does not have a low one.

    .. math::
        L = - \frac{1}{P} \sum_p \log \sigma(s_p^+) - \frac{1}{P} \sum_p \log (1 - \sigma(s_p^-))

    Args:
        positive: scores of the next items, ``[P]``.
        negative: scores of the drawn items, ``[P]``.

    Returns:
        scalar.
    """
    return functional.softplus(-positive).mean() + functional.softplus(negative).mean()
