"""The one loss against a naive loop, and probes that leave a model in the middle of its training as they found it."""

import random
from functools import partial

import numpy as np
import pytest
import random_examples
import torch
from random_examples import TARGETS, Example, naive_losses, random_adapter
from transformers import OPTConfig, OPTForCausalLM

from grasp_lora.errors import AdapterError, DataError, ProbeError
from grasp_lora.method.masks import MaskSet, MaskSettings
from grasp_lora.models import generation
from grasp_lora.models.adapters import attached, fresh_adapter
from grasp_lora.models.backbone import supports_logits_to_keep
from grasp_lora.models.live import live_pairs, lora_layers
from grasp_lora.models.loss import IGNORED, collate, example_losses
from grasp_lora.models.model_settings import LoraSettings
from grasp_lora.training.probes import NormCollector, ProbeSet, ProbesInTurn, calibrate

PAD = 0
make_examples = partial(random_examples.make_examples, prompt=(1, 23))


@pytest.fixture
def adapted(make_tiny_model):
    """A tiny Llama with a random adapter and much dropout."""
    model = make_tiny_model("llama")
    with attached(model, random_adapter(model, "llama"), dropout=0.5) as peft_model:
        yield peft_model


@pytest.mark.parametrize("architecture", TARGETS)
def test_losses_equal_a_naive_loop(make_tiny_model, architecture):
    model = make_tiny_model(architecture)
    examples = make_examples(9)
    with attached(model, random_adapter(model, architecture)) as peft_model, torch.no_grad():
        expected = naive_losses(peft_model, examples)
        batch = collate(examples, PAD)
        assert supports_logits_to_keep(peft_model)
        for label_positions in (True, False):
            found = example_losses(peft_model, batch, label_positions=label_positions)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("token_budget", [1, 40, 10_000])
def test_neither_batches_nor_padding_change_a_loss(make_tiny_model, architecture, token_budget, monkeypatch):
    monkeypatch.setattr(generation, "READ_TOKENS", token_budget)
    model = make_tiny_model(architecture)
    examples = [*make_examples(9), Example("a", (5, 6), (7, 2, 2))]
    with torch.no_grad():
        expected = naive_losses(model, examples)
    torch.testing.assert_close(torch.tensor(ProbeSet(examples).losses(model)), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("architecture", TARGETS)
def test_a_context_of_several_questions_is_read_once(make_tiny_model, architecture):
    model, read = make_tiny_model(architecture), []
    contexts = make_examples(3, prompt=(12, 20))
    questions = make_examples(8, seed=1, prompt=(2, 5))
    examples = [
        Example(f"q{n}", contexts[n % 3].prompt_ids + one.prompt_ids, one.completion_ids)
        for n, one in enumerate(questions)
    ]
    model.get_input_embeddings().register_forward_hook(lambda _, given, __: read.append(given[0].numel()))
    with attached(model, random_adapter(model, architecture), dropout=0.5) as peft_model, torch.no_grad():
        expected = naive_losses(peft_model, examples)
        read.clear()
        peft_model.train()
        found = ProbeSet(examples).losses(peft_model)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=2e-6)
    assert sum(read) < 0.75 * sum(len(one.prompt_ids) + len(one.completion_ids) for one in examples)
    assert all(module.training for module in peft_model.modules())


