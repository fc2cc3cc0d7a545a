"""From a run or a comparison in memory to what a person reads: report.html, compare.md and a table in the terminal.

`view_of` turns a run into texts and tables that the report and the model card share. Nothing is computed here that a step
should have computed, and nothing that was not measured is shown as a number.
"""

import logging
import re
import secrets
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grasp_lora.data.data_settings import CorpusSettings
from grasp_lora.data.splits import SPLITS
from grasp_lora.engine.comparison import Comparison
from grasp_lora.engine.methods import METHODS
from grasp_lora.engine.results import TEST_LOSS
from grasp_lora.engine.run_folder import COMPARE_FOLDER, DISCARDED, FINAL_FOLDER, REPORT_FILE, Run
from grasp_lora.evaluation.metrics import metric_title
from grasp_lora.recipes.text import RECIPE_FILE
from grasp_lora.report import delivered, tables
from grasp_lora.report.examples import examples_of, label_note
from grasp_lora.report.figures import figures_of, plotly_js
from grasp_lora.report.tables import percent
from grasp_lora.storage.writing import write_whole
from grasp_lora.text.display import escaped, one_line
from grasp_lora.text.languages import language_name
from grasp_lora.text.names import last_part

logger = logging.getLogger(__name__)

COVERED = {  # by the interval of each rule
    "best_reward": "the choice of rounds only, not chance within a round",
    **dict.fromkeys(
        ("surrogate", "surrogate_at_end"),
        "the choice of probed examples and what the surface leaves open between probes, not how smooth it is",
    ),
}
PAPER = "https://arxiv.org/abs/2601.06702"
COMPARISON_TABLES_FILE = "compare.md"
FULL_WIDTH = 180  # of a table that does not go to a terminal


