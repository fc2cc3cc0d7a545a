"""Metrics against values worked out by hand; the arithmetic stands in the comments."""

import subprocess
import sys
import unicodedata
from fractions import Fraction
from math import exp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_lora.errors import DataError
from grasp_lora.evaluation.metrics import METRICS, MetricScore, UnicodeTokenizer, metrics_for, score

LANGUAGES = ("en", "ar", "zh", "de", "es", "hi", "vi")
ANSWER = ("exact_match", "f1")
ROUGE = ("rouge1", "rouge2", "rougeL")


def percent(share: Fraction | int | float) -> object:
    return pytest.approx(100 * float(share), rel=1e-12, abs=0)


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
        ("en", "A man, a plan", ["man plan"], 1, 1),
        ("en", "anthem", ["them"], 0, 0),
        ("en", "well-known", ["wellknown"], 1, 1),
        ("en", "well known", ["well-known"], 0, 0),
        ("en", "U.S.", ["us"], 1, 1),
        ("en", "“Paris”", ["Paris"], 1, 1),
        ("en", "1,000", ["1000"], 1, 1),
        ("en", "１２３", ["123"], 0, 0),  # full-width digits are other characters
        ("en", "$5", ["5"], 1, 1),  # an ASCII symbol counts as punctuation
        ("en", "€5", ["5"], 0, 0),  # another symbol does not
        ("en", "🙂 house", ["house"], 0, F_1_OF_2_1),
        ("en", "paris\u00a0france\n", ["Paris  France"], 1, 1),
        ("en", "red red house", ["red house house"], 0, Fraction(2, 3)),  # red once, house once: 2*2/(3+3)
        ("en", "house red", ["red house"], 0, 1),
        ("en", "Paris France", ["Lyon", "Paris", "Rome"], 0, F_1_OF_2_1),
        ("en", "café", [nfd("café")], 0, 0),  # the official rules leave Unicode forms alone
        ("en", "", ["house"], 0, 0),
        ("en", "house", [""], 0, 0),
        ("en", "", [""], 1, 0),  # equal, but no token to share
        ("en", "The", ["..."], 1, 0),
        # Arabic: "ال" becomes a space wherever it stands.
        ("ar", "الكتاب", ["كتاب"], 1, 1),
        ("ar", "بالعدوى", ["ب عدوى"], 1, 1),
        ("ar", "والكتاب", ["كتاب"], 0, F_1_OF_2_1),  # و, كتاب against كتاب
        ("ar", "برتقال", ["برتق"], 1, 1),
        ("ar", "القاهرة، مصر؟", ["القاهرة مصر"], 1, 1),
        ("ar", "مصر القاهرة", ["القاهرة مصر"], 0, 1),
        ("ar", "كِتَاب", ["كتاب"], 0, 0),  # diacritics count
        ("ar", "كتــاب", ["كتاب"], 0, 0),  # so does tatweel
        ("ar", "إلى", ["الى"], 0, 0),
        ("ar", "١٢٣", ["123"], 0, 0),
        ("ar", "عام 1990", ["1990"], 0, F_1_OF_2_1),
        ("ar", "5٪", ["5"], 1, 1),
        ("ar", "شركة Apple", ["apple"], 0, F_1_OF_2_1),
        ("ar", "؟!", [""], 1, 0),
        # Chinese: one token per ideograph, other scripts by word.
        ("zh", "北京市", ["北京"], 0, F_2_OF_3_2),
        ("zh", "北京 市", ["北京市"], 1, 1),
        ("zh", "京北", ["北京"], 0, 1),
        ("zh", "《红楼梦》", ["红楼梦"], 1, 1),
        ("zh", "你好，世界。", ["你好世界"], 1, 1),
        ("zh", "第3章", ["第 3 章"], 1, 1),
        ("zh", "iPhone手机", ["iphone 手机"], 1, 1),
        ("zh", "2008年8月8日", ["2008年8月"], 0, Fraction(4, 5)),  # 2008 年 8 月 of 6 and 4: 2*4/(6+4)
        ("zh", "３个", ["3个"], 0, Fraction(1, 2)),  # 个 of 2 and 2
        ("zh", "臺灣", ["台湾"], 0, 0),
        ("zh", "カナ", ["カ"], 0, 0),  # kana make words here
        ("zh", "㐀㐁", ["㐀"], 0, 0),  # so do ideographs before U+4E00
        ("zh", "\u9fa6\u9fa7", ["\u9fa6"], 0, 0),  # and after U+9FA5
        ("zh", "😀北京", ["北京"], 0, F_2_OF_3_2),
        ("zh", "北京", ["上海", "北京市", "东北"], 0, F_2_OF_3_2),  # 0, 2*2/(2+3), 2*1/(2+2)
        ("zh", "the 北京", ["北京"], 0, F_2_OF_3_2),
        ("zh", "，。", ["、"], 1, 0),
        # German
        ("de", "Der Hund und die Katze", ["Hund und Katze"], 1, 1),
        ("de", "einer Katze", ["Katze"], 1, 1),
        ("de", "des Kaisers neue Kleider", ["Kaisers Kleider"], 0, F_2_OF_3_2),
        ("de", "„Faust“", ["Faust"], 1, 1),
        ("de", "STRASSE", ["Straße"], 0, 0),  # lower-cased, not case-folded
        ("de", "am Rhein", ["Rhein"], 0, F_1_OF_2_1),
        ("de", "the Rhein", ["Rhein"], 0, F_1_OF_2_1),
        # Spanish
        ("es", "El Quijote", ["Quijote"], 1, 1),
        ("es", "¿Los Ángeles?", ["ángeles"], 1, 1),
        ("es", "unos 20 km", ["20 km"], 1, 1),
        ("es", "él", ["el"], 0, 0),
        ("es", "del río", ["río"], 0, F_1_OF_2_1),
        # Hindi: no articles
        ("hi", "नई दिल्ली।", ["नई दिल्ली"], 1, 1),
        ("hi", "एक घर", ["घर"], 0, F_1_OF_2_1),
        ("hi", "हिन्दी", ["हिंदी"], 0, 0),
        ("hi", "१९४७", ["1947"], 0, 0),
        # Vietnamese
        ("vi", "những con mèo", ["con mèo"], 1, 1),
        ("vi", "thủ đô của Việt Nam", ["Thủ đô Việt Nam"], 1, 1),
        ("vi", nfd("của") + " nhà", ["nhà"], 0, F_1_OF_2_1),  # the rule knows the composed form only
        ("vi", "Hà Nội", ["Ha Noi"], 0, 0),
        ("vi", "là", ["chiếc"], 1, 0),
        # Languages outside MLQA: white space, no articles. Regions do not matter.
        ("fr", "Le chat !", ["le chat"], 1, 1),
        ("fr", "le chat", ["chat"], 0, F_1_OF_2_1),
        ("ja", "北京市", ["北京"], 0, 0),
        ("zh-CN", "北京市", ["北京"], 0, F_2_OF_3_2),
        ("ZH_Hant", "北京市", ["北京"], 0, F_2_OF_3_2),
    ],
)
def test_answers_follow_the_rules_of_mlqa(language, prediction, references, exact, f1):
    result = score(ANSWER, [prediction], [references], language)
    assert result["exact_match"].value == 100 * exact
    assert result["f1"].value == percent(f1)


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


