"""Is what runs hand over as good as the best adapter their users could have had?

    python benchmarks/lab/handed_over.py RUN_FOLDER...

One row a finished run: what it handed over, its first test score, and that minus the score of the best parent (source, target or
merge, in hindsight), of `continued` and of GRASP's result. The last row has the means and, from three runs on, the half-widths of
their intervals at 95 % (Student's, over runs).

The best in hindsight owes a part to chance: its own test rows chose it. So there is a column in which half of the rows choose the
parent and the other half judges, the mean of many such halves. It needs the run's answers in `evaluation/`.

A second table has what whoever always takes the same adapter would have had: its mean score, and what was handed over minus it.
Where runs end with a last training on all rows (`final.all_rows`), it also has what they chose before that, and a last line has
what that training does to the test loss. `--chosen` takes the choice in place of what was handed over.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from controllers import table
from scipy.stats import t
from verdict import PARENTS

from grasp_lora.bench.planned import main_metric
from grasp_lora.bench.run_folder import ALL_ROWS, Metrics, predictions_file, read_metrics
from grasp_lora.errors import GraspError

FEWEST = 3  # runs that an interval needs
HALVES = 2000
ALWAYS = (*PARENTS, "continued", "grasp")


def scores_of(metrics: Metrics) -> dict[str, float]:
    """The first score of every system; without `continued` the source adapter stands in its place."""
    name = main_metric(list(metrics.systems["grasp"].metrics))
    scores = {system: float(one.metrics[name] or 0.0) for system, one in metrics.systems.items()}
    return {"continued": scores["source"]} | scores


def as_chosen(metrics: Metrics) -> Metrics:
    """A run as it was before a last training on all rows."""
    return metrics.model_copy(
        update={"systems": {name: one for name, one in metrics.systems.items() if name != ALL_ROWS}}
    )


def row(metrics: Metrics) -> tuple[str, list[float]]:
    """What was handed over, its score, and the differences."""
    scores, chosen = scores_of(metrics), metrics.handed_over
    parent = max(score for system, score in scores.items() if system.partition("_")[0] in PARENTS)
    return chosen, [scores[chosen], *(scores[chosen] - one for one in (parent, scores["continued"], scores["grasp"]))]


def always(runs: Sequence[Metrics]) -> list[list[str]]:
    """A row for each adapter that all runs have: its mean score, and what was handed over minus it."""
    scores = [scores_of(one) for one in runs]
    handed_over = [own[one.handed_over] for own, one in zip(scores, runs, strict=True)]
    rows = []
    for name in [name for name in ALWAYS if all(name in own for own in scores)]:
        apart = [ours - own[name] for ours, own in zip(handed_over, scores, strict=True)]
        rows.append([name, f"{fmean(own[name] for own in scores):.1f}", shown(apart)])
    if all(ALL_ROWS in one.systems for one in runs):
        before = [own[as_chosen(one).handed_over] for own, one in zip(scores, runs, strict=True)]
        apart = [ours - own for ours, own in zip(handed_over, before, strict=True)]
        rows.append(["the choice, before the last training", f"{fmean(before):.1f}", shown(apart)])
    return rows


def last_training(runs: Sequence[Metrics]) -> str:
    """What the last training on all rows does to the test loss, as a line; nothing where not all runs have one."""
    if not all(ALL_ROWS in one.systems for one in runs):
        return ""
    losses = [
        (one.systems[ALL_ROWS].test_loss or 0.0) - (one.systems[as_chosen(one).handed_over].test_loss or 0.0)
        for one in runs
    ]
    return f"\nThe last training moves the test loss by {shown(losses, 3)} nats.\n"


def judged_apart(folder: Path, metrics: Metrics) -> float | None:
    """What was handed over minus the parent that other test rows choose; None without the answers."""
    name = main_metric(list(metrics.systems["grasp"].metrics))
    scores = {
        system: np.array([json.loads(line)["scores"][name] for line in file.read_text(encoding="utf-8").splitlines()])
        for system in metrics.systems
        if (file := predictions_file(folder, system)).is_file()
    }
    parents = [system for system in scores if system.partition("_")[0] in PARENTS]
    if metrics.handed_over not in scores or not parents:
        return None
    random, own, found = np.random.default_rng(0), scores[metrics.handed_over], []
    for _ in range(HALVES):
        choosing = random.random(len(own)) < 0.5
        if choosing.all() or not choosing.any():
            continue
        parent = max(parents, key=lambda system: float(scores[system][choosing].mean()))
        found.append(float(own[~choosing].mean() - scores[parent][~choosing].mean()))
    return fmean(found) if found else None


def shown(values: Sequence[float], digits: int = 1) -> str:
    """The mean of differences, and its half-width where there are enough of them."""
    if len(values) < FEWEST:
        return f"{fmean(values):+.{digits}f}"
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / sqrt(len(values))
    return f"{fmean(values):+.{digits}f} ± {half:.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the runs and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--chosen", action="store_true", help="as it was before a last training on all rows")
    given = parser.parse_args(arguments)
    try:
        metrics = {folder: read_metrics(folder) for folder in given.folders}
        if given.chosen:
            metrics = {folder: as_chosen(one) for folder, one in metrics.items()}
        found = {folder: (*row(one), judged_apart(folder, one)) for folder, one in metrics.items()}
    except GraspError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    rows = [
        [str(folder), name, f"{own:.1f}", *(f"{one:+.1f}" for one in rest), "–" if apart is None else f"{apart:+.1f}"]
        for folder, (name, [own, *rest], apart) in found.items()
    ]
    columns = list(zip(*(values for _, values, _ in found.values()), strict=True))
    by_others = [apart for _, _, apart in found.values() if apart is not None]
    last = shown(by_others) if len(by_others) == len(found) else "–"
    rows.append(["mean", "", f"{fmean(columns[0]):.1f}", *map(shown, columns[1:]), last])
    minus = ["best parent", "continued", "GRASP's", "the parent that other rows choose"]
    heads = ["run", "handed over", "score", *(f"minus {one}" for one in minus)]
    sys.stdout.write(table(heads, rows) + "\n\n")
    sys.stdout.write(table(["always", "score", "handed over minus it"], always(list(metrics.values()))) + "\n")
    sys.stdout.write(last_training(list(metrics.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
