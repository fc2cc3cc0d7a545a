"""The text of a recipe to plain values, and the recipes that come with the package; quick to import."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from grasp_lora.errors import RecipeError
from grasp_lora.storage.reading import reading
from grasp_lora.text.display import one_line, quoted

RECIPE_FILE = "recipe.yaml"  # where a folder keeps it
RUN_FILE = "run.json"  # of a run folder: what it started from
SCHEMA_FILE = "grasp-lora.schema.json"
# Editors resolve it from the recipe's own folder, so it holds on every machine.
SCHEMA_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"


def parse(text: str | bytes, name: str) -> Any:
    """Return what a YAML text says.

    Args:
        text: the YAML, UTF-8.
        name: what it is, for messages, such as "recipe a.yaml".

    Raises:
        RecipeError: one line: where, and what is wrong.
    """
    try:
        return yaml.load(text.decode("utf-8-sig") if isinstance(text, bytes) else text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = one_line(getattr(error, "problem", None) or str(error))
        raise RecipeError(f"{name} is no valid YAML{where}: {problem}") from error


def builtin_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("grasp_lora") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def builtin_text(name: str) -> str:
    """Return a recipe that comes with the package, as it is written.

    Raises:
        RecipeError: there is none of that name.
    """
    with reading(f"built-in recipe {quoted(name)} (there are: {', '.join(builtin_recipes())})", RecipeError):
        return (resources.files("grasp_lora") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that stands twice (YAML takes the last) and reads the key `on` as a text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == "on":  # target.on, which YAML takes for true
                key.tag = "tag:yaml.org,2002:str"
            if names.count(key.value) > 1:
                problem = f"the key {quoted(key.value)} stands twice; remove one"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)