@pytest.mark.parametrize(
    ("language", "prediction", "references", "rouge1", "rouge2", "rouge_l"),
    [
        # 4 words each, 3 shared; 3 pairs each, 2 shared; the first 3 words in order.
        (
            "ar",
            "ذهب الولد إلى المدرسة",
            ["ذهب الولد إلى البيت"],
            Fraction(3, 4),
            Fraction(2, 3),
            Fraction(3, 4),
        ),
        # The same 4 words backwards: no pair; a common subsequence of 1 word.
        ("ar", "المدرسة إلى الولد ذهب", ["ذهب الولد إلى المدرسة"], 1, 0, Fraction(1, 4)),
        # Diacritics stay inside their word: 1 of 2 words against 1.
        ("ar", "كِتَابٌ جديد", ["كِتَابٌ"], F_1_OF_2_1, 0, F_1_OF_2_1),
        ("ar", "كِتَاب", ["كتاب"], 0, 0, 0),
        ("ar", "«مصر»، القاهرة؟", ["مصر القاهرة"], 1, 1, 1),
        # 我去学校 / 我去上学: 我 去 学 of 4; 我去 of 3 pairs; 我去学 in order.
        ("zh", "我去学校", ["我去上学"], Fraction(3, 4), Fraction(1, 3), Fraction(3, 4)),
        # 2 of 3 characters against 2; 1 of 2 pairs against 1.
        ("zh", "北京市", ["北京"], F_2_OF_3_2, F_1_OF_2_1, F_2_OF_3_2),
        ("zh", "你好，世界！", ["你好世界"], 1, 1, 1),
        ("zh", "iPhone 15很好", ["IPHONE　15 很好。"], 1, 1, 1),
        # ２０２６ is another token than 2026: 年 of 2 and 2.
        ("zh", "２０２６年", ["2026年"], Fraction(1, 2), 0, Fraction(1, 2)),
        # カ once and ナ of 4 and 2: 2*2/6; カナ of 3 pairs and 1: 2*1/4; カ ナ in order.
        ("ja", "カタカナ", ["カナ"], Fraction(2, 3), Fraction(1, 2), Fraction(2, 3)),
        ("hi", "हिन्दी भाषा", ["हिन्दी"], F_1_OF_2_1, 0, F_1_OF_2_1),
        ("hi", "नई दिल्ली।", ["नई दिल्ली"], 1, 1, 1),
        ("en", "The cat sat", ["the cat"], F_2_OF_3_2, F_1_OF_2_1, F_2_OF_3_2),
        ("vi", "Hà Nội", [nfd("Hà Nội")], 1, 1, 1),
        ("es", "¡Año nuevo!", ["año nuevo"], 1, 1, 1),
        ("de", "Straße", ["Strasse"], 0, 0, 0),
        # Emoji are no words.
        ("en", "good 👍🏽 day", ["good day"], 1, 1, 1),
        ("en", "😀", ["😀"], 0, 0, 0),
        ("en", "", ["word"], 0, 0, 0),
        ("ar", "كتاب", [""], 0, 0, 0),
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
    ("prediction", "reference", "plain", "normalised"),
    [
        ("أَحْمَدُ إلى مصرــ", "احمد الى مصر", 0, 1),
        (nfd("أحمد آمن"), "احمد امن", 0, 1),
        ("ٱلكتاب", "الكتاب", 0, 1),
        ("مصطفى", "مصطفي", 0, 1),
        ("مدرسة", "مدرسه", 0, 0),  # ta marbuta stays
        ("مؤمن", "مومن", 0, 0),  # hamza on waw stays
    ],
)
def test_arabic_normalisation_is_asked_for(prediction, reference, plain, normalised):
    without = score(["rougeL"], [prediction], [[reference]], "ar")["rougeL"]
    with_it = score(["rougeL"], [prediction], [[reference]], "ar", arabic_normalisation=True)["rougeL"]
    assert (without.value, with_it.value) == (100 * plain, 100 * normalised)
    assert "|arabic_norm:no|" in without.signature
    assert "|arabic_norm:alef_ya_tatweel_diacritics|" in with_it.signature


def test_arabic_normalisation_leaves_other_languages_and_metrics_alone():
    urdu = score(["rouge1"], ["أردو"], [["اردو"]], "ur", arabic_normalisation=True)["rouge1"]
    assert urdu.value == 0
    assert "|arabic_norm:no|" in urdu.signature
    assert score(["f1"], ["أحمد"], [["احمد"]], "ar", arabic_normalisation=True)["f1"].value == 0


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
        (nfd("Été"), ["été"]),
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


SCHOOL = "ذهب الولد إلى المدرسة"


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
        # The full stop is a character too: 4/5 * 3/4 * 2/3 * 1/2.
        ("zh", "我们上学。", ["我们上学"], (1 / 5) ** 0.25),
        # Case counts: 4/5, 3/4, 2/3, 1/2.
        ("en", "One two three four Five", ["One two three four five"], (1 / 5) ** 0.25),
        # 13a splits "four." as well: 5 of 5.
        ("en", "one two three four.", ["one two three four ."], 1),
        # The two references are pooled: all 5 words; 3 of 4 pairs (1 2, 2 3, 4 5); 1 of 3 triples (1 2 3);
        # 0/2 smoothed to 1/4; the product is 1/16.
        ("en", "1 2 3 4 5", ["1 2 3 x x", "x x x 4 5"], 1 / 2),
        ("hi", "यह एक नई किताब है।", ["यह एक नई किताब है।"], 1),
        ("ar", "", [SCHOOL], 0),
        ("zh", "我们去学校", [""], 0),
        ("ar", "قرأت كتابا عن التاريخ", [SCHOOL], 0),
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


def test_another_reference_can_lower_bleu():
    # 3/5, 2/4, 1/3, 0/2 smoothed to 1/4; the reference of 6 words is nearer to 5 than that of 3: exp(1 - 6/5).
    near = score(["bleu"], ["a b c d e"], [["a b c"]], "en")["bleu"].value
    both = score(["bleu"], ["a b c d e"], [["a b c", "u v w x y z"]], "en")["bleu"].value
    assert near == percent((1 / 40) ** 0.25)
    assert both == percent((1 / 40) ** 0.25 * exp(-1 / 5))


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [("zh", "zh"), ("zh-TW", "zh"), ("en", "13a"), ("en_GB", "13a"), ("ar", "intl"), ("fr", "intl")],
)
def test_bleu_tokenizer_is_in_the_signature(language, tokenizer):
    signature = score(["bleu"], ["x"], [["x"]], language)["bleu"].signature
    assert signature.startswith(f"nrefs:1|case:mixed|eff:no|tok:{tokenizer}|smooth:exp|version:2.")


