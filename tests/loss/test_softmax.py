"""Losses and ranking over a whole catalogue: against the plain computation, by hand, and in expectation."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_llm.loss.softmax import NegativeSampler, full_softmax_loss, sampled_softmax_loss, target_counts, top_items

POSITIONS, ITEMS, SIZE = 23, 101, 8


def head(dtype=torch.float32, seed=0):
    """Hidden states, an item head with float32 weights (float64 beside float64), targets, and a weight per position."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(POSITIONS, SIZE, generator=generator).to(dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(ITEMS, SIZE, generator=generator).to(wide).requires_grad_()
    targets = torch.randint(ITEMS, (POSITIONS,), generator=generator)
    targets[:2] = torch.tensor([0, ITEMS - 1])
    return hidden, weight, targets, torch.randn(POSITIONS, generator=generator).to(wide)


def value_and_gradients(hidden, weight, targets, upstream, **chunks):
    loss = full_softmax_loss(hidden, weight, targets, **chunks)
    return loss.detach(), *torch.autograd.grad((loss * upstream).sum(), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("chunk_items", "chunk_positions"), [(10, 7), (101, 1), (1, 100), (500, 23)])
def test_chunks_change_neither_the_loss_nor_its_gradients(dtype, chunk_items, chunk_positions):
    inputs = head(dtype)
    plain = value_and_gradients(*inputs, chunk_items=None)
    chunked = value_and_gradients(*inputs, chunk_items=chunk_items, chunk_positions=chunk_positions)
    assert [tensor.dtype for tensor in chunked] == [inputs[1].dtype, dtype, inputs[1].dtype]
    for ours, theirs in zip(chunked, plain, strict=True):
        # bfloat16: the same float32 gradient of the hidden states may round to a neighbour.
        torch.testing.assert_close(ours, theirs, **({"rtol": 8e-3, "atol": 1e-5} if ours.dtype == torch.bfloat16 else {}))


def test_the_plain_loss_is_the_logarithm_of_the_softmax():
    hidden, weight, targets, _ = head(torch.float64)
    chances = torch.softmax(hidden @ weight.T, dim=1).tolist()
    expected = [-math.log(row[target]) for row, target in zip(chances, targets.tolist(), strict=True)]
    assert full_softmax_loss(hidden, weight, targets, None).tolist() == pytest.approx(expected)


def test_large_logits_do_not_overflow_in_chunks():
    hidden, weight, targets, upstream = head()
    inputs = ((hidden * 100).detach().requires_grad_(), weight, targets, upstream)
    for ours, theirs in zip(
        value_and_gradients(*inputs, chunk_items=9), value_and_gradients(*inputs, chunk_items=None), strict=True
    ):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", [0, 1])
def test_a_frozen_side_gets_no_gradient(trained):
    hidden, weight, targets, upstream = head()
    plain = value_and_gradients(hidden, weight, targets, upstream, chunk_items=None)[1 + trained]
    pair = [hidden.detach(), weight.detach()]
    pair[trained].requires_grad_()
    full_softmax_loss(*pair, targets, 10).backward(upstream)
    torch.testing.assert_close(pair[trained].grad, plain)
    assert pair[1 - trained].grad is None


def test_a_target_outside_the_catalogue_cannot_go_unseen():
    hidden, weight, targets, _ = head()
    targets[3] = ITEMS  # an item id where its row was meant
    assert full_softmax_loss(hidden, weight, targets, 10).isnan().nonzero().tolist() == [[3]]
    with pytest.raises(IndexError):
        full_softmax_loss(hidden, weight, targets, None)


