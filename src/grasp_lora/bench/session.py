"""The steps of an experiment on one loaded backbone: train an adapter, merge, learn the ratio, fine-tune, evaluate.

A `Session` holds what the steps share. It writes only into folders that it is given, and knows nothing of run folders, markers or
reports. Every method of the paper and every baseline is a few calls on it.
"""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from grasp_lora.bench.progress import Progress
from grasp_lora.data.build import SPLITS, Example, Splits, build_splits
from grasp_lora.data.places import resolve_file
from grasp_lora.errors import AdapterError, DataError, RecipeError
from grasp_lora.evaluation.bertscore import check_bertscore
from grasp_lora.evaluation.metrics import Metric, MetricScore, metrics_for, resolve_metrics, score
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.masks import MaskSettings, survival
from grasp_lora.method.merging import MergeSettings, merge, merge_rule
from grasp_lora.method.rounds import RatioEstimate
from grasp_lora.models.adapters import (
    LoadedAdapter,
    adapter_weights,
    attached,
    check_fits,
    check_target_modules,
    fresh_adapter,
    read_adapter,
    save_adapter,
    segments_of,
)
from grasp_lora.models.backbone import EMBEDDED_NAME, Backbone, load_backbone
from grasp_lora.models.generation import context_of, generate
from grasp_lora.recipes.recipe import ControllerStage, Recipe
from grasp_lora.storage.processes import shared, world_size
from grasp_lora.training.probes import ProbeSet, probes_of
from grasp_lora.training.settings import TrainingSettings

if TYPE_CHECKING:  # these bring transformers' Trainer, which takes a second to import; who only checks does without
    from grasp_lora.storage.checkpoints import Checkpointing
    from grasp_lora.training.controller import GraspController
    from grasp_lora.training.finetune import FineTuneResult

log = logging.getLogger(__name__)

CALIBRATION_EXAMPLES = 16  # of the train set, for scores that need inputs in the final run


@dataclass(frozen=True)
class LearnedRatio:
    """What a controller run came to.

    Args:
        estimate: the learned ratio.
        adapter: as it was after the run, or at its best round.
        last_committed: the ratio in force at the end.
        steps: optimizer steps taken.
        rounds, timings, history: as the files of their names hold them.
    """

    estimate: RatioEstimate
    adapter: AdapterWeights
    last_committed: float
    steps: int
    rounds: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """What one system is worth on the test split.

    Args:
        dev_loss, test_loss: mean answer NLL, None without such a split.
        scores: by metric name.
        predictions: one a test example.
        test_losses: one a test example.
    """

    dev_loss: float | None
    test_loss: float | None
    scores: dict[str, MetricScore] = field(default_factory=dict)
    predictions: tuple[str, ...] = ()
    test_losses: tuple[float, ...] = ()

    def rows(self, test: Sequence[Example]) -> list[dict[str, Any]]:
        """One row a test example: its answer, its loss and, of each score that is a mean over examples, its share."""
        means = {
            name: one.per_example for name, one in self.scores.items() if one.value is not None and not one.statistics
        }
        return [
            {
                "id": example.id,
                "prediction": self.predictions[number],
                "references": list(example.references),
                "loss": self.test_losses[number],
                "scores": {name: values[number] for name, values in means.items()},
            }
            for number, example in enumerate(test)
        ]


