"""What a prediction is worth: exact match, token F1, ROUGE and BLEU that hold for Arabic and Chinese too.

Scores run from 0 to 100, and each comes with a signature: everything one needs to know to compute it again.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from grasp_lora.errors import DataError

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

# Written without spaces, so each one is a word to ROUGE: ideographs (with 々, 〇 and planes 2 and 3) and kana.
_IDEOGRAPH_OR_KANA = re.compile(
    "[\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
_ZERO_WIDTH_SPACE = "\u200b"

_ARABIC_DIACRITICS_AND_TATWEEL = re.compile(
    "[\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed]"
)
_ARABIC_LETTERS = str.maketrans("أإآٱى", "ااااي")


@dataclass(frozen=True)
class MetricScore:
    """One metric on one set of outputs.

    Args:
        name: the metric, a key of METRICS.
        value: the score of the whole set, in [0, 100].
        signature: how it was computed, as `key:value` pairs between bars.
        per_example: one score in [0, 100] per output, in their order. `value` is their mean, except for BLEU,
            which is a score of the corpus and no mean.
    """

    name: str
    value: float
    signature: str
    per_example: tuple[float, ...]


@dataclass(frozen=True)
class Outputs:
    """What a model wrote and what it should have written; checked on construction.

    Args:
        predictions: one text per example; may be empty texts.
        references: one or more good texts per example.
        language: code of the language of the texts, such as `ar` or `zh-CN`; only the part before the first
            hyphen or underscore counts.
        arabic_normalisation: see `score`.

    Raises:
        DataError: nothing to score, lengths that differ, an example without references or with one bare text
            in their place, or a language that is no code.
    """

    predictions: Sequence[str]
    references: Sequence[Sequence[str]]
    language: str
    arabic_normalisation: bool = False

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
        if not re.fullmatch(r"[A-Za-z]{2,3}(?:[-_].+)?", self.language):
            raise DataError(
                f"{self.language!r} is no language code: pass one of two or three letters such as 'ar' or 'zh-CN'."
            )

    @property
    def language_code(self) -> str:
        """The language without region or script, in lower case: `zh` for `zh-CN`."""
        return re.split("[-_]", self.language.lower())[0]

    @property
    def reference_count(self) -> str:
        """How many references an example has: a number, or `var` where it differs."""
        counts = {len(references) for references in self.references}
        return str(counts.pop()) if len(counts) == 1 else "var"


@dataclass(frozen=True)
class Metric:
    """A row of METRICS: how to compute a metric, and one line on what it is."""

    function: Callable[[Outputs], MetricScore]
    summary: str


def score(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    language: str,
    arabic_normalisation: bool = False,
) -> dict[str, MetricScore]:
    """Score predictions against their references with each of the named metrics.

    Args:
        names: keys of METRICS, at least one.
        predictions, references, language: see `Outputs`. The best reference counts (BLEU pools them instead);
            the language decides articles and tokens of the answer metrics and the tokenizer of BLEU.
        arabic_normalisation: let ROUGE overlook spelling variants of Arabic (see `UnicodeTokenizer`). Ignored
            in other languages and by the other metrics, whose rules are those of their official scripts.

    Raises:
        DataError: unknown names, or outputs that cannot be scored (see `Outputs`).

    >>> score(["f1"], ["the red house"], [["a house", "red"]], "en")["f1"].per_example
    (66.66666666666666,)
    """
    if not names:
        raise DataError(f"No metric was named: choose from {', '.join(METRICS)}.")
    if unknown := [name for name in names if name not in METRICS]:
        raise DataError(f"Unknown metrics {', '.join(map(repr, unknown))}: choose from {', '.join(METRICS)}.")
    outputs = Outputs(predictions, references, language, arabic_normalisation)
    return {name: METRICS[name].function(outputs) for name in names}


def metrics_for(task: str) -> tuple[str, ...]:
    """Name the metrics a task is judged by unless the recipe says otherwise.

    Args:
        task: "qa", "summarization" or "completion".

    Raises:
        DataError: another task.

    >>> metrics_for("qa")
    ('exact_match', 'f1')
    """
    if task not in _TASK_METRICS:
        raise DataError(f"There are no default metrics for task {task!r}: choose from {', '.join(_TASK_METRICS)}.")
    return _TASK_METRICS[task]


def answer_tokens(text: str, language: str) -> list[str]:
    """Split an answer into the tokens that exact match and F1 compare.

    Lower-case, drop punctuation (Unicode category P and ASCII punctuation), blank out articles, then split
    at white space, in Chinese also around each ideograph from U+4E00 to U+9FA5. A language outside MLQA's en,
    es, de, vi, ar, hi and zh, which the official script refuses, is split at white space, without articles.

    Args:
        text: any text, raw.
        language: two- or three-letter code, without a region.

    Source: MLQA evaluation v1 (Lewis et al. 2020), whose results it repeats bit for bit.

    >>> answer_tokens("The Well-known 第3章!", "en"), answer_tokens("Well-known 第3章!", "zh")
    (['wellknown', '第3章'], ['wellknown', '第', '3', '章'])
    """
    text = "".join(character for character in text.lower() if not _is_punctuation(character))
    if articles := _ARTICLES.get(language):
        text = re.sub(articles, " ", text)
    if language == "zh":
        text = _MLQA_CHINESE.sub(r" \g<0> ", text)
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
    signature = _signature(
        nrefs=outputs.reference_count,
        refs="best",
        rules="mlqa_v1" if code in _ARTICLES else "mlqa_v1_other_language",
        lang=code,
        case="lc",
        articles="removed" if _ARTICLES.get(code) else "none",
        tok="mixed" if code == "zh" else "whitespace",
        unicode=unicodedata.unidata_version,
    )
    return MetricScore(name, _mean_percent(fractions), signature, tuple(100.0 * value for value in fractions))


def _mean_percent(fractions: Sequence[float]) -> float:
    # Added up one by one and divided last, as the official MLQA script does: sum() rounds differently from
    # Python 3.12 on, and the value has to agree to the last bit.
    total = 0.0
    for value in fractions:
        total += value
    return 100.0 * total / len(fractions)


class UnicodeTokenizer:
    """Split text of any script into the tokens that ROUGE counts; the stock tokenizer knows a-z and 0-9 only.

    A token is an ideograph or kana, or a run of letters and digits of any other script with their combining
    marks (Arabic diacritics, Devanagari vowel signs). Punctuation, symbols and emoji separate tokens and are
    dropped; so are marks that stand alone. Invisible format characters (joiners, direction marks) are dropped
    without separating, save the zero-width space. Text is lower-cased and put in Unicode form NFC, no words
    are stemmed. On ASCII it equals the stock tokenizer without stemmer. Thai, Lao and Khmer, which are
    written without spaces, are not segmented.

    Args:
        arabic_normalisation: also write أ إ آ ٱ as ا and ى as ي, and remove tatweel and diacritics. Ta
            marbuta and the hamza on waw and ya stay.

    >>> UnicodeTokenizer().tokenize("हिन्दी 2026年, كِتَاب!")
    ['हिन्दी', '2026', '年', 'كِتَاب']
    """

    def __init__(self, arabic_normalisation: bool = False) -> None:
        self.arabic_normalisation = arabic_normalisation

    def tokenize(self, text: str) -> list[str]:
        """List the tokens of `text` in their order; the name is the one rouge-score calls."""
        text = unicodedata.normalize("NFC", text.lower())
        if self.arabic_normalisation:
            text = _ARABIC_DIACRITICS_AND_TATWEEL.sub("", text).translate(_ARABIC_LETTERS)
        tokens = []
        word = ""
        for character in _IDEOGRAPH_OR_KANA.sub(r" \g<0> ", text) + " ":
            category = unicodedata.category(character)
            if category[0] in "LN" or (category[0] == "M" and word):
                word += character
            elif category == "Cf" and character != _ZERO_WIDTH_SPACE:
                continue
            elif word:
                tokens.append(word)
                word = ""
        return tokens


def _rouge(kind: str, outputs: Outputs) -> MetricScore:
    """Score the F-measure of one kind of ROUGE against the best reference, on `UnicodeTokenizer` tokens.

    A text without tokens scores 0, even against itself; so does one of a single token under rouge2.

    Source: rouge-score, the Python port of ROUGE-1.5.5 (Lin 2004).
    """
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: not at the top

    normalise = outputs.arabic_normalisation and outputs.language_code == "ar"
    scorer = RougeScorer([kind], tokenizer=UnicodeTokenizer(normalise))
    fractions = [
        float(scorer.score_multi(references, prediction)[kind].fmeasure)
        for prediction, references in zip(outputs.predictions, outputs.references, strict=True)
    ]
    signature = _signature(
        nrefs=outputs.reference_count,
        refs="best",
        measure="f",
        case="lc",
        form="nfc",
        tok="unicode",
        stem="no",
        arabic_norm="alef_ya_tatweel_diacritics" if normalise else "no",
        unicode=unicodedata.unidata_version,
        rouge_score=version("rouge-score"),
    )
    return MetricScore(kind, _mean_percent(fractions), signature, tuple(100.0 * value for value in fractions))


def bleu(outputs: Outputs) -> MetricScore:
    """Score BLEU-4 over the whole set, case-sensitive, with the signature of sacrebleu.

    Tokenizer `zh` for Chinese, `13a` for English, `intl` for every other language. Several references are
    pooled as sacrebleu does it, so adding one can lower the score through the length penalty. `per_example`
    is sentence BLEU with effective order. Identical texts score 100 from 4 tokens on; below that the corpus
    score is what sacrebleu gives, 0 where no text reaches 4 tokens, and the sentence score is 100.

    Source: sacrebleu (Post 2018).
    """
    from sacrebleu.metrics.bleu import BLEU  # takes a moment: not at the top

    tokenizer = {"zh": "zh", "en": "13a"}.get(outputs.language_code, "intl")
    corpus = BLEU(tokenize=tokenizer)
    most = max(len(references) for references in outputs.references)
    # sacrebleu wants the first references of all examples, then the second ones, with None for a missing one;
    # its type hints do not know of None.
    columns: list[Any] = [
        [references[rank] if rank < len(references) else None for references in outputs.references]
        for rank in range(most)
    ]
    value = corpus.corpus_score(outputs.predictions, columns).score
    sentence = BLEU(tokenize=tokenizer, effective_order=True)
    per_example = tuple(
        _at_most_100(sentence.sentence_score(prediction, references).score)
        for prediction, references in zip(outputs.predictions, outputs.references, strict=True)
    )
    return MetricScore("bleu", _at_most_100(value), str(corpus.get_signature()), per_example)


def _at_most_100(value: float) -> float:
    # exp(log(100)) is 100.00000000000004: a perfect score must not leave the range.
    return min(value, 100.0)


def _signature(**parts: str) -> str:
    return "|".join(f"{key}:{value}" for key, value in parts.items())


# A further metric, such as BERTScore, is one function from Outputs to MetricScore and one row here.
METRICS: dict[str, Metric] = {
    "exact_match": Metric(exact_match, "share of answers that equal a gold answer (MLQA rules)"),
    "f1": Metric(token_f1, "overlap of the tokens with the best gold answer (MLQA rules)"),
    "rouge1": Metric(partial(_rouge, "rouge1"), "F-measure of shared words (Chinese: characters)"),
    "rouge2": Metric(partial(_rouge, "rouge2"), "F-measure of shared pairs of words (Chinese: characters)"),
    "rougeL": Metric(partial(_rouge, "rougeL"), "F-measure of the longest common subsequence of words"),
    "bleu": Metric(bleu, "BLEU-4 of the corpus, by sacrebleu"),
}

_TASK_METRICS: dict[str, tuple[str, ...]] = {
    "qa": ("exact_match", "f1"),
    "summarization": ("rougeL", "bleu"),
    "completion": ("exact_match", "rougeL"),
}
