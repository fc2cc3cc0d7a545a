"""Does GRASP beat the usual practice, joint training and the grid? One table of finished comparisons.

    python lab/planned_table.py FOLDER...

FOLDER holds the `compare.json` of one setting, whose reference is GRASP. A row each:

| column | what it holds |
|---|---|
| GRASP | the first metric of GRASP's result, the mean over the seeds |
| minus a row | that score minus the row's, with its interval, and a verdict where it was planned; "–" without the row |
| planned | how many planned comparisons there are: their intervals are the wider, the more there are |
| passes | forward passes beyond a given source adapter; `joint` has none, so all of its own |

The last row has the mean of each difference over the settings that have it, each setting once. Its interval (95 %, by itself)
takes the settings as they are and their test examples as drawn: normal, from the width of each setting's own interval.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist, fmean
from typing import NamedTuple

from controllers import table

from grasp_lora.bench.comparison_record import COMPARISON_FILE, Comparison, Row
from grasp_lora.bench.planned import main_metric
from grasp_lora.errors import DataError, GraspError

AGAINST = ("continued", "joint", "grid", "merged")
COSTS = ("continued", "joint", "grid", "grasp")


class Difference(NamedTuple):
    """A mean difference and its standard error, both in points of the score."""

    mean: float
    error: float


def difference(row: Row | None, metric: str) -> tuple[str, Difference | None]:
    """The reference minus a row, as the table shows it; and in numbers."""
    found = None if row is None else row.against.get(metric)
    if found is None:
        return "–", None
    errors = NormalDist().inv_cdf(
        1 - (1 - found.confidence) / 2 / found.comparisons
    )  # that the interval reaches to a side
    shown = interval(found.difference, found.low, found.high)
    return shown + (f", {found.verdict}" if found.verdict else ""), Difference(
        found.difference, (found.high - found.low) / 2 / errors
    )


def interval(mean: float, low: float, high: float, of: str = "") -> str:
    """A mean and its interval with one digit, never -0.0."""
    mean, low, high = (round(one, 1) + 0.0 for one in (mean, low, high))
    return f"{mean:+.1f}{of} ({low:+.1f} to {high:+.1f})"


def mean_of(column: Sequence[Difference | None]) -> str:
    """The mean over the settings that have the row, and its interval."""
    found = [one for one in column if one is not None]
    if not found:
        return "–"
    mean = fmean(one.mean for one in found)
    half = NormalDist().inv_cdf(0.975) * math.hypot(*(one.error for one in found)) / len(found)
    return interval(mean, mean - half, mean + half, f" of {len(found)}")


def passes(row: Row | None, source: float) -> str:
    """The forward passes of a row beyond those of the source adapter, which `joint` does without."""
    if row is None or row.cost is None:
        return "–"
    return f"{row.cost.work_in_all - (0 if row.method == 'joint' else source):.0f}"


def of_source(rows: dict[str, Row]) -> float:
    """The forward passes of the source adapter: its own row's, or what `continued` takes beyond its one training."""
    for method in ("source_only", "continued"):
        if method in rows and (cost := rows[method].cost) is not None:
            return cost.work_in_all - cost.work
    raise DataError("no row tells what the source adapter takes; compare again with --methods source_only")


def line(found: Comparison, name: str) -> tuple[list[str], list[Difference | None]]:
    """The row of one comparison, and its differences.

    Raises:
        DataError: its reference is not GRASP, or has no result.
    """
    if found.reference != "grasp":
        raise DataError(f"the reference of {name} is {found.reference!r}; compare it again with --reference grasp")
    rows = {row.method: row for row in found.rows if row.seeds}
    if "grasp" not in rows:
        reason = next((row.unavailable for row in found.rows if row.method == "grasp"), None) or "it has no row"
        raise DataError(f"GRASP has no result in {name} ({reason}); mend that and compare again, or leave {name} out")
    metric = main_metric(list(found.metrics))
    own = rows["grasp"].scores[metric]
    score = "–" if own is None else f"{own.mean:.1f} {metric}"
    cells = [difference(rows.get(method), metric) for method in AGAINST]
    source = of_source(rows)
    costs = ", ".join(passes(rows.get(method), source) for method in COSTS)
    planned = [one.comparisons for row in rows.values() if (one := row.against.get(metric)) and one.verdict]
    facts = [name, *map(str, (len(found.seeds), found.test_examples, max(planned, default=0)))]
    return [*facts, score, *(text for text, _ in cells), costs], [one for _, one in cells]


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the comparisons and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    given = parser.parse_args(arguments)
    try:
        found = [
            line(Comparison.read(folder / COMPARISON_FILE), folder.name.removeprefix("compare-"))
            for folder in given.folders
        ]
    except GraspError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    means = [mean_of(column) for column in zip(*(own for _, own in found), strict=True)]
    heads = [
        "setting",
        "seeds",
        "test rows",
        "planned",
        "GRASP",
        *(f"minus {method}" for method in AGAINST),
        "passes: " + ", ".join(COSTS),
    ]
    sys.stdout.write(table(heads, [cells for cells, _ in found] + [["mean", "", "", "", "", *means, ""]]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
