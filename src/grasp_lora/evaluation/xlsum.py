"""ROUGE-L as it is published for XL-Sum: other tokens than those of `overlap`, so other scores."""

import re
import unicodedata
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from string import punctuation

from grasp_lora.evaluation.outputs import MetricScore, Outputs, score_of_fractions
from grasp_lora.evaluation.overlap import rouge_fractions
from grasp_lora.text.names import needs

_STEMMERS = {
    "ar": "arabic", "da": "danish", "de": "german", "en": "english", "es": "spanish", "fi": "finnish", "fr": "french",
    "hu": "hungarian", "it": "italian", "nl": "dutch", "no": "norwegian", "pt": "portuguese", "ro": "romanian",
    "ru": "russian", "sv": "swedish",
}  # fmt: skip
_SHORT = 3  # letters; a token of up to so many is not stemmed
# What the authors take further packages for.
_LACKING = dict.fromkeys(("bn", "hi", "tr"), "no stemmer") | dict.fromkeys(("ja", "my", "th"), "no word segmenter")
_IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f]")


def lack_of_xlsum_rouge(language: str) -> str | None:
    """Say what the authors have for a language and this package has not, or check that what it needs is installed.

    Raises:
        RecipeError: jieba is not installed, and the language is Chinese.
    """
    if language in _LACKING:
        return f"{_LACKING[language]} for {language}"
    if language == "zh":
        needs("rougeL_xlsum", "jieba", "jieba", extra="eval")
    return None


class XlsumTokenizer:
    """Split text into the tokens that the authors of XL-Sum count.

    Lower-case; control characters are dropped, punctuation (Unicode category P and all ASCII symbols) separates. Chinese is cut
    into words by jieba, and a space between two of its phrases is a token, too. In other languages a token is a run of letters
    with their marks, or of digits, or one symbol or ideograph; tokens of more than three characters are stemmed by Snowball where
    that knows the language. The authors leave stop words unstemmed, by a list that NLTK downloads when it runs; here all are.

    >>> XlsumTokenizer("en").tokenize("Running 3rd, she's 50% faster!")
    ['run', '3', 'rd', 'she', 's', '50', 'faster']
    """

    def __init__(self, language: str) -> None:
        self.split = _jieba_cut() if language == "zh" else _runs
        self.stem: Callable[[str], str] = str
        if language in _STEMMERS:
            from nltk.stem import SnowballStemmer

            self.stem = SnowballStemmer(_STEMMERS[language]).stem

    def tokenize(self, text: str) -> list[str]:
        """List the tokens of `text` in their order; the name is the one rouge-score calls."""
        tokens = self.split(" ".join("".join(map(_cleaned, text.lower())).split()))
        stems = (self.stem(token) if len(token) > _SHORT else token for token in tokens)
        return [token for token in stems if token]


def xlsum_rouge(outputs: Outputs) -> MetricScore:
    """Score ROUGE-L against the best reference on `XlsumTokenizer` tokens.

    Args:
        outputs: in a language that `lack_of_xlsum_rouge` finds nothing lacking for.

    Source: Hasan et al. 2021, XL-Sum, and the scorer published with it.
    """
    code = outputs.language_code
    words = {"seg": "jieba", "jieba": version("jieba")} if code == "zh" else {"seg": "no"}
    stems = {"stem": "no"}
    if code in _STEMMERS:
        stems = {"stem": f"snowball_{_STEMMERS[code]}", "stop": "no", "nltk": version("nltk")}
    return score_of_fractions(
        "rougeL_xlsum",
        outputs,
        rouge_fractions("rougeL", outputs, XlsumTokenizer(code)),
        measure="f",
        case="lc",
        tok="xlsum",
        **words,
        **stems,
        unicode=unicodedata.unidata_version,
        rouge_score=version("rouge-score"),
    )


def _cleaned(character: str) -> str:
    """What a character becomes: itself, a space or nothing."""
    category = unicodedata.category(character)
    if character in "\t\n\r" or character in punctuation or category == "Zs" or category[0] == "P":
        return " "
    return "" if category[0] == "C" or character == "\ufffd" else character


def _runs(text: str) -> list[str]:
    tokens: list[str] = []
    before = " "
    for character in _IDEOGRAPH.sub(r" \g<0> ", text):
        kind = unicodedata.category(character)[0]
        if kind == "Z":
            before = " "
        elif before != " " and (kind == "M" or (kind == before and kind in "LN")):
            tokens[-1] += character
        else:
            tokens.append(character)
            before = kind
    return tokens


@lru_cache(maxsize=1)
def _jieba_cut() -> Callable[[str], list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how jieba is written
        import jieba
    words = jieba.Tokenizer()
    # Not by its own `initialize`, which trusts a file in the folder of temporary files that anybody may have put there.
    words.FREQ, words.total = words.gen_pfdict(words.get_dict_file())
    words.initialized = True
    cut: Callable[[str], list[str]] = words.lcut
    return cut
