"""What one controller round measured and decided, and what a whole run came to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypedDict

CONFIDENCE = 0.95
WIDE_INTERVAL = 0.3  # from here on a reader is told that the probes did not settle the ratio
# From this share of the searched range on nothing was learned. Losses of nothing but noise leave as much open in 8 to 10 of 10
# runs by `surrogate` and `smooth_fit`, those of a clear valley hardly ever (`lab/log.md`).
OPEN_SHARE = 0.75


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


class RoundRecord(TypedDict):
    """A round as plain values: what it measured, what followed, and what was learned."""

    candidates: list[float]
    baseline_losses: list[float]
    candidate_losses: list[list[float]]
    places: list[int] | None
    rewards: list[float]
    policy_mean: float
    policy_std: float
    committed: bool
    clipped: bool
    ratio_before: float
    ratio: float
    measured_sparsity: float


@dataclass(frozen=True)
class Decision:
    """What follows from a round.

    Args:
        rewards: one per candidate.
        committed: whether the current ratio moves; if so the mask is rebuilt at `ratio`.
        ratio: the current ratio after the round.
        clipped: the winner lay further away than the policy moves at once, so the mask at `ratio` was not itself probed.
    """

    rewards: tuple[float, ...]
    committed: bool
    ratio: float
    clipped: bool = False

    def to_json(self, measured: Round, mean: float, std: float, sparsity: float) -> RoundRecord:
        """Return what a line of `rounds.jsonl` says of a round.

        Args:
            measured: the round that it follows from.
            mean, std: of the policy after it.
            sparsity: measured share of pruned weights, a fraction in [0, 1].
        """
        return {
            "candidates": list(measured.candidates),
            "baseline_losses": list(measured.baseline_losses),
            "candidate_losses": list(map(list, measured.candidate_losses)),
            "places": None if measured.places is None else list(measured.places),
            "rewards": list(self.rewards),
            "policy_mean": mean,
            "policy_std": std,
            "committed": self.committed,
            "clipped": self.clipped,
            "ratio_before": measured.current_ratio,
            "ratio": self.ratio,
            "measured_sparsity": sparsity,
        }


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
        bounds: of the ratios that were searched.
    """

    ratio: float
    low: float
    high: float
    rule: str
    rounds: int
    curve: tuple[tuple[float, float, float, float], ...] = field(default=(), repr=False)
    confidence: float = field(default=CONFIDENCE, repr=False)
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
        """What was learned, in one line for people."""
        interval = f"{100 * self.confidence:.0f} % interval {100 * self.low:.0f} to {100 * self.high:.0f} %"
        if self.nothing_learned:
            return f"nothing was learned about the prune ratio ({interval}); {100 * self.ratio:.0f} % was taken"
        return f"prune ratio {100 * self.ratio:.0f} % ({interval})"
