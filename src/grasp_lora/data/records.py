"""Rows to records: SQuAD data, XL-Sum, Alpaca, ShareGPT, and rows with named columns.

A record is one question with its answer, whatever its file looks like. Texts are cleaned by one rule, and conversations become
messages as chat templates have them. Records that may leak from one split to another get a key that both share.
A new layout of rows is one function, and one row of `LAYOUTS`.
"""

import ast
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from grasp_lora.data.files import Row, Table
from grasp_lora.data.tasks import TASKS, task_fields
from grasp_lora.errors import DataError
from grasp_lora.text.characters import INVISIBLE
from grasp_lora.text.display import SURROGATES, listed, quoted

OPTIONAL_COLUMNS = ("id", "group", "title", "references", "messages")
FIELDS = frozenset(OPTIONAL_COLUMNS).union(*((*task.inputs, task.answer) for task in TASKS.values()))
XLSUM_COLUMNS = {"id": "id", "title": "title", "document": "text", "summary": "summary"}
MOST_LABELS = 200  # more are texts, which a model should write

# What speakers are to chat templates.
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "assistant": "assistant", "system": "system", "developer": "system",
}  # fmt: skip

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but newline and tab
# What Windows-1252 has in their place, as in XL-Sum's Chinese articles (U+0085 is its "…": as a line break of Unicode it is
# rare), the line ends of old Macs, and page breaks.
_MAPPED = {
    **{chr(code): bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)},
    **{"\r": "\n", "\x0b": " ", "\x0c": " "},
}

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
        table = _in_small_letters(table, columns)
        identity = columns.get("id", "id")
        rows = [
            Row(
                where,
                {key: part if key == identity else _clean(part, identity, counts) for key, part in values.items()},
            )
            for where, values in table.rows
        ]
        for record in layout.convert(replace(table, rows=rows), task, columns, counts):
            if isinstance(record, Record):
                records.append(record)
            elif skip_unanswered:
                counts["unanswerable"] += 1
            else:
                raise DataError(
                    f"{record.where}: {record.what}; give it an answer, or remove it; a recipe can set data.skip_unanswered to "
                    "true (`init` has --skip-unanswered), which leaves such rows out and counts them"
                )
    _check_ids(records)
    if not records and counts["unanswerable"]:
        raise DataError(f"none of the {counts['unanswerable']} questions has an answer; give some that have one")
    return Pool(tuple(records), counts["mapped"], counts["removed"], counts["unanswerable"], counts["answers_trimmed"])


def find_layout(table: Table, task: str | None, format: str = "auto", columns: Columns | None = None) -> Layout:
    """Return the layout that `format` names, or else the first whose columns are all there.

    A layout of another task is not seen in rows that have a field of the task (of any task where it is None).
    """
    if not table.rows:
        raise DataError(f"{table.name} holds no records")
    if format != "auto":
        return LAYOUTS[format]
    present = table.rows[0].values.keys()
    wanted = TASKS.values() if task is None else [task_fields(task)]
    plain = any(present & {*fields.inputs, fields.answer} for fields in wanted)
    special = (layout for layout in LAYOUTS.values() if layout.columns and layout.columns <= present)
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


def same_label(label: str) -> str:
    """Return what two writings of one label have in common: its `same_text`, whatever the case."""
    return same_text(label).casefold()


def check_labels(labels: Iterable[str], where: str) -> tuple[str, ...]:
    """Return labels in the order of the alphabet, if they can be chosen from.

    Args:
        labels: some may stand there more than once.
        where: what they are, for messages, such as `data.labels`.
    """
    different = tuple(sorted(set(labels)))
    alike: dict[str, str] = {}
    for label in different:
        if not label.strip() or label != label.strip():
            raise DataError(f"{where}: the label {quoted(label)} is empty or has white space around it; correct it")
        if (before := alike.setdefault(same_label(label), label)) != label:
            raise DataError(
                f"{where}: the labels {quoted(before)} and {quoted(label)} differ in case or white space alone; write them alike"
            )
    if not 2 <= len(different) <= MOST_LABELS:
        raise DataError(
            f"{where}: {len(different)} labels, first {listed(different[:3])}; a classification has 2 to {MOST_LABELS}. Where "
            "they are texts, take the task completion"
        )
    return different


def clean_text(text: str, counts: Counter[str]) -> str:
    """Map or remove control characters other than newline and tab, and count them."""

    def replacement(match: re.Match[str]) -> str:
        mapped = _MAPPED.get(match.group(), "")
        counts["mapped" if mapped else "removed"] += 1
        return mapped

    return _CONTROL.sub(replacement, text.replace("\r\n", "\n"))


