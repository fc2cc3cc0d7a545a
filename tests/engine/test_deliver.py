"""What a run hands over, what it says of it, and that nothing is lost."""

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

from grasp_lora.engine.compare import compare
from grasp_lora.engine.comparison import ComparisonSettings
from grasp_lora.engine.deliver import ON_SOURCE, PRUNED, TITLES, expected, titles_with, warned
from grasp_lora.engine.run_folder import Delivered
from grasp_lora.engine.steps import Steps
from grasp_lora.errors import DivergedError, GraspError
from grasp_lora.models.adapter_files import read_adapter
from grasp_lora.report.card import write_model_card
from grasp_lora.report.pages import write_report

ROWS = 20
BEST = "final.deliver=best"
SYSTEMS = ("source", "target", "merged", "continued", "grasp")


def losses(**means: float) -> dict[str, Sequence[float]]:
    """Losses of rows that are unequally hard for all alike, with a little noise of each system's own."""
    return {
        name: [mean + row % 5 / 2 + random.Random(f"{name} {row}").gauss(0.0, 0.02) for row in range(ROWS)]
        for name, mean in means.items()
    }


class TestRule:
    @pytest.mark.parametrize(
        ("setting", "systems", "name", "why"),
        [
            ("best", ("continued", "grasp", "averaged"), "averaged", "such adapters answered best"),
            ("best", ("grasp",), "grasp", "lowered no dev loss"),
            ("grasp", ("unpruned", "grasp"), "grasp", "one training learned on the micro-dev rows"),
            ("continued", ("continued",), "continued", "this one training"),
        ],
    )
    def test_what_is_handed_over_is_fixed_beforehand(
        self, setting: str, systems: Sequence[str], name: str, why: str
    ) -> None:
        final, rounds = SimpleNamespace(deliver=setting, prune_ratio=None), SimpleNamespace(pool="micro_dev")
        steps: Any = SimpleNamespace(recipe=SimpleNamespace(final=final, controller=SimpleNamespace(rounds=rounds)))
        named: Any = dict.fromkeys(("source", "merged", *systems))
        found, reason = expected(
            steps, named, "Continued training lowered no dev loss, which leaves the source adapter."
        )
        assert found == name
        assert why in reason

    @pytest.mark.parametrize("on", [None, "source"])
    def test_where_nothing_is_pruned_it_is_no_result_of_grasp(self, on: str | None) -> None:
        for ratio, title in ((0.0, "the merge, trained further"), (0.3, PRUNED), (None, "GRASP's result")):
            titles = titles_with(on, ratio)
            assert titles["grasp"] == title
            assert titles["averaged"].endswith(f" and {title}")

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
        found = warned(Delivered("grasp", "GRASP's result", ""), both, alone)
        assert (found.name, found.nothing_learned) == ("grasp", nothing_learned)  # the backbone is never handed over
        assert (found.warning or "").startswith(warning or "")
        assert (found.warning is None) == (warning is None)

    def test_the_warning_is_about_what_is_handed_over_and_others_may_have_learned(self) -> None:
        rows = losses(merged=1.0, grasp=3.0, alone=2.0)
        alone = rows.pop("alone")
        found = warned(Delivered("grasp", "GRASP's result", ""), rows, alone)
        assert (found.name, found.nothing_learned) == ("grasp", False)
        assert "others are" in (found.warning or "")
        rows["merged"] = [value + (0.5 if row % 2 else -0.6) for row, value in enumerate(alone)]
        for titles in (TITLES, ON_SOURCE):
            assert titles["merged"] in (warned(found, rows, alone, titles).warning or "")


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
        assert set(metrics.systems) == {"zero_shot", *SYSTEMS, "averaged"}
        by_loss = {name: metrics.systems[name].dev_loss for name in SYSTEMS}
        assert min(by_loss, key=lambda name: by_loss[name] or 0.0) == "continued"
        assert metrics.delivered.name == "averaged"  # dev rows have no say
        assert Path("best/continued/history.jsonl").is_file()
        # GRASP's own result is what a run that hands it over gives.
        assert weights_in("best/final") == weights_in(finished_run / "adapter")
        theirs, ours = (read(Path(folder, "metrics.json"))["systems"] for folder in ("run", "best"))
        assert {name: ours[name] for name in theirs if name != "unpruned"} == {
            name: score for name, score in theirs.items() if name != "unpruned"
        }

    def test_the_mean_of_both_is_handed_over_exactly(self, tiny_workspace: Path) -> None:
        run = run_tiny(BEST)
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
        assert run_tiny(BEST, "data.target.dev=0", folder="without").metrics.delivered.name == "averaged"

    def test_where_the_usual_way_is_asked_for_nothing_else_is_trained(self, tiny_workspace: Path) -> None:
        recorder = Recorder()
        result = run_tiny("final.deliver=continued", "final.prune_ratio=0", progress=recorder)
        assert recorder.trained == ["source", "final-0.00"]
        assert list(result.metrics.systems) == ["zero_shot", "source", "continued"]
        assert weights_in("run/adapter") == weights_in("run/continued")
        assert not {"target", "merged", "final"} & {file.name for file in Path("run").iterdir()}
        pages = write_report(result, Path("run")), write_model_card(result, Path("run"), Path("run/adapter"))
        report, card = (page.read_text("utf-8") for page in pages)
        for page in (report.partition("<body>")[2].partition("<h2>The recipe")[0], card.partition("## Recipe")[0]):
            assert "Source, continued" in page
            assert "prune" not in page.lower()
            assert "merge" not in page.replace("- adapter-merging", "").replace("adapter-pruning", "").replace(
                "best also merges", ""
            )
        more = run_tiny("final.deliver=best", "final.prune_ratio=0", progress=recorder).metrics
        assert recorder.trained == ["source", "final-0.00", "target", "final-0.00"]
        assert more.systems["continued"] == result.metrics.systems["continued"]

    def test_a_source_that_cannot_be_continued_is_left_out_in_words(
        self, begun: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def diverges(self: Steps) -> None:
            raise DivergedError("the loss is not finite")

        monkeypatch.setattr(Steps, "continued", diverges)
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

    def test_where_no_step_improved_the_source_it_is_grasps_result(
        self, begun: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = Steps.continued

        def unchanged(self: Steps) -> Any:
            adapter = original(self)
            assert adapter.made is not None
            result = adapter.made.result.model_copy(update={"best_step": 0})
            return replace(adapter, made=replace(adapter.made, result=result))

        monkeypatch.setattr(Steps, "continued", unchanged)
        metrics = run_tiny(BEST, folder=begun).metrics
        assert metrics.delivered.name == "grasp"
        assert metrics.delivered.why.endswith("which leaves the source adapter.")
        assert "continued" not in metrics.systems
        assert weights_in(begun / "adapter") == weights_in(begun / "final")
