"""Records become examples: templates are filled in, long documents cut, texts tokenised; one way for chats and plain prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from grasp_lora.data.records import Record
from grasp_lora.data.tasks import ANY_LANGUAGE, TASKS, TEMPLATES, Template
from grasp_lora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = "26 Jul 2024"  # in chat templates that print one: what Llama 3.2's takes where it knows no clock


@dataclass(frozen=True)
class Example:
    """One tokenised example; the model is fed prompt_ids + completion_ids and learns completion_ids.

    Args:
        id: id of the record.
        prompt, completion: texts that were tokenised.
        references: gold answers or summaries, untemplated.
        language: code of its corpus.
        group: name of the component of records that share an id, a text or an article.
        prompt_ids, completion_ids: token ids; completion_ids end with EOS.
    """

    id: str
    prompt: str
    completion: str
    references: tuple[str, ...]
    language: str
    group: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


@dataclass
class Tally:
    """What became of the records of a corpus; the shortest example counts even if too long."""

    read: int = 0
    conversations: int = 0
    characters_mapped: int = 0
    characters_removed: int = 0
    unanswerable: int = 0
    excluded_for_leak: int = 0
    documents_cut: int = 0
    answers_cut_away: int = 0
    too_long: int = 0
    unused: int = 0
    shortest_tokens: int | None = None


def render_chat(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Sequence[Mapping[str, str]]]
) -> list[str]:
    """Return conversations in the tokenizer's chat template, up to where the assistant's answer begins.

    Templates that print the current date (Llama 3.2's, for one) get a fixed one: else prompts would be others tomorrow.
    """
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}" + template
    rendered = tokenizer.apply_chat_template(
        [list(turns) for turns in conversations],  # type: ignore[arg-type]  # mappings are dicts here
        chat_template=template,
        add_generation_prompt=True,
        tokenize=False,
    )
    return cast(list[str], rendered)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], chat: bool = False) -> list[list[int]]:
    """Tokenise prompts that are whole already as the `Encoder` does those that it makes.

    Args:
        prompts: texts; one that begins with the BOS token itself gets no second one.
        chat: put each into the chat template as what the user says.

    Raises:
        DataError: the tokenizer has no chat template, or it refuses a prompt.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise DataError("the tokenizer has no chat template, so prompts can only be plain texts; leave --chat out")
    if chat:
        prompts = _chat_prompts(tokenizer, [[{"role": "user", "content": prompt}] for prompt in prompts], "given")
    bos, eos = tokenizer.bos_token, tokenizer.eos_token_id
    encoded = []
    for prompt in prompts:
        special = not chat and not (bos and prompt.startswith(str(bos)))
        ids: list[int] = tokenizer(prompt, add_special_tokens=special, verbose=False)["input_ids"]
        encoded.append(ids[:-1] if ids and ids[-1] == eos and not chat else ids)
    return encoded


def _chat_prompts(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Sequence[Mapping[str, str]]], what: str
) -> list[str]:
    import jinja2

    try:
        return render_chat(tokenizer, conversations)
    # A template is a program: beside its own refusals it may divide by zero, or take a text for a list.
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise DataError(f"the tokenizer's chat template refuses the {what} data: {error}") from error


@dataclass(frozen=True)
class Encoder:
    """Fills the templates of one language and tokenises, a whole batch in one call of the tokenizer.

    Args:
        tokenizer: with an EOS token, and a chat template where `chat` is set.
        task: a key of TASKS.
        language: code of the corpus.
        template: as `resolve_template` gives it.
        max_tokens: prompt, completion and EOS together.
        max_document_tokens: the task's document is cut to so many tokens; None to cut nothing.
        chat: give the prompt as a user turn.
    """

    tokenizer: "PreTrainedTokenizerBase"
    task: str
    language: str
    template: Template
    max_tokens: int
    max_document_tokens: int | None = None
    chat: bool = False

    def encode(self, records: Sequence["Record"], groups: Sequence[str], tally: Tally) -> list[Example | None]:
        """Tokenise records; None for one that is too long, or whose answer was cut off with its context.

        Raises:
            DataError: a conversation needs a chat template, or the chat template refuses one.
        """
        if not records:
            return []
        task = TASKS[self.task]
        inputs = [record.fields for record in records]
        answer_lost = [False] * len(records)
        if task.document is not None and self.max_document_tokens is not None:
            whole = [fields[task.document] for fields in inputs]
            cut = self._cut(whole, self.max_document_tokens)
            inputs = [{**fields, task.document: text} for fields, text in zip(inputs, cut, strict=True)]
            tally.documents_cut += sum(after != before for before, after in zip(whole, cut, strict=True))
            if self.task == "qa":
                answer_lost = [
                    record.answer in before and record.answer not in after
                    for record, before, after in zip(records, whole, cut, strict=True)
                ]
        prompts = self._prompts(records, inputs)
        completions = [self.template.completion.format(**{task.answer: record.answer}) for record in records]
        eos = self.tokenizer.eos_token_id
        # A chat template writes the special tokens itself.
        prompt_ids = self._tokenize(prompts, add_special_tokens=not self.chat)
        completion_ids = self._tokenize(completions, add_special_tokens=False)
        examples: list[Example | None] = []
        shortest = tally.shortest_tokens
        for i, record in enumerate(records):
            before, after = prompt_ids[i], [*completion_ids[i], eos]
            if before and before[-1] == eos and not self.chat:
                before = before[:-1]
            length = len(before) + len(after)
            shortest = length if shortest is None else min(length, shortest)
            tally.too_long += length > self.max_tokens
            tally.answers_cut_away += answer_lost[i] and length <= self.max_tokens
            if length > self.max_tokens or answer_lost[i]:
                examples.append(None)
                continue
            examples.append(
                Example(
                    record.id,
                    prompts[i],
                    completions[i],
                    record.references,
                    self.language,
                    groups[i],
                    tuple(before),
                    tuple(after),
                )
            )
        tally.shortest_tokens = shortest
        return examples

    def _tokenize(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        # verbose=False: that a text is longer than the model's window is what max_tokens is for.
        return self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def _prompts(self, records: Sequence["Record"], inputs: Sequence[Mapping[str, str]]) -> list[str]:
        conversations = []
        for record, fields in zip(records, inputs, strict=True):
            turns = list(record.messages)
            if turns and self.template.prompt != TEMPLATES["completion"][ANY_LANGUAGE].prompt:
                raise DataError(f"record {record.id} is a conversation, to which no prompt template applies")
            if turns and not self.chat:
                if [turn["role"] for turn in turns] not in (["user"], ["system", "user"]):
                    raise DataError(
                        f"record {record.id} is a conversation of {len(turns)} messages before the answer: "
                        "set chat_template: true, or give plain prompts"
                    )
                turns = [{"role": "user", "content": "\n".join(turn["content"] for turn in turns)}]
            if not turns:
                turns = [{"role": "user", "content": self.template.prompt.format(**fields)}]
            conversations.append(turns)
        if not self.chat:
            return [turns[0]["content"] for turns in conversations]
        return _chat_prompts(self.tokenizer, conversations, self.language)

    def _cut(self, texts: Sequence[str], limit: int) -> list[str]:
        """Cut texts to `limit` tokens, at the border between two tokens."""
        # A token is at least one byte, so a text of fewer bytes needs no look. Contexts recur: once each.
        long = list(dict.fromkeys(text for text in texts if len(text.encode()) > limit))
        if not long:
            return list(texts)
        fast = self.tokenizer.is_fast
        tokens = self.tokenizer(long, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
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
