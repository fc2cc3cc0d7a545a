"""An adapter says what its backbone computed in, and `predict` and `export` load it so."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build_tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.models import backbone as module
from grasp_lora.models.adapter_files import AdapterInfo, LoadedAdapter, read_adapter
from grasp_lora.models.adapters import check_fits, fresh_adapter, save_adapter
from grasp_lora.models.backbone import Backbone, backbone_of, computes_in, load_backbone
from grasp_lora.models.embedded import PUBLIC_NAME
from grasp_lora.models.export import export_folder
from grasp_lora.models.live import adapter_weights
from grasp_lora.models.model_settings import QUANTISERS, BackboneSettings, LoraSettings

KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"no {library}"))
    for kind, library in QUANTISERS.items()
]
HUB = "google/gemma-3-270m"
NEW = {"avx512_bf16": True}


def adapter_of(**info: Any) -> LoadedAdapter:
    pairs = {"m": LoraPair(torch.ones(1, 2), torch.ones(2, 1))}
    return LoadedAdapter(AdapterWeights(pairs), "mine", "lab/x", "", AdapterInfo(**info))


@pytest.mark.parametrize(
    ("info", "device", "capabilities", "dtype"),
    [
        ({}, "auto", NEW, "auto"),
        ({"backbone_dtype": "float32"}, "auto", {"amx_bf16": True}, "float32"),
        ({"backbone_dtype": "bfloat16"}, "cpu", NEW, "bfloat16"),
        ({"backbone_dtype": "bfloat16"}, "cpu", {"avx2": True}, "auto"),  # eight times slower than float32
        ({"backbone_dtype": "bfloat16", "backbone_quantised": True}, "cpu", {}, "bfloat16"),  # codes depend on it
        ({"backbone_dtype": "float16", "backbone_quantised": True}, "cpu", NEW, "auto"),
        ({"backbone_dtype": "float16"}, "gpu", {}, "float16"),
        ({"backbone_dtype": "bfloat16"}, "gpu", {}, "auto"),  # a T4
        ({"backbone_dtype": "bfloat16"}, "gpu", NEW, "bfloat16"),
    ],
)
def test_the_backbone_of_an_adapter_has_the_dtype_of_the_training(info, device, capabilities, dtype, monkeypatch):
    monkeypatch.setattr(module, "load_backbone", lambda settings: settings)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "gpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capabilities == NEW)
    found: Any = backbone_of(adapter_of(**info), None, "auto" if device == "gpu" else device)
    assert found.dtype == dtype
    given: Any = backbone_of(adapter_of(**info), None, "cpu", "float32")
    assert given.dtype == "float32"


def test_processors_compute_in_halves_only_where_they_say_so(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert [computes_in(dtype, "cpu") for dtype in ("float32", "bfloat16", "float16")] == [True, False, False]
    assert computes_in("float16", "cuda:1")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_adapter_of_a_quantised_backbone_finds_the_same_codes(kind, dtype, tmp_path, caplog):
    # A Llama of width 128 whose weights bfloat16 does not hold, so that codes depend on what it is loaded in.
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    tokens = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    wide = str(tmp_path / "wide-llama")
    LlamaForCausalLM(LlamaConfig(**sizes, **tokens, initializer_range=0.05)).save_pretrained(wide)
    build_tiny_tokenizer().save_pretrained(wide)
    backbone = load_backbone(BackboneSettings(wide, dtype=dtype, device="cpu", quantise=kind))
    with fresh_adapter(backbone.model, LoraSettings(rank=2), 0) as adapted:
        weights = adapter_weights(adapted)
    facts = {"fingerprint": backbone.fingerprint, "quantise": backbone.quantise, "dtype": dtype, "dropout": 0.0}
    save_adapter(tmp_path / "adapter", weights, backbone.model, backbone_name=backbone.base_model, **facts)
    adapter = read_adapter(tmp_path / "adapter")
    loaded = backbone_of(adapter, wide, "cpu")  # as predict does
    assert (str(loaded.model.dtype), loaded.fingerprint) == (f"torch.{dtype}", backbone.fingerprint)
    check_fits(adapter, loaded, strict=True)
    export_folder(str(tmp_path / "adapter"), tmp_path / "out", gguf=True, backbone=wide)
    assert "could not be checked" not in caplog.text


def test_an_adapter_on_either_is_saved_under_its_own_name(tmp_path, make_tiny_model):
    from grasp_lora.engine.session import Session

    model = make_tiny_model("llama")
    with fresh_adapter(model, LoraSettings(rank=2), 0) as adapted:
        weights = adapter_weights(adapted)
    for public, back in ((PUBLIC_NAME, "gemma3-270m"), (HUB, HUB)):
        backbone = Backbone(model, build_tiny_tokenizer(), public, module.fingerprint(model), ())
        recipe = SimpleNamespace(lora=LoraSettings())
        session: Any = SimpleNamespace(backbone=backbone, recipe=recipe, how_to_answer=None)
        Session.save(session, tmp_path / back, weights)
        found = read_adapter(tmp_path / back)
        assert (found.base_model, found.backbone, found.info.backbone_dtype) == (HUB, back, "float32")
