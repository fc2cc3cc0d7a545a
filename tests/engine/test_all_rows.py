"""`final.all_rows`: what was chosen is trained once more on every row outside the test, and nothing else changes."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import Recorder

from grasp_lora import api
from grasp_lora.engine import deliver, run_folder
from grasp_lora.engine import run as running
from grasp_lora.engine.all_rows import _AllRowsBench, _epochs
from grasp_lora.engine.run_folder import Delivered
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Bench
from grasp_lora.engine.store import Store
from grasp_lora.errors import DivergedError, Interrupted, RecipeError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.models.reading import read_adapter
from grasp_lora.recipes.load import load_recipe
from grasp_lora.training.settings import TrainingSettings

BEST = ("final.deliver=best", "target.training.epochs=3", "final.training.epochs=2", "final.training.patience=null")
AGAIN = (*BEST, "final.all_rows=true")
WEIGHTS = "adapter_model.safetensors"
TRAINED = {"target": ["target"], "merged": ["target"], "continued": ["final"], "grasp": ["target", "final"]}


def read(file: Path | str) -> Any:
    return json.loads(Path(file).read_text(encoding="utf-8"))


def equal(one: AdapterWeights, other: AdapterWeights) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(getattr(one[name], factor), getattr(other[name], factor)) for name in one for factor in "AB"
    )


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a run choose a system, whatever the rows say."""

    def choosing(name: str) -> None:
        found = Delivered(name=name, title=name, why=f"It is {name}.", split="dev", examples=6)
        monkeypatch.setattr(deliver, "best_of", lambda *_: found)

    return choosing


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], list[str], TrainingSettings]]:
    """What each training was given: its part, the ids of its train and dev rows, its settings."""
    found: list[tuple[str, list[str], list[str], TrainingSettings]] = []
    finetune = Session.finetune

    def noted(
        self: Session, model: Any, train: Any, dev: Any, training: Any, part: str, *rest: Any, **more: Any
    ) -> Any:
        found.append((part, [one.id for one in train], [one.id for one in dev], training))
        return finetune(self, model, train, dev, training, part, *rest, **more)

    monkeypatch.setattr(Session, "finetune", noted)
    return found


@pytest.mark.parametrize("winner", list(TRAINED))
def test_what_was_chosen_is_trained_again_on_every_row_but_those_of_the_test(
    winner: str, tiny_workspace: Path, choose: Callable[[str], None], trainings: list[Any], cli: Callable[..., Any]
) -> None:
    choose(winner)
    before = api.run("tiny.yaml", BEST, "before").metrics
    first = len(trainings)
    result = cli("run", "tiny.yaml", *(part for one in AGAIN for part in ("--set", one)), "-o", "again")
    assert result.status == 0, result.err
    metrics, ids = read("again/metrics.json"), read("again/data.json")["ids"]
    # All up to the choice is what it is without the key: no row of dev, micro-dev or test has reached it.
    again = trainings[first:]
    assert again[:first] == trainings[:first]
    assert {name: metrics["systems"][name] for name in before.systems} == before.to_json()["systems"]
    assert metrics["delivered"] == before.to_json()["delivered"]
    rows = [*ids["train"], *ids["dev"], *ids["micro_dev"]]
    assert [part for part, *_ in again[first:]] == TRAINED[winner]
    for _, train, dev, training in again[first:]:
        assert [one.rpartition("/")[2] for one in train] == [one.rpartition("/")[2] for one in rows]
        assert len(train) == 20
        assert not dev
        assert (training.patience, training.keep) == (None, "last")
    for part, _, dev, _ in trainings[:first]:  # what the choice rests on was trained on 10 rows and judged on others
        assert len(dev) == {"source": 4, "controller": 0}.get(part, 6)
    steps = metrics["all_rows"]["steps"]
    assert metrics["all_rows"]["rows"] == 20
    assert [training.steps(20) for *_, training in again[first:]] == [count for count in steps.values() if count]
    assert metrics["systems"]["all_rows"]["dev_loss"] is None
    assert metrics["systems"]["all_rows"]["test_loss"] != metrics["systems"][winner]["test_loss"]
    own = Path("again", "final" if winner == "grasp" else winner, WEIGHTS).read_bytes()
    handed_over = Path("again/adapter", WEIGHTS).read_bytes()
    assert handed_over == Path("again/all_rows", WEIGHTS).read_bytes() != own
    last = json.loads(Path("again/all_rows/history.jsonl").read_text().splitlines()[-1])
    assert last["step"] == list(steps.values())[-1]  # which the report prints, though its loss may not be logged
    assert {
        row["id"] for row in map(json.loads, Path("again/evaluation/all_rows.jsonl").read_text().splitlines())
    } == set(ids["test"])
    sentence = "The choice was made with 10 training rows."
    after, before = (metrics["systems"][name]["metrics"]["rougeL"] for name in ("all_rows", winner))
    scores = f"Test ROUGE-L {after:.1f}; {before:.1f} before."
    for text in (
        result.out,
        *(Path("again", name).read_text() for name in ("report.md", "report.html", "adapter/README.md")),
    ):
        assert sentence in text
        assert scores in text
        assert "trained once more on all rows." in text
    card = Path("again/adapter/README.md").read_text(encoding="utf-8")
    assert ("trained again on all rows" in card) == (winner != "continued")
    page = Path("again/report.html").read_text(encoding="utf-8")
    assert page.count('<tr class="chosen">') == 1
    assert "The chosen one, on all rows" in page.partition('<tr class="chosen">')[2][:80]


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("target.training.accumulation=3",),
        ("target.training.batch_size=4",),
    ],
)
def test_the_adapter_is_that_of_a_plain_training_on_all_rows(
    changes: tuple[str, ...], tiny_workspace: Path, choose: Callable[[str], None]
) -> None:
    choose("target")
    given = [*AGAIN, *changes]
    steps = api.run("tiny.yaml", given, "again").metrics.all_rows.steps["target"]
    session = Session(*load_recipe("tiny.yaml", given))
    splits, own = session.splits, session.recipe.target.training
    rows = (*splits.train, *splits.dev, *splits.micro_dev)
    plain = replace(own, epochs=_epochs(steps, own, len(rows)), patience=None, keep="last")
    weights, facts = session.train_adapter("target", rows, (), plain, tiny_workspace / "plain")
    assert facts.steps == steps
    assert equal(weights, read_adapter("again/adapter").weights)


