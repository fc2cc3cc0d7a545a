"""What the README and the guide show is run as it stands there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedModel

from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.merging import MergeSettings, merge
from grasp_lora.method.ranking import prune_count
from grasp_lora.models.adapters import save_adapter
from grasp_lora.recipes.load import load_recipe

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def test_the_readme_is_read_in_one_go() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 100


def test_the_python_example_runs_and_is_short(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_backbone_folder: Path,
    make_tiny_model: Callable[..., PreTrainedModel],
    capsys: pytest.CaptureFixture[str],
) -> None:
    [code] = blocks(README, "python")
    assert len([line for line in code.splitlines() if line]) <= 12
    monkeypatch.chdir(tmp_path)
    Path("tiny-llama").symlink_to(tiny_backbone_folder, target_is_directory=True)
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
    save_adapter(Path("merged"), merged, backbone, backbone_name="tiny-llama", fingerprint="", dropout=0.0)
    rows = [{"prompt": f"question {number}:", "completion": f" answer {number % 3}"} for number in range(8)]
    names: dict[str, Any] = {
        "BACKBONE": "tiny-llama",
        "train": Dataset.from_list(rows),
        "dev_rows": rows[:4],
    }
    exec(compile(without_gpu(code), "README.md", "exec"), names)
    assert "RatioEstimate(ratio=" in capsys.readouterr().out
    # Where the README leads to: the page goes on with its names.
    script = (ROOT / "docs" / "guide" / "script.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^### The final run\n.*?```python\n(.*?)```", script, flags=re.DOTALL | re.MULTILINE)
    exec(compile(without_gpu(code), "script.md", "exec"), names)
    ratio = names["controller"].learned.ratio
    for tensor in load_file("final/adapter_model.safetensors").values():
        assert int((tensor == 0).sum()) == prune_count(ratio, tensor.numel())


def test_the_recipe_that_the_guide_shows_is_the_one_that_comes_along(tmp_path: Path) -> None:
    [text] = blocks(ROOT / "docs" / "guide" / "data.md", "yaml")
    shown = tmp_path / "shown.yaml"
    shown.write_text(text, encoding="utf-8")
    assert load_recipe(shown)[0] == load_recipe("mlqa-ar")[0]


def without_gpu(code: str) -> str:
    """What such a machine needs; everything else is the page's."""
    return re.sub(r'SFTConfig\("[\w-]+"', r"\g<0>, use_cpu=True, bf16=False, activation_checkpointing=False", code)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
