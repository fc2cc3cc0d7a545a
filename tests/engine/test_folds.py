"""Cross-validation: every row is tested once, nothing that is held out is trained on, and the intervals are of all rows."""

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from grasp_lora.engine.plan import plan_comparison
from grasp_lora.report.comparison import command_of
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder

from grasp_lora import api
from grasp_lora.data.records import Pool, Record
from grasp_lora.data.splits import HELD_OUT, Fold, Share, cut
from grasp_lora.engine.comparison import ComparisonSettings
from grasp_lora.engine.session import Session
from grasp_lora.errors import DataError, Interrupted
from grasp_lora.evaluation.answers import Outputs, macro_f1, macro_f1_from_statistics
from grasp_lora.evaluation.statistics import compare_with_baselines
from grasp_lora.recipes.load import load_recipe

METHODS = ("target_only", "continued", "grasp")
COUNTS = {"test": 5, "dev": 2, "micro_dev": 1, "train": None}


class Noting(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


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


def sessions(*overrides: str, folds: int = 4) -> list[Session]:
    recipe, base = load_recipe("tiny.yaml", overrides)
    first = Session(recipe, base, fold=Fold(1, folds))
    rest = [Session(recipe, base, fold=Fold(number, folds)) for number in range(2, folds + 1)]
    for one in rest:
        one.backbone = first.backbone
    return [first, *rest]


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


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[str], set[str]]]:
    """What each training on target rows was given: its part, the ids of its train and dev rows."""
    found: list[tuple[str, set[str], set[str]]] = []
    finetune = Session.finetune

    def noted(
        self: Session, model: Any, train: Any, dev: Any, training: Any, part: str, *rest: Any, **more: Any
    ) -> Any:
        if part != "source":
            found.append((part, {one.id for one in train}, {one.id for one in dev}))
            assert not {one.id for one in self.splits.test} & {one.id for one in (*train, *dev)}
        return finetune(self, model, train, dev, training, part, *rest, **more)

    monkeypatch.setattr(Session, "finetune", noted)
    return found


def losses_of(folder: Path, comparison: Any, method: str) -> list[list[float]]:
    """The losses of a method in each fold, from its records."""
    records = [json.loads(file.read_text()) for file in (folder / "store/records").glob("test-losses-*")]
    by_mean = {fmean(one["result"]["losses"]): one["result"]["losses"] for one in records}
    [row] = [row for row in comparison.rows if row.method == method]
    return [by_mean[mean] for mean in row.scores["test_loss"].values]


def test_a_comparison_over_folds(tiny_workspace: Path, trainings: list[Any], cli: Callable[..., Any]) -> None:
    recorder = Noting()
    folder, comparison = api.compare("tiny.yaml", (), "compared", recorder, methods=METHODS, folds=3)
    assert recorder.did.count("source") == 1  # no row of it is related to a held-out one
    assert recorder.did.count("target") == recorder.did.count("controller") == 3
    assert len(trainings) == 3 * 4
    assert "40 test examples" in recorder.notes[0]
    assert comparison.test_examples == sum(fold.test for fold in comparison.folds) == 40
    assert sorted(fold.test for fold in comparison.folds) == [13, 13, 14]
    assert comparison.seeds == [42]
    losses = {name: losses_of(Path("compared"), comparison, name) for name in METHODS}
    for row in comparison.rows:
        means = [fmean(fold) for fold in losses[row.method]]
        score = row.scores["test_loss"]
        assert (score.mean, score.sd) == (pytest.approx(fmean(means)), pytest.approx(stdev(means)))
        assert len(row.prune_ratio.values if row.prune_ratio else means) == row.seeds == 3
    pooled = {name: [one for fold in folds for one in fold] for name, folds in losses.items()}
    expected = compare_with_baselines(pooled["grasp"], {"continued": pooled["continued"]}, higher_is_better=False)
    [row] = [row for row in comparison.rows if row.method == "continued"]
    found = row.against["test_loss"]
    assert (found.difference, found.low, found.high) == tuple(
        getattr(expected["continued"], name) for name in ("difference", "low", "high")
    )
    assert found.examples == 40
    pages = [(folder / name).read_text(encoding="utf-8") for name in ("compare.md", "report.html")]
    for page in pages:
        assert "3 of 3 folds" in page
        assert "mean over folds" in page or "over the folds" in page
        assert "over the seeds" not in page
        assert command_of(comparison) in page
    again = Recorder()
    result = cli("compare", "tiny.yaml", "--methods", ",".join(METHODS), "--folds", "3", "--output", "compared")
    assert result.status == 0, result.err
    assert api.compare("tiny.yaml", (), "compared", again, methods=METHODS, folds=3)[1] == comparison
    assert not again.did
    status = cli("status", "compared").out
    assert "3 of 3 folds finished" in status


