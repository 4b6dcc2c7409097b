"""TIGER: an item is a tuple of codes made of its text, and a small encoder-decoder writes the next item's tuple.

Reference:
    Shashank Rajput et al., "Recommender Systems with Generative Retrieval", NeurIPS 2023.

The authors published no code; where the paper is silent, the values are those of common reimplementations, and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm.backbone.sentence_encoder import load_sentence_encoder
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.trainer.semantic_ids import QuantizerSettings, semantic_ids

NOT_FOUND = -1e9  # the score of an item that the beam search did not reach


@dataclass(frozen=True)
class TIGERSettings:
    """The model's settings; each field is the key of the same name."""

    seed: int
    sentence_encoder: str
    code_levels: int
    codebook_size: int
    rqvae_hidden_sizes: list[int]
    rqvae_latent_size: int
    rqvae_commitment: float
    rqvae_epochs: int
    rqvae_batch_size: int
    rqvae_learning_rate: float
    history_length: int
    user_tokens: int
    hidden_size: int
    inner_size: int
    n_layers: int
    n_heads: int
    head_size: int
    dropout_prob: float
    beam_size: int | None
    score_tokens: int

    def quantizer(self) -> QuantizerSettings:
        """Those of stage 1."""
        return QuantizerSettings(
            levels=self.code_levels,
            codebook_size=self.codebook_size,
            hidden_sizes=tuple(self.rqvae_hidden_sizes),
            latent_size=self.rqvae_latent_size,
            commitment_weight=self.rqvae_commitment,
            epochs=self.rqvae_epochs,
            batch_size=self.rqvae_batch_size,
            learning_rate=self.rqvae_learning_rate,
        )


