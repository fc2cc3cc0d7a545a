"""Splits by whole groups of records that belong together, and the proof that they are disjoint."""

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import TypeVar

from grasp_lora.data.encode import Encoder, Example, Tally
from grasp_lora.data.records import Pool, Record, same_text
from grasp_lora.errors import DataError
from grasp_lora.text.display import quoted

SPLITS = ("source_train", "source_dev", "train", "dev", "micro_dev", "test")
PAPER_SIZES = {"test": 100, "dev": 50, "micro_dev": 16}  # of the target's held-out splits; experimental setup
HELD_OUT = ("test", "dev", "micro_dev")  # of the target: no source example may touch their groups
SPREAD = 8
LEAST_PORTION = 256

Counts = dict[str, int | None]
Member = TypeVar("Member")


@dataclass(frozen=True)
class SplitSize:
    """How large a split is; of the lengths in tokens the least, median, 95th percentile and largest, empty without examples."""

    examples: int
    groups: int
    prompt_tokens: dict[str, int]
    completion_tokens: dict[str, int]


@dataclass(frozen=True)
class DataReport:
    """What became of the data.

    Args:
        task, split_seed, max_tokens: as they were set.
        chat_template: whether prompts stand in the tokenizer's chat template.
        prompt: template of the target's prompts.
        numbers_as_ids: whole numbers that are ids of source and target at once: often they only count the rows of each file.
        target, source: what became of their records.
        splits: size of each of SPLITS.
        labels: of a classification, how often each stands in the target's splits.
        completion: of a classification, the template of the target's answers.
        end_of_turn: the token that ends an answer in a chat, where that is not the tokenizer's EOS.
    """

    task: str
    split_seed: int
    max_tokens: int
    chat_template: bool
    prompt: str
    numbers_as_ids: int
    target: Tally
    source: Tally | None
    splits: dict[str, SplitSize]
    labels: dict[str, dict[str, int]] | None = None
    completion: str | None = None
    end_of_turn: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return it as data.json holds it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Splits:
    """Disjoint splits; the source's may be empty, dev is empty in dev-free mode.

    Args:
        labels: the labels that a classification chooses from, each with its tokens as an answer, the end included.
    """

    source_train: tuple[Example, ...]
    source_dev: tuple[Example, ...]
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    micro_dev: tuple[Example, ...]
    test: tuple[Example, ...]
    report: DataReport
    labels: dict[str, tuple[int, ...]] = field(default_factory=dict)


