"""The errors a user can cause: one clear line each, shown by the command line without a stack trace."""

from collections.abc import Sequence

STOPPED = 75  # exit status after a signal, EX_TEMPFAIL of sysexits.h: run it again
BEFORE_IT_BEGAN = "stopped by SIGINT before it began; run the same command again"


class GraspError(ValueError):
    """A mistake in what the user gave us. The message says what arrived, what is allowed and what to do.

    Several of one file come together: the first line counts them, and the command line puts each of `faults` on one of its own.
    """

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        super().__init__(": ".join([message, "; ".join(faults)]) if faults else message)
        self.lines = [message, *(f"- {fault}" for fault in faults)]


class RecipeError(GraspError):
    """The recipe, an override or the run folder does not fit."""


class AdapterError(GraspError):
    """An adapter cannot be read, merged or put on this backbone."""


class DataError(GraspError):
    """A data file is missing, malformed or too small, or splits overlap."""


class ProbeError(GraspError):
    """A loss of an example, or a score of its answer, is not a finite number."""


class DivergedError(GraspError):
    """A training whose loss or weights are no longer finite numbers."""


class Interrupted(Exception):  # noqa: N818 - it is no mistake
    """A signal stopped the work at a point that it can go on from; the message says where."""
