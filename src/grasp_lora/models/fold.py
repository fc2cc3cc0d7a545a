"""An adapter folded into the backbone's own weights, which then need no PEFT."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.shrinking import rounded
from grasp_lora.models.linear import is_conv1d
from grasp_lora.models.precision import is_quantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RoundingError:
    """What rounding the folded weights W + delta cost, over the modules of the adapter, as Frobenius norms.

    Args:
        of_weights: ||rounding|| / ||W + delta||.
        of_delta: ||rounding|| / ||delta||: the larger, the less of the adapter is left; 0 where there is no delta.
    """

    of_weights: float
    of_delta: float


@torch.no_grad()
def fold(model: "PreTrainedModel", weights: AdapterWeights, dtype: torch.dtype) -> RoundingError:
    """Add an adapter's delta to the backbone's weights, in place, and round all of its weights to a dtype.

    Each sum is formed in float64 and rounded once. An output layer that shares its weight with the input embedding is given
    its own where the adapter changes it: the change is not one of the embedding.

    Args:
        model: the backbone without adapters, best loaded in float32: what was rounded on loading is lost.
        weights: an adapter that fits it (see `check_fits`).
        dtype: of all weights afterwards.

    Raises:
        AdapterError: the backbone is quantised, a weight is shared in another way, or a number is too large for the dtype.
    """
    if is_quantised(model.config):
        raise AdapterError(
            "the backbone is quantised, so nothing can be added to its weights; name its full-precision model with --backbone"
        )
    errors, sizes, deltas = [], [], []
    for name, pair in weights.items():
        module: Any = model.get_submodule(name)
        _own_weight(model, name, module)
        delta = pair.scaling * (pair.B.double() @ pair.A.double())
        exact = module.weight.double() + (delta.T if is_conv1d(module) else delta).to(module.weight.device)
        module.weight.data = rounded(exact, dtype, f"{name}.weight")
        errors.append(float((module.weight.double() - exact).norm()))
        sizes.append(float(exact.norm()))
        deltas.append(float(delta.norm()))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = rounded(parameter, dtype, name)
    model.config.dtype = dtype
    error, size, change = (math.hypot(*norms) for norms in (errors, sizes, deltas))
    return RoundingError(error / size if size else 0.0, error / change if change else 0.0)


def _own_weight(model: Any, name: str, module: Any) -> None:
    """Untie an output layer from the input embedding; nothing else that is shared can be folded into."""
    sharers = [
        other
        for other, candidate in model.named_modules()
        if candidate is not module and any(p is module.weight for p in candidate.parameters(recurse=False))
    ]
    if not sharers:
        return
    if module is not model.get_output_embeddings() or len(sharers) > 1:
        raise AdapterError(
            f"{name} shares its weight with {', '.join(sharers)}, so its delta cannot be folded in; export without --fold"
        )
    module.weight = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.config.get_text_config(decoder=True).tie_word_embeddings = False
