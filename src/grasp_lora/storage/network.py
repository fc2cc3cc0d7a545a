"""The hub: no network where `offline: true` says so, and in one line why something did not come from there."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grasp_lora.text.display import first_line


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


def hub_problem(error: BaseException) -> str | None:
    """Say in one line why the hub did not give a repository, and what to do, where one of these is why."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated repo" in str(error):
        return "it is gated; accept its terms on huggingface.co and run `hf auth login`"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            "there is no such folder, and no such repository on the hub, or it is private or your token is not valid (then "
            "run `hf auth login`)"
        )
    if any(isinstance(cause, HFValidationError) for cause in causes):
        return (
            "there is no such folder, and it is no hub id either; check the path (a run writes its adapter at its end)"
        )
    return None


def not_there(error: BaseException) -> str:
    """Say why neither a folder nor the hub had something, and what to do."""
    return hub_problem(error) or (
        f"there is no such folder, and the hub gave: {first_line(error)}; check the name, or download it first"
    )
