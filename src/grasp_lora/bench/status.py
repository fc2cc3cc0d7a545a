"""What a folder of experiments is and how far it has got: read only, and at once, since torch is not imported.

But for a run that was stopped: which command goes on is told by loading its recipe.
"""

import json
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from grasp_lora.bench import run_folder as files
from grasp_lora.bench.comparison_record import COMPARISON_FILE, Comparison
from grasp_lora.bench.failures import FAILED, Failure
from grasp_lora.bench.records import check_shape, read_needed, read_record, read_text
from grasp_lora.bench.run_stages import STAGES, FinalChoices
from grasp_lora.bench.sweep_record import SWEEP_FILE
from grasp_lora.errors import RecipeError
from grasp_lora.recipes.begun import overrides_of, recipe_file
from grasp_lora.recipes.builtin import builtin_recipes
from grasp_lora.recipes.text import RECIPE_FILE, parse
from grasp_lora.storage.claims import is_claimed
from grasp_lora.storage.reading import adapter_of, is_file, is_folder, is_there
from grasp_lora.text.display import escaped

MANIFEST, TRAINER_STATE = "manifest.json", "trainer_state.json"
# Lines, and what says which command goes on, where something is left to do.
Description = tuple[list[str], Callable[[], str] | None]


class _Spent(files.Shape):
    """What is read of a record."""

    seconds: float = 0.0


class _Choices(files.Shape):
    """What is read of a recipe: which stages it leaves out."""

    final: FinalChoices = FinalChoices()


@dataclass(frozen=True)
class UnderWay:
    """A step that is not done: where its newest checkpoint is, if it has one.

    Args:
        name: of the step.
        step, steps: optimizer steps taken, and at most to take; 0 before the first checkpoint.
        seconds: that these took.
        age: seconds since then, or since the step began.
        worker: the process that is at it, None where it was stopped.
    """

    name: str
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    age: float = 0.0
    worker: str | None = None

    def text(self) -> str:
        """Say how far it is and how long it takes at most."""
        begin = f"under way: {self.name}, by {self.worker}" if self.worker else f"stopped: {self.name}"
        if not self.step:
            return f"{begin}, before its first checkpoint" + (f", begun {_spent(self.age)} ago" if self.worker else "")
        text = f"{begin}, step {self.step} of at most {self.steps} at its last checkpoint, after {_spent(self.seconds)}"
        left = self.seconds / self.step * (self.steps - self.step) - (self.age if self.worker else 0.0)
        return f"{text}; at most {_spent(max(left, 0.0))} left"


def status(folder: Path) -> list[str]:
    """Say in a few lines what a folder is, what is done, what runs or was stopped, and what to do next.

    Args:
        folder: of a run, with what `compare` and `sweep` have done in it.

    Raises:
        RecipeError: it is no such folder, or a file of it is damaged.
    """
    if folder.name in (files.COMPARE_FOLDER, files.SWEEP_FOLDER) and is_folder(folder.parent / files.STORE_FOLDER):
        folder = folder.parent
    parts = {name: is_there(folder / name) for name in (files.RUN_FILE, files.COMPARE_FOLDER, files.SWEEP_FOLDER)}
    if not any(parts.values()):
        raise _no_experiment(folder)
    writer = is_claimed(folder, inside=True)
    under_way = list(_under_way(folder))
    lines: list[str] = []
    left: list[Callable[[], str]] = []
    for there, describe in zip(parts.values(), (_run, _comparison, _sweep), strict=True):
        if there:
            said, command = describe(folder)
            lines += said
            left += [command] if command else []
    if writer:
        lines.append("running: another process")
    lines += [one.text() for one in under_way]
    notes = sorted((folder / files.STORE_FOLDER / files.WORK).glob(f"*/{FAILED}"))
    lines += [f"failed: {one.step}: {one.error}" for one in (read_needed(note, Failure) for note in notes)]
    seconds, records = 0.0, list((folder / files.STORE_FOLDER / files.RECORDS).glob("*.json"))
    for file in records:
        seconds += read_needed(file, _Spent).seconds
    seconds += sum(one.seconds for one in under_way)
    lines.append(f"store: {len(records)} finished steps, {_spent(seconds)} of work")
    if writer:
        commands = ["wait; a run has its folder for itself"]
    elif left:
        commands = [command() for command in left]
    else:
        prompt, adapter = (shlex.quote(str(folder / name)) for name in (files.PROMPT_FILE, files.ADAPTER_FOLDER))
        told = f"--jsonl < {prompt}" if is_there(folder / files.PROMPT_FILE) else '"..."'
        commands = [f"grasp-lora predict {adapter} {told}"] if is_there(folder / files.ADAPTER_FOLDER) else []
    return [*(escaped(line) for line in lines), *(f"next: {escaped(command)}" for command in commands)]


