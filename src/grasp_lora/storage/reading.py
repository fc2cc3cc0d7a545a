"""Reading files of others: one way to find out what is there, and one line for whatever a library raises while it reads."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from grasp_lora.errors import DataError, GraspError
from grasp_lora.text.display import escaped, one_line

# Of os.path, since those of pathlib raise where a folder on the way is closed, or a user of `~name` does not exist.
is_file, is_folder, is_there = os.path.isfile, os.path.isdir, os.path.lexists


def expanded(path: str | Path) -> Path:
    """Put the user's home in the place of `~`."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def reading(path: Path | str, kind: type[GraspError] = DataError) -> Iterator[None]:
    """Turn whatever a library raises while it reads a file into one line with the file's name.

    Files are trusted as transformers trusts them: the parsers of JSON, YAML, workbooks and tensors say what is wrong.

    >>> import json
    >>> with reading("a.json"):
    ...     json.loads("{")
    Traceback (most recent call last):
    grasp_lora.errors.DataError: a.json: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)

    Raises:
        GraspError: of the given kind; one that was raised inside passes as it is, and so does a lack of memory.
    """
    try:
        yield
    except (GraspError, MemoryError):
        raise
    except Exception as error:  # parsers raise what they like
        raise kind(f"{escaped(str(path))}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return in one line why something could not be read: of a file system its reason, of pydantic the first wrong key."""
    if isinstance(error, OSError):
        return error.strerror or one_line(str(error))
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False)[0]
        return ": ".join(filter(None, (".".join(one_line(str(part)) for part in first["loc"]), first["msg"])))
    if isinstance(error, KeyError):
        return f"{one_line(str(error))} is missing"
    return one_line(str(error))[:300].rstrip(".") or type(error).__name__