@pytest.mark.parametrize("accumulation", [1, 3, 4])
def test_the_epochs_give_the_steps_that_were_chosen(accumulation: int) -> None:
    for examples in (1, 7, 45, 66, 100, 331):
        for steps in (1, 2, 5, 25, 49, 75, 100, 331, 750):
            epochs = _epochs(steps, TrainingSettings(accumulation=accumulation), examples)
            assert TrainingSettings(accumulation=accumulation, epochs=epochs).steps(examples) == steps
    assert _epochs(0, TrainingSettings(), 7) == 0


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
    winner: str, changes: Sequence[str], reason: str, finished_run: Path, choose: Callable[[str], None], cli: Any
) -> None:
    choose(winner)
    if winner == "continued":  # else a single source that no step improved is no candidate
        changes = (*changes, "source.adapters=[run/source, run/target]", "data.source=null")
    result = cli("run", "tiny.yaml", *(part for one in (*AGAIN, *changes) for part in ("--set", one)), "-o", "again")
    assert result.status == 0, result.err
    metrics = read("again/metrics.json")
    assert "all_rows" not in metrics["systems"]
    assert not metrics["all_rows"].get("steps")
    [line] = [line for line in result.out.splitlines() if "once more on all rows:" in line]
    assert reason in line
    place = Path("run/source") if winner == "source" else Path("again", winner)
    assert Path("again/adapter", WEIGHTS).read_bytes() == (place / WEIGHTS).read_bytes()
    assert not Path("again/all_rows").exists()


def test_a_final_run_that_was_discarded_leaves_the_pruned_merge(
    tiny_workspace: Path, choose: Callable[[str], None]
) -> None:
    choose("grasp")
    result = api.run("tiny.yaml", [*AGAIN, "final.training.learning_rate=1e-30"], "again")
    facts = result.metrics.all_rows
    assert facts is not None
    assert facts.steps["grasp"] == 0 < facts.steps["target"]
    weights = read_adapter("again/adapter").weights
    zeros = sum(int((getattr(pair, factor) == 0).sum()) for pair in weights.values() for factor in "AB")
    size = sum(getattr(pair, factor).numel() for pair in weights.values() for factor in "AB")
    assert zeros / size == pytest.approx(result.ratio.ratio, abs=0.02)
    assert not equal(weights, read_adapter("again/final").weights)  # it rests on the new target adapter


@pytest.mark.parametrize("change", ["mask.score=input_aware", "final.mode=reselect", "merge.rule=paper_apart"])
def test_pruned_and_not_trained_is_the_final_run_before_its_first_step(tiny_workspace: Path, change: str) -> None:
    session = Session(*load_recipe("tiny.yaml", ["final.training.learning_rate=1e-30", change]))
    bench = Bench(session, session, Store(tiny_workspace / "store"))
    final = bench.finetuned(bench.merged(), 0.4)
    assert final.records[-1].result["best_step"] == 0
    again = _AllRowsBench(bench, session.splits.train, {"grasp": 0})
    assert equal(again.made("grasp", 0.4).weights.together(), final.weights)


