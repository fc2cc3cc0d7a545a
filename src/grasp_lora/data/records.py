"""Rows to records: SQuAD data, XL-Sum, Alpaca, ShareGPT, and rows with named columns.

A new layout of rows is one function, and one row of `LAYOUTS`.
"""

import ast
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from grasp_lora.data.cells import Cells, Columns, clean_row, is_blank, name_of, text_of
from grasp_lora.data.conversations import Message, from_alpaca, read_messages
from grasp_lora.data.tables import Row, Table, in_small_letters
from grasp_lora.data.tasks import TASKS, task_fields
from grasp_lora.errors import DataError
from grasp_lora.text.characters import INVISIBLE
from grasp_lora.text.display import listed, quoted

OPTIONAL_COLUMNS = ("id", "group", "title", "references", "messages")
FIELDS = frozenset(OPTIONAL_COLUMNS).union(*((*task.inputs, task.answer) for task in TASKS.values()))
XLSUM_COLUMNS = {"id": "id", "title": "title", "document": "text", "summary": "summary"}


@dataclass(frozen=True)
class Record:
    """One example as its file has it.

    Args:
        id: unique within its pool; made of file name and position where the file has no ids.
        fields: the task's inputs by name; empty for a record with messages.
        answer: what the model learns to write.
        references: gold answers, at least one.
        keys: what a group joins by: id (the file's own), declared group, hash of the text, article.
        messages: turns before the answer, for a record that is a conversation.
    """

    id: str
    fields: dict[str, str]
    answer: str
    references: tuple[str, ...]
    keys: frozenset[str]
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Unanswered:
    """A row without an answer: where it stands, and what it lacks."""

    where: str
    what: str


@dataclass(frozen=True)
class Pool:
    """Records that may go to any split, and what was done to their rows.

    Args:
        records: at least one.
        characters_mapped, characters_removed: control characters.
        unanswerable: rows without an answer.
        answers_trimmed: answers with white space around them, which was removed.
    """

    records: tuple[Record, ...]
    characters_mapped: int = 0
    characters_removed: int = 0
    unanswerable: int = 0
    answers_trimmed: int = 0


@dataclass(frozen=True)
class Layout:
    """How rows say what a task needs.

    Args:
        convert: gives the records of cleaned rows and those without an answer, and counts the ones that say so themselves.
        name: for messages.
        task: the only one it fits; None for any.
        columns: by which rows of it are known.
    """

    convert: Callable[[Table, str, Columns, Counter[str]], Iterator[Record | Unanswered]]
    name: str = "generic"
    task: str | None = None
    columns: frozenset[str] = frozenset()


def make_pool(
    tables: Iterable[Table],
    task: str,
    format: str = "auto",
    columns: Columns | None = None,
    *,
    skip_unanswered: bool = False,
) -> Pool:
    """Turn the tables of one language into one pool.

    Args:
        tables: at least one row each.
        task: a key of TASKS.
        format: one of FORMATS; `auto` goes by the columns of each table.
        columns: field -> column, for generic records.
        skip_unanswered: leave out rows without an answer, and count them.

    Raises:
        DataError: a table has no rows, a row is malformed or has no answer, or an id stands twice.
    """
    columns = columns or {}
    counts: Counter[str] = Counter()
    records: list[Record] = []
    for table in tables:
        layout = find_layout(table, task, format, columns)
        if layout.task not in (None, task):
            raise DataError(f"{table.name} is {layout.name} data, which fits the task {layout.task}, not {task}")
        table = in_small_letters(table, ("id", "group", "title"), columns)
        identity = columns.get("id", "id")
        rows = []
        for where, values in table.rows:
            try:
                rows.append(Row(where, clean_row(values, identity, counts)))
            except RecursionError:  # of rows that are in memory: files are read to 64 levels
                raise DataError(
                    f"{where} is nested hundreds of levels deep; give texts, and lists of messages"
                ) from None
        for one in layout.convert(replace(table, rows=rows), task, columns, counts):
            if isinstance(one, Record):
                records.append(one)
            elif skip_unanswered:
                counts["unanswerable"] += 1
            else:
                raise DataError(
                    f"{one.where}: {one.what}; give it an answer, or remove it; a recipe can set data.skip_unanswered to true "
                    "(`init` has --skip-unanswered), which leaves such rows out and counts them"
                )
    _check_ids(records)
    if not records and counts["unanswerable"]:
        raise DataError(f"none of the {counts['unanswerable']} questions has an answer; give some that have one")
    return Pool(tuple(records), counts["mapped"], counts["removed"], counts["unanswerable"], counts["answers_trimmed"])


