"""What a run hands over: the expected one, or another that answers the dev rows clearly better; and nothing is lost."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorder import Recorder, read, run_tiny, session_of, weights_in

from grasp_lora.data.tasks import TASKS
from grasp_lora.engine import deliver
from grasp_lora.engine.compare import compare
from grasp_lora.engine.comparison import ComparisonSettings
from grasp_lora.engine.deliver import ON_SOURCE, TITLES, best_of, choose, clearly_ahead, warned
from grasp_lora.engine.results import Losses, RowScores
from grasp_lora.engine.run_folder import Delivered
from grasp_lora.engine.steps import Steps
from grasp_lora.errors import DivergedError, GraspError, ProbeError
from grasp_lora.models.adapter_files import read_adapter

ROWS = 20
BEST = "final.deliver=best"
SYSTEMS = ("source", "target", "merged", "continued", "grasp")


def losses(**means: float) -> dict[str, Sequence[float]]:
    """Losses of rows that are unequally hard for all alike, with a little noise of each system's own."""
    return {
        name: [mean + row % 5 / 2 + random.Random(f"{name} {row}").gauss(0.0, 0.02) for row in range(ROWS)]
        for name, mean in means.items()
    }


ON_ITS_OWN: Any = SimpleNamespace(on=None)


def faked(rows: dict[str, Sequence[float]], right: dict[str, Sequence[int]] | None = None) -> Any:
    """Steps that have measured these losses, and answered these rows right, by default none."""
    scores = {name: [100.0 * (row in (right or {}).get(name, ())) for row in range(ROWS)] for name in {*rows, "alone"}}
    return SimpleNamespace(
        choosing_split="dev",
        alone=lambda: "alone",
        losses=lambda system, split: SimpleNamespace(result=Losses(losses=list(rows.get(system, [])))),
        row_scores=lambda system, split: SimpleNamespace(result=RowScores(metric="f1", scores=scores[system])),
        session=SimpleNamespace(available_metrics=["f1"]),
        splits=SimpleNamespace(dev=[1]),
        recipe=SimpleNamespace(
            data=SimpleNamespace(task="qa"), final=SimpleNamespace(deliver="best", prune_ratio=None)
        ),
    )


def scored(**scores: Sequence[float]) -> dict[str, RowScores]:
    return {name: RowScores(metric="f1", scores=list(of)) for name, of in scores.items()}


class Trained(str):
    """The name of a system in place of its adapter, which a training has made."""

    def __init__(self, name: str) -> None:
        self.made = SimpleNamespace(result=SimpleNamespace(best_step=1))