def test_what_a_given_source_adapter_may_have_seen_is_said(finished_run: Path) -> None:
    settings: dict[str, Any] = {"methods": ("source_only",), "reference": "source_only", "seeds": (42,)}
    given = {"source.adapters": ["run/source"], "data.source": None}
    for changes, folds, said in ((given, 3, True), ({}, 3, False), (given, None, False)):
        folder, comparison = api.compare("tiny.yaml", changes, f"{folds}{said}", folds=folds, **settings)
        warned = any(
            "the given source adapter may have seen what belongs together" in one for one in comparison.warnings
        )
        assert warned == said
        assert ("may have seen what" in (folder / "compare.md").read_text(encoding="utf-8")) == said


def test_a_signal_in_the_second_fold_leaves_a_table_of_the_first_and_goes_on(
    tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    settings: dict[str, Any] = {"methods": ("continued",), "reference": "continued", "folds": 3}
    whole = api.compare("tiny.yaml", (), "whole", **settings)[1]
    finetune, calls = Session.finetune_pruned, 0

    def stopped(self: Session, *args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return finetune(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "finetune_pruned", stopped)
        with pytest.raises(Interrupted, match="step 1; run the same command again"):
            api.compare("tiny.yaml", (), "parted", **settings)
    parted = json.loads(Path("parted/compare/compare.json").read_text())
    assert (len(parted["folds"]), parted["test_examples"]) == (1, whole.folds[0].test)
    assert "1 of 3 folds finished" in cli("status", "parted").out
    recorder = Recorder()
    assert api.compare("tiny.yaml", (), "parted", recorder, **settings)[1].rows[0].scores == whole.rows[0].scores
    assert recorder.did.count("final 0.00") == 2


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
    settings: dict[str, Any] = {"methods": ("zero_shot", "continued"), "reference": "continued", "folds": 3}
    comparison = api.compare("tiny.yaml", {"metrics": ["own_share:of_a"]}, "own", allow_code=True, **settings)[1]
    records = [json.loads(file.read_text()) for file in Path("own/store/records").glob("scores-*")]
    assert len(records) == 6
    by_value: dict[float, list[Any]] = {}
    for one in records:
        entry = one["result"]["own_share:of_a"]
        by_value.setdefault(entry["value"], []).append(entry["statistics"])
    scores = {}
    for row in comparison.rows:
        rows = [one for value in row.scores["own_share:of_a"].values for one in by_value[value].pop()]
        scores[row.method] = 100 * sum(one[0] for one in rows) / sum(one[1] for one in rows)
    found = comparison.rows[0].against["own_share:of_a"]
    assert found.difference == pytest.approx(scores["continued"] - scores["zero_shot"])
    assert found.examples == 40


def test_macro_f1_of_folds_adds_up_where_each_has_other_labels() -> None:
    import torch

    labels, true, said = ("a", "b", "c"), list("aabbcacb"), list("abbbcaab")
    folds = [
        macro_f1(Outputs(said[part], [[one] for one in true[part]], "en", labels))
        for part in (slice(0, 4), slice(4, 8))
    ]
    together = torch.tensor([row for one in folds for row in one.statistics]).sum(dim=0)
    whole = macro_f1(Outputs(said, [[one] for one in true], "en"))
    assert float(macro_f1_from_statistics(together)) == pytest.approx(whole.value)
    for part, one in zip(
        (slice(0, 4), slice(4, 8)), folds, strict=True
    ):  # a label that no reference has does not count
        assert one.value == pytest.approx(macro_f1(Outputs(said[part], [[text] for text in true[part]], "en")).value)


def test_a_dry_run_counts_every_fold_with_its_own_size(tiny_workspace: Path) -> None:
    given: dict[str, Any] = {"methods": ("continued", "grasp"), "folds": 3}
    plan = api.plan("tiny.yaml", (), "planned", **given)
    assert plan.answers == 2 * 40
    assert sum(record.work for record, _ in plan.steps if record.step == "test losses") == 2 * 40
    assert not Path("planned").exists()
    recorder = Recorder()
    api.compare("tiny.yaml", (), "planned", recorder, **given)
    planned = Counter(record.step.split()[0] for record, _ in plan.steps)
    assert planned == Counter(step.split()[0] for step in recorder.did)
    assert api.plan("tiny.yaml", (), "planned", **given).answers == 0
    other = api.plan("tiny.yaml", ("metrics=[rougeL]",), "planned", **given)
    assert [record.step for record, there in other.steps if not there] == ["scores"] * 6
    assert other.answers == 0, "another metric scores the answers on record"


def test_a_method_that_fails_in_a_fold_has_no_row(tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grasp_lora.errors import ProbeError

    learn, calls = Session.learn_ratio, 0

    def fails(self: Session, *args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ProbeError("no loss is finite")
        return learn(self, *args, **more)

    monkeypatch.setattr(Session, "learn_ratio", fails)
    rows = api.compare("tiny.yaml", (), "compared", methods=("continued", "grasp"), folds=3)[1].rows
    assert {row.method: row.unavailable for row in rows} == {
        "continued": None, "grasp": "failed in fold 2 of 3: no loss is finite",
    }  # fmt: skip
    assert rows[0].seeds == 3


def test_one_row_a_fold(tiny_workspace: Path) -> None:
    lines = Path("target.jsonl").read_text().splitlines()[:4]
    Path("target.jsonl").write_text("\n".join(lines) + "\n")
    changes = ["data.target.dev=1", "data.target.micro_dev=1", "data.target.test=0", "controller.rounds.every=1"]
    comparison = api.compare(
        "tiny.yaml", changes, "one", methods=("zero_shot", "continued"), reference="continued", folds=4
    )[1]
    assert [fold.test for fold in comparison.folds] == [1, 1, 1, 1]
    assert comparison.rows[0].against["test_loss"].examples == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--folds", "1"), "folds is 1; it must be at least 2"),
        (("--folds", "0"), "folds is 0"),
        (("--folds", "41"), "41 folds are asked for, but the 40 examples of the target form 40 groups"),
        (("--folds", "3", "--seeds", "1,2"), "folds are compared with one seed, but seeds has 2"),
        (("--folds", "3", "--seeds", "42,1337,9001"), "folds are compared with one seed, but seeds has 3"),
        (
            ("--folds", "3", "--set", "data.target.files={pool: target.jsonl, test: source.jsonl}"),
            "the target has data.target.files.test",
        ),
        (
            (
                "--folds",
                "3",
                "--set",
                "data.target={language: de, files: {train: target.jsonl, test: source.jsonl}}",
            ),
            "the target has data.target.train_files",
        ),
        (("--folds", "2", "--set", "data.target.dev=30"), "asked for dev 30"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    refused: Callable[..., None], arguments: tuple[str, ...], message: str
) -> None:
    refused("compare", arguments, message)
    refused("compare", (*arguments, "--dry-run"), message)


def test_labels_that_hang_on_a_fold_are_refused(refused: Callable[..., None]) -> None:
    rows = [{"text": f"text {number}", "label": "yes" if number % 3 else "no"} for number in range(40)]
    for name in ("source", "target"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused("compare", ("--folds", "3", "--set", "data.task=classification"), "write all of them into data.labels")


def test_settings_of_a_script(tiny_workspace: Path) -> None:
    assert ComparisonSettings(folds=3).seeds == (42,)
    assert ComparisonSettings(folds=3, seeds=(7,)).seeds == (7,)
    with pytest.raises(DataError, match="50 folds are asked for"):
        plan_comparison(Session(*load_recipe("tiny.yaml")), Path("x"), ComparisonSettings(folds=50))
