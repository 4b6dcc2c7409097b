"""Models that are tuned by LoRA, and recommending by generation."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from recbole_llm import cli
from recbole_llm.backbone.endpoint import Answer
from recbole_llm.configure import default_protocol
from recbole_llm.errors import UserError
from recbole_llm.evaluation.candidates import draw_candidates, shuffled_columns
from recbole_llm.evaluation.evaluate import evaluate_ranking
from recbole_llm.evaluation.ranking import rank_of_target
from recbole_llm.recommender.generation import CandidateGenerator
from recbole_llm.trainer.staged import StagedRecommender

BY_GENERATION = {"recommend_by": "generation", "protocol": "generation", "train_candidates": 5, "lora_dropout": 0.0}


def rows_of(split, count=4):
    return split.inter_feat[torch.arange(count)]


@pytest.mark.parametrize("form", ["retrieval", "generation"])
@pytest.mark.parametrize("name", ["TALLRec", "LLaRA"])
def test_lora_and_the_models_own_parts_are_trained_and_nothing_else(make_model, name, form):
    _, model, splits = make_model(name, recommend_by=form, train_candidates=5)
    model.train()
    model.progress = 1.0
    losses = model.calculate_loss(rows_of(splits["train"]))
    assert len(losses) == len(model.loss_names) == 1
    losses[0].backward()
    trained = model.trained_parameters()
    assert all(parameter.grad is not None for parameter in trained.values())
    kinds = {"lora" if "lora_" in key else key.split(".")[0] for key in trained}
    heads = {"item_head", "user_head", "user_out", "item_out"} if form == "retrieval" else set()
    projector = {"item_projection"} if name == "LLaRA" else set()
    assert kinds == {"lora"} | heads | projector
    assert (model.teacher is None) is (name == "TALLRec")


def test_tallrec_prompts_hold_no_vectors(make_model):
    _, model, splits = make_model("TALLRec")
    batch = model.prompts.user_prompts(model.histories(rows_of(splits["train"])))
    assert len(batch.slot_items) == 0 and batch.out_positions.shape[1] == 3


def test_title_loss_equals_that_of_the_plain_llm(make_model):
    """One prompt after the other, labels on the target's title and end token alone."""
    _, model, splits = make_model("TALLRec", **BY_GENERATION)
    rows = rows_of(splits["train"])
    model.seed_step(3)
    loss = model.form.loss(rows)[0]

    model.seed_step(3)
    candidates = model.training_candidates(rows, 4)
    order = model.rng.permuted(np.tile(np.arange(5), (4, 1)), axis=1)
    history, lengths = model.history_items(rows)
    batch = model.form.prompts.prompts(history, lengths, np.take_along_axis(candidates, order, axis=1))
    answers = model.form.prompts.answers(candidates[:, 0])
    total = count = 0
    for row, answer in enumerate(answers):
        prompt = batch.tokens[batch.offsets[row] : batch.offsets[row + 1]].tolist()
        logits = model.backbone.causal_lm(input_ids=torch.tensor([prompt + answer])).logits[0]
        total += functional.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="sum")
        count += len(answer)
        text = model.backbone.tokenizer.decode(prompt)
        assert all(f'"{splits["train"].item_texts[item]}"' in text for item in candidates[row])
    torch.testing.assert_close(loss, total / count, atol=1e-4, rtol=1e-4)


def test_the_order_of_the_list_says_nothing_of_the_target():
    candidates = np.random.default_rng(0).permuted(np.tile(np.arange(1, 21), (2000, 1)), axis=1)
    candidates += 20 * np.arange(2000)[:, None]
    place = np.argsort(shuffled_columns(candidates, 7), axis=1)[:, 0]  # where the target, column 0, is listed
    counts = np.bincount(place, minlength=20)
    assert counts.min() > 60 and counts.max() < 145  # 100 expected
    mixed = candidates[:, ::-1]
    for one, other in ((candidates, mixed),):
        first = np.take_along_axis(one, shuffled_columns(one, 7), axis=1)
        assert (first == np.take_along_axis(other, shuffled_columns(other, 7), axis=1)).all()


def evaluate(model, splits, config, rows=12):
    model.eval()
    model.reset_metrics()
    split = splits["test"]
    result = evaluate_ranking(model.score, split, config, "test", rows=np.arange(min(rows, len(split.inter_feat))))
    return result, model.answer_metrics()