class TestRule:
    @pytest.mark.parametrize(
        ("continued", "grasp", "name", "why"),
        [
            (range(17), range(12), "continued", "GRASP's result: in the mean of the rows 85.0 against 60.0 (f1)"),
            (range(12), range(17), "grasp", "score 85.0 (f1). No other adapter scores higher."),
            (range(14), range(14), "grasp", "score 70.0 (f1). No other adapter scores higher."),  # of equal ones
            (range(7), range(7, 13), "grasp", "The highest is 35.0, the source adapter continued on the target"),
        ],
    )
    @pytest.mark.parametrize("lower", ["continued", "grasp"])
    def test_clearly_better_answers_decide_whatever_the_losses_say(
        self, continued: Sequence[int], grasp: Sequence[int], name: str, why: str, lower: str
    ) -> None:
        rows = losses(**{system: 1.0 if system == lower else 5.0 for system in ("continued", "source", "grasp")})
        steps = faked(rows, right={"continued": continued, "grasp": grasp, "source": range(3)})
        chosen = choose(steps, {system: system for system in rows}, ON_ITS_OWN)  # type: ignore[dict-item]
        assert chosen.name == name
        assert why in chosen.why
        assert chosen.warning is None  # the backbone answers nothing right, whatever its losses are
        assert (chosen.split, chosen.examples) == ("dev", ROWS)

    @pytest.mark.parametrize(
        ("continued", "grasp", "name", "why"),
        [
            (range(12), range(17), "grasp", "continued on the target rows: in the mean of the rows 85.0 against 60.0"),
            (range(7, 13), range(7), "continued", "The highest is 35.0, the merge, trained further, which is not"),
            (None, range(7), "grasp", "score 35.0 (f1). No other adapter scores higher."),
        ],
    )
    @pytest.mark.parametrize("task", sorted(TASKS.keys() - {"qa"}))
    def test_for_other_tasks_the_usual_practice_is_expected_where_it_is_a_candidate(
        self, continued: Sequence[int] | None, grasp: Sequence[int], name: str, why: str, task: str
    ) -> None:
        names = ["source", "grasp", "continued"] if continued else ["source", "grasp"]
        rows = losses(**dict.fromkeys(names, 1.0))
        steps = faked(rows, right={"continued": continued or (), "grasp": grasp})
        steps.recipe.data.task, steps.recipe.final.prune_ratio = task, 0.0
        systems: Any = {system: Trained(system) for system in rows}
        chosen = choose(steps, systems, ON_ITS_OWN)
        assert chosen.name == name
        assert why in chosen.why
        if continued and name == "continued":
            made = systems["continued"].made.result
            made.best_step = 0  # as where several sources are averaged and no step lowered the loss
            assert choose(steps, systems, ON_ITS_OWN).name == "grasp"
            made.best_step, steps.splits.dev = 1, []
            assert choose(steps, systems, ON_ITS_OWN).name == "grasp"
            steps.splits.dev, steps.recipe.data.task = [1], "qa"
            assert choose(steps, systems, ON_ITS_OWN).name == "grasp"  # without their mean
            assert choose(steps, systems | {"averaged": Trained("grasp")}, ON_ITS_OWN).name == "averaged"
            steps.recipe.data.task, steps.recipe.final.deliver = task, "grasp"
            assert choose(steps, systems, ON_ITS_OWN).name == "grasp"

    @pytest.mark.parametrize("rows", range(2, 101))
    def test_one_row_more_never_decides(self, rows: int) -> None:
        for full in (1.0, 100.0):
            scores = scored(continued=[full, *[0.0] * (rows - 1)], grasp=[0.0] * rows)
            assert clearly_ahead(scores, {"continued": [1.0], "grasp": [1.0]}, "grasp") is None

    def test_a_difference_of_rounding_is_none(self) -> None:
        scores = scored(continued=[33.333333333336] * 2 + [50.0] * 10, grasp=[33.33333333333333] * 2 + [50.0] * 10)
        assert clearly_ahead(scores, {"continued": [1.0], "grasp": [1.0]}, "grasp") is None

    def test_the_backbone_alone_that_answers_better_is_a_warning_whatever_the_losses_say(self) -> None:
        steps = faked(losses(continued=1.0, grasp=1.0, alone=5.0), right={"alone": range(15), "grasp": range(5)})
        chosen = choose(steps, {name: name for name in ("continued", "grasp")}, ON_ITS_OWN)  # type: ignore[dict-item]
        assert (chosen.name, chosen.nothing_learned) == ("grasp", True)
        assert "The backbone alone answers the 20 dev rows better: 75.0 against 25.0 (f1)." in (chosen.warning or "")

    def test_the_highest_of_those_clearly_ahead_is_taken_and_of_equal_ones_the_lower_loss(self) -> None:
        wild, even = [0.0, 100.0] * 10, [45.0, 46.0] * 10  # the first has the highest mean, and no more than chance
        scores = scored(source=wild, merged=even, continued=even, grasp=[40.0] * 20, target=[])
        losses = {name: [2.0] for name in scores} | {"continued": [1.0]}
        assert clearly_ahead(scores, losses, "grasp") == "continued"
        assert best_of(scores, losses, "dev").name == "continued"
        assert clearly_ahead(scores, losses, "target") is None  # whose metric gave none

    def test_where_nothing_is_pruned_it_is_no_result_of_grasp(self) -> None:
        steps = faked(losses(continued=2.0, source=2.0, grasp=1.0))
        for ratio, title in ((0.0, "the merge, trained further"), (0.3, "GRASP's result"), (None, "GRASP's result")):
            steps.recipe.final.prune_ratio = ratio
            assert choose(steps, {name: name for name in ("continued", "grasp")}, ON_ITS_OWN).title == title  # type: ignore[dict-item]

    @pytest.mark.parametrize("expected", ["grasp", "continued"])
    def test_where_no_answers_count_it_is_the_expected_one(self, expected: str) -> None:
        losses = {"continued": [1.0, 1.0], "grasp": [2.0, 2.0]}
        for scores in ({}, scored(**{"continued": [50.0, 60.0], "grasp": [50.0, 60.0], expected: []})):
            found = best_of(scores, losses, "micro-dev", "It could not: X.", TITLES, expected)
            assert (found.name, found.title, found.examples, found.split) == (expected, TITLES[expected], 0, None)
            why = (
                f"No answers to micro-dev rows can be compared, so {TITLES[expected]} is handed over. It could not: X."
            )
            assert found.why == why

    def test_a_metric_of_ones_own_that_gives_none_leaves_grasps_result_and_its_losses(self) -> None:
        steps = faked(losses(continued=1.0, grasp=1.0, alone=0.5))
        steps.row_scores = lambda system, split: SimpleNamespace(result=RowScores(metric="mine", scores=[]))
        chosen = choose(steps, {name: name for name in ("continued", "grasp")}, ON_ITS_OWN)  # type: ignore[dict-item]
        assert (chosen.name, chosen.examples) == ("grasp", 0)
        assert (chosen.warning or "").startswith("No adapter learned anything")

    def test_the_second_of_several_sources_can_win(self) -> None:
        scores = scored(source=[0.0] * 4, source_2=[90.0, 80.0, 90.0, 80.0], grasp=[0.0] * 4)
        found = best_of(scores, {name: [1.0] for name in scores}, "dev", "It could not be continued: X.")
        assert (found.name, found.title) == ("source_2", "the source adapter as it is (number 2)")
        assert found.why.endswith("by more than one standard error. It could not be continued: X.")

    @pytest.mark.parametrize(
        ("alone", "nothing_learned", "warning"),
        [
            (losses(alone=5.0)["alone"], False, None),
            (losses(alone=0.5)["alone"], True, "No adapter learned anything"),
            # A lower loss that the rows do not show is no learning.
            ([loss + (0.5 if row % 2 else -0.4) for row, loss in enumerate(losses(grasp=1.0)["grasp"])], True, "The 20"),
            ([], False, None),
            ([9.0] * 5, False, None),  # too few rows to tell raise no alarm
        ],
    )  # fmt: skip
    def test_no_better_than_the_backbone_alone_is_a_warning(
        self, alone: list[float], nothing_learned: bool, warning: str | None
    ) -> None:
        both = {name: rows[: len(alone) or ROWS] for name, rows in losses(continued=1.0, grasp=1.2).items()}
        found = warned(Delivered("grasp", "GRASP's result", ""), both, alone, "dev")
        assert (found.name, found.nothing_learned) == ("grasp", nothing_learned)  # the backbone is never handed over
        assert (found.warning or "").startswith(warning or "")
        assert (found.warning is None) == (warning is None)

    def test_with_the_setting_the_warning_is_about_grasps_result_and_others_may_have_learned(self) -> None:
        rows = losses(merged=1.0, grasp=3.0, alone=2.0)
        steps = faked(rows)
        steps.recipe.final.deliver = "grasp"
        systems: Any = {"merged": "merged", "grasp": "grasp"}
        found = choose(steps, systems, ON_ITS_OWN)
        assert (found.name, found.nothing_learned, found.split) == ("grasp", False, None)
        assert "others are" in (found.warning or "")
        rows["merged"] = [value + (0.5 if row % 2 else -0.6) for row, value in enumerate(rows["alone"])]
        for on, titles in ((None, TITLES), ("source", ON_SOURCE)):
            parents: Any = SimpleNamespace(on=on)
            assert titles["merged"] in (choose(steps, systems, parents).warning or "")


