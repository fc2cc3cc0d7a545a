"""The comparison: every method under one protocol, records that are never done twice, choices made on the right split."""

import copy
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
from html import unescape
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from conftest import write_tiny_workspace
from grasp_lora.report.comparison import (
    command_of,
    cost_table,
    print_comparison,
    score_table,
    verdict_table,
    write_comparison,
)
from recorder import Recorder, session_of
from rich.console import Console

from grasp_lora import api
from grasp_lora.engine import lorahub, methods
from grasp_lora.engine import steps as baselines
from grasp_lora.engine.compare import ComparisonSettings, Work, compare
from grasp_lora.engine.comparison import Comparison
from grasp_lora.engine.methods import METHODS
from grasp_lora.engine.progress import Progress
from grasp_lora.engine.run_folder import Delivered
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Bench
from grasp_lora.engine.store import Record, Store, pack
from grasp_lora.errors import AdapterError, Interrupted, ProbeError, RecipeError
from grasp_lora.evaluation.statistics import compare_with_baselines
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.search import PROBE_SPLITS, Gaussian, Rounds
from grasp_lora.recipes.load import load_recipe

ROUNDS_EVERY = "controller.rounds.every=3"
SMALL = ComparisonSettings(seeds=(1,), grid=(0.2, 0.6), resamples=1000)
FEW = ("target_only", "adaptive_merge", "grid", "grasp")


OWN_METRIC = """
from grasp_lora.evaluation.metrics import MetricScore

def constant(outputs):
    return MetricScore("constant", {value}, "own", tuple([{value}] * len(outputs.predictions)))
"""


def session(*overrides: str, recipe: Path | str = "tiny.yaml", progress: Progress | None = None) -> Session:
    return session_of(ROUNDS_EVERY, *overrides, recipe=recipe, progress=progress)


def run(folder: Path, settings: ComparisonSettings, *overrides: str) -> tuple[dict[str, Any], Recorder]:
    recorder = Recorder()
    return compare(session(*overrides, progress=recorder), folder, settings, write_comparison).to_json(), recorder


def without_seconds(content: dict[str, Any]) -> dict[str, Any]:
    content = json.loads(json.dumps(content))
    content.pop("pace")
    for row in content["rows"]:
        for key in ("seconds", "seconds_in_all"):
            row.get("cost", {}).pop(key, None)
    return content


@pytest.fixture(scope="session")
def whole_comparison(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path
) -> tuple[Path, dict[str, Any]]:
    """The folder and the content of a comparison of all methods; treat it as read-only."""
    recipe = write_tiny_workspace(tmp_path_factory.mktemp("comparison") / "work", tiny_backbone_folder)
    folder = recipe.parent / "compare"
    return folder, compare(session(recipe=recipe), folder, SMALL, show=write_comparison).to_json()


