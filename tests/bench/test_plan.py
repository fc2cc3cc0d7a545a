"""A dry run says at most what the comparison then takes."""

import json
from pathlib import Path
from typing import Any

from grasp_lora import api


def test_a_controller_that_stops_by_its_dev_loss_measures_dev_too(tiny_workspace: Path) -> None:
    changes = ["controller.training={epochs: 3, learning_rate: 1.0e-2, patience: 9}"]
    given: dict[str, Any] = {"methods": ("grasp",), "seeds": (42,)}
    plan = api.plan("tiny.yaml", changes, "planned", **given)
    api.compare("tiny.yaml", changes, "planned", **given)
    [planned] = [record.result for record, _ in plan.steps if record.step == "controller"]
    [file] = Path("planned/store/records").glob("controller-*.json")
    made = json.loads(file.read_text(encoding="utf-8"))["result"]
    evaluations = sum("dev_loss" in row for row in made["history"])
    assert evaluations == 4
    probed = made["measured_examples"] - 6 * evaluations
    assert made["trained_examples"] == planned["trained_examples"]
    assert planned["measured_examples"] >= made["measured_examples"] > probed
    without = api.plan("tiny.yaml", ["controller.training={epochs: 3, learning_rate: 1.0e-2}"], "other", **given)
    [rounds] = [record.result for record, _ in without.steps if record.step == "controller"]
    assert planned["measured_examples"] == rounds["measured_examples"] + 6 * evaluations
