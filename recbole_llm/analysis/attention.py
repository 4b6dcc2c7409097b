"""What do the LLM's tokens attend to, in the original order and in another? (LLM-STAR, Figure 1; HatLLM)

A handful of users' prompts runs through the LLM with attention weights kept (eager attention), first and last layer, the
heads averaged. Reported are the tokens that each token attends to most, and how a token inside an item shares its attention
between that item, the other items and the rest of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.analysis import trained
from recbole_llm.analysis.job import Job, stored
from recbole_llm.analysis.order import ORIGINAL, OrderSettings, perturbed
from recbole_llm.analysis.tables import format_columns, percent
from recbole_llm.analysis.trained import TrainedModel
from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.text import encode_text
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import MARKER_TOKEN, OUT_TOKEN, SLOT_TOKEN, USER_TOKEN, PromptBatch
from recbole_llm.recommender.retrieval import RetrievalForm
from recbole_llm.registry import is_ours

VECTORS = {SLOT_TOKEN: "[item]", OUT_TOKEN: "[out]", USER_TOKEN: "[user]", MARKER_TOKEN: "[marker]"}
LAYERS = ("first", "last")


@dataclass(frozen=True)
class AttentionSettings:
    """Whose attention is looked at.

    Attributes:
        users: how many of the test users, evenly spaced.
        top: how many tokens are listed for each token.
    """

    users: int = 3
    top: int = 5

    def __post_init__(self) -> None:
        if any(type(value) is not int or value < 1 for value in (self.users, self.top)):
            raise UserError(f"users and top must be whole numbers above 0, not {self.users!r} and {self.top!r}.")


@contextmanager
def eager_attention(backbone: Backbone) -> Iterator[None]:
    """Within the context, the LLM computes attention by plain operations, which can return the weights."""
    before = backbone.attn_implementation
    backbone.causal_lm.set_attn_implementation("eager")
    backbone.attn_implementation = "eager"
    try:
        yield
    finally:
        backbone.causal_lm.set_attn_implementation(before)
        backbone.attn_implementation = before


@torch.no_grad()
def attention_weights(model: TrainedModel, rows: Interaction) -> tuple[PromptBatch, list[Tensor]]:
    """Run user prompts one by one and keep their attention.

    Returns:
        the prompts, and for each the attention of first and last layer, the mean over the heads, float32
        ``[2, tokens, tokens]`` (query, key).
    """
    llm = model.model
    rows = rows.to(model.config["device"])
    batch = llm.prompts.user_prompts(llm.histories(rows))
    vectors = llm.vectors(batch, llm.user_out, llm.user_inputs(rows)).to(llm.backbone.dtype)
    found = []
    with eager_attention(llm.backbone):
        for start, end in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
            tokens = torch.from_numpy(batch.tokens[start:end]).long().to(vectors.device)
            which = torch.from_numpy(batch.vector_index[start:end]).to(vectors.device)
            inputs = llm.backbone.embedding(tokens.clamp(min=0)).to(vectors.dtype)
            inputs[which >= 0] = vectors[which[which >= 0]]
            output = llm.backbone.model(inputs_embeds=inputs[None], output_attentions=True)
            layers = [output.attentions[0], output.attentions[-1]]
            found.append(torch.stack([layer[0].float().mean(dim=0).cpu() for layer in layers]))
    return batch, found


def item_spans(model: TrainedModel, rows: Interaction) -> list[np.ndarray]:
    """First token of each item of each user prompt, and the one behind the last: int64 ``[items, 2]``, within the prompt.

    A prompt of the first k items begins like that of all: the lengths of such prompts tell where each item ends.
    """
    llm = model.model
    request = encode_text(llm.backbone.tokenizer, [llm.prompts.settings.request])[0]
    behind = len(request) + llm.prompts.settings.out_tokens
    histories = llm.histories(rows)
    ends = []
    for count in range(int(histories.lengths.max()) + 1):
        dates = np.where(np.arange(histories.dates.shape[1]) < count, histories.dates, -1)
        first = replace(histories, lengths=np.minimum(histories.lengths, count), dates=dates)
        ends.append(llm.prompts.user_prompts(first).lengths - behind)
    ends = np.stack(ends, axis=1)
    return [
        np.stack([row[:count], row[1 : count + 1]], axis=1) for row, count in zip(ends, histories.lengths.tolist(), strict=True)
    ]


def shares(attention: Tensor, spans: np.ndarray) -> dict[str, float]:
    """How tokens inside items share their attention: within their item, across to other items, to the rest; they sum to 1.

    Args:
        attention: ``[tokens, tokens]``, query and key.
        spans: of the items, see :func:`item_spans`. The first item has none before it and is left out where there are more.
    """
    item = np.full(len(attention), -1)
    for number, (start, end) in enumerate(spans.tolist()):
        item[start:end] = number
    queries = item >= (1 if len(spans) > 1 else 0)
    weights = attention.numpy()[queries]
    same = item[queries][:, None] == item[None, :]
    within = float((weights * same).sum(axis=1).mean())
    items = float(weights[:, item >= 0].sum(axis=1).mean())
    return {"within": within, "across": items - within, "rest": 1 - items}


def words(model: TrainedModel, batch: PromptBatch, row: int) -> list[str]:
    """The tokens of a prompt as text."""
    tokens = batch.tokens[batch.offsets[row] : batch.offsets[row + 1]].tolist()
    tokenizer = model.model.backbone.tokenizer
    return [VECTORS[token] if token < 0 else tokenizer.decode([token]) for token in tokens]


def look(model: TrainedModel, settings: AttentionSettings, order: OrderSettings) -> dict[str, Any]:
    """Attention of a few test users' prompts, original and perturbed.

    Returns:
        ``users``: per user the id and ``conditions``: per order and layer the ``shares`` (:func:`shares`), and ``tokens``: each
        token with those that it attends to most and their weights; ``shares``: the means over the users.
    """
    if model.run is not None or not isinstance(getattr(model.model, "form", None), RetrievalForm):
        raise UserError(f"analyze attention: {model.name} is no LLM that reads user prompts (recommend_by: retrieval).")
    test = model.splits["test"]
    chosen = np.unique(np.linspace(0, len(test) - 1, min(settings.users, len(test))).astype(np.int64))
    splits = {ORIGINAL: test}
    for kind in order.inference:
        splits[f"inference {kind}"] = perturbed(test, kind, model.config["seed"], 0, order.within or model.reads)[0]
    ids = test.id2token(test.uid_field, test.inter_feat[test.uid_field].numpy()[chosen])
    users = [{"user": str(user), "conditions": {}} for user in np.atleast_1d(ids)]
    for condition, split in splits.items():
        rows = split.inter_feat[torch.from_numpy(chosen)]
        batch, weights = attention_weights(model, rows)
        for row, (attention, spans) in enumerate(zip(weights, item_spans(model, rows), strict=True)):
            text = words(model, batch, row)
            users[row]["conditions"][condition] = {
                name: {"shares": shares(layer, spans), "tokens": _top(layer, text, settings.top)}
                for name, layer in zip(LAYERS, attention, strict=True)
            }
    means = {
        condition: {
            layer: {
                part: float(np.mean([user["conditions"][condition][layer]["shares"][part] for user in users]))
                for part in ("within", "across", "rest")
            }
            for layer in LAYERS
        }
        for condition in splits
    }
    return {"users": users, "shares": means}


def _top(attention: Tensor, text: list[str], top: int) -> list[dict[str, Any]]:
    """Each token with those that it attends to most: their text, their place and the weight."""
    weights, places = attention.topk(min(top, len(text)), dim=1)
    pairs = torch.stack([places.double(), weights.double()], dim=2).tolist()
    return [
        {"token": token, "attends_to": [[text[int(place)], int(place), round(weight, 5)] for place, weight in best]}
        for token, best in zip(text, pairs, strict=True)
    ]


def analyze(job: Job, settings: AttentionSettings, order: OrderSettings) -> list[dict[str, Any]]:
    """Attention of each LLM and seed of a job; what was computed before is read."""
    data, results = SharedData(), []
    configs = [(name, config) for name, config in job.configs() if is_ours(config["model"])]
    if not configs:
        raise UserError("analyze attention: name a model of this library, such as LLMSRec; the others run no LLM.")
    for name, config in configs:
        known = [trained.identity(name, config, data), asdict(settings), asdict(order)]
        head = {"analysis": "attention", "model": name, "dataset": config["dataset"], "seed": config["seed"]}

        def compute(name=name, config=config, head=head):
            model = trained.obtain(name, config, data, job.models)
            return head | {"settings": asdict(settings)} | look(model, settings, order), None

        results.append(stored(job.folder("attention", name, config, known), known, compute))
    return results


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """The shares of attention, and what the out token of each user attends to most."""
    lines = [
        [result["model"], str(result["seed"]), condition, layer, *(percent(parts[name], signed=False) for name in parts)]
        for result in results
        for condition, layers in result["shares"].items()
        for layer, parts in layers.items()
    ]
    header = ["model", "seed", "condition", "layer", "within the item", "other items", "rest"]
    text = [f"{results[0]['dataset']} · attention of tokens inside items\n", format_columns(header, lines, left=4)]
    for result in results:
        for user in result["users"]:
            text.append(f"\n{result['model']}, user {user['user']}: [out] attends to")
            for condition, layers in user["conditions"].items():
                for layer in LAYERS:
                    best = layers[layer]["tokens"][-1]["attends_to"]
                    shown = ", ".join(f"{token.strip() or repr(token)} {weight:.3f}" for token, _, weight in best)
                    text.append(f"  {condition}, {layer} layer: {shown}")
    return "\n".join(text)
