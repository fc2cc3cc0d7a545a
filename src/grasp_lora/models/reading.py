"""Adapter folders of strangers: what PEFT wrote is read, checked against itself, and turned into plain factors.

Only safetensors files are read, and only after their header and the config agree.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.models.adapter_config import (
    CONFIG_FILE,
    MOST_BYTES,
    MOST_RANK,
    AdapterConfig,
    check_text,
    read_config,
)
from grasp_lora.models.tensor_files import TensorFacts, read_header, read_tensors
from grasp_lora.storage.network import no_network, not_there
from grasp_lora.storage.reading import RefusedError, about, is_folder, is_there, read_json_object
from grasp_lora.text.display import CONTROLS, escaped, quoted

WEIGHTS_FILE = "adapter_model.safetensors"
OUR_FILE = "grasp_lora.json"
PREFIX = "base_model.model."
MOST_EFFORT = 5_000_000  # comparisons of modules with patterns, a few seconds
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter read from a folder.

    Args:
        weights: module name -> pair with its scaling.
        name: public name: the hub id, or the folder's own name, never a path.
        base_model: name of the backbone that its config states, or None.
        sha256: hash of the weights file.
        info: what grasp-lora wrote beside it (fingerprint of the backbone, origin of components, how it answers), or empty.
        targets: endings of the modules that its config names, or empty where it chooses them in another way.
    """

    weights: AdapterWeights
    name: str
    base_model: str | None
    sha256: str
    info: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ()

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
    folder = Path(place)
    shown = escaped(str(place))
    local = is_folder(folder)
    if not local:
        folder = _download(str(place), offline)
    try:
        config = read_config(folder, escaped(folder.name) if local else shown)
        info, origins = _read_info(folder)
        _check_place(folder)
        with about(WEIGHTS_FILE):
            modules = _match_factors(read_header(folder / WEIGHTS_FILE), config)
            scalings = {name: config.scaling_of(name, rank) for name, (_, rank) in modules.items()}
            _check_origins(origins, {name: rank for name, (_, rank) in modules.items()})
            tensors = read_tensors(folder / WEIGHTS_FILE)
            digest = _hash(folder / WEIGHTS_FILE)
    except RefusedError as error:
        raise AdapterError(f"adapter {shown}: {error}") from error
    except OSError as error:  # the folder may be closed to us
        raise AdapterError(f"adapter {shown} cannot be read: {error.strerror or error}") from error
    return LoadedAdapter(
        AdapterWeights(
            {
                name: LoraPair(tensors[keys["A"]], tensors[keys["B"]], scalings[name], origins.get(name, ()))
                for name, (keys, _) in modules.items()
            }
        ),
        name=escaped(folder.resolve().name) if local else shown,
        base_model=config.base_model,
        sha256=digest,
        info=info,
        targets=config.targets,
    )


def read_base_model(place: str) -> str | None:
    """Return the backbone that an adapter in a folder or on the hub names; of the latter only the config is fetched.

    Raises:
        AdapterError: there is no such adapter, or its config cannot be used.
    """
    folder = Path(place) if Path(place).is_dir() else _download(place, False, [CONFIG_FILE])
    try:
        return read_config(folder, escaped(place)).base_model
    except RefusedError as error:
        raise AdapterError(f"adapter {escaped(place)}: {error}") from error


def _download(hub_id: str, offline: bool, wanted: Sequence[str] = (CONFIG_FILE, WEIGHTS_FILE, OUR_FILE)) -> Path:
    """Fetch the files that count, and not the gigabytes that may lie beside them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    shown = escaped(hub_id)
    try:
        with no_network(offline):
            return Path(snapshot_download(hub_id, allow_patterns=list(wanted), local_files_only=offline))
    except (HFValidationError, OSError) as error:  # network, authorisation and missing repositories are OSErrors
        raise AdapterError(f"adapter {shown}: {not_there(error)}") from error


def _read_info(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[Segment, ...]]]:
    """Read what `save_adapter` wrote beside the weights: all of it, and where each module's components came from."""
    file = folder / OUR_FILE
    if not is_there(file):
        return {}, {}
    with about(OUR_FILE):
        info = read_json_object(file, MOST_BYTES)
        check_text("backbone_fingerprint", info.get("backbone_fingerprint"))
        _check_answers(info.get("answers", {}))
        origins = {}
        rows_of = info.get("segments", {})
        for module, rows in rows_of.items() if isinstance(rows_of, dict) else [("", None)]:
            if not isinstance(rows, list) or not all(map(_is_segment, rows)):
                raise RefusedError(f"the segments of {quoted(module)} are malformed; delete that file")
            origins[module] = tuple(Segment(label, rank) for label, rank in rows)
        return info, origins


