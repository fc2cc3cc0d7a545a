"""An adapter says what its backbone computed in, and `predict` and `export` load it so."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
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
        ({"backbone_dtype": "float16"}, "cpu", NEW, "auto"),
        ({"backbone_dtype": "float16", "backbone_quantised": True}, "cpu", NEW, "auto"),
        ({"backbone_dtype": "float16"}, "gpu", {}, "float16"),
        ({"backbone_dtype": "bfloat16"}, "gpu", {}, "auto"),  # a T4
        ({"backbone_dtype": "bfloat16"}, "gpu", NEW, "bfloat16"),
    ],
)
def test_the_backbone_of_an_adapter_has_the_dtype_of_the_training(
    info: dict[str, Any], device: str, capabilities: dict[str, bool], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_backbone", lambda settings: settings)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "gpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capabilities == NEW)
    found: Any = backbone_of(adapter_of(**info), None, "auto" if device == "gpu" else device)
    assert found.dtype == dtype
    given: Any = backbone_of(adapter_of(**info), None, "cpu", "float32")
    assert given.dtype == "float32"


def test_processors_compute_in_halves_only_where_they_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert [computes_in(dtype, "cpu") for dtype in ("float32", "bfloat16", "float16")] == [True, False, False]
    assert computes_in("float16", "cuda:1")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama of width 128 whose weights bfloat16 does not hold, so that codes depend on what it is loaded in."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
        tokens = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, initializer_range=0.05, max_position_embeddings=512))
    folder = tmp_path_factory.mktemp("wide") / "wide-llama"
    model.save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


def save(backbone: Backbone, folder: Path, **more: Any) -> None:
    with fresh_adapter(backbone.model, LoraSettings(rank=2), 0) as adapted:
        weights = adapter_weights(adapted)
    facts = {"fingerprint": backbone.fingerprint, "quantise": backbone.quantise, **more}
    save_adapter(folder, weights, backbone.model, backbone_name=backbone.base_model, dropout=0.0, **facts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_adapter_of_a_quantised_backbone_finds_the_same_codes(
    kind: str, dtype: str, wide: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = BackboneSettings(str(wide), dtype=dtype, device="cpu", quantise=kind)  # type: ignore[arg-type]
    backbone = load_backbone(settings)
    save(backbone, tmp_path / "adapter", dtype=dtype)
    adapter = read_adapter(tmp_path / "adapter")
    loaded = backbone_of(adapter, str(wide), "cpu")  # as predict does
    assert (str(loaded.model.dtype), loaded.fingerprint) == (f"torch.{dtype}", backbone.fingerprint)
    check_fits(adapter, loaded, strict=True)
    export_folder(str(tmp_path / "adapter"), tmp_path / "out", gguf=True, backbone=str(wide))
    assert "could not be checked" not in caplog.text


def test_a_whole_backbone_is_looked_at_in_bfloat16(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For that a backbone of float32 would take twice the memory and show the same."""
    read, real = [], module.load_backbone
    monkeypatch.setattr(module, "load_backbone", lambda settings: read.append(settings.dtype) or real(settings))
    cases: dict[str, tuple[str, str | None, str]] = {
        "whole": ("float32", "float32", "bfloat16"),
        "earlier": ("float32", None, "bfloat16"),
        "half": ("float16", "float16", "float16"),  # which rounds the weights another way
    }
    for name, (loaded, stated, dtype) in cases.items():
        backbone = real(BackboneSettings(str(wide), dtype=loaded, device="cpu"))  # type: ignore[arg-type]
        save(backbone, tmp_path / name, dtype=stated)
        export_folder(str(tmp_path / name), tmp_path / f"{name}-out", gguf=True, backbone=str(wide))
        assert read.pop() == dtype


def test_an_adapter_on_either_is_saved_under_its_own_name(tmp_path: Path, make_tiny_model: Callable[..., Any]) -> None:
    from grasp_lora.engine.session import Session

    model = make_tiny_model("llama")
    for public, back in ((PUBLIC_NAME, "gemma3-270m"), (HUB, HUB)):
        backbone = Backbone(model, build_tiny_tokenizer(), public, module.fingerprint(model), ())
        with fresh_adapter(model, LoraSettings(rank=2), 0) as adapted:
            weights = adapter_weights(adapted)
        recipe = SimpleNamespace(lora=LoraSettings())
        session: Any = SimpleNamespace(backbone=backbone, recipe=recipe, how_to_answer=None)
        folder = tmp_path / back.replace("/", "-")
        Session.save(session, folder, weights)
        found = read_adapter(folder)
        assert (found.base_model, found.backbone, found.info.backbone_dtype) == (HUB, back, "float32")
