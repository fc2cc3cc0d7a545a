"""From a few dozen examples in a language to a LoRA adapter: merged, pruned by a learned ratio, trained (arXiv 2601.06702).

The names below are what a user's own script needs; they are imported on first use, so that `import grasp_lora` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grasp_lora.api import RunResult, compare, judge, run
    from grasp_lora.engine.progress import Progress
    from grasp_lora.errors import GraspError, RecipeError
    from grasp_lora.method.lora import AdapterWeights
    from grasp_lora.method.masks import MaskSettings, Score, prune
    from grasp_lora.method.merging import MergeRule, MergeSettings, merge
    from grasp_lora.method.rules import RatioEstimate, Round, Rule
    from grasp_lora.method.search import (
        Controller,
        Decision,
        GrpoPolicy,
        PaperPolicy,
        RatioPolicy,
        RatioSearch,
        Rounds,
        preset,
    )
    from grasp_lora.models.adapter_files import read_adapter
    from grasp_lora.models.adapters import attached, save_adapter
    from grasp_lora.models.live import segments_of
    from grasp_lora.recipes.load import load_recipe
    from grasp_lora.recipes.recipe import Recipe
    from grasp_lora.training.controller import GraspController
    from grasp_lora.training.probes import ProbeSet
    from grasp_lora.training.pruned import PrunedTraining

__version__ = "0.2.0.dev0"

_NAMES = {
    "api": "RunResult compare judge run",
    "engine.progress": "Progress",
    "errors": "GraspError RecipeError",
    "method.lora": "AdapterWeights",
    "method.masks": "MaskSettings Score prune",
    "method.merging": "MergeRule MergeSettings merge",
    "method.rules": "RatioEstimate Round Rule",
    "method.search": "Controller Decision GrpoPolicy PaperPolicy RatioPolicy RatioSearch Rounds preset",
    "models.adapter_files": "read_adapter",
    "models.adapters": "attached save_adapter",
    "models.live": "segments_of",
    "recipes.load": "load_recipe",
    "recipes.recipe": "Recipe",
    "training.controller": "GraspController",
    "training.probes": "ProbeSet",
    "training.pruned": "PrunedTraining",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = [
    "AdapterWeights",
    "Controller",
    "Decision",
    "GraspController",
    "GraspError",
    "GrpoPolicy",
    "MaskSettings",
    "MergeRule",
    "MergeSettings",
    "PaperPolicy",
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
    "Rule",
    "RunResult",
    "Score",
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
