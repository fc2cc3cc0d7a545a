"""Records become examples: templates are filled in, long documents cut, texts tokenised; one way for chats and plain prompts.

Data is text: what spells a control token in it, such as the end token, is broken after its first character and stays text.
So a row "Say <eos>" with a tokenizer whose end is `<eos>` becomes the tokens of "Say <" and those of "eos>", and no end.
"""

import hashlib
import logging
import re
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any, cast

from grasp_lora.data.files import Row, Table
from grasp_lora.data.groups import join_groups, keys_with_turns
from grasp_lora.data.records import Message, Record, make_pool
from grasp_lora.data.tasks import ANY_LANGUAGE, TASKS, TEMPLATES, Template, resolve_template
from grasp_lora.errors import DataError
from grasp_lora.storage.reading import reading
from grasp_lora.text.display import quoted
from grasp_lora.text.names import without_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DATE = "26 Jul 2024"  # in chat templates that print one: what Llama 3.2's takes where it knows no clock
_BREAK = "\x00"  # which records never hold


@dataclass(frozen=True)
class Example:
    """One tokenised record; the model is fed prompt_ids + completion_ids and learns completion_ids."""

    id: str
    prompt: str
    completion: str
    references: tuple[str, ...]  # gold answers or summaries, untemplated
    group: str  # name of the component of records that share an id, a text or an article
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]  # they end with EOS, or what the chat template ends a turn with
    marks: tuple[str, ...] = ()
    where: str = field(default="", compare=False)

    @property
    def public_id(self) -> str:
        """The id for files that others read: of a path on this machine the last part, and a hash, as others may end alike."""
        file, _, number = self.id.rpartition(":")
        if not number.isdigit() or (name := without_place(file)) == file:
            return self.id
        return f"{name}~{hashlib.sha256(file.encode()).hexdigest()[:6]}:{number}"


@dataclass
class Tally:
    """What became of the records of a corpus; the shortest example counts even if too long."""

    language: str = ""
    read: int = 0
    conversations: int = 0
    characters_mapped: int = 0
    characters_removed: int = 0
    unanswerable: int = 0
    answers_trimmed: int = 0
    excluded_for_leak: int = 0
    control_tokens_kept_as_text: int = 0
    documents_cut: int = 0
    answers_cut_away: int = 0
    too_long: int = 0
    unused: int = 0
    shortest_tokens: int | None = None


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", *, chat: bool) -> None:
    """Check that a tokenizer has an end token, and a chat template where prompts are messages."""
    faults = []
    if tokenizer.eos_token_id is None:
        faults.append("no EOS token, so the model could not learn where an answer ends")
    if chat and not getattr(tokenizer, "chat_template", None):
        faults.append(
            "no chat template, so prompts can only be plain texts, not messages; leave --chat out, in a recipe set "
            "data.chat_template to false, or take a backbone with a chat template"
        )
    if faults:
        raise DataError(f"the tokenizer has {faults[0]}")


def render_chat(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Sequence[Message]], names: Sequence[str]
) -> list[str]:
    """Return conversations in the tokenizer's chat template, up to where the assistant's answer begins.

    Errors call the conversations by their names. The template runs in the sandbox of transformers. One that prints the current
    date (Llama 3.2's, for one) gets a fixed one: else prompts would be others tomorrow.
    """
    check_tokenizer(tokenizer, chat=True)
    prompts = []
    for turns, name in zip(conversations, names, strict=True):
        prompts.append(prompt := _rendered(tokenizer, turns, name))
        first, *rest = turns
        if first["role"] == "system" and "".join(first["content"].split()) not in "".join(prompt.split()):
            # A template may change the text, so it counts as left out only where more of it changes nothing.
            longer = {**first, "content": first["content"] + " And more."}
            if _rendered(tokenizer, [longer, *rest], name) == prompt:
                raise DataError(
                    f"{name}: the tokenizer's chat template leaves out the system message; put its text into the first user turn"
                )
    return prompts