def test_signatures_tell_the_rules():
    def signature(name: str, language: str) -> str:
        return score([name], ["x", "y"], [["x"], ["y", "z"]], language)[name].signature

    rules = f"unicode:{unicodedata.unidata_version}"
    assert signature("f1", "ar") == (
        f"nrefs:var|refs:best|rules:mlqa_v1|lang:ar|case:lc|articles:removed|tok:whitespace|{rules}"
    )
    assert signature("exact_match", "zh-CN") == (
        f"nrefs:var|refs:best|rules:mlqa_v1|lang:zh|case:lc|articles:none|tok:mixed|{rules}"
    )
    assert "|rules:mlqa_v1_other_language|lang:fr|" in signature("f1", "fr")
    assert signature("rougeL", "zh").startswith(
        f"nrefs:var|refs:best|measure:f|case:lc|form:nfc|tok:unicode|stem:no|arabic_norm:no|{rules}|rouge_score:"
    )
    assert signature("bleu", "ar").startswith("nrefs:var|")


def test_value_is_the_mean_of_the_examples():
    result = score(["exact_match", "rougeL"], ["x", "y", ""], [["x"], ["x"], ["z"]], "en")
    assert result["exact_match"].per_example == result["rougeL"].per_example == (100, 0, 0)
    assert result["exact_match"].value == result["rougeL"].value == percent(Fraction(1, 3))


