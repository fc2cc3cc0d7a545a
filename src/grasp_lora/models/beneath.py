"""A frozen adapter beneath the one that is trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.models.adapters import check_target_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def beneath(model: "PreTrainedModel", weights: AdapterWeights) -> Iterator[None]:
    """Let a frozen adapter act on the backbone's modules for the length of the context.

    A PEFT adapter that is attached meanwhile is trained on top of it. What the two do together is their exact sum, so their
    merge by the rule `exact` at weights of 1 is the model that was trained.

    Raises:
        AdapterError: the backbone lacks one of the modules.
    """
    check_target_modules(model, tuple(weights))
    modules, handles = dict(model.named_modules()), []
    for name, pair in weights.together().items():
        handles.append(modules[name].register_forward_hook(_adds(pair)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adds(pair: LoraPair) -> Any:
    """A hook that adds scaling * B @ A @ x to a layer's output, computed in the factors' precision as PEFT does."""
    placed: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if output.device not in placed:
            placed[output.device] = (pair.A.to(output.device), pair.B.to(output.device))
        A, B = placed[output.device]
        change = linear(linear(inputs[0].to(output.device, A.dtype), A), B)
        return output + (change * pair.scaling).to(output.dtype)

    return add
