"""A data file of a user's own: its task and the columns of its fields are read off it."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grasp_lora.data.files import read_file
from grasp_lora.data.labels import check_labels, check_records
from grasp_lora.data.places import DEMO_PREFIX
from grasp_lora.data.records import LAYOUTS, Record, find_layout, make_pool
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


@dataclass(frozen=True)
class Corpus:
    """A data file as the recipe will name it.

    Args:
        name: path relative to the recipe's folder, or `demo:NAME`.
        task: that its columns fit.
        format: `auto` or `squad`.
        columns: field -> column, where they differ.
        records: what it holds.
        labels: of a classification, all that it has.
    """

    name: str
    task: str
    format: str
    columns: dict[str, str]
    records: tuple[Record, ...]
    labels: tuple[str, ...] = ()

    @property
    def several_turns(self) -> bool:
        """Whether some record is a conversation of several turns."""
        return any(len(record.messages) > 2 for record in self.records)

    @property
    def answer_tokens(self) -> int:
        """Room for nearly all answers: a token is about three bytes of text, and multiples of 16 look deliberate.

        `grasp-lora check`, which has the tokenizer, says where it is too little.
        """
        longest = sorted(len(record.answer.encode()) for record in self.records)[int(len(self.records) * 0.98) - 1]
        return max(32, min(512, 16 * math.ceil(longest / 3 / 16)))


def read_corpus(name: str, path: Path, folder: Path, task: str | None = None) -> Corpus:
    """Read a file and find its task.

    Args:
        name: what the user calls it.
        path: where it is.
        folder: of the recipe.
        task: that its columns have to fit; None for any.

    Raises:
        DataError: the file is malformed, or its columns fit no task or another one.
    """
    table = read_file(name, path)
    squad = find_layout(table, None) is LAYOUTS["squad"]
    found, columns = ("qa", {}) if squad else _guess(list(map(str, table.rows[0].values)), name, task)
    if find_layout(table, found) is LAYOUTS["xlsum"]:
        columns = {}  # the reader knows them
    if task not in (None, found):
        raise DataError(
            f"{name} is data for the task {found}, but the target's is {task}; give source data of that task"
        )
    format = "squad" if squad else "auto"
    written = name if name.startswith(DEMO_PREFIX) else relative(name, folder)
    records = make_pool([table], found, format, columns).records
    labels: tuple[str, ...] = ()
    if TASKS[found].chooses:
        check_records(records)
        labels = check_labels((record.answer for record in records), name)
    return Corpus(written, found, format, columns, records, labels)


def relative(place: str, folder: Path) -> str:
    """Return a path as a recipe in a folder writes it."""
    return Path(os.path.relpath(place, folder)).as_posix()


def _guess(found: Sequence[str], name: str, preferred: str | None) -> tuple[str, dict[str, str]]:
    """Return a task whose fields are all among the columns, and the columns that are called otherwise."""
    by_name = {column.strip().lower(): column for column in found}
    choices = [(task, COLUMNS[task]) for task in sorted(COLUMNS, key=lambda task: task != preferred)]
    if not by_name.keys() & PARTS_OF_PROMPTS:
        choices.append(("completion", OTHER_NAMES))
    for task, fields in choices:
        if task == "completion" and "messages" in found:
            return task, {}
        chosen = {
            field: next(by_name[known] for known in names if known in by_name)
            for field, names in fields.items()
            if by_name.keys() & set(names)
        }
        if len(chosen) == len(fields):
            # The reader finds `answers` by itself, and there it may hold SQuAD's lists.
            understood = {field: ("answer", "answers") if field == "answer" else (field,) for field in chosen}
            return task, {field: column for field, column in chosen.items() if column not in understood[field]}
    known = "; ".join(f"{task}: {' and '.join(fields)}" for task, fields in COLUMNS.items())
    if len(found) == 1 and re.search(r"[;\t|]", found[0]):
        raise DataError(
            f"{name} has one column, {quoted(found[0])}: its cells seem to be separated by something else than its suffix says; "
            "save it with commas as .csv, or with tabs as .tsv"
        )
    if not found:
        raise DataError(f"{name} begins with a record without fields; give each record those of a task ({known})")
    raise DataError(
        f"{name} has the columns {listed(found)}, which fit no task ({known}, or messages); rename them, or begin with one of "
        "`grasp-lora recipes` and name them there, such as data.target.columns: {prompt: NAME, completion: NAME}"
    )
