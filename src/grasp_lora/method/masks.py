"""Which weights of a LoRA adapter are pruned: exact-count keep masks and the set of live masks.

A keep mask is True where a weight is kept. Weights are ranked once by (importance, position), so a mask at any ratio is one
comparison, counts are exact under ties, and raising the ratio only adds weights to the pruned set. The
weights are whole in every process, also where the backbone under them is split.
Paper: masking step of the controller, pruning of the final run.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from grasp_lora.errors import AdapterError
from grasp_lora.method.importance import InputNorms, ScoreOrName, importance, score_pair
from grasp_lora.method.lora import LoraPair, Segment

SCOPES = ("factor", "tensor", "global")
GRANULARITIES = ("weight", "component")
FACTORS = ("A", "B")
KEEP, STASH, NORMS = "keep.", "stash.", "norms."  # what begins the names of tensors in a checkpoint


@dataclass(frozen=True)
class MaskSettings:
    """What is pruned first.

    Args:
        score: importance of a weight w. `magnitude` |w|; `input_aware` |A_ij| * ||x_j|| and |B_ij| * ||(A x)_j|| (Wanda);
            `gradient_of_delta` |d/dw sum(|B A| * ||x||)| (adaptive LoRA merge); or a `Score` of one's own, in a recipe by its
            import path `package.module:name`.
        scope: who competes: the weights of one adapter's A or B in one module (`factor`, the paper's), of a whole
            concatenated A or B (`tensor`), or of all modules (`global`).
        granularity: `weight`, or `component`: a rank-one component (a row of A with its column of B) as a whole, scored
            by the sum of its weights' scores.

    Raises:
        ValueError: a name that does not exist.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    score: ScoreOrName = "magnitude"
    scope: str = "factor"
    granularity: str = "weight"

    def __post_init__(self) -> None:
        importance(self.score)
        for name, allowed in (("scope", SCOPES), ("granularity", GRANULARITIES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"mask {name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")

    @property
    def needs_inputs(self) -> bool:
        """Whether the score needs the norms of each module's inputs."""
        return importance(self.score).needs_inputs


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
    """Return each entry's place in the order of importance, 0 for the least, ties by position; int64, same shape."""
    flat = scores.flatten()
    order = flat.argsort(stable=True)
    return torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=order.device)).view_as(scores)


@dataclass(frozen=True)
class Ranking:
    """Places of the weights of one factor in the order of importance.

    Args:
        places: place of each weight within its group, 0 for the least important, shaped as the factor.
        groups: runs along the rank dimension: (number of components, size of the group that they are ranked in).
    """

    places: Tensor
    groups: tuple[tuple[int, int], ...]

    def keep(self, prune_ratio: float, rank_dimension: int) -> Tensor:
        """Return the keep mask that prunes floor(ratio * size) weights of each group."""
        counts = [prune_count(prune_ratio, size) for components, size in self.groups for _ in range(components)]
        pruned = torch.tensor(counts, device=self.places.device)
        return self.places >= (pruned[:, None] if rank_dimension == 0 else pruned[None, :])


WeightKey = tuple[str, str]  # (module, factor)
RANK_DIMENSION = {"A": 0, "B": 1}


