"""The tables of a run and of a comparison, and the sentences beside them.

A table here is plain text in cells, so that a page, a Markdown file and a terminal show the same numbers:

    TextTable("Time per step", ["Step", "Seconds"], [[Cell("source"), Cell("7.1")], [Cell("controller"), Cell("0.7", best=True)]])

Beside the scores stand the paired intervals of `evaluation.statistics`: a difference of two means says little without one.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from grasp_lora.engine.comparison import Against, Comparison, MeanAndSd, MethodRow, saves_over_confidence
from grasp_lora.engine.differences import Difference, is_number
from grasp_lora.engine.results import TEST_LOSS, main_metric
from grasp_lora.engine.run_folder import TRAINED, Run
from grasp_lora.engine.steps import names_of
from grasp_lora.evaluation.metrics import METRICS, metric_title
from grasp_lora.evaluation.statistics import PairedComparison

SAME_EVERYWHERE = "the same in every draw"  # and so no interval says what other examples would show
CHOSEN_ON = {None: "–", "dev": "dev", "micro_dev": "micro-dev", "both": "micro-dev and dev"}
MOST_LABELS_SHOWN = 12  # in a table with a row and a column for each
GRIDS = ("grid", "grid_paper")  # the first of them that was run is what speed-ups refer to


class Cell(NamedTuple):
    """A table cell."""

    text: str
    best: bool = False  # of its column; in a first cell it marks the system that is handed over
    span: int = 1  # columns of a text that is no value


class TextTable(NamedTuple):
    """A table of texts; the first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: list[list[Cell]]


# Numbers as texts


def score_digits(metric: str, values: Iterable[float | None], usual: int) -> int:
    """Return how many decimals show a score: two more for a user's own metric that runs to 1, not to 100.

    >>> score_digits("f1", [0.5], 1), score_digits("my:metric", [0.5, None], 1), score_digits("my:metric", [50.0], 1)
    (1, 3, 1)
    """
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value)]
    return usual + 2 if metric not in METRICS and sizes and max(sizes) <= 1.5 else usual


def scale_note(metrics: Iterable[str]) -> str:
    """Between what scores lie, as the end of a sentence."""
    names = list(metrics)
    below = " and ".join(metric_title(name) for name in names if name in METRICS and METRICS[name].below_zero)
    note = "scores run from 0 to 100" + (f", {below} below 0, too" if below else "")
    return note + (
        ", those of your own metrics as you define them" if any(name not in METRICS for name in names) else ""
    )


def percent(fraction: float, digits: int = 0) -> str:
    """Print a fraction as a percentage, with a space that does not break.

    >>> percent(0.4567, 1)
    '45.7\\xa0%'
    """
    return f"{100 * fraction:.{digits}f}\u00a0%"


