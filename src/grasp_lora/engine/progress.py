"""What an experiment tells while it works: a silent listener here, the terminal's in `report/bars.py`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grasp_lora.engine.results import Finished, Prediction


class Progress:
    """Told how far the work is. This class shows nothing; subclass it to show something."""

    def preparing(self) -> None:
        """The backbone, the data and the adapters are being loaded."""

    def note(self, text: str) -> None:
        """Take a sentence that a reader should know beforehand."""

    def planned(self, steps: int, passes: float, answers: float) -> None:
        """A run begins.

        Args:
            steps: trainings and systems, at most.
            passes: forward passes of all of them, about; 0 where that is not foretold.
            answers: those that the answers of one system take.
        """

    def method(self, title: str, number: int, total: int) -> None:
        """A row of a comparison begins: the `number`-th of `total`, counted from 1."""

    def system(self, number: int, total: int) -> None:
        """The `number`-th of `total` systems of a run is measured next, counted from 1."""

    def begin(self, step: str) -> None:
        """A step begins that is not on record."""

    def step(self, report: Mapping[str, float]) -> None:
        """Take step, steps, epoch and loss of the training that is running."""

    def round(self, record: Mapping[str, Any]) -> None:
        """Take the record of a controller round."""

    def answered(self, answered: int, prompts: int) -> None:
        """Take how many prompts have been answered."""

    def finished(self, step: "Finished[Any]") -> None:
        """A step is finished, now or already before (`step.repeated`)."""

    def scored(self, system: str, predictions: "Sequence[Prediction]") -> None:
        """Take the answers of a system to all test prompts."""

    def stop(self) -> None:
        """The work ends, well or badly; what is live on the screen goes."""
