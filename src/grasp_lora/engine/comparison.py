"""What a comparison came to: the typed content of `compare.json`, and how it is made of the outcomes of all methods.

Only the comparisons that were planned before any result was seen get a verdict, and only they are corrected for each other. Every
other row has an interval of its own, to look at.
Paper: main table and runtime table.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from grasp_lora.data.splits import Splits, group_numbers
from grasp_lora.engine.methods import METHODS, Outcome
from grasp_lora.engine.results import TEST_LOSS, Finished, Measured, Tested, main_metric
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import GRID
from grasp_lora.evaluation.metrics import METRICS
from grasp_lora.evaluation.statistics import PairedComparison, compare_with_baselines, half_width
from grasp_lora.text.display import listed

COMPARISON_FILE = "compare.json"
PARENTS = ("source", "target")  # steps that train the adapters that are merged
SEEDS = (42, 1337, 9001)  # Paper: experimental setup
PLANNED = ("grasp", "continued", "joint", "grid")  # less the reference: GRASP against the other three
# Sets of planned comparisons by name. Paper: its own claim.
PLANS = {"paper": ("grasp_paper:grid_paper", "grasp_paper:adaptive_merge", "grasp_paper:target_only")}
# Correlation of that difference within a group, as of F1 on TyDi QA Swahili (`lab/results/README.md`); MLQA has none.
ALIKE = 0.2
FEWER_SEEDS = {1: 1.3, 2: 1.1}  # as many times the spread of three seeds


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ComparisonSettings(_Shape):
    """What is compared.

    Args:
        methods: names of `METHODS`.
        seeds: seeds of initialisation, order of the data and controller; the source adapter is that of the recipe's seed. With
            folds there is one.
        grid: prune ratios of the grid search, fractions in [0, 1].
        reference: the method that the others are compared with; it is run even if `methods` leaves it out.
        planned: the comparisons that get a verdict, such as `grasp:joint`, or `paper` for the paper's own: `grasp_paper` with
            `grid_paper`, `adaptive_merge` and `target_only`. Their first method is the reference, and all are run. None: the
            reference with grasp, continued, joint and grid, as far as they are run.
        folds: cross-validation: cut the target's pool into so many folds, at least 2, and test on each of them once. None takes
            the recipe's splits.
        resamples: of the bootstrap, at least 1,000.

    Raises:
        ValueError: an unknown name, an empty list, a ratio out of range, too few resamples or folds, folds beside several seeds.
    """

    methods: tuple[str, ...] = Field(default=tuple(METHODS), min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=SEEDS, min_length=1)
    grid: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] = Field(default=GRID, min_length=1)
    reference: str = "grasp"
    planned: tuple[str, ...] = ()
    folds: int | None = Field(default=None, ge=2)
    resamples: int = Field(default=10_000, ge=1_000)

    @model_validator(mode="before")
    @classmethod
    def _plan(cls, values: Any) -> Any:
        """Write named sets out; the first method of the planned comparisons is the reference."""
        planned = [pair for name in values.get("planned") or () for pair in PLANS.get(name, (name,))]
        firsts = list(dict.fromkeys(pair.partition(":")[0] for pair in planned))
        wanted = values.get("reference", firsts[0] if firsts else None)
        if any(not all(pair.partition(":")) for pair in planned) or (planned and firsts != [wanted]):
            raise ValueError(
                f"planned is {listed(planned)}; write FIRST:SECOND, with one FIRST in all of them, which is the reference, or "
                f"{' or '.join(PLANS)}"
            )
        return {**values, "planned": tuple(planned), "reference": wanted} if planned else values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if unknown := {*self.methods, self.reference, *self.with_verdict} - METHODS.keys():
            raise ValueError(f"there is no method {listed(map(repr, sorted(unknown)))}; allowed: {', '.join(METHODS)}")
        if self.folds and len(self.seeds) > 1:
            if "seeds" in self.model_fields_set:
                raise ValueError(f"folds are compared with one seed, but seeds has {len(self.seeds)}; give one")
            object.__setattr__(self, "seeds", SEEDS[:1])
        return self

    @property
    def names(self) -> list[str]:
        """All methods that are run, in the order of the table."""
        return [name for name in METHODS if name in {*self.methods, self.reference, *self.with_verdict}]

    @property
    def with_verdict(self) -> tuple[str, ...]:
        """The methods that `planned` names beside the reference; none where it says nothing."""
        return tuple(pair.partition(":")[2] for pair in self.planned)

    def planned_against(self, methods: Sequence[str]) -> list[str]:
        """The methods that the reference is compared with by plan, of those that are there."""
        by_plan = self.with_verdict or PLANNED
        return [name for name in methods if name in by_plan and name != self.reference]


class FoldSizes(_Shape):
    """How many examples a fold of a cross-validation has for the test and for training."""

    test: int
    train: int


class MeanAndSd(_Shape):
    """Mean over the seeds, or the folds, and the sample standard deviation; a single value has none."""

    mean: float
    sd: float | None
    values: list[float]


class Cost(_Shape):
    """Means over the seeds or folds: beyond the adapters that are merged, and `in_all` with them; work is in forward passes."""

    runs: float
    seconds: float
    work: float
    runs_in_all: float
    seconds_in_all: float
    work_in_all: float


@dataclass(frozen=True)
class Against(PairedComparison):
    """The reference against this row by one metric. Only planned comparisons have a verdict."""

    verdict: str | None = None  # type: ignore[assignment]  # a property there


class MethodRow(_Shape):
    """One method; all from `seeds` on is there only where a seed was finished.

    In a cross-validation `seeds` is the number of its folds. `scores` holds None for a metric that was not available.
    `taken` is there where a method chooses among adapters of several kinds: what it took, each with its seeds or folds.
    """

    method: str
    title: str
    unavailable: str | None
    failed: bool
    merges: bool
    seeds: int = 0
    scores: dict[str, MeanAndSd | None] = {}
    prune_ratio: MeanAndSd | None = None
    chosen_on: str | None = None
    taken: str | None = None
    cost: Cost | None = None
    against: dict[str, Against] = {}


class CurvePoint(_Shape):
    """The mean dev loss of one run of the grid.

    In a cross-validation `seed` is the number of the fold.
    """

    seed: int
    prune_ratio: float
    dev: float


class Comparison(_Shape):
    """The whole content of `compare.json`; `folds` are those of a cross-validation that are finished, `test_examples` of all.

    `test_groups`: how many groups of those that belong together they form, where that is fewer.
    """

    name: str
    recipe_hash: str
    settings: ComparisonSettings
    backbone: str
    language: str
    seeds: list[int]
    test_examples: int
    dev_examples: int
    stops_early: bool
    micro_dev_examples: int
    metrics: list[str]
    signatures: dict[str, str]
    rows: list[MethodRow]
    curve: list[CurvePoint]
    warnings: list[str]
    made_with: list[dict[str, str]]
    folds: list[FoldSizes] = []
    test_groups: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values; what was not set is left out."""
        return self.model_dump(exclude_unset=True)

    def is_ahead_of(self, earlier: Self) -> bool:
        """Whether it is the same comparison with more seeds or folds."""
        same = (self.recipe_hash, self.settings) == (earlier.recipe_hash, earlier.settings)
        return same and len(self.folds or self.seeds) > len(earlier.folds or earlier.seeds)

    @property
    def runs(self) -> str:
        """What means and deviations go over."""
        return "folds" if self.folds else "seeds"

    @property
    def finished(self) -> list[MethodRow]:
        """The rows that have a result."""
        return [row for row in self.rows if not row.unavailable]

    @property
    def reference_title(self) -> str:
        """The reference method as tables call it."""
        return next((row.title for row in self.rows if row.method == self.settings.reference), self.settings.reference)


