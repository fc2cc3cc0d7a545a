"""Runs of the real command line that something happens to at a chosen moment, each in a process of its own.

The processes are forked from one that has imported everything, since the imports take longer than a tiny run. A moment is an
event: the run is about to touch a file in its folder, or is before or after an optimizer step or a commit of the controller.

As a program it reads one attempt a line from standard input, as JSON, and answers with one line each.
"""

import gc
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SAVE_EVERY = 3  # optimizer steps from one checkpoint to the next
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
# What takes time or says when, and so differs between two runs that do the same.
TIMED = {
    "run.json", "cost.json", "report.html", "controller/timings.jsonl", "compare/compare.md",
}  # fmt: skip
BUT_FOR_SECONDS = re.compile(r"compare/compare\.json|store/.*/(result|done)\.json")
KEY = re.compile(r"(-[01]\.\d\d)?-[0-9a-f]{16}")  # ratio and key of a step, which depend on the recipe


@dataclass(frozen=True)
class Attempt:
    """How one process went.

    Args:
        status: its exit status, or the negative number of the signal that ended it.
        error: what it wrote to standard error.
        events: the moments that it came by, each "STEP WHAT", between steps "between WHAT"; keys of steps are written KEY.
        files: of the run folder afterwards, name -> hash; those of `TIMED` have none.
    """

    status: int
    error: str
    events: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimizer steps that were begun."""
        return sum(event.endswith(" before step") for event in self.events)


def load_everything() -> None:
    """Import what a run needs, without starting a thread: only then is a fork safe."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import plotly.offline  # noqa: F401
    import rouge_score.rouge_scorer  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401
    import trl  # noqa: F401
    from accelerate import optimizer
    from accelerate.utils import memory

    from grasp_lora import api  # noqa: F401
    from grasp_lora.storage import checkpoints

    checkpoints.LEAST_STEPS = SAVE_EVERY  # else trainings that short leave none

    memory.gc = SimpleNamespace(
        collect=lambda: 0
    )  # as in conftest.py: full collections, and looks for a package at each step
    optimizer.is_lomo_available = cache(optimizer.is_lomo_available)
    torch.set_num_threads(1)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # torch has no pool for the threads of a forked process
    gc.collect()
    gc.freeze()  # the Trainer collects garbage, which would go through all that was imported, again and again
    if threading.active_count() > 1:
        raise RuntimeError(f"threads are running: {threading.enumerate()}")


def attempt(
    workspace: Path,
    arguments: Sequence[str],
    folder: Path,
    moments: dict[int, str] | None = None,
    seconds: float | None = None,
) -> Attempt:
    """Call the command line in a new process and wait for its end.

    Args:
        workspace: its working folder.
        arguments: of the command line.
        folder: the run folder, whose events are counted.
        moments: number of an event, from 1 -> what happens just before it: `kill`, the name of a signal, or `sh COMMAND`.
        seconds: kill it after so long.
    """
    return _finish(_start(workspace, arguments, folder, moments), workspace, folder, seconds)


def together(
    workspace: Path, arguments: Sequence[str], folder: Path, moments: Sequence[dict[int, str]]
) -> list[Attempt]:
    """Call the command line in several processes at the same time, what happens to each given by its moments."""
    children = [_start(workspace, arguments, folder, one) for one in moments]
    ended = [_wait(child) for child in children]  # all of them, before what one of them writes is read
    return [_attempt(child, status, workspace, folder) for child, status in zip(children, ended, strict=True)]


