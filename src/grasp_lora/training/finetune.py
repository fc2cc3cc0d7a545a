"""One fine-tune: an adapter on a backbone, examples, callbacks; out comes the adapter at its best dev loss.

The loop is transformers' Trainer with logits at label positions only and the loss of `loss`, also under gradient accumulation:
each optimizer step follows the mean over all its examples. With checkpoints an interrupted fine-tune goes on to the same bits as
an uninterrupted one.
"""

import logging
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from grasp_lora.errors import DataError, DivergedError, GraspError
from grasp_lora.models.backbone import is_quantised, without_peft
from grasp_lora.models.live import live_factors
from grasp_lora.storage.checkpoints import Checkpointing, State, newest_checkpoint, remove_checkpoints
from grasp_lora.storage.files import clear_write_errors, write_jsonl
from grasp_lora.storage.memory import enough_memory
from grasp_lora.training.gradients import GradientCheck
from grasp_lora.training.loss import Encoded, check_measurable, collate
from grasp_lora.training.probes import ProbeSet
from grasp_lora.training.saved import SavedInCheckpoints
from grasp_lora.training.settings import TrainingSettings
from grasp_lora.training.trackers import own_tracked_run
from grasp_lora.training.trainer import FineTuneTrainer, Saving

if TYPE_CHECKING:
    from peft import PeftModel

    from grasp_lora.training.controller import GraspController

logger = logging.getLogger(__name__)


class LossRow(TypedDict):
    """One line of `history.jsonl`: a training loss, the mean since the last such row, or a dev loss."""

    step: int
    epoch: float
    loss: NotRequired[float]
    dev_loss: NotRequired[float]


@dataclass(frozen=True)
class FineTuneResult:
    """What one fine-tune did.

    Args:
        steps: optimizer steps taken.
        best_step: the step whose adapter the model holds now, 0 for the untrained one.
        dev_loss: dev loss at `best_step`, None without a dev set.
        history: losses, in the order of steps.
    """

    steps: int
    best_step: int
    dev_loss: float | None
    history: list[LossRow] = field(default_factory=list)


class BestOnDev(SavedInCheckpoints):
    """Measures the dev loss, keeps the best adapter in memory and stops when it no longer improves.

    The untrained adapter counts as well: a merge that training only makes worse is kept as it was.
    """

    state_name = "dev"

    def __init__(self, dev: ProbeSet, settings: TrainingSettings, evaluate_steps: int) -> None:
        self.dev = dev
        self.patience = settings.patience
        self.evaluate_steps = evaluate_steps
        self.best_loss = math.inf
        self.best_step = 0
        self.history: list[LossRow] = []
        self._best: dict[str, Tensor] = {}
        self._bad = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the adapter before training, or take up what was measured so far."""
        if saved := self.saved_state(args, state):
            values, self._best = saved
            self.best_loss, self.best_step, self._bad = values["loss"], values["step"], values["bad"]
            self.history = values["history"]
        else:
            self._evaluate(kwargs["model"], state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure when it is due; stop when patience has run out."""
        if state.global_step % self.evaluate_steps and state.global_step != state.max_steps:
            return
        self._evaluate(kwargs["model"], state)
        if self.patience is not None and self._bad >= self.patience:
            control.should_training_stop = True

    def state(self) -> State:
        """Return the best adapter, its loss and all measurements."""
        values = {"loss": self.best_loss, "step": self.best_step, "bad": self._bad, "history": self.history}
        return values, dict(self._best)

    def restore(self, model: torch.nn.Module) -> None:
        """Put the best adapter back into the model."""
        with torch.no_grad():
            for name, factor in live_factors(model).items():
                factor.copy_(self._best[name])

    def _evaluate(self, model: torch.nn.Module, state: TrainerState) -> None:
        loss = fmean(self.dev.losses(model))
        self.history.append({"step": state.global_step, "epoch": float(state.epoch or 0.0), "dev_loss": loss})
        if loss < self.best_loss:
            self.best_loss, self.best_step, self._bad = loss, state.global_step, 0
            self._best = {name: factor.detach().clone() for name, factor in live_factors(model).items()}
        else:
            self._bad += 1


