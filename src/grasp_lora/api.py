"""The jobs as functions, for a script as for the command line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grasp_lora.engine import compare as comparing
from grasp_lora.engine import judge as judging
from grasp_lora.engine import run as running
from grasp_lora.engine.comparison import Comparison, ComparisonSettings
from grasp_lora.engine.judge import Judgement
from grasp_lora.engine.progress import Progress
from grasp_lora.engine.run_folder import ADAPTER_FOLDER, COMPARE_FOLDER, Delivered, Grid, Metrics, Run
from grasp_lora.engine.session import Session
from grasp_lora.errors import RecipeError
from grasp_lora.method.rules import RatioEstimate
from grasp_lora.recipes.load import Overrides, explain, load_recipe
from grasp_lora.report.bars import listener_of
from grasp_lora.report.card import write_model_card
from grasp_lora.report.pages import write_comparison, write_report
from grasp_lora.storage.claims import working_in
from grasp_lora.storage.processes import on_first_process
from grasp_lora.storage.reading import expanded


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Args:
        record: all of it, as the report tells it.
        folder: of the run.
    """

    record: Run
    folder: Path

    @property
    def ratio(self) -> RatioEstimate:
        """The learned prune ratio with its interval, or the one that the recipe gives."""
        return self.record.estimate

    @property
    def metrics(self) -> Metrics:
        """What each system is worth on dev and test."""
        return self.record.metrics

    @property
    def delivered(self) -> Delivered:
        """Which adapter is handed over, and why."""
        return self.record.metrics.delivered

    @property
    def adapter(self) -> Path:
        """The folder of the adapter that is handed over."""
        return self.folder / ADAPTER_FOLDER


def run(
    recipe: str | Path,
    overrides: Overrides = (),
    folder: str | Path | None = None,
    progress: Progress | bool = True,
    *,
    allow_code: bool = False,
    grid: Grid | bool = False,
) -> RunResult:
    """Do the main job of a recipe: adapters, merge, learn the ratio if it is asked for, final run, scores, report.

    A run that was stopped goes on; of one that is finished no step is done again.

    Args:
        recipe: a file, or the name of a built-in recipe.
        overrides: changes of the recipe, such as `{"data.root": "data"}` or `["data.root=data"]`.
        folder: of the run; None takes runs/NAME.
        progress: told of the steps. True shows a bar where stderr is a terminal or a notebook; False is silent.
        allow_code: whether code that the recipe names by import path may be imported.
        grid: True to do a grid search of eight final runs beside the learned ratio, too; or one that is on record.

    Raises:
        GraspError: something does not fit; one line says what. What is done stays.
        Interrupted: SIGTERM or SIGINT came.
    """
    with _told(progress) as listener:
        session, place = _opened(recipe, overrides, folder, listener, allow_code)
        result = RunResult(running.run(session, place, grid), place)

    def report() -> None:
        with working_in(place) as work:
            work.place = "while the report was written"
            write_model_card(result.record, place, result.adapter)
            write_report(result.record, place)

    on_first_process(report)
    return result


def compare(
    recipe: str | Path,
    overrides: Overrides = (),
    folder: str | Path | None = None,
    progress: Progress | bool = True,
    *,
    allow_code: bool = False,
    **settings: Any,
) -> tuple[Path, Comparison]:
    """Run every method under one protocol, in the folder and with the steps of the recipe's run; write the tables.

    Args:
        recipe, overrides, folder, progress, allow_code: as of `run`.
        settings: of `ComparisonSettings`, such as `methods`, `seeds` and `grid`.

    Returns:
        The folder of the tables, and what its compare.json holds.

    Raises:
        GraspError, Interrupted: as of `run`; a setting is out of range.
    """
    try:
        chosen = ComparisonSettings(**settings)
    except ValidationError as error:
        raise RecipeError(explain(error, list(ComparisonSettings.model_fields))) from error
    with _told(progress) as listener:
        session, place = _opened(recipe, overrides, folder, listener, allow_code)
        return place / COMPARE_FOLDER, comparing.compare(session, place, chosen, write_comparison)


def judge(
    adapters: Sequence[str | Path],
    rows: str | Path,
    language: str,
    progress: Progress | bool = True,
    **settings: Any,
) -> Judgement:
    """Say which of several PEFT adapters is best on a file of rows, with paired intervals between all of them.

    Args:
        adapters: of one backbone, folders or hub ids; `backbone` is the backbone alone.
        rows: a file of rows with answers, which none of the adapters was trained on.
        language: code of the rows, such as `sw`.
        progress: as of `run`.
        settings: `columns`, `sheet` and what else `grasp_lora.engine.judge.judge` takes.

    Raises:
        GraspError: an adapter does not fit, or the rows cannot be used, or an adapter was trained on them.
    """
    with _told(progress) as listener:
        return judging.judge(adapters, rows, language, progress=listener, **settings)


@contextmanager
def _told(progress: Progress | bool) -> Iterator[Progress]:
    """Who is told of the steps; what is live on the screen goes at the end of the context."""
    listener = listener_of(progress)
    try:
        yield listener
    finally:
        listener.stop()


def _opened(
    recipe: str | Path, overrides: Overrides, folder: str | Path | None, progress: Progress, allow_code: bool
) -> tuple[Session, Path]:
    loaded, base = load_recipe(recipe, overrides, allow_code=allow_code)
    return Session(loaded, base, progress), Path("runs") / loaded.name if folder is None else expanded(folder)
