"""The docs site: every page is on it, and every public name and recipe key has its place."""

import re
import runpy
from pathlib import Path

import yaml

import grasp_lora as gl
from grasp_lora.recipes.recipe import recipe_keys

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


def test_the_page_of_recipe_keys_is_what_the_docstrings_say() -> None:
    script = runpy.run_path(str(DOCS / "make_recipe_page.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"](), "run python docs/make_recipe_page.py"


def test_a_recipe_has_at_most_eighty_keys() -> None:
    keys = recipe_keys()
    leaves = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    assert len(leaves) <= 80, leaves


def test_nothing_of_the_site_is_loaded_from_elsewhere() -> None:
    site = yaml.safe_load(SITE.read_text(encoding="utf-8"))
    assert site["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css"} & site.keys()
    # `offline` and `social` of the theme fetch a script and fonts.
    plugins = [name if isinstance(name, str) else next(iter(name)) for name in site["plugins"]]
    assert plugins == ["search", "mkdocstrings"]
