"""Rows to records: SQuAD data, XL-Sum, and generic rows with named columns. Texts are cleaned by one rule and checked.

Control characters other than newline and tab are removed from texts, or replaced by what they stand for, and counted. Ids are
never changed: one with a control character is refused.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp_lora.data.files import Row, as_row, read_content
from grasp_lora.data.tasks import task_fields
from grasp_lora.errors import DataError
from grasp_lora.text.characters import INVISIBLE
from grasp_lora.text.display import CONTROLS, SURROGATES, listed, quoted

__all__ = [
    "FORMATS",
    "OPTIONAL_COLUMNS",
    "XLSUM_COLUMNS",
    "Message",
    "Pool",
    "Record",
    "Row",
    "read_content",
    "read_files",
    "read_rows",
    "same_text",
    "text_key",
]

FORMATS = ("auto", "squad", "xlsum", "records", "hub")
OPTIONAL_COLUMNS = ("id", "group", "title", "references", "messages")
XLSUM_COLUMNS = {"id": "id", "title": "title", "document": "text", "summary": "summary"}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Windows-1252 quotation marks and dashes, as in XL-Sum's Chinese articles, the line ends of old Macs, and page breaks.
MAPPED = {
    "\x91": "‘", "\x92": "’", "\x93": "“", "\x94": "”", "\x96": "–", "\x97": "—", "\r": "\n", "\x0b": " ", "\x0c": " ",
}  # fmt: skip
MOST_TEXT = 1_000_000  # characters
MOST_ID = 500

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


def text_key(text: str) -> str:
    """Return the grouping key of a text, by its `same_text`.

    >>> text_key("a  b\\n") == text_key("a b")
    True
    """
    return "text:" + hashlib.sha256(same_text(text).encode()).hexdigest()[:16]


def same_text(text: str) -> str:
    """Return what two writings of one text have in common: Unicode form NFC, one space for white space, no invisible marks."""
    return " ".join(INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())


def read_files(
    files: Sequence[tuple[str, Path]], task: str, format: str = "auto", columns: Mapping[str, str] | None = None
) -> Pool:
    """Read files of one language into one pool.

    Args:
        files: name for messages and made-up ids, and path, of each file.
        task: `qa`, `summarization` or `completion`.
        format: one of FORMATS but `hub`; `auto` guesses each file's from its suffix and content.
        columns: field -> column of the file, for generic records.

    Raises:
        DataError: a file is missing, empty or malformed, or an id stands twice.
    """
    records: list[Record] = []
    counts: Counter[str] = Counter()
    for name, path in files:
        content = read_content(name, path, format)
        if isinstance(content, list):
            records += _convert(content, name, task, format, columns or {}, counts)
        elif task != "qa":
            raise DataError(f"{name} is SQuAD data, which fits the task qa, not {task}")
        else:
            records += _squad_records(_clean(content, counts, "id"), name, counts)
    return _pool(records, counts)


def read_rows(
    rows: Iterable[tuple[str, Any]],
    name: str,
    task: str,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
) -> Pool:
    """Turn rows that are in memory into one pool.

    Args:
        rows: where each stands, for messages, and what it says: a mapping from column to value.
        name: name of them all, for messages and made-up ids.
        task, format, columns: as for `read_files`; SQuAD data is no rows.

    Raises:
        DataError: there are no rows, one is malformed, or an id stands twice.
    """
    counts: Counter[str] = Counter()
    checked = [as_row(item, where) for where, item in rows]
    return _pool(_convert(checked, name, task, format, columns or {}, counts), counts)


def _pool(records: list[Record], counts: Counter[str]) -> Pool:
    seen = Counter(record.id for record in records)
    twice = [identity for identity, count in seen.items() if count > 1]
    if twice:
        numbers = all(identity.isdigit() for identity in twice)
        raise DataError(
            f"{len(twice)} ids stand more than once, first {listed(twice[:5])}; every record needs its own id, "
            "and no file may be listed twice"
            + ("; where these number the rows of each file, rename the column id" if numbers else "")
        )
    if not records and counts["unanswerable"]:
        raise DataError(f"none of the {counts['unanswerable']} questions has an answer; give some that have one")
    return Pool(tuple(records), counts["mapped"], counts["removed"], counts["unanswerable"])


def _convert(
    rows: list[Row], name: str, task: str, format: str, columns: Mapping[str, str], counts: Counter[str]
) -> list[Record]:
    """Turn rows into records, as XL-Sum or as generic ones."""
    if not rows:
        raise DataError(f"{name} holds no records")
    looks_like_xlsum = set(XLSUM_COLUMNS.values()) <= rows[0][1].keys() and not columns
    if format == "xlsum" or (format == "auto" and task == "summarization" and looks_like_xlsum):
        if task != "summarization":
            raise DataError(f"{name} is XL-Sum data, which fits the task summarization, not {task}")
        columns = XLSUM_COLUMNS
    rows = [(where, _clean(row, counts, columns.get("id", "id"))) for where, row in rows]
    has_ids = any(not _blank(row.get(columns.get("id", "id"))) for _, row in rows)
    records = []
    for number, (where, row) in enumerate(rows, start=1):
        if task == "qa" and _is_unanswerable(row, columns):
            counts["unanswerable"] += 1
            continue
        records.append(_record(row, where, f"{name}:{number}", name, task, columns, has_ids))
    return records


def _is_unanswerable(row: dict[str, Any], columns: Mapping[str, str]) -> bool:
    """Whether a row is a question without an answer, as SQuAD 2.0 on the hub has them: an empty list of texts."""
    found = row.get(columns.get("answer", "answers"))
    return isinstance(found, dict) and found.get("text") == []


def _clean(value: Any, counts: Counter[str], identity: str) -> Any:
    """Map or remove control characters other than newline and tab in every text but ids, and count them."""
    if isinstance(value, dict):
        return {key: part if key == identity else _clean(part, counts, identity) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(part, counts, identity) for part in value]
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        mapped = MAPPED.get(match.group(), "")
        counts["mapped" if mapped else "removed"] += 1
        return mapped

    return CONTROL.sub(replacement, value.replace("\r\n", "\n"))


def _record(
    row: dict[str, Any],
    where: str,
    position: str,
    name: str,
    task: str,
    columns: Mapping[str, str],
    has_ids: bool,
) -> Record:
    fields = task_fields(task)
    for field, column in columns.items():
        if column not in row:
            raise DataError(f"{where}: no column {quoted(column)} (columns.{field}); found: {listed(row)}")
    identity = position
    keys = set()
    own = row.get(columns.get("id", "id"))
    if has_ids and (own is None or not _blank(own)):  # an empty cell is fine, a missing field is not
        identity = _plain(own, "id", where)
        keys.add("id:" + identity)
    group = row.get(columns.get("group", "group"))
    if not _blank(group):
        keys.add("group:" + _plain(group, "group", where))
    title = row.get(columns.get("title", "title"))
    if task != "completion" and isinstance(title, str) and title.strip():
        keys.add(_article(title))
    messages = _conversation(row, where, columns) if task == "completion" else ()
    if messages:
        inputs = {}
        answers = [_text(messages[-1]["content"], "the last assistant message", where)]
        keys.add(text_key("\n".join(message["content"] for message in messages[:-1])))
    else:
        inputs = {field: _text(_cell(row, field, where, columns), field, where) for field in fields.inputs}
        answers = _answers(row, where, fields.answer, columns)
        keys.add(text_key(inputs[fields.document or fields.inputs[0]]))
    references = row.get(columns.get("references", "references"))
    if not _blank(references):
        several = references if isinstance(references, list | tuple) else [references]
        gold = [_text(reference, "references", where) for reference in several]
    else:
        gold = answers
    if not gold:
        raise DataError(f"{where}: the list of references is empty")
    return Record(identity, inputs, answers[0], tuple(dict.fromkeys(gold)), frozenset(keys), tuple(messages[:-1]))


def _article(title: str) -> str:
    """Key of an article, the same in every file: its paragraphs may be spread over several."""
    return f"article:{' '.join(title.split())}"


def _blank(value: Any) -> bool:
    """Whether an optional cell says nothing."""
    return value is None or (isinstance(value, str) and not value.strip())


def _cell(row: dict[str, Any], field: str, where: str, columns: Mapping[str, str], other: str | None = None) -> Any:
    for column in (columns.get(field, field), None if field in columns else other):
        if column is not None and column in row:
            return row[column]
    raise DataError(
        f"{where}: no column {quoted(columns.get(field, field))}; found: {listed(row)}. "
        f"Rename the right one, or name it in the recipe: columns: {{{field}: NAME}}"
    )


def _answers(row: dict[str, Any], where: str, field: str, columns: Mapping[str, str]) -> list[str]:
    """Read one answer, or SQuAD's `answers`: a list, or the lists of a hub data set."""
    value = _cell(row, field, where, columns, other="answers" if field == "answer" else None)
    if field == "answer" and not isinstance(value, str):
        if isinstance(value, dict):
            value = value.get("text")
        if not isinstance(value, list) or not value:
            raise DataError(f"{where}: no answer; questions without an answer are not supported, remove them")
        return [_text(item.get("text") if isinstance(item, dict) else item, field, where) for item in value]
    text = _text(value, field, where)
    if field == "answer" and columns.get(field, field) not in row and text.lstrip().startswith(("{", "[")):
        raise DataError(f"{where}: answers is a list that was written as text, {quoted(text)}; give a column answer")
    return [text]


