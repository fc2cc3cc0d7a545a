"""Backbones that are quantised while they load: whole runs, exact gradients, keys, and what is refused."""

import copy
import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_tokenizer, write_tiny_workspace
from peft import PeftModel
from recorder import read, rows_of, run_tiny, session_of
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from grasp_lora.data.encode import Example
from grasp_lora.engine.run import run
from grasp_lora.errors import GraspError
from grasp_lora.models.adapter_files import read_adapter
from grasp_lora.models.adapters import attached, fresh_adapter
from grasp_lora.models.backbone import Backbone, fingerprint, load_backbone
from grasp_lora.models.generation import answer
from grasp_lora.models.live import adapter_weights, live_factors
from grasp_lora.models.loss import collate, example_losses
from grasp_lora.models.model_settings import QUANTISERS, BackboneSettings, GenerationSettings, LoraSettings
from grasp_lora.training.probes import ProbeSet

NEAR = {"nf4": 0.3, "int8": 0.02}  # relative distance of the logits from those of the full model
EXAMPLES = [Example(f"e{n}", "p", "c", ("c",), "", tuple(range(5 + n, 30)), tuple(range(40, 44 + n))) for n in range(4)]


MISSING = importlib.util.find_spec("bitsandbytes") is None
SKIPPED = pytest.mark.skipif(MISSING, reason='bitsandbytes is not installed: pip install "grasp-lora[quant]"')
KINDS = [pytest.param(kind, marks=SKIPPED) for kind in QUANTISERS]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama of width 128, of weights as trained models have them, that bfloat16 holds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        tokens = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = LlamaForCausalLM(
            LlamaConfig(**shape, **heads, **tokens, initializer_range=0.05, max_position_embeddings=512)
        )
    folder = tmp_path_factory.mktemp("wide") / "wide-llama"
    model.bfloat16().float().save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_of(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give `run_of(kind)`: the folder of a whole run, made once for each kind."""
    done: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in done:
            recipe = write_tiny_workspace(tmp_path_factory.mktemp(kind) / "work", wide)
            done[kind] = recipe.parent / "run"
            run(session_of(f"backbone.quantise={kind}", "controller.training.epochs=2", recipe=recipe), done[kind])
        return done[kind]

    return make


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def load(wide: Path) -> Callable[..., Backbone]:
    def load(quantise: str | None, dtype: str = "float32") -> Backbone:
        return load_backbone(BackboneSettings(str(wide), dtype=dtype, device="cpu", quantise=quantise))  # type: ignore[arg-type]

    return load


def test_every_stage_of_a_run_lowers_its_loss(kind: str, run_of: Callable[[str], Path]) -> None:
    folder = run_of(kind)
    for stage in ("source", "target", "final"):
        dev = [row["dev_loss"] for row in rows_of(folder / stage / "history.jsonl") if "dev_loss" in row]
        assert dev[-1] < 0.97 * dev[0], stage
    rounds = rows_of(folder / "controller" / "rounds.jsonl")
    first, last = (sum(rounds[number]["baseline_losses"]) / 4 for number in (0, -1))
    assert last < 0.97 * first


def test_a_run_says_how_its_backbone_was_quantised(kind: str, run_of: Callable[[str], Path]) -> None:
    folder = run_of(kind)
    told = read(folder / "run.json")
    assert told["quantise"] == kind
    assert told["libraries"][QUANTISERS[kind]]
    info = read_adapter(folder / "adapter").info
    assert (info.quantise, info.backbone_quantised) == (kind, True)
    keyed = [read(step)["inputs"] for step in (folder / "store").glob("*/done.json")]
    by_backbone = [inputs["quantise"] for inputs in keyed if "backbone" in inputs]
    assert len(by_backbone) > 5
    assert set(by_backbone) == {kind}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    example_losses(model, collate(EXAMPLES, 0), label_positions=True).mean().backward()
    return {name: factor.grad.clone() for name, factor in live_factors(model).items()}


@pytest.fixture
def adapted(load: Callable[..., Backbone]) -> Iterator[Callable[[str], tuple[Any, Backbone]]]:
    """Give `adapted(kind)`: a quantised backbone with an adapter whose two factors both have numbers."""
    contexts = []

    def adapt(kind: str) -> tuple[Any, Backbone]:
        backbone = load(kind)
        context = fresh_adapter(backbone.model, LoraSettings(rank=4, dropout=0.0), 0)
        contexts.append(context)
        model = context.__enter__()
        generator = torch.Generator().manual_seed(1)
        for factor in live_factors(model).values():
            factor.data = 0.05 * torch.randn(factor.shape, generator=generator)
        return model, backbone

    yield adapt
    for context in contexts:
        context.__exit__(None, None, None)


def test_gradients_are_the_same_before_and_after_a_dev_evaluation(kind: str, adapted: Callable[..., Any]) -> None:
    model, backbone = adapted(kind)
    before = gradients(model)
    assert all(gradient.abs().sum() > 0 for gradient in before.values())
    ProbeSet(EXAMPLES).losses(model)
    model.eval()
    answer(model, backbone.tokenizer, [one.prompt_ids for one in EXAMPLES], GenerationSettings(max_new_tokens=3))
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, before[name]), name


def test_a_dev_loss_is_the_loss_that_is_trained_on(kind: str, adapted: Callable[..., Any]) -> None:
    model, _ = adapted(kind)
    model.train()
    trained = example_losses(model, collate(EXAMPLES, 0), label_positions=True).detach()
    assert torch.equal(torch.tensor(ProbeSet(EXAMPLES).losses(model)), trained)


def test_its_adapter_works_on_the_full_model_in_plain_peft(
    kind: str, wide: Path, run_of: Callable[[str], Path], load: Callable[..., Backbone]
) -> None:
    folder = run_of(kind) / "adapter"
    full = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    ids = torch.arange(4, 60).view(2, -1)
    with torch.no_grad(), attached(load(kind).model, read_adapter(folder).weights) as model:
        quantised = model.eval()(ids).logits
        alone = full(ids).logits
        plain = PeftModel.from_pretrained(full, folder).eval()(ids).logits
    assert (quantised - plain).norm() < NEAR[kind] * plain.norm()
    assert (quantised - plain).norm() < 0.6 * (
        plain - alone
    ).norm()  # what the adapter does is larger than what bits do


def test_each_way_has_a_fingerprint_of_its_own_that_stays(kind: str, load: Callable[..., Backbone]) -> None:
    backbone = load(kind)
    assert load(kind).fingerprint == backbone.fingerprint
    others = {load(other).fingerprint for other in (None, *QUANTISERS) if other != kind}
    assert backbone.fingerprint not in others
    ProbeSet(EXAMPLES).losses(backbone.model)
    assert fingerprint(backbone.model) == backbone.fingerprint
    assert load(kind, "bfloat16").fingerprint == backbone.fingerprint


def test_it_is_folded_into_the_full_model(kind: str, run_of: Callable[[str], Path], cli: Callable[..., Any]) -> None:
    folder = run_of(kind)
    out = folder.parent / "folded"
    options = ["--fold", "--dtype", "float32", "-o", out, "--backbone", folder.parent / "tiny-llama"]
    result = cli("export", folder / "adapter", *options)
    assert result.status == 0, result.err
    assert "was trained on a quantised backbone" in result.err
    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size == 128


@SKIPPED
def test_an_adapter_of_the_full_model_is_taken_with_a_warning(
    wide: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    recipe = write_tiny_workspace(tmp_path / "work", wide)
    session = session_of(recipe=recipe)
    with fresh_adapter(session.backbone.model, LoraSettings(rank=2), 0) as model:
        session.save(tmp_path / "source", adapter_weights(model))
    assert session_of("backbone.quantise=nf4", f"source.adapters=[{tmp_path / 'source'}]", recipe=recipe).given
    assert "was trained on a full-precision backbone, so that" in caplog.text


@pytest.mark.parametrize(
    ("saved", "change", "message"),
    [
        (None, "backbone.quantise=hqq", "backbone.quantise: input should be 'nf4' or 'int8'"),
        ({"quant_method": "hqq"}, "seed=42", "quantised by 'hqq', and is taken as it is; take its full"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "seed=42", "quantised by 'torchao', and is taken"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "backbone.quantise=nf4",
         "comes quantised by 'bitsandbytes', and is taken as it is; leave"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_by_name(
    saved: dict[str, Any] | None, change: str, message: str, tiny_workspace: Path
) -> None:
    """`saved`: what the config of the backbone says of its bits."""
    if saved:
        shutil.copytree("tiny-llama", "copy")
        Path("tiny-llama").unlink()
        Path("copy").rename("tiny-llama")
        config = read("tiny-llama/config.json") | {"quantization_config": saved}
        Path("tiny-llama/config.json").write_text(json.dumps(config))
        if MISSING and saved["quant_method"] == "bitsandbytes":
            pytest.skip("bitsandbytes is not installed")
    with pytest.raises(GraspError, match=re.escape(message)):
        run_tiny(change)
    assert not Path("run").exists()


@pytest.mark.parametrize(("kind", "library"), QUANTISERS.items())
def test_a_library_that_is_missing_is_named(
    kind: str, library: str, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else real(name))
    with pytest.raises(
        GraspError, match=rf"needs {library}, which is not installed: pip install 'grasp-lora\[quant\]'"
    ):
        run_tiny(f"backbone.quantise={kind}")


def test_what_was_saved_quantised_trains_exactly_as_well(
    kind: str, load: Callable[..., Backbone], tmp_path: Path
) -> None:
    backbone = load(kind)
    copy.deepcopy(backbone.tokenizer).save_pretrained(tmp_path / "saved")
    backbone.model.save_pretrained(tmp_path / "saved")
    again = load_backbone(BackboneSettings(str(tmp_path / "saved"), dtype="float32", device="cpu"))
    assert again.fingerprint == backbone.fingerprint
    assert again.quantise is None
    losses = [ProbeSet(EXAMPLES).losses(one.model) for one in (backbone, again)]
    assert losses[0] == losses[1]
