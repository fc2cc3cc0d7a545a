"""Rows of a file or data set, as readers give them and layouts take them."""

from collections.abc import Mapping
from dataclasses import dataclass
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


def as_row(item: object, where: str) -> Row:
    """Return a row that is in memory, with where it stands.

    Raises:
        DataError: it is no mapping.
    """
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: expected an object with named fields, found {type(item).__name__}")
    return Row(where, item)
