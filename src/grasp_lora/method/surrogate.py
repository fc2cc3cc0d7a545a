"""A Gaussian process over ratio and time through the probes of a controller run: where the loss gets lowest.

Losses after pruning hardly change with the ratio at first and rise steeply later, so the process sees the ratio p as -ln(1 - p),
in which the rise is even. Source: Rasmussen & Williams 2006, chapters 2 and 5; the kernel is our choice.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from grasp_lora.method.estimate import Rule, resample, settle
from grasp_lora.method.rounds import RatioEstimate, Round

RATIOS = 57  # on which the process is read, at so many moments
TIMES = 11

_TIME_LENGTH = 0.5  # of the run
_LENGTHS = (0.25, 0.5, 1.0)  # in -ln(1 - p)
_SCALES = (1.0, 4.0, 16.0)  # variance of the curve over that of the probes within a round
_NOISES = (1e-4, 1e-3, 1e-2, 1e-1)  # variance of a probe over that of the probes within a round
_CHANGE = 0.5  # share of the curve's variance that changes with time
_HIGHEST = 0.99  # where -ln(1 - p) ends
_LEAST = 1e-12
_JITTER = 1e-6  # of the curve's variance
_Points = tuple[Tensor, Tensor]  # places and times


def _lowest(rounds: Sequence[Round], ratio_min: float, ratio_max: float, interval: bool) -> RatioEstimate:
    """Return the ratio whose expected loss gets lowest at any moment of the run, by a Gaussian process over ratio and time.

    Early stopping keeps a run's best moment, so a ratio counts for its own. Away from all probes the process falls back on the
    level of the moment, so that a trend at the outermost probes is followed for about one length of the kernel; with few rounds
    that may be as far as a bound. The interval comes from draws of the process, each with its own resample of the
    probed examples (1000, fixed seed). Our choice; the paper takes the best reward.
    """
    process = Surrogate(rounds, ratio_min, ratio_max)
    fitted = process.lowest_mean()
    ratio = float(process.grid[fitted.argmin()])
    if not interval:
        return RatioEstimate(ratio, ratio, ratio, "surrogate", len(rounds))
    generator = torch.Generator().manual_seed(0)
    examples = len(rounds[0].baseline_losses)
    resampled = process.sample(resample(examples, generator) / examples, generator)
    return settle("surrogate", process.grid, len(rounds), fitted, resampled)


surrogate = Rule("surrogate", _lowest, compares_rounds=True)


class Surrogate:
    """The process after some rounds.

    Model: loss(time, p) = level(time) + shift of the round + curve(p) + change(p, time) + noise, all Gaussian. Only the shift
    and the noise are not part of what is read off. The scales come from the probes, lengths and noise by marginal likelihood.

    Args:
        rounds: at least one, evenly spaced in time.
        ratio_min, ratio_max: bounds of the ratio.
    """

    def __init__(self, rounds: Sequence[Round], ratio_min: float, ratio_max: float) -> None:
        probes = [(one.current_ratio, *one.candidates) for one in rounds]
        self.grid = torch.linspace(ratio_min, ratio_max, RATIOS, dtype=torch.float64)
        counts = torch.tensor([len(ratios) for ratios in probes])
        self._number = torch.arange(len(rounds)).repeat_interleave(counts)  # the round of each probe
        self._times = self._number.double() / max(1, len(rounds) - 1)
        self._places = _place(torch.tensor([ratio for ratios in probes for ratio in ratios], dtype=torch.float64))
        # Of each probe the losses that its mean starts from, [probes, examples], and what was measured on a few of them.
        self._losses = torch.tensor(
            [
                one.baseline_losses if one.places is not None else losses
                for one in rounds
                for losses in (one.baseline_losses, *one.candidate_losses)
            ],
            dtype=torch.float64,
        )
        self._few: list[tuple[slice, list[int], Tensor]] = []
        for end, one in zip(counts.cumsum(0).tolist(), rounds, strict=True):
            if one.places is not None:
                baseline, *candidates = torch.tensor(one.common_losses, dtype=torch.float64)
                rows = slice(end - len(candidates), end)
                self._few.append((rows, list(one.places), torch.stack(candidates) - baseline))
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
        around = torch.randn(len(self._root), len(weights), generator=generator, dtype=torch.float64)
        drawn = self._gain @ means + self._root @ around + self._centre
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
            own = weights[:, places]
            own = torch.where(own.sum(1, keepdim=True) > 0, own, 1.0)  # a resample may leave all of the few out
            means[rows] += differences @ (own / own.sum(1, keepdim=True)).T
        return means

    def _fit(self, values: Tensor) -> None:
        """Choose lengths, scale and noise, and prepare what is read off."""
        best, probes = (-torch.inf, 0.0, 0.0, 0.0), (self._places, self._times)
        same = (self._number[:, None] == self._number).double()
        trend = self._level * (_near(self._times, self._times, _TIME_LENGTH) + 0.1 * same)
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
        # The level is common to all ratios, so its own uncertainty is left out of the draws.
        rest = self._curve(read, read, length, scale) - curve @ torch.cholesky_solve(curve.T, root)
        # What is far from every probe is known to about this much of its variance.
        jitter = _JITTER * scale * self._within * torch.eye(len(rest), dtype=torch.float64)
        self._root = _root((rest + rest.T) / 2 + jitter)

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
