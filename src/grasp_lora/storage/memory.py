"""Memory: how much a process had, and one line that says what takes less where it runs out."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from grasp_lora.errors import GraspError
from grasp_lora.text.display import first_line

# Of torch.OutOfMemoryError, CUDA's drivers and libraries, and torch's allocator on the CPU, which raises a plain RuntimeError.
_SIGNS = (
    "out of memory",
    "ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "can't allocate memory",
    "not enough memory",
)


def peak_memory() -> int | None:
    """Bytes that this process had at most; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


@contextmanager
def enough_memory(work: str, advice: str) -> Iterator[None]:
    """Turn a lack of memory for some work, such as "the training", into one line with advice; other errors pass.

    Raises:
        GraspError: memory runs out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in _SIGNS):
            raise
        # They hold what filled the memory, for as long as the error is kept.
        traceback.clear_frames(error.__traceback__)
        if "CUDA" in str(error):
            advice += "; or, for the processor, set CUDA_VISIBLE_DEVICES= in the environment"
        raise GraspError(
            f"too little memory for {work} ({first_line(error)[:200]}); {advice}. What is done stays"
        ) from error