@pytest.fixture
def begun(finished_run: Path) -> Path:
    """A folder `best` whose store has all but the continued adapter."""
    shutil.copytree("run/store", "best/store")
    return Path("best")


class TestRun:
    def test_the_default_is_the_best_and_all_else_stays_in_its_folder(self, finished_run: Path, begun: Path) -> None:
        recorder = Recorder()
        metrics = run_tiny(BEST, folder=begun, progress=recorder).metrics
        assert recorder.trained == ["final-0.00"]
        settings = ComparisonSettings(methods=("continued", "zero_shot"), reference="continued", seeds=(42,))
        compare(session_of(progress=recorder), begun, settings)
        assert recorder.trained == ["final-0.00"]  # a comparison and a run share the continued adapter
        assert set(metrics.systems) == {"zero_shot", *SYSTEMS}
        by_loss = {name: metrics.systems[name].dev_loss for name in SYSTEMS}
        assert min(by_loss, key=lambda name: by_loss[name] or 0.0) == "continued"
        assert metrics.delivered.name == "continued"  # no answers are clearly better, and this is no `qa`
        assert metrics.delivered.examples > 0
        assert weights_in("best/adapter") == weights_in("best/continued")
        assert Path("best/continued/history.jsonl").is_file()
        # GRASP's own result is what a run that hands it over gives.
        assert weights_in("best/final") == weights_in(finished_run / "adapter")
        theirs, ours = (read(Path(folder, "metrics.json"))["systems"] for folder in ("run", "best"))
        assert {name: ours[name] for name in theirs} == theirs

    def test_for_questions_the_mean_of_both_is_expected_exactly(self, tiny_workspace: Path) -> None:
        for name, text in (("source", "source {} the sky"), ("target", "the sky {} here")):
            rows = [{"context": text.format(i), "question": f"what, {i}?", "answer": "the sky"} for i in range(40)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            Path(f"{name}.jsonl").write_text(lines, encoding="utf-8")
        run = run_tiny(BEST, "data.task=qa")
        assert run.metrics.delivered.name == "averaged"
        assert set(run.metrics.systems) == {"zero_shot", *SYSTEMS, "averaged"}
        mean, continued, grasp = (
            {name: pair.delta() for name, pair in read_adapter(f"run/{folder}").weights.items()}
            for folder in ("adapter", "continued", "final")
        )
        assert mean.keys() == grasp.keys()
        for name in mean:
            assert torch.allclose(mean[name], (continued[name] + grasp[name]) / 2, atol=1e-7)
            assert not torch.allclose(continued[name], grasp[name], atol=1e-5)
        # Where no dev rows choose, nothing is averaged.
        assert "averaged" not in run_tiny(BEST, "data.task=qa", "data.target.dev=0", folder="without").metrics.systems

    def test_whichever_wins_lies_in_adapter(self, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Steps.row_scores
        for winner in ("merged", "grasp", "continued"):
            keys: list[str] = []

            def scripted(self: Steps, adapter: Any, split: str, winner: str = winner, keys: list[str] = keys) -> Any:
                measured = original(self, adapter, split)
                if adapter.key not in keys:
                    keys.append(adapter.key)
                better = [*SYSTEMS, "zero_shot"][keys.index(adapter.key)] == winner
                return replace(
                    measured, result=RowScores(metric="f1", scores=[90.0 * better + row for row in range(6)])
                )

            monkeypatch.setattr(Steps, "row_scores", scripted)
            run_tiny(BEST, folder=begun)
            assert read(begun / "metrics.json")["delivered"]["name"] == winner
            assert weights_in(begun / "adapter") == weights_in(begun / ("final" if winner == "grasp" else winner))

    def test_given_adapters_are_handed_over_whole(self, finished_run: Path) -> None:
        (finished_run / "source").rename("mine")
        (finished_run / "target").rename("theirs")
        changes = (BEST, "data.source=null", "source.adapters=[mine]", "target.adapter=theirs", "data.target.dev=0")
        delivered = run_tiny(*changes, "data.target.micro_dev=1", folder="given").metrics.delivered
        assert (delivered.name, delivered.examples) == ("grasp", 0)  # one micro-dev row tells nothing
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deliver, "choose", lambda *_: replace(delivered, name="source"))
            run_tiny(*changes, "data.target.micro_dev=1", folder="given")
        assert weights_in("given/adapter") == weights_in("mine")

    def test_a_source_that_cannot_be_continued_is_left_out_in_words(
        self, begun: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def diverges(self: Steps) -> None:
            raise DivergedError("the loss is not finite")

        def no_loss(self: Steps, adapter: Any, split: str) -> Any:
            if adapter.made and adapter.made.name == "final-0.00":
                raise ProbeError("the loss is not finite")
            return measure(self, adapter, split)

        measure = Steps.losses
        # In training, or where nobody looked until now.
        for name, fault in (("continued", diverges), ("losses", no_loss)):
            with monkeypatch.context() as patch:
                patch.setattr(Steps, name, fault)
                metrics = run_tiny(BEST, folder=begun).metrics
            assert "continued" not in metrics.systems
            assert metrics.delivered.why.endswith("The source adapter could not be continued: the loss is not finite")

    def test_what_passes_is_no_reason_to_leave_an_adapter_out(
        self, begun: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(self: Steps) -> None:
            raise GraspError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(Steps, "continued", full)
            with pytest.raises(GraspError, match="the disk is full"):
                run_tiny(BEST, folder=begun)
        assert not (begun / "metrics.json").exists()
        assert "continued" in run_tiny(BEST, folder=begun).metrics.systems

    def test_a_source_that_no_step_improved_is_handed_over_as_the_source(
        self, begun: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original, measure = Steps.continued, Steps.row_scores

        def unchanged(self: Steps) -> Any:
            adapter = original(self)
            assert adapter.made is not None
            result = adapter.made.result.model_copy(update={"best_step": 0})
            return replace(adapter, made=replace(adapter.made, result=result))

        def rigged(self: Steps, adapter: Any, split: str) -> Any:
            scores, named = measure(self, adapter, split), adapter.made.name if adapter.made else ""
            by_name = {"source": 80.0, "final-0.00": 90.0}  # the second is the continued one
            return replace(scores, result=RowScores(metric="f1", scores=[by_name.get(named, 10.0)] * 6))

        monkeypatch.setattr(Steps, "continued", unchanged)
        monkeypatch.setattr(Steps, "row_scores", rigged)
        delivered = run_tiny(BEST, folder=begun).metrics.delivered
        assert delivered.name == "source"
        assert delivered.why.endswith("which leaves the source adapter.")
        assert weights_in(begun / "adapter") == weights_in(begun / "source")
