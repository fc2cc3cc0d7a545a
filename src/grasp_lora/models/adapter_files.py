"""Adapter folders, strangers' among them: read by PEFT, and refused, with the reason, where plain factors would not say all.

Weights come from safetensors files only: a pickle can run any program. What is read means exactly what it means to PEFT:
`{"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4}}` gives q_proj rank 4 and the scaling 16 / 4, all others 8 and 16 / 8.
"""

import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.models.model_settings import EMBEDDED_ADAPTERS, EMBEDDED_HUB_ID, EMBEDDED_NAME
from grasp_lora.storage.network import not_there
from grasp_lora.storage.reading import expanded, is_folder, reading, sha256_of
from grasp_lora.text.display import escaped

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OUR_FILE = "grasp_lora.json"
CHAT_FILE = "chat_template.jinja"
PREFIX = "base_model.model."
ATTENTION_MODULES = 4  # q, k, v and o
# Initialisations that subtract something from the backbone's own weights: the saved factors alone are not the change.
_CHANGES_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga")


# What a config may ask for that factors A and B with a scaling do not represent: its field -> the name for the message.
REFUSED = {
    "use_dora": "DoRA", "lora_bias": "a trained LoRA bias (lora_bias)", "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices", "target_parameters": "target_parameters",
    "layer_replication": "layer_replication", "use_qalora": "QALoRA", "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "an Arrow router", "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal factors (BD-LoRA)",
}  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """How an adapter is asked and answers, kept beside it for `grasp-lora predict`; the defaults are for one that does not say.

    Args:
        chat_template: whether prompts are put into the tokenizer's chat template.
        task: of its recipe, or None.
        prompt: the template of its prompts, with the task's fields in braces, or None.
        columns: field -> column of the rows that it was trained on, where they differ.
        max_document_tokens: what contexts and articles were cut to, or None.
        labels: of a classification, what an answer may be.
        completion: of a classification, the template of its answers, or None.
    """

    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ("\n",)
    chat_template: bool = False
    task: str | None = None
    prompt: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    max_document_tokens: Annotated[int, Field(ge=1)] | None = None
    labels: tuple[str, ...] = ()
    completion: str | None = None