def _clean(value: object, identity: str, counts: Counter[str]) -> object:
    """Clean every text but ids, also in lists and objects."""
    if isinstance(value, Mapping):
        return {key: part if key == identity else _clean(part, identity, counts) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(part, identity, counts) for part in value]
    return clean_text(value, counts) if isinstance(value, str) else value


def _in_small_letters(table: Table, named_columns: Columns) -> Table:
    """Rename columns that are called `ID`, `Group` or `Title`; those that have the very name stay the only ones.

    An `ID` that stands twice is no id: it may number articles.
    """
    renamed = {}
    for field in ("id", "group", "title"):
        called_so = [
            name for name in table.columns if name not in named_columns.values() and name.strip().lower() == field
        ]
        if field in named_columns or len(called_so) != 1 or called_so == [field]:
            continue
        values = [row.values.get(called_so[0]) for row in table.rows]
        unlike = all(isinstance(value, str | int) for value in values) and len(set(values)) == len(values)
        if field != "id" or unlike:
            renamed[called_so[0]] = field
    if not renamed:
        return table
    rows = [Row(where, {renamed.get(key, key): value for key, value in values.items()}) for where, values in table.rows]
    return replace(table, rows=rows)


def _check_ids(records: list[Record]) -> None:
    twice = [identity for identity, count in Counter(record.id for record in records).items() if count > 1]
    if twice:
        numbers = all(identity.isdigit() for identity in twice)
        raise DataError(
            f"{len(twice)} ids stand more than once, first {listed(twice[:5])}; every record needs its own id, "
            "and no file may be listed twice"
            + ("; where these number the rows of each file, rename the column id" if numbers else "")
        )


def is_blank(value: object) -> bool:
    """Whether an optional cell says nothing."""
    return value is None or (isinstance(value, str) and not value.strip())


def name_of(value: object, label: str, where: str) -> str:
    """Return a name, of a text or a whole number."""
    if isinstance(value, bool) or not isinstance(value, str | int) or is_blank(value):
        raise DataError(f"{where}: {label} must be a text or a whole number, found {quoted(value)}")
    return str(value)


def text_of(value: object, label: str, where: str) -> str:
    """Return a text that the model may read or write."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {label} must be a text, found {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{where}: {label} is empty; fill it in, or remove the row")
    if SURROGATES.search(value):
        raise DataError(f"{where}: {label} holds half of a surrogate pair, which is no valid text")
    return value


def _row_records(table: Table, task: str, columns: Columns, counts: Counter[str]) -> Iterator[Record | Unanswered]:
    """Read rows with a column for each field of the task, and optional ones."""
    identity = columns.get("id", "id")
    has_ids = any(not is_blank(values.get(identity)) for _, values in table.rows)
    for number, (where, values) in enumerate(table.rows, start=1):
        for field, column in columns.items():
            if column not in values:
                raise DataError(f"{where}: no column {quoted(column)} (columns.{field}); found: {listed(values)}")
        row = {**values, **{field: values[column] for field, column in columns.items()}}
        if "answer" not in row and "answers" in row:
            row["answer"] = row["answers"]
        # As SQuAD 2.0 on the hub has a question without an answer: an empty list of texts.
        if task == "qa" and isinstance(answer := row.get("answer"), Mapping) and answer.get("text") == []:
            counts["unanswerable"] += 1
            continue
        if table.of_cells:
            _refuse_written_lists(row, where)
        record = _row_record(Row(where, row), task, f"{table.name}:{number}", has_ids, columns)
        yield _trimmed(record, task, counts) if isinstance(record, Record) else record


def _trimmed(record: Record, task: str, counts: Counter[str]) -> Record:
    """A record without white space around its answer, which would be learned as tokens of its own.

    A completion is what the user wants written.
    """
    answer = record.answer.strip()
    if task == "completion" or answer == record.answer:
        return record
    counts["answers_trimmed"] += 1
    references = tuple(answer if text == record.answer else text for text in record.references)
    return replace(record, answer=answer, references=tuple(dict.fromkeys(references)))


def _row_record(row: Row, task: str, position: str, has_ids: bool, columns: Columns) -> Record | Unanswered:
    """Read a row whose columns are called as the fields.

    Args:
        row: where it stands, and its values by field.
        task: a key of TASKS.
        position: its id, where the file has none.
        has_ids: whether the file has.
        columns: what its fields are called there, for messages.
    """
    fields, (where, values) = task_fields(task), row

    def need(field: str) -> object:
        if field not in values:
            raise DataError(
                f"{where}: no column {quoted(columns.get(field, field))}; found: "
                f"{listed(name for name in values if columns.get(name, name) == name)}. "
                f"Rename the right one; a recipe can also name it: columns: {{{field}: NAME}}"
            )
        return values[field]

    keys = set()
    if has_ids and (
        values.get("id") is None or not is_blank(values["id"])
    ):  # an empty cell is fine, a missing field is not
        identity = name_of(values.get("id"), "id", where)
        keys.add("id:" + identity)
    else:  # where both languages read columns of one file, its rows are translations
        identity = position
        keys.add("row:" + position)
    if not is_blank(group := values.get("group")):
        keys.add("group:" + same_text(name_of(group, "group", where)))
    title = values.get("title") if task != "completion" or "title" in columns else None
    if isinstance(title, str | int) and not isinstance(title, bool) and not is_blank(title):
        keys.add(_article(str(title)))
    messages = read_messages(row, columns.get("messages", "messages")) if task == "completion" else []
    if messages and (messages[-1]["role"] != "assistant" or is_blank(messages[-1]["content"])):
        column = columns.get("messages", "messages")
        return Unanswered(where, f"{column} must end with an assistant message that is not empty")
    if messages:
        inputs: dict[str, str] = {}
        answers = [text_of(messages[-1]["content"], "the last assistant message", where)]
        keys.add(text_key("\n".join(message["content"] for message in messages[:-1])))
    else:
        inputs = {field: text_of(need(field), field, where) for field in fields.inputs}
        answer = need(fields.answer)
        if is_blank(answer):
            return Unanswered(where, f"{fields.answer} is empty")
        if fields.chooses and type(answer) is int:  # labels are often numbers; CSV gives them as texts anyhow
            answer = str(answer)
        answers = _answers(answer, where) if fields.answer == "answer" else [text_of(answer, fields.answer, where)]
        if not answers:
            return Unanswered(where, "no answer")
        keys.add(text_key(inputs[fields.document or fields.inputs[0]]))
    gold = answers
    if not is_blank(references := values.get("references")):
        several = references if isinstance(references, list | tuple) else [references]
        gold = [text_of(reference, "references", where) for reference in several]
    if not gold or (fields.chooses and gold != answers):
        reason = "the list of references is empty" if not gold else "references stand beside the one label of the row"
        raise DataError(f"{where}: {reason}; leave out the column references")
    return Record(identity, inputs, answers[0], tuple(dict.fromkeys(gold)), frozenset(keys), tuple(messages[:-1]))


def _answers(value: object, where: str) -> list[str]:
    """Read one answer, or SQuAD's `answers`: a list, or the lists of a hub data set."""
    if not isinstance(value, Mapping | list):
        return [text_of(value, "answer", where)]
    several = value.get("text") if isinstance(value, Mapping) else value
    if not isinstance(several, list):
        raise DataError(f"{where}: no answer in an object; give a text, a list, or an object with a list `text`")
    return [text_of(item.get("text") if isinstance(item, Mapping) else item, "answer", where) for item in several]


