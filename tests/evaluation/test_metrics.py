"""What all metrics share: ranges, signatures, names, metrics of a user's own, and refusals."""

import json
import sys
import textwrap
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_lora.errors import DataError, RecipeError
from grasp_lora.evaluation.metrics import METRICS, MetricScore, resolve_metrics, score

LANGUAGES = ("en", "ar", "zh", "de", "es", "hi", "vi")
EVERYWHERE = [name for name, metric in METRICS.items() if metric.lack is None]  # what every language has


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


def test_outputs_are_of_a_language():
    with pytest.raises(DataError, match="'chinese' is not a language code"):
        score(["accuracy"], ["x"], [["x"]], "chinese")


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Give a function that writes a module of the user's own and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)
    names = (f"own_metrics_{number}" for number in range(9))

    def write(text: str) -> str:
        name = next(names)
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def test_a_metric_of_the_users_own_is_found_by_its_import_path(own_module):
    module = own_module(
        """
        from grasp_lora.evaluation.metrics import Metric, MetricScore

        def length(outputs):
            " "
            counts = tuple(float(len(text)) for text in outputs.predictions)
            return MetricScore("any name", sum(counts) / len(counts), "unit:letters", counts)

        def total(outputs):
            return MetricScore("total", 9, "s", (1, 2), ((4.0,), (5.0,)))

        TOTAL = Metric(total, "a sum", lambda sums: sums[..., 0])
        """
    )
    name = f"{module}:length"
    metrics = resolve_metrics(["f1", name, f"{module}:TOTAL"])
    assert metrics["f1"] is METRICS["f1"]
    assert metrics[f"{module}:TOTAL"].from_statistics is not None
    result = score(metrics, ["abc", "a"], [["x"], ["x"]], "en")
    assert list(result) == ["f1", name, f"{module}:TOTAL"]
    assert result[name] == MetricScore(name, 2.0, "unit:letters", (3.0, 1.0))
    assert result[f"{module}:TOTAL"].statistics == ((4.0,), (5.0,))
    assert score([name], ["abc"], [["x"]], "en")[name].value == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("meteor", r"metric is 'meteor'; allowed: accuracy, macro_f1, chrf\+\+, f1, .*import path"),
        ("json:__name__", "metrics: json:__name__ is a str; it must be a function of Outputs, or a Metric"),
        ("no_such_module_here:f", "metrics: No module named 'no_such_module_here'"),
    ],
)
def test_what_is_no_metric_is_an_error(name, message):
    with pytest.raises(RecipeError, match=message) as caught:
        resolve_metrics([name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("3.0", "gave a float; it must give a MetricScore"),
        ("MetricScore('x', 1.0, 's', (1.0,))", "must give a score, .*, for each of 2 examples"),
        ("MetricScore('x', float('nan'), 's', (1.0, 2.0))", "gave a number that is not finite"),
        ("MetricScore('x', 1.0, 's', (1.0, float('inf')))", "gave a number that is not finite"),
        ("MetricScore('x', 40.0, 's', (10.0, 20.0))", "gave the value 40, .* have the mean 15; .*from_statistics"),
    ],
)
def test_what_a_metric_of_the_users_own_gives_is_checked(own_module, result, message):
    module = own_module(
        f"""
        from grasp_lora.evaluation.metrics import MetricScore

        def metric(outputs):
            return {result}
        """
    )
    with pytest.raises(DataError, match=message):
        score([f"{module}:metric"], ["x", "y"], [["x"], ["y"]], "en")


def test_a_function_that_is_no_metric_is_one_line():
    with pytest.raises(DataError, match="metric json:loads: the JSON object must be str") as caught:
        score(["json:loads"], ["x"], [["x"]], "en")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("made", ["numpy.int64(50)", "torch.tensor(50.0)"])
def test_numbers_of_numpy_and_torch_become_plain_ones(own_module, made):
    module = own_module(
        f"""
        import numpy, torch
        from grasp_lora.evaluation.metrics import MetricScore

        def metric(outputs):
            return MetricScore("x", {made}, "s", numpy.array([0, 100], dtype=numpy.float32))
        """
    )
    found = score([f"{module}:metric"], ["x", "y"], [["x"], ["y"]], "en")[f"{module}:metric"]
    assert json.dumps([found.value, found.per_example]) == "[50.0, [0.0, 100.0]]"


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
    for result in score(EVERYWHERE, [text], [[text]], language).values():
        assert (result.value, result.per_example) == (100, (100,))


@settings(deadline=None)
@given(languages, st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=3))
def test_scores_stay_in_their_range(language, examples):
    predictions = [prediction for prediction, _ in examples]
    for result in score(EVERYWHERE, predictions, [some for _, some in examples], language).values():
        assert len(result.per_example) == len(examples)
        assert all(0 <= value <= 100 for value in (result.value, *result.per_example))


@settings(deadline=None)
@given(languages, texts, st.lists(texts, min_size=1, max_size=3), texts)
def test_another_reference_never_lowers_the_best(language, prediction, references, another):
    names = [name for name in EVERYWHERE if name != "bleu"]
    fewer = score(names, [prediction], [references], language)
    more = score(names, [prediction], [[*references, another]], language)
    for name in names:
        alone = score([name], [prediction], [[another]], language)[name].value
        assert more[name].value == max(fewer[name].value, alone)


@settings(deadline=None)
@given(languages, st.lists(words, min_size=1, max_size=5))
def test_an_empty_prediction_scores_0(language, some_words):
    for result in score(EVERYWHERE, [""], [[" ".join([*some_words, "x"])]], language).values():
        assert (result.value, result.per_example) == (0, (0,))