def _conversation(row: dict[str, Any], where: str, columns: Mapping[str, str]) -> list[Message]:
    """Read `messages`, or prompt and completion that are lists of messages; empty for plain records."""
    column = columns.get("messages", "messages")
    turns = row.get(column)
    if turns is None:
        prompt = row.get(columns.get("prompt", "prompt"))
        completion = row.get(columns.get("completion", "completion"))
        if not isinstance(prompt, list) or not isinstance(completion, list):
            return []
        turns = prompt + completion
    messages = []
    for turn in turns if isinstance(turns, list) else [None]:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise DataError(f"{where}: {column} must be a list of objects with the texts `role` and `content`")
        messages.append({"role": turn["role"], "content": turn["content"]})
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: {column} must end with an assistant message, and one must stand before it")
    for message in messages[:-1]:
        _text(message["role"], "the role of a message", where)
        _text(message["content"], "a message", where)
    return messages


def _squad_records(content: dict[str, Any], name: str, counts: Counter[str]) -> list[Record]:
    records: list[Record] = []
    for number, article in enumerate(content["data"]):
        where = f"{name}, article {number + 1}"
        title = article.get("title") if isinstance(article, dict) else None
        untitled = not isinstance(title, str) or not title.strip()
        article_key = f"article:{name}#{number}" if untitled else _article(str(title))
        for paragraph in _list(article, "paragraphs", where):
            context = _text(paragraph.get("context") if isinstance(paragraph, dict) else None, "context", where)
            for question in _list(paragraph, "qas", where):
                if not isinstance(question, dict) or question.get("id") is None:
                    raise DataError(f"{where}: a question has no id")
                identity = _plain(question["id"], "id", where)
                here = f"{where}, question {identity}"
                answers = [_squad_answer(answer, context, here) for answer in _list(question, "answers", here)]
                if not answers and question.get("is_impossible") is True:  # SQuAD 2.0
                    counts["unanswerable"] += 1
                    continue
                if not answers:
                    raise DataError(f"{here}: no answer; questions without an answer are not supported, remove them")
                inputs = {"context": context, "question": _text(question.get("question"), "question", here)}
                keys = frozenset({"id:" + identity, text_key(context), article_key})
                records.append(Record(identity, inputs, answers[0], tuple(dict.fromkeys(answers)), keys))
    if not records and not counts["unanswerable"]:
        raise DataError(f"{name} holds no questions")
    return records


