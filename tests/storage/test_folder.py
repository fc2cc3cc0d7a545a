"""One writer at a time; whoever dies gives the folder free."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from grasp_lora.bench.run_folder import check_place
from grasp_lora.errors import GraspError, Interrupted, RecipeError
from grasp_lora.storage import folder as lock_module
from grasp_lora.storage.files import write_whole
from grasp_lora.storage.folder import LOCK_FILE, Busy, in_turn, new_folder, only_writer, writer_of

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


def test_others_of_the_group_may_take_a_lock_that_a_killed_process_left(tmp_path):
    before = os.umask(0o002)
    try:
        with only_writer(tmp_path):
            assert (tmp_path / LOCK_FILE).stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)


def test_a_lock_is_looked_at_as_network_file_systems_ask(tmp_path, monkeypatch, holder):
    """NFS refuses an exclusive lock on what is open for reading alone; flock(2)."""
    lock = fcntl.flock

    def as_nfs(descriptor, how):
        if how & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return lock(descriptor, how)

    monkeypatch.setattr(lock_module.fcntl, "flock", as_nfs)
    assert writer_of(tmp_path) == f"process {holder.pid} on {os.uname().nodename}"


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


def test_those_who_share_the_work_keep_a_single_writer_out(tmp_path):
    lock = tmp_path / LOCK_FILE
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(only_writer(tmp_path, shared=True))
        second.enter_context(only_writer(tmp_path, shared=True))
        with pytest.raises(Busy, match="is being written by process"), only_writer(tmp_path):
            pytest.fail("a single writer beside others")
        first.close()
        assert lock.is_file()
        with pytest.raises(Busy), only_writer(tmp_path):
            pytest.fail("a single writer beside another")
        second.close()
        assert not lock.exists()
    with only_writer(tmp_path), pytest.raises(Busy), only_writer(tmp_path, shared=True):
        pytest.fail("others beside a single writer")


def test_writers_in_turn_wait_for_each_other(tmp_path):
    order = []

    def write(name: str) -> None:
        with in_turn(tmp_path / "tables"):
            order.append(name)
            time.sleep(0.1)
            order.append(name)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order[::2] == order[1::2]
    assert sorted(order) == list("aabbcc")
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("how", ["symbolic", "hard", "pipe"])
def test_a_lock_that_is_a_link_is_refused_and_what_it_leads_to_stays(tmp_path, how):
    precious = tmp_path / "precious"
    precious.write_text("of the user")
    folder = tmp_path / "of a stranger"
    folder.mkdir()
    if how == "symbolic":
        (folder / LOCK_FILE).symlink_to(precious)
    elif how == "hard":
        (folder / LOCK_FILE).hardlink_to(precious)
    else:
        os.mkfifo(folder / LOCK_FILE)
    with pytest.raises(RecipeError, match=r"grasp-lora\.lock is a link or no regular file"), only_writer(folder):
        pytest.fail("a lock that is none")
    assert precious.read_text() == "of the user"


@pytest.mark.parametrize("draft", ["leftover", "symbolic", "hard"])
def test_the_draft_of_a_file_follows_no_link_and_a_leftover_one_is_no_obstacle(tmp_path, draft):
    precious, file = tmp_path / "precious", tmp_path / "metrics.json"
    precious.write_text("of the user")
    place = tmp_path / "metrics.json.part"
    if draft == "symbolic":
        place.symlink_to(precious)
    elif draft == "hard":
        place.hardlink_to(precious)
    else:
        place.write_text("half")
    file.symlink_to(precious)
    write_whole(file, "new")
    assert file.read_text() == "new"
    assert precious.read_text() == "of the user"
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "precious"}


def test_of_two_drafts_of_one_file_one_is_told_of_the_other(tmp_path, monkeypatch):
    sync, file = os.fsync, tmp_path / "report.html"

    def another_begins(descriptor: int) -> None:
        sync(descriptor)
        draft = tmp_path / "report.html.part"
        draft.unlink()
        draft.write_text("half of the other's")

    monkeypatch.setattr(os, "fsync", another_begins)
    with pytest.raises(OSError, match="another process writes it"):
        write_whole(file, "mine")
    assert not file.exists()


class TestNewFolder:
    def test_it_appears_whole(self, tmp_path):
        out = tmp_path / "a" / "out"
        with new_folder(out) as draft:
            (draft / "inner").mkdir()
            (draft / "inner" / "file").write_text("content")
            assert not out.exists()
        assert (out / "inner" / "file").read_text() == "content"
        assert list(out.parent.iterdir()) == [out]

    def test_an_empty_folder_is_filled_and_a_link_to_one_is_followed(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "link").symlink_to("out")
        with new_folder(tmp_path / "link") as draft:
            (draft / "file").touch()
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "out" / "file").is_file()

    @pytest.mark.parametrize(
        ("trouble", "kind", "said"),
        [
            (
                lambda draft: (draft / "none").read_text(),
                GraspError,
                r"out cannot be written \(No such file.*; nothing was",
            ),
            (lambda draft: 1 / 0, ZeroDivisionError, "division"),
            (
                lambda draft: os.kill(os.getpid(), signal.SIGTERM),
                Interrupted,
                r"^stopped by SIGTERM before .*out was complete; nothing was written$",
            ),
        ],
        ids=["files", "error", "signal"],
    )
    def test_what_ends_it_inside_leaves_nothing(self, tmp_path, trouble, kind, said):
        def work() -> None:
            with new_folder(tmp_path / "out") as draft:
                (draft / "file").touch()
                trouble(draft)

        with pytest.raises(kind, match=said):
            work()
        assert not list(tmp_path.iterdir())

    def test_a_second_writer_is_refused_and_the_first_goes_on(self, tmp_path):
        with new_folder(tmp_path / "out") as draft:
            with pytest.raises(RecipeError, match=r"out is being written by process"), new_folder(tmp_path / "out"):
                pytest.fail("two writers at once")
            (draft / "file").touch()
        with pytest.raises(RecipeError, match="exists and is not an empty folder"), new_folder(tmp_path / "out"):
            pytest.fail("written twice")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]

    def test_one_that_was_written_while_this_process_waited_is_left_alone(self, tmp_path, monkeypatch):
        fcntl = pytest.importorskip("fcntl")
        lock, out = fcntl.flock, tmp_path / "out"

        def late(descriptor: int, how: int) -> None:
            out.mkdir()
            (out / "file").touch()
            lock(descriptor, how)

        monkeypatch.setattr(fcntl, "flock", late)
        with pytest.raises(RecipeError, match="exists and is not an empty folder"), new_folder(out):
            pytest.fail("written twice")
        assert (out / "file").is_file()

    @pytest.mark.parametrize("left", ["folder", "link"])
    def test_what_a_killed_process_or_a_stranger_left_is_removed_and_never_followed(self, tmp_path, left):
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "file").write_text("of the user")
        if left == "link":
            (tmp_path / ".out.part").symlink_to(precious)
        else:
            (tmp_path / ".out.part").mkdir()
            (tmp_path / ".out.part" / "half").touch()
            (tmp_path / ".out.lock").write_text("{")
        with new_folder(tmp_path / "out") as draft:
            (draft / "file").write_text("new")
        assert {path.name for path in tmp_path.iterdir()} == {"out", "precious"}
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
        assert (precious / "file").read_text() == "of the user"

    def test_a_link_to_itself_is_one_line(self, tmp_path):
        (tmp_path / "loop").symlink_to("loop")
        with (
            pytest.raises(RecipeError, match="loop is a symbolic link that leads to itself"),
            new_folder(tmp_path / "loop"),
        ):
            pytest.fail("no such place")
