"""Learn how much of a merged LoRA adapter to prune, in one training run (GRASP LoRA, arXiv 2601.06702).

The names below are what a user's own script needs; they are imported on first use, so that `import grasp_lora` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grasp_lora.api import RunResult, compare, run
    from grasp_lora.engine.comparison import Comparison, ComparisonSettings
    from grasp_lora.engine.progress import Progress
    from grasp_lora.engine.run_folder import Delivered, Metrics
    from grasp_lora.errors import (
        AdapterError,
        DataError,
        DivergedError,
        GraspError,
        Interrupted,
        ProbeError,
        RecipeError,
    )
    from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
    from grasp_lora.method.masks import InputNorms, MaskSettings, Score, prune
    from grasp_lora.method.merging import MergeRule, MergeSettings, merge
    from grasp_lora.method.rules import RatioEstimate, Round, Rule
    from grasp_lora.method.search import (
        Controller,
        Decision,
        Gaussian,
        RatioPolicy,
        RatioSearch,
        Rounds,
        Spread,
        preset,
    )
    from grasp_lora.models.adapters import attached, save_adapter
    from grasp_lora.models.live import adapter_weights, segments_of
    from grasp_lora.models.reading import LoadedAdapter, read_adapter
    from grasp_lora.recipes.load import load_recipe
    from grasp_lora.recipes.recipe import Recipe
    from grasp_lora.training.controller import GraspController
    from grasp_lora.training.probes import ProbeSet, ProbesInTurn
    from grasp_lora.training.pruned import PrunedTraining

__version__ = "0.1.0"

_HOMES = {
    "AdapterError": "errors",
    "AdapterWeights": "method.lora",
    "Comparison": "engine.comparison",
    "ComparisonSettings": "engine.comparison",
    "Controller": "method.search",
    "DataError": "errors",
    "Decision": "method.search",
    "Delivered": "engine.run_folder",
    "DivergedError": "errors",
    "Gaussian": "method.search",
    "GraspController": "training.controller",
    "GraspError": "errors",
    "InputNorms": "method.masks",
    "Interrupted": "errors",
    "LoadedAdapter": "models.reading",
    "LoraPair": "method.lora",
    "MaskSettings": "method.masks",
    "MergeRule": "method.merging",
    "MergeSettings": "method.merging",
    "Metrics": "engine.run_folder",
    "ProbeError": "errors",
    "ProbeSet": "training.probes",
    "ProbesInTurn": "training.probes",
    "Progress": "engine.progress",
    "PrunedTraining": "training.pruned",
    "RatioEstimate": "method.rules",
    "RatioPolicy": "method.search",
    "RatioSearch": "method.search",
    "Recipe": "recipes.recipe",
    "RecipeError": "errors",
    "Round": "method.rules",
    "Rounds": "method.search",
    "Rule": "method.rules",
    "RunResult": "api",
    "Score": "method.masks",
    "Segment": "method.lora",
    "Spread": "method.search",
    "adapter_weights": "models.live",
    "attached": "models.adapters",
    "compare": "api",
    "load_recipe": "recipes.load",
    "merge": "method.merging",
    "preset": "method.search",
    "prune": "method.masks",
    "read_adapter": "models.reading",
    "run": "api",
    "save_adapter": "models.adapters",
    "segments_of": "models.live",
}
__all__ = [
    "AdapterError",
    "AdapterWeights",
    "Comparison",
    "ComparisonSettings",
    "Controller",
    "DataError",
    "Decision",
    "Delivered",
    "DivergedError",
    "Gaussian",
    "GraspController",
    "GraspError",
    "InputNorms",
    "Interrupted",
    "LoadedAdapter",
    "LoraPair",
    "MaskSettings",
    "MergeRule",
    "MergeSettings",
    "Metrics",
    "ProbeError",
    "ProbeSet",
    "ProbesInTurn",
    "Progress",
    "PrunedTraining",
    "RatioEstimate",
    "RatioPolicy",
    "RatioSearch",
    "Recipe",
    "RecipeError",
    "Round",
    "Rounds",
    "Rule",
    "RunResult",
    "Score",
    "Segment",
    "Spread",
    "adapter_weights",
    "attached",
    "compare",
    "load_recipe",
    "merge",
    "preset",
    "prune",
    "read_adapter",
    "run",
    "save_adapter",
    "segments_of",
]


if not TYPE_CHECKING:  # a type checker sees the imports above, and nothing else

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'grasp_lora' has no attribute {name!r}")
        return getattr(import_module(f"grasp_lora.{_HOMES[name]}"), name)

    def __dir__() -> list[str]:  # what a notebook completes: the public names, imported or not yet
        return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
