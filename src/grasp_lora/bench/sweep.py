"""`grasp-lora sweep`: Optuna over any keys of the recipe, what one would do to choose a prune ratio without a controller.

A trial is the final run of the recipe with the trial's values, judged by its dev loss; the test split is never looked at. Steps
that trials share, such as the adapters to merge, are done once (`Records`). All that is known of the trials stands in Optuna's
journal, a file of JSON lines: a sweep that was killed goes on to the same trials as one that was not.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grasp_lora.bench.experiment import check_experiment_folder
from grasp_lora.bench.search_space import Grid, Parameter, search_space, trial_recipe
from grasp_lora.bench.session import Session, hash_of
from grasp_lora.bench.store import Record
from grasp_lora.data.places import resolve_file
from grasp_lora.errors import RecipeError
from grasp_lora.models.settings import EMBEDDED_NAME
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.storage.files import write_whole
from grasp_lora.storage.folder import working_in

SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("none", "median", "halving", "wilcoxon")
TRIALS = 20
BEST_FILE = "best.yaml"
EVERY = "final.training.evaluate_every"


@dataclass(frozen=True)
class SweepSettings:
    """What is tried.

    Args:
        params: keys of the recipe with their ranges; see `search_space`.
        trials: how many are to be finished in the end, those of earlier calls included; None takes 20, or the whole grid.
        sampler: `tpe` (Optuna's tree-structured Parzen estimator), `random`, or `grid`: all combinations, in random order.
        pruner: `none`, `median`, `halving` (asynchronous successive halving) or `wilcoxon` (a paired test of the dev examples'
            losses against the best trial): stops a trial after a dev evaluation that is bad beside those of others.
        seed: of the sampler; None takes the recipe's.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    params: tuple[str, ...]
    trials: int | None = None
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int | None = None

    def __post_init__(self) -> None:
        for what, allowed in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
            if getattr(self, what) not in allowed:
                raise ValueError(f"{what} is {getattr(self, what)!r}; allowed: {', '.join(allowed)}")
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials is {self.trials}; it must be at least 1")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")


@dataclass
class SweepProgress:
    """Where a sweep reports to while it works; this one is silent."""

    def begin(self, trials: int, finished: int) -> None:
        """Take how many trials there will be, and how many of them were finished before."""

    def trial(self, number: int, values: Mapping[str, Any]) -> None:
        """A trial begins; the first one is number 1."""

    def record(self, record: Record, there: bool) -> None:
        """A step is done, now or already before."""

    def done(self, row: Mapping[str, Any]) -> None:
        """Take a finished trial as `sweep.json` holds it."""


def sweep(
    session: Session, folder: Path, settings: SweepSettings, progress: SweepProgress | None = None
) -> dict[str, Any]:
    """Run the trials that are not finished yet, write `sweep.json` and `best.yaml`, and return the content of the former.

    Args:
        session: of the recipe, with nothing loaded yet; an unset prune ratio counts as 0.
        folder: of this one sweep.
        settings: parameters, sampler and the rest.
        progress: told how far the work is.

    Raises:
        GraspError: Optuna is missing; the recipe, the data, an adapter or a parameter does not fit; the folder holds another
            sweep, cannot be written, or another process writes there; no trial could be finished. What is finished stays.
        Interrupted: SIGTERM or SIGINT came.
    """
    _check_installed("optuna")
    from grasp_lora.bench.trials import Trials, quiet_optuna

    check_experiment_folder(folder)
    given = session.recipe
    # Trials are not scored, so that no metric has to be there.
    recipe = trial_recipe(given.model_copy(update={"metrics": ()}), {})  # which starts from a merge
    parameters = search_space(settings.params, recipe)
    if settings.pruner != "none" and any(f"{EVERY}.".startswith(f"{one.key}.") for one in parameters):
        raise RecipeError(f"{EVERY} cannot be swept with a pruner, which compares trials evaluation by evaluation")
    _check_moments(settings, parameters, recipe)
    seed = recipe.seed if settings.seed is None else settings.seed
    grid = Grid(parameters, seed) if settings.sampler == "grid" else None
    wanted = settings.trials or TRIALS if grid is None else min(settings.trials or len(grid), len(grid))
    base = Session(recipe, session.base, session.progress)
    base.prepare()
    if not base.splits.dev:
        raise RecipeError("a sweep needs a dev split, but data.target.dev is 0; give it at least 1 example")
    place = ["before it began"]
    with working_in(folder, lambda: place[0]), quiet_optuna():
        identity = _identity(base, settings, seed)
        trials = Trials(base, folder, identity, parameters, grid, settings, seed, progress or SweepProgress(), place)
        content = trials.run(wanted)
        rows, best = content["trials"], content["best"]
        if best is None:
            reason = next((row["error"] for row in rows if "error" in row), "all were pruned")
            raise RecipeError(f"none of the {len(rows)} trials could be finished; the first says: {reason}")
        tuned = trial_recipe(recipe.model_copy(update={"metrics": given.metrics}), rows[best - 1]["values"])
        write_whole(folder / BEST_FILE, relocated(tuned, session.base, folder))
    return content


