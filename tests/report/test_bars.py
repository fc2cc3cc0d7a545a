"""What the live bar says: whole words at 100 columns, the system, and the time left though steps are slow."""

import io
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from grasp_lora import api
from grasp_lora.cli import terminal
from grasp_lora.engine.results import Finished, Trained
from grasp_lora.report.bars import TerminalProgress


@pytest.mark.parametrize(
    ("seen", "progress", "shows"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_script_shows_a_bar_where_a_person_sees_it(
    seen: bool, progress: bool, shows: bool, finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: seen)
    monkeypatch.setenv("TERM", "xterm")
    api.run("tiny.yaml", folder=finished_run, progress=progress)
    shown = capsys.readouterr()
    assert ("learn the prune ratio" in shown.err) == shows
    assert shown.out == ""


class Screen:
    """A terminal of 100 columns, whose clock is set."""

    def __init__(self) -> None:
        self.now = 0.0
        terminal = {"width": 100, "force_terminal": True, "color_system": None}
        console = Console(file=io.StringIO(), get_time=lambda: self.now, **terminal)
        self.progress = TerminalProgress(console)

    def bar(self) -> str:
        """The words of the bar as it stands now."""
        shown = Console(file=io.StringIO(), width=100, color_system=None)
        shown.print(self.progress._bars.get_renderable())
        return " ".join(shown.file.getvalue().split())


@pytest.fixture
def screen():
    screen = Screen()
    yield screen
    screen.progress.stop()


def test_the_time_left_is_there_though_steps_are_slow(screen: Screen) -> None:
    screen.progress.begin("source")
    for number, now in ((41, 100.0), (42, 300.0), (43, 500.0)):  # a training that goes on from its 40th step
        screen.now = now
        screen.progress.step({"step": number, "steps": 50, "loss": 1.25})
    assert screen.bar().endswith("43/50 loss 1.250 0:08:20 0:23:20 left")  # seven steps of 200 s


def test_nothing_is_said_of_the_time_left_until_it_is_known(screen: Screen) -> None:
    screen.progress.preparing()
    screen.now = 48.0
    assert screen.bar().endswith("0:00:48")


def test_a_run_says_its_step_the_time_left_in_all_and_each_training_by_its_own_name(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def done(result: Trained, name: str, repeated: bool = False) -> None:
        step = Finished(name, f"{name} {screen.now}", Path(), result, 60.0, {}, repeated)
        screen.progress.finished(step)

    monkeypatch.setattr(time, "monotonic", lambda: screen.now)
    trained = Trained(trained_examples=50, steps=50, best_step=50, dev_loss=None, history=[])  # 100 passes
    screen.progress.planned(6, 3 * 100 + 2 * 60, 60)
    done(trained, "source", repeated=True)  # of which the clock knows nothing
    screen.progress.begin("continued")
    assert screen.bar().startswith("step 2 of 6: train the source adapter further")
    screen.now = 100.0
    done(trained, "final-0.00")
    assert "train the source adapter further" in screen.progress._console.file.getvalue()
    screen.progress.begin("final-0.00")
    assert screen.bar().startswith("step 3 of 6, about 4 min left in all: fine-tune, nothing pruned")  # 220 passes
    screen.progress.system(1, 2)  # without the third training
    screen.progress.begin("answers")
    assert screen.bar().startswith("step 3 of 6, about 2 min left in all: answer the test prompts")


def test_answers_say_which_system_gives_them(screen: Screen) -> None:
    screen.progress.system(2, 5)
    screen.progress.begin("answers")
    screen.now = 60.0
    screen.progress.answered(10, 40)
    assert screen.bar().startswith("answer the test prompts, system 2 of 5 ")
    assert screen.bar().endswith(" 10/40 0:01:00")
    screen.progress.begin("dev-losses")
    assert screen.bar().startswith("measure dev losses ")


def test_no_word_of_the_bar_is_cut_at_100_columns(screen: Screen) -> None:
    screen.progress.method("GRASP, the recipe's own final runs, and their grid", 3, 12)
    screen.progress.begin("controller")
    at = {"round": 1, "step": 3, "candidates": [0.3], "rewards": [0.1], "policy_mean": 0.4, "policy_std": 0.2}
    screen.progress.round({"ratio": 0.4125, **at})
    screen.now = 10.0
    screen.progress.step({"step": 1, "steps": 5000, "loss": 1.25})
    shown = screen.bar()
    assert "…" not in shown
    for word in ("learn", "recipe's", "grid", "loss", "1.250", "ratio", "0.412", "1/5000"):
        assert word in shown.split()


def test_a_terminal_breaks_lines_between_words_and_leaves_commands_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Console(file=io.StringIO(), width=40, force_terminal=True, color_system=None)
    monkeypatch.setattr(terminal, "console", shown)
    terminal.say("measured words " * 10)
    terminal.say("next: grasp-lora run " + "x" * 60, copied=True)
    *prose, command = shown.file.getvalue().splitlines()
    assert len(prose) > 3
    assert {word for line in prose for word in line.split()} == {"measured", "words"}
    assert command == "next: grasp-lora run " + "x" * 60
