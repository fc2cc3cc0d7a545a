"""From a file or a built-in name to a recipe: read, overridden, checked; errors say value, rule and mend in one line."""

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grasp_lora.errors import RecipeError
from grasp_lora.models.adapter_files import read_base_model
from grasp_lora.recipes.recipe import Recipe, recipe_keys
from grasp_lora.recipes.text import RECIPE_FILE, RUN_FILE, builtin_recipes, builtin_text, parse
from grasp_lora.storage.reading import expanded, is_file, is_folder, reading
from grasp_lora.text.display import escaped, one_line, quoted
from grasp_lora.text.names import beside, imported, is_import_path

Overrides = Mapping[str, Any] | Sequence[str]

ENDINGS = (".yaml", ".yml")  # of a recipe
MOST_ABOVE = 3  # folders between a run folder and its deepest adapters, those in its store
NAMES_CODE = ("controller.policy.kind", "controller.rule", "merge.rule", "mask.score", "metrics")
TEMPLATES = ("data.prompt", "data.completion", "generation.stop")  # which may have white space at their ends
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_SECTION, _LIST = "must be a section of keys and values", "must be a list, such as [first, second]"
_PLAIN_WORDS = {  # of pydantic's error types, for those who do not know Python
    "string_pattern_mismatch": "use Latin letters, digits, '.', '_' and '-' only, and begin with a letter or digit",
    "tuple_type": _LIST,
    "dataclass_type": _SECTION,
    "model_type": _SECTION,
    "dict_type": _SECTION,
    "string_type": "must be a text",
}


def load_recipe(recipe: str | Path, overrides: Overrides = (), *, allow_code: bool = False) -> tuple[Recipe, Path]:
    """Read a recipe by file or built-in name and apply overrides.

    Args:
        recipe: path of a YAML file, or a name of `builtin_recipes()`.
        overrides: changes, such as `["data.root=data"]`, each value read as YAML, or `{"data.root": "data"}`, taken as it is.
        allow_code: whether the recipe may name code (`package.module:name`), which is imported: policies, rules, scores and
            metrics of your own, installed, on PYTHONPATH, or in a file beside the recipe; and whether it may set
            `backbone.trust_remote_code`.

    Returns:
        The recipe, and the folder that its relative paths start from.

    Raises:
        RecipeError: one line that names the field, what arrived and what is allowed.
    """
    name, file = f"recipe {escaped(str(recipe))}", expanded(recipe)
    if is_file(file):
        with reading(name, RecipeError):
            text, base = file.read_bytes(), file.parent
    elif str(recipe) in builtin_recipes():
        text, base = builtin_text(str(recipe)).encode(), Path()
    else:
        raise RecipeError(_no_recipe(file, str(recipe)))
    with reading(f"{name} must hold keys and values, such as 'name: my-recipe'", RecipeError):
        content = dict(parse(text, name))
    for path, value in overrides.items() if isinstance(overrides, Mapping) else map(_read, overrides):
        _apply(content, str(path), _plain(value))
    import_code(content, name, base, allow_code=allow_code)
    loaded = validate(content, escaped(str(recipe)))
    if loaded.backbone.trust_remote_code and not allow_code:
        raise RecipeError(
            f"{name}: backbone.trust_remote_code runs Python code that comes with {quoted(loaded.backbone.name)}; read it, then "
            "allow it with --allow-code"
        )
    return loaded, base


def _no_recipe(file: Path, name: str) -> str:
    """Say what stands in the place of a recipe, or which recipe was meant."""
    if is_file(file / RUN_FILE):
        return f"{escaped(name)} is the folder of a run; give the recipe that it was begun with"
    siblings = file.parent.iterdir() if file.suffix in ENDINGS and is_folder(file.parent) else ()
    near = difflib.get_close_matches(file.name, [path.name for path in siblings if path.suffix in ENDINGS], n=1)
    if near:
        return f"there is no recipe {quoted(name)}; did you mean {quoted(str(file.with_name(near[0])))}?"
    builtin = ", ".join(builtin_recipes())
    return (
        f"there is no recipe {quoted(name)}: neither a file, as seen from {Path.cwd()}, nor a built-in name ({builtin})"
    )


def backbone_of_run(adapter: str) -> str | None:
    """Return the backbone's folder of an adapter in a run folder: the adapter states its name, the run's recipe its place.

    Raises:
        AdapterError: the adapter's config cannot be used.
    """
    base_model = read_base_model(adapter) if is_folder(Path(adapter)) else None
    for folder in islice(Path(adapter).absolute().parents, MOST_ABOVE):
        if base_model is not None and is_file(folder / RECIPE_FILE):
            try:
                place = expanded(parse((folder / RECIPE_FILE).read_bytes(), RECIPE_FILE)["backbone"]["name"])
                start = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["recipe_folder"]
            except (OSError, RecipeError, ValueError, TypeError, KeyError):  # a recipe of another kind
                return None
            if place.name != Path(base_model).name:
                return None
            # As if there was no link, and behind it.
            starts = (folder, folder / start)
            places = (path for start in starts for path in (Path(os.path.normpath(start / place)), start / place))
            return next((str(path) for path in places if is_folder(path)), None)
    return None


