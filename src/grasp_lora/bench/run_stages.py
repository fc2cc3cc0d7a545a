"""The stages of a run, and which of them its recipe leaves out."""

from collections.abc import Container

from grasp_lora.bench.run_folder import Shape

STAGES = ("data", "source", "target", "merge", "controller", "final", "continued", "evaluate", "deliver", "all_rows")


class FinalChoices(Shape):
    """What a resolved recipe's `final` says of the stages; versions that handed over GRASP's result did not name `deliver`."""

    prune_ratio: float | None = None
    deliver: str | None = None
    all_rows: bool = False

    def missing(self, complete: Container[str]) -> list[str]:
        """Name the stages that a run has yet to do, in order."""
        left_out = {
            "controller": self.prune_ratio is not None,
            "continued": self.deliver != "best",
            "deliver": self.deliver is None,
            "all_rows": not self.all_rows,
        }
        return [stage for stage in STAGES if stage not in complete and not left_out.get(stage)]
