"""What an experiment shows in a terminal: one live bar, and a line for each step that is finished; elsewhere the lines alone."""

import math
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from grasp_lora.engine.progress import Progress
from grasp_lora.engine.results import Finished, Learned, Prediction, Tested, Trained
from grasp_lora.report.examples import leading_metric, marked
from grasp_lora.storage.processes import is_first
from grasp_lora.text.display import one_line

_BLOCKS = "▁▂▃▄▅▆▇█"
_ANSWER_SHOWN = 60  # characters
A_DAY = 86400.0  # the time left follows from the mean speed: a step may take longer than the half minute that rich looks back
_TITLES = {  # by the beginning of the step's name
    "source": "train the source adapter",
    "target": "train the target adapter",
    "joint": "train on both languages",
    "controller": "learn the prune ratio",
    "continued": "train the source adapter further",
    "final-0.00": "fine-tune, nothing pruned",
    "final": "prune and fine-tune",
    "merge-weights": "search merge weights",
    "answers": "answer the test prompts",
    "dev-losses": "measure dev losses",
    "micro_dev-losses": "measure micro-dev losses",
    "test-losses": "measure test losses",
}


class _TimeLeft(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        """Render nothing until the time left is known."""
        return Text() if task.total is None or task.time_remaining is None else super().render(task).append(" left")


class TerminalProgress(Progress):
    """Shows what is being done, step, loss, current ratio and time left, and the first `answers` of each system as they come.

    There is a live bar only in a terminal, or a notebook with ipywidgets.
    """

    def __init__(self, console: Console, answers: int = 0) -> None:
        title, facts = (
            TextColumn(text, table_column=Column(no_wrap=False))
            for text in ("{task.description}", "{task.fields[facts]}")
        )
        columns = (title, BarColumn(bar_width=16), MofNCompleteColumn(), facts, TimeElapsedColumn(), _TimeLeft())
        self._console = console
        # Rich draws in a notebook by ipywidgets, and warns where they are not there.
        live = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
        self._bars = Bars(*columns, console=console, transient=True, disable=not live, speed_estimate_period=A_DAY)
        self._task: TaskID | None = None
        self._ratio: float | None = None
        self._answers = answers
        self._method = self._system = self._begun = ""
        self._shown: set[str] = set()
        self._steps = self._done = 0  # of a run
        self._left = self._answers_take = self._worked = 0.0  # forward passes
        self._began = time.monotonic()

    def stop(self) -> None:
        """Remove the live bar, before an error is shown."""
        self._bars.stop()

    def preparing(self) -> None:
        """Show that something is going on."""
        self._begin("load the model and the data")

    def note(self, text: str) -> None:
        """Say it above the bar."""
        self._say(text)

    def planned(self, steps: int, passes: float, answers: float) -> None:
        """Say from now on which step it is, and about how long all will take."""
        self._steps, self._left, self._answers_take, self._began = steps, passes, answers, time.monotonic()

    def method(self, title: str, number: int, total: int) -> None:
        """Say which row of a comparison is under way, and about how long the others will take."""
        elapsed = time.monotonic() - self._began
        left = f", about {elapsed / (number - 1) * (total - number + 1) / 60:.0f} min left" if number > 1 else ""
        self._method = f"{title} ({number} of {total}{left})"
        self._begin(self._method)

    def system(self, number: int, total: int) -> None:
        """Say which system's answers come, and of how many."""
        self._system = f", system {number} of {total}"
        self._left = min(self._left, self._answers_take * (total - number + 1))  # trainings may have stopped early

    def begin(self, step: str) -> None:
        """Start the bar of a step."""
        self._ratio, self._begun, whole = None, step, ""
        system = self._system if step.startswith("answers") and not self._steps else ""
        if self._steps:
            minutes = (time.monotonic() - self._began) / 60 * self._left / self._worked if self._worked else 0.0
            left = f", about {math.ceil(minutes)} min left in all" if minutes else ""
            whole = f"step {min(self._done + 1, self._steps)} of {self._steps}{left}: "
        self._begin(f"{whole}{metric_title(step)}{system}{self._method and ': '}{self._method}")

    def step(self, report: Mapping[str, float]) -> None:
        """Move the bar of a training."""
        ratio = "" if self._ratio is None else f"  ratio {self._ratio:.3f}"
        self._move(completed=report["step"], total=report["steps"], facts=f"loss {report['loss']:.3f}{ratio}")

    def round(self, record: Mapping[str, Any]) -> None:
        """One line for each controller round; the bar remembers the committed ratio."""
        self._ratio = record["ratio"]
        self._say(round_line(record))

    def answered(self, answered: int, prompts: int) -> None:
        """Move the bar of the answers."""
        self._move(completed=answered, total=prompts)

    def finished(self, step: Finished[Any]) -> None:
        """One line for each training and each set of answers; a comparison says only what was done now."""
        if step.key in self._shown or not isinstance(step.result, Trained | Learned | Tested):
            return
        self._shown.add(step.key)
        passes = self._answers_take if isinstance(step.result, Tested) else step.result.passes
        self._left, self._done = max(0.0, self._left - passes), self._done + 1
        self._worked += 0 if step.repeated else passes
        if step.repeated and self._method:
            return
        took = "already done" if step.repeated else f"{step.seconds:.1f} s"
        system = self._system if isinstance(step.result, Tested) else ""
        name = step.name if step.repeated else self._begun
        self._say(f"{metric_title(name):<32} {took:>12}   {_facts(step.result)}{system}")

    def scored(self, system: str, predictions: Sequence[Prediction]) -> None:
        """Print the first answers of a system, with what each is worth and what was expected."""
        metric = leading_metric(predictions)
        for row in predictions[: self._answers]:
            _, mark = marked(row.scores.get(metric or ""), metric)
            answer, expected = (one_line(text)[:_ANSWER_SHOWN] for text in (row.prediction, row.references[0]))
            self._say(f"  {system:<12} {mark:<8} {answer}   (expected: {expected})")

    def _begin(self, title: str) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._bars.start()
        self._task = self._bars.add_task(title, total=None, facts="")

    def _move(self, completed: float, total: float, facts: str = "") -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=completed, total=total, facts=facts)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=not self._console.is_terminal)


