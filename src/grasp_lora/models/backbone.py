"""The backbone: a frozen causal language model with its tokenizer, and a fingerprint to recognise it by.

Also how it is loaded: on which device, in which number format, quantised, or split over processes. The same recipe on the same
kind of machine loads the same numbers on every day.
"""

import gc
import hashlib
import inspect
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import TypeAdapter

from grasp_lora.errors import AdapterError, GraspError, RecipeError
from grasp_lora.models import embedded
from grasp_lora.models.adapter_files import CONFIG_FILE
from grasp_lora.models.model_settings import EMBEDDED_HUB_ID, EMBEDDED_NAME, QUANTISERS, BackboneSettings
from grasp_lora.storage.memory import enough_memory
from grasp_lora.storage.network import hub_problem, no_network, not_there
from grasp_lora.storage.processes import join, on_first_process, world_size
from grasp_lora.storage.reading import expanded, is_folder, is_there, reading
from grasp_lora.text.display import first_line, one_line, quoted
from grasp_lora.text.names import needs, without_place

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from grasp_lora.models.adapter_files import LoadedAdapter

logger = logging.getLogger(__name__)

_SMALLER = "set backbone.quantise to nf4, or backbone.dtype to bfloat16 if it is float32, or take a smaller model"
UNTRAINABLE = ("hqq", "torchao")  # methods of a saved model
AT_ONCE = 1 << 24  # numbers
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number
SAMPLED_WEIGHTS = 16  # of every parameter, in a fingerprint
FINGERPRINT_FACTS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip


@dataclass
class Backbone:
    """A loaded backbone: no gradients, eval mode, on its device.

    Args:
        tokenizer: has an EOS token and a pad token.
        name: the public name for reports and run files, of a folder only its own where the settings give an absolute path.
        fingerprint: see `fingerprint`.
        stop_ids: tokens that end an answer, see `find_stop_ids`.
        commit: of a model on the hub; None for a folder and for the embedded model.
        quantise: how its weights were quantised here, see `BackboneSettings`.
        revision: the branch, tag or commit that was asked for.
        weight_sum: see `weight_sum`; None where a commit or the embedded model says which weights they are.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    fingerprint: str
    stop_ids: tuple[int, ...]
    commit: str | None = None
    quantise: str | None = None
    revision: str | None = None
    weight_sum: int | None = None

    @property
    def base_model(self) -> str:
        """The name that an adapter on it states, by which others can load it."""
        return EMBEDDED_HUB_ID if self.is_embedded else self.name

    @property
    def is_embedded(self) -> bool:
        """Whether it is the model that comes with us, and not the hub's of the same name, whose weights are others."""
        return self.name == embedded.PUBLIC_NAME