@dataclass
class Outcomes:
    """What came of one method: an outcome by seed, in a cross-validation by number of the fold, or why there is none."""

    by_number: dict[int, Outcome] = field(default_factory=dict)
    unavailable: str | None = None
    failed: bool = False


Rows = dict[str, Outcomes]


def summary(session: Session, settings: ComparisonSettings, rows: Rows, folds: Sequence[Splits] = ()) -> Comparison:
    """The whole comparison as it stands.

    Args:
        session: of the splits that are compared.
        rows: by method; all of those that are finished have the same seeds, or folds.
        folds: the splits of each fold that is finished, in a cross-validation.
    """
    finished = {name: row for name, row in rows.items() if row.by_number}
    numbers = {number for row in finished.values() for number in row.by_number}
    optional: dict[str, Any] = {}
    if folds:
        optional["folds"] = [FoldSizes(test=len(splits.test), train=len(splits.train)) for splits in folds]
    test = [example for splits in folds or [session.splits] for example in splits.test]
    tested = group_numbers(test)
    if len(set(tested)) < len(tested):
        optional["test_groups"] = len(set(tested))
    signatures = {
        metric: score.signature
        for row in finished.values()
        for outcome in row.by_number.values()
        for metric, score in _measured(outcome).metrics.items()
    }
    metrics = [TEST_LOSS, *(name for name in session.metrics if name in signatures)]  # in the order of the recipe
    comparisons = {metric: _comparisons(session, settings, finished, metric, tested) for metric in metrics}
    return Comparison(
        name=session.recipe.name,
        recipe_hash=session.recipe.fingerprint(),
        settings=settings,
        backbone=session.backbone.name,
        language=session.language,
        seeds=list(settings.seeds) if folds else sorted(numbers, key=settings.seeds.index),
        test_examples=len(test),
        dev_examples=len(session.splits.dev),
        stops_early=session.recipe.final.training.patience is not None,
        micro_dev_examples=len(session.splits.micro_dev),
        metrics=metrics,
        signatures=signatures,
        rows=[_row(name, row, metrics, comparisons) for name, row in rows.items()],
        curve=_curve(finished),
        warnings=[
            *_warnings(finished, "fold" if folds else "seed"),
            *_of_the_paper(session, finished),
        ],
        made_with=_made_with(finished),
        **optional,
    )


