"""A tracker receives what a run measures, changes nothing of it, and what it wrote is there afterwards."""

import json
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from grasp_lora import api

WEIGHTS = "adapter/adapter_model.safetensors"


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_ratio_rewards_and_losses(
    tiny_workspace: Path, reference_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    result = api.run("tiny.yaml", ["report_to=tensorboard"], "run")
    assert (result.folder / WEIGHTS).read_bytes() == (reference_run / WEIGHTS).read_bytes()
    curves = {
        folder.name.partition("-")[0]: EventAccumulator(str(folder))
        for folder in Path("run/store/tensorboard").iterdir()
    }
    assert {"source", "target", "controller", "final"} <= {name.partition(" ")[0].partition("_")[0] for name in curves}
    for one in curves.values():
        one.Reload()
        assert all(math.isfinite(event.value) for event in one.Scalars("train/loss"))
    [controller] = [one for one in curves.values() if "train/grasp/prune_ratio" in one.Tags()["scalars"]]
    rounds = rows_of(Path("run/controller/rounds.jsonl"))
    for tag, expected in {
        "prune_ratio": [row["ratio"] for row in rounds],
        "best_reward": [max(row["rewards"]) for row in rounds],
    }.items():
        assert [event.value for event in controller.Scalars(f"train/grasp/{tag}")] == pytest.approx(expected, rel=1e-5)
    losses = [row["loss"] for row in rows_of(Path("run/controller/history.jsonl")) if "loss" in row]
    assert [event.value for event in controller.Scalars("train/loss")] == pytest.approx(losses, rel=1e-5)
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


STEPS = {"source", "target", "controller"}
CONTROLLED = "grasp/prune_ratio", "grasp/best_reward"


def controlled() -> dict[str, Any]:
    """What a tracker has to have of the controller run: what the run wrote."""
    rounds = rows_of(Path("run/controller/rounds.jsonl"))
    values = [row["ratio"] for row in rounds], [max(row["rewards"]) for row in rounds]
    return {tag: pytest.approx(own, rel=1e-5) for tag, own in zip(CONTROLLED, values, strict=True)}


def steps_of(names: Iterable[str]) -> list[str]:
    """The steps that runs of a tracker are called by, less the keys after them."""
    return sorted(name.rpartition(" ")[0] for name in names)


@pytest.mark.slow
def test_trackio(tiny_workspace: Path, reference_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", exc_type=ImportError)
    monkeypatch.setenv("TRACKIO_DIR", str(tiny_workspace / "tracked"))
    program = "from grasp_lora import api; api.run('tiny.yaml', ['report_to=trackio'], 'run')"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)  # it chooses its place as it is imported
    assert (Path("run") / WEIGHTS).read_bytes() == (reference_run / WEIGHTS).read_bytes()
    [file] = Path("tracked").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, metrics from metrics order by id").fetchall()
    assert set(steps_of({name for name, _ in rows})) >= STEPS
    rounds = [values for _, row in rows if "train/grasp/prune_ratio" in (values := json.loads(row))]
    assert {tag: [one[f"train/{tag}"] for one in rounds] for tag in CONTROLLED} == controlled()


@pytest.mark.slow
def test_mlflow(tiny_workspace: Path, reference_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
    place = f"file://{tiny_workspace / 'tracked'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # files need no database
    api.run("tiny.yaml", ["report_to=mlflow"], "run")
    assert (Path("run") / WEIGHTS).read_bytes() == (reference_run / WEIGHTS).read_bytes()
    client = mlflow.MlflowClient(place)
    runs = client.search_runs(["0"])
    assert set(steps_of(run.info.run_name for run in runs)) >= STEPS
    [own] = [run.info.run_id for run in runs if run.info.run_name.startswith("controller")]
    assert {tag: [one.value for one in client.get_metric_history(own, tag)] for tag in CONTROLLED} == controlled()


@pytest.mark.slow
def test_wandb_without_a_network(tiny_workspace: Path, reference_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tiny_workspace))
    api.run("tiny.yaml", ["report_to=wandb"], "run")
    assert wandb.run is None  # each training's own has ended
    assert (Path("run") / WEIGHTS).read_bytes() == (reference_run / WEIGHTS).read_bytes()
    files = [file.read_bytes() for file in Path("wandb").glob("offline-run-*/*.wandb")]
    own = {step: [file for file in files if f"{step} ".encode() in file] for step in STEPS}
    assert all(own.values())
    [controller] = [file for file in files if b"grasp/prune_ratio" in file]
    assert controller in own["controller"]
    for row in rows_of(Path("run/controller/rounds.jsonl")):
        assert str(row["ratio"]).encode() in controller


def test_a_tracker_that_is_not_installed(refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_mlflow_available", lambda: False)
    refused("run", ["--set", "report_to=mlflow"], "report_to names 'mlflow', which cannot be used here")
