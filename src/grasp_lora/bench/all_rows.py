"""`final.all_rows`: what a run hands over, trained once more on the target's train, dev and micro-dev rows together.

The choice, the learned ratio and the optimizer steps of each training come from the run, so no row is left to stop by: a training
goes to its end and keeps its last step. Where a first training was discarded (best step 0), so is this one. The test stays out.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch

from grasp_lora.bench.outcomes import Adapter, once
from grasp_lora.bench.run_folder import AllRows
from grasp_lora.bench.session import CALIBRATION_EXAMPLES
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import key_of
from grasp_lora.data.encode import Example
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.masks import MaskSet, MaskSettings
from grasp_lora.models.adapters import attached
from grasp_lora.models.live import adapter_weights, live_pairs, segments_of
from grasp_lora.training.probes import ProbeSet, calibrate
from grasp_lora.training.settings import TrainingSettings


@dataclass(frozen=True)
class TrainedAgain:
    """What became of it: the facts for the run's folder; the adapter and the bench that measures it, None without a training."""

    facts: AllRows
    adapter: Adapter | None = None
    bench: Bench | None = None


def train_again(bench: Bench, name: str, chosen: Adapter, prune_ratio: float) -> TrainedAgain:
    """Train a system of a run once more on all rows outside the test set, with what it rests on and was trained on such rows.

    Args:
        bench: of the run.
        name: the system: source, source_2, ..., target, merged, continued or grasp.
        chosen: its adapter.
        prune_ratio: of GRASP's result, a fraction in [0, 1].

    Raises:
        GraspError: a training fails.
    """
    recipe, splits, kind = bench.recipe, bench.session.splits, name.partition("_")[0]
    rows = (*splits.train, *splits.dev, *splits.micro_dev)
    parts: dict[str, tuple[Adapter, TrainingSettings]] = {}
    if kind in ("target", "merged", "grasp") and recipe.target.adapter is None:
        parts["target"] = bench.target, recipe.target.training
    if kind in ("continued", "grasp"):
        parts[kind] = chosen, recipe.final.training
    steps: dict[str, int] = {part: one.records[-1].result["best_step"] for part, (one, _) in parts.items()}
    nothing = ""
    if len(rows) == len(splits.train):
        nothing = "there are no dev and micro-dev rows"
    elif not parts:
        nothing = "no part of it was trained on target rows in this run"
    elif not any(steps.values()):
        nothing = "its training was discarded (best step 0)"
    if nothing:
        return TrainedAgain(AllRows(why=f"There is nothing to train once more on all rows: {nothing}."))
    lengths = " and ".join(f"{part} {count}" for part, count in steps.items() if count)
    why = (
        f"The choice was made with {len(splits.train)} training rows. What was chosen was then trained once more on all "
        f"{len(rows)} rows outside the test set (optimizer steps: {lengths}), and that adapter is handed over."
    )
    epochs = {part: _epochs(steps[part], training, len(rows)) for part, (_, training) in parts.items()}
    again = _AllRowsBench(bench, rows, epochs)
    return TrainedAgain(AllRows(why=why, rows=len(rows), steps=steps), again.made(kind, prune_ratio), again)


def _epochs(steps: int, training: TrainingSettings, examples: int) -> float:
    """Epochs over so many examples that a training makes so many optimizer steps of, since it rounds them up; 0 for none."""
    return math.nextafter(steps / training.steps_per_epoch(examples), 0.0)


class _AllRowsBench(Bench):
    """The bench of a run on all rows: they are its training split, and it has no dev set."""

    def __init__(self, bench: Bench, rows: tuple[Example, ...], epochs: Mapping[str, float]) -> None:
        recipe, self._first, self._epochs = bench.recipe, bench, epochs
        self._final_epochs = epochs.get("continued", epochs.get("grasp", 0))
        changes = {
            name: replace(stage, training=replace(stage.training, epochs=count, patience=None, keep="last"))
            for name, stage, count in (
                ("target", recipe.target, epochs.get("target")),
                ("final", recipe.final, self._final_epochs),
            )
            if count
        }
        session = bench.session.variant(recipe.model_copy(update=changes))
        session.splits = replace(session.splits, train=rows, dev=(), micro_dev=())
        super().__init__(session, bench.session, bench.store)
        self.sources = bench.sources

    @cached_property
    def target(self) -> Adapter:
        """The target adapter, trained on all rows; or that of the run."""
        return super().target if self._epochs.get("target") else self._first.target

    def made(self, kind: str, prune_ratio: float) -> Adapter:
        """What was chosen, made once more."""
        if kind == "target":
            return self.target
        if kind == "continued":
            return self.finetuned(self.source, 0.0)
        merged = self.merged()
        if kind == "merged":
            return merged
        if self._final_epochs:
            return self.finetuned(merged, prune_ratio)
        settings = self._measured(merged, data=self._data("train"), prune_ratio=prune_ratio, mask=asdict(self._mask))
        return Adapter(key_of("pruned", settings), once(lambda: self._pruned(merged, prune_ratio)), merged.records)

    @property
    def _mask(self) -> MaskSettings:
        return self.recipe.final.mask or self.recipe.mask

    def _pruned(self, start: Adapter, prune_ratio: float) -> AdapterWeights:
        """An adapter as the final run has it before its first step."""
        session, weights = self.session, start.weights
        segments = segments_of(weights)
        with attached(session.backbone.model, weights) as model, torch.no_grad():
            masks = MaskSet(live_pairs(model, segments), self._mask)
            calibrate(model, masks, ProbeSet(session.splits.train[:CALIBRATION_EXAMPLES], session.pad_id))
            masks.commit(prune_ratio)
            return adapter_weights(model, segments)
