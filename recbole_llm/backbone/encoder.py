"""Run prompts through the LLM: vectors in at the slots, hidden states out at the out tokens, nothing computed twice.

Four techniques save computation. Each can be switched off, which gives the plain path that the tests compare with:

* Length buckets: prompts are cut into micro-batches with little padding (``cut_into_micro_batches``). Padding is on the
  right, where a causal LLM's earlier positions cannot see it, so no padding mask is needed.
* ``share_header``: the instruction header is the same in every prompt. Its keys and values are computed once
  and every prompt attends to them.
* ``share_prefix``: a perturbed prompt repeats its parent up to the first moved item. Only its tail is encoded,
  attending to the parent's keys and values::

      header      h h h                          once per weights (frozen LLM) or once per batch
      original          a a a b b b c c c . out
      perturbed               . . . c c c b b b . out      attends to  h h h a a a  of its parent

  Positions continue those of the prefix, so the result is that of the whole prompt, in value and in gradient.
  A short tail stands in its parent's own row, and a mask hides from it what is not its own prompt: the prefixes of a window
  cost one row and copy no keys and values::

      row         a a a , b b b , c c c . out . out . out
      positions   0 1 2 3 4 5 6 7 8 9 ...     3 4   7 8      the second out sees a a a alone, the third a a a , b b b
* ``skip_unread``: the output of the last layer is read at the out tokens only, so its feed-forward network runs there
  only. That saves a third of the work with 2 layers, and a fortieth with 30.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from recbole_llm.backbone.backbone import Backbone
from recbole_llm.processes import group as processes
from recbole_llm.processes import tensors
from recbole_llm.prompt.batch import PromptBatch, cut_into_micro_batches

KeyValues = list[tuple[Tensor, Tensor]]  # per layer: keys and values, each [rows, key-value heads, tokens, head size]


@dataclass
class EncoderSettings:
    """How prompts are batched; affects cost, not results.

    Attributes:
        micro_batch_tokens: the most padded tokens in one call of the LLM.
        call_cost: the fixed cost of one call of the LLM, in tokens.
        share_header: compute the header's keys and values once.
        share_prefix: encode only the tails of prompts that begin as another one does.
        branch_tokens: the most tokens of a tail that stands in its parent's row.
        skip_unread: run the last layer's feed-forward network at the out tokens only.
        recompute: recompute activations in the backward pass instead of storing them, which saves memory and costs time.
    """

    micro_batch_tokens: int = 8192
    call_cost: int = 32
    share_header: bool = True
    share_prefix: bool = True
    branch_tokens: int = 64
    skip_unread: bool = True
    recompute: bool = False


@dataclass
class EncoderCounts:
    """Work done so far.

    Attributes:
        prompts, tokens: requested.
        computed: tokens that the LLM was run on.
        padding: padding tokens among them.
        calls: of the LLM.
    """

    prompts: int = 0
    tokens: int = 0
    computed: int = 0
    padding: int = 0
    calls: int = 0

    def add(self, batch: PromptBatch, answer_tokens: int = 0) -> None:
        """Count requested prompts, with the tokens of the answers that follow them."""
        self.prompts += len(batch)
        self.tokens += int(batch.lengths.sum()) + answer_tokens


class PromptEncoder(nn.Module):
    """Encodes :class:`PromptBatch` es with a :class:`Backbone`.

    Args:
        backbone: the LLM.
        settings: see :class:`EncoderSettings`.

    Raises:
        UserError: the LLM is bidirectional: right padding, shared headers and shared prefixes need a causal one.
    """

    def __init__(self, backbone: Backbone, settings: EncoderSettings) -> None:
        super().__init__()
        backbone.require_causal("encode padded prompts, or share their headers and prefixes")
        self.backbone = backbone
        self.settings = settings
        self.counts = EncoderCounts()
        self._headers: dict[tuple[int, ...], KeyValues] = {}

    def forward(self, batch: PromptBatch, vectors: Tensor) -> Tensor:
        """Encode a batch.

        Args:
            batch: N prompts.
            vectors: the input vectors of slots and out tokens, ``[V + out tokens, input size]``; row order as in
                ``PromptBatch.vector_index``.

        Returns:
            the last hidden state at each out token, float32 ``[N, out tokens, hidden size]``, differentiable in
            ``vectors`` (and in the LLM's weights where they are trained).
        """
        device = self.backbone.embedding.weight.device
        tokens = torch.from_numpy(batch.tokens).to(device).long()
        vector_index = torch.from_numpy(batch.vector_index).to(device)
        vectors = vectors.to(self.backbone.dtype)
        header, header_length = self._header(batch, tokens)
        lengths = batch.lengths
        shares = self.settings.share_prefix and (batch.parent >= 0).any()
        originals = np.flatnonzero(batch.parent < 0) if shares else np.arange(len(batch))
        tail_lengths = lengths - batch.shared
        short = (batch.parent >= 0) & (tail_lengths <= self.settings.branch_tokens) & bool(shares)
        row_lengths = lengths - header_length
        np.add.at(row_lengths, batch.parent[short], tail_lengths[short])
        self.counts.add(batch)

        outputs, rows = [], []
        divided = tensors.shares(row_lengths[originals])  # of several processes each encodes some, with their tails
        mine = originals if divided is None else originals[divided[processes.rank()]]
        micro_batches = cut_into_micro_batches(row_lengths[mine], self.settings.micro_batch_tokens, self.settings.call_cost)
        for micro_batch in micro_batches:
            group = mine[micro_batch]
            inside = np.isin(batch.parent, group) if shares else short
            branches, tails = np.flatnonzero(inside & short), np.flatnonzero(inside & ~short)
            arguments = (batch, group, branches, tails, header_length, header, tokens, vector_index, vectors)
            if self.settings.recompute and torch.is_grad_enabled():
                # The RNG state matters only with dropout, that is where the LLM is trained.
                hidden = checkpoint(
                    self._encode_group, *arguments, use_reentrant=False, preserve_rng_state=not self.backbone.frozen
                )
            else:
                hidden = self._encode_group(*arguments)
            outputs.append(hidden)
            rows.append(np.concatenate([group, branches, tails]))
        order = torch.from_numpy(np.argsort(np.concatenate(rows), kind="stable")).to(device)
        if divided is not None:
            row_of = np.where(batch.parent >= 0, batch.parent, np.arange(len(batch))) if shares else np.arange(len(batch))
            divided = [np.flatnonzero(np.isin(row_of, originals[share])) for share in divided]
        return tensors.gather(torch.cat(outputs)[order], divided)

    def _header(self, batch: PromptBatch, tokens: Tensor) -> tuple[KeyValues | None, int]:
        """Keys and values of the common header, each ``[1, heads, header length, head size]``."""
        if not self.settings.share_header or batch.header_length == 0:
            return None, 0
        frozen = self.backbone.frozen
        key = tuple(batch.tokens[: batch.header_length].tolist())
        if frozen and key in self._headers:
            return self._headers[key], batch.header_length
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            embeddings = self.backbone.embedding(tokens[None, : batch.header_length])
            _, cache = self.backbone(embeddings, _positions(0, batch.header_length, embeddings.device), use_cache=True)
            header = layers_of(cache)
        if frozen:
            self._headers[key] = header
        return header, batch.header_length

    def clear(self) -> None:
        """Drop stored keys and values. Call it when the LLM's weights have moved to another device."""
        self._headers.clear()

    def _encode_group(
        self,
        batch: PromptBatch,
        group: np.ndarray,
        branches: np.ndarray,
        tails: np.ndarray,
        header_length: int,
        header: KeyValues | None,
        tokens: Tensor,
        vector_index: Tensor,
        vectors: Tensor,
    ) -> Tensor:
        """Encode one micro-batch of originals with their short tails, then the long tails against its keys and values.

        Returns:
            float32 ``[len(group) + len(branches) + len(tails), out tokens, hidden size]``.
        """
        past = None if header is None else cache_of(
            [(k.expand(len(group), -1, -1, -1), v.expand(len(group), -1, -1, -1)) for k, v in header]
        )
        prefix = np.full(len(group), header_length)
        read_on = (tokens, vector_index, vectors)
        hidden, cache = self._call(batch, group, prefix, past, header_length, *read_on, len(tails) > 0, branches)
        if len(tails) == 0:
            return hidden
        keys_values = layers_of(cache)
        row_of = {int(prompt): row for row, prompt in enumerate(group)}
        parents = np.array([row_of[int(batch.parent[tail])] for tail in tails])
        parts, rows = [hidden], [np.arange(len(hidden))]
        tail_lengths = batch.lengths[tails] - batch.shared[tails]
        for part in cut_into_micro_batches(tail_lengths, self.settings.micro_batch_tokens, self.settings.call_cost):
            prompts, prefix = tails[part], batch.shared[tails[part]]
            parent_rows = torch.from_numpy(parents[part]).to(tokens.device)
            longest = int(prefix.max())
            past = cache_of([(k[parent_rows, :, :longest], v[parent_rows, :, :longest]) for k, v in keys_values])
            hidden, _ = self._call(batch, prompts, prefix, past, longest, *read_on, False)
            parts.append(hidden)
            rows.append(len(group) + len(branches) + part)
        order = torch.from_numpy(np.argsort(np.concatenate(rows), kind="stable")).to(tokens.device)
        return torch.cat(parts)[order]

    def _call(
        self,
        batch: PromptBatch,
        prompts: np.ndarray,
        prefix: np.ndarray,
        past: DynamicCache | None,
        past_length: int,
        tokens: Tensor,
        vector_index: Tensor,
        vectors: Tensor,
        use_cache: bool,
        branches: np.ndarray | None = None,
    ) -> tuple[Tensor, DynamicCache | None]:
        """Run the LLM on each prompt's tokens after its first ``prefix`` ones, whose keys and values ``past`` holds.

        ``past`` has ``past_length`` entries in every row; a row sees its first ``prefix`` entries only, and all of them where
        there are ``branches``: prompts whose tails stand in the rows of their parents, which are among ``prompts``.
        """
        if branches is not None and len(branches):
            return self._call_tree(batch, prompts, branches, past, past_length, tokens, vector_index, vectors, use_cache)
        device = tokens.device
        starts = batch.offsets[prompts] + prefix
        lengths = batch.offsets[prompts + 1] - starts
        width = int(lengths.max())
        column = np.arange(width)
        flat = np.where(column < lengths[:, None], starts[:, None] + column, 0)
        embeddings = self._embed(flat, int(lengths.sum()), tokens, vector_index, vectors)
        if past is None:
            mask = None
            positions = _positions(0, width, device)
        else:
            prefix_on_device = torch.from_numpy(prefix).to(device)
            causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
            if (prefix == past_length).all():
                mask = torch.cat([causal.new_ones(width, past_length), causal], dim=1)[None, None]
            else:
                seen = torch.arange(past_length, device=device) < prefix_on_device[:, None]
                seen = seen[:, None].expand(-1, width, -1)
                mask = torch.cat([seen, causal.expand(len(prompts), -1, -1)], dim=2)[:, None]
            positions = prefix_on_device[:, None] + torch.arange(width, device=device)
        row = torch.arange(len(prompts), device=device)[:, None]
        out = torch.from_numpy(batch.out_positions[prompts] - starts[:, None]).to(device)
        return self._read(embeddings, positions, mask, past, use_cache, row, out)

    def _call_tree(
        self,
        batch: PromptBatch,
        prompts: np.ndarray,
        branches: np.ndarray,
        past: DynamicCache | None,
        past_length: int,
        tokens: Tensor,
        vector_index: Tensor,
        vectors: Tensor,
        use_cache: bool,
    ) -> tuple[Tensor, DynamicCache | None]:
        """As :meth:`_call`, each row a prompt and behind it the tails of its branches: results of prompts, then branches."""
        device = tokens.device
        tree = _tree_of(batch, prompts, branches, past_length)
        width = tree.flat.shape[1]
        embeddings = self._embed(tree.flat, int((tree.segment >= 0).sum()), tokens, vector_index, vectors)
        segment, position, limit = (
            torch.from_numpy(table).to(device) for table in (tree.segment, tree.position, tree.limit)
        )
        # Itself and what stands before it in its own prompt or tail, and of the trunk what its prompt has in common with it.
        own = (segment[:, :, None] == segment[:, None, :]).tril()
        trunk = (segment >= 0) & (segment < len(prompts))
        mask = own | (trunk[:, None, :] & (position[:, None, :] < limit[:, :, None]))
        mask = torch.cat([mask.new_ones(len(prompts), width, past_length), mask], dim=2)[:, None]
        row, out = (torch.from_numpy(table).to(device) for table in (tree.row, tree.out))
        return self._read(embeddings, position, mask, past, use_cache, row[:, None], out)

    def _embed(self, flat: np.ndarray, count: int, tokens: Tensor, vector_index: Tensor, vectors: Tensor) -> Tensor:
        """The input vectors of a call at places ``flat`` of the batch, ``count`` of which are no padding."""
        self.counts.calls += 1
        self.counts.computed += flat.size
        self.counts.padding += flat.size - count
        places = torch.from_numpy(flat).to(tokens.device)
        which = vector_index[places]
        embeddings = self.backbone.embedding(tokens[places].clamp(min=0)).to(vectors.dtype)
        return embeddings.index_put(torch.where(which >= 0), vectors[which[which >= 0]])

    def _read(
        self,
        embeddings: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        past: DynamicCache | None,
        use_cache: bool,
        row: Tensor,
        out: Tensor,
    ) -> tuple[Tensor, DynamicCache | None]:
        """Run the LLM, and return the hidden states of ``row`` at the columns ``out``."""
        read = None
        if self.settings.skip_unread:
            read = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
            read[row, out] = True
        output, cache = self.backbone(embeddings, positions, mask, past, use_cache=use_cache, read=read)
        return output[row, out].float(), cache


@dataclass(frozen=True)
class _Tree:
    """Rows of a prompt and, behind it, the tails of its branches; R rows of W tokens, n prompts and branches.

    Attributes:
        flat: place of each token in the batch, int64 ``[R, W]``; 0 at the padding, which is at the end.
        segment: number of the prompt (below R) or branch (R and up) that each token is of; -1 at the padding.
        position: of each token in its own prompt.
        limit: how many tokens of the row's prompt a branch's token sees; 0 for the others.
        row: of each prompt and branch, int64 ``[n]``.
        out: columns of its out tokens, int64 ``[n, out tokens]``.
    """

    flat: np.ndarray
    segment: np.ndarray
    position: np.ndarray
    limit: np.ndarray
    row: np.ndarray
    out: np.ndarray


def _tree_of(batch: PromptBatch, prompts: np.ndarray, branches: np.ndarray, prefix: int) -> _Tree:
    """Lay out prompts, without their first ``prefix`` tokens, and branches."""
    row_of = np.full(len(batch), -1, dtype=np.int64)
    row_of[prompts] = np.arange(len(prompts))
    members = np.concatenate([prompts, branches])
    row = np.concatenate([row_of[prompts], row_of[batch.parent[branches]]])
    limits = np.concatenate([np.zeros_like(prompts), batch.shared[branches]])
    starts = batch.offsets[members] + np.where(np.arange(len(members)) < len(prompts), prefix, limits)
    lengths = batch.offsets[members + 1] - starts

    order = np.argsort(row, kind="stable")  # a row's prompt, then its branches
    before = np.zeros(len(members), dtype=np.int64)
    before[order] = np.cumsum(lengths[order]) - lengths[order]  # tokens of earlier members, whatever their row
    first_column = before - before[row]
    segments = np.repeat(np.arange(len(members)), lengths)
    within = np.arange(len(segments)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows, columns = row[segments], first_column[segments] + within
    shape = len(prompts), int(columns.max()) + 1
    flat, position, limit = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    segment = np.full(shape, -1, dtype=np.int64)
    flat[rows, columns] = starts[segments] + within
    position[rows, columns] = starts[segments] + within - batch.offsets[members[segments]]
    limit[rows, columns] = limits[segments]
    segment[rows, columns] = segments
    out = batch.out_positions[members] - starts[:, None] + first_column[:, None]
    return _Tree(flat=flat, segment=segment, position=position, limit=limit, row=row, out=out)


def _positions(start: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + length, device=device)[None]


def layers_of(cache: DynamicCache) -> KeyValues:
    """The keys and values in a cache, layer by layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_of(layers: KeyValues) -> DynamicCache:
    """A cache that holds these keys and values, gradients included."""
    return DynamicCache(ddp_cache_data=layers)
