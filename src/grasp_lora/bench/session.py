"""The steps of an experiment on one loaded backbone: train an adapter, merge, learn the ratio, fine-tune, evaluate.

A `Session` holds what the steps share. It writes only into folders that it is given, and knows nothing of run folders or reports.
Every method of the paper and every baseline is a few calls on it.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_lora.bench.progress import Progress
from grasp_lora.data.build import build_splits
from grasp_lora.data.encode import Example
from grasp_lora.data.splits import Fold, Splits
from grasp_lora.data.tasks import task_fields
from grasp_lora.errors import GraspError
from grasp_lora.evaluation.metrics import Metric, resolve_metrics, score
from grasp_lora.evaluation.outputs import MetricScore
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.masks import survival
from grasp_lora.method.merging import MergeSettings, merge
from grasp_lora.method.rounds import RatioEstimate
from grasp_lora.models.adapters import attached, check_fits, fresh_adapter, save_adapter
from grasp_lora.models.answers import generate, likeliest_labels
from grasp_lora.models.backbone import Backbone, load_backbone
from grasp_lora.models.live import adapter_weights, frozen_adapter, segments_of
from grasp_lora.models.reading import Answers, LoadedAdapter, read_adapter
from grasp_lora.models.settings import EMBEDDED_NAME, BackboneSettings
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.storage.processes import distribute, world_size
from grasp_lora.storage.reading import is_folder
from grasp_lora.text.names import without_place
from grasp_lora.training.probes import ProbeSet, probes_of
from grasp_lora.training.settings import TrainingSettings

if TYPE_CHECKING:  # these bring transformers' Trainer, which takes a second to import; who only checks does without
    from grasp_lora.storage.checkpoints import Checkpointing
    from grasp_lora.training.controller import GraspController
    from grasp_lora.training.finetune import FineTuneResult, LossRow

logger = logging.getLogger(__name__)

CALIBRATION_EXAMPLES = 16  # of the train set, for scores that need inputs in the final run


@dataclass(frozen=True)
class ControllerRun:
    """What a controller run came to.

    Args:
        estimate: the learned ratio.
        adapter: as it was after the run.
        steps: optimizer steps taken.
        rounds, timings, history: as the files of their names hold them.
    """

    estimate: RatioEstimate
    adapter: AdapterWeights
    steps: int
    rounds: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    history: "list[LossRow]"


class Session:
    """One recipe's backbone, data and steps.

    Args:
        recipe: what to do.
        base: folder that relative paths of the recipe start from.
        progress: told how far the work is.
        fold: of a cross-validation, on which the target is tested; None for the recipe's splits.

    Raises:
        GraspError: (from the properties) the backbone, the data or an adapter cannot be used.
    """

    def __init__(self, recipe: Recipe, base: Path, progress: Progress | None = None, fold: Fold | None = None) -> None:
        self.recipe = recipe
        self.fold = fold
        self.base = base
        self.progress = progress or Progress()
        self.checkpoints: Checkpointing | None = None  # of every fine-tune; an experiment sets it

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen model, loaded once; a relative folder starts from that of the recipe, or else from the working one."""
        loaded = load_backbone(self.backbone_settings)
        if self.backbone_settings != self.recipe.backbone:
            loaded.name = without_place(self.recipe.backbone.name)
        return loaded

    @property
    def backbone_settings(self) -> BackboneSettings:
        """Those of the recipe, a folder beside it as a path from here."""
        settings = self.recipe.backbone
        beside_recipe = self.base / settings.name
        if settings.name == EMBEDDED_NAME or not is_folder(beside_recipe):
            return settings
        return replace(settings, name=str(beside_recipe))

    @cached_property
    def splits(self) -> Splits:
        """The tokenised data."""
        recipe, tokenizer, offline = self.recipe, self.backbone.tokenizer, self.recipe.backbone.offline
        return build_splits(recipe.data, tokenizer, recipe.seed, self.base, offline=offline, fold=self.fold)

    @cached_property
    def existing_adapters(self) -> dict[str, LoadedAdapter]:
        """The adapters that the recipe names, read and checked against the backbone; by what the recipe calls them."""
        places = [*self.recipe.source.adapters, *([self.recipe.target.adapter] if self.recipe.target.adapter else [])]
        return {place: self.read(place) for place in places}

    @property
    def ranks(self) -> set[int]:
        """The ranks of the adapters to merge, those that are given and those that are trained here."""
        recipe = self.recipe
        trained = set() if recipe.source.adapters and recipe.target.adapter else {recipe.lora.rank}
        return trained | {pair.rank for one in self.existing_adapters.values() for pair in one.weights.values()}

    @property
    def parent_ranks(self) -> list[int]:
        """The highest rank of each adapter that is merged, the sources first."""
        recipe = self.recipe
        given = {place: adapter.highest_rank for place, adapter in self.existing_adapters.items()}
        places = (*(recipe.source.adapters or [""]), recipe.target.adapter or "")
        return [given.get(place, recipe.lora.rank) for place in places]

    def variant(self, recipe: Recipe) -> "Session":
        """Return a session of another recipe on this one's backbone and data, which must be the same in both."""
        other = Session(recipe, self.base, self.progress)
        other.backbone, other.splits = self.backbone, self.splits
        other.checkpoints = self.checkpoints
        return other

    @property
    def pad_id(self) -> int:
        """Token id for padding."""
        return int(self.backbone.tokenizer.pad_token_id)

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The metrics of the recipe, or else those of its task, by name."""
        recipe = self.recipe
        names = recipe.metrics or task_fields(recipe.data.task).metrics
        return resolve_metrics(names, recipe.bertscore, base=self.base, offline=recipe.backbone.offline)

    @property
    def language(self) -> str:
        """Language of the target."""
        return self.recipe.data.target.language

    @property
    def probe_pool(self) -> list[Example]:
        """The examples that the controller may probe."""
        splits = self.recipe.controller.rounds.splits
        return [example for split in splits for example in getattr(self.splits, split)]

    def read(self, place: str | Path) -> LoadedAdapter:
        """Read an adapter (a folder, relative to the recipe's, or a hub id) and check that it fits the backbone."""
        beside_recipe = self.base / place
        found = beside_recipe if is_folder(beside_recipe) else place
        adapter = read_adapter(found, offline=self.recipe.backbone.offline)
        backbone = self.backbone
        check_fits(adapter, backbone.model, **backbone.told)
        return adapter

    def train_adapter(
        self,
        part: str,
        train: Sequence[Example],
        dev: Sequence[Example],
        training: TrainingSettings,
        folder: Path,
        on: AdapterWeights | None = None,
    ) -> tuple[AdapterWeights, "FineTuneResult"]:
        """Train a fresh LoRA adapter, `on` another one that stays frozen, if given; `part` names it and chooses its seed."""
        seed, backbone = self.recipe.seed_of(part), self.backbone.model
        lower = nullcontext() if on is None else frozen_adapter(backbone, on)
        with lower, fresh_adapter(backbone, self.recipe.lora, seed) as model:
            result = self.finetune(model, train, dev, training, part, folder)
            return adapter_weights(model), result

    def finetune(
        self,
        model: Any,
        train: Sequence[Example],
        dev: Sequence[Example],
        training: TrainingSettings,
        part: str,
        folder: Path,
        callbacks: Sequence[Any] = (),
        controller: "GraspController | None" = None,
    ) -> "FineTuneResult":
        """Train the adapter of a model in place; `part` chooses the order of the examples. See `training.finetune.finetune`.

        Several processes share the examples of each optimizer step, so that there are as many steps and rounds as with one.
        """
        from grasp_lora.training.finetune import finetune

        return finetune(
            model,
            train,
            dev,
            training.shared_by(world_size()),
            pad_id=self.pad_id,
            seed=self.recipe.seed_of(f"{part} order"),
            folder=folder,
            callbacks=callbacks,
            controller=controller,
            report_to=self.recipe.report_to,
            on_step=self.progress.step,
            checkpoints=self.checkpoints,
        )

    def merge(
        self, adapters: Sequence[AdapterWeights], names: Sequence[str], settings: MergeSettings
    ) -> AdapterWeights:
        """Merge adapters by the rule of the settings."""
        settings = replace(settings, seed=self.recipe.seed_of(f"merge {settings.seed}"))
        return merge(adapters, settings, names)

    def learn_ratio(self, merged: AdapterWeights, folder: Path) -> ControllerRun:
        """Run the controller on a merged adapter.

        Args:
            merged: the adapter to start from.
            folder: for the records of the rounds.

        Raises:
            ProbeError: a loss is not finite.
        """
        from grasp_lora.training.controller import GraspController

        stage = self.recipe.controller
        policy = replace(stage.policy, seed=self.recipe.seed_of(f"policy {stage.policy.seed}"))
        turn = stage.rounds.turn(len(self.probe_pool))
        controller = GraspController(
            probes_of(self.probe_pool, self.pad_id, turn, policy.seed),
            replace(stage, policy=policy),
            self.recipe.mask,
            segments_of(merged),
            folder,
            self.progress.round,
        )
        dev = () if stage.training.patience is None else self.splits.dev
        with attached(self.backbone.model, merged, dropout=self.recipe.dropout) as model:
            result = self.finetune(
                model, self.splits.train, dev, stage.training, "controller", folder, controller=controller
            )
            rounds, timings = controller.rows()
            # A round before training shows nothing of training. It is enough only where none but it was planned.
            if not any(row["step"] for row in rounds) and stage.round_steps(len(self.splits.train)) != [0]:
                raise GraspError(
                    f"the controller run stopped by its dev loss at step {result.steps}, before a round followed a step; "
                    "lower controller.rounds.every, or raise controller.training.patience"
                )
            trained = adapter_weights(model, segments_of(merged))
        return ControllerRun(controller.learned, trained, result.steps, rounds, timings, result.history)

    def finetune_pruned(
        self,
        start: AdapterWeights,
        prune_ratio: float,
        folder: Path,
    ) -> tuple[AdapterWeights, "FineTuneResult", list[dict[str, Any]]]:
        """Prune an adapter at a fixed ratio and fine-tune it: the final run, or one run of a grid.

        Args:
            start: the adapter to start from.
            prune_ratio: fraction in [0, 1].
            folder: for the history.

        Returns:
            The adapter at its best dev loss, how training went, and its kept weights per module, factor and origin.
        """
        from grasp_lora.training.pruned import PrunedTraining

        stage = self.recipe.final
        segments = segments_of(start)
        calibration = ProbeSet(self.splits.train[:CALIBRATION_EXAMPLES], self.pad_id)
        pruning = PrunedTraining(prune_ratio, calibration, stage.mask or self.recipe.mask, stage.mode, segments)
        with attached(self.backbone.model, start, dropout=self.recipe.dropout) as model:
            result = self.finetune(
                model,
                self.splits.train,
                self.splits.dev,
                stage.training,
                "final",
                folder,
                callbacks=[pruning],
            )
            weights = adapter_weights(model, segments)
        return weights, result, survival(weights)

    def losses(self, weights: AdapterWeights | None, split: str) -> list[float]:
        """Measure the loss of every example of a split (`dev`, `micro_dev` or `test`)."""
        with self._with(weights) as model:
            return self._losses(model, getattr(self.splits, split))

    def examine(self, weights: AdapterWeights | None) -> tuple[list[float], tuple[str, ...]]:
        """Measure the losses of the test examples and answer their prompts, in a classification by the likeliest label.

        Both are in the order of the split.
        """
        test, tokenizer, settings = self.splits.test, self.backbone.tokenizer, self.recipe.generation
        prompts, ends = [one.prompt_ids for one in test], {one.completion_ids[-1] for one in test}
        told = self.progress.answered
        with self._with(weights) as model:
            if self.splits.labels:
                answers = self._likeliest(model, test, told)
            else:
                answers = distribute(prompts, lambda own: generate(model, tokenizer, own, settings, told, ends))
            return self._losses(model, test), tuple(answers)

    def errors(self, weights: AdapterWeights | None, split: str) -> list[float]:
        """Of each example of a split of a classification 1 where another label is likelier, else 0."""
        examples, labels = getattr(self.splits, split), self.splits.labels
        with self._with(weights) as model:
            answers = self._likeliest(model, examples)
        return [float(one.completion_ids != labels[own]) for one, own in zip(examples, answers, strict=True)]

    def score(self, answers: Sequence[str]) -> dict[str, MetricScore]:
        """Score answers to the test prompts, in the order of the split."""
        references = [example.references for example in self.splits.test]
        return score(self.metrics, answers, references, self.language, tuple(self.splits.labels))

    @property
    def answers(self) -> Answers:
        """How the recipe asks and lets answer, for `predict`."""
        report, data, generation = self.splits.report, self.recipe.data, self.recipe.generation
        return Answers(
            generation.max_new_tokens, generation.stop, report.chat_template, report.task, report.prompt, data.target.columns,
            data.max_document_tokens, tuple(self.splits.labels), report.completion, generation.allow_empty,
        )  # fmt: skip

    def save(self, folder: Path, weights: AdapterWeights) -> None:
        """Write an adapter as an ordinary PEFT folder."""
        save_adapter(
            folder,
            weights,
            self.backbone.model,
            backbone_name=self.backbone.base_model,
            fingerprint=self.backbone.fingerprint,
            dropout=self.recipe.lora.dropout,
            answers=self.answers,
            quantise=self.backbone.quantise,
            dtype=str(self.backbone.model.dtype).removeprefix("torch."),
            embedded=self.backbone.is_embedded,
            revision=self.backbone.revision,
        )

    def _with(self, weights: AdapterWeights | None) -> AbstractContextManager[Any]:
        """The backbone with an adapter, or alone."""
        model = self.backbone.model
        return nullcontext(model) if weights is None else attached(model, weights.together())

    def _likeliest(
        self, model: Any, examples: Sequence[Example], told: Callable[[int, int], None] | None = None
    ) -> Sequence[str]:
        prompts, labels = [one.prompt_ids for one in examples], self.splits.labels
        return distribute(prompts, lambda own: likeliest_labels(model, own, labels, told))

    def _losses(self, model: Any, examples: Sequence[Example]) -> list[float]:
        return ProbeSet(examples, self.pad_id).losses(model) if examples else []
