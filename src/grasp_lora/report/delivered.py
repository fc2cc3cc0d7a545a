"""What the end of a run says: which adapter to take, why, and how to use it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from grasp_lora.bench.checks import check_can_be_cut
from grasp_lora.bench.compare import LEAST_TEST
from grasp_lora.bench.planned import main_metric
from grasp_lora.bench.run_folder import (
    ADAPTER_FOLDER,
    ALL_ROWS,
    FINAL_FOLDER,
    PROMPT_FILE,
    Delivered,
    Metrics,
    TargetOn,
)
from grasp_lora.data.splits import HELD_OUT
from grasp_lora.data.tasks import ANY_LANGUAGE, TEMPLATES, options_of
from grasp_lora.errors import RecipeError
from grasp_lora.recipes.load import validate
from grasp_lora.recipes.text import RECIPE_FILE, parse
from grasp_lora.report.examples import best_guess
from grasp_lora.report.run_record import RunRecord
from grasp_lora.report.tables import METRIC_NAMES, score_digits

MADE = {
    "continued": "a source adapter was trained on in the target language",
    "source": "it is the source adapter as it is",
    "target": "it was trained on the target data alone",
    "merged": "a source and a target adapter were merged, and nothing was trained after that",
    "grasp": "a source and a target adapter were merged, a share of the merge was pruned, and the rest was fine-tuned",
}
MADE_ON_SOURCE = MADE | {  # with `target.on`
    "merged": "a target adapter was trained on top of a source adapter, and this is their sum",
    "grasp": "a target adapter was trained on top of a source adapter, and their sum was pruned by a share and fine-tuned",
}
FEW_ROWS, FOLDS = 200, 4  # of all target rows: below that a test split alone tells little
NOTHING_LEARNED = "No adapter is shown to be better than the backbone alone."
PARTS = {"continued": ("source",), "source": ("source",), "target": ("target",)}  # of all others both


def made_of(kind: str, record: RunRecord, *, given_target: bool) -> str:
    """How an adapter was made, as a part of a sentence; of several source adapters it is their mean that counts."""
    if kind == "target" and given_target:
        return "it is the target adapter that was given, as it is"
    made = (MADE if record.target_on is None else MADE_ON_SOURCE)[kind]
    if (sources := len(record.sources)) > 1 and kind != "source":
        made = made.replace("a source and a target adapter", f"{sources} source adapters and a target adapter")
        made = made.replace("a source adapter", f"the mean of {sources} source adapters")
    return made


def verdict(delivered: Delivered, metrics: Metrics) -> str:
    """Say which adapter to take."""
    taken = delivered.title + (", trained once more on all rows" if metrics.handed_over == ALL_ROWS else "")
    if delivered.nothing_learned:
        return f"{NOTHING_LEARNED} Handed over all the same: {taken}."
    return f"Take this adapter: {taken}."


def reason(delivered: Delivered, metrics: Metrics) -> str:
    """Why that one was chosen; its losses are those before a last training on all rows."""
    why = delivered.why
    return f"Chosen before that: {why[0].lower()}{why[1:]}" if metrics.handed_over == ALL_ROWS and why else why


def trained_again(metrics: Metrics) -> str | None:
    """What became of `final.all_rows`, with the test score after it and before; None where the recipe does not ask for it."""
    if metrics.all_rows is None:
        return None
    after, before = (
        metrics.systems.get(name or "") for name in (ALL_ROWS, metrics.delivered and metrics.delivered.name)
    )
    metric = main_metric(list(after.metrics)) if after else ""
    scores = [one.metrics.get(metric) for one in (after, before) if one]
    shown = [f"{score:.{score_digits(metric, scores, 1)}f}" for score in scores if score is not None]
    said = f" Test {METRIC_NAMES.get(metric, metric)} {shown[0]}; {shown[1]} before." if len(shown) == 2 else ""
    return metrics.all_rows.why + said


def chosen(record: RunRecord) -> Delivered | None:
    """What a run handed over by its dev losses; None where it has not, or where the recipe asks for GRASP's result."""
    delivered = record.metrics.delivered if record.metrics else None
    return delivered if delivered and record.recipe.final.deliver == "best" else None


def delivered_system(record: RunRecord) -> str:
    """The system whose adapter lies in `adapter/`."""
    return record.metrics.handed_over if record.metrics else "grasp"


def predict_command(folder: Path | None = None) -> str:
    """One command that answers a prompt of the run; without a folder as it is given inside that of the run."""
    places = [str(Path(name) if folder is None else folder / name) for name in (ADAPTER_FOLDER, PROMPT_FILE)]
    adapter, prompt = map(shlex.quote, places)
    return f"grasp-lora predict {adapter} --jsonl < {prompt}"