def _start(workspace: Path, arguments: Sequence[str], folder: Path, moments: dict[int, str] | None) -> int:
    """Fork a process that calls the command line, and return its number."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.read(reading, 1)  # until its folder is there
            record = _record(workspace, os.getpid())
            os.chdir(workspace)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
            for number, name in ((1, "out"), (2, "err"), (3, "events")):
                os.dup2(os.open(record / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            _watch(folder.absolute(), moments or {})
            status = call(arguments)
        finally:
            os._exit(status)
    record = _record(workspace, child)
    record.mkdir(exist_ok=True)
    for name in ("err", "events"):  # a kill may come before the child has opened them
        (record / name).touch()
    os.write(writing, b"!")
    for end in (reading, writing):
        os.close(end)
    return child


def _record(workspace: Path, child: int) -> Path:
    return workspace / f"attempt-{child}"


def _finish(child: int, workspace: Path, folder: Path, seconds: float | None = None) -> Attempt:
    """Wait for the end of a process, or kill it after so many seconds."""
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return _attempt(child, _wait(child), workspace, folder)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _attempt(child: int, status: int, workspace: Path, folder: Path) -> Attempt:
    """What a process that has ended leaves."""
    record = _record(workspace, child)
    result = Attempt(
        status,
        (record / "err").read_text(encoding="utf-8"),
        (record / "events").read_text(encoding="utf-8").splitlines(),
        contents(folder),
    )
    shutil.rmtree(record)
    return result


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder by name with its hash, none for those that say when."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        content = file.read_bytes()
        if BUT_FOR_SECONDS.fullmatch(name):
            content = json.dumps(json.loads(content, object_hook=_untimed)).encode()
        found[name] = "" if name in TIMED else hashlib.sha256(content).hexdigest()
    return found


def _untimed(content: dict[str, Any]) -> dict[str, Any]:
    """An object less its seconds, and what was made of them: timings, and the hash of a result that has them."""
    return {key: value for key, value in content.items() if "seconds" not in key and key not in ("timings", "result")}


def call(arguments: Sequence[str]) -> int:
    """Call the command line in this process, which is to end after it; return its exit status, 1 after a stack trace."""
    from grasp_lora.cli import main

    sys.argv = ["grasp-lora", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # noqa: BLE001 - this process ends here in any case
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def _watch(folder: Path, moments: dict[int, str]) -> None:
    """Count the events of this process, write them to file descriptor 3, and let happen what is to happen."""
    from torch.optim import optimizer

    from grasp_lora.method.masks import MaskSet
    from grasp_lora.report.bars import TerminalProgress

    places = (str(folder), str(folder.with_name(f".{folder.name}")))  # with the draft beside it
    count, busy, step = 0, False, "begin"

    def event(what: str) -> None:
        nonlocal count, busy
        if busy:
            return
        busy = True
        count += 1
        os.write(3, f"{step} {what}\n".encode())
        action = moments.get(count, "")
        if action.startswith("sh "):
            subprocess.run(action.removeprefix("sh "), shell=True, check=True)
        elif action:
            os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.Signals[action])
        busy = False

    def hear(name: str, details: tuple[Any, ...]) -> None:
        writes = name in WRITES or (name == "open" and details[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and isinstance(details[0], str | os.PathLike):
            path = os.path.abspath(details[0])  # noqa: PTH100 - links are not followed
            if path.startswith(places):
                event(f"{name} {KEY.sub('-KEY', os.path.relpath(path, places[0]))}")

    def around(owner: type, method: str, what: str) -> None:
        original: Callable[..., Any] = getattr(owner, method)

        def watched(self: Any, *arguments: Any, **options: Any) -> Any:
            event(f"before {what}")
            result = original(self, *arguments, **options)
            event(f"after {what}")
            return result

        setattr(owner, method, watched)

    def naming(method: str, name: Callable[[Any], str]) -> None:
        original: Callable[..., Any] = getattr(TerminalProgress, method)

        def named(self: Any, value: Any) -> None:
            nonlocal step
            step = name(value)
            original(self, value)

        setattr(TerminalProgress, method, named)

    naming("begin", lambda begun: str(begun).partition("-0")[0])  # a final run has its ratio in its name
    naming("finished", lambda _: "between")
    around(MaskSet, "commit", "commit")
    optimizer.register_optimizer_step_pre_hook(lambda *_: event("before step"))
    optimizer.register_optimizer_step_post_hook(lambda *_: event("after step"))
    sys.addaudithook(hear)


def main() -> None:
    """Serve attempts until standard input ends."""
    load_everything()
    for line in sys.stdin:
        asked = json.loads(line)
        if command := asked.get("shell"):
            answer: dict[str, Any] = {"status": subprocess.run(command, shell=True, check=False).returncode}
        else:
            moments = [{int(at): what for at, what in one.items()} for one in asked["moments"]]
            found = together(Path(asked["workspace"]), asked["arguments"], Path(asked["folder"]), moments)
            answer = {"attempts": [asdict(one) for one in found]}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
