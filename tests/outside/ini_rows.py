"""A kind of data file from outside the package, in one file: an INI file, whose sections are rows."""

from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

from grasp_lora.data.files import READERS, Row


def _ini(path: Path, name: str) -> Iterator[Row]:
    parser = ConfigParser(interpolation=None)
    parser.read_string(path.read_text(encoding="utf-8"))
    for section in parser.sections():
        yield Row(f"{name}, section {section}", dict(parser[section]))


READERS[".ini"] = _ini
