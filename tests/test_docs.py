"""The docs: every page is on the site, every public name and recipe key has its place, and links lead somewhere."""

import re
import runpy
from pathlib import Path
from urllib.parse import unquote

import yaml

import grasp_lora as gl
from grasp_lora.recipes.recipe import recipe_keys

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SITE = ROOT / "mkdocs.yml"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()\s]*\))?)\)")
ELSEWHERE = ("http://", "https://", "mailto:")


def test_every_page_is_in_the_navigation():
    site = yaml.safe_load(SITE.read_text(encoding="utf-8"))
    shown = set(re.findall(r"[\w/-]+\.md", str(site["nav"])))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    from_the_root = {"index.md", "pages.md", "changelog.md", "contributing.md"}
    assert shown == (pages - {"README.md"}) | from_the_root


def test_the_reference_has_every_public_name_once():
    named = re.findall(r"^::: grasp_lora\.(\w+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(gl.__all__)


def test_the_page_of_recipe_keys_is_what_the_docstrings_say():
    script = runpy.run_path(str(DOCS / "make_recipe_page.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"](), "run python docs/make_recipe_page.py"


def test_a_recipe_has_at_most_eighty_keys():
    keys = recipe_keys()
    leaves = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    assert len(leaves) <= 80, leaves


def test_nothing_of_the_site_is_loaded_from_elsewhere():
    site = yaml.safe_load(SITE.read_text(encoding="utf-8"))
    assert site["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css"} & site.keys()
    # `offline` and `social` of the theme fetch a script and fonts.
    plugins = [name if isinstance(name, str) else next(iter(name)) for name in site["plugins"]]
    assert plugins == ["search", "mkdocstrings"]


def test_links_lead_somewhere():
    links = [(page, link) for page in PAGES for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))]
    near = [(page, link) for page, link in links if not link.startswith(ELSEWHERE)]
    assert [(str(page), link) for page, link in near if not _leads_somewhere(page, link)] == []


def test_pages_that_code_names_exist():
    code = [file for folder in ("src", "tests", "docs") for file in (ROOT / folder).rglob("*.py")]
    texts = [file.read_text(encoding="utf-8") for file in (*code, ROOT / "Makefile", ROOT / "pyproject.toml")]
    named = {path for text in texts for path in re.findall(r"\bdocs/[\w./-]*\w\b", text)}
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_files_of_the_code_that_a_page_names_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {path for page in pages for path in re.findall(r"`([\w/]+/\w+\.py)`", page.read_text(encoding="utf-8"))}
    places = (ROOT, ROOT / "src" / "grasp_lora", ROOT / "tests")
    assert named
    assert [path for path in named if not any((place / path).is_file() for place in places)] == []


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
