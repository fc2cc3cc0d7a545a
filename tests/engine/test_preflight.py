"""What `check` says before a run, and what it warns about."""

import json
import re
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import read, run_tiny, session_of, step_folders

from grasp_lora.engine import preflight as preflight_module
from grasp_lora.engine.preflight import Finding, preflight
from grasp_lora.errors import DataError, RecipeError

Check = Callable[..., dict[str, Finding]]


@pytest.fixture
def check(tiny_workspace: Path) -> Check:
    """Give `check(*overrides)`: the findings by topic."""

    def call(*overrides: str) -> dict[str, Finding]:
        return {finding.topic: finding for finding in preflight(session_of(*overrides))}

    return call


def write_rows(name: str, rows: list[dict[str, object]]) -> None:
    Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_like(count: int = 60, **texts: Any) -> list[dict[str, object]]:
    """Rows of a text or of what a function makes of their numbers."""
    texts = {"id": lambda i: f"n{i}", "prompt": lambda i: f"p{i}:", "completion": " c"} | texts
    return [{key: text(i) if callable(text) else text for key, text in texts.items()} for i in range(count)]


def test_all_that_a_run_needs_is_said_and_measured_and_nothing_is_written(check: Check) -> None:
    before = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    found = {topic: finding.text for topic, finding in check().items()}
    assert found["backbone"] == "tiny-llama, 0 M weights in float32, on cpu"
    assert found["splits"] == "source_train 12, source_dev 4, train 10, dev 6, micro_dev 4, test 8"
    assert found["source"].startswith("en: read 20")
    assert found["target"].startswith("de: read 40")
    assert "loss on the answer only, for example ' " in found["label mask"]
    assert "<eos>" in found["label mask"]
    assert found["cost"] == (
        "at most 52 training examples and 48 probed ones, 152 forward passes; dev losses and answers come on top"
    )
    assert found["power"].startswith("in the report of the run, intervals of ")
    numbers = [float(number) for number in re.findall(r"\d+\.\d+|\d+", found["time"] + found["memory"])]
    assert len(numbers) >= 4
    assert " GB" in found["memory"]
    assert {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()} == before


def test_the_memory_is_measured_with_gradient_checkpointing_where_the_recipe_asks_for_it(tiny_workspace: Path) -> None:
    session, kinds = session_of("backbone.gradient_checkpointing=true"), []
    session.backbone.model.model.layers[0].register_forward_hook(
        lambda *_: kinds.append((session.backbone.model.is_activation_checkpointing, torch.is_grad_enabled()))
    )
    assert any(finding.topic == "memory" for finding in preflight(session))
    assert {checkpointing for checkpointing, learns in kinds if learns} == {True}
    assert not kinds[-1][0]  # the answers
    assert not session.backbone.model.is_activation_checkpointing
    assert not session.backbone.model.training


def test_lines_come_as_they_are_found(tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grasp_lora.engine.preflight.answer", lambda *_, **__: pytest.fail("the minutes come last"))
    assert [finding.topic for finding in islice(preflight(session_of()), 3)] == ["backbone", "splits", "leaks"]


def test_nothing_is_warned_of_where_all_is_usual(check: Check) -> None:
    found = check("data.target.micro_dev=8", "controller.rounds.every=1")
    assert {finding.level for finding in found.values()} == {"ok"}
    assert found["rounds"].text == "the controller will run 10 rounds"


@pytest.mark.parametrize(
    ("topic", "text", "rows"),
    [
        ("duplicates", r"3 of dev \(such as target.jsonl, line \d+ and target.jsonl, line \d+\), .*4 of test \(.*\); remove them",
         rows_like(prompt=lambda i: f"p{i // 2}:")),
        ("stop", r"generation.stop \['\\n'\] ends answers that test references go on after",
         rows_like(completion=lambda i: f" a\nb {i}")),
        ("answers", "of 8 test answers have more than generation.max_new_tokens 4 tokens",
         rows_like(completion=lambda i: f" long answer {i}")),
    ],
)  # fmt: skip
def test_doubtful_rows_are_warned_of(topic: str, text: str, rows: list[dict[str, object]], check: Check) -> None:
    assert topic not in check()
    write_rows("target", rows)
    finding = check()[topic]
    assert finding.level == "warning"
    assert re.search(text, finding.text)


def test_both_of_two_rows_that_are_alike_are_named_by_their_lines(check: Check, tiny_workspace: Path) -> None:
    lines = ["prompt,completion", *(f"p {min(i, 38)}:, c" for i in range(40))]
    Path("target.csv").write_text("\n".join(lines), encoding="utf-8")
    recipe = Path("tiny.yaml")
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("target.jsonl", "target.csv"), encoding="utf-8")
    text = check("data.target.train=22")["duplicates"].text
    assert "target.csv, line 40 and target.csv, line 41" in text


