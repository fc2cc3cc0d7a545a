"""`grasp-lora compare`: every method on the user's own data under one protocol, and one table with uncertainty and cost.

The work is a list of (method, seed). What is on record in the folder's store is not done again, whoever did it, and a training
that was stopped goes on. The table is made from the records alone, anew after each seed, so that it can be read while more
is under way. Paper: main table and runtime table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from grasp_lora.bench.checks import check
from grasp_lora.bench.comparison_record import COMPARISON_FILE, Comparison
from grasp_lora.bench.methods import DEFAULT_METHODS, METHODS, REMOVED
from grasp_lora.bench.outcomes import Outcome
from grasp_lora.bench.progress import Progress
from grasp_lora.bench.run_folder import COMPARE_FOLDER, check_place
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import GRID, Bench, check_list, check_ratios
from grasp_lora.bench.store import STORE_FOLDER, Store, environments
from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.evaluation.statistics import compare_with_baselines, least_resamples, mean_and_sd
from grasp_lora.models.adapters import check_target_modules
from grasp_lora.recipes.recipe import RECIPE_FILE, Recipe
from grasp_lora.storage.checkpoints import Checkpointing
from grasp_lora.storage.files import write_json, write_whole
from grasp_lora.storage.folder import Workplace, working_in

SEEDS = (42, 1337, 9001)  # Paper: experimental setup
TEST_LOSS = "test_loss"
PARENTS = ("source", "target")  # steps that train the adapters that are merged
LEAST_TEST = 2


@dataclass(frozen=True)
class ComparisonSettings:
    """What is compared.

    Args:
        methods: names of methods; by default all but the last three.
        seeds: seeds of initialisation, order of the data and controller; the source adapter is that of the recipe's seed.
        grid: prune ratios of the grid search, fractions in [0, 1].
        reference: the method that the others are compared with; it is run even if `methods` leaves it out.
        split_seeds: seeds of further splits of the data, on which all is done once more with the first seed.
        resamples: of the bootstrap.

    Raises:
        ValueError: an unknown name, a list that is empty or says something twice, a ratio out of range, too few resamples.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    methods: tuple[str, ...] = DEFAULT_METHODS
    seeds: tuple[int, ...] = SEEDS
    grid: tuple[float, ...] = GRID
    reference: str = "grasp"
    split_seeds: tuple[int, ...] = ()
    resamples: int = 10_000

    def __post_init__(self) -> None:
        for name in (*self.methods, self.reference):
            if name in REMOVED:
                raise ValueError(
                    f"the method {name!r} was removed, since it equalled another one; take {REMOVED[name]}"
                )
            if name not in METHODS:
                raise ValueError(f"there is no method {name!r}; allowed: {', '.join(METHODS)}")
        check_list("methods", self.methods)
        check_list("seeds", self.seeds)
        if self.split_seeds:
            check_list("split seeds", self.split_seeds)
        check_ratios("grid", self.grid)
        for seed in (*self.seeds, *self.split_seeds):
            if seed < 0:
                raise ValueError(f"seed is {seed}; it must be at least 0")
        least = least_resamples(len({*self.methods, self.reference}) - 1)
        if self.resamples < least:
            raise ValueError(f"resamples is {self.resamples}; so many methods need at least {least}")


