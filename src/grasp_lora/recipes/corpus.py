"""A data file of a user's own: its task and the columns of its fields are read off it."""

import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grasp_lora.data.files import DEMO_PREFIX, Table, read_file
from grasp_lora.data.records import (
    FIELDS,
    LAYOUTS,
    OPTIONAL_COLUMNS,
    Record,
    check_labels,
    find_layout,
    is_blank,
    make_pool,
)
from grasp_lora.data.tasks import TASKS
from grasp_lora.errors import DataError
from grasp_lora.text.display import listed, quoted

# Column names, in lower case, that are understood for each field of a task.
COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "qa": {"context": ("context",), "question": ("question",), "answer": ("answer", "answers")},
    "summarization": {"document": ("document", "text", "article"), "summary": ("summary",)},
    "completion": {"prompt": ("prompt",), "completion": ("completion",)},
    "classification": {"text": ("text", "sentence"), "label": ("label", "class", "category", "sentiment")},
    "translation": {"source": ("source",), "target": ("target", "translation")},
}
# What others call prompt and completion, where no column beside them may be a part of the prompt.
OTHER_NAMES = {
    "prompt": ("prompt", "instruction", "question"),
    "completion": ("completion", "response", "output", "answer"),
}
PARTS_OF_PROMPTS = {"input", "context", "system", "history"}
BYTES = 3  # of text in a token, about; in scripts that a tokenizer knows little it is two
# What two or three columns of unknown names may be, as one says it.
_MEANINGS: dict[tuple[str, ...], str] = {
    ("prompt", "completion"): "prompt and answer",
    ("text", "label"): "labels of texts",
    ("document", "summary"): "summaries",
    ("source", "target"): "translations",
    ("context", "question", "answer"): "questions on a text",
}
FEWEST_TOKENS, MOST_TOKENS = 512, 2048  # of an example
CUT_DOCUMENT = 320  # tokens of an article
LONG = 60  # characters of a cell, on average: such a column holds texts, not numbers or names


