"""Candidates rest on steps of a comparison, and the sum is the model that was trained."""

import os
import signal
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import candidates
import pruning_map
import pytest
import rates

from grasp_lora.bench.checks import check
from grasp_lora.bench.session import Session
from grasp_lora.bench.store import Store
from grasp_lora.errors import Interrupted
from grasp_lora.models.adapters import attached
from grasp_lora.models.live import frozen_adapter
from grasp_lora.recipes.load import load_recipe
from grasp_lora.training.probes import ProbeSet


@pytest.fixture
def bench(tiny_workspace: Path) -> candidates.Candidates:
    session = Session(*load_recipe("tiny.yaml"))
    check(session)
    [one] = candidates.benches(session, Store(Path("store")), [1])
    return one


def test_the_sum_of_both_adapters_is_what_was_trained(bench: candidates.Candidates) -> None:
    dev, model = bench.session.splits.dev, bench.session.backbone.model
    added = bench._with_target("source")
    weights = added.target.weights  # trained before anything lies beneath
    with frozen_adapter(model, bench.source.weights), attached(model, weights) as whole:
        trained = ProbeSet(dev, bench.session.pad_id).losses(whole)
    merged = bench.losses(added.merged(), "dev").result["losses"]
    assert merged == pytest.approx(trained, rel=1e-5)
    assert fmean(merged) == pytest.approx(added.target.records[-1].result["dev_loss"], rel=1e-5)
    assert fmean(merged) < fmean(bench.losses(bench.source, "dev").result["losses"])  # it learned on top of the source


def test_an_average_of_one_adapter_is_that_one(bench: candidates.Candidates) -> None:
    [alone, source] = [
        bench.losses(one, "dev").result["losses"] for one in (bench.average([bench.source]), bench.source)
    ]
    assert alone == pytest.approx(source, rel=1e-5)


def test_the_table_has_a_row_for_each_candidate(tiny_workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["tiny.yaml", "--output", "f", "--seeds", "1,2", "--only", "source", "--only", "sum", "--answers"]
    assert candidates.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] != []
    assert {line.split(" | ")[0].strip("| ") for line in lines[2:]} == {"continued", "source", "sum"}
    assert candidates.main([*asked, "--set", "merge.rule=svd"]) == 2
    assert candidates.main([*asked, "--set", "nosuch=1"]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "more"),
    [
        (candidates, ["--only", "source"]),
        (rates, ["--rows", "continued"]),
        (pruning_map, ["--rows", "8", "--ranks", "8", "--stops", "early", "--sources", "8"]),
    ],
)
def test_a_training_that_is_stopped_leaves_a_checkpoint(
    script: ModuleType, more: list[str], tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune = Session.finetune

    def stopped(self: Session, *given: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return finetune(self, *given, **more)

    monkeypatch.setattr(Session, "finetune", stopped)
    with pytest.raises(Interrupted):
        script.main(["tiny.yaml", "--output", "f", "--seeds", "1", *more])
    assert [*Path("f/store/work").rglob("checkpoint-*")]