def load_backbone(settings: BackboneSettings) -> Backbone:
    """Load the model and its tokenizer, ready for adapters.

    Models that come quantised (those with a `quantization_config`) are loaded as they are. Weights come from safetensors
    only. The embedded model is converted once into the user's cache folder.

    Raises:
        GraspError: the model is missing, gated, not cached while offline, incomplete, not a causal language
            model, or has no usable tokenizer; it cannot be quantised as asked; or the device is not there.
    """
    gc.collect()  # of a training before this: its trainer, and so its backbone, holds itself
    device, started = _device_for(settings), time.perf_counter()
    is_embedded = settings.name == EMBEDDED_NAME
    name = embedded.PUBLIC_NAME if is_embedded else settings.name
    location = str(embedded.embedded_folder() if is_embedded else expanded(name) if is_folder(expanded(name)) else name)
    if settings.trust_remote_code and not is_embedded:
        text = "trust_remote_code is on: Python code that comes with %s will run on this machine"
        logger.warning(text, one_line(name))
    with _explained(name), _without_bars():
        model, tokenizer = _load(location, settings, device)
        stop_ids = find_stop_ids(model, tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError("its tokenizer has no EOS token, so answers could not end; add one to it")
    rows = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:  # added to it, but not to the model
        tokenizer.pad_token = tokenizer.eos_token  # safe: padding is always covered by an attention mask
    if is_embedded:
        # PEFT writes this name into adapter_config.json: it must be one that others can load the adapter on.
        model.name_or_path = model.config._name_or_path = EMBEDDED_HUB_ID
        tokenizer.name_or_path = EMBEDDED_HUB_ID
    model.requires_grad_(False)
    model.eval()
    seconds = time.perf_counter() - started
    logger.info("Loaded backbone %s in %s on %s (%.1f s)", name, model.dtype, device, seconds)
    commit = _commit_of(location, settings.revision)
    total = weight_sum(model) if commit is None and not is_embedded else None
    facts = (commit, settings.quantise, settings.revision, total)
    return Backbone(model, tokenizer, without_place(name), fingerprint(model), stop_ids, *facts)


@contextmanager
def _without_bars() -> Iterator[None]:
    """No bar of transformers inside the context: it would be drawn through ours. Those of downloads stay."""
    from transformers.utils import logging as library

    before = library.set_tqdm_hook(lambda bar, arguments, options: bar(*arguments, **{**options, "disable": True}))
    try:
        yield
    finally:
        library.set_tqdm_hook(before)


def backbone_of(
    adapter: "LoadedAdapter",
    named: str | None,
    device: str,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    whole: bool = False,
) -> Backbone:
    """Load the backbone of an adapter: the one given by the user, or else the one that the adapter names.

    It is quantised as it was when the adapter was trained, unless `whole` asks for all bits of its weights. It has the dtype of
    the training, too, unless another is given, the adapter does not say which, or this processor does not compute in it.

    Raises:
        GraspError: there is no name, a setting is not allowed, or the backbone cannot be loaded.
    """
    name = named or adapter.backbone
    if adapter.revision is not None and revision is None and (named is None or named == adapter.base_model):
        revision = adapter.revision
        logger.info("adapter %s names revision %s of %s", quoted(adapter.name), quoted(revision), quoted(name or ""))
    if not name:
        raise AdapterError(f"adapter {adapter.name} does not name its base model; give it with --backbone")
    asked = {
        "name": name,
        "dtype": dtype or _dtype_of_training(adapter, device),
        "device": device,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "quantise": None if whole else adapter.info.quantise,
    }
    with reading("backbone", RecipeError):
        settings = TypeAdapter(BackboneSettings).validate_python(asked)
    try:
        return load_backbone(settings)
    except GraspError as error:
        hint = "" if named else f" (adapter {adapter.name} names this backbone; give its folder with --backbone)"
        raise type(error)(f"{error}{hint}") from error


def _dtype_of_training(adapter: "LoadedAdapter", device: str) -> str:
    trained_in = adapter.info.backbone_dtype
    if trained_in is None:
        return "auto"
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    # Codes depend on it; those of float16 are only warned of, see `check_fits`.
    needed = adapter.info.backbone_quantised and trained_in == "bfloat16"
    return trained_in if needed or computes_in(trained_in, kind) else "auto"


def find_stop_ids(model: torch.nn.Module, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Collect the tokens that end an answer: the EOS of the tokenizer and all those of the model, ascending."""
    config = getattr(without_peft(model), "generation_config", None)
    stated = config.eos_token_id if config is not None else None
    ids = set(stated) if isinstance(stated, (list, tuple)) else {stated}
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


def is_split(model: Any) -> bool:
    """Whether `backbone.shard` has split a model over several processes: all of them have to call it equally often."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def calls_behind(model: Any, calls: int) -> int:
    """How many calls of a split model this process has to add to make as many as the busiest one; 0 of a whole model."""
    if not is_split(model):
        return 0
    most = torch.tensor(calls, device=model.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most) - calls


def fingerprint(model: torch.nn.Module) -> str:
    """Compute 16 hexadecimal digits that tell one backbone from another, LoRA layers on top of it left out.

    They cover the shape facts of the config and 16 weights of every parameter, rounded to bfloat16: a checkpoint has
    one fingerprint, loaded in bfloat16 or in float32, split or not; float16 may give it another. Quantised weights count as
    they are stored, so that a backbone has another fingerprint for each way of quantising it. It recognises, it does not
    protect: a model altered on purpose can keep its fingerprint.
    """
    inner = without_peft(model)
    config = inner.config.get_text_config(decoder=True)
    digest = hashlib.sha256(json.dumps({fact: fact_of(config, fact) for fact in FINGERPRINT_FACTS}).encode())
    names = {}
    for name, parameter in inner.named_parameters():
        if ".lora_" not in name and ".modules_to_save." not in name:
            names[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = parameter
    for name, parameter in sorted(names.items()):
        # One parameter at a time; of a split model all processes ask for it together.
        gathered = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        flat = gathered.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED_WEIGHTS)][:SAMPLED_WEIGHTS]
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{list(parameter.shape)}{sample.tolist()}".encode())
    return digest.hexdigest()[:16]


def fact_of(config: "PretrainedConfig", name: str) -> Any:
    """Return a fact of a config: None where it has none, a list with one for each layer where layers differ, as in Gemma 4."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # of transformers, which gives no such fact of the whole
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def find_dtype(device: str, model_type: str = "") -> Literal["bfloat16", "float16", "float32"]:
    """Return the dtype that "auto" stands for, by a fixed rule: the same recipe gives the same numbers on every day.

    bfloat16 on CUDA cards that compute in it, on processors with AMX, where products take a fifth of the time, and on those of
    AMD with AVX512-BF16, where a training step takes half. float16 on other CUDA cards (T4, V100), but for Gemma: hidden states
    of Gemma 3 270M reach 1e5, and float16 ends at 65,504. float32 elsewhere: Intel's AVX512-BF16 without AMX, as some virtual
    machines show it, is slower in bfloat16 (`lab/log.md`).

    Args:
        device: "cpu", "cuda" or "cuda:N".
        model_type: of the backbone's config.
    """
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        return "float32" if model_type.startswith("gemma") else "float16"
    features = _capabilities()
    fast = features.get("amx_bf16") or (features.get("avx512_bf16") and "AuthenticAMD" in _processor())
    return "bfloat16" if fast else "float32"


def computes_in(dtype: str, device: str) -> bool:
    """Whether a device computes in a number format itself: by way of another one a processor takes eight times as long.

    Args:
        dtype: "bfloat16", "float16" or "float32".
        device: "cpu", "cuda" or "cuda:N".
    """
    if device != "cpu":
        return dtype != "bfloat16" or torch.cuda.is_bf16_supported(including_emulation=False)
    has_bfloat16 = any(_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return dtype == "float32" or (dtype == "bfloat16" and has_bfloat16)


def _capabilities() -> dict[str, Any]:
    """What the processor can do, where torch tells."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def _processor() -> str:
    """What Linux says of the processor, its maker included; nothing elsewhere."""
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return ""


def is_quantised(config: "PretrainedConfig") -> bool:
    """Whether a backbone's weights are stored in fewer bits than they are computed with."""
    return getattr(config, "quantization_config", None) is not None


def keep_exact(model: torch.nn.Module) -> None:
    """Let bitsandbytes' layers compute on a processor in eval mode as they do in training.

    By default a 4-bit layer on a processor with AVX512-BF16 packs its weight for a kernel without backward as soon as it is
    evaluated, and no later training would change anything; an 8-bit layer rounds activations to 8 bits, in eval mode alone.
    """
    for module in model.modules():
        layer: Any = module
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        state = getattr(layer, "state", None)
        if hasattr(state, "has_fp16_weights") and layer.weight.device.type == "cpu":
            always = property(lambda _: True, lambda _, value: None)
            state.__class__ = type("Exact", (state.__class__,), {"is_training": always})


def weight_sum(model: torch.nn.Module) -> int:
    """Add up the stored numbers of all parameters as integers, LoRA layers left out: exact, in whatever order.

    Scales that a quantiser keeps beside its codes are left out. Of a split model all processes ask for it together.
    """
    total = 0
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight = (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()
        numbers = weight.contiguous().view(INTEGERS[weight.element_size()]).flatten()
        for first in range(0, numbers.numel(), AT_ONCE):  # a sum in int64 makes a copy of what it adds up
            total += int(numbers[first : first + AT_ONCE].sum(dtype=torch.int64))
    return total


def _kind(config: "PretrainedConfig") -> str:
    """How a quantised backbone was quantised."""
    stated: Any = config.quantization_config  # a dict in a file, an object once it is loaded
    method = stated.get("quant_method") if isinstance(stated, dict) else stated.quant_method
    return str(getattr(method, "value", method))


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what transformers raises into one line."""
    try:
        with enough_memory(f"backbone {name!r}", _SMALLER):
            yield
    except GraspError:
        raise
    # On a damaged or hostile folder the libraries raise whatever comes first: KeyError, ZeroDivisionError, Exception itself.
    except Exception as error:
        reason, is_local = first_line(error), name == embedded.PUBLIC_NAME or is_folder(expanded(name))
        if problem := hub_problem(error):
            reason = problem
        elif "trust_remote_code" in str(error):
            reason = "it needs Python code of its own; read that code, then set trust_remote_code to true"
        elif not isinstance(error, OSError | ValueError | ImportError):
            reason = f"its files are damaged or do not fit each other ({type(error).__name__}: {reason})"
        elif not is_local and isinstance(error, OSError):
            reason = not_there(error)
        raise GraspError(f"Cannot load backbone {name!r}: {reason}") from error


def _commit_of(location: str, revision: str | None) -> str | None:
    """Return the commit of a model on the hub whose config has just been read; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    config = None if is_folder(Path(location)) else try_to_load_from_cache(location, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def _device_for(settings: BackboneSettings) -> str:
    """Return "cpu", or a GPU as "cuda:0".

    Raises:
        GraspError: no GPU is there, or torch cannot compute on it, or there is nothing to split the backbone over.
    """
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise GraspError("backbone device is 'cuda', but torch sees no CUDA GPU: use 'auto' or 'cpu'")
    on_cpu = settings.device == "cpu" or not available
    if settings.shard and world_size() == 1:
        raise GraspError(
            "backbone.shard is true, but there is one process: start it with torchrun --nproc-per-node N -m grasp_lora run, "
            "or set backbone.shard to false"
        )
    if on_cpu:
        return "cpu"
    # Under torchrun each process has one; where each sees only its own, that is the first.
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:  # such as a card that is too old for this torch
        raise GraspError(
            f"the GPU cannot be used ({first_line(error)[:200]}): set CUDA_VISIBLE_DEVICES= in the environment to compute on the "
            "processor, or install a torch that supports it"
        ) from error
    return device


def _read_config(location: str, settings: BackboneSettings, source: dict[str, Any]) -> "PretrainedConfig":
    """Read the config of a model and check that it is one that can be loaded and trained on here.

    Raises:
        ValueError: it is no causal language model, asks for foreign code, or comes quantised in a way nothing trains on.
    """
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(location, **source)
    architectures = config.architectures or []
    if config.is_encoder_decoder or any(str(name).endswith("ForMaskedLM") for name in architectures):
        # AutoModelForCausalLM would load it, but not as a language model that reads left to right.
        raise ValueError(f"{architectures[0] if architectures else config.model_type} is not a causal language model")
    kernels = [part._attn_implementation for part in (config, config.get_text_config(decoder=True))]
    foreign = [name for name in kernels if name is not None and "/" in name]
    if foreign and not settings.trust_remote_code:  # transformers would fetch and run it
        raise GraspError(
            f"The config of the backbone asks for compiled attention code of the hub ({quoted(foreign[0])}): read that "
            "code, then set trust_remote_code to true, or remove the entry"
        )
    stated, problem = _kind(config) if is_quantised(config) else None, None
    if settings.shard and (stated or settings.quantise):
        problem = "it is quantised, and only full weights can be split: leave out backbone.quantise or backbone.shard"
    elif stated and (settings.quantise or stated in UNTRAINABLE):
        advice = "leave backbone.quantise out" if settings.quantise else "take its full-precision model to train on"
        problem = f"it comes quantised by {quoted(stated)}, and is taken as it is; {advice}"
    if problem:
        raise ValueError(problem)
    return config


def _quantiser(name: str, dtype: torch.dtype) -> Any:
    """Return what `from_pretrained` takes as `quantization_config`.

    Args:
        name: a key of `QUANTISERS`.
        dtype: what is computed in.

    Raises:
        RecipeError: the library is not installed.
    """
    library = QUANTISERS[name]
    needs(f"backbone.quantise: {name}", library, library, extra="quant")
    # It warns at each product that activations are rounded to float16.
    logging.getLogger(library).setLevel(logging.ERROR)
    with no_network():  # bitsandbytes fetches compiled code from the hub where it can
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig

        of_four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return BitsAndBytesConfig(**({"load_in_8bit": True} if name == "int8" else of_four_bits))  # type: ignore[no-untyped-call]


def _load(location: str, settings: BackboneSettings, device: str) -> tuple[Any, "PreTrainedTokenizerBase"]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.distributed.configuration_utils import DistributedConfig

    source = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    if is_folder(Path(location)):
        problem = None if settings.revision is None else f"has no revision {quoted(settings.revision)}: leave that out"
        if is_there(Path(location) / CONFIG_FILE):  # transformers would put the adapter on the model
            problem = f"holds an adapter ({CONFIG_FILE}): give the model that it was trained on, alone"
        if problem:
            raise ValueError(f"the folder {problem}")
    config = _read_config(location, settings, source)
    packed = settings.quantise is not None or is_quantised(config)
    tokenizer = AutoTokenizer.from_pretrained(location, **source)
    dtype: str = settings.dtype
    if dtype == "auto":  # of processes on machines of several kinds the first one decides
        join(settings.device)
        dtype = on_first_process(lambda: find_dtype(device, config.model_type))
    more: dict[str, Any] = {}
    if settings.quantise is not None:
        more["quantization_config"] = _quantiser(settings.quantise, getattr(torch, dtype))
    if settings.shard:
        join(settings.device)
        more["distributed_config"] = DistributedConfig(fsdp_size=world_size())
    result: Any = AutoModelForCausalLM.from_pretrained(
        location,
        config=config,
        dtype=getattr(torch, dtype),
        # Quantised weights are packed for the device they arrive on, and refuse `.to` later; to a GPU all go directly.
        device_map={"": device} if packed or (device != "cpu" and not settings.shard) else None,
        use_safetensors=True,
        output_loading_info=True,
        **more,
        **source,
    )
    model, loaded = result
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("it comes with an adapter, which transformers has put on it: take the model alone")
    if missing := sorted(loaded["missing_keys"]):  # transformers would fill them with random numbers
        raise ValueError(f"the checkpoint lacks {len(missing)} weights of the language model, first {missing[0]}")
    if unexpected := sorted(loaded["unexpected_keys"]):
        text = "the checkpoint of backbone %s holds %d weights that its config has no place for, first %s; they are left out"
        logger.warning(text, one_line(settings.name), len(unexpected), one_line(unexpected[0]))
    keep_exact(model)
    if settings.shard:
        model.set_reshard_after_forward(True)  # else norm and head stay whole in each process after a pass
    elif not packed:
        model.to(device)
    return model, tokenizer