def write_report(run: Run, folder: Path) -> Path:
    """Write report.html into the folder of a run and return its path: one file that needs no network.

    A viewer runs the scripts of this page alone, as the nonce says.
    """
    view = view_of(run, folder) | {"figures": figures_of(run), "plotly_js": plotly_js()}
    write_whole(folder / REPORT_FILE, render("report.html.j2", view | {"nonce": secrets.token_urlsafe(16)}))
    logger.info("Wrote %s", folder / REPORT_FILE)
    return folder / REPORT_FILE


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write compare.md into the folder of a comparison and return its path."""
    write_whole(folder / COMPARISON_TABLES_FILE, render("comparison.md.j2", _view_of_comparison(comparison)))
    return folder / COMPARISON_TABLES_FILE


# A run


def view_of(run: Run, folder: Path) -> dict[str, Any]:
    """Everything that the report and the model card print, as texts and tables; paths of the recipe as seen from a folder."""
    metrics, estimate, in_chat = run.metrics, run.estimate, run.data.report["chat_template"]
    chosen = delivered.is_chosen(run)
    return {
        "version": version("grasp-lora"),
        "paper": PAPER,
        "info": run.info,
        "estimate": estimate,
        "grid": metrics.grid is not None,
        "verdict": delivered.verdict(run) if chosen else None,
        "why_delivered": metrics.delivered.why if chosen else None,
        # The result of the final run is another adapter, where there is one.
        "apart": metrics.delivered.name != "grasp" and FINAL_FOLDER in run.adapters,
        "final": tables.final_text(run),
        "warning": delivered.warning_of(run),
        "headline": delivered.headline(run),
        "gain": delivered.gain(run),
        "higher": delivered.higher(run),
        "search": delivered.search_note(run),
        "predict": 'grasp-lora predict adapter "..."' if in_chat else delivered.predict_command(),
        "predict_texts": delivered.command_for_texts(run),
        "facts": _facts(run),
        "prunes": not tables.is_unpruned(run),
        "ratio": percent(metrics.prune_ratio, 1),
        "learned": run.learned is not None,
        "rounds": len(run.learned.result.rounds) if run.learned else 0,
        "each_step": run.recipe.controller.policy.regime == "each_step",
        "probed_on": _probed_on(run),
        "interval": [percent(bound, 1) for bound in (estimate.low, estimate.high)],
        "confidence": percent(estimate.confidence),
        "interval_note": _interval_note(run),
        "language": run.recipe.data.target.language.replace("_", "-"),  # as HTML has it
        "scores": tables.scores_table(run),
        "signatures": {metric_title(key): text for key, text in metrics.signatures.items()},
        "scale": tables.scale_note(metrics.signatures),
        "notes": [*label_note(run), *tables.score_notes(run)],
        "confusion": tables.confusion(run),
        "examples": examples_of(run) if metrics.test_examples else None,
        "losses": tables.losses_table(run),
        "sparsity_note": tables.sparsity_note(run),
        "cost": tables.cost_table(run),
        "probe_note": tables.probe_note(run),
        "recipe": "\n".join(escaped(line) for line in run.recipe.to_yaml(folder).split("\n")),
    }


def _probed_on(run: Run) -> str:
    """Which examples the rounds measured, as the end of a sentence."""
    rounds = run.recipe.controller.rounds
    pool = {"dev": "dev set", "both": "micro-dev and the dev set"}.get(rounds.pool, "micro-dev set")
    few = {len(row["places"]) for row in run.learned.result.rounds if row["places"]} if run.learned else set()
    if few:
        return f"on the {pool}, of candidates on {few.pop()} of its examples in turn"
    in_turn = rounds.turn(sum(len(run.data.ids[split]) for split in rounds.splits)) is not None
    return f"on the {pool}" + (", other examples in each round" if in_turn else "")


def _interval_note(run: Run) -> str:
    """What the interval of a learned ratio covers, and whether it is wide."""
    estimate = run.estimate
    note = f"The interval covers {COVERED.get(estimate.rule, 'what its rule says')}."
    if estimate.nothing_learned:
        note = f"Nothing was learned about the ratio: the interval leaves most of the searched range open. {note}"
    if estimate.wide:
        note += (
            " It is wide: these probes do not settle the ratio. More probed examples or more rounds narrow it, and"
            " runs with other seeds show how much the result depends on it."
        )
    return note


def _facts(run: Run) -> list[tuple[str, str]]:
    """What was run, as pairs of label and text."""
    info, data = run.info, run.recipe.data
    versions = [f"grasp-lora {info.grasp_lora}", *(f"{name} {number}" for name, number in info.libraries.items())]
    facts = [
        ("Backbone", public_name(info.backbone.name) + (f", quantised as {info.quantise}" if info.quantise else "")),
        ("Given adapters", ", ".join(f"{adapter.name} (sha256:{adapter.sha256[:12]})" for adapter in info.parents)),
        ("Languages", languages_of([data.source, data.target] if data.source else [data.target])),
        ("Examples", sizes_of(run)),
        ("Final run", DISCARDED if run.metrics.best_step == 0 else ""),
        ("Seed", str(info.seed)),
        ("Date", info.created[:16].replace("T", " ") + " UTC"),
        ("Versions", ", ".join(versions)),
        ("Recipe", f"{info.name}, {info.recipe_hash}"),
    ]
    return [(label, text) for label, text in facts if text]


def sizes_of(run: Run, splits: Sequence[str] = SPLITS) -> str:
    """Examples per split."""
    names = {split: split.replace("_", " " if split.startswith("source") else "-") for split in splits}
    return ", ".join(f"{names[split]} {len(run.data.ids[split])}" for split in splits if run.data.ids[split])


def languages_of(corpora: Sequence[CorpusSettings]) -> str:
    """The languages of data, by their names; of two the first is the source."""
    roles = ("source", "target")[-len(corpora) :]
    return ", ".join(f"{language_name(each.language)} ({role})" for each, role in zip(corpora, roles, strict=True))


def public_name(name: str) -> str:
    """A model's name as others know it: `owner/name` stays, of a local path only the last part is left.

    >>> public_name("google/gemma-3-270m (Q4_K_M GGUF)"), public_name("/data/models/llama")
    ('google/gemma-3-270m (Q4_K_M GGUF)', 'llama')
    """
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?( \([\w .-]*\))?", name):
        return name
    return re.sub(r"[^\w.-]", "-", last_part(name)) or "unnamed"


# A comparison


def print_table(table: tables.TextTable, console: Console) -> None:
    """Print a table, the best of each column bold."""
    printed = Table()
    for column in table.columns:
        printed.add_column(column, overflow="fold")  # a narrow terminal cuts no word off
    for row in table.rows:
        # A row that is short, since its text goes over several columns, is filled up.
        printed.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
    if not console.is_terminal:  # where rich would take 80 columns
        console = Console(file=console.file, width=FULL_WIDTH, quiet=console.quiet, emoji=False)
    console.print(printed)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the table of a comparison."""
    print_table(tables.comparison_scores(comparison), console)
    for line in _choices(comparison):
        console.print(line, markup=False, soft_wrap=True)
    for warning in comparison.warnings:
        console.print(f"WARNING: {warning}", style="bold red", markup=False, soft_wrap=True)


