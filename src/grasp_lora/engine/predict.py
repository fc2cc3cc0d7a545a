"""`grasp-lora predict`: whole prompts, a question or rows of a file, asked as the adapter was trained to be."""

import csv
import io
import json
import logging
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from grasp_lora.data.encode import Encoder, Tally, check_tokenizer, encode_labels, prompt_ids
from grasp_lora.data.files import READERS, Row, Table, read_file
from grasp_lora.data.records import SPEAKERS, XLSUM_COLUMNS, Record, check_labels, clean_text, make_pool
from grasp_lora.data.tasks import ANY_LANGUAGE, TEMPLATES, Template, check_template, fields_of, options_of, task_fields
from grasp_lora.errors import DataError, RecipeError
from grasp_lora.models.adapter_files import Answers, LoadedAdapter, read_adapter
from grasp_lora.models.adapters import attached, check_fits
from grasp_lora.models.backbone import backbone_of
from grasp_lora.models.generation import answer
from grasp_lora.models.model_settings import GenerationSettings
from grasp_lora.recipes.load import backbone_of_run
from grasp_lora.storage.reading import is_file, is_folder, is_there, reading
from grasp_lora.storage.writing import write_whole
from grasp_lora.text.display import SURROGATES, listed, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, object]]
PREDICTION = "prediction"  # the column of the answers, as in the files of a run: rows may have an `answer` already
PLAIN = TEMPLATES["completion"][ANY_LANGUAGE]
# Columns of rows that do not name the fields of a task, the answer aside.
_OTHER_LAYOUTS: dict[str, tuple[set[str], ...]] = {
    "completion": ({"messages"}, {"conversations"}, {"instruction"}),
    "summarization": (set(XLSUM_COLUMNS.values()) - {"summary"},),
}
_NO_ANSWER = "?"  # stands where rows have their answers, which prompts do not hold


@dataclass(frozen=True)
class Asked:
    """An adapter on its backbone, ready to answer.

    Args:
        model, tokenizer: with the adapter in place.
        settings: lengths and stop texts.
        form: how it was trained to be asked.
        chat: whether prompts are put into the chat template.
    """

    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    settings: GenerationSettings
    form: Answers
    chat: bool

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """Answer whole prompts; with `chat` what the user says. A note tells of one that is worded otherwise than in training."""
        template = _templates_of(self.form)[1].prompt
        if self.form.task and not all(_fits(prompt, template) for prompt in prompts):
            logger.warning(
                "the adapter was trained on prompts of the form %s, and a prompt here is of another; "
                "to put a text into that form, give %s",
                quoted(template),
                " and ".join(options_of(template)) or "a file of rows",
            )
        return self._answer(prompt_ids(self.tokenizer, prompts, self.chat))

    def records(self, records: Sequence[Record]) -> list[str]:
        """Answer records: their fields are put into the adapter's own prompt, and conversations are as they are.

        A note tells of texts that are cut.
        """
        tally = Tally()
        ids = self._encoder(any(record.messages for record in records)).ask(records, tally)
        if tally.documents_cut:
            cut, most = tally.documents_cut, self.form.max_document_tokens
            logger.warning("%d of %d texts were cut to %d tokens, as in training", cut, len(records), most)
        return self._answer(ids)

    def _encoder(self, talks: bool = False) -> Encoder:
        task, template = _templates_of(self.form)
        cut = None if talks else self.form.max_document_tokens
        template_of_rows = PLAIN if talks else template
        ends_turns = talks and template.prompt.endswith("\n")  # as in its training
        return Encoder(self.tokenizer, task, template_of_rows, sys.maxsize, cut, self.chat, ends_turns=ends_turns)

    def _answer(self, ids: Sequence[Sequence[int]]) -> list[str]:
        labels = encode_labels(self.form.labels, self._encoder())
        ends = [Encoder(self.tokenizer, "completion", PLAIN, sys.maxsize, chat=True).end] if self.chat else []
        answers = answer(self.model, self.tokenizer, ids, self.settings, ends=ends, labels=labels)
        return [text for text, _ in answers]


