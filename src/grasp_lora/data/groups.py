"""Records that belong together, in groups that no two splits may share.

Records join where they have a key in common, and so do all that a chain of them holds together. An Arabic question has the id of
its English translation, which has the title of its article: so every question of the article, in both languages, is one group.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from grasp_lora.data.records import Record, same_text

MOST_CONTINUED = 20  # rows that go on after another; what more begin with is an opening that many conversations share


def join_groups(key_sets: Iterable[frozenset[str]]) -> dict[str, str]:
    """Join keys that stand together in a record, over all records: key -> name of its connected component.

    Parallel corpora are joined through shared ids, and paragraphs of an article through its title. The name is the
    hash of one of the component's texts, so it does not depend on where the files lie.

    >>> names = join_groups([frozenset({"id:1", "text:b"}), frozenset({"id:1", "text:a"}), frozenset({"text:c"})])
    >>> names["text:b"], names["text:c"]
    ('a', 'c')
    """
    from scipy.cluster.hierarchy import DisjointSet  # takes a moment: not at the top

    joined = DisjointSet()
    for keys in key_sets:
        first = next(iter(keys))
        for key in keys:
            joined.add(key)
            joined.merge(first, key)
    names: dict[str, str] = {}
    for key in sorted(key for key in joined if key.startswith("text:")):
        names.setdefault(joined[key], key.removeprefix("text:"))
    return {key: names[joined[key]] for key in joined}


def by_group(records: Iterable[Record], groups: Mapping[str, str]) -> dict[str, list[Record]]:
    """Return the records of each group, in their order."""
    members: dict[str, list[Record]] = {}
    for record in records:
        members.setdefault(groups[next(iter(record.keys))], []).append(record)
    return members


def keys_with_turns(records: Iterable[Record]) -> Iterator[frozenset[str]]:
    """Yield the keys of each record, and for rows of one conversation a key of both, so that `join_groups` joins them.

    The records are those of all pools, since a conversation may stand in the files of two splits.
    """
    all_records = list(records)
    yield from (record.keys for record in all_records)
    if not any(record.messages for record in all_records):
        return
    whole: dict[bytes, set[str]] = defaultdict(set)
    later: dict[bytes, set[str]] = defaultdict(set)
    for record in all_records:
        key = min(record.keys)
        beginnings = _up_to_turns(record)
        for asked_or_answered in beginnings[-2:]:  # another version may go on after another answer
            whole[asked_or_answered].add(key)
        for beginning in beginnings[:-2]:
            later[beginning].add(key)
    for beginning, keys in later.items():
        if beginning in whole and len(keys) <= MOST_CONTINUED:
            yield frozenset(keys | whole[beginning])


def _up_to_turns(record: Record) -> list[bytes]:
    """A hash of the conversation up to each of its turns, the last one being the record's own answer."""
    turns = record.messages or ({"role": "user", "content": "\n".join(record.fields.values())},)
    turns = tuple(turn for turn in turns if turn["role"] != "system")  # which not all versions of a conversation have
    digest, hashes = hashlib.sha256(), []
    for turn in (*turns, {"role": "assistant", "content": record.answer}):
        digest.update(same_text(turn["content"]).encode() + b"\0")
        hashes.append(digest.copy().digest())
    return hashes
