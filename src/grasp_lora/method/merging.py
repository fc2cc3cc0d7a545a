"""Merge rules: several adapters in, one adapter out, with every scaling folded into the factors.

All rules stand in `MERGE_RULES`; a new one is a function and a row. `merge()` works module by module: a module that only some
adapters have is merged from those.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeSettings:
    """How adapters are merged.

    Args:
        rule: a key of `MERGE_RULES`: `exact` (the weighted sum itself; ranks add up), `svd` (its best approximation of one rank);
            on the factors `paper_sum`, `paper_sum_unscaled`, `lorahub`, `ties`, `dare`, `dare_ties`; on whole updates
            `ties_svd`, `dare_svd`.
        weights: one per adapter, in their order; None takes the rule's own default (1/N each, TIES 1 each).
        rank: rank of the result for rules that end in an SVD; None takes the highest rank of the inputs.
        density: share of weights that TIES and DARE keep, in (0, 1].
        seed: seed of DARE's random drops; a recipe combines it with its own seed.

    Raises:
        ValueError: a setting is outside its range, or does not belong to the rule.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rule: str = "exact"
    weights: tuple[float, ...] | None = None
    rank: int | None = None
    density: float = 0.5
    seed: int = 42

    def __post_init__(self) -> None:
        if self.rule not in MERGE_RULES:
            raise ValueError(f"merge rule is {self.rule!r}; allowed: {', '.join(MERGE_RULES)}")
        if self.weights is not None and not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"merge weights are {list(self.weights)}; each must be a finite number")
        if self.rank is not None:
            if self.rank < 1:
                raise ValueError(f"merge rank is {self.rank}; it must be at least 1")
            if not MERGE_RULES[self.rule].takes_rank:
                takers = ", ".join(name for name, rule in MERGE_RULES.items() if rule.takes_rank)
                raise ValueError(
                    f"merge rule {self.rule!r} does not take a rank; leave it out, or choose one of {takers}"
                )
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"merge density is {self.density}; it must lie in (0, 1]")


@dataclass(frozen=True)
class _Part:
    """One adapter's share in one module: its factors, its weight and its place among the adapters."""

    pair: LoraPair
    weight: float
    name: str


_Merge = Callable[[list[_Part], MergeSettings, torch.Generator], LoraPair]


@dataclass(frozen=True)
class MergeRule:
    """A row of the table.

    Args:
        merge: the function on one module.
        scaling: in words, the delta that comes out.
        default_weight: weight of each of N adapters when the user gives none.
        equal_ranks: whether all adapters need the same rank in a module.
        takes_rank: whether `MergeSettings.rank` applies.
    """

    merge: _Merge
    scaling: str
    default_weight: Callable[[int], float] = lambda adapters: 1.0 / adapters
    equal_ranks: bool = False
    takes_rank: bool = False


def merge(
    adapters: Sequence[AdapterWeights], settings: MergeSettings, names: Sequence[str] | None = None
) -> AdapterWeights:
    """Merge adapters into one whose pairs have scaling 1 and balanced factors.

    Args:
        adapters: at least one.
        settings: rule, weights and the rest.
        names: a name per adapter for the segments, `source` and `target` for two, else `adapter_0` and so on.

    Raises:
        AdapterError: no adapters, a number of weights or names that differs, or shapes and ranks that do not fit.
    """
    if not adapters:
        raise AdapterError("there is no adapter to merge; give at least one")
    rule = MERGE_RULES[settings.rule]
    default = [rule.default_weight(len(adapters))] * len(adapters)
    weights = list(settings.weights) if settings.weights is not None else default
    if len(weights) != len(adapters):
        raise AdapterError(f"{len(weights)} merge weights for {len(adapters)} adapters; give one per adapter, or none")
    if names is None:
        names = ("source", "target") if len(adapters) == 2 else [f"adapter_{i}" for i in range(len(adapters))]
    if len(names) != len(adapters):
        raise AdapterError(f"{len(names)} names for {len(adapters)} adapters; give one per adapter, or none")
    generator = torch.Generator().manual_seed(settings.seed)
    merged: dict[str, LoraPair] = {}
    # Sorted, so that the random drops of DARE do not depend on the order of a file.
    for module in sorted(set().union(*adapters)):
        parts = [
            _Part(adapter[module], weight, name)
            for adapter, weight, name in zip(adapters, weights, names, strict=True)
            if module in adapter
        ]
        _check_shapes(module, parts, equal_ranks=rule.equal_ranks, rule=settings.rule)
        merged[module] = rule.merge(parts, settings, generator)
    return AdapterWeights(merged)


