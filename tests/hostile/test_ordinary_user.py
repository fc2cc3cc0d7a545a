"""Paths that an ordinary user cannot follow, in the place of every file and folder of every command: one line, nothing written.

Root never sees most of these, so the tests give up root's powers over files.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import CliResult
from test_bad_inputs import contents, write_tiny_adapter

Cli = Callable[..., CliResult]
Line = Callable[[str], Sequence[str]]

TOO_LONG = "n" * 256
READ_FROM = ("shut/adapter", "listed/tiny.yaml", "mute.jsonl", "muted", "loop/x", TOO_LONG, "pipe")
WRITTEN_TO = ("shut/x", "sealed/x", "loop", "loop/x", "mute.yaml/x", TOO_LONG, "pipe")
A = ("-a", "adapter")
OUT = ("-o", "out")


def setting(key: str, *more: str) -> Line:
    return lambda path: ("check", "tiny.yaml", "-s", f"{key}={path}", *more)


READ: dict[str, Line] = {
    "check": lambda path: ("check", path),
    "check, data": lambda path: ("check", "tiny.yaml", "-s", f"data.target.files=['{path}']"),
    "check, root": lambda path: ("check", "tiny.yaml", "-s", f"data.root={path}/x"),
    "check, source": lambda path: ("check", "tiny.yaml", "-s", f"source.adapters=['{path}']"),
    "check, target": setting("target.adapter"),
    "check, backbone": setting("backbone.name"),
    "run": lambda path: ("run", path, *OUT),
    "compare": lambda path: ("compare", path, *OUT),
    "learn": lambda path: ("learn", path, *A, *OUT),
    "learn, adapter": lambda path: ("learn", "tiny.yaml", "-a", path, *OUT),
    "finetune, adapter": lambda path: ("finetune", "tiny.yaml", "-a", path, "--ratio", "0.5", *OUT),
    "evaluate, adapter": lambda path: ("evaluate", "tiny.yaml", "-a", path, *OUT),
    "merge": lambda path: ("merge", "adapter", path, *OUT),
    "merge, backbone": lambda path: ("merge", "adapter", "--backbone", path, *OUT),
    "export": lambda path: ("export", path, "--gguf", *OUT),
    "export, backbone": lambda path: ("export", "adapter", "--gguf", "--backbone", path, *OUT),
    "predict": lambda path: ("predict", path, "hi"),
    "predict, backbone": lambda path: ("predict", "adapter", "hi", "--backbone", path),
    "init": lambda path: ("init", path, "-l", "de", "-o", "new.yaml"),
    "init, source": lambda path: ("init", "target.jsonl", "-l", "de", "--source", path, "-o", "new.yaml"),
    "report": lambda path: ("report", path),
    "recipes": lambda path: ("recipes", path),
}
WRITTEN: dict[str, Line] = {
    "run": lambda path: ("run", "tiny.yaml", "-o", path),
    "demo": lambda path: ("demo", "-s", "backbone={name: tiny-llama}", "-o", path),
    "compare": lambda path: ("compare", "tiny.yaml", "-o", path),
    "learn": lambda path: ("learn", "tiny.yaml", *A, "-o", path),
    "finetune": lambda path: ("finetune", "tiny.yaml", *A, "--ratio", "0.5", "-o", path),
    "evaluate": lambda path: ("evaluate", "tiny.yaml", *A, "-o", path),
    "merge": lambda path: ("merge", "adapter", "-o", path),
    "export": lambda path: ("export", "adapter", "--gguf", "-o", path),
    "init": lambda path: ("init", "target.jsonl", "-l", "de", "-o", f"{path}/new.yaml"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path) -> Path:
    """A working folder with everything in it, open and closed."""
    from conftest import write_tiny_workspace

    work = tmp_path_factory.mktemp("closed") / "work"
    write_tiny_workspace(work, tiny_backbone_folder)
    write_tiny_adapter(work / "adapter")
    for name in ("shut", "listed"):
        (work / name).mkdir()
        for file in ("tiny.yaml", "target.jsonl"):
            shutil.copy(work / file, work / name / file)
        shutil.copytree(work / "adapter", work / name / "adapter")
        shutil.copytree(tiny_backbone_folder, work / name / "tiny-llama")
    shutil.copytree(work / "adapter", work / "muted")
    for file in (work / "muted").iterdir():
        file.chmod(0)
    for file, open_file in (("mute.yaml", "tiny.yaml"), ("mute.jsonl", "target.jsonl")):
        shutil.copy(work / open_file, work / file)
        (work / file).chmod(0)
    (work / "loop").symlink_to("loop")
    (work / "nowhere").symlink_to("none")
    (work / "to-shut").symlink_to("shut/adapter")
    os.mkfifo(work / "pipe")
    for name, mode in (("sealed", 0o555), ("shut", 0), ("listed", 0o600)):
        (work / name).mkdir(exist_ok=True)
        (work / name).chmod(mode)
    return work


def refused(cli: Cli, arguments: Sequence[str]) -> list[str]:
    """What is wrong with how a command ended: it has to be one line and status 2."""
    try:
        result = cli(*arguments)
    except Exception as error:  # noqa: BLE001 - each is a stack trace for the user
        return [f"{arguments}: {error!r}"]
    if result.status == 2 and not result.out and re.fullmatch(r"error: [^\n]+\n", result.err):
        return []
    return [f"{arguments}: {result}"]


@pytest.mark.usefixtures("ordinary_user")
@pytest.mark.parametrize("command", READ)
def test_what_cannot_be_read_is_one_line(command: str, places: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places)
    before = set(places.iterdir())
    assert not [problem for path in READ_FROM for problem in refused(cli, READ[command](path))]
    assert set(places.iterdir()) == before


@pytest.mark.usefixtures("ordinary_user")
@pytest.mark.parametrize("command", WRITTEN)
def test_what_cannot_be_written_is_one_line(
    command: str, places: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places)
    before = set(places.iterdir())
    assert not [problem for path in WRITTEN_TO for problem in refused(cli, WRITTEN[command](path))]
    assert set(places.iterdir()) == before


@pytest.mark.usefixtures("ordinary_user")
def test_a_closed_folder_in_a_finished_run_is_one_line(finished_run: Path, cli: Cli) -> None:
    (finished_run / "controller").chmod(0)
    for arguments in (("report", "run"), ("run", "tiny.yaml", "-o", "run")):
        problems = refused(cli, arguments)
        assert not problems
    (finished_run / "controller").chmod(0o755)


def test_without_a_home_a_tilde_stays_one(tiny_workspace: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def nobody(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "GRASP_LORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    before = contents(tiny_workspace)
    assert not refused(cli, ("check", "tiny.yaml", "-s", "data.root=~/data"))
    assert not refused(cli, ("check", "tiny.yaml", "-s", "backbone.name=~/model"))
    assert not refused(cli, ("run", "tiny.yaml", "-s", "backbone={name: gemma3-270m}"))
    assert contents(tiny_workspace) == before
