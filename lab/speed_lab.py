"""One recipe in the lab: its adapters and examples, ways to time what is done with them, whole runs computed from parts."""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from speed_figures import clock_of, take_turns

from grasp_lora.data.encode import Example
from grasp_lora.engine.check import check_splits
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import CALIBRATION_EXAMPLES, GRID
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.merging import merge
from grasp_lora.models.adapters import attached, fresh_adapter
from grasp_lora.models.live import adapter_weights, segments_of
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.stages import ControllerStage, FinalStage
from grasp_lora.training.controller import GraspController
from grasp_lora.training.probes import ProbeSet, probes_of
from grasp_lora.training.pruned import PrunedTraining
from grasp_lora.training.trainer import finetune
from grasp_lora.training.training_settings import TRAINED_AS_MEASURED, TrainingSettings

RATIO = 0.4  # of probes and final runs; costs do not depend on it


class TimedController(GraspController):
    """A controller that adds up the time of its rounds."""

    now: Callable[[], float]
    rounds = 0
    seconds = 0.0

    def run_round(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        """Run a round and time it."""
        started = self.now()
        record = super().run_round(model, optimizer)
        self.rounds += 1
        self.seconds += self.now() - started
        return record


@dataclass(frozen=True)
class ControllerRun:
    """What a timed controller run took: seconds in all, those of its rounds, and how many there were."""

    seconds: float
    round_seconds: float
    rounds: int


@dataclass(frozen=True)
class Parts:
    """What the parts of a run cost, and whole runs computed from them: all epochs, every round, no early stopping.

    Lists have one number a turn, in seconds.

    Args:
        recipe: the run.
        train, dev: examples of its splits.
        stages: the controller runs, by name.
        pools: how many examples each of them may probe.
        timed: training examples of each training that was timed.
        plain, final: a training without pruning, and one with the mask held at a fixed ratio.
        per_dev: measuring one dev example; zeros without a dev split.
        controlled: the timed controller runs, by name.
    """

    recipe: Recipe
    train: int
    dev: int
    stages: Mapping[str, ControllerStage]
    pools: Mapping[str, int]
    timed: int
    plain: list[float]
    final: list[float]
    per_dev: list[float]
    controlled: Mapping[str, list[ControllerRun]]

    def whole_training(self) -> list[float]:
        """The controller's training without a controller."""
        trained = self._trained(self.recipe.controller.training)
        return [trained * seconds / self.timed for seconds in self.plain]

    def whole_controller(self, name: str) -> list[float]:
        """The controller run: its training as it is between rounds, and all rounds."""
        return [self._whole(self.stages[name], run) for run in self.controlled[name]]

    def whole_final(self) -> list[float]:
        """The final run with its dev evaluations."""
        return self._finals(self.recipe.final)

    def dev_evaluations(self, stage: FinalStage | None = None) -> list[float]:
        """The dev evaluations of the final run: before the first step, when they are due, and after the last step."""
        return [self._measured(stage or self.recipe.final) * seconds for seconds in self.per_dev]

    def work_ratio(self, name: str) -> float:
        """The grid over controller and final run in forward passes of one example, a training example counted as two."""
        return self._grid_work() / (
            self._work(self.stages[name], self.pools[name]) + self._final_work(self.recipe.final)
        )

    def _grid_work(self) -> float:
        return len(GRID) * self._final_work(self.recipe.final)

    def _work(self, stage: ControllerStage, pool: int) -> float:
        probes = self._rounds(stage) * stage.probed_examples(pool)
        return TRAINED_AS_MEASURED * self._trained(stage.training) + probes

    def _final_work(self, stage: FinalStage) -> float:
        return TRAINED_AS_MEASURED * self._trained(stage.training) + self._measured(stage)

    def _whole(self, stage: ControllerStage, run: ControllerRun) -> float:
        between = (run.seconds - run.round_seconds) / self.timed
        return self._trained(stage.training) * between + self._rounds(stage) * run.round_seconds / run.rounds

    def _finals(self, stage: FinalStage) -> list[float]:
        trained, evaluations = self._trained(stage.training), self.dev_evaluations(stage)
        return [trained * one / self.timed + other for one, other in zip(self.final, evaluations, strict=True)]

    def _trained(self, training: TrainingSettings) -> float:
        return training.epochs * self.train

    def _measured(self, stage: FinalStage) -> int:
        training = stage.training
        every = max(1, round(training.evaluate_every * training.steps_per_epoch(self.train)))
        return (1 + math.ceil(training.steps(self.train) / every)) * self.dev

    def _rounds(self, stage: ControllerStage) -> int:
        return len(stage.round_steps(self.train))


@dataclass
class Lab:
    """A recipe's model and data, and ways to time what is done with them.

    Args:
        recipe, base: of `load_recipe`.
        arguments: of the command line, from which a child process loads the same recipe.
        examples: training examples of a timed epoch, as many as fill whole steps.
        pairs: turns of every measurement.
        stages: by name, the controller runs.
        now: reads the time in seconds; None takes the clock that fits the device.
        notes: what could not be measured, and why.
    """

    recipe: Recipe
    base: Path
    arguments: Sequence[str]
    examples: int
    pairs: int
    stages: Mapping[str, ControllerStage]
    now: Callable[[], float] | None = None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def session(self) -> Session:
        """The prepared session; loaded by the first measurement that needs it."""
        session = Session(self.recipe, self.base)
        check_splits(session)
        return session

    @property
    def device(self) -> torch.device:
        """Of the backbone."""
        return self.session.backbone.model.device

    @property
    def adapters(self) -> int:
        """How many adapters the recipe merges."""
        return max(1, len(self.recipe.source.adapters)) + 1

    @cached_property
    def merged(self) -> AdapterWeights:
        """The adapter that the controller and the final run start from, with random weights."""
        return self.adapter(self.recipe.lora.rank, self.adapters)

    @cached_property
    def parts(self) -> Parts:
        """The parts of a run, timed in turn; rounds that are too far apart for the timed epoch come at its end."""
        splits, training, final = self.session.splits, self.recipe.controller.training, self.recipe.final.training
        a_step = training.batch_size * training.accumulation
        steps = max(1, self.examples // a_step)
        train = taken(splits.train, steps * a_step)
        works: dict[str, Callable[[], Any]] = {
            "plain": lambda: self.trained(train, training),
            "final": lambda: self.trained(train, final, callbacks=[self.pruning()]),
        }
        if dev := splits.dev[: self.examples]:
            works["dev"] = lambda: self.measured(dev) / len(dev)
        for name, stage in self.stages.items():
            every = min(stage.spacing(len(self.session.splits.train)), steps)
            timed = replace(stage, rounds=replace(stage.rounds, every=every))
            works[f"run {name}"] = partial(self.controlled, train, timed)
        times = take_turns(works, self.pairs)
        return Parts(
            self.recipe,
            len(splits.train),
            len(splits.dev),
            self.stages,
            {name: len(self.pool(stage)) for name, stage in self.stages.items()},
            len(train),
            times["plain"],
            times["final"],
            times.get("dev", [0.0] * self.pairs),
            {name: times[f"run {name}"] for name in self.stages},
        )

    def pool(self, stage: ControllerStage) -> list[Example]:
        """The examples that a controller run may probe."""
        return [example for split in stage.rounds.splits for example in getattr(self.session.splits, split)]

    def adapter(self, rank: int, count: int) -> AdapterWeights:
        """Merge so many random adapters of a rank by the recipe's rule, with the rule's own weights."""
        with fresh_adapter(self.session.backbone.model, replace(self.recipe.lora, rank=rank), seed=0) as model:
            fresh = adapter_weights(model)
        generator = torch.Generator().manual_seed(0)

        def trained_alike(pair: LoraPair) -> LoraPair:
            return LoraPair(pair.A, 1e-3 * torch.randn(pair.B.shape, generator=generator), pair.scaling)

        adapters = [AdapterWeights({name: trained_alike(pair) for name, pair in fresh.items()}) for _ in range(count)]
        names = [f"adapter_{number}" for number in range(count)]
        return merge(adapters, replace(self.recipe.merge, weights=None), names)

    @contextmanager
    def on(self, weights: AdapterWeights | None = None) -> Iterator[Any]:
        """The backbone with the merged adapter, or another one."""
        weights = self.merged if weights is None else weights
        with attached(self.session.backbone.model, weights, dropout=self.recipe.lora.dropout) as model:
            yield model

    def clocked(self, work: Callable[[], object]) -> float:
        """Do the work and return its seconds."""
        clock = self.now or clock_of(self.device)[1]
        started = clock()
        work()
        return clock() - started

    def epoch(
        self,
        model: Any,
        train: Sequence[Example],
        training: TrainingSettings,
        dev: Sequence[Example] = (),
        callbacks: Sequence[Any] = (),
        controller: GraspController | None = None,
    ) -> float:
        """Fine-tune a model for one epoch and return the seconds."""
        once = replace(training, epochs=1, patience=99 if dev else None)
        with tempfile.TemporaryDirectory() as folder:
            return self.clocked(
                lambda: finetune(
                    model,
                    train,
                    dev,
                    once,
                    pad_id=self.session.pad_id,
                    seed=0,
                    folder=Path(folder),
                    callbacks=callbacks,
                    controller=controller,
                )
            )

    def trained(self, train: Sequence[Example], training: TrainingSettings, **how: Any) -> float:
        """Put the merged adapter on, fine-tune it for one epoch (see `epoch`), and return the seconds of the latter."""
        with self.on() as model:
            return self.epoch(model, train, training, **how)

    def controlled(
        self,
        train: Sequence[Example],
        stage: ControllerStage,
        probes: Sequence[Example] | None = None,
        weights: AdapterWeights | None = None,
    ) -> ControllerRun:
        """Time a controller run of one epoch.

        Args:
            train: the examples of the epoch.
            stage: how it probes.
            probes: probe all of these in each round instead.
            weights: of another adapter than the merged one.
        """
        weights = self.merged if weights is None else weights
        pool = self.pool(stage) if probes is None else probes
        turn = stage.rounds.turn(len(pool)) if probes is None else None
        rounds = replace(stage.rounds, every=stage.spacing(len(train)), patience=None)
        controller = TimedController(
            probes_of(pool, turn, 0),
            replace(stage, rounds=rounds),
            self.recipe.mask,
            segments_of(weights),
        )
        controller.now = self.now or clock_of(self.device)[1]
        with self.on(weights) as model:
            seconds = self.epoch(model, train, stage.training, controller=controller)
        return ControllerRun(seconds, controller.seconds, controller.rounds)

    def measured(self, examples: Sequence[Example]) -> float:
        """Return the seconds of measuring the examples' losses under the merged adapter."""
        probes = ProbeSet(examples)
        with self.on() as model:
            return self.clocked(lambda: probes.losses(model))

    def pruning(self) -> PrunedTraining:
        """A new callback of a final run."""
        calibration = ProbeSet(self.session.splits.train[:CALIBRATION_EXAMPLES])
        final = self.recipe.final
        mask, segments = final.mask_of(self.recipe.mask), segments_of(self.merged)
        return PrunedTraining(RATIO, calibration, mask, final.mode, segments)


def taken(examples: Sequence[Example], count: int) -> list[Example]:
    """The first so many examples, from the start again where there are too few."""
    return [examples[number % len(examples)] for number in range(count)]


def length(example: Example) -> int:
    """Tokens of prompt and answer."""
    return len(example.prompt_ids) + len(example.completion_ids)
