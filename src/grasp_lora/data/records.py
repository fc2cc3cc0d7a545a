"""Rows to records: SQuAD data, XL-Sum, Alpaca, ShareGPT, and rows with named columns.

A record is one question with its answer, whatever its file looks like. Texts are cleaned by one rule, and conversations become
messages as chat templates have them. Records that may leak from one split to another get a key that both share.
A layout is a function that makes rows with named columns of other rows, and one row of `LAYOUTS`.
What is wrong with a row is a ValueError; `make_pool` puts the row's place before it.
"""

import ast
import difflib
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from os.path import normpath
from typing import Any

from grasp_lora.data.files import Row, Table
from grasp_lora.data.tasks import TASKS, task_fields
from grasp_lora.errors import DataError
from grasp_lora.storage.reading import reading
from grasp_lora.text.characters import INVISIBLE
from grasp_lora.text.display import escaped, listed, places, quoted

OPTIONAL_COLUMNS = ("id", "group", "title", "references", "messages")
FIELDS = frozenset(OPTIONAL_COLUMNS).union(*((*task.inputs, task.answer) for task in TASKS.values()))
XLSUM_COLUMNS = {"id": "id", "title": "title", "document": "text", "summary": "summary"}
MOST_LABELS = 200  # more are texts, which a model should write
MOST_FAULTS = 10  # that a message names
UNANSWERED = (
    "; give it an answer, or remove it; a recipe can set data.skip_unanswered to true (`init` has --skip-unanswered), which "
    "leaves such rows out and counts them"
)
NEAR = 0.75  # from this share of letters in common on (difflib's ratio): one of four may be another

# What speakers are to chat templates.
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "assistant": "assistant", "system": "system", "developer": "system",
}  # fmt: skip

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
)  # all but newline and tab; halves of surrogate pairs
# What Windows-1252 has in their place, as in XL-Sum's Chinese articles (U+0085 is its "…": as a line break of Unicode it is
# rare), the line ends of old Macs, and page breaks.
_MAPPED = {
    **{chr(code): bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)},
    **{"\r": "\n", "\x0b": " ", "\x0c": " "},
}


class _Letters(dict[int, int | None]):
    """For `str.translate`: leaves out combining marks, punctuation, white space and control characters."""

    def __missing__(self, code: int) -> int | None:
        category = unicodedata.category(chr(code))
        self[code] = None if category[0] in "PZC" or category == "Mn" else code
        return self[code]


