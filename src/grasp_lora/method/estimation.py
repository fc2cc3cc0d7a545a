"""From the rounds of a controller run to one prune ratio: a rule is a small function of the history.

Losses of different rounds are not comparable, since the network trains on between them; losses of one round are. Every
rule gets the rounds and the bounds and returns a `RatioEstimate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CONFIDENCE = 0.95
WIDE_INTERVAL = 0.3  # from here on a reader is told that the probes did not settle the ratio
_DEGREE = 3
_GRID = 281
_RESAMPLES = 1000
_RIDGE = 1e-6


class MeasuredRound(Protocol):
    """The part of a round that a rule reads (see `policy.Round`)."""

    @property
    def current_ratio(self) -> float: ...
    @property
    def candidates(self) -> tuple[float, ...]: ...
    @property
    def baseline_losses(self) -> tuple[float, ...]: ...
    @property
    def candidate_losses(self) -> tuple[tuple[float, ...], ...]: ...
    @property
    def rewards(self) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class RatioEstimate:
    """A learned prune ratio with its uncertainty.

    Args:
        ratio: the learned ratio p*, a fraction.
        low, high: bounds of the interval for `ratio` at `confidence`.
        rule: name of the rule.
        rounds: number of rounds that it used.
        curve: for each ratio of a grid the fitted loss relative to its minimum, with bounds: tuples
            (ratio, fitted, low, high); empty where the rule fits nothing.
        confidence: of the interval.
    """

    ratio: float
    low: float
    high: float
    rule: str
    rounds: int
    curve: tuple[tuple[float, float, float, float], ...] = ()
    confidence: float = CONFIDENCE


def best_reward(rounds: Sequence[MeasuredRound], ratio_min: float, ratio_max: float) -> RatioEstimate:
    """Return the candidate with the best reward of the whole run.

    The interval is that of the winner when the rounds are resampled: a wide one means that one lucky probe decided.
    Paper: selection of p*.
    """
    winners = []
    for measured in rounds:
        best = max(range(len(measured.candidates)), key=measured.rewards.__getitem__)
        winners.append((measured.rewards[best], measured.candidates[best]))
    ratio = max(winners, key=lambda winner: winner[0])[1]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(winners), (_RESAMPLES, len(winners)), generator=generator)
    rewards = torch.tensor([reward for reward, _ in winners], dtype=torch.float64)
    ratios = torch.tensor([candidate for _, candidate in winners], dtype=torch.float64)
    chosen = ratios[picks.gather(1, rewards[picks].argmax(1, keepdim=True)).squeeze(1)]
    low, high = _interval(chosen)
    return RatioEstimate(min(max(ratio, ratio_min), ratio_max), low, high, "best_reward", len(rounds))


def smooth_fit(rounds: Sequence[MeasuredRound], ratio_min: float, ratio_max: float) -> RatioEstimate:
    """Return the minimum of a cubic in the ratio, fitted to loss differences within rounds.

    Model: loss(round, ratio, example) = level(round, example) + f(ratio, example), f a cubic, by least squares. The levels
    drop out by centring each round, so that only probes taken at the same moment are compared. Baselines
    take part as probes at the committed ratio. Rounds of the second half of the run count in full, those of the first
    half in proportion to their place in it: while the network still learns, the loss just after pruning rises with the
    ratio whatever the ratio is worth later. Our choice; the paper takes the best reward.

    The interval comes from resampling rounds and micro-dev examples together (1000 times, fixed seed). It does not contain the
    error of the cubic itself, where the true curve is another one. Ratios that were never probed are not eligible: the
    minimum is sought between the lowest and the highest probed ratio.
    """
    count = len(rounds)
    weights = torch.tensor([min(1.0, 2.0 * (index + 1) / count) for index in range(count)], dtype=torch.float64)
    grams, moments = [], []
    for measured in rounds:
        ratios = torch.tensor([measured.current_ratio, *measured.candidates], dtype=torch.float64)
        losses = torch.tensor([measured.baseline_losses, *measured.candidate_losses], dtype=torch.float64)
        features = _features(ratios, ratio_min, ratio_max)
        features = features - features.mean(0)
        losses = losses - losses.mean(0)
        grams.append(features.T @ features)
        moments.append(features.T @ losses)
    gram, moment = torch.stack(grams), torch.stack(moments)  # [rounds, 3, 3], [rounds, 3, examples]

    probed = [ratio for measured in rounds for ratio in (measured.current_ratio, *measured.candidates)]
    grid = torch.linspace(min(probed), max(probed), _GRID, dtype=torch.float64)
    basis = _features(grid, ratio_min, ratio_max)
    examples = moment.shape[2]
    fitted = _curves(gram, moment, weights[None], torch.ones(1, examples, dtype=torch.float64) / examples, basis)[0]
    ratio = float(grid[fitted.argmin()])

    generator = torch.Generator().manual_seed(0)
    round_weights = weights * _resample(count, generator)
    example_weights = _resample(examples, generator) / examples
    resampled = _curves(gram, moment, round_weights, example_weights, basis)
    low, high = _interval(grid[resampled.argmin(1)])
    reference = fitted - fitted.min()
    anchored = resampled - resampled[:, fitted.argmin()][:, None]
    bounds = torch.quantile(anchored, torch.tensor(_tails(), dtype=torch.float64), dim=0)
    curve = tuple(
        (float(grid[i]), float(reference[i]), float(bounds[0, i]), float(bounds[1, i])) for i in range(0, _GRID, 7)
    )
    # Resampling scatters around the estimate but need not cover it when it sits on a bound.
    return RatioEstimate(ratio, min(low, ratio), max(high, ratio), "smooth_fit", count, curve)


def _features(ratios: Tensor, ratio_min: float, ratio_max: float) -> Tensor:
    """Powers 1 to 3 of the ratio scaled to [-1, 1], [ratios, 3]."""
    scaled = (2 * ratios - (ratio_min + ratio_max)) / (ratio_max - ratio_min)
    return torch.stack([scaled**power for power in range(1, _DEGREE + 1)], dim=1)


def _curves(gram: Tensor, moment: Tensor, round_weights: Tensor, example_weights: Tensor, basis: Tensor) -> Tensor:
    """Fitted curves on the grid, one per row of weights, [fits, grid]."""
    left = torch.einsum("fr,rij->fij", round_weights, gram)
    right = torch.einsum("fr,rie,fe->fi", round_weights, moment, example_weights)
    # A small ridge relative to the scale keeps rounds whose candidates coincide solvable.
    scale = left.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    ridge = _RIDGE * scale[:, None, None] * torch.eye(_DEGREE, dtype=torch.float64)
    coefficients: Tensor = torch.linalg.solve(left + ridge, right)
    return coefficients @ basis.T


def _resample(size: int, generator: torch.Generator) -> Tensor:
    """How often each of `size` items is drawn, [resamples, size]."""
    picks = torch.randint(size, (_RESAMPLES, size), generator=generator)
    ones = torch.ones(_RESAMPLES, size, dtype=torch.float64)
    return torch.zeros(_RESAMPLES, size, dtype=torch.float64).scatter_add_(1, picks, ones)


def _tails() -> tuple[float, float]:
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2


def _interval(values: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(values, torch.tensor(_tails(), dtype=torch.float64)).tolist()
    return low, high
