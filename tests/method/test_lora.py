"""LoRA factors: exact deltas, balancing, and what balancing does to training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grasp_lora.errors import AdapterError
from grasp_lora.method.lora import LoraPair, Segment


def random_pair(seed: int = 0, rank: int = 3, d_in: int = 7, d_out: int = 5, scaling: float = 2.0) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=generator)
    B = 0.01 * torch.randn(d_out, rank, generator=generator)
    return LoraPair(A, B, scaling, (Segment("source", 1), Segment("target", rank - 1)))


def assert_same(actual: Tensor, expected: Tensor, relative: float = 1e-6) -> None:
    assert (actual - expected).norm() <= relative * expected.norm()


def test_shapes_and_delta():
    pair = LoraPair(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0], [20.0]]), scaling=0.5)
    assert (pair.rank, pair.shape) == (1, (2, 3))
    assert pair.delta().tolist() == [[5.0, 10.0, 15.0], [10.0, 20.0, 30.0]]


@pytest.mark.parametrize(("A", "B"), [((2, 4), (3, 3)), ((4,), (3, 2)), ((2, 4), (3, 2, 1)), ((4, 2), (2, 3))])
def test_factors_and_segments_that_do_not_fit_are_an_error(A, B):
    with pytest.raises(AdapterError, match=r"do not fit; A must be \[rank, d_in\] and B \[d_out, rank\]"):
        LoraPair(torch.ones(A), torch.ones(B))
    with pytest.raises(AdapterError, match="must add up to rank 2"):
        LoraPair(torch.ones(2, 4), torch.ones(3, 2), segments=(Segment("source", 1),))
    for segments in ((), (Segment("source", 1), Segment("target", 2))):
        with pytest.raises(AdapterError, match="must add up to rank 3, with equal ranks"):
            LoraPair(torch.ones(3, 4), torch.ones(2, 3), segments=segments, apart=True)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    rank=st.integers(2, 9),
    scaling=st.floats(1e-3, 1e3),
    weight=st.floats(-100, 100).filter(lambda weight: abs(weight) > 1e-6),
)
def test_balanced_is_the_same_delta_with_equal_norms(seed, rank, scaling, weight):
    pair = random_pair(seed, rank, scaling=scaling)
    balanced = pair.balanced(weight)
    assert balanced.scaling == 1.0
    assert balanced.segments == pair.segments
    assert_same(balanced.delta().double(), weight * scaling * (pair.B.double() @ pair.A.double()))
    norm_A, norm_B = balanced.A.norm(dim=1), balanced.B.norm(dim=0)
    torch.testing.assert_close(norm_A, norm_B, rtol=1e-5, atol=0)
    expected = (abs(weight) * scaling * pair.A.norm(dim=1) * pair.B.norm(dim=0)).sqrt()
    torch.testing.assert_close(norm_A, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("weight", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("zero", ["A", "B"])
def test_a_component_with_a_zero_factor_keeps_the_other(zero, weight):
    pair = random_pair()
    A, B = pair.A.clone(), pair.B.clone()
    (A[1] if zero == "A" else B[:, 1]).zero_()
    balanced = LoraPair(A, B, 2.0).balanced(weight)
    assert torch.isfinite(balanced.A).all()
    assert torch.isfinite(balanced.B).all()
    assert_same(balanced.delta(), weight * 2.0 * (B @ A))
    alive, dead = (balanced.B[:, 1], balanced.A[1]) if zero == "A" else (balanced.A[1], balanced.B[:, 1])
    assert alive.norm() > 0
    assert dead.norm() == 0


def test_weight_zero_is_a_fresh_component_that_can_train_and_two_zero_factors_stay_zero():
    balanced = random_pair().balanced(0.0)
    assert balanced.delta().abs().max() == 0
    assert (balanced.A.norm(dim=1) > 0).all()
    zero = LoraPair(torch.zeros(1, 3), torch.zeros(2, 1)).balanced()
    assert not zero.A.any()
    assert not zero.B.any()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_norms_neither_vanish_nor_overflow(size):
    pair = LoraPair(torch.full((1, 4), size), torch.full((3, 1), 1 / size))
    balanced = pair.balanced()
    torch.testing.assert_close(balanced.A.norm(dim=1), balanced.B.norm(dim=0))
    assert_same(balanced.delta(), torch.ones(3, 4))
