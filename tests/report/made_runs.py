"""One real run of the tests' recipe, and small changes of it that a test can name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tiny_workspace

from grasp_lora.engine.comparison import Against, Comparison, ComparisonSettings, Cost, CurvePoint, MeanAndSd, MethodRow
from grasp_lora.engine.differences import differences
from grasp_lora.engine.methods import METHODS
from grasp_lora.engine.results import Prediction
from grasp_lora.engine.run import run as run_engine
from grasp_lora.engine.run_folder import Run
from grasp_lora.engine.session import Session
from grasp_lora.recipes.load import load_recipe
from grasp_lora.recipes.recipe import Recipe

SYSTEMS = ("source", "target", "merged", "grasp")
PLANNED = ("continued", "grid")  # against GRASP
CURVE = ((0.1, 0.1, 0.0, 0.2), (0.4, 0.0, 0.0, 0.0), (0.8, 0.2, 0.1, 0.3))


@pytest.fixture(scope="session", name="whole_run")
def fixture_whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path) -> tuple[Run, Path]:
    """A run of `tiny.yaml` and its folder; treat it as read-only."""
    recipe = write_tiny_workspace(tmp_path_factory.mktemp("report") / "work", tiny_backbone_folder)
    folder = recipe.parent / "run"
    return run_engine(Session(*load_recipe(recipe, [])), folder), folder


@pytest.fixture(name="run")
def fixture_run(whole_run: tuple[Run, Path]) -> Run:
    """The same with a learned ratio and with scores that a test can name; the backbone alone is left out."""
    losses = zip((0.910, 0.932, 0.877, 0.857), (0.891, 0.875, 0.829, 0.822), strict=True)
    scores = zip((38.1, 35.0, 42.1, 43.2), (21.0, 20.0, 26.0, 26.0), strict=True)
    base, _ = whole_run
    systems = {
        name: replace(
            base.metrics.systems[name], test_loss=test, dev_loss=dev, metrics={"f1": f1, "exact_match": exact}
        )
        for name, (test, dev), (f1, exact) in zip(SYSTEMS, losses, scores, strict=True)
    }
    predictions = {name: base.predictions[name] for name in SYSTEMS}
    named = with_metrics(replace(base, predictions=predictions), systems=systems, signatures={"f1": "refs:best"})
    return with_estimate(named, ratio=0.462, low=0.384, high=0.549, curve=CURVE)


def with_metrics(run: Run, **changes: Any) -> Run:
    return replace(run, metrics=replace(run.metrics, **changes))


def compared_anew(run: Run) -> Run:
    """What is delivered, compared once more with the other systems, whose answers or scores a test has changed."""
    scores = {name: system.metrics for name, system in run.metrics.systems.items()}
    found = differences(run.metrics.delivered.name, scores, run.predictions, run.data.test_groups)
    return with_metrics(run, differences=found)


def with_delivered(run: Run, **changes: Any) -> Run:
    return with_metrics(run, delivered=replace(run.metrics.delivered, **changes))


def with_scores(run: Run, **scores: Mapping[str, float | None]) -> Run:
    """Other scores of some systems."""
    systems = run.metrics.systems
    return with_metrics(
        run, systems={**systems, **{name: replace(systems[name], metrics=of) for name, of in scores.items()}}
    )


def with_estimate(run: Run, **changes: Any) -> Run:
    assert run.learned is not None
    estimate = replace(run.learned.result.estimate, **changes)
    learned = replace(run.learned, result=run.learned.result.model_copy(update={"estimate": estimate}))
    return with_metrics(replace(run, learned=learned), prune_ratio=estimate.ratio)


def with_rounds(run: Run, change: Callable[[int], Mapping[str, Any]]) -> Run:
    """Other facts of each round, by its number from 0."""
    assert run.learned is not None
    rounds = [{**row, **change(number)} for number, row in enumerate(run.learned.result.rounds)]
    return replace(run, learned=replace(run.learned, result=run.learned.result.model_copy(update={"rounds": rounds})))


def with_recipe(run: Run, **sections: Mapping[str, Any]) -> Run:
    """Other keys of some sections of the recipe."""
    return replace(run, recipe=Recipe.model_validate(_merged(run.recipe.model_dump(mode="json"), sections)))


def _merged(content: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(content[key], part)
        for key, part in changes.items()
        if isinstance(part, Mapping) and content.get(key)
    }
    return {**content, **changes, **both}


def with_report(run: Run, **facts: Any) -> Run:
    """Other facts of the data."""
    return replace(run, data=replace(run.data, report={**run.data.report, **facts}))


def with_info(run: Run, **facts: Any) -> Run:
    return replace(run, info=replace(run.info, **facts))


def with_discarded(run: Run, *folders: str) -> Run:
    """Trainings of which no step was kept, by their folders; one that is missing is made up of the final run."""
    adapters = dict(run.adapters)
    for name in folders:
        adapter = adapters.get(name, adapters["final"])
        assert adapter.made is not None
        made = replace(adapter.made, result=adapter.made.result.model_copy(update={"best_step": 0}))
        adapters[name] = replace(adapter, made=made)
    return with_metrics(replace(run, adapters=adapters), **{"best_step": 0} if "final" in folders else {})


def with_kept(run: Run, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Run:
    """Other counts of kept weights in GRASP's result, from each row of them."""
    final = run.adapters["final"]
    assert final.made is not None
    kept = [{**row, **change(row)} for row in final.made.result.kept]
    made = replace(final.made, result=final.made.result.model_copy(update={"kept": kept}))
    return replace(run, adapters={**run.adapters, "final": replace(final, made=made)})


