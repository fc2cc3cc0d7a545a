"""The hub: no network for a while, and in one line why something did not come from there."""

from collections.abc import Iterator
from contextlib import contextmanager

from grasp_lora.text.display import first_line


@contextmanager
def no_network() -> Iterator[None]:
    """Switch the hub's client offline for the length of the context, as HF_HUB_OFFLINE does for a whole process."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


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
