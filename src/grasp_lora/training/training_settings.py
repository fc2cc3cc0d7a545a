"""Settings of a training, importable without torch so that the command line starts at once."""

import math
from dataclasses import dataclass, replace

from grasp_lora.text.checking import require

TRAINED_AS_MEASURED = 2  # forward passes that a training example counts as: the frozen backbone has no weight gradients
ANSWER_AS_MEASURED = 3  # about what an answer counts as, where the time left is told

MOST_EPOCHS = 10_000  # the rounds of a run are planned one by one


@dataclass(frozen=True)
class TrainingSettings:
    """How one adapter is trained.

    Args:
        epochs: passes over the training examples, in (0, 10000], fractions allowed.
        batch_size: examples in one forward pass, >= 1.
        accumulation: forward passes for one optimizer step, >= 1.
        learning_rate: of AdamW, > 0.
        lr_decay: factor on the learning rate after each epoch, in (0, 1].
        max_grad_norm: gradient clipping, 0 for none.
        patience: dev evaluations without a new best before training stops, >= 1. None makes none: all epochs are trained, and
            the last step is kept.
        evaluate_every: how far apart dev evaluations are, in epochs: 1 is once an epoch, 0.5 twice; in (0, 1].
        gradient_checkpointing: trade time for memory.

    Raises:
        ValueError: a setting is outside its range.

    Paper: AdamW lr 1e-4, weight decay 0, lr times 0.85 an epoch, 10 epochs, patience 3, batch 1 with 8 accumulation steps.
    """

    epochs: float = 5.0
    batch_size: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-4
    lr_decay: float = 0.85
    max_grad_norm: float = 1.0
    patience: int | None = 1
    evaluate_every: float = 1.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        require(
            self,
            epochs=(0.0 < self.epochs <= MOST_EPOCHS, f"be above 0 and at most {MOST_EPOCHS}"),
            batch_size=(self.batch_size >= 1, "be at least 1"),
            accumulation=(self.accumulation >= 1, "be at least 1"),
            learning_rate=(0.0 < self.learning_rate < math.inf, "be above 0"),
            lr_decay=(0.0 < self.lr_decay <= 1.0, "lie in (0, 1]"),
            max_grad_norm=(0.0 <= self.max_grad_norm < math.inf, "be a number >= 0"),
            patience=(self.patience is None or self.patience >= 1, "be at least 1, or null to train all epochs"),
            evaluate_every=(0.0 < self.evaluate_every <= 1.0, "lie in (0, 1]"),
        )

    def shared_by(self, processes: int) -> "TrainingSettings":
        """Return the settings of each of several processes that together take the same optimizer steps.

        Raises:
            ValueError: an optimizer step has too few examples to be shared evenly.
        """
        passes = math.gcd(self.accumulation, processes)
        examples, rest = divmod(self.batch_size, processes // passes)
        if rest or not examples:
            raise ValueError(
                f"an optimizer step takes batch_size {self.batch_size} times accumulation {self.accumulation} examples, which "
                f"{processes} processes cannot share evenly; make their product a multiple of {processes}"
            )
        return replace(self, batch_size=examples, accumulation=self.accumulation // passes)

    def steps_per_epoch(self, examples: int) -> int:
        """Optimizer steps in one epoch over so many examples, on one process."""
        return math.ceil(math.ceil(examples / self.batch_size) / self.accumulation)

    def evaluate_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps between two dev evaluations, rounded up: rounded down, one more would fall right before the end."""
        return max(1, math.ceil(round(self.evaluate_every * steps_per_epoch, 6)))

    def steps(self, examples: int) -> int:
        """Optimizer steps of the whole run over so many examples, on one process."""
        return math.ceil(self.epochs * self.steps_per_epoch(examples))
