"""What a run shows in a terminal: one live bar a stage; elsewhere one line a finished stage."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from grasp_lora.experiments.pipeline import StageProgress

_TITLES = {
    "data": "read and split the data",
    "source": "train the source adapter",
    "target": "train the target adapter",
    "merge": "merge the adapters",
    "controller": "learn the prune ratio",
    "final": "prune and fine-tune",
    "evaluate": "answer the test questions",
    "report": "write the report",
}


class TerminalProgress(StageProgress):
    """Shows stage, step, loss, current ratio and time left.

    Args:
        console: where to; live bars only if it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: Any = None
        self._ratio: float | None = None

    def preparing(self) -> None:
        """Show that something is going on."""
        self._begin("load the model and the data")

    def stage(self, name: str) -> None:
        """Start the bar of a stage."""
        self._begin(_TITLES.get(name, name))

    def step(self, report: Mapping[str, float]) -> None:
        """Move the bar of a fine-tune."""
        facts = f"loss {report['loss']:.3f}"
        if self._ratio is not None:
            facts += f"  ratio {self._ratio:.3f}"
        if self._task is not None:
            self._bar.update(self._task, completed=report["step"], total=report["steps"], facts=facts)

    def round(self, record: Mapping[str, Any]) -> None:
        """Remember the committed ratio for the bar."""
        self._ratio = record["ratio"]

    def answered(self, answered: int, prompts: int) -> None:
        """Move the bar of the evaluation."""
        if self._task is not None:
            self._bar.update(self._task, completed=answered, total=prompts)

    def finished(self, name: str, seconds: float, summary: Mapping[str, Any], *, skipped: bool) -> None:
        """Replace the bar by one line."""
        self._end()
        facts = "  ".join(f"{key} {_short(value)}" for key, value in summary.items() if value is not None)
        took = "already done" if skipped else f"{seconds:.1f} s"
        self._console.print(f"{_TITLES.get(name, name):<26} {took:>12}   {facts}", highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Remove the live bar, before an error is shown."""
        self._end()

    def _begin(self, title: str) -> None:
        self._end()
        self._ratio = None
        self._bar.start()
        self._task = self._bar.add_task(title, total=None, facts="")

    def _end(self) -> None:
        self._bar.stop()
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
