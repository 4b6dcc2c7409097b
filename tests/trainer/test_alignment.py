"""A-LLMRec's stage 1: the auto-encoders learn, by seed, and what they are given stays as it was."""

import numpy as np
import pytest
import torch

from recbole_llm.loss.alignment import alignment_loss
from recbole_llm.trainer.alignment import ItemAlignment, draw_negatives, train_alignment

ITEMS, GROUPS, ITEM_SIZE, TEXT_SIZE = 41, 4, 12, 20


@pytest.fixture(scope="module")
def data() -> dict[str, torch.Tensor]:
    """Items of four groups; an item's vector, its text's and its buyers' are all near those of its group."""
    generator = torch.Generator().manual_seed(3)

    def near(centers, groups, noise):
        return centers[groups] + noise * torch.randn(len(groups), centers.shape[1], generator=generator)

    of_items = torch.arange(ITEMS) % GROUPS
    item_centers = torch.randn(GROUPS, ITEM_SIZE, generator=generator)
    text_centers = torch.randn(GROUPS, TEXT_SIZE, generator=generator)
    positives = torch.randint(1, ITEMS, (200,), generator=generator)
    return {
        "teacher_vectors": near(item_centers, of_items, 0.1),
        "text_vectors": near(text_centers, of_items, 0.1),
        "users": near(2 * item_centers, of_items[positives], 0.1),
        "positives": positives,
        "histories": torch.randint(0, ITEMS, (200, 5), generator=generator),
    }


FAST = {"latent_size": 16, "learning_rate": 1e-2, "epochs": 8}


@pytest.fixture(scope="module")
def trained(data) -> tuple[ItemAlignment, list[dict[str, float]]]:
    curve = []
    model = train_alignment(**data, **FAST, progress=lambda epoch, means: curve.append({"epoch": epoch, **means}))
    return model, curve


def same(first: ItemAlignment, second: ItemAlignment) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


# ---- The network


def test_shapes_and_what_the_latents_are():
    torch.manual_seed(0)
    model = ItemAlignment(3, 5)
    item, text = torch.randn(2, 4, 3), torch.randn(2, 4, 5)
    output = model(item, text)
    assert [tuple(tensor.shape[2:]) for tensor in output] == [(128,), (3,), (128,), (5,)]
    encoder = model.item_encoder[0]
    expected = torch.sigmoid(item @ encoder.weight.T + encoder.bias)
    assert torch.allclose(model.joint(item), expected, atol=1e-6)
    assert torch.equal(model.joint(item), output.item_latent)
    text_encoder = model.text_encoder[0]
    expected = torch.sigmoid(text @ text_encoder.weight.T + text_encoder.bias)
    assert torch.allclose(output.text_latent, expected, atol=1e-6)
    decoder = model.text_decoder
    assert torch.allclose(output.text_reconstructed, output.text_latent @ decoder.weight.T + decoder.bias, atol=1e-6)
    assert tuple(model.joint(torch.randn(7, 3)).shape) == (7, 128)


# ---- Learning


@torch.no_grad()
def distances(model: ItemAlignment, data) -> tuple[float, float]:
    """Mean squared distance of the latents of the same item, and of an item and another group's."""
    output = model(data["teacher_vectors"][1:], data["text_vectors"][1:])
    same_item = (output.item_latent - output.text_latent).square().mean().item()
    other = (output.item_latent - output.text_latent.roll(1, 0)).square().mean().item()
    return same_item, other


def test_latents_of_an_item_meet_and_those_of_others_do_not(data, trained):
    start = train_alignment(**data, **(FAST | {"epochs": 0}))
    before, _ = distances(start, data)
    after, other = distances(trained[0], data)
    assert after < 0.2 * before
    assert after < 0.3 * other  # it did not meet by making all the same


def test_every_part_of_the_loss_falls(trained):
    _, curve = trained
    assert [means["epoch"] for means in curve] == list(range(1, FAST["epochs"] + 1))
    for part in ("matching", "item_reconstruction", "text_reconstruction", "recommendation"):
        assert curve[-1][part] < 0.8 * curve[0][part], part


@torch.no_grad()
def test_reconstructed_vectors_rank_the_next_item_s_group_first(data, trained):
    reconstructed = trained[0](data["teacher_vectors"], data["text_vectors"]).item_reconstructed
    best = (data["users"] @ reconstructed[1:].T).argmax(dim=1) + 1
    assert (best % GROUPS == data["positives"] % GROUPS).float().mean() > 0.9


def test_a_weight_of_zero_leaves_its_part_unlearned(data):
    weights = {"matching_weight": 0.0, "text_reconstruction_weight": 0.0}
    start = train_alignment(**data, **(FAST | {"epochs": 0}))
    end = train_alignment(**data, **(FAST | {"epochs": 1}), weights=weights)
    assert torch.equal(start.text_encoder[0].weight, end.text_encoder[0].weight)
    assert not torch.equal(start.item_encoder[0].weight, end.item_encoder[0].weight)


