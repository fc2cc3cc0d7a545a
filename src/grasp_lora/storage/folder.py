"""One writer for a run folder: a lock that its process cannot leave behind, even when it is killed."""

import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from grasp_lora.errors import RecipeError
from grasp_lora.storage.files import clear_write_errors
from grasp_lora.storage.interruption import Interruption
from grasp_lora.storage.processes import is_first

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

LOCK_FILE = "grasp-lora.lock"


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

    def begin(self) -> None:
        """Make the folder and be its only writer; of several processes the first one is, for all.

        Raises:
            GraspError: the folder cannot be made, or another process writes there.
        """
        make_folder(self.folder)
        self.lock.enter_context(only_writer(self.folder))


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
def only_writer(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a run folder, inside the context.

    The operating system holds the lock, so that of a dead process is free at once; the file names its holder and goes with the
    lock. Of the processes that torchrun started together the first one holds it for all. On NFS it also works between
    machines where the server supports locks.

    Args:
        folder: an existing folder.

    Raises:
        RecipeError: another process writes there; the message names it.
        OSError: the lock file cannot be written.
    """
    if not is_first():
        yield
        return
    file = folder / LOCK_FILE
    descriptor = _acquire(file)
    try:
        holder = {"pid": os.getpid(), "host": platform.node()}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())
        yield
    finally:
        # Still under the lock, so that nobody can have taken this file; but the folder may be another one by now.
        with suppress(OSError):
            if _is_at(descriptor, file):
                file.unlink()
        os.close(descriptor)


def _acquire(file: Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, file)
        except BaseException:
            os.close(descriptor)
            raise
        if _is_at(descriptor, file):
            return descriptor
        os.close(descriptor)  # its last holder removed it after we had opened it: take the new one


def _lock(descriptor: int, file: Path) -> None:
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(file)
        raise RecipeError(
            f"{file.parent} is being written by {holder}; wait until that is done, or choose another folder with --output"
        ) from error
    except OSError as error:  # some network file systems lock nothing
        log.warning("%s cannot be locked (%s); make sure that only one run writes there", file.parent, error)


def _holder(file: Path) -> str:
    try:
        holder: Any = json.loads(file.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, TypeError, KeyError):  # it has only just taken the lock
        return "another process"


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
