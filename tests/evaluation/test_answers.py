"""Exact match and token F1 against values worked out by hand; the arithmetic stands in the comments."""

import unicodedata
from fractions import Fraction

import pytest

from grasp_lora.evaluation.metrics import score

ANSWER = ("exact_match", "f1")


@pytest.mark.parametrize(
    ("language", "prediction", "reference"),
    [
        ("tr", "İki", "iki"),
        ("tr", "IŞIK", "ışık"),
        ("tr", "I\u0307stanbul", "İstanbul"),
        ("tr", "İstanbul".lower(), "İstanbul"),
        ("aze", "İki", "iki"),
        ("ml", "അവന്\u200d", "അവൻ"),
        ("bn", "সত্\u200d", "সৎ"),
        ("fa", "کتاب\u200c", "کتاب"),
    ],
)
def test_letters_of_two_writings_are_one(language, prediction, reference):
    result = score([*ANSWER, "rougeL"], [prediction], [[reference]], language)
    assert {name: one.value for name, one in result.items()} == {"exact_match": 100, "f1": 100, "rougeL": 100}
    assert ("case:lc_" in result["f1"].signature) == (language in ("tr", "aze"))


def test_only_turkish_and_azeri_have_an_i_without_a_dot():
    assert score(ANSWER, ["I"], [["i"]], "sw")["exact_match"].value == 100
    assert score(ANSWER, ["I"], [["i"]], "tr")["exact_match"].value == 0


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


# Token F1 from numbers of tokens (shared, in the prediction, in the reference) is 2 * shared / (both lengths):
F_1_OF_2_1 = Fraction(2, 3)  # 2 * 1 / (2 + 1)
F_2_OF_3_2 = Fraction(4, 5)  # 2 * 2 / (3 + 2)


