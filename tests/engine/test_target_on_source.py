"""`target.on: source`: the target adapter is trained on top of the source adapter, and their merge is what was trained."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grasp_lora.engine.checks import check
from recorder import Recorder

from grasp_lora import api
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Bench
from grasp_lora.engine.store import Store
from grasp_lora.errors import Interrupted
from grasp_lora.models.adapters import attached
from grasp_lora.models.live import frozen_adapter
from grasp_lora.models.reading import read_adapter
from grasp_lora.recipes.load import load_recipe

ON = "target.on=source"
WEIGHTS = "adapter_model.safetensors"


def bench_of(*overrides: str) -> Bench:
    session = Session(*load_recipe("tiny.yaml", overrides))
    check(session)
    return Bench(session, session, Store(Path("store")))


def test_the_merge_is_the_model_that_was_trained(tiny_workspace: Path) -> None:
    bench = bench_of(ON)
    source, target, merged = bench.source.weights, bench.target.weights, bench.merged()
    for name, pair in merged.weights.items():
        torch.testing.assert_close(pair.delta(), source[name].delta() + target[name].delta(), rtol=1e-5, atol=1e-7)
    losses = bench.losses(merged, "dev").result["losses"]
    history = bench.target.records[-1].result
    assert sum(losses) / len(losses) == pytest.approx(history["dev_loss"], rel=1e-5)
    alone = bench.losses(bench.source, "dev").result["losses"]
    assert history["history"][0]["dev_loss"] == pytest.approx(
        sum(alone) / len(alone), rel=1e-5
    )  # a fresh one adds nothing
    assert history["dev_loss"] < sum(alone) / len(alone)


def test_what_lies_beneath_acts_as_the_adapter_itself_and_is_gone_after(
    tiny_workspace: Path, finished_run: Path
) -> None:
    session = bench_of().session
    model, weights = session.backbone.model, read_adapter(finished_run / "source").weights
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


def test_several_source_adapters_lie_beneath_as_their_mean(tiny_workspace: Path, finished_run: Path) -> None:
    given = ["data.source=null", f"source.adapters=[{finished_run / 'source'},{finished_run / 'target'}]"]
    bench = bench_of(ON, *given)
    first, second = (one.weights for one in bench.sources)
    for name, pair in bench.merged().weights.items():
        mean = (first[name].delta() + second[name].delta()) / 2
        torch.testing.assert_close(
            pair.delta(), mean + bench.target.weights[name].delta(), rtol=1e-5, atol=1e-7
        )  # fmt: skip


def test_a_run_leaves_no_adapter_that_does_nothing_alone(tiny_workspace: Path, cli: Callable[..., Any]) -> None:
    result = cli("run", "tiny.yaml", "--set", ON, "--set", "final.deliver=best", "-o", "on")
    assert result.status == 0, result.err
    metrics = json.loads(Path("on/metrics.json").read_text(encoding="utf-8"))
    assert list(metrics["systems"]) == ["zero_shot", "source", "merged", "continued", "grasp"]
    assert [file.name for file in Path("on/target").iterdir()] == ["history.jsonl"]
    assert cli("predict", "on/merged", "source 1: what?").status == 0
    refused = cli("predict", "on/target", "source 1: what?")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert cli("status", "on").status == 0
    for file in ("on/report.md", "on/report.html", "on/adapter/README.md"):
        assert Path(file).is_file()
    report = Path("on/report.md").read_text(encoding="utf-8")
    assert "| Target on source, not pruned |" in report
    assert "Target only" not in report
    assert " for the source adapter continued" in report.split("## How good")[0]
    assert "Merged" not in report


def test_the_verdict_asks_whether_the_sum_is_ahead_of_the_source_adapter(tiny_workspace: Path) -> None:
    few = [ON, "final.deliver=best", "data.target.dev=5"]
    said = api.run("tiny.yaml", few, "on").delivered
    assert said is not None
    assert said.name == "grasp"
    assert "The target adapter on top of the source adapter is ahead of the source adapter alone" in said.why
    assert "the merge" not in said.why


def test_a_run_that_is_stopped_in_the_training_goes_on_to_the_same_bits(
    tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = api.run("tiny.yaml", [ON], "whole")
    finetune = Session.finetune

    def stopped(self: Session, *given: Any, **more: Any) -> Any:
        if given[4] == "target":
            os.kill(os.getpid(), signal.SIGTERM)
        return finetune(self, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "finetune", stopped)
        with pytest.raises(Interrupted, match=r"target.* step 1; run the same command again"):
            api.run("tiny.yaml", [ON], "again")
    assert api.run("tiny.yaml", [ON], "again").metrics == whole.metrics
    assert Path("again/adapter", WEIGHTS).read_bytes() == Path("whole/adapter", WEIGHTS).read_bytes()


def test_the_last_training_on_all_rows_lies_on_the_source_adapter_too(tiny_workspace: Path) -> None:
    result = api.run("tiny.yaml", [ON, "final.all_rows=true"], "again")
    assert result.metrics.all_rows is not None
    assert set(result.metrics.all_rows.steps) == {"target", "grasp"}
    assert result.metrics.handed_over == "all_rows"


def test_the_rows_of_the_paper_are_what_they_are_without_it(tiny_workspace: Path) -> None:
    paper = ("target_only", "ties", "adaptive_merge", "grid_paper", "grasp_paper")
    settings: dict[str, Any] = {"methods": (*paper, "merged", "grasp"), "seeds": (42,), "grid": (0.3,)}
    plain = {row.method: row for row in api.compare("tiny.yaml", (), "both", **settings)[1].rows}
    stacked = {row.method: row for row in api.compare("tiny.yaml", [ON], "both", **settings)[1].rows}
    for name in paper:
        assert stacked[name].scores == plain[name].scores
    assert stacked["merged"].scores != plain["merged"].scores
    steps = [json.loads(file.read_text(encoding="utf-8"))["step"] for file in Path("both/store/records").glob("*.json")]
    assert steps.count("target") == 2  # one alone, for both comparisons, and one on the source adapter


@pytest.mark.parametrize("changes", [(), (ON,)])
def test_a_dry_run_counts_the_rows_of_the_paper_too(changes: tuple[str, ...], tiny_workspace: Path) -> None:
    given: dict[str, Any] = {
        "methods": ("target_only", "grid_paper", "grasp", "grasp_paper"),
        "grid": (0.3,),
        "seeds": (42,),
    }
    plan = api.plan("tiny.yaml", changes, "planned", **given)
    recorder = Recorder()
    api.compare("tiny.yaml", changes, "planned", recorder, **given)
    planned = Counter(record.step.split()[0] for record, _ in plan.steps)
    assert planned == Counter(step.split()[0] for step in recorder.did)
    assert planned["target"] == 1 + len(changes)
    assert planned["controller"] == 1 + len(changes)


def test_a_comparison_leaves_a_given_ratio_aside_and_says_so(tiny_workspace: Path, caplog: Any) -> None:
    given: dict[str, Any] = {"methods": ("grasp", "delivered"), "seeds": (42,)}
    rows = {row.method: row for row in api.compare("tiny.yaml", {"final.prune_ratio": 0.7}, "out", **given)[1].rows}
    assert not any("final.all_rows" in line for line in caplog.messages)
    assert any("final.prune_ratio is left aside" in line and "--grid 0.7" in line for line in caplog.messages)
    grasp, delivered = rows["grasp"], rows["delivered"]  # the recipe hands over GRASP's result in any case
    assert grasp.prune_ratio == delivered.prune_ratio
    assert grasp.chosen_on == delivered.chosen_on
    assert grasp.cost == delivered.cost


def test_a_comparison_says_which_rows_have_another_target_adapter(tiny_workspace: Path) -> None:
    said = (
        "the target adapter of these rows is trained on the backbone alone, as in the paper: target only (LoRA), TIES"
    )
    for changes, methods, warned in (
        ((ON,), ("target_only", "ties", "grasp"), True),
        ((ON,), ("continued", "grasp"), False),
        ((ON,), ("target_only", "ties"), False),
        ((), ("target_only", "ties", "grasp"), False),
    ):
        folder, comparison = api.compare(
            "tiny.yaml", changes, "both", methods=methods, seeds=(42,), reference=methods[-1]
        )
        assert (said in comparison.warnings) is warned
        assert (said in (folder / "compare.md").read_text(encoding="utf-8")) is warned


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("target.on=backbone",), "on is 'backbone'; allowed: source, auto, or null"),
        (
            (ON, "merge.rule=ties"),
            "target.on is 'source', so both adapters are added up as they are; remove merge.rule",
        ),
        ((ON, "merge.weights=[1, 1]"), "remove merge.weights, or target.on"),
        ((ON, "target.adapter=mine"), "on is 'source', but an adapter is given"),
    ],
)
def test_what_contradicts_it_is_refused(changes: tuple[str, ...], message: str, refused: Callable[..., None]) -> None:
    refused("run", [part for one in changes for part in ("--set", one)], message)


def test_the_key_counts_in_a_recipes_hash_only_where_it_is_set(tiny_workspace: Path) -> None:
    plain, said, asked = (load_recipe("tiny.yaml", one)[0] for one in ((), ["target.on=null"], [ON]))
    assert plain.fingerprint() == said.fingerprint() != asked.fingerprint()
