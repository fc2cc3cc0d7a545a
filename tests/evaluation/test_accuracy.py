"""Accuracy and macro-F1 against values worked out by hand."""

import pytest
import torch

from grasp_lora.evaluation.metrics import METRICS, score

TRUE = ["neg", "neg", "neg", "pos", "pos", "neu"]
CHOSEN = ["neg", "neg", "pos", "pos", "neu", "odd"]


def scores(predictions, references, names=("accuracy", "macro_f1")):
    return score(names, predictions, [[one] if isinstance(one, str) else one for one in references], "jv")


def test_values_by_hand():
    found = scores(CHOSEN, TRUE)
    assert found["accuracy"].value == 50.0  # 3 of 6
    # neg: 2 right, 2 predicted, 3 true: 4/5. pos: 1 right, 2 predicted, 2 true: 2/4. neu: none right: 0. odd has no F1.
    assert found["macro_f1"].value == pytest.approx(100 * (4 / 5 + 1 / 2 + 0) / 3)
    assert found["macro_f1"].per_example == found["accuracy"].per_example == (100.0, 100.0, 0.0, 100.0, 0.0, 0.0)


def test_signatures_say_how():
    found = scores(CHOSEN, TRUE)
    assert found["accuracy"].signature == "nrefs:1|refs:best|match:text"
    assert found["macro_f1"].signature == "nrefs:1|match:text|labels:in_references|average:macro"


@pytest.mark.parametrize("drawn", [range(6), [0, 0, 3, 5], [0, 1, 2], [5], [3, 4, 4]])
def test_a_draw_scores_as_its_examples_do(drawn):
    """Labels that a draw has not are not in its mean."""
    whole = scores(CHOSEN, TRUE)["macro_f1"]
    sums = torch.tensor([whole.statistics[index] for index in drawn], dtype=torch.float64).sum(dim=0)
    alone = scores([CHOSEN[index] for index in drawn], [TRUE[index] for index in drawn])["macro_f1"]
    from_statistics = METRICS["macro_f1"].from_statistics
    assert float(from_statistics(sums)) == pytest.approx(alone.value)
    assert from_statistics(sums.expand(2, 3, -1)).shape == (2, 3)


def test_of_several_references_the_predicted_one_counts():
    found = scores(["a", "b", "c"], [["b", "a"], ["a", "c"], ["c"]])
    assert found["accuracy"].value == pytest.approx(200 / 3)
    # a: 1 right, 1 predicted, 2 true: 2/3. c: 1. b is never true, so it has no part.
    assert found["macro_f1"].value == pytest.approx(100 * (2 / 3 + 1) / 2)


def test_letters_count_as_they_are():
    assert scores(["Pos", "pos "], ["pos", "pos"])["accuracy"].value == 0.0
