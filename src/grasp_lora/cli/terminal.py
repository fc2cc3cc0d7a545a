"""How all commands speak to a terminal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from rich.console import Console
from rich.table import Table

from grasp_lora.storage.processes import is_first
from grasp_lora.text.display import one_line

if TYPE_CHECKING:
    from grasp_lora.bench.run_folder import Metrics

console = Console(quiet=not is_first())  # of processes that torchrun started one speaks
error_console = Console(stderr=True)


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


def print_scores(metrics: "Metrics") -> None:
    """Print losses and scores of every system."""
    from grasp_lora.report.tables import score_digits

    scores = {name: [system.metrics.get(name) for system in metrics.systems.values()] for name in metrics.signatures}
    digits = {name: score_digits(name, values, 1) for name, values in scores.items()}
    table = Table("system", "dev loss", "test loss", *scores)
    for number, (name, system) in enumerate(metrics.systems.items()):
        losses = ("-" if loss is None else f"{loss:.4f}" for loss in (system.dev_loss, system.test_loss))
        values = {metric: column[number] for metric, column in scores.items()}
        texts = ("unavailable" if value is None else f"{value:.{digits[metric]}f}" for metric, value in values.items())
        chosen = metrics.delivered is not None and metrics.delivered.name == name
        table.add_row(one_line(name), *losses, *texts, style="bold" if chosen else "")
    console.print(table)


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