def test_constrained_answers_are_candidates(make_model):
    config, model, splits = make_model("TALLRec", **BY_GENERATION, decode="constrained")
    _, metrics = evaluate(model, splits, config)
    assert metrics == {"validratio": 1.0}


def test_free_answers_of_an_untrained_llm_are_invalid_and_miss(make_model):
    config, model, splits = make_model("TALLRec", **BY_GENERATION)
    result, metrics = evaluate(model, splits, config)
    assert metrics["validratio"] < 0.5 and result.metrics["hit@1"] <= metrics["validratio"]


def test_likelihood_ranks_all_candidates(make_model):
    config, model, splits = make_model("TALLRec", **BY_GENERATION, decode="likelihood")
    candidates = draw_candidates(splits["test"], 9, config["seed"], "test", rows=np.arange(3))
    scores = model.score(rows_of(splits["test"], 3), torch.from_numpy(candidates))
    assert scores.shape == (3, 10) and torch.isfinite(scores).all() and (scores < 0).all()
    mixed = model.score(rows_of(splits["test"], 3), torch.from_numpy(candidates[:, ::-1].copy()))
    torch.testing.assert_close(scores, mixed.flip(1))
    assert model.answer_metrics() == {}


def test_a_title_that_two_candidates_share_counts_by_a_draw(make_model):
    _, model, splits = make_model("TALLRec", **BY_GENERATION)
    generator = model.form.generator
    generator.prompts._title[2] = generator.prompts._title[1]  # items 1 and 2 have one title
    history, lengths = model.history_items(rows_of(splits["test"], 1))
    said = generator.prompts.answers(np.array([1]))[0][:-1]
    generator_greedy = lambda *args, **kwargs: [said]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recbole_llm.recommender.generation.greedy", generator_greedy)
        scores = generator.score(history, lengths, np.array([[1, 2, 3, 4]]), model.vectors)
    assert scores.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    ranks = rank_of_target(scores.expand(1000, -1), seed=0)
    assert set(ranks.tolist()) == {1, 2} and 400 < (ranks == 1).sum() < 600


@pytest.mark.parametrize(
    ("answer", "title"), [(' "Heat"', "heat"), ("heat\nbecause", "heat"), ("  “Heat” ", "heat"), ("'Heat'", "heat"), ("", "")]
)
def test_answers_are_read_without_quotes_case_and_further_lines(answer, title):
    assert CandidateGenerator.title_in(answer) == title


def test_learning_to_answer(make_model):
    """A few steps on one batch make its targets the answers."""
    config, model, splits = make_model("TALLRec", **BY_GENERATION, tuning="full")
    rows = rows_of(splits["train"], 2)
    optimizer = torch.optim.Adam(model.trained_parameters().values(), lr=3e-3)
    model.train()
    first = None
    for _ in range(60):
        model.seed_step(0)
        loss = model.form.loss(rows)[0]
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first
    model.eval()
    model.seed_step(0)
    candidates = model.training_candidates(rows, 4)
    generator = model.form.generator
    with pytest.MonkeyPatch.context() as patch:  # in the order of the training prompt
        order = model.rng.permuted(np.tile(np.arange(5), (2, 1)), axis=1)
        patch.setattr("recbole_llm.recommender.generation.shuffled_columns", lambda *_: order)
        scores = generator.score(*model.history_items(rows), candidates, model.vectors)
    assert scores[:, 0].tolist() == [1.0, 1.0] and generator.metrics() == {"validratio": 1.0}


@pytest.mark.parametrize(
    ("form", "tuning", "trained"),
    [("generation", "full", True), ("generation", "lora", False), ("retrieval", "full", False)],
)
def test_an_output_head_of_its_own_is_trained_where_titles_are_written(make_model, untied_backbone, form, tuning, trained):
    settings = {"backbone": str(untied_backbone[0]), "recommend_by": form, "train_candidates": 5, "tuning": tuning}
    _, model, splits = make_model("TALLRec", **settings)
    model.train()
    model.calculate_loss(rows_of(splits["train"]))[0].backward()
    assert all(parameter.grad is not None for parameter in model.trained_parameters().values())
    head = model.backbone.causal_lm.lm_head.weight
    assert head is not model.backbone.embedding.weight
    assert ("encoder.backbone.causal_lm.lm_head.weight" in model.trained_parameters()) is trained
    assert (head.grad is not None and bool(head.grad.abs().sum() > 0)) is trained


