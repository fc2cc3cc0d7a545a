"""The search for the prune ratio: when rounds come, who chooses candidates, what is learned, and the presets.

One round: `ask()` gives candidate ratios, the caller measures the loss of each on some examples, `tell()` turns the losses into
rewards, lets the policy learn and says whether the current ratio moves. `best_ratio()` is the learned ratio p*, read off all
rounds by a rule (`method.rules`).

    search = RatioSearch(GrpoPolicy(), "surrogate")
    candidates = search.ask()                                  # such as [0.31, 0.66]
    decision = search.tell(Round(0.4, ...their losses...))     # decision.committed, decision.ratio
    search.best_ratio()                                        # RatioEstimate(ratio, low, high)

Two policies, both a Gaussian over the ratio that learns from group-relative advantages:

    GrpoPolicy    preset `grasp`, the default: advantages in units of the group's deviation, a deviation that shrinks
    PaperPolicy   preset `paper`, to the letter

A policy is frozen settings; all that changes is in the search, and follows from the rounds: tell them again, and it is as it was.
A new policy is a class here, or in a file of your own.
Paper: controller and policy update sections.
"""

import math
import random
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from grasp_lora.errors import ProbeError, RecipeError
from grasp_lora.method.rules import RatioEstimate, Round, Rule, best_reward
from grasp_lora.method.surrogate import surrogate, surrogate_at_end
from grasp_lora.text.checking import is_count, require
from grasp_lora.text.display import quoted
from grasp_lora.text.names import find

Regime = Literal["held", "each_step"]
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, fill [0, 1] evenly at any length
Pool = Literal["micro_dev", "dev", "both"]
# The splits whose rows each pool has.
PROBE_SPLITS: dict[Pool, tuple[str, ...]] = {
    "micro_dev": ("micro_dev",),
    "dev": ("dev",),
    "both": ("micro_dev", "dev"),
}
RULES: dict[str, Rule] = {rule.name: rule for rule in (surrogate, surrogate_at_end, best_reward)}
if TYPE_CHECKING:
    Spacing = int | Literal["epoch"]
else:
    Spacing = Any  # checked below, in one line
if TYPE_CHECKING:
    RuleOrName = str | Rule
else:
    RuleOrName = str  # what a recipe can hold, which is checked by this; a script may pass the object


# Rounds: when they come, what they measured, what followed


@dataclass(frozen=True)
class Rounds:
    """How the rounds of a controller run are spaced and measured.

    Args:
        every: optimizer steps between rounds (K), >= 1, or `epoch`.
        at_ends: whether a round comes before the first step and after the last one, too.
        pool: examples that are probed: `micro_dev`, `dev`, or `both`. Dev then chooses the ratio and stops the final run.
        in_turn: how many of them a round measures at each candidate at most, >= 1, in turn, so that each round has others; None
            takes all. The current ratio is measured on all where rounds are compared: by patience or the rule `surrogate`.
        patience: >= 1: rounds in a row without a lower loss at any probed ratio, after which training stops, as early stopping
            would by then at every ratio. None goes on to the last step.

    Raises:
        ValueError: a setting is outside its range, or two contradict each other.
    """

    every: Spacing = 10
    at_ends: bool = False
    pool: Pool = "micro_dev"
    in_turn: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        require(
            self,
            pool=(self.pool in PROBE_SPLITS, f"be one of {', '.join(PROBE_SPLITS)}"),
            every=(
                self.every == "epoch" or is_count(self.every),
                "be at least 1 optimizer step, a whole number, or 'epoch'",
            ),
            in_turn=(
                self.in_turn is None or is_count(self.in_turn),
                "be at least 1 example, a whole number, or null for all",
            ),
            patience=(
                self.patience is None or is_count(self.patience),
                "be at least 1 round, a whole number, or null to train to the end",
            ),
        )

    @property
    def splits(self) -> tuple[str, ...]:
        """The target's splits that the pool is made of."""
        return PROBE_SPLITS[self.pool]

    def turn(self, pool: int) -> int | None:
        """How many examples of a pool of so many a round measures at each candidate, in turn; None for all of them in each."""
        return self.in_turn if self.in_turn is not None and self.in_turn < pool else None

    def spacing(self, steps_per_epoch: int) -> int:
        """Optimizer steps between rounds, where an epoch has so many."""
        return steps_per_epoch if self.every == "epoch" else self.every

    def round_follows(self, step: int, steps: int, spacing: int) -> bool:
        """Return whether a round follows an optimizer step.

        Args:
            step: optimizer steps taken, 0 before the first one.
            steps: of the whole run.
            spacing: optimizer steps between rounds.
        """
        if step == 0:
            return self.at_ends
        return step % spacing == 0 or (self.at_ends and step == steps)

    def round_steps(self, steps: int, spacing: int) -> list[int]:
        """Return the optimizer steps that a round follows, in a run of so many; see `round_follows`."""
        return [step for step in range(steps + 1) if self.round_follows(step, steps, spacing)]


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

    def to_json(
        self, measured: Round, advantages: Sequence[float], mean: float, std: float, sparsity: float
    ) -> dict[str, Any]:
        """Return what a line of `rounds.jsonl` says of a round.

        Args:
            measured: the round that it follows from.
            advantages: of its candidates.
            mean, std: of the policy after it.
            sparsity: measured share of pruned weights, a fraction in [0, 1].
        """
        return {
            "candidates": list(measured.candidates),
            "baseline_losses": list(measured.baseline_losses),
            "candidate_losses": list(map(list, measured.candidate_losses)),
            "places": None if measured.places is None else list(measured.places),
            "rewards": list(self.rewards),
            "advantages": list(advantages),
            "policy_mean": mean,
            "policy_std": std,
            "committed": self.committed,
            "clipped": self.clipped,
            "ratio_before": measured.current_ratio,
            "ratio": self.ratio,
            "measured_sparsity": sparsity,
        }


