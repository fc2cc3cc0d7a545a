"""Merge rules: several adapters in, one adapter out, with every scaling folded into the factors.

A rule is a row of `MERGE_RULES`: how each adapter's tensors are sparsified, how they are combined, and in which space. `merge()`
works module by module: a module that only some adapters have is merged from those. To add a rule, add a row, or name your own
`MergeRule` by its import path.

Example: `exact` of two adapters of ranks 8 and 4 at weights 0.5 and 0.5 puts their rank-one components side by side. The result
has rank 12 and the delta 0.5 s_1 B_1 A_1 + 0.5 s_2 B_2 A_2, exactly.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.text.checking import require
from grasp_lora.text.display import quoted
from grasp_lora.text.names import find

logger = logging.getLogger(__name__)

MOST_WEIGHT = 1_000_000  # more would overflow float32 together with a scaling
Sparsify = Callable[[Tensor, float, torch.Generator], Tensor]  # one tensor, the density, where draws come from
Combine = Callable[[Sequence[Tensor], Sequence[float]], Tensor]  # tensors of one shape and a weight for each


@dataclass(frozen=True)
class Part:
    """One adapter's share in one module: its factors, its weight and its name."""

    pair: LoraPair
    weight: float
    name: str


@dataclass(frozen=True)
class Space:
    """Where a rule works: on the factors, or on rank-one components side by side.

    Args:
        merge: merges the parts of one module.
        equal_ranks: whether all adapters need the same rank in a module.
        takes_rank: whether `MergeSettings.rank` applies.
    """

    merge: "Callable[[list[Part], MergeRule, MergeSettings, torch.Generator], LoraPair]"
    equal_ranks: bool = False
    takes_rank: bool = False


def keep_all(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Sparsify nothing."""
    return tensor


def keep_largest(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Zero all but the int(density * n) entries of largest magnitude, as PEFT counts them (TIES, "trim"; Yadav et al. 2023)."""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).scatter(0, kept, flat.gather(0, kept)).view_as(tensor)


