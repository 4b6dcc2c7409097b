"""Backbones: every architecture gives what plain transformers gives, and every bad source is one clear sentence."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import socket
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from recbole_llm import checkpoint
from recbole_llm.backbone import built_in, reading
from recbole_llm.backbone import load as llm
from recbole_llm.backbone import settings as backbone_settings
from recbole_llm.backbone.backbone import Backbone, cache_name
from recbole_llm.backbone.encoder import EncoderSettings, PromptEncoder
from recbole_llm.backbone.fetch import cache_folder, is_complete
from recbole_llm.backbone.load import fetch_backbone, load_backbone
from recbole_llm.backbone.lora import adapter_config, adapter_tensors, merged_adapter, save_merged
from recbole_llm.backbone.model_card import model_card
from recbole_llm.backbone.reading import model_digest
from recbole_llm.backbone.settings import read_settings
from recbole_llm.backbone.text import encode_text
from recbole_llm.errors import UserError

VOCABULARY = 516
WINDOW = 4
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = SMALL | {
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GEMMA = LLAMA | {"head_dim": 8}
OPT = SMALL | {"ffn_dim": 64, "max_position_embeddings": 64, "init_std": 0.2, "dropout": 0.5}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}

# name -> model type, settings, input size, hidden size, whether a layer has a sliding window
ARCHITECTURES = {
    "llama": ("llama", LLAMA, 32, 32, False),
    "qwen2": ("qwen2", LLAMA, 32, 32, False),
    "qwen2-sliding": (
        "qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        32,
        32,
        True,
    ),
    "mistral": ("mistral", LLAMA | {"sliding_window": None}, 32, 32, False),
    "mistral-sliding": ("mistral", LLAMA | {"sliding_window": WINDOW}, 32, 32, True),
    "gemma": ("gemma", GEMMA, 32, 32, False),
    "gemma2": ("gemma2", GEMMA | {"sliding_window": WINDOW, "query_pre_attn_scalar": 8}, 32, 32, True),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        32,
        32,
        True,
    ),
    "opt": ("opt", OPT | {"word_embed_proj_dim": 32}, 32, 32, False),
    "opt-projected": ("opt", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}, 16, 16, False),
    "gpt2": ("gpt2", GPT2 | {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}, 32, 32, False),
}
# auto: sdpa, but for Gemma 2.
CASES = [(name, kernel) for name in ARCHITECTURES for kernel in ("auto", "eager")]


@pytest.fixture(scope="session")
def tokenizer():
    return load_backbone({"backbone": "tiny"}).tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """A saved random model of each architecture, with biases and norms that do something."""
    folders = {}
    for name, (model_type, settings, *_) in ARCHITECTURES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A copy of the Llama folder, to be spoilt."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "model"))


def load(folder, **settings) -> Backbone:
    return load_backbone({"backbone": str(folder), "backbone_dtype": "float32", "device": "cpu", **settings})


@lru_cache
def shared(folder, kernel="auto") -> Backbone:
    """A loaded model for tests that do not change it."""
    return load(folder, attn_implementation=kernel)


@lru_cache
def plain(folder: Path) -> torch.nn.Module:
    """The decoder stack as transformers itself loads it, with its plainest attention; not to be changed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.base_model.eval()


def token_ids(*shape: int) -> Tensor:
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(7))


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def positions(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop)[None]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# ---- The same result as plain transformers


@pytest.mark.parametrize(("name", "kernel"), CASES)
@torch.no_grad()
def test_forward_equals_the_plain_decoder(folders, name, kernel):
    backbone, reference = shared(folders[name], kernel), plain(folders[name])
    ids, lengths = token_ids(2, 12), [12, 9]
    embeddings = backbone.embedding(ids)
    expected = [
        reference(input_ids=ids[row : row + 1, :length]).last_hidden_state[0] for row, length in enumerate(lengths)
    ]

    bare, _ = backbone(embeddings, positions(0, 12))
    not_padding = torch.arange(12) < torch.tensor(lengths)[:, None]
    masked, _ = backbone(embeddings, positions(0, 12), causal(12) & not_padding[:, None, None])
    for row, length in enumerate(lengths):
        close(bare[row, :length], expected[row])
        close(masked[row, :length], expected[row])


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
@torch.no_grad()
def test_positions_that_are_read_get_the_result_of_the_whole_forward(folders, name):
    """With the last feed-forward network run there only, and with it as it was afterwards."""
    backbone = shared(folders[name], "auto")
    embeddings = backbone.embedding(token_ids(2, 12))
    expected, _ = backbone(embeddings, positions(0, 12))
    read = torch.zeros(2, 12, dtype=torch.bool)
    read[0, 11] = read[1, 4] = True
    hidden, _ = backbone(embeddings, positions(0, 12), read=read)
    close(hidden[read], expected[read])
    skips = not torch.allclose(hidden[~read], expected[~read])
    assert skips is not name.startswith("opt"), "OPT keeps its feed-forward network in no module of its own"
    close(backbone(embeddings, positions(0, 12))[0], expected)