@dataclass(frozen=True)
class Corpus:
    """A data file as the recipe will name it.

    Args:
        name: path relative to the recipe's folder, or `demo:NAME`.
        task: that its columns fit.
        layout: of its rows, a key of `LAYOUTS`.
        columns: field -> column, where they differ.
        records: what it holds.
        unanswered: how many rows without an answer were left out.
        sheet: of a workbook, where one was named.
        labels: of a classification, all that it has.
    """

    name: str
    task: str
    layout: str
    columns: dict[str, str]
    records: tuple[Record, ...]
    unanswered: int = 0
    sheet: str | None = None
    labels: tuple[str, ...] = ()

    @property
    def answer_tokens(self) -> int:
        """Room for nearly all answers: a token is about three bytes of text, and multiples of 16 look deliberate.

        `grasp-lora check`, which has the tokenizer, says where it is too little.
        """
        longest = sorted(len(record.answer.encode()) for record in self.records)[int(len(self.records) * 0.98) - 1]
        return max(32, min(512, 16 * math.ceil(longest / BYTES / 16)))

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest example, about: prompt with its template, and answer."""
        return max(self._bytes(record) for record in self.records) // BYTES

    @property
    def most_tokens(self) -> int:
        """A limit that leaves out no example of ordinary length, whatever the script: it bounds no more than that."""
        return min(MOST_TOKENS, self.roomy_tokens)

    @property
    def roomy_tokens(self) -> int:
        """A limit that leaves out nothing, whatever the script: two bytes a token."""
        return max(FEWEST_TOKENS, 64 * math.ceil(self.longest_tokens * BYTES / 2 / 64))

    def usable(self, most_tokens: int) -> tuple[Record, ...]:
        """The records that a limit of tokens leaves in, by their estimate."""
        return tuple(record for record in self.records if self._bytes(record) <= BYTES * most_tokens)

    def _bytes(self, record: Record) -> int:
        texts = [*record.fields.values(), *(turn["content"] for turn in record.messages)]
        sizes = [len(text.encode()) for text in texts]
        if self.task == "summarization":  # whose articles are cut
            sizes = [min(size, CUT_DOCUMENT * BYTES) for size in sizes]
        return sum(sizes) + len(record.answer.encode()) + 100


def parse_columns(given: Sequence[str], option: str = "--column") -> dict[str, str]:
    """Return field -> column of what the command line has, such as `question=Swali`.

    Raises:
        DataError: one is no such pair, its field does not exist, or a field or a column stands twice.
    """
    columns: dict[str, str] = {}
    for pair in given:
        field, _, column = (part.strip() for part in pair.partition("="))
        if not field or not column:
            raise DataError(
                f"{option} is {quoted(pair)}; write a field and a column of the file, such as question=Swali"
            )
        if field not in FIELDS:
            raise DataError(f"{option} {quoted(pair)} names no field; allowed: {', '.join(sorted(FIELDS))}")
        if field in columns or column in columns.values():
            raise DataError(f"{option} {quoted(pair)} names a field or a column for a second time; leave one out")
        columns[field] = column
    return columns


def read_corpus(
    name: str,
    path: Path,
    folder: Path,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    sheet: str | None = None,
    *,
    option: str | None = None,
    skip_unanswered: bool = False,
) -> Corpus:
    """Read a file and find its task.

    Args:
        name: what the user calls it.
        path: where it is.
        folder: of the recipe.
        task: that its columns have to fit; None for any.
        columns: field -> column, for those that are called otherwise.
        option: that names the columns, so that the file has to have all of them; None takes those that it has.
        sheet: of a workbook.
        skip_unanswered: leave out rows without an answer.

    Raises:
        DataError: the file is malformed, or its columns fit no task or another one.
    """
    table = read_file(name, path, sheet=sheet)
    # A source may have columns of other names than the target, where the user named those of the target.
    own = {field: column for field, column in (columns or {}).items() if option or column in table.columns}
    layout = find_layout(table, None, columns=own)
    found, named = (
        _guess(table, task, own, option or "--source-column")
        if layout.task is None
        else (layout.task, dict[str, str]())
    )
    if find_layout(table, found, columns=own) is LAYOUTS["xlsum"]:
        named = {}  # the reader knows them
    if task not in (None, found):
        raise DataError(
            f"{name} is data for the task {found} by its columns, but the target's task is {task}; give both the same columns, "
            "or name them with --column and --source-column"
        )
    layout_name = next(key for key, row in LAYOUTS.items() if row is layout)
    written = name if name.startswith(DEMO_PREFIX) else relative(name, folder)
    pool = make_pool([table], found, "auto", named, skip_unanswered=skip_unanswered)
    labels: tuple[str, ...] = ()
    if TASKS[found].chooses:
        labels = check_labels((record.answer for record in pool.records), name)
    return Corpus(written, found, layout_name, named, pool.records, pool.unanswerable, sheet, labels)


def _as_options(fields: Sequence[str], columns: Sequence[str], option: str) -> str:
    pairs = zip(fields, columns, strict=True)
    return f"{_MEANINGS[tuple(fields)]}: " + " ".join(
        f"{option} {shlex.quote(f'{field}={name}')}" for field, name in pairs
    )


def _refuse_unused(table: Table, chosen: Mapping[str, str], given: Mapping[str, str], option: str) -> None:
    """Refuse questions and answers beside a column of long texts, which may be what the questions are about."""
    if "prompt" in given:  # so the user has said what a prompt is
        return
    columns = [name for name in table.columns if name not in {*chosen.values(), *given.values(), *OPTIONAL_COLUMNS}]
    sizes = {name: sum(len(str(row.values.get(name) or "")) for row in table.rows) for name in columns}
    if texts := [name for name in columns if sizes[name] >= LONG * len(table.rows)]:
        about = (("context", texts[0]), ("question", chosen["prompt"]), ("answer", chosen["completion"]))
        with_it, without = (
            " ".join(f"{option} {shlex.quote(f'{field}={column}')}" for field, column in pairs)
            for pairs in (about, chosen.items())
        )
        raise DataError(
            f"{table.name} has long texts in the column {quoted(texts[0])} beside questions and answers; if the questions are "
            f"about them, say {with_it}, and if they are not to be used, {without}"
        )


def _refuse_dropped(table: Table, chosen: Mapping[str, str], parts: Sequence[str], option: str) -> None:
    """Refuse prompts beside columns that may be parts of them; a list of messages takes the column `system` as its first."""
    talks = any(isinstance(row.values.get(chosen["prompt"]), list) for row in table.rows)
    dropped = [
        part
        for part in parts
        if any(not is_blank(row.values.get(part)) for row in table.rows) and not (talks and part == "system")
    ]
    if dropped:
        without = " ".join(f"{option} {field}={shlex.quote(column)}" for field, column in chosen.items())
        raise DataError(
            f"{table.name} has {listed(dropped)} beside prompt and completion, which no prompt would hold; write its text into "
            f"prompt, or say {without} to leave it out"
        )


def relative(place: str, folder: Path) -> str:
    """Return a path as a recipe in a folder writes it."""
    return Path(os.path.relpath(place, folder)).as_posix()


def _guess(table: Table, preferred: str | None, given: Mapping[str, str], option: str) -> tuple[str, dict[str, str]]:
    """Return a task whose fields are all among the columns, and the columns that are called otherwise.

    What the user names a column for is understood as if the column had that name. Of `label` and `Label` the first is meant.
    """
    name, found = table.name, table.columns
    for field, column in given.items():
        if column not in found:
            raise DataError(f"{name} has no column {quoted(column)} ({option} {field}=...); it has {listed(found)}")
    free = [column for column in found if column not in given.values()]
    by_name = {column.strip().lower(): column for column in free} | {column: column for column in free} | dict(given)
    choices = [(task, COLUMNS[task]) for task in sorted(COLUMNS, key=lambda task: task != preferred)]
    if not by_name.keys() & PARTS_OF_PROMPTS:
        choices.append(("completion", OTHER_NAMES))
    for task, fields in choices:
        chosen = {
            field: next(by_name[known] for known in names if known in by_name)
            for field, names in fields.items()
            if by_name.keys() & set(names)
        }
        messages = task == "completion" and "messages" in by_name
        if messages or len(chosen) == len(fields):
            chosen = {} if messages else chosen
            if fields is OTHER_NAMES:
                _refuse_unused(table, chosen, given, option)
            if fields is COLUMNS["completion"] and not messages and "prompt" not in given:
                _refuse_dropped(
                    table, chosen, [by_name[part] for part in sorted(by_name.keys() & PARTS_OF_PROMPTS)], option
                )
            others = {field: column for field, column in given.items() if column not in chosen.values()}
            needed = {*TASKS[task].inputs, TASKS[task].answer}
            if useless := sorted(others.keys() & FIELDS - {*OPTIONAL_COLUMNS, *needed}):
                raise DataError(
                    f"{name}: the task {task} has no field {useless[0]}; leave {option} {useless[0]}=... out"
                )
            # The reader finds `answers` by itself, and there it may hold SQuAD's lists.
            understood = {field: ("answer", "answers") if field == "answer" else (field,) for field in chosen}
            named = {field: column for field, column in chosen.items() if column not in understood[field]}
            return task, named | {field: column for field, column in others.items() if field not in needed}
    known = "; ".join(f"{task}: {' and '.join(fields)}" for task, fields in COLUMNS.items())
    if len(found) == 1 and re.search(r"[;\t|]", found[0]):
        raise DataError(
            f"{name} has one column, {quoted(found[0])}: its cells seem to be separated by something else than its suffix says; "
            "save it with commas as .csv, or with tabs as .tsv"
        )
    if not found:
        raise DataError(f"{name} begins with a record without fields; give each record those of a task ({known})")
    if "text" in by_name:
        raise DataError(
            f"{name} has whole texts ({listed(found)}), and no answers to learn: adapters are chosen here by how they answer, so "
            f"there is no language modelling. Split each text into prompt and completion, or give the columns of a task ({known})"
        )
    if not any(by_name.keys() & set(fields) for _, fields in choices) and len(found) in (2, 3):
        said = "; ".join(_as_options(fields, found, option) for fields in _MEANINGS if len(fields) == len(found))
        raise DataError(
            f"{name} has the columns {listed(found)}, which fit no task by their names; say what they are: {said}"
        )
    # The task of which most columns are there; of several, one with as many fields as there are columns.
    nearest = max(choices, key=lambda one: (len(by_name.keys() & set(one[1])), len(one[1]) == len(found)))[1]
    lacking = [field for field, names in nearest.items() if not by_name.keys() & set(names)]
    ways = [lacking] if preferred or len(lacking) < len(nearest) else [lacking, ["text", "label"]]
    such = ", or for labels ".join(" ".join(f"{option} {field}=NAME" for field in fields) for fields in ways)
    raise DataError(
        f"{name} has the columns {listed(found)}, which fit no task ({known}, messages, or instruction and output); name them, "
        f"such as {such}, or rename them"
    )
