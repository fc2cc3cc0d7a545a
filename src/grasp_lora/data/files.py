"""Data files of strangers to tables of rows; every fault is named with its line.

A new kind of file is one function, and one row of `READERS`.
"""

import csv
import io
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_lora.data.tables import NoText, Row, Table, as_row
from grasp_lora.errors import DataError
from grasp_lora.storage.reading import RefusedError, is_there, parse_json, read_bounded
from grasp_lora.text.characters import INVISIBLE
from grasp_lora.text.display import CONTROLS, escaped, listed, one_line, quoted

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

MOST_BYTES = 2**31
MOST_ROWS = 5_000_000
MOST_LINE = 10_000_000  # characters
MOST_COLUMNS = 10_000
MOST_WORKBOOK = 2**27  # bytes of a workbook's parts, which are read at a few million a second
MOST_SHEET_ROWS = 2**20  # as in Excel
_STATED_DELIMITER = re.compile(r"sep=(.)\r?\n")
_BLANK_ROWS = re.compile(r'(?:(?:[ \t,;]|"[ \t]*")*(?:\r\n|\n|\r))+')
_BATCH = 256  # rows of parquet at a time, at most
_VALUE = 32  # bytes that a value takes at least, beside its text
_PLAIN_NUMBERS = ("General", "@")  # formats that show a number as it is; "0" does where it is whole
_LOOK = """
import io, sys, pyarrow.parquet
metadata = pyarrow.parquet.read_metadata(io.BytesIO(sys.stdin.buffer.read()))
for group in map(metadata.row_group, range(metadata.num_row_groups)):
    for column in range(group.num_columns):
        group.column(column)
"""
_NO_TEXT = {  # how files begin that are often given the wrong name
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"PK\x03\x04": "a zip archive or an Excel workbook: unpack it, or give it the suffix .xlsx",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook, or one with a password: save it as .xlsx, or the sheet as CSV in UTF-8",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it",
    b"\xfd7zXZ": "compressed with xz: unpack it",
    b"PAR1": "a parquet file: give it the suffix .parquet",
    b"\xff\xfe": "in UTF-16: save it as UTF-8",
    b"\xfe\xff": "in UTF-16: save it as UTF-8",
}


def read_file(name: str, path: Path, format: str = "auto", sheet: str | None = None) -> Table:
    """Read a file; SQuAD data has a row for each article.

    Args:
        name: what the file is called in messages.
        path: where it is.
        format: `squad` and `xlsum` tell what the suffix does not.
        sheet: of a workbook; None for the first that is not hidden.

    Raises:
        DataError: the file is missing, no regular one, too large, empty or malformed, or has no such sheet.
    """
    if CONTROLS.search(name):
        raise DataError(f"the data file {quoted(name)} has a control character in its name; rename it")
    data = _read(name, path)
    suffix = path.suffix.lower()
    for start, what in _NO_TEXT.items():
        if data.startswith(start) and suffix != ".parquet" and (suffix, start[:2]) != (".xlsx", b"PK"):
            raise DataError(f"{name} is {what}")
    suffix = {"squad": ".json", "xlsum": ".jsonl"}.get(format, suffix)
    if suffix not in READERS:
        raise DataError(
            f"{name}: cannot tell the format from the suffix {quoted(path.suffix)}; "
            f"allowed: {', '.join(READERS)} (or set format to squad or xlsum)"
        )
    reader = READERS[suffix]
    if sheet is not None:
        if suffix != ".xlsx":
            raise DataError(
                f"{name} has no sheets, but sheet is {quoted(sheet)}; leave it out, or give an .xlsx workbook"
            )
        reader = partial(_xlsx, sheet=sheet)
    rows = list(islice(reader(data, name), MOST_ROWS + 1))
    if len(rows) > MOST_ROWS:
        raise DataError(f"{name} holds more than {MOST_ROWS} records, the most that is read from a file; split it")
    # Source and target may be sheets of one workbook, and their rows are told by the name of the table.
    of_cells = suffix in (".csv", ".tsv", ".xlsx")
    return Table(name if sheet is None else f"{name}, sheet {sheet}", rows, of_cells)


