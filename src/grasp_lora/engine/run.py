"""The main job, from top to bottom: adapters, merge, ratio, final run, rivals.

Each line of `main_job` is a step that the store remembers, so a run that was killed goes on where it was, inside a training to
the same bits. Nothing is written before the recipe, the backbone, the rows and the adapters have been checked. Under torchrun all
processes train and measure together, the first one writes, and all of them have to see the folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from grasp_lora.engine import deliver
from grasp_lora.engine.check import check
from grasp_lora.engine.differences import differences
from grasp_lora.engine.plan import planned
from grasp_lora.engine.results import Adapter, Finished, Learned, Measured, each_once
from grasp_lora.engine.run_folder import (
    ADAPTER_FOLDER,
    CONTINUED_FOLDER,
    FINAL_FOLDER,
    MERGED_FOLDER,
    STORE_FOLDER,
    UNPRUNED_FOLDER,
    DataFacts,
    Delivered,
    Grid,
    Metrics,
    Run,
    RunInfo,
    SearchCost,
    SystemScores,
    begin,
    check_place,
    threads_of,
)
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Parents, Steps, names_of
from grasp_lora.engine.store import Store
from grasp_lora.storage.claims import working_in
from grasp_lora.storage.processes import join, on_first_process
from grasp_lora.storage.threads import use_idle_cores
from grasp_lora.training.training_settings import ANSWER_AS_MEASURED, TRAINED_AS_MEASURED


def run(session: Session, folder: Path, grid: Grid | bool = False) -> Run:
    """Do what is not done yet of the main job, and write its files.

    Args:
        session: of the recipe, with nothing loaded yet; its progress is told of the steps.
        folder: of the run; made if missing.
        grid: a grid search of this recipe to show beside the learned ratio: one on record, or True to do it here.

    Raises:
        GraspError: something the user gave does not fit, the folder cannot be written or another process writes there; what is
            done stays.
        Interrupted: SIGTERM or SIGINT came. A training finishes its step and saves a checkpoint, all else stops at once and is
            done again; a second signal ends the process.
    """
    check_place(folder)
    with working_in(folder) as work:
        join(session.recipe.backbone.device)
        use_idle_cores(session.recipe.backbone.device, threads_of(folder))
        session.progress.preparing()
        check(session)
        on_first_process(work.begin)
        info = on_first_process(partial(begin, folder, session))
        store = Store(folder / STORE_FOLDER, session.progress, work)
        job = main_job(Steps(session, store, stop_requested=lambda: work.interruption.asked_by), info, grid)
        on_first_process(partial(job.write, session, folder))
        return job


@dataclass(frozen=True)
class Made:
    """What a run has made before it measures.

    Args:
        parents: the adapters that were merged; None where the recipe asks for `continued` alone, as is GRASP's result.
        learned: the controller run; None where the recipe gives the ratio.
        ratio: prune ratio of GRASP's result, a fraction in [0, 1].
        unpruned: the same final run with nothing pruned, beside a learned ratio that the recipe hands over.
        continued: the source adapter, trained on the target rows; None where the recipe does not ask for it, or where it failed.
        left_out: why that one is left aside, as a sentence; empty where it is not.
        averaged: the mean of both; None where there is no `continued`.
    """

    sources: tuple[Adapter, ...]
    parents: Parents | None
    learned: Finished[Learned] | None
    ratio: float
    grasp: Adapter | None
    unpruned: Adapter | None
    continued: Adapter | None
    left_out: str
    averaged: Adapter | None

    @property
    def systems(self) -> dict[str, Adapter]:
        """All of them by name.

        A target adapter that was trained on the source adapter is left out: it does nothing alone, and their sum is the merge.
        """
        parents = self.parents
        found = {
            **dict(zip(names_of(len(self.sources)), self.sources, strict=True)),
            "target": parents.target if parents and parents.on is None else None,
            "merged": parents.merged if parents else None,
            "unpruned": self.unpruned,
            "continued": None if self.left_out else self.continued,
            "grasp": self.grasp,
            "averaged": self.averaged,
        }
        return {name: adapter for name, adapter in found.items() if adapter is not None}


def make(steps: Steps) -> Made:
    """Train and merge, learn the ratio, make GRASP's result, continue the source adapter as is usual, and take their mean."""
    final, sources = steps.recipe.final, steps.sources()
    if final.deliver == "continued":
        return Made(sources, None, None, 0.0, None, None, steps.continued(), "", None)
    parents = steps.parents()
    learned = steps.learn_ratio(parents.merged) if final.prune_ratio is None else None
    ratio = learned.result.estimate.ratio if learned else float(final.prune_ratio or 0.0)
    grasp = steps.finetune(parents.merged.after(*[learned] if learned else []), ratio)
    unpruned = steps.finetune(parents.merged, 0.0) if learned and final.deliver == "grasp" else None
    continued, left_out = deliver.continue_source(steps) if final.deliver == "best" else (None, "")
    averaged = deliver.mean_of(steps, continued, grasp) if continued and not left_out else None
    return Made(sources, parents, learned, ratio, grasp, unpruned, continued, left_out, averaged)


