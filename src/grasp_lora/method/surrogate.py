"""The surrogate: one smooth curve of loss over prune ratio and time, through all probes of a controller run.

Why. The network trains on between rounds, so losses of different rounds are not comparable as they are, and a round has too few
probes and too few rows to name a ratio by itself. Just after pruning the loss rises with the ratio while the network still
learns, and falls later, when it overfits. So all probes are needed, each at its own moment: a Gaussian process takes them
together, says how the loss of every ratio moves with time, and how sure that is.

    loss(time, p) = level(time) + shift of the round + curve(p) + change(p, time) + noise

All terms are Gaussian, and shift and noise are no part of what is read off. Two readings, two rules:

    surrogate          each ratio counts for its best moment: something will stop the final run at it (a dev set)
    surrogate_at_end   each ratio counts for the last step, where a final run of fixed length ends

Worked example: three rounds probe 0.1, 0.45 and 0.8. Before training the losses are 1.00, 1.05 and 1.60, half way 1.15, 1.05 and
1.35, at the end 1.40, 1.10 and 1.15. The best moment is before training, and names 0.16; the end names 0.49.

The interval comes from draws of the process, each with a resample of the probed examples of its own (1000, fixed seed).
Losses after pruning hardly change with the ratio at first and rise steeply later, so the process sees the ratio p as -ln(1 - p),
in which the rise is even. Source: Rasmussen & Williams 2006, chapters 2 and 5; the kernel is our choice. The paper takes the best
reward in its place (`rules.best_reward`).
"""

import itertools
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from grasp_lora.method.rules import RESAMPLES, TAILS, RatioEstimate, Round, Rule, interval_of

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
_Points = tuple[Tensor, Tensor]  # where ratios lie, and times


def _read(at_end: bool, rounds: Sequence[Round], ratio_min: float, ratio_max: float, interval: bool) -> RatioEstimate:
    """Return the ratio whose expected loss gets lowest, at any moment of the run or at its end.

    Away from all probes the process falls back on the level of the moment, so that a trend at the outermost probes is followed
    for about one length of the kernel; with few rounds that may be as far as a bound.
    """
    name = "surrogate_at_end" if at_end else "surrogate"
    process = _process(tuple(rounds), ratio_min, ratio_max)
    fitted = process.expected(at_end)
    ratio = float(process.grid[fitted.argmin()])
    if not interval:
        above = (fitted - fitted.min()).tolist()
        curve = tuple(zip(process.grid.tolist(), above, above, above, strict=True))
        return RatioEstimate(ratio, ratio, ratio, name, len(rounds), curve=curve)
    generator = torch.Generator().manual_seed(0)
    weights = resample(process.examples, generator) / process.examples
    return settle(name, process.grid, len(rounds), fitted, process.sample(weights, generator, at_end))


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
    bounds = torch.quantile(resampled - resampled[:, lowest][:, None], TAILS, dim=0)
    curve = tuple(zip(*(values.tolist() for values in (grid, fitted - fitted[lowest], *bounds)), strict=True))
    # Resampling scatters around the estimate but need not cover it when it sits on a bound.
    return RatioEstimate(ratio, min(low, ratio), max(high, ratio), rule, rounds, curve=curve)


def resample(size: int, generator: torch.Generator) -> Tensor:
    """Draw `size` items with replacement, again and again: how often each comes, [resamples, size]."""
    picks = torch.randint(size, (RESAMPLES, size), generator=generator)
    ones = torch.ones(RESAMPLES, size, dtype=torch.float64)
    return torch.zeros(RESAMPLES, size, dtype=torch.float64).scatter_add_(1, picks, ones)


@lru_cache(maxsize=1)
def _process(rounds: tuple[Round, ...], ratio_min: float, ratio_max: float) -> "Surrogate":
    """The process after some rounds, fitted once: each round asks for its ratio, and the end of the run for its interval."""
    return Surrogate(rounds, ratio_min, ratio_max)


