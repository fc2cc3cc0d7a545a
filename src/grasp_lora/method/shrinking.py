"""A smaller adapter from a given one, and how far its delta moved: emptied components dropped, ranks lowered, values rounded.

No function here forms a dense delta; errors come from the factors, in float64.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.method.merging import MergeSettings, merge

PADDING = "padding"


def drop_emptied(weights: AdapterWeights) -> AdapterWeights:
    """Drop the rank-one components whose row of A or column of B is all zero; their product is zero, so no delta changes.

    A module without any other component is dropped as a whole: the result may be empty. Scalings stay, and segments lose what
    they lost.
    """
    pairs = {}
    for module, pair in weights.items():
        live = (pair.A != 0).any(dim=1) & (pair.B != 0).any(dim=0)
        if live.any():
            pairs[module] = LoraPair(pair.A[live], pair.B[:, live], pair.scaling, _surviving(pair.segments, live))
    return AdapterWeights(pairs)


def lower_rank(weights: AdapterWeights, rank: int) -> AdapterWeights:
    """Replace every module of a higher rank by its best approximation of this rank (Eckart and Young 1936).

    Its components are no longer those of the adapters it came from: where a module had segments, it has one, `merged`.
    Modules of this rank or a lower one stay as they are.

    Args:
        weights: the adapter.
        rank: at least 1.
    """
    settings = MergeSettings("svd", weights=(1.0,), rank=rank)
    high = AdapterWeights({module: pair for module, pair in weights.items() if pair.rank > rank})
    lowered = merge([high], settings)
    return AdapterWeights({module: _as_before(lowered, module, pair) for module, pair in weights.items()})


def pad_ranks(weights: AdapterWeights) -> AdapterWeights:
    """Give every module the highest rank there is, with components of zeros (segment `padding`); no delta changes."""
    highest = max(pair.rank for pair in weights.values())
    pairs = {}
    for module, pair in weights.items():
        missing = highest - pair.rank
        A = torch.nn.functional.pad(pair.A, (0, 0, 0, missing))
        B = torch.nn.functional.pad(pair.B, (0, missing))
        added = (Segment(PADDING, missing),) if pair.segments and missing else ()
        pairs[module] = LoraPair(A, B, pair.scaling, pair.segments + added)
    return AdapterWeights(pairs)


def share_scaling(weights: AdapterWeights) -> AdapterWeights:
    """Give all modules one scaling, since programs exist that know only one: 1 with balanced factors where they differ."""
    if len({pair.scaling for pair in weights.values()}) == 1:
        return weights
    return AdapterWeights({module: pair.balanced() for module, pair in weights.items()})


def in_dtype(weights: AdapterWeights, dtype: torch.dtype) -> AdapterWeights:
    """Round all factors to a dtype.

    Raises:
        AdapterError: a value is too large for it.
    """
    return AdapterWeights(
        {
            module: LoraPair(
                rounded(pair.A, dtype, f"factor A of {module}"),
                rounded(pair.B, dtype, f"factor B of {module}"),
                pair.scaling,
                pair.segments,
            )
            for module, pair in weights.items()
        }
    )


def rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Round finite values to a dtype.

    Raises:
        AdapterError: one is too large for it.
    """
    result = values.to(dtype)
    if not torch.isfinite(result).all():
        raise AdapterError(
            f"{name} holds a value of size {float(values.abs().max()):.3g}, but {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:.3g}; use bfloat16 or float32"
        )
    return result


@dataclass(frozen=True)
class DeltaError:
    """How far an adapter's delta is from the original's, as relative Frobenius errors.

    Args:
        relative_error: over all modules together.
        worst_error: of the module where it is largest.
        worst_module: its name.
    """

    relative_error: float
    worst_error: float
    worst_module: str


@torch.no_grad()
def delta_error(before: Mapping[str, LoraPair], after: Mapping[str, LoraPair]) -> DeltaError:
    """Measure ||delta after - delta before|| / ||delta before||, in float64 and from the factors alone.

    A module that is missing afterwards counts as a delta of zero. A module whose delta was zero counts as without error,
    unless it no longer is zero: then its error is infinite.
    """
    sizes, changes = {}, {}
    for module, old in before.items():
        A, B = old.A.double(), old.scaling * old.B.double()
        sizes[module] = _product_norm(B, A)
        if module in after:
            new = after[module]
            A, B = torch.cat([A, new.A.double()]), torch.cat([B, -new.scaling * new.B.double()], dim=1)
        changes[module] = _product_norm(B, A)
    worst = max(sizes, key=lambda module: _ratio(changes[module], sizes[module]))
    total = _ratio(_length(changes.values()), _length(sizes.values()))
    return DeltaError(total, _ratio(changes[worst], sizes[worst]), worst)


def _as_before(lowered: AdapterWeights, module: str, pair: LoraPair) -> LoraPair:
    if module not in lowered:
        return pair
    new = lowered[module]
    return new if pair.segments else LoraPair(new.A, new.B, new.scaling)


def _surviving(segments: tuple[Segment, ...], live: Tensor) -> tuple[Segment, ...]:
    parts = torch.split(live, [segment.rank for segment in segments]) if segments else ()
    counts = [(segment.name, int(part.sum())) for segment, part in zip(segments, parts, strict=True)]
    return tuple(Segment(name, count) for name, count in counts if count)


def _product_norm(B: Tensor, A: Tensor) -> float:
    """Frobenius norm of B A without the product: orthogonal factors do not change it."""
    r_B, r_A = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.T, mode="r").R
    return float((r_B @ r_A.T).norm())


def _length(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).norm())


def _ratio(change: float, size: float) -> float:
    if size > 0:
        return change / size
    return 0.0 if change == 0 else float("inf")
