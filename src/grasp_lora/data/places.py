"""Where data comes from: a file in one of several places, a text of the package, a data set on the hub."""

import filecmp
import importlib.resources
import logging
import os
from pathlib import Path
from typing import Any

from grasp_lora.data.tables import Table, as_row
from grasp_lora.errors import DataError
from grasp_lora.storage.network import no_network
from grasp_lora.storage.reading import expanded, is_file, is_folder
from grasp_lora.text.display import escaped, one_line

logger = logging.getLogger(__name__)

PARQUET_EXPORT = "refs/convert/parquet"  # where the hub keeps data sets that have a loading script
DATA_VARIABLE = "GRASP_LORA_DATA"
DEMO_PREFIX = "demo:"


def resolve_file(name: str, root: str | None = None, base: Path | None = None) -> Path:
    """Find a data file: `demo:NAME`, an absolute path, or a path below the first place that has it.

    The places are `data.root`, the environment variable GRASP_LORA_DATA and the folder of the recipe.

    Args:
        name: path as the recipe writes it.
        root: `data.root` of the recipe; relative to `base`.
        base: folder of the recipe; None for the working folder.

    Raises:
        DataError: it is in none of them; the message names every place tried. Or it is in two of them, with different contents,
            and the variable alone would decide.
    """
    if name.startswith(DEMO_PREFIX):
        return _demo_text(name.removeprefix(DEMO_PREFIX))
    path = expanded(name)
    base = Path.cwd() if base is None else base
    variable = os.environ.get(DATA_VARIABLE)
    places: dict[str, Path] = {}
    if path.is_absolute():
        places["absolute path"] = path
    else:
        if root is not None:
            folder = base / expanded(root)
            if not is_folder(folder):
                raise DataError(
                    f"data.root is {root!r}, but there is no folder {escaped(str(folder))}; mend it or leave it out"
                )
            places["data.root"] = folder / path
        if variable:
            places[DATA_VARIABLE] = expanded(variable) / path
        places["folder of the recipe"] = base / path
    found = [label for label, place in places.items() if is_file(place)]
    if not found:
        tried = ", ".join(f"{escaped(str(place))} ({label})" for label, place in places.items())
        raise DataError(
            f"data file {name!r} is missing; tried {tried}. "
            f"Set data.root or the environment variable {DATA_VARIABLE} to the folder that holds it"
        )
    first, *others = found
    for other in others:
        # What the recipe itself says with data.root is no accident; a variable of the environment may be one.
        if first == DATA_VARIABLE and not filecmp.cmp(places[first], places[other], shallow=False):
            raise DataError(
                f"data file {name!r} is in two places, with different contents: {escaped(str(places[first]))} ({first}) and "
                f"{escaped(str(places[other]))} ({other}); rename one, or say which with data.root"
            )
    return places[first]


def _demo_text(name: str) -> Path:
    texts = Path(str(importlib.resources.files("grasp_lora.demo").joinpath("texts")))
    built_in = {path.name: path for path in sorted(texts.glob("*.json"))}
    if name not in built_in:
        raise DataError(f"there is no demo text {name!r}; available: {', '.join(built_in)}")
    return built_in[name]


def read_hub(name: str, config: str | None, split: str, *, offline: bool = False) -> Table:
    """Read one split of a data set on the hub; never runs code of its repository.

    A repository with a loading script is read from the hub's own parquet export of it. With `offline`, only what is in the
    cache is used, and no connection is tried.

    Raises:
        DataError: the hub or the data set cannot be reached.
    """
    import datasets

    label = "/".join(part for part in ("hub:" + name, config, split) if part)
    try:
        with no_network(offline):
            try:
                table = datasets.load_dataset(name, config, split=split)
            except RuntimeError as error:
                if "scripts are no longer supported" not in str(error):
                    raise
                logger.info("%s has a loading script: reading the hub's parquet export instead", name)
                # The export knows no configurations: each is a folder.
                table = datasets.load_dataset(name, data_dir=config, split=split, revision=PARQUET_EXPORT)
    except ConnectionError as error:
        raise DataError(
            f"{label}: the hub cannot be reached ({one_line(str(error))}). Load it once while online, which keeps a copy in the "
            "cache, or download its files and name them under `files`"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{label}: cannot be loaded ({one_line(str(error))}). Check the names of the data set, the configuration and "
            "the split"
        ) from error
    # Sounds and pictures, whose decoders need not be there, are no text.
    table = table.remove_columns([name for name, kind in table.features.items() if _is_decoded(kind)])
    return Table(label, [as_row(row, f"{label}, row {number}") for number, row in enumerate(table, start=1)])


def _is_decoded(kind: Any) -> bool:
    """Whether a column of a hub data set holds sounds, pictures and the like, be it in lists or objects."""
    import datasets

    if isinstance(kind, dict):
        return any(map(_is_decoded, kind.values()))
    if (inner := getattr(kind, "feature", None)) is not None:
        return _is_decoded(inner)
    return hasattr(kind, "decode_example") and not isinstance(kind, getattr(datasets, "Json", ()))
