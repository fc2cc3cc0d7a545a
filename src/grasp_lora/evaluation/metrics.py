"""What a prediction is worth: labels, exact match, token F1, ROUGE, chrF++, BLEU and similarities; Arabic and Chinese, too.

Scores run from 0 to 100, and each comes with a signature: everything one needs to know to compute it again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from grasp_lora.errors import DataError, RecipeError
from grasp_lora.evaluation.bertscore import BertScoreSettings, bertscore, lack_of_bertscore
from grasp_lora.evaluation.overlap import bleu, bleu_from_statistics, chrf, chrf_from_statistics, rouge
from grasp_lora.evaluation.short_answers import (
    MetricScore,
    Outputs,
    accuracy,
    exact_match,
    macro_f1,
    macro_f1_from_statistics,
    sign,
    token_f1,
)
from grasp_lora.storage.reading import reading
from grasp_lora.text.languages import language_code
from grasp_lora.text.names import imported

# Of the largest score of an example: how far the value of a metric of one's own may be from the mean, since it may be rounded.
_ROUNDED = 0.005

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """How to compute a metric.

    Args:
        function: from outputs to their score, higher is better.
        summary: one line on what it is.
        from_statistics: for a score that is no mean over examples, a function from summed `MetricScore.statistics` [..., k] to
            scores [...]; the paired bootstrap needs it. None for a mean.
        lack: for a metric that is not there for every language, a function from a code (see `language_code`) to what is lacking,
            such as "no model for sw", or to None. It raises a RecipeError where something has to be installed first.
        title: what it is called where it is printed.
        leads: whether it comes first in tables and verdicts, wherever it was computed.
        usable: score below which most answers are no use; None where that is not known.
        below_zero: whether scores may be.
        spread: standard deviation over examples of the difference of two systems, each the mean of three seeds: the largest of
            the planned ones in `lab/results`, rounded up. None where that is not known.
    """

    function: Callable[[Outputs], MetricScore]
    summary: str
    from_statistics: "Callable[[Tensor], Tensor] | None" = None
    lack: Callable[[str], str | None] | None = None
    title: str = ""
    leads: bool = False
    usable: float | None = None
    below_zero: bool = False
    spread: float | None = None

    def lacking(self, language: str) -> str | None:
        """What a language lacks for this metric, or None; see `lack`."""
        return self.lack(language_code(language)) if self.lack else None


METRICS: dict[str, Metric] = {  # in the order of columns
    "accuracy": Metric(accuracy, "share of labels that are right", title="Accuracy", usable=25.0, spread=33.0),
    "macro_f1": Metric(
        macro_f1,
        "mean of the F1 of each label that occurs in the references",
        macro_f1_from_statistics,
        title="Macro-F1",
    ),
    "chrf++": Metric(
        chrf,
        "chrF++ of the corpus, by sacrebleu: shared pieces of words, and words",
        chrf_from_statistics,
        title="chrF++",
        usable=35.0,
    ),
    "f1": Metric(
        token_f1,
        "overlap of the tokens with the best gold answer (MLQA rules)",
        title="F1",
        leads=True,
        usable=25.0,
        spread=26.0,
    ),
    "rougeL": Metric(
        partial(rouge, "rougeL"),
        "F-measure of the longest common subsequence of words",
        title="ROUGE-L",
        leads=True,
        usable=15.0,
        spread=9.0,
    ),
    "exact_match": Metric(
        exact_match,
        "share of answers that equal a gold answer (MLQA rules)",
        title="Exact match",
        leads=True,
        usable=25.0,
        spread=28.0,
    ),
    "bertscore": Metric(
        bertscore,
        "BERTScore-F1: similarity of contextual embeddings; needs a model of the language (extra `eval`)",
        lack=lack_of_bertscore,
        title="BERTScore",
        below_zero=True,
    ),
    "rouge1": Metric(
        partial(rouge, "rouge1"), "F-measure of shared words (characters where words are not spaced)", title="ROUGE-1"
    ),
    "rouge2": Metric(
        partial(rouge, "rouge2"),
        "F-measure of shared pairs of words (characters where words are not spaced)",
        title="ROUGE-2",
    ),
    "bleu": Metric(bleu, "BLEU-4 of the corpus, by sacrebleu", bleu_from_statistics, title="BLEU"),
}


def metric_title(name: str) -> str:
    """What a metric is called where it is printed; one of the user's own as it is named."""
    return METRICS[name].title if name in METRICS else name


