"""From a run folder to what a person reads: report.html, report.md and the model card of an adapter.

`_view` turns the record of a run into texts and tables that all three share. Nothing is computed here that another stage
should have computed, and nothing that was not measured is shown as a number.
"""

import hashlib
import json
import logging
import math
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from grasp_lora.display import escaped, one_line
from grasp_lora.errors import RecipeError
from grasp_lora.experiments.figures import figures_of, plotly_js, script_json
from grasp_lora.experiments.run_folder import SYSTEMS, TRAINED, RunRecord, by_factor, inner, kept_share, read_run
from grasp_lora.method.estimation import WIDE_INTERVAL
from grasp_lora.method.policy import POLICIES
from grasp_lora.training.durable import write_whole

logger = logging.getLogger(__name__)

METRIC_NAMES = {
    "f1": "F1", "exact_match": "Exact match", "bertscore": "BERTScore", "rougeL": "ROUGE-L", "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2", "bleu": "BLEU",
}  # fmt: skip
SPLITS = ("source_train", "source_dev", "train", "dev", "micro_dev", "test")
LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "hi": "Hindi",
    "id": "Indonesian", "ja": "Japanese", "ru": "Russian", "sw": "Swahili", "tr": "Turkish", "vi": "Vietnamese",
    "zh": "Chinese",
}  # fmt: skip
EXAMPLES_SHOWN = 8
CHARACTERS_SHOWN = 1000
PAPER = "https://arxiv.org/abs/2601.06702"


class Cell(NamedTuple):
    """A table cell; `best` marks the best of its column."""

    text: str
    best: bool = False


class Table(NamedTuple):
    """A table of texts; the first column names the row."""

    caption: str
    columns: Sequence[str]
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
    page = {"figures": figures_of(record), "plotly_js": plotly_js(), "nonce": secrets.token_urlsafe(16)}
    html = render("report.html.j2", view | page)
    write_whole(run_folder / "report.md", render("report.md.j2", view))
    path = run_folder / "report.html"
    write_whole(path, html)
    logger.info("Wrote %s", path)
    return path


def write_model_card(run_folder: Path, adapter_folder: Path) -> Path:
    """Write README.md into an adapter folder: what it is, what it was made of, what it scores, how to load it.

    The card names files and models and gives hashes; it holds no path and no text of the data.

    Args:
        run_folder: the run that made the adapter; it may be half-finished.
        adapter_folder: an existing PEFT adapter folder.

    Raises:
        RecipeError: the run folder does not fit (see `write_report`), or the adapter folder is missing.
    """
    record = read_run(run_folder)
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
    if re.fullmatch(r"[a-z]{2,3}", language):
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
    write_whole(path, render("model_card.md.j2", context))
    return path


