"""The main job in a run folder: data, source, target, merge, controller, final, evaluate, report.

Each stage leaves a marker when it is complete and is skipped on a rerun; a training stage goes on from its last checkpoint, to
the same bits as without an interruption. A run folder of another recipe is refused, and so is a second writer. Nothing is
written before the recipe, the backbone, the data and the adapters have been checked. Under torchrun all processes train and
measure together, the first one writes, and the folder has to be one that all of them see.
"""

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grasp_lora.bench.session import Evaluation, Progress, Session, hash_of, ratio_record
from grasp_lora.data.build import SPLITS, Example
from grasp_lora.errors import RecipeError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.models.adapters import read_adapter
from grasp_lora.recipes.recipe import RECIPE_FILE, Recipe
from grasp_lora.recipes.text import parse
from grasp_lora.report.card import write_model_card
from grasp_lora.report.pages import write_report
from grasp_lora.report.run_folder import COST_FILE, RUN_FILE, TRAINED
from grasp_lora.storage.checkpoints import Checkpointing, newest_checkpoint, remove_checkpoints, seconds_of
from grasp_lora.storage.files import clear_write_errors, sync, vanished, write_json, write_jsonl, write_whole
from grasp_lora.storage.folder import LOCK_FILE, make_folder, only_writer
from grasp_lora.storage.interruption import Interruption
from grasp_lora.storage.processes import first, is_first, join, together, world_size
from grasp_lora.training.settings import TrainingSettings

log = logging.getLogger(__name__)

STAGES = ("data", "source", "target", "merge", "controller", "final", "evaluate", "report")
CONTROLLED = "controller/adapter"  # of a single run: what the controller run leaves for the final run
DIFFERENCES_SHOWN = 3
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "sacrebleu", "rouge-score")


