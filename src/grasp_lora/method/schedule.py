"""When rounds come, and what they measure."""

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from grasp_lora.text.display import quoted

Pool = Literal["micro_dev", "dev", "both"]
PROBE_SPLITS: dict[Pool, tuple[str, ...]] = {
    "micro_dev": ("micro_dev",),
    "dev": ("dev",),
    "both": ("micro_dev", "dev"),
}  # of each pool
if TYPE_CHECKING:
    Spacing = int | Literal["epoch"]
else:
    Spacing = Any  # checked below, in one line


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


@dataclass(frozen=True)
class Rounds:
    """How the rounds of a controller run are spaced and measured.

    Args:
        every: optimizer steps between rounds (K), >= 1, or `epoch`.
        start: share of the run before the first round, in [0, 1]; 0.5 begins half way. Above 0 there is always a round after the
            last step, with 1 only that one. Late in a training that overfits, ratios differ by more than chance.
        before_training: whether a round comes before the first step; only with `start` 0.
        pool: examples that are probed: `micro_dev`, `dev`, or `both`. Dev then chooses the ratio and stops the final run.
        in_turn: how many of them a round measures at each candidate at most, >= 1, in turn, so that each round has others; None
            takes all. The best ratio so far is measured on all where rounds are compared: by patience or the rule
            `surrogate`.
        patience: >= 1: rounds in a row without a lower loss at any probed ratio, after which training stops, as early stopping
            would by then at every ratio. None goes on to the last step.

    Raises:
        ValueError: a setting is outside its range, or two contradict each other.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    every: Spacing = 10
    start: float = 0.0
    before_training: bool = False
    pool: Pool = "micro_dev"
    in_turn: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.every != "epoch" and not is_count(self.every):
            raise ValueError(
                f"every is {quoted(self.every)}; it must be at least 1 optimizer step, a whole number, or 'epoch'"
            )
        if not 0.0 <= self.start <= 1.0:
            raise ValueError(f"start is {self.start}; it must be a share of the run, in [0, 1]")
        if self.before_training and self.start > 0.0:
            raise ValueError(
                f"before_training is true, but start is {self.start}; set before_training to false, or start to 0"
            )
        if self.pool not in PROBE_SPLITS:
            raise ValueError(f"pool is {quoted(self.pool)}; allowed: {', '.join(PROBE_SPLITS)}")
        if self.in_turn is not None and not is_count(self.in_turn):
            raise ValueError(
                f"in_turn is {self.in_turn}; it must be at least 1 example, a whole number, or null for all"
            )
        if self.patience is not None and not is_count(self.patience):
            raise ValueError(
                f"patience is {self.patience}; it must be at least 1 round, a whole number, or null to train to the end"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """The target's splits that the pool is made of."""
        return PROBE_SPLITS[self.pool]

    def turn(self, pool: int) -> int | None:
        """How many examples of a pool of so many a round measures at each candidate, in turn; None for all of them in each."""
        return self.in_turn if self.in_turn is not None and self.in_turn < pool else None

    def spacing(self, steps_per_epoch: int) -> int:
        """Optimizer steps between rounds, where an epoch has so many."""
        return steps_per_epoch if self.every == "epoch" else self.every

    def round_follows(self, step: int, steps: int, spacing: int) -> bool:
        """Return whether a round follows an optimizer step.

        Args:
            step: optimizer steps taken, 0 before the first one.
            steps: of the whole run.
            spacing: optimizer steps between rounds.
        """
        if step == 0:
            return self.before_training
        if step == steps and self.start > 0.0:
            return True
        return step >= self.start * steps and step % spacing == 0

    def round_steps(self, steps: int, spacing: int) -> list[int]:
        """Return the optimizer steps that a round follows, in a run of so many; see `round_follows`."""
        return [step for step in range(steps + 1) if self.round_follows(step, steps, spacing)]
