"""Every method of the comparison, a few steps on a `Bench` each: the rows of the table.

Choices are made on the dev or micro-dev split.
Paper: baselines of the main table; more that a reviewer would ask for.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from grasp_lora.bench.checks import lack_of_rounds
from grasp_lora.bench.deliver import IN_ORDER, answers_that_count, candidates, choose, continue_source
from grasp_lora.bench.outcomes import Outcome
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.method.masks import MaskSettings
from grasp_lora.method.merging import MERGE_RULES
from grasp_lora.method.presets import PRESETS
from grasp_lora.method.search import RatioPolicy
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.stages import ControllerStage
from grasp_lora.storage.claims import Busy

MOST_IN_CURVE = 200  # test examples: of 1,000 the curve of a grid of 8 would cost more passes than the grid


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        title: as the table prints it.
        run: does what is not on record yet.
        units: rough cost in final runs, for the time left.
        unavailable: why it cannot run with this recipe here, or None.
        merges: whether it starts from the merge, so that its cost is what comes on top of the adapters that are merged.
        paper: whether it is a row of the paper, whose target adapter is trained on the backbone alone in any recipe.
    """

    title: str
    run: Callable[[Bench], Outcome]
    units: float = 1.0
    unavailable: Callable[[Session], str | None] = lambda session: None
    merges: bool = True
    paper: bool = False

    def bench(self, bench: Bench) -> Bench:
        """The bench that it runs on: its target adapter is where this method needs it."""
        if self.paper:
            return bench.as_in_paper
        return bench.decided if self.merges else bench


def _run_grid(final: Mapping[str, Any] | None = None, curve: bool = False) -> Callable[[Bench], Outcome]:
    """A grid search: one final run per ratio, the best of them by the mean loss on the dev split.

    Only where the curve is wanted is the test split measured at every ratio, and only a small one: the chosen ratio is enough.
    """

    def run(bench: Bench) -> Outcome:
        merged = bench.merged()
        runs, failed, taken = {}, {}, None
        for ratio in bench.grid:
            try:
                runs[ratio] = bench.finetuned(merged, ratio, final)
            except Busy as error:  # the other ratios need not wait for this one
                taken = error
            except RecipeError:
                raise
            except GraspError as error:  # such as a training that diverges: a search goes on without it
                failed[ratio] = error
        if taken is not None:
            raise taken
        if not runs:
            raise next(iter(failed.values()))
        small = len(bench.session.splits.test) <= MOST_IN_CURVE
        points = {ratio: {"dev": float(adapter.records[-1].result["dev_loss"])} for ratio, adapter in runs.items()}
        if curve and small:
            for ratio, adapter in runs.items():
                points[ratio]["test"] = fmean(bench.losses(adapter).result["losses"])
        best = min(points, key=lambda ratio: points[ratio]["dev"])
        return bench.outcome(
            runs[best],
            best,
            chosen_on="dev",
            curve=points if curve else None,
            chosen_among=runs.values(),
            left_out=[f"is without ratio {ratio:g}, whose run failed: {error}" for ratio, error in failed.items()],
        )

    return run


def _run_grasp(
    stage: Callable[[Recipe], ControllerStage],
    final: Mapping[str, Any] | None = None,
) -> Callable[[Bench], Outcome]:
    """GRASP: learn the ratio in one controller run, then one final run."""

    def run(bench: Bench) -> Outcome:
        chosen = stage(bench.recipe)
        learned = bench.learned(chosen)
        adapter = bench.finetuned(learned.start, learned.ratio, final)
        return bench.outcome(adapter, learned.ratio, chosen_on=chosen.rounds.pool)

    return run


def _run_rule(rule: str) -> Callable[[Bench], Outcome]:
    """Another way to merge, not trained."""
    return lambda bench: bench.outcome(bench.merged_by(rule))


def _run_delivered(bench: Bench) -> Outcome:
    """What a run hands over: the choice of `deliver.py` among its adapters."""
    learned = bench.learned(bench.recipe.controller)
    final = bench.finetuned(learned.start, learned.ratio)
    if bench.recipe.final.deliver != "best":
        pool = bench.recipe.controller.rounds.pool
        return bench.outcome(final, learned.ratio, chosen_on=pool, taken=IN_ORDER["grasp"])
    continued, left_out = continue_source(bench)
    systems = candidates(bench, bench.merged(), None if left_out else continued, final)
    chosen, split = choose(bench, systems, left_out), bench.choosing_split
    return bench.outcome(
        systems[chosen.name],
        learned.ratio if chosen.name == "grasp" else None,
        chosen_on=split,
        chosen_among=[one for one in (*systems.values(), continued) if one is not None],
        chosen_by=[]
        if split is None
        else [*(bench.losses(one, split) for one in systems.values()), *answers_that_count(bench, systems)],
        left_out=[f"is without a candidate. {left_out}"] if continued is None else [],
        taken=chosen.title,
    )


