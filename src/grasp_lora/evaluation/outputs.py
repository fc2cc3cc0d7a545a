"""What metrics take and give: `Outputs` of a model, and a `MetricScore`."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from grasp_lora.errors import DataError
from grasp_lora.text.languages import language_code

_DECIMALS = 4  # of a percentage: what float32 leaves over batches of different shapes


@dataclass(frozen=True)
class MetricScore:
    """One metric on one set of outputs.

    Args:
        name: the metric, a key of `resolve_metrics`.
        value: the score of the whole set, higher is better: 0 to 100, save for similarities (down to -100, a rescaled BERTScore
            lower) and metrics of a user's own.
            None where the metric is not available here; the signature then says why.
        signature: how it was computed, as `key:value` pairs between bars.
        per_example: one score per output, in their order; empty where `value` is None. `value` is their mean, except for
            BLEU, chrF++ and macro-F1, which are scores of the whole set.
        statistics: of a score that is no mean, one row of counts per output, from whose sums `Metric.from_statistics` computes
            it; empty for a mean.
    """

    name: str
    value: float | None
    signature: str
    per_example: tuple[float, ...]
    statistics: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Outputs:
    """What a model wrote and what it should have written; checked on construction.

    Args:
        predictions: one text per example; may be empty texts.
        references: one or more good texts per example.
        language: code of the language of the texts, such as `ar` or `zh-CN`; see `language_code`.
        labels: of a classification, all that can be chosen; a score of labels has its statistics for each of them, so that those
            of several sets can be added up.

    Raises:
        DataError: nothing to score, lengths that differ, an example without references or with one bare text
            in their place, or a language that is no code.
    """

    predictions: Sequence[str]
    references: Sequence[Sequence[str]]
    language: str
    labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.predictions:
            raise DataError("There are no predictions to score: pass at least one example.")
        if len(self.predictions) != len(self.references):
            raise DataError(
                f"{len(self.predictions)} predictions came with {len(self.references)} lists of references: "
                "pass one list of references per prediction."
            )
        for index, references in enumerate(self.references):
            if isinstance(references, str):
                raise DataError(f"The references of example {index} are one text: pass a list of texts, even for one.")
            if not references:
                raise DataError(f"Example {index} has no references: give it at least one or leave it out.")
        language_code(self.language)

    @property
    def language_code(self) -> str:
        """The language without region or script, in lower case: `zh` for `zh-CN`."""
        return language_code(self.language)

    @property
    def reference_count(self) -> str:
        """How many references an example has: a number, or `var` where it differs."""
        counts = {len(references) for references in self.references}
        return str(counts.pop()) if len(counts) == 1 else "var"


def sign(**parts: str) -> str:
    """Join the parts of a signature.

    >>> sign(case="lc", stem="no")
    'case:lc|stem:no'
    """
    return "|".join(f"{key}:{value}" for key, value in parts.items())


def score_of_fractions(name: str, outputs: Outputs, fractions: Sequence[float], **parts: str) -> MetricScore:
    """Score the mean of one fraction an output, each that of its best reference; `parts` end the signature.

    The mean is rounded as the official MLQA script rounds it.
    """
    # Added up one by one and divided last: sum() rounds differently from Python 3.12 on, and the value has to agree to
    # the last bit.
    total = 0.0
    for value in fractions:
        total += value
    per_example = tuple(100.0 * value for value in fractions)
    return MetricScore(name, 100.0 * total / len(fractions), _best_of(outputs, parts), per_example)


def score_of_similarities(
    name: str, outputs: Outputs, compare: Callable[[list[str], list[str]], Sequence[float]], **parts: str
) -> MetricScore:
    """Score the mean similarity of each prediction to its best reference; `parts` end the signature.

    Args:
        compare: from texts and as many others to the similarity of each pair, at most 1; it gets no blank texts, which score 0.
    """
    counts = [len(references) for references in outputs.references]
    predictions = [text for text, count in zip(outputs.predictions, counts, strict=True) for _ in range(count)]
    pairs = list(zip(predictions, (text for texts in outputs.references for text in texts), strict=True))
    similarities = [0.0] * len(pairs)
    if rows := [row for row, pair in enumerate(pairs) if not any(map(_is_blank, pair))]:
        values = compare([pairs[row][0] for row in rows], [pairs[row][1] for row in rows])
        for row, value in zip(rows, values, strict=True):
            similarities[row] = value
    left = iter(similarities)
    best = tuple(round(min(100.0, 100.0 * max(islice(left, count))), _DECIMALS) for count in counts)
    return MetricScore(name, sum(best) / len(best), _best_of(outputs, parts), best)


def _best_of(outputs: Outputs, parts: dict[str, str]) -> str:
    return sign(nrefs=outputs.reference_count, refs="best", **parts)


def _is_blank(text: str) -> bool:
    return all(unicodedata.category(character)[0] in "CZ" for character in text)