class _Watch(TrainerCallback):
    """Stops a training whose loss is not finite, and reports its progress."""

    def __init__(self, report: Callable[[dict[str, float]], None] | None) -> None:
        self._report = report

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        # Each few steps, and the mean of the whole run at its end.
        for name in {"loss", "train_loss"} & set(logs or ()):
            if not math.isfinite(logs[name]):
                raise DivergedError(
                    f"the training loss is {logs[name]} at step {state.global_step}; "
                    f"lower the learning rate (now {args.learning_rate})"
                )
        if self._report is not None and logs and "loss" in logs:
            self._report(
                {"step": state.global_step, "steps": state.max_steps, "epoch": state.epoch or 0.0, "loss": logs["loss"]}
            )


def finetune(
    model: "PeftModel",
    train: Sequence[Encoded],
    dev: Sequence[Encoded],
    settings: TrainingSettings,
    *,
    pad_id: int,
    seed: int,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    controller: "GraspController | None" = None,
    report_to: Sequence[str] = (),
    on_step: Callable[[dict[str, float]], None] | None = None,
    checkpoints: Checkpointing | None = None,
) -> FineTuneResult:
    """Train the model's LoRA adapter in place and leave it at its best dev loss.

    Args:
        model: PEFT model with one trainable LoRA adapter.
        train: training examples, at least one.
        dev: examples for early stopping and the choice of the best step; empty for none.
        settings: epochs, batch, learning rate and the rest.
        pad_id: token id for padding.
        seed: of dropout and the order of examples.
        folder: `history.jsonl` is written there, by the first process only.
        callbacks: such as `PrunedTraining`; they and the controller act before the dev loss is measured.
        controller: a `GraspController`, registered with the trainer so that trackers see its rounds.
        report_to: trackers of transformers, none by default.
        on_step: called with step, steps, epoch and loss every few steps, for a progress display.
        checkpoints: when to save `folder`/checkpoint-STEP; training goes on from the newest whole one that is there, which has
            to be of these same arguments, and leaves them for the caller to remove once the result is safe
            (`remove_checkpoints`). None saves and resumes nothing.

    Raises:
        DataError: there are no training examples, or one has no prompt or no answer.
        GraspError: no LoRA weight has a gradient; the loss or a weight became NaN or infinite; the memory does not suffice; or
            the folder cannot be written.
        Interrupted: `checkpoints` asked for a stop, and a checkpoint was saved.
    """
    if not train:
        raise DataError("there are no training examples; at least one is needed")
    check_measurable(train)
    arguments = TrainingArguments(
        output_dir=str(folder),
        run_name=f"{folder.name} {folder.parent.name}",  # of an experiment: the step and its key
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=settings.gradient_checkpointing,
        optim="adamw_torch",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        report_to=list(report_to) or "none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=next(model.parameters()).is_cuda,
        use_cpu=next(model.parameters()).device.type == "cpu",
        seed=seed,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else one process would use them all through DataParallel; torchrun is the way to several
    steps_per_epoch = settings.steps_per_epoch(math.ceil(len(train) / arguments.world_size))
    arguments.logging_steps = max(1, min(10, steps_per_epoch // 5))
    best, resumed = None, None
    with (
        leaving_backbone_as_it_was(model),
        own_tracked_run(report_to),
        clear_write_errors(folder) if checkpoints else nullcontext(),
        enough_memory("the training", _less_memory(model, train, settings)),
    ):
        trainer = FineTuneTrainer(
            lr_decay=settings.lr_decay,
            model=model,
            args=arguments,
            train_dataset=list(train),
            data_collator=lambda examples: collate(examples, pad_id),
            callbacks=[_Watch(on_step), GradientCheck(), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)  # it prints; progress is shown by whoever passes `on_step`
        if controller is not None:
            controller.add_to(trainer)
        if dev:  # after the callbacks that prune, so that it measures and keeps pruned weights
            best = BestOnDev(ProbeSet(dev, pad_id), settings, settings.evaluate_steps(steps_per_epoch))
            trainer.add_callback(best)
        if checkpoints is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with arguments.main_process_first(local=False):  # it removes what is not whole
                resumed = newest_checkpoint(folder)
                if resumed and len(list(resumed.glob("rng_state*.pth"))) != arguments.world_size:
                    logger.warning("%s was saved by another number of processes; the training begins anew", resumed)
                    remove_checkpoints(folder)
                    resumed = None
            every = checkpoints.steps_between(
                steps_per_epoch, settings.steps(math.ceil(len(train) / arguments.world_size))
            )
            trainer.add_callback(Saving(trainer, checkpoints, every, resumed))
        try:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        except pickle.UnpicklingError as error:  # the Trainer's own files are loaded with weights_only
            raise GraspError(f"{resumed} holds a file that is unsafe to load; remove it to start anew") from error
    steps = trainer.state.global_step
    if not all(torch.isfinite(factor).all() for factor in live_factors(model).values()):
        raise DivergedError(
            f"the adapter's weights are no longer finite at step {steps}; "
            f"lower the learning rate (now {settings.learning_rate})"
        )
    history: list[LossRow] = [
        {"step": int(row["step"]), "epoch": row["epoch"], "loss": row["loss"]}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    best_step, dev_loss = steps, None
    if best is not None:
        history = sorted(history + best.history, key=lambda row: row["step"])
        if settings.keep == "best":
            best.restore(model)
            best_step, dev_loss = best.best_step, best.best_loss
        else:
            dev_loss = best.history[-1]["dev_loss"]
    if trainer.is_world_process_zero():
        write_jsonl(folder / "history.jsonl", history)
    return FineTuneResult(steps, best_step, dev_loss, history)


def _less_memory(model: torch.nn.Module, train: Sequence[Encoded], settings: TrainingSettings) -> str:
    """Say which settings would let a training take less memory, those first that leave its result as it is."""
    longest = max(len(example.prompt_ids) + len(example.completion_ids) for example in train)
    ways = ["set this training's gradient_checkpointing to true"] if not settings.gradient_checkpointing else []
    if settings.batch_size > 1:
        ways.append(f"lower this training's batch_size (now {settings.batch_size}) and raise its accumulation as much")
    ways.append(f"lower data.max_tokens (the longest example has {longest} tokens)")
    if next(model.parameters()).dtype == torch.float32:
        ways.append("set backbone.dtype to bfloat16")
    if not is_quantised(without_peft(model).config):
        ways.append("set backbone.quantise to nf4")
    return ", or ".join(ways)


@contextmanager
def leaving_backbone_as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Undo what a Trainer leaves behind: training mode, a config without cache, checkpointing, transformers' log level."""
    backbone = without_peft(model)
    training = [(module, module.training) for module in model.modules()]
    # The config of a model with parts, such as Gemma 3 with images, has no such attribute until the Trainer sets it.
    had_use_cache, use_cache = hasattr(backbone.config, "use_cache"), getattr(backbone.config, "use_cache", None)
    checkpointing = backbone.is_activation_checkpointing
    verbosity = transformers_logging.get_verbosity()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        if had_use_cache:
            backbone.config.use_cache = use_cache
        elif hasattr(backbone.config, "use_cache"):
            del backbone.config.use_cache
        if backbone.is_activation_checkpointing and not checkpointing:
            backbone.activation_checkpointing_disable()
            backbone.disable_input_require_grads()
        transformers_logging.set_verbosity(verbosity)