def _check_answers(answers: Any) -> None:
    kinds = {"max_new_tokens": int, "stop": list, "chat_template": bool}
    if (
        not isinstance(answers, dict)
        or any(type(value) is not kinds.get(key, type(value)) for key, value in answers.items())
        or not all(isinstance(stop, str) for stop in answers.get("stop", []))
    ):
        raise RefusedError("the answers are malformed; delete that file")


def _is_segment(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 2:
        return False
    label, rank = row
    return isinstance(label, str) and not CONTROLS.search(label) and type(rank) is int and 1 <= rank <= MOST_RANK


def _check_place(folder: Path) -> None:
    """Refuse a folder without the one file of weights, with the way out."""
    if is_there(folder / WEIGHTS_FILE):
        return
    names = {path.name for path in folder.iterdir()}
    pickled = [name for name in _PICKLES if name in names]
    if pickled:
        raise RefusedError(
            f"no {WEIGHTS_FILE} (it holds {pickled[0]}, a pickle, which is never loaded, since it can run any program); if "
            "you trust it, load it with PEFT and save it again with save_pretrained, which writes safetensors"
        )
    if any(name.startswith("adapter_model") and name.endswith((".index.json", ".safetensors")) for name in names):
        raise RefusedError(
            f"no {WEIGHTS_FILE}, but parts of one: the adapter is sharded; load it with PEFT and save it again with "
            "save_pretrained, which writes one file"
        )
    raise RefusedError(
        f"no {WEIGHTS_FILE} (the file is missing); save it again with PEFT's save_pretrained, which writes safetensors"
    )


def _match_factors(facts: Mapping[str, TensorFacts], config: AdapterConfig) -> dict[str, tuple[dict[str, str], int]]:
    """Return for each module the keys of its factors A and B, whose shapes by the header fit the config, and its rank."""
    embeddings = [key for key in facts if ".lora_embedding_" in key]
    if embeddings:
        raise RefusedError(
            f"the adapter changes an embedding ({embeddings[0]}), which cannot be merged; train one on linear layers only"
        )
    factors: dict[str, dict[str, str]] = {}
    for key, fact in facts.items():
        module, _, rest = key.removeprefix(PREFIX).rpartition(".lora_")
        if not module or rest not in ("A.weight", "B.weight"):
            raise RefusedError(f"it holds {key}, which is no LoRA factor of a linear layer and cannot be merged")
        if len(fact.shape) != 2:
            raise RefusedError(f"{key} has shape {fact.shape}; only linear layers can be merged")
        names = factors.setdefault(module, {})
        if rest[0] in names:
            raise RefusedError(f"factor {rest[0]} of {module} stands twice, once with and once without {PREFIX!r}")
        names[rest[0]] = key
    if not factors:
        raise RefusedError("it holds no LoRA weights")
    if len(factors) * config.effort > MOST_EFFORT:
        raise RefusedError(
            f"{len(factors)} modules are too many for the patterns of {CONFIG_FILE}; give it fewer exceptions"
        )
    modules = {}
    for module, names in factors.items():
        if len(names) < 2:
            raise RefusedError(f"{module} has only factor {next(iter(names))}; both A and B are needed")
        rank = config.rank_of(module)
        for factor, stored in (("A", facts[names["A"]].shape[0]), ("B", facts[names["B"]].shape[1])):
            if stored != rank:
                raise RefusedError(
                    f"factor {factor} of {module} has rank {stored}, its config says {rank}; "
                    f"the weights and {CONFIG_FILE} are not of the same adapter"
                )
        modules[module] = names, rank
    return modules


def _check_origins(origins: Mapping[str, tuple[Segment, ...]], ranks: Mapping[str, int]) -> None:
    for module, rank in ranks.items():
        if origins.get(module) and sum(segment.rank for segment in origins[module]) != rank:
            raise RefusedError(
                f"{OUR_FILE} describes another rank of {module} than its weights have; "
                f"delete {OUR_FILE} if the adapter was trained on or replaced by another program"
            )


def _hash(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise RefusedError(f"it cannot be read: {error.strerror or error}") from error
