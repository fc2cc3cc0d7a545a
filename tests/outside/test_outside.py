"""Objects from outside the package, one file each: a recipe names them by import path, a script adds them to a table."""

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorder import session_of

from grasp_lora.data.files import READERS, read_file
from grasp_lora.engine.compare import compare
from grasp_lora.engine.comparison import ComparisonSettings
from grasp_lora.engine.methods import METHODS

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


def test_a_method_is_a_row_of_the_comparison(tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "half_merged", runpy.run_path(str(HERE / "half_merged.py"))["HALF_MERGED"])
    settings = ComparisonSettings(
        methods=("merged", "half_merged"), reference="half_merged", seeds=(1,), grid=(0.2,), resamples=1000
    )
    rows = {row.method: row for row in compare(session_of(), Path("compare"), settings).rows}
    losses = {name: row.scores["test_loss"].mean for name, row in rows.items() if row.scores["test_loss"]}
    assert set(losses) == {"merged", "half_merged"}
    assert losses["merged"] != losses["half_merged"]


def test_a_kind_of_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READERS, ".ini", runpy.run_path(str(HERE / "ini_rows.py"))["ini_rows"])
    path = tmp_path / "rows.ini"
    path.write_text("[first]\nprompt = Who?\ncompletion = Asha\n[second]\nprompt = Where?\ncompletion = Pangani\n")
    rows = read_file("rows.ini", path).rows
    assert [row.where for row in rows] == ["rows.ini, section first", "rows.ini, section second"]
    assert rows[1].values == {"prompt": "Where?", "completion": "Pangani"}
