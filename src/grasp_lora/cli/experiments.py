"""The commands that do many runs of a recipe: compare, sweep."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from grasp_lora.cli.options import AllowCodeOption, OptionsOf, RecipeArgument, SetOption, VerboseOption
from grasp_lora.cli.terminal import console, loading, log_to_terminal, say, shown

_compare = OptionsOf("grasp_lora.bench.compare", "ComparisonSettings")
_sweep = OptionsOf("grasp_lora.bench.search", "SweepSettings")


def _folder_option(kind: str) -> Any:
    return typer.Option(
        "--output", "-o", help=f"Folder of the experiment; default runs/NAME, the {kind} in its folder {kind}."
    )


def compare(
    recipe: RecipeArgument,
    methods: Annotated[str | None, _compare("methods", more="Separated by commas.")] = None,
    seeds: Annotated[str, _compare("seeds", more="Separated by commas.")] = "42,1337,9001",
    grid: Annotated[str, _compare("grid", more="Separated by commas.")] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8",
    reference: Annotated[str, _compare("reference")] = "grasp",
    split_seed: Annotated[list[int] | None, _compare("split_seeds", more="May be repeated.")] = None,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    output: Annotated[Path | None, _folder_option("compare")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the trainings with their cost and minutes here, and do none.")
    ] = False,
    verbose: VerboseOption = False,
) -> None:
    """Run every baseline and GRASP under one protocol; print the table with uncertainty and cost.

    What a run, a sweep or an earlier comparison has done in this folder is not done again, and a training that was stopped
    goes on. Methods: zero_shot, source_only, target_only, target_wide (rank of the merge), continued (source adapter on the
    target data), joint, ties, dare_ties, lorahub, merged (not trained), adaptive_merge (fine-tuned, not pruned), grid_paper
    (the paper's baseline), grid (of the recipe's own final runs), grasp, grasp_paper, merge_dev_free, grid_dev_free and
    grasp_dev_free (no early stopping); grasp_single (the controller run's own adapter finished) and grid_oracle, which is not
    fair.
    """
    from grasp_lora.errors import GraspError

    log_to_terminal(verbose)
    with loading():
        from grasp_lora import api
        from grasp_lora.bench.methods import DEFAULT_METHODS
        from grasp_lora.bench.run_folder import REPORT_FILE
        from grasp_lora.cli.progress import TerminalBenchProgress, print_plan, print_steps
        from grasp_lora.report.comparison import COMPARISON_TABLES_FILE, print_comparison
    with _checked_options():
        settings = {
            "methods": DEFAULT_METHODS if methods is None else tuple(_parts(methods)),
            "seeds": tuple(_number(int, "--seeds", seed, "whole numbers") for seed in _parts(seeds)),
            "grid": _ratios("--grid", grid),
            "reference": reference,
            "split_seeds": tuple(split_seed or ()),
        }
    if dry_run:
        with _checked_options():
            plan = api.plan(recipe, overrides or [], output, allow_code=allow_code, **settings)
        print_plan(plan, console)
        return
    with shown(TerminalBenchProgress(console)) as progress, _checked_options():
        folder, comparison = api.compare(recipe, overrides or [], output, progress, allow_code=allow_code, **settings)
    print_comparison(comparison, console)
    print_steps(progress.used, console)
    say(f"tables {folder / COMPARISON_TABLES_FILE}   report {folder / REPORT_FILE}")
    failed = [f"{row.title} {row.unavailable}" for row in comparison.rows if row.failed]
    missing = [f"{row.title} on split {other.split_seed} {row.reason}"
               for other in comparison.other_splits for row in other.missing if row.failed]  # fmt: skip
    if failed or missing:
        count = (
            f"{len(failed)} of {len(comparison.rows)} methods failed" if failed else "on another split methods failed"
        )
        raise GraspError(f"{count}: {'; '.join([*failed, *missing])}")


def sweep(
    recipe: RecipeArgument,
    param: Annotated[list[str] | None, _sweep("params", "--param", "-p", more="May be repeated.")] = None,
    trials: Annotated[int, _sweep("trials")] = 20,
    sampler: Annotated[str, _sweep("sampler")] = "tpe",
    pruner: Annotated[str | None, typer.Option(hidden=True)] = None,
    seed: Annotated[int | None, _sweep("seed")] = None,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    output: Annotated[Path | None, _folder_option("sweep")] = None,
    verbose: VerboseOption = False,
) -> None:
    """Search good values for any keys of a recipe with Optuna, by the dev loss of the final run.

    For example --param final.prune_ratio=0.1..0.8, the search that the learned ratio replaces. Writes best.yaml for `run`. Run it
    again to go on after an interruption.
    """
    from grasp_lora.errors import RecipeError

    log_to_terminal(verbose)
    if pruner is not None:
        raise RecipeError(
            f"--pruner {pruner} is given, but a sweep has no pruners any more: final runs stop early by themselves "
            "(final.training.patience); leave it out"
        )
    with loading():
        from grasp_lora import api
        from grasp_lora.bench.search import BEST_FILE
        from grasp_lora.cli.progress import TerminalSweepProgress, print_sweep
    with shown(TerminalSweepProgress(console)) as progress, _checked_options():
        settings = {"params": tuple(param or ()), "trials": trials, "sampler": sampler, "seed": seed}
        folder, result = api.sweep(recipe, overrides or [], output, progress, allow_code=allow_code, **settings)
    print_sweep(result, console)
    say(f"best recipe {folder / BEST_FILE}")


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