class MaskSet:
    """The masks of one adapter's live weights: scores them, prunes, restores, reports.

    Holds the parameters themselves (float LoRA factors, changed in place), a keep mask for each, and a stash with the
    value that each masked weight had, so that a lower ratio can revive it.

    Args:
        pairs: module name -> pair whose A and B are the live parameters, scaling and segments included.
        settings: score, scope and granularity.

    Raises:
        AdapterError: there are no pairs, or two modules share a factor.
    """

    def __init__(self, pairs: Mapping[str, LoraPair], settings: MaskSettings) -> None:
        if not pairs:
            raise AdapterError("there are no LoRA weights to mask; give a model with a LoRA adapter")
        self.settings = settings
        self.pairs = dict(pairs)
        self.norms: dict[str, InputNorms] = {}
        self.ratio = 0.0
        self.weights: dict[WeightKey, Tensor] = {}
        for module, pair in self.pairs.items():
            self.weights[module, "A"] = pair.A
            self.weights[module, "B"] = pair.B
        if len({id(weight) for weight in self.weights.values()}) < len(self.weights):
            raise AdapterError("two modules share a LoRA factor; masks need separate ones")
        self.keep = {key: torch.ones_like(weight, dtype=torch.bool) for key, weight in self.weights.items()}
        self.stash = {key: torch.zeros_like(weight) for key, weight in self.weights.items()}

    def holds(self, pairs: Mapping[str, LoraPair]) -> bool:
        """Whether these are the very parameters that the set masks."""
        weights = {(module, factor): getattr(pair, factor) for module, pair in pairs.items() for factor in FACTORS}
        return weights.keys() == self.weights.keys() and all(weights[key] is self.weights[key] for key in weights)

    @torch.no_grad()
    def are_on(self) -> bool:
        """Whether every masked weight is zero."""
        return not any(((weight != 0) & ~self.keep[key]).any() for key, weight in self.weights.items())

    def checksums(self) -> list[int]:
        """Return the sum of the bytes of each factor, which tells whether something else has changed the weights since."""
        return [int(weight.detach().contiguous().view(torch.uint8).sum()) for weight in self.weights.values()]

    def dense(self, key: WeightKey) -> Tensor:
        """Return a factor with stashed values in place of masked ones."""
        return torch.where(self.keep[key], self.weights[key], self.stash[key])

    @torch.no_grad()
    def rank(self) -> dict[WeightKey, Ranking]:
        """Score all weights as they are now, stashed ones with their stashed values, and rank them within their scope."""
        scores = self._scores()
        if self.settings.granularity == "weight":
            return self._rank_in_scope(scores)
        sums = {(module, "A"): scores[module, "A"].sum(1) + scores[module, "B"].sum(0) for module in self.pairs}
        ranked = self._rank_in_scope(sums)
        spread = {}
        for (module, _), ranking in ranked.items():
            A, B = self.weights[module, "A"], self.weights[module, "B"]
            spread[module, "A"] = Ranking(ranking.places[:, None].expand(A.shape), ranking.groups)
            spread[module, "B"] = Ranking(ranking.places[None, :].expand(B.shape), ranking.groups)
        return spread

    def keep_masks(
        self, prune_ratio: float, ranking: Mapping[WeightKey, Ranking] | None = None
    ) -> dict[WeightKey, Tensor]:
        """Build the keep masks at a ratio: in each group the floor(ratio * n) least important weights are False.

        Args:
            prune_ratio: fraction in [0, 1].
            ranking: of `rank()`, to build several masks from one scoring.
        """
        ranked = self.rank() if ranking is None else ranking
        return {key: one.keep(prune_ratio, RANK_DIMENSION[key[1]]) for key, one in ranked.items()}

    @torch.no_grad()
    def commit(self, prune_ratio: float, ranking: Mapping[WeightKey, Ranking] | None = None) -> dict[WeightKey, Tensor]:
        """Prune at a ratio for good: revive what the new mask keeps, stash and zero what it does not.

        Returns:
            For each factor where a weight was newly masked, for `reset_moments`.
        """
        masks = self.keep_masks(prune_ratio, ranking)
        newly_masked = {}
        for key, keep in masks.items():
            dense = self.dense(key)
            self.weights[key].copy_(torch.where(keep, dense, torch.zeros_like(dense)))
            self.stash[key] = torch.where(keep, torch.zeros_like(dense), dense)
            newly_masked[key] = self.keep[key] & ~keep
            self.keep[key] = keep
        self.ratio = prune_ratio
        return newly_masked

    @torch.no_grad()
    def enforce(self) -> None:
        """Hold masked weights at zero; call it after every optimizer step."""
        for key, weight in self.weights.items():
            weight.masked_fill_(~self.keep[key], 0.0)

    @torch.no_grad()
    def reselect(self, prune_ratio: float) -> None:
        """Zero the least important of the weights as they are now, without a stash: the paper's final run.

        A weight pruned earlier may have been moved away from zero by the optimizer and then competes again.
        """
        for stash in self.stash.values():
            stash.zero_()
        for keep in self.keep.values():
            keep.fill_(True)
        for key, keep in self.keep_masks(prune_ratio).items():
            self.weights[key].masked_fill_(~keep, 0.0)
            self.keep[key] = keep
        self.ratio = prune_ratio

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of masked weights, so that their optimizer moments stay zero too."""
        for key, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(~self.keep[key], 0.0)

    @contextmanager
    def probe(self, prune_ratio: float, ranking: Mapping[WeightKey, Ranking] | None = None) -> Iterator[None]:
        """Prune at a candidate ratio inside the context; afterwards every weight is bit for bit what it was."""
        with torch.no_grad():
            masks = self.keep_masks(prune_ratio, ranking)
            saved = {key: weight.detach().clone() for key, weight in self.weights.items()}
        try:
            with torch.no_grad():
                for key, weight in self.weights.items():
                    dense = self.dense(key)
                    weight.copy_(torch.where(masks[key], dense, torch.zeros_like(dense)))
            yield
        finally:
            with torch.no_grad():
                for key, weight in self.weights.items():
                    weight.copy_(saved[key])

    def state(self) -> dict[str, Tensor]:
        """Return all that a resume needs beside `ratio` and the weights themselves, by names such as `keep.A.MODULE`."""
        norms = {(module, f): getattr(norms, f) for module, norms in self.norms.items() for f in FACTORS}
        return named(KEEP, self.keep) | named(STASH, self.stash) | named(NORMS, norms)

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], ratio: float) -> None:
        """Take up the state of another set over the same modules; the weights have to be those of that moment.

        Raises:
            ValueError: the state is of other modules or shapes.
        """
        for prefix, ours in ((KEEP, self.keep), (STASH, self.stash)):
            saved = of_prefix(prefix, state)
            if {key: t.shape for key, t in saved.items()} != {key: t.shape for key, t in self.weights.items()}:
                raise ValueError(
                    f"the saved masks ({prefix[:-1]}) are of another adapter; resume with the one they belong to"
                )
            ours |= {key: saved[key].to(w.device) for key, w in self.weights.items()}
        norms = {key: tensor.to(self.weights[key].device) for key, tensor in of_prefix(NORMS, state).items()}
        self.norms = {
            module: InputNorms(norms[module, "A"], norms[module, "B"])
            for module in self.pairs
            if (module, "A") in norms
        }
        self.ratio = ratio

    @torch.no_grad()
    def sparsity(self) -> float:
        """Return the measured share of weights that are masked and really are zero."""
        zeros = sum(int(((weight == 0) & ~self.keep[key]).sum()) for key, weight in self.weights.items())
        return zeros / sum(weight.numel() for weight in self.weights.values())

    def _segment_ranks(self, module: str) -> list[int]:
        pair = self.pairs[module]
        return [segment.rank for segment in pair.segments] or [pair.rank]

    def _scores(self) -> dict[WeightKey, Tensor]:
        scores = {}
        for module, pair in self.pairs.items():
            A, B = (self.dense((module, factor)).detach() for factor in FACTORS)
            parts = replace(pair, A=A, B=B).parts()
            scored = [score_pair(part, self.settings.score, self.norms.get(module)) for part in parts]
            for factor, found in zip(FACTORS, zip(*scored, strict=True), strict=True):
                scores[module, factor] = torch.cat(found, dim=RANK_DIMENSION[factor])
        return scores

    def _rank_in_scope(self, scores: Mapping[WeightKey, Tensor]) -> dict[WeightKey, Ranking]:
        """Rank scores shaped as their factor, or one score a component under the key of A."""
        if self.settings.scope == "global":
            places = rank_weights(torch.cat([score.flatten() for score in scores.values()]))
            parts = torch.split(places, [score.numel() for score in scores.values()])
            return {
                key: Ranking(part.view_as(score), ((self.pairs[key[0]].rank, places.numel()),))
                for (key, score), part in zip(scores.items(), parts, strict=True)
            }
        ranked = {}
        for key, score in scores.items():
            module, factor = key
            sizes = self._segment_ranks(module) if self.settings.scope == "factor" else [self.pairs[module].rank]
            blocks = torch.split(score, sizes, dim=RANK_DIMENSION[factor])
            ranked[key] = Ranking(
                torch.cat([rank_weights(block) for block in blocks], dim=RANK_DIMENSION[factor]),
                tuple((size, block.numel()) for size, block in zip(sizes, blocks, strict=True)),
            )
        return ranked


def named(prefix: str, tensors: Mapping[WeightKey, Tensor]) -> dict[str, Tensor]:
    """Tensors of the factors by the names that they have in a checkpoint."""
    return {f"{prefix}{factor}.{module}": tensor for (module, factor), tensor in tensors.items()}


def of_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[WeightKey, Tensor]:
    """What `named` named, among other tensors."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            factor, module = name.removeprefix(prefix).split(".", 1)
            found[module, factor] = tensor
    return found


