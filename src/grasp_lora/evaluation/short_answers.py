"""What metrics take and give, and those of short answers: exact match and token F1 by the rules of MLQA, accuracy and macro-F1.

A metric is a function from `Outputs`, what a model wrote and should have written, to a `MetricScore`: a number for the whole set,
100 at best, one for each example, and a signature that says how to compute it again.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grasp_lora.text.characters import DOTTED, INVISIBLE, JOINERS, lowered, space_words, split_unspaced
from grasp_lora.text.languages import language_code

if TYPE_CHECKING:
    from torch import Tensor

# What MLQA counts as an article, as a pattern on text without punctuation; None: no articles. The Arabic one
# has no word boundary, so it also cuts "ال" out of the middle of a word: the official rule has that effect.
_ARTICLES: dict[str, str | None] = {
    "en": r"\b(?:the|an|a)\b",
    "es": r"\b(?:el|la|los|las|un|una|unos|unas)\b",
    "de": r"\b(?:der|die|das|den|dem|des|ein|eine|einer|eines|einem|einen)\b",
    "vi": r"\b(?:những|chiếc|cái|là|của)\b",
    "ar": "ال",
    "hi": None,
    "zh": None,
}
_MLQA_CHINESE = re.compile("[\u4e00-\u9fa5]")


@dataclass(frozen=True)
class MetricScore:
    """One metric on one set of outputs.

    Args:
        name: the metric, a key of `resolve_metrics`.
        value: the score of the whole set, higher is better: 0 to 100, save for similarities, which may be below 0, and metrics of
            a user's own. None where the metric is not available here; the signature then says why.
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
    """What a model wrote and what it should have written.

    Args:
        predictions: one text per example, at least one; may be empty texts.
        references: one or more good texts per example.
        language: code of the language of the texts, such as `ar` or `zh-CN`; see `language_code`.
        labels: of a classification, all that can be chosen; a score of labels has its statistics for each of them, so that those
            of several sets can be added up.

    Raises:
        DataError: the language is no code.
    """

    predictions: Sequence[str]
    references: Sequence[Sequence[str]]
    language: str
    labels: Sequence[str] = ()

    def __post_init__(self) -> None:
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
    signature = sign(nrefs=outputs.reference_count, refs="best", **parts)
    return MetricScore(name, 100.0 * total / len(fractions), signature, per_example)


def accuracy(outputs: Outputs) -> MetricScore:
    """Score 100 where the prediction is one of the references, letter by letter, else 0."""
    return score_of_fractions("accuracy", outputs, list(map(float, _hits(outputs))), match="text")


def macro_f1(outputs: Outputs) -> MetricScore:
    """Score the mean over labels of each label's F1: 2 * right / (predicted + true).

    The labels that count are those that occur in the references. A prediction that is none of them is wrong, and has no F1 of its
    own. Of several references the predicted one counts, or else the first. `per_example` is that of `accuracy`; the statistics
    are, of each label, whether the example is right, predicted and true.

    Source: scikit-learn's `f1_score(average="macro")` with the labels of the references.
    """
    import torch

    labels = sorted({*outputs.labels, *(reference for references in outputs.references for reference in references)})
    hits = _hits(outputs)
    rows = []
    for prediction, references, hit in zip(outputs.predictions, outputs.references, hits, strict=True):
        true = prediction if hit else references[0]
        cells = ((label == prediction == true, label == prediction, label == true) for label in labels)
        rows.append(tuple(float(cell) for triple in cells for cell in triple))
    return MetricScore(
        "macro_f1",
        float(macro_f1_from_statistics(torch.tensor(rows, dtype=torch.float64).sum(dim=0))),
        sign(nrefs=outputs.reference_count, match="text", labels="in_references", average="macro"),
        tuple(100.0 * hit for hit in hits),
        tuple(rows),
    )


