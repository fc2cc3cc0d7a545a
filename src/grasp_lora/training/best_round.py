"""What a controller keeps of its best round, for a single run to finish."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch

from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.masks import FACTORS, RANK_DIMENSION, MaskSet, WeightKey
from grasp_lora.training.regimes import Order


@dataclass(frozen=True)
class BestRound:
    """The round with the lowest baseline loss.

    Args:
        loss: mean baseline loss.
        dense: every weight, masked ones with their stashed values; whole, also of sharded weights.
        order: the order of importance that the round's masks were made from.
    """

    loss: float
    dense: Mapping[WeightKey, torch.Tensor]
    order: Order

    @classmethod
    @torch.no_grad()
    def of(cls, masks: MaskSet, loss: float, order: Order) -> Self:
        """Copy the weights as they are now."""
        # Gathered where they are sharded, as an order of importance is.
        return cls(loss, {key: masks.dense(key) for key in masks.weights}, order)

    def pruned(self, pairs: Mapping[str, LoraPair], prune_ratio: float) -> AdapterWeights:
        """Return the adapter of the round, pruned at a ratio as its masks are; float32, on the CPU.

        Args:
            pairs: module name -> live pair, for scaling and segments.
            prune_ratio: fraction in [0, 1].
        """
        found = {}
        for module, pair in pairs.items():
            factors = []
            for factor in FACTORS:
                dense = self.dense[module, factor]
                keep = self.order[module, factor].keep(prune_ratio, RANK_DIMENSION[factor])
                factors.append(torch.where(keep, dense, torch.zeros_like(dense)).float().cpu())
            found[module] = replace(pair, A=factors[0], B=factors[1])
        return AdapterWeights(found)
