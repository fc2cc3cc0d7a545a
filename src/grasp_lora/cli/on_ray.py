"""`--on ray`: workers of a Ray cluster that share a comparison, each doing what the command does by itself."""

import logging
import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grasp_lora.engine.progress import Progress
from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.storage.processes import Interruption
from grasp_lora.storage.reading import reading
from grasp_lora.text.display import first_line
from grasp_lora.text.names import needs

RETRIES = 3  # of a worker whose process is lost
ANSWERS = 10  # seconds within which a cluster does
SHOWN = 0.2  # seconds between two looks at what the workers say
UNITS = 10_000  # in which Ray counts a GPU: of floats, 1 // 0.2 is 4


def share(
    progress: Progress,
    arguments: dict[str, Any],
    *,
    workers: int,
    address: str | None = None,
    gpus_per_worker: float = 0.0,
) -> tuple[Path, Any]:
    """Let workers of a Ray cluster share the steps of one folder, which all of them see; return what the command returns.

    A worker that is lost is started again by Ray, and what it was at is free for the others at once.

    Args:
        progress: told what the first worker is at, and of each step that any of them has done.
        arguments: of `grasp_lora.compare`.
        workers: how many, at least 1.
        address: of a running cluster; None starts one on this machine for the time of the command.
        gpus_per_worker: share of a GPU that each worker takes.

    Raises:
        RecipeError: Ray is missing, the cluster cannot be reached, or it has no room for the workers.
        GraspError: as the command does, or a worker was lost too often. What is done stays.
        Interrupted: SIGTERM or SIGINT came.
    """
    needs("--on ray", "ray", "ray", extra="ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.queue import Queue

    with reading(f"the Ray cluster at {address or 'this machine'}", RecipeError):
        if address is not None:
            _check_reachable(address)
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=None)
    interruption = Interruption(lambda: "while its workers were at it")
    try:
        # Deferred, since an exception inside Ray's own code would come out as another.
        with interruption.handled(), interruption.deferred():
            cpus = _room([node["Resources"] for node in ray.nodes() if node["Alive"]], workers, gpus_per_worker)
            queue = Queue()
            work = ray.remote(num_cpus=cpus, num_gpus=gpus_per_worker, max_retries=RETRIES)(_work)
            waiting = [work.remote(number, queue, Path.cwd(), arguments) for number in range(workers)]
            result: tuple[Path, Any] | None = None
            while waiting:
                done, waiting = ray.wait(waiting, timeout=SHOWN)
                interruption.stop_if_asked()
                for name, values in queue.get_nowait_batch(queue.qsize()):
                    getattr(progress, name)(*values)
                for task in done:
                    result = ray.get(task)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise GraspError(
            f"a Ray worker was lost more than {RETRIES} times ({first_line(error)}); what is done stays"
        ) from error
    finally:
        ray.shutdown()
    assert result is not None
    return result


def _room(nodes: Sequence[Mapping[str, float]], workers: int, gpus_per_worker: float) -> int:
    """The most CPUs that each worker can have; one that does not fit on any machine would never begin."""

    def places(cpus: int) -> float:
        each = round(gpus_per_worker * UNITS)
        by_gpus = [round(node.get("GPU", 0.0) * UNITS) // each if each else math.inf for node in nodes]
        return sum(min(node.get("CPU", 0.0) // cpus, gpus) for node, gpus in zip(nodes, by_gpus, strict=True))

    for cpus in range(int(max((node.get("CPU", 0.0) for node in nodes), default=0.0)), 0, -1):
        if places(cpus) >= workers:
            return cpus
    has = (
        f"{sum(node.get('CPU', 0.0) for node in nodes):g} CPUs and {sum(node.get('GPU', 0.0) for node in nodes):g} GPUs"
    )
    raise RecipeError(
        f"--workers is {workers}, but the Ray cluster has room for {places(1):g}: {has}, and each worker takes one CPU and "
        f"{gpus_per_worker:g} GPUs (--gpus-per-worker); give fewer workers"
    )


def _check_reachable(address: str) -> None:
    """Look whether somebody listens there: Ray itself would try for minutes.

    Raises:
        OSError: nobody does.
    """
    if match := re.fullmatch(r"(?:ray://)?([^:/]+):(\d{1,5})", address):
        socket.create_connection((match[1], int(match[2])), timeout=ANSWERS).close()


class _Told(Progress):
    """Progress of a worker, told to the process that shows it."""

    def __init__(self, queue: Any, first: bool) -> None:
        self._queue, self._first = queue, first

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattribute__(name)

        def tell(*values: Any) -> None:
            done = name == "finished" and not values[0].repeated
            if done or (self._first and name in ("note", "method", "begin")):
                self._queue.put((name, values))

        return tell


def _work(number: int, queue: Any, here: Path, arguments: dict[str, Any]) -> tuple[Path, Any]:
    """Be one worker, in a process of the cluster.

    Raises:
        GraspError: this machine does not see the folder, or as the command does.
    """
    with reading(f"{here} on {socket.gethostname()}, which has to see the folder of the comparison", RecipeError):
        os.chdir(here)
    from grasp_lora.cli import set_up_libraries

    set_up_libraries()
    from grasp_lora import api

    return api.compare(**arguments, progress=_Told(queue, first=number == 0))
