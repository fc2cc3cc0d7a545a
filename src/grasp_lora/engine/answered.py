"""Rows with their predictions, written to a new CSV, TSV or JSONL file."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from grasp_lora.data.files import Table
from grasp_lora.errors import DataError, RecipeError
from grasp_lora.storage.writing import write_whole
from grasp_lora.text.display import quoted

PREDICTION = "prediction"  # the column of the answers, as in the files of a run: rows may have an `answer` already

Rows = Sequence[Mapping[str, object]]


def check_output(output: Path) -> None:
    """Check that a file of rows can be written.

    Raises:
        RecipeError: its name has another suffix, it exists, or its folder does not.
    """
    if output.suffix.lower() not in _WRITERS:
        raise RecipeError(f"--output is {quoted(str(output))}; its name must end with {', '.join(_WRITERS)}")
    if output.exists() or not output.absolute().parent.is_dir():
        problem = "exists already" if output.exists() else "lies in a folder that is not there"
        raise RecipeError(f"{output} {problem}; choose another with --output")


def check_unanswered(table: Table) -> None:
    """Check that the column of the answers is free.

    Raises:
        DataError: the rows have one of that name.
    """
    if PREDICTION in table.columns:
        raise DataError(
            f"{table.name} has a column {PREDICTION}, which --output would overwrite; rename or remove that column"
        )


def write_rows(output: Path, rows: Rows) -> None:
    """Write rows to a file that `check_output` has passed.

    Raises:
        RecipeError: it cannot be written.
    """
    try:
        write_whole(output, _WRITERS[output.suffix.lower()](rows))
    except OSError as error:
        raise RecipeError(
            f"{output} cannot be written ({error.strerror}); choose another file with --output"
        ) from error


def _as_jsonl(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def _as_table(rows: Rows, delimiter: str) -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _as_cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _as_cell(value: object) -> object:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value


_WRITERS: dict[str, Callable[[Rows], str]] = {
    ".csv": lambda rows: _as_table(rows, ","),
    ".tsv": lambda rows: _as_table(rows, "\t"),
    ".jsonl": _as_jsonl,
}
