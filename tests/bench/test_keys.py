"""What the key of a step says of a user's own code."""

import importlib
import sys
from pathlib import Path

import pytest

from grasp_lora.bench.keys import hash_of_code, plain
from grasp_lora.errors import RecipeError
from grasp_lora.text.names import beside, imported


def test_an_edit_does_not_change_the_key_of_what_was_loaded(tmp_path: Path) -> None:
    file = tmp_path / "own_of_keys.py"
    file.write_text("rule = print")
    importlib.invalidate_caches()
    with beside(tmp_path):
        imported("rule", "own_of_keys:rule", ())
    before = plain({"rule": "own_of_keys:rule"}), hash_of_code({"rule": "own_of_keys:rule"})
    assert len(before[0]["own_code"]["own_of_keys:rule"]) == 64
    file.write_text("rule = repr")
    assert (plain({"rule": "own_of_keys:rule"}), hash_of_code(["own_of_keys:rule"])) == before
    assert hash_of_code({"rule": "exact"}) is None
    del sys.modules["own_of_keys"]


def test_code_whose_file_cannot_be_read_has_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("own_unreadable")
    module.__file__ = str(tmp_path / "archive.zip" / "own_unreadable.py")
    monkeypatch.setitem(sys.modules, "own_unreadable", module)
    with pytest.raises(RecipeError, match="own_unreadable:rule is code whose file cannot be read"):
        plain({"rule": "own_unreadable:rule"})
