"""`grasp-lora compare`: every method on the user's own rows under one protocol, and one table with uncertainty and cost.

The work is a list of (method, seed), or (method, fold). What is on record in the folder's store is not done again, whoever did
it, and a training that was stopped goes on. Several processes may compare in one folder: each leaves a method aside while another
process is at one of its steps. The table is made anew after each seed, so that it can be read while more is under way.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from grasp_lora.data.splits import Fold, group_numbers, group_size
from grasp_lora.engine.check import check, check_splits, why_no_folds
from grasp_lora.engine.comparison import (
    COMPARISON_FILE,
    Comparison,
    ComparisonSettings,
    Outcomes,
    expected_width,
    summary,
)
from grasp_lora.engine.methods import METHODS
from grasp_lora.engine.plan import most_trained
from grasp_lora.engine.results import read_if_there
from grasp_lora.engine.run_folder import COMPARE_FOLDER, STORE_FOLDER, check_place, threads_of
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import WAIT, Store
from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.models.adapters import check_target_modules
from grasp_lora.recipes.text import RECIPE_FILE
from grasp_lora.storage.claims import Busy, Workplace, claim, working_in
from grasp_lora.storage.threads import use_idle_cores
from grasp_lora.storage.writing import write_json, write_whole

logger = logging.getLogger(__name__)

LEAST_TEST = 2
SOURCE_MAY_HAVE_SEEN = (
    "each row is tested in a fold, and the given source adapter may have seen what belongs together with it"
)

Show = Callable[[Path, Comparison], object]


def compare(
    session: Session, folder: Path, settings: ComparisonSettings, show: Show = lambda folder, comparison: None
) -> Comparison:
    """Run what is not on record yet; write `compare.json` and return what it holds.

    A method that fails, for example because its training diverges, leaves its reason in its row, and the others go on.

    Args:
        session: of the recipe, whose progress is told how far the work is.
        folder: of the experiment, that of a run included; steps of any recipe may stand in its store side by side.
        show: given the folder of the tables and what `compare.json` holds whenever that was written.

    Raises:
        GraspError: the recipe, the data or an adapter does not fit, or the folder cannot be written; what is on record stays.
        Interrupted: SIGTERM or SIGINT came.
    """
    check_place(folder)
    with working_in(folder) as work:
        use_idle_cores(session.recipe.backbone.device, threads_of(folder))
        session.progress.preparing()
        sessions = _prepared(session, settings)
        work.begin(shared=True)
        (folder / COMPARE_FOLDER).mkdir(exist_ok=True)
        return _Work(sessions, work, settings, show).execute()


def _prepared(session: Session, settings: ComparisonSettings) -> list[Session]:
    """The sessions of the folds, or the one of the recipe's splits, with everything loaded and checked.

    Raises:
        GraspError: the recipe, the data or an adapter does not fit, or there are too few test rows.
    """
    recipe, folds = session.recipe, settings.folds
    if folds and (problem := why_no_folds(recipe)):
        raise RecipeError(problem)
    first = Session(recipe, session.base, session.progress, Fold(1, folds) if folds else None)
    check(first)
    check_target_modules(first.backbone.model, recipe.lora.target_modules)
    sessions = [first]
    for number in range(2, (folds or 1) + 1):
        next_session = Session(recipe, session.base, session.progress, Fold(number, folds or 1))
        next_session.backbone, next_session.given = first.backbone, first.given
        check_splits(next_session)
        sessions.append(next_session)
    if (tested := sum(len(part.splits.test) for part in sessions)) < LEAST_TEST:
        raise RecipeError(
            f"a comparison needs a test split, but it has {tested} examples (data.target.test); give it at least {LEAST_TEST}"
        )
    return sessions


@dataclass
class _Batch:
    """All methods with one seed, or on one fold: its number and title, and the names of the methods that are to be done."""

    number: int
    title: str
    steps: Steps
    to_do: list[str]


class _Work:
    """A comparison that is under way."""

    def __init__(self, sessions: list[Session], work: Workplace, settings: ComparisonSettings, show: Show) -> None:
        self.sessions, self.work, self.settings, self.show = sessions, work, settings, show
        self.folder = work.folder / COMPARE_FOLDER
        self.progress = sessions[0].progress
        reasons = {name: [METHODS[name].unavailable(part) for part in sessions] for name in settings.names}
        self.rows = {name: Outcomes(unavailable=next(filter(None, why), None)) for name, why in reasons.items()}
        store = Store(work.folder / STORE_FOLDER, self.progress, work)
        self.batches = []
        for number in range(1, len(sessions) + 1) if settings.folds else settings.seeds:
            shared = sessions[number - 1] if settings.folds else sessions[0]
            seed = settings.seeds[0] if settings.folds else number
            title = f"fold {number} of {len(sessions)}" if settings.folds else f"seed {seed}"
            seeded = shared.variant(shared.recipe.model_copy(update={"seed": seed}))
            steps = Steps(seeded, store, shared, settings.grid, lambda: work.interruption.asked_by)
            to_do = [name for name, row in self.rows.items() if row.unavailable is None]
            self.batches.append(_Batch(number, title, steps, to_do))
        self.planned = sum(len(batch.to_do) for batch in self.batches)

    def execute(self) -> Comparison:
        """Go through all batches until nothing is left, also by other processes; write the table after each batch."""
        self._say_what_to_expect()
        self._begin_tables()
        written, comparison = 0, None
        while comparison is None or written < len(self.batches):
            before = sum(len(batch.to_do) for batch in self.batches)
            for batch in self.batches:
                self._advance(batch)
                complete = next((n for n, each in enumerate(self.batches) if each.to_do), len(self.batches))
                if complete > written:
                    written, comparison = complete, self._summary(complete)
                    self._write(comparison)
            if written < len(self.batches) and before == sum(len(batch.to_do) for batch in self.batches):
                time.sleep(WAIT)  # for what other processes do in this folder
        return comparison

    def _advance(self, batch: _Batch) -> None:
        """Do every method of a batch that is to be done, less those of which another process does a step."""
        for name in list(batch.to_do):
            method, row = METHODS[name], self.rows[name]
            title = f"{method.title}, {batch.title}"
            try:
                if row.unavailable is None:
                    left = sum(len(each.to_do) for each in self.batches)
                    self.progress.method(title, self.planned - left + 1, self.planned)
                    outcome = method.run(batch.steps)
                    row.by_number[batch.number] = replace(
                        outcome, measured=batch.steps.measure(outcome.adapter, on_dev=False)
                    )
            except Busy:
                continue
            except RecipeError:  # of a record or a setting: that concerns the whole comparison
                raise
            except GraspError as error:
                row.failed = True
                row.unavailable = f"failed {'in' if self.settings.folds else 'with'} {batch.title}: {error}"
                row.by_number.clear()
            batch.to_do.remove(name)

    def _summary(self, complete: int) -> Comparison:
        """What the batches that come before the first unfinished one have come to."""
        numbers = [batch.number for batch in self.batches[:complete]]
        rows = {
            name: replace(
                row, by_number={number: row.by_number[number] for number in numbers if number in row.by_number}
            )
            for name, row in self.rows.items()
        }
        folds = [part.splits for part in self.sessions[:complete]] if self.settings.folds else []
        comparison = summary(self.sessions[0], self.settings, rows, folds)
        seen = [SOURCE_MAY_HAVE_SEEN] if folds and self.sessions[0].recipe.source.adapters else []
        return comparison.model_copy(update={"warnings": [*comparison.warnings, *seen]})

    def _say_what_to_expect(self) -> None:
        planned = self.settings.planned_against(self.settings.names)
        test = [row for part in self.sessions for row in part.splits.test]
        groups, seeds = len(set(group_numbers(test))), 1 if self.settings.folds else len(self.settings.seeds)
        metrics = list(self.sessions[0].metrics)
        ready = [name for name, row in self.rows.items() if row.unavailable is None]
        trained = most_trained(ready, self.sessions[0], len(self.settings.grid))
        source, seeded = trained.pop("source", 0), sum(trained.values())
        once = 1 if not self.settings.folds else len(self.batches)  # a fold has source rows of its own
        self.progress.note(
            f"trains on at most {source * once + seeded * len(self.batches)} examples, and {len(ready)} methods answer "
            f"{len(test)} test prompts{'' if self.settings.folds else ' with each seed'}; `check` says what one takes here"
        )
        if text := expected_width(metrics, len(test), len(planned), group_size(test), groups, seeds):
            self.progress.note(text)

    def _begin_tables(self) -> None:
        """Write the recipe, unless the tables of another one stand there: then it comes with those that replace them."""
        with claim(self.folder, wait=True):
            before = read_if_there(self.folder / COMPARISON_FILE, Comparison)
            if before is None or before.recipe_hash == self.sessions[0].recipe.fingerprint():
                self._write_recipe()
            else:
                logger.warning(
                    "%s holds the tables of another recipe, which these replace; to keep both, give --output another folder",
                    self.folder,
                )

    def _write_recipe(self) -> None:
        write_whole(self.folder / RECIPE_FILE, self.sessions[0].recipe.to_yaml(self.folder))

    def _write(self, comparison: Comparison) -> None:
        with claim(self.folder, wait=True):
            before = read_if_there(self.folder / COMPARISON_FILE, Comparison)
            if before is not None and before.is_ahead_of(comparison):  # of another process, or of an earlier one
                return
            self._write_recipe()
            write_json(self.folder / COMPARISON_FILE, comparison.to_json())
            self.show(self.folder, comparison)
