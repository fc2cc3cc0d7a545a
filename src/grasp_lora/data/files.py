"""Data files of strangers to rows: JSON, JSON lines, CSV, TSV and parquet of bounded size; every fault is named with its line."""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grasp_lora.errors import DataError
from grasp_lora.storage.reading import RefusedError, is_there, parse_json, read_bounded
from grasp_lora.text.characters import INVISIBLE
from grasp_lora.text.display import CONTROLS, escaped, one_line, quoted

MOST_BYTES = 2**31
MOST_ROWS = 5_000_000
MOST_LINE = 10_000_000  # characters
MOST_COLUMNS = 10_000
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_STATED_DELIMITER = re.compile(r"sep=(.)\r?\n")
_BATCH = 256  # rows of parquet at a time: a small file can stand for gigabytes of repeated text
_NO_TEXT = {  # how files begin that are often given the wrong name
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"PK\x03\x04": "a zip archive or an Excel workbook: unpack it, or save the sheet as CSV in UTF-8",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save the sheet as CSV in UTF-8",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it",
    b"\xfd7zXZ": "compressed with xz: unpack it",
    b"PAR1": "a parquet file: give it the suffix .parquet",
    b"\xff\xfe": "in UTF-16: save it as UTF-8",
    b"\xfe\xff": "in UTF-16: save it as UTF-8",
}

Row = tuple[str, dict[str, Any]]  # where it stands ("a.jsonl, line 3") and what it says


def read_content(name: str, path: Path, format: str) -> list[Row] | dict[str, Any]:
    """Parse a file into rows, or into the object that a SQuAD file is.

    Args:
        name: for messages and made-up ids.
        path: where.
        format: `squad` and `xlsum` tell what the suffix does not.

    Raises:
        DataError: the file is missing, no regular one, too large, empty or malformed.
    """
    if CONTROLS.search(name):
        raise DataError(f"the data file {quoted(name)} has a control character in its name; rename it")
    data = _read(name, path)
    suffix = path.suffix.lower()
    for start, what in _NO_TEXT.items():
        if data.startswith(start) and suffix != ".parquet":
            raise DataError(f"{name} is {what}")
    if format == "squad":
        suffix = ".json"
    elif format == "xlsum":
        suffix = ".jsonl"
    if suffix == ".parquet":
        return _parquet_rows(data, name)
    if suffix not in SUFFIXES:
        raise DataError(
            f"{name}: cannot tell the format from the suffix {quoted(path.suffix)}; "
            f"allowed: {', '.join(SUFFIXES)} (or set format to squad or xlsum)"
        )
    text = _decode(data, name)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(text, name, suffix)
    if suffix != ".json":
        return _json_lines(text, name)
    try:
        content = parse_json(text)
    except RefusedError as error:
        if "Extra data" in str(error) and format != "squad":
            return _json_lines(text, name)  # JSON lines are often saved as .json
        raise DataError(f"{name}{'' if error.line is None else f', line {error.line}'}: {error}") from None
    listed = content.get("data") if isinstance(content, dict) else None
    if isinstance(listed, list) and (format == "squad" or _is_squad(listed)):
        return content
    if format == "squad":
        raise DataError(f"{name} is not SQuAD data: it must be a JSON object with a list `data`")
    rows = listed if isinstance(listed, list) else content if isinstance(content, list) else [content]
    _check_count(len(rows), name)
    return [as_row(item, f"{name}, record {number}") for number, item in enumerate(rows, start=1)]


def _is_squad(articles: list[Any]) -> bool:
    """Whether the list under `data` is of articles, or of rows as other exports have them."""
    return not articles or not isinstance(articles[0], dict) or "paragraphs" in articles[0]


def as_row(item: Any, where: str) -> Row:
    """Return a row that is in memory, with where it stands.

    Raises:
        DataError: it is no mapping.
    """
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: expected an object with named fields, found {type(item).__name__}")
    return where, dict(item)


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


def _check_count(rows: int, name: str) -> None:
    if rows > MOST_ROWS:
        raise DataError(f"{name} holds more than {MOST_ROWS} records, the most that is read from a file; split it")


def _json_lines(text: str, name: str) -> list[Row]:
    rows: list[Row] = []
    # Not splitlines(): it also splits at characters, such as U+2028, that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{name}, line {number}"
            if len(line) > MOST_LINE:
                raise DataError(f"{where} has {len(line)} characters; at most {MOST_LINE} are allowed")
            try:
                item = parse_json(line)
            except RefusedError as error:
                raise DataError(f"{where}: {error}") from None
            rows.append(as_row(item, where))
            _check_count(len(rows), name)
    return rows


def _csv_rows(text: str, name: str, suffix: str) -> list[Row]:
    """Read CSV, also as Excel writes it where the comma is the decimal mark, or with spaces behind the commas.

    Rows of blank cells alone are none; around and in the names of columns, white space and invisible marks do not count.
    """
    stated = _STATED_DELIMITER.match(text)  # a first line for Excel, which other readers take for the header
    text = text[stated.end() :] if stated else text
    header = text.split("\n", 1)[0]
    found = next((mark for mark in (",", ";", "\t") if mark in header), ",")
    delimiter = stated.group(1) if stated else "\t" if suffix == ".tsv" else found
    spaced = f"{delimiter} " in header
    lines = io.StringIO(text, newline="")
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=spaced, strict=True)
    rows: list[Row] = []
    try:
        with _long_cells():
            reader.fieldnames = [INVISIBLE.sub("", column).strip() for column in reader.fieldnames or ()]
            _check_header([column for column in reader.fieldnames or () if column], name)
            for row in reader:
                where = f"{name}, line {reader.line_num + bool(stated)}"
                if not any(cell.strip() for cell in row.values() if isinstance(cell, str)) and None not in row:
                    continue
                if None in row or None in row.values():
                    raise DataError(
                        f"{where}: the number of cells differs from the {len(reader.fieldnames or ())} columns"
                    )
                rows.append((where, dict(row)))
                _check_count(len(rows), name)
    except csv.Error as error:
        line = reader.reader.line_num + bool(stated)
        raise DataError(f"{name}, line {line}: not valid CSV ({error})") from None
    return rows


def _check_header(columns: list[str], name: str) -> None:
    if len(columns) > MOST_COLUMNS:
        raise DataError(f"{name}, line 1 has {len(columns)} columns; at most {MOST_COLUMNS} are allowed")
    twice = next((column for column in dict.fromkeys(columns) if columns.count(column) > 1), None)
    if twice is not None:
        raise DataError(f"{name}, line 1: the column {quoted(twice)} stands twice; rename one")


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let a cell be as long as a line of JSON may be: the csv module's own limit is 131,072, and one for the whole process."""
    before = csv.field_size_limit(MOST_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet_rows(data: bytes, name: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    rows: list[Row] = []
    size = 0
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        columns = file.schema_arrow.names
        _check_header(columns, name)
        _check_count(file.metadata.num_rows, name)
        for batch in file.iter_batches(batch_size=_BATCH):
            size += batch.nbytes
            if size > MOST_BYTES:
                raise DataError(f"{name} unpacks to more than {MOST_BYTES} bytes, the most that is read; split it")
            start = len(rows) + 1
            rows += [(f"{name}, row {number}", row) for number, row in enumerate(batch.to_pylist(), start=start)]
            _check_count(len(rows), name)
    except DataError:
        raise
    # Beside its own errors, pyarrow lets pass those of the values: texts that are no UTF-8, dates that do not exist.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: not a valid parquet file ({one_line(str(error))[:300]})") from None
    return rows
