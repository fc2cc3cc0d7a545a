"""Figures of the speed benchmark that know nothing of the method: turns, rows of ratios, peak memory, a profile by kind."""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from grasp_lora.errors import GraspError

T = TypeVar("T")
STATUS = Path("/proc/self/status")

# First kind that fits. Fragments are looked for, in lower case, in the name of an operation, or of any that it is part of.
WITHIN = {
    "data": ("dataloader",),
    "optimizer": ("optimizer.", "clip_grad", "_foreach_", "linalg_vector_norm"),
    "attention": ("attention",),
}
NAMED = {
    "attention": ("aten::bmm", "softmax"),  # eager attention; a linear layer never takes either
    "matrix products": ("aten::mm", "aten::addmm", "linear", "matmul"),
    "elementwise and copies": ("aten::",),
}
HEAD = "head and loss"
OTHER = "other"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        part: the measurement that it belongs to.
        name: what is divided by what.
        ratio, lowest, highest: median and range over the turns.
        reference: median of the denominator.
        unit: of the reference: `s` or `MB`.
        computed: put together from measured parts rather than run.
        note: what else one should know.
    """

    part: str
    name: str
    ratio: float
    lowest: float
    highest: float
    reference: float
    unit: str = "s"
    computed: bool = False
    note: str = ""


def row(part: str, name: str, ours: Sequence[float], reference: Sequence[float], **more: Any) -> Row:
    """Divide turn by turn, so that what slows a whole turn down cancels, and keep median and range of the ratios."""
    ratios = [one / other for one, other in zip(ours, reference, strict=True)]
    return Row(part, name, statistics.median(ratios), min(ratios), max(ratios), statistics.median(reference), **more)


def take_turns(works: Mapping[str, Callable[[], T]], pairs: int, *, warm_up: bool = True) -> dict[str, list[T]]:
    """Do all works in turn, `pairs` times, every second turn backwards, so that a drift favours none; return what each gave.

    With `warm_up` a turn that does not count comes first.
    """
    if warm_up:
        for work in works.values():
            work()
    results: dict[str, list[T]] = {name: [] for name in works}
    for turn in range(pairs):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            results[name].append(works[name]())
    return results


def table(rows: Sequence[Row]) -> str:
    """Return the rows as one Markdown table."""
    lines = ["| part | what over what | ratio | range | reference | note |", "|---|---|---:|---|---:|---|"]
    for one in rows:
        notes = [
            *(["computed from measured parts, not run"] if one.computed else []),
            *([one.note] if one.note else []),
        ]
        lines.append(
            f"| {one.part} | {one.name} | {one.ratio:.3f} | {one.lowest:.3f} to {one.highest:.3f} "
            f"| {one.reference:.3g} {one.unit} | {'; '.join(notes)} |"
        )
    return "\n".join(lines) + "\n"


def share_table(shares: Mapping[str, float]) -> str:
    """Return the shares of a profile as a Markdown table."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    lines = ["| kind of operation | share of a fine-tune step |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {kind} | {100 * share:.1f} % |" for kind, share in ordered)]) + "\n"


def clock_of(device: torch.device) -> tuple[str, Callable[[], float]]:
    """Return the name of a clock and the clock: the process's own time on a CPU with one thread, which other work on the
    machine disturbs little, else wall time, read once a GPU has done what it was given.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return "process", time.process_time
    return "wall", wall_time


def wall_time() -> float:
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def child(arguments: Sequence[str]) -> tuple[float, str]:
    """Run Python with these arguments in a process of its own; return its wall time and standard output.

    Raises:
        GraspError: it failed; the message ends with its last line.
    """
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise GraspError(f"python {' '.join(arguments)} ended with status {done.returncode}: {last}")
    return seconds, done.stdout


def peak_megabytes() -> float:
    """Return the most memory that this process ever held: on the GPU where it uses one, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    if STATUS.is_file():  # not ru_maxrss: on Linux a child inherits that of the process that started it
        [line] = [line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def profile(work: Callable[[], object], vocabulary: int) -> dict[str, float]:
    """Run the work under torch's profiler and return the share of each kind of operation, by the time spent in itself.

    On a CPU the shares are of wall time and `other` holds what no operation accounts for, which is Python, and slower under
    a profiler; on a GPU they are of its busy time.

    Args:
        work: warmed up.
        vocabulary: operations on an operand of this size belong to the head and the loss.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    started = wall_time()
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        work()
        ended = wall_time()
    seconds: dict[str, float] = {}
    for event in profiler.events():
        kind = kind_of(event, vocabulary)
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[kind] = seconds.get(kind, 0.0) + own / 1e6
    if not on_gpu:
        seconds[OTHER] = seconds.get(OTHER, 0.0) + max(0.0, ended - started - sum(seconds.values()))
    total = sum(seconds.values())
    return {kind: spent / total for kind, spent in seconds.items()}


def kind_of(event: Any, vocabulary: int) -> str:
    """Return the kind of one event of a profile."""
    names, place = [], event
    while place is not None:
        names.append(place.name.lower())
        place = place.cpu_parent
    for kind, fragments in WITHIN.items():
        if any(fragment in name for name in names for fragment in fragments):
            return kind
    looked_up = any("embedding" in name for name in names)  # its table has a row for each token, too
    if not looked_up and any(vocabulary in shape for shape in event.input_shapes or () if isinstance(shape, list)):
        return HEAD
    return next((kind for kind, fragments in NAMED.items() if any(one in names[0] for one in fragments)), OTHER)
