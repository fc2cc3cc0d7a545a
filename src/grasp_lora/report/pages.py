"""From a run folder to what a person reads: report.html and report.md.

`view_of` turns the record of a run into texts and tables that these and the model card share. Nothing is computed here that
another stage should have computed, and nothing that was not measured is shown as a number.
"""

import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grasp_lora.bench.run_folder import DISCARDED, REPORT_FILE, REPORT_TABLES_FILE
from grasp_lora.data.splits import SPLITS
from grasp_lora.errors import DataError
from grasp_lora.method.policy import POLICIES
from grasp_lora.report.delivered import (
    NOTHING_LEARNED,
    chosen,
    command_for_texts,
    delivered_system,
    predict_command,
    reason,
    trained_again,
    verdict,
    warning_of,
    where_trained,
)
from grasp_lora.report.differences import Difference, compare_grasp, compare_handed_over
from grasp_lora.report.examples import examples_of, label_notes
from grasp_lora.report.figures import figures_of, plotly_js, script_json
from grasp_lora.report.run_record import CorpusFacts, RunRecord, read_run
from grasp_lora.report.tables import (
    METRIC_NAMES,
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
from grasp_lora.text.languages import language_code
from grasp_lora.text.names import last_part

logger = logging.getLogger(__name__)

LANGUAGES = {
    "am": "Amharic", "ar": "Arabic", "bn": "Bengali", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "fa": "Persian", "fi": "Finnish", "fr": "French", "ha": "Hausa", "he": "Hebrew", "hi": "Hindi", "id": "Indonesian",
    "ig": "Igbo", "it": "Italian", "ja": "Japanese", "jv": "Javanese", "ko": "Korean", "ms": "Malay", "my": "Burmese",
    "ne": "Nepali", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "so": "Somali",
    "su": "Sundanese", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian",
    "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "yo": "Yoruba", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip
COVERED = {  # by the interval of each rule
    "best_reward": "the choice of rounds only, not chance within a round",
    "smooth_fit": "the choice of probed examples and rounds, not the shape of the fitted curve",
    "surrogate": "the choice of probed examples and what the surface leaves open between probes, not how smooth it is",
}
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
    view = view_of(record)
    page = {"figures": figures_of(record), "plotly_js": plotly_js(), "nonce": secrets.token_urlsafe(16)}
    html = render("report.html.j2", view | page)
    write_whole(run_folder / REPORT_TABLES_FILE, render("report.md.j2", view))
    path = run_folder / REPORT_FILE
    write_whole(path, html)
    logger.info("Wrote %s", path)
    return path


def view_of(record: RunRecord) -> dict[str, Any]:
    """Everything that both reports and the model card print, as texts and tables."""
    learned, given = record.learned, record.given_ratio is not None
    handed_over = record.metrics.delivered if record.metrics else None
    signatures = record.metrics.signatures if record.metrics else {}
    against, delivered = compare_grasp(record), chosen(record)
    return {
        "version": version("grasp-lora"),
        "paper": PAPER,
        "run": record.run,
        "name": record.run.name,
        "verdict": verdict(delivered, record.metrics) if delivered and record.metrics else None,
        "delivered": delivered,
        "taken": handed_over,
        "why_delivered": reason(delivered, record.metrics) if delivered and record.metrics else None,
        "apart": delivered_system(record) != "grasp",  # so that GRASP's result is another adapter
        "system": delivered_system(record),
        "all_rows": trained_again(record.metrics) if record.metrics else None,
        "target_on": where_trained(record.chosen_on, len(record.sources)) if record.chosen_on else None,
        "warning": warning_of(record),
        "predict": predict_command(),
        "predict_texts": command_for_texts(record),
        "has_prompt": not record.in_chat,
        "headline": headline(record, against),
        "facts": _facts(record),
        "missing": record.missing,
        "ratio": None if record.prune_ratio is None else percent(record.prune_ratio, 1),
        "given": given,
        "start": _start(record),
        "regime": _regime(record),
        "probed_on": _probed_on(record),
        "interval": [percent(bound, 1) for bound in (learned.low, learned.high)] if learned and not given else None,
        "confidence": percent(learned.confidence) if learned else None,
        "interval_note": _interval_note(record),
        "nothing_learned": learned is not None and learned.estimate.nothing_learned,
        "language": record.recipe.data.target.language.replace("_", "-"),  # as HTML has it
        "languages": languages_of(record.recipe.data.corpora),
        "sizes": sizes_of(record),
        "scores": scores_table(record),
        "signatures": {METRIC_NAMES.get(key, key): text for key, text in signatures.items()},
        "scale": scale_note(signatures),
        "notes": [
            *label_notes(record, delivered_system(record)),
            *score_notes(record, against, compare_handed_over(record)),
        ],
        "rule": learned.rule if learned and not given else None,
        "curve": curve_table(record),
        "rounds": rounds_table(record),
        "losses": losses_table(record),
        "sparsity": sparsity_table(record),
        "sparsity_note": sparsity_note(record),
        "cost": cost_table(record),
        "probe_note": probe_note(record),
        "examples": examples_of(record),
        "untested": record.metrics is not None and not record.metrics.test_examples,
        "recipe": "\n".join(escaped(line) for line in record.recipe_text.split("\n")),
    }


def _regime(record: RunRecord) -> str:
    """How the controller trained between its rounds: at one ratio, or each step at one of its own."""
    kind = record.recipe.controller.policy.kind
    return POLICIES[kind].regime if kind in POLICIES else "held"


def _probed_on(record: RunRecord) -> str:
    """Which examples the rounds measured, as the end of a sentence."""
    names = {"dev": "dev set", "both": "micro-dev and the dev set"}
    found = names.get(record.recipe.controller.rounds.pool, "micro-dev set")
    if record.in_turn:
        return f"on the {found}, other examples in each round"
    few = {len(measured.places) for measured in record.rounds if measured.places}
    return f"on the {found}, of candidates on {few.pop()} of its examples in turn" if few else f"on the {found}"


def _beside(record: RunRecord) -> dict[str, str]:
    """What the headline may name beside GRASP's result: of these the first one that was measured."""
    usual = {"continued": "the source adapter continued"}
    if chosen(record):  # where no step of that lowered the dev loss, the usual practice leaves the source adapter
        usual["source"] = "the source adapter as it is"
    if record.target_on is None:
        return usual | {"target": "the target adapter alone"}
    return usual | {"merged": "the target adapter on the source adapter"}


def headline(record: RunRecord, compared: Mapping[str, Difference]) -> str:
    """What was learned about the ratio, and what GRASP's result scores beside another system of those compared with it."""
    learned = record.learned
    prune = "It prunes" if chosen(record) else "Prune"  # the verdict is what says what to do
    if record.given_ratio is not None:
        sentences = [f"{prune} {percent(record.given_ratio)} of the merged adapter (given, not learned)."]
    elif learned is not None:
        span = f"{100 * learned.low:.0f} to {100 * learned.high:.0f} %".replace(" ", "\u00a0")
        interval = f"{percent(learned.confidence)} interval {span}"
        ratio = percent(learned.prune_ratio)
        sentences = [f"{prune} {ratio} of the merged adapter ({interval})."]
        if learned.estimate.nothing_learned:
            sentences = [f"Nothing was learned about the prune ratio ({interval}); {ratio} was taken."]
    else:
        sentences = ["No prune ratio has been learned yet."]
    if record.metrics and record.metrics.delivered and record.metrics.delivered.nothing_learned:
        sentences = [] if chosen(record) else [NOTHING_LEARNED]  # which the verdict begins with
    found = [(compared[name], title) for name, title in _beside(record).items() if name in compared]
    if found:
        against, title = found[0]
        sentences.append(
            f"Test {against.metric} {against.ours:.{against.digits}f} against {against.theirs:.{against.digits}f} for {title}"
            + (f": {against.score.verdict}." if against.score else ".")
        )
    elif record.metrics is None:
        sentences.append("The result has not been evaluated yet.")
    return " ".join(sentences)


def _interval_note(record: RunRecord) -> str:
    """What the interval of a learned ratio covers, and whether it is wide."""
    learned = record.learned
    if learned is None:
        return ""
    note = f"The interval covers {COVERED.get(learned.rule, COVERED['smooth_fit'])}."
    if learned.estimate.nothing_learned:
        note = f"Nothing was learned about the ratio: the interval leaves most of the searched range open. {note}"
    if learned.estimate.wide:
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
        ("Backbone", public_name(run.backbone.name) + (f", quantised as {run.quantise}" if run.quantise else "")),
        ("Given adapters", ", ".join(f"{one.name} (sha256:{one.sha256[:12]})" for one in run.parents)),
        ("Languages", languages_of(record.recipe.data.corpora)),
        ("Examples", sizes_of(record)),
        ("Final run starts from", _start(record)),
        ("Seed", str(run.seed)),
        ("Date", run.created[:16].replace("T", " ") + " UTC"),
        ("Versions", ", ".join(versions)),
        ("Recipe", f"{run.name}, {run.recipe_hash[:19]}"),
    ]
    return [(label, text) for label, text in facts if text]


def _start(record: RunRecord) -> str:
    """What the final run began with."""
    start = "a fresh merge"
    return f"{start}; {DISCARDED}" if record.metrics and record.metrics.best_step == 0 else start


def sizes_of(record: RunRecord, splits: Sequence[str] = SPLITS) -> str:
    """Examples per split."""
    sizes = {split: len(record.data.ids.get(split, ())) for split in splits}
    names = {split: split.replace("_", " " if split.startswith("source") else "-") for split in SPLITS}
    return ", ".join(f"{names[split]} {size}" for split, size in sizes.items() if size)


def languages_of(corpora: Sequence[CorpusFacts]) -> str:
    """The languages of data, as words."""
    codes = [corpus.language for corpus in corpora]
    return " to ".join(LANGUAGES.get(short_code(code), code) for code in codes if code)


def short_code(language: str) -> str:
    """A language without region and script; as it stands where it is no code, as in a damaged folder."""
    try:
        return language_code(language)
    except DataError:
        return language


def public_name(name: str) -> str:
    """A model's name as others know it: `owner/name` stays, of a local path only the last part is left.

    >>> public_name("google/gemma-3-270m (Q4_K_M GGUF)"), public_name("/data/models/llama")
    ('google/gemma-3-270m (Q4_K_M GGUF)', 'llama')
    """
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?( \([\w .-]*\))?", name):
        return name
    return re.sub(r"[^\w.-]", "-", last_part(name)) or "unnamed"


def render(template: str, context: dict[str, Any]) -> str:
    """Fill a template of this package; HTML is escaped."""
    return _templates().get_template(template).render(context)  # type: ignore[no-any-return]


@cache
def _templates() -> Any:
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
    return environment


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
