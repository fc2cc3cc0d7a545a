"""Which weights of a LoRA adapter are pruned: importance scores, their ranking, exact keep masks, and the set of live masks.

1. A **score** says how important each weight is: magnitude |w|, or one that looks at what enters the module.
2. Weights **compete** within one factor of one adapter: a merge of a source and a target has four groups in a module.
3. They are **ranked** once by (score, position), so a mask at any ratio is one comparison: counts are exact under ties, and a
   higher ratio only adds weights to the pruned set.
4. A `MaskSet` holds the live parameters. `commit` prunes at a ratio and stashes what it takes, so that a lower ratio can give
   it back; `probe` prunes for the length of a context, and afterwards every weight is bit for bit what it was.

Example: a group with the values 0.1, -3, 0.2, 1 at ratio 0.5 prunes floor(0.5 * 4) = 2 weights, 0.1 and 0.2. At 0.25 it prunes
0.1 alone, and 0.2 comes back from the stash.

A keep mask is True where a weight is kept. Nothing is read from the device.
Paper: masking step of the controller, pruning of the final run.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grasp_lora.errors import AdapterError, RecipeError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.text.display import quoted
from grasp_lora.text.names import find

MASK_MODES = ("hold", "reselect")  # one mask for a whole training, or another after each optimizer step
FACTORS = ("A", "B")
RANK_DIMENSION = {"A": 0, "B": 1}
KEEP, STASH, NORMS = "keep.", "stash.", "norms."  # what begins the names of tensors in a checkpoint
WeightKey = tuple[str, str]  # (module, factor)
Order = Mapping[WeightKey, Tensor]  # of `MaskSet.rank`


# 1. Scores


@dataclass(frozen=True)
class InputNorms:
    """L2 norms over calibration tokens of what enters the two factors of a module.

    Args:
        A: norm of each input feature x_j, [d_in].
        B: norm of each component's activation (A x)_j, [rank].
    """

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Score:
    """How important each weight is.

    Args:
        function: from a pair and the norms of its inputs to the importance of every weight of A and of B, both >= 0 and shaped
            as the factors. Factors are float32 or finer.
        needs_inputs: whether the function needs the norms; else it gets None.
    """

    function: Callable[[LoraPair, InputNorms | None], tuple[Tensor, Tensor]]
    needs_inputs: bool = False

    @property
    def name(self) -> str:
        """What its function is called; of an object that is called like one, what its type is."""
        return str(getattr(self.function, "__qualname__", type(self.function).__qualname__))


def _magnitude(pair: LoraPair, norms: InputNorms | None) -> tuple[Tensor, Tensor]:
    return pair.A.abs(), pair.B.abs()


def _input_aware(pair: LoraPair, norms: InputNorms | None) -> tuple[Tensor, Tensor]:
    assert norms is not None
    return pair.A.abs() * norms.A, pair.B.abs() * norms.B


def _gradient_of_delta(pair: LoraPair, norms: InputNorms | None) -> tuple[Tensor, Tensor]:
    """d/dw sum(|B A| * x) in closed form, two products and no autograd (Miyano & Arase 2025)."""
    assert norms is not None
    slope = torch.sign(pair.B @ pair.A) * norms.A
    return (pair.B.T @ slope).abs(), (slope @ pair.A.T).abs()


SCORES: dict[str, Score] = {
    "magnitude": Score(_magnitude),
    "input_aware": Score(_input_aware, needs_inputs=True),
    "gradient_of_delta": Score(_gradient_of_delta, needs_inputs=True),
}

if TYPE_CHECKING:
    ScoreOrName = str | Score
else:
    ScoreOrName = str  # what a recipe can hold, which is checked by this; a script may pass the object


def importance(score: ScoreOrName) -> Score:
    """The score of a name: a key of `SCORES`, or an import path.

    Raises:
        ValueError: there is none, or the object is no `Score`.
    """
    return find("mask score", score, Score, SCORES)


def score_pair(pair: LoraPair, score: ScoreOrName, norms: InputNorms | None = None) -> tuple[Tensor, Tensor]:
    """Return the importance of every weight of A and of B, both >= 0 and shaped as the factors.

    Args:
        pair: the factors; stashed values stand in for masked weights.
        score: a key of `SCORES`, an import path, or a `Score`.
        norms: needed by scores that need inputs.

    Raises:
        ValueError: the score is unknown.
        RecipeError: it gives something else than a number for each weight.
    """
    row = importance(score)
    dtype = torch.promote_types(pair.A.dtype, torch.float32)
    cast = LoraPair(pair.A.to(dtype), pair.B.to(dtype), pair.scaling, pair.segments)
    scores = row.function(cast, norms if row.needs_inputs else None)
    _check(row, scores, pair)
    return scores


def _check(score: Score, scores: tuple[Tensor, Tensor], pair: LoraPair) -> None:
    """Refuse scores of a user's own that would prune by position or not at all; to look at ours would make a GPU wait."""
    if score in SCORES.values():
        return
    shapes = [tuple(getattr(factor, "shape", ())) for factor in scores] if isinstance(scores, tuple | list) else None
    if shapes != [tuple(pair.A.shape), tuple(pair.B.shape)] or not all(factor.isfinite().all() for factor in scores):
        raise RecipeError(
            f"mask score {quoted(score.name)} gave {shapes}; it must give two tensors, shaped as A {tuple(pair.A.shape)} and as "
            f"B {tuple(pair.B.shape)}, with a finite number >= 0 for each weight"
        )