@contextmanager
def asking(
    place: str,
    backbone: str | None = None,
    device: str = "auto",
    *,
    max_new_tokens: int | None = None,
    stop: Sequence[str] | None = None,
    chat: bool | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: LoadedAdapter | None = None,
) -> Iterator[Asked]:
    """Put an adapter on its backbone for the length of the context; its answers are greedy.

    Args:
        place: PEFT adapter, a folder or a hub id.
        backbone, revision, trust_remote_code: as in a recipe's `backbone`; None takes the one that the adapter names.
        device: auto, cpu or cuda.
        max_new_tokens, stop, chat: None takes what the adapter was trained with, as it says itself, else 64 tokens, the end of
            the line and plain prompts.
        adapter: what was read from the place, where that was done before.

    Raises:
        GraspError: the adapter does not fit the backbone, a setting is out of range, or the tokenizer has no chat template.
    """
    adapter = adapter or read_adapter(place)
    form = adapter.info.answers or Answers()
    asked = {
        "max_new_tokens": form.max_new_tokens if max_new_tokens is None else max_new_tokens,
        "stop": tuple(form.stop if stop is None else stop),
    }
    with reading("how to answer", RecipeError):
        settings = TypeAdapter(GenerationSettings).validate_python(asked)
    _templates_of(form)
    if form.labels:
        check_labels(form.labels, f"adapter {adapter.name}")
    backbone = backbone or backbone_of_run(place)
    loaded = backbone_of(adapter, backbone, device, revision=revision, trust_remote_code=trust_remote_code)
    check_fits(adapter, loaded)
    in_chat = form.chat_template if chat is None else chat
    if in_chat:
        if adapter.chat_template not in (None, loaded.tokenizer.chat_template):
            loaded.tokenizer.chat_template = adapter.chat_template
            logger.warning(
                "the adapter brings a chat template of its own, so prompts stand in that, not in the backbone's"
            )
        check_tokenizer(loaded.tokenizer, chat=True)
    if chat is not None and adapter.info.answers is not None and chat != form.chat_template:
        logger.warning(
            "the adapter was trained on prompts %s the chat template, and they are put the other way here; leave out %s",
            "in" if form.chat_template else "without",
            "--chat" if chat else "--no-chat",
        )
    with attached(loaded.model, adapter.weights) as model:
        yield Asked(model, loaded.tokenizer, settings, form, in_chat)


def predict_texts(place: str, prompts: Sequence[str], *arguments: Any, **settings: Any) -> list[str]:
    """Answer whole prompts with an adapter.

    Args:
        place: PEFT adapter, a folder or a hub id.
        prompts: as the adapter was trained on them; with `chat` what the user says.
        arguments, settings: of `asking`.

    Raises:
        GraspError: as of `asking`; or a prompt is empty or no text, or there are none.
    """
    _check_texts(
        {f"prompt {number}": text for number, text in enumerate(prompts, start=1)} or {"the list of prompts": ""}
    )
    with asking(place, *arguments, **settings) as asked:
        return asked.texts(prompts)


def predict_question(place: str, texts: Mapping[str, str], *arguments: Any, **settings: Any) -> str:
    """Answer a question, put into the prompt that the adapter was trained with.

    Args:
        place: PEFT adapter, a folder or a hub id.
        texts: field -> text; a single text stands for the only field of a template that has one.
        arguments, settings: of `asking`.

    Raises:
        GraspError: as of `asking`; or the adapter does not say how its prompts are worded, or the fields are not those.
    """
    adapter = read_adapter(place)
    form = adapter.info.answers or Answers()
    task, template = _templates_of(form)
    wanted = fields_of(template.prompt)
    fields = dict(zip(wanted, texts.values(), strict=True)) if len(wanted) == len(texts) == 1 else dict(texts)
    problem = ""
    if form.task is None:
        problem = "does not say how its prompts are worded; give a whole prompt"
    elif set(fields) != set(wanted):
        allowed = options_of(template.prompt)
        fix = " and ".join(allowed) + (" alone" if len(allowed) == 1 else "") or "a file of rows with these columns"
        problem = f"is asked with {listed(map('{{{}}}'.format, wanted))}; give {fix}"
    if problem:
        raise DataError(f"adapter {place} {problem}")
    _check_texts({f"--{name}": text for name, text in texts.items()})
    with asking(place, *arguments, adapter=adapter, **settings) as asked:
        return asked.records([_question(task, fields)])[0]


