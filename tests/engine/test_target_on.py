"""`target.on`: the target adapter on top of the source adapter, or both ways, and the merge with the lower loss goes on."""

import os
import signal
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from recorder import Recorder, read, run_tiny, session_of, step_folders, steps_of, weights_in

from grasp_lora.engine.compare import compare
from grasp_lora.engine.comparison import Comparison, ComparisonSettings
from grasp_lora.engine.steps import Steps
from grasp_lora.errors import Interrupted, ProbeError, RecipeError
from grasp_lora.models.adapter_files import read_adapter
from grasp_lora.models.adapters import attached
from grasp_lora.models.live import frozen_adapter
from grasp_lora.training import trainer as training_module

ON, AUTO = "target.on=source", "target.on=auto"
# With these the sum has the lower dev loss: a target adapter that has learned little leaves the average half of the source's.
SUM = (AUTO, "target.training.learning_rate=1e-5", "source.training.epochs=4")
# The average halves a source adapter that has gone astray.
AVERAGE = (
    AUTO,
    "source.training.learning_rate=1",
    "source.training.epochs=3",
    "source.training.patience=null",
    "data.source.dev=0",
)
NO_DEV = ("data.target.dev=0", "final.training.patience=null")


def compared(folder: str, *methods: str, changes: tuple[str, ...] = (), **more: Any) -> tuple[Comparison, Recorder]:
    recorder = Recorder()
    settings = ComparisonSettings(methods=methods, seeds=(42,), grid=(0.3,), **more)
    return compare(session_of(*changes, progress=recorder), Path(folder), settings), recorder


