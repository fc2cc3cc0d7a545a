"""The text of a recipe to plain values, and the recipes that come with the package; quick to import."""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from grasp_lora.errors import RecipeError
from grasp_lora.text.display import one_line, quoted

RECIPE_FILE = "recipe.yaml"  # where a folder keeps it
RUN_FILE = "run.json"  # of a run folder: what it started from
MOST_BYTES = 1_000_000
SCHEMA_FILE = "grasp-lora.schema.json"
# Editors resolve it from the recipe's own folder, so it holds on every machine.
SCHEMA_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"
_STR = "tag:yaml.org,2002:str"


def parse(text: str | bytes, name: str) -> Any:
    """Return what a YAML text says.

    Args:
        text: the YAML, UTF-8.
        name: what it is, for messages, such as "recipe a.yaml".

    Raises:
        RecipeError: one line: where, and what is wrong.
    """
    # _Loader is a SafeLoader.
    if len(text) > MOST_BYTES:
        raise RecipeError(f"{name} has {len(text)} bytes; a recipe has at most {MOST_BYTES}")
    try:
        return yaml.load(text.decode("utf-8-sig") if isinstance(text, bytes) else text, _Loader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{name} is no valid YAML{where}: {one_line(getattr(error, 'problem', None) or str(error))}"
        ) from error


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
    return (resources.files("grasp_lora") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, less what nobody means: a key that stands twice, and numbers in base 8 or 60."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; YAML would silently take the last of equal keys, and `on` for true."""
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == "on":  # target.on
                key.tag = _STR
            if names.count(key.value) > 1:
                raise _error(key, f"the key {quoted(key.value)} stands twice; remove one")
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Build a number that means to YAML what it says: 010 is 8 there, and 1:30 is 90."""
        text = node.value
        if ":" in text or (re.match(r"[-+]?0[0-9_]", text) and "." not in text):
            raise _error(
                node, f"the number {quoted(text)} would be read in base 60 or 8; write it plainly, or in quotes"
            )
        return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def _error(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
