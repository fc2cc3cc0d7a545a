"""ROUGE, BLEU and chrF++ that hold for Arabic and Chinese, too."""

import unicodedata
from collections.abc import Iterable
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any

from grasp_lora.evaluation.short_answers import MetricScore, Outputs, score_of_fractions
from grasp_lora.text.characters import DOTTED, is_unspaced, lowered, split_unspaced
from grasp_lora.text.languages import KNOWN

if TYPE_CHECKING:
    from torch import Tensor

_ZERO_WIDTH_SPACE = "\u200b"
_WORD_ORDER, _BETA = 2, 2  # what makes chrF chrF++
_BLEU_TOKENIZERS = {"zh": "zh", "yue": "zh", "en": "13a"} | dict.fromkeys(("ja", "th", "lo", "my", "km"), "char")


class UnicodeTokenizer:
    """Split text of any script into the tokens that ROUGE counts; the stock tokenizer knows a-z and 0-9 only.

    A token is one of what `split_unspaced` sets apart, or a run of letters and digits with their combining marks. Punctuation,
    symbols, emoji, lone marks and the zero-width space separate tokens; other invisible characters are dropped without
    separating. Text is `lowered`, in Unicode form NFC and not stemmed. On ASCII it equals the stock tokenizer without stemmer.

    >>> UnicodeTokenizer().tokenize("हिन्दी 2026年, كِتَاب!")
    ['हिन्दी', '2026', '年', 'كِتَاب']
    """

    def __init__(self, language: str = "") -> None:
        self._language = language

    def tokenize(self, text: str) -> list[str]:
        """List the tokens of `text` in their order; the name is the one rouge-score calls."""
        tokens = []
        word = ""
        for character in split_unspaced(unicodedata.normalize("NFC", lowered(text, self._language))) + " ":
            category = unicodedata.category(character)
            if category[0] in "LN" or (category[0] == "M" and word):
                word += character
            elif category == "Cf" and character != _ZERO_WIDTH_SPACE:
                continue
            elif word:
                tokens.append(word)
                word = ""
        return tokens


def rouge(kind: str, outputs: Outputs) -> MetricScore:
    """Score the F-measure of one kind of ROUGE against the best reference, on `UnicodeTokenizer` tokens.

    A text without tokens scores 0, even against itself; so does one of a single token under rouge2.

    Source: rouge-score, the Python port of ROUGE-1.5.5 (Lin 2004).
    """
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: not at the top

    code = outputs.language_code
    scorer = RougeScorer([kind], tokenizer=UnicodeTokenizer(code))
    pairs = zip(outputs.predictions, outputs.references, strict=True)
    return score_of_fractions(
        kind,
        outputs,
        [float(scorer.score_multi(references, prediction)[kind].fmeasure) for prediction, references in pairs],
        measure="f",
        case=f"lc_{code}" if code in DOTTED else "lc",
        form="nfc",
        tok="unicode",
        stem="no",
        arabic_norm="no",  # as in signatures of earlier results
        unicode=unicodedata.unidata_version,
        rouge_score=version("rouge-score"),
    )


def bleu_tokenizer(code: str, references: Iterable[str]) -> str:
    """The tokenizer of sacrebleu for a language by its `language_code`, and for one that is not known by its references."""
    unspaced = code not in KNOWN and is_unspaced("".join(references))
    return _BLEU_TOKENIZERS.get(code) or ("char" if unspaced else "intl")


def bleu(outputs: Outputs) -> MetricScore:
    """Score BLEU-4 over the whole set, case-sensitive, with the signature of sacrebleu.

    Tokenizer `zh` for Chinese, `13a` for English, `char` for Japanese, Thai, Lao, Burmese and Khmer, `intl` for all others of
    `KNOWN`. Any other language has `char` where most letters of the references stand in a script without spaces between words,
    else `intl`. Several references are pooled, so adding one can lower the score through the length penalty. `per_example` is
    sentence BLEU with effective order. Where no text has 4 tokens, the corpus score is 0 even of identical texts.

    Source: sacrebleu (Post 2018).
    """
    from sacrebleu.metrics.bleu import BLEU  # takes a moment: not at the top

    tokenizer = bleu_tokenizer(outputs.language_code, chain.from_iterable(outputs.references))
    corpus = BLEU(tokenize=tokenizer)
    value = corpus.corpus_score(outputs.predictions, _columns(outputs)).score
    sentence = BLEU(tokenize=tokenizer, effective_order=True)
    sentences: list[Any] = [
        sentence.sentence_score(prediction, references)
        for prediction, references in zip(outputs.predictions, outputs.references, strict=True)
    ]
    return MetricScore(
        "bleu",
        _at_most_100(value),
        str(corpus.get_signature()),
        tuple(_at_most_100(scored.score) for scored in sentences),
        tuple((float(s.sys_len), float(s.ref_len), *map(float, s.counts + s.totals)) for s in sentences),
    )


