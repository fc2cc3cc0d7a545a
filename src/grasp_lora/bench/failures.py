"""What a training that diverged leaves behind: a note in its folder of work, so that no process here trains to the same end."""

from collections.abc import Mapping
from pathlib import Path

from grasp_lora.bench.records import read_record
from grasp_lora.bench.run_folder import Shape
from grasp_lora.errors import DivergedError
from grasp_lora.storage.files import write_json

FAILED = "failed.json"


class Failure(Shape):
    """Why a step failed, and with which versions, processor or GPU, and threads: with others it may not."""

    error: str
    made_with: dict[str, str]


def note_failure(work: Path, error: DivergedError, made_with: Mapping[str, str]) -> None:
    """Leave the note in a step's folder of work."""
    write_json(work / FAILED, Failure(error=str(error), made_with=dict(made_with)).to_json())


def failed_before(work: Path, made_with: Mapping[str, str]) -> str | None:
    """Say how a step ended on this kind of machine, None where it has not failed there.

    Raises:
        RecipeError: the note is damaged.
    """
    found = read_record(work / FAILED, Failure)
    if found is None or found.made_with != made_with:
        return None
    return f"{found.error}; so it ended before, and it is not tried again until {work / FAILED} is removed"