@dataclass(frozen=True)
class AdapterInfo:
    """What grasp-lora writes beside the weights of an adapter.

    Args:
        backbone_fingerprint: see `backbone.fingerprint`; None if another program wrote the adapter.
        backbone_quantised: whether its weights were stored in fewer bits than they were computed with.
        quantise: how grasp-lora quantised them for the training; None where it did not.
        segments: module name -> name and rank of the adapters that its components came from, in order.
        answers: None where it does not say.
        backbone_float16: whether the backbone's weights were in float16.
        backbone_dtype: what the backbone computed in; None if another program trained the adapter.
        embedded: whether the backbone is the embedded model.
        rows: `Record.marks` of its training rows, those of the adapters that it came from among them; empty where not known.
    """

    backbone_fingerprint: str | None = None
    backbone_quantised: bool = False
    segments: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    answers: Answers | None = None
    quantise: Literal["nf4", "int8"] | None = None
    backbone_float16: bool = False
    backbone_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    embedded: bool = False
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter read from a folder.

    Args:
        weights: module name -> pair with its scaling.
        name: public name: the hub id, or the folder's own name, never a path.
        base_model: name of the backbone that its config states, or None.
        sha256: hash of the weights file.
        info: what grasp-lora wrote beside it.
        base_weights: module name -> weight of the backbone itself that PEFT has stored beside, as it does for `lm_head`. They
            are no part of the adapter: `check_fits` refuses those that are not the backbone's.
        revision: branch, tag or commit of the backbone on the hub, where its config states one.
        chat_template: what lies beside the weights, as where a trainer saves its tokenizer with them; None where there is none.
    """

    weights: AdapterWeights
    name: str
    base_model: str | None
    sha256: str
    info: AdapterInfo = field(default_factory=AdapterInfo)
    base_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    revision: str | None = None
    chat_template: str | None = None

    @property
    def backbone(self) -> str | None:
        """What to load its backbone by."""
        return _to_load(self.base_model, self.info)

    @property
    def facts(self) -> dict[str, list[Any]]:
        """What the file of weights does not hold and decides as much: scaling and segments of each module, as JSON values."""
        return {
            name: [pair.scaling, [[segment.name, segment.rank] for segment in pair.segments]]
            for name, pair in self.weights.items()
        }


def read_adapter(place: str | Path) -> LoadedAdapter:
    """Read a LoRA adapter from a PEFT folder or a hub id, or one that is included, such as `english-qa`.

    Raises:
        AdapterError: it is missing, no safetensors LoRA, holds what cannot be merged right, does not agree with its own config,
            or holds a number that is not finite.
    """
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    shown, here = escaped(str(place)), _on_this_machine(place)
    folder = (here or _download(str(place))).absolute()
    with (
        reading(f"adapter {shown}: {CONFIG_FILE}", AdapterError),
        warnings.catch_warnings(record=True, action="always", category=UserWarning) as noted,
    ):
        config: Any = PeftConfig.from_pretrained(str(folder))
        _refuse_more_than_factors(config)
        names = {key: getattr(config, key) for key in ("base_model_name_or_path", "revision")}
        base_model, revision = TypeAdapter(dict[str, str | None]).validate_python(names).values()
    for note in noted:  # such as of keys that this PEFT does not know, and ignores
        logger.warning("adapter %s: %s: %s", shown, CONFIG_FILE, note.message)
    info = _read_info(folder, shown)
    with reading(f"adapter {shown}: {WEIGHTS_FILE}", AdapterError):
        if not (folder / WEIGHTS_FILE).is_file():
            raise ValueError(
                "there is none; a pickle (.bin) is never loaded: save it again with PEFT's save_pretrained"
            )
        pairs, base = _split(load_peft_weights(str(folder), device="cpu"), config, info)
        digest = sha256_of(folder / WEIGHTS_FILE)
    with reading(f"adapter {shown}: {CHAT_FILE}", AdapterError):
        template = (folder / CHAT_FILE).read_text(encoding="utf-8") if (folder / CHAT_FILE).is_file() else None
    name = escaped(folder.resolve().name) if here else shown
    return LoadedAdapter(AdapterWeights(pairs), name, base_model, digest, info, base, revision, template)


def _on_this_machine(place: str | Path) -> Path | None:
    """The folder of an adapter, or None for a hub id."""
    if is_folder(expanded(place)):
        return expanded(place)
    return Path(str(files("grasp_lora.demo"))) / str(place) if str(place) in EMBEDDED_ADAPTERS else None


def _refuse_more_than_factors(config: Any) -> None:
    used = next((name for key, name in REFUSED.items() if getattr(config, key, None)), None)
    if config.peft_type != "LORA":
        used = f"another method than LoRA ({str(config.peft_type).rpartition('.')[2]})"
    elif config.bias not in ("none", None):
        used = "trained biases (bias)"
    elif str(config.init_lora_weights).lower().startswith(_CHANGES_BACKBONE):
        used = "an initialisation that changes the backbone (init_lora_weights)"
    if used is not None:
        raise ValueError(f"it uses {used}, and only plain LoRA can be read: train one, or convert it")


def read_backbone(place: str) -> str | None:
    """Return what to load the backbone of an adapter by, as `LoadedAdapter.backbone` says; from the hub its configs alone come.

    Raises:
        AdapterError: there is no such adapter, or its config cannot be used.
    """
    folder = _on_this_machine(place) or _download(place, [CONFIG_FILE, OUR_FILE])
    return _to_load(read_base_model(str(folder)), _read_info(folder, escaped(place)))


def read_how_asked(place: str) -> tuple[Answers | None, bool]:
    """Return how an adapter is asked, None where it does not say; and whether it adapts more than attention.

    Raises:
        AdapterError: there is no such adapter, or its config cannot be used.
    """
    folder, shown = _on_this_machine(place) or _download(place, [CONFIG_FILE, OUR_FILE]), escaped(place)
    with reading(f"adapter {shown}: {CONFIG_FILE}", AdapterError):
        modules = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("target_modules") or ()
    return _read_info(folder, shown).answers, modules == "all-linear" or len(modules) > ATTENTION_MODULES


def read_base_model(folder: str) -> str | None:
    """Return the backbone that the adapter in a folder names, without PEFT, which takes seconds to import.

    Raises:
        AdapterError: its config is not there, or cannot be used.
    """
    with reading(f"adapter {escaped(folder)}: {CONFIG_FILE}", AdapterError):
        content = json.loads((expanded(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
        return TypeAdapter(str | None).validate_python(content.get("base_model_name_or_path"))


def _to_load(base_model: str | None, info: AdapterInfo) -> str | None:
    """Tell the embedded weights from those of the hub, whose name our adapters state for both."""
    return EMBEDDED_NAME if base_model == EMBEDDED_HUB_ID and info.embedded else base_model


def _download(hub_id: str, wanted: Sequence[str] = (CONFIG_FILE, WEIGHTS_FILE, OUR_FILE, CHAT_FILE)) -> Path:
    """Fetch the files that count, and not the gigabytes that may lie beside them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(wanted)))
    except (HFValidationError, OSError) as error:  # network, authorisation and missing repositories are OSErrors
        raise AdapterError(f"adapter {escaped(hub_id)}: {not_there(error)}") from error


