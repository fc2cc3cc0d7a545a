"""What stands behind an import path: the code as it was loaded, and the file that a new process would take."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from grasp_lora.text.names import beside, check_loaded, hash_of_module, imported

MODULE = "own_of_names"


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Give `load(code, "a")`: write the module in a folder, and import it from there if it is not loaded."""

    def written(code: str, folder: str = "a", name: str = MODULE) -> Path:
        file = tmp_path / folder / f"{name.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
        importlib.invalidate_caches()
        with beside(tmp_path / folder):
            assert callable(imported("rule", f"{name}:rule", ()))
            check_loaded("rule", f"{name}:rule")
        return file

    yield written
    for name in [name for name in sys.modules if name.partition(".")[0] == MODULE]:
        del sys.modules[name]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_hash_is_that_of_the_code_that_was_loaded(load: Callable[..., Path]) -> None:
    file = load("rule = print")
    assert hash_of_module(MODULE) == sha256("rule = print")
    file.write_text("rule = repr")
    assert hash_of_module(MODULE) == sha256("rule = print")
    with pytest.raises(ValueError, match=r"own_of_names\.py was changed .* start a new process") as caught:
        check_loaded("rule", f"{MODULE}:rule")
    assert "\n" not in str(caught.value)
    file.write_text("rule = print")
    check_loaded("rule", f"{MODULE}:rule")
    file.unlink()
    with pytest.raises(ValueError, match="changed or removed"):
        check_loaded("rule", f"{MODULE}:rule")


def test_a_module_that_is_loaded_anew_has_the_hash_of_its_new_code(load: Callable[..., Path]) -> None:
    file = load("rule = print")
    file.write_text("rule = repr  # of another length, or the compiled file of the same second would count")
    with beside(file.parent):
        importlib.reload(sys.modules[MODULE])
    assert hash_of_module(MODULE) == sha256(file.read_text())
    check_loaded("rule", f"{MODULE}:rule")
    del sys.modules[MODULE]
    load("rule = str")
    assert hash_of_module(MODULE) == sha256("rule = str")


@pytest.mark.parametrize("name", [MODULE, f"{MODULE}.rules"])
def test_a_module_of_another_folder_is_refused_with_both_files(load: Callable[..., Path], name: str) -> None:
    first = load("rule = print", "a", name)
    load("rule = print", "a", name)
    with pytest.raises(ValueError, match=r"which is to come from .* but this process has loaded") as caught:
        load("rule = repr", "b", name)
    assert "\n" not in str(caught.value)
    assert str(first) in str(caught.value)
    assert str(first).replace("/a/", "/b/") in str(caught.value)


def test_what_is_installed_comes_before_a_file_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("loads = None")
    with beside(tmp_path):
        imported("rule", "json:loads", ())
        check_loaded("rule", "json:loads")


def test_modules_without_a_file_have_no_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hash_of_module("sys") is None
    assert hash_of_module("nowhere_to_be_found") is None
    check_loaded("rule", "sys:exit")