def _read(name: str, path: Path) -> bytes:
    if not is_there(path):
        raise DataError(f"data file {quoted(name)} is missing: {escaped(str(path))} is not a file")
    try:
        data = read_bounded(path, MOST_BYTES)
    except RefusedError as error:
        raise DataError(f"data file {name}: {error}") from error
    if not data.removeprefix(b"\xef\xbb\xbf").strip():
        raise DataError(f"{name} is empty")
    return data


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{name}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _json(data: bytes, name: str) -> Iterator[Row]:
    """Read a list of objects, alone or under a key `data`, or one object."""
    try:
        content = parse_json(_decode(data, name))
    except RefusedError as error:
        if "Extra data" in str(error):
            yield from _json_lines(data, name)  # they are often saved as .json
            return
        raise DataError(f"{name}{'' if error.line is None else f', line {error.line}'}: {error}") from None
    rows = content.get("data") if isinstance(content, dict) else content
    for number, item in enumerate(rows if isinstance(rows, list) else [content], start=1):
        yield as_row(item, f"{name}, record {number}")


def _json_lines(data: bytes, name: str) -> Iterator[Row]:
    # Not splitlines(): it also splits at characters, such as U+2028, that may stand inside a JSON string.
    for number, line in enumerate(_decode(data, name).split("\n"), start=1):
        if line.strip():
            where = f"{name}, line {number}"
            if len(line) > MOST_LINE:
                raise DataError(f"{where} has {len(line)} characters; at most {MOST_LINE} are allowed")
            try:
                item = parse_json(line)
            except RefusedError as error:
                raise DataError(f"{where}: {error}") from None
            yield as_row(item, where)


def _csv(data: bytes, name: str, delimiter: str | None = None) -> Iterator[Row]:
    """Read CSV, also as Excel writes it where the comma is the decimal mark, or with spaces behind the commas.

    Rows of blank cells alone are none; around and in the names of columns, white space and invisible marks do not count.
    """
    text, before = _decode(data, name), 0
    if stated := _STATED_DELIMITER.match(text):  # a first line for Excel, which other readers take for the header
        text, before = text[stated.end() :], 1
    if blank := _BLANK_ROWS.match(text):
        text, before = text[blank.end() :], before + len(blank.group().splitlines())
    header = text.split("\n", 1)[0]
    if stated:
        delimiter = stated.group(1)
    elif delimiter is None:
        delimiter = next((mark for mark in (",", ";", "\t") if mark in header), ",")
    lines = io.StringIO(text, newline="")
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=f"{delimiter} " in header, strict=True)
    try:
        with _long_cells():
            columns = [INVISIBLE.sub("", column).strip() for column in reader.fieldnames or ()]
            reader.fieldnames = columns
            _check_header([column for column in columns if column], f"{name}, line {before + 1}")
            for row in reader:
                where = f"{name}, line {reader.line_num + before}"
                if not any(cell.strip() for cell in row.values() if isinstance(cell, str)) and None not in row:
                    continue
                if None in row or None in row.values():
                    raise DataError(f"{where}: the number of cells differs from the {len(columns)} columns")
                if delimiter == "\t" and any(_holds_rows(cell, len(columns)) for cell in row.values()):
                    raise DataError(
                        f"{where}: a cell that ends here holds tabs and line breaks, so a quotation mark that opens a cell has "
                        "taken in the rows after it; double each mark, and put the cell between two more"
                    )
                yield Row(where, row)
    except csv.Error as error:
        line = reader.reader.line_num + before
        raise DataError(f"{name}, line {line}: not valid CSV ({error})") from None


