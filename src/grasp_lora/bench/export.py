"""An adapter made ready for others: smaller, in another dtype, or folded into its backbone, with the error that this costs.

What is written is read back and measured before its folder appears, whole or not at all.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from grasp_lora.bench.single import backbone_of, refuse_existing
from grasp_lora.errors import AdapterError, GraspError, RecipeError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.shrinking import (
    DeltaError,
    delta_error,
    drop_emptied,
    in_dtype,
    lower_rank,
    pad_ranks,
    share_scaling,
)
from grasp_lora.models.adapters import CONFIG_FILE, OUR_FILE, LoadedAdapter, check_fits, read_adapter, save_adapter
from grasp_lora.models.backbone import (
    EMBEDDED_HUB_ID,
    EMBEDDED_PUBLIC_NAME,
    Backbone,
    is_quantised,
)
from grasp_lora.models.fold import fold
from grasp_lora.storage.files import appear
from grasp_lora.text.display import quoted

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes, as of vLLM 0.26
CARD_FILE = "README.md"
CARD_HEADING = "## Export"
# An error of float64's own rounding: the delta did not change.
EXACT = 1e-12

_Writer = Callable[[Path], list[str]]  # writes into a draft folder, returns lines for the user


@dataclass(frozen=True)
class ExportSettings:
    """What to make of an adapter.

    Args:
        rank: highest rank of a module, by a truncated SVD of its delta; None leaves ranks alone.
        prune_rank: drop the rank-one components that a mask has emptied.
        uniform_rank: pad all modules with zeros to one rank, as llama.cpp needs it.
        fold: add the adapter to the backbone and write the whole model.
        dtype: number format: float32, float16 or bfloat16; None is float32, and refused with `fold`.

    Raises:
        RecipeError: a setting is outside its range, or does not go with another.
    """

    rank: int | None = None
    prune_rank: bool = False
    uniform_rank: bool = False
    fold: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise RecipeError(f"--dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"--rank is {self.rank}; it must be at least 1")
        if self.fold and self.dtype is None:
            raise RecipeError(f"--fold writes a whole model; say in which --dtype: {', '.join(DTYPES)}")
        if self.fold and self.uniform_rank:
            raise RecipeError("--uniform-rank pads an adapter, but --fold writes none; leave one of them out")


def export_folder(
    place: str,
    output: Path,
    settings: ExportSettings,
    backbone: str | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """Write an adapter, or with `fold` its backbone with the adapter folded in, into a new folder.

    Args:
        place: PEFT adapter: a folder or a hub id.
        output: a folder that does not exist or is empty.
        settings: what to do.
        backbone, revision, trust_remote_code: of what to check the adapter against, as in a recipe's `backbone`; None takes the
            one that it names.

    Returns:
        Lines for the user: what was written, what it cost, which programs take it.

    Raises:
        GraspError: the adapter, its backbone, a setting or the output does not fit. Nothing is written then.
    """
    refuse_existing(output)
    adapter = read_adapter(place)
    weights, facts = _shrink(adapter, settings)
    dtype_read = "float32" if settings.fold else "bfloat16"
    loaded = backbone_of(adapter, backbone, "cpu", dtype_read, revision, trust_remote_code)
    fingerprint = loaded.fingerprint
    if settings.fold and adapter.info.get("backbone_quantised") and not is_quantised(loaded.model.config):
        fingerprint = adapter.info.get("backbone_fingerprint", fingerprint)
        logger.warning(
            "adapter %s was trained on a quantised backbone, so that %s is the same model could not be checked by its weights",
            quoted(adapter.name),
            quoted(loaded.name),
        )
    check_fits(adapter, loaded.model, backbone_name=loaded.name, fingerprint=fingerprint)
    dtype = DTYPES[settings.dtype or "float32"]
    if settings.fold:
        return appear(output, _model_writer(adapter, weights, loaded, dtype, facts))
    return appear(output, _adapter_writer(adapter, weights, loaded, dtype, facts, _card_of(Path(place), adapter)))


def accepted_by(weights: AdapterWeights, *, conv1d: bool = False) -> list[str]:
    """Say what vLLM and llama.cpp need to take an adapter, from what they read of it.

    Both read factors of any rank, but one scaling: vLLM lora_alpha / r of the config for all modules, llama.cpp's converter
    lora_alpha, divided by each module's own rank. Read in the sources of vLLM (0.26 for the ranks) and of
    `convert_lora_to_gguf.py`.

    Args:
        weights: plain LoRA pairs with one scaling.
        conv1d: whether the modules are GPT-2's.
    """
    highest = max(pair.rank for pair in weights.values())
    endings = sorted({module.rsplit(".", 1)[-1] for module in weights})
    if conv1d:
        return ["vLLM, llama.cpp: adapters on GPT-2's Conv1D layers are not known to load; use --fold"]
    if "lm_head" in endings:
        return ["vLLM, llama.cpp: an adapter on lm_head loads for some models only; --fold works for all"]
    limit = next((rank for rank in VLLM_RANKS if rank >= highest), None)
    if limit is None:
        vllm = f"vLLM: rank {highest} is above its limit of {VLLM_RANKS[-1]}; use --rank or --fold"
    else:
        vllm = f"vLLM: --enable-lora --max-lora-rank {limit}; modules {', '.join(endings)}"
    if len({pair.rank for pair in weights.values()}) > 1:
        llama = "llama.cpp: would scale modules of unequal ranks wrongly; add --uniform-rank, or use --fold"
    else:
        llama = "llama.cpp: convert_lora_to_gguf.py takes it as it is"
    return [vllm, llama]


def _shrink(adapter: LoadedAdapter, settings: ExportSettings) -> tuple[AdapterWeights, dict[str, Any]]:
    """The weights to write, and what was done to them for `grasp_lora.json`."""
    weights, highest = adapter.weights, max(pair.rank for pair in adapter.weights.values())
    facts: dict[str, Any] = {"adapter": adapter.name, "sha256": adapter.sha256}
    if settings.rank is not None and settings.rank >= highest:
        raise AdapterError(
            f"adapter {adapter.name} has rank {highest}, so --rank {settings.rank} has nothing to gain; "
            f"give one below {highest}, or leave it out"
        )
    if settings.prune_rank:
        weights = drop_emptied(weights)
        if not weights:
            raise AdapterError(
                f"adapter {adapter.name} changes nothing: all its components are zero; use the backbone alone"
            )
        left = {module: weights[module].rank if module in weights else 0 for module in adapter.weights}
        facts["components"] = sum(pair.rank for pair in adapter.weights.values())
        facts["removed"] = facts["components"] - sum(left.values())
        facts["kept_per_module"] = [min(left.values()), max(left.values())]
    if settings.rank is not None:
        weights = lower_rank(weights, settings.rank)
        facts["rank"] = settings.rank
    weights = share_scaling(weights)
    return pad_ranks(weights) if settings.uniform_rank else weights, facts


def _adapter_writer(
    adapter: LoadedAdapter,
    weights: AdapterWeights,
    backbone: Backbone,
    dtype: torch.dtype,
    facts: dict[str, Any],
    card: str,
) -> _Writer:
    rounded = in_dtype(weights, dtype)
    name = _stated_backbone(adapter, backbone)

    def write(draft: Path) -> list[str]:
        # Dropout 0: the result is for inference, and PEFT hot-swaps only adapters of equal dropout.
        save_adapter(
            draft,
            rounded,
            backbone.model,
            backbone_name=name,
            fingerprint=backbone.fingerprint,
            dropout=0.0,
            answers=adapter.info.get("answers"),
        )
        written = read_adapter(draft).weights
        error = delta_error(adapter.weights, written)
        config = json.loads((draft / CONFIG_FILE).read_text(encoding="utf-8"))
        lines = [
            f"adapter: {len(written)} modules, {_ranks(written)}, {_name(dtype)}, {_megabytes(draft)}",
            *_shrinking_lines(facts, error),
            *accepted_by(written, conv1d=bool(config["fan_in_fan_out"])),
        ]
        info = json.loads((draft / OUR_FILE).read_text(encoding="utf-8"))
        _describe(draft, info, facts | {"dtype": _name(dtype)} | asdict(error), card, lines)
        return lines

    return write


def _model_writer(
    adapter: LoadedAdapter, weights: AdapterWeights, backbone: Backbone, dtype: torch.dtype, facts: dict[str, Any]
) -> _Writer:
    error = delta_error(adapter.weights, weights)
    rounding = fold(backbone.model, weights, dtype)
    name = _stated_backbone(adapter, backbone)
    backbone.model.name_or_path = backbone.model.config._name_or_path = name
    backbone.tokenizer.name_or_path = name

    def write(draft: Path) -> list[str]:
        try:
            backbone.model.save_pretrained(draft)
        except ValueError as reason:  # such as sampling settings that contradict each other in its generation config
            raise GraspError(f"backbone {backbone.name} cannot be saved: {reason}") from reason
        backbone.tokenizer.save_pretrained(draft)
        lines = [
            f"model: {adapter.name} folded into {len(weights)} modules of {name}, {_name(dtype)}, {_megabytes(draft)}",
            *_shrinking_lines(facts, error),
            f"rounding: relative error {rounding.of_weights:.3g} of the folded weights, {rounding.of_delta:.3g} of the delta",
            "vLLM, llama.cpp: take it as they take its backbone (convert_hf_to_gguf.py)",
        ]
        info = {"backbone": name, "backbone_fingerprint": backbone.fingerprint}
        own = facts | {"dtype": _name(dtype), "rounding": asdict(rounding)} | asdict(error)
        _describe(draft, info, own, "", lines)
        return lines

    return write


def _shrinking_lines(facts: dict[str, Any], error: DeltaError) -> list[str]:
    lines = []
    if "removed" in facts:
        low, high = facts["kept_per_module"]
        kept = f"{low} left in each module" if low == high else f"{low} to {high} left in a module"
        lines.append(f"removed {facts['removed']} of {facts['components']} components, {kept}")
        if not facts["removed"]:
            lines[-1] += "; only a mask of granularity component empties whole ones"
    if error.worst_error < EXACT:
        return [*lines, "delta: unchanged"]
    worst = f"at worst {error.worst_error:.3g} ({error.worst_module})"
    return [*lines, f"delta: relative error {error.relative_error:.3g} over all modules, {worst}"]


def _stated_backbone(adapter: LoadedAdapter, backbone: Backbone) -> str:
    """The backbone's name for others: of a path on some machine only its last part."""
    name = adapter.base_model or (EMBEDDED_HUB_ID if backbone.name == EMBEDDED_PUBLIC_NAME else backbone.name)
    return Path(name).name if name.startswith(("/", "~")) or "\\" in name else name


def _card_of(folder: Path, adapter: LoadedAdapter) -> str:
    """The adapter's own model card without the section of an earlier export, if grasp-lora wrote it; else nothing."""
    file = folder / CARD_FILE
    if not adapter.info or not file.is_file():
        return ""
    return file.read_text(encoding="utf-8", errors="replace").partition(f"{CARD_HEADING}\n")[0].rstrip()


def _describe(draft: Path, info: dict[str, Any], facts: dict[str, Any], card: str, lines: list[str]) -> None:
    (draft / OUR_FILE).write_text(json.dumps(info | {"export": facts}, indent=1) + "\n", encoding="utf-8")
    origin = f"Exported from the adapter {facts['adapter']} (sha256:{facts['sha256']})."
    if card:
        origin += " What stands above is about that adapter."
    listed = "".join(f"- {line}\n" for line in lines)
    content = f"{card}\n\n{CARD_HEADING}\n\n{origin}\n\n{listed}"
    (draft / CARD_FILE).write_text(content.lstrip(), encoding="utf-8")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ranks(weights: AdapterWeights) -> str:
    ranks = sorted({pair.rank for pair in weights.values()})
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def _megabytes(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 1e6:.2f} MB"