# LLaRA


def test_curriculum_follows_progress(make_model):
    _, model, splits = make_model("LLaRA", train_negatives=1)
    rows, shown = rows_of(splits["train"], 1), []
    plain = model.form.loss
    model.form.loss = lambda rows: shown.append(model.hybrid) or (torch.zeros(()),)
    for progress in (0.0, 0.3, 1.0):
        model.progress = progress
        shown.clear()
        for step in range(400):
            model.seed_step(step)
            model.calculate_loss(rows)
        assert abs(np.mean(shown) - progress) < 0.08
    assert model.hybrid, "evaluation shows the vectors"
    model.form.loss = plain
    model.progress = 0.0
    model.calculate_loss(rows)[0].backward()
    assert all(p.grad is None for p in model.item_projection.parameters()), "text-only batches see no vector"
    model.settings = replace(model.settings, curriculum="none")
    model.calculate_loss(rows)[0].backward()
    assert all(p.grad is not None for p in model.item_projection.parameters())


def test_zero_shot_needs_generation(make_model):
    with pytest.raises(UserError, match="recommend_by: generation"):
        make_model("ZeroShot", recommend_by="retrieval")


def test_an_endpoint_is_asked_and_its_silence_is_counted(make_model, monkeypatch):
    settings = {**BY_GENERATION, "tuning": "frozen", "endpoint_url": "http://localhost:1/v1", "endpoint_model": "some-llm"}
    config, model, splits = make_model("ZeroShot", **settings)
    asked = []

    def ask(prompts, settings):
        asked.extend(prompts)
        first = splits["train"].item_texts[int(candidates[0, 0])]
        return [Answer(f' "{first.upper()}"\nI chose it'), Answer("No such title"), Answer(None, "down")]

    monkeypatch.setattr("recbole_llm.model.zeroshot.ask_endpoint", ask)
    candidates = draw_candidates(splits["test"], 9, config["seed"], "test", rows=np.arange(3))
    scores = model.score(rows_of(splits["test"], 3), torch.from_numpy(candidates))
    assert model.endpoint.base_url == "http://localhost:1/v1" and len(asked) == 3
    for prompt, row in zip(asked, candidates, strict=True):
        assert prompt.startswith("This user has bought") and "<s>" not in prompt
        assert all(f'"{splits["train"].item_texts[item]}"' in prompt for item in row)
    assert scores[0].tolist() == [1.0] + [0.0] * 9 and torch.isneginf(scores[1:]).all()
    assert model.answer_metrics() == {"validratio": 0.5, "incomplete": 1.0}


def test_a_backbone_without_an_output_head_writes_no_titles(make_model, untied_backbone):
    make_model("TALLRec", backbone=str(untied_backbone[1]))
    with pytest.raises(UserError, match="no output head, so it cannot write titles.*recommend_by: retrieval"):
        make_model("TALLRec", **BY_GENERATION, backbone=str(untied_backbone[1]))


# User vectors, CoLLM, A-LLMRec


@pytest.mark.parametrize("form", ["retrieval", "generation"])
@pytest.mark.parametrize("name", ["CoLLM", "ALLMRec"])
def test_the_users_vector_opens_the_prompt(make_model, sentence_encoder, name, form):
    _, model, splits = make_model(name, recommend_by=form, train_candidates=5)
    rows = rows_of(splits["train"])
    if form == "retrieval":
        batch = model.prompts.user_prompts(model.histories(rows))
        out = 3
    else:
        history, lengths = model.history_items(rows)
        batch = model.form.prompts.prompts(history, lengths, model.training_candidates(rows, 4))
        out = 0
    items = len(batch.vector_items)
    for row, (start, end) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
        vectors = batch.vector_index[start:end]
        slots = vectors[vectors >= 0]
        assert slots[0] == items + out + row and (slots == items + out + row).sum() == 1
        text = model.backbone.tokenizer.decode([token for token in batch.tokens[start:end] if token >= 0])
        opening = "This is user representation from recommendation models: , and this user has "
        assert text.removeprefix("<s>").startswith(opening)
    assert batch.header_length <= int((batch.tokens[: batch.offsets[1]] == -3).argmax())
    # The loss depends on each user's vector, through the user's mapping.
    model.train()
    model.seed_step(0)
    model.calculate_loss(rows)[0].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.user_projection.parameters())