def command_of(comparison: Comparison) -> str:
    """The command that makes the comparison in the folder of the experiment; with its store there it only writes it anew."""
    settings = comparison.settings
    words = ["grasp-lora", "compare", f"{COMPARE_FOLDER}/{RECIPE_FILE}"]
    if set(settings.methods) != set(METHODS):
        words += ["--methods", ",".join(settings.methods)]
    words += ["--seeds", ",".join(map(str, settings.seeds)), "--grid", ",".join(map(str, settings.grid))]
    if settings.planned:
        words += ["--planned", ",".join(settings.planned)]
    words += ["--reference", settings.reference, *(["--folds", str(settings.folds)] if settings.folds else [])]
    return " ".join([*words, "--output", "."])


def _view_of_comparison(comparison: Comparison) -> dict[str, Any]:
    intervals = [interval for row in comparison.rows for interval in row.against.values()]
    return {
        "version": version("grasp-lora"),
        "content": comparison,
        "choices": _choices(comparison),
        "scores": tables.comparison_scores(comparison),
        "cost": tables.comparison_cost(comparison),
        "verdicts": tables.comparison_verdicts(comparison),
        "sizes": _sizes(comparison),
        "drawn": _drawn(comparison),
        "planned": [row.title for row in comparison.finished if any(each.verdict for each in row.against.values())],
        "confidence": f"{intervals[0].confidence:.0%}" if intervals else "95%",
        "scale": tables.scale_note(metric for metric in comparison.metrics if metric != TEST_LOSS),
        "stopping": _stopping(comparison),
        "command": command_of(comparison),
    }


def _choices(comparison: Comparison) -> list[str]:
    """What choices among adapters took, by seed or fold, a line each."""
    by = comparison.runs[:-1]
    given = [row.title for row in comparison.finished if row.method == "grasp" and row.chosen_on is None]
    told = [f"{title}: the recipe gives the prune ratio, so none was learned" for title in given]
    return told + [f"{row.title}, by {by}: {row.taken}" for row in comparison.finished if row.taken]


def _stopping(comparison: Comparison) -> str:
    """What final runs use the dev set for, in a sentence."""
    if not comparison.dev_examples:
        return "There is no dev set: final runs train to their end."
    if not comparison.stops_early:
        return "Final runs train to their end, and keep their last step."
    return "Final runs stop early on the dev set, and keep the adapter with the lowest dev loss."


def _sizes(comparison: Comparison) -> str:
    """How many examples there are, in a cross-validation of each fold."""
    held_out = f"{comparison.dev_examples} dev and {comparison.micro_dev_examples} micro-dev"
    if not comparison.folds:
        return f"{comparison.test_examples} test, {held_out}"
    counts = {name: sorted({getattr(fold, name) for fold in comparison.folds}) for name in ("test", "train")}
    test, train = (f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}" for sizes in counts.values())
    return (
        f"{len(comparison.folds)} of {comparison.settings.folds} folds: {comparison.test_examples} tested once each; in a fold "
        f"{test} test, {held_out}, {train} train"
    )


def _drawn(comparison: Comparison) -> str:
    """What the intervals come from, and what they do not say."""
    groups = f", drawn in their {comparison.test_groups} groups" if comparison.test_groups else ""
    ends = "widened as Student's for few examples"
    if comparison.folds:
        return (
            f"Paired bootstrap over the {comparison.test_examples} examples of all folds together{groups}, each tested once, "
            f"in {comparison.settings.resamples} resamples, {ends}. They say what other test examples of this kind would show, "
            "not what other training examples would, since the folds train on one another's. A difference is that of the scores "
            "of all examples together, not the mean over the folds."
        )
    seeds = (
        " and by the spread of the seeds' differences. They say what other test examples of this kind and other seeds would show"
        if len(comparison.seeds) > 1
        else ". They say what other test examples of this kind would show of these very trainings"
    )
    return (
        f"Paired bootstrap over the {comparison.test_examples} test examples{groups}, the mean over the seeds in each of "
        f"{comparison.settings.resamples} resamples, {ends}{seeds}, not what another split would."
    )


# Templates


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
    # For `tojson`, whose own setting sorts the keys; a browser reads no NaN.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
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
        r"(?i)(?<=http)://|(?<=https)://|(?<=www)\.", lambda address: f"&#{ord(address[0][0])};{address[0][1:]}", line
    )