def _read_info(folder: Path, shown: str) -> AdapterInfo:
    file = folder / OUR_FILE
    with reading(f"adapter {shown}: {OUR_FILE} (delete that file to do without it)", AdapterError):
        return TypeAdapter(AdapterInfo).validate_json(file.read_bytes()) if file.exists() else AdapterInfo()


def _split(
    tensors: Mapping[str, torch.Tensor], config: Any, info: AdapterInfo
) -> tuple[dict[str, LoraPair], dict[str, torch.Tensor]]:
    """Return module -> its pair in float32, and module -> the weight of the backbone that is stored beside.

    Raises:
        ValueError: a tensor is neither, or a module is not as the config says, so that PEFT would not read it so.
    """
    factors: dict[str, dict[str, torch.Tensor]] = {}
    base: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        module, _, factor = key.removeprefix(PREFIX).rpartition(".lora_")
        is_matrix = tensor.ndim == 2 and tensor.is_floating_point()
        if key.startswith(PREFIX) and module and factor in ("A.weight", "B.weight") and is_matrix:
            factors.setdefault(module, {})[factor[0]] = tensor.float()
        elif key.startswith(PREFIX) and not module and key.endswith(".weight"):
            base[key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")] = tensor
        else:
            raise ValueError(f"it holds {key} of shape {tuple(tensor.shape)}, no LoRA factor of a linear layer")
    if not factors:
        raise ValueError("it holds no LoRA weights")
    return {module: _pair(module, pair, config, info) for module, pair in factors.items()}, base


def _pair(module: str, factors: Mapping[str, torch.Tensor], config: Any, info: AdapterInfo) -> LoraPair:
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank: int = ranks.get(get_pattern_key(list(ranks), module), config.r)
    alpha: float = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
    shapes = {name: tuple(factor.shape) for name, factor in sorted(factors.items())}
    segments = tuple(Segment(*row) for row in info.segments.get(module, ()))
    stated = sum(segment.rank for segment in segments) or rank
    if len(shapes) < 2 or {shapes["A"][0], shapes["B"][1], stated} != {rank}:
        says = f"{CONFIG_FILE} says rank {rank}" + (f", {OUR_FILE} {stated}" if segments else "")
        raise ValueError(f"the factors of {module} have the shapes {shapes}, {says}: they are not of one adapter")
    pair = LoraPair(factors["A"], factors["B"], alpha / (math.sqrt(rank) if config.use_rslora else rank), segments)
    if not (math.isfinite(pair.scaling) and pair.A.isfinite().all() and pair.B.isfinite().all()):
        raise ValueError(f"{module}, or its lora_alpha, holds NaN or infinity; it is broken, train it again")
    chosen = config.target_modules not in (None, "all-linear")  # else PEFT chooses by the backbone
    if chosen and not check_target_module_exists(config, module):
        raise ValueError(
            f"PEFT would leave out {module}: {CONFIG_FILE} does not name it in target_modules, or excludes it"
        )
    return pair
