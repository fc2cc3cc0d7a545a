"""Does GRASP beat the usual practice, joint training and the grid? One table of finished comparisons.

    python benchmarks/lab/planned_table.py FOLDER...

FOLDER holds the `compare.json` of one setting, whose reference is GRASP. A row each:

| column | what it holds |
|---|---|
| GRASP | the first metric of GRASP's result, the mean over the seeds |
| minus a row | that score minus the row's, with its interval, and a verdict where it was planned; "–" without the row |
| passes | forward passes beyond a given source adapter; `joint` has none, so all of its own |

The last row has the mean of each difference over the settings that have it, each setting once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from controllers import table

from grasp_lora.bench.comparison_record import COMPARISON_FILE, Comparison, Row
from grasp_lora.bench.planned import main_metric
from grasp_lora.errors import DataError, GraspError

AGAINST = ("continued", "joint", "grid", "merged")
COSTS = ("continued", "joint", "grid", "grasp")


def difference(row: Row | None, metric: str) -> tuple[str, float | None]:
    """The reference minus a row, as the table shows it; and its mean."""
    found = None if row is None else row.against.get(metric)
    if found is None:
        return "–", None
    mean, low, high = (round(one, 1) + 0.0 for one in (found.difference, found.low, found.high))  # never -0.0
    shown = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    return shown + (f", {found.verdict}" if found.verdict else ""), found.difference


def passes(row: Row | None, source: Row | None) -> str:
    """The forward passes of a row beyond the source adapter, which `joint` does without."""
    if row is None or row.cost is None:
        return "–"
    if row.method == "joint":
        return f"{row.cost.work_in_all:.0f}"
    return "–" if source is None or source.cost is None else f"{row.cost.work_in_all - source.cost.work_in_all:.0f}"


def line(found: Comparison, name: str) -> tuple[list[str], list[float | None]]:
    """The row of one comparison, and its differences.

    Raises:
        DataError: its reference is not GRASP.
    """
    if found.reference != "grasp":
        raise DataError(f"the reference of {name} is {found.reference!r}; compare it again with --reference grasp")
    rows = {row.method: row for row in found.rows if row.seeds}
    metric = main_metric(list(found.metrics))
    own = rows["grasp"].scores[metric]
    score = "–" if own is None else f"{own.mean:.1f} {metric}"
    cells = [difference(rows.get(method), metric) for method in AGAINST]
    costs = ", ".join(passes(rows.get(method), rows.get("source_only")) for method in COSTS)
    seeds, examples = str(len(found.seeds)), str(found.test_examples)
    return [name, seeds, examples, score, *(text for text, _ in cells), costs], [mean for _, mean in cells]


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
    columns = [[mean for mean in column if mean is not None] for column in zip(*(own for _, own in found), strict=True)]
    means = [f"{fmean(column):+.1f} of {len(column)}" if column else "–" for column in columns]
    heads = [
        "setting",
        "seeds",
        "test rows",
        "GRASP",
        *(f"minus {method}" for method in AGAINST),
        "passes: " + ", ".join(COSTS),
    ]
    sys.stdout.write(table(heads, [cells for cells, _ in found] + [["mean", "", "", "", *means, ""]]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
