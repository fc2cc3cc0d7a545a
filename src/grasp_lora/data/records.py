"""Rows to records: SQuAD data, XL-Sum, and rows with named columns. Texts are cleaned by one rule and checked.

Control characters other than newline and tab are removed from texts, or replaced by what they stand for, and counted. Ids are
never changed: one with a control character is refused. A new layout of rows is one function, and one row of `LAYOUTS`.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from grasp_lora.data.files import Row, Table
from grasp_lora.data.tasks import TASKS, task_fields
from grasp_lora.errors import DataError
from grasp_lora.text.characters import INVISIBLE
from grasp_lora.text.display import CONTROLS, SURROGATES, listed, quoted

OPTIONAL_COLUMNS = ("id", "group", "title", "references", "messages")
XLSUM_COLUMNS = {"id": "id", "title": "title", "document": "text", "summary": "summary"}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Windows-1252 quotation marks and dashes, as in XL-Sum's Chinese articles, the line ends of old Macs, and page breaks.
MAPPED = {
    "\x91": "‘", "\x92": "’", "\x93": "“", "\x94": "”", "\x96": "–", "\x97": "—", "\r": "\n", "\x0b": " ", "\x0c": " ",
}  # fmt: skip
MOST_TEXT = 1_000_000  # characters
MOST_ID = 500

Columns = Mapping[str, str]  # field -> column
Message = dict[str, str]


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
class Pool:
    """Records that may go to any split; how many control characters were mapped and removed, and questions without answer."""

    records: tuple[Record, ...]
    characters_mapped: int = 0
    characters_removed: int = 0
    unanswerable: int = 0


@dataclass(frozen=True)
class Layout:
    """How rows say what a task needs.

    Args:
        convert: gives the records of cleaned rows, and counts the `unanswerable` ones that it leaves out.
        name: for messages.
        task: the only one it fits; None for any.
        columns: by which rows of it are known.
    """

    convert: Callable[[Table, str, Columns, Counter[str]], Iterator[Record]]
    name: str = "generic"
    task: str | None = None
    columns: frozenset[str] = frozenset()


def make_pool(tables: Iterable[Table], task: str, format: str = "auto", columns: Columns | None = None) -> Pool:
    """Turn the tables of one language into one pool.

    Args:
        tables: at least one row each.
        task: `qa`, `summarization` or `completion`.
        format: one of FORMATS; `auto` goes by the columns of each table.
        columns: field -> column, for generic records.

    Raises:
        DataError: a table has no rows, a row is malformed, or an id stands twice.
    """
    columns = columns or {}
    counts: Counter[str] = Counter()
    records: list[Record] = []
    for table in tables:
        layout = find_layout(table, task, format, columns)
        if layout.task not in (None, task):
            raise DataError(f"{table.name} is {layout.name} data, which fits the task {layout.task}, not {task}")
        identity = columns.get("id", "id")
        rows = []
        for where, values in table.rows:
            try:
                rows.append(Row(where, _clean_row(values, identity, counts)))
            except RecursionError:  # of rows that are in memory: files are read to 64 levels
                raise DataError(
                    f"{where} is nested hundreds of levels deep; give texts, and lists of messages"
                ) from None
        records += layout.convert(Table(table.name, rows), task, columns, counts)
    _check_ids(records)
    if not records and counts["unanswerable"]:
        raise DataError(f"none of the {counts['unanswerable']} questions has an answer; give some that have one")
    return Pool(tuple(records), counts["mapped"], counts["removed"], counts["unanswerable"])


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


def _clean(value: object, identity: str, counts: Counter[str]) -> object:
    """Map or remove control characters other than newline and tab in every text but ids, and count them."""
    if isinstance(value, Mapping):
        return _clean_row(value, identity, counts)
    if isinstance(value, list | tuple):
        return [_clean(part, identity, counts) for part in value]
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        mapped = MAPPED.get(match.group(), "")
        counts["mapped" if mapped else "removed"] += 1
        return mapped

    return CONTROL.sub(replacement, value.replace("\r\n", "\n"))


def _clean_row(values: Mapping[str, object], identity: str, counts: Counter[str]) -> dict[str, object]:
    return {key: part if key == identity else _clean(part, identity, counts) for key, part in values.items()}


@dataclass(frozen=True)
class _Cells:
    """A row that is asked by field, whatever its columns are called."""

    where: str
    values: Mapping[str, object]
    columns: Columns

    def get(self, field: str) -> object:
        """The value of an optional field; None where it says nothing."""
        value = self.values.get(self.columns.get(field, field))
        return None if _blank(value) else value

    def need(self, field: str, other: str | None = None) -> object:
        """The value of a field, or of the column `other` where no column is named for it."""
        column = self.columns.get(field, field)
        for known in (column, None if field in self.columns else other):
            if known is not None and known in self.values:
                return self.values[known]
        raise DataError(
            f"{self.where}: no column {quoted(column)}; found: {listed(self.values)}. "
            f"Rename the right one, or name it in the recipe: columns: {{{field}: NAME}}"
        )

    def text(self, field: str) -> str:
        return _text(self.need(field), field, self.where)


def _row_records(table: Table, task: str, columns: Columns, counts: Counter[str]) -> Iterator[Record]:
    """Read rows with a column for each field of the task, and optional ones."""
    identity = columns.get("id", "id")
    has_ids = any(not _blank(values.get(identity)) for _, values in table.rows)
    for number, (where, values) in enumerate(table.rows, start=1):
        cells = _Cells(where, values, columns)
        # As SQuAD 2.0 on the hub has a question without an answer: an empty list of texts.
        answers = values.get(columns.get("answer", "answers"))
        if task == "qa" and isinstance(answers, Mapping) and answers.get("text") == []:
            counts["unanswerable"] += 1
        else:
            yield _row_record(cells, task, f"{table.name}:{number}", has_ids)


def _row_record(cells: _Cells, task: str, position: str, has_ids: bool) -> Record:
    fields = task_fields(task)
    where, values, columns = cells.where, cells.values, cells.columns
    for field, column in columns.items():
        if column not in values:
            raise DataError(f"{where}: no column {quoted(column)} (columns.{field}); found: {listed(values)}")
    identity = position
    keys = set()
    own = values.get(columns.get("id", "id"))
    if has_ids and (own is None or not _blank(own)):  # an empty cell is fine, a missing field is not
        identity = _plain(own, "id", where)
        keys.add("id:" + identity)
    if (group := cells.get("group")) is not None:
        keys.add("group:" + _plain(group, "group", where))
    title = cells.get("title")
    if task != "completion" and isinstance(title, str):
        keys.add(_article(title))
    messages = _conversation(cells) if task == "completion" else []
    if messages:
        inputs: dict[str, str] = {}
        answers = [_text(messages[-1]["content"], "the last assistant message", where)]
        keys.add(text_key("\n".join(message["content"] for message in messages[:-1])))
    else:
        inputs = {field: cells.text(field) for field in fields.inputs}
        answers = _answers(cells) if fields.answer == "answer" else [cells.text(fields.answer)]
        keys.add(text_key(inputs[fields.document or fields.inputs[0]]))
    gold = answers
    if (references := cells.get("references")) is not None:
        several = references if isinstance(references, list | tuple) else [references]
        gold = [_text(reference, "references", where) for reference in several]
    if not gold:
        raise DataError(f"{where}: the list of references is empty")
    return Record(identity, inputs, answers[0], tuple(dict.fromkeys(gold)), frozenset(keys), tuple(messages[:-1]))


def _xlsum_records(table: Table, task: str, columns: Columns, counts: Counter[str]) -> Iterator[Record]:
    return _row_records(table, task, XLSUM_COLUMNS, counts)


def _answers(cells: _Cells) -> list[str]:
    """Read one answer, or SQuAD's `answers`: a list, or the lists of a hub data set."""
    value, where = cells.need("answer", other="answers"), cells.where
    if isinstance(value, str):
        text = _text(value, "answer", where)
        if cells.columns.get("answer", "answer") not in cells.values and text.lstrip().startswith(("{", "[")):
            raise DataError(
                f"{where}: answers is a list that was written as text, {quoted(text)}; give a column answer"
            )
        return [text]
    several = value.get("text") if isinstance(value, Mapping) else value
    if not isinstance(several, list) or not several:
        raise DataError(f"{where}: no answer; questions without an answer are not supported, remove them")
    return [_text(item.get("text") if isinstance(item, Mapping) else item, "answer", where) for item in several]


