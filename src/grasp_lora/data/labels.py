"""The labels of a classification: what an answer may be, checked before a model sees them."""

import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from grasp_lora.data.encode import Encoder, Example, Tally
from grasp_lora.data.records import Record, same_text
from grasp_lora.errors import DataError
from grasp_lora.text.characters import INVISIBLE, JOINERS
from grasp_lora.text.display import listed, quoted

logger = logging.getLogger(__name__)

MOST_LABELS = 200  # more are texts, which a model should write
_VIRAMAS = "\u094d\u09cd\u0a4d\u0acd\u0b4d\u0bcd\u0c4d\u0ccd\u0d4d\u0dca"  # a joiner after one belongs to the letter
_AROUND = re.compile(rf"\A[\s\u200b{JOINERS}]|[\s\u200b]\Z|(?<![{_VIRAMAS}])[{JOINERS}]\Z")


def check_records(records: Iterable[Record]) -> None:
    """Check that each record has one label, without white space around it.

    Raises:
        DataError: one has not; the message names it, and of white space the others, too.
    """
    around = []
    for record in records:
        if record.references != (record.answer,):
            raise DataError(
                f"example {quoted(record.id)} has references beside its label, and a classification has one label an example; "
                "leave out the column references"
            )
        if _has_space_around(record.answer):
            around.append(record)
    if around:
        others = f", also in {listed([record.id for record in around[1:]])}" if len(around) > 1 else ""
        raise DataError(
            f"example {quoted(around[0].id)} has the label {quoted(around[0].answer)} with white space around it; "
            f"remove that{others}"
        )


def check_labels(labels: Iterable[str], where: str) -> tuple[str, ...]:
    """Return labels in the order of the alphabet, if they can be chosen from.

    Args:
        labels: some may stand there more than once.
        where: what they are, for messages, such as `data.labels`.

    Raises:
        DataError: there are fewer than two or more than MOST_LABELS different ones, one is blank or has white space around it, or
            two differ in case, white space or invisible marks alone.
    """
    different = tuple(sorted(set(labels)))
    alike: dict[str, str] = {}
    for label in different:
        if not label or _has_space_around(label):
            raise DataError(f"{where}: the label {quoted(label)} is empty or has white space around it; correct it")
        if (other := alike.setdefault(_meaning(label), label)) != label:
            raise DataError(
                f"{where}: the labels {quoted(other)} and {quoted(label)} differ in case or white space alone; write them alike"
            )
    if len(different) < 2:
        raise DataError(f"{where}: {listed(different) or 'no label'}; a classification needs two labels or more")
    if len(different) > MOST_LABELS:
        raise DataError(
            f"{where}: {len(different)} labels, first {listed(different[:3])}; at most {MOST_LABELS} are allowed. Where they "
            "are texts, take the task completion"
        )
    return different


def count_labels(given: Sequence[str], splits: Mapping[str, Sequence[Example]]) -> dict[str, dict[str, int]]:
    """Return each label that can be chosen, and how often it stands in each split; the source's may have others.

    Args:
        given: the recipe's labels; none to take those of the split `train`.
        splits: examples by split.

    Raises:
        DataError: a target example has another label, a source example one that is written otherwise, or see `check_labels`.
    """
    found = {name: Counter(example.references[0] for example in examples) for name, examples in splits.items()}
    where = "data.labels" if given else "the training rows of the target"
    labels = check_labels(given or found["train"], where)
    known = {_meaning(label): label for label in labels}
    for name, examples in splits.items():
        for example in examples:
            label = example.references[0]
            meant = known.get(_meaning(label))
            if label not in labels and (meant or not name.startswith("source")):
                advice = f"write it as {quoted(meant)}" if meant else "correct it, or name every label in data.labels"
                raise DataError(
                    f"the {name} example {quoted(example.id)} has the label {quoted(label)}, which is not among those of {where} "
                    f"({listed(labels)}); {advice}"
                )
    for name, loss in (("train", "nothing is learned of it"), ("test", "the scores say nothing of it")):
        if missing := [label for label in labels if splits[name] and not found[name][label]]:
            logger.warning("no %s row has the label %s: %s", name, listed(missing), loss)
    return {label: {name: counts[label] for name, counts in found.items()} for label in labels}


def encode_labels(labels: Iterable[str], encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """Tokenise labels as the encoder does the answers of examples.

    Raises:
        DataError: two labels become the same tokens.
    """
    records = [Record(label, {"text": label}, label, (label,), frozenset()) for label in labels]
    names = [record.id for record in records]
    examples = replace(encoder, max_tokens=sys.maxsize, max_document_tokens=None).encode(records, names, Tally())
    tokens = {example.id: example.completion_ids for example in examples if example is not None}
    same: dict[tuple[int, ...], str] = {}
    for label, ids in tokens.items():
        if (other := same.setdefault(ids, label)) != label:
            raise DataError(
                f"to the backbone's tokenizer the labels {quoted(other)} and {quoted(label)} are the same tokens; rename one"
            )
    return tokens


def _has_space_around(label: str) -> bool:
    """Whether white space stands around a label, that of no width and lone joiners among it."""
    return _AROUND.search(INVISIBLE.sub("", label)) is not None


def _meaning(label: str) -> str:
    return same_text(label).casefold()