def test_scores_come_by_name_in_the_order_asked_for():
    result = score(["rougeL", "f1"], ["x"], [("x",)], "en")
    assert list(result) == ["rougeL", "f1"]
    assert all(isinstance(value, MetricScore) and value.name == name for name, value in result.items())


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("qa", ("exact_match", "f1")),
        ("summarization", ("rougeL", "bleu")),
        ("completion", ("exact_match", "rougeL")),
    ],
)
def test_every_task_has_metrics(task, names):
    assert metrics_for(task) == names
    assert set(names) <= set(METRICS)


def test_unknown_task_is_an_error():
    with pytest.raises(DataError, match="'poetry': choose from qa, summarization, completion"):
        metrics_for("poetry")


@pytest.mark.parametrize(
    ("names", "predictions", "references", "language", "message"),
    [
        (["f1", "meteor"], ["x"], [["x"]], "en", "'meteor': choose from exact_match, f1, rouge1"),
        ([], ["x"], [["x"]], "en", "No metric was named"),
        (["f1"], [], [], "en", "no predictions"),
        (["f1"], ["x", "y"], [["x"]], "en", "2 predictions came with 1 lists"),
        (["f1"], ["x", "y"], [["x"], []], "en", "Example 1 has no references"),
        (["f1"], ["x"], ["x"], "en", "references of example 0 are one text"),
        (["f1"], ["x"], [["x"]], "chinese", "'chinese' is no language code"),
        (["f1"], ["x"], [["x"]], "", "'' is no language code"),
    ],
)
def test_what_cannot_be_scored_is_an_error(names, predictions, references, language, message):
    with pytest.raises(DataError, match=message):
        score(names, predictions, references, language)