class TIGER(SequentialRecommender):
    """``p(i | u) = prod_l p(c_l | c_1, ..., c_{l-1}, user, history)``, c the codes of item i.

    Stage 1, before the first training step, gives each item its codes (:meth:`make_ids`). Stage 2 trains the encoder-decoder.
    The codes are kept with the weights. A vocabulary of 0 (padding, and the first input of the decoder), then
    ``codebook_size`` tokens for each place of a tuple, then ``user_tokens``, into which users are hashed.

    Args:
        config: RecBole configuration.
        dataset: the training split of a ``TextSequentialDataset``.

    Attributes:
        reads_texts: what it becomes depends on the items' texts.
        codes: tokens of each item, int64 ``[items, code_levels + 1]``; row 0, the padding, is 0. All 0 until stage 1 is done.
    """

    reads_texts = True

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        super().__init__(config, dataset)
        from transformers import T5Config, T5ForConditionalGeneration  # takes a second to import

        self.settings = settings = select(TIGERSettings, config)
        if not hasattr(dataset, "item_texts"):
            raise UserError("TIGER reads the items' texts: its data set must be a TextSequentialDataset.")
        self._texts = dataset.item_texts
        self.places = settings.code_levels + 1
        self.first_user = 1 + self.places * settings.codebook_size
        self.transformer = T5ForConditionalGeneration(
            T5Config(
                vocab_size=self.first_user + settings.user_tokens,
                d_model=settings.hidden_size,
                d_ff=settings.inner_size,
                d_kv=settings.head_size,
                num_heads=settings.n_heads,
                num_layers=settings.n_layers,
                num_decoder_layers=settings.n_layers,
                dropout_rate=settings.dropout_prob,
                feed_forward_proj="relu",
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=None,
                use_cache=False,
            )
        )
        self.register_buffer("codes", torch.zeros(self.n_items, self.places, dtype=torch.int64))

    # Stage 1

    def make_ids(self) -> None:
        """Give each item its codes, where it has none."""
        if bool(self.codes.any()):
            return
        settings = self.settings
        encoder = load_sentence_encoder(settings.sentence_encoder, self.codes.device)
        vectors = encoder.encode(self._texts[1:])
        codes = semantic_ids(vectors, settings.quantizer(), settings.seed, self.codes.device)
        offsets = 1 + settings.codebook_size * np.arange(self.places)
        self.codes[1:] = torch.from_numpy(codes + offsets).to(self.codes.device)

    # The encoder-decoder

    def encode(self, interaction: Interaction) -> tuple[Tensor, Tensor]:
        """States of the user's token and the codes of the latest items ``[B, L, d]``, and which of them are real ``[B, L]``."""
        history, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        kept = lengths.clamp(max=self.settings.history_length)
        column = torch.arange(int(kept.max()), device=history.device)
        source = (lengths - kept)[:, None] + column
        items = history.gather(1, source.clamp(max=history.shape[1] - 1)) * (column < kept[:, None])
        tokens = self.codes[items].flatten(1)
        users = self.first_user + interaction[self.USER_ID] % self.settings.user_tokens
        tokens = torch.cat([users[:, None], tokens], dim=1)
        real = tokens > 0
        return self.transformer.encoder(input_ids=tokens, attention_mask=real.long()).last_hidden_state, real

    def next_code_logits(self, states: Tensor, real: Tensor, prefixes: Tensor) -> Tensor:
        """Logits of the next token behind each beginning of tuples.

        Args:
            states, real: of :meth:`encode`.
            prefixes: the first l tokens of C tuples for each row, int64 ``[B, C, l]``.

        Returns:
            ``[B, C, l + 1, vocabulary]``: behind no token, the first, the first two, and so on.
        """
        rows, tuples, length = prefixes.shape
        inputs = functional.pad(prefixes, (1, 0)).reshape(rows * tuples, length + 1)
        decoder = self.transformer.decoder
        hidden = decoder.dropout(self.transformer.shared(inputs))
        causal = torch.ones(length + 1, length + 1, dtype=torch.bool, device=inputs.device).tril()
        causal = torch.zeros_like(causal, dtype=hidden.dtype).masked_fill(~causal, torch.finfo(hidden.dtype).min)[None, None]
        seen = torch.zeros_like(real, dtype=hidden.dtype).masked_fill(~real, torch.finfo(hidden.dtype).min)[:, None, None]
        bias = None
        # Tuples see themselves alone, so that they are rows there; what they see of the encoder is the same for all of a row,
        # so that they are positions of one row there, and nothing of it is repeated.
        for block in decoder.block:
            itself, encoded, feed_forward = block.layer
            hidden, bias, _ = itself(hidden, attention_mask=causal, position_bias=bias)
            wide = hidden.reshape(rows, tuples * (length + 1), -1)
            hidden = encoded(wide, key_value_states=states, attention_mask=seen)[0].reshape(hidden.shape)
            hidden = feed_forward(hidden)
        hidden = decoder.dropout(decoder.final_layer_norm(hidden))
        if self.transformer.config.tie_word_embeddings:
            hidden = hidden * self.settings.hidden_size**-0.5
        return self.transformer.lm_head(hidden).reshape(rows, tuples, length + 1, -1)

    def log_likelihood(self, states: Tensor, real: Tensor, tuples: Tensor) -> Tensor:
        """log p of whole tuples int64 ``[B, C, places]``: ``[B, C]``."""
        logits = self.next_code_logits(states, real, tuples[..., :-1])
        return logits.log_softmax(dim=-1).gather(-1, tuples[..., None])[..., 0].sum(dim=-1)

    # Training

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """The mean over rows and places of -log p of the target's next code."""
        self.make_ids()
        states, real = self.encode(interaction)
        targets = self.codes[interaction[self.POS_ITEM_ID]]
        return -self.log_likelihood(states, real, targets[:, None]).mean() / self.places

    # Recommending

    @torch.no_grad()
    def score_candidates(self, interaction: Interaction, candidates: Tensor) -> Tensor:
        """log p of candidates int64 ``[B, C]``, exactly: ``[B, C]``."""
        at_once = max(1, self.settings.score_tokens // (self.places * candidates.shape[1]))
        parts = []
        for start in range(0, len(candidates), at_once):
            part = slice(start, start + at_once)
            parts.append(self.log_likelihood(*self.encode(interaction[part]), self.codes[candidates[part]]))
        return torch.cat(parts)

    @torch.no_grad()
    def beam_search(self, interaction: Interaction) -> tuple[Tensor, Tensor]:
        """Items of the ``beam_size`` best tuples that exist, int64 ``[B, K]`` (0: there are fewer), and log p, ``[B, K]``."""
        tree = self._tree()
        states, real = self.encode(interaction)
        rows, device = len(states), states.device
        nodes = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        tuples = torch.zeros(rows, 1, 0, dtype=torch.int64, device=device)
        scores = torch.zeros(rows, 1, device=device)
        for place in range(self.places):
            logits = self.next_code_logits(states, real, tuples)[:, :, -1]
            first = 1 + place * self.settings.codebook_size
            # A token that continues no item's tuple is impossible. Of those that do, p is over the whole vocabulary.
            children = tree[place][nodes]  # [B, K, codebook]: the node that each code leads to; 0: none
            found = logits.log_softmax(dim=-1)[..., first : first + self.settings.codebook_size] + scores[..., None]
            found = found.masked_fill(children == 0, float("-inf")).flatten(1)
            scores, best = found.topk(min(self.settings.beam_size or 1, found.shape[1]), dim=1)
            parent, code = best // children.shape[2], best % children.shape[2]
            nodes = children.flatten(1).gather(1, best)
            tuples = torch.cat([tuples.gather(1, parent[..., None].expand(-1, -1, place)), (code + first)[..., None]], dim=2)
        return nodes.masked_fill(scores.isneginf(), 0), scores

    def _tree(self) -> list[Tensor]:
        """The trie of the codes: for each place int64 ``[nodes, codebook]``, the node of the next place that a code leads to.

        Node 0 of place 0 is the root; 0 elsewhere means that there is none. Behind the last place a node is an item.
        """
        codes = self.codes[1:] - 1 - self.settings.codebook_size * torch.arange(self.places, device=self.codes.device)
        nodes, tree = torch.zeros(len(codes), dtype=torch.int64, device=codes.device), []
        for place in range(self.places):
            step = nodes * self.settings.codebook_size + codes[:, place]
            known, child = step.unique(return_inverse=True)
            if place == self.places - 1:
                child = torch.arange(len(codes), device=codes.device)
                known = step
            table = torch.zeros(int(nodes.max()) + 1, self.settings.codebook_size, dtype=torch.int64, device=codes.device)
            table.view(-1)[known] = torch.arange(1, len(known) + 1, device=codes.device)
            tree.append(table)
            nodes = child + 1
        return tree

    @torch.no_grad()
    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Score the whole catalog for each row, ``[B, n_items]``: log p of what the beam search finds, or of all items."""
        if self.settings.beam_size is None:
            items = torch.arange(1, self.n_items, device=self.codes.device).expand(len(interaction), -1)
            scores = self.score_candidates(interaction, items)
            return functional.pad(scores, (1, 0), value=float("-inf"))
        items, found = self.beam_search(interaction)
        scores = torch.full((len(items), self.n_items), NOT_FOUND, device=found.device)
        scores.scatter_(1, items, found)
        scores[:, 0] = float("-inf")
        return scores

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """log p of the item of each row, ``[B]``."""
        return self.score_candidates(interaction, interaction[self.ITEM_ID][:, None])[:, 0]

    def other_parameter(self) -> dict[str, nn.Parameter]:
        """None beside the weights and the codes."""
        return {}