def bleu_from_statistics(sums: "Tensor") -> "Tensor":
    """Compute many BLEU-4 scores of a corpus at once, each what sacrebleu gives with its default smoothing `exp`.

    Args:
        sums: the `statistics` of `bleu` added up over examples [..., 10]: length of the predictions, length of the nearest
            references, matches of 1- to 4-grams, number of 1- to 4-grams.

    Returns:
        Scores in [0, 100], of shape [...].
    """
    import torch

    length, wanted, matches, counts = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:]
    # The first order without a match counts as half a match, the second as a quarter, and so on.
    smoothed = torch.where(matches > 0, matches, 0.5 ** (matches == 0).cumsum(dim=-1))
    precision = (smoothed / counts).log().mean(dim=-1).exp()
    brevity = (1.0 - wanted / length).clamp(max=0.0).exp()
    # Without any match, or any 4-gram, the score is 0; what was computed for such a row is no number.
    scored = (matches.sum(dim=-1) > 0) & (counts[..., 3] > 0)
    return torch.where(scored, 100.0 * brevity * precision, 0.0).clamp(max=100.0)


def chrf(outputs: Outputs) -> MetricScore:
    """Score chrF++ over the whole set, case-sensitive, with the signature of sacrebleu.

    It counts shared runs of 1 to 6 characters, white space left out, and of 1 to 2 words; recall counts four times as much as
    precision (beta 2). Words stand between white space, whatever the language. The reference with the best score counts.
    `per_example` is chrF++ of the sentence.

    Source: sacrebleu (Post 2018); Popović 2017.
    """
    from sacrebleu.metrics.chrf import CHRF

    corpus = CHRF(word_order=_WORD_ORDER)
    value = corpus.corpus_score(outputs.predictions, _columns(outputs)).score
    signature = str(corpus.get_signature())  # before sentences are scored, which changes the number of references
    # What sacrebleu's own bootstrap draws from; a score does not hold it, as that of BLEU does.
    statistics = corpus._extract_corpus_statistics(outputs.predictions, _columns(outputs))
    sentences = [
        corpus.sentence_score(prediction, references).score
        for prediction, references in zip(outputs.predictions, outputs.references, strict=True)
    ]
    return MetricScore(
        "chrf++",
        _at_most_100(value),
        signature,
        tuple(map(_at_most_100, sentences)),
        tuple(tuple(map(float, row)) for row in statistics),
    )


def chrf_from_statistics(sums: "Tensor") -> "Tensor":
    """Compute many chrF++ scores of a corpus at once, each what sacrebleu gives.

    Args:
        sums: the `statistics` of `chrf` added up over examples [..., 24]: of each order, 1 to 6 characters and 1 to 2 words, the
            runs of the predictions, those of the references, and the shared ones.

    Returns:
        Scores in [0, 100], of shape [...].
    """
    predicted, wanted, shared = sums.reshape(*sums.shape[:-1], -1, 3).unbind(-1)
    counted = (predicted > 0) & (wanted > 0)  # an order without runs on one side has no part in the mean
    orders = counted.sum(dim=-1).clamp(min=1)
    precision = (shared / predicted.clamp(min=1.0) * counted).sum(dim=-1) / orders
    recall = (shared / wanted.clamp(min=1.0) * counted).sum(dim=-1) / orders
    below = _BETA**2 * precision + recall
    return (100.0 * (1 + _BETA**2) * precision * recall / below.where(below > 0, 1.0)).clamp(max=100.0)


def _columns(outputs: Outputs) -> list[Any]:
    """The first references of all examples, then the second ones, with None for a missing one, as sacrebleu wants them."""
    most = max(len(references) for references in outputs.references)
    return [
        [references[rank] if rank < len(references) else None for references in outputs.references]
        for rank in range(most)
    ]


def _at_most_100(value: float) -> float:
    # exp(log(100)) is 100.00000000000004: a perfect score must not leave the range.
    return min(value, 100.0)
