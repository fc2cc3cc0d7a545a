"""The memory of an experiment: each step is done once, whoever needs it, and a kill loses no finished step.

A step has a folder of its own, named after it and a hash of everything that decides it. Its result is written there, and
`done.json` last. So a resume is two facts: a folder with `done.json` is a finished step and is read; one without it is under
way, and its training goes on from the checkpoints in its `work`.

    store/final-0.40-1f2e3d4c5b6a7988/
        result.json    what came of it: losses, scores, rounds
        adapter/       of a step that makes one
        done.json      what decided it, its seconds, the versions it was made with
        work/          of a step under way: checkpoints, history, rounds

Several processes may share a store: one claims a step, and for the others it is `Busy` until it is done.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field
from safetensors import SafetensorError, safe_open

from grasp_lora.engine.progress import Progress
from grasp_lora.engine.results import RESULT, Finished, Result, Trained, read_if_there
from grasp_lora.errors import GraspError
from grasp_lora.models.adapter_files import CONFIG_FILE, OUR_FILE, WEIGHTS_FILE
from grasp_lora.storage.checkpoints import newest_checkpoint, seconds_of
from grasp_lora.storage.claims import Busy, Workplace, claim, make_folder, remove_lock
from grasp_lora.storage.processes import on_first_process, world_size
from grasp_lora.storage.reading import sha256_of
from grasp_lora.storage.writing import sync_all, write_json

VERSION = 2  # of this layout and of the keys; a store of another version is done anew
WAIT = 0.5  # seconds between two looks at what other processes do
DONE, ADAPTER, WORK = "done.json", "adapter", "work"
CURVES = "TENSORBOARD_LOGGING_DIR"

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Done:
    """done.json: a step is finished. `inputs` decided it, `made_with` are versions, processor or GPU, and threads.

    `result` is the SHA-256 of result.json: what was changed or cut off since is done again.
    """

    step: str
    key: str
    inputs: dict[str, Any]
    seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    made_with: Mapping[str, str]
    version: int
    result: str = ""


class Store:
    """The steps of one folder. Of the processes that torchrun started the first writes, and all read the result.

    Args:
        folder: made when the first step begins.
        progress: told of each step.
        work: what a signal asks for; while a step trains it waits for the next checkpoint. None outside of an experiment.
    """

    def __init__(self, folder: Path, progress: Progress | None = None, work: Workplace | None = None) -> None:
        self.folder = folder
        self._progress = progress or Progress()
        self._work = work
        self._finished: dict[str, Finished[Any]] = {}
        self._failed: dict[str, GraspError] = {}

    def step(
        self,
        name: str,
        inputs: Mapping[str, Any],
        kind: type[R],
        work: Callable[[Path], R],
        *,
        trains: bool = False,
        shown: str = "",
    ) -> Finished[R]:
        """Return a step: read if it is there, else done now, going on from its own checkpoints.

        Args:
            name: short, for people; a part of the folder's name.
            inputs: everything that decides the result, as plain JSON values, keys of other steps included.
            work: does it, given the folder of the step.
            trains: whether it leaves checkpoints, so that a signal waits for the next one.
            shown: name for the progress, where it is another.

        Raises:
            Busy: another process is at this step.
            RecipeError: the files of the step are damaged.
            GraspError: the step fails, or has failed in this process: it is not tried again.
            Interrupted: a signal has stopped it.
        """
        key = key_of(name, inputs)
        if key in self._finished:
            return self._finished[key]
        folder = self.folder / f"{name}-{key}"
        finished = self._read(name, key, folder, kind)
        if finished is None:
            make_folder(self.folder)
            with claim(folder, wait=False):
                finished = self._read(name, key, folder, kind)  # another process may have done it by now
                if finished is None:
                    if key in self._failed:
                        raise self._failed[key]
                    if (folder / DONE).is_file():
                        logger.warning(
                            "%s has files that are gone or not as they were written; it is done again", folder
                        )
                    self._progress.begin(shown or name)
                    if self._work:
                        self._work.place = f"at the step {name}"
                    before, started = on_first_process(lambda: _seconds_so_far(folder)), time.perf_counter()
                    try:
                        # A signal waits until the result of a training is there, too.
                        with self._work.interruption.deferred() if trains and self._work else nullcontext():
                            with _curves_in(folder):
                                result = work(folder)
                            seconds = round(before + time.perf_counter() - started, 3)
                            done = Done(name, key, dict(inputs), seconds, made_with(), VERSION)
                            on_first_process(lambda: _complete(folder, result, done))
                    except GraspError as error:
                        if not isinstance(error, Busy):
                            self._failed[key] = type(error)(str(error))  # not its traceback, which holds the training
                        raise
                    # Read, as ever after: all processes have the same, and what is written is what is used.
                    finished = Finished(name, key, folder, kind.read(folder), seconds, done.made_with)
        self._finished[key] = finished
        self._progress.finished(finished)
        return finished

    def _read(self, name: str, key: str, folder: Path, kind: type[R]) -> Finished[R] | None:
        done = on_first_process(lambda: read_if_there(folder / DONE, Done))
        if done is None or key_of(name, done.inputs) != key:
            return None
        if not on_first_process(lambda: _is_whole(folder, kind, done.result)):
            return None
        on_first_process(lambda: _tidy(folder))
        return Finished(name, key, folder, kind.read(folder), done.seconds, done.made_with, repeated=True)


def _complete(folder: Path, result: Result, done: Done) -> None:
    """Write a result, and `done.json` when all else is on the disk; until then the checkpoints stay, should it be killed."""
    result.write(folder)
    result.read(folder)  # what cannot be read, since code of a user's own made it, is not done
    sync_all(folder)
    write_json(folder / DONE, asdict(replace(done, result=sha256_of(folder / RESULT))))
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Remove the checkpoints and the lock of a finished step: one that was killed at its very end leaves them."""
    shutil.rmtree(folder / WORK, ignore_errors=True)
    remove_lock(folder)


