"""Python processes that are forked from one which has imported the libraries of others: that takes longer than a tiny run.

Each is as fresh as one that was started, but for those libraries: nothing of this package has been imported, no warning filter of
the tests is set, and its environment is what it is given.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess

_context = multiprocessing.get_context("forkserver")
_LIBRARIES = "datasets peft rouge_score.rouge_scorer transformers.models.llama.modeling_llama transformers.trainer trl"
_context.set_forkserver_preload(_LIBRARIES.split())
LONGEST = 600  # seconds; who takes longer hangs


def python(
    arguments: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None, count: int = 1
) -> CompletedProcess[str]:
    """Run what `python ARGUMENTS` runs, and wait for its end; an exit status of 0 is that of all.

    Several processes are told their ranks as torchrun tells them, and their outputs stand one after the other.
    """
    environment = {**(os.environ if env is None else env), "OMP_NUM_THREADS": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    ranks = [environment | told for told in (_told(count) if count > 1 else [{}])]
    with tempfile.TemporaryDirectory() as place:
        outputs = [[Path(place, f"{name}{rank}") for rank in range(count)] for name in ("out", "err")]
        processes: list[BaseProcess] = [
            _context.Process(target=_run, args=(list(arguments), str(cwd or Path.cwd()), told, *map(str, files)))
            for told, *files in zip(ranks, *outputs, strict=True)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + LONGEST
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            process.kill()
            process.join()
        out, err = ("".join(file.read_text(encoding="utf-8") for file in files if file.exists()) for files in outputs)
    statuses = [process.exitcode or 0 for process in processes]
    return CompletedProcess(arguments, next((status for status in statuses if status), 0), out, err)


def _told(count: int) -> list[dict[str, str]]:
    """What torchrun tells each of so many processes on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(count)}
    return [
        meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)} for rank in range(count)
    ]


def _run(arguments: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """Be `python ARGUMENTS`, in a process that was just forked."""
    gc.freeze()  # the Trainer collects garbage, which would go through all that was imported, again and again
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    import torch

    torch.set_num_threads(1)
    match arguments:
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            exec(code, {"__name__": "__main__"})
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *rest]:
            sys.argv = [script, *rest]
            runpy.run_path(script, run_name="__main__")
