"""The adapter inside a loaded model: its layers, the live factors that train, a copy of them, and a frozen adapter under it.

An ordinary PEFT layer holds one A and one B. Where a merge keeps adapters apart (the released code's merge), each factor's weight
is the sum of one block for each adapter: of two adapters of rank 8 the parameter that trains is A [16, d_in], and what acts is
A[:8] + A[8:]. PyTorch adds the blocks up whenever the weight is read.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils import parametrize

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment, added_up
from grasp_lora.models.adapter_files import PREFIX
from grasp_lora.text.display import listed, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_NAME = "default"  # of those that are put on here


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into eval mode inside the context; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def active_adapter(model: torch.nn.Module) -> str:
    """Return the name of the one LoRA adapter that acts in a PEFT model.

    Raises:
        AdapterError: there is none, or several act at once.
    """
    acting: dict[str, None] = {
        name: None for layer in _every_lora_layer(model).values() for name in layer.active_adapters
    }
    names = [name for name in acting if lora_layers(model, name)]
    if not names:
        raise AdapterError("the model has no LoRA adapter; put one on it with peft.get_peft_model")
    if len(names) > 1:
        raise AdapterError(
            f"the model has {len(names)} active adapters ({', '.join(names)}), and only one can be pruned; "
            f"activate it alone, such as with model.set_adapter({names[0]!r})"
        )
    return names[0]


def live_pairs(
    model: torch.nn.Module, segments: Mapping[str, tuple[Segment, ...]] | None = None
) -> dict[str, LoraPair]:
    """Return the pairs of a PEFT model's active adapter whose A and B are the live parameters themselves.

    Those of an embedding are among them: its weight is stored transposed, [tokens, d_out].

    Args:
        model: a PeftModel, or anything that contains its LoRA layers.
        segments: module name -> origin of its components, where known.

    Raises:
        AdapterError: there is no active adapter, there are several, or one has more weights in a module than A and B.
    """
    origins, adapter = segments or {}, active_adapter(model)
    pairs, layers = {}, lora_layers(model, adapter)
    if strange := [name for name in origins if name not in layers]:
        raise AdapterError(
            f"segments names {quoted(strange[0])}, which the adapter does not have; it has {listed(layers)}; give the PeftModel "
            "itself, not what wraps it"
        )
    for name, layer in layers.items():
        _refuse_other_weights(name, layer, adapter)
        pairs[name] = _live_pair(layer, adapter, origins.get(name, ()))
    return pairs


def live_factors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the factors of a PEFT model's active adapter, the live parameters, named A.MODULE and B.MODULE."""
    return {f"{factor}.{name}": getattr(pair, factor) for name, pair in live_pairs(model).items() for factor in "AB"}


def adapter_weights(
    model: torch.nn.Module, segments: Mapping[str, tuple[Segment, ...]] | None = None
) -> AdapterWeights:
    """Return a copy of a PEFT model's adapter, in float32 on the CPU."""
    pairs = {}
    for name, pair in live_pairs(model, segments).items():
        A, B = (factor.detach().float().cpu().clone() for factor in (pair.A, pair.B))
        pairs[name] = replace(pair, A=A, B=B)
    return AdapterWeights(pairs)


def segments_of(weights: AdapterWeights) -> dict[str, tuple[Segment, ...]]:
    """Return module name -> origin of its components, as `live_pairs` takes it."""
    return {name: pair.segments for name, pair in weights.items()}


def lora_layers(model: torch.nn.Module, adapter: str = ADAPTER_NAME) -> dict[str, Any]:
    """Return module name in the backbone -> PEFT's LoRA layer, for the layers that have this adapter."""
    return {name: layer for name, layer in _every_lora_layer(model).items() if adapter in layer.r}


def _every_lora_layer(model: torch.nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(PREFIX): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


def _refuse_other_weights(module: str, layer: Any, adapter: str) -> None:
    """The method prunes factors: a ratio says nothing of an adapter with other weights, such as DoRA's magnitudes."""
    factors = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    for name, _ in layer.named_parameters():
        kind, *rest = name.split(".")
        if rest[:1] == [adapter] and (kind not in factors or rest[-1] == "bias"):
            raise AdapterError(
                f"{module}.{name} belongs to the adapter, but only the factors A and B can be pruned; "
                "train plain LoRA, without DoRA and lora_bias"
            )


class _Blocks(torch.nn.Module):
    """A parametrization of torch: one factor's blocks, side by side along a dimension."""

    def __init__(self, segments: tuple[Segment, ...], dimension: int) -> None:
        super().__init__()
        self.segments, self.dimension = segments, dimension

    def forward(self, blocks: Tensor) -> Tensor:
        """The weight that acts."""
        return added_up(blocks, len(self.segments), self.dimension)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Blocks of this weight: the first adapter has all of it."""
        return torch.cat([weight, *[torch.zeros_like(weight)] * (len(self.segments) - 1)], self.dimension)


def keep_apart(layer: Any, adapter: str, segments: tuple[Segment, ...]) -> None:
    """Give both factors of a PEFT LoRA layer one block for each segment in place of their weight."""
    for factors, dimension in ((layer.lora_A, 0), (layer.lora_B, 1)):
        parametrize.register_parametrization(factors[adapter], "weight", _Blocks(segments, dimension))


def _live_pair(layer: Any, adapter: str, segments: tuple[Segment, ...]) -> LoraPair:
    """Return the pair of a LoRA layer of linear or embedding, whose A and B are the parameters that train."""
    if adapter in layer.lora_embedding_A:
        return LoraPair(
            layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], layer.scaling[adapter], segments
        )
    A, B, scaling = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
    if parametrize.is_parametrized(A, "weight"):
        of_A, of_B = A.parametrizations.weight, B.parametrizations.weight
        if isinstance(of_A[0], _Blocks):
            return LoraPair(of_A.original, of_B.original, scaling, of_A[0].segments, apart=True)
    return LoraPair(A.weight, B.weight, scaling, segments)


@contextmanager
def frozen_adapter(model: "PreTrainedModel", weights: AdapterWeights) -> Iterator[None]:
    """Let a frozen adapter act on the backbone's modules for the length of the context.

    A PEFT adapter that is attached meanwhile is trained on top of it. What the two do together is their exact sum, so their
    merge by the rule `exact` at weights of 1 is the model that was trained. The backbone has no PEFT adapter yet.
    """
    pairs = weights.together().items()
    handles = [model.get_submodule(name).register_forward_hook(_adds(pair)) for name, pair in pairs]
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