def main_job(steps: Steps, info: RunInfo, grid: Grid | bool = False) -> Run:
    """Learn the ratio, make GRASP's result and its rivals, measure them, and say which of them is handed over."""
    plan = planned(steps.session)
    more, answers = len(steps.grid) if grid is True else 0, ANSWER_AS_MEASURED * len(steps.splits.test)
    passes = TRAINED_AS_MEASURED * sum(plan.trained.values()) + plan.probed + plan.systems * answers
    steps.session.progress.planned(len(plan.trained) + plan.systems + more, 0 if more else passes, answers)
    made = make(steps)
    learned, rivals = made.learned, made.systems
    systems = {deliver.ALONE: steps.alone(), **rivals}
    measured = {
        name: _measure(steps, name, system, number, len(systems))
        for number, (name, system) in enumerate(systems.items(), 1)
    }
    delivered = _delivered(steps, made, measured)

    adapters = dict(zip(names_of(len(made.sources)), made.sources, strict=True))
    if made.parents and made.grasp:
        adapters |= {"target": made.parents.target, MERGED_FOLDER: made.parents.merged, FINAL_FOLDER: made.grasp}
    if made.unpruned is not None:
        adapters[UNPRUNED_FOLDER] = made.unpruned
    if made.continued is not None:
        adapters[CONTINUED_FOLDER] = made.continued
    adapters[ADAPTER_FOLDER] = rivals[delivered.name]
    last = next(adapter.made for name in (FINAL_FOLDER, CONTINUED_FOLDER) if (adapter := adapters.get(name)))

    test, data = steps.splits.test, DataFacts.of(steps.session)
    predictions = {name: system.predictions(test) for name, system in measured.items()}
    scores = {name: system.values for name, system in measured.items()}
    estimate = learned.result.estimate if learned else None
    return Run(
        info=info,
        recipe=steps.recipe,
        data=data,
        adapters={
            name: adapter for name, adapter in adapters.items() if adapter.title == ""
        },  # given ones have a title
        learned=learned,
        predictions=predictions,
        prompts=[row.prompt for row in test],
        metrics=Metrics(
            systems={
                name: SystemScores(system.dev_loss, system.test_loss, system.values)
                for name, system in measured.items()
            },
            delivered=delivered,
            differences=differences(delivered.name, scores, predictions, data.test_groups),
            prune_ratio=made.ratio,
            prune_ratio_interval=(estimate.low, estimate.high) if estimate else None,
            nothing_learned_about_ratio=estimate is not None and estimate.nothing_learned,
            search=_search_cost(steps, learned, made.grasp) if learned and made.grasp else None,
            grid=grid if isinstance(grid, Grid) else grid_search(steps, made.parents) if grid else None,
            best_step=last.result.best_step if last else 0,
            signatures={name: score.signature for name, score in measured[delivered.name].metrics.items()},
            test_examples=len(test),
            language=steps.session.language,
        ),
        cost=_cost(adapters, measured),
    )


def _search_cost(steps: Steps, learned: Finished[Learned], grasp: Adapter) -> SearchCost:
    """What the learned ratio cost with its final run, and what a grid of such final runs would."""
    final, runs = grasp.made, len(steps.grid)
    assert final is not None
    # Where no dev set stops the final runs, a grid has to measure each on the probed rows to choose one.
    choosing = 0 if final.result.dev_loss is not None else len(steps.session.probe_pool)
    passes = learned.result.passes + final.result.passes
    return SearchCost(passes, runs, runs * (final.result.passes + choosing))


def grid_search(steps: Steps, parents: Parents | None) -> Grid | None:
    """A final run at each ratio of the grid, and its loss on the test rows; None where nothing is merged."""
    if parents is None:
        return None
    runs = {ratio: steps.finetune(parents.merged, ratio) for ratio in steps.grid}
    losses = {ratio: steps.losses(adapter, "test").result.mean for ratio, adapter in runs.items()}
    return Grid(tuple(losses.items()), recorded=False)


def _measure(steps: Steps, name: str, system: Adapter, number: int, total: int) -> Measured:
    steps.session.progress.system(number, total)
    measured = steps.measure(system)
    steps.session.progress.scored(name, measured.predictions(steps.splits.test))
    return measured


def _delivered(steps: Steps, made: Made, measured: Mapping[str, Measured]) -> Delivered:
    """What is handed over, and whether any adapter is shown to have learned something."""
    name, why = deliver.expected(steps, made.systems, made.left_out)
    titles = deliver.titles_with(steps.recipe.target.on, steps.recipe.final.prune_ratio)
    losses = {name: system.test.result.losses for name, system in measured.items() if system.test}
    return deliver.warned(Delivered(name, titles[name], why), losses, losses.pop(deliver.ALONE, ()), titles)


def _cost(adapters: dict[str, Adapter], measured: dict[str, Measured]) -> dict[str, float]:
    """Seconds of each step, by its name; those of all measurements together, as `evaluation`."""
    cost: dict[str, float] = {}
    for step in each_once([step for adapter in adapters.values() for step in adapter.trail]):
        cost[step.name] = round(cost.get(step.name, 0.0) + step.seconds, 3)
    parts = [part for system in measured.values() for part in vars(system).values() if part is not None]
    return cost | {"evaluation": round(sum(part.seconds for part in each_once(parts)), 3)}
