"""The JSON schema of a recipe, with a description of each key from the docstrings of the settings.

    python -m grasp_lora.recipes.schema

writes the file that comes with the package; `grasp-lora schema` prints that file.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from grasp_lora.data.records import FORMATS
from grasp_lora.data.tasks import TASKS
from grasp_lora.method.masks import MASK_MODES
from grasp_lora.method.search import POLICIES, PRESETS
from grasp_lora.recipes.builtin import SCHEMA_FILE
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.stages import DELIVER, ON
from grasp_lora.text.docstrings import arguments, summary
from grasp_lora.training.settings import KEEP

NAMES: dict[str, dict[str, Sequence[str]]] = {  # what a text may be; the settings refuse any other
    "CorpusSettings": {"format": FORMATS},
    "DataSettings": {"task": tuple(TASKS)},
    "FinalStage": {"deliver": DELIVER, "mode": MASK_MODES},
    "TargetStage": {"on": ON},
    "TrainingSettings": {"keep": KEEP},
}


def recipe_schema() -> dict[str, Any]:
    """Return the schema.

    Raises:
        ValueError: a docstring does not say what a key means.
    """
    schema = Recipe.model_json_schema()
    for name, section in [("Recipe", schema), *schema["$defs"].items()]:
        _describe(name, section)
    _follow_the_preset(schema["$defs"])
    # The draft that editors know best; pydantic uses nothing that came later.
    return {"$schema": "http://json-schema.org/draft-07/schema#"} | schema | {"title": "GRASP LoRA recipe"}


def _describe(name: str, section: dict[str, Any]) -> None:
    """Put what the docstring says of each key beside the key, and leave out what says nothing to a person."""
    meanings = arguments(section["description"])
    section["description"] = summary(section["description"])
    if missing := section["properties"].keys() - meanings.keys():
        raise ValueError(f"the docstring of {name} does not say what {', '.join(sorted(missing))} means")
    for key, entry in section["properties"].items():
        entry.pop("title", None)
        if "$ref" in entry:  # the default of a section is that of its keys
            entry.pop("default", None)
        entry["description"] = meanings[key].replace("None", "null")
        if allowed := NAMES.get(name, {}).get(key):
            text = next(one for one in entry.get("anyOf", [entry]) if one["type"] == "string")
            text["enum"] = list(allowed)
    section.pop("title", None)


def _follow_the_preset(sections: dict[str, Any]) -> None:
    """Let a controller name a preset, which what is left out follows, and let its policy have the settings of every kind."""
    controller = sections["ControllerStage"]["properties"]
    policy = controller["policy"]["properties"]
    for kind in POLICIES.values():
        settings = TypeAdapter(kind).json_schema()
        _describe(kind.__name__, settings)
        policy |= {key: entry for key, entry in settings["properties"].items() if key not in policy}
    rounds = sections["Rounds"]["properties"]
    rounds["every"]["anyOf"] = [{"type": "integer", "minimum": 1}, {"const": "epoch"}]
    for properties in (controller, rounds, policy):
        for entry in properties.values():
            entry.pop("default", None)
    for key in ("policy", "rounds", "rule", "training"):  # a key with nothing behind it follows the preset, too
        entry = controller[key]
        described = {"description": entry.pop("description")}
        controller[key] = {"anyOf": [entry, {"type": "null"}]} | described
    preset = {
        "anyOf": [{"type": ["string", "null"], "pattern": ":"}, {"enum": list(PRESETS)}],
        "description": "policy, rounds and rule that go together; what is left out is the preset's.",
    }
    sections["ControllerStage"]["properties"] = {"preset": preset} | controller


if __name__ == "__main__":
    text = json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"
    Path(__file__).with_name(SCHEMA_FILE).write_text(text, encoding="utf-8")
