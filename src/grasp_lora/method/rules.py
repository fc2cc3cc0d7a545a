"""Rules: from the rounds of a controller run to one prune ratio with its interval.

A rule is a small function of the rounds. Losses of different rounds are not comparable, since the network trains on between
them; losses of one round are. Three rules, from plain to careful:

    best_reward   the candidate with the best reward of the whole run; one lucky probe decides (the paper's)
    smooth_fit    the minimum of a cubic through the loss differences within rounds
    surrogate     a Gaussian process over ratio and time; the ratio whose loss gets lowest at any moment (the default)

Example: rounds that measured 0.2, 0.4 and 0.6 at losses 1.1, 1.0 and 1.3, with noise, give a `RatioEstimate` such as
ratio 0.37, low 0.25, high 0.46. The interval comes from resampling examples, rounds or both, as the rule says; it is the
whole range where they say nothing.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from grasp_lora.errors import RecipeError
from grasp_lora.text.display import quoted

CONFIDENCE = 0.95
WIDE_INTERVAL = 0.3  # from here on a reader is told that the probes did not settle the ratio
# From this share of the searched range on nothing was learned. Losses of nothing but noise leave as much open in 8 to 10 of 10
# runs by `surrogate` and `smooth_fit`, those of a clear valley hardly ever (`lab/log.md`).
OPEN_SHARE = 0.75

_DEGREE = 3
_GRID = 281
# A curve has every n-th ratio of its grid, with n as large as leaves one more than these: 41 of the 281 here. A coarser grid is
# shown whole, such as the surrogate's 57.
_CURVE_POINTS = 40
RESAMPLES = 1000
_PAST_BOUND = 1e-9  # by which a ratio that was computed may pass a bound
_RIDGE = 1e-6
_TAILS = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
_ROUNDING = 1e-6  # of a loss, in float32

# Of the surrogate
RATIOS = 57  # on which the process is read, at so many moments
TIMES = 11

_TIME_LENGTH = 0.5  # of the run
_OF_ROUND = 0.1  # of the variance: what all losses of one round have in common
_LENGTHS = (0.25, 0.5, 1.0)  # in -ln(1 - p)
_SCALES = (1.0, 4.0, 16.0)  # variance of the curve over that of the probes within a round
_NOISES = (1e-4, 1e-3, 1e-2, 1e-1)  # variance of a probe over that of the probes within a round
_CHANGE = 0.5  # share of the curve's variance that changes with time
_HIGHEST = 0.99  # where -ln(1 - p) ends
_LEAST = 1e-12
_JITTER = 1e-6  # of the curve's variance
_Points = tuple[Tensor, Tensor]  # places and times


@dataclass(frozen=True)
class Round:
    """What one round measured.

    Args:
        current_ratio: committed ratio at which the baseline was measured.
        candidates: C ratios.
        baseline_losses: loss of each probed example under the committed mask, shape `[examples]`.
        candidate_losses: loss of each example under each candidate's mask, shape `[C][examples]`; only of those in `places`
            if there are any.
        places: the examples that the candidates were measured on, as places in `baseline_losses`; None for all.
    """

    current_ratio: float
    candidates: tuple[float, ...]
    baseline_losses: tuple[float, ...]
    candidate_losses: tuple[tuple[float, ...], ...]
    places: tuple[int, ...] | None = None

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Round":
        """Rebuild a round from plain JSON values: a line of `rounds.jsonl`."""
        return cls(
            row["ratio_before"],
            tuple(row["candidates"]),
            tuple(row["baseline_losses"]),
            tuple(tuple(losses) for losses in row["candidate_losses"]),
            None if row.get("places") is None else tuple(row["places"]),
        )

    @property
    def common_losses(self) -> tuple[tuple[float, ...], ...]:
        """Losses of the examples that every probe measured, the baseline first, shape `[1 + C][examples]`."""
        baseline = self.baseline_losses
        if self.places is not None:
            baseline = tuple(baseline[place] for place in self.places)
        return baseline, *self.candidate_losses

    @property
    def rewards(self) -> tuple[float, ...]:
        """Mean baseline loss minus mean candidate loss on the same examples, one per candidate; higher is better."""
        baseline, *candidates = (fmean(losses) for losses in self.common_losses)
        return tuple(baseline - loss for loss in candidates)

    @property
    def best(self) -> int:
        """Place of the candidate with the best reward, the first of equals."""
        rewards = self.rewards
        return max(range(len(rewards)), key=rewards.__getitem__)

    @property
    def lowest_loss(self) -> float:
        """Lowest mean loss of a probe, baseline included; that of one on a few examples is the baseline's minus its reward."""
        baseline = fmean(self.baseline_losses)
        if self.places is not None:
            return baseline - max(0.0, *self.rewards)
        return min(baseline, *(fmean(losses) for losses in self.candidate_losses))