def answered(run: Run, system: str, change: Callable[[int], Mapping[str, Any]]) -> Run:
    """Other answers of a system, by the place of the row."""
    rows: Sequence[Prediction] = [replace(row, **change(place)) for place, row in enumerate(run.predictions[system])]
    return replace(run, predictions={**run.predictions, system: rows})


def compared(method: str, f1: float, loss: float, reference: tuple[float, float] = (43.2, 0.857)) -> MethodRow:
    """A row of a comparison over three seeds; what the reference leads by is known to a point, or to a hundredth."""
    against = {}
    for metric, value, ours, reach in (("test_loss", loss, reference[1], 0.01), ("f1", f1, reference[0], 1.0)):
        gain = ours - value
        verdict = "better" if (gain if metric == "f1" else -gain) > reach else "no difference shown"
        against[metric] = Against(
            difference=gain, low=gain - reach, high=gain + reach, confidence=0.95, examples=100, resamples=1000,
            comparisons=3, higher_is_better=metric == "f1", verdict=verdict if method in PLANNED else None,
        )  # fmt: skip
    grid = 8 if method.startswith("grid") else 1
    pruned = method in ("grasp", "grid")
    return MethodRow(
        method=method,
        title=METHODS[method].title,
        unavailable=None,
        failed=False,
        merges=METHODS[method].merges,
        seeds=3,
        scores={name: MeanAndSd(mean=value, sd=0.01, values=[value] * 3) for name, value in (("test_loss", loss), ("f1", f1))},
        prune_ratio=MeanAndSd(mean=0.4, sd=0.1, values=[0.3, 0.4, 0.5]) if pruned else None,
        chosen_on={"grasp": "micro_dev", "grid": "dev"}.get(method),
        cost=Cost(runs=grid, seconds=10 * grid, work=100 * grid, runs_in_all=grid + 2, seconds_in_all=10 * grid + 20,
                  work_in_all=100 * grid + 200),
        against={} if method == "grasp" else against,
    )  # fmt: skip


@pytest.fixture(name="comparison")
def fixture_comparison() -> Comparison:
    """A comparison of five methods over three seeds, of which one could not be run."""
    figures = {"continued": (40.0, 0.87), "merged": (42.1, 0.877), "grid": (43.0, 0.86), "grasp": (43.2, 0.857)}
    rows = [compared(method, *scores) for method, scores in figures.items()]
    places = [(seed, ratio) for seed in (42, 1337, 9001) for ratio in (0.2, 0.6)]
    missing = MethodRow(method="lorahub", title="LoRAHub", unavailable="needs nevergrad", failed=False, merges=True)
    return Comparison(
        name="demo", recipe_hash="4f1e", settings=ComparisonSettings(methods=("continued", "lorahub", "merged", "grid", "grasp"), resamples=1000),
        backbone="tiny", language="de", seeds=[42, 1337, 9001], test_examples=100, dev_examples=6, stops_early=True,
        micro_dev_examples=4, metrics=["test_loss", "f1"],
        signatures={"f1": "refs:best"}, rows=[rows[0], missing, *rows[1:]],
        curve=[CurvePoint(seed=seed, prune_ratio=ratio, dev=1.0 + ratio) for seed, ratio in places],
        warnings=[], made_with=[{"device": "cpu"}],
    )  # fmt: skip
