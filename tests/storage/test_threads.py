"""How many threads compute: as many as there are idle cores, or as the experiment began with."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from grasp_lora.storage import threads
from grasp_lora.storage.threads import SPINS, SPINS_OF_AMD, idle_cores, use_idle_cores, waiting_turns


@pytest.fixture(autouse=True)
def no_setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No environment says how many, and the number of this process comes back."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def with_load(monkeypatch: pytest.MonkeyPatch, busy: list[float], allowed: set[int]) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: busy)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed, raising=False)


@pytest.mark.parametrize(
    ("busy", "allowed", "idle"),
    [
        ([0.0, 5.0], {0, 1}, 2),
        ([100.0, 5.0], {0, 1}, 1),
        ([100.0, 90.0], {0, 1}, 1),
        ([0.0, 0.0, 100.0, 0.0], {1, 2, 3}, 2),
        ([0.0], {0, 9}, 1),
    ],
)
def test_only_cores_that_this_process_may_use_count(
    busy: list[float], allowed: set[int], idle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_load(monkeypatch, busy, allowed)
    assert idle_cores() == idle


def test_there_are_as_many_threads_as_idle_cores_and_no_more_than_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    with_load(monkeypatch, [0.0] * 8, set(range(8)))
    torch.set_num_threads(3)
    use_idle_cores("auto")
    assert torch.get_num_threads() == 3
    with_load(monkeypatch, [0.0, 0.0, *[100.0] * 6], set(range(8)))
    use_idle_cores("auto")
    assert torch.get_num_threads() == 2


def test_what_goes_on_has_the_threads_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    with_load(monkeypatch, [100.0], {0})
    use_idle_cores("cpu", 2)
    assert torch.get_num_threads() == 2


def test_a_number_that_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with_load(monkeypatch, [0.0, 0.0], {0, 1})
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    use_idle_cores("auto", 2)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("vendor", "turns"), [("AuthenticAMD", SPINS_OF_AMD), ("GenuineIntel", SPINS)])
def test_a_wait_is_as_long_on_both_vendors(
    vendor: str, turns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"vendor_id\t: {vendor}\n", encoding="utf-8")
    monkeypatch.setattr(threads, "Path", lambda name: file)
    assert waiting_turns() == turns
