"""What decides a step, as plain values: from their hash comes the key under which the step is on record."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from grasp_lora.evaluation.bertscore import BertScoreSettings
from grasp_lora.method.policy import plain_policy
from grasp_lora.recipes.stages import ControllerStage, FinalStage
from grasp_lora.text.names import without_place


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The same as JSON gives it back, lists for tuples, without what saves memory.

    A user's own code counts by its import path alone: who changes it gives it another name.
    """
    return {key: _plain_value(value) for key, value in settings.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        # It trades time for memory and no bit of the result, so that who ran out of memory may set it and go on.
        saved = {"gradient_checkpointing": False} if "gradient_checkpointing" in value else {}
        return {key: _plain_value(entry) for key, entry in {**value, **saved}.items()}
    return [_plain_value(entry) for entry in value] if isinstance(value, list | tuple) else value


def final_settings(stage: FinalStage) -> dict[str, Any]:
    """What decides a final run of this stage."""
    settings = asdict(stage)
    del settings["deliver"], settings["all_rows"]  # a choice among finished adapters, and a training of its own
    return settings


def controller_settings(stage: ControllerStage) -> dict[str, Any]:
    """What decides a controller run."""
    return asdict(stage) | {"policy": plain_policy(stage.policy)}


def public_bertscore(settings: BertScoreSettings) -> dict[str, Any]:
    """The settings as a record holds them: a hash tells models of one name in different places of this machine apart."""
    names = {language: (without_place(place), place) for language, place in settings.models.items()}
    models = {
        language: name if name == place else f"{name} {hashlib.sha256(place.encode()).hexdigest()[:16]}"
        for language, (name, place) in names.items()
    }
    return asdict(settings) | {"models": models}
