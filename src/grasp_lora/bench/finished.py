"""Whether a run has done all, so that it is only read: nothing is missing, and what it was made from is as it was."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from grasp_lora.bench import run_folder as files
from grasp_lora.bench.records import read_record
from grasp_lora.data.places import resolve_file
from grasp_lora.errors import DataError, RecipeError
from grasp_lora.models.reading import CONFIG_FILE, OUR_FILE, WEIGHTS_FILE
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.text import RECIPE_FILE
from grasp_lora.storage.reading import expanded, is_file, is_folder, is_there, sha256_of

CHAT_TEMPLATE = "data.chat_template"
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
    adapter = [f"{files.ADAPTER_FOLDER}/{name}" for name in (WEIGHTS_FILE, CONFIG_FILE)]
    needed = (files.METRICS_FILE, files.DATA_FILE, files.COST_FILE, RECIPE_FILE, *adapter)
    whole = all(is_file(folder / name) for name in needed)
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
    """Return a SHA-256 of everything that a run reads, by the key of the recipe that names it, such as `target.files.0`.

    That is every data file and given adapter. Of a backbone's folder names, sizes and times count,
    since its files are large: where they differ, the run looks at the weights.
    What the recipe says of the chat template stands there as a text.
    Left out is what the hub holds, and what is not there or cannot be read any more: a finished run needs none of it.

    Args:
        recipe: of the run.
        base: folder that its relative paths start from.
    """
    found = {}
    for key, file in places_of(recipe, base):
        with suppress(OSError):
            found[key] = sha256_of(file)
    backbone = _beside(recipe.backbone.name, base)
    with suppress(OSError):
        listing = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(backbone.iterdir())]
        found["backbone"] = hashlib.sha256(repr(listing).encode()).hexdigest()
    # The hash of a recipe takes "where the rows ask for it" and "never" for one; the examples tell them apart.
    found[CHAT_TEMPLATE] = str(recipe.data.chat_template)
    return found


def refuse_other_template(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on with other prompts where the chat template is why they are others.

    Args:
        folder: of the run.
        before, now: what `inputs_of` gave when it began, and gives now.

    Raises:
        RecipeError: the recipe says something else of the chat template.
    """
    if (then := before.get(CHAT_TEMPLATE, now[CHAT_TEMPLATE])) != now[CHAT_TEMPLATE]:
        raise RecipeError(
            f"{folder} was begun with {CHAT_TEMPLATE} {then}, and now it is {now[CHAT_TEMPLATE]}, which makes other prompts; "
            "set it back, or choose another folder with --output"
        )


def places_of(recipe: Recipe, base: Path) -> Iterator[tuple[str, Path]]:
    """Give the key and the place of every data file that is found, and of every file of a given adapter."""
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
        folder = _beside(place, base)
        yield key, folder / WEIGHTS_FILE
        yield f"{key}.config", folder / CONFIG_FILE
        yield f"{key}.facts", folder / OUR_FILE


def _beside(place: str, base: Path) -> Path:
    """The folder that a recipe names, which may be relative to its own."""
    beside_recipe = base / place
    return beside_recipe if is_folder(beside_recipe) else expanded(place)
