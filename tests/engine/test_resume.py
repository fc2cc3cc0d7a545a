"""A whole run, in processes of its own, that is killed, stopped or robbed of its disk, and goes on to the same bits."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tiny_workspace
from killed_runs import SAVE_EVERY, Attempt

COMMAND = ("run", "tiny.yaml", "--output")
READ_ONLY = "mount --bind {0} {0} && mount -o remount,bind,ro {0}"  # over what is there, until it is unmounted
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]  # a user's own mounts, where the system allows that


def may_mount() -> bool:
    return (
        shutil.which("unshare") is not None and not subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode
    )


class Runs:
    """Attempts in one workspace, each forked from the same prepared process."""

    def __init__(self, workspace: Path, server: subprocess.Popen[str], mounts: bool) -> None:
        self.workspace, self.mounts = workspace, mounts
        self._server = server
        self._ways: dict[tuple[str, ...], Attempt] = {}

    def __call__(self, folder: str | Path, *changes: str, **moments: str) -> Attempt:
        """Run in a folder; `at_12="kill"` kills it at event 12."""
        sets = [text for change in changes for text in ("--set", change)]
        place = self.workspace / folder
        actions = {name.removeprefix("at_"): action for name, action in moments.items()}
        [attempt] = self.ask([*COMMAND, str(folder), *sets], place, [actions])
        return attempt

    def ask(self, arguments: Sequence[str], folder: Path, moments: Sequence[dict[Any, str]]) -> list[Attempt]:
        """Start as many processes at the same time as there are moments."""
        asked = {"workspace": str(self.workspace), "folder": str(folder), "arguments": arguments, "moments": moments}
        return [Attempt(**one) for one in self._ask(**asked)["attempts"]]

    def shell(self, command: str) -> None:
        """Run a command where the attempts run, which sees their mounts."""
        assert self._ask(shell=command)["status"] == 0

    def uninterrupted(self, *changes: str) -> Attempt:
        """The attempt that nothing happens to."""
        if changes not in self._ways:
            self._ways[changes] = self(f"reference-{len(self._ways)}", *changes)
            assert self._ways[changes].status == 0, self._ways[changes].error
        return self._ways[changes]

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path) -> Iterator[Runs]:
    workspace = write_tiny_workspace(tmp_path_factory.mktemp("killed") / "work", tiny_backbone_folder).parent
    mounts = may_mount()
    environment = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    server = subprocess.Popen(
        [*(NAMESPACE if mounts else []), sys.executable, str(Path(__file__).with_name("killed_runs.py"))],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield Runs(workspace, server, mounts)
    server.communicate(timeout=600)
    assert server.returncode == 0


def moment(attempt: Attempt, event: str, which: int = 0) -> str:
    """The keyword for an event of an attempt by its name."""
    found = [number for number, name in enumerate(attempt.events, start=1) if name == event]
    assert found, f"there is no {event!r} in {attempt.events}"
    return f"at_{found[which]}"


def assert_resumed(runs: Runs, first: Attempt, folder: str, *changes: str) -> None:
    """Go on after a first attempt, and find what an uninterrupted run finds without doing everything again."""
    whole = runs.uninterrupted(*changes)
    rest = runs(folder, *changes)
    assert (rest.status, rest.error) == (0, "")
    assert rest.files == whole.files
    assert first.steps + rest.steps <= whole.steps + SAVE_EVERY


# Kills


def kill(runs: Runs, number: int, folder: str, *changes: str) -> None:
    first = runs(folder, *changes, **{f"at_{number}": "kill"})
    assert first.status == -9
    assert len(first.events) == number
    assert_resumed(runs, first, folder, *changes)


@pytest.mark.parametrize(
    "steps", [("source",), ("target",), ("controller",), ("final",), ("begin", "between", "answers", "scores")]
)
def test_a_kill_at_a_random_moment_loses_nothing(runs: Runs, steps: tuple[str, ...]) -> None:
    events = runs.uninterrupted().events
    numbers = [number for number, event in enumerate(events, start=1) if event.split()[0] in steps]
    kill(runs, random.Random(f"kill in {steps}").choice(numbers), f"killed-{steps[0]}")


HARDER = (
    "source.training.epochs=1.5", "target.training.accumulation=2", "target.training.epochs=3", "controller.rounds.every=2",
    "target.training.patience=3", "mask.score=input_aware", "target.on=source", "final.mode=reselect",
    "final.training.epochs=2", "final.deliver=best",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_kill_at_any_moment_loses_nothing(runs: Runs, seed: int) -> None:
    changes = HARDER if seed % 2 else ()
    events = runs.uninterrupted(*changes).events
    kill(runs, random.Random(f"kill {seed}").randint(1, len(events)), f"killed-{seed}", *changes)


# Between two writes: each of these is, or once was, a way to lose something.
@pytest.mark.parametrize(
    ("event", "which"),
    [
        ("begin os.rename run.json.part", 0),
        ("begin open recipe.yaml.part", 0),
        ("controller after commit", 1),
        ("controller os.rename store/controller-KEY/work/checkpoint-6/manifest.json.part", 0),
        ("controller os.rmdir store/controller-KEY/work/checkpoint-3", 0),
        ("final os.rename store/final-KEY/result.json.part", 0),
        ("final os.rmdir store/final-KEY/work", 0),
        ("final os.rename store/final-KEY/done.json.part", 0),
        ("between os.rename adapter.part/adapter_model.safetensors", 0),
        ("between os.rename metrics.json.part", 0),
    ],
)
@pytest.mark.slow
def test_a_kill_between_two_writes_loses_nothing(runs: Runs, event: str, which: int) -> None:
    name = moment(runs.uninterrupted(), event, which)
    kill(runs, int(name.removeprefix("at_")), f"between-{name}")


# Signals


def test_a_signal_finishes_the_step_and_saves(runs: Runs) -> None:
    name, step = "controller", 5
    folder = f"stopped-{name}"
    first = runs(folder, **{moment(runs.uninterrupted(), f"{name} before step", step - 1): "SIGTERM"})
    assert first.status == 75
    assert re.fullmatch(
        rf"stopped by SIGTERM at .*{name}.* step {step}; run the same command again to go on\n", first.error
    )
    assert [file for file in first.files if re.fullmatch(rf"store/{name}-.*/checkpoint-{step}/manifest.json", file)]
    assert "grasp-lora.lock" not in first.files
    whole = runs.uninterrupted()
    rest = runs(folder)
    assert (rest.status, rest.error, rest.files) == (0, "", whole.files)
    assert first.steps + rest.steps == whole.steps  # no step was done twice


def test_a_signal_in_the_last_step_of_a_training_completes_it(runs: Runs) -> None:
    first = runs("last", **{moment(runs.uninterrupted(), "target before step", -1): "SIGTERM"})
    assert (first.status, first.error) == (
        75, "stopped by SIGTERM at the step target; run the same command again to go on\n",
    )  # fmt: skip
    assert [file for file in first.files if re.fullmatch(r"store/target-.*/done.json", file)]
    assert_resumed(runs, first, "last")


def test_a_signal_elsewhere_stops_at_once(runs: Runs) -> None:
    event = "between os.rename evaluation/merged.jsonl.part"
    first = runs("elsewhere", **{moment(runs.uninterrupted(), event): "SIGTERM"})
    assert first.status == 75
    assert re.fullmatch(r"stopped by SIGTERM at the step .*; run the same command again to go on\n", first.error)
    assert "metrics.json" not in first.files
    assert_resumed(runs, first, "elsewhere")


def test_a_second_signal_ends_at_once(runs: Runs) -> None:
    events = runs.uninterrupted()
    first = runs("twice", **{
        moment(events, "final before step", 3): "SIGTERM", moment(events, "final after step", 3): "SIGINT",
    })  # fmt: skip
    assert first.status == -2
    assert first.events[-1] == "final after step"
    assert_resumed(runs, first, "twice")


# Disks


@pytest.fixture
def disk(runs: Runs, tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    if not runs.mounts:
        pytest.skip("mounting is not allowed here")
    place = tmp_path / "disk"
    place.mkdir()
    runs.shell(f"mount -t tmpfs -o size=16m tmpfs {place}")
    yield place
    runs.shell(f"umount {place}")


def test_a_full_disk_is_one_line_and_loses_nothing(runs: Runs, disk: Path) -> None:
    full = f"sh head -c 32000000 /dev/zero > {disk}/filler 2> /dev/null || true"
    event = "controller os.mkdir store/controller-KEY/work/checkpoint-6"
    first = runs(disk / "run", **{moment(runs.uninterrupted(), event): full})
    assert first.status == 2
    assert first.error.startswith(f"error: {disk}/run/store/")
    assert first.error.endswith(
        "make room or make it writable, then run the same command again: it goes on from what is there\n"
    )
    assert first.error.count("\n") == 1
    assert [name for name in first.files if re.fullmatch("store/controller-.*/checkpoint-3/manifest.json", name)]
    runs.shell(f"rm {disk}/filler")
    assert_resumed(runs, first, disk / "run")


def test_a_disk_that_turns_read_only_is_one_line_and_loses_nothing(runs: Runs, disk: Path) -> None:
    runs_through = runs.uninterrupted().events
    event = next(name for name in runs_through if re.match(r"final os.mkdir store/final.*/checkpoint-6$", name))
    first = runs(disk / "run", **{moment(runs.uninterrupted(), event): f"sh {READ_ONLY.format(disk)}"})
    assert (first.status, first.error.count("\n")) == (2, 1)
    assert first.error.startswith(f"error: {disk}/run/store/")
    assert "cannot be written (Read-only file system); make room or make" in first.error
    again = runs(disk / "run")
    assert (again.status, again.error.count("\n")) == (2, 1)
    assert "cannot be written (Read-only file system)" in again.error
    runs.shell(f"umount {disk}")
    assert_resumed(runs, first, disk / "run")


def test_a_folder_that_vanishes_is_one_line(runs: Runs) -> None:
    first = runs("gone", **{moment(runs.uninterrupted(), "between open metrics.json.part"): "sh mv gone elsewhere"})
    assert (first.status, first.error.count("\n")) == (2, 1)
    assert "gone has vanished: it was removed or moved, or its disk is gone" in first.error


# Several processes that share the work of one folder

SHARED = (
    "compare",
    "tiny.yaml",
    "--methods",
    "target_only,continued,grid,grasp",
    "--grid",
    "0.2,0.5",
    "--seeds",
    "1,2",
)


@pytest.fixture(scope="module")
def alone(runs: Runs) -> Attempt:
    """What one process does that nothing happens to."""
    folder = runs.workspace / "alone"
    [attempt] = runs.ask([*SHARED, "--output", str(folder)], folder, [{}])
    assert (attempt.status, attempt.error) == (0, "")
    return attempt


def test_two_processes_in_one_folder_do_every_step_once(runs: Runs, alone: Attempt) -> None:
    folder = runs.workspace / "by-two"
    attempts = runs.ask([*SHARED, "--output", str(folder)], folder, [{}, {}])
    assert [(each.status, each.error) for each in attempts] == [(0, ""), (0, "")]
    assert attempts[-1].files == alone.files
    assert sum(each.steps for each in attempts) == alone.steps


def test_what_a_killed_process_was_at_two_others_take_over(runs: Runs, alone: Attempt) -> None:
    folder = runs.workspace / "killed"
    middle = [number for number, event in enumerate(alone.events, start=1) if event.endswith("after step")][7]
    [killed] = runs.ask([*SHARED, "--output", str(folder)], folder, [{middle: "kill"}])
    assert killed.status == -9
    others = runs.ask([*SHARED, "--output", str(folder)], folder, [{}, {}])
    assert [(each.status, each.error) for each in others] == [(0, ""), (0, "")]
    assert others[-1].files == alone.files
    assert sum(each.steps for each in (killed, *others)) <= alone.steps + SAVE_EVERY
