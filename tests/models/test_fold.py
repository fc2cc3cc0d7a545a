"""Folding an adapter in: each sum is rounded once, and weights that other modules share stay theirs."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.models.adapters import attached
from grasp_lora.models.fold import fold

IDS = torch.arange(4, 24)[None]
TARGETS = {
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
    "gemma3": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"),
}


def random_adapter(model: PreTrainedModel, modules: tuple[str, ...], scaling: float = 2.0) -> AdapterWeights:
    generator = torch.Generator().manual_seed(5)
    pairs = {}
    for name in modules:
        weight = model.get_submodule(name).weight
        d_out, d_in = weight.shape if "transformer.h" not in name else weight.shape[::-1]
        A, B = torch.randn(3, d_in, generator=generator), torch.randn(d_out, 3, generator=generator)
        pairs[name] = LoraPair(0.1 * A, 0.1 * B, scaling)
    return AdapterWeights(pairs)


@pytest.mark.parametrize("architecture", TARGETS)
def test_the_folded_model_is_the_adapted_one(
    architecture: str, make_tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = make_tiny_model(architecture)
    weights = random_adapter(model, TARGETS[architecture])
    alone = model(IDS).logits
    with attached(model, weights) as adapted:
        expected = adapted(IDS).logits
    assert fold(model, weights, torch.float32).of_weights < 1e-7
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, alone, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight_is_rounded_once_and_the_error_is_the_measured_one(
    dtype: torch.dtype, make_tiny_model: Callable[..., PreTrainedModel]
) -> None:
    before, model = make_tiny_model("llama"), make_tiny_model("llama")
    weights = random_adapter(model, TARGETS["llama"])
    error = fold(model, weights, dtype)
    exact, found, deltas = [], [], []
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        original, module = before.get_parameter(name).detach().double(), name.removesuffix(".weight")
        if module in weights:
            pair = weights[module]
            deltas.append(pair.scaling * (pair.B.double() @ pair.A.double()).flatten())
            original = original + deltas[-1].view_as(original)
            exact.append(original.flatten())
            found.append(parameter.detach().double().flatten())
        assert torch.equal(parameter, original.to(dtype))
    rounding = (torch.cat(found) - torch.cat(exact)).norm()
    assert error.of_weights == pytest.approx(float(rounding / torch.cat(exact).norm()), rel=1e-9)
    assert error.of_delta == pytest.approx(float(rounding / torch.cat(deltas).norm()), rel=1e-9)
    assert 1e-5 < error.of_weights < 4e-3


def test_an_adapter_that_changes_nothing_costs_nothing(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model("llama")
    error = fold(model, random_adapter(model, TARGETS["llama"], scaling=0.0), torch.float32)
    assert (error.of_weights, error.of_delta) == (0.0, 0.0)


def test_tied_embeddings_stay_tied_where_no_target(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model("gemma3")
    fold(model, random_adapter(model, TARGETS["gemma3"]), torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")  # PEFT, on what this test is about
def test_a_tied_output_layer_that_is_a_target_leaves_the_embedding_alone(
    make_tiny_model: Callable[..., PreTrainedModel],
) -> None:
    model = make_tiny_model("gemma3")
    embedding = model.model.embed_tokens.weight.clone()
    weights = random_adapter(model, ("lm_head",))
    with attached(model, weights) as adapted:
        expected = adapted(IDS).logits
    fold(model, weights, torch.float32)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_weight_shared_in_another_way_is_refused(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model("llama")
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    with pytest.raises(
        AdapterError, match=r"layers\.1\.mlp\.down_proj shares its weight with model\.layers\.0\.mlp\.down"
    ):
        fold(model, random_adapter(model, ("model.layers.1.mlp.down_proj",)), torch.float32)


def test_a_quantised_backbone_is_refused(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(AdapterError, match=r"the backbone is quantised.*full-precision"):
        fold(model, random_adapter(model, TARGETS["llama"]), torch.float32)


def test_a_weight_too_large_for_the_dtype_is_named(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model("llama")
    model.model.norm.weight.data[0] = 1e6
    with pytest.raises(AdapterError, match=r"model\.norm\.weight holds a value of size 1e\+06, but float16 ends at"):
        fold(model, random_adapter(model, TARGETS["llama"]), torch.float16)
