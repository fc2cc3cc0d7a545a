"""Where rows come from: a file in one of several places, a text of the package, a data set on the hub.

Each reader turns a file into rows, and says of each where it stands: `train.csv, line 7`, `answers.xlsx, sheet 'May', row 3`.
Lines and rows count as an editor or Excel shows them, the header being line 1; entries of a list count from 1.
A new kind of file is one function, and one row of `READERS`.
"""

import codecs
import csv
import filecmp
import importlib.resources
import io
import json
import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from grasp_lora.errors import DataError
from grasp_lora.storage.reading import expanded, is_file, reading
from grasp_lora.text.characters import INVISIBLE
from grasp_lora.text.display import escaped, listed, places, quoted

logger = logging.getLogger(__name__)

DATA_VARIABLE = "GRASP_LORA_DATA"
DEMO_PREFIX = "demo:"
PARQUET_EXPORT = "refs/convert/parquet"  # where the hub keeps data sets that have a loading script
WORKBOOKS = (".xlsx",)  # kinds of files that have sheets
MOST_UNPACKED = 2**30  # bytes of a workbook, which is a zip archive
LARGEST_SHEET = 10_000_000  # cells up to the last one that holds something, the empty ones among them
MOST_CELL = 10_000_000  # characters; the csv module's own limit is 131,072


class Row(NamedTuple):
    """Where a row stands, such as "a.jsonl, line 3", and its values by column."""

    where: str
    values: Mapping[str, object]


@dataclass(frozen=True)
class Table:
    """Rows of one file or data set, and its name for messages and made-up ids."""

    name: str
    rows: list[Row]
    of_cells: bool = False  # a value is what a cell holds, a text or a number, and no list

    @property
    def columns(self) -> list[str]:
        """The columns of all rows, in the order in which they appear: a record may leave out what it has not."""
        return list(map(str, dict.fromkeys(chain.from_iterable(row.values for row in self.rows))))


def read_file(name: str, path: Path, sheet: str | None = None) -> Table:
    """Read a file, which messages call by its name; SQuAD data has a row for each article.

    Of a workbook it reads `sheet`, or else the first sheet that is not hidden.

    Raises:
        DataError: the file is missing or malformed, or has no such sheet.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(
            f"{name}: cannot tell the format from the suffix {quoted(path.suffix)}; allowed: {', '.join(READERS)}"
        )
    in_sheets = suffix in WORKBOOKS
    with reading(name):
        rows = list(_workbook(path, name, sheet) if in_sheets else READERS[suffix](path, name))
    # Source and target may be sheets of one workbook, and their rows are told by the name of the table.
    named = f"{name}, sheet {sheet}" if in_sheets and sheet is not None else name
    return Table(named, rows, of_cells=in_sheets or suffix in (".csv", ".tsv"))


def sheets_of(path: Path) -> list[str]:
    """The sheets of a workbook that are not hidden; none of another file."""
    if path.suffix.lower() not in WORKBOOKS:
        return []
    from python_calamine import CalamineWorkbook, SheetVisibleEnum

    with CalamineWorkbook.from_path(path) as book:
        return [entry.name for entry in book.sheets_metadata if entry.visible == SheetVisibleEnum.Visible]


def _text(path: Path, name: str) -> str:
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # such as Excel's "Unicode text"
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8. If it is a workbook or parquet, give it "
            "the suffix .xlsx or .parquet; if it is compressed, unpack it"
        ) from None


def _json(path: Path, name: str) -> Iterator[Row]:
    """Read a list of objects, alone or under a key `data`, or one object."""
    text = _text(path, name).strip()
    content, end = json.JSONDecoder().raw_decode(text)
    if end < len(text):  # lines are often saved as .json
        yield from _json_lines(path, name)
        return
    rows = content.get("data") if isinstance(content, dict) else content
    for number, item in enumerate(rows if isinstance(rows, list) else [content], start=1):
        with reading(where := f"{name}, row {number}"):
            yield Row(where, {**item})


def _json_lines(path: Path, name: str) -> Iterator[Row]:
    # Not splitlines(): it also splits at characters, such as U+2028, that may stand inside a JSON string.
    for number, line in enumerate(_text(path, name).split("\n"), start=1):
        if line.strip():
            with reading(where := f"{name}, line {number}"):
                yield Row(where, {**json.loads(line)})


def _named(rows: Iterable[tuple[str, list[str]]]) -> Iterator[Row]:
    """Name the cells of rows by the first row that is not blank; blank rows, and columns without a name, are left out.

    White space and invisible marks around and in the names of columns do not count.
    """
    columns: list[str] = []
    uneven: list[str] = []
    for where, cells in rows:
        if not any(cell.strip() for cell in cells):
            continue
        if not columns:
            columns = [INVISIBLE.sub("", cell).strip() for cell in cells]
            if twice := [column for column, count in Counter(columns).items() if column and count > 1]:
                raise DataError(f"{where}: the column {quoted(twice[0])} stands twice; rename one")
            continue
        if len(cells) != len(columns):
            uneven.append(where)
            continue
        yield Row(where, {column: cell for column, cell in zip(columns, cells, strict=True) if column})
    if uneven:
        raise DataError(f"{places(uneven)}: the number of cells differs from the {len(columns)} columns")


def _csv(path: Path, name: str, delimiter: str | None = None) -> Iterator[Row]:
    """Read CSV, also as Excel writes it where the comma is the decimal mark, or with spaces behind the commas."""
    text = _text(path, name)
    if stated := re.match(r"sep=(.)(?=\r?\n)", text):  # a first line for Excel, which other readers take for the header
        text, delimiter = text[stated.end() :], stated[1]
    header = next((line for line in text.split("\n") if line.strip(' \t\r,;"')), "")
    csv.field_size_limit(max(csv.field_size_limit(), MOST_CELL))  # of the whole process; it is never lowered
    delimiter = delimiter or _delimiter_of(text, header)
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=f"{delimiter} " in header, strict=True)
    try:
        for row in _named((f"{name}, line {line}", cells) for line, cells in _with_lines(reader)):
            if delimiter == "\t" and any(_holds_rows(str(cell), len(row.values)) for cell in row.values.values()):
                raise DataError(
                    f"{row.where}: a cell holds tabs and line breaks, so a quotation mark that opens a cell has "
                    "taken in the rows after it; double each mark, and put the cell between two more"
                )
            yield row
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: not valid CSV ({error})") from None


def _with_lines(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV reader, each with the line that it begins in; it may go over several."""
    line = 1
    for cells in reader:
        yield line, cells
        line = reader.line_num + 1


