"""Between PEFT and plain factors: check that adapters fit, put them on a backbone, save them as ordinary PEFT."""

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.models.adapter_files import OUR_FILE, PREFIX, WEIGHTS_FILE, AdapterInfo, Answers, LoadedAdapter
from grasp_lora.models.backbone import Backbone, is_quantised
from grasp_lora.models.backbone import fingerprint as fingerprint_of
from grasp_lora.models.live import (
    ADAPTER_NAME,
    is_conv1d,
    is_named,
    keep_apart,
    linear_modules,
    linear_shape,
    live_pairs,
    lora_layers,
)
from grasp_lora.models.model_settings import ALL_LINEAR, LoraSettings
from grasp_lora.text.display import listed, quoted
from grasp_lora.text.names import without_place

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def check_fits(adapter: LoadedAdapter, backbone: Backbone, *, strict: bool = False) -> None:
    """Check that an adapter belongs on this backbone.

    A different base model name or revision only warns, since paths and hub ids differ for the same model. So do other weights
    where those of one side are quantised, unless `strict`, or where one side is in float16, whose rounding changes the
    fingerprint.

    Raises:
        AdapterError: a module does not exist, a shape differs, or the adapter was trained on another backbone's weights or has
            changed them.
    """
    model, info, stated = backbone.model, adapter.info, adapter.info.backbone_fingerprint
    _check_shapes(model, adapter.weights, f"adapter {adapter.name}", f"backbone {backbone.name}")
    _check_base_weights(adapter, backbone)
    name, on = quoted(adapter.name), quoted(backbone.name)
    unchecked = None
    if stated is None:
        made_on, loaded = adapter.revision or "main", backbone.revision or "main"
        if made_on != loaded and adapter.base_model == backbone.name:
            text = "adapter %s was made on revision %s of %s, and %s is loaded; set backbone.revision, or --revision, to that"
            logger.warning(text, name, quoted(made_on), on, quoted(loaded))
        if adapter.base_model and Path(adapter.base_model).name != Path(backbone.name).name:
            text = "adapter %s names base model %s, the backbone is %s; shapes fit, so it is taken as the same model"
            logger.warning(text, name, quoted(adapter.base_model), on)
    elif stated == backbone.fingerprint:
        return
    elif is_quantised(model.config) != info.backbone_quantised and not strict:
        unchecked = f"trained on a {'quantised' if info.backbone_quantised else 'full-precision'} backbone"
    elif (model.dtype == torch.float16) != info.backbone_float16:
        unchecked = "trained in or is read for float16"
    else:
        raise AdapterError(
            f"adapter {adapter.name} was trained on a backbone with fingerprint {stated}, but {backbone.name} has "
            f"{backbone.fingerprint}: same shapes, other weights; use the backbone it was trained on"
        )
    if unchecked is not None:
        text = "adapter %s was %s, so that %s is the same model could not be checked by its weights"
        logger.warning(text, name, unchecked, on)


@contextmanager
def fresh_adapter(model: "PreTrainedModel", settings: LoraSettings, seed: int) -> Iterator["PeftModel"]:
    """Put a new, untrained LoRA adapter on the backbone for the length of the context.

    Its initial values depend on `seed` alone; the global generator is left as it was.

    Raises:
        AdapterError: the backbone lacks one of the target modules, or carries an adapter already.
    """
    from peft import LoraConfig

    targets = check_target_modules(model, settings.target_modules)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides it, so a float is right
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        exclude_modules=_outside_decoder(model, targets) or None,
        task_type="CAUSAL_LM",
        fan_in_fan_out=_transposed(model, targets),
    )
    named = {name for name in linear_modules(model) if is_named(name, targets)} - set(config.exclude_modules or ())
    with _injected(model, config, named, seed) as peft_model:
        yield peft_model


@contextmanager
def attached(model: "PreTrainedModel", weights: AdapterWeights, *, dropout: float = 0.0) -> Iterator["PeftModel"]:
    """Put given weights on the backbone as a trainable PEFT LoRA adapter for the length of the context.

    It is an ordinary one, unless the weights keep adapters apart: then save it with `adapter_weights` and `save_adapter`.

    Raises:
        AdapterError: the backbone lacks one of the modules, has it in another shape, or carries an adapter already.
    """
    check_target_modules(model, tuple(weights))
    _check_shapes(model, weights, "the adapter", "the backbone")
    with _injected(model, config_of(weights.together(), model, dropout), set(weights)) as peft_model:
        with torch.no_grad():
            for name, layer in lora_layers(peft_model).items():
                if weights[name].apart:
                    keep_apart(layer, ADAPTER_NAME, weights[name].segments)
            for name, pair in live_pairs(peft_model).items():
                pair.A.copy_(weights[name].A)
                pair.B.copy_(weights[name].B)
        yield peft_model


