"""A run in two processes, as torchrun starts them: the steps of one process, one writer, one voice."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grasp_lora.errors import GraspError
from grasp_lora.training.ranks import first, is_first, shared, together, world_size
from grasp_lora.training.settings import TrainingSettings

TWO_A_STEP = [f"{stage}.training.accumulation=2" for stage in ("source", "target", "controller", "final")]
CHANGES = [*TWO_A_STEP, "controller.probe_every=2"]
READ_DATA, ANSWER = "read and split the data", "answer the test questions"


def launch(*changes: str) -> tuple[int, str]:
    """Run `tiny.yaml` into the folder `run` in two processes; return the exit status and the output of both. A hang ends."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "grasp_lora"]
    settings = [part for change in changes for part in ("--set", change)]
    process = subprocess.Popen(
        [sys.executable, *launcher, "run", "tiny.yaml", "--output", "run", *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the launcher and its two processes: a session of their own
        output, _ = process.communicate()
        pytest.fail(f"the processes hang: {output[-3000:]}")
    return process.returncode, output


def read(file: str) -> Any:
    return json.loads(Path(file).read_text(encoding="utf-8"))


def test_two_processes_take_the_steps_of_one_and_go_on_where_they_were(tiny_workspace: Path) -> None:
    status, output = launch(*CHANGES)
    assert status == 0, output[-3000:]
    assert output.count(READ_DATA) == output.count(ANSWER) == output.count("adapter run/adapter") == 1
    stages = {file.stem: read(str(file))["summary"] for file in Path("run/stages").iterdir()}
    # 12 examples of the source in fours; 10 of the target in twos, with a round after every other step
    assert [stages[name]["steps"] for name in ("source", "target", "controller", "final")] == [3, 5, 5, 5]
    assert stages["controller"]["rounds"] == 2
    metrics = read("run/metrics.json")
    ids = [json.loads(line)["id"] for line in Path("run/evaluation/grasp.jsonl").read_text().splitlines()]
    assert ids == read("run/data.json")["ids"]["test"]
    assert not Path("run/grasp-lora.lock").exists()
    for stage in ("final", "evaluate"):
        Path(f"run/stages/{stage}.json").unlink()
    Path("run/metrics.json").unlink()
    status, output = launch(*CHANGES)
    assert status == 0, output[-3000:]
    assert read("run/metrics.json") == metrics


def test_what_cannot_be_shared_is_said_once(tiny_workspace: Path) -> None:
    status, output = launch()
    assert status != 0
    assert (
        output.count("error: target.training: an optimizer step takes batch_size 1 times accumulation 1 examples") == 1
    )
    assert "2 processes cannot share evenly; make accumulation a multiple of 2, or start fewer processes" in output
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "each"),
    [(1, 8, 8, (1, 1)), (1, 8, 2, (1, 4)), (2, 1, 2, (1, 1)), (4, 3, 6, (2, 1)), (3, 5, 1, (3, 5))],
)
def test_a_step_is_shared_evenly(batch_size: int, accumulation: int, processes: int, each: tuple[int, int]) -> None:
    settings = TrainingSettings(batch_size=batch_size, accumulation=accumulation)
    own = settings.shared_by(processes)
    assert (own.batch_size, own.accumulation) == each
    for examples in (1, 7, 50):
        assert own.steps_per_epoch(-(-examples // processes)) == settings.steps_per_epoch(examples)


@pytest.mark.parametrize(("batch_size", "accumulation", "processes"), [(1, 1, 2), (2, 3, 4), (1, 8, 16)])
def test_a_step_with_too_few_examples_is_refused(batch_size: int, accumulation: int, processes: int) -> None:
    with pytest.raises(ValueError, match=f"{processes} processes cannot share evenly"):
        TrainingSettings(batch_size=batch_size, accumulation=accumulation).shared_by(processes)


def test_commands_of_one_process_say_so(
    tiny_workspace: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for command in ("compare", "record", "sweep", "check", "learn"):
        result = cli(command, "tiny.yaml")
        assert (result.status, result.err) == (2, f"error: {command} runs in one process; start it without torchrun\n")


def test_one_process_does_everything_itself() -> None:
    assert (world_size(), is_first()) == (1, True)
    assert first(lambda: 3) == 3
    assert shared([1, 2, 3], lambda items: [2 * item for item in items]) == [2, 4, 6]
    with pytest.raises(GraspError, match="mine"):
        together(lambda: (_ for _ in ()).throw(GraspError("mine")))
