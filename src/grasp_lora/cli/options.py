"""The options that commands share, and the help texts of those that mirror a setting: what its docstring says."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from grasp_lora.recipes.text import builtin_recipes
from grasp_lora.text.docstrings import arguments, docstring_of

if TYPE_CHECKING:
    from grasp_lora.engine.session import Session

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


class OptionsOf:
    """Makes options that mirror the fields of a class of settings.

    Args:
        module: where the class stands; it is read and not imported, since that would make help slow.
        name: of the class.
    """

    def __init__(self, module: str, name: str) -> None:
        self._meanings = arguments(docstring_of(module, name))

    def __call__(self, field: str, *names: str, more: str = "") -> Any:
        """Return the option of a field, with what the docstring says as its help.

        Args:
            field: of the settings.
            names: such as `--methods`, where they are not the parameter's own.
            more: what only the command line has to say.
        """
        text = re.sub(r"\bNone (takes|is|for)\b", "default:", self._meanings.get(field, "")).replace(
            "None", "the default"
        )
        text = f"{text[:1].upper()}{text[1:]} {more}".strip().replace("`", "")
        return typer.Option(*names, help=escape(text))


def session_of(recipe: str, overrides: list[str] | None, allow_code: bool) -> "Session":
    """Return the session of a recipe with its overrides, with nothing loaded yet."""
    from grasp_lora.recipes.load import load_recipe

    loaded, base = load_recipe(recipe, overrides or [], allow_code=allow_code)
    from grasp_lora.engine.session import Session

    return Session(loaded, base)
