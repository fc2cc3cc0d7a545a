"""Resume equals uninterrupted, bit for bit; only whole checkpoints count; what cannot be written is said in one line."""

import errno
import functools
import gc
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from random_examples import factors, make_examples, random_merged, read_rows
from transformers import TrainerCallback

from grasp_lora.errors import GraspError, Interrupted
from grasp_lora.method.masks import MaskSettings
from grasp_lora.method.search import Controller, PaperPolicy, Rounds
from grasp_lora.models.adapters import attached
from grasp_lora.models.live import segments_of
from grasp_lora.storage import checkpoints as checkpoint_module
from grasp_lora.storage.checkpoints import (
    MANIFEST,
    complete,
    newest_checkpoint,
    remove_checkpoints,
    seconds_of,
    steps_between,
)
from grasp_lora.storage.writing import cannot_write, clear_write_errors, write_whole
from grasp_lora.training import trainer as trainer_module
from grasp_lora.training.controller import GraspController
from grasp_lora.training.probes import ProbeSet
from grasp_lora.training.pruned import PrunedTraining
from grasp_lora.training.trainer import finetune
from grasp_lora.training.training_settings import TrainingSettings

PAD = 0


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """The Trainer collects garbage each time: spare it half a second of looking through all modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


DEV, PROBES = make_examples(4, 1), ProbeSet(make_examples(3, 2))


class Killed(BaseException):
    pass


class Die(TrainerCallback):
    """At the end of a step, before a checkpoint is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


class Training:
    """One fine-tune in a folder, each time with a fresh model and fresh callbacks, as in a new process."""

    def __init__(self, make_tiny_model, folder, kind="plain", mask=None, examples=6, apart=False, **settings):
        self.apart = apart
        self.make_tiny_model, self.folder, self.kind, self.mask = make_tiny_model, folder / "stage", kind, mask
        self.train = make_examples(examples)
        self.settings = TrainingSettings(**{"epochs": 2, "learning_rate": 1e-2, "patience": 99, **settings})

    def run(self, save_every: int | None = 3, stop_at: int | None = None, die_at: int | None = None):
        """Train on; return all that the training has found."""
        # What came before in a new process: another state of every generator.
        torch.manual_seed(12345)
        random.seed(12345)
        steps = 0

        def stop() -> str | None:
            nonlocal steps
            steps += 1
            return "SIGTERM" if steps == stop_at else None

        backbone = self.make_tiny_model("llama")
        weights = random_merged(backbone, (3, 3 if self.apart else 2), 0.3, self.apart)
        callbacks, controller = [], None
        if self.kind == "controller":
            settings = Controller(PaperPolicy(), Rounds(2), "surrogate_at_end")
            controller = GraspController(PROBES, settings, self.mask, segments_of(weights), self.folder)
        elif self.kind != "plain":
            callbacks.append(PrunedTraining(0.5, PROBES, self.mask, self.kind, segments_of(weights)))
        callbacks += [Die(die_at)] if die_at else []
        more = {"pad_id": PAD, "seed": 1, "folder": self.folder, "callbacks": callbacks, "controller": controller}
        more["stop_requested"] = stop if save_every else None
        with pytest.MonkeyPatch.context() as patch, attached(backbone, weights, dropout=0.3) as model:
            patch.setattr(checkpoint_module, "LEAST_STEPS", save_every)
            result = finetune(model, self.train, DEV, self.settings, **more)
            left = [factor.detach().clone() for factor in factors(model)]
        pruned = controller or next(iter(callbacks), None)
        masks = pruned.masks.state() if isinstance(pruned, PrunedTraining) else {}
        search = {**vars(controller.search), "ratio": controller.prune_ratio} if controller else None
        files = {file.name: file.read_text() for file in self.folder.glob("[hr]*.jsonl")}  # history and rounds
        self.steps_asked = steps
        return left, masks, {"result": vars(result), "search": search, "files": files}


def assert_same(found, expected) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        assert torch.equal(one, other)
    assert found[1].keys() == expected[1].keys()
    for name, tensor in found[1].items():
        assert torch.equal(tensor, expected[1][name]), name
    assert found[2] == expected[2]


WAYS = {
    "plain": {},
    "loss logged every second step": {"examples": 12, "epochs": 1},
    "accumulation": {"accumulation": 3, "batch_size": 2, "epochs": 4, "evaluate_every": 0.5},
    "fractions of epochs": {"epochs": 1.5, "patience": None, "lr_decay": 0.5},
    "patience": {"patience": 2, "evaluate_every": 0.2, "learning_rate": 3e-2, "epochs": 3},
    "controller": {"kind": "controller"},
    "controller, inputs": {"kind": "controller", "mask": MaskSettings("input_aware")},
    "controller, gradient": {"kind": "controller", "mask": MaskSettings("gradient_of_delta"), "patience": None},
    "controller, adapters apart": {"kind": "controller", "apart": True, "patience": 2},
    "reselect, adapters apart": {"kind": "reselect", "apart": True, "mask": MaskSettings("gradient_of_delta")},
    "hold": {"kind": "hold", "mask": MaskSettings("input_aware")},
    "reselect": {"kind": "reselect", "mask": MaskSettings("gradient_of_delta")},
}


