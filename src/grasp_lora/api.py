"""The jobs as functions, for a script as for the command line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grasp_lora.bench import compare as comparing
from grasp_lora.bench import run as running
from grasp_lora.bench import search as searching
from grasp_lora.bench.compare import ComparisonSettings
from grasp_lora.bench.progress import Progress
from grasp_lora.bench.run import RunResult
from grasp_lora.bench.run_folder import COMPARE_FOLDER, SWEEP_FOLDER
from grasp_lora.bench.search import SweepResult, SweepSettings
from grasp_lora.bench.session import Session
from grasp_lora.recipes.load import load_recipe
from grasp_lora.report.comparison import write_comparison
from grasp_lora.report.pages import REPORT_FILE, write_model_card, write_report
from grasp_lora.storage.files import clear_write_errors
from grasp_lora.storage.processes import first

Overrides = Mapping[str, Any] | Sequence[str]


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
        allow_code: whether the recipe may name code (`package.module:name`); see `load_recipe`.

    Raises:
        GraspError: something does not fit; one line says what. What is done stays.
        Interrupted: SIGTERM or SIGINT came.
    """
    session, place = _opened(recipe, overrides, folder, progress, allow_code)
    result = running.run(session, place, session.progress)
    session.progress.stage("report")

    def report() -> None:
        with clear_write_errors(place):
            if not (place / REPORT_FILE).is_file():
                write_model_card(place, result.adapter)
                write_report(place)

    first(report)
    return result


def compare(
    recipe: str | Path,
    overrides: Overrides = (),
    folder: str | Path | None = None,
    progress: Progress | None = None,
    *,
    allow_code: bool = False,
    **settings: Any,
) -> tuple[Path, dict[str, Any]]:
    """Run every method under one protocol, in the folder and with the steps of the recipe's run; write the tables.

    Args:
        recipe, overrides, folder, progress, allow_code: as of `run`.
        settings: of `ComparisonSettings`, such as `methods`, `seeds` and `grid`.

    Returns:
        The folder of the tables, and the content of its compare.json.

    Raises:
        GraspError, ValueError, Interrupted: as of `run`; a setting is out of range.
    """
    chosen = ComparisonSettings(**settings)
    session, place = _opened(recipe, overrides, folder, progress, allow_code)
    return place / COMPARE_FOLDER, comparing.compare(session, place, chosen, session.progress, write_comparison)


def sweep(
    recipe: str | Path,
    overrides: Overrides = (),
    folder: str | Path | None = None,
    progress: Progress | None = None,
    *,
    allow_code: bool = False,
    **settings: Any,
) -> tuple[Path, SweepResult]:
    """Search good values for keys of a recipe with Optuna, by the dev loss of the final run.

    Args:
        recipe, overrides, folder, progress, allow_code: as of `run`.
        settings: of `SweepSettings`, such as `params` and `trials`.

    Returns:
        The folder of sweep.json and best.yaml, and the content of the former.

    Raises:
        GraspError, ValueError, Interrupted: as of `run`; a setting is out of range.
    """
    chosen = SweepSettings(**settings)
    session, place = _opened(recipe, overrides, folder, progress, allow_code)
    return place / SWEEP_FOLDER, searching.sweep(session, place, chosen, session.progress)


def _opened(
    recipe: str | Path, overrides: Overrides, folder: str | Path | None, progress: Progress | None, allow_code: bool
) -> tuple[Session, Path]:
    texts = (
        [f"{key}={_text(value)}" for key, value in overrides.items()] if isinstance(overrides, Mapping) else overrides
    )
    loaded, base = load_recipe(recipe, texts, allow_code=allow_code)
    return Session(loaded, base, progress), Path("runs") / loaded.name if folder is None else Path(folder)


def _text(value: Any) -> str:
    """A value as an override's YAML."""
    return value if isinstance(value, str) else json.dumps(value)
