"""Which adapter a run hands over: the one to expect the best of, unless the dev rows show that another is better.

The rule, for `final.deliver: best`, by losses on dev, or on micro-dev where there is no dev set. The test split has no part.

1. Candidates stand in the order of `IN_ORDER`. One whose losses are not finite is left out; a run itself stops at such a loss.
2. What to expect the best of depends on what the source adapter is worth. Where the target adapter (with `target.on` the sum of
   both) is ahead of it by more than `AHEAD` standard errors of the paired difference, it is GRASP's result. Else it is the usual
   practice, the first in the order: the source adapter continued on the target rows, or the source adapter itself where no step
   lowered its dev loss.
3. The best is the one with the lowest mean loss. It is compared with the expected one by the paired bootstrap over these rows
   (`compare_with_baselines`, 95 %). Where it is shown to be better, it is handed over, else the expected one.
   Rows that belong together, such as those of one article, are drawn together.
4. In a classification a lower loss is often no more than less over-confidence. So where that is GRASP's result, the continued
   source adapter is handed over all the same if it answers more of these rows right, by more than `AHEAD` standard errors.

Replayed on finished comparisons (`lab/results/README.md`) it gains nearly as much as GRASP's result where that is the best,
and loses little where the continued adapter is.
The backbone alone is measured beside them and never handed over: it tells whether any adapter has learned something.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from grasp_lora.data.splits import group_numbers
from grasp_lora.engine.results import Adapter, Finished, Losses
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
ALONE = "zero_shot"  # the backbone without an adapter, which is measured and never handed over
FEWEST_TOLD = 6  # rows from which on one can show a difference at 95 %: of fewer all signs agree by chance too often
AHEAD = 1.0  # standard errors


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
    titles = IN_ORDER if parents.on is None else ON_SOURCE
    if steps.recipe.final.deliver != "best":
        chosen = Delivered(name="grasp", title=titles["grasp"], why="The recipe asks for it (final.deliver).")
    else:
        chosen = best_of(losses, rows, left_out, groups, titles)
        errors = [step.result.losses for step in answers_that_count(steps, systems)]
        if chosen.name == "grasp" and errors and vetoed(*errors):
            ours, theirs = (f"{len(wrong) - sum(wrong):.0f}" for wrong in errors)
            loss = f"{fmean(losses['continued']):.3f} against {fmean(losses['grasp']):.3f}"
            why = f"It answers {ours} of {len(errors[0])} {rows} rows right, {titles['grasp']} {theirs}. "
            why += f"That weighs more than the loss of these rows, which is {loss}. {left_out}"
            chosen = Delivered("continued", titles["continued"], why.strip(), rows, len(errors[0]), "grasp")
    return warned(chosen, losses, losses_of(steps.alone()), rows, titles)


def answers_that_count(steps: Steps, systems: Mapping[str, Adapter]) -> list[Finished[Losses]]:
    """The errors of `continued` and of GRASP's result that rule 4 compares; none where it has no part."""
    split, both = steps.choosing_split, [systems[name] for name in ("continued", "grasp") if name in systems]
    if split is None or not steps.splits.labels or len(both) < 2:
        return []
    return [steps.errors(system, split) for system in both]


