"""What stands in a cell: texts are cleaned by one rule and checked.

Control characters other than newline and tab are removed from texts, or replaced by what they stand for, and counted. Ids are
never changed: one with a control character is refused.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from grasp_lora.data.tables import NoText
from grasp_lora.errors import DataError
from grasp_lora.text.display import CONTROLS, SURROGATES, listed, quoted

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What Windows-1252 has in their place, as in XL-Sum's Chinese articles (U+0085 is its "…": as a line break of Unicode it is
# rare), the line ends of old Macs, and page breaks.
MAPPED = {
    **{chr(code): bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)},
    **{"\r": "\n", "\x0b": " ", "\x0c": " "},
}
MOST_TEXT = 1_000_000  # characters
MOST_ID = 500

Columns = Mapping[str, str]  # field -> column


def _clean(value: object, identity: str, counts: Counter[str]) -> object:
    """Clean every text but ids."""
    if isinstance(value, Mapping):
        return clean_row(value, identity, counts)
    if isinstance(value, list | tuple):
        return [_clean(part, identity, counts) for part in value]
    return clean_text(value, counts) if isinstance(value, str) else value


def clean_text(text: str, counts: Counter[str]) -> str:
    """Map or remove control characters other than newline and tab, and count them."""

    def replacement(match: re.Match[str]) -> str:
        mapped = MAPPED.get(match.group(), "")
        counts["mapped" if mapped else "removed"] += 1
        return mapped

    return CONTROL.sub(replacement, text.replace("\r\n", "\n"))


def clean_row(values: Mapping[str, object], identity: str, counts: Counter[str]) -> dict[str, object]:
    """Return a row with clean texts, but for the column of its id; what was mapped and removed is added to the counts."""
    return {key: part if key == identity else _clean(part, identity, counts) for key, part in values.items()}


@dataclass(frozen=True)
class Cells:
    """A row that is asked by field, whatever its columns are called."""

    where: str
    values: Mapping[str, object]
    columns: Columns

    def get(self, field: str) -> object:
        """The value of an optional field; None where it says nothing."""
        value = self.values.get(self.columns.get(field, field))
        return None if is_blank(value) else value

    def need(self, field: str, other: str | None = None) -> object:
        """The value of a field, or of the column `other` where no column is named for it."""
        column = self.columns.get(field, field)
        for known in (column, None if field in self.columns else other):
            if known is not None and known in self.values:
                return self.values[known]
        raise DataError(
            f"{self.where}: no column {quoted(column)}; found: {listed(self.values)}. "
            f"Rename the right one; a recipe can also name it: columns: {{{field}: NAME}}"
        )

    def text(self, field: str) -> str:
        """The text of a field."""
        return text_of(self.need(field), field, self.where)


def is_blank(value: object) -> bool:
    """Whether an optional cell says nothing."""
    return value is None or (isinstance(value, str) and not value.strip())


def name_of(value: object, label: str, where: str) -> str:
    """Return a name, of a text or a whole number: short and printable, since it stands in messages, files and reports.

    Raises:
        DataError: it is none.
    """
    _check_has_text(value, label, where)
    if isinstance(value, int) and value.bit_length() > 4 * MOST_ID:  # Python does not write all of them
        raise DataError(f"{where}: {label} is {quoted(value)}; at most {MOST_ID} characters are allowed")
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"{where}: {label} must be a text or a whole number, found {quoted(value)}")
    text = str(value)
    if len(text) > MOST_ID:
        raise DataError(f"{where}: {label} has {len(text)} characters; at most {MOST_ID} are allowed")
    if found := CONTROLS.search(text):
        raise DataError(f"{where}: {label} holds the control character U+{ord(found.group()):04X}; remove it")
    return text


def text_of(value: object, label: str, where: str) -> str:
    """Return a text that the model may read or write.

    Raises:
        DataError: the value is none, or empty, or longer than a million characters.
    """
    _check_has_text(value, label, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: {label} must be a text, found {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{where}: {label} is empty; fill it in, or remove the row")
    if len(value) > MOST_TEXT:
        raise DataError(f"{where}: {label} has {len(value)} characters; at most {MOST_TEXT} are allowed")
    if SURROGATES.search(value):
        raise DataError(f"{where}: {label} holds half of a surrogate pair, which is no valid text")
    return value


def _check_has_text(value: object, label: str, where: str) -> None:
    if isinstance(value, NoText):
        raise DataError(f"{where}: {label} is {value.what}")
