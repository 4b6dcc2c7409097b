"""Tests of differences between two models, paired by user."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from recbole_llm.evaluation.randomness import CHUNK_ELEMENTS

_NORMAL_95 = 1.959964  # the 97.5% point of the normal distribution

_RESAMPLES = 10_000
_EXACT_UP_TO = 13  # 2**13 sign patterns are fewer than the resamples


def paired_test(a: np.ndarray, b: np.ndarray, seed: int = 0) -> dict[str, float]:
    r"""Test whether model ``a`` differs from model ``b`` over the same users, in the mean of a metric.

    The sign-flip (Fisher's randomization) test: if the models were interchangeable, each user's difference
    :math:`d_u = a_u - b_u` could as well have been :math:`-d_u`, so that the observed mean is compared with the means
    of :math:`\pm d_u`. All sign patterns are taken where there are few differences other than 0, else 10,000
    random ones. The 95% interval is the mean difference plus and minus the 95% point of the same distribution, so that
    interval and p value never contradict each other: 0 lies outside exactly where p <= 0.05.

    Why this test. Ranking metrics of single users are discrete and mostly tied: most differences are 0, and those of
    HR@k are -1, 0 or 1, for which this is McNemar's exact test. It assumes nothing about their distribution. Smucker,
    Allan & Carterette (CIKM 2007) find that it and the t-test agree, and that Wilcoxon's signed ranks and the sign test
    answer a question other than that of the mean. Where many users differ, the paired t-test gives the same p values;
    where few differ at all, it claims significance too early (five differences, all of one sign, among 1,000 users:
    t-test p = 0.025, while five coins agree with probability 0.0625).

    Args:
        a, b: ``[users]`` values of the same users in the same order, one per user.
        seed: of the random sign patterns.

    Returns:
        ``difference`` (mean of a - b), ``low`` and ``high`` (95% interval), ``p_value`` (two-sided), ``users``.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"paired values must be two equally long lists, not {a.shape} and {b.shape}")
    differences = a - b
    mean = float(differences.mean())
    null = np.abs(_sign_flip_sums(differences[differences != 0], seed)) / len(a)
    # Sums of the same numbers in another order differ in the last bits, and count as equal.
    null[np.isclose(null, abs(mean), rtol=0.0, atol=1e-9 * np.abs(differences).mean())] = abs(mean)
    p_value = float(np.mean(null >= abs(mean)))
    half_width = float(np.sort(null)[-1 - len(null) // 20])  # at most 5% lie beyond it
    return {
        "difference": mean,
        "low": mean - half_width,
        "high": mean + half_width,
        "p_value": p_value,
        "users": len(a),
    }


def auc_test(labels: np.ndarray, a: ArrayLike, b: ArrayLike) -> dict[str, float]:
    """Test whether model ``a`` differs from model ``b`` in the area under the ROC curve over the same rows.

    DeLong, DeLong & Clarke-Pearson (Biometrics 1988): the area is the mean, over the liked rows, of the share of others
    below them (ties count half), and as well the mean, over the others, of the share of liked rows above them. The
    variances of these shares' differences between the models, each divided by its number of rows, add up to that of the
    difference of the areas.

    Args:
        labels: ``[rows]`` 1 or 0, at least two of each.
        a, b: ``[seeds, rows]`` values of the same rows; areas are averaged over the seeds.

    Returns:
        as :func:`paired_test`; ``users`` counts the rows.
    """
    liked = np.asarray(labels) == 1
    shares = _auc_shares(liked, a) - _auc_shares(liked, b)
    difference = float(shares[liked].mean())
    error = math.sqrt(sum(shares[group].var(ddof=1) / group.sum() for group in (liked, ~liked)))
    return {
        "difference": difference,
        "low": difference - _NORMAL_95 * error,
        "high": difference + _NORMAL_95 * error,
        "p_value": math.erfc(abs(difference) / error / math.sqrt(2)) if error > 0 else float(difference == 0),
        "users": len(liked),
    }


def _auc_shares(liked: np.ndarray, values: ArrayLike) -> np.ndarray:
    """For each liked row the share of the others below it, for each other row that of the liked above it: ``[rows]``,
    the mean over the seeds of ``values`` ``[seeds, rows]``."""
    rows = np.asarray(values, dtype=np.float64)
    among_all, shares = rankdata(rows, axis=1), np.empty(rows.shape)
    for group in (liked, ~liked):
        shares[:, group] = (among_all[:, group] - rankdata(rows[:, group], axis=1)) / (~group).sum()
    shares[:, ~liked] = 1 - shares[:, ~liked]
    return shares.mean(axis=0)


def _sign_flip_sums(differences: np.ndarray, seed: int) -> np.ndarray:
    """Return the sums of ``differences`` under all sign patterns, or under random ones and the observed one."""
    size = len(differences)
    total = differences.sum()
    if size <= _EXACT_UP_TO:
        positive = (np.arange(2**size)[:, None] >> np.arange(size)) & 1
        return 2.0 * (positive @ differences) - total
    generator = np.random.Generator(np.random.PCG64(seed))
    sums = [np.array([total])]  # the observed pattern is one of the possible ones, so that no p value is 0
    step = max(1, CHUNK_ELEMENTS // size)
    for start in range(0, _RESAMPLES, step):
        count = min(step, _RESAMPLES - start)
        random_bytes = np.frombuffer(generator.bytes(count * ((size + 7) // 8)), dtype=np.uint8).reshape(count, -1)
        positive = np.unpackbits(random_bytes, axis=1, count=size)
        sums.append(2.0 * (positive.astype(np.float64) @ differences) - total)
    return np.concatenate(sums)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p values for their number: the i-th smallest of m is multiplied by m - i + 1, and none falls below its
    predecessor's."""
    adjusted = {}
    largest = 0.0
    for place, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p_value * (len(p_values) - place)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
