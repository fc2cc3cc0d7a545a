"""adapter_config.json of strangers: its few values that count, checked; what no exact merge could represent, refused.

Nothing that a config names is imported, and no regular expression in it can take long.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from grasp_lora.errors import AdapterError
from grasp_lora.storage.reading import Name, RefusedError, about, is_there, read_json_object, validated
from grasp_lora.text.display import quoted

CONFIG_FILE = "adapter_config.json"
MOST_BYTES = 16_000_000
MOST_RANK = 16_384
MOST_ALPHA = 1e6
MOST_EXPRESSIONS = 64  # patterns that are more than a name, in one table
MOST_PATTERN = 256
_EXPRESSION_EFFORT = 100
# Initialisations that subtract something from the backbone's own weights: the saved factors alone are not the change.
_CHANGES_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Rank = Annotated[int, Field(strict=True, ge=1, le=MOST_RANK)]
Alpha = Annotated[float, Field(strict=True, gt=0, le=MOST_ALPHA)]


class _Stated(BaseModel):
    """The values of the file that are read, under their names there."""

    model_config = ConfigDict(strict=True, frozen=True)

    r: Rank
    lora_alpha: Alpha
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    use_rslora: bool | None = None
    base_model_name_or_path: Name | None = None
    revision: Name | None = None
    target_modules: list[str] | str | None = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    exclude_modules: Any = None

    @property
    def targets(self) -> tuple[str, ...]:
        narrowed = self.layers_to_transform or self.layers_pattern or self.exclude_modules
        return tuple(self.target_modules) if isinstance(self.target_modules, list) and not narrowed else ()


@dataclass(frozen=True)
class Patterns:
    """Exceptions to a rank or an alpha: whether a module is meant, and its value; `effort` as comparisons with a plain name."""

    entries: tuple[tuple[Callable[[str], bool], float], ...]
    effort: int

    def value_of(self, module: str, default: float) -> float:
        """Return the value of the first pattern that means this module, as in PEFT."""
        return next((value for means, value in self.entries if means(module)), default)


@dataclass(frozen=True)
class AdapterConfig:
    """What counts of adapter_config.json.

    Args:
        rank, alpha: of every module that no pattern means.
        ranks, alphas: the exceptions, in order.
        rslora: whether the scaling is alpha / sqrt(rank).
        base_model: name of the backbone, or None.
        targets: endings of the modules that have the adapter, or empty where the config chooses them in another way.
        revision: branch, tag or commit of the backbone on the hub; None for its main branch.
    """

    rank: int
    alpha: float
    ranks: Patterns
    alphas: Patterns
    rslora: bool
    base_model: str | None
    targets: tuple[str, ...]
    revision: str | None

    def rank_of(self, module: str) -> int:
        """Return the rank of a module."""
        return int(self.ranks.value_of(module, self.rank))

    def scaling_of(self, module: str, rank: int) -> float:
        """Return the factor on B @ A of a module of that rank."""
        return self.alphas.value_of(module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    @property
    def effort(self) -> int:
        """What it takes to look up one module."""
        return self.ranks.effort + self.alphas.effort


def read_config(folder: Path, name: str) -> AdapterConfig:
    """Read the config of an adapter folder; `name` is for messages.

    Raises:
        RefusedError: it is missing, malformed, or a value has the wrong type or is out of range.
        AdapterError: it describes an adapter that cannot be merged exactly.
    """
    file = folder / CONFIG_FILE
    if not is_there(file):
        raise RefusedError(f"this is no PEFT adapter: it has no {CONFIG_FILE}")
    with about(CONFIG_FILE):
        content = read_json_object(file, MOST_BYTES)
        _refuse_unmergeable(content, name)
        stated = validated(_Stated, content)
        return AdapterConfig(
            stated.r,
            stated.lora_alpha,
            _patterns("rank_pattern", stated.rank_pattern),
            _patterns("alpha_pattern", stated.alpha_pattern),
            bool(stated.use_rslora),
            stated.base_model_name_or_path,
            stated.targets,
            stated.revision,
        )


def _refuse_unmergeable(config: Mapping[str, Any], name: str) -> None:
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        raise AdapterError(f"adapter {name} is of type {quoted(kind)}; only LORA can be merged")
    bias, start = config.get("bias", "none"), config.get("init_lora_weights")
    reasons = {
        "DoRA": config.get("use_dora"),
        "a trained LoRA bias (lora_bias)": config.get("lora_bias"),
        f"trained biases (bias={quoted(bias)})": bias not in ("none", None),
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
        f"an initialisation that changes the backbone ({quoted(start)})": isinstance(start, str)
        and start.lower().startswith(_CHANGES_BACKBONE),
    }
    if used := next((reason for reason, present in reasons.items() if present), None):
        raise AdapterError(
            f"adapter {name} uses {used}, which cannot be merged exactly; train or convert it to plain LoRA"
        )


def _patterns(key: str, stated: Mapping[str, float] | None) -> Patterns:
    entries, expressions = [], 0
    with about(key):
        for pattern, value in (stated or {}).items():
            if re.fullmatch(r"[\w-]+(\.[\w-]+)*", pattern):
                means = _ending(pattern)
            elif re.fullmatch(r"\^[\w-]+(\\\.[\w-]+)*", pattern):  # a module's whole name, as `config_of` writes it
                means = partial(operator.eq, pattern[1:].replace("\\.", "."))
            else:
                expressions += 1
                if expressions > MOST_EXPRESSIONS:
                    raise RefusedError(
                        f"it holds over {MOST_EXPRESSIONS} regular expressions; name modules in full instead"
                    )
                means = _expression(pattern)
            entries.append((means, value))
    return Patterns(tuple(entries), len(entries) + (_EXPRESSION_EFFORT - 1) * expressions)


def _ending(pattern: str) -> Callable[[str], bool]:
    """A pattern without operators means, as in PEFT, an ending of whole parts, in which a dot stands for any character."""

    def means(module: str) -> bool:
        before, ending = module[: -len(pattern)], module[-len(pattern) :]
        if len(ending) < len(pattern) or (before and not before.endswith(".")):
            return False
        return all(expected in (".", found) for expected, found in zip(pattern, ending, strict=True))

    return means


def _expression(pattern: str) -> Callable[[str], bool]:
    """Any other pattern is matched in time linear in the name, by pydantic's engine: Python's own may take for ever."""
    from pydantic_core import SchemaError, SchemaValidator, core_schema

    if len(pattern) > MOST_PATTERN:
        raise RefusedError(f"a pattern has {len(pattern)} characters; at most {MOST_PATTERN} are allowed")
    schema = core_schema.str_schema(pattern=rf"^(.*\.)?({pattern})$", regex_engine="rust-regex")
    try:
        return SchemaValidator(schema).isinstance_python
    except SchemaError as error:
        raise RefusedError(
            f"the pattern {quoted(pattern)} is no regular expression that can be matched in linear time; "
            "name modules in full, or use no look-around and no back references"
        ) from error