def find_layout(table: Table, task: str | None, format: str = "auto", columns: Columns | None = None) -> Layout:
    """Return the layout that `format` names, or else the first whose columns are all there.

    A layout of another task is not seen in rows that have a field of the task (of any task where it is None).

    Raises:
        DataError: the table has no rows.
    """
    if not table.rows:
        raise DataError(f"{table.name} holds no records")
    if format != "auto":
        return LAYOUTS[format]
    found = table.rows[0].values.keys()
    wanted = TASKS.values() if task is None else [task_fields(task)]
    plain = any(found & {*fields.inputs, fields.answer} for fields in wanted)
    special = (layout for layout in LAYOUTS.values() if layout.columns and layout.columns <= found)
    fitting = (layout for layout in special if not columns and (layout.task == task or not plain))
    return next(fitting, LAYOUTS["records"])


def text_key(text: str) -> str:
    """Return the grouping key of a text, by its `same_text`.

    >>> text_key("a  b\\n") == text_key("a b")
    True
    """
    return "text:" + hashlib.sha256(same_text(text).encode()).hexdigest()[:16]


def same_text(text: str) -> str:
    """Return what two writings of one text have in common: Unicode form NFC, one space for white space, no invisible marks."""
    return " ".join(INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())


def _check_ids(records: list[Record]) -> None:
    twice = [identity for identity, count in Counter(record.id for record in records).items() if count > 1]
    if twice:
        numbers = all(identity.isdigit() for identity in twice)
        raise DataError(
            f"{len(twice)} ids stand more than once, first {listed(twice[:5])}; every record needs its own id, "
            "and no file may be listed twice"
            + ("; where these number the rows of each file, rename the column id" if numbers else "")
        )


def _row_records(table: Table, task: str, columns: Columns, counts: Counter[str]) -> Iterator[Record | Unanswered]:
    """Read rows with a column for each field of the task, and optional ones."""
    identity = columns.get("id", "id")
    has_ids = any(not is_blank(values.get(identity)) for _, values in table.rows)
    for number, (where, values) in enumerate(table.rows, start=1):
        cells = Cells(where, values, columns)
        # As SQuAD 2.0 on the hub has a question without an answer: an empty list of texts.
        answers = values.get(columns.get("answer", "answers"))
        if task == "qa" and isinstance(answers, Mapping) and answers.get("text") == []:
            counts["unanswerable"] += 1
        else:
            read = _row_record(cells, task, f"{table.name}:{number}", has_ids, table.of_cells)
            yield _trimmed(read, task, counts) if isinstance(read, Record) else read


def _trimmed(record: Record, task: str, counts: Counter[str]) -> Record:
    """A record without white space around its answer, which would be learned as tokens of its own.

    A completion is what the user wants written, and labels are refused with it.
    """
    answer = record.answer.strip()
    if task == "completion" or TASKS[task].chooses or answer == record.answer:
        return record
    counts["answers_trimmed"] += 1
    references = tuple(answer if text == record.answer else text for text in record.references)
    return replace(record, answer=answer, references=tuple(dict.fromkeys(references)))


