"""The merge contract: what every row of MERGE_RULES has to hold, and what each states."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.method.merging import (
    MERGE_RULES,
    MergeRule,
    MergeSettings,
    drop_and_rescale,
    elect_and_average,
    keep_largest,
    merge,
    merge_rule,
)

D_IN, D_OUT = 12, 10
MODULES = ("layers.0.q_proj", "layers.1.v_proj")
# A row that one could have as well: it costs a line, and shows what sparsify does.
ROWS = {"dare": MergeRule("DARE on the factors, summed", sparsify=drop_and_rescale, draws=True)}
RULES: dict[str, Any] = {name: name for name in MERGE_RULES} | ROWS
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
SIDE_BY_SIDE = ("exact", "paper_apart")


def adapter(
    seed: int, rank: int = 3, scaling: float = 2.0, modules: Sequence[str] = MODULES, dtype: torch.dtype = torch.float32
) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for module in modules:
        A, B = torch.randn(rank, D_IN, generator=generator), 0.1 * torch.randn(D_OUT, rank, generator=generator)
        pairs[module] = LoraPair(A.to(dtype), B.to(dtype), scaling)
    return AdapterWeights(pairs)


def weighted_sum(adapters: Sequence[AdapterWeights], weights: Sequence[float], module: str) -> Tensor:
    """Sum of w_i s_i B_i A_i in float64."""
    deltas = [one[module].scaling * one[module].B.double() @ one[module].A.double() for one in adapters]
    return torch.stack([weight * delta for weight, delta in zip(weights, deltas, strict=True)]).sum(dim=0)


def assert_same(actual: Tensor, expected: Tensor, relative: float = 1e-6) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).norm() <= relative * expected.double().norm()


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("adapters", [1, 3])
def test_shapes_scaling_segments_and_dtypes(rule, adapters, dtype):
    merged = merge([adapter(seed, dtype=dtype) for seed in range(adapters)], MergeSettings(rule))
    assert list(merged) == sorted(MODULES)
    for pair in merged.values():
        assert pair.shape == (D_OUT, D_IN)
        assert pair.scaling == 1.0
        assert pair.rank == (3 * adapters if rule in SIDE_BY_SIDE else 3)
        assert sum(segment.rank for segment in pair.segments) == pair.rank
        assert pair.A.dtype == pair.B.dtype == dtype
        if not pair.apart and dtype != torch.bfloat16:  # balanced, and no NaN
            torch.testing.assert_close(pair.A.norm(dim=1), pair.B.norm(dim=0), rtol=1e-5, atol=1e-7)


@every_rule
def test_merging_twice_gives_the_same_bits_and_leaves_the_inputs_alone(rule):
    adapters = [adapter(0), adapter(1)]
    before = [(pair.A.clone(), pair.B.clone()) for one in adapters for pair in one.values()]
    generator_state = torch.get_rng_state()
    first, second = (merge(adapters, MergeSettings(rule)) for _ in range(2))
    turned = merge([AdapterWeights(dict(reversed(list(one.items())))) for one in adapters], MergeSettings(rule))
    for again in (second, turned):  # whatever the order of modules in a file
        for module in MODULES:
            assert torch.equal(first[module].A, again[module].A)
            assert torch.equal(first[module].B, again[module].B)
    after = [(pair.A, pair.B) for one in adapters for pair in one.values()]
    assert all(torch.equal(a, b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))
    assert torch.equal(torch.get_rng_state(), generator_state)


@every_rule
def test_a_module_of_one_adapter_only_is_merged_from_that_one(rule):
    both, alone = adapter(0), adapter(1, modules=MODULES[:1])
    options: dict[str, Any] = {"weights": (0.5, 0.5), "density": 1.0}
    merged = merge([both, alone], MergeSettings(rule, **options))
    assert list(merged) == sorted(MODULES)
    # LoRAHub weighs both factors, so a weight counts twice; the scaling of these adapters is 2.
    share = {"paper_sum_unscaled": 0.5 / 2.0, "paper_apart": 0.5 / 2.0, "lorahub": 0.5**2}.get(rule, 0.5)
    expected = share * both[MODULES[1]].delta()
    assert_same(merged[MODULES[1]].delta(), expected, 1e-5)
    if rule == "exact":
        assert merged[MODULES[1]].segments == (Segment("source", 3),)


@every_rule
def test_default_weights_are_the_rows_own(rule):
    adapters = [adapter(0), adapter(1)]
    given_ = merge(adapters, MergeSettings(rule, weights=(merge_rule(rule).default_weight(2),) * 2))
    assert torch.equal(merge(adapters, MergeSettings(rule))[MODULES[0]].A, given_[MODULES[0]].A)
    one_each = merge_rule(rule).combine is elect_and_average or rule == "paper_apart"
    assert merge_rule(rule).default_weight(2) == (1.0 if one_each else 0.5)


@every_rule
def test_adapters_fresh_from_initialisation_can_still_train(rule):
    fresh = [
        AdapterWeights({name: LoraPair(pair.A, torch.zeros_like(pair.B)) for name, pair in adapter(seed).items()})
        for seed in range(2)
    ]
    for pair in merge(fresh, MergeSettings(rule, density=1.0)).values():
        assert pair.delta().abs().max() == 0
        assert (pair.A.norm(dim=1) > 0).all()


@every_rule
@pytest.mark.parametrize("weight", [1.0, -0.25])
def test_one_adapter_gives_itself_or_is_turned_around(rule, weight):
    one = adapter(0, scaling=1.0)
    share = weight**2 if rule == "lorahub" else weight  # both factors are turned around there
    for module, pair in merge([one], MergeSettings(rule, weights=(weight,), density=1.0)).items():
        assert_same(pair.delta(), share * one[module].delta(), 1e-5)


def test_lorahub_composes_the_factors_by_hand():
    one, two = adapter(0, scaling=4.0), adapter(1, scaling=1.0)
    merged = merge([one, two], MergeSettings("lorahub", weights=(0.5, -2.0)))
    for module, pair in merged.items():
        A = 0.5 * 2.0 * one[module].A - 2.0 * two[module].A
        B = 0.5 * 2.0 * one[module].B - 2.0 * two[module].B
        assert_same(pair.delta(), B @ A, 1e-5)
    begin = merge([one, two], MergeSettings("lorahub", (0.0, 0.0)))  # where the search for its weights begins
    assert not any(pair.delta().any() for pair in begin.values())


@pytest.mark.parametrize(
    ("ranks", "weights"),
    [
        ((3, 3), (0.5, 0.5)),
        ((2, 5), (1.0, 0.3)),
        ((1, 4, 2), (0.2, -0.7, 1.5)),
        ((6, 6, 6), (1.0, 1.0, 1.0)),  # more components than the delta has rows
        ((3, 3), (1.0, 0.0)),
    ],
)
def test_exact_is_the_weighted_scaled_sum(ranks, weights):
    adapters = [adapter(seed, rank, scaling=2.0 / rank) for seed, rank in enumerate(ranks)]
    merged = merge(adapters, MergeSettings("exact", weights=weights))
    for module in MODULES:
        pair = merged[module]
        assert_same(pair.delta(), weighted_sum(adapters, weights, module))
        assert [segment.rank for segment in pair.segments] == list(ranks)
        for parent, weight, A, B in zip(adapters, weights, pair.A.split(ranks), pair.B.split(ranks, 1), strict=True):
            assert_same(B @ A, weight * parent[module].delta())  # the segments stay apart


def test_names_of_segments():
    three = [adapter(seed, 1) for seed in range(3)]
    names = ["adapter_0", "adapter_1", "adapter_2"], ["en", "ar", "zh"]
    for given, expected in ((None, names[0]), (names[1], names[1])):
        assert [part.name for part in merge(three, MergeSettings(), names=given)[MODULES[0]].segments] == expected


def best_of_rank(delta: Tensor, rank: int) -> Tensor:
    left, sizes, right = torch.linalg.svd(delta.double(), full_matrices=False)
    return left[:, :rank] @ sizes[:rank].diag() @ right[:rank]


@pytest.mark.parametrize("rank", [None, 2, 7, 40])
@pytest.mark.parametrize("ranks", [(3, 3), (2, 5), (8, 8)])
def test_svd_is_the_best_approximation_of_its_rank(rank, ranks):
    adapters = [adapter(seed, own) for seed, own in enumerate(ranks)]
    weights = (0.8, -0.4)
    merged = merge(adapters, MergeSettings("svd", weights=weights, rank=rank))
    for module in MODULES:
        expected_rank = min(sum(ranks), D_OUT, rank or max(ranks))
        assert merged[module].rank == expected_rank
        assert_same(merged[module].delta(), best_of_rank(weighted_sum(adapters, weights, module), expected_rank), 1e-5)


@pytest.mark.parametrize("unscaled", [False, True])
def test_paper_sum_multiplies_the_sums(unscaled):
    adapters = [adapter(0, scaling=4.0), adapter(1, scaling=0.5)]
    merged = merge(adapters, MergeSettings("paper_sum_unscaled" if unscaled else "paper_sum", weights=(0.3, 0.6)))
    first, second = (math.sqrt(weight * (1.0 if unscaled else size)) for weight, size in ((0.3, 4.0), (0.6, 0.5)))
    for module in MODULES:
        one, two = (each[module] for each in adapters)
        assert_same(merged[module].delta(), (first * one.B + second * two.B) @ (first * one.A + second * two.A), 1e-5)
        assert merged[module].segments == (Segment("merged", 3),)


def test_kept_apart_the_released_codes_adapters_stay_as_they_were():
    adapters = [adapter(0, scaling=4.0), adapter(1, scaling=0.5)]
    merged = merge(adapters, MergeSettings("paper_apart"))
    assert all(pair.apart for pair in merged.values())
    assert not any(pair.apart for pair in merged.together().values())
    for module, pair in merged.items():
        first, second = (one[module] for one in adapters)
        assert [segment.name for segment in pair.segments] == ["source", "target"]
        for part, parent in zip(pair.parts(), (first, second), strict=True):
            assert (part.scaling, part.parts()) == (1.0, [part])
            assert torch.equal(part.A, parent.A)
            assert torch.equal(part.B, parent.B)
        together = merged.together()[module]
        assert torch.equal(together.A, first.A + second.A)
        assert torch.equal(together.B, first.B + second.B)
        assert torch.equal(pair.delta(), (first.B + second.B) @ (first.A + second.A))
        # A merge of merges takes what acts.
        assert_same(merge([merged], MergeSettings("exact"))[module].delta(), pair.delta())


def test_trim_elect_and_average():
    def largest(*values: float) -> list[float]:
        return keep_largest(torch.tensor(values), 0.5, torch.Generator()).tolist()

    assert largest(1.0, -4.0, 3.0, 2.0) == [0.0, -4.0, 3.0, 0.0]
    assert largest(1.0, 2.0, 3.0) == [0.0, 0.0, 3.0]  # floor(1.5) = 1
    assert sum(value != 0.0 for value in largest(2.0, -2.0, 2.0, 2.0)) == 2  # exact under ties
    # Signs elected by the unweighted sum: +, - and (for a sum of zero) +.
    stacked = [torch.tensor([3.0, -2.0, 1.0]), torch.tensor([-1.0, -1.0, -1.0])]
    assert elect_and_average(stacked, [1.0, 2.0]).tolist() == [3.0, (-2.0 - 2.0) / 2, 1.0]
    assert elect_and_average([torch.zeros(2), torch.zeros(2)], [1.0, 1.0]).tolist() == [0.0, 0.0]


def test_dare_by_hand():
    draws = torch.Generator().manual_seed(7)
    keeps = [torch.rand(shape, generator=draws) < 0.4 for shape in ((3, D_IN), (3, D_IN), (D_OUT, 3), (D_OUT, 3))]
    assert all(0 < keep.sum() < keep.numel() for keep in keeps)
    adapters = [adapter(0, scaling=2.0, modules=["m"]), adapter(1, scaling=0.5, modules=["m"])]
    merged = merge(adapters, MergeSettings(ROWS["dare"], weights=(0.5, -1.0), density=0.4, seed=7))["m"]
    first, second = (one["m"] for one in adapters)
    # sqrt(0.5 * 2) = 1; sqrt(|-1 * 0.5|), its sign on A only.
    A = (first.A * keeps[0] - math.sqrt(0.5) * second.A * keeps[1]) / 0.4
    B = (first.B * keeps[2] + math.sqrt(0.5) * second.B * keeps[3]) / 0.4
    assert_same(merged.delta(), B @ A, 1e-5)


@every_rule
def test_seeds_matter_where_a_rule_draws(rule):
    adapters = [adapter(0), adapter(1)]
    first, second = (merge(adapters, MergeSettings(rule, seed=seed))[MODULES[0]] for seed in (1, 2))
    assert torch.equal(first.A, second.A) != merge_rule(rule).draws


WIDER = AdapterWeights({MODULES[0]: LoraPair(torch.ones(3, D_IN + 1), torch.ones(D_OUT, 3))})


TWO, NONE = [adapter(0), adapter(1)], "give at least one adapter to merge, and of each its weights"
UNEQUAL = r"needs equal ranks, but .* has \[2, 3\]; use 'exact'"
FACTORS = [name for name, row in MERGE_RULES.items() if row.space.equal_ranks]


@pytest.mark.parametrize(
    ("adapters", "settings", "message"),
    [
        ([], MergeSettings(), NONE),
        (["runs/one"], MergeSettings(), NONE),
        (TWO, MergeSettings(weights=(1.0,)), "1 merge weights for 2 adapters; give one per adapter"),
        (TWO, MergeSettings(weights=(1.0, 1.0, 1.0)), "3 merge weights for 2 adapters; give one per adapter"),
        ([TWO[0], WIDER], MergeSettings(), rf"differ in the shape \(d_out, d_in\) of {MODULES[0]}"),
        *(([adapter(0, 2), adapter(1, 3)], MergeSettings(rule), rf"rule '{rule}' {UNEQUAL}") for rule in FACTORS),
        (TWO, MergeSettings("ties", density=1e-9), r"rule 'ties' is empty: .* raise merge\.density \(now 1e-09\)"),
        (TWO, MergeSettings("dare_ties", density=1e-9), r"rule 'dare_ties' is empty: .* raise merge\.density"),
        (
            [TWO[0], TWO[0]],
            MergeSettings("paper_sum", (1.0, -1.0)),
            r"is empty: .* give other merge\.weights than \[1\.0, -1\.0\]",
        ),
    ],
)
def test_what_cannot_be_merged_or_comes_out_empty_is_an_error(adapters, settings, message):
    with pytest.raises(AdapterError, match=message):
        merge(adapters, settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "mean"}, "merge rule is 'mean'; allowed: exact, svd, paper_sum"),
        ({"rule": "math:sqrt"}, "merge rule 'math:sqrt' is a builtin_function_or_method; it must be a MergeRule"),
        ({"weights": (1.0, math.nan)}, r"weights is \[1.0, nan\]; it must lie in \[-1000000, 1000000\] each"),
        ({"weights": (0.0, 0.0)}, r"weights is \[0.0, 0.0\]; .* one must not be 0"),
        ({"rule": "svd", "rank": 0}, "rank is 0; it must be at least 1 with rule svd"),
        ({"density": 0.0}, r"density is 0.0; it must lie in \(0, 1\]"),
        ({"rule": "ties", "rank": 4}, "rank is 4; it must be at least 1 with rule svd"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_a_setting_out_of_range_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        MergeSettings(**changes)
