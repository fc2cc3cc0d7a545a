"""A Trainer callback that keeps a LoRA adapter pruned at a fixed ratio: the final run. Paper: final run."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainerControl, TrainerState, TrainingArguments

from grasp_lora.errors import GraspError
from grasp_lora.method.lora import LoraPair, Segment
from grasp_lora.method.masks import MASK_MODES, MaskSet, MaskSettings
from grasp_lora.method.rounds import RatioEstimate
from grasp_lora.models.live import ADAPTER_NAME, active_adapter, live_pairs
from grasp_lora.storage.checkpoints import State, read_state
from grasp_lora.text.display import quoted
from grasp_lora.training.gradients import GradientCheck
from grasp_lora.training.probes import ProbeSet, calibrate
from grasp_lora.training.saved import SavedInCheckpoints

logger = logging.getLogger(__name__)

_UNDER_MASKS = "_grasp_lora_under_masks"  # marks a live weight that has been trained so
_MOST_ZEROS = 0.05


class PrunedTraining(GradientCheck, SavedInCheckpoints):
    """Train a LoRA adapter pruned at a fixed ratio.

    It is the model's active adapter, all of its factors A and B. What is trained beside LoRA, such as `modules_to_save`, stays
    whole and does not count in the ratio. With `load_best_model_at_end` the masks are those of the best checkpoint afterwards.

    Args:
        prune_ratio: fraction in [0, 1].
        calibration: examples on which scores that need inputs are measured.
        mask: the score.
        mode: `hold` keeps one mask, `reselect` selects the least important weights anew after every optimizer step.
        segments: module name -> origin of its rank-one components (`segments_of` a merged adapter), each pruned by itself.

    Raises:
        ValueError: the mode is unknown, the ratio no fraction, or the calibration no `ProbeSet`.
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
        if not _is_fraction(prune_ratio):
            hint = "; take its ratio" if isinstance(prune_ratio, RatioEstimate) else ""
            raise ValueError(f"prune_ratio is {quoted(prune_ratio)}; it must be a fraction in [0, 1]{hint}")
        if not isinstance(calibration, ProbeSet):
            raise ValueError(
                f"calibration is a {type(calibration).__name__}; give a ProbeSet, as of ProbeSet.from_rows"
            )
        self.prune_ratio = prune_ratio
        self.calibration = calibration
        self.mask = mask or MaskSettings()
        self.mode = mode
        self.segments = segments
        self._masks: MaskSet | None = None
        self._left: list[int] | None = None  # checksums of the weights at the end of a training

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
        with the stashed values where the mask was on. Mode `reselect` stashes nothing, so that what it pruned last stays zero.

        Raises:
            GraspError: the adapter cannot be pruned, the trainer shards its weights or would put back others, or the checkpoint
                belongs to other masks or weights.
        """
        _check_weights_are_whole()
        super().on_train_begin(args, state, control, **kwargs)
        pairs = live_pairs(kwargs["model"], self.segments)
        if args.load_best_model_at_end:
            _check_best_can_be_put_back(kwargs["model"], state)
        saved = self.saved_state(args, state)
        if not saved:  # the weights of a checkpoint have their own masks
            self._revive(pairs)
            if self._masks is None:
                _warn_of_zeros(pairs)
        self._left = None
        self._masks = MaskSet(pairs, self.mask)
        for weight in self._masks.weights.values():
            setattr(weight, _UNDER_MASKS, True)
        if saved:
            self.restore(*saved)
            if not self.masks.are_on():
                raise GraspError(
                    f"the checkpoint of step {state.global_step} in {args.output_dir} is not the one training resumes from, so "
                    "its masks do not fit the weights; resume within the folder that training began in"
                )
            return
        if self.mode == "hold" and self._most_pruned > 0.0:
            _check_order(self.masks)
        calibrate(kwargs["model"], self.masks, self.calibration)
        if self.mode == "reselect":
            self.masks.reselect(self.prune_ratio)
        else:
            self.masks.commit(self.prune_ratio)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the masks of the best checkpoint where the trainer has put its weights back.

        Raises:
            GraspError: they do not belong to the weights.
        """
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            PartialState().wait_for_everyone()  # the first process may be writing it
            self._masks = MaskSet(live_pairs(kwargs["model"], self.segments), self.mask)
            self.restore(*read_state(Path(state.best_model_checkpoint), self.state_name))
            if not self.masks.are_on():
                raise GraspError(
                    f"the weights are not those of {state.best_model_checkpoint}, so its masks do not fit them; "
                    "load that checkpoint, or train without load_best_model_at_end"
                )
        self._left = self.masks.checksums()

    @property
    def _most_pruned(self) -> float:
        """The highest ratio that it may prune at."""
        return self.prune_ratio

    def _revive(self, pairs: Mapping[str, LoraPair]) -> None:
        """Put stashed values back on the weights that they were taken from."""
        if self._masks is None or not self._masks.holds(pairs):
            return
        if self._masks.are_on() and self._left in (None, self._masks.checksums()):
            self._masks.commit(0.0)
        else:
            logger.warning("the adapter has changed since its last training; what was pruned then is not put back")

    def state(self) -> State:
        """Return the ratio and the masks with what they rest on."""
        return {"ratio": self.masks.ratio, "masked_by": self._masked_by()}, self.masks.state()

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up a state.

        Raises:
            GraspError: it does not fit this adapter or these settings.
        """
        now = self._masked_by()
        for name, begun in values.get("masked_by", {}).items():  # checkpoints of older versions do not tell
            if begun != now[name]:
                raise GraspError(
                    f"training began with {name} {begun!r} and resumes with {now[name]!r}; give it the same, or start anew"
                )
        try:
            self.masks.restore(tensors, values["ratio"])
        except ValueError as error:
            raise GraspError(str(error)) from error

    def _masked_by(self) -> dict[str, Any]:
        """What decides which weights are pruned, as it comes back from JSON; a ratio that is learned is no part of it."""
        score = self.mask.score
        segments = {module: [vars(one) for one in pair.segments] for module, pair in self.masks.pairs.items()}
        return {
            "prune_ratio": float(self.prune_ratio),
            "mode": self.mode,
            "mask.score": score if isinstance(score, str) else score.name,
            "segments of hash": hashlib.sha256(json.dumps(segments, sort_keys=True).encode()).hexdigest()[:16],
        }

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the gradients of held weights, once it is seen that there are any.

        Raises:
            GraspError: no LoRA weight has a gradient, so nothing would be trained.
        """
        super().on_pre_optimizer_step(args, state, control, **kwargs)
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


