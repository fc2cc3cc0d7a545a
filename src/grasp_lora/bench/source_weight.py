"""Which weight the source adapter has in the sum with a target adapter that was trained on top of it."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

CLOSE = 1.0  # standard errors


def nearest_to_whole(losses: Mapping[float, Sequence[float]]) -> float:
    """Choose the weight nearest to 1 whose loss is not clearly above the lowest.

    Few rows tell little. So the source adapter stays as it is unless they say more: of all weights whose mean loss is at most one
    standard error of the paired difference above the lowest, the one nearest to 1 is taken, of two as near the larger
    (the one-standard-error rule of Breiman et al. 1984, where 1 is the simplest model).

    Args:
        losses: of each weight, nats per answer token, one a row and the same rows in all. A weight with a loss that is not finite
            is left aside.

    Returns:
        The weight; 1.0 where there is none to choose from.
    """
    usable = {weight: own for weight, own in losses.items() if own and all(map(math.isfinite, own))}
    if not usable:
        return 1.0
    best = min(usable, key=lambda weight: (fmean(usable[weight]), abs(weight - 1.0)))

    def close(weight: float) -> bool:
        above = [own - lowest for own, lowest in zip(usable[weight], usable[best], strict=True)]
        return len(above) > 1 and fmean(above) <= CLOSE * stdev(above) / math.sqrt(len(above))

    return min(
        (weight for weight in usable if weight == best or close(weight)),
        key=lambda weight: (abs(weight - 1.0), -weight),
    )
