"""One writer at a time; whoever dies gives the folder free."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from grasp_lora.errors import Interrupted, RecipeError
from grasp_lora.storage import claims
from grasp_lora.storage.claims import LOCK_FILE, Busy, claim, new_folder
from grasp_lora.storage.writing import write_whole

HOLDER = """
import sys
from pathlib import Path
from grasp_lora.storage.claims import claim
with claim(Path(sys.argv[1]), wait=False, inside=True):
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the claim."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_refused_and_a_killed_one_blocks_nobody(tmp_path, holder):
    with (
        pytest.raises(Busy, match="is being written by another process; wait until"),
        claim(tmp_path, wait=False, inside=True),
    ):
        pytest.fail("two writers at once")
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK_FILE).is_file()
    with claim(tmp_path, wait=False, inside=True):
        pass
    assert not list(tmp_path.iterdir())


def test_who_waits_comes_in_once_a_holder_is_killed(tmp_path, holder):
    threading.Timer(0.2, holder.kill).start()
    with claim(tmp_path, wait=True, inside=True):
        assert holder.wait() == -signal.SIGKILL


def test_an_error_inside_frees_the_claim(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "step", wait=False):
        raise ZeroDivisionError
    with claim(tmp_path / "step", wait=False), pytest.raises(Busy), claim(tmp_path / "step", wait=False):
        pytest.fail("two writers at once")


@pytest.mark.parametrize("wait", [False, True])
def test_many_threads_are_never_inside_together(tmp_path, wait):
    """Each removes the lock file at its end, while others are about to lock it."""
    inside, most, entered = 0, 0, 0
    start = threading.Barrier(8)

    def work() -> None:
        nonlocal inside, most, entered
        start.wait()
        for _ in range(10):
            try:
                with claim(tmp_path / "step", wait=wait):
                    inside += 1
                    most = max(most, inside)
                    entered += 1
                    time.sleep(0)
                    inside -= 1
            except Busy:
                continue

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not list(tmp_path.iterdir())
    assert entered == 80 if wait else entered > 1


def test_the_first_of_several_ranks_holds_it_for_all(tmp_path, monkeypatch):
    with claim(tmp_path / "step", wait=False):
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(Busy), claim(tmp_path / "step", wait=False):
            pass  # an array of jobs may set RANK, too
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with claim(tmp_path / "step", wait=False):
            pass


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

    @pytest.mark.parametrize(
        ("trouble", "kind", "said"),
        [
            (lambda draft: (draft / "none").read_text(), RecipeError, r"cannot be written \(No such file.*; make room"),
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
            with (
                pytest.raises(RecipeError, match=r"out is being written by another process"),
                new_folder(tmp_path / "out"),
            ):
                pytest.fail("two writers at once")
            (draft / "file").touch()
        with pytest.raises(RecipeError, match="exists and is not an empty folder"), new_folder(tmp_path / "out"):
            pytest.fail("written twice")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]

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


def test_what_came_while_the_lock_was_awaited_is_not_overwritten(tmp_path, monkeypatch):
    out, at_once = tmp_path / "out", claims.claim

    @contextmanager
    def after_another(path, **how):
        with at_once(path, **how):
            out.mkdir()
            (out / "theirs").touch()
            yield

    monkeypatch.setattr(claims, "claim", after_another)
    with pytest.raises(RecipeError, match="exists and is not an empty folder"), new_folder(out):
        pytest.fail("a second writer began")
    assert [file.name for file in out.iterdir()] == ["theirs"]


@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_link_in_the_folder_of_a_run_is_not_followed(finished_run, cli, tmp_path, command):
    """A folder of a stranger: its files lead to what is precious."""
    (precious := tmp_path / "precious").mkdir()
    place = finished_run / ("adapter" if command == "run" else "compare")
    shutil.rmtree(place, ignore_errors=True)
    place.symlink_to(precious, target_is_directory=True)
    result = cli(command, "tiny.yaml", "--output", "run")
    assert result.status == 2, result.err
    assert f"error: run/{place.name} is a link, and an experiment writes only inside its own folder" in result.err
    assert not any(precious.iterdir())
    assert place.is_symlink()
