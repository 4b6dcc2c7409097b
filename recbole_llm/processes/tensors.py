"""Rows of tensors that several processes compute a part of each.

All processes hold the same loss L: each computes the rows of its share, and :func:`gather` brings them together. A weight's
gradient of L is then the mean of the processes' gradients (:func:`mean_gradients`), whatever lies before and behind
``gather``: a sum over the parts of what is shared, N times the same of what is not, divided by N.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.autograd.graph import increment_version

from recbole_llm.processes.group import joined, rank, size, wait

_BUCKET = 2**24  # numbers that travel at a time

Shares = list[np.ndarray]


def shares(weights: np.ndarray) -> Shares | None:
    """Divide rows among the processes so that each has about the same total weight.

    Args:
        weights: tokens of each row, say, ``[n]``.

    Returns:
        for each process its rows, int64, ascending; together ``range(n)``. None where each computes all rows: there is one
        process, or fewer rows than processes.
    """
    count = size()
    if count == 1 or len(weights) < count:
        return None
    order = np.argsort(-np.asarray(weights, dtype=np.int64), kind="stable")
    # Forth and back, so that whoever got the longest row of one round gets the shortest of the next.
    place = np.arange(len(order)) % (2 * count)
    owner = np.where(place < count, place, 2 * count - 1 - place)
    return [np.sort(order[owner == process]) for process in range(count)]


def gather(rows: Tensor, divided: Shares | None) -> Tensor:
    """Bring the processes' rows together.

    Args:
        rows: those of this process's share, ``[len(divided[rank]), ...]``.
        divided: from :func:`shares`; None: ``rows`` are all.

    Returns:
        all rows in order, ``[n, ...]``, differentiable in ``rows``.
    """
    if divided is None:
        return rows
    order = torch.from_numpy(np.argsort(np.concatenate(divided), kind="stable")).to(rows.device)
    counts = [len(share) for share in divided]
    if torch.is_grad_enabled():
        # All processes need the node in their graphs, whether or not their own rows depend on a weight.
        anchor = torch.zeros((), device=rows.device, requires_grad=True)
        return _Gather.apply(rows, anchor, counts)[order]
    return _all_rows(rows, counts)[order]


def gather_lists(lists: Sequence[Sequence[int]], divided: Shares | None, device: torch.device) -> list[list[int]]:
    """:func:`gather` of lists of whole numbers from 0."""
    if divided is None:
        return [list(numbers) for numbers in lists]
    lengths = gather(torch.tensor([len(numbers) for numbers in lists], device=device), divided).tolist()
    table = torch.zeros((len(lists), max(1, *lengths)), dtype=torch.int64, device=device)
    for row, numbers in enumerate(lists):
        table[row, : len(numbers)] = torch.tensor(list(numbers), dtype=torch.int64)
    return [row[:length] for row, length in zip(gather(table, divided).tolist(), lengths, strict=True)]


def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes; a weight that has one nowhere stays without."""
    if size() == 1:
        return
    parameters = list(parameters)
    has = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    if not parameters:
        return
    has = _sum(has.to(parameters[0].device))
    wanted = [parameter for parameter, count in zip(parameters, has.tolist(), strict=True) if count]
    for bucket in _buckets(wanted):
        parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in bucket]
        flat = _sum(torch.cat([part.reshape(-1) for part in parts])).div_(size())
        for parameter, values in zip(bucket, flat.split([len(part.reshape(-1)) for part in parts]), strict=True):
            parameter.grad = values.view_as(parameter).clone()


def same_weights(parameters: Iterable[nn.Parameter]) -> None:
    """Give the weights of the main process to all."""
    if size() == 1:
        return
    with torch.no_grad():
        for parameter in parameters:
            values = parameter.detach().contiguous()
            meeting = joined().watch.arrive()
            wait(distributed.broadcast(values, 0, async_op=True), meeting)
            if rank() != 0:
                parameter.copy_(values)
                increment_version([parameter])


def _buckets(parameters: list[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and (
            parameter.dtype != bucket[0].dtype or sum(one.numel() for one in bucket) + parameter.numel() > _BUCKET
        ):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _sum(values: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    meeting = joined().watch.arrive()
    wait(distributed.all_reduce(values, async_op=True), meeting)
    return values


def _all_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """The processes' rows one after the other."""
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    meeting = joined().watch.arrive()
    wait(distributed.all_gather(parts, padded, async_op=True), meeting)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _Gather(torch.autograd.Function):
    """:func:`_all_rows`; the gradient of a row is the sum of what all processes say of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, anchor: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _all_rows(rows.detach(), counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _sum(gradients[0].contiguous().clone()).split(ctx.counts)[rank()], None, None
