"""`grasp-lora compare`: every method on the user's own data under one protocol, and one table with uncertainty and cost.

The work is a list of (method, seed). What is on record in the folder's store is not done again, whoever did it, and a training
that was stopped goes on. Several processes may compare in one folder: each leaves a method aside while another process is at one
of its steps. The table is made from the records alone, anew after each seed, so that it can be read while more is under way.
Paper: main table and runtime table.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from grasp_lora.bench.checks import check, check_can_be_cut, check_config, check_list, check_ratios, check_splits
from grasp_lora.bench.comparison_record import COMPARISON_FILE, Comparison
from grasp_lora.bench.keyed import GRID
from grasp_lora.bench.methods import METHODS
from grasp_lora.bench.planned import SEEDS, expected_width, planned_against
from grasp_lora.bench.records import read_record
from grasp_lora.bench.run_folder import COMPARE_FOLDER, STORE_FOLDER, check_place
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import WAIT, Store
from grasp_lora.bench.summary import Outcomes, Rows, summary
from grasp_lora.data.splits import Fold, group_numbers, group_size
from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.evaluation.statistics import least_resamples
from grasp_lora.models.adapters import check_target_modules
from grasp_lora.recipes.text import RECIPE_FILE
from grasp_lora.storage.checkpoints import Checkpointing
from grasp_lora.storage.claims import Busy, Workplace, claim, working_in
from grasp_lora.storage.files import write_json, write_whole

logger = logging.getLogger(__name__)

LEAST_TEST = 2
SOURCE_MAY_HAVE_SEEN = (
    "each row is tested in a fold, and the given source adapter may have seen what belongs together with it"
)


@dataclass(frozen=True)
class ComparisonSettings:
    """What is compared.

    Args:
        methods: names of methods; by default all.
        seeds: seeds of initialisation, order of the data and controller; the source adapter is that of the recipe's seed.
        grid: prune ratios of the grid search, fractions in [0, 1].
        reference: the method that the others are compared with; it is run even if `methods` leaves it out. Verdicts are those of
            the planned comparisons: with grasp, continued, joint and grid.
        folds: cross-validation: cut the target's pool into so many folds, at least 2, and test on each of them once, with one
            seed. None takes the recipe's splits.
        resamples: of the bootstrap.

    Raises:
        ValueError: an unknown name, a list that is empty or says something twice, a ratio out of range, too few resamples or
            folds, folds beside several seeds.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = SEEDS
    grid: tuple[float, ...] = GRID
    reference: str = "grasp"
    folds: int | None = None
    resamples: int = 10_000

    def __post_init__(self) -> None:
        if self.folds is not None:
            self._check_folds(self.folds)
        for name in (*self.methods, self.reference):
            if name not in METHODS:
                raise ValueError(f"there is no method {name!r}; allowed: {', '.join(METHODS)}")
        check_list("methods", self.methods)
        check_list("seeds", self.seeds)
        check_ratios("grid", self.grid)
        for seed in self.seeds:
            if seed < 0:
                raise ValueError(f"seed is {seed}; it must be at least 0")
        least = least_resamples(len({*self.methods, self.reference}) - 1)
        if self.resamples < least:
            raise ValueError(f"resamples is {self.resamples}; so many methods need at least {least}")

    def _check_folds(self, folds: int) -> None:
        if self.seeds is SEEDS:  # nobody has asked for several
            object.__setattr__(self, "seeds", SEEDS[:1])
        if folds < 2:
            raise ValueError(f"folds is {folds}; it must be at least 2")
        if len(self.seeds) > 1:
            raise ValueError(f"folds are compared with one seed, but seeds has {len(self.seeds)}; give one")


Show = Callable[[Path, Comparison], object]


def _nothing(folder: Path, comparison: Comparison) -> None:
    """Show nothing."""


def compare(
    session: Session,
    folder: Path,
    settings: ComparisonSettings,
    show: Show = _nothing,
) -> Comparison:
    """Run what is not on record yet; write `compare.json` and return what it holds.

    A method that fails, for example because its training diverges, leaves its reason in its row, and the others go on.

    Args:
        session: of the recipe, whose progress is told how far the work is; a prune ratio that it gives is left aside.
        folder: of the experiment, that of a run included; steps of any recipe may stand in its store side by side.
        settings: methods, seeds and the rest.
        show: given the folder of the tables and what `compare.json` holds whenever that was written.

    Raises:
        GraspError: the recipe, the data or an adapter does not fit, the folder cannot be written or a run writes there;
            what is on record stays.
        Interrupted: SIGTERM or SIGINT came.
    """
    with working_in(folder) as place:
        session = prepared(session, folder, settings)
        session.checkpoints = Checkpointing(session.recipe.save_every, lambda: place.interruption.asked_by)
        work = Work(session, place, settings, show)
        work.store.check_dtype(str(session.backbone.model.dtype))
        place.begin(shared=True)
        check_config(work.store.folder, session.backbone)
        (folder / COMPARE_FOLDER).mkdir(exist_ok=True)
        work.begin()
        return work.execute()