def _value(outcome: Outcome, metric: str) -> float | None:
    """The score, or None for a metric that is not available, such as BERTScore without a model."""
    if metric == TEST_LOSS:
        return _measured(outcome).test_loss
    return _measured(outcome).metrics[metric].value


def _comparisons(
    session: Session, settings: ComparisonSettings, rows: Mapping[str, Outcomes], metric: str, groups: Sequence[int]
) -> dict[str, Against]:
    """The reference method against each other one; `groups` are those of the test examples."""
    values_of = [_value(outcome, metric) for row in rows.values() for outcome in row.by_number.values()]
    if settings.reference not in rows or None in values_of:
        return {}
    corpus = None if metric == TEST_LOSS else session.metrics[metric].from_statistics
    values = {
        name: [_per_example(outcome, metric, corpus) for outcome in row.by_number.values()]
        for name, row in rows.items()
    }
    if settings.folds:  # each row is tested in one of them
        values = {name: [[value for fold in folds for value in fold]] for name, folds in values.items()}
        if len(values[settings.reference][0]) < 2:
            return {}
    ours = values.pop(settings.reference)
    planned = settings.planned_against(list(values))
    compared = compare_with_baselines(
        ours,
        values,
        groups=groups,
        together=planned,
        corpus_score=corpus,
        higher_is_better=metric != TEST_LOSS,
        resamples=settings.resamples,
    )
    return {
        name: Against(**asdict(comparison), verdict=comparison.verdict if name in planned else None)
        for name, comparison in compared.items()
    }


def _per_example(outcome: Outcome, metric: str, corpus: Any) -> list[Any]:
    if metric == TEST_LOSS:
        return _tested(outcome).result.losses
    score = _measured(outcome).metrics[metric]
    return list(score.per_example if corpus is None else score.statistics)


def _measured(outcome: Outcome) -> Measured:
    assert outcome.measured is not None  # `compare` measures each outcome
    return outcome.measured


def _tested(outcome: Outcome) -> Finished[Tested]:
    test = _measured(outcome).test
    assert test is not None  # a comparison has test rows
    return test


def _row(
    name: str, row: Outcomes, metrics: Sequence[str], comparisons: Mapping[str, Mapping[str, Against]]
) -> MethodRow:
    method = METHODS[name]
    facts = MethodRow(
        method=name, title=method.title, unavailable=row.unavailable, failed=row.failed, merges=method.merges
    )
    if not row.by_number:
        return facts
    outcomes = list(row.by_number.values())
    # Where no seed has a part, as in zero shot, there is one result and no spread.
    distinct = outcomes if len({_tested(outcome).key for outcome in outcomes}) > 1 else outcomes[:1]
    result = {
        "seeds": len(outcomes),
        "scores": {metric: _mean_and_sd([_value(outcome, metric) for outcome in distinct]) for metric in metrics},
        "prune_ratio": _mean_and_sd([outcome.prune_ratio for outcome in outcomes if outcome.prune_ratio is not None]),
        "chosen_on": outcomes[0].chosen_on,
        "taken": _taken({number: outcome.taken for number, outcome in row.by_number.items()}),
        "cost": _cost(row),
        "against": {metric: compared[name] for metric, compared in comparisons.items() if name in compared},
    }
    return facts.model_copy(update=result)


def _taken(chosen: Mapping[int, str | None]) -> str | None:
    """What choices took, and with which seeds or in which folds."""
    numbers: dict[str, list[str]] = {}
    for number, what in chosen.items():
        if what is not None:
            numbers.setdefault(what, []).append(str(number))
    return "; ".join(f"{what} ({', '.join(where)})" for what, where in numbers.items()) or None


