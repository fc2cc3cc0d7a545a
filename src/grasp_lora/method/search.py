"""The search for the prune ratio: ask a policy for candidates, tell it their losses, read the ratio off.

One round: `ask()` gives candidate ratios, the caller measures the loss of each on some examples, `tell()` turns the losses into
rewards, lets the policy learn and says whether the current ratio moves. `best_ratio()` is the learned ratio p*. A policy is
frozen settings; all that changes is in the search, and follows from the rounds: tell them again, and it is as it was.
Paper: controller and policy update sections.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from grasp_lora.errors import ProbeError, RecipeError
from grasp_lora.method.rounds import Decision, RatioEstimate, Round
from grasp_lora.method.rules import Rule
from grasp_lora.method.schedule import is_count
from grasp_lora.text.display import quoted

Regime = Literal["held", "each_step"]


@dataclass(frozen=True)
class RatioPolicy(ABC):
    """How candidates are drawn, what is learned from their rewards, and when the current ratio moves: the base of policies.

    A policy implements `draw` and `decide`, and `learn` if it learns; each reads the search and changes nothing. The draws of a
    round depend on the seed and the number of the round alone. `regime` says how the network trains between rounds: `held`
    under the mask of the current ratio, `each_step` under a nested mask of the ratio that `training_ratio` gives for the step.

    Args:
        ratio_min, ratio_max: bounds of the prune ratio, fractions in [0, 1], ratio_min < ratio_max.
        ratio_init: first current ratio, within the bounds.
        candidates: ratios per round (C), >= 1.
        seed: of the draws; a recipe combines it with its own seed.

    Raises:
        ValueError: a setting is outside its range.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    regime: ClassVar[Regime] = "held"

    ratio_min: float = 0.10
    ratio_max: float = 0.80
    ratio_init: float = 0.40
    candidates: int = 3
    seed: int = 42

    def __post_init__(self) -> None:
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
        if not is_count(self.candidates):
            raise ValueError(f"candidates is {self.candidates}; a whole number is needed, at least 1")

    @property
    def start(self) -> tuple[float, float]:
        """Mean and deviation before the first round; here those of a uniform distribution between the bounds."""
        return (self.ratio_min + self.ratio_max) / 2, (self.ratio_max - self.ratio_min) / math.sqrt(12)

    @abstractmethod
    def draw(self, search: "RatioSearch", generator: random.Random) -> Sequence[float]:
        """Draw C ratios; those outside the bounds are clamped."""

    def learn(self, search: "RatioSearch", measured: Round) -> tuple[float, float]:
        """Return the mean and the deviation after a round, which stands in the history already; before the commit."""
        return search.mean, search.std

    @abstractmethod
    def decide(self, search: "RatioSearch", measured: Round) -> Decision:
        """Say whether the current ratio moves after a round, and where; after `learn`."""

    def training_ratio(self, search: "RatioSearch", step: int) -> float:
        """Return the ratio at which optimizer step `step` (from 0) trains."""
        return search.current_ratio

    def clamp(self, ratio: float) -> float:
        """The nearest ratio within the bounds."""
        return min(max(ratio, self.ratio_min), self.ratio_max)


def step_to_best(search: "RatioSearch", measured: Round, max_step: float) -> Decision:
    """The paper's commit rule: move towards the best candidate by at most `max_step`, unless all rewards are negative."""
    rewards, best = measured.rewards, measured.best
    if rewards[best] < 0.0:
        return Decision(rewards, False, search.current_ratio)
    distance = measured.candidates[best] - search.current_ratio
    clipped = abs(distance) > max_step
    ratio = search.current_ratio + math.copysign(max_step, distance) if clipped else measured.candidates[best]
    return Decision(rewards, True, search.policy.clamp(ratio), clipped)


