"""The config of a backbone, read and checked before anything of its sizes is made."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_lora.errors import GraspError
from grasp_lora.models.precision import refuse_untrainable
from grasp_lora.models.settings import BackboneSettings
from grasp_lora.storage.reading import is_folder
from grasp_lora.text.display import one_line, quoted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOST_LAYERS, MOST_SIZE = 10_000, 2**24
_SIZES = ("_size", "_dim", "_heads", "_experts", "n_embd", "n_inner")


def source_of(settings: BackboneSettings) -> dict[str, Any]:
    """What every `from_pretrained` is told of where a model comes from."""
    return {
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "local_files_only": settings.offline,
    }


def read_config(location: str, settings: BackboneSettings) -> "PretrainedConfig":
    """Read the config of a model and check that it is one that can be loaded and trained on here.

    Raises:
        GraspError: a size that no model has, or it asks for foreign code, or is quantised in a way nothing trains on.
        ValueError: it is not a causal language model.
    """
    from transformers import AutoConfig, PretrainedConfig

    source = source_of(settings)
    _check_sizes(PretrainedConfig.get_config_dict(location, **source)[0])
    config: PretrainedConfig = AutoConfig.from_pretrained(location, **source)
    _check_causal(config)
    if not settings.trust_remote_code:
        _refuse_foreign_kernels(config)
    refuse_untrainable(config)
    return config


def commit_of(location: str, revision: str | None) -> str | None:
    """Return the commit of a model on the hub whose config has just been read; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if is_folder(Path(location)):
        return None
    config = try_to_load_from_cache(location, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def fact_of(config: "PretrainedConfig", name: str) -> Any:
    """Return a fact of a config: None where it has none, a list with one for each layer where layers differ, as in Gemma 4."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # of transformers, which gives no such fact of the whole
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def _check_sizes(facts: dict[str, Any]) -> None:
    """Refuse sizes that no model has before anything of such a size is made, be it a list of the config itself."""
    for key, value in facts.items():
        if isinstance(value, dict):
            _check_sizes(value)
        elif isinstance(value, int | float):
            is_count = "layer" in key and "per_layer" not in key  # Gemma 3n has sizes per layer
            most = MOST_LAYERS if is_count else MOST_SIZE if "per_layer" in key or key.endswith(_SIZES) else math.inf
            if value > most:
                raise GraspError(
                    f"The config of the backbone has {one_line(key)} {quoted(value)}; at most {most} is allowed: it is damaged "
                    "or hostile, download it again"
                )


def _refuse_foreign_kernels(config: "PretrainedConfig") -> None:
    """Refuse a config that names a repository of compiled attention code: transformers would fetch and run it."""
    for part in (config, config.get_text_config(decoder=True)):
        wanted = part._attn_implementation
        if wanted is not None and "/" in wanted:
            raise GraspError(
                f"The config of the backbone asks for compiled attention code of the hub ({quoted(wanted)}): read that "
                "code, then set trust_remote_code to true, or remove the entry"
            )


def _check_causal(config: "PretrainedConfig") -> None:
    """Refuse what AutoModelForCausalLM would load, but not as a language model that reads left to right."""
    architectures = config.architectures or []
    if config.is_encoder_decoder or any(str(name).endswith("ForMaskedLM") for name in architectures):
        kind = architectures[0] if architectures else config.model_type
        raise ValueError(f"{kind} is not a causal language model")
