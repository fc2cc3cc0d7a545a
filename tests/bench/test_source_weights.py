"""`target.source_weights`: the rows that choose give the source adapter its weight in the sum."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from recorder import Recorder

from grasp_lora import api
from grasp_lora.bench.checks import check
from grasp_lora.bench.outcomes import mean_loss
from grasp_lora.bench.session import Session
from grasp_lora.bench.source_weight import nearest_to_whole
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import Store
from grasp_lora.models.reading import read_adapter
from grasp_lora.recipes.load import load_recipe

ON = "target.on=source"
WEIGHTS = (0.3, 0.6, 1.0)
TRIED = f"target.source_weights={list(WEIGHTS)}"


def bench_of(*overrides: str) -> Bench:
    session = Session(*load_recipe("tiny.yaml", overrides))
    check(session)
    return Bench(session, session, Store(Path("store")))


def losses(bench: Bench, weight: float) -> list[float]:
    """The losses of the rows that choose, at a weight, measured in a bench that tries this one alone."""
    merged = bench_of(ON, f"target.source_weights=[{weight}]").merged()
    return [loss for split in ("dev", "micro_dev") for loss in bench.losses(merged, split).result["losses"]]


def test_the_losses_on_dev_and_micro_dev_choose_the_weight(tiny_workspace: Path) -> None:
    bench = bench_of(ON, TRIED)
    splits = bench.session.splits
    means = {weight: fmean(losses(bench, weight)) for weight in WEIGHTS}
    assert len(losses(bench, 1.0)) == len(splits.dev) + len(splits.micro_dev)
    assert len(set(means.values())) == len(WEIGHTS)
    assert {weight: mean_loss(tried) for weight, tried in bench.source_weights.items()} == means
    assert bench.source_weight == nearest_to_whole({weight: losses(bench, weight) for weight in WEIGHTS})


def test_the_weight_nearest_to_1_is_taken_unless_the_rows_clearly_say_less() -> None:
    base = [1.0, 2.0, 3.0, 4.0]

    def with_mean(shift: float, spread: float) -> list[float]:
        """Losses whose paired difference to the base has this mean and twice this spread as its standard error."""
        return [own + shift + spread * sign for own, sign in zip(base, (1, -1, 1, -1), strict=True)]

    error = 0.1 * (4 / 3) ** 0.5 / 2  # of four differences of 0.1 to both sides of their mean
    assert nearest_to_whole({0.6: base, 1.0: with_mean(1.01 * error, 0.1)}) == 0.6
    assert nearest_to_whole({0.6: base, 1.0: with_mean(0.99 * error, 0.1)}) == 1.0
    assert nearest_to_whole({0.4: base, 0.8: with_mean(0.99 * error, 0.1), 1.0: with_mean(1.01 * error, 0.1)}) == 0.8
    assert nearest_to_whole({0.6: with_mean(0.2, 0.0), 1.0: base}) == 1.0
    assert nearest_to_whole({0.8: base, 1.2: base}) == 1.2
    assert nearest_to_whole({0.8: base, 1.0: [math.nan] * 4}) == 0.8
    assert nearest_to_whole({0.6: [1.0], 1.0: [2.0]}) == 0.6  # one row has no error
    assert nearest_to_whole({}) == nearest_to_whole({0.5: [math.inf]}) == 1.0


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_source_adapter_is_in_the_sum_with_that_weight(weight: float, tiny_workspace: Path) -> None:
    bench = bench_of(ON, f"target.source_weights=[{weight}]")
    source, target = bench.source.weights, bench.target.weights
    for name, pair in bench.merged().weights.items():
        expected = weight * source[name].delta() + target[name].delta()
        torch.testing.assert_close(pair.delta(), expected, rtol=1e-5, atol=1e-7)


def test_several_source_adapters_share_the_weight(tiny_workspace: Path, finished_run: Path) -> None:
    given = ["data.source=null", f"source.adapters=[{finished_run / 'source'},{finished_run / 'target'}]"]
    bench = bench_of(ON, "target.source_weights=[0.5]", *given)
    first, second = (one.weights for one in bench.sources)
    for name, pair in bench.merged().weights.items():
        expected = 0.25 * first[name].delta() + 0.25 * second[name].delta() + bench.target.weights[name].delta()
        torch.testing.assert_close(pair.delta(), expected, rtol=1e-5, atol=1e-7)


def test_weight_1_alone_is_the_sum_as_it_was(tiny_workspace: Path) -> None:
    assert bench_of(ON, "target.source_weights=[1.0]").merged().key == bench_of(ON).merged().key
    assert bench_of(ON, "target.source_weights=[0.5]").merged().key != bench_of(ON).merged().key


def test_a_run_says_which_weight_it_took_and_at_what_losses(tiny_workspace: Path, cli: Callable[..., Any]) -> None:
    result = cli("run", "tiny.yaml", "--set", ON, "--set", TRIED, "-o", "on")
    assert result.status == 0, result.err
    rows = [json.loads(line) for line in Path("on/merged/source_weights.jsonl").read_text("utf-8").splitlines()]
    assert [row["weight"] for row in rows] == list(WEIGHTS)
    [best] = [row for row in rows if row["taken"]]
    tried = ", ".join(f"{row['loss']:.3f} at {row['weight']:g}" for row in rows)
    said = f"{best['weight']:g}, chosen by the loss of the sum on the dev and micro-dev rows: {tried}"
    assert f"Weight of the source adapter: {said}" in Path("on/report.md").read_text(encoding="utf-8")
    assert said in Path("on/report.html").read_text(encoding="utf-8")
    assert f"source_weight {best['weight']:g}" in result.out + result.err
    bench = bench_of(ON, f"target.source_weights=[{best['weight']}]")
    for name, pair in read_adapter(Path("on/merged")).weights.items():
        torch.testing.assert_close(pair.delta(), bench.merged().weights[name].delta(), rtol=1e-5, atol=1e-7)


def test_a_run_without_it_says_nothing_of_weights(finished_run: Path) -> None:
    assert not (finished_run / "merged" / "source_weights.jsonl").exists()
    assert "Weight of the source adapter" not in (finished_run / "report.md").read_text(encoding="utf-8")


def test_the_measurements_count_in_the_cost_of_what_rests_on_them(tiny_workspace: Path) -> None:
    few: dict[str, Any] = {"methods": ("merged", "grasp"), "seeds": (42,)}
    plain = {row.method: row for row in api.compare("tiny.yaml", [ON], "both", **few)[1].rows}
    tried = {row.method: row for row in api.compare("tiny.yaml", [ON, TRIED], "both", **few)[1].rows}
    splits = bench_of(ON).session.splits
    rows = len(WEIGHTS) * (len(splits.dev) + len(splits.micro_dev))
    assert tried["merged"].cost.work_in_all - plain["merged"].cost.work_in_all == rows


def test_rows_without_a_dev_set_take_the_source_adapter_whole(tiny_workspace: Path) -> None:
    tried, plain = bench_of(ON, TRIED, "data.target.micro_dev=4"), bench_of(ON, "data.target.micro_dev=4")
    assert tried.merged(dev_free=True).key == plain.merged(dev_free=True).key


def test_the_last_training_on_all_rows_keeps_the_weight(tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[float, ...]] = []
    merge = Session.merge

    def noted(self: Session, adapters: Any, names: Any, settings: Any) -> Any:
        given.append(settings.weights)
        return merge(self, adapters, names, settings)

    monkeypatch.setattr(Session, "merge", noted)
    result = api.run("tiny.yaml", [ON, "target.source_weights=[0.6]", "final.all_rows=true"], "again")
    assert result.metrics.handed_over == "all_rows"
    assert len(given) > 1
    assert set(given) == {(0.6, 1.0)}


def test_a_dry_run_counts_the_measurements_and_knows_no_weight(tiny_workspace: Path) -> None:
    given: dict[str, Any] = {"methods": ("merged", "grasp"), "seeds": (42,)}
    api.compare("tiny.yaml", [ON], "planned", **given)  # whose steps rest on weight 1
    plan = api.plan("tiny.yaml", [ON, TRIED], "planned", **given)
    left = [record.step for record, there in plan.steps if not there]
    assert sum(step in ("dev losses", "micro_dev losses") for step in left) == 2 * len(WEIGHTS)
    assert "controller" in left
    recorder = Recorder()
    api.compare("tiny.yaml", [ON, TRIED], "planned", recorder, **given)
    again = api.plan("tiny.yaml", [ON, TRIED], "planned", **given)
    assert all(there for _, there in again.steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((TRIED,), "source_weights belongs to on: source, but on is null"),
        ((ON, "target.source_weights=[]"), "source_weights is []; give weights between 0 and 2, or null"),
        ((ON, "target.source_weights=[0.5, 2.5]"), "source_weights is [0.5, 2.5]; give weights between 0 and 2"),
        ((ON, "target.source_weights=[.nan]"), "source_weights"),
        (
            (ON, TRIED, "data.target.dev=0"),
            "target.source_weights chooses by the dev loss, but there are no dev examples",
        ),
    ],
)
def test_what_contradicts_it_is_refused(changes: tuple[str, ...], message: str, refused: Callable[..., None]) -> None:
    refused("run", [part for one in changes for part in ("--set", one)], message)


def test_the_key_counts_in_a_recipes_hash_only_where_it_is_set(tiny_workspace: Path) -> None:
    plain, said, asked = (
        load_recipe("tiny.yaml", [ON, *one])[0] for one in ((), ["target.source_weights=null"], [TRIED])
    )
    assert plain.fingerprint() == said.fingerprint() != asked.fingerprint()
