"""From what each method came to, by seed, to the typed content of `compare.json`. Paper: main table and runtime table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from grasp_lora.bench.comparison_record import (
    TEST_LOSS,
    Against,
    Compared,
    Comparison,
    Cost,
    CurvePoint,
    FoldSizes,
    Pace,
    Row,
    Spread,
)
from grasp_lora.bench.methods import METHODS
from grasp_lora.bench.outcomes import Outcome
from grasp_lora.bench.planned import planned_against
from grasp_lora.bench.session import Session
from grasp_lora.bench.store import environments
from grasp_lora.data.splits import Splits, group_numbers, group_size
from grasp_lora.evaluation.statistics import compare_with_baselines, mean_and_sd
from grasp_lora.text.display import listed

if TYPE_CHECKING:
    from grasp_lora.bench.compare import ComparisonSettings

PARENTS = ("source", "target")  # steps that train the adapters that are merged


@dataclass
class Outcomes:
    """What came of one method: an outcome by seed, in a cross-validation by number of the fold, or why there is none."""

    by_number: dict[int, Outcome] = field(default_factory=dict)
    unavailable: str | None = None
    failed: bool = False


Rows = dict[str, Outcomes]


def summary(session: Session, settings: "ComparisonSettings", rows: Rows, folds: Sequence[Splits] = ()) -> Comparison:
    """The whole comparison as it stands.

    Args:
        session: of the splits that are compared.
        settings: what is compared.
        rows: by method; all of those that are finished have the same seeds, or folds.
        folds: the splits of each fold that is finished, in a cross-validation.
    """
    finished = {name: row for name, row in rows.items() if row.by_number}
    numbers = {number for row in finished.values() for number in row.by_number}
    metrics = _metrics(session, finished)
    optional: dict[str, Any] = {"folds": _folds(folds)} if folds else {}
    test = [example for one in folds or [session.splits] for example in one.test]
    tested = group_numbers(test)
    if len(set(tested)) < len(tested):
        optional |= {"test_groups": len(set(tested)), "test_group_size": group_size(test)}
    if merges := _merges(finished):
        optional["merge"] = _taken(merges)
    comparisons = {metric: _comparisons(session, settings, finished, metric, tested) for metric in metrics}
    signatures = {
        metric: entry["signature"]
        for row in finished.values()
        for outcome in row.by_number.values()
        for metric, entry in outcome.scores.result.items()
    }
    return Comparison(
        name=session.recipe.name,
        recipe_hash=session.recipe.fingerprint(),
        settings=Compared.model_validate({name: one for name, one in asdict(settings).items() if one is not None}),
        backbone=session.backbone.name,
        language=session.language,
        seeds=list(settings.seeds) if folds else sorted(numbers, key=settings.seeds.index),
        test_examples=len(test),
        dev_examples=len(session.splits.dev),
        stops_early=session.recipe.final.training.patience is not None,
        keeps_best=session.recipe.final.training.keep == "best",
        micro_dev_examples=len(session.splits.micro_dev),
        reference=settings.reference,
        metrics=metrics,
        signatures=signatures,
        resamples=settings.resamples,
        comparisons=len(planned_against(settings.reference, list(finished))),
        rows=[_row(name, row, metrics, comparisons) for name, row in rows.items()],
        curve=_curve(finished),
        warnings=[
            *_warnings(finished, "fold" if folds else "seed"),
            *_of_the_paper(session, finished),
            *_scored_otherwise(finished, metrics, of_folds=bool(folds)),
        ],
        made_with=_made_with(finished),
        pace=_pace(finished),
        **optional,
    )


def _folds(folds: Sequence[Splits]) -> list[FoldSizes]:
    return [FoldSizes(test=len(one.test), train=len(one.train), source_train=len(one.source_train)) for one in folds]


def _metrics(session: Session, rows: Mapping[str, Outcomes]) -> list[str]:
    """Test loss first, then the scores in the order of the recipe, whatever that of the records is."""
    measured = {name for row in rows.values() for outcome in row.by_number.values() for name in outcome.scores.result}
    return [TEST_LOSS, *(name for name in session.metrics if name in measured)]


def _value(outcome: Outcome, metric: str) -> float | None:
    """The score, or None for a metric that is not available, such as BERTScore without a model."""
    if metric == TEST_LOSS:
        return fmean(outcome.losses.result["losses"])
    value = outcome.scores.result[metric]["value"]
    return None if value is None else float(value)


def _comparisons(
    session: Session, settings: "ComparisonSettings", rows: Mapping[str, Outcomes], metric: str, groups: Sequence[int]
) -> dict[str, Against]:
    """The reference method against each other one; `groups` are those of the test examples."""
    values_of = [_value(outcome, metric) for row in rows.values() for outcome in row.by_number.values()]
    if settings.reference not in rows or None in values_of:
        return {}
    corpus = None if metric == TEST_LOSS else session.metrics[metric].from_statistics
    values = {name: [_per_example(one, metric, corpus) for one in row.by_number.values()] for name, row in rows.items()}
    if settings.folds:  # each row is tested in one of them
        values = {name: [[one for fold in folds for one in fold]] for name, folds in values.items()}
        if len(values[settings.reference][0]) < 2:
            return {}
    ours = values.pop(settings.reference)
    planned = planned_against(settings.reference, list(values))
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
        name: Against(**asdict(one), verdict=one.verdict if name in planned else None) for name, one in compared.items()
    }


def _per_example(outcome: Outcome, metric: str, corpus: Any) -> list[Any]:
    if metric == TEST_LOSS:
        return list(outcome.losses.result["losses"])
    entry = outcome.scores.result[metric]
    return list(entry["per_example"] if corpus is None else entry["statistics"])


def _row(name: str, row: Outcomes, metrics: Sequence[str], comparisons: Mapping[str, Mapping[str, Against]]) -> Row:
    method = METHODS[name]
    facts = Row(method=name, title=method.title, unavailable=row.unavailable, failed=row.failed, merges=method.merges)
    if not row.by_number:
        return facts
    outcomes = list(row.by_number.values())
    # Where no seed has a part, as in zero shot, there is one result and no spread.
    distinct = outcomes if len({outcome.losses.key for outcome in outcomes}) > 1 else outcomes[:1]
    result = {
        "seeds": len(outcomes),
        "scores": {metric: _spread([_value(outcome, metric) for outcome in distinct]) for metric in metrics},
        "prune_ratio": _spread([outcome.prune_ratio for outcome in outcomes if outcome.prune_ratio is not None]),
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


def _merges(rows: Mapping[str, Outcomes]) -> dict[int, str]:
    """With `target.on: auto`, which merge the rows that have one rest on, by seed or fold; it is the same in all."""
    outcomes = [item for row in rows.values() for item in row.by_number.items()]
    return {number: outcome.merge for number, outcome in outcomes if outcome.merge is not None}


def _spread(values: Sequence[float | None]) -> Spread | None:
    there = [value for value in values if value is not None]
    if not there or len(there) < len(values):
        return None
    average, deviation = mean_and_sd(there)
    return Spread(mean=average, sd=deviation, values=there)


def _cost(row: Outcomes) -> Cost:
    """Mean over the seeds: of all that the method needs, and of what it needs beyond the adapters that are merged."""
    everything = [outcome.records for outcome in row.by_number.values()]
    own = [
        [record for record in one.records if record.step not in PARENTS or record.key in one.discarded]
        for one in row.by_number.values()
    ]
    return Cost(
        runs=fmean(sum(record.trains for record in records) for records in own),
        seconds=fmean(sum(record.seconds for record in records) for records in own),
        work=fmean(sum(record.work for record in records) for records in own),
        runs_in_all=fmean(sum(record.trains for record in records) for records in everything),
        seconds_in_all=fmean(sum(record.seconds for record in records) for records in everything),
        work_in_all=fmean(sum(record.work for record in records) for records in everything),
    )


def _curve(rows: Mapping[str, Outcomes]) -> list[CurvePoint]:
    """Mean dev and test loss of each run of the grid that chooses on the dev set, by seed."""
    outcomes = rows["grid"].by_number if "grid" in rows else {}
    return [
        CurvePoint(seed=number, prune_ratio=ratio, **losses)
        for number, outcome in outcomes.items()
        for ratio, losses in (outcome.curve or {}).items()
    ]


def _warnings(rows: Mapping[str, Outcomes], what: str) -> list[str]:
    return [
        f"{METHODS[name].title}, {what} {number}, {sentence}"
        for name, row in rows.items()
        for number, outcome in row.by_number.items()
        for sentence in outcome.left_out
    ]


def _scored_otherwise(rows: Mapping[str, Outcomes], metrics: Sequence[str], *, of_folds: bool) -> list[str]:
    """Which metrics were computed in several ways, such as by two versions of a library; folds differ in their references."""
    found: dict[tuple[str, int], set[str]] = {}
    for row in rows.values():
        for number, outcome in row.by_number.items():
            for metric, entry in outcome.scores.result.items():
                found.setdefault((metric, number if of_folds else 0), set()).add(entry["signature"])
    unlike = {metric: ways for (metric, _), ways in found.items() if metric in metrics and len(ways) > 1}
    return [
        f"rows have {metric} computed in {len(ways)} ways ({' and '.join(sorted(ways))}); to compute it anew, remove "
        "scores-*.json from store/records and give the same command again"
        for metric, ways in unlike.items()
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
    return environments(record for one in outcomes for record in (*one.records, one.losses, one.scores))


def _pace(rows: Mapping[str, Outcomes]) -> Pace | None:
    """Lowest and highest seconds per forward pass of the final runs, which are alike but for what else the machine did."""
    outcomes = [outcome for row in rows.values() for outcome in row.by_number.values()]
    finals = [record for one in outcomes for record in one.records if record.step.startswith("final ")]
    paces = [record.seconds / record.work for record in finals if record.work and record.seconds]
    return Pace(lowest=min(paces), highest=max(paces)) if paces else None