@dataclass(frozen=True)
class MaskSettings:
    """What is pruned first, among the weights of one adapter's A or B in one module, as in the paper.

    Args:
        score: importance of a weight w. `magnitude` |w|; `input_aware` |A_ij| * ||x_j|| and |B_ij| * ||(A x)_j|| (Wanda);
            `gradient_of_delta` |d/dw sum(|B A| * ||x||)| (adaptive LoRA merge); or a `Score` of one's own, in a recipe by its
            import path `package.module:name`.

    Raises:
        ValueError: a name that does not exist.
    """

    score: ScoreOrName = "magnitude"

    def __post_init__(self) -> None:
        importance(self.score)

    @property
    def needs_inputs(self) -> bool:
        """Whether the score needs the norms of each module's inputs."""
        return importance(self.score).needs_inputs


# 2 and 3. Groups, ranking, counts


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
    """Rank the weights of one group by importance: 0 for the least important, ties by position; int32, shaped as the scores.

    A group whose scores are all zero, as of a factor B that did not train, would lose its first output features: it takes a
    random order that depends on its size alone. Nothing is read from the device.
    """
    flat = scores.flatten()
    ranks = torch.empty_like(flat, dtype=torch.int32)
    ranks[flat.argsort(stable=True)] = torch.arange(len(flat), dtype=torch.int32, device=flat.device)
    return torch.where((flat == 0).all(), _random_ranks(len(flat)).to(flat.device), ranks).view(scores.shape)


@cache
def _random_ranks(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(0)).int()


# 4. Live masks


