"""Objects from outside the package, one file each: a recipe runs with them by import path."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
OURS = (
    "controller={policy: {kind: 'annealing:Annealing', shrink: 0.5}, rule: 'median_merge:best_mean', rounds: {every: 3}, "
    "training: {epochs: 1, learning_rate: 1.0e-2}}",
    "merge.rule=median_merge:median",
    "mask.score=median_merge:squares",
)


@pytest.mark.parametrize("kind", ["Annealing", "Sweeping", "Asking"])
def test_a_recipe_runs_with_them(kind: str, tiny_workspace: Path, cli: Callable[..., Any]) -> None:
    for name in ("annealing.py", "median_merge.py"):
        shutil.copy(HERE / name, tiny_workspace)
    settings = [part for one in (*OURS, f"controller.policy.kind=annealing:{kind}") for part in ("--set", one)]
    refused = cli("run", "tiny.yaml", "--output", "out", *settings)
    assert refused.status == 2
    assert "names code" in refused.err
    assert "--allow-code" in refused.err
    assert not Path("out").exists()
    result = cli("run", "tiny.yaml", "--output", "out", "--allow-code", *settings)
    assert result.status == 0, result.err
    ratio = json.loads(Path("out/controller/ratio.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in Path("out/controller/rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    assert ratio["rule"] == "best_mean"
    assert any(ratio["ratio"] in row["candidates"] for row in rows)
    if kind == "Asking":
        assert rows[-1]["ratio"] == ratio["ratio"]
    assert "annealing" in Path("out/recipe.yaml").read_text(encoding="utf-8")
    again = cli("run", "tiny.yaml", "--output", "out", "--allow-code", *settings)  # all of it is done
    assert again.status == 0, again.err
