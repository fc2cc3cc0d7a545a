"""The command that does many runs of a recipe: compare."""

from pathlib import Path
from typing import Annotated, Any

import typer

from grasp_lora.cli.options import AllowCodeOption, OptionsOf, RecipeArgument, SetOption, VerboseOption
from grasp_lora.cli.terminal import console, loading, log_to_terminal, say, shown
from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.text.display import quoted

_compare = OptionsOf("grasp_lora.bench.compare", "ComparisonSettings")

OnOption = Annotated[
    str | None, typer.Option("--on", help="`ray`: let the workers of a Ray cluster share the work (extra ray).")
]
AddressOption = Annotated[
    str | None, typer.Option(help="Of the Ray cluster; without one, a cluster on this machine is started.")
]
GpusOption = Annotated[float, typer.Option(min=0.0, help="GPUs of each Ray worker; may be a fraction.")]


def _folder_option(kind: str) -> Any:
    return typer.Option(
        "--output", "-o", help=f"Folder of the experiment; default runs/NAME, the {kind} in its folder {kind}."
    )


def compare(
    recipe: RecipeArgument,
    methods: Annotated[str | None, _compare("methods", more="Separated by commas.")] = None,
    seeds: Annotated[
        str | None, _compare("seeds", more="Separated by commas; 42,1337,9001 by default, 42 with --folds.")
    ] = None,
    grid: Annotated[str, _compare("grid", more="Separated by commas.")] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8",
    reference: Annotated[str, _compare("reference")] = "grasp",
    on: OnOption = None,
    address: AddressOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that share the work, with --on ray.")] = None,
    gpus_per_worker: GpusOption = 0.0,
    folds: Annotated[int | None, _compare("folds")] = None,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    output: Annotated[Path | None, _folder_option("compare")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the steps with their forward passes, and do none.")
    ] = False,
    verbose: VerboseOption = False,
) -> None:
    """Run every baseline and GRASP under one protocol; print the table with uncertainty and cost.

    What a run or an earlier comparison has done in this folder is not done again, and a training that was stopped
    goes on. Start it several times, and the processes share the work. Methods: zero_shot, source_only, target_only, continued
    (source adapter on the target data), joint, ties, dare_ties, lorahub, merged (not trained), adaptive_merge (fine-tuned, not
    pruned), grid_paper (the paper's baseline), grid (of the recipe's own final runs), grasp, delivered (what a run hands over)
    and grasp_paper.
    """
    log_to_terminal(verbose)
    with loading():
        from grasp_lora import api
        from grasp_lora.bench.methods import METHODS
        from grasp_lora.bench.run_folder import REPORT_FILE
        from grasp_lora.cli.on_ray import share
        from grasp_lora.cli.progress import TerminalBenchProgress, print_plan, print_steps
        from grasp_lora.report.comparison import COMPARISON_TABLES_FILE, print_comparison
    settings = {
        "methods": tuple(METHODS) if methods is None else tuple(_parts(methods)),
        "grid": tuple(_number(float, "--grid", part) for part in _parts(grid)),
        "reference": reference,
        "folds": folds,
    }
    if seeds is not None:
        settings["seeds"] = tuple(_number(int, "--seeds", seed, "whole numbers") for seed in _parts(seeds))
    given = _given(recipe, overrides, output, allow_code, settings)
    ray = _ray(on, address, workers, gpus_per_worker)
    if ray is None and workers is not None:
        raise RecipeError(
            f"--workers is {workers}, but --on is not given; give --on ray, or start this command so often"
        )
    if dry_run:
        print_plan(api.plan(**given), console)
        return
    with shown(TerminalBenchProgress(console)) as progress:
        folder, comparison = share(progress, given, **ray) if ray else api.compare(progress=progress, **given)
    print_comparison(comparison, console)
    print_steps(progress.used, console)
    say(f"tables {folder / COMPARISON_TABLES_FILE}   report {folder / REPORT_FILE}")
    failed = [f"{row.title} {row.unavailable}" for row in comparison.rows if row.failed]
    if failed:
        raise GraspError(f"{len(failed)} of {len(comparison.rows)} methods failed: {'; '.join(failed)}")


def _given(
    recipe: str, overrides: list[str] | None, output: Path | None, allow_code: bool, settings: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a command of `grasp_lora.api`."""
    return {"recipe": recipe, "overrides": overrides or [], "folder": output, "allow_code": allow_code, **settings}


def _ray(on: str | None, address: str | None, workers: int | None, gpus_per_worker: float) -> dict[str, Any] | None:
    """What `share` takes, or None without --on."""
    if on is None and (address is not None or gpus_per_worker):
        raise RecipeError(
            f"{'--gpus-per-worker' if address is None else '--address'} is given without --on ray; add that"
        )
    if on not in (None, "ray"):
        raise RecipeError(f"--on is {quoted(str(on))}; allowed: ray")
    if on is None:
        return None
    return {"workers": workers or 1, "address": address, "gpus_per_worker": gpus_per_worker}


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(kind: type[int] | type[float], option: str, text: str, allowed: str = "numbers") -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise RecipeError(f"{option} holds {text!r}; give {allowed}, separated by commas") from error
