"""What the end of a run says, in the terminal, the report and the card: which adapter to take, why, and how to use it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from grasp_lora.data.splits import HELD_OUT
from grasp_lora.data.tasks import ANY_LANGUAGE, TEMPLATES, options_of
from grasp_lora.engine.check import why_no_folds
from grasp_lora.engine.compare import LEAST_TEST
from grasp_lora.engine.deliver import TITLES, UNPRUNED
from grasp_lora.engine.differences import Difference
from grasp_lora.engine.judge import turned
from grasp_lora.engine.results import main_metric
from grasp_lora.engine.run_folder import ADAPTER_FOLDER, FINAL_FOLDER, PROMPT_FILE, Run
from grasp_lora.engine.steps import names_of
from grasp_lora.evaluation.metrics import METRICS, metric_title
from grasp_lora.report.examples import best_guess
from grasp_lora.report.tables import (
    duration,
    gain_text,
    in_text,
    is_unpruned,
    name_and_digits,
    percent,
    titles_of,
)

CONTINUED = "a source adapter was trained further on the target rows"
MERGED = "a source and a target adapter were merged"
SUMMED = "a target adapter was trained on top of a source adapter and added to it"  # with `target.on`
FEW_ROWS, FOLDS = 200, 4  # of all target rows: below that a test split alone tells little
LOW_SCORE = "docs/how-to/low-score.md"
NOTHING_LEARNED = "No adapter is shown to be better than the backbone alone."


def is_chosen(run: Run) -> bool:
    """Whether there is a choice to explain; else the recipe asks for one final run at a ratio that it gives."""
    return run.recipe.final.deliver != "grasp" or run.learned is not None


def verdict(run: Run) -> str:
    """Say which adapter to take, and whether the test rows show another one to be better."""
    delivered = run.metrics.delivered
    taken = delivered.title
    if run.recipe.final.deliver == "grasp" and run.learned:
        taken = f"the merge of both adapters, pruned at {percent(run.metrics.prune_ratio)} and trained (GRASP)"
    if discarded(run, delivered.name):
        taken += ", not trained further (no step lowered the dev loss)"
    start = f"{NOTHING_LEARNED} Handed over all the same" if delivered.nothing_learned else "Take this adapter"
    if not delivered.nothing_learned and (why := _unusable(run)):
        alone = run.metrics.differences.get("zero_shot")
        better = alone is not None and alone.score is not None and alone.score.verdict == "better"
        start = f"{'Better than the backbone alone, but not usable yet' if better else 'Not usable yet'} ({why[0]})"
    return f"{start}: {taken}.{_surpassed(run)}"


def _unusable(run: Run) -> list[str]:
    """Why most answers of what is handed over are no use: the fact, and what it is measured by; empty where that is not so."""
    scores, guess = run.metrics.systems[run.metrics.delivered.name].metrics, best_guess(run)
    right, main = scores.get("accuracy"), main_metric(list(scores))
    score, usable = scores.get(main), METRICS[main].usable if main in METRICS else None
    if right is not None and guess is not None and right <= guess[1]:
        return [
            f"{right:.1f} % right",
            f"It answers {right:.1f} % of the {run.metrics.test_examples} test rows right, and {guess[0]} every time would "
            f"have {guess[1]:.1f} %.",
        ]
    if score is not None and usable is not None and score < usable:
        said = f"test {in_text(metric_title(main))}"
        return [f"{said} {score:.1f}", f"Its {said} is {score:.1f}; below {usable:.0f} most answers are no use."]
    return []


def _surpassed(run: Run) -> str:
    """Which system the test rows show to be better than what is handed over, as a sentence; empty where there is none."""
    better = {
        name: each for name, each in run.metrics.differences.items() if each.score and each.score.verdict == "worse"
    }
    if not better:
        return ""
    best = max(better, key=lambda name: better[name].theirs)
    return f" The test rows show another to be better ({in_text(titles_of(run)[best])}): {gain_text(better[best])}."


def gain(run: Run) -> str | None:
    """Whether what is handed over is shown to be better than what its user had: the source adapter, the backbone, or neither."""
    had = dict.fromkeys(names_of(len(run.recipe.source.adapters)), "the source adapter") | {
        "zero_shot": "the backbone alone"
    }
    names = {name: title for name, title in had.items() if name in run.metrics.differences}
    verdicts = {name: score.verdict for name in names if (score := run.metrics.differences[name].score)}
    if not verdicts:
        return None
    better = next((name for name, verdict in verdicts.items() if verdict == "better"), None)
    first = better or next(iter(verdicts))
    text = f"{gain_text(run.metrics.differences[first])}, of {run.metrics.test_examples} test rows."
    if better:
        text = f"It answers better than {names[better]}: {text}"
        left = dict.fromkeys(names[name] for name in verdicts if verdicts[name] != "better")
        return text + (f" No gain over {' and '.join(left)} is shown." if left else "")
    beside = f". Beside {names[first]}" if len(set(names.values())) > 1 else ""
    return f"It is not shown to be better than {' or '.join(dict.fromkeys(names.values()))}{beside}: {text}"


def higher(run: Run, folder: Path = Path()) -> str | None:
    """Which systems have higher test scores, perhaps by chance, and where they lie, as sentences; None where there are none."""
    above = {name: each for name, each in run.metrics.differences.items() if _is_higher(each)}
    if not above:
        return None
    folders = {name: name for name in run.adapters} | {"grasp": FINAL_FOLDER}
    first, rows = next(iter(above.values())), run.metrics.test_examples
    metric, digits = name_and_digits(first)
    others = [
        f"{in_text(titles_of(run)[name])} ({each.theirs:.{digits}f}"
        + (f", in {folder / folders[name]}/)" if name in folders else ")")
        for name, each in above.items()
    ]
    return (
        f"A higher test {metric} than its {first.ours:.{digits}f}: {'; '.join(others)}. "
        f"{rows} test rows cannot show whether that is chance."
    )


def _is_higher(each: Difference) -> bool:
    """Whether another system has a higher test score, as it is printed, which may be chance."""
    return (
        bool(each.score and each.score.verdict != "worse")
        and round(each.theirs - each.ours, name_and_digits(each)[1]) > 0
    )


def headline(run: Run) -> str:
    """What was learned about the ratio, and what GRASP's result scores beside what is handed over, else beside a rival."""
    if run.recipe.final.deliver == "continued":
        return ""
    chosen, ratio, differences = is_chosen(run), run.metrics.prune_ratio, run.metrics.differences
    prune = "It prunes" if chosen else "Prune"  # the verdict is what says what to do
    sentences = [f"{prune} {percent(ratio)} of the merged adapter (given, not learned)."]
    if is_unpruned(run):
        sentences = ["Nothing is pruned, as the recipe says."]
    if run.learned is not None:
        estimate = run.estimate
        span = f"{100 * estimate.low:.0f} to {100 * estimate.high:.0f} %".replace(" ", "\u00a0")
        interval = f"{percent(estimate.confidence)} interval {span}"
        sentences = [f"{prune} {percent(ratio)} of the merged adapter ({interval})."]
        if estimate.nothing_learned:
            sentences = [f"Nothing was learned about the prune ratio ({interval}); {percent(ratio)} was taken."]
    if run.metrics.delivered.nothing_learned:
        sentences = [] if chosen else [NOTHING_LEARNED]  # which the verdict begins with
    beside = {"continued": "the source adapter continued"}
    if (
        run.recipe.final.deliver != "grasp"
    ):  # where no step lowered the dev loss, the usual practice leaves the source adapter
        beside["source"] = "the source adapter as it is"
    beside |= (
        {"target": "the target adapter alone"}
        if run.target_alone
        else {"merged": "the target adapter on the source adapter"}
    )
    if run.metrics.delivered.name != "grasp":
        beside = {"grasp": "what is handed over"}
    elif "unpruned" in differences:
        beside = {"unpruned": "the same training with nothing pruned"}
    rival = next((name for name in beside if name in differences), None)
    if rival is not None and not _is_higher(differences[rival]):  # of which `higher` tells
        against = differences[rival]
        metric, digits = name_and_digits(against)
        grasp, other, score = against.ours, against.theirs, against.score
        if rival == "grasp":
            grasp, other, score = other, grasp, score and turned(score)
        shown = f": {score.verdict}." if score else "."
        sentences.append(f"Test {metric} {grasp:.{digits}f} against {other:.{digits}f} for {beside[rival]}{shown}")
    if not chosen:  # so that this stands in the place of the verdict
        sentences.append(_surpassed(run).strip())
    return " ".join(filter(None, sentences))