def test_a_run_that_is_stopped_in_it_goes_on_to_the_same_bits(
    tiny_workspace: Path, choose: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose("grasp")
    whole = api.run("tiny.yaml", AGAIN, "whole")
    finetune = Session.finetune

    def stopped(self: Session, model: Any, train: Any, *rest: Any, **more: Any) -> Any:
        if len(train) == 20 and rest[2] == "final":
            os.kill(os.getpid(), signal.SIGTERM)
        return finetune(self, model, train, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "finetune", stopped)
        with pytest.raises(Interrupted, match=r"final-0.* step 1; run the same command again"):
            api.run("tiny.yaml", AGAIN, "again")
    assert not Path("again/metrics.json").exists()
    assert Path("again/adapter", WEIGHTS).read_bytes() == Path("again/final", WEIGHTS).read_bytes()  # of use already
    recorder = Recorder()
    assert api.run("tiny.yaml", AGAIN, "again", recorder).metrics == whole.metrics
    assert [step for step in recorder.did if not step.endswith("losses")] == [
        f"final {whole.ratio.ratio:.2f}",
        "scores",
    ]
    assert Path("again/adapter", WEIGHTS).read_bytes() == Path("whole/adapter", WEIGHTS).read_bytes()
    assert not Recorder().did


def test_a_training_that_fails_leaves_what_was_chosen(
    tiny_workspace: Path, choose: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose("continued")

    def diverges(*_: Any) -> None:
        raise DivergedError("the loss is not finite")

    monkeypatch.setattr(running, "train_again", diverges)
    result = api.run("tiny.yaml", AGAIN, "again")
    assert result.metrics.all_rows is not None
    assert result.metrics.all_rows.why.endswith("once more on all rows: the loss is not finite")
    assert result.metrics.handed_over == "continued"
    assert Path("again/adapter", WEIGHTS).read_bytes() == Path("again/continued", WEIGHTS).read_bytes()


def test_grasps_result_is_trained_again_where_the_recipe_asks_for_it(tiny_workspace: Path) -> None:
    result = api.run("tiny.yaml", [*AGAIN, "final.deliver=grasp"], "again")
    assert result.metrics.handed_over == "all_rows"
    assert set(result.metrics.all_rows.steps) == {"target", "grasp"}
    assert Path("again/adapter", WEIGHTS).read_bytes() == Path("again/all_rows", WEIGHTS).read_bytes()


def test_a_comparison_leaves_the_key_aside(tiny_workspace: Path, choose: Callable[[str], None]) -> None:
    choose("continued")
    api.run("tiny.yaml", AGAIN, "one")
    recorder = Recorder()
    settings: dict[str, Any] = {"methods": ("continued", "grasp"), "reference": "continued", "seeds": (42,)}
    with_key = api.compare("tiny.yaml", AGAIN, "one", recorder, **settings)[1]
    assert not recorder.did
    assert with_key.rows == api.compare("tiny.yaml", BEST, "one", recorder, **settings)[1].rows
    assert not recorder.did


def test_the_key_counts_in_a_recipes_hash_only_where_it_is_set(tiny_workspace: Path) -> None:
    plain, said, asked = (
        load_recipe("tiny.yaml", one)[0] for one in ((), ["final.all_rows=false"], ["final.all_rows=true"])
    )
    assert plain.fingerprint() == said.fingerprint() != asked.fingerprint()


def test_check_counts_it(tiny_workspace: Path, cli: Callable[..., Any]) -> None:
    def trained(*changes: str) -> int:
        out = cli("check", "tiny.yaml", *(part for one in changes for part in ("--set", one))).out
        return int(out.partition("at most ")[2].partition(" training examples")[0])

    assert trained(*AGAIN) - trained(*BEST) == (3 + 2) * 10  # as many steps as on the 10 training rows


def test_a_finished_run_goes_on_to_all_rows_and_back(tiny_workspace: Path, choose: Callable[[str], None]) -> None:
    choose("continued")
    first = api.run("tiny.yaml", BEST, "run")
    before = {name: Path("run", name).read_bytes() for name in ("recipe.yaml", "run.json", "metrics.json")}
    recorder = Recorder()
    again = api.run("tiny.yaml", AGAIN, "run", recorder)
    assert recorder.did == ["final 0.00", "test losses", "scores"]  # on all rows, and that adapter on the test
    assert read("run/run.json")["recipe_hash"] == load_recipe("run/recipe.yaml")[0].fingerprint()
    assert again.metrics.all_rows is not None
    assert {name: again.metrics.systems[name] for name in first.metrics.systems} == first.metrics.systems
    recorder = Recorder()
    api.run("tiny.yaml", BEST, "run", recorder)
    assert not recorder.did
    assert {name: Path("run", name).read_bytes() for name in before} == before
    assert Path("run/adapter", WEIGHTS).read_bytes() == Path("run/continued", WEIGHTS).read_bytes()
    assert not Path("run/all_rows").exists()
    with pytest.raises(RecipeError, match="another recipe"):
        api.run("tiny.yaml", [*AGAIN, "seed=7"], "run")
    rows = Path("target.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("target.jsonl").write_text("".join(reversed(rows)), encoding="utf-8")
    with pytest.raises(RecipeError, match="begun with other data"):
        api.run("tiny.yaml", AGAIN, "run")
    assert {name: Path("run", name).read_bytes() for name in before} == before  # what was refused has cost nothing


def test_another_choice_may_be_killed_at_any_write(
    tiny_workspace: Path, choose: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose("continued")
    whole = api.run("tiny.yaml", AGAIN, "whole").metrics
    api.run("tiny.yaml", BEST, "run")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            api.run("tiny.yaml", AGAIN, "run")
    assert not Path("run/metrics.json").exists()
    assert api.run("tiny.yaml", AGAIN, "run").metrics == whole
