"""Recformer: its sentences, its losses by hand, the matrix of items in each stage, and what its Longformer reads."""

import math

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from recbole_llm.backbone.longformer import Sentence, word_starts
from recbole_llm.errors import UserError
from recbole_llm.loss.item_contrast import item_contrast_loss
from recbole_llm.prompt.item_sentences import ItemSentences, mask_words


@pytest.fixture
def make(make_model):
    settings = {"hidden_size": 8, "n_layers": 1, "n_heads": 2, "attention_window": 4, "history_length": 5}
    return lambda **given: make_model("Recformer", **{**settings, **given})


def words(texts):
    """One token for each letter, by its code."""
    return [[ord(letter) for letter in text] for text in texts]


def test_a_sentence_by_hand():
    """The latest item first; names and values, each attribute cut at 4 tokens, two attributes at most; places from 1."""
    names = [(), ("t", "b", "c"), ("t",)]
    values = [(), ("ab", "x", "yy"), ("defgh",)]
    sentences = ItemSentences(words, names, values, 0, 2, 100, 2, 4)
    tokens, kinds, places = sentences.sentence([2, 1])
    assert "".join(map(chr, tokens[1:])) == "tab" + "bx" + "tdef" and tokens[0] == 0
    assert kinds.tolist() == [0, 1, 2, 2, 1, 2, 1, 2, 2, 2]
    assert places.tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert all(map(np.array_equal, sentences.sentence([1, 2, 1]), sentences.sentence([2, 1])))  # the two latest
    short = ItemSentences(words, names, values, 0, 2, 7, 2, 4).sentence([2, 1])
    assert [column.tolist() for column in short] == [column[:7].tolist() for column in (tokens, kinds, places)]


def test_attributes_have_their_fields_as_names(make_model, chain_data, tmp_path):
    from recbole_llm.data.prepare import generate_chain

    file = generate_chain(tmp_path, "chain", users=12, items=10, seed=1, noise=0.1) / "chain.item"
    header, *lines = file.read_text().splitlines()
    lines = [f"{line}\t{'' if number % 2 else 'Acme'}" for number, line in enumerate(lines)]
    file.write_text("\n".join([header + "\tbrand:token", *lines]) + "\n")
    sizes = {"hidden_size": 8, "n_layers": 1, "n_heads": 2, "item_text": ["brand", "title"]}
    _, model, _ = make_model("Recformer", data_path=str(tmp_path), eval_args={"mode": "uni2"}, **sizes)
    dataset = model._dataset
    assert set(dataset.item_attribute_names()) == {(), ("brand", "title"), ("title",)}
    for item in (1, 2, 3):
        texts = dataset.item_attributes[item]
        expected = "".join(map("".join, zip(dataset.item_attribute_names()[item], texts, strict=True)))
        tokens, kinds, _ = model.sentences.sentence([item])
        assert model.backbone.tokenizer.decode(tokens[1:]) == expected
        named = model.backbone.tokenizer.decode(tokens[kinds == 1])
        assert named == "".join(dataset.item_attribute_names()[item])


def test_words_are_masked_as_a_whole():
    begins = np.zeros(200, dtype=bool)
    begins[100:] = True
    tokens = np.array([1, 100, 5, 101, 6, 7, 102, 103, 8, 104] * 4)
    seen, share = {}, []
    for seed in range(400):
        shown, labels = mask_words(tokens, begins, 0.15, 199, 200, np.random.default_rng(seed))
        hidden = labels >= 0
        assert (labels[hidden] == tokens[hidden]).all() and (shown[~hidden] == tokens[~hidden]).all() and not hidden[0]
        assert 0 < hidden.sum() <= 6 == round(40 * 0.15)
        words_of = np.cumsum(begins[tokens])
        assert all(hidden[1:][words_of[1:] == word].all() for word in set(words_of[hidden]))
        share += [(shown[hidden] == 199).mean()]
        seen[tuple(np.flatnonzero(hidden))] = True
    assert len(seen) > 100 and np.mean(share) == pytest.approx(0.8, abs=0.03)


