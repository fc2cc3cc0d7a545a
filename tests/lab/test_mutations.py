"""Each planted fault still stands in the source once, and the tests that are to find it are there."""

from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation, file_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("fault", MUTATIONS, ids=lambda one: one.name)
def test_a_fault_fits(fault: Mutation) -> None:
    assert file_of(fault, ROOT).is_relative_to(ROOT / "src")
    missing = [test for test in fault.tests if not (ROOT / "tests" / test).is_file()]
    assert not missing
