"""From a name to what it means: a row of a table, or an object of a user's own by its import path."""

import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from grasp_lora.errors import RecipeError
from grasp_lora.text.display import escaped, quoted

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
        ValueError: one line: there is none of that name, or it is of another type.
    """
    if not isinstance(name, str):
        if not isinstance(name, kind):
            raise ValueError(f"{what} is {quoted(name)}; it must be a name or a {kind.__name__}")
        return name
    if name in table:
        return table[name]
    found = imported(what, name, table)
    if not isinstance(found, kind):
        raise ValueError(f"{what} {quoted(name)} is a {type(found).__name__}; it must be a {kind.__name__}")
    return found


def imported(what: str, name: str, known: Iterable[str]) -> Any:
    """Import an object by its path; the known names are for the message.

    Raises:
        ValueError: one line: the name is no import path, or there is nothing of that name.
    """
    if not is_import_path(name):
        raise ValueError(
            f"{what} is {quoted(name)}; allowed: {', '.join(known)}, or the import path package.module:name of your own"
        )
    module_name, _, attribute = name.partition(":")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{what} is {quoted(name)}, but module {module_name!r} cannot be imported ({error}); install it or put its folder "
            "on PYTHONPATH"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{what} is {quoted(name)}, but module {module_name!r} fails when it is imported "
            f"({type(error).__name__}: {escaped(str(error))}); mend it"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"{what} is {quoted(name)}, but module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)


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
