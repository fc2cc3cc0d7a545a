"""Prune an adapter at a given ratio, with no training. Paper: masking step of the controller, pruning of the final run."""

from dataclasses import replace
from numbers import Real

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.masks import MaskSet, MaskSettings
from grasp_lora.text.display import quoted


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
        ValueError: the ratio is no such fraction, the mask is no `MaskSettings`, or its score needs the inputs of each module.

    Paper: masking step of the controller, pruning of the final run.
    """
    mask = MaskSettings() if mask is None else mask
    if not isinstance(weights, AdapterWeights):
        raise AdapterError(
            f"weights is a {type(weights).__name__}; give those of an adapter, such as read_adapter(folder).weights"
        )
    if not isinstance(ratio, Real) or not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio is {quoted(ratio)}; it must be a fraction in [0, 1], such as learned.ratio")
    if not isinstance(mask, MaskSettings):
        raise ValueError(f"mask is {quoted(mask)}; give MaskSettings(score)")
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
