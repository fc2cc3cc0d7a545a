"""`final.all_rows`: what was chosen is trained once more on every row outside the test, and nothing else changes."""

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny_workspace
from recorder import Recorder, files_of, read, rows_of, run_tiny, session_of, steps_of, weights_in

from grasp_lora.data.encode import Example
from grasp_lora.engine import all_rows as module
from grasp_lora.engine import deliver
from grasp_lora.engine.compare import compare
from grasp_lora.engine.comparison import ComparisonSettings
from grasp_lora.engine.run import run
from grasp_lora.engine.run_folder import Delivered
from grasp_lora.errors import DivergedError, Interrupted, RecipeError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.models.adapter_files import read_adapter
from grasp_lora.training import trainer as training_module
from grasp_lora.training.training_settings import TrainingSettings

BEST = ("final.deliver=best", "target.training.epochs=3", "final.training.epochs=2", "final.training.patience=null")
AGAIN = (*BEST, "final.all_rows=true")
TRAINED = {"target": ["target"], "merged": ["target"], "continued": ["final"], "grasp": ["target", "final"]}
Training = tuple[str, list[Example], list[Example], TrainingSettings]


def equal(one: AdapterWeights, other: AdapterWeights) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(getattr(one[name], factor), getattr(other[name], factor)) for name in one for factor in "AB"
    )


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a run choose a system, whatever the rows say."""

    def choosing(name: str) -> None:
        chosen = Delivered(name=name, title=name, why=f"It is {name}.", split="dev", examples=6)
        monkeypatch.setattr(deliver, "best_of", lambda *_: chosen)

    return choosing


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Training]:
    """What each training was given: its step, its train and dev rows, its settings."""
    noted: list[Training] = []
    finetune = training_module.finetune

    def note(model: Any, train: Any, dev: Any, *, settings: TrainingSettings, folder: Path, **more: Any) -> Any:
        noted.append((folder.parent.name.partition("-")[0], list(train), list(dev), settings))
        return finetune(model, train, dev, settings=settings, folder=folder, **more)

    monkeypatch.setattr(training_module, "finetune", note)
    return noted


@pytest.fixture(scope="module")
def chosen_run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path) -> Path:
    """The folder of a run that has all up to the choice; treat it as read-only."""
    recipe = write_tiny_workspace(tmp_path_factory.mktemp("chosen") / "work", tiny_backbone_folder)
    run(session_of(*BEST, recipe=recipe), recipe.parent / "before")
    return recipe.parent / "before"


@pytest.fixture
def before(chosen_run: Path, tiny_workspace: Path) -> Path:
    """A copy of it in the working folder."""
    return Path(shutil.copytree(chosen_run, tiny_workspace / "before"))


@pytest.mark.parametrize("winner", list(TRAINED))
def test_what_was_chosen_is_trained_again_on_every_row_but_those_of_the_test(
    winner: str, before: Path, choose: Callable[[str], None], trainings: list[Training]
) -> None:
    choose(winner)
    shutil.copytree(before / "store", "again/store")
    whole = run_tiny(*AGAIN, folder="again")
    metrics, facts = whole.metrics, whole.metrics.all_rows
    assert facts is not None
    # All up to the choice is what it is without the key: no row of dev, micro-dev or test has reached it.
    systems = read(before / "metrics.json")["systems"]
    assert {name: asdict(metrics.systems[name]) for name in systems} == systems
    splits = session_of().splits
    assert [step for step, *_ in trainings] == TRAINED[winner]
    for _, train, dev, _ in trainings:
        assert train == [*splits.train, *splits.dev, *splits.micro_dev]
        assert not dev
    assert facts.rows == 20
    assert [training.steps(20) for *_, training in trainings] == [count for count in facts.steps.values() if count]
    for name, count in facts.steps.items():  # as many epochs: twice the rows, twice the steps
        made = whole.adapters["final" if name == "grasp" else name].made
        assert made is not None
        assert count == 2 * made.result.best_step
    assert metrics.systems["all_rows"].dev_loss is None
    assert metrics.systems["all_rows"].test_loss != metrics.systems[winner].test_loss
    rivals = weights_in(Path("again", "final" if winner == "grasp" else winner))
    assert weights_in("again/adapter") == weights_in("again/all_rows") != rivals
    assert metrics.handed_over == "all_rows"
    if winner != "merged":  # of a merge there is no training by itself
        assert rows_of("again/all_rows/history.jsonl")[-1]["step"] == list(facts.steps.values())[-1]
    tested = {row["id"] for row in rows_of("again/evaluation/all_rows.jsonl")}
    assert tested == set(read("again/data.json")["ids"]["test"])
    assert facts.why.startswith("The choice was made with 10 training rows.")


def test_the_adapter_is_that_of_a_plain_training_on_all_rows(
    tiny_workspace: Path, choose: Callable[[str], None]
) -> None:
    choose("target")
    changes = (*AGAIN, "target.training.accumulation=3")
    run = run_tiny(*changes, folder="again")
    facts, first = run.metrics.all_rows, run.adapters["target"].made
    assert facts is not None
    assert first is not None
    steps = steps_of(*changes)
    rows, training = steps.splits, steps.recipe.target.training
    everything = replace(rows, train=(*rows.train, *rows.dev, *rows.micro_dev), dev=(), micro_dev=())
    epochs = first.result.best_step / training.steps_per_epoch(10)
    plain = replace(training, epochs=epochs, patience=None, keep="last")
    steps.splits = steps.session.splits = everything
    trained = steps._train("target", ("train",), (), plain)
    assert trained.made is not None
    assert trained.made.result.steps == facts.steps["target"]
    assert equal(trained.weights, read_adapter("again/adapter").weights)


@pytest.mark.parametrize(
    ("winner", "changes", "reason"),
    [
        ("source", (), "no part of it was trained on target rows"),
        ("merged", ("target.adapter=run/target",), "no part of it was trained on target rows"),
        ("continued", ("final.training.learning_rate=1e-30",), "discarded"),
        (
            "target",
            ("data.target.dev=0", "data.target.micro_dev=0", "final.prune_ratio=0.5"),
            "no dev and micro-dev rows",
        ),
    ],
)
def test_where_there_is_nothing_to_train_one_line_says_so(
    winner: str, changes: Sequence[str], reason: str, finished_run: Path, before: Path, choose: Callable[[str], None]
) -> None:
    choose(winner)
    shutil.copytree(before / "store", "again/store")
    if winner == "continued":  # else a single source that no step improved is no candidate
        changes = (*changes, "source.adapters=[run/source, run/target]", "data.source=null")
    metrics = run_tiny(*AGAIN, *changes, folder="again").metrics
    assert metrics.all_rows is not None
    assert reason in metrics.all_rows.why
    assert not metrics.all_rows.steps
    assert metrics.handed_over == winner
    assert weights_in("again/adapter") == weights_in(Path("again", winner))
    assert not Path("again/all_rows").exists()


def test_a_final_run_that_was_discarded_leaves_the_pruned_merge(
    tiny_workspace: Path, choose: Callable[[str], None]
) -> None:
    choose("grasp")
    metrics = run_tiny(*AGAIN, "final.training.learning_rate=1e-30", folder="again").metrics
    assert metrics.all_rows is not None
    assert metrics.all_rows.steps["grasp"] == 0 < metrics.all_rows.steps["target"]
    weights = read_adapter("again/adapter").weights
    factors = [getattr(pair, factor) for pair in weights.values() for factor in "AB"]
    zeros, size = (sum(int(count) for count in counts) for counts in zip(*((
        (factor == 0).sum(), factor.numel()) for factor in factors), strict=True))  # fmt: skip
    assert zeros / size == pytest.approx(metrics.prune_ratio, abs=0.02)
    assert not equal(weights, read_adapter("again/final").weights)  # it rests on the new target adapter


@pytest.mark.parametrize("change", ["mask.score=input_aware", "final.mode=reselect", "merge.rule=paper_apart"])
def test_pruned_and_not_trained_is_the_final_run_before_its_first_step(tiny_workspace: Path, change: str) -> None:
    steps = steps_of("final.training.learning_rate=1e-30", change)
    merged = steps.parents().merged
    final = steps.finetune(merged, 0.4)
    assert final.made is not None
    assert final.made.result.best_step == 0
    assert equal(module._pruned(steps, merged, 0.4).together(), final.weights)


def test_a_run_that_is_stopped_in_it_goes_on_to_the_same_bits(
    before: Path, choose: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose("grasp")
    for folder in ("whole", "again"):
        shutil.copytree(before / "store", f"{folder}/store")
    whole = run_tiny(*AGAIN, folder="whole")
    finetune = training_module.finetune

    def stopped(model: Any, train: Any, *rest: Any, **more: Any) -> Any:
        if len(train) == 20 and more["folder"].parent.name.startswith("final"):
            os.kill(os.getpid(), signal.SIGTERM)
        return finetune(model, train, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(training_module, "finetune", stopped)
        with pytest.raises(Interrupted, match=r"final-0.* step 1; run the same command again"):
            run_tiny(*AGAIN, folder="again")
    assert not Path("again/metrics.json").exists()
    recorder = Recorder()
    assert run_tiny(*AGAIN, folder="again", progress=recorder).metrics == whole.metrics
    assert recorder.trained == [f"final-{whole.metrics.prune_ratio:.2f}"]
    assert weights_in("again/adapter") == weights_in("whole/adapter")


def test_a_training_that_fails_leaves_what_was_chosen(
    before: Path, choose: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose("continued")

    def diverges(*_: Any) -> None:
        raise DivergedError("the loss is not finite")

    monkeypatch.setattr(module, "_made_again", diverges)
    metrics = run_tiny(*AGAIN, folder=before).metrics
    assert metrics.all_rows is not None
    assert metrics.all_rows.why.endswith("once more on all rows: the loss is not finite")
    assert metrics.handed_over == "continued"
    assert weights_in(before / "adapter") == weights_in(before / "continued")


def test_grasps_result_is_trained_again_where_the_recipe_asks_for_it(before: Path) -> None:
    metrics = run_tiny(*AGAIN, "final.deliver=grasp", folder=before).metrics
    assert metrics.handed_over == "all_rows"
    assert metrics.all_rows is not None
    assert set(metrics.all_rows.steps) == {"target", "grasp"}
    assert weights_in(before / "adapter") == weights_in(before / "all_rows")


def test_a_comparison_leaves_the_key_aside(before: Path) -> None:
    recorder = Recorder()
    settings = ComparisonSettings(methods=("continued", "grasp"), reference="continued", seeds=(42,))
    with_key = compare(session_of(*AGAIN, progress=recorder), before, settings)
    assert with_key.rows == compare(session_of(*BEST, progress=recorder), before, settings).rows
    assert not recorder.did


def test_a_finished_run_goes_on_to_all_rows_and_is_refused_another_seed(
    before: Path, choose: Callable[[str], None]
) -> None:
    choose("continued")
    recorder = Recorder()
    again = run_tiny(*AGAIN, folder=before, progress=recorder)
    # On all rows, and that adapter on the test.
    assert set(recorder.did) == {"final-0.00", "test-losses", "answers", "scores"}
    recorder = Recorder()
    first = run_tiny(*BEST, folder=before, progress=recorder)
    assert {name: again.metrics.systems[name] for name in first.metrics.systems} == first.metrics.systems
    assert not recorder.did
    assert weights_in(before / "adapter") == weights_in(before / "continued")
    assert not (before / "all_rows").exists()
    files = files_of(before)
    with pytest.raises(RecipeError, match="another recipe"):
        run_tiny(*AGAIN, "seed=7", folder=before)
    assert files_of(before) == files  # what was refused has cost nothing
