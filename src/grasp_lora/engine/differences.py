"""Is the delivered adapter better than the other systems of a run, and how sure is that? Paired, on the same test rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grasp_lora.engine.results import Prediction, main_metric
from grasp_lora.evaluation.metrics import METRICS
from grasp_lora.evaluation.statistics import PairedComparison, compare_with_baselines

Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class Difference:
    """The delivered adapter against another system.

    Args:
        metric: the leading one of those that every system has.
        ours, theirs: its scores on the test set.
        score: their difference with its interval; None where there are no finite values by row.
        loss: the same of the test losses, nats per token.
    """

    metric: str
    ours: float
    theirs: float
    score: PairedComparison | None
    loss: PairedComparison | None


def differences(
    ours: str,
    scores: Mapping[str, Scores],
    predictions: Mapping[str, Sequence[Prediction]],
    groups: Sequence[Any],
) -> dict[str, Difference]:
    """Compare one system with every other by the leading metric; the intervals hold for all of them together.

    Args:
        ours: its name.
        scores: of each system, by metric.
        predictions: of each system, one a test row.
        groups: of each test row, the group that is drawn as a whole.
    """
    names = [ours, *(name for name in scores if name != ours)]
    finite = [key for key in scores[ours] if all(is_number(scores[name].get(key)) for name in names)]
    if not finite or len(names) < 2:
        return {}
    metric = main_metric(finite)
    corpus_score = METRICS[metric].from_statistics if metric in METRICS else None

    def values_of(row: Prediction) -> Sequence[float]:
        return row.statistics.get(metric, ()) if corpus_score else (row.scores.get(metric, math.nan),)

    rows = [predictions[name] for name in names]
    by_score = _paired(names, rows, groups, values_of, corpus_score)
    by_loss = _paired(names, rows, groups, lambda row: (row.loss,), higher_is_better=False)
    values = {name: float(scores[name][metric] or 0.0) for name in names}
    return {
        name: Difference(metric, values[ours], values[name], by_score.get(name), by_loss.get(name))
        for name in names[1:]
    }


def is_number(value: float | None) -> bool:
    """Whether there is a value, and a finite one."""
    return value is not None and math.isfinite(value)


def _paired(
    names: Sequence[str],
    predictions: Sequence[Sequence[Prediction]],
    groups: Sequence[Any],
    values_of: Callable[[Prediction], Sequence[float]],
    corpus_score: Callable[[Any], Any] | None = None,
    *,
    higher_is_better: bool = True,
) -> dict[str, PairedComparison]:
    """Compare the first of some systems with each other one, where every row of both has finite values."""
    values = {name: [list(values_of(row)) for row in rows] for name, rows in zip(names, predictions, strict=True)}
    usable = {
        name: rows for name, rows in values.items() if rows and all(row and all(map(is_number, row)) for row in rows)
    }
    if names[0] not in usable or len(usable[names[0]]) < 2:
        return {}
    runs: dict[str, Any] = usable if corpus_score else {name: [row[0] for row in rows] for name, rows in usable.items()}
    return compare_with_baselines(
        runs.pop(names[0]),
        runs,
        groups=groups,
        corpus_score=corpus_score,
        higher_is_better=higher_is_better,
    )
