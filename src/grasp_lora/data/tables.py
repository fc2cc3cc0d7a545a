"""Rows of a file or data set, as readers give them and layouts take them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

from grasp_lora.errors import DataError


@dataclass(frozen=True)
class NoText:
    """A cell of a workbook whose text is not in the file, and what it is, such as "a date"."""

    what: str


class Row(NamedTuple):
    """Where a row stands, such as "a.jsonl, line 3", and its values by column."""

    where: str
    values: Mapping[str, object]


@dataclass(frozen=True)
class Table:
    """Rows of one file or data set, and its name for messages and made-up ids.

    Args:
        of_cells: whether a value is what a cell holds, a text or a number, so that it is no list.
    """

    name: str
    rows: list[Row]
    of_cells: bool = False

    @property
    def columns(self) -> list[str]:
        """The columns of all rows, in the order in which they appear: a record may leave out what it has not."""
        return list(map(str, dict.fromkeys(chain.from_iterable(row.values for row in self.rows))))


def in_small_letters(table: Table, fields: Sequence[str], named_columns: Mapping[str, str]) -> Table:
    """Rename columns that are called as one of these fields but for case; those that have its very name stay the only ones.

    An `ID` that stands twice is no id: it may number articles.

    Args:
        table: its rows may have different columns.
        fields: that rows may have or not.
        named_columns: field -> column, of what the user named.
    """
    renamed, columns = {}, [column for column in table.columns if column not in named_columns.values()]
    for field in fields:
        if field in named_columns:
            continue
        named = [column for column in columns if column.strip().lower() == field]
        if len(named) == 1 and named != [field] and (field != "id" or _are_unlike(table, named[0])):
            renamed[named[0]] = field
    if not renamed:
        return table
    rows = [Row(where, {renamed.get(key, key): value for key, value in values.items()}) for where, values in table.rows]
    return replace(table, rows=rows)


def _are_unlike(table: Table, column: str) -> bool:
    values = [row.values.get(column) for row in table.rows]
    return all(isinstance(value, str | int) for value in values) and len(set(values)) == len(values)


def as_row(item: object, where: str) -> Row:
    """Return a row that is in memory, with where it stands.

    Raises:
        DataError: it is no mapping.
    """
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: expected an object with named fields, found {type(item).__name__}")
    return Row(where, item)
