"""Live regret: ratios of a comparison read off its own grid's dev losses."""

import json
import sys

import live_regret
import pytest


def content(**changes):
    rows = [
        {"title": "grid", "prune_ratio": {"values": [0.2, 0.4]}},
        {"title": "GRASP", "prune_ratio": {"values": [0.3, 0.7]}},
        {"title": "merged", "prune_ratio": None},
        {"title": "too few seeds", "prune_ratio": {"values": [0.3]}},
    ]
    losses = {1: {0.4: 1.2, 0.2: 1.0}, 2: {0.2: 3.0, 0.4: 2.0}}
    curve = [
        {"seed": seed, "prune_ratio": ratio, "dev": dev} for seed, of in losses.items() for ratio, dev in of.items()
    ]
    return {"name": "tiny", "seeds": [1, 2], "rows": rows, "curve": curve} | changes


def test_a_ratio_is_worth_what_the_grid_of_its_seed_says() -> None:
    found = live_regret.regrets(content())
    assert found == {
        "grid": [(0.2, pytest.approx(0)), (0.4, pytest.approx(0))],
        "GRASP": [(0.3, pytest.approx(10.0)), (0.7, pytest.approx(0))],  # halfway, and beyond the grid
    }


def test_a_mean_over_seeds_and_comparisons(tmp_path, capsys, monkeypatch) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json")]
    other = content(name="other", rows=[{"title": "GRASP", "prune_ratio": {"values": [0.4, 0.2]}}])
    for file, one in zip(files, (content(), other), strict=True):
        file.write_text(json.dumps(one), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["live_regret.py", *map(str, files)])
    assert live_regret.main() == 0
    assert "| GRASP | 0.30, 0.70; 5.00 | 0.40, 0.20; 35.00 | 20.00 |" in capsys.readouterr().out
    files[0].write_text("{}", encoding="utf-8")
    assert live_regret.main() == 2
    assert "give files that `grasp-lora compare` wrote" in capsys.readouterr().err
