"""What a run was begun with, read off its folder: the file of its recipe, and what was set beside it."""

import json
import os
from pathlib import Path
from typing import Any

from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.recipes.builtin import builtin_recipes
from grasp_lora.recipes.text import MOST_BYTES, RECIPE_FILE, RUN_FILE, decode, on_one_line, parse
from grasp_lora.storage.reading import RefusedError, is_file, read_bounded


def recipe_folder(run: Path) -> str:
    """Return the folder that relative paths of a run's recipe start from, as the run folder has it; older ones do not say it."""
    return str(_said(run).get("recipe_folder") or ".")


def recipe_file(run: Path) -> str | None:
    """Return the recipe that a run was begun with, as the command line takes it; None where it is not there any more."""
    name = str(_said(run).get("name"))
    file = (run / recipe_folder(run) / f"{name}.yaml").absolute()
    if is_file(file):
        return os.path.relpath(file) if file.drive == Path.cwd().drive else str(file)
    return name if name in builtin_recipes() else None


def overrides_of(run: Path, recipe: str) -> list[str] | None:
    """Return what was set beside a recipe, as `--set` takes it; None where it cannot be told. This imports torch.

    Args:
        run: folder of the run, whose copy of the recipe has all settings.
        recipe: that it was begun with.
    """
    from grasp_lora.recipes.load import load_recipe

    try:
        theirs = parse(decode(read_bounded(run / RECIPE_FILE, MOST_BYTES), RECIPE_FILE), RECIPE_FILE)
        ours = parse(load_recipe(recipe)[0].to_yaml(run), RECIPE_FILE)
        changed = _changed(ours, theirs)
        for seen in (changed, {path: _absolute(value, run) for path, value in changed.items()}):
            overrides = [f"{path}={on_one_line(value)}" for path, value in seen.items()]
            if load_recipe(recipe, overrides)[0].fingerprint() == _said(run).get("recipe_hash"):
                return overrides
    except (GraspError, RefusedError):  # code that is not imported, another recipe of that name
        return None
    return None


def _said(run: Path) -> dict[str, Any]:
    """What run.json says; nothing where it cannot be read."""
    try:
        said = json.loads(decode(read_bounded(run / RUN_FILE, MOST_BYTES), RUN_FILE))
    except (RefusedError, RecipeError, OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _changed(ours: dict[str, Any], theirs: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted path -> their value, of all that differs; a section whole where it lacks a key of ours."""
    found: dict[str, Any] = {}
    for key, value in theirs.items():
        mine = ours.get(key)
        if isinstance(value, dict) and isinstance(mine, dict) and value.keys() >= mine.keys():
            found |= _changed(mine, value, f"{path}{key}.")
        elif key not in ours or mine != value:
            found[path + key] = value
    return found


def _absolute(value: Any, run: Path) -> Any:
    """An absolute path that the copy has as it is seen from its folder."""
    is_seen = isinstance(value, str) and value.startswith("../")
    return os.path.normpath(run.absolute() / value) if is_seen else value
