"""From a name to what it means: a row of a table, or an object of a user's own by its import path."""

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from grasp_lora.errors import RecipeError
from grasp_lora.text.display import escaped, quoted

Found = TypeVar("Found")

_WORD = r"[^\W\d]\w*"
_IMPORT_PATH = re.compile(rf"{_WORD}(\.{_WORD})*:{_WORD}")
_HASHES: dict[str, tuple[Any, str]] = {}  # module -> its spec, which is another one after a reload, and its hash


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
    with suppress(OSError):  # whoever needs the hash says so
        hash_of_module(module_name)
    return getattr(module, attribute)


def hash_of_module(name: str) -> str | None:
    """Return the SHA-256 of a loaded module's file, read once: `imported` does so at once, and later edits run no other code.

    Returns:
        None where no such module is loaded, or it has no file.

    Raises:
        OSError: its file cannot be read, and never was.
    """
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if not file:
        return None
    spec = getattr(module, "__spec__", None)
    known = _HASHES.get(name)
    if known is None or known[0] is not spec:
        known = _HASHES[name] = (spec, _sha256(file))
    return known[1]


def check_loaded(what: str, name: str) -> None:
    """Check that an import path, which is imported, leads to the code that a new process would import now.

    Raises:
        ValueError: one line: its module is loaded from another file, or the file has changed since.
    """
    module = name.partition(":")[0]
    file = getattr(sys.modules.get(module), "__file__", None)
    if not file:
        return
    found = _file_to_import(module)
    if found is not None and os.path.realpath(found) != os.path.realpath(file):
        raise ValueError(
            f"{what} is {quoted(name)}, which is to come from {escaped(found)}, but this process has loaded module {module!r} "
            f"from {escaped(file)}; start a new process, or give one of the files another name"
        )
    try:
        loaded = hash_of_module(module)
    except OSError as error:  # such as one inside an archive
        raise ValueError(
            f"{what} is {quoted(name)}, whose file {escaped(file)} cannot be read ({error.strerror or error}), so no record "
            "could say which code it was; give it as a plain file"
        ) from error
    try:
        changed = _sha256(file) != loaded
    except OSError:
        changed = True
    if changed:
        raise ValueError(
            f"{what} is {quoted(name)}, but {escaped(file)} was changed or removed after this process had loaded it, and the old "
            "code would run; start a new process (in a notebook: restart its kernel)"
        )


def _file_to_import(module: str) -> str | None:
    """The file that a module would be imported from if it was not loaded; None where it has none or cannot be found."""
    inside, parts = None, module.split(".")
    for number in range(1, len(parts) + 1):
        finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
        found = (finder.find_spec(".".join(parts[:number]), inside) for finder in finders)
        spec = next((one for one in found if one is not None), None)
        if spec is None or (number < len(parts) and spec.submodule_search_locations is None):
            return None
        inside = spec.submodule_search_locations
    return spec.origin if spec is not None and spec.has_location else None


def _sha256(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


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
