"""The schema by which editors complete recipes: current, complete, and fit for every recipe that is shipped."""

import json
from dataclasses import fields
from typing import Any

import jsonschema
import pytest
import yaml

from grasp_lora.errors import RecipeError
from grasp_lora.method.merging import MergeSettings
from grasp_lora.method.search import POLICIES, PRESETS
from grasp_lora.recipes.builtin import SCHEMA_LINE, builtin_recipes, builtin_text, schema_text
from grasp_lora.recipes.load import load_recipe, validate
from grasp_lora.recipes.schema import recipe_schema
from grasp_lora.recipes.text import parse

SCHEMA = json.loads(schema_text())


def unknown_keys(content: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """The keys of a recipe that an editor would underline."""
    found = []
    for one in schema.get("anyOf", [schema]):
        section = SCHEMA["$defs"][one["$ref"].rsplit("/", 1)[1]] if "$ref" in one else one
        known = section.get("properties", {})
        for key in content if isinstance(content, dict) else ():
            if key in known:
                found += unknown_keys(content[key], known[key], f"{path}{key}.")
            elif section.get("additionalProperties") is False:
                found.append(f"{path}{key}")
    return found


def test_the_shipped_schema_is_current() -> None:
    assert recipe_schema() == SCHEMA, "run python -m grasp_lora.recipes.schema"


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_shipped_recipe_names_the_schema_and_fits_it(name: str) -> None:
    text = builtin_text(name)
    assert text.startswith(SCHEMA_LINE + "\n")
    resolved = yaml.safe_load(validate(parse(text, name), name).to_yaml())
    for content in (parse(text, name), resolved):
        assert unknown_keys(content, SCHEMA) == []
        jsonschema.validate(content, SCHEMA)


@pytest.mark.parametrize(
    "controller",
    [
        {
            "policy": None,
            "rounds": None,
            "rule": None,
            "preset": None,
            "training": None,
        },  # as `init` leaves sections to the preset
        {"preset": "mine:one", "rule": "mine:rule", "policy": {"kind": "mine:Policy"}},
        {"preset": "late", "rounds": {"every": "epoch"}},
    ],
)
def test_a_controller_that_a_recipe_takes_fits(controller: dict[str, Any]) -> None:
    jsonschema.validate({"controller": controller}, SCHEMA | {"required": []})
    for wrong in ({"preset": 3}, {"policy": "late"}, {"rounds": {"every": "step"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"controller": controller | wrong}, SCHEMA | {"required": []})


def test_a_misspelt_key_does_not_fit() -> None:
    wrong = {
        "lorra": {},
        "final": {"training": {"epoch": 1}},
        "controller": {"presett": "paper", "rounds": {"evry": 2}},
    }
    assert unknown_keys(wrong, SCHEMA) == [
        "lorra",
        "final.training.epoch",
        "controller.presett",
        "controller.rounds.evry",
    ]
    assert all(not one.get("additionalProperties", True) for one in (SCHEMA, *SCHEMA["$defs"].values()))


def test_a_controller_is_completed_by_presets_and_the_settings_of_every_policy() -> None:
    controller = SCHEMA["$defs"]["ControllerStage"]["properties"]
    assert controller["preset"]["anyOf"][1]["enum"] == list(PRESETS)
    settings = {entry.name for policy in POLICIES.values() for entry in fields(policy)}
    section, empty = controller["policy"]["anyOf"]
    assert section["properties"].keys() == {"kind"} | settings
    assert empty == {"type": "null"}
    assert "default" not in controller["rule"]["anyOf"][0]  # it is the preset's


@pytest.mark.parametrize(
    "path",
    ["final.mode", "final.deliver", "final.training.keep", "target.on",
     "data.task", "data.target.format"],
)  # fmt: skip
def test_an_editor_offers_the_names_that_a_recipe_takes(path: str) -> None:
    entry = SCHEMA
    for key in path.split("."):
        sections = [entry, *entry.get("anyOf", [])]
        section = next(one for one in sections if "$ref" in one or "properties" in one)
        section = SCHEMA["$defs"][section["$ref"].rpartition("/")[2]] if "$ref" in section else section
        entry = section["properties"][key]
    [offered] = [one["enum"] for one in (entry, *entry.get("anyOf", [])) if "enum" in one]
    with pytest.raises(RecipeError) as refused:
        load_recipe("demo-ar", [f"{path}=nothing"])
    assert f"allowed: {', '.join(offered)}" in str(refused.value)


def test_every_key_says_what_it_means(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = [SCHEMA, *SCHEMA["$defs"].values()]
    assert all(entry["description"] for section in sections for entry in section["properties"].values())
    monkeypatch.setattr(MergeSettings, "__doc__", "How adapters are merged.\n\n    Args:\n        rule: one of them.\n")
    with pytest.raises(ValueError, match="MergeSettings does not say what density, dropout, rank, seed, weights means"):
        recipe_schema()
