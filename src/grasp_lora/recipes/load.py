"""From a file or a built-in name to a recipe: read, overridden, checked."""

import difflib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grasp_lora.errors import RecipeError
from grasp_lora.models.reading import read_base_model
from grasp_lora.models.settings import MOST_RANK
from grasp_lora.recipes.builtin import builtin_recipes, builtin_text
from grasp_lora.recipes.explain import explain
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.text import MOST_BYTES, RECIPE_FILE, RUN_FILE, decode, parse
from grasp_lora.storage.reading import RefusedError, expanded, is_file, is_folder, read_bounded
from grasp_lora.text.display import CONTROLS, SURROGATES, escaped, quoted
from grasp_lora.text.names import beside, imported, is_import_path

Overrides = Mapping[str, Any] | Sequence[str]

ENDINGS = (".yaml", ".yml")  # of a recipe
MOST_ABOVE = 3  # folders between a run folder and its deepest adapters, those in its store
MOST_WHOLE = 10**9  # of any whole number but a seed
MOST_SEED = 2**63 - 1
MOST_OF = {"rank": MOST_RANK, "candidates": 1_024}  # what would be allocated or tried at once
MOST_TEXT = 1_024  # characters of a text that is no template
MOST_PART = 255  # bytes of a part of a path, as file systems have it
NAMES_CODE = ("controller.preset", "controller.policy.kind", "controller.rule", "merge.rule", "mask.score", "final.mask.score",
              "metrics")  # fmt: skip
_FREE_TEXTS = (  # which may hold any characters, and many
    *(f"{place}.{text}" for place in ("data", "data.source", "data.target") for text in ("prompt", "completion")),
    "generation.stop",
)


def load_recipe(recipe: str | Path, overrides: Overrides = (), *, allow_code: bool = False) -> tuple[Recipe, Path]:
    """Read a recipe by file or built-in name and apply overrides.

    Args:
        recipe: path of a YAML file, or a name of `builtin_recipes()`.
        overrides: changes, such as `["data.root=data"]`, each value read as YAML, or `{"data.root": "data"}`, taken as it is.
        allow_code: whether the recipe may name code (`package.module:name`), which is imported: policies, rules, scores and
            metrics of your own, installed, on PYTHONPATH, or in a file beside the recipe.

    Returns:
        The recipe, and the folder that its relative paths start from.

    Raises:
        RecipeError: one line that names the field, what arrived and what is allowed.
    """
    name, file = f"recipe {escaped(str(recipe))}", expanded(recipe)
    if is_file(file):
        try:
            text = decode(read_bounded(file, MOST_BYTES), name)
        except RefusedError as error:
            raise RecipeError(f"{name}: {error}") from error
        base = file.parent
    elif str(recipe) in builtin_recipes():
        text = builtin_text(str(recipe))
        base = Path()
    else:
        raise RecipeError(_no_recipe(file, str(recipe)))
    content = parse(text, name)
    if not isinstance(content, dict):
        raise RecipeError(f"{name} must hold keys and values, such as 'name: my-recipe'")
    for path, value in _changes(overrides):
        _apply(content, path, value)
    import_code(content, name, base, allow_code=allow_code)
    return validate(content, escaped(str(recipe))), base


def _no_recipe(file: Path, name: str) -> str:
    """What was given in the place of a recipe."""
    if is_file(file / RUN_FILE):
        return f"{escaped(name)} is the folder of a run; give the recipe that it was begun with"
    there = file.parent.iterdir() if file.suffix in ENDINGS and is_folder(file.parent) else ()
    near = difflib.get_close_matches(file.name, [one.name for one in there if one.suffix in ENDINGS], n=1)
    if near:
        return f"there is no recipe {quoted(name)}; did you mean {quoted(str(file.with_name(near[0])))}?"
    return f"there is no recipe {quoted(name)}: neither a file nor a built-in name ({', '.join(builtin_recipes())})"


def backbone_of_run(adapter: str) -> str | None:
    """Return the backbone's folder of an adapter in a run folder: the adapter states its name, the run's recipe its place.

    Raises:
        AdapterError: the adapter's config cannot be used.
    """
    base_model = read_base_model(adapter) if is_folder(Path(adapter)) else None
    for folder in islice(Path(adapter).absolute().parents, MOST_ABOVE):
        if is_file(folder / RECIPE_FILE):
            try:
                content = parse(decode(read_bounded(folder / RECIPE_FILE, MOST_BYTES), RECIPE_FILE), RECIPE_FILE)
                named = expanded(content["backbone"]["name"])
            except (RefusedError, RecipeError, TypeError, KeyError):  # a recipe of another kind
                return None
            if base_model is None or named.name != Path(base_model).name:
                return None
            starts = (folder, folder / _recipe_folder(folder))
            # As if there was no link, and behind it.
            places = (place for start in starts for place in (Path(os.path.normpath(start / named)), start / named))
            return next((str(place) for place in places if is_folder(place)), None)
    return None


def _recipe_folder(run: Path) -> str:
    """The folder that relative paths of a run's recipe start from, as it is seen from the run folder."""
    try:
        content = json.loads(decode(read_bounded(run / RUN_FILE, MOST_BYTES), RUN_FILE))
    except (RefusedError, RecipeError, OSError, ValueError):
        return "."
    return str(content.get("recipe_folder") or ".") if isinstance(content, dict) else "."


