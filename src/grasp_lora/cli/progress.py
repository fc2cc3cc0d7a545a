"""What a run or an experiment shows in a terminal: live bars; elsewhere one line for each thing that is finished."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from grasp_lora.bench.progress import Progress
from grasp_lora.bench.search import SweepResult, Trial, shown
from grasp_lora.bench.store import Record
from grasp_lora.text.display import escaped

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


class TerminalProgress(Progress):
    """Shows stage, step, loss, current ratio and time left.

    Args:
        console: where to; live bars only if it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Bars(
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


class TerminalBenchProgress(Progress):
    """Shows how far a comparison is, what it does, and the time left.

    Args:
        console: where to; a live bar only if it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._total = self._done = self._skipped = 0.0
        self._bar = Bars(
            TextColumn("{task.description:<46}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: Any = None
        self._new = False
        self._title = ""
        self.used: list[tuple[Record, bool]] = []  # each record once, and whether it was there already

    def begin(self, units: float, finished: float = 0.0) -> None:
        """Start the bar."""
        self._total = units
        self._bar.start()
        self._task = self._bar.add_task("load the model and the data", total=units, left="")

    def stage(self, name: str) -> None:
        """Say what is being done."""
        self._title, self._new = name, False
        self._bar.update(self._task, description=self._title)

    def record(self, record: Record, there: bool) -> None:
        """One line for each step that was really done."""
        self.used.append((record, there))
        if not there:
            self._new = True
            self._console.print(f"{self._title:<46} {record.step:<17} {record.seconds:8.1f} s", highlight=False)

    def done(self, units: float) -> None:
        """Move the bar; the time left counts only what was not on record."""
        self._done += units
        self._skipped += 0.0 if self._new else units
        fresh = self._done - self._skipped
        left = ""
        if fresh:
            seconds = (time.monotonic() - self._started) / fresh * (self._total - self._done)
            left = f"about {seconds / 60:.0f} min left"
        self._bar.update(self._task, completed=self._done, left=left)

    def stop(self) -> None:
        """Remove the bar."""
        self._bar.stop()


class TerminalSweepProgress(Progress):
    """Shows how far a sweep is, what it tries, and the time left.

    Args:
        console: where to; a live bar only if it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Bars(
            TextColumn("{task.description:<46}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: Any = None

    def begin(self, units: float, finished: float = 0.0) -> None:
        """Start the bar."""
        self._bar.start()
        self._task = self._bar.add_task("", total=units, completed=int(finished))

    def stage(self, name: str) -> None:
        """Say what is tried."""
        self._bar.update(self._task, description=name)

    def record(self, record: Record, there: bool) -> None:
        """One line for each adapter to merge that was trained."""
        if not there and record.step in ("source", "target"):
            self._console.print(f"{_TITLES[record.step]:<26} {record.seconds:.1f} s", highlight=False)

    def trial(self, trial: Trial) -> None:
        """One line for each trial; move the bar."""
        loss = "" if trial.dev_loss is None else f"dev loss {trial.dev_loss:.4f}"
        text = f"trial {trial.trial:<4} {trial.state:<9} {trial.seconds:7.1f} s   {loss}   {shown(trial.values)}"
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._bar.advance(self._task)

    def stop(self) -> None:
        """Remove the bar."""
        self._bar.stop()


def print_steps(used: Sequence[tuple[Record, bool]], console: Console) -> None:
    """Print how many steps of each name were found on record and how many were done, trainings first."""
    groups: dict[str, list[tuple[Record, bool]]] = {}
    for record, there in sorted(used, key=lambda one: not one[0].trains):
        groups.setdefault(record.step, []).append((record, there))
    table = Table("step", "found", "done", "seconds", title="Steps", title_justify="left")
    for step, members in groups.items():
        done = [record for record, there in members if not there]
        seconds = sum(record.seconds for record in done)
        table.add_row(step, str(len(members) - len(done)), str(len(done)), f"{seconds:.1f}" if done else "-")
    console.print(table)


def print_sweep(result: SweepResult, console: Console) -> None:
    """Print the trials of a sweep, the best one bold, and what they cost."""
    keys = (Column(key, overflow="fold") for key in result.trials[0].values)
    table = Table("trial", *keys, "dev loss", "steps", "seconds", "state")
    for trial in result.trials:
        cells = [
            str(trial.trial),
            *(escaped(_short(value)) for value in trial.values.values()),
            "-" if trial.dev_loss is None else f"{trial.dev_loss:.4f}",
            str(trial.steps),
            f"{trial.seconds:.1f}",
            f"{trial.state}, as an earlier trial" if trial.repeats else trial.state,
        ]
        table.add_row(*map(Text, cells), style="bold" if trial.trial == result.best else "")
    console.print(table)
    cost = result.cost
    console.print(
        f"trial {result.best} is the best by dev loss; {cost.runs} final runs took {cost.seconds:.0f} s and "
        f"{cost.work} examples forward",
        highlight=False,
        soft_wrap=True,
    )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
