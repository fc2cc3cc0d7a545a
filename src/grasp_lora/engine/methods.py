"""Every method of the comparison: a function of a few lines over the same `Steps`, and a row of the table.

A new method is a function and a row of `METHODS`. Choices are made on dev or micro-dev rows, never on the test.
Paper: baselines of the main table; more that a reviewer would ask for.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from grasp_lora.engine import deliver
from grasp_lora.engine.check import lack_of_rounds
from grasp_lora.engine.results import Adapter, Finished, Measured
from grasp_lora.engine.run import make
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Parents, Steps
from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.method.merging import MERGE_RULES, MergeSettings
from grasp_lora.method.search import PRESETS
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.stages import ControllerStage
from grasp_lora.storage.claims import Busy


@dataclass(frozen=True)
class Outcome:
    """What one method came to with one seed.

    Args:
        adapter: the result, with every step that led to it in its trail.
        prune_ratio: of the result, None where nothing is pruned.
        chosen_on: the split on which a choice was made, if one was.
        curve: for a grid, ratio -> mean dev loss of its run.
        left_out: what a choice had to do without, a sentence each.
        taken: what a choice among adapters of several kinds took, in words.
        measured: losses and scores; `compare` fills it in.
    """

    adapter: Adapter
    prune_ratio: float | None = None
    chosen_on: str | None = None
    curve: Mapping[float, float] | None = None
    left_out: tuple[str, ...] = ()
    taken: str | None = None
    measured: Measured | None = None


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        title: as the table prints it.
        run: does what is not on record yet.
        unavailable: why it cannot run with this recipe here, or None.
        merges: whether it starts from the merge, so that its cost is what comes on top of the adapters that are merged.
        paper: whether it is a row of the paper, whose target adapter is trained on the backbone alone in any recipe.
    """

    title: str
    run: Callable[[Steps], Outcome]
    unavailable: Callable[[Session], str | None] = lambda session: None
    merges: bool = True
    paper: bool = False


def _in_paper(steps: Steps) -> tuple[Steps, Parents]:
    """The paper's setting, in any recipe: target adapter on the backbone alone, its merge, and from there on no dropout, no
    clipping, and a final run that selects its mask anew after each step.

    Epochs, rates and batches stay the recipe's, but for batch 1 in the controller run; so does the merge of unequal ranks.
    """
    recipe, final = steps.recipe, steps.recipe.final
    rule = "paper_apart" if len(steps.session.ranks) == 1 else recipe.merge.rule
    changes = {
        "merge": replace(recipe.merge, rule=rule, weights=None, dropout=0.0),
        "controller": _unclipped(_paper_controller(recipe)),
        "final": replace(_unclipped(final), mode="reselect"),
    }
    changed = steps.with_recipe(recipe.model_copy(update=changes))
    return changed, changed.parents(in_paper=True)


def _unclipped(stage: Any) -> Any:
    return replace(stage, training=replace(stage.training, max_grad_norm=0.0))


def _adaptive_merge(steps: Steps) -> Outcome:
    steps, parents = _in_paper(steps)
    return Outcome(steps.finetune(parents.merged, 0.0), 0.0)


def _by_rule(rule: str) -> Callable[[Steps], Outcome]:
    """Another way to merge, not trained."""

    def run(steps: Steps) -> Outcome:
        parents = steps.parents(in_paper=True)
        return Outcome(steps.merge(rule, tuple(parents.named.values()), tuple(parents.named), MergeSettings(rule)))

    return run


def _lorahub(steps: Steps) -> Outcome:
    return Outcome(steps.search_merge_weights(steps.parents(in_paper=True)), chosen_on="micro_dev")


def _grid(in_paper: bool) -> Callable[[Steps], Outcome]:
    """A grid search: one final run per ratio, the best of them by the dev loss."""

    def run(steps: Steps) -> Outcome:
        steps, parents = _in_paper(steps) if in_paper else (steps, steps.parents())
        runs, losses, failed, busy = {}, {}, {}, None
        for ratio in steps.grid:
            try:
                runs[ratio], losses[ratio] = steps.judged(steps.finetune(parents.merged, ratio))
            except Busy as error:  # the other ratios need not wait for this one
                busy = error
            except RecipeError:
                raise
            except GraspError as error:  # such as a training that diverges: a search goes on without it
                failed[ratio] = error
        if busy is not None:
            raise busy
        if not runs:
            raise next(iter(failed.values()))
        best = min(losses, key=losses.__getitem__)
        return Outcome(
            runs[best].after(*_trail(*runs.values())),
            best,
            chosen_on="dev",
            curve=losses,
            left_out=tuple(f"is without ratio {ratio:g}, whose run failed: {error}" for ratio, error in failed.items()),
        )

    return run


