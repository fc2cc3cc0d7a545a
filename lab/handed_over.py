"""Is what runs hand over as good as the best adapter their users could have had?

    python lab/handed_over.py FOLDER...

FOLDER is a run's, or a finished comparison's with the row `delivered`. Each run, or each seed or fold of a comparison, has a row.
It tells what was handed over, its first test score, and that minus the score of four others:

- the best parent in hindsight: source or target adapter. Where the target adapter is trained on the source adapter, it acts with
  that one only. So the untrained sum of both, `merged`, stands in its place; with `target.on: auto` where the sum was taken;
- the best parent or merge in hindsight, however the target adapter is trained;
- `continued`, and GRASP's result.

The last row has the means and, from three runs on, the half-widths of their intervals at 95 % (Student's, over runs).

The best in hindsight owes a part to chance: its own test rows chose it. So there is a column in which half of the rows choose the
parent or merge and the other half judges, the mean of many such halves. It needs the run's answers in `evaluation/`.

A second table has what whoever always takes the same adapter would have had: its mean score, and what was handed over minus it.
Where runs end with a last training on all rows (`final.all_rows`), it also has what they chose before that, and a last line has
what that training does to the test loss. `--chosen` takes the choice in place of what was handed over.
"""

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import yaml
from controllers import table
from scipy.stats import t
from verdict import PARENTS, SUM

from grasp_lora.bench.comparison_record import COMPARISON_FILE, Comparison
from grasp_lora.bench.planned import main_metric
from grasp_lora.bench.run_folder import ALL_ROWS, Metrics, predictions_file, read_metrics
from grasp_lora.errors import DataError, GraspError
from grasp_lora.recipes.stages import AUTO
from grasp_lora.recipes.text import RECIPE_FILE
from grasp_lora.text.display import first_line

FEWEST = 3  # runs that an interval needs
HALVES = 2000
NAMES = {"source_only": "source", "target_only": "target"} | {
    name: name for name in ("merged", "continued", "grasp", "delivered")
}  # method of a comparison -> system of a run
ALWAYS = (*PARENTS, "continued", "grasp")


class Outcome(NamedTuple):
    """What one run, or one seed of a comparison, handed over, and the first score of every adapter it had."""

    name: str
    chosen: str
    score: float
    scores: dict[str, float]
    before: float | None = None  # the score of what was chosen before a last training on all rows
    loss_moved: float | None = None  # by that training, in nats
    apart: float | None = None  # see `judged_apart`

    def minus(self) -> list[float]:
        """The score minus those of the best parent, the best parent or merge, `continued` and GRASP's result."""
        merge = [score for name, score in self.scores.items() if is_a(name, PARENTS)]
        own = [self.scores[name] for name in parents(self.scores)]
        return [self.score - one for one in (max(own), max(merge), self.scores["continued"], self.scores["grasp"])]


def parents(systems: Collection[str]) -> list[str]:
    """The adapters that are merged; the untrained sum is one of them where there is no target adapter without it."""
    kinds = ("source", "target" if any(is_a(name, ("target",)) for name in systems) else "merged")
    return [name for name in systems if is_a(name, kinds)]


def is_a(name: str, kinds: Sequence[str]) -> bool:
    """Whether a system is of these kinds: `source_2` is a source adapter."""
    return name.partition("_")[0] in kinds


def needed(value: float | None, what: str) -> float:
    """The value, which a run without a test set does not have.

    Raises:
        DataError: it is not there.
    """
    if value is None:
        raise DataError(f"{what} is not on record; give runs with a test set, and metrics that could be measured")
    return value


def of_run(folder: Path, *, before: bool) -> Outcome:
    """A finished run; `before` takes its choice before a last training on all rows."""
    metrics = read_metrics(folder)
    first = metrics.model_copy(
        update={"systems": {name: one for name, one in metrics.systems.items() if name != ALL_ROWS}}
    )
    trained = metrics.systems.get(ALL_ROWS) if not before else None
    shown = metrics if trained is not None else first
    name = main_metric(list(shown.systems["grasp"].metrics))
    scores = {
        system: needed(one.metrics[name], f"{folder}: {name} of {system}") for system, one in shown.systems.items()
    }
    scores = {"continued": scores["source"]} | scores  # without `continued` the source adapter stands in its place
    moved = None
    if trained is not None:
        before_it = first.systems[first.handed_over].test_loss
        moved = needed(trained.test_loss, f"{folder}: test loss") - needed(before_it, f"{folder}: test loss before")
    return Outcome(
        str(folder),
        shown.handed_over,
        scores[shown.handed_over],
        scores,
        None if trained is None else scores[first.handed_over],
        moved,
        judged_apart(folder, shown),
    )


