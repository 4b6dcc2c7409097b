"""ST2SI: its loss and prompts, its ablations, stored states, heads, pre-training, and runs through the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from recbole.data.interaction import Interaction
from recbole.utils import get_trainer
from safetensors.torch import load_file

from recbole_llm import checkpoint, cli
from recbole_llm.backbone.load import load_backbone
from recbole_llm.data.loaders import dataloaders
from recbole_llm.data.prepare import generate_chain
from recbole_llm.errors import UserError
from recbole_llm.evaluation.evaluate import evaluate_ranking
from recbole_llm.loading import load_data_and_model
from recbole_llm.model.st2si import ST2SI
from recbole_llm.recommender.base import Recommender
from recbole_llm.trainer.linear_head import HeadRecommender
from recbole_llm.trainer.pretraining import PretrainingTrainer, Source, SourceModels, SourceRows, source_configs

FULL = {
    "protocol": "full",
    "eval_args": {"mode": "full"},
    "metrics": ["NDCG", "Recall"],
    "valid_metric": "NDCG@5",
    "eval_step": 1.0,
    "warmup_steps": 0,
    "accumulation_steps": 1,
}


@pytest.fixture
def make(make_model):
    return lambda **settings: make_model("ST2SI", **{**FULL, **settings})


def rows_of(split, count=4):
    return split.inter_feat[torch.arange(count)]


def last_rows(model, count=4):
    return rows_of(model._dataset, count)


def words_of(backbone, text):
    return backbone.tokenizer(text, add_special_tokens=False)["input_ids"]


def plain_state(model, items, instruction=None):
    """The hidden state at the end of one prompt, by the plain LLM: its pieces are tokenized here, one by one."""
    backbone = model.backbone
    tokens = []
    query = words_of(backbone, ".") if model.query_ids else [-1]

    def words(text):
        return words_of(backbone, text)

    if instruction:
        tokens += words(instruction + " ")
    for place, item in enumerate(items):
        tokens += words(model._dataset.item_texts[item])
        if place == len(items) - 1 or model.prompts.settings.queries == "all":
            tokens += query
    ids = torch.tensor(tokens)
    embeddings = torch.where((ids < 0)[:, None], model.query, backbone.embedding(ids.clamp(min=0)))
    return backbone.model(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0, -1]


def test_loss_by_hand(make):
    """-log p(v_{i+1} | T_1 .. T_i) at every query token and -log p(v | T_I, T_v) of the step's items, averaged over both."""
    _, model, _ = make(windows="fixed")
    model.epoch_steps = 10
    model.seed_step(0)
    rows = last_rows(model, 3)
    losses = []
    for row in range(3):
        sequence = rows["item_id_list"][row, : rows["item_length"][row]].tolist() + [int(rows["item_id"][row])]
        for end in range(1, len(sequence)):
            logits = model.head.weight @ plain_state(model, sequence[:end])
            losses.append(-logits.log_softmax(0)[sequence[end] - 1])
    positions = len(losses)
    assert len(model.step_items) == 4
    for item in model.step_items.tolist():
        logits = model.head.weight @ plain_state(model, [item], "Please give the ID of the following item:")
        losses.append(-logits.log_softmax(0)[item - 1])
    expected = torch.stack(losses)
    next_item, alignment = model.calculate_loss(rows)
    assert model.loss_names == ("next_item", "id_alignment")
    torch.testing.assert_close(next_item, expected[:positions].sum() / len(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alignment, expected[positions:].sum() / len(expected), rtol=1e-4, atol=1e-4)


def test_ablations_differ_only_where_they_should(make):
    models = {
        (queries, alignment): make(windows="fixed", queries=queries, id_alignment=alignment)[1]
        for queries in ("all", "last")
        for alignment in (True, False)
    }
    losses = {}
    for key, model in models.items():
        model.epoch_steps = 10
        model.seed_step(0)
        losses[key] = model.query_losses(last_rows(model))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), models["all", True].parameters(), strict=True))
        assert len(model.loss_names) == len(losses[key]) == (2 if key[1] else 1)
        text = model.backbone.tokenizer.decode(model.prompts.alignments(np.array([1])).tokens[:-1])
        assert text.startswith("Please give the ID of the following item: ")
    rows = last_rows(models["last", False])
    lengths = rows["item_length"].numpy()
    for alignment in (True, False):
        assert len(losses["all", alignment][0]) == lengths.sum() and len(losses["last", alignment][0]) == len(lengths)
    for queries in ("all", "last"):
        torch.testing.assert_close(losses[queries, True][0], losses[queries, False][0])
    torch.testing.assert_close(losses["all", True][1], losses["last", True][1])
    # a single item has one query token in either form
    single = Interaction({**rows.interaction, "item_length": torch.ones_like(rows["item_length"])})
    single["item_id_list"][:, 1:] = 0
    first = [models[queries, False].next_item_losses(single) for queries in ("all", "last")]
    torch.testing.assert_close(*first)


