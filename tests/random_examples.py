"""Examples of random tokens and adapters of random weights, which tests share."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.method.masks import RANK_DIMENSION, prune_count
from grasp_lora.models.adapters import fresh_adapter, save_adapter
from grasp_lora.models.backbone import fingerprint
from grasp_lora.models.live import live_pairs
from grasp_lora.models.model_settings import LoraSettings

TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "gemma3": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
}


@dataclass(frozen=True)
class Example:
    id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


def make_examples(count: int, seed: int = 0, name: str = "e", prompt: tuple[int, int] = (2, 12)) -> list[Example]:
    """Examples of uneven lengths: prompts of as many tokens as `prompt` allows, completions of 1 to 5."""
    generator = random.Random(seed)
    return [
        Example(
            f"{name}{index}",
            tuple(generator.randrange(4, 260) for _ in range(generator.randint(*prompt))),
            (*(generator.randrange(4, 260) for _ in range(generator.randint(0, 4))), 2),
        )
        for index in range(count)
    ]


def naive_losses(model, examples) -> torch.Tensor:
    """Each example alone, unpadded, all logits: the mean negative log-likelihood of its answer's tokens."""
    losses = []
    for example in examples:
        tokens = torch.tensor([[*example.prompt_ids, *example.completion_ids]])
        log_probabilities = model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)[0]
        start = len(example.prompt_ids)
        terms = [-log_probabilities[i - 1, tokens[0, i]] for i in range(start, tokens.shape[1])]
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


def random_like(model, generator: torch.Generator, size: float, **rest) -> AdapterWeights:
    """Random weights in the shapes of a model's LoRA pairs; `rest` are fields of each `LoraPair`."""
    return AdapterWeights(
        {
            name: LoraPair(
                size * torch.randn(pair.A.shape, generator=generator),
                size * torch.randn(pair.B.shape, generator=generator),
                **rest,
            )
            for name, pair in live_pairs(model).items()
        }
    )


def write_uneven_adapter(
    model, folder="adapter", targets=None, size: float = 0.1, name: str = "backbone"
) -> AdapterWeights:
    """Write a random adapter of unequal ranks and scalings on these modules, or on all linear layers but the head."""
    generator, pairs = torch.Generator().manual_seed(5), {}
    for module, layer in model.named_modules():
        linear = isinstance(layer, torch.nn.Linear) and module != "lm_head"
        if module.endswith(targets) if targets else linear:
            shape = layer.weight.shape
            d_out, d_in = shape if isinstance(layer, torch.nn.Linear) else shape[::-1]
            rank = 2 if len(pairs) % 2 else 4
            A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
            pairs[module] = LoraPair(A, size * B, 0.5 + 0.25 * (len(pairs) % 3))
    weights = AdapterWeights(pairs)
    save_adapter(Path(folder), weights, model, backbone_name=name, fingerprint=fingerprint(model), dropout=0.0)
    return weights


def random_adapter(model, architecture: str = "llama") -> AdapterWeights:
    with fresh_adapter(model, LoraSettings(rank=4, target_modules=TARGETS[architecture]), 1) as peft_model:
        return random_like(peft_model, torch.Generator().manual_seed(1), 0.2, scaling=2.0)


def random_merged(backbone, ranks: tuple[int, int], size: float, apart: bool = False) -> AdapterWeights:
    """An adapter of a source and a target segment with no weight at zero."""
    segments = (Segment("source", ranks[0]), Segment("target", ranks[1]))
    with fresh_adapter(backbone, LoraSettings(rank=sum(ranks)), 0) as model:
        return random_like(model, torch.Generator().manual_seed(3), size, segments=segments, apart=apart)


def factors(model) -> list[torch.Tensor]:
    """The live A and B of each module."""
    return [factor for pair in live_pairs(model).values() for factor in (pair.A, pair.B)]


def values(model) -> torch.Tensor:
    return torch.cat([factor.detach().flatten() for factor in factors(model)])


def put(model, weights) -> None:
    for factor, value in zip(factors(model), weights, strict=True):
        factor.data.copy_(value)


class Watch(TrainerCallback):
    """Keeps the weights, gradients and learning rate of every step."""

    def __init__(self) -> None:
        self.before: list[list[torch.Tensor]] = []
        self.gradients: list[list[torch.Tensor]] = []
        self.rates: list[float] = []
        self.after: dict[int, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before.append([factor.detach().clone() for factor in factors(kwargs["model"])])
        self.gradients.append([factor.grad.clone() for factor in factors(kwargs["model"])])
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **kwargs):
        self.after[state.global_step] = values(kwargs["model"])


def assert_step(model, watch: dict, step: int, examples, logged: float) -> None:
    """Loss and gradients of a step are those of the mean over the examples, each alone."""
    put(model, watch["before"][step])
    loss = naive_losses(model, examples).mean()
    for found, gradient in zip(watch["gradients"][step], torch.autograd.grad(loss, factors(model)), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    assert logged == pytest.approx(loss.item(), rel=1e-4)


def assert_counts(pairs, keep, ratio: float) -> None:
    """Of each group that competes exactly so many weights are masked: of an adapter's A or B in a module."""
    for (module, factor), mask in keep.items():
        sizes = [segment.rank for segment in pairs[module].segments] or [pairs[module].rank]
        for part in mask.split(sizes, dim=RANK_DIMENSION[factor]):
            assert int((~part).sum()) == prune_count(ratio, part.numel())


def read_rows(file: Path | str) -> list[dict]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