def _refuse_written_lists(row: Mapping[str, object], where: str) -> None:
    """Refuse texts in a list, or an object, that a table of cells holds as one text, such as pandas writes them."""
    for field in ("answer", "references"):
        text = row.get(field)
        if not isinstance(text, str) or not text.lstrip().startswith(("{", "[")):
            continue
        for parse in (json.loads, ast.literal_eval):  # as JSON writes them, and as Python does
            try:
                parsed = parse(text.strip())
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(parsed, dict) or (
                isinstance(parsed, list) and any(isinstance(part, str | dict) for part in parsed)
            ):
                raise DataError(
                    f"{where}: {field} is a list that was written as text, {quoted(text)}; give one text in a cell, or JSONL"
                )


def _xlsum_records(table: Table, task: str, columns: Columns, counts: Counter[str]) -> Iterator[Record | Unanswered]:
    return _row_records(table, task, XLSUM_COLUMNS, counts)


def _alpaca_records(table: Table, task: str, columns: Columns, counts: Counter[str]) -> Iterator[Record | Unanswered]:
    """Read instruction and input as one prompt, a line break between them; with `system` or `history` as a conversation."""
    rows = [Row(where, {**values, **_from_alpaca(values, where), "system": None}) for where, values in table.rows]
    return _row_records(replace(table, rows=rows), task, {"completion": "output"}, counts)


def _sharegpt_records(table: Table, task: str, columns: Columns, counts: Counter[str]) -> Iterator[Record | Unanswered]:
    """Read `conversations` of `from` and `value` as messages."""
    return _row_records(table, task, {"messages": "conversations"}, counts)


def _from_alpaca(values: Mapping[str, object], where: str) -> dict[str, object]:
    """Return `prompt`, or `messages` where there are a system text or turns before it."""
    parts = [text_of(values[part], part, where) for part in ("instruction", "input") if not is_blank(values.get(part))]
    before, system = values.get("history"), values.get("system")
    turns: list[object] = [] if is_blank(system) else [{"role": "system", "content": system}]
    for pair in before if isinstance(before, list) else [] if is_blank(before) else [None]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{where}: history must be a list of pairs, of what was said and what was answered")
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    prompt, answer = "\n".join(parts), values.get("output")
    if turns and prompt:
        turns += [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": "" if answer is None else answer},
        ]
    return {"prompt": prompt, "messages": turns if prompt and turns else None}


