"""Which weights of a LoRA adapter are pruned: importance scores, their ranking, exact keep masks, and the set of live masks.

1. A **score** says how important each weight is: magnitude |w|, or one that looks at what enters the module.
2. Weights **compete** within one factor of one adapter: a merge of a source and a target has four groups in a module.
3. They are **ranked** once by (score, position), so a mask at any ratio is one comparison: counts are exact under ties, and a
   higher ratio only adds weights to the pruned set.
4. A `MaskSet` holds the live parameters. `commit` prunes at a ratio and stashes what it takes, so that a lower ratio can give
   it back; `probe` prunes for the length of a context, and afterwards every weight is bit for bit what it was.

Example: a group with the values 0.1, -3, 0.2, 1 at ratio 0.5 prunes floor(0.5 * 4) = 2 weights, 0.1 and 0.2. At 0.25 it prunes
0.1 alone, and 0.2 comes back from the stash.

A keep mask is True where a weight is kept. All modules on one device lie in a row, so a step takes a handful of tensor operations
whatever their number, and nothing is read from the device.
Paper: masking step of the controller, pruning of the final run.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
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
    """Return each entry's place in the order of importance of its row, 0 for the least, ties by position; int64, same shape."""
    order = scores.argsort(dim=-1, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, places)


class Groups:
    """Who competes with whom: the weights of one adapter's A or B in one module; groups of one size are ranked in one sort.

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
        # A group whose scores are all zero, as of a factor B that did not train, would lose its first output features: it takes a
        # random order that depends on its size alone.
        self._random = [
            torch.randperm(size, generator=torch.Generator().manual_seed(0)).int().to(device) for size in self.sizes
        ]
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


def views(flat: Tensor, shapes: Mapping[WeightKey, torch.Size]) -> dict[WeightKey, Tensor]:
    """Parts of a flat tensor, shaped as factors; what is written to one is written to the other."""
    parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
    return {key: part.view(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}


def in_a_row(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Copy tensors into one flat tensor on a device."""
    return torch.cat([tensor.flatten().to(device) for tensor in tensors])


# 4. Live masks


class _Block:
    """The weights of one device and dtype: their values pass through one flat tensor, beside which mask and stash lie.

    Args:
        weights: the parameters, changed in place.
    """

    def __init__(self, weights: Mapping[WeightKey, Tensor]) -> None:
        self.weights = weights
        self.shapes = {key: weight.shape for key, weight in weights.items()}
        first = next(iter(weights.values()))
        self.size = sum(weight.numel() for weight in weights.values())
        self.values = torch.empty(self.size, dtype=first.dtype, device=first.device)
        self.keep = torch.ones_like(self.values, dtype=torch.bool)
        self.stash = torch.zeros_like(self.values)
        self._views = views(self.values, self.shapes)

    def read(self, tensors: Mapping[WeightKey, Tensor] | None = None) -> Tensor:
        """Copy the weights, or tensors shaped as some of them, to where they lie in a row, and return that."""
        tensors = self.weights if tensors is None else tensors
        torch._foreach_copy_([self._views[key] for key in tensors], list(tensors.values()))
        return self.values

    def write(self, tensors: Mapping[WeightKey, Tensor] | None = None) -> None:
        """Copy what lies in a row back."""
        tensors = self.weights if tensors is None else tensors
        torch._foreach_copy_(list(tensors.values()), [self._views[key] for key in tensors])

    def dense(self) -> Tensor:
        """The weights with stashed values in place of masked ones."""
        return torch.where(self.keep, self.read(), self.stash)

    def prune(self, dense: Tensor, keep: Tensor) -> None:
        """Give the weights these values, zero where they are not kept."""
        torch.where(keep, dense, torch.zeros_like(dense), out=self.values)
        self.write()


