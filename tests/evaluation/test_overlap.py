"""ROUGE and BLEU against values worked out by hand; the arithmetic stands in the comments."""

import unicodedata
from fractions import Fraction
from math import exp

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_lora.evaluation.metrics import score
from grasp_lora.evaluation.overlap import UnicodeTokenizer, bleu_from_statistics, chrf_from_statistics

ROUGE = ("rouge1", "rouge2", "rougeL")
SCHOOL = "ذهب الولد إلى المدرسة"


def percent(share: Fraction | int | float) -> object:
    return pytest.approx(100 * float(share), rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("language", "prediction", "references", "rouge1", "rouge2", "rouge_l"),
    [
        # 4 words each, 3 shared; 3 pairs each, 2 shared; the first 3 words in order.
        ("ar", SCHOOL, ["ذهب الولد إلى البيت"], Fraction(3, 4), Fraction(2, 3), Fraction(3, 4)),
        # The same 4 words backwards: no pair; a common subsequence of 1 word.
        ("ar", "المدرسة إلى الولد ذهب", [SCHOOL], 1, 0, Fraction(1, 4)),
        # 我去学校 / 我去上学: 我 去 学 of 4; 我去 of 3 pairs; 我去学 in order.
        ("zh", "我去学校", ["我去上学"], Fraction(3, 4), Fraction(1, 3), Fraction(3, 4)),
        # カ once and ナ of 4 and 2: 2*2/6; カナ of 3 pairs and 1: 2*1/4; カ ナ in order.
        ("ja", "カタカナ", ["カナ"], Fraction(2, 3), Fraction(1, 2), Fraction(2, 3)),
        ("th", "กรุง", ["กรุงเทพ"], Fraction(2, 3), Fraction(4, 7), Fraction(2, 3)),
        # 2 words of 3 and 2: 2*2/5; 1 pair of 2 and 1: 2*1/3.
        ("en", "The cat sat", ["the cat"], Fraction(4, 5), Fraction(2, 3), Fraction(4, 5)),
        ("vi", "Hà Nội", [unicodedata.normalize("NFD", "Hà Nội")], 1, 1, 1),
        ("en", "", ["word"], 0, 0, 0),
        # Best reference, for each kind by itself: all 4 words of the first; pair ab of 3 of the second;
        # a b d of the first in order.
        ("en", "a b c d", ["a c b d", "a b x y"], 1, Fraction(1, 3), Fraction(3, 4)),
    ],
)
def test_rouge_by_hand(language, prediction, references, rouge1, rouge2, rouge_l):
    result = score(ROUGE, [prediction], [references], language)
    assert result["rouge1"].value == percent(rouge1)
    assert result["rouge2"].value == percent(rouge2)
    assert result["rougeL"].value == percent(rouge_l)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Can't stop_now, 3.5%", ["can", "t", "stop", "now", "3", "5"]),
        ("كِتَابٌ، جديد", ["كِتَابٌ", "جديد"]),
        ("क्षत्रिय की।", ["क्षत्रिय", "की"]),
        ("中文 and 日本語の々", ["中", "文", "and", "日", "本", "語", "の", "々"]),
        ("版2本", ["版", "2", "本"]),
        ("𠀀𠀁", ["𠀀", "𠀁"]),
        ("か\u3099", ["が"]),
        ("한국어 문장", ["한국어", "문장"]),
        (unicodedata.normalize("NFD", "Été"), ["été"]),
        ("می\u200cخواهم", ["میخواهم"]),  # a joiner does not split a word
        ("\u200fمصر\u200f", ["مصر"]),
        ("a\u200bb", ["a", "b"]),  # a zero-width space does
        ("❤\ufe0flove", ["love"]),  # the mark after an emoji belongs to no word
        ("👩\u200d👩\u200d👧 \u0301", []),
        ("", []),
    ],
)
def test_unicode_tokens(text, tokens):
    assert UnicodeTokenizer().tokenize(text) == tokens


@given(st.text(st.characters(codec="ascii")))
def test_unicode_tokens_of_ascii_text_are_those_of_rouge_score(text):
    from rouge_score.tokenize import tokenize

    assert UnicodeTokenizer().tokenize(text) == tokenize(text, None)


@pytest.mark.parametrize(
    ("language", "prediction", "references", "expected"),
    [
        # 5 words, the last one wrong: precisions 4/5 * 3/4 * 2/3 * 1/2 = 1/5.
        ("ar", f"{SCHOOL} اليوم", [f"{SCHOOL} غدا"], (1 / 5) ** 0.25),
        # Signs are words: 5 of 6, all right: only the length counts, exp(1 - 6/5).
        ("ar", "ذهب الولد، إلى المدرسة", ["ذهب الولد، إلى المدرسة!"], exp(-1 / 5)),
        # 5 characters: 4/5 (我们去学), 2/4 (我们, 们去), 1/3 (我们去), 0/2 smoothed to 1/(2*2); product 1/30.
        ("zh", "我们去学校", ["我们去上学"], (1 / 30) ** 0.25),
        # 4 of 6 characters, all right: exp(1 - 6/4).
        ("zh", "我们去学", ["我们去学校了"], exp(-1 / 2)),
        # Case counts: 4/5, 3/4, 2/3, 1/2.
        ("en", "One two three four Five", ["One two three four five"], (1 / 5) ** 0.25),
        # 13a splits "four." as well: 5 of 5.
        ("en", "one two three four.", ["one two three four ."], 1),
        # The two references are pooled: all 5 words; 3 of 4 pairs (1 2, 2 3, 4 5); 1 of 3 triples (1 2 3);
        # 0/2 smoothed to 1/4; the product is 1/16.
        ("en", "1 2 3 4 5", ["1 2 3 x x", "x x x 4 5"], 1 / 2),
        # 4 of 6 characters, all right: exp(1 - 6/4).
        ("ja", "東京へ行", ["東京へ行った"], exp(-1 / 2)),
        ("ar", "", [SCHOOL], 0),
    ],
)
def test_bleu_by_hand(language, prediction, references, expected):
    result = score(["bleu"], [prediction], [references], language)["bleu"]
    assert result.value == percent(expected)
    assert result.per_example == (percent(expected),)


