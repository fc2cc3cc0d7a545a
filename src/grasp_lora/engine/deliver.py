"""Which adapter a run hands over: the one to expect the best of, unless another one answers the dev rows clearly better.

The rule, for `final.deliver: best`, on dev, or on micro-dev where there is no dev set. The test split has no part in it.

1. To expect the best of is `continued`, for questions on a text its mean with GRASP's result, which costs no training: by
   draws of few rows (`lab/results/few-rows.md`). Where there is no dev set, or training lowered no dev loss of `continued`, it is
   GRASP's result.
2. The candidates answer these rows. Of those whose main score is above that of the expected one by more than `AHEAD` standard
   errors of the difference the highest is handed over, of equal ones the one of the lower loss.
3. Else the expected one is.

Losses decide between equal ones only: they often rise while answers get better. Rules that go by losses, and rules that wait
until the rows show a difference, were measured, and left (`lab/log.md`).
The backbone alone is measured beside them and never handed over: it tells whether any adapter has learned something.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from grasp_lora.engine.results import Adapter, Finished, RowScores
from grasp_lora.engine.run_folder import Delivered
from grasp_lora.engine.steps import Parents, Steps
from grasp_lora.errors import AdapterError, DivergedError, ProbeError
from grasp_lora.evaluation.statistics import compare_with_baselines
from grasp_lora.method.merging import MergeSettings

TITLES = {
    "continued": "the source adapter continued on the target rows",
    "source": "the source adapter as it is",
    "target": "the target adapter",
    "merged": "the merge, not trained",
    "grasp": "GRASP's result",
    "averaged": "the mean of the source adapter continued and GRASP's result",
}
ON_SOURCE = TITLES | {"merged": "the target adapter on top of the source adapter"}  # with `target.on`
UNPRUNED = "the merge, trained further"  # what GRASP's result is where the recipe says that nothing is pruned
ALONE = "zero_shot"  # the backbone without an adapter, which is measured and never handed over
AHEAD = 1.0  # standard errors of a difference between scores
_ROUNDING = 1e-9
FEWEST_TOLD = 6  # rows from which on one can show a difference at 95 %: of fewer all signs agree by chance too often


def continue_source(steps: Steps) -> tuple[Adapter | None, str]:
    """Continue the source adapter on the target rows.

    Returns:
        The adapter, None where its training fails; and why it is no candidate, empty where it is one.
    """
    try:
        continued = steps.continued()
        if (split := steps.choosing_split) is not None:  # a training without patience looked at none of its rows
            steps.losses(continued, split)
    except (DivergedError, ProbeError, AdapterError) as error:  # the other candidates are there
        return None, f"The source adapter could not be continued: {error}"
    if (continued.made and continued.made.result.best_step) or len(steps.sources()) > 1:
        return continued, ""
    return continued, "Continued training lowered no dev loss, which leaves the source adapter."


def mean_of(steps: Steps, continued: Adapter | None, grasp: Adapter) -> Adapter | None:
    """The mean of both deltas, exactly; None where it was not measured (other tasks), or `continued` is not to be expected."""
    if continued is None or not helped(continued) or steps.recipe.data.task != "qa" or not steps.splits.dev:
        return None
    return steps.merge("averaged", (continued, grasp), ("continued", "grasp"), MergeSettings("exact"))


def helped(continued: Adapter) -> bool:
    """Whether a step lowered its dev loss; with several sources it is a candidate in any case."""
    return continued.made is not None and continued.made.result.best_step > 0


def candidates(
    parents: Parents, continued: Adapter | None, grasp: Adapter, averaged: Adapter | None
) -> dict[str, Adapter]:
    """What may be handed over, by name; what is None is left aside.

    A target adapter that was trained on the source adapter is none, since it does nothing alone: it is the merge, their sum.
    """
    alone = {name: adapter for name, adapter in parents.named.items() if name != "target" or parents.on is None}
    return {
        **alone,
        "merged": parents.merged,
        **({} if continued is None else {"continued": continued}),
        "grasp": grasp,
        **({} if averaged is None else {"averaged": averaged}),
    }


def choose(steps: Steps, systems: Mapping[str, Adapter], parents: Parents, left_out: str = "") -> Delivered:
    """Choose what is handed over, as the recipe says (`final.deliver`).

    Args:
        steps: measure what is not on record yet.
        systems: of `candidates`.
        parents: the adapters that were merged.
        left_out: why a candidate is missing, as a sentence.
    """
    split, rows = steps.choosing_split, (steps.choosing_split or "dev").replace("_", "-")

    def losses_of(adapter: Adapter) -> list[float]:
        return [] if split is None else steps.losses(adapter, split).result.losses

    losses, of_alone = {name: losses_of(system) for name, system in systems.items()}, losses_of(steps.alone())
    titles = titles_with(parents.on, steps.recipe.final.prune_ratio)
    if steps.recipe.final.deliver != "best":
        chosen = Delivered(name="grasp", title=titles["grasp"], why="The recipe asks for it (final.deliver).")
    else:
        scores = {name: step.result for name, step in answers_that_count(steps, systems).items()}
        plain = steps.recipe.data.task != "qa" and bool(steps.splits.dev)
        chosen = best_of(scores, losses, rows, left_out, titles, expected_of(systems, plain=plain))
        if scores:
            ours, alone = scores[chosen.name], answers_that_count(steps, {ALONE: steps.alone()})[ALONE].result
            if _ahead(ours.scores, alone.scores):
                return chosen  # whatever the losses say of the backbone alone
            if _ahead(alone.scores, ours.scores):
                warning = f"The backbone alone answers the {len(ours.scores)} {rows} rows better: "
                warning += f"{fmean(alone.scores):.1f} against {fmean(ours.scores):.1f} ({ours.metric}). "
                warning += "This adapter may have learned nothing."
                return replace(chosen, warning=warning, nothing_learned=True)
    return warned(chosen, losses, of_alone, rows, titles)


def answers_that_count(steps: Steps, systems: Mapping[str, Adapter]) -> dict[str, Finished[RowScores]]:
    """The scores of the answers that decide; none where no rows choose, or no metric is available."""
    split = steps.choosing_split
    if split is None or not steps.session.available_metrics:
        return {}
    return {name: steps.row_scores(system, split) for name, system in systems.items()}


def best_of(
    scores: Mapping[str, RowScores],
    losses: Mapping[str, Sequence[float]],
    split: str,
    left_out: str = "",
    titles: Mapping[str, str] = TITLES,
    expected: str = "grasp",
) -> Delivered:
    """Choose by the rule above.

    Args:
        scores: of each candidate's answers, a number a row and the same rows in all; empty where there are none.
        losses: the same of its losses.
        split: where they come from, as a reader calls it.
        left_out: as in `choose`.
        titles: what each kind of candidate is called.
        expected: the candidate that is handed over where rows do not tell.
    """

    def mean(name: str) -> float:
        return fmean(scores[name].scores)

    usual = title_of(expected, titles)
    measured = [name for name, of in scores.items() if of.scores]  # a metric of one's own may give none
    if expected not in measured:
        why = f"No answers to {split} rows can be compared, so {usual} is handed over. {left_out}"
        return Delivered(expected, usual, why.strip())
    examples, metric = len(scores[expected].scores), scores[expected].metric
    better, highest = clearly_ahead(scores, losses, expected), max(measured, key=mean)
    if better is not None:
        why = f"It answers the {examples} {split} rows better than {usual}: in the mean of the rows {mean(better):.1f} against "
        why += f"{mean(expected):.1f} ({metric}), by more than one standard error."
    else:
        why = f"Its answers to the {examples} {split} rows score {mean(expected):.1f} ({metric}). "
        if mean(highest) > mean(expected):
            why += f"The highest is {mean(highest):.1f}, {title_of(highest, titles)}, which is not ahead by more than "
            why += f"one standard error. Where rows do not tell, the choice is {usual}."
        else:
            why += "No other adapter scores higher."
    name = better or expected
    return Delivered(name, title_of(name, titles), f"{why} {left_out}".strip(), split, examples)


def expected_of(systems: Mapping[str, Adapter], *, plain: bool) -> str:
    """The candidate handed over where rows do not tell (rule 1); `plain` makes that `continued`, if its training helped."""
    if "averaged" in systems:
        return "averaged"
    return "continued" if plain and "continued" in systems and helped(systems["continued"]) else "grasp"


def clearly_ahead(scores: Mapping[str, RowScores], losses: Mapping[str, Sequence[float]], expected: str) -> str | None:
    """The candidate that takes the place of the expected one by rule 2, if there is one."""
    ahead = [name for name, of in scores.items() if of.scores and _ahead(of.scores, scores[expected].scores)]
    return max(ahead, key=lambda name: (fmean(scores[name].scores), -fmean(losses[name])), default=None)


def _ahead(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether scores of the same rows are higher by more than `AHEAD` standard errors; one row of many is no more than one."""
    if not ours or len(ours) != len(theirs):  # a metric of one's own may give none
        return False
    leads = [our - their for our, their in zip(ours, theirs, strict=True)]
    rounding = _ROUNDING * max(map(abs, (*ours, *theirs)))
    return fmean(leads) > AHEAD * stdev(leads) / math.sqrt(len(leads)) + rounding


