"""What a run hands over: the best by paired dev evidence, the simplest of equal ones, and never anything lost."""

import json
import random
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from grasp_lora.report.run_record import read_run
from recorder import Recorder

from grasp_lora import api
from grasp_lora.engine.deliver import ON_SOURCE, best_of, by_setting, choose
from grasp_lora.engine.progress import Progress
from grasp_lora.engine.steps import Bench
from grasp_lora.engine.store import Record
from grasp_lora.errors import DivergedError, GraspError, Interrupted, RecipeError
from grasp_lora.report.delivered import next_steps

ROWS = 20
BEST = "final.deliver=best"
WEIGHTS = "adapter_model.safetensors"
SYSTEMS = ("source", "target", "merged", "continued", "grasp")


def losses(**means: float) -> dict[str, Sequence[float]]:
    """Losses of rows that are unequally hard for all alike, with a little noise of each system's own."""
    return {
        name: [mean + row % 5 / 2 + random.Random(f"{name} {row}").gauss(0.0, 0.02) for row in range(ROWS)]
        for name, mean in means.items()
    }


class TestRule:
    @pytest.mark.parametrize("winner", SYSTEMS)
    def test_what_the_rows_show_to_be_best_is_handed_over(self, winner: str) -> None:
        found = best_of(losses(**{name: 1.0 + (name != winner) for name in SYSTEMS}), "dev")
        assert found.name == winner
        assert found.difference == pytest.approx(-1.0, abs=0.1)
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.difference <= found.high < 0
        assert "show a difference" in found.why

    def test_rows_of_few_articles_tell_less_than_so_many_rows(self) -> None:
        rows = losses(continued=1.0, source=2.0, target=1.5, merged=2.0, grasp=1.5)
        rows["grasp"] = [one - (0.9 if row % 4 == 0 else -0.05) for row, one in enumerate(rows["continued"])]
        assert best_of(rows, "dev").name == "grasp"
        few = best_of(
            rows, "dev", groups=[row % 4 for row in range(ROWS)]
        )  # one article in four makes all of the difference
        assert (few.name, few.examples) == ("grasp", ROWS)
        assert "cannot tell" in few.why  # it is expected: the target adapter is ahead in all articles

    def test_a_run_draws_rows_of_one_article_together(self) -> None:
        rows = losses(continued=1.0, source=2.0, target=1.5, merged=2.0, grasp=1.5)
        rows["grasp"] = [one - (0.9 if row % 4 == 0 else -0.05) for row, one in enumerate(rows["continued"])]
        articles = [SimpleNamespace(group=f"article {row % 4}") for row in range(ROWS)]
        recipe = SimpleNamespace(target=SimpleNamespace(on=None), final=SimpleNamespace(deliver="best"))
        bench = SimpleNamespace(
            choosing_split="dev",
            losses=lambda system, split: SimpleNamespace(result={"losses": rows[system]}),
            session=SimpleNamespace(splits=SimpleNamespace(dev=articles, labels={})),
            recipe=recipe,
        )
        found = choose(bench, {name: name for name in SYSTEMS})
        assert found == best_of(rows, "dev", groups=[row % 4 for row in range(ROWS)])
        assert found != best_of(rows, "dev")

    @pytest.mark.parametrize(
        ("continued", "grasp", "name"),
        [
            (range(3), range(8), "continued"),
            (range(8), range(3), "grasp"),
            (range(6), range(6), "grasp"),  # of equal ones
            (range(6), range(6, 13), "grasp"),  # a lead of one row, where thirteen differ
        ],
    )
    def test_of_labels_the_right_answers_may_veto_grasps_result(
        self, continued: Sequence[int], grasp: Sequence[int], name: str
    ) -> None:
        rows = losses(continued=1.5, source=2.0, merged=1.4, grasp=1.0)
        wrong = {"continued": continued, "grasp": grasp}

        def bench(labels: dict[str, tuple[int, ...]]) -> Any:
            found = {name: [float(row in own) for row in range(ROWS)] for name, own in wrong.items()}
            splits = SimpleNamespace(micro_dev=[SimpleNamespace(group=str(n)) for n in range(ROWS)], labels=labels)
            return SimpleNamespace(
                choosing_split="micro_dev",
                losses=lambda system, split: SimpleNamespace(result={"losses": rows[system]}),
                errors=lambda system, split: SimpleNamespace(result={"losses": found[system]}),
                session=SimpleNamespace(splits=splits),
                recipe=SimpleNamespace(target=SimpleNamespace(on="source"), final=SimpleNamespace(deliver="best")),
            )

        systems = {one: one for one in rows}
        found = choose(bench({"no": (1,), "yes": (2,)}), systems)
        assert found.name == name
        if name == "continued":
            assert "It answers 17 of 20 micro-dev rows right, GRASP's result 12. That weighs more than" in found.why
            assert (found.split, found.examples, found.against) == ("micro-dev", ROWS, "grasp")
        assert choose(bench({}), systems).name == "grasp"  # texts are not counted as right or wrong
        del systems["continued"]
        assert choose(bench({"no": (1,), "yes": (2,)}), systems).name == "grasp"

    @pytest.mark.parametrize("usual", ["continued", "source"])
    def test_where_the_rows_cannot_tell_it_is_the_usual_practice(self, usual: str) -> None:
        names = SYSTEMS if usual == "continued" else tuple(name for name in SYSTEMS if name != "continued")
        found = best_of(losses(**{name: 1.0 - 0.001 * (name == "grasp") for name in names}), "dev")
        assert (found.name, found.against) == (usual, "grasp")
        assert found.difference is not None
        assert found.low is not None
        assert found.high is not None
        assert found.low <= 0 <= found.high
        first = "the usual practice" if usual == "continued" else "the simpler one"
        assert f"{ROWS} dev rows cannot tell these apart, so {first} is handed over" in found.why

    def test_where_the_target_adapter_is_ahead_of_the_source_it_is_grasps_result(self) -> None:
        ahead = {"continued": 1.0, "source": 2.0, "target": 1.5, "merged": 1.2}
        found = best_of(losses(**ahead, grasp=1.002), "dev")  # the rows cannot tell it from the continued one
        assert (found.name, found.against) == ("grasp", "continued")
        assert f"{ROWS} dev rows cannot tell these apart, so GRASP's result is handed over." in found.why
        assert "The target adapter is ahead of the source adapter alone (2.496 against 2.998)" in found.why
        assert best_of(losses(**ahead, grasp=1.1), "dev").name == "continued"  # which is shown to be better
        ahead["merged"] = 0.8
        assert best_of(losses(**ahead, grasp=1.002), "dev").name == "merged"
        no_grasp = best_of(losses(continued=1.0, source=2.0, target=1.5), "dev")
        assert no_grasp.name == "continued"

    def test_the_target_adapter_is_ahead_by_more_than_a_standard_error_of_the_best_source(self) -> None:
        rows = {name: [1.0, 2.0, 1.0, 2.0] for name in ("continued", "merged", "grasp")}
        for step, chosen in ((0.3, "continued"), (0.5, "grasp")):  # a standard error is 0.41
            target = [value - step + (0.7 if row % 2 else -0.7) for row, value in enumerate(rows["grasp"])]
            one = best_of(rows | {"source": rows["grasp"], "target": target}, "dev")
            assert one.name == chosen
            both = best_of(rows | {"source": [9.0] * 4, "source_2": rows["grasp"], "target": target}, "dev")
            assert both.name == chosen

    def test_where_the_usual_practice_is_shown_to_be_worse_the_lowest_loss_is_taken(self) -> None:
        # The rows cannot tell the first two apart. What is left to choose by is their loss, not which one is simpler.
        found = best_of(losses(continued=3.0, source=1.001, target=1.1, merged=2.0, grasp=1.0), "dev")
        assert (found.name, found.against) == ("grasp", "continued")
        assert found.difference == pytest.approx(-2.0, abs=0.1)
        assert found.high is not None
        assert found.high < 0
        assert "for the source adapter continued on the target rows; the 20 dev rows show a difference" in found.why

    def test_equal_losses_and_too_few_rows_give_the_simplest(self) -> None:
        same = {name: [1.0, 2.0, 0.5] for name in SYSTEMS}
        assert best_of(same, "dev").name == "continued"
        one = {name: [2.0 - (name == "grasp")] for name in SYSTEMS}
        assert best_of(one, "dev").name == "continued"
        none: dict[str, list[float]] = {name: [] for name in SYSTEMS}
        found = best_of(none, "dev")
        assert (found.name, found.difference, found.examples) == ("continued", None, 0)
        assert "There are no dev losses to choose by" in found.why

    def test_the_second_of_several_sources_can_win(self) -> None:
        found = best_of(losses(source=2.0, source_2=1.0, target=2.0, merged=2.0, grasp=2.0), "dev")
        assert (found.name, found.title) == ("source_2", "the source adapter as it is (number 2)")

    def test_what_diverged_is_left_out_and_what_is_missing_is_said(self) -> None:
        found = best_of(
            losses(continued=float("nan"), target=1.0, grasp=2.0), "dev", (), "It could not be continued: X."
        )
        assert found.name == "target"
        assert found.why.endswith("It could not be continued: X.")

    def test_no_better_than_the_backbone_alone_is_a_warning(self) -> None:
        both = losses(continued=1.0, grasp=1.2)
        found = best_of(both, "dev", losses(alone=5.0)["alone"])
        assert (found.warning, found.nothing_learned) == (None, False)
        found = best_of(both, "dev", losses(alone=0.5)["alone"])
        assert found.nothing_learned
        assert found.warning is not None
        assert found.warning.startswith("No adapter learned anything")
        assert found.name == "continued"  # the backbone alone is never handed over

    def test_a_lower_loss_that_the_rows_do_not_show_is_no_learning(self) -> None:
        both = losses(continued=1.0, grasp=1.2)
        alone = [value + (0.5 if row % 2 else -0.4) for row, value in enumerate(both["continued"])]
        found = best_of(both, "dev", alone)
        assert found.nothing_learned
        assert found.warning is not None
        assert "show no adapter to be better" in found.warning

    def test_with_the_setting_the_warning_is_about_grasps_result_and_others_may_have_learned(self) -> None:
        found = by_setting(losses(continued=1.0, grasp=3.0), "dev", losses(alone=2.0)["alone"])
        assert (found.name, found.nothing_learned) == ("grasp", False)
        assert found.warning is not None
        assert "others are" in found.warning

    def test_too_few_rows_to_tell_raise_no_alarm(self) -> None:
        few = {name: own[:5] for name, own in losses(continued=1.0, grasp=1.2, alone=9.0).items()}
        alone = few.pop("alone")
        found = best_of(few, "dev", alone)
        assert (found.nothing_learned, found.warning) == (False, None)

    def test_the_sum_is_called_so_in_a_warning_with_the_setting_too(self) -> None:
        given = losses(grasp=3.0, alone=2.0)
        alone = given.pop("alone")
        given["merged"] = [value + (0.5 if row % 2 else -0.6) for row, value in enumerate(alone)]
        said = by_setting(given, "dev", alone, ON_SOURCE)
        assert said.warning is not None
        assert ON_SOURCE["merged"] in said.warning

    @pytest.mark.parametrize("alone", [[], [1.0], [float("nan")] * ROWS])
    def test_without_losses_of_the_backbone_alone_nothing_is_said(self, alone: list[float]) -> None:
        assert best_of(losses(continued=1.0, grasp=1.2), "dev", alone).warning is None


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


