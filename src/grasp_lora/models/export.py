"""An adapter made ready for programs that do not read PEFT folders: folded into its backbone, or as a GGUF file.

The folder appears whole or not at all.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from grasp_lora.errors import AdapterError, RecipeError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.models.adapter_files import LoadedAdapter, read_adapter
from grasp_lora.models.adapters import attached, check_fits
from grasp_lora.models.backbone import Backbone, backbone_of, is_quantised
from grasp_lora.storage.claims import new_folder, refuse_existing
from grasp_lora.text.names import needs, without_place

CARD_FILE = "README.md"
GGUF_FILE = "adapter.gguf"
ARCHITECTURES = {  # what transformers calls a kind of model -> what llama.cpp does
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "llama": "llama", "mistral": "llama", "phi3": "phi3",
    "qwen2": "qwen2", "qwen3": "qwen3",
}  # fmt: skip
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # number format -> what GGUF calls it


def export_folder(
    place: str,
    output: Path,
    *,
    fold: bool = False,
    gguf: bool = False,
    dtype: str | None = None,
    backbone: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """Write the backbone of an adapter with the adapter folded in, or the adapter as `adapter.gguf`, into a new folder.

    Args:
        place: PEFT adapter: a folder or a hub id.
        output: a folder that does not exist or is empty.
        fold, gguf: one of the two.
        dtype: number format: float32, float16 or bfloat16; None is float32 for a GGUF file; with `fold` it has to be given.
        backbone, revision, trust_remote_code: of what to check the adapter against, as in a recipe's `backbone`; None takes the
            one that it names.

    Returns:
        Lines for the user: what was written, what it cost, which programs take it.

    Raises:
        GraspError: the adapter, its backbone, a setting or the output does not fit. Nothing is written then.
    """
    problem = None
    if fold == gguf:
        problem = (
            "give --fold (the whole model with the adapter in it) or --gguf (for llama.cpp and Ollama), one of them"
        )
    elif dtype not in STORED and (fold or dtype is not None):
        problem = f"--dtype is {dtype!r}; say in which format to write: {', '.join(STORED)}"
    if problem:
        raise RecipeError(f"{problem}; PEFT takes the adapter as it is")
    refuse_existing(output)
    if gguf:
        needs("--gguf", "gguf", "the package gguf", extra="gguf")
    adapter = read_adapter(place)
    loaded = backbone_of(
        adapter, backbone, "cpu", "float32" if fold else _dtype_read(adapter), revision, trust_remote_code, whole=fold
    )
    check_fits(adapter, loaded, strict=gguf)
    written = dtype or "float32"
    lost = _fold(loaded.model, adapter.weights, getattr(torch, written)) if fold else 0.0
    with new_folder(output) as draft:
        if fold:
            lines = _write_model(draft, adapter, loaded, written)
            lines.append(f"rounding: relative error {lost:.3g} of the delta")
        else:
            _write_gguf(draft / GGUF_FILE, adapter.weights, loaded.model, written)
            lines = [f"llama.cpp: --lora {GGUF_FILE}; Ollama: ADAPTER ./{GGUF_FILE} in a Modelfile"]
        origin = f"Exported from the adapter {adapter.name} (sha256:{adapter.sha256})."
        listed = "".join(f"- {line}\n" for line in lines)
        (draft / CARD_FILE).write_text(f"{origin}\n\n{listed}", encoding="utf-8")
    return lines


def _dtype_read(adapter: LoadedAdapter) -> str:
    """What a backbone is loaded in that is only looked at: the smallest that shows whether it is the adapter's."""
    # Codes, and what float16 rounds, depend on the format; codes made in float16 are only warned of, see `check_fits`.
    depends = adapter.info.backbone_quantised != adapter.info.backbone_float16
    return (adapter.info.backbone_dtype if depends else None) or "bfloat16"


