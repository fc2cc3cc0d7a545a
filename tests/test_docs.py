"""The docs site: every page is on it, every public name has its reference, and what the pages show can be done."""

import re
from pathlib import Path

import yaml

import grasp_lora as gl

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SITE = ROOT / "mkdocs.yml"


def test_every_page_is_in_the_navigation() -> None:
    site = yaml.safe_load(SITE.read_text(encoding="utf-8"))
    shown = set(re.findall(r"[\w/-]+\.md", str(site["nav"])))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    from_the_root = {"index.md", "pages.md", "changelog.md", "contributing.md"}
    assert shown == (pages - {"README.md"}) | from_the_root


def test_the_reference_has_every_public_name_once() -> None:
    named = re.findall(r"^::: grasp_lora\.(\w+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(gl.__all__)


def test_nothing_of_the_site_is_loaded_from_elsewhere() -> None:
    site = yaml.safe_load(SITE.read_text(encoding="utf-8"))
    assert site["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css"} & site.keys()
    # `offline` and `social` of the theme fetch a script and fonts.
    assert [name if isinstance(name, str) else next(iter(name)) for name in site["plugins"]] == [
        "search",
        "mkdocstrings",
    ]