def predict_typed(place: str, read: Callable[[str], str], *arguments: Any, **settings: Any) -> Iterator[str]:
    """Answer what is typed: the fields of the adapter's prompt are asked for in turn, the last one again after each answer.

    An empty text for the last field goes back to the first one, and an empty first field ends it.

    Args:
        place: PEFT adapter, a folder or a hub id.
        read: name of a field -> its text.
        arguments, settings: of `asking`.

    Raises:
        GraspError: as of `asking`; or a text is no valid one.
    """
    adapter = read_adapter(place)
    task, template = _templates_of(adapter.info.answers or Answers())
    *before, last = fields_of(template.prompt)
    with asking(place, *arguments, adapter=adapter, **settings) as asked:
        while True:
            fields: dict[str, str] = {}
            for name in before:
                fields[name] = read(name)
                if not fields[name].strip():
                    return
            while (text := read(last)).strip():
                _check_texts(fields | {last: text})
                yield asked.records([_question(task, fields | {last: text})])[0]
            if not before:
                return


def predict_rows(
    place: str, file: Path, output: Path | None, *arguments: Any, sheet: str | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Answer every row of a file; the rows may be laid out in any way that a recipe's data may, with answers or without.

    Args:
        place: PEFT adapter, a folder or a hub id.
        file: of rows.
        output: a new file, CSV or JSONL, for the rows with a column `prediction`; None writes nothing.
        sheet: of a workbook; None for the first that is not hidden.
        arguments, settings: of `asking`.

    Returns:
        The id and the prediction of each row.

    Raises:
        GraspError: as of `asking`; or the rows or the output file cannot be used.
    """
    if output is not None:
        _check_output(output)
    adapter = read_adapter(place)
    form = adapter.info.answers or Answers()
    table = read_file(str(file), file, sheet=sheet)
    records = _records(table, form)
    whole = len(table.rows) == len(records) and not any("paragraphs" in row.values for row in table.rows)
    if output is not None and whole and PREDICTION in table.columns:
        raise DataError(
            f"{table.name} has a column {PREDICTION}, which --output would overwrite; rename or remove that column"
        )
    with asking(place, *arguments, adapter=adapter, **settings) as asked:
        answers = asked.records(records)
    predictions = [{"id": record.id, PREDICTION: answer} for record, answer in zip(records, answers, strict=True)]
    if output is not None:
        kept = [row.values for row in table.rows] if whole else [{"id": record.id} for record in records]
        rows = [{**row, PREDICTION: answer} for row, answer in zip(kept, answers, strict=True)]
        with reading(output, RecipeError):
            write_whole(output, _WRITERS[output.suffix.lower()](rows))
    return predictions


def is_rows(text: str) -> bool:
    """Whether a prompt is rather the name of a file, be it of no kind that is read, or of a file of rows that is missing."""
    return "\n" not in text and (is_file(Path(text)) or (Path(text).suffix.lower() in READERS and " " not in text))


def _templates_of(form: Answers) -> tuple[str, Template]:
    """The task and the templates of an adapter, which a stranger may have written."""
    task = form.task or "completion"
    fields = task_fields(task)
    prompt = PLAIN.prompt if form.prompt is None and task == "completion" else form.prompt or ""
    check_template("the adapter's prompt", prompt, fields.inputs)
    return task, Template(prompt, form.completion or "{" + fields.answer + "}")


def _question(task: str, fields: Mapping[str, str]) -> Record:
    """A record without an answer; fields that the adapter's prompt leaves out are empty, and texts clean as those of files."""
    clean = {name: clean_text(text, Counter()) for name, text in fields.items()}
    return Record("the question", dict.fromkeys(task_fields(task).inputs, "") | clean, "", (), frozenset())


def _check_texts(texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        if not text.strip() or SURROGATES.search(text):
            raise DataError(f"{name} is {'no valid text' if text.strip() else 'empty'}; give a text in UTF-8")


def _check_output(output: Path) -> None:
    problem = ""
    if output.suffix.lower() not in _WRITERS:
        problem = f"has no name that ends with {', '.join(_WRITERS)}"
    elif is_there(output) or not is_folder(output.absolute().parent):
        problem = "exists already" if is_there(output) else "lies in a folder that is not there"
    if problem:
        raise RecipeError(f"{output} {problem}; choose another with --output")


def _fits(prompt: str, template: str) -> bool:
    """Whether a prompt could have come of a template: what stands between its fields stands there, in order."""
    parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(template)]
    place = 0
    for literal, _ in parts:
        position = prompt.find(literal, place)
        if position < 0:
            return False
        place = position + len(literal)
    return prompt.startswith(parts[0][0]) and (parts[-1][1] is not None or prompt.endswith(parts[-1][0]))


def _records(table: Table, form: Answers) -> list[Record]:
    """The rows as records, whose answers count for nothing."""
    task = form.task or "completion"
    answer = task_fields(task).answer
    present = {column for row in table.rows for column in row.values}
    columns = {field: column for field, column in form.columns.items() if column in present or field == answer}
    if table.rows and not any(layout <= present for layout in ({"paragraphs"}, *_OTHER_LAYOUTS.get(task, ()))):
        for field in task_fields(task).inputs:
            if not {field, form.columns.get(field, field)} & present:
                name = quoted(form.columns.get(field, field))
                raise DataError(
                    f"{table.name} has no column {name}; found: {listed(sorted(present))}; rename the right one, or take an "
                    "adapter that was trained for such rows"
                )
    alpaca = task == "completion" and "prompt" not in columns
    rows = [Row(where, _with_no_answer(values, columns.get(answer, answer), alpaca)) for where, values in table.rows]
    return list(make_pool([Table(table.name, rows)], task, columns).records)


def _with_no_answer(values: Mapping[str, object], answer: str, alpaca: bool) -> dict[str, object]:
    """A row with a stand-in for its answer, which may be in one of several places.

    Args:
        answer: column of the answer.
        alpaca: whether a column `instruction` makes it a row as Alpaca has it.
    """
    if isinstance(values.get("paragraphs"), list):
        return {**values, "paragraphs": [_with_stand_ins(paragraph) for paragraph in values["paragraphs"]]}  # type: ignore[attr-defined]
    row = {name: value for name, value in values.items() if name not in ("answers", "references")}
    for column in ("messages", "conversations"):
        turns = row.get(column)
        if isinstance(turns, list) and turns:
            last = turns[-1] if isinstance(turns[-1], Mapping) else {}
            answered = SPEAKERS.get(str(last.get("role", last.get("from")))) == "assistant"
            ours = {"role": "assistant", "content": _NO_ANSWER}
            return {**row, column: [*(turns[:-1] if answered else turns), ours]}
    if isinstance(row.get("prompt"), list):
        return {**row, answer: [{"role": "assistant", "content": _NO_ANSWER}]}
    return {**row, answer: _NO_ANSWER} | ({"output": _NO_ANSWER} if alpaca and "instruction" in row else {})


def _with_stand_ins(paragraph: object) -> object:
    """A paragraph of SQuAD whose questions are answered by the first word of their context."""
    context = paragraph.get("context") if isinstance(paragraph, Mapping) else None
    if not isinstance(context, str) or not context.split() or not isinstance(paragraph["qas"], list):  # type: ignore[index]
        return paragraph  # the reader says what is wrong with it
    word = context.split()[0]
    answers = {"answers": [{"text": word, "answer_start": context.index(word)}], "is_impossible": False}
    qas = [{**item, **answers} if isinstance(item, Mapping) else item for item in paragraph["qas"]]  # type: ignore[index]
    return {**paragraph, "qas": qas}  # type: ignore[dict-item]


def _as_csv(rows: Rows) -> bytes:
    """The columns of all rows; lists and objects as JSON texts."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _as_json(cell) if isinstance(cell, list | dict) else cell for name, cell in row.items()})
    return text.getvalue().encode("utf-8-sig")  # without its mark Excel takes UTF-8 for another encoding


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


_WRITERS: dict[str, Callable[[Rows], bytes]] = {
    ".csv": _as_csv,
    ".jsonl": lambda rows: "".join(_as_json(row) + "\n" for row in rows).encode(),
}