def macro_f1_from_statistics(sums: "Tensor") -> "Tensor":
    """Compute many macro-F1 scores at once, each over the labels that its examples have.

    Args:
        sums: the `statistics` of `macro_f1` added up over examples [..., 3 * labels].

    Returns:
        Scores in [0, 100], of shape [...].
    """
    right, predicted, true = sums.reshape(*sums.shape[:-1], -1, 3).unbind(-1)
    present = true > 0
    scores = 2.0 * right / (predicted + true).clamp(min=1.0)
    return 100.0 * (scores * present).sum(dim=-1) / present.sum(dim=-1)


def _hits(outputs: Outputs) -> list[bool]:
    pairs = zip(outputs.predictions, outputs.references, strict=True)
    return [prediction in references for prediction, references in pairs]


def answer_tokens(text: str, language: str) -> list[str]:
    """Split an answer into the tokens that exact match and F1 compare.

    Lower-case, drop punctuation (Unicode category P and ASCII punctuation), blank out articles, then split at white space, in
    Chinese also around ideographs. A language outside MLQA, which the official script refuses, has no articles and is split at
    white space, by `space_words` and by `split_unspaced`, in Unicode form NFC without invisible marks and without joiners around
    words; its letters are those of `lowered`.

    Source: MLQA evaluation v1 (Lewis et al. 2020), whose results it repeats bit for bit.

    >>> answer_tokens("The Well-known 第3章!", "en"), answer_tokens("Well-known 第3章!", "zh")
    (['wellknown', '第3章'], ['wellknown', '第', '3', '章'])
    """
    text = text.lower() if language in _ARTICLES else lowered(space_words(text), language)
    text = "".join(character for character in text if not _is_punctuation(character))
    if articles := _ARTICLES.get(language):
        text = re.sub(articles, " ", text)
    if language == "zh":
        text = _MLQA_CHINESE.sub(r" \g<0> ", text)
    elif language not in _ARTICLES:
        text = split_unspaced(INVISIBLE.sub("", unicodedata.normalize("NFC", text)))
        return [bare for word in text.split() if (bare := word.strip(JOINERS))]
    return text.split()


def _is_punctuation(character: str) -> bool:
    # ASCII "$+<=>^`|~" are symbols to Unicode, and punctuation to MLQA.
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def exact_match(outputs: Outputs) -> MetricScore:
    """Score 100 where prediction and a reference have the same `answer_tokens`, else 0.

    As in the official script, texts without any token (empty, or only articles and punctuation) are equal.
    """
    return _answer_metric("exact_match", outputs, lambda prediction, reference: float(prediction == reference))


def token_f1(outputs: Outputs) -> MetricScore:
    """Score the overlap of the `answer_tokens` of prediction and best reference, whatever their order.

    As in the official script, texts without any token score 0, even against each other.
    """
    return _answer_metric("f1", outputs, _bag_f1)


def _bag_f1(prediction: list[str], reference: list[str]) -> float:
    shared = (Counter(prediction) & Counter(reference)).total()
    if not shared:
        return 0.0
    precision = shared / len(prediction)
    recall = shared / len(reference)
    # 2 * shared / (lengths) is simpler, and differs from the official value in the last bit.
    return 2 * precision * recall / (precision + recall)


def _answer_metric(name: str, outputs: Outputs, compare: Callable[[list[str], list[str]], float]) -> MetricScore:
    code = outputs.language_code
    fractions = []
    for prediction, references in zip(outputs.predictions, outputs.references, strict=True):
        tokens = answer_tokens(prediction, code)
        fractions.append(max(compare(tokens, answer_tokens(reference, code)) for reference in references))
    return score_of_fractions(
        name,
        outputs,
        fractions,
        rules="mlqa_v1" if code in _ARTICLES else "mlqa_v1_other_language",
        lang=code,
        case=f"lc_{code}" if code in DOTTED else "lc",
        articles="removed" if _ARTICLES.get(code) else "none",
        **({} if code in _ARTICLES else {"form": "nfc"}),
        tok="mixed" if code == "zh" else "whitespace" if code in _ARTICLES else "whitespace+unspaced",
        unicode=unicodedata.unidata_version,
    )
