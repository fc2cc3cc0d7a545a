"""Sentences of the pages are short: at most 25 words outside code, tables, headings and the targets of links."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST = 25  # words
HISTORY = (
    "log.md",
    "compare.md",
    "report.md",
    "single-runs.md",
    "CHANGELOG.md",
)  # entries of their day, and what a program writes
PAGES = [page for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]) if page.name not in HISTORY]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_sentence_is_long(page: Path) -> None:
    long = [sentence for sentence in _sentences(page.read_text(encoding="utf-8")) if len(sentence.split()) > MOST]
    assert not long, f"{page.relative_to(ROOT)} has sentences of more than {MOST} words: {' // '.join(long)}"


def test_a_sentence_ends_at_a_stop_a_bullet_and_a_blank_line() -> None:
    text = "# A title\nOne two\nthree. Four `a b.c d` [five](six.md)!\n\n- seven\n- eight: nine\n\n| a | b |\n```\nx. y\n```\n"
    assert list(_sentences(text)) == ["One two three.", "Four code five!", "seven", "eight: nine"]


def _sentences(text: str) -> Iterator[str]:
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`]+`", "code", text)  # however long, it is one word
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^(#|\|).*$", "", text, flags=re.MULTILINE)  # a heading, a row of a table
    text = re.sub(r"^ *([-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])[*)]* ", " ".join(paragraph.split())):
            if sentence:
                yield sentence