def _row_record(cells: Cells, task: str, position: str, has_ids: bool, of_cells: bool) -> Record | Unanswered:
    fields = task_fields(task)
    where, values, columns = cells.where, cells.values, cells.columns
    for field, column in columns.items():
        if column not in values:
            raise DataError(f"{where}: no column {quoted(column)} (columns.{field}); found: {listed(values)}")
    identity = position
    keys = set()
    own = values.get(columns.get("id", "id"))
    if has_ids and (own is None or not is_blank(own)):  # an empty cell is fine, a missing field is not
        identity = name_of(own, "id", where)
        keys.add("id:" + identity)
    else:  # where both languages read columns of one file, its rows are translations
        keys.add("row:" + position)
    if (group := cells.get("group")) is not None:
        keys.add("group:" + same_text(name_of(group, "group", where)))
    title = cells.get("title") if task != "completion" or "title" in columns else None
    if isinstance(title, str):
        keys.add(_article(title))
    elif isinstance(title, int) and not isinstance(title, bool):
        keys.add(_article(name_of(title, "title", where)))
    messages = read_messages(cells) if task == "completion" else []
    if messages and (messages[-1]["role"] != "assistant" or is_blank(messages[-1]["content"])):
        return Unanswered(
            where, f"{columns.get('messages', 'messages')} must end with an assistant message that is not empty"
        )
    if messages:
        inputs: dict[str, str] = {}
        answers = [text_of(messages[-1]["content"], "the last assistant message", where)]
        keys.add(text_key("\n".join(message["content"] for message in messages[:-1])))
    else:
        inputs = {field: cells.text(field) for field in fields.inputs}
        value = cells.need(fields.answer, other="answers" if fields.answer == "answer" else None)
        if is_blank(value):
            return Unanswered(where, f"{fields.answer} is empty")
        if fields.chooses and type(value) is int:  # labels are often numbers; CSV gives them as texts anyhow
            answers = [str(value)]
        else:
            answers = _answers(cells, value) if fields.answer == "answer" else [cells.text(fields.answer)]
        if not answers:
            return Unanswered(where, "no answer")
        keys.add(text_key(inputs[fields.document or fields.inputs[0]]))
    gold = answers
    if (references := cells.get("references")) is not None:
        several = references if isinstance(references, list | tuple) else [references]
        gold = [text_of(reference, "references", where) for reference in several]
    if not gold:
        raise DataError(f"{where}: the list of references is empty")
    if of_cells:
        for column in (columns.get("answer", "answer"), columns.get("references", "references")):
            _refuse_written_list(values.get(column), column, where)
    return Record(identity, inputs, answers[0], tuple(dict.fromkeys(gold)), frozenset(keys), tuple(messages[:-1]))


def _xlsum_records(table: Table, task: str, columns: Columns, counts: Counter[str]) -> Iterator[Record | Unanswered]:
    return _row_records(table, task, XLSUM_COLUMNS, counts)


def _alpaca_records(table: Table, task: str, columns: Columns, counts: Counter[str]) -> Iterator[Record | Unanswered]:
    """Read instruction and input as one prompt, a line break between them; with `system` or `history` as a conversation."""
    rows = [Row(where, {**values, **from_alpaca(values, where), "system": None}) for where, values in table.rows]
    return _row_records(replace(table, rows=rows), task, {"completion": "output"}, counts)


def _sharegpt_records(table: Table, task: str, columns: Columns, counts: Counter[str]) -> Iterator[Record | Unanswered]:
    """Read `conversations` of `from` and `value` as messages."""
    return _row_records(table, task, {"messages": "conversations"}, counts)


def _answers(cells: Cells, value: object) -> list[str]:
    """Read one answer, or SQuAD's `answers`: a list, or the lists of a hub data set."""
    where = cells.where
    if not isinstance(value, Mapping | list):
        text = text_of(value, "answer", where)
        if cells.columns.get("answer", "answer") not in cells.values and text.lstrip().startswith(("{", "[")):
            raise DataError(
                f"{where}: answers is a list that was written as text, {quoted(text)}; give a column answer"
            )
        return [text]
    several = value.get("text") if isinstance(value, Mapping) else value
    if not isinstance(several, list):
        raise DataError(f"{where}: no answer in an object; give a text, a list, or an object with a list `text`")
    return [text_of(item.get("text") if isinstance(item, Mapping) else item, "answer", where) for item in several]


