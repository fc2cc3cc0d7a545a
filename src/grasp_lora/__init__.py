"""Learn how much of a merged LoRA adapter to prune, in one training run (GRASP LoRA, arXiv 2601.06702).

The names below are what a user's own script needs; they are imported on first use, so that `import grasp_lora` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grasp_lora.api import RunResult, compare, judge, run
    from grasp_lora.engine.progress import Progress
    from grasp_lora.errors import GraspError, RecipeError
    from grasp_lora.method.lora import AdapterWeights
    from grasp_lora.method.masks import MaskSettings, prune
    from grasp_lora.method.merging import MergeSettings, merge
    from grasp_lora.method.rules import RatioEstimate, Round
    from grasp_lora.method.search import Controller, Decision, RatioPolicy, RatioSearch, Rounds, Spread, preset
    from grasp_lora.models.adapter_files import read_adapter
    from grasp_lora.models.adapters import attached, save_adapter
    from grasp_lora.models.live import segments_of
    from grasp_lora.recipes.load import load_recipe
    from grasp_lora.recipes.recipe import Recipe
    from grasp_lora.training.controller import GraspController
    from grasp_lora.training.probes import ProbeSet
    from grasp_lora.training.pruned import PrunedTraining

__version__ = "0.2.0.dev0"

_HOMES = {
    "AdapterWeights": "method.lora",
    "Controller": "method.search",
    "Decision": "method.search",
    "GraspController": "training.controller",
    "GraspError": "errors",
    "MaskSettings": "method.masks",
    "MergeSettings": "method.merging",
    "ProbeSet": "training.probes",
    "Progress": "engine.progress",
    "PrunedTraining": "training.pruned",
    "RatioEstimate": "method.rules",
    "RatioPolicy": "method.search",
    "RatioSearch": "method.search",
    "Recipe": "recipes.recipe",
    "RecipeError": "errors",
    "Round": "method.rules",
    "Rounds": "method.search",
    "RunResult": "api",
    "Spread": "method.search",
    "attached": "models.adapters",
    "compare": "api",
    "judge": "api",
    "load_recipe": "recipes.load",
    "merge": "method.merging",
    "preset": "method.search",
    "prune": "method.masks",
    "read_adapter": "models.adapter_files",
    "run": "api",
    "save_adapter": "models.adapters",
    "segments_of": "models.live",
}
__all__ = [
    "AdapterWeights",
    "Controller",
    "Decision",
    "GraspController",
    "GraspError",
    "MaskSettings",
    "MergeSettings",
    "ProbeSet",
    "Progress",
    "PrunedTraining",
    "RatioEstimate",
    "RatioPolicy",
    "RatioSearch",
    "Recipe",
    "RecipeError",
    "Round",
    "Rounds",
    "RunResult",
    "Spread",
    "attached",
    "compare",
    "judge",
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
