"""Masks: scores, exact counts, a mask set that never loses a weight it did not mean to lose, and pruning without training."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_examples import assert_counts
from torch import Tensor

from grasp_lora.errors import AdapterError, RecipeError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.method.masks import (
    FACTORS,
    SCORES,
    InputNorms,
    MaskSet,
    MaskSettings,
    Score,
    WeightKey,
    prune,
    prune_count,
    reset_moments,
    score_pair,
    survival,
)
from grasp_lora.method.merging import MergeSettings, merge

SEGMENTS = (Segment("source", 2), Segment("target", 3))
# Two modules of different widths; the second has no segments.
SHAPES = {"q": (7, 6, 5, SEGMENTS), "v": (4, 9, 2, ())}

ratios = st.one_of(st.floats(0, 1), st.integers(0, 20).map(lambda twentieth: twentieth / 20))


def live_pairs(seed: int = 0, values: Sequence[float] | None = None) -> dict[str, LoraPair]:
    """Random live parameters, or draws from a few values, so that most magnitudes tie."""
    generator = torch.Generator().manual_seed(seed)

    def parameter(*shape: int) -> torch.nn.Parameter:
        if values is None:
            return torch.nn.Parameter(torch.randn(shape, generator=generator))
        return torch.nn.Parameter(torch.tensor(values)[torch.randint(len(values), shape, generator=generator)])

    return {
        module: LoraPair(parameter(rank, d_in), parameter(d_out, rank), segments=segments)
        for module, (d_in, d_out, rank, segments) in SHAPES.items()
    }


def keep_masks(masks: MaskSet, prune_ratio: float) -> dict[tuple[str, str], Tensor]:
    masks.commit(prune_ratio)
    return dict(masks.keep)


def mask_set(score: str = "magnitude", **options: Any) -> MaskSet:
    masks = MaskSet(live_pairs(**options), MaskSettings(score))
    draws = torch.Generator().manual_seed(99)
    for module, pair in masks.pairs.items():
        if masks.settings.needs_inputs:
            sizes = pair.shape[1], pair.rank
            masks.norms[module] = InputNorms(*(torch.rand(size, generator=draws) for size in sizes))
    return masks


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns, so that -0.0 and 0.0 differ."""
    return tensor.detach().clone().view(torch.int32)


def snapshot(masks: MaskSet) -> dict[WeightKey, Tensor]:
    return {key: bits(weight) for key, weight in masks.weights.items()}


def dense_bits(masks: MaskSet) -> dict[WeightKey, Tensor]:
    """Bit patterns of what the weights are or, where they are masked, were."""
    return {key: bits(torch.where(masks.keep[key], weight, masks.stash[key])) for key, weight in masks.weights.items()}


