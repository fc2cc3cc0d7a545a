"""Files of JSON that are read into typed records; one that is damaged is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from grasp_lora.errors import RecipeError
from grasp_lora.storage.reading import adapter_of

_Shape = TypeVar("_Shape")


def read_record(file: Path, shape: type[_Shape]) -> _Shape | None:
    """Read one JSON file of a run folder; None where it is not there.

    Raises:
        RecipeError: it is damaged.
    """
    text = read_text(file)
    return None if text is None else check_shape(adapter_of(shape).validate_json, text, file)


def read_needed(file: Path, shape: type[_Shape], made_by: str = "recipe") -> _Shape:
    """Read one JSON file that has to be there; `made_by` is what to run again where it is not.

    Raises:
        RecipeError: it is missing or damaged.
    """
    found = read_record(file, shape)
    if found is None:
        raise RecipeError(f"{file} is missing; run its {made_by} again")
    return found


def read_lines(file: Path, shape: type[_Shape], growing: bool = False) -> list[_Shape]:
    """Read a file of JSON lines, empty where it is not there; of one that is `growing` an unfinished last line is left out.

    Raises:
        RecipeError: it is damaged.
    """
    # Not splitlines(): it also cuts at U+2028, which JSON allows inside a text.
    lines = (read_text(file) or "").split("\n")
    if growing and not lines[-1].endswith("}"):  # the rows that grow are flat, so only a whole one ends with a brace
        lines.pop()
    read = adapter_of(shape).validate_json
    return [check_shape(read, line, file, f" (line {n})") for n, line in enumerate(lines, start=1) if line.strip()]


def read_text(file: Path) -> str | None:
    """Read a text file of a run folder; None where it is not there.

    Raises:
        RecipeError: it is damaged, or closed to us.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise damaged(file, "it is not UTF-8 text") from error
    except OSError as error:
        raise RecipeError(f"{file} cannot be read ({error.strerror}); make it readable") from error


def check_shape(read: Callable[[Any], _Shape], content: Any, file: Path, where: str = "") -> _Shape:
    """Return the content of a file, read by a pydantic validator.

    Raises:
        RecipeError: it is not of that shape.
    """
    try:
        return read(content)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].replace("Invalid JSON: ", "it is not valid JSON, ")
        place = ".".join(str(part) for part in first["loc"])
        raise damaged(file, f"{place}: {reason.lower()}" if place else reason, where) from error


def damaged(file: Path, reason: str, where: str = "") -> RecipeError:
    """The error to raise for a file that a run cannot have written."""
    return RecipeError(f"{file}{where} is damaged: {reason}. Delete it and run its stage again.")
