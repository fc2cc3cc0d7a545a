"""Between PEFT and plain factors: read adapter folders, put adapters on a backbone, save them as ordinary PEFT.

Only safetensors files are read. What the merge could not represent exactly (DoRA, biases, extra trained modules, adapters
that assume changed backbone weights) is refused by name.
"""

import hashlib
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.training.settings import LoraSettings

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OUR_FILE = "grasp_lora.json"
ADAPTER_NAME = "default"
_PREFIX = "base_model.model."
# Initialisations that subtract something from the backbone's own weights: the saved factors alone are not the change.
_CHANGES_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter read from a folder.

    Args:
        weights: module name -> pair with its scaling.
        name: public name: the hub id, or the folder's own name, never a path.
        base_model: name of the backbone that its config states, or None.
        sha256: hash of the weights file.
        info: what grasp-lora wrote beside it (fingerprint of the backbone, origin of components), or empty.
    """

    weights: AdapterWeights
    name: str
    base_model: str | None
    sha256: str
    info: dict[str, Any] = field(default_factory=dict)


def read_adapter(place: str | Path, *, offline: bool = False) -> LoadedAdapter:
    """Read a LoRA adapter from a PEFT folder or a hub id.

    Raises:
        AdapterError: it is missing, no safetensors LoRA, holds what cannot be merged right, or a number that is not finite.
    """
    folder = Path(place)
    if not folder.is_dir():
        folder = _download(str(place), offline)
    config = _read_json(folder / CONFIG_FILE)
    _refuse_unmergeable(config, folder.name)
    weights_file = folder / WEIGHTS_FILE
    if not weights_file.is_file():
        pickled = [name for name in ("adapter_model.bin", "pytorch_model.bin") if (folder / name).exists()]
        found = f"it holds {pickled[0]}, a pickle, which is never loaded" if pickled else "the file is missing"
        raise AdapterError(
            f"adapter {place}: no {WEIGHTS_FILE} ({found}); save it again with PEFT's save_pretrained, which writes safetensors"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(weights_file)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"adapter {place}: {WEIGHTS_FILE} cannot be read ({error}); copy or save it again"
        ) from error
    info_file = folder / OUR_FILE
    info = _read_json(info_file) if info_file.is_file() else {}
    weights = _pair_up(tensors, config, str(place), _origins(info, str(place)))
    return LoadedAdapter(
        weights,
        name=folder.resolve().name if Path(place).is_dir() else str(place),
        base_model=config.get("base_model_name_or_path"),
        sha256=hashlib.sha256(weights_file.read_bytes()).hexdigest(),
        info=info,
    )


def check_fits(adapter: LoadedAdapter, model: "PreTrainedModel", *, backbone_name: str, fingerprint: str) -> None:
    """Check that an adapter belongs on this backbone.

    A different base model name only warns, since paths and hub ids differ for the same model.

    Raises:
        AdapterError: a module does not exist, a shape differs, or the adapter was trained on another backbone's weights.
    """
    _check_shapes(model, adapter.weights, f"adapter {adapter.name}", f"backbone {backbone_name}")
    stated = adapter.info.get("backbone_fingerprint")
    if stated is not None and stated != fingerprint:
        raise AdapterError(
            f"adapter {adapter.name} was trained on a backbone with fingerprint {stated}, but {backbone_name} has "
            f"{fingerprint}: same shapes, other weights; use the backbone it was trained on"
        )
    if stated is None and adapter.base_model and Path(adapter.base_model).name != Path(backbone_name).name:
        log.warning(
            "adapter %s names base model %s, the backbone is %s; shapes fit, so it is taken as the same model",
            adapter.name,
            adapter.base_model,
            backbone_name,
        )


@contextmanager
def fresh_adapter(model: "PreTrainedModel", settings: LoraSettings, seed: int) -> Iterator["PeftModel"]:
    """Put a new, untrained LoRA adapter on the backbone for the length of the context.

    Its initial values depend on `seed` alone; the global generator is left as it was.

    Raises:
        AdapterError: the backbone lacks one of the target modules, or carries an adapter already.
    """
    from peft import LoraConfig

    check_target_modules(model, settings.target_modules)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=_whole(settings.alpha),  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        use_rslora=settings.rslora,
        task_type="CAUSAL_LM",
        fan_in_fan_out=_transposed(model, settings.target_modules),
    )
    # PEFT draws on the CPU and moves the factors afterwards; torch.manual_seed would also seed every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        peft_model = _inject(model, config)
    try:
        yield peft_model
    finally:
        _remove(peft_model)


@contextmanager
def attached(model: "PreTrainedModel", weights: AdapterWeights, *, dropout: float = 0.0) -> Iterator["PeftModel"]:
    """Put given weights on the backbone as an ordinary, trainable PEFT LoRA adapter for the length of the context.

    Raises:
        AdapterError: the backbone lacks one of the modules, has it in another shape, or carries an adapter already.
    """
    check_target_modules(model, tuple(weights))
    _check_shapes(model, weights, "the adapter", "the backbone")
    peft_model = _inject(model, config_of(weights, model, dropout))
    try:
        with torch.no_grad():
            for name, pair in live_pairs(peft_model).items():
                pair.A.copy_(weights[name].A)
                pair.B.copy_(weights[name].B)
        yield peft_model
    finally:
        _remove(peft_model)


def config_of(weights: AdapterWeights, model: "PreTrainedModel", dropout: float = 0.0) -> "LoraConfig":
    """Return the PEFT config that describes these weights: commonest rank first, exceptions as patterns."""
    from peft import LoraConfig

    rank = Counter(pair.rank for pair in weights.values()).most_common(1)[0][0]
    alphas = {name: _alpha(pair.scaling, pair.rank) for name, pair in weights.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it, so a float is right
        lora_dropout=dropout,
        target_modules=_shortest_targets(tuple(weights), model),
        rank_pattern={_anchored(name): pair.rank for name, pair in weights.items() if pair.rank != rank},
        alpha_pattern={_anchored(name): value for name, value in alphas.items() if value != alpha},
        task_type="CAUSAL_LM",
        fan_in_fan_out=_transposed(model, tuple(weights)),
    )


def live_pairs(
    model: torch.nn.Module, segments: Mapping[str, tuple[Segment, ...]] | None = None, adapter: str = ADAPTER_NAME
) -> dict[str, LoraPair]:
    """Return the pairs of a PEFT model's adapter whose A and B are the live parameters themselves.

    Args:
        model: a PeftModel, or anything that contains its LoRA layers.
        segments: module name -> origin of its components, where known.
        adapter: name of the adapter inside the PEFT model.

    Raises:
        AdapterError: the model has no LoRA layer of that name.
    """
    pairs = {
        name: LoraPair(
            layer.lora_A[adapter].weight,
            layer.lora_B[adapter].weight,
            layer.scaling[adapter],
            (segments or {}).get(name, ()),
        )
        for name, layer in lora_layers(model, adapter).items()
    }
    if not pairs:
        raise AdapterError(f"the model has no LoRA adapter named {adapter!r}; put one on it with peft.get_peft_model")
    return pairs


def adapter_weights(
    model: torch.nn.Module, segments: Mapping[str, tuple[Segment, ...]] | None = None
) -> AdapterWeights:
    """Return a copy of a PEFT model's adapter, in float32 on the CPU."""
    return AdapterWeights(
        {
            name: LoraPair(
                pair.A.detach().float().cpu().clone(),
                pair.B.detach().float().cpu().clone(),
                pair.scaling,
                pair.segments,
            )
            for name, pair in live_pairs(model, segments).items()
        }
    )


