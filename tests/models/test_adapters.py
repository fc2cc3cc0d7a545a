"""Adapters against PEFT itself: what is read, merged, put on a backbone and saved means the same there; the rest is refused."""

import hashlib
import json
import random
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from random_examples import factors, random_like
from safetensors.torch import load_file, save_file

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.method.merging import MergeSettings, merge
from grasp_lora.models import backbone as backbone_module
from grasp_lora.models.adapter_files import AdapterInfo, LoadedAdapter, read_adapter
from grasp_lora.models.adapters import attached, check_fits, fresh_adapter, save_adapter
from grasp_lora.models.backbone import Backbone, fingerprint
from grasp_lora.models.live import adapter_weights, live_pairs, lora_layers, segments_of
from grasp_lora.models.model_settings import LoraSettings

TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "gemma3": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "gpt2": ("c_attn", "c_proj"),  # c_proj stands for two modules of different shapes in each layer
}
ARCHITECTURES = list(TARGETS)
WEIGHTS = "adapter_model.safetensors"
TOKENS = torch.tensor([[1, 40, 50, 60, 70, 80, 90]])
FIRST_Q = "model.layers.0.self_attn.q_proj"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def variants(architecture: str) -> dict[str, dict]:
    """LoRA configurations, among them those that PEFT's own merging gets wrong."""
    one = "transformer.h.0.attn.c_attn" if architecture == "gpt2" else FIRST_Q
    ending = TARGETS[architecture][1]
    return {
        "plain": {"r": 4, "lora_alpha": 6},
        "rslora": {"r": 5, "lora_alpha": 7, "use_rslora": True},
        "rank_pattern": {"r": 4, "lora_alpha": 6, "rank_pattern": {one: 2, rf".*\.{ending}": 3}},
        "alpha_pattern": {"r": 4, "lora_alpha": 6, "alpha_pattern": {ending: 11}},
        "all": {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "rank_pattern": {one: 2},
            "alpha_pattern": {"^" + one.replace(".", r"\."): 9, ending: 5},
        },
    }


def with_peft(model, architecture: str, seed: int, targets=None, **config) -> PeftModel:
    """Put a PEFT adapter with a random A and B on the model, as training would leave it."""
    config |= {"target_modules": list(targets or TARGETS[architecture]), "fan_in_fan_out": architecture == "gpt2"}
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name and parameter.ndim == 2:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return peft_model


def saved_by_peft(make_tiny_model, folder: Path, architecture: str, seed: int = 1, **config) -> dict[str, torch.Tensor]:
    """Save a PEFT adapter into the folder and return its deltas."""
    peft_model = with_peft(make_tiny_model(architecture), architecture, seed, **config)
    peft_model.save_pretrained(str(folder))
    deltas = {name: layer.get_delta_weight("default").detach() for name, layer in lora_layers(peft_model).items()}
    return {name: delta.T if architecture == "gpt2" else delta for name, delta in deltas.items()}  # Conv1D's are turned


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def random_weights(model, targets, rank: int, seed: int, scaling: float = 0.7) -> AdapterWeights:
    with fresh_adapter(model, LoraSettings(rank=rank, target_modules=targets), seed) as peft_model:
        return random_like(peft_model, torch.Generator().manual_seed(seed), 0.3, scaling=scaling)


def edit_config(folder: Path, changes=(), **more) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | dict(changes) | more
    file.write_text(json.dumps(config), encoding="utf-8")


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def on(model, name: str = "lab/tiny", fingerprint: str = "f") -> Backbone:
    return Backbone(model, None, name, fingerprint, ())


@pytest.fixture
def folder(make_tiny_model, tmp_path) -> Path:
    """A plain adapter of the tiny Llama that a test may damage."""
    saved_by_peft(make_tiny_model, tmp_path / "adapter", "llama", r=4, lora_alpha=8)
    return tmp_path / "adapter"