def _is_whole(folder: Path, kind: type[Result], result: str) -> bool:
    """Whether a finished step still has its files: one may have been deleted, cut off in a copy, or changed by hand."""
    if not (folder / RESULT).is_file() or sha256_of(folder / RESULT) != result:
        return False
    if kind is not Trained:
        return True
    try:
        with safe_open(folder / ADAPTER / WEIGHTS_FILE, "pt"):
            facts = [json.loads((folder / ADAPTER / name).read_bytes()) for name in (CONFIG_FILE, OUR_FILE)]
            return all(isinstance(part, dict) for part in facts)
    except (OSError, SafetensorError, ValueError):
        return False


def _seconds_so_far(folder: Path) -> float:
    """The seconds that a step had taken up to its newest checkpoint."""
    checkpoint = newest_checkpoint(folder / WORK)
    return seconds_of(checkpoint) if checkpoint else 0.0


@contextmanager
def _curves_in(folder: Path) -> Iterator[None]:
    """Let TensorBoard write where its files outlast the training's own folder; a place that the user has set stays."""
    if CURVES in os.environ:
        yield
        return
    os.environ[CURVES] = str(folder / "tensorboard")
    try:
        yield
    finally:
        os.environ.pop(CURVES, None)


def key_of(name: str, inputs: Mapping[str, Any]) -> str:
    """Return the hash under which a step is on record: whoever has the same inputs has the same step."""
    text = json.dumps([VERSION, name, inputs], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def made_with() -> Mapping[str, str]:
    """Return what seconds, and the last bits of results, depend on: versions, processor or GPU, threads, processes."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        processor: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        device = str(processor.get("cpu_name") or platform.machine())
    return {
        **{name: version(name) for name in ("grasp-lora", "torch", "transformers", "peft")},
        "python": platform.python_version(),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "processes": str(world_size()),
    }
