"""A kind of data file from outside the package, in one file: an INI file, whose sections are rows.

A script adds it by `grasp_lora.data.files.READERS[".ini"] = ini_rows`.
"""

from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

from grasp_lora.data.files import Row


def ini_rows(path: Path, name: str) -> Iterator[Row]:
    """Yield each section as a row."""
    parser = ConfigParser(interpolation=None)
    parser.read_string(path.read_text(encoding="utf-8"))
    for section in parser.sections():
        yield Row(f"{name}, section {section}", dict(parser[section]))
