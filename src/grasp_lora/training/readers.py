"""Data files and rows to records: SQuAD JSON, XL-Sum JSONL, generic JSONL, JSON, CSV and parquet."""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp_lora.errors import DataError
from grasp_lora.training.prompts import task_fields

FORMATS = ("auto", "squad", "xlsum", "records", "hub")
OPTIONAL_COLUMNS = ("id", "group", "title", "references", "messages")
XLSUM_COLUMNS = {"id": "id", "title": "title", "document": "text", "summary": "summary"}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
MAPPED = {"\x93": "“", "\x94": "”"}  # Windows-1252 quotation marks in XL-Sum's Chinese articles
SURROGATE = re.compile("[\ud800-\udfff]")

Row = tuple[str, dict[str, Any]]  # where it stands ("a.jsonl, line 3") and what it says
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
    """Records that may go to any split, and how many control characters were mapped and removed."""

    records: tuple[Record, ...]
    characters_mapped: int = 0
    characters_removed: int = 0


def text_key(text: str) -> str:
    """Return the grouping key of a text; white space does not count.

    >>> text_key("a  b\\n") == text_key("a b")
    True
    """
    return "text:" + hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


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
            records += _squad_records(content, name)
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
    checked = [_row(item, where) for where, item in rows]
    return _pool(_convert(checked, name, task, format, columns or {}, counts), counts)


def _pool(records: list[Record], counts: Counter[str]) -> Pool:
    seen = Counter(record.id for record in records)
    twice = [identity for identity, count in seen.items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice)} ids stand more than once, first {', '.join(twice[:5])}; every record needs its own id, "
            "and no file may be listed twice"
        )
    return Pool(tuple(records), counts["mapped"], counts["removed"])


def read_content(name: str, path: Path, format: str) -> list[Row] | dict[str, Any]:
    """Parse a file into rows, or into the object that a SQuAD file is."""
    if not path.is_file():
        raise DataError(f"data file {name!r} is missing: {path} is not a file")
    data = path.read_bytes()
    if not data.removeprefix(b"\xef\xbb\xbf").strip():
        raise DataError(f"{name} is empty")
    suffix = path.suffix.lower()
    if format == "squad":
        suffix = ".json"
    elif format == "xlsum":
        suffix = ".jsonl"
    if suffix == ".parquet":
        return _parquet_rows(data, name)
    if suffix not in (".json", ".jsonl", ".ndjson", ".csv", ".tsv"):
        raise DataError(
            f"{name}: cannot tell the format from the suffix {path.suffix!r}; "
            "allowed: .json, .jsonl, .ndjson, .csv, .tsv, .parquet (or set format to squad or xlsum)"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{name}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    if suffix in (".csv", ".tsv"):
        return _csv_rows(text, name, "," if suffix == ".csv" else "\t")
    if suffix != ".json":
        return _json_lines(text, name)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and format != "squad":
            return _json_lines(text, name)  # JSON lines are often saved as .json
        raise DataError(f"{name}, line {error.lineno}: not valid JSON ({error.msg})") from None
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        return content
    if format == "squad":
        raise DataError(f"{name} is not SQuAD data: it must be a JSON object with a list `data`")
    listed = content if isinstance(content, list) else [content]
    return [_row(item, f"{name}, record {number}") for number, item in enumerate(listed, start=1)]


def _row(item: Any, where: str) -> Row:
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: expected an object with named fields, found {type(item).__name__}")
    return where, dict(item)


def _json_lines(text: str, name: str) -> list[Row]:
    rows = []
    # Not splitlines(): it also splits at characters, such as U+2028, that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{name}, line {number}: not valid JSON ({error.msg})") from None
            rows.append(_row(item, f"{name}, line {number}"))
    return rows


def _csv_rows(text: str, name: str, delimiter: str) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        for row in reader:
            where = f"{name}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where}: the number of cells differs from the {len(reader.fieldnames or ())} columns")
            rows.append((where, dict(row)))
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.reader.line_num}: not valid CSV ({error})") from None
    return rows


