"""Our figures for the inputs that the public code was given: group -> quantity -> a number or a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scene
import torch
from recbole.utils import get_model, init_seed
from torch import Tensor

import recbole_llm  # noqa: F401
from recbole_llm.config.settings import make_config, settings_for
from recbole_llm.data.shared import SharedData
from recbole_llm.loss.alignment import alignment_loss
from recbole_llm.loss.binary import binary_loss
from recbole_llm.loss.distillation import distillation_loss
from recbole_llm.loss.retrieval import retrieval_loss
from recbole_llm.loss.uniformity import uniformity_loss
from recbole_llm.model.allmrec import ALLMRec
from recbole_llm.prompt.batch import OUT_TOKEN, SLOT_TOKEN, USER_TOKEN
from recbole_llm.recommender.candidates import OwnCandidates
from recbole_llm.trainer.alignment import ItemAlignment

MOVIES = ["movie", "watch", "watched"]
VECTORS = {SLOT_TOKEN: "[HistoryEmb]", USER_TOKEN: "[UserRep]"}


def text_of(tokens: np.ndarray, out: str = "") -> str:
    """A prompt as the public code writes it; each character is a token of its own."""
    return "".join({**VECTORS, OUT_TOKEN: out, 0: ""}.get(token) or _letter(token) for token in tokens.tolist())


def _letter(token: int) -> str:
    return "" if token <= 0 else scene.letters()[token]


class Place:
    """A folder with the scene's data and LLM, and the models made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        scene.write_data(folder)
        llm, tokenizer = scene.make_llm()
        llm.save_pretrained(folder / "llm")
        tokenizer.save_pretrained(folder / "llm")

    def model(self, name: str, **settings: Any) -> Any:
        """A model with the scene's weights, in evaluation mode."""
        teacher = {"epochs": 1, "hidden_size": scene.TEACHER_SIZE, "n_layers": 1, "MAX_ITEM_LIST_LENGTH": 10, "eval_step": 0}
        given = {
            "data_path": str(self.folder), "checkpoint_dir": str(self.folder / "saved"), "backbone": str(self.folder / "llm"),
            "backbone_dtype": "float32", "use_gpu": False, "show_progress": False, "MAX_ITEM_LIST_LENGTH": 10,
            "teacher_settings": teacher, **settings,
        }  # fmt: skip
        config = make_config(name, "parity", config_dict=settings_for(name, given, [name]))
        init_seed(config["seed"], True)
        model = get_model(name)(config, SharedData().train(config)).eval()
        if model.backbone.identity["tuning"] == "lora":
            scene.fill_lora(model.backbone.causal_lm)
        if getattr(model, "teacher", None) is not None:
            self._teach(model)
        for seed, part in PARTS.items():
            if hasattr(model, part):
                scene.fill_module(getattr(model, part), seed)
        for kind in ("user", "item"):
            out = getattr(model, f"{kind}_out", None)
            if out is not None:
                with torch.no_grad():
                    out.copy_(scene.out_vector(kind).expand_as(out))
        return model

    def _teach(self, model: Any) -> None:
        """Put the scene's teacher in the place of the trained one."""
        dataset = model._dataset
        items = dataset.field2id_token["item_id"]
        vectors = scene.item_vectors()[[int(token) if token != "[PAD]" else 0 for token in items]]
        model.teacher.item_vectors.copy_(vectors)
        users = torch.tensor([int(token) - 1 if token != "[PAD]" else 0 for token in dataset.field2id_token["user_id"]])
        model.teacher.represent = lambda rows: scene.user_states()[users[rows["user_id"]]].float()
        model.teacher.represent_windows = lambda rows, ends: model.teacher.represent(rows)


# Which seed fills which part of a model.
PARTS = {200: "item_projection", 300: "user_head", 400: "item_head", 500: "teacher_head", 600: "user_projection"}


def rows_of(model: Any) -> Any:
    """The rows of the training, in the order of the scene's users."""
    rows = model._dataset.inter_feat
    order = [int(model._dataset.token2id("user_id", str(user + 1))) for user in range(len(scene.SEQUENCES))]
    return rows[torch.tensor([rows["user_id"].tolist().index(user) for user in order])]


def ids(model: Any, items: Any) -> np.ndarray:
    """Internal ids of the scene's items."""
    table = np.vectorize(lambda item: model._dataset.token2id("item_id", str(item)))
    return table(np.asarray(items)).astype(np.int64)


def norm(values: Tensor) -> float:
    return float(values.detach().norm())