@pytest.mark.parametrize(("name", "kernel"), CASES)
@torch.no_grad()
def test_tails_that_share_a_prefix_equal_whole_rows(folders, name, kernel):
    """prefix | tail a | tail b in one row: positions, not places, must decide what a sliding window sees."""
    backbone, reference = shared(folders[name], kernel), plain(folders[name])
    ids = token_ids(1, 18)
    prefix, a, b = ids[:, :6], ids[:, 6:11], ids[:, 11:]  # b is longer than a window
    mask = causal(18)
    mask[11:, 6:11] = False  # b does not see a
    where = torch.cat([positions(0, 11), positions(6, 13)], dim=1)
    hidden, _ = backbone(backbone.embedding(ids), where, mask[None, None])
    close(hidden[0, :11], reference(input_ids=torch.cat([prefix, a], dim=1)).last_hidden_state[0])
    close(hidden[0, 11:], reference(input_ids=torch.cat([prefix, b], dim=1)).last_hidden_state[0, 6:])


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_prompts_of_a_window_in_one_row_equal_separate_ones(folders, name, kernel):
    """trunk | tail | tail, as the encoder lays them out: in value and in gradient, whatever the architecture."""
    from recbole_llm.prompt.batch import OUT_TOKEN, SLOT_TOKEN, PromptBatch

    ids = token_ids(40).numpy().astype(np.int32)
    header, items, request = ids[:3], np.split(ids[3:24], 3), np.append(ids[24:29], OUT_TOKEN)
    items = [np.append(item, SLOT_TOKEN) for item in items]  # 8 tokens each, more than a sliding window
    prompts = [np.concatenate([header, *items[:count], request]) for count in (1, 2, 3)] + [np.append(header, request)]
    batch = PromptBatch.build(
        tokens=np.concatenate(prompts).astype(np.int32),
        offsets=np.cumsum([0, *map(len, prompts)]),
        slot_items=np.array([5, 5, 6, 5, 6, 7]),
        out_tokens=1,
        header_length=3,
        parent=np.array([2, 2, -1, -1]),
        shared=np.array([3 + 8, 3 + 16, 0, 0]),
    )
    backbone, found = shared(folders[name], kernel), []
    for shares in (True, False):
        vectors = torch.randn(4, backbone.input_size, generator=torch.Generator().manual_seed(0)).requires_grad_()
        settings = EncoderSettings(share_prefix=shares, share_header=shares, micro_batch_tokens=8192 if shares else 1)
        encoder = PromptEncoder(backbone, settings)
        hidden = encoder(batch, vectors)
        (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        found.append((hidden.detach(), vectors.grad, encoder.counts))
    assert found[0][2].computed - found[0][2].padding == 24 + 6 + 6 + 6 + 6
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("explicit_mask", [False, True])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_prefix_and_tail_through_the_cache_equal_one_piece(folders, name, explicit_mask):
    backbone = shared(folders[name])
    whole = backbone.embedding(token_ids(2, 11)).detach().requires_grad_()
    expected, nothing = backbone(whole, positions(0, 11))
    weights = torch.randn(expected[:, 7:].shape, generator=torch.Generator().manual_seed(2))
    (expected_gradient,) = torch.autograd.grad((expected[:, 7:] * weights).sum(), whole)

    _, cache = backbone(whole[:, :7], positions(0, 7), use_cache=True)
    mask = causal(11)[None, None, 7:] if explicit_mask else None
    tail, _ = backbone(whole[:, 7:], positions(7, 11), mask, cache)
    (gradient,) = torch.autograd.grad((tail * weights).sum(), whole)
    assert nothing is None
    assert expected_gradient[:, :7].abs().max() > 1e-3  # the prefix matters
    close(tail, expected[:, 7:])
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_row_may_see_a_part_of_the_cache(folders):
    """Rows of one batch whose prefixes differ in length: what is beyond a row's own prefix is masked."""
    backbone, reference = shared(folders["gemma3"]), plain(folders["gemma3"])
    ids, tails, lengths = token_ids(2, 8), token_ids(2, 3), [8, 5]
    _, cache = backbone(backbone.embedding(ids), positions(0, 8), use_cache=True)
    cache = DynamicCache(ddp_cache_data=[(layer.keys, layer.values) for layer in cache.layers])
    seen = torch.arange(8) < torch.tensor(lengths)[:, None]
    mask = torch.cat([seen[:, None].expand(-1, 3, -1), causal(3).expand(2, -1, -1)], dim=2)[:, None]
    hidden, _ = backbone(backbone.embedding(tails), torch.tensor(lengths)[:, None] + torch.arange(3), mask, cache)
    for row, length in enumerate(lengths):
        whole = torch.cat([ids[row, :length], tails[row]])[None]
        close(hidden[row], reference(input_ids=whole).last_hidden_state[0, length:])


@torch.no_grad()
def test_without_a_mask_a_jump_in_the_positions_hides_nothing():
    backbone = load("tiny")
    embeddings, jump = backbone.embedding(token_ids(1, 8)), torch.tensor([[0, 1, 2, 3, 2, 3, 4, 5]])
    hidden, _ = backbone(embeddings, jump)
    expected, _ = backbone(embeddings, jump, causal(8)[None, None])
    close(hidden, expected)
    two_sequences = backbone.model(inputs_embeds=embeddings, position_ids=jump, use_cache=False).last_hidden_state
    assert (two_sequences - expected).abs().max() > 1e-3  # what plain transformers makes of it


def test_without_a_mask_the_fused_causal_kernel_runs(monkeypatch):
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments, **options):
        calls.append((options["attn_mask"], options["is_causal"]))
        return kernel(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    backbone = load("tiny")
    backbone(backbone.embedding(token_ids(3, 9)), positions(0, 9))
    assert calls == [(None, True)] * 2


def test_a_mask_must_be_boolean_and_four_dimensional():
    backbone = load("tiny")
    embeddings = backbone.embedding(token_ids(1, 3))
    for mask in (causal(3), causal(3)[None, None].float()):
        with pytest.raises(ValueError, match="boolean"):
            backbone(embeddings, positions(0, 3), mask)


# ---- What a backbone says of itself


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_sizes(folders, name):
    _, _, input_size, hidden_size, is_sliding = ARCHITECTURES[name]
    backbone = shared(folders[name])
    hidden, _ = backbone(torch.zeros(1, 2, backbone.input_size), positions(0, 2))
    assert (backbone.input_size, backbone.hidden_size, hidden.shape[-1]) == (input_size, hidden_size, hidden_size)
    assert (backbone.is_sliding, backbone.sliding_window) == (is_sliding, WINDOW if is_sliding else None)
    assert backbone.context_length == 64
    assert backbone.layers == 3


def test_modules_are_registered_once():
    backbone = load("tiny")
    assert len(list(backbone.children())) == 1
    assert backbone.embedding.weight.shape == (VOCABULARY, 32)
    assert sum(p.numel() for p in backbone.parameters()) == sum(p.numel() for p in backbone.model.parameters())


def test_what_the_tokenizer_puts_before_a_text(folders, tokenizer):
    assert load("tiny").prefix_ids == [tokenizer.bos_token_id]


def test_identity_tells_models_apart(folders, folder):
    def identity(**settings):
        return load(folder, **settings).identity

    first = identity()
    assert json.loads(json.dumps(first)) == first
    assert first == load(folders["llama"]).identity | {"name": "model"}
    assert {key: first[key] for key in ("source", "layers", "dtype", "tuning")} == {
        "source": "folder",
        "layers": 3,
        "dtype": "float32",
        "tuning": "frozen",
    }
    assert identity(backbone_layers=2) != first
    assert identity(backbone_dtype="bfloat16") != first
    assert identity(tuning="lora") != identity(tuning="lora", lora_r=4)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert identity() != first


def test_identity_covers_all_bytes_of_the_weights(folders, folder):
    """Merged LLMs of many gigabytes may begin with equal megabytes: the difference here is in the very last bytes."""
    first = load(folder).identity
    content = bytearray((folder / "model.safetensors").read_bytes())
    assert len(content) > 1 << 17
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert load(folder).identity != first == load(folders["llama"]).identity | {"name": "model"}


def test_identity_covers_large_files(tmp_path):
    for name, end in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"\0" * (3 << 20) + end)
        (tmp_path / name / "README.md").write_text(name)  # not a part of the model
    digests = [model_digest(tmp_path / name) for name in "abc"]
    assert digests[0] == digests[2] != digests[1]
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"1")
    assert model_digest(tmp_path / "a") != digests[0]


