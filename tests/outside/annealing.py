"""A policy from outside the package, in one file: a window around the best ratio so far that narrows every round."""

import random
from dataclasses import dataclass

from grasp_lora import Decision, RatioPolicy, RatioSearch, Round


@dataclass(frozen=True)
class Annealing(RatioPolicy):
    """Candidates from a window around the current ratio; its width is the range times `shrink` to the power of the round."""

    shrink: float = 0.7

    def draw(self, search: RatioSearch, generator: random.Random) -> list[float]:
        width = (self.ratio_max - self.ratio_min) * self.shrink ** len(search.history)
        return [search.current_ratio + width * (generator.random() - 0.5) for _ in range(self.candidates)]

    def decide(self, search: RatioSearch, measured: Round) -> Decision:
        best = measured.candidates[measured.best]
        better = measured.rewards[measured.best] > 0
        return Decision(measured.rewards, better, best if better else search.current_ratio)


@dataclass(frozen=True)
class Sweeping(Annealing):
    """The same, while each step trains at a ratio of its own: the range from its lower bound to its upper one and back."""

    regime = "each_step"

    def training_ratio(self, search: RatioSearch, step: int) -> float:
        place = abs(step % 20 - 10) / 10
        return self.clamp(self.ratio_min + (self.ratio_max - self.ratio_min) * place)


@dataclass(frozen=True)
class Asking(Annealing):
    """The same, while it goes to the ratio that the recipe's rule reads off the rounds so far."""

    def decide(self, search: RatioSearch, measured: Round) -> Decision:
        return Decision(measured.rewards, True, search.best_ratio(interval=False).ratio)
