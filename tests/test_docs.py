"""The docs site: every page is on it, every public name has its reference, and what the pages show can be done."""

import re
from pathlib import Path

import pytest
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


SHAPES = {  # layers, width, width of keys and values together, as the models' configs say
    "Gemma 3 270M": (18, 640, 512),
    "Qwen3 0.6B": (28, 1024, 2048),
    "Llama 3.2 1B": (16, 2048, 1024),
    "Qwen3 4B": (36, 2560, 2048),
    "Llama 3 8B": (32, 4096, 2048),
}


def test_the_table_of_machines_is_what_its_arithmetic_says() -> None:
    page = (DOCS / "guide" / "machines.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| ([\w. ]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| \d+ \|$", page, re.MULTILINE
    )
    assert [row[0] for row in rows] == list(SHAPES)
    for model, parameters, *shown in rows:
        layers, width, cached = SHAPES[model]
        for (weights, whole), size, kept in zip((shown[:2], shown[2:]), (2, 4), (48, 75), strict=True):
            stated = float(parameters) * size
            most = max(512 * layers * width * kept, 8192 * layers * cached * size) / 1e9
            assert float(weights) == pytest.approx(stated, abs=0.06), model
            assert float(whole) == pytest.approx(stated + most + 1, abs=0.06), model
