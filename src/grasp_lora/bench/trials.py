"""The trials of a sweep: Optuna proposes values and stops what is bad, a `Bench` does the work.

Everything that is known of the trials stands in Optuna's journal, a file of JSON lines in the sweep's folder. This module needs
Optuna, an extra.
"""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from grasp_lora.bench.search_space import Grid, Parameter, trial_recipe
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import Records
from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.storage.files import write_json, write_whole
from grasp_lora.text.display import escaped
from grasp_lora.training.settings import TRAINED_AS_MEASURED, TrainingSettings

if TYPE_CHECKING:
    from grasp_lora.bench.sweep import SweepProgress, SweepSettings

JOURNAL_FILE = "journal.jsonl"
FALSE_ALARMS = (
    0.1  # share of trials that Wilcoxon's test may stop although they are no worse; Optuna's default for one test
)
_STUDY = "sweep"
_SETTINGS, _FACTS, _LOSSES = "settings", "facts", "losses"  # user attributes of the study and of its trials


class Trials:
    """The trials of one sweep, those of earlier calls included.

    Args:
        base: session of the recipe whose values the trials change.
        folder: for the journal, `sweep.json` and the records; no other process writes there.
        identity: what must be as it was when the sweep began, as plain JSON values.
        parameters: what is varied.
        grid: the combinations to try, None to let the sampler choose.
        settings: sampler and pruner.
        seed: of the sampler.
        progress: told of each trial.
        place: its only entry is kept at where the work is, for messages.

    Raises:
        RecipeError: the folder holds another sweep, or a journal that cannot be read.
    """

    def __init__(
        self,
        base: Session,
        folder: Path,
        identity: Mapping[str, Any],
        parameters: Sequence[Parameter],
        grid: Grid | None,
        settings: "SweepSettings",
        seed: int,
        progress: "SweepProgress",
        place: list[str],
    ) -> None:
        self._base = base
        self._folder = folder
        self._study = _study(folder, identity, settings.pruner)
        self._grid = grid
        self._settings = settings
        self._seeds = base.recipe.model_copy(update={"seed": seed})
        self._progress = progress
        self._place = place
        self._records = Records(folder, progress.record)
        self._choices = {one.key for one in parameters if one.choices is not None}
        self._distributions = {one.key: _distribution(one) for one in parameters}

    def run(self, wanted: int) -> dict[str, Any]:
        """Finish trials until there are so many in all.

        Returns:
            The content of `sweep.json`, which is written after each trial.

        Raises:
            GraspError: a record is damaged.
        """
        for stopped in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(stopped.number, state=TrialState.FAIL)  # its process is dead: we hold the lock
        done = len(self._finished())
        self._progress.begin(max(wanted, done), done)
        content = self._content()
        while done < wanted:
            self._place[0] = f"in trial {done + 1} of {wanted}"
            self._judge(self._ask(done), done + 1)
            done += 1
            content = self._content()
            write_json(self._folder / "sweep.json", content)
            self._progress.done(content["trials"][-1])
        return content

    def _ask(self, number: int) -> optuna.Trial:
        """The next trial. Its seed is its own, so that it does not matter how often the sweep was interrupted before."""
        seed = self._seeds.seed_of(f"sweep {number}")
        self._study.sampler = (
            optuna.samplers.TPESampler(seed=seed)
            if self._settings.sampler == "tpe"
            else optuna.samplers.RandomSampler(seed=seed)
        )
        # Optuna's own grid sampler is made for `optimize`, and counts trials that were killed.
        waiting = (TrialState.WAITING,)
        if self._grid is not None and not self._study.get_trials(deepcopy=False, states=waiting):
            self._study.enqueue_trial({key: json.dumps(value) for key, value in self._grid[number].items()})
        return self._study.ask(self._distributions)

    def _judge(self, trial: optuna.Trial, number: int) -> None:
        """Do what the trial asks for and tell Optuna what came out."""
        values = self._values(trial.params)
        self._progress.trial(number, values)
        for earlier in self._finished():
            if earlier.params == trial.params:
                self._repeat(trial, earlier)
                return
        try:
            session = self._base.variant(trial_recipe(self._base.recipe, values))
            session.prepare()
        except GraspError as error:  # each value is allowed, but not all of them together
            self._tell(trial, None, {"error": str(error)})
            return
        self._run(trial, session)

    def _run(self, trial: optuna.Trial, session: Session) -> None:
        stage = session.recipe.final
        evaluations = _Evaluations(trial, stage.training, len(session.splits.train), self._gives_up)
        session.on_dev = evaluations.take
        bench = Bench(session, session, self._records)
        facts: dict[str, Any] = {}
        started = time.perf_counter()
        try:
            merged = bench.merged()
            facts["parents"] = {one.key: [one.seconds, one.work] for one in merged.records}
            started = time.perf_counter()
            adapter = bench.finetuned(merged, stage.prune_ratio or 0.0)
        except (optuna.TrialPruned, GraspError) as stop:
            if isinstance(stop, RecipeError):  # a record is damaged: no fault of the values
                raise
            facts |= evaluations.facts(len(session.splits.dev)) | {"seconds": round(time.perf_counter() - started, 3)}
            if isinstance(stop, GraspError):  # the training diverged, or these adapters do not go together
                facts |= {"dev_loss": None, "error": str(stop)}
            self._tell(trial, None, facts)
        else:
            record = adapter.records[-1]
            if not evaluations.kept:  # the run was finished in a call that was killed before it could tell
                rows = [row for row in record.result["history"] if "dev_loss" in row]
                for evaluation, row in enumerate(rows):
                    trial.report(row["dev_loss"], evaluation)
            elif self._settings.pruner == "wilcoxon":
                trial.set_user_attr(_LOSSES, evaluations.kept)
            result = {key: record.result[key] for key in ("dev_loss", "steps", "best_step")}
            facts |= result | {"seconds": record.seconds, "work": record.work, "adapter": adapter.key}
            self._tell(trial, result["dev_loss"], facts)

    def _repeat(self, trial: optuna.Trial, earlier: FrozenTrial) -> None:
        """A trial of the same values as an earlier one ends as that did, at no cost."""
        for evaluation, loss in earlier.intermediate_values.items():
            trial.report(loss, evaluation)
        facts = dict(earlier.user_attrs[_FACTS]) | {"seconds": 0.0, "work": 0, "repeats": True}
        self._tell(trial, facts["dev_loss"] if _is_complete(earlier) else None, facts)

    def _tell(self, trial: optuna.Trial, loss: float | None, facts: Mapping[str, Any]) -> None:
        """End a trial: complete with a loss, else as a pruned one, which Optuna's samplers learn from."""
        trial.set_user_attr(_FACTS, dict(facts))
        if loss is None:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, loss)

    def _gives_up(self, trial: optuna.Trial, losses: Sequence[float], evaluation: int, looks: int) -> bool:
        """Whether the pruner stops a trial after an evaluation.

        Wilcoxon's test pairs values by the number of a problem instance, here the dev example, and `Trial.report` takes one value
        for each: once a run were over, when no training is saved. So the losses that a trial has at an evaluation, of the
        adapter that it would keep by then, are tested against those that the best trial had at the same evaluation (or its
        last one, if it stopped before). Values of several evaluations are never pooled: those of one example are not
        independent. A trial is tested at each evaluation, so the p-value is divided by their number (Bonferroni), for which the
        pruner's documentation asks in words.
        """
        if self._settings.pruner != "wilcoxon":
            return trial.should_prune()
        rivals = [one for one in self._finished() if _LOSSES in one.user_attrs]
        if not rivals:
            return False
        best = min(rivals, key=lambda one: one.user_attrs[_FACTS]["dev_loss"]).user_attrs[_LOSSES]
        theirs = best[min(evaluation, len(best) - 1)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "WilcoxonPruner is experimental", optuna.exceptions.ExperimentalWarning)
            pruner = optuna.pruners.WilcoxonPruner(p_threshold=FALSE_ALARMS / looks)
        pair = optuna.create_study()
        pair.add_trial(_measured(theirs))
        return pruner.prune(pair, _measured(losses))

    def _finished(self) -> list[FrozenTrial]:
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        return self._study.get_trials(deepcopy=False, states=states)

    def _values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {key: json.loads(value) if key in self._choices else value for key, value in params.items()}

    def _content(self) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        parents: dict[str, list[float]] = {}
        for number, trial in enumerate(self._finished(), start=1):
            facts = dict(trial.user_attrs[_FACTS])
            parents |= facts.pop("parents", {})
            state = "complete" if _is_complete(trial) else "failed" if "error" in facts else "pruned"
            empty = {"dev_loss": None, "steps": 0, "seconds": 0.0, "work": 0}
            rows.append({"trial": number, "values": self._values(trial.params), "state": state, **empty, **facts})
        complete = [row for row in rows if row["state"] == "complete"]
        seconds, work = (sum(row[key] for row in rows) for key in ("seconds", "work"))
        return {
            "name": self._base.recipe.name,
            "backbone_name": self._base.backbone.name,
            "language": self._base.language,
            **self._study.user_attrs[_SETTINGS],
            "dev_examples": len(self._base.splits.dev),
            "trials": rows,
            "best": min(complete, key=lambda row: row["dev_loss"])["trial"] if complete else None,
            "cost": {
                "runs": sum(row["steps"] > 0 and "repeats" not in row for row in rows),
                "seconds": seconds,
                "seconds_with_parents": seconds + sum(one[0] for one in parents.values()),
                "work": work,
                "work_with_parents": work + sum(one[1] for one in parents.values()),
            },
        }


