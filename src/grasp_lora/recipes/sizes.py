"""Sizes of the splits for a user's own examples: what the held-out splits leave is for training, in whole groups in any order."""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grasp_lora.data.groups import by_group, join_groups, keys_with_turns
from grasp_lora.data.records import Record
from grasp_lora.data.splits import HELD_OUT, PAPER_SIZES, assign
from grasp_lora.errors import DataError
from grasp_lora.recipes.corpus import Corpus
from grasp_lora.text.display import quoted

MOST_TRAIN = 200  # an example of them is trained on 20 times in a run: more take longer than a first run should
FEWEST = 30
FEWEST_DEV = 8
FEWEST_SOURCE = 20
ORDERS = 20  # random orders of the groups in which the split sizes must fit


@dataclass(frozen=True)
class Sizes:
    """How many examples go where, `spare` ones nowhere; `source` are those that no held-out target example excludes, maybe of one
    group alone."""

    splits: dict[str, int]
    spare: int
    source: int
    one_source_group: bool


def token_limit(target: Corpus, sources: Sequence[Corpus]) -> int:
    """The limit of tokens for both languages: it leaves out what is very long, unless too little would be left."""
    corpora = (target, *sources)
    most = max(corpus.most_tokens for corpus in corpora)
    left = sum(len(corpus.usable(most)) for corpus in sources)
    if len(target.usable(most)) >= FEWEST and (not sources or left >= FEWEST_SOURCE):
        return most
    return max(corpus.roomy_tokens for corpus in corpora)


def choose_sizes(target: Corpus, sources: Sequence[Corpus]) -> Sizes:
    """Find the largest split sizes that whole groups can fill in any order.

    Raises:
        DataError: there are too few examples or groups, or the source has too few that may be trained on.
    """
    most = token_limit(target, sources)
    records = target.usable(most)
    if len(records) < FEWEST:
        raise DataError(
            f"{target.name} has {len(records)} examples; at least {FEWEST} are needed for train, micro-dev and test "
            "(40 with a dev set, too, and 400 for held-out splits as large as the paper's)"
        )
    source_records = [record for corpus in sources for record in corpus.usable(most)]
    joined = join_groups(keys_with_turns((*records, *source_records)))
    groups, source_groups = by_group(records, joined), by_group(source_records, joined)
    for share in (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5):
        total = int(len(records) * share)
        if total < FEWEST:
            break
        sizes = _sizes(total)
        held_out = [found for order in range(ORDERS) if (found := _held_out(groups, sizes, order)) is not None]
        if len(held_out) == ORDERS:
            left = [[len(source_groups[name]) for name in source_groups.keys() - found] for found in held_out]
            fewest = min(map(sum, left))
            if sources and fewest < FEWEST_SOURCE:
                raise DataError(
                    f"the source has {len(source_records)} examples, of which {fewest} share no question, context or article "
                    f"with held-out target examples; at least {FEWEST_SOURCE} are needed: give more source data"
                )
            splits = _with_the_rest(groups, sizes)
            return Sizes(splits, len(records) - sum(splits.values()), fewest, any(len(found) < 2 for found in left))
    largest = max(groups.values(), key=len)
    column, value = _shared_by(largest)
    shared = f"the {column} {quoted(value)}" if column else "one prompt, context or document"
    rename = (
        f", or rename the column {column} if it means something else" if column and target.format != "squad" else ""
    )
    raise DataError(
        f"the {len(records)} examples of {target.name} form {len(groups)} groups of what belongs together, the largest of "
        f"{len(largest)}, which have {shared}; splits take whole groups, so more of them are needed: add examples of other "
        f"texts{rename}"
    )


def _sizes(examples: int) -> dict[str, int]:
    """A quarter for the test and a fifth for dev, up to the paper's sizes; half or so is left for training."""
    micro_dev = min(PAPER_SIZES["micro_dev"], max(8, examples // 13))
    dev = min(PAPER_SIZES["dev"], examples // 5)
    if dev < FEWEST_DEV:
        dev = 0
    test = min(PAPER_SIZES["test"], math.ceil(examples / 4))
    return {
        "test": test,
        "dev": dev,
        "micro_dev": micro_dev,
        "train": min(MOST_TRAIN, examples - micro_dev - dev - test),
    }


def _with_the_rest(groups: Mapping[str, Sequence[Record]], sizes: dict[str, int]) -> dict[str, int]:
    """Let training have as much of what is left as whole groups can give in any order."""
    rest = sum(map(len, groups.values())) - sum(sizes.values())
    for share in (1.0, 0.75, 0.5, 0.25):
        larger = sizes | {"train": min(MOST_TRAIN, sizes["train"] + int(rest * share))}
        if all(_held_out(groups, larger, order) is not None for order in range(ORDERS)):
            return larger
    return sizes


def _held_out(groups: Mapping[str, Sequence[Record]], sizes: Mapping[str, int], order: int) -> set[str] | None:
    """Split the groups in one random order; return those that are held out, None if a split stays short."""
    names = sorted(groups)
    random.Random(order).shuffle(names)
    splits = assign([[name] * len(groups[name]) for name in names], dict(sizes))
    if any(len(splits[name]) < size for name, size in sizes.items()):
        return None
    return {name for split in HELD_OUT for name in splits[split]}


def _shared_by(records: Sequence[Record]) -> tuple[str | None, str]:
    """The column and the value that most records of a group have in common; no column where it is the text itself."""
    counts = Counter(key for record in records for key in record.keys)
    kind, _, value = max(counts, key=lambda key: (counts[key], key)).partition(":")
    column = {"id": "id", "group": "group", "article": "title"}.get(kind)
    return column, value.rpartition("#")[2] if kind == "article" else value
