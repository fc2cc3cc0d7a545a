"""What mkdocs is told beside `mkdocs.yml`: pages that lie outside of `docs/`, and how GitHub's Markdown becomes mkdocs'."""

import re
from pathlib import Path
from posixpath import dirname, normpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "docs/README.md": "pages.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
START = "---\nhide: [navigation]\n---\n"  # of one page
FENCE = re.compile(r"(^```.*?^```$)", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s#]+)(#[^()\s]*)?\)")
LIST = re.compile(r"(\A|^(?![-|\s]|\d+\. ).+)\n(?=- |\d+\. )", flags=re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository's root; the README is the start."""
    for source, page in PAGES.items():
        if (other := files.get_file_from_path(source.removeprefix("docs/"))) is not None:
            files.remove(other)
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=START + text if source == "README.md" else text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links lead to what is on the site; what is not stays as a text. Part lists from what precedes them."""
    names = {page: source for source, page in PAGES.items()}
    here = page.file.src_uri
    folder = dirname(names.get(here, f"docs/{here}"))

    def lead(found: re.Match[str]) -> str:
        mark, text, target, heading = found.groups()
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = normpath(f"{folder}/{target}").removeprefix("/")
        place = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(place) is None and (ROOT / path).exists():
            return str(text)
        return f"{mark}[{text}]({'../' * here.count('/')}{place}{heading or ''})"

    parts = FENCE.split(markdown)
    parts[::2] = [LIST.sub(r"\1\n\n", LINK.sub(lead, part)) for part in parts[::2]]
    return "".join(parts)
