"""What the README shows is run as it stands there."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.merging import MergeSettings, merge
from grasp_lora.models.adapters import save_adapter
from grasp_lora.recipes.load import load_recipe

README = Path(__file__).parent.parent / "README.md"


def test_the_python_example_runs_and_is_short(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_backbone_folder: Path,
    make_tiny_model: Callable[..., PreTrainedModel],
    capsys: pytest.CaptureFixture[str],
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(tmp_path)
    backbone = make_tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.self_attn.q_proj"
    adapters = [
        AdapterWeights(
            {name: LoraPair(torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator), 0.1)}
        )
        for _ in range(2)
    ]
    merged = merge(adapters, MergeSettings())
    save_adapter(Path("merged"), merged, backbone, backbone_name=str(tiny_backbone_folder), fingerprint="", dropout=0.0)
    rows = [{"prompt": f"question {number}:", "completion": f" answer {number % 3}"} for number in range(8)]
    # What a machine without a GPU needs; everything else is the README's.
    code = code.replace(
        'SFTConfig("out", ', 'SFTConfig("out", use_cpu=True, bf16=False, activation_checkpointing=False, '
    )
    names = {"BACKBONE": str(tiny_backbone_folder), "train": Dataset.from_list(rows), "dev": rows[:4]}
    exec(compile(code, "README.md", "exec"), names)
    assert "RatioEstimate(ratio=" in capsys.readouterr().out
    rounds = Path("controller/rounds.jsonl").read_text(encoding="utf-8").splitlines()
    assert 2 <= len(rounds) <= 6  # before the first step and after each of five epochs, until no ratio gets lower


def test_the_recipe_that_it_shows_is_the_one_that_comes_along(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    shown = tmp_path / "shown.yaml"
    shown.write_text(text, encoding="utf-8")
    assert load_recipe(shown)[0] == load_recipe("mlqa-ar")[0]