def _parquet_rows(data: bytes, name: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: not a valid parquet file ({error})") from None
    return [(f"{name}, row {number}", row) for number, row in enumerate(table.to_pylist(), start=1)]


def _convert(
    rows: list[Row], name: str, task: str, format: str, columns: Mapping[str, str], counts: Counter[str]
) -> list[Record]:
    """Turn rows into records, as XL-Sum (which cleans them) or as generic ones."""
    if not rows:
        raise DataError(f"{name} holds no records")
    looks_like_xlsum = set(XLSUM_COLUMNS.values()) <= rows[0][1].keys() and not columns
    if format == "xlsum" or (format == "auto" and task == "summarization" and looks_like_xlsum):
        if task != "summarization":
            raise DataError(f"{name} is XL-Sum data, which fits the task summarization, not {task}")
        rows = [
            (where, {key: _clean(value, counts) if isinstance(value, str) else value for key, value in row.items()})
            for where, row in rows
        ]
        columns = XLSUM_COLUMNS
    has_ids = any(row.get(columns.get("id", "id")) is not None for _, row in rows)
    return [
        _record(row, where, f"{name}:{number}", name, task, columns, has_ids)
        for number, (where, row) in enumerate(rows, start=1)
    ]


def _clean(text: str, counts: Counter[str]) -> str:
    """Map or remove control characters other than newline and tab, and count them."""
    text = text.replace("\r\n", "\n")

    def replacement(match: re.Match[str]) -> str:
        mapped = MAPPED.get(match.group(), "")
        counts["mapped" if mapped else "removed"] += 1
        return mapped

    return CONTROL.sub(replacement, text)


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
            raise DataError(f"{where}: no column {column!r} (columns.{field}); found: {', '.join(map(str, row))}")
    identity = position
    keys = set()
    if has_ids:
        identity = _plain(row.get(columns.get("id", "id")), "id", where)
        keys.add("id:" + identity)
    group = row.get(columns.get("group", "group"))
    if group not in (None, ""):
        keys.add("group:" + _plain(group, "group", where))
    title = row.get(columns.get("title", "title"))
    if task != "completion" and isinstance(title, str) and title.strip():
        keys.add(f"article:{name}#{' '.join(title.split())}")
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
    if references is not None:
        listed = list(references) if isinstance(references, list | tuple) else [references]
        gold = [_text(reference, "references", where) for reference in listed]
    else:
        gold = answers
    if not gold:
        raise DataError(f"{where}: the list of references is empty")
    return Record(identity, inputs, answers[0], tuple(dict.fromkeys(gold)), frozenset(keys), tuple(messages[:-1]))


def _cell(row: dict[str, Any], field: str, where: str, columns: Mapping[str, str], other: str | None = None) -> Any:
    for column in (columns.get(field, field), None if field in columns else other):
        if column is not None and column in row:
            return row[column]
    raise DataError(
        f"{where}: no column {columns.get(field, field)!r}; found: {', '.join(map(str, row))}. "
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
    return [_text(value, field, where)]


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
        _text(message["content"], f"a message of the {message['role']}", where)
    return messages


def _squad_records(content: dict[str, Any], name: str) -> list[Record]:
    records: list[Record] = []
    for number, article in enumerate(content["data"]):
        where = f"{name}, article {number + 1}"
        title = article.get("title") if isinstance(article, dict) else None
        title = " ".join(title.split()) if isinstance(title, str) else ""
        article_key = f"article:{name}#{title or number}"
        for paragraph in _list(article, "paragraphs", where):
            context = _text(paragraph.get("context") if isinstance(paragraph, dict) else None, "context", where)
            for question in _list(paragraph, "qas", where):
                if not isinstance(question, dict) or question.get("id") is None:
                    raise DataError(f"{where}: a question has no id")
                identity = _plain(question["id"], "id", where)
                here = f"{where}, question {identity}"
                answers = [_squad_answer(answer, context, here) for answer in _list(question, "answers", here)]
                if not answers:
                    raise DataError(f"{here}: no answer; questions without an answer are not supported, remove them")
                inputs = {"context": context, "question": _text(question.get("question"), "question", here)}
                keys = frozenset({"id:" + identity, text_key(context), article_key})
                records.append(Record(identity, inputs, answers[0], tuple(dict.fromkeys(answers)), keys))
    if not records:
        raise DataError(f"{name} holds no questions")
    return records


def _squad_answer(answer: Any, context: str, where: str) -> str:
    text = _text(answer.get("text") if isinstance(answer, dict) else None, "answer", where)
    # An answer elsewhere in the context is only a wrong offset, which nothing here uses.
    if text not in context:
        raise DataError(f"{where}: the answer {text!r} does not stand in its context")
    return text


def _list(mapping: Any, key: str, where: str) -> list[Any]:
    value = mapping.get(key) if isinstance(mapping, dict) else None
    if not isinstance(value, list):
        raise DataError(f"{where}: {key} must be a list, found {type(value).__name__}")
    return value


def _plain(value: Any, label: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"{where}: {label} must be a text or a whole number, found {value!r}")
    return str(value)


def _text(value: Any, label: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {label} must be a text, found {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{where}: {label} is empty")
    if SURROGATE.search(value):
        raise DataError(f"{where}: {label} holds half of a surrogate pair, which is no valid text")
    return value
