"""Files of strangers are read up to a limit, and only where they are files; their JSON is that of the standard."""

import json
import os
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from grasp_lora.storage.reading import (
    MOST_LEVELS,
    Name,
    RefusedError,
    about,
    expanded,
    is_file,
    is_folder,
    is_there,
    parse_json,
    read_bounded,
    validated,
)


class TestFiles:
    def test_up_to_the_limit(self, tmp_path: Path) -> None:
        file = tmp_path / "a"
        file.write_bytes(b"12345")
        assert read_bounded(file, 5) == b"12345"
        with pytest.raises(RefusedError, match="it has 5 bytes; at most 4 are allowed"):
            read_bounded(file, 4)

    @pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs a file whose size is stated as 0")
    def test_a_file_of_more_than_it_says(self) -> None:
        assert Path("/proc/self/status").stat().st_size == 0
        with pytest.raises(RefusedError, match="it has more than 4 bytes"):
            read_bounded(Path("/proc/self/status"), 4)
        assert read_bounded(Path("/proc/self/status"), 10**6).startswith(b"Name:")

    def test_a_small_file_takes_little_memory_whatever_the_limit(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"12345")
        tracemalloc.start()
        try:
            assert read_bounded(tmp_path / "a", 2**31) == b"12345"
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
    def test_a_file_that_is_closed_to_us(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch(mode=0)
        with pytest.raises(RefusedError, match="it cannot be read: Permission denied"):
            read_bounded(tmp_path / "a", 4)

    @pytest.mark.parametrize("name", ["x" * 5000, "x" * 300, "a\x00b", "none", "a/b/../../../c"])
    def test_names_that_lead_nowhere(self, name: str, tmp_path: Path) -> None:
        place = tmp_path / "f" / name
        assert not is_file(place)
        assert not is_folder(place)
        assert not is_there(place)
        with pytest.raises(RefusedError, match="it cannot be read"):
            read_bounded(place, 4)

    def test_links(self, tmp_path: Path) -> None:
        (tmp_path / "loop").symlink_to("loop")
        assert is_there(tmp_path / "loop")
        assert not is_file(tmp_path / "loop")
        (tmp_path / "file").write_bytes(b"a")
        (tmp_path / "link").symlink_to("file")
        assert read_bounded(tmp_path / "link", 1) == b"a"

    def test_homes(self) -> None:
        assert expanded("~/a") == Path.home() / "a"
        assert expanded("~nobody-of-that-name/a") == Path("~nobody-of-that-name/a")


class TestJson:
    @pytest.mark.parametrize(
        "text", ["1", '"a"', '{"a": [1, 2.5, null, true]}', ' {"\\u0000": "\\ud83d\\ude00"} ', "1e999"]
    )
    def test_what_the_standard_allows(self, text: str) -> None:
        assert parse_json(text) == json.loads(text)

    def test_depth(self) -> None:
        parse_json("[" * MOST_LEVELS + "]" * MOST_LEVELS)
        for levels in (MOST_LEVELS + 1, 500, 100_000):
            with pytest.raises(RefusedError, match="nested deeper than 64 levels"):
                parse_json("[" * levels + "]" * levels)
        assert parse_json("[" + "[]," * 1000 + "{}]")  # many, but not deep

    @pytest.mark.parametrize(
        ("text", "reason", "line"),
        [
            ('{"a": 1,\n "a": 2}', r"the key 'a' stands twice", None),
            ('{"a\\u001b": 1, "a\\u001b": 2}', r"the key 'a\\x1b' stands twice", None),
            ("NaN", "NaN is none of its numbers", None),
            ("[-Infinity]", "-Infinity is none of its numbers", None),
            ("9" * 5000, "a number has thousands of digits", None),
            ("[1,\n2", "Expecting ',' delimiter", 2),
            ('\n"\x1b"', "Invalid control character", 2),
            ("", "Expecting value", 1),
        ],
    )
    def test_what_it_does_not(self, text: str, reason: str, line: int | None) -> None:
        with pytest.raises(RefusedError, match=reason) as caught:
            parse_json(text)
        assert caught.value.line == line


def test_a_reason_gets_a_subject_and_keeps_its_line() -> None:
    with pytest.raises(RefusedError, match=r"^a\.json: not valid JSON") as caught, about("a.json"):
        parse_json("\n[")
    assert caught.value.line == 2


@dataclass(frozen=True)
class Place:
    name: Name
    rows: dict[str, tuple[Annotated[int, Field(strict=True, ge=1)], ...]] = field(default_factory=dict)


class TestValues:
    def test_what_fits_is_typed_and_what_is_not_asked_for_is_left_out(self) -> None:
        assert validated(Place, {"name": "a", "rows": {"x": [1, 2]}, "more": 1}) == Place("a", {"x": (1, 2)})

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({}, "^name is missing$"),
            ({"name": 7}, "^name is 7; input should be a valid string$"),
            ({"name": "a\x1b"}, r"^name is 'a\\x1b'; control characters are not allowed$"),
            ({"name": "x" * 1025}, r"^name is 'x{80}'\.\.\.; string should have at most 1024 characters$"),
            ({"name": "a", "rows": [1]}, "^rows is a list; input should be a valid object$"),
            (
                {"name": "a", "rows": {"\x1b": [0]}},
                r"^rows\.\\x1b\.0 is 0; input should be greater than or equal to 1$",
            ),
            ({"name": "a", "rows": {"x": [True]}}, r"^rows\.x\.0 is True; input should be a valid integer$"),
            ([], "^it is a list; "),
        ],
    )
    def test_the_first_that_does_not_is_named_with_its_value_and_rule(self, content: object, message: str) -> None:
        with pytest.raises(RefusedError, match=message):
            validated(Place, content)