def _holds_rows(cell: str, columns: int) -> bool:
    """Whether a cell seems to have taken in rows: its first and last line together have the tabs of one, and so has each between.

    Tabs that only indent lines, such as those of code, are none of rows.
    """
    lines = cell.split("\n")
    tabs = [line.count("\t") for line in lines]
    whole = len(lines) > 1 and {tabs[0] + tabs[-1], *tabs[1:-1]} == {columns - 1}
    return whole and any("\t" in line.lstrip() for line in lines)


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let a cell be as long as a line of JSON may be: the csv module's own limit is 131,072, and one for the whole process."""
    before = csv.field_size_limit(MOST_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_header(columns: list[str], where: str) -> None:
    if len(columns) > MOST_COLUMNS:
        raise DataError(f"{where}: there are {len(columns)} columns; at most {MOST_COLUMNS} are allowed")
    twice = next((column for column in dict.fromkeys(columns) if columns.count(column) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: the column {quoted(twice)} stands twice; rename one")


def _parquet(data: bytes, name: str) -> Iterator[Row]:
    """Read parquet, of which a thousand bytes can stand for gigabytes: what repeats is written only once."""
    import pyarrow
    import pyarrow.parquet

    too_much = DataError(f"{name} unpacks to more than {MOST_BYTES} bytes, the most that is read; split it")
    size = 0
    numbers = count(1)
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        _check_header(file.schema_arrow.names, name)
        _check_columns(data, name)
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        values = sum(group.column(column).num_values for group in groups for column in range(group.num_columns))
        written = [group.total_byte_size for group in groups]
        if max(values * _VALUE, sum(written)) > MOST_BYTES or _texts_in_lists(data, file) > MOST_BYTES:
            raise too_much
        # Of each column, a row takes at most all that is written of it.
        rows = MOST_BYTES // 4 // max(1, *written) if written else 1
        for batch in file.iter_batches(batch_size=max(1, min(_BATCH, rows))):
            for row in batch.to_pylist():
                size += _size(row)
                if size > MOST_BYTES:
                    raise too_much
                yield Row(f"{name}, row {next(numbers)}", row)
    except DataError:
        raise
    # Beside its own errors, pyarrow lets pass those of the values: texts that are no UTF-8, dates that do not exist.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: not a valid parquet file ({one_line(str(error))[:300]})") from None


def _check_columns(data: bytes, name: str) -> None:
    """Ask for each column in a process of its own: where a column is described wrongly, pyarrow ends the one that asks."""
    footer = b"PAR1" + data[-8 - int.from_bytes(data[-8:-4], "little") :]
    try:
        looked = subprocess.run([sys.executable, "-P", "-c", _LOOK], input=footer, capture_output=True, check=False)
    except OSError:  # no process can be started here
        return
    if looked.returncode not in (0, 1):  # 1: it could not look, such as where pyarrow lies elsewhere
        said = re.search(r"what\(\): *(.+)", looked.stderr.decode(errors="replace"))
        why = one_line(said[1])[:300] if said else "its columns cannot be read"
        raise DataError(f"{name}: not a valid parquet file ({why})")


def _texts_in_lists(data: bytes, file: "ParquetFile") -> int:
    """Return the bytes of texts in lists, where they could be too many: there, a single row can repeat a text without end."""
    import pyarrow.compute as compute
    from pyarrow.parquet import ParquetFile

    size = 0
    for number, group in product(range(len(file.schema)), range(file.num_row_groups)):
        column, written = file.schema.column(number), file.metadata.row_group(group).column(number)
        doubtful = written.num_values * written.total_uncompressed_size > MOST_BYTES
        if not doubtful or not column.max_repetition_level:
            continue
        if column.physical_type == "FIXED_LEN_BYTE_ARRAY":
            size += written.num_values * column.length
        if column.physical_type == "BYTE_ARRAY":
            encoded = ParquetFile(io.BytesIO(data), read_dictionary=[column.path])
            for part in encoded.read_row_group(group, columns=[column.path]).column(0).chunks:
                while not hasattr(part, "dictionary"):
                    part = part.field(0) if hasattr(part, "field") else part.values  # structs and lists
                size += compute.sum(compute.binary_length(part.dictionary).take(part.indices)).as_py() or 0
    return size


def _size(value: object) -> int:
    """Return the bytes of a value, at least."""
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    return _VALUE + (len(value) if isinstance(value, str | bytes) else 0)


def _xlsx(data: bytes, name: str, sheet: str | None = None) -> Iterator[Row]:
    """Read a sheet of a workbook, whose first row that is not blank names the columns; those without a name are left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles and rules that openpyxl leaves out
            return iter(_sheet(data, name, sheet))
    except DataError:
        raise
    # On damaged parts openpyxl lets pass whatever its own code and three parsers raise.
    except Exception as error:  # noqa: BLE001
        reason = one_line(str(error))[:300] or type(error).__name__
        raise DataError(f"{name}: not a valid .xlsx workbook ({reason})") from None


def _sheet(data: bytes, name: str, sheet: str | None) -> list[Row]:
    import openpyxl

    too_much = "the most that is read of a workbook; save the sheet as CSV"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = sum(part.file_size for part in archive.infolist())
    if size > MOST_WORKBOOK:
        raise DataError(f"{name} unpacks to {size} bytes, more than {MOST_WORKBOOK}, {too_much}")
    # Values and formulas come from two readings: the first alone does not tell an empty cell from a formula without a value.
    books = [
        openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=values, keep_links=False)
        for values in (True, False)
    ]
    titles = [one.title for one in books[0].worksheets]
    shown = [one.title for one in books[0].worksheets if one.sheet_state == "visible"]
    if sheet not in (None, *titles) or not titles:
        raise DataError(f"{name} has no sheet {quoted(sheet or '')}; it has {listed(titles)}")
    title = sheet or (shown or titles)[0]
    sheets = [book[title] for book in books]
    for one in sheets:
        one.reset_dimensions()  # which some programs write wrong
    size, rows = 0, []
    columns: list[str] = []
    for number, (values, formulas) in enumerate(zip(*(one.iter_rows() for one in sheets), strict=True), start=1):
        where = f"{name}, sheet {quoted(title)}, row {number}"
        cells = list(map(_cell, values, formulas))
        size += _size(cells)
        if number > MOST_SHEET_ROWS or size > MOST_BYTES:
            raise DataError(f"{where}: more than {MOST_SHEET_ROWS} rows or {MOST_BYTES} bytes, {too_much}")
        if not any(isinstance(cell, NoText) or cell.strip() for cell in cells):
            continue
        if not columns:
            columns = [INVISIBLE.sub("", cell).strip() if isinstance(cell, str) else "" for cell in cells]
            _check_header([column for column in columns if column], where)
        else:
            cells += [""] * (len(columns) - len(cells))
            rows.append(Row(where, {column: cell for column, cell in zip(columns, cells, strict=False) if column}))
    if not rows and len(titles) > 1:
        others = listed(one for one in titles if one != title)
        raise DataError(f"{name}, sheet {quoted(title)}, holds no records; name another sheet: {others}")
    return rows


@dataclass(frozen=True)
class NotShown(NoText):
    """A cell whose value is in the file, but not the text that is shown; and how the value is written where it is passed on."""

    written: str


def _cell(cell: Any, formula: Any) -> str | NoText:
    """Return the text of a cell as a spreadsheet program shows it, where that is in the file: it is not for dates, say."""
    from openpyxl.utils.escape import unescape

    value, format = cell.value, cell.number_format
    if value is None:
        lacking = formula.data_type == "f" and cell.data_type == "n"  # a text, also an empty one, has another type
        return NoText("a formula without a value: open the workbook in a program, and save it") if lacking else ""
    if cell.data_type == "e":
        return NotShown(f"the error {quoted(value)}", value)
    if isinstance(value, str):
        return str(unescape(value))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    written = f"{value:.15g}" if isinstance(value, float) else str(value)
    if number and (format in _PLAIN_NUMBERS or (format == "0" and float(value).is_integer())):
        return written
    kind = "a number or truth value" if isinstance(value, int | float) else "a date or time"
    return NotShown(
        f"{kind} in the format {quoted(format)}, not a text: save the sheet as CSV, which holds what is shown",
        written.lower() if isinstance(value, bool) else written.removesuffix(" 00:00:00"),  # of a date alone
    )


# Of each suffix, the function from a file's bytes and name to its rows.
READERS: dict[str, Callable[[bytes, str], Iterator[Row]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
    ".xlsx": _xlsx,
}
