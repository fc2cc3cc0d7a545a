"""The commands around the main job: `run`, `demo`, `check`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from grasp_lora.cli.options import AllowCodeOption, OutputOption, RecipeArgument, SetOption, VerboseOption
from grasp_lora.cli.terminal import console, loading, log_to_terminal, say
from grasp_lora.storage.processes import leave
from grasp_lora.text.display import one_line


def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    output: OutputOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Run the whole job: adapters, merge, prune ratio if asked for, final run, scores, report.

    Run it again to continue after an interruption; finished steps are skipped.
    """
    log_to_terminal(verbose)
    _run(recipe, overrides or [], output, allow_code)


def demo(
    language: Annotated[str, typer.Option(help="Target language of the demo: ar or zh.")] = "ar",
    grid: Annotated[
        bool,
        typer.Option(
            "--grid", help="Do the grid search here, too: eight more trainings; else a recorded one is shown."
        ),
    ] = False,
    overrides: SetOption = None,
    output: OutputOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Run the main job on an embedded model, embedded adapters and embedded texts; minutes on a laptop."""
    log_to_terminal(verbose)
    _run(f"demo-{language}", overrides or [], output, False, answers=2, grid_of=language, grid=grid)


def check(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check a recipe before running it: files, adapters, label masks, lengths, splits, leaks, rounds and cost."""
    log_to_terminal(verbose)
    warnings = 0
    with loading("checking: the model and the data are loaded, and two steps are trained to tell the time"):
        from grasp_lora.recipes.load import load_recipe

        loaded = load_recipe(recipe, overrides or [], allow_code=allow_code)
        from grasp_lora.engine.preflight import preflight
        from grasp_lora.engine.session import Session

        for finding in preflight(Session(*loaded)):
            warnings += finding.level != "ok"
            mark = (f"{finding.level:<8}", "green" if finding.level == "ok" else "yellow")
            say(Text.assemble(mark, (f"{finding.topic:<10} ", "bold"), one_line(finding.text)))
    changes = [part for override in overrides or [] for part in ("--set", override)]
    command = shlex.join(["grasp-lora", "run", recipe, *changes, *["--allow-code"] * allow_code])
    summary = f"{warnings} warning{'' if warnings == 1 else 's'} above" if warnings else "No problems found"
    say(f"{summary}. Next: {command}", copied=True)


def _run(
    recipe: str,
    overrides: list[str],
    output: Path | None,
    allow_code: bool,
    answers: int = 0,
    grid_of: str | None = None,
    grid: bool = False,
) -> None:
    with loading():
        from grasp_lora import api
        from grasp_lora.engine.run_folder import (
            CARD_FILE,
            DISCARDED,
            FINAL_FOLDER,
            PROMPT_FILE,
            REPORT_FILE,
            recorded_grid,
        )
        from grasp_lora.report import delivered as words
        from grasp_lora.report.bars import TerminalProgress
        from grasp_lora.report.pages import print_table
        from grasp_lora.report.tables import final_text, is_unpruned, scores_table
    # A grid on record is that of the recipe as it is.
    shown = grid or (recorded_grid(grid_of) if grid_of and not overrides else None) or False
    progress = TerminalProgress(console, answers)
    result = api.run(recipe, overrides, output, progress, allow_code=allow_code, grid=shown)
    record, metrics, folder = result.record, result.metrics, result.folder
    print_table(scores_table(record), console)
    say(words.verdict(record), style="bold")
    if search := words.search_note(record):
        say(words.headline(record), style="bold")
        say(search)
    if gain := words.gain(record):
        say(gain, style="bold")
    if higher := words.higher(record, folder):
        say(higher)
    say(metrics.delivered.why)
    if warning := words.warning_of(record):
        say(warning, style="bold yellow")
    learned = not result.delivered.nothing_learned and not is_unpruned(record)
    if metrics.delivered.name != "grasp" and FINAL_FOLDER in record.adapters:
        say(f"{final_text(record)} lies in {folder / FINAL_FOLDER}{':' if learned and not search else ''}")
    if learned:
        if not search:
            say(result.ratio.summary)
        if result.ratio.wide:
            say("these probes do not settle the ratio; the report says what narrows the interval", style="yellow")
    if metrics.best_step == 0:
        say(DISCARDED, style="yellow")
    say(f"adapter {result.adapter}   report {folder / REPORT_FILE}")
    if command := words.command_for_texts(record, folder):
        say(f"ask it: {command}", copied=True)
    elif (folder / PROMPT_FILE).is_file():
        say(f"ask it: {words.predict_command(folder)}", copied=True)
    say(f"to the hub: {words.upload_command(folder)}", copied=True)
    say(f"in your own program: {result.adapter / CARD_FILE} holds the lines of Python")
    if step := words.next_step(record, recipe, overrides, folder, allow_code):
        say(f"next: {step}", copied=True)
    leave()
