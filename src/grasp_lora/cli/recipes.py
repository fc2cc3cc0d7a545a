"""The commands that give recipes: `recipes` and `init`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from grasp_lora.cli.options import recipes_beginning
from grasp_lora.cli.terminal import console, log_to_terminal, say
from grasp_lora.recipes.text import SCHEMA_FILE, builtin_recipes, builtin_text


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this one, as a file to begin with.", autocompletion=recipes_beginning)
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of a recipe, by which editors complete its keys.")
    ] = False,
) -> None:
    """List the built-in recipes with a line each, or print one."""
    if name is not None or schema:
        if name is not None:
            sys.stdout.write(builtin_text(name))
            return
        from grasp_lora.recipes.recipe import schema_text

        sys.stdout.write(schema_text())
        return
    names = builtin_recipes()
    width = max(map(len, names))
    for name in names:
        about = builtin_text(name).splitlines()[1].removeprefix("# ")  # the first line names the schema
        console.print(f"{name:<{width}}  {about}", markup=False, highlight=False, soft_wrap=True)


def init(
    data: Annotated[
        Path,
        typer.Argument(
            help="Your examples, at least 30, as CSV, TSV, XLSX, JSON, JSONL or parquet. Columns: prompt and completion (or "
            "question and answer); messages; context, question and answer; document and summary; text and label; or source and "
            "target. The layouts of Alpaca, ShareGPT and SQuAD work as well."
        ),
    ],
    language: Annotated[
        str, typer.Option("--language", "-l", help="Language of the examples, an ISO 639 code such as ar, zh or sw.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The recipe file; default NAME.yaml here.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            help="Data file of the rich language, or a PEFT adapter folder or hub id trained on it. May be repeated. Default for "
            "questions on the embedded model: english-qa, which is included.",
        ),
    ] = None,
    target_adapter: Annotated[
        str | None,
        typer.Option(
            "--target-adapter",
            help="PEFT adapter of the target language. It is merged with the one of --source, at a learned prune ratio.",
        ),
    ] = None,
    learn_ratio: Annotated[
        bool,
        typer.Option("--learn-ratio", help="Learn the prune ratio of the merge (GRASP); 16 rows are set aside for it."),
    ] = False,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Prompt that the given adapters were trained on, with the fields of the rows in braces and \\n for a line break."
        ),
    ] = None,
    source_language: Annotated[
        str | None,
        typer.Option(
            help="Code of the language of the source data; for translations, of the language it is translated into. Default: en."
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=COLUMN", help="Column with another name, such as question=Swali. May be repeated."),
    ] = None,
    source_column: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=COLUMN", help="The same for the source data, if its columns have other names."),
    ] = None,
    sheet: Annotated[
        str | None, typer.Option(help="Sheet of an .xlsx workbook; default the first that is not hidden.")
    ] = None,
    source_sheet: Annotated[str | None, typer.Option(help="The same for source workbooks.")] = None,
    skip_unanswered: Annotated[
        bool, typer.Option("--skip-unanswered", help="Leave out rows without an answer, and count them.")
    ] = False,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Backbone: a hub id, a folder, or gemma3-270m. Default: the one that a source adapter names, else gemma3-270m."
        ),
    ] = None,
) -> None:
    """Write a commented recipe for your own examples, with split sizes that fit, and a schema for editors."""
    from grasp_lora.recipes.init import write_recipe
    from grasp_lora.recipes.load import load_recipe

    log_to_terminal(False)
    file, left = write_recipe(
        data,
        language,
        output,
        source or [],
        source_language,
        backbone,
        columns=column or [],
        source_columns=source_column or [],
        sheet=sheet,
        source_sheet=source_sheet,
        skip_unanswered=skip_unanswered,
        target_adapter=target_adapter,
        learn_ratio=learn_ratio,
        prompt=prompt,
    )
    say(f"wrote {file} and {file.with_name(SCHEMA_FILE)}")
    recipe, _ = load_recipe(str(file))
    target = recipe.data.target
    named = [f"{field} is the column {column}" for field, column in target.columns.items()]
    say(f"task: {recipe.data.task}" + (f", where {' and '.join(named)}" if named else ""))
    training = f"all others, about {left}," if target.train is None else target.train
    probed = f", {target.micro_dev} to probe prune ratios on" if target.micro_dev else ""
    say(f"rows: {training} to train on{probed}, {target.test} to test")
    say(f"next: grasp-lora check {shlex.quote(str(file))}", copied=True)
