"""Where experiments report to while they work."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grasp_lora.bench.store import Record


class Progress:
    """Told how far the work is; this one is silent, a terminal's shows it."""

    def preparing(self) -> None:
        """The backbone, the data and the adapters are being loaded."""

    def begin(self, units: float, finished: float = 0.0) -> None:
        """Take how much there is to do, in rough units of any kind, and how much was finished before."""

    def note(self, text: str) -> None:
        """Take what is to be known beforehand, a sentence."""

    def stage(self, name: str) -> None:
        """A stage of a run or a method of a comparison begins."""

    def step(self, report: Mapping[str, float]) -> None:
        """Take step, steps, epoch and loss of the fine-tune that is running."""

    def round(self, record: Mapping[str, Any]) -> None:
        """Take a controller round's record."""

    def answered(self, answered: int, prompts: int) -> None:
        """Take how many prompts have been answered."""

    def scored(self, system: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the answers of a system to all test prompts, as its file of predictions holds them."""

    def record(self, record: "Record", there: bool) -> None:
        """A step is done, now or already before."""

    def finished(self, name: str, seconds: float, summary: Mapping[str, Any], *, skipped: bool) -> None:
        """A stage of a run is complete, now or already before."""

    def done(self, units: float) -> None:
        """The part that began last is finished."""