class StageProgress(Progress):
    """A `Progress` that is also told of stages; this one is silent."""

    def preparing(self) -> None:
        """The backbone, the data and the adapters are being loaded."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def finished(self, name: str, seconds: float, summary: dict[str, Any], *, skipped: bool) -> None:
        """A stage is complete, now or already before."""


class Run:
    """One experiment in its folder.

    Args:
        recipe: what to do.
        base: folder that the recipe's relative paths start from.
        folder: the run folder; made if missing.
        progress: told of stages and steps.

    Raises:
        RecipeError: the folder belongs to another recipe, or holds something else.
    """

    def __init__(self, recipe: Recipe, base: Path, folder: Path, progress: StageProgress | None = None) -> None:
        self.recipe = recipe
        self.folder = folder
        self.progress = progress or StageProgress()
        self.session = Session(recipe, base, self.progress)
        self._place = "before it began"
        self._interruption = Interruption(lambda: self._place)
        self.session.checkpoints = Checkpointing(recipe.save_every, lambda: self._interruption.asked_by)
        self._check_folder()

    def execute(self) -> dict[str, Any]:
        """Do what is not done yet; return the content of `metrics.json`.

        Raises:
            GraspError: something the user gave does not fit, the folder cannot be written or another process writes there;
                what is done stays.
            Interrupted: SIGTERM or SIGINT came. A training stage finishes its step and saves a checkpoint, others stop at once
                and are done again; a second signal ends the process.
        """
        with self._interruption.handled(), clear_write_errors(self.folder), ExitStack() as lock:
            join(self.recipe.backbone.device)
            if not first(lambda: all(self._marker(stage).is_file() for stage in self.stages)):
                self._prepare(lock)
            elif is_first() and (self.folder / LOCK_FILE).is_file():
                # A kill came when all was done: the file goes with the lock, unless someone lives who holds it.
                with suppress(RecipeError, OSError):  # a complete run is only read
                    lock.enter_context(only_writer(self.folder))
            for name in self.stages:
                self._stage(name, getattr(self, f"_{name}"))
            metrics: dict[str, Any] = self._read("metrics.json")
        return metrics

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of this recipe: with a given prune ratio there is no controller run."""
        learns = self.recipe.final.prune_ratio is None
        return tuple(stage for stage in STAGES if learns or stage != "controller")

    def _data(self) -> dict[str, Any]:
        return first(self._write_data)

    def _write_data(self) -> dict[str, Any]:
        splits = self.session.splits
        ids = {name: [example.id for example in getattr(splits, name)] for name in SPLITS}
        write_json(self.folder / "data.json", {"report": splits.report, "ids": ids, "sha256": hash_of(splits)})
        return {name: len(members) for name, members in ids.items()}

    def _source(self) -> dict[str, Any]:
        session, recipe = self.session, self.recipe
        if recipe.source.adapters:
            return {"adapters": [session.existing_adapters[place].name for place in recipe.source.adapters]}
        splits = session.splits
        return self._train("source", splits.source_train, splits.source_dev, recipe.source.training)

    def _target(self) -> dict[str, Any]:
        session, recipe = self.session, self.recipe
        if recipe.target.adapter:
            return {"adapters": [session.existing_adapters[recipe.target.adapter].name]}
        splits = session.splits
        return self._train("target", splits.train, splits.dev, recipe.target.training)

    def _train(
        self, part: str, train: Sequence[Example], dev: Sequence[Example], training: TrainingSettings
    ) -> dict[str, Any]:
        """Train a fresh adapter into the folder of its name."""
        weights, result = self.session.train_adapter(part, train, dev, training, self.folder / part)
        first(lambda: self._save(part, weights))
        return {"steps": result.steps, "best_step": result.best_step, "dev_loss": result.dev_loss}

    def _merge(self) -> dict[str, Any]:
        return first(self._write_merged)

    def _write_merged(self) -> dict[str, Any]:
        parents = self._parents()
        merged = self.session.merge(list(parents.values()), list(parents), self.recipe.merge)
        self._save("merged", merged)
        weights = sum(pair.A.numel() + pair.B.numel() for pair in merged.values())
        return {"rule": self.recipe.merge.rule, "modules": len(merged), "weights": weights}

    def _controller(self) -> dict[str, Any]:
        folder, single = self.folder / "controller", self._single_run
        learned = self.session.learn_ratio(self._adapter("merged"), folder, keep_best=single)
        estimate = learned.estimate

        def write() -> None:
            write_json(folder / "ratio.json", ratio_record(estimate, learned.last_committed))
            if single:
                self._save(CONTROLLED, learned.adapter)

        first(write)
        return {
            "prune_ratio": estimate.ratio,
            "low": estimate.low,
            "high": estimate.high,
            "rounds": estimate.rounds,
            "steps": learned.steps,
        }

    def _final(self) -> dict[str, Any]:
        folder = self.folder / "final"
        ratio = self._prune_ratio()
        start = self._adapter(CONTROLLED if self._single_run else "merged")
        weights, result, rows = self.session.finetune_pruned(start, ratio, folder, pruned=self._single_run)

        def write() -> None:
            write_json(folder / "sparsity.json", rows)
            self._save("adapter", weights)

        first(write)
        pruned = 1 - sum(row["kept"] for row in rows) / sum(row["weights"] for row in rows)
        return {
            "prune_ratio": ratio,
            "measured_sparsity": pruned,
            "steps": result.steps,
            "best_step": result.best_step,
            "dev_loss": result.dev_loss,
        }

    def _evaluate(self) -> dict[str, Any]:
        systems = {**self._parents(), "merged": self._adapter("merged"), "grasp": self._adapter("adapter")}
        evaluations = {}
        for name, weights in systems.items():
            found = evaluations[name] = self.session.evaluate(weights)
            first(partial(self._write_predictions, name, found))
        first(partial(self._write_metrics, evaluations))
        grasp = evaluations["grasp"]
        return {"test_loss": grasp.test_loss, **{name: entry.value for name, entry in grasp.scores.items()}}

    def _report(self) -> dict[str, Any]:
        return first(self._write_report)

    def _write_report(self) -> dict[str, Any]:
        self._write_costs()
        write_model_card(self.folder, self.folder / "adapter")
        return {"report": write_report(self.folder).name}

    def _parents(self) -> dict[str, AdapterWeights]:
        """The adapters that are merged, by name: source (source_2, ...) and target."""
        recipe, session = self.recipe, self.session
        parents = {}
        for number, place in enumerate(recipe.source.adapters, start=1):
            parents["source" if number == 1 else f"source_{number}"] = session.existing_adapters[place].weights
        if not parents:
            parents["source"] = self._adapter("source")
        target = recipe.target.adapter
        parents["target"] = session.existing_adapters[target].weights if target else self._adapter("target")
        return parents

    def _save(self, name: str, weights: AdapterWeights) -> None:
        """Write an adapter into the folder of its name, each file whole or not at all."""
        folder, draft = self.folder / name, self.folder / f"{name}.part"
        if draft.exists():
            shutil.rmtree(draft)
        self.session.save(draft, weights)
        folder.mkdir(exist_ok=True)
        for file in sorted(draft.iterdir()):
            sync(file)
            file.replace(folder / file.name)
        draft.rmdir()
        sync(folder)

    def _adapter(self, name: str) -> AdapterWeights:
        return read_adapter(self.folder / name).weights

    @property
    def _single_run(self) -> bool:
        """Whether the final run finishes the controller run's own adapter."""
        return self.recipe.final.start == "controller"

    def _prune_ratio(self) -> float:
        if self.recipe.final.prune_ratio is not None:
            return self.recipe.final.prune_ratio
        return float(self._read("controller/ratio.json")["prune_ratio"])

    def _write_predictions(self, system: str, evaluation: Evaluation) -> None:
        write_jsonl(self.folder / "evaluation" / f"{system}.jsonl", evaluation.rows(self.session.splits.test))

    def _write_metrics(self, evaluations: dict[str, Evaluation]) -> None:
        ratio: dict[str, Any] = {"prune_ratio": self._prune_ratio(), "prune_ratio_interval": None}
        if self.recipe.final.prune_ratio is None:
            learned = self._read("controller/ratio.json")
            ratio["prune_ratio_interval"] = [learned["low"], learned["high"]]
        signatures = {name: entry.signature for name, entry in evaluations["grasp"].scores.items()}
        systems = {
            name: {
                "dev_loss": evaluation.dev_loss,
                "test_loss": evaluation.test_loss,
                "metrics": {metric: entry.value for metric, entry in evaluation.scores.items()},
            }
            for name, evaluation in evaluations.items()
        }
        write_json(
            self.folder / "metrics.json",
            {
                "systems": systems,
                **ratio,
                "signatures": signatures,
                "test_examples": len(self.session.splits.test),
                "language": self.session.language,
            },
        )

    def _write_costs(self) -> None:
        """Write the seconds of each stage; apart from the metrics, which are the same in every run of a recipe."""
        done = [stage for stage in STAGES if self._marker(stage).is_file()]
        write_json(self.folder / COST_FILE, {stage: self._read(f"stages/{stage}.json")["seconds"] for stage in done})

    def _stage(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        self._interruption.stop_if_asked()
        self._place = f"in the stage {name}"
        if done := first(partial(self._done_before, name)):
            self.progress.finished(name, done["seconds"], done["summary"], skipped=True)
            return
        self.progress.stage(name)
        started = time.perf_counter() - first(partial(self._begin_stage, name))
        with self._interruption.deferred() if name in TRAINED else nullcontext():
            summary = work()
            seconds = time.perf_counter() - started
            first(partial(self._complete, name, seconds, summary))
            self.progress.finished(name, seconds, summary, skipped=False)

    def _done_before(self, stage: str) -> dict[str, Any] | None:
        """What a complete stage left, None where it is not complete."""
        if not self._marker(stage).is_file():
            return None
        remove_checkpoints(self.folder / stage)  # a kill may have come between the marker and their removal
        done: dict[str, Any] = self._read(f"stages/{stage}.json")
        return done

    def _begin_stage(self, stage: str) -> float:
        """Drop the later stages, which rest on what is done anew here; return the seconds that are in its last checkpoint."""
        self._check_presence()
        for later in STAGES[STAGES.index(stage) + 1 :]:
            self._marker(later).unlink(missing_ok=True)
            remove_checkpoints(self.folder / later)
        checkpoint = newest_checkpoint(self.folder / stage)
        return seconds_of(checkpoint) if checkpoint else 0.0

    def _complete(self, stage: str, seconds: float, summary: dict[str, Any]) -> None:
        self._check_presence()
        write_json(self._marker(stage), {"stage": stage, "seconds": round(seconds, 3), "summary": summary})
        remove_checkpoints(self.folder / stage)

    def _check_presence(self) -> None:
        if not (self.folder / RUN_FILE).is_file():
            raise vanished(self.folder)

    def _marker(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage}.json"

    def _read(self, name: str) -> Any:
        file = self.folder / name
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"{file} cannot be read ({error}); remove its stage's marker in stages/ to redo it"
            ) from error

    def _check_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise RecipeError(f"{self.folder} is a file; give a folder for the run")
        # What a run that was killed before it really began may have left.
        beginnings = {LOCK_FILE, f"{RUN_FILE}.part"}
        if not self.folder.is_dir() or {path.name for path in self.folder.iterdir()} <= beginnings:
            return
        if not (self.folder / RUN_FILE).is_file():
            raise RecipeError(f"{self.folder} is not empty and no run folder; choose another with --output")
        stated = self._read(RUN_FILE).get("recipe_hash")
        if stated != self.recipe.fingerprint():
            raise RecipeError(
                f"{self.folder} holds a run of another recipe ({self._differences()}); "
                "choose another folder with --output, or delete it"
            )

    def _differences(self) -> str:
        """Which settings differ from those of the run in the folder."""
        try:
            theirs = _flat(parse((self.folder / RECIPE_FILE).read_text(encoding="utf-8"), "it"))
        except (OSError, ValueError, RecipeError):
            return f"its {RECIPE_FILE} cannot be read"
        ours = _flat(parse(self.recipe.to_yaml(), "the recipe"))
        keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        shown = [f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here" for key in keys[:DIFFERENCES_SHOWN]]
        more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
        return ", ".join(shown) + more if shown else f"by its hash; its recipe is in {RECIPE_FILE} there"

    def _prepare(self, lock: ExitStack) -> None:
        """Become the folder's only writer, load and check everything, and begin."""
        self._place = "before its first stage"
        existing = first(self.folder.is_dir)
        if existing:
            first(partial(self._lock, lock))
        self.progress.preparing()
        together(self.session.prepare)
        if not existing:
            first(partial(self._make_folder, lock))
        first(self._begin)
        together(self._check_sight)

    def _check_sight(self) -> None:
        if not (self.folder / RUN_FILE).is_file():
            raise RecipeError(
                f"{self.folder} is not there for process {os.environ['RANK']}; give a folder that all machines see"
            )

    def _lock(self, lock: ExitStack) -> None:
        lock.enter_context(only_writer(self.folder))

    def _make_folder(self, lock: ExitStack) -> None:
        make_folder(self.folder)
        self._lock(lock)

    def _begin(self) -> None:
        """Write what the run starts from; when it goes on, check that this is still the same."""
        self._check_folder()  # again: until now another run may have begun there
        backbone, adapters = self.session.backbone, self.session.existing_adapters
        started = {
            "grasp_lora": version("grasp-lora"),
            "recipe_hash": self.recipe.fingerprint(),
            "name": self.recipe.name,
            "seed": self.recipe.seed,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
            "dtype": str(backbone.model.dtype).removeprefix("torch."),
            "parents": [
                {"name": adapter.name, "sha256": adapter.sha256, "identity": adapter.identity}
                for adapter in adapters.values()
            ],
            "libraries": {name: version(name) for name in LIBRARIES},
            "python": platform.python_version(),
            "processes": world_size(),
        }
        if not (self.folder / RUN_FILE).is_file():
            write_json(self.folder / RUN_FILE, started)
        if not (self.folder / RECIPE_FILE).is_file():
            write_whole(self.folder / RECIPE_FILE, self.recipe.to_yaml())
        before = self._read(RUN_FILE)
        changed = [what for what in ("backbone", "parents") if before.get(what) != started[what]]
        if self._marker("data").is_file() and self._read("data.json").get("sha256") != hash_of(self.session.splits):
            changed.append("data")
        if changed:
            raise RecipeError(
                f"{self.folder} was begun with other {' and '.join(changed)} than the recipe's files hold now; "
                "put those back, or choose another folder with --output"
            )
        if (processes := before.get("processes", 1)) != world_size():
            raise RecipeError(
                f"{self.folder} was begun with {processes} processes and would end otherwise with {world_size()}; "
                "start as many, or choose another folder with --output"
            )
        if before.get("dtype", started["dtype"]) != started["dtype"]:
            log.warning(
                "%s was begun in %s and goes on in %s, which backbone.dtype 'auto' means on this machine: the result is sound, "
                "but not that of an uninterrupted run",
                self.folder,
                before["dtype"],
                started["dtype"],
            )


def _flat(content: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value of every setting."""
    if not isinstance(content, dict) or not content:
        return {path: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{path}.{key}" if path else str(key))
    return flat