def score(
    metrics: Sequence[str] | Mapping[str, Metric],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    language: str,
    labels: Sequence[str] = (),
) -> dict[str, MetricScore]:
    """Score predictions against their references with each metric.

    Args:
        metrics: names, or what `resolve_metrics` made of them.
        predictions, references, language, labels: see `Outputs`. The best reference counts; BLEU pools them instead.

    Raises:
        RecipeError: a name is unknown (see `resolve_metrics`).
        DataError: outputs that cannot be scored (see `Outputs`), or a metric of the user's own that gives no sound score.

    >>> score(["f1"], ["the red house"], [["a house", "red"]], "en")["f1"].per_example
    (66.66666666666666,)
    """
    chosen = metrics if isinstance(metrics, Mapping) else resolve_metrics(metrics)
    outputs = Outputs(predictions, references, language, labels)
    return {name: _compute(name, metric, outputs) for name, metric in chosen.items()}


def resolve_metrics(
    names: Sequence[str], settings: BertScoreSettings | None = None, *, base: Path = Path()
) -> dict[str, Metric]:
    """Find metrics by name.

    Args:
        names: keys of METRICS, or the import path `package.module:name` of a function from `Outputs` to `MetricScore`, or of a
            `Metric`; importing it runs its code.
        settings, base: for BERTScore (see `bertscore`).

    Raises:
        RecipeError: a name is unknown, or is that of no function.
    """
    metrics = METRICS
    if settings is not None:
        function = partial(bertscore, settings=settings, base=base)
        lack = partial(lack_of_bertscore, settings=settings, base=base)
        metrics = METRICS | {"bertscore": replace(METRICS["bertscore"], function=function, lack=lack)}
    return {name: metrics[name] if name in metrics else _imported(name) for name in names}


def _imported(name: str) -> Metric:
    with reading("metrics", RecipeError):
        function = imported("metric", name, METRICS)
        if not callable(function) and not isinstance(function, Metric):
            raise ValueError(f"{name} is a {type(function).__name__}; it must be a function of Outputs, or a Metric")
    return function if isinstance(function, Metric) else Metric(function, name)


def _compute(name: str, metric: Metric, outputs: Outputs) -> MetricScore:
    """Compute a metric; the score of one of the user's own is checked."""
    if lacking := metric.lacking(outputs.language):
        return MetricScore(name, None, sign(unavailable=lacking), ())
    if name in METRICS:
        return metric.function(outputs)
    with reading(f"metric {name}"):
        result = metric.function(outputs)
    if not isinstance(result, MetricScore):
        raise DataError(f"metric {name} gave a {type(result).__name__}; it must give a MetricScore")
    return _checked(replace(result, name=name), metric, len(outputs.predictions))


def _checked(result: MetricScore, metric: Metric, examples: int) -> MetricScore:
    """A score of a user's own in plain numbers, be they numpy's or of a tensor; tables and statistics build on it."""
    if result.value is None:
        return MetricScore(result.name, None, result.signature, ())
    value, per_example = float(result.value), tuple(map(float, result.per_example))
    statistics = tuple(tuple(map(float, row)) for row in result.statistics)
    mean = sum(per_example) / examples
    faults = []
    if {len(per_example), *([len(statistics)] if metric.from_statistics else [])} != {examples}:
        faults.append(f"must give a score, or a row of statistics, for each of {examples} examples")
    if not all(map(math.isfinite, (value, *per_example))):
        faults.append("gave a number that is not finite")
    if metric.from_statistics is None and abs(value - mean) > _ROUNDED * max(1.0, *map(abs, per_example)):
        faults.append(
            f"gave the value {value:g}, but its scores of the examples have the mean {mean:g}; give that as the value, or name a "
            "Metric with from_statistics"
        )
    if faults:
        raise DataError(f"metric {result.name!r} {faults[0]}")
    # Intervals and verdicts are those of the mean.
    value = mean if metric.from_statistics is None else value
    return replace(result, value=value, per_example=per_example, statistics=statistics)