def _refuse_written_list(text: object, column: str, where: str) -> None:
    """Refuse texts in a list, or an object, that a table of cells holds as one text, such as pandas writes them."""
    if not isinstance(text, str) or not text.lstrip().startswith(("{", "[")):
        return
    for read in (json.loads, ast.literal_eval):  # as JSON writes them, and as Python does
        try:
            found = read(text.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, dict) or (isinstance(found, list) and any(isinstance(one, str | dict) for one in found)):
            raise DataError(
                f"{where}: {column} is a list that was written as text, {quoted(text)}; give one text in a cell, or JSONL"
            )


def _squad_records(table: Table, task: str, columns: Columns, counts: Counter[str]) -> Iterator[Record | Unanswered]:
    """Read articles of paragraphs of questions."""
    questions = 0
    for number, (_, article) in enumerate(table.rows):
        where = f"{table.name}, article {number + 1}"
        title = article.get("title")
        # Without a title, the article is told by its place.
        key = _article(title) if isinstance(title, str) and title.strip() else f"article:{table.name}#{number}"
        for paragraph in _list(article, "paragraphs", where):
            context = text_of(_inner(paragraph, "context"), "context", where)
            for question in _list(paragraph, "qas", where):
                questions += 1
                if _inner(question, "id") is None:
                    raise DataError(f"{where}: a question has no id")
                identity = name_of(_inner(question, "id"), "id", where)
                here = f"{where}, question {identity}"
                answers = [_squad_answer(answer, context, here) for answer in _list(question, "answers", here)]
                if not answers and _inner(question, "is_impossible") is True:  # SQuAD 2.0
                    counts["unanswerable"] += 1
                    continue
                if not answers:
                    yield Unanswered(here, "no answer")
                    continue
                inputs = {"context": context, "question": text_of(_inner(question, "question"), "question", here)}
                keys = frozenset({"id:" + identity, text_key(context), key})
                yield Record(identity, inputs, answers[0], tuple(dict.fromkeys(answers)), keys)
    if not questions:
        raise DataError(f"{table.name} holds no questions")


def _squad_answer(answer: object, context: str, where: str) -> str:
    text = text_of(_inner(answer, "text"), "answer", where)
    # An answer elsewhere in the context is only a wrong offset, which nothing here uses.
    if text not in context:
        raise DataError(f"{where}: the answer {quoted(text)} does not stand in its context")
    return text


# Those with columns of their own are looked for in this order; the hub's data sets have plain rows.
LAYOUTS = {
    "squad": Layout(_squad_records, "SQuAD", "qa", frozenset({"paragraphs"})),
    "xlsum": Layout(_xlsum_records, "XL-Sum", "summarization", frozenset(XLSUM_COLUMNS.values())),
    "alpaca": Layout(_alpaca_records, "Alpaca", "completion", frozenset({"instruction", "output"})),
    "sharegpt": Layout(_sharegpt_records, "ShareGPT", "completion", frozenset({"conversations"})),
    "records": Layout(_row_records),
    "hub": Layout(_row_records),
}
FORMATS = ("auto", *LAYOUTS)


def _article(title: str) -> str:
    """Key of an article, the same in every file: its paragraphs may be spread over several, with spaces or, as in XQuAD, `_`."""
    return f"article:{same_text(title.replace('_', ' '))}"


def _inner(item: object, key: str) -> object:
    return item.get(key) if isinstance(item, Mapping) else None


def _list(item: object, key: str, where: str) -> list[object]:
    value = _inner(item, key)
    if not isinstance(value, list):
        found = type(value).__name__
        raise DataError(
            f"{where}: {key} must be a list, found {found}; SQuAD data is an object with a list `data` of articles"
        )
    return value
