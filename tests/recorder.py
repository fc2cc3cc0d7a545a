"""Short ways to make, read and tear up a run of the tests' recipe, and a progress that remembers what was done."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from random_examples import read_rows

from grasp_lora.engine.progress import Progress
from grasp_lora.engine.results import Finished
from grasp_lora.engine.run import run
from grasp_lora.engine.run_folder import Run
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import Store
from grasp_lora.recipes.load import load_recipe
from grasp_lora.recipes.recipe import recipe_keys

WEIGHTS = "adapter_model.safetensors"
rows_of = read_rows


class Recorder(Progress):
    """Remembers which steps were done and which were on record, in order, and what was said beforehand."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.repeated: list[str] = []
        self.notes: list[str] = []

    def finished(self, step: Finished[Any]) -> None:
        (self.repeated if step.repeated else self.did).append(step.name)

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def trained(self) -> list[str]:
        """The trainings that were done."""
        measured = ("-losses", "answers", "scores")
        return [name for name in self.did if not name.endswith(measured)]


KEYS = recipe_keys()
LEAVES = [key for key in KEYS if not any(other.startswith(f"{key}.") for other in KEYS)]


def session_of(*overrides: str, recipe: Path | str = "tiny.yaml", progress: Progress | None = None) -> Session:
    """Open a recipe, by default the one of the tests' workspace; it may name Python code.

    A field that is no key of a recipe is set as a script would set it.
    """
    fields = {key: value for key, _, value in (text.partition("=") for text in overrides) if is_no_key(key)}
    loaded, base = load_recipe(
        recipe, [text for text in overrides if text.partition("=")[0] not in fields], allow_code=True
    )
    for key, value in fields.items():
        loaded = changed(loaded, key, yaml.safe_load(value))
    return Session(loaded, base, progress)


def is_no_key(key: str) -> bool:
    """Whether a field has one right answer, or that of the preset, so that a recipe cannot set it."""
    return key not in KEYS and not any(key.startswith(f"{leaf}.") for leaf in LEAVES)


def changed(value: Any, path: str, other: Any) -> Any:
    """A copy with another value somewhere, which nothing checks: that it goes with the rest is another matter."""
    name, _, rest = path.partition(".")
    result = copy.copy(value)
    result.__dict__[name] = changed(getattr(value, name), rest, other) if rest else other  # all of these are frozen
    return result


def steps_of(*overrides: str, store: Path | str = "store") -> Steps:
    """The steps of that recipe, in a store of their own."""
    return Steps(session_of(*overrides), Store(Path(store)))


def run_tiny(*overrides: str, folder: Path | str = "run", progress: Progress | None = None) -> Run:
    """Run that recipe in a folder."""
    return run(session_of(*overrides, progress=progress), Path(folder))


def read(file: Path | str) -> Any:
    """The content of a JSON file."""
    return json.loads(Path(file).read_text(encoding="utf-8"))


def step_folders(folder: Path | str, name: str) -> list[Path]:
    """The folders of all steps of a name, such as `final-*`, in the store of a run or a comparison."""
    return sorted(Path(folder, "store").glob(f"{name}-{'[0-9a-f]' * 16}"))


def result_of(folder: Path | str, name: str) -> Any:
    """What the only step of a name came to."""
    [step] = step_folders(folder, name)
    return read(step / "result.json")


def forget(folder: Path | str, *names: str) -> None:
    """Let a finished run or comparison have these steps still to do."""
    for name in names:
        folders = step_folders(folder, name)
        assert folders, name
        for step in folders:
            shutil.rmtree(step)


def files_of(folder: Path | str, store: bool = False) -> dict[str, bytes]:
    """The files of a run folder, those of its store where they are asked for."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }
    return files if store else {name: content for name, content in files.items() if not name.startswith("store/")}


def weights_in(folder: Path | str) -> bytes:
    """The file of an adapter's weights."""
    return Path(folder, WEIGHTS).read_bytes()