def import_code(content: Mapping[str, Any], name: str, base: Path, *, allow_code: bool) -> None:
    """Import what a recipe names by import path, so that it is found where its name is read.

    Args:
        content: plain values of a recipe.
        name: what they are, for messages.
        base: folder of the recipe, where a file of code may lie.

    Raises:
        RecipeError: code is not allowed, or what is named cannot be imported.
    """
    for key in NAMES_CODE:
        place: Any = content
        for part in key.split("."):
            place = place.get(part) if isinstance(place, Mapping) else None
        for path in place if isinstance(place, list) else [place]:
            if not isinstance(path, str) or not is_import_path(path):
                continue
            with reading(name, RecipeError), beside(base):
                if not allow_code:
                    raise ValueError(f"{key} names code, {quoted(path)}; read it, then allow it with --allow-code")
                imported(key, path, ())


def validate(content: dict[str, Any], name: str) -> Recipe:
    """Build a recipe from plain values.

    Raises:
        RecipeError: one line on the first thing that does not fit, with the dotted path of the field.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"recipe {name}: {explain(error, recipe_keys())}") from error


def explain(error: ValidationError, keys: Sequence[str]) -> str:
    """The first problem in one line, an unknown key before all else, with the nearest of the `keys`, dotted paths."""
    problem = min(error.errors(include_url=False), key=lambda entry: entry["type"] not in _UNKNOWN)
    place = [str(part) for part in problem["loc"] if not re.match(r"function-|dict\[|str$", str(part))]
    path, arrived = ".".join(place), problem["input"]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] in _UNKNOWN:
        return f"unknown key {quoted(path)}; {_nearest(place, keys)}{more}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{quoted(path)} is missing{more}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return (f"{escaped(path)}: " if path else "") + one_line(message) + more
    message = one_line(_PLAIN_WORDS.get(problem["type"], message[:1].lower() + message[1:]))
    if not isinstance(arrived, dict | list):
        message += f" (it is {quoted(arrived)})"
        if problem["type"] == "string_type":
            message += "; put it in quotes"  # YAML reads the language code `no` as false
    return f"{escaped(path)}: {message}{more}"


def _nearest(place: Sequence[str], keys: Sequence[str]) -> str:
    """What may have been meant by an unknown key: a slip in its section, or the same name elsewhere."""
    *section, name = place
    inside = "".join(f"{part}." for part in section)
    siblings = [
        key.removeprefix(inside) for key in keys if key.startswith(inside) and "." not in key.removeprefix(inside)
    ]
    elsewhere = [key for key in keys if key.rpartition(".")[2] == name]
    near = difflib.get_close_matches(name, siblings, n=1) or elsewhere[:4]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known here: {', '.join(siblings)}"


def _read(override: str) -> tuple[str, Any]:
    """A key and its value, from `a.b=value`."""
    shown = f"override {quoted(override)}"
    path, _, text = override.partition("=")
    path, bare = path.strip(), text.strip()
    value = parse(text, shown)
    written = text if path.startswith(TEMPLATES) else bare
    cut = value != written if isinstance(value, str) else value is None and bare.startswith("#")
    fault = ""
    if not path or not bare:
        fault = "must look like a.b=value, such as data.target.train=100; a.b=null unsets a key"
    elif cut and bare[0] not in "\"'|>":  # what stands behind a # is a comment to YAML
        in_quotes = json.dumps(written, ensure_ascii=False)
        fault = f"has a comment, as YAML reads it; write {escaped(path)}={in_quotes}, in the shell's quotes"
    if fault:
        raise RecipeError(f"{shown} {fault}")
    return path, value


def _plain(value: Any) -> Any:
    """A value of Python as a recipe's file would give it: tuples are lists, numbers of NumPy numbers, paths their texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    value = value.item() if getattr(value, "shape", None) == () else value
    return value if value is None or isinstance(value, bool | int | float | str | date) else str(value)


def _apply(content: dict[str, Any], path: str, value: Any) -> None:
    """Set a value; a section that is not there yet is made."""
    *sections, name = path.strip().split(".")
    for key in sections:
        if not isinstance(content.get(key), dict):
            content[key] = {}
        content = content[key]
    content[name] = value
