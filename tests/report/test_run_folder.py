"""A run folder is read as far as it has got; a damaged file is named, an unfinished line is none."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from grasp_lora.bench.records import read_lines, read_record
from grasp_lora.bench.run_folder import (
    DataFacts,
    FactorSparsity,
    LearnedRatio,
    Metrics,
    Prediction,
    RunInfo,
)
from grasp_lora.errors import RecipeError
from grasp_lora.method.rules import RatioEstimate
from grasp_lora.report.run_record import read_run
from grasp_lora.report.tables import by_factor, kept_share

RUN = {"grasp_lora": "0.1.0", "recipe_hash": "4f1e", "name": "demo", "seed": 1, "created": "2026-11-24T15:02:11+00:00"}
RUN |= {"backbone": {"name": "google/gemma-3-270m", "fingerprint": "9d20"}}
ROUND: dict[str, Any] = {"round": 1, "step": 10, "candidates": [0.4, 0.6], "baseline_losses": [1.0, 2.0]}
ROUND |= {"candidate_losses": [[1.0, 2.0], [1.5, 2.5]], "rewards": [0.0, -0.5], "policy_mean": 0.5, "policy_std": 0.1}
ROUND |= {"committed": True, "clipped": False, "ratio_before": 0.5, "ratio": 0.45}
RATIO = {"prune_ratio": 0.4, "low": 0.3, "high": 0.5, "confidence": 0.95, "rule": "smooth_fit"}
TIMING = {"round": 1, "step": 10, "probe_seconds": 2.0, "train_seconds": 6.0}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run that has just begun."""
    write(tmp_path / "run.json", json.dumps(RUN))
    write(tmp_path / "recipe.yaml", "name: demo\n")
    return tmp_path


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_what_a_run_writes_is_what_the_shapes_hold(reference_run: Path) -> None:
    shapes: dict[str, type[Any]] = {"run.json": RunInfo, "data.json": DataFacts, "metrics.json": Metrics}
    shapes |= {"controller/ratio.json": LearnedRatio}
    for name, shape in shapes.items():
        content = (reference_run / name).read_text(encoding="utf-8")
        found = read_record(reference_run / name, shape)
        assert json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n" == content
    rows = [row.to_json() for row in read_lines(reference_run / "evaluation" / "grasp.jsonl", Prediction)]
    assert rows == [
        json.loads(line) for line in (reference_run / "evaluation" / "grasp.jsonl").read_text().splitlines()
    ]
    entries = read_record(reference_run / "final" / "sparsity.json", list[FactorSparsity]) or []
    assert [one.to_json() for one in entries] == json.loads((reference_run / "final" / "sparsity.json").read_text())


def test_an_estimate_becomes_the_ratio_file_and_comes_back() -> None:
    curve = ((0.1, 1.0, 0.5, 1.5), (0.4, 0.0, 0.0, 0.0))
    ratio = LearnedRatio.of(RatioEstimate(0.4, 0.3, 0.5, "smooth_fit", 7, curve))
    assert (ratio.prune_ratio, ratio.low, ratio.high, ratio.rounds) == (0.4, 0.3, 0.5, 7)
    assert ratio.curve.to_json() == {"ratios": [0.1, 0.4], "mean": [1.0, 0.0], "low": [0.5, 0.0], "high": [1.5, 0.0]}
    assert ratio.estimate == RatioEstimate(0.4, 0.3, 0.5, "smooth_fit", 7, curve)
    assert LearnedRatio.of(RatioEstimate(0.4, 0.3, 0.5, "best_reward", 7)).curve.ratios == []


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metrics.json", '{"systems": ', "it is not valid JSON, "),
        ("metrics.json", '{"systems": {}}', "test_examples"),
        ("metrics.json", "[1]", "should be an object"),
        ("run.json", '{"name": "x"}', "grasp_lora"),
        ("data.json", "[]", "should be an object"),
        ("data.json", '{"ids": {"test": 100}}', "ids.test"),
        ("recipe.yaml", "a: [", "no valid YAML"),
        ("recipe.yaml", "- a", "keys and values"),
        ("cost.json", '{"final": "long"}', "final"),
        ("controller/rounds.jsonl", '{"round": 1\n', "(line 1) is damaged: it is not valid JSON"),
        ("controller/rounds.jsonl", json.dumps(ROUND | {"rewards": [0.0]}), "equally many"),
        ("controller/rounds.jsonl", json.dumps(ROUND | {"candidate_losses": [[], []]}), "candidate_losses.0"),
        ("controller/rounds.jsonl", b"\xff\xfe", "not UTF-8"),
        ("controller/ratio.json", '{"prune_ratio": 46}', "prune_ratio"),
        ("controller/ratio.json", json.dumps(RATIO | {"curve": {"ratios": [0.1]}}), "equally long"),
        ("final/sparsity.json", "{}", "valid array"),
        ("final/history.jsonl", '{"step": 1}\n{"step": "x"}', "(line 2)"),
        ("evaluation/grasp.jsonl", '{"id": "a"}', "prediction"),
        ("evaluation/grasp.jsonl", '{"id": "a", ', "(line 1)"),
    ],
)
def test_damaged_file_is_named(run_folder: Path, name: str, content: str | bytes, reason: str) -> None:
    write(run_folder / name, content)
    with pytest.raises(RecipeError, match=re.escape(reason)) as caught:
        read_run(run_folder)
    assert str(run_folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["controller/rounds.jsonl", "controller/timings.jsonl", "source/history.jsonl"])
