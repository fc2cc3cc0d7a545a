"""`grasp-lora sweep`: Optuna over any keys of the recipe, what one would do to choose a prune ratio without a controller.

A trial is the final run of the recipe with the trial's values, judged by its dev loss; the test split is never looked at. Its
work is a step on record, so what trials share is done once. `sweep.json` holds the finished trials: before each trial Optuna is
told of them, and its sampler takes a seed of the trial's own. So a sweep that was killed goes on to the same trials.
Where several processes sweep in one folder, as many trials are proposed at once, each process does those that no other one is at,
and they are told in their order: so the trials do not depend on who is faster.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from grasp_lora.bench.checks import check, check_config
from grasp_lora.bench.run_folder import STORE_FOLDER, SWEEP_FOLDER, check_place
from grasp_lora.bench.search_space import SAMPLERS, Parameter, propose, search_space, trial_recipe
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import WAIT, Store
from grasp_lora.bench.sweep_record import SWEEP_FILE, Identity, SweepCost, SweepResult, Trial
from grasp_lora.data.places import resolve_file
from grasp_lora.data.splits import hash_of
from grasp_lora.errors import (
    AdapterError,
    DivergedError,
    LackOfMemoryError,
    ProbeError,
    RecipeError,
    UntrainedError,
)
from grasp_lora.models.settings import EMBEDDED_NAME
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.storage.checkpoints import Checkpointing
from grasp_lora.storage.claims import Busy, Workplace, claim, working_in
from grasp_lora.storage.files import write_json, write_whole
from grasp_lora.storage.reading import adapter_of
from grasp_lora.text.display import escaped
from grasp_lora.text.names import needs

TRIALS = 20
BEST_FILE = "best.yaml"


@dataclass(frozen=True)
class SweepSettings:
    """What is tried.

    Args:
        params: what to vary: KEY=low..high, KEY=low..high:log, KEY=low..high/n for n values, KEY=[a, b].
        trials: how many are to be finished in the end, those of earlier calls included.
        sampler: `tpe` (Optuna's tree-structured Parzen estimator) or `random`.
        seed: seed of the sampler; None takes the recipe's.
        workers: how many trials are proposed at once, for so many processes that sweep in one folder; at least 1.

    Raises:
        ValueError: an unknown sampler, or a number out of range.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    params: tuple[str, ...]
    trials: int = TRIALS
    sampler: str = "tpe"
    seed: int | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; allowed: {', '.join(SAMPLERS)}")
        if self.trials < 1:
            raise ValueError(f"trials is {self.trials}; it must be at least 1")
        if not 1 <= self.workers <= self.trials:
            raise ValueError(
                f"workers is {self.workers}; allowed: 1 to {self.trials}, the number of trials, since each does one at a time"
            )
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")


def sweep(session: Session, folder: Path, settings: SweepSettings) -> SweepResult:
    """Run the trials that are not finished yet, write `sweep.json` and `best.yaml`, and return the content of the former.

    Args:
        session: of the recipe, with nothing loaded yet, whose progress is told how far the work is; an unset prune ratio counts
            as 0.
        folder: of the experiment; the sweep writes into its folder sweep and shares its store.
        settings: parameters, sampler and the rest.

    Raises:
        GraspError: Optuna is missing; the recipe, the data, an adapter or a parameter does not fit; the folder holds another
            sweep, cannot be written, or another process writes there; something else than its values, such as a lack of memory,
            stopped a trial, which is tried again next time; no trial could be finished. What is finished stays.
        Interrupted: SIGTERM or SIGINT came.
    """
    needs("a sweep", "optuna", "optuna", extra="sweep")
    check_place(folder)
    given = session.recipe
    # Trials are not scored, so that no metric has to be there.
    recipe = trial_recipe(given.model_copy(update={"metrics": ()}), {})
    parameters = search_space(settings.params, recipe)
    with working_in(folder) as place:
        session = Session(recipe, session.base, session.progress)
        check(session)
        if not session.splits.dev:
            raise RecipeError("a sweep needs a dev split, but data.target.dev is 0; give it at least 1 example")
        session.checkpoints = Checkpointing(recipe.save_every, lambda: place.interruption.asked_by)
        place.begin(shared=True)
        check_config(folder / STORE_FOLDER, session.backbone)
        (folder / SWEEP_FOLDER).mkdir(exist_ok=True)  # before the lock beside it, which alone is no experiment
        result = _Search(session, place, settings, parameters).run()
        if result.best is None:
            raise RecipeError(
                f"none of the {len(result.trials)} trials could be finished; the first says: {result.trials[0].error}"
            )
        best = result.trials[result.best - 1]
        tuned = trial_recipe(recipe.model_copy(update={"metrics": given.metrics}), best.values)
        with claim(folder / SWEEP_FOLDER, wait=True):
            write_whole(folder / SWEEP_FOLDER / BEST_FILE, relocated(tuned, session.base, folder / SWEEP_FOLDER))
    return result


class _Search:
    """One sweep that is under way."""

    def __init__(
        self,
        session: Session,
        place: Workplace,
        settings: SweepSettings,
        parameters: Sequence[Parameter],
    ) -> None:
        self._place, self._progress = place, session.progress
        self._session, self._settings, self._parameters = session, settings, parameters
        self._file = place.folder / SWEEP_FOLDER / SWEEP_FILE
        self._store = Store(place.folder / STORE_FOLDER, self._progress, place.interruption)
        self._identity = _identity(session, settings, parameters)
        self._trials: list[Trial] = []
        self._parents: dict[str, tuple[float, int]] = {}

    def run(self) -> SweepResult:
        """Finish trials until there are as many as asked for; `sweep.json` is written after each."""
        self._remember()
        wanted, workers = self._settings.trials, self._settings.workers
        self._progress.begin(max(wanted, len(self._trials)), len(self._trials))
        while (done := len(self._trials)) < wanted:
            begun = done // workers * workers  # number of trials in the blocks before this one
            proposed = [trial.values for trial in self._trials[begun:]]
            while begun + len(proposed) < min(begun + workers, wanted):
                proposed.append(self._proposed(self._trials[:begun], proposed))
            self._finish(begun, proposed)
        return self._result()

    def _finish(self, begun: int, proposed: Sequence[Mapping[str, Any]]) -> None:
        """Do the trials of a block that no other process is at, and wait for those that one is.

        Args:
            begun: trials before the block.
            proposed: the values of its trials, those of finished ones included.
        """
        tried: dict[int, Trial] = {}
        last = begun + len(proposed)
        while True:
            for number, values in enumerate(proposed, start=begun + 1):
                if number <= len(self._trials) or number in tried:
                    continue
                self._place.place = f"in trial {number} of {self._settings.trials}"
                self._progress.stage(f"trial {number}: {shown(values)}")
                with suppress(Busy):
                    tried[number] = self._repeated(number, values) or self._tried(number, values)
                while (trial := tried.get(len(self._trials) + 1)) is not None:
                    self._tell(trial)
            if len(self._trials) == last:
                return
            self._progress.stage("waiting for what other processes do in this folder")
            time.sleep(WAIT)

    def _tell(self, trial: Trial) -> None:
        """Take a trial up, after all those before it."""
        self._trials.append(self._repeated(trial.trial, trial.values) or trial)
        with claim(self._file.parent, wait=True):
            before = self._read()
            self._refuse_other(before)
            if before is None or len(before.trials) < len(self._trials):  # else another process is ahead
                write_json(self._file, asdict(self._result()))
        self._progress.trial(self._trials[-1])
        self._progress.done(1)

    def _remember(self) -> None:
        """Take up the trials that are in the folder."""
        with claim(self._file.parent, wait=True):
            before = self._read()
            self._refuse_other(before)
            if before is None:
                write_json(self._file, asdict(self._result()))  # another sweep that begins sees what this one is
            else:
                self._trials, self._parents = before.trials, before.parents

    def _refuse_other(self, before: SweepResult | None) -> None:
        if before is None:
            return
        told, asked = asdict(before.identity), asdict(self._identity)
        if told["code"] is None:  # files of earlier versions name none
            told["code"] = asked["code"]
        if changed := [name for name, value in asked.items() if told[name] != value]:
            raise RecipeError(
                f"{escaped(str(self._file.parent))} holds a sweep with other {', '.join(changed)}; give those, or another "
                f"folder with --output{'' if before.trials else f', or remove {SWEEP_FILE}: it has no trial yet'}"
            )

    def _read(self) -> SweepResult | None:
        try:
            return adapter_of(SweepResult).validate_json(self._file.read_bytes()) if self._file.exists() else None
        except (OSError, ValidationError) as error:
            raise self._unreadable() from error

    def _proposed(self, told: Sequence[Trial], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The values of the next trial, beside others that are not finished; the sampler's seed is that of its number."""
        seeds = self._session.recipe.model_copy(update={"seed": self._identity.seed})
        finished = [(trial.values, trial.dev_loss) for trial in told]
        seed = seeds.seed_of(f"sweep {len(told) + len(others)}")
        try:
            return propose(self._parameters, finished, self._settings.sampler, seed, others)
        except ValueError as error:
            raise self._unreadable() from error

    def _repeated(self, number: int, values: Mapping[str, Any]) -> Trial | None:
        """The end of a trial whose values came before: as it was, at no cost."""
        for earlier in self._trials:
            if json.dumps(earlier.values) == json.dumps(values):
                return replace(earlier, trial=number, seconds=0.0, work=0, repeats=True)
        return None

    def _tried(self, number: int, values: Mapping[str, Any]) -> Trial:
        """Do what a trial asks for. It fails by its values alone; whatever else stops it ends the sweep.

        Raises:
            Busy: another process is at one of its steps.
            GraspError: such as a lack of memory, or a tracker that is out of reach.
        """
        started = time.perf_counter()
        check(self._session)  # what no value changes, so that an error below is of the values
        try:
            session = self._varied(values)
        except (RecipeError, AdapterError) as error:  # each value is allowed, but not all of them together
            if isinstance(error.__cause__, OSError):  # an adapter is out of reach
                raise
            return Trial(number, values, "failed", error=str(error))
        bench = Bench(session, session, self._store)
        try:
            bench = bench.decided
            merged = bench.merged()
            self._parents |= {one.key: (one.seconds, one.work) for one in merged.records}
            started = time.perf_counter()
            adapter = bench.finetuned(merged, session.recipe.final.prune_ratio or 0.0)
        except (DivergedError, ProbeError, AdapterError, UntrainedError, LackOfMemoryError) as error:
            if isinstance(error.__cause__, OSError) or (isinstance(error, LackOfMemoryError) and not self._by_values()):
                raise
            seconds = round(time.perf_counter() - started, 3)
            return Trial(number, values, "failed", seconds=seconds, error=str(error))
        record = adapter.records[-1]
        return Trial(
            number,
            values,
            dev_loss=record.result["dev_loss"],
            steps=record.result["steps"],
            best_step=record.result["best_step"],
            seconds=record.seconds,
            work=record.work,
            adapter=adapter.key,
        )

    def _by_values(self) -> bool:
        """Whether memory lacks by the values of a trial: it sufficed for another one, nobody shares it, and a key moves it."""
        fits = any(trial.dev_loss is not None for trial in self._trials)
        moves = any(one.key.startswith("lora.") or one.key.endswith("batch_size") for one in self._parameters)
        return fits and moves and self._settings.workers == 1

    def _varied(self, values: Mapping[str, Any]) -> Session:
        """The session of a trial, checked but for its trackers, which are those of every trial."""
        recipe, read = trial_recipe(self._session.recipe, values), self._session.existing_adapters
        checked = self._session.variant(recipe.model_copy(update={"report_to": ()}))
        places = [*recipe.source.adapters, *filter(None, [recipe.target.adapter])]
        if read.keys() >= set(places):  # else they are values of this trial
            checked.existing_adapters = {place: read[place] for place in places}
        check(checked)
        session = self._session.variant(recipe)
        session.existing_adapters = checked.existing_adapters
        return session

    def _result(self) -> SweepResult:
        session, trials = self._session, self._trials
        complete = [(trial.dev_loss, trial.trial) for trial in trials if trial.dev_loss is not None]
        # Other values may come to the same final run, such as target.on: auto to that of source or null.
        first = {trial.adapter or str(trial.trial): trial for trial in reversed(trials)}
        own = [trial for trial in trials if first[trial.adapter or str(trial.trial)] is trial]
        seconds, work = sum(trial.seconds for trial in own), sum(trial.work for trial in own)
        cost = SweepCost(
            runs=sum(trial.dev_loss is not None for trial in own),
            seconds=seconds,
            seconds_with_parents=seconds + sum(one[0] for one in self._parents.values()),
            work=work,
            work_with_parents=work + sum(one[1] for one in self._parents.values()),
        )
        return SweepResult(
            session.recipe.name,
            session.backbone.name,
            session.language,
            len(session.splits.dev),
            self._identity,
            list(trials),
            dict(self._parents),
            min(complete)[1] if complete else None,
            cost,
            max(self._settings.trials, len(trials)),
        )

    def _unreadable(self) -> RecipeError:
        return RecipeError(
            f"{escaped(str(self._file))} cannot be read as a sweep of these parameters: it was changed, or is of another "
            "version; remove it to begin the sweep anew (finished runs stay on record)"
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


def _identity(session: Session, settings: SweepSettings, parameters: Sequence[Parameter]) -> Identity:
    recipe, backbone = session.recipe, session.backbone
    return Identity(
        recipe.fingerprint(),
        list(settings.params),
        settings.sampler,
        recipe.seed if settings.seed is None else settings.seed,
        backbone.fingerprint,
        str(backbone.model.dtype),
        hash_of(session.splits),
        {place: adapter.identity for place, adapter in session.existing_adapters.items()},
        settings.workers,
    )


def shown(values: Mapping[str, Any]) -> str:
    """The values of a trial in one line."""
    return "  ".join(f"{key} {escaped(short(value))}" for key, value in values.items())


def short(value: Any) -> str:
    """A value for a table: a number with four digits, a list with commas."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
