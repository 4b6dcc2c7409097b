"""Our losses, prompts and rules against figures of the models' public code. README.md says how they were made."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from recbole_llm.loss.alignment import alignment_loss
from recbole_llm.loss.binary import binary_loss
from recbole_llm.loss.distillation import distillation_loss
from recbole_llm.loss.retrieval import retrieval_loss
from recbole_llm.loss.uniformity import uniformity_loss
from recbole_llm.prompt.retrieval import PromptBuilder, PromptSettings
from recbole_llm.prompt.sequence import SequencePrompts, SequencePromptSettings
from recbole_llm.recommender.generation import CandidateGenerator
from recbole_llm.trainer.alignment import ItemAlignment


def numbers(*shape, seed=0):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + seed).reshape(shape)


def characters(texts):
    """One token per character: prompts can be read back."""
    return [[ord(character) for character in text] for text in texts]


def test_llmsrec_losses():
    users, items, teacher = numbers(3, 4), numbers(3, 5, 4, seed=1), numbers(3, 4, seed=2)
    scores = torch.einsum("bd,bcd->bc", users, items)
    assert retrieval_loss(scores).item() == pytest.approx(1.6122161749733024, abs=1e-9)  # both repositories
    assert distillation_loss(users, teacher).item() == pytest.approx(0.6623430732943597, abs=1e-9)
    assert distillation_loss(users, teacher, "infonce").item() == pytest.approx(12.388855900317317, abs=1e-9)
    assert uniformity_loss(users).item() == pytest.approx(0.13318304996673455, abs=1e-9)
    assert uniformity_loss(teacher).item() == pytest.approx(0.1187415650471108, abs=1e-9)


def test_sasrec_loss():
    assert binary_loss(numbers(5), numbers(5, seed=3)).item() == pytest.approx(0.9401797705216947, abs=1e-9)


def test_allmrec_stage_one():
    model = ItemAlignment(4, 6).double()
    layers = [
        [model.item_encoder[0], model.item_decoder],
        [model.text_encoder[0], model.text_decoder],
    ]
    with torch.no_grad():
        for place, pair in enumerate(layers):
            parameters = [parameter for layer in pair for parameter in (layer.weight, layer.bias)]
            for number, parameter in enumerate(parameters):
                parameter.copy_(0.3 * numbers(*parameter.shape, seed=10 * place + number))
    items = torch.stack([numbers(3, 4, seed=1), numbers(3, 4, seed=2)], dim=1)
    texts = torch.stack([numbers(3, 6, seed=3), numbers(3, 6, seed=4)], dim=1)
    made = model(items, texts)
    losses = alignment_loss(
        numbers(3, 4), items, made.item_latent, made.item_reconstructed, texts, made.text_latent, made.text_reconstructed
    )
    assert isinstance(model.item_encoder[1], nn.Sigmoid)
    expected = [0.0864372467609049, 0.5 * 4.569358027423391, 0.2 * 2.2283367420408844, 1.396270751953125]
    assert [loss.item() for loss in losses] == pytest.approx(expected, abs=1e-6)  # the last is float32 there
    assert sum(losses).item() == pytest.approx(4.213054360833903, abs=1e-6)


def test_history_in_user_prompts():
    titles = ["", "Heat", "Alien", "Fargo"]
    dates = lambda times: [f"2020-01-0{int(time)}" for time in times]  # noqa: E731
    builder = PromptBuilder(characters, titles, PromptSettings(), format_dates=dates)
    histories = builder.select_histories(np.array([[1, 2, 3]]), np.array([3]), np.array([[1.0, 2.0, 3.0]]))
    names = {-1: "[HistoryEmb]", -2: ""}
    text = "".join(names.get(token) or (chr(token) if token >= 0 else "") for token in builder.user_prompts(histories).tokens)
    public = (
        'Item No.1, Time: 2020-01-01, "Heat"[HistoryEmb],Item No.2, Time: 2020-01-02, "Alien"[HistoryEmb],'
        'Item No.3, Time: 2020-01-03, "Fargo"[HistoryEmb]'
    )
    assert text == (
        f"This user has made a series of purchases in the following order: {public}. Based on this sequence of purchases, "
        "generate user representation token:"
    )


def test_which_answers_name_a_candidate():
    """Four of six name one, three of them the target: ``(0.6666666666666666, 0.75)`` there."""
    generator = object.__new__(CandidateGenerator)
    generator.match = "substring"
    answers = ["1. Toy Story", 'I recommend "Toy Story"', "toy story or heat", "Fargo", "Heat", "Toy Story"]
    named = [generator.named_title(answer, ["toy story", "heat", "alien"]) for answer in answers]
    valid = [name for name in named if name is not None]
    assert (len(valid) / 6, valid.count("toy story") / len(valid)) == (0.6666666666666666, 0.75)


def test_items_of_st2si():
    prompts = SequencePrompts(
        characters,
        [(), ("Hat", "brand: Acme"), ("Red shoes", "brand: " + "B" * 40)],
        SequencePromptSettings(separator=" ", query_ids=(ord("."),)),
    )
    batch = prompts.sequences(np.array([[1, 2]]), np.array([2]))
    text = "".join("." if token == -2 else chr(token) for token in batch.tokens)
    assert text == "Hat brand: Acme." + "Red shoes brand: BBBBBBBBBBBBBBBBBBBBBBBB."


def test_unit_sphere():
    """The public code normalizes before its uniformity, ours within it."""
    users = numbers(3, 4)
    assert uniformity_loss(users).item() == pytest.approx(uniformity_loss(functional.normalize(users, dim=1)).item())
