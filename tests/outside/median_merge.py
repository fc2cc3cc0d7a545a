"""A merge rule, a score and a rule for the ratio from outside the package, in one file."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grasp_lora import RatioEstimate, Round
from grasp_lora.method.masks import Score
from grasp_lora.method.merging import MergeRule
from grasp_lora.method.rules import Rule


def _median(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    weighted = torch.stack([weight * tensor for tensor, weight in zip(tensors, weights, strict=True)])
    return len(tensors) * weighted.median(dim=0).values


def _lowest(rounds: Sequence[Round], low: float, high: float, interval: bool) -> RatioEstimate:
    rewards: dict[float, list[float]] = {}
    for measured in rounds:
        for ratio, reward in zip(measured.candidates, measured.rewards, strict=True):
            rewards.setdefault(min(max(ratio, low), high), []).append(reward)
    best = max(rewards, key=lambda ratio: sum(rewards[ratio]) / len(rewards[ratio]))
    return RatioEstimate(best, best, best, "best_mean", len(rounds))


median = MergeRule("N times the median of w_i s_i, factor by factor", combine=_median)
best_mean = Rule("best_mean", _lowest)
squares = Score(lambda pair, norms: (pair.A.square(), pair.B.square()))