def _delimiter_of(text: str, header: str) -> str:
    """The mark of the header that gives every row as many cells, the most: Excel has semicolons where the comma is decimal."""
    marks = [mark for mark in ",;\t" if mark in header] or [","]
    cells_by = dict.fromkeys(marks, 0)
    for mark in marks if len(marks) > 1 else ():
        with suppress(csv.Error):
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
            counts = {len(cells) for cells in rows if any(cells)}
            cells_by[mark] = counts.pop() if len(counts) == 1 else 0
    return max(marks, key=cells_by.__getitem__)


def _holds_rows(cell: str, columns: int) -> bool:
    """Whether a cell seems to have taken in rows: its first and last line together have the tabs of one, and so has each between.

    Tabs that only indent lines, such as those of code, are none of rows.
    """
    lines = cell.split("\n")
    tabs = [line.count("\t") for line in lines]
    whole = len(lines) > 1 and {tabs[0] + tabs[-1], *tabs[1:-1]} == {columns - 1}
    return whole and any("\t" in line.lstrip() for line in lines)


def _parquet(path: Path, name: str) -> Iterator[Row]:
    from pyarrow import parquet

    unpacked, read = 0, 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            unpacked += batch.nbytes
            if unpacked > MOST_UNPACKED:
                raise DataError(f"{name} unpacks to more than {MOST_UNPACKED} bytes; keep the rows that you need")
            for row in batch.to_pylist():
                read += 1
                yield Row(f"{name}, row {read}", row)


def _workbook(path: Path, name: str, sheet: str | None = None) -> Iterator[Row]:
    """Read a sheet of a workbook: values as they are stored, a formula's as it was last computed."""
    from python_calamine import CalamineWorkbook

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(part.file_size for part in archive.infolist())
            if size > MOST_UNPACKED:
                raise DataError(f"{name} unpacks to {size} bytes, more than {MOST_UNPACKED}; save the sheet as CSV")
            _refuse_vast_sheets(archive, name)
    with CalamineWorkbook.from_path(path) as book:
        if sheet not in (None, *book.sheet_names):
            raise DataError(f"{name} has no sheet {quoted(sheet)}; it has {listed(book.sheet_names)}")
        title = sheet or [*sheets_of(path), book.sheet_names[0]][0]
        cells = book.get_sheet_by_name(title).to_python(skip_empty_area=False)
    where = f"{name}, sheet {quoted(title)}"
    return _named((f"{where}, row {number}", list(map(_cell, row))) for number, row in enumerate(cells, start=1))


