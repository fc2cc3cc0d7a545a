"""The signals by which a ratio may be chosen for labels, on numbers that are known."""

import json
from pathlib import Path

import label_choice
import numpy as np
import pytest

SURE = np.log(np.array([[0.98, 0.01, 0.01], [0.98, 0.01, 0.01]]))
GOLD = np.array([0, 1])  # one right, one wrong


def test_over_confidence_costs_what_a_temperature_takes_back() -> None:
    rows = np.arange(2)
    plain = -label_choice.log_probabilities(SURE)[rows, GOLD].mean()
    assert plain == pytest.approx(-(np.log(0.98) + np.log(0.01)) / 2)
    best = -(np.log(0.5) + np.log(0.25)) / 2  # half for the likeliest label, a quarter for each of the others
    assert best < plain
    for sharper in (1, 5):
        assert label_choice.calibrated(SURE * sharper, GOLD) == pytest.approx(best, abs=1e-3)
    assert label_choice.accuracy(SURE, GOLD) == label_choice.accuracy(SURE * 5, GOLD) == 50.0


def test_the_brier_score_is_that_of_the_definition() -> None:
    right, wrong = 0.02**2 + 2 * 0.01**2, 0.98**2 + 0.99**2 + 0.01**2
    assert label_choice.brier(SURE + 7.0, GOLD) == pytest.approx((right + wrong) / 2)


def test_only_pruned_final_runs_of_the_seeds_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = tmp_path / "store/records"
    records.mkdir(parents=True)
    for number, (seed, ratio) in enumerate(((1, 0.0), (1, 0.8), (1, 0.7), (2, 0.7))):
        record = {"settings": {"seed": seed, "prune_ratio": ratio}, "key": str(number), "result": {"dev_loss": 0.5}}
        (records / f"final-{number}.json").write_text(json.dumps(record), encoding="utf-8")
    assert label_choice.final_runs(tmp_path, [1], []) == [(1, 0.7, "2", 0.5), (1, 0.8, "1", 0.5)]
    assert label_choice.final_runs(tmp_path, [1, 2], [0.7]) == [(1, 0.7, "2", 0.5), (2, 0.7, "3", 0.5)]
    assert label_choice.main(["demo-ar", "--output", str(tmp_path), "--seeds", "1"]) == 2
    assert "demo-ar has no labels to choose from" in capsys.readouterr().err
