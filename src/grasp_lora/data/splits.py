"""From files to tokenised examples: splits by whole groups of records that belong together, and the proof that they are disjoint.

The held-out splits of the target are filled first, so that their size is certain. What shares a group with them is then left out
of the source's data: its English side may hold the very answer that is tested in Arabic.
Rows with labels are stratified: every split has about the share of each label that the pool has, as far as whole groups allow.
"""

import hashlib
import logging
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from grasp_lora.data.data_settings import CorpusSettings, DataSettings
from grasp_lora.data.encode import Encoder, Example, Tally, check_tokenizer, encode_labels
from grasp_lora.data.files import Table, name_of_file, read_file, read_hub, resolve_file
from grasp_lora.data.groups import by_group, join_groups, keys_with_turns
from grasp_lora.data.records import (
    Pool,
    Record,
    check_labels,
    check_shared,
    close_label,
    make_pool,
    same_label,
    same_text,
)
from grasp_lora.data.tasks import resolve_template, task_fields
from grasp_lora.errors import DataError
from grasp_lora.text.display import listed, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SPLITS = ("source_train", "source_dev", "train", "dev", "micro_dev", "test")
PAPER_SIZES = {"test": 100, "dev": 50, "micro_dev": 16}  # of the target's held-out splits; experimental setup
HELD_OUT = ("test", "dev", "micro_dev")  # of the target: no source example may touch their groups
SOURCE_DEV_SHARE, SOURCE_DEV_MOST = 10, 1000  # Paper: 1000 dev beside 10000 train, 315 beside 3030
FEW_GROUPS = 4
SPREAD = 8
LEAST_PORTION = 256

Counts = dict[str, int | None]  # examples per split, in the order of filling; None takes the rest
Member = TypeVar("Member")


@dataclass(frozen=True)
class DataReport:
    """What became of the data."""

    task: str
    chat_template: bool  # whether prompts stand in the tokenizer's chat template
    prompt: str  # template of the target's prompts
    # Whole numbers that are ids of several pools at once: often they only count the rows of each file.
    numbers_as_ids: int
    target: Tally
    source: Tally | None
    labels: dict[str, dict[str, int]] | None = None  # of a classification, how often each stands in the target's splits
    completion: str | None = None  # of a classification, the template of the target's answers
    end_of_turn: str | None = None  # what ends an answer in a chat, where that is not the tokenizer's EOS

    def to_json(self) -> dict[str, object]:
        """Return it as data.json holds it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Splits:
    """Disjoint splits; the source's may be empty, dev is empty in dev-free mode."""

    source_train: tuple[Example, ...]
    source_dev: tuple[Example, ...]
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    micro_dev: tuple[Example, ...]
    test: tuple[Example, ...]
    report: DataReport
    # What a classification chooses from: label -> its tokens as an answer, the end included.
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
    """A pool and the splits it serves."""

    pool: Pool
    counts: Counts
    capped: Collection[str] = ()  # splits that may hold fewer than their count, but not none


@dataclass(frozen=True)
class Fold:
    """One of the parts of a cross-validation, the one that is tested on."""

    number: int  # from 1
    of: int  # at least 2