@dataclass(frozen=True)
class RatioEstimate:
    """A learned prune ratio with its uncertainty.

    Args:
        ratio: the learned ratio p*, a fraction.
        low, high: bounds of the interval for `ratio` at `confidence`.
        rule: name of the rule.
        rounds: number of rounds that it used; 0 where the ratio was given.
        curve: for each ratio of a grid the fitted loss relative to its minimum, with bounds: tuples
            (ratio, fitted, low, high); empty where the rule fits nothing.
        confidence: of the interval.
        bounds: of the ratios that were searched.
    """

    ratio: float
    low: float
    high: float
    rule: str
    rounds: int
    curve: tuple[tuple[float, float, float, float], ...] = field(default=(), repr=False, kw_only=True)
    confidence: float = field(default=CONFIDENCE, repr=False, kw_only=True)
    bounds: tuple[float, float] = (0.0, 1.0)

    @property
    def nothing_learned(self) -> bool:
        """Whether the interval covers most of the searched range: the probes do not tell one ratio from another."""
        return self.high - self.low >= OPEN_SHARE * (self.bounds[1] - self.bounds[0])

    @property
    def wide(self) -> bool:
        """Whether the interval leaves the ratio unsettled."""
        return self.nothing_learned or self.high - self.low >= WIDE_INTERVAL

    @property
    def summary(self) -> str:
        """What was learned or given, in one line for people."""
        if not self.rounds:
            return f"prune ratio {100 * self.ratio:.3g} % (given)"
        interval = f"{100 * self.confidence:.0f} % interval {100 * self.low:.0f} to {100 * self.high:.0f} %"
        if self.nothing_learned:
            return f"nothing was learned about the prune ratio ({interval}); {100 * self.ratio:.0f} % was taken"
        return f"prune ratio {100 * self.ratio:.0f} % ({interval})"


@dataclass(frozen=True)
class Rule:
    """How one prune ratio is read off the rounds of a run.

    Args:
        name: as the estimate has it.
        function: from at least one round, the bounds of the ratio, and whether an interval is wanted, to the estimate.
        compares_rounds: whether it compares the losses of rounds, not only those within one; then each round measures its
            baseline on all examples of its pool.
    """

    name: str
    function: Callable[[Sequence[Round], float, float, bool], RatioEstimate]
    compares_rounds: bool = False

    def __call__(
        self, rounds: Sequence[Round], ratio_min: float, ratio_max: float, *, interval: bool = True
    ) -> RatioEstimate:
        """Return the learned ratio; without an interval both its ends are the ratio, which is faster.

        Where the losses say nothing about the ratio, the interval is the whole range.

        Raises:
            ValueError: there are no rounds.
            RecipeError: the function gives no estimate, a ratio outside the bounds, or an interval that does not hold it.
        """
        if not rounds:
            raise ValueError("no round was measured yet, so there is no learned ratio; tell at least one round")
        estimate = self.function(rounds, ratio_min, ratio_max, interval)
        if interval and _say_nothing(rounds):
            estimate = replace(estimate, low=ratio_min, high=ratio_max)
        if not ratio_min - _PAST_BOUND <= estimate.low <= estimate.ratio <= estimate.high <= ratio_max + _PAST_BOUND:
            raise RecipeError(
                f"rule {quoted(self.name)} gave ratio {estimate.ratio} with interval {estimate.low} to {estimate.high}; the "
                f"interval must hold the ratio, and all must lie in [{ratio_min}, {ratio_max}]"
            )
        low, ratio, high = (
            min(max(value, ratio_min), ratio_max) for value in (estimate.low, estimate.ratio, estimate.high)
        )
        return replace(estimate, low=low, ratio=ratio, high=high, bounds=(ratio_min, ratio_max))


def _say_nothing(rounds: Sequence[Round]) -> bool:
    """Whether no loss changes with the ratio, or rounds have one example each: how far another is from it, none of them says."""
    return len(rounds[0].common_losses[0]) == 1 or all(
        math.isclose(loss, baseline, rel_tol=_ROUNDING)
        for measured in rounds
        for ratio, losses in zip(measured.candidates, measured.candidate_losses, strict=True)
        if ratio != measured.current_ratio
        for loss, baseline in zip(losses, measured.common_losses[0], strict=True)
    )


