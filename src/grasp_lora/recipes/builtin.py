"""The recipes that come with the package, and the schema that editors complete and check them by; quick to import."""

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from grasp_lora.errors import RecipeError
from grasp_lora.text.display import quoted

SCHEMA_FILE = "grasp-lora.schema.json"
# Editors resolve it from the recipe's own folder, so it holds on every machine.
SCHEMA_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"


def builtin_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("grasp_lora") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def builtin_text(name: str) -> str:
    """Return a recipe that comes with the package, as it is written.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in builtin_recipes():
        raise RecipeError(f"there is no built-in recipe {quoted(name)}; there are: {', '.join(builtin_recipes())}")
    return _text(f"{name}.yaml")


def schema_text() -> str:
    """Return the JSON schema of a recipe, as `python -m grasp_lora.recipes.schema` has written it."""
    return _text(SCHEMA_FILE)


def recipe_keys() -> list[str]:
    """Return every key of a recipe by its dotted path, each section before what stands in it."""
    schema = json.loads(schema_text())
    return list(_keys(schema, schema["$defs"], ""))


def _keys(section: dict[str, Any], sections: dict[str, Any], path: str) -> Iterator[str]:
    for name, entry in section["properties"].items():
        yield path + name
        for one in (entry, *entry.get("anyOf", ())):
            inner = sections[one["$ref"].rpartition("/")[2]] if "$ref" in one else one
            if "properties" in inner:
                yield from _keys(inner, sections, f"{path}{name}.")


def _text(file: str) -> str:
    return (resources.files("grasp_lora") / "recipes" / file).read_text(encoding="utf-8")
