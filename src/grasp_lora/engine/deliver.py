"""Which adapter a run hands over. It is fixed before the run: none of the user's rows has a say.

With `final.deliver: best` it is the mean of GRASP's result and of `continued`, the source adapter trained on the target rows as
is usual. The mean costs no training. Where training lowered no dev loss of `continued`, it is GRASP's result.
With `continued` nothing but that is trained.

These were best in draws of few rows (`lab/results/few-rows.md`). Rules by which dev losses or answers put another adapter in the
place of that one were measured, and left: they gained nothing (`lab/log.md`).
The backbone alone is measured beside all and never handed over: it tells whether any adapter has learned something.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from grasp_lora.engine.results import Adapter
from grasp_lora.engine.run_folder import Delivered
from grasp_lora.engine.steps import Steps
from grasp_lora.errors import AdapterError, DivergedError
from grasp_lora.evaluation.statistics import compare_with_baselines
from grasp_lora.method.merging import MergeSettings

TITLES = {
    "continued": "the source adapter continued on the target rows",
    "source": "the source adapter as it is",
    "target": "the target adapter",
    "merged": "the merge, not trained",
    "grasp": "GRASP's result",
    "unpruned": "the merge, trained further, nothing pruned",
    "averaged": "the mean of the source adapter continued and GRASP's result",
}
ON_SOURCE = TITLES | {"merged": "the target adapter on top of the source adapter"}  # with `target.on`
# What GRASP's result is where no ratio was learned: the word is said of a learned one alone.
UNPRUNED = "the merge, trained further"
PRUNED = "the merge, pruned at a given ratio and trained further"
ALONE = "zero_shot"  # the backbone without an adapter, which is measured and never handed over
FEWEST_TOLD = 6  # rows from which on one can show a difference at 95 %: of fewer all signs agree by chance too often


def continue_source(steps: Steps) -> tuple[Adapter | None, str]:
    """Continue the source adapter on the target rows.

    Returns:
        The adapter, None where its training fails; and why it is left aside, empty where it is not.
    """
    try:
        continued = steps.continued()
    except (DivergedError, AdapterError) as error:  # the other systems are there
        return None, f"The source adapter could not be continued: {error}"
    if continued.made and continued.made.result.best_step:
        return continued, ""
    return continued, "Continued training lowered no dev loss, which leaves the source adapter."


def mean_of(steps: Steps, continued: Adapter, grasp: Adapter) -> Adapter:
    """The mean of both deltas, exactly."""
    return steps.merge("averaged", (continued, grasp), ("continued", "grasp"), MergeSettings("exact"))


def expected(steps: Steps, systems: Mapping[str, Adapter], left_out: str = "") -> tuple[str, str]:
    """The name of what is handed over, as the recipe has it (`final.deliver`), and why, as a sentence.

    `left_out` says why `continued` is not among the systems.
    """
    asked = steps.recipe.final.deliver
    if asked == "continued":
        return (
            asked,
            "The recipe asks for this one training on your rows (final.deliver); best also merges, with three.",
        )
    if asked == "grasp":
        if steps.recipe.final.prune_ratio is not None:
            return asked, "The recipe asks for it (final.deliver)."
        rows = "dev" if steps.recipe.controller.rounds.pool == "dev" else "micro-dev"
        return (
            asked,
            f"It is the merge of both adapters, pruned at a ratio that one training learned on the {rows} rows.",
        )
    if "averaged" not in systems:
        return "grasp", left_out
    return (
        "averaged",
        "In trials with few rows such adapters answered best. This choice is fixed in advance; your data does not affect it.",
    )


def titles_with(on: str | None, prune_ratio: float | None) -> dict[str, str]:
    """Return what each kind of candidate is called, with `target.on` and a prune ratio that was given."""
    titles = TITLES if on is None else ON_SOURCE
    if prune_ratio is None:
        return titles
    given = PRUNED if prune_ratio else UNPRUNED
    return titles | {"grasp": given, "averaged": f"the mean of the source adapter continued and {given}"}


def title_of(name: str, titles: Mapping[str, str] = TITLES) -> str:
    """Return what a system is, as a part of a sentence; the second of several sources says so."""
    kind, _, number = name.partition("_")
    return titles[kind] + (f" (number {number})" if number else "")


def warned(
    delivered: Delivered,
    losses: Mapping[str, Sequence[float]],
    alone: Sequence[float],
    titles: Mapping[str, str] = TITLES,
) -> Delivered:
    """The same, with what has to be said of it where no adapter, or not this one, is shown to be better than the backbone alone.

    Each is compared by itself, and row by row: a correction for their number, or rows of a few articles drawn together, would
    alarm where adapters have clearly learned.

    Args:
        losses, alone: on the test rows, of each system and of the backbone without an adapter.
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
    rows, without = f"{len(alone)} test rows", f"the backbone alone (test loss {fmean(alone):.3f})"
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
