"""Conversations become prompts by the tokenizer's chat template, which is a program of a stranger.

The sandbox of jinja keeps it from files and from the network, but not from running or growing without end. So it runs in a
forked process with limits of the system, which hold inside a single operation, too, and in any thread.
"""

import json
import logging
import os
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from grasp_lora.errors import DataError
from grasp_lora.text.display import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DATE = "26 Jul 2024"  # in chat templates that print one: what Llama 3.2's takes where it knows no clock
MOST_SECONDS = 5  # of computing, and as much again for each EACH conversations; an ordinary one takes 0.0002
EACH = 250
MOST_MEMORY = 2**30  # bytes beside what the process has already
MOST_ADDED = 10_000  # characters that a template may add to a conversation, on average, beside TIMES its length
TIMES = 10

Conversation = Sequence[Mapping[str, str]]
_ANSWER = "an answer of the assistant"


def render_chat(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Conversation], names: Sequence[str]
) -> list[str]:
    """Return conversations in the tokenizer's chat template, up to where the assistant's answer begins.

    Templates that print the current date (Llama 3.2's, for one) get a fixed one: else prompts would be others tomorrow.
    Where the system cannot fork, there are no limits; where it does not tell the size of a process, none of memory.

    Args:
        tokenizer: with a chat template.
        conversations: turns with `role` and `content`.
        names: of the conversations, for messages.

    Raises:
        DataError: there is no template, or it refuses a conversation, which is named, or leaves out its system message, or does
            not end within the limits.
    """
    check_has_template(tokenizer)
    answers = _rendered(tokenizer, conversations)
    seconds = MOST_SECONDS * (1 + len(conversations) // EACH)
    prompts: list[str] = []
    for answer in _limited(answers, seconds):
        if isinstance(answer, dict):
            name = names[len(prompts)]
            raise DataError(f"{name}: the tokenizer's chat template refuses it: {one_line(answer['reason'])[:300]}")
        prompts.append(answer)
    if len(prompts) < len(conversations):
        raise DataError(
            f"{names[len(prompts)]}: the tokenizer's chat template does not end; it was stopped after {seconds} s of computing, "
            f"or as it took more memory than there is. Take a backbone with another one, or set data.chat_template to false"
        )
    left_out = _left_out(tokenizer, conversations, prompts, seconds)
    if (place := left_out.get("system")) is not None:
        raise DataError(
            f"{names[place]}: the tokenizer's chat template leaves out the system message; put its text into the first user turn"
        )
    if (place := left_out.get("user")) is not None:
        logger.warning(
            "%s: the tokenizer's chat template leaves out a user turn, so the model does not see it; check the template",
            names[place],
        )
    return prompts


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token that the chat template writes after an answer of the assistant; the EOS token where it writes none.

    Args:
        tokenizer: with an EOS token.

    Raises:
        DataError: there is no template.
    """
    check_has_template(tokenizer)
    talk = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    answers = _rendered(tokenizer, [talk], answered=True)
    whole = next(iter(_limited(answers, MOST_SECONDS)), "")
    after = whole.rpartition(_ANSWER)[2].strip() if isinstance(whole, str) and _ANSWER in whole else ""
    first = tokenizer(after, add_special_tokens=False)["input_ids"][:1] if after else []
    # What the template writes as ordinary text, such as a line break or the next user's name, ends nothing for sure.
    found = next((int(token) for token in first if token in tokenizer.added_tokens_decoder), tokenizer.eos_token_id)
    return cast(int, found)


def check_has_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that there is a chat template.

    Raises:
        DataError: there is none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template, so prompts can only be plain texts, not messages; leave --chat out, in a recipe "
            "set data.chat_template to false, or take a backbone with a chat template"
        )


def _rendered(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Conversation], answered: bool = False
) -> Iterator[str | dict[str, str]]:
    """Give the prompts, or conversations that are `answered`, up to the first that the template refuses, and then the reason."""
    room = sum(MOST_ADDED + TIMES * sum(len(turn["content"]) for turn in turns) for turns in conversations)
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}" + template
        for conversation in conversations:
            turns = cast(list[dict[str, str]], conversation)
            prompt = tokenizer.apply_chat_template(
                turns, chat_template=template, add_generation_prompt=not answered, tokenize=False
            )
            room -= len(cast(str, prompt))
            if room < 0:
                raise ValueError(f"it makes them {TIMES} times as long and adds {MOST_ADDED} characters to each")
            yield cast(str, prompt)
    except MemoryError:
        yield {"reason": f"it needs more than {MOST_MEMORY} bytes of memory"}
    # A template is a program: beside its own refusals it may divide by zero, take a text for a list, or never come back.
    except Exception as error:  # noqa: BLE001
        yield {"reason": str(error)[:1000] or type(error).__name__}


def _left_out(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Conversation], prompts: Sequence[str], seconds: int
) -> dict[str, int]:
    """Return the roles, `system` or `user`, of which a turn leaves no trace, and the first conversation of each.

    A template may change a text, so one that does not stand in its prompt counts only if with more text the prompt is the same.
    """
    missing = []
    for place, (turns, prompt) in enumerate(zip(conversations, prompts, strict=True)):
        rendered = "".join(prompt.split())
        for number, turn in enumerate(turns):
            if turn["role"] in ("system", "user") and "".join(turn["content"].split()) not in rendered:
                longer = {**turn, "content": turn["content"] + " And more."}
                missing.append((turn["role"], place, [*turns[:number], longer, *turns[number + 1 :]]))
    again = _limited(_rendered(tokenizer, [turns for *_, turns in missing]), seconds) if missing else []
    found: dict[str, int] = {}
    for (role, place, _), longer_prompt in zip(missing, again, strict=False):  # fewer where it refuses one
        if longer_prompt == prompts[place]:
            found.setdefault(role, place)
    return found


def _limited(answers: Iterator[str | dict[str, str]], seconds: int) -> list[str | dict[str, str]]:
    """Return what a generator gives when a forked process runs it; less where that reaches a limit. Windows has no fork."""
    if not hasattr(os, "fork"):
        return list(answers)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns that other threads may hold locks: the child takes none, and ends without cleaning up.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os.close(reading)  # so that the child ends with its parent
            _limit_process(seconds)
            with os.fdopen(writing, "w", encoding="ascii") as out:
                out.writelines(json.dumps(answer) + "\n" for answer in answers)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading, encoding="ascii") as lines:
            return [json.loads(line) for line in lines if line.endswith("\n")]  # one may be cut off
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _limit_process(seconds: int) -> None:
    import resource

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    limits = {resource.RLIMIT_CPU: seconds}
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        limits[resource.RLIMIT_AS] = int(sizes.read_text().split()[0]) * resource.getpagesize() + MOST_MEMORY
    for kind, most in limits.items():
        allowed = resource.getrlimit(kind)[1]
        least = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        resource.setrlimit(kind, (least, least))
