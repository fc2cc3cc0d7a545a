"""One fine-tune: an adapter on a backbone, examples, callbacks; out comes the adapter at its best dev loss.

The loop is transformers' Trainer with logits at label positions only and the loss of `probing`, also under gradient
accumulation: each optimizer step follows the mean over all its examples.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from grasp_lora.errors import DataError, GraspError
from grasp_lora.training.adapters import live_pairs
from grasp_lora.training.backbone import without_peft
from grasp_lora.training.probing import (
    Encoded,
    ProbeSet,
    check_measurable,
    collate,
    example_losses,
    takes_label_positions,
)
from grasp_lora.training.settings import TrainingSettings

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FineTuneResult:
    """What one fine-tune did.

    Args:
        steps: optimizer steps taken.
        best_step: the step whose adapter the model holds now, 0 for the untrained one.
        dev_loss: dev loss at `best_step`, None without a dev set.
        history: rows of step, epoch and loss or dev_loss, in order.
    """

    steps: int
    best_step: int
    dev_loss: float | None
    history: list[dict[str, float]] = field(default_factory=list)


class FineTuneTrainer(Trainer):
    """The Trainer with this project's loss and learning-rate schedule.

    Args:
        lr_decay: factor on the learning rate after each epoch.
        kwargs: of transformers' Trainer.
    """

    def __init__(self, *, lr_decay: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss_is_scaled_for_ga = True
        self.lr_decay = lr_decay
        self._examples_per_rank = torch.ones(())
        self._label_positions = takes_label_positions(kwargs["model"])

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Count the examples of an optimizer step, to weigh each of them alike."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(float(sum(len(batch["labels"]) for batch in samples)), device=device)
        # DDP averages the gradients of the ranks, so all of them divide by the same number.
        self._examples_per_rank = self.accelerator.reduce(count, "mean")
        return samples, items

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this batch's share of the mean example loss of the optimizer step."""
        losses = example_losses(model, inputs, label_positions=self._label_positions)
        return losses.sum() / self._examples_per_rank

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


class BestOnDev(TrainerCallback):
    """Measures the dev loss, keeps the best adapter in memory and stops when it no longer improves.

    The untrained adapter counts as well: a merge that training only makes worse is kept as it was.
    """

    def __init__(self, dev: ProbeSet, settings: TrainingSettings, evaluate_steps: int) -> None:
        self.dev = dev
        self.patience = settings.patience
        self.evaluate_steps = evaluate_steps
        self.best_loss = math.inf
        self.best_step = 0
        self.history: list[dict[str, float]] = []
        self._best: dict[str, tuple[Tensor, Tensor]] = {}
        self._bad = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the adapter before training."""
        self._evaluate(kwargs["model"], state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure when it is due; stop when patience has run out."""
        if state.global_step % self.evaluate_steps and state.global_step != state.max_steps:
            return
        self._evaluate(kwargs["model"], state)
        if self.patience is not None and self._bad >= self.patience:
            control.should_training_stop = True

    def restore(self, model: torch.nn.Module) -> None:
        """Put the best adapter back into the model."""
        with torch.no_grad():
            for name, pair in live_pairs(model).items():
                pair.A.copy_(self._best[name][0])
                pair.B.copy_(self._best[name][1])

    def _evaluate(self, model: torch.nn.Module, state: TrainerState) -> None:
        losses = self.dev.losses(model)
        loss = math.fsum(losses) / len(losses)
        self.history.append({"step": state.global_step, "epoch": float(state.epoch or 0.0), "dev_loss": loss})
        if loss < self.best_loss:
            self.best_loss, self.best_step, self._bad = loss, state.global_step, 0
            self._best = {
                name: (pair.A.detach().clone(), pair.B.detach().clone()) for name, pair in live_pairs(model).items()
            }
        else:
            self._bad += 1


class _FiniteLoss(TrainerCallback):
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        for name in ("loss", "train_loss"):  # each few steps, and the mean of the whole run at its end
            if logs and not math.isfinite(logs.get(name, 0.0)):
                raise GraspError(
                    f"the training loss is {logs[name]} at step {state.global_step}; "
                    f"lower the learning rate (now {args.learning_rate})"
                )


class _Progress(TrainerCallback):
    def __init__(self, report: Callable[[dict[str, float]], None]) -> None:
        self._report = report

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
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
    controller: Any = None,
    report_to: Sequence[str] = (),
    on_step: Callable[[dict[str, float]], None] | None = None,
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

    Raises:
        DataError: there are no training examples, or one has no prompt or no answer.
        GraspError: the loss or a weight became NaN or infinite.
    """
    if not train:
        raise DataError("there are no training examples; at least one is needed")
    check_measurable(train)
    arguments = TrainingArguments(
        output_dir=str(folder),
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
    on_dev = None
    with _leaving_backbone_as_it_was(model):
        trainer = FineTuneTrainer(
            lr_decay=settings.lr_decay,
            model=model,
            args=arguments,
            train_dataset=list(train),
            data_collator=lambda examples: collate(examples, pad_id),
            callbacks=[_FiniteLoss(), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)  # it prints; progress is shown by whoever passes `on_step`
        if controller is not None:
            controller.add_to(trainer)
        if dev:  # after the callbacks that prune, so that it measures and keeps pruned weights
            evaluate_steps = max(1, round(settings.evaluate_every * steps_per_epoch))
            on_dev = BestOnDev(ProbeSet(dev, pad_id), settings, evaluate_steps)
            trainer.add_callback(on_dev)
        if on_step is not None:
            trainer.add_callback(_Progress(on_step))
        trainer.train()
    steps = trainer.state.global_step
    if not all(torch.isfinite(factor).all() for pair in live_pairs(model).values() for factor in (pair.A, pair.B)):
        raise GraspError(
            f"the adapter's weights are no longer finite at step {steps}; "
            f"lower the learning rate (now {settings.learning_rate})"
        )
    history = [
        {"step": row["step"], "epoch": row["epoch"], "loss": row["loss"]}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    best_step, dev_loss = steps, None
    if on_dev is not None:
        history = sorted(history + on_dev.history, key=lambda row: row["step"])
        if settings.keep == "best":
            on_dev.restore(model)
            best_step, dev_loss = on_dev.best_step, on_dev.best_loss
        else:
            dev_loss = on_dev.history[-1]["dev_loss"]
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
    return FineTuneResult(steps, best_step, dev_loss, history)


@contextmanager
def _leaving_backbone_as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Undo what a Trainer leaves behind: training mode, a config without cache, checkpointing, transformers' log level."""
    backbone = without_peft(model)
    training = [(module, module.training) for module in model.modules()]
    use_cache, checkpointing = backbone.config.use_cache, backbone.is_activation_checkpointing
    verbosity = transformers_logging.get_verbosity()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        backbone.config.use_cache = use_cache
        if backbone.is_activation_checkpointing and not checkpointing:
            backbone.activation_checkpointing_disable()
            backbone.disable_input_require_grads()
        transformers_logging.set_verbosity(verbosity)
