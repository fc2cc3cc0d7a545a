"""From a run folder to what a person reads: report.html, report.md and the model card of an adapter.

`_view` turns the record of a run into texts and tables that all three share. Nothing is computed here that another stage
should have computed, and nothing that was not measured is shown as a number.
"""

import hashlib
import json
import logging
import re
import secrets
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from grasp_lora.bench.run_folder import RunRecord, inner, read_run
from grasp_lora.data.tasks import FALLBACK_LANGUAGE, TEMPLATES, built_in_template
from grasp_lora.errors import DataError, RecipeError
from grasp_lora.method.estimate import WIDE_INTERVAL
from grasp_lora.method.policy import POLICIES
from grasp_lora.method.schedule import PROBE_SPLITS
from grasp_lora.recipes.recipe import RENAMED
from grasp_lora.report.figures import figures_of, plotly_js, script_json
from grasp_lora.report.tables import (
    METRIC_NAMES,
    Against,
    compare_systems,
    cost_table,
    curve_table,
    losses_table,
    percent,
    probe_note,
    rounds_table,
    scale_note,
    score_notes,
    scores_table,
    sparsity_note,
    sparsity_table,
)
from grasp_lora.storage.files import write_whole
from grasp_lora.text.display import escaped, one_line

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
SPLITS = ("source_train", "source_dev", "train", "dev", "micro_dev", "test")
LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "hi": "Hindi",
    "id": "Indonesian", "ja": "Japanese", "ru": "Russian", "sw": "Swahili", "tr": "Turkish", "vi": "Vietnamese",
    "zh": "Chinese",
}  # fmt: skip
EXAMPLES_SHOWN = 8
CHARACTERS_SHOWN = 1000
PAPER = "https://arxiv.org/abs/2601.06702"


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
    path = run_folder / REPORT_FILE
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
    parents += [("Given adapter", one.name, f"sha256:{one.sha256}") for one in record.run.parents]
    context = _view(record) | {
        "front_matter": yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        "base_model": json.dumps(base_model),
        "base_model_name": backbone,
        "parents": parents,
        "files": _data_names(record),
        "prompt": _prompt(record),
        "chat": inner(record.recipe, "data").get("chat_template") is True,
    }
    path = adapter_folder / "README.md"
    write_whole(path, render("model_card.md.j2", context))
    return path


def _prompt(record: RunRecord) -> list[str]:
    """The lines of the template of the prompts that the adapter was trained on; none where the recipe does not say."""
    data = inner(record.recipe, "data")
    task, prompt = data.get("task"), data.get("prompt")
    if not isinstance(prompt, str):
        try:
            prompt = (
                built_in_template(str(task), _language(record, "target")) or TEMPLATES[str(task)][FALLBACK_LANGUAGE]
            ).prompt
        except (KeyError, DataError):
            return []
    return [escaped(line) for line in prompt.split("\n")]


def _view(record: RunRecord) -> dict[str, Any]:
    """Everything that both reports and the model card print, as texts and tables."""
    learned, given = record.learned, record.given_ratio is not None
    signatures = record.metrics.signatures if record.metrics else {}
    against = compare_systems(record)
    return {
        "version": version("grasp-lora"),
        "paper": PAPER,
        "run": record.run,
        "name": record.run.name,
        "headline": _headline(record, against.get("target")),
        "facts": _facts(record),
        "missing": record.missing,
        "ratio": None if record.prune_ratio is None else percent(record.prune_ratio, 1),
        "given": given,
        "start": _start(record),
        "each_step": _at_each_step(record),
        "in_turn": _in_turn(record),
        "probed_on": _probed_on(record),
        "interval": [percent(bound, 1) for bound in (learned.low, learned.high)] if learned and not given else None,
        "confidence": percent(learned.confidence) if learned else None,
        "interval_note": _interval_note(record),
        "language": _language(record, "target"),
        "languages": _languages(record),
        "sizes": _sizes(record),
        "scores": scores_table(record),
        "signatures": {METRIC_NAMES.get(key, key): text for key, text in signatures.items()},
        "scale": scale_note(signatures),
        "notes": score_notes(record, against),
        "rule": learned.rule if learned and not given else None,
        "curve": curve_table(record),
        "rounds": rounds_table(record),
        "losses": losses_table(record),
        "sparsity": sparsity_table(record),
        "sparsity_note": sparsity_note(record),
        "cost": cost_table(record),
        "probe_note": probe_note(record),
        "examples": _examples(record),
        "recipe": "\n".join(escaped(line) for line in record.recipe_text.split("\n")),
    }


