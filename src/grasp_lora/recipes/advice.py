"""When to prune, when to continue, when to train jointly: what was measured says for a recipe's own numbers.

The rule and its measurements: lab/results/where-pruning-helps.md, "When to prune". It looks at three things, since only
these moved what was best: whether dev rows stop the trainings, whether the target adapter is trained on top of the source
adapter, and, where it is not, whether the rows of the source language are there.
"""


def advice(dev: int, *, on: str | None, has_source_rows: bool, prunes: bool) -> list[str]:
    """Say what to expect the most of, a sentence each.

    Args:
        dev: target rows that decide when a training stops.
        on: where the target adapter is trained (`target.on`).
        has_source_rows: whether there is data of the source language, not a source adapter alone.
        prunes: whether a prune ratio is learned, or given above 0.
    """
    if dev:
        gain = "Pruning alone then gains little"
        if not prunes:
            gain = "Nothing is pruned. To learn how much to prune, set final.prune_ratio to null"
        elif on == "source":
            gain = (
                "Pruning lowered the loss of both adapters' sum in three of six measured settings. Answers were better in one, "
                "and no different in the others"
            )
        elif on == "auto":
            gain = (
                "In two of seven measured settings GRASP's result then answered better than the source adapter trained on. In "
                "five no difference was shown"
            )
        sentences = [f"{dev} dev rows stop the trainings in time, and choose which adapter you get. {gain}"]
    else:
        prune = (
            "prune, as this recipe does" if prunes else "prune (final.prune_ratio: null), which this recipe does not"
        )
        sentences = [
            f"no dev rows stop the trainings, so the training rows are overfitted: {prune}. Wherever it was measured, its loss "
            "was lower than that of the merge trained as long without pruning. The merge that nobody trains further may have a "
            "lower one yet"
        ]
    if has_source_rows and on is None:
        sentences.append(
            "one adapter trained on both languages (joint) is a strong rival: try "
            "grasp-lora compare with this recipe and --seeds 42 --methods joint,continued,grasp"
        )
    return sentences