@pytest.mark.parametrize(
    ("prompt", "completion", "warned"),
    [
        ("why", "because", True), ("why ", "because", False), ("why?", "because", True), ("لماذا؟", "لأن", True),
        ("why:", "because", False), ("why", "\n7", False), ("问", "答", False), ("问？", "答", False),
    ],
)  # fmt: skip
def test_answers_that_go_on_the_last_word_or_sentence_of_the_prompt_are_warned_of(
    check: Check, prompt: str, completion: str, warned: bool
) -> None:
    write_rows("target", [{"prompt": f"{i} {prompt}", "completion": completion} for i in range(40)])
    found = check()
    assert ("prompt" in found) == warned
    assert not warned or found["prompt"].text.endswith(r'or write under data: prompt: "{prompt}\n"')


@pytest.mark.parametrize(
    ("task", "strange", "fault"),
    [
        ("qa", {"answer": "blue"}, "have an answer that does not stand in the context"),
        ("qa", {"answer": "THE SKY"}, None),  # but for case
        ("qa", {"context": "source 3 the sky"}, "stand in the source word for word"),
        ("completion", {"prompt": "source 3 the sky:"}, "stand in the source word for word"),
        ("translation", {"source": "source 3 the sky"}, None),  # both translate the same texts
    ],
)
def test_rows_that_may_not_belong_there_are_counted_and_the_first_is_named(
    task: str, strange: dict[str, str], fault: str | None, check: Check
) -> None:
    def rows(name: str) -> list[dict[str, object]]:
        text = "source {} the sky" if name == "source" else "the sky {} here"
        fields = {
            "qa": {"context": text, "question": "what?", "answer": "the sky"},
            "completion": {"prompt": text + ":", "completion": " yes"},
            "translation": {"source": text, "target": "in another {} way"},
        }[task]
        return [{field: value.format(i) for field, value in fields.items()} for i in range(40)]

    write_rows("source", rows("source"))
    write_rows("target", [row | (strange if i in (8, 11) else {}) for i, row in enumerate(rows("target"))])
    recipe = Path("tiny.yaml")
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("completion", task, 1), encoding="utf-8")
    finding = check("data.target.dev=4", "data.target.train=8").get("rows")
    text = f"2 of 40 target rows {fault}, first target.jsonl, line 9; correct or remove them"
    assert finding == (Finding("warning", "rows", text) if fault else None)


def test_answers_in_words_of_their_own_are_not_looked_for_in_contexts(check: Check) -> None:
    rows = [{"context": f"the sky {i}", "question": "what?", "answer": "yes"} for i in range(40)]
    write_rows("target", rows)
    write_rows("source", [row | {"context": f"source {row['context']}"} for row in rows])
    assert "rows" not in check("data.task=qa")


def labelled(count: int, **labels: str) -> list[dict[str, object]]:
    """Write a source with two labels, and a target where single rows have others: `r3="other"`."""
    write_rows("source", rows_like(40, text=lambda i: f"source text {i}", label=lambda i: ("no", "sawa")[i % 2]))
    rows = rows_like(count, text=lambda i: f"text {i}", label=lambda i: labels.get(f"r{i}", ("no", "sawa")[i % 2]))
    write_rows("target", rows)
    return rows


