"""What steps come to, each written and read by its own class, and the adapters that result.

A result is one frozen record. `Store.step` writes it when the step ends and reads it ever after, so a step that is on record
and one that was just done give the same thing:

    trained = store.step("source", inputs, Trained, work)   # work trains, and returns a Trained
    trained.result.dev_loss                                  # the same, whether it was done now or last week
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter

from grasp_lora.data.encode import Example
from grasp_lora.errors import RecipeError
from grasp_lora.evaluation.metrics import METRICS
from grasp_lora.evaluation.short_answers import MetricScore
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.rules import RatioEstimate
from grasp_lora.storage.reading import is_file, reading
from grasp_lora.storage.writing import write_json
from grasp_lora.training.training_settings import TRAINED_AS_MEASURED

RESULT = "result.json"
TEST_LOSS = "test_loss"

Shape = TypeVar("Shape")


def read_json(file: Path, shape: type[Shape]) -> Shape:
    """Read a JSON file of ours into a typed record.

    Raises:
        RecipeError: it is missing, cannot be read, or is not of that shape, as after a change by hand or by another version.
    """
    with reading(file, RecipeError):
        return TypeAdapter(shape).validate_json(file.read_bytes())


def read_if_there(file: Path, shape: type[Shape]) -> Shape | None:
    """The same; None where the file is missing."""
    return read_json(file, shape) if is_file(file) else None


class Result(BaseModel):
    """What a step came to, and what that cost.

    Args:
        trained_examples, measured_examples: examples that went through a training step, and through a pass without one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trained_examples: int = 0
    measured_examples: int = 0

    @property
    def passes(self) -> int:
        """Cost in forward passes of one example; a training example counts as two."""
        return TRAINED_AS_MEASURED * self.trained_examples + self.measured_examples

    def write(self, folder: Path) -> None:
        write_json(folder / RESULT, self.model_dump())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read it from the folder of its step.

        Raises:
            RecipeError: it is missing or damaged.
        """
        return read_json(folder / RESULT, cls)


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Finished(Generic[R]):
    """A finished step and its result.

    Args:
        name: of the step, such as `final-0.40`.
        key: hash of all that decided it.
        seconds: wall time, of all attempts together.
        made_with: versions, processor or GPU, and threads.
        repeated: whether it was on record already.
    """

    name: str
    key: str
    folder: Path
    result: R
    seconds: float
    made_with: Mapping[str, str]
    repeated: bool = field(default=False, compare=False)

    @property
    def trains(self) -> bool:
        return self.result.trained_examples > 0


class Trained(Result):
    """A training; its adapter lies beside it.

    Args:
        steps: optimizer steps taken.
        best_step: the step whose adapter was kept; 0 where no step lowered the dev loss.
        dev_loss: mean answer NLL at that step; None where no dev rows were looked at.
        history: losses, as lines of `history.jsonl`.
        kept: weights and kept weights of each module, factor and origin; empty where nothing was pruned.
    """

    steps: int
    best_step: int
    dev_loss: float | None
    history: list[dict[str, Any]]
    kept: list[dict[str, Any]] = []


class Learned(Result):
    """A controller run: the ratio with its interval, and the rounds that it was read off.

    Args:
        rounds, timings, history: lines of the files of these names.
        steps: optimizer steps taken.
    """

    estimate: RatioEstimate
    rounds: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    history: list[dict[str, Any]]
    steps: int


class Losses(Result):
    """Answer NLL of each example of a split, nats per token, in the order of the split."""

    losses: list[float]

    @property
    def mean(self) -> float:
        """The loss of the split."""
        return fmean(self.losses)


class Tested(Losses):
    """The answer to each test prompt, and the NLL of the right one, in the order of the split."""

    answers: list[str]


class Scores(Result):
    """What the answers are worth, by the name of each metric."""

    metrics: dict[str, MetricScore]


class MergeWeights(Result):
    """The weights of a merge that were searched for, one per adapter."""

    weights: tuple[float, ...]


@dataclass(frozen=True)
class Adapter:
    """An adapter that exists: a finished step made it, the user gave it, or it is a merge of such. Nothing here trains.

    Args:
        key: hash of all that decides it; steps that rest on it have it among their inputs.
        load: reads or merges its weights; there are none of the backbone alone.
        made: the training that made it; None where none did.
        trail: every finished step that led to it, in order.
        title: name of an adapter that the user gave.
        rows: `Record.marks` of its training rows, those of the adapters that it came from among them.
    """

    key: str
    load: Callable[[], AdapterWeights]
    made: Finished[Trained] | None = None
    trail: tuple[Finished[Any], ...] = ()
    title: str = ""
    rows: frozenset[str] = frozenset()

    @property
    def weights(self) -> AdapterWeights:
        """Its weights, loaded anew each time."""
        return self.load()

    def after(self, *steps: Finished[Any]) -> "Adapter":
        """The same adapter, with more steps among those that led to it: what choosing it cost."""
        return replace(self, trail=each_once([*self.trail, *steps]))


@dataclass(frozen=True)
class Measured:
    """What one system is worth: losses on dev, losses and answers on test, and their scores; None without such rows."""

    dev: Finished[Losses] | None
    test: Finished[Tested] | None
    scores: Finished[Scores] | None

    @property
    def dev_loss(self) -> float | None:
        """Mean answer NLL on dev."""
        return self.dev.result.mean if self.dev else None

    @property
    def test_loss(self) -> float | None:
        """Mean answer NLL on test."""
        return self.test.result.mean if self.test else None

    @property
    def metrics(self) -> Mapping[str, MetricScore]:
        """Each metric with its values by example; empty without test rows."""
        return self.scores.result.metrics if self.scores else {}

    @property
    def values(self) -> dict[str, float | None]:
        """The score by each metric; None where that is not available here."""
        return {name: score.value for name, score in self.metrics.items()}

    def predictions(self, test: Sequence[Example]) -> "list[Prediction]":
        """One row a test example; none without test examples."""
        if self.test is None:
            return []
        scored = {name: score for name, score in self.metrics.items() if score.value is not None}
        means = {name: score.per_example for name, score in scored.items() if not score.statistics}
        leading = main_metric(list(scored))
        sums = {leading: scored[leading].statistics} if leading in scored and leading not in means else {}
        return [
            Prediction(
                example.public_id,
                answer,
                tuple(example.references),
                loss,
                {name: values[number] for name, values in means.items()},
                {name: values[number] for name, values in sums.items()},
            )
            for number, (example, answer, loss) in enumerate(
                zip(test, self.test.result.answers, self.test.result.losses, strict=True)
            )
        ]


@dataclass(frozen=True)
class Prediction:
    """A line of evaluation/SYSTEM.jsonl: what one system answered to one test prompt, and what that is worth.

    Args:
        loss: answer NLL, nats per token.
        scores: by each metric that is a mean over examples.
        statistics: counts of the leading metric, where that is no such mean (chrF++, BLEU, macro-F1).
    """

    id: str
    prediction: str
    references: tuple[str, ...]
    loss: float
    scores: Mapping[str, float]
    statistics: Mapping[str, tuple[float, ...]]


def main_metric(metrics: Sequence[str]) -> str:
    """The score that tables give the first place: that of answers, or the test loss where there is none."""
    scores = [name for name in metrics if name != TEST_LOSS]
    leading = (name for name, metric in METRICS.items() if metric.leads and name in scores)
    return next(leading, next(iter(scores), TEST_LOSS))


def each_once(steps: Sequence[Finished[Any]]) -> tuple[Finished[Any], ...]:
    """Each step once, in the order of first use."""
    return tuple({step.key: step for step in steps}.values())
