"""From `compare.json` to what a person reads: a table in the terminal, compare.md and report.html."""

import secrets
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from grasp_lora.bench.comparison_record import TEST_LOSS, Comparison, Cost, Row, Spread
from grasp_lora.bench.methods import METHODS
from grasp_lora.bench.planned import expected_width, main_metric, saves_over_confidence
from grasp_lora.bench.run_folder import COMPARE_FOLDER, REPORT_FILE
from grasp_lora.recipes.text import RECIPE_FILE
from grasp_lora.report.figures import comparison_figure, plotly_js
from grasp_lora.report.pages import PAPER, render
from grasp_lora.report.tables import METRIC_NAMES, SAME_EVERYWHERE, Cell, Table, scale_note, score_digits
from grasp_lora.storage.files import write_whole

COMPARISON_TABLES_FILE = "compare.md"
CHOSEN_ON = {None: "–", "dev": "dev", "micro_dev": "micro-dev", "both": "micro-dev and dev"}
STEADY = 1.5  # seconds per forward pass of the final runs that may differ this many times before speed-ups in seconds mislead
GRIDS = ("grid", "grid_paper")  # the first of them that was run is what speed-ups refer to
FULL_WIDTH = 180  # of a table that does not go to a terminal


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write compare.md and report.html into the folder of a comparison; return the path of the latter."""
    view = _view(comparison)
    write_whole(folder / COMPARISON_TABLES_FILE, render("comparison.md.j2", view))
    page = {
        "figures": {"grid": comparison_figure(comparison)} if comparison.curve else {},
        "plotly_js": plotly_js(),
        "nonce": secrets.token_urlsafe(16),
    }
    path = folder / REPORT_FILE
    write_whole(path, render("comparison.html.j2", view | page))
    return path


def wide(console: Console) -> Console:
    """The console to print a table on. Without a terminal rich would take 80 columns."""
    if console.is_terminal:
        return console
    return Console(file=console.file, width=FULL_WIDTH, quiet=console.quiet, emoji=False)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the table of a comparison."""
    table = score_table(comparison)
    printed = RichTable()
    for column in table.columns:
        printed.add_column(column, overflow="fold")  # a narrow terminal cuts no word off
    for row in table.rows:
        # A row that is short, since its text goes over several columns, is filled up.
        printed.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
    wide(console).print(printed)
    if comparison.merge:
        console.print(
            f"the merge that rows rest on, by {comparison.runs[:-1]}: {comparison.merge}", markup=False, soft_wrap=True
        )
    for one in comparison.finished:
        if one.taken:
            console.print(f"{one.title}, by {comparison.runs[:-1]}: {one.taken}", markup=False, soft_wrap=True)
    for warning in comparison.warnings:
        console.print(f"WARNING: {warning}", style="bold red", markup=False, soft_wrap=True)


def command_of(comparison: Comparison) -> str:
    """The command that makes the comparison in the folder of the experiment; with its store there it only writes it anew."""
    settings = comparison.settings
    words = ["grasp-lora", "compare", f"{COMPARE_FOLDER}/{RECIPE_FILE}"]
    if set(settings.methods) != set(METHODS):
        words += ["--methods", ",".join(settings.methods)]
    words += ["--seeds", ",".join(map(str, settings.seeds)), "--grid", ",".join(map(str, settings.grid))]
    words += ["--reference", settings.reference]
    if settings.folds:
        words += ["--folds", str(settings.folds)]
    return " ".join([*words, "--output", "."])


def score_table(comparison: Comparison) -> Table:
    """Rows methods, columns the ratio and the metrics, mean and deviation over seeds or folds; the best of a column is marked."""
    digits = _digits(comparison)
    columns = ["method", "prune ratio", "chosen on", *(_heading(metric) for metric in comparison.metrics)]
    columns.append(f"{comparison.reference_title} minus it")
    best = {metric: _best(comparison, metric, digits[metric]) for metric in comparison.metrics}
    rows = []
    for row in comparison.rows:
        if row.unavailable:
            reason = row.unavailable if row.failed else f"unavailable: {row.unavailable}"
            rows.append([Cell(row.title), Cell(reason, span=len(columns) - 1)])
            continue
        scores = [
            Cell(_spread(row.scores[metric], digits[metric]), row.method in best[metric])
            for metric in comparison.metrics
        ]
        verdict = Cell(_verdict(row, comparison, digits), long=True)
        rows.append([Cell(row.title), Cell(_ratio(row)), Cell(CHOSEN_ON[row.chosen_on]), *scores, verdict])
    return Table(f"Scores of every method, mean and standard deviation over {comparison.runs}", columns, rows)


