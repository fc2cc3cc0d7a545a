"""Callbacks whose state is saved with a Trainer's checkpoints."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
