"""BERTScore with a tiny random encoder: what bert-score gives where it works, and sound answers where it does not."""

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from grasp_lora.errors import RecipeError
from grasp_lora.evaluation.bertscore import BertScoreSettings, lack_of_bertscore
from grasp_lora.evaluation.metrics import MetricScore, resolve_metrics, score

pytest.importorskip("bert_score", reason="needs the extra 'eval'")

CONTEXT = 24
PREDICTIONS = ["the red house", "去北京", "كتاب جديد", "a b c d e f", "house"]
REFERENCES = [["a red house", "the house"], ["去上海"], ["كتاب قديم"], ["a b x d"], ["house"]]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The folder of a tiny random BERT, which reads characters; treat it as read-only."""
    folder = tmp_path_factory.mktemp("encoder") / "tiny-bert"
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz" + "".join(map(str, range(10))) + "去北京上海كتابجديقم"))
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **names).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            initializer_range=0.2,
        )
        BertModel(config).save_pretrained(folder)
    return folder


def compute(settings, predictions, references, language="zh", **options):
    return score(resolve_metrics(["bertscore"], settings, **options), predictions, references, language)["bertscore"]


def test_agrees_with_bert_score_where_that_works(encoder):
    from bert_score import score as official

    result = compute(BertScoreSettings({"zh": str(encoder)}), PREDICTIONS, REFERENCES)
    _, _, expected = official(PREDICTIONS, REFERENCES, model_type=str(encoder), num_layers=3, device="cpu")
    assert result.per_example == pytest.approx([100 * value for value in expected.tolist()], abs=1e-3)
    assert result.value == pytest.approx(sum(result.per_example) / len(PREDICTIONS))
    assert len(set(result.per_example)) == len(PREDICTIONS)


def test_blank_texts_score_0_and_identical_ones_100(encoder):
    settings = BertScoreSettings({"zh": str(encoder)})
    predictions = ["", " \n", "\u200b", "كتاب", "去北京 2026!", "ñ", "x"]
    references = [["x"], ["x"], ["x"], ["كتاب"], ["else", "去北京 2026!"], ["ñ"], [""]]
    assert compute(settings, predictions, references).per_example == (0, 0, 0, 100, 100, 100, 0)
    assert compute(settings, [""], [[""]]).value == 0


def test_without_a_model_it_is_unavailable_and_not_0():
    expected = MetricScore("bertscore", None, "unavailable:no model for ar", ())
    assert compute(None, ["x"], [["x"]], "ar") == expected
    assert compute(BertScoreSettings({"zh": "no/model"}), ["x"], [["x"]], "ar-EG") == expected
    lack_of_bertscore("ar", BertScoreSettings({"zh": "no/model"}))


def test_codes_of_two_and_of_three_letters_name_one_language(encoder):
    result = compute(BertScoreSettings({"zho": str(encoder)}), ["去北京"], [["去北京"]], "zh")
    assert result.value == 100
    assert compute(BertScoreSettings({"zh": str(encoder), "zh-TW": "no/model"}), ["x"], [["x"]], "zh-TW").value == 100


def test_signature_names_the_model_as_the_recipe_does(encoder):
    settings = BertScoreSettings({"zh": encoder.name})
    result = compute(settings, ["x", "y"], [["x"], ["y", "z"]], base=encoder.parent)
    assert result.signature.startswith("nrefs:var|refs:best|measure:f|model:tiny-bert|layer:3/4|idf:no|rescaled:no|")
    assert "|bert_score:0.3." in result.signature


@pytest.mark.parametrize("place", ["no-such-model-anywhere", "a/b/c"])
def test_a_model_that_cannot_be_used_is_an_error_of_one_line(place):
    with pytest.raises(RecipeError, match=rf"^BERTScore model {place}: [^\n]+$"):
        lack_of_bertscore("zh", BertScoreSettings({"zh": place}))