@pytest.fixture(scope="module")
def uninterrupted(make_tiny_model, tmp_path_factory):
    """What a training without checkpoints and without an interruption finds, by its way."""
    return functools.cache(
        lambda way: Training(make_tiny_model, tmp_path_factory.mktemp("whole"), **WAYS[way]).run(save_every=None)
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_stop_saves_and_a_resume_ends_in_the_same_bits(make_tiny_model, uninterrupted, tmp_path, way):
    expected = uninterrupted(way)
    steps = expected[2]["result"]["steps"]
    training = Training(make_tiny_model, tmp_path / "parts", **WAYS[way])
    for step in {1, steps // 2, steps - 1}:  # one in the middle of an epoch and, for most, one at an end of it
        remove_checkpoints(training.folder)
        with pytest.raises(Interrupted, match=rf"^stopped by SIGTERM at stage step {step}; run the same command again"):
            training.run(save_every=1000, stop_at=step)
        assert newest_checkpoint(training.folder).name == f"checkpoint-{step}"
        assert_same(training.run(), expected)
        # What was done is not done again; the last is not asked.
        assert training.steps_asked == max(0, steps - step - 1)


@pytest.mark.parametrize("way", ["plain", "controller", "reselect"])
def test_a_kill_after_a_checkpoint_cuts_off_what_came_later(make_tiny_model, uninterrupted, tmp_path, way):
    expected = uninterrupted(way)
    training = Training(make_tiny_model, tmp_path / "parts", **WAYS[way])
    with pytest.raises(Killed):
        training.run(save_every=5, die_at=9)
    if training.kind == "controller":
        with (training.folder / "rounds.jsonl").open("a") as file:
            file.write('{"round": 5, "cand')  # a line that the process was just writing
    assert newest_checkpoint(training.folder).name == "checkpoint-5"
    assert_same(training.run(save_every=5), expected)


def test_many_interruptions_end_in_the_same_bits(make_tiny_model, uninterrupted, tmp_path):
    expected = uninterrupted("controller")
    training = Training(make_tiny_model, tmp_path / "parts", "controller")
    for _ in range(5):
        with pytest.raises(Interrupted):
            training.run(stop_at=2)
    assert_same(training.run(), expected)
    assert [row["round"] for row in read_rows(training.folder / "timings.jsonl")] == list(range(1, 7))


def test_neither_saving_nor_a_stop_at_the_last_step_changes_anything(make_tiny_model, uninterrupted, tmp_path):
    training = Training(make_tiny_model, tmp_path, "controller")
    assert_same(training.run(save_every=2, stop_at=12), uninterrupted("controller"))
    names = sorted(path.name for path in training.folder.iterdir() if path.is_dir())
    assert names == ["checkpoint-10", "checkpoint-8"]  # the newest two; the last step needs none


@pytest.fixture
def stopped(make_tiny_model, tmp_path) -> Callable[..., tuple[Training, Path]]:
    """Give a training that was stopped at step 4, and its checkpoint."""

    def stop(kind: str = "plain") -> tuple[Training, Path]:
        training = Training(make_tiny_model, tmp_path, kind)
        with pytest.raises(Interrupted):
            training.run(stop_at=4)
        return training, newest_checkpoint(training.folder)

    return stop


def test_a_checkpoint_holds_no_pickle_of_ours_and_no_place_of_this_machine(stopped, tmp_path):
    _, found = stopped("controller")
    assert {file.name for file in found.iterdir()} == {
        "weights.safetensors", "controller.json", "controller.safetensors", "dev.json", "dev.safetensors",
        "loss.json", "loss.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST,
    }  # fmt: skip
    for file in found.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize(("steps_per_epoch", "steps", "expected"), [(50, 250, 25), (40, 2000, 40), (6, 6, 10)])
def test_checkpoints_are_ten_or_one_an_epoch(steps_per_epoch, steps, expected):
    assert steps_between(steps_per_epoch, steps) == expected


def make_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights.safetensors").write_bytes(bytes(range(100)) * 10)
    (path / "dev.json").write_text(json.dumps({"step": step}))
    complete(path, seconds=step / 4)
    return path


def test_the_newest_whole_one_is_that_of_the_most_steps(tmp_path, caplog):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None
    for step in (9, 10, 100):
        newest = make_checkpoint(tmp_path, step)
    assert newest_checkpoint(tmp_path) == newest
    assert seconds_of(newest) == 25.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]
    (newest / MANIFEST).rename(newest / f"{MANIFEST}.part")  # then it never happened
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"
    assert not newest.exists()
    assert not caplog.records


@pytest.mark.parametrize("remove", [remove_checkpoints, lambda folder: make_checkpoint(folder, 9)])
def test_a_kill_while_one_is_removed_leaves_nothing_that_looks_damaged(tmp_path, monkeypatch, caplog, remove):
    for step in (3, 6):
        make_checkpoint(tmp_path, step)

    def killed_half_way(folder: Path) -> None:
        (folder / "weights.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed_half_way)
        with pytest.raises(KeyboardInterrupt):
            remove(tmp_path)
    for checkpoint in list(tmp_path.iterdir()):
        if (checkpoint / MANIFEST).exists():
            assert (checkpoint / "weights.safetensors").exists()
    newest_checkpoint(tmp_path)
    assert not caplog.records


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("weights.safetensors", truncate, "weights.safetensors is missing or has changed"),
        ("weights.safetensors", flip, "weights.safetensors is missing or has changed"),
        ("dev.json", Path.unlink, "dev.json is missing or has changed"),
        (MANIFEST, lambda file: file.write_bytes(b""), "its manifest cannot be read"),
        (MANIFEST, lambda file: file.write_text('{"seconds": 1, "files": {"a": 1}}'), "its manifest cannot be read"),
    ],
)
def test_a_damaged_newest_is_reported_and_the_one_before_it_is_used(tmp_path, caplog, name, damage, reason):
    good, bad = make_checkpoint(tmp_path, 3), make_checkpoint(tmp_path, 6)
    damage(bad / name)
    assert newest_checkpoint(tmp_path) == good
    assert [record.getMessage() for record in caplog.records] == [
        f"{bad} is damaged ({reason}); it is removed and the one before it is used"
    ]
    caplog.clear()
    assert newest_checkpoint(tmp_path) == good
    assert not caplog.records
    damage(good / name)
    assert newest_checkpoint(tmp_path) is None


