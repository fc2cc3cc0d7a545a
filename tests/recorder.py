"""A session of the tests' recipe, and a progress that remembers, for tests that count the work of an experiment."""

from pathlib import Path

from grasp_lora.bench.progress import Progress
from grasp_lora.bench.session import Session
from grasp_lora.bench.store import Record
from grasp_lora.recipes.load import load_recipe


class Recorder(Progress):
    """Remembers which steps were done and which were on record, in order."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.found: list[str] = []

    def record(self, record: Record, there: bool) -> None:
        (self.found if there else self.did).append(record.step)


def session_of(*overrides: str, recipe: Path | str = "tiny.yaml", progress: Progress | None = None) -> Session:
    """Open a recipe, by default the one of the tests' workspace; it may name Python code."""
    return Session(*load_recipe(recipe, overrides, allow_code=True), progress)