class TestOnSource:
    def test_the_merge_is_the_model_that_was_trained(self, tiny_workspace: Path) -> None:
        steps = steps_of(ON)
        parents = steps.parents()
        source, target = parents.sources[0].weights, parents.target.weights
        for name, pair in parents.merged.weights.items():
            torch.testing.assert_close(pair.delta(), source[name].delta() + target[name].delta(), rtol=1e-5, atol=1e-7)
        assert parents.target.made is not None
        trained = parents.target.made.result
        assert steps.losses(parents.merged, "dev").result.mean == pytest.approx(trained.dev_loss, rel=1e-5)
        alone = steps.losses(parents.sources[0], "dev").result.mean
        assert trained.history[0]["dev_loss"] == pytest.approx(alone, rel=1e-5)  # a fresh one adds nothing
        assert trained.dev_loss is not None
        assert trained.dev_loss < alone

    def test_what_lies_beneath_acts_as_the_adapter_itself_and_is_gone_after(self, finished_run: Path) -> None:
        model, weights = session_of().backbone.model, read_adapter(finished_run / "source").weights
        tokens = torch.arange(1, 9)[None]
        with torch.no_grad():
            bare = model(tokens).logits
            with frozen_adapter(model, weights):
                lower = model(tokens).logits
            with attached(model, weights) as whole:
                upper = whole(tokens).logits
            assert torch.equal(model(tokens).logits, bare)
        torch.testing.assert_close(lower, upper)
        assert not torch.allclose(lower, bare)

    def test_several_source_adapters_lie_beneath_as_their_mean(self, finished_run: Path) -> None:
        parents = steps_of(ON, "data.source=null", "source.adapters=[run/source, run/target]").parents()
        first, second, target = (adapter.weights for adapter in (*parents.sources, parents.target))
        for name, pair in parents.merged.weights.items():
            mean = (first[name].delta() + second[name].delta()) / 2
            torch.testing.assert_close(pair.delta(), mean + target[name].delta(), rtol=1e-5, atol=1e-7)

    def test_a_run_leaves_no_adapter_that_does_nothing_alone(self, tiny_workspace: Path) -> None:
        metrics = run_tiny(ON, "final.deliver=best", "data.target.dev=5").metrics
        assert list(metrics.systems) == ["zero_shot", "source", "merged", "continued", "grasp"]
        assert [file.name for file in Path("run/target").iterdir()] == ["history.jsonl"]
        assert metrics.delivered.name == "continued"

    def test_a_run_that_is_stopped_in_the_training_goes_on_to_the_same_bits(
        self, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, finetune = run_tiny(ON, folder="whole"), training_module.finetune

        def stopped(*given: Any, **more: Any) -> Any:
            if more["folder"].parent.name.startswith("target"):
                os.kill(os.getpid(), signal.SIGTERM)
            return finetune(*given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(training_module, "finetune", stopped)
            with pytest.raises(Interrupted, match=r"target.* step 1; run the same command again"):
                run_tiny(ON)
        assert run_tiny(ON).metrics == whole.metrics
        assert weights_in("run/adapter") == weights_in("whole/adapter")

    def test_the_rows_of_the_paper_are_what_they_are_without_it(self, tiny_workspace: Path) -> None:
        paper = ("target_only", "ties", "adaptive_merge", "grid_paper", "grasp_paper")
        plain, on = ({row.method: row for row in compared("both", *paper, "merged", "grasp", changes=changes)[0].rows}
                     for changes in ((), (ON,)))  # fmt: skip
        for name in paper:
            assert on[name].scores == plain[name].scores
        assert on["merged"].scores != plain["merged"].scores
        assert (
            len(step_folders("both", "target")) == 2
        )  # one alone, for both comparisons, and one on the source adapter

    def test_a_comparison_says_which_rows_have_another_target_adapter(self, tiny_workspace: Path) -> None:
        said = "the target adapter of these rows is trained on the backbone alone, as in the paper: target only (LoRA), TIES"
        for changes, methods, warned in (
            ((ON,), ("target_only", "ties", "merged"), True),
            ((ON,), ("continued", "merged"), False),
            ((ON,), ("target_only", "ties"), False),
            ((), ("target_only", "ties", "merged"), False),
        ):
            comparison, _ = compared("both", *methods, changes=changes, reference=methods[-1])
            assert (said in comparison.warnings) is warned


class TestAuto:
    @pytest.mark.parametrize(("changes", "on"), [(SUM, "source"), (AVERAGE, None)])
    def test_a_run_goes_on_with_the_merge_of_the_lower_loss(
        self, changes: tuple[str, ...], on: str | None, tiny_workspace: Path
    ) -> None:
        choice = run_tiny(*changes, folder="auto").metrics.target_on
        assert choice is not None
        assert (choice.on, choice.splits, choice.examples) == (on, ("dev", "micro_dev"), 10)
        assert (choice.losses["source"] < choice.losses["apart"]) == (on == "source")
        run_tiny(f"target.on={on or 'null'}", *changes[1:], folder="fixed")
        auto, fixed = (read(Path(folder, "metrics.json")) for folder in ("auto", "fixed"))
        assert auto | {"target_on": None} == fixed
        for name in ("adapter", "merged"):
            assert weights_in(Path("auto", name)) == weights_in(Path("fixed", name))
        assert Path("auto/target/adapter_model.safetensors").exists() == (on is None)
        assert Path("auto/target/history.jsonl").is_file()

    def test_the_losses_are_those_of_the_merges_before_any_pruning(self, tiny_workspace: Path) -> None:
        choice = steps_of(*SUM).parents().choice
        assert choice is not None
        for name, on in (("apart", "null"), ("source", "source")):
            steps = steps_of(f"target.on={on}", *SUM[1:])
            merged = steps.parents().merged
            losses = [loss for split in ("dev", "micro_dev") for loss in steps.losses(merged, split).result.losses]
            assert choice.losses[name] == pytest.approx(fmean(losses), rel=1e-9)

    def test_without_dev_rows_micro_dev_decides_and_without_both_the_way_of_the_paper(
        self, tiny_workspace: Path
    ) -> None:
        choice = steps_of(*SUM, *NO_DEV).parents().choice
        assert choice is not None
        assert (choice.splits, choice.examples) == (("micro_dev",), 4)
        for few in (0, 1):  # a single row chooses nothing
            parents = steps_of(*SUM, *NO_DEV, f"data.target.micro_dev={few}", "final.prune_ratio=0.5").parents()
            assert parents.on is None
            assert parents.choice is not None
            assert (parents.choice.splits, parents.choice.losses) == ((), {})

    def test_a_comparison_takes_the_steps_of_a_run_and_counts_both_trainings(self, tiny_workspace: Path) -> None:
        run_tiny(*SUM)
        comparison, recorder = compared("run", "target_only", "continued", "merged", "grasp", changes=SUM)
        cost: dict[str, Any] = {row.method: row.cost for row in comparison.rows}
        assert comparison.merge == "the sum (42)"
        assert not {"source", "target", "controller"} & set(recorder.did)
        assert len(step_folders("run", "target")) == 2
        assert cost["target_only"].runs_in_all == 1  # nothing of the choice
        assert cost["merged"].runs_in_all == 3  # the source adapter, and the target adapter both ways
        assert cost["merged"].runs == 1  # that which is not merged

    @pytest.mark.parametrize(("fails", "on"), [("source", None), (None, "source")])
    def test_a_way_that_fails_leaves_the_other_and_two_end_the_run(
        self, fails: str | None, on: str | None, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing, parents_on = {fails}, Steps._parents_on

        def prepare(self: Steps, place: str | None) -> Any:
            if place in failing:
                raise ProbeError("the losses are not finite")
            return parents_on(self, place)

        monkeypatch.setattr(Steps, "_parents_on", prepare)
        choice = run_tiny(*SUM, "final.deliver=grasp").metrics.target_on
        assert choice is not None
        assert (choice.on, list(choice.losses)) == (on, ["source" if on else "apart"])
        assert choice.left_out == "the other way failed: the losses are not finite"
        failing.add(on)
        with pytest.raises(ProbeError, match="not finite"):
            steps_of(*SUM).parents()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("target.on=both",), r"target\.on: input should be 'source' or 'auto'"),
        (
            (ON, "merge.rule=ties"),
            "target.on is 'source', so the target adapter is trained here, and both are added up",
        ),
        ((AUTO, "merge.weights=[1, 1]"), "remove merge.weights, or target.on"),
        ((ON, "target.adapter=mine"), "remove target.adapter, or target.on"),
    ],
)
def test_what_contradicts_it_is_refused(changes: tuple[str, ...], message: str, tiny_workspace: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        session_of(*changes)