def test_a_digest_is_computed_once_per_process(folder, monkeypatch):
    reads, digest = [], reading.hashlib.file_digest

    def spy(stream, name):
        reads.append(Path(stream.name).name)
        return digest(stream, name)

    monkeypatch.setattr(reading.hashlib, "file_digest", spy)
    assert len({model_digest(folder) for _ in range(3)}) == 1
    assert reads.count("model.safetensors") == 1
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    model_digest(folder)
    assert reads.count("config.json") == 2 and reads.count("model.safetensors") == 1


def test_a_bidirectional_llm_is_refused_where_tokens_must_not_see_those_after_them():
    backbone = load("tiny")
    assert backbone.causal
    backbone.causal = False
    embeddings, mask = backbone.embedding(token_ids(1, 3)), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    backbone(embeddings, positions(0, 3), mask)
    cases = {
        "be run without an attention mask": lambda: backbone(embeddings, positions(0, 3)),
        "share keys and values": lambda: backbone(embeddings, positions(0, 3), mask, use_cache=True),
        "encode padded prompts": lambda: PromptEncoder(backbone, EncoderSettings()),
    }
    for purpose, use in cases.items():
        with pytest.raises(UserError, match=f"backbone: tiny is bidirectional.*cannot {purpose}.*choose a causal LLM"):
            use()


def test_settings_are_read_once(folder):
    settings = read_settings({"backbone": str(folder), "backbone_dtype": "float32", "device": "cpu", "backbone_layers": 2})
    assert read_settings(settings) is settings
    assert load_backbone(settings).identity.items() >= fetch_backbone(settings).items()
    assert load_backbone(settings).layers == 2


# ---- Depth, type, tuning


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@torch.no_grad()
def test_backbone_layers_keeps_the_first_and_the_final_norm(folders, name):
    backbone, reference = load(folders[name], backbone_layers=2), copy.deepcopy(plain(folders[name]))
    decoder = reference.get_decoder()
    blocks = "h" if name == "gpt2" else "layers"
    setattr(decoder, blocks, getattr(decoder, blocks)[:2])
    ids = token_ids(1, 10)
    hidden, _ = backbone(backbone.embedding(ids), positions(0, 10), causal(10)[None, None])
    close(hidden, reference(input_ids=ids).last_hidden_state)
    assert backbone.layers == backbone.identity["layers"] == len(getattr(backbone.model, blocks)) == 2


