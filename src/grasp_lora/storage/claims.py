"""One writer at a time for a step, a file or a folder, and new folders that appear whole or not at all.

A claim is a lock file that the operating system frees with its process, even a killed one (`filelock`). It serves alike
two commands in one folder, several commands that share the steps of a comparison, and the workers of a Ray cluster:

    with claim(store / "work" / key, wait=False):   # Busy: another process is at this step, take the next one
        ...

The file system has to lock files (`flock`), as local disks and NFS 4 do.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from grasp_lora.errors import RecipeError
from grasp_lora.storage.processes import Interruption, is_first
from grasp_lora.storage.reading import is_folder, is_there, reading
from grasp_lora.storage.writing import clear_write_errors, discard, sync, sync_all

LOCK_FILE = "grasp-lora.lock"


class Busy(RecipeError):  # noqa: N818 - a state of the folder, which ends by itself
    """Another process writes there."""


@contextmanager
def claim(path: Path, *, wait: bool, inside: bool = False) -> Iterator[None]:
    """Be the only process that writes a file or a folder, inside the context.

    Of the processes that torchrun started together the first one holds the claim for all. The lock file goes with the claim; what
    a killed process leaves of it holds nobody up.

    Args:
        path: what is written; it need not be there, but the folder that holds it does.
        wait: whether to wait for another process, for what takes a moment.
        inside: whether `path` is a folder that is there and holds the lock file itself.

    Raises:
        Busy: another process writes there, and `wait` is False.
        OSError: the lock file cannot be written, or the file system locks nothing.
    """
    if not is_first():
        yield
        return
    lock = FileLock(path / LOCK_FILE if inside else _beside(path, "lock"), fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait)
    except Timeout as error:
        raise Busy(
            f"{path} is being written by another process; wait until that is done, or choose another folder with --output"
        ) from error
    try:
        yield
    finally:
        # Before the release: one that has waited for this very file sees that it is gone, and makes another.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def remove_lock(path: Path) -> None:
    """Remove the lock file that a killed process left beside what is written whole, so that nobody will claim it again."""
    with suppress(OSError):
        _beside(path, "lock").unlink()


class Workplace:
    """The folder of an experiment, of which this process becomes the only writer, and where the work is when a signal comes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = "before it began"
        self.interruption = Interruption(lambda: self.place)
        self.claims = ExitStack()

    def begin(self, *, shared: bool = False) -> None:
        """Make the folder and be its only writer; of several processes the first one is, for all.

        With `shared` be one of those who share the work, each step of which has one writer.

        Raises:
            GraspError: the folder cannot be made, it holds a link, or another process writes there.
        """
        make_folder(self.folder)
        refuse_links(self.folder)
        if not shared:
            self.claims.enter_context(claim(self.folder, wait=False, inside=True))


@contextmanager
def working_in(folder: Path) -> Iterator[Workplace]:
    """Work in the folder of an experiment; signals and failed writes are one line. `Workplace.begin` comes before any write.

    Raises:
        GraspError: the folder cannot be written.
        Interrupted: SIGTERM or SIGINT came.
    """
    work = Workplace(folder)
    with work.interruption.handled(), clear_write_errors(folder), work.claims:
        yield work


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give the draft of a folder for a result; at the end of the context it appears, whole or not at all.

    Of processes that write the same folder at once one does, and the others are refused. What a killed one left is removed.

    Raises:
        RecipeError: it holds something or cannot be made or written, or another process writes it.
        Interrupted: SIGTERM or SIGINT came; nothing was written.
    """
    refuse_existing(output)
    place = Path(os.path.realpath(output))
    make_folder(place.parent)
    draft = _beside(output, "part")
    stop = Interruption(lambda: f"before {output} was complete", "nothing was written")
    lock = _beside(output, "lock")
    with clear_write_errors(place.parent, draft, place, lock), stop.handled(), claim(output, wait=False):
        refuse_existing(output)  # again: another process may have written it
        discard(draft)
        draft.mkdir()
        try:
            yield draft
            sync_all(draft)
            if place.exists():
                place.rmdir()  # it is empty; not every system renames onto a folder
            draft.rename(place)
            sync(place.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def refuse_existing(output: Path) -> None:
    """Check that a folder for a result is not there yet, or empty.

    Raises:
        RecipeError: it holds something or is a file.
    """
    place = Path(os.path.realpath(output))
    with reading(output, RecipeError):
        if is_there(place) and (not is_folder(place) or any(place.iterdir())):
            raise RecipeError(f"{output} exists and is not an empty folder; choose another with --output")


def refuse_links(folder: Path) -> None:
    """Check that no file or folder inside is a link: what is written there would land elsewhere. The folder itself may be one.

    Raises:
        RecipeError: there is one.
    """
    for inside, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (place := Path(inside, name)).is_symlink():
                raise RecipeError(
                    f"{place} is a link, and an experiment writes only inside its own folder; remove the link, or choose another "
                    "folder with --output"
                )


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        RecipeError: it cannot be made.
    """
    with reading(f"{folder} cannot be made; choose another folder with --output", RecipeError):
        folder.mkdir(parents=True, exist_ok=True)


def _beside(path: Path, ending: str) -> Path:
    """A hidden file or folder beside the place that a path leads to."""
    place = Path(os.path.realpath(path))
    return place.with_name(f".{place.name}.{ending}")