class LargestOutput(TorchDispatchMode):
    """Records the largest number of elements that an operation put out, tensors of W's shape aside."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and SIZE not in tensor.shape:
                self.largest = max(self.largest, tensor.numel())
        return output


def test_no_more_logits_exist_than_a_chunk_has():
    hidden, weight, targets, upstream = head()
    with LargestOutput() as training:
        value_and_gradients(hidden, weight, targets, upstream, chunk_items=10, chunk_positions=7)
    assert training.largest == 10 * 7
    with LargestOutput() as ranking:
        target_counts(hidden, weight, targets, 10)
        top_items(hidden, weight, 5, 10)
    assert ranking.largest == POSITIONS * 10
    with LargestOutput() as plain:
        value_and_gradients(hidden, weight, targets, upstream, chunk_items=None)
    assert plain.largest == POSITIONS * ITEMS


# --- sampled softmax -------------------------------------------------------------------------------------------------


def test_sampled_softmax_by_hand():
    hidden, weight = torch.tensor([[1.0], [0.5]]), torch.tensor([[0.0], [1.0], [3.0]])
    counts = torch.tensor([0.5, 0.25, 1.0])
    loss = sampled_softmax_loss(hidden, weight, torch.tensor([1, 2]), torch.tensor([0, 2]), counts.log())
    # First position: scores 1, 0 and 3 over counts 1/4, 1/2 and 1. Second: its target 2 is a negative too, left out there.
    first, others = math.exp(1) / 0.25, math.exp(0) / 0.5 + math.exp(3)
    second = math.exp(1.5)
    expected = [-math.log(first / (first + others)), -math.log(second / (second + math.exp(0) / 0.5))]
    assert loss.tolist() == pytest.approx(expected)


def test_sampling_the_whole_catalogue_is_the_full_loss():
    hidden, weight, targets, upstream = head(torch.bfloat16)
    loss = sampled_softmax_loss(hidden, weight, targets, torch.arange(ITEMS), torch.zeros(ITEMS))
    gradients = torch.autograd.grad((loss * upstream).sum(), (hidden, weight))
    plain = value_and_gradients(hidden, weight, targets, upstream, chunk_items=None)
    torch.testing.assert_close(loss.detach(), plain[0])
    torch.testing.assert_close(gradients[0], plain[1], rtol=8e-3, atol=1e-5)
    torch.testing.assert_close(gradients[1], plain[2])


def expectation(of, sampler, next_item):
    """The exact mean of ``of(target, negatives)`` over the next item and over every set that the sampler can draw."""
    included = sampler.log_expected_counts.double().exp()
    total = 0.0
    for members in itertools.product([False, True], repeat=len(next_item)):
        members = torch.tensor(members)
        chance = torch.where(members, included, 1 - included).prod()
        for target, probability in enumerate(next_item):
            total = total + chance * probability * of(torch.tensor([target]), members.nonzero()[:, 0])
    return total


@pytest.mark.parametrize("draws", [1, 4])
def test_the_expected_gradient_is_zero_where_the_softmax_is_the_next_items_distribution(draws):
    next_item = torch.tensor([0.55, 0.05, 0.1, 0.25, 0.05], dtype=torch.float64)
    sampler = NegativeSampler(np.array([50, 1, 9, 30, 0]), items=5, draws=draws, smoothing=1.0)
    hidden = torch.ones(1, 1, dtype=torch.float64)
    weight = next_item.log()[:, None].requires_grad_()  # softmax(W h) = next_item

    def gradient(log_expected_counts):
        def of(target, negatives):
            return sampled_softmax_loss(hidden, weight, target, negatives, log_expected_counts)[0]

        return torch.autograd.grad(expectation(of, sampler, next_item), weight)[0]

    corrected = gradient(sampler.log_expected_counts.double())
    uncorrected = gradient(torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(corrected, torch.zeros_like(corrected), rtol=0, atol=1e-7)
    assert uncorrected.abs().max() > 1e-2


@pytest.mark.parametrize("counts", [None, np.array([500, 0, 40, 9, 90, 0, 3])])
def test_corrected_negatives_estimate_the_partition_without_bias(counts):
    """The sampler's own draws: the sum over negatives is the sum over all items but the target, on average."""
    sampler = NegativeSampler(counts, items=7, draws=3)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(1, 4, generator=generator), torch.randn(7, 4, generator=generator)
    target, rng = torch.tensor([2]), np.random.default_rng(0)
    scores = (weight @ hidden[0]).exp()
    own = (scores[2].log() - sampler.log_expected_counts[2]).exp()
    negatives = [sampler.draw(rng) for _ in range(4000)]

    def estimates(log_expected_counts, own):
        # L = log(1 + others / own)
        losses = [sampled_softmax_loss(hidden, weight, target, drawn, log_expected_counts) for drawn in negatives]
        return torch.cat(losses).expm1() * own

    expected = scores.sum() - scores[2]
    corrected, uncorrected = estimates(sampler.log_expected_counts, own), estimates(torch.zeros(7), scores[2])
    assert (corrected.mean() - expected).abs() < 4 * corrected.std() / math.sqrt(4000)
    assert (uncorrected.mean() - expected).abs() > 8 * uncorrected.std() / math.sqrt(4000)


