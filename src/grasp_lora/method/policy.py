"""The policies: who chooses the next candidate prune ratios. A new one is a class here, or in a file of your own."""

import math
import random
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, ClassVar

from grasp_lora.method.rounds import Decision, Round
from grasp_lora.method.search import RatioPolicy, RatioSearch, Regime, step_to_best
from grasp_lora.text.display import quoted
from grasp_lora.text.names import find

GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, fill [0, 1] evenly at any length


@dataclass(frozen=True)
class Gaussian(RatioPolicy):
    """A Gaussian over the ratio, updated with group-relative advantages: the paper's policy.

    Score function of the Gaussian, a pull of the mean towards the current ratio and a constant entropy bonus.
    Paper: policy update; the released code floors the variance at 1e-4 and the deviation at 1e-3, and so do we.

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
        if self.std_init is not None and not 0.0 < self.std_init < math.inf:
            raise ValueError(f"std_init is {self.std_init}; it must be a positive number, or left out")
        for name in ("learning_rate", "kl_coef", "entropy_bonus"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number >= 0")
        _check_step(self.max_step)

    @property
    def start(self) -> tuple[float, float]:
        """The first current ratio and deviation."""
        return self.ratio_init, (self.ratio_max - self.ratio_min) / 6 if self.std_init is None else self.std_init

    def draw(self, search: RatioSearch, generator: random.Random) -> list[float]:
        """Draw from the Gaussian."""
        return [generator.gauss(search.mean, search.std) for _ in range(self.candidates)]

    def learn(self, search: RatioSearch, measured: Round) -> tuple[float, float]:
        """Follow the gradients of the expected advantage."""
        rewards = measured.rewards
        average = fmean(rewards)
        advantages = [reward - average for reward in rewards]
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
class Spread(RatioPolicy):
    """All ratios train together: each optimizer step draws the ratio it trains at, and candidates spread over the range.

    A ratio that is held biases its own probes. The network heals around its mask, and every other ratio looks worse the longer
    that goes on. Here none is held, so that the probes of a round compare like with like at any moment of training. The
    current ratio is the best one by the rule so far. Our choice, after slimmable networks (Yu et al. 2019) and
    one-shot architecture search (Bender et al. 2018); nothing of the paper's update is used.

    Args:
        ratio_min, ratio_max: bounds of the prune ratio, fractions in [0, 1], ratio_min < ratio_max.
        ratio_init: first current ratio, within the bounds.
        candidates: ratios per round (C), >= 1; preset `spread` has 2.
        seed: of where the even sequences begin; a recipe combines it with its own seed.
        bounds_first: whether the first round goes from bound to bound, as in preset `late`. Where rounds are few, a rule that
            takes no ratio beyond those that were probed could otherwise not reach the bounds.
    """

    regime: ClassVar[Regime] = "each_step"

    bounds_first: bool = False

    def draw(self, search: RatioSearch, generator: random.Random) -> list[float]:
        """Spread candidates evenly, each round beginning at another place."""
        count, low, high, number = self.candidates, self.ratio_min, self.ratio_max, len(search.history)
        if self.bounds_first and number == 0 and count > 1:
            shares = [place / (count - 1) for place in range(count)]
            return [(1 - share) * low + share * high for share in shares]
        width = (high - low) / count
        lowest = low + (self._ratio("candidates", number) - low) / count
        return [lowest + place * width for place in range(count)]

    def decide(self, search: RatioSearch, measured: Round) -> Decision:
        """Move to the best ratio by the rule."""
        ratio = search.best_ratio(interval=False).ratio
        return Decision(measured.rewards, ratio != search.current_ratio, ratio)

    def training_ratio(self, search: RatioSearch, step: int) -> float:
        """Return the ratio of a step: any few steps in a row cover the range evenly."""
        return self._ratio("training", step)

    def _ratio(self, purpose: str, number: int) -> float:
        """The ratio with a number in the even sequence of a purpose, which begins where the seed says."""
        offset = random.Random(f"{self.seed}/{purpose}").random()
        return even_ratio(number, self.ratio_min, self.ratio_max, offset)


def even_ratio(number: int, low: float, high: float, offset: float = 0.5) -> float:
    """Return a ratio of a sequence whose every stretch covers the whole range evenly: multiples of the golden ratio.

    Args:
        number: place in the sequence, >= 0.
        low, high: bounds of the ratio, fractions in [0, 1].
        offset: where the sequence begins, in [0, 1).

    >>> [round(even_ratio(step, 0.0, 0.8), 3) for step in range(4)]
    [0.4, 0.094, 0.589, 0.283]
    """
    return low + (high - low) * ((offset + number * GOLDEN) % 1.0)


POLICIES: dict[str, type[RatioPolicy]] = {
    "gaussian": Gaussian,
    "spread": Spread,
}


def policy_class(kind: str) -> type[RatioPolicy]:
    """The policy of a name: a key of `POLICIES`, or the import path of a class.

    Raises:
        ValueError: there is none.
    """
    found = find("policy kind", kind, type, POLICIES)
    if not issubclass(found, RatioPolicy):
        raise ValueError(f"policy kind {quoted(kind)} is no RatioPolicy; derive it from grasp_lora.RatioPolicy")
    return found


def plain_policy(policy: RatioPolicy) -> dict[str, Any]:
    """A policy as plain values: its kind, a name or an import path, and its settings."""
    names = {one: name for name, one in POLICIES.items()}
    own = type(policy)
    return {"kind": names.get(own, f"{own.__module__}:{own.__qualname__}"), **asdict(policy)}


def _check_step(max_step: float) -> None:
    if not 0.0 < max_step <= 1.0:
        raise ValueError(f"max_step is {max_step}; it must lie in (0, 1]")
