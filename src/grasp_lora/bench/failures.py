"""What a training that diverged leaves behind: a note in its folder of work, so that no process here trains to the same end."""

import logging
from collections.abc import Mapping
from pathlib import Path

from grasp_lora.bench.records import read_record
from grasp_lora.bench.run_folder import Shape
from grasp_lora.errors import DivergedError
from grasp_lora.storage.files import write_json

FAILED = "failed.json"

logger = logging.getLogger(__name__)


class Failure(Shape):
    """Why a step failed, and with which versions, processor or GPU, and threads: with others it may not."""

    step: str
    error: str
    made_with: dict[str, str]


def note_failure(work: Path, step: str, error: DivergedError, made_with: Mapping[str, str]) -> None:
    """Leave the note in a step's folder of work."""
    write_json(work / FAILED, Failure(step=step, error=str(error), made_with=dict(made_with)).to_json())


def failed_before(work: Path, made_with: Mapping[str, str]) -> str | None:
    """Say how a step ended on this kind of machine, None where it is to be tried; the note of another kind goes.

    The words are those of the first time, so that what is made of them is the same.

    Raises:
        RecipeError: the note is damaged.
    """
    note = work / FAILED
    found = read_record(note, Failure)
    if found is not None and found.made_with != made_with:
        note.unlink()
        return None
    if found is not None:
        logger.warning("%s failed here before and is not tried again until %s is removed", found.step, note)
    return None if found is None else found.error
