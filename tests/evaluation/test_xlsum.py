"""ROUGE-L as published for XL-Sum, against a reckoning by hand: tokens written out, the common subsequence by recursion."""

import importlib.util
import unicodedata
from functools import cache
from importlib.metadata import version

import pytest

from grasp_lora.evaluation.extras import XlsumTokenizer
from grasp_lora.evaluation.metrics import score

needs_jieba = pytest.mark.skipif(importlib.util.find_spec("jieba") is None, reason="needs the extra 'eval'")
# What the scorer of XL-Sum's authors gives, save for its list of stop words. A lone space of Chinese is a token.
TOKENS = {
    "zh": ("小明硕士毕业于中国科学院，后在日本京都大学深造 2026年!",
           ["小明", "硕士", "毕业", "于", "中国科学院", " ", "后", "在", "日本京都大学", "深造", " ", "2026", "年"]),
    "ar": ("وقال المتحدثون إنّ 3 مدارس أُغلقت في القاهرة، مصر (2026م).",
           ["قال", "متحدث", "إنّ", "3", "مدارس", "اغلق", "في", "قاهر", "مصر", "2026", "م"]),
    "en": ("Running 3rd, she's 50% faster!\u200b x²", ["run", "3", "rd", "she", "s", "50", "faster", "x", "²"]),
    "sw": ("Watoto wanasoma 北京.", ["watoto", "wanasoma", "北", "京"]),
}  # fmt: skip


def longest_common(ours, theirs):
    @cache
    def length(i, j):
        if i == len(ours) or j == len(theirs):
            return 0
        if ours[i] == theirs[j]:
            return 1 + length(i + 1, j + 1)
        return max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


@needs_jieba
def test_jieba_is_in_the_signature_and_trusts_no_file_of_the_folder_for_temporary_files(tmp_path, monkeypatch, capfd):
    from grasp_lora.evaluation.extras import _jieba_cut

    _jieba_cut.cache_clear()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "jieba.cache").write_bytes(b"not of jieba")
    result = score(["rougeL_xlsum"], ["我来到北京"], [["我来到北京"]], "zh-CN")["rougeL_xlsum"]
    assert result.value == 100
    assert f"|seg:jieba|jieba:{version('jieba')}|stem:no|" in result.signature
    assert (tmp_path / "jieba.cache").read_bytes() == b"not of jieba"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("language", ["ar", "en", "sw", pytest.param("zh", marks=needs_jieba)])
def test_tokens_are_those_of_the_authors(language):
    text, tokens = TOKENS[language]
    assert XlsumTokenizer(language).tokenize(text) == tokens
    assert XlsumTokenizer(language).tokenize(" \u200b?!") == []


@pytest.mark.parametrize(
    ("language", "prediction", "ours", "reference", "theirs"),
    [
        pytest.param("zh", "中国科学院的小明在日本深造", ["中国科学院", "的", "小明", "在", "日本", "深造"], *TOKENS["zh"],
                     marks=needs_jieba),
        ("ar", "المتحدث: مدرسة في مصر", ["متحدث", "مدرس", "في", "مصر"], *TOKENS["ar"]),
        ("en", "she runs 3 times faster", ["she", "run", "3", "time", "faster"], *TOKENS["en"]),
    ],
)  # fmt: skip
def test_the_score_is_the_f_measure_of_the_common_subsequence(language, prediction, ours, reference, theirs):
    result = score(["rougeL_xlsum"], [prediction], [["x", reference]], language)["rougeL_xlsum"]
    assert result.value == pytest.approx(200 * longest_common(tuple(ours), tuple(theirs)) / (len(ours) + len(theirs)))
    plain = score(["rougeL"], [prediction], [["x", reference]], language)["rougeL"]
    assert plain.value != pytest.approx(result.value)


def test_the_signature_names_packages_and_versions():
    def signature(language):
        return score(["rougeL_xlsum"], ["x"], [["x"]], language)["rougeL_xlsum"].signature

    assert f"|tok:xlsum|seg:no|stem:snowball_arabic|stop:no|nltk:{version('nltk')}|" in signature("ar")
    assert f"|seg:no|stem:no|unicode:{unicodedata.unidata_version}|" in signature("sw")
    assert signature("th") == "unavailable:no word segmenter for th"
    assert signature("tr") == "unavailable:no stemmer for tr"
