"""What every LLM-based retrieval recommender shares: prompts, vector injection, heads, candidates and scores.

    interaction -> histories -> prompts -> encoder (vectors in, hidden states out) -> heads -> scores
"""

from __future__ import annotations

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType, init_seed
from torch import Tensor, nn

from recbole_llm.backbone.encoder import EncoderSettings, PromptEncoder
from recbole_llm.backbone.llm import encode_text, fetch_backbone, load_backbone
from recbole_llm.backbone.teacher import obtain_teacher
from recbole_llm.data.collate import PromptBatch
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.prompt import Histories, PromptBuilder, PromptSettings
from recbole_llm.errors import UserError
from recbole_llm.model.heads import projection
from recbole_llm.model.item_table import ItemTable


class LLMRecommender(SequentialRecommender):
    """Base of the retrieval models: a user and an item are hidden states at out tokens, projected into one space.

    ``s(u, i) = <f_user(h_U), f_item(h_I)>`` (LLM-SRec section 2.1.2). A model file adds its losses, and where it differs
    its prompts.

    Args:
        config: RecBole configuration.
        dataset: the training split of a ``TextSequentialDataset`` (its ``splits`` serve the teacher).

    Attributes:
        loss_names: names of the parts that ``calculate_loss`` returns, in order.
    """

    input_type = InputType.POINTWISE
    loss_names: tuple[str, ...] = ("retrieval",)

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        super().__init__(config, dataset)
        if not config["single_spec"]:
            raise UserError("nproc: the LLM recommenders train in one process; leave nproc and world_size unset.")
        fetch_backbone(config)  # before the teacher is trained
        self.teacher, self.teacher_run = obtain_teacher(config, dataset.splits)
        # The teacher's training, or its absence where it was loaded, must not decide how our own weights begin.
        init_seed(config["seed"], config["reproducibility"])
        backbone = load_backbone(config)
        self.encoder = PromptEncoder(
            backbone,
            EncoderSettings(
                micro_batch_tokens=config["micro_batch_tokens"],
                call_cost=config["call_cost"] or (32 if torch.device(config["device"]).type == "cpu" else 1024),
                share_header=config["share_header"],
                share_prefix=config["share_prefix"],
                skip_unread=config["skip_unread"],
                recompute=config["recompute_activations"],
            ),
        )
        self.prompts = PromptBuilder(
            lambda texts: encode_text(backbone.tokenizer, texts),
            dataset.item_texts,
            PromptSettings(
                sentence=config["prompt_sentence"],
                request=config["prompt_request"],
                history_length=config["history_length"],
                max_prompt_tokens=min(config["max_prompt_tokens"] or backbone.context_length, backbone.context_length),
                max_item_tokens=config["max_item_tokens"],
                out_tokens=config["out_tokens"],
            ),
            format_dates=dataset.item_dates if dataset.has_dates else None,
            prefix_ids=backbone.prefix_ids,
        )
        self.time_list_field = dataset.time_field + config["LIST_SUFFIX"]
        self.user_items = dataset.user_items
        self.fingerprint = dataset.fingerprint
        self.train_negatives = config["train_negatives"]
        self.seed = config["seed"]
        self.rng = np.random.default_rng(self.seed)

        size, hidden = config["representation_size"], config["head_hidden_size"]
        self.item_projection = projection(
            self.teacher.size, config["item_projection_hidden_size"] or backbone.input_size, backbone.input_size
        )  # f_I
        self.item_head = projection(backbone.hidden_size, hidden, size)  # f_item
        self.user_head = projection(backbone.hidden_size, hidden, size)  # f_user
        self.user_out = self._out_tokens(config["out_tokens"])  # [UserOut]
        self.item_out = self._out_tokens(config["out_tokens"])  # [ItemOut]
        self._table: ItemTable | None = None

    @property
    def backbone(self):
        """The LLM."""
        return self.encoder.backbone

    @property
    def item_table(self) -> ItemTable:
        """Item representations under the current weights."""
        if self._table is None:
            self._table = ItemTable(self.represent_items, self.trained_parameters().values(), self.n_items)
        return self._table

    def _out_tokens(self, count: int) -> nn.Parameter:
        """Out-token vectors ``[count, input size]``, drawn with the mean and spread of the LLM's input embeddings."""
        embedding = self.backbone.embedding
        with torch.no_grad():  # called, not read: Gemma's scales its weight
            drawn = embedding(torch.arange(len(embedding.weight), device=embedding.weight.device)).float()
        return nn.Parameter(torch.normal(drawn.mean().item(), drawn.std().item(), (count, drawn.shape[1])))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that training moves, by name: what a checkpoint holds."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    # Representations

    def histories(self, interaction: Interaction) -> Histories:
        """The part of each row's history that its prompt shows."""
        times = interaction[self.time_list_field] if self.time_list_field in interaction else None
        return self.prompts.kept(
            interaction[self.ITEM_SEQ].cpu().numpy(),
            interaction[self.ITEM_SEQ_LEN].cpu().numpy(),
            None if times is None else times.cpu().numpy(),
        )

    def vectors(self, batch: PromptBatch, out: Tensor) -> Tensor:
        """What goes into the slots and out tokens of a batch: f_I of the teacher's item vectors, then the out tokens."""
        items = torch.from_numpy(batch.vector_items).to(out.device)
        return torch.cat([self.item_projection(self.teacher.item_vectors[items]), out])

    def represent_items(self, items: np.ndarray) -> Tensor:
        """f_item(h_I) of internal item ids int64 ``[n]``: float32 ``[n, d']``."""
        batch = self.prompts.item_prompts(items)
        return self.item_head(self.encoder(batch, self.vectors(batch, self.item_out)).mean(dim=1))

    def represent_prompts(self, batch: PromptBatch) -> Tensor:
        """f_user(h_U) of user prompts: float32 ``[N, d']``."""
        return self.user_head(self.encoder(batch, self.vectors(batch, self.user_out)).mean(dim=1))

    def represent_users(self, interaction: Interaction) -> Tensor:
        """f_user(h_U) of each row's history: float32 ``[B, d']``."""
        return self.represent_prompts(self.prompts.user_prompts(self.histories(interaction)))

    @torch.no_grad()
    def represent_distinct_users(self, interaction: Interaction) -> Tensor:
        """As :meth:`represent_users` without gradient, each distinct history encoded once: float32 ``[B, d']``."""
        fields = [interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN][:, None]]
        if self.time_list_field in interaction:
            fields.append(interaction[self.time_list_field])
        keys = np.concatenate([field.cpu().numpy().astype(np.float64) for field in fields], axis=1)
        _, first, row_of = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        users = self.represent_users(interaction[torch.from_numpy(first)])
        return users[torch.from_numpy(row_of.reshape(-1)).to(users.device)]

    # Training

    def seed_step(self, step: int) -> None:
        """Make the randomness of a training step depend on the seed and the step alone, so that a resumed run repeats it."""
        self.rng = np.random.default_rng([self.seed, step])

    def training_candidates(self, interaction: Interaction) -> np.ndarray:
        """C_u in training: the target and ``train_negatives`` distinct items that the user never interacted with.

        Returns:
            int64 ``[B, 1 + negatives]``, the target in column 0.
        """
        targets = interaction[self.POS_ITEM_ID].cpu().numpy()
        candidates = np.empty((len(targets), 1 + self.train_negatives), dtype=np.int64)
        candidates[:, 0] = targets
        for row, user in enumerate(interaction[self.USER_ID].cpu().numpy()):
            known = self.user_items[user]
            chosen: list[int] = []
            while len(chosen) < self.train_negatives:
                item = int(self.rng.integers(1, self.n_items))
                place = np.searchsorted(known, item)
                if item not in chosen and not (place < len(known) and known[place] == item):
                    chosen.append(item)
            candidates[row, 1:] = chosen
        return candidates

    def score_candidates(self, users: Tensor, candidates: np.ndarray) -> Tensor:
        """s(u, i) with gradient for each user's candidates int64 ``[B, C]``: ``[B, C]``. Each distinct item is encoded once."""
        items, position = np.unique(candidates, return_inverse=True)
        representations = self.represent_items(items)
        position = torch.from_numpy(position.reshape(candidates.shape)).to(users.device)
        return torch.einsum("bd,bcd->bc", users, representations[position])

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """The weighted parts of the loss, scalars, named by ``loss_names``. Their sum is minimised."""
        raise NotImplementedError

    # Scoring

    @torch.no_grad()
    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        """Score each row's candidates from the item table.

        Args:
            interaction: B rows; only their histories are read.
            candidates: int64 ``[B, C]``, or None for the whole catalogue.

        Returns:
            float32 ``[B, C]`` or ``[B, n_items]`` (column 0, the padding item, is -inf).
        """
        users = self.represent_distinct_users(interaction)
        if candidates is not None:
            return torch.einsum("bd,bcd->bc", users, self.item_table.rows(candidates.cpu().numpy()))
        items = self.item_table.rows(np.arange(1, self.n_items))
        padding = users.new_full((len(users), 1), float("-inf"))
        return torch.cat([padding, users @ items.T], dim=1)

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Score the item of each row, ``[B]``.

        RecBole repeats a history once per candidate: the distinct ones are found again and encoded once.
        """
        users = self.represent_distinct_users(interaction)
        items = self.item_table.rows(interaction[self.ITEM_ID].cpu().numpy())
        return (users * items).sum(dim=-1)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Score the whole catalogue for each row, ``[B, n_items]``."""
        return self.score(interaction, None)

    def other_parameter(self) -> dict:
        return {}

    def __str__(self) -> str:
        trained = self.trained_parameters()
        lines = [f"{type(self).__name__}: backbone {self.backbone.identity}, teacher {self.teacher.name}"]
        lines += [f"  {name}: {tuple(parameter.shape)}" for name, parameter in trained.items()]
        lines.append(f"Trainable parameters: {sum(parameter.numel() for parameter in trained.values()):,}")
        return "\n".join(lines)

