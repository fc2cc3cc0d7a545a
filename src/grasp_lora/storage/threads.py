"""How many threads compute on a processor, and how long one waits for the next work before it sleeps.

Threads share each operation, and the slowest ends it: on two cores, one of them busy with other work, two threads take twice as
long as one. So an experiment begins with as many threads as there are idle cores, and goes on with as many as it began with,
since the last bits of a sum depend on how it is divided. `lab/busy.py` measures it.
"""

import os
import platform
from pathlib import Path

WATCHED = 0.2  # seconds in which a core is seen to be idle
# Turns of GNU OpenMP's waiting loop, some 0.15 ms: a turn's pause takes 40 cycles on AMD's processors and 140 on Intel's.
SPINS, SPINS_OF_AMD = "3000", "10000"


def waiting_turns() -> str:
    """How often a thread looks for work before it sleeps, for `GOMP_SPINCOUNT`.

    The library's own 300,000 are in vain where other work has the core; threads that sleep at once double a training step.
    """
    try:
        vendor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not on Linux
        vendor = platform.processor()
    return SPINS_OF_AMD if "AuthenticAMD" in vendor else SPINS


def use_idle_cores(device: str, begun_with: int = 0) -> None:
    """Set how many threads PyTorch computes with on a processor; `OMP_NUM_THREADS` of the user, and of torchrun, stays.

    Args:
        device: what the backbone's settings say: "auto", "cpu" or "cuda".
        begun_with: threads that the experiment began with, which goes on now; 0 for one that begins.
    """
    import torch

    if "OMP_NUM_THREADS" in os.environ or (device != "cpu" and torch.cuda.is_available()):
        return
    most = torch.get_num_threads()
    torch.set_num_threads(begun_with or (min(most, idle_cores()) if most > 1 else 1))


def idle_cores() -> int:
    """How many of the cores that this process may use are idle now; at least 1."""
    import psutil

    busy: list[float] = psutil.cpu_percent(WATCHED, percpu=True)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(busy))
    return max(1, sum(busy[core] < 50.0 for core in allowed if core < len(busy)))
