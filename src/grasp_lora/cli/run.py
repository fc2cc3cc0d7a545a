"""The commands around the main job: `run`, `demo`, `check`, `report`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from grasp_lora.cli.options import AllowCodeOption, OutputOption, RecipeArgument, SetOption, VerboseOption, session_of
from grasp_lora.cli.terminal import console, loading, log_to_terminal, print_scores, say, shown
from grasp_lora.storage.processes import leave


def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    output: OutputOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Do the whole job: adapters, merge, learn the ratio, final run, evaluation, report.

    Run it again on the same folder to go on after an interruption: completed stages are skipped.
    """
    log_to_terminal(verbose)
    _run(recipe, overrides or [], output, allow_code)


def demo(
    language: Annotated[str, typer.Option(help="Target language of the demo: ar or zh.")] = "ar",
    overrides: SetOption = None,
    output: OutputOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Run the main job on an embedded model and embedded texts; minutes on a laptop."""
    from grasp_lora.errors import RecipeError

    log_to_terminal(verbose)
    if language not in ("ar", "zh"):
        raise RecipeError(f"demo language is {language!r}; allowed: ar, zh")
    _run(f"demo-{language}", overrides or [], output, False, answers=2)


def check(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check a recipe before running it: files, adapters, label masks, lengths, splits, leaks, rounds and cost."""
    log_to_terminal(verbose)
    from grasp_lora.bench.preflight import preflight

    warnings = 0
    for finding in preflight(session_of(recipe, overrides, allow_code)):
        warnings += finding.level != "ok"
        mark = "[green]ok     [/green]" if finding.level == "ok" else "[yellow]warning[/yellow]"
        console.print(f"{mark} [bold]{finding.topic:<10}[/bold]", end=" ")
        say(finding.text)
    changes = [part for override in overrides or [] for part in ("--set", override)]
    command = shlex.join(["grasp-lora", "run", recipe, *changes, *["--allow-code"] * allow_code])
    said = f"{warnings} warning{'' if warnings == 1 else 's'} above" if warnings else "nothing stands in the way"
    say(f"{said}; next: {command}")


def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html and report.md of a run folder again."""
    from grasp_lora.report.pages import write_report
    from grasp_lora.storage.files import clear_write_errors

    with clear_write_errors(folder):
        say(f"wrote {write_report(folder)}")


def _run(recipe: str, overrides: list[str], output: Path | None, allow_code: bool, answers: int = 0) -> None:
    with loading():
        from grasp_lora import api
        from grasp_lora.bench.run_folder import CARD_FILE, DISCARDED, FINAL_FOLDER, PROMPT_FILE, REPORT_FILE
        from grasp_lora.cli.progress import TerminalProgress
        from grasp_lora.report.delivered import (
            command_for_texts,
            next_steps,
            predict_command,
            reason,
            trained_again,
            verdict,
            warning_of,
        )
        from grasp_lora.report.run_record import read_run
    with shown(TerminalProgress(console, answers)) as progress:
        result = api.run(recipe, overrides, output, progress, allow_code=allow_code)
    print_scores(result.metrics)
    record = read_run(result.folder)
    if result.delivered is not None:
        say(verdict(result.delivered, result.metrics), style="bold")
        say(reason(result.delivered, result.metrics))
        if again := trained_again(result.metrics):
            say(again)
        if warning := warning_of(record):
            say(warning, style="yellow")
    learned = result.delivered is None or not result.delivered.nothing_learned
    if result.delivered is not None and result.metrics.handed_over != "grasp":
        say(f"GRASP's own result lies in {result.folder / FINAL_FOLDER}{':' if learned else ''}")
    ratio, given = result.ratio, result.metrics.prune_ratio_interval is None
    if learned:
        say(f"prune ratio {100 * ratio.ratio:.3g} % (given)" if given else ratio.summary)
        if ratio.wide:
            say("these probes do not settle the ratio; the report says what narrows the interval", style="yellow")
    if result.metrics.best_step == 0:
        say(DISCARDED, style="yellow")
    say(f"adapter {result.adapter}   report {result.folder / REPORT_FILE}")
    if (result.folder / PROMPT_FILE).is_file():
        say(f"try it: {predict_command(result.folder)}")
    if own := command_for_texts(record, result.folder):
        say(f"with a text of your own: {own}")
    say(f"in your own program: {result.adapter / CARD_FILE} holds the lines of Python")
    say(f"to the hub: hf upload {record.run.name} {shlex.quote(str(result.adapter))} --private")
    for step in next_steps(record, recipe, overrides, result.folder, allow_code):
        say(f"next: {step}")
    leave()