def test_collate_pads_on_the_right_and_labels_completions_only():
    batch = collate([Example("a", (5, 6, 7), (8, 2)), Example("b", (9,), (2,))], pad_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2], [9, 2, 3, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    no = IGNORED
    assert batch["labels"].tolist() == [[no, no, no, 8, 2], [no, 2, no, no, no]]


def test_many_answer_tokens_are_split_too(make_tiny_model):
    # 262k logits for each answer token are what fills the memory.
    model = make_tiny_model("llama")
    rows = []
    model.register_forward_hook(lambda _, __, output: rows.append(len(output.logits)))
    ProbeSet([Example(str(i), (5,), (6,) * 200) for i in range(5)]).losses(model)
    assert rows == [400, 400, 200]


def test_what_has_no_loss_is_refused():
    with pytest.raises(DataError, match="there are none"):
        ProbeSet([])
    with pytest.raises(DataError, match="but empty lack one"):
        ProbeSet([*make_examples(2), Example("empty", (5, 6), ())])
    with pytest.raises(DataError, match="but bare lack one"):
        ProbeSet([*make_examples(2), Example("bare", (), (5, 2))])


@pytest.mark.parametrize("token_budget", [1, 10_000])
def test_a_loss_that_is_not_finite_names_its_example(make_tiny_model, token_budget, monkeypatch):
    monkeypatch.setattr(generation, "READ_TOKENS", token_budget)
    model = make_tiny_model("llama")  # its head is not tied to the embedding: NaN stays within the example
    examples = [*make_examples(4), Example("poisoned", (5, 3, 6), (7, 2)), *make_examples(3, 1, "f")]
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = float("nan")
    model.train()
    with pytest.raises(ProbeError, match=r"loss of example poisoned is nan, not a finite number; "):
        ProbeSet(examples).losses(model)
    assert all(module.training for module in model.modules())


def test_a_probe_leaves_everything_as_it_was(adapted, monkeypatch):
    adapted.train()
    layers = [module for module in adapted.modules() if isinstance(module, torch.nn.Dropout)]
    layers[0].eval()  # mixed modes are put back one by one
    modes = [module.training for module in adapted.modules()]
    assert True in modes
    assert False in modes
    for number, parameter in enumerate(adapted.parameters()):
        parameter.grad = torch.full_like(parameter, float(number)) if number % 2 else None
    parameters = [(p.detach().clone(), p.grad if p.grad is None else p.grad.clone()) for p in adapted.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    probe = ProbeSet(make_examples(5))
    first = probe.losses(adapted)
    assert first == probe.losses(adapted)  # eval mode: the dropout of 0.5 is off
    monkeypatch.setattr("grasp_lora.models.generation.target_scores", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe.losses(adapted)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert [module.training for module in adapted.modules()] == modes
    for parameter, (value, gradient) in zip(adapted.parameters(), parameters, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)


def norms_by_hand(peft_model, examples) -> dict[tuple[str, str], torch.Tensor]:
    seen: dict[tuple[str, str], list[torch.Tensor]] = {}
    handles = []
    for name, layer in lora_layers(peft_model).items():
        for factor, module in (("A", layer.lora_A["default"]), ("B", layer.lora_B["default"])):
            rows = seen.setdefault((name, factor), [])
            handles.append(module.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0][0])))
    with torch.no_grad():
        for example in examples:
            peft_model(input_ids=torch.tensor([[*example.prompt_ids, *example.completion_ids]]))
    for handle in handles:
        handle.remove()
    return {key: torch.cat(rows).norm(dim=0) for key, rows in seen.items()}


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("token_budget", [60, 10_000])
def test_norms_equal_those_by_hand_without_the_padding(make_tiny_model, architecture, token_budget, monkeypatch):
    monkeypatch.setattr(generation, "READ_TOKENS", token_budget)
    model = make_tiny_model(architecture)
    examples = make_examples(6)
    with attached(model, random_adapter(model, architecture), dropout=0.5) as peft_model:
        expected = norms_by_hand(peft_model, examples)
        peft_model.train()
        collector = NormCollector(peft_model)
        with collector.collecting():
            ProbeSet(examples).losses(peft_model, collector)
        norms = collector.norms()
        ProbeSet(examples).losses(peft_model)  # the context is closed: nothing is added
        assert set(norms) == set(lora_layers(peft_model))
        for (name, factor), value in expected.items():
            torch.testing.assert_close(getattr(norms[name], factor), value, rtol=1e-5, atol=1e-5)
            assert torch.equal(getattr(norms[name], factor), getattr(collector.norms()[name], factor))


def test_padding_does_not_count_where_a_model_flattens_the_batch(monkeypatch):
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(vocab_size=260, word_embed_proj_dim=32, pad_token_id=PAD, init_std=0.2, **sizes))
    examples, norms = make_examples(6), []
    with fresh_adapter(model, LoraSettings(rank=4, target_modules=("fc1", "q_proj")), 1) as peft_model:
        for token_budget in (10_000, 1):  # one padded batch, then each example alone
            monkeypatch.setattr(generation, "READ_TOKENS", token_budget)
            collector = NormCollector(peft_model)
            with collector.collecting():
                ProbeSet(examples).losses(peft_model, collector)
            norms.append(collector.norms())
    assert {name.rpartition(".")[2] for name in norms[0]} == {"fc1", "q_proj"}
    for name, own in norms[0].items():
        torch.testing.assert_close(own.A, norms[1][name].A, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", ["input_aware", "gradient_of_delta"])
def test_scores_with_inputs_get_norms(adapted, score):
    examples = make_examples(5)
    probe = ProbeSet(examples)
    masks = MaskSet(live_pairs(adapted), MaskSettings(score))
    expected = norms_by_hand(adapted, examples)
    calibrate(adapted, masks, probe)
    for (name, factor), value in expected.items():
        torch.testing.assert_close(getattr(masks.norms[name], factor), value, rtol=1e-5, atol=1e-5)
    masks.commit(0.5)  # measured anew with the weights as they are then
    before = masks.norms
    calibrate(adapted, masks, probe)
    assert any(not torch.equal(masks.norms[name].B, before[name].B) for name in before)


def test_a_module_that_is_never_called_is_named(adapted):
    # An expert that no token of the calibration set reaches: its weights would be pruned by their position.
    layer = lora_layers(adapted)["model.layers.0.self_attn.q_proj"]
    masks = MaskSet(live_pairs(adapted), MaskSettings("input_aware"))
    layer.forward = layer.get_base_layer().forward
    with pytest.raises(AdapterError, match=r"nothing was seen to enter model.layers.0.self_attn.q_proj; .*reach it$"):
        calibrate(adapted, masks, ProbeSet(make_examples(3)))


def test_examples_take_turns_in_an_order_that_the_seed_decides():
    pool = make_examples(7)
    probes = ProbesInTurn(pool, count=3, seed=5)
    order = probes.whole.ids
    assert sorted(order) == sorted(one.id for one in pool)
    for number, expected in enumerate(((0, 1, 2), (3, 4, 5), (6, 0, 1), (2, 3, 4))):
        assert probes.places(number) == expected
        assert [order[place] for place in expected] == list(probes.at(number).ids)
    orders = {tuple(ProbesInTurn(pool, count=3, seed=seed).whole.ids) for seed in range(5)}
    assert len(orders) == 5
    assert list(ProbesInTurn(pool, count=2, seed=5).whole.ids) == list(order)