def duration(seconds: float) -> str:
    """Print seconds the way one says them.

    >>> duration(7.25), duration(125), duration(4000), duration(59.96)
    ('7.2 s', '2 min 5 s', '1 h 7 min', '1 min 0 s')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60} min"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", "\u2212")


# A run


def is_unpruned(run: Run) -> bool:
    """Whether the recipe says that nothing is pruned."""
    return run.recipe.final.prune_ratio == 0  # so it is where it merges nothing


def final_text(run: Run) -> str:
    """What lies in the folder of the final run, as the beginning of a sentence."""
    return "GRASP's own result" if run.learned else "The merge, trained further,"


def titles_of(run: Run) -> dict[str, str]:
    """What each system is called: its name in files -> its title."""
    sources = names_of(len(run.recipe.source.adapters))
    grasp = "Merged, trained further" if is_unpruned(run) else "GRASP" if run.learned else "Merged, pruned, trained"
    numbered = (f"Source {number} only" if len(sources) > 1 else "Source only" for number, _ in enumerate(sources, 1))
    return {
        "zero_shot": "Backbone alone",
        **dict(zip(sources, numbered, strict=True)),
        "target": "Target only",
        "merged": "Merged, not trained" if run.target_alone else "Target on source, not trained",
        "unpruned": "Merged, trained, not pruned",
        "continued": "Source, continued",
        "grasp": grasp,
        "averaged": f"Mean of continued and {'GRASP' if run.learned else 'merge'}",
    }


def confusion(run: Run) -> TextTable | None:
    """Of a classification with few labels, how often what is handed over answers each label (columns) to rows of each (rows)."""
    labels, rows = list(run.data.report.get("labels") or {}), run.predictions[run.metrics.delivered.name]
    if not rows or not 0 < len(labels) <= MOST_LABELS_SHOWN:
        return None
    counts = Counter((row.references[0], row.prediction) for row in rows)
    table = [[Cell(true), *(Cell(f"{counts[true, name]}", name == true) for name in labels)] for true in labels]
    caption = "Test rows by their label (rows) and by the answer of what is handed over (columns)"
    return TextTable(caption, ["True label", *labels], table)


def scores_table(run: Run) -> TextTable:
    """Losses and scores of every system; the row of what is handed over is marked."""
    titles, systems = titles_of(run), run.metrics.systems
    used = {key for system in systems.values() for key in system.metrics}
    keys = [key for key in METRICS if key in used] + sorted(used - METRICS.keys())
    dev = [score.dev_loss for score in systems.values()]
    looked_at = any(loss is not None for loss in dev)
    columns: list[list[Cell]] = [[Cell(titles[name], name == run.metrics.delivered.name) for name in systems]]
    for key in keys:
        values = [score.metrics.get(key) for score in systems.values()]
        columns.append(column_of(values, score_digits(key, values, 1), max, "unavailable"))
    columns += [
        column_of([score.test_loss for score in systems.values()], 3, min),
        *([column_of(dev, 3, min)] if looked_at else []),
    ]
    if prunes := not is_unpruned(run):
        pruned = run.metrics.prune_ratio > 0  # else zeros are those of an untrained factor
        share = percent(1 - kept_share(run.sparsity), 1) if pruned else percent(0)
        columns.append([Cell(share if name == "grasp" else percent(0)) for name in systems])
    names = [f"{metric_title(key)}\u00a0↑" for key in keys]
    heads = ["System", *names, "Test loss\u00a0↓", *["Dev loss\u00a0↓"] * looked_at, *["Pruned"] * prunes]
    return TextTable("Scores on the test set", heads, [list(row) for row in zip(*columns, strict=True)])


def column_of(
    values: Sequence[float | None], digits: int, choose: Callable[[Iterable[float]], float], absent: str = "–"
) -> list[Cell]:
    """Cells of one column; all that print like the best one are best, where not all do."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    best = _number(choose(finite), digits) if len({_number(value, digits) for value in finite}) > 1 else None
    texts = (absent if value is None else _number(value, digits) for value in values)
    return [Cell(text, text == best) for text in texts]


def name_and_digits(difference: Difference) -> tuple[str, int]:
    """The metric of a difference as it is printed, and the decimals that show its scores."""
    return metric_title(difference.metric), score_digits(difference.metric, [difference.ours, difference.theirs], 1)


def score_notes(run: Run) -> list[str]:
    """How much of the table is noise, and what separates what is handed over from other systems."""
    count, titles = run.metrics.test_examples, titles_of(run)
    if not count:
        return []
    names = {name for system in run.metrics.systems.values() for name in system.metrics}
    has_mean = any(name not in METRICS or METRICS[name].from_statistics is None for name in names)
    worth = f": one example is worth {100 / count:.2f} points of a score that is a mean over examples and runs from 0 to 100"
    notes = [f"The test set has {count} example{'' if count == 1 else 's'}{worth if has_mean else ''}."]
    ours = titles["grasp"] if run.metrics.delivered.name == "grasp" else "What is handed over"
    for name, difference in run.metrics.differences.items():
        metric, digits = name_and_digits(difference)
        points = " points" if difference.metric in METRICS else ""
        gap = (
            f"{metric} {_signed(difference.ours - difference.theirs, digits)}{points}{_sure(difference.score, digits)}"
        )
        if difference.loss is not None:
            gap += f"; test loss {_signed(difference.loss.difference, 3)}{_sure(difference.loss, 3)}"
        notes.append(f"{ours} against {in_text(titles[name])}: {gap}.")
    shown = [interval for each in run.metrics.differences.values() for interval in (each.score, each.loss) if interval]
    if shown:
        groups, together = len(set(run.data.test_groups)), shown[0].comparisons
        over = f"examples in their {groups} groups" if groups < count else "examples"
        notes.append(
            f"Intervals of differences: paired bootstrap over the test {over}, {percent(shown[0].confidence)}"
            f"{f' for all {together} comparisons together' if together > 1 else ''}. "
            "They say nothing about other seeds or other training examples."
        )
    return notes


def in_text(title: str) -> str:
    """The title of a system within a sentence."""
    return title if title.isupper() else title[0].lower() + title[1:]


