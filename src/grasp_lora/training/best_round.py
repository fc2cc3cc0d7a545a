"""The adapter of the round with the lowest loss: where a single run goes on from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.masks import FACTORS, RANK_DIMENSION, MaskSet, WeightKey
from grasp_lora.training.regimes import Order


@dataclass(frozen=True)
class BestRound:
    """What a controller keeps of the round with the lowest baseline loss.

    Args:
        loss: mean baseline loss.
        dense: every weight, masked ones with their stashed values; whole, also of sharded weights.
        order: the order of importance that the round's masks were made from.
    """

    loss: float
    dense: Mapping[WeightKey, torch.Tensor]
    order: Order

    def adapter(self, masks: MaskSet, prune_ratio: float) -> AdapterWeights:
        """The adapter pruned as the round's masks are; float32, on the CPU."""
        pairs = {}
        for module, pair in masks.pairs.items():
            pruned = []
            for factor in FACTORS:
                dense = self.dense[module, factor]
                keep = self.order[module, factor].keep(prune_ratio, RANK_DIMENSION[factor])
                pruned.append(torch.where(keep, dense, torch.zeros_like(dense)).float().cpu())
            pairs[module] = LoraPair(pruned[0], pruned[1], pair.scaling, pair.segments)
        return AdapterWeights(pairs)


@torch.no_grad()
def better_round(best: BestRound | None, baseline: Sequence[float], masks: MaskSet, order: Order) -> BestRound:
    """The better of the best round so far and the one whose baseline was just measured, the earlier one of equals."""
    loss = math.fsum(baseline) / len(baseline)
    if best is not None and loss >= best.loss:
        return best
    dense = {key: torch.where(masks.keep[key], weight, masks.stash[key]) for key, weight in masks.weights.items()}
    # Gathered where they are sharded, as an order of importance is.
    whole = {key: one.full_tensor() if hasattr(one, "full_tensor") else one for key, one in dense.items()}
    return BestRound(loss, whole, order)
