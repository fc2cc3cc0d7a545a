"""Every row has the same trainings, and the dev loss alone chooses among them."""

from pathlib import Path

import pytest
import rates


def test_each_row_is_trained_at_every_rate_and_takes_the_one_with_the_lowest_dev_loss(
    tiny_workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["tiny.yaml", "--output", "f", "--factors", "0.01,30", "--rows", "target,merge,GRASP", "--answers"]
    assert rates.main(asked) == 0
    every, chosen = capsys.readouterr().out.strip().split("\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in every.splitlines()[2:]]
    assert [row[0] for row in rows] == [name for name in ("continued", "target", "merge", "GRASP") for _ in "ab"]
    for low, high in zip(rows[::2], rows[1::2], strict=True):
        assert [low[2].strip("*"), high[2].strip("*")] == ["0.01", "30"]
        assert low[3:] != high[3:]
        taken, other = (low, high) if "**" in low[2] else (high, low)
        assert float(taken[3]) <= float(other[3])
        assert "**" not in other[2]
        (row,) = [line for line in chosen.splitlines() if line.startswith(f"| {low[0]} |")]
        assert row.split("|")[2].strip() == taken[5]
    assert rates.main([*asked, "--set", "nosuch=1"]) == 2
    assert "error: " in capsys.readouterr().err