def _best_reward(rounds: Sequence[Round], ratio_min: float, ratio_max: float, interval: bool) -> RatioEstimate:
    """Return the candidate with the best reward of the whole run.

    The interval is that of the winner when the rounds are resampled: a wide one means that one lucky probe decided. One round
    cannot be resampled, so it leaves the whole range open.
    Paper: selection of p*.
    """
    winners = [(measured.rewards[measured.best], measured.candidates[measured.best]) for measured in rounds]
    ratio = min(max(max(winners, key=lambda winner: winner[0])[1], ratio_min), ratio_max)
    if not interval:
        return RatioEstimate(ratio, ratio, ratio, "best_reward", len(rounds))
    if len(rounds) == 1:
        return RatioEstimate(ratio, ratio_min, ratio_max, "best_reward", 1)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(winners), (RESAMPLES, len(winners)), generator=generator)
    rewards = torch.tensor([reward for reward, _ in winners], dtype=torch.float64)
    ratios = torch.tensor([candidate for _, candidate in winners], dtype=torch.float64)
    chosen = ratios[picks.gather(1, rewards[picks].argmax(1, keepdim=True)).squeeze(1)]
    low, high = interval_of(chosen)
    # Of tied winners the first is taken, and resampling draws any.
    return RatioEstimate(ratio, min(low, ratio), max(high, ratio), "best_reward", len(rounds))