class Surrogate:
    """The process itself. The scales come from the probes, lengths and noise by marginal likelihood.

    Args:
        rounds: at least one, evenly spaced in time.
        ratio_min, ratio_max: bounds of the ratio.
    """

    def __init__(self, rounds: Sequence[Round], ratio_min: float, ratio_max: float) -> None:
        probes = [(measured.current_ratio, *measured.candidates) for measured in rounds]
        self.grid = torch.linspace(ratio_min, ratio_max, RATIOS, dtype=torch.float64)
        self.examples = max(
            max(len(measured.baseline_losses), *(place + 1 for place in measured.places or (0,))) for measured in rounds
        )
        counts = torch.tensor([len(ratios) for ratios in probes])
        self._number = torch.arange(len(rounds)).repeat_interleave(counts)  # the round of each probe
        self._times = self._number.double() / max(1, len(rounds) - 1)
        self._ratios = _stretched(torch.tensor([ratio for ratios in probes for ratio in ratios], dtype=torch.float64))
        self._rounds = [(measured, torch.tensor(measured.common_losses, dtype=torch.float64)) for measured in rounds]
        means = self._means(torch.full((1, self.examples), 1 / self.examples, dtype=torch.float64))[:, 0]
        sums = torch.zeros(len(rounds), dtype=torch.float64).index_add(0, self._number, means)
        levels = sums / counts
        self._centre = float(levels.mean())
        self._level = max(float((levels - self._centre).square().mean()), _LEAST)
        self._within = max(float((means - levels[self._number]).square().mean()), _LEAST)
        self._values = means
        self._fit(means - self._centre)

    def sample(self, weights: Tensor, generator: torch.Generator, at_end: bool) -> Tensor:
        """Draw curves of the lowest loss over time or of the last one, each with weights of the examples, [draws, ratios].

        Args:
            weights: of the probed examples, each row adds up to 1, [draws, examples].
            generator: of the draws.
            at_end: whether the last moment counts, not each ratio's best one.
        """
        means = self._means(weights) - self._centre
        around = torch.randn(len(self._spread), len(weights), generator=generator, dtype=torch.float64)
        drawn = self._gain @ means + self._spread @ around + self._centre
        return _over_time(drawn.view(TIMES, RATIOS, -1), at_end).T

    def expected(self, at_end: bool) -> Tensor:
        """The expected loss of each ratio of the grid at its best moment, or at the end, [ratios]."""
        mean: Tensor = self._gain @ (self._values - self._centre) + self._centre
        return _over_time(mean.view(TIMES, RATIOS), at_end)

    def _means(self, weights: Tensor) -> Tensor:
        """Mean loss of each probe over all examples, [probes, draws].

        Where only a few were measured, their mean stands for it; where the baseline has all, a candidate has the mean of the
        baseline plus its mean difference from it on the few.

        Args:
            weights: of the examples, [draws, examples].
        """
        found = []
        for measured, common in self._rounds:
            shares = weights if measured.places is None else weights[:, list(measured.places)]
            # A resample may leave all of the few out.
            shares = torch.where(shares.sum(1, keepdim=True) > 0, shares, 1.0)
            means = common @ (shares / shares.sum(1, keepdim=True)).T
            if measured.places is not None and measured.baseline_on_all:
                whole = weights @ torch.tensor(measured.baseline_losses, dtype=torch.float64)
                means = means - means[0] + whole
            found.append(means)
        return torch.cat(found)

    def _fit(self, values: Tensor) -> None:
        """Choose lengths, scale and noise, and prepare the mean that is read off."""
        best, probes = (-torch.inf, 0.0, 0.0, 0.0), (self._ratios, self._times)
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
        read = _stretched(self.grid).repeat(TIMES), times
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
        return (noise * self._within + _LEAST) * torch.eye(len(self._ratios), dtype=torch.float64)

    def _curve(self, first: _Points, second: _Points, length: float, scale: float) -> Tensor:
        """Covariance of curve and change."""
        (ratios, times), (other_ratios, other_times) = first, second
        change = _near(times, other_times, _TIME_LENGTH)
        return scale * self._within * _near(ratios, other_ratios, length) * (1 - _CHANGE + _CHANGE * change)


def _over_time(losses: Tensor, at_end: bool) -> Tensor:
    """The loss that counts for each ratio, from those at all moments, [times, ratios, ...]."""
    return losses[-1] if at_end else losses.amin(0)


def _stretched(ratios: Tensor) -> Tensor:
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


surrogate = Rule("surrogate", partial(_read, False), compares_rounds=True)
surrogate_at_end = Rule("surrogate_at_end", partial(_read, True))
