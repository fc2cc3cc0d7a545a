"""When to prune, when to continue, when to train jointly: what was measured says for a recipe's own numbers.

The rule and its measurements: docs/lab/results/README.md, "When to prune". It looks at three things, since only these moved what
was best: whether dev rows stop the trainings, whether the target adapter is trained on top of the source adapter, and, where it
is not, whether the rows of the source language are there.
"""


def advice(dev: int, *, keeps_best: bool, on: str | None, has_source_rows: bool) -> list[str]:
    """Say what to expect the most of, a sentence each.

    Args:
        dev: target rows that decide when a training stops.
        keeps_best: whether a final run keeps its adapter of the lowest dev loss.
        on: where the target adapter is trained (`target.on`).
        has_source_rows: whether there is data of the source language, not a source adapter alone.

    >>> advice(0, keeps_best=True, on="source", has_source_rows=False)[0].partition(":")[0]
    'no dev rows stop the trainings, so the training rows are overfitted'
    """
    if dev and keeps_best:
        gain = "then pruning alone gains little"
        if on == "source":
            gain = (
                "pruning lowered the loss of both adapters' sum in two of five settings and raised it a little in one; answers "
                "were better in one, and no different in the others"
            )
        elif on == "auto":
            gain = (
                "they also choose whether the target adapter is trained on top of the source adapter; so chosen, GRASP's result "
                "answered better than the source adapter continued in two of five settings, and no different in the others"
            )
        said = [
            f"{dev} dev rows stop the trainings in time: {gain}; a run also continues the source adapter, "
            "and the dev rows choose what it hands over"
        ]
    else:
        why = "the last step is kept, whatever the dev rows say" if dev else "no dev rows stop the trainings"
        said = [
            f"{why}, so the training rows are overfitted: prune, as this recipe does; wherever it was measured, its loss was "
            "lower than that of the merge trained as long without pruning; the merge that nobody trains further may have a lower "
            "one yet"
        ]
    if has_source_rows and on is None:
        said.append(
            "one adapter trained on both languages (joint) is a strong rival, and takes the time of another source adapter: "
            "try grasp-lora compare RECIPE --seeds 42 --methods joint,continued,grasp"
        )
    return said