def group_numbers(examples: Sequence[Example]) -> list[int]:
    """Return the number of each example's group, from 0 in the order in which they come."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(example.group, len(numbers)) for example in examples]


def group_size(examples: Sequence[Example]) -> float:
    """Return how large the group of an example is on average, 1 where each is by itself."""
    sizes = Counter(group_numbers(examples)).values()
    return sum(size * size for size in sizes) / max(1, len(examples))


@dataclass(frozen=True)
class Share:
    """A pool and the splits it serves.

    Args:
        pool: records to split.
        counts: examples per split, in the order of filling; None takes the rest.
        capped: splits that may hold fewer than their count, but not none.
    """

    pool: Pool
    counts: Counts
    capped: Collection[str] = ()


@dataclass(frozen=True)
class Fold:
    """One of the parts of a cross-validation, the one that is tested on.

    Args:
        number: from 1 to `of`.
        of: how many there are, at least 2.
    """

    number: int
    of: int


def cut(share: Share, groups: Mapping[str, str], fold: Fold, seed: int) -> list[Share]:
    """Cut a pool by whole groups into parts of about one size; return the part of a fold, for the test, and all the others.

    The parts hang on the pool, their number and the seed alone, so each record is in the part of one fold. What is left for
    training may be less than its count.

    Raises:
        DataError: there are fewer groups than folds.
    """
    members = by_group(sorted(share.pool.records, key=lambda record: record.id), groups)
    if fold.of > len(members):
        raise DataError(
            f"{fold.of} folds are asked for, but the {len(share.pool.records)} examples of the target form {len(members)} groups "
            "of what belongs together, and folds take whole groups; ask for fewer folds"
        )
    names = list(members)
    random.Random(f"{seed} folds {fold.of}").shuffle(names)
    parts: list[list[Record]] = [[] for _ in range(fold.of)]
    for name in sorted(names, key=lambda name: -len(members[name])):  # the largest first evens the parts out
        min(parts, key=len).extend(members[name])
    tested = parts.pop(fold.number - 1)
    counts = {name: count for name, count in share.counts.items() if name != "test"}
    rest = Share(Pool(tuple(record for part in parts for record in part)), counts, ("train",))
    return [Share(replace(share.pool, records=tuple(tested)), {"test": None}), rest]


def fill(
    share: Share,
    groups: Mapping[str, str],
    barred: Set[str],
    encoder: Encoder,
    generator: random.Random,
    tally: Tally,
    label: str,
) -> dict[str, list[Example]]:
    """Tokenise a pool group by group in a random order until its splits are full.

    Args:
        share: what to split, and into what.
        groups: key -> group, of `join_groups`.
        barred: groups to leave out.
        encoder: tokenises the records.
        generator: chooses the order of groups and records.
        tally: told what becomes of the records.
        label: name of the corpus, for messages.

    Raises:
        DataError: a split comes out too small.
    """
    pool, counts = share.pool, share.counts
    tally.read += len(pool.records)
    tally.characters_mapped += pool.characters_mapped
    tally.characters_removed += pool.characters_removed
    tally.unanswerable += pool.unanswerable
    tally.answers_trimmed += pool.answers_trimmed
    tally.conversations += sum(bool(record.messages) for record in pool.records)
    # Sorted, so that the order of files matters in no case, and that of their lines only where places stand for ids.
    members = by_group(sorted(pool.records, key=lambda record: record.id), groups)
    order = [group for group in members if group not in barred]
    tally.excluded_for_leak += sum(len(records) for group, records in members.items() if group in barred)
    generator.shuffle(order)
    for group in order:
        generator.shuffle(members[group])
    asked = [count for count in counts.values() if count is not None]
    # A pool far larger than what is asked for, such as a whole hub data set, is not tokenised to its end.
    portion = 2 * sum(asked) + LEAST_PORTION if len(asked) == len(counts) else len(pool.records)
    # 16 micro-dev examples of one article would say little about others, so they come from many where the data has
    # that much to spare. Test and dev do not, because each of their groups takes an article from the source.
    spreads: list[tuple[str, ...]] = [()] if None in counts.values() else [("micro_dev", "train"), ("micro_dev",), ()]
    kept: list[list[Example]] = []
    position = 0
    while True:
        batch: list[Record] = []
        names: list[str] = []
        while position < len(order) and len(batch) < portion:
            batch += members[order[position]]
            names += [order[position]] * len(members[order[position]])
            position += 1
        fitting: dict[str, list[Example]] = {}
        for example in encoder.encode(batch, names, tally):
            if example is not None:
                fitting.setdefault(example.group, []).append(example)
        kept += fitting.values()
        splits = assign(kept, counts, spreads[0])
        if all(len(splits[name]) == count for name, count in counts.items()):
            break
        if position == len(order):
            if len(spreads) == 1:
                break
            spreads.pop(0)
    for name, count in counts.items():
        # Files of one split are taken as they are, so there a count is a cap; but no split may come out empty.
        least = count if count is not None and not (count and name in share.capped) else 1
        if len(splits[name]) < least:
            raise DataError(_shortage(name, splits, counts, kept, label, encoder.max_tokens, tally))
    return splits


def by_group(records: Iterable[Record], groups: Mapping[str, str]) -> dict[str, list[Record]]:
    """Return the records of each group, in their order."""
    members: dict[str, list[Record]] = {}
    for record in records:
        members.setdefault(groups[next(iter(record.keys))], []).append(record)
    return members


def measure(examples: Sequence[Example]) -> SplitSize:
    """Measure a split."""

    def quantiles(lengths: list[int]) -> dict[str, int]:
        ordered = sorted(lengths)
        shares = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
        return {name: ordered[round(share * (len(ordered) - 1))] for name, share in shares.items()} if ordered else {}

    return SplitSize(
        examples=len(examples),
        groups=len({example.group for example in examples}),
        prompt_tokens=quantiles([len(example.prompt_ids) for example in examples]),
        completion_tokens=quantiles([len(example.completion_ids) for example in examples]),
    )


def _shortage(
    name: str,
    splits: Mapping[str, Sequence[Example]],
    counts: Counts,
    kept: Sequence[Sequence[Example]],
    label: str,
    max_tokens: int,
    tally: Tally,
) -> str:
    if not kept and tally.too_long and tally.shortest_tokens is not None and tally.shortest_tokens > max_tokens:
        return (
            f"{label}: all {tally.too_long} examples are longer than max_tokens {max_tokens}; the shortest has "
            f"{tally.shortest_tokens} tokens. Raise max_tokens, or set max_document_tokens to cut articles"
        )
    asked = ", ".join(f"{split} {'the rest' if count is None else count}" for split, count in counts.items())
    total = sum(count for count in counts.values() if count is not None)
    return (
        f"{label}: asked for {asked} (together {total}), but {sum(map(len, kept))} examples in {len(kept)} groups are "
        f"available: of {tally.read} read, {tally.too_long} are longer than max_tokens {max_tokens}, "
        f"{tally.answers_cut_away} lost their answer to max_document_tokens and {tally.excluded_for_leak} share a group "
        f"with held-out target examples; {name} got {len(splits[name])}. Each split takes whole groups. Lower "
        f"{' or '.join(split for split, count in counts.items() if count)}, raise max_tokens, cut documents with "
        "max_document_tokens, or add files"
    )


def assign(groups: Sequence[Sequence[Member]], counts: Counts, spread: Sequence[str] = ()) -> dict[str, list[Member]]:
    """Fill splits one after the other by whole groups; None takes all that is left.

    A group that does not fit is kept for the next split. Where none fits any more, the smallest one is cut, and the
    rest of it stays unused. A split comes out short only when no group is left.

    Args:
        groups: the members of each group, in the order of choice.
        counts: examples per split, in the order of filling.
        spread: splits of which no group gives more than an eighth; the rest of such a group stays unused.
    """
    left = list(groups)
    splits: dict[str, list[Member]] = {}
    for name, count in counts.items():
        chosen: list[Member] = []
        passed: list[Sequence[Member]] = []
        quota = -(-count // SPREAD) if count and name in spread else None
        for whole in left:
            group = whole[:quota]
            if count is None or len(chosen) + len(group) <= count:
                chosen.extend(group)
            else:
                passed.append(whole)
        if count is not None and len(chosen) < count and passed:
            smallest = min(range(len(passed)), key=lambda i: len(passed[i]))
            chosen.extend(passed.pop(smallest)[:quota][: count - len(chosen)])
        splits[name] = chosen
        left = passed
    return splits


def join_groups(key_sets: Iterable[frozenset[str]]) -> dict[str, str]:
    """Join keys that stand together in a record, over all records: key -> name of its connected component.

    Parallel corpora are joined through shared ids, and paragraphs of an article through its title. The name is the
    hash of one of the component's texts, so it does not depend on where the files lie.

    >>> names = join_groups([frozenset({"id:1", "text:b"}), frozenset({"id:1", "text:a"}), frozenset({"text:c"})])
    >>> names["text:b"], names["text:c"]
    ('a', 'c')
    """
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for keys in key_sets:
        first, *others = keys
        root = find(first)
        for key in others:
            parent[find(key)] = root
    names: dict[str, str] = {}
    for key in sorted(key for key in parent if key.startswith("text:")):
        names.setdefault(find(key), key.removeprefix("text:"))
    return {key: names[find(key)] for key in parent}


def check_disjoint(splits: Splits) -> None:
    """Check that no two splits share an id, a prompt or a group, where sharing would leak.

    Target splits and source splits are compared among themselves, and each source split with the target's test, dev
    and micro-dev. The source may share groups with the target's train split: translations of it are fair training data.

    Raises:
        DataError: the counts of each pair that overlaps, or of ids that stand twice in one split.
    """
    contents: dict[str, tuple[set[str], dict[str, str], set[str]]] = {}
    problems: list[str] = []
    ids_alone = False
    alike = ""
    for name in SPLITS:
        examples: tuple[Example, ...] = getattr(splits, name)
        ids = {example.id for example in examples}
        prompts = {same_text(example.prompt): example.id for example in examples}
        contents[name] = ids, prompts, {example.group for example in examples}
        if len(ids) < len(examples):
            problems.append(f"{name} holds {len(examples) - len(ids)} ids twice")
    pairs = [*combinations(("train", *reversed(HELD_OUT)), 2), ("source_train", "source_dev")]
    pairs += [(source, name) for source in ("source_train", "source_dev") for name in HELD_OUT]
    for first, second in pairs:
        shared = [len(set(a) & set(b)) for a, b in zip(contents[first], contents[second], strict=True)]
        if any(shared):
            ids_alone |= shared[0] > 0 and not shared[1]
            ours, theirs = contents[first][1], contents[second][1]
            if (both := next((prompt for prompt in ours if prompt in theirs), None)) is not None and not shared[2]:
                alike = (
                    f"; the prompts of {quoted(ours[both])} and {quoted(theirs[both])} are the same, as the model sees them "
                    "(after data.max_document_tokens and the template); remove one, or let them differ there"
                )
            problems.append(f"{first} and {second} share {shared[0]} ids, {shared[1]} prompts and {shared[2]} groups")
    if problems:
        numbers = "; where ids only number the rows of each file, rename that column" if ids_alone else ""
        raise DataError(
            f"splits overlap: {'; '.join(problems)}. A group joins records with the same id, context, document or "
            f"article; remove the shared ones from a file, or give one pool (files) and let it be split{numbers}{alike}"
        )


def hash_of(splits: Splits, names: Sequence[str] = SPLITS) -> str:
    """Return a hash of every token and its place in the named splits, so that nothing goes on with other data."""
    digest = hashlib.sha256()
    for name in names:
        for example in getattr(splits, name):
            digest.update(repr((name, example.id, example.prompt_ids, example.completion_ids)).encode())
    return digest.hexdigest()