@pytest.mark.parametrize("name", ["CoLLM", "ALLMRec"])
def test_prompts_encoded_together_equal_prompts_encoded_alone(make_model, sentence_encoder, name):
    _, model, splits = make_model(name)
    model.eval()
    with torch.no_grad():
        together = model.represent_users(rows_of(splits["test"]))
        alone = [model.represent_users(splits["test"].inter_feat[torch.tensor([row])]) for row in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_allmrec_reads_joint_vectors_and_freezes_the_llm(make_model, sentence_encoder):
    config, model, _ = make_model("ALLMRec", latent_size=16)
    assert model.joint_vectors.shape == (model.n_items, 16) and not model.joint_vectors.requires_grad
    assert not [key for key in model.trained_parameters() if "lora" in key or "causal_lm" in key or "alignment" in key]
    assert model.item_projection[0].in_features == 16 and model.user_projection[0].in_features == 8
    assert list(Path(config["checkpoint_dir"]).glob("alignment-*.safetensors"))


def collm(make_model, **settings):
    from recbole.utils import get_trainer

    from recbole_llm.data.loaders import dataloaders

    config, model, splits = make_model("CoLLM", **{"epochs": 1, "eval_step": 1, **settings})
    trainer = get_trainer(config["MODEL_TYPE"], "CoLLM")(config, model)
    trainer.saved_model_file = str(Path(config["checkpoint_dir"]) / "run")
    return trainer, *dataloaders(config, model._dataset, splits)


def test_collm_trains_in_two_steps(make_model):
    trainer, train, valid, _ = collm(make_model)
    model = trainer.model
    assert isinstance(model, StagedRecommender)
    seen = []
    plain = type(trainer)._train_step

    def step(self, *arguments):
        before = {name: p.detach().clone() for name, p in model.trained_parameters().items()}
        result = plain(self, *arguments)
        moved = {name for name, p in model.trained_parameters().items() if (p != before[name]).any()}
        moved = {"lora" if "lora_" in name else name.split(".")[0] for name in moved}
        seen.append((model.stage, model.has_item_vectors, moved))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer), "_train_step", step)
        trainer.fit(train, valid)
    heads, mapping = {"item_head", "user_head", "user_out", "item_out"}, {"item_projection", "user_projection"}
    for stage, vectors, trains in ((0, False, {"lora"} | heads), (1, True, mapping | heads)):
        moved = [entry[2] for entry in seen if entry[:2] == (stage, vectors)]
        assert len(moved) == len(seen) // 2 and set.union(*moved) == trains
    folder = Path(trainer.saved_model_file)
    assert (folder / "adapter" / "adapter_model.safetensors").exists() and not (folder / "stages").exists()
    assert json.loads((folder / "recbole_llm.json").read_text())["finished"]


# The whole way


@pytest.mark.parametrize("form", ["retrieval", "generation"])
@pytest.mark.slow
def test_a_comparison_of_all_models_in_one_form(form, small_data, sentence_encoder, capsys):
    models = ["SASRec", "TALLRec", "LLaRA", "CoLLM", "ALLMRec", "RSLLM"] + ["ZeroShot"] * (form == "generation")
    command = (
        f"run --model={','.join(models)} --dataset=chain --data_path={small_data} --recommend_by={form} "
        "--backbone=tiny --backbone_dtype=float32 --head_hidden_size=16 --epochs=1 --eval_step=1 --SASRec.epochs=1 "
        "--SASRec.hidden_size=8 --SASRec.inner_size=16 --show_progress=False --use_gpu=False --train_candidates=5 "
        f"--valid_users=10 --results_file=out.json --alignment_epochs=1 --train_targets=last --eval_args={{'mode':'uni9'}}"
    )
    assert cli.main(command.split() + (["--ZeroShot.tuning=frozen"] if form == "generation" else [])) == 0
    out = capsys.readouterr().out
    rows = json.loads(Path("out.json").read_text())
    assert [row["model"] for row in rows] == models and not [row for row in rows if "error" in row]
    assert ("hit@1" in out and "validratio" in out) is (form == "generation") is not ("ndcg@10" in out)
    if form == "generation":
        assert [("validratio" in row["metrics"]["test"]) for row in rows] == [False] + [True] * 6
        assert rows[-1]["trained_parameters"] == 0
    adapters = {path.parent.name.split("-")[0] for path in Path("saved").glob("*/adapter")}
    assert adapters == {"TALLRec", "LLaRA", "CoLLM", "RSLLM"}


