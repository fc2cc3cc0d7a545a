"""From the rounds of a controller run to one prune ratio: a rule is a small function of the history.

Losses of different rounds are not comparable, since the network trains on between them; losses of one round are. Every
rule gets the rounds and the bounds and returns a `RatioEstimate`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CONFIDENCE = 0.95
WIDE_INTERVAL = 0.3  # from here on a reader is told that the probes did not settle the ratio
_DEGREE = 3
_GRID = 281
_CURVE_POINTS = 40  # of the grid are reported, and one more
RESAMPLES = 1000
_SPLINES = 17
_STRENGTHS = tuple(10.0**power for power in range(-4, 4))  # of the penalty, relative to the scale of the probes
_LEAST_FOR_CHOICE = 4  # rounds
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
    def places(self) -> tuple[int, ...] | None: ...
    @property
    def common_losses(self) -> tuple[tuple[float, ...], ...]: ...
    @property
    def rewards(self) -> tuple[float, ...]: ...


class EstimateRule(Protocol):
    """From rounds and bounds to a ratio; `interval=False` leaves the interval out (both ends are the ratio), which is faster."""

    def __call__(
        self, rounds: Sequence[MeasuredRound], ratio_min: float, ratio_max: float, *, interval: bool = True
    ) -> "RatioEstimate": ...


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


def best_reward(
    rounds: Sequence[MeasuredRound], ratio_min: float, ratio_max: float, *, interval: bool = True
) -> RatioEstimate:
    """Return the candidate with the best reward of the whole run.

    The interval is that of the winner when the rounds are resampled: a wide one means that one lucky probe decided.
    Paper: selection of p*.
    """
    winners = []
    for measured in rounds:
        best = max(range(len(measured.candidates)), key=measured.rewards.__getitem__)
        winners.append((measured.rewards[best], measured.candidates[best]))
    ratio = min(max(max(winners, key=lambda winner: winner[0])[1], ratio_min), ratio_max)
    if not interval:
        return RatioEstimate(ratio, ratio, ratio, "best_reward", len(rounds))
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(winners), (RESAMPLES, len(winners)), generator=generator)
    rewards = torch.tensor([reward for reward, _ in winners], dtype=torch.float64)
    ratios = torch.tensor([candidate for _, candidate in winners], dtype=torch.float64)
    chosen = ratios[picks.gather(1, rewards[picks].argmax(1, keepdim=True)).squeeze(1)]
    low, high = interval_of(chosen)
    return RatioEstimate(ratio, low, high, "best_reward", len(rounds))


def smooth_fit(
    rounds: Sequence[MeasuredRound], ratio_min: float, ratio_max: float, *, interval: bool = True
) -> RatioEstimate:
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
        losses = torch.tensor(measured.common_losses, dtype=torch.float64)
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

    def curves(round_weights: Tensor, example_weights: Tensor) -> Tensor:
        return _curves(gram, moment, weights * round_weights, example_weights, basis)

    return _estimate("smooth_fit", grid, count, examples, curves, interval=interval)


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


def lowest_loss(
    rounds: Sequence[MeasuredRound], ratio_min: float, ratio_max: float, *, interval: bool = True
) -> RatioEstimate:
    """Return the ratio at which the micro-dev loss gets lowest at any moment of the run, by a smooth fit to all probes.

    Model: loss(round, ratio, example) = level(round, example) + f(ratio) + time * g(ratio). The levels drop out by centring each
    round, so that only probes taken at the same moment are compared; baselines take part as probes at the current ratio. f
    and g are cubic splines with a penalty on their bends (P-splines, Eilers & Marx 1996), its strength chosen by leaving out
    one round at a time: pruning costs little at first and then steeply more, which no low polynomial follows. With the mean level
    of each round (itself smooth in time) that gives the loss of each ratio at each moment. Early stopping keeps a run's best
    moment, so a ratio counts for its own: while the network still learns the lowest ratio looks best, and later
    one that keeps it from overfitting. Our choice; the paper takes the best reward.

    The interval comes from resampling rounds and micro-dev examples together (1000 times, fixed seed). Ratios that were never
    probed are not eligible: the minimum is sought between the lowest and the highest probed ratio.
    """
    fit = _Fit(rounds, ratio_min, ratio_max)
    examples = len(rounds[0].baseline_losses)
    return _estimate("lowest_loss", fit.grid, len(rounds), examples, fit.curves, interval=interval)


class _Fit:
    """The sums over probes that every fit of `lowest_loss` needs, whatever weights rounds and examples have."""

    def __init__(self, rounds: Sequence[MeasuredRound], ratio_min: float, ratio_max: float) -> None:
        self._bounds = ratio_min, ratio_max
        probed = [ratio for measured in rounds for ratio in (measured.current_ratio, *measured.candidates)]
        self.grid = torch.linspace(min(probed), max(probed), _GRID, dtype=torch.float64)
        self._times = torch.linspace(-1, 1, len(rounds), dtype=torch.float64) if len(rounds) > 1 else torch.zeros(1)
        grams, moments, means, levels = [], [], [], []
        for measured, time in zip(rounds, self._times.tolist(), strict=True):
            ratios = torch.tensor([measured.current_ratio, *measured.candidates], dtype=torch.float64)
            losses = torch.tensor(measured.common_losses, dtype=torch.float64)
            features = self._features(ratios, time)
            means.append(features.mean(0))
            levels.append(losses.mean(0))
            centred = features - means[-1]
            grams.append(centred.T @ centred)
            moments.append(centred.T @ (losses - levels[-1]))
        self._gram, self._moment = torch.stack(grams), torch.stack(moments)  # [rounds, K, K], [rounds, K, examples]
        self._means, self._levels = torch.stack(means), torch.stack(levels)  # [rounds, K], [rounds, examples]
        bends = torch.diff(torch.eye(_SPLINES, dtype=torch.float64), n=2, dim=0)
        self._penalty = torch.block_diag(bends.T @ bends, bends.T @ bends)
        self._strength = self._choose_strength()

    def curves(self, round_weights: Tensor, example_weights: Tensor) -> Tensor:
        """Lowest fitted loss over time of each ratio of the grid, one row per row of weights, [fits, grid]."""
        coefficients = self._solve(
            torch.einsum("fr,rij->fij", round_weights, self._gram),
            torch.einsum("fr,rie,fe->fi", round_weights, self._moment, example_weights),
            self._strength,
        )
        levels = example_weights @ self._levels.T - coefficients @ self._means.T  # [fits, rounds]
        trend = torch.stack([self._times**power for power in range(min(3, len(self._times)))], dim=1).double()
        # Least squares with the weights of the rounds: the level of a moment is noisy, and all ratios share it.
        weighted = torch.einsum("fr,ri,rj->fij", round_weights, trend, trend)
        right = torch.einsum("fr,ri,fr->fi", round_weights, trend, levels)
        smooth = torch.linalg.solve(weighted + _RIDGE * torch.eye(trend.shape[1]).double(), right) @ trend.T
        lowest = torch.full((len(levels), _GRID), torch.inf, dtype=torch.float64)
        for index, time in enumerate(self._times.tolist()):
            fitted = coefficients @ self._features(self.grid, time).T + smooth[:, index, None]
            lowest = torch.minimum(lowest, fitted)
        return lowest

    def _features(self, ratios: Tensor, time: float) -> Tensor:
        """Cubic B-splines of the ratio, and the same times the moment in [-1, 1], [ratios, K]."""
        low, high = self._bounds
        places = 1 + (ratios - low) / (high - low) * (_SPLINES - 3)  # one spline lies beyond each end
        distance = (places[:, None] - torch.arange(_SPLINES, dtype=torch.float64)).abs()
        near = (4 - 6 * distance**2 + 3 * distance**3) / 6
        splines = torch.where(distance < 1, near, (2 - distance).clamp_min(0.0) ** 3 / 6)
        return torch.cat([splines, time * splines], dim=1)

    def _solve(self, gram: Tensor, moment: Tensor, strength: float) -> Tensor:
        # Relative to the scale of the probes; the ridge keeps rounds whose candidates coincide solvable.
        scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)[:, None, None]
        penalty = strength * self._penalty + _RIDGE * torch.eye(2 * _SPLINES, dtype=torch.float64)
        solution: Tensor = torch.linalg.solve(gram + scale * penalty, moment)
        return solution

    def _choose_strength(self) -> float:
        """The strength that predicts the differences within a round best from the other rounds."""
        if len(self._gram) < _LEAST_FOR_CHOICE:
            return _STRENGTHS[len(_STRENGTHS) // 2]
        moment = self._moment.mean(2)  # [rounds, K]
        errors = {}
        for strength in _STRENGTHS:
            left = self._solve(self._gram.sum(0) - self._gram, moment.sum(0) - moment, strength)
            # Squared error of a round, less what no fit changes.
            quadratic = torch.einsum("ri,rij,rj->r", left, self._gram, left)
            errors[strength] = float((quadratic - 2 * (left * moment).sum(1)).sum())
        return min(errors, key=errors.__getitem__)


def _estimate(
    rule: str, grid: Tensor, rounds: int, examples: int, curves: Callable[[Tensor, Tensor], Tensor], *, interval: bool
) -> RatioEstimate:
    """The lowest point of a fitted curve, with its interval from resampling rounds and examples together.

    Args:
        rule: its name.
        grid: the eligible ratios, [grid].
        rounds, examples: how many there are.
        curves: from weights of the rounds, [fits, rounds], and of the examples, [fits, examples], to a loss per ratio,
            [fits, grid].
        interval: whether to resample.
    """
    equally = torch.full((1, examples), 1 / examples, dtype=torch.float64)
    fitted = curves(torch.ones(1, rounds, dtype=torch.float64), equally)[0]
    ratio = float(grid[fitted.argmin()])
    if not interval:
        return RatioEstimate(ratio, ratio, ratio, rule, rounds)
    generator = torch.Generator().manual_seed(0)
    resampled = curves(resample(rounds, generator), resample(examples, generator) / examples)
    return settle(rule, grid, rounds, fitted, resampled)


def settle(rule: str, grid: Tensor, rounds: int, fitted: Tensor, resampled: Tensor) -> RatioEstimate:
    """The lowest point of a fitted curve, its interval and the curve's own.

    Args:
        rule: its name.
        grid: the eligible ratios, [grid].
        rounds: how many there are.
        fitted: the loss of each ratio, [grid].
        resampled: what it might have been as well, [resamples, grid].
    """
    lowest = int(fitted.argmin())
    ratio = float(grid[lowest])
    low, high = interval_of(grid[resampled.argmin(1)])
    reference = fitted - fitted[lowest]
    anchored = resampled - resampled[:, lowest][:, None]
    bounds = torch.quantile(anchored, torch.tensor(_tails(), dtype=torch.float64), dim=0)
    curve = tuple(
        (float(grid[i]), float(reference[i]), float(bounds[0, i]), float(bounds[1, i]))
        for i in range(0, len(grid), max(1, (len(grid) - 1) // _CURVE_POINTS))
    )
    # Resampling scatters around the estimate but need not cover it when it sits on a bound.
    return RatioEstimate(ratio, min(low, ratio), max(high, ratio), rule, rounds, curve)


def resample(size: int, generator: torch.Generator) -> Tensor:
    """Draw `size` items with replacement, again and again: how often each comes, [resamples, size]."""
    picks = torch.randint(size, (RESAMPLES, size), generator=generator)
    ones = torch.ones(RESAMPLES, size, dtype=torch.float64)
    return torch.zeros(RESAMPLES, size, dtype=torch.float64).scatter_add_(1, picks, ones)


def _tails() -> tuple[float, float]:
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2


def interval_of(values: Tensor) -> tuple[float, float]:
    """Return the bounds between which `CONFIDENCE` of the values lie."""
    low, high = torch.quantile(values, torch.tensor(_tails(), dtype=torch.float64)).tolist()
    return low, high
