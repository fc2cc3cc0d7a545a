"""The JSON schema of a recipe, with a description of each key from the docstrings of the settings.

    python -m grasp_lora.recipes.schema

writes the file that comes with the package; `grasp-lora schema` prints that file.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from grasp_lora.method.policy import POLICIES
from grasp_lora.method.presets import PRESETS
from grasp_lora.recipes.builtin import SCHEMA_FILE
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.text.docstrings import arguments, summary

PRESET = (
    "policy, rounds and rule that hold where the recipe says nothing else; left out, spread with a dev set, else late"
)
KIND = "which policy, or the import path package.module:name of a class of your own"


def recipe_schema() -> dict[str, Any]:
    """Return the schema.

    Raises:
        ValueError: a docstring does not say what a key means.
    """
    schema = Recipe.model_json_schema()
    controller, rounds = (schema["$defs"][name]["properties"] for name in ("ControllerStage", "Rounds"))
    controller["preset"] = {"type": "string", "examples": list(PRESETS), "description": PRESET}
    controller["policy"] |= {"properties": _policy_settings()}
    rounds["every"]["anyOf"] = [{"type": "integer", "minimum": 1}, {"const": "epoch"}]
    for name, section in [("Recipe", schema), *schema["$defs"].items()]:
        _describe(name, section)
    # The draft that editors know best; pydantic uses nothing that came later.
    return {"$schema": "http://json-schema.org/draft-07/schema#"} | schema | {"title": "GRASP LoRA recipe"}


def _policy_settings() -> dict[str, Any]:
    """The keys of all policies of ours; one of a user's own may have more."""
    found: dict[str, Any] = {"kind": {"type": "string", "examples": list(POLICIES), "description": KIND}}
    for policy in POLICIES.values():
        meanings = arguments(policy.__doc__ or "")
        for key, entry in TypeAdapter(policy).json_schema()["properties"].items():
            del entry["title"]
            found.setdefault(key, entry | {"description": meanings[key].replace("None", "null")})
    return found


def _describe(name: str, section: dict[str, Any]) -> None:
    """Put what the docstring says of each key beside the key, and leave out what says nothing to a person."""
    meanings = arguments(section["description"])
    section["description"] = summary(section["description"])
    meanings |= {key: entry["description"] for key, entry in section["properties"].items() if "description" in entry}
    if missing := section["properties"].keys() - meanings.keys():
        raise ValueError(f"the docstring of {name} does not say what {', '.join(sorted(missing))} means")
    for key, entry in section["properties"].items():
        entry.pop("title", None)
        if "$ref" in entry:  # the default of a section is that of its keys
            entry.pop("default", None)
        entry["description"] = meanings[key].replace("None", "null")
    section.pop("title", None)


if __name__ == "__main__":
    text = json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"
    Path(__file__).with_name(SCHEMA_FILE).write_text(text, encoding="utf-8")
