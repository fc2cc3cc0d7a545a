"""Test examples side by side: what each system answered, those first in which the systems differ most.

An example comes with one mark per answer where the leading metric says right or wrong:

    Reference      Paris
    Target only    Rome     ✗ wrong
    GRASP          Paris    ✓ right
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from grasp_lora.engine.results import Prediction, main_metric
from grasp_lora.engine.run_folder import Run
from grasp_lora.evaluation.metrics import METRICS, metric_title
from grasp_lora.report.tables import titles_of
from grasp_lora.text.display import listed

MOST_SHOWN = 20
CHARACTERS_SHOWN = 1000
PROMPT_CHARACTERS_SHOWN = 3000


class Answer(NamedTuple):
    """What one system answered; `verdict` is right, wrong or partly, or None where no score says."""

    title: str
    chosen: bool
    text: str
    verdict: str | None
    mark: str


class Question(NamedTuple):
    """One test example with the answers of all systems; `number` is its place in the test set, from 1."""

    number: int
    id: str
    prompt: str
    references: list[str]
    answers: list[Answer]


class Examples(NamedTuple):
    """The examples that are shown, of how many, the metric that orders them, if any, and whether it says right or wrong."""

    shown: list[Question]
    total: int
    metric: str | None
    marked: bool


def examples_of(run: Run) -> Examples:
    """Return at most `MOST_SHOWN` test examples, those first whose answers differ most by the leading metric."""
    titles = titles_of(run)
    answers = {titles[name]: rows for name, rows in run.predictions.items()}
    return differing(answers, run.prompts, titles.get(run.metrics.delivered.name))


def differing(
    answers: Mapping[str, Sequence[Prediction]],
    prompts: Sequence[str],
    chosen: str | None = None,
    metric: str | None = None,
) -> Examples:
    """Return at most `MOST_SHOWN` examples with the answers of all systems, those first whose answers differ most.

    Args:
        answers: title of each system -> its answers, in the order of the prompts.
        chosen: title of the system that is printed bold.
        metric: that says how much they differ; None for the leading one of those that are finite.
    """
    metric = metric or leading_metric([row for rows in answers.values() for row in rows])
    order = sorted(range(len(prompts)), key=lambda place: _likeness([rows[place] for rows in answers.values()], metric))
    shown = []
    for place in order[:MOST_SHOWN]:
        rows = {title: predictions[place] for title, predictions in answers.items()}
        of_systems = [
            Answer(title, title == chosen, _cut(row.prediction), *marked(row.scores.get(metric or ""), metric))
            for title, row in rows.items()
        ]
        first = next(iter(rows.values()))
        prompt, references = _cut(prompts[place], PROMPT_CHARACTERS_SHOWN), list(map(_cut, first.references))
        shown.append(Question(place + 1, first.id, prompt, references, of_systems))
    name = metric_title(metric) if metric else None
    return Examples(shown, len(prompts), name, marked(0.0, metric)[0] is not None)


def label_note(run: Run) -> list[str]:
    """Of a classification, what the same label for every test row is worth, and how often each label is answered."""
    guess, system = best_guess(run), run.metrics.delivered.name
    if guess is None:
        return []
    label, share = guess
    answered = Counter(row.prediction for row in run.predictions[system])
    counts = listed([f"{name} {answered[name]}" for name in run.data.report["labels"]])
    return [
        f"To answer {label}, the most frequent label of the training rows, always has accuracy {share:.1f} on the test. "
        f"What is handed over answers: {counts}."
    ]


def best_guess(run: Run) -> tuple[str, float] | None:
    """Of a classification, the most frequent label of the training rows, and the accuracy in percent of answering it always."""
    counts: dict[str, dict[str, int]] = run.data.report.get("labels") or {}
    rows = run.predictions[run.metrics.delivered.name]
    if not counts or not rows:
        return None
    label = max(counts, key=lambda name: counts[name].get("train", 0))
    return label, 100 * sum(label in row.references for row in rows) / len(rows)


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
    if metric not in METRICS or METRICS[metric].below_zero:
        return None, f"{metric_title(metric)} {score:.3g}"
    if score >= 99.95:
        return "right", "✓ right"
    return ("wrong", "✗ wrong") if score <= 0 else ("partly", f"≈ {metric_title(metric)} {score:.0f}")


def _likeness(rows: Sequence[Prediction], metric: str | None) -> tuple[float, int]:
    """How alike the answers are: first by their scores, then by their texts."""
    scores = [row.scores[metric] for row in rows] if metric else [0.0]
    return min(scores) - max(scores), -len({row.prediction for row in rows})


def _cut(text: str, most: int = CHARACTERS_SHOWN) -> str:
    """A text, or its beginning and its end: the question stands at the end of a prompt."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[len(text) - most // 2 + 3 :]}"
