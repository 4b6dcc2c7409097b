"""The contrastive loss between two towers, by hand."""

import math

import torch

from recbole_llm.loss.two_tower import contrastive_loss


def test_by_hand():
    queries = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[1.0, 0.0], [3.0, 4.0]])  # cosines: 1, 0.6; 0, 0.8
    first = -math.log(math.exp(2.0) / (math.exp(2.0) + math.exp(1.2)))
    second = -math.log(math.exp(1.6) / (math.exp(0.0) + math.exp(1.6)))
    loss = contrastive_loss(queries, keys, torch.tensor([5, 7]), temperature=0.5)
    torch.testing.assert_close(loss.item(), (first + second) / 2)


def test_rows_of_one_item_are_no_negatives_of_each_other():
    torch.manual_seed(0)
    queries, keys = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    keys[1] = keys[0]
    loss = contrastive_loss(queries, keys, torch.tensor([5, 5, 7]))
    cosine = torch.nn.functional.cosine_similarity
    expected = []
    for row, others in ((0, [2]), (1, [2]), (2, [0, 1])):
        kept = torch.stack([cosine(queries[row], keys[column], dim=0) for column in [row, *others]]) / 0.5
        expected.append(kept.logsumexp(0) - kept[0])
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_a_lone_row_has_no_loss():
    assert contrastive_loss(torch.randn(1, 4), torch.randn(1, 4), torch.tensor([3])).item() == 0.0
