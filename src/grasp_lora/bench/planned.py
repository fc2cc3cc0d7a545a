"""The comparisons that were planned before any result was seen, and what a test set can tell of them beforehand.

Only these get a verdict, and only they are corrected for each other. Every other row has an interval of its own, to look at.
"""

import math
from collections.abc import Mapping, Sequence

from grasp_lora.bench.comparison_record import TEST_LOSS, Against

SEEDS = (42, 1337, 9001)  # Paper: experimental setup
PLANNED = ("grasp", "continued", "joint", "grid")  # less the reference: GRASP against the other three
# Standard deviation over examples of the difference of two systems, each the mean of three seeds: the largest of the planned
# ones in `lab/results`, rounded up. One seed alone has about 1.3 times that, two have 1.1 times.
ASSUMED_SD = {"f1": 26.0, "exact_match": 28.0, "rougeL": 9.0, "accuracy": 33.0}
# Correlation of that difference within a group, as of F1 on TyDi QA Swahili (`lab/verdict.py`); MLQA has none.
ALIKE = 0.2
FEWER_SEEDS = {1: 1.3, 2: 1.1}
MAIN = ("f1", "rougeL", "rougeL_xlsum", "exact_match")


def planned_against(reference: str, methods: Sequence[str]) -> list[str]:
    """The methods that a reference is compared with by plan, of those that are there."""
    return [name for name in methods if name in PLANNED and name != reference]


def main_metric(metrics: Sequence[str]) -> str:
    """The score that tables give the first place: that of answers, or the test loss where there is none."""
    scores = [name for name in metrics if name != TEST_LOSS]
    return next((name for name in MAIN if name in scores), next(iter(scores), TEST_LOSS))


def saves_over_confidence(against: Mapping[str, Against]) -> bool:
    """Whether a gain shows in the test loss and in no score of the answers; only where both were compared by plan."""
    verdicts = {metric: one.verdict for metric, one in against.items()}
    loss = verdicts.pop(TEST_LOSS, None)
    return loss == "better" and bool(verdicts) and "better" not in verdicts.values()


def expected_width(
    metrics: Sequence[str],
    examples: int,
    comparisons: int,
    group_size: float = 1.0,
    groups: int | None = None,
    seeds: int = 3,
) -> str | None:
    """Say what half-width an interval of the main metric will have; None where no deviation is assumed or too little to test.

    The variance grows by 1 + correlation (size - 1) (Kish 1965, section 5.4).

    Args:
        metrics: of the comparison.
        examples: of the test.
        comparisons: how many are planned.
        group_size: as `splits.group_size` gives it.
        groups: how many groups the examples form; None: each is by itself.
        seeds: how many each method has, >= 1; folds have one.

    >>> str(expected_width(["exact_match", "f1"], 1000, 3)).partition(":")[0]
    'intervals of f1 will reach about 2.0 points to each side'
    """
    from grasp_lora.evaluation.statistics import half_width  # brings torch, which is slow to import

    metric = main_metric(metrics)
    if metric not in ASSUMED_SD or min(examples, groups or examples) < 2:
        return None
    planned, wider = max(1, comparisons), math.sqrt(1.0 + ALIKE * (group_size - 1.0))
    sd = ASSUMED_SD[metric] * FEWER_SEEDS.get(seeds, 1.0)
    reach = wider * half_width(sd, examples, planned, groups)
    together = f" in groups of {group_size:.1f} on average" if group_size > 1.0 else ""
    return (
        f"intervals of {metric} will reach about {reach:.1f} points to each side: {examples} test examples{together}, {planned} "
        f"planned comparison{'' if planned == 1 else 's'}, 95 %, and a standard deviation of {sd:.3g} points between two systems"
        f"{' with one seed' if seeds == 1 else ''}, which is assumed"
    )
