"""A recorded loss landscape: what every prune ratio would have cost at every moment of training, as data without a model.

A setting (recipe and seed) is measured once: the micro-dev loss over a grid of ratios along trainings under several committed
ratios, and the losses after final runs at fixed ratios. From this one small parquet file every policy is replayed in
milliseconds (`controllers.py`). What lies between two recorded points is interpolated linearly.
"""

import io
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from smoothing import SmoothFit, smooth

from grasp_lora.errors import GraspError
from grasp_lora.storage.writing import write_whole
from grasp_lora.text.display import one_line, quoted
from grasp_lora.training.training_settings import TRAINED_AS_MEASURED

Floats = NDArray[np.float64]

VERSION = 1
SPLITS = ("micro_dev", "dev", "test")
PROBED = ("micro_dev", "dev")  # what trajectories measure
MOST_ROWS = 1_000_000  # a damaged file of a few bytes can claim any number

_METADATA = b"grasp_lora.landscape"
_TRAJECTORY, _FINAL = "trajectory", "final"
_LARGEST = float(np.finfo(np.float32).max)
_SCHEMA = pa.schema(
    [
        pa.field("part", pa.string(), nullable=False),
        pa.field("train_ratio", pa.float64()),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("ratio", pa.float64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("example", pa.int32(), nullable=False),
        pa.field("loss", pa.float32(), nullable=False),
        pa.field("best_step", pa.int32()),
        pa.field("trained_examples", pa.int64()),
        pa.field("measured_examples", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Cost:
    """What something cost, in examples.

    Args:
        trained_examples: each a forward and a backward pass.
        measured_examples: each a forward pass: probes and dev losses.
    """

    trained_examples: float
    measured_examples: float

    @property
    def work(self) -> float:
        """Forward passes, a trained example counted as two: the frozen backbone has no weight gradients."""
        return TRAINED_AS_MEASURED * self.trained_examples + self.measured_examples

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.trained_examples + other.trained_examples, self.measured_examples + other.measured_examples)

    def __mul__(self, share: float) -> "Cost":
        return Cost(self.trained_examples * share, self.measured_examples * share)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The losses of a split over a grid of ratios, again and again along one training.

    Args:
        train_ratio: the ratio whose mask was held while training, a fraction; None where it was drawn anew for each
            step (`shared`).
        steps: optimizer steps after which was measured, increasing, 0 is before training.
        ratios: the ratios that were measured, fractions, increasing.
        losses: loss of each example under a mask at each ratio, [steps, ratios, examples].
        split: whose examples: `micro_dev`, or `dev` for what a controller would see that probes there.

    Raises:
        GraspError: the parts do not fit together, or a loss is not finite.
    """

    train_ratio: float | None
    steps: tuple[int, ...]
    ratios: tuple[float, ...]
    losses: Floats
    split: str = "micro_dev"

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", np.asarray(self.losses, dtype=np.float64))
        name = str(self)
        if self.split not in PROBED:
            raise GraspError(f"{name} is of the split {quoted(self.split)}; allowed: {', '.join(PROBED)}")
        _check_ratios(self.ratios, name)
        if self.train_ratio is not None:
            _check_ratios((self.train_ratio,), name)
        if not self.steps or self.steps[0] < 0 or any(a >= b for a, b in pairwise(self.steps)):
            raise GraspError(f"{name}: the steps are {self.steps}; they must increase, from 0 or later on")
        shape = self.losses.shape
        if len(shape) != 3 or shape[:2] != (len(self.steps), len(self.ratios)) or not shape[2]:
            raise GraspError(
                f"{name}: losses of shape {shape} for {len(self.steps)} steps and {len(self.ratios)} ratios; "
                "they must be [steps, ratios, examples]"
            )
        _check_losses(self.losses, name)

    def __str__(self) -> str:
        where = "" if self.split == "micro_dev" else f" on {one_line(self.split)}"
        return (
            "the shared trajectory" if self.train_ratio is None else f"the trajectory at ratio {self.train_ratio}"
        ) + where

    def at(self, step: float, ratio: float) -> Floats:
        """The losses at a step and ratio, [examples]: bilinear between the recorded ones, clamped at the ends."""
        step_low, step_high, step_share = _between(self.steps, step)
        low, high, share = _between(self.ratios, ratio)
        earlier, later = self.losses[step_low], self.losses[step_high]
        return _blend(_blend(earlier[low], earlier[high], share), _blend(later[low], later[high], share), step_share)


@dataclass(frozen=True)
class FinalRun:
    """A final run at a fixed ratio, trained to its end.

    Args:
        ratio: of the mask, a fraction.
        steps: optimizer steps that it took.
        best_step: the step whose adapter was kept.
        losses: split (micro_dev, dev, test) -> loss of each example under the finished adapter.
        trained_examples, measured_examples: what it cost, dev losses included.

    Raises:
        GraspError: a split is missing, or a loss is not finite.
    """

    ratio: float
    steps: int
    best_step: int
    losses: Mapping[str, tuple[float, ...]]
    trained_examples: int
    measured_examples: int

    def __post_init__(self) -> None:
        name = f"the final run at ratio {self.ratio}"
        _check_ratios((self.ratio,), name)
        if set(self.losses) != set(SPLITS) or not all(self.losses.values()):
            raise GraspError(f"{name} has losses of {', '.join(self.losses)}; those of {', '.join(SPLITS)} are needed")
        for split, losses in self.losses.items():
            _check_losses(np.asarray(losses, dtype=np.float64), f"{name}, {split}")


@dataclass(frozen=True, eq=False)
class Landscape:
    """The recorded landscape of one setting.

    Args:
        facts: what it was recorded from, as plain JSON values. Three of them are read by programs: `trained_examples`, the
            training examples of one trajectory, `probe_every`, the recipe's optimizer steps between rounds, and `examples`.
        trajectories: on micro_dev one per committed ratio, and at most one shared one; on dev at most one each.
        finals: final runs at different ratios.

    Raises:
        GraspError: the parts do not fit together.
    """

    facts: Mapping[str, Any]
    trajectories: tuple[Trajectory, ...]
    finals: tuple[FinalRun, ...]

    def __post_init__(self) -> None:
        if not self.committed:
            raise GraspError("there is no trajectory of a committed ratio; record at least one")
        for split in PROBED:
            trained = [one.train_ratio for one in self.trajectories if one.split == split]
            if len(set(trained)) < len(trained):
                raise GraspError(f"there are two trajectories of one ratio: {trained}; each may be there once")
        if len({run.ratio for run in self.finals}) < max(2, len(self.finals)):
            ratios = [run.ratio for run in self.finals]
            raise GraspError(f"the final runs are at ratios {ratios}; at least two are needed, and each ratio once")
        for split in SPLITS:
            counts = {len(run.losses[split]) for run in self.finals}
            counts |= {one.losses.shape[2] for one in self.trajectories if one.split == split}
            if len(counts) > 1:
                raise GraspError(f"{split} has {sorted(counts)} examples; all parts must measure the same ones")

    @cached_property
    def committed(self) -> tuple[Trajectory, ...]:
        """The trajectories of a committed ratio on micro_dev, the lowest first."""
        here = [one for one in self.trajectories if one.split == "micro_dev"]
        found = [(one.train_ratio, one) for one in here if one.train_ratio is not None]
        return tuple(one for _, one in sorted(found, key=lambda pair: pair[0]))

    @cached_property
    def shared(self) -> Trajectory | None:
        """The trajectory on micro_dev whose ratio was drawn anew for each step, if it was recorded."""
        return self._shared_on("micro_dev")

    @cached_property
    def shared_dev(self) -> Trajectory | None:
        """The same on dev, if it was recorded."""
        return self._shared_on("dev")

    def _shared_on(self, split: str) -> Trajectory | None:
        return next((one for one in self.trajectories if one.train_ratio is None and one.split == split), None)

    @cached_property
    def micro_dev_examples(self) -> int:
        """Number of examples that a probe measures."""
        return int(self.committed[0].losses.shape[2])

    @cached_property
    def last_step(self) -> int:
        """The last step that every trajectory recorded."""
        return min(one.steps[-1] for one in self.trajectories)

    def probe(self, train_ratio: float | None, step: float, ratio: float) -> Floats:
        """The micro-dev loss of each example under a mask at `ratio`, [examples].

        Linear between recorded steps, ratios and committed ratios, and constant beyond them. A network that was trained at
        `train_ratio` from the first step on is what was recorded: one that came there late is only like it.

        Args:
            train_ratio: the committed ratio; None for the shared trajectory.
            step: optimizer steps taken.
            ratio: of the candidate.

        Raises:
            GraspError: there is no shared trajectory.
        """
        if train_ratio is None:
            if self.shared is None:
                raise GraspError(
                    "this landscape has no shared trajectory; record one, or leave out policies that need it"
                )
            return self.shared.at(step, ratio)
        low, high, share = _between(self._train_ratios, train_ratio)
        return _blend(self.committed[low].at(step, ratio), self.committed[high].at(step, ratio), share)

    def final_losses(self, ratio: float, split: str) -> Floats:
        """The loss of each example of a split after a final run at a ratio, [examples]; linear between the recorded runs."""
        ratios, losses = self._final_losses[split]
        low, high, share = _between(ratios, ratio)
        return _blend(losses[low], losses[high], share)

    def final_loss(self, ratio: float, split: str) -> float:
        """The mean loss of a split after a final run at a ratio; linear between the recorded runs."""
        return float(self.final_losses(ratio, split).mean())

    def smooth_final(self, split: str, low: float = 0.10, high: float = 0.80) -> SmoothFit:
        """A smooth curve through the final losses of a split, lowest between the ratios `low` and `high`; see `smooth`.

        Raises:
            GraspError: there are fewer than four final runs, or none near that range.
        """
        ratios, losses = self._final_losses[split]
        return smooth(ratios, losses.mean(1), low, high)

    def controller_cost(self, probes: int) -> Cost:
        """What a controller run costs that measures the micro-dev set so many times, baselines included.

        Raises:
            GraspError: the facts do not say how many examples a run trains on.
        """
        trained = self.facts.get("trained_examples")
        if not isinstance(trained, int | float) or trained <= 0:
            raise GraspError(
                f"the fact trained_examples is {trained!r}; it must be the training examples of a trajectory"
            )
        return Cost(trained, probes * self.micro_dev_examples)

    def final_cost(self, ratio: float) -> Cost:
        """What a final run at a ratio costs; linear between the recorded runs, which stopped early or not."""
        runs = sorted(self.finals, key=lambda run: run.ratio)
        low, high, share = _between([run.ratio for run in runs], ratio)
        costs = [Cost(runs[i].trained_examples, runs[i].measured_examples) for i in (low, high)]
        return costs[0] * (1 - share) + costs[1] * share

    @cached_property
    def _train_ratios(self) -> list[float]:
        return [one.train_ratio for one in self.committed if one.train_ratio is not None]

    @cached_property
    def _final_losses(self) -> dict[str, tuple[list[float], Floats]]:
        """Split -> the ratios of the final runs, increasing, and the losses, [runs, examples]."""
        runs = sorted(self.finals, key=lambda run: run.ratio)
        ratios = [run.ratio for run in runs]
        return {split: (ratios, np.array([run.losses[split] for run in runs], dtype=np.float64)) for split in SPLITS}

    def save(self, path: Path) -> None:
        """Write one parquet file; losses as float32, the same bytes for the same content.

        Raises:
            GraspError: the facts are no JSON.
            OSError: it cannot be written.
        """
        try:
            facts = json.dumps({"version": VERSION, "facts": dict(self.facts)}, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise GraspError(f"the facts of a landscape must be plain JSON values ({error})") from error
        # None comes first, then the ratios; micro_dev before dev.
        trajectories = sorted(
            self.trajectories,
            key=lambda one: (PROBED.index(one.split), one.train_ratio is not None, one.train_ratio or 0.0),
        )
        columns = zip(*_rows(trajectories, sorted(self.finals, key=lambda run: run.ratio)), strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
        table = pa.Table.from_arrays(arrays, schema=_SCHEMA.with_metadata({_METADATA: facts.encode()}))
        stream = io.BytesIO()
        pq.write_table(table, stream, compression="zstd")
        write_whole(path, stream.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Landscape":
        """Read what `save` wrote.

        Raises:
            GraspError: the file is missing, damaged or no landscape.
        """
        try:
            file = pq.ParquetFile(io.BytesIO(path.read_bytes()))
            table = file.read() if 0 < file.metadata.num_rows <= MOST_ROWS else None
            rows = table.to_pylist() if table is not None and table.schema.equals(_SCHEMA) else []
        # Beside its own errors, pyarrow lets pass those of the values.
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise GraspError(f"{path} cannot be read as a landscape ({one_line(str(error))[:200]})") from None
        try:
            if not rows:
                raise GraspError(f"it has other columns, or not between 1 and {MOST_ROWS} rows")
            return cls(_facts(file.schema_arrow.metadata or {}), *_parse(rows))
        except GraspError as error:
            raise GraspError(f"{path} is no landscape, or a damaged one: {one_line(str(error))[:300]}") from None


def _between(grid: Sequence[float], value: float) -> tuple[int, int, float]:
    """The two neighbours of a value in an increasing grid, and the share of the way from the first to the second."""
    if value <= grid[0]:
        return 0, 0, 0.0
    if value >= grid[-1]:
        return len(grid) - 1, len(grid) - 1, 0.0
    high = bisect_right(grid, value)
    return high - 1, high, (value - grid[high - 1]) / (grid[high] - grid[high - 1])


def _blend(first: Floats, second: Floats, share: float) -> Floats:
    return first if share == 0.0 else (1 - share) * first + share * second


def _rows(trajectories: Sequence[Trajectory], finals: Sequence[FinalRun]) -> Iterator[tuple[Any, ...]]:
    """All rows, in the order of the columns."""
    for one in trajectories:
        for step, curve in zip(one.steps, one.losses.tolist(), strict=True):
            for ratio, losses in zip(one.ratios, curve, strict=True):
                for example, loss in enumerate(losses):
                    yield _TRAJECTORY, one.train_ratio, step, ratio, one.split, example, loss, None, None, None
    for run in finals:
        cost = run.trained_examples, run.measured_examples
        for split in SPLITS:
            for example, loss in enumerate(run.losses[split]):
                yield _FINAL, None, run.steps, run.ratio, split, example, loss, run.best_step, *cost


def _facts(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    try:
        content = json.loads(metadata[_METADATA])
        version, facts = content["version"], content["facts"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise GraspError("its facts are missing") from None
    if version != VERSION or not isinstance(facts, dict):
        raise GraspError(f"it has version {version!r}; this program reads {VERSION}")
    return facts


def _parse(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[Trajectory, ...], tuple[FinalRun, ...]]:
    cells: dict[tuple[float | None, str], dict[tuple[int, float, int], float]] = {}
    runs: dict[float, dict[str, dict[int, float]]] = {}
    numbers: dict[float, set[tuple[int, int, int, int]]] = {}
    for row in rows:
        if row["part"] == _TRAJECTORY:
            of_one = cells.setdefault((row["train_ratio"], row["split"]), {})
            of_one[row["step"], row["ratio"], row["example"]] = row["loss"]
        elif row["part"] == _FINAL:
            runs.setdefault(row["ratio"], {}).setdefault(row["split"], {})[row["example"]] = row["loss"]
            of_run = row["step"], row["best_step"], row["trained_examples"], row["measured_examples"]
            numbers.setdefault(row["ratio"], set()).add(of_run)
        else:
            raise GraspError(f"a part is {quoted(row['part'])}; {_TRAJECTORY} and {_FINAL} are allowed")
    kept = sum(map(len, cells.values())) + sum(len(losses) for splits in runs.values() for losses in splits.values())
    if kept < len(rows):
        raise GraspError(f"{len(rows) - kept} rows say a second time what others say")
    finals = []
    for ratio, splits in runs.items():
        steps, best_step, trained, measured = numbers[ratio].pop()
        if numbers[ratio] or None in (best_step, trained, measured):
            raise GraspError(f"the final run at ratio {ratio} has no single number of steps and examples")
        for split, losses in splits.items():
            if set(losses) != set(range(len(losses))):
                raise GraspError(f"the final run at ratio {ratio} lacks examples of {quoted(split)}")
        ordered = {split: tuple(losses[example] for example in range(len(losses))) for split, losses in splits.items()}
        finals.append(FinalRun(ratio, steps, best_step, ordered, trained, measured))
    return tuple(_trajectory(*which, found) for which, found in cells.items()), tuple(finals)


def _trajectory(train_ratio: float | None, split: str, cells: Mapping[tuple[int, float, int], float]) -> Trajectory:
    steps = sorted({step for step, _, _ in cells})
    ratios = sorted({ratio for _, ratio, _ in cells})
    examples = sorted({example for _, _, example in cells})
    if len(cells) < len(steps) * len(ratios) * len(examples) or examples != list(range(len(examples))):
        raise GraspError(f"rows of the training at ratio {train_ratio} are missing")
    losses = [[[cells[step, ratio, example] for example in examples] for ratio in ratios] for step in steps]
    return Trajectory(train_ratio, tuple(steps), tuple(ratios), np.array(losses), split)


def _check_ratios(ratios: Sequence[float], name: str) -> None:
    if not ratios or not all(0.0 <= ratio <= 1.0 for ratio in ratios):
        raise GraspError(f"{name}: ratios {list(ratios)}; each must be a fraction between 0 and 1")
    if any(a >= b for a, b in pairwise(ratios)):
        raise GraspError(f"{name}: the ratios {list(ratios)} must increase")


def _check_losses(losses: NDArray[Any], name: str) -> None:
    wrong = ~(np.abs(losses) <= _LARGEST)  # true for NaN, too
    if wrong.any():
        raise GraspError(f"{name}: {int(wrong.sum())} losses are no finite numbers that a file can hold")