def test_contrast_by_hand():
    users, items = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    cosine = math.sqrt(0.5)
    first, second = math.log(1 + math.exp(2 * (cosine - 1))), math.log(1 + math.exp(-2 * cosine))
    loss = item_contrast_loss(users, items, 0.5).item()
    assert loss == pytest.approx((first + second) / 2, rel=1e-5) == pytest.approx(0.3301, abs=1e-4)


def test_embeddings_are_four_summed(make):
    """The plain Longformer, given the sum of the four embeddings by hand; and padding changes nothing."""
    _, model, _ = make()
    model.eval()
    encoder, longformer = model.encoder, model.backbone.causal_lm
    sentences = [Sentence(*model.sentences.sentence(items)) for items in ([3, 4, 5], [7])]
    together = encoder(sentences)
    sums = []
    longformer.embeddings.LayerNorm.register_forward_pre_hook(lambda module, values: sums.append(values[0]))
    for sentence, states in zip(sentences, together, strict=True):
        torch.testing.assert_close(encoder([sentence])[0], states, rtol=1e-4, atol=1e-5)
        length = len(sentence.tokens)
        expected = (
            longformer.embeddings.word_embeddings.weight[sentence.tokens]
            + longformer.embeddings.position_embeddings.weight[longformer.config.pad_token_id + 1 + np.arange(length)]
            + longformer.embeddings.token_type_embeddings.weight[sentence.kinds]
            + encoder.item_places.weight[sentence.places]
        )
        torch.testing.assert_close(sums[-1][0, :length], expected)
    assert len(longformer.embeddings.token_type_embeddings.weight) == 4 and len(encoder.item_places.weight) == 6


def test_fine_tuning_loss_and_scores_by_hand(make):
    _, model, splits = make(run_stages=["matrix_updated"])
    model.eval()
    rows = model._dataset.inter_feat[torch.arange(4)]
    model.seed_step(0)
    matrix = model.represent_items(np.arange(1, model.n_items))
    torch.testing.assert_close(model.item_matrix[1:], matrix)
    parts, targets = model.cut_sequences(rows["user_id"].numpy())
    losses = []
    for items, target in zip(parts, targets, strict=True):
        user = model.encoder([Sentence(*model.sentences.sentence(items.tolist()))])[0][0]
        logits = functional.cosine_similarity(user[None], matrix) / 0.05
        losses.append(-logits.log_softmax(0)[target - 1])
    model.seed_step(0)
    torch.testing.assert_close(model.calculate_loss(rows)[0], torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)
    test = splits["test"].inter_feat[torch.arange(2)]
    user = model.represent([test["item_id_list"][0, : test["item_length"][0]].numpy()])
    expected = functional.cosine_similarity(user, matrix) / 0.05
    torch.testing.assert_close(model.full_sort_predict(test)[0, 1:], expected, rtol=1e-4, atol=1e-4)


def test_pre_training_loss_by_hand(make):
    _, model, _ = make(mlm_weight=0.3)
    model.eval()
    rows = model._dataset.inter_feat[torch.arange(4)]
    model.seed_step(1)
    contrast, masked = model.calculate_loss(rows)
    model.seed_step(1)
    parts, targets = model.cut_sequences(rows["user_id"].numpy())
    items = [np.array([target]) for target in targets]
    users, vectors = model.represent(parts), model.represent(items)
    logits = functional.cosine_similarity(users[:, None], vectors[None], dim=2) / 0.05
    torch.testing.assert_close(contrast, functional.cross_entropy(logits, torch.arange(4)), rtol=1e-4, atol=1e-4)
    expected = 0
    for side in (parts, items):
        losses = []
        for sequence in side:
            sentence = Sentence(*model.sentences.sentence(sequence.tolist()))
            tokenizer = model.backbone.tokenizer
            shown, truth = mask_words(
                sentence.tokens, word_starts(tokenizer), 0.15, tokenizer.mask_token_id, len(tokenizer), model.rng
            )
            states = model.mlm_head(model.encoder([sentence._replace(tokens=shown)])[0])
            log_probability = (states @ model.encoder.words.T + model.mlm_bias).log_softmax(1)
            losses += [-log_probability[place, truth[place]] for place in np.flatnonzero(truth >= 0)]
        expected += torch.stack(losses).mean()
    torch.testing.assert_close(masked, 0.3 * expected, rtol=1e-4, atol=1e-4)