def titles_with(on: str | None, prune_ratio: float | None) -> dict[str, str]:
    """Return what each kind of candidate is called, with `target.on` and a prune ratio that was given."""
    titles = TITLES if on is None else ON_SOURCE
    if prune_ratio != 0:
        return titles
    return titles | {"grasp": UNPRUNED, "averaged": f"the mean of the source adapter continued and {UNPRUNED}"}


def title_of(name: str, titles: Mapping[str, str] = TITLES) -> str:
    """Return what a system is, as a part of a sentence; the second of several sources says so."""
    number = name.partition("_")[2]
    return titles[_kind(name)] + (f" (number {number})" if number else "")


def _kind(name: str) -> str:
    return name.partition("_")[0]


def warned(
    delivered: Delivered,
    losses: Mapping[str, Sequence[float]],
    alone: Sequence[float],
    split: str,
    titles: Mapping[str, str] = TITLES,
) -> Delivered:
    """The same, with what has to be said of it where no adapter, or not this one, is shown to be better than the backbone alone.

    Each is compared by itself, and row by row: a correction for their number, or rows of a few articles drawn together, would
    alarm where adapters have clearly learned.

    Args:
        delivered: what was chosen.
        losses, split, titles: as of `best_of`.
        alone: losses of the backbone without an adapter.
    """
    if len(alone) < FEWEST_TOLD:
        return delivered
    better = {
        name
        for name, values in losses.items()
        if compare_with_baselines(values, {"alone": alone}, higher_is_better=False)["alone"].verdict == "better"
    }
    if delivered.name in better:
        return delivered
    rows, without = f"{len(alone)} {split} rows", f"the backbone alone ({split} loss {fmean(alone):.3f})"
    best = min(losses, key=lambda name: fmean(losses[name]))
    lowest = f"{fmean(losses[best]):.3f}, {title_of(best, titles)}"
    if better:
        warning = f"The {rows} do not show that this adapter is better than {without}; others are: it may have learned nothing."
    elif fmean(losses[best]) >= fmean(alone):
        warning = (
            f"No adapter learned anything: on the {rows} none has a lower loss than {without}; the next is {lowest}."
        )
    else:
        warning = f"The {rows} show no adapter to be better than {without}; the lowest loss of one is {lowest}."
    return replace(delivered, warning=warning, nothing_learned=not better)
