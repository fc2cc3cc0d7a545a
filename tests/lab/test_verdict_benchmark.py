"""Rules that choose an adapter, on losses and scores whose answer is known."""

from pathlib import Path

import numpy as np
import pytest
import verdict

pytestmark = pytest.mark.slow

ROWS = 40


def values(**means: float) -> dict[str, np.ndarray]:
    """Rows whose paired differences have a standard error of about 0.1."""
    noise = np.where(np.arange(ROWS) % 2, 0.62, -0.62)
    return {name: mean + noise * (number + 1) for number, (name, mean) in enumerate(means.items())}


def test_the_usual_candidate_stays_within_its_standard_errors() -> None:
    scores = values(continued=0.0, target=0.0)
    for behind, chosen in ((0.15, "continued"), (0.25, "target")):
        losses = values(continued=1.0 + behind, target=1.0)
        assert verdict.unless("continued", 2.0, losses, scores) == chosen
        assert verdict.lowest_loss(losses, scores) == "target"


def test_of_equal_scores_the_lower_loss_decides() -> None:
    scores = {"continued": np.ones(4), "grasp": np.ones(4)}
    losses = {"continued": np.full(4, 2.0), "grasp": np.full(4, 1.0)}
    assert verdict.highest_score(losses, scores) == "grasp"
    assert verdict.both(values(continued=1.0, grasp=1.1), values(continued=1.0, grasp=1.5)) == "grasp"


def test_a_rule_is_judged_on_the_rows_that_did_not_choose() -> None:
    # Each candidate is right in one half of the rows, and its loss says so: what chooses well on some rows is wrong on others.
    first = (np.arange(ROWS) < ROWS // 2).astype(float)
    scores = {name: 100 * (first if name == "continued" else 1 - first) for name in ("continued", "grasp", "merged")}
    seed = verdict.Seed({name: -own for name, own in scores.items()}, scores)
    found = {row[0]: row for row in verdict.replay([seed], ROWS // 2, 50, 2)}
    assert float(found["highest score"][1]) < float(found["always continued"][1])
    assert found["always continued"][2] == "+0.00"
    assert found["always grasp"][4] == "grasp 100 %"


def test_the_design_effect_is_the_size_of_groups_that_are_wholly_alike() -> None:
    alike = np.repeat(np.random.default_rng(0).normal(size=10), 4)
    seed = verdict.Seed({"continued": np.zeros(40), "grasp": alike}, {"continued": np.zeros(40), "grasp": np.zeros(40)})
    groups = [f"article {row // 4}" for row in range(40)]
    assert verdict.design_effects([seed], groups) == "Design effect of 10 groups of 40 rows: losses 4.00 (4.00 to 4.00)"


def test_the_table_of_a_comparison(tiny_workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["tiny.yaml", "--output", "f", "--seeds", "1,2", "--rows", "2", "--draws", "5"]
    assert verdict.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Design effect of 8 groups of 8 rows: losses 1.00 (1.00 to 1.00)")
    titles = [line.split(" | ")[0].strip("| ") for line in lines[4:]]
    assert titles == [*(f"always {name}" for name in verdict.CANDIDATES.values()), *verdict.RULES, "a run's"]


def test_finished_runs_count_as_seeds(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict.main(["--runs", str(finished_run), "--rows", "4", "--draws", "5"]) == 0
    assert "| always grasp | " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        verdict.main(["--rows", "4"])


def test_ahead_is_more_than_so_many_standard_errors() -> None:
    losses = values(source=1.15, target=1.0)
    assert verdict.ahead(1.0, losses, losses) == "grasp"
    assert verdict.ahead(2.0, losses, losses) == "continued"
