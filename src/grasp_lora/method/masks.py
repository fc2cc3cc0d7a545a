"""Which weights of a LoRA adapter are pruned: exact-count keep masks and the set of live masks.

A keep mask is True where a weight is kept. Masks and stashed values of all modules on one device lie in a row, so a step's mask
takes a handful of tensor operations whatever the number of modules, and nothing is read from the device. The weights are whole in
every process, also where the backbone under them is split.
Paper: masking step of the controller, pruning of the final run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from grasp_lora.errors import AdapterError
from grasp_lora.method.importance import InputNorms, ScoreOrName, importance, score_pair
from grasp_lora.method.lora import LoraPair, Segment
from grasp_lora.method.ranking import Groups, Ranking, WeightKey, in_a_row, views

MASK_MODES = ("hold", "reselect")  # one mask for a whole training, or another after each optimizer step
FACTORS = ("A", "B")
KEEP, STASH, NORMS = "keep.", "stash.", "norms."  # what begins the names of tensors in a checkpoint


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

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    score: ScoreOrName = "magnitude"

    def __post_init__(self) -> None:
        importance(self.score)

    @property
    def needs_inputs(self) -> bool:
        """Whether the score needs the norms of each module's inputs."""
        return importance(self.score).needs_inputs


RANK_DIMENSION = {"A": 0, "B": 1}


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

    Raises:
        AdapterError: there are no pairs, two modules share a factor, or a factor is sharded.
    """

    def __init__(self, pairs: Mapping[str, LoraPair], settings: MaskSettings) -> None:
        if not pairs:
            raise AdapterError("there are no LoRA weights to mask; give a model with a LoRA adapter")
        self.settings = settings
        self.pairs = dict(pairs)
        self.norms: dict[str, InputNorms] = {}
        self.ratio = 0.0
        weights = {(module, factor): getattr(pair, factor) for module, pair in pairs.items() for factor in FACTORS}
        if len({id(weight) for weight in weights.values()}) < len(weights):
            raise AdapterError("two modules share a LoRA factor; masks need separate ones")
        places: dict[tuple[torch.device, torch.dtype], dict[WeightKey, Tensor]] = {}
        for key, weight in weights.items():
            if hasattr(weight, "full_tensor"):
                raise AdapterError(
                    f"factor {key[1]} of {key[0]} is sharded (a DTensor), but masks need whole adapters; "
                    "train with DDP (plain torchrun), or shard the backbone alone"
                )
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
        weights = {(module, factor): getattr(pair, factor) for module, pair in pairs.items() for factor in FACTORS}
        return weights.keys() == self.weights.keys() and all(weights[key] is self.weights[key] for key in weights)

    @torch.no_grad()
    def are_on(self) -> bool:
        """Whether every masked weight is zero."""
        return not any(bool(((block.read() != 0) & ~block.keep).any()) for block in self._blocks)

    def checksums(self) -> list[int]:
        """Return the sum of the bytes of each factor, which tells whether something else has changed the weights since."""
        return [int(weight.detach().contiguous().view(torch.uint8).sum()) for weight in self.weights.values()]

    @torch.no_grad()
    def rank(self) -> Ranking:
        """Score all weights as they are now, stashed ones with their stashed values, and rank them within their groups."""
        scores = self._scores()
        in_order = in_a_row([scores[key] for key in self.weights], self._device)
        return Ranking(self._groups.places(in_order), self._groups, self._shapes)

    def ranking_of(self, places: Mapping[WeightKey, Tensor]) -> Ranking:
        """The ranking whose places these are: those of a checkpoint."""
        return Ranking(in_a_row([places[key] for key in self.weights], self._device), self._groups, self._shapes)

    def keep_masks(self, prune_ratio: float, ranking: Ranking | None = None) -> dict[WeightKey, Tensor]:
        """Build the keep masks at a ratio: in each group the floor(ratio * n) least important weights are False.

        Args:
            prune_ratio: fraction in [0, 1].
            ranking: of `rank()`, to build several masks from one scoring.
        """
        return self._views(self._keep_at(prune_ratio, ranking))

    @torch.no_grad()
    def commit(self, prune_ratio: float, ranking: Ranking | None = None) -> None:
        """Prune at a ratio for good: revive what the new mask keeps, stash and zero what it does not."""
        for number, (block, keep) in enumerate(zip(self._blocks, self._keep_at(prune_ratio, ranking), strict=True)):
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
        if not 0.0 <= prune_ratio <= 1.0:  # before the stash is given up
            raise ValueError(f"prune_ratio is {prune_ratio}; it must lie in [0, 1]")
        for block in self._blocks:
            block.stash.zero_()
            block.keep.fill_(True)
        for block, keep in zip(self._blocks, self._keep_at(prune_ratio), strict=True):
            block.prune(block.read().clone(), keep)
            block.keep = keep
        self.ratio = prune_ratio

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of masked weights, so that their optimizer moments stay zero too."""
        for block in self._blocks:
            gradients = {key: weight.grad for key, weight in block.weights.items() if weight.grad is not None}
            if gradients:
                block.read(gradients).masked_fill_(~block.keep, 0.0)
                block.write(gradients)

    @contextmanager
    def probe(self, prune_ratio: float, ranking: Ranking | None = None) -> Iterator[None]:
        """Prune at a candidate ratio inside the context; afterwards every weight is bit for bit what it was."""
        with torch.no_grad():
            masks = self._keep_at(prune_ratio, ranking)
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
        norms = {(module, f): getattr(norms, f) for module, norms in self.norms.items() for f in FACTORS}
        return named(KEEP, self.keep) | named(STASH, self.stash) | named(NORMS, norms)

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], ratio: float) -> None:
        """Take up the state of another set over the same modules; the weights have to be those of that moment.

        Raises:
            ValueError: the state is of other modules or shapes.
        """
        keep, stash = of_prefix(KEEP, state), of_prefix(STASH, state)
        for prefix, saved in ((KEEP, keep), (STASH, stash)):
            if {key: t.shape for key, t in saved.items()} != self._shapes:
                raise ValueError(
                    f"the saved masks ({prefix[:-1]}) are of another adapter; resume with the one they belong to"
                )
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
    def _shapes(self) -> dict[WeightKey, torch.Size]:
        return {key: weight.shape for key, weight in self.weights.items()}

    def _views(self, flat: Sequence[Tensor]) -> dict[WeightKey, Tensor]:
        """Tensors in a row, one a block, as tensors shaped as the factors."""
        parts = zip(flat, self._blocks, strict=True)
        return {key: view for tensor, block in parts for key, view in views(tensor, block.shapes).items()}

    def _keep_at(self, prune_ratio: float, ranking: Ranking | None = None) -> Sequence[Tensor]:
        """The keep masks at a ratio in a row, one a block."""
        keep = (self.rank() if ranking is None else ranking).keep(prune_ratio)
        if len(self._blocks) == 1:
            return [keep]
        parts = torch.split(keep, [block.size for block in self._blocks])
        return [part.to(block.keep.device) for part, block in zip(parts, self._blocks, strict=True)]

    @cached_property
    def _groups(self) -> Groups:
        return Groups(self.pairs, self._shapes, self._device)

    def _scores(self) -> dict[WeightKey, Tensor]:
        scores, dense = {}, self.dense()
        for module, pair in self.pairs.items():
            parts = replace(pair, A=dense[module, "A"], B=dense[module, "B"]).parts()
            scored = [score_pair(part, self.settings.score, self.norms.get(module)) for part in parts]
            for factor, found in zip(FACTORS, zip(*scored, strict=True), strict=True):
                scores[module, factor] = torch.cat(found, dim=RANK_DIMENSION[factor])
        return scores


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