def cost_table(comparison: Comparison) -> Table:
    """What each method needs, in all and beyond the adapters that are merged, and how it compares with the grid search."""
    done = [(row, cost) for row in comparison.finished if (cost := row.cost)]
    grids = {row.method: (row.title, cost) for row, cost in done}
    title, grid = next((grids[name] for name in GRIDS if name in grids), ("a grid", None))
    columns = ["method", "runs", "seconds", "forward passes",
               f"speed-up over {title}, in forward passes", "the same in seconds",
               "runs in all", "seconds in all"]  # fmt: skip
    in_seconds = not _incomparable_seconds(comparison)
    rows = []
    for row, cost in done:
        what = "" if row.merges else "_in_all"
        facts = [f"{cost.runs:.0f}", f"{cost.seconds:.0f}", f"{cost.work:.0f}"]
        facts.append(_speedup(grid, cost, f"work{what}"))
        facts.append(_speedup(grid, cost, f"seconds{what}") if in_seconds else "–")
        facts += [f"{cost.runs_in_all:.0f}", f"{cost.seconds_in_all:.0f}"]
        rows.append([Cell(row.title), *map(Cell, facts)])
    return Table(f"Cost of every method, mean over {comparison.runs}", columns, rows)


def verdict_table(comparison: Comparison) -> Table:
    """The reference method minus each other one, with its interval, for every metric; planned comparisons with their verdicts."""
    digits = _digits(comparison)
    rows = []
    for row in comparison.finished:
        if row.against:
            cells = [_against(row, metric, digits[metric]) for metric in comparison.metrics]
            rows.append([Cell(row.title), *map(Cell, cells)])
    columns = ["method", *(_heading(metric) for metric in comparison.metrics)]
    return Table("The reference method minus every other one", columns, rows)


def _against(row: Row, metric: str, digits: int) -> str:
    """Difference in the metric's own points, verdict where it was planned, interval."""
    one = row.against.get(metric)
    if one is None:
        return "unavailable"
    difference, low, high = (f"{value:+.{digits}f}" for value in (one.difference, one.low, one.high))
    unit = "nats" if metric == TEST_LOSS else _heading(metric)
    verdict = f", {one.verdict}" if one.verdict else ""
    if one.low == one.high == 0.0:
        return f"{difference} {unit}{verdict} ({SAME_EVERYWHERE})"
    saved = "; over-confidence saved" if metric == TEST_LOSS and saves_over_confidence(row.against) else ""
    return f"{difference} {unit}{verdict} ({low} to {high}){saved}"


def _view(comparison: Comparison) -> dict[str, Any]:
    against = [one for row in comparison.rows for one in row.against.values()]
    return {
        "version": version("grasp-lora"),
        "paper": PAPER,
        "name": comparison.name,
        "content": comparison,
        "reference": comparison.reference_title,
        "scores": score_table(comparison),
        "cost": cost_table(comparison),
        "verdicts": verdict_table(comparison),
        "sizes": _sizes(comparison),
        "drawn": _drawn(comparison),
        "widths": _widths(comparison),
        "planned": [row.title for row in comparison.finished if any(one.verdict for one in row.against.values())],
        "confidence": f"{against[0].confidence:.0%}" if against else "95%",
        "incomparable_seconds": _incomparable_seconds(comparison),
        "scale": scale_note(metric for metric in comparison.metrics if metric != TEST_LOSS),
        "stopping": _stopping(comparison),
        "marked": comparison.learned.title if comparison.learned else None,
        "command": command_of(comparison),
    }


def _incomparable_seconds(comparison: Comparison) -> str | None:
    """Why seconds of different rows cannot be compared, in a sentence; None if they can."""
    if (machines := len(comparison.made_with)) > 1:
        return (
            f"The records were made in {machines} different environments, so their seconds cannot be compared; "
            "the forward passes can."
        )
    pace = comparison.pace
    if pace and pace.highest > STEADY * pace.lowest:
        return (
            f"A forward pass of one final run took {pace.highest / pace.lowest:.1f} times the seconds of one of another, so the "
            "machine was slower or busier at times, and seconds cannot be compared; the forward passes can."
        )
    return None


def _stopping(comparison: Comparison) -> str:
    """What final runs use the dev set for, in a sentence."""
    if not comparison.dev_examples:
        return "There is no dev set: final runs train to their end."
    uses = "Final runs stop early on the dev set" if comparison.stops_early else "Final runs train to their end"
    if comparison.keeps_best:
        uses += " and keep the adapter with the lowest dev loss"
    elif not comparison.stops_early:
        return f"{uses} and keep the last adapter."
    return f"{uses}."