def test_backbone_layers_may_leave_no_sliding_window(folders):
    backbone = load(folders["qwen2-sliding"], backbone_layers=1)
    assert not backbone.is_sliding and backbone.sliding_window is None


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_frozen_has_no_dropout_and_passes_gradients(folders, name):
    backbone = load(folders[name])
    torch.nn.ModuleList([backbone]).train()
    assert not any(module.training for module in backbone.causal_lm.modules())
    embeddings = backbone.embedding(token_ids(1, 6)).detach().requires_grad_()
    first, _ = backbone(embeddings, positions(0, 6))
    second, _ = backbone(embeddings, positions(0, 6))
    assert torch.equal(first, second)
    first.square().sum().backward()
    assert embeddings.grad.abs().min() > 0
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.frozen

    trained = load(folders[name], tuning="full").train()
    first, _ = trained(embeddings, positions(0, 6))
    second, _ = trained(embeddings, positions(0, 6))
    assert not torch.equal(first, second)  # so the test above can fail
    assert not trained.frozen


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_lora_trains_small_float32_matrices_that_begin_at_nothing(folders, name):
    backbone = load(folders[name], tuning="lora", backbone_dtype="bfloat16", lora_r=2)
    trained = {key: parameter for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in key and parameter.dtype == torch.float32 for key, parameter in trained.items())
    assert sum(p.numel() for p in trained.values()) < 0.2 * sum(p.numel() for p in backbone.model.parameters())
    embeddings = backbone.embedding(token_ids(1, 6))
    hidden, _ = backbone(embeddings, positions(0, 6))
    expected, _ = load(folders[name], backbone_dtype="bfloat16")(embeddings, positions(0, 6))
    assert torch.equal(hidden, expected)
    hidden.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained.values())
    assert any(parameter.grad.abs().sum() > 0 for key, parameter in trained.items() if "lora_B" in key)


def test_lora_of_an_architecture_that_peft_does_not_know(tmp_path, tokenizer):
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    assert "olmo2" not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    AutoModelForCausalLM.from_config(transformers.Olmo2Config(**LLAMA)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backbone = load(tmp_path, tuning="lora")
    adapted = {key.split(".lora_")[0] for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert len(adapted) == 3 * 7  # all linear layers, not the output head
    assert not any("lm_head" in key for key in adapted)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_all_linear_adapts_the_decoders_linear_layers_and_no_output_head(folders, name):
    def linear(backbone):
        return {
            key.removesuffix(".base_layer")
            for key, module in backbone.model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and "lora_" not in key
        }

    backbone = load(folders[name], tuning="lora", lora_target_modules="all-linear")
    trained = {key: parameter for key, parameter in backbone.model.named_parameters() if parameter.requires_grad}
    assert {key.split(".lora_")[0] for key in trained} == linear(load(folders[name]))
    assert sum(parameter.requires_grad for parameter in backbone.causal_lm.parameters()) == len(trained)
    inputs = backbone.embedding(token_ids(1, 6))
    hidden, _ = backbone(inputs, positions(0, 6))
    close(hidden, load(folders[name])(inputs, positions(0, 6))[0])
    hidden.square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained.values())


@pytest.mark.parametrize("modules", [["gate_proj"], ("gate_proj",), "gate_proj"])
def test_lora_target_modules_are_obeyed(folders, modules):
    backbone = load(folders["llama"], tuning="lora", lora_target_modules=modules)
    adapted = {key.split(".")[-4] for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert adapted == {"gate_proj"}


@pytest.mark.parametrize(("name", "head_is_trained"), [("llama", False), ("gpt2", True)])
def test_full_trains_what_the_forward_pass_uses(folders, name, head_is_trained):
    backbone = load(folders[name], tuning="full", backbone_dtype=None)
    assert (
        backbone.causal_lm.get_output_embeddings().weight.requires_grad is head_is_trained
    )  # GPT-2's is the embedding
    assert all(parameter.requires_grad for parameter in backbone.model.parameters())
    assert backbone.dtype == torch.float32


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
    ],
)
def test_auto_takes_bfloat16_where_the_cpu_computes_in_it(monkeypatch, folders, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    backbone = load(folders["llama"], backbone_dtype="auto")
    assert backbone.dtype == dtype
    hidden, _ = backbone(torch.zeros(1, 2, 32), positions(0, 2), causal(2)[None, None])
    assert hidden.dtype == dtype


def test_auto_takes_eager_attention_where_there_is_no_other(folders):
    assert load(folders["gemma2"]).attn_implementation == "eager"
    assert load(folders["gemma3"]).attn_implementation == "sdpa"


# ---- Quantisation


def without_bitsandbytes(monkeypatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"backbone_quantization": "2bit"}, "backbone_quantization must be one of 4bit, 8bit, not '2bit'"),
        ({"tuning": "full"}, "backbone_quantization: 4bit leaves weights that cannot be trained.*use tuning: lora"),
        ({"device": "cpu"}, "backbone_quantization: 4bit needs a CUDA GPU, not the device cpu; set .* to None"),
        ({"device": "cuda"}, r"backbone_quantization: 4bit needs the bitsandbytes package: pip install .*\[quantization\]"),
        ({"backbone": "tiny"}, "backbone_quantization: 4bit cannot be applied to tiny; give a Hugging Face id or a folder"),
        ({"backbone": "model.GGUF"}, "backbone_quantization: 4bit cannot be applied to model.GGUF"),
    ],
)
def test_what_quantization_lacks_is_said_before_weights_are_read(monkeypatch, folder, settings, sentence):
    (folder / "model.safetensors").write_bytes(b"not to be read")
    without_bitsandbytes(monkeypatch)
    settings = {"backbone": str(folder), "backbone_quantization": "4bit", "device": "cuda", **settings}
    for step in (fetch_backbone, load_backbone):
        with pytest.raises(UserError, match=sentence) as error:
            step(settings)
        assert "\n" not in str(error.value)


