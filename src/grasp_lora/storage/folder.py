"""One writer for a folder, by a lock that goes with its process even when that is killed; new folders, whole or not at all."""

import errno
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

from safetensors import SafetensorError

from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.storage.files import clear_write_errors, discard, is_at, sync, sync_all, why_not_written
from grasp_lora.storage.interruption import Interruption
from grasp_lora.storage.processes import is_first

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_FILE = "grasp-lora.lock"
_warned: set[str] = set()
MOMENT = 0.05  # seconds between two looks at what another process holds


class Busy(RecipeError):  # noqa: N818 - a state of the folder, which ends by itself
    """Another process writes there."""


class Workplace:
    """A folder of which this process becomes the only writer, and where the work is when a signal comes.

    Args:
        folder: of an experiment; may be missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = "before it began"
        self.interruption = Interruption(lambda: self.place)
        self.lock = ExitStack()

    def begin(self, *, shared: bool = False) -> None:
        """Make the folder and be its only writer; of several processes the first one is, for all.

        Args:
            shared: be one of those who share the work instead, each step of which has one writer.

        Raises:
            GraspError: the folder cannot be made, or another process writes there.
        """
        make_folder(self.folder)
        self.lock.enter_context(only_writer(self.folder, shared=shared))


@contextmanager
def working_in(folder: Path) -> Iterator[Workplace]:
    """Work in the folder of an experiment; signals and failed writes are one line. `Workplace.begin` comes before any write.

    Raises:
        GraspError: the folder cannot be written.
        Interrupted: SIGTERM or SIGINT came.
    """
    work = Workplace(folder)
    with work.interruption.handled(), clear_write_errors(folder), work.lock:
        yield work


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give the draft of a folder for a result; at the end of the context it appears, whole or not at all.

    Of processes that write the same folder at once one does, and the others are refused. What a killed one left is removed.

    Args:
        output: not there yet, or an empty folder.

    Raises:
        RecipeError: it holds something or cannot be made, or another process writes it.
        GraspError: it cannot be written; nothing was.
        Interrupted: SIGTERM or SIGINT came; nothing was written.
    """
    refuse_existing(output)
    place = _followed(output)
    make_folder(place.parent)
    draft = place.with_name(f".{place.name}.part")
    stop = Interruption(lambda: f"before {output} was complete", "nothing was written")
    try:
        with stop.handled(), only_writer(output, beside=True):
            refuse_existing(output)  # again: another process may have written it
            discard(draft)
            draft.mkdir()
            try:
                if place.exists():  # better to hear now than after hours that it cannot be replaced
                    place.rmdir()
                    place.mkdir()
                yield draft
                sync_all(draft)
                if place.exists():
                    place.rmdir()  # it is empty; not every system renames onto a folder
                draft.rename(place)
                sync(place.parent)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if reason := why_not_written(error, draft, place, _lock_beside(place)):
            raise GraspError(
                f"{output} cannot be written ({reason}); nothing was. Make room or make it writable, or choose another folder "
                "with --output"
            ) from error
        raise


def refuse_existing(output: Path) -> None:
    """Check that a folder for a result is not there yet, or empty, and that it can be written.

    Raises:
        RecipeError: it holds something, is a file, or cannot be written.
    """
    problem = None
    try:
        place = _followed(output)
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            problem = "exists and is not an empty folder"
        elif place.is_symlink():
            problem = "is a symbolic link that leads to itself"
        elif not there.is_dir():
            problem = f"cannot be made ({there.name} is a file)"
        elif not os.access(there, os.W_OK | os.X_OK):
            problem = "cannot be made (no permission)"
    except OSError as error:
        problem = f"cannot be made ({error.strerror})"
    if problem:
        raise RecipeError(f"{output} {problem}; choose another with --output")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        RecipeError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{folder} cannot be made ({error.strerror}); choose another folder with --output") from error


