"""The main job, from top to bottom: data, source, target, merge, controller, final, continued, evaluate, deliver.

A `Bench` does every step, and the folder's store remembers it, also for comparisons. A run that was stopped goes on
from there, inside a training to the same bits; with another number of processes from the beginning of that training. What a
person looks at is written beside the store as the stages end.
Nothing is written before the recipe, the backbone, the data and the adapters have been checked. Under torchrun all processes
train and measure together, the first one writes, and all of them have to see the folder.
"""

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grasp_lora.bench import run_folder as files
from grasp_lora.bench.all_rows import TrainedAgain, train_again
from grasp_lora.bench.checks import check, check_config, check_folder
from grasp_lora.bench.deliver import ALONE, candidates, choose, continue_source
from grasp_lora.bench.finished import inputs_of, is_finished, refuse_other_template
from grasp_lora.bench.outcomes import Adapter, Learned, Measured, names_of
from grasp_lora.bench.records import read_needed
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import Store
from grasp_lora.data.splits import SPLITS, group_numbers, hash_of
from grasp_lora.errors import AdapterError, DivergedError, ProbeError, RecipeError
from grasp_lora.method.masks import survival
from grasp_lora.method.rounds import RatioEstimate
from grasp_lora.models.adapters import restate_answers
from grasp_lora.models.settings import QUANTISERS
from grasp_lora.recipes.recipe import Recipe, seen_from
from grasp_lora.recipes.text import RECIPE_FILE
from grasp_lora.storage.checkpoints import Checkpointing
from grasp_lora.storage.claims import LOCK_FILE, Workplace, claim, working_in
from grasp_lora.storage.files import discard, sync, sync_all, vanished, write_json, write_jsonl, write_whole
from grasp_lora.storage.processes import is_first, join, on_first_process, world_size

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "sacrebleu", "rouge-score")


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Args:
        ratio: the learned prune ratio with its interval, or the one that the recipe gives.
        metrics: what each system is worth on dev and test.
        folder: of the run.
    """

    ratio: RatioEstimate
    metrics: files.Metrics
    folder: Path

    @property
    def adapter(self) -> Path:
        """The folder of the adapter that the run hands over."""
        return self.folder / files.ADAPTER_FOLDER

    @property
    def delivered(self) -> files.Delivered | None:
        """Which adapter that is and why, with difference and interval; None in a folder of an older version."""
        return self.metrics.delivered


def run(session: Session, folder: Path) -> RunResult:
    """Do what is not done yet of the main job.

    Args:
        session: of the recipe, with nothing loaded yet; its progress is told of stages and steps.
        folder: of the run; made if missing.

    Raises:
        GraspError: something the user gave does not fit, the folder cannot be written or another process writes there; what is
            done stays.
        Interrupted: SIGTERM or SIGINT came. A training finishes its step and saves a checkpoint, all else stops at once and is
            done again; a second signal ends the process.
    """
    check_folder(folder, session.recipe)
    with working_in(folder) as work:
        join(session.recipe.backbone.device)
        if not on_first_process(partial(is_finished, folder, session.recipe, session.base)):
            _Run(session, folder, work).execute()
        elif is_first() and (folder / LOCK_FILE).is_file():
            # A kill came when all was done: the file goes with the lock, unless someone lives who holds it.
            with suppress(RecipeError, OSError), claim(folder, wait=False, inside=True):  # a finished run is only read
                pass
        return on_first_process(partial(_result, session.recipe, folder))


class _Run:
    def __init__(self, session: Session, folder: Path, work: Workplace) -> None:
        self.session, self.recipe = session, session.recipe
        self.folder, self.progress, self.work = folder, session.progress, work
        self.cost: dict[str, float] = {}
        self.store = Store(folder / files.STORE_FOLDER, self.progress, work.interruption)
        session.checkpoints = Checkpointing(self.recipe.save_every, lambda: work.interruption.asked_by)

    def execute(self) -> None:
        """Go through the stages; each asks the bench for a step, which is on record or is done now."""
        recipe = self.recipe
        self._prepare()
        bench = Bench(self.session, self.session, self.store)
        with self._stage("data") as facts:
            facts |= on_first_process(self._write_data)
        with self._stage("source") as facts:
            for name, source in zip(names_of(len(bench.sources)), bench.sources, strict=True):
                facts |= self._show_trained(name, source)
        with self._stage("target") as facts:
            bench = bench.decided
            on = bench.recipe.target.on
            facts |= self._show_trained("target", bench.target, alone=on is None)
            if bench.target_on is not None:
                place = self.folder / "target" / files.TARGET_ON_FILE
                on_first_process(partial(write_json, place, bench.target_on.to_json()))
                facts |= {"on": on or "the backbone alone"}
        with self._stage("merge") as facts:
            merged = bench.merged()
            self._show_adapter(files.MERGED_FOLDER, merged)
            facts |= {"rule": recipe.merge.rule, "modules": len(merged.weights)}
        learned, ratio, start = None, recipe.final.prune_ratio, merged
        if ratio is None:
            with self._stage("controller") as facts:
                learned = bench.learned(recipe.controller)
                ratio, start = learned.ratio, learned.start
                facts |= self._show_learned(learned)
        with self._stage("final") as facts:
            final = bench.finetuned(start, ratio)
            facts |= {"prune_ratio": ratio} | self._show_trained(files.FINAL_FOLDER, final)
        continued, left_out = None, ""
        if recipe.final.deliver == "best":
            with self._stage("continued") as facts:
                continued, left_out = continue_source(bench)
                if continued is not None:
                    facts |= self._show_trained(files.CONTINUED_FOLDER, continued)
        systems = {ALONE: bench.backbone(), **candidates(bench, merged, None if left_out else continued, final)}
        with self._stage("evaluate") as facts:
            measured: dict[str, Measured] = {}
            for name, system in systems.items():
                measured[name] = bench.measured(system)
                self.progress.scored(name, measured[name].rows(self.session.splits.test))
            on_first_process(partial(self._write_answers, measured))
        with self._stage("deliver") as facts:
            delivered = choose(bench, systems, left_out)
            self._show_adapter(files.ADAPTER_FOLDER, systems[delivered.name])
            own = measured[delivered.name]
            facts |= {"adapter": delivered.title, "test_loss": own.test_loss, **own.values}
        all_rows = None
        if recipe.final.all_rows:
            with self._stage("all_rows") as facts:
                again = self._train_on_all_rows(bench, delivered.name, systems[delivered.name], ratio)
                all_rows = again.facts
                if again.adapter is not None and again.bench is not None:
                    self._show_adapter(files.ADAPTER_FOLDER, again.adapter)
                    measured[files.ALL_ROWS] = again.bench.measured(again.adapter)
                    self.progress.scored(files.ALL_ROWS, measured[files.ALL_ROWS].rows(self.session.splits.test))
                    on_first_process(partial(self._write_answers, measured))
                    facts |= {"rows": all_rows.rows, "test_loss": measured[files.ALL_ROWS].test_loss}
        # Last of all: with them the run is finished.
        on_first_process(partial(self._write_metrics, measured, learned, final, delivered, all_rows, bench.target_on))

    def _prepare(self) -> None:
        """Load and check everything, become the folder's only writer, and begin."""
        self.work.place = "before its first stage"
        existing = on_first_process(self.folder.is_dir)
        if existing:
            on_first_process(self.work.begin)
        self.progress.preparing()
        check(self.session)
        if not existing:
            on_first_process(self.work.begin)
        on_first_process(self._begin)
        self._check_sight()

    @contextmanager
    def _stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Tell of a stage, its facts and its seconds: those of its steps, whenever they were done."""
        self.work.interruption.stop_if_asked()
        self.work.place = f"in the stage {name}"
        self.progress.stage(name)
        facts: dict[str, Any] = {}
        started, before = time.perf_counter(), len(self.store.used)
        yield facts
        # A step whose adapter was missing is found on record first, and then done.
        used = list({record.key: (record, there) for record, there in self.store.used[before:]}.values())
        seconds = sum(record.seconds for record, _ in used) if used else time.perf_counter() - started
        on_first_process(partial(self._write_cost, name, seconds))
        self.progress.finished(name, seconds, facts, skipped=bool(used) and all(there for _, there in used))

    def _train_on_all_rows(self, bench: Bench, name: str, chosen: Adapter, ratio: float) -> TrainedAgain:
        """Train what was chosen on all rows; where that fails, what was chosen stays."""
        try:
            again = train_again(bench, name, chosen, ratio)
        except (DivergedError, ProbeError, AdapterError) as error:
            why = f"What was chosen could not be trained once more on all rows: {error}"
            return TrainedAgain(files.AllRows(why=why))
        if again.adapter is not None:
            self._show_adapter(files.ALL_ROWS, again.adapter)
            self._show_history(files.ALL_ROWS, again.adapter)
        return again

    def _show_trained(self, name: str, adapter: Adapter, *, alone: bool = True) -> dict[str, Any]:
        """Write the history of a training and its adapter into the run folder; a given adapter stays where it is.

        Of one that does nothing `alone`, the history alone is written: used or merged by itself it would mislead.
        """
        if adapter.folder is None:
            return {"adapter": adapter.title}
        record, folder = adapter.records[-1], self.folder / name
        if alone:
            self._show_adapter(name, adapter)
        else:
            adapter.load()  # as `_show_adapter` does
            on_first_process(partial(discard, folder))  # it may hold one of a run that took the other way
        self._show_history(name, adapter)
        facts = {key: record.result[key] for key in ("steps", "best_step", "dev_loss")}
        if name == files.FINAL_FOLDER:
            rows: list[dict[str, Any]] = record.result.get("kept") or [dict(row) for row in survival(adapter.weights)]
            on_first_process(partial(write_json, folder / files.SPARSITY_FILE, rows))
            kept, weights = (sum(row[name] for row in rows) for name in ("kept", "weights"))
            facts = {"measured_sparsity": 1 - kept / weights} | facts
        return facts

    def _show_history(self, name: str, adapter: Adapter) -> None:
        """Write the losses of a training, to its last step, which need not be one whose loss is logged."""
        result = adapter.records[-1].result
        rows, steps = result["history"], result["steps"]
        end = [{"step": steps}] if rows and rows[-1]["step"] < steps else []
        on_first_process(partial(write_jsonl, self.folder / name / files.HISTORY_FILE, [*rows, *end]))

    def _show_learned(self, learned: Learned) -> dict[str, Any]:
        folder, estimate = self.folder / files.CONTROLLER_FOLDER, learned.estimate
        names = {"history": files.HISTORY_FILE, "rounds": files.ROUNDS_FILE, "timings": files.TIMINGS_FILE}
        beside = {file: learned.record.result.get(name, []) for name, file in names.items()}
        for file, rows in beside.items():
            on_first_process(partial(write_jsonl, folder / file, rows))
        ratio = files.LearnedRatio.of(estimate, beside)
        on_first_process(partial(write_json, folder / files.RATIO_FILE, ratio.to_json()))
        return {"prune_ratio": estimate.ratio, "low": estimate.low, "high": estimate.high, "rounds": estimate.rounds}

    def _show_adapter(self, name: str, adapter: Adapter) -> None:
        """Put an adapter into a folder as a step has left it, or as it was given or merged; each file whole or not at all."""
        adapter.load()  # on all processes: it is made again where the store has it not, or only half

        def show() -> None:
            folder, draft = self.folder / name, self.folder / f"{name}.part"
            discard(draft)
            if adapter.folder is None:
                self.session.save(draft, adapter.weights)
            else:
                shutil.copytree(adapter.folder, draft)
                restate_answers(draft, self.session.answers)  # another recipe may have done the step
            sync_all(draft)
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(draft.iterdir()):
                file.replace(folder / file.name)
            draft.rmdir()
            sync(folder)

        on_first_process(show)

    def _write_data(self) -> dict[str, Any]:
        splits = self.session.splits
        ids = {name: [example.public_id for example in getattr(splits, name)] for name in SPLITS}
        report, groups = splits.report.to_json(), group_numbers(splits.test)
        facts = files.DataFacts(report=report, ids=ids, sha256=hash_of(splits), test_groups=groups)
        write_json(self.folder / files.DATA_FILE, facts.to_json())
        if not splits.report.chat_template:  # a prompt in a chat template is not what `predict` is given
            prompt = json.dumps((splits.test or splits.train)[0].prompt, ensure_ascii=False)
            write_whole(self.folder / files.PROMPT_FILE, prompt + "\n")
        return {name: len(members) for name, members in ids.items()}

    def _write_answers(self, measured: Mapping[str, Measured]) -> None:
        test = self.session.splits.test
        write_jsonl(files.prompts_file(self.folder), [{"id": one.public_id, "prompt": one.prompt} for one in test])
        for name, one in measured.items():
            write_jsonl(files.predictions_file(self.folder, name), one.rows(test))
        if "target" not in measured:
            files.predictions_file(self.folder, "target").unlink(missing_ok=True)  # of a run that took the other way

    def _write_metrics(
        self,
        measured: Mapping[str, Measured],
        learned: Learned | None,
        final: Adapter,
        delivered: files.Delivered,
        all_rows: files.AllRows | None,
        target_on: files.TargetOn | None,
    ) -> None:
        both: dict[str, Any] = {"all_rows": all_rows, "target_on": target_on}
        metrics = files.Metrics(
            systems={
                name: files.SystemScores(dev_loss=one.dev_loss, test_loss=one.test_loss, metrics=one.values)
                for name, one in measured.items()
            },
            delivered=delivered,
            prune_ratio=self.recipe.final.prune_ratio if learned is None else learned.ratio,
            prune_ratio_interval=None if learned is None else (learned.estimate.low, learned.estimate.high),
            nothing_learned_about_ratio=learned is not None and learned.estimate.nothing_learned,
            best_step=final.records[-1].result["best_step"],
            signatures=measured["grasp"].signatures,
            test_examples=len(self.session.splits.test),
            language=self.session.language,
            **{name: value for name, value in both.items() if value is not None},
        )
        write_json(self.folder / files.METRICS_FILE, metrics.to_json())

    def _write_cost(self, stage: str, seconds: float) -> None:
        if not (self.folder / files.RUN_FILE).is_file():
            raise vanished(self.folder)
        self.cost[stage] = round(seconds, 3)
        write_json(self.folder / files.COST_FILE, self.cost)

    def _check_sight(self) -> None:
        if not (self.folder / files.RUN_FILE).is_file():
            raise RecipeError(
                f"{self.folder} is not there for process {os.environ['RANK']}; give a folder that all machines see"
            )

    def _begin(self) -> None:
        """Write what the run starts from; when it goes on, check that this is still the same."""
        check_folder(self.folder, self.recipe)  # again: until now another run may have begun there
        backbone, adapters = self.session.backbone, self.session.existing_adapters
        check_config(self.store.folder, backbone)
        quantiser = filter(None, [QUANTISERS.get(backbone.quantise or "")])
        started = files.RunInfo(
            grasp_lora=version("grasp-lora"),
            recipe_hash=self.recipe.fingerprint(),
            name=self.recipe.name,
            seed=self.recipe.seed,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            backbone=files.Parent(name=backbone.name, fingerprint=backbone.fingerprint, commit=backbone.commit),
            dtype=str(backbone.model.dtype).removeprefix("torch."),
            parents=[
                files.GivenAdapter(name=adapter.name, sha256=adapter.sha256, identity=adapter.identity)
                for adapter in adapters.values()
            ],
            data=hash_of(self.session.splits),
            inputs=inputs_of(self.recipe, self.session.base),
            recipe_folder=seen_from(self.folder.absolute(), str(self.session.base.absolute())),
            libraries={name: version(name) for name in (*LIBRARIES, *quantiser)},
            python=platform.python_version(),
            processes=world_size(),
            **({} if backbone.quantise is None else {"quantise": backbone.quantise}),
        )
        if not (self.folder / files.RUN_FILE).is_file():
            write_json(self.folder / files.RUN_FILE, started.to_json())
        before = read_needed(self.folder / files.RUN_FILE, files.RunInfo)
        now, then = (
            {"backbone": info.backbone.fingerprint, "parents": info.parents, "data": info.data}
            for info in (started, before)
        )
        changed = [what for what in now if now[what] != then[what]]
        if changed == ["data"]:
            refuse_other_template(self.folder, before.inputs, started.inputs)
        if changed:
            raise RecipeError(
                f"{self.folder} was begun with other {' and '.join(changed)} than the recipe's files hold now; "
                "put those back, or choose another folder with --output"
            )
        files.forget_another_choice(self.folder, started.recipe_hash)
        # From here on the run is not finished until they are written anew, even if it is killed.
        (self.folder / files.METRICS_FILE).unlink(missing_ok=True)
        if before.inputs != started.inputs:  # of the same examples
            told = {"recipe_hash": started.recipe_hash, "inputs": before.inputs | started.inputs}
            write_json(self.folder / files.RUN_FILE, before.model_copy(update=told).to_json())
        if not (self.folder / RECIPE_FILE).is_file():
            write_whole(self.folder / RECIPE_FILE, self.recipe.to_yaml(self.folder))
        if before.dtype not in (None, started.dtype):
            logger.warning(
                "%s was begun in %s and goes on in %s, which backbone.dtype 'auto' means on this machine: the result is sound, "
                "but not that of an uninterrupted run",
                self.folder,
                before.dtype,
                started.dtype,
            )
        # Of an unfinished run or of another choice: they would stay.
        for name in (files.REPORT_FILE, files.REPORT_TABLES_FILE, f"{files.ADAPTER_FOLDER}/{files.CARD_FILE}"):
            (self.folder / name).unlink(missing_ok=True)


def _result(recipe: Recipe, folder: Path) -> RunResult:
    metrics = files.read_metrics(folder)
    given = recipe.final.prune_ratio
    ratio = files.read_learned(folder) if given is None else RatioEstimate(given, given, given, "given", 0)
    return RunResult(ratio, metrics, folder)