def assert_equal(first: dict[WeightKey, Tensor], second: dict[WeightKey, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


COUNTS = [(0.29, 100, 29), (0.5, 0, 0), (0.999, 1, 0), (0.4999, 10, 4), (1 / 3, 3, 1), (1.0, 10**9, 10**9)]
ROUNDED = [(0.1 + 0.2, 10, 3), (0.7 * 0.1, 100, 7), (1e-9, 1000, 0)]  # 0.30000000000000004, 0.06999999999999999


@pytest.mark.parametrize(("prune_ratio", "weights", "count"), COUNTS + ROUNDED)
def test_prune_count(prune_ratio, weights, count):
    assert prune_count(prune_ratio, weights) == count


@given(first=ratios, second=ratios, weights=st.integers(0, 10**6))
def test_prune_count_grows_with_the_ratio(first, second, weights):
    low, high = sorted((first, second))
    assert 0 <= prune_count(low, weights) <= prune_count(high, weights) <= weights
    assert abs(prune_count(low, weights) - low * weights) <= 1


@pytest.mark.parametrize("score", SCORES)
@settings(deadline=None, max_examples=20)
@given(first=ratios, second=ratios, seed=st.integers(0, 1000))
def test_counts_are_exact_under_ties_and_masks_nest_as_the_ratio_grows(score, first, second, seed):
    masks = mask_set(score, seed=seed, values=(0.0, -0.0, 1.0, -1.0, 0.5))
    low, high = sorted((first, second))
    small, large = keep_masks(masks, low), keep_masks(masks, high)
    assert_counts(masks.pairs, small, low)
    assert_counts(masks.pairs, large, high)
    for key in small:
        assert (small[key] | ~large[key]).all()


def test_the_least_important_weights_go():
    pair = LoraPair(torch.tensor([[3.0, -1.0, 2.0, -4.0]]), torch.tensor([[0.1], [-0.3]]))
    masks = MaskSet({"m": pair}, MaskSettings())
    masks.commit(0.5)
    assert pair.A.tolist() == [[3.0, 0.0, 0.0, -4.0]]
    assert pair.B.tolist() == [[0.0], [pytest.approx(-0.3)]]
    assert masks.newly_masked["m", "A"].tolist() == [[False, True, True, False]]
    assert masks.newly_masked["m", "B"].tolist() == [[True], [False]]
    assert masks.stash["m", "A"].tolist() == [[0.0, -1.0, 2.0, 0.0]]
    assert masks.ratio == 0.5


def lowest(scores: Tensor, prune_ratio: float) -> Tensor:
    """Where the floor(ratio * n) lowest scores are, entry by entry, the first of equal ones first."""
    values = scores.flatten().tolist()
    order = sorted(range(len(values)), key=lambda place: (values[place], place))
    pruned = set(order[: math.floor(prune_ratio * len(values))])
    return torch.tensor([place in pruned for place in range(len(values))]).view(scores.shape)


@pytest.mark.parametrize("prune_ratio", [0.1, 0.2373, 0.4, 0.4897, 0.6749, 0.8])
@pytest.mark.parametrize("score", ["magnitude", "gradient_of_delta"])
def test_adapters_kept_apart_are_masked_as_the_released_code_does(score, prune_ratio):
    adapters = [adapter(seed, scaling=4.0) for seed in (1, 2)]
    merged = merge(adapters, MergeSettings("paper_apart"))
    masks = MaskSet(merged, MaskSettings(score))
    norms = {module: torch.rand(pair.shape[1]) + 0.1 for module, pair in merged.items()}
    masks.norms = {module: InputNorms(norms[module], torch.ones(pair.rank)) for module, pair in merged.items()}
    masks.commit(0.3)  # so that some weights count with their stashed values
    for (module, factor), keep in keep_masks(masks, prune_ratio).items():
        found = keep.chunk(2, dim=0 if factor == "A" else 1)
        for parent, kept in zip(adapters, found, strict=True):
            A, B = (one.clone().requires_grad_() for one in (parent[module].A, parent[module].B))
            ((B @ A).abs() * norms[module]).sum().backward()
            weight = A if factor == "A" else B
            importance = weight.detach() if score == "magnitude" else weight.grad
            assert torch.equal(~kept, lowest(importance.abs(), prune_ratio))


def test_a_factor_that_did_not_train_is_not_pruned_by_position():
    masks, again, plain = mask_set(), mask_set(), mask_set()
    for one in (masks, again):
        one.weights["q", "B"].data[:, 2:] = 0.0  # the second segment
    kept, as_before = keep_masks(masks, 0.5), keep_masks(plain, 0.5)
    zero = kept["q", "B"][:, 2:]
    assert int((~zero).sum()) == prune_count(0.5, zero.numel())
    assert (~zero[3:]).any()  # by position only the first three of six rows would go
    assert_equal(kept, keep_masks(again, 0.5))
    assert (keep_masks(masks, 0.2)["q", "B"][:, 2:] | ~zero).all()
    as_before["q", "B"][:, 2:] = zero  # all others are as they were
    assert_equal(kept, as_before)


@pytest.mark.parametrize("committed", [0.0, 0.4])
@pytest.mark.parametrize("raises", [False, True])
def test_a_probe_leaves_every_bit_as_it_was(committed, raises):
    masks = mask_set(values=(-0.0, 0.0, 1e-42, -1.5, 2.5))  # zeros of both signs, a subnormal
    masks.commit(committed)
    masks.weights["q", "A"].data[~masks.keep["q", "A"]] = -0.0  # a masked weight, moved and not yet held again
    before, dense, keep = snapshot(masks), dense_bits(masks), {key: mask.clone() for key, mask in masks.keep.items()}
    identities = {key: id(weight) for key, weight in masks.weights.items()}
    for prune_ratio in (0.0, 0.2, 0.7, 1.0):
        try:
            with masks.probe(prune_ratio):
                assert torch.is_grad_enabled()
                assert {key: id(weight) for key, weight in masks.weights.items()} == identities
                if prune_ratio == 1.0:
                    assert all((weight == 0).all() for weight in masks.weights.values())
                if raises:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert raises
        assert_equal(snapshot(masks), before)
        assert_equal(dense_bits(masks), dense)
        assert_equal(masks.keep, keep)
        assert masks.ratio == committed


@pytest.mark.parametrize("committed", [0.0, 0.5])
@pytest.mark.parametrize("candidate", [0.0, 0.3, 0.8])
def test_a_probe_shows_what_a_commit_would_give(committed, candidate):
    masks = mask_set()
    masks.commit(committed)
    ranking = masks.rank()
    with masks.probe(candidate, ranking):
        probed = snapshot(masks)
    masks.commit(candidate, ranking)
    assert_equal(snapshot(masks), probed)


@pytest.mark.parametrize("score", SCORES)
def test_stashed_weights_rank_by_their_stashed_values(score):
    masks = mask_set(score=score)
    before = masks.rank()
    masks.commit(0.6)
    assert_equal(masks.rank(), before)


@settings(deadline=None, max_examples=25)
@given(
    actions=st.lists(st.tuples(st.sampled_from(["commit", "probe", "train"]), ratios), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
)
def test_no_sequence_of_rounds_loses_a_weight(actions, seed):
    masks = mask_set(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for action, prune_ratio in actions:
        dense = dense_bits(masks)
        if action == "commit":
            masks.commit(prune_ratio)
        elif action == "probe":
            with masks.probe(prune_ratio):
                pass
        else:
            for weight in masks.weights.values():
                weight.data += torch.randn(weight.shape, generator=generator)
            moved = dense_bits(masks)
            masks.enforce()
            for key, keep in masks.keep.items():
                assert torch.equal(moved[key][~keep], dense[key][~keep])
            dense = moved
        assert_equal(dense_bits(masks), dense)
        assert not any(weight[~masks.keep[key]].any() for key, weight in masks.weights.items())
        assert_counts(masks.pairs, masks.keep, masks.ratio)


def test_sparsity_counts_only_weights_that_are_masked_and_zero():
    masks = mask_set(values=(0.0, 1.0))
    assert masks.sparsity() == 0.0  # zeros that nobody masked
    masks.commit(0.5)
    committed = masks.sparsity()
    masks.weights["q", "A"].data += 1.0  # a step that nobody held
    assert masks.sparsity() < committed
    masks.enforce()
    assert masks.sparsity() == committed


def test_mask_gradients_stops_masked_weights_only():
    masks = mask_set()
    masks.commit(0.5)
    for key, weight in masks.weights.items():
        if key != ("v", "B"):  # one without a gradient
            weight.grad = torch.full_like(weight, 2.0)
    masks.mask_gradients()
    assert masks.weights["v", "B"].grad is None
    for key, weight in masks.weights.items():
        assert weight.grad is None or torch.equal(weight.grad, 2.0 * masks.keep[key])


def test_reselect_lets_all_weights_compete_again_without_a_stash():
    masks = mask_set()
    masks.commit(0.6)
    masks.reselect(0.6)
    pruned = {key: ~keep for key, keep in masks.keep.items()}
    assert not any(stash.any() for stash in masks.stash.values())
    for key, weight in masks.weights.items():
        weight.data[pruned[key]] = 50.0  # the optimizer moved what was pruned far away from zero
    masks.reselect(0.4)
    assert masks.ratio == 0.4
    for key, weight in masks.weights.items():
        assert (weight[pruned[key]] == 50.0).all()
        assert not weight[~masks.keep[key]].any()
    assert_counts(masks.pairs, masks.keep, 0.4)
    masks.commit(0.0)
    assert any((weight == 0).any() for weight in masks.weights.values())  # nothing comes back


@pytest.mark.parametrize("score", SCORES)
def test_a_set_that_was_restored_goes_on_as_the_one_that_was_saved(score):
    first, other = mask_set(score=score), MaskSet(live_pairs(), MaskSettings(score))
    first.commit(0.4)
    for key, weight in other.weights.items():
        weight.data.copy_(first.weights[key])
    other.restore(first.state(), first.ratio)
    assert other.ratio == 0.4
    for ratio in (0.7, 0.2):
        first.commit(ratio)
        other.commit(ratio)
        assert_equal(first.newly_masked, other.newly_masked)
        assert_equal(first.keep, other.keep)
        assert_equal(snapshot(first), snapshot(other))


@pytest.mark.parametrize("score", SCORES)
def test_factors_in_bfloat16_are_scored_with_norms_in_float32(score):
    pair = live_pairs()["q"]
    low = LoraPair(pair.A.detach().bfloat16(), pair.B.detach().bfloat16())
    norms = InputNorms(torch.rand(7), torch.rand(5))
    exact = score_pair(LoraPair(low.A.float(), low.B.float()), score, norms)
    for found, wanted in zip(score_pair(low, score, norms), exact, strict=True):
        torch.testing.assert_close(found.float(), wanted)


def test_a_score_of_ones_own_is_given_or_named():
    largest_first = Score(lambda pair, norms: (1 / pair.A.abs(), 1 / pair.B.abs()))
    whole = adapter()["q"].A
    left = prune(adapter(), 0.5, MaskSettings(largest_first))["q"].A
    assert whole[left == 0].abs().min() > left[left != 0].abs().max()
    for score, message in (
        ("math:pi", "mask score 'math:pi' is a float; it must be a Score"),
        ("random", "mask score is 'random'; allowed: magnitude, input_aware, gradient_of_delta, or the import path"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskSettings(score)


@pytest.mark.parametrize(
    "given", [lambda A, B: (A, B.T), lambda A, B: (A, 1.0), lambda A, B: A, lambda A, B: (A / 0.0, B)]
)
def test_a_score_that_gives_no_number_for_each_weight_is_named(given):
    def mine(pair: LoraPair, norms: InputNorms | None) -> Any:
        return given(pair.A.detach().abs(), pair.B.detach().abs())

    masks = MaskSet({"q": live_pairs()["q"]}, MaskSettings(Score(mine)))
    with pytest.raises(RecipeError, match=r"mask score '.*mine' gave .* it must give two tensors, shaped as A"):
        masks.rank()


def test_scores_by_hand():
    pair = LoraPair(torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[-5.0, 0.5]]))
    norms = InputNorms(torch.tensor([10.0, 1.0]), torch.tensor([2.0, 4.0]))
    A, B = score_pair(pair, "magnitude")
    assert (A.tolist(), B.tolist()) == ([[1.0, 2.0], [3.0, 0.0]], [[5.0, 0.5]])
    A, B = score_pair(pair, "input_aware", norms)
    assert (A.tolist(), B.tolist()) == ([[10.0, 2.0], [30.0, 0.0]], [[10.0, 2.0]])


def test_survival_counts_by_origin():
    pairs = live_pairs()
    with torch.no_grad():
        pairs["q"].A[0, :3] = 0.0
        pairs["v"].B[:, 1] = 0.0
    assert survival(pairs) == [
        {"module": "q", "factor": "A", "segment": "source", "weights": 14, "kept": 11},
        {"module": "q", "factor": "A", "segment": "target", "weights": 21, "kept": 21},
        {"module": "q", "factor": "B", "segment": "source", "weights": 12, "kept": 12},
        {"module": "q", "factor": "B", "segment": "target", "weights": 18, "kept": 18},
        {"module": "v", "factor": "A", "segment": "merged", "weights": 8, "kept": 8},
        {"module": "v", "factor": "B", "segment": "merged", "weights": 18, "kept": 9},
    ]


def adapter(seed: int = 0, dtype: torch.dtype = torch.float32, scaling: float = 2.0) -> AdapterWeights:
    return AdapterWeights(
        {
            name: LoraPair(pair.A.detach().to(dtype), pair.B.detach().to(dtype), scaling)
            for name, pair in live_pairs(seed).items()
        }
    )


@pytest.mark.parametrize("rule", ["exact", "paper_apart"])
def test_the_zeros_of_a_pruned_adapter_are_those_of_a_mask_set_and_all_else_stays(rule):
    merged = merge([adapter(1), adapter(2)], MergeSettings(rule))
    before = {(name, factor): getattr(pair, factor).clone() for name, pair in merged.items() for factor in FACTORS}
    keep = keep_masks(MaskSet(copy.deepcopy(merged), MaskSettings()), 0.4)
    pruned = prune(merged, np.float32(0.4))
    assert list(pruned) == list(merged)
    for (name, factor), weight in before.items():
        assert not keep[name, factor].all()
        assert torch.equal(getattr(pruned[name], factor), weight * keep[name, factor])
        assert torch.equal(getattr(merged[name], factor), weight)  # the adapter that was given
    for name, pair in merged.items():
        now = pruned[name]
        assert (now.scaling, now.segments, now.apart) == (pair.scaling, pair.segments, pair.apart)
    half = prune(adapter(dtype=torch.bfloat16), 0.5)["q"].A
    assert (half.dtype, half.requires_grad, int((half == 0).sum())) == (torch.bfloat16, False, prune_count(0.5, 35))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((adapter(), 40), ValueError, r"prune ratio is 40; it must be a fraction in \[0, 1\]"),
        ((adapter(), math.nan), ValueError, "prune ratio is nan"),
        ((adapter(), 0.4, MaskSettings("input_aware")), ValueError, "'input_aware' needs the inputs.*PrunedTraining"),
        (
            ("merged", 0.4),
            AdapterError,
            "weights is a str; give those of an adapter with a module or more, such as read_adapter",
        ),
        ((object(), 0.4), AdapterError, "weights is a object"),
        ((AdapterWeights({}), 0.4), AdapterError, "weights is a AdapterWeights; give those"),
    ],
)
def test_what_cannot_be_pruned_is_named_in_one_line(arguments, error, message):
    with pytest.raises(error, match=message):
        prune(*arguments)


ADAM = ("exp_avg", "exp_avg_sq")


@pytest.mark.parametrize(
    ("kind", "options", "moments"),
    [
        (torch.optim.AdamW, {}, ADAM),
        (torch.optim.AdamW, {"amsgrad": True}, (*ADAM, "max_exp_avg_sq")),
        (torch.optim.SGD, {"momentum": 0.9}, ("momentum_buffer",)),
    ],
)
def test_moments_are_reset_at_the_given_entries_only(kind, options, moments):
    masks = mask_set()
    optimizer = kind(masks.weights.values(), lr=0.1, **options)
    for _ in range(3):
        for weight in masks.weights.values():
            weight.grad = torch.randn(weight.shape)
        optimizer.step()
    before = {key: copy.deepcopy(optimizer.state[weight]) for key, weight in masks.weights.items()}
    masks.commit(0.5)
    newly_masked = masks.newly_masked
    reset_moments(optimizer, masks.weights, newly_masked)
    for key, weight in masks.weights.items():
        assert newly_masked[key].any()
        for moment in moments:
            value, kept = optimizer.state[weight][moment], ~newly_masked[key]
            assert not value[newly_masked[key]].any()
            assert torch.equal(value[kept], before[key][moment][kept])
            assert value[kept].all()
    # A second commit at the same ratio masks nothing anew and so resets nothing.
    masks.commit(0.5)
    assert not any(entries.any() for entries in masks.newly_masked.values())


def test_quantised_moments_are_left_alone():
    """8-bit optimizers keep codes of the weight's shape, where 0 is the most negative value."""
    masks = mask_set()
    optimizer = torch.optim.AdamW(masks.weights.values())
    weight = masks.weights["q", "A"]
    optimizer.state[weight] = {"codes": torch.full(weight.shape, 127, dtype=torch.uint8), "step": 3, "empty": None}
    masks.commit(1.0)
    reset_moments(optimizer, masks.weights, masks.newly_masked)
    assert (optimizer.state[weight]["codes"] == 127).all()
