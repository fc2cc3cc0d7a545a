"""What a run folder holds, read once into typed records; every file is checked against its shape."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from grasp_lora.bench.store import STORE_FOLDER, WORK
from grasp_lora.errors import RecipeError
from grasp_lora.method.rounds import RatioEstimate
from grasp_lora.recipes.text import parse
from grasp_lora.storage.folder import LOCK_FILE

STAGES = ("data", "source", "target", "merge", "controller", "final", "evaluate")
TRAINED = {"source": "Source", "target": "Target", "controller": "Controller run", "final": "Final run"}
RUN_FILE = "run.json"
COST_FILE = "cost.json"
COMPARE_FOLDER, SWEEP_FOLDER = "compare", "sweep"
DATA_FILE = "data.json"
METRICS_FILE = "metrics.json"
RATIO_FILE = "controller/ratio.json"

Loss = Annotated[float, AllowInfNan(True)]  # a run that diverged deserves a report, too


_Shape = TypeVar("_Shape")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)


class Parent(_Record):
    """A model that the run started from."""

    name: str
    fingerprint: str


class GivenAdapter(_Record):
    """An adapter that the run did not train itself."""

    name: str
    sha256: str


class RunInfo(_Record):
    """run.json."""

    grasp_lora: str
    recipe_hash: str
    name: str
    seed: int
    created: str
    backbone: Parent
    parents: list[GivenAdapter] = []
    libraries: dict[str, str] = {}


class DataFacts(_Record):
    """data.json."""

    ids: dict[str, list[str]] = {}


class Round(_Record):
    """One line of controller/rounds.jsonl."""

    round: int
    step: int
    candidates: list[float] = Field(min_length=1)
    baseline_losses: list[float] = Field(min_length=1)
    candidate_losses: list[Annotated[list[float], Field(min_length=1)]]
    places: list[int] | None = None
    rewards: list[float]
    policy_mean: float
    policy_std: float
    committed: bool
    clipped: bool
    ratio_before: float
    ratio: float

    @model_validator(mode="after")
    def _one_entry_per_candidate(self) -> Self:
        if not len(self.candidates) == len(self.rewards) == len(self.candidate_losses):
            raise ValueError("candidates, rewards and candidate_losses must be equally many")
        return self


class Timing(_Record):
    """One line of controller/timings.jsonl."""

    probe_seconds: float
    train_seconds: float


class Curve(_Record):
    """Fitted loss above its minimum over the ratio, with bounds."""

    ratios: list[float] = []
    mean: list[float] = []
    low: list[float] = []
    high: list[float] = []

    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        if not len(self.ratios) == len(self.mean) == len(self.low) == len(self.high):
            raise ValueError("ratios, mean, low and high must be equally long")
        return self


class LearnedRatio(_Record):
    """controller/ratio.json."""

    prune_ratio: float = Field(ge=0, le=1)
    low: float
    high: float
    confidence: float
    rule: str
    rounds: int = 0
    curve: Curve = Curve()


class HistoryRow(_Record):
    """One line of a history.jsonl."""

    step: int
    loss: Loss | None = None
    dev_loss: Loss | None = None


class FactorSparsity(_Record):
    """One entry of final/sparsity.json."""

    module: str
    factor: str
    segment: str
    weights: int = Field(ge=1)
    kept: int = Field(ge=0)


class Prediction(_Record):
    """One line of evaluation/<system>.jsonl; folders of older versions have no scores in it."""

    id: str
    prediction: str
    references: list[str] = []
    loss: Loss
    scores: dict[str, Loss] = {}


class SystemScores(_Record):
    """What one system scored; None where a metric was not available."""

    test_loss: Loss | None = None
    dev_loss: Loss | None = None
    metrics: dict[str, Loss | None] = {}


class Metrics(_Record):
    """metrics.json."""

    systems: dict[str, SystemScores]
    signatures: dict[str, str] = {}
    test_examples: int = Field(ge=0)
    prune_ratio: float | None = None
    prune_ratio_interval: tuple[float, float] | None = None
    language: str = ""


@dataclass(frozen=True)
class RunRecord:
    """A run folder as far as it has got: None or empty where a stage has not written its files."""

    run: RunInfo
    recipe_text: str
    recipe: dict[str, Any]
    data: DataFacts
    rounds: list[Round]
    timings: list[Timing]
    learned: LearnedRatio | None
    history: dict[str, list[HistoryRow]]
    sparsity: list[FactorSparsity]
    predictions: dict[str, list[Prediction]]
    metrics: Metrics | None
    cost: dict[str, float]  # seconds of each stage that is complete

    @property
    def sources(self) -> list[str]:
        """The names of the source adapters in files: source, source_2, ..."""
        return _sources(self.recipe)

    @property
    def systems(self) -> dict[str, str]:
        """What is evaluated: name in files -> title."""
        sources = self.sources
        titles = ["Source only"] if len(sources) == 1 else [f"Source {n} only" for n in range(1, len(sources) + 1)]
        return dict(zip(sources, titles, strict=True)) | {
            "target": "Target only",
            "merged": "Merged, not pruned",
            "grasp": "GRASP",
        }

    @property
    def given_ratio(self) -> float | None:
        """The recipe's final.prune_ratio; where it is given, the run has no controller by design."""
        given = inner(self.recipe, "final").get("prune_ratio")
        return float(given) if isinstance(given, int | float) else None

    @property
    def prune_ratio(self) -> float | None:
        """The ratio of the result, given or learned."""
        learned = self.learned.prune_ratio if self.learned else None
        return learned if self.given_ratio is None else self.given_ratio

    @property
    def missing(self) -> list[str]:
        """Stages that the run has yet to complete."""
        expected = STAGES if self.given_ratio is None else [stage for stage in STAGES if stage != "controller"]
        return [stage for stage in expected if stage not in self.cost]

    @property
    def probe_seconds(self) -> float:
        """Seconds of the controller run that went into probes."""
        return sum(timing.probe_seconds for timing in self.timings)