def _squad_answer(answer: Any, context: str, where: str) -> str:
    text = _text(answer.get("text") if isinstance(answer, dict) else None, "answer", where)
    # An answer elsewhere in the context is only a wrong offset, which nothing here uses.
    if text not in context:
        raise DataError(f"{where}: the answer {quoted(text)} does not stand in its context")
    return text


def _list(mapping: Any, key: str, where: str) -> list[Any]:
    value = mapping.get(key) if isinstance(mapping, dict) else None
    if not isinstance(value, list):
        raise DataError(f"{where}: {key} must be a list, found {type(value).__name__}")
    return value


def _plain(value: Any, label: str, where: str) -> str:
    """A text or a whole number that names something: short and printable, since it stands in messages, files and reports."""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"{where}: {label} must be a text or a whole number, found {quoted(value)}")
    text = str(value)
    if len(text) > MOST_ID:
        raise DataError(f"{where}: {label} has {len(text)} characters; at most {MOST_ID} are allowed")
    if found := CONTROLS.search(text):
        raise DataError(f"{where}: {label} holds the control character U+{ord(found.group()):04X}; remove it")
    return text


def _text(value: Any, label: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {label} must be a text, found {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{where}: {label} is empty")
    if len(value) > MOST_TEXT:
        raise DataError(f"{where}: {label} has {len(value)} characters; at most {MOST_TEXT} are allowed")
    if SURROGATES.search(value):
        raise DataError(f"{where}: {label} holds half of a surrogate pair, which is no valid text")
    return value
