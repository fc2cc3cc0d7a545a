"""What `sweep.json` holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Trial:
    """A finished trial.

    Args:
        trial: its number, from 1.
        values: by dotted key of the recipe.
        state: `complete`, or `failed`: the training diverged, or these values do not go together.
        dev_loss: of the adapter that the run keeps; None if it failed.
        steps, best_step: optimizer steps taken, and that of the kept adapter.
        seconds, work: wall time and forward passes of the final run; 0 where the values came before.
        adapter: key of the final run's step.
        repeats: whether an earlier trial had the same values.
        error: why it failed.
    """

    trial: int
    values: Mapping[str, Any]
    state: str = "complete"
    dev_loss: float | None = None
    steps: int = 0
    best_step: int | None = None
    seconds: float = 0.0
    work: int = 0
    adapter: str | None = None
    repeats: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Identity:
    """What must not change while a sweep goes on, since its trials are compared with each other.

    Args:
        code: hash of the code of one's own that the recipe or the parameters name; None where they name none, and in the files
            of earlier versions.
    """

    recipe: str
    params: list[str]
    sampler: str
    seed: int
    backbone: str
    dtype: str
    data: str
    adapters: dict[str, str]  # those that are given
    workers: int = 1
    code: str | None = None


@dataclass(frozen=True)
class SweepCost:
    """Seconds and forward passes of the final runs, without and with the adapters that they merge."""

    runs: int
    seconds: float
    seconds_with_parents: float
    work: int
    work_with_parents: int


@dataclass(frozen=True)
class SweepResult:
    """A sweep as `sweep.json` holds it.

    Args:
        name, backbone_name, language, dev_examples: of the recipe.
        identity: of the sweep.
        trials: in their order.
        parents: key -> seconds and forward passes of each adapter to merge that was trained.
        best: number of the trial with the lowest dev loss; None if all failed.
        cost: of everything.
        asked: how many trials there should be; 0 in files of earlier versions, which did not say.
    """

    name: str
    backbone_name: str
    language: str
    dev_examples: int
    identity: Identity
    trials: list[Trial]
    parents: dict[str, tuple[float, int]]
    best: int | None
    cost: SweepCost
    asked: int = 0
