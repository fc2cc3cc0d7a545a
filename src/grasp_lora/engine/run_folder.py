"""A run as one record, and the files that it leaves for people and programs.

runs/NAME/
    adapter/                    what is handed over: an ordinary PEFT adapter with its card
    source/ target/ merged/ continued/ unpruned/ final/    the other adapters, each with the history of its training
    controller/                 rounds.jsonl, timings.jsonl, history.jsonl, ratio.json
    evaluation/SYSTEM.jsonl     every answer; prompts.jsonl
    metrics.json                what each system is worth, what is handed over and why; written last
    run.json recipe.yaml data.json cost.json prompt.jsonl report.html
    store/                      the finished steps
"""

import json
import platform
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from grasp_lora.data.splits import SPLITS, group_numbers, hash_of
from grasp_lora.engine.differences import Difference
from grasp_lora.engine.results import Adapter, Finished, Learned, Prediction, Trained, read_if_there
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import computed_with, given_adapter
from grasp_lora.engine.store import ADAPTER, DONE
from grasp_lora.errors import RecipeError
from grasp_lora.method.rules import RatioEstimate
from grasp_lora.models.adapters import restate_answers
from grasp_lora.models.model_settings import QUANTISERS
from grasp_lora.recipes.recipe import Recipe, seen_from
from grasp_lora.recipes.text import RECIPE_FILE, RUN_FILE, parse
from grasp_lora.storage.claims import LOCK_FILE
from grasp_lora.storage.processes import world_size
from grasp_lora.storage.reading import is_folder, reading
from grasp_lora.storage.writing import discard, sync, sync_all, write_json, write_jsonl, write_whole

VERSION = 2  # of the folder
ADAPTER_FOLDER, FINAL_FOLDER, CONTROLLER_FOLDER, MERGED_FOLDER = "adapter", "final", "controller", "merged"
CONTINUED_FOLDER, UNPRUNED_FOLDER, PREDICTIONS_FOLDER = "continued", "unpruned", "evaluation"
STORE_FOLDER, COMPARE_FOLDER = "store", "compare"
DATA_FILE, METRICS_FILE, COST_FILE, PROMPT_FILE = "data.json", "metrics.json", "cost.json", "prompt.jsonl"
REPORT_FILE, CARD_FILE = "report.html", "README.md"
HISTORY_FILE, RATIO_FILE, SPARSITY_FILE = "history.jsonl", "ratio.json", "sparsity.json"
DIFFERENCES_SHOWN = 3
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "sacrebleu", "rouge-score")
# Where `best_step` is 0.
DISCARDED = "no step of the final run lowered the dev loss, so its training was discarded (best step 0)"
TRAINED = {  # folder -> what was trained, in the order in which it happens
    "source": "Source", "target": "Target", "controller": "Controller run", "final": "Final run",
    "unpruned": "Final run, nothing pruned", "continued": "Source, continued",
}  # fmt: skip


@dataclass(frozen=True)
class Parent:
    """A model that a run starts from; one without a `commit` is a folder or the embedded one."""

    name: str
    fingerprint: str
    commit: str | None = None


@dataclass(frozen=True)
class GivenAdapter:
    """An adapter that a run did not train itself; `sha256` is that of its file, and `key` of all that it does."""

    name: str
    sha256: str
    key: str


