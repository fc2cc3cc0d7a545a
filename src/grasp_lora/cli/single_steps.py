"""The commands that work on adapters without a run: `judge`, `merge`."""

from pathlib import Path
from typing import Annotated

import typer

from grasp_lora.cli.options import BackboneOption, RevisionOption, StepOutput, TrustOption
from grasp_lora.cli.terminal import console, loading, log_to_terminal, say
from grasp_lora.errors import RecipeError
from grasp_lora.storage.reading import reading


def judge(
    adapters: Annotated[
        list[str],
        typer.Argument(help="PEFT adapters of one backbone: folders or hub ids; `backbone` is the model alone."),
    ],
    rows: Annotated[str, typer.Option(help="A file of rows with answers, which none of the adapters was trained on.")],
    language: Annotated[str, typer.Option(help="Code of the language of the rows, such as sw.")],
    column: Annotated[
        list[str] | None, typer.Option(help="A column of another name: FIELD=COLUMN. May be repeated.")
    ] = None,
    sheet: Annotated[
        str | None, typer.Option(help="The sheet of a workbook. Default: the first that is not hidden.")
    ] = None,
    chat: Annotated[
        bool | None, typer.Option(help="Put prompts into the chat template. Default: as each adapter was trained.")
    ] = None,
    backbone: BackboneOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    save: Annotated[
        Path | None, typer.Option("--save", "--output", "-o", help="A new folder for a JSON file and all answers.")
    ] = None,
) -> None:
    """Say which of several adapters is best on a file of rows, and whether the rows can tell. No recipe, no training."""
    log_to_terminal(False)
    with loading():
        from grasp_lora import api
        from grasp_lora.recipes.corpus import parse_columns
        from grasp_lora.report.bars import TerminalProgress
        from grasp_lora.report.judged import print_judgement, write_judgement
        from grasp_lora.storage.claims import refuse_existing
    if save is not None:
        refuse_existing(save)
    judgement = api.judge(
        adapters,
        rows,
        language,
        columns=parse_columns(column or []),
        sheet=sheet,
        chat=chat,
        backbone=backbone,
        revision=revision,
        trust_remote_code=trust_remote_code,
        device=device,
        progress=TerminalProgress(console),
    )
    print_judgement(judgement, console)
    if save is not None:
        write_judgement(judgement, save)
        say(f"-> {save}")


def merge(
    adapters: Annotated[list[str], typer.Argument(help="PEFT adapters to merge: folders or hub ids.")],
    output: StepOutput,
    backbone: BackboneOption = None,
    rule: Annotated[
        str,
        typer.Option(
            help="exact (the weighted sum; ranks add up), svd (its best approximation of one rank), ties, dare_ties; or "
            "paper_sum, paper_sum_unscaled, paper_apart, lorahub."
        ),
    ] = "exact",
    weight: Annotated[
        list[float] | None,
        typer.Option(
            help="Weight of an adapter; give one for each, in their order. Default: 1/N each; 1 each for ties, dare_ties and "
            "paper_apart."
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of the result, for svd; default: the highest of the adapters.")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of weights that ties and dare_ties keep, in (0, 1].")] = 0.5,
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