class Session:
    """One recipe's backbone, data and steps.

    Args:
        recipe: what to do.
        base: folder that relative paths of the recipe start from.
        progress: told how far the work is.

    Raises:
        GraspError: (from the properties) the backbone, the data or an adapter cannot be used.
    """

    def __init__(self, recipe: Recipe, base: Path, progress: Progress | None = None) -> None:
        self.recipe = recipe
        self.base = base
        self.progress = progress or Progress()
        self.checkpoints: Checkpointing | None = None  # of every fine-tune; an experiment sets it

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen model, loaded once; a relative folder starts from that of the recipe, or else from the working one."""
        settings = self.recipe.backbone
        beside_recipe = self.base / settings.name
        if settings.name == EMBEDDED_NAME or not beside_recipe.is_dir():
            return load_backbone(settings)
        loaded = load_backbone(replace(settings, name=str(beside_recipe)))
        loaded.name = settings.name
        return loaded

    @cached_property
    def splits(self) -> Splits:
        """The tokenised data."""
        recipe = self.recipe
        return build_splits(
            recipe.data, self.backbone.tokenizer, recipe.seed, self.base, offline=recipe.backbone.offline
        )

    @cached_property
    def existing_adapters(self) -> dict[str, LoadedAdapter]:
        """The adapters that the recipe names, read and checked against the backbone; by what the recipe calls them."""
        places = [*self.recipe.source.adapters, *([self.recipe.target.adapter] if self.recipe.target.adapter else [])]
        return {place: self.read(place) for place in places}

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
        names = recipe.metrics or metrics_for(recipe.data.task)
        return resolve_metrics(names, recipe.bertscore, base=self.base, offline=recipe.backbone.offline)

    @property
    def language(self) -> str:
        """Language of the target."""
        return self.recipe.data.target.language

    def prepare(self, *, parents: bool = True) -> None:
        """Load and check everything a run needs, before anything is written; what is quick to check comes first.

        Args:
            parents: whether a source and a target adapter are needed, too.

        Raises:
            GraspError: something does not fit; one line.
        """
        recipe = self.recipe
        if "bertscore" in self.metrics:
            check_bertscore(recipe.bertscore, self.language, base=self.base, offline=recipe.backbone.offline)
        _check_trackers(recipe.report_to)
        if parents:
            self._check_parents()
            self._check_processes()
        self._check_files()
        if parents:
            self._check_adapters()
        if not self.splits.train:
            raise DataError("the target has no training examples; give data.target.train at least 1")
        self._check_context()
        if parents and recipe.final.prune_ratio is None:
            self._check_rounds()

    def _check_parents(self) -> None:
        recipe = self.recipe
        if recipe.data.source is None and not recipe.source.adapters:
            raise RecipeError("there is no source: give data.source to train an adapter, or source.adapters to use one")
        weights, parents = recipe.merge.weights, max(1, len(recipe.source.adapters)) + 1
        if weights is not None and len(weights) != parents:
            raise RecipeError(
                f"merge.weights has {len(weights)} numbers for {parents} adapters; "
                "give one for each source adapter and one for the target, or leave it out"
            )

    def _check_files(self) -> None:
        """Look for the data files before the backbone is loaded, which takes long."""
        data = self.recipe.data
        for corpus in filter(None, (data.source, data.target)):
            for files in (
                corpus.files, corpus.train_files, corpus.dev_files, corpus.micro_dev_files, corpus.test_files
            ):  # fmt: skip
                for name in files:
                    resolve_file(name, data.root, self.base)

    def _check_context(self) -> None:
        """Check that the model can read every example, and that an answer fits after every test prompt."""
        context = context_of(self.backbone.model)
        if context is None:
            return
        new = self.recipe.generation.max_new_tokens
        for name in SPLITS:
            for example in getattr(self.splits, name):
                prompt, answer = len(example.prompt_ids), len(example.completion_ids)
                if prompt + answer > context:
                    raise DataError(
                        f"the {name} example {example.id} has {prompt + answer} tokens, but the model's context holds {context}; "
                        f"lower data.max_tokens (now {self.recipe.data.max_tokens}) to {context} or less"
                    )
                if name == "test" and prompt + new > context:
                    raise DataError(
                        f"the test example {example.id} has a prompt of {prompt} tokens, and up to {new} are generated, but the "
                        f"model's context holds {context}; lower generation.max_new_tokens, or data.max_tokens (now "
                        f"{self.recipe.data.max_tokens}) to {max(context - new, 8)}"
                    )

    def _check_adapters(self) -> None:
        """Check the modules to train, and that the merge rule can take the adapters: it would stop a run half way."""
        recipe = self.recipe
        trains = not (recipe.source.adapters and recipe.target.adapter)
        if trains:
            check_target_modules(self.backbone.model, recipe.lora.target_modules)
        ranks = {pair.rank for adapter in self.existing_adapters.values() for pair in adapter.weights.values()}
        ranks |= {recipe.lora.rank} if trains else set()
        if merge_rule(recipe.merge.rule).equal_ranks and len(ranks) > 1:
            raise AdapterError(
                f"merge rule {recipe.merge.rule!r} needs equal ranks, but the adapters have {sorted(ranks)}; "
                "use 'exact' or 'svd'" + (", or set lora.rank to the rank of the others" if trains else "")
            )

    def _check_processes(self) -> None:
        recipe = self.recipe
        trained = {
            "source": not recipe.source.adapters,
            "target": not recipe.target.adapter,
            "controller": recipe.final.prune_ratio is None,
            "final": True,
        }
        for stage in (stage for stage, trains in trained.items() if trains):
            try:
                getattr(recipe, stage).training.shared_by(world_size())
            except ValueError as error:
                raise RecipeError(f"{stage}.training: {error}, or start fewer processes") from error

    def _check_rounds(self) -> None:
        stage = self.recipe.controller
        for split in stage.rounds.splits:
            if not getattr(self.splits, split):
                raise RecipeError(
                    f"controller.rounds.pool is {stage.rounds.pool!r}, but data.target.{split} is 0; "
                    "give it examples, or probe elsewhere"
                )
        if problem := lack_of_rounds(stage, len(self.splits.train)):
            raise RecipeError(problem)

    @property
    def probe_pool(self) -> list[Example]:
        """The examples that the controller may probe."""
        splits = self.recipe.controller.rounds.splits
        return [example for split in splits for example in getattr(self.splits, split)]

    def read(self, place: str | Path) -> LoadedAdapter:
        """Read an adapter (a folder, relative to the recipe's, or a hub id) and check that it fits the backbone."""
        beside_recipe = self.base / place
        found = beside_recipe if beside_recipe.is_dir() else place
        adapter = read_adapter(found, offline=self.recipe.backbone.offline)
        check_fits(
            adapter,
            self.backbone.model,
            backbone_name=self.backbone.name,
            fingerprint=self.backbone.fingerprint,
        )
        return adapter

    def train_adapter(
        self,
        part: str,
        train: Sequence[Example],
        dev: Sequence[Example],
        training: TrainingSettings,
        folder: Path,
    ) -> tuple[AdapterWeights, "FineTuneResult"]:
        """Train a fresh LoRA adapter; `part` names it and chooses its seed."""
        seed = self.recipe.seed_of(part)
        with fresh_adapter(self.backbone.model, self.recipe.lora, seed) as model:
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

    def learn_ratio(
        self,
        merged: AdapterWeights,
        folder: Path,
        *,
        keep_best: bool = False,
    ) -> LearnedRatio:
        """Run the controller on a merged adapter.

        Args:
            merged: the adapter to start from.
            folder: for the records of the rounds.
            keep_best: give the adapter of the round with the lowest baseline loss, pruned at the learned ratio, for
                `finetune_pruned` to finish.

        Raises:
            RecipeError: the run is too short for a single round.
            ProbeError: a loss is not finite.
        """
        from grasp_lora.training.controller import GraspController

        self._check_rounds()
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
            keep_best=keep_best,
        )
        with attached(self.backbone.model, merged, dropout=self.recipe.lora.dropout) as model:
            result = self.finetune(
                model, self.splits.train, (), stage.training, "controller", folder, controller=controller
            )
            estimate = controller.learned
            kept = controller.best_adapter(estimate.ratio) if keep_best else adapter_weights(model, segments_of(merged))
        rounds, timings = controller.rows()
        return LearnedRatio(
            estimate, kept, controller.search.current_ratio, result.steps, rounds, timings, result.history
        )

    def finetune_pruned(
        self,
        start: AdapterWeights,
        prune_ratio: float,
        folder: Path,
        dev: Sequence[Example] | None = None,
        *,
        pruned: bool = False,
    ) -> tuple[AdapterWeights, "FineTuneResult", list[dict[str, Any]]]:
        """Prune an adapter at a fixed ratio and fine-tune it: the final run, or one run of a grid.

        Args:
            start: the adapter to start from.
            prune_ratio: fraction in [0, 1].
            folder: for the history.
            dev: the examples for early stopping, empty for none; None takes the dev split.
            pruned: whether it is pruned at this ratio already, by the controller's mask, which is then held as it is.

        Returns:
            The adapter at its best dev loss, how training went, and its kept weights per module, factor and origin.
        """
        from grasp_lora.training.pruned import PrunedTraining

        stage = self.recipe.final
        mask: MaskSettings = stage.mask or self.recipe.mask
        mode = stage.mode
        if pruned:
            # In the same groups, as many weights as are zero are pruned, and by magnitude zeros come first: the mask is found
            # again whatever score made it. Other scores would choose anew: gradient_of_delta, say, ranks many a zero high.
            mask, mode = replace(self.recipe.mask, score="magnitude"), "hold"
        segments = segments_of(start)
        calibration = ProbeSet(self.splits.train[:CALIBRATION_EXAMPLES], self.pad_id)
        pruning = PrunedTraining(prune_ratio, calibration, mask, mode, segments)
        with attached(self.backbone.model, start, dropout=self.recipe.lora.dropout) as model:
            result = self.finetune(
                model,
                self.splits.train,
                self.splits.dev if dev is None else dev,
                stage.training,
                "final",
                folder,
                callbacks=[pruning],
            )
            weights = adapter_weights(model, segments)
        return weights, result, survival(weights)

    def evaluate(self, weights: AdapterWeights | None) -> Evaluation:
        """Measure an adapter (None: the backbone alone) on the dev and test splits: losses, answers and their scores."""
        with self._with(weights) as model:
            dev_losses = self._losses(model, self.splits.dev)
            dev_loss = fmean(dev_losses) if dev_losses else None
            if not self.splits.test:
                return Evaluation(dev_loss, None)
            test_losses = self._losses(model, self.splits.test)
            answers = self._answer(model)
        return Evaluation(dev_loss, fmean(test_losses), self.score(answers), answers, tuple(test_losses))

    def losses(self, weights: AdapterWeights | None, *splits: str) -> dict[str, list[float]]:
        """Measure every example's loss on the named splits (`dev`, `micro_dev`, `test`); an empty split has no losses."""
        with self._with(weights) as model:
            return {name: self._losses(model, getattr(self.splits, name)) for name in splits}

    def answer(self, weights: AdapterWeights | None) -> tuple[str, ...]:
        """Answer the test prompts; return the answers in the order of the split."""
        with self._with(weights) as model:
            return self._answer(model)

    def score(self, answers: Sequence[str]) -> dict[str, MetricScore]:
        """Score answers to the test prompts, in the order of the split."""
        return score(self.metrics, answers, [example.references for example in self.splits.test], self.language)

    def save(self, folder: Path, weights: AdapterWeights) -> None:
        """Write an adapter as an ordinary PEFT folder."""
        save_adapter(
            folder,
            weights,
            self.backbone.model,
            backbone_name=str(self.backbone.model.name_or_path) if _is_hub_id(self.backbone) else self.backbone.name,
            fingerprint=self.backbone.fingerprint,
            dropout=self.recipe.lora.dropout,
            answers={
                "max_new_tokens": self.recipe.generation.max_new_tokens,
                "stop": list(self.recipe.generation.stop),
                "chat_template": self.recipe.data.chat_template,
            },
        )

    def _with(self, weights: AdapterWeights | None) -> AbstractContextManager[Any]:
        """The backbone with an adapter, or alone."""
        return nullcontext(self.backbone.model) if weights is None else attached(self.backbone.model, weights)

    def _losses(self, model: Any, examples: Sequence[Example]) -> list[float]:
        return ProbeSet(examples, self.pad_id).losses(model) if examples else []

    def _answer(self, model: Any) -> tuple[str, ...]:
        prompts = [example.prompt_ids for example in self.splits.test]
        tokenizer, settings = self.backbone.tokenizer, self.recipe.generation
        return tuple(shared(prompts, lambda own: generate(model, tokenizer, own, settings, self.progress.answered)))


