"""Which adapter a run hands over: GRASP's result, unless another is clearly ahead on the dev rows, by loss or by answers.

The rule, for `final.deliver: best`, by the mean loss on dev, or on micro-dev where there is no dev set. The test split has no
part in it.

1. Candidates stand in the order of `IN_ORDER`. A run has stopped before at a loss that is not finite.
2. Where the lowest mean is more than `NEAR` below that of GRASP's result, it is handed over, of equal ones the first. Else
   GRASP's result is: where losses are near, it answered better in the mean of all that was measured.
3. A loss tells little of answers. So the candidates answer these rows, too. Of those whose main score is above that of the
   adapter so far by more than `AHEAD` standard errors of the difference the highest takes its place, of equal ones the one of
   the lower loss.
4. How far the rows tell the choice from the next is said: the paired bootstrap over these rows (`compare_with_baselines`, 95 %).
   Rows that belong together, such as those of one article, are drawn together.

Rules that wait until the rows show a difference were measured, and left: a dozen rows show nothing (`lab/log.md`).
The backbone alone is measured beside them and never handed over: it tells whether any adapter has learned something.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from grasp_lora.data.splits import group_numbers
from grasp_lora.engine.results import Adapter, Finished, RowScores
from grasp_lora.engine.run_folder import Delivered
from grasp_lora.engine.steps import FEWEST, Parents, Steps
from grasp_lora.errors import AdapterError, DivergedError, ProbeError
from grasp_lora.evaluation.statistics import compare_with_baselines

IN_ORDER = {
    "continued": "the source adapter continued on the target rows",
    "source": "the source adapter as it is",
    "target": "the target adapter",
    "merged": "the merge, not trained",
    "grasp": "GRASP's result",
}
ON_SOURCE = IN_ORDER | {"merged": "the target adapter on top of the source adapter"}  # with `target.on`
UNPRUNED = "the merge, trained further"  # what GRASP's result is where the recipe says that nothing is pruned
ALONE = "zero_shot"  # the backbone without an adapter, which is measured and never handed over
NEAR = 0.05  # of a loss
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
    except (DivergedError, ProbeError, AdapterError) as error:  # the other candidates are there
        return None, f"The source adapter could not be continued: {error}"
    if (continued.made and continued.made.result.best_step) or len(steps.sources()) > 1:
        return continued, ""
    return continued, "Continued training lowered no dev loss, which leaves the source adapter."


def candidates(parents: Parents, continued: Adapter | None, grasp: Adapter) -> dict[str, Adapter]:
    """What may be handed over, by name; the continued source adapter is left aside where it is None.

    A target adapter that was trained on the source adapter is none, since it does nothing alone: it is the merge, their sum.
    """
    alone = {name: adapter for name, adapter in parents.named.items() if name != "target" or parents.on is None}
    return {
        **alone,
        "merged": parents.merged,
        **({} if continued is None else {"continued": continued}),
        "grasp": grasp,
    }


def choose(steps: Steps, systems: Mapping[str, Adapter], parents: Parents, left_out: str = "") -> Delivered:
    """Choose what is handed over, as the recipe says (`final.deliver`).

    Args:
        steps: measure what is not on record yet.
        systems: of `candidates`.
        parents: the adapters that were merged.
        left_out: as in `best_of`.
    """
    split, rows = steps.choosing_split, (steps.choosing_split or "dev").replace("_", "-")

    def losses_of(adapter: Adapter) -> list[float]:
        return [] if split is None else steps.losses(adapter, split).result.losses

    losses = {name: losses_of(system) for name, system in systems.items()}
    groups = None if split is None else group_numbers(getattr(steps.splits, split))
    titles = titles_with(parents.on, steps.recipe.final.prune_ratio)
    if steps.recipe.final.deliver != "best":
        chosen = Delivered(name="grasp", title=titles["grasp"], why="The recipe asks for it (final.deliver).")
    else:
        chosen = best_of(losses, rows, left_out, groups, titles)
        scores = {name: step.result for name, step in answers_that_count(steps, systems).items()}
        if (best := answers_better(scores, losses, chosen.name)) is not None:
            ours, theirs = (fmean(scores[name].scores) for name in (best, chosen.name))
            loss = f"{fmean(losses[best]):.3f} against {fmean(losses[chosen.name]):.3f}"
            why = f"It answers the {len(scores[best].scores)} {rows} rows better than {chosen.title}: in the mean of the rows "
            why += f"{ours:.1f} against {theirs:.1f} ({scores[best].metric}). That weighs more than their loss, which is {loss}."
            chosen = Delivered(
                best, title_of(best, titles), f"{why} {left_out}".strip(), rows, len(scores[best].scores), chosen.name
            )
            alone = answers_that_count(steps, {ALONE: steps.alone()})[ALONE].result
            if _ahead(scores[best].scores, alone.scores):
                return chosen  # whatever the losses say of the backbone alone
    return warned(chosen, losses, losses_of(steps.alone()), rows, titles)


def answers_that_count(steps: Steps, systems: Mapping[str, Adapter]) -> dict[str, Finished[RowScores]]:
    """The scores of the candidates' answers that rule 3 compares; none where no rows choose, or no metric is available."""
    split = steps.choosing_split
    if split is None or not steps.session.available_metrics:
        return {}
    return {name: steps.row_scores(system, split) for name, system in systems.items()}