def listener_of(progress: Progress | bool) -> Progress:
    """Who is told of the steps of a script: the one given, or for True a bar on stderr where a person sees it, else nobody."""
    if isinstance(progress, Progress):
        return progress
    console = Console(stderr=True, quiet=not is_first(), emoji=False)
    return TerminalProgress(console) if progress and (console.is_terminal or console.is_jupyter) else Progress()


def metric_title(step: str) -> str:
    """What a step does, in words."""
    return next((title for name, title in _TITLES.items() if step.startswith(name)), step)


def round_line(record: Mapping[str, Any]) -> str:
    """A round in one line: candidates with their rewards, policy, committed ratio, and the curve as it is known so far.

    >>> round_line({"round": 2, "step": 12, "candidates": [0.3, 0.6], "rewards": [-0.02, 0.041], "policy_mean": 0.48,
    ...             "policy_std": 0.19, "ratio": 0.55, "curve": [[0.1, 0.3], [0.45, 0.0], [0.8, 0.1]]})
    'round 2, step 12: 30 % (-0.020) 60 % (+0.041); policy 48 ± 19 %; ratio 55 %; loss 10 % █▁▃ 80 %'
    """
    probes = zip(record["candidates"], record["rewards"], strict=True)
    shown = " ".join(f"{100 * ratio:.0f} % ({reward:+.3f})" for ratio, reward in probes)
    mean, std, ratio = (f"{100 * record[name]:.0f}" for name in ("policy_mean", "policy_std", "ratio"))
    line = f"round {record['round']}, step {record['step']}: {shown}; policy {mean} ± {std} %; ratio {ratio} %"
    if not (curve := record.get("curve")):
        return line
    (first, _), (last, _), highest = curve[0], curve[-1], max(loss for _, loss in curve) or 1.0
    bars = "".join(_BLOCKS[round(loss / highest * (len(_BLOCKS) - 1))] for _, loss in curve)
    return f"{line}; loss {100 * first:.0f} % {bars} {100 * last:.0f} %"


def _facts(result: Trained | Learned | Tested) -> str:
    if isinstance(result, Learned):
        return f"{result.estimate.summary}, {result.estimate.rounds} rounds"
    if isinstance(result, Tested):
        return f"{len(result.answers)} answers"
    best = "" if result.dev_loss is None else f", best at {result.best_step}, dev loss {result.dev_loss:.4f}"
    return f"{result.steps} steps{best}"
