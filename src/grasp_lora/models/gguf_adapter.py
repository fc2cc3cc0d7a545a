"""An adapter as a GGUF file, as llama.cpp and Ollama read it.

Source: `convert_lora_to_gguf.py` of llama.cpp, whose tensors these are for the models of `ARCHITECTURES`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GGUF_FILE = "adapter.gguf"
ARCHITECTURES = {  # what transformers calls a kind of model -> what llama.cpp does
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "llama": "llama", "mistral": "llama", "phi3": "phi3",
    "qwen2": "qwen2", "qwen3": "qwen3",
}  # fmt: skip
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_gguf(file: Path, weights: AdapterWeights, model: "PreTrainedModel", dtype: str) -> None:
    """Write an adapter for llama.cpp.

    llama.cpp divides one alpha by each module's own rank. Where that is not a module's scaling, B is scaled to make up for it.

    Args:
        file: to write.
        weights: the adapter.
        model: the backbone.
        dtype: a key of `STORED`.

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
    architecture = next(one for one, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
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


def _in_pairs(B: Tensor, heads: int) -> Tensor:
    """Order rows as llama.cpp rotates a Llama's: each with its neighbour, where transformers takes the halves of a head.

    Args:
        B: [heads * head size, rank].
    """
    rows, rank = B.shape
    return B.reshape(heads, 2, rows // heads // 2, rank).swapaxes(1, 2).reshape(rows, rank)