def answers_better(scores: Mapping[str, RowScores], losses: Mapping[str, Sequence[float]], chosen: str) -> str | None:
    """The candidate whose answers are clearly better than those of the one that was chosen, if there is one: rule 3."""
    ahead = [name for name, of in scores.items() if of.scores and _ahead(of.scores, scores[chosen].scores)]
    return max(ahead, key=lambda name: (fmean(scores[name].scores), -fmean(losses[name])), default=None)


def _ahead(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether scores of the same rows are higher by more than `AHEAD` standard errors; one row of many is no more than one."""
    if len(ours) != len(theirs):  # a metric of one's own may give none
        return False
    leads = [our - their for our, their in zip(ours, theirs, strict=True)]
    return fmean(leads) > AHEAD * stdev(leads) / math.sqrt(len(leads)) * (1 + _ROUNDING)


def best_of(
    losses: Mapping[str, Sequence[float]],
    split: str,
    left_out: str = "",
    groups: Sequence[int] | None = None,
    titles: Mapping[str, str] = IN_ORDER,
) -> Delivered:
    """Choose by the rule above.

    Args:
        losses: of each candidate, nats per answer token, one a row and the same rows in all; empty where there are none.
        split: where they come from, as a reader calls it.
        left_out: why a candidate is missing, as a sentence.
        groups: what each row belongs to, such as its article; None takes each by itself.
        titles: what each kind of candidate is called.
    """
    order = sorted(losses, key=lambda name: list(IN_ORDER).index(_kind(name)))
    if len(losses[order[0]]) < FEWEST:
        why = f"There are no {split} losses to choose by, so {title_of('grasp', titles)} is handed over."
        return Delivered(name="grasp", title=title_of("grasp", titles), why=f"{why} {left_out}".strip())
    means = {name: fmean(losses[name]) for name in order}
    best = min(order, key=means.__getitem__)  # of equal ones the first in the order
    near = means[best] >= (1 - NEAR) * means["grasp"]
    chosen = "grasp" if near else best
    against = min((name for name in order if name != chosen), key=means.__getitem__)
    compared = compare_with_baselines(losses[chosen], {against: losses[against]}, groups=groups, higher_is_better=False)
    comparison = compared[against]
    why = f"Its {split} loss is {means[chosen]:.3f}, the lowest; next is {means[against]:.3f}, {title_of(against, titles)}."
    if chosen != best:
        why = f"Its {split} loss is {means[chosen]:.3f}, within {NEAR:.0%} of the lowest, {means[best]:.3f}, "
        why += f"{title_of(best, titles)}. So near, it is the one to expect the best of."
    shown = "cannot tell these apart" if comparison.verdict == "no difference shown" else "show the difference"
    return Delivered(
        name=chosen,
        title=title_of(chosen, titles),
        why=f"{why} {comparison.examples} {split} rows {shown}. {left_out}".strip(),
        split=split,
        examples=comparison.examples,
        against=against,
        difference=comparison.difference + 0.0,
        low=comparison.low + 0.0,
        high=comparison.high + 0.0,
        confidence=comparison.confidence,
    )


def titles_with(on: str | None, prune_ratio: float | None) -> dict[str, str]:
    """Return what each kind of candidate is called, with `target.on` and a prune ratio that was given."""
    return (IN_ORDER if on is None else ON_SOURCE) | ({"grasp": UNPRUNED} if prune_ratio == 0 else {})


def title_of(name: str, titles: Mapping[str, str] = IN_ORDER) -> str:
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
    titles: Mapping[str, str] = IN_ORDER,
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
