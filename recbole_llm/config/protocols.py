"""Several protocols in one comparison: the first decides training and validation, the others only test.

A protocol (``properties/protocol/``) sets split, candidates and metrics. Under a further one the trained
model is tested with that protocol's candidates and metrics; data, split and validation stay those of the first.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm import registry
from recbole_llm.config.checks import did_you_mean
from recbole_llm.config.schema import load_yaml
from recbole_llm.config.settings import limited_mode
from recbole_llm.errors import UserError


def protocol_names(value: Any) -> list[str]:
    """The protocols that ``--protocol=retrieval,full``, or a list in YAML, names; empty for None.

    Raises:
        UserError: an unknown protocol, one that is named twice, or one that cannot share a training with the first.
    """
    if value is None:
        return []
    entries = value if isinstance(value, (list, tuple)) else str(value).split(",")
    names = [str(entry).strip() for entry in entries]
    if len(names) == 1:
        return names  # checked with all other settings
    known = sorted(path.stem for path in (registry.properties_folder() / "protocol").glob("*.yaml"))
    for name in names:
        if name not in known:
            raise UserError(
                f"protocol must be one of {', '.join(known)}, or several with commas, not {name!r}{did_you_mean(name, known)}."
            )
        if names.count(name) > 1:
            raise UserError(f"protocol: {name} is named twice; name it once.")
    if not names:
        raise UserError("protocol names none: write --protocol=retrieval, or several with commas.")
    of_first = _preset(names[0])["eval_args"]
    for name in names:
        arguments = _preset(name)["eval_args"]
        if arguments["mode"] == "labeled":
            raise UserError(
                f"protocol: {name} judges ratings and ranks no items, so that it shares no training with others; give it alone."
            )
        if any(arguments[part] != of_first[part] for part in ("split", "order", "group_by")):
            raise UserError(
                f"protocol: {name} splits the data in another way than {names[0]}, and a model is trained on one split; run "
                f"each alone, and put their folders in one command by recbole-llm table."
            )
    return names


def _preset(name: str) -> dict[str, Any]:
    return load_yaml(registry.properties_folder() / "protocol" / f"{name}.yaml")


def under_protocols(config: Any, names: Sequence[str]) -> list[Any]:
    """The configuration of a trained model for its test under each of some further protocols.

    ``metrics`` and ``topk`` that the user set hold for all of them; so does ``valid_metric``, by which a table compares, where
    the protocol measures it. A ``mode`` in the user's ``eval_args`` and a ``candidates_file`` are of the first protocol alone.

    Args:
        config: of the training, under the first protocol.
        names: of the further ones.
    """
    return [_under(config, name) for name in names]


def _under(config: Any, name: str) -> Any:
    preset, given = _preset(name), config.external_config_dict
    values: dict[str, Any] = {"protocol": name, "candidates_file": None}
    for key in ("metrics", "topk"):
        values[key] = list(config[key] if key in given else preset[key])
    mode = limited_mode(preset["eval_args"]["mode"], config["most_candidates"])
    values["eval_args"] = {**config["eval_args"], "mode": {**config["eval_args"]["mode"], "test": mode}}
    own, wanted = preset["valid_metric"], config["valid_metric"]
    measured = [f"{metric}@{cut}" for metric in values["metrics"] for cut in values["topk"]]
    candidates = [wanted if "valid_metric" in given else own, own, f"{own.partition('@')[0]}@{values['topk'][0]}"]
    lowered = [entry.lower() for entry in measured]
    values["valid_metric"] = next((entry for entry in candidates if entry.lower() in lowered), measured[0])
    under = copy.copy(config)
    under.final_config_dict = {**config.final_config_dict, **values}
    under.external_config_dict = {**given, **values}
    return under


def without_list(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The settings with the first of several protocols as their only one; as they are where one or none is named."""
    return {**settings, "protocol": names[0]} if names else dict(settings)
