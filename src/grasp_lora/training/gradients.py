"""Whether a training trains anything: the first gradients tell, while a loss may fall or stand still for any reason."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grasp_lora.errors import GraspError
from grasp_lora.models.live import live_factors


def check_gradients(model: torch.nn.Module) -> None:
    """Check after a backward pass, before gradients are masked, that some LoRA weight has a gradient that is not zero.

    An adapter that is zero throughout, pruned to nothing, passes: its exact gradient is zero.

    Raises:
        GraspError: there is none, so nothing would be trained; the message names the likely causes.
    """
    factors = live_factors(model).values()
    if any(factor.grad is not None and _has_values(factor.grad) for factor in factors):
        return
    if not any(factor.requires_grad for factor in factors) or any(_has_values(factor.detach()) for factor in factors):
        raise no_gradients(model)


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


class GradientCheck(TrainerCallback):
    """Has the gradients of a training's first optimizer step checked; to be added before whatever masks gradients."""

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
        """Check once, see `check_gradients`."""
        if not self._checked:
            check_gradients(kwargs["model"])
            self._checked = True


def _has_values(tensor: torch.Tensor) -> bool:
    return bool((tensor != 0).any())
