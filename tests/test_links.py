"""Every relative link of the Markdown pages leads somewhere: to a file, and to a heading where it names one."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()\s]*\))?)\)")
ELSEWHERE = ("http://", "https://", "mailto:")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = [target for target in _targets(page) if not _leads_somewhere(page, target)]
    assert not broken, f"{page.relative_to(ROOT)} links to {', '.join(broken)}"


CODE = [
    *(file for folder in ("src", "tests", "docs") for file in sorted((ROOT / folder).rglob("*.py"))),
    ROOT / "Makefile",
    ROOT / "pyproject.toml",
]


@pytest.mark.parametrize("file", CODE, ids=lambda file: str(file.relative_to(ROOT)))
def test_pages_that_code_names_exist(file: Path) -> None:
    named = re.findall(r"\bdocs/[\w./-]*\w\b", file.read_text(encoding="utf-8"))
    gone = [path for path in named if not (ROOT / path).exists()]
    assert not gone, f"{file.relative_to(ROOT)} names {', '.join(gone)}"


MAPS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("method/*.md"))]


@pytest.mark.parametrize("page", MAPS, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_code_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`([\w/]+/\w+\.py)`", page.read_text(encoding="utf-8"))
    places = (ROOT, ROOT / "src" / "grasp_lora", ROOT / "tests")
    gone = [path for path in named if not any((place / path).is_file() for place in places)]
    assert not gone, f"{page.relative_to(ROOT)} names {', '.join(gone)}"


def _targets(page: Path) -> list[str]:
    found = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return [target for target in found if not target.startswith(ELSEWHERE)]


def _leads_somewhere(page: Path, target: str) -> bool:
    path, _, heading = unquote(target).partition("#")
    file = page.parent / path if path else page
    if not file.exists():
        return False
    return not heading or heading in _headings(file)


def _headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    lines = FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}