def prepared(session: Session, folder: Path, settings: ComparisonSettings) -> Session:
    """Return the session of a comparison, whose prune ratio is learned, with everything loaded and checked.

    Args:
        session: of the recipe; what is to become of the result (`final.prune_ratio`, `final.all_rows`) is left aside.
        folder: of the experiment.
        settings: with folds the session is that of the first one.

    Raises:
        GraspError: the folder, the recipe, the data or an adapter does not fit.
    """
    recipe = session.recipe
    if settings.folds:
        check_can_be_cut(recipe)
    if (given := recipe.final.prune_ratio) is not None:
        logger.warning("final.prune_ratio is left aside: rows learn their own, and --grid %g has that one", given)
    recipe = recipe.model_copy(update={"final": replace(recipe.final, prune_ratio=None)})
    check_place(folder)
    session = Session(recipe, session.base, session.progress, Fold(1, settings.folds) if settings.folds else None)
    check(session)
    check_target_modules(session.backbone.model, recipe.lora.target_modules)
    return session


@dataclass
class _Batch:
    """All methods with one seed, or in one fold: under which number outcomes go, and what is to be done."""

    bench: Bench
    number: int
    title: str
    to_do: list[str]


class Work:
    """One comparison that is under way.

    Raises:
        RecipeError: a split cannot be filled or has too few test examples; all are read before the first run.
    """

    def __init__(
        self,
        session: Session,
        place: Workplace,
        settings: ComparisonSettings,
        show: Show = _nothing,
    ) -> None:
        self.session, self.place, self.settings, self.show = session, place, settings, show
        self.progress = session.progress
        self.store = Store(place.folder / STORE_FOLDER, self.progress, place.interruption)
        self.names = [name for name in METHODS if name in {*settings.methods, settings.reference}]
        recipe = session.recipe
        if recipe.final.all_rows and "delivered" in self.names:
            logger.warning(
                "final.all_rows is left aside: the row 'delivered' is what a run chooses, before that last training"
            )
        self.folds = {1: session} if settings.folds else {}
        for number in range(2, 1 + (settings.folds or 0)):
            self.folds[number] = self._in_fold(Fold(number, settings.folds or 0))
            check_splits(self.folds[number])
        self.numbers = tuple(self.folds) or settings.seeds
        self.rows = self._rows(*(self.folds.values() or [session]))

    def execute(self) -> Comparison:
        planned = planned_against(self.settings.reference, self.names)
        test = [example for one in self.folds.values() or [self.session] for example in one.splits.test]
        groups, seeds = len(set(group_numbers(test))), 1 if self.folds else len(self.numbers)
        metrics = list(self.session.metrics)
        if text := expected_width(metrics, len(test), len(planned), group_size(test), groups, seeds):
            self.progress.note(text)
        batches = self._batches(Bench)
        self.progress.begin(sum(METHODS[name].units for batch in batches for name in batch.to_do))
        finished = 0
        while True:
            used = len(self.store.used)
            for batch in batches:
                self._advance(batch)
                before, finished = finished, next((n for n, one in enumerate(batches) if one.to_do), len(batches))
                if finished > before:
                    comparison = self._comparison(finished)
                    self._write(comparison)
            if finished == len(batches):
                return comparison
            self._wait(used)

    def _wait(self, used: int) -> None:
        """Wait for other processes, unless so many steps have become more."""
        if len(self.store.used) == used:
            self.progress.stage("waiting for what other processes do in this folder")
            time.sleep(WAIT)

    def _comparison(self, finished: int) -> Comparison:
        """What the batches that come before the first unfinished one have come to."""
        settings, numbers = self.settings, self.numbers[:finished]
        rows = {
            name: replace(row, by_number={one: row.by_number[one] for one in numbers if one in row.by_number})
            for name, row in self.rows.items()
        }
        folds = [one.splits for number, one in self.folds.items() if number in numbers]
        found = summary(self.session, settings, rows, folds)
        seen = [SOURCE_MAY_HAVE_SEEN] if folds and self.session.recipe.source.adapters else []
        return found.model_copy(update={"warnings": [*found.warnings, *seen]})

    def begin(self) -> None:
        """Write the recipe, unless the tables of another one stand there: then it comes with the tables that replace them."""
        tables = self.place.folder / COMPARE_FOLDER
        with claim(tables, wait=True):
            before = read_record(tables / COMPARISON_FILE, Comparison)
            if before is None or before.recipe_hash == self.session.recipe.fingerprint():
                self._write_recipe()
            else:
                text = "%s holds the tables of another recipe, which these replace; to keep both, give --output another folder"
                logger.warning(text, tables)

    def _write_recipe(self) -> None:
        tables = self.place.folder / COMPARE_FOLDER
        write_whole(tables / RECIPE_FILE, self.session.recipe.to_yaml(tables))

    def run_all(self, kind: type[Bench]) -> None:
        """Go through all seeds or folds with benches of a kind, and write no table."""
        batches = self._batches(kind)
        while True:
            used = len(self.store.used)
            for batch in batches:
                self._advance(batch)
            if not any(batch.to_do for batch in batches):
                return
            self._wait(used)

    def _batches(self, kind: type[Bench]) -> list["_Batch"]:
        """All there is to do."""
        shared, seeds = self.session, self.settings.seeds
        if self.folds:
            of = len(self.folds)
            return [
                self._batch(fold, seeds[0], kind, number, f"fold {number} of {of}")
                for number, fold in self.folds.items()
            ]
        return [self._batch(shared, seed, kind) for seed in seeds]

    def _rows(self, *sessions: Session) -> Rows:
        """Rows with nothing in them yet, for the splits of a session, or of each fold.

        Raises:
            RecipeError: there are too few test examples to compare anything.
        """
        tested = sum(len(one.splits.test) for one in sessions)
        if tested < LEAST_TEST:
            raise RecipeError(
                f"a comparison needs a test split, but it has {tested} examples (data.target.test); "
                f"give it at least {LEAST_TEST}"
            )
        reasons = {name: [METHODS[name].unavailable(one) for one in sessions] for name in self.names}
        return {name: Outcomes(unavailable=next(filter(None, found), None)) for name, found in reasons.items()}

    def _in_fold(self, fold: Fold) -> Session:
        """A session of another fold of the same data."""
        session = Session(self.session.recipe, self.session.base, self.session.progress, fold)
        session.backbone, session.checkpoints = self.session.backbone, self.session.checkpoints
        session.existing_adapters = self.session.existing_adapters
        return session

    def _batch(
        self, shared: Session, seed: int, kind: type[Bench], number: int | None = None, title: str = ""
    ) -> "_Batch":
        seeded = shared.variant(shared.recipe.model_copy(update={"seed": seed}))
        bench = kind(seeded, shared, self.store, self.settings.grid)
        to_do = [name for name, row in self.rows.items() if row.unavailable is None]
        return _Batch(bench, seed if number is None else number, title or f"seed {seed}", to_do)

    def _advance(self, batch: "_Batch") -> None:
        """Do every method of a batch that is to be done, less those of which another process does a step."""
        left = []
        for name in batch.to_do:
            method, row = METHODS[name], self.rows[name]
            title = f"{method.title}, {batch.title}"
            self.place.place = f"in {title}"
            try:
                if row.unavailable is None:
                    self.progress.stage(title)
                    row.by_number[batch.number] = method.run(method.bench(batch.bench))
            except Busy:
                left.append(name)
                continue
            except RecipeError:  # of a record or a setting: that concerns the whole comparison
                raise
            except GraspError as error:
                row.unavailable, row.failed = f"failed {'in' if self.folds else 'with'} {batch.title}: {error}", True
                row.by_number.clear()
            self.progress.done(method.units)
        batch.to_do = left

    def _write(self, comparison: Comparison) -> None:
        folder = self.place.folder / COMPARE_FOLDER
        with claim(folder, wait=True):
            before = read_record(folder / COMPARISON_FILE, Comparison)
            if before is not None and before.is_ahead_of(comparison):  # of another process, or of an earlier one
                return
            self._write_recipe()
            write_json(folder / COMPARISON_FILE, comparison.to_json())
            self.show(folder, comparison)
