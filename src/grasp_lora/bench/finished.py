"""Whether a run has done all, so that it is only read: nothing is missing, and what it was made from is as it was."""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from grasp_lora.bench import run_folder as files
from grasp_lora.bench.records import read_record
from grasp_lora.data.places import resolve_file
from grasp_lora.errors import DataError
from grasp_lora.models.reading import WEIGHTS_FILE
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.storage.reading import expanded, is_file, is_folder, is_there

_FILES = ("files", "train_files", "dev_files", "micro_dev_files", "test_files")


def is_finished(folder: Path, recipe: Recipe, base: Path) -> bool:
    """Tell whether a run has written all; what was deleted of its controller or its adapter is written again.

    Args:
        folder: of the run.
        recipe: that is run, which may hand over something else than the one before it.
        base: folder that its relative paths start from. Where an input was changed, the run has to look at its examples again.

    Raises:
        RecipeError: a file of the controller is damaged.
    """
    whole = is_file(folder / files.METRICS_FILE) and is_file(folder / files.ADAPTER_FOLDER / WEIGHTS_FILE)
    run = read_record(folder / files.RUN_FILE, files.RunInfo) if whole else None
    if run is None or run.recipe_hash != recipe.fingerprint():
        return False
    if any(run.inputs.get(key, own) != own for key, own in inputs_of(recipe, base).items()):
        return False
    controller, learns = folder / files.CONTROLLER_FOLDER, recipe.final.prune_ratio is None
    learned = read_record(controller / files.RATIO_FILE, files.LearnedRatio) if learns else None
    if learned is None:
        return not learns
    if not all(is_there(controller / name) for name in learned.rows):
        return False
    files.check_rows(folder, learned)
    return True


def inputs_of(recipe: Recipe, base: Path) -> dict[str, str]:
    """Return the SHA-256 of every data file and given adapter, by the key of the recipe that names it, such as `target.files.0`.

    Left out is what the hub holds, and what is not there or cannot be read any more: a finished run needs none of it.

    Args:
        recipe: of the run.
        base: folder that its relative paths start from.
    """
    found = {}
    for key, file in _places(recipe, base):
        with suppress(OSError), file.open("rb") as opened:
            found[key] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def _places(recipe: Recipe, base: Path) -> Iterator[tuple[str, Path]]:
    for side in ("source", "target"):
        corpus = getattr(recipe.data, side)
        for key in _FILES if corpus else ():
            for number, name in enumerate(getattr(corpus, key)):
                with suppress(DataError):
                    yield f"{side}.{key}.{number}", resolve_file(name, recipe.data.root, base)
    adapters = {f"source.adapters.{number}": place for number, place in enumerate(recipe.source.adapters)}
    if recipe.target.adapter is not None:
        adapters["target.adapter"] = recipe.target.adapter
    for key, place in adapters.items():
        beside_recipe = base / place
        yield key, (beside_recipe if is_folder(beside_recipe) else expanded(place)) / WEIGHTS_FILE
