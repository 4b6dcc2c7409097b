"""Does the bare LLM know a data set by heart? It is shown some lines of the data set's own files, and goes on with the next.

As Di Palma et al., "Do LLMs Memorize Recommendation Datasets? A Preliminary Study on MovieLens-1M" (SIGIR 2025), asked: the
title that belongs to an item's id, and the item of a user's next interaction, by greedy decoding after lines that stand before
it in the file. What can be guessed from the lines that are shown (ids that count upwards, an item that many users have) is not
memory: beside the share of exact answers stands what another title of the file, or the most frequent item, would be right in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from scipy.stats import binomtest

from recbole_llm.analysis.job import Job, stored
from recbole_llm.analysis.tables import decimal, format_columns, percent
from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.generation.decoding import greedy
from recbole_llm.backbone.load import load_backbone
from recbole_llm.backbone.text import encode_text
from recbole_llm.config.settings import select
from recbole_llm.configure import configure
from recbole_llm.data import atomic
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import PromptBatch
from recbole_llm.recommender.base import ModelSettings

_LONGEST_LINE = 300  # characters of a line that are shown
_LONGEST_ANSWER = 64  # tokens


@dataclass(frozen=True)
class MemorizationSettings:
    """What the LLM is asked.

    Attributes:
        questions: how many lines of each file it is asked to go on with.
        shown: lines before each that it is shown.
        draw_seed: of the choice of the lines.
    """

    questions: int = 200
    shown: int = 5
    draw_seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("questions", 1), ("shown", 0), ("draw_seed", 0)):
            if type(value := getattr(self, name)) is not int or value < least:
                raise UserError(f"{name} must be a whole number from {least} on, not {value!r}.")


@dataclass(frozen=True)
class Questions:
    """Beginnings of lines with what is to come.

    Attributes:
        prompts: the lines before, and the beginning of one.
        answers: how each line goes on.
        guesses: an answer for each that takes no memory of the file.
    """

    prompts: list[str]
    answers: list[str]
    guesses: list[str]


def ask_for(keys: Sequence[str], values: Sequence[str], guess: Sequence[str], settings: MemorizationSettings) -> Questions:
    """Questions for the values of some lines ``key<TAB>value``, each behind the lines before it."""
    first, count = min(settings.shown, len(keys) - 1), len(keys)
    rng = np.random.default_rng(settings.draw_seed)
    chosen = np.sort(rng.permutation(np.arange(first, count))[: settings.questions])
    lines = [f"{key}\t{value}"[:_LONGEST_LINE] for key, value in zip(keys, values, strict=True)]
    prompts = ["\n".join([*lines[max(0, row - settings.shown) : row], f"{keys[row]}\t"]) for row in chosen]
    return Questions(prompts, [values[row] for row in chosen], [guess[row] for row in chosen])


def questions_of(config: Config, settings: MemorizationSettings) -> dict[str, Questions]:
    """Questions for titles (lines of the ``.item`` file) and for interactions (lines of the ``.inter`` file)."""
    dataset = TextSequentialDataset(config)  # checks the files, and names the fields
    separator, encoding = config["field_separator"], config["encoding"] or "utf-8"
    title = (config["item_text"] if isinstance(config["item_text"], list) else [config["item_text"] or "title"])[0]
    table = atomic.read_table(dataset.item_file, None, separator, encoding)
    ids, titles = table.columns[dataset.iid_field], table.columns[title]
    known = [row for row, text in enumerate(titles) if str(text).strip()]
    ids, titles = [ids[row] for row in known], [atomic.clean_text(str(titles[row])) for row in known]
    before = [titles[row - 1] if row else titles[-1] for row in range(len(titles))]
    table = atomic.read_table(dataset.inter_file, {dataset.uid_field, dataset.iid_field}, separator, encoding)
    users, items = table.columns[dataset.uid_field], table.columns[dataset.iid_field]
    most = Counter(items).most_common(1)[0][0]
    return {
        "titles": ask_for(ids, titles, before, settings),
        "interactions": ask_for(users, items, [most] * len(items), settings),
    }


def same(one: str, other: str) -> bool:
    """Whether two answers are the same but for case and white space."""
    return " ".join(one.split()).casefold() == " ".join(other.split()).casefold()


def count(questions: Questions, given: Sequence[str]) -> dict[str, Any]:
    """How many answers are right.

    Args:
        questions: what was asked.
        given: the LLM's answers; what stands behind the first line is no part of them.
    """
    firsts = [answer.split("\n")[0] for answer in given]
    right = [same(answer, first) for answer, first in zip(questions.answers, firsts, strict=True)]
    guessed = [same(answer, guess) for answer, guess in zip(questions.answers, questions.guesses, strict=True)]
    interval = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    examples = [
        [prompt.split("\n")[-1].strip(), answer]
        for prompt, answer, hit in zip(questions.prompts, questions.answers, right, strict=True)
        if hit
    ]
    return {
        "asked": len(right),
        "right": sum(right),
        "share": sum(right) / len(right),
        "interval": [float(interval.low), float(interval.high)],
        "guess": sum(guessed) / len(right),
        "examples": examples[:5],
    }


def answer(backbone: Backbone, questions: Questions, micro_batch_tokens: int, call_cost: int) -> list[str]:
    """How the LLM goes on, greedily, for as many tokens as the right answer has and one more."""
    room = backbone.context_length - _LONGEST_ANSWER - 1 - len(backbone.prefix_ids)
    texts = encode_text(backbone.tokenizer, questions.prompts)
    rows = [[*backbone.prefix_ids, *ids[-room:]] for ids in texts]
    most = [min(len(ids), _LONGEST_ANSWER) + 1 for ids in encode_text(backbone.tokenizer, questions.answers)]
    offsets = np.r_[0, np.cumsum([len(ids) for ids in rows])]
    tokens, nothing = np.concatenate(rows).astype(np.int32), np.empty(0, dtype=np.int64)
    batch = PromptBatch.build(tokens, offsets, nothing, 0, 0)
    stops = {backbone.tokenizer.eos_token_id} - {None}
    vectors = torch.zeros(0, backbone.input_size)
    found = greedy(backbone.eval(), batch, vectors, most, stops, micro_batch_tokens, call_cost)
    return backbone.tokenizer.batch_decode(found, skip_special_tokens=False)


def analyze(job: Job, settings: MemorizationSettings) -> list[dict[str, Any]]:
    """What the LLM of the settings knows of the job's data set; what was asked before is read."""
    config = configure("ZeroShot", job.dataset, ["ZeroShot"], None, job.files, job.settings)
    asked, backbone = questions_of(config, settings), load_backbone(config)
    head = {"analysis": "memorization", "dataset": job.dataset, "backbone": config["backbone"], "layers": backbone.layers}
    known = [head, backbone.identity, asdict(settings), {name: [*part.prompts, *part.answers] for name, part in asked.items()}]

    def compute() -> tuple[dict[str, Any], None]:
        batching = select(ModelSettings, config).encoder()
        costs = batching.micro_batch_tokens, batching.call_cost
        found = {name: count(part, answer(backbone, part, *costs)) for name, part in asked.items()}
        return {**head, "settings": asdict(settings), "questions": found}, None

    return [stored(job.folder("memorization", "llm", config, known), known, compute)]


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """A table, one line for each kind of question."""
    (result,) = results
    rows = [
        [
            name,
            str(found["asked"]),
            str(found["right"]),
            percent(found["share"], signed=False),
            " to ".join(percent(bound, signed=False) for bound in found["interval"]),
            decimal(found["guess"], 3),
        ]
        for name, found in result["questions"].items()
    ]
    examples = [f"{key} -> {value}" for found in result["questions"].values() for key, value in found["examples"]]
    shown = "\n\nFor example: " + "; ".join(examples[:5]) if examples else ""
    return (
        f"{result['dataset']} · lines that {result['backbone']} ({result['layers']} layers) knows by heart, after "
        f"{result['settings']['shown']} lines of the file\n\n"
        + format_columns(["lines of", "asked", "right", "share", "95 % interval", "by guessing"], rows)
        + shown
    )
