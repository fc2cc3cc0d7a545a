"""Record the loss landscape of a recipe, from which policies are judged by replay, without a model.

    python lab/record.py RECIPE --set data.root=FOLDER --output FOLDER

A few trainings like the controller's, each under a mask of another ratio, with the micro-dev losses at many ratios along the
way; and final runs at many ratios, with the losses of every split. The steps are on record as those of a comparison are, and
both share them where they use one folder. Run it again to go on after an interruption: what is on record is not done again.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from landscape import MOST_ROWS, SPLITS, FinalRun, Landscape, Trajectory
from rich.console import Console
from rich.table import Table
from rich.text import Text
from trajectory import trajectory

from grasp_lora.bench.checks import check
from grasp_lora.bench.compare import check_list, check_ratios
from grasp_lora.bench.run_folder import STORE_FOLDER, check_place
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import Store, environments
from grasp_lora.cli.progress import TerminalBenchProgress
from grasp_lora.cli.terminal import console, log_to_terminal, say, shown
from grasp_lora.errors import GraspError, Interrupted, RecipeError
from grasp_lora.recipes.load import load_recipe
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.storage.claims import Workplace, working_in
from grasp_lora.training.settings import TRAINED_AS_MEASURED, TrainingSettings

LANDSCAPE_FILE = "landscape.parquet"
MEASUREMENTS = 8  # of a trajectory after training has begun, where nothing else is asked for
# Rounded, since 3 * 0.1 is another number than the 0.3 that a comparison asks for.
FINAL_RATIOS = tuple(round(0.05 * number, 2) for number in range(2, 17))
TRAIN_RATIOS = (0.0, 0.4, 0.7, None)
PROBE_RATIOS = tuple(round(0.1 * number, 1) for number in range(9))


@dataclass(frozen=True)
class RecordingSettings:
    """What is recorded.

    Args:
        ratios: prune ratios of final runs, fractions in [0, 1]; there is always one at 0, too.
        train_ratios: held in one trajectory each, fractions in [0, 1]; None is the shared one, where each step draws its own.
        probe_ratios: measured along the trajectories, fractions in [0, 1].
        every: optimizer steps between measurements; None measures about eight times, the last step always included.
        dev: whether the shared trajectory is trained once more and dev measured along it, for controllers that probe there.

    Raises:
        ValueError: a number is out of range; a list is empty, says something twice, or leaves nothing to compare.
    """

    ratios: tuple[float, ...] = FINAL_RATIOS
    train_ratios: tuple[float | None, ...] = TRAIN_RATIOS
    probe_ratios: tuple[float, ...] = PROBE_RATIOS
    every: int | None = None
    dev: bool = True

    def __post_init__(self) -> None:
        check_ratios("ratios", self.ratios)
        check_ratios("probe_ratios", self.probe_ratios)
        check_list("train_ratios", ["shared" if ratio is None else ratio for ratio in self.train_ratios])
        check_ratios("train_ratios besides the shared one", [ratio for ratio in self.train_ratios if ratio is not None])
        if max(self.ratios) == 0.0:
            raise ValueError("ratios names 0 alone, where there is a final run in any case; give at least one more")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1 optimizer step")


def record(
    session: Session,
    folder: Path,
    settings: RecordingSettings,
    command: str = "",
) -> Landscape:
    """Do what is not on record yet, write `landscape.parquet`, and return what it holds.

    Args:
        session: of the recipe, with nothing loaded yet, whose progress is told how far the work is; a prune ratio and metrics
            that it gives are left aside.
        folder: for the landscape and the records; that of a comparison will do.
        settings: ratios and measurements.
        command: how the recording was asked for, a fact of the landscape.

    Raises:
        GraspError: the recipe, the data or an adapter does not fit; a training diverges; the folder cannot be written or another
            process writes there. What is on record stays.
        Interrupted: SIGTERM or SIGINT came.
    """
    recipe = session.recipe
    recipe = recipe.model_copy(update={"final": replace(recipe.final, prune_ratio=None)})
    check_place(folder)
    # Nothing is answered and no round is held, so neither metrics nor rounds have to be there.
    bare = recipe.model_copy(update={"metrics": (), "final": replace(recipe.final, prune_ratio=0.0)})
    session = Session(bare, session.base, session.progress)
    check(session)
    for split in SPLITS:
        if not getattr(session.splits, split):
            raise RecipeError(
                f"a landscape needs a {split} split, but data.target.{split} is 0; give it at least 1 example"
            )
    work = _Work(session, folder, settings)
    if work.rows > MOST_ROWS:
        raise RecipeError(
            f"the landscape would have {work.rows} losses, of which {MOST_ROWS} are allowed; measure less often (--every is "
            f"{work.every}), at fewer --probe-ratios, or --no-dev"
        )
    with working_in(folder) as place:
        place.begin()
        work.workplace = place
        landscape = work.execute(recipe, command)
        landscape.save(folder / LANDSCAPE_FILE)
    return landscape


@dataclass(frozen=True)
class _Task:
    """A part of the work.

    Args:
        title: as the display says it.
        passes: rough cost in forward passes of one example, a training example counted as two.
        do: does it, as far as it is not on record.
    """

    title: str
    passes: float
    do: Callable[[], Any]


class _Work:
    """One recording that is under way."""

    def __init__(self, session: Session, folder: Path, settings: RecordingSettings) -> None:
        self.session, self.settings, self.progress = session, settings, session.progress
        self.workplace = Workplace(folder)
        self._store = Store(folder / STORE_FOLDER, self.progress)
        self._bench = Bench(session, session, self._store)
        self._trajectories: list[Trajectory] = []
        self._finals: list[FinalRun] = []

    def execute(self, recipe: Recipe, command: str) -> Landscape:
        tasks = self._tasks()
        self.progress.begin(sum(task.passes for task in tasks))
        for task in tasks:
            self.workplace.place = f"in the {task.title}"
            self.progress.stage(task.title)
            task.do()
            self.progress.done(task.passes)
        return Landscape(self._facts(recipe, command), tuple(self._trajectories), tuple(self._finals))

    @property
    def every(self) -> int:
        """Optimizer steps between measurements."""
        return self.settings.every or math.ceil(self._controller_steps / MEASUREMENTS)

    @property
    def rows(self) -> int:
        """Losses in the finished landscape."""
        splits, settings = self.session.splits, self.settings
        probed = len(settings.train_ratios) * len(splits.micro_dev)
        probed += len(splits.dev) if settings.dev and None in settings.train_ratios else 0
        finals = len({0.0, *settings.ratios}) * sum(len(getattr(splits, split)) for split in SPLITS)
        return self._measurements * len(settings.probe_ratios) * probed + finals

    @property
    def _measurements(self) -> int:
        """Along one training, that before the first step included."""
        return 1 + math.ceil(self._controller_steps / self.every)

    @property
    def _controller_steps(self) -> int:
        return self.session.recipe.controller.training.steps(len(self.session.splits.train))

    def _tasks(self) -> list[_Task]:
        recipe, splits, settings = self.session.recipe, self.session.splits, self.settings
        measured = sum(len(getattr(splits, split)) for split in SPLITS)
        training = recipe.final.training
        evaluations = training.epochs / training.evaluate_every + 1
        final = _passes(training, splits.train) + evaluations * len(splits.dev) + measured
        probes = self._measurements * len(settings.probe_ratios) * len(splits.micro_dev)
        trajectory = _passes(recipe.controller.training, splits.train) + probes
        on_dev = trajectory + probes * (len(splits.dev) / len(splits.micro_dev) - 1)
        parents = 0.0 if recipe.source.adapters else _passes(recipe.source.training, splits.source_train)
        parents += 0.0 if recipe.target.adapter else _passes(recipe.target.training, splits.train)
        return [
            _Task("training of the adapters to merge", parents, self._bench.merged),
            *(_Task(_title(ratio), trajectory, partial(self._train, ratio)) for ratio in settings.train_ratios),
            *(
                [_Task(f"{_title(None)} on dev", on_dev, partial(self._train, None, "dev"))]
                if settings.dev and None in settings.train_ratios
                else []
            ),
            *(
                _Task(f"final run at ratio {ratio:g}", final, partial(self._finish, ratio))
                for ratio in sorted({0.0, *settings.ratios})
            ),
        ]

    def _train(self, train_ratio: float | None, split: str = "micro_dev") -> None:
        ratios = sorted(self.settings.probe_ratios)
        result = trajectory(self._bench, train_ratio, ratios, self.every, split).result
        losses = np.array(result["losses"], dtype=np.float64)
        self._trajectories.append(Trajectory(train_ratio, tuple(result["steps"]), tuple(ratios), losses, split))

    def _finish(self, ratio: float) -> None:
        adapter = self._bench.finetuned(self._bench.merged(), ratio)
        losses = {split: tuple(self._bench.losses(adapter, split).result["losses"]) for split in SPLITS}
        run = adapter.records[-1].result
        counts = [run[name] for name in ("trained_examples", "measured_examples")]
        self._finals.append(FinalRun(ratio, run["steps"], run["best_step"], losses, *counts))

    def _facts(self, recipe: Recipe, command: str) -> dict[str, Any]:
        backbone, splits, controller = self.session.backbone, self.session.splits, recipe.controller
        return {
            "name": recipe.name,
            "recipe_hash": recipe.fingerprint(),
            "command": command,
            "seed": recipe.seed,
            "language": self.session.language,
            "backbone": backbone.name,
            "backbone_fingerprint": backbone.fingerprint,
            "dtype": str(backbone.model.dtype).removeprefix("torch."),
            "examples": {split: len(getattr(splits, split)) for split in ("train", *SPLITS)},
            "steps": self._controller_steps,
            "every": self.every,
            "probe_every": controller.spacing(len(splits.train)),
            "trained_examples": round(controller.training.epochs * len(splits.train)),
            "made_with": environments(record for record, _ in self._store.used),
        }


def _title(train_ratio: float | None) -> str:
    return f"trajectory {'of shared ratios' if train_ratio is None else f'at ratio {train_ratio:g}'}"


def _passes(training: TrainingSettings, examples: Sequence[Any]) -> float:
    return TRAINED_AS_MEASURED * training.epochs * len(examples)


def print_landscape(landscape: Landscape, console: Console) -> None:
    """Print the mean losses of the final runs of a landscape, the lowest of each split bold."""
    splits = {"micro_dev": "micro-dev", "dev": "dev", "test": "test"}
    runs = landscape.finals
    best = {split: min(runs, key=lambda run: fmean(run.losses[split])) for split in splits}
    table = Table("prune ratio", *(f"{name} loss" for name in splits.values()), "best step", "steps")
    for run in runs:
        cells = [
            Text(f"{fmean(run.losses[split]):.4f}", style="bold" if run is best[split] else "") for split in splits
        ]
        table.add_row(f"{run.ratio:g}", *cells, str(run.best_step), str(run.steps))
    console.print(table)
    console.print(
        f"lowest dev loss at ratio {best['dev'].ratio:g}, lowest test loss at {best['test'].ratio:g}",
        highlight=False,
        soft_wrap=True,
    )


def settings_of(options: argparse.Namespace) -> RecordingSettings:
    """The settings that options of the command line ask for.

    Raises:
        ValueError: a list holds something else than numbers, or the settings refuse them.
    """
    return RecordingSettings(
        FINAL_RATIOS if options.ratios is None else _ratios("--ratios", options.ratios),
        tuple(None if part == "shared" else _ratio("--train-ratios", part) for part in _parts(options.train_ratios)),
        _ratios("--probe-ratios", options.probe_ratios),
        options.every,
        options.dev,
    )


def command_of(options: argparse.Namespace) -> str:
    """The command as another machine would be given it: without the places of the data and of the result."""
    given = [
        word
        for name in ("every", "ratios", "train_ratios", "probe_ratios")
        if (value := getattr(options, name)) is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    given += [word for one in options.overrides if not one.startswith("data.root=") for word in ("--set", one)]
    return shlex.join(["python", "lab/record.py", options.recipe, *given, *([] if options.dev else ["--no-dev"])])


def main(given: Sequence[str] | None = None) -> int:
    """Record, print the final runs; 2 after a mistake, 75 after a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipe", help="a recipe file, or the name of a built-in one")
    add("--every", type=int, help="optimizer steps between measurements; default: about eight measurements")
    add("--ratios", help="prune ratios of the final runs, fractions; default 0.10, 0.15, ..., 0.80; always 0, too")
    add("--train-ratios", default="0,0.4,0.7,shared", help="ratios held while training; shared draws one for each step")
    add("--probe-ratios", default=",".join(f"{ratio:g}" for ratio in PROBE_RATIOS), help="what is measured on the way")
    add("--no-dev", dest="dev", action="store_false", help="do not train at shared ratios once more to measure dev")
    add("--set", action="append", default=[], dest="overrides", help="a.b=value, of the recipe")
    add("--output", type=Path, help="default runs/NAME-landscape")
    options = parser.parse_args(given)
    log_to_terminal(verbose=False)
    try:
        settings = settings_of(options)
        recipe, base = load_recipe(options.recipe, options.overrides)
        folder = options.output or Path("runs") / f"{recipe.name}-landscape"
        with shown(TerminalBenchProgress(console)) as progress:
            landscape = record(Session(recipe, base, progress), folder, settings, command_of(options))
    except Interrupted as stop:
        sys.stderr.write(f"{stop}\n")
        return 75
    except (GraspError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print_landscape(landscape, console)
    say(f"landscape {folder / LANDSCAPE_FILE}")
    return 0


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _ratios(option: str, text: str) -> tuple[float, ...]:
    return tuple(_ratio(option, part) for part in _parts(text))


def _ratio(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        allowed = "numbers or shared" if option == "--train-ratios" else "numbers"
        raise ValueError(f"{option} holds {text!r}; give {allowed}, separated by commas") from error


if __name__ == "__main__":
    sys.exit(main())