def by_representations(model: Any, candidates: list[list[int]]) -> dict[str, Any]:
    """A training step by retrieval: prompts, representations, losses and gradients."""
    rows = rows_of(model)
    model.draw_candidates = lambda interaction: OwnCandidates(ids(model, candidates))
    losses = model.calculate_loss(rows)
    sum(losses).backward()
    with torch.no_grad():
        users = model.represent_users(rows)
        items = model.represent_items(ids(model, candidates).ravel()).unflatten(0, (len(candidates), -1))
    user_prompts = model.prompts.user_prompts(model.histories(rows))
    item_prompts = model.prompts.item_prompts(ids(model, scene.targets()))
    made: dict[str, Any] = {
        "user prompt": text_of(user_prompts.tokens[slice(*user_prompts.offsets[1:3])], "[UserOut]"),
        "item prompt": text_of(item_prompts.tokens[: item_prompts.offsets[1]], "[ItemOut]"),
        **{f"f_user(h_U), user {user + 1}, dimension 1": users[user, 0].item() for user in range(3)},
        **{f"f_item(h_I), target {user + 1}, dimension 1": items[user, 0, 0].item() for user in range(3)},
        "f_user(h_U), norm of all": norm(users),
        "f_item(h_I), norm of all": norm(items),
        "L_retrieval": losses[0].item(),
        "gradient of [UserOut], norm": norm(model.user_out.grad.sum(dim=0)),
        "gradient of [ItemOut], norm": norm(model.item_out.grad.sum(dim=0)),
        "gradient of f_user, first layer, norm": norm(model.user_head[0].weight.grad),
        "gradient of f_item, last layer, norm": norm(model.item_head[3].weight.grad),
    }
    if type(model).has_item_vectors:
        made["gradient of f_I, first layer, norm"] = norm(model.item_projection[0].weight.grad)
    if len(losses) > 1:
        made["L_distill + L_uniform"] = sum(losses[1:]).item()
        made["gradient of f_CF-user, first layer, norm"] = norm(model.teacher_head[0].weight.grad)
    if type(model).has_user_vector:
        made["gradient of the user's mapping, first layer, norm"] = norm(model.user_projection[0].weight.grad)
    if model.backbone.identity["tuning"] == "lora":
        grads = [values.grad for key, values in model.backbone.causal_lm.named_parameters() if "lora_" in key]
        made["gradient of the LoRA matrices, norm"] = sum(norm(grad) ** 2 for grad in grads) ** 0.5
    return made


def losses_of_llmsrec(place: Place, candidates: None) -> dict[str, Any]:
    users, items, teacher = scene.waves(3, 4), scene.waves(3, 5, 4, seed=1), scene.waves(3, 4, seed=2)
    return {
        "L_retrieval": retrieval_loss(torch.einsum("bd,bcd->bc", users, items)).item(),
        "L_distill, MSE": distillation_loss(users, teacher).item(),
        "L_distill, InfoNCE": distillation_loss(users, teacher, "infonce").item(),
        "L_uniform of users": uniformity_loss(users).item(),
        "L_uniform of the teacher": uniformity_loss(teacher).item(),
    }


def loss_of_sasrec(place: Place, candidates: None) -> dict[str, Any]:
    return {"binary cross-entropy": binary_loss(scene.waves(5), scene.waves(5, seed=3)).item()}


def stage_one_of_allmrec(place: Place, candidates: None) -> dict[str, Any]:
    model = ItemAlignment(4, 6).double()
    pairs = [[model.item_encoder[0], model.item_decoder], [model.text_encoder[0], model.text_decoder]]
    with torch.no_grad():
        for place_of_pair, pair in enumerate(pairs):
            parameters = [parameter for layer in pair for parameter in (layer.weight, layer.bias)]
            for number, parameter in enumerate(parameters):
                parameter.copy_(0.3 * scene.waves(*parameter.shape, seed=10 * place_of_pair + number))
    items = torch.stack([scene.waves(3, 4, seed=1), scene.waves(3, 4, seed=2)], dim=1)
    texts = torch.stack([scene.waves(3, 6, seed=3), scene.waves(3, 6, seed=4)], dim=1)
    made = model(items, texts)
    losses = alignment_loss(
        scene.waves(3, 4), items, made.item_latent, made.item_reconstructed, texts, made.text_latent, made.text_reconstructed
    )
    names = ("matching", "item reconstruction, times .5", "text reconstruction, times .2", "recommendation")
    parts = dict(zip(names, (loss.item() for loss in losses), strict=True))
    return {**parts, "sum": sum(parts.values())}


def llmsrec(place: Place, candidates: list[list[int]]) -> dict[str, Any]:
    return by_representations(place.model("LLMSRec", preset="llmsrec"), candidates)


def of_the_group(name: str) -> Callable[[Place, list[list[int]]], dict[str, Any]]:
    """One of the baselines, by the LLM-SRec group's recipe, behind its curriculum."""

    def compute(place: Place, candidates: list[list[int]]) -> dict[str, Any]:
        model = place.model(name, preset="llmsrec")
        model.progress = 1.0
        return by_representations(model, candidates)

    return compute


def allmrec(place: Place, candidates: list[list[int]]) -> dict[str, Any]:
    aligned = ItemAlignment(scene.TEACHER_SIZE, 6)
    # Their auto-encoder of items alone: both its layers, one after the other.
    scene.fill([*aligned.item_encoder.named_parameters(), *aligned.item_decoder.named_parameters()], 700)
    plain, ALLMRec._align = ALLMRec._align, lambda self, dataset: aligned.joint(self.teacher.item_vectors).detach()
    try:
        model = place.model("ALLMRec", preset="llmsrec")
    finally:
        ALLMRec._align = plain
    model.joint_vectors.copy_(aligned.joint(model.teacher.item_vectors).detach())
    joint = model.joint_vectors[ids(model, [1, 2, 3])]
    made = by_representations(model, candidates)
    return {**{f"joint vector of item {item + 1}, dimension 1": joint[item, 0].item() for item in range(3)}, **made}


