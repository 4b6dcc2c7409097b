"""What part L_seq has in f_user's gradient for each similarity s, before training: python benchmarks/anchors.py.

LLM-STAR on ml-100k, 2 of the LLM's 30 layers, its teacher trained (and kept in saved/), 12 users.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from recbole.utils import get_model, init_seed

import recbole_llm  # noqa: F401
import recbole_llm.model.llmstar as llmstar
from recbole_llm.config.settings import make_config, settings_for
from recbole_llm.data.shared import SharedData

CHOICES = {
    "cosine, temperature 1": {"temperature": 1.0},
    "cosine, temperature .2": {"temperature": 0.2},
    "cosine, temperature .07": {"temperature": 0.07},
    "dot product, bounded anchor": {"similarity": "dot", "anchor_norm": "bounded"},
}
SETTINGS = {
    "backbone_layers": 2, "micro_batch_tokens": 4096, "seed": 1, "user_inter_num_interval": "[0,50]", "history_length": 5,
    "teacher_settings": {"epochs": 60, "eval_step": 5}, "valid_users": 300, "use_gpu": False, "show_progress": False,
}  # fmt: skip


def norm(gradients: tuple[torch.Tensor | None, ...]) -> float:
    """The length of all gradients together."""
    return sum(float(gradient.norm()) ** 2 for gradient in gradients if gradient is not None) ** 0.5


def main() -> None:
    """Print a line for each choice, with hidden states as they are and standardized."""
    plain, seen = llmstar.sequence_anchor_loss, {}

    def watched(user, positive, negatives, parents, *rest):
        seen["cosine"] = torch.nn.functional.cosine_similarity(user[parents], negatives).mean().item()
        return plain(user, positive, negatives, parents, *rest)

    llmstar.sequence_anchor_loss = watched
    for standardized in (False, True):
        given = {**SETTINGS, "standardize_states": standardized}
        config = make_config("LLMSTAR", "ml-100k", config_dict=settings_for("LLMSTAR", given, ["LLMSTAR"]))
        data = SharedData()
        init_seed(config["seed"], True)
        model = get_model("LLMSTAR")(config, data.train(config)).train()
        rows, settings = model._dataset.inter_feat[torch.arange(12)], model.settings
        for name, choice in CHOICES.items():
            model.settings = replace(settings, **choice)
            model.seed_step(0)
            losses = model.calculate_loss(rows)
            heads = list(model.user_head.parameters())
            parts = [norm(torch.autograd.grad(loss, heads, retain_graph=True, allow_unused=True)) for loss in losses]
            states = "standardized" if standardized else "as they are"
            print(
                f"states {states}, {name}: L_rec {losses[0].item():.4f}, beta L_seq {losses[1].item():.4f}, "
                f"share {parts[1] / parts[0]:.4f}, cos(u, u_neg) {seen['cosine']:.4f}"
            )


if __name__ == "__main__":
    sys.argv = sys.argv[:1]  # RecBole reads it
    main()
