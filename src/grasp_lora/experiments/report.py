"""From a run folder to what a person reads: report.html, report.md and the model card of an adapter.

The run folder is read once into a `RunRecord`, every file checked against its shape. `_view` turns the record into texts and
tables that both reports share; the `_plot_*` functions turn it into plotly figures. Nothing is computed here that another
stage should have computed, and nothing that was not measured is shown as a number.
"""

import hashlib
import json
import logging
import math
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, NamedTuple, Self, TypeVar

import yaml
from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, ValidationError, model_validator

from grasp_lora.errors import RecipeError

logger = logging.getLogger(__name__)

STAGES = ("data", "source", "target", "merge", "controller", "final", "evaluate")
TRAINED = {"source": "Source", "target": "Target", "controller": "Controller run", "final": "Final run"}
SYSTEMS = {
    "source": "Source only",
    "target": "Target only",
    "merged": "Merged, not pruned",
    "grasp": "GRASP",
}
METRIC_NAMES = {
    "f1": "F1",
    "exact_match": "Exact match",
    "bertscore": "BERTScore",
    "rougeL": "ROUGE-L",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "bleu": "BLEU",
}
SPLITS = {
    "source_train": "source train",
    "source_dev": "source dev",
    "train": "train",
    "dev": "dev",
    "micro_dev": "micro-dev",
    "test": "test",
}
LANGUAGES = {"ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "hi": "Hindi"} | {
    "id": "Indonesian", "ja": "Japanese", "ru": "Russian", "sw": "Swahili", "tr": "Turkish", "vi": "Vietnamese",
    "zh": "Chinese",
}  # fmt: skip
EXAMPLES_SHOWN = 8
CHARACTERS_SHOWN = 1000
PAPER = "https://arxiv.org/abs/2601.06702"

Loss = Annotated[float, AllowInfNan(True)]  # a run that diverged deserves a report, too
Figure = dict[str, Any]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)


class Parent(_Record):
    """A model that the run started from."""

    name: str
    fingerprint: str


class RunInfo(_Record):
    """run.json."""

    grasp_lora: str
    recipe_hash: str
    name: str
    seed: int
    created: str
    backbone: Parent
    libraries: dict[str, str] = {}


class DataFacts(_Record):
    """data.json: the report of the splits, and the ids in each of them."""

    report: dict[str, Any] = {}
    ids: dict[str, list[str]] = {}


class StageMarker(_Record):
    """stages/<stage>.json."""

    stage: str
    seconds: float


class Round(_Record):
    """One line of controller/rounds.jsonl."""

    round: int
    step: int
    candidates: list[float] = Field(min_length=1)
    baseline_losses: list[float] = Field(min_length=1)
    candidate_losses: list[list[float]]
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
        if not all(self.candidate_losses):
            raise ValueError("each candidate needs at least one loss")
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
    rounds: int
    curve: Curve = Curve()


class HistoryRow(_Record):
    """One line of a history.jsonl."""

    step: int
    epoch: float | None = None
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
    """One line of evaluation/<system>.jsonl."""

    id: str
    prediction: str
    references: list[str] = []
    loss: Loss | None = None


class SystemScores(_Record):
    """What one system scored; None where a metric was not available."""

    test_loss: Loss | None = None
    dev_loss: Loss | None = None
    metrics: dict[str, Loss | None] = {}


class Metrics(_Record):
    """metrics.json."""

    systems: dict[str, SystemScores]
    prune_ratio: float | None = None
    prune_ratio_interval: tuple[float, float] | None = None
    signatures: dict[str, str] = {}
    test_examples: int = Field(ge=1)
    language: str | None = None
    cost: dict[str, float] = {}


@dataclass(frozen=True)
class RunRecord:
    """A run folder as far as it has got: None or empty where a stage has not written its files."""

    run: RunInfo | None
    recipe_text: str
    recipe: dict[str, Any]
    data: DataFacts
    stages: dict[str, StageMarker]
    rounds: list[Round]
    timings: list[Timing]
    ratio: LearnedRatio | None
    history: dict[str, list[HistoryRow]]
    sparsity: list[FactorSparsity]
    predictions: dict[str, list[Prediction]]
    metrics: Metrics | None


class Cell(NamedTuple):
    """A table cell; `best` marks the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the row."""

    caption: str
    columns: list[str]
    rows: list[list[Cell]]


def write_report(run_folder: Path) -> Path:
    """Write report.html and report.md into a run folder, from whatever its stages have written so far.

    Args:
        run_folder: folder of a finished or half-finished run.

    Returns:
        The path of report.html: one file that needs no network.

    Raises:
        RecipeError: this is no run folder, or a file in it is damaged.
    """
    record = read_run(run_folder)
    view = _view(record)
    figures = _figures(record)
    html = _render(
        "report.html.j2",
        view | {"figures": figures, "plotly_js": _plotly_js(), "nonce": secrets.token_urlsafe(16)},
    )
    (run_folder / "report.md").write_text(_render("report.md.j2", view), encoding="utf-8")
    path = run_folder / "report.html"
    path.write_text(html, encoding="utf-8")
    logger.info("Wrote %s", path)
    return path


