"""Adapter folders of strangers: what PEFT wrote is read, checked against itself, and turned into plain factors.

Only safetensors files are read, and only after their header and the config agree.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.models.adapter_config import CONFIG_FILE, MOST_BYTES, AdapterConfig, Rank, read_config
from grasp_lora.models.settings import EMBEDDED_HUB_ID, EMBEDDED_NAME
from grasp_lora.models.tensor_files import read_shapes, read_tensors
from grasp_lora.storage.network import no_network, not_there
from grasp_lora.storage.reading import (
    Name,
    RefusedError,
    about,
    expanded,
    is_folder,
    is_there,
    read_bounded,
    read_json_object,
    sha256_of,
    validated,
)
from grasp_lora.text.display import escaped

WEIGHTS_FILE = "adapter_model.safetensors"
OUR_FILE = "grasp_lora.json"
CHAT_FILE = "chat_template.jinja"
PREFIX = "base_model.model."
MOST_PROMPT = 100_000  # characters of a template
MOST_EFFORT = 5_000_000  # comparisons of modules with patterns, a few seconds
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")


@dataclass(frozen=True)
class Answers:
    """How an adapter is asked and answers, kept beside it for `grasp-lora predict`; the defaults are for one that does not say.

    Args:
        max_new_tokens: longest answer.
        stop: texts that end an answer.
        chat_template: whether prompts are put into the tokenizer's chat template.
        task: of its recipe, or None.
        prompt: the template of its prompts, with the task's fields in braces, or None.
        columns: field -> column of the rows that it was trained on, where they differ.
        max_document_tokens: what contexts and articles were cut to, or None.
        labels: of a classification, what an answer may be.
        completion: of a classification, the template of its answers, or None.
        allow_empty: whether an answer may be empty.
    """

    max_new_tokens: Annotated[int, Field(strict=True)] = 64
    stop: tuple[Annotated[str, Field(strict=True)], ...] = ("\n",)
    chat_template: Annotated[bool, Field(strict=True)] = False
    task: Name | None = None
    prompt: Annotated[str, Field(strict=True, max_length=MOST_PROMPT)] | None = None
    columns: dict[str, Name] = field(default_factory=dict)
    max_document_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    labels: tuple[Annotated[str, Field(strict=True, max_length=MOST_PROMPT)], ...] = ()
    completion: Annotated[str, Field(strict=True, max_length=MOST_PROMPT)] | None = None
    allow_empty: Annotated[bool, Field(strict=True)] = False


@dataclass(frozen=True)
class AdapterInfo:
    """What grasp-lora writes beside the weights of an adapter.

    Args:
        backbone: public name of the backbone.
        backbone_fingerprint: see `backbone.fingerprint`; None if another program wrote the adapter.
        backbone_quantised: whether its weights were stored in fewer bits than they were computed with.
        quantise: how grasp-lora quantised them for the training; None where it did not.
        segments: module name -> name and rank of the adapters that its components came from, in order.
        answers: None where it does not say.
        backbone_float16: whether the backbone's weights were in float16.
        backbone_dtype: what the backbone computed in; None if another program or an earlier version trained the adapter.
        embedded: whether the backbone is the embedded model; None if another program or an earlier version wrote the file.
    """

    backbone: Name | None = None
    backbone_fingerprint: Name | None = None
    backbone_quantised: Annotated[bool, Field(strict=True)] = False
    segments: dict[str, tuple[tuple[Name, Rank], ...]] = field(default_factory=dict)
    answers: Answers | None = None
    quantise: Name | None = None
    backbone_float16: Annotated[bool, Field(strict=True)] = False
    backbone_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    embedded: Annotated[bool, Field(strict=True)] | None = None

    def origins(self) -> dict[str, tuple[Segment, ...]]:
        """Return module name -> origin of its components."""
        return {module: tuple(Segment(*row) for row in rows) for module, rows in self.segments.items()}


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter read from a folder.

    Args:
        weights: module name -> pair with its scaling.
        name: public name: the hub id, or the folder's own name, never a path.
        base_model: name of the backbone that its config states, or None.
        sha256: hash of the weights file.
        info: what grasp-lora wrote beside it.
        targets: endings of the modules that its config names, or empty where it chooses them in another way.
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
    targets: tuple[str, ...] = ()
    base_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    revision: str | None = None
    chat_template: str | None = None

    @property
    def backbone(self) -> str | None:
        """What to load its backbone by."""
        return _to_load(self.base_model, self.info)

    @property
    def highest_rank(self) -> int:
        """The rank of the module that has the highest."""
        return max(pair.rank for pair in self.weights.values())

    @property
    def facts(self) -> dict[str, list[Any]]:
        """What the file of weights does not hold and decides as much: scaling and segments of each module, as JSON values."""
        return {
            name: [pair.scaling, [[one.name, one.rank] for one in pair.segments]] for name, pair in self.weights.items()
        }

    @property
    def identity(self) -> str:
        """Hash of the weights file and of `facts`: it changes with `lora_alpha`, too."""
        return hashlib.sha256(json.dumps([self.sha256, self.facts], sort_keys=True).encode()).hexdigest()


def read_adapter(place: str | Path, *, offline: bool = False) -> LoadedAdapter:
    """Read a LoRA adapter from a PEFT folder or a hub id.

    Raises:
        AdapterError: it is missing, no safetensors LoRA, holds what cannot be merged right, does not agree with its own config,
            or holds a number that is not finite.
    """
    folder, shown = expanded(place), escaped(str(place))
    local = is_folder(folder)
    if not local:
        folder = _download(str(place), offline)
    file = folder / WEIGHTS_FILE
    try:
        config = read_config(folder, escaped(folder.name) if local else shown)
        info = _read_info(folder)
        _check_place(folder)
        with about(WEIGHTS_FILE):
            factors, base = _match_factors(read_shapes(file), config)
            _check_origins(info, config, factors)
            tensors = read_tensors(file, as_stored=frozenset(base.values()))
        digest, template = sha256_of(file), _read_chat_template(folder)
    except RefusedError as error:
        raise AdapterError(f"adapter {shown}: {error}") from error
    except OSError as error:  # the folder may be closed to us
        raise AdapterError(f"adapter {shown} cannot be read: {error.strerror or error}") from error
    origins, pairs = info.origins(), {}
    for name, keys in factors.items():
        scaling = config.scaling_of(name, config.rank_of(name))
        pairs[name] = LoraPair(tensors[keys["A"]], tensors[keys["B"]], scaling, origins.get(name, ()))
    own_name = escaped(folder.resolve().name) if local else shown
    beside = {module: tensors[key] for module, key in base.items()}
    return LoadedAdapter(
        AdapterWeights(pairs),
        own_name,
        config.base_model,
        digest,
        info,
        config.targets,
        beside,
        config.revision,
        template,
    )


def read_base_model(folder: str) -> str | None:
    """Return the backbone that the adapter in a folder names.

    Raises:
        AdapterError: its config is not there, or cannot be used.
    """
    try:
        return read_config(expanded(folder), escaped(folder)).base_model
    except RefusedError as error:
        raise AdapterError(f"adapter {escaped(folder)}: {error}") from error


def read_backbone(place: str) -> str | None:
    """Return what to load the backbone of an adapter by, as `LoadedAdapter.backbone` says; from the hub its configs alone come.

    Raises:
        AdapterError: there is no such adapter, or its config cannot be used.
    """
    folder = expanded(place) if is_folder(expanded(place)) else _download(place, False, [CONFIG_FILE, OUR_FILE])
    try:
        return _to_load(read_config(folder, escaped(place)).base_model, _read_info(folder))
    except RefusedError as error:
        raise AdapterError(f"adapter {escaped(place)}: {error}") from error


def _to_load(base_model: str | None, info: AdapterInfo) -> str | None:
    """Tell the embedded weights from those of the hub, whose name our adapters state for both; others know only the hub's."""
    # Earlier versions did not say which, and their users seldom had the hub's.
    ours = info.backbone_fingerprint is not None if info.embedded is None else info.embedded
    return EMBEDDED_NAME if base_model == EMBEDDED_HUB_ID and ours else base_model