def _rendered(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Message], name: str, answered: bool = False) -> str:
    with reading(f"{name}: the tokenizer's chat template refuses it"):
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}" + template
        return cast(
            str,
            tokenizer.apply_chat_template(
                list(turns), chat_template=template, add_generation_prompt=not answered, tokenize=False
            ),
        )


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token that the chat template writes after an answer of the assistant; the EOS token where it writes none."""
    answer = "an answer of the assistant"
    talk = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        after = _rendered(tokenizer, talk, "a conversation", answered=True).partition(answer)[2].strip()
    except DataError:  # it takes prompts alone
        after = ""
    first = tokenizer(after, add_special_tokens=False)["input_ids"][:1] if after else []
    # What the template writes as ordinary text, such as a line break or the next user's name, ends nothing for sure.
    ends = (int(token) for token in first if token in tokenizer.added_tokens_decoder)
    return next(ends, cast(int, tokenizer.eos_token_id))


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], chat: bool = False) -> list[list[int]]:
    """Tokenise prompts that a person wrote whole, as the `Encoder` does those that it makes.

    Args:
        prompts: texts; control tokens in them are meant, and one that begins with the BOS token gets no second one.
        chat: put each into the chat template as what the user says, which is text.
    """
    if not chat:
        bos = tokenizer.bos_token
        begun = [bool(bos) and prompt.startswith(str(bos)) for prompt in prompts]
        return [_tokenize(tokenizer, [prompt], not begins)[0] for prompt, begins in zip(prompts, begun, strict=True)]
    spelled = control_tokens(tokenizer, chat=True)
    turns = [[{"role": "user", "content": as_text(prompt, spelled)}] for prompt in prompts]
    names = [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    return _tokenize(tokenizer, render_chat(tokenizer, turns, names), add_special_tokens=False)


def control_tokens(tokenizer: "PreTrainedTokenizerBase", chat: bool = False) -> re.Pattern[str]:
    """Return a pattern of all texts that a tokenizer takes for control tokens.

    With `chat`, also of what its chat template writes though it does not call it special, such as the start of a turn.
    """
    template = str(tokenizer.chat_template) if chat else ""
    added = tokenizer.added_tokens_decoder.values()
    control = [
        token.content for token in added if token.special or (token.content.strip() and token.content in template)
    ]
    names = {name for name in (*control, *tokenizer.all_special_tokens) if len(name) > 1}
    return re.compile(_any_of(names) if names else "(?!)")


def _any_of(names: Set[str]) -> str:
    """A pattern that follows letter by letter: a plain `|` of the thousands that some tokenizers have takes seconds."""
    tails: dict[str, set[str]] = {}
    for name in names - {""}:
        tails.setdefault(name[0], set()).add(name[1:])
    if not tails:
        return ""
    branches = "|".join(re.escape(first) + _any_of(rest) for first, rest in sorted(tails.items()))
    return f"(?:{branches}){'?' if '' in names else ''}"


def as_text(text: str, spelled: re.Pattern[str]) -> str:
    """Break what spells a control token, so that `_tokenize` takes it for text; removing `_BREAK` mends it."""
    while spelled.search(text):  # the rest of one may spell another
        text = spelled.sub(lambda match: match.group()[0] + _BREAK + match.group()[1:], text)
    return text


def _tokenize(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    """Tokenise texts in one call, and the further parts of broken ones after them; an EOS token that was added is removed."""
    # The one that the tokenizer adds to any text; what a text spells itself stays.
    added = add_special_tokens and tokenizer(["x"])["input_ids"][0][-1:] == [tokenizer.eos_token_id]
    parts = [text.split(_BREAK) for text in texts]
    # verbose=False: that a text is longer than the model's window is what max_tokens is for.
    firsts: Any = tokenizer([first for first, *_ in parts], verbose=False, add_special_tokens=add_special_tokens)
    tokenized: list[list[int]] = []
    for ids, (_, *rest) in zip(firsts["input_ids"], parts, strict=True):
        others = [tokenizer(part, verbose=False, add_special_tokens=False)["input_ids"] for part in rest]
        tokenized.append([*(ids[:-1] if added else ids), *chain.from_iterable(others)])
    return tokenized


@dataclass(frozen=True)
class Encoder:
    """Fills the templates of one language and tokenises, a whole batch in one call of the tokenizer.

    Args:
        tokenizer: with an EOS token, and a chat template where `chat` is set.
        task: a key of TASKS.
        template: as `resolve_template` gives it.
        max_tokens: prompt, completion and EOS together.
        max_document_tokens: the task's document is cut to so many tokens; None to cut nothing.
        chat: give the prompt as a user turn.
        data_is_text: whether control tokens that the data spells stay text. Else they are control tokens, and without `chat`
            prompt and answer are tokenised together, both as in TRL.
        ends_turns: without `chat`, end every prompt with a line break, as conversations do, among which it stands.
    """

    tokenizer: "PreTrainedTokenizerBase"
    task: str
    template: Template
    max_tokens: int
    max_document_tokens: int | None = None
    chat: bool = False
    data_is_text: bool = True
    ends_turns: bool = False

    def encode(self, records: Sequence[Record], groups: Sequence[str], tally: Tally) -> list[Example | None]:
        """Tokenise records; None for one that is too long, or whose answer was cut off with its context."""
        if not records:
            return []
        answer = TASKS[self.task].answer
        prompts, answer_lost = self._prompts(records, tally)
        completions = [self.template.completion.format(**{answer: self._text(record.answer)}) for record in records]
        if self.data_is_text or self.chat:
            prompt_ids = self._prompt_ids(prompts)
            completion_ids = _tokenize(self.tokenizer, completions, add_special_tokens=False)
        else:
            prompt_ids, completion_ids = self._tokenize_together(prompts, completions)
        examples: list[Example | None] = []
        for i, record in enumerate(records):
            before, after = prompt_ids[i], completion_ids[i]
            ended = not self.data_is_text and after[-1:] == [self.end]  # by a script, whose trainer adds no second one
            after = after if ended else [*after, self.end]
            length = len(before) + len(after)
            too_long = length > self.max_tokens
            tally.shortest_tokens = min(length, tally.shortest_tokens or length)
            tally.too_long += too_long
            tally.answers_cut_away += answer_lost[i] and not too_long
            tally.control_tokens_kept_as_text += _BREAK in prompts[i] + completions[i]
            example = Example(
                id=record.id,
                prompt=prompts[i].replace(_BREAK, ""),
                completion=completions[i].replace(_BREAK, ""),
                references=record.references,
                group=groups[i],
                prompt_ids=tuple(before),
                completion_ids=tuple(after),
                marks=record.marks,
                where=record.where,
            )
            examples.append(None if too_long or answer_lost[i] else example)
        return examples

    def _tokenize_together(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Let each answer begin where prompt and answer together leave the tokens of the prompt alone, since tokens may merge."""
        alone, answers = self._prompt_ids(prompts), _tokenize(self.tokenizer, completions, add_special_tokens=False)
        whole = self._prompt_ids([before + after for before, after in zip(prompts, completions, strict=True)])
        for place, (prompt, both) in enumerate(zip(alone, whole, strict=True)):
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, both, strict=False)))
            if 0 < common < len(both):
                alone[place], answers[place] = both[:common], both[common:]
        return alone, answers

    def ask(self, records: Sequence[Record], tally: Tally) -> list[list[int]]:
        """Return the token ids of the prompts of records, as `encode` makes them; their answers have no part in it.

        The tally says how many documents were cut.
        """
        return self._prompt_ids(self._prompts(records, tally)[0]) if records else []

    @cached_property
    def end(self) -> int:
        """The token that ends an answer."""
        return end_of_turn(self.tokenizer) if self.chat else cast(int, self.tokenizer.eos_token_id)

    @cached_property
    def _spelled(self) -> dict[bool, re.Pattern[str]]:
        return {chat: control_tokens(self.tokenizer, chat) for chat in {False, self.chat}}

    def _text(self, text: str, for_chat: bool = False) -> str:
        """Break control tokens; also the marks of a chat template, but not in answers, whose marks may be meant (`<think>`)."""
        return as_text(text, self._spelled[for_chat]) if self.data_is_text else text

    def _prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        # A chat template writes the special tokens itself, and so may a template of the user's.
        bos = getattr(self.tokenizer, "bos_token", None)
        begun = self.chat or (bool(bos) and self.template.prompt.startswith(str(bos)))
        return _tokenize(self.tokenizer, prompts, add_special_tokens=not begun)

    def _prompts(self, records: Sequence[Record], tally: Tally) -> tuple[list[str], list[bool]]:
        """Write the prompts; also say which records lost their answer with the end of their document."""
        inputs = [{name: self._text(text, self.chat) for name, text in record.fields.items()} for record in records]
        inputs, answer_lost = self._cut_documents(records, inputs, tally)
        conversations = []
        for record, fields in zip(records, inputs, strict=True):
            turns = [
                {key: self._text(text, self.chat and turn["role"] != "assistant") for key, text in turn.items()}
                for turn in record.messages
            ]
            if turns and self.template.prompt != TEMPLATES["completion"][ANY_LANGUAGE].prompt:
                raise DataError(f"{record.where} is a conversation, to which no prompt template applies")
            if turns and not self.chat:  # a line break between turns, the answer's included
                turns = [{"role": "user", "content": "".join(turn["content"] + "\n" for turn in turns)}]
            end = "\n" if self.ends_turns and not self.chat else ""
            conversations.append(turns or [{"role": "user", "content": self.template.prompt.format(**fields) + end}])
        if not self.chat:
            return [turns[0]["content"] for turns in conversations], answer_lost
        return render_chat(self.tokenizer, conversations, [record.where for record in records]), answer_lost

    def _cut_documents(
        self, records: Sequence[Record], inputs: list[dict[str, str]], tally: Tally
    ) -> tuple[list[dict[str, str]], list[bool]]:
        """Cut the documents; also say which records lost their answer."""
        document = TASKS[self.task].document
        if document is None or self.max_document_tokens is None:
            return inputs, [False] * len(records)
        whole = [fields[document] for fields in inputs]
        cut = self._cut(whole, self.max_document_tokens)
        tally.documents_cut += sum(after != before for before, after in zip(whole, cut, strict=True))
        texts = ([text.replace(_BREAK, "") for text in part] for part in (whole, cut))
        lost = [
            self.task == "qa" and record.answer in before and record.answer not in after
            for record, before, after in zip(records, *texts, strict=True)
        ]
        return [{**fields, document: text} for fields, text in zip(inputs, cut, strict=True)], lost

    def _cut(self, texts: Sequence[str], limit: int) -> list[str]:
        """Cut texts to `limit` tokens, at the border between two tokens."""
        # A token is at least one byte, so a text of fewer bytes needs no look. Contexts recur: once each.
        long = list(dict.fromkeys(text for text in texts if len(text.encode()) > limit))
        if not long:
            return list(texts)
        fast = self.tokenizer.is_fast
        tokens: Any = self.tokenizer(long, verbose=False, add_special_tokens=False, return_offsets_mapping=fast)
        shortened = {}
        for i, text in enumerate(long):
            ids = tokens["input_ids"][i]
            if len(ids) > limit and fast:
                # Up to where the first dropped token starts, so that no half of a character stays.
                shortened[text] = text[: tokens["offset_mapping"][i][limit][0]].rstrip()
            elif len(ids) > limit:
                decoded = cast(str, self.tokenizer.decode(ids[:limit], clean_up_tokenization_spaces=False))
                shortened[text] = decoded.rstrip("\ufffd").rstrip()
        return [shortened.get(text, text) for text in texts]


