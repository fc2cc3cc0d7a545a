"""Classification and translation through the commands: scores, tables, intervals, and mistakes in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grasp_lora.report.comparison import score_table, write_comparison
from grasp_lora.report.differences import compare_grasp
from grasp_lora.report.run_record import read_run

from grasp_lora import api
from grasp_lora.data.encode import encode_labels
from grasp_lora.engine.comparison import ComparisonSettings, compare
from grasp_lora.engine.deliver import by_setting
from grasp_lora.engine.predict import asking
from grasp_lora.engine.preflight import preflight
from grasp_lora.engine.run_folder import predictions_file, read_metrics
from grasp_lora.engine.session import Session
from grasp_lora.evaluation.metrics import METRICS, score
from grasp_lora.evaluation.statistics import compare_with_baselines
from grasp_lora.models.adapters import attached
from grasp_lora.models.answers import likeliest_labels
from grasp_lora.models.reading import read_adapter
from grasp_lora.recipes.load import load_recipe
from grasp_lora.training.probes import ProbeSet

LABELS = ("no", "not", "yes")


def write(task: str, **changes: Any) -> None:
    """Change tiny.yaml and its data to those of a task."""
    recipe = Path("tiny.yaml")
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("task: completion", f"task: {task}"), encoding="utf-8")
    for name, rows in (("source", 20), ("target", 40)):
        texts = [(f"{name} {i}: what?", LABELS[(i * 7 // 4) % 3]) for i in range(rows)]
        fields = ("text", "label") if task == "classification" else ("source", "target")
        lines = [dict(zip(fields, pair, strict=True)) for pair in texts]
        if name == "target":
            lines[4:10] = [line | changes for line in lines[4:10]]  # some of them come into a split
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_a_classification_is_answered_by_the_likeliest_label(tiny_workspace, cli) -> None:
    write("classification")
    result = cli("run", "tiny.yaml", "--output", "run")
    assert result.status == 0, result.err
    metrics = read_metrics(Path("run"))
    session = Session(*load_recipe("tiny.yaml"))
    test = session.splits.test
    rows = [
        json.loads(line) for line in predictions_file(Path("run"), "grasp").read_text(encoding="utf-8").splitlines()
    ]
    right = [row["prediction"] in row["references"] for row in rows]
    assert {row["prediction"] for row in rows} <= set(LABELS)
    assert metrics.systems["grasp"].metrics["accuracy"] == 100 * sum(right) / len(rows)
    assert [row["scores"] for row in rows] == [{"accuracy": 100.0 * one} for one in right]
    assert metrics.signatures["macro_f1"].endswith("labels:in_references|average:macro")
    report = Path("run/report.md").read_text(encoding="utf-8")
    assert "Accuracy" in report
    assert "Macro-F1" in report
    assert "accuracy" in result.out
    assert 'with a text of your own: grasp-lora predict run/adapter --context "..."' in result.out
    counts = [f"{label} {sum(row['prediction'] == label for row in rows)}" for label in LABELS]
    assert f"What is handed over answers: {', '.join(counts)}." in report
    most = max(LABELS, key=lambda label: sum(one.references[0] == label for one in session.splits.train))
    share = 100 * sum(one.references[0] == most for one in test) / len(test)
    assert (
        f"To answer {most}, the most frequent label of the training rows, always has accuracy {share:.1f} on" in report
    )
    stored = read_adapter("run/final").info.answers
    assert stored is not None
    with asking("run/final") as one:
        assert encode_labels(stored.labels, one._encoder()) == session.splits.labels
    asked = cli("predict", "run/final", "target.jsonl")
    assert asked.status == 0, asked.err
    texts = [json.loads(line)["text"] for line in Path("target.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {text: json.loads(line)["prediction"] for text, line in zip(texts, asked.out.splitlines(), strict=True)}
    assert [row["prediction"] for row in rows] == [
        next(answer for text, answer in found.items() if text in example.prompt) for example in test
    ]
    # The score of a label is the one loss of its answer, not divided by its length.
    with attached(session.backbone.model, read_adapter("run/final").weights) as model:
        losses = ProbeSet(test, session.pad_id).losses(model)
        by_label = {
            label: ProbeSet([replace(one, completion_ids=tokens) for one in test], session.pad_id).losses(model)
            for label, tokens in session.splits.labels.items()
        }
    _, answers = session.examine(read_adapter("run/final").weights)
    assert answers == tuple(row["prediction"] for row in rows)
    for number, (one, answer) in enumerate(zip(test, answers, strict=True)):
        sums = {label: by_label[label][number] * len(tokens) for label, tokens in session.splits.labels.items()}
        assert answer == min(sums, key=sums.__getitem__)
        assert by_label[one.references[0]][number] == pytest.approx(losses[number], abs=1e-5)


def test_a_comparison_has_the_intervals_of_accuracy_and_macro_f1(tiny_workspace) -> None:
    write("classification")
    session = Session(*load_recipe("tiny.yaml", ["controller.rounds.every=3"]))
    settings = ComparisonSettings(methods=("zero_shot", "target_only", "grasp"), seeds=(1,), resamples=500)
    found = compare(session, Path("out"), settings, write_comparison)
    assert found.metrics == ["test_loss", "accuracy", "macro_f1"]
    rows = {row.method: row for row in found.rows}
    for metric in ("accuracy", "macro_f1"):
        against = rows["target_only"].against[metric]
        ours, theirs = (rows[name].scores[metric].mean for name in ("grasp", "target_only"))
        assert against.difference == pytest.approx(ours - theirs)
        assert against.low <= against.difference <= against.high
    assert any("Macro-F1" in column for column in score_table(found).columns)


def test_the_right_answers_decide_between_grasps_result_and_the_continued_adapter(tiny_workspace, monkeypatch) -> None:
    """Rule 4 of `deliver.py`, in a run and in the row `delivered` of a comparison."""
    write("classification")
    measured, original = [], Session.errors

    def errors(self: Session, weights: Any, split: str) -> list[float]:
        found = original(self, weights, split)
        with attached(self.backbone.model, weights) as model:
            told = likeliest_labels(model, [one.prompt_ids for one in self.splits.dev], self.splits.labels)
        assert found == [float(answer not in one.references) for answer, one in zip(told, self.splits.dev, strict=True)]
        measured.append(split)
        return [float(len(measured) > 1)] * len(found)  # the first, `continued`, is always right, the other never

    monkeypatch.setattr("grasp_lora.engine.deliver.best_of", lambda losses, rows, *_: by_setting(losses, rows))
    monkeypatch.setattr(Session, "errors", errors)
    given = ["final.deliver=best", "data.target.dev=8", "data.target.test=8", "data.labels=['no','not','yes']"]
    api.run("tiny.yaml", given, "run")
    delivered = read_metrics(Path("run")).delivered
    assert delivered is not None
    assert (delivered.name, delivered.against, measured) == ("continued", "grasp", ["dev", "dev"])
    assert "It answers 8 of 8 dev rows right, GRASP's result 0." in Path("run/report.md").read_text(encoding="utf-8")
    settings = ComparisonSettings(methods=("continued", "delivered"), seeds=(42,), resamples=200)
    found = compare(Session(*load_recipe("tiny.yaml", given)), Path("run"), settings, write_comparison)
    rows = {row.method: row for row in found.rows}
    assert rows["delivered"].taken
    assert rows["delivered"].scores == rows["continued"].scores
    assert len(measured) == 2  # on record


def test_macro_f1_is_computed_again_for_each_draw() -> None:
    references = [[label] for label in ("a", "a", "b", "b", "c", "a", "b")]
    ours, theirs = ["a", "a", "b", "a", "c", "a", "b"], ["a", "b", "b", "a", "a", "a", "c"]
    found = [score(["macro_f1"], answers, references, "jv")["macro_f1"] for answers in (ours, theirs)]
    compared = compare_with_baselines(
        found[0].statistics,
        {"theirs": found[1].statistics},
        corpus_score=METRICS["macro_f1"].from_statistics,
        resamples=2000,
    )["theirs"]
    assert compared.difference == pytest.approx(found[0].value - found[1].value)
    assert compared.low < compared.difference < compared.high
    assert torch.tensor(found[0].statistics).shape == (7, 9)


def test_a_translation_is_scored_by_chrf_and_bleu(tiny_workspace) -> None:
    write("translation")
    metrics = api.run("tiny.yaml", folder="run").metrics
    assert list(metrics.systems["grasp"].metrics) == ["chrf++", "bleu"]
    assert "nw:2" in metrics.signatures["chrf++"]
    report = Path("run/report.md").read_text(encoding="utf-8")
    assert "chrF++" in report
    assert "is worth" not in report  # neither score is a mean over examples
    assert 'grasp-lora predict adapter --context "..."' in report
    rows = {
        name: [json.loads(line)["statistics"]["chrf++"] for line in path.read_text(encoding="utf-8").splitlines()]
        for name in ("grasp", "target")
        for path in [Path(f"run/evaluation/{name}.jsonl")]
    }
    corpus_score = METRICS["chrf++"].from_statistics
    assert corpus_score is not None
    for name, sums in rows.items():
        assert float(corpus_score(torch.tensor(sums).sum(dim=0))) == pytest.approx(
            metrics.systems[name].metrics["chrf++"], abs=1e-6
        )
    known = compare_grasp(read_run(Path("run")))
    assert known["target"].score is not None
    alone = compare_with_baselines(rows["grasp"], {"target": rows["target"]}, corpus_score=corpus_score)["target"]
    assert known["target"].score.difference == pytest.approx(alone.difference)
    assert known["target"].score.low <= alone.low <= alone.high <= known["target"].score.high  # that holds for all rows


def test_check_says_what_can_be_chosen(tiny_workspace) -> None:
    write("classification")
    session = Session(*load_recipe("tiny.yaml", ['data.labels=["no","not","yes","never"]']))
    texts = {finding.level: finding.text for finding in preflight(session) if finding.topic == "labels"}
    assert texts["ok"].startswith(
        "4, how often each stands in train + dev + micro_dev + test: never 0 + 0 + 0 + 0, no 4 + 3 + 1 + 2, "
    )
    assert texts["warning"] == "no training row has never; add rows, or remove it"
    Path("source.jsonl").write_text(
        "".join(json.dumps({"text": f"s {i}", "label": "ja"}) + "\n" for i in range(20)), encoding="utf-8"
    )
    findings = preflight(Session(*load_recipe("tiny.yaml")))
    assert [one.text for one in findings if (one.level, one.topic) == ("warning", "labels")] == [
        "the source has labels that the target has not, ja; if they mean the same, write them alike in both files"
    ]


@pytest.mark.parametrize(
    ("task", "changes", "options", "message"),
    [
        (
            "classification",
            {},
            ['data.labels=["no","not"]'],
            "has the label 'yes', which is not among those of data.labels",
        ),
        ("classification", {"label": "Yes"}, ['data.labels=["no","not","yes"]'], "; write it as 'yes'"),
        ("classification", {"label": " yes"}, [], "with white space around it"),
        ("classification", {"label": ""}, [], "label is empty"),
        ("classification", {}, ["data.labels=[not]"], "needs two labels or more"),
        ("translation", {"target": ""}, [], "target is empty"),
        ("translation", {"source": " "}, [], "source is empty"),
        ("translation", {}, ["data.labels=[a, b]"], "the task translation writes its answers"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(task, changes, options, message, tiny_workspace, refused) -> None:
    write(task, **changes)
    options = ["data.target.language=ar", *options]  # which has templates, so that no warning stands before the error
    refused("run", [part for option in options for part in ("--set", option)], message)