class _Evaluations:
    """The dev evaluations of one trial's final run: told to Optuna as they come; the run ends if its pruner says so.

    They are numbered, the one before training 0, so that trials of different batch sizes can be compared. No trial is given up
    before training, when the ratio alone decides, nor at the last step, when there is nothing left to save.

    Args:
        trial: Optuna's.
        training: of the final run.
        examples: in the train split.
        gives_up: asked with the trial, the losses, the evaluation's number and how many times it will be asked at most.
    """

    def __init__(
        self,
        trial: optuna.Trial,
        training: TrainingSettings,
        examples: int,
        gives_up: Callable[[optuna.Trial, Sequence[float], int, int], bool],
    ) -> None:
        self.kept: list[list[float]] = []  # of each evaluation: the examples' losses of the adapter kept by then
        self._trial = trial
        self._training = training
        self._last_step = training.steps(examples)
        every = max(1, round(training.evaluate_every * training.steps_per_epoch(examples)))
        self._looks = max(1, math.ceil(self._last_step / every) - 1)
        self._gives_up = gives_up
        self._step = 0

    def take(self, step: int, losses: Sequence[float]) -> None:
        """Take an evaluation.

        Raises:
            optuna.TrialPruned: the trial is given up.
        """
        better = not self.kept or self._training.keep == "last" or fmean(losses) < fmean(self.kept[-1])
        evaluation, self._step = len(self.kept), step
        self.kept.append(list(losses) if better else self.kept[-1])
        self._trial.report(fmean(losses), evaluation)
        if 0 < step < self._last_step and self._gives_up(self._trial, self.kept[-1], evaluation, self._looks):
            raise optuna.TrialPruned

    def facts(self, dev_examples: int) -> dict[str, Any]:
        """What an unfinished run did and cost, up to its last evaluation."""
        trained = self._step * self._training.batch_size * self._training.accumulation
        measured = len(self.kept) * dev_examples
        loss = fmean(self.kept[-1]) if self.kept else None
        return {"dev_loss": loss, "steps": self._step, "work": TRAINED_AS_MEASURED * trained + measured}


