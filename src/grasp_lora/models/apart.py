"""Adapters that stay apart in one LoRA layer: each factor's weight is the sum of one block for each of them.

The blocks lie in one parameter, the only one that trains. PyTorch adds them up whenever the layer's weight is read.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from grasp_lora.method.lora import LoraPair, Segment, added_up


class _Blocks(torch.nn.Module):
    """The parametrization: one factor's blocks, side by side along a dimension."""

    def __init__(self, segments: tuple[Segment, ...], dimension: int) -> None:
        super().__init__()
        self.segments, self.dimension = segments, dimension

    def forward(self, blocks: Tensor) -> Tensor:
        """The weight that acts."""
        return added_up(blocks, len(self.segments), self.dimension)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Blocks of this weight: the first adapter has all of it."""
        return torch.cat([weight, *[torch.zeros_like(weight)] * (len(self.segments) - 1)], self.dimension)


def keep_apart(layer: Any, adapter: str, segments: tuple[Segment, ...]) -> None:
    """Give both factors of a PEFT LoRA layer one block for each segment in place of their weight."""
    for factors, dimension in ((layer.lora_A, 0), (layer.lora_B, 1)):
        parametrize.register_parametrization(factors[adapter], "weight", _Blocks(segments, dimension))


def live_pair(layer: Any, adapter: str, segments: tuple[Segment, ...]) -> LoraPair:
    """Return the pair of a PEFT LoRA layer whose A and B are the parameters that train.

    Args:
        layer: of an ordinary adapter, or one that `keep_apart` has changed.
        adapter: its name in the layer.
        segments: of an ordinary adapter.
    """
    A, B, scaling = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
    if parametrize.is_parametrized(A, "weight"):
        of_A, of_B = A.parametrizations.weight, B.parametrizations.weight
        if isinstance(of_A[0], _Blocks):
            return LoraPair(of_A.original, of_B.original, scaling, of_A[0].segments, apart=True)
    return LoraPair(A.weight, B.weight, scaling, segments)
