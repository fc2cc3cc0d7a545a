"""The commands that do many runs of a recipe: compare, sweep, record."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grasp_lora.cli.terminal import (
    AllowCodeOption,
    RecipeArgument,
    SetOption,
    VerboseOption,
    console,
    loading,
    log_to_terminal,
    say,
    shown,
)

if TYPE_CHECKING:
    from grasp_lora.bench.session import Session


def _folder_option(kind: str) -> Any:
    return typer.Option("--output", "-o", help=f"Folder of the experiment; default runs/NAME-{kind}.")


def compare(
    recipe: RecipeArgument,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods, separated by commas; default: all that are named above but the last three."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "42,1337,9001",
    grid: Annotated[
        str, typer.Option(help="Prune ratios of the grid search, fractions in [0, 1].")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8",
    reference: Annotated[str, typer.Option(help="The method that the others are compared with.")] = "grasp",
    split_seed: Annotated[
        list[int] | None,
        typer.Option(help="Do all of it once more, with the first seed, on the split of this seed. May be repeated."),
    ] = None,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    output: Annotated[Path | None, _folder_option("compare")] = None,
    verbose: VerboseOption = False,
) -> None:
    """Run every baseline and GRASP under one protocol; print the table with uncertainty and cost.

    Run it again to go on after an interruption, or on another machine with a copy of the folder's records: what is on record is
    not done again. Methods: zero_shot, source_only, target_only, target_wide (rank of the merge), target_long (steps of GRASP),
    continued (source adapter on the target data), joint, ties, dare_ties, lorahub, merged (not trained), adaptive_merge
    (fine-tuned, not pruned), grid_paper (the paper's baseline), grid (of the recipe's own final runs), grid_16 (micro-dev
    chooses), grasp, grasp_paper, grasp_random, grasp_50 (all of the dev set at each ratio), one_shot (pruned, not trained),
    merge_dev_free, grid_dev_free and grasp_dev_free (no early stopping); grasp_single (the controller run's own adapter
    finished), grasp_default, and grid_oracle, which is not fair.
    """
    from grasp_lora.errors import GraspError

    log_to_terminal(verbose)
    session, folder = _opened(recipe, overrides, output, "compare", allow_code)
    with loading():
        from grasp_lora.bench.compare import ComparisonSettings
        from grasp_lora.bench.compare import compare as run_comparison
        from grasp_lora.bench.methods import DEFAULT_METHODS
        from grasp_lora.cli.progress import TerminalBenchProgress
        from grasp_lora.report.comparison import print_comparison
    with _checked_options():
        settings = ComparisonSettings(
            DEFAULT_METHODS if methods is None else tuple(_parts(methods)),
            tuple(_number(int, "--seeds", seed, "whole numbers") for seed in _parts(seeds)),
            _ratios("--grid", grid),
            reference,
            tuple(split_seed or ()),
        )
    with shown(TerminalBenchProgress(console)) as progress:
        content = run_comparison(session, folder, settings, progress)
    print_comparison(content, console)
    say(f"tables {folder / 'compare.md'}   report {folder / 'report.html'}")
    failed = [f"{row['title']} {row['unavailable']}" for row in content["rows"] if row["failed"]]
    missing = [f"{row['title']} on split {other['split_seed']} {row['reason']}"
               for other in content["other_splits"] for row in other["missing"] if row["failed"]]  # fmt: skip
    if failed or missing:
        count = (
            f"{len(failed)} of {len(content['rows'])} methods failed" if failed else "on another split methods failed"
        )
        raise GraspError(f"{count}: {'; '.join([*failed, *missing])}")


def sweep(
    recipe: RecipeArgument,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            "-p",
            help=r"What to vary: KEY=low..high, KEY=low..high:log, KEY=low..high/n for n values, KEY=\[a, b]. May be repeated.",
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="How many trials in all; default 20, with the grid sampler all combinations.")
    ] = None,
    sampler: Annotated[str, typer.Option(help="tpe, random or grid.")] = "tpe",
    pruner: Annotated[str, typer.Option(help="Stop bad trials early: none, median, halving or wilcoxon.")] = "none",
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler; default: the recipe's.")] = None,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    output: Annotated[Path | None, _folder_option("sweep")] = None,
    verbose: VerboseOption = False,
) -> None:
    """Search good values for any keys of a recipe with Optuna, by the dev loss of the final run.

    For example --param final.prune_ratio=0.1..0.8, the search that the learned ratio replaces. Writes best.yaml for `run`. Run it
    again to go on after an interruption.
    """
    log_to_terminal(verbose)
    session, folder = _opened(recipe, overrides, output, "sweep", allow_code)
    with loading():
        from grasp_lora.bench.sweep import BEST_FILE, SweepSettings
        from grasp_lora.bench.sweep import sweep as run_sweep
        from grasp_lora.cli.progress import TerminalSweepProgress, print_sweep
    with _checked_options():
        settings = SweepSettings(tuple(param or ()), trials, sampler, pruner, seed)
    with shown(TerminalSweepProgress(console)) as progress:
        content = run_sweep(session, folder, settings, progress)
    print_sweep(content, console)
    say(f"best recipe {folder / BEST_FILE}")


def record(
    recipe: RecipeArgument,
    every: Annotated[
        int | None,
        typer.Option(
            help="Optimizer steps between measurements; default: about eight measurements, the last step included."
        ),
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(
            help="Prune ratios of the final runs, fractions in [0, 1]; default 0.10, 0.15, ..., 0.80; always 0, too."
        ),
    ] = None,
    train_ratios: Annotated[
        str, typer.Option(help="Ratios held while training; shared draws one for each step, from all over the grid.")
    ] = "0,0.4,0.7,shared",
    probe_ratios: Annotated[
        str, typer.Option(help="The grid of ratios that are measured along each training.")
    ] = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8",
    dev: Annotated[
        bool, typer.Option(help="Train at shared ratios once more, and measure the dev set along the way.")
    ] = True,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    output: Annotated[Path | None, _folder_option("landscape")] = None,
    verbose: VerboseOption = False,
) -> None:
    """Record the loss landscape of a recipe, so that policies can be judged by replay, without a model.

    Controller-length trainings under several masks, with the micro-dev losses over a grid of ratios along the way, and final
    runs at many ratios; written to landscape.parquet. Run it again to go on after an interruption: what is on record is not
    done again, also where `compare` put it into the same folder.
    """
    log_to_terminal(verbose)
    session, folder = _opened(recipe, overrides, output, "landscape", allow_code)
    with loading():
        from grasp_lora.bench.recording import FINAL_RATIOS, LANDSCAPE_FILE, RecordingSettings
        from grasp_lora.bench.recording import record as run_recording
        from grasp_lora.cli.progress import TerminalBenchProgress, print_landscape
    with _checked_options():
        settings = RecordingSettings(
            FINAL_RATIOS if ratios is None else _ratios("--ratios", ratios),
            tuple(
                None if part == "shared" else _number(float, "--train-ratios", part, "numbers or shared")
                for part in _parts(train_ratios)
            ),
            _ratios("--probe-ratios", probe_ratios),
            every,
            dev,
        )
    options = {"every": every, "ratios": ratios, "train-ratios": train_ratios, "probe-ratios": probe_ratios}
    with shown(TerminalBenchProgress(console)) as progress:
        landscape = run_recording(
            session,
            folder,
            settings,
            progress,
            _command("record", recipe, options, overrides, [] if dev else ["--no-dev"]),
        )
    print_landscape(landscape, console)
    say(f"landscape {folder / LANDSCAPE_FILE}")


def _opened(
    recipe: str, overrides: list[str] | None, output: Path | None, kind: str, allow_code: bool
) -> tuple["Session", Path]:
    """The session of a recipe, with nothing loaded yet, and the folder of the experiment."""
    from grasp_lora.recipes.load import load_recipe

    loaded, base = load_recipe(recipe, overrides or [], allow_code=allow_code)
    with loading():
        from grasp_lora.bench.session import Session
    return Session(loaded, base), output or Path("runs") / f"{loaded.name}-{kind}"


def _command(name: str, recipe: str, options: dict[str, Any], overrides: list[str] | None, flags: list[str]) -> str:
    """The command as another machine would be given it: without the places of the data and of the result."""
    given = [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
    given += [word for one in overrides or [] if not one.startswith("data.root=") for word in ("--set", one)]
    return shlex.join(["grasp-lora", name, recipe, *given, *flags])


@contextmanager
def _checked_options() -> Iterator[None]:
    """Turn what settings say of their values into the error of a user's mistake."""
    from grasp_lora.errors import RecipeError

    try:
        yield
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _ratios(option: str, text: str) -> tuple[float, ...]:
    return tuple(_number(float, option, part) for part in _parts(text))


def _number(kind: type[int] | type[float], option: str, text: str, allowed: str = "numbers") -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{option} holds {text!r}; give {allowed}, separated by commas") from error
