"""Distillation of the teacher's user representation (LLM-SRec, Kim et al. 2025, equation 2 and Table 12)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def distillation_loss(
    student: Tensor, teacher: Tensor, kind: str = "mse", reduction: str = "mean", temperature: float = 0.07
) -> Tensor:
    r"""Distance between the student's and the projected teacher's user representations, both on the unit sphere.

    .. math::
        L_{distill} = \frac{1}{B} \sum_u \frac{1}{d'} \| \hat t_u - \hat h_u \|^2   \qquad (mse, mean)

        L_{distill} = - \frac{1}{B} \sum_u \log
            \frac{e^{\hat h_u \cdot \hat t_u / \tau}}{\sum_v e^{\hat h_u \cdot \hat t_v / \tau}}   \qquad (infonce)

    The squared distance of unit vectors is at most 4: averaged over d' = 128 dimensions the loss is at most 0.031 and
    nearly silent beside the others. ``reduction="sum"`` drops the division by d'.

    Args:
        student: f_user(h_U), ``[B, d']``.
        teacher: f_CF-user(O_u), ``[B, d']``.
        kind: ``mse``, or ``infonce`` (the alternative of Table 12).
        reduction: over dimensions, for ``mse``: ``mean`` (public code) or ``sum``.
        temperature: of ``infonce`` (0.07 in the public code).

    Returns:
        scalar.
    """
    student, teacher = functional.normalize(student, dim=-1), functional.normalize(teacher, dim=-1)
    if kind == "infonce":
        return functional.cross_entropy(student @ teacher.T / temperature, torch.arange(len(student), device=student.device))
    squared = (student - teacher).square()
    return squared.mean() if reduction == "mean" else squared.sum(dim=-1).mean()