@pytest.fixture
def finished(tiny_workspace: Path, whole_comparison: tuple[Path, dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """A copy of the whole comparison in the working folder."""
    folder, content = whole_comparison
    return Path(shutil.copytree(folder, tiny_workspace / "compare")), content


def record(content: dict[str, Any]) -> Comparison:
    """The content of a compare.json as the report reads it."""
    return Comparison.model_validate(content)


def test_every_method_has_a_row_with_scores_cost_and_a_verdict(whole_comparison):
    _, content = whole_comparison
    rows = {row["method"]: row for row in content["rows"]}
    assert tuple(rows) == tuple(METHODS)
    assert content["metrics"] == ["test_loss", "exact_match", "rougeL"]
    for name, row in rows.items():
        assert row["unavailable"] is None
        assert set(row["scores"]) == set(content["metrics"])
        assert set(row["against"]) == (set() if name == "grasp" else set(content["metrics"]))


def test_the_files_are_complete_and_hold_no_answers(whole_comparison, tmp_path):
    folder, content = whole_comparison
    assert json.loads((folder / "compare/compare.json").read_text(encoding="utf-8")) == json.loads(json.dumps(content))
    texts = [file.read_text(encoding="utf-8") for file in (folder / "store/answers").iterdir()]
    answers = [json.loads(line) for text in texts for line in text.splitlines()]
    assert {row["id"] for row in answers}
    assert all(set(row) == {"id", "prediction"} for row in answers)
    records = [json.loads(file.read_text(encoding="utf-8")) for file in (folder / "store/records").iterdir()]
    assert not any("prediction" in json.dumps(record) for record in records)
    page = write_comparison(tmp_path, record(content))
    html, text = unescape(page.read_text(encoding="utf-8")), (tmp_path / "compare.md").read_text(encoding="utf-8")
    for row in content["rows"]:
        assert row["title"] in html
        assert row["title"] in text.replace("\\", "")


def test_rows_of_one_article_are_drawn_together(tiny_workspace):
    rows = [{"prompt": f"target {i}: what?", "completion": f" {i % 7}", "group": f"g{i // 2}"} for i in range(40)]
    Path("target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    api.run("tiny.yaml", [ROUNDS_EVERY], "runs")
    seed = load_recipe("tiny.yaml")[0].seed
    groups = json.loads(Path("runs/data.json").read_text(encoding="utf-8"))["test_groups"]
    assert len(groups) == 2 * len(set(groups)) > 2
    content, _ = run(Path("runs"), ComparisonSettings(("merged", "grasp"), (seed,), (0.2,), resamples=1000))
    assert (content["test_groups"], content["test_group_size"]) == (len(set(groups)), 2.0)
    text = f"in their {len(set(groups))} groups"
    assert text in Path("runs/compare/compare.md").read_text(encoding="utf-8")
    assert text in Path("runs/report.md").read_text(encoding="utf-8")
    losses = {}
    for name in ("grasp", "merged"):
        lines = Path(f"runs/evaluation/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    [row] = [row for row in content["rows"] if row["method"] == "merged"]
    found = row["against"]["test_loss"]
    drawn = compare_with_baselines(
        losses["grasp"], {"merged": losses["merged"]}, groups=groups, higher_is_better=False, resamples=1000
    )["merged"]
    assert (found["difference"], found["low"], found["high"]) == pytest.approx(
        (drawn.difference, drawn.low, drawn.high)
    )


def test_a_recipe_stands_beside_its_own_tables(finished, monkeypatch, caplog):
    """Also where a comparison of another recipe was stopped before its first table."""
    folder, _ = finished
    before = {file: file.read_bytes() for file in (folder / "compare").iterdir()}
    settings = ComparisonSettings(("merged", "grasp"), (1,), (0.2,), resamples=1000)

    def stop(*_: Any) -> None:
        raise Interrupted("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(Work, "_advance", stop)
        with pytest.raises(Interrupted):
            run(folder, settings, "controller.rule=best_reward")
    assert {file: file.read_bytes() for file in (folder / "compare").iterdir()} == before
    assert "the tables of another recipe" in caplog.text
    run(folder, settings, "controller.rule=best_reward")
    assert "max_step: 0.05" in (folder / "compare/recipe.yaml").read_text(encoding="utf-8")
    caplog.clear()
    run(folder, settings, "controller.rule=best_reward")
    assert "another recipe" not in caplog.text


def test_the_table_says_what_each_ratio_was_chosen_on(whole_comparison):
    _, content = whole_comparison
    rows = [row | {"chosen_on": split} for row, split in zip(content["rows"], (*PROBE_SPLITS, None), strict=False)]
    table = score_table(record(content | {"rows": rows}))
    assert [row[2].text for row in table.rows] == ["micro-dev", "dev", "micro-dev and dev", "–"]


def test_the_pages_say_how_they_were_made(finished, cli, monkeypatch):
    folder, content = finished
    command = command_of(record(content))
    for name in ("compare.md", "report.html"):
        assert command in (folder / "compare" / name).read_text(encoding="utf-8")
    shutil.copy(folder / "compare/recipe.yaml", folder.parent / "again.yaml")  # where its relative paths lead
    command = command.replace("compare/recipe.yaml", "again.yaml").replace("--output .", f"--output {folder}")
    name, *words = shlex.split(command)
    monkeypatch.setattr(Session, "finetune", None)  # nothing is to be trained
    assert name == "grasp-lora"
    assert cli(*words).status == 0
    again = json.loads((folder / "compare/compare.json").read_text(encoding="utf-8"))
    assert again["settings"] | {"resamples": 0} == json.loads(json.dumps(content["settings"])) | {"resamples": 0}
    assert [row["scores"] for row in again["rows"]] == [
        row["scores"] for row in json.loads(json.dumps(content["rows"]))
    ]


def test_a_finished_comparison_does_nothing_again(finished):
    folder, content = finished
    again, recorder = run(folder, SMALL)
    assert not recorder.did
    assert again == content


def test_records_alone_are_enough_on_another_machine(finished, monkeypatch):
    folder, content = finished
    shutil.rmtree(folder / "store/adapters")

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be trained")

    monkeypatch.setattr(Session, "finetune", fail)
    again, recorder = run(folder, SMALL)
    assert again == content
    assert not recorder.did


def test_a_missing_adapter_is_trained_again_only_for_what_rests_on_it(finished):
    folder, content = finished
    shutil.rmtree(folder / "store/adapters")
    for file in (folder / "store/records").glob("final-0.60-*"):
        file.unlink()
    again, recorder = run(folder, SMALL)
    assert set(recorder.did) == {"source", "target", "final 0.60"}
    assert without_seconds(again) == without_seconds(content)


def test_a_step_that_comes_out_otherwise_than_its_record_says_is_told(finished, caplog):
    folder, _ = finished
    shutil.rmtree(folder / "store/adapters")
    for file in (folder / "store/records").glob("final-0.60-*"):
        file.unlink()
    run(folder, SMALL)
    assert "came out otherwise" not in caplog.text
    shutil.rmtree(folder / "store/adapters")
    for file in (folder / "store/records").glob("final-0.60-*"):
        file.unlink()
    (source,) = (folder / "store/records").glob("source-????????????????.json")
    record = json.loads(source.read_text())
    record["result"]["dev_loss"] += 1  # as another processor might have found it
    source.write_text(json.dumps(record))
    run(folder, SMALL)
    (told,) = [line for line in caplog.messages if "came out otherwise" in line]
    assert told.startswith("source was missing")
    assert f"on record {record['result']['dev_loss']:.4f}" in told


def test_an_adapter_of_which_a_part_was_copied_is_trained_again(finished, caplog):
    folder, content = finished
    targets = (folder / "store/records").glob("target-????????????????.json")
    broken = [
        folder / "store/adapters" / file.stem.removeprefix("target-") / "adapter_model.safetensors" for file in targets
    ]
    for weights in broken:
        weights.unlink()
    for file in (folder / "store/records").glob("final-0.60-*"):
        file.unlink()
    again, recorder = run(folder, SMALL)
    assert set(recorder.did) == {"target", "final 0.60"}
    assert without_seconds(again) == without_seconds(content)
    assert any(weights.is_file() for weights in broken)
    assert "it is made again" in caplog.text


def test_scores_that_were_computed_in_several_ways_are_told_of(finished):
    folder, content = finished
    assert not [one for one in content["warnings"] if "computed in" in one]
    file = next((folder / "store/records").glob("scores-*.json"))
    stored = json.loads(file.read_text(encoding="utf-8"))
    metric, entry = next(iter(stored["result"].items()))
    entry["signature"] += "|version:0"
    file.write_text(json.dumps(stored), encoding="utf-8")
    again, recorder = run(folder, SMALL)
    assert not recorder.did
    (told,) = [one for one in again["warnings"] if "computed in" in one]
    assert told.startswith(f"rows have {metric} computed in 2 ways (")
    assert "|version:0" in told


def test_a_changed_controller_leaves_the_other_rows_alone(finished):
    folder, content = finished
    again, recorder = run(folder, SMALL, "controller.rule=best_reward")
    steps = set(recorder.did)
    assert "controller" in steps
    assert not steps & {"source", "target", "joint", "lorahub"}
    before, after = ({row["method"]: row for row in one["rows"]} for one in (content, again))
    for name in ("target_only", "continued", "grid", "grid_paper", "lorahub"):
        assert before[name]["scores"] == after[name]["scores"]


def test_grasp_and_its_paper_preset_share_a_controller_run_that_differs_in_the_rule_alone(whole_comparison):
    folder, _ = whole_comparison
    controllers = [
        json.loads(file.read_text(encoding="utf-8")) for file in (folder / "store/records").glob("controller-*")
    ]
    assert len(controllers) == 1


@pytest.mark.parametrize("name", ["demo-ar", "mlqa-ar", "xlsum-zh", "llama3-8b-mlqa-ar"])
def test_controllers_beside_the_recipes_own_are_run_as_their_authors_do(name):
    recipe, _ = load_recipe(name)
    own = recipe.controller.policy
    found = methods._paper(recipe)
    assert (type(found.policy), found.rule, found.rounds) == (Gaussian, "best_reward", Rounds(10))
    assert (found.policy.ratio_min, found.policy.ratio_max) == (own.ratio_min, own.ratio_max)
    assert found.training == recipe.controller.training


def test_a_process_that_is_behind_leaves_the_finished_table(tiny_workspace, monkeypatch):
    folder = tiny_workspace / "compare"
    whole, few = (ComparisonSettings(("zero_shot",), seeds, reference="zero_shot") for seeds in ((1, 2), (1,)))
    content, _ = run(folder, whole)
    before = {file: file.read_bytes() for file in (folder / "compare").iterdir()}
    advance, done = Work._advance, []

    def stop(self: Work, batch: Any) -> None:
        if len(done) == 1:
            raise Interrupted("stopped")
        advance(self, batch)
        done.append(batch)

    with monkeypatch.context() as patched:
        patched.setattr(Work, "_advance", stop)
        with pytest.raises(Interrupted):
            run(folder, whole)
    assert {file: file.read_bytes() for file in (folder / "compare").iterdir()} == before
    assert run(folder, whole)[0] == content
    run(folder, few)  # another comparison has its own
    assert json.loads((folder / "compare/compare.json").read_text())["settings"]["seeds"] == [1]


def test_a_given_target_adapter_is_not_tested_on_rows_that_it_may_have_seen(refused):
    message = "--folds would test rows that the given target.adapter may have been trained on; leave target.adapter out"
    refused("compare", ("--folds", "3", "--set", "target.adapter=mine"), message)


class Killed(BaseException):
    """Ends a comparison as a kill would."""


def test_an_interrupted_comparison_goes_on_without_repeating_a_step(tiny_workspace):
    settings = ComparisonSettings(FEW, (1,), (0.2, 0.6), resamples=1000)

    class Kill(Recorder):
        def __init__(self, step: int) -> None:
            super().__init__()
            self.last = step

        def record(self, record: Record, there: bool) -> None:
            super().record(record, there)
            if len(self.did) == self.last:
                raise Killed

    whole, uninterrupted = run(tiny_workspace / "other", settings)
    for step in (2, 7):
        folder, first = tiny_workspace / f"after-{step}", Kill(step)
        with pytest.raises(Killed):
            compare(session(progress=first), folder, settings)
        content, second = run(folder, settings)
        assert first.did + second.did == uninterrupted.did
        assert without_seconds(content) == without_seconds(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_comparison_killed_while_a_record_is_written_goes_on(tiny_workspace, monkeypatch):
    settings = ComparisonSettings(("target_only", "adaptive_merge"), (1,), (0.2,), "adaptive_merge", resamples=1000)
    folder = tiny_workspace / "compare"
    child = os.fork()
    if child == 0:
        writes = 0
        replace = Path.replace

        def kill(self: Path, target: Path) -> Path:
            nonlocal writes
            writes += "records" in self.parts
            if writes == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        Path.replace = kill  # type: ignore[method-assign]  # in the child only
        compare(session(), folder, settings)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    there = len([file for file in (folder / "store/records").iterdir() if file.suffix == ".json"])
    assert there == 2
    content, recorder = run(folder, settings)
    assert len(recorder.found) >= there
    assert [row["unavailable"] for row in content["rows"]] == [None, None]


def test_the_source_adapter_is_shared_and_everything_else_has_its_own_seed(tiny_workspace):
    settings = ComparisonSettings(FEW, (1, 2), (0.2,), resamples=1000)
    content, recorder = run(tiny_workspace / "compare", settings)
    assert recorder.did.count("source") == 1
    assert recorder.did.count("target") == recorder.did.count("controller") == 2
    rows = {row["method"]: row for row in content["rows"]}
    assert len(set(rows["target_only"]["scores"]["test_loss"]["values"])) == 2
    assert rows["target_only"]["scores"]["test_loss"]["sd"] > 0
    assert content["seeds"] == [1, 2]


def test_without_a_part_in_the_seed_there_is_one_result_and_no_spread(tiny_workspace):
    settings = ComparisonSettings(("zero_shot", "source_only"), (1, 2), (0.2,), "zero_shot", resamples=1000)
    content, _ = run(tiny_workspace / "compare", settings)
    assert [row["scores"]["test_loss"]["sd"] for row in content["rows"]] == [None, None]


def test_the_verdict_is_that_of_the_records(whole_comparison):
    folder, content = whole_comparison
    records = [
        json.loads(file.read_text(encoding="utf-8")) for file in (folder / "store/records").glob("test-losses-*")
    ]
    by_mean = {fmean(record["result"]["losses"]): record["result"]["losses"] for record in records}
    rows = {row["method"]: row["scores"]["test_loss"]["mean"] for row in content["rows"]}
    values = {name: by_mean[value] for name, value in rows.items()}
    ours = values.pop("grasp")
    planned = {"continued", "joint", "grid"}
    together = {name: values.pop(name) for name in planned}
    expected = compare_with_baselines(ours, together, higher_is_better=False, resamples=1000)
    for row in content["rows"]:
        if row["method"] in planned:
            assert row["against"]["test_loss"]["low"] == expected[row["method"]].low
            assert row["against"]["test_loss"]["verdict"] == expected[row["method"]].verdict
        elif row["method"] != "grasp":
            alone = {row["method"]: values[row["method"]]}
            one = compare_with_baselines(ours, alone, higher_is_better=False, resamples=1000)[row["method"]]
            assert row["against"]["test_loss"]["low"] == one.low
            assert row["against"]["test_loss"]["verdict"] is None
    assert content["comparisons"] == 3


def against(verdict: str | None, difference: float = -0.3, low: float = -0.4, high: float = -0.2) -> dict[str, Any]:
    return {
        "difference": difference, "low": low, "high": high, "p_value": 0.01, "confidence": 0.95, "examples": 8, "resamples": 1000,
        "comparisons": 3, "higher_is_better": False, "verdict": verdict,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "score", "saved"),
    [
        ("better", "no difference shown", True), ("better", "worse", True), ("better", "better", False),
        ("no difference shown", "no difference shown", False), (None, None, False),
    ],
)  # fmt: skip
def test_a_gain_in_the_loss_that_no_answer_shows_is_called_over_confidence_saved(whole_comparison, loss, score, saved):
    _, content = whole_comparison
    shown = {
        "test_loss": against(loss),
        "exact_match": against(score, 1.25, -0.5, 3.0),
        "rougeL": against(score, 0.6, -1.4, 2.5),
    }
    rows = [row | {"against": shown} if row["method"] == "continued" else row for row in content["rows"]]
    [row] = [
        row
        for row in verdict_table(record(content | {"rows": rows})).rows
        if row[0].text.startswith("source adapter c")
    ]
    word = f", {score}" if score else ""
    assert re.fullmatch(rf"\+0\.60? ROUGE-L{word} \(-1\.40? to \+2\.50?\)", row[3].text)
    assert ("over-confidence saved" in row[1].text) is saved
    [row] = [
        row for row in score_table(record(content | {"rows": rows})).rows if row[0].text.startswith("source adapter c")
    ]
    assert row[-1].text.startswith("+0.6")
    assert ("over-confidence saved" in row[-1].text) is saved


def test_the_half_width_is_said_before_anything_is_trained(tiny_workspace):
    said: list[str] = []

    class Notes(Progress):
        def note(self, text: str) -> None:
            said.append(text)

        def step(self, report: Any) -> None:
            assert said

    settings = ComparisonSettings(("merged", "continued", "joint"), (1,), resamples=1000)
    compare(session(progress=Notes()), tiny_workspace / "compare", settings, write_comparison)
    assert "8 test examples, 2 planned comparisons" in said[0]
    assert said[0] in (tiny_workspace / "compare/compare/compare.md").read_text(encoding="utf-8").replace("\\", "")


def test_cost_counts_runs_and_examples_beyond_the_adapters_that_are_merged(whole_comparison):
    _, content = whole_comparison
    cost = {row["method"]: row["cost"] for row in content["rows"]}
    assert (
        cost["zero_shot"]["runs"] == cost["merged"]["runs"] == cost["ties"]["runs"] == cost["target_only"]["runs"] == 0
    )
    assert cost["adaptive_merge"]["runs"] == 1
    assert cost["grid"]["runs"] == 2
    assert cost["grasp"]["runs"] == 2
    # A final run: 10 training examples counted twice, and the 6 dev examples before and after the only epoch.
    assert cost["adaptive_merge"]["work"] == 10 * 2 + 6 * 2
    assert cost["grid"]["work"] == 2 * cost["adaptive_merge"]["work"]
    assert cost["target_only"]["runs_in_all"] == 1
    assert cost["merged"]["runs_in_all"] == 2
    assert cost["grasp"]["runs_in_all"] == 4
    # The controller: 10 steps, and 3 rounds of 1 + 3 probes on 4 micro-dev examples.
    assert cost["grasp"]["work"] == 10 * 2 + 3 * 4 * 4 + cost["adaptive_merge"]["work"]
    assert cost["lorahub"]["work"] == 40 * 4


class FakeBench(Bench):
    """Losses by ratio that no training gave: the best ratio differs from split to split."""

    LOSSES: ClassVar = {
        0.2: {"dev": [1.0], "test": [2.0]},
        0.6: {"dev": [2.0], "test": [3.0]},
        0.8: {"dev": [3.0], "test": [1.0]},
    }

    def __init__(self) -> None:
        self.grid = tuple(self.LOSSES)
        self.session: Any = SimpleNamespace(splits=SimpleNamespace(test=[None]))

    def merged(self) -> Any:
        return baselines.Adapter("merged", lambda: None)

    def finetuned(self, start: Any, prune_ratio: float, changes: Any = None) -> Any:
        facts = {"dev_loss": self.LOSSES[prune_ratio]["dev"][0]}
        return baselines.Adapter(str(prune_ratio), lambda: None, (Record("final", str(prune_ratio), {}, facts, 0.0),))

    def losses(self, adapter: Any, split: str = "test", *, answered: bool = False) -> Record:
        return Record("losses", adapter.key, {}, {"losses": self.LOSSES[float(adapter.key)][split]}, 0.0)

    def scores(self, adapter: Any) -> Record:
        return Record("scores", adapter.key, {}, {}, 0.0)


def test_a_grid_chooses_on_the_dev_split():
    outcome = METHODS["grid"].run(FakeBench())
    assert (outcome.prune_ratio, outcome.chosen_on) == (0.2, "dev")
    assert outcome.losses.key == outcome.scores.key == "0.2"


def test_what_cannot_run_here_says_why_in_its_row(finished, monkeypatch):
    folder, _ = finished
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nevergrad" else find(name))
    content, _ = run(folder, ComparisonSettings(("target_only", "lorahub", "grasp"), (1,), (0.2, 0.6), resamples=1000))
    rows = {row["method"]: row["unavailable"] for row in content["rows"]}
    assert rows["target_only"] is None
    assert "grasp-lora[compare]" in rows["lorahub"]


def test_given_source_adapters_leave_no_source_data_for_the_joint_row(finished_run, tiny_workspace):
    settings = ComparisonSettings(("source_only", "joint", "ties"), (1,), (0.2,), "source_only", resamples=1000)
    overrides = ("source.adapters=[run/source]", "data.source=null", "lora.rank=3")
    content, recorder = run(tiny_workspace / "compare", settings, *overrides)
    rows = {row["method"]: row["unavailable"] for row in content["rows"]}
    assert rows["source_only"] is None
    assert "source" not in recorder.did
    assert "data.source" in rows["joint"]
    assert "equal ranks" in rows["ties"]


def test_a_method_that_fails_says_why_and_the_others_go_on(tiny_workspace, cli, monkeypatch):
    examine = Session.examine

    def fail(self: Session, weights: AdapterWeights | None) -> Any:
        if weights is None:
            raise AdapterError("no such luck")
        return examine(self, weights)

    arguments = (
        "compare",
        "tiny.yaml",
        "--seeds",
        "1",
        "--methods",
        "zero_shot,target_only,grasp",
        "--set",
        ROUNDS_EVERY,
    )
    monkeypatch.setattr(Session, "examine", fail)
    result = cli(*arguments)
    assert result.status == 2
    assert "1 of 3 methods failed: zero shot failed with seed 1: no such luck" in result.err
    content = json.loads(Path("runs/tiny/compare/compare.json").read_text(encoding="utf-8"))
    rows = {row["method"]: row["unavailable"] for row in content["rows"]}
    assert rows["target_only"] is None
    assert rows["grasp"] is None
    monkeypatch.setattr(Session, "examine", examine)
    assert cli(*arguments).status == 0


def test_without_a_micro_dev_set_only_the_methods_that_need_one_are_left_out(tiny_workspace):
    needy = ("lorahub", "grasp_paper")
    settings = ComparisonSettings(("target_only", "grid", "grasp", *needy), (1,), (0.2, 0.6), resamples=1000)
    content, _ = run(tiny_workspace / "compare", settings, "data.target.micro_dev=0", "controller.preset=spread")
    assert {row["method"]: row["unavailable"] for row in content["rows"]} == {
        **dict.fromkeys(("target_only", "grid", "grasp")),
        **dict.fromkeys(needy, "needs a micro_dev split, data.target.micro_dev is 0"),
    }
    assert content["micro_dev_examples"] == 0


def test_a_grid_goes_on_without_a_ratio_whose_run_fails_and_does_not_try_it_again(tiny_workspace, monkeypatch):
    finish, tried = Session.finetune_pruned, []

    def fail(self: Session, start: Any, prune_ratio: float, *given: Any, **more: Any) -> Any:
        tried.append(prune_ratio)
        if prune_ratio == 0.6:
            raise ProbeError("it diverges")
        return finish(self, start, prune_ratio, *given, **more)

    monkeypatch.setattr(Session, "finetune_pruned", fail)
    settings = ComparisonSettings(("grid",), (1,), (0.2, 0.6), "grid", resamples=1000)
    content, _ = run(tiny_workspace / "compare", settings)
    assert [row["prune_ratio"]["mean"] for row in content["rows"]] == [0.2]
    title = METHODS["grid"].title
    assert content["warnings"] == [f"{title}, seed 1, is without ratio 0.6, whose run failed: it diverges"]
    assert tried == [0.2, 0.6]
    assert [point["prune_ratio"] for point in content["curve"]] == [0.2]


def test_a_grid_measures_what_it_needs_and_nothing_else(tiny_workspace):
    records = tiny_workspace / "compare" / "store/records"
    measured = []
    for method in ("grid_paper", "grid"):
        settings = ComparisonSettings((method,), (1,), (0.2, 0.6), method, resamples=1000)
        content, _ = run(records.parents[1], settings)
        measured.append([len(list(records.glob(f"{split}-losses-*"))) for split in ("test", "dev")])
    # Only the curve is of test losses at every ratio; the final runs measure dev themselves.
    assert measured == [[1, 0], [3, 0]]
    assert all({"dev", "test"} <= set(point) for point in content["curve"])


def test_a_grid_on_a_large_test_set_has_a_curve_of_dev_losses_alone(tiny_workspace, monkeypatch):
    monkeypatch.setattr(methods, "MOST_IN_CURVE", 7)  # of 8 test rows
    content, recorder = run(
        tiny_workspace / "compare", ComparisonSettings(("grid",), (1,), (0.2, 0.6), "grid", resamples=1000)
    )
    assert recorder.did.count("test losses") == 1  # of the ratio that was chosen
    assert all("dev" in point and "test" not in point for point in content["curve"])


def test_joint_trains_on_both_languages_and_keeps_the_best_of_at_least_four_looks_an_epoch(tiny_workspace):
    changes = ("target.training.epochs=3", "source.training.patience=1", "source.training.learning_rate=0.5")
    bench = Bench(session(*changes), session(*changes), Store(tiny_workspace / "store"))
    trained = bench.trained_jointly()
    [record] = trained.records
    found = record.result
    assert found["trained_examples"] == 12 + 3 * 10  # the target rows once for each epoch of the target adapter
    looks = [one["dev_loss"] for one in found["history"] if "dev_loss" in one]
    assert len(looks) >= 1 + 4
    assert any(later > sooner for sooner, later in itertools.pairwise(looks[:-1]))  # where patience would have stopped
    assert min(looks) < looks[-1]
    assert found["dev_loss"] == min(looks)
    assert fmean(bench.losses(trained, "dev").result["losses"]) == pytest.approx(found["dev_loss"], rel=1e-5)


def test_a_metric_of_the_users_own_that_changed_is_computed_anew(tiny_workspace, monkeypatch):
    monkeypatch.syspath_prepend(str(tiny_workspace))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    settings = ComparisonSettings(("target_only", "merged"), (1,), (0.2,), "merged", resamples=1000)
    for value in (10.0, 99.0):
        (tiny_workspace / "own_metric.py").write_text(OWN_METRIC.format(value=value), encoding="utf-8")
        sys.modules.pop("own_metric", None)
        importlib.invalidate_caches()
        content, recorder = run(tiny_workspace / "compare", settings, "metrics=['own_metric:constant']")
        assert [row["scores"]["own_metric:constant"]["mean"] for row in content["rows"]] == [value] * 2
    assert set(recorder.did) == {"scores"}


def test_what_is_no_experiments_folder_is_refused(tiny_workspace, refused):
    (tiny_workspace / "own").mkdir()
    (tiny_workspace / "own/notes.txt").write_text("mine", encoding="utf-8")
    refused("compare", ["--output", "own"], "own is not empty and no experiment's; choose another with --output")
    refused("compare", ["--output", "tiny.yaml"], "tiny.yaml is a file; give a folder with --output")
    refused("compare", ["--output", "tiny.yaml/a/b"], "b cannot be made (Not a directory); choose another folder")


class TestOneStore:
    """A run, a comparison and their folder."""

    METHODS = ("source_only", "target_only", "merged", "adaptive_merge", "grasp")

    def trained(self, recorder: Recorder) -> list[str]:
        return [step for step in recorder.did if "losses" not in step and step != "scores"]

    def test_a_comparison_in_the_folder_of_a_run_trains_only_what_the_run_did_not(self, finished_run, tiny_workspace):
        before = {file: file.read_bytes() for file in finished_run.glob("*.*")}
        settings = ComparisonSettings(self.METHODS, (42,), (0.2,), resamples=1000)
        recorder = Recorder()
        content = compare(session_of(progress=recorder), finished_run, settings).to_json()
        assert self.trained(recorder) == ["final 0.00"]
        assert {"source", "target", "controller"} <= set(recorder.found)
        assert {file: file.read_bytes() for file in finished_run.glob("*.*")} == before
        metrics = json.loads((finished_run / "metrics.json").read_text(encoding="utf-8"))
        rows = {row["method"]: row for row in content["rows"]}
        for method, system in (("source_only", "source"), ("target_only", "target"), ("grasp", "grasp")):
            for name in ("exact_match", "rougeL"):
                assert rows[method]["scores"][name]["mean"] == metrics["systems"][system]["metrics"][name]

    def test_a_run_in_the_folder_of_a_comparison_trains_nothing(self, finished_run, tiny_workspace):
        settings = ComparisonSettings(("grasp",), (42,), (0.2,), resamples=1000)
        compare(session_of(), tiny_workspace / "both", settings)
        recorder = Recorder()
        api.run("tiny.yaml", folder="both", progress=recorder)
        assert not self.trained(recorder)
        for name in ("adapter", "source", "target", "merged"):
            weights = f"{name}/adapter_model.safetensors"
            assert (tiny_workspace / "both" / weights).read_bytes() == (finished_run / weights).read_bytes()

    @pytest.mark.parametrize("overrides", [("final.deliver=best",), ("final.deliver=grasp",)])
    def test_what_a_run_hands_over_is_a_row_that_trains_nothing_anew(self, overrides, tiny_workspace, monkeypatch):
        monkeypatch.setattr("grasp_lora.engine.deliver.AHEAD", 1000.0)  # so that it is not GRASP's result in both
        result = api.run("tiny.yaml", [ROUNDS_EVERY, *overrides], "both")
        settings = ComparisonSettings(("delivered",), (42,), (0.2,), resamples=1000)
        recorder = Recorder()
        content = compare(session(*overrides, progress=recorder), Path("both"), settings).to_json()
        assert not recorder.did
        (row,) = [row for row in content["rows"] if row["method"] == "delivered"]
        delivered = result.metrics.systems[result.delivered.name]
        assert row["scores"]["test_loss"]["mean"] == delivered.test_loss
        assert row["scores"]["rougeL"]["mean"] == delivered.metrics["rougeL"]
        assert row["taken"] == f"{result.delivered.title} (42)"
        assert (result.delivered.name == "grasp") == (overrides == ("final.deliver=grasp",))
        assert row["prune_ratio"] is None or result.delivered.name == "grasp"

    def test_each_seed_counts_where_several_hand_over_the_same_adapter(self, tiny_workspace, monkeypatch):
        def chosen(bench: Bench, *_: Any) -> Delivered:
            name = "target" if bench.recipe.seed == 2 else "source"
            return Delivered(name=name, title=f"the {name}", why="It is.")

        monkeypatch.setattr("grasp_lora.engine.methods.choose", chosen)
        settings = ComparisonSettings(("source_only", "target_only", "delivered"), (1, 2, 3), (0.2,), resamples=1000)
        content, _ = run(tiny_workspace / "compare", settings, "final.deliver=best")
        scores = {row["method"]: row["scores"]["test_loss"]["values"] for row in content["rows"]}
        assert scores["source_only"] == scores["source_only"][:1]  # one adapter for all seeds
        assert scores["delivered"] == [*scores["source_only"], scores["target_only"][1], *scores["source_only"]]
        (row,) = [row for row in content["rows"] if row["method"] == "delivered"]
        assert row["taken"] == "the source (1, 3); the target (2)"
        text = Path("compare/compare/compare.md").read_text(encoding="utf-8")
        assert "- what a run hands over, by seed: the source (1, 3); the target (2)\n" in text
        assert "What a run hands over, by seed: the source (1, 3); the target (2)." in (
            Path("compare/compare/report.html").read_text(encoding="utf-8")
        )

    def test_the_printed_table_of_steps_says_what_was_found_and_what_was_done(self, tiny_workspace, cli):
        assert cli("run", "tiny.yaml").status == 0
        result = cli("compare", "tiny.yaml", "--seeds", "42", "--methods", "target_only,adaptive_merge,grasp")
        assert result.status == 0
        lines = [line.split("│") for line in result.out.splitlines() if line.startswith("│")]
        steps = {line[1].strip(): (line[2].strip(), line[3].strip()) for line in lines}
        for step in ("source", "target", "controller"):
            assert steps[step] == ("1", "0")
        assert steps["final 0.00"] == ("0", "1")

    def test_packed_records_of_another_machine_count(self, whole_comparison, tiny_workspace):
        folder, content = whole_comparison
        there = len(list((folder / "store/records").glob("*.json")))
        assert pack(folder / "store", tiny_workspace / "mine/store/records.jsonl.gz") == there
        again, recorder = run(tiny_workspace / "mine", SMALL)
        assert not recorder.did
        assert again == content

    def test_packed_records_leave_the_metrics_in_the_order_of_the_recipe(self, tiny_workspace):
        arguments = (
            ComparisonSettings(seeds=(1,), methods=("merged",), reference="merged"),
            "metrics=[rougeL, exact_match]",
        )
        whole, _ = run(tiny_workspace / "first", *arguments)
        pack(tiny_workspace / "first/store", tiny_workspace / "mine/store/records.jsonl.gz")
        again, recorder = run(tiny_workspace / "mine", *arguments)
        assert not recorder.did
        assert again["metrics"] == whole["metrics"] == ["test_loss", "rougeL", "exact_match"]

    def test_records_that_came_packed_are_packed_with_the_new_ones(self, whole_comparison, tiny_workspace):
        folder, _ = whole_comparison
        mine = tiny_workspace / "mine/store"
        there = pack(folder / "store", mine / "records.jsonl.gz")
        (mine / "records").mkdir()
        for file in (folder / "store/records").glob("source-*.json"):
            shutil.copy(file, mine / "records")  # a record of both kinds counts once
        assert pack(mine, tiny_workspace / "all.jsonl.gz") == there
        assert (tiny_workspace / "all.jsonl.gz").read_bytes() == (mine / "records.jsonl.gz").read_bytes()

    @pytest.mark.parametrize("damage", [b"", b"no gzip at all"])
    def test_damaged_packed_records_are_one_line(self, damage, tiny_workspace, cli):
        file = tiny_workspace / "mine/store/records.jsonl.gz"
        file.parent.mkdir(parents=True)
        file.write_bytes(damage)
        result = cli("compare", "tiny.yaml", "--output", "mine", "--methods", "target_only", "--seeds", "1")
        assert result.status == (0 if not damage else 2)
        assert not damage or "records.jsonl.gz cannot be read" in result.err


def test_a_comparison_stopped_inside_a_training_goes_on_to_the_same_bits(tiny_workspace):
    from torch.optim.optimizer import register_optimizer_step_post_hook

    signals = (4, 9, 30)
    settings = ComparisonSettings(FEW, (1,), (0.2, 0.6), resamples=1000)
    overrides = ()
    taken = 0

    def count(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if taken in signals:
            os.kill(os.getpid(), signal.SIGTERM)

    handle = register_optimizer_step_post_hook(count)
    try:
        for _ in signals:
            with pytest.raises(Interrupted, match=r"stopped by SIGTERM at .* step"):
                run(tiny_workspace / "one", settings, *overrides)
            assert list((tiny_workspace / "one/store/work").rglob("manifest.json"))
        content, _ = run(tiny_workspace / "one", settings, *overrides)
    finally:
        handle.remove()
    stopped = taken
    handle = register_optimizer_step_post_hook(count)
    try:
        whole, _ = run(tiny_workspace / "other", settings, *overrides)
    finally:
        handle.remove()
    assert taken - stopped == stopped  # no step was taken twice
    assert without_seconds(content) == without_seconds(whole)
    for file in (tiny_workspace / "other/store/adapters").rglob("*.safetensors"):
        assert file.read_bytes() == (tiny_workspace / "one" / file.relative_to(tiny_workspace / "other")).read_bytes()


def test_records_of_another_number_format_are_not_passed_over_in_silence(finished, caplog):
    folder, _ = finished
    Store(folder / "store").check_dtype("torch.float32")
    assert not caplog.records
    Store(folder / "store").check_dtype("torch.bfloat16")
    assert "to go on with them set backbone.dtype=float32" in caplog.text


def test_a_table_that_goes_to_a_file_is_wide_and_one_for_a_narrow_terminal_cuts_nothing_off(whole_comparison):
    _, content = whole_comparison
    file, narrow = io.StringIO(), io.StringIO()
    print_comparison(record(content), Console(file=file, width=80))
    assert max(map(len, file.getvalue().splitlines())) > 120
    assert METHODS["grasp"].title in file.getvalue()
    print_comparison(record(content), Console(file=narrow, width=80, force_terminal=True, color_system=None))
    assert max(map(len, narrow.getvalue().splitlines())) <= 80
    assert "…" not in file.getvalue() + narrow.getvalue()


def test_the_ratio_on_the_curve_is_a_controllers(whole_comparison):
    _, content = whole_comparison
    assert record(content).learned.method == "grasp"
    assert record(content | {"reference": "grid"}).learned.method == "grasp"
    assert record(content | {"reference": "grasp_paper"}).learned.method == "grasp_paper"
    assert record(content | {"rows": content["rows"][:3]}).learned is None


def test_speed_ups_name_their_grid_and_count_the_merged_adapters_for_what_does_without_them(whole_comparison):
    _, content = whole_comparison
    steady = content | {"pace": {"lowest": 0.2, "highest": 0.29}}
    table = cost_table(record(steady))
    assert table.columns[4:6] == [f"speed-up over {METHODS['grid'].title}, in forward passes", "the same in seconds"]
    costs = {row["title"]: row["cost"] for row in content["rows"]}
    grid = costs[METHODS["grid"].title]
    for column, what in ((4, "work"), (5, "seconds")):
        ups = {row[0].text: row[column].text for row in table.rows}
        assert ups[METHODS["grid"].title] == "1.00"
        for name in ("grasp", "adaptive_merge", "lorahub"):
            assert ups[METHODS[name].title] == f"{grid[what] / costs[METHODS[name].title][what]:.2f}"
        for name in ("continued", "joint", "source_only"):
            expected = grid[f"{what}_in_all"] / costs[METHODS[name].title][f"{what}_in_all"]
            assert ups[METHODS[name].title] == f"{expected:.2f}"
        assert ups[METHODS["zero_shot"].title] == "–"
    without = steady | {"rows": [row for row in content["rows"] if row["method"] != "grid"]}
    assert cost_table(record(without)).columns[4] == f"speed-up over {METHODS['grid_paper'].title}, in forward passes"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"pace": {"lowest": 0.2, "highest": 0.32}}, "A forward pass of one final run took 1.6 times the seconds"),
        ({"made_with": [{"threads": "1"}, {"threads": "2"}]}, "made in 2 different environments"),
    ],
)
def test_seconds_of_a_busier_or_another_machine_give_no_speed_up(whole_comparison, tmp_path, changed, reason):
    _, content = whole_comparison
    content = content | {"pace": {"lowest": 0.2, "highest": 0.29}} | changed
    assert {row[5].text for row in cost_table(record(content)).rows} == {"–"}
    assert any(row[4].text == "1.00" for row in cost_table(record(content)).rows)
    write_comparison(tmp_path, record(content))
    for file in ("compare.md", "report.html"):
        assert reason in (tmp_path / file).read_text(encoding="utf-8")


def test_the_pace_is_of_the_final_runs(whole_comparison):
    folder, content = whole_comparison
    records = [json.loads(file.read_bytes()) for file in (folder / "store/records").glob("final-*.json")]
    works = [2 * one["result"]["trained_examples"] + one["result"]["measured_examples"] for one in records]
    paces = [one["seconds"] / work for one, work in zip(records, works, strict=True)]
    assert content["pace"] == {"lowest": pytest.approx(min(paces)), "highest": pytest.approx(max(paces))}


def test_all_that_print_like_the_best_are_best(whole_comparison):
    _, content = whole_comparison
    changed = copy.deepcopy(content)
    rows = {row["method"]: row for row in changed["rows"]}
    for name, row in rows.items():
        row["scores"]["test_loss"]["mean"] = {"grasp": 1.00001, "joint": 1.00002}.get(name, 2.0)
    marked = {row[0].text for row in score_table(record(changed)).rows if row[3].best}
    assert marked == {METHODS["grasp"].title, METHODS["joint"].title}


def test_the_reason_of_a_row_without_scores_goes_over_all_columns(whole_comparison, tmp_path):
    _, content = whole_comparison
    changed = copy.deepcopy(content)
    [row] = [row for row in changed["rows"] if row["method"] == "lorahub"]
    row["unavailable"] = "needs a very long reason"
    write_comparison(tmp_path, record(changed))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    columns = len(score_table(record(changed)).columns)
    assert f'colspan="{columns - 1}">unavailable: needs a very long reason</td>' in page
    [line] = [
        one for one in (tmp_path / "compare.md").read_text(encoding="utf-8").splitlines() if "very long reason" in one
    ]
    assert line.count("|") == columns + 1


def test_scores_that_run_to_one_are_told_apart(whole_comparison, tmp_path):
    _, content = whole_comparison
    changed = copy.deepcopy(content)
    changed["metrics"] = ["test_loss", "own:metric"]
    for number, row in enumerate(changed["rows"]):
        row["scores"]["own:metric"] = {"mean": 0.4 + 0.001 * number, "sd": 0.0004, "values": [0.4]}
    texts = [row[4].text for row in score_table(record(changed)).rows]
    assert texts[:2] == ["0.4000 ± 0.0004", "0.4010 ± 0.0004"]
    write_comparison(tmp_path, record(changed))
    assert (
        "scores run from 0 to 100, those of your own metrics as you define them."
        in (tmp_path / "compare.md").read_text()
    )


@pytest.mark.parametrize(
    ("changes", "says", "says_not"),
    [
        (
            {"stops_early": True, "keeps_best": True},
            "early on the dev set and keep the adapter with the lowest dev loss, except in the rows “without a dev set”, whose",
            "no dev set:",
        ),
        ({"given_target": True}, "except in the rows “without a dev set”.", "whose target adapter"),
        ({"dev_examples": 0}, "There is no dev set: final runs train to their end.", "stop early"),
        (
            {"stops_early": False, "keeps_best": True},
            "Final runs train to their end and keep the adapter with the lowest dev loss",
            "stop early",
        ),
        (
            {"stops_early": False, "keeps_best": False},
            "train to their end and keep the last adapter.",
            "lowest dev loss",
        ),
    ],
)
def test_the_page_says_which_runs_look_at_dev(whole_comparison, tmp_path, changes, says, says_not):
    _, content = whole_comparison
    write_comparison(tmp_path, record(content | changes))
    for name in ("compare.md", "report.html"):
        text = unescape((tmp_path / name).read_text(encoding="utf-8")).replace("\\", "")
        assert says in text
        assert says_not not in text


def test_too_few_resamples_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="resamples is 38; so many methods need at least 39"):
        ComparisonSettings(("target_only", "grasp"), resamples=38)


def test_a_given_prune_ratio_is_left_aside_and_everything_is_checked_first(tiny_workspace):
    settings = ComparisonSettings(("target_only", "grasp"), (1,), (0.2,), resamples=1000)
    with pytest.raises(RecipeError, match="so no round follows a step"):
        run(tiny_workspace / "compare", settings, "final.prune_ratio=0.3", "controller.rounds.every=99")
    assert not (tiny_workspace / "compare").exists()


def test_corrected_references_and_another_metric_need_no_new_answers(finished, monkeypatch):
    folder, _ = finished

    def fail(*_: Any) -> None:
        raise AssertionError("nothing is to be answered")

    monkeypatch.setattr(Session, "examine", fail)
    again, recorder = run(folder, SMALL, "metrics=[rouge1]")
    assert set(recorder.did) == {"scores"}
    assert again["metrics"] == ["test_loss", "rouge1"]


def test_a_kill_while_an_adapter_is_saved_again_does_no_harm(finished, monkeypatch):
    folder, content = finished
    shutil.rmtree(folder / "store/adapters")
    for file in (folder / "store/records").glob("final-0.60-*"):
        file.unlink()
    rename = Path.rename

    def kill(self: Path, target: Any) -> Any:
        raise Killed

    monkeypatch.setattr(Path, "rename", kill)
    with pytest.raises(Killed):
        run(folder, SMALL)
    monkeypatch.setattr(Path, "rename", rename)
    again, _ = run(folder, SMALL)
    assert without_seconds(again) == without_seconds(content)


def test_seconds_leave_out_steps_within_a_step(tmp_path, monkeypatch):
    records, now = Store(tmp_path), 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def inner(*_: Any) -> dict[str, Any]:
        nonlocal now
        now += 0.25
        return {}

    def outer(*_: Any) -> dict[str, Any]:
        nonlocal now
        now += 4.0
        return records.get("inner", {}, inner).result

    assert records.get("outer", {}, outer).seconds == 4.0
    assert records.get("inner", {}, inner).seconds == 0.25


def test_several_given_sources_are_merged_for_the_source_only_row(finished_run, tiny_workspace):
    settings = ComparisonSettings(("source_only", "merged"), (1,), (0.2,), "merged", resamples=1000)
    overrides = ("source.adapters=[run/source, run/target]", "data.source=null")
    content, _ = run(tiny_workspace / "compare", settings, *overrides)
    assert all(row["unavailable"] is None for row in content["rows"])


def test_lorahub_finds_the_better_of_two_adapters_when_the_other_is_noise(tiny_workspace, tmp_path, monkeypatch):

    one = session("target.training.epochs=6")
    good, _ = one.train_adapter("target", one.splits.train, (), one.recipe.target.training, tmp_path)
    generator = torch.Generator().manual_seed(0)
    noise = AdapterWeights(
        {
            name: LoraPair(*(0.5 * torch.randn(t.shape, generator=generator) for t in (pair.A, pair.B)), pair.scaling)
            for name, pair in good.items()
        }
    )
    measured, losses = [], Session.losses
    monkeypatch.setattr(Session, "losses", lambda *given: measured.append(given[2]) or losses(*given))
    weights = lorahub.search_weights(one, [noise, good], ("source", "target"), seed=3)
    assert measured == ["micro_dev"] * lorahub.BUDGET
    assert abs(weights[1]) > 3 * abs(weights[0])
    assert abs(weights[1]) > 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "grasp,gird"), "there is no method 'gird'"),
        (("--methods", ","), "methods is empty"),
        (("--methods", "grasp,grasp"), "grasp more than once"),
        (("--seeds", "1,1"), "1 more than once"),
        (("--seeds", "42.0"), "--seeds holds '42.0'; give whole numbers"),
        (("--seeds", "-1"), "seed is -1"),
        (("--grid", "0.5,1.5"), "grid holds 1.5"),
        (("--grid", "nan"), "grid holds nan"),
        (("--set", "data.target.test=0"), "needs a test split"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(refused, arguments, message):
    refused("compare", arguments, message)


def test_a_damaged_or_changed_record_is_refused(finished):
    folder, _ = finished
    file = next((folder / "store/records").glob("test-losses-*"))
    text = file.read_text(encoding="utf-8")
    file.write_text(text[:50], encoding="utf-8")
    with pytest.raises(RecipeError, match="is damaged; delete it"):
        run(folder, SMALL)
    content = json.loads(text)
    content["settings"]["dtype"] = "torch.float16"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RecipeError, match="was changed"):
        run(folder, SMALL)


