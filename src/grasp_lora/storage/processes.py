"""Several processes at one run, as torchrun starts them, and the signals that stop a run.

Processes: the first one decides and writes, all train and measure. `accelerate` exchanges what they need, torchrun starts them
and ends them when one is lost. Without torchrun there is one process, and everything here calls what it is given.

Signals: the first SIGTERM or SIGINT stops the work where it can go on from, the second ends the process at once. A training
that is under way saves a checkpoint first, so the same command goes on from there.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TypeVar

from grasp_lora.errors import GraspError, Interrupted

Item = TypeVar("Item")
Result = TypeVar("Result")

STARTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # what torchrun tells each process
LONGEST_WAIT = timedelta(hours=2)  # of one process for another, which may have a model to download
OTHER_SHARDING = {"ACCELERATE_USE_FSDP": "FSDP by accelerate", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 5.0  # seconds: a signal to a group of processes comes to each of them, and once more from torchrun


def world_size() -> int:
    """How many processes were started together."""
    values = [os.environ.get(name, "") for name in STARTED]
    return int(values[-1]) if all(value.isdecimal() for value in values) else 1


def is_first() -> bool:
    """Whether this is the process that writes, which one process alone is, too."""
    return world_size() == 1 or os.environ["RANK"] == "0"


def join(device: str) -> None:
    """Meet the other processes; the first call waits for all of them.

    Args:
        device: what the backbone's settings say: "auto", "cpu" or "cuda".

    Raises:
        GraspError: the environment asks for FSDP or DeepSpeed.
    """
    for name, library in OTHER_SHARDING.items():
        if os.environ.get(name, "").lower() not in ("", "0", "false"):
            raise GraspError(
                f"the environment asks for {library} ({name} is {os.environ[name]}), which changes the weights that are masked; "
                "start with plain torchrun, and set backbone.shard to true to split the backbone"
            )
    if world_size() == 1:
        return
    import torch
    from accelerate import PartialState

    on_gpus = device != "cpu" and torch.cuda.is_available()
    PartialState(cpu=not on_gpus, timeout=LONGEST_WAIT)


def leave() -> None:
    """Part from the other processes at the end."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def on_first_process(work: Callable[[], Result]) -> Result:
    """Let the first process do something and give its result, plain values, to all; the others wait for it."""
    if world_size() == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    results: list[Result | None] = [work() if is_first() else None]
    broadcast_object_list(results)
    return results[0]  # type: ignore[return-value]  # by now it is that of the first process


def distribute(items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
    """Let each process do its part of the items; return the results of all, in the order of the items.

    Args:
        items: the same in every process.
        work: gives a result, plain values, for each of the items that it is given; there may be none.
    """
    if world_size() == 1:
        return list(work(items))
    from accelerate.utils import gather_object

    rank, count = int(os.environ["RANK"]), -(-len(items) // world_size())
    results: list[Result] = gather_object(list(work(items[rank * count : (rank + 1) * count])))
    return results


class _Stop(BaseException):
    """Raised by the handler; no `except Exception` or `except ValueError` on its way takes it for an error of its own."""


class Interruption:
    """The request to stop that a signal makes.

    Args:
        place: asked where the work is, for the message.
        then: the end of the message: what to do, or what is lost.
    """

    def __init__(self, place: Callable[[], str], then: str = "run the same command again to go on") -> None:
        self._place = place
        self._then = then
        self._deferred = False
        self.asked_by: str | None = None  # the signal that has asked for a stop
        self._since = 0.0

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals inside the context; nothing changes outside the main thread or for a signal that is ignored.

        Raises:
            Interrupted: a signal has stopped the work.
        """
        self.asked_by = None
        before = {number: signal.getsignal(number) for number in SIGNALS}
        handled = [number for number in SIGNALS if before[number] not in (signal.SIG_IGN, None)]
        if threading.current_thread() is not threading.main_thread():
            handled = []
        try:
            for number in handled:
                signal.signal(number, self._handle)
            yield
        except _Stop:
            raise Interrupted(f"stopped by {self.asked_by} {self._place()}; {self._then}") from None
        finally:
            for number in handled:
                signal.signal(number, before[number])

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the work inside the context look at `asked_by` and end where it likes; a stop takes effect at the end at last.

        In a context within such a context that is the outer one's end.
        """
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before
        if not before:
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Stop now if a signal has come; `handled` turns this into its error."""
        if self.asked_by is not None:
            raise _Stop

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked_by is not None and time.monotonic() - self._since < ECHO:
            return
        again, self.asked_by, self._since = self.asked_by is not None, signal.Signals(number).name, time.monotonic()
        if again or world_size() == 1:  # torchrun passes a signal on, so that it comes twice
            for handled in SIGNALS:
                if signal.getsignal(handled) == self._handle:
                    signal.signal(handled, signal.SIG_DFL)
        if again:
            signal.raise_signal(number)
        if not self._deferred:
            self.stop_if_asked()