def _check_shapes(module: str, parts: list[_Part], *, equal_ranks: bool, rule: str) -> None:
    shapes = {part.pair.shape for part in parts}
    if len(shapes) > 1:
        raise AdapterError(
            f"adapters differ in the shape (d_out, d_in) of {module}: {sorted(shapes)}; "
            "merge only adapters of the same backbone"
        )
    ranks = {part.pair.rank for part in parts}
    if equal_ranks and len(ranks) > 1:
        raise AdapterError(
            f"merge rule {rule!r} needs equal ranks, but {module} has {sorted(ranks)}; use 'exact' or 'svd'"
        )


def _exact(parts: list[_Part], settings: MergeSettings, generator: torch.Generator) -> LoraPair:
    balanced = [part.pair.balanced(part.weight) for part in parts]
    return LoraPair(
        torch.cat([pair.A for pair in balanced], dim=0),
        torch.cat([pair.B for pair in balanced], dim=1),
        segments=tuple(Segment(part.name, part.pair.rank) for part in parts),
    )


def _svd(parts: list[_Part], settings: MergeSettings, generator: torch.Generator) -> LoraPair:
    exact = _exact(parts, settings, generator)
    # The SVD of B A through two thin QR factorisations: never forms the [d_out, d_in] delta.
    q_B, r_B = torch.linalg.qr(exact.B.double())
    q_A, r_A = torch.linalg.qr(exact.A.double().T)
    left, sizes, right = torch.linalg.svd(r_B @ r_A.T)
    return _from_svd(q_B @ left, sizes, right @ q_A.T, _result_rank(parts, settings), exact.A.dtype)


def _paper_sum(parts: list[_Part], settings: MergeSettings, generator: torch.Generator) -> LoraPair:
    return _on_factors(parts, lambda tensors, weights: _weighted_sum(tensors, weights))


def _paper_sum_unscaled(parts: list[_Part], settings: MergeSettings, generator: torch.Generator) -> LoraPair:
    unscaled = [_Part(LoraPair(p.pair.A, p.pair.B), p.weight, p.name) for p in parts]
    return _paper_sum(unscaled, settings, generator)


def _lorahub(parts: list[_Part], settings: MergeSettings, generator: torch.Generator) -> LoraPair:
    roots = [part.pair.scaling**0.5 for part in parts]
    weights = [part.weight * root for part, root in zip(parts, roots, strict=True)]
    A = _weighted_sum([part.pair.A for part in parts], weights)
    B = _weighted_sum([part.pair.B for part in parts], weights)
    return _single_segment(LoraPair(A, B)).balanced()


def _ties(parts: list[_Part], settings: MergeSettings, generator: torch.Generator) -> LoraPair:
    return _on_factors(
        parts,
        lambda tensors, weights: elect_and_average(
            [keep_largest(tensor, settings.density) for tensor in tensors], weights
        ),
    )


def _ties_svd(parts: list[_Part], settings: MergeSettings, generator: torch.Generator) -> LoraPair:
    deltas = [keep_largest(part.pair.delta(), settings.density) for part in parts]
    return _delta_to_pair(elect_and_average(deltas, [part.weight for part in parts]), parts, settings)


def _dare(parts: list[_Part], settings: MergeSettings, generator: torch.Generator) -> LoraPair:
    return _on_factors(
        parts,
        lambda tensors, weights: _weighted_sum(
            [drop_and_rescale(tensor, settings.density, generator) for tensor in tensors], weights
        ),
    )


def _dare_svd(parts: list[_Part], settings: MergeSettings, generator: torch.Generator) -> LoraPair:
    deltas = [drop_and_rescale(part.pair.delta(), settings.density, generator) for part in parts]
    return _delta_to_pair(_weighted_sum(deltas, [part.weight for part in parts]), parts, settings)


def _dare_ties(parts: list[_Part], settings: MergeSettings, generator: torch.Generator) -> LoraPair:
    return _on_factors(
        parts,
        lambda tensors, weights: elect_and_average(
            [drop_and_rescale(tensor, settings.density, generator) for tensor in tensors], weights
        ),
    )


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Zero all but the floor(density * n) entries of largest magnitude (TIES, "trim"; Yadav et al. 2023)."""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).scatter(0, kept, flat.gather(0, kept)).view_as(tensor)


def drop_and_rescale(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density` and divide by it (DARE; Yu et al. 2024)."""
    draws = torch.rand(tensor.shape, generator=generator)
    return tensor * (draws < density).to(tensor) / density


