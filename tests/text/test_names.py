"""An import path in a recipe leads to an object."""

import importlib
import json
from pathlib import Path

import pytest

from grasp_lora.text.names import beside, find, imported


def test_a_file_beside_the_recipe_is_found_after_what_is_installed(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("loads = None")
    (tmp_path / "beside_recipe.py").write_text("rule = print")
    importlib.invalidate_caches()
    with beside(tmp_path):
        assert imported("rule", "json:loads", ()) is json.loads
        assert find("rule", "beside_recipe:rule", object, {}) is print
    assert find("rule", "exact", str, {"exact": "row"}) == "row"


def test_two_files_of_one_name_are_not_taken_for_each_other(tmp_path: Path) -> None:
    for recipe in ("first", "second"):
        (tmp_path / recipe).mkdir()
        (tmp_path / recipe / "own_of_recipe.py").write_text(f"rule = {recipe!r}")
    with beside(tmp_path / "first"):
        assert [imported("rule", "own_of_recipe:rule", ()) for _ in range(2)] == ["first", "first"]
    with beside(tmp_path / "second"), pytest.raises(ValueError, match=r"has imported .*first.*; rename one"):
        imported("rule", "own_of_recipe:rule", ())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exct", "rule is 'exct'; allowed: exact, or the import path package.module:name of your own"),
        ("json:loads", "is a function; it must be a str"),
    ],
)
def test_what_cannot_be_found_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        find("rule", name, str, {"exact": "row"})
    assert "\n" not in str(caught.value)
