"""One fine-tune: an adapter on a backbone, examples, callbacks; out comes the adapter at its best dev loss, or at its end.

`finetune` builds a `FineTuneTrainer` and calls its `train`. That is transformers' Trainer with the loss of `models.loss`, a
learning rate that falls each epoch, and checkpoints that count only when they are whole. Each optimizer step follows the mean
over all its examples, also under gradient accumulation. What else happens in a training are callbacks, in this order:

    _Watch            progress, and an end where the loss is not finite
    GradientCheck     an end where no weight of the adapter has a gradient
    PrunedTraining    or GraspController: the masks
    BestOnDev         the dev loss, the best adapter, early stopping
    Saving            checkpoints, and the stop that a signal asks for

A fine-tune that was interrupted goes on from its newest whole checkpoint, to the same bits as an uninterrupted one. The Trainer
puts back weights, optimizer, schedule and random state, and skips the rows that were seen; each callback puts back its own.
"""

import importlib
import logging
import math
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from grasp_lora.errors import DivergedError, GraspError, Interrupted
from grasp_lora.models.backbone import is_quantised, supports_logits_to_keep, without_peft
from grasp_lora.models.live import live_factors
from grasp_lora.models.loss import Encoded, check_measurable, collate, example_losses
from grasp_lora.storage.checkpoints import (
    State,
    checkpoint_at,
    complete,
    newest_checkpoint,
    remove_checkpoints,
    seconds_of,
    steps_between,
)
from grasp_lora.storage.memory import enough_memory
from grasp_lora.storage.writing import cannot_write, clear_write_errors, vanished, write_jsonl
from grasp_lora.text.display import first_line
from grasp_lora.training.probes import ProbeSet
from grasp_lora.training.pruned import GradientCheck, PrunedTraining, SavedInCheckpoints, no_gradients
from grasp_lora.training.training_settings import TrainingSettings

if TYPE_CHECKING:
    from peft import PeftModel

    from grasp_lora.training.controller import GraspController

logger = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"  # of a checkpoint: every trained parameter as it is


