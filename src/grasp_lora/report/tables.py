"""The tables of a run's report, and what has to be said beside them."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from grasp_lora.bench.run_folder import ALL_ROWS, TRAINED, FactorSparsity
from grasp_lora.evaluation.metrics import METRICS
from grasp_lora.report.run_record import RunRecord

if TYPE_CHECKING:
    from grasp_lora.evaluation.statistics import PairedComparison
    from grasp_lora.report.differences import Difference

SAME_EVERYWHERE = "the same in every draw"  # and so no interval says what other examples would show
METRIC_NAMES = {
    "accuracy": "Accuracy", "macro_f1": "Macro-F1", "chrf++": "chrF++",
    "f1": "F1", "exact_match": "Exact match", "bertscore": "BERTScore", "rougeL": "ROUGE-L", "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2", "bleu": "BLEU", "rougeL_xlsum": "ROUGE-L (XL-Sum)", "similarity": "Similarity",
}  # fmt: skip
POLICY_COLUMN = 5  # of the rounds
BELOW_ZERO = ("similarity", "bertscore")  # the metrics whose scores may be


class Cell(NamedTuple):
    """A table cell.

    Args:
        best: marks the best of its column, in a first cell the row.
        span: columns of a text that is no value.
        long: text among numbers, which may take several lines.
    """

    text: str
    best: bool = False
    span: int = 1
    long: bool = False


class Table(NamedTuple):
    """A table of texts; the first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: list[list[Cell]]


def score_digits(metric: str, values: Iterable[float | None], usual: int) -> int:
    """Return how many decimals show a score: two more for a user's own metric that runs to 1, not to 100.

    >>> score_digits("f1", [0.5], 1), score_digits("my:metric", [0.5, None], 1), score_digits("my:metric", [50.0], 1)
    (1, 3, 1)
    """
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value)]
    return usual + 2 if metric not in METRIC_NAMES and sizes and max(sizes) <= 1.5 else usual


def scale_note(metrics: Iterable[str]) -> str:
    """Between what scores lie, as the end of a sentence."""
    names = list(metrics)
    below = " and ".join(METRIC_NAMES[name] for name in names if name in BELOW_ZERO)
    note = "scores run from 0 to 100" + (f", {below} below 0, too" if below else "")
    own = any(name not in METRIC_NAMES for name in names)
    return note + (", those of your own metrics as you define them" if own else "")


def percent(fraction: float, digits: int = 0) -> str:
    """Print a fraction as a percentage, with a space that does not break.

    >>> percent(0.4567, 1)
    '45.7\\xa0%'
    """
    return f"{100 * fraction:.{digits}f}\u00a0%"


def duration(seconds: float) -> str:
    """Print seconds the way one says them.

    >>> duration(7.25), duration(125), duration(4000)
    ('7.2 s', '2 min 5 s', '1 h 7 min')
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


def _table(caption: str, columns: Sequence[str], rows: Iterable[Iterable[str | Cell]]) -> Table | None:
    """A table, or None where it would have no rows."""
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    return Table(caption, columns, cells) if cells else None


def scores_table(record: RunRecord) -> Table | None:
    """Losses and scores of every system; None before the evaluation."""
    metrics = record.metrics
    if metrics is None:
        return None
    used = {key for system in metrics.systems.values() for key in system.metrics}
    keys = [key for key in METRIC_NAMES if key in used] + sorted(used - METRIC_NAMES.keys())
    scores = {name: metrics.systems[name] for name in record.systems if name in metrics.systems}
    delivered = metrics.handed_over if metrics.delivered else None
    of_grasp = {"grasp", *([ALL_ROWS] if metrics.delivered and metrics.delivered.name == "grasp" else [])}
    pruned = "–" if record.prune_ratio is None else percent(record.prune_ratio, 1)
    if record.sparsity:
        pruned = percent(1 - kept_share(record.sparsity), 1)
    columns: list[list[Cell]] = [
        [Cell(record.systems[name], name == delivered) for name in scores],
        _column([score.test_loss for score in scores.values()], 3, min),
        _column([score.dev_loss for score in scores.values()], 3, min),
        *(_scores_column(key, [score.metrics.get(key) for score in scores.values()]) for key in keys),
        [Cell(pruned if name in of_grasp else percent(0)) for name in scores],
    ]
    names = [f"{METRIC_NAMES.get(key, key)}\u00a0↑" for key in keys]
    heads = ["System", "Test loss\u00a0↓", "Dev loss\u00a0↓", *names, "Pruned"]
    return _table("Scores on the test set", heads, zip(*columns, strict=True))


def _column(
    values: Sequence[float | None], digits: int, choose: Callable[[Iterable[float]], float], absent: str = "–"
) -> list[Cell]:
    """Cells of one column; all that print like the best one are best, where not all do."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    best = _number(choose(finite), digits) if len({_number(value, digits) for value in finite}) > 1 else None
    texts = (absent if value is None else _number(value, digits) for value in values)
    return [Cell(text, text == best) for text in texts]


