"""How much memory is free, also in a container that has a limit of its own."""

from pathlib import Path

import pytest

from grasp_lora.storage import memory


def test_a_limit_of_the_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    for name, content in (("memory.current", "4000\n"), ("memory.stat", "anon 1000\nfile 3000\n")):
        (tmp_path / name).write_text(content)
    for limit, free in (("5000\n", 4000), ("500\n", 0), ("max\n", None)):
        (tmp_path / "memory.max").write_text(limit)
        available = memory.available_memory(False)
        assert available == free if free is not None else available > 10**6


def test_the_peak_of_this_process_is_some_megabytes() -> None:
    assert 10**7 < (memory.peak_memory() or 0) < 10**12
