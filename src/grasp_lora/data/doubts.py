"""Rows that can be read and may yet be wrong: `grasp-lora check` names them.

Only what is cheap and certain is looked for. Whether a text is in the right language is not.
"""

import re
from collections.abc import Collection, Iterable

from grasp_lora.data.records import Record, close_label, same_label, same_letters
from grasp_lora.text.display import escaped, quoted

MOST_SLIPS = 2  # rows of a label that may be a slip of another


def likely_slips(labels: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return labels of one or two rows that are written nearly as a more frequent one, each with a question to the user.

    >>> likely_slips([*[("ankesë", "line 2")] * 9, ("ankese", "line 31"), ("tjetër", "line 40")])
    {'ankese': 'ankese in line 31: did you mean ankesë, which 9 rows have?'}

    Labels that differ in digits alone are meant so.
    """
    places: dict[str, list[str]] = {}
    for label, where in labels:
        places.setdefault(label, []).append(where)
    slips: dict[str, str] = {}
    for label, rows in places.items():
        letters = re.sub(r"\d", "", label)
        frequent = [
            name for name, found in places.items() if len(found) > MOST_SLIPS and re.sub(r"\d", "", name) != letters
        ]
        if len(rows) <= MOST_SLIPS and (meant := close_label(label, frequent)):
            question = f"did you mean {meant}, which {len(places[meant])} rows have?"
            slips[label] = f"{escaped(label)} in {' and '.join(rows)}: {question}"
    return slips


def with_two_labels(records: Iterable[Record]) -> list[str]:
    """Return a line for each text, but for case and marks, that stands in several rows with different labels."""
    rows_of: dict[str, dict[str, Record]] = {}
    for record in records:
        rows_of.setdefault(record.marks[0], {}).setdefault(same_label(record.answer), record)
    return [
        "one text has different labels: "
        + " and ".join(f"{quoted(record.answer)} in {record.where}" for record in list(rows.values())[:3])
        for rows in rows_of.values()
        if len(rows) > 1
    ]


def beside_context(records: Collection[Record]) -> list[Record]:
    """Return questions whose answer does not stand in their context, but for case and marks.

    There are none where half of them are so: then answers are not taken from the context.
    """
    strange = []
    for record in records:
        context = same_letters(record.fields.get("context", ""))
        if record.fields and not any(same_letters(answer) in context for answer in record.references):
            strange.append(record)
    return strange if 2 * len(strange) < len(records) else []


def untranslated(target: Iterable[Record], source: Iterable[Record]) -> list[Record]:
    """Return the rows of the target that ask the same as one of the source, letter by letter."""
    asked = {record.marks[0] for record in source}
    return [record for record in target if record.marks[0] in asked]
