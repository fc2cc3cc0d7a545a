"""Importance scores of LoRA weights: what is pruned first. A score is a row of `SCORES`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grasp_lora.errors import RecipeError
from grasp_lora.method.lora import LoraPair
from grasp_lora.text.display import quoted
from grasp_lora.text.names import find


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
        ValueError: the score is unknown, or the norms are missing.
        RecipeError: it gives something else than a number for each weight.
    """
    found = importance(score)
    if found.needs_inputs and norms is None:
        raise ValueError(f"score {quoted(score)} needs input norms; run a calibration pass first")
    dtype = torch.promote_types(pair.A.dtype, torch.float32)
    cast = LoraPair(pair.A.to(dtype), pair.B.to(dtype), pair.scaling, pair.segments)
    scores = found.function(cast, norms if found.needs_inputs else None)
    _check(found, scores, pair)
    return scores


def _check(score: Score, scores: tuple[Tensor, Tensor], pair: LoraPair) -> None:
    """Refuse scores that would prune by position or not at all. Our own are finite, and to look would make a GPU wait."""
    name = quoted(score.name)
    if not isinstance(scores, tuple | list) or len(scores) != 2:
        raise RecipeError(f"mask score {name} gave {quoted(scores)}; it must give two tensors, shaped as A and as B")
    for factor, given, weights in zip("AB", scores, (pair.A, pair.B), strict=True):
        shape = tuple(given.shape) if isinstance(given, Tensor) else quoted(given)
        if shape != tuple(weights.shape):
            raise RecipeError(
                f"mask score {name} gave {shape} for factor {factor} of shape {tuple(weights.shape)}; it must give a tensor of "
                "the factor's shape"
            )
        # Weights that are not finite are no fault of the score.
        if score not in SCORES.values() and not given.isfinite().all() and weights.isfinite().all():
            raise RecipeError(
                f"mask score {name} gave {int((~given.isfinite()).sum())} of {given.numel()} numbers for factor {factor} not "
                "finite; it must give a finite number >= 0 for each weight"
            )