# The search


class RatioSearch:
    """A policy at work, with all that it was told.

    Args:
        policy: how candidates are drawn and what is learned.
        rule: how the ratio is read off the rounds.
    """

    def __init__(self, policy: "RatioPolicy", rule: "RuleOrName") -> None:
        self.policy, self.rule = policy, ratio_rule(rule)
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
        before = self.mean, self.std
        self.history.append(measured)
        self.mean, self.std = self.policy.learn(self, measured)
        decision = self.policy.decide(self, measured)
        low, high = self.policy.ratio_min, self.policy.ratio_max
        if not isinstance(decision, Decision) or not low <= decision.ratio <= high:
            number = len(self.history)
            self.history.pop()
            self.mean, self.std = before
            raise RecipeError(
                f"policy {type(self.policy).__name__} decided {quoted(getattr(decision, 'ratio', decision))} after round "
                f"{number}; decide must return a Decision whose ratio lies in [{low}, {high}]; policy.clamp sees to it"
            )
        self.current_ratio = decision.ratio
        return decision

    def training_ratio(self, step: int) -> float:
        """Return the ratio at which optimizer step `step` (from 0) trains."""
        return self.policy.training_ratio(self, step)

    @property
    def rounds_since_best(self) -> int:
        """Rounds since the one in which a probe, baselines included, had the lowest mean loss so far."""
        lowest = [measured.lowest_loss for measured in self.history]
        return len(lowest) - 1 - lowest.index(min(lowest)) if lowest else 0

    def best_ratio(self, *, interval: bool = True) -> RatioEstimate:
        """Return the learned ratio p* of all rounds so far, with an interval unless that is not wanted, which is faster.

        Raises:
            ValueError: no round has been told yet.
            RecipeError: the rule gives no estimate within the bounds.
        """
        return self.rule(self.history, self.policy.ratio_min, self.policy.ratio_max, interval=interval)

    def _check(self, measured: Round) -> None:
        """Check a round at the door: a caller's loop of its own may mix up candidates, examples or ratios."""
        examples = len(measured.baseline_losses)
        places = range(examples) if measured.places is None else measured.places
        first = self.history[0] if self.history else measured
        if (
            not places
            or len(measured.candidates) != len(measured.candidate_losses)
            or {len(losses) for losses in measured.candidate_losses} != {len(places)}
            or (measured.places is None) != (first.places is None)
            or len(set(places)) < len(places)
            or (examples, len(places)) != (len(first.baseline_losses), len(first.candidate_losses[0]))
            or not (min(places) >= 0 and (examples == len(places) or max(places) < examples))
            # `not in between` also catches NaN, which would spread to the mean and stay there.
            or not all(self.policy.ratio_min <= ratio <= self.policy.ratio_max for ratio in measured.candidates)
            or measured.current_ratio != self.current_ratio
        ):
            raise ValueError(
                f"a round measured candidates {list(measured.candidates)} against ratio {measured.current_ratio}, with "
                f"{examples} baseline losses and {[len(losses) for losses in measured.candidate_losses]} of candidates (places: "
                f"{measured.places}); tell the ratios that ask() gave, the current one {self.current_ratio} as the baseline, and "
                "of each the losses of the same examples, as many as in earlier rounds"
            )
        for losses in (measured.baseline_losses, *measured.candidate_losses):
            for example, loss in enumerate(losses):
                if not math.isfinite(loss):
                    raise ProbeError(f"the loss of probed example {example} is {loss}; it must be finite")