def _check_moments(settings: SweepSettings, parameters: Sequence[Parameter], recipe: Recipe) -> None:
    """A pruner compares trials evaluation by evaluation, so each has to come after as many epochs in all of them."""
    if settings.pruner == "none" or recipe.final.training.evaluate_every % 1 == 0:
        return
    steps = ("final.training.batch_size", "final.training.accumulation")
    for one in parameters:
        if any(f"{key}.".startswith(f"{one.key}.") for key in steps):
            raise RecipeError(
                f"{one.key} cannot be swept with a pruner while {EVERY} is {recipe.final.training.evaluate_every}: "
                f"steps of other sizes do not divide an epoch alike; set {EVERY} to 1, or leave the pruner out"
            )


def relocated(recipe: Recipe, base: Path, folder: Path) -> str:
    """Return a recipe as YAML that can be read from another folder: relative paths that start from `base` start from there.

    Args:
        recipe: all defaults are filled in.
        base: folder that its relative paths start from.
        folder: where the text will stand.
    """

    def moved(name: str) -> str:
        return Path(os.path.relpath(base.resolve() / name, folder.resolve())).as_posix()

    def folder_moved(name: str) -> str:
        return moved(name) if not Path(name).is_absolute() and (base / name).is_dir() else name

    content = recipe.model_dump(mode="json")
    data, root = content["data"], recipe.data.root
    for corpus in filter(None, (data["source"], data["target"])):
        for key in [key for key in corpus if key.endswith("files")]:
            found = {name: resolve_file(name, root, base) for name in corpus[key]}
            corpus[key] = [
                moved(name) if file == base / name and not Path(name).is_absolute() else name
                for name, file in found.items()
            ]
    if root is not None:
        data["root"] = folder_moved(root)
    if recipe.backbone.name != EMBEDDED_NAME:
        content["backbone"]["name"] = folder_moved(recipe.backbone.name)
    content["source"]["adapters"] = [folder_moved(place) for place in recipe.source.adapters]
    if recipe.target.adapter is not None:
        content["target"]["adapter"] = folder_moved(recipe.target.adapter)
    models = content["bertscore"]["models"]
    content["bertscore"]["models"] = {language: folder_moved(model) for language, model in models.items()}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _check_installed(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise RecipeError(f"a sweep needs {module}, which is not installed: pip install 'grasp-lora[sweep]'")


def _identity(session: Session, settings: SweepSettings, seed: int) -> dict[str, Any]:
    """What must not change while a sweep goes on, since its trials are compared with each other."""
    identity = {
        "recipe": session.recipe.fingerprint(),
        "params": list(settings.params),
        "sampler": settings.sampler,
        "pruner": settings.pruner,
        "seed": seed,
        "backbone": session.backbone.fingerprint,
        "dtype": str(session.backbone.model.dtype),
        "data": hash_of(session.splits),
    }
    given = {place: adapter.identity for place, adapter in session.existing_adapters.items()}
    return identity | ({"adapters": given} if given else {})