@torch.no_grad()
def survival(pairs: Mapping[str, LoraPair]) -> list[dict[str, str | int]]:
    """Count weights that are not zero per module, factor and origin: rows of module, factor, segment, weights, kept."""
    rows: list[dict[str, str | int]] = []
    for module, pair in pairs.items():
        segments = pair.segments or (Segment("merged", pair.rank),)
        for factor, weight in (("A", pair.A), ("B", pair.B)):
            ranks = [segment.rank for segment in segments]
            blocks = torch.split(weight, ranks, dim=RANK_DIMENSION[factor])
            for segment, block in zip(segments, blocks, strict=True):
                row: dict[str, str | int] = {"module": module, "factor": factor, "segment": segment.name}
                rows.append(row | {"weights": block.numel(), "kept": int((block != 0).sum())})
    return rows


@torch.no_grad()
def reset_moments(
    optimizer: torch.optim.Optimizer,
    weights: Mapping[WeightKey, Tensor],
    entries: Mapping[WeightKey, Tensor],
) -> None:
    """Zero the optimizer's moments at the given entries only.

    Zeroing a whole tensor's state would stop the other weights' momentum; leaving it would move a revived weight by an old
    average. Works on every float state tensor of the weight's own shape (Adam's two moments, SGD's momentum); moments that
    an optimizer keeps quantised or factored are left alone, as a zero code need not mean zero.

    Args:
        optimizer: the live optimizer; wrappers that expose `.state` will do.
        weights: the parameters, by the same keys as `entries`.
        entries: boolean, True where moments are zeroed, shaped as the weight.
    """
    for key, weight in weights.items():
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == weight.shape:
                value.masked_fill_(entries[key], 0.0)