@pytest.mark.parametrize("variant", ["plain", "rslora", "rank_pattern", "alpha_pattern", "all"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_read_adapter_has_pefts_deltas(make_tiny_model, tmp_path, architecture, variant):
    expected = saved_by_peft(make_tiny_model, tmp_path, architecture, **variants(architecture)[variant])
    weights = read_adapter(tmp_path).weights
    assert set(weights) == set(expected)
    for name, delta in expected.items():
        assert weights[name].shape == delta.shape
        assert relative_error(weights[name].delta(), delta) < 1e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_attached_merge_computes_what_the_changed_weights_compute(make_tiny_model, tmp_path, architecture):
    first = saved_by_peft(make_tiny_model, tmp_path / "1", architecture, 1, **variants(architecture)["all"])
    second = saved_by_peft(make_tiny_model, tmp_path / "2", architecture, 2, **variants(architecture)["rslora"])
    merged = merge([read_adapter(tmp_path / "1").weights, read_adapter(tmp_path / "2").weights], MergeSettings())
    model = make_tiny_model(architecture)
    untouched = logits(model)
    with attached(model, merged) as peft_model:
        found = logits(peft_model)
    changed = make_tiny_model(architecture)
    with torch.no_grad():
        for name in first:
            delta = 0.5 * first[name] + 0.5 * second[name]
            changed.get_submodule(name).weight += delta.T if architecture == "gpt2" else delta
    expected = logits(changed)
    assert (expected - untouched).abs().max() > 0.1  # the adapters do something
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_loaded_adapter_is_float32_named_after_its_folder_and_hashed(folder, monkeypatch):
    edit_tensors(folder, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    adapter = read_adapter(folder)
    assert all(pair.A.dtype == pair.B.dtype == torch.float32 for pair in adapter.weights.values())
    assert adapter.name == "adapter"
    assert adapter.sha256 == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert adapter.info == AdapterInfo()
    monkeypatch.chdir(folder)
    assert read_adapter(".").name == "adapter"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_adapter_of_unequal_ranks_is_the_same_in_peft(make_tiny_model, tmp_path, architecture):
    model = make_tiny_model(architecture)
    shared, extra = TARGETS[architecture]
    source = random_weights(model, (shared,), 2, 1)
    target = random_weights(model, (shared, extra), 3, 2)
    merged = merge([source, target], MergeSettings())
    assert {pair.rank for pair in merged.values()} == {5, 3}
    with attached(model, merged) as peft_model:
        expected = logits(peft_model)
        trained = adapter_weights(peft_model, segments_of(merged))
    save_adapter(tmp_path, trained, model, backbone_name="lab/tiny", dropout=0.05)
    weights, config = tmp_path / WEIGHTS, tmp_path / "adapter_config.json"
    assert weights.stat().st_mode == config.stat().st_mode  # who may read one may read the other
    assert json.loads(config.read_text())["base_model_name_or_path"] == "lab/tiny"
    assert read_adapter(tmp_path).info.backbone_fingerprint == fingerprint(model)
    reloaded = PeftModel.from_pretrained(make_tiny_model(architecture), str(tmp_path))
    assert reloaded.peft_config["default"].lora_dropout == 0.05
    assert {name: layer.r["default"] for name, layer in lora_layers(reloaded).items()} == {
        name: pair.rank for name, pair in merged.items()
    }
    assert torch.equal(logits(reloaded), expected)
    again = read_adapter(tmp_path)
    check_fits(again, on(model, fingerprint=fingerprint(model)))
    for name, pair in merged.items():
        assert torch.equal(again.weights[name].A, pair.A)
        assert torch.equal(again.weights[name].B, pair.B)
        assert again.weights[name].scaling == pair.scaling
        assert again.weights[name].segments == pair.segments


def test_one_layer_alone_is_saved_under_its_full_name(make_tiny_model, tmp_path):
    model = make_tiny_model("llama")
    name = "model.layers.1.self_attn.q_proj"
    weights = AdapterWeights({name: random_weights(model, ("q_proj",), 2, 1)[name]})
    save_adapter(tmp_path, weights, model, backbone_name="lab/tiny", fingerprint="f", dropout=0.0)
    reloaded = PeftModel.from_pretrained(make_tiny_model("llama"), str(tmp_path))
    assert list(lora_layers(reloaded)) == [name]


@pytest.mark.parametrize(("rank", "alpha"), [(7, 29), (11, 15), (7, 0.3)])
def test_the_scaling_survives_saving(make_tiny_model, tmp_path, rank, alpha):
    # (29 / 7) * 7 is not 29 in floats, and other programs read alpha as an integer.
    model = make_tiny_model("llama")
    settings = LoraSettings(rank=rank, alpha=alpha, target_modules=("q_proj",))
    with fresh_adapter(model, settings, 1) as peft_model:
        weights = adapter_weights(peft_model)
    save_adapter(tmp_path, weights, model, backbone_name="lab/tiny", fingerprint="f", dropout=0.0)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"]
    assert saved == alpha
    assert isinstance(saved, type(alpha))
    for name, pair in read_adapter(tmp_path).weights.items():
        assert torch.tensor(pair.scaling).equal(torch.tensor(weights[name].scaling))  # as float32, which multiplies B A


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_taking_an_adapter_off_leaves_no_trace(make_tiny_model, architecture):
    model = make_tiny_model(architecture)
    before, modules, facts = state(model), [name for name, _ in model.named_modules()], set(vars(model))
    untouched = logits(model)
    weights = random_weights(model, TARGETS[architecture], 4, 1)
    for _ in range(2):  # the second time PEFT would warn about leftovers of the first; warnings are errors
        with attached(model, weights) as peft_model:
            assert not torch.equal(logits(peft_model), untouched)
        with (
            pytest.raises(RuntimeError, match="on purpose"),
            fresh_adapter(model, LoraSettings(target_modules=TARGETS[architecture]), 3),
        ):
            raise RuntimeError("on purpose")
    after = state(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [name for name, _ in model.named_modules()] == modules
    assert set(vars(model)) == facts
    assert torch.equal(logits(model), untouched)


def test_an_attached_adapter_is_copied_and_all_that_trains(make_tiny_model):
    model = make_tiny_model("llama").to(torch.bfloat16)
    weights = random_weights(make_tiny_model("llama"), ("q_proj",), 4, 1)
    with attached(model, weights, dropout=0.5) as peft_model:
        expected = logits(peft_model)
        assert torch.equal(logits(peft_model), expected)  # dropout follows the mode of the backbone
        peft_model.train()
        assert not torch.equal(logits(peft_model), expected)
        trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
        assert len(trainable) == 4
        assert all("lora_" in name for name in trainable)
        assert all(pair.A.dtype == pair.B.dtype == torch.float32 for pair in live_pairs(peft_model).values())
        assert peft_model.peft_config["default"].lora_dropout == 0.5
        before, taken = {name: pair.A.clone() for name, pair in weights.items()}, adapter_weights(peft_model)
        for pair in live_pairs(peft_model).values():
            pair.A.data.zero_()
    for name, A in before.items():
        assert torch.equal(weights[name].A, A)
        assert torch.equal(taken[name].A, A)


def test_two_adapters_at_once_and_a_wrong_shape_are_refused_and_leave_no_trace(make_tiny_model):
    model = make_tiny_model("llama")
    modules = [name for name, _ in model.named_modules()]
    with (
        attached(model, random_weights(make_tiny_model("llama"), ("q_proj",), 4, 1)),
        pytest.raises(AdapterError, match="carries an adapter already"),
        fresh_adapter(model, LoraSettings(), 1),
    ):
        pass
    wrong = AdapterWeights({FIRST_Q: LoraPair(torch.ones(2, 31), torch.ones(32, 2))})
    with pytest.raises(AdapterError, match=r"shape \(32, 31\).*has \(32, 32\)"), attached(model, wrong):
        pass
    assert [name for name, _ in model.named_modules()] == modules


def test_live_pairs_are_the_parameters_themselves(make_tiny_model):
    model, origin = make_tiny_model("llama"), {FIRST_Q: (Segment("source", 1), Segment("target", 3))}
    with attached(model, random_weights(model, ("q_proj",), 4, 1)) as peft_model:
        parameters = {id(parameter) for parameter in peft_model.parameters()}
        assert {id(factor) for factor in factors(peft_model)} <= parameters
        assert [pair.segments for pair in live_pairs(peft_model, origin).values()] == [*origin.values(), ()]


def test_a_fresh_adapter_depends_on_its_seed_alone_and_leaves_the_global_generators_alone(make_tiny_model):
    def values(seed: int, noise: int) -> torch.Tensor:
        model = make_tiny_model("llama")
        torch.manual_seed(noise)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        with fresh_adapter(model, LoraSettings(rank=4, alpha=6.0), seed) as peft_model:
            pairs = live_pairs(peft_model).values()
            assert not any(pair.B.any() for pair in pairs)  # so it changes nothing
            assert {pair.scaling for pair in pairs} == {1.5}
            drawn = torch.cat([pair.A.detach().flatten() for pair in pairs])
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.array_equal(np.random.get_state()[1], states[2])
        return drawn

    assert torch.equal(values(1, noise=1), values(1, noise=2))
    assert not torch.equal(values(1, noise=1), values(2, noise=1))


def test_a_wrong_target_module_lists_what_exists(make_tiny_model):
    model = make_tiny_model("llama")
    for wrong in ("query", "proj", "embed_tokens"):  # proj ends q_proj, but is no name; embed_tokens is not linear
        with (
            pytest.raises(AdapterError, match=f"no linear module '{wrong}'.*q_proj.*v_proj"),
            fresh_adapter(model, LoraSettings(target_modules=("q_proj", wrong)), 1),
        ):
            pass
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_2"}, r"changes the backbone \(init_lora_weights"),
        ({"trainable_token_indices": [5, 6]}, "trainable_token_indices"),
        ({"targets": ("embed_tokens",)}, r"holds .*embed_tokens\.lora_embedding_A .*no LoRA factor of a linear"),
    ],
)
def test_what_peft_saves_but_no_merge_can_represent_is_refused(make_tiny_model, tmp_path, config, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT has much to say about these
        with_peft(make_tiny_model("llama"), "llama", 1, r=4, **config).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=message) as error:
        read_adapter(tmp_path)
    assert "\n" not in str(error.value)


def write_facts(folder: Path, facts: dict) -> None:
    (folder / "grasp_lora.json").write_text(json.dumps(facts), encoding="utf-8")


DAMAGED = {
    edit_config: [
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights"),
        ({"use_qalora": True}, "QALoRA"),
        ({"alora_invocation_tokens": [3]}, "activated LoRA"),
        ({"arrow_config": {"top_k": 3}}, "Arrow"),
        ({"kasa_config": {"beta": 0.1}}, "KaSA"),
        ({"monteclora_config": {"num_samples": 4}}, "MonteCLoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"peft_type": "IA3"}, "another method than LoRA"),
        ({"r": 3}, "says rank 3"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj have the shapes .*says rank 2"),
        ({"lora_alpha": None}, r"adapter_model\.safetensors: unsupported operand"),
        ({"lora_alpha": float("nan")}, "lora_alpha, holds NaN"),
        ({"target_modules": ["v_proj"]}, "leave out .*q_proj: .* does not name it in target_modules"),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "leave out .*layers.0.self_attn.q_proj: .* excludes"),
        ({"layers_to_transform": [1]}, "leave out .*layers.0.* does not name it"),
        ({"base_model_name_or_path": 5}, r"adapter_config\.json: base_model_name_or_path: .*valid string"),
        ({"revision": ["main"]}, r"adapter_config\.json: revision: .*valid string"),
    ],
    edit_tensors: [
        (lambda t: t[KEY.format("A")].__setitem__((0, 0), float("nan")), "q_proj, .* holds NaN or infinity"),
        (lambda t: t.update({KEY.format("A"): t[KEY.format("A")].double() * 1e300}), "holds NaN or infinity"),
        (
            lambda t: t.update({KEY.format("A"): t[KEY.format("A")].to(torch.complex64)}),
            r"q_proj\.lora_A.* no LoRA factor",
        ),
        (lambda t: t.pop(KEY.format("B")), "q_proj have the shapes {'A': "),
        (lambda t: t.update({KEY.format("A"): t[KEY.format("A")][:3]}), "q_proj have the shapes .*says rank 4"),
        (lambda t: t.update({KEY.format("A"): t[KEY.format("A")][:, :, None]}), r"shape \(4, 32, 1\)"),
        (
            lambda t: t.update({"base_model.model.lm_head.bias": torch.ones(2)}),
            "lm_head.bias of shape .2,., no LoRA factor",
        ),
        (lambda t: t.clear(), "holds no LoRA weights"),
    ],
    write_facts: [
        (
            {"segments": {FIRST_Q: [["source", 1], ["target", 1]]}},
            "q_proj have the shapes .*says rank 4, grasp_lora.json 2",
        ),
        ({"segments": {FIRST_Q: [["source"]]}}, r"delete that file.*segments.*q_proj.*Field required"),
        (
            {"answers": {"max_new_tokens": 0}},
            r"grasp_lora\.json .*answers\.max_new_tokens: .*greater than or equal to 1",
        ),
        ({"answers": {"stop": [""]}}, r"grasp_lora\.json .*answers\.stop\.0: .*at least 1 character"),
        ({"backbone_dtype": "fp8"}, r"delete that file.*backbone_dtype: .*'bfloat16', 'float16' or 'float32'"),
    ],
}


def test_a_setting_that_peft_does_not_know_is_told_in_one_line_with_the_adapters_name(folder, caplog):
    edit_config(folder, {"use_magic": True})
    read_adapter(folder)
    [told] = caplog.messages
    assert told.startswith(f"adapter {folder}: adapter_config.json: Unexpected keyword arguments ['use_magic']")


@pytest.mark.parametrize(
    ("damage", "what", "message"),
    [(damage, what, message) for damage, rows in DAMAGED.items() for what, message in rows],
)
def test_an_adapter_that_cannot_be_right_is_refused(folder, damage, what, message):
    damage(folder, what)
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("length", [0, 100, -10])
def test_a_truncated_file_is_refused_and_a_pickle_never_loaded(folder, length):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:length])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: ") as error:
        read_adapter(folder)
    assert "\n" not in str(error.value)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"\.safetensors: there is none; a pickle \(\.bin\) is never loaded"):
        read_adapter(folder)


@pytest.mark.parametrize("content", ["{", "[1, 2]"])
def test_a_broken_config_is_refused(folder, content):
    (folder / "adapter_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        read_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json: Can't find 'adapter_config\.json'"):
        read_adapter(folder)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
def test_nothing_that_a_config_names_is_imported(folder, monkeypatch):
    (folder / "evil_library.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(folder))
    mapping = {"base_model_class": "Evil", "parent_library": "evil_library"}
    edit_config(
        folder, auto_mapping=mapping, megatron_core="evil_library", auto_map={"AutoConfig": "evil_library.Evil"}
    )
    assert read_adapter(folder).weights
    assert "evil_library" not in sys.modules


def test_a_place_that_is_neither_folder_nor_hub_id_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="there is no such folder"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="there is no such folder") as error:
        read_adapter("lab/never-downloaded")
    assert "\n" not in str(error.value)


def check(folder: Path, model, fingerprint: str = "f") -> None:
    check_fits(read_adapter(folder), on(model, fingerprint=fingerprint))


def test_an_adapter_of_another_backbone_is_refused(make_tiny_model, folder):
    model = make_tiny_model("llama")
    check(folder, model)
    with pytest.raises(AdapterError, match=r"changes a model\.layers\.0.*, but backbone lab/tiny has no such linear"):
        check(folder, make_tiny_model("gpt2"))
    edit_tensors(folder, lambda t: t.update({KEY.format("A"): t[KEY.format("A")][:, :31]}))
    with pytest.raises(AdapterError, match=r"q_proj of shape \(32, 31\) .*lab/tiny has \(32, 32\)"):
        check(folder, model)


def test_an_adapter_on_a_module_that_is_not_linear_is_refused(make_tiny_model, folder):
    place = KEY.replace("model.layers.0.self_attn.q_proj", "model.embed_tokens")
    edit_tensors(folder, lambda t: t.update({place.format(factor): t.pop(KEY.format(factor)) for factor in "AB"}))
    edit_config(folder, target_modules=["q_proj", "v_proj", "embed_tokens"])
    with pytest.raises(AdapterError, match=r"model\.embed_tokens of .* has no such linear layer"):
        check(folder, make_tiny_model("llama"))


@pytest.mark.parametrize("trained", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("read", [torch.float16, torch.float32, torch.bfloat16])
def test_a_backbone_may_be_read_in_another_format_than_it_was_trained_in(
    make_tiny_model, tmp_path, trained, read, caplog
):
    model = make_tiny_model("llama").to(trained)
    weights = random_weights(model, TARGETS["llama"], 2, 1)
    save_adapter(tmp_path, weights, model, backbone_name="lab/tiny", fingerprint=fingerprint(model), dropout=0.0)
    again = make_tiny_model("llama").to(read)
    for strict in (False, True):
        check_fits(read_adapter(tmp_path), on(again, fingerprint=fingerprint(again)), strict=strict)
    assert ("could not be checked" in caplog.text) == (fingerprint(again) != fingerprint(model))
    if trained == read:
        with pytest.raises(AdapterError, match="same shapes, other weights"):
            check_fits(read_adapter(tmp_path), on(again, fingerprint="another"))


@pytest.mark.parametrize(
    ("named", "ours", "loaded"),
    [
        (None, True, "gemma3-270m"),
        (None, False, "google/gemma-3-270m"),  # another program has trained it on the hub's weights
        ("google/gemma-3-270m", True, "google/gemma-3-270m"),
        ("lab/x", True, "lab/x"),
    ],
)
def test_a_backbone_that_the_user_names_is_the_one_that_is_loaded(monkeypatch, named, ours, loaded):
    """Our adapters on the embedded weights name the model on the hub, which others can load."""
    monkeypatch.setattr(backbone_module, "load_backbone", lambda settings: settings)
    pairs = {"m": LoraPair(torch.ones(1, 2), torch.ones(2, 1))}
    info = AdapterInfo(embedded=ours)
    adapter = LoadedAdapter(AdapterWeights(pairs), "mine", "google/gemma-3-270m", "", info)
    assert backbone_module.backbone_of(adapter, named, "cpu").name == loaded


def test_another_base_name_only_warns(make_tiny_model, folder, caplog):
    edit_config(folder, base_model_name_or_path="someone/other-model")
    check(folder, make_tiny_model("llama"))
    [message] = caplog.messages
    assert "someone/other-model" in message
    assert "lab/tiny" in message
    edit_config(folder, base_model_name_or_path="/a/path/of/tiny")
    check(folder, make_tiny_model("llama"))
    assert caplog.messages == [message]


@pytest.mark.filterwarnings("ignore:target_parameters:RuntimeWarning")
def test_modules_that_peft_takes_for_experts_carry_an_adapter_or_are_refused():
    """PEFT 0.21 takes the dense MLP of this type for its experts and leaves it out; 0.22 does not."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    dense = Glm4MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, head_dim=16,
        num_key_value_heads=1, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, first_k_dense_replace=1,
    )  # fmt: skip
    model = Glm4MoeForCausalLM(dense).eval()
    asked = {"model.layers.0.mlp.down_proj", FIRST_Q}
    pair = LoraPair(torch.ones(2, 16), torch.ones(16, 2))
    refusal = "PEFT puts no adapter on model.layers.0.mlp.down_proj of this model; name others in lora.target_modules"
    for context in (
        fresh_adapter(model, LoraSettings(rank=2, target_modules=("q_proj", "down_proj")), seed=0),
        attached(model, AdapterWeights(dict.fromkeys(asked, pair))),
    ):
        with ExitStack() as opened:
            try:
                came = lora_layers(opened.enter_context(context)).keys()
            except AdapterError as error:
                came = str(error)
            assert came in (asked, refusal)
