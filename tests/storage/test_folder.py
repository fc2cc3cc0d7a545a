"""One writer at a time; whoever dies gives the folder free."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from grasp_lora.bench.run_folder import check_place
from grasp_lora.errors import RecipeError
from grasp_lora.storage import folder as lock_module
from grasp_lora.storage.folder import LOCK_FILE, only_writer

HOLDER = """
import sys
from pathlib import Path
from grasp_lora.storage.folder import only_writer
with only_writer(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_refused_and_told_of_the_first(tmp_path, holder):
    before = (tmp_path / LOCK_FILE).read_bytes()
    with (
        pytest.raises(
            RecipeError, match=rf"is being written by process {holder.pid} on {os.uname().nodename}; wait until"
        ),
        only_writer(tmp_path),
    ):
        pytest.fail("two writers at once")
    assert (tmp_path / LOCK_FILE).read_bytes() == before


def test_a_killed_holder_leaves_a_file_and_no_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK_FILE).is_file()
    with only_writer(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_holder_that_ends_takes_its_file_along(tmp_path, holder):
    holder.communicate("")
    assert not list(tmp_path.iterdir())


def test_an_error_inside_frees_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path):
        raise ZeroDivisionError
    with only_writer(tmp_path), pytest.raises(RecipeError, match="is being written by process"), only_writer(tmp_path):
        pytest.fail("two writers at once")


def test_a_holder_that_has_not_written_its_name_yet_is_another_process(tmp_path):
    with only_writer(tmp_path):
        (tmp_path / LOCK_FILE).write_bytes(b"")
        with pytest.raises(RecipeError, match="is being written by another process"), only_writer(tmp_path):
            pytest.fail("two writers at once")


def test_the_lock_of_a_folder_that_took_its_place_is_left_alone(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with only_writer(folder):
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        (folder / LOCK_FILE).write_text("of another")
    assert (folder / LOCK_FILE).read_text() == "of another"


def test_a_folder_that_vanishes_hides_no_error(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()

    def work() -> None:
        (folder / LOCK_FILE).unlink()
        folder.rmdir()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), only_writer(folder):
        work()


def test_many_threads_are_never_inside_together(tmp_path):
    inside, most, entered = 0, 0, 0
    start = threading.Barrier(8)

    def work() -> None:
        nonlocal inside, most, entered
        start.wait()
        for _ in range(40):
            try:
                with only_writer(tmp_path):
                    inside += 1
                    most = max(most, inside)
                    entered += 1
                    inside -= 1
            except RecipeError:
                continue

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not list(tmp_path.iterdir())
    with only_writer(tmp_path):  # the last one left it free
        entered += 1
    assert entered > 1


def test_a_lock_on_a_file_that_is_gone_by_then_does_not_count(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    lock, removed = fcntl.flock, []

    def after_the_last_holder_left(descriptor: int, how: int) -> None:
        if not removed:
            removed.append(tmp_path / LOCK_FILE)
            removed[0].unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", after_the_last_holder_left)
    with only_writer(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
        with pytest.raises(RecipeError, match="is being written by"), only_writer(tmp_path):
            pytest.fail("two writers at once")


@pytest.mark.parametrize("how", ["refused", "missing"])
def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, monkeypatch, caplog, how):
    def refuse(*arguments):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    if how == "refused":
        monkeypatch.setattr(lock_module.fcntl, "flock", refuse)
    else:
        monkeypatch.setattr(lock_module, "fcntl", None)
    with only_writer(tmp_path):
        pass
    assert len(caplog.records) == 1
    assert "cannot be locked" in caplog.records[0].getMessage()
    assert "make sure that only one run writes there" in caplog.records[0].getMessage()


def test_the_first_of_several_ranks_holds_it_for_all(tmp_path, monkeypatch):
    with only_writer(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(RecipeError, match="is being written by"), only_writer(tmp_path):
            pass  # an array of jobs may set RANK, too
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with only_writer(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).is_file()


def test_a_folder_that_may_not_be_looked_into_is_one_line(tmp_path, monkeypatch):
    def closed(self: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(RecipeError, match=r"out cannot be read \(Permission denied\); choose another with --output"):
        check_place(tmp_path / "out")
