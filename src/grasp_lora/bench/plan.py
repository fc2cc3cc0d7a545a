"""What a comparison would do: its steps with what they cost at most, in forward passes."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from grasp_lora.bench.checks import check_config
from grasp_lora.bench.compare import ComparisonSettings, Work, prepared
from grasp_lora.bench.outcomes import Adapter, trained_examples
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import Record, Store, key_of
from grasp_lora.data.splits import SPLITS
from grasp_lora.method.rounds import RatioEstimate
from grasp_lora.recipes.stages import AUTO, ControllerStage
from grasp_lora.storage.claims import Workplace
from grasp_lora.training.settings import TrainingSettings

PLANNED, ANSWERED = "planned", "answered"


@dataclass(frozen=True)
class Plan:
    """What a comparison would do.

    Args:
        steps: each step once, and whether it is on record; of one that is not, the result holds the most it costs.
        unavailable: title of a method -> why it cannot run here.
        answers: test prompts that are answered.
    """

    steps: list[tuple[Record, bool]]
    unavailable: Mapping[str, str]
    answers: int


def plan_comparison(session: Session, folder: Path, settings: ComparisonSettings) -> Plan:
    """Say what `compare` would do; nothing is trained or written.

    Args:
        session, folder, settings: as of `compare`.

    Raises:
        GraspError: what `compare` would refuse.
    """
    session = prepared(session, folder, settings)
    work = Work(session, Workplace(folder), settings)
    check_config(work.store.folder, session.backbone, note=False)
    store = _PlannedStore(work.store.folder)
    work.store = store
    work.run_all(_PlannedBench)
    unavailable = {name: row.unavailable for name, row in work.rows.items() if row.unavailable}
    steps = list({record.key: (record, there) for record, there in store.used}.values())
    answers = sum(record.result.get(ANSWERED, 0) for record, there in steps if not there)
    return Plan(steps, unavailable, answers)


class _PlannedStore(Store):
    """A store that does no step: one that is not on record gets a record of the most that it costs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sizes: dict[str, int] = {}
        self.stage: ControllerStage | None = None

    def get(self, step: str, settings: Mapping[str, Any], *_: Any, **__: Any) -> Record:
        found = self.on_record(step, settings)
        record = found or Record(step, key_of(step, settings), dict(settings), self._result(step, settings), 0.0)
        self.used.append((record, found is not None))
        return record

    def _result(self, step: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        if step == "scores":
            return {ANSWERED: self.sizes["test"]}
        if "split" in settings:
            return {"losses": [0.0] * self.sizes[settings["split"]]}
        if "budget" in settings:
            return {"measured_examples": settings["budget"] * self.sizes["micro_dev"]}
        if "controller" in settings and self.stage is not None:
            stage, train = self.stage, self.sizes["train"]
            pool = sum(self.sizes[split] for split in stage.rounds.splits)
            rounds = len(stage.round_steps(train))
            measured = rounds * stage.probed_examples(pool)
            dev = 0 if stage.training.patience is None else self.sizes["dev"]  # by whose loss the run may stop
            cost = self._cost(stage.training, train, dev)
            return cost | {"measured_examples": measured + cost["measured_examples"]}
        if "training" in settings:
            train, dev = (sum(self.sizes[name] for name in names) for names in settings["splits"])
            return self._cost(TrainingSettings(**settings["training"]), train, dev)
        if "final" in settings:
            return self._cost(TrainingSettings(**settings["final"]["training"]), self.sizes["train"], self.sizes["dev"])
        return {}

    def _cost(self, training: TrainingSettings, train: int, dev: int) -> dict[str, Any]:
        steps = training.steps(train)
        # And the one before the first step.
        evaluations = math.ceil(steps / training.evaluate_steps(training.steps_per_epoch(train))) + 1
        return {
            PLANNED: True,
            "trained_examples": trained_examples(steps, training, train),
            "measured_examples": evaluations * dev,
            "dev_loss": 0.0,
            "best_step": steps,
        }


class _PlannedBench(Bench):
    """The steps of a bench on a store that does none."""

    def __init__(self, session: Session, shared: Session, store: Store, grid: Sequence[float]) -> None:
        if isinstance(store, _PlannedStore):
            splits, store = session.splits, copy(store)  # what is used is noted in one list, but splits differ in size
            store.sizes = {name: len(getattr(splits, name)) for name in SPLITS}
        super().__init__(session, shared, store, grid)

    @cached_property
    def decided(self) -> Self:
        if self.recipe.target.on != AUTO:
            return self
        ways = (self._with_target(None), chosen := self._with_target("source"))
        found = [bench.losses(bench.merged(), split) for bench in ways for split in self.choosing_splits]
        # Where they are on record it is known which it will be, and without rows, too.
        return super().decided if all(record.made_with for record in found) else chosen

    def _scored(self, adapter: Adapter) -> tuple[Record, Callable[[], tuple[str, ...]]]:
        record, answers = super()._scored(adapter)
        if ANSWERED in record.result and self._answers_file(adapter).is_file():
            record.result[ANSWERED] = 0  # another metric asks for no new answers
        return record, answers

    def _control_settings(self, stage: ControllerStage, merged: Adapter) -> dict[str, Any]:
        if isinstance(self.store, _PlannedStore):
            self.store.stage = stage
        return super()._control_settings(stage, merged)

    def _estimate(self, record: Record, stage: ControllerStage) -> RatioEstimate:
        if record.result.get(PLANNED):  # no ratio is known, and so the steps that rest on it are no others' steps
            return RatioEstimate(math.nan, math.nan, math.nan, stage.rule if isinstance(stage.rule, str) else "", 0)
        return super()._estimate(record, stage)
