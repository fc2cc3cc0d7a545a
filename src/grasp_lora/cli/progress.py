"""What a run or an experiment shows in a terminal: live bars; elsewhere one line for each thing that is finished."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from grasp_lora.bench.plan import Plan
from grasp_lora.bench.progress import Progress
from grasp_lora.bench.run_folder import Prediction
from grasp_lora.bench.store import Record
from grasp_lora.report.examples import leading_metric, marked
from grasp_lora.text.display import one_line

_ANSWER_SHOWN = 60  # characters

_TITLES = {
    "data": "read and split the data",
    "source": "train the source adapter",
    "target": "train the target adapter",
    "merge": "merge the adapters",
    "controller": "learn the prune ratio",
    "final": "prune and fine-tune",
    "continued": "continue the source adapter",
    "evaluate": "answer the test questions",
    "deliver": "hand over the adapter",
    "all_rows": "train once more, on all rows",
    "report": "write the report",
}


class _Bar(Progress):
    """One live bar, and lines above it; without a terminal the lines alone."""

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        self._console = console
        self._bars = Bars(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None

    def stop(self) -> None:
        """Remove the live bar, before an error is shown."""
        self._bars.stop()

    def _begin(self, title: str, total: float | None = None, completed: int = 0) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._bars.start()
        self._task = self._bars.add_task(title, total=total, completed=completed, facts="")

    def _move(self, **changes: Any) -> None:
        if self._task is not None:
            self._bars.update(self._task, **changes)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class TerminalProgress(_Bar):
    """Shows stage, step, loss, current ratio and time left.

    Args:
        console: where to; live bars only if it is a terminal.
        answers: how many answers of each system are printed as they come.
    """

    def __init__(self, console: Console, answers: int = 0) -> None:
        facts = TextColumn("{task.fields[facts]}")
        title, times = TextColumn("{task.description:<26}"), (TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(console, title, BarColumn(bar_width=24), MofNCompleteColumn(), facts, *times)
        self._ratio: float | None = None
        self._answers = answers

    def preparing(self) -> None:
        """Show that something is going on."""
        self._begin("load the model and the data")

    def stage(self, name: str) -> None:
        """Start the bar of a stage."""
        self._ratio = None
        self._begin(_TITLES.get(name, name))

    def step(self, report: Mapping[str, float]) -> None:
        """Move the bar of a fine-tune."""
        ratio = "" if self._ratio is None else f"  ratio {self._ratio:.3f}"
        self._move(completed=report["step"], total=report["steps"], facts=f"loss {report['loss']:.3f}{ratio}")

    def round(self, record: Mapping[str, Any]) -> None:
        """Remember the committed ratio for the bar."""
        self._ratio = record["ratio"]

    def answered(self, answered: int, prompts: int) -> None:
        """Move the bar of the evaluation."""
        self._move(completed=answered, total=prompts)

    def scored(self, system: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print the first answers of a system, with what each is worth and what was expected."""
        predictions = [Prediction.model_validate(row) for row in rows[: self._answers]]
        metric = leading_metric(predictions)
        for row in predictions:
            _, mark = marked(row.scores.get(metric or ""), metric)
            answer, expected = (one_line(text)[:_ANSWER_SHOWN] for text in (row.prediction, row.references[0]))
            self._say(f"  {system:<12} {mark:<8} {answer}   (expected: {expected})")

    def finished(self, name: str, seconds: float, summary: Mapping[str, Any], *, skipped: bool) -> None:
        """Replace the bar by one line."""
        self.stop()
        facts = "  ".join(f"{key} {short(value)}" for key, value in summary.items() if value is not None)
        took = "already done" if skipped else f"{seconds:.1f} s"
        self._say(f"{_TITLES.get(name, name):<26} {took:>12}   {facts}")


class TerminalBenchProgress(_Bar):
    """Shows how far a comparison is, what it does, and the time left.

    Args:
        console: where to; a live bar only if it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        left = TextColumn("{task.percentage:>3.0f} %  {task.fields[facts]}")
        super().__init__(console, TextColumn("{task.description:<46}"), BarColumn(bar_width=24), left)
        self._started = time.monotonic()
        self._total = self._done = self._skipped = 0.0
        self._new = False
        self._title = ""
        self.used: list[tuple[Record, bool]] = []  # each record once, and whether it was there already

    def begin(self, units: float, finished: float = 0.0) -> None:
        """Start the bar."""
        self._total = units
        self._begin("load the model and the data", units)

    def note(self, text: str) -> None:
        """Say it above the bar."""
        self._say(text)

    def stage(self, name: str) -> None:
        """Say what is being done."""
        self._title, self._new = name, False
        self._move(description=name)

    def record(self, record: Record, there: bool) -> None:
        """One line for each step that was really done."""
        self.used = [one for one in self.used if one[0].key != record.key] + [(record, there)]
        if not there:
            self._new = True
            self._say(f"{self._title:<46} {record.step:<17} {record.seconds:8.1f} s")

    def done(self, units: float) -> None:
        """Move the bar; the time left counts only what was not on record."""
        self._done += units
        self._skipped += 0.0 if self._new else units
        left = ""
        if fresh := self._done - self._skipped:
            seconds = (time.monotonic() - self._started) / fresh * (self._total - self._done)
            left = f"about {seconds / 60:.0f} min left"
        self._move(completed=self._done, facts=left)


def short(value: Any) -> str:
    """A value for a line: a number with four digits, a list with commas."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


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


def print_plan(plan: Plan, console: Console) -> None:
    """Print what a comparison would do: trainings first, each step with its forward passes at most."""
    groups: dict[str, list[tuple[Record, bool]]] = {}
    for record, there in sorted(plan.steps, key=lambda one: not one[0].trains):
        groups.setdefault(record.step.replace("nan", "at the learned ratio"), []).append((record, there))
    table = Table("step", "on record", "to do", "forward passes")
    passes = 0
    for step, members in groups.items():
        left = [record for record, there in members if not there]
        work = sum(record.work for record in left)
        passes += work
        table.add_row(step, str(len(members) - len(left)), str(len(left)), str(work))
    console.print(table)
    for line in (
        f"at most {passes} forward passes; {plan.answers} answers to test prompts come on top",
        *(f"left out: {name} {reason}" for name, reason in plan.unavailable.items()),
        "nothing was trained or written",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
