"""The options that commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from grasp_lora.recipes.text import builtin_recipes

# Typer brings a click of its own or, in older versions, uses the installed one; it exports no class of all usage errors but this.
UsageError: Any = typer.BadParameter.__base__


def recipes_beginning(incomplete: str) -> list[str]:
    """What a shell offers for a recipe: the built-in names, and files."""
    files = [path.as_posix() for ending in ("yaml", "yml") for path in Path().glob(f"*.{ending}")]
    return [name for name in (*builtin_recipes(), *sorted(files)) if name.startswith(incomplete)]


RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="A recipe file, or the name of a built-in one (see `recipes`).", autocompletion=recipes_beginning
    ),
]
AdapterArgument = Annotated[str, typer.Argument(help="PEFT adapter: a folder or a hub id.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Change one value: a.b=value, for example data.root=/data. May be repeated."),
]
AllowCodeOption = Annotated[
    bool,
    typer.Option("--allow-code", help="Import code that the recipe names (package.module:name), also from beside it."),
]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run; default runs/NAME.")]
StepOutput = Annotated[Path, typer.Option("--output", "-o", help="Folder for the result.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show what happens in detail.")]
BackboneOption = Annotated[str | None, typer.Option(help="Backbone; default: the one that the (first) adapter names.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a backbone on the hub.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the backbone.")]
