"""TALLRec by Yes and No: prompts from ratings, the loss and score of the answer, and the area under the ROC curve."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recbole.quick_start import run_recbole
from recbole.utils import get_trainer
from sklearn.metrics import log_loss, roc_auc_score
from torch.nn import functional

from recbole_llm import cli
from recbole_llm.backbone.load import load_backbone
from recbole_llm.config.settings import make_config, select
from recbole_llm.data.loaders import dataloaders
from recbole_llm.data.prepare import generate_chain
from recbole_llm.errors import UserError
from recbole_llm.evaluation.evaluate import evaluate_labels
from recbole_llm.recommender.yes_no import YesNoAnswers, YesNoSettings

YES_NO = {
    "recommend_by": "yes_no",
    "protocol": "yes_no",
    "eval_args": {"mode": "labeled"},
    "valid_metric": "AUC",
    "lora_dropout": 0.0,
    "yes_no_prompt": "Liked: {liked}. Disliked: {disliked}. Target: {target}. Answer:",
}


@pytest.fixture(scope="module")
def chain_data(tmp_path_factory):
    """The chain with ratings 1 to 5."""
    folder = tmp_path_factory.mktemp("rated")
    target = generate_chain(folder, "chain", users=40, items=30, seed=1, noise=0.1, lengths=(4, 9))
    header, *lines = (target / "chain.inter").read_text().splitlines()
    rng = np.random.default_rng(0)
    rated = [f"{line}\t{rng.integers(1, 6)}" for line in lines]
    (target / "chain.inter").write_text("\n".join([f"{header}\trating:float", *rated]) + "\n")
    return folder


def interactions(folder):
    """Per user the (title, rating) of the file in the order of time."""
    titles = dict(line.split("\t") for line in (folder / "chain" / "chain.item").read_text().splitlines()[1:])
    found = {}
    rows = [line.split("\t") for line in (folder / "chain" / "chain.inter").read_text().splitlines()[1:]]
    for user, item, _, rating in sorted(rows, key=lambda row: float(row[2])):
        found.setdefault(user, []).append((titles[item], float(rating)))
    return found


def listed(ratings, liked):
    return ", ".join(f'"{title}"' for title, rating in ratings if (rating > 3) == liked) or "none"


def test_prompts_and_labels_are_those_of_the_ratings(make_model, chain_data):
    config, model, splits = make_model("TALLRec", **YES_NO, history_length=5)
    asked = []
    seen = evaluate_labels(lambda rows: asked.append(rows) or model.predict(rows), splits["test"], config, "test")
    assert "rating" not in asked[0].columns and "rating_list" in asked[0].columns
    batch = model.form.user_prompts(asked[0])
    of_user = interactions(chain_data)
    assert len(batch) == len(of_user) == 40 and 5 < seen.labels.sum() < 35
    for row, user in enumerate(seen.user_ids):
        *history, (target, rating) = of_user[user]
        text = model.backbone.tokenizer.decode(batch.tokens[batch.offsets[row] : batch.offsets[row + 1]])
        history = history[-5:]
        liked, disliked = listed(history, True), listed(history, False)
        assert text == f'<s>Liked: {liked}. Disliked: {disliked}. Target: "{target}". Answer:'
        assert seen.labels[row] == (rating > 3)


def test_the_targets_own_rating_moves_the_loss_and_not_the_prompt(make_model):
    _, model, splits = make_model("TALLRec", **YES_NO)
    rows = splits["train"].inter_feat[torch.arange(6)]
    prompts, loss = model.form.user_prompts(rows), model.calculate_loss(rows)[0]
    rows["rating"] = 6 - rows["rating"].clamp(2, 5)  # 1 to 4; what was above 3 no longer is
    assert np.array_equal(model.form.user_prompts(rows).tokens, prompts.tokens)
    assert model.calculate_loss(rows)[0] != loss


def test_loss_and_score_equal_those_of_the_plain_llm(make_model):
    """One prompt after the other; next-token loss over the whole vocabulary, score from the two answers alone."""
    _, model, splits = make_model("TALLRec", **YES_NO, micro_batch_tokens=300)
    model.eval()
    tokenizer = model.backbone.tokenizer
    rows = splits["train"].inter_feat[torch.arange(7)]
    batch, likes = model.form.user_prompts(rows), rows["rating"] > 3
    assert 0 < likes.sum() < 7
    losses, scores = [], []
    for row, like in enumerate(likes):
        prompt = tokenizer.decode(batch.tokens[batch.offsets[row] : batch.offsets[row + 1]]).removeprefix("<s>")
        ids = tokenizer(prompt + (" Yes" if like else " No"), return_tensors="pt")["input_ids"]
        place = len(tokenizer(prompt)["input_ids"])
        logits = model.backbone.causal_lm(input_ids=ids[:, :place]).logits[0, -1].double()
        losses.append(functional.cross_entropy(logits, ids[0, place]))
        yes, no = (tokenizer(prompt + answer)["input_ids"][place] for answer in (" Yes", " No"))
        scores.append(logits[[yes, no]].softmax(dim=0)[0])
    torch.testing.assert_close(model.calculate_loss(rows)[0].double(), torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.predict(rows), torch.stack(scores), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_few_steps_learn_who_liked_what(make_model):
    _, model, splits = make_model("TALLRec", **YES_NO, tuning="full")
    rows = splits["train"].inter_feat[torch.arange(12)]
    likes = (rows["rating"] > 3).numpy()
    optimizer = torch.optim.Adam(model.trained_parameters().values(), lr=5e-3)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model.calculate_loss(rows)[0].backward()
        optimizer.step()
    model.eval()
    assert roc_auc_score(likes, model.predict(rows)) == 1.0


def test_metrics_are_sklearns_on_the_same_rows(make_model):
    config, model, splits = make_model("TALLRec", **YES_NO, valid_users=25)
    trainer = get_trainer(config["MODEL_TYPE"], "TALLRec")(config, model)
    _, valid, test = dataloaders(config, splits["train"], splits)
    for data, count in ((valid, 25), (test, 40)):
        metrics = trainer.evaluate(data, load_best_model=False)
        seen = trainer.last_ranking
        assert len(seen.rows) == count
        expected = {"auc": roc_auc_score(seen.labels, seen.values), "logloss": log_loss(seen.labels, seen.values)}
        assert metrics == pytest.approx(expected, abs=1e-9)


def test_only_lora_is_trained(make_model):
    _, model, splits = make_model("TALLRec", **YES_NO)
    model.train()
    model.calculate_loss(splits["train"].inter_feat[torch.arange(4)])[0].backward()
    assert all("lora_" in name and parameter.grad is not None for name, parameter in model.trained_parameters().items())


def test_an_output_head_of_its_own_is_trained_and_a_missing_one_refused(make_model, untied_backbone):
    _, model, splits = make_model("TALLRec", **YES_NO, tuning="full", backbone=str(untied_backbone[0]))
    model.train()
    model.calculate_loss(splits["train"].inter_feat[torch.arange(4)])[0].backward()
    head = model.trained_parameters()["encoder.backbone.causal_lm.lm_head.weight"]
    assert head.grad[list(model.form.yes_no.answers)].abs().sum(dim=1).min() > 0
    with pytest.raises(UserError, match="no output head, so it cannot answer Yes or No"):
        make_model("TALLRec", **YES_NO, backbone=str(untied_backbone[1]))


@pytest.mark.parametrize(
    ("no", "yes", "suffix", "answers"),
    [([7], [8], [], (7, 8)), ([3, 7], [3, 8, 9], [3], (7, 8)), ([3, 4, 5], [3, 6], [3], (4, 6))],
)
def test_answers_are_the_first_tokens_that_differ(monkeypatch, no, yes, suffix, answers):
    asked = yes_no_of(monkeypatch, no, yes)
    assert asked.answers == answers
    batch = asked.prompts.prompts(np.array([[1]]), np.array([1]), np.array([[True]]), np.array([1]))
    assert batch.tokens.tolist()[len(batch.tokens) - len(suffix) :] == suffix


@pytest.mark.parametrize(("no", "yes"), [([3], [3]), ([3], [3, 4]), ([3, 4], [3])])
def test_a_tokenizer_that_cannot_tell_yes_from_no_is_refused(monkeypatch, no, yes):
    with pytest.raises(UserError, match="Yes and No with the same tokens"):
        yes_no_of(monkeypatch, no, yes)


def yes_no_of(monkeypatch, no, yes):
    """Answers of the tiny LLM, its tokenizer writing Yes and No as given."""
    from recbole_llm.recommender import yes_no

    encode, said = yes_no.encode_text, {" No": no, " Yes": yes}
    monkeypatch.setattr(yes_no, "encode_text", lambda tokenizer, texts: [
        said[text] if text in said else encode(tokenizer, [text])[0] for text in texts
    ])  # fmt: skip
    config = {"title_words": ["film"], "history_length": 5, "max_prompt_tokens": None, "max_item_tokens": 9, **YES_NO}
    settings = select(YesNoSettings, config | {"backbone": "tiny"})
    cost = SimpleNamespace(micro_batch_tokens=100, call_cost=1, recompute=False)
    return YesNoAnswers(load_backbone({"backbone": "tiny"}), ["", "Heat"], settings, cost, None)


def test_a_checkpoint_of_other_ratings_is_foreign(make_model, chain_data, tmp_path):
    _, model, _ = make_model("TALLRec", **YES_NO)
    _, by_title, _ = make_model("TALLRec")
    copy = tmp_path / "copy" / "chain"
    shutil.copytree(chain_data / "chain", copy)
    path = copy / "chain.inter"
    path.write_text(path.read_text().replace("\t5\n", "\t1\n"))
    _, other, _ = make_model("TALLRec", **YES_NO, data_path=str(tmp_path / "copy"))
    assert len({model.fingerprint, by_title.fingerprint, other.fingerprint}) == 3
    _, plain, _ = make_model("TALLRec", data_path=str(tmp_path / "copy"))
    assert plain.fingerprint == by_title.fingerprint, "ratings that nobody reads are no part of the data"


# Mistakes


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("TALLRec", {"protocol": "retrieval"}, "yes_no judges each user's own item and ranks nothing: set protocol: yes_no"),
        ("TALLRec", {"recommend_by": "retrieval"}, "AUC judges predicted ratings"),
        ("LLaRA", {}, "recommend_by must be one of retrieval, generation, not 'yes_no'"),
        ("TALLRec", {"normalize_field": ["rating"]}, "rescale 'rating' to .* like_threshold"),
        ("SASRec", {"valid_metric": "LogLoss"}, "the scores of SASRec are none; take AUC"),
        ("TALLRec", {"like_threshold": "high"}, "like_threshold must be"),
    ],
)
def test_mistakes_in_settings(model, settings, message, chain_data):
    given = {"recommend_by": "yes_no", "protocol": "yes_no", "data_path": str(chain_data), **settings}
    if model == "SASRec":
        del given["recommend_by"]
    if "protocol" in settings:
        given["valid_metric"] = "Hit@10"
    with pytest.raises(UserError, match=message):
        make_config(model, "chain", config_dict=given)


def test_recboles_own_runner_measures_ours_and_says_why_not_a_stock_model(chain_data):
    settings = {"protocol": "yes_no", "data_path": str(chain_data), "epochs": 1, "show_progress": False, "use_gpu": False}
    ours = {"recommend_by": "yes_no", "backbone": "tiny", "lora_dropout": 0.0, "eval_step": 1}
    result = run_recbole(model="TALLRec", dataset="chain", config_dict={**settings, **ours})
    assert set(result["test_result"]) == {"auc", "logloss"}
    with pytest.raises(UserError, match="key threshold; compare by run_recbole_llm.py"):
        run_recbole(model="SASRec", dataset="chain", config_dict=settings)


def test_ranking_is_refused_in_one_sentence(make_model):
    _, model, splits = make_model("TALLRec", **YES_NO)
    with pytest.raises(UserError, match="judges an item that is given"):
        model.full_sort_predict(splits["test"].inter_feat[torch.arange(1)])


def test_a_threshold_that_leaves_one_kind_is_named(make_model):
    config, model, splits = make_model("TALLRec", **YES_NO, like_threshold=5)
    with pytest.raises(UserError, match="of the 40 test items 0 are rated above 5"):
        evaluate_labels(model.predict, splits["test"], config, "test")


# The whole way


def run(folder, **settings):
    command = (
        f"run --model=SASRec,TALLRec --dataset=chain --data_path={folder} --recommend_by=yes_no --backbone=tiny "
        "--backbone_dtype=float32 --epochs=1 --eval_step=1 --SASRec.epochs=1 --SASRec.hidden_size=8 "
        "--SASRec.inner_size=16 --show_progress=False --use_gpu=False --results_file=out.json --per_user_file=users.tsv"
    )
    return cli.main(command.split() + [f"--{key}={value}" for key, value in settings.items()])


def test_the_command_measures_both_models_on_the_same_rows(chain_data, capsys):
    assert run(chain_data) == 0
    out = capsys.readouterr().out
    assert "auc vs SASRec" in out and "p is from DeLong's test" in out
    results = {row["label"]: row["metrics"]["test"] for row in json.loads(Path("out.json").read_text())}
    assert set(results["SASRec"]) == {"auc"} and set(results["TALLRec"]) == {"auc", "logloss"}
    with open("users.tsv") as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    labels = {}
    for model, metrics in results.items():
        rows = [line for line in lines if line["model"] == model]
        labels[model] = [(line["user"], line["label"]) for line in rows]
        values = [float(line["value"]) for line in rows]
        assert metrics["auc"] == pytest.approx(roc_auc_score([int(line["label"]) for line in rows], values), abs=1e-6)
    assert labels["SASRec"] == labels["TALLRec"] and len(labels["SASRec"]) == 40


def test_data_without_ratings_gets_one_sentence(chain_data, tmp_path, capsys):
    generate_chain(tmp_path, "chain", users=20, items=20, seed=1, noise=0.1)
    assert run(tmp_path) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "chain.inter has no field 'rating'" in message and "add a column rating:float" in message
    path = tmp_path / "chain" / "chain.inter"
    header, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([header + "\trating:float", first + "\t", *(line + "\t4" for line in rest)]) + "\n")
    assert run(tmp_path) == 2
    assert "chain.inter:2 has no number as rating" in capsys.readouterr().err


def test_the_published_form_ends_in_a_line_of_its_own(make_model):
    """TALLRec's own wording: lists in quotation marks, and the answer behind a line break."""
    settings = {**YES_NO, "preset": "own"}
    del settings["yes_no_prompt"], settings["lora_dropout"]
    _, model, splits = make_model("TALLRec", **settings)
    tokenizer, prompts = model.backbone.tokenizer, model.prompts
    history, lengths = model.history_items(splits["test"].inter_feat[:1])
    batch = model.form.user_prompts(splits["test"].inter_feat[:1])
    text = tokenizer.decode(batch.tokens[batch.tokens >= 0])
    answers = [tokenizer.decode([*batch.tokens[-1:], answer]) for answer in model.form.yes_no.answers]
    assert "### Input:\nUser Preference:" in text and "\nUser Unpreference:" in text
    assert text.rstrip("\n").endswith('"?\n\n### Response:') and 'answering "Yes." or "No.".' in text
    assert prompts.settings.history_length == 10
    assert all(answer.lstrip(":\n")[:1] in ("N", "Y") for answer in answers), answers
