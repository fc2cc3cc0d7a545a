"""Rules: from the rounds of a controller run to one prune ratio with its interval.

A rule is a small function of the rounds. Three rules:

    best_reward        the candidate with the best reward of the whole run; one lucky probe decides (the paper's)
    surrogate          a curve through all probes; the ratio whose loss gets lowest at any moment (`method.surrogate`)
    surrogate_at_end   the same curve, read at the last step, for trainings of fixed length

Example: rounds that measured 0.2, 0.4 and 0.6 at losses 1.1, 1.0 and 1.3, with noise, give a `RatioEstimate` such as
ratio 0.37, low 0.25, high 0.46. The interval comes from resampling examples, rounds or both, as the rule says; it is the
whole range where they say nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from grasp_lora.errors import RecipeError
from grasp_lora.text.display import quoted

CONFIDENCE = 0.95
WIDE_INTERVAL = 0.3  # from here on a reader is told that the probes did not settle the ratio
# From this share of the searched range on nothing was learned. Losses of nothing but noise leave as much open in 9 of 10 runs by
# the surrogate, those of a clear valley hardly ever (`lab/log.md`).
OPEN_SHARE = 0.75
RESAMPLES = 1000
TAILS = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)

_PAST_BOUND = 1e-9  # by which a ratio that was computed may pass a bound
_ROUNDING = 1e-6  # of a loss, in float32


@dataclass(frozen=True)
class Round:
    """What one round measured.

    Args:
        current_ratio: committed ratio at which the baseline was measured.
        candidates: C ratios.
        baseline_losses: loss of each example of the pool under the committed mask, shape `[examples]`; or only of those in
            `places`, where no round is compared with another.
        candidate_losses: loss of each example under each candidate's mask, shape `[C][examples]`; only of those in `places`
            if there are any.
        places: the examples that the candidates were measured on, as places in the pool; None for all.
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
        if self.places is not None and self.baseline_on_all:
            baseline = tuple(baseline[place] for place in self.places)
        return baseline, *self.candidate_losses

    @property
    def baseline_on_all(self) -> bool:
        """Whether the baseline was measured on the whole pool, not only on the examples that the candidates have."""
        return self.places is None or len(self.baseline_losses) > len(self.places)

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


def interval_of(values: Tensor) -> tuple[float, float]:
    """Return the bounds between which `CONFIDENCE` of the values lie."""
    low, high = torch.quantile(values, TAILS).tolist()
    return low, high


best_reward = Rule("best_reward", _best_reward)
