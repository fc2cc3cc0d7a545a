"""From files or rows to tokenised examples, in splits that are proved disjoint."""

import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_lora.data.chat import check_has_template
from grasp_lora.data.encode import Encoder, Example, Tally
from grasp_lora.data.files import read_file
from grasp_lora.data.labels import check_records, count_labels, encode_labels
from grasp_lora.data.places import read_hub, resolve_file
from grasp_lora.data.records import Pool, make_pool
from grasp_lora.data.settings import CorpusSettings, DataSettings
from grasp_lora.data.splits import (
    HELD_OUT,
    PAPER_SIZES,
    SPLITS,
    Counts,
    DataReport,
    Fold,
    Share,
    Splits,
    check_disjoint,
    cut,
    fill,
    join_groups,
    measure,
)
from grasp_lora.data.tables import Row, Table, as_row
from grasp_lora.data.tasks import ANY_LANGUAGE, resolve_template, task_fields
from grasp_lora.data.turns import keys_with_turns
from grasp_lora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SOURCE_DEV_SHARE, SOURCE_DEV_MOST = 10, 1000  # Paper: 1000 dev beside 10000 train, 315 beside 3030
FEW_GROUPS = 4


def build_splits(
    settings: DataSettings,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    base: Path | None = None,
    *,
    offline: bool = False,
    fold: Fold | None = None,
) -> Splits:
    """Read, filter, tokenise and split the data; the result is proved disjoint.

    The same settings, files and seed give the same splits. Target splits are filled in the order test, dev,
    micro-dev, train; source examples whose group touches a held-out target split are left out.

    Args:
        settings: task, files and limits.
        tokenizer: with an EOS token.
        seed: of the splits, that of the recipe.
        base: folder of the recipe, for relative paths; None for the working folder.
        offline: take data sets of the hub from the cache only.
        fold: of a cross-validation: the target's pool is cut into so many parts, and this one is the test set.

    Raises:
        DataError: files are missing or malformed, there are too few examples or groups, or given splits overlap.
    """
    _check_eos(tokenizer)
    if settings.chat_template:
        check_has_template(tokenizer)
    corpora = {"target": settings.target}
    if settings.source is not None:
        corpora["source"] = settings.source
    shares = {role: _read_corpus(settings, corpus, role, base, offline) for role, corpus in corpora.items()}
    groups = join_groups(
        keys_with_turns(record for parts in shares.values() for part in parts for record in part.pool.records)
    )
    if fold is not None:
        [whole] = shares["target"]
        shares["target"] = cut(whole, groups, fold, seed)
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
        encoders[role] = encoder = Encoder(
            tokenizer, settings.task, corpus.language, template, *limits, chat, ends_turns=talks
        )
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
        seed,
        settings.max_tokens,
        chat,
        target.prompt + ("\n" if encoders["target"].ends_turns and not chat else ""),  # which ends the user's turn
        _numbers_as_ids(shares),
        tallies["target"],
        tallies.get("source"),
        {name: measure(splits[name]) for name in SPLITS},
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
    micro_dev = report.splits["micro_dev"]
    if micro_dev.groups < min(FEW_GROUPS, micro_dev.examples // FEW_GROUPS):
        logger.warning(
            "the %d micro-dev examples come from %d group(s) only, so their losses say little about other articles; "
            "set target.train to a number, so that they can be drawn from more",
            micro_dev.examples,
            micro_dev.groups,
        )
    return result


def encode_rows(rows: Sequence[Mapping[str, object]], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """Tokenise rows in TRL's convention, for one's own script beside an SFTTrainer.

    Args:
        rows: each with `prompt` and `completion`, as texts or as lists of messages, or with `messages` that end with
            the assistant's answer; an `id` may be given and is "row 0", "row 1", ... where it is not. Messages go
            through the tokenizer's chat template; texts are taken as they are, control tokens in them too, but for control
            characters and the line ends of Windows, which are cleaned as in files: TRL keeps them. No row is too long. Prompt
            and completion are tokenised together where they are texts. Of messages the answer counts up to the token that ends
            its turn; TRL also trains on what a template writes after that, or before the answer, such as `<think>`.
        tokenizer: with an EOS token.

    Raises:
        DataError: there are no rows, one is malformed (the message names it), or the tokenizer does not fit.
    """
    _check_eos(tokenizer)
    identified: list[Row] = []
    for number, item in enumerate(rows):
        where, values = as_row(item, f"row {number}")
        identified.append(Row(where, {**values, "id": where} if values.get("id") is None else values))
    pool = make_pool([Table("the list of rows", identified)], "completion", "records")
    groups = join_groups(keys_with_turns(pool.records))
    template = resolve_template("completion", ANY_LANGUAGE)
    plain = Encoder(tokenizer, "completion", "", template, max_tokens=sys.maxsize, data_is_text=False)
    examples: dict[str, Example | None] = {}
    for encoder in (plain, replace(plain, chat=True)):
        records = [record for record in pool.records if bool(record.messages) == encoder.chat]
        names = [groups[next(iter(record.keys))] for record in records]
        examples |= zip((record.id for record in records), encoder.encode(records, names, Tally()), strict=True)
    # Nothing is cut and nothing is too long, so there is one for each.
    return [example for record in pool.records if (example := examples[record.id]) is not None]


def encoding_of(tokenizer: Any) -> tuple[object, object]:
    """What decides how rows are encoded and may be changed on a tokenizer, or on that of a processor: end token and template."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "chat_template", None)


def check_encoding(encoding: tuple[object, object] | None, trained_by: Any) -> None:
    """Check that a trainer's tokenizer, or processor, encodes as rows were encoded; TRL may change it as it makes the trainer.

    Args:
        encoding: of the rows; None where nothing is known.
        trained_by: the trainer's; None where it has none.

    Raises:
        DataError: it does not.
    """
    if encoding is None or trained_by is None:
        return
    names = ("EOS token", "chat template")
    pairs = zip(names, encoding, encoding_of(trained_by), strict=True)
    if changed := [name for name, before, now in pairs if before != now]:
        raise DataError(
            f"the trainer's tokenizer has another {' and another '.join(changed)} than the rows were encoded with; make the "
            "trainer first, and then the controller with trainer.processing_class as its tokenizer"
        )


def _check_eos(tokenizer: "PreTrainedTokenizerBase") -> None:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, so the model could not learn where an answer ends")


def _read_corpus(
    settings: DataSettings, corpus: CorpusSettings, role: str, base: Path | None, offline: bool
) -> list[Share]:
    """Read each pool of a corpus, with the splits it serves in the order of filling and their counts."""

    def files(names: Sequence[str]) -> Iterator[Table]:
        return (read_file(name, resolve_file(name, settings.root, base), corpus.format, corpus.sheet) for name in names)

    def read(tables: Iterable[Table]) -> Pool:
        skip = settings.skip_unanswered
        pool = make_pool(tables, settings.task, corpus.format, corpus.columns, skip_unanswered=skip)
        if task_fields(settings.task).chooses:
            check_records(pool.records)
        return pool

    if corpus.explicit:
        given = [(read(files(names)), counts) for names, counts in _given_splits(corpus, role) if names]
        if corpus.micro_dev is None:
            given = [(pool, _leaving_most(counts, len(pool.records))) for pool, counts in given]
        return [Share(pool, counts, tuple(counts)) for pool, counts in given]
    if corpus.hub is not None:
        table = read_hub(corpus.hub, corpus.hub_config, corpus.hub_split or "train", offline=offline)
        pool = read([table])
    else:
        pool = read(files(corpus.files))
    if role == "source":
        most = len(pool.records) if corpus.train is None else corpus.train
        dev = min(most // SOURCE_DEV_SHARE, SOURCE_DEV_MOST) if corpus.dev is None else corpus.dev
        return [Share(pool, {"source_dev": dev, "source_train": corpus.train})]
    asked = {"test": corpus.test, "dev": corpus.dev, "micro_dev": corpus.micro_dev}
    counts: Counts = {name: PAPER_SIZES[name] if count is None else count for name, count in asked.items()}
    beside = [Share(read(files(corpus.test_files)), {"test": None})] if corpus.test_files else []
    return [*beside, Share(pool, counts | {"train": corpus.train})]


def _given_splits(corpus: CorpusSettings, role: str) -> list[tuple[tuple[str, ...], Counts]]:
    if role == "source":
        return [(corpus.dev_files, {"source_dev": corpus.dev}), (corpus.train_files, {"source_train": corpus.train})]
    dev: Counts = {"dev": corpus.dev}
    train: Counts = {"train": corpus.train}
    micro_dev: Counts = {"micro_dev": corpus.micro_dev}
    if not corpus.micro_dev_files:
        micro_dev = {"micro_dev": PAPER_SIZES["micro_dev"] if corpus.micro_dev is None else corpus.micro_dev}
        dev, train = (micro_dev | dev, train) if corpus.dev_files else (dev, micro_dev | train)
    return [
        (corpus.test_files, {"test": corpus.test}),
        (corpus.micro_dev_files, micro_dev),
        (corpus.dev_files, dev),
        (corpus.train_files, train),
    ]


def _leaving_most(counts: Counts, rows: int) -> Counts:
    """Cap the micro-dev set at a third of the rows that were read, where another split needs them, too."""
    asked = counts.get("micro_dev")
    if asked is None or all(count == 0 for name, count in counts.items() if name != "micro_dev"):
        return counts
    return {**counts, "micro_dev": min(asked, rows // 3)}


def _in_chat(wanted: bool | None, talks: bool, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether prompts are put into the chat template: where nobody says, those of conversations are, if there is one."""
    if wanted is not None:
        return wanted
    if not talks:
        return False
    if getattr(tokenizer, "chat_template", None):
        return True
    logger.warning(
        "the data are conversations, but the backbone has no chat template: a line break ends each of their turns; "
        "an instruct model has a template"
    )
    return False


def _numbers_as_ids(shares: Mapping[str, Sequence[Share]]) -> int:
    found = [
        {key for part in parts for record in part.pool.records for key in record.keys if key.startswith("id:")}
        for parts in shares.values()
    ]
    common = set.intersection(*found) if len(found) > 1 else set()
    return sum(key.removeprefix("id:").isdigit() for key in common)
