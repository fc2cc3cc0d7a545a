"""Sheets of workbooks become rows; what has no text in the file, and what would grow without end, is refused."""

import datetime
import io
import itertools
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from grasp_lora.data.files import read_file
from grasp_lora.data.records import make_pool
from grasp_lora.data.tables import Row
from grasp_lora.errors import DataError


def workbook(path: Path, *sheets: Sequence[Sequence[Any]], titles: Sequence[str] = ("Maswali", "Majibu")) -> Path:
    """Write a workbook with a sheet for each list of rows."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in zip(titles, sheets, strict=False):
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def rows_of(path: Path, sheet: str | None = None) -> list[Row]:
    return read_file(path.name, path, sheet=sheet).rows


def change(path: Path, part: str, old: str, new: str) -> Path:
    """Change the XML of one part."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    text = parts[part].decode()
    assert old in text
    parts[part] = text.replace(old, new).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


SHEET = "xl/worksheets/sheet1.xml"


def test_texts_and_plain_numbers_are_what_is_shown(tmp_path: Path) -> None:
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


def test_the_first_sheet_that_is_shown_or_the_one_that_is_named(tmp_path: Path) -> None:
    path = workbook(tmp_path / "x.xlsx", [["a"], ["1"]], [["b"], ["2"]])
    assert rows_of(path)[0].values == {"a": "1"}
    assert rows_of(path, "Majibu")[0].values == {"b": "2"}
    book = openpyxl.load_workbook(path)
    book["Maswali"].sheet_state = "hidden"
    book.save(path)
    assert rows_of(path)[0].values == {"b": "2"}
    with pytest.raises(DataError, match=r"x\.xlsx has no sheet 'Nyingine'; it has Maswali, Majibu"):
        rows_of(path, "Nyingine")
    notes = workbook(tmp_path / "notes.xlsx", [["Only notes here"]], [["b"], ["2"]])
    with pytest.raises(DataError, match=r"notes\.xlsx, sheet 'Maswali', holds no records; name another sheet: Majibu$"):
        rows_of(notes)
    (tmp_path / "x.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match=r"x\.csv has no sheets, but sheet is 'Majibu'; leave it out"):
        rows_of(tmp_path / "x.csv", "Majibu")


@pytest.mark.parametrize(
    ("value", "format", "said"),
    [
        (
            datetime.date(2026, 1, 2),
            "dd/mm/yyyy",
            r"a date or time in the format 'dd/mm/yyyy', .*save the sheet as CSV",
        ),
        (0.25, "0%", r"a number or truth value in the format '0%'"),
        (1.7, "0", r"a number or truth value in the format '0'"),  # which shows 2
        (True, "General", r"a number or truth value"),
        ("=1+1", "General", r"a formula without a value: open the workbook"),
        ("#N/A", "General", r"the error '#N/A'"),
    ],
)
def test_what_is_no_text_is_refused_only_where_a_text_is_needed(
    tmp_path: Path, value: object, format: str, said: str
) -> None:
    path = workbook(tmp_path / "x.xlsx", [["prompt", "completion", "extra"], ["a", "b", value]])
    book = openpyxl.load_workbook(path)
    book.active["C2"].number_format = format
    book.save(path)
    table = read_file("x.xlsx", path)
    assert make_pool([table], "completion").records[0].answer == "b"
    with pytest.raises(DataError, match=rf"x\.xlsx, sheet 'Maswali', row 2: completion is {said}"):
        make_pool([table], "completion", columns={"completion": "extra"})
    with pytest.raises(DataError, match=rf"row 2: id is {said}"):
        make_pool([table], "completion", columns={"id": "extra"})


def test_a_formula_has_the_value_that_was_saved_with_it(tmp_path: Path) -> None:
    path = workbook(tmp_path / "x.xlsx", [["prompt", "completion"], ["a", "=1+1"], ["b", "c"]])
    change(path, SHEET, "<f>1+1</f>", "<f>1+1</f><v>2</v>")
    assert rows_of(path)[0].values["completion"] == "2"


def test_empty_and_merged_cells_are_empty(tmp_path: Path) -> None:
    path = workbook(tmp_path / "x.xlsx", [["prompt", "completion"], ["a", "b"], ["c", "d"]])
    book = openpyxl.load_workbook(path)
    book.active.merge_cells("A2:A3")
    book.save(path)
    with pytest.raises(DataError, match="row 3: prompt is empty"):
        make_pool([read_file("x.xlsx", path)], "completion")


def test_a_column_that_stands_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sheet 'Maswali', row 1: the column 'a' stands twice; rename one"):
        rows_of(workbook(tmp_path / "x.xlsx", [["a", "a "], ["1", "2"]]))


def test_sizes_that_a_program_wrote_wrong_do_not_count(tmp_path: Path) -> None:
    path = workbook(tmp_path / "x.xlsx", [["a", "b"], ["1", "2"]])
    change(path, SHEET, 'ref="A1:B2"', 'ref="A1"')
    assert rows_of(path)[0].values == {"a": "1", "b": "2"}


class TestBombs:
    def test_a_part_that_unpacks_without_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = workbook(tmp_path / "x.xlsx", [["a"], ["1"]])
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("xl/media/big.xml", b" " * 10_000_000)
        monkeypatch.setattr("grasp_lora.data.files.MOST_WORKBOOK", 5_000_000)
        assert path.stat().st_size < 50_000
        with pytest.raises(DataError, match=r"x\.xlsx unpacks to 100\d+ bytes, more than 5000000, .*as CSV"):
            rows_of(path)

    @pytest.mark.parametrize("place", ["A99999999", "A2000000"])
    def test_a_row_far_below(self, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("grasp_lora.data.files.MOST_SHEET_ROWS", 1000)
        path = workbook(tmp_path / "x.xlsx", [["a"], ["1"]])
        change(path, SHEET, 'r="A2"', f'r="{place}"')
        change(path, SHEET, 'row r="2"', f'row r="{place[1:]}"')
        with pytest.raises(DataError, match=r"row 1001: more than 1000 rows or"):
            rows_of(path)

    def test_a_text_that_is_written_once_counts_in_each_cell(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("grasp_lora.data.files.MOST_BYTES", 1_000_000)
        path = workbook(tmp_path / "x.xlsx", [["a"], *[["x" * 30_000]] * 100])
        assert path.stat().st_size < 20_000
        with pytest.raises(DataError, match=r"row 3\d: more than .* or 1000000 bytes"):
            rows_of(path)

    def test_entities_that_stand_for_entities(self, tmp_path: Path) -> None:
        names = [f"e{number}" for number in range(12)]
        entities = '<!ENTITY e0 "lol">' + "".join(
            f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in itertools.pairwise(names)
        )
        for part, text in ((SHEET, ">1<"), ("xl/workbook.xml", 'name="Maswali"')):
            path = workbook(tmp_path / "x.xlsx", [["a"], [1]])
            start = re.match(r"<\w+", zipfile.ZipFile(path).read(part).decode())
            assert start
            change(path, part, text, text.replace("1", "&e11;").replace("Maswali", "&e11;"))
            change(path, part, start.group(), f"<!DOCTYPE x [{entities}]>{start.group()}")
            with pytest.raises(DataError, match=r"x\.xlsx: not a valid \.xlsx workbook"):
                rows_of(path)


@pytest.mark.parametrize("part", ["xl/workbook.xml", SHEET, "xl/styles.xml", "[Content_Types].xml"])
@pytest.mark.parametrize("data", [b"", b"<a", b"<x/>", b"\x00\xff"])
def test_damaged_parts_are_one_line(tmp_path: Path, part: str, data: bytes) -> None:
    path = workbook(tmp_path / "x.xlsx", [["a"], ["1"]])
    out = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w") as other:
        for name in archive.namelist():
            other.writestr(name, data if name == part else archive.read(name))
    path.write_bytes(out.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            rows_of(path)
            said = "x.xlsx"  # some programs leave parts out
        except DataError as error:
            said = str(error)
    assert said.startswith("x.xlsx")
    assert "\n" not in said
