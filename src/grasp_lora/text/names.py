"""From a name to what it means: a row of a table, or an object of a user's own by its import path."""

import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeVar

from grasp_lora.errors import RecipeError
from grasp_lora.text.display import quoted

Found = TypeVar("Found")

_WORD = r"[^\W\d]\w*"
_IMPORT_PATH = re.compile(rf"{_WORD}(\.{_WORD})*:{_WORD}")


def without_place(name: str) -> str:
    r"""Return what a model or a file is called, for files that others read: of a path on this machine only its last part.

    >>> without_place("/data/models/llama"), without_place("~/llama/"), without_place("org/llama"), without_place("../llama")
    ('llama', 'llama', 'org/llama', '../llama')
    """
    is_path = name.startswith(("/", "~")) or "\\" in name
    return (last_part(name) or name) if is_path else name


def last_part(place: str) -> str:
    r"""Return the last part of a path, whichever system it was written on.

    >>> last_part("data/rows.csv"), last_part("C:\\data\\llama\\")
    ('rows.csv', 'llama')
    """
    return re.split(r"[\\/]", place.rstrip("\\/"))[-1]


def is_import_path(name: str) -> bool:
    """Whether a name has the form `package.module:name`."""
    return _IMPORT_PATH.fullmatch(name) is not None


def find(what: str, name: str | Found, kind: type[Found], table: Mapping[str, Found]) -> Found:
    """Find an object by name; an object of the right type stands for itself.

    Args:
        what: what it is, for messages: "merge rule".
        name: a key of the table, or the import path `package.module:name` of an object; importing it runs its code.
        kind: its type.
        table: the objects of this package.

    Raises:
        ValueError: there is none of that name, or it is of another type.
    """
    found = (table[name] if name in table else imported(what, name, table)) if isinstance(name, str) else name
    if not isinstance(found, kind):
        raise ValueError(f"{what} {quoted(name)} is a {type(found).__name__}; it must be a {kind.__name__}")
    return found


def imported(what: str, name: str, names: Iterable[str]) -> Any:
    """Import an object by its path; the names of a table are for the message.

    Raises:
        ValueError: the name is no import path, or another file of that name was imported before, such as another recipe's.
        ImportError, AttributeError: Python finds no such module, or nothing of that name in it.
    """
    if not is_import_path(name):
        raise ValueError(
            f"{what} is {quoted(name)}; allowed: {', '.join(names)}, or the import path package.module:name of your own"
        )
    module, _, attribute = name.partition(":")
    found = getattr(import_module(module), attribute)
    top = module.partition(".")[0]
    before, now = getattr(sys.modules[top], "__file__", None), PathFinder.find_spec(top)
    if before and now and now.origin and Path(before).resolve() != Path(now.origin).resolve():
        raise ValueError(
            f"{what} is {quoted(name)}: this process has imported {before}, and {now.origin} has the same name; rename one"
        )
    return found


def needs(what: str, module: str, package: str, *, extra: str) -> None:
    """Check that a package which an extra of this one brings is installed.

    Raises:
        RecipeError: its module is missing; one line that names what needs it, the package and the extra.
    """
    if importlib.util.find_spec(module) is None:
        raise RecipeError(f"{what} needs {package}, which is not installed: pip install 'grasp-lora[{extra}]'")


@contextmanager
def beside(folder: Path) -> Iterator[None]:
    """Find modules in a folder, too, inside the context; what is installed comes first."""
    place = str(folder.absolute())
    sys.path.append(place)
    try:
        yield
    finally:
        sys.path.remove(place)