@pytest.mark.parametrize(
    ("language", "prediction", "references", "exact", "f1"),
    [
        # English: articles a, an, the as whole words; punctuation is deleted, not blanked.
        ("en", "The red house.", ["red house"], 1, 1),
        ("en", "the red house", ["a house"], 0, F_1_OF_2_1),
        ("en", "anthem", ["them"], 0, 0),
        ("en", "well-known", ["wellknown"], 1, 1),
        ("en", "“Paris”", ["Paris"], 1, 1),
        ("en", "１２３", ["123"], 0, 0),  # full-width digits are other characters
        ("en", "$5", ["5"], 1, 1),  # an ASCII symbol counts as punctuation
        ("en", "🙂 house", ["house"], 0, F_1_OF_2_1),
        ("en", "paris\u00a0france\n", ["Paris  France"], 1, 1),
        ("en", "red red house", ["red house house"], 0, Fraction(2, 3)),  # red once, house once: 2*2/(3+3)
        ("en", "house red", ["red house"], 0, 1),
        ("en", "Paris France", ["Lyon", "Paris", "Rome"], 0, F_1_OF_2_1),
        ("en", "café", [nfd("café")], 0, 0),  # the official rules leave Unicode forms alone
        ("en", "", ["house"], 0, 0),
        ("en", "", [""], 1, 0),  # equal, but no token to share
        ("en", "The", ["..."], 1, 0),
        # Arabic: "ال" becomes a space wherever it stands.
        ("ar", "بالعدوى", ["ب عدوى"], 1, 1),
        ("ar", "القاهرة، مصر؟", ["القاهرة مصر"], 1, 1),
        ("ar", "كِتَاب", ["كتاب"], 0, 0),  # diacritics count
        # Chinese: one token per ideograph, other scripts by word.
        ("zh", "北京市", ["北京"], 0, F_2_OF_3_2),
        ("zh", "北京 市", ["北京市"], 1, 1),
        ("zh", "你好，世界。", ["你好世界"], 1, 1),
        ("zh", "第3章", ["第 3 章"], 1, 1),
        ("zh", "iPhone手机", ["iphone 手机"], 1, 1),
        ("zh", "３个", ["3个"], 0, Fraction(1, 2)),  # 个 of 2 and 2
        ("zh", "カナ", ["カ"], 0, 0),  # kana make words here
        ("zh", "㐀㐁", ["㐀"], 0, 0),  # so do ideographs before U+4E00
        ("zh", "\u9fa6\u9fa7", ["\u9fa6"], 0, 0),  # and after U+9FA5
        # German
        ("de", "STRASSE", ["Straße"], 0, 0),  # lower-cased, not case-folded
        ("de", "iPhone手机", ["手机"], 0, 0),  # ideographs are words of their own in Chinese only
        # Spanish
        ("es", "él", ["el"], 0, 0),
        # Hindi: no articles
        ("hi", "नई दिल्ली।", ["नई दिल्ली"], 1, 1),
        ("hi", "\u0958लम", [nfd("\u0958लम")], 0, 0),  # a letter with a dot below, composed and apart
        # Vietnamese
        ("vi", nfd("của") + " nhà", ["nhà"], 0, F_1_OF_2_1),  # the rule knows the composed form only
        # Languages outside MLQA: no articles, white space, and characters where there is none. Regions do not matter.
        ("fr", "le chat", ["chat"], 0, F_1_OF_2_1),
        ("ja", "北京市", ["北京"], 0, F_2_OF_3_2),
        ("ja", "東京タワー", ["東京タワー。"], 1, 1),
        # ก รุ ง of ก รุ ง and เ ท พ after it: a vowel sign below its letter makes no token of its own.
        ("th", "กรุง", ["กรุงเทพ"], 0, Fraction(2, 3)),
        ("lo", "ວຽງ", ["ວຽງຈັນ"], 0, Fraction(3, 4)),
        # ភ្នំ is one cluster of ភ្ and one of នំ.
        ("km", "ភ្នំ", ["ភ្នំពេញ"], 0, Fraction(2, 3)),
        # Of Javanese letters, one with a vowel sign.
        ("jv", "\ua98f\ua9b1", ["\ua98f\ua9b1\ua9b6\ua9a0"], 0, Fraction(2, 5)),
        ("nod", "\u1a20\u1a63", ["\u1a20\u1a63\u1a21"], 0, Fraction(2, 3)),  # Tai Tham
        ("ii", "\ua188\ua320", ["\ua188\ua320\ua110"], 0, Fraction(4, 5)),  # Yi
        ("my", "ရန်", ["ရန်ကုန်"], 0, Fraction(2, 3)),
        # Marks that end a word are none themselves, and join none.
        ("km", "ទីក្រុង\u200bភ្នំពេញ", ["ទីក្រុងភ្នំពេញ"], 1, 1),
        ("km", "ក\u200bខ", ["ង\u200bច"], 0, 0),
        ("bo", "བོད་ཀྱི་སྐད་ཡིག", ["བོད་ཀྱི་སྐད"], 0, Fraction(6, 7)),
        ("am", "አዲስ፡አበባ", ["አዲስ አበባ"], 1, 1),
        ("fa", "\u200fتهران", ["تهران"], 1, 1),
        ("fa", "می\u200cرود", ["میرود"], 0, 0),
        ("yo", nfd("Ìbàdàn"), ["Ìbàdàn"], 1, 1),
        ("ar", "\u200fالقاهرة", ["القاهرة"], 0, F_1_OF_2_1),  # MLQA's rules stay as they are
        ("ZH_Hant", "北京市", ["北京"], 0, F_2_OF_3_2),
    ],
)
def test_answers_follow_the_rules_of_mlqa(language, prediction, references, exact, f1):
    result = score(ANSWER, [prediction], [references], language)
    assert result["exact_match"].value == 100 * exact
    assert result["f1"].value == pytest.approx(100 * float(f1), rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("language", "articles"),
    [
        ("en", "a an the"),
        ("es", "un una unos unas el la los las"),
        ("de", "ein eine einen einem eines einer der die das den dem des"),
        ("vi", "của là cái chiếc những"),
        ("ar", "ال"),
    ],
)
def test_every_article_is_removed(language, articles):
    assert score(["exact_match"], [f"{articles} 7"], [["7"]], language)["exact_match"].value == 100


def test_answer_scores_agree_with_the_official_script_to_the_last_bit():
    # The official order of operations, 2 * 0.8 * 0.8 / (0.8 + 0.8), gives a little more than 4/5 ...
    four_of_five = score(["f1"], ["1 2 3 4 5"], [["1 2 3 4 x"]], "en")["f1"]
    assert four_of_five.per_example == (80.00000000000001,)
    # ... and 100 * (1/2 + 1 + 1) / 3 differs from 100 * ((1/2 + 1 + 1) / 3).
    half_and_two_right = score(["f1"], ["x y", "x", "y"], [["x z"], ["x"], ["y"]], "en")["f1"]
    assert half_and_two_right.per_example == (50, 100, 100)
    assert half_and_two_right.value == 83.33333333333333