@contextmanager
def only_writer(place: Path, *, beside: bool = False, shared: bool = False) -> Iterator[None]:
    """Be the only process that writes a folder or a file, inside the context.

    The operating system holds the lock, so that of a dead process is free at once; the file names its holder and goes with the
    lock. Of the processes that torchrun started together the first one holds it for all. On NFS it also works between
    machines where the server supports locks.

    Args:
        place: a folder, or with `beside` anything in one.
        beside: whether the lock lies beside the place, which need not be there, and not in it.
        shared: whether others may hold it, too, who ask for it in the same way.

    Raises:
        Busy: another process writes there; the message names it.
        RecipeError: what lies in the lock's place is none.
        OSError: the lock file cannot be written.
    """
    if not is_first():
        yield
        return
    file = _lock_beside(place) if beside else place / LOCK_FILE
    descriptor = _acquire(file, place, shared)
    try:
        holder = {"pid": os.getpid(), "host": platform.node(), "shared": shared}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())
        yield
    finally:
        # Still under the lock, so that nobody can have taken this file; but the folder may be another one by now.
        with suppress(OSError):
            if is_at(descriptor, file) and not (shared and _is_held_by_others(descriptor)):
                file.unlink()
        os.close(descriptor)


@contextmanager
def in_turn(place: Path) -> Iterator[None]:
    """Be the only writer of a folder or a file, after those who write it now; for what takes a moment.

    Raises:
        RecipeError, OSError: as `only_writer`.
    """
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(only_writer(place, beside=True))
                break
            except Busy:
                time.sleep(MOMENT)
        yield


def writer_of(place: Path, *, beside: bool = False) -> str | None:
    """Name the process that holds the lock of `only_writer`, None where nobody does; nothing is written."""
    file = _lock_beside(place) if beside else place / LOCK_FILE
    flags = getattr(os, "O_NOFOLLOW", 0)
    try:
        try:
            descriptor = os.open(file, os.O_RDWR | flags)  # NFS locks no file that is open for reading alone
        except OSError:  # it may not be written, or nothing here may
            descriptor = os.open(file, os.O_RDONLY | flags)
    except OSError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(file)
    except OSError:  # some network file systems lock nothing
        pass
    finally:
        os.close(descriptor)
    return None


def is_shared(place: Path) -> bool:
    """Whether the process that writes a folder shares the work with others who ask for it."""
    with suppress(OSError, ValueError, AttributeError):
        return json.loads((place / LOCK_FILE).read_text(encoding="utf-8")).get("shared") is True
    return False


def _lock_beside(place: Path) -> Path:
    place = _followed(place)
    return place.with_name(f".{place.name}.lock")


def _followed(place: Path) -> Path:
    """Where symbolic links lead; a loop of them stays as it is."""
    return Path(os.path.realpath(place))


def _is_held_by_others(descriptor: int) -> bool:
    """Give up a shared lock for one of our own; False where the last of the others has gone."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _acquire(file: Path, place: Path, shared: bool) -> int:
    while True:
        descriptor = _open(file)
        try:
            _lock(descriptor, file, place, shared)
        except BaseException:
            os.close(descriptor)
            raise
        if is_at(descriptor, file):
            return descriptor
        os.close(descriptor)  # its last holder removed it after we had opened it: take the new one


def _open(file: Path) -> int:
    """Open or make the file of a lock. Its content is replaced, so that no other file may be reached through it."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)  # less the umask
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    else:
        found = os.fstat(descriptor)
        if S_ISREG(found.st_mode) and found.st_nlink < 2 and not file.is_symlink():
            return descriptor
        os.close(descriptor)
    raise RecipeError(f"{file} is a link or no regular file, which grasp-lora never makes of it; remove it")


def _lock(descriptor: int, file: Path, place: Path, shared: bool) -> None:
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(file)
        raise Busy(
            f"{place} is being written by {holder}; wait until that is done, or choose another folder with --output"
        ) from error
    except OSError as error:  # some network file systems lock nothing
        if str(error) in _warned:  # each step has a lock of its own
            return
        _warned.add(str(error))
        logger.warning("%s cannot be locked (%s); make sure that only one run writes there", place, error)


def _holder(file: Path) -> str:
    try:
        holder: Any = json.loads(file.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, TypeError, KeyError):  # it has only just taken the lock
        return "another process"
