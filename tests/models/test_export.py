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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from grasp_lora.errors import AdapterError, GraspError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.models.adapter_files import OUR_FILE, WEIGHTS_FILE, read_adapter
from grasp_lora.models.adapters import save_adapter
from grasp_lora.models.export import export_folder

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
def test_the_model_folder_answers_as_the_adapter_does(
    architecture: str, dtype: str, save_backbone: Callable[[str], PreTrainedModel]
) -> None:
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
def test_an_adapter_on_the_output_layer_leaves_the_embedding_alone(
    architecture: str, save_backbone: Callable[[str], PreTrainedModel]
) -> None:
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
        (["--fold"], r"the --dtype: float32, float16, bfloat16; it is None"),
        (["--gguf", "--dtype", "int8"], r"the --dtype: .*; it is 'int8'"),
        (["--fold", "--dtype", "float32", "--backbone", "other"], r"use an adapter of this backbone"),
        (["--fold", "--dtype", "float16", "--backbone", "huge"], r"model\.norm\.weight .*too large for float16; use bfloat16"),
        (["--fold", "--dtype", "float32", "-o", "adapter"], r"adapter exists and is not an empty folder; choose another"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str],
    message: str,
    cli: Callable[..., Any],
    tmp_path: Path,
    llama: PreTrainedModel,
    make_tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
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


def test_a_disk_that_fails_half_way(llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    write_adapter(llama)
    monkeypatch.setattr("grasp_lora.models.export._write_model", fail)
    before = contents(tmp_path)
    with pytest.raises(GraspError, match=r"cannot be written \(.*No space left on device\); make room"):
        fold("out")
    assert contents(tmp_path) == before


def test_an_adapter_of_other_weights_is_refused(llama: PreTrainedModel) -> None:
    write_adapter(llama)
    info = json.loads(Path("adapter", OUR_FILE).read_text())
    Path("adapter", OUR_FILE).write_text(json.dumps(info | {"backbone_fingerprint": "0123456789abcdef"}))
    with pytest.raises(AdapterError, match=r"fingerprint 0123456789abcdef.*use the backbone it was trained on"):
        fold("out")


def test_an_adapter_of_a_quantised_backbone_is_folded_into_the_full_one(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
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


def test_the_command_fills_an_empty_folder(llama: PreTrainedModel, cli: Callable[..., Any]) -> None:
    write_adapter(llama)
    Path("out").mkdir()
    result = cli("export", "adapter", "-o", "out", "--fold", "--dtype", "bfloat16")
    assert result.status == 0, result.err
    assert result.out.startswith("model: adapter folded into 4 modules of backbone, bfloat16, 0.0")
    assert result.out.endswith("-> out\n")
