"""The steps that every experiment is made of: adapters trained, merged, pruned and fine-tuned, ratios learned, systems measured.

A `Bench` holds the steps of one seed. Each step is on record in a `Store` under a hash of what decides it and of the steps it
rests on. So runs and comparisons share what they have in common, and a change makes only what rests on it anew.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from grasp_lora.bench import lorahub
from grasp_lora.bench.keyed import REVISIONS
from grasp_lora.bench.keys import controller_settings, final_settings
from grasp_lora.bench.measuring import Measuring
from grasp_lora.bench.outcomes import (
    Adapter,
    Learned,
    facts_of,
    given,
    measured_examples,
    names_of,
    rounds_of,
    trained_examples,
    unique,
)
from grasp_lora.bench.run_folder import TargetOn
from grasp_lora.bench.store import Record
from grasp_lora.errors import AdapterError, DivergedError, GraspError, ProbeError, RecipeError, UntrainedError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.merging import MergeSettings
from grasp_lora.method.policy import POLICIES
from grasp_lora.method.presets import ratio_rule
from grasp_lora.method.rounds import RatioEstimate
from grasp_lora.recipes.stages import AUTO, ControllerStage

JOINT_EVALUATIONS = 4  # of the dev loss in an epoch of source and target data together


class Bench(Measuring):
    """The steps of experiments with one seed.

    Args:
        session: of the recipe with this seed.
        shared: of the recipe whose seed the source adapter is trained with.
        store: where finished steps are kept.
        grid: prune ratios of the grid search.
    """

    looked_at: tuple[Record, ...] = ()  # with `target.on: auto`, the steps of that choice, which the merge rests on

    def backbone(self) -> Adapter:
        """The backbone alone."""
        return Adapter("backbone", lambda: None)

    @cached_property
    def source(self) -> Adapter:
        """The source adapter, shared by all seeds; several given ones are averaged exactly."""
        sources = self.sources
        names = [f"source_{number}" for number in range(1, len(sources) + 1)]
        return sources[0] if len(sources) == 1 else self._merged("source", MergeSettings("exact"), sources, names)

    @cached_property
    def target(self) -> Adapter:
        """The target adapter; with `target.on` it is the part that is added to the source adapter, and does nothing alone."""
        stage = self.recipe.target
        if stage.adapter is not None:
            return given(self.session.existing_adapters[stage.adapter])
        if stage.on == AUTO:
            raise RecipeError(
                "target.on is 'auto', which a run and a comparison decide; set source or null here, or take the bench's "
                "`decided`"
            )
        on = None if stage.on is None else self.source
        return self._trained("target", ("train",), ("dev",), stage.training, on=on)

    @cached_property
    def as_in_paper(self) -> Self:
        """The bench whose target adapter is trained on the backbone alone; this one, unless the recipe has `target.on`."""
        return self._with_target(None)

    @cached_property
    def decided(self) -> Self:
        """The bench whose target adapter is where the recipe says; with `target.on: auto`, where the merge has the lower loss.

        The losses are those of all dev and micro-dev rows. On the backbone alone where these are too few. A way that fails, for
        example since its training diverges, leaves the other one.

        Raises:
            DivergedError, ProbeError, AdapterError: both fail.
        """
        if self.recipe.target.on != AUTO:
            return self
        ways = {"apart": self._with_target(None), "source": self._with_target("source")}
        splits = self.choosing_splits
        if not splits:
            ways["apart"].target_on = TargetOn(on=None, splits=[], examples=0, losses={})
            return ways["apart"]
        measured: dict[str, list[Record]] = {}
        failed: dict[str, GraspError] = {}
        for on, bench in ways.items():
            try:
                measured[on] = [bench.losses(bench.merged(), split) for split in splits]
            except (DivergedError, ProbeError, AdapterError) as error:
                failed[on] = error
        if not measured:
            raise failed["apart"]
        rows = {on: [loss for one in records for loss in one.result["losses"]] for on, records in measured.items()}
        losses = {on: fmean(own) for on, own in rows.items()}
        best = min(losses, key=losses.__getitem__)  # of equal ones the average
        chosen, merges = ways[best], {on: ways[on].merged().records for on in measured}
        steps = [record for own in (*merges.values(), *measured.values()) for record in own]
        chosen.looked_at = unique(steps)
        chosen.discarded = frozenset(one.key for one in steps if one.trains) - {one.key for one in merges[best]}
        chosen.target_on = TargetOn(
            on=chosen.recipe.target.on,
            splits=splits,
            examples=len(rows[best]),
            losses=losses,
            left_out="; ".join(f"the other way failed: {error}" for error in failed.values()),
        )
        return chosen

    def _with_target(self, on: str | None) -> Self:
        if self.recipe.target.on == on:
            return self
        target = replace(self.recipe.target, on=on)
        session = self.session.variant(self.recipe.model_copy(update={"target": target}))
        return type(self)(session, self._shared, self.store, self.grid)

    @property
    def parents(self) -> list[Adapter]:
        """Every adapter that is merged, the target's last."""
        return [*self.sources, self.target]

    @property
    def parent_names(self) -> tuple[str, ...]:
        """What the parents are called: source (source_2, ...) and target."""
        return (*names_of(len(self.sources)), "target")

    def merged(self) -> Adapter:
        """The merge of the recipe."""
        merged = self._merged("merged", self._merge_settings(len(self.sources)), self.parents, self.parent_names)
        return replace(merged, records=unique([*self.looked_at, *merged.records]))

    def merged_by(self, rule: str) -> Adapter:
        """The merge by another rule, with its own default weights."""
        return self._merged(rule, MergeSettings(rule), self.parents, self.parent_names)

    def trained_jointly(self) -> Adapter:
        """One fresh adapter on source and target data together, the target's repeated about as often as its adapter sees it."""
        source, target = self._shared.recipe.source.training, self.recipe.target.training
        repeats = max(1, round(target.epochs / source.epochs))
        evaluate_every = min(source.evaluate_every, 1 / JOINT_EVALUATIONS)
        training = replace(source, evaluate_every=evaluate_every, patience=None, keep="best")
        return self._trained("joint", ("source_train", *["train"] * repeats), ("dev",), training)

    def finetuned(self, start: Adapter, prune_ratio: float, changes: Mapping[str, Any] | None = None) -> Adapter:
        """The final run of the recipe.

        Args:
            start: the adapter it starts from.
            prune_ratio: fraction in [0, 1].
            changes: of the final stage; its own ratio is left aside.
        """
        stage = replace(self.recipe.final, **{"prune_ratio": None, **(changes or {})})
        settings = self._settings(
            data=self._data("train", "dev"),
            revision=REVISIONS["training"],
            start=start.key,
            final=final_settings(stage),
            mask=asdict(stage.mask or self.recipe.mask),
            dropout=self.recipe.dropout,
            prune_ratio=prune_ratio,
        )

        def work(folder: Path) -> tuple[AdapterWeights, dict[str, Any]]:
            session = self.session.variant(self.recipe.model_copy(update={"final": stage}))
            weights = start.weights
            if prune_ratio > 0.0:
                self._check_learned(weights)
            adapter, result, kept = session.finetune_pruned(weights, prune_ratio, folder)
            facts = facts_of(result, stage.training, len(session.splits.train), len(session.splits.dev))
            return adapter, facts | ({"kept": kept} if adapter.apart else {})  # which the saved sum does not tell

        return self._adapter(f"final {prune_ratio:.2f}", settings, [start], work)

    def continued(self) -> Adapter:
        """The source adapter, trained on the target data as the final run is, nothing pruned."""
        return self.finetuned(self.source, 0.0)

    def learned(self, stage: ControllerStage) -> Learned:
        """The controller run on the merged adapter.

        Where a ratio is held the run does not depend on the rule that reads the ratio off its rounds, unless the rule decides
        which examples a baseline needs, so policies that differ in the rule alone share it.

        Args:
            stage: in place of the recipe's own.

        Returns:
            The learned ratio, and the merged adapter to start from, with the run's record among its own: what it cost.
        """
        policy, asked, run_by = stage.policy, stage, replace(stage, rule="smooth_fit")
        measures_alike = stage.compares_rounds == run_by.compares_rounds
        held = policy.regime == "held" and type(policy) in POLICIES.values()  # a user's own may ask the rule as it goes
        if held and (stage.rounds.in_turn is None or measures_alike):
            stage = run_by
        merged = self.merged()
        record = self.store.get(
            "controller",
            self._control_settings(stage, merged),
            lambda key, folder: self._control(stage, merged, folder),
            trains=True,
        )
        return Learned(self._estimate(record, asked), replace(merged, records=(*merged.records, record)), record)

    def _check_learned(self, weights: AdapterWeights) -> None:
        """Refuse to prune what no training has changed: nothing says which of its weights matter."""
        if any(pair.acts for pair in weights.values()):
            return
        source, target = (stage.training.learning_rate for stage in (self.recipe.source, self.recipe.target))
        raise UntrainedError(
            "the adapters to start from change nothing, as before training: no step lowered a dev loss (or a given one was never "
            f"trained); lower source.training.learning_rate (now {source:g}) and target.training.learning_rate (now {target:g})"
        )

    def _estimate(self, record: Record, stage: ControllerStage) -> RatioEstimate:
        """The ratio that the rule of a stage reads off a controller run."""
        return ratio_rule(stage.rule)(rounds_of(record), stage.policy.ratio_min, stage.policy.ratio_max)

    def _control_settings(self, stage: ControllerStage, merged: Adapter) -> dict[str, Any]:
        return self._settings(
            data=self._data("train", *stage.splits),
            revision=REVISIONS["controller"],
            start=merged.key,
            controller=controller_settings(stage),
            mask=asdict(self.recipe.mask),
            dropout=self.recipe.dropout,
        )

    def _control(self, stage: ControllerStage, merged: Adapter, folder: Path) -> dict[str, Any]:
        """Run the controller; return its rounds and its cost."""
        self._check_learned(merged.weights)
        session = self.session.variant(self.recipe.model_copy(update={"controller": stage}))
        learned = session.learn_ratio(merged.weights, folder)
        rounds = learned.rounds
        return {
            "rounds": rounds,
            "timings": learned.timings,
            "history": learned.history,
            "steps": learned.steps,
            "trained_examples": trained_examples(learned.steps, stage.training, len(session.splits.train)),
            "measured_examples": sum(
                len(row["baseline_losses"]) + len(set(row["candidates"])) * len(row["candidate_losses"][0])
                for row in rounds
            )
            + measured_examples(learned.history, len(session.splits.dev)),
        }

    def lorahub(self) -> Adapter:
        """Merge weights found without gradients on the micro-dev loss (Huang et al. 2023)."""
        parents, examples = self.parents, len(self.session.splits.micro_dev)
        settings = self._settings(
            data=self._data("micro_dev"),
            revision=REVISIONS["training"],
            start=[parent.key for parent in parents],
            budget=lorahub.BUDGET,
            bound=lorahub.BOUND,
            l1=lorahub.L1,
        )

        def work(folder: Path) -> tuple[AdapterWeights, dict[str, Any]]:
            adapters = [parent.weights for parent in parents]
            names, seed = self.parent_names, self.recipe.seed_of("lorahub")
            weights = lorahub.search_weights(self.session, adapters, names, seed)
            merged = self.session.merge(adapters, names, MergeSettings("lorahub", weights))
            return merged, {"weights": list(weights), "measured_examples": lorahub.BUDGET * examples}

        return self._adapter("lorahub", settings, parents, work, trains=False)

    @cached_property
    def sources(self) -> list[Adapter]:
        """Each source adapter: those that the recipe names, or the one that is trained."""
        recipe, session = self._shared.recipe, self._shared
        if recipe.source.adapters:
            return [given(session.existing_adapters[place]) for place in recipe.source.adapters]
        return [self._trained("source", ("source_train",), ("source_dev",), recipe.source.training, session)]
