"""ST2SI: item texts in, the next item's ID out, at every item of a history.

Reference:
    Jianyang Zhai et al., "Learning Transition Patterns by Large Language Models for Sequential Recommendation", 2025.

Reference code:
    https://github.com/zhaijianyang/ST2SI
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_llm import checkpoint
from recbole_llm.backbone.lora import trained_weights
from recbole_llm.backbone.stored_states import StoredStates
from recbole_llm.backbone.text import encode_text
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.sequences import user_sequences
from recbole_llm.errors import UserError
from recbole_llm.loss.softmax import NegativeSampler, full_softmax_loss, sampled_softmax_loss, target_counts, top_items
from recbole_llm.processes import group as processes
from recbole_llm.processes import tensors
from recbole_llm.prompt.batch import PromptBatch
from recbole_llm.prompt.sequence import SequencePrompts, SequencePromptSettings
from recbole_llm.recommender.base import BackboneRecommender
from recbole_llm.trainer.pretraining import digest_of, obtain_foundation

ITEMS_AT_ONCE = 1024


@dataclass(frozen=True)
class ST2SISettings:
    """The model's settings; each field is the key of the same name."""

    dataset: str
    checkpoint_dir: str
    tuning: str
    query_text: str | None
    attribute_names: bool
    item_text: list[str]
    item_representation: str
    history_length: int
    max_prompt_tokens: int | None
    max_attribute_tokens: int
    item_text_separator: str
    queries: str
    id_alignment: bool
    windows: str | None
    chunk_items: int
    softmax: str
    sampled_negatives: int
    head: str | None