def build_splits(
    settings: DataSettings,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    base: Path | None = None,
    *,
    fold: Fold | None = None,
) -> Splits:
    """Read, filter, tokenise and split the data; the result is proved disjoint.

    The same settings, files and seed give the same splits. Target splits are filled in the order test, dev,
    micro-dev, train; source examples whose group touches a held-out target split are left out. With `fold` the target's pool is
    cut into parts, and that part is the test set. Relative paths start at `base`, the recipe's folder, or else the working
    folder.

    Raises:
        DataError: files are missing or malformed, there are too few examples or groups, or given splits overlap.
    """
    check_tokenizer(tokenizer, chat=bool(settings.chat_template))
    corpora = {"target": settings.target}
    if settings.source is not None:
        corpora["source"] = settings.source
    shares = {role: read_shares(settings, corpus, role, base) for role, corpus in corpora.items()}
    groups = join_groups(
        keys_with_turns(record for parts in shares.values() for part in parts for record in part.pool.records)
    )
    if fold is not None:
        [whole] = shares["target"]
        shares["target"] = cut(whole, groups, fold, seed, chooses=task_fields(settings.task).chooses)
    talks = any(record.messages for parts in shares.values() for part in parts for record in part.pool.records)
    chat = _in_chat(settings.chat_template, talks, tokenizer)
    splits: dict[str, list[Example]] = {name: [] for name in SPLITS}
    tallies: dict[str, Tally] = {}
    encoders: dict[str, Encoder] = {}
    held_out: set[str] = set()
    for role, corpus in corpora.items():
        limits = settings.max_tokens, settings.max_document_tokens
        prompt, completion = settings.templates(corpus)
        template = resolve_template(settings.task, corpus.language, prompt, completion, chat)
        encoders[role] = encoder = Encoder(tokenizer, settings.task, template, *limits, chat, ends_turns=talks)
        # Splits that the user made on both sides are checked, not changed.
        barred = set() if corpus.explicit and settings.target.explicit else held_out
        tallies[role] = tally = Tally(corpus.language)
        used = 0
        for share in shares[role]:
            # Of test files beside a pool: they come first.
            tested = set() if corpus.explicit else {example.group for example in splits["test"]}
            generator = random.Random(f"{seed} {role} {' '.join(share.counts)}")
            filled = fill(share, groups, barred | tested, encoder, generator, tally, f"{role} ({corpus.language})")
            used += sum(map(len, filled.values()))
            splits |= {name: [*splits[name], *examples] for name, examples in filled.items()}
        tally.unused = tally.read - tally.excluded_for_leak - tally.answers_cut_away - tally.too_long - used
        held_out = {example.group for name in HELD_OUT for example in splits[name]}
        logger.info("%s (%s): %s", role, corpus.language, asdict(tally))
    labels = count_labels(settings.labels, splits) if task_fields(settings.task).chooses else None
    target, end = encoders["target"].template, encoders["target"].end
    report = DataReport(
        settings.task,
        chat,
        target.prompt + ("\n" if encoders["target"].ends_turns and not chat else ""),  # which ends the user's turn
        _numbers_as_ids(shares),
        tallies["target"],
        tallies.get("source"),
        labels,
        target.completion if labels else None,
        None if end == tokenizer.eos_token_id else str(tokenizer.convert_ids_to_tokens(end)),
    )
    result = Splits(
        **{name: tuple(examples) for name, examples in splits.items()},
        report=report,
        labels=encode_labels(labels or (), encoders["target"]),
    )
    check_disjoint(result)
    articles = len({example.group for example in result.micro_dev})
    if articles < min(FEW_GROUPS, len(result.micro_dev) // FEW_GROUPS):
        logger.warning(
            "the %d micro-dev examples come from %d group(s) only, so their losses say little about other articles; "
            "set data.target.train to a number, so that they can be drawn from more",
            len(result.micro_dev),
            articles,
        )
    return result


def read_shares(settings: DataSettings, corpus: CorpusSettings, role: str, base: Path | None) -> list[Share]:
    """Read each pool of a corpus (`source` or `target` by its role), with the splits it serves in the order of filling."""

    def pool_of(tables: Iterable[Table]) -> Pool:
        skip = settings.skip_unanswered
        return make_pool(tables, settings.task, corpus.columns, skip_unanswered=skip)

    def read(names: Sequence[str]) -> Pool:
        places = ((name_of_file(name, settings.root, base), resolve_file(name, settings.root, base)) for name in names)
        return pool_of(read_file(name, place, corpus.sheet) for name, place in places)

    if corpus.explicit:
        parts = [(corpus.files.get(part), counts) for part, counts in _given_splits(corpus, role).items()]
        return [_given_share(read(names), counts, corpus) for names, counts in parts if names]
    pool = pool_of([read_hub(*corpus.hub)]) if corpus.hub else read(corpus.files["pool"])
    if role == "source":
        most = len(pool.records) if corpus.train is None else corpus.train
        dev = min(most // SOURCE_DEV_SHARE, SOURCE_DEV_MOST) if corpus.dev is None else corpus.dev
        return [Share(pool, {"source_dev": dev, "source_train": corpus.train})]
    asked = {"test": corpus.test, "dev": corpus.dev, "micro_dev": corpus.micro_dev}
    counts: Counts = {name: PAPER_SIZES[name] if count is None else count for name, count in asked.items()}
    beside = [Share(read(corpus.files["test"]), {"test": None})] if "test" in corpus.files else []
    return [*beside, Share(pool, counts | {"train": corpus.train})]


def _given_splits(corpus: CorpusSettings, role: str) -> dict[Literal["test", "dev", "train"], Counts]:
    """Of the files of each split, in the order of filling, what is taken from them."""
    if role == "source":
        return {"dev": {"source_dev": corpus.dev}, "train": {"source_train": corpus.train}}
    micro_dev: Counts = {"micro_dev": PAPER_SIZES["micro_dev"] if corpus.micro_dev is None else corpus.micro_dev}
    dev: Counts = {"dev": corpus.dev}
    train: Counts = {"train": corpus.train}
    dev, train = (micro_dev | dev, train) if "dev" in corpus.files else (dev, micro_dev | train)
    return {"test": {"test": corpus.test}, "dev": dev, "train": train}


def _given_share(pool: Pool, counts: Counts, corpus: CorpusSettings) -> Share:
    """Cap a micro-dev set that nobody sized at a third of the rows that were read, where another split needs them, too."""
    asked = counts.get("micro_dev")
    rest = [count for name, count in counts.items() if name != "micro_dev"]
    if corpus.micro_dev is None and asked is not None and any(count != 0 for count in rest):
        counts = {**counts, "micro_dev": min(asked, len(pool.records) // 3)}
    return Share(pool, counts, tuple(counts))


def _in_chat(wanted: bool | None, talks: bool, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether prompts are put into the chat template: where nobody says, those of conversations are, if there is one."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if wanted is None and talks and not has_template:
        logger.warning(
            "the data are conversations, but the backbone has no chat template: a line break ends each of their turns; "
            "an instruct model has a template"
        )
    return talks and has_template if wanted is None else wanted


def _numbers_as_ids(shares: Mapping[str, Sequence[Share]]) -> int:
    pools = [part.pool for parts in shares.values() for part in parts]
    ids = Counter(key for pool in pools for key in {key for record in pool.records for key in record.keys})
    return sum(count > 1 and re.fullmatch(r"id:\d+", key) is not None for key, count in ids.items())


def cut(share: Share, groups: Mapping[str, str], fold: Fold, seed: int, *, chooses: bool = False) -> list[Share]:
    """Cut a pool by whole groups into parts of about one size; return the part of a fold, for the test, and all the others.

    The parts hang on the pool, their number and the seed alone, so each record is in the part of one fold. What is left for
    training may be less than its count. With `chooses`, answers are labels, of which each part has about as many.
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
    labels = labels_of(members) if chooses else {}
    # The largest first evens the parts out, and one label after the other each label's rows.
    for name in sorted(names, key=lambda name: (-len(members[name]), labels.get(name, ""))):
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
    """Tokenise a pool group by group in a random order, without the barred ones, until its splits are full.

    `groups` comes of `join_groups`; `label` is the name of the corpus, for messages.
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
    if task_fields(encoder.task).chooses:
        order = stratified(order, members)
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
    if task_fields(encoder.task).chooses and (most := counts.get("train")):
        used = {example.group for examples in splits.values() for example in examples}
        alone = lone_groups(order, members)
        lone = [name for name in order if name in alone and name not in used]
        rare = [
            example for name in lone for example in encoder.encode(members[name], [name] * len(members[name]), Tally())
        ]
        last = [example for example in rare if example is not None][:most]
        splits["train"] = splits["train"][: most - len(last)] + last
    return splits


def labels_of(members: Mapping[str, Sequence[Record]]) -> dict[str, str]:
    """Return the label that most records of each group have, of several the first in the alphabet."""
    counts = {name: Counter(record.answer for record in records) for name, records in members.items()}
    return {name: min(count, key=lambda label: (-count[label], label)) for name, count in counts.items()}


def stratified(order: Sequence[str], members: Mapping[str, Sequence[Record]]) -> list[str]:
    """Spread the groups of each label evenly over an order, so that any stretch of it has about the share of each label.

    A group stands where its middle would, if its label alone filled the whole order. Groups of one label keep their order. A
    label of one group comes last, which is in training: elsewhere nothing would be learned of it. Where not all rows are asked
    for, `fill` makes room for it there.
    """
    labels = labels_of({name: members[name] for name in order})
    sizes: Counter[str] = Counter()
    middles: dict[str, float] = {}
    for name in order:
        size = len(members[name])
        middles[name] = sizes[labels[name]] + size / 2
        sizes[labels[name]] += size
    places = {name: middles[name] / sizes[labels[name]] for name in order}
    lone = lone_groups(order, members)
    return sorted(order, key=lambda name: (name in lone, places[name]))


def lone_groups(order: Sequence[str], members: Mapping[str, Sequence[Record]]) -> set[str]:
    """The groups that no other shares its label with."""
    labels = labels_of({name: members[name] for name in order})
    counts = Counter(labels.values())
    return {name for name, label in labels.items() if counts[label] == 1}


def _shortage(
    name: str,
    splits: Mapping[str, Sequence[Example]],
    counts: Counts,
    kept: Sequence[Sequence[Example]],
    label: str,
    max_tokens: int,
    tally: Tally,
) -> str:
    if not kept and tally.too_long and (tally.shortest_tokens or 0) > max_tokens:
        return (
            f"{label}: all {tally.too_long} examples are longer than max_tokens {max_tokens}; the shortest has "
            f"{tally.shortest_tokens} tokens. Raise max_tokens, or set max_document_tokens to cut articles"
        )
    asked = ", ".join(f"{split} {'the rest' if count is None else count}" for split, count in counts.items())
    total = sum(count for count in counts.values() if count is not None)
    return (
        f"{label}: asked for {asked} (together {total}), but {sum(map(len, kept))} examples in {len(kept)} groups are "
        f"available: of {tally.read} read, {tally.too_long} are longer than max_tokens {max_tokens}, {tally.unanswerable} more "
        f"have no answer, {tally.answers_cut_away} lost their answer to max_document_tokens and {tally.excluded_for_leak} share "
        f"a group with held-out target examples; {name} got {len(splits[name])}. Each split takes whole groups. Lower "
        f"{' or '.join(split for split, count in counts.items() if count)}, raise max_tokens or add files"
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


def check_disjoint(splits: Splits) -> None:
    """Check that no two splits share an id, a prompt or a group, where sharing would leak.

    Target splits and source splits are compared among themselves, and each source split with the target's test, dev
    and micro-dev. The source may share groups with the target's train split: translations of it are fair training data.
    """
    contents: dict[str, tuple[set[str], dict[str, str], set[str]]] = {}
    problems = []
    for name in SPLITS:
        examples: tuple[Example, ...] = getattr(splits, name)
        ids = {example.id for example in examples}
        prompts = {same_text(example.prompt): example.where for example in examples}
        contents[name] = ids, prompts, {example.group for example in examples}
        if len(ids) < len(examples):
            problems.append(f"{name} holds {len(examples) - len(ids)} ids twice")
    pairs = [*combinations(("train", *reversed(HELD_OUT)), 2), ("source_train", "source_dev")]
    pairs += [(source, name) for source in ("source_train", "source_dev") for name in HELD_OUT]
    for first, second in pairs:
        common = [set(a) & set(b) for a, b in zip(contents[first], contents[second], strict=True)]
        if any(common):
            ids, alike, groups = common
            problems.append(f"{first} and {second} share {len(ids)} ids, {len(alike)} prompts and {len(groups)} groups")
            if alike:
                ours, theirs = (contents[name][1][min(alike)] for name in (first, second))
                problems[-1] += f" (the prompts of {ours} and {theirs} are the same, after cuts and the template)"
    if problems:
        raise DataError(
            f"splits overlap: {'; '.join(problems)}. A group joins records with the same id, context, document or article, but "
            "for case and marks; remove the shared ones from a file, rename ids that only number its rows, or give one pool "
            "(files) and let it be split"
        )


def count_labels(named: Sequence[str], splits: Mapping[str, Sequence[Example]]) -> dict[str, dict[str, int]]:
    """Return each label that can be chosen, and how often it stands in each split; the source's may have others.

    Where the recipe has named none, those of the split `train` can be.
    """
    counts_of = {name: Counter(example.references[0] for example in examples) for name, examples in splits.items()}
    where = "data.labels" if named else "the training rows of the target"
    labels = check_labels(named or counts_of["train"], where)
    writings = {same_label(label): label for label in labels}
    faults: dict[str, str] = {}
    for name, examples in splits.items():
        for example in examples:
            label = example.references[0]
            meant = writings.get(same_label(label))
            if label not in labels and (meant or not name.startswith("source")):
                nearest = meant or close_label(label, labels)
                advice = (
                    f"write it as {quoted(nearest)}" if nearest else "correct it, or name every label in data.labels"
                )
                faults.setdefault(
                    label,
                    f"the {name} row {example.where} has the label {quoted(label)}, which is not among those of {where} "
                    f"({listed(labels)}); {advice}",
                )
    if faults:
        raise DataError("; ".join(list(faults.values())[:5]))
    check_shared(labels, (label for name, counts in counts_of.items() if name.startswith("source") for label in counts))
    for name, loss in (("train", "nothing is learned of it"), ("test", "the scores say nothing of it")):
        if missing := [label for label in labels if splits[name] and not counts_of[name][label]]:
            logger.warning("no %s row has the label %s: %s", name, listed(missing), loss)
    return {label: {name: counts[label] for name, counts in counts_of.items()} for label in labels}


def hash_of(splits: Splits, names: Sequence[str] = SPLITS) -> str:
    """Return a hash of every token and its place in the named splits, so that nothing goes on with other data."""
    digest = hashlib.sha256()
    for name in names:
        for example in getattr(splits, name):
            digest.update(repr((name, example.id, example.prompt_ids, example.completion_ids)).encode())
    return digest.hexdigest()
