"""`grasp-lora compare`: every method of the paper and ours on the user's own rows."""

from pathlib import Path
from typing import Annotated, Any

import typer

from grasp_lora.cli.options import AllowCodeOption, RecipeArgument, SetOption, VerboseOption
from grasp_lora.cli.terminal import console, loading, log_to_terminal, say
from grasp_lora.errors import GraspError, RecipeError


def compare(
    recipe: RecipeArgument,
    methods: Annotated[str | None, typer.Option(help="Names from above, separated by commas; all by default.")] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Separated by commas; 42,1337,9001 by default, 42 with --folds. The source adapter is shared."
        ),
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="Prune ratios of the grid search, separated by commas; 0.1 to 0.8 by default.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="The method that the others are compared with; it is run in any case. Default grasp."),
    ] = None,
    planned: Annotated[
        str | None,
        typer.Option(
            help="The comparisons that get a verdict, such as grasp:joint,grasp:grid, whose first method is the reference; or "
            "`paper` for the paper's own. Default: the reference with grasp, continued, joint and grid."
        ),
    ] = None,
    folds: Annotated[
        int | None, typer.Option(help="Cut the target's rows into so many folds, 2 or more; each is tested on once.")
    ] = None,
    on: Annotated[
        str | None, typer.Option("--on", help="`ray`: let the workers of a Ray cluster share the work (extra ray).")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster; without one, a cluster on this machine is started.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that share the work, with --on ray.")] = None,
    gpus_per_worker: Annotated[float, typer.Option(min=0.0, help="GPUs of each Ray worker; may be a fraction.")] = 0.0,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the experiment; default runs/NAME, the tables in its compare."),
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Run every baseline and GRASP under one protocol; print the table with uncertainty and cost.

    Steps that a run or an earlier comparison finished in this folder are not repeated, and an interrupted training continues.
    Start it several times to share the work between processes. Methods: zero_shot, source_only, target_only, continued
    (source adapter on the target data), joint, ties, dare_ties, lorahub, merged (not trained), adaptive_merge (fine-tuned, not
    pruned), grid_paper (the paper's baseline), grid (of the recipe's own final runs), grasp, delivered (what a run hands over)
    and grasp_paper.
    """
    log_to_terminal(verbose)
    with loading():
        from grasp_lora import api
        from grasp_lora.cli.on_ray import share
        from grasp_lora.report.bars import TerminalProgress
        from grasp_lora.report.pages import COMPARISON_TABLES_FILE, print_comparison
    lists = {"methods": methods, "seeds": seeds, "grid": grid, "planned": planned}
    arguments: dict[str, Any] = {
        "recipe": recipe, "overrides": overrides or [], "folder": output, "allow_code": allow_code,
        "folds": folds, **{name: _parts(text) for name, text in lists.items() if text is not None},
        **({} if reference is None else {"reference": reference}),
    }  # fmt: skip
    if on not in (None, "ray") or (on is None and (address is not None or gpus_per_worker or workers is not None)):
        raise RecipeError(
            f"--on is {on}; allowed: ray, which --workers, --address and --gpus-per-worker are for; without it start this "
            "command several times"
        )
    progress = TerminalProgress(console)
    if on:
        try:
            folder, comparison = share(
                progress, arguments, workers=workers or 1, address=address, gpus_per_worker=gpus_per_worker
            )
        finally:
            progress.stop()
    else:
        folder, comparison = api.compare(progress=progress, **arguments)
    print_comparison(comparison, console)
    say(f"tables {folder / COMPARISON_TABLES_FILE}")
    failed = [f"{row.title} {row.unavailable}" for row in comparison.rows if row.failed]
    if failed:
        raise GraspError(f"{len(failed)} of {len(comparison.rows)} methods failed: {'; '.join(failed)}")


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