# Policies


@dataclass(frozen=True)
class RatioPolicy(ABC):
    """How candidates are drawn, what is learned from their rewards, and when the current ratio moves: the base of policies.

    A policy implements `draw` and `decide`, and `learn` and `advantages` where they differ; each reads the search and changes
    nothing. The draws of a round depend on the seed and the number of the round alone. `regime` says how the network trains
    between rounds: `held` under the mask of the current ratio, `each_step` under a nested mask of the ratio that `training_ratio`
    gives for the step.

    Args:
        ratio_min, ratio_max: bounds of the prune ratio, fractions in [0, 1], ratio_min < ratio_max.
        ratio_init: first current ratio, within the bounds.
        candidates: ratios per round (C), >= 1.
        seed: of the draws; a recipe combines it with its own seed.

    Raises:
        ValueError: a setting is outside its range.
    """

    regime: ClassVar[Regime] = "held"

    ratio_min: float = 0.10
    ratio_max: float = 0.80
    ratio_init: float = 0.40
    candidates: int = 3
    seed: int = 42

    def __post_init__(self) -> None:
        low, high = self.ratio_min, self.ratio_max
        require(
            self,
            ratio_min=(0.0 <= low < high, f"lie in [0, 1] and below ratio_max {high}"),
            ratio_max=(high <= 1.0, "lie in [0, 1]"),
            ratio_init=(low <= self.ratio_init <= high, f"lie between ratio_min {low} and ratio_max {high}"),
            candidates=(is_count(self.candidates), "be a whole number, at least 1"),
        )

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

    def advantages(self, measured: Round) -> tuple[float, ...]:
        """Return the reward of each candidate minus the mean of all (the paper's)."""
        average = fmean(measured.rewards)
        return tuple(reward - average for reward in measured.rewards)

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


@dataclass(frozen=True)
class PaperPolicy(RatioPolicy):
    """The paper's policy: a Gaussian over the ratio, updated with group-relative advantages.

    Score function of the Gaussian, a pull of the mean towards the current ratio and a constant entropy bonus. The current ratio
    is held until the next round. Paper: policy update; the released code floors the variance at 1e-4 and the deviation at 1e-3,
    and so do we.

    Args:
        ratio_min, ratio_max: bounds of the prune ratio, fractions in [0, 1], ratio_min < ratio_max.
        ratio_init: first mean and first current ratio, within the bounds.
        candidates: ratios per round (C), >= 1.
        seed: of the draws; a recipe combines it with its own seed.
        std_init: first standard deviation; None takes (ratio_max - ratio_min) / 6 as the paper does.
        learning_rate, kl_coef, entropy_bonus: step size, pull towards the current ratio and growth of the deviation per
            round, all >= 0.
        max_step: furthest that one commit moves the current ratio, in (0, 1].
    """

    std_init: float | None = None
    learning_rate: float = 0.05
    kl_coef: float = 0.05
    entropy_bonus: float = 0.01
    max_step: float = 0.10

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = {
            name: 0.0 <= getattr(self, name) < math.inf for name in ("learning_rate", "kl_coef", "entropy_bonus")
        }
        require(
            self,
            std_init=(self.std_init is None or 0.0 < self.std_init < math.inf, "be a positive number, or left out"),
            max_step=(0.0 < self.max_step <= 1.0, "lie in (0, 1]"),
            **{name: (fits, "be a number >= 0") for name, fits in positive.items()},
        )

    @property
    def start(self) -> tuple[float, float]:
        """The first current ratio and deviation."""
        return self.ratio_init, (self.ratio_max - self.ratio_min) / 6 if self.std_init is None else self.std_init

    def draw(self, search: RatioSearch, generator: random.Random) -> list[float]:
        """Draw from the Gaussian."""
        return [generator.gauss(search.mean, search.std) for _ in range(self.candidates)]

    def learn(self, search: RatioSearch, measured: Round) -> tuple[float, float]:
        """Follow the gradients of the expected advantage."""
        advantages = self.advantages(measured)
        variance = max(search.std**2, 1e-4)
        deviations = [candidate - search.mean for candidate in measured.candidates]
        mean_terms = [a * d / variance for a, d in zip(advantages, deviations, strict=True)]
        std_terms = [a * (d * d / variance - 1.0) for a, d in zip(advantages, deviations, strict=True)]
        mean_gradient = fmean(mean_terms)
        std_gradient = fmean(std_terms)
        pull = self.kl_coef * (search.mean - search.current_ratio)
        mean = self.clamp(search.mean + self.learning_rate * (mean_gradient - pull))
        return mean, max(1e-3, search.std + self.learning_rate * std_gradient + self.entropy_bonus)

    def decide(self, search: RatioSearch, measured: Round) -> Decision:
        """Step towards the best candidate."""
        return step_to_best(search, measured, self.max_step)