def test_a_step_is_adam_on_the_loss(data):
    """Three epochs of one batch each, against the same steps written out."""
    few = {key: tensor[:6] if key in ("users", "positives", "histories") else tensor for key, tensor in data.items()}
    settings = {"latent_size": 16, "learning_rate": 1e-2, "batch_size": 6, "seed": 5}
    trained = train_alignment(**few, **settings, epochs=3)
    model = train_alignment(**few, **settings, epochs=0).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.98))
    positives = few["positives"].numpy()
    for epoch in (1, 2, 3):
        generator = np.random.default_rng([5, epoch])
        generator.permutation(6)  # the loss does not depend on the order within the one batch
        negatives = draw_negatives(positives, few["histories"].numpy(), ITEMS, generator)
        chosen = torch.from_numpy(np.stack([positives, negatives], axis=1))
        item, text = few["teacher_vectors"][chosen], few["text_vectors"][chosen]
        made = model(item, text)
        optimizer.zero_grad()
        sum(alignment_loss(few["users"], item, made[0], made[1], text, made[2], made[3])).backward()
        optimizer.step()
    for one, other in zip(trained.parameters(), model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


# ---- Seeds and what must not move


def test_the_seed_decides_everything_and_touches_nothing_else(data, trained):
    torch.manual_seed(7)
    np.random.seed(7)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert same(train_alignment(**data, **FAST), trained[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert not same(train_alignment(**data, **FAST, seed=1), trained[0])


def test_what_it_is_given_does_not_move(data):
    given = {key: tensor.clone() for key, tensor in data.items()}
    for key in ("teacher_vectors", "text_vectors", "users"):
        given[key].requires_grad_(True)
    model = train_alignment(**given, **(FAST | {"epochs": 2}))
    for key, tensor in data.items():
        assert torch.equal(given[key], tensor), key
        assert given[key].grad is None
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_inputs_of_double_precision_are_trained_on_in_single(data, trained):
    doubled = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in data.items()}
    assert same(train_alignment(**doubled, **FAST), trained[0])


# ---- Taking up


def test_training_that_was_taken_up_is_training_in_one_go(data, trained, tmp_path):
    file = tmp_path / "folder" / "alignment.safetensors"
    first = train_alignment(**data, **(FAST | {"epochs": 3}), checkpoint=file)
    assert not same(first, trained[0])
    seen = []
    second = train_alignment(**data, **FAST, checkpoint=file, progress=lambda epoch, means: seen.append(epoch))
    assert seen == [4, 5, 6, 7, 8]
    assert same(second, trained[0])
    third = train_alignment(**data, **FAST, checkpoint=file, progress=lambda *_: pytest.fail("it is trained already"))
    assert same(third, trained[0])
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("change", ["seed", "data", "weights", "fewer epochs", "damaged"])
def test_a_checkpoint_of_another_training_is_not_taken_up(data, tmp_path, change):
    file = tmp_path / "alignment.safetensors"
    settings = FAST | {"epochs": 2}
    train_alignment(**data, **settings, checkpoint=file)
    if change == "seed":
        settings["seed"] = 1
    elif change == "data":
        data = data | {"text_vectors": data["text_vectors"] + 1.0}
    elif change == "weights":
        settings["weights"] = {"matching_weight": 2.0}
    elif change == "fewer epochs":
        settings["epochs"] = 1
    else:
        file.write_bytes(file.read_bytes()[:-100])
    seen = []
    again = train_alignment(**data, **settings, checkpoint=file, progress=lambda epoch, means: seen.append(epoch))
    assert seen == list(range(1, settings["epochs"] + 1))
    assert same(again, train_alignment(**data, **settings))


# ---- Negatives


def test_negatives_are_uniform_over_what_the_user_has_not_had():
    positives, histories = np.full(30_000, 3), np.tile([0, 0, 1, 5], (30_000, 1))
    negatives = draw_negatives(positives, histories, 8, np.random.default_rng(0))
    counts = np.bincount(negatives, minlength=8)
    assert counts[[0, 1, 3, 5]].sum() == 0
    # 7,500 each, standard deviation sqrt(30,000 x 1/4 x 3/4) = 75
    assert np.abs(counts[[2, 4, 6, 7]] - 7500).max() < 5 * 75


def test_negatives_of_users_who_had_nearly_everything():
    everything_but_9 = np.setdiff1d(np.arange(1, 1000), [9])
    histories = np.stack([everything_but_9, np.ones(998, dtype=np.int64)])
    negatives = draw_negatives(np.array([4, 4]), histories, 1000, np.random.default_rng(0))
    assert negatives[0] == 9 and negatives[1] not in (0, 1, 4)
    everything = np.arange(1, 5)[None]
    drawn = {draw_negatives(np.array([2]), everything, 5, np.random.default_rng(seed))[0] for seed in range(40)}
    assert drawn == {1, 3, 4}


def test_without_histories_only_the_next_item_is_no_negative():
    negatives = draw_negatives(np.full(1000, 2), None, 4, np.random.default_rng(0))
    assert set(negatives) == {1, 3}


# ---- What does not belong together


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text_vectors": torch.zeros(40, TEXT_SIZE)}, "41 item vectors and 40 text vectors"),
        ({"users": torch.zeros(200, ITEM_SIZE + 1)}, "widths differ"),
        ({"positives": torch.ones(199, dtype=torch.long)}, "one row for each sequence"),
        ({"histories": torch.ones(199, 5, dtype=torch.long)}, "one row for each sequence"),
        ({"positives": torch.zeros(200, dtype=torch.long)}, "positives must be from 1 to 40"),
        ({"positives": torch.full((200,), ITEMS)}, "positives must be from 1 to 40"),
        ({"epochs": -1}, "epochs must be at least 0"),
        ({"batch_size": 0}, "batch_size at least 1"),
        ({"learning_rate": 1e30}, "not finite in epoch"),
        ({"score": "cosine"}, "score must be mean or dot"),
    ],
)
def test_tensors_and_settings_that_make_no_sense(data, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        train_alignment(**(data | FAST | change))


def test_a_catalogue_without_a_negative(data):
    small = data | {"teacher_vectors": torch.zeros(2, ITEM_SIZE), "text_vectors": torch.zeros(2, TEXT_SIZE)}
    with pytest.raises(ValueError, match="at least 2 items"):
        train_alignment(**small)
