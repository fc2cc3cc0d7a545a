"""What can be said of Windows on another system."""

import importlib
import os
import pkgutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import grasp_lora
from grasp_lora.storage import writing

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


def test_every_module_is_imported_where_nothing_of_unix_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_on_windows_a_file_is_opened_for_writing_to_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, how = tmp_path / "file", []
    file.write_text("content", encoding="utf-8")

    def opened(path: Path, flags: int) -> int:
        how.append(flags)
        return os.open(path, flags)

    monkeypatch.setattr(writing, "os", SimpleNamespace(**vars(os) | {"name": "nt", "open": opened}))
    writing.sync(file)
    writing.sync(tmp_path)  # a folder cannot be opened there
    assert how == [os.O_RDWR]
