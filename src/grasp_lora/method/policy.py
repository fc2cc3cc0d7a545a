"""Who chooses the next candidate prune ratios: ask for candidates, tell their losses, read off the ratio.

One round: `ask()` draws candidate ratios, the caller measures the micro-dev loss of each, `tell()` turns the losses
into rewards, updates the policy and says whether the current ratio moves. `best_ratio()` is the learned ratio p*.
Paper: controller and policy update sections.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist, stdev
from typing import Any, ClassVar

from torch import Tensor

from grasp_lora.errors import ProbeError
from grasp_lora.method.estimate import EstimateRule, RatioEstimate, best_reward, lowest_loss, smooth_fit
from grasp_lora.method.surrogate import Surrogate, lowest_surrogate

STATE_VERSION = 1
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, fill [0, 1] evenly at any length

ESTIMATE_RULES: dict[str, EstimateRule] = {
    "smooth_fit": smooth_fit,
    "lowest_loss": lowest_loss,
    "surrogate": lowest_surrogate,
    "best_reward": best_reward,
}
COMPARE_LEVELS = ("lowest_loss", "surrogate")  # rules that compare the losses of rounds, not only those within one
WHOLE_ROUNDS = ("lowest_loss",)  # rules for which a round has to measure all examples at every ratio


@dataclass(frozen=True)
class PolicySettings:
    """How a policy samples, learns and commits.

    Args:
        kind: `gaussian` (the paper's policy), `uniform` (best of C uniform candidates, no learning: a control), `adaptive` (a
            Gaussian that narrows), `shared` (each step trains at a ratio of its own, so that no ratio's probes are
            biased) or `surrogate` (the same, probing where a Gaussian process has its minimum).
        ratio_min, ratio_max: bounds of the prune ratio, fractions in [0, 1], ratio_min < ratio_max.
        ratio_init: first mean and first current ratio, within the bounds.
        std_init: first standard deviation; None takes (ratio_max - ratio_min) / 6 as the paper does.
        candidates: ratios per round (C), >= 1.
        learning_rate, kl_coef, entropy_bonus: step size, pull towards the current ratio and growth of the
            deviation per round (Paper: policy update), all >= 0.
        max_step: furthest that one commit moves the current ratio, > 0.
        probe_from: share of the run before the first round, in [0, 1]; above 0 there is always a round after the last step,
            with 1 only that one. Pruning repairs what overfitting breaks: late probes differ by more than examples disagree.
        estimate: rule for the learned ratio, `smooth_fit`, `lowest_loss`, `surrogate` or `best_reward` (the paper's).
        seed: seed of the policy's own generator; a recipe combines it with its own seed.

    Raises:
        ValueError: a setting is outside its range.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: str = "gaussian"
    ratio_min: float = 0.10
    ratio_max: float = 0.80
    ratio_init: float = 0.40
    std_init: float | None = None
    candidates: int = 3
    learning_rate: float = 0.05
    kl_coef: float = 0.05
    entropy_bonus: float = 0.01
    max_step: float = 0.10
    probe_from: float = 0.0
    estimate: str = "smooth_fit"
    seed: int = 42

    def __post_init__(self) -> None:
        if self.kind not in POLICIES:
            raise ValueError(f"policy kind is {self.kind!r}; allowed: {', '.join(POLICIES)}")
        if self.estimate not in ESTIMATE_RULES:
            raise ValueError(f"estimate is {self.estimate!r}; allowed: {', '.join(ESTIMATE_RULES)}")
        if not 0.0 <= self.ratio_min < self.ratio_max <= 1.0:
            raise ValueError(
                f"ratio bounds are [{self.ratio_min}, {self.ratio_max}]; "
                "both must lie in [0, 1] and ratio_min must be below ratio_max"
            )
        if not self.ratio_min <= self.ratio_init <= self.ratio_max:
            raise ValueError(
                f"ratio_init is {self.ratio_init}; it must lie between ratio_min {self.ratio_min} "
                f"and ratio_max {self.ratio_max}"
            )
        if self.std_init is not None and not 0.0 < self.std_init < math.inf:
            raise ValueError(f"std_init is {self.std_init}; it must be a positive number, or left out")
        if self.candidates < 1:
            raise ValueError(f"candidates is {self.candidates}; at least 1 is needed")
        for name in ("learning_rate", "kl_coef", "entropy_bonus"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number >= 0")
        if not 0.0 < self.max_step <= 1.0:
            raise ValueError(f"max_step is {self.max_step}; it must lie in (0, 1]")
        if not 0.0 <= self.probe_from <= 1.0:
            raise ValueError(f"probe_from is {self.probe_from}; it must be a share of the run, in [0, 1]")

    def round_follows(self, step: int, steps: int, every: int) -> bool:
        """Return whether a round follows an optimizer step.

        Args:
            step: optimizer steps taken, 0 before the first one.
            steps: of the whole run.
            every: optimizer steps between rounds, >= 1.
        """
        if step == 0:
            return POLICIES[self.kind].shared and self.probe_from == 0.0
        if step == steps and self.probe_from > 0.0:
            return True
        return step >= self.probe_from * steps and step % every == 0

    def compares_rounds(self, patience: int | None = None, keep_best: bool = False) -> bool:
        """Return whether losses of one round are compared with those of another, so that its baseline needs all examples.

        Args:
            patience: rounds in a row without a lower loss, after which the run stops; None for never.
            keep_best: whether the adapter of the round with the lowest loss is kept.
        """
        return keep_best or patience is not None or self.estimate in COMPARE_LEVELS

    @property
    def whole_rounds(self) -> bool:
        """Whether the estimate needs all examples at every ratio of a round, so that they cannot take turns."""
        return self.estimate in WHOLE_ROUNDS

    def round_steps(self, steps: int, every: int) -> list[int]:
        """Return the optimizer steps that a round follows, in a run of so many; see `round_follows`."""
        return [step for step in range(steps + 1) if self.round_follows(step, steps, every)]


def shared_ratio(step: int, low: float, high: float, offset: float = 0.5) -> float:
    """Return the prune ratio at which one step of a shared run trains.

    An additive golden-ratio sequence: any stretch of steps covers the whole range evenly.

    Args:
        step: optimizer steps taken before it, >= 0.
        low, high: bounds of the ratio, fractions in [0, 1].
        offset: where the sequence begins, in [0, 1).

    >>> [round(shared_ratio(step, 0.0, 0.8), 3) for step in range(4)]
    [0.4, 0.094, 0.589, 0.283]
    """
    return low + (high - low) * ((offset + step * GOLDEN) % 1.0)


def preset(name: str, **changes: Any) -> PolicySettings:
    """Return the settings of a named preset, with changes.

    Presets: `default` (the paper's update, ratio from a smooth fit), `paper` (ratio from the best reward),
    `random` (the control without learning), `adaptive` (a Gaussian that narrows), `shared` (all ratios train together, ratio
    from a Gaussian process), `surrogate` (the same with probes from that process, too) and `late` (all ratios train together,
    probes in the second half of the run only, ratio from a smooth fit).

    Raises:
        ValueError: there is no such preset, or a change is out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no policy preset {name!r}; allowed: {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)


@dataclass(frozen=True)
class Round:
    """What one round measured.

    Args:
        current_ratio: committed ratio at which the baseline was measured.
        candidates: C ratios.
        baseline_losses: loss of each micro-dev example under the committed mask, [examples].
        candidate_losses: loss of each example under each candidate's mask, [C][examples]; only of those in `places` if there
            are any.
        places: the examples that the candidates were measured on, as places in `baseline_losses`; None for all.
    """

    current_ratio: float
    candidates: tuple[float, ...]
    baseline_losses: tuple[float, ...]
    candidate_losses: tuple[tuple[float, ...], ...]
    places: tuple[int, ...] | None = None

    @classmethod
    def from_json(cls, current_ratio: float, row: Mapping[str, Any]) -> "Round":
        """Rebuild a round from plain JSON values: of a policy's state, or of a line of `rounds.jsonl`."""
        return cls(
            current_ratio,
            tuple(row["candidates"]),
            tuple(row["baseline_losses"]),
            tuple(tuple(losses) for losses in row["candidate_losses"]),
            None if row.get("places") is None else tuple(row["places"]),
        )

    @property
    def common_losses(self) -> tuple[tuple[float, ...], ...]:
        """Losses of the examples that every probe measured, the baseline first, [1 + C][examples]."""
        baseline = self.baseline_losses
        if self.places is not None:
            baseline = tuple(baseline[place] for place in self.places)
        return baseline, *self.candidate_losses

    @property
    def rewards(self) -> tuple[float, ...]:
        """Mean baseline loss minus mean candidate loss on the same examples, one per candidate; higher is better."""
        baseline, *candidates = (math.fsum(losses) / len(losses) for losses in self.common_losses)
        return tuple(baseline - loss for loss in candidates)

    @property
    def lowest_loss(self) -> float:
        """Lowest mean loss of a probe, baseline included; that of one on a few examples is the baseline's minus its reward."""
        baseline = math.fsum(self.baseline_losses) / len(self.baseline_losses)
        if self.places is not None:
            return baseline - max(0.0, *self.rewards)
        return min(baseline, *(math.fsum(losses) / len(losses) for losses in self.candidate_losses))


@dataclass(frozen=True)
class Decision:
    """What follows from a round.

    Args:
        rewards: one per candidate.
        committed: whether the current ratio moves; if so the mask is rebuilt at `ratio`.
        ratio: the current ratio after the round.
        clipped: the winner lay further away than `max_step`, so the mask at `ratio` was not itself probed.
    """

    rewards: tuple[float, ...]
    committed: bool
    ratio: float
    clipped: bool


class RatioPolicy(ABC):
    """Base of the policies: bookkeeping, commit rule, history and state.

    A new policy implements `_draw` and `_learn`, and keeps what it learns in `mean` and `std`; when it learns and decides,
    the round stands in `history` already. Draws of a round depend on the seed and the round's number alone, so asking twice gives
    the same candidates and a resume needs no generator state.

    Where `shared` is true, the controller trains under the ratio that `training_ratio` gives for each step, with nested masks
    from one ranking; elsewhere under the current ratio.
    """

    shared: ClassVar[bool] = False

    def __init__(self, settings: PolicySettings) -> None:
        self.settings = settings
        self.mean = settings.ratio_init
        self.std = (settings.ratio_max - settings.ratio_min) / 6 if settings.std_init is None else settings.std_init
        self.current_ratio = settings.ratio_init
        self.history: list[Round] = []

    @abstractmethod
    def _draw(self, generator: random.Random) -> list[float]:
        """Draw C ratios, not necessarily within the bounds."""

    @abstractmethod
    def _learn(self, candidates: Sequence[float], rewards: Sequence[float]) -> None:
        """Update `mean` and `std`; `current_ratio` still holds its value before the commit."""

    def ask(self) -> list[float]:
        """Return the C candidate ratios of the next round, each within the bounds."""
        # A string seed is hashed with SHA-512 by the standard library, so close seeds give unrelated draws.
        generator = random.Random(f"{self.settings.seed}/{len(self.history)}")
        return [self._clamp(ratio) for ratio in self._draw(generator)]

    def tell(self, measured: Round) -> Decision:
        """Learn from a measured round and decide whether the current ratio moves.

        Raises:
            ProbeError: a loss is not a finite number.
            ValueError: the round does not fit this policy: numbers of candidates or examples, ratios. Nothing changes.
        """
        self._check(measured)
        rewards = measured.rewards
        self.history.append(measured)
        self._learn(measured.candidates, rewards)
        decision = self._decide(measured.candidates, rewards)
        self.current_ratio = decision.ratio
        return decision

    def training_ratio(self, step: int) -> float:
        """Return the ratio at which optimizer step `step` (from 0) trains."""
        return self.current_ratio

    @property
    def rounds_since_best(self) -> int:
        """Rounds since the one in which a probe, baselines included, had the lowest mean loss so far."""
        lowest = [one.lowest_loss for one in self.history]
        return len(lowest) - 1 - lowest.index(min(lowest)) if lowest else 0

    def tell_rewards(self, candidates: Sequence[float], rewards: Sequence[float]) -> Decision:
        """Learn from given candidates and rewards: for tests and for replaying a record."""
        return self.tell(Round(self.current_ratio, tuple(candidates), (0.0,), tuple((-reward,) for reward in rewards)))

    def best_ratio(self, *, interval: bool = True) -> RatioEstimate:
        """Return the learned ratio p* of all rounds so far, with an interval unless that is not wanted, which is faster.

        Raises:
            ValueError: no round has been told yet.
        """
        if not self.history:
            raise ValueError("no round was measured yet, so there is no learned ratio; tell at least one round")
        rule = ESTIMATE_RULES[self.settings.estimate]
        return rule(self.history, self.settings.ratio_min, self.settings.ratio_max, interval=interval)

    def state(self) -> dict[str, Any]:
        """Return everything a resume needs, as plain JSON values."""
        return {
            "version": STATE_VERSION,
            "settings": asdict(self.settings),
            "mean": self.mean,
            "std": self.std,
            "current_ratio": self.current_ratio,
            "history": [asdict(measured) for measured in self.history],
        }

    @staticmethod
    def from_state(state: dict[str, Any]) -> "RatioPolicy":
        """Rebuild the policy that `state()` described.

        Raises:
            ValueError: the state is of another version.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"policy state has version {state.get('version')}; this program reads {STATE_VERSION}")
        policy = make_policy(PolicySettings(**state["settings"]))
        policy.mean, policy.std = state["mean"], state["std"]
        policy.current_ratio = state["current_ratio"]
        policy.history = [Round.from_json(measured["current_ratio"], measured) for measured in state["history"]]
        return policy

    def _check(self, measured: Round) -> None:
        if len(measured.candidates) != len(measured.candidate_losses) or not measured.candidates:
            raise ValueError(
                f"{len(measured.candidates)} candidates but losses for {len(measured.candidate_losses)}; "
                "each candidate needs its list of losses"
            )
        low, high = self.settings.ratio_min, self.settings.ratio_max
        # `not in between` also catches NaN, which would spread to the mean and stay there.
        outside = [ratio for ratio in measured.candidates if not low <= ratio <= high]
        if outside:
            raise ValueError(f"candidates {outside} lie outside [{low}, {high}]; tell the ratios that ask() gave")
        if measured.current_ratio != self.current_ratio:
            raise ValueError(
                f"the baseline was measured at ratio {measured.current_ratio}, but the committed ratio is "
                f"{self.current_ratio}; measure it under the committed mask"
            )
        examples, places = len(measured.baseline_losses), measured.places
        if places is not None and (len(set(places)) < len(places) or not set(places) <= set(range(examples))):
            raise ValueError(f"places {list(places)} are not different places among {examples} baseline losses")
        if places is not None and self.settings.whole_rounds:
            raise ValueError(
                f"the candidates were measured on {len(places)} of {examples} examples, but the estimate "
                f"{self.settings.estimate!r} needs all of them"
            )
        few = examples if places is None else len(places)
        for number, losses in enumerate((measured.baseline_losses, *measured.candidate_losses)):
            if not losses or len(losses) != (few if number else examples):
                raise ValueError(
                    f"a list of {len(losses)} losses beside a baseline of {few}; "
                    "the baseline and every candidate need the loss of each micro-dev example"
                )
            for example, loss in enumerate(losses):
                if not math.isfinite(loss):
                    raise ProbeError(f"the loss of micro-dev example {example} is {loss}; it must be finite")
        if self.history:
            earlier = self.history[0]
            for what, count, before in (
                ("micro-dev examples", examples, len(earlier.baseline_losses)),
                ("losses of a candidate", len(measured.candidate_losses[0]), len(earlier.candidate_losses[0])),
            ):
                if count != before:
                    raise ValueError(f"{count} {what}, but {before} in earlier rounds; their number is fixed for a run")

    def _clamp(self, ratio: float) -> float:
        return min(max(ratio, self.settings.ratio_min), self.settings.ratio_max)

    def _decide(self, candidates: Sequence[float], rewards: Sequence[float]) -> Decision:
        best = max(range(len(rewards)), key=rewards.__getitem__)
        if rewards[best] < 0.0:
            return Decision(tuple(rewards), False, self.current_ratio, False)
        distance = candidates[best] - self.current_ratio
        clipped = abs(distance) > self.settings.max_step
        ratio = self.current_ratio + math.copysign(self.settings.max_step, distance) if clipped else candidates[best]
        return Decision(tuple(rewards), True, self._clamp(ratio), clipped)


class GaussianPolicy(RatioPolicy):
    """A Gaussian over the ratio, updated with group-relative advantages.

    Score function of the Gaussian, a pull of the mean towards the current ratio and a constant entropy bonus.
    Paper: policy update; the released code floors the variance at 1e-4 and the deviation at 1e-3, and so do we.
    """

    def _draw(self, generator: random.Random) -> list[float]:
        return [generator.gauss(self.mean, self.std) for _ in range(self.settings.candidates)]

    def _learn(self, candidates: Sequence[float], rewards: Sequence[float]) -> None:
        settings = self.settings
        average = math.fsum(rewards) / len(rewards)
        advantages = [reward - average for reward in rewards]
        variance = max(self.std**2, 1e-4)
        deviations = [candidate - self.mean for candidate in candidates]
        mean_terms = [a * d / variance for a, d in zip(advantages, deviations, strict=True)]
        std_terms = [a * (d * d / variance - 1.0) for a, d in zip(advantages, deviations, strict=True)]
        mean_gradient = math.fsum(mean_terms) / len(rewards)
        std_gradient = math.fsum(std_terms) / len(rewards)
        pull = settings.kl_coef * (self.mean - self.current_ratio)
        self.mean = self._clamp(self.mean + settings.learning_rate * (mean_gradient - pull))
        self.std = max(1e-3, self.std + settings.learning_rate * std_gradient + settings.entropy_bonus)


def _even(settings: PolicySettings) -> tuple[float, float]:
    """Mean and deviation of a uniform distribution between the bounds."""
    return (settings.ratio_min + settings.ratio_max) / 2, (settings.ratio_max - settings.ratio_min) / math.sqrt(12)


class UniformPolicy(RatioPolicy):
    """Best of C uniform candidates, no learning: the control that a learning policy has to beat."""

    def __init__(self, settings: PolicySettings) -> None:
        super().__init__(settings)
        self.mean, self.std = _even(settings)

    def _draw(self, generator: random.Random) -> list[float]:
        low, high = self.settings.ratio_min, self.settings.ratio_max
        return [generator.uniform(low, high) for _ in range(self.settings.candidates)]

    def _learn(self, candidates: Sequence[float], rewards: Sequence[float]) -> None:
        """Nothing is learned: mean and deviation stay those of the uniform distribution."""


class SharedPolicy(RatioPolicy):
    """All ratios train together: each optimizer step draws the ratio it trains at, and candidates spread over the range.

    A ratio that is held biases its own probes: the network heals around its mask, and every other ratio looks worse the longer
    that goes on. Here none is held, so that the probes of a round compare like with like at any moment of training. The
    current ratio is the best one by the fit so far. Where rounds begin late they are few, so the first of them goes from bound to
    bound: a rule takes no ratio beyond those that were probed. Our choice, after slimmable networks (Yu et al. 2019) and
    one-shot architecture search (Bender et al. 2018); nothing of the paper's update is used.
    """

    shared = True

    def __init__(self, settings: PolicySettings) -> None:
        super().__init__(settings)
        self.mean, self.std = _even(settings)

    def training_ratio(self, step: int) -> float:
        """Return the ratio of a step: any few steps in a row cover the range evenly."""
        return self._ratio("training", step)

    def _draw(self, generator: random.Random) -> list[float]:
        count, low, high = self.settings.candidates, self.settings.ratio_min, self.settings.ratio_max
        if self.settings.probe_from > 0.0 and not self.history and count > 1:
            shares = [number / (count - 1) for number in range(count)]
            return [(1 - share) * low + share * high for share in shares]
        width = (high - low) / count
        lowest = low + (self._ratio("candidates", len(self.history)) - low) / count
        return [lowest + number * width for number in range(count)]

    def _learn(self, candidates: Sequence[float], rewards: Sequence[float]) -> None:
        """Nothing is sampled from a mean and a deviation; they are those of an even spread."""

    def _decide(self, candidates: Sequence[float], rewards: Sequence[float]) -> Decision:
        ratio = self.best_ratio(interval=False).ratio
        return Decision(tuple(rewards), ratio != self.current_ratio, ratio, False)

    def _ratio(self, purpose: str, number: int) -> float:
        """The ratio with a number in the even sequence of a purpose, which begins where the seed says."""
        settings = self.settings
        offset = random.Random(f"{settings.seed}/{purpose}").random()
        return shared_ratio(number, settings.ratio_min, settings.ratio_max, offset)


class SurrogatePolicy(SharedPolicy):
    """All ratios train together, and candidates are where a Gaussian process over ratio and time has its lowest loss.

    The first round spreads its candidates evenly. Later ones draw the process's minimum again and again and take evenly spaced
    quantiles of the draws (Thompson sampling, in strata): wide while the probes leave it open where the minimum is, narrow once
    they do not. Mean and deviation are those of the draws. Our choice; nothing of the paper's update is used.
    """

    def _draw(self, generator: random.Random) -> list[float]:
        if not self.history:
            return super()._draw(generator)
        lowest = self._lowest()
        count, shift = self.settings.candidates, generator.random()
        return [float(lowest[int(len(lowest) * (number + shift) / count)]) for number in range(count)]

    def _learn(self, candidates: Sequence[float], rewards: Sequence[float]) -> None:
        lowest = self._lowest()
        self.mean, self.std = float(lowest.mean()), float(lowest.std())

    def _lowest(self) -> Tensor:
        """Draws of the ratio with the lowest loss, after the rounds so far."""
        settings = self.settings
        return Surrogate(self.history, settings.ratio_min, settings.ratio_max).lowest(len(self.history))


class AdaptivePolicy(RatioPolicy):
    """A Gaussian on an unbounded scale that narrows: what the paper's update lacks, with its rewards and its held ratio.

    The scale is the logit of the place between the bounds, so nothing is clamped. Candidates are one of each stratum of the
    Gaussian. Advantages are divided by their deviation, steps follow the natural gradient, and the deviation decays between two
    bounds. A commit needs an improvement whose lower bound over the micro-dev examples, one standard error below the mean, is
    not negative. `learning_rate`, `kl_coef` and `entropy_bonus` are not used. Our choice.
    """

    _RATE_OF_MEAN, _RATE_OF_STD, _DECAY = 0.6, 0.2, 0.97  # a round
    _NARROWEST, _WIDEST = 0.15, 1.5  # deviations, in logits
    _FURTHEST = 4.0  # mean, in logits: within 2 % of a bound
    _EDGE = 1e-3
    _NOTHING = 1e-4  # nats per token: rewards that differ by less say nothing

    def _draw(self, generator: random.Random) -> list[float]:
        count = self.settings.candidates
        quantiles = [(number + generator.random()) / count for number in range(count)]
        normal = NormalDist(*self._in_logits())
        return [self._ratio(normal.inv_cdf(min(max(one, self._EDGE), 1 - self._EDGE))) for one in quantiles]

    def _learn(self, candidates: Sequence[float], rewards: Sequence[float]) -> None:
        mean, std = self._in_logits()
        average = math.fsum(rewards) / len(rewards)
        spread = math.sqrt(math.fsum((reward - average) ** 2 for reward in rewards) / len(rewards))
        scores = [(self._logit(candidate) - mean) / std for candidate in candidates]
        advantages = [(reward - average) / (spread + self._NOTHING) for reward in rewards]
        to_mean = math.fsum(a * z for a, z in zip(advantages, scores, strict=True)) / len(rewards)
        to_std = math.fsum(a * (z * z - 1) for a, z in zip(advantages, scores, strict=True)) / len(rewards)
        mean = min(max(mean + self._RATE_OF_MEAN * std * to_mean, -self._FURTHEST), self._FURTHEST)
        std *= math.exp(min(max(self._RATE_OF_STD * to_std, -1.0), 1.0))
        self.mean = self._ratio(mean)
        self.std = min(max(std * self._DECAY, self._NARROWEST), self._WIDEST) * self._slope()

    def _decide(self, candidates: Sequence[float], rewards: Sequence[float]) -> Decision:
        best = max(range(len(rewards)), key=rewards.__getitem__)
        baseline, *candidate_losses = self.history[-1].common_losses
        gains = [b - c for b, c in zip(baseline, candidate_losses[best], strict=True)]
        error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
        if rewards[best] < error:
            return Decision(tuple(rewards), False, self.current_ratio, False)
        return super()._decide(candidates, rewards)

    def _in_logits(self) -> tuple[float, float]:
        """Mean and deviation on the unbounded scale; outside they are those of the ratio, to first order."""
        return self._logit(self.mean), min(max(self.std / self._slope(), self._NARROWEST), self._WIDEST)

    def _slope(self) -> float:
        """How much a ratio at the mean moves with its logit."""
        low, high = self.settings.ratio_min, self.settings.ratio_max
        return max((self.mean - low) * (high - self.mean) / (high - low), self._EDGE)

    def _logit(self, ratio: float) -> float:
        low, high = self.settings.ratio_min, self.settings.ratio_max
        place = min(max((ratio - low) / (high - low), self._EDGE), 1 - self._EDGE)
        return math.log(place / (1 - place))

    def _ratio(self, logit: float) -> float:
        low, high = self.settings.ratio_min, self.settings.ratio_max
        return low + (high - low) / (1 + math.exp(-logit))


POLICIES: dict[str, type[RatioPolicy]] = {
    "gaussian": GaussianPolicy,
    "uniform": UniformPolicy,
    "adaptive": AdaptivePolicy,
    "shared": SharedPolicy,
    "surrogate": SurrogatePolicy,
}

PRESETS: dict[str, PolicySettings] = {
    "default": PolicySettings(),
    "paper": PolicySettings(estimate="best_reward"),
    "random": PolicySettings(kind="uniform"),
    "adaptive": PolicySettings(kind="adaptive", estimate="surrogate"),
    "shared": PolicySettings(kind="shared", candidates=2, estimate="surrogate"),
    "surrogate": PolicySettings(kind="surrogate", estimate="surrogate"),
    "late": PolicySettings(kind="shared", probe_from=0.5),
}


def make_policy(settings: PolicySettings) -> RatioPolicy:
    """Build the policy that the settings name."""
    return POLICIES[settings.kind](settings)