def mapping_of_collm(place: Place, candidates: None) -> dict[str, Any]:
    model = place.model("CoLLM", preset="own")
    scene.fill_module(model.item_projection, 800)
    with torch.no_grad():
        items = model.item_inputs(torch.from_numpy(ids(model, scene.targets())))
        users = model.user_inputs(rows_of(model))
    return {
        **{f"mapped user {user + 1}, dimension 1": users[user, 0].item() for user in range(3)},
        **{f"mapped target {user + 1}, dimension 1": items[user, 0].item() for user in range(3)},
    }


def own_llara(place: Place, candidates: list[int]) -> dict[str, Any]:
    model = place.model("LLaRA", preset="own", title_words=MOVIES)
    with torch.no_grad():
        items = model.item_inputs(torch.from_numpy(ids(model, scene.targets())))
    history = ids(model, scene.histories()[1])[None]
    made: dict[str, Any] = {f"projected target {user + 1}, dimension 1": items[user, 0].item() for user in range(3)}
    for number in range(3):
        batch = model.prompts.prompts(history, np.array([history.shape[1]]), ids(model, candidates)[None], np.array([number]))
        made[f"prompt {number + 1}"] = text_of(batch.tokens)
    return made


def own_allmrec(place: Place, candidates: list[int]) -> dict[str, Any]:
    plain, ALLMRec._align = ALLMRec._align, lambda self, dataset: torch.zeros(dataset.item_num, 128)
    try:
        model = place.model("ALLMRec", preset="own", title_words=MOVIES)
    finally:
        ALLMRec._align = plain
    history = ids(model, scene.histories()[1])[None]
    batch = model.prompts.prompts(history, np.array([history.shape[1]]), ids(model, candidates)[None])
    return {"prompt": text_of(batch.tokens)}


def own_tallrec(place: Place, candidates: None) -> dict[str, Any]:
    """The training rows are those of the targets: what the user likes is asked of the scene's ratings."""
    columns = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    model = place.model("TALLRec", preset="own", load_col=columns, title_words=MOVIES, train_targets="last")
    rows = rows_of(model)
    batch = model.form.user_prompts(rows)
    made: dict[str, Any] = {}
    for user in (0, 1):
        made[f"prompt of user {user + 1}"] = text_of(batch.tokens[slice(*batch.offsets[user : user + 2])])
    made["loss of the answer's first token, mean"] = model.calculate_loss(rows)[0].item()
    chances = model.predict(rows)
    return {**made, **{f"P(Yes) against P(No), user {user + 1}": chances[user].item() for user in range(3)}}


def st2si(place: Place, candidates: None) -> dict[str, Any]:
    settings = {"windows": "fixed", "id_alignment": False, "item_text": ["title", "brand"], "tuning": "ilp"}
    model = place.model("ST2SI", preset="paper", **settings)
    with torch.no_grad():
        table = scene.weights(scene.ITEMS, scene.HIDDEN, seed=850)
        model.head.weight.copy_(table[[int(token) - 1 for token in model._dataset.field2id_token["item_id"][1:]]])
    rows = rows_of(model)
    losses = model.next_item_losses(rows)
    with torch.no_grad():
        scores = model.score(rows, torch.from_numpy(ids(model, scene.targets()))[:, None])
        states = model.user_states(rows)
    history = ids(model, scene.histories()[1])[None]
    text = text_of(model.prompts.sequences(history, np.array([history.shape[1]])).tokens, ".")
    alignment = text_of(model.prompts.alignments(ids(model, scene.targets()[1:2])).tokens, ".")
    return {
        "sequence": text,
        "alignment prompt": alignment,
        "states at the last [Q], norm": norm(states),
        "loss of the next item, mean": losses.mean().item(),
        **{f"score of target {user + 1}": scores[user, 0].item() for user in range(3)},
    }


OURS: dict[str, Callable[[Place, Any], dict[str, Any]]] = {
    "LLM-SRec, losses": losses_of_llmsrec,
    "SASRec, loss": loss_of_sasrec,
    "A-LLMRec, stage 1": stage_one_of_allmrec,
    "LLM-SRec": llmsrec,
    "TALLRec, by retrieval": of_the_group("TALLRec"),
    "LLaRA, by retrieval": of_the_group("LLaRA"),
    "CoLLM, by retrieval": of_the_group("CoLLM"),
    "A-LLMRec, by retrieval": allmrec,
    "TALLRec, own": own_tallrec,
    "LLaRA, own": own_llara,
    "CoLLM, own mapping": mapping_of_collm,
    "A-LLMRec, own": own_allmrec,
    "ST2SI": st2si,
}