def drop_and_rescale(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density` and divide by it (DARE; Yu et al. 2024)."""
    draws = torch.rand(tensor.shape, generator=generator)
    return tensor * (draws < density).to(tensor) / density


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum the tensors, each times its weight."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total = total + weight * tensor
    return total


def elect_and_average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Elect a sign per entry by the sum, then average the weighted entries that agree (TIES; Yadav et al. 2023)."""
    stacked = torch.stack(list(tensors))
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agrees = (stacked.sign() == elected).to(stacked)
    return weighted_sum(list(stacked * agrees), weights) / agrees.sum(0).clamp_min(1.0)


def _components(parts: list[Part], rule: "MergeRule", settings: "MergeSettings", draws: torch.Generator) -> LoraPair:
    balanced = [part.pair.balanced(part.weight) for part in parts]
    return LoraPair(
        torch.cat([pair.A for pair in balanced], dim=0),
        torch.cat([pair.B for pair in balanced], dim=1),
        segments=tuple(Segment(part.name, part.pair.rank) for part in parts),
    )


def _components_svd(
    parts: list[Part], rule: "MergeRule", settings: "MergeSettings", draws: torch.Generator
) -> LoraPair:
    exact = _components(parts, rule, settings, draws)
    # The SVD of B A through two thin QR factorisations: never forms the [d_out, d_in] delta.
    q_B, r_B = torch.linalg.qr(exact.B.double())
    q_A, r_A = torch.linalg.qr(exact.A.double().T)
    left, sizes, right = torch.linalg.svd(r_B @ r_A.T)
    rank = settings.rank or max(part.pair.rank for part in parts)
    if rank > sizes.numel():
        logger.info("rank %d is more than the %d components there are; the result has %d", rank, len(sizes), len(sizes))
        rank = sizes.numel()
    root = sizes[:rank].sqrt()
    # As in LoraPair.balanced, a component of size zero keeps its A, since two zero factors never train.
    A, B = torch.where(root > 0, root, 1.0)[:, None] * (right @ q_A.T)[:rank], (q_B @ left)[:, :rank] * root[None, :]
    return _single_segment(LoraPair(A.to(exact.A.dtype), B.to(exact.A.dtype)))


def _apart(parts: list[Part], rule: "MergeRule", settings: "MergeSettings", draws: torch.Generator) -> LoraPair:
    # Not balanced: what acts is the product of the sums, which another balance of each adapter would change.
    shares = [(part.pair, *_signed_roots(part.weight)) for part in parts]
    return LoraPair(
        torch.cat([on_A * pair.A for pair, on_A, _ in shares], dim=0),
        torch.cat([on_B * pair.B for pair, _, on_B in shares], dim=1),
        segments=tuple(Segment(part.name, part.pair.rank) for part in parts),
        apart=True,
    )


def factors(shares: Callable[[Part], tuple[float, float]]) -> Space:
    """The space of A's and B's apart.

    Args:
        shares: of a part, the weights of its A and of its B; their product is its share of the delta.
    """

    def merge_factors(
        parts: list[Part], rule: "MergeRule", settings: "MergeSettings", draws: torch.Generator
    ) -> LoraPair:
        on_A, on_B = zip(*(shares(part) for part in parts), strict=True)
        A = rule.combine([rule.sparsify(part.pair.A, settings.density, draws) for part in parts], on_A)
        B = rule.combine([rule.sparsify(part.pair.B, settings.density, draws) for part in parts], on_B)
        return _single_segment(LoraPair(A, B)).balanced()

    return Space(merge_factors, equal_ranks=True)


def _signed_roots(share: float) -> tuple[float, float]:
    """The square root of a share for each factor, as PEFT has it; A takes the sign."""
    return math.copysign(abs(share) ** 0.5, share), abs(share) ** 0.5


def _lorahub(part: Part) -> tuple[float, float]:
    share = part.weight * part.pair.scaling**0.5
    return share, share


COMPONENTS = Space(_components)
COMPONENTS_SVD = Space(_components_svd, takes_rank=True)
FACTOR_SPACE = factors(lambda part: _signed_roots(part.weight * part.pair.scaling))
APART = Space(_apart, equal_ranks=True)


@dataclass(frozen=True)
class MergeRule:
    """A row of the table.

    Args:
        scaling: in words, the delta that comes out.
        space: where it works.
        sparsify: thins out each adapter's tensor; of no effect on components.
        combine: makes one tensor of several; of no effect on components.
        default_weight: weight of each of N adapters when the user gives none.
        draws: whether `sparsify` draws random numbers, so that the seed matters.
    """

    scaling: str
    space: Space = FACTOR_SPACE
    sparsify: Sparsify = keep_all
    combine: Combine = weighted_sum
    default_weight: Callable[[int], float] = lambda adapters: 1.0 / adapters
    draws: bool = False


def _one_each(adapters: int) -> float:
    return 1.0


MERGE_RULES: dict[str, MergeRule] = {
    "exact": MergeRule("sum of w_i s_i B_i A_i, exactly; ranks add up", COMPONENTS),
    "svd": MergeRule("best rank-r approximation of the exact sum", COMPONENTS_SVD),
    "paper_sum": MergeRule("(sum of sqrt(w_i s_i) B_i)(sum of sqrt(w_i s_i) A_i)"),
    "paper_sum_unscaled": MergeRule(
        "(sum of sqrt(w_i) B_i)(sum of sqrt(w_i) A_i); alpha / r is left out as in the released code",
        factors(lambda part: _signed_roots(part.weight)),
    ),
    "paper_apart": MergeRule(
        "the same as a function where weights are the same (here 1 each by default), but each adapter is trained and masked "
        "on its own, as in the released code",
        APART, default_weight=_one_each,
    ),
    "lorahub": MergeRule(
        "(sum of w_i sqrt(s_i) B_i)(sum of w_i sqrt(s_i) A_i), as LoRAHub composes", factors(_lorahub)
    ),
    "ties": MergeRule(
        "TIES on the A's and on the B's, each times sqrt(w_i s_i)", FACTOR_SPACE, keep_largest, elect_and_average, _one_each
    ),
    "dare_ties": MergeRule(
        "DARE's drops with TIES' election on the A's and on the B's",
        FACTOR_SPACE, drop_and_rescale, elect_and_average, _one_each, draws=True,
    ),
}  # fmt: skip


if TYPE_CHECKING:
    RuleOrName = str | MergeRule
else:
    RuleOrName = str  # what a recipe can hold, which is checked by this; a script may pass the object


def merge_rule(rule: RuleOrName) -> MergeRule:
    """The rule of a name: a key of `MERGE_RULES`, or an import path.

    Raises:
        ValueError: there is none, or the object is no `MergeRule`.
    """
    return find("merge rule", rule, MergeRule, MERGE_RULES)


@dataclass(frozen=True)
class MergeSettings:
    """How adapters are merged.

    Args:
        rule: a key of `MERGE_RULES`: `exact` (the weighted sum itself; ranks add up), `svd` (its best approximation of one rank);
            on the factors `paper_sum`, `paper_sum_unscaled`, `paper_apart` (the released code's: adapters stay parameters of
            their own), `lorahub`, `ties`, `dare_ties`; or a `MergeRule` of one's own, in a recipe by its import path
            `package.module:name`.
        weights: one per adapter, in their order, in [-1000000, 1000000] and not all 0 (only `lorahub`, which searches them,
            may begin at all 0); None takes the rule's own default (1/N each; 1 each for `paper_apart`, `ties` and `dare_ties`).
        rank: rank of the result for rules that end in an SVD; None takes the highest rank of the inputs.
        density: share of weights that TIES and DARE keep, in (0, 1]; other rules keep all.
        seed: seed of DARE's random drops; a recipe combines it with its own seed.
        dropout: on the input of the merged adapter while it trains on, in [0, 1); None takes that of fresh adapters.

    Raises:
        ValueError: a setting is outside its range, or does not belong to the rule.
    """

    rule: RuleOrName = "exact"
    weights: tuple[float, ...] | None = None
    rank: int | None = None
    density: float = 0.5
    seed: int = 42
    dropout: float | None = None

    def __post_init__(self) -> None:
        takes_rank, weights = merge_rule(self.rule).space.takes_rank, self.weights or ()
        some = not weights or any(weights) or self.rule == "lorahub"  # whose search begins at 0
        takers = ", ".join(name for name, row in MERGE_RULES.items() if row.space.takes_rank)
        require(
            self,
            weights=(
                some and all(abs(weight) <= MOST_WEIGHT for weight in weights),
                f"lie in [-{MOST_WEIGHT}, {MOST_WEIGHT}] each, and one must not be 0",
            ),
            rank=(
                self.rank is None or (takes_rank and self.rank >= 1),
                f"be at least 1 with rule {takers}, and null with others",
            ),
            density=(0.0 < self.density <= 1.0, "lie in (0, 1]"),
            dropout=(self.dropout is None or 0.0 <= self.dropout < 1.0, "lie in [0, 1)"),
        )


def merge(
    adapters: Sequence[AdapterWeights], settings: MergeSettings | None = None, names: Sequence[str] | None = None
) -> AdapterWeights:
    """Merge adapters into one whose pairs have scaling 1 and, unless adapters are kept apart, balanced factors.

    That the adapters are of one backbone is not checked, only that the shapes of modules that they share agree.

    Args:
        adapters: at least one.
        settings: rule, weights and the rest; None takes `MergeSettings()`, which is rule `exact`.
        names: a name per adapter for the segments, `source` and `target` for two, else `adapter_0` and so on.

    Raises:
        AdapterError: no adapters, another number of weights, shapes and ranks that do not fit, or nothing is left in the merge.
    """
    settings = MergeSettings() if settings is None else settings
    if not adapters or not all(isinstance(adapter, AdapterWeights) for adapter in adapters):
        raise AdapterError("give at least one adapter to merge, and of each its weights: read_adapter(folder).weights")
    rule = merge_rule(settings.rule)
    default = [rule.default_weight(len(adapters))] * len(adapters)
    weights = list(settings.weights) if settings.weights is not None else default
    if len(weights) != len(adapters):
        raise AdapterError(f"{len(weights)} merge weights for {len(adapters)} adapters; give one per adapter, or none")
    if names is None:
        names = ("source", "target") if len(adapters) == 2 else [f"adapter_{i}" for i in range(len(adapters))]
    generator = torch.Generator().manual_seed(settings.seed)
    merged: dict[str, LoraPair] = {}
    # Sorted, so that the random drops of DARE do not depend on the order of a file.
    for module in sorted(set().union(*adapters)):
        parts = [
            Part(adapter[module].together(), weight, name)
            for adapter, weight, name in zip(adapters, weights, names, strict=True)
            if module in adapter
        ]
        _check_shapes(module, parts, settings.rule)
        merged[module] = rule.space.merge(parts, rule, settings, generator)
    # Weights of 0 alone are what a search for those of `lorahub` begins with; a recipe that has them is refused before it is run.
    acted = any(pair.acts for adapter in adapters for pair in adapter.values())
    if any(weights) and acted and not any(pair.acts for pair in merged.values()):
        thinned = rule.sparsify is not keep_all and settings.density < 1.0
        way = f"raise merge.density (now {settings.density})" if thinned else f"give other merge.weights than {weights}"
        raise AdapterError(
            f"the merge by rule {quoted(settings.rule)} is empty: A or B is all zero in each of its {len(merged)} modules; {way}"
        )
    return AdapterWeights(merged)


def _check_shapes(module: str, parts: list[Part], rule: RuleOrName) -> None:
    shapes = {part.pair.shape for part in parts}
    if len(shapes) > 1:
        raise AdapterError(
            f"adapters differ in the shape (d_out, d_in) of {module}: {sorted(shapes)}; "
            "merge only adapters of the same backbone"
        )
    ranks = {part.pair.rank for part in parts}
    if merge_rule(rule).space.equal_ranks and len(ranks) > 1:
        raise AdapterError(
            f"merge rule {quoted(rule)} needs equal ranks, but {module} has {sorted(ranks)}; use 'exact' or 'svd'"
        )


def _single_segment(pair: LoraPair) -> LoraPair:
    return LoraPair(pair.A, pair.B, pair.scaling, (Segment("merged", pair.rank),))