def test_sequences_are_cut_within_the_training_data(make):
    """In pre-training in their second half; never an item of validation or test."""
    _, model, splits = make()
    users = model._dataset.inter_feat["user_id"].numpy()
    test = splits["test"].inter_feat
    for user, length in zip(test["user_id"].tolist(), test["item_length"].tolist(), strict=True):
        assert len(model.sequences[user]) == length - 1  # of the test's history all but the validation item
    for stage, is_pretraining in ((0, True), (1, False)):
        model.enter_stage(stage, False)
        places = set()
        for step in range(30):
            model.rng = np.random.default_rng(step)
            for user, part, target in zip(users, *model.cut_sequences(users), strict=True):
                sequence = model.sequences[int(user)].tolist()
                found = [
                    end for end in range(1, len(sequence))
                    if sequence[end] == target and sequence[max(0, end - 5) : end] == part.tolist()
                ]  # fmt: skip
                assert found
                if len(found) == 1:
                    places.add((found[0] >= (len(sequence) - 1) // 2, found[0] == len(sequence) - 1))
        assert (False in {late for late, _ in places}) is not is_pretraining and any(last for _, last in places)


def test_the_matrix_is_computed_in_each_epoch_or_kept(make):
    """From the second stage on it is what items are scored by, and weights that move do not move it."""
    _, model, splits = make()
    rows = splits["valid"].inter_feat[torch.arange(2)]
    model.epoch_steps = 2

    def step(number):
        model.seed_step(number)
        with torch.no_grad():
            model.encoder.item_places.weight.add_(torch.randn_like(model.encoder.item_places.weight))
        return model.item_matrix.detach().clone()

    assert not step(0).any() and model.full_sort_predict(rows)[:, 1:].isfinite().all()  # pre-training has no matrix
    model.enter_stage(1, False)
    of_steps = [step(number) for number in range(4)]
    assert torch.equal(of_steps[0], of_steps[1]) and torch.equal(of_steps[2], of_steps[3])
    assert of_steps[0][1:].any() and not torch.equal(of_steps[1], of_steps[2])
    model.enter_stage(2, True)
    assert all(torch.equal(step(number), of_steps[3]) for number in range(3))
    assert "item_matrix" in model.trained_parameters()


def test_settings_that_do_not_fit(make, text_encoder):
    with pytest.raises(UserError, match="attention_window must be an even number"):
        make(attention_window=5)
    with pytest.raises(UserError, match="n_heads: 3 heads do not divide hidden_size 8"):
        make(n_heads=3)
    with pytest.raises(UserError, match="is a bert, not a Longformer"):
        make(longformer=text_encoder)
    with pytest.raises(UserError, match="^longformer: there is no folder no/such/folder"):
        make(longformer="no/such/folder")


def test_any_longformer_folder(make, tmp_path):
    """Its weights are read, its kinds of tokens replaced; one with too few positions is refused."""
    _, small, _ = make()
    config = transformers.LongformerConfig(
        vocab_size=len(small.backbone.tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=130, type_vocab_size=1, attention_window=[8], pad_token_id=1,
    )  # fmt: skip
    transformers.LongformerModel(config).save_pretrained(tmp_path / "folder")
    small.backbone.tokenizer.save_pretrained(tmp_path / "folder")
    _, model, splits = make(longformer=str(tmp_path / "folder"), max_prompt_tokens=100)
    assert model.backbone.hidden_size == 16 and model.backbone.causal_lm.config.attention_window == [4]
    assert model.backbone.identity["source"] == "folder"
    model.eval()
    assert model.full_sort_predict(splits["test"].inter_feat[torch.arange(2)])[:, 1:].isfinite().all()
    with pytest.raises(UserError, match="max_prompt_tokens: .* has 128 positions"):
        make(longformer=str(tmp_path / "folder"))
