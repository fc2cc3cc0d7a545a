"""The run folder: names and shapes of all its files. A run writes them, the report reads them back into typed records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, model_validator

from grasp_lora.bench.records import damaged, read_needed, read_record, read_text
from grasp_lora.errors import RecipeError
from grasp_lora.method.rounds import RatioEstimate
from grasp_lora.recipes.text import RECIPE_FILE
from grasp_lora.recipes.text import RUN_FILE as RUN_FILE
from grasp_lora.storage.claims import LOCK_FILE
from grasp_lora.storage.files import discard, write_json

TRAINED = {
    "source": "Source", "target": "Target", "controller": "Controller run", "final": "Final run",
    "continued": "Source, continued", "all_rows": "On all rows",
}  # fmt: skip
# Folders. Each adapter that the run trains or makes lies in the folder of its name; a stage's history lies in that of its own.
CONTROLLER_FOLDER = "controller"
FINAL_FOLDER = "final"
CONTINUED_FOLDER = "continued"
ALL_ROWS = "all_rows"  # the folder, and the system in metrics.json
MERGED_FOLDER = "merged"
ADAPTER_FOLDER = "adapter"
PREDICTIONS_FOLDER = "evaluation"
STORE_FOLDER = "store"  # of an experiment's memory
RECORDS, WORK = "records", "work"  # in it: of finished steps, and of those under way
COMPARE_FOLDER = "compare"  # of the comparison in the folder of a run
# Files of the run folder itself.
DATA_FILE = "data.json"
METRICS_FILE = "metrics.json"
PROMPT_FILE = "prompt.jsonl"  # one prompt of this run, as `predict --jsonl` takes it
COST_FILE = "cost.json"  # seconds of each complete stage; the metrics are the same in every run of a recipe
REPORT_FILE = "report.html"
REPORT_TABLES_FILE = "report.md"
# Files in a stage's folder.
HISTORY_FILE = "history.jsonl"
ROUNDS_FILE = "rounds.jsonl"
TIMINGS_FILE = "timings.jsonl"
RATIO_FILE = "ratio.json"
TARGET_ON_FILE = "on.json"  # of the target, with `target.on: auto`
SPARSITY_FILE = "sparsity.json"
CARD_FILE = "README.md"  # beside the adapter

# Where `best_step` is 0.
DISCARDED = "no step lowered the dev loss, so the fine-tuning was discarded (best step 0)"

Loss = Annotated[float, AllowInfNan(True)]  # a run that diverged deserves a report, too


def predictions_file(run_folder: Path, system: str) -> Path:
    """Where the `Prediction` rows of a system stand."""
    return run_folder / PREDICTIONS_FOLDER / f"{system}.jsonl"


def prompts_file(run_folder: Path) -> Path:
    """Where the prompts of the test examples stand, in the order of all predictions."""
    return run_folder / PREDICTIONS_FOLDER / "prompts.jsonl"


class Shape(BaseModel):
    """Fields with a default are those that folders of older versions do not have, or that are not always there."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as the file holds them; what was not set is left out."""
        return self.model_dump(exclude_unset=True)


class Parent(Shape):
    """A model that the run started from; one without a `commit` is a folder or the embedded one."""

    name: str
    fingerprint: str
    commit: str | None = None


class GivenAdapter(Shape):
    """An adapter that the run did not train itself; `identity` hashes what it does, `sha256` its file."""

    name: str
    sha256: str
    identity: str = ""


class RunInfo(Shape):
    """run.json: what the run started from."""

    grasp_lora: str
    recipe_hash: str
    name: str
    seed: int
    created: str
    backbone: Parent
    recipe_folder: str | None = None  # as it is seen from here: relative paths of recipe.yaml start from it
    dtype: str | None = None
    quantise: str | None = None
    parents: list[GivenAdapter] = []
    data: str | None = None  # a hash of all examples
    inputs: dict[str, str] = {}  # as `inputs_of` gives them
    libraries: dict[str, str] = {}
    python: str = ""
    processes: int = 1


class DataFacts(Shape):
    """data.json: what was read, the ids of each split, a hash of all examples, and the number of each test example's group."""

    report: dict[str, Any] = {}
    ids: dict[str, list[str]] = {}
    sha256: str | None = None
    test_groups: list[int] = []


class RoundRow(Shape):
    """One line of controller/rounds.jsonl, as far as the report needs it."""

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


class Timing(Shape):
    """One line of controller/timings.jsonl."""

    probe_seconds: float
    train_seconds: float


class Curve(Shape):
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


class LearnedRatio(Shape):
    """controller/ratio.json."""

    prune_ratio: float = Field(ge=0, le=1)
    low: float
    high: float
    rule: str
    rounds: int = 0
    confidence: float
    curve: Curve = Curve()
    bounds: tuple[float, float] = (0.0, 1.0)  # runs of older versions do not say
    rows: dict[str, int] = {}  # how many each file beside this one has

    @classmethod
    def of(cls, estimate: RatioEstimate, beside: Mapping[str, Sequence[object]] | None = None) -> Self:
        """Return what the file says of an estimate, and of the rows in the files beside it."""
        ratios, mean, low, high = map(list, zip(*estimate.curve, strict=True)) if estimate.curve else ([], [], [], [])
        return cls(
            prune_ratio=estimate.ratio,
            low=estimate.low,
            high=estimate.high,
            rule=estimate.rule,
            rounds=estimate.rounds,
            confidence=estimate.confidence,
            curve=Curve(ratios=ratios, mean=mean, low=low, high=high),
            bounds=estimate.bounds,
            rows={name: len(rows) for name, rows in (beside or {}).items()},
        )

    @property
    def estimate(self) -> RatioEstimate:
        """The estimate that the file holds."""
        curve = tuple(zip(self.curve.ratios, self.curve.mean, self.curve.low, self.curve.high, strict=True))
        return RatioEstimate(
            self.prune_ratio, self.low, self.high, self.rule, self.rounds, curve, self.confidence, self.bounds
        )