def warning_of(record: RunRecord) -> str | None:
    """What has to be known before the adapter is taken, as sentences; None where there is nothing."""
    if record.metrics is None or record.metrics.delivered is None:
        return None
    said = [record.metrics.delivered.warning] if record.metrics.delivered.warning else []
    system = delivered_system(record)
    scores, guess = record.metrics.systems.get(system), best_guess(record, system)
    right = None if scores is None else scores.metrics.get("accuracy")
    if right is not None and guess is not None and right <= guess[1]:
        said.append(
            f"It answers {right:.1f} % of the {record.metrics.test_examples} test rows right, and {guess[0]} every time would "
            f"have {guess[1]:.1f} %. Take it only if more test rows show that it is better."
        )
    return " ".join(said) or None


def command_for_texts(record: RunRecord, folder: Path | None = None) -> str | None:
    """One command that answers a text of the reader's own; None where no option puts it into a prompt, or there is nothing to."""
    prompt = record.data.report.get("prompt") or ""
    options = [] if prompt == TEMPLATES["completion"][ANY_LANGUAGE].prompt else options_of(prompt)
    adapter = shlex.quote(str(Path(ADAPTER_FOLDER) if folder is None else folder / ADAPTER_FOLDER))
    return " ".join([f"grasp-lora predict {adapter}", *(f'{option} "..."' for option in options)]) if options else None


def next_steps(record: RunRecord, recipe: str, overrides: Sequence[str], folder: Path, allow_code: bool) -> list[str]:
    """What a user can do after a run, and what it costs."""
    delivered = chosen(record)
    if delivered is None or record.metrics is None:
        return []
    steps = []
    # The rest `compare` refuses, or it would measure another GRASP.
    if record.given_ratio is None and record.metrics.test_examples >= LEAST_TEST:
        given = [
            recipe,
            *(part for override in overrides for part in ("--set", override)),
            *["--allow-code"] * allow_code,
        ]
        folds = _few_rows(record) and _can_be_cut(record)
        what = f"each row tested once, about {FOLDS} times" if folds else "three seeds, about three times"
        settings = ["--output", str(folder), "--methods", "merged,continued,grasp", *["--folds", str(FOLDS)] * folds]
        steps.append(f"{what} this run: {shlex.join(['grasp-lora', 'compare', *given, *settings])}")
    if delivered.low is not None and delivered.high is not None and delivered.low <= 0 <= delivered.high:
        split = (delivered.split or "dev").replace("-", "_")
        own, key = getattr(record.recipe.data.target, f"{split}_files"), f"data.target.{split}"
        how = f"add examples to {key}_files" if own else f"add examples and raise {key} (now {delivered.examples})"
        steps.append(f"more {delivered.split} rows tell more: {how}")
    if delivered.name != "grasp":
        steps.append(f"GRASP's result all the same, at no cost: it is {folder / FINAL_FOLDER}")
    return steps


def _few_rows(record: RunRecord) -> bool:
    """Whether the pool has few rows, but enough groups for folds, as far as the splits tell: each takes whole ones."""
    ids, groups = record.data.ids, len(set(record.data.test_groups))
    rows = sum(len(ids.get(split, ())) for split in ("train", *HELD_OUT))
    unused = record.data.report.get("target", {}).get("unused", 0)
    return (
        rows + unused < FEW_ROWS and groups + sum(bool(ids.get(one)) for one in ("train", "dev", "micro_dev")) >= FOLDS
    )


def _can_be_cut(record: RunRecord) -> bool:
    """Whether a comparison of the run's recipe may have folds."""
    try:
        check_can_be_cut(validate(parse(record.recipe_text, RECIPE_FILE), RECIPE_FILE))
    except RecipeError:
        return False
    return True


def where_trained(found: TargetOn, sources: int) -> str:
    """Where the target adapter of `target.on: auto` was trained, and why, as a sentence or two; `sources` are merged with it."""
    place = "on top of the source adapter" if found.on == "source" else "on the backbone alone"
    if not found.splits:
        return f"There are too few dev and micro-dev rows to choose by, so the target adapter was trained {place}."
    if found.left_out:
        return f"The target adapter was trained {place}; {found.left_out}"
    names = {"source": "sum of both adapters", "apart": "average"}
    if sources > 1:
        names = {"source": "sum of the mean source adapter and the target adapter", "apart": "average of all"}
    here, there = ("source", "apart") if found.on == "source" else ("apart", "source")
    split = " and ".join(name.replace("_", "-") for name in found.splits)
    return (
        f"The target adapter was trained both on top of the source adapter and on the backbone alone. The one {place} was taken: "
        f"the {names[here]} has a {split} loss of {found.losses[here]:.3f} ({found.examples} rows), the "
        f"{names[there]} {found.losses[there]:.3f}."
    )