@dataclass(frozen=True)
class RunInfo:
    """run.json: what a run starts from.

    `data` is a hash of all its rows, `recipe_hash` of all keys that decide its steps, and `computed_with` is what the keys of
    steps hold of the backbone. `recipe_folder` is where its relative paths start, as seen from the run's folder: `predict` finds
    a backbone by it.
    """

    grasp_lora: str
    recipe_hash: str
    recipe_folder: str
    name: str
    seed: int
    created: str
    backbone: Parent
    computed_with: Mapping[str, str | None]
    dtype: str
    quantise: str | None
    parents: tuple[GivenAdapter, ...]
    data: str
    libraries: Mapping[str, str]
    python: str
    processes: int
    threads: int = 0  # of the processor; runs of earlier versions have no number
    version: int = VERSION

    @classmethod
    def of(cls, session: Session, folder: Path) -> "RunInfo":
        """What a run of this session in this folder starts from now."""
        recipe, backbone = session.recipe, session.backbone
        quantiser = filter(None, [QUANTISERS.get(backbone.quantise or "")])
        return cls(
            grasp_lora=version("grasp-lora"),
            recipe_hash=recipe.fingerprint(),
            recipe_folder=seen_from(folder.absolute(), str(session.base.absolute())),
            name=recipe.name,
            seed=recipe.seed,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            backbone=Parent(backbone.name, backbone.fingerprint, backbone.commit),
            computed_with=computed_with(backbone),
            dtype=str(backbone.model.dtype).removeprefix("torch."),
            quantise=backbone.quantise,
            parents=tuple(
                GivenAdapter(adapter.name, adapter.sha256, given_adapter(adapter).key)
                for adapter in session.given.values()
            ),
            data=hash_of(session.splits),
            libraries={name: version(name) for name in (*LIBRARIES, *quantiser)},
            python=platform.python_version(),
            processes=world_size(),
            threads=torch.get_num_threads(),
        )


@dataclass(frozen=True)
class DataFacts:
    """data.json: what was read, the ids of each split, and the number of each test row's group."""

    report: Mapping[str, Any]
    ids: Mapping[str, list[str]]
    test_groups: list[int]

    @classmethod
    def of(cls, session: Session) -> "DataFacts":
        splits = session.splits
        ids = {name: [row.public_id for row in getattr(splits, name)] for name in SPLITS}
        return cls(splits.report.to_json(), ids, group_numbers(splits.test))


@dataclass(frozen=True)
class Delivered:
    """Which adapter is handed over, and why.

    Args:
        name: the system, as in `Metrics.systems`.
        title: what it is, as a part of a sentence.
        why: a sentence.
        warning: what a reader has to be told of it.
        nothing_learned: by the test rows no adapter is better than the backbone alone, so that a prune ratio would say
            nothing.
    """

    name: str
    title: str
    why: str
    warning: str | None = None
    nothing_learned: bool = False


@dataclass(frozen=True)
class SystemScores:
    """What one system scored; None where a metric was not available."""

    dev_loss: float | None
    test_loss: float | None
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class SearchCost:
    """What a learned ratio cost with its final run, beside a grid of such final runs.

    Passes are forward passes of one example; a training example counts as two. Seconds are those of `cost.json`.
    """

    passes: int
    grid_runs: int
    grid_passes: int


@dataclass(frozen=True)
class Grid:
    """A grid search of the same recipe: pairs of prune ratio and test loss; `recorded` where another machine did it."""

    losses: tuple[tuple[float, float], ...]
    recorded: bool = True


def recorded_grid(language: str) -> Grid | None:
    """The grid search of the demo in a language that `lab/demo.py` has put into the package."""
    return read_if_there(Path(str(files("grasp_lora.demo"))) / f"grid-{language}.json", Grid)


@dataclass(frozen=True)
class Metrics:
    """metrics.json. `differences` are those of `delivered` and every other system, by its name; the interval is None where the
    ratio was given, as is `search`. `best_step` is that of the final run, or of
    `continued` where there is none."""

    systems: Mapping[str, SystemScores]
    delivered: Delivered
    differences: Mapping[str, Difference]
    prune_ratio: float
    prune_ratio_interval: tuple[float, float] | None
    nothing_learned_about_ratio: bool
    search: SearchCost | None
    grid: Grid | None
    best_step: int
    signatures: Mapping[str, str]
    test_examples: int
    language: str