@pytest.mark.parametrize("windows", ["random", "fixed"])
def test_the_target_is_never_in_the_prompt(make, windows):
    _, model, splits = make(windows=windows)
    rows = model._dataset.inter_feat
    seen = {}
    for step in range(40):
        model.seed_step(step)
        items, lengths = model.training_windows(rows)
        prompts = model.prompts.sequences(items[:, :-1], lengths)
        for row, user in enumerate(rows["user_id"].tolist()):
            sequence = model.sequences[user].tolist()
            window = items[row, : lengths[row] + 1].tolist()
            starts = [start for start in range(len(sequence)) if sequence[start : start + len(window)] == window]
            assert starts, "a window is a part of the training sequence"
            seen.setdefault(user, set()).add((starts[0], starts[0] + len(window) - 1))
            assert (items[row, lengths[row] + 1 :] == 0).all()
            alone = model.prompts.sequences(np.array([window[:-1]]), np.array([len(window) - 1]))
            start, end = prompts.offsets[row : row + 2]
            assert prompts.tokens[start:end].tolist() == alone.tokens.tolist(), "a prompt shows what is before the target"
    for user, found in seen.items():
        length = len(model.sequences[user])
        if windows == "fixed":
            assert found == {(0, length - 1)}
        elif length == 3:
            assert found == {(0, 1), (0, 2), (1, 2)}
    # training sequences end before the validation item, and evaluation shows what came before its target
    for phase, later in (("valid", 0), ("test", 1)):
        split = splits[phase].inter_feat
        for row in range(len(split)):
            sequence = model.sequences[int(split["user_id"][row])].tolist()
            history = split["item_id_list"][row, : split["item_length"][row]].tolist()
            assert history[: len(sequence)] == sequence and len(history) == len(sequence) + later


def test_each_item_is_asked_for_once_an_epoch(make):
    _, model, _ = make()
    model.epoch_steps = 7
    epochs = []
    for epoch in range(2):
        parts = []
        for step in range(epoch * 7, epoch * 7 + 7):
            model.seed_step(step)
            parts.append(model.step_items)
        assert {len(part) for part in parts} == {5, 6}
        epochs.append(np.concatenate(parts))
        assert sorted(epochs[-1]) == list(range(1, model.n_items))
    assert epochs[0].tolist() != epochs[1].tolist()
    model.seed_step(2)
    assert model.step_items.tolist() == epochs[0][11:17].tolist(), "a step's items depend on nothing but seed and step"
    model.epoch_steps = 1000  # more steps than items: most have none
    model.seed_step(1)
    assert len(model.step_items) == 0 and model.calculate_loss(last_rows(model))[1] == 0


