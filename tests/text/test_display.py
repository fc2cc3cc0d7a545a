"""Foreign text in messages: short, on one line, and without a character that a terminal acts upon."""

import pytest

from grasp_lora.text.display import CONTROLS, escaped, listed, one_line, quoted


@pytest.mark.parametrize("harmful", ["\x00", "\x07", "\x1b", "\x7f", "\x9b", "\u2028", "\u202e", "\u2067", "\ud800"])
def test_what_acts_becomes_its_escape(harmful):
    text = f"a{harmful}b"
    for show in (one_line, escaped, quoted, lambda text: listed([text])):
        shown = show(text)
        assert not CONTROLS.search(shown)
        assert shown.encode()


@pytest.mark.parametrize("harmless", ["é", "سؤال", "问题", "\u200f", "\u061c", "\u00a0", "\U0001f600"])
def test_what_only_stands_there_stays(harmless):
    assert escaped(harmless) == harmless
    assert CONTROLS.search(harmless) is None


@pytest.mark.parametrize(
    "value", ["x" * 10_000, [1] * 10_000, {"a": "x" * 10_000}, 10**4000, 1e308, None, b"\x1b" * 1000, {1}]
)
def test_quoted_is_short_for_any_value(value):
    shown = quoted(value)
    assert len(shown) <= 90
    assert not CONTROLS.search(shown)


def test_many_names_are_counted():
    assert listed(range(25)).endswith("18, 19 and 5 more")
    assert len(listed(["x" * 1000] * 1000)) < 2000