class RatioSearch:
    """A policy at work, with all that it was told.

    Args:
        policy: how candidates are drawn and what is learned.
        rule: how the ratio is read off the rounds.
    """

    def __init__(self, policy: RatioPolicy, rule: Rule) -> None:
        self.policy, self.rule = policy, rule
        self.mean, self.std = policy.start
        self.current_ratio = policy.ratio_init
        self.history: list[Round] = []

    def ask(self) -> list[float]:
        """Return the C candidate ratios of the next round, each within the bounds."""
        # A string seed is hashed with SHA-512 by the standard library, so close seeds give unrelated draws.
        generator = random.Random(f"{self.policy.seed}/{len(self.history)}")
        return [self.policy.clamp(ratio) for ratio in self.policy.draw(self, generator)]

    def tell(self, measured: Round) -> Decision:
        """Learn from a measured round and decide whether the current ratio moves.

        Raises:
            ProbeError: a loss is not a finite number.
            ValueError: the round does not fit: numbers of candidates or examples, ratios. Nothing changes.
            RecipeError: the policy decides no ratio within its bounds.
        """
        self._check(measured)
        self.history.append(measured)
        self.mean, self.std = self.policy.learn(self, measured)
        decision = self.policy.decide(self, measured)
        low, high = self.policy.ratio_min, self.policy.ratio_max
        if not isinstance(decision, Decision) or not low <= decision.ratio <= high:
            number = len(self.history)
            self.history.pop()
            raise RecipeError(
                f"policy {type(self.policy).__name__} decided {quoted(getattr(decision, 'ratio', decision))} after round "
                f"{number}; decide must return a Decision whose ratio lies in [{low}, {high}]; policy.clamp sees to it"
            )
        self.current_ratio = decision.ratio
        return decision

    def tell_rewards(self, candidates: Sequence[float], rewards: Sequence[float]) -> Decision:
        """Learn from given candidates and rewards: for tests and for replaying a record."""
        return self.tell(Round(self.current_ratio, tuple(candidates), (0.0,), tuple((-reward,) for reward in rewards)))

    def training_ratio(self, step: int) -> float:
        """Return the ratio at which optimizer step `step` (from 0) trains."""
        return self.policy.training_ratio(self, step)

    @property
    def rounds_since_best(self) -> int:
        """Rounds since the one in which a probe, baselines included, had the lowest mean loss so far."""
        lowest = [one.lowest_loss for one in self.history]
        return len(lowest) - 1 - lowest.index(min(lowest)) if lowest else 0

    def best_ratio(self, *, interval: bool = True) -> RatioEstimate:
        """Return the learned ratio p* of all rounds so far, with an interval unless that is not wanted, which is faster.

        Raises:
            ValueError: no round has been told yet.
            RecipeError: the rule gives no estimate within the bounds.
        """
        return self.rule(self.history, self.policy.ratio_min, self.policy.ratio_max, interval=interval)

    def _check(self, measured: Round) -> None:
        if len(measured.candidates) != len(measured.candidate_losses) or not measured.candidates:
            raise ValueError(
                f"{len(measured.candidates)} candidates but losses for {len(measured.candidate_losses)}; "
                "each candidate needs its list of losses"
            )
        low, high = self.policy.ratio_min, self.policy.ratio_max
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
        few = examples if places is None else len(places)
        if not few:
            raise ValueError("a round without losses; probe one example at least")
        for losses in measured.candidate_losses:
            if len(losses) != few:
                raise ValueError(
                    f"a candidate has {len(losses)} losses, but {few} examples are probed; give each one's loss"
                )
        for losses in (measured.baseline_losses, *measured.candidate_losses):
            for example, loss in enumerate(losses):
                if not math.isfinite(loss):
                    raise ProbeError(f"the loss of probed example {example} is {loss}; it must be finite")
        if self.history:
            earlier = self.history[0]
            for what, count, before in (
                ("probed examples", examples, len(earlier.baseline_losses)),
                ("losses of a candidate", len(measured.candidate_losses[0]), len(earlier.candidate_losses[0])),
            ):
                if count != before:
                    raise ValueError(f"{count} {what}, but {before} in earlier rounds; their number is fixed for a run")
