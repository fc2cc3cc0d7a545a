"""A method of `compare` from outside the package, in one file: the source adapter and half the target adapter, not trained.

A script adds it by `grasp_lora.engine.methods.METHODS["half_merged"] = HALF_MERGED`.
"""

from grasp_lora.engine.methods import Method, Outcome
from grasp_lora.engine.steps import Steps
from grasp_lora.method.merging import MergeSettings


def _half_merged(steps: Steps) -> Outcome:
    parents = steps.parents()
    half = MergeSettings("exact", weights=(1.0, 0.5))
    return Outcome(steps.merge("half", tuple(parents.named.values()), tuple(parents.named), half))


HALF_MERGED = Method("half the target adapter, not trained", _half_merged)