def _download(
    hub_id: str, offline: bool, wanted: Sequence[str] = (CONFIG_FILE, WEIGHTS_FILE, OUR_FILE, CHAT_FILE)
) -> Path:
    """Fetch the files that count, and not the gigabytes that may lie beside them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        with no_network(offline):
            return Path(snapshot_download(hub_id, allow_patterns=list(wanted), local_files_only=offline))
    except (HFValidationError, OSError) as error:  # network, authorisation and missing repositories are OSErrors
        raise AdapterError(f"adapter {escaped(hub_id)}: {not_there(error)}") from error


def _read_info(folder: Path) -> AdapterInfo:
    file = folder / OUR_FILE
    if not is_there(file):
        return AdapterInfo()
    with about(OUR_FILE):
        content = read_json_object(file, MOST_BYTES)
        try:
            return validated(AdapterInfo, content)
        except RefusedError as error:
            raise RefusedError(f"{error}; delete that file to do without it") from error


def _read_chat_template(folder: Path) -> str | None:
    file = folder / CHAT_FILE
    if not is_there(file):
        return None
    with about(CHAT_FILE):
        try:
            return read_bounded(file, MOST_BYTES).decode()
        except UnicodeDecodeError as error:
            raise RefusedError("it is not UTF-8") from error


def _check_place(folder: Path) -> None:
    """Refuse a folder without the one file of weights, with the way out."""
    if is_there(folder / WEIGHTS_FILE):
        return
    names = {path.name for path in folder.iterdir()}
    found, fix = "the file is missing", "save it again with PEFT's save_pretrained"
    if pickled := [name for name in _PICKLES if name in names]:
        found = f"it holds {pickled[0]}, a pickle, which is never loaded, since it can run any program"
        fix = "if you trust it, load it with PEFT and save it again with save_pretrained"
    elif any(name.startswith("adapter_model") and name.endswith((".index.json", ".safetensors")) for name in names):
        found = "the adapter is sharded"
        fix = "load it with PEFT and save it again with save_pretrained"
    raise RefusedError(f"no {WEIGHTS_FILE} ({found}); {fix}, which writes one safetensors file")


def _match_factors(
    shapes: Mapping[str, tuple[int, ...]], config: AdapterConfig
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return module -> factor A or B -> its key in the file, and module -> key of a base weight; all shapes fit the config."""
    factors: dict[str, dict[str, str]] = {}
    base: dict[str, str] = {}
    if embedding := next((key for key in shapes if ".lora_embedding_" in key), None):
        raise RefusedError(
            f"the adapter changes an embedding ({embedding}), which cannot be merged; train one on linear layers only"
        )
    for key, shape in shapes.items():
        module, _, rest = key.removeprefix(PREFIX).rpartition(".lora_")
        if not module and key.endswith(".weight") and len(shape) == 2:
            base[key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")] = key
            continue
        if not module or rest not in ("A.weight", "B.weight"):
            raise RefusedError(f"it holds {key}, which is no LoRA factor of a linear layer and cannot be merged")
        if len(shape) != 2:
            raise RefusedError(f"{key} has shape {shape}; only linear layers can be merged")
        keys = factors.setdefault(module, {})
        if rest[0] in keys:
            raise RefusedError(f"factor {rest[0]} of {module} stands twice, once with and once without {PREFIX!r}")
        keys[rest[0]] = key
    if not factors:
        raise RefusedError("it holds no LoRA weights")
    if len(factors) * config.effort > MOST_EFFORT:
        raise RefusedError(
            f"{len(factors)} modules are too many for the patterns of {CONFIG_FILE}; give it fewer exceptions"
        )
    for module, keys in factors.items():
        if len(keys) < 2:
            raise RefusedError(f"{module} has only factor {next(iter(keys))}; both A and B are needed")
        rank = config.rank_of(module)
        for factor, stored in (("A", shapes[keys["A"]][0]), ("B", shapes[keys["B"]][1])):
            if stored != rank:
                raise RefusedError(
                    f"factor {factor} of {module} has rank {stored}, its config says {rank}; "
                    f"the weights and {CONFIG_FILE} are not of the same adapter"
                )
    return factors, base


def _check_origins(info: AdapterInfo, config: AdapterConfig, modules: Mapping[str, object]) -> None:
    for module, rows in info.segments.items():
        if module in modules and rows and sum(rank for _, rank in rows) != config.rank_of(module):
            raise RefusedError(
                f"{OUR_FILE} describes another rank of {module} than its weights have; "
                f"delete {OUR_FILE} if the adapter was trained on or replaced by another program"
            )
