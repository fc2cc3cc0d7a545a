"""LoRAHub's search for merge weights, without gradients (Huang et al. 2023)."""

import warnings
from collections.abc import Sequence
from statistics import fmean

from grasp_lora.bench.session import Session
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.merging import MergeSettings

BUDGET = 40  # Huang et al. 2023: evaluations, bound of the weights and strength of the L1 term
BOUND = 1.5
L1 = 0.05


def search_weights(
    session: Session, adapters: Sequence[AdapterWeights], names: Sequence[str], seed: int
) -> tuple[float, ...]:
    """Search one weight per adapter that makes the mean micro-dev loss of the merge plus an L1 term low; `BUDGET` are tried."""
    import nevergrad
    import numpy

    space = nevergrad.p.Array(init=[0.0] * len(adapters), lower=-BOUND, upper=BOUND)
    space.random_state = numpy.random.RandomState(seed)
    search = nevergrad.optimizers.NGOpt(parametrization=space, budget=BUDGET)
    with warnings.catch_warnings():
        # Of the optimisers that it chooses among, about their own defaults: nothing that a user could act on.
        warnings.filterwarnings("ignore", module="scipy|nevergrad|cma")
        for _ in range(BUDGET):
            tried = search.ask()
            weights = tuple(float(weight) for weight in tried.value)
            merged = session.merge(adapters, names, MergeSettings("lorahub", weights))
            loss = fmean(session.losses(merged, "micro_dev"))
            search.tell(tried, loss + L1 * fmean([abs(weight) for weight in weights]))
        best = search.provide_recommendation()
    return tuple(float(weight) for weight in best.value)