def _refuse_vast_sheets(archive: zipfile.ZipFile, name: str) -> None:
    """Refuse a sheet whose last cell lies so far off that the reader, which fills in all before it, would run out of memory."""
    for part in archive.namelist():
        if not re.fullmatch(r"xl/worksheets/[^/]+\.xml", part):
            continue
        cells = re.findall(rb'<c [^>]*?\br="([A-Z]{1,3})(\d{1,7})"[^>]*(?<!/)>(?!</c>)', archive.read(part))
        letters, row = (
            max((word.rjust(3) for word, _ in cells), default=b""),
            max((int(row) for _, row in cells), default=0),
        )
        column = sum(26**place * (mark - 64) for place, mark in enumerate(reversed(letters.strip())))
        if column * row > LARGEST_SHEET:
            raise DataError(
                f"{name} has a cell in row {row} and one in column {letters.strip().decode()}: too large a sheet; delete what "
                "lies far off, or save the sheet as CSV"
            )


def _cell(value: object) -> str:
    """The text of a cell: whole numbers without a point, up to 15 digits of others, dates and times as ISO 8601 has them."""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.15g}"
    return str(value)


# Of each suffix, the function from a file and its name to its rows.
READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
    ".xlsx": _workbook,
}


def resolve_file(name: str, root: str | None = None, base: Path | None = None) -> Path:
    """Find a data file: `demo:NAME`, an absolute path, or a path below the first place that has it.

    The places are `data.root`, the environment variable GRASP_LORA_DATA and the folder of the recipe.

    Args:
        name: path as the recipe writes it.
        root: `data.root` of the recipe; relative to `base`.
        base: folder of the recipe; None for the working folder.
    """
    if name.startswith(DEMO_PREFIX):
        return Path(str(importlib.resources.files("grasp_lora.demo"))) / "texts" / name.removeprefix(DEMO_PREFIX)
    path, base = expanded(name), Path.cwd() if base is None else base
    if path.is_absolute():
        places = {"absolute path": path}
    else:
        folders = {
            "data.root": None if root is None else base / expanded(root),
            DATA_VARIABLE: os.environ.get(DATA_VARIABLE) or None,
            "folder of the recipe": base,
        }
        places = {label: expanded(folder) / path for label, folder in folders.items() if folder is not None}
    having = [label for label, place in places.items() if is_file(place)]
    if not having:
        tried = ", ".join(f"{escaped(str(place))} ({label})" for label, place in places.items())
        raise DataError(
            f"data file {name!r} is missing; tried {tried}. "
            f"Set data.root or the environment variable {DATA_VARIABLE} to the folder that holds it"
        )
    first, *others = having
    for label in others:
        # What the recipe itself says with data.root is no accident; a variable of the environment may be one.
        if first == DATA_VARIABLE and not filecmp.cmp(places[first], places[label], shallow=False):
            raise DataError(
                f"data file {name!r} is in two places, with different contents: {escaped(str(places[first]))} ({first}) and "
                f"{escaped(str(places[label]))} ({label}); rename one, or say which with data.root"
            )
    return places[first]


def name_of_file(name: str, root: str | None = None, base: Path | None = None) -> str:
    """Name a file as its rows are known by: below `data.root`, or else the recipe's folder, as a relative path has it."""
    folder = os.path.normpath(Path.cwd() / (base or "") / expanded(root or ""))
    place = Path(os.path.normpath(expanded(name)))
    return place.relative_to(folder).as_posix() if place.is_relative_to(folder) else name


def read_hub(name: str, config: str | None = None, split: str = "train") -> Table:
    """Read one split of a data set on the hub; never runs code of its repository.

    A repository with a loading script is read from the hub's own parquet export of it.
    """
    import datasets

    label = "/".join(part for part in ("hub:" + name, config, split) if part)
    with reading(label):
        try:
            table = datasets.load_dataset(name, config, split=split)
        except RuntimeError:  # it has a loading script; the export knows no configurations: each is a folder
            logger.info("%s cannot be read as it is: reading the hub's parquet export instead", name)
            table = datasets.load_dataset(name, data_dir=config, split=split, revision=PARQUET_EXPORT)
    return Table(label, [Row(f"{label}, row {number}", row) for number, row in enumerate(table, start=1)])