class _Halving(optuna.pruners.SuccessiveHalvingPruner):
    """Looks at no trial that a kill ended: Optuna's own would let it compete with its repetition."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the trial is to stop."""
        return super().prune(_Living(study), trial)  # type: ignore[arg-type]


class _Living:
    """A study without its failed trials."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, *given: Any, **more: Any) -> list[optuna.trial.FrozenTrial]:
        """All trials but the failed ones."""
        return [one for one in self._study.get_trials(*given, **more) if one.state != TrialState.FAIL]


def _study(folder: Path, identity: Mapping[str, Any], pruner: str) -> optuna.Study:
    """Open the study in a folder, or begin one."""
    file = folder / JOURNAL_FILE
    _drop_unfinished_line(file)
    pruners = {
        "none": optuna.pruners.NopPruner,
        "median": lambda: optuna.pruners.MedianPruner(n_warmup_steps=1),
        "halving": lambda: _Halving(min_resource=1),
        "wilcoxon": optuna.pruners.NopPruner,  # asked apart, see `_gives_up`
    }
    try:
        storage = JournalStorage(JournalFileBackend(str(file), _Locked(str(file))))
        study = optuna.create_study(storage=storage, study_name=_STUDY, load_if_exists=True, pruner=pruners[pruner]())
    except (ValueError, KeyError) as error:
        raise RecipeError(
            f"{file} cannot be read: it was changed; remove it to begin the sweep anew (finished runs stay on record)"
        ) from error
    before = study.user_attrs.get(_SETTINGS)
    if before is None:
        study.set_user_attr(_SETTINGS, dict(identity))
    elif changed := [name for name, value in identity.items() if before.get(name) != value]:
        raise RecipeError(
            f"{escaped(str(folder))} holds a sweep with other {', '.join(changed)}; give those, or another folder with --output"
        )
    return study


class _Locked(JournalFileOpenLock):
    """Optuna's lock of the journal, left out: the folder is locked already, and a killed process would leave this one behind."""

    def acquire(self) -> bool:
        """Do nothing."""
        return True

    def release(self) -> None:
        """Do nothing."""


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Let Optuna log no more than warnings inside the context: trials are shown by the sweep's own progress."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _drop_unfinished_line(file: Path) -> None:
    """Cut off the line that a killed process was writing: Optuna would append to it, and then not read the file again."""
    if file.is_file():
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            write_whole(file, whole)


def _distribution(parameter: Parameter) -> BaseDistribution:
    """The parameter as Optuna knows it; choices as JSON, since it keeps plain values only and takes 1 for true."""
    if parameter.choices is not None:
        return CategoricalDistribution([json.dumps(choice) for choice in parameter.choices])
    if parameter.whole:
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _measured(losses: Sequence[float]) -> FrozenTrial:
    """A trial that was measured on these examples."""
    return optuna.trial.create_trial(value=fmean(losses), intermediate_values=dict(enumerate(losses)))


def _is_complete(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE
