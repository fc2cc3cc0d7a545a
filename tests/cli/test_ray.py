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

COMPARE = ("compare", "tiny.yaml", "--methods", "target_only,continued,grasp", "--seeds", "1,2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--on", "spark"), "--on is 'spark'; allowed: ray"),
        (("--workers", "2"), "--workers is 2, but --on is not given"),
        (("--address", "10.0.0.1:6379"), "--address is given without --on ray"),
        (("--gpus-per-worker", "1"), "--gpus-per-worker is given without --on ray"),
        (("--on", "ray", "--workers", "0"), "--workers"),
    ],
)
def test_what_does_not_go_together_is_refused(refused, arguments, message):
    refused("compare", arguments, message)


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "grasp_lora", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def table(folder: Path) -> dict[str, Any]:
    """What the comparison came to, but for its seconds."""

    def untimed(found: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in found.items() if "seconds" not in key and key not in ("pace", "made_with")}

    content: dict[str, Any] = json.loads((folder / "compare" / "compare.json").read_bytes(), object_hook=untimed)
    return content


def process_that_locks(file: Path) -> int | None:
    """The process that holds a lock on a file, by the kernel's own list."""
    for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if "->" not in fields and file.exists() and int(fields[5].rpartition(":")[2]) == file.stat().st_ino:
            return int(fields[4])
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the holder of a claim is found in /proc/locks")
def test_workers_leave_the_tables_of_one_process_also_when_one_is_killed(tiny_workspace):
    pytest.importorskip("ray")
    alone = start(*COMPARE, "--output", "alone")
    assert alone.communicate()[1] == ""
    shared = start(*COMPARE, "--output", "shared", "--on", "ray", "--workers", "2")
    claims = Path("shared/store/work")
    while not (holders := [holder for lock in claims.glob(".*.lock") if (holder := process_that_locks(lock))]):
        assert shared.poll() is None, shared.communicate()
        time.sleep(0.05)
    os.kill(holders[0], signal.SIGKILL)
    output, error = shared.communicate()
    assert (shared.returncode, error) == (0, "")
    assert "GRASP" in output
    assert table(Path("shared")) == table(Path("alone"))
    records = [{file.name for file in Path(folder, "store", "records").iterdir()} for folder in ("alone", "shared")]
    assert records[0] == records[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--address", "127.0.0.1:9"), "the Ray cluster at '127.0.0.1:9' cannot be reached"),
        (("--workers", "10000"), "--workers is 10000, but the Ray cluster has room for"),
        (("--gpus-per-worker", "1000"), "room for 0"),
        (("--set", "final.training.epochs=-1"), "epochs is -1"),
    ],
)
def test_a_cluster_that_is_not_there_or_has_no_room_is_one_line(tiny_workspace, arguments, message):
    pytest.importorskip("ray")
    _, error = (process := start(*COMPARE, "--on", "ray", *arguments)).communicate()
    assert process.returncode == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not Path("runs").exists()
