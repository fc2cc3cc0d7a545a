"""The order in which weights are pruned, as one flat tensor for all modules, and the masks that follow from it.

Weights are ranked once by (importance, position), so a mask at any ratio is one comparison, counts are exact under ties, and
raising the ratio only adds weights to the pruned set. Groups of one size are ranked in one sort. A group whose scores are all
zero, as of a factor B that did not train, would lose its first output features: it takes a random order, always the same one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grasp_lora.method.lora import LoraPair

WeightKey = tuple[str, str]  # (module, factor)


def prune_count(prune_ratio: float, weights: int) -> int:
    """Turn a prune ratio into a whole number of weights to zero.

    Raising the ratio can only add weights to the pruned set.

    Args:
        prune_ratio: share to remove, a fraction in [0, 1], not a percentage.
        weights: how many weights are in scope, >= 0.

    Raises:
        ValueError: the ratio is NaN or outside [0, 1].

    Paper: masking step. It leaves rounding open; rounding down is our choice.

    >>> prune_count(0.29, 100)   # int(0.29 * 100) would give 28
    29
    """
    if not 0.0 <= prune_ratio <= 1.0:
        raise ValueError(f"prune ratio is {prune_ratio}; it must be a fraction in [0, 1]")
    # The nearest whole number wins when only float rounding separates the product from it.
    product = prune_ratio * weights
    nearest = round(product)
    return nearest if math.isclose(product, nearest, rel_tol=1e-12) else math.floor(product)


def rank_weights(scores: Tensor) -> Tensor:
    """Return each entry's place in the order of importance of its row, 0 for the least, ties by position; int64, same shape."""
    order = scores.argsort(dim=-1, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, places)


def _by_chance(size: int) -> Tensor:
    """Places in a random order that depends on the size alone, int32, [size]."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(0)).int()


class Groups:
    """Who competes with whom: the weights of one adapter's A or B in one module, ranked each group for itself.

    A concatenation of a source and a target adapter has four groups in a module: the source's A, the target's A, and so for B.

    Args:
        pairs: whose segments say which rank-one components are of which adapter.
        shapes: shape of each factor, in the order in which its weights lie in a row.
        device: where scores will be.
    """

    def __init__(
        self, pairs: Mapping[str, LoraPair], shapes: Mapping[WeightKey, torch.Size], device: torch.device
    ) -> None:
        parts, number = [], 0
        for (module, factor), shape in shapes.items():
            ranks = [segment.rank for segment in pairs[module].segments] or [pairs[module].rank]
            along_rank = torch.arange(number, number + len(ranks)).repeat_interleave(torch.tensor(ranks))
            parts.append((along_rank[:, None] if factor == "A" else along_rank[None, :]).expand(shape))
            number += len(ranks)
        group_of = in_a_row(parts, torch.device("cpu"))
        size_of_weight, order = group_of.bincount()[group_of], group_of.argsort(stable=True)
        sizes, index = torch.unique(size_of_weight, return_inverse=True)
        self.sizes: list[int] = sizes.tolist()
        self._members = [order[size_of_weight[order] == size].view(-1, size).int().to(device) for size in self.sizes]
        self._random = [_by_chance(size).to(device) for size in self.sizes]
        self._size_of = index.int().to(device)

    def places(self, scores: Tensor) -> Tensor:
        """Return the place of each weight within its group, 0 for the least important; int32, [weights].

        Args:
            scores: of the weights, [weights].
        """
        places = torch.empty_like(scores, dtype=torch.int32)
        for members, by_chance in zip(map(Tensor.long, self._members), self._random, strict=True):
            compared = scores[members]
            nothing = (compared == 0).all(dim=1, keepdim=True)
            places[members] = torch.where(nothing, by_chance, rank_weights(compared).int())
        return places

    def keep(self, places: Tensor, prune_ratio: float) -> Tensor:
        """Return the mask that prunes floor(ratio * size) members of each group, [weights]; nothing is read from the device."""
        pruned = torch.empty(len(self.sizes), dtype=torch.int32, device=places.device)
        for number, size in enumerate(self.sizes):
            pruned[number].fill_(prune_count(prune_ratio, size))
        return places >= pruned.index_select(0, self._size_of)


@dataclass(frozen=True)
class Ranking:
    """The order of importance of all weights, from which masks at every ratio are made.

    Args:
        places: place of each weight within its group, 0 for the least important, all modules in a row, [weights].
        groups: who competes with whom.
        shapes: shape of each factor, in their order in `places`.
    """

    places: Tensor
    groups: Groups
    shapes: Mapping[WeightKey, torch.Size]

    def by_factor(self) -> dict[WeightKey, Tensor]:
        """Return the places of each factor, shaped as it."""
        return views(self.places, self.shapes)

    def keep(self, prune_ratio: float) -> Tensor:
        """Return the keep mask at a ratio, all modules in a row, [weights]."""
        return self.groups.keep(self.places, prune_ratio)

    def keep_masks(self, prune_ratio: float) -> dict[WeightKey, Tensor]:
        """Return the keep masks at a ratio, each shaped as its factor."""
        return views(self.keep(prune_ratio), self.shapes)


def views(flat: Tensor, shapes: Mapping[WeightKey, torch.Size]) -> dict[WeightKey, Tensor]:
    """Parts of a flat tensor, shaped as factors; what is written to one is written to the other."""
    parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
    return {key: part.view(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}


def in_a_row(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Copy tensors into one flat tensor on a device."""
    return torch.cat([tensor.flatten().to(device) for tensor in tensors])