def test_quantization_is_asked_of_transformers_and_part_of_the_identity(monkeypatch, folders, folder):
    asked = []
    read = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*arguments, quantization_config=None, device_map=None, **options):
        asked.append((quantization_config, device_map))
        return read(*arguments, **options)

    monkeypatch.setattr(backbone_settings, "_check_quantization", lambda wanted: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    four = load(folder, backbone_quantization="4bit", backbone_dtype="bfloat16")
    eight = load(folder, backbone_quantization="8bit", backbone_dtype="bfloat16")
    none = load(folder, backbone_dtype="bfloat16")
    (of_four, where), (of_eight, _), (of_none, nowhere) = asked
    assert of_four.load_in_4bit and of_four.bnb_4bit_quant_type == "nf4" and not of_four.load_in_8bit
    assert of_four.bnb_4bit_compute_dtype == torch.bfloat16
    assert of_eight.load_in_8bit and not of_eight.load_in_4bit and of_none is None
    assert where == {"": torch.device("cpu")} and nowhere is None
    assert four.identity == none.identity | {"quantization": "4bit"}
    assert eight.identity == none.identity | {"quantization": "8bit"}

    with pytest.raises(UserError, match="merge_adapter: LoRA matrices would be rounded away .* backbone_quantization: 4bit"):
        load(folder, backbone_quantization="4bit", tuning="lora", merge_adapter=True)
    edit_config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})(folder)
    with pytest.raises(UserError, match="is quantized already; set backbone_quantization to None"):
        load(folder, backbone_quantization="4bit")


def quantises() -> bool:
    return torch.cuda.is_available() and find_spec("bitsandbytes") is not None


@pytest.mark.gpu
@pytest.mark.skipif(not quantises(), reason="quantization needs a CUDA GPU and bitsandbytes")
@pytest.mark.parametrize("tuning", ["frozen", "lora"])
@pytest.mark.parametrize(("bits", "layer", "tolerance"), [("4bit", "Linear4bit", 0.03), ("8bit", "Linear8bitLt", 0.08)])
def test_a_quantized_llm_computes_with_its_rounded_weights_and_passes_gradients(
    tmp_path, tokenizer, bits, layer, tolerance, tuning
):
    import bitsandbytes
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128}  # in blocks of 64, as bitsandbytes wants its rows
    AutoModelForCausalLM.from_config(transformers.LlamaConfig(**LLAMA | sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"backbone_dtype": "bfloat16", "device": "cuda", "tuning": tuning}
    quantized = load(tmp_path, **settings, backbone_quantization=bits)
    expected = load(tmp_path, **settings)
    plain_modules = dict(expected.named_modules())
    kind = getattr(bitsandbytes.nn, layer)
    rounded = {name: module for name, module in quantized.named_modules() if isinstance(module, kind)}
    assert len(rounded) == 3 * 7 and quantized.dtype == torch.bfloat16
    with torch.no_grad():
        for name, module in rounded.items():
            weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
            plain_weight = plain_modules[name].weight
            assert 0 < (weight - plain_weight).norm() < 0.15 * plain_weight.norm()
            plain_weight.copy_(weight)

    inputs = quantized.embedding(token_ids(1, 12).to(quantized.device)).detach().requires_grad_()
    where = positions(0, 12).to(quantized.device)
    hidden, _ = quantized(inputs, where)
    expected_hidden, _ = expected(inputs, where)
    (gradient,) = torch.autograd.grad(hidden.float().sin().sum(), inputs, retain_graph=tuning == "lora")
    (expected_gradient,) = torch.autograd.grad(expected_hidden.float().sin().sum(), inputs)
    assert (hidden - expected_hidden).norm() < tolerance * expected_hidden.norm()
    assert (gradient - expected_gradient).norm() < 2 * tolerance * expected_gradient.norm()
    assert torch.equal(torch.nn.ModuleList([quantized]).to(quantized.device)[0](inputs, where)[0], hidden)

    trained = {key: parameter for key, parameter in quantized.named_parameters() if parameter.requires_grad}
    assert bool(trained) == (tuning == "lora")
    if trained:
        # peft's own layers for quantized weights, not those for plain ones
        assert any(type(module).__module__ == "peft.tuners.lora.bnb" for module in quantized.modules())
        assert all("lora_" in key and parameter.dtype == torch.float32 for key, parameter in trained.items())
        hidden.float().square().sum().backward()
        assert any(parameter.grad.abs().sum() > 0 for key, parameter in trained.items() if "lora_B" in key)


# ---- The random model


def test_tiny_is_seeded_and_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (load("tiny", seed=seed).embedding.weight for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_lora_matrices_are_seeded(folders):
    first, again, other = (
        [p for p in load(folders["llama"], tuning="lora", seed=seed).parameters() if p.requires_grad]
        for seed in (5, 5, 6)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_local_models_need_no_network(monkeypatch, folders, tmp_path):
    def refuse(*arguments, **options):
        raise AssertionError("the network was asked for")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load("tiny")
    load(folders["llama"])
    load(write_gguf(tmp_path / "model.gguf", folders["llama"]))


# ---- Sources


def write_gguf(path: Path, folder: Path) -> Path:
    """Write the Llama of a folder as a GGUF file, float32, in the way of llama.cpp's converter."""
    gguf = pytest.importorskip("gguf")
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, tokenizer = model.config, transformers.AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if piece in special else gguf.TokenType.NORMAL for piece in pieces])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        array = weight.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if heads:  # rotary halves become pairs
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(key, (".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def test_a_gguf_file_is_read(folders, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", folders["llama"])
    backbone, reference = load(path), plain(folders["llama"])
    ids = token_ids(1, 8)
    close(backbone(backbone.embedding(ids), positions(0, 8))[0], reference(input_ids=ids).last_hidden_state)
    assert encode_text(backbone.tokenizer, ["Star of the </s>"]) == encode_text(
        load("tiny").tokenizer, ["Star of the </s>"]
    )
    assert load(path, backbone_layers=1).layers == 1
    assert backbone.identity["source"] == "gguf"


@torch.no_grad()
def test_smollm2_is_read_from_a_gguf_file_in_a_wheel(folders, publish, monkeypatch):
    def write(folder):
        write_gguf(folder / built_in.SMOLLM2_GGUF, folders["llama"])

    wheel = publish(built_in.SMOLLM2, write)
    for module in (built_in, llm):
        monkeypatch.setattr(module, "SMOLLM2", wheel)
    first, second = load("smollm2-135m"), load("smollm2-135m", backbone_layers=2)
    assert second.layers == 2
    assert first.identity["sha256"] == wheel.files[built_in.SMOLLM2_GGUF]
    expected = plain(folders["llama"]).embed_tokens.weight.bfloat16().float()
    assert torch.equal(first.embedding.weight, expected)


@pytest.mark.parametrize("name", ["llama-3.2-3b", "some-org/some-model"])
def test_a_hugging_face_id_is_fetched_without_pickles_and_read_locally(monkeypatch, folder, name):
    import huggingface_hub

    commit = folder.rename(folder.parent / "0123abcd")
    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    backbone = load(name, backbone_revision="v1")
    assert asked["repo"] == {"llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct"}.get(name, name)
    assert asked["revision"] == "v1"
    assert not any(pattern in ("*", "*.bin") for pattern in asked["allow_patterns"])
    assert (backbone.identity["source"], backbone.identity["revision"]) == ("huggingface", "0123abcd")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("LocalEntryNotFoundError", r"cannot be fetched .* \(cannot reach the hub\); set backbone to the folder"),
        ("GatedRepoError", "license .*hf auth login"),
        ("RepositoryNotFoundError", "neither a folder"),
        ("RevisionNotFoundError", "backbone_revision: .* no revision 'v9'"),
    ],
)
def test_a_hub_that_does_not_give(monkeypatch, kind, sentence):
    import huggingface_hub.errors

    def snapshot_download(*arguments, **options):
        error = getattr(huggingface_hub.errors, kind)
        if issubclass(error, FileNotFoundError):
            raise error("cannot reach the hub\nand more")
        raise error.__new__(error)  # __init__ wants the response of some HTTP library

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=sentence):
        load("some-org/some-model", backbone_revision="v9")


