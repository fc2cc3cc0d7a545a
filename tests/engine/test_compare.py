"""The comparison: every method under one protocol, steps that are never done twice, choices made on the right split."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from conftest import write_tiny_workspace
from recorder import Recorder, read, run_tiny, session_of, step_folders, steps_of, weights_in
from torch.optim.optimizer import register_optimizer_step_post_hook

from grasp_lora.engine import compare as module
from grasp_lora.engine import lorahub, methods
from grasp_lora.engine.compare import compare
from grasp_lora.engine.comparison import Comparison, ComparisonSettings, MethodRow, saves_over_confidence
from grasp_lora.engine.methods import METHODS
from grasp_lora.engine.progress import Progress
from grasp_lora.engine.results import Adapter, read_json
from grasp_lora.engine.steps import Steps
from grasp_lora.errors import AdapterError, Interrupted, ProbeError, RecipeError
from grasp_lora.evaluation.statistics import compare_with_baselines
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.merging import MergeSettings, merge
from grasp_lora.method.search import PaperPolicy, Rounds
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage import checkpoints
from grasp_lora.storage.claims import claim

SMALL = ComparisonSettings(seeds=(1,), grid=(0.2, 0.6), resamples=1000)
FEW = ("target_only", "adaptive_merge", "grid", "grasp")


def asked(*methods: str, **more: Any) -> ComparisonSettings:
    """A small comparison of these methods; the last of them is the reference where GRASP is none of them."""
    reference = "grasp" if "grasp" in methods else methods[-1]
    given = {"seeds": (1,), "grid": (0.2,), "reference": reference, "resamples": 1000} | more
    return ComparisonSettings(methods=methods, **given)


def compared(folder: Path | str, settings: ComparisonSettings, *overrides: str) -> tuple[Comparison, Recorder]:
    recorder = Recorder()
    return compare(session_of(*overrides, progress=recorder), Path(folder), settings), recorder


def row_of(comparison: Comparison, method: str) -> MethodRow:
    [row] = [row for row in comparison.rows if row.method == method]
    return row


def mean_loss(comparison: Comparison, method: str) -> float:
    score = row_of(comparison, method).scores["test_loss"]
    assert score is not None
    return score.mean


def without_seconds(comparison: Comparison) -> dict[str, Any]:
    content = comparison.to_json()
    for row in content["rows"]:
        for key in ("seconds", "seconds_in_all"):
            row.get("cost", {}).pop(key, None)
    return json.loads(json.dumps(content))


@pytest.fixture(scope="session")
def whole_comparison(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path) -> tuple[Path, Comparison]:
    """The folder and the content of a comparison of all methods; treat it as read-only."""
    recipe = write_tiny_workspace(tmp_path_factory.mktemp("comparison") / "work", tiny_backbone_folder)
    return recipe.parent / "compare", compare(session_of(recipe=recipe), recipe.parent / "compare", SMALL)


@pytest.fixture
def finished(tiny_workspace: Path, whole_comparison: tuple[Path, Comparison]) -> tuple[Path, Comparison]:
    """A copy of the whole comparison in the working folder."""
    folder, comparison = whole_comparison
    return Path(shutil.copytree(folder, tiny_workspace / "compare")), comparison


class TestTable:
    def test_every_method_has_a_row_with_scores_cost_and_a_verdict(self, whole_comparison) -> None:
        _, comparison = whole_comparison
        assert tuple(row.method for row in comparison.rows) == tuple(METHODS)
        assert comparison.metrics == ["test_loss", "exact_match", "rougeL"]
        for row in comparison.rows:
            assert row.unavailable is None
            assert row.cost is not None
            assert set(row.scores) == set(comparison.metrics)
            assert set(row.against) == (set() if row.method == "grasp" else set(comparison.metrics))

    def test_the_file_holds_what_was_returned_and_no_answers(self, whole_comparison) -> None:
        folder, comparison = whole_comparison
        assert read_json(folder / "compare/compare.json", Comparison) == comparison
        text = (folder / "compare/compare.json").read_text(encoding="utf-8")
        assert "prediction" not in text
        assert str(folder.parent) not in text
        assert {path.name for path in (folder / "compare").iterdir()} == {"compare.json", "recipe.yaml"}

    def test_the_verdict_is_that_of_the_records(self, whole_comparison) -> None:
        folder, comparison = whole_comparison
        losses = [read(step / "result.json")["losses"] for step in step_folders(folder, "answers")]
        by_mean = {fmean(rows): rows for rows in losses}
        values = {row.method: by_mean[mean_loss(comparison, row.method)] for row in comparison.rows}
        ours, planned = values.pop("grasp"), ("continued", "joint", "grid")
        together = {name: values.pop(name) for name in planned}
        expected = compare_with_baselines(ours, together, higher_is_better=False, resamples=1000)
        for name in planned:
            against = row_of(comparison, name).against["test_loss"]
            assert (against.low, against.verdict) == (expected[name].low, expected[name].verdict)
        for name, rows in values.items():
            against = row_of(comparison, name).against["test_loss"]
            alone = compare_with_baselines(ours, {name: rows}, higher_is_better=False, resamples=1000)[name]
            assert (against.low, against.verdict) == (alone.low, None)

    def test_cost_counts_runs_and_examples_beyond_the_adapters_that_are_merged(self, whole_comparison) -> None:
        _, comparison = whole_comparison
        cost: dict[str, Any] = {row.method: row.cost for row in comparison.rows}
        assert {cost[name].runs for name in ("zero_shot", "merged", "ties", "target_only")} == {0}
        assert cost["adaptive_merge"].runs == 1
        assert cost["grid"].runs == cost["grasp"].runs == 2
        # A final run: 10 training examples counted twice, and the 6 dev examples before and after the only epoch.
        assert cost["adaptive_merge"].work == 10 * 2 + 6 * 2
        assert cost["grid"].work == 2 * cost["adaptive_merge"].work
        assert [cost[name].runs_in_all for name in ("target_only", "merged", "grasp")] == [1, 2, 4]
        # The controller: 10 steps, and 3 rounds of 1 + 3 probes on 4 micro-dev examples.
        assert cost["grasp"].work == 10 * 2 + 3 * 4 * 4 + cost["adaptive_merge"].work
        assert cost["lorahub"].work == 40 * 4

    def test_rows_of_one_article_are_drawn_together(self, tiny_workspace) -> None:
        rows = [{"prompt": f"target {i}: what?", "completion": f" {i % 7}", "group": f"g{i // 2}"} for i in range(40)]
        Path("target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        run_tiny()
        groups = read("run/data.json")["test_groups"]
        assert len(groups) == 2 * len(set(groups)) > 2
        comparison, _ = compared("run", asked("merged", "grasp", seeds=(42,)))
        assert comparison.test_groups == len(set(groups))
        losses = {}
        for name in ("grasp", "merged"):
            lines = Path(f"run/evaluation/{name}.jsonl").read_text(encoding="utf-8").splitlines()
            losses[name] = [json.loads(line)["loss"] for line in lines]
        against = row_of(comparison, "merged").against["test_loss"]
        drawn = compare_with_baselines(
            losses["grasp"], {"merged": losses["merged"]}, groups=groups, higher_is_better=False, resamples=1000
        )["merged"]
        assert (against.difference, against.low, against.high) == pytest.approx(
            (drawn.difference, drawn.low, drawn.high)
        )

    def test_seeds_share_the_source_adapter_and_nothing_else_and_what_has_no_seed_has_no_spread(
        self, tiny_workspace
    ) -> None:
        comparison, recorder = compared("compare", asked("zero_shot", "source_only", *FEW, seeds=(1, 2)))
        assert recorder.did.count("source") == 1
        assert recorder.did.count("target") == recorder.did.count("controller") == 2
        score: Any = row_of(comparison, "target_only").scores["test_loss"]
        assert len(set(score.values)) == 2
        assert score.sd > 0
        assert comparison.seeds == [1, 2]
        for name in ("zero_shot", "source_only"):
            single: Any = row_of(comparison, name).scores["test_loss"]
            assert (len(single.values), single.sd) == (1, None)

    @pytest.mark.parametrize(
        ("loss", "score", "saved"),
        [
            ("better", "no difference shown", True), ("better", "worse", True), ("better", "better", False),
            ("no difference shown", "no difference shown", False), (None, None, False),
        ],
    )  # fmt: skip
    def test_a_gain_in_the_loss_that_no_answer_shows_is_over_confidence_saved(
        self, whole_comparison, loss, score, saved
    ) -> None:
        _, comparison = whole_comparison
        against = row_of(comparison, "continued").against
        verdicts = {"test_loss": loss, "exact_match": score, "rougeL": score}
        changed = {name: replace(against[name], verdict=verdict) for name, verdict in verdicts.items()}
        assert saves_over_confidence(changed) is saved

    def test_the_half_width_is_said_before_anything_is_trained(self, tiny_workspace) -> None:
        class Notes(Recorder):
            def step(self, report: Any) -> None:
                assert self.notes

        notes = Notes()
        compare(session_of(progress=notes), Path("compare"), asked("merged", "continued", "joint", "grasp"))
        assert "8 test examples, 2 comparisons" in notes.notes[1]


class TestRecord:
    def test_a_damaged_or_missing_file_is_named(self, finished) -> None:
        file = finished[0] / "compare/compare.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        for change, place in (({"rows": [content["rows"][0] | {"scores": 1}]}, "rows.0.scores"),
                              ({"seed": [1]}, "seed")):  # fmt: skip
            file.write_text(json.dumps(content | change), encoding="utf-8")
            with pytest.raises(RecipeError, match=f"{file}: {place}"):
                read_json(file, Comparison)
        file.unlink()
        with pytest.raises(RecipeError, match=f"{file}: No such file"):
            read_json(file, Comparison)

    def test_a_recipe_stands_beside_its_own_tables(self, finished, monkeypatch, caplog) -> None:
        """Also where a comparison of another recipe was stopped before its first table."""
        folder, _ = finished
        before = {file: file.read_bytes() for file in (folder / "compare").iterdir()}
        settings, change = asked("merged", "grasp"), "controller.policy.ratio_max=0.7"

        def stop(*_: Any) -> None:
            raise Interrupted("stopped")

        with monkeypatch.context() as patched:
            patched.setattr(module._Work, "_advance", stop)
            with pytest.raises(Interrupted):
                compared(folder, settings, change)
        assert {file: file.read_bytes() for file in (folder / "compare").iterdir()} == before
        assert "the tables of another recipe" in caplog.text
        compared(folder, settings, change)
        assert "ratio_max: 0.7" in (folder / "compare/recipe.yaml").read_text(encoding="utf-8")
        caplog.clear()
        compared(folder, settings, change)
        assert "another recipe" not in caplog.text

    def test_a_process_that_is_behind_leaves_the_finished_table(self, tiny_workspace, monkeypatch) -> None:
        whole, _ = compared("compare", asked("zero_shot", seeds=(1, 2)))
        before = Path("compare/compare/compare.json").read_bytes()
        advance, done = module._Work._advance, []

        def stop(self: Any, batch: Any) -> None:
            if done:
                raise Interrupted("stopped")
            advance(self, batch)
            done.append(batch)

        with monkeypatch.context() as patched:
            patched.setattr(module._Work, "_advance", stop)
            with pytest.raises(Interrupted):
                compared("compare", asked("zero_shot", seeds=(1, 2)))
        assert Path("compare/compare/compare.json").read_bytes() == before
        assert compared("compare", asked("zero_shot", seeds=(1, 2)))[0] == whole
        compared("compare", asked("zero_shot", seeds=(1,)))  # another comparison has its own
        assert read_json(Path("compare/compare/compare.json"), Comparison).seeds == [1]

    def test_the_tables_are_shown_after_each_seed(self, tiny_workspace) -> None:
        shown = []
        compare(
            session_of(),
            Path("out"),
            asked("zero_shot", seeds=(1, 2)),
            lambda folder, it: shown.append((folder, it.seeds)),
        )
        assert shown == [(Path("out/compare"), [1]), (Path("out/compare"), [1, 2])]


class TestSteps:
    """What is on record is not done again, whoever did it."""

    def test_a_finished_comparison_does_nothing_again(self, finished) -> None:
        folder, comparison = finished
        again, recorder = compared(folder, SMALL)
        assert not recorder.did
        assert again == comparison

    def test_in_the_folder_of_a_run_it_trains_only_what_the_run_did_not(self, finished_run) -> None:
        before = {file: file.read_bytes() for file in finished_run.glob("*.*")}
        comparison, recorder = compared(
            finished_run, asked("source_only", "target_only", "merged", "adaptive_merge", "grasp", seeds=(42,))
        )
        assert recorder.trained == ["final-0.00"]
        assert {"source", "target", "controller"} <= set(recorder.repeated)
        assert {file: file.read_bytes() for file in finished_run.glob("*.*")} == before
        systems = read(finished_run / "metrics.json")["systems"]
        for method, system in (("source_only", "source"), ("target_only", "target"), ("grasp", "grasp")):
            for name in ("exact_match", "rougeL"):
                score: Any = row_of(comparison, method).scores[name]
                assert score.mean == systems[system]["metrics"][name]

    def test_a_run_in_the_folder_of_a_comparison_trains_nothing(self, finished_run) -> None:
        compared("both", asked("grasp", seeds=(42,)))
        recorder = Recorder()
        run_tiny(folder="both", progress=recorder)
        assert recorder.trained == ["final-0.00"]  # the twin, which is no method of the comparison
        for name in ("adapter", "source", "target", "merged"):
            assert weights_in(Path("both", name)) == weights_in(finished_run / name)

    @pytest.mark.parametrize("deliver", ["best", "grasp"])
    def test_what_a_run_hands_over_is_a_row_that_trains_nothing_anew(self, deliver, tiny_workspace) -> None:
        metrics = run_tiny(f"final.deliver={deliver}", folder="both").metrics
        comparison, recorder = compared("both", asked("delivered", seeds=(42,)), f"final.deliver={deliver}")
        assert not recorder.did
        row, delivered = row_of(comparison, "delivered"), metrics.systems[metrics.delivered.name]
        scores: Any = row.scores
        assert (scores["test_loss"].mean, scores["rougeL"].mean) == (delivered.test_loss, delivered.metrics["rougeL"])
        assert row.taken == f"{metrics.delivered.title} (42)"
        assert (metrics.delivered.name == "grasp") == (deliver == "grasp")
        assert (row.prune_ratio is not None) == (deliver == "grasp")

    def test_each_seed_counts_where_several_hand_over_the_same_adapter(self, tiny_workspace, monkeypatch) -> None:
        def named(steps: Steps, *_: Any) -> tuple[str, str]:
            return ("target" if steps.recipe.seed == 2 else "source"), "It is."

        monkeypatch.setattr("grasp_lora.engine.deliver.expected", named)
        comparison, _ = compared(
            "compare", asked("source_only", "target_only", "delivered", seeds=(1, 2, 3)), "final.deliver=best"
        )
        scores: Any = {row.method: row.scores["test_loss"].values for row in comparison.rows}  # type: ignore[union-attr]
        assert scores["source_only"] == scores["source_only"][:1]  # one adapter for all seeds
        assert scores["delivered"] == [*scores["source_only"], scores["target_only"][1], *scores["source_only"]]
        delivered = row_of(comparison, "delivered")
        assert delivered.taken == "the source adapter as it is (1, 3); the target adapter (2)"
        assert delivered.cost is not None
        assert delivered.cost.runs_in_all == 5  # all that it was chosen from, though the adapter is the work of one


class FakeSteps(Steps):
    """Losses by ratio that no training gave: the best ratio differs from split to split."""

    LOSSES: ClassVar = {0.2: 1.0, 0.6: 2.0, 0.8: 3.0}

    def __init__(self) -> None:
        self.grid = tuple(self.LOSSES)
        self.splits: Any = SimpleNamespace(test=[None])
        self.recipe: Any = None

    def parents(self, *, in_paper: bool = False) -> Any:
        return SimpleNamespace(merged=Adapter("merged", lambda: AdapterWeights({})))

    def finetune(self, start: Any, prune_ratio: float, stage: Any = None) -> Any:
        made: Any = SimpleNamespace(result=SimpleNamespace(dev_loss=self.LOSSES[prune_ratio]), key=str(prune_ratio))
        return Adapter(str(prune_ratio), lambda: AdapterWeights({}), made, (made,))


class TestMethods:
    def test_a_grid_chooses_on_dev_and_costs_all_its_runs(self) -> None:
        outcome = METHODS["grid"].run(FakeSteps())
        assert (outcome.prune_ratio, outcome.chosen_on, outcome.adapter.key) == (0.2, "dev", "0.2")
        assert len(outcome.adapter.trail) == 3
        assert outcome.curve == FakeSteps.LOSSES

    def test_a_grid_measures_no_test_row_at_the_ratios_that_it_leaves(self, tiny_workspace) -> None:
        for method in ("grid_paper", "grid"):
            comparison, _ = compared("compare", asked(method, grid=(0.2, 0.6)))
            assert not step_folders("compare", "test-losses")
        assert [point.prune_ratio for point in comparison.curve] == [0.2, 0.6]
        assert all(point.dev for point in comparison.curve)

    def test_a_grid_goes_on_without_a_ratio_whose_run_fails(self, tiny_workspace, monkeypatch) -> None:
        finetune = Steps.finetune

        def fail(self: Steps, start: Any, prune_ratio: float, *more: Any) -> Any:
            if prune_ratio == 0.6:
                raise ProbeError("it diverges")
            return finetune(self, start, prune_ratio, *more)

        monkeypatch.setattr(Steps, "finetune", fail)
        comparison, _ = compared("compare", asked("grid", grid=(0.2, 0.6)))
        ratio: Any = row_of(comparison, "grid").prune_ratio
        assert ratio.mean == 0.2
        assert comparison.warnings == [
            f"{METHODS['grid'].title}, seed 1, is without ratio 0.6, whose run failed: it diverges"
        ]

    def test_a_grid_whose_runs_look_at_no_dev_rows_measures_them_and_goes_on_where_that_fails(
        self, tiny_workspace, monkeypatch
    ) -> None:
        losses = Steps.losses

        def fail(self: Steps, adapter: Any, split: str) -> Any:
            if split == "dev" and adapter.made and adapter.made.name == "final-0.60":
                raise ProbeError("a loss is not finite")
            return losses(self, adapter, split)

        monkeypatch.setattr(Steps, "losses", fail)
        endless = "final.training.patience=null"
        comparison, _ = compared("compare", asked("grid", grid=(0.2, 0.6)), endless)
        ratio: Any = row_of(comparison, "grid").prune_ratio
        assert ratio.mean == 0.2
        assert "is without ratio 0.6, whose run failed: a loss is not finite" in comparison.warnings[0]
        adapter, dev_loss = steps_of(endless).judged(steps_of(endless).continued())
        assert adapter.trail[-1].name == "dev-losses"
        assert dev_loss == adapter.trail[-1].result.mean

    @pytest.mark.parametrize("name", ["demo-ar", "mlqa-ar", "xlsum-zh", "llama3-8b-mlqa-ar"])
    def test_the_papers_controller_is_run_as_its_authors_do(self, name) -> None:
        recipe, _ = load_recipe(name)
        policy, paper = recipe.controller.policy, methods._paper_controller(recipe)
        assert (type(paper.policy), paper.rule, paper.rounds) == (PaperPolicy, "best_reward", Rounds(10))
        assert (paper.policy.ratio_min, paper.policy.ratio_max) == (policy.ratio_min, policy.ratio_max)
        assert paper.training == recipe.controller.training

    def test_the_papers_rows_have_its_setting_in_any_recipe(self, tiny_workspace) -> None:
        steps = steps_of("merge.dropout=0.3", "merge.weights=[0.7, 0.3]")
        changed, parents = methods._in_paper(steps)
        recipe = changed.recipe
        assert (recipe.merge.rule, recipe.merge.weights, recipe.dropout) == ("paper_apart", None, 0.0)
        assert (recipe.final.mode, recipe.final.training.max_grad_norm) == ("reselect", 0.0)
        assert (recipe.controller.training.max_grad_norm, recipe.controller.training.batch_size) == (0.0, 1)
        assert parents.merged.key != steps.parents().merged.key
        assert [one.key for one in parents.named.values()] == [one.key for one in steps.parents().named.values()]

    def test_the_planned_comparisons_get_the_verdicts(self) -> None:
        settings = ComparisonSettings(methods=("joint",), planned=("paper",))
        assert settings.reference == "grasp_paper"
        assert settings.names == ["target_only", "joint", "adaptive_merge", "grid_paper", "grasp_paper"]
        assert settings.planned_against(settings.names) == ["target_only", "adaptive_merge", "grid_paper"]
        assert ComparisonSettings(**settings.model_dump()) == settings
        assert asked("grasp", "joint", "merged").planned_against(["joint", "merged"]) == ["joint"]

    def test_joint_trains_on_as_many_rows_of_both_languages_and_keeps_the_best_of_four_looks(
        self, tiny_workspace
    ) -> None:
        halves = steps_of("target.training.epochs=1").joint()  # 12 rows of the source are more than the target's 10
        assert halves.made is not None
        assert halves.made.result.trained_examples == 10 + 10
        steps = steps_of("target.training.epochs=3", "source.training.patience=1", "source.training.learning_rate=0.5")
        trained = steps.joint()
        assert trained.made is not None
        result = trained.made.result
        assert result.trained_examples == 12 + 3 * 10  # the target rows once for each epoch of the target adapter
        looks = [row["dev_loss"] for row in result.history if "dev_loss" in row]
        assert len(looks) >= 1 + 4
        assert any(
            later > sooner for sooner, later in itertools.pairwise(looks[:-1])
        )  # where patience would have stopped
        assert min(looks) < looks[-1]
        assert result.dev_loss == min(looks)
        assert steps.losses(trained, "dev").result.mean == pytest.approx(result.dev_loss, rel=1e-5)

    def test_lorahub_finds_the_better_of_two_adapters_when_the_other_is_noise(self, tiny_workspace) -> None:
        steps = steps_of("target.training.epochs=6")
        good, draws = steps.target().weights, torch.Generator().manual_seed(0)
        noise = AdapterWeights({
            name: LoraPair(*(0.5 * torch.randn(t.shape, generator=draws) for t in (pair.A, pair.B)), pair.scaling)
            for name, pair in good.items()
        })  # fmt: skip
        tried = []

        def loss_at(weights: tuple[float, ...]) -> float:
            tried.append(weights)
            merged = merge([noise, good], MergeSettings("lorahub", weights), ("source", "target"))
            return fmean(steps._losses(merged, steps.splits.micro_dev))

        weights = lorahub.search_weights(loss_at, 2, seed=3)
        assert len(tried) == lorahub.BUDGET
        assert abs(weights[1]) > 3 * abs(weights[0])
        assert abs(weights[1]) > 0.3

    def test_what_cannot_run_here_says_why_in_its_row(self, finished_run, monkeypatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nevergrad" else find(name))
        given, counted = ("source.adapters=[run/source]", "data.source=null"), []
        monkeypatch.setattr(Recorder, "method", lambda self, title, number, total: counted.append((number, total)))
        comparison, recorder = compared("compare", asked("joint", "lorahub", "source_only"), *given)
        assert "source" not in recorder.did
        assert counted == [(1, 1)]  # the time left is that of what can run
        assert row_of(comparison, "source_only").unavailable is None
        assert "data.source" in (row_of(comparison, "joint").unavailable or "")
        assert "grasp-lora[compare]" in (row_of(comparison, "lorahub").unavailable or "")
        unequal = session_of(*given, "lora.rank=3")
        assert "equal ranks" in (METHODS["ties"].unavailable(unequal) or "")
        no_micro_dev = session_of("data.target.micro_dev=0", "controller.rounds.pool=dev")
        lacking = {name for name, method in METHODS.items() if method.unavailable(no_micro_dev)}
        assert lacking == {"lorahub", "grasp_paper"}
        assert "data.target.micro_dev is 0" in (METHODS["grasp_paper"].unavailable(no_micro_dev) or "")

    def test_several_given_sources_are_merged_for_the_source_only_row(self, finished_run) -> None:
        given = ("source.adapters=[run/source, run/target]", "data.source=null")
        comparison, _ = compared("compare", asked("source_only", "merged"), *given)
        assert all(row.unavailable is None for row in comparison.rows)

    def test_a_method_that_fails_says_why_and_the_others_go_on(self, tiny_workspace, monkeypatch) -> None:
        measure = Steps.measure

        def fail(self: Steps, adapter: Adapter, **_: Any) -> Any:
            if adapter.key == "backbone":
                raise AdapterError("no such luck")
            return measure(self, adapter)

        settings = asked("zero_shot", "target_only", "merged")
        with monkeypatch.context() as patched:
            patched.setattr(Steps, "measure", fail)
            comparison, _ = compared("compare", settings)
        row = row_of(comparison, "zero_shot")
        assert (row.failed, row.unavailable) == (True, "failed with seed 1: no such luck")
        assert [row.method for row in comparison.finished] == ["target_only", "merged"]
        assert len(compared("compare", settings)[0].finished) == 3


def examples_of(folder: str) -> int:
    """On how many examples the steps of a folder were trained."""
    return sum(read(step / "result.json").get("trained_examples", 0) for step in step_folders(folder, "*"))


class TestDoor:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"methods": ("grasp", "gird")}, "there is no method 'gird'; allowed: .*grasp"),
            ({"reference": "gird"}, "there is no method 'gird'"),
            ({"planned": ("grasp:gird",)}, "there is no method 'gird'"),
            ({"planned": ("grasp",)}, "planned is grasp; write FIRST:SECOND, .* or paper"),
            ({"planned": ("grasp:joint", "joint:grid")}, "with one FIRST in all of them, which is the reference"),
            ({"planned": ("paper",), "reference": "grasp"}, "which is the reference"),
            ({"methods": ()}, "methods.*at least 1"),
            ({"folds": 3, "seeds": (1, 2)}, "folds are compared with one seed, but seeds has 2"),
        ],
    )
    def test_settings_that_make_no_sense_are_refused(self, settings, message) -> None:
        with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
            ComparisonSettings(**settings)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (("data.target.test=0",), r"needs a test split, but it has 0 examples \(data.target.test\)"),
            (("controller.rounds.every=99",), "so no round follows a step"),
            (("data.source=null",), "there is no source"),
        ],
    )
    def test_a_recipe_that_cannot_be_compared_is_refused_and_nothing_is_written(
        self, tiny_workspace, changes, message
    ) -> None:
        with pytest.raises(RecipeError, match=message):
            compared("compare", asked("target_only", "grasp"), *changes)
        assert not Path("compare").exists()

    @pytest.mark.parametrize("on", ["null", "source"])
    def test_what_it_costs_at_most_is_said_beforehand_and_is_what_is_trained_where_nothing_stops_early(
        self, on: str, tiny_workspace
    ) -> None:
        endless = [f"{stage}.training.patience=null" for stage in ("source", "target", "controller", "final")]
        names = (
            "source_only",
            "target_only",
            "continued",
            "joint",
            "adaptive_merge",
            "grid",
            "grid_paper",
            "grasp",
            "delivered",
        )
        asked_for = asked(*names, "grasp_paper", seeds=(1, 2), grid=(0.2, 0.7))
        _, recorder = compared("out", asked_for, *endless, f"target.on={on}", "final.deliver=best")
        told = re.search(
            r"trains on at most (\d+) examples, and 10 methods answer 8 test prompts with each seed", recorder.notes[0]
        )
        assert told is not None
        assert examples_of("out") == int(told[1])
        given = (
            *endless,
            f"target.on={on}",
            "final.deliver=best",
            "final.prune_ratio=0.3",
            "target.training.epochs=3",
            "source.training.epochs=2",
        )
        _, recorder = compared("given", asked("joint", "grasp", "delivered"), *given)
        assert examples_of("given") == int(re.findall(r"at most (\d+)", recorder.notes[0])[0])

    def test_a_given_ratio_is_not_learned(self, tiny_workspace) -> None:
        comparison, recorder = compared(
            "out", asked("grasp", "delivered", seeds=(42,)), "final.prune_ratio=0.9", "controller.rounds.every=99"
        )
        ratios = [row_of(comparison, name).prune_ratio for name in ("grasp", "delivered")]
        assert [ratio.mean for ratio in ratios] == [
            0.9,
            0.9,
        ]  # the recipe hands over the final run's result in any case
        assert "controller" not in recorder.did


class TestGoingOn:
    def test_one_stopped_inside_trainings_goes_on_to_the_same_bits(self, tiny_workspace, monkeypatch) -> None:
        monkeypatch.setattr(checkpoints, "LEAST_STEPS", 1)
        signals, settings, taken = (4, 9, 30), asked(*FEW, grid=(0.2, 0.6)), 0

        def count(*_: Any) -> None:
            nonlocal taken
            taken += 1
            if taken in signals:
                os.kill(os.getpid(), signal.SIGTERM)

        handle = register_optimizer_step_post_hook(count)
        try:
            for _ in signals:
                with pytest.raises(Interrupted, match=r"stopped by SIGTERM at .* step"):
                    compared("one", settings)
                assert list(Path("one/store").glob("*/work/*/manifest.json"))
            comparison, _ = compared("one", settings)
            stopped = taken
            whole, _ = compared("other", settings)
        finally:
            handle.remove()
        assert taken - stopped == stopped  # no step was taken twice
        assert without_seconds(comparison) == without_seconds(whole)
        for file in Path("other/store").rglob("*.safetensors"):
            assert file.read_bytes() == Path("one", file.relative_to("other")).read_bytes()

    def test_what_another_process_is_at_is_left_aside_until_it_is_done(self, tiny_workspace, monkeypatch) -> None:
        """The other methods go on meanwhile, and the step of the other process is taken from the store."""
        compared("elsewhere", asked("target_only"))
        [target] = step_folders("elsewhere", "target")
        order: list[str] = []

        class Watch(Progress):
            def finished(self, step: Any) -> None:
                order.append(step.name)

        held = claim(Path("compare/store", target.name), wait=False)

        def done_by_the_other(_: float) -> None:
            order.append("waits")
            shutil.copytree(target, Path("compare/store", target.name))
            held.__exit__(None, None, None)

        monkeypatch.setattr(module.time, "sleep", done_by_the_other)
        Path("compare/store").mkdir(parents=True)
        held.__enter__()
        comparison = compare(session_of(progress=Watch()), Path("compare"), asked("target_only", "continued"))
        assert [row.unavailable for row in comparison.rows] == [None, None]
        assert order.index("final-0.00") < order.index("waits") < order.index("target")
        assert order.count("waits") == 1


def test_the_guide_has_each_method_with_its_title() -> None:
    page = (Path(__file__).parents[2] / "docs/guide/compare.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    found: dict[str, str] = {}
    for names, titles, *_ in (row for row in rows if len(row) == 3):
        listed = re.findall(r"`(\w+)`", names)
        found |= zip(listed, titles.split(", ") if len(listed) > 1 else [titles], strict=True)
    assert found == {name: method.title for name, method in METHODS.items()}
