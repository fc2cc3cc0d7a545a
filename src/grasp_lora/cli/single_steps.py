"""The commands for single steps: `learn`, `finetune`, `evaluate`, `merge`."""

from pathlib import Path
from typing import Annotated

import typer

from grasp_lora.cli.options import (
    AdapterOption,
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
from grasp_lora.text.display import quoted

_merge = OptionsOf("grasp_lora.method.merging", "MergeSettings")


def learn(
    recipe: RecipeArgument,
    adapter: AdapterOption,
    output: StepOutput,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Learn the prune ratio of a merged adapter (the controller run alone)."""
    from grasp_lora.engine.single import learn_folder

    log_to_terminal(verbose)
    estimate = learn_folder(session_of(recipe, overrides, allow_code), adapter, output).estimate
    say(f"{estimate.summary}, {estimate.rounds} rounds, for finetune --ratio {estimate.ratio:.4f} -> {output}")


def finetune(
    recipe: RecipeArgument,
    adapter: AdapterOption,
    ratio: Annotated[float, typer.Option(help="Prune ratio, a fraction in [0, 1].")],
    output: StepOutput,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prune a merged adapter at a given ratio and fine-tune it (the final run alone)."""
    from grasp_lora.engine.run_folder import DISCARDED
    from grasp_lora.engine.single import finetune_folder

    log_to_terminal(verbose)
    result = finetune_folder(session_of(recipe, overrides, allow_code), adapter, ratio, output)
    loss = "" if result.dev_loss is None else f", dev loss {result.dev_loss:.4f}"
    best = f"best at step {result.best_step}" if result.best_step else DISCARDED
    say(f"{result.steps} steps, {best}{loss} -> {output}")


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
    density: Annotated[float | None, _merge("density", more="Default: 0.5.")] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Merge LoRA adapters into one ordinary PEFT adapter."""
    from grasp_lora.engine.single import merge_folders
    from grasp_lora.method.merging import MERGE_RULES, MergeSettings, keep_all

    log_to_terminal(False)
    takers = [name for name, row in MERGE_RULES.items() if row.sparsify is not keep_all]
    if density is not None and rule in MERGE_RULES and rule not in takers:
        raise RecipeError(
            f"merge rule {quoted(rule)} does not take a density; leave it out, or choose one of {', '.join(takers)}"
        )
    facts = merge_folders(
        adapters,
        output,
        backbone,
        rule,
        weight,
        rank,
        MergeSettings.density if density is None else density,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    say(facts)