# ---- Bad input: one sentence that names the key


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"backbone": None}, "backbone must name an LLM"),
        ({"backbone": 3}, "backbone must name an LLM"),
        ({"backbone": "smolm2-135m"}, "did you mean smollm2-135m"),
        ({"backbone": "gpt2"}, "it may be smollm2-135m, tiny"),
        ({"backbone": "./no/such/folder"}, "there is no folder ./no/such/folder"),
        ({"backbone": "no/such/model.gguf"}, "there is no file no/such/model.gguf"),
        ({"backbone": __file__}, "is a file; give the folder"),
        ({"backbone_layers": 0}, "backbone_layers must be a whole number from 1"),
        ({"backbone_layers": True}, "backbone_layers must be a whole number from 1"),
        ({"backbone_layers": "2"}, "backbone_layers must be a whole number from 1"),
        ({"backbone_layers": 3}, "backbone_layers must be from 1 to 2 for tiny, not 3"),
        ({"backbone_dtype": "bfloat"}, "backbone_dtype must be one of .*did you mean bfloat16"),
        ({"tuning": "qlora"}, "tuning must be one of frozen, lora, full, not 'qlora'; did you mean lora"),
        ({"attn_implementation": "flash"}, "attn_implementation must be one of"),
        ({"tuning": "lora", "lora_r": 0}, "lora_r must be a whole number above 0"),
        ({"tuning": "lora", "lora_r": 2.5}, "lora_r must be a whole number above 0"),
        ({"tuning": "lora", "lora_alpha": -1}, "lora_alpha must be a number above 0"),
        ({"tuning": "lora", "lora_dropout": 1.0}, "lora_dropout must be a number from 0 to below 1"),
        ({"tuning": "lora", "lora_target_modules": ["nothing"]}, "lora_target_modules: .*nothing.* does not fit tiny"),
        ({"tuning": "lora", "lora_target_modules": []}, "lora_target_modules must be a list"),
        ({"merge_adapter": True}, "merge_adapter: there are no LoRA matrices under tuning: frozen; set .* to False"),
    ],
)
def test_settings_that_make_no_sense(settings, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        load_backbone({"backbone": "tiny", **settings})
    assert "\n" not in str(error.value)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(**changes):
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def index_to(file):
    """Replace the weights by an index that names ``file``, beside a file of safetensors."""

    def write(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        torch.save(weights, folder / "model-00002-of-00002.bin")
        save_file(weights, folder.parent / "elsewhere.safetensors", metadata={"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (index_to("model-00002-of-00002.bin"), "index.json of .* names model-00002-of-00002.bin as its weights; only safe"),
        (index_to("../elsewhere.safetensors"), "index.json of .* names ../elsewhere.safetensors .* not in the folder"),
        (index_to(7), "names 7 as its weights"),
        (edit_config(transformers_weights="../elsewhere.safetensors"), "elsewhere.safetensors .* not in the folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), "an adapter only"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "an adapter beside its model"),
        (lambda folder: (folder / "config.json").write_text("{"), "configuration of .* cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (pickle_weights, "weights pickled.*save them as safetensors"),
        (lambda folder: truncate(folder / "model.safetensors"), "cannot be loaded"),
        (drop_a_weight, r"lacks 1 of its weights, model.layers.1.mlp.up_proj.weight"),
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "no tokenizer|no fast tokenizer"),
        (edit_config(hidden_size=48, head_dim=8), "do not fit its config.json"),
        (edit_config(hidden_size="wide"), "configuration of .* cannot be read"),
        (edit_config(hidden_size=33), "configuration of .* cannot be read"),
        (edit_config(model_type="no-such-type"), "configuration of .* cannot be read"),
        (
            edit_config(model_type="no-such-type", auto_map={"AutoConfig": "evil.Config"}),
            "configuration of .* cannot be read",
        ),
        (edit_config(transformers_weights="adapter_model.bin"), "only safetensors are read"),
        (edit_config(vocab_size=100), "do not fit its config.json"),
    ],
)
def test_a_folder_that_is_no_model(folder, spoil, sentence, monkeypatch):
    spoil(folder)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(UserError, match=sentence) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_backbone_layers_names_the_range_of_a_folder(folder):
    with pytest.raises(UserError, match="backbone_layers must be from 1 to 3 for .*, not 4"):
        load(folder, backbone_layers=4)


def test_a_damaged_gguf_file(tmp_path, folders):
    path = write_gguf(tmp_path / "model.gguf", folders["llama"])
    for content in (b"", b"GGUF", path.read_bytes()[:3000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="configuration of .*model.gguf cannot be read|cannot be loaded"):
            load(path)


def test_models_that_a_causal_prompt_would_misuse(tmp_path, tokenizer):
    for model_type, settings, sentence in (
        ("bert", SMALL | {"intermediate_size": 64}, "is no causal LLM"),
        ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "takes no position_ids"),
        ("mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1}, "takes no|of type"),
    ):
        folder = tmp_path / model_type
        AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **settings)).save_pretrained(
            folder
        )
        tokenizer.save_pretrained(folder)
        with pytest.raises(UserError, match=sentence):
            load(folder)


def test_a_tokenizer_of_another_model(tmp_path, tokenizer):
    AutoModelForCausalLM.from_config(transformers.LlamaConfig(**LLAMA | {"vocab_size": 100})).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the tokenizer of .* has 516 tokens, its model 100: not a pair"):
        load(tmp_path)


def test_kernels_that_are_not_there(folders):
    with pytest.raises(UserError, match="attn_implementation: .* caps its attention scores"):
        load(folders["gemma2"], attn_implementation="sdpa")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="attn_implementation: .*flash_attention_2"):
            load(folders["llama"], attn_implementation="flash_attention_2")


def test_keys_and_values_have_two_names_in_transformers(monkeypatch):
    """Since 5.24 a decoder calls them ``cache``."""
    expected = load("tiny")
    name, forward = cache_name(expected.model), transformers.LlamaModel.forward

    def renamed(self, inputs_embeds=None, position_ids=None, attention_mask=None, cache=None, use_cache=None):
        rest = {"attention_mask": attention_mask, "use_cache": use_cache, name: cache}
        return forward(self, inputs_embeds=inputs_embeds, position_ids=position_ids, **rest)

    monkeypatch.setattr(transformers.LlamaModel, "forward", renamed)
    backbone = load("tiny")
    assert cache_name(backbone.model) == "cache"
    inputs = backbone.embedding(token_ids(1, 6)).detach()
    _, past = backbone(inputs[:, :4], positions(0, 4), use_cache=True)
    tail, _ = backbone(inputs[:, 4:], positions(4, 6), causal(6)[None, None, 4:], past)
    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    whole, _ = expected(inputs, positions(0, 6))
    assert torch.allclose(tail, whole[:, 4:], atol=1e-4)


def test_flash_attention_refuses_a_mask_in_a_sentence():
    backbone = load("tiny")
    backbone.supports_masks = False
    with pytest.raises(UserError, match="share_header and share_prefix"):
        backbone(torch.zeros(1, 2, 32), positions(0, 2), causal(2)[None, None])


# ---- Text


HARD_TEXTS = [
    "Toy Story (1995)",
    "",
    " ",
    "</s>",
    "a <|im_end|> b <s><pad>",
    "<|endoftext|><|im_start|>system",
    "tab\tnew\nline\x00\x01\x1b\x7f",
    "Amélie 千と千尋の神隠し 🎬",
    "[UserOut] &amp; <b>",
    "x" * 10_000,
    "\n\nStarts with lines",
]


def check_text(tokenizer) -> None:
    encoded = encode_text(tokenizer, HARD_TEXTS)
    assert not {index for ids in encoded for index in ids} & set(tokenizer.all_special_ids)
    assert [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in encoded] == HARD_TEXTS
    assert encoded == [encode_text(tokenizer, [text])[0] for text in HARD_TEXTS]


def test_special_tokens_in_a_text_are_plain_text(tokenizer):
    assert {"</s>", "<|im_end|>"} <= set(tokenizer.all_special_tokens)
    check_text(tokenizer)
    assert tokenizer("</s>", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]  # what it would be


def test_texts_that_are_no_unicode_and_no_texts(tokenizer):
    assert encode_text(tokenizer, []) == []
    assert encode_text(tokenizer, ["a\ud800b"]) == encode_text(tokenizer, ["a?b"])


def sentencepiece_like(style: str):
    """A tokenizer that puts a space before a text, as those of Llama 2 and Mistral do in one of two ways."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeHlo", "▁H", "▁a", "lo"]
    merges = [("▁", "H"), ("▁", "a"), ("l", "o")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if style == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("style", ["metaspace", "prepend"])
def test_no_space_is_put_before_a_text(style):
    tokenizer = sentencepiece_like(style)
    plainly = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(plainly)[0] == "▁H"
    (ids,) = encode_text(tokenizer, ["Hello"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["H", "e", "l", "lo"]
    check_text(tokenizer)


def smollm2_is_there() -> bool:
    return is_complete(cache_folder() / "smollm2-135m-b179c952-bf16")


@pytest.mark.skipif(not smollm2_is_there(), reason="SmolLM2 is not in the cache folder (make quickstart puts it there)")
@torch.no_grad()
def test_the_real_smollm2():
    backbone = load("smollm2-135m", backbone_layers=2)
    check_text(backbone.tokenizer)
    assert backbone.prefix_ids == []
    assert (backbone.input_size, backbone.hidden_size, backbone.context_length) == (576, 576, 8192)
    whole = load("smollm2-135m")
    ids = encode_text(whole.tokenizer, ["The capital of France is"])[0]
    hidden, _ = whole(whole.embedding(torch.tensor([ids])), positions(0, len(ids)))
    best = whole.causal_lm.get_output_embeddings()(hidden[0, -1]).argmax()
    assert whole.tokenizer.decode(best) == " Paris"


@torch.no_grad()
def test_a_saved_adapter_is_read_and_merged_by_peft(folders, tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel

    settings = {"backbone": str(folders["llama"]), "tuning": "lora", "lora_r": 4, "backbone_dtype": "float32"}
    backbone = load_backbone({**settings, "device": "cpu"})
    for number, tensor in enumerate(adapter_tensors(backbone).values()):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    checkpoint.write_adapter(tmp_path, adapter_config(backbone), adapter_tensors(backbone))
    ids = token_ids(2, 9)
    expected = backbone.causal_lm.eval()(input_ids=ids).logits
    base = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    untuned = base(input_ids=ids).logits
    assert not torch.allclose(untuned, expected, atol=1e-3)
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)  # finds the LLM itself
    close(alone(input_ids=ids).logits, expected)
    tuned = PeftModel.from_pretrained(base, tmp_path / "adapter")
    close(tuned(input_ids=ids).logits, expected)
    torch.testing.assert_close(tuned.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


# ---- Merging LoRA matrices


def with_random_lora(folder, **settings) -> Backbone:
    backbone = load(folder, tuning="lora", **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in adapter_tensors(backbone).values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return backbone


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@torch.no_grad()
def test_merged_lora_gives_the_same_hidden_states_and_the_merged_folder_too(folders, tmp_path, name):
    backbone, ids = with_random_lora(folders[name], backbone_layers=2), token_ids(1, 10)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}

    def hidden_states(backbone: Backbone) -> Tensor:
        return backbone(backbone.embedding(ids), positions(0, 10))[0]

    expected = hidden_states(backbone)
    untuned = hidden_states(load(folders[name], backbone_layers=2))
    assert (expected - untuned).norm() > 0.01 * untuned.norm()
    with merged_adapter(backbone):
        torch.testing.assert_close(hidden_states(backbone), expected, atol=1e-4, rtol=1e-4)
        assert not all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert torch.equal(hidden_states(backbone), expected)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())

    save_merged(backbone, tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert again.layers == 2 and again.tokenizer.get_vocab() == backbone.tokenizer.get_vocab()
    torch.testing.assert_close(hidden_states(again), expected, atol=1e-4, rtol=1e-4)
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids=ids).logits
    torch.testing.assert_close(logits, backbone.causal_lm(input_ids=ids).logits, atol=1e-3, rtol=1e-3)


def test_merged_weights_have_the_type_of_the_published_ones(folders, tmp_path):
    """Computed in float32, an LLM that was published in bfloat16 is not stored in twice the space."""
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(folders["llama"]).to(torch.bfloat16).save_pretrained(half)
    load(folders["llama"]).tokenizer.save_pretrained(half)
    backbone = with_random_lora(half)
    assert backbone.model.dtype == torch.float32
    save_merged(backbone, tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16} and backbone.causal_lm.config.dtype == torch.float32
    with merged_adapter(backbone):
        name, merged = next((name, tensor) for name, tensor in backbone.causal_lm.named_parameters() if ".q_proj.base" in name)
        assert torch.equal(stored[name.replace(".base_layer", "")], merged.to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_model_card(folders, kind):
    backbone = with_random_lora(folders["llama"], backbone_layers=1)
    record = {"model": "TALLRec", "dataset": 'a": \n---\nb', "seed": 3, "best_valid_result": {"hit@10": 0.123456}}
    _, front, text = model_card(backbone, kind, record).split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == str(folders["llama"])
    assert front["library_name"] == {"adapter": "peft", "merged": "transformers"}[kind]
    assert "`TALLRec`" in text and '"hit@10": 0.1235' in text and "\n---" not in text
    assert ("cut it to the first 1" in text) == (kind == "adapter")


def test_a_merged_folder_is_whole_or_not_there(folders, tmp_path, monkeypatch):
    backbone = with_random_lora(folders["llama"])
    weights = backbone.causal_lm.state_dict()
    before = {key: value.clone() for key, value in weights.items()}

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(backbone.tokenizer, "save_pretrained", stop)
        save_merged(backbone, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(value, before[key]) for key, value in weights.items())
    (tmp_path / "merged.killed.part").mkdir()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "of_an_earlier_run").write_text("")
    save_merged(backbone, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert not (tmp_path / "merged" / "of_an_earlier_run").exists()


def test_an_output_head_that_was_made_up_is_not_saved(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    backbone = with_random_lora(folder)
    assert backbone.causal_lm.lacks_output_head
    save_merged(backbone, tmp_path / "merged")
    assert load(tmp_path / "merged").causal_lm.lacks_output_head
