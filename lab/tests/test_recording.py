"""A recorded landscape: everything is in the file, nothing is done twice, and final runs are those of a comparison."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import record as recording
from conftest import CliResult, write_tiny_workspace
from landscape import Landscape
from record import FINAL_RATIOS, LANDSCAPE_FILE, RecordingSettings, record
from recorder import Recorder, session_of

from grasp_lora.bench.compare import ComparisonSettings, compare
from grasp_lora.bench.keyed import GRID
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import Record
from grasp_lora.errors import RecipeError
from grasp_lora.storage.claims import claim

SMALL = RecordingSettings((0.2, 0.6), (0.0, 0.4, None), (0.0, 0.4, 0.8), every=4)
SMALL_OPTIONS = ("--ratios", "0.2,0.6", "--train-ratios", "0,0.4,shared", "--probe-ratios", "0,0.4,0.8", "--every", "4")
TRAJECTORIES = ["trajectory 0.00", "trajectory 0.40", "trajectory shared", "trajectory shared dev"]


class Counting(Recorder):
    """Remembers the units, too."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 0.0

    def begin(self, units: float, finished: float = 0.0) -> None:
        self.left = units

    def done(self, units: float) -> None:
        assert units > 0
        self.left -= units


def run(folder: Path, settings: RecordingSettings = SMALL, *overrides: str) -> tuple[Landscape, Counting]:
    recorder = Counting()
    return record(session_of(*overrides, progress=recorder), folder, settings), recorder


def same(one: Landscape, other: Landscape) -> bool:
    return (
        one.facts == other.facts
        and one.finals == other.finals
        and len(one.trajectories) == len(other.trajectories)
        and all(
            (a.train_ratio, a.split, a.steps, a.ratios) == (b.train_ratio, b.split, b.steps, b.ratios)
            and np.array_equal(a.losses, b.losses)
            for a, b in zip(one.trajectories, other.trajectories, strict=True)
        )
    )


@pytest.fixture
def command(cli, capsys) -> Callable[..., CliResult]:
    """Give `command("tiny.yaml", ...)`, which calls the script in this process; `cli` restores the logger."""

    def call(*arguments: object) -> CliResult:
        capsys.readouterr()
        status = recording.main([*map(str, arguments)])
        output = capsys.readouterr()
        return CliResult(status, output.out, output.err)

    return call


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path) -> tuple[Path, Landscape]:
    """The folder and the content of a small recording; treat it as read-only."""
    recipe = write_tiny_workspace(tmp_path_factory.mktemp("recording") / "work", tiny_backbone_folder)
    folder = recipe.parent / "landscape"
    return folder, record(session_of(recipe=recipe), folder, SMALL, command="python lab/record.py tiny.yaml")


def test_a_landscape_holds_trajectories_and_final_runs(recorded):
    _, landscape = recorded
    assert [one.train_ratio for one in landscape.trajectories] == [0.0, 0.4, None, None]
    assert [one.split for one in landscape.trajectories] == ["micro_dev"] * 3 + ["dev"]
    for one in landscape.trajectories:
        assert one.steps == (0, 4, 8, 10)  # the last step, too
        assert one.ratios == (0.0, 0.4, 0.8)
        assert one.losses.shape == (4, 3, 6 if one.split == "dev" else 4)
    first = [one.losses[0] for one in landscape.trajectories[:3]]
    assert all(np.array_equal(losses, first[0]) for losses in first)
    assert len({one.losses[-1].tobytes() for one in landscape.trajectories}) == 4
    assert [one.ratio for one in landscape.finals] == [0.0, 0.2, 0.6]
    for one in landscape.finals:
        assert {split: len(losses) for split, losses in one.losses.items()} == {"micro_dev": 4, "dev": 6, "test": 8}
        assert (one.steps, one.trained_examples, one.measured_examples) == (10, 10, 12)
    assert len({one.losses["test"] for one in landscape.finals}) == 3


def test_the_file_holds_what_was_recorded_and_from_what(recorded):
    folder, landscape = recorded
    saved = Landscape.load(folder / LANDSCAPE_FILE)
    assert saved.facts == landscape.facts
    for one, other in zip(saved.committed, landscape.committed, strict=True):
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-6)
    facts = landscape.facts
    assert (facts["name"], facts["seed"], facts["dtype"], facts["language"]) == ("tiny", 42, "float32", "de")
    assert facts["examples"] == {"train": 10, "micro_dev": 4, "dev": 6, "test": 8}
    assert (facts["steps"], facts["every"], facts["probe_every"], facts["trained_examples"]) == (10, 4, 3, 10)
    assert facts["command"] == "python lab/record.py tiny.yaml"
    assert len(facts["made_with"]) == 1