def read_messages(row: Row, column: str) -> list[Message]:
    """Read `messages`, in a column of that name, or prompt and completion that are lists of messages; empty for plain records.

    The last may be no answer, or an empty one; those before it are texts.
    """
    where, values = row
    turns, system = values.get("messages"), values.get("system")
    if turns is None:
        prompt, completion = values.get("prompt"), values.get("completion")
        if not isinstance(prompt, list) or not isinstance(completion, list):
            return []
        turns = prompt + completion
    if isinstance(turns, list) and isinstance(system, str) and not is_blank(system):  # as ShareGPT has it
        first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
        if system not in (first.get("content"), first.get("value")):  # else it only repeats the first message
            turns = [{"role": "system", "content": system}, *turns]
    for name in ("tools", "chat_template_kwargs"):
        if not is_blank(value := values.get(name)) and value not in ([], {}, "[]", "{}"):
            raise DataError(
                f"{where}: {name} is not empty, but prompts are made without it; leave out such rows, or the column {name} "
                "where the answers do not rest on it"
            )
    messages = [_message(turn, column, where) for turn in (turns if isinstance(turns, list) else [None])]
    roles = [message["role"] for message in messages]
    if roles in ([], ["assistant"], ["system"]):
        raise DataError(f"{where}: {column} must end with an assistant message, and a user's must stand before it")
    if (number := roles.count("system")) > (roles[0] == "system"):
        raise DataError(
            f"{where}: {column} has {number} system messages; one is understood, as the first: join them there"
        )
    for message in messages[:-1]:
        text_of(message["content"], "a message", where)
    return messages


def _message(turn: object, column: str, where: str) -> Message:
    """A turn of `role` and `content`, or of `from` and `value`, as a message."""
    values = turn if isinstance(turn, Mapping) else {}
    speaker, text = (values.get(key) for key in (("from", "value") if "from" in values else ("role", "content")))
    if not isinstance(speaker, str) or not isinstance(text, str):
        raise DataError(
            f"{where}: {column} must be a list of objects with texts `role` and `content` (or `from` and `value`)"
        )
    if speaker not in SPEAKERS:
        raise DataError(
            f"{where}: a turn has the role {quoted(speaker)}; allowed: {', '.join(SPEAKERS)}. Remove rows with other turns, such "
            "as those of tools"
        )
    return {"role": SPEAKERS[speaker], "content": text}


def _squad_records(table: Table, task: str, columns: Columns, counts: Counter[str]) -> Iterator[Record | Unanswered]:
    """Read articles of paragraphs of questions."""
    questions = 0
    for number, (_, article) in enumerate(table.rows):
        where = f"{table.name}, article {number + 1}"
        title = article.get("title")
        # Without a title, the article is told by its place.
        key = _article(title) if isinstance(title, str) and title.strip() else f"article:{table.name}#{number}"
        for paragraph in _objects(article, "paragraphs", where):
            context = text_of(paragraph.get("context"), "context", where)
            for question in _objects(paragraph, "qas", where):
                questions += 1
                identity = name_of(question.get("id"), "the id of a question", where)
                here = f"{where}, question {identity}"
                answers = [
                    text_of(answer.get("text"), "answer", here) for answer in _objects(question, "answers", here)
                ]
                if not answers and question.get("is_impossible") is True:  # SQuAD 2.0
                    counts["unanswerable"] += 1
                    continue
                if not answers:
                    yield Unanswered(here, "no answer")
                    continue
                # An answer elsewhere in the context is only a wrong offset, which nothing here uses.
                if foreign := [answer for answer in answers if answer not in context]:
                    raise DataError(f"{here}: the answer {quoted(foreign[0])} does not stand in its context")
                inputs = {"context": context, "question": text_of(question.get("question"), "question", here)}
                keys = frozenset({"id:" + identity, text_key(context), key})
                yield Record(identity, inputs, answers[0], tuple(dict.fromkeys(answers)), keys)
    if not questions:
        raise DataError(f"{table.name} holds no questions")


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


def _objects(item: Mapping[str, object], key: str, where: str) -> Sequence[Mapping[str, object]]:
    value = item.get(key)
    if not isinstance(value, list) or not all(isinstance(part, Mapping) for part in value):
        raise DataError(
            f"{where}: {key} must be a list of objects, found {quoted(value)}; SQuAD data is an object with a list `data` of "
            "articles"
        )
    return value