def _run(folder: Path) -> Description:
    info = read_needed(folder / files.RUN_FILE, files.RunInfo)
    cost = read_record(folder / files.COST_FILE, dict[str, float]) or {}
    recipe = parse(read_text(folder / RECIPE_FILE) or "{}", RECIPE_FILE)
    final = check_shape(adapter_of(_Choices).validate_python, recipe, folder / RECIPE_FILE).final
    done = [f"{stage} {_spent(cost[stage])}" for stage in STAGES if stage in cost]
    finished = is_there(folder / files.METRICS_FILE)
    lines = [
        f"{folder}: run {info.name}, begun {info.created} on {info.backbone.name}; {'finished' if finished else 'not finished'}",
        f"done: {', '.join(done) or 'nothing'}",
    ]
    if finished:
        return lines, None
    lines.append(f"still to do: {', '.join(final.missing(cost)) or 'the last files'}")
    return lines, partial(_run_again, info, folder)


def _comparison(folder: Path) -> Description:
    file = folder / files.COMPARE_FOLDER / COMPARISON_FILE
    if not is_there(file):
        said = f"{file.parent}: comparison without a table yet; the first seed is not finished"
        return [said], partial(_again, "compare", None, folder)
    found = Comparison.read(file)
    settings = found.settings
    done = len(found.folds) or sum(seed in found.seeds for seed in settings.seeds)
    asked = settings.folds or len(settings.seeds)
    splits = len(settings.split_seeds) - len(found.other_splits)
    whole = done == asked and not splits
    text = f"{file.parent}: comparison of {len(found.rows)} methods; {done} of {asked} {found.runs} finished" + (
        f", {splits} further splits to do" if splits else ""
    )
    return [text], None if whole else partial(_again, "compare", found.name, folder)


def _sweep(folder: Path) -> Description:
    file = folder / files.SWEEP_FOLDER / SWEEP_FILE
    found = read_record(file, dict[str, Any])
    if found is None:
        return [f"{file.parent}: sweep without a finished trial"], partial(_again, "sweep", None, folder)
    done, best = len(found.get("trials", ())), found.get("best")
    asked = max(done, found.get("asked", 0))
    what = "none could be finished" if best is None else f"the best is number {best}"
    text = f"{file.parent}: sweep, {done} of {asked} trials done" + (f"; {what}" if done else "")
    return [text], partial(_again, "sweep", found.get("name"), folder) if done < asked else None


def _under_way(folder: Path) -> Iterator[UnderWay]:
    """The steps that have a folder of work."""
    for place in sorted((folder / files.STORE_FOLDER / files.WORK).glob("*/*")):
        if (place.parent / FAILED).is_file():  # nobody will finish it
            continue
        worker = "another process" if is_claimed(place.parent) else None
        whole = [path for path in place.glob("checkpoint-*") if is_there(path / MANIFEST)]
        try:
            newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
            state, manifest = (
                json.loads((newest / name).read_text(encoding="utf-8")) for name in (TRAINER_STATE, MANIFEST)
            )
            age = time.time() - (newest / MANIFEST).stat().st_mtime
            yield UnderWay(
                place.name, int(state["global_step"]), int(state["max_steps"]), float(manifest["seconds"]), age, worker
            )
        except (OSError, ValueError, TypeError, KeyError):  # none yet
            with suppress(OSError):  # it went while we looked
                yield UnderWay(place.name, age=time.time() - place.stat().st_ctime, worker=worker)


def _again(command: str, name: str | None, folder: Path) -> str:
    recipe = name if name in builtin_recipes() else f"{name or 'RECIPE'}.yaml"
    return _goes_on([command, recipe, "--output", str(folder)], ", with the options that it had")


def _run_again(info: files.RunInfo, folder: Path) -> str:
    """The command that goes on with a run: what it had set counts."""
    recipe = recipe_file(folder)
    overrides = None if recipe is None else overrides_of(folder, recipe)
    lacks = "--set" if overrides is None else ""
    if recipe is not None and overrides is not None:
        from grasp_lora.bench.finished import places_of
        from grasp_lora.recipes.load import load_recipe

        found = {key for key, _ in places_of(*load_recipe(recipe, overrides))}
        lacks = "" if {key for key in info.inputs if "files." in key} <= found else "--set data.root=FOLDER"
    changes = [part for override in overrides or () for part in ("--set", override)]
    code = ["--allow-code"] * any(key.startswith("code.") for key in info.inputs)
    words = ["run", recipe or f"{info.name}.yaml", *changes, *code, "--output", str(folder)]
    return _goes_on(words, lacks and f", with the {lacks} that it had")


def _goes_on(words: list[str], what_else: str) -> str:
    return f"the command that began it goes on{what_else}, such as {shlex.join(['grasp-lora', *words])}"


def _spent(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _no_experiment(folder: Path) -> RecipeError:
    inside = sorted(file.parent.name for file in folder.glob(f"*/{files.RUN_FILE}")) if is_folder(folder) else []
    if inside:
        return RecipeError(
            f"{folder} is no run itself, but holds some: {', '.join(map(escaped, inside[:10]))}; give one of them"
        )
    if is_file(folder):
        return RecipeError(f"{folder} is a file; give the folder of a run, such as runs/NAME")
    if not is_folder(folder):
        return RecipeError(
            f"{folder} is not there: no run has begun in it, or the path is another; begin with grasp-lora run"
        )
    return RecipeError(f"{folder} holds no run, comparison or sweep; give the folder of one, such as runs/NAME")
