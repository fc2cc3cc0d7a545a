"""The memory of `run` and `compare` alike: each step is done once, whoever needs it.

A finished step is a record: one small JSON file under its key, a hash of everything that decides it. The adapter that it made
lies beside the records under the same key; one that is missing is made again only if something rests on it. A step under way
has a folder of its own for checkpoints, from which it goes on after a kill, to the same bits.

    records/STEP-KEY.json    what came of a step, its settings, its seconds
    records.jsonl.gz         records of another machine, packed; only read
    backbones.json           what decides the computation in each backbone's config, by its fingerprint
    adapters/KEY/            a PEFT adapter
    answers/KEY.jsonl        answers to the test prompts
    work/KEY/STEP/           a step under way: checkpoints, history, rounds; failed.json beside it where its training diverged
    tensorboard/STEP-KEY/    its curves, where `report_to` names TensorBoard
"""

import gzip
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from grasp_lora.bench.failures import failed_before, note_failure
from grasp_lora.bench.progress import Progress
from grasp_lora.bench.run_folder import RECORDS, WORK
from grasp_lora.errors import DivergedError, GraspError, RecipeError
from grasp_lora.storage.checkpoints import newest_checkpoint, remove_checkpoints, seconds_of
from grasp_lora.storage.claims import Busy, claim, make_folder
from grasp_lora.storage.files import discard, sync, sync_all, write_json
from grasp_lora.storage.processes import Interruption, is_first, on_first_process, world_size
from grasp_lora.training.settings import TRAINED_AS_MEASURED

VERSION = 1
WAIT = 0.5  # seconds between two looks at what other processes do
PACKED, CONFIGS, ADAPTERS, ANSWERS = "records.jsonl.gz", "backbones.json", "adapters", "answers"
WITHOUT_ADAPTER = {"controller"}  # a step that trains, and keeps what it has learned alone
MEASURED_TIME = {"timings"}  # what a result holds besides what was decided by its settings
CURVES, PLACE_OF_CURVES = "tensorboard", "TENSORBOARD_LOGGING_DIR"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One finished step.

    Args:
        step: its name, such as `final 0.40`.
        key: hash of `settings`.
        settings: everything that decides the result, the keys of the steps it rests on included.
        result: what came out: losses, scores, rounds.
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

    @property
    def trains(self) -> bool:
        """Whether the step trained an adapter or ran a controller."""
        return "trained_examples" in self.result


_RECORD = TypeAdapter(Record)


