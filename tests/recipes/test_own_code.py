"""Recipes that name code of the user's own, one after the other in one process."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grasp_lora.errors import RecipeError
from grasp_lora.recipes.load import load_recipe

NAMES = ("own_twice", "own_edited")
CODE = "from grasp_lora.method.merging import MERGE_RULES\nrule = MERGE_RULES['exact']\n"


@pytest.fixture(autouse=True)
def as_new() -> Iterator[None]:
    """Leave nothing of these modules in the process."""
    yield
    for name in NAMES:
        sys.modules.pop(name, None)


def test_two_folders_with_files_of_one_name_are_told_apart(tiny_workspace: Path) -> None:
    for name in ("a", "b"):
        Path(name).mkdir()
        shutil.copy("tiny.yaml", name)
        Path(name, "own_twice.py").write_text(CODE)
    importlib.invalidate_caches()
    for _ in range(2):
        load_recipe("a/tiny.yaml", ["merge.rule=own_twice:rule"], allow_code=True)
    with pytest.raises(
        RecipeError, match=r"merge\.rule is 'own_twice:rule'.*/b/own_twice\.py.*/a/own_twice\.py"
    ) as caught:
        load_recipe("b/tiny.yaml", ["merge.rule=own_twice:rule"], allow_code=True)
    assert "\n" not in str(caught.value)


def test_code_that_was_edited_since_it_was_loaded_is_refused(tiny_workspace: Path) -> None:
    file = Path("own_edited.py")
    file.write_text(CODE)
    importlib.invalidate_caches()
    load_recipe("tiny.yaml", ["merge.rule=own_edited:rule"], allow_code=True)
    file.write_text(CODE + "# edited")
    with pytest.raises(RecipeError, match=r"own_edited\.py was changed .* start a new process"):
        load_recipe("tiny.yaml", ["merge.rule=own_edited:rule"], allow_code=True)