def _sizes(comparison: Comparison) -> str:
    """How many examples there are, in a cross-validation of each fold."""
    others = f"{comparison.dev_examples} dev and {comparison.micro_dev_examples} micro-dev"
    if not comparison.folds:
        return f"{comparison.test_examples} test, {others}"
    parts = {}
    for name in ("test", "train"):
        counts = [getattr(one, name) for one in comparison.folds]
        parts[name] = f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    of = comparison.settings.folds
    return (
        f"{len(comparison.folds)} of {of} folds: {comparison.test_examples} tested once each; in a fold {parts['test']} test, "
        f"{others}, {parts['train']} train"
    )


def _drawn(comparison: Comparison) -> str:
    """What the intervals come from, and what they do not say."""
    groups = f", drawn in their {comparison.test_groups} groups" if comparison.test_groups else ""
    ends = "widened as Student's for few examples. They say what other test examples of this kind would show, not what"
    if comparison.folds:
        return (
            f"Paired bootstrap over the {comparison.test_examples} examples of all folds together{groups}, each tested once, in "
            f"{comparison.resamples} resamples, {ends} other training examples would, since the folds train on one another's. "
            "A difference is that of the scores of all examples together, not the mean over the folds."
        )
    return (
        f"Paired bootstrap over the {comparison.test_examples} test examples{groups}, the mean over the seeds in each of "
        f"{comparison.resamples} resamples, {ends} other seeds or another split would."
    )


def _heading(metric: str) -> str:
    return "test loss" if metric == TEST_LOSS else METRIC_NAMES.get(metric, metric)


def _digits(comparison: Comparison) -> dict[str, int]:
    """How many decimals each metric is printed with."""
    found = {}
    for metric in comparison.metrics:
        means = [score.mean for row in comparison.finished if (score := row.scores[metric])]
        found[metric] = 4 if metric == TEST_LOSS else score_digits(metric, means, 2)
    return found


def _best(comparison: Comparison, metric: str, digits: int) -> set[str]:
    """The methods whose mean prints as the best one does, where not all do."""
    scores = {row.method: score for row in comparison.finished if (score := row.scores[metric])}
    means = {method: f"{score.mean:.{digits}f}" for method, score in scores.items()}
    choose = min if metric == TEST_LOSS else max
    if len(set(means.values())) < 2:
        return set()
    return {method for method, text in means.items() if text == choose(means.values(), key=float)}


def _spread(value: Spread | None, digits: int, scale: float = 1.0) -> str:
    if value is None:
        return "unavailable"
    deviation = "" if value.sd is None else f" ± {scale * value.sd:.{digits}f}"
    return f"{scale * value.mean:.{digits}f}{deviation}"


def _ratio(row: Row) -> str:
    if row.prune_ratio is None:
        return "–"
    pruned = len(row.prune_ratio.values)  # what a run hands over need not be
    return f"{_spread(row.prune_ratio, 1, scale=100)} %" + (f" ({pruned} of {row.seeds})" if pruned < row.seeds else "")


def _verdict(row: Row, comparison: Comparison, digits: dict[str, int]) -> str:
    if row.method == comparison.reference:
        return "it is the reference"
    if not row.against:
        return "–"
    main = main_metric([metric for metric in comparison.metrics if metric in row.against])
    saved = "; over-confidence saved" if main != TEST_LOSS and saves_over_confidence(row.against) else ""
    return _against(row, main, digits[main]) + saved


def _widths(comparison: Comparison) -> str | None:
    """What half-width was to be expected, and what it came to, in a sentence."""
    rows = [row for row in comparison.finished if any(one.verdict for one in row.against.values())]
    main = main_metric(comparison.metrics)
    found = [one for row in rows if (one := row.against.get(main))]
    measured = [(one.high - one.low) / 2 for one in found if one.high > one.low]
    seeds = 1 if comparison.folds else len(comparison.seeds)
    size, groups = comparison.test_group_size, comparison.test_groups
    expected = expected_width(comparison.metrics, comparison.test_examples, len(rows), size, groups, seeds)
    if not found or expected is None:
        return None
    if not measured:
        return f"Before the comparison: {expected}."
    return f"Before the comparison: {expected}. They reach {min(measured):.1f} to {max(measured):.1f}."


def _speedup(grid: Cost | None, cost: Cost, what: str) -> str:
    ours = getattr(cost, what)
    return f"{getattr(grid, what) / ours:.2f}" if grid and ours else "–"
