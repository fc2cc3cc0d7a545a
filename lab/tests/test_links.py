"""Every relative link of the laboratory's pages leads to a file; headings may have moved on since an entry was written."""

import re
from pathlib import Path

import pytest

LAB = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^()\s#]+)")


@pytest.mark.parametrize("page", sorted(LAB.rglob("*.md")), ids=lambda page: str(page.relative_to(LAB)))
def test_links_lead_to_a_file(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    broken = [link for link in links if not (page.parent / link).exists()]
    assert not broken