def _grasp(in_paper: bool) -> Callable[[Steps], Outcome]:
    """GRASP: learn the ratio in one controller run, unless the recipe gives it, then one final run; in the paper's row in
    the paper's whole setting."""

    def run(steps: Steps) -> Outcome:
        steps, parents = _in_paper(steps) if in_paper else (steps, steps.parents())
        given = steps.recipe.final.prune_ratio
        if given is not None and not in_paper:
            return Outcome(steps.finetune(parents.merged, float(given)), float(given))
        learned = steps.learn_ratio(parents.merged)
        ratio = learned.result.estimate.ratio
        grasp = steps.finetune(parents.merged.after(learned), ratio)
        return Outcome(grasp, ratio, chosen_on=steps.recipe.controller.rounds.pool)

    return run


def _delivered(steps: Steps) -> Outcome:
    """What a run hands over, for the cost of all that it trains."""
    made, best = make(steps), steps.recipe.final.deliver != "grasp"
    systems = made.systems
    name, _ = deliver.expected(steps, systems, made.left_out)
    trained = _trail(*systems.values(), *[made.continued] if made.continued else []) if best else ()
    return Outcome(
        systems[name].after(*trained),
        made.ratio if name == "grasp" else None,
        chosen_on=steps.recipe.controller.rounds.pool if made.learned and name == "grasp" else None,
        left_out=(f"is GRASP's result. {made.left_out}",) if best and made.continued is None else (),
        taken=deliver.titles_with(steps.recipe.target.on, steps.recipe.final.prune_ratio)[name],
    )


def _trail(*adapters: Adapter) -> list[Finished[Any]]:
    return [step for adapter in adapters for step in adapter.trail]


def _paper_controller(recipe: Recipe) -> ControllerStage:
    """Preset `paper` within the recipe's own bounds, its rounds at most ten steps apart."""
    stage, paper = recipe.controller, PRESETS["paper"]
    every = paper.rounds.every if stage.rounds.every == "epoch" else min(paper.rounds.every, stage.rounds.every)
    bounds = {key: getattr(stage.policy, key) for key in ("ratio_min", "ratio_max", "ratio_init")}
    rounds = replace(paper.rounds, every=every)
    training = replace(stage.training, batch_size=1)
    policy = replace(paper.policy, **bounds)
    return replace(stage, preset="paper", policy=policy, rounds=rounds, rule=paper.rule, training=training)


def _paper_has_no_rounds(session: Session) -> str | None:
    """The paper's controller has other spacing and probes: a run may be too short, or nothing to probe."""
    return lack_of_rounds(session, _paper_controller(session.recipe))


def _needs_source(session: Session) -> str | None:
    return None if session.splits.source_train else "needs data.source, the recipe gives source adapters only"


def _needs(split: str) -> Callable[[Session], str | None]:
    """The rows of a split of the target."""
    return lambda session: (
        None if getattr(session.splits, split) else f"needs a {split} split, data.target.{split} is 0"
    )


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


METHODS: dict[str, Method] = {
    "zero_shot": Method("zero shot", lambda steps: Outcome(steps.alone()), merges=False),
    "source_only": Method("source only", lambda steps: Outcome(steps.source()), merges=False),
    "target_only": Method("target only (LoRA)", lambda steps: Outcome(steps.target()), merges=False, paper=True),
    "continued": Method(
        "source adapter continued on the target", lambda steps: Outcome(steps.continued()), merges=False
    ),
    "joint": Method(
        "source and target data together", lambda steps: Outcome(steps.joint()), _needs_source, merges=False
    ),
    "ties": Method("TIES", _by_rule("ties"), _needs_equal_ranks("ties"), paper=True),
    "dare_ties": Method("DARE-TIES", _by_rule("dare_ties"), _needs_equal_ranks("dare_ties"), paper=True),
    "lorahub": Method("LoRAHub", _lorahub, _needs_equal_ranks("lorahub"), paper=True),
    "merged": Method("merged, not trained", lambda steps: Outcome(steps.parents().merged)),
    "adaptive_merge": Method("adaptive LoRA merge", _adaptive_merge, paper=True),
    "grid_paper": Method("adaptive LoRA merge + pruning, grid", _grid(in_paper=True), _needs("dev"), paper=True),
    "grid": Method("grid of GRASP's final runs", _grid(in_paper=False), _needs("dev")),
    "grasp": Method("GRASP", _grasp(in_paper=False)),
    "delivered": Method("what a run hands over", _delivered),
    "grasp_paper": Method("GRASP, preset paper", _grasp(in_paper=True), _paper_has_no_rounds, paper=True),
}
