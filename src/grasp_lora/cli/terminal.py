"""How all commands speak to a terminal."""

import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grasp_lora.storage.processes import is_first
from grasp_lora.text.display import one_line

if TYPE_CHECKING:
    from grasp_lora.engine.run_folder import SystemScores

console = Console(quiet=not is_first(), emoji=False)  # of processes that torchrun started one speaks
error_console = Console(stderr=True, emoji=False)


class _Output(io.FileIO):
    """Standard output or standard error. Where it fails (a full disk, nobody behind a pipe) the work goes on; `problem` says why.

    Args:
        number: of the descriptor; None where it was closed before this program began.
    """

    def __init__(self, number: int | None) -> None:
        super().__init__(os.devnull if number is None else number, "wb", closefd=number is None)
        self._closed_before = number is None
        self.problem: str | None = None

    def write(self, content: Any, /) -> int:
        """Write what can be written; the rest is lost."""
        try:
            if self._closed_before:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            return super().write(content)
        except OSError as error:
            self.problem = error.strerror
            return memoryview(content).nbytes


@contextmanager
def lasting_outputs() -> Iterator[Callable[[], str | None]]:
    """Let no print fail inside the context; gives what says why standard output could not be written, or None."""
    before = sys.stdout, sys.stderr
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # else the next file that is opened would be taken for an output
    out, sys.stdout = _lasting(sys.stdout, sys.__stdout__)
    _, sys.stderr = _lasting(sys.stderr, sys.__stderr__)

    def problem() -> str | None:
        sys.stdout.flush()
        return out.problem if out else None

    try:
        yield problem
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _lasting(now: TextIO | None, at_start: TextIO | None) -> tuple[_Output | None, TextIO]:
    """The stream to print to, and the output below it where that is a process's own and no console of Windows."""
    if now is None:
        output = _Output(None)
        return output, io.TextIOWrapper(io.BufferedWriter(output), "utf-8")
    if now is not at_start or (os.name == "nt" and now.isatty()):
        return None, now
    now.flush()
    output = _Output(now.fileno())
    below = io.BufferedWriter(output)
    # An encoding such as cp1252 lacks most letters of the world, and no print may end the work.
    errors = "backslashreplace" if now.errors == "strict" else now.errors
    return output, io.TextIOWrapper(below, now.encoding, errors, line_buffering=now is sys.stderr or now.isatty())


class _Stoppable(Protocol):
    def stop(self) -> None: ...


Display = TypeVar("Display", bound=_Stoppable)


@contextmanager
def loading() -> Iterator[None]:
    """Show, inside the context, that the libraries are being loaded."""
    if not console.is_terminal:
        yield
        return
    with console.status("loading", spinner="dots"):
        yield


@contextmanager
def shown(display: Display) -> Iterator[Display]:
    """Remove a live display at the end of the context, before an error is shown."""
    try:
        yield display
    finally:
        display.stop()


def say(text: str, style: str | None = None) -> None:
    """Print one line as it is."""
    console.print(one_line(text), style=style, markup=False, highlight=False, soft_wrap=True)


def print_error(message: str, style: str = "red") -> None:
    """Print one line as it is where errors go; what a library or a file put into it may hold line breaks, or worse."""
    error_console.print(one_line(message), style=style, markup=False, highlight=False, soft_wrap=True)


def print_scores(
    systems: "Mapping[str, SystemScores]", signatures: Mapping[str, str], handed_over: str | None = None
) -> None:
    """Print losses and scores of every system, the one that is handed over bold."""
    from grasp_lora.report.pages import wide
    from grasp_lora.report.tables import score_digits

    scores = {name: [system.metrics.get(name) for system in systems.values()] for name in signatures}
    digits = {name: score_digits(name, values, 1) for name, values in scores.items()}
    table = Table()
    for column in ("system", "dev loss", "test loss", *scores):
        table.add_column(column, overflow="fold")  # a narrow terminal cuts no word off
    for number, (name, system) in enumerate(systems.items()):
        losses = ("-" if loss is None else f"{loss:.4f}" for loss in (system.dev_loss, system.test_loss))
        values = {metric: column[number] for metric, column in scores.items()}
        texts = ("unavailable" if value is None else f"{value:.{digits[metric]}f}" for metric, value in values.items())
        table.add_row(Text(one_line(name)), *losses, *texts, style="bold" if name == handed_over else "")
    wide(console).print(table)


def log_to_terminal(verbose: bool) -> None:
    """Show warnings of ours, and with --verbose what happens."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(levelname)s: %(message)s"))
    ours = logging.getLogger("grasp_lora")
    ours.handlers[:] = [handler]
    ours.setLevel((logging.INFO if verbose else logging.WARNING) if is_first() else logging.ERROR)
    ours.propagate = False
    # Where the extra `quant` is installed, transformers imports both, which tell of kernels that a machine lacks.
    for other in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(other).setLevel(logging.ERROR)


class _OneLine(logging.Formatter):
    """What a file or a model put into a message must not reach the terminal as control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))
