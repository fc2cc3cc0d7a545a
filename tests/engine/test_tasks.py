"""Classification and translation through the engine: answers, scores, intervals, and mistakes in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import read, rows_of, run_tiny, session_of, steps_of

from grasp_lora.data.encode import encode_labels
from grasp_lora.engine.check import check
from grasp_lora.engine.predict import asking
from grasp_lora.engine.preflight import preflight
from grasp_lora.errors import DataError
from grasp_lora.evaluation.metrics import METRICS
from grasp_lora.models.adapter_files import read_adapter
from grasp_lora.models.adapters import attached
from grasp_lora.training.probes import ProbeSet

LABELS = ("no", "not", "yes")


def write(task: str, **changes: Any) -> None:
    """Change tiny.yaml and its data to those of a task."""
    recipe = Path("tiny.yaml")
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("task: completion", f"task: {task}"), encoding="utf-8")
    for name, rows in (("source", 20), ("target", 40)):
        texts = [(f"{name} {i}: what?", LABELS[(i * 7 // 4) % 3]) for i in range(rows)]
        lines = [{"text": text, "label": label} for text, label in texts]
        if task == "translation":
            lines = [{"source": text, "target": f"{label} {name} {i}"} for i, (text, label) in enumerate(texts)]
        if name == "target":
            lines[4:10] = [line | changes for line in lines[4:10]]  # some of them come into a split
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_a_classification_is_answered_by_the_likeliest_label(tiny_workspace) -> None:
    write("classification")
    run = run_tiny()
    steps = steps_of(store="run/store")
    session, test, labels = steps.session, steps.splits.test, steps.splits.labels
    rows = rows_of("run/evaluation/grasp.jsonl")
    right = [row["prediction"] in row["references"] for row in rows]
    assert {row["prediction"] for row in rows} <= set(LABELS)
    assert run.metrics.systems["grasp"].metrics["accuracy"] == 100 * sum(right) / len(rows)
    assert [row["scores"] for row in rows] == [{"accuracy": 100.0 * answer} for answer in right]
    assert run.metrics.signatures["macro_f1"].endswith("labels:in_references|average:macro")
    # The score of a label is the one loss of its answer, not divided by its length.
    with attached(session.backbone.model, read_adapter("run/final").weights) as model:
        by_label = {
            label: ProbeSet([replace(row, completion_ids=tokens) for row in test]).losses(model)
            for label, tokens in labels.items()
        }
    for number, row in enumerate(rows):
        sums = {label: by_label[label][number] * len(tokens) for label, tokens in labels.items()}
        assert row["prediction"] == min(sums, key=sums.__getitem__)
        assert by_label[test[number].references[0]][number] == pytest.approx(row["loss"], abs=1e-5)
    # Whoever asks the adapter chooses among the same labels and gets the same answers.
    with asking("run/final") as asked:
        assert encode_labels(asked.form.labels, asked._encoder()) == labels
        assert asked.texts([row.prompt for row in test]) == [row["prediction"] for row in rows]


def test_only_written_answers_need_room_for_new_tokens(tiny_workspace) -> None:
    whole = "generation.max_new_tokens=512"  # as many as the context holds
    write("classification")
    check(session_of(whole))
    rows = [{"text": f"{i} " + "word " * 600, "label": LABELS[i % 3]} for i in range(40)]
    Path("target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"context holds 512; lower data\.max_tokens \(now 9999\)$"):
        check(session_of("data.max_tokens=9999"))
    write("translation")
    with pytest.raises(DataError, match=r"answer of up to 512, .*, or generation\.max_new_tokens \(now 512\)$"):
        check(session_of(whole, "data.task=translation"))


def test_a_translation_is_scored_by_chrf_and_bleu(tiny_workspace) -> None:
    write("translation")
    metrics = run_tiny().metrics
    assert list(metrics.systems["grasp"].metrics) == ["chrf++", "bleu"]
    assert "nw:2" in metrics.signatures["chrf++"]
    corpus_score = METRICS["chrf++"].from_statistics
    assert corpus_score is not None
    for name in ("grasp", "target"):
        sums = [row["statistics"]["chrf++"] for row in rows_of(f"run/evaluation/{name}.jsonl")]
        value = metrics.systems[name].metrics["chrf++"]
        assert float(corpus_score(torch.tensor(sums).sum(dim=0))) == pytest.approx(value, abs=1e-6)
    assert read("run/metrics.json")["systems"]["grasp"]["metrics"]["bleu"] >= 0


def test_check_says_what_can_be_chosen(tiny_workspace) -> None:
    write("classification")
    session = session_of('data.labels=["no","not","yes","never"]')
    texts = {finding.level: finding.text for finding in preflight(session) if finding.topic == "labels"}
    assert texts["ok"].startswith(
        "4, how often each stands in train + dev + micro_dev + test: never 0 + 0 + 0 + 0, no 4 + 2 + 1 + 3, "
    )
    assert texts["warning"] == "no row of the target has never; add rows, or delete it from data.labels"
    Path("source.jsonl").write_text(
        "".join(json.dumps({"text": f"s {i}", "label": ("ja", "no")[i % 2]}) + "\n" for i in range(20)),
        encoding="utf-8",
    )
    findings = preflight(session_of())
    assert [one.text for one in findings if (one.level, one.topic) == ("warning", "labels")] == [
        "the source has labels that the target has not, ja; if they mean the same, write them alike"
    ]
