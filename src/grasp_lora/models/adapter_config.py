"""adapter_config.json of strangers: its few values that count, checked; what no exact merge could represent, refused.

Nothing that a config names is imported, and no regular expression in it can take long.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp_lora.errors import AdapterError
from grasp_lora.storage.reading import RefusedError, about, is_there, read_json_object
from grasp_lora.text.display import CONTROLS, quoted

CONFIG_FILE = "adapter_config.json"
MOST_BYTES = 16_000_000
MOST_RANK = 16_384
MOST_ALPHA = 1e6
MOST_TEXT = 1024
MOST_EXPRESSIONS = 64  # patterns that are more than a name, in one table
MOST_PATTERN = 256
_EXPRESSION_EFFORT = 100
# Initialisations that subtract something from the backbone's own weights: the saved factors alone are not the change.
_CHANGES_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Patterns = tuple[tuple[Callable[[str], bool], Any], ...]  # whether a module is meant, and the value for it


@dataclass(frozen=True)
class AdapterConfig:
    """What counts of adapter_config.json, in checked types.

    Args:
        rank, alpha: of every module that no pattern means.
        ranks, alphas: the exceptions, in order.
        rslora: whether the scaling is alpha / sqrt(rank).
        base_model: name of the backbone, or None.
        targets: endings of the modules that have the adapter, or empty where the config chooses them in another way.
    """

    rank: int
    alpha: float
    ranks: Patterns
    alphas: Patterns
    rslora: bool
    base_model: str | None
    targets: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """Return the rank of a module."""
        return int(_look_up(self.ranks, module, self.rank))

    def scaling_of(self, module: str, rank: int) -> float:
        """Return the factor on B @ A of a module of that rank."""
        return float(_look_up(self.alphas, module, self.alpha)) / (math.sqrt(rank) if self.rslora else rank)

    @property
    def effort(self) -> int:
        """What it takes to look up one module, in comparisons with a plain name."""
        matchers = [matches for matches, _ in (*self.ranks, *self.alphas)]
        return sum(_EXPRESSION_EFFORT if isinstance(matches, _Expression) else 1 for matches in matchers)


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
        return AdapterConfig(
            rank=check_rank("r", content.get("r")),
            alpha=_check_alpha("lora_alpha", content.get("lora_alpha")),
            ranks=_patterns("rank_pattern", content.get("rank_pattern"), check_rank),
            alphas=_patterns("alpha_pattern", content.get("alpha_pattern"), _check_alpha),
            rslora=_check_switch("use_rslora", content.get("use_rslora")),
            base_model=check_text("base_model_name_or_path", content.get("base_model_name_or_path")),
            targets=_targets(content),
        )


def check_rank(key: str, value: Any) -> int:
    """Return a rank, from 1 to 16384.

    Raises:
        RefusedError: it is none.
    """
    if type(value) is not int or not 1 <= value <= MOST_RANK:
        raise RefusedError(f"{key} is {quoted(value)}; it must be a whole number from 1 to {MOST_RANK}")
    return value


def check_text(key: str, value: Any) -> str | None:
    """Return a name, or None where there is none.

    Raises:
        RefusedError: it is no text, too long, or holds a control character.
    """
    if value is not None and (not isinstance(value, str) or len(value) > MOST_TEXT or CONTROLS.search(value)):
        raise RefusedError(
            f"{key} is {quoted(value)}; it must be a text of at most {MOST_TEXT} characters, without control characters"
        )
    return value


def _check_alpha(key: str, value: Any) -> float:
    # Compared before it is divided, which a whole number of hundreds of digits would not survive.
    if type(value) not in (int, float) or not 0 < value <= MOST_ALPHA:
        raise RefusedError(f"{key} is {quoted(value)}; it must be a number above 0, at most {MOST_ALPHA:g}")
    return float(value)


def _check_switch(key: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise RefusedError(f"{key} is {quoted(value)}; it must be true or false")
    return bool(value)


def _refuse_unmergeable(config: Mapping[str, Any], name: str) -> None:
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        raise AdapterError(f"adapter {name} is of type {quoted(kind)}; only LORA can be merged")
    bias = config.get("bias", "none")
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
    }
    start = config.get("init_lora_weights")
    changes = isinstance(start, str) and start.lower().startswith(_CHANGES_BACKBONE)
    reasons[f"an initialisation that changes the backbone ({quoted(start)})"] = changes
    for reason, present in reasons.items():
        if present:
            raise AdapterError(
                f"adapter {name} uses {reason}, which cannot be merged exactly; train or convert it to plain LoRA"
            )


def _targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the module endings that the config lists; empty where it is a regular expression, or narrowed down otherwise."""
    targets = config.get("target_modules")
    if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        narrowed = any(config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
        return () if narrowed else tuple(targets)
    if targets is not None and not isinstance(targets, str):
        raise RefusedError(f"target_modules is {quoted(targets)}; it must be a text or a list of texts")
    return ()


def _patterns(key: str, value: Any, check: Callable[[str, Any], Any]) -> Patterns:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise RefusedError(f"{key} is {quoted(value)}; it must be an object")
    with about(key):
        patterns = tuple((_matcher(pattern), check(quoted(pattern), entry)) for pattern, entry in value.items())
        if sum(isinstance(matches, _Expression) for matches, _ in patterns) > MOST_EXPRESSIONS:
            raise RefusedError(f"it holds over {MOST_EXPRESSIONS} regular expressions; name modules in full instead")
    return patterns


def _look_up(patterns: Patterns, module: str, default: Any) -> Any:
    """The value of the first pattern that means this module, as in PEFT."""
    return next((value for matches, value in patterns if matches(module)), default)


@dataclass(frozen=True)
class _Literal:
    """A pattern without operators: as in PEFT an ending of whole parts, in which a dot stands for any character."""

    pattern: str

    def __call__(self, module: str) -> bool:
        before, ending = module[: -len(self.pattern)], module[-len(self.pattern) :]
        if len(ending) < len(self.pattern) or (before and not before.endswith(".")):
            return False
        return all(expected in (".", found) for expected, found in zip(self.pattern, ending, strict=True))


@dataclass(frozen=True)
class _Name:
    """The whole name of one module, as `config_of` writes it for an exception: anchored, dots escaped."""

    name: str

    def __call__(self, module: str) -> bool:
        return module == self.name


class _Expression:
    """Any other pattern, matched in time linear in the name.

    Python's own engine may need longer than the universe lasts, so pydantic's is taken, which is Rust's.
    """

    def __init__(self, pattern: str) -> None:
        from pydantic_core import SchemaError, SchemaValidator, core_schema

        if len(pattern) > MOST_PATTERN:
            raise RefusedError(f"a pattern has {len(pattern)} characters; at most {MOST_PATTERN} are allowed")
        schema = core_schema.str_schema(pattern=rf"^(.*\.)?({pattern})$", regex_engine="rust-regex")
        try:
            self._validator = SchemaValidator(schema)
        except SchemaError as error:
            raise RefusedError(
                f"the pattern {quoted(pattern)} is no regular expression that can be matched in linear time; "
                "name modules in full, or use no look-around and no back references"
            ) from error

    def __call__(self, module: str) -> bool:
        from pydantic_core import ValidationError

        try:
            self._validator.validate_python(module)
        except ValidationError:
            return False
        return True


def _matcher(pattern: str) -> Callable[[str], bool]:
    if re.fullmatch(r"[\w-]+(\.[\w-]+)*", pattern):
        return _Literal(pattern)
    if re.fullmatch(r"\^[\w-]+(\\\.[\w-]+)*", pattern):
        return _Name(pattern[1:].replace("\\.", "."))
    return _Expression(pattern)
