"""What a run leaves behind: nothing of the environment, no place on this machine, no pickle; and foreign texts as texts."""

import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from conftest import CliResult, write_tiny_workspace

from grasp_lora import api

SECRETS = {"HF_TOKEN": "hf_secretTokenNobodyMaySee", "WANDB_API_KEY": "wandb0secret0key", "OTHER": "of-the-environment"}
FOREIGN = (
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>", "{{ 7 * 7 }}{% raw %}", "a|b|c", "`code`",
    "[click](javascript:alert(3))", "![x](http://evil.example/x.png)", "www.evil.example", "# title", "\x1b[2J\x1b[31m",
    "\u202egnp.exe", "a\n\n## b", '" onmouseover="alert(4)', "</title><base href=//evil>", "\u2028x",
)  # fmt: skip
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path) -> Path:
    """The folder of a run by absolute paths, on rows of foreign texts, made while secrets stood in the environment."""
    work = tmp_path_factory.mktemp("secrets") / "work"
    recipe = write_tiny_workspace(work, tiny_backbone_folder)
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["backbone"]["name"] = str(work / "tiny-llama")
    for side in ("source", "target"):
        file = work / f"{side}.jsonl"
        content["data"][side]["files"] = [str(file)]
        texts = [f"{FOREIGN[number % len(FOREIGN)]} {number}" for number in range(45)]
        rows = [{"prompt": f"{side} {text}", "completion": text} for text in texts]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.chdir(work)
        api.run(recipe, folder=work / "run")
    return work / "run"


def test_no_secret_no_place_and_no_pickle_is_saved(run: Path) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not {file.suffix for file in files} & {".bin", ".pt", ".pth", ".pkl"}
    private = [*SECRETS.values(), str(run.parent)]  # nor where on this machine the work was done
    private += [value for name in ("HOSTNAME", "USER") if len(value := os.environ.get(name, "")) > 5]
    assert not [(file.name, text) for file in files for text in private if text.encode() in file.read_bytes()]


def test_an_adapter_names_its_backbone_without_its_place(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., CliResult]
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no folder of that name
    assert json.loads((run / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-llama"
    assert cli("predict", run / "adapter", "source 1: what?").status == 0
    for command in (("export", run / "adapter", "--gguf"), ("merge", run / "source", run / "target")):
        assert cli(*command, "-o", command[0]).status == 0
        saved = b"".join(file.read_bytes() for file in (tmp_path / command[0]).iterdir())
        assert str(run.parent).encode() not in saved
        assert str(tmp_path).encode() not in saved
    moved = cli("predict", "merge", "hi")
    assert (moved.status, moved.err.count("\n")) == (2, 1)
    assert re.search(r"'tiny-llama': there is no such folder.*adapter merge names .*with --backbone", moved.err)
    assert cli("predict", "merge", "hi", "--backbone", run.parent / "tiny-llama").status == 0


def test_reports_hold_foreign_texts_as_texts(run: Path) -> None:
    tags: list[tuple[str, set[str]]] = []
    page = HTMLParser()
    page.handle_starttag = lambda tag, attributes: tags.append((tag, {name for name, _ in attributes}))  # type: ignore[method-assign]
    page.feed((run / "report.html").read_text(encoding="utf-8"))
    assert not {tag for tag, _ in tags} & {"img", "base", "link", "iframe", "form"}
    assert not {name for _, names in tags for name in names if name.startswith("on") or name == "src"}
    assert "alert(" in (run / "report.html").read_text(encoding="utf-8")  # so they are shown
    for file in [run / "adapter" / "README.md"]:
        text = file.read_text(encoding="utf-8")
        assert not RAW.search(text), file.name
        prose = re.sub(r"(?m)\A---\n[\s\S]*?\n---$|^    .*$|^```[\s\S]*?^```", "", text)
        foreign = r"<(?!/?details|/?summary)[a-zA-Z/!]|(?<!\\)\]\(javascript|(https?://|www\.)evil|\n## b"
        assert not re.search(foreign, prose), file.name