def test_unfinished_last_line_is_left_out(run_folder: Path, name: str) -> None:
    row = json.dumps({"rounds": ROUND, "timings": TIMING, "history": {"step": 1, "loss": 2.5}}[Path(name).stem])

    def rows() -> int:
        record = read_run(run_folder)
        return len(record.rounds) + len(record.timings) + len(record.history["source"])

    for end in range(len(row)):
        write(run_folder / name, f"{row}\n{row[:end]}")
        assert rows() == 1
    for end in ("", "\n"):
        write(run_folder / name, f"{row}\n{row}{end}")
        assert rows() == 2


@pytest.mark.parametrize("missing", ["run.json", "recipe.yaml"])
def test_folder_without_a_run_is_refused(run_folder: Path, missing: str) -> None:
    (run_folder / missing).unlink()
    with pytest.raises(RecipeError, match=f"is no run folder: {re.escape(missing)} is missing"):
        read_run(run_folder)


@pytest.mark.parametrize(("recipe", "ratio"), [("final: {prune_ratio: 0}", 0.0), ("final: {prune_ratio: null}", None)])
def test_given_ratio_makes_the_controller_unnecessary(run_folder: Path, recipe: str, ratio: float | None) -> None:
    write(run_folder / "recipe.yaml", recipe)
    record = read_run(run_folder)
    assert record.prune_ratio == record.given_ratio == ratio
    assert ("controller" in record.missing) == (ratio is None)
    assert len(record.missing) == (7 if ratio is None else 6)


def test_factors_are_named_in_short_where_that_is_clear() -> None:
    def named(*modules: str) -> list[tuple[str, str]]:
        entries = [FactorSparsity(module=name, factor="A", segment="source", weights=4, kept=1) for name in modules]
        assert kept_share(entries) == 0.25
        return [(factor, layer) for (factor, _), found in by_factor(entries).items() for layer, _ in found]

    clear = named("model.layers.10.self_attn.v_proj", "model.layers.2.self_attn.q_proj", "lm_head")
    assert clear == [("lm_head A", "–"), ("q_proj A", "2"), ("v_proj A", "10")]
    assert named("h.0.attn.c_proj", "h.0.mlp.c_proj") == [("attn.c_proj A", "0"), ("mlp.c_proj A", "0")]


@pytest.mark.parametrize("text", ["[" * 5000, "a: &a [1]\nb: *a\n", "a: 1\na: 2\n"])
def test_a_recipe_that_was_tampered_with_is_damaged(finished_run, cli, text):
    (finished_run / "recipe.yaml").write_text(text, encoding="utf-8")
    result = cli("report", finished_run)
    assert result.status == 2
    assert "recipe.yaml is damaged" in result.err
    assert result.err.count("\n") == 1