class MaskSet:
    """The masks of one adapter's live weights: scores them, prunes, restores, reports.

    Args:
        pairs: module name -> pair whose A and B are the live parameters (float, changed in place), scaling and segments included.
        settings: the score.

    Attributes:
        weights: the parameters, by module and factor; the others have the same keys and shapes.
        keep: the masks, True where a weight is kept.
        stash: the value that each masked weight had, zero elsewhere, so that a lower ratio can revive it.
        newly_masked: True where the last commit masked a weight that was not masked before, for `reset_moments`.
        ratio: the last one that was committed or reselected.
    """

    def __init__(self, pairs: Mapping[str, LoraPair], settings: MaskSettings) -> None:
        self.settings = settings
        self.pairs = dict(pairs)
        self.norms: dict[str, InputNorms] = {}
        self.ratio = 0.0
        self.weights = _factors_of(pairs)
        self.keep = {key: torch.ones_like(weight, dtype=torch.bool) for key, weight in self.weights.items()}
        self.stash = {key: torch.zeros_like(weight, requires_grad=False) for key, weight in self.weights.items()}
        self.newly_masked = {key: ~keep for key, keep in self.keep.items()}

    @torch.no_grad()
    def dense(self) -> dict[WeightKey, Tensor]:
        """Return a copy of the factors with stashed values in place of masked ones."""
        return {key: torch.where(self.keep[key], weight, self.stash[key]) for key, weight in self.weights.items()}

    def holds(self, pairs: Mapping[str, LoraPair]) -> bool:
        """Whether these are the very parameters that the set masks."""
        weights = _factors_of(pairs)
        return weights.keys() == self.weights.keys() and all(weights[key] is self.weights[key] for key in weights)

    @torch.no_grad()
    def are_on(self) -> bool:
        """Whether every masked weight is zero."""
        return not any(bool(((weight != 0) & ~self.keep[key]).any()) for key, weight in self.weights.items())

    def checksums(self) -> list[int]:
        """Return the sum of the bytes of each factor, which tells whether something else has changed the weights since."""
        return [int(weight.detach().contiguous().view(torch.uint8).sum()) for weight in self.weights.values()]

    @torch.no_grad()
    def rank(self) -> dict[WeightKey, Tensor]:
        """Score all weights as they are now, stashed ones with their stashed values, and rank them within their groups.

        Returns:
            For each factor the rank of each weight within its group, 0 for the least important; int32, shaped as the factor.
            Masks at several ratios that are made from one such order nest.
        """
        order, dense = {}, self.dense()
        for module, pair in self.pairs.items():
            parts = replace(pair, A=dense[module, "A"], B=dense[module, "B"]).parts()
            scored = [score_pair(part, self.settings.score, self.norms.get(module)) for part in parts]
            for factor, scores in zip(FACTORS, zip(*scored, strict=True), strict=True):
                along = RANK_DIMENSION[factor]
                groups = torch.split(torch.cat(scores, dim=along), _ranks(pair), dim=along)
                order[module, factor] = torch.cat([rank_weights(group) for group in groups], dim=along)
        return order

    @torch.no_grad()
    def commit(self, prune_ratio: float, order: Order | None = None) -> None:
        """Prune at a ratio for good: revive what the new mask keeps, stash and zero what it does not.

        Args:
            prune_ratio: fraction in [0, 1]: in each group the floor(ratio * n) least important weights go.
            order: of `rank`; None ranks the weights as they are now.
        """
        keep = self._keep_at(prune_ratio, order)
        for key, dense in self.dense().items():
            self.weights[key].copy_(dense).masked_fill_(~keep[key], 0.0)
            self.stash[key] = dense.masked_fill_(keep[key], 0.0)
            self.newly_masked[key] = self.keep[key] & ~keep[key]
        self.keep, self.ratio = keep, prune_ratio

    @torch.no_grad()
    def enforce(self) -> None:
        """Hold masked weights at zero; call it after every optimizer step."""
        torch._foreach_mul_(list(self.weights.values()), list(self.keep.values()))

    @torch.no_grad()
    def reselect(self, prune_ratio: float) -> None:
        """Zero the least important of the weights as they are now, without a stash: the paper's final run.

        A weight pruned earlier may have been moved away from zero by the optimizer and then competes again.
        """
        for key in self.weights:
            self.stash[key].zero_()
            self.keep[key].fill_(True)
        self.keep, self.ratio = self._keep_at(prune_ratio), prune_ratio
        for key, weight in self.weights.items():
            weight.masked_fill_(~self.keep[key], 0.0)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of masked weights; where they are masked from the start, their optimizer moments stay zero, too."""
        pairs = [(weight.grad, self.keep[key]) for key, weight in self.weights.items() if weight.grad is not None]
        if pairs:
            torch._foreach_mul_(*map(list, zip(*pairs, strict=True)))

    @contextmanager
    def probe(self, prune_ratio: float, order: Order | None = None) -> Iterator[None]:
        """Prune at a candidate ratio inside the context, as `commit` does; afterwards every weight is bit for bit what it was."""
        with torch.no_grad():
            keep = self._keep_at(prune_ratio, order)
            saved = {key: weight.clone() for key, weight in self.weights.items()}
        try:
            with torch.no_grad():
                for key, dense in self.dense().items():
                    self.weights[key].copy_(dense).masked_fill_(~keep[key], 0.0)
            yield
        finally:
            with torch.no_grad():
                for key, weight in self.weights.items():
                    weight.copy_(saved[key])

    def state(self) -> dict[str, Tensor]:
        """Return all that a resume needs beside `ratio` and the weights themselves, by names such as `keep.A.MODULE`."""
        norms = _factors_of(self.norms)
        return named(KEEP, self.keep) | named(STASH, self.stash) | named(NORMS, norms)

    def restore(self, state: Mapping[str, Tensor], ratio: float) -> None:
        """Take up the state of another set over the same modules; the weights have to be those of that moment."""
        self.keep, self.stash = self.on_device(KEEP, state), self.on_device(STASH, state)
        norms = self.on_device(NORMS, state)
        self.norms = {module: InputNorms(norms[module, "A"], norms[module, "B"]) for module, _ in norms}
        self.ratio = ratio

    def on_device(self, prefix: str, state: Mapping[str, Tensor]) -> dict[WeightKey, Tensor]:
        """The tensors of a checkpoint that `named` gave this prefix, each where its weight is."""
        found = of_prefix(prefix, state)
        return {key: found[key].to(weight.device) for key, weight in self.weights.items() if key in found}

    @torch.no_grad()
    def sparsity(self) -> float:
        """Return the measured share of weights that are masked and really are zero."""
        zeros = sum(int(((weight == 0) & ~self.keep[key]).sum()) for key, weight in self.weights.items())
        return zeros / sum(weight.numel() for weight in self.weights.values())

    def _keep_at(self, prune_ratio: float, order: Order | None = None) -> dict[WeightKey, Tensor]:
        """The keep masks that prune the first floor(ratio * n) of each group; nothing is read from the device."""
        keep = {}
        for (module, factor), ranks in (self.rank() if order is None else order).items():
            along, components = RANK_DIMENSION[factor], _ranks(self.pairs[module])
            groups = torch.split(ranks, components, dim=along)
            kept = [group >= prune_count(prune_ratio, group.numel()) for group in groups]
            keep[module, factor] = torch.cat(kept, dim=along)
        return keep


def _ranks(pair: LoraPair) -> list[int]:
    """How many rank-one components each adapter has in a pair: their weights compete among themselves."""
    return [segment.rank for segment in pair.segments] or [pair.rank]


def _factors_of(pairs: Mapping[str, LoraPair | InputNorms]) -> dict[WeightKey, Tensor]:
    """What pairs hold of each factor."""
    return {(module, factor): getattr(pair, factor) for module, pair in pairs.items() for factor in FACTORS}


def named(prefix: str, tensors: Mapping[WeightKey, Tensor]) -> dict[str, Tensor]:
    """Tensors of the factors by the names that they have in a checkpoint."""
    return {f"{prefix}{factor}.{module}": tensor for (module, factor), tensor in tensors.items()}


def of_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[WeightKey, Tensor]:
    """What `named` named, among other tensors."""
    keys = {name: name.removeprefix(prefix).split(".", 1) for name in tensors if name.startswith(prefix)}
    return {(module, factor): tensors[name] for name, (factor, module) in keys.items()}


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


def prune(weights: AdapterWeights, ratio: float, mask: MaskSettings | None = None) -> AdapterWeights:
    """Set the least important weights of an adapter to zero; the others keep their values, and nothing is trained.

    Among the weights that compete with each other, the floor(ratio * n) least important go. `PrunedTraining` begins with the same
    mask, where it is given the adapter's `segments_of`.

    Args:
        weights: module name -> its pair, A [rank, d_in] and B [d_out, rank]. They are left as they are.
        ratio: share of the weights that become zero, a fraction in [0, 1].
        mask: the score; None takes `MaskSettings()`: by magnitude, within each factor of each adapter.

    Returns:
        A copy of the same shapes, with the same scaling and segments.

    Raises:
        AdapterError: these are no weights of an adapter, or there are none.
        ValueError: the ratio is no such fraction, or the mask's score needs the inputs of each module.

    Paper: masking step of the controller, pruning of the final run.
    """
    mask = MaskSettings() if mask is None else mask
    if not weights or not isinstance(weights, AdapterWeights):
        raise AdapterError(
            f"weights is a {type(weights).__name__}; give those of an adapter with a module or more, such as "
            "read_adapter(folder).weights"
        )
    if mask.needs_inputs:
        raise ValueError(
            f"mask score {quoted(mask.score)} needs the inputs of each module, and prune sees no examples; take 'magnitude', or "
            "train with PrunedTraining, which measures them"
        )
    pruned = {
        name: replace(pair, A=pair.A.detach().clone(), B=pair.B.detach().clone()) for name, pair in weights.items()
    }
    MaskSet(pruned, mask).commit(ratio)
    return AdapterWeights(pruned)
