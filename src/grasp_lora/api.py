"""The jobs as functions, for a script as for the command line."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from grasp_lora.bench import compare as comparing
from grasp_lora.bench import run as running
from grasp_lora.bench.compare import ComparisonSettings
from grasp_lora.bench.comparison_record import Comparison
from grasp_lora.bench.plan import Plan, plan_comparison
from grasp_lora.bench.progress import Progress
from grasp_lora.bench.run import RunResult
from grasp_lora.bench.run_folder import CARD_FILE, COMPARE_FOLDER, REPORT_FILE
from grasp_lora.bench.session import Session
from grasp_lora.errors import RecipeError
from grasp_lora.recipes.explain import explain
from grasp_lora.recipes.load import Overrides, load_recipe
from grasp_lora.report.card import write_model_card
from grasp_lora.report.comparison import write_comparison
from grasp_lora.report.pages import write_report
from grasp_lora.storage.files import clear_write_errors
from grasp_lora.storage.processes import on_first_process
from grasp_lora.storage.reading import expanded


def run(
    recipe: str | Path,
    overrides: Overrides = (),
    folder: str | Path | None = None,
    progress: Progress | None = None,
    *,
    allow_code: bool = False,
) -> RunResult:
    """Do the main job of a recipe: adapters, merge, learn the ratio, final run, evaluation, report.

    A run that was stopped goes on; one that is finished is read.

    Args:
        recipe: a file, or the name of a built-in recipe.
        overrides: changes of the recipe, such as `{"data.root": "data"}` or `["data.root=data"]`.
        folder: of the run; None takes runs/NAME.
        progress: told of stages and steps; None is silent.
        allow_code: whether code that the recipe names by import path may be imported.

    Raises:
        GraspError: something does not fit; one line says what. What is done stays.
        Interrupted: SIGTERM or SIGINT came.
    """
    session, place = _opened(recipe, overrides, folder, progress, allow_code)
    result = running.run(session, place)
    session.progress.stage("report")

    def report() -> None:
        with clear_write_errors(place):
            if not ((place / REPORT_FILE).is_file() and (result.adapter / CARD_FILE).is_file()):
                write_model_card(place, result.adapter)
                write_report(place)

    on_first_process(report)
    return result


def compare(
    recipe: str | Path,
    overrides: Overrides = (),
    folder: str | Path | None = None,
    progress: Progress | None = None,
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
    chosen = _checked(settings)
    session, place = _opened(recipe, overrides, folder, progress, allow_code)
    return place / COMPARE_FOLDER, comparing.compare(session, place, chosen, write_comparison)


def plan(
    recipe: str | Path,
    overrides: Overrides = (),
    folder: str | Path | None = None,
    *,
    allow_code: bool = False,
    **settings: Any,
) -> Plan:
    """Say what `compare` would do, in forward passes; nothing is trained or written.

    Args:
        recipe, overrides, folder, allow_code, settings: as of `compare`.

    Raises:
        GraspError: what `compare` would refuse.
    """
    chosen = _checked(settings)
    session, place = _opened(recipe, overrides, folder, None, allow_code)
    return plan_comparison(session, place, chosen)


def _checked(settings: dict[str, Any]) -> ComparisonSettings:
    try:
        return TypeAdapter(ComparisonSettings).validate_python(settings)
    except ValidationError as error:
        raise RecipeError(explain(error, [one.name for one in fields(ComparisonSettings)])) from error


def _opened(
    recipe: str | Path, overrides: Overrides, folder: str | Path | None, progress: Progress | None, allow_code: bool
) -> tuple[Session, Path]:
    loaded, base = load_recipe(recipe, overrides, allow_code=allow_code)
    return Session(loaded, base, progress), Path("runs") / loaded.name if folder is None else expanded(folder)
