"""Records of finished steps: what is on record is not done again, on this machine or another.

A record is one small JSON file under a hash of everything that decides the step. Trained adapters lie beside the records; one
that is missing, since the records came from another machine, is trained again only if something rests on it.
"""

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.storage.files import write_json
from grasp_lora.training.settings import TRAINED_AS_MEASURED

VERSION = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One finished step.

    Args:
        step: its name, such as `final 0.40`.
        key: hash of `settings`.
        settings: everything that decides the result, the keys of the steps it rests on included.
        result: what came out: losses, scores, a ratio.
        seconds: wall time, without that of steps which had to be done within this one.
        made_with: versions, processor or GPU, and threads.
        version: of this format.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: str
    key: str
    settings: dict[str, Any]
    result: dict[str, Any]
    seconds: float
    made_with: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def work(self) -> int:
        """What the step cost: forward passes of one example, a training example counted as two."""
        trained = self.result.get("trained_examples", 0)
        measured = self.result.get("measured_examples", len(self.result.get("losses", ())))
        return int(TRAINED_AS_MEASURED * trained + measured)


class Records:
    """A folder of records.

    Args:
        folder: holds `records/` and what else the steps leave; made when the first one ends.
        on_done: told of each record that is used, and whether it was there already.
    """

    def __init__(self, folder: Path, on_done: Callable[[Record, bool], None] | None = None) -> None:
        self.folder = folder
        self._on_done = on_done
        self._known: dict[str, Record] = {}
        self._failed: dict[str, GraspError] = {}
        self._inside = 0.0  # seconds of the steps that were done within the current one

    def check_dtype(self, dtype: str) -> None:
        """Warn where records are there, but none was made in this number format: then none of them counts."""
        made_in: set[str] = set()
        for file in sorted((self.folder / "records").glob("*.json")):
            try:
                made_in.add(str(json.loads(file.read_bytes())["settings"]["dtype"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it is refused by name where it is used
            if dtype in made_in:
                return
        if made_in:
            logger.warning(
                "the records in %s were made in %s, but this machine computes in %s, so none of them counts; "
                "to go on with them set backbone.dtype=%s",
                self.folder,
                " and ".join(sorted(made_in)),
                dtype,
                min(made_in).removeprefix("torch."),
            )

    def get(
        self, step: str, settings: Mapping[str, Any], work: Callable[[str], dict[str, Any]], *, redo: bool = False
    ) -> Record:
        """Return the record of a step; where there is none, do the step first.

        Args:
            step: short name, for people; the first part of the file's name.
            settings: everything that decides the result, as plain JSON values.
            work: does the step, given its key, and returns the result as plain JSON values.
            redo: do the work although it is on record, because an adapter is missing; the record stays.

        Raises:
            RecipeError: a record is damaged.
            GraspError: the step fails, or failed before: it is not tried again.
        """
        key = key_of(step, settings)
        if key in self._failed:
            raise self._failed[key]
        if key in self._known and not redo:
            return self._known[key]
        file = self.folder / "records" / f"{step.replace(' ', '-')}-{key}.json"
        there = file.is_file()
        if there:
            record = _read(file, key)
        if not there or redo:
            started, before = time.perf_counter(), self._inside
            self._inside = 0.0
            try:
                result = work(key)
            except GraspError as error:
                self._failed[key] = error
                self._inside = before + time.perf_counter() - started
                raise
            elapsed = time.perf_counter() - started
            seconds, self._inside = round(elapsed - self._inside, 3), before + elapsed
            if not there:
                record = Record(step, key, dict(settings), result, seconds, _made_with())
                write_json(file, asdict(record))
        self._known[key] = record
        if self._on_done is not None:
            self._on_done(record, there)
        return record


def key_of(step: str, settings: Mapping[str, Any]) -> str:
    """Return the hash under which a step is on record."""
    text = json.dumps([VERSION, step, settings], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environments(records: Iterable[Record]) -> list[dict[str, str]]:
    """Return the different environments that records were made with; seconds of different ones cannot be compared."""
    found: list[dict[str, str]] = []
    for record in records:
        if record.made_with not in found:
            found.append(record.made_with)
    return found


def _read(file: Path, key: str) -> Record:
    try:
        record = TypeAdapter(Record).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise RecipeError(f"record {file} cannot be read; delete it, and its step is done again") from error
    if record.key != key or key_of(record.step, record.settings) != key:
        raise RecipeError(f"record {file} was changed: its settings do not give its key; delete it")
    return record


def _made_with() -> dict[str, str]:
    import torch

    libraries = {name: version(name) for name in ("grasp-lora", "torch", "transformers", "peft")}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        processor: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        device = str(processor.get("cpu_name") or platform.machine())
    return libraries | {
        "python": platform.python_version(),
        "device": device,
        "threads": str(torch.get_num_threads()),
    }