def _fold(model: Any, weights: AdapterWeights, dtype: torch.dtype) -> float:
    """Add an adapter to the weights of a backbone by PEFT and round them all to a dtype.

    A small delta can drown in the rounding of bfloat16. So the error is given: ||rounded - exact|| / ||delta||, Frobenius norms
    over the modules of the adapter.

    Raises:
        AdapterError: the backbone, in float32 and without adapters, is quantised, or a number is too large for the dtype.
    """
    if is_quantised(model.config):
        raise AdapterError(
            "the backbone is quantised, so nothing can be added to its weights; name its full-precision model with --backbone"
        )
    head: Any = model.get_output_embeddings()
    if head is not None and any(model.get_submodule(name) is head for name in weights):
        # PEFT would change a tied embedding, too.
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = model.config.get_text_config(decoder=True).tie_word_embeddings = False
    with attached(model, weights) as adapted:
        whole: Any = adapted
        whole.merge_and_unload()
    exact = {name: model.get_submodule(name).weight.detach() for name in weights}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.to(dtype)
            if not parameter.isfinite().all():
                raise AdapterError(f"{name} holds a value too large for {str(dtype)[6:]}; use bfloat16 or float32")
    model.config.dtype = dtype
    errors = (float((model.get_submodule(name).weight.float() - before).norm()) for name, before in exact.items())
    change = math.hypot(*(float(pair.delta().norm()) for pair in weights.values()))
    return math.hypot(*errors) / change if change else 0.0


def _write_model(draft: Path, adapter: LoadedAdapter, backbone: Backbone, dtype: str) -> list[str]:
    name = without_place(adapter.base_model or backbone.base_model)
    backbone.model.name_or_path = backbone.model.config._name_or_path = name
    backbone.tokenizer.name_or_path = name
    backbone.model.save_pretrained(draft)
    for file in draft.glob("*.safetensors"):  # which nobody but the owner may read
        shutil.copymode(draft / "config.json", file)
    backbone.tokenizer.save_pretrained(draft)
    size = sum(file.stat().st_size for file in draft.glob("*.safetensors")) / 1e6
    return [
        f"model: {adapter.name} folded into {len(adapter.weights)} modules of {name}, {dtype}, {size:.2f} MB",
        "vLLM, llama.cpp: take it as they take its backbone (convert_hf_to_gguf.py)",
    ]


def _write_gguf(file: Path, weights: AdapterWeights, model: Any, dtype: str) -> None:
    """Write an adapter for llama.cpp. Source: `convert_lora_to_gguf.py` of llama.cpp, whose tensors these are.

    llama.cpp divides one alpha by each module's own rank. Where that is not a module's scaling, B is scaled to make up for it.

    Raises:
        AdapterError: the kind of model, or a module of it, is not among those that are known to convert.
    """
    import gguf

    config = model.config.get_text_config(decoder=True)
    name = ARCHITECTURES.get(config.model_type)
    if name is None:
        raise AdapterError(
            f"--gguf knows adapters of {', '.join(ARCHITECTURES)}, and this backbone is a {config.model_type}; leave it out and "
            "give the result to convert_lora_to_gguf.py of llama.cpp"
        )
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    tensors = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    alpha = max(pair.scaling * pair.rank for pair in weights.values())
    stored = gguf.GGMLQuantizationType[STORED[dtype]]
    writer = gguf.GGUFWriter(file, name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for module, pair in weights.items():
        tensor = tensors.get_name(module)
        if tensor is None or module == "lm_head":  # the output layer is often the embedding, which takes no adapter
            raise AdapterError(f"--gguf cannot write {module}, which llama.cpp takes no adapter on; use --fold")
        B = pair.B * (pair.scaling * pair.rank / alpha)
        if name == "llama" and module.endswith(("q_proj", "k_proj")):
            B = _in_pairs(B, config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads)
        for ending, factor in (("a", pair.A), ("b", B)):
            data = gguf.quants.quantize(factor.to(torch.float32).contiguous().numpy(), stored)
            writer.add_tensor(f"{tensor}.weight.lora_{ending}", data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _in_pairs(B: torch.Tensor, heads: int) -> torch.Tensor:
    """Order rows as llama.cpp rotates a Llama's: each with its neighbour, where transformers takes the halves of a head.

    Args:
        B: [heads * head size, rank].
    """
    rows, rank = B.shape
    return B.reshape(heads, 2, rows // heads // 2, rank).swapaxes(1, 2).reshape(rows, rank)
