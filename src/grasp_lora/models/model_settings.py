"""Settings of backbones, fresh adapters and answers, importable without torch so that the command line starts at once.

Ranges are checked by pydantic, where a recipe or a command is read.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from grasp_lora.data.data_settings import Texts

EMBEDDED_NAME = "gemma3-270m"
ALL_LINEAR = "all-linear"  # PEFT's word
EMBEDDED_ADAPTER = "english-qa"  # a source adapter for the embedded model, which is included
EMBEDDED_ADAPTERS = (EMBEDDED_ADAPTER, "demo-ar-qa", "demo-zh-qa")  # the others are the demo's target adapters
EMBEDDED_HUB_ID = "google/gemma-3-270m"
EMBEDDED_LICENCE = "gemma"  # as the hub calls it
QUANTISERS = {"nf4": "bitsandbytes", "int8": "bitsandbytes"}  # -> the library that does it


@dataclass(frozen=True)
class BackboneSettings:
    """Which model to start from, and how to load it.

    Args:
        name: "gemma3-270m" (the embedded default), a local folder, or a Hugging Face hub id. A model that was saved quantised is
            loaded as it is.
        dtype: what the weights are loaded in, or computed in if they are quantised; "auto" takes bfloat16 on CUDA cards that
            have it and on processors with AMX or of AMD with AVX512-BF16, float16 on other CUDA cards (float32 for Gemma, whose
            numbers it cannot hold), else float32.
        quantise: store the weights of the linear layers, but not the output layer, in fewer bits: `nf4` (4 bits) and `int8` by
            bitsandbytes; None as they are.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the Python code that comes with the model; needs `--allow-code`, too.
        device: "auto" takes a CUDA GPU where there is one.
        shard: split the weights over the processes that torchrun starts, each of which holds its part; for models that are too
            large for one GPU.
        gradient_checkpointing: compute activations again in each backward pass, in all trainings: slower, with less memory.
    """

    name: str = EMBEDDED_NAME
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantise: Literal["nf4", "int8"] | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    shard: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class LoraSettings:
    """A fresh LoRA adapter.

    Args:
        rank: r, >= 1.
        alpha: numerator of the scaling alpha / r, > 0.
        dropout: on the adapter's input, in [0, 1).
        target_modules: names or name endings of the modules to adapt, or `all-linear` for all linear ones but the output layer.

    Paper: r 8, alpha 32, dropout 0.05, q_proj and v_proj.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: Annotated[Texts, Field(min_length=1)] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are decoded; always greedy, whatever the model's own generation config says.

    No training answer is empty, so none is here: white space at the start is skipped, and an end token has to wait for a text. A
    stop text does not wait.

    Args:
        max_new_tokens: longest answer, >= 1.
        stop: texts that end an answer; they are cut off, with all that follows. A special token of the tokenizer, such as
            `<|im_end|>`, is an end token.

    Raises:
        ValueError: a stop text spells a line break with a backslash.
    """

    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ("\n",)

    def __post_init__(self) -> None:
        for text in self.stop:
            if re.search(r"\\[nt](?![a-z])", text):  # LaTeX's \nabla may be meant
                raise ValueError(
                    f'stop contains {text!r}, a backslash and a letter: write a line break as ["\\n"], in double quotes, in '
                    "YAML, and as $'\\n' in bash"
                )
