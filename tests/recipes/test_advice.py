"""The advice follows from what a recipe says, and `check` and `init` print it."""

from pathlib import Path

import pytest

from grasp_lora.engine.preflight import preflight
from grasp_lora.engine.session import Session
from grasp_lora.recipes.advice import advice
from grasp_lora.recipes.load import load_recipe


@pytest.mark.parametrize(
    ("dev", "says"),
    [
        (50, "50 dev rows stop the trainings in time"),
        (0, "no dev rows stop the trainings, so the training rows are overfitted: prune"),
    ],
)
def test_what_stops_a_training_decides(dev: int, says: str) -> None:
    for on in (None, "source", "auto"):
        [said] = advice(dev, on=on, has_source_rows=False, prunes=True)
        assert said.startswith(says)


def test_where_nothing_is_pruned_it_says_so() -> None:
    for on in (None, "source", "auto"):
        [said] = advice(15, on=on, has_source_rows=False, prunes=False)
        assert "Nothing is pruned" in said
        assert "GRASP" not in said
        [said] = advice(0, on=on, has_source_rows=False, prunes=False)
        assert "which this recipe does not" in said


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), "6 dev rows stop the trainings"),
        (("data.target.dev=0",), "no dev rows stop the trainings, so the training rows"),
    ],
)
def test_check_says_it_of_the_recipes_own_numbers(overrides: tuple[str, ...], says: str, tiny_workspace: Path) -> None:
    found = [one for one in preflight(Session(*load_recipe("tiny.yaml", overrides))) if one.topic == "advice"]
    assert len(found) == 2
    assert found[0].text.startswith(says)
    assert "joint" in found[-1].text
    assert {one.level for one in found} == {"ok"}


def test_joint_training_is_a_rival_of_adapters_trained_apart() -> None:
    for on, sentences in ((None, 2), ("source", 1), ("auto", 1)):
        assert len(advice(50, on=on, has_source_rows=True, prunes=True)) == sentences