def test_trajectories_end_where_a_training_without_measurements_ends(recorded, tiny_workspace):
    _, landscape = recorded
    few = RecordingSettings((0.2,), (0.4,), (0.0, 0.4, 0.8), every=99)
    alone, _ = run(tiny_workspace / "few", few)
    assert alone.trajectories[0].steps == (0, 10)
    assert np.array_equal(alone.trajectories[0].losses[-1], landscape.committed[1].losses[-1])


class Killed(BaseException):
    """Ends a recording as a kill would."""


@pytest.mark.parametrize("step", [3, 8])
def test_an_interrupted_recording_goes_on_without_repeating_a_step(tiny_workspace, recorded, step):
    class Kill(Counting):
        def record(self, record: Record, there: bool) -> None:
            super().record(record, there)
            if len(self.did) == step:
                raise Killed

    first = Kill()
    folder = tiny_workspace / "one"
    with pytest.raises(Killed):
        record(session_of(progress=first), folder, SMALL)
    assert not (folder / LANDSCAPE_FILE).exists()
    landscape, second = run(folder)
    assert len(set(first.did)) == step
    done = first.did + second.did
    assert [name for name in done if name.startswith("trajectory")] == TRAJECTORIES
    assert [name for name in done if name.startswith("final")] == ["final 0.00", "final 0.20", "final 0.60"]
    assert len(done) == 2 + 4 + 3 * 4  # parents, trajectories, final runs with three splits each
    whole = Landscape(landscape.facts, recorded[1].trajectories, recorded[1].finals)
    assert same(landscape, whole)
    assert second.left == pytest.approx(0.0)


def test_a_finished_recording_does_nothing_again(tiny_workspace, monkeypatch):
    landscape, _ = run(tiny_workspace / "one")
    text = (tiny_workspace / "one" / LANDSCAPE_FILE).read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be trained or measured")

    monkeypatch.setattr("grasp_lora.training.finetune.finetune", fail)
    monkeypatch.setattr(Session, "losses", fail)
    again, recorder = run(tiny_workspace / "one")
    assert not recorder.did
    assert same(again, landscape)
    assert (tiny_workspace / "one" / LANDSCAPE_FILE).read_bytes() == text


def test_final_runs_are_those_of_a_comparison_in_the_same_folder(tiny_workspace):
    folder = tiny_workspace / "both"
    settings = ComparisonSettings(("adaptive_merge", "grid"), (42,), (0.2, 0.6), "grid", resamples=1000)
    content = compare(session_of(), folder, settings).to_json()
    landscape, recorder = run(folder)
    assert set(recorder.did) == {*TRAJECTORIES, "micro_dev losses", "dev losses"}
    assert recorder.did.count("dev losses") == 3  # example by example; a comparison needs their means only
    assert recorder.found.count("test losses") == 3
    losses = {point["prune_ratio"]: point["dev"] for point in content["curve"]}
    for one in landscape.finals[1:]:
        assert sum(one.losses["dev"]) / 6 == pytest.approx(losses[one.ratio])
    assert (folder / "compare/compare.json").is_file()


def test_more_ratios_do_only_what_is_new(tiny_workspace):
    run(tiny_workspace / "one")
    more = RecordingSettings((0.2, 0.6, 0.8), SMALL.train_ratios, SMALL.probe_ratios, SMALL.every)
    landscape, recorder = run(tiny_workspace / "one", more)
    assert [name for name in recorder.did if "losses" not in name] == ["final 0.80"]
    assert len(landscape.finals) == 4


def test_the_default_ratios_are_those_that_a_comparison_asks_for():
    assert len(FINAL_RATIOS) == 15
    assert set(GRID) < set(FINAL_RATIOS)
    assert RecordingSettings().probe_ratios == (0.0, *GRID)


def test_neither_rounds_nor_metrics_nor_an_open_ratio_are_needed(tiny_workspace):
    settings = RecordingSettings((0.2,), (0.4,), (0.0, 0.8))
    overrides = ("controller.rounds.every=99", "metrics=[bertscore]", "final.prune_ratio=0.3")
    landscape, _ = run(tiny_workspace / "one", settings, *overrides)
    assert landscape.trajectories[0].steps == (0, 2, 4, 6, 8, 10)  # ten steps, not more than eight measurements
    assert [one.ratio for one in landscape.finals] == [0.0, 0.2]


def test_the_command_prints_the_final_runs(tiny_workspace, command):
    result = command("tiny.yaml", *SMALL_OPTIONS, "--set", f"data.root={tiny_workspace}", "--set", "seed=7")
    assert result.status == 0, result.err
    landscape = Landscape.load(Path("runs/tiny-landscape") / LANDSCAPE_FILE)
    words = ("--every", "4", *SMALL_OPTIONS[:-2], "--set", "seed=7")  # where the data lies is a machine's own
    assert landscape.facts["command"] == " ".join(["python lab/record.py tiny.yaml", *words])
    assert all(name in result.out for name in ("trajectory of shared ratios", "final run at ratio 0.6"))
    best = min(landscape.finals, key=lambda one: sum(one.losses["dev"]))
    assert f"lowest dev loss at ratio {best.ratio:g}" in result.out
    assert f"{sum(best.losses['dev']) / 6:.4f}" in result.out