def test_bleu_counts_over_the_corpus():
    # 4 of 4 words and 0 of 4: 4/8, 3/6, 2/4, 1/2.
    result = score(["bleu"], [SCHOOL, "قرأت كتابا عن التاريخ"], [[SCHOOL], ["شاهد محمد فيلما جديدا"]], "ar")["bleu"]
    assert result.value == percent(1 / 2)
    assert result.per_example == (100, 0)


def test_bleu_of_identical_short_texts_is_what_sacrebleu_gives():
    result = score(["bleu"], ["我去了"], [["我去了"]], "zh")["bleu"]
    assert (result.value, result.per_example) == (0, (100,))


@pytest.mark.parametrize(("language", "tokenizer"), [("zh-TW", "zh"), ("en", "13a"), ("ar", "intl")])
def test_bleu_tokenizer_is_in_the_signature(language, tokenizer):
    signature = score(["bleu"], ["x"], [["x"]], language)["bleu"].signature
    assert signature.startswith(f"nrefs:1|case:mixed|eff:no|tok:{tokenizer}|smooth:exp|version:2.")


@pytest.mark.parametrize(
    ("language", "text"), [("nan", "臺灣的首都是臺北市"), ("shn", "ၵႂၢမ်းတႆးၼႆႉလီ"), ("nod", "สวัสดีครับเพื่อน")]
)
def test_bleu_of_a_script_without_spaces_counts_characters_whatever_the_language(language, text):
    result = score(["bleu"], [text[:-1]], [[text]], language)["bleu"]
    assert result.value > 50
    assert "|tok:char|" in result.signature


def test_bleu_of_a_language_that_is_known_keeps_its_tokenizer_whatever_the_texts():
    assert "|tok:intl|" in score(["bleu"], ["我们"], [["我们 去"]], "ar")["bleu"].signature


snippets = st.sampled_from(["我们", "去", "学校", "。", "the", "cat", "كتاب", "ذهب", "，", "7", "", "x y"])
passages = st.lists(snippets, max_size=9).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["zh", "en", "ar"]),
    st.lists(st.tuples(passages, st.lists(passages, min_size=1, max_size=3)), min_size=1, max_size=5),
    st.data(),
)
def test_statistics_give_the_corpus_score_of_any_resample(language, examples, data):
    predictions, references = zip(*examples, strict=True)
    rows = torch.tensor(score(["bleu"], predictions, references, language)["bleu"].statistics, dtype=torch.float64)
    drawn = data.draw(st.lists(st.integers(0, len(examples) - 1), min_size=1, max_size=6))
    found = bleu_from_statistics(torch.stack([rows[drawn].sum(dim=0), rows.sum(dim=0)]))
    drawn_predictions, drawn_references = [predictions[i] for i in drawn], [references[i] for i in drawn]
    for value, some_predictions, some_references in (
        (found[0], drawn_predictions, drawn_references),
        (found[1], predictions, references),
    ):
        expected = score(["bleu"], some_predictions, some_references, language)["bleu"].value
        assert value.item() == pytest.approx(expected, abs=1e-9)


def test_chrf_of_one_character_and_one_word_by_hand():
    # "ab" against "abc": runs of 1: 2 shared of 2 and 3; of 2: 1 of 1 and 2. Of 3 and the word pairs one side has none, so they
    # have no part; the words themselves differ: 0 of 1 and 1. Precision (1 + 1 + 0) / 3, recall (2/3 + 1/2 + 0) / 3, beta 2.
    precision, recall = 2 / 3, (2 / 3 + 1 / 2) / 3
    found = score(["chrf++"], ["ab"], [["abc"]], "jv")["chrf++"]
    assert found.value == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))
    assert found.signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:")


@given(
    st.lists(
        st.tuples(st.text("ab .é我", max_size=12), st.lists(st.text("ab .é我", max_size=12), min_size=1, max_size=2)),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_chrf_from_statistics_is_that_of_sacrebleu(pairs):
    predictions, references = zip(*pairs, strict=True)
    found = score(["chrf++"], predictions, references, "jv")["chrf++"]
    sums = torch.tensor(found.statistics, dtype=torch.float64).sum(dim=0)
    assert float(chrf_from_statistics(sums)) == pytest.approx(found.value, abs=1e-9)
    assert chrf_from_statistics(sums.expand(2, 3, -1)).shape == (2, 3)
    if len({len(texts) for texts in references}) > 1:
        assert found.signature.startswith("nrefs:var|")
