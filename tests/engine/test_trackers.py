"""A tracker receives what a run measures, changes nothing of it, and what it wrote is there afterwards."""

import math
import os
from pathlib import Path

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


@pytest.mark.slow
def test_wandb_without_a_network(tiny_workspace: Path, reference_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tiny_workspace))
    run_tiny("report_to=wandb")
    assert wandb.run is None  # each training's own has ended
    assert weights_in("run/adapter") == weights_in(reference_run / "adapter")
    files = [file.read_bytes() for file in Path("wandb").glob("offline-run-*/*.wandb")]
    own = {step: [file for file in files if f"{step}-".encode() in file] for step in ("source", "target", "controller")}
    assert all(own.values())
    [controller] = [file for file in files if b"grasp/prune_ratio" in file]
    assert controller in own["controller"]
    for row in rows_of(Path("run/controller/rounds.jsonl")):
        assert str(row["ratio"]).encode() in controller


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # mlflow's own, half made
def test_a_tracker_that_is_not_installed(tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_mlflow_available", lambda: False)
    for name in ("mlflow", "nonsense"):
        with pytest.raises(RecipeError, match=f"report_to is {name}: "):
            run_tiny(f"report_to={name}")
    assert not Path("run").exists()
