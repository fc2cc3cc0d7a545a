"""A Trainer callback that keeps a LoRA adapter pruned at a fixed ratio: the final run. Paper: final run."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import TrainerControl, TrainerState, TrainingArguments

from grasp_lora.errors import GraspError
from grasp_lora.method.lora import Segment
from grasp_lora.method.masks import MaskSet, MaskSettings
from grasp_lora.models.adapters import live_pairs
from grasp_lora.storage.checkpoints import State
from grasp_lora.training.gradients import check_gradients
from grasp_lora.training.probes import ProbeSet, calibrate
from grasp_lora.training.saved import SavedInCheckpoints

MASK_MODES = ("hold", "reselect")


class PrunedTraining(SavedInCheckpoints):
    """Train a LoRA adapter pruned at a fixed ratio.

    Args:
        prune_ratio: fraction in [0, 1].
        calibration: examples on which scores that need inputs are measured.
        mask: score, scope and granularity.
        mode: `hold` keeps one mask, `reselect` selects the least important weights anew after every optimizer step.
        segments: module name -> origin of its rank-one components (`segments_of` a merged adapter), for scope `factor`.

    Raises:
        ValueError: the mode is unknown.
    """

    state_name = "pruning"

    def __init__(
        self,
        prune_ratio: float,
        calibration: ProbeSet,
        mask: MaskSettings | None = None,
        mode: str = "hold",
        segments: Mapping[str, tuple[Segment, ...]] | None = None,
    ) -> None:
        if mode not in MASK_MODES:
            raise ValueError(f"mask mode is {mode!r}; allowed: {', '.join(MASK_MODES)}")
        self.prune_ratio = prune_ratio
        self.calibration = calibration
        self.mask = mask or MaskSettings()
        self.mode = mode
        self.segments = segments
        self._masks: MaskSet | None = None
        self._trains = False  # whether gradients were seen

    @property
    def masks(self) -> MaskSet:
        """The live mask set; there is one from the beginning of training on.

        It is that of the last step: count zeros of the weights (`survival`) where `finetune` put an earlier step back.
        """
        if self._masks is None:
            raise RuntimeError("training has not begun, so there are no masks yet")
        return self._masks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune before the first step, or take up the masks of the checkpoint that training resumes from.

        A training that begins anew on the same adapter, such as after `auto_find_batch_size` found a batch too large, begins
        with the stashed values where the mask was on.

        Raises:
            GraspError: the trainer shards weights in a way that hides them.
        """
        _check_weights_are_whole()
        pairs = live_pairs(kwargs["model"], self.segments)
        saved = self.saved_state(args, state)
        # Not on the weights of a checkpoint, which have their own masks.
        if not saved and self._masks is not None and self._masks.holds(pairs):
            self._masks.commit(0.0)
        self._masks = MaskSet(pairs, self.mask)
        if saved:
            self.restore(*saved)
            return
        calibrate(kwargs["model"], self.masks, self.calibration)
        if self.mode == "reselect":
            self.masks.reselect(self.prune_ratio)
        else:
            self.masks.commit(self.prune_ratio)

    def state(self) -> State:
        """Return the ratio and the masks with what they rest on."""
        return {"ratio": self.masks.ratio}, self.masks.state()

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up a state.

        Raises:
            GraspError: it does not fit this adapter or these settings.
        """
        try:
            self.masks.restore(tensors, values["ratio"])
        except ValueError as error:
            raise GraspError(str(error)) from error

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the gradients of held weights, once it is seen that there are any.

        Raises:
            GraspError: no LoRA weight has a gradient, so nothing would be trained.
        """
        if not self._trains:
            check_gradients(kwargs["model"])
            self._trains = True
        if self.mode == "hold":
            self.masks.mask_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the mask back on."""
        if self.mode == "hold":
            self.masks.enforce()
        else:
            self.masks.reselect(self.prune_ratio)


def _check_weights_are_whole() -> None:
    """Refuse what flattens or partitions the weights that masks are laid on, or steps the optimizer by itself."""
    state = AcceleratorState()
    if getattr(state, "deepspeed_plugin", None) is not None:
        raise GraspError(
            "the trainer uses DeepSpeed, under which masks cannot be held; train with DDP (plain torchrun)"
        )
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise GraspError(
            "the trainer uses FSDP1, which flattens the weights that are masked; train with DDP (plain torchrun)"
        )