def _conversation(cells: _Cells) -> list[Message]:
    """Read `messages`, or prompt and completion that are lists of messages; empty for plain records."""
    column = cells.columns.get("messages", "messages")
    turns = cells.values.get(column)
    if turns is None:
        prompt, completion = cells.get("prompt"), cells.get("completion")
        if not isinstance(prompt, list) or not isinstance(completion, list):
            return []
        turns = prompt + completion
    messages: list[Message] = []
    for turn in turns if isinstance(turns, list) else [None]:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise DataError(f"{cells.where}: {column} must be a list of objects with the texts `role` and `content`")
        messages.append({"role": turn["role"], "content": turn["content"]})
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{cells.where}: {column} must end with an assistant message, and one must stand before it")
    for message in messages[:-1]:
        _text(message["role"], "the role of a message", cells.where)
        _text(message["content"], "a message", cells.where)
    return messages


def _squad_records(table: Table, task: str, columns: Columns, counts: Counter[str]) -> Iterator[Record]:
    """Read articles of paragraphs of questions."""
    questions = 0
    for number, (_, article) in enumerate(table.rows):
        where = f"{table.name}, article {number + 1}"
        title = article.get("title")
        # Without a title, the article is told by its place.
        key = _article(title) if isinstance(title, str) and title.strip() else f"article:{table.name}#{number}"
        for paragraph in _list(article, "paragraphs", where):
            context = _text(_inner(paragraph, "context"), "context", where)
            for question in _list(paragraph, "qas", where):
                questions += 1
                if _inner(question, "id") is None:
                    raise DataError(f"{where}: a question has no id")
                identity = _plain(_inner(question, "id"), "id", where)
                here = f"{where}, question {identity}"
                answers = [_squad_answer(answer, context, here) for answer in _list(question, "answers", here)]
                if not answers and _inner(question, "is_impossible") is True:  # SQuAD 2.0
                    counts["unanswerable"] += 1
                    continue
                if not answers:
                    raise DataError(f"{here}: no answer; questions without an answer are not supported, remove them")
                inputs = {"context": context, "question": _text(_inner(question, "question"), "question", here)}
                keys = frozenset({"id:" + identity, text_key(context), key})
                yield Record(identity, inputs, answers[0], tuple(dict.fromkeys(answers)), keys)
    if not questions:
        raise DataError(f"{table.name} holds no questions")