def test_scoring_ways_agree(make):
    config, model, splits = make()
    model.eval()
    rows = rows_of(splits["test"], 5)
    full = model.full_sort_predict(rows)
    assert full.shape == (5, model.n_items) and torch.isinf(full[:, 0]).all()
    history = rows["item_id_list"][2, : rows["item_length"][2]].tolist()
    expected = model.head.weight @ plain_state(model, history)
    torch.testing.assert_close(full[2, 1:], expected, rtol=1e-4, atol=1e-4)
    candidates = torch.randint(1, model.n_items, (5, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.score(rows, candidates), full.gather(1, candidates))
    repeated = rows.repeat_interleave(20)
    repeated.update(Interaction({model.ITEM_ID: candidates.reshape(-1)}))
    before = model.encoder.counts.prompts
    torch.testing.assert_close(model.predict(repeated).reshape(5, 20), full.gather(1, candidates))
    assert model.encoder.counts.prompts - before == 5, "each history is encoded once"
    by_counts, by_scores = (
        evaluate_ranking(model.score, splits["test"], config, "test", rank_targets=how) for how in (model.rank_targets, None)
    )
    assert by_counts.ranks.tolist() == by_scores.ranks.tolist() and len(set(by_counts.ranks.tolist())) > 5


@pytest.mark.parametrize(
    ("tuning", "query_text"),
    [("full", "."), ("lora", "."), ("frozen", "."), ("ilp", "."), ("full", None), ("ilp", None)],
)
def test_what_is_trained(make, tuning, query_text):
    _, model, _ = make(tuning=tuning, query_text=query_text, lora_dropout=0.0)
    model.train()
    model.seed_step(0)
    sum(model.calculate_loss(last_rows(model))).backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    llm = {name for name in moved if name.startswith("encoder.backbone.causal_lm.")}
    assert moved - llm == ({"head.weight"} if query_text else {"head.weight", "query"}), "a learned [Q] is trained"
    assert moved | {"query"} == set(model.trained_parameters())
    assert bool(llm) is (tuning in ("full", "lora")) and all("lora_" in name for name in llm) is (tuning != "full")
    total = sum(name.startswith("encoder.backbone.causal_lm.") for name, _ in model.named_parameters())
    assert tuning != "full" or len(llm) == total


def test_softmax_in_chunks_and_over_samples(make):
    losses = {}
    for name, settings in {"plain": {}, "chunks": {"chunk_items": 7}, "sampled": {"softmax": "sampled"}}.items():
        _, model, _ = make(windows="fixed", sampled_negatives=30, **settings)
        model.seed_step(0)
        losses[name] = model.query_losses(last_rows(model))
    for plain, chunks, sampled in zip(*losses.values(), strict=True):
        torch.testing.assert_close(plain, chunks)
        assert sampled.shape == plain.shape and (sampled < plain).float().mean() > 0.5 and torch.isfinite(sampled).all()


@pytest.mark.slow
def test_text_is_learned_to_mean_its_id(make):
    config, model, splits = make(epochs=35, learning_rate=1e-2, train_batch_size=64, eval_step=0)
    trainer = get_trainer(config["MODEL_TYPE"], "ST2SI")(config, model)
    train, valid, test = dataloaders(config, model._dataset, splits)
    trainer.fit(train, valid)
    result = trainer.evaluate(test)
    assert result["ilp_accuracy@1"] > 0.9 and result["ilp_accuracy@5"] >= result["ilp_accuracy@1"]
    assert result["recall@5"] > 0.5, "and the order as well"
    assert "ilp_accuracy@1" not in trainer.evaluate(valid)
    # by hand for one item
    state = plain_state(model, [3], "Please give the ID of the following item:")
    torch.testing.assert_close(model.item_states(np.array([3]))[0], state, rtol=1e-4, atol=1e-4)


def test_published_learning_rates(make):
    for tuning, rate in {"full": 5e-5, "lora": 5e-5, "frozen": 3e-4, "ilp": 3e-4}.items():
        config, model, _ = make(tuning=tuning, learning_rate=None)
        assert get_trainer(config["MODEL_TYPE"], "ST2SI")(config, model).learning_rate == rate
    model.foundation = type("Foundation", (), {})()
    config["learning_rate"] = None
    assert get_trainer(config["MODEL_TYPE"], "ST2SI")(config, model).learning_rate == 1e-4


# Stored states


@pytest.mark.parametrize("queries", ["all", "last"])
def test_stored_states_equal_forwards(make, queries):
    """In loss, in the gradient of W and in scores; and the LLM runs once only, whatever is asked for how often."""
    config, stored, splits = make(tuning="ilp", queries=queries)
    _, forward, _ = make(tuning="frozen", windows="fixed", queries=queries)
    assert stored.windows == "fixed" and torch.equal(stored.head.weight, forward.head.weight)
    results = []
    for model in (stored, forward):
        model.epoch_steps = 5
        model.seed_step(3)
        rows = last_rows(model, 6)[torch.tensor([5, 0, 3])]
        losses = model.query_losses(rows)
        gradient = torch.autograd.grad(sum(model.calculate_loss(rows)), model.head.weight)[0]
        scores = [model.score(rows_of(splits["test"]), None), model.score(rows_of(splits["valid"]), torch.tensor([[1, 2]] * 4))]
        results.append([*losses, gradient, *scores, torch.tensor(list(model.id_accuracy().values()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    calls = stored.encoder.counts.calls
    stored.seed_step(4)
    stored.calculate_loss(last_rows(stored, 20))
    evaluate_ranking(stored.score, splits["test"], config, "test")
    stored.id_accuracy()
    assert stored.encoder.counts.calls == calls
    # a history that is in no split is encoded
    row = rows_of(splits["test"], 2)
    row["item_id_list"][0, 0] = row["item_id_list"][0, 0] % 39 + 1
    torch.testing.assert_close(stored.score(row, None), forward.score(row, None), rtol=1e-4, atol=1e-5)
    assert stored.encoder.counts.calls == calls + 1


def test_stored_states_are_found_again_by_the_same_and_by_nothing_else(make, tmp_path):
    def use(**settings):
        _, model, splits = make(tuning="ilp", **settings)
        model.seed_step(0)
        model.calculate_loss(last_rows(model))
        model.score(rows_of(splits["test"]), None)
        return model

    def files():
        return {file.name: file.stat().st_mtime_ns for file in (tmp_path / "saved" / "states").glob("*.npy")}

    first = use()
    found = files()
    assert sorted(name.split("-")[1] for name in found) == ["evaluation", "items", "train"]
    assert use().encoder.counts.calls == 0 and files() == found
    number = 3
    for other in ({"queries": "last"}, {"history_length": 3}, {"backbone_layers": 1}, {"seed": 7}):
        assert use(**other).encoder.counts.calls > 0
        # what does not depend on the setting is shared: the alignment prompts are the same whatever the histories show
        number += 2 if other.keys() & {"queries", "history_length"} else 3
        assert len(files()) == number, other
    with torch.no_grad():
        first.query.add_(1.0)
    before = first.encoder.counts.calls
    first.calculate_loss(last_rows(first))
    assert first.encoder.counts.calls > before, "another [Q] has other states"


def test_random_windows_of_the_paper_run_the_llm_under_ilp(make):
    _, model, _ = make(tuning="ilp", windows="random", id_alignment=False)
    for step in range(2):
        before = model.encoder.counts.calls
        model.seed_step(step)
        model.calculate_loss(last_rows(model))[0].backward()
        assert model.encoder.counts.calls > before
    assert model.query.grad is None and model.head.weight.grad.abs().sum() > 0


# Heads


@pytest.fixture
def two_datasets(chain_data):
    for seed, name in enumerate(("links", "rings"), start=5):
        if not (chain_data / name).is_dir():
            generate_chain(chain_data, name, users=40, items=30, seed=seed, noise=0.1)
    return chain_data


def on_dataset(config, name, shared=None, **settings):
    from recbole_llm.config.settings import make_config
    from recbole_llm.data.shared import SharedData

    other = make_config("ST2SI", name, config_dict={**config.external_config_dict, "dataset": name, **settings})
    return ST2SI(other, SharedData().train(other), shared=shared)


def test_heads_are_saved_and_swapped_over_one_llm(make, two_datasets, tmp_path):
    config, chain, splits = make(tuning="ilp")
    links = on_dataset(config, "links", shared=chain)
    assert links.encoder is chain.encoder and links.query is chain.query and links.head.weight.shape == (30, 32)
    chain.save_head(tmp_path / "chain")
    links.save_head(tmp_path / "links")
    llm = {name: weight.clone() for name, weight in chain.backbone.named_parameters()}
    rows = rows_of(splits["test"])
    before = chain.score(rows, None)
    with torch.no_grad():
        chain.head.weight.normal_()
    assert not torch.allclose(chain.score(rows, None), before)
    chain.load_head(tmp_path / "chain")
    assert torch.equal(chain.score(rows, None), before)
    assert all(torch.equal(weight, llm[name]) for name, weight in chain.backbone.named_parameters())
    with torch.no_grad():
        chain.head.weight.normal_()
    chain.save_head(tmp_path / "drawn")
    _, begun, _ = make(tuning="ilp", head=str(tmp_path / "drawn"))
    assert torch.equal(begun.head.weight, chain.head.weight)
    record = json.loads((tmp_path / "chain" / "recbole_llm.json").read_text())
    assert record["dataset"] == "chain" and record["fingerprint"] == chain.fingerprint


def test_a_head_of_other_items_or_of_another_llm_is_refused(make, two_datasets, tmp_path):
    config, chain, _ = make(tuning="ilp")
    chain.save_head(tmp_path / "chain")
    before = chain.head.weight.clone()
    with pytest.raises(UserError, match="items of chain, which are not those of links"):
        on_dataset(config, "links", head=str(tmp_path / "chain"))
    with pytest.raises(UserError, match="head over another LLM"):
        make(tuning="ilp", head=str(tmp_path / "chain"), backbone_layers=1)
    _, tuned, _ = make(tuning="full")
    with torch.no_grad():
        tuned.backbone.embedding.weight.add_(0.1)
    tuned.save_head(tmp_path / "tuned")
    with pytest.raises(UserError, match="head over another LLM"):
        chain.load_head(tmp_path / "tuned")
    checkpoint.write(tmp_path / "model", {"kind": "llm", "model": "ST2SI"}, {})
    with pytest.raises(UserError, match="holds no head"):
        chain.load_head(tmp_path / "model")
    assert torch.equal(chain.head.weight, before)


# Command line

RUN = [
    "--backbone=tiny", "--use_gpu=False", "--show_progress=False", "--warmup_steps=0", "--accumulation_steps=1",
    "--learning_rate=1e-3",
]  # fmt: skip


def run(data, *arguments):
    assert cli.main(["run", "--dataset=chain", f"--data_path={data}", *RUN, "--results_file=r.json", *arguments]) == 0
    return {record["label"]: record["metrics"]["test"] for record in json.loads(Path("r.json").read_text())}


@pytest.mark.slow
def test_beside_a_stock_model_under_full_ranking(chain_data, capsys):
    rows = run(chain_data, "--model=SASRec,ST2SI", "--epochs=1", "--SASRec.epochs=1", "--per_user_file=u.tsv")
    assert rows["SASRec"].keys() == {"ndcg@10", "recall@10", "mrr@10", "mrr@all"}
    assert rows["ST2SI"].keys() == {"ndcg@10", "recall@10", "mrr@10", "mrr@all", "ilp_accuracy@1", "ilp_accuracy@5"}
    assert Path("u.tsv").read_text().startswith("model\tseed\tuser\trank\tndcg@10\trecall@10\tmrr@10\tmrr@all\n")
    assert "ilp_accuracy@1" in capsys.readouterr().out
    among_20 = run(chain_data, "--model=ST2SI", "--epochs=1", "--protocol=generation", "--id_alignment=False")
    assert among_20["ST2SI"].keys() == {"hit@1"}


@pytest.mark.parametrize("tuning", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_pretraining_then_tuning(two_datasets, tmp_path, tuning):
    settings = f"{{epochs: 2, tuning: {tuning}, learning_rate: 0.01, warmup_steps: 0, accumulation_steps: 1}}"
    sources = ["--model=ST2SI", "--pretrain_datasets=[links, rings]", f"--pretrain_settings={settings}"]
    first = run(two_datasets, *sources, "--tuning=ilp", "--epochs=2")["ST2SI"]
    folder = next(Path("saved").glob("ST2SI-links+rings-*"))
    record = json.loads((folder / "recbole_llm.json").read_text())
    assert record["kind"] == "foundation" and record["datasets"] == ["links", "rings"] and not (folder / "training").exists()
    written = (folder / "recbole_llm.json").stat().st_mtime_ns
    assert set(load_file(folder / "heads" / "links" / "model.safetensors")) == {"weight", "query"}

    # found again by another tuning, and by its folder
    run(two_datasets, *sources, "--tuning=frozen", "--epochs=1")
    again = run(two_datasets, "--model=ST2SI", f"--pretrained={folder}", "--tuning=ilp", "--epochs=2")["ST2SI"]
    assert len(list(Path("saved").glob("ST2SI-links+rings-*"))) == 1
    assert (folder / "recbole_llm.json").stat().st_mtime_ns == written
    assert again == first
    plain = run(two_datasets, "--model=ST2SI", "--tuning=ilp", "--epochs=2")["ST2SI"]
    assert plain != first, "the LLM was trained"

    # its own heads stand on it; the LLM of a loaded model is the foundation's
    target = next(folder for folder in Path("saved").glob("ST2SI-chain-*") if checkpoint.read_record(folder)["foundation"])
    config, model, _, _, _, test = load_data_and_model(target)
    weights = load_file(folder / "model.safetensors")
    named = dict(model.backbone.causal_lm.named_parameters())
    assert all(torch.equal(named[name], weight) for name, weight in weights.items() if name != "query")
    links = on_dataset(config, "links", shared=model)
    links.load_head(folder / "heads" / "links")
    assert links.encoder is model.encoder and links.query is not model.query
    kept = load_file(target / "heads" / "chain" / "model.safetensors")
    assert torch.equal(kept["weight"], model.head.weight) and torch.equal(kept["query"], model.query)
    with pytest.raises(UserError, match="another LLM"):
        on_dataset(config, "links", pretrained=None, pretrain_datasets=None, head=str(folder / "heads" / "links"))


def test_the_models_of_all_sources_are_one_recommender(make, two_datasets, tmp_path):
    config, chain, _ = make()
    links = on_dataset(config, "links", shared=chain)
    model = SourceModels([Source({"dataset": name}, m._dataset, m) for name, m in (("chain", chain), ("links", links))]).eval()
    assert isinstance(model, Recommender) and isinstance(model, HeadRecommender) and isinstance(chain, HeadRecommender)
    assert model.backbones == {"backbone": chain.backbone} and model.loss_names == ("chain", "links")
    size = len(chain._dataset.inter_feat)
    rows = SourceRows([chain._dataset, links._dataset]).inter_feat[torch.tensor([size, 3, size + 2, 0])]
    candidates = torch.randint(1, 31, (4, 5), generator=torch.Generator().manual_seed(0))
    scores, own = model.score(rows, candidates), model.predict(rows)
    for source, places, numbers in ((links, [0, 2], [0, 2]), (chain, [1, 3], [3, 0])):
        expected = source._dataset.inter_feat[torch.tensor(numbers)]
        torch.testing.assert_close(scores[places], source.score(expected, candidates[places]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own[places], source.predict(expected), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="no catalog in common"):
        model.score(rows, None)
    model.save_head(tmp_path / "heads")
    links.load_head(tmp_path / "heads" / "links")
    assert set(model.id_accuracy()) == {f"{name}/ilp_accuracy@{k}" for name in ("chain", "links") for k in (1, 5)}


@pytest.mark.slow
def test_a_stopped_pretraining_resumes_to_the_same_llm(make, two_datasets, tmp_path, monkeypatch):
    settings = {
        "pretrain_datasets": ["links", "rings"],
        "pretrain_settings": {"epochs": 3, "learning_rate": 1e-2, "warmup_steps": 0},
    }
    _, whole, _ = make(**settings, checkpoint_dir=str(tmp_path / "whole"))
    validate, count = PretrainingTrainer.evaluate, []

    def stop_at_the_second(self, *arguments, **keywords):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return validate(self, *arguments, **keywords)

    monkeypatch.setattr(PretrainingTrainer, "evaluate", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make(**settings, checkpoint_dir=str(tmp_path / "cut"))
    assert not list((tmp_path / "cut").glob("*/recbole_llm.json"))
    _, cut, _ = make(**settings, checkpoint_dir=str(tmp_path / "cut"), resume=True)
    assert len(count) == 4, "the first epoch was not repeated"
    assert cut.foundation.sha256 == whole.foundation.sha256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrain_datasets": ["links", "links"]}, "twice"),
        ({"pretrain_datasets": ["links"], "pretrained": "x"}, "leave pretrain_datasets unset"),
        ({"pretrain_datasets": ["nowhere"]}, "nowhere"),
        ({"pretrain_datasets": [True, "links"]}, "True is no name of a dataset"),
        ({"pretrain_datasets": ["links", "../x"]}, "'../x' is no name of a dataset"),
        ({"pretrain_datasets": ["links"], "pretrain_settings": {"tuning": "ilp"}}, "trains no LLM"),
        ({"pretrain_datasets": ["links"], "pretrain_settings": {"epoch": 1}}, "did you mean 'epochs'"),
        ({"pretrained": "nowhere"}, "nowhere"),
    ],
)
def test_pretraining_that_makes_no_sense_is_refused(make, two_datasets, settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)


def test_a_quantized_llm_takes_no_pretrained_weights(make):
    config, _, _ = make(tuning="ilp")
    config["pretrained"], config["backbone_quantization"] = "somewhere", "8bit"
    with pytest.raises(UserError, match="backbone_quantization: .* leave it unset"):
        source_configs(config)


# Other LLMs


@pytest.mark.parametrize("projected", [False, True])
def test_opt(make, tmp_path, projected):
    """The paper's LLM: a decoder with learned positions; opt-350m's last hidden state is as wide as its embeddings."""
    tokenizer = load_backbone({"backbone": "tiny"}).tokenizer
    config = transformers.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, word_embed_proj_dim=16 if projected else 32, do_layer_norm_before=not projected,
        init_std=0.2, pad_token_id=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    _, model, splits = make(backbone=str(tmp_path / "opt"), windows="fixed")
    assert model.head.weight.shape == (40, 16 if projected else 32)
    model.eval()
    rows = rows_of(splits["test"], 2)
    history = rows["item_id_list"][1, : rows["item_length"][1]].tolist()
    expected = model.head.weight @ plain_state(model, history)
    torch.testing.assert_close(model.full_sort_predict(rows)[1, 1:], expected, rtol=1e-4, atol=1e-4)
    model.train()
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=1e-3)
    losses = []
    for _ in range(8):
        model.seed_step(0)
        loss = sum(model.calculate_loss(last_rows(model)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    _, stored, _ = make(backbone=str(tmp_path / "opt"), tuning="ilp")
    _, forward, _ = make(backbone=str(tmp_path / "opt"), tuning="frozen")
    torch.testing.assert_close(stored.score(rows, None), forward.score(rows, None), rtol=1e-4, atol=1e-5)
