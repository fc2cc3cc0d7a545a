import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "docs" / "make_recipe_page.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_recipe_page", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_recipe_keys_is_what_the_docstrings_say(script):
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run python docs/make_recipe_page.py"


def test_a_key_without_a_word_on_its_meaning_fails(script, monkeypatch):
    from grasp_lora.method.merging import MergeSettings

    monkeypatch.setattr(MergeSettings, "__doc__", "How adapters are merged.\n\n    Args:\n        rule: one of them.\n")

    with pytest.raises(ValueError, match="MergeSettings does not say what density, dropout, rank, seed, weights means"):
        script.page()