def _check_order(masks: MaskSet) -> None:
    """Refuse an adapter that was never trained: its weights of zero would be pruned by their position and stay so."""
    if not any(pair.acts for pair in masks.pairs.values()):
        raise GraspError(
            f"the adapter changes nothing: A or B is all zero in each of its {len(masks.pairs)} modules, as before training, so "
            "nothing says which weights matter; start from a trained or merged adapter"
        )


@torch.no_grad()
def _warn_of_zeros(pairs: Mapping[str, LoraPair]) -> None:
    """Warn of weights that another training has left pruned, as where a cell of a notebook runs again on the same model.

    Only weights that were trained under masks count: a merge may have zeros of its own, and so has a fresh B.
    """
    weights = [weight for pair in pairs.values() for weight in (pair.A, pair.B)]
    zeros = sum(int((weight == 0).sum()) for weight in weights if hasattr(weight, _UNDER_MASKS))
    if (share := zeros / sum(weight.numel() for weight in weights)) >= _MOST_ZEROS:
        logger.warning(
            "%.0f %% of the adapter's weights are zero already, left by an earlier training under masks; load the merge anew, "
            "unless that is meant",
            100 * share,
        )


def _check_best_can_be_put_back(model: torch.nn.Module, state: TrainerState) -> None:
    """Refuse where the Trainer would put back another adapter than is trained, or one whose masks are not saved."""
    name = active_adapter(model)
    if name != ADAPTER_NAME:
        raise GraspError(
            f"load_best_model_at_end puts back an adapter named {ADAPTER_NAME!r} only, and {name!r} is active; "
            "leave it out, or load yours without adapter_name"
        )
    if state.is_hyper_param_search:
        raise GraspError("load_best_model_at_end is not possible in a hyperparameter search, which saves no masks")


def _check_weights_are_whole() -> None:
    """Refuse what flattens, shards or partitions the weights that masks are laid on, or steps the optimizer by itself."""
    state = AcceleratorState()
    for plugin, name in (("deepspeed_plugin", "DeepSpeed"), ("fsdp_plugin", "FSDP by accelerate")):
        if getattr(state, plugin, None) is not None:
            raise GraspError(
                f"the trainer uses {name}, under which the weights that are masked are no longer whole; train with DDP (plain "
                "torchrun), and to split the backbone load it with distributed_config, as backbone.shard does"
            )


def _is_fraction(value: Any) -> bool:
    try:
        return not isinstance(value, str) and 0.0 <= float(value) <= 1.0
    except (TypeError, ValueError):
        return False