def encode_rows(rows: Sequence[Mapping[str, object]], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """Tokenise rows in TRL's convention, for one's own script beside an SFTTrainer.

    Args:
        rows: each with `prompt` and `completion`, as texts or as lists of messages, or with `messages` that end with
            the assistant's answer; an `id` may be given and is "row 0", "row 1", ... where it is not. Messages go
            through the tokenizer's chat template; texts are taken as they are, control tokens in them too, but for control
            characters and the line ends of Windows, which are cleaned as in files: TRL keeps them. No row is too long. Prompt
            and completion are tokenised together where they are texts. Of messages the answer counts up to the token that ends
            its turn; TRL also trains on what a template writes after that, or before the answer, such as `<think>`.
        tokenizer: with an EOS token.

    Returns:
        One example a row, each in a group by its own text: what a trainer and a probe set need.

    Raises:
        DataError: there are no rows, one is malformed (the message names it), or the tokenizer does not fit.
    """
    check_tokenizer(tokenizer, chat=False)
    identified: list[Row] = []
    for number, item in enumerate(rows):
        with reading(where := f"row {number}"):
            values = {**item}
        identified.append(Row(where, values if values.get("id") is not None else {**values, "id": where}))
    # Columns that are named, if only that of the id, are taken as they are: no row is of Alpaca here.
    pool = make_pool([Table("the list of rows", identified)], "completion", {"id": "id"})
    groups = join_groups(keys_with_turns(pool.records))
    template = resolve_template("completion", ANY_LANGUAGE)
    plain = Encoder(tokenizer, "completion", template, max_tokens=sys.maxsize, data_is_text=False)
    examples: dict[str, Example | None] = {}
    for encoder in (plain, replace(plain, chat=True)):
        records = [record for record in pool.records if bool(record.messages) == encoder.chat]
        names = [groups[next(iter(record.keys))] for record in records]
        examples |= zip((record.id for record in records), encoder.encode(records, names, Tally()), strict=True)
    # Nothing is cut and nothing is too long, so there is one for each.
    return [example for record in pool.records if (example := examples[record.id]) is not None]


def encoding_of(tokenizer: Any) -> tuple[object, object]:
    """What decides how rows are encoded and may be changed on a tokenizer, or on that of a processor: end token and template."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "chat_template", None)


def check_encoding(encoding: tuple[object, object] | None, trained_by: Any) -> None:
    """Check that a trainer's tokenizer, or processor, encodes as rows were encoded; TRL may change it as it makes the trainer.

    Nothing is checked where one of the two is None.
    """
    if encoding is None or trained_by is None:
        return
    names = ("EOS token", "chat template")
    pairs = zip(names, encoding, encoding_of(trained_by), strict=True)
    if changed := [name for name, before, now in pairs if before != now]:
        raise DataError(
            f"the trainer's tokenizer has another {' and another '.join(changed)} than the rows were encoded with; make the "
            "trainer first, and then the controller with trainer.processing_class as its tokenizer"
        )


def encode_labels(labels: Iterable[str], encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """Tokenise labels as the encoder does the answers of examples."""
    records = [Record(label, {"text": label}, label, (label,), frozenset()) for label in labels]
    names = [record.id for record in records]
    examples = replace(encoder, max_tokens=sys.maxsize, max_document_tokens=None).encode(records, names, Tally())
    tokens = {example.id: example.completion_ids for example in examples if example is not None}
    alike: dict[tuple[int, ...], str] = {}
    for label, ids in tokens.items():
        if (before := alike.setdefault(ids, label)) != label:
            raise DataError(
                f"to the backbone's tokenizer the labels {quoted(before)} and {quoted(label)} are the same tokens; rename one"
            )
    return tokens