def test_import_is_quick():
    heavy = "{'torch', 'transformers', 'sacrebleu', 'rouge_score', 'nltk', 'numpy'}"
    code = f"import sys, grasp_lora.evaluation.metrics; sys.stdout.write(repr({heavy} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "set()"


languages = st.sampled_from(LANGUAGES)
# Random text hardly ever shares a token: draw also from pieces that do.
pieces = st.sampled_from(
    ["the", "Haus", "ال", "كتاب", "كِتَاب", "我", "们，", "の", "हिन्दी", "của", "3.5", "!", "😀", " "]
)
texts = st.one_of(st.text(max_size=20), st.lists(pieces, max_size=8).map(" ".join))
words = st.text("bdßéẹكتبمًَ我们去の한हिन्दी0７", min_size=1, max_size=5)


@settings(deadline=None)
@given(languages, st.lists(words, min_size=3, max_size=8))
def test_identical_texts_score_100(language, some_words):
    text = " ".join([*some_words, "x", "7"])  # two sure words, so that rouge2 finds a pair
    for result in score(list(METRICS), [text], [[text]], language).values():
        assert (result.value, result.per_example) == (100, (100,))


@settings(deadline=None)
@given(languages, st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=3))
def test_scores_stay_in_their_range(language, examples):
    predictions = [prediction for prediction, _ in examples]
    for result in score(list(METRICS), predictions, [some for _, some in examples], language).values():
        assert len(result.per_example) == len(examples)
        assert all(0 <= value <= 100 for value in (result.value, *result.per_example))


@settings(deadline=None)
@given(languages, texts, st.lists(texts, min_size=1, max_size=3), texts)
def test_another_reference_never_lowers_the_best(language, prediction, references, another):
    names = [name for name in METRICS if name != "bleu"]
    fewer = score(names, [prediction], [references], language)
    more = score(names, [prediction], [[*references, another]], language)
    for name in names:
        alone = score([name], [prediction], [[another]], language)[name].value
        assert more[name].value == max(fewer[name].value, alone)


@settings(deadline=None)
@given(languages, st.lists(words, min_size=1, max_size=5))
def test_an_empty_prediction_scores_0(language, some_words):
    for result in score(list(METRICS), [""], [[" ".join([*some_words, "x"])]], language).values():
        assert (result.value, result.per_example) == (0, (0,))
