"""A Trainer callback that keeps a LoRA adapter pruned at a fixed ratio: the final run. Paper: final run.

What happens when, in any Trainer:

    on_train_begin           prune at the ratio, or take up the masks of the checkpoint that training resumes from
    before clipping          mode `hold`: masked weights get no gradient, where `add_to` has registered with the trainer
    on_pre_optimizer_step    the same where nothing is clipped; with one ratio their moments stay zero, too
    on_optimizer_step        put the mask back on (`hold`), or choose it anew (`reselect`)
    on_save                  masks and stash go beside the checkpoint of the Trainer

`GraspController` is this callback with a ratio that moves.
"""

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grasp_lora.errors import GraspError
from grasp_lora.method.lora import LoraPair, Segment
from grasp_lora.method.masks import MASK_MODES, MaskSet, MaskSettings
from grasp_lora.method.rules import RatioEstimate
from grasp_lora.models.live import ADAPTER_NAME, active_adapter, live_factors, live_pairs
from grasp_lora.storage.checkpoints import State, checkpoint_at, read_state, write_state
from grasp_lora.text.display import quoted
from grasp_lora.training.probes import ProbeSet, calibrate

logger = logging.getLogger(__name__)


class SavedInCheckpoints(TrainerCallback):
    """A callback whose state is saved with any Trainer's checkpoints and taken up again when training resumes from one.

    A subclass names its files, gives its state, and asks for `saved_state` when training begins.
    """

    state_name: str

    @abstractmethod
    def state(self) -> State:
        """Return everything that a resume needs and the Trainer does not save."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the state beside what the Trainer has just saved."""
        if state.is_hyper_param_search:  # its checkpoints lie elsewhere, and it never resumes
            return
        content = self.state()  # on every process: it may gather what they hold apart
        if state.is_world_process_zero:
            write_state(checkpoint_at(Path(str(args.output_dir)), state.global_step), self.state_name, *content)

    def saved_state(self, args: TrainingArguments, state: TrainerState) -> State | None:
        """Return the state in the checkpoint that training resumes from, None where it starts at the beginning.

        Raises:
            GraspError: that checkpoint has none.
        """
        if not state.global_step:
            return None
        return read_state(checkpoint_at(Path(str(args.output_dir)), state.global_step), self.state_name)


class GradientCheck(TrainerCallback):
    """Has the gradients of a training's first optimizer step checked, before whatever masks them.

    They tell whether anything is trained, while a loss may fall or stand still for any reason.
    """

    _checked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin anew.

        Raises:
            GraspError: the adapter is frozen.
        """
        self._checked = False
        if not any(factor.requires_grad for factor in live_factors(kwargs["model"]).values()):
            raise no_gradients(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check once that some LoRA weight has a gradient that is not zero.

        An adapter that is zero throughout, pruned to nothing, passes: its exact gradient is zero.

        Raises:
            GraspError: there is none, so nothing would be trained; the message names the likely causes.
        """
        if self._checked:
            return
        factors = live_factors(kwargs["model"]).values()
        seen = any(factor.grad is not None and factor.grad.any() for factor in factors)
        if not seen and any(factor.detach().any() for factor in factors):
            raise no_gradients(kwargs["model"])
        self._checked = True


def no_gradients(model: torch.nn.Module) -> GraspError:
    """The error to raise where a loss has no gradient for any LoRA weight."""
    nothing = "no LoRA weight has a gradient, so nothing would be trained"
    if not any(factor.requires_grad for factor in live_factors(model).values()):
        return GraspError(
            f"{nothing}: the adapter is frozen: load it with is_trainable=True, or let its weights require gradients"
        )
    return GraspError(
        f"{nothing}; likely causes: gradient checkpointing whose inputs require no gradient (call "
        "model.enable_input_require_grads()), or a quantised backbone whose layers cut gradients (bitsandbytes' Linear4bit on a "
        "CPU needs support_avx512bf16_for_cpu = False; else load the backbone unquantised)"
    )