def search_note(run: Run) -> str | None:
    """What the learned ratio cost beside a grid, and what a grid found, as sentences; None where the ratio was given."""
    cost, grid, final = run.metrics.search, run.metrics.grid, run.adapters.get(FINAL_FOLDER)
    if cost is None or run.learned is None or final is None or final.made is None:
        return None
    seconds = final.made.seconds
    note = (
        f"The controller run and the final run took {cost.passes:,} forward passes, {duration(run.learned.seconds + seconds)}; a "
        f"grid of {cost.grid_runs} final runs takes {cost.grid_passes:,}, about {duration(cost.grid_runs * seconds)}."
    )
    test_loss = run.metrics.systems["grasp"].test_loss
    if grid is None or test_loss is None:
        return note
    ratio, lowest = min(grid.losses, key=lambda pair: pair[1])
    return (
        f"{note} The grid, {'recorded before' if grid.recorded else 'done here'}: its lowest test loss is {lowest:.3f}, at "
        f"{percent(ratio)}; at the learned ratio it is {test_loss:.3f} ({100 * (test_loss / lowest - 1):+.1f} %)."
    )


def discarded(run: Run, name: str) -> bool:
    """Whether no step of the training that made a system lowered the dev loss, so that it is as it was before."""
    adapter = run.adapters.get(FINAL_FOLDER if name == "grasp" else name)
    return adapter is not None and adapter.made is not None and adapter.made.result.best_step == 0