def config_of(weights: AdapterWeights, model: "PreTrainedModel", dropout: float = 0.0) -> "LoraConfig":
    """Return the PEFT config that describes these weights: commonest rank first, exceptions as patterns."""
    from peft import LoraConfig

    rank = Counter(pair.rank for pair in weights.values()).most_common(1)[0][0]
    alphas = {name: _alpha(pair.scaling, pair.rank) for name, pair in weights.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=_shortest_targets(tuple(weights), model),
        rank_pattern={_anchored(name): pair.rank for name, pair in weights.items() if pair.rank != rank},
        alpha_pattern={_anchored(name): value for name, value in alphas.items() if value != alpha},
        task_type="CAUSAL_LM",
        fan_in_fan_out=_transposed(model, tuple(weights)),
    )


def save_adapter(
    folder: str | Path,
    weights: AdapterWeights,
    model: "PreTrainedModel",
    *,
    backbone_name: str,
    dropout: float,
    fingerprint: str | None = None,
    answers: Answers | None = None,
    quantise: str | None = None,
    dtype: str | None = None,
    embedded: bool = False,
    revision: str | None = None,
    rows: Iterable[str] = (),
) -> None:
    """Write weights as an ordinary PEFT adapter folder, with our own facts in a file beside it.

    Args:
        folder: made if missing.
        weights: the adapter; those kept apart in it are added up.
        model: the backbone without adapters, for the shortest list of target modules.
        backbone_name: name of the backbone; of an absolute path only the last part is written, and the fingerprint tells it.
        fingerprint: of the backbone, checked when the adapter is read again; None takes it from the model, and all
            processes of a sharded one then have to call this.
        dropout: kept in the config, so that training may go on.
        answers: how it is asked and answers, for `grasp-lora predict`.
        quantise: how the backbone was quantised for the training, if it was.
        dtype: what it computed in then; None where that is not known.
        embedded: whether it is the embedded model, which others know by the name of the hub's.
        revision: branch, tag or commit of the backbone on the hub; None for its main branch and for a folder.
        rows: hashes of its training rows, see `AdapterInfo`; a recipe that tests on such a row refuses it.

    Raises:
        AdapterError: the backbone lacks one of the modules, or it is no linear layer of that shape.
    """
    from safetensors.torch import save

    folder, weights = Path(folder), weights.together()
    _check_shapes(model, weights, "the adapter", "the backbone")
    config = config_of(weights, model, dropout)
    config.base_model_name_or_path, config.revision = without_place(backbone_name), revision
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {}
    for name, pair in weights.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.A.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.B.contiguous()
    # Not by save_file, which lets nobody but the owner read the file.
    (folder / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
    info = AdapterInfo(
        fingerprint_of(model) if fingerprint is None else fingerprint,
        is_quantised(model.config),
        {
            name: tuple((part.name, part.rank) for part in pair.segments)
            for name, pair in weights.items()
            if pair.segments
        },
        answers,
        quantise,  # type: ignore[arg-type]
        model.dtype == torch.float16,
        dtype,  # type: ignore[arg-type]
        embedded,
        tuple(sorted(rows)),
    )
    _write_info(folder, {key: value for key, value in asdict(info).items() if value not in (None, False)})


def restate_answers(folder: Path, answers: Answers) -> None:
    """Write anew how a saved adapter is asked and answers: no part of its training, so another recipe may have it otherwise."""
    _write_info(folder, json.loads((folder / OUR_FILE).read_text(encoding="utf-8")) | {"answers": asdict(answers)})


def _write_info(folder: Path, stated: dict[str, Any]) -> None:
    (folder / OUR_FILE).write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")


def _check_shapes(model: torch.nn.Module, weights: AdapterWeights, adapter: str, backbone: str) -> None:
    modules = dict(model.named_modules())
    for name, pair in weights.items():
        shape = linear_shape(modules[name]) if name in modules else None
        if shape != pair.shape:
            has = f"has {shape}" if shape else "has no such linear layer"
            raise AdapterError(
                f"{adapter} changes a {name} of shape {pair.shape} (d_out, d_in), but {backbone} {has}; use an adapter of this "
                "backbone"
            )


def _check_base_weights(adapter: LoadedAdapter, backbone: Backbone) -> None:
    """Let pass what the file stores of the backbone only where it is the same, in the coarser of both number formats."""
    parameters = dict(backbone.model.named_parameters(remove_duplicate=False))
    for module, stored in adapter.base_weights.items():
        weight = parameters.get(f"{module}.weight")
        if weight is None or not any(
            torch.equal(weight.detach().cpu().to(dtype), stored.to(dtype)) for dtype in {weight.dtype, stored.dtype}
        ):
            raise AdapterError(
                f"adapter {adapter.name} stores a base weight of {module} that is not the one of {backbone.name}; if it was not "
                "trained, save the adapter again with save_pretrained(save_embedding_layers=False)"
            )


def check_target_modules(model: "PreTrainedModel", target_modules: tuple[str, ...]) -> tuple[str, ...]:
    """Check that every target names a linear module of the backbone; return them, `all-linear` written out.

    Raises:
        AdapterError: one does not; the message lists those that exist.
    """
    linear = linear_modules(model)
    if target_modules == (ALL_LINEAR,):
        whole: Any = model
        head = whole.get_output_embeddings()
        return tuple(_shortest_targets(tuple(name for name, module in linear.items() if module is not head), model))
    for target in target_modules:
        if not any(is_named(name, (target,)) for name in linear):
            endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise AdapterError(f"the backbone has no linear module {target!r}; it has: {endings}")
    return target_modules


def _outside_decoder(model: "PreTrainedModel", target_modules: tuple[str, ...]) -> list[str]:
    """Modules of these names in other parts than the text decoder, such as an image encoder: text never trains them."""
    if model.config.get_text_config(decoder=True) is model.config:
        return []
    text_part: Any = model
    inside = {*text_part.get_decoder().modules(), text_part.get_output_embeddings()}
    return [
        name
        for name, module in linear_modules(model).items()
        if module not in inside and is_named(name, target_modules)
    ]


def _transposed(model: torch.nn.Module, target_modules: tuple[str, ...]) -> bool:
    """Whether PEFT has to transpose the deltas of these modules."""
    return any(is_conv1d(module) for name, module in linear_modules(model).items() if is_named(name, target_modules))


@contextmanager
def _injected(
    model: "PreTrainedModel", config: "LoraConfig", modules: set[str], seed: int = 0
) -> Iterator["PeftModel"]:
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterError("the backbone carries an adapter already; take that one off first")
    # PEFT draws on the CPU and moves the factors afterwards; torch.manual_seed would also seed every GPU.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.24 renamed; nothing for our users to act on.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        torch.default_generator.manual_seed(seed)
        peft_model = get_peft_model(model, config)
    try:
        layers = lora_layers(peft_model)
        if missing := sorted(modules - layers.keys()):  # PEFT takes the experts of some types for the names of an MLP
            raise AdapterError(
                f"PEFT puts no adapter on {listed(missing)} of this model; name others in lora.target_modules"
            )
        for module in layers.values():
            module.lora_A[ADAPTER_NAME].float()
            module.lora_B[ADAPTER_NAME].float()
            # PEFT's new modules are in training mode whatever the backbone's is: its dropout would act on an eval model.
            module.train(module.get_base_layer().training)
        yield peft_model
    finally:
        peft_model.unload()
        # PEFT leaves its config on the backbone and would warn about a second adapter.
        if hasattr(model, "peft_config"):
            del model.peft_config


def _shortest_targets(modules: tuple[str, ...], model: torch.nn.Module) -> list[str]:
    """Name endings such as q_proj where they mean exactly these modules, else the full names."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in modules})
    matched = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in endings}
    return endings if matched == set(modules) else sorted(modules)


def _alpha(scaling: float, rank: int) -> float:
    """The alpha whose alpha / rank is this scaling, whole where possible: (29 / 7) * 7 is not 29 in floats."""
    product = scaling * rank
    return round(product) if round(product) / rank == scaling else product


def _anchored(module: str) -> str:
    """A pattern that PEFT matches against this module alone."""
    return "^" + module.replace(".", r"\.")