def inner(content: Any, *keys: str) -> dict[str, Any]:
    """Return the object under nested keys, empty where there is none."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def kept_share(entries: Iterable[FactorSparsity]) -> float:
    """Return the share of kept weights over some entries, a fraction in [0, 1]."""
    found = list(entries)
    return sum(entry.kept for entry in found) / sum(entry.weights for entry in found)


def by_factor(entries: Sequence[FactorSparsity]) -> dict[tuple[str, str], list[tuple[str, FactorSparsity]]]:
    """Sort entries by factor and segment, each with its layer.

    The factor A of `model.layers.3.self_attn.q_proj` is "q_proj A" in layer "3".
    """
    matches = [re.search(r"\.(\d+)\.(.+)$", entry.module) for entry in entries]
    places = [(m[2], m[1]) if m else (entry.module, "–") for entry, m in zip(entries, matches, strict=True)]
    short = {kind: kind.rsplit(".", 1)[-1] for kind, _ in places}
    # GPT-2 has a c_proj in its attention and another in its MLP: then the full names are needed.
    ambiguous = len(set(short.values())) < len(short)
    groups: dict[tuple[str, str], list[tuple[str, FactorSparsity]]] = {}
    for entry, (kind, layer) in zip(entries, places, strict=True):
        factor = f"{kind if ambiguous else short[kind]} {entry.factor}"
        groups.setdefault((factor, entry.segment), []).append((layer, entry))
    return dict(sorted(groups.items()))


def read_run(run_folder: Path) -> RunRecord:
    """Read all that a run folder holds.

    A run may still be in progress: the line that it is just writing is left out.

    Raises:
        RecipeError: run.json or recipe.yaml is missing, or a file is damaged; the message names it.
    """
    run, recipe_file = _read(run_folder / RUN_FILE, RunInfo), run_folder / "recipe.yaml"
    if run is None or not recipe_file.is_file():
        raise RecipeError(f"{run_folder} is no run folder: {RUN_FILE if run is None else 'recipe.yaml'} is missing.")
    recipe_text = _text(recipe_file)
    try:
        recipe = parse(recipe_text, "it")
    except RecipeError as error:
        raise _damaged(recipe_file, str(error)) from error
    if not isinstance(recipe, dict):
        raise _damaged(recipe_file, "it must hold keys and values")
    controller, evaluation = run_folder / "controller", run_folder / "evaluation"
    under_way = run_folder / STORE_FOLDER / WORK
    return RunRecord(
        run=run,
        recipe_text=recipe_text,
        recipe=recipe,
        data=_read(run_folder / DATA_FILE, DataFacts) or DataFacts(),
        rounds=_growing(controller, under_way, "rounds.jsonl", Round),
        timings=_growing(controller, under_way, "timings.jsonl", Timing),
        learned=_read(run_folder / RATIO_FILE, LearnedRatio),
        history={stage: _lines(run_folder / stage / "history.jsonl", HistoryRow, growing=True) for stage in TRAINED},
        sparsity=_read(run_folder / "final" / "sparsity.json", list[FactorSparsity]) or [],
        predictions={
            name: _lines(evaluation / f"{name}.jsonl", Prediction)
            for name in (*_sources(recipe), "target", "merged", "grasp")
        },
        metrics=_read(run_folder / METRICS_FILE, Metrics),
        cost=_read(run_folder / COST_FILE, dict[str, float]) or {},
    )


def read_metrics(folder: Path) -> Metrics:
    """Read what the systems of a finished run are worth.

    Raises:
        RecipeError: the file is missing or damaged.
    """
    return _needed(folder / METRICS_FILE, Metrics)


def read_learned(folder: Path) -> RatioEstimate:
    """Read the ratio that a finished run has learned.

    Raises:
        RecipeError: the file is missing or damaged.
    """
    learned = _needed(folder / RATIO_FILE, LearnedRatio)
    columns = learned.curve
    curve = tuple(zip(columns.ratios, columns.mean, columns.low, columns.high, strict=True))
    return RatioEstimate(
        learned.prune_ratio, learned.low, learned.high, learned.rule, learned.rounds, curve, learned.confidence
    )


def check_place(folder: Path) -> None:
    """Check, before anything is loaded, that an experiment may write into a folder.

    Raises:
        RecipeError: it is a file, cannot be read, or holds something that no experiment has written.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise RecipeError(f"{folder} is a file; give a folder with --output")
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as error:
        raise RecipeError(f"{folder} cannot be read ({error.strerror}); choose another with --output") from error
    # What one that was killed before it really began may have left is no experiment, and no obstacle.
    if there - {LOCK_FILE, f"{RUN_FILE}.part"} and not there & {RUN_FILE, STORE_FOLDER, COMPARE_FOLDER, SWEEP_FOLDER}:
        raise RecipeError(f"{folder} is not empty and no experiment's; choose another with --output")