_LETTERS = _Letters()
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
        where: its place in its file, for messages to the user.
    """

    id: str
    fields: dict[str, str]
    answer: str
    references: tuple[str, ...]
    keys: frozenset[str]
    messages: tuple[Message, ...] = ()
    where: str = field(default="", compare=False)

    @property
    def marks(self) -> tuple[str, ...]:
        """Hashes that an adapter carries along of its training rows, whatever their file and template.

        First of what it asks. Then of what it may share with a translation, and with others on one text: texts, and ids, groups
        and articles that are no bare numbers, which every file has.
        """
        texts = [*self.fields.values(), *(message["content"] for message in self.messages)]
        shared = [key.partition(":") for key in sorted(self.keys)]
        names = [kind + name for kind, _, name in shared if kind in ("id", "group", "article") and not name.isdigit()]
        return (
            short_hash("\0".join(map(same_letters, texts))),
            *(name for kind, _, name in shared if kind == "near"),
            *map(short_hash, names),
        )


@dataclass(frozen=True)
class Pool:
    """Records that may go to any split, at least one, and what was done to their rows."""

    records: tuple[Record, ...]
    characters_mapped: int = 0  # control characters
    characters_removed: int = 0  # control characters
    unanswerable: int = 0  # rows without an answer
    answers_trimmed: int = 0  # of the white space around them


@dataclass(frozen=True)
class Layout:
    """How rows say what a task needs."""

    name: str = "generic"  # for messages
    task: str | None = None  # the only one it fits; None for any
    marks: frozenset[str] = frozenset()  # columns by which rows of it are known
    columns: Columns | None = None  # where fields and columns differ
    rows: Callable[[Table], Iterator[Row]] | None = None  # makes rows with those columns; None where they have them
    trims: bool = True  # whether white space around answers is removed


def make_pool(
    tables: Iterable[Table], task: str, columns: Columns | None = None, *, skip_unanswered: bool = False
) -> Pool:
    """Turn the tables of one language into one pool; `skip_unanswered` leaves out rows without an answer, and counts them.

    Raises:
        DataError: a table has no rows, a row is malformed or has no answer, or an id stands twice.
    """
    columns = columns or {}
    counts: Counter[str] = Counter()
    records: list[Record] = []
    faults: dict[str, list[str]] = {}  # of what is wrong the rows
    for table in tables:
        layout = find_layout(table, task, columns)
        if layout.task not in (None, task):
            raise DataError(f"{table.name} is {layout.name} data, which fits the task {layout.task}, not {task}")
        renamed, identity = _in_small_letters(table, columns), columns.get("id", "id")
        rows = [
            Row(where, _clean({renamed.get(key, key): part for key, part in values.items()}, identity, counts))
            for where, values in table.rows
        ]
        rows = rows if layout.rows is None else list(layout.rows(replace(table, rows=rows)))
        named = layout.columns or columns
        has_ids = any(not is_blank(row.values.get(named.get("id", "id"))) for row in rows)
        for number, (where, values) in enumerate(rows, start=1):
            record: Record | str | None = None
            try:
                with reading(where):
                    if table.of_cells:
                        _refuse_written_lists(values, named)
                    record = _record(values, task, named, f"{normpath(table.name)}:{number}", has_ids)
            except DataError as error:
                faults.setdefault(str(error).removeprefix(f"{escaped(where)}: "), []).append(where)
                continue
            if isinstance(record, Record):
                record = replace(record, where=where)
                records.append(_trimmed(record, counts) if layout.trims and task != "completion" else record)
            elif skip_unanswered or record is None:
                counts["unanswerable"] += 1
            else:
                faults.setdefault(f"{record}{UNANSWERED}", []).append(where)
    _refuse(faults, _repeated_ids(records))
    return Pool(tuple(records), counts["mapped"], counts["removed"], counts["unanswerable"], counts["answers_trimmed"])


def _refuse(faults: Mapping[str, Sequence[str]], repeated: str | None) -> None:
    """Raise what is wrong with rows, all of it at once: each fault with its rows, the first ten of many."""
    lines = [f"{places(rows)}: {fault}" for fault, rows in faults.items()]
    if repeated:
        lines.append(repeated)
    if len(lines) == 1:
        raise DataError(lines[0])
    if lines:
        rest = len(lines) - MOST_FAULTS
        more = [f"and {rest} more"] if rest > 0 else []
        raise DataError(f"{len(lines)} faults in the data", [*lines[:MOST_FAULTS], *more])


def find_layout(table: Table, task: str | None, columns: Columns | None = None) -> Layout:
    """Return the first layout whose marks are all there; rows with named columns where the user says what these are.

    A layout of another task is not seen in rows that have a field of the task (of any task where it is None).
    """
    if not table.rows:
        raise DataError(f"{table.name} holds no records")
    present = table.rows[0].values.keys()
    wanted = TASKS.values() if task is None else [task_fields(task)]
    plain = any(present & {*fields.inputs, fields.answer} for fields in wanted)
    marked = (layout for layout in LAYOUTS.values() if layout.marks and layout.marks <= present)
    fitting = (layout for layout in marked if not columns and (layout.task == task or not plain))
    return next(fitting, LAYOUTS["records"])


def text_keys(text: str) -> set[str]:
    """Return the grouping keys of a text, by its `same_text`, which names groups, and by its `same_letters`.

    >>> text_keys("a  b\\n") == text_keys("a b"), len(text_keys("a b") & text_keys("A b."))
    (True, 1)
    """
    ways = {"text:": same_text(text), "near:": same_letters(text)}
    return {kind + short_hash(way) for kind, way in ways.items()}


def short_hash(text: str) -> str:
    """Return 16 hexadecimal digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def same_text(text: str) -> str:
    """Return what two writings of one text have in common: Unicode form NFC, one space for white space, no invisible marks."""
    return " ".join(INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())


