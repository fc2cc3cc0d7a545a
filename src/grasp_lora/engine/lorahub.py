"""LoRAHub's search for merge weights, without gradients (Huang et al. 2023)."""

import warnings
from collections.abc import Callable
from statistics import fmean

BUDGET = 40  # Huang et al. 2023: evaluations, bound of the weights and strength of the L1 term
BOUND = 1.5
L1 = 0.05


def search_weights(loss_at: Callable[[tuple[float, ...]], float], adapters: int, seed: int) -> tuple[float, ...]:
    """Search one weight per adapter that makes a loss plus an L1 term low; `BUDGET` of them are tried.

    Args:
        loss_at: from the weights to the mean loss of their merge on the micro-dev rows.
        adapters: how many are merged.
    """
    import nevergrad
    import numpy

    space = nevergrad.p.Array(init=[0.0] * adapters, lower=-BOUND, upper=BOUND)
    space.random_state = numpy.random.RandomState(seed)
    search = nevergrad.optimizers.NGOpt(parametrization=space, budget=BUDGET)
    with warnings.catch_warnings():
        # Of the optimisers that it chooses among, about their own defaults: nothing that a user could act on.
        warnings.filterwarnings("ignore", module="scipy|nevergrad|cma")
        for _ in range(BUDGET):
            tried = search.ask()
            weights = tuple(float(weight) for weight in tried.value)
            search.tell(tried, loss_at(weights) + L1 * fmean([abs(weight) for weight in weights]))
        best = search.provide_recommendation()
    return tuple(float(weight) for weight in best.value)
