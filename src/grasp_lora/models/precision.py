"""The number formats of a backbone: what it computes in, and weights of fewer bits, quantised while they are read or saved so."""

import importlib.util
import logging
from typing import TYPE_CHECKING, Any, Literal

import torch

from grasp_lora.errors import GraspError
from grasp_lora.models.settings import QUANTISERS
from grasp_lora.storage.network import no_network
from grasp_lora.text.display import quoted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

UNTRAINABLE = {"hqq": "HQQ", "torchao": "torchao"}  # method of a saved model -> as people call it
AT_ONCE = 1 << 24  # numbers
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


def find_dtype(device: str, model_type: str = "") -> Literal["bfloat16", "float16", "float32"]:
    """Return the dtype that "auto" stands for, by a fixed rule: the same recipe gives the same numbers on every day.

    bfloat16 on CUDA cards that compute in it and on processors with AMX, where products take a fifth of the time. float16 on
    other CUDA cards (T4, V100), but for Gemma: hidden states of Gemma 3 270M reach 1e5, and float16 ends at 65,504. float32
    elsewhere: processors without AMX are slower in bfloat16 than in float32 (`lab/log.md`).

    Args:
        device: "cpu", "cuda" or "cuda:N".
        model_type: of the backbone's config.
    """
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        return "float32" if model_type.startswith("gemma") else "float16"
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if capabilities.get("amx_bf16") else "float32"


def computes_in(dtype: str, device: str) -> bool:
    """Whether a device computes in a number format itself: by way of another one a processor takes eight times as long.

    Args:
        dtype: "bfloat16", "float16" or "float32".
        device: "cpu", "cuda" or "cuda:N".
    """
    if device != "cpu":
        return dtype != "bfloat16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "float32":
        return True
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return dtype == "bfloat16" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def is_quantised(config: "PretrainedConfig") -> bool:
    """Whether a backbone's weights are stored in fewer bits than they are computed with."""
    return getattr(config, "quantization_config", None) is not None


def quantiser(name: str, config: "PretrainedConfig", dtype: torch.dtype) -> Any:
    """Return what `from_pretrained` takes as `quantization_config`.

    Args:
        name: a key of `QUANTISERS`.
        config: of the backbone, which must not be quantised yet.
        dtype: what is computed in.

    Raises:
        GraspError: the backbone comes quantised, or the library is not installed.
    """
    library = QUANTISERS[name]
    if is_quantised(config):
        raise GraspError(
            f"backbone.quantise is {name!r}, but the backbone comes quantised ({quoted(_kind(config))}), and is taken as it is: "
            "leave backbone.quantise out"
        )
    if importlib.util.find_spec(library) is None:
        raise GraspError(
            f'backbone.quantise is {name!r}, which needs {library}: run pip install "grasp-lora[quant]", or leave it out'
        )
    # It warns at each product that activations are rounded to float16.
    logging.getLogger(library).setLevel(logging.ERROR)
    with no_network(True):  # bitsandbytes fetches compiled code from the hub where it can
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig

        if name == "int8":
            given: dict[str, Any] = {"load_in_8bit": True}
        else:
            given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return BitsAndBytesConfig(**given)  # type: ignore[no-untyped-call]


def refuse_untrainable(config: "PretrainedConfig") -> None:
    """Refuse a backbone that was saved in a way nothing can be trained on here.

    Raises:
        GraspError: it was; the message names the way.
    """
    if is_quantised(config) and (name := UNTRAINABLE.get(_kind(config))):
        raise GraspError(
            f"The backbone comes quantised by {name}, on which no adapter is trained here: take its full-precision model, with "
            f"backbone.quantise {' or '.join(QUANTISERS)} where memory is short"
        )


def keep_exact(model: torch.nn.Module) -> None:
    """Let bitsandbytes' layers compute on a processor in eval mode as they do in training.

    By default a 4-bit layer on a processor with AVX512-BF16 packs its weight for a kernel without backward as soon as it is
    evaluated, and no later training would change anything; an 8-bit layer rounds activations to 8 bits, in eval mode alone.
    """
    for module in model.modules():
        layer: Any = module
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        state = getattr(layer, "state", None)
        if hasattr(state, "has_fp16_weights") and layer.weight.device.type == "cpu":
            always = property(lambda _: True, lambda _, value: None)
            state.__class__ = type("Exact", (state.__class__,), {"is_training": always})


def weight_sum(model: torch.nn.Module) -> int | None:
    """Add up the stored numbers of all parameters as integers, LoRA layers left out: exact, in whatever order; None if split.

    Scales that a quantiser keeps beside its codes are left out.
    """
    named = [(name, one) for name, one in model.named_parameters() if ".lora_" not in name]
    if any(hasattr(one, "full_tensor") for _, one in named):
        return None
    total = 0
    for part in (one.detach().contiguous() for _, one in named):
        numbers = part.view(INTEGERS[part.element_size()]).flatten()
        for first in range(0, numbers.numel(), AT_ONCE):  # a sum in int64 makes a copy of what it adds up
            total += int(numbers[first : first + AT_ONCE].sum(dtype=torch.int64))
    return total


def _kind(config: "PretrainedConfig") -> str:
    """How a quantised backbone was quantised."""
    found: Any = config.quantization_config  # a dict in a file, an object once it is loaded
    found = found if isinstance(found, dict) else found.to_dict()
    return str(getattr(found.get("quant_method"), "value", found.get("quant_method")))
