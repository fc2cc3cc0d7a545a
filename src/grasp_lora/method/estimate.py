"""From the rounds of a controller run to one prune ratio: a rule is a small function of the history.

Losses of different rounds are not comparable, since the network trains on between them; losses of one round are. Every
rule gets the rounds and the bounds and returns a `RatioEstimate`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grasp_lora.errors import RecipeError
from grasp_lora.method.rounds import CONFIDENCE, OPEN_SHARE, RatioEstimate, Round
from grasp_lora.text.display import quoted

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
        given = self.function(rounds, ratio_min, ratio_max, interval)
        if not isinstance(given, RatioEstimate):
            raise RecipeError(
                f"rule {quoted(self.name)} gave {quoted(given)}; its function must return a RatioEstimate"
            )
        if interval and _say_nothing(rounds):
            given = replace(given, low=ratio_min, high=ratio_max)
        if not ratio_min - _PAST_BOUND <= given.low <= given.ratio <= given.high <= ratio_max + _PAST_BOUND:
            raise RecipeError(
                f"rule {quoted(self.name)} gave ratio {given.ratio} with interval {given.low} to {given.high}; the interval must "
                f"hold the ratio, and all must lie in [{ratio_min}, {ratio_max}]"
            )
        low, ratio, high = (min(max(one, ratio_min), ratio_max) for one in (given.low, given.ratio, given.high))
        return replace(given, low=low, ratio=ratio, high=high, bounds=(ratio_min, ratio_max))


def _say_nothing(rounds: Sequence[Round]) -> bool:
    """Whether no loss changes with the ratio, or rounds have one example each: how far another is from it, none of them says."""
    return len(rounds[0].common_losses[0]) == 1 or all(
        math.isclose(loss, baseline, rel_tol=_ROUNDING)
        for one in rounds
        for ratio, losses in zip(one.candidates, one.candidate_losses, strict=True)
        if ratio != one.current_ratio
        for loss, baseline in zip(losses, one.common_losses[0], strict=True)
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
    found, span = settle("smooth_fit", grid, count, fitted, curves), max(probed) - min(probed)
    if span < ratio_max - ratio_min and found.high - found.low >= OPEN_SHARE * span:
        return replace(found, low=ratio_min, high=ratio_max)
    # An end of the interval where probing ended says nothing of what lies beyond.
    low, high = float(grid[0]), float(grid[-1])
    return replace(
        found,
        low=ratio_min if math.isclose(found.low, low) else found.low,
        high=ratio_max if math.isclose(found.high, high) else found.high,
    )


best_reward = Rule("best_reward", _best_reward)
smooth_fit = Rule("smooth_fit", _smooth_fit)


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
    return RatioEstimate(ratio, min(low, ratio), max(high, ratio), rule, rounds, curve)


def resample(size: int, generator: torch.Generator) -> Tensor:
    """Draw `size` items with replacement, again and again: how often each comes, [resamples, size]."""
    picks = torch.randint(size, (RESAMPLES, size), generator=generator)
    ones = torch.ones(RESAMPLES, size, dtype=torch.float64)
    return torch.zeros(RESAMPLES, size, dtype=torch.float64).scatter_add_(1, picks, ones)


def interval_of(values: Tensor) -> tuple[float, float]:
    """Return the bounds between which `CONFIDENCE` of the values lie."""
    low, high = torch.quantile(values, _TAILS).tolist()
    return low, high
