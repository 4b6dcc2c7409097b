"""RSLLM: its prompts, its three losses by hand, its stages and its ablations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from recbole_llm import cli
from recbole_llm.config.schema import load_yaml
from recbole_llm.config.settings import select
from recbole_llm.configure import configure
from recbole_llm.errors import UserError
from recbole_llm.model.rsllm import RSLLM
from recbole_llm.prompt.batch import MARKER_TOKEN, SLOT_TOKEN
from recbole_llm.trainer.stages import StageSettings, stages_to_run

BY_GENERATION = {"recommend_by": "generation", "protocol": "generation", "train_candidates": 5, "lora_dropout": 0.0}
LORA, TOKENS, MAPPING = {"lora"}, {"id_embedding", "marker"}, {"item_projection"}


def rsllm(make_model, **settings):
    return make_model("RSLLM", **{**BY_GENERATION, "recompute_activations": False, **settings})


def rows_of(split, count=4):
    return split.inter_feat[torch.arange(count)]


def moved(model, rows):
    """Which parts of the model the loss reaches."""
    model.zero_grad()
    model.seed_step(0)
    sum(model.calculate_loss(rows)).backward()
    trained = model.trained_parameters().items()
    reached = {name for name, p in trained if p.grad is not None and p.grad.abs().sum() > 0}
    return {"lora" if "lora_" in name else name.split(".")[0] for name in reached}


def spelled(model, batch, row):
    """A prompt with its special places written out."""
    text, tokens = "", []
    for token in [*batch.tokens[batch.offsets[row] : batch.offsets[row + 1]].tolist(), None]:
        if token is None or token < 0:
            text, tokens = text + model.backbone.tokenizer.decode(tokens, skip_special_tokens=True), []
            text += {MARKER_TOKEN: "[DSR]", SLOT_TOKEN: "[ID]", None: ""}[token]
        else:
            tokens.append(token)
    return text


def test_every_item_of_a_prompt_has_a_marker_and_an_id_and_the_answer_has_none(make_model):
    _, model, splits = rsllm(make_model)
    titles = splits["train"].item_texts
    prompts = model.form.prompts
    batch = prompts.prompts(np.array([[3, 7, 0]]), np.array([2]), np.array([[5, 9, 4]]))
    text = spelled(model, batch, 0)
    history, listed = (", ".join(f"{titles[item]}[DSR][ID]" for item in items) for items in ([3, 7], [5, 9, 4]))
    assert history in text and listed in text and text.count("[DSR]") == 5
    first, end = batch.pooled[0]
    pooled = model.backbone.tokenizer.decode(batch.tokens[first:end].clip(min=0))
    assert all(titles[item] in pooled for item in (3, 7)) and titles[5] not in pooled  # the history, unquoted
    assert batch.tokens[end - 1] == SLOT_TOKEN and batch.tokens[end - 2] == MARKER_TOKEN
    alone = prompts.item_prompts(np.array([3]))
    assert spelled(model, alone, 0).strip() == f"{titles[3]}[DSR][ID]"
    assert all(token >= 0 for token in prompts.answers(np.array([3]))[0])
    vectors = model.vectors(batch)
    markers = batch.vector_index[batch.tokens == MARKER_TOKEN]
    torch.testing.assert_close(vectors[markers], model.marker.expand(5, -1))


def test_id_tokens_first_then_the_projected_vectors_of_the_teacher(make_model):
    _, model, _ = rsllm(make_model)
    items = torch.tensor([3, 5])
    model.enter_stage(0, False)
    torch.testing.assert_close(model.item_inputs(items), model.id_embedding.weight[items])
    model.enter_stage(1, True)
    torch.testing.assert_close(model.item_inputs(items), model.item_projection(model.teacher.item_vectors[items]))


@pytest.mark.parametrize("recompute", [False, True])
def test_losses_equal_those_of_the_plain_llm(make_model, recompute):
    """One prompt after the other through the bare model: L_NIP, gamma L_I and beta L_U, and their gradients."""
    _, model, splits = rsllm(make_model, recompute_activations=recompute)
    rows = rows_of(splits["train"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.seed_step(3)
    losses = model.calculate_loss(rows)
    weights = torch.tensor([0.7, 1.3, -0.4])
    (torch.stack(losses) @ weights).backward()
    gradients = {name: p.grad.clone() for name, p in model.trained_parameters().items() if p.grad is not None}
    model.zero_grad()

    model.seed_step(3)
    candidates = model.training_candidates(rows, 4)
    order = model.rng.permuted(np.tile(np.arange(5), (4, 1)), axis=1)
    prompts = model.form.prompts
    batch = prompts.prompts(*model.history_items(rows), np.take_along_axis(candidates, order, axis=1))
    answers, alone = prompts.answers(candidates[:, 0]), prompts.item_prompts(candidates[:, 0])

    def states(batch, row, tail=()):
        here = slice(batch.offsets[row], batch.offsets[row + 1])
        vectors = model.vectors(batch)
        embedded = [
            vectors[which] if which >= 0 else model.backbone.embedding(torch.tensor(token))
            for token, which in zip(batch.tokens[here].tolist(), batch.vector_index[here].tolist(), strict=True)
        ] + [model.backbone.embedding(torch.tensor(token)) for token in tail]
        output = model.backbone.causal_lm(inputs_embeds=torch.stack(embedded)[None], output_hidden_states=True)
        return output.logits[0], output.hidden_states[-1][0]

    total, history, behind, target = 0.0, [], [], []
    for row, answer in enumerate(answers):
        length = int(batch.lengths[row])
        scores, hidden = states(batch, row, answer)
        total += functional.cross_entropy(scores[length - 1 : -1], torch.tensor(answer), reduction="sum")
        history.append(hidden[slice(*batch.pooled[row])].mean(0))
        behind.append(hidden[length : length + len(answer) - 1].mean(0))  # the title without the end token
        target.append(states(alone, row)[1][slice(*alone.pooled[row])].mean(0))

    def align(queries, keys):
        cosine = torch.stack([functional.cosine_similarity(query[None], torch.stack(keys)) for query in queries])
        same = torch.from_numpy(candidates[:, 0][:, None] == candidates[:, 0][None]) & ~torch.eye(4, dtype=torch.bool)
        return functional.cross_entropy((cosine / 0.5).masked_fill(same, float("-inf")), torch.arange(4))

    expected = [total / sum(map(len, answers)), 0.3 * align(target, behind), 0.4 * align(history, target)]
    assert model.loss_names == ("title", "item", "user")
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), atol=1e-4, rtol=1e-4)
    (torch.stack(expected) @ weights).backward()
    for name, parameter in model.trained_parameters().items():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)
    assert {name.split(".")[0] for name in gradients if "lora_" not in name} == {"item_projection", "marker"}


def test_what_each_stage_trains(make_model):
    _, model, splits = rsllm(make_model)
    model.train()
    model.enter_stage(0, False)
    assert moved(model, rows_of(splits["train"])) == LORA | TOKENS
    model.enter_stage(1, True)
    assert moved(model, rows_of(splits["train"])) == LORA | {"marker"} | MAPPING


@pytest.mark.parametrize(
    ("settings", "stage", "reached", "losses"),
    [
        ({"id_tokens": False, "behaviour_tokens": False}, 1, LORA, ["title", "item", "user"]),  # w/o item ID
        ({"id_tokens": False}, 0, LORA, ["title", "item", "user"]),  # w/o IID tokens
        ({"preload_embeddings": False}, 1, LORA | MAPPING | {"marker", "item_embedding"}, ["title", "item", "user"]),
        ({"gamma": 0}, 1, LORA | MAPPING | {"marker"}, ["title", "user"]),  # L_U only
        ({"beta": 0}, 1, LORA | MAPPING | {"marker"}, ["title", "item"]),  # L_I only
        ({"gamma": 0, "beta": 0}, 1, LORA | MAPPING | {"marker"}, ["title"]),  # w/o contrast
    ],
)
def test_ablations(make_model, settings, stage, reached, losses):
    _, model, splits = rsllm(make_model, **settings)
    model.enter_stage(stage, bool(stage))
    assert moved(model, rows_of(splits["train"])) == reached
    assert list(model.loss_names) == losses
    without = not settings.get("preload_embeddings", True) or not settings.get("behaviour_tokens", True)
    assert (model.teacher is None) is without


def test_without_text_an_item_is_called_by_its_number(make_model):
    _, model, splits = rsllm(make_model, item_representation="id")
    number = splits["train"].id2token("item_id", 3)
    assert spelled(model, model.form.prompts.item_prompts(np.array([3])), 0).strip() == f"{number}[DSR][ID]"
    answer = model.form.prompts.answers(np.array([3]))[0]
    assert model.form.generator.title_in(model.backbone.tokenizer.decode(answer, skip_special_tokens=True)) == number


def test_losses_of_an_ablation_are_those_of_the_whole(make_model):
    _, whole, splits = rsllm(make_model)
    _, part, _ = rsllm(make_model, gamma=0)
    rows = rows_of(splits["train"])
    for model in (whole, part):
        model.seed_step(1)
    (title, _, user), (same_title, same_user) = whole.calculate_loss(rows), part.calculate_loss(rows)
    torch.testing.assert_close(torch.stack([title, user]), torch.stack([same_title, same_user]))


@pytest.mark.parametrize(
    ("run_stages", "stage", "hybrid"),
    [(["text_id"], 0, False), pytest.param(["hybrid"], 0, True, marks=pytest.mark.slow), (None, 1, True)],
)
def test_one_stage_alone_is_trained_and_evaluated_on_its_own_prompts(make_model, run_stages, stage, hybrid):
    from recbole.utils import get_trainer

    from recbole_llm.data.loaders import dataloaders

    settings = {"run_stages": run_stages, "epochs": 1, "eval_step": 1, "train_targets": "last", "train_batch_size": 30}
    config, model, splits = rsllm(make_model, **settings)
    assert model.hybrid is hybrid, "a model that is only loaded shows the prompts that it was trained on last"
    trainer = get_trainer(config["MODEL_TYPE"], "RSLLM")(config, model)
    train, valid, test = dataloaders(config, model._dataset, splits)
    seen = set()
    plain = model.calculate_loss
    model.calculate_loss = lambda rows: seen.add((model.stage, model.hybrid)) or plain(rows)
    trainer.fit(train, valid)
    assert (stage, hybrid) in seen and len(seen) == (1 if run_stages else 2)
    result = trainer.evaluate(test)
    assert set(result) == {"hit@1", "hit@5", "validratio"} and model.hybrid is hybrid


def test_a_stage_that_does_not_exist(make_model):
    with pytest.raises(UserError, match="run_stages: text names no stage; there are text_id, hybrid"):
        rsllm(make_model, run_stages=["text"])


def test_by_retrieval_users_and_targets_are_aligned(make_model):
    from recbole_llm.loss.retrieval import retrieval_loss
    from recbole_llm.loss.two_tower import contrastive_loss

    _, model, splits = rsllm(make_model, recommend_by="retrieval", protocol="retrieval")
    rows = rows_of(splits["train"])
    model.seed_step(2)
    losses = model.calculate_loss(rows)
    model.seed_step(2)
    users, candidates = model.represent_users(rows), model.training_candidates(rows)
    targets = model.represent_items(candidates[:, 0])
    user = 0.4 * contrastive_loss(users, targets, torch.from_numpy(candidates[:, 0]))
    scores = torch.einsum("bd,bcd->bc", users, model.represent_candidates(candidates))
    expected = torch.stack([retrieval_loss(scores), user])
    torch.testing.assert_close(torch.stack(losses), expected)
    assert model.loss_names == ("retrieval", "user")
    tokens = model.prompts.item_prompts(np.array([3])).tokens
    assert tokens[np.flatnonzero(tokens == SLOT_TOKEN) - 1].tolist() == [MARKER_TOKEN]


@pytest.mark.parametrize("teacher", ["GRU4Rec", pytest.param("Caser", marks=pytest.mark.slow)])
def test_other_teachers_and_the_command_line(small_data, teacher):
    command = (
        f"run --model=RSLLM --dataset=chain --data_path={small_data} --recommend_by=generation --teacher={teacher} "
        "--backbone=tiny --backbone_dtype=float32 --epochs=1 --eval_step=1 --train_targets=last --show_progress=False "
        f"--use_gpu=False --train_candidates=5 --valid_users=10 --results_file=out.json --eval_args={{'mode':'uni9'}} "
        f"--{teacher}.epochs=1 --{teacher}.embedding_size=8"
    )
    assert cli.main(command.split()) == 0
    rows = json.loads(Path("out.json").read_text())
    assert {"hit@1", "validratio"} <= set(rows[0]["metrics"]["test"])
    assert [(row["model"], row["role"]) for row in rows] == [("RSLLM", "model"), (teacher, "teacher")]


def test_the_settings_of_the_readmes_table():
    """One file configures every row; an ablation differs from RSLLM in its own keys alone."""
    file = Path(__file__).parents[2] / "benchmarks" / "rsllm_table.yaml"
    given = load_yaml(file)
    models = given["model"].split(",")
    rows = {name: configure(name, given["dataset"], models, None, [str(file)], {}) for name in models}
    teachers = {name: config["teacher"] for name, config in rows.items() if name.startswith(("LLaRA", "RSLLM"))}
    assert {name for name, teacher in teachers.items() if teacher == "GRU4Rec"} == {"LLaRA:gru", "RSLLM:gru"}
    assert {name for name, teacher in teachers.items() if teacher == "Caser"} == {"LLaRA:caser", "RSLLM:caser"}
    assert rows["Caser"]["MAX_ITEM_LIST_LENGTH"] == rows["RSLLM:caser"]["teacher_settings"]["MAX_ITEM_LIST_LENGTH"] == 10
    assert rows["SASRec"]["learning_rate"] == 0.001 and rows["SASRec"]["epochs"] == 300, "a baseline keeps its settings"
    keys = "item_representation id_tokens behaviour_tokens preload_embeddings gamma beta run_stages".split()
    changed = {
        name: {key for key in keys if rows[name][key] != rows["RSLLM"][key]} for name in models if name.startswith("RSLLM:")
    }
    assert changed == {
        "RSLLM:gru": set(),
        "RSLLM:caser": set(),
        "RSLLM:no_text": {"item_representation"},
        "RSLLM:no_id": {"id_tokens", "behaviour_tokens"},
        "RSLLM:no_iid": {"id_tokens"},
        "RSLLM:no_preload": {"preload_embeddings"},
        "RSLLM:user_only": {"gamma"},
        "RSLLM:item_only": {"beta"},
        "RSLLM:no_contrast": {"gamma", "beta"},
        "RSLLM:stage_1": {"run_stages"},
        "RSLLM:stage_2": {"run_stages"},
    }
    for name in changed:
        stages = stages_to_run(select(StageSettings, rows[name]), RSLLM.parts)
        assert sum(stage["epochs"] for stage in stages) == 2, "each row is trained as long"
