"""`backbone.shard`: the backbone is split over two processes, and everything that comes out is as if it were not."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest

TWO_A_STEP = [f"{stage}.training.accumulation=2" for stage in ("source", "target", "controller", "final")]
CHANGES = [*TWO_A_STEP, "controller.rounds.every=2"]
HELD = """
import json, os, sys
import torch
from grasp_lora.models.backbone import fingerprint, load_backbone
from grasp_lora.models.answers import generate
from grasp_lora.models.settings import BackboneSettings, GenerationSettings
from grasp_lora.storage.processes import join, leave

join("cpu")
whole = load_backbone(BackboneSettings("tiny-llama", dtype="float32", device="cpu"))
split = load_backbone(BackboneSettings("tiny-llama", dtype="float32", device="cpu", shard=True))
total = sum(weight.numel() for weight in whole.model.parameters())


def held():
    weights = split.model.parameters()
    return sum((weight.to_local() if hasattr(weight, "to_local") else weight).numel() for weight in weights) / total


found = {"loaded": held(), "alike": split.fingerprint == whole.fingerprint == fingerprint(split.model)}
prompts = [[5, 6, 7], [8] * 30, [9, 10]][: 3 * (1 - int(os.environ["RANK"]))]  # one process has nothing to answer
settings = GenerationSettings(max_new_tokens=9, batch_size=2)
answers = generate(split.model, split.tokenizer, prompts, settings)
found |= {"answered": held(), "same": answers == generate(whole.model, whole.tokenizer, prompts, settings)}
print(json.dumps(found))
leave()
"""


def launch(output: str, *changes: str) -> tuple[int, str]:
    settings = [part for change in (*CHANGES, *changes) for part in ("--set", change)]
    done = forked.python(["-m", "grasp_lora", "run", "tiny.yaml", "--output", output, *settings], count=2)
    return done.returncode, done.stdout + done.stderr


def results(folder: str) -> dict[str, Any]:
    """What a run came to, but for seconds."""
    files = ["metrics.json", "controller/rounds.jsonl", "source/history.jsonl", "final/history.jsonl"]
    files += [f"{name}/adapter_model.safetensors" for name in ("source", "merged", "final", "adapter")]
    return {file: Path(folder, file).read_bytes() for file in files}


@pytest.mark.parametrize("changes", [["data.target.test=7", "target.on=source"], ["data.target.test=1"]])
def test_a_split_backbone_changes_no_bit(tiny_workspace: Path, changes: list[str]) -> None:
    for output, shard in (("whole", "false"), ("split", "true")):
        status, said = launch(output, *changes, f"backbone.shard={shard}")
        assert status == 0, said[-3000:]
    assert results("split") == results("whole")
    # It is the same run: without the split one goes on with it.
    Path("split/metrics.json").unlink()
    status, said = launch("split", *changes)
    assert status == 0, said[-3000:]
    assert results("split") == results("whole")


@pytest.mark.slow
def test_labels_are_scored_on_a_split_backbone_too(tiny_workspace: Path) -> None:
    rows = [{"text": f"row {number}", "label": "ab"[number % 2] * (1 + number % 2)} for number in range(40)]
    for name in ("source", "target"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for output, shard in (("whole", "false"), ("split", "true")):
        status, said = launch(output, "data.task=classification", "data.target.test=3", f"backbone.shard={shard}")
        assert status == 0, said[-3000:]
    assert results("split") == results("whole")


def test_each_process_holds_half_of_the_weights(tiny_workspace: Path) -> None:
    done = forked.python(["-c", HELD], count=2, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 2
    for one in found:
        assert one["loaded"] <= 0.55
        assert one["answered"] <= 0.55
        assert one["alike"]
        assert one["same"]


def test_one_process_has_nothing_to_split(tiny_workspace: Path, cli: Callable[..., Any]) -> None:
    result = cli("run", "tiny.yaml", "--set", "backbone.shard=true")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith("error: backbone.shard is true, but there is one process: start it with torchrun")
    assert not Path("runs").exists()


def test_a_quantised_backbone_is_not_split(
    tiny_workspace: Path, cli: Callable[..., Any], tiny_backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grasp_lora.models import backbone

    asked = cli("run", "tiny.yaml", "--set", "backbone.shard=true", "--set", "backbone.quantise=nf4")
    assert (asked.status, asked.err.count("\n")) == (2, 1)
    assert "shard is true and quantise is 'nf4', but only full weights can be split: leave out one" in asked.err
    config = json.loads(Path("tiny-llama/config.json").read_text())
    Path("packed").mkdir()
    for file in Path("tiny-llama").iterdir():
        Path("packed", file.name).symlink_to(file.resolve())
    Path("packed/config.json").unlink()
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    Path("packed/config.json").write_text(json.dumps(config | {"quantization_config": packed}))
    monkeypatch.setattr(backbone, "world_size", lambda: 2)
    result = cli("run", "tiny.yaml", "--set", "backbone.shard=true", "--set", "backbone.name=packed")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "is quantised, and only full weights can be split" in result.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "what"), [("ACCELERATE_USE_FSDP", "FSDP by accelerate"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_other_sharding_is_refused_before_anything(
    tiny_workspace: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    monkeypatch.setenv(name, "true")
    result = cli("run", "tiny.yaml")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"error: the environment asks for {what} ({name} is true)")
    assert "backbone.shard" in result.err
    assert not Path("runs").exists()
    monkeypatch.setenv(name, "false")
    assert cli("run", "tiny.yaml", "--set", "nonsense=1").err.count(name) == 0
