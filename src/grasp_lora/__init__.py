"""Learn how much of a merged LoRA adapter to prune, in one training run (GRASP LoRA, arXiv 2601.06702).

The names below are what a user's own script needs; they are imported on first use, so that `import grasp_lora` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grasp_lora.errors import AdapterError, DataError, GraspError, ProbeError, RecipeError
    from grasp_lora.method.estimate import Rule
    from grasp_lora.method.importance import Score
    from grasp_lora.method.masks import MaskSettings
    from grasp_lora.method.merging import MergeRule, MergeSettings, merge
    from grasp_lora.method.policy import Gaussian, Spread, Uniform
    from grasp_lora.method.presets import Controller, preset
    from grasp_lora.method.rounds import Decision, RatioEstimate, Round
    from grasp_lora.method.schedule import Rounds
    from grasp_lora.method.search import RatioPolicy, RatioSearch
    from grasp_lora.models.adapters import attached, read_adapter, save_adapter, segments_of
    from grasp_lora.training.controller import GraspController
    from grasp_lora.training.probes import ProbeSet, ProbesInTurn
    from grasp_lora.training.pruned import PrunedTraining

__version__ = "0.1.0"

_HOMES = {
    "AdapterError": "errors",
    "Controller": "method.presets",
    "DataError": "errors",
    "Decision": "method.rounds",
    "Gaussian": "method.policy",
    "GraspController": "training.controller",
    "GraspError": "errors",
    "MaskSettings": "method.masks",
    "MergeRule": "method.merging",
    "MergeSettings": "method.merging",
    "ProbeError": "errors",
    "ProbeSet": "training.probes",
    "ProbesInTurn": "training.probes",
    "PrunedTraining": "training.pruned",
    "RatioEstimate": "method.rounds",
    "RatioPolicy": "method.search",
    "RatioSearch": "method.search",
    "RecipeError": "errors",
    "Round": "method.rounds",
    "Rounds": "method.schedule",
    "Rule": "method.estimate",
    "Score": "method.importance",
    "Spread": "method.policy",
    "Uniform": "method.policy",
    "attached": "models.adapters",
    "merge": "method.merging",
    "preset": "method.presets",
    "read_adapter": "models.adapters",
    "save_adapter": "models.adapters",
    "segments_of": "models.adapters",
}
__all__ = [
    "AdapterError",
    "Controller",
    "DataError",
    "Decision",
    "Gaussian",
    "GraspController",
    "GraspError",
    "MaskSettings",
    "MergeRule",
    "MergeSettings",
    "ProbeError",
    "ProbeSet",
    "ProbesInTurn",
    "PrunedTraining",
    "RatioEstimate",
    "RatioPolicy",
    "RatioSearch",
    "RecipeError",
    "Round",
    "Rounds",
    "Rule",
    "Score",
    "Spread",
    "Uniform",
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
