"""Several processes at one run, as torchrun starts them: all train and measure together, the first one writes.

Without torchrun there is one process, and everything here does nothing but call what it is given.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from grasp_lora.errors import FailedElsewhere, GraspError, Interrupted

Item = TypeVar("Item")
Result = TypeVar("Result")


STARTING = 600.0  # seconds between the starts of the first process and the last
FIRST_LOAD = 6 * 3600.0  # seconds, for the slowest process, which may have a model to download
WAIT_MINUTES = 15.0  # for each exchange after that
LOOK = 0.2  # seconds between two looks at who is there
TIME_TO_SPEAK = 3  # seconds: torchrun ends all processes when one has ended
STARTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # what torchrun tells each process
ELSEWHERE = {  # what asks the Trainer to split or partition the model in its own way
    "ACCELERATE_USE_FSDP": "FSDP by accelerate",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
}
_joined: dict[str, Any] = {}  # the board, where the processes leave word for each other, and their time limit


def world_size() -> int:
    """How many processes were started together."""
    told = [os.environ.get(name, "") for name in STARTED]
    return int(told[-1]) if all(value.isdecimal() for value in told) else 1


def is_first() -> bool:
    """Whether this is the process that writes, which one process alone is, too."""
    return world_size() == 1 or os.environ["RANK"] == "0"


def refuse_other_sharding() -> None:
    """Refuse what `accelerate launch` can ask for beside plain processes.

    Raises:
        GraspError: the environment asks for FSDP or DeepSpeed.
    """
    for name, what in ELSEWHERE.items():
        if os.environ.get(name, "").lower() not in ("", "0", "false"):
            raise GraspError(
                f"the environment asks for {what} ({name} is {os.environ[name]}), which changes the weights that are masked; "
                "start with plain torchrun, and set backbone.shard to true to split the backbone"
            )


def join(device: str, minutes: float = WAIT_MINUTES) -> None:
    """Meet the other processes; the first call waits for all of them.

    Args:
        device: what the backbone's settings say: "auto", "cpu" or "cuda".
        minutes: how long each exchange may take, > 0; above it a process counts as lost.

    Raises:
        GraspError: there are more processes than GPUs, they do not find each other, or they are to shard otherwise.
    """
    refuse_other_sharding()
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
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if by_torchrun and not _joined:
        _open_board(minutes)
        _wait_for_all(STARTING)
    met = PartialState(cpu=not on_gpus, timeout=timedelta(minutes=minutes)).num_processes
    if met != world_size():
        raise GraspError(f"WORLD_SIZE is {world_size()}, but {met} processes have met; start them with torchrun")
    if not _joined:  # else the first process keeps it, from now on
        _open_board(minutes)


def _open_board(minutes: float) -> None:
    """Find torchrun's own store, which outlasts each of the processes, and leave word of who is here."""
    import torch

    dist: Any = torch.distributed  # which does not say that it exports its stores
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*place, is_master=False, timeout=timedelta(minutes=minutes))
    board = dist.PrefixStore(f"grasp-lora/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    board.set(f"process/{os.environ['RANK']}", f"{os.getpid()} {platform.node()}")
    _joined.update(board=board, minutes=minutes, meetings=0)


def leave() -> None:
    """Part from the other processes at the end."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def speaks() -> bool:
    """Whether this process is the one to say why all end: the first that asks. The others wait, or they would end it."""
    if world_size() == 1:
        return True
    if not _joined:  # where all have the same to say, torchrun ends this one before it does
        time.sleep(0 if is_first() else TIME_TO_SPEAK)
        return True
    try:
        first = bool(_joined["board"].add("spoken", 1) == 1)
    except RuntimeError:  # the first process kept the board, and is gone
        first = os.environ["RANK"] == "1"
    if not first:
        time.sleep(TIME_TO_SPEAK)
    return first


@contextmanager
def none_lost() -> Iterator[None]:
    """Turn the loss of another process inside the context into one line.

    Raises:
        GraspError: another process has ended, or has not answered within the time limit.
        Interrupted: a signal came, and all processes are there.
    """
    try:
        yield
    except RuntimeError as error:  # gloo raises nothing finer, others kinds of DistError
        text = f"{type(error).__name__}: {error}"
        if not _joined or not any(sign in text for sign in ("gloo", "Dist", "NCCL")):
            raise
        raise _lost("timed out" in text.lower()) from error
    except Interrupted as stop:
        if _joined and _some_ended():  # torchrun stops all others then
            raise _lost(False) from stop
        raise


def _lost(waited: bool) -> GraspError:
    happened = f"did not answer for {_joined['minutes']:g} minutes (wait_minutes)" if waited else "has ended"
    return GraspError(
        f"another of the {world_size()} processes {happened}, so all of them end; run the same command again to go on"
    )


def _some_ended() -> bool:
    """Whether another process of this machine is no longer there."""
    for rank in range(world_size()):
        try:
            pid, _, host = _joined["board"].get(f"process/{rank}").decode().partition(" ")
            if host == platform.node():
                os.kill(int(pid), 0)
        except (ProcessLookupError, RuntimeError):
            return True
    return False


def _wait_for_all(seconds: float) -> None:
    """Wait for the other processes without an exchange, so that signals are heard and no limit of one holds."""
    board, number = _joined["board"], _joined["meetings"]
    _joined["meetings"] += 1
    board.set(f"meeting/{number}/{os.environ['RANK']}", "here")
    names, end = [f"meeting/{number}/{rank}" for rank in range(world_size())], time.monotonic() + seconds
    while not board.check(names) and time.monotonic() < end:
        time.sleep(LOOK)


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


def on_every_process(work: Callable[[], None], *, loads: bool = False) -> None:
    """Let every process do something, and none go on where one could not.

    Args:
        work: what to do.
        loads: whether it may have to download a model, for which the others wait for hours.

    Raises:
        GraspError: of the work, in the first process that could not do it.
        FailedElsewhere: in all others.
    """
    if world_size() == 1:
        work()
        return
    problem: GraspError | None = None
    try:
        work()
    except GraspError as error:
        problem = error
    if loads and _joined:
        _wait_for_all(FIRST_LOAD)
    _raise_together(problem)


def _raise_together(problem: GraspError | None) -> None:
    """Raise in every process where one has a problem: there that, elsewhere that another could not go on."""
    from accelerate.utils import gather_object

    failed = [rank for rank, could in enumerate(gather_object([problem is None])) if not could]
    if failed and os.environ["RANK"] == str(failed[0]) and problem is not None:
        raise problem
    if failed:
        raise FailedElsewhere(f"process {failed[0]} could not go on")


def distribute(items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
    """Let each process do its part of the items; return the results of all, in the order of the items.

    Args:
        items: the same in every process.
        work: gives a result, plain values, for each of the items that it is given; there may be none.

    Raises:
        GraspError: of the work, in the first process that could not do it.
        FailedElsewhere: in all others.
    """
    if world_size() == 1:
        return list(work(items))
    from accelerate.utils import gather_object

    mine = range(int(os.environ["RANK"]), len(items), world_size())
    done, problem = list[Result](), None
    try:
        done = list(work([items[place] for place in mine]))
    except GraspError as error:
        problem = error
    _raise_together(problem)
    return [result for _, result in sorted(gather_object(list(zip(mine, done, strict=True))))]