def _needed(file: Path, shape: type[_Shape]) -> _Shape:
    found = _read(file, shape)
    if found is None:
        raise RecipeError(f"{file} is missing; run its recipe again")
    return found


def _growing(folder: Path, under_way: Path, name: str, shape: type[_Shape]) -> list[_Shape]:
    """The rows of a file in a run's folder, or of the step that is about to make it."""
    files = [folder / name, *under_way.glob(f"*/{folder.name}*/{name}")]
    return next((rows for file in files if (rows := _lines(file, shape, growing=True))), [])


def _sources(recipe: dict[str, Any]) -> list[str]:
    given = inner(recipe, "source").get("adapters")
    count = len(given) if isinstance(given, list) and given else 1
    return ["source", *(f"source_{number}" for number in range(2, count + 1))]


def _read(path: Path, shape: type[_Shape]) -> _Shape | None:
    return _checked(_text(path), shape, path) if path.is_file() else None


def _lines(path: Path, shape: type[_Shape], growing: bool = False) -> list[_Shape]:
    if not path.is_file():
        return []
    # Not splitlines(): it also cuts at U+2028, which JSON allows inside a text.
    lines = _text(path).split("\n")
    if growing and not lines[-1].endswith("}"):  # the rows that grow are flat, so only a whole one ends with a brace
        lines.pop()
    rows = enumerate(lines, start=1)
    return [_checked(line, shape, path, f" (line {number})") for number, line in rows if line.strip()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, "it is not UTF-8 text") from error
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error.strerror})") from error


def _checked(text: str, shape: type[_Shape], path: Path, where: str = "") -> _Shape:
    try:
        return TypeAdapter(shape).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].replace("Invalid JSON: ", "it is not valid JSON, ")
        place = ".".join(str(part) for part in first["loc"])
        raise _damaged(path, f"{place}: {reason.lower()}" if place else reason, where) from error


def _damaged(path: Path, reason: str, where: str = "") -> RecipeError:
    return RecipeError(f"{path}{where} is damaged: {reason}. Delete it and run its stage again.")