@pytest.mark.parametrize("counts", [None, np.array([500, 0, 40, 9, 90, 0, 3])])
def test_negatives_are_distinct_independent_and_as_frequent_as_expected(counts):
    sampler, rng = NegativeSampler(counts, items=7, draws=3), np.random.default_rng(5)
    included = np.zeros((20_000, 7))
    for row in included:
        drawn = sampler.draw(rng).numpy()
        assert drawn.dtype == np.int64 and len(np.unique(drawn)) == len(drawn)
        row[drawn] = 1
    expected = sampler.log_expected_counts.double().exp().numpy()
    spread = np.sqrt(expected * (1 - expected))
    np.testing.assert_array_less(abs(included.mean(0) - expected), 4 * spread / math.sqrt(20_000))
    covariance = (included - expected).T @ (included - expected) / 20_000
    np.fill_diagonal(covariance, 0)
    np.testing.assert_array_less(abs(covariance), 4.5 * np.outer(spread, spread) / math.sqrt(20_000))
    if counts is None:
        np.testing.assert_allclose(expected, 1 - math.exp(-3 / 7), rtol=1e-6)


def test_negatives_follow_the_seed():
    sampler = NegativeSampler(None, items=1000, draws=50)
    first, again, other = (sampler.draw(np.random.default_rng(seed)).tolist() for seed in (3, 3, 4))
    assert first == again != other


# --- ranking ---------------------------------------------------------------------------------------------------------


def ties(seed=0):
    """Small integers: products are exact and many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(-2, 3, (rows, 3), generator=generator).float() for rows in (40, ITEMS))


@pytest.mark.parametrize("chunk_items", [1, 10, 101, 1000, None])
@pytest.mark.parametrize("k", [1, 12, 101])
def test_top_items_are_those_of_a_stable_sort(k, chunk_items):
    hidden, weight = ties()
    scores, index = top_items(hidden, weight, k, chunk_items)
    expected = functional.linear(hidden, weight).sort(dim=1, descending=True, stable=True)
    assert index.dtype == torch.int64 and torch.equal(index, expected.indices[:, :k])
    assert torch.equal(scores, expected.values[:, :k])


def test_top_items_of_real_scores_equal_topk():
    hidden, weight, *_ = head(torch.bfloat16)
    scores, index = top_items(hidden, weight, 10, 33)
    expected = (hidden.float() @ weight.T).topk(10)
    assert torch.equal(index, expected.indices)
    torch.testing.assert_close(scores, expected.values.detach())


def test_top_items_rank_a_negative_zero_like_zero():
    hidden, weight = torch.full((5, 1), 1e-30), torch.tensor([[-1e-30], [1e-30], [-1e-30]])  # products underflow
    assert (hidden @ weight.T).signbit().any()
    scores, index = top_items(hidden, weight, 3, 3)
    assert index.tolist() == [[0, 1, 2]] * 5 and not scores.any()


@pytest.mark.parametrize("chunk_items", [1, 10, 101, None])
def test_target_counts_are_those_of_the_whole_table(chunk_items):
    hidden, weight = ties()
    targets = torch.arange(40) * 37 % ITEMS
    scores = hidden @ weight.T
    own = scores.gather(1, targets[:, None])
    greater, equal = target_counts(hidden, weight, targets, chunk_items)
    assert torch.equal(greater, (scores > own).sum(1)) and torch.equal(equal, (scores == own).sum(1) - 1)
    assert equal.max() > 0


def test_a_target_ties_with_itself_whatever_the_rounding():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 576, generator=generator), torch.randn(1003, 576, generator=generator)
    for chunk_items in (1, 64, 1000, None):
        greater, equal = target_counts(hidden, weight, torch.arange(50) * 20, chunk_items)
        assert equal.tolist() == [0] * 50
        assert len(set(greater.tolist())) > 40


def test_target_counts_report_scores_that_are_nan():
    hidden, weight = ties()
    hidden[7] = float("nan")
    assert target_counts(hidden, weight, torch.zeros(40, dtype=torch.int64), 10)[1].lt(0).nonzero().tolist() == [[7]]
    weight[50, 1] = float("nan")
    assert (target_counts(hidden, weight, torch.zeros(40, dtype=torch.int64), 10)[1] == -1).all()
