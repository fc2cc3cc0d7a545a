"""Steps that were lost, failed or cannot be read: what is left of them is of use, or it goes."""

import errno
from pathlib import Path
from typing import Any

import pytest

from grasp_lora.engine import store as module
from grasp_lora.engine.store import Store, key_of
from grasp_lora.errors import DivergedError, GraspError, RecipeError

TRAINED = {"trained_examples": 3, "dev_loss": 1.0}


@pytest.mark.parametrize(
    ("step", "result", "adapter", "kept"),
    [
        ("final 0.40", TRAINED, False, True),
        ("final 0.40", TRAINED, True, False),
        ("controller", TRAINED, False, False),  # it keeps no adapter
        ("test losses", {"losses": [1.0]}, False, False),
    ],
)
def test_checkpoints_of_a_killed_second_training_stay_until_it_is_done(
    tmp_path: Path, step: str, result: dict[str, Any], adapter: bool, kept: bool
) -> None:
    settings, key = {"a": 1}, key_of(step, {"a": 1})
    Store(tmp_path).get(step, settings, lambda *_: result)
    left = tmp_path / "work" / key / step.replace(" ", "-") / "of-the-training"
    left.mkdir(parents=True)
    if adapter:
        Store(tmp_path).adapter_folder(key).mkdir(parents=True)
    seen = []

    def again(key: str, folder: Path) -> dict[str, Any]:
        seen.append((folder / left.name).is_dir())
        return result

    store = Store(tmp_path)
    assert store.get(step, settings, again).result == result
    assert left.is_dir() == kept
    store.get(step, settings, again, redo=True)
    assert seen == [kept]
    assert not left.exists()


def test_a_training_that_diverged_is_not_tried_again_on_the_same_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def diverges(key: str, folder: Path) -> dict[str, Any]:
        tries.append(key)
        (folder / "checkpoint-5").mkdir(parents=True, exist_ok=True)
        raise DivergedError("the loss is not finite")

    def outer(store: Store) -> Any:
        return store.get("scores", {"of": 1}, lambda *_: store.get("final 0.40", {"a": 1}, diverges).result)

    with pytest.raises(DivergedError, match=r"^the loss is not finite$"):
        outer(Store(tmp_path))
    note = tmp_path / "work" / key_of("final 0.40", {"a": 1}) / "failed.json"
    assert list(tmp_path.rglob("failed.json")) == [note], "the step around it is not the one that failed"
    assert not list(tmp_path.rglob("checkpoint-*"))
    for _ in range(2):
        with pytest.raises(DivergedError, match=r"^the loss is not finite$"):
            outer(Store(tmp_path))
    assert len(tries) == 1
    assert f"final 0.40 failed here before and is not tried again until {note} is removed" in caplog.text
    monkeypatch.setattr(module, "made_with", lambda: {"torch": "another"})
    with pytest.raises(DivergedError, match=r"^the loss is not finite$"):
        outer(Store(tmp_path))
    monkeypatch.undo()
    assert len(tries) == 2
    note.unlink()
    assert Store(tmp_path).get("final 0.40", {"a": 1}, lambda *_: TRAINED).result == TRAINED
    assert not note.parent.exists()


def test_other_errors_leave_no_note(tmp_path: Path) -> None:
    def fails(key: str, folder: Path) -> dict[str, Any]:
        raise GraspError("the memory does not suffice")

    with pytest.raises(GraspError):
        Store(tmp_path).get("final 0.40", {"a": 1}, fails)
    assert not list(tmp_path.rglob("failed.json"))
    assert Store(tmp_path).get("final 0.40", {"a": 1}, lambda *_: TRAINED).result == TRAINED


def test_a_disk_that_does_not_answer_is_no_damaged_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path).get("final 0.40", {"a": 1}, lambda *_: TRAINED)
    [file] = (tmp_path / "records").iterdir()

    def out_of_reach(self: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(Path, "read_bytes", out_of_reach)
    with pytest.raises(RecipeError, match=r"cannot be read \(Input/output error\); try again"):
        Store(tmp_path).on_record("final 0.40", {"a": 1})
    monkeypatch.undo()
    file.write_text("{")
    with pytest.raises(RecipeError, match="is damaged; delete it"):
        Store(tmp_path).on_record("final 0.40", {"a": 1})


def test_seconds_of_a_step_leave_out_only_what_was_done_within_it_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that goes on after a kill counts its earlier seconds; one around it never had them."""
    monkeypatch.setattr(module, "_seconds_so_far", lambda folder: 100.0 if folder.name == "final-0.40" else 0.0)
    store = Store(tmp_path)
    inner = {"a": 1}
    outer = store.get("scores", {"of": 1}, lambda *_: store.get("final 0.40", inner, lambda *_: TRAINED).result)
    assert 100.0 <= store.get("final 0.40", inner, lambda *_: TRAINED).seconds < 110.0
    assert 0.0 <= outer.seconds < 10.0