class ST2SI(BackboneRecommender):
    """One query token [Q] after each item of a history, and one linear projection W from there to the items' IDs.

    ``p_i = softmax(W h_qi)`` with h_qi the hidden state at the i-th query token (equation 5). Row r of W is item r + 1: W
    has no row for the padding item.

    Args:
        config: RecBole configuration.
        dataset: the training split of a ``TextSequentialDataset``.
        shared: a model of another dataset whose LLM and query token this one shares, so that the two differ by their
            heads alone; None: an LLM of its own.

    Attributes:
        query: [Q], ``[1, input size]``. Where [Q] is a text (``query_text``) it is that token's vector in the LLM as it was
            loaded: prompts take the LLM's own, which may be trained.
        head: W, ``[items, hidden size]``.
        foundation: what the LLM was pre-trained to on other datasets; None where it was not.
        epoch_steps: training steps in an epoch, set by the trainer.
    """

    def __init__(self, config: Config, dataset: TextSequentialDataset, shared: ST2SI | None = None) -> None:
        super().__init__(config, dataset, None if shared is None else shared.encoder)
        self.settings = settings = select(ST2SISettings, config)
        backbone = self.backbone
        if shared is not None:
            self.foundation = shared.foundation
        self.query_ids = encode_text(backbone.tokenizer, [settings.query_text])[0] if settings.query_text else []
        if settings.query_text and not self.query_ids:
            raise UserError("query_text: the LLM's tokenizer makes no token of it; give another text, or None.")
        self.query = self._token_vectors(1) if shared is None else shared.query
        if self.query_ids and shared is None:
            self.query = nn.Parameter(self._query_vector().detach().float().clone(), requires_grad=False)
        self.head = nn.Linear(backbone.hidden_size, self.n_items - 1, bias=False)
        if self.foundation is not None and shared is None:
            self.foundation.load_into(backbone, self.query)
        # Under ilp nothing that the hidden states depend on moves, unless [Q] is learned: they are computed once.
        self.keeps_states = settings.tuning == "ilp" and bool(self.query_ids)

        self.prompts = SequencePrompts(
            lambda texts: encode_text(backbone.tokenizer, texts),
            self._attributes(dataset),
            SequencePromptSettings(
                history_length=settings.history_length,
                max_prompt_tokens=min(settings.max_prompt_tokens or backbone.context_length, backbone.context_length),
                max_attribute_tokens=settings.max_attribute_tokens,
                separator=" " if settings.attribute_names else settings.item_text_separator,
                queries=settings.queries,
                query_ids=tuple(self.query_ids),
            ),
        )
        self.id_alignment = settings.id_alignment
        self.loss_names = ("next_item", "id_alignment") if self.id_alignment else ("next_item",)
        self.windows = settings.windows or ("fixed" if self.keeps_states else "random")
        rows = dataset.splits["train"]
        users = np.unique(rows.inter_feat[rows.uid_field].numpy())
        self.sequences = dict(zip(users.tolist(), user_sequences(rows), strict=True))

        self.sampler = None
        if settings.softmax == "sampled":
            targets = np.concatenate([sequence[1:] for sequence in self.sequences.values()])
            counts = np.bincount(targets, minlength=self.n_items)[1:]
            self.sampler = NegativeSampler(counts, self.n_items - 1, settings.sampled_negatives)
        self.epoch_steps = 1
        self.step_items = np.zeros(0, dtype=np.int64)
        self._shuffled_items: tuple[int, np.ndarray] = (-1, self.step_items)
        self._stored: dict[str, StoredStates] = {}
        self._stored_query: tuple[Tensor | None, int] = None, 0
        if settings.head:
            self.load_head(settings.head)

    def _prepare_before_backbone(self, config: Config, dataset: TextSequentialDataset) -> None:
        self.foundation = obtain_foundation(config)

    @property
    def without_gradient(self) -> tuple[str, ...]:
        """Trained parameters that do not move: [Q] where it is a text."""
        return ("query",) if self.query_ids else ()

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """As for any model, and [Q], which W belongs to, also where it does not move."""
        return {**super().trained_parameters(), "query": self.query}

    def _attributes(self, dataset: TextSequentialDataset) -> list[tuple[str, ...]]:
        """The attributes of each item, all but the first field's with their names: ``("Hat", "brand: Acme")``."""
        fields = self.settings.item_text
        if not self.settings.attribute_names or len(fields) == 1 or self.settings.item_representation == "id":
            return dataset.item_attributes
        present = [dataset.attributes_of([field]) for field in fields]
        named = []
        for item, texts in enumerate(dataset.item_attributes):
            names = [field for field, found in zip(fields, present, strict=True) if found[item]]
            if len(names) == len(texts):  # else an item without any text, whose id stands for it
                pairs = zip(names, texts, strict=True)
                texts = tuple(text if name == fields[0] else f"{name}: {text}" for name, text in pairs)
            named.append(texts)
        return named

    # Hidden states at query tokens

    def _query_vector(self) -> Tensor:
        """[Q] in the LLM's input space, ``[1, input size]``: that of the last token of ``query_text``, or the learned one."""
        if not self.query_ids:
            return self.query
        embedding = self.backbone.embedding
        return embedding(torch.tensor(self.query_ids[-1:], device=embedding.weight.device)).float()

    def query_states(self, batch: PromptBatch) -> Tensor:
        """h_q at the query tokens that ``batch`` is read at, prompt by prompt: float32 ``[P, hidden size]``."""
        moves = self.query.requires_grad or not self.backbone.frozen
        with torch.set_grad_enabled(torch.is_grad_enabled() and moves):
            hidden = self.encoder(batch, self._query_vector())
        return hidden[torch.from_numpy(batch.is_read).to(hidden.device)]

    def sequence_states(self, history: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """h_q of training histories int64 ``[B, L]``, right padded: ``[P, hidden size]``, and how many of them each has."""
        if self.keeps_states and self.windows == "fixed":
            stored = self._stored_states("train")
            rows = stored.rows_of(history, lengths)
            if (rows >= 0).all():
                return stored.states(rows).to(self.query.device), stored.reads[rows]
        batch = self.prompts.sequences(history, lengths)
        return self.query_states(batch), batch.is_read.sum(axis=1)

    def item_states(self, items: np.ndarray) -> Tensor:
        """h_q of the alignment prompts of items int64 ``[n]``: ``[n, hidden size]``."""
        if self.keeps_states:
            return self._stored_states("items").states(items - 1).to(self.query.device)
        return self.query_states(self.prompts.alignments(items))

    @torch.no_grad()
    def user_states(self, interaction: Interaction) -> Tensor:
        """h_q at the end of each row's history, each distinct one encoded once: ``[B, hidden size]``."""
        first, row_of = self.distinct_histories(interaction)
        history, lengths = self.history_items(interaction[first])
        hidden = torch.empty(len(lengths), self.backbone.hidden_size, device=self.query.device)
        unknown = np.ones(len(lengths), dtype=bool)
        if self.keeps_states:
            stored = self._stored_states("evaluation")
            rows = stored.rows_of(history, lengths)
            unknown = rows < 0
            hidden[torch.from_numpy(~unknown)] = stored.states(rows[~unknown]).to(hidden.device)
        if unknown.any():
            batch = self.prompts.sequences(history[unknown], lengths[unknown], last_only=True)
            hidden[torch.from_numpy(unknown)] = self.query_states(batch)
        return hidden[row_of.to(hidden.device)]

    @property
    def stored_files(self) -> list[Path]:  # type: ignore[override]  # as they are made
        return [stored.file for stored in self._stored.values()]

    def _stored_states(self, part: str) -> StoredStates:
        """Stored states of the training histories (``train``), all items (``items``), or valid and test (``evaluation``)."""
        query, version = self._stored_query
        if query is not self.query or version != query._version:  # another [Q] was loaded
            self._stored, self._stored_query = {}, (self.query, self.query._version)
        if part not in self._stored:
            file = Path(self.settings.checkpoint_dir) / "states" / f"{self.settings.dataset}-{part}"
            arguments = file, self._identity(), self.query_states, self.backbone.hidden_size
            if part == "items":
                stored = StoredStates(*arguments, lambda rows: self.prompts.alignments(rows + 1), self.n_items - 1)
            else:
                splits = self._dataset.splits
                rows = [self._dataset] if part == "train" else [splits["valid"], splits["test"]]
                pairs = [self.history_items(split.inter_feat) for split in rows]
                history, lengths = (np.concatenate(column) for column in zip(*pairs, strict=True))
                stored = StoredStates(
                    *arguments,
                    lambda rows: self.prompts.sequences(history[rows], lengths[rows], last_only=part == "evaluation"),
                    len(lengths),
                )
                stored.name_rows(history, lengths)
            self._stored[part] = stored
        return self._stored[part]

    def _identity(self) -> bytes:
        """What, beside the prompts, the stored states depend on."""
        foundation = None if self.foundation is None else self.foundation.sha256
        texts = [self.settings.item_text, self.settings.attribute_names, self.settings.query_text]
        parts = [self.backbone.identity, self.fingerprint, foundation, texts]
        identity = json.dumps(parts, default=str, sort_keys=True)
        return identity.encode() + self.query.detach().float().cpu().numpy().tobytes()

    # Training

    def seed_step(self, step: int) -> None:
        """Also choose the items whose IDs are asked for in this step: each once an epoch, in an order of the epoch's own."""
        super().seed_step(step)
        if not self.id_alignment:
            return
        epoch, position = divmod(step, self.epoch_steps)
        if self._shuffled_items[0] != epoch:
            order = np.random.default_rng([self.seed, epoch, self.n_items]).permutation(self.n_items - 1) + 1
            self._shuffled_items = epoch, order
        items = self._shuffled_items[1]
        bounds = [(self.n_items - 1) * place // self.epoch_steps for place in (position, position + 1)]
        self.step_items = items[slice(*bounds)]

    def training_windows(self, interaction: Interaction) -> tuple[np.ndarray, np.ndarray]:
        """What each row is trained on: item ids int64 ``[B, L + 1]``, right padded, and how many of them are history ``[B]``.

        The item behind the history is its target.
        """
        history, lengths = self.history_items(interaction)
        if self.windows == "fixed":
            windows = np.pad(history, ((0, 0), (0, 1)))
            windows[np.arange(len(windows)), lengths] = interaction[self.POS_ITEM_ID].cpu().numpy()
            return windows, lengths
        longest = min(self.settings.history_length, max(map(len, self.sequences.values())) - 1)
        windows = np.zeros((len(history), longest + 1), dtype=np.int64)
        lengths = np.empty(len(history), dtype=np.int64)
        for row, user in enumerate(interaction[self.USER_ID].tolist()):
            sequence = self.sequences[user]
            start = int(self.rng.integers(0, len(sequence) - 1))
            target = int(self.rng.integers(start + 1, len(sequence)))
            window = sequence[max(start, target - self.settings.history_length) : target + 1]
            windows[row, : len(window)], lengths[row] = window, len(window) - 1
        return windows, lengths

    def next_item_losses(self, interaction: Interaction) -> Tensor:
        """``-log p(v_{i+1} | T_1, ..., T_i)`` at each query token of a batch (equation 3), ``[P]``."""
        windows, lengths = self.training_windows(interaction)
        hidden, asked = self.sequence_states(windows[:, :-1], lengths)
        column = np.arange(windows.shape[1] - 1)
        inside = (column < lengths[:, None]) & (column >= (lengths - asked)[:, None])
        return self.cross_entropy(hidden, windows[:, 1:][inside])

    def alignment_losses(self) -> Tensor:
        """``-log p(v | T_I, T_v)`` of the step's items (section 3.3), ``[n]``; a long epoch has steps without."""
        if len(self.step_items) == 0:
            return self.head.weight.new_zeros(0)
        return self.cross_entropy(self.item_states(self.step_items), self.step_items)

    def cross_entropy(self, hidden: Tensor, items: np.ndarray) -> Tensor:
        """Softmax cross-entropy of W h against the items' IDs int64 ``[P]``: ``[P]``."""
        targets = torch.from_numpy(items - 1).to(hidden.device)
        divided = tensors.shares(np.ones(len(items)))  # of several processes each has some of the positions
        if divided is not None:
            mine = torch.from_numpy(divided[processes.rank()]).to(hidden.device)
            hidden, targets = hidden[mine], targets[mine]
        if self.sampler is None:
            losses = full_softmax_loss(hidden, self.head.weight, targets, self.settings.chunk_items)
        else:
            negatives = self.sampler.draw(self.rng).to(hidden.device)
            log_counts = self.sampler.log_expected_counts.to(hidden.device)
            losses = sampled_softmax_loss(hidden, self.head.weight, targets, negatives, log_counts)
        return tensors.gather(losses, divided)

    def query_losses(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """The losses at the query tokens of each of ``loss_names``."""
        next_item = self.next_item_losses(interaction)
        return (next_item, self.alignment_losses()) if self.id_alignment else (next_item,)

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """The mean over all query tokens of the batch (equation 7), in the parts named by ``loss_names``."""
        parts = self.query_losses(interaction)
        total = sum(map(len, parts))
        return tuple(part.sum() / total for part in parts)

    # Scoring

    @torch.no_grad()
    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        """Score each row's candidates by W h.

        Args:
            interaction: B rows; only their histories are read.
            candidates: int64 ``[B, C]``, or None for the whole catalog.

        Returns:
            float32 ``[B, C]`` or ``[B, n_items]`` (column 0, the padding item, is -inf).
        """
        users, weight = self.user_states(interaction), self.head.weight
        if candidates is not None:
            return torch.einsum("bd,bcd->bc", users, weight[candidates.to(weight.device) - 1])
        return torch.cat([users.new_full((len(users), 1), float("-inf")), users @ weight.T], dim=1)

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Score the item of each row, ``[B]``."""
        return self.score(interaction, interaction[self.ITEM_ID][:, None])[:, 0]

    @torch.no_grad()
    def rank_targets(self, interaction: Interaction, targets: Tensor) -> tuple[Tensor, Tensor]:
        """How many items score above each row's target int64 ``[B]``, and how many others the same, without their table."""
        hidden, weight = self.user_states(interaction), self.head.weight
        return target_counts(hidden, weight, targets.to(weight.device) - 1, self.settings.chunk_items)

    @torch.no_grad()
    def id_accuracy(self) -> dict[str, float]:
        """Share of the items whose text W maps to their own ID (section 4.4), as the first and among the first five."""
        hits = {1: 0, 5: 0}
        for items in np.array_split(np.arange(1, self.n_items), -(-(self.n_items - 1) // ITEMS_AT_ONCE)):
            hidden = self.item_states(items)
            _, best = top_items(hidden, self.head.weight, min(5, self.n_items - 1), self.settings.chunk_items)
            found = best == torch.from_numpy(items - 1).to(best.device)[:, None]
            for k in hits:
                hits[k] += int(found[:, :k].sum())
        return {f"ilp_accuracy@{k}": count / (self.n_items - 1) for k, count in hits.items()}

    # Heads

    def save_head(self, folder: str | Path, foundation: str | None = None) -> None:
        """Write W and [Q] to ``folder``: what one scenario adds to an LLM that several share.

        ``foundation``: the identity under which the LLM's trained weights are kept, where they are.
        """
        record = {
            "kind": "head",
            "model": type(self).__name__,
            "dataset": self.settings.dataset,
            **self._head_identity(foundation),
        }
        checkpoint.write(folder, record, {"weight": self.head.weight, "query": self.query})

    def load_head(self, folder: str | Path) -> None:
        """Take W and [Q] from ``folder``; the LLM stays as it is.

        Raises:
            UserError: no head, or one of other items or of another LLM.
        """
        record = checkpoint.read_record(folder)
        if record.get("kind") != "head":
            raise UserError(f"head: {folder} holds no head of ST2SI; give a folder that save_head wrote.")
        expected = checkpoint.as_json(self._head_identity())
        if record["items"] != expected["items"]:
            raise UserError(
                f"head: {folder} holds a head for the items of {record['dataset']}, which are not those of "
                f"{self.settings.dataset}: a head serves the items that it was trained on."
            )
        if record["backbone"] != expected["backbone"]:
            raise UserError(
                f"head: {folder} holds a head over another LLM ({record['backbone']}, here {expected['backbone']}): give "
                f"backbone, backbone_layers and pretrained as they were when it was trained."
            )
        weights = checkpoint.read_weights(folder, self.query.device)
        # A new parameter: a model that shares the LLM keeps its own [Q].
        self.query = nn.Parameter(weights["query"], requires_grad=self.query.requires_grad)
        with torch.no_grad():
            self.head.weight.copy_(weights["weight"])

    def _head_identity(self, foundation: str | None = None) -> dict[str, object]:
        """What a head fits to: the items in their order, and the LLM with its weights (the type of their numbers is free)."""
        tokens = self._dataset.field2id_token[self.ITEM_ID].tolist()
        backbone = {key: value for key, value in self.backbone.identity.items() if key not in ("dtype", "tuning", "lora")}
        backbone["query"] = self.settings.query_text
        if foundation is not None:
            backbone["foundation"] = foundation
        elif not self.backbone.frozen:
            backbone["tuned"] = digest_of(trained_weights(self.backbone))
        return {
            "items": hashlib.sha256("\0".join(tokens).encode("utf-8", "surrogatepass")).hexdigest(),
            "fingerprint": self.fingerprint,
            "backbone": backbone,
        }
