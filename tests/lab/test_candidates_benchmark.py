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
import torch

from grasp_lora.bench.checks import check
from grasp_lora.bench.session import Session
from grasp_lora.bench.store import Store
from grasp_lora.errors import Interrupted
from grasp_lora.method.ranking import prune_count
from grasp_lora.models.adapters import attached
from grasp_lora.models.beneath import beneath
from grasp_lora.recipes.load import load_recipe
from grasp_lora.training.probes import ProbeSet

pytestmark = pytest.mark.slow


@pytest.fixture
def bench(tiny_workspace: Path) -> candidates.Candidates:
    session = Session(*load_recipe("tiny.yaml"))
    check(session)
    [one] = candidates.benches(session, Store(Path("store")), [1])
    return one


def test_the_sum_of_both_adapters_is_what_was_trained(bench: candidates.Candidates) -> None:
    dev, model = bench.session.splits.dev, bench.session.backbone.model
    added = bench.on_source()
    weights = added.target.weights  # trained before anything lies beneath
    with beneath(model, bench.source.weights), attached(model, weights) as whole:
        trained = ProbeSet(dev, bench.session.pad_id).losses(whole)
    merged = bench.losses(added.merged(), "dev").result["losses"]
    assert merged == pytest.approx(trained, rel=1e-5)
    assert fmean(merged) == pytest.approx(added.target.records[-1].result["dev_loss"], rel=1e-5)
    assert fmean(merged) < bench.dev_loss(bench.source)  # it learned on top of the source


def test_a_greedy_soup_is_no_worse_on_dev_than_its_best_part(bench: candidates.Candidates) -> None:
    parts = [bench.source, bench.target, bench.continued()]
    assert bench.dev_loss(bench.greedy(parts)) <= min(map(bench.dev_loss, parts))
    alone = bench.soup([parts[0]])
    assert bench.dev_loss(alone) == pytest.approx(bench.dev_loss(parts[0]), rel=1e-5)


def test_replay_adds_source_rows_and_keeps_the_source_adapter(bench: candidates.Candidates) -> None:
    rows = len(bench.session.splits.train)
    facts = bench.with_replay().continued().records[-1].result
    plain = bench.continued().records[-1].result
    assert facts["trained_examples"] / facts["steps"] == plain["trained_examples"] / plain["steps"]
    steps = bench.recipe.final.training.steps_per_epoch
    assert facts["history"][-1]["epoch"] == pytest.approx(facts["steps"] / steps(rows + round(rows / 2)), rel=1e-3)
    assert len(bench.session.splits.train) == rows


def test_a_part_that_is_pruned_alone_leaves_the_other_whole(bench: candidates.Candidates) -> None:
    added = bench.on_source()
    for source, target in ((0.5, 0.0), (0.0, 0.5), (0.25, 0.75)):
        for pair in added.pruned_by_part(source, target).weights.values():
            ranks = [pair.rank // 2] * 2
            for factor, dimension in ((pair.A, 0), (pair.B, 1)):
                for part, ratio in zip(factor.split(ranks, dimension), (source, target), strict=True):
                    assert int((part == 0).sum()) == prune_count(ratio, part.numel())


def test_a_source_part_that_is_not_shrunk_is_the_sum_fine_tuned(bench: candidates.Candidates) -> None:
    added = bench.on_source()
    plain, whole, half = (
        one.weights for one in (added.finetuned(added.merged(), 0.0), added.shrunk(1.0), added.shrunk(0.5))
    )
    for name, pair in plain.items():
        assert torch.equal(pair.delta(), whole[name].delta())
        assert pair.delta().norm() > half[name].delta().norm()


def test_both_parts_pruned_alike_are_what_a_final_run_prunes(bench: candidates.Candidates) -> None:
    added = bench.on_source()
    plain, by_part = added.finetuned(added.merged(), 0.5).weights, added.pruned_by_part(0.5, 0.5).weights
    for name, pair in plain.items():
        assert torch.equal(pair.A, by_part[name].A)
        assert torch.equal(pair.B, by_part[name].B)


def test_the_table_has_a_row_for_each_candidate(tiny_workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["tiny.yaml", "--output", "f", "--seeds", "1,2", "--only", "source", "--only", "replay", "--answers"]
    assert candidates.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] != []
    assert {line.split(" | ")[0].strip("| ") for line in lines[2:]} == {"continued", "source", "replay"}
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
