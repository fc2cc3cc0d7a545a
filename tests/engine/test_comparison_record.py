"""compare.json as a typed record: nothing is lost on the way, and a damaged file is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from grasp_lora.engine.comparison import Comparison
from grasp_lora.errors import RecipeError

SETTINGS: dict[str, Any] = {
    "methods": ["grasp", "joint"],
    "seeds": [1],
    "grid": [0.2],
    "reference": "grasp",
    "resamples": 1000,
}
SCORE = {"mean": 1.5, "sd": None, "values": [1.5]}
COST = dict.fromkeys(("runs", "seconds", "work", "runs_in_all", "seconds_in_all", "work_in_all"), 2.0)
ROWS: list[dict[str, Any]] = [
    {"method": "grasp", "title": "GRASP", "unavailable": None, "failed": False, "merges": True, "seeds": 1,
     "scores": {"test_loss": SCORE, "bertscore": None}, "prune_ratio": SCORE | {"mean": 0.4}, "chosen_on": "dev", "cost": COST,
     "against": {}},
    {"method": "joint", "title": "joint", "unavailable": "no source data", "failed": False, "merges": False},
]  # fmt: skip
CONTENT: dict[str, Any] = {
    "name": "tiny", "recipe_hash": "ab", "settings": SETTINGS, "backbone": "b", "language": "de", "seeds": [1],
    "test_examples": 8, "dev_examples": 6, "stops_early": True, "keeps_best": True,
    "micro_dev_examples": 4, "reference": "grasp", "metrics": ["test_loss", "bertscore"], "signatures": {}, "resamples": 1000,
    "comparisons": 0, "rows": ROWS, "curve": [], "warnings": [], "made_with": [{"torch": "2"}], "pace": None,
}  # fmt: skip


def test_what_was_read_is_written_again_letter_by_letter(tmp_path: Path) -> None:
    file = tmp_path / "compare.json"
    file.write_text(json.dumps(CONTENT), encoding="utf-8")
    comparison = Comparison.read(file)
    assert json.dumps(comparison.to_json()) == json.dumps(CONTENT)
    assert [row.method for row in comparison.finished] == ["grasp"]
    assert comparison.reference_title == "GRASP"


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"rows": [ROWS[0] | {"scores": 1}]}, "rows.0.scores"),
        ({"pace": {"lowest": 1}}, "pace.highest"),
        ({"seed": [1]}, "seed"),
    ],
)
def test_a_damaged_file_is_named(change: dict[str, Any], place: str, tmp_path: Path) -> None:
    file = tmp_path / "compare.json"
    file.write_text(json.dumps(CONTENT | change), encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        Comparison.read(file)
    for part in (str(file), place, "is damaged"):
        assert part in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nowhere is missing"):
        Comparison.read(tmp_path / "nowhere")