def of_comparison(folder: Path) -> list[Outcome]:
    """A finished comparison, each of its seeds or folds by itself.

    Raises:
        DataError: it lacks one of the rows.
    """
    found = Comparison.read(folder / COMPARISON_FILE)
    numbers = range(1, len(found.folds) + 1) if found.folds else found.seeds
    metric, values = main_metric(list(found.metrics)), {}
    for one in found.rows:
        if one.method in NAMES and one.seeds and (spread := one.scores[metric]) is not None:
            values[one.method] = spread.values * (len(numbers) if len(spread.values) == 1 else 1)
    summed, needed = with_sum(folder, found, numbers), ["delivered", "merged", "continued", "grasp", "source_only"]
    if len(summed) < len(numbers):
        needed.append("target_only")
    if missing := [name for name in needed if name not in values]:
        raise DataError(f"{folder} lacks {', '.join(missing)}; compare again with --methods {','.join(missing)}")
    outcomes = []
    for place, number in enumerate(numbers):
        scores = {NAMES[name]: own[place] for name, own in values.items()}
        if number in summed:
            scores.pop("target", None)  # trained apart, so no part of the sum
        outcomes.append(Outcome(f"{folder}, {found.runs[:-1]} {number}", "delivered", scores["delivered"], scores))
    return outcomes


def with_sum(folder: Path, found: Comparison, numbers: Collection[int]) -> set[int]:
    """The seeds or folds of a comparison whose target adapter is trained on the source adapter.

    Raises:
        DataError: its recipe does not say so, and neither does the table.
    """
    file = folder / RECIPE_FILE
    try:
        target = yaml.safe_load(file.read_text(encoding="utf-8")).get("target") or {}
        on = target.get("on")  # an older recipe has no such key
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise DataError(
            f"{file} cannot be read as a recipe ({first_line(error)}); compare again in its folder"
        ) from error
    if on == AUTO:
        if unknown := sorted({*numbers} - found.merges.keys()):
            raise DataError(
                f"{folder} does not say which merge was taken with {unknown[0]}; compare again in its folder"
            )
        return {number for number in numbers if found.merges[number] == SUM}
    return set() if on is None else set(numbers)


def always(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """A row for each adapter that all runs have: its mean score, and what was handed over minus it."""
    rows = []
    for name in [name for name in ALWAYS if all(name in one.scores for one in outcomes)]:
        apart = [one.score - one.scores[name] for one in outcomes]
        rows.append([name, f"{fmean(one.scores[name] for one in outcomes):.1f}", shown(apart)])
    before = [one.before for one in outcomes if one.before is not None]
    if len(before) == len(outcomes):
        apart = [one.score - own for one, own in zip(outcomes, before, strict=True)]
        rows.append(["the choice, before the last training", f"{fmean(before):.1f}", shown(apart)])
    return rows


def judged_apart(folder: Path, metrics: Metrics) -> float | None:
    """What was handed over minus the parent or merge that other test rows choose; None without the answers."""
    name = main_metric(list(metrics.systems["grasp"].metrics))
    scores = {
        system: np.array([json.loads(line)["scores"][name] for line in file.read_text(encoding="utf-8").splitlines()])
        for system in metrics.systems
        if (file := predictions_file(folder, system)).is_file()
    }
    own_parents = [system for system in scores if is_a(system, PARENTS)]
    if metrics.handed_over not in scores or not own_parents:
        return None
    random, own, found = np.random.default_rng(0), scores[metrics.handed_over], []
    for _ in range(HALVES):
        choosing = random.random(len(own)) < 0.5
        if choosing.all() or not choosing.any():
            continue
        parent = max(own_parents, key=lambda system: float(scores[system][choosing].mean()))
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
        outcomes: list[Outcome] = []
        for folder in given.folders:
            if (folder / COMPARISON_FILE).is_file():
                outcomes += of_comparison(folder)
            else:
                outcomes.append(of_run(folder, before=given.chosen))
    except GraspError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    minus = [one.minus() for one in outcomes]
    rows = []
    for one, rest in zip(outcomes, minus, strict=True):
        apart = "–" if one.apart is None else f"{one.apart:+.1f}"
        rows.append([one.name, one.chosen, f"{one.score:.1f}", *(f"{value:+.1f}" for value in rest), apart])
    by_others = [one.apart for one in outcomes if one.apart is not None]
    last = shown(by_others) if len(by_others) == len(outcomes) else "–"
    means = [shown(column) for column in zip(*minus, strict=True)]
    rows.append(["mean", "", f"{fmean(one.score for one in outcomes):.1f}", *means, last])
    against = [
        "best parent",
        "best parent or merge",
        "continued",
        "GRASP's",
        "the parent or merge that other rows choose",
    ]
    heads = ["run", "handed over", "score", *(f"minus {one}" for one in against)]
    sys.stdout.write(table(heads, rows) + "\n\n")
    sys.stdout.write(table(["always", "score", "handed over minus it"], always(outcomes)) + "\n")
    moved = [one.loss_moved for one in outcomes if one.loss_moved is not None]
    if len(moved) == len(outcomes):
        sys.stdout.write(f"\nThe last training moves the test loss by {shown(moved, 3)} nats.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
