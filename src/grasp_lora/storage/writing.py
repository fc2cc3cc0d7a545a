"""Files that are whole or not there at all, also after a kill or a power cut, and one clear line where none can be written."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from grasp_lora.errors import RecipeError
from grasp_lora.storage.reading import is_folder

# What only a file system says; other OSErrors (a network that is down) count if they name a file inside the folder.
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE}


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file so that at any moment it holds its old content or the new one; a text is written as UTF-8.

    A symbolic link in its place, or in that of its draft, is replaced and never followed.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    draft = file.with_name(file.name + ".part")
    try:
        draft.unlink(missing_ok=True)  # of a process that was killed
        with draft.open("xb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
            if not os.path.samestat(os.fstat(stream.fileno()), draft.lstat()):
                raise FileExistsError(errno.EEXIST, "another process writes it", str(file))
        draft.replace(file)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
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
    how = os.O_RDWR if os.name == "nt" else os.O_RDONLY  # Windows flushes only what may be written
    descriptor = os.open(path, how)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Wait until all that a folder holds, with all names in it, is on the disk."""
    for path in folder.iterdir():
        if path.is_dir():
            sync_all(path)
        else:
            sync(path)
    sync(folder)


def discard(path: Path) -> None:
    """Remove a file or a folder with all it holds, where there is one; of a symbolic link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def clear_write_errors(folder: Path, *places: Path) -> Iterator[None]:
    """Turn an error of the file system that holds a folder into one line; other errors pass.

    Args:
        folder: where it is written; the same command, run again, goes on from what is there.
        places: what is written there, where it is not the whole folder.

    Raises:
        RecipeError: the disk is full or read-only, a file may not be written, or the folder has vanished.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if reason := why_not_written(error, *(places or (folder,))):
            raise cannot_write(folder, reason) from error
        raise


def why_not_written(error: OSError | SafetensorError, *places: Path) -> str | None:
    """The reason that a file system gave for an error, where it concerns one of these files or folders."""
    if isinstance(error, SafetensorError):  # safetensors tells of a full disk in its own way
        return str(error)
    name = error.filename
    inside = isinstance(name, str | os.PathLike) and any(
        Path(name).absolute().is_relative_to(place.absolute()) for place in places
    )
    if error.errno not in _STORAGE and not inside:
        return None
    reason = error.strerror or str(error)
    return reason if inside or name is None else f"{reason}: {name!s}"  # such as a cache on another disk


def cannot_write(folder: Path, reason: str) -> RecipeError:
    """The error to raise when something could not be written into a folder; see `clear_write_errors`."""
    if not is_folder(folder):
        return vanished(folder)
    return RecipeError(
        f"{folder} cannot be written ({reason}); make room or make it writable, then run the same command again: "
        "it goes on from what is there"
    )


def vanished(folder: Path) -> RecipeError:
    """The error to raise when a folder that work had begun in is no longer there."""
    return RecipeError(f"the folder {folder} has vanished: it was removed or moved, or its disk is gone")
