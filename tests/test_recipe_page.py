import importlib.util
from pathlib import Path

import pytest

from grasp_lora.recipes.recipe import recipe_keys

SCRIPT = Path(__file__).parent.parent / "docs" / "make_recipe_page.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_recipe_page", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_recipe_keys_is_what_the_docstrings_say(script):
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run python docs/make_recipe_page.py"


def test_a_recipe_has_at_most_eighty_keys():
    keys = recipe_keys()
    leaves = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    assert len(leaves) <= 80, leaves
    assert len(keys) == len(set(keys))
