"""Accuracy and macro-F1 of labels that were chosen."""

from typing import TYPE_CHECKING

from grasp_lora.evaluation.outputs import MetricScore, Outputs, score_of_fractions, sign

if TYPE_CHECKING:
    from torch import Tensor


def accuracy(outputs: Outputs) -> MetricScore:
    """Score 100 where the prediction is one of the references, letter by letter, else 0."""
    return score_of_fractions("accuracy", outputs, list(map(float, _hits(outputs))), match="text")


def macro_f1(outputs: Outputs) -> MetricScore:
    """Score the mean over labels of each label's F1: 2 * right / (predicted + true).

    The labels that count are those that occur in the references. A prediction that is none of them is wrong, and has no F1 of its
    own. Of several references the predicted one counts, or else the first. `per_example` is that of `accuracy`; the statistics
    are, of each label, whether the example is right, predicted and true.

    Source: scikit-learn's `f1_score(average="macro")` with the labels of the references.
    """
    labels = sorted({*outputs.labels, *(reference for references in outputs.references for reference in references)})
    hits = _hits(outputs)
    rows = []
    for prediction, references, hit in zip(outputs.predictions, outputs.references, hits, strict=True):
        true = prediction if hit else references[0]
        cells = ((label == prediction == true, label == prediction, label == true) for label in labels)
        rows.append(tuple(float(cell) for one in cells for cell in one))
    return MetricScore(
        "macro_f1",
        _macro([sum(column) for column in zip(*rows, strict=True)]),
        sign(nrefs=outputs.reference_count, match="text", labels="in_references", average="macro"),
        tuple(100.0 * hit for hit in hits),
        tuple(rows),
    )


def _macro(sums: list[float]) -> float:
    import torch

    return float(macro_f1_from_statistics(torch.tensor(sums, dtype=torch.float64)))


def macro_f1_from_statistics(sums: "Tensor") -> "Tensor":
    """Compute many macro-F1 scores at once, each over the labels that its examples have.

    Args:
        sums: the `statistics` of `macro_f1` added up over examples [..., 3 * labels].

    Returns:
        Scores in [0, 100], of shape [...].
    """
    right, predicted, true = sums.reshape(*sums.shape[:-1], -1, 3).unbind(-1)
    there = true > 0
    scores = 2.0 * right / (predicted + true).clamp(min=1.0)
    return 100.0 * (scores * there).sum(dim=-1) / there.sum(dim=-1)


def _hits(outputs: Outputs) -> list[bool]:
    pairs = zip(outputs.predictions, outputs.references, strict=True)
    return [prediction in references for prediction, references in pairs]