def _own(recipe: Recipe) -> ControllerStage:
    return recipe.controller


def _paper(recipe: Recipe) -> ControllerStage:
    """Preset `paper` within the recipe's own bounds, its rounds at most ten steps apart."""
    own, paper = recipe.controller, PRESETS["paper"]
    every = paper.rounds.every if own.rounds.every == "epoch" else min(paper.rounds.every, own.rounds.every)
    return replace(
        own, policy=_bounded(paper.policy, own.policy), rounds=replace(paper.rounds, every=every), rule=paper.rule
    )


def _bounded(policy: RatioPolicy, own: RatioPolicy) -> RatioPolicy:
    return replace(policy, ratio_min=own.ratio_min, ratio_max=own.ratio_max, ratio_init=own.ratio_init)


def _needs_rounds(stage: Callable[[Recipe], ControllerStage]) -> Callable[[Session], str | None]:
    """A controller beside the recipe's own has other epochs, spacing or probes: a run may be too short, or nothing to probe."""

    def unavailable(session: Session) -> str | None:
        own = stage(session.recipe)
        missing = [_needs(split)(session) for split in own.splits]
        return next(filter(None, missing), None) or lack_of_rounds(own, len(session.splits.train))

    return unavailable


def _needs_source(session: Session) -> str | None:
    return None if session.splits.source_train else "needs data.source, the recipe gives source adapters only"


def _needs(*splits: str) -> Callable[[Session], str | None]:
    """The first of the target's splits that is empty."""

    def unavailable(session: Session) -> str | None:
        empty = (split for split in splits if not getattr(session.splits, split))
        return next((f"needs a {split} split, data.target.{split} is 0" for split in empty), None)

    return unavailable


def _needs_equal_ranks(rule: str) -> Callable[[Session], str | None]:
    def unavailable(session: Session) -> str | None:
        if MERGE_RULES[rule].space.equal_ranks and len(session.ranks) > 1:
            return f"merge rule {rule!r} needs equal ranks, the adapters have {sorted(session.ranks)}"
        if rule == "lorahub" and (problem := _needs("micro_dev")(session)):
            return problem
        if rule == "lorahub" and importlib.util.find_spec("nevergrad") is None:
            return "needs nevergrad: pip install 'grasp-lora[compare]'"
        return None

    return unavailable


PAPER_FINAL = {"mode": "reselect", "mask": MaskSettings(score="gradient_of_delta")}  # Paper: adaptive LoRA merge

METHODS: dict[str, Method] = {
    "zero_shot": Method("zero shot", lambda bench: bench.outcome(bench.backbone()), 0.3, merges=False),
    "source_only": Method("source only", lambda bench: bench.outcome(bench.source), merges=False),
    "target_only": Method("target only (LoRA)", lambda bench: bench.outcome(bench.target), merges=False, paper=True),
    "continued": Method(
        "source adapter continued on the target",
        lambda bench: bench.outcome(bench.continued()),
        merges=False,
    ),
    "joint": Method(
        "source and target data together",
        lambda bench: bench.outcome(bench.trained_jointly()),
        4,
        _needs_source,
        merges=False,
    ),
    "ties": Method("TIES", _run_rule("ties"), 0.3, _needs_equal_ranks("ties"), paper=True),
    "dare_ties": Method("DARE-TIES", _run_rule("dare_ties"), 0.3, _needs_equal_ranks("dare_ties"), paper=True),
    "lorahub": Method(
        "LoRAHub", lambda bench: bench.outcome(bench.lorahub()), 2, _needs_equal_ranks("lorahub"), paper=True
    ),
    "merged": Method("merged, not trained", lambda bench: bench.outcome(bench.merged()), 0.3),
    "adaptive_merge": Method(
        "adaptive LoRA merge", lambda bench: bench.outcome(bench.finetuned(bench.merged(), 0.0), 0.0), paper=True
    ),
    "grid_paper": Method("adaptive LoRA merge + pruning, grid", _run_grid(PAPER_FINAL), 10, _needs("dev"), paper=True),
    "grid": Method("grid of GRASP's final runs", _run_grid(curve=True), 8, _needs("dev")),
    "grasp": Method("GRASP", _run_grasp(_own), 5),
    "delivered": Method("what a run hands over", _run_delivered, 0.3),
    "grasp_paper": Method("GRASP, preset paper", _run_grasp(_paper, PAPER_FINAL), 5, _needs_rounds(_paper), paper=True),
}
