"""The command line: parse, call, print. A user's mistake is one line and exit status 2."""

import os
import sys
import time
from importlib.metadata import version
from typing import Annotated, Any

import typer

from grasp_lora.cli.comparisons import compare
from grasp_lora.cli.jobs import check, demo, run
from grasp_lora.cli.options import UsageError
from grasp_lora.cli.predicting import export, predict
from grasp_lora.cli.recipes import init, recipes
from grasp_lora.cli.single_steps import judge, merge
from grasp_lora.cli.terminal import error_console, print_error, say, set_up_outputs
from grasp_lora.errors import BEFORE_IT_BEGAN, STOPPED, GraspError, Interrupted
from grasp_lora.storage.memory import enough_memory
from grasp_lora.storage.processes import is_first, world_size
from grasp_lora.storage.threads import waiting_turns

app = typer.Typer(
    name="grasp-lora",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Adapt a language model to a language with little data: merge a LoRA adapter of a rich language with one of
yours, prune the merge if the recipe asks, train it, and say how well it answers (GRASP LoRA, arXiv 2601.06702).

Start with [bold]grasp-lora demo[/bold], then [bold]grasp-lora init my-data.csv --language sw[/bold] for your own examples.""",
)
INTERRUPTED = 130  # typer's for Ctrl-C
BY_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # which accelerate reads
IN_SEVERAL_PROCESSES = ("run", "demo")
TIME_TO_SPEAK = 3  # seconds: torchrun ends all processes when one has ended

for command in (
    run, demo, check, recipes, init, predict, judge, merge, export, compare,
):  # fmt: skip
    app.command()(command)


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
    if world_size() == 1:  # else accelerate would wait for the other workers that srun or mpirun has started
        for name in BY_MPI:
            os.environ.pop(name, None)
    elif context.invoked_subcommand not in IN_SEVERAL_PROCESSES:
        raise GraspError(f"{context.invoked_subcommand} runs in one process; start it without torchrun")


def main() -> None:
    """Run the command line; a user's mistake becomes one line and exit status 2, a stop by a signal one line and 75."""
    set_up_libraries()
    set_up_outputs()
    sys.exit(_status())


def _status() -> int:
    """Do what the arguments ask for; return the exit status."""
    try:
        with enough_memory("this command", "give it less at once, or more memory"):
            status = int(app(prog_name="grasp-lora", standalone_mode=False) or 0)
        if status == INTERRUPTED:  # where nothing that goes on had begun, such as while libraries load
            print_error(BEFORE_IT_BEGAN, style="yellow")
            return STOPPED
        return status
    except UsageError as error:
        if message := error.format_message().strip():  # none where the help was printed in its place
            command = error.ctx.command_path if error.ctx else "grasp-lora"
            print_error(f"error: {message.removesuffix('.')}{_what_arrived(error)} (see {command} --help)")
        return 2
    except Interrupted as stop:
        if is_first():
            print_error(str(stop), style="yellow")
        else:
            time.sleep(TIME_TO_SPEAK)
        return STOPPED
    except (GraspError, OSError) as error:  # the second of the terminal, the working folder or a network
        if not is_first():  # mostly the first process has the same to say, and torchrun ends this one before it does
            time.sleep(TIME_TO_SPEAK)
        first, *more = error.lines if isinstance(error, GraspError) else [str(error)]
        print_error(f"error: {first}")
        for line in more:
            print_error(line)
        return 2


def _what_arrived(error: Any) -> str:
    # Typer's newer versions convert with pydantic, whose messages leave the value out.
    errors = getattr(error.__cause__, "errors", None)
    return f", got {errors()[0]['input']!r}" if errors else ""


def set_up_libraries() -> None:
    """Say how the libraries should behave; they read this when they are imported, so it comes before all of them.

    What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", waiting_turns())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else each of its retries is a line
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not error_console.is_terminal:  # in a terminal a download of gigabytes should show that it moves
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")  # the conversion of GGUF weights heeds only this
