"""Labels are scored by the probability of the whole answer, whether or not the prompt is read once for all of them."""

import random

import pytest
import torch
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM, RwkvConfig, RwkvForCausalLM

from grasp_lora.errors import DataError, ProbeError
from grasp_lora.models import answers
from grasp_lora.models.answers import label_scores

EOS = 2
LABELS = [[70, EOS], [70, 71, EOS], [70, 71, 72, 73, EOS], [90, 91, EOS]]


def make_prompts(count: int = 5, longest: int = 40) -> list[list[int]]:
    draw = random.Random(0)
    return [[1, *(draw.randrange(4, 260) for _ in range(draw.randint(0, longest)))] for _ in range(count)] + [[1]]


@torch.no_grad()
def slowly(model: torch.nn.Module, prompt: list[int], label: list[int]) -> float:
    """One sequence, no cache, no padding, token by token."""
    logits = model(input_ids=torch.tensor([[*prompt, *label]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(label))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("sizes", [(16, 8192), (3, 60)])
def test_a_score_is_the_log_probability_of_label_and_end(architecture, sizes, make_tiny_model, monkeypatch) -> None:
    monkeypatch.setattr(answers, "BATCH_SIZE", sizes[0])
    monkeypatch.setattr(answers, "BATCH_TOKENS", sizes[1])
    model = make_tiny_model(architecture).train()
    prompts, done = make_prompts(), []
    found = label_scores(model, prompts, LABELS, lambda *of: done.append(of))
    model.eval()
    for prompt, scores in zip(prompts, found, strict=True):
        assert scores == pytest.approx([slowly(model, prompt, label) for label in LABELS], abs=1e-4)
    assert done == [(number, len(prompts)) for number in range(1, len(prompts) + 1)]


def test_the_mode_of_the_model_comes_back(make_tiny_model) -> None:
    model = make_tiny_model("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    label_scores(model, make_prompts(1), LABELS)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("kind", ["rwkv", "recurrent_gemma"])
def test_a_model_whose_cache_cannot_be_shared_reads_the_prompt_for_each_label(kind) -> None:
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64}
    if kind == "rwkv":
        model = RwkvForCausalLM(RwkvConfig(context_length=64, num_hidden_layers=2, attention_hidden_size=32, **sizes))
    else:
        model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(num_hidden_layers=3, num_attention_heads=2, **sizes))
    model.eval()
    prompt = make_prompts()[1]
    [scores] = label_scores(model, [prompt], LABELS)
    assert scores == pytest.approx([slowly(model, prompt, label) for label in LABELS], abs=1e-4)


def test_a_prompt_is_read_once_for_all_labels(make_tiny_model, monkeypatch) -> None:
    model, tokens = make_tiny_model("llama"), []
    model.register_forward_pre_hook(lambda _, __, inputs: tokens.append(inputs["input_ids"].numel()), with_kwargs=True)
    prompt = [1, *range(4, 104)]
    label_scores(model, [prompt], LABELS)
    assert tokens == [1, 100, len(LABELS) * 5]  # the first tells what the cache is
    tokens.clear()
    monkeypatch.setattr(answers, "_read", lambda *_: None)
    label_scores(model, [prompt, prompt], LABELS)
    assert tokens == [len(LABELS) * 105] * 2


def test_a_label_has_to_fit_behind_the_prompt(make_tiny_model) -> None:
    with pytest.raises(DataError, match="prompt 1 has 510 tokens"):
        label_scores(make_tiny_model("llama"), [[5] * 510], LABELS)


def test_a_model_that_overflows_chooses_no_label(make_tiny_model) -> None:
    model = make_tiny_model("llama")
    torch.nn.init.constant_(model.model.norm.weight, float("inf"))
    with pytest.raises(ProbeError, match="scores are no numbers; check the weights"):
        label_scores(model, [[5, 6]], LABELS)
    with pytest.raises(ProbeError, match=r"float16 may overflow: set backbone\.dtype to float32"):
        label_scores(model.half(), [[5, 6]], LABELS)