@dataclass(frozen=True)
class GrpoPolicy(RatioPolicy):
    """Preset `grasp`: a Gaussian over the ratio with group-relative advantages, over a network that trains at all ratios.

    A round's group is the current ratio and the candidates. Its advantages are the rewards minus the group's mean, over its
    deviation, as GRPO has them (Shao et al. 2024, arXiv 2402.03300). The mean follows them, and the deviation shrinks, so that
    candidates draw together where losses are low. The first round goes from bound to bound; later ones draw pairs around the
    mean.

    Each step trains at a ratio of its own, evenly over the range (after slimmable networks, Yu et al. 2019). A ratio that is held
    biases its own probes: the network heals around its mask, and every other ratio looks worse the longer that goes on.
    The current ratio is the best one by the rule so far. Where all losses of a round are equal, nothing moves.
    Our choice; what the paper has: `PaperPolicy`. How it was tuned: `lab/results/controllers.md`.

    Args:
        ratio_min, ratio_max: bounds of the prune ratio, fractions in [0, 1], ratio_min < ratio_max.
        ratio_init: first current ratio, within the bounds.
        candidates: ratios per round (C), >= 1.
        seed: of the draws; a recipe combines it with its own seed.
        learning_rate: share of the step to the advantage-weighted mean of the group that the mean takes, >= 0.
        shrink: factor on the deviation after each round, in (0, 1].
        std_min: where the deviation stops to shrink, > 0.
    """

    regime: ClassVar[Regime] = "each_step"

    candidates: int = 4
    learning_rate: float = 0.25
    shrink: float = 0.95
    std_min: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            learning_rate=(0.0 <= self.learning_rate < math.inf, "be a number >= 0"),
            shrink=(0.0 < self.shrink <= 1.0, "lie in (0, 1]"),
            std_min=(0.0 < self.std_min < math.inf, "be a positive number"),
        )

    def draw(self, search: RatioSearch, generator: random.Random) -> list[float]:
        """Draw pairs around the mean; in the first round ratios from bound to bound."""
        count = self.candidates
        if not search.history and count > 1:
            share = (self.ratio_max - self.ratio_min) / (count - 1)
            return [self.ratio_min + place * share for place in range(count)]
        steps = [generator.gauss(0.0, search.std) for _ in range(math.ceil(count / 2))]
        return [search.mean + sign * step for step in steps for sign in (1, -1)][:count]

    def advantages(self, measured: Round) -> tuple[float, ...]:
        """Return the reward of each candidate minus the group's mean, over the group's deviation; 0 where all are equal."""
        return self._advantages(measured)[1:]

    def learn(self, search: RatioSearch, measured: Round) -> tuple[float, float]:
        """Move the mean by the advantage-weighted mean of the group's distances from it, and shrink the deviation."""
        advantages = self._advantages(measured)
        if not any(advantages):
            return search.mean, search.std
        group = (measured.current_ratio, *measured.candidates)
        step = fmean(a * (ratio - search.mean) for a, ratio in zip(advantages, group, strict=True))
        return self.clamp(search.mean + self.learning_rate * step), max(self.std_min, self.shrink * search.std)

    def decide(self, search: RatioSearch, measured: Round) -> Decision:
        """Move to the best ratio by the rule, unless all rewards are equal."""
        moves = any(self._advantages(measured))
        ratio = search.best_ratio(interval=False).ratio if moves else search.current_ratio
        return Decision(measured.rewards, ratio != search.current_ratio, ratio)

    def training_ratio(self, search: RatioSearch, step: int) -> float:
        """Return the ratio of a step: any few steps in a row cover the range evenly."""
        offset = random.Random(f"{self.seed}/training").random()
        return self.ratio_min + (self.ratio_max - self.ratio_min) * ((offset + step * GOLDEN) % 1.0)

    def _advantages(self, measured: Round) -> tuple[float, ...]:
        """Those of the whole group, the current ratio first, whose reward is 0."""
        rewards = (0.0, *measured.rewards)
        average, deviation = fmean(rewards), statistics.pstdev(rewards)
        return tuple((reward - average) / deviation if deviation > 0 else 0.0 for reward in rewards)


