"""The folder of a comparison or a sweep."""

from pathlib import Path

from grasp_lora.errors import RecipeError
from grasp_lora.recipes.recipe import RECIPE_FILE
from grasp_lora.report.run_folder import RUN_FILE


def check_experiment_folder(folder: Path, recipe: str | None = None) -> None:
    """Check, before anything is loaded, that an experiment may write into a folder.

    Args:
        folder: may be missing.
        recipe: content of the recipe.yaml that the experiment is going to write.

    Raises:
        RecipeError: it is a file, the folder of a run, or holds a recipe.yaml that no experiment has written.
    """
    try:
        if folder.is_file():
            raise RecipeError(f"{folder} is a file; give a folder with --output")
        if (folder / RUN_FILE).is_file():
            raise RecipeError(
                f"{folder} is the folder of a run, whose recipe would be overwritten; choose another with --output"
            )
        file, begun = folder / RECIPE_FILE, any((folder / name).is_dir() for name in ("records", "adapters"))
        if recipe is not None and not begun and file.is_file() and file.read_bytes() != recipe.encode():
            raise RecipeError(f"{folder} holds a {RECIPE_FILE} that would be overwritten; choose another with --output")
    except OSError as error:
        raise RecipeError(f"{folder} cannot be read ({error.strerror}); choose another with --output") from error