def _at_each_step(record: RunRecord) -> bool:
    """Whether the controller held no ratio, but trained each step at one of its own."""
    kind = inner(record.recipe, "controller", "policy").get("kind")
    return kind in POLICIES and POLICIES[kind].regime == "each_step"


def _rounds(record: RunRecord) -> dict[str, Any]:
    """How rounds were run, by the recipe.

    Raises:
        RecipeError: the run folder is of a version with other keys.
    """
    controller = inner(record.recipe, "controller")
    for key in controller.keys() & RENAMED.keys():
        raise RecipeError(
            f"the run is of an older version: its recipe.yaml has controller.{key}, which is now controller.{RENAMED[key]}; "
            "rename it there, or keep the report that the run wrote"
        )
    return inner(controller, "rounds")


def _in_turn(record: RunRecord) -> bool:
    """Whether each round measured other examples, the baseline too, so that the losses of rounds cannot be compared."""
    count, pool_name = _rounds(record).get("in_turn"), _rounds(record).get("pool")
    splits = next((splits for name, splits in PROBE_SPLITS.items() if name == pool_name), ("micro_dev",))
    pool = sum(len(record.data.ids.get(split, ())) for split in splits)
    return isinstance(count, int) and count < pool and not any(measured.places for measured in record.rounds)


def _probed_on(record: RunRecord) -> str:
    """Which examples the rounds measured, as the end of a sentence."""
    splits = {"dev": "dev set", "both": "micro-dev and the dev set"}
    found = splits.get(str(_rounds(record).get("pool")), "micro-dev set")
    if _in_turn(record):
        return f"on the {found}, other examples in each round"
    few = {len(measured.places) for measured in record.rounds if measured.places}
    return f"on the {found}, of candidates on {few.pop()} of its examples in turn" if few else f"on the {found}"


def _headline(record: RunRecord, against: Against | None) -> str:
    learned = record.learned
    if record.given_ratio is not None:
        sentences = [f"Prune {percent(record.given_ratio)} of the merged adapter (given, not learned)."]
    elif learned is not None:
        span = f"{100 * learned.low:.0f} to {100 * learned.high:.0f} %".replace(" ", "\u00a0")
        interval = f"{percent(learned.confidence)} interval {span}"
        sentences = [f"Prune {percent(learned.prune_ratio)} of the merged adapter ({interval})."]
    else:
        sentences = ["No prune ratio has been learned yet."]
    if against is not None:
        sentences.append(
            f"Test {against.metric} {against.ours:.{against.digits}f} against {against.theirs:.{against.digits}f} "
            "for the target adapter alone" + (f": {against.score.verdict}." if against.score else ".")
        )
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


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """What was run, as pairs of label and text."""
    run = record.run
    versions = [f"grasp-lora {run.grasp_lora}", *(f"{name} {number}" for name, number in run.libraries.items())]
    facts = [
        ("Backbone", _public_name(run.backbone.name)),
        ("Given adapters", ", ".join(f"{one.name} (sha256:{one.sha256[:12]})" for one in run.parents)),
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


def _examples(record: RunRecord) -> list[dict[str, Any]]:
    """The first test examples, side by side; every system answers the same ones in the same order."""
    shown = {name: record.predictions[name] for name in ("target", "grasp") if record.predictions[name]}
    return [
        {
            "id": rows[0].id,
            "references": [_cut(text) for text in rows[0].references],
            "predictions": [
                (record.systems[name], _cut(row.prediction)) for name, row in zip(shown, rows, strict=True)
            ],
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
        loader=PackageLoader("grasp_lora.report"),
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