POLICIES: dict[str, type[RatioPolicy]] = {
    "grpo": GrpoPolicy,
    "paper": PaperPolicy,
}


def policy_class(kind: str) -> type[RatioPolicy]:
    """The policy of a name: a key of `POLICIES`, or the import path of a class.

    Raises:
        ValueError: there is none.
    """
    policy = find("policy kind", kind, type, POLICIES)
    if not issubclass(policy, RatioPolicy):
        raise ValueError(f"policy kind {quoted(kind)} is no RatioPolicy; derive it from grasp_lora.RatioPolicy")
    return policy


def plain_policy(policy: RatioPolicy) -> dict[str, Any]:
    """A policy as plain values: its kind, a name or an import path, and its settings."""
    names = {kind: name for name, kind in POLICIES.items()}
    kind = type(policy)
    return {"kind": names.get(kind, f"{kind.__module__}:{kind.__qualname__}"), **asdict(policy)}


# Presets: a policy with the rounds and the rule that go with it


def ratio_rule(rule: RuleOrName) -> Rule:
    """The rule of a name: a key of `RULES`, or an import path.

    Raises:
        ValueError: there is none, or the object is no `Rule`.
    """
    return find("rule", rule, Rule, RULES)


@dataclass(frozen=True)
class Controller:
    """How the ratio is learned: the settings of `GraspController`; left as it is, preset `grasp`.

    Args:
        policy: who chooses candidates and when the current ratio moves.
        rounds: when rounds come and what they measure.
        rule: how the ratio is read off them: `surrogate`, `surrogate_at_end` or `best_reward` (the paper's); or a `Rule` of
            one's own, in a recipe by its import path `package.module:name`.

    Raises:
        ValueError: there is no such rule, or the policy is none.
    """

    policy: RatioPolicy = field(default_factory=GrpoPolicy)
    rounds: Rounds = field(
        default_factory=lambda: Rounds(every="epoch", at_ends=True, pool="dev", in_turn=7, patience=1)
    )
    rule: RuleOrName = "surrogate"

    def __post_init__(self) -> None:
        require(self, policy=(isinstance(self.policy, RatioPolicy), "be a policy, such as GrpoPolicy()"))
        ratio_rule(self.rule)

    @property
    def compares_rounds(self) -> bool:
        """Whether losses of one round are compared with those of another, so that its baseline needs all examples."""
        return self.rounds.patience is not None or ratio_rule(self.rule).compares_rounds

    def probed_examples(self, pool: int) -> int:
        """Examples measured in a round on a pool of so many, with each ratio counted anew, at most."""
        few = self.rounds.turn(pool) or pool
        return (pool if self.compares_rounds else few) + self.policy.candidates * few


PRESETS: dict[str, Controller] = {
    "grasp": Controller(),
    "paper": Controller(PaperPolicy(), Rounds(), "best_reward"),
}
# Preset `grasp` where the target has no dev set: nothing stops the final run, so the ratio is that of its last step.
ON_MICRO_DEV = Controller(rounds=Rounds(every=25, at_ends=True, in_turn=8), rule="surrogate_at_end")


def preset(name: str | Controller, dev: bool = True) -> Controller:
    """Return a preset: `grasp` (the default) or `paper`. Settings are returned as they are.

    Args:
        name: of the preset.
        dev: whether there are dev rows; else `grasp` probes micro-dev rows, and reads the ratio at the last step.

    Raises:
        ValueError: there is none of that name, or it is something else.
    """
    return find("preset", name, Controller, PRESETS if dev else {**PRESETS, "grasp": ON_MICRO_DEV})
