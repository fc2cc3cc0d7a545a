"""What a controller keeps of its best round, for a single run to finish."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.masks import FACTORS, Ranking, WeightKey


@dataclass(frozen=True)
class BestRound:
    """The round with the lowest baseline loss.

    Args:
        loss: mean baseline loss.
        dense: every weight, masked ones with their stashed values.
        order: the order of importance that the round's masks were made from.
    """

    loss: float
    dense: Mapping[WeightKey, torch.Tensor]
    order: Ranking

    def pruned(self, pairs: Mapping[str, LoraPair], prune_ratio: float) -> AdapterWeights:
        """Return the adapter of the round, pruned at a ratio as its masks are; float32, on the CPU.

        Args:
            pairs: module name -> live pair, for scaling and segments.
            prune_ratio: fraction in [0, 1].
        """
        found, keep = {}, self.order.keep_masks(prune_ratio)
        for module, pair in pairs.items():
            factors = []
            for factor in FACTORS:
                dense = self.dense[module, factor].float().cpu()
                factors.append(dense.masked_fill(~keep[module, factor].cpu(), 0.0))
            found[module] = replace(pair, A=factors[0], B=factors[1])
        return AdapterWeights(found)
