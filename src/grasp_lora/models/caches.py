"""What a model has read, kept: transformers' caches of keys and values, filled, copied, shifted, joined and cut.

Rows are padded on the left, here as in `generate`. Layers are tensors [rows, heads, tokens, size]; a layer with a sliding window
counts the tokens that it has seen, padding included, in `cumulative_length`.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from grasp_lora.models.backbone import is_split, supports_logits_to_keep

READ_TOKENS = 1024  # that a processor reads in one call, padding included; a longer prompt is read whole
_BY_MASK = ("bloom", "mpt")  # without position ids; they read positions off the mask
_OTHER_POSITIONS = (  # they do not count from 0
    "camembert", "cpmant", "data2vec-text", "moshi", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip


def read(model: Any, prompts: Sequence[Sequence[int]]) -> Any:
    """The cache of a model that has read these prompts, padded on the left; None where it cannot serve several rows."""
    kind, named = model.config.model_type, "position_ids" in inspect.signature(model.forward).parameters
    # By the length of a call long RoPE, as Phi-3 has it, turns all of its tokens.
    by_length = "longrope" in str(getattr(model.config.get_text_config(decoder=True), "rope_parameters", ""))
    if kind in _OTHER_POSITIONS or by_length or not (named or kind in _BY_MASK):
        return None
    ids, mask = padded(prompts)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    # A processor is slower once a call's activations outgrow its caches. All processes of a split backbone make the same calls,
    # and long prompts are read whole: parts cost attention more.
    whole = model.device.type != "cpu" or is_split(model) or ids.shape[1] > READ_TOKENS
    width = ids.shape[1] if whole else max(1, READ_TOKENS // len(ids))
    cache = None
    for start in range(0, ids.shape[1], width):
        part = slice(start, start + width)
        inputs = {
            "input_ids": ids[:, part],
            "attention_mask": mask[:, : part.stop],
            **positions(model, places[:, part]),
        }
        if supports_logits_to_keep(model):
            inputs["logits_to_keep"] = torch.zeros_like(ids[:, part], dtype=torch.bool)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        called = model(**inputs, use_cache=True, **({} if cache is None else {"cache": cache}))
        cache = getattr(called, "cache", None)
        if not _serves_rows(cache):
            return None
    return cache


def _serves_rows(cache: Any) -> bool:
    """Whether rows of a cache can be repeated and taken out."""
    from transformers import cache_utils

    plain = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer, cache_utils.DummyLayer)
    # A layer with a state of its own, or a model's own kind of cache (MiniMax), has no rows to repeat.
    if type(cache) is not cache_utils.DynamicCache or not all(type(layer) in plain for layer in cache.layers):
        return False
    # A model that keeps nothing, as OpenAI's first GPT, leaves the one it was given empty.
    return any(getattr(layer, "keys", None) is not None for layer in cache.layers)


def repeated(cache: Any, times: int) -> Any:
    """A copy of a cache, since a call adds to it, with each row so many times; None of None."""
    copied = copy.deepcopy(cache)
    if copied is not None and times > 1:
        copied.batch_repeat_interleave(times)
    return copied


def shift(cache: Any, columns: Sequence[int]) -> None:
    """Move each row of a cache to the right by so many columns: the last ones, which do not count, become padding."""
    for layer in _layers(cache):
        layer.keys, layer.values = (
            torch.stack([row.roll(by, dims=-2) for row, by in zip(tensor, columns, strict=True)])
            for tensor in (layer.keys, layer.values)
        )


def joined(cache: Any, other: Any) -> Any:
    """The first cache with the rows of the second behind its own."""
    for layer, joining in zip(_layers(cache), _layers(other), strict=True):
        layer.keys, layer.values = (
            stacked(*(tensor.movedim(-2, 1) for tensor in pair)).movedim(1, -2)
            for pair in ((layer.keys, joining.keys), (layer.values, joining.values))
        )
        if layer.is_sliding:
            layer.cumulative_length = max(layer.cumulative_length, joining.cumulative_length)
    return cache


def cut(cache: Any, columns: int) -> None:
    """Take so many columns of padding off the left of a cache."""
    for layer in _layers(cache):
        left = layer.keys.shape[-2] - columns
        if layer.is_sliding:  # what is beyond its window has left it before
            layer.cumulative_length -= columns
            left = min(layer.keys.shape[-2], layer.cumulative_length)
        layer.keys, layer.values = layer.keys[..., -left:, :], layer.values[..., -left:, :]


def _layers(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]


def stacked(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Two tensors [rows, tokens, ...] as one, the shorter rows padded on the left with zeros."""
    tokens = max(above.shape[1], below.shape[1])
    return torch.cat([
        torch.cat([tensor.new_zeros(len(tensor), tokens - tensor.shape[1], *tensor.shape[2:]), tensor], dim=1)
        for tensor in (above, below)
    ])  # fmt: skip


def padded(rows: Sequence[Sequence[int]], width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens padded on the left, and the mask: 1 where a row stands, 0 for its padding; each [rows, longest or width]."""
    lengths = torch.tensor([[len(row)] for row in rows])
    width = width or int(lengths.max())
    mask = (torch.arange(width) >= width - lengths).long()
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([token for row in rows for token in row])
    return ids, mask


def positions(model: Any, places: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument that says at which positions tokens stand; a model without it reads that off the mask."""
    return {"position_ids": places} if "position_ids" in inspect.signature(model.forward).parameters else {}