def _mean_and_sd(values: Sequence[float | None]) -> MeanAndSd | None:
    scores = [value for value in values if value is not None]
    if not scores or len(scores) < len(values):
        return None
    return MeanAndSd(mean=fmean(scores), sd=stdev(scores) if len(scores) > 1 else None, values=scores)


def _cost(row: Outcomes) -> Cost:
    """Mean over the seeds: of all that the method needs, and of what it needs beyond the adapters that are merged."""
    trails = [outcome.adapter.trail for outcome in row.by_number.values()]
    beyond = [[step for step in trail if step.name not in PARENTS] for trail in trails]
    return Cost(
        runs=fmean(sum(step.trains for step in steps) for steps in beyond),
        seconds=fmean(sum(step.seconds for step in steps) for steps in beyond),
        work=fmean(sum(step.result.passes for step in steps) for steps in beyond),
        runs_in_all=fmean(sum(step.trains for step in steps) for steps in trails),
        seconds_in_all=fmean(sum(step.seconds for step in steps) for steps in trails),
        work_in_all=fmean(sum(step.result.passes for step in steps) for steps in trails),
    )


def _curve(rows: Mapping[str, Outcomes]) -> list[CurvePoint]:
    """Mean dev loss of each run of the grid that chooses on the dev set, by seed."""
    outcomes = rows["grid"].by_number if "grid" in rows else {}
    return [
        CurvePoint(seed=number, prune_ratio=ratio, dev=loss)
        for number, outcome in outcomes.items()
        for ratio, loss in (outcome.curve or {}).items()
    ]


def _warnings(rows: Mapping[str, Outcomes], what: str) -> list[str]:
    return [
        f"{METHODS[name].title}, {what} {number}, {sentence}"
        for name, row in rows.items()
        for number, outcome in row.by_number.items()
        for sentence in outcome.left_out
    ]


def _of_the_paper(session: Session, rows: Mapping[str, Outcomes]) -> list[str]:
    """Which rows have another target adapter than the others may have."""
    alone = [name for name in rows if METHODS[name].paper]
    others = any(METHODS[name].merges and name not in alone for name in rows)
    if session.recipe.target.on is None or not (alone and others):
        return []
    titles = listed([METHODS[name].title for name in alone])
    return [f"the target adapter of these rows is trained on the backbone alone, as in the paper: {titles}"]


def _made_with(rows: Mapping[str, Outcomes]) -> list[dict[str, str]]:
    outcomes = [outcome for row in rows.values() for outcome in row.by_number.values()]
    steps = [step for outcome in outcomes for step in (*outcome.adapter.trail, _tested(outcome))]
    return list({frozenset(step.made_with.items()): dict(step.made_with) for step in steps}.values())


def saves_over_confidence(against: Mapping[str, Against]) -> bool:
    """Whether a gain shows in the test loss and in no score of the answers; only where both were compared by plan."""
    verdicts = {metric: comparison.verdict for metric, comparison in against.items()}
    loss = verdicts.pop(TEST_LOSS, None)
    return loss == "better" and bool(verdicts) and "better" not in verdicts.values()


def expected_width(
    metrics: Sequence[str],
    examples: int,
    comparisons: int,
    group_size: float = 1.0,
    groups: int | None = None,
    seeds: int = 3,
) -> str | None:
    """Say what half-width an interval of the main metric will have; None where no deviation is assumed or too little to test.

    The variance grows by 1 + correlation (size - 1) (Kish 1965, section 5.4).

    Args:
        metrics: of the comparison.
        examples: of the test.
        comparisons: how many are planned.
        group_size: as `splits.group_size` gives it.
        groups: how many groups the examples form; None: each is by itself.
        seeds: how many each method has, >= 1; folds have one.

    >>> str(expected_width(["exact_match", "f1"], 1000, 3)).partition(" (")[0]
    'intervals of f1 will reach about 2.0 points to each side'
    """
    metric = main_metric(metrics)
    spread = METRICS[metric].spread if metric in METRICS else None
    if spread is None or min(examples, groups or examples) < 2:
        return None
    planned, wider = max(1, comparisons), math.sqrt(1.0 + ALIKE * (group_size - 1.0))
    sd = spread * FEWER_SEEDS.get(seeds, 1.0)
    reach = wider * half_width(sd, examples, planned, groups)
    together = f" in groups of {group_size:.1f} on average" if group_size > 1.0 else ""
    return (
        f"intervals of {metric} will reach about {reach:.1f} points to each side ({examples} test examples{together}, {planned} "
        f"comparison{'' if planned == 1 else 's'}, 95 %). Assumed: a standard deviation of {sd:.3g} points between two systems"
        f"{' with one seed' if seeds == 1 else ''}"
    )
