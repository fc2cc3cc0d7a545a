"""Several processes at one run, as torchrun starts them: all train and measure together, the first one writes.

Without torchrun there is one process, and everything here does nothing but call what it is given.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from grasp_lora.errors import FailedElsewhere, GraspError

Item = TypeVar("Item")
Result = TypeVar("Result")


WAITING = timedelta(hours=6)  # for the slowest process, which may have a model to download
STARTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # what torchrun tells each process


def world_size() -> int:
    """How many processes were started together."""
    told = [os.environ.get(name, "") for name in STARTED]
    return int(told[-1]) if all(value.isdecimal() for value in told) else 1


def is_first() -> bool:
    """Whether this is the process that writes, which one process alone is, too."""
    return world_size() == 1 or os.environ["RANK"] == "0"


def join(device: str) -> None:
    """Meet the other processes; the first call waits for all of them.

    Args:
        device: what the backbone's settings say: "auto", "cpu" or "cuda".

    Raises:
        GraspError: there are more processes than GPUs, or they do not find each other.
    """
    if world_size() == 1:
        return
    import torch
    from accelerate import PartialState

    on_gpus = device != "cpu" and torch.cuda.is_available()
    if on_gpus and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise GraspError(
            f"torchrun started process {int(os.environ['LOCAL_RANK']) + 1} on this machine, but torch sees "
            f"{torch.cuda.device_count()} GPUs; start one process for each"
        )
    met = PartialState(cpu=not on_gpus, timeout=WAITING).num_processes
    if met != world_size():
        raise GraspError(f"WORLD_SIZE is {world_size()}, but {met} processes have met; start them with torchrun")


def leave() -> None:
    """Part from the other processes at the end."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def on_first_process(work: Callable[[], Result]) -> Result:
    """Let the first process do something and give its result, plain values, to all; the others wait for it.

    Raises:
        FailedElsewhere: on the others, when the first process could not do it; there its own error is raised.
    """
    if world_size() == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    problem: Exception | None = None
    outcome: list[Result] = []
    if is_first():
        try:
            outcome = [work()]
        except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait for ever
            problem = error
    [outcome] = broadcast_object_list([outcome])
    if problem is not None:
        raise problem
    if not outcome:
        raise FailedElsewhere("the first process could not go on")
    return outcome[0]


def on_every_process(work: Callable[[], None]) -> None:
    """Let every process do something, and none go on where one could not.

    Raises:
        GraspError: of the work, in the first process that could not do it.
        FailedElsewhere: in all others.
    """
    if world_size() == 1:
        work()
        return
    from accelerate.utils import gather_object

    problem: GraspError | None = None
    try:
        work()
    except GraspError as error:
        problem = error
    failed = [rank for rank, could in enumerate(gather_object([problem is None])) if not could]
    if failed and os.environ["RANK"] == str(failed[0]) and problem is not None:
        raise problem
    if failed:
        raise FailedElsewhere(f"process {failed[0]} could not go on")


def distribute(items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
    """Let each process do its part of the items; return the results of all, in the order of the items.

    Args:
        items: the same in every process.
        work: gives a result, plain values, for each of the items that it is given.
    """
    if world_size() == 1:
        return list(work(items))
    from accelerate.utils import gather_object

    mine = range(int(os.environ["RANK"]), len(items), world_size())
    done = work([items[place] for place in mine]) if mine else []
    return [result for _, result in sorted(gather_object(list(zip(mine, done, strict=True))))]