def vetoed(continued: Sequence[float], grasp: Sequence[float]) -> bool:
    """Whether the continued source adapter makes clearly fewer errors than GRASP's result: rule 4; two rows or more."""
    return _above([theirs - ours for ours, theirs in zip(continued, grasp, strict=True)])


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
    usable = [name for name in order if len(losses[name]) >= FEWEST and all(map(math.isfinite, losses[name]))]
    if len(usable) < 2:
        chosen = (usable or order)[0]
        why = f"There are no {split} losses to choose by, so {_first(chosen)} is handed over."
        if usable:
            why = f"Only its {split} losses are finite."
        return Delivered(name=chosen, title=title_of(chosen, titles), why=f"{why} {left_out}".strip())
    means = {name: fmean(losses[name]) for name in usable}
    behind = _source_behind(losses, usable)
    expected = "grasp" if behind else usable[0]
    best = min(usable, key=means.__getitem__)  # of equal ones the first in the order
    against = expected if best != expected else min((name for name in usable if name != best), key=means.__getitem__)
    compared = compare_with_baselines(losses[best], {against: losses[against]}, groups=groups, higher_is_better=False)
    comparison, chosen = compared[against], best
    difference, low, high = comparison.difference, comparison.low, comparison.high
    if comparison.verdict != "better" and best != expected:
        chosen, against = expected, best
        difference, low, high = -difference, -high, -low
    rows = comparison.examples
    why = f"Its {split} loss is {means[chosen]:.3f} against {means[against]:.3f} for {title_of(against, titles)}"
    if comparison.verdict == "better":
        why += f"{', the next best' if best == expected else ''}; the {rows} {split} rows show a difference."
    else:
        why += f"; {rows} {split} rows cannot tell these apart, so {_first(chosen)} is handed over."
        if behind:
            source, target = behind
            worth = f"{means[target]:.3f} against {means[source]:.3f}"
            ahead = f"{titles[_kind(target)]} is ahead of the source adapter alone ({worth})"
            why += f" {ahead[0].upper()}{ahead[1:]}: there GRASP's result is the best to expect."
    return Delivered(
        name=chosen,
        title=title_of(chosen, titles),
        why=f"{why} {left_out}".strip(),
        split=split,
        examples=rows,
        against=against,
        difference=difference + 0.0,
        low=low + 0.0,
        high=high + 0.0,
        confidence=comparison.confidence,
    )


def title_of(name: str, titles: Mapping[str, str] = IN_ORDER) -> str:
    """Return what a system is, as a part of a sentence; the second of several sources says so."""
    number = name.partition("_")[2]
    return titles[_kind(name)] + (f" (number {number})" if number else "")


def _source_behind(losses: Mapping[str, Sequence[float]], usable: Sequence[str]) -> tuple[str, str] | None:
    """The best source adapter and the target adapter, where that is ahead and GRASP's result may be handed over; else None."""
    sources = [name for name in usable if _kind(name) == "source"]
    target = "target" if "target" in losses else "merged"
    if not sources or not {target, "grasp"} <= set(usable):
        return None
    source = min(sources, key=lambda name: fmean(losses[name]))
    ahead = [theirs - ours for theirs, ours in zip(losses[source], losses[target], strict=True)]
    return (source, target) if _above(ahead) else None


def _above(leads: Sequence[float]) -> bool:
    """Whether a paired difference is above 0 by more than `AHEAD` standard errors."""
    return fmean(leads) > AHEAD * stdev(leads) / math.sqrt(len(leads))


def _first(name: str) -> str:
    """What is handed over where the rows cannot tell, in words."""
    return {"continued": "the usual practice", "grasp": IN_ORDER["grasp"]}.get(name, "the simpler one")


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
    if len(alone) < FEWEST_TOLD or not all(map(math.isfinite, alone)):
        return delivered
    usable = {
        name: values for name, values in losses.items() if len(values) == len(alone) and all(map(math.isfinite, values))
    }
    better = {
        name
        for name, values in usable.items()
        if compare_with_baselines(values, {"alone": alone}, higher_is_better=False)["alone"].verdict == "better"
    }
    if delivered.name in better or not usable:
        return delivered
    rows, without = f"{len(alone)} {split} rows", f"the backbone alone ({split} loss {fmean(alone):.3f})"
    best = min(usable, key=lambda name: fmean(usable[name]))
    lowest = f"{fmean(usable[best]):.3f}, {title_of(best, titles)}"
    if better:
        warning = f"The {rows} do not show that this adapter is better than {without}; others are: it may have learned nothing."
    elif fmean(usable[best]) >= fmean(alone):
        warning = (
            f"No adapter learned anything: on the {rows} none has a lower loss than {without}; the next is {lowest}."
        )
    else:
        warning = f"The {rows} show no adapter to be better than {without}; the lowest loss of one is {lowest}."
    return replace(delivered, warning=warning, nothing_learned=not better)
