"""An adapter made ready for others: smaller, in another dtype, or folded into its backbone, with the error that this costs.

What is written is read back and measured before its folder appears, whole or not at all.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

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
from grasp_lora.models.adapter_config import CONFIG_FILE, MOST_BYTES
from grasp_lora.models.adapters import check_fits, save_adapter
from grasp_lora.models.backbone import Backbone, backbone_of
from grasp_lora.models.fold import fold
from grasp_lora.models.gguf_adapter import GGUF_FILE, write_gguf
from grasp_lora.models.reading import OUR_FILE, AdapterInfo, LoadedAdapter, read_adapter
from grasp_lora.storage.claims import new_folder, refuse_existing
from grasp_lora.storage.reading import RefusedError, read_bounded
from grasp_lora.text.names import needs, without_place

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes, as of vLLM 0.26
CARD_FILE = "README.md"
CARD_HEADING = "## Export"
EXACT = 1e-12  # an error of float64's own rounding: the delta did not change


@dataclass(frozen=True)
class ExportSettings:
    """What to make of an adapter.

    Args:
        rank: highest rank of a module, by a truncated SVD of its delta; None leaves ranks alone.
        prune_rank: drop the rank-one components that a mask has emptied.
        uniform_rank: pad all modules with zeros to one rank, as llama.cpp needs it.
        fold: add the adapter to the backbone and write the whole model.
        dtype: number format: float32, float16 or bfloat16; None is float32; with `fold` it has to be given.
        gguf: write `adapter.gguf` beside, for llama.cpp and Ollama.

    Raises:
        RecipeError: a setting is outside its range, or does not go with another.
    """

    rank: int | None = None
    prune_rank: bool = False
    uniform_rank: bool = False
    fold: bool = False
    dtype: str | None = None
    gguf: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise RecipeError(f"--dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"--rank is {self.rank}; it must be at least 1")
        if self.fold and self.dtype is None:
            raise RecipeError(f"--fold writes a whole model; say in which --dtype: {', '.join(DTYPES)}")
        if self.fold and self.uniform_rank:
            raise RecipeError("--uniform-rank pads an adapter, but --fold writes none; leave one of them out")
        if self.gguf and self.fold:
            raise RecipeError(
                "--gguf writes an adapter, but --fold writes none; leave one of them out (convert_hf_to_gguf.py of llama.cpp "
                "takes the folded model)"
            )


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
    if settings.gguf:
        needs("--gguf", "gguf", "the package gguf", extra="gguf")
    adapter = read_adapter(place)
    shrunk = _shrink(adapter, settings)
    dtype_read = _dtype_read(adapter.info, settings.fold)
    loaded = backbone_of(adapter, backbone, "cpu", dtype_read, revision, trust_remote_code, settings.fold)
    check_fits(
        adapter,
        loaded.model,
        **loaded.told,
        strict=not settings.fold,  # what it was trained on is written down anew
    )
    if settings.fold:
        return _write_model(output, adapter, shrunk, loaded, settings)
    return _write_adapter(output, adapter, shrunk, loaded, settings, _card_of(Path(place), adapter))


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


@dataclass(frozen=True)
class _Shrunk:
    """The weights to write, and what was done to them."""

    weights: AdapterWeights
    rank: int | None = None
    # Before those that a mask has emptied were dropped; None where that was not asked for.
    components: int | None = None
    removed: int = 0
    kept_per_module: tuple[int, int] = (0, 0)  # the fewest and the most

    def facts(self) -> dict[str, Any]:
        """For `grasp_lora.json`."""
        found: dict[str, Any] = {} if self.rank is None else {"rank": self.rank}
        if self.components is not None:
            found |= {"components": self.components, "removed": self.removed, "kept_per_module": self.kept_per_module}
        return found

    def lines(self, error: DeltaError) -> list[str]:
        """For the user."""
        lines = []
        if self.components is not None:
            low, high = self.kept_per_module
            kept = f"{low} left in each module" if low == high else f"{low} to {high} left in a module"
            why = "" if self.removed else "; only a mask of granularity component empties whole ones"
            lines.append(f"removed {self.removed} of {self.components} components, {kept}{why}")
        if error.worst_error < EXACT:
            return [*lines, "delta: unchanged"]
        worst = f"at worst {error.worst_error:.3g} ({error.worst_module})"
        return [*lines, f"delta: relative error {error.relative_error:.3g} over all modules, {worst}"]


def _shrink(adapter: LoadedAdapter, settings: ExportSettings) -> _Shrunk:
    weights, highest = adapter.weights, adapter.highest_rank
    components, removed, kept = None, 0, (0, 0)
    if settings.rank is not None and settings.rank >= highest:
        raise AdapterError(
            f"adapter {adapter.name} has rank {highest}, so --rank {settings.rank} has nothing to gain; "
            f"give one below {highest}, or leave it out"
        )
    if settings.prune_rank:
        components = sum(pair.rank for pair in weights.values())
        weights = drop_emptied(weights)
        if not weights:
            raise AdapterError(
                f"adapter {adapter.name} changes nothing: all its components are zero; use the backbone alone"
            )
        left = [weights[module].rank if module in weights else 0 for module in adapter.weights]
        removed, kept = components - sum(left), (min(left), max(left))
    if settings.rank is not None:
        weights = lower_rank(weights, settings.rank)
    weights = share_scaling(weights)
    if settings.uniform_rank:
        weights = pad_ranks(weights)
    return _Shrunk(weights, settings.rank, components, removed, kept)


def _dtype_read(info: AdapterInfo, folded: bool) -> str:
    """What the backbone is loaded in; where it is only looked at, the smallest that shows whether it is the same."""
    if folded:
        return "float32"
    # Codes, and what float16 rounds, depend on the format; codes made in float16 are only warned of, see `check_fits`.
    told = info.backbone_dtype if info.backbone_quantised != info.backbone_float16 else None
    return told or "bfloat16"


def _write_adapter(
    output: Path, adapter: LoadedAdapter, shrunk: _Shrunk, backbone: Backbone, settings: ExportSettings, card: str
) -> list[str]:
    dtype = settings.dtype or "float32"
    rounded = in_dtype(shrunk.weights, DTYPES[dtype])
    with new_folder(output) as draft:
        # Dropout 0: the result is for inference, and PEFT hot-swaps only adapters of equal dropout.
        save_adapter(
            draft,
            rounded,
            backbone.model,
            backbone_name=adapter.base_model or backbone.base_model,
            fingerprint=backbone.fingerprint,
            dropout=0.0,
            answers=adapter.info.answers,
            quantise=backbone.quantise,
            dtype=adapter.info.backbone_dtype,
            embedded=backbone.is_embedded,
            revision=backbone.revision,
        )
        written = read_adapter(draft).weights
        error = delta_error(adapter.weights, written)
        config = json.loads((draft / CONFIG_FILE).read_text(encoding="utf-8"))
        lines = [
            f"adapter: {len(written)} modules, {_ranks(written)}, {dtype}, {_megabytes(draft)}",
            *shrunk.lines(error),
            *accepted_by(written, conv1d=bool(config["fan_in_fan_out"])),
        ]
        if settings.gguf:
            write_gguf(draft / GGUF_FILE, written, backbone.model, dtype)
            lines[-1] = f"llama.cpp: --lora {GGUF_FILE}; Ollama: ADAPTER ./{GGUF_FILE} in a Modelfile"
        info = json.loads((draft / OUR_FILE).read_text(encoding="utf-8"))
        _describe(draft, adapter, info, shrunk.facts() | {"dtype": dtype} | asdict(error), card, lines)
    return lines


def _write_model(
    output: Path, adapter: LoadedAdapter, shrunk: _Shrunk, backbone: Backbone, settings: ExportSettings
) -> list[str]:
    dtype = settings.dtype or "float32"
    error = delta_error(adapter.weights, shrunk.weights)
    rounding = fold(backbone.model, shrunk.weights, DTYPES[dtype])
    name = without_place(adapter.base_model or backbone.base_model)
    backbone.model.name_or_path = backbone.model.config._name_or_path = name
    backbone.tokenizer.name_or_path = name
    with new_folder(output) as draft:
        try:
            backbone.model.save_pretrained(draft)
        except ValueError as reason:  # such as sampling settings that contradict each other in its generation config
            raise GraspError(f"backbone {backbone.name} cannot be saved: {reason}") from reason
        for file in draft.glob("*.safetensors"):  # which nobody but the owner may read
            shutil.copymode(draft / "config.json", file)
        backbone.tokenizer.save_pretrained(draft)
        lines = [
            f"model: {adapter.name} folded into {len(shrunk.weights)} modules of {name}, {dtype}, {_megabytes(draft)}",
            *shrunk.lines(error),
            f"rounding: relative error {rounding.of_weights:.3g} of the folded weights, {rounding.of_delta:.3g} of the delta",
            "vLLM, llama.cpp: take it as they take its backbone (convert_hf_to_gguf.py)",
        ]
        info = {"backbone": name, "backbone_fingerprint": backbone.fingerprint}
        facts = shrunk.facts() | {"dtype": dtype, "rounding": asdict(rounding)} | asdict(error)
        _describe(draft, adapter, info, facts, "", lines)
    return lines


def _card_of(folder: Path, adapter: LoadedAdapter) -> str:
    """The adapter's own model card without the section of an earlier export, if grasp-lora wrote it; else nothing."""
    file = folder / CARD_FILE
    if adapter.info.backbone_fingerprint is None or not file.is_file():
        return ""
    try:
        card = read_bounded(file, MOST_BYTES).decode(errors="replace")
    except RefusedError as error:
        raise AdapterError(f"adapter {adapter.name}: {CARD_FILE}: {error}; remove it to do without") from error
    return card.partition(f"{CARD_HEADING}\n")[0].rstrip()


def _describe(
    draft: Path, adapter: LoadedAdapter, info: dict[str, Any], facts: dict[str, Any], card: str, lines: list[str]
) -> None:
    origin = {"adapter": adapter.name, "sha256": adapter.sha256}
    (draft / OUR_FILE).write_text(json.dumps(info | {"export": origin | facts}, indent=1) + "\n", encoding="utf-8")
    sentence = f"Exported from the adapter {adapter.name} (sha256:{adapter.sha256})."
    if card:
        sentence += " What stands above is about that adapter."
    listed = "".join(f"- {line}\n" for line in lines)
    content = f"{card}\n\n{CARD_HEADING}\n\n{sentence}\n\n{listed}"
    (draft / CARD_FILE).write_text(content.lstrip(), encoding="utf-8")


def _ranks(weights: AdapterWeights) -> str:
    ranks = sorted({pair.rank for pair in weights.values()})
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def _megabytes(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 1e6:.2f} MB"