@dataclass
class _Row:
    """What came of one method: an outcome by seed, or why there is none."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    unavailable: str | None = None
    failed: bool = False


_Rows = dict[str, _Row]
Show = Callable[[Path, Comparison], object]


def _nothing(folder: Path, comparison: Comparison) -> None:
    """Show nothing."""


def compare(
    session: Session,
    folder: Path,
    settings: ComparisonSettings,
    progress: Progress | None = None,
    show: Show = _nothing,
) -> Comparison:
    """Run what is not on record yet; write `compare.json` and return what it holds.

    A method that fails, for example because its training diverges, leaves its reason in its row, and the others go on.

    Args:
        session: of the recipe; a prune ratio that it gives is left aside.
        folder: of the experiment, that of a run included; steps of any recipe may stand in its store side by side.
        settings: methods, seeds and the rest.
        progress: told how far the work is.
        show: given the folder of the tables and what `compare.json` holds whenever that was written.

    Raises:
        GraspError: the recipe, the data or an adapter does not fit, the folder cannot be written or another process writes there;
            what is on record stays.
        Interrupted: SIGTERM or SIGINT came.
    """
    recipe = session.recipe
    if recipe.final.start == "controller":
        raise RecipeError(
            "final.start is 'controller', but a comparison's final runs start from a fresh merge; leave it out, set "
            "final.training.epochs to those of the controller and the final run together, and name grasp_single among the "
            "methods: it shares them out between both"
        )
    recipe = recipe.model_copy(update={"final": replace(recipe.final, prune_ratio=None)})
    check_place(folder)
    with working_in(folder) as place:
        session = Session(recipe, session.base, session.progress)
        check(session)
        check_target_modules(session.backbone.model, recipe.lora.target_modules)
        session.checkpoints = Checkpointing(recipe.save_every, lambda: place.interruption.asked_by)
        work = _Work(session, place, settings, progress or Progress(), show)
        work.store.check_dtype(str(session.backbone.model.dtype))
        place.begin()
        (folder / COMPARE_FOLDER).mkdir(exist_ok=True)
        write_whole(folder / COMPARE_FOLDER / RECIPE_FILE, recipe.to_yaml())
        return Comparison.model_validate(work.execute())


def _units(rows: _Rows) -> float:
    return sum(METHODS[name].units for name, row in rows.items() if not row.unavailable)


class _Work:
    """One comparison that is under way.

    Raises:
        RecipeError: a split cannot be filled or has too few test examples; all are read before the first run.
    """

    def __init__(
        self, session: Session, place: Workplace, settings: ComparisonSettings, progress: Progress, show: Show
    ) -> None:
        self.session, self.place, self.settings, self.progress, self.show = session, place, settings, progress, show
        self.store = Store(place.folder / STORE_FOLDER, progress, place.interruption)
        self.names = [name for name in METHODS if name in {*settings.methods, settings.reference}]
        recipe = session.recipe
        self.split_seed = recipe.seed if recipe.data.split_seed is None else recipe.data.split_seed
        if self.split_seed in settings.split_seeds:
            raise RecipeError(
                f"--split-seed {self.split_seed} is the split that is compared in any case; give another seed"
            )
        self.rows = self._rows(session)
        self.others = {other: self._elsewhere(other) for other in settings.split_seeds}
        self.again = {other: self._rows(elsewhere) for other, elsewhere in self.others.items()}

    def execute(self) -> dict[str, Any]:
        settings, rows, again, split_seed = self.settings, self.rows, self.again, self.split_seed
        self.progress.begin(
            len(settings.seeds) * _units(rows) + sum(_units(rows_there) for rows_there in again.values())
        )
        content: dict[str, Any] = {}
        shared = self.session.variant(self._with_split(split_seed))
        for seed in settings.seeds:
            self._run(shared, rows, seed)
            content = _content(shared, settings, rows, split_seed)
            self._write(content)
        for other, elsewhere in self.others.items():
            self._run(elsewhere, again[other], settings.seeds[0])
            content["other_splits"].append(_other_split(rows, again[other], settings, other))
            self._write(content)
        return content

    def _rows(self, session: Session) -> _Rows:
        """Rows with nothing in them yet, for the splits of a session.

        Raises:
            RecipeError: there are too few test examples to compare anything.
        """
        if len(session.splits.test) < LEAST_TEST:
            raise RecipeError(
                f"a comparison needs a test split, but it has {len(session.splits.test)} examples (data.target.test); "
                f"give it at least {LEAST_TEST}"
            )
        return {name: _Row(unavailable=METHODS[name].unavailable(session)) for name in self.names}

    def _elsewhere(self, split_seed: int) -> Session:
        session = Session(self._with_split(split_seed), self.session.base, self.session.progress)
        session.backbone, session.checkpoints = self.session.backbone, self.session.checkpoints
        return session

    def _with_split(self, split_seed: int) -> Recipe:
        """The recipe with a split that does not move with its seed."""
        recipe = self.session.recipe
        return recipe.model_copy(update={"data": replace(recipe.data, split_seed=split_seed)})

    def _run(self, shared: Session, rows: _Rows, seed: int) -> None:
        seeded = shared.variant(shared.recipe.model_copy(update={"seed": seed}))
        bench = Bench(seeded, shared, self.store, self.settings.grid)
        for name, row in rows.items():
            if row.unavailable is not None:
                continue
            title = f"{METHODS[name].title}, seed {seed}"
            self.place.place = f"in {title}"
            self.progress.stage(title)
            try:
                row.outcomes[seed] = METHODS[name].run(bench)
            except RecipeError:  # of a record or a setting: that concerns the whole comparison
                raise
            except GraspError as error:
                row.unavailable, row.failed = f"failed with seed {seed}: {error}", True
                row.outcomes.clear()
            self.progress.done(METHODS[name].units)

    def _write(self, content: dict[str, Any]) -> None:
        folder = self.place.folder / COMPARE_FOLDER
        comparison = Comparison.model_validate(content)
        write_json(folder / COMPARISON_FILE, comparison.to_json())
        self.show(folder, comparison)


def _content(session: Session, settings: ComparisonSettings, rows: _Rows, split_seed: int) -> dict[str, Any]:
    finished = {name: row for name, row in rows.items() if row.outcomes}
    metrics = _metrics(finished)
    comparisons = {metric: _comparisons(session, settings, finished, metric) for metric in metrics}
    signatures = {
        metric: entry["signature"]
        for row in finished.values()
        for outcome in row.outcomes.values()
        for metric, entry in outcome.scores.result.items()
    }
    return {
        "name": session.recipe.name,
        "recipe_hash": session.recipe.fingerprint(),
        "settings": asdict(settings),
        "backbone": session.backbone.name,
        "language": session.language,
        "seeds": sorted({seed for row in finished.values() for seed in row.outcomes}, key=settings.seeds.index),
        "split_seed": split_seed,
        "test_examples": len(session.splits.test),
        "dev_examples": len(session.splits.dev),
        "stops_early": session.recipe.final.training.patience is not None,
        "keeps_best": session.recipe.final.training.keep == "best",
        "given_target": session.recipe.target.adapter is not None,
        "micro_dev_examples": len(session.splits.micro_dev),
        "reference": settings.reference,
        "metrics": metrics,
        "signatures": signatures,
        "resamples": settings.resamples,
        "comparisons": max((len(compared) for compared in comparisons.values()), default=0),
        "rows": [_row(name, row, metrics, comparisons) for name, row in rows.items()],
        "other_splits": [],
        "curve": _curve(finished),
        "warnings": _warnings(finished),
        "made_with": _made_with(finished),
        "pace": _pace(finished),
    }


def _other_split(rows: _Rows, again: _Rows, settings: ComparisonSettings, split_seed: int) -> dict[str, Any]:
    """The test losses of the first seed on the usual split and on another one, and what separates the reference from each row."""
    seed = settings.seeds[0]
    both = {
        name: [fmean(one.outcomes[seed].losses.result["losses"]) for one in (rows[name], again[name])]
        for name in rows
        if seed in rows[name].outcomes and seed in again[name].outcomes
    }
    reference = both.get(settings.reference)
    return {
        "split_seed": split_seed,
        "seed": seed,
        "missing": [
            {"method": name, "title": METHODS[name].title, "reason": row.unavailable, "failed": row.failed}
            for name, row in again.items()
            if row.unavailable and name in rows and not rows[name].unavailable
        ],
        "rows": [
            {
                "method": name,
                "title": METHODS[name].title,
                "test_loss": losses,
                "difference": None if reference is None else [a - b for a, b in zip(reference, losses, strict=True)],
            }
            for name, losses in both.items()
        ],
    }


def _metrics(rows: Mapping[str, _Row]) -> list[str]:
    """Test loss first, then the scores in the order of the recipe."""
    names = [name for row in rows.values() for outcome in row.outcomes.values() for name in outcome.scores.result]
    return [TEST_LOSS, *dict.fromkeys(names)]


def _value(outcome: Outcome, metric: str) -> float | None:
    """The score, or None for a metric that is not available, such as BERTScore without a model."""
    if metric == TEST_LOSS:
        return fmean(outcome.losses.result["losses"])
    value = outcome.scores.result[metric]["value"]
    return None if value is None else float(value)


def _comparisons(
    session: Session, settings: ComparisonSettings, rows: Mapping[str, _Row], metric: str
) -> dict[str, dict[str, Any]]:
    """The reference method against each other one."""
    values_of = [_value(outcome, metric) for row in rows.values() for outcome in row.outcomes.values()]
    if settings.reference not in rows or None in values_of:
        return {}
    corpus = None if metric == TEST_LOSS else session.metrics[metric].from_statistics
    values = {
        name: [_per_example(one, metric, corpus) for one in row.outcomes.values()]
        for name, row in rows.items()
        if METHODS[name].warning is None or name == settings.reference  # what is not fair is not tested
    }
    ours = values.pop(settings.reference)
    compared = compare_with_baselines(
        ours,
        values,
        corpus_score=corpus,
        higher_is_better=metric != TEST_LOSS,
        resamples=settings.resamples,
    )
    return {name: {**asdict(one), "verdict": one.verdict} for name, one in compared.items()}


def _per_example(outcome: Outcome, metric: str, corpus: Any) -> list[Any]:
    if metric == TEST_LOSS:
        return list(outcome.losses.result["losses"])
    entry = outcome.scores.result[metric]
    return list(entry["per_example"] if corpus is None else entry["statistics"])


def _row(
    name: str,
    row: _Row,
    metrics: Sequence[str],
    comparisons: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    method = METHODS[name]
    facts: dict[str, Any] = {
        "method": name,
        "title": method.title,
        "unavailable": row.unavailable,
        "failed": row.failed,
        "merges": method.merges,
    }
    if not row.outcomes:
        return facts
    outcomes = list(row.outcomes.values())
    # Where no seed has a part, as in zero shot, there is one result and no spread.
    distinct = list({outcome.losses.key: outcome for outcome in outcomes}.values())
    ratios = [outcome.prune_ratio for outcome in outcomes if outcome.prune_ratio is not None]
    return facts | {
        "warning": method.warning,
        "seeds": len(outcomes),
        "scores": {metric: _spread([_value(outcome, metric) for outcome in distinct]) for metric in metrics},
        "prune_ratio": _spread(ratios),
        "chosen_on": outcomes[0].chosen_on,
        "cost": _cost(row),
        "against": {metric: compared[name] for metric, compared in comparisons.items() if name in compared},
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    there = [value for value in values if value is not None]
    if not there or len(there) < len(values):
        return None
    average, deviation = mean_and_sd(there)
    return {"mean": average, "sd": deviation, "values": there}


def _cost(row: _Row) -> dict[str, Any]:
    """Mean over the seeds: of all that the method needs, and of what it needs beyond the adapters that are merged."""
    totals = []
    for outcome in row.outcomes.values():
        own = [record for record in outcome.records if record.step not in PARENTS]
        totals.append(
            {
                "runs": sum("trained_examples" in record.result for record in own),
                "seconds": sum(record.seconds for record in own),
                "work": sum(record.work for record in own),
                "runs_in_all": sum("trained_examples" in record.result for record in outcome.records),
                "seconds_in_all": sum(record.seconds for record in outcome.records),
                "work_in_all": sum(record.work for record in outcome.records),
            }
        )
    return {key: fmean([float(total[key]) for total in totals]) for key in totals[0]}


def _curve(rows: Mapping[str, _Row]) -> list[dict[str, Any]]:
    """Mean dev and test loss of each run of the grid that chooses on the dev set, by seed."""
    outcomes = rows["grid"].outcomes if "grid" in rows else {}
    points = []
    for seed, outcome in outcomes.items():
        for ratio, losses in (outcome.curve or {}).items():
            points.append({"seed": seed, "prune_ratio": ratio, **losses})
    return points


def _warnings(rows: Mapping[str, _Row]) -> list[str]:
    of_methods = [f"{METHODS[name].title} {warning}" for name in rows if (warning := METHODS[name].warning)]
    of_runs = [
        f"{METHODS[name].title}, seed {seed}, {sentence}"
        for name, row in rows.items()
        for seed, outcome in row.outcomes.items()
        for sentence in outcome.left_out
    ]
    return of_methods + of_runs


def _made_with(rows: Mapping[str, _Row]) -> list[dict[str, str]]:
    outcomes = [outcome for row in rows.values() for outcome in row.outcomes.values()]
    return environments(record for one in outcomes for record in (*one.records, one.losses, one.scores))


def _pace(rows: Mapping[str, _Row]) -> dict[str, float] | None:
    """Lowest and highest seconds per forward pass of the final runs, which are alike but for what else the machine did."""
    outcomes = [outcome for row in rows.values() for outcome in row.outcomes.values()]
    finals = [record for one in outcomes for record in one.records if record.step.startswith("final ")]
    paces = [record.seconds / record.work for record in finals if record.work and record.seconds]
    return {"lowest": min(paces), "highest": max(paces)} if paces else None
