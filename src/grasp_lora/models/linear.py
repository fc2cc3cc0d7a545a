"""The linear modules of a backbone, by the names that PEFT gives them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def linear_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return all of them by their full names."""
    return {name: module for name, module in model.named_modules() if linear_shape(module) is not None}


def linear_shape(module: torch.nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear module, quantised ones included; None for any other module."""
    linear: Any = module
    if is_conv1d(module):
        return linear.nf, linear.nx
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return linear.out_features, linear.in_features
    return None


def is_conv1d(module: torch.nn.Module) -> bool:
    """Tell whether a module stores its weight as [d_in, d_out], as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_named(module: str, targets: tuple[str, ...]) -> bool:
    """Tell whether PEFT takes a module for one of the targets: by its full name or an ending of it."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


def on_output_layer(model: "PreTrainedModel", modules: Iterable[str]) -> bool:
    """Tell whether a name of a module, or an ending of one, is that of the layer that gives the logits."""
    whole: Any = model
    head, modules = whole.get_output_embeddings(), tuple(modules)
    return any(module is head and is_named(name, modules) for name, module in model.named_modules())
