"""The temporary folder of `evaluate`: where it cannot be written, one line says so."""

import errno
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grasp_lora.engine import store as store_module


def test_a_machine_without_a_temporary_folder(
    finished_run: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    result = cli("evaluate", "tiny.yaml", "--adapter", "run/adapter")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "a temporary folder cannot be made (No usable temporary directory found" in result.err
    assert "set TMPDIR" in result.err


@pytest.mark.parametrize("output", [(), ("--output", "out")])
@pytest.mark.parametrize("failing", ["write_json", "mkdir"])
def test_a_temporary_folder_that_is_full(
    finished_run: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, failing: str, output: tuple[str, ...]
) -> None:
    full, made = OSError(errno.ENOSPC, "No space left on device"), Path.mkdir

    def mkdir(self: Path, *arguments: Any, **options: Any) -> None:
        if failing == "mkdir" and self.name == "work" and self != finished_run.parent:
            raise full
        made(self, *arguments, **options)

    def write_json(*_: Any) -> None:
        raise full

    monkeypatch.setattr(Path, "mkdir", mkdir)
    if failing == "write_json":
        monkeypatch.setattr(store_module, failing, write_json)
    result = cli("evaluate", "tiny.yaml", "--adapter", "run/adapter", *output)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "the temporary folder" in result.err
    assert "cannot be written (No space left on device); make room, or set TMPDIR" in result.err
    assert not Path("out").exists()


def test_test_rows_that_the_adapter_was_trained_on_are_counted(finished_run: Path, cli: Callable[..., Any]) -> None:
    fine = cli("evaluate", "tiny.yaml", "--adapter", "run/adapter")
    assert fine.status == 0
    assert "trained or chosen on" not in fine.err
    drawn_anew = cli("evaluate", "tiny.yaml", "--adapter", "run/adapter", "--set", "seed=7")
    assert drawn_anew.status == 0, drawn_anew.err
    assert " test rows have ids of rows that adapter 'adapter' was trained or chosen on" in drawn_anew.err
    assert "data.target.test_files" in drawn_anew.err


def test_a_recipe_that_asks_otherwise_than_the_training_is_named(finished_run: Path, cli: Callable[..., Any]) -> None:
    result = cli("evaluate", "tiny.yaml", "--adapter", "run/adapter", "--set", 'data.prompt={de: "Say {prompt}:"}')
    assert result.status == 0, result.err
    assert "was trained on prompts of the form '{prompt}', and the recipe asks otherwise" in result.err