def expected_rounds(recipe: Recipe, train_examples: int) -> int:
    """Rounds of the controller run over so many training examples."""
    return len(recipe.controller.round_steps(train_examples))


def lack_of_rounds(stage: ControllerStage, train_examples: int) -> str | None:
    """Say why a controller run over so many training examples would learn nothing of training, or None if it does."""
    if any(stage.round_steps(train_examples)[-1:]):
        return None
    steps, every = stage.training.steps(train_examples), stage.spacing(train_examples)
    return (
        f"the controller run has {steps} optimizer steps and probes every {every}, so no round follows a step; "
        "raise controller.training.epochs or lower controller.rounds.every"
    )


def hash_of(splits: Splits, names: Sequence[str] = SPLITS) -> str:
    """Return a hash of every token and its place in the named splits, so that nothing goes on with other data."""
    digest = hashlib.sha256()
    for name in names:
        for example in getattr(splits, name):
            digest.update(repr((name, example.id, example.prompt_ids, example.completion_ids)).encode())
    return digest.hexdigest()


def ratio_record(estimate: RatioEstimate, last_committed: float | None) -> dict[str, Any]:
    """The learned ratio as `ratio.json` holds it."""
    record = asdict(estimate)
    curve = record.pop("curve")
    columns: list[list[float]] = [list(column) for column in zip(*curve, strict=True)] if curve else [[], [], [], []]
    return {
        "prune_ratio": record.pop("ratio"),
        **record,
        "curve": dict(zip(("ratios", "mean", "low", "high"), columns, strict=True)),
        "last_committed_ratio": last_committed,
    }


def _check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are known to transformers and installed.

    Raises:
        RecipeError: one is not.
    """
    if not names:
        return
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise RecipeError(f"report_to names {name!r}; allowed: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise RecipeError(
                f"report_to names {name!r}, which cannot be used here: {error}; install it, or leave it out"
            ) from error


def _is_hub_id(backbone: Backbone) -> bool:
    """Whether the model knows a name that others can load, rather than a folder of this machine."""
    place = str(backbone.model.name_or_path)
    return bool(place) and not Path(place).exists()
