"""`--on ray`: workers of a Ray cluster that share a comparison or a sweep, each doing what the command does by itself."""

import logging
import os
from pathlib import Path
from typing import Any

from grasp_lora.bench.progress import Progress
from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.storage.interruption import Interruption
from grasp_lora.text.display import quoted
from grasp_lora.text.names import needs

RETRIES = 3  # of a worker whose process is lost
SHOWN = 0.2  # seconds between two looks at what the workers say


def share(
    command: str,
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
        command: `compare` or `sweep`, as in `grasp_lora.api`.
        progress: told what the first worker is at, and of each step that any of them has done.
        arguments: of the command.
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

    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=None)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RecipeError(
            f"the Ray cluster at {quoted(address or 'this machine')} cannot be reached ({error}); look at `ray status`, or leave "
            "--address out for one on this machine"
        ) from error
    interruption = Interruption(lambda: "while its workers were at it")
    try:
        with (
            interruption.handled(),
            interruption.deferred(),
        ):  # an exception inside Ray's own code would come out as another
            cpus = _room(ray.cluster_resources(), workers, gpus_per_worker)
            said = Queue()
            work = ray.remote(num_cpus=cpus, num_gpus=gpus_per_worker, max_retries=RETRIES)(_work)
            waiting = [work.remote(number, said, Path.cwd(), command, arguments) for number in range(workers)]
            result: tuple[Path, Any] | None = None
            while waiting:
                done, waiting = ray.wait(waiting, timeout=SHOWN)
                interruption.stop_if_asked()
                for name, values in said.get_nowait_batch(said.qsize()):
                    getattr(progress, name)(*values)
                for one in done:
                    result = ray.get(one)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        text = str(error).split("\n", 1)[0]
        raise GraspError(f"a Ray worker was lost more than {RETRIES} times ({text}); what is done stays") from error
    finally:
        ray.shutdown()
    assert result is not None
    return result


def _room(resources: dict[str, float], workers: int, gpus_per_worker: float) -> int:
    """CPUs for each worker, all of those that there are shared out."""
    cpus, gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
    if workers > cpus:
        raise RecipeError(
            f"--workers is {workers}, but the Ray cluster has {cpus} CPUs, one for each; give at most {cpus}"
        )
    if workers * gpus_per_worker > gpus:
        raise RecipeError(
            f"{workers} workers with {gpus_per_worker:g} GPUs each need {workers * gpus_per_worker:g}, but the Ray cluster has "
            f"{gpus:g}; lower --workers or --gpus-per-worker"
        )
    return cpus // workers


class _Told(Progress):
    """Progress of a worker, told to the process that shows it."""

    def __init__(self, said: Any, first: bool) -> None:
        self._said, self._first = said, first

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattribute__(name)

        def tell(*values: Any) -> None:
            done = name == "record" and not values[1]
            if done or (self._first and name in ("begin", "stage", "record", "trial", "done")):
                self._said.put((name, values))

        return tell


def _work(number: int, said: Any, here: Path, command: str, arguments: dict[str, Any]) -> tuple[Path, Any]:
    """Be one worker, in a process of the cluster."""
    os.chdir(here)
    from grasp_lora.cli import set_up_libraries

    set_up_libraries()
    from grasp_lora import api

    found: tuple[Path, Any] = getattr(api, command)(**arguments, progress=_Told(said, first=number == 0))
    return found
