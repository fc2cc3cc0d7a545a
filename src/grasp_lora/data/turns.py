"""Rows that hold one conversation, each a turn longer than the one before: the answer of one stands in the prompt of the next."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator

from grasp_lora.data.records import Record, same_text

MOST = 20  # rows that go on after another; what more begin with is an opening that many conversations share


def keys_with_turns(records: Iterable[Record]) -> Iterator[frozenset[str]]:
    """Yield the keys of each record, and for rows of one conversation a key of both, so that `join_groups` joins them.

    Args:
        records: of all pools, since a conversation may stand in the files of two splits.
    """
    known = list(records)
    yield from (record.keys for record in known)
    if not any(record.messages for record in known):
        return
    whole: dict[bytes, set[str]] = defaultdict(set)
    later: dict[bytes, set[str]] = defaultdict(set)
    for record in known:
        key = min(record.keys)
        *begun, ended = _beginnings(record)
        whole[ended].add(key)
        for beginning in begun:
            later[beginning].add(key)
    for beginning, keys in later.items():
        if beginning in whole and len(keys) <= MOST:
            yield frozenset(keys | whole[beginning])


def _beginnings(record: Record) -> list[bytes]:
    """A hash of the conversation up to each of its answers, the last one being the record's own."""
    turns = record.messages or ({"role": "user", "content": "\n".join(record.fields.values())},)
    digest, found = hashlib.sha256(), []
    for turn in (*turns, {"role": "assistant", "content": record.answer}):
        digest.update(same_text(turn["content"]).encode() + b"\0")
        if turn["role"] == "assistant":
            found.append(digest.copy().digest())
    return found
