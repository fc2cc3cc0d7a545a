"""What `predict` asks a backbone with, and what it says where memory is short."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp_lora.engine import predict as module
from grasp_lora.errors import AdapterError, GraspError
from grasp_lora.models import backbone as backbones
from grasp_lora.models.adapter_files import Answers, read_adapter
from grasp_lora.models.adapters import fresh_adapter, save_adapter
from grasp_lora.models.backbone import load_backbone
from grasp_lora.models.live import adapter_weights
from grasp_lora.models.model_settings import BackboneSettings, LoraSettings


@pytest.fixture
def place(tiny_backbone_folder: Path, tmp_path: Path) -> Callable[..., str]:
    """Give `place(dtype)`: an adapter of a training in that number format."""

    def make(dtype: str, **answers: Any) -> str:
        backbone = load_backbone(BackboneSettings(str(tiny_backbone_folder), dtype=dtype, device="cpu"))  # type: ignore[arg-type]
        with fresh_adapter(backbone.model, LoraSettings(rank=2), 0) as adapted:
            weights = adapter_weights(adapted)
        own = Answers(4, **answers)
        names = {"backbone_name": backbone.base_model, "fingerprint": backbone.fingerprint, "dtype": dtype}
        save_adapter(tmp_path / dtype, weights, backbone.model, dropout=0.0, answers=own, **names)
        return str(tmp_path / dtype)

    return make


def test_it_answers_in_the_number_format_of_the_training(
    place: Callable[..., str], tiny_backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, "find_dtype", lambda device, kind="": "float32")  # what auto would take
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    for dtype in ("bfloat16", "float32"):
        with module.asking(place(dtype), str(tiny_backbone_folder), "cpu") as asked:
            assert str(asked.model.dtype) == f"torch.{dtype}"
            assert len(asked.texts(["target 1: what?"])) == 1


@pytest.mark.parametrize(
    "answers", [{}, {"task": "classification", "prompt": "{text}", "completion": "{label}", "labels": ("a", "b")}]
)
def test_out_of_memory_says_what_predict_can_be_given(
    answers: dict[str, Any], place: Callable[..., str], tiny_backbone_folder: Path
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    with module.asking(place("float32", **answers), str(tiny_backbone_folder), "cpu") as asked:
        hook = asked.model.register_forward_pre_hook(fail)
        hook_below = asked.model.get_base_model().register_forward_pre_hook(fail)
        message = r"^too little memory for answering \(CUDA out of memory\. .*; shorten the prompts"
        with pytest.raises(GraspError, match=message):
            asked.texts(["target 1: what?"])
        hook.remove()
        hook_below.remove()


def test_the_chat_template_that_lies_beside_an_adapter_counts(
    place: Callable[..., str], tiny_backbone_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a trainer saved its tokenizer with the adapter."""
    usual, own = (
        f"{{% for m in messages %}}{mark} {{{{ m.role }}}} {{{{ m.content }}}} {{% endfor %}}" for mark in "*-"
    )
    adapter = Path(place("float32", chat_template=True))
    backbone = Path(shutil.copytree(tiny_backbone_folder, tmp_path / "tiny-llama"))
    (backbone / "chat_template.jinja").write_text(usual, encoding="utf-8")
    for template, said in ((own, "brings a chat template of its own"), (usual, "")):
        (adapter / "chat_template.jinja").write_text(template, encoding="utf-8")
        caplog.clear()
        with module.asking(str(adapter), str(backbone), "cpu") as ready:
            assert ready.tokenizer.chat_template == template
            assert said in caplog.text
        assert bool(caplog.text) is bool(said)
    (adapter / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(AdapterError, match=r"float32: chat_template\.jinja: 'utf-8' codec"):
        read_adapter(adapter)
