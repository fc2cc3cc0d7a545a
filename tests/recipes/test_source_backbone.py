"""`init` notes where a source adapter is of another backbone than the one that is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CliResult


def test_an_adapter_of_another_backbone_is_noted(
    tmp_path: Path, cli: Callable[..., CliResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sw.csv").write_text("prompt,completion\n" + "".join(f"q {i}?,a {i}\n" for i in range(60)))
    Path("ad").mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "org/other",
    }
    Path("ad/adapter_config.json").write_text(json.dumps(config))
    for backbone, noted in (("org/tiny", True), ("mine/other", False)):
        result = cli("init", "sw.csv", "-l", "sw", "--source", "ad", "--backbone", backbone, "-o", f"{noted}.yaml")
        assert result.status == 0, result.err
        assert result.err == ("WARNING: ad names backbone 'org/other', the recipe says 'org/tiny'\n" if noted else "")