def test_a_step_that_fails_leaves_no_record(tmp_path):
    records = Store(tmp_path)

    def fail(*_: Any) -> dict[str, Any]:
        raise RecipeError("no")

    for work in (fail, lambda *_: {"b": 2}):  # what failed is not tried again for another method
        with pytest.raises(RecipeError, match="no"):
            records.get("step", {"a": 1}, work)
    assert Store(tmp_path).get("step", {"a": 1}, lambda *_: {"b": 2}).result == {"b": 2}
    assert Store(tmp_path).get("step", {"a": 1}, fail).result == {"b": 2}


def test_a_signal_stops_a_comparison_with_status_75_and_it_goes_on(tiny_workspace, cli, monkeypatch):
    arguments = (
        "compare",
        "tiny.yaml",
        "--seeds",
        "1",
        "--methods",
        "target_only,adaptive_merge,grasp",
        "--set",
        ROUNDS_EVERY,
    )
    finetune = Session.finetune_pruned

    def interrupted(self: Session, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return finetune(self, *args, **kwargs)

    monkeypatch.setattr(Session, "finetune_pruned", interrupted)
    stopped = cli(*arguments)
    assert stopped.status == 75
    assert stopped.err == "stopped by SIGTERM at final-0.00 step 1; run the same command again to go on\n"
    monkeypatch.setattr(Session, "finetune_pruned", finetune)
    resumed = cli(*arguments)
    assert resumed.status == 0
    assert "target only (LoRA), seed 1" not in resumed.out
    assert "adaptive LoRA merge, seed 1" in resumed.out


def test_the_guide_has_each_method_with_its_title():
    page = (Path(__file__).parents[2] / "docs/guide/compare.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    found = {}
    for names, titles, *_ in (row for row in rows if len(row) == 3):
        listed = re.findall(r"`(\w+)`", names)
        found |= zip(listed, titles.split(", ") if len(listed) > 1 else [titles], strict=True)
    assert found == {name: method.title for name, method in METHODS.items()}