def _scores_column(key: str, values: Sequence[float | None]) -> list[Cell]:
    return _column(values, score_digits(key, values, 1), max, "unavailable")


def score_notes(
    record: RunRecord, against: Mapping[str, "Difference"], handed_over: Mapping[str, "Difference"]
) -> list[str]:
    """How much of the table is noise, and what separates what is handed over, and GRASP, from other systems."""
    if record.metrics is None or not (count := record.metrics.test_examples):
        return []
    worth = f": one example is worth {100 / count:.2f} points of a score that is a mean over examples and runs from 0 to 100"
    names = {name for system in record.metrics.systems.values() for name in system.metrics}
    has_mean = any(name not in METRICS or METRICS[name].from_statistics is None for name in names)
    notes = [f"The test set has {count} example{'' if count == 1 else 's'}{worth if has_mean else ''}."]
    for ours, differences in (("What is handed over", handed_over), ("GRASP", against)):
        for other, found in differences.items():
            gap = (
                f"{found.metric} {_signed(found.ours - found.theirs, found.digits)}{' points' if found.points else ''}"
            )
            gap += _sure(found.score, found.digits)
            if found.loss is not None:
                gap += f"; test loss {_signed(found.loss.difference, 3)}{_sure(found.loss, 3)}"
            notes.append(f"{ours} against {record.systems[other].lower()}: {gap}.")
    both = [
        [one for found in some.values() for one in (found.score, found.loss) if one] for some in (handed_over, against)
    ]
    shown = [some[0] for some in both if some]
    if shown:
        groups = len(set(record.data.test_groups))
        over = f"examples in their {groups} groups" if 0 < groups < count else "examples"
        together = " and for all ".join(f"{one.comparisons} rows together" for one in shown if one.comparisons > 1)
        notes.append(
            f"Intervals: paired bootstrap over the test {over}, {percent(shown[0].confidence)}"
            f"{' for all ' if together else ''}{together}. They say nothing about other seeds or other training examples."
        )
    return notes


def _sure(compared: "PairedComparison | None", digits: int) -> str:
    if compared is None:
        return ""
    if compared.low == compared.high == 0.0:
        return f", {SAME_EVERYWHERE}"
    return f" ({_signed(compared.low, digits)} to {_signed(compared.high, digits)}): {compared.verdict}"


