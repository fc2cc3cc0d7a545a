"""Conversations as rows hold them, in messages of role and content as chat templates have them."""

from collections.abc import Mapping

from grasp_lora.data.cells import Cells, is_blank, text_of
from grasp_lora.errors import DataError
from grasp_lora.text.display import quoted

Message = dict[str, str]
# What speakers are to chat templates.
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "assistant": "assistant", "system": "system", "developer": "system",
}  # fmt: skip


def read_messages(cells: Cells) -> list[Message]:
    """Read `messages`, or prompt and completion that are lists of messages; empty for plain records.

    The last may be no answer, or an empty one; those before it are texts.

    Raises:
        DataError: they are no messages, or none stands before the answer, or a system message is not the first, or tools belong
            to them.
    """
    column = cells.columns.get("messages", "messages")
    turns, system = cells.values.get(column), cells.values.get("system")
    if turns is None:
        prompt, completion = cells.get("prompt"), cells.get("completion")
        if not isinstance(prompt, list) or not isinstance(completion, list):
            return []
        turns = prompt + completion
    if isinstance(turns, list) and isinstance(system, str) and not is_blank(system):  # as ShareGPT has it
        first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
        if system not in (first.get("content"), first.get("value")):  # else it only repeats the first message
            turns = [{"role": "system", "content": system}, *turns]
    for name in ("tools", "chat_template_kwargs"):
        if not is_blank(said := cells.values.get(name)) and said not in ([], {}, "[]", "{}"):
            raise DataError(
                f"{cells.where}: {name} is not empty, but prompts are made without it; leave out such rows, or the column {name} "
                "where the answers do not rest on it"
            )
    messages: list[Message] = []
    for given in turns if isinstance(turns, list) else [None]:
        turn = _with_role(given, cells.where)
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise DataError(
                f"{cells.where}: {column} must be a list of objects with texts `role` and `content` (or `from` and `value`)"
            )
        if turn["role"] not in SPEAKERS:
            raise DataError(_unknown(turn["role"], "has the role", cells.where))
        messages.append({"role": SPEAKERS[turn["role"]], "content": turn["content"]})
    if [message["role"] for message in messages] in ([], ["assistant"], ["system"]):
        raise DataError(
            f"{cells.where}: {column} must end with an assistant message, and a user's must stand before it"
        )
    if (number := sum(message["role"] == "system" for message in messages)) > (messages[0]["role"] == "system"):
        raise DataError(
            f"{cells.where}: {column} has {number} system messages; one is understood, as the first: join them there"
        )
    for message in messages[:-1]:
        text_of(message["role"], "the role of a message", cells.where)
        text_of(message["content"], "a message", cells.where)
    return messages


def from_alpaca(values: Mapping[str, object], where: str) -> dict[str, object]:
    """Return `prompt`, or `messages` where there are a system text or turns before it, of a row as Alpaca has it.

    Raises:
        DataError: instruction or input is no text, or the history is no list of pairs.
    """
    said = [text_of(values[part], part, where) for part in ("instruction", "input") if not is_blank(values.get(part))]
    before, system = values.get("history"), values.get("system")
    turns: list[object] = [] if is_blank(system) else [{"role": "system", "content": system}]
    for pair in before if isinstance(before, list) else [] if is_blank(before) else [None]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{where}: history must be a list of pairs, of what was said and what was answered")
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    prompt, answer = "\n".join(said), values.get("output")
    if turns and prompt:
        turns += [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": "" if answer is None else answer},
        ]
    return {"prompt": prompt, "messages": turns if prompt and turns else None}


def _with_role(turn: object, where: str) -> object:
    """Return a turn of `from` and `value` as a message; what is none of these stays."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    role = SPEAKERS.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise DataError(_unknown(turn["from"], "is from", where))
    return {"role": role, "content": turn.get("value")}


def _unknown(speaker: object, verb: str, where: str) -> str:
    return (
        f"{where}: a turn {verb} {quoted(speaker)}; allowed: {', '.join(SPEAKERS)}. Remove rows with other turns, such as those "
        "of tools"
    )
