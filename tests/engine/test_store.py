"""The store of steps: each is done once, what is half done counts for nothing, and what cannot be read is named."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grasp_lora.engine import store as module
from grasp_lora.engine.results import Learned, Losses, Trained
from grasp_lora.engine.store import Store, key_of
from grasp_lora.errors import DivergedError, GraspError, RecipeError
from grasp_lora.method.rules import RatioEstimate
from grasp_lora.models.adapter_files import CONFIG_FILE, OUR_FILE, WEIGHTS_FILE
from grasp_lora.storage.checkpoints import complete
from grasp_lora.storage.claims import Busy, claim

INPUTS = {"a": 1}
LOSSES = Losses(losses=[1.0, 0.1], measured_examples=2)
TRAINED = Trained(steps=3, best_step=2, dev_loss=0.5, history=[{"step": 3, "loss": 0.1}], trained_examples=3)
FOLDER = f"step-{key_of('step', INPUTS)}"


def never(folder: Path) -> Losses:
    pytest.fail("it is done again")


def failing(error: BaseException) -> Callable[[Path], Losses]:
    def work(folder: Path) -> Losses:
        raise error

    return work


def test_a_step_is_done_once_and_read_ever_after(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.step("step", INPUTS, Losses, lambda folder: LOSSES)
    assert store.step("step", INPUTS, Losses, never) is first
    again = Store(tmp_path).step("step", INPUTS, Losses, never)
    assert (again, again.repeated, first.repeated) == (first, True, False)
    assert (again.result, again.folder) == (LOSSES, tmp_path / FOLDER)
    assert Store(tmp_path).step("step", {"a": 2}, Losses, lambda folder: Losses(losses=[])).key != first.key
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"done.json", "result.json"}


def test_a_result_that_cannot_be_read_is_not_done(tmp_path: Path) -> None:
    of_their_own = RatioEstimate(0.4, 0.2, 0.6, "mine", 2, curve=(0.0, 1.0))  # type: ignore[arg-type]
    wrong = Learned(estimate=of_their_own, rounds=[], timings=[], history=[], steps=1)
    with pytest.warns(UserWarning, match="curve"), pytest.raises(RecipeError, match=r"result\.json"):
        Store(tmp_path).step("step", INPUTS, Learned, lambda folder: wrong)
    assert Store(tmp_path).step("step", INPUTS, Losses, lambda folder: LOSSES).result == LOSSES


def test_what_was_not_finished_goes_on_and_its_work_goes(tmp_path: Path) -> None:
    def killed(folder: Path) -> Losses:
        complete_checkpoint(folder / "work/checkpoint-1")
        (folder / "result.json").write_text("{")  # as a kill while it is written would not leave it
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).step("step", INPUTS, Losses, killed)

    def goes_on(folder: Path) -> Losses:
        assert (folder / "work/checkpoint-1").is_dir()
        return LOSSES

    assert Store(tmp_path).step("step", INPUTS, Losses, goes_on).result == LOSSES
    assert not (tmp_path / FOLDER / "work").exists()
    assert not list(tmp_path.rglob("*.lock"))


def test_a_kill_between_result_and_done_does_the_step_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "sync_all", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path).step("step", INPUTS, Losses, lambda folder: LOSSES)
    assert (tmp_path / FOLDER / "result.json").is_file()
    other = Losses(losses=[2.0])
    assert Store(tmp_path).step("step", INPUTS, Losses, lambda folder: other).result == other


@pytest.mark.parametrize(
    "lost", ["result.json", *(f"adapter/{name}" for name in (WEIGHTS_FILE, CONFIG_FILE, OUR_FILE)), "cut off"]
)
def test_a_training_of_which_a_file_is_gone_is_done_again(lost: str, tmp_path: Path) -> None:
    """As after a copy that was broken off: what is handed over would be half an adapter."""
    tries = []

    def train(folder: Path) -> Trained:
        tries.append(folder)
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.ones(9)}, folder / "adapter/adapter_model.safetensors")
        for name in (CONFIG_FILE, OUR_FILE):
            (folder / "adapter" / name).write_text("{}")
        return TRAINED

    made = Store(tmp_path).step("step", INPUTS, Trained, train)
    assert Store(tmp_path).step("step", INPUTS, Trained, train).repeated
    assert (made.trains, len(tries)) == (True, 1)
    weights = made.folder / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4]) if lost == "cut off" else (made.folder / lost).unlink()
    assert Store(tmp_path).step("step", INPUTS, Trained, train).result == made.result
    assert len(tries) == 2


def test_another_process_at_a_step_is_busy_and_its_result_is_taken(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with claim(tmp_path / FOLDER, wait=False):
        with pytest.raises(Busy):
            store.step("step", INPUTS, Losses, never)
        other = Store(tmp_path).step("other", INPUTS, Losses, lambda folder: LOSSES)  # each step has a lock of its own
    assert not other.repeated
    Store(tmp_path).step("step", INPUTS, Losses, lambda folder: LOSSES)
    assert store.step("step", INPUTS, Losses, never).repeated  # to be busy is no failure


def test_a_step_that_another_process_has_just_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_the_other(place: Path, **how: bool) -> object:
        monkeypatch.setattr(module, "claim", claim)
        Store(tmp_path).step("step", INPUTS, Losses, lambda folder: LOSSES)
        return claim(place, **how)

    monkeypatch.setattr(module, "claim", after_the_other)
    assert Store(tmp_path).step("step", INPUTS, Losses, never).result == LOSSES


def complete_checkpoint(folder: Path, seconds: float = 1.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text("{}")
    complete(folder, seconds)


@pytest.mark.parametrize("kind", [GraspError, DivergedError])
def test_what_failed_is_not_tried_again_by_this_process(kind: type[GraspError], tmp_path: Path) -> None:
    store = Store(tmp_path)
    for work in (failing(kind("the memory does not suffice")), never):
        with pytest.raises(kind, match=r"^the memory does not suffice$"):
            store.step("step", INPUTS, Losses, work)
    assert not list(tmp_path.rglob("*.json"))
    assert Store(tmp_path).step("step", INPUTS, Losses, lambda folder: LOSSES).result == LOSSES


def test_seconds_of_all_attempts_count(tmp_path: Path) -> None:
    def killed(folder: Path) -> Losses:
        complete_checkpoint(folder / "work/checkpoint-5", 100.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).step("step", INPUTS, Losses, killed)
    assert 100.0 <= Store(tmp_path).step("step", INPUTS, Losses, lambda folder: LOSSES).seconds < 110.0


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("done.json", "{", "Invalid JSON"),
        ("done.json", "[]", "Input should be"),
        (
            "done.json",
            '{"step": "a", "key": "b", "inputs": {}, "seconds": NaN, "made_with": {}, "version": 2}',
            "seconds: ",
        ),
    ],
)
def test_a_damaged_file_is_named(file: str, content: str, message: str, tmp_path: Path) -> None:
    Store(tmp_path).step("step", INPUTS, Losses, lambda folder: LOSSES)
    place = tmp_path / FOLDER / file
    place.write_text(content)
    with pytest.raises(RecipeError, match=f"{place}: {message}"):
        Store(tmp_path).step("step", INPUTS, Losses, never)


@pytest.mark.parametrize("content", ["{", '{"losses": []}', '{"losses": [0.5]}'])
def test_a_result_that_is_not_as_it_was_written_is_done_again(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Store(tmp_path).step("step", INPUTS, Losses, lambda folder: LOSSES)
    (tmp_path / FOLDER / "result.json").write_text(content)
    assert Store(tmp_path).step("step", INPUTS, Losses, lambda folder: LOSSES).result == LOSSES
    assert caplog.text.count("it is done again") == 1


def test_a_step_whose_inputs_were_edited_is_done_again(tmp_path: Path) -> None:
    Store(tmp_path).step("step", INPUTS, Losses, lambda folder: LOSSES)
    done = tmp_path / FOLDER / "done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"inputs": {"a": 2}}))
    other = Losses(losses=[2.0])
    assert Store(tmp_path).step("step", INPUTS, Losses, lambda folder: other).result == other


def test_a_disk_that_does_not_answer_is_no_unfinished_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path).step("step", INPUTS, Losses, lambda folder: LOSSES)
    monkeypatch.setattr(Path, "read_bytes", failing(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(RecipeError, match=r"done\.json: Input/output error"):
        Store(tmp_path).step("step", INPUTS, Losses, never)
