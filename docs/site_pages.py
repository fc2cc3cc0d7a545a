"""What mkdocs is told beside `mkdocs.yml`: pages that lie outside of `docs/`, and where links lead on the site."""

import re
from pathlib import Path
from posixpath import dirname, normpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "docs/README.md": "pages.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s#]+)(#[^()\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository's root; the README is the start."""
    for source, page in PAGES.items():
        if (other := files.get_file_from_path(source.removeprefix("docs/"))) is not None:
            files.remove(other)
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links lead to pages and files of the site; what is not on it, such as a folder, stays as a text."""
    names = {page: source for source, page in PAGES.items()}
    source = names.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    depth = "../" * page.file.src_uri.count("/")

    def lead(found: re.Match[str]) -> str:
        mark, text, target, heading = found.groups()
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = normpath(f"{dirname(source)}/{target}").removeprefix("/")
        place = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(place) is None and (ROOT / path).exists():
            return str(text)
        return f"{mark}[{text}]({depth}{place}{heading or ''})"

    return LINK.sub(lead, markdown)
