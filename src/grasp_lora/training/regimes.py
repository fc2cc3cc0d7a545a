"""The two ways in which a network trains between the rounds of a controller run: under one mask, or under one for each step.

`Held`: the mask of the current ratio is on; each round ranks the weights anew, and a commit prunes by its order.
`EachStep`: the weights are ranked once, before training; each step trains under the mask of a ratio of its own, and all masks
nest. For rounds and evaluations the mask of the current ratio is put on.
"""

import torch

from grasp_lora.method.masks import MaskSet, Ranking, reset_moments
from grasp_lora.method.search import RatioPolicy, RatioSearch
from grasp_lora.training.probes import ProbeSet, calibrate


class Held:
    """One mask between rounds. Another regime overrides what it does otherwise.

    Attributes:
        order: the order of importance of the whole run, where there is one.
    """

    order: Ranking | None = None

    def begin(self, masks: MaskSet) -> None:
        """Take up a training that starts at its beginning."""

    def before_step(self, masks: MaskSet, search: RatioSearch, step: int) -> None:
        """Put on the mask under which optimizer step `step` (from 0) trains: it is on already."""

    def rest(self, masks: MaskSet, search: RatioSearch) -> None:
        """Put on the mask of the current ratio, for a round, an evaluation or a checkpoint, and at the end: it is on already."""

    def measure_baseline(self, model: torch.nn.Module, masks: MaskSet, probes: ProbeSet) -> tuple[list[float], Ranking]:
        """Measure the losses under the mask that is on, and rank the weights as they are now, for the masks of the round."""
        losses = calibrate(model, masks, probes) or probes.losses(model)
        return losses, masks.rank()

    def is_baseline(self, ratio: float, current_ratio: float) -> bool:
        """Whether a candidate's mask is the one of the baseline: never, since that may be of an older order."""
        return False

    def commit(self, masks: MaskSet, ratio: float, order: Ranking, optimizer: torch.optim.Optimizer | None) -> None:
        """Prune at a new current ratio, and let the optimizer forget what it knew of newly masked weights."""
        masks.commit(ratio, order)
        if optimizer is not None:
            reset_moments(optimizer, masks.weights, masks.newly_masked)


class EachStep(Held):
    """A mask for each step, all from one order."""

    def begin(self, masks: MaskSet) -> None:
        """Rank the weights once."""
        self.order = masks.rank()

    def before_step(self, masks: MaskSet, search: RatioSearch, step: int) -> None:
        """Prune at the ratio of the step."""
        masks.commit(search.training_ratio(step), self._order)

    def rest(self, masks: MaskSet, search: RatioSearch) -> None:
        """Prune at the current ratio in place of the last step's."""
        masks.commit(search.current_ratio, self._order)

    def measure_baseline(self, model: torch.nn.Module, masks: MaskSet, probes: ProbeSet) -> tuple[list[float], Ranking]:
        """Measure; the order is that of the run."""
        return probes.losses(model), self._order

    def is_baseline(self, ratio: float, current_ratio: float) -> bool:
        """Equal ratios have equal masks."""
        return ratio == current_ratio

    def commit(self, masks: MaskSet, ratio: float, order: Ranking, optimizer: torch.optim.Optimizer | None) -> None:
        """Prune; a weight that comes and goes keeps its moments."""
        masks.commit(ratio, order)

    @property
    def _order(self) -> Ranking:
        assert self.order is not None, "training has not begun"
        return self.order


REGIMES: dict[str, type[Held]] = {"held": Held, "each_step": EachStep}


def regime_of(policy: RatioPolicy) -> Held:
    """The regime of a policy, at its beginning."""
    return REGIMES[policy.regime]()