def write_model_card(run_folder: Path, adapter_folder: Path) -> Path:
    """Write README.md into an adapter folder: what it is, what it was made of, what it scores, how to load it.

    The card names files and models and gives hashes; it holds no path and no text of the data.

    Args:
        run_folder: the run that made the adapter; it may be half-finished.
        adapter_folder: an existing PEFT adapter folder.

    Raises:
        RecipeError: the run folder does not fit (see `write_report`), has no run.json, or the adapter folder is missing.
    """
    record = read_run(run_folder)
    if record.run is None:
        raise RecipeError(f"{run_folder / 'run.json'} is missing; a model card needs it. Start the run again.")
    if not adapter_folder.is_dir():
        raise RecipeError(f"There is no adapter folder {adapter_folder}; give the folder of a saved adapter.")
    backbone = _public_name(record.run.backbone.name)
    base_model = backbone.split(" (")[0]  # what the hub knows: without a remark on the quantisation
    front = {
        "library_name": "peft",
        "base_model": base_model,
        "tags": ["lora", "grasp-lora", "adapter-merging", "pruning", "cross-lingual-transfer"],
        "pipeline_tag": "text-generation",
    }
    language = _language(record, "target")
    if language is not None and re.fullmatch(r"[a-z]{2,3}", language):
        front["language"] = [language]
    parents = [("Backbone", backbone, record.run.backbone.fingerprint)]
    for side in ("source", "target"):
        weights = run_folder / side / "adapter_model.safetensors"
        if weights.is_file():
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            parents.append((f"{side.capitalize()} adapter", f"the run's folder {side}", f"sha256:{digest}"))
    context = _view(record) | {
        "front_matter": yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        "base_model": json.dumps(base_model),
        "base_model_name": backbone,
        "parents": parents,
        "files": _data_names(record),
    }
    path = adapter_folder / "README.md"
    path.write_text(_render("model_card.md.j2", context), encoding="utf-8")
    return path


# ---- reading ----------------------------------------------------------------------------------------------------------


def read_run(run_folder: Path) -> RunRecord:
    """Read all that a run folder holds.

    Raises:
        RecipeError: there is neither a run.json nor a recipe.yaml, or a file is damaged; the message names it.
    """
    recipe_file = run_folder / "recipe.yaml"
    if not (recipe_file.is_file() or (run_folder / "run.json").is_file()):
        raise RecipeError(f"{run_folder} is no run folder: it holds neither run.json nor recipe.yaml.")
    recipe_text = _text(recipe_file) if recipe_file.is_file() else ""
    try:
        recipe = yaml.safe_load(recipe_text) if recipe_text else {}
    except yaml.YAMLError as error:
        raise _damaged(recipe_file, "it is not valid YAML") from error
    if not isinstance(recipe, dict):
        raise _damaged(recipe_file, "it must hold keys and values")
    sparsity_file = run_folder / "final" / "sparsity.json"
    sparsity = _json(sparsity_file) if sparsity_file.is_file() else []
    if not isinstance(sparsity, list):
        raise _damaged(sparsity_file, "it must hold a list")
    markers = {stage: _object(run_folder / "stages" / f"{stage}.json", StageMarker) for stage in STAGES}
    return RunRecord(
        run=_object(run_folder / "run.json", RunInfo),
        recipe_text=recipe_text,
        recipe=recipe,
        data=_object(run_folder / "data.json", DataFacts) or DataFacts(),
        stages={stage: marker for stage, marker in markers.items() if marker is not None},
        rounds=_lines(run_folder / "controller" / "rounds.jsonl", Round),
        timings=_lines(run_folder / "controller" / "timings.jsonl", Timing),
        ratio=_object(run_folder / "controller" / "ratio.json", LearnedRatio),
        history={stage: _lines(run_folder / stage / "history.jsonl", HistoryRow) for stage in TRAINED},
        sparsity=[_checked(entry, FactorSparsity, sparsity_file) for entry in sparsity],
        predictions={name: _lines(run_folder / "evaluation" / f"{name}.jsonl", Prediction) for name in SYSTEMS},
        metrics=_object(run_folder / "metrics.json", Metrics),
    )


_Shape = TypeVar("_Shape", bound=_Record)


def _object(path: Path, shape: type[_Shape]) -> _Shape | None:
    return _checked(_json(path), shape, path) if path.is_file() else None


def _lines(path: Path, shape: type[_Shape]) -> list[_Shape]:
    if not path.is_file():
        return []
    rows = []
    # Not splitlines(): it also cuts at U+2028, which JSON allows inside a text.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            where = f" (line {number})"
            rows.append(_checked(_parsed(line, path, where), shape, path, where))
    return rows


def _json(path: Path) -> Any:
    return _parsed(_text(path), path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, "it is not UTF-8 text") from error


