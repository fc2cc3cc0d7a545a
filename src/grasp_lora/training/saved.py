"""Callbacks whose state is saved with a Trainer's checkpoints."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grasp_lora.method.masks import WeightKey
from grasp_lora.storage.checkpoints import State, checkpoint_at, read_state, write_state


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
        content = self.state()  # on every process: sharded tensors are gathered
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


def named(prefix: str, tensors: Mapping[WeightKey, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the factors by the names that they have in a checkpoint."""
    return {f"{prefix}{factor}.{module}": tensor for (module, factor), tensor in tensors.items()}


def of_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[WeightKey, torch.Tensor]:
    """What `named` named, among other tensors."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            factor, module = name.removeprefix(prefix).split(".", 1)
            found[module, factor] = tensor
    return found
