"""What a run leaves behind: nothing of the environment, and nothing foreign that a viewer or a terminal would act upon."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from conftest import write_tiny_workspace

from grasp_lora import api

SECRETS = {
    "HF_TOKEN": "hf_secretTokenNobodyMaySee", "WANDB_API_KEY": "wandb0secret0key", "AWS_SECRET_ACCESS_KEY": "aws/secret/key",
    "HOSTILE_SETTING": "value-of-the-environment",
}  # fmt: skip
SCRIPT = "<script>alert(1)</script>"
ATTACKS = (
    SCRIPT, "</script><img src=x onerror=alert(2)>", "{{ 7 * 7 }}{% raw %}", "[click](javascript:alert(3))",
    "![x](http://evil.example/x.png)", "a|b|c", "`code`", "http://evil.example", "www.evil.example", "# title",
    "\x1b[2J\x1b[31m", "\u202egnp.exe", "a\n\n## b", '" onmouseover="alert(4)', "${alert(5)}", "</title><base href=//evil>",
    "\u2028x", "<a href='data:text/html,x'>",
)  # fmt: skip
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def run_of(work: Path, backbone: Path, attacks: tuple[str, ...] = ()) -> Path:
    """Make a whole run by absolute paths, whose rows begin with these texts; return its folder."""
    recipe = write_tiny_workspace(work, backbone)
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["backbone"]["name"] = str(work / "tiny-llama")
    for side in ("source", "target"):
        file = work / f"{side}.jsonl"
        content["data"][side]["files"] = [str(file)]
        if attacks:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            texts = [attacks[number % len(attacks)] for number in range(len(rows))]
            rows = [
                row | {"prompt": text + row["prompt"], "completion": text}
                for row, text in zip(rows, texts, strict=True)
            ]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        api.run(recipe, folder=work / "run")
    return work / "run"


@pytest.fixture(scope="module")
def run_with_secrets(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path) -> Path:
    """The folder of a whole run, made while secrets stood in the environment; treat it as read-only."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        return run_of(tmp_path_factory.mktemp("secrets") / "work", tiny_backbone_folder)


def test_no_secret_and_no_environment_is_saved(run_with_secrets):
    files = [path for path in run_with_secrets.rglob("*") if path.is_file()]
    assert len(files) > 10
    private = [*SECRETS.values(), str(run_with_secrets.parent)]  # nor where on this machine the work was done
    private += [value for name in ("HOSTNAME", "USER") if len(value := os.environ.get(name, "")) > 5]
    for path in files:
        content = path.read_bytes()
        for secret in private:
            assert secret.encode() not in content, path.relative_to(run_with_secrets)


def test_an_adapter_names_its_backbone_without_its_place(run_with_secrets, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)  # where there is no folder of that name
    adapter = run_with_secrets / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-llama"
    assert json.loads((adapter / "grasp_lora.json").read_text())["backbone_fingerprint"]
    assert cli("predict", adapter, "source 1: what?").status == 0
    for command in (("export", adapter, "--gguf"), ("merge", run_with_secrets / "source", run_with_secrets / "target")):
        assert cli(*command, "-o", command[0]).status == 0
        assert all(str(work).encode() not in file.read_bytes() for file in (tmp_path / command[0]).iterdir()
                   for work in (run_with_secrets.parent, tmp_path))  # fmt: skip
    moved = cli("predict", "merge", "hi")
    assert moved.status == 2
    assert moved.err.count("\n") == 1
    assert re.search(r"'tiny-llama': it is no folder.*adapter merge names .*with --backbone", moved.err)
    assert cli("predict", "merge", "hi", "--backbone", run_with_secrets.parent / "tiny-llama").status == 0


def test_nothing_is_a_pickle(run_with_secrets):
    suffixes = {path.suffix for path in run_with_secrets.rglob("*") if path.is_file()}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl"}


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_reports_hold_foreign_texts_as_texts(run_with_secrets, tmp_path, tiny_backbone_folder):
    run = run_of(tmp_path / "work", tiny_backbone_folder, ATTACKS)
    pages = [Page((folder / "report.html").read_text(encoding="utf-8")) for folder in (run_with_secrets, run)]
    before, after = ({tag for tag, _ in page.tags} for page in pages)
    assert after - before <= {"li", "td", "th", "tr", "div", "code", "br"}
    before, after = ({name for _, attributes in page.tags for name in attributes} for page in pages)
    assert after <= before
    assert "alert(1)" in (run / "report.html").read_text(encoding="utf-8")  # so they are shown
    for file in (run / "report.md", run / "adapter" / "README.md"):
        text = file.read_text(encoding="utf-8")
        assert not RAW.search(text), file.name
        prose = re.sub(r"(?m)\A---\n[\s\S]*?\n---$|^    .*$|^```[\s\S]*?^```", "", text)
        assert not re.search(r"<(?!/?details|/?summary)[a-zA-Z/!]", prose), file.name
        assert not re.search(r"(?<!\\)\]\(javascript", prose)
        assert not re.search(r"(https?://|www\.)evil", prose), file.name
        assert "\n## b" not in prose


def test_a_page_asks_for_nothing_from_elsewhere(run_with_secrets):
    text = (run_with_secrets / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "poster", "action", "background"} & attributes.keys()
        assert tag not in ("link", "iframe", "object", "embed", "base", "img", "form")
        if "href" in attributes:
            assert tag == "a"
            assert str(attributes["href"]).startswith(("https://arxiv.org/", "#"))
    (policy,) = [
        str(attributes["content"])
        for _, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    # Whatever the plotting library may try (it knows addresses of map tiles), a browser must not let it.
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "connect-src" not in rules
    assert "font-src" not in rules
    assert rules["img-src"] == "data: blob:"
    assert re.fullmatch(r"'nonce-[\w-]+'", rules["script-src"])
