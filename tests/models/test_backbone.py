"""Loading backbones, recognising them, and the one-line errors of everything that can go wrong."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from grasp_lora.errors import GraspError
from grasp_lora.models import backbone as backbones
from grasp_lora.models.adapters import fresh_adapter
from grasp_lora.models.backbone import (
    fact_of,
    find_dtype,
    fingerprint,
    load_backbone,
    supports_logits_to_keep,
    weight_sum,
)
from grasp_lora.models.model_settings import BackboneSettings, LoraSettings

ARCHITECTURES = ["llama", "gemma3", "qwen3", "gpt2"]


@pytest.fixture
def folder(tiny_backbone_folder, tmp_path) -> Path:
    """A copy of the tiny backbone that a test may damage."""
    return Path(shutil.copytree(tiny_backbone_folder, tmp_path / "copy"))


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def load(name, **settings):
    return load_backbone(BackboneSettings(name=str(name), **{"device": "cpu", **settings}))


def test_a_local_folder_loads_frozen_in_eval_mode(tiny_backbone_folder):
    backbone = load(tiny_backbone_folder)
    narrow = load(tiny_backbone_folder, dtype="bfloat16")
    assert (narrow.model.dtype, narrow.fingerprint) == (torch.bfloat16, backbone.fingerprint)
    assert backbone.name == tiny_backbone_folder.name
    assert str(backbone.model.dtype) == f"torch.{find_dtype('cpu')}"
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert backbone.stop_ids == (2,)
    assert backbone.fingerprint == fingerprint(backbone.model)
    text = "سؤال: 你好 question"
    assert backbone.tokenizer.decode(backbone.tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(("device", "device_map"), [("cpu", None), ("cuda:1", {"": "cuda:1"})])
def test_weights_go_to_a_gpu_without_a_stay_on_the_processor(tiny_backbone_folder, monkeypatch, device, device_map):
    asked = []
    whole = AutoModelForCausalLM.from_pretrained

    def from_pretrained(place, **given):
        asked.append(given["device_map"])
        return whole(place, **given | {"device_map": None})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(backbones, "_device_for", lambda settings: device)
    monkeypatch.setattr(LlamaForCausalLM, "to", lambda model, where: model)
    load(tiny_backbone_folder, dtype="float32")
    assert asked == [device_map]


@pytest.mark.parametrize(
    ("maker", "capabilities", "dtype"),
    [
        ("AuthenticAMD", {"avx2": True, "avx512_f": True}, "float32"),
        ("AuthenticAMD", {"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ("GenuineIntel", {"avx512_bf16": True, "amx_bf16": False, "amx_tile": True}, "float32"),  # slower in bfloat16
        ("", {"bf16": True, "sve_bf16": True}, "float32"),  # Arm's
        ("GenuineIntel", {"avx512_bf16": True, "amx_bf16": True}, "bfloat16"),
    ],
)
def test_of_processors_auto_takes_bfloat16_where_it_is_faster(monkeypatch, maker, capabilities, dtype):
    monkeypatch.setattr(backbones, "_processor", lambda: f"vendor_id : {maker}")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: pytest.fail("the processor was asked for"))
    assert find_dtype("cpu") == dtype


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float16")])
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_of_cards_auto_takes_bfloat16_on_those_that_do_not_emulate_it(monkeypatch, device, native, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": not native}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert find_dtype(device) == find_dtype(device, "llama") == dtype
    # Hidden states of Gemma 3 270M reach 1e5, which float16 cannot hold.
    assert find_dtype(device, "gemma3_text") == ("bfloat16" if native else "float32")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fingerprint_sees_the_backbone_and_not_the_adapter(architecture, make_tiny_model):
    plain = fingerprint(make_tiny_model(architecture))
    assert fingerprint(make_tiny_model(architecture)) == plain
    assert fingerprint(make_tiny_model(architecture, seed=1)) != plain
    assert fingerprint(make_tiny_model(architecture, vocab_size=300)) != plain
    retrained = make_tiny_model(architecture)
    next(weight for name, weight in retrained.named_parameters() if ".1.mlp." in name).data.mul_(1.05)
    assert fingerprint(retrained) != plain
    turned = architecture == "gpt2"
    targets = ["c_attn", "c_proj"] if turned else ["q_proj", "down_proj"]
    model = make_tiny_model(architecture)
    saved = None if model.config.tie_word_embeddings else ["lm_head"]  # PEFT warns of trained copies of tied weights
    config = {"target_modules": targets, "task_type": "CAUSAL_LM", "fan_in_fan_out": turned}
    wrapped = get_peft_model(model, LoraConfig(r=2, modules_to_save=saved, **config))
    wrapped.add_adapter("second", LoraConfig(r=3, **config))
    assert fingerprint(wrapped) == plain


def test_the_sum_of_weights_sees_each_of_them_and_no_adapter(make_tiny_model, monkeypatch):
    model = make_tiny_model("llama")
    before = weight_sum(model)
    expected = sum(int(one.view(torch.int32).long().sum()) for one in model.parameters())
    monkeypatch.setattr("grasp_lora.models.backbone.AT_ONCE", 7)
    assert before == weight_sum(model) == expected
    with fresh_adapter(model, LoraSettings(rank=2), 0) as adapted:
        assert weight_sum(adapted) == before
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 1] += 1e-3
    assert weight_sum(model) != before
    assert weight_sum(model.to(torch.bfloat16)) is not None


def test_forwards_from_elsewhere_and_spread_models_get_no_mask_of_positions(make_tiny_model):
    spread = make_tiny_model("llama")
    spread.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": 1}
    assert not supports_logits_to_keep(spread)
    spread.hf_device_map = {"": 0}
    assert supports_logits_to_keep(spread)

    class Foreign(LlamaForCausalLM):  # such as that of Liger's kernels, which takes positions only
        def forward(self, input_ids, logits_to_keep=0, **kwargs):
            raise NotImplementedError

    assert not supports_logits_to_keep(Foreign(make_tiny_model("llama").config))


@pytest.mark.parametrize("pad", [None, "[PAD]"])
def test_a_pad_token_that_is_missing_or_has_no_row_in_the_embedding_becomes_eos(folder, pad):
    tokenizer = load(folder).tokenizer
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
        tokenizer.save_pretrained(folder)
    else:
        edit_json(folder / "tokenizer_config.json", pad_token=None)
    backbone = load(folder)
    assert not pad or len(tokenizer) > backbone.model.get_input_embeddings().num_embeddings
    assert backbone.tokenizer.pad_token_id == backbone.tokenizer.eos_token_id == 2


def test_a_place_where_nothing_is_or_no_tokenizer(folder, tmp_path):
    with pytest.raises(GraspError, match=r"there is no such folder, and it is no hub id either; check the path"):
        load(tmp_path / "nothing")
    with pytest.raises(GraspError, match=r"there is no such folder, and the hub gave: "):
        load("nobody/no-such-model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(GraspError, match=r"Cannot load backbone.*tokenizer") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_layers_of_unequal_heads_are_told_by_all_of_them(tmp_path, tiny_tokenizer):
    """As in Gemma 4, whose config gives no size of a head that holds for all layers."""
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this transformers has no Gemma4")
    found = set()
    for heads in (2, 4):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": heads}
        inputs = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 260, "num_kv_shared_layers": 0}
        config = transformers.Gemma4TextConfig(
            **sizes, **inputs, num_key_value_heads=heads, head_dim=32 // heads, global_head_dim=16, vocab_size=260,
            layer_types=["sliding_attention", "full_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(heads))
        tiny_tokenizer.save_pretrained(tmp_path / str(heads))
        found.add(load(tmp_path / str(heads), dtype="float32").fingerprint)
        assert load(tmp_path / str(heads), dtype="bfloat16").fingerprint in found
        expected = 16 if heads == 2 else [8, 16]
        assert [fact_of(config, name) for name in ("head_dim", "hidden_size", "none")] == [expected, 32, None]
    assert len(found) == 2


HUB = "PretrainedConfig.get_config_dict"


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        (
            HUB,
            OSError("couldn't connect to 'https://hub'.\nCheck."),
            r"the hub gave: .* 'https://hub'\.?; check the name",
        ),
        (HUB, OSError("You are trying to access a gated repo.\nMake sure"), "it is gated; accept its terms"),
        (
            "AutoModelForCausalLM.from_pretrained",
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."),
            r"too little memory for backbone .*9\.00 GiB.*set backbone\.quantise to nf4",
        ),
    ],
    ids=["unreachable", "gated", "memory"],
)
def test_what_the_hub_or_the_memory_refuses_is_one_line(folder, monkeypatch, place, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(f"transformers.{place}", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(GraspError, match=message) as caught:
        load("some/model" if place == HUB else folder)
    assert "\n" not in str(caught.value)


def test_other_kinds_of_language_models_are_refused(folder):
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    for model in (
        transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=260, **size)),
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=260, d_model=32, d_ff=32, num_layers=1, num_heads=2)
        ),
    ):
        model.save_pretrained(folder)
        with pytest.raises(GraspError, match="not a causal language model"):
            load(folder)


def test_a_checkpoint_of_other_weights_is_warned_about_or_refused(folder, make_tiny_model, caplog):
    edit_json(folder / "config.json", num_hidden_layers=1)
    load(folder)
    assert "holds 9 weights that its config has no place for, first model.layers.1." in caplog.text
    LlamaModel(make_tiny_model("llama").config).save_pretrained(folder)
    with pytest.raises(GraspError, match=r"lacks 1 weights of the language model, first lm_head\.weight"):
        load(folder)
    (folder / "model.safetensors").unlink()
    torch.save(make_tiny_model("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(GraspError, match="safetensors"):
        load(folder)


def test_own_code_runs_only_when_asked_for(folder, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds that folder to it
    edit_json(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    with pytest.raises(GraspError, match="set trust_remote_code to true"):
        load(folder)
    assert not caplog.records
    with caplog.at_level(logging.WARNING), pytest.raises(GraspError, match="Unrecognized configuration class"):
        load(folder, trust_remote_code=True)  # its code ran, and gave a config that has no model
    assert "will run on this machine" in caplog.text


def test_four_bit_layers_keep_their_gradients_on_a_cpu(tiny_backbone_folder, make_tiny_model, monkeypatch):
    class Linear4bit(torch.nn.Linear):  # as bitsandbytes' where the processor has AVX512-BF16
        support_avx512bf16_for_cpu = True

    model = make_tiny_model("llama")
    model.model.layers[0].self_attn.q_proj = Linear4bit(32, 32)
    info = {"missing_keys": [], "unexpected_keys": []}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (model, info))
    loaded = load(tiny_backbone_folder).model
    assert not loaded.model.layers[0].self_attn.q_proj.support_avx512bf16_for_cpu
    assert not hasattr(loaded.model.layers[1].self_attn.q_proj, "support_avx512bf16_for_cpu")


KERNEL = r"asks for compiled attention code of the hub \('lab/kernel'\): read that code"
ADAPTER = r"the folder holds an adapter .*: give the model that"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"hidden_size": "many"}, "Cannot load backbone"),
        ("config.json", {"hidden_size": 64}, "Cannot load backbone"),
        ("config.json", {"attn_implementation": "lab/kernel"}, KERNEL),
        ("adapter_config.json", {}, ADAPTER),
        ("tokenizer.json", {"model": {"type": "BPE"}}, "Cannot load backbone"),
        ("tokenizer_config.json", {"eos_token": None}, "has no EOS token"),
        ("generation_config.json", {"eos_token_id": "end"}, "Cannot load backbone"),
    ],
)
def test_a_damaged_folder_is_one_line(folder, file, changes, message):
    edit_json(folder / file, **changes)
    with pytest.raises(GraspError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_gpu_that_torch_cannot_compute_on_is_one_line(folder, monkeypatch):
    asked = []

    def zeros(size: int, device: str) -> torch.Tensor:
        asked.append(device)
        raise torch.AcceleratorError(
            "CUDA error: no kernel image is available for execution on the device\nSearch for it"
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(GraspError, match=r"no kernel image .*set CUDA_VISIBLE_DEVICES= in the environment") as caught:
        load(folder, device="auto")
    assert asked == ["cuda:1"]
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_where_there_is_none(tiny_backbone_folder):
    with pytest.raises(GraspError, match="sees no CUDA GPU"):
        load(tiny_backbone_folder, device="cuda")
    assert load(tiny_backbone_folder, device="auto").model.device.type == "cpu"


def test_no_bar_of_the_library_is_drawn_while_a_model_is_loaded(tiny_backbone_folder, capfd, monkeypatch):
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)  # as in a terminal
    load_backbone(BackboneSettings(str(tiny_backbone_folder)))
    assert "Loading weights" not in capfd.readouterr().err
    AutoModelForCausalLM.from_pretrained(tiny_backbone_folder)
    assert "Loading weights" in capfd.readouterr().err
