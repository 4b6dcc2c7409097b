"""The stages of a training, as the settings describe them: what is trained, on which prompts, for how long.

::

    stages:
      - {name: text, trains: [lora, heads], vectors: False}
      - {name: mapping, trains: [mapping, heads], vectors: True, epochs: 5, learning_rate: 1.0e-4}

``trains`` names parts of the model, which says itself which parameters they are. ``epochs`` and ``learning_rate`` are those of
the run where a stage does not name its own. ``run_stages`` names the stages that take place, all of them where it is not set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from recbole_llm.errors import UserError, closest

STAGE_KEYS = {"name": str, "trains": list, "vectors": bool, "epochs": int, "learning_rate": float}


@dataclass(frozen=True)
class StageSettings:
    """What the stages depend on; each field is the key of the same name."""

    stages: Any
    run_stages: list[str] | None
    epochs: int
    learning_rate: float


def read_stages(settings: StageSettings, parts: Iterable[str]) -> list[dict[str, Any]]:
    """Check the key ``stages``, and fill in the run's epochs and learning rate where a stage has none of its own.

    Args:
        parts: names of what the model can train.

    Raises:
        UserError: naming the stage and what is wrong with it.
    """
    stages, parts = settings.stages, tuple(parts)
    if not isinstance(stages, list) or not stages:
        raise UserError("stages: give a list of stages, each with name, trains and vectors.")
    checked = []
    for number, stage in enumerate(stages, start=1):
        if not isinstance(stage, Mapping):
            raise UserError(f"stages: stage {number} is {stage!r}, not a mapping such as {{name: text, trains: [lora]}}.")
        for key in stage:
            if key not in STAGE_KEYS:
                near = closest(key, STAGE_KEYS)
                hint = f"; did you mean {near}?" if near else f"; it may have {', '.join(STAGE_KEYS)}."
                raise UserError(f"stages: stage {number} has an unknown key {key!r}{hint}")
        values = {"epochs": settings.epochs, "learning_rate": settings.learning_rate, **stage}
        missing = [key for key in STAGE_KEYS if key not in values]
        if missing:
            raise UserError(f"stages: stage {number} lacks {missing[0]}.")
        try:
            values["learning_rate"] = float(values["learning_rate"])
        except (TypeError, ValueError):
            raise UserError(f"stages: stage {number} has learning_rate {values['learning_rate']!r}, no number.") from None
        for key, kind in STAGE_KEYS.items():
            if not isinstance(values[key], kind) or (kind is int and isinstance(values[key], bool)):
                raise UserError(f"stages: stage {number} has {key} {values[key]!r}, not of type {kind.__name__}.")
        if values["epochs"] < 1 or values["learning_rate"] <= 0:
            raise UserError(f"stages: stage {number} needs epochs and learning_rate above 0.")
        unknown = [part for part in values["trains"] if part not in parts]
        if unknown or not values["trains"]:
            raise UserError(f"stages: stage {number} trains {unknown or 'nothing'}; it may train {', '.join(parts)}.")
        checked.append(values)
    if len({stage["name"] for stage in checked}) < len(checked):
        raise UserError("stages: two stages have one name.")
    return checked


def stages_to_run(settings: StageSettings, parts: Iterable[str]) -> list[dict[str, Any]]:
    """The stages of a run: those of the key ``stages`` that ``run_stages`` names, in the order of ``stages``.

    Raises:
        UserError: see :func:`read_stages`; or a stage that does not exist.
    """
    stages = read_stages(settings, parts)
    wanted = settings.run_stages
    if wanted is None:
        return stages
    names = [stage["name"] for stage in stages]
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise UserError(f"run_stages: {unknown[0] if unknown else 'it'} names no stage; there are {', '.join(names)}.")
    return [stage for stage in stages if stage["name"] in wanted]
