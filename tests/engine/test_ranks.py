"""A run in two processes, as torchrun starts them: data parallel, one writer."""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import run_ranks
from recorder import forget, read, result_of, rows_of, step_folders

from grasp_lora.storage.checkpoints import complete
from grasp_lora.storage.processes import STARTED, distribute, is_first, on_first_process, world_size
from grasp_lora.training.settings import TrainingSettings

TWO_A_STEP = [f"{stage}.training.accumulation=2" for stage in ("source", "target", "controller", "final")]
CHANGES = [*TWO_A_STEP, "controller.rounds.every=2"]
READ_DATA, ANSWER = "read and split the data", "answer the test questions"


def launch(*changes: str, during: Callable[[subprocess.Popen[str]], None] | None = None) -> tuple[int, str]:
    """Run `tiny.yaml` into the folder `run` in two processes; return the exit status and the output of both. A hang ends."""
    return run_ranks(2, command(*changes), during=during)


def launch_forked(*changes: str) -> tuple[int, str]:
    """The same without torchrun itself and the imports."""
    done = forked.python(command(*changes), count=2)
    return done.returncode, done.stdout + done.stderr


def command(*changes: str) -> list[str]:
    settings = [part for change in changes for part in ("--set", change)]
    return ["-m", "grasp_lora", "run", "tiny.yaml", "--output", "run", *settings]


def test_two_processes_take_as_many_steps_as_one_and_go_on_where_they_were(tiny_workspace: Path) -> None:
    status, output = launch(*CHANGES)
    assert status == 0, output[-3000:]
    assert output.count(READ_DATA) == output.count(ANSWER) == output.count("adapter run/adapter") == 1
    results = [result_of("run", name) for name in ("source", "target", "controller", "final-*")]
    # 12 examples of the source in fours; 10 of the target in twos, with a round after every other step
    assert [result["steps"] for result in results] == [3, 5, 5, 5]
    assert len(results[2]["rounds"]) == 2
    metrics = read("run/metrics.json")
    assert [row["id"] for row in rows_of("run/evaluation/grasp.jsonl")] == read("run/data.json")["ids"]["test"]
    assert not Path("run/grasp-lora.lock").exists()
    forget("run", "final-*", "test-losses", "answers", "scores")
    status, output = launch_forked(*CHANGES)
    assert status == 0, output[-3000:]
    assert read("run/metrics.json") == metrics


@pytest.mark.slow
def test_two_processes_that_a_signal_stopped_end_in_the_same_bits(tiny_workspace: Path) -> None:
    changes = [*CHANGES, "target.training.epochs=60", "target.training.patience=null"]

    def stop(process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 600
        while (
            not list(Path("run/store").glob("target-*/work/checkpoint-*/manifest.json")) and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)

    status, output = launch(*changes, during=stop)
    assert status != 0
    assert len(re.findall(r"stopped by SIGTERM at .*target.* step", output)) == 1, output[-3000:]
    assert list(Path("run/store").glob("target-*/work/checkpoint-*/manifest.json"))
    status, output = launch(*changes)
    assert status == 0, output[-3000:]
    resumed, metrics = Path("run/target/adapter_model.safetensors").read_bytes(), read("run/metrics.json")
    shutil.rmtree("run")
    assert launch(*changes)[0] == 0
    assert Path("run/target/adapter_model.safetensors").read_bytes() == resumed
    assert read("run/metrics.json") == metrics


def test_another_number_of_processes_goes_on_with_the_next_stage(tiny_workspace: Path, cli: Callable[..., Any]) -> None:
    """Two processes are interrupted inside the target's training; one process begins that anew and keeps the source's."""
    changes = [*CHANGES, "target.training.epochs=4", "target.training.patience=null"]
    settings = [part for change in changes for part in ("--set", change)]
    assert cli("run", "tiny.yaml", "--output", "alone", *settings).status == 0
    status, output = launch_forked(*changes)
    assert status == 0, output[-3000:]
    [target] = step_folders("run", "target")
    assert [target.name] == [step.name for step in step_folders("alone", "target")]
    assert read(target / "done.json")["made_with"]["processes"] == "2"
    # As after a kill: the source's step is done, of the target's training there is a checkpoint of two processes.
    for step in Path("run/store").iterdir():
        if not step.name.startswith("source-"):
            shutil.rmtree(step)
    checkpoint = target / "work/checkpoint-2"
    checkpoint.mkdir(parents=True)
    for rank in (0, 1):
        (checkpoint / f"rng_state_{rank}.pth").touch()
    complete(checkpoint, 1.0)
    result = cli("run", "tiny.yaml", "--output", "run", *settings)
    assert result.status == 0, result.err
    assert "was saved by another number of processes; the training begins anew" in result.err
    made_with = [read(step_folders("run", name)[0] / "done.json")["made_with"] for name in ("source", "target")]
    assert [processes["processes"] for processes in made_with] == ["2", "1"]
    for file in ("target/adapter_model.safetensors", "target/history.jsonl"):
        assert Path("run", file).read_bytes() == Path("alone", file).read_bytes()


def test_what_cannot_be_shared_is_refused(tiny_workspace: Path) -> None:
    status, output = launch_forked()
    assert status != 0
    assert "error: target.training: an optimizer step takes batch_size 1 times accumulation 1 examples" in output
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
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for command in ("compare", "check", "learn"):
        result = cli(command, "tiny.yaml")
        assert (result.status, result.err) == (2, f"error: {command} runs in one process; start it without torchrun\n")


@pytest.mark.parametrize(
    "told",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "4"},
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "0", "LOCAL_RANK": "", "WORLD_SIZE": ""},
    ],
)
def test_what_torchrun_alone_tells_counts(told: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert (world_size(), is_first()) == (1, True)
    assert on_first_process(lambda: 3) == 3


def test_one_process_does_everything_itself() -> None:
    assert (world_size(), is_first()) == (1, True)
    assert on_first_process(lambda: 3) == 3
    assert distribute([1, 2, 3], lambda items: [2 * item for item in items]) == [2, 4, 6]


def test_each_does_its_part_and_all_get_the_whole(tmp_path: Path) -> None:
    script = tmp_path / "part.py"
    script.write_text(
        """
import os
from grasp_lora.storage.processes import distribute, join, leave, on_first_process

join("cpu")
rank, parts = os.environ["RANK"], []
for items in ([1, 2, 3], [4], []):
    parts.append(distribute(items, lambda mine: [(rank, item) for item in mine]))
print(f"<{rank} {parts} {on_first_process(lambda: rank)}>", flush=True)
leave()
""",
        encoding="utf-8",
    )
    done = forked.python([str(script)], cwd=tmp_path, count=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in "01":
        assert f"<{rank} [[('0', 1), ('0', 2), ('1', 3)], [('0', 4)], []] 0>" in done.stdout