def same_letters(text: str) -> str:
    """Return what near copies of a text have in common: form NFKC without case, marks, punctuation and white space.

    >>> same_letters("The ﬁrst,  “one”."), same_letters("مُحَمَّد") == same_letters("محمد"), same_letters("?!")
    ('thefirstone', True, '?!')
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded.translate(_LETTERS) or same_text(text)


def same_label(label: str) -> str:
    """Return what two writings of one label have in common: its `same_text`, whatever the case."""
    return same_text(label).casefold()


def check_labels(labels: Iterable[str], where: str) -> tuple[str, ...]:
    """Return labels in the order of the alphabet, each once, if they can be chosen from.

    Messages say `where` they are, such as `data.labels`.
    """
    different = tuple(sorted(set(labels)))
    alike: dict[str, str] = {}
    faults = []
    for label in different:
        if not label.strip() or label != label.strip():
            faults.append(f"the label {quoted(label)} is empty or has white space around it; correct it")
        elif (before := alike.setdefault(same_label(label), label)) != label:
            faults.append(
                f"the labels {quoted(before)} and {quoted(label)} differ in case or white space alone; write them alike"
            )
    if not 2 <= len(different) <= MOST_LABELS:
        faults.append(
            f"{len(different)} labels, first {listed(different[:3])}; a classification has 2 to {MOST_LABELS}. Where they are "
            "texts, take the task completion"
        )
    if faults:
        raise DataError(f"{where}: {'; '.join(faults[:5])}")
    return different


def check_shared(target: Iterable[str], source: Iterable[str]) -> None:
    """Check that source and target have at least one label in common: else nothing is learned of the source.

    Raises:
        DataError: they have none.
    """
    ours, theirs = sorted(set(target)), sorted(set(source))
    if theirs and not {*ours} & {*theirs}:
        raise DataError(
            f"source and target have no label in common: the target has {listed(ours)}, the source {listed(theirs)}; write "
            "labels that mean the same alike"
        )


def close_label(label: str, labels: Iterable[str]) -> str | None:
    """Return the one that is written most alike, None where none is near."""
    return next(iter(difflib.get_close_matches(label, list(labels), 1, NEAR)), None)


def clean_text(text: str, counts: Counter[str]) -> str:
    """Map or remove control characters other than newline and tab, and count them."""

    def replacement(match: re.Match[str]) -> str:
        mapped = _MAPPED.get(match.group(), "")
        counts["mapped" if mapped else "removed"] += 1
        return mapped

    return _CONTROL.sub(replacement, text.replace("\r\n", "\n"))


def _clean(value: Any, identity: str, counts: Counter[str]) -> Any:
    """Clean every text but ids, also in lists and objects."""
    if isinstance(value, Mapping):
        return {key: part if key == identity else _clean(part, identity, counts) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(part, identity, counts) for part in value]
    return clean_text(value, counts) if isinstance(value, str) else value


def _in_small_letters(table: Table, named_columns: Columns) -> dict[str, str]:
    """Columns that are called `ID`, `Group` or `Title`, by their name in small letters; where both are there, none.

    An `ID` that stands twice is no id: it may number articles.
    """
    renamed = {}
    for wanted in {"id", "group", "title"} - set(named_columns):
        free = (name for name in table.columns if name not in named_columns.values())
        called_so = [name for name in free if name.strip().lower() == wanted]
        if len(called_so) != 1:
            continue
        values = [row.values.get(called_so[0]) for row in table.rows]
        unlike = all(isinstance(value, str | int) for value in values) and len(set(values)) == len(values)
        if wanted != "id" or unlike:
            renamed[called_so[0]] = wanted
    return renamed


def _repeated_ids(records: list[Record]) -> str | None:
    rows_of: dict[str, list[str]] = {}
    for record in records:
        rows_of.setdefault(record.id, []).append(record.where)
    twice = {identity: rows for identity, rows in rows_of.items() if len(rows) > 1}
    if not twice:
        return None
    numbers = all(identity.isdigit() for identity in twice)
    shown = [f"{identity} ({' and '.join(twice[identity][:2])})" for identity in list(twice)[:5]]
    return (
        f"{len(twice)} ids stand more than once, first {listed(shown)}; every record needs its own id, and no file may be listed "
        "twice" + ("; where these number the rows of each file, rename the column id" if numbers else "")
    )


def is_blank(value: object) -> bool:
    """Whether an optional cell says nothing."""
    return value is None or (isinstance(value, str) and not value.strip())


def name_of(value: object, label: str) -> str:
    """Return a name, of a text or a whole number."""
    return text_of(str(value) if type(value) is int else value, label)


def text_of(value: object, label: str) -> str:
    """Return a text that the model may read or write."""
    if isinstance(value, str) and value.strip():
        return value
    fault = f"must be a text, found {type(value).__name__}"
    if isinstance(value, str):
        fault = "is empty; fill it in, or remove the row"
    raise ValueError(f"{label} {fault}")


def _record(
    values: Mapping[str, object], task: str, columns: Columns, position: str, has_ids: bool
) -> Record | str | None:
    """Read a row with a column for each field of the task, and optional ones; its id is `position` where the file has none.

    Returns:
        The record; for a row without an answer what it lacks, or None if it says so itself.
    """
    fields, row = task_fields(task), dict(values)

    def cell(field: str) -> object:
        column = columns.get(field, field)
        if column not in row:
            raise ValueError(
                f"no column {quoted(column)}; found: {listed(values)}. Rename the right one; a recipe can also name it: "
                f"columns: {{{field}: NAME}}"
            )
        return row[column]

    row |= {field: cell(field) for field in columns}
    if "answer" not in row and "answers" in row:
        row["answer"] = row["answers"]
    # As SQuAD 2.0 has a question without an answer: an empty list of texts.
    if task == "qa" and isinstance(answer := row.get("answer"), Mapping) and answer.get("text") == []:
        return None
    keys = set()
    # An empty cell is fine, a missing field is not.
    if has_ids and (row.get("id") is None or not is_blank(row["id"])):
        identity = name_of(row.get("id"), "id")
        keys.add("id:" + same_text(identity))
    else:  # where both languages read columns of one file, its rows are translations
        identity = position
        keys.add("row:" + position)
    if not is_blank(group := row.get("group")):
        keys.add("group:" + same_text(name_of(group, "group")))
    title = row.get("title") if task != "completion" or "title" in columns else None
    if isinstance(title, str | int) and not isinstance(title, bool) and not is_blank(title):
        # The same in every file: an article may be spread over several, with spaces or, as in XQuAD, `_`.
        keys.add("article:" + same_letters(str(title)))
    messages = _messages(row, columns.get("messages", "messages")) if task == "completion" else []
    if messages and (messages[-1]["role"] != "assistant" or is_blank(messages[-1]["content"])):
        return f"{columns.get('messages', 'messages')} must end with an assistant message that is not empty"
    if messages:
        inputs: dict[str, str] = {}
        answers = [messages[-1]["content"]]
        keys |= text_keys("\n".join(message["content"] for message in messages[:-1] if message["role"] != "system"))
    else:
        inputs = {field: text_of(cell(field), columns.get(field, field)) for field in fields.inputs}
        answers = _answers(cell(fields.answer), fields.answer)
        if not answers:
            return f"{columns.get(fields.answer, fields.answer)} is empty"
        keys |= text_keys(inputs[fields.document or fields.inputs[0]])
        if task == "translation":  # in a corpus of many languages a reference stands in several pairs
            keys |= text_keys(answers[0])
    gold = answers
    if not is_blank(references := row.get("references")) and references != []:
        several = references if isinstance(references, list | tuple) else [references]
        more = [text_of(reference, "references") for reference in several]
        gold = [*answers, *more] if fields.chooses else more  # the label of the row stands first
    return Record(identity, inputs, answers[0], tuple(dict.fromkeys(gold)), frozenset(keys), tuple(messages[:-1]))


def _answers(value: object, field: str) -> list[str]:
    """Read an answer, or SQuAD's `answers`: a list, or the lists of a hub data set. A label may be a whole number."""
    if is_blank(value):
        return []
    if field != "answer":
        return [name_of(value, field) if field == "label" else text_of(value, field)]
    several = value.get("text") if isinstance(value, Mapping) else value
    several = several if isinstance(several, list) else [several]
    return [text_of(item.get("text") if isinstance(item, Mapping) else item, field) for item in several]


