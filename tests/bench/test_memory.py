"""What a run needs of memory, estimated: against what tensors really take, and what it says of cards."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, RwkvConfig

from grasp_lora.bench import preflight as module
from grasp_lora.bench.memory import (
    GIGABYTE,
    KEPT_BY_WIDTH,
    Stage,
    by_setting,
    shape_of,
    sizes_of,
    smallest_card,
    stages_of,
)
from grasp_lora.bench.session import Session
from grasp_lora.models.adapters import fresh_adapter
from grasp_lora.models.backbone import skeleton
from grasp_lora.models.settings import BackboneSettings, LoraSettings
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage import memory
from grasp_lora.training.loss import example_losses

LORA = LoraSettings(rank=4)
TRAINING = Stage("target", 256, 8, 4)


def empty(model: Any) -> Any:
    """The model without its weights."""
    with torch.device("meta"):
        return type(model)(model.config).requires_grad_(False)


def kept_by(model: Any, tokens: int) -> int:
    """Bytes that a backward pass on the processor really keeps beside the weights."""
    kept: dict[int, torch.Tensor] = {}
    with fresh_adapter(model, replace(LORA, rank=1), 0) as adapted:
        own = {parameter.untyped_storage().data_ptr() for parameter in adapted.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            is_mask = tensor.dim() > 2 and tensor.shape[-1] == tensor.shape[-2] == tokens  # small beside a real model
            if tensor.untyped_storage().data_ptr() not in own and not is_mask:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        adapted.train()
        labels = torch.full((1, tokens), -100)
        labels[0, -1] = 5
        batch = {"input_ids": torch.full((1, tokens), 7), "attention_mask": torch.ones(1, tokens), "labels": labels}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            example_losses(adapted, batch, label_positions=True).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize(("number", "dtype"), [(4, torch.float32), (2, torch.bfloat16)])
def test_what_is_kept_is_counted_without_computing(
    architecture: str, number: int, dtype: torch.dtype, make_tiny_model: Callable[..., Any]
) -> None:
    model, tokens = make_tiny_model(architecture), 256
    shape = shape_of(empty(model), LORA, tokens)
    real = kept_by(model.to(dtype), tokens)
    assert shape.kept[number] * tokens == pytest.approx(real, rel=0.15)


def test_experts_are_estimated_by_width(make_tiny_model: Callable[..., Any]) -> None:
    shape = shape_of(empty(make_tiny_model("qwen3_moe")), LORA, 16)
    assert shape.kept[2] >= KEPT_BY_WIDTH[2] * shape.layers * shape.width * 0.5


def test_keys_and_values_are_those_of_layers_that_have_them() -> None:
    tokens = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for config in (RwkvConfig, MambaConfig):
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config(**tokens, hidden_size=32, num_hidden_layers=2))
        assert sizes_of(model).cached == 0
    if not hasattr(transformers, "Gemma4TextConfig"):
        return
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    inputs = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 260, "num_kv_shared_layers": 0}
    unequal = transformers.Gemma4TextConfig(
        **sizes, **inputs, **tokens, num_key_value_heads=2, head_dim=8, global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(unequal)
    assert sizes_of(model).cached == 2 * 2 * (8 + 16)


@pytest.fixture(scope="module")
def llama_8b() -> Any:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return shape_of(model.requires_grad_(False), LoraSettings(), 512)


def test_a_large_model_is_estimated_without_its_weights(llama_8b: Any) -> None:
    assert llama_8b.linear + llama_8b.others == 8_030_261_248
    assert llama_8b.weights(2, None) == 2 * 8_030_261_248
    assert 5.5 * GIGABYTE < llama_8b.weights(2, "nf4") < 6.5 * GIGABYTE
    assert llama_8b.adapter * 16 == 6_815_744  # as PEFT counts q_proj and v_proj at rank 16
    assert llama_8b.cached == 2 * 32 * 8 * 128


def test_each_setting_takes_less_than_the_one_before(llama_8b: Any) -> None:
    needs = by_setting(llama_8b, [replace(TRAINING, tokens=512)])
    assert list(needs) == [
        name + words
        for name in ("float32", "bfloat16", "int8", "nf4")
        for words in ("", " with gradient_checkpointing")
    ]
    plain = [needs[name] for name in ("float32", "bfloat16", "int8", "nf4")]
    assert plain == sorted(plain, reverse=True)
    assert all(needs[f"{name} with gradient_checkpointing"] < needs[name] for name in ("float32", "nf4"))
    assert [smallest_card(need) for need in plain] == [40, 24, 16, 16]
    assert smallest_card(80.1 * GIGABYTE) is None


def test_twice_the_tokens_keep_twice_as_much_and_int8_keeps_inputs(llama_8b: Any) -> None:
    one, two = (llama_8b.need(replace(TRAINING, tokens=tokens), 2) for tokens in (256, 512))
    assert two.activations == 2 * one.activations
    assert (two.weights, two.logits, two.adapter) == (one.weights, one.logits, one.adapter)
    int8, torchao = (llama_8b.need(TRAINING, 2, kind) for kind in ("int8", "int8_torchao"))
    assert int8.weights == torchao.weights
    assert int8.activations > torchao.activations
    answers = llama_8b.need(Stage("answers", 8192, 16, 4, learns=False), 2)
    assert answers.activations == 8192 * llama_8b.cached * 2
    assert answers.adapter == 0


def test_a_run_has_the_stages_that_it_trains(tiny_workspace: Path) -> None:
    def stages(*changes: str) -> dict[str, Stage]:
        session = Session(*load_recipe("tiny.yaml", changes))
        return {one.name: one for one in stages_of(session.recipe, session.splits, session.parent_ranks)}

    found = stages()
    assert list(found) == ["source", "target", "controller", "final", "answers"]
    assert [one.rank for one in found.values()] == [2, 2, 4, 4, 4]
    assert stages("final.training.batch_size=3")["final"].tokens == 3 * found["final"].tokens
    assert stages("merge.rule=svd")["final"].rank == 2
    assert "controller" not in stages("final.prune_ratio=0.3")
    assert stages("final.training.gradient_checkpointing=true")["final"].checkpointing


def test_check_estimates_each_stage_and_says_which_card_holds_it(tiny_workspace: Path, cli: Callable[..., Any]) -> None:
    result = cli("check", "tiny.yaml")
    assert result.status == 0, result.err
    memory = next(line for line in result.out.splitlines() if " memory " in line)
    cards = next(line for line in result.out.splitlines() if " cards " in line)
    assert "estimates in GB" in memory
    for stage in ("source", "target", "controller", "final", "answers"):
        assert f"{stage} 1.0 (activations 0.00, logits 0.00, adapter 0.00)" in memory
    for part in ("weights", "activations", "logits", "adapter"):
        assert part in memory
    assert "estimates in GB, in brackets the smallest of cards of 8, 16, 24, 40, 80 that holds it" in cards
    assert "nf4 with gradient_checkpointing 1.0 (8)" in cards


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(
    tiny_workspace: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda on_gpu: 1000)
    monkeypatch.setattr("grasp_lora.bench.session.load_backbone", lambda settings: pytest.fail("it was loaded"))
    for dtype in ("float32", "bfloat16", "float16"):
        refused("check", ["--set", f"backbone.dtype={dtype}"], f"GB ({dtype}), and 0.00 GB are free here; quantised")


def test_a_stage_that_does_not_fit_is_a_warning(
    tiny_workspace: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = iter([10**12, 1000])  # for the weights first
    monkeypatch.setattr(module, "available_memory", lambda on_gpu: next(few))
    result = cli("check", "tiny.yaml")
    assert result.status == 0
    assert re.search(
        r"warning memory +\w+ needs about \S+ GB more than the weights, and 0\.00 GB are free here", result.out
    )


def test_copies_that_train_side_by_side_need_their_memory_each(tiny_workspace: Path) -> None:
    found = {}
    for preset in ("spread", "stacked"):
        recipe, base = load_recipe("tiny.yaml", [f"controller={{preset: {preset}}}"])
        stages = stages_of(recipe, Session(recipe, base).splits, [2, 2])
        found[preset] = {one.name: one for one in stages}
    copies = recipe.controller.policy.copies
    assert copies > 1
    one, many = (found[preset]["controller"] for preset in ("spread", "stacked"))
    assert (many.tokens, many.labels, many.rank) == (copies * one.tokens, copies * one.labels, copies * one.rank)
    assert found["spread"]["final"] == found["stacked"]["final"]


def test_a_limit_of_the_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    for name, said in (("memory.current", "4000\n"), ("memory.stat", "anon 1000\nfile 3000\n")):
        (tmp_path / name).write_text(said)
    for said, free in (("5000\n", 4000), ("500\n", 0), ("max\n", None)):
        (tmp_path / "memory.max").write_text(said)
        found = memory.available_memory(False)
        assert found == free if free is not None else found > 10**6


def test_given_adapters_are_counted_on_their_own_modules(finished_run: Path, cli: Callable[..., Any]) -> None:
    (finished_run / "source").rename("mine")
    (finished_run / "target").rename("theirs")
    given = ["data.source=null", "source.adapters=[mine]", "target.adapter=theirs", "lora.target_modules=[not_there]"]
    result = cli("check", "tiny.yaml", *(part for one in given for part in ("--set", one)))
    assert result.status == 0, result.err


def test_a_skeleton_is_the_model_without_weights(tiny_backbone_folder: Path, make_tiny_model: Callable) -> None:
    found = skeleton(BackboneSettings(str(tiny_backbone_folder)))
    assert found.device.type == "meta"
    shapes = {name: list(one.shape) for name, one in make_tiny_model("llama").named_parameters()}
    assert {name: list(one.shape) for name, one in found.named_parameters()} == shapes