class HistoryRow(Shape):
    """One line of a history.jsonl, as far as the report needs it."""

    step: int
    loss: Loss | None = None
    dev_loss: Loss | None = None


class FactorSparsity(Shape):
    """One entry of final/sparsity.json."""

    module: str
    factor: str
    segment: str
    weights: int = Field(ge=1)
    kept: int = Field(ge=0)


class Prediction(Shape):
    """One line of evaluation/<system>.jsonl; `statistics` has the leading metric's counts, where its score is no mean."""

    id: str
    prediction: str
    references: list[str] = []
    loss: Loss
    scores: dict[str, Loss] = {}
    statistics: dict[str, list[float]] = {}  # as in `MetricScore`


class Prompt(Shape):
    """One line of evaluation/prompts.jsonl."""

    id: str
    prompt: str


class SystemScores(Shape):
    """What one system scored; None where a metric was not available."""

    dev_loss: Loss | None = None
    test_loss: Loss | None = None
    metrics: dict[str, Loss | None] = {}


class Delivered(Shape):
    """Which adapter was handed over, and why.

    Args:
        name: the system, as in `Metrics.systems`.
        title: what it is, as a part of a sentence.
        why: one or two sentences.
        split, examples: the rows that the choice rests on; None and 0 where there were none.
        against: the system that it was compared with, None where none was.
        difference: mean loss of this one minus that of the other, nats per answer token.
        low, high: bounds of the difference at `confidence`.
        warning: what a reader has to be told of it.
        nothing_learned: no adapter is shown to be better than the backbone alone, so that a prune ratio would say nothing.
    """

    name: str
    title: str
    why: str
    split: str | None = None
    examples: int = 0
    against: str | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    warning: str | None = None
    nothing_learned: bool = False


class AllRows(Shape):
    """What became of `final.all_rows`.

    Args:
        why: a sentence or two.
        rows: how many were trained on; 0 where nothing was.
        steps: optimizer steps of each training on them, `target` and the chosen system; 0 where it was left as it was.
    """

    why: str
    rows: int = 0
    steps: dict[str, int] = {}


class TargetOn(Shape):
    """Where the target adapter of a recipe with `target.on: auto` is trained, and why.

    Args:
        on: `source`, or None for the backbone alone.
        splits: whose rows decided; empty where there were too few.
        examples: how many these are.
        losses: `apart`, of the average, and `source`, of the sum: mean loss of each merge before any pruning.
        left_out: why the other way was left out, where its training or its measurement failed.
    """

    on: str | None
    splits: list[str]
    examples: int
    losses: dict[str, Loss]
    left_out: str = ""

    @property
    def merge(self) -> str:
        """What the merge is, in words."""
        return "the sum" if self.on else "the average"


class Metrics(Shape):
    """metrics.json; the interval is None where the ratio was given. `best_step` is that of the final run."""

    systems: dict[str, SystemScores]
    delivered: Delivered | None = None
    all_rows: AllRows | None = None  # where the recipe asks for it
    target_on: TargetOn | None = None  # with `target.on: auto`
    prune_ratio: float | None = None
    prune_ratio_interval: tuple[float, float] | None = None
    nothing_learned_about_ratio: bool = False
    best_step: int | None = None
    signatures: dict[str, str] = {}
    test_examples: int = Field(ge=0)
    language: str = ""

    @property
    def handed_over(self) -> str:
        """The system whose adapter lies in `adapter/`; in folders of older versions always GRASP's."""
        if ALL_ROWS in self.systems:
            return ALL_ROWS
        return self.delivered.name if self.delivered else "grasp"


def read_metrics(folder: Path) -> Metrics:
    """Read what the systems of a finished run are worth.

    Raises:
        RecipeError: the file is missing or damaged.
    """
    return read_needed(folder / METRICS_FILE, Metrics)


def read_learned(folder: Path) -> RatioEstimate:
    """Read the ratio that a finished run has learned.

    Raises:
        RecipeError: the file is missing or damaged.
    """
    return read_needed(folder / CONTROLLER_FOLDER / RATIO_FILE, LearnedRatio).estimate


def check_rows(folder: Path, learned: LearnedRatio) -> None:
    """Check that the files of a controller run hold as many rows as its result says.

    Raises:
        RecipeError: rows are missing.
    """
    for name, count in learned.rows.items():
        file = folder / CONTROLLER_FOLDER / name
        text = read_text(file)
        if text is None:
            raise RecipeError(f"{file} is missing; run its recipe again")
        found = text.count("\n")
        if found != count:
            raise damaged(file, f"it holds {found} of {count} rows")


def forget_another_choice(folder: Path, recipe_hash: str) -> None:
    """Where a run was to hand over something else, take away what says so; the steps stay in the store."""
    before = read_record(folder / RUN_FILE, RunInfo)
    if before is not None and before.recipe_hash != recipe_hash:
        (folder / METRICS_FILE).unlink(missing_ok=True)  # first: without it the run is not finished
        for name in (CONTINUED_FOLDER, ALL_ROWS):
            discard(predictions_file(folder, name))
            discard(folder / name)
        (folder / RECIPE_FILE).unlink(missing_ok=True)  # the run writes its own
        write_json(folder / RUN_FILE, before.model_copy(update={"recipe_hash": recipe_hash}).to_json())


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
    if there - {LOCK_FILE, f"{RUN_FILE}.part"} and not there & {RUN_FILE, STORE_FOLDER, COMPARE_FOLDER}:
        raise RecipeError(f"{folder} is not empty and no experiment's; choose another with --output")
