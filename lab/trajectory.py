"""The loss landscape of a controller run: the micro-dev loss over a grid of prune ratios, again and again while training goes on.

Not a method but its test bench: from recorded landscapes every policy can be replayed without a model.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import Record
from grasp_lora.data.splits import hash_of
from grasp_lora.errors import GraspError, ProbeError
from grasp_lora.method.lora import Segment
from grasp_lora.method.masks import MaskSettings, Ranking
from grasp_lora.method.policy import even_ratio
from grasp_lora.models.adapters import attached
from grasp_lora.models.live import segments_of
from grasp_lora.training.probes import ProbeSet, calibrate
from grasp_lora.training.pruned import PrunedTraining

REVISION = 1  # part of what a trajectory is found by: raise it when a change of the code changes its losses


class LossLandscape(PrunedTraining):
    """Train pruned at one ratio, or at one drawn anew for each step, and measure all ratios of a grid every few steps.

    The measurements leave no trace in the training. Weights are ranked anew for each of them, masked ones with their stashed
    values, as a controller round does. With a ratio for each step all masks, those in force and those measured, come from one
    ranking made before training: they nest, and what a weight is worth does not depend on the ratios that came before. A weight
    that is masked for a step comes back with the value that it had; to the optimizer its gradient was zero.

    After training, `steps` holds the optimizer steps after which was measured, 0 first and the last step of the training
    last, and `losses` the micro-dev losses, [measurements][ratios][examples].

    A landscape is recorded in one go: it has no state for checkpoints, and a training that resumes from one is refused.

    Args:
        micro_dev: the examples that are measured; scores that need inputs are calibrated on them, too.
        ratios: the grid that is measured, fractions in [0, 1], at least one.
        every: optimizer steps between measurements, >= 1.
        prune_ratio: fraction in [0, 1], or None for `even_ratio` between the lowest and the highest of `ratios`.
        mask: score, scope and granularity.
        segments: module name -> origin of its rank-one components, for scope `factor`.

    Raises:
        ValueError: there are no ratios, or `every` is out of range.
    """

    state_name = "landscape"

    def __init__(
        self,
        micro_dev: ProbeSet,
        ratios: Sequence[float],
        every: int,
        prune_ratio: float | None,
        mask: MaskSettings | None = None,
        segments: Mapping[str, tuple[Segment, ...]] | None = None,
    ) -> None:
        if not ratios:
            raise ValueError("there are no ratios to measure; give at least one")
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1 optimizer step")
        super().__init__(0.0 if prune_ratio is None else prune_ratio, micro_dev, mask, "hold", segments)
        self.ratios = tuple(ratios)
        self.every = every
        self.shared = prune_ratio is None
        self.steps: list[int] = []
        self.losses: list[list[list[float]]] = []
        self._one_ranking: Ranking | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune and measure before the first step.

        Raises:
            GraspError: training resumes from a checkpoint.
            ProbeError: a loss is not a finite number; so do the later measurements.
        """
        if state.global_step:
            raise GraspError(
                f"a landscape is recorded in one go, but training resumes at step {state.global_step}; start it anew"
            )
        self.steps, self.losses = [], []
        super().on_train_begin(args, state, control, **kwargs)
        ranking = self.masks.rank()
        self._one_ranking = ranking if self.shared else None
        self._measure(kwargs["model"], state.global_step, ranking)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the ratio of the step where there is none for all."""
        if self._one_ranking is not None:
            ratio = even_ratio(state.global_step, min(self.ratios), max(self.ratios))
            self.masks.commit(ratio, self._one_ranking)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure when it is due."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        ranking = self._one_ranking
        if ranking is None:
            calibrate(kwargs["model"], self.masks, self.calibration)
            ranking = self.masks.rank()
        self._measure(kwargs["model"], state.global_step, ranking)

    def _measure(self, model: torch.nn.Module, step: int, ranking: Ranking) -> None:
        losses = []
        for ratio in self.ratios:
            try:
                with self.masks.probe(ratio, ranking):
                    losses.append(self.calibration.losses(model))
            except ProbeError as error:
                raise ProbeError(f"prune ratio {ratio:.4f} after {step} steps: {error}") from error
        self.steps.append(step)
        self.losses.append(losses)


def trajectory(
    bench: Bench, train_ratio: float | None, ratios: Sequence[float], every: int, split: str = "micro_dev"
) -> Record:
    """The losses of a split at many prune ratios, again and again during a training run like the controller's; on record.

    Args:
        bench: of the recipe.
        train_ratio: held during the run, a fraction in [0, 1]; None draws one for each step, as policy `spread` does.
        ratios: what is measured, fractions in [0, 1].
        every: optimizer steps between measurements, >= 1.
        split: `micro_dev` or `dev`; scores that need inputs are calibrated on it, too.

    Returns:
        Record with `steps` and `losses` of a `LossLandscape`.
    """
    recipe, session, merged = bench.recipe, bench.session, bench.merged()
    training, train, examples = recipe.controller.training, session.splits.train, getattr(session.splits, split)
    settings = {
        "backbone": session.backbone.fingerprint,
        "dtype": str(session.backbone.model.dtype),
        "seed": recipe.seed,
        "data": hash_of(session.splits, ("train", split)),
        "revision": REVISION,
        "start": merged.key,
        "training": asdict(training),
        "mask": asdict(recipe.mask),
        "dropout": recipe.dropout,
        "train_ratio": train_ratio,
        "ratios": list(ratios),
        "every": every,
    }

    def work(key: str, folder: Path) -> dict[str, Any]:
        weights = merged.load()
        assert weights is not None, "a merge has weights"
        landscape = LossLandscape(
            ProbeSet(examples, session.pad_id), ratios, every, train_ratio, recipe.mask, segments_of(weights)
        )
        with (
            tempfile.TemporaryDirectory() as scratch,
            attached(session.backbone.model, weights, dropout=recipe.dropout) as model,
        ):
            session.finetune(model, train, (), training, "controller", Path(scratch), callbacks=[landscape])
        return {
            "steps": landscape.steps,
            "losses": landscape.losses,
            "trained_examples": round(training.epochs * len(train)),
            "measured_examples": len(landscape.steps) * len(ratios) * len(examples),
        }

    name = "shared" if train_ratio is None else f"{train_ratio:.2f}"
    name += "" if split == "micro_dev" else f" {split}"
    return bench.store.get(f"trajectory {name}", settings, work)
