"""Rivals of the controllers: what chooses a prune ratio among recorded final runs, and what all contestants are judged by.

Optuna, CMA-ES and Brent's method are references; the package itself has no use for the latter two.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from landscape import Cost, Landscape

from grasp_lora.method.search import preset

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # Paper: grid search
FIXED = 0.4
BUDGETS = (2, 3, 4, 8)  # final runs of a rival
RUNGS = (2, 3, 4)  # of successive halving, at the cost of 3, 4 and 5 final runs
STARTUP = 2  # random trials of TPE; with Optuna's default of 10 all of so few would be random
GENERATION = 4  # trials of CMA-ES that it learns from together


@dataclass(frozen=True)
class Choice:
    """What a contestant chose with one seed, and all that it cost, the final run at that ratio included."""

    ratio: float
    cost: Cost


class Setting:
    """A landscape with what every contestant is judged by.

    Args:
        name: for tables.
        landscape: the recorded losses.
        low, high: the ratios that may be chosen: the bounds of the default policy.

    Raises:
        GraspError: the landscape does not say what a controller run trains on.
    """

    def __init__(self, name: str, landscape: Landscape) -> None:
        self.name = name
        self.landscape = landscape
        bounds = preset("paper").policy
        recorded = sorted(run.ratio for run in landscape.finals)
        self.low, self.high = max(bounds.ratio_min, recorded[0]), min(bounds.ratio_max, recorded[-1])
        landscape.controller_cost(probes=0)  # raises where the costs of a controller run are not known
        self.smooth = {split: landscape.smooth_final(split, self.low, self.high) for split in ("dev", "test")}
        inside = [ratio for ratio in recorded if self.low <= ratio <= self.high]
        self.best = {split: min(landscape.final_loss(ratio, split) for ratio in inside) for split in self.smooth}

    def regret(self, ratio: float, split: str, against: str) -> float:
        """How much worse the final loss is at a ratio than it could be, in percent.

        `smooth`: on the smooth curve, against its minimum, so that the luck of single runs counts neither for nor against a
        contestant. `recorded`: the loss between the recorded runs, against the best of them.
        """
        if against == "recorded":
            return 100 * (self.landscape.final_loss(ratio, split) / self.best[split] - 1)
        fit = self.smooth[split]
        return 100 * (fit(min(max(ratio, self.low), self.high)) / fit.loss - 1)


Trials = Callable[[Setting, int], tuple[float, ...]]


def drawn_examples(landscape: Landscape, seed: int, size: int | None = None) -> np.ndarray:
    """The micro-dev examples of a seed, drawn with replacement: so many, or as many as were recorded."""
    count = landscape.micro_dev_examples
    return np.random.default_rng(seed).integers(count, size=size or count)


def fixed(ratio: float, setting: Setting, seed: int) -> Choice:
    """A ratio that nobody chose."""
    return Choice(ratio, setting.landscape.final_cost(ratio))


def grid(split: str, setting: Setting, seed: int) -> Choice:
    """The best of the grid's final runs by a split; the micro-dev examples are those of the seed."""
    landscape = setting.landscape
    examples = drawn_examples(landscape, seed) if split == "micro_dev" else slice(None)
    best = min(GRID, key=lambda ratio: float(landscape.final_losses(ratio, split)[examples].mean()))
    return Choice(best, total(landscape.final_cost(ratio) for ratio in GRID))


def best_of(trials: Trials, budget: int, setting: Setting, seed: int) -> Choice:
    """The best of so many final runs by dev loss, proposed one after the other."""
    tried = trials(setting, seed)[:budget]
    best = min(tried, key=lambda ratio: setting.landscape.final_loss(ratio, "dev"))
    return Choice(best, total(setting.landscape.final_cost(ratio) for ratio in tried))


@cache
def tpe_trials(setting: Setting, seed: int) -> tuple[float, ...]:
    """The ratios that Optuna's TPE sampler proposes for the largest budget; a smaller one would have begun with the same."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP))
    study.optimize(
        lambda trial: setting.landscape.final_loss(trial.suggest_float("ratio", setting.low, setting.high), "dev"),
        n_trials=max(BUDGETS),
    )
    return tuple(trial.params["ratio"] for trial in study.trials)


@cache
def cma_trials(setting: Setting, seed: int) -> tuple[float, ...]:
    """The ratios of CMA-ES in one dimension, where it adapts its mean and its step; generations of four."""
    import cma

    # Bounds of its own fail in one dimension, so it searches the whole line.
    options = {"popsize": GENERATION, "seed": seed + 1, "verbose": -9}
    strategy = cma.CMAEvolutionStrategy([0.0], 1.0, options)
    tried: list[float] = []
    while len(tried) < max(BUDGETS):
        points = strategy.ask()
        tried += [setting.low + (setting.high - setting.low) / (1 + math.exp(-float(point[0]))) for point in points]
        strategy.tell(points, [setting.landscape.final_loss(ratio, "dev") for ratio in tried[-GENERATION:]])
    return tuple(tried)


@cache
def brent_trials(setting: Setting, seed: int) -> tuple[float, ...]:
    """The ratios of Brent's bounded search, the classical method in one dimension; no seed has a part in it."""
    from scipy.optimize import minimize_scalar

    tried: list[float] = []

    def loss(ratio: float) -> float:
        tried.append(float(ratio))
        return setting.landscape.final_loss(ratio, "dev")

    bounds = (setting.low, setting.high)
    minimize_scalar(loss, bounds=bounds, method="bounded", options={"maxiter": max(BUDGETS), "xatol": 1e-3})
    return tuple(tried)


def halving(rungs: int, setting: Setting, seed: int) -> Choice:
    """Successive halving: 2 to the power of `rungs` uniform ratios, at each rung the better half trains on for as long again.

    Runs that are not done are compared by micro-dev loss, which is the one recorded along training, those that are done by dev
    loss. It costs `rungs + 1` whole final runs where all of them cost the same.
    """
    landscape = setting.landscape
    generator, examples = random.Random(f"halving/{seed}"), drawn_examples(landscape, seed)
    running = [generator.uniform(setting.low, setting.high) for _ in range(2**rungs)]
    done, costs = 0.0, []
    for rung in range(1, rungs + 1):
        share = 2.0 ** (rung - rungs)
        costs += [landscape.final_cost(ratio) * (share - done) for ratio in running]
        done = share
        losses = {ratio: _so_far(landscape, ratio, share, examples) for ratio in running}
        running = sorted(running, key=losses.__getitem__)[: len(running) // 2]
    return Choice(running[0], total(costs))


def _so_far(landscape: Landscape, ratio: float, share: float, examples: np.ndarray) -> float:
    """What a final run at a ratio shows after a share of its training."""
    if share == 1.0:
        return landscape.final_loss(ratio, "dev")
    seen = share * landscape.final_cost(ratio).trained_examples / landscape.controller_cost(0).trained_examples
    return float(landscape.probe(ratio, seen * landscape.last_step, ratio)[examples].mean())


def total(costs: Any) -> Cost:
    """The sum of several costs."""
    return sum(costs, start=Cost(0, 0))
