"""Everything that an experiment does, one plain method each: train, merge, learn the ratio, fine-tune, measure.

A method names what decides its result, says how it is done, and lets the store remember it. `run` and `compare` are written in
these methods, so both share every step that they have in common:

    steps = Steps(session, store)
    merged = steps.parents().merged
    learned = steps.learn_ratio(merged)
    grasp = steps.finetune(merged.after(learned), learned.result.estimate.ratio)
    steps.measure(grasp).test_loss
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_lora.data.encode import Example
from grasp_lora.data.splits import hash_of
from grasp_lora.engine import lorahub
from grasp_lora.engine.results import (
    Adapter,
    Finished,
    Learned,
    Losses,
    Measured,
    MergeWeights,
    Scores,
    Tested,
    Trained,
    each_once,
)
from grasp_lora.engine.session import Session
from grasp_lora.engine.store import ADAPTER, WORK, Store, key_of
from grasp_lora.errors import GraspError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.masks import survival
from grasp_lora.method.merging import MergeSettings, merge, merge_rule
from grasp_lora.method.search import plain_policy
from grasp_lora.models.adapter_files import LoadedAdapter, read_adapter
from grasp_lora.models.adapters import attached, fresh_adapter
from grasp_lora.models.backbone import Backbone
from grasp_lora.models.generation import answer
from grasp_lora.models.live import adapter_weights, frozen_adapter, segments_of
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.storage.processes import distribute, on_first_process, world_size
from grasp_lora.text.names import without_place
from grasp_lora.training.probes import ProbeSet, probes_of
from grasp_lora.training.training_settings import TrainingSettings

if TYPE_CHECKING:  # it brings transformers' Trainer, which takes a second to import; who only checks does without
    from grasp_lora.training.trainer import FineTuneResult

# Part of what a step is found by: raise one when a change of the code changes the result of such steps.
REVISIONS = {"training": 4, "controller": 4, "losses": 2, "answers": 6, "scores": 3}
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # Paper: grid search
CALIBRATION_EXAMPLES = 16  # of the train set, for scores that need inputs in the final run
JOINT_EVALUATIONS = 4  # of the dev loss in an epoch of source and target data together
# What a config says of names, formats and memory: the same computation without it.
IDLE = (
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "quantization_config",
)


@dataclass(frozen=True)
class Parents:
    """The adapters that are merged, and their merge before anything is pruned.

    `on` is `source` where the target adapter was trained on top of the source adapter: then it does nothing alone.
    """

    sources: tuple[Adapter, ...]
    target: Adapter
    on: str | None
    merged: Adapter

    @property
    def named(self) -> dict[str, Adapter]:
        """Each of them by its name: source (source_2, ...) and target."""
        return {**dict(zip(names_of(len(self.sources)), self.sources, strict=True)), "target": self.target}


class Steps:
    """The steps of experiments with one seed.

    Args:
        session: of the recipe with this seed.
        store: where finished steps are kept.
        shared: of the recipe whose seed the source adapter is trained with; None for this one.
        grid: prune ratios of a grid search.
        stop_requested: asked after each optimizer step; names what wants the training to stop there, or gives None.
    """

    def __init__(
        self,
        session: Session,
        store: Store,
        shared: Session | None = None,
        grid: Sequence[float] = GRID,
        stop_requested: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.session, self.recipe, self.splits = session, session.recipe, session.splits
        self.store = store
        self.grid = tuple(grid)
        self._shared = shared or session
        self._stop_requested = stop_requested
        self._backbone = session.backbone.model
        self._common = computed_with(session.backbone)

    def with_recipe(self, recipe: Recipe) -> "Steps":
        """The same steps by another recipe, on the same rows, in the same store."""
        return Steps(self.session.variant(recipe), self.store, self._shared, self.grid, self._stop_requested)

    # Adapters

    def alone(self) -> Adapter:
        """The backbone without an adapter."""
        return Adapter("backbone", lambda: AdapterWeights({}))

    def sources(self) -> tuple[Adapter, ...]:
        """The source adapters: those that the recipe names, or the one that is trained; all seeds share them."""
        shared = self._shared
        if places := shared.recipe.source.adapters:
            return tuple(given_adapter(shared.given[place]) for place in places)
        training = shared.recipe.source.training
        return (self._train("source", ("source_train",), ("source_dev",), training, session=shared),)

    def source(self) -> Adapter:
        """The source adapter; several given ones are averaged exactly."""
        sources = self.sources()
        names = [f"source_{number}" for number in range(1, len(sources) + 1)]
        return sources[0] if len(sources) == 1 else self.merge("source", sources, names, MergeSettings("exact"))

    def target(self, on: Adapter | None = None) -> Adapter:
        """The target adapter: given, or trained on the backbone alone or on top of another adapter, which stays frozen."""
        stage = self.recipe.target
        if stage.adapter is not None:
            return given_adapter(self.session.given[stage.adapter])
        return self._train("target", ("train",), ("dev",), stage.training, on=on)

    def joint(self) -> Adapter:
        """One fresh adapter on the target rows, as often as their own adapter sees them, and as many source rows, each once."""
        recipe, splits = self.recipe, self.splits
        epochs = max(1, round(recipe.target.training.epochs))
        halves = replace(splits, source_train=splits.source_train[: epochs * len(splits.train)])
        training = replace(
            self._shared.recipe.source.training,
            epochs=1.0,
            evaluate_every=1 / JOINT_EVALUATIONS,
            patience=JOINT_EVALUATIONS + 1,  # so that none ends it, and the best is kept
        )
        names = ("source_train", *["train"] * epochs)
        return self._train("joint", names, ("dev",), training, session=self.session.variant(splits=halves))

    def parents(self, *, in_paper: bool = False) -> Parents:
        """The adapters to merge and their merge, the target adapter where the recipe says; `in_paper` on the backbone alone."""
        on = None if in_paper else self.recipe.target.on
        sources = self.sources()
        target = self.target(None if on is None else self.source())
        return Parents(sources, target, on, self.merge_of(sources, target, on))

    def merge_of(self, sources: Sequence[Adapter], target: Adapter, on: str | None) -> Adapter:
        """The merge of the recipe; a target adapter that was trained on the mean of the sources is added to that."""
        settings = self.recipe.merge
        if on is not None:
            settings = replace(settings, weights=(*[1 / len(sources)] * len(sources), 1.0))
        return self.merge("merged", (*sources, target), (*names_of(len(sources)), "target"), settings)

    def merge(self, name: str, parents: Sequence[Adapter], names: Sequence[str], settings: MergeSettings) -> Adapter:
        """The merge of adapters by a rule. It is quick and exact, so it is made when it is needed and never on record."""
        decided = {key: value for key, value in asdict(settings).items() if key != "dropout"}  # of later trainings
        draws = merge_rule(settings.rule).draws
        seed = self.recipe.seed_of(f"merge {settings.seed}")
        key = key_of(name, plain({
            "merge": decided, "parents": [parent.key for parent in parents], "names": names, "seed": seed if draws else None
        }))  # fmt: skip

        def load() -> AdapterWeights:
            return merge([parent.weights for parent in parents], replace(settings, seed=seed), names)

        trail = each_once([step for parent in parents for step in parent.trail])
        return Adapter(key, load, trail=trail, rows=_seen_by(parents))

    def search_merge_weights(self, parents: Parents) -> Adapter:
        """The merge with the weights that LoRAHub finds on the micro-dev rows."""
        adapters, names = tuple(parents.named.values()), tuple(parents.named)
        inputs = self._inputs(
            parents=[adapter.key for adapter in adapters], data=self._data("micro_dev"), budget=lorahub.BUDGET
        )

        def loss_at(weights: tuple[float, ...]) -> float:
            merged = merge([adapter.weights for adapter in adapters], MergeSettings("lorahub", weights), names)
            losses = self._losses(merged, self.splits.micro_dev)
            return sum(losses) / len(losses)

        def work(folder: Path) -> MergeWeights:
            weights = lorahub.search_weights(loss_at, len(adapters), self.recipe.seed_of("lorahub"))
            measured = lorahub.BUDGET * len(self.splits.micro_dev)
            return MergeWeights(weights=weights, measured_examples=measured)

        searched = self.store.step("merge-weights", inputs, MergeWeights, work)
        return self.merge("lorahub", adapters, names, MergeSettings("lorahub", searched.result.weights)).after(searched)

    # Trainings

    def _train(
        self,
        name: str,
        train: Sequence[str],
        dev: Sequence[str],
        training: TrainingSettings,
        session: Session | None = None,
        on: Adapter | None = None,
    ) -> Adapter:
        """A fresh adapter, trained on the named splits and judged on others; `on` top of another one, if given."""
        session, dev = session or self.session, _looked_at(training, *dev)
        recipe = session.recipe
        train_rows, dev_rows = (
            [row for split in names for row in getattr(session.splits, split)] for names in (train, dev)
        )
        inputs = self._inputs(
            revision=REVISIONS["training"],
            data=hash_of(session.splits, (*train, *dev)),
            splits=[train, dev],
            lora=asdict(recipe.lora),
            training=_decides(training),
            seed=recipe.seed,
            on=on and on.key,
        )

        def work(folder: Path) -> Trained:
            from grasp_lora.training.trainer import finetune

            # Whatever is trained on target rows begins alike: it differs in what its name says alone.
            part = "source" if name == "source" else "target"
            how = self._how(training, recipe.seed_of(f"{part} order"), folder)
            below = nullcontext() if on is None else frozen_adapter(self._backbone, on.weights)
            with below, fresh_adapter(self._backbone, recipe.lora, recipe.seed_of(part)) as model:
                result = finetune(model, train_rows, dev_rows, **how)
                return self._save(folder, adapter_weights(model), rows, result, training, train_rows, dev_rows)

        rows = _seen_by([] if on is None else [on], train_rows)
        made = self.store.step(name, inputs, Trained, work, trains=True)
        return _adapter_of(made, [] if on is None else [on], rows)

    def finetune(self, start: Adapter, prune_ratio: float, shown: str = "") -> Adapter:
        """Prune an adapter at a ratio and fine-tune it on the target rows: the final run, or one run of a grid.

        Args:
            prune_ratio: fraction in [0, 1].
            shown: name of the step for the progress.
        """
        stage = self.recipe.final
        mask, training, dev = stage.mask_of(self.recipe.mask), stage.training, self.splits.dev
        inputs = self._inputs(
            revision=REVISIONS["training"],
            data=self._data("train", *_looked_at(training, "dev")),
            start=start.key,
            prune_ratio=prune_ratio,
            training=_decides(training),
            mode=stage.mode,
            mask=asdict(mask),
            dropout=self.recipe.dropout,
        )

        def work(folder: Path) -> Trained:
            from grasp_lora.training.pruned import PrunedTraining
            from grasp_lora.training.trainer import finetune

            weights = start.weights
            segments, pruning = segments_of(weights), list[PrunedTraining]()
            if prune_ratio > 0.0:
                self._check_trained(weights)
                calibration = ProbeSet(self.splits.train[:CALIBRATION_EXAMPLES])
                pruning = [PrunedTraining(prune_ratio, calibration, mask, stage.mode, segments)]
            how = self._how(training, self.recipe.seed_of("final order"), folder)
            with attached(self._backbone, weights, dropout=self.recipe.dropout) as model:
                result = finetune(model, self.splits.train, dev, callbacks=pruning, **how)
                trained = adapter_weights(model, segments)
                return self._save(folder, trained, rows, result, training, self.splits.train, dev, pruned=True)

        rows = _seen_by([start], self.splits.train)
        made = self.store.step(f"final-{prune_ratio:.2f}", inputs, Trained, work, trains=True, shown=shown)
        return _adapter_of(made, [start], rows)

    def continued(self) -> Adapter:
        """The source adapter, trained on the target rows as the final run is, nothing pruned."""
        return self.finetune(self.source(), 0.0, "continued")

    def learn_ratio(self, merged: Adapter) -> Finished[Learned]:
        """Run the controller on a merged adapter, which stays as it is.

        Raises:
            ProbeError: a loss is not finite.
            GraspError: the run ended before a round followed a step.
        """
        stage = self.recipe.controller
        inputs = self._inputs(
            revision=REVISIONS["controller"],
            data=self._data("train", *stage.splits),
            start=merged.key,
            controller={
                "policy": plain_policy(stage.policy),
                "rounds": asdict(stage.rounds),
                "rule": stage.rule,
                "training": _decides(stage.training),
            },
            mask=asdict(self.recipe.mask),
            dropout=self.recipe.dropout,
        )

        def work(folder: Path) -> Learned:
            from grasp_lora.training.controller import GraspController
            from grasp_lora.training.trainer import finetune

            weights = merged.weights
            self._check_trained(weights)
            recipe, train = self.recipe, self.splits.train
            policy = replace(stage.policy, seed=recipe.seed_of(f"policy {stage.policy.seed}"))
            pool = [row for split in stage.rounds.splits for row in getattr(self.splits, split)]
            controller = GraspController(
                probes_of(pool, stage.rounds.turn(len(pool)), policy.seed),
                replace(stage, policy=policy),
                recipe.mask,
                segments_of(weights),
                folder / WORK,
                self.session.progress.round,
            )
            how = self._how(stage.training, recipe.seed_of("controller order"), folder)
            with attached(self._backbone, weights, dropout=recipe.dropout) as model:
                result = finetune(model, train, self.splits.dev, controller=controller, **how)
            rounds, timings = controller.rows()
            if not any(row["step"] for row in rounds):  # a round before training shows nothing of training
                raise GraspError(
                    f"the controller run stopped by its dev loss at step {result.steps}, before a round followed a step; "
                    "lower controller.rounds.every, or raise controller.training.patience"
                )
            probed = sum(
                len(row["baseline_losses"]) + len(set(row["candidates"])) * len(row["candidate_losses"][0])
                for row in rounds
            )
            return Learned(
                estimate=controller.learned,
                rounds=rounds,
                timings=timings,
                history=[dict(row) for row in result.history],
                steps=result.steps,
                trained_examples=_trained_examples(result, stage.training, train),
                measured_examples=probed + _evaluated_examples(result, self.splits.dev),
            )

        return self.store.step("controller", inputs, Learned, work, trains=True)

    def _how(self, training: TrainingSettings, seed: int, folder: Path) -> dict[str, Any]:
        """What every training is told; several processes share the rows of each optimizer step."""
        return {
            "settings": training.shared_by(world_size()),
            "pad_id": self.session.pad_id,
            "seed": seed,
            "folder": folder / WORK,
            "name": folder.name,
            "report_to": self.recipe.report_to,
            "on_step": self.session.progress.step,
            "stop_requested": self._stop_requested,
        }

    def _save(
        self,
        folder: Path,
        weights: AdapterWeights,
        rows: frozenset[str],
        result: "FineTuneResult",
        training: TrainingSettings,
        train: Sequence[Example],
        dev: Sequence[Example],
        *,
        pruned: bool = False,
    ) -> Trained:
        """Write the adapter of a training into the folder of its step; return what the training did."""
        on_first_process(lambda: self.session.save(folder / ADAPTER, weights, rows))
        return Trained(
            steps=result.steps,
            best_step=result.best_step,
            dev_loss=result.dev_loss,
            history=[dict(row) for row in result.history],
            kept=[dict(row) for row in survival(weights)] if pruned else [],
            trained_examples=_trained_examples(result, training, train),
            measured_examples=_evaluated_examples(result, dev),
        )

    def _check_trained(self, weights: AdapterWeights) -> None:
        """Refuse to prune what no training has changed: nothing says which of its weights matter."""
        if any(pair.acts for pair in weights.values()):
            return
        source, target = (stage.training.learning_rate for stage in (self.recipe.source, self.recipe.target))
        raise GraspError(
            "the adapters to start from change nothing, as before training: no step lowered a dev loss (or a given one was never "
            f"trained); lower source.training.learning_rate (now {source:g}) and target.training.learning_rate (now {target:g})"
        )

    # Measurements: no seed has a part in them.

    def measure(self, adapter: Adapter, *, on_dev: bool = True) -> Measured:
        """All that one system is worth: losses on dev and test, answers to the test prompts and their scores."""
        dev = self.losses(adapter, "dev") if self.splits.dev and on_dev else None
        if not self.splits.test:
            return Measured(dev, None, None)
        tested = self.tested(adapter)
        return Measured(dev, tested, self.scores(tested))

    def judged(self, adapter: Adapter) -> tuple[Adapter, float]:
        """The mean loss on dev, as the training saw it that made the adapter, else measured now, which is on its trail then."""
        seen = None if adapter.made is None else adapter.made.result.dev_loss
        if seen is not None:
            return adapter, seen
        losses = self.losses(adapter, "dev")
        return adapter.after(losses), losses.result.mean

    def losses(self, adapter: Adapter, split: str) -> Finished[Losses]:
        """The loss of each example of a split: `dev`, `micro_dev` or `test`."""
        rows = getattr(self.splits, split)
        inputs = self._measured(adapter, revision=REVISIONS["losses"], data=self._data(split), split=split)
        return self.store.step(f"{split}-losses", inputs, Losses, lambda folder: Losses(
            losses=self._losses(adapter.weights, rows), measured_examples=len(rows)
        ))  # fmt: skip

    def tested(self, adapter: Adapter) -> Finished[Tested]:
        """The greedy answer to each test prompt, in a classification the likeliest label; and the losses of the right ones."""
        rows, generation, labels = self.splits.test, self.recipe.generation, self.splits.labels
        written = {
            "max_new_tokens": generation.max_new_tokens,
            "stop": generation.stop,
            "ends": sorted({*self._ends(rows), *self.session.backbone.stop_ids}),
        }
        asked = {"labels": labels} if labels else written
        inputs = self._measured(adapter, revision=REVISIONS["answers"], data=self._data("test"), **asked)

        def work(folder: Path) -> Tested:
            found = self._answers(adapter.weights, rows)
            texts, losses = [text for text, _ in found], [loss for _, loss in found]
            return Tested(answers=texts, losses=losses, measured_examples=len(rows))

        return self.store.step("answers", inputs, Tested, work)

    def scores(self, answers: Finished[Tested]) -> Finished[Scores]:
        """What answers to the test prompts are worth by each metric."""
        bertscore, references = self.recipe.bertscore, [row.references for row in self.splits.test]
        models = {code: _by_name(place) for code, place in bertscore.models.items()}
        inputs = plain({
            "answers": answers.key,
            "metrics": list(self.session.metrics),
            "revision": REVISIONS["scores"],
            "bertscore": asdict(bertscore) | {"models": models},
            "language": self.session.language,
            "references": hashlib.sha256(repr(references).encode()).hexdigest(),
        })  # fmt: skip

        def work(folder: Path) -> Scores:
            return Scores(metrics=dict(self.session.score(answers.result.answers)))

        return self.store.step("scores", inputs, Scores, work)

    def _ends(self, rows: Sequence[Example]) -> set[int]:
        return {row.completion_ids[-1] for row in rows}

    def _answers(self, weights: AdapterWeights, rows: Sequence[Example]) -> list[tuple[str, float]]:
        """The answer to each row, with the loss of the right one."""
        ends, tell = self._ends(rows), self.session.progress.answered
        tokenizer, generation, labels = self.session.backbone.tokenizer, self.recipe.generation, self.splits.labels
        with self._on_backbone(weights) as model:

            def of(part: Sequence[Example]) -> list[tuple[str, float]]:
                prompts, right = [row.prompt_ids for row in part], [row.completion_ids for row in part]
                return answer(model, tokenizer, prompts, generation, tell, ends, labels, right)

            return distribute(rows, of)

    def _on_backbone(self, weights: AdapterWeights) -> AbstractContextManager[Any]:
        """The backbone with an adapter, or alone."""
        return attached(self._backbone, weights.together()) if weights else nullcontext(self._backbone)

    def _losses(self, weights: AdapterWeights, rows: Sequence[Example]) -> list[float]:
        with self._on_backbone(weights) as model:
            return ProbeSet(rows).losses(model) if rows else []

    # What decides a step

    def _inputs(self, **inputs: Any) -> dict[str, Any]:
        """What decides a step that draws random numbers."""
        return plain({**self._common, "seed": self.recipe.seed, **inputs})

    def _measured(self, adapter: Adapter, **inputs: Any) -> dict[str, Any]:
        """What decides a measurement."""
        return plain({**self._common, "adapter": adapter.key, **inputs})

    def _data(self, *splits: str) -> str:
        return hash_of(self.splits, splits)


def _adapter_of(made: Finished[Trained], starts: Sequence[Adapter], rows: frozenset[str]) -> Adapter:
    """The adapter of a finished training, with the steps that led to what it started from."""
    trail = each_once([*(step for start in starts for step in start.trail), made])
    return Adapter(made.key, lambda: read_adapter(made.folder / ADAPTER).weights, made, trail, rows=rows)


def _seen_by(starts: Sequence[Adapter], rows: Sequence[Example] = ()) -> frozenset[str]:
    """The marks of rows, and of what the adapters were trained on."""
    return frozenset(mark for row in rows for mark in row.marks).union(*(start.rows for start in starts))


def names_of(sources: int) -> tuple[str, ...]:
    """Return what so many source adapters are called: source, source_2 and so on."""
    return ("source", *(f"source_{number}" for number in range(2, sources + 1)))


def given_adapter(adapter: LoadedAdapter) -> Adapter:
    """Return an adapter that no step made: one that the user gave."""
    key = key_of("given", {"sha256": adapter.sha256, "facts": adapter.facts})
    return Adapter(key, lambda: adapter.weights, title=adapter.name, rows=frozenset(adapter.info.rows))


def plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same as JSON gives it back: lists for tuples, so that a key does not depend on who computed it."""
    return dict(json.loads(json.dumps(inputs)))


