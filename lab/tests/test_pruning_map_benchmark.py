"""The map compares GRASP in each cell, and goes on from its own steps."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pruning_map
import pytest


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


def test_a_map_takes_no_cells_of_another_recipe_or_of_other_seeds(
    tiny_workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning_map, "RANKS", {"2": ()})
    asked = ["tiny.yaml", "--output", "m", "--sources", "8", "--stops", "early", "--json", "map.json"]
    assert pruning_map.main([*asked, "--rows", "8", "--seeds", "1"]) == 0
    before = Path("map.json").read_text()
    sets = ("final.training.learning_rate=0.02", "lora.rank=3")
    for other in (["--seeds", "2"], *(["--seeds", "1", "--set", one] for one in sets)):
        capsys.readouterr()
        assert pruning_map.main([*asked, "--rows", "8", *other]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: map.json holds cells of recipe ")
        assert "seeds 1, and these are of recipe " in said
        assert said.count("\n") == 1
        assert Path("map.json").read_text() == before
    # What tells cells apart may differ, and an older file does not say whose its cells are.
    rows = json.loads(before)
    Path("map.json").write_text(json.dumps([{name: one for name, one in rows[0].items() if name != "made_by"}]))
    assert pruning_map.main([*asked, "--rows", "6", "--seeds", "1", "--set", "target.on=source"]) == 0
    found = json.loads(Path("map.json").read_text())
    assert [(row["cell"]["rows"], row["cell"]["on"]) for row in found] == [(6, "source"), (8, None)]
    assert pruning_map.main([*asked, "--rows", "8", "--seeds", "1"]) == 0
    assert [row["made_by"] for row in json.loads(Path("map.json").read_text())] == [rows[0]["made_by"]] * 2
