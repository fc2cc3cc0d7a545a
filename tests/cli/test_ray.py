"""Workers of a Ray cluster on this machine at one comparison: the tables of a single process, also when one is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from grasp_lora.cli.on_ray import _room, _work
from grasp_lora.errors import RecipeError

COMPARE = ("compare", "tiny.yaml", "--methods", "target_only,continued,grasp", "--seeds", "1,2")


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "grasp_lora", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def table(folder: Path) -> dict[str, Any]:
    """What the comparison came to, but for its seconds."""

    def untimed(content: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in content.items() if "seconds" not in key and key != "made_with"}

    content: dict[str, Any] = json.loads((folder / "compare" / "compare.json").read_bytes(), object_hook=untimed)
    return content


def test_a_worker_that_does_not_see_the_folder_says_so_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"elsewhere on \S+, which has to see .*: No such file or directory"):
        _work(0, None, tmp_path / "elsewhere", {})


@pytest.mark.parametrize(("gpus", "each", "workers"), [(1.0, 0.2, 5), (0.6, 0.2, 3), (3.0, 1.0, 3)])
def test_shares_of_a_gpu_are_counted_as_ray_does(gpus: float, each: float, workers: int) -> None:
    nodes = [{"CPU": 2.0 * workers, "GPU": gpus}]
    assert _room(nodes, workers, each) == 2
    with pytest.raises(RecipeError, match=f"--workers is {workers + 1}, but the Ray cluster has room for {workers}:"):
        _room(nodes, workers + 1, each)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the holder of a claim is found in /proc/locks")
def test_workers_leave_the_tables_of_one_process_also_when_one_is_killed(tiny_workspace: Path) -> None:
    pytest.importorskip("ray")

    def working() -> int | None:
        """A process that claims a step, by the kernel's own list."""
        claims = {file.stat().st_ino for file in Path("shared/store").glob(".*.lock") if file.exists()}
        lines = (line.split() for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines())
        held = {int(fields[5].rpartition(":")[2]): int(fields[4]) for fields in lines if "->" not in fields}
        return next((process for file, process in held.items() if file in claims), None)

    alone = start(*COMPARE, "--output", "alone")
    assert alone.communicate()[1] == ""
    shared = start(*COMPARE, "--output", "shared", "--on", "ray", "--workers", "2")
    while (worker := working()) is None:
        assert shared.poll() is None, shared.communicate()
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    output, error = shared.communicate()
    assert (shared.returncode, error) == (0, "")
    assert "GRASP" in output
    assert table(Path("shared")) == table(Path("alone"))
    steps = [{step.parent.name for step in Path(folder, "store").glob("*/done.json")} for folder in ("alone", "shared")]
    assert steps[0] == steps[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--address", "127.0.0.1:9", "the Ray cluster at 127.0.0.1:9: "),
        ("--workers", "10000", "--workers is 10000, but the Ray cluster has room for"),
        ("--set", "final.training.epochs=-1", "epochs"),
    ],
)
def test_what_a_cluster_cannot_do_is_one_line(tiny_workspace: Path, option: str, value: str, message: str) -> None:
    pytest.importorskip("ray")
    process = start(*COMPARE, "--on", "ray", option, value)
    _, error = process.communicate()
    assert (process.returncode, error.count("\n")) == (2, 1), error
    assert error.startswith("error: ")
    assert message in error
    assert not Path("runs").exists()
