"""Pruning without training: the zeros are those of a mask set, and what cannot be pruned is named."""

from typing import Any

import numpy as np
import pytest
import torch

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.method.masks import FACTORS, MaskSet, MaskSettings, Score, prune, prune_count
from grasp_lora.method.merging import MergeSettings, merge


def adapter(seed: int = 0, dtype: torch.dtype = torch.float32) -> AdapterWeights:
    draws = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        {
            "q": LoraPair(
                torch.randn(3, 7, generator=draws).to(dtype), torch.randn(5, 3, generator=draws).to(dtype), 2.0
            ),
            "v": LoraPair(
                torch.randn(2, 4, generator=draws).to(dtype), torch.randn(9, 2, generator=draws).to(dtype), 0.5
            ),
        }
    )


@pytest.mark.parametrize("rule", ["exact", "paper_apart"])
def test_the_zeros_are_those_of_a_mask_set_and_all_else_stays(rule: str) -> None:
    merged = merge([adapter(1), adapter(2)], MergeSettings(rule))
    before = {(name, factor): getattr(pair, factor).clone() for name, pair in merged.items() for factor in FACTORS}
    mask = MaskSettings()
    keep = MaskSet(merged, mask).keep_masks(0.4)
    assert any(not one.all() for one in keep.values())
    pruned = prune(merged, 0.4, mask)
    assert list(pruned) == list(merged)
    for (name, factor), weight in before.items():
        assert torch.equal(getattr(pruned[name], factor), weight * keep[name, factor])
        assert torch.equal(getattr(merged[name], factor), weight)  # the adapter that was given
    for name, pair in merged.items():
        now = pruned[name]
        assert (now.scaling, now.segments, now.apart) == (pair.scaling, pair.segments, pair.apart)


@pytest.mark.parametrize("ratio", [0, 0.25, np.float32(0.5), 1])
def test_each_factor_loses_its_share(ratio: float) -> None:
    for pair in prune(adapter(), ratio).values():
        for weight in (pair.A, pair.B):
            assert int((weight == 0).sum()) == prune_count(float(ratio), weight.numel())


def test_live_weights_and_other_dtypes_are_taken() -> None:
    live = {
        name: LoraPair(torch.nn.Parameter(p.A), torch.nn.Parameter(p.B))
        for name, p in adapter(0, torch.bfloat16).items()
    }
    pair = prune(AdapterWeights(live), 0.5)["q"]
    assert (pair.A.dtype, pair.A.requires_grad) == (torch.bfloat16, False)


def test_a_score_of_ones_own_decides() -> None:
    largest_first = Score(lambda pair, norms: (1 / pair.A.abs(), 1 / pair.B.abs()))
    whole = adapter()["q"].A
    left = prune(adapter(), 0.5, MaskSettings(largest_first))["q"].A
    assert whole[left == 0].abs().min() > left[left != 0].abs().max()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((adapter(), 40), ValueError, r"prune ratio is 40; it must be a fraction in \[0, 1\]"),
        ((adapter(), float("nan")), ValueError, "ratio is nan"),
        ((adapter(), 0.4, MaskSettings("input_aware")), ValueError, "'input_aware' needs the inputs.*PrunedTraining"),
        ((adapter(), 0.4, MaskSettings("gradient_of_delta")), ValueError, "'gradient_of_delta' needs the inputs"),
        (
            ("merged", 0.4),
            AdapterError,
            "weights is a str of 6 modules; give those of an adapter, such as read_adapter",
        ),
        (({"q": adapter()["q"]}, 0.4), AdapterError, "weights is a dict of 1 modules"),
        ((AdapterWeights({}), 0.4), AdapterError, "AdapterWeights of 0 modules"),
    ],
)
def test_what_cannot_be_pruned_is_named_in_one_line(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        prune(*arguments)
    assert "\n" not in str(caught.value)


def test_source_and_target_lose_the_same_share() -> None:
    pair = LoraPair(
        torch.cat([torch.full((1, 4), 0.1), torch.arange(1.0, 5.0)[None]]),
        torch.cat([torch.full((4, 1), 0.1), torch.arange(1.0, 5.0)[:, None]], dim=1),
        segments=(Segment("source", 1), Segment("target", 1)),
    )
    pruned = prune(AdapterWeights({"q": pair}), 0.5)["q"]
    assert [int((row == 0).sum()) for row in pruned.A] == [2, 2]
    assert pruned.A[1].tolist() == [0.0, 0.0, 3.0, 4.0]