@dataclass(frozen=True)
class Run:
    """All that a run came to.

    Args:
        adapters: those that lie in folders of their names; `adapter` is what is handed over.
        learned: the controller run; None where the recipe gives the ratio.
        predictions: of each system, one a test row.
        prompts: of the test rows, in their order: files of one name in two folders give the same ids.
        metrics: what each system is worth, what is handed over and why.
        cost: seconds of each step, by its name.
    """

    info: RunInfo
    recipe: Recipe
    data: DataFacts
    adapters: Mapping[str, Adapter]
    learned: Finished[Learned] | None
    predictions: Mapping[str, Sequence[Prediction]]
    prompts: Sequence[str]
    metrics: Metrics
    cost: Mapping[str, float]

    @property
    def target_alone(self) -> bool:
        """Whether the target adapter does something by itself."""
        return self.recipe.target.on is None

    @property
    def estimate(self) -> RatioEstimate:
        """The learned ratio with its interval, or the one that the recipe gives."""
        ratio = self.metrics.prune_ratio
        return self.learned.result.estimate if self.learned else RatioEstimate(ratio, ratio, ratio, "given", 0)

    @property
    def history(self) -> dict[str, list[dict[str, Any]]]:
        """The losses of each training, by the folder that it is told in."""
        made = {name: adapter.made for name, adapter in self.adapters.items() if name in TRAINED and adapter.made}
        trainings: dict[str, Finished[Any]] = {**made, **({CONTROLLER_FOLDER: self.learned} if self.learned else {})}
        return {name: _to_the_end(step.result) for name, step in trainings.items()}

    @property
    def sparsity(self) -> list[dict[str, Any]]:
        """Kept weights of GRASP's result, per module, factor and origin; none where the recipe asks for `continued` alone."""
        made = self.adapters[FINAL_FOLDER].made if FINAL_FOLDER in self.adapters else None
        return made.result.kept if made else []

    def write(self, session: Session, folder: Path) -> None:
        """Write all files; metrics.json comes last. A kill on the way is mended by the next run, from the store."""
        (folder / METRICS_FILE).unlink(missing_ok=True)
        write_json(folder / DATA_FILE, asdict(self.data))
        if not self.data.report.get("chat_template"):  # a prompt in a chat template is not what `predict` is given
            prompt = next(iter(self.prompts), session.splits.train[0].prompt)
            write_whole(folder / PROMPT_FILE, json.dumps(prompt, ensure_ascii=False) + "\n")
        for name in (*TRAINED, MERGED_FOLDER, ADAPTER_FOLDER):
            if name not in self.adapters:
                discard(folder / name)  # of a run that handed over something else
        for name, adapter in self.adapters.items():
            if name != "target" or self.target_alone:  # used or merged by itself it would mislead
                _put_adapter(session, folder / name, adapter)
        for name, rows in self.history.items():
            (folder / name).mkdir(exist_ok=True)
            write_jsonl(folder / name / HISTORY_FILE, rows)
        if FINAL_FOLDER in self.adapters:
            write_json(folder / FINAL_FOLDER / SPARSITY_FILE, self.sparsity)
        if self.learned:
            write_json(folder / CONTROLLER_FOLDER / RATIO_FILE, asdict(self.learned.result.estimate))
            write_jsonl(folder / CONTROLLER_FOLDER / "rounds.jsonl", self.learned.result.rounds)
            write_jsonl(folder / CONTROLLER_FOLDER / "timings.jsonl", self.learned.result.timings)
        discard(folder / PREDICTIONS_FOLDER)
        (folder / PREDICTIONS_FOLDER).mkdir()
        prompts = [{"id": key, "prompt": text} for key, text in zip(self.data.ids["test"], self.prompts, strict=True)]
        write_jsonl(folder / PREDICTIONS_FOLDER / "prompts.jsonl", prompts)
        for name, predictions in self.predictions.items():
            write_jsonl(folder / PREDICTIONS_FOLDER / f"{name}.jsonl", [asdict(row) for row in predictions])
        write_json(folder / COST_FILE, self.cost)
        write_json(folder / METRICS_FILE, asdict(self.metrics))


