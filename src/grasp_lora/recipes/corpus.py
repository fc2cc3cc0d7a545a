"""A data file of a user's own: its task and the columns of its fields are read off it."""

import logging
import math
import os
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grasp_lora.data.doubts import likely_slips, with_two_labels
from grasp_lora.data.files import DEMO_PREFIX, Table, read_file, sheets_of
from grasp_lora.data.records import (
    FIELDS,
    LAYOUTS,
    MOST_LABELS,
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

logger = logging.getLogger(__name__)

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
FEWEST_TOKENS, MOST_TOKENS = 512, 2048  # of an example
CUT_DOCUMENT = 320  # tokens of an article
LONG = 60  # characters of a cell, on average: such a column holds texts, not numbers or names


@dataclass(frozen=True)
class Corpus:
    """A data file as the recipe will name it.

    Args:
        name: path relative to the recipe's folder, or `demo:NAME`.
        task: that its columns fit.
        columns: field -> column, where they differ.
        records: what it holds.
        unanswered: how many rows without an answer were left out.
        sheet: of a workbook, where one was named.
        labels: of a classification, all that it has.
    """

    name: str
    task: str
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
    def several_lines(self) -> bool:
        """Whether an answer has several, so that a line break ends none."""
        return any("\n" in record.answer.strip() for record in self.records)

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest example, about: prompt with its template, and answer."""
        return max((self._bytes(record) for record in self.records), default=0) // BYTES

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


def parse_columns(pairs: Sequence[str], option: str = "--column") -> dict[str, str]:
    """Return field -> column of what the command line has, such as `question=Swali`.

    Raises:
        DataError: a text is no such pair, its field does not exist, or a field or a column stands twice.
    """
    columns: dict[str, str] = {}
    for pair in pairs:
        field, _, column = (part.strip() for part in pair.partition("="))
        if field not in FIELDS or not column or field in columns:
            raise DataError(
                f"{option} is {quoted(pair)}; write FIELD=COLUMN, such as question=Swali, each field once. Fields: "
                f"{listed(sorted(FIELDS))}"
            )
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
    chosen = {field: column for field, column in (columns or {}).items() if option or column in table.columns}
    column_option = option or "--source-column"
    try:
        data_task, renamed = _task_of(table, task, chosen, column_option)
    except DataError as error:
        others = sheets_of(path)[1:] if sheet is None else []
        fitting = [title for title in others if _fits(name, path, title, task, chosen, column_option)]
        if not fitting:
            raise
        raise DataError(
            f"the first sheet of {name} has the columns {listed(table.columns)}, which fit no task; those of "
            f"{quoted(fitting[0])} do: add {column_option.replace('column', 'sheet')} {shlex.quote(fitting[0])}"
        ) from error
    if find_layout(table, data_task, chosen) is LAYOUTS["xlsum"]:
        renamed = {}  # the reader knows them
    if task not in (None, data_task):
        raise DataError(
            f"{name} is data for the task {data_task} by its columns, and the task is {task}; give it the columns of that, or "
            "name them with --column and --source-column"
        )
    written = name if name.startswith(DEMO_PREFIX) else relative(name, folder)
    pool = make_pool([table], data_task, renamed, skip_unanswered=skip_unanswered)
    labels: tuple[str, ...] = ()
    if TASKS[data_task].chooses:
        labels = check_labels((record.answer for record in pool.records), name)
        for question in likely_slips((record.answer, record.where) for record in pool.records).values():
            logger.warning("%s", question)
        for line in with_two_labels(pool.records):
            logger.warning("%s", line)
    return Corpus(written, data_task, renamed, pool.records, pool.unanswerable, sheet, labels)


def _task_of(table: Table, task: str | None, chosen: Mapping[str, str], option: str) -> tuple[str, dict[str, str]]:
    """Return the task that a table is of, and its columns that are called otherwise."""
    known = find_layout(table, None, chosen).task
    return (known, {}) if known is not None else _guess(table, task, chosen, option)


def _fits(name: str, path: Path, sheet: str, task: str | None, chosen: Mapping[str, str], option: str) -> bool:
    try:
        return task in (None, _task_of(read_file(name, path, sheet=sheet), task, chosen, option)[0])
    except DataError:
        return False


def relative(place: str, folder: Path) -> str:
    """Return a path as a recipe in a folder writes it."""
    return Path(os.path.relpath(place, folder)).as_posix()


def _guess(table: Table, preferred: str | None, chosen: Mapping[str, str], option: str) -> tuple[str, dict[str, str]]:
    """Return a task whose fields are all among the columns, and the columns that are called otherwise.

    What the user names a column for is understood as if the column had that name. Of `label` and `Label` the first is meant.

    Args:
        preferred: the task that is tried first.
        chosen: field -> column, by the user.
        option: by which the user names columns.
    """
    free = [column for column in table.columns if column not in chosen.values()]
    by_name = {column.strip().lower(): column for column in free} | {column: column for column in free} | dict(chosen)
    choices = [(task, COLUMNS[task]) for task in sorted(COLUMNS, key=lambda task: task != preferred)]
    if not by_name.keys() & PARTS_OF_PROMPTS:
        choices.append(("completion", OTHER_NAMES))
    for task, fields in choices:
        columns = {
            field: next(by_name[name] for name in names if name in by_name)
            for field, names in fields.items()
            if by_name.keys() & set(names)
        }
        if task == "completion" and "messages" in by_name:
            columns = {}
        elif len(columns) < len(fields):
            continue
        elif task == "completion" and "prompt" not in chosen:  # else the user has said what a prompt is
            parts = {by_name[part] for part in by_name.keys() & PARTS_OF_PROMPTS}
            _refuse_unused(table, columns, parts, option, long_texts=fields is OTHER_NAMES)
        extra = {field: column for field, column in chosen.items() if column not in columns.values()}
        needed = {*TASKS[task].inputs, TASKS[task].answer}
        # The reader finds `answers` by itself, and there it may hold SQuAD's lists.
        understood = {field: ("answer", "answers") if field == "answer" else (field,) for field in columns}
        renamed = {field: column for field, column in columns.items() if column not in understood[field]}
        return task, renamed | {field: column for field, column in extra.items() if field not in needed}
    raise DataError(_no_task(table, by_name, option))


def _refuse_unused(
    table: Table, columns: Mapping[str, str], parts: Collection[str], option: str, *, long_texts: bool
) -> None:
    """Refuse prompts and answers beside a column that looks like a part of the prompt: by its name, or by its long texts."""
    free = [name for name in table.columns if name not in {*columns.values(), *OPTIONAL_COLUMNS}]
    sizes = {name: sum(len(str(row.values.get(name) or "")) for row in table.rows) for name in free}
    # A list of messages takes the column `system` as its first.
    talks = any(isinstance(row.values.get(columns["prompt"]), list) for row in table.rows)
    unused = [
        name
        for name in free
        if (
            name in parts
            and any(not is_blank(row.values.get(name)) for row in table.rows)
            and not (talks and name == "system")
        )
        or (long_texts and sizes[name] >= LONG * len(table.rows))
    ]
    if unused:
        pairs = (("context", unused[0]), ("question", columns["prompt"]), ("answer", columns["completion"]))
        raise DataError(
            f"{table.name} has {listed(unused)} beside {columns['prompt']} and {columns['completion']}, which no prompt would "
            f"hold; say {_options(columns.items(), option)} to leave it out, or, for questions on it, {_options(pairs, option)}"
        )


def _options(pairs: Iterable[tuple[str, str]], option: str) -> str:
    """The command line that names columns."""
    return " ".join(f"{option} {shlex.quote(f'{field}={column}')}" for field, column in pairs)


def _no_task(table: Table, by_name: Mapping[str, str], option: str) -> str:
    """Say that columns fit no task, and what would mend it."""
    present = dict.fromkeys(table.columns)  # as `in` of a list takes as long as the list
    columns = listed(list(present))
    if strange := [column for column in by_name.values() if column not in present]:
        return f"{table.name} has no column {quoted(strange[0])}, which {option} names; it has {columns}"
    if "text" in by_name:
        return (
            f"{table.name} has whole texts ({columns}), and no answers to learn: there is no language modelling. Split each text "
            "into prompt and completion, or give the columns of a task"
        )
    if labels := _labelled(table):
        pairs = zip(COLUMNS["classification"], labels, strict=True)
        return (
            f"{table.name} has the columns {columns}, which fit no task by their names; {quoted(labels[1])} looks like labels: "
            f"say {_options(pairs, option)}, or name the columns of another task"
        )
    # The task of which most columns are there; of several, one with as many fields as there are columns.
    fields = max(
        COLUMNS.values(),
        key=lambda names: (len(by_name.keys() & names.keys()), len(names) == len(present), "prompt" in names),
    )
    lacking = [field for field in fields if field not in by_name]
    taken = {by_name.get(field) for field in fields}
    free = [column for column in present if column not in taken]
    pairs = zip(lacking, free if len(free) == len(lacking) else ["NAME"] * len(lacking), strict=True)
    tasks = "; ".join(f"{task}: {', '.join(names)}" for task, names in COLUMNS.items())
    separated = "; save one that is separated by semicolons with commas, as .csv" if len(present) == 1 else ""
    # Instructions are read by their names alone.
    named = "" if "instruction" in by_name else f"name them, such as {_options(pairs, option)}, or "
    return (
        f"{table.name} has the columns {columns}, which fit no task ({tasks}; instructions: instruction, input, output; or "
        f"messages); {named}rename them{separated}"
    )


def _labelled(table: Table) -> tuple[str, str] | None:
    """A column of texts and one of labels, where there are no others: at most a tenth as many values as rows."""
    columns = [column for column in table.columns if column.lower() not in OPTIONAL_COLUMNS]
    if len(columns) != 2:
        return None
    values = {column: {str(row.values.get(column)) for row in table.rows} for column in columns}
    text, label = sorted(columns, key=lambda column: -len(values[column]))
    few = 2 <= len(values[label]) <= min(len(table.rows) // 10, MOST_LABELS) < len(values[text])
    return (text, label) if few else None
