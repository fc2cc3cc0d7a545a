"""What steps come to: adapters, learned ratios, measured systems, and the outcome of a whole method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from grasp_lora.bench.planned import main_metric
from grasp_lora.bench.store import Record, key_of
from grasp_lora.data.encode import Example
from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.rounds import RatioEstimate, Round
from grasp_lora.models.reading import LoadedAdapter
from grasp_lora.training.settings import TrainingSettings


@dataclass(frozen=True)
class Adapter:
    """An adapter that a step made.

    Args:
        key: what identifies it: the key of its step, or the hash of a given adapter's file.
        load: gives the weights; trains them anew if they are not on this machine. None: the backbone alone.
        records: of all steps that led to it, in order.
        folder: where a step has put it as a PEFT adapter, None where none has: it was given or merged, or is the backbone alone.
        title: of a given adapter, its name.
    """

    key: str
    load: Callable[[], AdapterWeights | None]
    records: tuple[Record, ...] = ()
    folder: Path | None = None
    title: str = ""

    @property
    def weights(self) -> AdapterWeights:
        """Its weights.

        Raises:
            AdapterError: it is the backbone alone.
        """
        weights = self.load()
        if weights is None:
            raise AdapterError("the backbone alone cannot be merged, pruned or trained on; name an adapter")
        return weights


@dataclass(frozen=True)
class Measured:
    """What one system is worth.

    Args:
        dev, test: records with the losses of the examples, None without such a split.
        scores: record with the scores of the answers to the test prompts, None without a test split.
        answers: one a test example.
    """

    dev: Record | None
    test: Record | None
    scores: Record | None
    answers: tuple[str, ...]

    @property
    def dev_loss(self) -> float | None:
        """Mean answer NLL on dev."""
        return None if self.dev is None else fmean(self.dev.result["losses"])

    @property
    def test_loss(self) -> float | None:
        """Mean answer NLL on test."""
        return None if self.test is None else fmean(self.test.result["losses"])

    @property
    def values(self) -> dict[str, float | None]:
        """Each metric's score; None where it is not available."""
        return {name: entry["value"] for name, entry in self._entries.items()}

    @property
    def signatures(self) -> dict[str, str]:
        """How each metric was computed."""
        return {name: entry["signature"] for name, entry in self._entries.items()}

    def rows(self, test: Sequence[Example]) -> list[dict[str, Any]]:
        """One row a test example, as `Prediction` describes it."""
        scored = {name: entry for name, entry in self._entries.items() if entry["value"] is not None}
        means = {name: entry["per_example"] for name, entry in scored.items() if not entry["statistics"]}
        leading = main_metric(list(scored))
        sums = {leading: scored[leading]["statistics"]} if leading in scored and leading not in means else {}
        losses = [] if self.test is None else self.test.result["losses"]
        return [
            {
                "id": example.public_id,
                "prediction": answer,
                "references": list(example.references),
                "loss": loss,
                "scores": {name: values[number] for name, values in means.items()},
                **({"statistics": {name: values[number] for name, values in sums.items()}} if sums else {}),
            }
            for number, (example, answer, loss) in enumerate(zip(test, self.answers, losses, strict=True))
        ]

    @property
    def _entries(self) -> dict[str, dict[str, Any]]:
        return {} if self.scores is None else self.scores.result


@dataclass(frozen=True)
class Learned:
    """What a controller run came to.

    Args:
        estimate: the learned ratio.
        start: what the final run starts from: the merge, with the record of this run among its own.
        record: of the run: its rounds and what they took.
    """

    estimate: RatioEstimate
    start: Adapter
    record: Record

    @property
    def ratio(self) -> float:
        """The learned prune ratio, a fraction in [0, 1]."""
        return self.estimate.ratio


@dataclass(frozen=True)
class Outcome:
    """What one method came to with one seed.

    Args:
        losses: record with the losses of the test examples.
        scores: record with the scores of the answers to the test prompts.
        records: of every step that the method needed, shared ones included.
        prune_ratio: of the result, None where nothing is pruned.
        chosen_on: the split on which a choice was made, if one was.
        curve: for a grid, ratio -> split -> mean loss of its run.
        left_out: what a choice had to do without, a sentence each.
        taken: what a choice among adapters of several kinds took, in words.
        merge: with `target.on: auto`, whether it rests on the sum or the average, in words.
        discarded: keys of steps that trained a target adapter which is not merged.
    """

    losses: Record
    scores: Record
    records: tuple[Record, ...]
    prune_ratio: float | None = None
    chosen_on: str | None = None
    curve: Mapping[float, Mapping[str, float]] | None = None
    left_out: tuple[str, ...] = ()
    taken: str | None = None
    merge: str | None = None
    discarded: frozenset[str] = frozenset()


def names_of(sources: int) -> tuple[str, ...]:
    """Return what so many source adapters are called: source, source_2 and so on."""
    return ("source", *(f"source_{number}" for number in range(2, sources + 1)))


def given(adapter: LoadedAdapter) -> Adapter:
    """Return an adapter that no step made: one that the user gave."""
    key = key_of("given", {"sha256": adapter.sha256, "facts": adapter.facts})
    return Adapter(key, lambda: adapter.weights, title=adapter.name)


def rounds_of(record: Record) -> list[Round]:
    """Return the rounds of a controller run that is on record."""
    return [Round.from_json(row) for row in record.result["rounds"]]


def facts_of(result: Any, training: TrainingSettings, train_examples: int, dev_examples: int) -> dict[str, Any]:
    """What a fine-tune did and cost, as plain values."""
    return {
        "steps": result.steps,
        "best_step": result.best_step,
        "dev_loss": result.dev_loss,
        "trained_examples": trained_examples(result.steps, training, train_examples),
        "measured_examples": measured_examples(result.history, dev_examples),
        "history": result.history,
    }


def measured_examples(history: Sequence[Mapping[str, Any]], dev_examples: int) -> int:
    return sum("dev_loss" in row for row in history) * dev_examples


def trained_examples(steps: int, training: TrainingSettings, examples: int) -> int:
    return round(steps / training.steps_per_epoch(examples) * examples)


def unique(records: Sequence[Record]) -> tuple[Record, ...]:
    """Return each record once, in the order of first use."""
    return tuple({record.key: record for record in records}.values())


def once(load: Callable[[], AdapterWeights]) -> Callable[[], AdapterWeights]:
    """Load at the first call, and keep it."""
    kept: list[AdapterWeights] = []

    def loaded() -> AdapterWeights:
        if not kept:
            kept.append(load())
        return kept[0]

    return loaded
