"""What all commands share: their usual options, and how they speak to a terminal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import typer
from rich.console import Console

from grasp_lora.storage.processes import is_first
from grasp_lora.text.display import one_line

console = Console(quiet=not is_first())  # of processes that torchrun started one speaks
error_console = Console(stderr=True)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a built-in one (see `recipes`).")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Change one value: a.b=value, for example data.root=/data. May be repeated."),
]
AllowCodeOption = Annotated[
    bool,
    typer.Option("--allow-code", help="Import code that the recipe names (package.module:name), also from beside it."),
]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run; default runs/NAME.")]
StepOutput = Annotated[Path, typer.Option("--output", "-o", help="Folder for the result.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show what happens in detail.")]


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


def say(text: str) -> None:
    """Print one line as it is."""
    console.print(one_line(text), markup=False, highlight=False, soft_wrap=True)


def log_to_terminal(verbose: bool) -> None:
    """Show warnings of ours, and with --verbose what happens."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(levelname)s: %(message)s"))
    ours = logging.getLogger("grasp_lora")
    ours.handlers[:] = [handler]
    ours.setLevel((logging.INFO if verbose else logging.WARNING) if is_first() else logging.ERROR)
    ours.propagate = False


class _OneLine(logging.Formatter):
    """What a file or a model put into a message must not reach the terminal as control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))