def gain_text(difference: Difference) -> str:
    """Two scores with the interval of their difference.

    >>> sure = PairedComparison(12.0, 6.0, 18.0, 0.01, 0.95, 100, 1000)
    >>> gain_text(Difference("f1", 61.0, 49.0, sure, None))
    'F1 61.0 against 49.0, +12.0 (+6.0 to +18.0)'
    """
    (metric, digits), gap = name_and_digits(difference), difference.ours - difference.theirs
    scores = f"{difference.ours:.{digits}f} against {difference.theirs:.{digits}f}"
    return f"{metric} {scores}, {_signed(gap, digits)}{_bounds(difference.score, digits)}"


def interval_text(interval: PairedComparison, digits: int) -> str:
    """A difference with its interval and verdict.

    >>> interval_text(PairedComparison(2.0, 0.5, 3.5, 0.01, 0.95, 100, 1000), 1)
    '+2.0 (+0.5 to +3.5): better'
    """
    return _signed(interval.difference, digits) + _sure(interval, digits).removeprefix(",")


def _sure(interval: PairedComparison | None, digits: int) -> str:
    bounds = _bounds(interval, digits)
    return f"{bounds}: {interval.verdict}" if interval and bounds.endswith(")") else bounds


def _bounds(interval: PairedComparison | None, digits: int) -> str:
    if interval is None:
        return ""
    if interval.low == interval.high == 0.0:
        return f", {SAME_EVERYWHERE}"
    return f" ({_signed(interval.low, digits)} to {_signed(interval.high, digits)})"


def losses_table(run: Run) -> TextTable:
    """How far each training came."""
    rows = []
    for name, title in TRAINED.items():
        history = run.history.get(name, [])
        if not history:
            continue
        train = [_number(row["loss"], 3) for row in history if "loss" in row] or ["–"]
        dev = [(row["dev_loss"], row["step"]) for row in history if is_number(row.get("dev_loss"))]
        best = [_number(min(dev)[0], 3), f"{min(dev)[1]:.0f}"] if dev else ["–", "–"]
        rows.append([Cell(text) for text in (title, f"{history[-1]['step']:.0f}", train[0], train[-1], *best)])
    heads = ["Training", "Steps", "First train loss", "Last train loss", "Best dev loss", "at step"]
    shown = len(heads) if any(row[-1].text != "–" for row in rows) else len(heads) - 2  # no dev set, no column of it
    return TextTable("Losses of each training", heads[:shown], [row[:shown] for row in rows])


def kept_share(entries: Iterable[Mapping[str, Any]]) -> float:
    """Return the share of kept weights over some rows of `Run.sparsity`, a fraction in [0, 1]."""
    rows = list(entries)
    return float(sum(row["kept"] for row in rows) / sum(row["weights"] for row in rows))


def sparsity_note(run: Run) -> str:
    """What the shares of kept weights say together."""
    if run.metrics.prune_ratio == 0:
        return "Nothing was pruned."
    note = f"Measured over all factors, {percent(1 - kept_share(run.sparsity), 2)} of the weights are zero."
    if run.recipe.merge.rule == "paper_apart":
        note += (
            " These are the weights of the adapters that were kept apart; fewer are zero in their sum, which is saved."
        )
    return note


def cost_table(run: Run) -> TextTable:
    """Seconds of each step."""
    total = sum(run.cost.values())
    rows = [
        [Cell(text) for text in (name, f"{seconds:.1f}", duration(seconds), percent(seconds / total if total else 0.0))]
        for name, seconds in [*run.cost.items(), ("all", total)]
    ]
    return TextTable("Time of each step", ["Step", "Seconds", "Time", "Share"], rows)


def probe_note(run: Run) -> str | None:
    """How much of the controller run went into probes; None where there is no such run."""
    if run.learned is None:
        return None
    timings = run.learned.result.timings
    probing = sum(row["probe_seconds"] for row in timings)
    together = max(probing + sum(row["train_seconds"] for row in timings), run.learned.seconds)
    share = percent(probing / together if together else 0.0)
    return f"Probes took {share} of the controller run: {duration(probing)} of {duration(together)} in {len(timings)} rounds."


# A comparison


def comparison_scores(comparison: Comparison) -> TextTable:
    """Rows methods, columns the ratio and the metrics, mean and deviation over seeds or folds; the best of a column is marked."""
    digits = _digits(comparison)
    columns = ["method", "prune ratio", "chosen on", *map(_heading, comparison.metrics)]
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
        verdict = Cell(_verdict(row, comparison, digits))
        rows.append([Cell(row.title), Cell(_ratio(row)), Cell(CHOSEN_ON[row.chosen_on]), *scores, verdict])
    return TextTable(f"Scores of every method, mean and standard deviation over {comparison.runs}", columns, rows)