def named_code(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The code that a recipe's plain values name: dotted key and import path."""
    for key in NAMES_CODE:
        place: Any = content
        for part in key.split("."):
            place = place.get(part) if isinstance(place, Mapping) else None
        for named in place if isinstance(place, list) else [place]:
            if isinstance(named, str) and is_import_path(named):
                yield key, named


def import_code(content: Mapping[str, Any], name: str, base: Path, *, allow_code: bool) -> None:
    """Import what a recipe names by import path, so that it is found where its name is read.

    Args:
        content: plain values of a recipe, or a part of them.
        name: what they are, for messages.
        base: folder of the recipe, where a file of code may lie.
        allow_code: whether the user allows it.

    Raises:
        RecipeError: code is not allowed, or what is named cannot be imported.
    """
    for key, named in named_code(content):
        if not allow_code:
            raise RecipeError(f"{name}: {key} names code, {quoted(named)}; read it, then allow it with --allow-code")
        with beside(base):
            try:
                imported(key, named, ())
            except ValueError as error:
                raise RecipeError(f"{name}: {error}") from error


def validate(content: dict[str, Any], name: str) -> Recipe:
    """Build a recipe from plain values.

    Raises:
        RecipeError: one line on the first thing that does not fit, with the dotted path of the field.
    """
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"recipe {name}: {explain(error)}") from error
    try:
        _check_values(content, recipe, ())
    except ValueError as error:
        raise RecipeError(f"recipe {name}: {error}") from error
    return recipe


def _check_values(given: Any, value: Any, place: tuple[str, ...]) -> None:
    """Check every value by what holds for all of its kind, beside what the settings check themselves.

    Args:
        given: what the recipe says here, or None where it says nothing.
        value: what it was read as.
        place: keys that lead here.

    Raises:
        ValueError: with the dotted path.
    """
    if isinstance(value, Recipe) or is_dataclass(value):
        names = Recipe.model_fields if isinstance(value, Recipe) else [entry.name for entry in fields(value)]
        for name in names:
            inner = given.get(name) if isinstance(given, dict) else None
            _check_values(inner, getattr(value, name), (*place, name))
        return
    if isinstance(value, dict | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            inner = given[key] if isinstance(given, dict | list | tuple) else None
            _check_values(inner, part, (*place, str(key)))
        return
    problem = _problem_of(given, value, place)
    if problem:
        raise ValueError(f"{'.'.join(place)}: {problem}")


def _problem_of(given: Any, value: Any, place: tuple[str, ...]) -> str | None:
    if given is not None and isinstance(given, bool) is not isinstance(value, bool):
        wanted = "true or false" if isinstance(value, bool) else "a number"  # pydantic takes 1 for true, and true for 1
        return f"must be {wanted} (it is {quoted(given)})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number (it is {value})"
    if isinstance(value, int) and not isinstance(value, bool):
        key = place[-1]
        most = MOST_SEED if key.endswith("seed") else MOST_OF.get(key, MOST_WHOLE)
        return f"must be at most {most} (it is {quoted(value)})" if abs(value) > most else None
    if isinstance(value, str):
        free = ".".join(place).startswith(_FREE_TEXTS)
        return _text_problem(value, free)
    return None


def _text_problem(text: str, free: bool) -> str | None:
    """Why a text cannot be a name or a path; a free one may be anything that can be written down."""
    found = SURROGATES.search(text) if free else CONTROLS.search(text)
    if found:
        return f"holds the character U+{ord(found.group()):04X}, which is not allowed here; remove it"
    if free:
        return None
    if len(text) > MOST_TEXT:
        return f"has {len(text)} characters; at most {MOST_TEXT} are allowed"
    if max(len(part.encode()) for part in text.split("/")) > MOST_PART:
        return f"holds a name of more than {MOST_PART} bytes, which no file can have"
    return None


def _changes(overrides: Overrides) -> list[tuple[str, Any]]:
    """Keys and values."""
    if isinstance(overrides, Mapping):
        return [(str(key), _plain(value)) for key, value in overrides.items()]
    if isinstance(overrides, str) or not isinstance(overrides, Iterable):
        what = f"the text {quoted(overrides)}" if isinstance(overrides, str) else quoted(overrides)
        raise RecipeError(f"overrides is {what}; give a list, or a mapping from keys to values")
    return [_read(str(override)) for override in overrides]


def _read(override: str) -> tuple[str, Any]:
    """A key and its value, from `a.b=value`."""
    shown = quoted(override)
    path, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"override {shown} must look like a.b=value, for example data.target.train=100")
    path, bare = path.strip(), text.strip()
    if not bare:
        raise RecipeError(f"override {shown} has no value; write {escaped(path)}=null to unset it")
    try:
        value = parse(text, "the value")
    except RecipeError as error:
        problem = str(error)
        if "no valid YAML" in problem:
            where = problem.partition("no valid YAML")[2].lstrip(": ")
            problem = f"the value is no valid YAML; put text in quotes ({where})"
        raise RecipeError(f"override {shown}: {problem}") from error
    written = text if path.startswith(_FREE_TEXTS) else bare
    cut = value != written if isinstance(value, str) else value is None and bare.startswith("#")
    if cut and bare[0] not in "\"'|>":
        read = "nothing" if value is None else quoted(value)
        raise RecipeError(
            f"override {shown}: YAML reads this text as {read}; put it in double quotes within the shell's: "
            f"{escaped(path)}={json.dumps(written, ensure_ascii=False)}"
        )
    return path, value


def _plain(value: Any) -> Any:
    """A value of Python as a recipe's file would give it: tuples are lists, numbers of NumPy numbers, paths their texts."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return str(value)


def _apply(content: dict[str, Any], path: str, value: Any) -> None:
    shown = quoted(f"{path}={value}")
    keys = path.strip().split(".")
    if not all(keys):
        raise RecipeError(f"override {shown} must look like a.b=value, for example data.target.train=100")
    place = content
    for key in keys[:-1]:
        inner = place.get(key)
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"override {shown}: {escaped(key)} is no section of the recipe")
        place[key] = inner
        place = inner
    place[keys[-1]] = value