class Store:
    """The steps of one folder. Of several processes that torchrun started the first writes and all get the record.

    Processes that were started by themselves share the steps: whoever comes first does one, and for the others it is `Busy`.

    Args:
        folder: made when the first step ends.
        progress: told of each record that is used, and whether it was there already.
        interruption: what a signal asks for; while a step trains it waits for a checkpoint or the end of the step.
    """

    def __init__(
        self, folder: Path, progress: Progress | None = None, interruption: Interruption | None = None
    ) -> None:
        self.folder = folder
        self.used: list[tuple[Record, bool]] = []  # and whether it was there already, in the order of use
        self._progress = progress or Progress()
        self._interruption = interruption
        self._known: dict[str, Record] = {}
        self._failed: dict[str, GraspError] = {}
        self._inside = 0.0  # seconds of the steps that were done within the current one

    def get(
        self,
        step: str,
        settings: Mapping[str, Any],
        work: Callable[[str, Path], dict[str, Any]],
        *,
        trains: bool = False,
        redo: bool = False,
    ) -> Record:
        """Return the record of a step; where there is none, do the step first.

        Args:
            step: short name, for people; the first part of the file's name.
            settings: everything that decides the result, as plain JSON values.
            work: does the step, given its key and its folder of work, and returns the result as plain JSON values.
            trains: whether the work leaves checkpoints, so that a signal waits for the next one.
            redo: do the work although it is on record, because an adapter is missing; the record stays.

        Raises:
            Busy: another process is at this step, or at one that it needs.
            RecipeError: a record is damaged.
            GraspError: the step fails, or failed before: it is not tried again.
            Interrupted: a signal has stopped it.
        """
        key = key_of(step, settings)
        if key in self._failed:
            raise self._failed[key]
        if key in self._known and not redo:
            return self._known[key]
        record = on_first_process(partial(self._find, step, key))
        there = record is not None
        if record is None or redo:
            make_folder(self.folder / WORK)
            with claim(self.folder / WORK / key, wait=False):
                record = on_first_process(partial(self._find, step, key))  # another process may have done it by now
                there = record is not None and not redo
                if record is None or redo:
                    if said := on_first_process(partial(failed_before, self.folder / WORK / key, made_with())):
                        self._failed[key] = DivergedError(said)
                        raise self._failed[key]
                    with self._interruption.deferred() if trains and self._interruption else nullcontext():
                        done = self._do(step, key, settings, work, record)
                    record = record or done
        self._known[key] = record
        self.used.append((record, there))
        self._progress.record(record, there)
        return record

    def save_adapter(self, key: str, write: Callable[[Path], None]) -> None:
        """Let the first process write an adapter under a key, whole or not at all."""

        def appear() -> None:
            folder, draft = self.adapter_folder(key), self.folder / ADAPTERS / f"{key}.part"
            discard(draft)
            write(draft)
            sync_all(draft)
            discard(folder)
            draft.rename(folder)
            sync(folder.parent)

        on_first_process(appear)

    def adapter_folder(self, key: str) -> Path:
        """Where the adapter of a key lies, if it is on this machine."""
        return self.folder / ADAPTERS / key

    def answers_file(self, key: str) -> Path:
        """Where the answers of a key stand, if they are on this machine."""
        return self.folder / ANSWERS / f"{key}.jsonl"

    def check_dtype(self, dtype: str) -> None:
        """Warn where records are there, but none was made in this number format: then none of them counts."""
        made_in = {str(record.settings.get("dtype")) for record in self._packed.values()}
        for file in sorted((self.folder / RECORDS).glob("*.json")):
            try:
                made_in.add(str(json.loads(file.read_bytes())["settings"]["dtype"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it is refused by name where it is used
            if dtype in made_in:
                return
        if made_in and dtype not in made_in:
            logger.warning(
                "the records in %s were made in %s, but this machine computes in %s, so none of them counts; "
                "to go on with them set backbone.dtype=%s",
                self.folder,
                " and ".join(sorted(made_in)),
                dtype,
                min(made_in).removeprefix("torch."),
            )

    def _do(
        self,
        step: str,
        key: str,
        settings: Mapping[str, Any],
        work: Callable[[str, Path], dict[str, Any]],
        before: Record | None,
    ) -> Record:
        """Do a step and write its record; a record that is there already stays."""
        folder = self.folder / WORK / key / _file_name(step)
        earlier, started, outer = on_first_process(partial(_seconds_so_far, folder)), time.perf_counter(), self._inside
        self._inside = 0.0
        try:
            with _lasting_curves(self.folder / CURVES / f"{_file_name(step)}-{key}"):
                result = work(key, folder)
        except GraspError as error:
            # An error that is known is that of a step within this one. Others may raise another, so none waits for the first.
            if isinstance(error, DivergedError) and error not in self._failed.values() and is_first():
                remove_checkpoints(folder)
                note_failure(folder.parent, step, error, made_with())
            if not isinstance(error, Busy):
                self._failed[key] = error
            self._inside = outer + time.perf_counter() - started
            raise
        elapsed = time.perf_counter() - started
        seconds, self._inside = round(earlier + elapsed - self._inside, 3), outer + elapsed
        made = Record(step, key, dict(settings), result, seconds, made_with())
        if before is not None:
            _warn_of_change(before, made)
        record = before or made
        return on_first_process(partial(self._complete, record, new=before is None))

    def _complete(self, record: Record, *, new: bool) -> Record:
        if new:
            write_json(self._file(record.step, record.key), asdict(record))
        shutil.rmtree(self.folder / WORK / record.key, ignore_errors=True)
        return record

    def on_record(self, step: str, settings: Mapping[str, Any]) -> Record | None:
        """Return the record of a step if there is one; nothing is done or written.

        Raises:
            RecipeError: it is damaged.
        """
        return self._read(step, key_of(step, settings))

    def _read(self, step: str, key: str) -> Record | None:
        file = self._file(step, key)
        return _read(file, key) if file.is_file() else self._packed.get(key)

    def _find(self, step: str, key: str) -> Record | None:
        record, work = self._read(step, key), self.folder / WORK / key
        # A kill may have come after the record was written; but another process may make a lost adapter again, and what one left
        # that was killed at that is gone on from.
        if record and work.exists() and self._file(step, key).is_file() and not self._lacks_adapter(record):
            with suppress(Busy), claim(work, wait=False):
                shutil.rmtree(work, ignore_errors=True)
        return record

    def _lacks_adapter(self, record: Record) -> bool:
        """Whether a step has trained an adapter that is not there."""
        return record.trains and record.step not in WITHOUT_ADAPTER and not self.adapter_folder(record.key).is_dir()

    def _file(self, step: str, key: str) -> Path:
        return self.folder / RECORDS / f"{_file_name(step)}-{key}.json"

    @cached_property
    def _packed(self) -> dict[str, Record]:
        file = self.folder / PACKED
        return {record.key: record for record in read_packed(file)} if file.is_file() else {}


@contextmanager
def _lasting_curves(folder: Path) -> Iterator[None]:
    """Let TensorBoard write where its files outlast a step, whose own folder goes; a place that the user has set stays."""
    before = os.environ.get(PLACE_OF_CURVES)
    if before is None or Path(before).parent == folder.parent:  # that of a step which this one is a part of
        os.environ[PLACE_OF_CURVES] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(PLACE_OF_CURVES, None)
        if before is not None:
            os.environ[PLACE_OF_CURVES] = before


def key_of(step: str, settings: Mapping[str, Any]) -> str:
    """Return the hash under which a step is on record, whoever does it: several processes take the same steps as one."""
    text = json.dumps([VERSION, step, settings], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environments(records: Iterable[Record]) -> list[dict[str, str]]:
    """Return the different environments that records were made with; seconds of different ones cannot be compared."""
    found: list[dict[str, str]] = []
    for record in records:
        if record.made_with not in found:
            found.append(record.made_with)
    return found


def pack(folder: Path, file: Path) -> int:
    """Write all records of a store, those that came packed included, into one file that another store can go on from.

    Returns:
        How many they are.
    """
    packed = read_packed(folder / PACKED) if (folder / PACKED).is_file() else []
    own = [_read(one, one.stem.rpartition("-")[2]) for one in (folder / RECORDS).glob("*.json")]
    records = sorted({record.key: record for record in [*packed, *own]}.values(), key=lambda one: (one.step, one.key))
    lines = "".join(json.dumps(asdict(record), sort_keys=True, ensure_ascii=False) + "\n" for record in records)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(lines.encode(), mtime=0))
    return len(records)


def read_packed(file: Path) -> list[Record]:
    """Read what `pack` wrote.

    Raises:
        RecipeError: the file is damaged.
    """
    try:
        lines = gzip.decompress(file.read_bytes()).decode().split("\n")
        records = [_RECORD.validate_json(line) for line in lines if line]
    except (OSError, EOFError, ValueError) as error:
        raise RecipeError(f"the packed records {file} cannot be read ({error}); copy them again") from error
    if changed := [record.key for record in records if key_of(record.step, record.settings) != record.key]:
        raise RecipeError(
            f"the packed records {file} were changed: {changed[0]} is not the key of its settings; copy them again"
        )
    return records


def _read(file: Path, key: str) -> Record:
    try:
        record = _RECORD.validate_json(file.read_bytes())
    except OSError as error:  # of the disk or its network: the record may be whole
        raise RecipeError(f"record {file} cannot be read ({error.strerror}); try again when it can be") from error
    except ValidationError as error:
        raise RecipeError(f"record {file} is damaged; delete it, and its step is done again") from error
    if record.key != key or key_of(record.step, record.settings) != key:
        raise RecipeError(f"record {file} was changed: its settings do not give its key; delete it")
    return record


def _warn_of_change(record: Record, made: Record) -> None:
    """Say that a step which was done again came out otherwise, as on another processor: its record tells of the first."""
    both = made.result.keys() & record.result.keys() - MEASURED_TIME  # older records say less
    if json.loads(json.dumps([made.result[name] for name in both])) == [record.result[name] for name in both]:
        return
    losses = [f"{one.result['dev_loss']:.4f}" for one in (made, record) if one.result.get("dev_loss") is not None]
    shown = f" (dev loss {', on record '.join(losses)})" if losses else ""
    logger.warning(
        "%s was missing and is made again, but came out otherwise than its record says%s; older steps rest on the "
        "first, newer ones on this. For results of one piece use an --output without records",
        record.step,
        shown,
    )


def _seconds_so_far(folder: Path) -> float:
    """The seconds that a step had taken up to its newest checkpoint."""
    checkpoint = newest_checkpoint(folder)
    return seconds_of(checkpoint) if checkpoint else 0.0


def _file_name(step: str) -> str:
    return step.replace(" ", "-")


def made_with() -> dict[str, str]:
    """Return what seconds depend on: versions, processor or GPU, and threads."""
    import torch

    libraries = dict(_library_versions())
    if world_size() > 1:
        libraries["processes"] = str(world_size())
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


@cache
def _library_versions() -> Mapping[str, str]:
    return {name: version(name) for name in ("grasp-lora", "torch", "transformers", "peft")}
