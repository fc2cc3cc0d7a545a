"""LoRA factors as plain tensors: what merging and masking work on, free of any training library.

A LoRA module adds scaling * B @ A to a frozen weight, A [rank, d_in], B [d_out, rank]. Layers that store their weight
transposed (fan_in_fan_out, GPT-2's Conv1D) have the same two factors; only whoever adds the delta to the weight transposes.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from grasp_lora.errors import AdapterError


@dataclass(frozen=True)
class Segment:
    """Rank-one components that came from one adapter: its name and how many there are."""

    name: str
    rank: int


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one LoRA module.

    Args:
        A: [rank, d_in].
        B: [d_out, rank].
        scaling: factor on B @ A (alpha / rank, or alpha / sqrt(rank) with rsLoRA).
        segments: where the rank-one components came from, in order; their ranks add up to the rank.
        apart: whether the segments are whole adapters of one rank that act as (sum of B_i)(sum of A_i), while each is trained
            and masked on its own: the released code's merge.

    Raises:
        AdapterError: the factors do not fit each other, or adapters kept apart differ in rank.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0
    segments: tuple[Segment, ...] = field(default=())
    apart: bool = False

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise AdapterError(
                f"LoRA factors of shapes A {tuple(self.A.shape)} and B {tuple(self.B.shape)} do not fit; "
                "A must be [rank, d_in] and B [d_out, rank]"
            )
        ranks = [segment.rank for segment in self.segments]
        if (ranks and sum(ranks) != self.rank) or (self.apart and len(set(ranks)) != 1):
            raise AdapterError(
                f"the segments {self.segments} must add up to rank {self.rank}, with equal ranks where they are kept apart"
            )

    @property
    def rank(self) -> int:
        """Number of rank-one components."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the delta."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def acts(self) -> bool:
        """Whether the pair changes anything: neither factor is all zero."""
        return bool(self.A.any() and self.B.any())

    def delta(self) -> Tensor:
        """Return scaling * B @ A, [d_out, d_in]."""
        pair = self.together()
        return pair.scaling * (pair.B @ pair.A)

    def parts(self) -> list["LoraPair"]:
        """Return the pairs of the adapters that are kept apart, else the pair itself."""
        if not self.apart:
            return [self]
        ranks = [segment.rank for segment in self.segments]
        factors = zip(torch.split(self.A, ranks), torch.split(self.B, ranks, dim=1), strict=True)
        return [LoraPair(A, B, self.scaling) for A, B in factors]

    def together(self) -> "LoraPair":
        """Return the ordinary pair that acts as this one: adapters kept apart are added up."""
        if not self.apart:
            return self
        count = len(self.segments)
        return LoraPair(added_up(self.A, count, 0), added_up(self.B, count, 1), self.scaling)

    def balanced(self, weight: float = 1.0) -> "LoraPair":
        """Return weight * scaling * B @ A with scaling 1 and both factors of each rank-one component of equal norm.

        (c a, b / c) is the same component for every c, so magnitudes of LoRA weights are comparable only once c is fixed.
        A component with a zero factor (a fresh adapter's B), or of weight 0 (B becomes zero), keeps its other factor, since
        two zero factors never train.

        What training sees: a component of norms |a|, |b| becomes one of norms n = sqrt(|weight| * scaling * |a| * |b|). To
        first order Adam's first step, in which every entry moves by lr, moves each column of the delta by lr * n (through A)
        and each row by lr * n (through B), where the original moved columns by lr * scaling * |b| and rows by
        lr * scaling * |a|. A trained adapter has |b| much below |a|, so the merged one moves several times less at the
        same learning rate. Our choice; the paper does not balance.
        """
        total = weight * self.scaling
        # float64, so that the product equals the original to float32 precision.
        A, B = self.A.double(), self.B.double()
        norm_A, norm_B = A.norm(dim=1), B.norm(dim=0)
        size = (abs(total) * norm_A * norm_B).sqrt()
        alive = size > 0
        even = abs(total) ** 0.5 or 1.0
        scale_A = torch.where(alive, size / norm_A.where(alive, torch.ones_like(norm_A)), even)
        scale_B = torch.where(alive, size / norm_B.where(alive, torch.ones_like(norm_B)), even)
        if total == 0:
            scale_B = torch.where(norm_A > 0, 0.0, scale_B)
        if total < 0:
            scale_B = -scale_B
        A, B = A * scale_A[:, None], B * scale_B[None, :]
        return LoraPair(A.to(self.A.dtype), B.to(self.B.dtype), 1.0, self.segments)


def added_up(factor: Tensor, adapters: int, dimension: int) -> Tensor:
    """Add up a factor's blocks, one of each adapter, which lie side by side along a dimension."""
    return torch.stack(factor.chunk(adapters, dimension)).sum(0)


class AdapterWeights(dict[str, LoraPair]):
    """A whole adapter: module name in the backbone -> its LoRA pair.

    >>> pair = LoraPair(torch.ones(2, 4), torch.ones(3, 2), scaling=0.5)
    >>> AdapterWeights({"layers.0.q_proj": pair})["layers.0.q_proj"].delta()[0, 0].item()
    1.0
    """

    def together(self) -> "AdapterWeights":
        """Return the ordinary adapter that acts as this one; see `LoraPair.together`."""
        return AdapterWeights({name: pair.together() for name, pair in self.items()})