def _parsed(text: str, path: Path, where: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _damaged(path, f"it is not valid JSON, {error.msg.lower()}", where) from error


def _checked(value: Any, shape: type[_Shape], path: Path, where: str = "") -> _Shape:
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _damaged(path, f"{place}: {first['msg'].lower()}" if place else first["msg"], where) from error


def _damaged(path: Path, reason: str, where: str = "") -> RecipeError:
    return RecipeError(f"{path}{where} is damaged: {reason}. Delete it and run its stage again.")


# ---- texts and tables -------------------------------------------------------------------------------------------------


def _view(record: RunRecord) -> dict[str, Any]:
    """Everything that both reports and the model card print, as texts and tables."""
    ratio, interval, confidence = _ratio(record)
    return {
        "version": version("grasp-lora"),
        "paper": PAPER,
        "run": record.run,
        "name": record.run.name if record.run else record.recipe.get("name", "unnamed run"),
        "headline": _headline(record),
        "facts": _facts(record),
        "missing": [stage for stage in STAGES if stage not in record.stages],
        "ratio": None if ratio is None else percent(ratio, 1),
        "interval": None if interval is None else [percent(bound, 1) for bound in interval],
        "confidence": percent(confidence),
        "language": _language(record, "target") or "",
        "languages": _languages(record),
        "sizes": _sizes(record),
        "scores": _scores_table(record),
        "signatures": {METRIC_NAMES.get(key, key): text for key, text in _signatures(record).items()},
        "notes": _score_notes(record),
        "rule": record.ratio.rule if record.ratio else None,
        "curve": _curve_table(record),
        "rounds": _rounds_table(record),
        "losses": _losses_table(record),
        "sparsity": _sparsity_table(record),
        "sparsity_note": _sparsity_note(record),
        "cost": _cost_table(record),
        "probe_note": _probe_note(record),
        "examples": _examples(record),
        "test_examples": record.metrics.test_examples if record.metrics else None,
        "recipe": record.recipe_text,
    }


def percent(fraction: float, digits: int = 0) -> str:
    """Print a fraction as a percentage, with a space that does not break.

    >>> percent(0.4567, 1)
    '45.7\\xa0%'
    """
    return f"{100 * fraction:.{digits}f}\u00a0%"


def duration(seconds: float) -> str:
    """Print seconds the way one says them.

    >>> duration(7.25), duration(125), duration(4000)
    ('7.2 s', '2 min 5 s', '1 h 7 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60} min"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def _ratio(record: RunRecord) -> tuple[float | None, tuple[float, float] | None, float]:
    """The ratio of the result, its interval and the confidence of that."""
    learned, metrics = record.ratio, record.metrics
    confidence = learned.confidence if learned else 0.95
    if metrics is not None and metrics.prune_ratio is not None:
        return metrics.prune_ratio, metrics.prune_ratio_interval, confidence
    if learned is not None:
        return learned.prune_ratio, (learned.low, learned.high), confidence
    return None, None, confidence


def _headline(record: RunRecord) -> str:
    ratio, interval, confidence = _ratio(record)
    if ratio is None:
        sentences = ["No prune ratio has been learned yet."]
    elif interval is None:
        sentences = [f"Prune {percent(ratio)} of the merged adapter."]
    else:
        low, high = (f"{100 * bound:.0f}" for bound in interval)
        span = f"{low} to {high} %".replace(" ", "\u00a0")
        sentences = [f"Prune {percent(ratio)} of the merged adapter ({percent(confidence)} interval {span})."]
    compared = _compared(record, "target")
    if compared is not None:
        metric, ours, theirs = compared
        name = METRIC_NAMES.get(metric, metric)
        sentences.append(f"Test {name} {ours:.1f} against {theirs:.1f} for the target adapter alone.")
        worth = 100 / record.metrics.test_examples if record.metrics else math.inf
        if abs(ours - theirs) <= 2 * worth:
            sentences.append("That difference is no more than two test examples: treat it as noise.")
    elif record.metrics is None:
        sentences.append("The result has not been evaluated yet.")
    return " ".join(sentences)


def _compared(record: RunRecord, other: str) -> tuple[str, float, float] | None:
    """The leading metric with the scores of GRASP and of another system, where both have it."""
    if record.metrics is None or not {"grasp", other} <= record.metrics.systems.keys():
        return None
    ours, theirs = (record.metrics.systems[name].metrics for name in ("grasp", other))
    for metric in [*METRIC_NAMES, *ours]:
        pair = ours.get(metric), theirs.get(metric)
        if pair[0] is not None and pair[1] is not None and all(map(math.isfinite, (pair[0], pair[1]))):
            return metric, pair[0], pair[1]
    return None


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """What was run, as pairs of label and text."""
    facts = []
    if record.run is not None:
        facts.append(("Backbone", _public_name(record.run.backbone.name)))
    for label, text in (("Languages", _languages(record)), ("Examples", _sizes(record))):
        if text:
            facts.append((label, text))
    if record.run is not None:
        run = record.run
        libraries = ", ".join(f"{name} {version}" for name, version in run.libraries.items())
        facts += [
            ("Seed", str(run.seed)),
            ("Date", run.created[:16].replace("T", " ")),
            ("Versions", f"grasp-lora {run.grasp_lora}" + (f", {libraries}" if libraries else "")),
            ("Recipe", f"{run.name}, {run.recipe_hash[:19]}"),
        ]
    return facts


def _sizes(record: RunRecord) -> str:
    """Examples per split, from the ids or from the measures of the data report."""
    measures = _inner(record.data.report, "splits")
    sizes = {split: len(record.data.ids.get(split, ())) or _inner(measures, split).get("examples") for split in SPLITS}
    return ", ".join(f"{name} {sizes[split]}" for split, name in SPLITS.items() if sizes[split])


def _inner(content: Any, *keys: str) -> dict[str, Any]:
    """The object under nested keys, empty where there is none."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def _languages(record: RunRecord) -> str:
    codes = [_language(record, side) for side in ("source", "target")]
    return " to ".join(LANGUAGES.get(code, code) for code in codes if code)


def _language(record: RunRecord, side: str) -> str | None:
    """The language code of one side, from metrics.json, the data report or the recipe."""
    if side == "target" and record.metrics is not None and record.metrics.language:
        return record.metrics.language
    found = _inner(record.data.report, side).get("language") or _inner(record.recipe, "data", side).get("language")
    return str(found) if found else None


def _signatures(record: RunRecord) -> dict[str, str]:
    return record.metrics.signatures if record.metrics else {}


def _metric_keys(metrics: Metrics) -> list[str]:
    used = {key for system in metrics.systems.values() for key in system.metrics}
    return [key for key in METRIC_NAMES if key in used] + sorted(used - METRIC_NAMES.keys())


def _scores_table(record: RunRecord) -> Table | None:
    metrics = record.metrics
    if metrics is None or not metrics.systems:
        return None
    keys = _metric_keys(metrics)
    names = [name for name in SYSTEMS if name in metrics.systems]
    scores = [metrics.systems[name] for name in names]
    columns: list[list[Cell]] = [
        _column([score.test_loss for score in scores], 3, min),
        _column([score.dev_loss for score in scores], 3, min),
        *(_column([score.metrics.get(key) for score in scores], 1, max) for key in keys),
    ]
    pruned = "–" if metrics.prune_ratio is None else percent(metrics.prune_ratio, 1)
    rows = [
        [Cell(SYSTEMS[name]), *cells, Cell(pruned if name == "grasp" else percent(0))]
        for name, *cells in zip(names, *columns, strict=True)
    ]
    heads = [
        "System",
        "Test loss\u00a0↓",
        "Dev loss\u00a0↓",
        *(f"{METRIC_NAMES.get(key, key)}\u00a0↑" for key in keys),
        "Pruned",
    ]
    return Table("Scores on the test set", heads, rows)


def _column(values: Sequence[float | None], digits: int, choose: Callable[[Iterable[float]], float]) -> list[Cell]:
    """Cells of one column; all that print like the best one are best, since the rest cannot be seen."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    best = _number(choose(finite), digits) if len(finite) > 1 else None
    return [Cell(text, text == best) for text in (_number(value, digits) for value in values)]


def _score_notes(record: RunRecord) -> list[str]:
    """How much of the table is noise, and what separates GRASP from each other system."""
    if record.metrics is None:
        return []
    count = record.metrics.test_examples
    worth = 100 / count
    notes = [
        f"The test set has {count} examples: one example is worth {worth:.2f} points of a score that is a mean over "
        "examples. Differences of one or two examples are noise."
    ]
    for other in ("merged", "target", "source"):
        compared = _compared(record, other)
        if compared is None:
            continue
        metric, ours, theirs = compared
        gap = f"{_signed(ours - theirs)} points ({abs(ours - theirs) / worth:.1f} test examples)"
        note = f"GRASP against {SYSTEMS[other].lower()}: {METRIC_NAMES.get(metric, metric)} {gap}"
        better, shared = _lower_losses(record, other)
        notes.append(note + (f", lower loss on {better} of {shared} test examples." if shared else "."))
    return notes


def _lower_losses(record: RunRecord, other: str) -> tuple[int, int]:
    """On how many test examples GRASP has the lower loss, and how many have a loss for both."""
    theirs = {row.id: row.loss for row in record.predictions[other] if row.loss is not None}
    pairs = [
        (row.loss, theirs[row.id]) for row in record.predictions["grasp"] if row.id in theirs and row.loss is not None
    ]
    return sum(ours < loss for ours, loss in pairs), len(pairs)


def _curve_table(record: RunRecord) -> Table | None:
    if record.ratio is None or not record.ratio.curve.ratios:
        return None
    curve = record.ratio.curve
    # About ten rows say what the curve says.
    picks = range(0, len(curve.ratios), max(1, len(curve.ratios) // 10))
    rows = [
        [Cell(percent(curve.ratios[i], 1)), *(Cell(f"{line[i]:.4f}") for line in (curve.mean, curve.low, curve.high))]
        for i in picks
    ]
    return Table("Fitted loss above its minimum", ["Pruned", "Fit", "Low", "High"], rows)


def _rounds_table(record: RunRecord) -> Table | None:
    if not record.rounds:
        return None
    rows = []
    for measured in record.rounds:
        what = "moved, clipped" if measured.clipped else "moved"
        rows.append(
            [
                Cell(str(measured.round)),
                Cell(str(measured.step)),
                Cell(f"{fmean(measured.baseline_losses):.4f}"),
                Cell(", ".join(percent(ratio, 1) for ratio in measured.candidates)),
                Cell(", ".join(_signed(reward, 4) for reward in measured.rewards)),
                Cell(f"{percent(measured.policy_mean, 1)} ± {100 * measured.policy_std:.1f}"),
                Cell(percent(measured.ratio, 1)),
                Cell(what if measured.committed else "stayed"),
            ]
        )
    heads = ["Round", "Step", "Micro-dev loss", "Candidates", "Rewards", "Policy", "Current ratio", "Commit"]
    return Table("Rounds of the controller", heads, rows)


def _losses_table(record: RunRecord) -> Table | None:
    rows = []
    for stage, title in TRAINED.items():
        history = record.history[stage]
        if not history:
            continue
        train = [row.loss for row in history if row.loss is not None]
        dev = [row for row in history if row.dev_loss is not None and math.isfinite(row.dev_loss)]
        best = min(dev, key=lambda row: row.dev_loss or 0.0) if dev else None
        rows.append(
            [
                Cell(title),
                Cell(str(history[-1].step)),
                Cell(_number(train[0] if train else None, 3)),
                Cell(_number(train[-1] if train else None, 3)),
                Cell(_number(best.dev_loss if best else None, 3)),
                Cell(str(best.step) if best else "–"),
            ]
        )
    heads = ["Stage", "Steps", "First train loss", "Last train loss", "Best dev loss", "at step"]
    return Table("Losses of each training stage", heads, rows) if rows else None


def _kept(entries: Iterable[FactorSparsity]) -> float:
    found = list(entries)
    return sum(entry.kept for entry in found) / sum(entry.weights for entry in found)


def _sparsity_table(record: RunRecord) -> Table | None:
    if not record.sparsity:
        return None
    groups: dict[tuple[str, str, str], list[FactorSparsity]] = {}
    for entry, (kind, _) in zip(record.sparsity, _places(record.sparsity), strict=True):
        groups.setdefault((kind, entry.factor, entry.segment), []).append(entry)
    rows = []
    for (kind, factor, segment), entries in sorted(groups.items()):
        shares = [entry.kept / entry.weights for entry in entries]
        texts = [str(sum(entry.weights for entry in entries)), percent(_kept(entries), 1)]
        rows.append(
            [
                Cell(f"{kind} {factor}, {segment}"),
                *map(Cell, texts),
                Cell(percent(min(shares), 1)),
                Cell(percent(max(shares), 1)),
            ]
        )
    return Table("Kept weights per factor", ["Factor", "Weights", "Kept", "Lowest layer", "Highest layer"], rows)


def _sparsity_note(record: RunRecord) -> str | None:
    if not record.sparsity:
        return None
    shares = [entry.kept / entry.weights for entry in record.sparsity]
    note = f"Measured over all factors, {percent(1 - _kept(record.sparsity), 2)} of the weights are zero."
    if max(shares) - min(shares) < 0.01:
        note += " Every factor keeps the same share: the ratio is applied to each of them separately."
    ratio = _ratio(record)[0]
    if ratio is not None and abs(1 - _kept(record.sparsity) - ratio) > 0.005:
        note += f" That is not the ratio of {percent(ratio, 2)} above: check the final run."
    segments = {name: [e for e in record.sparsity if e.segment == name] for name in ("source", "target")}
    if all(segments.values()):
        kept = {name: percent(_kept(entries), 1) for name, entries in segments.items()}
        note += (
            f" Of the source adapter {kept['source']} of the weights survive, of the target adapter {kept['target']}."
        )
    return note


def _cost(record: RunRecord) -> dict[str, float]:
    if record.metrics is not None and record.metrics.cost:
        return record.metrics.cost
    return {stage: marker.seconds for stage, marker in record.stages.items()}


def _cost_table(record: RunRecord) -> Table | None:
    cost = _cost(record)
    if not cost:
        return None
    total = sum(cost.values())
    rows = [
        [Cell(stage), Cell(f"{seconds:.1f}"), Cell(duration(seconds)), Cell(percent(seconds / total if total else 0.0))]
        for stage, seconds in [*cost.items(), ("all", total)]
    ]
    return Table("Time per stage", ["Stage", "Seconds", "Time", "Share"], rows)


def _probes(record: RunRecord) -> tuple[float, float]:
    """Seconds of probing, and of probing and training together, in the controller run."""
    probing = sum(timing.probe_seconds for timing in record.timings)
    return probing, probing + sum(timing.train_seconds for timing in record.timings)


def _probe_note(record: RunRecord) -> str | None:
    probing, together = _probes(record)
    if not together:
        return None
    return (
        f"Probes took {percent(probing / together)} of the controller run: {duration(probing)} of {duration(together)} "
        f"in {len(record.timings)} rounds."
    )


def _examples(record: RunRecord) -> list[dict[str, Any]]:
    """The first test examples, side by side."""
    shown = {name: record.predictions[name] for name in ("target", "grasp") if record.predictions[name]}
    if not shown:
        return []
    by_id = {name: {row.id: row.prediction for row in rows} for name, rows in shown.items()}
    return [
        {
            "id": row.id,
            "references": [_cut(text) for text in row.references],
            "predictions": [(SYSTEMS[name], _cut(texts.get(row.id, "–"))) for name, texts in by_id.items()],
        }
        for row in next(reversed(shown.values()))[:EXAMPLES_SHOWN]
    ]


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS_SHOWN else text[: CHARACTERS_SHOWN - 1] + "…"


def _public_name(name: str) -> str:
    """A model's name as others know it: `owner/name` stays, of a local path only the last part is left.

    >>> _public_name("google/gemma-3-270m (Q4_K_M GGUF)"), _public_name("/data/models/llama")
    ('google/gemma-3-270m (Q4_K_M GGUF)', 'llama')
    """
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?( \([\w .-]*\))?", name):
        return name
    last = re.split(r"[\\/]", name.rstrip("\\/"))[-1]
    return re.sub(r"[^\w.-]", "-", last) or "unnamed"


def _data_names(record: RunRecord) -> list[str]:
    """Names of the data sets and files in the recipe, without their folders."""
    names = []
    for side in ("source", "target"):
        corpus = _inner(record.recipe, "data", side)
        if isinstance(corpus.get("hub"), str):
            names.append(_public_name(corpus["hub"]))
        for key, files in corpus.items():
            if key.endswith("files") and isinstance(files, list):
                names += [re.split(r"[\\/]", str(file))[-1] for file in files]
    return list(dict.fromkeys(names))


# ---- figures ----------------------------------------------------------------------------------------------------------
# Plain plotly JSON. Colours are names of CSS variables, which the page resolves, so that one file suits light and dark.


def _figures(record: RunRecord) -> dict[str, Figure]:
    """All figures that the record has data for, by the name under which the page places them."""
    figures = {
        "curve": _plot_curve(record),
        "trajectory": _plot_trajectory(record),
        "baseline": _plot_baseline(record),
        **{f"history-{stage}": _plot_history(record.history[stage]) for stage in TRAINED},
        "sparsity": _plot_sparsity(record),
        "survival": _plot_survival(record),
        "cost": _plot_cost(record),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _figure(traces: list[dict[str, Any]], x: str, y: str, **layout: Any) -> Figure:
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for axis in axes:
        axes[axis] |= layout.pop(axis, {})
    return {"data": traces, "layout": axes | layout}


def _band(x: Sequence[float], low: Sequence[float], high: Sequence[float], name: str, color: str) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines", "fill": "toself", "fillcolor": color, "line": {"width": 0}, "name": name,
        "x": [*x, *reversed(x)], "y": [*high, *reversed(low)], "hoverinfo": "skip",
    }  # fmt: skip


def _plot_curve(record: RunRecord) -> Figure | None:
    """The fitted curve, and the differences that it was fitted to."""
    learned = record.ratio
    if learned is None:
        return None
    curve = learned.curve
    traces = []
    if curve.ratios:
        interval = f"{100 * learned.confidence:.0f} % interval of the fit"
        traces.append(_band(curve.ratios, curve.low, curve.high, interval, "var(--grasp-soft)"))
    points = [point for measured in record.rounds for point in _differences(measured, curve)]
    if points:
        ratios, losses, rounds = zip(*points, strict=True)
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": "one probe", "x": ratios, "y": losses,
                "customdata": rounds,
                "hovertemplate": "round %{customdata}<br>ratio %{x:.3f}<br>loss difference %{y:.4f}<extra></extra>",
                "marker": {
                    "size": 7, "color": rounds, "colorscale": _SEQUENTIAL,
                    "line": {"width": 0.5, "color": "var(--paper)"},
                    "colorbar": {"title": {"text": "Round"}},
                },
            }
        )  # fmt: skip
    if curve.ratios:
        traces.append(
            {"type": "scatter", "mode": "lines", "name": "fitted loss", "x": curve.ratios, "y": curve.mean,
             "line": {"width": 2.5, "color": "var(--grasp)"},
             "hovertemplate": "ratio %{x:.3f}<br>fit %{y:.4f}<extra></extra>"}
        )  # fmt: skip
    zero = "above minimum" if curve.ratios else "minus baseline"
    star = learned.prune_ratio
    return _figure(
        traces,
        "Prune ratio (fraction of weights)",
        f"Loss {zero} (nats per token)",
        shapes=[
            {"type": "rect", "xref": "x", "yref": "paper", "x0": learned.low, "x1": learned.high, "y0": 0, "y1": 1,
             "fillcolor": "var(--mark-soft)", "line": {"width": 0}, "layer": "below"},
            {"type": "line", "xref": "x", "yref": "paper", "x0": star, "x1": star, "y0": 0, "y1": 1,
             "line": {"width": 1.5, "dash": "dash", "color": "var(--mark)"}},
        ],
        annotations=[
            {"xref": "x", "yref": "paper", "x": star, "y": 1, "yanchor": "bottom", "showarrow": False,
             "text": f"p* = {star:.3f}", "font": {"color": "var(--mark)"}}
        ],
    )  # fmt: skip


_SEQUENTIAL = [[0, "var(--low)"], [1, "var(--high)"]]
_DIVERGING = [[0, "var(--bad)"], [0.5, "var(--neutral)"], [1, "var(--good)"]]


def _differences(measured: Round, curve: Curve) -> list[tuple[float, float, int]]:
    """Ratio, loss and round of each probe of a round.

    Only differences within a round mean something, so a round is moved as a whole to where the curve runs at its
    ratios; without a curve the baseline of the round is zero.
    """
    baseline = fmean(measured.baseline_losses)
    ratios = [measured.ratio_before, *measured.candidates]
    losses = [0.0, *(fmean(losses) - baseline for losses in measured.candidate_losses)]
    shift = 0.0
    if curve.ratios:
        shift = fmean(_interpolated(curve, ratio) for ratio in ratios) - fmean(losses)
    return [(ratio, loss + shift, measured.round) for ratio, loss in zip(ratios, losses, strict=True)]


def _interpolated(curve: Curve, ratio: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(zip(curve.ratios, curve.mean, strict=True)):
        if x0 <= ratio <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (ratio - x0) / (x1 - x0)
    return curve.mean[0] if ratio < curve.ratios[0] else curve.mean[-1]


def _plot_trajectory(record: RunRecord) -> Figure | None:
    rounds = record.rounds
    if not rounds:
        return None
    steps = [measured.step for measured in rounds]
    means = [measured.policy_mean for measured in rounds]
    points = [
        (measured.step, ratio, reward)
        for measured in rounds
        for ratio, reward in zip(measured.candidates, measured.rewards, strict=True)
    ]
    rewards = [reward for _, _, reward in points]
    # One disastrous candidate must not turn all others grey, so half of the rewards have a full colour.
    limit = median(abs(reward) for reward in rewards) or 1e-6
    low = [max(0.0, measured.policy_mean - measured.policy_std) for measured in rounds]
    high = [min(1.0, measured.policy_mean + measured.policy_std) for measured in rounds]
    traces = [
        _band(steps, low, high, "policy ± 1 deviation", "var(--target-soft)"),
        {"type": "scatter", "mode": "lines", "name": "policy mean", "x": steps, "y": means,
         "line": {"width": 1.5, "dash": "dot", "color": "var(--target)"}},
        {"type": "scatter", "mode": "markers", "name": "candidate", "x": [point[0] for point in points],
         "y": [point[1] for point in points], "customdata": rewards,
         "hovertemplate": "step %{x}<br>candidate %{y:.3f}<br>reward %{customdata:.4f}<extra></extra>",
         "marker": {"size": 8, "color": rewards, "colorscale": _DIVERGING, "cmin": -limit, "cmax": limit,
                    "line": {"width": 0.75, "color": "var(--muted)"},
                    "colorbar": {"title": {"text": "Reward<br>(nats per<br>token)"}}}},
        {"type": "scatter", "mode": "lines", "name": "committed ratio", "x": [0, *steps],
         "y": [rounds[0].ratio_before, *(measured.ratio for measured in rounds)],
         "line": {"width": 2.5, "shape": "hv", "color": "var(--grasp)"}},
    ]  # fmt: skip
    return _figure(traces, "Optimizer step", "Prune ratio (fraction of weights)")


def _plot_baseline(record: RunRecord) -> Figure | None:
    if not record.rounds:
        return None
    trace = {
        "type": "scatter", "mode": "lines+markers", "name": "committed mask",
        "x": [measured.step for measured in record.rounds],
        "y": [fmean(measured.baseline_losses) for measured in record.rounds],
        "line": {"width": 2, "color": "var(--grasp)"}, "marker": {"size": 5},
    }  # fmt: skip
    return _figure([trace], "Optimizer step", "Micro-dev loss (nats per token)", showlegend=False)


def _plot_history(history: list[HistoryRow]) -> Figure | None:
    train = [(row.step, row.loss) for row in history if row.loss is not None]
    dev = [(row.step, row.dev_loss) for row in history if row.dev_loss is not None]
    if not train and not dev:
        return None
    traces = [
        {"type": "scatter", "mode": mode, "name": name, "x": [step for step, _ in rows], "y": [loss for _, loss in rows],
         "line": {"width": width, "color": color}, "marker": {"size": 6}}
        for name, rows, mode, width, color in (
            ("train", train, "lines", 1.25, "var(--merged)"),
            ("dev", dev, "lines+markers", 2, "var(--grasp)"),
        )
        if rows
    ]  # fmt: skip
    return _figure(traces, "Optimizer step", "Loss (nats per token)", yaxis={"rangemode": "tozero"})


def _places(entries: Sequence[FactorSparsity]) -> list[tuple[str, str]]:
    """Kind of projection and layer of each module: `model.layers.3.self_attn.q_proj` is q_proj in layer 3."""
    parts = []
    for entry in entries:
        match = re.search(r"\.(\d+)\.(.+)$", entry.module)
        parts.append((match[2], match[1]) if match else (entry.module, "–"))
    kinds = {kind for kind, _ in parts}
    short = {kind: kind.rsplit(".", 1)[-1] for kind in kinds}
    # GPT-2 has a c_proj in its attention and another in its MLP: then the full names are needed.
    if len(set(short.values())) < len(kinds):
        return parts
    return [(short[kind], layer) for kind, layer in parts]


def _plot_sparsity(record: RunRecord) -> Figure | None:
    if not record.sparsity:
        return None
    shares: dict[tuple[str, str], float] = {}
    for entry, (kind, layer) in zip(record.sparsity, _places(record.sparsity), strict=True):
        shares[f"{kind} {entry.factor}, {entry.segment}", layer] = entry.kept / entry.weights
    rows = sorted({row for row, _ in shares}, reverse=True)
    layers = sorted({layer for _, layer in shares}, key=lambda layer: (layer.isdigit(), len(layer), layer))
    trace = {
        "type": "heatmap", "x": [_label(layer) for layer in layers], "y": [_label(row) for row in rows],
        "z": [[shares.get((row, layer)) for layer in layers] for row in rows],
        "zmin": 0, "zmax": 1, "xgap": 1, "ygap": 1, "colorscale": _SEQUENTIAL,
        "hovertemplate": "layer %{x}<br>%{y}<br>kept %{z:.3f}<extra></extra>",
        "colorbar": {"title": {"text": "Kept share<br>(fraction)"}},
    }  # fmt: skip
    height = 150 + 26 * len(rows)
    category = {"type": "category"}
    return _figure([trace], "Layer (index)", "Factor, segment", height=height, xaxis=category, yaxis=category)


def _plot_survival(record: RunRecord) -> Figure | None:
    groups: dict[str, dict[str, list[FactorSparsity]]] = {"source": {}, "target": {}}
    for entry, (kind, _) in zip(record.sparsity, _places(record.sparsity), strict=True):
        if entry.segment in groups:
            groups[entry.segment].setdefault(f"{kind} {entry.factor}", []).append(entry)
    if not all(groups.values()):
        return None
    traces = [
        {"type": "bar", "name": segment, "x": [_label(name) for name in sorted(factors)],
         "y": [_kept(factors[name]) for name in sorted(factors)], "marker": {"color": f"var(--{segment})"},
         "hovertemplate": "%{x}<br>kept %{y:.3f}<extra>" + segment + "</extra>"}
        for segment, factors in groups.items()
    ]  # fmt: skip
    return _figure(traces, "Factor", "Kept share (fraction of weights)", yaxis={"range": [0, 1]}, bargap=0.35)


def _plot_cost(record: RunRecord) -> Figure | None:
    cost = _cost(record)
    if not cost:
        return None
    unit, name = (60, "minutes") if max(cost.values()) >= 180 else (1, "seconds")
    probing = min(_probes(record)[0], cost.get("controller", 0.0))
    rest = {stage: seconds - probing if stage == "controller" else seconds for stage, seconds in cost.items()}
    labels = [_label(stage) for stage in cost]
    traces = [
        {"type": "bar", "orientation": "h", "name": "training and the rest", "y": labels,
         "x": [seconds / unit for seconds in rest.values()], "marker": {"color": "var(--merged)"}},
    ]  # fmt: skip
    if probing:
        traces.append(
            {"type": "bar", "orientation": "h", "name": "probes", "y": labels,
             "x": [probing / unit if stage == "controller" else 0.0 for stage in cost], "marker": {"color": "var(--grasp)"}}
        )  # fmt: skip
    return _figure(
        traces, f"Time ({name})", "Stage", barmode="stack", height=130 + 34 * len(cost),
        yaxis={"autorange": "reversed", "type": "category"},
    )  # fmt: skip


def _label(text: str) -> str:
    """Plotly reads tags in its texts, so a text from a file must not hold any."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# ---- rendering --------------------------------------------------------------------------------------------------------


def _render(template: str, context: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("grasp_lora.experiments"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["script_json"] = _script_json
    environment.filters["md"] = _markdown
    return environment.get_template(template).render(context)


def _script_json(value: Any) -> Any:
    """JSON that is safe inside a script element: no tag can end it, and no line separator can break it."""
    from markupsafe import Markup

    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _finite(value: Any) -> Any:
    """The same value with None, which plotly leaves out, for every number that JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def _markdown(text: str) -> str:
    """Escape a text for a Markdown table cell: no tag, no markup, one line.

    >>> _markdown("a|b<i>*c*")
    'a\\\\|b&lt;i&gt;\\\\*c\\\\*'
    """
    line = " ".join(str(text).split())
    line = re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _plotly_js() -> Any:
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    assert "</script" not in source.lower(), "the plotly library would end its own script element"
    return Markup(source)