# Published forms of prompts and answers


@pytest.mark.parametrize(
    ("answer", "exact", "substring"),
    [
        ("Toy Story", "toy story", "toy story"),
        ("1. Toy Story", None, "toy story"),
        ('I recommend "Toy Story"', None, "toy story"),
        ("Toy Story or Heat", None, None),  # two candidates
        ("Fargo", None, None),
        ("", None, None),
    ],
)
def test_an_answer_may_name_a_candidate_by_holding_its_title(answer, exact, substring):
    generator = object.__new__(CandidateGenerator)
    for generator.match, named in (("exact", exact), ("substring", substring)):
        assert generator.named_title(answer, ["toy story", "heat", "alien"]) == named


def read_prompt(model, batch):
    names = {-1: " <V>", -4: " <M>"}
    tokenizer, text, run = model.backbone.tokenizer, "", []
    for token in batch.tokens[: batch.offsets[1]].tolist():
        if token >= 0:
            run.append(token)
        else:
            text, run = text + tokenizer.decode(run) + names[token], []
    return text + tokenizer.decode(run)


def test_title_prompts_say_ranks_and_dates_and_leave_quotes_or_titles_out(make_model):
    common = {**BY_GENERATION, "lora_dropout": 0.0}
    _, model, splits = make_model("TALLRec", **common, title_details=True)
    rows = rows_of(splits["test"], 1)
    candidates = np.array([[1, 2, 3]])
    form, texts = model.form, splits["test"].item_texts
    batch = form.prompts.prompts(*model.history_items(rows), candidates, times=form.history_times(rows))
    shown = rows["item_id_list"][0][: rows["item_length"][0]].tolist()[-10:]
    times = rows["timestamp_list"][0][: rows["item_length"][0]].numpy()[-10:]
    dates = splits["test"].item_dates(times)
    listed = ",".join(
        f' Item No.{rank}, Time: {date}, "{texts[item]}"' for rank, (date, item) in enumerate(zip(dates, shown, strict=True), 1)
    )
    assert listed in read_prompt(model, batch)
    # What a long prompt loses, the ranks lose too.
    short = form.prompts.prompts(*model.history_items(rows), candidates, times=form.history_times(rows))
    form.prompts.settings = replace(form.prompts.settings, max_prompt_tokens=int(short.lengths[0]) - 5)
    cut = read_prompt(model, form.prompts.prompts(*model.history_items(rows), candidates, times=form.history_times(rows)))
    assert f'Item No.1, Time: {dates[1]}, "{texts[shown[1]]}"' in cut and f"No.{len(shown)}," not in cut

    _, model, _ = make_model("TALLRec", **common, title_quotes=False)
    batch = model.form.prompts.prompts(*model.history_items(rows), candidates)
    assert ",".join(f" {texts[item]}" for item in shown) in read_prompt(model, batch) and '"' not in read_prompt(model, batch)
    answer = model.backbone.tokenizer.decode(model.form.prompts.answers(np.array([1]))[0], skip_special_tokens=True)
    assert answer == f" {texts[1]}" and CandidateGenerator.title_in(answer) == texts[1].casefold()

    _, model, _ = make_model("RSLLM", **common, show_titles=False, recompute_activations=False)
    model.show_vectors(True)
    text = read_prompt(model, model.form.prompts.prompts(*model.history_items(rows), candidates))
    assert ",".join([" <M> <V>"] * len(shown)) in text and texts[1] not in text and "candidates are <M> <V>, <M> <V>" in text
    assert texts[1] in model.backbone.tokenizer.decode(model.form.prompts.answers(np.array([1]))[0])
    with pytest.raises(UserError, match="show_titles: False leaves nothing of an item"):
        make_model("TALLRec", **common, show_titles=False)


def test_rsllm_generates_where_nothing_else_is_said(tmp_path):
    assert default_protocol(["RSLLM"], {}) == "generation"
    assert default_protocol(["RSLLM"], {"recommend_by": "retrieval"}) == "retrieval"
