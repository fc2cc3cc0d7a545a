"""GRASP's result against every other system of a run, with intervals."""

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
    """GRASP against another system on the same test examples.

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


def compare_systems(record: RunRecord) -> dict[str, Difference]:
    """GRASP against every other system that has been evaluated, by the main metric of those that both have.

    The intervals hold for all systems at once (see `compare_with_baselines`).
    """
    systems = record.metrics.systems if record.metrics else {}
    if "grasp" not in systems:
        return {}
    found = {}
    for other in ("continued", "merged", "target", *record.sources):
        scores, theirs = systems["grasp"].metrics, systems[other].metrics if other in systems else {}
        known = [{key for key, one in of.items() if one is not None and math.isfinite(one)} for of in (scores, theirs)]
        finite = [key for key in scores if all(key in keys for keys in known)]
        if finite:
            found[other] = main_metric(finite)
    losses = _paired(record, tuple(found), lambda row: [row.loss], higher_is_better=False)
    sure = {key: _paired_scores(record, tuple(found), key) for key in set(found.values())}
    return {
        other: Difference(
            METRIC_NAMES.get(key, key),
            score_digits(key, [one.metrics.get(key) for one in systems.values()], 1),
            key in METRIC_NAMES,
            systems["grasp"].metrics[key] or 0.0,
            systems[other].metrics[key] or 0.0,
            sure[key].get(other),
            losses.get(other),
        )
        for other, key in found.items()
    }


def _paired_scores(record: RunRecord, others: Sequence[str], key: str) -> "dict[str, PairedComparison]":
    corpus_score = METRICS[key].from_statistics if key in METRICS else None
    if corpus_score is None:
        return _paired(record, others, lambda row: [row.scores.get(key, math.nan)])
    return _paired(record, others, lambda row: row.statistics.get(key, [math.nan]), corpus_score)


def _paired(
    record: RunRecord,
    others: Sequence[str],
    values_of: Callable[[Prediction], list[float]],
    corpus_score: "Callable[[Tensor], Tensor] | None" = None,
    *,
    higher_is_better: bool = True,
) -> "dict[str, PairedComparison]":
    """Compare GRASP with the systems whose values by example are all there and finite."""
    from grasp_lora.evaluation.statistics import compare_with_baselines  # brings torch, which is slow to import

    rows = {name: record.predictions[name] for name in ("grasp", *others)}
    ids = [row.id for row in rows["grasp"]]
    values = {name: [values_of(row) for row in of] for name, of in rows.items() if [row.id for row in of] == ids}
    usable = {name: of for name, of in values.items() if all(math.isfinite(one) for row in of for one in row)}
    if "grasp" not in usable or len(ids) < 2:
        return {}
    runs = usable if corpus_score else {name: [row[0] for row in of] for name, of in usable.items()}
    groups = record.data.test_groups  # older versions wrote none
    return compare_with_baselines(
        runs.pop("grasp"),
        runs,
        groups=groups if len(groups) == len(ids) else None,
        corpus_score=corpus_score,
        higher_is_better=higher_is_better,
    )
