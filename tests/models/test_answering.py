"""Greedy answers and likeliest labels: independent of batching, of the model's own settings, and without traces on the model."""

import logging
import random

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from pydantic import TypeAdapter
from random_examples import TARGETS

from grasp_lora.errors import DataError, ProbeError
from grasp_lora.models import generation as module
from grasp_lora.models.generation import answer, label_scores
from grasp_lora.models.model_settings import GenerationSettings

EOS = 2
NEW_TOKENS = 12


def make_prompts(count: int = 8, longest: int = 40, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    lengths = [draw.randint(2, longest) for _ in range(count)]
    return [[1, *(draw.randrange(4, 260) for _ in range(length - 1))] for length in lengths]


@torch.no_grad()
def greedy_tokens(model, prompt, count=NEW_TOKENS):
    """Decode the slow way: one prompt, no cache, no padding."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def generate(*arguments, **settings):
    return [text for text, _ in answer(*arguments, **settings)]


def expected_text(tokenizer, tokens, stop_ids=(EOS,), stop=()):
    ended = next((place for place, token in enumerate(tokens) if token in stop_ids), len(tokens))
    text = tokenizer.decode(tokens[:ended], skip_special_tokens=True)
    for mark in stop:
        text = text.split(mark)[0]
    return text.strip()


def adapted(model, targets):
    """The model with a LoRA adapter whose random B changes the answers."""
    turned = {"fan_in_fan_out": model.config.model_type == "gpt2"}
    config = LoraConfig(r=4, lora_dropout=0.5, task_type="CAUSAL_LM", target_modules=list(targets), **turned)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    return model


@pytest.mark.parametrize("architecture", TARGETS)
def test_batch_size_does_not_change_answers(architecture, make_tiny_model, tiny_tokenizer, monkeypatch):
    model = make_tiny_model(architecture)
    prompts = make_prompts()
    expected = [expected_text(tiny_tokenizer, greedy_tokens(model, prompt)) for prompt in prompts]
    assert len(set(expected)) > 4  # the prompts matter to this model
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, stop=())
    for rows in (1, 3, 8):
        monkeypatch.setattr(module, "BATCH_SIZE", rows)
        assert generate(model, tiny_tokenizer, prompts, settings) == expected, rows


def test_stop_text_is_cut_off_and_ends_the_batch_early(make_tiny_model, tiny_tokenizer, monkeypatch):
    model = make_tiny_model("llama")
    prompts = make_prompts(6)
    tokens = [greedy_tokens(model, prompt, 5) for prompt in prompts]
    stop = tuple({tiny_tokenizer.decode(row)[-1] for row in tokens})  # each row meets one within a few tokens
    steps = []
    model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    settings = GenerationSettings(max_new_tokens=40, stop=stop)
    answers = generate(model, tiny_tokenizer, prompts, settings)
    assert len(steps) < 10
    assert not any(mark in answer for answer in answers for mark in stop)
    monkeypatch.setattr(module, "BATCH_SIZE", 1)
    assert generate(model, tiny_tokenizer, prompts, settings) == answers


def force(model, step: int, token: int) -> list[int]:
    """Have the model say a token at a step; gives a list that grows with each step."""
    taken = []

    def say(_, inputs, logits):
        if not logits.numel():  # the prompt is read
            return
        taken.append(1)
        if len(taken) == step:
            logits[..., token] = 1e9

    model.lm_head.register_forward_hook(say)
    return taken


@pytest.mark.parametrize("stop", ["<unk>", "<unk>\n"])
def test_a_stop_text_that_is_a_special_token_ends_an_answer(make_tiny_model, tiny_tokenizer, stop):
    """It stands in no decoded text."""
    model, prompts = make_tiny_model("llama"), make_prompts(1)
    first = expected_text(tiny_tokenizer, greedy_tokens(model, prompts[0], 3))
    taken = force(model, step=4, token=3)
    [answer] = generate(model, tiny_tokenizer, prompts, GenerationSettings(max_new_tokens=9, stop=(stop,)))
    assert answer == first
    assert len(taken) < 9
    taken.clear()
    assert generate(model, tiny_tokenizer, prompts, GenerationSettings(max_new_tokens=9, stop=())) != [first]


def test_every_eos_of_the_model_and_the_tokenizer_ends_an_answer(make_tiny_model, tiny_tokenizer):
    model = make_tiny_model("qwen3")
    prompts = make_prompts(5)
    tokens = [greedy_tokens(model, prompt) for prompt in prompts]
    extra = (tokens[0][4], tokens[1][2])
    model.generation_config.eos_token_id = list(extra)
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, stop=())
    expected = [expected_text(tiny_tokenizer, row, stop_ids=(EOS, *extra)) for row in tokens]
    assert generate(model, tiny_tokenizer, prompts, settings) == expected
    assert len(expected[1]) <= 2


def test_the_end_waits_for_a_text(make_tiny_model, tiny_tokenizer):
    model = make_tiny_model("llama")
    prompts = make_prompts(6)
    firsts = {greedy_tokens(model, prompt, 1)[0] for prompt in prompts[:2]}
    model.generation_config.eos_token_id = sorted(firsts)
    rows = [greedy_tokens(model, prompt) for prompt in prompts]
    free = [expected_text(tiny_tokenizer, row, stop_ids=(EOS, *firsts)) for row in rows]
    assert free[:2] == ["", ""]
    held = generate(model, tiny_tokenizer, prompts, GenerationSettings(max_new_tokens=NEW_TOKENS, stop=()))
    assert all(held)
    assert [answer for answer in free if answer] == [new for old, new in zip(free, held, strict=True) if old]


def test_a_line_break_at_the_start_ends_nothing(make_tiny_model, tiny_tokenizer):
    model, line_break = make_tiny_model("llama"), tiny_tokenizer("\n", add_special_tokens=False).input_ids[0]
    force(model, step=1, token=line_break)
    [answer] = generate(model, tiny_tokenizer, make_prompts(1), GenerationSettings(max_new_tokens=6))
    assert answer


def test_of_stop_texts_that_end_together_the_longer_one_cuts(make_tiny_model, tiny_tokenizer):
    model, prompts = make_tiny_model("llama"), make_prompts(1)
    for step, letter in enumerate("abc", start=1):
        force(model, step=step, token=tiny_tokenizer(letter, add_special_tokens=False).input_ids[0])
    assert generate(model, tiny_tokenizer, prompts, GenerationSettings(stop=("c", "bc"))) == ["a"]


def test_sampling_settings_and_seeds_are_ignored_in_silence(make_tiny_model, tiny_tokenizer, caplog):
    model = make_tiny_model("llama")
    prompts, state, contiguous = make_prompts(4), torch.get_rng_state(), []
    model.lm_head.register_forward_hook(lambda _, inputs, __: contiguous.append(inputs[0].is_contiguous()))
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, stop=())
    plain = generate(model, tiny_tokenizer, prompts, settings)
    own = model.generation_config
    own.update(do_sample=True, temperature=2.0, top_p=0.3, top_k=5, repetition_penalty=9.0, max_length=3)
    own.update(no_repeat_ngram_size=1, num_beams=3, pad_token_id=None)
    before = own.to_dict()
    logging.getLogger("transformers").propagate = True
    try:
        with caplog.at_level(logging.WARNING):
            assert generate(model, tiny_tokenizer, prompts, settings) == plain
    finally:
        logging.getLogger("transformers").propagate = False
    assert not caplog.records
    assert model.generation_config is own
    assert own.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(contiguous)  # else a CPU copies the output layer for each sequence


@pytest.mark.parametrize(
    ("architecture", "targets"), [*TARGETS.items(), ("llama", ["lm_head"])], ids=[*TARGETS, "output layer"]
)
def test_peft_model_answers_with_its_adapter(architecture, targets, make_tiny_model, tiny_tokenizer):
    prompts = make_prompts(5, seed=1)  # none of which is answered by an end at once
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, stop=())
    plain = generate(make_tiny_model(architecture), tiny_tokenizer, prompts, settings)
    model = adapted(make_tiny_model(architecture), targets).train()
    modes = [module.training for module in model.modules()]
    answers = generate(model, tiny_tokenizer, prompts, settings)
    assert [module.training for module in model.modules()] == modes
    assert answers != plain
    model.eval()
    assert answers == [expected_text(tiny_tokenizer, greedy_tokens(model, prompt)) for prompt in prompts]
    with model.disable_adapter():
        assert generate(model, tiny_tokenizer, prompts, settings) == plain


def test_a_failure_leaves_the_model_as_it_was(make_tiny_model, tiny_tokenizer):
    model = make_tiny_model("llama").train()
    model.model.layers[0].eval()  # a mixed state must come back as it was
    modes = [module.training for module in model.modules()]
    own = model.generation_config
    with pytest.raises(ZeroDivisionError):
        generate(model, tiny_tokenizer, make_prompts(2), GenerationSettings(max_new_tokens=2), lambda *_: 1 / 0)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is own
    assert not model.lm_head._forward_pre_hooks


def test_a_model_that_overflows_gives_no_answers_and_chooses_no_label(make_tiny_model, tiny_tokenizer):
    model = make_tiny_model("llama")
    torch.nn.init.constant_(model.model.norm.weight, float("inf"))
    with pytest.raises(ProbeError, match="scores are no numbers; check the weights"):
        generate(model, tiny_tokenizer, make_prompts(2), GenerationSettings())
    with pytest.raises(ProbeError, match="scores are no numbers; check the weights"):
        label_scores(model, [[5, 6]], LABELS)
    with pytest.raises(ProbeError, match="scores are no numbers; check the weights"):
        answer(model, tiny_tokenizer, [[5, 6]], GenerationSettings(), right=[[7, EOS]])
    with pytest.raises(ProbeError, match=r"float16 may overflow: set backbone\.dtype to float32"):
        label_scores(model.half(), [[5, 6]], LABELS)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prompt_is_neither_empty_nor_too_long_for_what_follows(architecture, make_tiny_model, tiny_tokenizer):
    model, settings = make_tiny_model(architecture), GenerationSettings(max_new_tokens=4)
    assert generate(model, tiny_tokenizer, [], settings) == []
    assert len(generate(model, tiny_tokenizer, [[1] * 508], settings)) == 1
    with pytest.raises(DataError, match=r"prompt 2 has 509 tokens.*holds 512"):
        generate(model, tiny_tokenizer, [[1] * 5, [1] * 509], settings)
    with pytest.raises(DataError, match="prompt 1 has 0 tokens"):
        generate(model, tiny_tokenizer, [[]], settings)
    with pytest.raises(DataError, match="prompt 1 has 510 tokens"):
        label_scores(model, [[5] * 510], LABELS)
    with pytest.raises(DataError, match=r"prompt 2 has 500 tokens and up to 13 follow"):
        answer(model, tiny_tokenizer, [[1] * 5, [1] * 500], settings, right=[[5] * 40, [5] * 13])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens\n.*greater than or equal to 1"),
        ({"stop": ("\n", "")}, "stop.1\n.*at least 1 character"),
        ({"stop": "\n"}, "stop\n.*tuple"),
        ({"stop": ("###", r"\n")}, "a backslash and a letter: write a line break as .* in YAML"),
        ({"stop": (r"\nQuestion:",)}, "a backslash and a letter"),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        TypeAdapter(GenerationSettings).validate_python(values)
    assert GenerationSettings(stop=(r"\nabla", r"\end{document}", "\n\t")).stop


SHAPE = {"vocab_size": 260, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
OTHERS = {
    "openai-gpt": transformers.OpenAIGPTConfig(vocab_size=260, n_embd=32, n_layer=2, n_head=4),
    "rwkv": transformers.RwkvConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2),
    "recurrent_gemma": transformers.RecurrentGemmaConfig(
        **SHAPE, num_hidden_layers=3, num_key_value_heads=1, lru_width=32, attention_window_size=8
    ),
    "minimax": transformers.MiniMaxConfig(
        **SHAPE, num_hidden_layers=2, num_key_value_heads=2, head_dim=8, block_size=4, num_local_experts=2,
        num_experts_per_tok=1, layer_types=["linear_attention", "full_attention"],
    ),
}  # fmt: skip


def random_model(config: transformers.PreTrainedConfig) -> torch.nn.Module:
    """A model whose prompts matter: its random weights are wide."""
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


@pytest.mark.parametrize("architecture", OTHERS)
def test_models_with_a_state_of_their_own_or_none_answer_alike_in_batches(architecture, tiny_tokenizer):
    model = random_model(OTHERS[architecture])
    prompts = make_prompts(4, longest=12)
    settings = GenerationSettings(max_new_tokens=9, stop=())
    answers = generate(model, tiny_tokenizer, prompts, settings)
    assert answers == [generate(model, tiny_tokenizer, [prompt], settings)[0] for prompt in prompts]
    assert len(set(answers)) > 1
    # A cache that cannot be shared: the prompt is read for each label, and once more for an answer.
    right = random_answers(prompts)
    measured = answer(model, tiny_tokenizer, prompts, settings, right=right)
    assert [text for text, _ in measured] == answers
    assert [loss for _, loss in measured] == pytest.approx(losses_of(model, prompts, right), abs=1e-4)
    [scores] = label_scores(model, prompts[:1], LABELS)
    assert scores == pytest.approx([slowly(model, prompts[0], label) for label in LABELS], abs=1e-4)


LABELS = [[70, EOS], [70, 71, EOS], [70, 71, 72, 73, EOS], [90, 91, EOS]]


@torch.no_grad()
def slowly(model: torch.nn.Module, prompt: list[int], label: list[int]) -> float:
    """One sequence, no cache, no padding, token by token."""
    logits = model(input_ids=torch.tensor([[*prompt, *label]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(label))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("sizes", [(16, 8192, 1024), (3, 60, 48)])
def test_a_score_is_the_log_probability_of_label_and_end(architecture, sizes, make_tiny_model, monkeypatch):
    for name, size in zip(("BATCH_SIZE", "BATCH_TOKENS", "READ_TOKENS"), sizes, strict=True):
        monkeypatch.setattr(module, name, size)
    model = make_tiny_model(architecture).train()
    prompts, done = [*make_prompts(5), [1]], []
    found = label_scores(model, prompts, LABELS, lambda *of: done.append(of))
    model.eval()
    for prompt, scores in zip(prompts, found, strict=True):
        assert scores == pytest.approx([slowly(model, prompt, label) for label in LABELS], abs=1e-4)
    counts = [count for count, _ in done]
    assert counts == sorted(set(counts))
    assert {total for _, total in done} == {counts[-1]} == {len(prompts)}


def random_answers(prompts: list[list[int]], longest: int = 9, seed: int = 1) -> list[list[int]]:
    draw = random.Random(seed)
    return [[*(draw.randrange(4, 260) for _ in range(draw.randint(0, longest))), EOS] for _ in prompts]


def losses_of(model: torch.nn.Module, prompts: list[list[int]], right: list[list[int]]) -> list[float]:
    return [-slowly(model, *pair) / len(pair[1]) for pair in zip(prompts, right, strict=True)]


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(
    "sizes", [(16, 8192, 512, 128), (3, 8192, 512, 128), (16, 60, 512, 1024), (16, 8192, 12, 1024)]
)
def test_losses_of_right_answers_come_with_the_answers(
    architecture, sizes, make_tiny_model, tiny_tokenizer, monkeypatch
):
    """Long prompts go beyond the sliding window of those that have one; a prompt of one token leaves nothing to share."""
    for name, size in zip(("BATCH_SIZE", "BATCH_TOKENS", "SCORED_TOKENS", "READ_TOKENS"), sizes, strict=True):
        monkeypatch.setattr(module, name, size)
    model = make_tiny_model(architecture)
    prompts, settings = [*make_prompts(6), [1], *make_prompts(6, 100)], GenerationSettings(NEW_TOKENS, ())
    right, done = random_answers(prompts), []
    for place in range(3, len(prompts)):  # these begin as the model answers, or are all of it
        right[place][:0] = greedy_tokens(model, prompts[place], place)
    right[4] = [*greedy_tokens(model, prompts[4]), EOS]
    measured = answer(model, tiny_tokenizer, prompts, settings, lambda *of: done.append(of), right=right)
    assert [text for text, _ in measured] == generate(model, tiny_tokenizer, prompts, settings)
    assert [loss for _, loss in measured] == pytest.approx(losses_of(model, prompts, right), abs=1e-4)
    assert done[-1] == (len(prompts), len(prompts))


def on_contexts(longest: int) -> list[list[int]]:
    """Some questions on each of five contexts, two on none, and one that is asked twice."""
    draw, prompts = random.Random(0), []
    for context in make_prompts(5, longest):
        rests = [[draw.randrange(4, 260) for _ in range(draw.randint(1, 6))] for _ in range(draw.randint(1, 4))]
        prompts += [[*context, *rest] for rest in rests]
    return [*prompts[::2], [1], [1, 9], *prompts[1::2], prompts[0]]


@pytest.mark.parametrize("architecture", [*TARGETS, "qwen3_moe"])
@pytest.mark.parametrize(("longest", "rows"), [(8, 64), (40, 64), (40, 3)])
def test_shared_contexts_change_nothing(architecture, longest, rows, make_tiny_model, tiny_tokenizer, monkeypatch):
    """Contexts of different lengths in a batch, within a sliding window and beyond it."""
    monkeypatch.setattr(module, "BATCH_SIZE", rows)
    model, prompts, settings = make_tiny_model(architecture), on_contexts(longest), GenerationSettings(NEW_TOKENS, ())
    tokens = [greedy_tokens(model, prompt) for prompt in prompts]
    right = [[*row[: place % 5], *[7] * (place % 2), EOS] for place, row in enumerate(tokens)]
    measured = answer(model, tiny_tokenizer, prompts, settings, right=right)
    assert [text for text, _ in measured] == [expected_text(tiny_tokenizer, row) for row in tokens]
    assert [loss for _, loss in measured] == pytest.approx(losses_of(model, prompts, right), abs=1e-4)
    assert generate(model, tiny_tokenizer, prompts, settings) == [text for text, _ in measured]
    for prompt, scores in zip(prompts, label_scores(model, prompts, LABELS), strict=True):
        assert scores == pytest.approx([slowly(model, prompt, label) for label in LABELS], abs=1e-4)


def test_what_prompts_share_is_read_once_and_other_prompts_cost_no_more(make_tiny_model, tiny_tokenizer, monkeypatch):
    model, read, settings = make_tiny_model("llama"), [], GenerationSettings(1, ())
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))
    context, other = [1, *range(4, 34)], [1, *range(40, 60)]
    generate(model, tiny_tokenizer, [[*context, 100, 101], [*other, 100], [*context, 102], [*other, 103]], settings)
    assert read == [(2, 31), (4, 2)]
    read.clear()
    label_scores(model, [[*context, 100]], LABELS)  # its labels share all but its last token
    assert read == [(1, 31), (4, 5)]
    read.clear()
    monkeypatch.setattr(module, "SCORED_TOKENS", 10)
    label_scores(model, [[*context, 100]], LABELS)  # in two parts
    assert read == [(1, 31), (2, 5), (2, 5)]
    read.clear()
    generate(model, tiny_tokenizer, [context, other], settings)
    assert read == [(2, 31)]


def test_groups_read_the_fewest_tokens():
    instruction, contexts = [1] * 30, [[2] * 20, [3] * 24]
    prompts = [[*instruction, *context, question] for context in contexts for question in (5, 6, 7)]
    assert sorted(module._groups(prompts, [1] * 6)) == [([0, 1, 2], 50), ([3, 4, 5], 54)]
    assert module._groups([[1, 2, 3, 4], [1, 5, 6, 7]], [1, 1]) == [([0], 0), ([1], 0)]  # too little to share
    assert module._groups([], []) == []


@pytest.mark.parametrize("with_stop", [False, True])
def test_right_answers_that_the_model_says_change_no_answer(with_stop, make_tiny_model, tiny_tokenizer):
    """Ends before there is a text, ends and stop texts within the right answer, and more tokens of it than an answer may have."""
    model, prompts = make_tiny_model("qwen3"), make_prompts(8)
    tokens = [greedy_tokens(model, prompt) for prompt in prompts]
    model.generation_config.eos_token_id = sorted({EOS, tokens[0][0], tokens[1][0], *(row[4] for row in tokens[2:5])})
    text = tiny_tokenizer.decode(tokens[5])
    stop = (text[2:4], text[1:5]) if with_stop else ()  # the one that begins first ends last
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, stop=stop)
    plain = generate(model, tiny_tokenizer, prompts, settings)
    assert all(plain)
    for known in (0, 1, 3, NEW_TOKENS, NEW_TOKENS + 3):
        right = [[*greedy_tokens(model, prompt, known), 7, EOS] for prompt in prompts]
        measured = answer(model, tiny_tokenizer, prompts, settings, right=right)
        assert [text for text, _ in measured] == plain
        assert [loss for _, loss in measured] == pytest.approx(losses_of(model, prompts, right), abs=1e-4)


NEAR_THE_LIMIT = {
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=260, hidden_size=32, num_heads=2, max_position_embeddings=64, attention_types=[[["global"], 2]],
        num_layers=2, intermediate_size=64,
    ),
    "phi3": transformers.Phi3Config(
        **SHAPE, num_hidden_layers=2, pad_token_id=0, eos_token_id=2, original_max_position_embeddings=32,
        max_position_embeddings=64, rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 32,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", NEAR_THE_LIMIT)
def test_right_answers_that_reach_the_model_s_limits_change_no_answer(architecture, tiny_tokenizer):
    """One is the context, with buffers of its size; another where long RoPE turns all tokens otherwise."""
    model = random_model(NEAR_THE_LIMIT[architecture])
    settings = GenerationSettings(NEW_TOKENS, ())
    for lengths, scored in (
        ((50, 48), (3, 16)),
        ((34,), (30,)),
        ((52, 20), (1, 20)),
        ((20,), (20,)),
        ((28,), (8,)),
    ):
        prompts = [[1, *prompt[: length - 1]] for prompt, length in zip(make_prompts(2, 500), lengths, strict=False)]
        right = [[5] * (length - 1) + [EOS] for length in scored]
        expected = [expected_text(tiny_tokenizer, greedy_tokens(model, prompt)) for prompt in prompts]
        measured = answer(model, tiny_tokenizer, prompts, settings, right=right)
        assert [text for text, _ in measured] == expected, (lengths, scored)


def test_the_likeliest_label_comes_with_the_loss_of_the_right_one(make_tiny_model, tiny_tokenizer):
    model, prompts = make_tiny_model("llama"), make_prompts(4)
    labels = {str(place): label for place, label in enumerate(LABELS[:3])}
    right = [LABELS[0], LABELS[2], LABELS[3], LABELS[1]]  # one is none of the labels
    likeliest = [
        max(labels, key=lambda name, scores=scores: scores[int(name)])
        for scores in label_scores(model, prompts, LABELS[:3])
    ]
    for given, losses in ((None, [0.0] * 4), (right, losses_of(model, prompts, right))):
        found = answer(model, tiny_tokenizer, prompts, GenerationSettings(), labels=labels, right=given)
        assert [text for text, _ in found] == likeliest
        assert [loss for _, loss in found] == pytest.approx(losses, abs=1e-4)


def test_of_equally_likely_labels_the_first_is_the_answer(make_tiny_model, tiny_tokenizer):
    model, prompts = make_tiny_model("llama"), make_prompts(2)
    for names in (("b", "a"), ("a", "b")):
        labels = dict.fromkeys(names, LABELS[0])
        found = answer(model, tiny_tokenizer, prompts, GenerationSettings(), labels=labels)
        assert [text for text, _ in found] == [names[0]] * 2


def test_a_prompt_is_read_once_for_its_loss_and_its_answer(make_tiny_model, tiny_tokenizer):
    model, read = make_tiny_model("llama"), []
    context, settings = [1, *range(4, 104)], GenerationSettings(2, ())
    prompts = [[*context, *range(4, 9)], [*context, *range(14, 17)]]
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))
    answer(model, tiny_tokenizer, prompts, settings, right=[[70, 71, EOS], [70, EOS]])
    # The context, the questions, their last tokens with the right answers, and the answers.
    assert read == [(1, 101), (2, 4), (2, 3), (2, 1), (2, 1)]


@pytest.mark.parametrize("labels", [None, {"a": [70, EOS], "b": [71, EOS]}])
def test_a_right_answer_that_is_impossible_to_the_model_is_named(labels, make_tiny_model, tiny_tokenizer):
    model = make_tiny_model("llama")

    def forbid(_, inputs, logits):
        logits[..., 7] = -torch.inf

    model.lm_head.register_forward_hook(forbid)
    with pytest.raises(ProbeError, match="loss of the right answer to prompt 2 is inf, no finite number"):
        answer(model, tiny_tokenizer, [[5, 6], [5, 8]], GenerationSettings(), labels=labels, right=[[9, EOS], [7, EOS]])


POSITIONS = {
    "roberta": transformers.RobertaConfig(
        **SHAPE, num_hidden_layers=2, max_position_embeddings=64, is_decoder=True, pad_token_id=1
    ),
    "bart": transformers.BartConfig(
        vocab_size=260, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64,
        max_position_embeddings=64,
    ),
    "bloom": transformers.BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4),
}  # fmt: skip


@pytest.mark.parametrize("architecture", POSITIONS)
def test_models_that_count_positions_in_their_own_way_have_right_losses(architecture, tiny_tokenizer):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(POSITIONS[architecture]).eval()
    for name, parameter in model.named_parameters():
        if "position" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    prompts = [prompt[:20] for prompt in make_prompts(4)]
    right = random_answers(prompts)
    measured = answer(model, tiny_tokenizer, prompts, GenerationSettings(3, ()), right=right)
    assert [loss for _, loss in measured] == pytest.approx(losses_of(model, prompts, right), abs=1e-4)
    [scores] = label_scores(model, prompts[:1], LABELS)
    assert scores == pytest.approx([slowly(model, prompts[0], label) for label in LABELS], abs=1e-4)
