"""A backbone of the hub at a revision: what is loaded, what an adapter and its card say of it."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build_tiny_model
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from grasp_lora import api
from grasp_lora.engine.predict import predict_texts
from grasp_lora.models.adapter_files import read_adapter
from grasp_lora.models.adapters import check_fits, save_adapter
from grasp_lora.models.backbone import backbone_of, fingerprint, load_backbone
from grasp_lora.models.model_settings import BackboneSettings
from grasp_lora.recipes.load import load_recipe

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def hub(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub id of a model in a cache, with other weights on its branch v2."""
    cache = tmp_path / "hub"
    model = cache / "models--org--tiny"
    (model / "refs").mkdir(parents=True)
    for seed, (revision, commit) in enumerate(COMMITS.items()):
        (model / "refs" / revision).write_text(commit)
        build_tiny_model("llama", seed).save_pretrained(model / "snapshots" / commit)
        tiny_tokenizer.save_pretrained(model / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return "org/tiny"


def of_seed(seed: int) -> str:
    return fingerprint(build_tiny_model("llama", seed))


@pytest.mark.parametrize(
    ("asked", "commit", "seed"), [(None, "a" * 40, 0), ("v2", "b" * 40, 1), ("b" * 40, "b" * 40, 1)]
)
def test_a_backbone_knows_its_commit(hub, asked, commit, seed):
    backbone = load_backbone(BackboneSettings(hub, revision=asked))
    assert (backbone.commit, backbone.revision, backbone.fingerprint) == (commit, asked, of_seed(seed))


def test_the_revision_that_an_adapter_of_peft_states_is_loaded(hub, tmp_path, caplog):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(hub, revision="v2"), config, revision="v2")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.revision == "v2"
    backbone = backbone_of(adapter, None, "cpu")
    assert backbone.fingerprint == of_seed(1)
    assert backbone_of(adapter, hub, "cpu").fingerprint == of_seed(1)
    assert backbone_of(adapter, hub, "cpu", revision="main").fingerprint == of_seed(0)
    check_fits(adapter, backbone)
    assert "revision 'v2'" not in caplog.text
    main = load_backbone(BackboneSettings(hub))
    check_fits(adapter, main)
    assert "was made on revision 'v2' of 'org/tiny', and 'main' is loaded; set backbone.revision" in caplog.text
    told = predict_texts(str(tmp_path / "adapter"), ["Hello you"], stop=[], max_new_tokens=6)
    assert told == predict_texts(str(tmp_path / "adapter"), ["Hello you"], stop=[], max_new_tokens=6, revision="v2")


def test_what_we_save_says_its_revision_to_peft(hub, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(build_tiny_model("llama", 1), config).save_pretrained(tmp_path / "given")
    weights, backbone = (
        read_adapter(tmp_path / "given").weights,
        load_backbone(BackboneSettings(hub, revision="v2", dtype="float32")),
    )
    names = {"backbone_name": backbone.base_model, "revision": backbone.revision}
    save_adapter(tmp_path / "saved", weights, backbone.model, dropout=0.0, **names)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    embedding = loaded.get_base_model().get_input_embeddings().weight
    assert torch.equal(embedding, backbone.model.get_input_embeddings().weight)


def test_a_run_on_a_revision_is_asked_on_it_and_its_card_names_it(hub, tiny_workspace, cli):
    overrides = [f"backbone.name={hub}", "backbone.revision=v2"]
    api.run("tiny.yaml", overrides, folder="run")
    card = Path("run/adapter/README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == hub
    assert f'from_pretrained(base, revision="{COMMITS["v2"]}"' in card
    assert json.loads(Path("run/adapter/adapter_config.json").read_text())["revision"] == "v2"
    assert read_adapter("run/adapter").info.backbone_fingerprint == of_seed(1)
    asked = cli("predict", "run/adapter", "source 1: what?")
    assert asked.status == 0, asked.err
    assert load_recipe("run/recipe.yaml")[0].backbone.revision == "v2"
