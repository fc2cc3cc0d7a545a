"""A tracker receives what a run measures, changes nothing of it, and what it wrote is there afterwards."""

import json
import math
import os
from collections.abc import Callable
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


def test_a_tracker_that_is_not_installed(refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_mlflow_available", lambda: False)
    refused("run", ["--set", "report_to=mlflow"], "report_to names 'mlflow', which cannot be used here")