def _trimmed(record: Record, counts: Counter[str]) -> Record:
    """A record without white space around its answer, which would be learned as tokens of its own."""
    answer = record.answer.strip()
    if answer == record.answer:
        return record
    counts["answers_trimmed"] += 1
    references = tuple(answer if text == record.answer else text for text in record.references)
    return replace(record, answer=answer, references=tuple(dict.fromkeys(references)))


def _refuse_written_lists(values: Mapping[str, object], columns: Columns) -> None:
    """Refuse texts in a list, or an object, that a table of cells holds as one text, such as pandas writes them."""
    for column in (columns.get("answer", "answer"), "answers", columns.get("references", "references")):
        text = values.get(column)
        if isinstance(text, str) and text.lstrip().startswith(("{", "[")) and _is_list(text.strip()):
            raise ValueError(
                f"{column} is a list that was written as text, {quoted(text)}; give one text in a cell, or JSONL"
            )


def _is_list(text: str) -> bool:
    """Whether a text is a list of texts or an object, as JSON or Python writes them."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            parsed = parse(text)
            parts = parsed if isinstance(parsed, list) else []
            return isinstance(parsed, dict) or any(isinstance(part, str | dict) for part in parts)
    return False


def _alpaca_rows(table: Table) -> Iterator[Row]:
    """Make one prompt of instruction and input, a line break between them; with `system` or `history` a conversation."""
    for where, values in table.rows:
        with reading(where):
            yield Row(where, {**values, **_from_alpaca(values), "system": None})


def _from_alpaca(values: Mapping[str, Any]) -> dict[str, object]:
    """Return `prompt`, or `messages` where there are a system text or turns before it."""
    parts = [text_of(values[part], part) for part in ("instruction", "input") if not is_blank(values.get(part))]
    before, system = values.get("history") or [], values.get("system")
    if isinstance(before, str):
        raise ValueError(f"history is a list that was written as text, {quoted(before)}; give JSONL, or leave it out")
    turns = [] if is_blank(system) else [{"role": "system", "content": system}]
    for question, answer in before:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt, output = "\n".join(parts), values.get("output")
    if turns and prompt:
        last = {"role": "assistant", "content": "" if output is None else output}
        turns += [{"role": "user", "content": prompt}, last]
    return {"prompt": prompt, "messages": turns if prompt and turns else None}


def _messages(values: Mapping[str, Any], column: str) -> list[Message]:
    """Read `messages`, in a column of that name, or prompt and completion that are lists of messages; empty for plain records.

    The last may be no answer, or an empty one; those before it are texts.
    """
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
    messages = [_message(turn) for turn in turns] if isinstance(turns, list) else []
    roles = [message["role"] for message in messages]
    strange = [
        message for message in messages if message["role"] not in SPEAKERS or type(message["content"]) is not str
    ]
    faults = [
        f"{name} is not empty, but prompts are made without it; leave out such rows, or the column {name} where the answers do "
        "not rest on it"
        for name in ("tools", "chat_template_kwargs")
        if not is_blank(value := values.get(name)) and value not in ([], {}, "[]", "{}")
    ]
    if "user" not in roles and not strange:
        faults.append(f"{column} must be a list that ends with an assistant message, and a user's must stand before it")
    if "system" in roles[1:]:
        faults.append(f"{column} has a system message that is not the first; join them there")
    if strange:
        faults.append(
            f"a turn has the role {quoted(strange[0]['role'])} and the content {quoted(strange[0]['content'])}; a content is a "
            f"text, and roles are {', '.join(SPEAKERS)}. Remove rows with other turns, such as those of tools"
        )
    if faults:
        raise ValueError(faults[0])
    for message in messages[:-1]:
        text_of(message["content"], "a message")
    return messages


def _message(turn: Mapping[str, Any]) -> Message:
    """A turn of `role` and `content`, or of `from` and `value`, as a message."""
    speaker, text = (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"])
    return {"role": SPEAKERS.get(speaker, speaker), "content": text}


def _squad_rows(table: Table) -> Iterator[Row]:
    """Make a row of each question in the paragraphs of articles."""
    for number, (where, values) in enumerate(table.rows):
        article: Any = values
        with reading(where):
            title = article.get("title")
            if not isinstance(title, str) or not title.strip():
                title = f"{table.name}#{number}"  # without a title, the article is told by its place
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers: Any = question.get("answers", [])
                    if not answers and question.get("is_impossible") is True:  # SQuAD 2.0
                        answers = {"text": []}
                    facts = {"context": paragraph["context"], "question": question["question"], "title": title}
                    yield Row(
                        f"{where}, question {question['id']}", {"id": question["id"], **facts, "answers": answers}
                    )


# They are looked for in this order; rows that no marks fit have named columns.
LAYOUTS = {
    "squad": Layout("SQuAD", "qa", frozenset({"paragraphs"}), rows=_squad_rows, trims=False),
    "xlsum": Layout("XL-Sum", "summarization", frozenset(XLSUM_COLUMNS.values()), XLSUM_COLUMNS),
    "alpaca": Layout(
        "Alpaca", "completion", frozenset({"instruction", "output"}), {"completion": "output"}, _alpaca_rows
    ),
    "sharegpt": Layout("ShareGPT", "completion", frozenset({"conversations"}), {"messages": "conversations"}),
    "records": Layout(),
}
