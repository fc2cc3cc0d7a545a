"""What large models need of memory, estimated from the sizes of their configs alone: the table of docs/guide/scaling.md.

    python benchmarks/memory_table.py --tokens 512

One training example of so many tokens at a time, 32 of them with a label, an adapter of rank 16 on q and v. No weights are made.
"""

import argparse
import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grasp_lora.bench.memory import GIGABYTE, Shape, Stage, shape_of
from grasp_lora.models.settings import LoraSettings

MODELS = {  # width, of the MLP, layers, heads, heads of keys, vocabulary, whether the output layer is the embedding
    "Llama 3.2 1B": (2048, 8192, 16, 32, 8, 128256, True),
    "Llama 3 8B": (4096, 14336, 32, 32, 8, 128256, False),
    "Llama 3 70B": (8192, 28672, 80, 64, 8, 128256, False),
}
KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SETTINGS = {"float32": (4, None), "bfloat16": (2, None), "int8": (2, "int8"), "nf4": (2, "nf4")}
SHARDS = 8
LABELS, RANK = 32, 16


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    head = ["model", "tokens", *SETTINGS, "nf4, checkpointing", f"bfloat16, {SHARDS} shards, checkpointing"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for name in MODELS:
        cells = [f"{size / GIGABYTE:.1f}" for size in needs(shape(name, options.tokens), options.tokens)]
        lines.append(f"| {' | '.join([name, str(options.tokens), *cells])} |")
    sys.stdout.write("\n".join(lines) + "\n")


def shape(name: str, tokens: int) -> Shape:
    """The sizes of a model of the table, counted on the device `meta`."""
    *sizes, tied = MODELS[name]
    values: dict[str, Any] = dict(zip(KEYS, sizes, strict=True))
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**values, tie_word_embeddings=tied))
    return shape_of(model.requires_grad_(False), LoraSettings(), tokens)


def needs(sizes: Shape, tokens: int) -> list[float]:
    """Bytes in the order of the table's columns.

    >>> len(needs(shape("Llama 3.2 1B", 8), 8))
    6
    """
    plain, again = (Stage("final", tokens, LABELS, RANK, checkpointing) for checkpointing in (False, True))
    shard = sizes.weights(2, None) / SHARDS
    gathered = 2 * 2 * sizes.linear / sizes.layers  # two layers at a time, of two bytes a number
    return [
        *(sizes.need(plain, number, quantise).total for number, quantise in SETTINGS.values()),
        sizes.need(again, 2, "nf4").total,
        sizes.need(again, 2, weights=shard).total + gathered,
    ]


if __name__ == "__main__":
    main()
