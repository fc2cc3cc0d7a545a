"""What `compare.json` holds, typed: `compare` writes it, the report and the command line read it."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from grasp_lora.bench.records import read_needed

COMPARISON_FILE = "compare.json"
TEST_LOSS = "test_loss"


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Compared(_Shape):
    """The settings of the comparison, as they were given; see `ComparisonSettings`."""

    methods: list[str]
    seeds: list[int]
    grid: list[float]
    reference: str
    folds: int | None = None
    resamples: int


class FoldSizes(_Shape):
    """How many examples a fold of a cross-validation has for the test and for training, and how many of the source."""

    test: int
    train: int
    source_train: int


class Spread(_Shape):
    """Mean over the seeds, or the folds, and the sample standard deviation; a single value has none."""

    mean: float
    sd: float | None
    values: list[float]


class Cost(_Shape):
    """Means over the seeds or folds: beyond the adapters that are merged, and `in_all` with them; work is in forward passes."""

    runs: float
    seconds: float
    work: float
    runs_in_all: float
    seconds_in_all: float
    work_in_all: float


class Against(_Shape):
    """The reference against this row by one metric; see `PairedComparison`. Only planned comparisons have a verdict."""

    difference: float
    low: float
    high: float
    p_value: float
    confidence: float
    examples: int
    resamples: int
    comparisons: int
    higher_is_better: bool
    verdict: str | None


class Row(_Shape):
    """One method; all from `seeds` on is there only where a seed was finished.

    In a cross-validation `seeds` is the number of its folds. `scores` holds None for a metric that was not available.
    `taken` is there where a method chooses among adapters of several kinds: what it took, each with its seeds or folds.
    """

    method: str
    title: str
    unavailable: str | None
    failed: bool
    merges: bool
    seeds: int = 0
    scores: dict[str, Spread | None] = {}
    prune_ratio: Spread | None = None
    chosen_on: str | None = None
    taken: str | None = None
    cost: Cost | None = None
    against: dict[str, Against] = {}


class CurvePoint(_Shape):
    """Mean losses of one run of the grid; a large test set is measured for the chosen ratio alone.

    In a cross-validation `seed` is the number of the fold.
    """

    seed: int
    prune_ratio: float
    dev: float
    test: float | None = None


class Pace(_Shape):
    """Lowest and highest seconds per forward pass of the final runs."""

    lowest: float
    highest: float


class Comparison(_Shape):
    """The whole content of `compare.json`; `folds` are those of a cross-validation that are finished, `test_examples` of all.

    `test_groups`: how many groups of those that belong together they form, where that is fewer, and `test_group_size` how large
    the group of one is on average. `merge`: with `target.on: auto`, the sum or the average, each with its seeds or folds.
    """

    name: str
    recipe_hash: str
    settings: Compared
    backbone: str
    language: str
    seeds: list[int]
    test_examples: int
    dev_examples: int
    stops_early: bool
    keeps_best: bool
    micro_dev_examples: int
    reference: str
    metrics: list[str]
    signatures: dict[str, str]
    resamples: int
    comparisons: int
    rows: list[Row]
    curve: list[CurvePoint]
    warnings: list[str]
    made_with: list[dict[str, str]]
    pace: Pace | None
    folds: list[FoldSizes] = []
    test_groups: int | None = None
    test_group_size: float = 1.0
    merge: str | None = None

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a `compare.json`.

        Raises:
            RecipeError: it is not there, or not of this shape.
        """
        return read_needed(file, cls, "comparison")

    def to_json(self) -> dict[str, Any]:
        """Return plain values; what was not set is left out."""
        return self.model_dump(exclude_unset=True)

    def is_ahead_of(self, other: Self) -> bool:
        """Whether it is the same comparison with more seeds or folds."""
        done, others = (len(one.folds or one.seeds) for one in (self, other))
        return (self.recipe_hash, self.settings) == (other.recipe_hash, other.settings) and done > others

    @property
    def merges(self) -> dict[int, str]:
        """With `target.on: auto`, what the merge is, by seed or fold."""
        found: dict[int, str] = {}
        for part in (self.merge or "").split("; ") if self.merge else []:
            what, _, numbers = part.removesuffix(")").rpartition(" (")
            found |= {int(number): what for number in numbers.split(", ")}
        return found

    @property
    def runs(self) -> str:
        """What means and deviations go over."""
        return "folds" if self.folds else "seeds"

    @property
    def finished(self) -> list[Row]:
        """The rows that have a result."""
        return [row for row in self.rows if not row.unavailable]

    @property
    def reference_title(self) -> str:
        """The reference method as tables call it."""
        return next((row.title for row in self.rows if row.method == self.reference), self.reference)

    @property
    def learned(self) -> Row | None:
        """The row whose ratios a controller learned: the reference's if it has such, else the first one."""
        rows = [row for row in self.rows if row.method.startswith("grasp") and row.prune_ratio]
        return next((row for row in rows if row.method == self.reference), next(iter(rows), None))
