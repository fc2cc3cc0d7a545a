"""SIGTERM and SIGINT while a run works: the first stops it where it can go on from, the second ends it at once."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from grasp_lora.errors import Interrupted
from grasp_lora.storage.processes import world_size

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 5.0  # seconds: a signal to a group of processes comes to each of them, and once more from torchrun


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
        self._signal: str | None = None
        self._since = 0.0

    @property
    def asked_by(self) -> str | None:
        """The signal that has asked for a stop, None as long as there was none."""
        return self._signal

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals inside the context; nothing changes outside the main thread or for a signal that is ignored.

        Raises:
            Interrupted: a signal has stopped the work.
        """
        self._signal = None
        before = {number: signal.getsignal(number) for number in SIGNALS}
        mine = [number for number in SIGNALS if before[number] not in (signal.SIG_IGN, None)]
        if threading.current_thread() is not threading.main_thread():
            mine = []
        try:
            for number in mine:
                signal.signal(number, self._handle)
            yield
        except _Stop:
            raise Interrupted(f"stopped by {self._signal} {self._place()}; {self._then}") from None
        finally:
            for number in mine:
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
        if self._signal is not None:
            raise _Stop

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and time.monotonic() - self._since < ECHO:
            return
        again, self._signal, self._since = self._signal is not None, signal.Signals(number).name, time.monotonic()
        if again or world_size() == 1:
            for other in SIGNALS:
                if signal.getsignal(other) == self._handle:
                    signal.signal(other, signal.SIG_DFL)
        if again:
            signal.raise_signal(number)
        if not self._deferred:
            raise _Stop
