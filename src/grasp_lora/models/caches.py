"""Keys and values that a model keeps of what it has read: whether they can be cut and repeated, and many put into one."""

from collections.abc import Sequence
from typing import Any


def joined(model: Any, rows: Sequence[Any], width: int) -> Any:
    """One cache of `width` tokens a row, padded on the left as the token ids are; the rows give theirs, in `cache`, away."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    for layer, parts in enumerate(zip(*(row.cache for row in rows), strict=True)):
        padded = []
        for tensors in zip(*parts, strict=True):
            whole = tensors[0].new_zeros((len(rows), tensors[0].shape[0], width, tensors[0].shape[2]))
            for place, tensor in enumerate(tensors):
                whole[place, :, width - tensor.shape[1] :] = tensor
            padded.append(whole)
        cache.update(*padded, layer)
    for row in rows:
        row.cache = []
    return cache


def can_cut(cache: Any, tokens: int) -> bool:
    """Whether a model's cache of a pass gives the keys and values of the first tokens of each row, one at least."""
    from transformers import cache_utils

    plain = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    if tokens < 1 or type(cache) is not cache_utils.DynamicCache:
        return False
    layers: list[Any] = cache.layers
    # A sliding window that was full has dropped the first tokens.
    return all(type(one) in plain and one.keys.shape[-2] == one.get_seq_length() for one in layers)


def can_share_rows(cache: Any) -> bool:
    """Whether a model's cache has rows to take out or to repeat: that of a layer with a state of its own keeps them all."""
    from transformers import cache_utils

    plain = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer, cache_utils.DummyLayer)
    # A model's own kind of cache, MiniMax's for one, holds more than its layers.
    if type(cache) is not cache_utils.DynamicCache or not all(type(layer) in plain for layer in cache.layers):
        return False
    # A model that keeps nothing, as OpenAI's first GPT, leaves the one it was given empty.
    return any(getattr(layer, "keys", None) is not None for layer in cache.layers)
