"""Files that are whole or not there at all, also after a kill or a power cut, and one clear line where none can be written."""

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from grasp_lora.errors import GraspError, RecipeError

# What only a file system says; other OSErrors (a network that is down) count if they name a file inside the folder.
Written = TypeVar("Written")
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE}


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file so that at any moment it holds its old content or the new one.

    Args:
        file: in an existing folder.
        content: text is written as UTF-8.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    draft = file.with_name(file.name + ".part")
    try:
        with draft.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(file)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    sync(file.parent)


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all; the folder is made if missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all; the folder is made if missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows keeps names by itself and cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def clear_write_errors(folder: Path, *, goes_on: bool = True) -> Iterator[None]:
    """Turn an error of the file system that holds a folder into one line; other errors pass.

    Args:
        folder: where it is written.
        goes_on: whether the same command, run again, goes on from what is there.

    Raises:
        GraspError: the disk is full or read-only, a file may not be written, or the folder has vanished.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        inside = isinstance(name, str | os.PathLike) and Path(name).absolute().is_relative_to(folder.absolute())
        if error.errno not in _STORAGE and not inside:
            raise
        raise cannot_write(folder, error.strerror or str(error), goes_on=goes_on) from error
    except SafetensorError as error:  # safetensors tells of a full disk in its own way
        raise cannot_write(folder, str(error), goes_on=goes_on) from error


def refuse_existing(output: Path) -> None:
    """Check that a folder for a result is not there yet, or empty, and that it can be written.

    Raises:
        RecipeError: it holds something, is a file, or cannot be written.
    """
    problem = None
    try:
        there = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            problem = "exists and is not an empty folder"
        elif not there.is_dir():
            problem = f"cannot be made ({there.name} is a file)"
        elif not os.access(there, os.W_OK | os.X_OK):
            problem = "cannot be made (no permission)"
    except OSError as error:
        problem = f"cannot be made ({error.strerror})"
    if problem:
        raise RecipeError(f"{output} {problem}; choose another with --output")


def appear(output: Path, write: Callable[[Path], Written]) -> Written:
    """Let a folder be written beside its place and then appear by a rename, whole or not at all.

    Args:
        output: not there yet, or an empty folder.
        write: fills the draft of the folder that it is given; what it returns is returned.

    Raises:
        GraspError: it cannot be written.
    """
    place = output.resolve()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as scratch:
            draft = Path(scratch) / place.name
            draft.mkdir()
            written = write(draft)
            if place.exists():
                place.rmdir()  # it is empty; not every system renames onto a folder
            draft.rename(place)
    except (OSError, SafetensorError) as error:
        raise GraspError(
            f"{output} cannot be written ({error}); nothing was. Make room or make it writable, or choose another folder "
            "with --output"
        ) from error
    return written


def cannot_write(folder: Path, reason: str, *, goes_on: bool = True) -> GraspError:
    """The error to raise when something could not be written into a folder; see `clear_write_errors`."""
    if goes_on and not folder.is_dir():
        return vanished(folder)
    how = ": it goes on from what is there" if goes_on else " with an empty folder"
    return GraspError(
        f"{folder} cannot be written ({reason}); make room or make it writable, then run the same command again{how}"
    )


def vanished(folder: Path) -> GraspError:
    """The error to raise when a folder that work had begun in is no longer there."""
    return GraspError(f"the folder {folder} has vanished: it was removed or moved, or its disk is gone")