def segments_of(weights: AdapterWeights) -> dict[str, tuple[Segment, ...]]:
    """Return module name -> origin of its components, as `live_pairs` takes it."""
    return {name: pair.segments for name, pair in weights.items()}


def save_adapter(
    folder: Path,
    weights: AdapterWeights,
    model: "PreTrainedModel",
    *,
    backbone_name: str,
    fingerprint: str,
    dropout: float,
) -> None:
    """Write weights as an ordinary PEFT adapter folder, with our own facts in a file beside it.

    Args:
        folder: made if missing.
        weights: the adapter.
        model: the backbone without adapters, for the shortest list of target modules.
        backbone_name: public name of the backbone, never a path of a cache.
        fingerprint: of the backbone, checked when the adapter is read again.
        dropout: kept in the config, so that training may go on.
    """
    from safetensors.torch import save_file

    config = config_of(weights, model, dropout)
    config.base_model_name_or_path = backbone_name
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {}
    for name, pair in weights.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = pair.A.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = pair.B.contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    info = {
        "backbone": backbone_name,
        "backbone_fingerprint": fingerprint,
        "segments": {
            name: [[segment.name, segment.rank] for segment in pair.segments]
            for name, pair in weights.items()
            if pair.segments
        },
    }
    (folder / OUR_FILE).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def _check_shapes(model: torch.nn.Module, weights: AdapterWeights, adapter: str, backbone: str) -> None:
    modules = dict(model.named_modules())
    for name, pair in weights.items():
        if name not in modules:
            raise AdapterError(
                f"{adapter} changes {name}, which {backbone} does not have; use an adapter of this backbone"
            )
        shape = _linear_shape(modules[name])
        if shape is None:
            raise AdapterError(
                f"{adapter} changes {name}, which is a {type(modules[name]).__name__} in {backbone}, no linear layer; "
                "use an adapter of this backbone"
            )
        if shape != pair.shape:
            raise AdapterError(
                f"{adapter} fits a {name} of shape {pair.shape} (d_out, d_in), but {backbone} has {shape}; "
                "use an adapter of this backbone"
            )


