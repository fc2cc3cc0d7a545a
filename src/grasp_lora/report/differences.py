"""GRASP's result, or what is handed over, against other systems of a run, with intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grasp_lora.bench.planned import main_metric
from grasp_lora.bench.run_folder import Prediction
from grasp_lora.evaluation.metrics import METRICS
from grasp_lora.report.run_record import RunRecord
from grasp_lora.report.tables import METRIC_NAMES, score_digits

if TYPE_CHECKING:
    from torch import Tensor

    from grasp_lora.evaluation.statistics import PairedComparison


@dataclass(frozen=True)
class Difference:
    """A system against another one on the same test examples.

    Args:
        metric: the leading one, as it is printed.
        digits: decimals that show its scores.
        points: whether it runs to 100.
        ours, theirs: its scores.
        score, loss: how sure their difference is, and that of the test losses; None where there are no values by example.
    """

    metric: str
    digits: int
    points: bool
    ours: float
    theirs: float
    score: "PairedComparison | None"
    loss: "PairedComparison | None"


def compare_grasp(record: RunRecord) -> dict[str, Difference]:
    """GRASP's result against every other adapter that has been evaluated."""
    return _compare(record, "grasp", ("continued", "merged", "target", *record.sources))


def compare_handed_over(record: RunRecord) -> dict[str, Difference]:
    """What is handed over against what there was before it; none where that is GRASP's result itself."""
    if record.metrics is None or record.metrics.delivered is None or record.metrics.handed_over == "grasp":
        return {}
    ours = record.metrics.handed_over
    others = dict.fromkeys(("zero_shot", *record.sources, record.metrics.delivered.name))
    return _compare(record, ours, [other for other in others if other != ours])


def _compare(record: RunRecord, ours: str, others: Sequence[str]) -> dict[str, Difference]:
    """One system against others, by the main metric of those that both have; the intervals hold for all of them at once."""
    systems = record.metrics.systems if record.metrics else {}
    if ours not in systems:
        return {}
    found = {}
    for other in others:
        scores, theirs = systems[ours].metrics, systems[other].metrics if other in systems else {}
        known = [{key for key, one in of.items() if one is not None and math.isfinite(one)} for of in (scores, theirs)]
        finite = [key for key in scores if all(key in keys for keys in known)]
        if finite:
            found[other] = main_metric(finite)
    compared = (ours, *found)
    losses = _paired(record, compared, lambda row: [row.loss], higher_is_better=False)
    sure = {key: _paired_scores(record, compared, key) for key in set(found.values())}
    return {
        other: Difference(
            METRIC_NAMES.get(key, key),
            score_digits(key, [one.metrics.get(key) for one in systems.values()], 1),
            key in METRIC_NAMES,
            systems[ours].metrics[key] or 0.0,
            systems[other].metrics[key] or 0.0,
            sure[key].get(other),
            losses.get(other),
        )
        for other, key in found.items()
    }


def _paired_scores(record: RunRecord, names: Sequence[str], key: str) -> "dict[str, PairedComparison]":
    corpus_score = METRICS[key].from_statistics if key in METRICS else None
    if corpus_score is None:
        return _paired(record, names, lambda row: [row.scores.get(key, math.nan)])
    return _paired(record, names, lambda row: row.statistics.get(key, [math.nan]), corpus_score)


def _paired(
    record: RunRecord,
    names: Sequence[str],
    values_of: Callable[[Prediction], list[float]],
    corpus_score: "Callable[[Tensor], Tensor] | None" = None,
    *,
    higher_is_better: bool = True,
) -> "dict[str, PairedComparison]":
    """Compare the first of some systems with each other one whose values by example are all there and finite."""
    from grasp_lora.evaluation.statistics import compare_with_baselines  # brings torch, which is slow to import

    rows, ours = {name: record.predictions[name] for name in names}, names[0]
    ids = [row.id for row in rows[ours]]
    values = {name: [values_of(row) for row in of] for name, of in rows.items() if [row.id for row in of] == ids}
    usable = {name: of for name, of in values.items() if all(math.isfinite(one) for row in of for one in row)}
    if ours not in usable or len(ids) < 2:
        return {}
    runs = usable if corpus_score else {name: [row[0] for row in of] for name, of in usable.items()}
    groups = record.data.test_groups  # older versions wrote none
    return compare_with_baselines(
        runs.pop(ours),
        runs,
        groups=groups if len(groups) == len(ids) else None,
        corpus_score=corpus_score,
        higher_is_better=higher_is_better,
    )
