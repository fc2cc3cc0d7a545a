"""The command line: parse, call, print. A user's mistake is one line and exit status 2."""

import os
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from grasp_lora.cli.adapters import export, merge, predict
from grasp_lora.cli.experiments import compare, sweep
from grasp_lora.cli.terminal import (
    AllowCodeOption,
    OutputOption,
    RecipeArgument,
    SetOption,
    StepOutput,
    VerboseOption,
    console,
    error_console,
    loading,
    log_to_terminal,
    say,
    shown,
)
from grasp_lora.errors import FailedElsewhere, GraspError, Interrupted
from grasp_lora.storage.processes import is_first, leave, world_size
from grasp_lora.text.display import one_line

if TYPE_CHECKING:
    from grasp_lora.bench.session import Session

app = typer.Typer(
    name="grasp-lora",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Adapt a language model to a language with little data: merge a source and a target LoRA adapter and
[bold]learn how much of the merge to prune[/bold] in one training run (GRASP LoRA, arXiv 2601.06702).

Start with [bold]grasp-lora demo[/bold], then [bold]grasp-lora init my-data.csv --language sw[/bold] for your own examples.""",
)
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run it again
IN_SEVERAL_PROCESSES = ("run", "demo")
TIME_TO_SPEAK = 3  # seconds
# Typer brings a click of its own or, in older versions, uses the installed one; it exports no class of all usage errors but this.
UsageError: Any = typer.BadParameter.__base__

AdapterFolder = Annotated[str, typer.Option("--adapter", "-a", help="PEFT adapter: a folder or a hub id.")]


def _say_version(wanted: bool) -> None:
    if wanted:
        say(f"grasp-lora {version('grasp-lora')}")
        raise typer.Exit


@app.callback()
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    if world_size() > 1 and context.invoked_subcommand not in IN_SEVERAL_PROCESSES:
        raise GraspError(f"{context.invoked_subcommand} runs in one process; start it without torchrun")


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    output: OutputOption = None,
    allow_code: AllowCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Do the whole job: adapters, merge, learn the ratio, final run, evaluation, report.

    Run it again on the same folder to go on after an interruption: completed stages are skipped.
    """
    log_to_terminal(verbose)
    _run(recipe, overrides or [], output, allow_code)


@app.command()
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
    _run(f"demo-{language}", overrides or [], output)


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check a recipe before running it: files, adapters, label masks, lengths, splits, leaks, rounds and cost."""
    log_to_terminal(verbose)
    from grasp_lora.bench.preflight import preflight

    for finding in preflight(_session(recipe, overrides, allow_code)):
        mark = "[green]ok     [/green]" if finding.level == "ok" else "[yellow]warning[/yellow]"
        console.print(f"{mark} [bold]{finding.topic:<10}[/bold]", end=" ")
        say(finding.text)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one, as a file to begin with.")] = None,
) -> None:
    """List the built-in recipes, or print one."""
    from grasp_lora.recipes.load import builtin_recipes, builtin_text

    if name is not None:
        sys.stdout.write(builtin_text(name))
        return
    for one in builtin_recipes():
        console.print(one, highlight=False)


@app.command()
def init(
    data: Annotated[
        Path,
        typer.Argument(
            help="Your examples, at least about 40: CSV, TSV, JSON, JSONL or parquet with columns prompt and completion, "
            "messages, context, question and answer, or document and summary; or SQuAD JSON."
        ),
    ],
    language: Annotated[str, typer.Option("--language", "-l", help="Language of the examples, such as ar, zh or sw.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The recipe file; default NAME.yaml here.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            help="Data file of the rich language, or a PEFT adapter folder or hub id trained on it. May be repeated.",
        ),
    ] = None,
    source_language: Annotated[str, typer.Option(help="Language of the source data.")] = "en",
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Backbone: a hub id, a folder, or gemma3-270m. Default: the one that a source adapter names, else gemma3-270m."
        ),
    ] = None,
) -> None:
    """Write a commented recipe, with split sizes that fit your own examples."""
    from grasp_lora.recipes.starter import write_recipe

    file = write_recipe(data, language, output, source or [], source_language, backbone)
    name_source = "" if source else "name a source in it, then "
    say(f"wrote {file}; next: {name_source}grasp-lora check {shlex.quote(str(file))}")


for of_adapters in (predict, merge, export):
    app.command()(of_adapters)


@app.command()
def learn(
    recipe: RecipeArgument,
    adapter: AdapterFolder,
    output: StepOutput,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Learn the prune ratio of a merged adapter (the controller run alone)."""
    from grasp_lora.bench.single import learn_folder

    log_to_terminal(verbose)
    estimate = learn_folder(_session(recipe, overrides, allow_code), adapter, output)
    say(
        f"prune ratio {estimate.ratio:.4f} (95 % interval {estimate.low:.4f} to {estimate.high:.4f}, "
        f"{estimate.rounds} rounds) -> {output}"
    )


@app.command()
def finetune(
    recipe: RecipeArgument,
    adapter: AdapterFolder,
    ratio: Annotated[float, typer.Option(help="Prune ratio, a fraction in [0, 1].")],
    output: StepOutput,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prune a merged adapter at a given ratio and fine-tune it (the final run alone)."""
    from grasp_lora.bench.single import finetune_folder

    log_to_terminal(verbose)
    result = finetune_folder(_session(recipe, overrides, allow_code), adapter, ratio, output)
    loss = "" if result.dev_loss is None else f", dev loss {result.dev_loss:.4f}"
    say(f"{result.steps} steps, best at step {result.best_step}{loss} -> {output}")


@app.command()
def evaluate(
    recipe: RecipeArgument,
    adapter: Annotated[list[str], typer.Option("--adapter", "-a", help="PEFT adapter; may be repeated.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for predictions and metrics.")] = None,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure adapters on the recipe's dev and test splits."""
    from grasp_lora.bench.single import evaluate_folders

    log_to_terminal(verbose)
    _print_table(evaluate_folders(_session(recipe, overrides, allow_code), adapter, output))


for experiment in (compare, sweep):
    app.command()(experiment)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html and report.md of a run folder again."""
    from grasp_lora.report.pages import write_report
    from grasp_lora.storage.files import clear_write_errors

    with clear_write_errors(folder):
        say(f"wrote {write_report(folder)}")


def main() -> None:
    """Run the command line; a user's mistake becomes one line and exit status 2, a stop by a signal one line and 75."""
    _quiet_libraries()
    try:
        sys.exit(app(prog_name="grasp-lora", standalone_mode=False))
    except UsageError as error:
        if message := error.format_message().strip():  # none where the help was printed in its place
            command = error.ctx.command_path if error.ctx else "grasp-lora"
            _print_error(f"{message.removesuffix('.')}{_what_arrived(error)} (see {command} --help)")
        sys.exit(2)
    except FailedElsewhere:
        time.sleep(TIME_TO_SPEAK)  # else torchrun might end the process that says what happened before it has
        sys.exit(2)
    except Interrupted as stop:
        if is_first():
            error_console.print(one_line(str(stop)), style="yellow", markup=False, highlight=False, soft_wrap=True)
        sys.exit(STOPPED)
    except GraspError as error:
        if not is_first():
            time.sleep(TIME_TO_SPEAK)  # where all have the same to say, torchrun ends this one before it does
        _print_error(str(error))
        sys.exit(2)


def _what_arrived(error: Any) -> str:
    # Typer's newer versions convert with pydantic, whose messages leave the value out.
    errors = getattr(error.__cause__, "errors", None)
    return f", got {errors()[0]['input']!r}" if errors else ""


def _print_error(message: str) -> None:
    # What a library or a file put into the message may hold line breaks, or worse.
    error_console.print(f"error: {one_line(message)}", style="red", markup=False, highlight=False, soft_wrap=True)


def _session(recipe: str, overrides: list[str] | None, allow_code: bool) -> "Session":
    from grasp_lora.bench.session import Session
    from grasp_lora.recipes.load import load_recipe

    loaded, base = load_recipe(recipe, overrides or [], allow_code=allow_code)
    return Session(loaded, base)


def _run(recipe: str, overrides: list[str], output: Path | None, allow_code: bool = False) -> None:
    with loading():
        from grasp_lora import api
        from grasp_lora.cli.progress import TerminalProgress
        from grasp_lora.method.estimate import WIDE_INTERVAL
    with shown(TerminalProgress(console)) as progress:
        result = api.run(recipe, overrides, output, progress, allow_code=allow_code)
    _print_table(result.metrics.model_dump())
    ratio, given = result.ratio, result.metrics.prune_ratio_interval is None
    learned = " (given)" if given else f" (95 % interval {ratio.low:.1%} to {ratio.high:.1%})"
    console.print(f"prune ratio {ratio.ratio:.1%}{learned}", highlight=False)
    if not given and ratio.high - ratio.low >= WIDE_INTERVAL:
        console.print(
            "[yellow]the interval is wide: these probes do not settle the ratio; the report says what narrows it[/yellow]",
            soft_wrap=True,
        )
    say(f"adapter {result.adapter}   report {result.folder / 'report.html'}")
    leave()


def _print_table(metrics: dict[str, Any]) -> None:
    from grasp_lora.report.tables import score_digits

    names = list(metrics["signatures"])
    systems = metrics["systems"].values()
    digits = {name: score_digits(name, [row["metrics"].get(name) for row in systems], 1) for name in names}
    table = Table("system", "dev loss", "test loss", *names)
    for system, row in metrics["systems"].items():
        losses = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("dev_loss", "test_loss")]
        scores = {name: row["metrics"].get(name) for name in names}
        shown = ("unavailable" if value is None else f"{value:.{digits[name]}f}" for name, value in scores.items())
        table.add_row(one_line(system), *losses, *shown)
    console.print(table)


def _quiet_libraries() -> None:
    """Ask the libraries for errors only; they read this when they are imported, so it comes before all of them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not error_console.is_terminal:  # in a terminal a download of gigabytes should show that it moves
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")  # the conversion of GGUF weights heeds only this