class PrunedTraining(GradientCheck, SavedInCheckpoints):
    """Train a LoRA adapter pruned at a fixed ratio.

    It is the model's active adapter, all of its factors A and B. What is trained beside LoRA, such as `modules_to_save`, stays
    whole and does not count in the ratio. With `load_best_model_at_end` the masks are those of the best checkpoint afterwards.

    Args:
        prune_ratio: fraction in [0, 1].
        calibration: examples on which scores that need inputs are measured.
        mask: the score.
        mode: `hold` keeps one mask, `reselect` selects the least important weights anew after every optimizer step.
        segments: module name -> origin of its rank-one components (`segments_of` a merged adapter); each adapter's weights
            compete among themselves.

    Raises:
        ValueError: the mode is unknown, or the ratio no fraction.
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
        if mode not in MASK_MODES or isinstance(prune_ratio, str | RatioEstimate) or not 0.0 <= prune_ratio <= 1.0:
            raise ValueError(
                f"prune_ratio is {quoted(prune_ratio)} and mode {mode!r}; give a fraction in [0, 1], such as learned.ratio, and "
                f"{' or '.join(MASK_MODES)}"
            )
        self.prune_ratio = prune_ratio
        self.calibration = calibration
        self.mask = mask or MaskSettings()
        self.mode = mode
        self.segments = segments
        self._masks: MaskSet | None = None
        self._left: list[int] | None = None  # checksums of the weights at the end of a training
        self._before_clipping = False

    def add_to(self, trainer: Trainer) -> Self:
        """Register with a trainer, so that it clips by the norm of what is trained; `add_callback` alone masks later."""
        trainer.add_callback(self)
        clip: Any = trainer._clip_grad_norm

        def clip_kept(model: torch.nn.Module) -> Any:
            if self.mode == "hold" and self in trainer.callback_handler.callbacks:
                self.masks.mask_gradients()
            return clip(model)

        trainer._clip_grad_norm = clip_kept  # type: ignore[method-assign]  # no callback is called before it clips
        self._before_clipping = True
        return self

    @property
    def masks(self) -> MaskSet:
        """The live mask set; there is one from the beginning of training on.

        It is that of the last step: count zeros of the weights (`survival`) where `finetune` put an earlier step back.
        """
        assert self._masks is not None, "training has not begun, so there are no masks yet"
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
        _check_trainer(args, kwargs["model"])
        super().on_train_begin(args, state, control, **kwargs)
        pairs = live_pairs(kwargs["model"], self.segments)
        if saved := self.saved_state(args, state):
            self._mask(pairs)
            self.restore(*saved)
            self._check_masks_fit(f"{args.output_dir}/checkpoint-{state.global_step}")
            return
        if self._masks is not None and self._masks.holds(pairs):
            if self._masks.are_on() and self._left in (None, self._masks.checksums()):
                self._masks.commit(0.0)
            else:
                logger.warning("the adapter has changed since its last training; what was pruned then is not put back")
        self._mask(pairs)
        if self.mode == "hold" and self._most_pruned > 0.0:
            _check_order(self.masks)
            if args.max_grad_norm and not self._before_clipping:
                logger.warning("gradients of pruned weights count where the trainer clips; use add_to(trainer) instead")
        calibrate(kwargs["model"], self.masks, self.calibration)
        if self.mode == "reselect":
            self.masks.reselect(self.prune_ratio)
        else:
            self.masks.commit(self.prune_ratio)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the gradients of held weights, once it is seen that there are any.

        Raises:
            GraspError: no LoRA weight has a gradient, so nothing would be trained.
        """
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        if self.mode == "hold" and not (self._before_clipping and args.max_grad_norm):
            self.masks.mask_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the mask back on."""
        if self.mode == "hold":
            self.masks.enforce()
        else:
            self.masks.reselect(self.prune_ratio)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the masks of the best checkpoint where the trainer has put its weights back.

        Raises:
            GraspError: they do not belong to the weights.
        """
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            PartialState().wait_for_everyone()  # the first process may be writing it
            self._mask(live_pairs(kwargs["model"], self.segments))
            self.restore(*read_state(Path(state.best_model_checkpoint), self.state_name))
            self._check_masks_fit(state.best_model_checkpoint)
        self._left = self.masks.checksums()

    def state(self) -> State:
        """Return the ratio and the masks with what they rest on."""
        return {"ratio": self.masks.ratio, "decided_by": self._decided_by()}, self.masks.state()

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up a state.

        Raises:
            GraspError: it does not fit this adapter or these settings.
        """
        now = json.loads(json.dumps(self._decided_by()))
        for name, begun in values["decided_by"].items():
            if begun != now.get(name):
                raise GraspError(
                    f"training began with {name} {begun!r} and resumes with {now.get(name)!r}; give it the same, or start anew"
                )
        self.masks.restore(tensors, values["ratio"])

    @property
    def _most_pruned(self) -> float:
        """The highest ratio that it may prune at."""
        return self.prune_ratio

    def _decided_by(self) -> dict[str, Any]:
        """What decides which weights are pruned, by names for a message; as plain values."""
        score = self.mask.score
        segments = {module: [vars(segment) for segment in pair.segments] for module, pair in self.masks.pairs.items()}
        return {
            "prune_ratio": float(self.prune_ratio),
            "mode": self.mode,
            "mask.score": score if isinstance(score, str) else score.name,
            "segments of hash": hashlib.sha256(json.dumps(segments, sort_keys=True).encode()).hexdigest()[:16],
        }

    def _mask(self, pairs: Mapping[str, LoraPair]) -> None:
        self._masks = MaskSet(pairs, self.mask)
        self._left = None

    def _check_masks_fit(self, checkpoint: str) -> None:
        if not self.masks.are_on():
            raise GraspError(
                f"the weights are not those of {checkpoint}, so its masks do not fit them; resume from that checkpoint, within "
                "the folder that training began in"
            )


def _check_order(masks: MaskSet) -> None:
    """Refuse an adapter that was never trained: its weights of zero would be pruned by their position and stay so."""
    if not any(pair.acts for pair in masks.pairs.values()):
        raise GraspError(
            f"the adapter changes nothing: A or B is all zero in each of its {len(masks.pairs)} modules, as before training, so "
            "nothing says which weights matter; start from a trained or merged adapter"
        )


def _check_trainer(args: TrainingArguments, model: torch.nn.Module) -> None:
    """Refuse a trainer that flattens, shards or partitions the weights that masks are laid on, or would put back others."""
    state = AcceleratorState()
    for plugin, name in (("deepspeed_plugin", "DeepSpeed"), ("fsdp_plugin", "FSDP by accelerate")):
        if getattr(state, plugin, None) is not None:
            raise GraspError(
                f"the trainer uses {name}, under which the weights that are masked are no longer whole; train with DDP (plain "
                "torchrun), and to split the backbone load it with distributed_config, as backbone.shard does"
            )
    if args.load_best_model_at_end and active_adapter(model) != ADAPTER_NAME:
        raise GraspError(
            f"load_best_model_at_end puts back an adapter named {ADAPTER_NAME!r} only, and {active_adapter(model)!r} is active; "
            "leave it out, or load yours without adapter_name"
        )
