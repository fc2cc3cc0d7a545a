"""transformers' Trainer with this project's loss, learning-rate schedule and checkpoints."""

import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from grasp_lora.errors import GraspError, Interrupted
from grasp_lora.models.backbone import supports_logits_to_keep
from grasp_lora.storage.checkpoints import Checkpointing, State, checkpoint_at, complete, seconds_of
from grasp_lora.storage.files import cannot_write, vanished
from grasp_lora.text.display import first_line
from grasp_lora.training.gradients import no_gradients
from grasp_lora.training.loss import example_losses
from grasp_lora.training.saved import SavedInCheckpoints

WEIGHTS = "weights.safetensors"  # of a checkpoint: every trained parameter as it is


class FineTuneTrainer(Trainer):
    """The Trainer with this project's loss and learning-rate schedule.

    Several processes share the examples of each optimizer step, as accelerate deals them out.

    Args:
        lr_decay: factor on the learning rate after each epoch.
        kwargs: of transformers' Trainer.
    """

    def __init__(self, *, lr_decay: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss_is_scaled_for_ga = True
        self.lr_decay = lr_decay
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

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Multiply the learning rate by `lr_decay` after every epoch."""
        if self.lr_scheduler is None:
            # Not num_training_steps / epochs, which is rounded up where the epochs are a fraction.
            examples = len(self.train_dataset)  # type: ignore[arg-type]  # a list here
            batches = math.ceil(examples / (self.args.per_device_train_batch_size * self.args.world_size))
            per_epoch = math.ceil(batches / self.args.gradient_accumulation_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer if optimizer is not None else self.optimizer,  # type: ignore[arg-type]
                lambda step: self.lr_decay ** (step // per_epoch),
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


class Saving(SavedInCheckpoints):
    """Has checkpoints saved, completes them, and stops the training after one where that is asked for.

    It is the trainer's last callback, so that the others have written their state before a checkpoint is completed.
    """

    state_name = "loss"

    def __init__(self, trainer: FineTuneTrainer, settings: Checkpointing, every: int, resumed: Path | None) -> None:
        self._trainer, self._settings, self._every = trainer, settings, every
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
        self._stop = self._settings.stop_requested()
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
                f"stopped by {self._stop} at {checkpoint.parent.name} step {state.global_step}; "
                "run the same command again to go on"
            )