def _smooth_fit(rounds: Sequence[Round], ratio_min: float, ratio_max: float, interval: bool) -> RatioEstimate:
    """Return the minimum of a cubic in the ratio, fitted to loss differences within rounds.

    Model: loss(round, ratio, example) = level(round, example) + f(ratio, example), f a cubic, by least squares. The levels
    drop out by centring each round, so that only probes taken at the same moment are compared. Baselines
    take part as probes at the committed ratio. The second half of the rounds counts in full, the first half in proportion to
    their place in it: while the network still learns, the loss just after pruning rises with the
    ratio whatever the ratio is worth later. Our choice; the paper takes the best reward.

    The interval comes from resampling rounds and probed examples together (1000 times, fixed seed). It does not contain the
    error of the cubic itself, where the true curve is another one. Ratios that were never probed are not eligible: the
    minimum is sought between the lowest and the highest probed ratio. An interval that fills most of a narrower span than the
    bounds allow says nothing of the ratio, so the whole range is left open. One that ends where the probing ended is open on
    that side.
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
    equally = torch.full((1, examples), 1 / examples, dtype=torch.float64)
    fitted = _curves(gram, moment, weights * torch.ones(1, count, dtype=torch.float64), equally, basis)[0]
    ratio = float(grid[fitted.argmin()])
    if not interval:
        return RatioEstimate(ratio, ratio, ratio, "smooth_fit", count)
    generator = torch.Generator().manual_seed(0)
    round_weights, example_weights = resample(count, generator), resample(examples, generator) / examples
    curves = _curves(gram, moment, weights * round_weights, example_weights, basis)
    estimate, span = settle("smooth_fit", grid, count, fitted, curves), max(probed) - min(probed)
    if span < ratio_max - ratio_min and estimate.high - estimate.low >= OPEN_SHARE * span:
        return replace(estimate, low=ratio_min, high=ratio_max)
    # An end of the interval where probing ended says nothing of what lies beyond.
    low, high = float(grid[0]), float(grid[-1])
    return replace(
        estimate,
        low=ratio_min if math.isclose(estimate.low, low) else estimate.low,
        high=ratio_max if math.isclose(estimate.high, high) else estimate.high,
    )


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
    shown = slice(0, None, max(1, (len(grid) - 1) // _CURVE_POINTS))
    bounds = torch.quantile(resampled[:, shown] - resampled[:, lowest][:, None], _TAILS, dim=0)
    curve = tuple(zip(*(values.tolist() for values in (grid[shown], reference[shown], *bounds)), strict=True))
    # Resampling scatters around the estimate but need not cover it when it sits on a bound.
    return RatioEstimate(ratio, min(low, ratio), max(high, ratio), rule, rounds, curve=curve)


def resample(size: int, generator: torch.Generator) -> Tensor:
    """Draw `size` items with replacement, again and again: how often each comes, [resamples, size]."""
    picks = torch.randint(size, (RESAMPLES, size), generator=generator)
    ones = torch.ones(RESAMPLES, size, dtype=torch.float64)
    return torch.zeros(RESAMPLES, size, dtype=torch.float64).scatter_add_(1, picks, ones)


def interval_of(values: Tensor) -> tuple[float, float]:
    """Return the bounds between which `CONFIDENCE` of the values lie."""
    low, high = torch.quantile(values, _TAILS).tolist()
    return low, high


def _surrogate(rounds: Sequence[Round], ratio_min: float, ratio_max: float, interval: bool) -> RatioEstimate:
    """Return the ratio whose expected loss gets lowest at any moment of the run, by a Gaussian process over ratio and time.

    Early stopping keeps a run's best moment, so a ratio counts for its own. Away from all probes the process falls back on the
    level of the moment, so that a trend at the outermost probes is followed for about one length of the kernel; with few rounds
    that may be as far as a bound. The interval comes from draws of the process, each with its own resample of the
    probed examples (1000, fixed seed). Our choice; the paper takes the best reward.
    """
    process = _process(tuple(rounds), ratio_min, ratio_max)
    fitted = process.lowest_mean()
    ratio = float(process.grid[fitted.argmin()])
    if not interval:
        return RatioEstimate(ratio, ratio, ratio, "surrogate", len(rounds))
    generator = torch.Generator().manual_seed(0)
    examples = len(rounds[0].baseline_losses)
    resampled = process.sample(resample(examples, generator) / examples, generator)
    return settle("surrogate", process.grid, len(rounds), fitted, resampled)


@lru_cache(maxsize=1)
def _process(rounds: tuple[Round, ...], ratio_min: float, ratio_max: float) -> "Surrogate":
    """The process after some rounds, fitted once: each round asks for its ratio, and the end of the run for its interval."""
    return Surrogate(rounds, ratio_min, ratio_max)


class Surrogate:
    """A Gaussian process over ratio and time: where the loss gets lowest.

    Losses after pruning hardly change with the ratio at first and rise steeply later, so the process sees the ratio p as
    -ln(1 - p), in which the rise is even. Source: Rasmussen & Williams 2006, chapters 2 and 5; the kernel is our choice.

    Model: loss(time, p) = level(time) + shift of the round + curve(p) + change(p, time) + noise, all Gaussian. Only the shift
    and the noise are not part of what is read off. The scales come from the probes, lengths and noise by marginal likelihood.

    Args:
        rounds: at least one, evenly spaced in time.
        ratio_min, ratio_max: bounds of the ratio.
    """

    def __init__(self, rounds: Sequence[Round], ratio_min: float, ratio_max: float) -> None:
        probes = [(measured.current_ratio, *measured.candidates) for measured in rounds]
        self.grid = torch.linspace(ratio_min, ratio_max, RATIOS, dtype=torch.float64)
        counts = torch.tensor([len(ratios) for ratios in probes])
        self._number = torch.arange(len(rounds)).repeat_interleave(counts)  # the round of each probe
        self._times = self._number.double() / max(1, len(rounds) - 1)
        self._places = _place(torch.tensor([ratio for ratios in probes for ratio in ratios], dtype=torch.float64))
        # Of each probe the losses that its mean starts from, [probes, examples], and what was measured on a few of them.
        self._losses = torch.tensor(
            [
                measured.baseline_losses if measured.places is not None else losses
                for measured in rounds
                for losses in (measured.baseline_losses, *measured.candidate_losses)
            ],
            dtype=torch.float64,
        )
        self._few: list[tuple[slice, list[int], Tensor]] = []
        for end, measured in zip(counts.cumsum(0).tolist(), rounds, strict=True):
            if measured.places is not None:
                baseline, *candidates = torch.tensor(measured.common_losses, dtype=torch.float64)
                rows = slice(end - len(candidates), end)
                self._few.append((rows, list(measured.places), torch.stack(candidates) - baseline))
        examples = self._losses.shape[1]
        means = self._means(torch.full((1, examples), 1 / examples, dtype=torch.float64))[:, 0]
        sums = torch.zeros(len(rounds), dtype=torch.float64).index_add(0, self._number, means)
        levels = sums / counts
        self._centre = float(levels.mean())
        self._level = max(float((levels - self._centre).square().mean()), _LEAST)
        self._within = max(float((means - levels[self._number]).square().mean()), _LEAST)
        self._values = means
        self._fit(means - self._centre)

    def sample(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Draw curves of the lowest loss over time, each with weights of the examples, [draws, ratios].

        Args:
            weights: of the probed examples, each row adds up to 1, [draws, examples].
            generator: of the draws.
        """
        means = self._means(weights) - self._centre
        around = torch.randn(len(self._spread), len(weights), generator=generator, dtype=torch.float64)
        drawn = self._gain @ means + self._spread @ around + self._centre
        lowest: Tensor = drawn.view(TIMES, RATIOS, -1).amin(0).T
        return lowest

    def lowest_mean(self) -> Tensor:
        """The expected loss of each ratio of the grid at its best moment, [ratios]."""
        mean: Tensor = self._gain @ (self._values - self._centre) + self._centre
        lowest: Tensor = mean.view(TIMES, RATIOS).amin(0)
        return lowest

    def _means(self, weights: Tensor) -> Tensor:
        """Mean loss of each probe over all examples, [probes, draws].

        A candidate that was measured on a few has the mean of the baseline plus its mean difference from it on those.

        Args:
            weights: of the examples, [draws, examples].
        """
        means: Tensor = self._losses @ weights.T
        for rows, places, differences in self._few:
            shares = weights[:, places]
            shares = torch.where(
                shares.sum(1, keepdim=True) > 0, shares, 1.0
            )  # a resample may leave all of the few out
            means[rows] += differences @ (shares / shares.sum(1, keepdim=True)).T
        return means

    def _fit(self, values: Tensor) -> None:
        """Choose lengths, scale and noise, and prepare the mean that is read off."""
        best, probes = (-torch.inf, 0.0, 0.0, 0.0), (self._places, self._times)
        same = (self._number[:, None] == self._number).double()
        trend = self._level * (_near(self._times, self._times, _TIME_LENGTH) + _OF_ROUND * same)
        for length, scale, noise in itertools.product(_LENGTHS, _SCALES, _NOISES):
            kernel = trend + self._curve(probes, probes, length, scale)
            root = _root(kernel + self._noise(noise))
            white = torch.linalg.solve_triangular(root, values[:, None], upper=False)
            likelihood = -float(white.square().sum()) / 2 - float(root.diagonal().log().sum())
            best = max(best, (likelihood, length, scale, noise))
        _, length, scale, noise = best
        kernel = trend + self._curve(probes, probes, length, scale) + self._noise(noise)
        root = _root(kernel)
        times = torch.linspace(0, 1, TIMES, dtype=torch.float64).repeat_interleave(RATIOS)
        read = _place(self.grid).repeat(TIMES), times
        curve = self._curve(read, probes, length, scale)
        cross = self._level * _near(times, self._times, _TIME_LENGTH) + curve
        self._gain = torch.cholesky_solve(cross.T, root).T  # [times * ratios, probes]
        self._chosen = read, curve, root, length, scale

    @cached_property
    def _spread(self) -> Tensor:
        """Root of what remains uncertain, [times * ratios, times * ratios]: dear, and only for draws."""
        read, curve, root, length, scale = self._chosen
        # The level is common to all ratios, so its own uncertainty is left out of the draws.
        rest = self._curve(read, read, length, scale) - curve @ torch.cholesky_solve(curve.T, root)
        # What is far from every probe is known to about this much of its variance.
        jitter = _JITTER * scale * self._within * torch.eye(len(rest), dtype=torch.float64)
        return _root((rest + rest.T) / 2 + jitter)

    def _noise(self, noise: float) -> Tensor:
        return (noise * self._within + _LEAST) * torch.eye(len(self._places), dtype=torch.float64)

    def _curve(self, first: _Points, second: _Points, length: float, scale: float) -> Tensor:
        """Covariance of curve and change."""
        (places, times), (other_places, other_times) = first, second
        change = _near(times, other_times, _TIME_LENGTH)
        return scale * self._within * _near(places, other_places, length) * (1 - _CHANGE + _CHANGE * change)


def _place(ratios: Tensor) -> Tensor:
    return -torch.log1p(-ratios.clamp_max(_HIGHEST))


def _near(first: Tensor, second: Tensor, length: float) -> Tensor:
    """Squared-exponential kernel, [first, second]."""
    return torch.exp(-((first[:, None] - second) ** 2) / (2 * length**2))


def _root(matrix: Tensor) -> Tensor:
    """Cholesky root; where rounding leaves none, as with losses of hundreds of nats, that of the matrix with more noise."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(matrix)
    for power in range(-12, 0):
        if not failed:
            break
        noise = 10.0**power * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
        root, failed = torch.linalg.cholesky_ex(matrix + noise)
    return root


best_reward = Rule("best_reward", _best_reward)
smooth_fit = Rule("smooth_fit", _smooth_fit)
surrogate = Rule("surrogate", _surrogate, compares_rounds=True)
RULES: dict[str, Rule] = {rule.name: rule for rule in (surrogate, smooth_fit, best_reward)}
