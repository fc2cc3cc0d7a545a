import pytest

from grasp_lora.data.data_settings import CorpusSettings
from grasp_lora.data.tasks import resolve_template
from grasp_lora.errors import DataError
from grasp_lora.evaluation import overlap, short_answers
from grasp_lora.text import languages
from grasp_lora.text.languages import language_code


@pytest.mark.parametrize(
    ("language", "code"),
    [("ar", "ar"), ("ZH_Hant", "zh"), ("cmn-Hans", "zh"), ("swh", "swh"), ("pt-BR", "pt"), ("nob", "no")],
)
def test_a_code_loses_its_region_and_is_short_where_rules_depend_on_it(language, code):
    assert language_code(language) == code


def test_every_language_that_a_metric_has_rules_for_is_known_by_its_long_code():
    ruled = {*overlap._BLEU_TOKENIZERS, *short_answers._ARTICLES}
    assert ruled - {"yue"} <= set(languages._SHORT.values())  # Cantonese has no short one
    assert all(len(long) > len(short) or long in ("nb", "nn") for long, short in languages._SHORT.items())


@pytest.mark.parametrize("language", ["swahili", "", "a", "ar ", "zh-", "中文"])
def test_what_is_no_code_is_refused_in_a_recipe_before_any_work(language):
    with pytest.raises(DataError, match="is not a language code of two or three letters"):
        CorpusSettings(language=language, files={"pool": ("a.jsonl",)})


@pytest.mark.parametrize(
    ("code", "advice"),
    [("vn", "vi is Vietnamese"), ("JP-x", "ja is Japanese"), ("xx", "such as ar, sw or zh-Hans")],
)
def test_two_letters_that_stand_for_no_language_are_refused_with_that_of_the_country(code, advice):
    with pytest.raises(DataError, match=rf"'{code}' is not a language code \(ISO 639\); {advice}"):
        CorpusSettings(language=code, files={"pool": ("a.jsonl",)})


def test_in_a_chat_the_built_in_completion_is_the_bare_answer_also_where_it_is_written_out():
    assert resolve_template("qa", "sw", "{question}", " {answer}", chat=True).completion == "{answer}"
    assert resolve_template("qa", "sw", "{question}", " {answer}").completion == " {answer}"
    assert resolve_template("qa", "sw", "{question}", "= {answer}", chat=True).completion == "= {answer}"