# Below 6 rows nothing can be shown, so the usual practice is handed over.
ENOUGH = ("data.target.dev=9", "data.target.test=5")


class TestRun:
    def test_the_default_is_the_best_and_all_else_stays_in_its_folder(self, finished_run: Path) -> None:
        recorder = Recorder()
        result = api.run("tiny.yaml", [BEST], "best", recorder)
        delivered = result.delivered
        assert delivered is not None
        assert delivered.name == "grasp"
        assert delivered.low is not None
        metrics = read(Path("best/metrics.json"))
        assert set(metrics["systems"]) == {"zero_shot", *SYSTEMS}
        assert metrics["delivered"]["name"] == "grasp"
        assert result.adapter == Path("best/adapter")
        assert (result.adapter / WEIGHTS).read_bytes() == Path("best/final", WEIGHTS).read_bytes()
        assert Path("best/continued", WEIGHTS).is_file()
        # GRASP's own result is what a run that hands it over gives.
        assert Path("best/final", WEIGHTS).read_bytes() == (finished_run / "adapter" / WEIGHTS).read_bytes()
        theirs = read(finished_run / "metrics.json")["systems"]
        assert {name: metrics["systems"][name] for name in theirs} == theirs
        again = Recorder()
        assert api.run("tiny.yaml", [BEST], "best", again).metrics == result.metrics
        assert not again.did

    def test_the_setting_keeps_grasps_result_and_trains_nothing_else(self, finished_run: Path) -> None:
        metrics = read(finished_run / "metrics.json")
        assert metrics["delivered"]["name"] == "grasp"
        assert set(metrics["systems"]) == {"zero_shot", "source", "target", "merged", "grasp"}
        assert not (finished_run / "continued").exists()
        assert (finished_run / "adapter" / WEIGHTS).read_bytes() == (finished_run / "final" / WEIGHTS).read_bytes()

    @pytest.mark.parametrize("winner", ["merged", "grasp", "continued"])
    def test_whichever_wins_lies_in_adapter(
        self, winner: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
    ) -> None:
        original = Bench.losses
        asked: list[str] = []

        def scripted(self: Bench, adapter: Any, split: str = "test", *, answered: bool = False) -> Record:
            found = original(self, adapter, split, answered=answered)
            if split == "dev":
                if adapter.key not in asked:
                    asked.append(adapter.key)
                name = ("zero_shot", "source", "target", "merged", "continued", "grasp")[asked.index(adapter.key)]
                found.result["losses"][:] = [0.1 if name == winner else 1.0 + row / 10 for row in range(9)]
            return found

        monkeypatch.setattr(Bench, "losses", scripted)
        result = cli(
            "run", "tiny.yaml", "--set", BEST, *(part for one in ENOUGH for part in ("--set", one)), "-o", "best"
        )
        assert result.status == 0, result.err
        assert read(Path("best/metrics.json"))["delivered"]["name"] == winner
        folder = "final" if winner == "grasp" else winner
        assert Path("best/adapter", WEIGHTS).read_bytes() == Path("best", folder, WEIGHTS).read_bytes()
        assert "Take this adapter: " in result.out
        assert json.loads(Path("best/prompt.jsonl").read_text(encoding="utf-8")).endswith(": what?")
        assert "grasp-lora predict best/adapter --jsonl < best/prompt.jsonl" in result.out
        advised = re.search(r"next: each row tested once, about 4 times this run: (.+)", result.out)
        assert advised
        program, *command = shlex.split(advised[1])
        assert (program, command[0], "--folds" in command) == ("grasp-lora", "compare", True)
        assert cli(*command, "--dry-run").status == 0
        page = Path("best/report.html").read_text(encoding="utf-8")
        assert "<h1>Take this adapter: " in page
        assert page.count('<tr class="chosen">') == 1
        card = Path("best/adapter/README.md").read_text(encoding="utf-8")
        assert "It is: " in card
        assert ("Prune ratio" in card) == (winner == "grasp")

    @pytest.mark.parametrize("refused", ["files: {pool: target.jsonl, test: other.jsonl}", "task: classification"])
    def test_a_run_that_cannot_have_folds_is_sent_to_three_seeds(self, refused: str, finished_run: Path) -> None:
        api.run("tiny.yaml", [BEST], "best")
        record = read_run(Path("best"))
        place = "files:\n    - target.jsonl\n" if refused.startswith("test") else "task: completion"
        assert place in record.recipe_text
        for text, asked in ((record.recipe_text, True), (record.recipe_text.replace(place, refused), False)):
            steps = next_steps(replace(record, recipe_text=text), "tiny.yaml", [BEST], Path("best"), False)
            assert ("--folds" in steps[0]) is asked
            assert steps[0].startswith(
                "each row tested once, about 4 times" if asked else "three seeds, about three times this run"
            )
        record.data.report["target"]["unused"] = 500
        assert "--folds" not in next_steps(record, "tiny.yaml", [BEST], Path("best"), False)[0], "the pool is large"

    def test_given_adapters_are_handed_over_whole(self, finished_run: Path, cli: Callable[..., Any]) -> None:
        (finished_run / "source").rename("mine")
        (finished_run / "target").rename("theirs")
        changes = [BEST, "data.source=null", "source.adapters=[mine]", "target.adapter=theirs", "data.target.dev=0"]
        result = api.run("tiny.yaml", [*changes, "data.target.micro_dev=1"], "given")
        assert result.delivered is not None
        assert result.delivered.name == "continued"  # one micro-dev row tells nothing
        assert result.delivered.difference is None
        assert cli("predict", "given/adapter", "source 1: what?").status == 0

    def test_a_source_that_cannot_be_continued_is_left_out_in_words(
        self, finished_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def diverges(self: Bench) -> None:
            raise DivergedError("the loss is not finite")

        monkeypatch.setattr(Bench, "continued", diverges)
        result = api.run("tiny.yaml", [BEST], "best")
        assert "continued" not in result.metrics.systems
        assert result.delivered is not None
        assert result.delivered.why.endswith("The source adapter could not be continued: the loss is not finite")

    def test_what_passes_is_no_reason_to_leave_an_adapter_out(
        self, finished_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(self: Bench) -> None:
            raise GraspError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(Bench, "continued", full)
            with pytest.raises(GraspError, match="the disk is full"):
                api.run("tiny.yaml", [BEST], "best")
        assert not Path("best/metrics.json").exists()
        assert "continued" in api.run("tiny.yaml", [BEST], "best").metrics.systems

    def test_a_source_that_no_step_improved_is_handed_over_as_the_source(
        self, finished_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = Bench.continued

        def unchanged(self: Bench) -> Any:
            adapter = original(self)
            adapter.records[-1].result["best_step"] = 0
            return adapter

        monkeypatch.setattr(Bench, "continued", unchanged)
        monkeypatch.setattr("grasp_lora.engine.deliver.AHEAD", 1000.0)
        result = api.run("tiny.yaml", [BEST, "data.target.dev=5"], "best")  # too few rows to show anything
        assert result.delivered is not None
        assert result.delivered.name == "source"
        assert result.delivered.why.endswith("which leaves the source adapter.")
        card = Path("best/adapter/README.md").read_text(encoding="utf-8")
        assert "Source adapter |" in card
        assert "Target adapter |" not in card

    def test_a_comparison_and_a_run_share_the_continued_adapter(self, finished_run: Path) -> None:
        settings: dict[str, Any] = {"methods": ("continued", "zero_shot"), "reference": "continued", "seeds": (42,)}
        api.run("tiny.yaml", [BEST], "one")
        recorder = Recorder()
        api.compare("tiny.yaml", (), "one", recorder, **settings)
        assert not recorder.did
        api.compare("tiny.yaml", (), "other", **settings)
        recorder = Recorder()
        api.run("tiny.yaml", [BEST], "other", recorder)
        assert "final 0.00" not in recorder.did
        assert Path("one/metrics.json").read_bytes() == Path("other/metrics.json").read_bytes()

    def test_a_stop_between_the_steps_loses_nothing(self, finished_run: Path) -> None:
        class Stops(Progress):
            def __init__(self, stage: str) -> None:
                self.last = stage

            def finished(self, name: str, seconds: float, summary: Any, *, skipped: bool) -> None:
                if name == self.last:
                    raise Interrupted("stopped")

        whole = api.run("tiny.yaml", [BEST], "whole")
        for stage in ("continued", "deliver"):
            with pytest.raises(Interrupted):
                api.run("tiny.yaml", [BEST], stage, Stops(stage))
            assert not Path(stage, "metrics.json").exists()
            recorder = Recorder()
            assert api.run("tiny.yaml", [BEST], stage, recorder).metrics == whole.metrics
            assert "final 0.00" not in recorder.did
            assert Path(stage, "adapter", WEIGHTS).read_bytes() == Path("whole/adapter", WEIGHTS).read_bytes()

    def test_another_word_is_refused(self, tiny_workspace: Path) -> None:
        with pytest.raises(RecipeError, match="deliver is 'both'; allowed: best, grasp"):
            api.run("tiny.yaml", ["final.deliver=both"])
