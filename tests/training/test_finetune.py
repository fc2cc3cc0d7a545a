"""One fine-tune: the gradient of a step, the schedule, the choice of the best step, and what it leaves behind."""

import math
from contextlib import contextmanager

import pytest
import torch
from random_examples import (
    TARGETS,
    Example,
    Watch,
    assert_step,
    factors,
    make_examples,
    naive_losses,
    random_adapter,
    read_rows,
    values,
)  # fmt: skip
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, TrainerCallback
from transformers.utils import logging as transformers_logging

from grasp_lora.errors import DataError, GraspError
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.models.adapters import attached, fresh_adapter
from grasp_lora.models.live import adapter_weights, live_pairs
from grasp_lora.models.model_settings import LoraSettings
from grasp_lora.training import trainer as finetune_module
from grasp_lora.training.probes import ProbeSet
from grasp_lora.training.pruned import PrunedTraining
from grasp_lora.training.trainer import finetune
from grasp_lora.training.training_settings import TrainingSettings

PAD = 0


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(**{"epochs": 2, "learning_rate": 1e-2, "patience": 99, "batch_size": 2, **changes})


@contextmanager
def adapted(make_tiny_model, architecture: str = "llama", dropout: float = 0.0):
    """A tiny model with a random adapter."""
    backbone = make_tiny_model(architecture)
    with attached(backbone, random_adapter(backbone, architecture), dropout=dropout) as model:
        yield model


@pytest.fixture
def model(make_tiny_model):
    with adapted(make_tiny_model) as peft_model:
        yield peft_model


@pytest.fixture
def run(model, tmp_path):
    """Fine-tune `model` on ten examples."""

    def call(train=None, dev=(), callbacks=(), seed=1, on=None, on_step=None, **changes):
        train = make_examples(10) if train is None else train
        more = {"pad_id": PAD, "seed": seed, "folder": tmp_path, "callbacks": callbacks, "on_step": on_step}
        return finetune(on or model, train, dev, settings(**changes), **more)

    return call


def script_dev_losses(monkeypatch, losses) -> None:
    """Let the dev set measure these losses, one after the other."""
    remaining = iter(losses)
    monkeypatch.setattr(ProbeSet, "losses", lambda self, model: [next(remaining)] * len(self))


def test_clipping_takes_the_norm_of_kept_weights_alone(run):
    watch = Watch()
    run(callbacks=[PrunedTraining(0.8, ProbeSet(make_examples(2))), watch], max_grad_norm=1e-4)
    for gradients in watch.gradients:
        assert math.hypot(*(float(gradient.norm()) for gradient in gradients)) == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_step_follows_the_mean_over_its_examples(
    make_tiny_model, run, monkeypatch, architecture, gradient_checkpointing
):
    # 11 examples, batch 2, accumulation 3: steps of 2 + 2 + 2 and 2 + 2 + 1 examples with answers of 1 to 5 tokens.
    fed = []
    collate = finetune_module.collate
    monkeypatch.setattr(finetune_module, "collate", lambda batch, pad_id: fed.append(batch) or collate(batch, pad_id))
    watch = Watch()
    with adapted(make_tiny_model, architecture) as peft_model:
        for module in peft_model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # GPT-2 has some of its own
        changes = {"epochs": 1, "accumulation": 3, "max_grad_norm": 0.0}
        changes |= {"gradient_checkpointing": gradient_checkpointing, "on": peft_model, "callbacks": [watch]}
        result = run(make_examples(11), **changes)
        assert result.steps == 2
        assert [len(batch) for batch in fed] == [2, 2, 2, 2, 2, 1]
        for step, batches in enumerate((fed[:3], fed[3:])):
            examples = [example for batch in batches for example in batch]
            assert_step(peft_model, vars(watch), step, examples, result.history[step]["loss"])


@pytest.mark.parametrize(
    ("epochs", "accumulation", "expected"),
    [
        (3, 1, [1] * 5 + [0.5] * 5 + [0.25] * 5),
        (3, 2, [1] * 3 + [0.5] * 3 + [0.25] * 3),
        (1.5, 2, [1] * 3 + [0.5] * 2),
        (1.1, 2, [1] * 3 + [0.5]),  # four steps, of which the last belongs to the second epoch
        (0.4, 1, [1, 1]),
    ],
)
def test_the_learning_rate_decays_with_each_epoch(run, epochs, accumulation, expected):
    watch = Watch()
    result = run(epochs=epochs, accumulation=accumulation, lr_decay=0.5, callbacks=[watch])
    assert watch.rates == pytest.approx([1e-2 * factor for factor in expected])
    assert result.steps == len(expected)
    assert result.steps == settings(epochs=epochs, accumulation=accumulation).steps(10)


def test_no_evaluation_falls_right_before_the_end():
    assert settings(evaluate_every=1 / 4).evaluate_steps(250) == 63  # four in 250 steps; of 62 it would be five
    assert settings(evaluate_every=0.07).evaluate_steps(100) == 7  # 0.07 * 100 is above 7 in binary


