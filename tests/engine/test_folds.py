"""Cross-validation: every row is tested once, nothing that is held out is trained on, and the intervals are of all rows."""

import json
import os
import random
import signal
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder, read, session_of, step_folders

from grasp_lora.data.records import Pool, Record
from grasp_lora.data.splits import HELD_OUT, Fold, Share, cut
from grasp_lora.engine.compare import compare
from grasp_lora.engine.comparison import Comparison, ComparisonSettings
from grasp_lora.engine.results import read_json
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.errors import DataError, GraspError, Interrupted, ProbeError
from grasp_lora.evaluation.statistics import compare_with_baselines
from grasp_lora.training import trainer as training_module

COUNTS = {"test": 5, "dev": 2, "micro_dev": 1, "train": None}


def share(sizes: list[int]) -> tuple[Share, dict[str, str]]:
    """A pool of groups of these sizes, and the group of each key."""
    records, groups = [], {}
    for group, size in enumerate(sizes):
        for one in range(size):
            records.append(Record(f"{group}-{one}", {}, "a", ("a",), frozenset({f"id:{group}-{one}"})))
            groups[f"id:{group}-{one}"] = f"g{group}"
    return Share(Pool(tuple(records), 3, 2, 1), dict(COUNTS)), groups


def parts(whole: Share, groups: dict[str, str], folds: int, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """The ids that each fold tests, and those of the rest."""
    found = []
    for number in range(1, folds + 1):
        tested, rest = cut(whole, groups, Fold(number, folds), seed)
        assert (tested.counts, rest.counts) == ({"test": None}, {"dev": 2, "micro_dev": 1, "train": None})
        assert tested.pool.characters_mapped + rest.pool.characters_mapped == 3
        found.append(tuple([one.id for one in part.pool.records] for part in (tested, rest)))
    return found


@given(st.lists(st.integers(1, 6), min_size=2, max_size=20), st.integers(2, 20), st.integers(0, 3))
def test_each_record_is_tested_in_one_fold_with_its_whole_group(sizes: list[int], folds: int, seed: int) -> None:
    whole, groups = share(sizes)
    if folds > len(sizes):
        with pytest.raises(DataError, match=f"{folds} folds are asked for, .* form {len(sizes)} groups"):
            cut(whole, groups, Fold(1, folds), seed)
        return
    found = parts(whole, groups, folds, seed)
    everything = Counter(record.id for record in whole.pool.records)
    assert Counter(one for tested, _ in found for one in tested) == everything
    for tested, rest in found:
        assert tested
        assert Counter([*tested, *rest]) == everything
        assert not {one.split("-")[0] for one in tested} & {one.split("-")[0] for one in rest}
    lengths = [len(tested) for tested, _ in found]
    assert max(lengths) - min(lengths) <= max(sizes)
    shuffled = random.Random(seed).sample(whole.pool.records, len(whole.pool.records))
    again = parts(Share(Pool(tuple(shuffled), 3), whole.counts), groups, folds, seed)
    assert [sorted(tested) for tested, _ in again] == [sorted(tested) for tested, _ in found]


def test_folds_of_labels_have_about_as_many_of_each() -> None:
    labels = ["yes"] * 20 + ["no"] * 11
    records = tuple(Record(str(i), {}, label, (label,), frozenset({f"id:{i}"})) for i, label in enumerate(labels))
    groups = {f"id:{i}": f"g{i}" for i in range(len(labels))}
    for number in range(1, 6):
        tested, _ = cut(Share(Pool(records), dict(COUNTS)), groups, Fold(number, 5), 0, chooses=True)
        counts = Counter(record.answer for record in tested.pool.records)
        assert counts["yes"] == 4
        assert counts["no"] in (2, 3)


def sessions(*overrides: str, folds: int = 4) -> list[Session]:
    first = session_of(*overrides)
    found = [Session(first.recipe, first.base, fold=Fold(number, folds)) for number in range(1, folds + 1)]
    for one in found:
        one.backbone = first.backbone
    return found


def related(folder: Path) -> None:
    """Let a row of the source and one of the target with the same number be one question."""
    for name in ("source", "target"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        text = "".join(json.dumps(row | {"group": f"question {number}"}) + "\n" for number, row in enumerate(rows))
        (folder / f"{name}.jsonl").write_text(text)


def test_the_splits_of_the_folds_keep_their_counts_and_leave_out_related_rows_of_the_source(
    tiny_workspace: Path,
) -> None:
    related(tiny_workspace)
    found = [one.splits for one in sessions("data.source.train=null", "data.source.dev=2")]
    assert Counter(example.id for one in found for example in one.test) == Counter(
        f"target.jsonl:{n}" for n in range(1, 41)
    )
    for one in found:
        assert [len(getattr(one, name)) for name in ("test", "dev", "micro_dev", "train")] == [10, 6, 4, 10]
        held_out = {example.group for name in HELD_OUT for example in getattr(one, name)}
        source = {example.group for name in ("source_train", "source_dev") for example in getattr(one, name)}
        assert source
        assert not held_out & source
    trained = [{example.group for example in one.source_train} for one in found]
    assert len(set(map(frozenset, trained))) == 4  # what is left out is another part in each fold


def test_training_takes_what_is_left_where_that_is_less_than_its_count(tiny_workspace: Path) -> None:
    assert {len(one.splits.train) for one in sessions("data.target.train=28", folds=2)} == {10}
    assert {len(one.splits.train) for one in sessions("data.target.train=null")} == {20}
    with pytest.raises(DataError, match="asked for dev 18, micro_dev 4, train 10"):
        _ = sessions("data.target.dev=18", folds=2)[0].splits


def compared(
    folder: str, *methods: str, changes: tuple[str, ...] = (), folds: int = 3, **more: Any
) -> tuple[Comparison, Recorder]:
    recorder = Recorder()
    reference = "grasp" if "grasp" in methods else methods[-1]
    settings = ComparisonSettings(methods=methods, reference=reference, folds=folds)
    return compare(session_of(*changes, progress=recorder), Path(folder), settings), recorder


def losses_of(folder: str, comparison: Comparison, method: str) -> list[list[float]]:
    """The losses of a method in each fold, from its steps."""
    rows = [read(step / "result.json")["losses"] for step in step_folders(folder, "answers")]
    by_mean = {fmean(losses): losses for losses in rows}
    [row] = [row for row in comparison.rows if row.method == method]
    score = row.scores["test_loss"]
    assert score is not None
    return [by_mean[mean] for mean in score.values]


def test_a_comparison_over_folds(tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods, trained, finetune = ("target_only", "continued", "grasp"), [], training_module.finetune
    tests = [{row.id for row in session.splits.test} for session in sessions(folds=3)]

    def noted(model: Any, train: Any, dev: Any, **more: Any) -> Any:
        trained.append({row.id for row in (*train, *dev)})
        return finetune(model, train, dev, **more)

    with monkeypatch.context() as patch:
        patch.setattr(training_module, "finetune", noted)
        comparison, recorder = compared("out", *methods)
    # No row of the source is related to a held-out one, so all folds share its adapter. Then four trainings a fold.
    assert recorder.did.count("source") == 1
    assert recorder.did.count("target") == recorder.did.count("controller") == 3
    assert len(trained) == 1 + 3 * 4
    for number, test in enumerate(tests):
        assert not any(test & rows for rows in trained[1 + 4 * number : 5 + 4 * number])
    assert "40 test examples" in recorder.notes[1]
    assert comparison.test_examples == sum(fold.test for fold in comparison.folds) == 40
    assert sorted(fold.test for fold in comparison.folds) == [13, 13, 14]
    assert comparison.seeds == [42]
    losses = {name: losses_of("out", comparison, name) for name in methods}
    for row in comparison.rows:
        means, score = [fmean(fold) for fold in losses[row.method]], row.scores["test_loss"]
        assert score is not None
        assert (score.mean, score.sd) == (pytest.approx(fmean(means)), pytest.approx(stdev(means)))
        assert row.seeds == 3
    pooled = {name: [loss for fold in folds for loss in fold] for name, folds in losses.items()}
    expected = compare_with_baselines(pooled["grasp"], {"continued": pooled["continued"]}, higher_is_better=False)[
        "continued"
    ]
    [row] = [row for row in comparison.rows if row.method == "continued"]
    against = row.against["test_loss"]
    assert (against.difference, against.low, against.high) == (expected.difference, expected.low, expected.high)
    assert against.examples == 40
    again, recorder = compared("out", *methods)
    assert again == comparison
    assert not recorder.did


def test_what_a_given_source_adapter_may_have_seen_is_said(finished_run: Path) -> None:
    given = ("source.adapters=[run/source]", "data.source=null")
    for changes, said in ((given, True), ((), False)):
        comparison, _ = compared(f"out-{said}", "source_only", changes=changes)
        assert any("the given source adapter may have seen what" in text for text in comparison.warnings) is said


def test_a_signal_in_the_second_fold_leaves_a_table_of_the_first_and_goes_on(
    tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = compared("whole", "continued")
    finetune, finals = training_module.finetune, []

    def stopped(*given: Any, **more: Any) -> Any:
        finals.extend([more["folder"]] if "final" in more["folder"].parent.name else [])
        if len(finals) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return finetune(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(training_module, "finetune", stopped)
        with pytest.raises(Interrupted, match="step 1; run the same command again"):
            compared("parted", "continued")
    parted = read_json(Path("parted/compare/compare.json"), Comparison)
    assert (len(parted.folds), parted.test_examples) == (1, whole.folds[0].test)
    comparison, recorder = compared("parted", "continued")
    assert comparison.rows[0].scores == whole.rows[0].scores
    assert recorder.did.count("final-0.00") == 2


OWN_METRIC = """
from grasp_lora.evaluation.metrics import Metric, MetricScore

def share(outputs):
    rows = tuple((float(text.count("a")), 1.0 + len(text)) for text in outputs.predictions)
    value = 100 * sum(row[0] for row in rows) / sum(row[1] for row in rows)
    return MetricScore("share", value, "own", tuple(100 * a / n for a, n in rows), rows)

of_a = Metric(share, "share of letters", lambda sums: 100 * sums[..., 0] / sums[..., 1])
"""


def test_a_score_of_the_corpus_is_compared_by_the_statistics_of_all_rows(tiny_workspace: Path) -> None:
    Path("own_share.py").write_text(OWN_METRIC, encoding="utf-8")
    comparison, _ = compared("own", "zero_shot", "continued", changes=("metrics=[own_share:of_a]",))
    steps = [read(step / "result.json")["metrics"]["own_share:of_a"] for step in step_folders("own", "scores")]
    assert len(steps) == 6
    by_value: dict[float, list[Any]] = {}
    for entry in steps:
        by_value.setdefault(entry["value"], []).append(entry["statistics"])
    scores = {}
    for row in comparison.rows:
        score: Any = row.scores["own_share:of_a"]
        rows = [counts for value in score.values for counts in by_value[value].pop()]
        scores[row.method] = 100 * sum(counts[0] for counts in rows) / sum(counts[1] for counts in rows)
    against = comparison.rows[0].against["own_share:of_a"]
    assert against.difference == pytest.approx(scores["continued"] - scores["zero_shot"])
    assert against.examples == 40


def test_a_method_that_fails_in_a_fold_has_no_row(tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn, calls = Steps.learn_ratio, []

    def fails(self: Steps, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise ProbeError("no loss is finite")
        return learn(self, *args)

    monkeypatch.setattr(Steps, "learn_ratio", fails)
    rows = compared("compared", "continued", "grasp")[0].rows
    reasons = {row.method: row.unavailable for row in rows}
    assert reasons == {"continued": None, "grasp": "failed in fold 2 of 3: no loss is finite"}
    assert rows[0].seeds == 3


def test_one_row_a_fold(tiny_workspace: Path) -> None:
    lines = Path("target.jsonl").read_text().splitlines()[:4]
    Path("target.jsonl").write_text("\n".join(lines) + "\n")
    changes = ("data.target.dev=1", "data.target.micro_dev=1", "data.target.test=0", "controller.rounds.every=1")
    comparison, _ = compared("one", "zero_shot", "continued", changes=changes, folds=4)
    assert [fold.test for fold in comparison.folds] == [1, 1, 1, 1]
    assert comparison.rows[0].against["test_loss"].examples == 4


@pytest.mark.parametrize(
    ("changes", "folds", "message"),
    [
        ((), 41, "41 folds are asked for, but the 40 examples of the target form 40 groups"),
        (
            ("data.target={language: de, files: {pool: [target.jsonl], test: [source.jsonl]}}",),
            3,
            "folds are cut from one pool",
        ),
        (("data.target={language: de, files: {train: [target.jsonl]}}",), 3, "folds are cut from one pool"),
        (("data.target.dev=30",), 2, "asked for dev 30"),
        (("target.adapter=mine",), 3, "would test rows that the given target.adapter may have been trained on"),
        (("data.task=classification",), 3, "write all of them into data.labels"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(
    changes: tuple[str, ...], folds: int, message: str, tiny_workspace: Path
) -> None:
    with pytest.raises(GraspError, match=message):
        compared("out", "zero_shot", changes=changes, folds=folds)
    assert not Path("out").exists()


def test_folds_have_one_seed() -> None:
    assert ComparisonSettings(folds=3).seeds == (42,)
    assert ComparisonSettings(folds=3, seeds=(7,)).seeds == (7,)
