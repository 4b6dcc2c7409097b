"""A Longformer that reads items as sentences of attributes: token, position, kind and place of the item are embedded.

::

    token           <s>  title Toy Story brand Disney  title Golden Eye ...
    position         0     1    2   3     4     5       6     7     8
    kind             0     1    2   2     1     2       1     2     2        1 = an attribute's name, 2 = its value
    item's place     0     1    1   1     1     1       2     2     2        1 = the first item of the sentence

(Li et al., "Text Is All You Need: Learning Language Representations for Sequential Recommendation", KDD 2023, section 2.2.2.)
The first token sees all others and is seen by them; the others see a window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LongformerConfig, LongformerModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recbole_llm.backbone.encoder import EncoderCounts, EncoderSettings
from recbole_llm.backbone.sentence_encoder import TextTransformer, load_text_transformer
from recbole_llm.backbone.text_model import TextModel
from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import cut_into_micro_batches

SMALL = "small"  # the built-in one: random weights, and a vocabulary made of the texts that it will read
_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # in the order of Longformer's own
_VOCABULARY = 4096
_KINDS = 4  # of tokens: the first one, names, values, padding


@dataclass(frozen=True)
class LongformerSettings:
    """Which Longformer, and of the built-in one its size.

    Attributes:
        name: ``small``, a folder, or a Hugging Face id.
        hidden_size, n_layers, n_heads: of the built-in one.
        attention_window: tokens that each token sees, an even number.
        max_tokens: most tokens of a sentence.
        seed: of random weights.
    """

    name: str
    hidden_size: int
    n_layers: int
    n_heads: int
    attention_window: int
    max_tokens: int
    seed: int


def load_longformer(settings: LongformerSettings, texts: Sequence[str], device: torch.device) -> TextTransformer:
    """Make the built-in Longformer, with a vocabulary of ``texts``, or read one from a folder or the hub.

    Raises:
        UserError: naming the key ``longformer``, or another that does not fit.
    """
    if settings.attention_window % 2:
        raise UserError(f"attention_window must be an even number of tokens, not {settings.attention_window}.")
    if settings.name == SMALL:
        transformer = _make_small(settings, texts)
    else:
        try:
            transformer = load_text_transformer(settings.name)
        except UserError as error:
            raise UserError(str(error).replace("sentence_encoder", "longformer")) from None
        if transformer.model.config.model_type != "longformer":
            raise UserError(f"longformer: {settings.name} is a {transformer.model.config.model_type}, not a Longformer.")
        _set_window(transformer.model, settings.attention_window)
    tokenizer, config = transformer.tokenizer, transformer.model.config
    for token in ("bos", "mask"):
        if getattr(tokenizer, f"{token}_token_id") is None:
            raise UserError(f"longformer: the tokenizer of {settings.name} has no {token} token; choose another Longformer.")
    most = config.max_position_embeddings - config.pad_token_id - 1
    if settings.max_tokens > most:
        raise UserError(f"max_prompt_tokens: {settings.name} has {most} positions; set it to {most} or lower.")
    transformer.model.to(device)
    return transformer


def _set_window(model: LongformerModel, window: int) -> None:
    model.config.attention_window = [window] * model.config.num_hidden_layers
    for layer in model.encoder.layer:
        layer.attention.self.one_sided_attn_window_size = window // 2


def _make_small(settings: LongformerSettings, texts: Sequence[str]) -> TextTransformer:
    if settings.hidden_size % settings.n_heads:
        raise UserError(f"n_heads: {settings.n_heads} heads do not divide hidden_size {settings.hidden_size}.")
    tokenizer = _make_tokenizer(texts)
    config = LongformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=4 * settings.hidden_size,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        attention_window=[settings.attention_window] * settings.n_layers,
        max_position_embeddings=settings.max_tokens + 2,
        type_vocab_size=_KINDS,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        sep_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        model = LongformerModel(config, add_pooling_layer=False)
    vocabulary = "\0".join(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__))
    identity: dict[str, Any] = {"source": "random", "name": SMALL, "seed": settings.seed}
    identity["vocabulary"] = hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest()
    identity["sizes"] = [settings.hidden_size, settings.n_layers, settings.n_heads]
    return TextTransformer(model.train(), tokenizer, settings.max_tokens, False, identity)


def _make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of some texts; it encodes any other as well."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.encode("utf-8", "replace").decode() for text in texts], trainer)
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


class Sentence(NamedTuple):
    """A sentence of items, each int64 ``[T]``: token ids, kinds of tokens, places of items; the first token belongs to none."""

    tokens: np.ndarray
    kinds: np.ndarray
    places: np.ndarray


class SentenceReader(nn.Module):
    """Reads sentences of items.

    Args:
        transformer: a Longformer, see :func:`load_longformer`.
        settings: of these, the size of calls.
        items: most items of a sentence.

    Attributes:
        backbone: the Longformer, its kinds of tokens those of above.
        item_places: embedding of an item's place.
    """

    def __init__(self, transformer: TextTransformer, settings: EncoderSettings, items: int) -> None:
        super().__init__()
        self.settings = settings
        self.counts = EncoderCounts()
        self.backbone = TextModel(transformer.model, transformer.tokenizer, transformer.identity)
        self._window = max(transformer.model.config.attention_window)
        self._padding = transformer.model.config.pad_token_id
        spread, size = transformer.model.config.initializer_range, self.backbone.hidden_size
        self.item_places = nn.Embedding(items + 1, size)
        kinds = nn.Embedding(_KINDS, size)
        for embedding in (self.item_places, kinds):
            nn.init.normal_(embedding.weight, std=spread)
        transformer.model.embeddings.token_type_embeddings = kinds.to(self.backbone.device)
        self.item_places.to(self.backbone.device)

    @property
    def words(self) -> Tensor:
        """Embeddings of the vocabulary, ``[tokens, hidden size]``."""
        return self.backbone.causal_lm.get_input_embeddings().weight

    def first_states(self, sentences: Sequence[Sentence]) -> Tensor:
        """The hidden state at the first token of each sentence: float32 ``[n, hidden size]``."""
        return torch.cat([states[:1] for states in self(sentences)])

    def forward(self, sentences: Sequence[Sentence]) -> list[Tensor]:
        """The hidden states of each sentence, float32 ``[T, hidden size]``."""
        lengths = np.array([len(sentence.tokens) for sentence in sentences], dtype=np.int64)
        self.counts.prompts += len(sentences)
        self.counts.tokens += int(lengths.sum())
        states: list[Tensor] = [torch.empty(0)] * len(sentences)
        for batch in cut_into_micro_batches(lengths, self.settings.micro_batch_tokens, self.settings.call_cost):
            hidden = self._encode([sentences[row] for row in batch])
            for row, own in zip(batch.tolist(), hidden, strict=True):
                states[row] = own[: lengths[row]]
        return states

    def _encode(self, sentences: Sequence[Sentence]) -> Tensor:
        longest = max(len(sentence.tokens) for sentence in sentences)
        width = -(-longest // self._window) * self._window  # a whole number of windows
        table = np.zeros((4, len(sentences), width), dtype=np.int64)
        table[0], table[1] = self._padding, _KINDS - 1
        for row, sentence in enumerate(sentences):
            table[:3, row, : len(sentence.tokens)] = sentence
            table[3, row, : len(sentence.tokens)] = 1
        self.counts.calls += 1
        self.counts.computed += len(sentences) * width
        self.counts.padding += int((table[3] == 0).sum())
        tokens, kinds, places, inside = torch.from_numpy(table).to(self.backbone.device)
        sees_all = torch.zeros_like(inside)
        sees_all[:, 0] = 1
        model = self.backbone.causal_lm
        positions = torch.arange(width, device=tokens.device).clamp(max=longest - 1) + self._padding + 1
        output = model(
            inputs_embeds=model.get_input_embeddings()(tokens) + self.item_places(places),
            attention_mask=inside,
            global_attention_mask=sees_all,
            token_type_ids=kinds,
            position_ids=positions.expand(len(sentences), -1),
        )
        return output.last_hidden_state.float()


def word_starts(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Which tokens begin a word, bool ``[tokens]``: those with a space before them, or that begin with a punctuation mark."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    texts = [tokenizer.convert_tokens_to_string([token]) for token in tokens]
    return np.array([text[:1].isspace() or not (text[:1].isalnum() or text[:1] == "") for text in texts])
