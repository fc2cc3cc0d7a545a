"""A model that is loaded: its mode, and the adapter inside it with its layers, its live factors, and a copy of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.models.apart import live_pair
from grasp_lora.models.reading import PREFIX
from grasp_lora.text.display import listed, quoted

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
            f"segments names {quoted(strange[0])}, which the adapter does not have; it has {listed(layers)}; take the names of "
            "segments_of, and give the PeftModel itself, not what wraps it"
        )
    for name, layer in layers.items():
        _refuse_other_weights(name, layer, adapter)
        if adapter in layer.lora_embedding_A:
            A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
            pairs[name] = LoraPair(A, B, layer.scaling[adapter], origins.get(name, ()))
        else:
            pairs[name] = live_pair(layer, adapter, origins.get(name, ()))
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
