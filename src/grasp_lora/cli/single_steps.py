"""The commands that work on adapters without a run: `evaluate`, `merge`."""

from pathlib import Path
from typing import Annotated

import typer

from grasp_lora.cli.options import (
    AllowCodeOption,
    BackboneOption,
    OptionsOf,
    RecipeArgument,
    RevisionOption,
    SetOption,
    StepOutput,
    TrustOption,
    VerboseOption,
    session_of,
)
from grasp_lora.cli.terminal import log_to_terminal, print_scores, say
from grasp_lora.errors import RecipeError
from grasp_lora.storage.reading import reading

_merge = OptionsOf("grasp_lora.method.merging", "MergeSettings")


def evaluate(
    recipe: RecipeArgument,
    adapter: Annotated[list[str], typer.Option("--adapter", "-a", help="PEFT adapter; may be repeated.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for predictions and metrics.")] = None,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure adapters on the recipe's dev and test splits."""
    from grasp_lora.engine.single import evaluate_folders

    log_to_terminal(verbose)
    print_scores(*evaluate_folders(session_of(recipe, overrides, allow_code), adapter, output))


def merge(
    adapters: Annotated[list[str], typer.Argument(help="PEFT adapters to merge: folders or hub ids.")],
    output: StepOutput,
    backbone: BackboneOption = None,
    rule: Annotated[str, _merge("rule")] = "exact",
    weight: Annotated[list[float] | None, _merge("weights", more="May be repeated.")] = None,
    rank: Annotated[int | None, _merge("rank")] = None,
    density: Annotated[float, _merge("density")] = 0.5,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Merge LoRA adapters into one ordinary PEFT adapter."""
    from grasp_lora.engine.single import merge_folders
    from grasp_lora.method.merging import MergeSettings

    log_to_terminal(False)
    with reading("merge", RecipeError):
        settings = MergeSettings(rule, tuple(weight) if weight else None, rank, density)
    say(merge_folders(adapters, output, settings, backbone, revision=revision, trust_remote_code=trust_remote_code))