def test_a_signal_stops_a_recording_with_status_75_and_it_goes_on(tiny_workspace, command, monkeypatch):
    finetuned = Bench.finetuned

    def interrupted(self: Bench, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return finetuned(self, *args, **kwargs)

    monkeypatch.setattr(Bench, "finetuned", interrupted)
    stopped = command("tiny.yaml", *SMALL_OPTIONS)
    assert stopped.status == 75
    assert stopped.err == "stopped by SIGTERM in the final run at ratio 0; run the same command again to go on\n"
    monkeypatch.setattr(Bench, "finetuned", finetuned)
    resumed = command("tiny.yaml", *SMALL_OPTIONS)
    assert resumed.status == 0
    assert "trajectory 0.40" not in resumed.out
    assert "final 0.00" in resumed.out


def test_two_recordings_never_write_into_one_folder(tiny_workspace, command):
    (tiny_workspace / "one").mkdir()
    with claim(tiny_workspace / "one", wait=False, inside=True):
        result = command("tiny.yaml", *SMALL_OPTIONS, "--output", "one")
    assert result.status == 2
    assert "is being written by" in result.err


def test_the_dev_set_is_measured_along_the_same_shared_training(recorded, tiny_workspace):
    _, landscape = recorded
    assert landscape.shared_dev is not None
    assert landscape.shared_dev.losses.shape[2] == 6
    settings = RecordingSettings((0.2,), (0.4, None), (0.0, 0.8), every=99, dev=False)
    without, recorder = run(tiny_workspace / "one", settings)
    assert without.shared_dev is None
    assert "trajectory shared dev" not in recorder.did
    # At ratio 0, before training, the dev losses are those of the merge: `final 0.00` measures them, too, if it is not trained.
    untrained, _ = run(tiny_workspace / "two", replace(settings, dev=True), "final.training.learning_rate=1e-12")
    assert untrained.shared_dev is not None
    assert untrained.shared_dev.losses[0, 0] == pytest.approx(untrained.finals[0].losses["dev"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratios", "0.5,1.5"), "ratios holds 1.5; each prune ratio must be a fraction in [0, 1]"),
        (("--ratios", "nan"), "ratios holds nan"),
        (("--ratios", "0"), "ratios names 0 alone"),
        (("--ratios", ","), "ratios is empty"),
        (("--ratios", "0.5,half"), "--ratios holds 'half'; give numbers"),
        (("--train-ratios", "0.4,-1"), "holds -1.0; each prune ratio"),
        (("--train-ratios", "shared"), "train_ratios besides the shared one is empty; give at least one"),
        (("--train-ratios", "0,shared,shared"), "train_ratios names shared more than once"),
        (("--train-ratios", "share"), "--train-ratios holds 'share'; give numbers or shared"),
        (("--probe-ratios", "0,0.1,0.1"), "probe_ratios names 0.1 more than once"),
        (("--every", "0"), "every is 0; it must be at least 1 optimizer step"),
        (("--set", "data.target.test=0"), "a landscape needs a test split, but data.target.test is 0"),
        (("--set", "data.target.dev=0"), "a landscape needs a dev split"),
        (("--set", "data.target.micro_dev=0"), "a landscape needs a micro_dev split"),
        (("--set", "data.source=null"), "there is no source"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(tiny_workspace, command, arguments, message):
    result = command("tiny.yaml", *arguments)
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert result.err.startswith("error: ")
    assert message in result.err
    assert not (tiny_workspace / "runs").exists()


@pytest.mark.parametrize("dev", [True, False])
def test_more_losses_than_can_be_read_again_are_refused_before_the_work(tiny_workspace, monkeypatch, dev):
    settings = replace(SMALL, dev=dev)
    run(tiny_workspace / "one", settings)
    rows = pq.read_metadata(tiny_workspace / "one" / LANDSCAPE_FILE).num_rows
    monkeypatch.setattr(recording, "MOST_ROWS", rows - 1)
    with pytest.raises(
        RecipeError, match=f"would have {rows} losses, of which {rows - 1} are allowed; measure less often"
    ):
        run(tiny_workspace / "two", settings)
    assert not (tiny_workspace / "two").exists()


def test_a_damaged_record_stops_the_recording(tiny_workspace):
    run(tiny_workspace / "one")
    file = next((tiny_workspace / "one/store/records").glob("trajectory-shared-*"))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(RecipeError, match="is damaged; delete it"):
        run(tiny_workspace / "one")
