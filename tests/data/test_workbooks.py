"""Sheets of workbooks become rows: values as texts, rows as Excel numbers them, a sheet by its name."""

import datetime
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pytest
from pyarrow import parquet

from grasp_lora.data.files import Row, read_file
from grasp_lora.errors import DataError


def workbook(path: Path, *sheets: Sequence[Sequence[Any]]) -> Path:
    """Write a workbook with a sheet for each list of rows."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in zip(("Maswali", "Majibu"), sheets, strict=False):
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def rows_of(path: Path, sheet: str | None = None) -> list[Row]:
    return read_file(path.name, path, sheet=sheet).rows


def test_texts_and_plain_numbers_are_what_is_shown(tmp_path):
    content = [
        [],
        ["prompt", None, "completion"],
        ["Lini?", "a note", 1990],
        [],
        ["ndiyo_x000D_\nhapana", None, 2.5],
        ["a"],
    ]
    rows = rows_of(workbook(tmp_path / "x.xlsx", content))
    assert [(row.values["prompt"], row.values["completion"]) for row in rows] == [
        ("Lini?", "1990"),
        ("ndiyo\r\nhapana", "2.5"),
        ("a", ""),
    ]
    assert [row.where for row in rows] == [f"x.xlsx, sheet 'Maswali', row {number}" for number in (3, 5, 6)]
    assert set(rows[0].values) == {"prompt", "completion"}


def test_the_first_sheet_that_is_shown_or_the_one_that_is_named(tmp_path):
    path = workbook(tmp_path / "x.xlsx", [["a"], ["1"]], [["b"], ["2"]])
    assert rows_of(path)[0].values == {"a": "1"}
    assert rows_of(path, "Majibu")[0].values == {"b": "2"}
    book = openpyxl.load_workbook(path)
    book["Maswali"].sheet_state = "hidden"
    book.save(path)
    assert rows_of(path)[0].values == {"b": "2"}
    with pytest.raises(DataError, match=r"x\.xlsx has no sheet 'Nyingine'; it has Maswali, Majibu"):
        rows_of(path, "Nyingine")


def test_numbers_dates_and_truth_values_are_texts(tmp_path):
    values = {
        "a whole number": (1990, "1990"),
        "an amount": (0.1 + 0.2, "0.3"),
        "a share": (0.25, "0.25"),  # whatever its format shows
        "a large number": (123456789012, "123456789012"),
        "a date": (datetime.date(2026, 1, 2), "2026-01-02"),
        "a moment": (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02 03:04:00"),
        "a time": (datetime.time(3, 4), "03:04:00"),
        "a truth value": (True, "TRUE"),
        "an error": ("#N/A", ""),
        "a formula that was never computed": ("=1+1", ""),
    }
    path = workbook(tmp_path / "x.xlsx", [list(values), [value for value, _ in values.values()]])
    book = openpyxl.load_workbook(path)
    book.active["C2"].number_format = "0%"
    book.save(path)
    assert rows_of(path)[0].values == {name: text for name, (_, text) in values.items()}


def test_a_formula_has_the_value_that_was_saved_with_it(tmp_path):
    path = workbook(tmp_path / "x.xlsx", [["prompt", "completion"], ["a", "=1+1"]])
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    parts[sheet] = re.sub(rb"</f><v ?/>|</f><v></v>", b"</f><v>2</v>", parts[sheet])
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    assert rows_of(path)[0].values["completion"] == "2"


def test_a_workbook_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("grasp_lora.data.files.MOST_UNPACKED", 1000)
    with pytest.raises(DataError, match=r"x\.xlsx unpacks to \d+ bytes, more than 1000; save the sheet as CSV"):
        rows_of(workbook(tmp_path / "x.xlsx", [["a"], ["1"]]))


@pytest.mark.parametrize(
    ("far", "row", "column"), [("XFD1048576", 1048576, "XFD"), ("J1048576", 1048576, "J"), ("XFD700", 700, "XFD")]
)
def test_a_cell_far_off_is_refused_before_memory_runs_out(tmp_path, far, row, column):
    book = openpyxl.Workbook()
    for place, value in (("A1", "prompt"), ("B1", "completion"), ("A2", "a"), ("B2", "b")):
        book.active[place] = value
    book.active["F1048576"].font = openpyxl.styles.Font(bold=True)  # holds nothing
    book.save(path := tmp_path / "x.xlsx")
    assert len(rows_of(path)) == 1
    book.active[far] = "x"
    book.save(path)
    with pytest.raises(DataError, match=rf"x\.xlsx has a cell in row {row} and one in column {column}: too large"):
        rows_of(path)


def test_parquet_that_unpacks_to_too_much_is_refused_and_rows_are_numbered_through(tmp_path, monkeypatch):
    """Its dictionary makes many equal texts a small file."""
    table = pyarrow.table({"prompt": ["long " * 1000] * 3000, "completion": list(map(str, range(3000)))})
    parquet.write_table(table, path := tmp_path / "x.parquet")
    rows = rows_of(path)
    assert [row.values["completion"] for row in rows] == list(map(str, range(3000)))
    assert rows[-1].where == "x.parquet, row 3000"
    monkeypatch.setattr("grasp_lora.data.files.MOST_UNPACKED", 10_000_000)
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"x\.parquet unpacks to more than 10000000 bytes"):
        rows_of(path)