def elect_and_average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Elect a sign per entry by the sum, then average the weighted entries that agree (TIES; Yadav et al. 2023)."""
    stacked = torch.stack(list(tensors))
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agrees = (stacked.sign() == elected).to(stacked)
    return _weighted_sum(list(stacked * agrees), weights) / agrees.sum(0).clamp_min(1.0)


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total = total + weight * tensor
    return total


def _on_factors(parts: list[_Part], combine: Callable[[list[Tensor], list[float]], Tensor]) -> LoraPair:
    """Combine the A's and the B's separately, each with the square root of weight * scaling (as PEFT does)."""
    totals = [part.weight * part.pair.scaling for part in parts]
    roots = [abs(total) ** 0.5 for total in totals]
    signed = [math.copysign(root, total) for root, total in zip(roots, totals, strict=True)]
    A = combine([part.pair.A for part in parts], signed)
    B = combine([part.pair.B for part in parts], roots)
    return _single_segment(LoraPair(A, B)).balanced()


def _delta_to_pair(delta: Tensor, parts: list[_Part], settings: MergeSettings) -> LoraPair:
    left, sizes, right = torch.linalg.svd(delta.double(), full_matrices=False)
    return _from_svd(left, sizes, right, _result_rank(parts, settings), delta.dtype)


def _from_svd(left: Tensor, sizes: Tensor, right: Tensor, rank: int, dtype: torch.dtype) -> LoraPair:
    if rank > sizes.numel():
        log.info(
            "rank %d is more than the %d components there are; the result has %d",
            rank,
            len(sizes),
            len(sizes),
        )
        rank = sizes.numel()
    root = sizes[:rank].sqrt()
    # As in LoraPair.balanced, a component of size zero keeps its A, since two zero factors never train.
    A, B = torch.where(root > 0, root, 1.0)[:, None] * right[:rank], left[:, :rank] * root[None, :]
    return _single_segment(LoraPair(A.to(dtype), B.to(dtype)))


def _result_rank(parts: list[_Part], settings: MergeSettings) -> int:
    return settings.rank if settings.rank is not None else max(part.pair.rank for part in parts)


def _single_segment(pair: LoraPair) -> LoraPair:
    return LoraPair(pair.A, pair.B, pair.scaling, (Segment("merged", pair.rank),))


def _one_each(adapters: int) -> float:
    return 1.0


MERGE_RULES: dict[str, MergeRule] = {
    "exact": MergeRule(_exact, "sum of w_i s_i B_i A_i, exactly; ranks add up"),
    "svd": MergeRule(_svd, "best rank-r approximation of the exact sum", takes_rank=True),
    "paper_sum": MergeRule(_paper_sum, "(sum of sqrt(w_i s_i) B_i)(sum of sqrt(w_i s_i) A_i)", equal_ranks=True),
    "paper_sum_unscaled": MergeRule(
        _paper_sum_unscaled,
        "(sum of sqrt(w_i) B_i)(sum of sqrt(w_i) A_i); alpha / r is left out as in the released code",
        equal_ranks=True,
    ),
    "lorahub": MergeRule(
        _lorahub, "(sum of w_i sqrt(s_i) B_i)(sum of w_i sqrt(s_i) A_i), as LoRAHub composes", equal_ranks=True
    ),
    "ties": MergeRule(_ties, "TIES on the A's and on the B's, each times sqrt(w_i s_i)", _one_each, equal_ranks=True),
    "ties_svd": MergeRule(
        _ties_svd, "TIES on s_i B_i A_i with weights w_i, then best rank r", _one_each, takes_rank=True
    ),
    "dare": MergeRule(_dare, "DARE on the A's and on the B's, each times sqrt(w_i s_i), summed", equal_ranks=True),
    "dare_svd": MergeRule(_dare_svd, "DARE on w_i s_i B_i A_i, summed, then best rank r", takes_rank=True),
    "dare_ties": MergeRule(
        _dare_ties, "DARE's drops with TIES' election on the A's and on the B's", _one_each, equal_ranks=True
    ),
}
