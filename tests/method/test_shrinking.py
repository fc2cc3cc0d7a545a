"""A smaller adapter: what is dropped changes nothing, what is approximated is best, and the stated error is the dense one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.method.masks import MaskSet, MaskSettings
from grasp_lora.method.shrinking import (
    delta_error,
    drop_emptied,
    in_dtype,
    lower_rank,
    pad_ranks,
    rounded,
    share_scaling,
)


def random_pair(
    rank: int, d_out: int = 7, d_in: int = 9, scaling: float = 1.0, seed: int = 0, segments: tuple[Segment, ...] = ()
) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
    return LoraPair(A, B, scaling, segments)


def dense_errors(before: AdapterWeights, after: AdapterWeights) -> dict[str, float]:
    """The same errors from dense float64 deltas; "" is the one over all modules."""
    changes, sizes, errors = [], [], {}
    for module, pair in before.items():
        old = pair.scaling * pair.B.double() @ pair.A.double()
        new = (
            after[module].scaling * after[module].B.double() @ after[module].A.double() if module in after else 0 * old
        )
        changes.append((new - old).flatten())
        sizes.append(old.flatten())
        errors[module] = float((new - old).norm() / old.norm())
    return errors | {"": float(torch.cat(changes).norm() / torch.cat(sizes).norm())}


class TestDropEmptied:
    def test_a_zero_row_of_a_or_column_of_b_goes_and_the_delta_stays(self) -> None:
        pair = random_pair(5, scaling=3.0, segments=(Segment("source", 2), Segment("target", 3)))
        pair.A[1] = 0
        pair.B[:, 3] = 0
        pair.A[4, :-1] = 0  # one value left
        dropped = drop_emptied(AdapterWeights({"m": pair}))["m"]
        assert dropped.rank == 3
        assert dropped.segments == (Segment("source", 1), Segment("target", 2))
        assert dropped.scaling == 3.0
        torch.testing.assert_close(dropped.delta(), pair.delta(), rtol=1e-6, atol=1e-6)
        assert torch.equal(dropped.A, pair.A[[0, 2, 4]])

    def test_a_segment_or_a_module_with_nothing_left_goes_too(self) -> None:
        half = random_pair(4, segments=(Segment("source", 2), Segment("target", 2)))
        half.A[:2] = 0
        weights = AdapterWeights({"half": half, "none": LoraPair(torch.randn(2, 3), torch.zeros(4, 2))})
        dropped = drop_emptied(weights)
        assert set(dropped) == {"half"}
        assert dropped["half"].segments == (Segment("target", 2),)
        assert len(drop_emptied(AdapterWeights({"none": weights["none"]}))) == 0

    @pytest.mark.parametrize("scope", ["factor", "global"])
    def test_a_mask_of_granularity_component_leaves_what_it_kept(self, scope: str) -> None:
        segments = (Segment("source", 4), Segment("target", 4))
        pairs = {f"m{i}": random_pair(8, seed=i, segments=segments) for i in range(3)}
        masks = MaskSet(pairs, MaskSettings(scope=scope, granularity="component"))
        masks.commit(0.5)
        weights = AdapterWeights(masks.pairs)
        dropped = drop_emptied(weights)
        assert sum(pair.rank for pair in dropped.values()) == 12
        assert delta_error(weights, dropped).worst_error < 1e-12

    def test_a_mask_of_single_weights_empties_nothing(self) -> None:
        masks = MaskSet({"m": random_pair(8)}, MaskSettings())
        masks.commit(0.5)
        assert drop_emptied(AdapterWeights(masks.pairs))["m"].rank == 8


class TestLowerRank:
    @given(rank=st.integers(1, 5), scaling=st.sampled_from([0.25, 1.0, -3.0]), seed=st.integers(0, 20))
    def test_it_is_the_best_approximation(self, rank: int, scaling: float, seed: int) -> None:
        pair = random_pair(6, scaling=scaling, seed=seed)
        weights = AdapterWeights({"m": pair})
        lowered = lower_rank(weights, rank)
        assert lowered["m"].rank == rank
        sizes = torch.linalg.svdvals(pair.delta().double())
        best = float(sizes[rank:].norm() / sizes.norm())
        assert delta_error(weights, lowered).relative_error == pytest.approx(best, rel=1e-4, abs=1e-6)

    def test_only_higher_ranks_change(self) -> None:
        segments = (Segment("source", 3), Segment("target", 3))
        weights = AdapterWeights(
            {"low": random_pair(2), "high": random_pair(6, segments=segments), "plain": random_pair(6)}
        )
        lowered = lower_rank(weights, 2)
        assert lowered["low"] is weights["low"]
        assert lowered["high"].segments == (Segment("merged", 2),)
        assert lowered["plain"].segments == ()
        assert list(lowered) == list(weights)

    def test_a_rank_above_what_the_delta_has_is_exact(self) -> None:
        pair = random_pair(6, d_out=3)
        lowered = lower_rank(AdapterWeights({"m": pair}), 4)
        assert lowered["m"].rank == 3
        torch.testing.assert_close(lowered["m"].delta(), pair.delta(), rtol=1e-5, atol=1e-5)


def test_padding_changes_no_delta() -> None:
    weights = AdapterWeights({"a": random_pair(2, segments=(Segment("source", 2),)), "b": random_pair(5, d_in=4)})
    padded = pad_ranks(weights)
    assert [pair.rank for pair in padded.values()] == [5, 5]
    assert padded["a"].segments == (Segment("source", 2), Segment("padding", 3))
    assert padded["b"].segments == ()
    assert torch.equal(padded["b"].delta(), weights["b"].delta())
    assert delta_error(weights, padded).worst_error < 1e-12
    assert drop_emptied(padded)["a"].segments == weights["a"].segments


def test_one_scaling_for_all_or_the_very_same_factors() -> None:
    alike = AdapterWeights({"a": random_pair(2, scaling=4.0), "b": random_pair(3, scaling=4.0)})
    assert share_scaling(alike) is alike
    mixed = AdapterWeights({"a": random_pair(2, scaling=4.0), "b": random_pair(3, scaling=0.5)})
    shared = share_scaling(mixed)
    assert {pair.scaling for pair in shared.values()} == {1.0}
    assert delta_error(mixed, shared).worst_error < 1e-6


class TestDeltaError:
    @given(rank=st.integers(1, 6), noise=st.sampled_from([1e-6, 1e-3, 1.0]), seed=st.integers(0, 20))
    def test_it_is_that_of_the_dense_deltas(self, rank: int, noise: float, seed: int) -> None:
        before = AdapterWeights({f"m{i}": random_pair(rank, scaling=2.0 + i, seed=seed + i) for i in range(3)})
        after = {
            module: LoraPair(pair.A + noise * random_pair(rank, seed=99).A, pair.B, pair.scaling)
            for module, pair in before.items()
        }
        error = delta_error(before, after)
        dense = dense_errors(before, AdapterWeights(after))
        assert error.relative_error == pytest.approx(dense.pop(""), rel=1e-6)
        assert error.worst_module == max(dense, key=lambda module: dense[module])
        assert error.worst_error == pytest.approx(dense[error.worst_module], rel=1e-6)

    def test_other_ranks_and_missing_modules_count(self) -> None:
        before = AdapterWeights({"kept": random_pair(4, seed=1), "gone": random_pair(4, seed=2)})
        after = AdapterWeights({"kept": random_pair(2, seed=3)})
        error, dense = delta_error(before, after), dense_errors(before, after)
        assert error.relative_error == pytest.approx(dense[""], rel=1e-9)
        assert delta_error({"gone": before["gone"]}, {}).worst_error == pytest.approx(1.0)

    def test_deltas_of_zero(self) -> None:
        zero = AdapterWeights({"m": LoraPair(torch.ones(1, 3), torch.zeros(2, 1))})
        assert delta_error(zero, zero).relative_error == 0.0
        assert delta_error(zero, {}).worst_error == 0.0
        assert delta_error(zero, {"m": random_pair(1, 2, 3)}).worst_error == math.inf


class TestDtypes:
    def test_all_factors_are_rounded_and_the_rest_is_kept(self) -> None:
        pair = random_pair(2, scaling=0.5, segments=(Segment("source", 2),))
        small = in_dtype(AdapterWeights({"m": pair}), torch.bfloat16)["m"]
        assert small.A.dtype == small.B.dtype == torch.bfloat16
        assert torch.equal(small.A, pair.A.bfloat16())
        assert (small.scaling, small.segments) == (0.5, pair.segments)

    def test_a_value_too_large_is_refused_by_name(self) -> None:
        pair = random_pair(2)
        pair.B[0, 0] = -1e5
        weights = AdapterWeights({"layer.q_proj": pair})
        message = (
            r"factor B of layer\.q_proj holds a value of size 1e\+05, but float16 ends at 6\.55e\+04; use bfloat16 or"
        )
        with pytest.raises(AdapterError, match=message):
            in_dtype(weights, torch.float16)
        in_dtype(weights, torch.bfloat16)

    def test_the_largest_value_fits(self) -> None:
        assert torch.equal(
            rounded(torch.tensor([65504.0]), torch.float16, "x"), torch.tensor([65504.0], dtype=torch.float16)
        )