def comparison_cost(comparison: Comparison) -> TextTable:
    """What each method needs beyond the adapters that are merged, and in all, and how it compares with the grid search."""
    done = [(row, row.cost) for row in comparison.finished if row.cost]
    grids = {row.method: (row.title, cost) for row, cost in done}
    title, grid = next((grids[name] for name in GRIDS if name in grids), ("a grid", None))
    columns = ["method", "runs", "seconds", "forward passes", f"speed-up over {title}", "runs in all", "seconds in all"]
    rows = []
    for row, cost in done:
        part = "work" if row.merges else "work_in_all"
        passes = getattr(cost, part)
        speedup = f"{getattr(grid, part) / passes:.2f}" if grid and passes else "–"
        counts = (cost.runs, cost.seconds, cost.work, None, cost.runs_in_all, cost.seconds_in_all)
        rows.append([Cell(row.title), *(Cell(speedup if count is None else f"{count:.0f}") for count in counts)])
    return TextTable(f"Cost of every method, mean over {comparison.runs}", columns, rows)


def comparison_verdicts(comparison: Comparison) -> TextTable:
    """The reference method minus each other one, with its interval, for every metric; planned comparisons with their verdicts and
    the difference of each seed."""
    digits = _digits(comparison)
    rows = [
        [
            Cell(row.title),
            *(
                Cell(_against(row, metric, digits[metric]) + _by_seed(row.against.get(metric), digits[metric]))
                for metric in comparison.metrics
            ),
        ]
        for row in comparison.finished
        if row.against
    ]
    return TextTable("The reference method minus every other one", ["method", *map(_heading, comparison.metrics)], rows)


def _heading(metric: str) -> str:
    """A metric of a comparison as a column is headed."""
    return "test loss" if metric == TEST_LOSS else metric_title(metric)


def _against(row: MethodRow, metric: str, digits: int) -> str:
    """Difference in the metric's own points, verdict where it was planned, interval."""
    interval = row.against.get(metric)
    if interval is None:
        return "unavailable"
    difference, low, high = (f"{value:+.{digits}f}" for value in (interval.difference, interval.low, interval.high))
    unit = "nats" if metric == TEST_LOSS else _heading(metric)
    verdict = f", {interval.verdict}" if interval.verdict else ""
    if interval.low == interval.high == 0.0:
        return f"{difference} {unit}{verdict} ({SAME_EVERYWHERE})"
    saved = "; over-confidence saved" if metric == TEST_LOSS and saves_over_confidence(row.against) else ""
    return f"{difference} {unit}{verdict} ({low} to {high}){saved}"


def _by_seed(interval: Against | None, digits: int) -> str:
    if interval is None or interval.verdict is None or not interval.by_run:
        return ""
    return f"; by seed {', '.join(f'{value:+.{digits}f}' for value in interval.by_run)}"


def _verdict(row: MethodRow, comparison: Comparison, digits: Mapping[str, int]) -> str:
    if row.method == comparison.settings.reference:
        return "it is the reference"
    if not row.against:
        return "–"
    main = main_metric([metric for metric in comparison.metrics if metric in row.against])
    saved = "; over-confidence saved" if main != TEST_LOSS and saves_over_confidence(row.against) else ""
    return _against(row, main, digits[main]) + saved


def _digits(comparison: Comparison) -> dict[str, int]:
    """How many decimals each metric is printed with."""
    means = {
        metric: [score.mean for row in comparison.finished if (score := row.scores[metric])]
        for metric in comparison.metrics
    }
    return {metric: 4 if metric == TEST_LOSS else score_digits(metric, values, 2) for metric, values in means.items()}


def _best(comparison: Comparison, metric: str, digits: int) -> set[str]:
    """The methods whose mean prints as the best one does, where not all do."""
    scores = {row.method: score for row in comparison.finished if (score := row.scores[metric])}
    means = {method: f"{score.mean:.{digits}f}" for method, score in scores.items()}
    choose = min if metric == TEST_LOSS else max
    if len(set(means.values())) < 2:
        return set()
    return {method for method, text in means.items() if text == choose(means.values(), key=float)}


def _spread(value: MeanAndSd | None, digits: int, scale: float = 1.0) -> str:
    if value is None:
        return "unavailable"
    deviation = "" if value.sd is None else f" ± {scale * value.sd:.{digits}f}"
    return f"{scale * value.mean:.{digits}f}{deviation}"


def _ratio(row: MethodRow) -> str:
    if row.prune_ratio is None:
        return "–"
    pruned = len(row.prune_ratio.values)  # what a run hands over need not be
    return f"{_spread(row.prune_ratio, 1, scale=100)} %" + (f" ({pruned} of {row.seeds})" if pruned < row.seeds else "")
