"""Offline fixtures shared by all tests: a byte-level tokenizer and random two-layer models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads these once
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

torch.set_num_threads(1)

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0, 1, 2, 3
TINY_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
TINY_CONTEXT = 512


def pytest_configure(config: pytest.Config) -> None:
    # peft 0.21 itself reads this attribute in every get_peft_model; transformers 5.24 warns about it.
    config.addinivalue_line("filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per UTF-8 byte, so that any language round-trips; it adds BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=TINY_CONTEXT,
    )


def build_tiny_model(architecture: str, seed: int = 0, vocab_size: int = TINY_VOCAB_SIZE) -> PreTrainedModel:
    """Build a random two-layer float32 model in eval mode; equal seeds give equal weights.

    Args:
        architecture: "llama", "gemma3" (text, sliding window of 16 in its first layer), "qwen3" or "gpt2".
        seed: the global random state is left as it was.
        vocab_size: >= 260 where `tiny_tokenizer` is used.
    """
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": vocab_size}
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": TINY_CONTEXT,
        # Large weights: with the usual 0.02 a random model answers nearly the same whatever it reads.
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel
        if architecture == "llama":
            model = LlamaForCausalLM(LlamaConfig(**shape, **tokens))
        elif architecture == "gemma3":
            layer_types = ["sliding_attention", "full_attention"]
            model = Gemma3ForCausalLM(
                Gemma3TextConfig(**shape, **tokens, sliding_window=16, layer_types=layer_types, query_pre_attn_scalar=8)
            )
        elif architecture == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**shape, **tokens))
        elif architecture == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(
                    n_embd=32,
                    n_inner=64,
                    n_layer=2,
                    n_head=4,
                    n_positions=TINY_CONTEXT,
                    initializer_range=0.2,
                    **tokens,
                )
            )
        else:
            raise ValueError(f"Unknown architecture {architecture!r}: use llama, gemma3, qwen3 or gpt2")
    return model.float().eval()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with pad 0, bos 1, eos 2, unk 3; `save_pretrained` works."""
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., PreTrainedModel]:
    """Give the factory `make_tiny_model(architecture, seed=0, vocab_size=260)`."""
    return build_tiny_model


@pytest.fixture(scope="session")
def tiny_backbone_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Folder with a saved tiny Llama (seed 0, float32) and its tokenizer; treat it as read-only."""
    folder = tmp_path_factory.mktemp("backbone") / "tiny-llama"
    build_tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
