"""Test examples side by side: what each system answered, those first in which the systems differ most."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from grasp_lora.bench.planned import main_metric
from grasp_lora.bench.run_folder import Prediction
from grasp_lora.report.run_record import RunRecord
from grasp_lora.report.tables import BELOW_ZERO, METRIC_NAMES
from grasp_lora.text.display import listed

MOST_SHOWN = 20
CHARACTERS_SHOWN = 1000
PROMPT_CHARACTERS_SHOWN = 3000


class Answer(NamedTuple):
    """What one system answered; `verdict` is right, wrong or partly, or None where no score says."""

    system: str
    title: str
    text: str
    verdict: str | None
    mark: str


class Example(NamedTuple):
    """One test example with the answers of all systems; `number` is its place in the test set, from 1."""

    number: int
    id: str
    prompt: str | None
    references: list[str]
    answers: list[Answer]


class Examples(NamedTuple):
    """The examples that are shown, of how many, the metric that orders them, if any, and whether it says right or wrong."""

    shown: list[Example]
    total: int
    metric: str | None
    marked: bool


def examples_of(record: RunRecord) -> Examples:
    """Return at most `MOST_SHOWN` test examples, those first whose answers differ most by the leading metric."""
    answered = {name: record.predictions[name] for name in record.systems if record.predictions[name]}
    ids = [row.id for row in next(iter(answered.values()), [])]
    answered = {name: rows for name, rows in answered.items() if [row.id for row in rows] == ids}
    metric = leading_metric([row for rows in answered.values() for row in rows])
    # By place: files of one name in two folders give the same ids.
    prompts = [one.prompt for one in record.prompts] if [one.id for one in record.prompts] == ids else []
    order = sorted(range(len(ids)), key=lambda place: _likeness([rows[place] for rows in answered.values()], metric))
    shown = []
    for place in order[:MOST_SHOWN]:
        rows = {name: own[place] for name, own in answered.items()}
        answers = [
            Answer(name, record.systems[name], _cut(row.prediction), *marked(row.scores.get(metric or ""), metric))
            for name, row in rows.items()
        ]
        references = [_cut(text) for text in next(iter(rows.values())).references]
        prompt = _cut(prompts[place], PROMPT_CHARACTERS_SHOWN) if prompts else None
        shown.append(Example(place + 1, ids[place], prompt, references, answers))
    says = marked(0.0, metric)[0] is not None
    return Examples(shown, len(ids), metric and METRIC_NAMES.get(metric, metric), says)


def label_notes(record: RunRecord, system: str) -> list[str]:
    """Of a classification, what the same label for every test row is worth, and how often a system answers each label."""
    guess = best_guess(record, system)
    if guess is None:
        return []
    most, share = guess
    answered = Counter(row.prediction for row in record.predictions[system])
    listing = listed([f"{label} {answered[label]}" for label in record.data.report["labels"]])
    return [
        f"To answer {most}, the most frequent label of the training rows, always has accuracy {share:.1f} on the test. "
        f"What is handed over answers: {listing}."
    ]


def best_guess(record: RunRecord, system: str) -> tuple[str, float] | None:
    """Of a classification, the most frequent label of the training rows, and the accuracy in percent of answering it always."""
    counts: dict[str, dict[str, int]] = record.data.report.get("labels") or {}
    rows = record.predictions.get(system)
    if not counts or not rows:
        return None
    most = max(counts, key=lambda label: counts[label].get("train", 0))
    return most, 100 * sum(most in row.references for row in rows) / len(rows)


def leading_metric(rows: Sequence[Prediction]) -> str | None:
    """Return the main metric of those that scored every one of some answers with a finite number; None if none did."""
    keys = list(rows[0].scores) if rows else []
    finite = [key for key in keys if all(math.isfinite(row.scores.get(key, math.nan)) for row in rows)]
    return main_metric(finite) if finite else None


def marked(score: float | None, metric: str | None) -> tuple[str | None, str]:
    """Return the verdict on one answer and how it is printed; where no score says "wrong", only the score is.

    >>> marked(100.0, "f1"), marked(0.0, "f1"), marked(66.7, "f1"), marked(0.5, "my:metric"), marked(None, None)
    (('right', '✓ right'), ('wrong', '✗ wrong'), ('partly', '≈ F1 67'), (None, 'my:metric 0.5'), (None, ''))
    """
    if score is None or metric is None:
        return None, ""
    if metric not in METRIC_NAMES or metric in BELOW_ZERO:
        return None, f"{METRIC_NAMES.get(metric, metric)} {score:.3g}"
    if score >= 99.95:
        return "right", "✓ right"
    return ("wrong", "✗ wrong") if score <= 0 else ("partly", f"≈ {METRIC_NAMES[metric]} {score:.0f}")


def _likeness(rows: Sequence[Prediction], metric: str | None) -> tuple[float, int]:
    """How alike the answers are: first by their scores, then by their texts."""
    scores = [row.scores[metric] for row in rows] if metric else [0.0]
    return min(scores) - max(scores), -len({row.prediction for row in rows})


def _cut(text: str, most: int = CHARACTERS_SHOWN) -> str:
    """A text, or its beginning and its end: the question stands at the end of a prompt."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[len(text) - most // 2 + 3 :]}"
