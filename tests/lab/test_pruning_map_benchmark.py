"""The map compares GRASP in each cell, and goes on from its own steps."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pruning_map
import pytest

pytestmark = pytest.mark.slow


def test_a_map_of_two_cells(
    tiny_workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning_map, "RANKS", {"2": ()})
    asked = ["tiny.yaml", "--output", "m", "--rows", "8", "--sources", "8", "--seeds", "1", "--rivals"]
    assert pruning_map.main([*asked, "--json", "map.json", "--figure", "map.svg"]) == 0
    first = capsys.readouterr().out
    rows = json.loads(Path("map.json").read_text())
    assert [row["cell"]["stopping"] for row in rows] == ["early", "none"]
    for row in rows:
        ours = row["test_loss"]["GRASP"]
        assert len(row["GRASP minus"]) == 6
        for name, found in row["GRASP minus"].items():
            assert found["difference"] == pytest.approx(ours - row["test_loss"][name], abs=1e-6)
            assert found["low"] <= found["difference"] <= found["high"]
    circles = ElementTree.parse("map.svg").getroot().iter("{http://www.w3.org/2000/svg}circle")
    assert len(list(circles)) == 4
    before = {file: file.stat().st_mtime_ns for file in Path("m/store/records").iterdir()}
    assert pruning_map.main(asked) == 0
    assert capsys.readouterr().out == first
    assert {file: file.stat().st_mtime_ns for file in Path("m/store/records").iterdir()} == before