def _view(record: RunRecord) -> dict[str, Any]:
    """Everything that both reports and the model card print, as texts and tables."""
    learned, given = record.learned, record.given_ratio is not None
    signatures = record.metrics.signatures if record.metrics else {}
    return {
        "version": version("grasp-lora"),
        "paper": PAPER,
        "run": record.run,
        "name": record.run.name,
        "headline": _headline(record),
        "facts": _facts(record),
        "missing": record.missing,
        "ratio": None if record.prune_ratio is None else percent(record.prune_ratio, 1),
        "given": given,
        "start": _start(record),
        "shared": _shares(record),
        "in_turn": _in_turn(record),
        "probed_on": _probed_on(record),
        "interval": [percent(bound, 1) for bound in (learned.low, learned.high)] if learned and not given else None,
        "confidence": percent(learned.confidence) if learned else None,
        "interval_note": _interval_note(record),
        "language": _language(record, "target"),
        "languages": _languages(record),
        "sizes": _sizes(record),
        "scores": _scores_table(record),
        "signatures": {METRIC_NAMES.get(key, key): text for key, text in signatures.items()},
        "notes": _score_notes(record),
        "rule": learned.rule if learned and not given else None,
        "curve": _curve_table(record),
        "rounds": _rounds_table(record),
        "losses": _losses_table(record),
        "sparsity": _sparsity_table(record),
        "sparsity_note": _sparsity_note(record),
        "cost": _cost_table(record),
        "probe_note": _probe_note(record),
        "examples": _examples(record),
        "recipe": "\n".join(escaped(line) for line in record.recipe_text.split("\n")),
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


def _shares(record: RunRecord) -> bool:
    """Whether the controller held no ratio, but trained each step at one of its own."""
    kind = inner(record.recipe, "controller", "policy").get("kind")
    return kind in POLICIES and POLICIES[kind].shared


def _in_turn(record: RunRecord) -> bool:
    """Whether each round measured other examples."""
    return inner(record.recipe, "controller").get("probe_examples") is not None


def _probed_on(record: RunRecord) -> str:
    """Which examples the rounds measured, as the end of a sentence."""
    splits = {"dev": "dev set", "both": "micro-dev and the dev set"}
    found = splits.get(str(inner(record.recipe, "controller").get("probe_on")), "micro-dev set")
    return f"on the {found}, other examples in each round" if _in_turn(record) else f"on the {found}"


def _headline(record: RunRecord) -> str:
    learned = record.learned
    if record.given_ratio is not None:
        sentences = [f"Prune {percent(record.given_ratio)} of the merged adapter (given, not learned)."]
    elif learned is not None:
        span = f"{100 * learned.low:.0f} to {100 * learned.high:.0f} %".replace(" ", "\u00a0")
        interval = f"{percent(learned.confidence)} interval {span}"
        sentences = [f"Prune {percent(learned.prune_ratio)} of the merged adapter ({interval})."]
    else:
        sentences = ["No prune ratio has been learned yet."]
    compared = _compared(record, "target")
    if compared is not None:
        metric, ours, theirs, worth = compared
        sentences.append(f"Test {metric} {ours:.1f} against {theirs:.1f} for the target adapter alone.")
        if abs(ours - theirs) <= 2 * worth:
            sentences.append("That difference is no more than two test examples: treat it as noise.")
    elif record.metrics is None:
        sentences.append("The result has not been evaluated yet.")
    return " ".join(sentences)


def _interval_note(record: RunRecord) -> str:
    """What the interval of a learned ratio covers, and whether it is wide."""
    learned = record.learned
    if learned is None:
        return ""
    covered = "the choice of probed examples and rounds, not the shape of the fitted curve"
    if learned.rule == "best_reward":
        covered = "the choice of rounds only"
    elif learned.rule == "surrogate":
        covered = "the choice of probed examples and what the surface leaves open between probes, not how smooth it is"
    note = f"The interval covers {covered}."
    if learned.high - learned.low >= WIDE_INTERVAL:
        note += (
            " It is wide: these probes do not settle the ratio. More probed examples or more rounds narrow it, and"
            " runs with other seeds show how much the result depends on it."
        )
    return note


def _compared(record: RunRecord, other: str) -> tuple[str, float, float, float] | None:
    """Name of the leading metric, its scores for GRASP and another system, and what one test example is worth."""
    metrics = record.metrics
    if metrics is None or not {"grasp", other} <= metrics.systems.keys():
        return None
    scores, others = (metrics.systems[name].metrics for name in ("grasp", other))
    for metric in [*METRIC_NAMES, *scores]:
        ours, theirs = scores.get(metric), others.get(metric)
        if ours is not None and theirs is not None and math.isfinite(ours) and math.isfinite(theirs):
            return METRIC_NAMES.get(metric, metric), ours, theirs, 100 / metrics.test_examples
    return None


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """What was run, as pairs of label and text."""
    run = record.run
    versions = [f"grasp-lora {run.grasp_lora}", *(f"{name} {number}" for name, number in run.libraries.items())]
    facts = [
        ("Backbone", _public_name(run.backbone.name)),
        ("Languages", _languages(record)),
        ("Examples", _sizes(record)),
        ("Final run starts from", _start(record)),
        ("Seed", str(run.seed)),
        ("Date", run.created[:16].replace("T", " ")),
        ("Versions", ", ".join(versions)),
        ("Recipe", f"{run.name}, {run.recipe_hash[:19]}"),
    ]
    return [(label, text) for label, text in facts if text]


def _start(record: RunRecord) -> str:
    """What the final run began with; run folders of older versions do not say, and began with a merge."""
    if inner(record.recipe, "final").get("start") == "controller":
        return "the controller run's own adapter, at its best round, with its mask held (single run)"
    return "a fresh merge"


def _sizes(record: RunRecord) -> str:
    """Examples per split."""
    sizes = {split: len(record.data.ids.get(split, ())) for split in SPLITS}
    names = {split: split.replace("_", " " if split.startswith("source") else "-") for split in SPLITS}
    return ", ".join(f"{names[split]} {size}" for split, size in sizes.items() if size)


def _languages(record: RunRecord) -> str:
    codes = [_language(record, side) for side in ("source", "target")]
    return " to ".join(LANGUAGES.get(code, code) for code in codes if code)


def _language(record: RunRecord, side: str) -> str:
    """The language code of one side; empty where the recipe gives no data of it."""
    language = inner(record.recipe, "data", side).get("language")
    return language if isinstance(language, str) else ""


def _table(caption: str, columns: Sequence[str], rows: Iterable[Iterable[str | Cell]]) -> Table | None:
    """A table, or None where it would have no rows."""
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    return Table(caption, columns, cells) if cells else None


def _scores_table(record: RunRecord) -> Table | None:
    metrics = record.metrics
    if metrics is None:
        return None
    used = {key for system in metrics.systems.values() for key in system.metrics}
    keys = [key for key in METRIC_NAMES if key in used] + sorted(used - METRIC_NAMES.keys())
    scores = {name: metrics.systems[name] for name in SYSTEMS if name in metrics.systems}
    pruned = "–" if record.prune_ratio is None else percent(record.prune_ratio, 1)
    columns: list[list[Cell]] = [
        [Cell(SYSTEMS[name]) for name in scores],
        _column([score.test_loss for score in scores.values()], 3, min),
        _column([score.dev_loss for score in scores.values()], 3, min),
        *(_column([score.metrics.get(key) for score in scores.values()], 1, max, "unavailable") for key in keys),
        [Cell(pruned if name == "grasp" else percent(0)) for name in scores],
    ]
    names = [f"{METRIC_NAMES.get(key, key)}\u00a0↑" for key in keys]
    heads = ["System", "Test loss\u00a0↓", "Dev loss\u00a0↓", *names, "Pruned"]
    return _table("Scores on the test set", heads, zip(*columns, strict=True))


def _column(
    values: Sequence[float | None], digits: int, choose: Callable[[Iterable[float]], float], absent: str = "–"
) -> list[Cell]:
    """Cells of one column; all that print like the best one are best, since the rest cannot be seen."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    best = _number(choose(finite), digits) if len(finite) > 1 else None
    texts = (absent if value is None else _number(value, digits) for value in values)
    return [Cell(text, text == best) for text in texts]


def _score_notes(record: RunRecord) -> list[str]:
    """How much of the table is noise, and what separates GRASP from each other system."""
    count = record.metrics.test_examples if record.metrics else 0
    if not count:
        return []
    notes = [
        f"The test set has {count} examples: one example is worth {100 / count:.2f} points of a score that is a mean "
        "over examples. Differences of one or two examples are noise."
    ]
    for other in ("merged", "target", "source"):
        compared = _compared(record, other)
        if compared is None:
            continue
        metric, ours, theirs, worth = compared
        gap = f"{_signed(ours - theirs)} points ({abs(ours - theirs) / worth:.1f} test examples)"
        pairs = list(zip(record.predictions["grasp"], record.predictions[other], strict=False))
        better = sum(mine.loss < its.loss for mine, its in pairs)
        losses = f", lower loss on {better} of {len(pairs)} test examples." if pairs else "."
        notes.append(f"GRASP against {SYSTEMS[other].lower()}: {metric} {gap}{losses}")
    return notes


def _curve_table(record: RunRecord) -> Table | None:
    if record.learned is None:
        return None
    curve = record.learned.curve
    rows = list(zip(curve.ratios, curve.mean, curve.low, curve.high, strict=True))
    # About ten rows say what the curve says.
    picked = rows[:: max(1, len(rows) // 10)]
    texts = [[percent(ratio, 1), *(f"{loss:.4f}" for loss in losses)] for ratio, *losses in picked]
    return _table("Fitted loss above its minimum", ["Pruned", "Fit", "Low", "High"], texts)


def _rounds_table(record: RunRecord) -> Table | None:
    heads = ["Round", "Step", "Probed loss", "Candidates", "Rewards", "Policy", "Current ratio", "Commit"]
    rows = [
        [
            str(measured.round),
            str(measured.step),
            f"{fmean(measured.baseline_losses):.4f}",
            ", ".join(percent(ratio, 1) for ratio in measured.candidates),
            ", ".join(_signed(reward, 4) for reward in measured.rewards),
            f"{percent(measured.policy_mean, 1)} ± {100 * measured.policy_std:.1f}",
            percent(measured.ratio, 1),
            ("moved, clipped" if measured.clipped else "moved") if measured.committed else "stayed",
        ]
        for measured in record.rounds
    ]
    return _table("Rounds of the controller", heads, rows)


def _losses_table(record: RunRecord) -> Table | None:
    rows = []
    for stage, title in TRAINED.items():
        history = record.history[stage]
        train = [_number(row.loss, 3) for row in history if row.loss is not None] or ["–"]
        dev = [(row.dev_loss, row.step) for row in history if row.dev_loss is not None and math.isfinite(row.dev_loss)]
        best = [_number(min(dev)[0], 3), str(min(dev)[1])] if dev else ["–", "–"]
        if history:
            rows.append([title, str(history[-1].step), train[0], train[-1], *best])
    heads = ["Stage", "Steps", "First train loss", "Last train loss", "Best dev loss", "at step"]
    return _table("Losses of each training stage", heads, rows)


def _sparsity_table(record: RunRecord) -> Table | None:
    rows = []
    for (factor, segment), members in by_factor(record.sparsity).items():
        entries = [entry for _, entry in members]
        shares = [entry.kept / entry.weights for entry in entries]
        texts = [percent(share, 1) for share in (kept_share(entries), min(shares), max(shares))]
        rows.append([f"{factor}, {segment}", str(sum(entry.weights for entry in entries)), *texts])
    return _table("Kept weights per factor", ["Factor", "Weights", "Kept", "Lowest layer", "Highest layer"], rows)


def _sparsity_note(record: RunRecord) -> str | None:
    if not record.sparsity:
        return None
    shares = [entry.kept / entry.weights for entry in record.sparsity]
    pruned = 1 - kept_share(record.sparsity)
    note = f"Measured over all factors, {percent(pruned, 2)} of the weights are zero."
    if max(shares) - min(shares) < 0.01:
        note += " Every factor keeps the same share: the ratio is applied to each of them separately."
    ratio = record.prune_ratio
    if ratio is not None and abs(pruned - ratio) > 0.005:
        note += f" That is not the ratio of {percent(ratio, 2)} above: check the final run."
    segments = [[entry for entry in record.sparsity if entry.segment == name] for name in ("source", "target")]
    if all(segments):
        source, target = (percent(kept_share(entries), 1) for entries in segments)
        note += f" Of the source adapter {source} of the weights survive, of the target adapter {target}."
    return note


def _cost_table(record: RunRecord) -> Table | None:
    if not record.cost:
        return None
    total = sum(record.cost.values())
    rows = [
        [stage, f"{seconds:.1f}", duration(seconds), percent(seconds / total if total else 0.0)]
        for stage, seconds in [*record.cost.items(), ("all", total)]
    ]
    return _table("Time per stage", ["Stage", "Seconds", "Time", "Share"], rows)


def _probe_note(record: RunRecord) -> str | None:
    probing = record.probe_seconds
    together = probing + sum(timing.train_seconds for timing in record.timings)
    if not together:
        return None
    return (
        f"Probes took {percent(probing / together)} of the controller run: {duration(probing)} of {duration(together)} "
        f"in {len(record.timings)} rounds."
    )


def _examples(record: RunRecord) -> list[dict[str, Any]]:
    """The first test examples, side by side; every system answers the same ones in the same order."""
    shown = {name: record.predictions[name] for name in ("target", "grasp") if record.predictions[name]}
    return [
        {
            "id": rows[0].id,
            "references": [_cut(text) for text in rows[0].references],
            "predictions": [(SYSTEMS[name], _cut(row.prediction)) for name, row in zip(shown, rows, strict=True)],
        }
        for rows in islice(zip(*shown.values(), strict=False), EXAMPLES_SHOWN)
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
        corpus = inner(record.recipe, "data", side)
        if isinstance(corpus.get("hub"), str):
            names.append(_public_name(corpus["hub"]))
        for key, files in corpus.items():
            if key.endswith("files") and isinstance(files, list):
                names += [re.split(r"[\\/]", file)[-1] for file in files if isinstance(file, str)]
    return list(dict.fromkeys(names))


def render(template: str, context: dict[str, Any]) -> str:
    """Fill a template of this package; HTML is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("grasp_lora.experiments"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["script_json"] = script_json
    environment.filters["md"] = _markdown
    return environment.get_template(template).render(context)


def _markdown(text: str) -> str:
    """Escape a text for a Markdown table cell: no tag, no markup, one line.

    >>> _markdown("a|b<i>*c*")
    'a\\\\|b&lt;i&gt;\\\\*c\\\\*'
    """
    line = re.sub(r"([\\`*_\[\]|~])", r"\\\1", one_line(str(text)))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Bare addresses become links in many a viewer: a name must not be able to send a reader anywhere.
    return re.sub(
        r"(?i)(?<=http)://|(?<=https)://|(?<=www)\.", lambda found: f"&#{ord(found[0][0])};{found[0][1:]}", line
    )
