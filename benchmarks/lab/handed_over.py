"""Is what runs hand over as good as the best adapter their users could have had?

    python benchmarks/lab/handed_over.py RUN_FOLDER...

One row a finished run: what it handed over, its first test score, and that minus the score of the best parent (source, target or
merge, in hindsight), of `continued` and of GRASP's result. The last row has the means and, from three runs on, the half-widths of
their intervals at 95 % (Student's, over runs).
"""

import argparse
import sys
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

from controllers import table
from scipy.stats import t
from verdict import PARENTS

from grasp_lora.bench.planned import main_metric
from grasp_lora.bench.run_folder import Metrics, read_metrics
from grasp_lora.errors import GraspError

FEWEST = 3  # runs that an interval needs


def row(metrics: Metrics) -> tuple[str, list[float]]:
    """What was handed over, its score, and the differences; without `continued` the source adapter stands in its place."""
    name = main_metric(list(metrics.systems["grasp"].metrics))
    scores = {system: float(one.metrics[name] or 0.0) for system, one in metrics.systems.items()}
    chosen = metrics.handed_over
    parent = max(score for system, score in scores.items() if system.partition("_")[0] in PARENTS)
    against = [parent, scores.get("continued", scores["source"]), scores["grasp"]]
    return chosen, [scores[chosen], *(scores[chosen] - one for one in against)]


def shown(values: Sequence[float]) -> str:
    """The mean of differences, and its half-width where there are enough of them."""
    if len(values) < FEWEST:
        return f"{fmean(values):+.1f}"
    return f"{fmean(values):+.1f} ± {t.ppf(0.975, len(values) - 1) * stdev(values) / sqrt(len(values)):.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the runs and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    given = parser.parse_args(arguments)
    try:
        found = {folder: row(read_metrics(folder)) for folder in given.folders}
    except GraspError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    rows = [
        [str(folder), name, f"{own:.1f}", *(f"{one:+.1f}" for one in rest)]
        for folder, (name, [own, *rest]) in found.items()
    ]
    columns = list(zip(*(values for _, values in found.values()), strict=True))
    rows.append(["mean", "", f"{fmean(columns[0]):.1f}", *map(shown, columns[1:])])
    heads = ["run", "handed over", "score", "minus best parent", "minus continued", "minus GRASP's"]
    sys.stdout.write(table(heads, rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