class MaskSet:
    """The masks of one adapter's live weights: scores them, prunes, restores, reports.

    Holds the parameters themselves (float LoRA factors, changed in place), a keep mask for each, and a stash with the
    value that each masked weight had, so that a lower ratio can revive it.

    Args:
        pairs: module name -> pair whose A and B are the live parameters, scaling and segments included.
        settings: the score.
    """

    def __init__(self, pairs: Mapping[str, LoraPair], settings: MaskSettings) -> None:
        self.settings = settings
        self.pairs = dict(pairs)
        self.norms: dict[str, InputNorms] = {}
        self.ratio = 0.0
        weights = _factors_of(pairs)
        places: dict[tuple[torch.device, torch.dtype], dict[WeightKey, Tensor]] = {}
        for key, weight in weights.items():
            places.setdefault((weight.device, weight.dtype), {})[key] = weight
        self._blocks = [_Block(block) for block in places.values()]
        self.weights: dict[WeightKey, Tensor] = {k: w for block in self._blocks for k, w in block.weights.items()}
        self._newly_masked = [torch.zeros_like(block.keep) for block in self._blocks]

    @property
    def keep(self) -> dict[WeightKey, Tensor]:
        """The keep mask of each factor."""
        return self._views([block.keep for block in self._blocks])

    @property
    def stash(self) -> dict[WeightKey, Tensor]:
        """The value of each masked weight, zero elsewhere."""
        return self._views([block.stash for block in self._blocks])

    @property
    def newly_masked(self) -> dict[WeightKey, Tensor]:
        """Where the last commit masked a weight that was not masked before, for `reset_moments`."""
        return self._views(self._newly_masked)

    @torch.no_grad()
    def dense(self) -> dict[WeightKey, Tensor]:
        """Return a copy of the factors with stashed values in place of masked ones."""
        return self._views([block.dense() for block in self._blocks])

    def holds(self, pairs: Mapping[str, LoraPair]) -> bool:
        """Whether these are the very parameters that the set masks."""
        weights = _factors_of(pairs)
        return weights.keys() == self.weights.keys() and all(weights[key] is self.weights[key] for key in weights)

    @torch.no_grad()
    def are_on(self) -> bool:
        """Whether every masked weight is zero."""
        return not any(bool(((block.read() != 0) & ~block.keep).any()) for block in self._blocks)

    def checksums(self) -> list[int]:
        """Return the sum of the bytes of each factor, which tells whether something else has changed the weights since."""
        return [int(weight.detach().contiguous().view(torch.uint8).sum()) for weight in self.weights.values()]

    @torch.no_grad()
    def rank(self) -> Tensor:
        """Score all weights as they are now, stashed ones with their stashed values, and rank them within their groups.

        Returns:
            The place of each weight within its group, 0 for the least important, all factors in a row; int32, [weights]. Masks at
            several ratios that are made from one such order nest.
        """
        return self._groups.places(self.in_order(self._scores()))

    def in_order(self, tensors: Mapping[WeightKey, Tensor]) -> Tensor:
        """Tensors shaped as the factors, in a row in the order of the weights, [weights]."""
        return in_a_row([tensors[key] for key in self.weights], self._device)

    @torch.no_grad()
    def commit(self, prune_ratio: float, places: Tensor | None = None) -> None:
        """Prune at a ratio for good: revive what the new mask keeps, stash and zero what it does not.

        Args:
            prune_ratio: fraction in [0, 1]: in each group the floor(ratio * n) least important weights go.
            places: of `rank`; None ranks the weights as they are now.
        """
        for number, (block, keep) in enumerate(zip(self._blocks, self._keep_at(prune_ratio, places), strict=True)):
            dense = block.dense()
            block.prune(dense, keep)
            block.stash = dense.masked_fill_(keep, 0.0)
            self._newly_masked[number] = block.keep & ~keep
            block.keep = keep
        self.ratio = prune_ratio

    @torch.no_grad()
    def enforce(self) -> None:
        """Hold masked weights at zero; call it after every optimizer step."""
        for block in self._blocks:
            block.read().masked_fill_(~block.keep, 0.0)
            block.write()

    @torch.no_grad()
    def reselect(self, prune_ratio: float) -> None:
        """Zero the least important of the weights as they are now, without a stash: the paper's final run.

        A weight pruned earlier may have been moved away from zero by the optimizer and then competes again.
        """
        for block in self._blocks:
            block.stash.zero_()
            block.keep.fill_(True)
        for block, keep in zip(self._blocks, self._keep_at(prune_ratio), strict=True):
            block.prune(block.read().clone(), keep)
            block.keep = keep
        self.ratio = prune_ratio

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of masked weights; where they are masked from the start, their optimizer moments stay zero, too."""
        for block in self._blocks:
            gradients = {key: weight.grad for key, weight in block.weights.items() if weight.grad is not None}
            if gradients:
                block.read(gradients).masked_fill_(~block.keep, 0.0)
                block.write(gradients)

    @contextmanager
    def probe(self, prune_ratio: float, places: Tensor | None = None) -> Iterator[None]:
        """Prune at a candidate ratio inside the context, as `commit` does; afterwards every weight is bit for bit what it was."""
        with torch.no_grad():
            masks = self._keep_at(prune_ratio, places)
            saved = [block.read().clone() for block in self._blocks]
        try:
            with torch.no_grad():
                for block, keep in zip(self._blocks, masks, strict=True):
                    block.prune(block.dense(), keep)
            yield
        finally:
            with torch.no_grad():
                for block, values in zip(self._blocks, saved, strict=True):
                    block.values.copy_(values)
                    block.write()

    def state(self) -> dict[str, Tensor]:
        """Return all that a resume needs beside `ratio` and the weights themselves, by names such as `keep.A.MODULE`."""
        norms = _factors_of(self.norms)
        return named(KEEP, self.keep) | named(STASH, self.stash) | named(NORMS, norms)

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], ratio: float) -> None:
        """Take up the state of another set over the same modules; the weights have to be those of that moment."""
        keep, stash = of_prefix(KEEP, state), of_prefix(STASH, state)
        for block in self._blocks:
            block.keep = in_a_row([keep[key] for key in block.weights], block.keep.device)
            block.stash = in_a_row([stash[key] for key in block.weights], block.keep.device)
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
        zeros = sum(int(((block.read() == 0) & ~block.keep).sum()) for block in self._blocks)
        return zeros / sum(block.size for block in self._blocks)

    @property
    def _device(self) -> torch.device:
        """Where all weights are ranked."""
        return self._blocks[0].values.device

    @cached_property
    def shapes(self) -> dict[WeightKey, torch.Size]:
        """The shape of each factor, in the order of the weights."""
        return {key: weight.shape for key, weight in self.weights.items()}

    def _views(self, flat: Sequence[Tensor]) -> dict[WeightKey, Tensor]:
        """Tensors in a row, one a block, as tensors shaped as the factors."""
        parts = zip(flat, self._blocks, strict=True)
        return {key: view for tensor, block in parts for key, view in views(tensor, block.shapes).items()}

    def _keep_at(self, prune_ratio: float, places: Tensor | None = None) -> Sequence[Tensor]:
        """The keep masks at a ratio in a row, one a block."""
        keep = self._groups.keep(self.rank() if places is None else places, prune_ratio)
        if len(self._blocks) == 1:
            return [keep]
        parts = torch.split(keep, [block.size for block in self._blocks])
        return [part.to(block.keep.device) for part, block in zip(parts, self._blocks, strict=True)]

    @cached_property
    def _groups(self) -> Groups:
        return Groups(self.pairs, self.shapes, self._device)

    def _scores(self) -> dict[WeightKey, Tensor]:
        scores, dense = {}, self.dense()
        for module, pair in self.pairs.items():
            parts = replace(pair, A=dense[module, "A"], B=dense[module, "B"]).parts()
            scored = [score_pair(part, self.settings.score, self.norms.get(module)) for part in parts]
            for factor, blocks in zip(FACTORS, zip(*scored, strict=True), strict=True):
                scores[module, factor] = torch.cat(blocks, dim=RANK_DIMENSION[factor])
        return scores


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