class Evil:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_that_runs_code_is_refused(stopped, tmp_path, name):
    training, found = stopped()
    torch.save(Evil(tmp_path / "ran"), found / name)
    complete(found, 1.0)
    with pytest.raises(GraspError, match="checkpoint-4 holds a file that is unsafe to load; remove it to start anew"):
        training.run()
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_other_callbacks_or_of_another_adapter_is_refused(stopped):
    training, found = stopped()
    training.kind = "controller"
    with pytest.raises(GraspError, match=r"checkpoint-4, which has to hold the state of the controller: No such file"):
        training.run()
    training.kind = "plain"
    safetensors.torch.save_file({"other": torch.zeros(2)}, found / "weights.safetensors")
    complete(found, 1.0)
    with pytest.raises(GraspError, match="checkpoint-4 is of another adapter; remove it to start anew"):
        training.run()


FULL = OSError(errno.ENOSPC, "No space left on device")
RUST = safetensors.SafetensorError("I/O error: Read-only file system (os error 30)")
TORCH = RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing\nframe #0")


@pytest.mark.parametrize(
    ("place", "name", "error", "said"),
    [
        (trainer_module, "save_file", RUST, "Read-only"),
        (checkpoint_module, "save_file", FULL, "No space"),
        (torch, "save", TORCH, "MB are free there"),
        (checkpoint_module, "sync", FULL, "No space"),
        (checkpoint_module, "write_whole", FULL, "No space"),
    ],
    ids=["weights", "state", "torch", "sync", "manifest"],
)
def test_a_disk_that_fails_is_one_line_and_the_last_good_checkpoint_stays(
    make_tiny_model, uninterrupted, tmp_path, monkeypatch, place, name, error, said
):
    def fail(*arguments, **options):
        raise error

    training = Training(make_tiny_model, tmp_path, "controller")
    with pytest.raises(Interrupted):
        training.run(stop_at=3)
    good = {file.name: file.read_bytes() for file in (training.folder / "checkpoint-3").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail)
        with pytest.raises(GraspError, match=rf"stage cannot be written \(.*{said}"):
            training.run()
    assert {file.name: file.read_bytes() for file in (training.folder / "checkpoint-3").iterdir()} == good
    assert newest_checkpoint(training.folder).name == "checkpoint-3"
    assert_same(training.run(), uninterrupted("controller"))


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "file.json"
    write_whole(file, "old")
    monkeypatch.setattr(os, "fsync", lambda *_: file.mkdir())  # fails
    with pytest.raises(OSError, match="File exists"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_only_errors_of_the_folder_are_translated(tmp_path):
    for other in (ConnectionResetError(errno.ECONNRESET, "reset"), FileNotFoundError(errno.ENOENT, "no", "/elsewhere")):
        with pytest.raises(type(other)), clear_write_errors(tmp_path):
            raise other
    with pytest.raises(GraspError, match=r"cannot be written \(denied\)"), clear_write_errors(tmp_path):
        raise PermissionError(errno.EACCES, "denied", str(tmp_path / "a" / "b"))
    with pytest.raises(GraspError, match=r"cannot be written \(full: /elsewhere/cache\)"), clear_write_errors(tmp_path):
        raise OSError(errno.ENOSPC, "full", "/elsewhere/cache")
    assert "has vanished" in str(cannot_write(tmp_path / "gone", "no"))
