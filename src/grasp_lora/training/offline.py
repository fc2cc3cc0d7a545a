"""No network: what `offline: true` of a recipe means for every library that speaks to the hub."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_network(offline: bool) -> Iterator[None]:
    """Switch the hub's libraries offline for the length of the context, as HF_HUB_OFFLINE does for a whole process.

    `local_files_only` alone is not enough: transformers 5.24 still asks the hub about a tokenizer that it has found in the cache.

    Args:
        offline: False to change nothing.
    """
    from huggingface_hub import constants

    # datasets keeps a switch of its own; where it is not yet imported, it will copy that of the hub's client.
    loaded: list[Any] = [constants, getattr(sys.modules.get("datasets"), "config", None)]
    switches = [switch for switch in loaded if offline and switch is not None]
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    try:
        for switch in switches:
            switch.HF_HUB_OFFLINE = True
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value
