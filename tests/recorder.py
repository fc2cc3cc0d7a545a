"""A progress that remembers, for tests that count the work of an experiment."""

from grasp_lora.bench.progress import Progress
from grasp_lora.bench.store import Record


class Recorder(Progress):
    """Remembers which steps were done and which were on record, in order."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.found: list[str] = []

    def record(self, record: Record, there: bool) -> None:
        (self.found if there else self.did).append(record.step)