def check_target_modules(model: torch.nn.Module, target_modules: tuple[str, ...]) -> None:
    """Check that every target names a linear module of the backbone.

    Raises:
        AdapterError: one does not; the message lists those that exist.
    """
    linear = [name for name, module in model.named_modules() if _linear_shape(module) is not None]
    for target in target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise AdapterError(f"the backbone has no linear module {target!r}; it has: {known}")


def _download(hub_id: str, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"], local_files_only=offline))
    except HFValidationError as error:
        raise AdapterError(f"adapter {hub_id}: there is no such folder, and it is no hub id either") from error
    except OSError as error:  # every network, authorisation and missing-repository error of the hub client is one
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterError(
            f"adapter {hub_id}: there is no such folder, and the hub gave: {reason}; check the name, or download it first"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise AdapterError(f"{file.parent.name} is no PEFT adapter: it has no {file.name}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{file.name} of adapter {file.parent.name} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{file.name} of adapter {file.parent.name} must hold a JSON object")
    return content


def _refuse_unmergeable(config: Mapping[str, Any], name: str) -> None:
    kind = str(config.get("peft_type", "none"))
    if kind.upper() != "LORA":
        raise AdapterError(f"adapter {name} is of type {kind}; only LORA can be merged")
    bias = config.get("bias", "none")
    reasons = {
        "DoRA": config.get("use_dora"),
        "a trained LoRA bias (lora_bias)": config.get("lora_bias"),
        f"trained biases (bias={bias!r})": bias not in ("none", None),
        "modules_to_save": config.get("modules_to_save"),
        "trainable_token_indices": config.get("trainable_token_indices"),
        "target_parameters": config.get("target_parameters"),
        "layer_replication": config.get("layer_replication"),
        "QALoRA": config.get("use_qalora"),
        "activated LoRA": config.get("alora_invocation_tokens"),
        "an Arrow router": config.get("arrow_config"),
        "KaSA": config.get("kasa_config"),
        "MonteCLoRA": config.get("monteclora_config"),
        "block-diagonal factors (BD-LoRA)": config.get("use_bdlora"),
    }
    initialisation = str(config.get("init_lora_weights", "")).lower()
    reasons[f"an initialisation that changes the backbone ({initialisation})"] = initialisation.startswith(
        _CHANGES_BACKBONE
    )
    for reason, present in reasons.items():
        if present:
            raise AdapterError(
                f"adapter {name} uses {reason}, which cannot be merged exactly; train or convert it to plain LoRA"
            )


def _pair_up(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    name: str,
    segments: Mapping[str, tuple[Segment, ...]],
) -> AdapterWeights:
    embeddings = [key for key in tensors if ".lora_embedding_" in key]
    if embeddings:
        raise AdapterError(
            f"adapter {name} changes an embedding ({embeddings[0]}), which cannot be merged; train one on linear layers only"
        )
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, rest = key.removeprefix(_PREFIX).rpartition(".lora_")
        if not module or rest not in ("A.weight", "B.weight"):
            raise AdapterError(
                f"adapter {name} holds {key}, which is no LoRA factor of a linear layer and cannot be merged"
            )
        if tensor.ndim != 2:
            raise AdapterError(
                f"adapter {name}: {key} has shape {tuple(tensor.shape)}; only linear layers can be merged"
            )
        values = tensor.float()
        if not torch.isfinite(values).all():
            raise AdapterError(f"adapter {name}: {key} holds NaN or infinity; it is broken, train it again")
        factors.setdefault(module, {})[rest[0]] = values
    if not factors:
        raise AdapterError(f"adapter {name} holds no LoRA weights")
    pairs = {}
    for module, pair in factors.items():
        if len(pair) < 2:
            raise AdapterError(f"adapter {name}: {module} has only factor {next(iter(pair))}; both A and B are needed")
        rank, scaling = _rank_and_scaling(config, module, name)
        for factor, stored in (("A", pair["A"].shape[0]), ("B", pair["B"].shape[1])):
            if stored != rank:
                raise AdapterError(
                    f"adapter {name}: factor {factor} of {module} has rank {stored}, its config says {rank}; "
                    f"the weights and {CONFIG_FILE} are not of the same adapter"
                )
        origin = segments.get(module, ())
        if origin and sum(segment.rank for segment in origin) != rank:
            raise AdapterError(
                f"adapter {name}: {OUR_FILE} describes another rank of {module} than its weights have; "
                f"delete {OUR_FILE} if the adapter was trained on or replaced by another program"
            )
        pairs[module] = LoraPair(pair["A"], pair["B"], scaling, origin)
    return AdapterWeights(pairs)


def _origins(info: Mapping[str, Any], name: str) -> dict[str, tuple[Segment, ...]]:
    """Where each module's components came from, as `save_adapter` wrote it."""
    try:
        return {
            module: tuple(Segment(str(label), int(rank)) for label, rank in rows)
            for module, rows in info.get("segments", {}).items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise AdapterError(f"adapter {name}: the segments in {OUR_FILE} are malformed; delete that file") from error


def _rank_and_scaling(config: Mapping[str, Any], module: str, name: str) -> tuple[int, float]:
    from peft.utils.other import get_pattern_key

    def look_up(pattern: str, default: str) -> Any:
        patterns = config.get(pattern) or {}
        return patterns.get(get_pattern_key(list(patterns), module), config.get(default))

    rank, alpha = look_up("rank_pattern", "r"), look_up("alpha_pattern", "lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(
            f"adapter {name}: r is {rank!r} and lora_alpha is {alpha!r}; both must be numbers, r at least 1"
        )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _inject(model: "PreTrainedModel", config: "LoraConfig") -> "PeftModel":
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterError("the backbone carries an adapter already; take that one off first")
    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.24 renamed; nothing for our users to act on.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        peft_model = get_peft_model(model, config)
    for module in lora_layers(peft_model).values():
        module.lora_A[ADAPTER_NAME].float()
        module.lora_B[ADAPTER_NAME].float()
        # PEFT's new modules are in training mode whatever the backbone's is: its dropout would act on an eval model.
        module.train(module.get_base_layer().training)
    return peft_model


def _remove(peft_model: "PeftModel") -> None:
    backbone = peft_model.unload()
    # PEFT leaves its config on the backbone and would warn about a second adapter.
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config


def lora_layers(model: torch.nn.Module, adapter: str = ADAPTER_NAME) -> dict[str, Any]:
    """Return module name in the backbone -> PEFT's LoRA layer, for the layers that have this adapter."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }


def _linear_shape(module: torch.nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear module, quantised ones included; None for any other module."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.out_features, module.in_features  # type: ignore[return-value]
    return None


def _transposed(model: torch.nn.Module, target_modules: tuple[str, ...]) -> bool:
    """Whether the targets store their weight as [d_in, d_out] (GPT-2's Conv1D)."""
    from transformers.pytorch_utils import Conv1D

    kinds = {
        isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in target_modules)
        and _linear_shape(module) is not None
    }
    if len(kinds) > 1:
        raise AdapterError("the target modules mix Conv1D and Linear layers; PEFT takes one kind in an adapter")
    return kinds == {True}


def _shortest_targets(modules: tuple[str, ...], model: torch.nn.Module) -> list[str]:
    """Name endings such as q_proj where they mean exactly these modules, else the full names."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in modules})
    matched = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in endings}
    return endings if matched == set(modules) else sorted(modules)


def _whole(value: float) -> float:
    """An int where the value is one: other programs read alpha as an integer."""
    return int(value) if float(value).is_integer() else value


def _alpha(scaling: float, rank: int) -> float:
    """The alpha whose alpha / rank is this scaling, whole where possible: (29 / 7) * 7 is not 29 in floats."""
    product = scaling * rank
    return round(product) if round(product) / rank == scaling else product


def _anchored(module: str) -> str:
    """A pattern that PEFT matches against this module alone."""
    return "^" + module.replace(".", r"\.")