@pytest.mark.parametrize(("every", "expected"), [(1.0, [0, 5, 7]), (0.4, [0, 2, 4, 6, 7]), (0.01, range(8))])
def test_the_dev_loss_is_measured_when_due_and_at_the_end(run, every, expected):
    result = run(dev=make_examples(3, 1), evaluate_every=every, epochs=1.4)  # 7 steps
    assert [row["step"] for row in result.history if "dev_loss" in row] == list(expected)


@pytest.mark.parametrize(
    ("scripted", "patience", "steps", "best_step"),
    [
        ([3.0, 2.0, 1.0, 1.5, 1.6, 0.1, 0.1], 2, 20, 10),  # stops before it could see 0.1
        ([3.0, 2.0, 1.0, 1.5, 0.9, 1.6, 1.6], 2, 30, 20),  # a new best starts the count anew
        ([3.0, 2.0, 1.0, 1.5, 1.6, 0.1, 0.2], 99, 30, 25),
        ([1.0, 2.0, 0.5, 0.4, 0.3, 0.2, 0.1], 1, 5, 0),  # the untrained adapter is a candidate
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3, 15, 0),  # no better is no better
    ],
)
def test_training_stops_early_and_the_best_adapter_is_kept(
    run, model, monkeypatch, scripted, patience, steps, best_step
):
    untrained = values(model)
    script_dev_losses(monkeypatch, scripted)
    watch = Watch()
    result = run(dev=make_examples(2, 1), epochs=6, patience=patience, callbacks=[watch])
    assert (result.steps, result.best_step) == (steps, best_step)
    assert result.dev_loss == min(scripted[: steps // 5 + 1])
    assert torch.equal(values(model), watch.after[best_step] if best_step else untrained)


@pytest.mark.parametrize(("dev", "patience"), [(2, None), (0, 1)])
def test_without_patience_or_a_dev_set_nobody_looks_and_the_last_adapter_is_kept(
    run, model, monkeypatch, dev, patience
):
    script_dev_losses(monkeypatch, [])
    watch = Watch()
    result = run(dev=make_examples(dev, 1), callbacks=[watch], patience=patience)
    assert (result.steps, result.best_step, result.dev_loss) == (10, 10, None)
    assert not any("dev_loss" in row for row in result.history)
    assert torch.equal(values(model), watch.after[10])


@pytest.mark.parametrize("architecture", TARGETS)
def test_the_model_has_the_dev_loss_of_the_result(make_tiny_model, run, architecture):
    dev = make_examples(4, 1)
    with adapted(make_tiny_model, architecture, dropout=0.1) as peft_model:
        result = run(dev=dev, on=peft_model, epochs=3, learning_rate=3e-2)
        losses = ProbeSet(dev).losses(peft_model)
        with torch.no_grad():
            naive = naive_losses(peft_model, dev).mean().item()
    assert result.dev_loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert result.dev_loss == pytest.approx(naive, abs=1e-5)


def test_history_is_written_and_nothing_else(run, tmp_path):
    seen = []
    result = run(dev=make_examples(3, 1), on_step=seen.append)
    assert [file.name for file in tmp_path.rglob("*")] == ["history.jsonl"]
    rows = read_rows(tmp_path / "history.jsonl")
    assert rows == result.history
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert all(set(row) in ({"step", "epoch", "loss"}, {"step", "epoch", "dev_loss"}) for row in rows)
    assert [row["epoch"] for row in rows if "dev_loss" in row] == [0.0, 1.0, 2.0]
    assert sum("loss" in row for row in rows) == 10
    # Progress is reported, too.
    assert [row["step"] for row in seen] == list(range(1, 11))
    assert {row["steps"] for row in seen} == {10}
    assert all(math.isfinite(row["loss"]) for row in seen)


def test_the_seed_decides_and_nothing_else(make_tiny_model, run):
    found = {}
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        torch.manual_seed(len(found))  # what was drawn before does not matter
        with adapted(make_tiny_model, dropout=0.3) as peft_model:
            run(dev=make_examples(3, 1), seed=seed, on=peft_model)
            found[name] = values(peft_model)
    assert torch.equal(found["one"], found["same"])
    assert not torch.equal(found["one"], found["other"])


def test_measuring_the_dev_loss_does_not_change_the_training(make_tiny_model, run):
    found = []
    for dev in ([], make_examples(3, 1)):
        with adapted(make_tiny_model, dropout=0.3) as peft_model:
            watch = Watch()
            run(dev=dev, evaluate_every=0.2, on=peft_model, callbacks=[watch])
            found.append(watch.after[10])
    assert torch.equal(*found)


def test_a_loss_that_explodes_is_an_error_at_once(run):
    watch = Watch()
    with pytest.raises(GraspError, match=r"training loss is (nan|inf) at step \d+; lower the learning rate \(now 1e\+"):
        run(learning_rate=1e25, epochs=50, callbacks=[watch])
    assert len(watch.after) < 10


def test_a_last_step_that_explodes_is_an_error_too(run, tmp_path):
    class Explode(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            factors(kwargs["model"])[0].data[0, 0] = math.inf  # no forward pass follows that would show it

    with pytest.raises(GraspError, match="no longer finite at step 1; lower the learning rate"):
        run(train=make_examples(2), epochs=1, callbacks=[Explode()])
    assert not (tmp_path / "history.jsonl").exists()


def test_examples_without_a_loss_are_refused_before_training(run):
    with pytest.raises(DataError, match="there are none"):
        run(train=[])
    with pytest.raises(DataError, match="but empty lack one"):
        run(train=[*make_examples(3), Example("empty", (4, 5), ())])


@pytest.mark.parametrize("fails", [False, True])
def test_the_backbone_is_left_as_it_was(make_tiny_model, run, fails):
    backbone = make_tiny_model("gpt2")  # with dropout of its own
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    facts, use_cache = set(vars(backbone)), backbone.config.use_cache
    verbosity = transformers_logging.get_verbosity()

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if fails and state.global_step == 3:
                raise RuntimeError("on purpose")

    with attached(backbone, random_adapter(backbone, "gpt2"), dropout=0.3) as peft_model:
        try:
            run(on=peft_model, callbacks=[Fail()], gradient_checkpointing=True)
        except RuntimeError:
            assert fails
        assert not any(module.training for module in backbone.modules())
        assert not backbone.is_activation_checkpointing
    assert use_cache
    assert backbone.config.use_cache
    assert transformers_logging.get_verbosity() == verbosity
    assert set(vars(backbone)) - facts <= {"_require_grads_hooks"}
    assert not any(module._forward_hooks for module in backbone.modules())
    after = backbone.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_a_model_with_an_image_encoder_trains_its_text_part(run):
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    vision = {**text, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16, "vision_use_head": False}
    text |= {"num_key_value_heads": 2, "vocab_size": 260, "query_pre_attn_scalar": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=False)
    backbone = Gemma3ForConditionalGeneration(config).eval()
    assert any("q_proj" in name for name, _ in backbone.model.vision_tower.named_modules())

    with fresh_adapter(backbone, LoraSettings(rank=2, target_modules=("q_proj", "lm_head")), 1) as model:
        named = {name.rsplit(".", 1)[-1] for name in live_pairs(model)}
        assert named == {"q_proj", "lm_head"}  # the output layer stands beside the text part
        assert not any("vision" in name for name in live_pairs(model))
    with fresh_adapter(backbone, LoraSettings(rank=2), 1) as model:
        assert all("language_model" in name for name in live_pairs(model))
        result = run(dev=make_examples(3, 1), on=model)
        weights = adapter_weights(model)
    with attached(backbone, weights) as model:
        assert set(live_pairs(model)) == set(weights)

    assert result.steps == 10
    assert not hasattr(backbone.config, "use_cache")


def cut(module: torch.nn.Module) -> None:
    """Let gradients end here, as quantised layers do whose kernel has no backward."""
    module.register_forward_hook(lambda *arguments: arguments[-1].detach() + 0.0 * arguments[-1])


def test_a_training_without_any_gradient_ends_before_its_first_step(model, run):
    before = values(model)
    cut(model.get_base_model().model.norm)
    with pytest.raises(GraspError, match=r"gradient checkpointing.*enable_input_require_grads.*quantised"):
        run()
    assert torch.equal(values(model), before)


def test_one_module_with_a_gradient_is_enough_and_an_adapter_of_zeros_has_none_to_have(make_tiny_model, run):
    with fresh_adapter(make_tiny_model("llama"), LoraSettings(rank=2), 1) as model:
        cut(model.get_base_model().model.layers[0])
        assert run(on=model).steps == 10  # only its B have gradients, since they are zero
    weights = {f"model.layers.{n}.self_attn.q_proj": LoraPair(torch.zeros(2, 32), torch.zeros(32, 2)) for n in (0, 1)}
    with attached(make_tiny_model("llama"), AdapterWeights(weights)) as model:
        assert run(on=model).steps == 10


def test_a_bfloat16_backbone_trains_a_float32_adapter(make_tiny_model, run):
    backbone = make_tiny_model("gemma3").to(torch.bfloat16)
    with attached(backbone, random_adapter(make_tiny_model("gemma3"), "gemma3")) as peft_model:
        before, watch = values(peft_model), Watch()
        result = run(dev=make_examples(3, 1), on=peft_model, learning_rate=1e-4, callbacks=[watch])
        assert watch.after[10].dtype == torch.float32
        assert not torch.equal(watch.after[10], before)
    assert math.isfinite(result.dev_loss)