def label_warnings(labels: str, *overrides: str) -> list[str]:
    sizes = ("data.task=classification", f"data.labels={labels}", "data.target.train=20", "data.target.dev=8")
    findings = preflight(session_of(*sizes, *overrides))
    return [finding.text for finding in findings if finding.topic == "labels" and finding.level == "warning"]


def test_the_time_of_a_classification_counts_the_scores_of_its_labels(
    tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(model: Any, tokenizer: Any, prompts: list[Any], settings: Any, *, labels: Any, right: Any) -> None:
        assert list(labels) == ["no", "sawa"]
        time.sleep(0.05 * len(prompts))

    labelled(40)
    monkeypatch.setattr("grasp_lora.engine.preflight.answer", slow)
    sizes = ("data.task=classification", 'data.labels=["no","sawa"]', "data.target.train=20", "data.target.dev=8")
    [text] = [finding.text for finding in preflight(session_of(*sizes)) if finding.topic == "time"]
    assert float(text.rpartition(" ")[0].rpartition(" ")[2]) >= 0.05


@pytest.mark.parametrize(
    ("changes", "systems"),
    [
        (["final.deliver=best"], 7),
        (["final.deliver=grasp"], 6),
        (["final.deliver=grasp", "final.prune_ratio=0.3"], 5),
        (["final.deliver=continued", "final.prune_ratio=0"], 3),
    ],
)
def test_all_that_a_run_trains_and_measures_counts(
    changes: list[str], systems: int, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    width = preflight_module.expected_width

    def seen(metrics: Any, examples: int, pairs: int, *more: Any, **settings: Any) -> str | None:
        compared.append(pairs)
        return width(metrics, examples, pairs, *more, **settings)

    monkeypatch.setattr(preflight_module, "expected_width", seen)
    most = int(check(*changes)["cost"].text.split()[2])
    assert compared == [systems - 1]
    assert len(run_tiny(*changes).metrics.systems) == systems
    assert most == sum(read(folder / "result.json").get("trained_examples", 0) for folder in step_folders("run", "*"))


@pytest.mark.parametrize("few", [2, 5])
def test_labels_with_too_few_rows_for_the_splits_are_warned_of(few: int, tiny_workspace: Path) -> None:
    labelled(40, **{f"r{i}": "mixed" for i in (5, 15, 25, 35, 39)[:few]})
    text = "too few rows for every split: mixed (2 in all, none in test); add rows"
    assert label_warnings('["no","sawa","mixed"]') == ([text] if few == 2 else [])


def test_a_label_that_may_be_a_slip_is_named_with_its_row_and_the_one_that_may_be_meant(tiny_workspace: Path) -> None:
    labelled(40, r7="sava", r8="no ")  # white space around a label is no slip: it is removed
    [text] = label_warnings('["no","sawa","sava"]')
    assert text.startswith(
        "sava in target.jsonl, line 8: did you mean sawa, which 19 rows have? If so, correct it there"
    )
    labelled(40, r7="grade 1", r8="grade 2", r9="grade 2", r10="grade 2")
    assert not [text for text in label_warnings('["no","sawa","grade 1","grade 2"]') if "did you mean" in text]


def test_row_numbers_as_ids_are_warned_of_where_they_cost_examples(check: Check, finished_run: Path) -> None:
    write_rows("source", rows_like(60, id=lambda i: i, prompt=lambda i: f"s{i}:"))
    write_rows("target", rows_like(40, id=lambda i: i, prompt=lambda i: f"t{i}:"))
    text = check()["ids"].text
    assert text.startswith("40 ids are whole numbers that stand in several files")
    assert "examples were left out (18 in all)" in text
    pool_and_test = (
        "data.target.files={pool: [source.jsonl], test: [target.jsonl]}",
        "data.source=null",
        "source.adapters=[run/source]",
    )
    assert "examples were left out (40 in all)" in check(*pool_and_test, "data.target.test=0")["ids"].text
    write_rows("target", rows_like(40, id=lambda i: f"x{i}", prompt=lambda i: f"t{i}:"))
    assert "ids" not in check()


def test_settings_that_cannot_give_what_they_ask_for_are_warned_of(check: Check, finished_run: Path) -> None:
    for changes, topic, text in (
        (("metrics=[bertscore]",), "metrics", "bertscore has no model for de, so it will be unavailable"),
        (("data.source.language=de",), "source", "source and target are both in de; "),
        (("source.adapters=[run/source]",), "source", "source.adapters are given, so no source adapter is trained"),
    ):  # fmt: skip
        finding = check(*changes)[topic]
        assert finding.level == "warning"
        assert finding.text.startswith(text)
    given = ("source.adapters=[run/source]", "data.source=null")
    assert check(given[0])["cost"].text.startswith("at most 40 training examples")  # none of the source's
    found = check(*given)
    assert found["adapter"].text == "run/source: 4 modules, ranks 2"
    assert found["cost"].text.startswith("at most 40 training examples")


def test_few_rows_and_few_rounds_are_warned_of(check: Check) -> None:
    found = check("data.target.dev=0", "data.target.test=0")
    assert found["test"].level == found["rounds"].level == "warning"
    assert "3 rounds; raise controller.training.epochs or lower controller.rounds.every" in found["rounds"].text
    assert found["probes"] == Finding("warning", "probes", "4 examples choose the ratio; 16 are usual")
    assert "probes" not in check("controller.rounds.pool=both")  # 4 micro-dev and 6 dev examples
    grasp = ("controller.preset=grasp", "controller.rounds.every=10")
    assert "at most 2 rounds; raise controller.training.epochs or lower" in check(*grasp)["rounds"].text
    more = check(*grasp, "controller.training.epochs=2")["rounds"]
    assert (more.level, more.text) == ("ok", "the controller will run at most 3 rounds")
    rounds = [f"controller.rounds.{one}" for one in ("pool=both", "in_turn=3", "every=5", "patience=null")]
    few = check("controller.preset=grasp", *rounds)
    assert (few["rounds"].level, few["rounds"].text) == ("ok", "the controller will run 3 rounds")
    assert "and 45 probed ones," in few["cost"].text  # the baseline and 4 candidates on 3 examples


def test_what_the_recipe_asks_for_is_counted(check: Check) -> None:
    given = check("final.prune_ratio=0.4", "controller.rounds.every=1000")
    assert not {"rounds", "probes"} & set(given)
    assert given["cost"].text.startswith("at most 32 training examples and 0 probed ones, 64 forward passes")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (("controller.rounds.every=11",), RecipeError, "10 optimizer steps and probes every 11, so no round follows a step"),
        (("controller.rounds.pool=both", "data.target.dev=0"), RecipeError,
         "probes both, but data.target.dev is 0; give it examples"),
        (("data.target.dev=0", "data.target.micro_dev=0"), RecipeError, "there are none: set data.target.dev, to 16 for"),
        (("controller.training.patience=1", "data.target.dev=0"), RecipeError,
         "controller.training.patience is 1, but data.target.dev is 0; give it examples, or set that to null"),
        (("merge={rule: lorahub, weights: [0, 0]}",), RecipeError, "merge.weights is [0.0, 0.0]; give 2"),
        (("merge.weights=[1]",), RecipeError, "merge.weights is [1.0]; give 2 numbers"),
        # Data files are looked for before the backbone is loaded, which takes long.
        (("data.source.files=[none.jsonl]", "backbone.name=./nowhere"), DataError, "data file 'none.jsonl' is missing"),
    ],
)  # fmt: skip
def test_what_would_stop_a_run_is_an_error_before_it(
    changes: tuple[str, ...], error: type[Exception], message: str, check: Check
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        check(*changes)
