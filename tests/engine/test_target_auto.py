"""`target.on: auto`: the target adapter is trained both ways, and the merge with the lower dev loss goes on."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from grasp_lora.engine.checks import check
from grasp_lora.report.run_record import read_run
from recorder import Recorder

from grasp_lora import api
from grasp_lora.engine.preflight import preflight
from grasp_lora.engine.run_folder import Delivered, TargetOn
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Bench
from grasp_lora.engine.store import Store
from grasp_lora.errors import ProbeError, RecipeError
from grasp_lora.recipes.load import load_recipe
from grasp_lora.report.delivered import where_trained

AUTO = "target.on=auto"
# With these the sum has the lower dev loss: a target adapter that has learned little leaves the average half of the source's.
SUM = (AUTO, "target.training.learning_rate=1e-5", "source.training.epochs=4")
# The average halves a source adapter that has gone astray.
AVERAGE = (AUTO, "source.training.learning_rate=0.2", "source.training.epochs=3")
BOTH = pytest.mark.parametrize(("changes", "on"), [(SUM, "source"), (AVERAGE, None)])


def bench_of(*overrides: str) -> Bench:
    session = Session(*load_recipe("tiny.yaml", overrides))
    check(session)
    return Bench(session, session, Store(Path("store")))


def metrics_of(folder: str) -> dict[str, Any]:
    return dict(json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8")))


def without_choice(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name != "target_on"}


@pytest.mark.parametrize(
    ("sources", "said"),
    [(1, "the sum of both adapters has a dev loss of 1.000 (9 rows), the average 2.000."),
     (2, "the sum of the mean source adapter and the target adapter has a dev loss of 1.000 (9 rows), the average of all "
         "2.000.")],
)  # fmt: skip
def test_what_was_merged_is_named_by_the_number_of_source_adapters(sources: int, said: str) -> None:
    found = TargetOn(on="source", splits=["dev"], examples=9, losses={"apart": 2.0, "source": 1.0})
    assert where_trained(found, sources).endswith(said)


@BOTH
def test_a_run_goes_on_with_the_merge_of_the_lower_dev_loss(
    changes: tuple[str, ...], on: str | None, tiny_workspace: Path, cli: Any
) -> None:
    assert cli("run", "tiny.yaml", *(part for one in changes for part in ("--set", one)), "-o", "auto").status == 0
    found = api.run("tiny.yaml", changes, "auto").metrics.target_on  # which is finished
    assert found is not None
    assert (found.on, found.splits, found.examples) == (on, ["dev", "micro_dev"], 10)
    assert (found.losses["source"] < found.losses["apart"]) == (on == "source")
    fixed = [AUTO.replace("auto", "source" if on else "null"), *changes[1:]]
    api.run("tiny.yaml", fixed, "fixed")
    assert without_choice(metrics_of("auto")) == metrics_of("fixed")
    for name in ("adapter", "merged"):
        weights = [Path(folder, name, "adapter_model.safetensors").read_bytes() for folder in ("auto", "fixed")]
        assert weights[0] == weights[1]
    assert Path("auto/target/adapter_model.safetensors").exists() == (on is None)
    said = Path("auto/report.md").read_text(encoding="utf-8")
    assert f"{found.losses['source']:.3f}" in said
    assert ("The one on top of the source adapter was taken" in said) == (on == "source")


def test_the_losses_are_those_of_the_merges_before_any_pruning(tiny_workspace: Path) -> None:
    bench = bench_of(*SUM)
    found = bench.decided.target_on
    assert found is not None
    for name, on in (("apart", "null"), ("source", "source")):
        own = bench_of(f"target.on={on}", *SUM[1:])
        losses = [loss for split in ("dev", "micro_dev") for loss in own.losses(own.merged(), split).result["losses"]]
        assert found.losses[name] == pytest.approx(fmean(losses), rel=1e-9)


def test_without_dev_rows_micro_dev_decides_and_without_both_the_way_of_the_paper(tiny_workspace: Path) -> None:
    no_dev = ("data.target.dev=0", "final.training.patience=null")
    found = bench_of(*SUM, *no_dev).decided.target_on
    assert found is not None
    assert (found.splits, found.examples) == (["micro_dev"], 4)
    for few in (0, 1):  # a single row chooses nothing
        nothing = bench_of(*SUM, *no_dev, f"data.target.micro_dev={few}", "final.prune_ratio=0.5")
        found = nothing.decided.target_on
        assert nothing.decided.recipe.target.on is None
        assert found is not None
        assert (found.splits, found.losses) == ([], {})


def test_a_comparison_takes_the_steps_of_a_run_and_counts_both_trainings(tiny_workspace: Path) -> None:
    api.run("tiny.yaml", SUM, "auto")
    given: dict[str, Any] = {"methods": ("target_only", "continued", "merged", "grasp"), "seeds": (42,)}
    plan = api.plan("tiny.yaml", SUM, "planned", **given)
    recorder = Recorder()
    comparison = api.compare("tiny.yaml", SUM, "auto", recorder, **given)[1]
    rows = {row.method: row for row in comparison.rows}
    assert comparison.merge == "the sum (42)"
    assert not {"source", "target", "controller"} & set(recorder.did)
    alone = rows["target_only"].cost
    assert alone is not None
    assert alone.runs_in_all == 1  # nothing of the choice
    merged = rows["merged"].cost
    assert merged is not None
    steps = [json.loads(file.read_text(encoding="utf-8")) for file in Path("auto/store/records").glob("target-*.json")]
    assert len(steps) == 2
    assert merged.runs_in_all == 3  # the source adapter, and the target adapter both ways
    assert merged.runs == 1  # that which is not merged
    assert "by seed: the sum (42)" in Path("auto/compare/compare.md").read_text(encoding="utf-8")
    assert [record.step for record, _ in plan.steps].count("target") == 2


def test_a_dry_run_knows_what_a_run_has_chosen(tiny_workspace: Path) -> None:
    api.run("tiny.yaml", AVERAGE, "auto")
    plan = api.plan("tiny.yaml", AVERAGE, "auto", methods=("merged", "grasp"), seeds=(42,))
    assert all(there for _, there in plan.steps)


def test_a_comparison_says_which_merge_its_rows_rest_on_without_the_row_merged(tiny_workspace: Path) -> None:
    found = api.compare("tiny.yaml", SUM, "auto", methods=("grasp", "target_only"), seeds=(42,))[1]
    assert found.merge == "the sum (42)"
    assert any("trained on the backbone alone" in one for one in found.warnings)


@pytest.mark.parametrize(("fails", "on"), [("source", None), (None, "source")])
def test_a_way_that_fails_leaves_the_other_and_two_end_the_run(
    fails: str | None, on: str | None, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, failing = Bench.losses, {fails}

    def measure(self: Bench, *args: Any, **kwargs: Any) -> Any:
        if self.recipe.target.on in failing and self.target_on is None:
            raise ProbeError("the losses are not finite")
        return losses(self, *args, **kwargs)

    monkeypatch.setattr(Bench, "losses", measure)
    changes = (*SUM, "final.deliver=grasp")
    result = api.run("tiny.yaml", changes, "auto")
    found = result.metrics.target_on
    assert found is not None
    assert (found.on, list(found.losses)) == (on, ["source" if on else "apart"])
    assert "the other way failed: the losses are not finite" in Path("auto/report.md").read_text(encoding="utf-8")
    warnings = api.compare("tiny.yaml", changes, "auto", methods=("grasp",), seeds=(42,))[1].warnings
    assert [one for one in warnings if "the other way failed" in one]
    failing.add(on)
    with pytest.raises(ProbeError, match="not finite"):
        bench_of(*SUM).decided  # noqa: B018


def test_a_bench_that_has_not_decided_trains_no_target_adapter(tiny_workspace: Path) -> None:
    with pytest.raises(RecipeError, match="set source or null here"):
        bench_of(*SUM).target  # noqa: B018


@pytest.mark.parametrize("name", ["source", "grasp"])
def test_only_the_card_of_an_adapter_with_a_target_part_tells_of_the_choice(
    name: str, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Delivered(name=name, title="an adapter", why="It is said.")
    monkeypatch.setattr("grasp_lora.engine.run.choose", lambda *_: chosen)
    api.run("tiny.yaml", SUM, "auto")
    said = "The target adapter was trained both"
    assert said in Path("auto/report.md").read_text(encoding="utf-8")
    assert (said in Path("auto/adapter/README.md").read_text(encoding="utf-8")) == (name == "grasp")


def test_an_unfinished_run_knows_what_was_chosen_and_keeps_nothing_of_the_other_way(tiny_workspace: Path) -> None:
    api.run("tiny.yaml", SUM, "auto")
    record = read_run(Path("auto"))
    Path("auto/metrics.json").unlink()
    assert read_run(Path("auto")).systems["merged"] == record.systems["merged"] == "Target on source, not pruned"
    stale = [Path("auto/target/adapter_model.safetensors"), Path("auto/evaluation/target.jsonl")]
    for file in stale:
        file.write_bytes(b"")
    api.run("tiny.yaml", SUM, "auto")
    assert not [file for file in stale if file.exists()]
    assert Path("auto/target/history.jsonl").is_file()


def test_where_nothing_chose_the_report_speaks_of_the_average(tiny_workspace: Path) -> None:
    no_rows = ("data.target.dev=0", "data.target.micro_dev=0", "final.training.patience=null", "final.prune_ratio=0.5")
    api.run("tiny.yaml", (*SUM, *no_rows), "auto")
    assert read_run(Path("auto")).systems["merged"] == "Merged, not pruned"
    said = "There are too few dev and micro-dev rows to choose by, so the target adapter was trained on the backbone alone."
    assert said in Path("auto/report.md").read_text(encoding="utf-8")
    found = {one.topic: one.text for one in preflight(Session(*load_recipe("tiny.yaml", [*SUM, *no_rows])))}
    assert "it will be on the backbone alone" in found["target.on"]


def test_a_recipe_that_leaves_no_choice_is_refused(tiny_workspace: Path, cli: Any) -> None:
    result = cli("run", "tiny.yaml", "--set", AUTO, "--set", "merge.rule=ties")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "target.on is 'auto', so both adapters are added up as they are; remove merge.rule" in result.err
    given = cli("run", "tiny.yaml", "--set", AUTO, "--set", "target.adapter=nowhere")
    assert "on is 'auto', but an adapter is given, which was trained already" in given.err
    other = cli("run", "tiny.yaml", "--set", "target.on=both")
    assert "allowed: source, auto, or null for the backbone alone" in other.err


def test_check_counts_both_trainings_and_says_that_the_rows_choose(tiny_workspace: Path) -> None:
    found = {one.topic: one.text for one in reversed(preflight(Session(*load_recipe("tiny.yaml", [AUTO]))))}
    assert found["cost"].startswith("at most 52 training examples")  # 42 of the recipe, and the target's once more
    assert "choose which adapter you get" in found["advice"]