def curve_table(record: RunRecord) -> Table | None:
    """About ten points of the fitted curve; None where no ratio was learned."""
    if record.learned is None:
        return None
    curve = record.learned.curve
    rows = list(zip(curve.ratios, curve.mean, curve.low, curve.high, strict=True))
    # About ten rows say what the curve says.
    picked = rows[:: max(1, len(rows) // 10)]
    texts = [[percent(ratio, 1), *(f"{loss:.4f}" for loss in losses)] for ratio, *losses in picked]
    return _table("Fitted loss above its minimum, in nats", ["Pruned", "Fit", "Low", "High"], texts)


def rounds_table(record: RunRecord) -> Table | None:
    """One row a round of the controller; without the policy's mean and deviation where it learns none."""
    heads = ["Round", "Step", "Probed loss", "Candidates", "Rewards", "Policy", "Current ratio", "Commit"]
    learns = len({(measured.policy_mean, measured.policy_std) for measured in record.rounds}) > 1
    rows = [
        [
            str(measured.round),
            str(measured.step),
            f"{fmean(measured.baseline_losses):.4f}",
            ", ".join(percent(ratio, 1) for ratio in measured.candidates),
            ", ".join(_signed(reward, 4) for reward in measured.rewards),
            f"{percent(measured.policy_mean, 1)} ± {100 * measured.policy_std:.1f}",
            percent(measured.ratio, 1),
            ("moved, clipped" if measured.clipped else "moved") if measured.committed else "stayed",
        ]
        for measured in record.rounds
    ]
    if not learns:
        for row in (heads, *rows):
            del row[POLICY_COLUMN]
    return _table("Rounds of the controller", heads, rows)


def losses_table(record: RunRecord) -> Table | None:
    """How far each training came."""
    rows = []
    for stage, title in TRAINED.items():
        history = record.history[stage]
        train = [_number(row.loss, 3) for row in history if row.loss is not None] or ["–"]
        dev = [(row.dev_loss, row.step) for row in history if row.dev_loss is not None and math.isfinite(row.dev_loss)]
        best = [_number(min(dev)[0], 3), str(min(dev)[1])] if dev else ["–", "–"]
        if history:
            # Losses are logged every few steps; the last round comes at the end.
            steps = max([history[-1].step, *(one.step for one in record.rounds if stage == "controller")])
            rows.append([title, str(steps), train[0], train[-1], *best])
    heads = ["Stage", "Steps", "First train loss", "Last train loss", "Best dev loss", "at step"]
    return _table("Losses of each training stage", heads, rows)


def kept_share(entries: Iterable[FactorSparsity]) -> float:
    """Return the share of kept weights over some entries, a fraction in [0, 1]."""
    found = list(entries)
    return sum(entry.kept for entry in found) / sum(entry.weights for entry in found)


def is_even(entries: Sequence[FactorSparsity]) -> bool:
    """Whether every factor keeps the same share, to the weight, as where the ratio is applied to each of them."""
    share = kept_share(entries) if entries else 0.0
    return all(abs(entry.kept - share * entry.weights) <= 1 for entry in entries)


def by_factor(entries: Sequence[FactorSparsity]) -> dict[tuple[str, str], list[tuple[str, FactorSparsity]]]:
    """Sort entries by factor and segment, each with its layer.

    The factor A of `model.layers.3.self_attn.q_proj` is "q_proj A" in layer "3".
    """
    matches = [re.search(r"\.(\d+)\.(.+)$", entry.module) for entry in entries]
    places = [(m[2], m[1]) if m else (entry.module, "–") for entry, m in zip(entries, matches, strict=True)]
    short = {kind: kind.rsplit(".", 1)[-1] for kind, _ in places}
    # GPT-2 has a c_proj in its attention and another in its MLP: then the full names are needed.
    ambiguous = len(set(short.values())) < len(short)
    groups: dict[tuple[str, str], list[tuple[str, FactorSparsity]]] = {}
    for entry, (kind, layer) in zip(entries, places, strict=True):
        factor = f"{kind if ambiguous else short[kind]} {entry.factor}"
        groups.setdefault((factor, entry.segment), []).append((layer, entry))
    return dict(sorted(groups.items()))


def sparsity_table(record: RunRecord) -> Table | None:
    """Shares of kept weights by factor and origin."""
    rows = []
    for (factor, segment), members in by_factor(record.sparsity).items():
        entries = [entry for _, entry in members]
        shares = [entry.kept / entry.weights for entry in entries]
        texts = [percent(share, 1) for share in (kept_share(entries), min(shares), max(shares))]
        rows.append([f"{factor}, {segment}", str(sum(entry.weights for entry in entries)), *texts])
    return _table("Kept weights per factor", ["Factor", "Weights", "Kept", "Lowest layer", "Highest layer"], rows)


def sparsity_note(record: RunRecord) -> str | None:
    """What the shares say together, and whether they are those of the ratio."""
    if not record.sparsity:
        return None
    pruned = 1 - kept_share(record.sparsity)
    note = f"Measured over all factors, {percent(pruned, 2)} of the weights are zero."
    if is_even(record.sparsity):
        note += " Every factor keeps the same share: the ratio is applied to each of them separately."
    if record.recipe.merge.rule == "paper_apart":
        note += (
            " These are the weights of the adapters that were kept apart; fewer are zero in their sum, which is saved."
        )
    ratio = record.prune_ratio
    if ratio is not None and abs(pruned - ratio) > 0.005:
        if record.metrics is not None and record.metrics.best_step == 0 and pruned > ratio:
            note += (
                f" The ratio is {percent(ratio, 2)}: the merge had zeros of its own, and the final run kept no step."
            )
        else:
            note += f" That is not the ratio of {percent(ratio, 2)} above: check the final run."
    segments = {
        name: [entry for entry in record.sparsity if entry.segment == name] for name in (*record.sources, "target")
    }
    if all(segments.values()):
        parts = [
            f"of the {name.replace('_', ' ')} adapter {percent(kept_share(segments[name]), 1)}" for name in segments
        ]
        note += f" {parts[0].capitalize()} of the weights survive, {', '.join(parts[1:])}."
    return note


def cost_table(record: RunRecord) -> Table | None:
    """Seconds of each stage."""
    if not record.cost:
        return None
    total = sum(record.cost.values())
    rows = [
        [stage, f"{seconds:.1f}", duration(seconds), percent(seconds / total if total else 0.0)]
        for stage, seconds in [*record.cost.items(), ("all", total)]
    ]
    return _table("Time per stage", ["Stage", "Seconds", "Time", "Share"], rows)


def probe_note(record: RunRecord) -> str | None:
    """How much of the controller run went into probes."""
    probing = record.probe_seconds
    # The last round need not be the end; before that nothing is known of the whole.
    together = max(probing + sum(timing.train_seconds for timing in record.timings), record.cost.get("controller", 0.0))
    if not probing:
        return None
    return (
        f"Probes took {percent(probing / together)} of the controller run: {duration(probing)} of {duration(together)} "
        f"in {len(record.timings)} rounds."
    )