@dataclass(frozen=True)
class FineTuneResult:
    """What one fine-tune did.

    Args:
        steps: optimizer steps taken.
        best_step: the step whose adapter the model holds now, 0 for the untrained one.
        dev_loss: dev loss at `best_step`, None where no dev rows were looked at.
        history: the lines of `history.jsonl`, in the order of steps: step, epoch, and a training loss, the mean since the last
            such line (`loss`), or a dev loss (`dev_loss`).
    """

    steps: int
    best_step: int
    dev_loss: float | None
    history: list[dict[str, float]] = field(default_factory=list)


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
    stop_requested: Callable[[], str | None] | None = None,
    name: str | None = None,
) -> FineTuneResult:
    """Train the model's LoRA adapter in place and leave it at its best dev loss, without dev rows or patience at its end.

    Args:
        model: PEFT model with one trainable LoRA adapter.
        train: training examples, at least one.
        dev: examples for early stopping and the choice of the best step; not looked at where `settings.patience` is None.
        settings: epochs, batch, learning rate and the rest.
        pad_id: token id for padding.
        seed: of dropout and the order of examples.
        folder: of the step, its `work/`; `history.jsonl` is written there, by the first process only.
        callbacks: such as `PrunedTraining`; they and the controller act before the dev loss is measured.
        controller: a `GraspController`, registered with the trainer so that trackers see its rounds.
        report_to: trackers of transformers, none by default.
        on_step: called with step, steps, epoch and loss every few steps, for a progress display.
        stop_requested: asked after each step; names what wants the training to stop there, such as SIGTERM, or gives None.
            With it `folder`/checkpoint-STEP are saved. Training goes on from the newest whole one that is there, which has to be
            of these same arguments, and leaves them for the caller to remove once the result is safe (`remove_checkpoints`).
            Without it nothing is saved or resumed.
        name: of the training, for trackers and where a signal stops it; None takes that of the folder.

    Raises:
        DataError: there are no training examples, or one has no prompt or no answer.
        GraspError: no LoRA weight has a gradient; the loss or a weight became NaN or infinite; memory runs out; or
            the folder cannot be written.
        Interrupted: a stop was requested, and a checkpoint was saved.
    """
    check_measurable(train)
    arguments = _arguments(model, settings, folder, seed, report_to, name or folder.name)
    steps_per_epoch = settings.steps_per_epoch(math.ceil(len(train) / arguments.world_size))
    arguments.logging_steps = max(1, min(10, steps_per_epoch // 5))
    best, resumed = None, None
    with (
        leaving_backbone_as_it_was(model),
        own_tracked_run(report_to),
        clear_write_errors(folder) if stop_requested else nullcontext(),
        enough_memory("the training", _less_memory(model, train, settings)),
    ):
        trainer = FineTuneTrainer(
            steps_per_epoch=steps_per_epoch,
            lr_decay=settings.lr_decay,
            model=model,
            args=arguments,
            train_dataset=list(train),
            data_collator=lambda examples: collate(examples, pad_id),
            callbacks=[_Watch(on_step), GradientCheck()],
        )
        trainer.remove_callback(PrinterCallback)  # it prints; progress is shown by whoever passes `on_step`
        for callback in (*callbacks, *([controller] if controller else [])):
            if isinstance(callback, PrunedTraining):
                callback.add_to(trainer)
            else:
                trainer.add_callback(callback)
        if dev and settings.patience:  # after the callbacks that prune, so that it measures and keeps pruned weights
            best = BestOnDev(ProbeSet(dev), settings.patience, settings.evaluate_steps(steps_per_epoch))
            trainer.add_callback(best)
        if stop_requested is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with arguments.main_process_first(local=False):  # it removes what is not whole
                resumed = newest_checkpoint(folder)
                if resumed and len(list(resumed.glob("rng_state*.pth"))) != arguments.world_size:
                    logger.warning("%s was saved by another number of processes; the training begins anew", resumed)
                    remove_checkpoints(folder)
                    resumed = None
            every = steps_between(steps_per_epoch, settings.steps(math.ceil(len(train) / arguments.world_size)))
            trainer.add_callback(Saving(trainer, stop_requested, every, resumed))
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
    history: list[dict[str, float]] = [
        {"step": int(row["step"]), "epoch": row["epoch"], "loss": row["loss"]}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    best_step, dev_loss = steps, None
    if best is not None:
        history = sorted(history + best.history, key=lambda row: row["step"])
        best.restore(model)
        best_step, dev_loss = best.best_step, best.best_loss
    if trainer.is_world_process_zero():
        write_jsonl(folder / "history.jsonl", history)
    return FineTuneResult(steps, best_step, dev_loss, history)


class FineTuneTrainer(Trainer):
    """The Trainer with this project's loss and learning-rate schedule.

    Several processes share the examples of each optimizer step, as accelerate deals them out.

    Args:
        steps_per_epoch: optimizer steps.
        lr_decay: factor on the learning rate after each epoch.
        kwargs: of transformers' Trainer.
    """

    def __init__(self, *, steps_per_epoch: int = 1, lr_decay: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss_is_scaled_for_ga = True
        self.steps_per_epoch, self.lr_decay = steps_per_epoch, lr_decay
        self._examples_per_rank = torch.ones(())
        self._label_positions = supports_logits_to_keep(kwargs["model"])

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Count the examples of an optimizer step, to weigh each of them alike."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(float(sum(len(batch["labels"]) for batch in samples)), device=device)
        # The gradients of the processes are averaged, so all of them divide by the same number.
        self._examples_per_rank = self.accelerator.reduce(count, "mean")
        return samples, items

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this batch's share of the mean example loss of the optimizer step.

        Raises:
            GraspError: it has no gradient.
        """
        losses = example_losses(model, inputs, label_positions=self._label_positions)
        if not losses.requires_grad:
            raise no_gradients(model)
        return losses.sum() / self._examples_per_rank.to(losses.dtype)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count none: nobody reads the sum, and counting the parameters anew takes 1 % of a step on a small model."""
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Multiply the learning rate by `lr_decay` after every epoch."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer if optimizer is not None else self.optimizer,  # type: ignore[arg-type]
                lambda step: self.lr_decay ** (step // self.steps_per_epoch),
            )
        return self.lr_scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters of a checkpoint; PEFT's own format would look up the backbone on the hub."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            save_file({name: value.detach().contiguous() for name, value in self._trained()}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        stored = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        if {name: tensor.shape for name, tensor in stored.items()} != {name: p.shape for name, p in self._trained()}:
            raise GraspError(f"{resume_from_checkpoint} is of another adapter; remove it to start anew")
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(stored[name])

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        if not folder.is_dir():  # it would be made again, with nothing but this checkpoint in it
            raise vanished(folder)
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:  # torch.save says only that it could not write, not why
            free = shutil.disk_usage(folder).free / 1e6
            raise cannot_write(folder, f"{first_line(error)}; {free:.1f} MB are free there") from error

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        model: torch.nn.Module = self.model  # type: ignore[assignment]  # it was given one
        return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


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


class BestOnDev(SavedInCheckpoints):
    """Measures the dev loss, keeps the best adapter in memory and stops when it no longer improves.

    The untrained adapter counts as well: a merge that training only makes worse is kept as it was.
    """

    state_name = "dev"

    def __init__(self, dev: ProbeSet, patience: int, evaluate_steps: int) -> None:
        self.dev = dev
        self.patience = patience
        self.evaluate_steps = evaluate_steps
        self.best_loss = math.inf
        self.best_step = 0
        self.history: list[dict[str, float]] = []
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
        if self._bad >= self.patience:
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


class Saving(SavedInCheckpoints):
    """Has checkpoints saved, completes them, and stops the training after one where that is asked for.

    It is the trainer's last callback, so that the others have written their state before a checkpoint is completed.
    """

    state_name = "loss"

    def __init__(
        self, trainer: FineTuneTrainer, stop_requested: Callable[[], str | None], every: int, resumed: Path | None
    ) -> None:
        self._trainer, self._stop_requested, self._every = trainer, stop_requested, every
        self._stop: str | None = None
        self._started = time.perf_counter() - (seconds_of(resumed) if resumed else 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the loss since it was last logged, the one thing of the loop that the Trainer does not save."""
        if saved := self.saved_state(args, state):
            values, tensors = saved
            self._trainer._tr_loss.copy_(tensors["sum"])
            self._trainer._globalstep_last_logged = values["logged"]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have a checkpoint saved when it is due or a stop is asked for."""
        if control.should_training_stop:  # the training is done, and what is done need not be resumed
            return
        self._stop = self._stop_requested()
        if args.world_size > 1:  # a signal need not reach all processes within the same step
            asked = signal.Signals[self._stop] if self._stop else 0
            latest = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(latest, torch.distributed.ReduceOp.MAX)
            self._stop = signal.Signals(int(latest)).name if latest else None
        if self._stop or state.global_step % self._every == 0:
            control.should_save = True

    def state(self) -> State:
        """Return the loss since it was last logged, the mean over the processes, and when that was."""
        loss = self._trainer.accelerator.reduce(self._trainer._tr_loss, "mean")
        return {"logged": self._trainer._globalstep_last_logged}, {"sum": loss}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete the checkpoint, and stop if that was asked for.

        Raises:
            Interrupted: the checkpoint is whole, and the training stops here.
        """
        super().on_save(args, state, control, **kwargs)
        checkpoint = checkpoint_at(Path(str(args.output_dir)), state.global_step)
        self._trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            complete(checkpoint, time.perf_counter() - self._started)
        self._trainer.accelerator.wait_for_everyone()  # one that ended now would have the others ended, too
        if self._stop:
            raise Interrupted(
                f"stopped by {self._stop} at {args.run_name} step {state.global_step}; "
                "run the same command again to go on"
            )


def _arguments(
    model: torch.nn.Module, settings: TrainingSettings, folder: Path, seed: int, report_to: Sequence[str], name: str
) -> TrainingArguments:
    """What the Trainer is told; it neither evaluates nor saves by itself, since `BestOnDev` and `Saving` do."""
    device = next(model.parameters()).device
    arguments = TrainingArguments(
        output_dir=str(folder),
        run_name=name,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
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
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        seed=seed,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else one process would use them all through DataParallel; torchrun is the way to several
    return arguments


def _less_memory(model: torch.nn.Module, train: Sequence[Encoded], settings: TrainingSettings) -> str:
    """Say which settings would let a training take less memory, those first that leave its result as it is."""
    longest = max(len(example.prompt_ids) + len(example.completion_ids) for example in train)
    ways = ["set backbone.gradient_checkpointing to true"] if not settings.gradient_checkpointing else []
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


@contextmanager
def own_tracked_run(report_to: Sequence[str]) -> Iterator[None]:
    """End the run that transformers begins at Weights & Biases and leaves open: the next training would write into it."""
    wandb = importlib.import_module("wandb") if "wandb" in report_to else None
    began_before = wandb is None or wandb.run is not None  # a script's own stays open
    try:
        yield
    finally:
        if wandb is not None and not began_before and wandb.run is not None:
            wandb.finish()
