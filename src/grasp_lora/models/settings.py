"""Settings of fresh adapters, importable without torch so that the command line starts at once."""

import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class LoraSettings:
    """A fresh LoRA adapter.

    Args:
        rank: r, >= 1.
        alpha: numerator of the scaling alpha / r, > 0.
        dropout: on the adapter's input, in [0, 1).
        target_modules: names or name endings of the modules to adapt.
        rslora: scale by alpha / sqrt(r) instead.

    Raises:
        ValueError: a setting is outside its range.

    Paper: r 8, alpha 32, dropout 0.05, q_proj and v_proj.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank is {self.rank}; it must be at least 1")
        if not 0.0 < self.alpha < math.inf:
            raise ValueError(f"LoRA alpha is {self.alpha}; it must be above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA dropout is {self.dropout}; it must lie in [0, 1)")
        if not self.target_modules:
            raise ValueError("LoRA target_modules is empty; name at least one module, such as q_proj")
