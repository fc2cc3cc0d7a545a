"""A tracker receives what a run measures, changes nothing of it, and what it wrote is there afterwards."""

import json
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from recorder import rows_of, run_tiny, weights_in

from grasp_lora.errors import RecipeError


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_ratio_rewards_and_losses(
    tiny_workspace: Path, reference_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    run_tiny("report_to=tensorboard")
    assert weights_in("run/adapter") == weights_in(reference_run / "adapter")
    places = [place for place in Path("run/store").glob("*/tensorboard") if any(place.rglob("events*"))]
    curves = {
        place.parent.name.partition("-")[0]: EventAccumulator(str(next(place.rglob("events*")).parent))
        for place in places
    }
    assert set(curves) == {"source", "target", "controller", "final"}
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
    return sorted(name.partition("-")[0].rpartition(" ")[2] for name in names)


@pytest.mark.slow
def test_trackio(tiny_workspace: Path, reference_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", exc_type=ImportError)
    monkeypatch.setenv("TRACKIO_DIR", str(tiny_workspace / "tracked"))
    program = "from grasp_lora import api; api.run('tiny.yaml', ['report_to=trackio'], 'run')"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)  # it chooses its place as it is imported
    assert weights_in("run/adapter") == weights_in(reference_run / "adapter")
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
    run_tiny("report_to=mlflow")
    assert weights_in("run/adapter") == weights_in(reference_run / "adapter")
    client = mlflow.MlflowClient(place)
    runs = client.search_runs(["0"])
    assert set(steps_of(run.info.run_name for run in runs)) >= STEPS
    [own] = [run.info.run_id for run in runs if "controller" in run.info.run_name]
    assert {tag: [one.value for one in client.get_metric_history(own, tag)] for tag in CONTROLLED} == controlled()


@pytest.mark.slow
def test_wandb_without_a_network(tiny_workspace: Path, reference_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tiny_workspace))
    run_tiny("report_to=wandb")
    assert wandb.run is None  # each training's own has ended
    assert weights_in("run/adapter") == weights_in(reference_run / "adapter")
    files = [file.read_bytes() for file in Path("wandb").glob("offline-run-*/*.wandb")]
    own = {step: [file for file in files if f"{step}-".encode() in file] for step in STEPS}
    assert all(own.values())
    [controller] = [file for file in files if b"grasp/prune_ratio" in file]
    assert controller in own["controller"]
    for row in rows_of(Path("run/controller/rounds.jsonl")):
        assert str(row["ratio"]).encode() in controller


def test_a_tracker_that_is_not_installed(tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_mlflow_available", lambda: False)
    for name in ("mlflow", "nonsense"):
        with pytest.raises(RecipeError, match=f"report_to is {name}: "):
            run_tiny(f"report_to={name}")
    assert not Path("run").exists()