def made_of(name: str, run: Run) -> str:
    """How what is handed over was made, as a part of a sentence; of several source adapters it is their mean that counts."""
    made = CONTINUED
    if name == "averaged":
        made += f", and the mean of it and of {UNPRUNED if is_unpruned(run) else TITLES['grasp']} was taken"
    elif name == "grasp":
        kept, pruned = not discarded(run, name), run.metrics.prune_ratio > 0.0
        made = MERGED if run.target_alone else SUMMED
        made += ", a share of that was pruned, and the " if pruned else ", nothing was pruned, and the "
        made += ("rest" if pruned else "whole") + " was fine-tuned" if kept else "fine-tuning was discarded"
    sources = len(run.recipe.source.adapters)
    if sources > 1:
        made = made.replace("a source and a target adapter", f"{sources} source adapters and a target adapter")
        made = made.replace("a source adapter", f"the mean of {sources} source adapters")
    return made


def warning_of(run: Run) -> str | None:
    """What has to be known before the adapter is taken, as sentences; None where there is nothing."""
    warnings = [run.metrics.delivered.warning] if run.metrics.delivered.warning else []
    if unusable := _unusable(run):
        warnings += [
            unusable[1],
            f"What helps most: a larger backbone (backbone.name), and more rows. More: {LOW_SCORE}.",
        ]
    return " ".join(warnings) or None


# Commands, each as it is given in the folder of the run, or with a folder from elsewhere


def predict_command(folder: Path = Path()) -> str:
    """One command that answers a prompt of the run."""
    adapter, prompt = (shlex.quote(str(folder / name)) for name in (ADAPTER_FOLDER, PROMPT_FILE))
    return f"grasp-lora predict {adapter} --jsonl < {prompt}"


def command_for_texts(run: Run, folder: Path = Path()) -> str | None:
    """One command that answers a text of the reader's own; None where no option puts it into a prompt, or there is nothing to."""
    prompt = run.data.report["prompt"]
    options = [] if prompt == TEMPLATES["completion"][ANY_LANGUAGE].prompt else options_of(prompt)
    words = [
        f"grasp-lora predict {shlex.quote(str(folder / ADAPTER_FOLDER))}",
        *(f'{option} "..."' for option in options),
    ]
    return " ".join(words) if options else None


def upload_command(folder: Path = Path()) -> str:
    """The command of the hub's own client that uploads the adapter to a repository that only its owner sees."""
    return f"hf upload ORG/NAME {shlex.quote(str(folder / ADAPTER_FOLDER))} --private"


def next_step(run: Run, recipe: str, overrides: Sequence[str], folder: Path, allow_code: bool) -> str | None:
    """The command of a comparison in the folder of a run, and what that costs; None where `compare` would refuse."""
    if not is_chosen(run) or run.metrics.test_examples < LEAST_TEST:
        return None
    folds = _few_rows(run) and why_no_folds(run.recipe) is None
    cost = f"each row tested once, about {FOLDS} times" if folds else "three seeds, about three times"
    words = [recipe, *(word for override in overrides for word in ("--set", override)), *["--allow-code"] * allow_code]
    # Each of them is what the run has trained, too; else the cost would be another.
    alone = ["zero_shot,source_only,continued", "--reference", "continued"]
    methods = alone if run.recipe.final.deliver == "continued" else ["merged,continued,grasp"]
    settings = ["--output", str(folder), "--methods", *methods, *["--folds", str(FOLDS)] * folds]
    return f"{cost} this run: {shlex.join(['grasp-lora', 'compare', *words, *settings])}"


def _few_rows(run: Run) -> bool:
    """Whether the pool has few rows, but enough groups for folds, as far as the splits tell: each takes whole ones."""
    ids, groups = run.data.ids, len(set(run.data.test_groups))
    rows = sum(len(ids[split]) for split in ("train", *HELD_OUT)) + run.data.report["target"]["unused"]
    return rows < FEW_ROWS and groups + sum(bool(ids[split]) for split in ("train", "dev", "micro_dev")) >= FOLDS
