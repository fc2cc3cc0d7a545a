"""What a library raises while it reads is one line with the file's name; a place that cannot be looked at is nothing."""

import json
import os
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from grasp_lora.errors import AdapterError, DataError, RecipeError
from grasp_lora.storage.reading import expanded, is_file, is_folder, is_there, reading


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: json.loads("{"), r"^a\\x1b\.json: Expecting property name .*: line 1 column 2 \(char 1\)$"),
        (lambda: yaml.safe_load("a: [1"), r"^a\\x1b\.json: while parsing a flow sequence .* line 1, column 4.*$"),
        (lambda: Path("/no/such/file").read_bytes(), r"^a\\x1b\.json: No such file or directory$"),
        (
            lambda: TypeAdapter(dict[str, int]).validate_python({"k": "x"}),
            r"^a\\x1b\.json: k: Input should be a valid integer",
        ),
        (lambda: [][0], r"^a\\x1b\.json: list index out of range$"),
        (lambda: json.loads("[" * 100_000), r"^a\\x1b\.json: .*recursion"),
    ],
)
def test_whatever_is_raised_is_one_line(read, message):
    with pytest.raises(RecipeError, match=message) as caught, reading("a\x1b.json", RecipeError):
        read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [AdapterError("said already"), MemoryError(), KeyboardInterrupt()])
def test_what_is_said_already_and_what_is_no_fault_of_the_file_pass(error):
    with pytest.raises(type(error)) as caught, reading("a.json", DataError):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 300, "a\x00b", "none", "a/b/../../../c"])
def test_names_that_lead_nowhere(name, tmp_path):
    place = tmp_path / "f" / name
    assert not any(look(place) for look in (is_file, is_folder, is_there))


def test_links(tmp_path):
    (tmp_path / "a").symlink_to("a")
    (tmp_path / "b").symlink_to("none")
    os.mkfifo(tmp_path / "pipe")
    for name in ("a", "b", "pipe"):
        assert is_there(tmp_path / name)
        assert not is_file(tmp_path / name)
        assert not is_folder(tmp_path / name)


def test_homes():
    assert expanded("~nobody-there/x") == Path("~nobody-there/x")
    assert expanded("~/x") == Path.home() / "x"