def _decides(training: TrainingSettings) -> dict[str, Any]:
    """What decides a training: all but what trades time for memory, so that who ran out of memory may set it and go on."""
    return {name: value for name, value in asdict(training).items() if name != "gradient_checkpointing"}


def _by_name(place: str) -> str:
    """A model of this machine by its name, and by a hash of its place, which tells two of one name apart."""
    name = without_place(place)
    return name if name == place else f"{name} {hashlib.sha256(place.encode()).hexdigest()[:16]}"


def computed_with(backbone: Backbone) -> dict[str, str | None]:
    """What decides all that a backbone computes: its weights and config, number format and bits.

    Weights in a folder may be replaced, and a fingerprint sees 16 of each parameter; so those have their sum taken, too.
    """
    config = backbone.model.config.get_text_config(decoder=True).to_diff_dict()
    text = json.dumps({key: value for key, value in config.items() if key not in IDLE}, sort_keys=True, default=str)
    return {
        "backbone": backbone.fingerprint,
        "config": hashlib.sha256(text.encode()).hexdigest()[:16],
        "sum": None if backbone.weight_sum is None else str(backbone.weight_sum),
        "dtype": str(backbone.model.dtype),
        "quantise": backbone.quantise,
    }


def _looked_at(training: TrainingSettings, *splits: str) -> tuple[str, ...]:
    """Those of its dev splits that a training looks at, and that so decide what it makes."""
    return () if training.patience is None else splits


def _trained_examples(result: "FineTuneResult", training: TrainingSettings, train: Sequence[Example]) -> int:
    return round(result.steps / training.steps_per_epoch(len(train)) * len(train))


def _evaluated_examples(result: "FineTuneResult", dev: Sequence[Example]) -> int:
    return sum("dev_loss" in row for row in result.history) * len(dev)