def _squad_answer(answer: object, context: str, where: str) -> str:
    text = _text(_inner(answer, "text"), "answer", where)
    # An answer elsewhere in the context is only a wrong offset, which nothing here uses.
    if text not in context:
        raise DataError(f"{where}: the answer {quoted(text)} does not stand in its context")
    return text


# Those with columns of their own are looked for in this order; the hub's data sets have plain rows.
LAYOUTS = {
    "squad": Layout(_squad_records, "SQuAD", "qa", frozenset({"paragraphs"})),
    "xlsum": Layout(_xlsum_records, "XL-Sum", "summarization", frozenset(XLSUM_COLUMNS.values())),
    "records": Layout(_row_records),
    "hub": Layout(_row_records),
}
FORMATS = ("auto", *LAYOUTS)


def _article(title: str) -> str:
    """Key of an article, the same in every file: its paragraphs may be spread over several, with spaces or, as in XQuAD, `_`."""
    return f"article:{' '.join(title.replace('_', ' ').split())}"


def _blank(value: object) -> bool:
    """Whether an optional cell says nothing."""
    return value is None or (isinstance(value, str) and not value.strip())


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


def _plain(value: object, label: str, where: str) -> str:
    """A text or a whole number that names something: short and printable, since it stands in messages, files and reports."""
    if isinstance(value, int) and value.bit_length() > 4 * MOST_ID:  # Python does not write all of them
        raise DataError(f"{where}: {label} is {quoted(value)}; at most {MOST_ID} characters are allowed")
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"{where}: {label} must be a text or a whole number, found {quoted(value)}")
    text = str(value)
    if len(text) > MOST_ID:
        raise DataError(f"{where}: {label} has {len(text)} characters; at most {MOST_ID} are allowed")
    if found := CONTROLS.search(text):
        raise DataError(f"{where}: {label} holds the control character U+{ord(found.group()):04X}; remove it")
    return text


def _text(value: object, label: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {label} must be a text, found {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{where}: {label} is empty")
    if len(value) > MOST_TEXT:
        raise DataError(f"{where}: {label} has {len(value)} characters; at most {MOST_TEXT} are allowed")
    if SURROGATES.search(value):
        raise DataError(f"{where}: {label} holds half of a surrogate pair, which is no valid text")
    return value
