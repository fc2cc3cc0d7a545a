"""Learn how much of a merged LoRA adapter to prune, in one training run (GRASP LoRA, arXiv 2601.06702).

The names below are what a user's own script needs; they are imported on first use, so that `import grasp_lora` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grasp_lora.errors import AdapterError, DataError, GraspError, ProbeError, RecipeError
    from grasp_lora.method.masks import MaskSettings
    from grasp_lora.method.merging import MergeSettings, merge
    from grasp_lora.method.policy import PolicySettings, preset
    from grasp_lora.models.adapters import attached, save_adapter, segments_of
    from grasp_lora.models.reading import read_adapter
    from grasp_lora.training.controller import ControllerSettings, GraspController, PrunedTraining
    from grasp_lora.training.probes import ProbeSet, ProbesInTurn

__version__ = "0.1.0"

_HOMES = {
    "AdapterError": "errors",
    "ControllerSettings": "training.controller",
    "DataError": "errors",
    "GraspController": "training.controller",
    "GraspError": "errors",
    "MaskSettings": "method.masks",
    "MergeSettings": "method.merging",
    "PolicySettings": "method.policy",
    "ProbeError": "errors",
    "ProbeSet": "training.probes",
    "ProbesInTurn": "training.probes",
    "PrunedTraining": "training.controller",
    "RecipeError": "errors",
    "attached": "models.adapters",
    "merge": "method.merging",
    "preset": "method.policy",
    "read_adapter": "models.reading",
    "save_adapter": "models.adapters",
    "segments_of": "models.adapters",
}
__all__ = [
    "AdapterError",
    "ControllerSettings",
    "DataError",
    "GraspController",
    "GraspError",
    "MaskSettings",
    "MergeSettings",
    "PolicySettings",
    "ProbeError",
    "ProbeSet",
    "ProbesInTurn",
    "PrunedTraining",
    "RecipeError",
    "attached",
    "merge",
    "preset",
    "read_adapter",
    "save_adapter",
    "segments_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grasp_lora' has no attribute {name!r}")
    return getattr(import_module(f"grasp_lora.{_HOMES[name]}"), name)
