"""Exact match and token F1 of answers, by the rules of MLQA."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable

from grasp_lora.evaluation.outputs import MetricScore, Outputs, score_of_fractions
from grasp_lora.text.characters import DOTTED, INVISIBLE, JOINERS, bare_words, lowered, space_words, split_unspaced

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
MLQA_LANGUAGES = frozenset(_ARTICLES)  # whose rules stay as they are
_MLQA_CHINESE = re.compile("[\u4e00-\u9fa5]")


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


def taken_for_one(answers: Iterable[str], language: str) -> tuple[str, str] | None:
    """Find two answers that the metrics of this module take for the same, such as `C` and `C++`; None where there are none.

    Two that differ in case, white space and the marks around words alone are no such pair. An answer without any token is
    taken for an empty one.

    Args:
        answers: of different examples.
        language: as `language_code` gives it.
    """
    seen: dict[tuple[str, ...], str] = {(): ""}
    for answer in answers:
        other = seen.setdefault(tuple(answer_tokens(answer, language)), answer)
        if _words(other) != _words(answer):
            return other, answer
    return None


def _words(text: str) -> list[str]:
    return bare_words(split_unspaced(INVISIBLE.sub("", unicodedata.normalize("NFC", space_words(text)))))


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
