"""The table of the planned comparisons, from a record whose figures are known."""

import json
from pathlib import Path
from typing import Any

import planned_table
import pytest

ON_RECORD = Path(__file__).parents[1] / "results" / "compare-nusax-jv-on-source"


def comparison(folder: Path, reference: str = "grasp", shift: float = 0.0, without: tuple[str, ...] = ()) -> str:
    """A copy of the comparison on record, its differences moved and rows missing."""
    content: dict[str, Any] = json.loads((ON_RECORD / "compare.json").read_text(encoding="utf-8"))
    content["reference"] = reference
    content["rows"] = [row for row in content["rows"] if row["method"] not in without]
    for row in content["rows"]:
        for one in row["against"].values():
            one["difference"] += shift
    folder.mkdir()
    (folder / "compare.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def test_a_row_a_setting_and_the_means_of_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(ON_RECORD), comparison(tmp_path / "compare-other", shift=1.0, without=("grid",))]
    assert planned_table.main(folders) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[0][:7] == [
        *("nusax-jv-on-source", "6", "400", "3", "71.0 accuracy"),
        *("+1.4 (-2.1 to +4.9), no difference shown", "-0.8 (-4.3 to +2.8), no difference shown"),
    ]
    assert rows[0][7:] == ["+2.4 (+0.7 to +4.2), better", "+1.8 (-1.0 to +4.7)", "400, 1600, 2150, 1010"]
    assert (rows[1][0], rows[1][7], rows[1][9]) == ("other", "–", "400, 1600, –, 1010")
    # Corrected for three comparisons, an interval of 6.97 points has a standard error of 1.46; that of the mean of two is 1.03.
    assert rows[2][5:8] == ["+1.9 of 2 (-0.1 to +3.9)", "-0.2 of 2 (-2.3 to +1.8)", "+2.4 of 1 (+1.0 to +3.8)"]


def test_without_the_source_adapters_row_its_passes_come_from_the_continued_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned_table.main([comparison(tmp_path / "other", without=("source_only",))]) == 0
    assert "400, 1600, 2150, 1010" in capsys.readouterr().out
    assert planned_table.main([comparison(tmp_path / "neither", without=("source_only", "continued"))]) == 2
    assert "no row tells what the source adapter takes" in capsys.readouterr().err


def test_a_comparison_whose_grasp_failed_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = comparison(tmp_path / "failed")
    file = Path(folder) / "compare.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for row in content["rows"]:
        row["against"] = {}
    [row] = [row for row in content["rows"] if row["method"] == "grasp"]
    empty = {"seeds": 0, "scores": {}, "prune_ratio": None, "cost": None}
    row |= empty | {"unavailable": "failed with seed 42: no loss is finite", "failed": True}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert planned_table.main([folder]) == 2
    said = "error: GRASP has no result in failed (failed with seed 42: no loss is finite); mend that and compare again"
    assert said in capsys.readouterr().err
    content["rows"].remove(row)
    file.write_text(json.dumps(content), encoding="utf-8")
    assert planned_table.main([folder]) == 2
    assert "GRASP has no result in failed (it has no row)" in capsys.readouterr().err


def test_another_reference_and_a_missing_comparison_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned_table.main([comparison(tmp_path / "grid", reference="grid")]) == 2
    assert "the reference of grid is 'grid'" in capsys.readouterr().err
    assert planned_table.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
