"""Reading what strangers wrote: regular files of bounded size, strict JSON of bounded depth.

Python's own `json` takes NaN, of two equal keys the last, and any depth up to a RecursionError; a special file such as a pipe
blocks whoever opens it.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from grasp_lora.errors import DataError, GraspError
from grasp_lora.text.display import CONTROLS, escaped, one_line, quoted

MOST_LEVELS = 64
MOST_NAME = 1024

Read = TypeVar("Read")


class RefusedError(ValueError):
    """Content that is not taken; the message is a reason to be put into an error of the caller's family.

    Args:
        reason: without subject, such as "it is empty".
        line: where in a text, from 1, or None.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def _without_controls(text: str) -> str:
    if CONTROLS.search(text):
        raise ValueError("control characters are not allowed")
    return text


Name = Annotated[str, Field(strict=True, max_length=MOST_NAME), AfterValidator(_without_controls)]


# Of os.path, since those of pathlib raise where a folder on the way is closed.
def is_file(path: Path) -> bool:
    """Tell whether a regular file (links are followed) can be found; what cannot even be looked at is none."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Tell whether a folder (links are followed) can be found; what cannot even be looked at is none."""
    return os.path.isdir(path)  # noqa: PTH112


def is_there(path: Path) -> bool:
    """Tell whether anything is at a place, be it a link to nowhere."""
    return os.path.lexists(path)


def expanded(path: str | Path) -> Path:
    """Put the user's home in the place of `~`; a user that does not exist stays as written, so that nothing is found there."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def read_bounded(file: Path, most: int) -> bytes:
    """Read a whole regular file; links are followed, since caches of the hub are made of them.

    Args:
        file: where.
        most: bytes, >= 1.

    Raises:
        RefusedError: it is missing, a folder, a pipe, a device, larger than allowed, or cannot be read.
    """
    size = check_file(file, most)
    try:
        with file.open("rb") as opened:
            content = opened.read(size + 1)  # not `most`: as much memory as is asked for is set aside
            while size < len(content) <= most and (more := opened.read(len(content))):
                content += more  # the size of some files is stated wrongly, or grows
    except OSError as error:
        raise RefusedError(f"it cannot be read: {error.strerror or error}") from error
    if len(content) > most:
        raise RefusedError(f"it has more than {most} bytes, the most that is allowed")
    return content


def check_file(file: Path, most: int) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        RefusedError: as `read_bounded`.
    """
    try:
        status = file.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise RefusedError(f"it cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if S_ISDIR(status.st_mode):
        raise RefusedError("it is a folder, not a file")
    if not S_ISREG(status.st_mode):
        raise RefusedError("it is no regular file but a pipe, a device or the like")
    if status.st_size > most:
        raise RefusedError(f"it has {status.st_size} bytes; at most {most} are allowed")
    return status.st_size


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def parse_json(text: str) -> Any:
    """Parse JSON as its standard has it: no NaN, no key twice; and no deeper than 64 levels.

    Raises:
        RefusedError: with the line.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RefusedError(f"not valid JSON ({error.msg})", error.lineno) from None
    except RecursionError:
        raise RefusedError(_TOO_DEEP) from None
    except RefusedError:
        raise
    except ValueError as error:  # of int(): more digits than Python turns into a number
        raise RefusedError("not valid JSON for us (a number has thousands of digits)") from error
    # To walk through every value costs as much as parsing, and most texts cannot be so deep.
    if text.count("[") + text.count("{") > MOST_LEVELS and _levels(value) > MOST_LEVELS:
        raise RefusedError(_TOO_DEEP)
    return value


def read_json_object(file: Path, most: int) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        RefusedError: as `read_bounded` and `parse_json`, or it holds something else.
    """
    try:
        content = parse_json(read_bounded(file, most).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RefusedError(f"it is no UTF-8 text ({error.reason} at byte {error.start})") from error
    if not isinstance(content, dict):
        raise RefusedError("it must hold a JSON object")
    return content


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def adapter_of(kind: type[Read]) -> TypeAdapter[Read]:
    """Return pydantic's reader of a type: each takes milliseconds to make, so it is kept."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def validated(kind: type[Read], content: Any) -> Read:
    """Return content, as JSON has it, as a pydantic model or a dataclass.

    Raises:
        RefusedError: a value has the wrong type or is out of range; the first one is named.
    """
    try:
        return adapter_of(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(one_line(str(part))[:80] for part in first["loc"]) or "it"
        if first["type"] == "missing":
            raise RefusedError(f"{key} is missing") from None
        rule = first["msg"].removeprefix("Value error, ").replace("tuple", "list").replace("dictionary", "object")
        raise RefusedError(f"{key} is {quoted(first['input'])}; {rule[0].lower()}{rule[1:]}") from None


@contextmanager
def reading(path: Path | str, kind: type[GraspError] = DataError) -> Iterator[None]:
    """Turn whatever a library raises while it reads a file into one line with the file's name.

    Files are trusted as transformers trusts them: the parsers of JSON, YAML, workbooks and tensors say what is wrong.

    >>> with reading("a.json"):
    ...     json.loads("{")
    Traceback (most recent call last):
    grasp_lora.errors.DataError: a.json: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)

    Args:
        path: where it is, or what the user calls it.
        kind: of the error.

    Raises:
        GraspError: of that kind; one that was raised inside passes as it is.
    """
    try:
        yield
    except (GraspError, MemoryError):
        raise
    except Exception as error:
        raise kind(f"{escaped(str(path))}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return in one line why something could not be read: of a file system its reason, of pydantic the first wrong key."""
    if isinstance(error, OSError):
        return error.strerror or one_line(str(error))
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False)[0]
        return f"{'.'.join(one_line(str(part)) for part in first['loc'])}: {first['msg']}"
    return one_line(str(error))[:300].rstrip(".") or type(error).__name__


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Put a subject, such as the name of a file, before the reason of what is refused in the context."""
    try:
        yield
    except RefusedError as error:
        raise RefusedError(f"{subject}: {error}", error.line) from error


def _levels(value: Any) -> int:
    levels, layer = 0, [value]
    while layer := [part for part in layer if isinstance(part, dict | list)]:
        levels += 1
        if levels > MOST_LEVELS:
            break
        layer = [inner for part in layer for inner in (part.values() if isinstance(part, dict) else part)]
    return levels


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RefusedError(f"not valid JSON for us (the key {quoted(twice)} stands twice)")
    return content


def _no_constant(name: str) -> Any:
    raise RefusedError(f"not valid JSON ({name} is none of its numbers)")


_TOO_DEEP = f"nested deeper than {MOST_LEVELS} levels"
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
