"""How all commands speak to a terminal."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from grasp_lora.storage.processes import is_first
from grasp_lora.text.display import one_line

console = Console(quiet=not is_first(), emoji=False)  # of processes that torchrun started one speaks
error_console = Console(stderr=True, emoji=False)


def set_up_outputs() -> None:
    """Let no print fail for want of a letter: an encoding such as cp1252 lacks most letters of the world."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def loading(what: str = "loading") -> Iterator[None]:
    """Show, inside the context, that something is going on."""
    if not console.is_terminal:
        yield
        return
    with console.status(what, spinner="dots"):
        yield


def say(text: str | Text, style: str | None = None, *, copied: bool = False) -> None:
    """Print one line as it is, in a terminal broken between words; no line break cuts a command, which is `copied`."""
    line = one_line(text) if isinstance(text, str) else text
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=copied or not console.is_terminal)


def print_error(message: str, style: str = "red") -> None:
    """Print one line as it is where errors go; what a library or a file put into it may hold line breaks, or worse."""
    whole = not error_console.is_terminal
    error_console.print(one_line(message), style=style, markup=False, highlight=False, soft_wrap=whole)


def log_to_terminal(verbose: bool) -> None:
    """Show warnings of ours, and with --verbose what happens."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(levelname)s: %(message)s"))
    ours = logging.getLogger("grasp_lora")
    ours.handlers[:] = [handler]
    ours.setLevel((logging.INFO if verbose else logging.WARNING) if is_first() else logging.ERROR)
    ours.propagate = False
    # Where the extra `quant` is installed, transformers imports both, which tell of kernels that a machine lacks.
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)


class _OneLine(logging.Formatter):
    """What a file or a model put into a message must not reach the terminal as control characters."""

    def format(self, record: logging.LogRecord) -> str:
        line = one_line(super().format(record))
        if not error_console.is_terminal:
            return line
        return "\n".join(part.plain for part in Text(line).wrap(error_console, error_console.width))