def begin(folder: Path, session: Session) -> RunInfo:
    """Write what a run starts from; where it goes on, check that this is still the same.

    Raises:
        RecipeError: the folder holds a run of another recipe, or of other rows, backbone or adapters.
    """
    now, before = RunInfo.of(session, folder), read_if_there(folder / RUN_FILE, RunInfo)
    if before is None:
        write_json(folder / RUN_FILE, asdict(now))
        write_whole(folder / RECIPE_FILE, session.recipe.to_yaml(folder))
        return now
    facts = {"computed_with": "backbone", "parents": "given adapters", "data": "rows"}
    changed = [what for key, what in facts.items() if getattr(before, key) != getattr(now, key)]
    problem = ""
    if before.recipe_hash not in session.recipe.choices():
        problem = f"holds a run of another recipe {_differences(folder, session.recipe)}"
    elif before.dtype != now.dtype:
        problem = f"was begun with backbone.dtype {before.dtype}, which is {now.dtype} here; set it to that, or "
    elif changed:
        problem = f"was begun with other {' and '.join(changed)} than the recipe's files hold now; put those back, or "
    if problem:
        kept = _source_kept(folder) if changed == ["rows"] and not session.recipe.source.adapters else ""
        raise RecipeError(f"{folder} {problem}choose another folder with --output, or delete it{kept}")
    if before.recipe_hash != now.recipe_hash:  # it hands over something else now
        before = replace(before, recipe_hash=now.recipe_hash)
        write_json(folder / RUN_FILE, asdict(before))
    write_whole(folder / RECIPE_FILE, session.recipe.to_yaml(folder))
    return before


def _source_kept(folder: Path) -> str:
    """How the next run need not train the source adapter of this one again; empty where it has none."""
    steps = sorted((folder / STORE_FOLDER).glob(f"source-*/{DONE}"))
    places = (place for place in (folder / "source", *(step.parent / ADAPTER for step in steps)) if is_folder(place))
    trained = next(places, None)
    option = shlex.quote(f'source.adapters=["{trained}"]')
    return f". To another folder its source adapter can be taken along: --set {option}" if trained else ""


def threads_of(folder: Path) -> int:
    """How many threads of the processor the run in a folder began with; 0 where there is none."""
    before = read_if_there(folder / RUN_FILE, RunInfo)
    return before.threads if before else 0


def check_place(folder: Path) -> None:
    """Check, before anything is loaded, that an experiment may write into a folder.

    Raises:
        RecipeError: it is a file, cannot be read, or holds something that no experiment has written.
    """
    with reading(folder, RecipeError):
        present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    # What one that was killed before it really began may have left is no experiment, and no obstacle.
    if present - {LOCK_FILE, f"{RUN_FILE}.part"} and not present & {RUN_FILE, STORE_FOLDER, COMPARE_FOLDER}:
        raise RecipeError(f"{folder} is not empty and no experiment's; choose another with --output")


def _to_the_end(result: Trained | Learned) -> list[dict[str, Any]]:
    """The losses of a training up to its last step, which need not be one whose loss is logged."""
    rows = result.history
    return [*rows, {"step": result.steps}] if rows and rows[-1]["step"] < result.steps else rows


def _put_adapter(session: Session, folder: Path, adapter: Adapter) -> None:
    """Put an adapter into a folder as its step has left it, or as it was given or merged; each file whole or not at all."""
    draft = folder.with_name(f"{folder.name}.part")
    discard(draft)
    if adapter.made is None:
        session.save(draft, adapter.weights, adapter.rows)
    else:
        shutil.copytree(adapter.made.folder / ADAPTER, draft)
        restate_answers(draft, session.how_to_answer)  # another recipe may have done the step
    sync_all(draft)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(draft.iterdir()):
        file.replace(folder / file.name)
    draft.rmdir()
    sync(folder)


def _differences(folder: Path, recipe: Recipe) -> str:
    """Which settings differ from those of the run in the folder, and how to repeat its own, where they are few and no paths."""
    theirs = _flat(parse((folder / RECIPE_FILE).read_text(encoding="utf-8"), RECIPE_FILE))
    ours = _flat(parse(recipe.to_yaml(folder), "the recipe"))
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    shown = [f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here" for key in keys[:DIFFERENCES_SHOWN]]
    more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
    changes = [shlex.quote(f"{key}={json.dumps(theirs.get(key))}") for key in keys]
    simple = not more and not any(isinstance(theirs.get(key), list) or "/" in str(theirs.get(key)) for key in keys)
    again = f"to go on with it, repeat {' '.join(f'--set {change}' for change in changes)}, or " if simple else ""
    return f"({', '.join(shown)}{more}); {again}"


def _flat(content: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value of every setting."""
    if not isinstance(content, dict) or not content:
        return {path: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{path}.{key}" if path else str(key))
    return flat
