"""`target.on: source`: the target adapter on top of the source adapter."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import Recorder, run_tiny, session_of, step_folders, steps_of, weights_in

from grasp_lora.engine.compare import compare
from grasp_lora.engine.comparison import Comparison, ComparisonSettings
from grasp_lora.errors import Interrupted, RecipeError
from grasp_lora.models.adapter_files import read_adapter
from grasp_lora.models.adapters import attached
from grasp_lora.models.live import frozen_adapter
from grasp_lora.training import trainer as training_module

ON = "target.on=source"


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
        assert list(metrics.systems) == ["zero_shot", "source", "merged", "continued", "grasp", "averaged"]
        assert [file.name for file in Path("run/target").iterdir()] == ["history.jsonl"]
        assert metrics.delivered.name == "averaged"

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("target.on=auto",), r"target\.on: input should be 'source'"),
        (
            (ON, "merge.rule=ties"),
            "target.on is 'source', so the target adapter is trained here, and both are added up",
        ),
        ((ON, "merge.weights=[1, 1]"), "remove merge.weights, or target.on"),
        ((ON, "target.adapter=mine"), "remove target.adapter, or target.on"),
    ],
)
def test_what_contradicts_it_is_refused(changes: tuple[str, ...], message: str, tiny_workspace: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        session_of(*changes)
