"""What a label may be: unknown, empty and look-alike ones are named, and one that begins another is no mistake."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from grasp_lora.data.data_settings import CorpusSettings, DataSettings
from grasp_lora.data.encode import Encoder, encode_labels
from grasp_lora.data.records import MOST_LABELS, check_labels
from grasp_lora.data.splits import Splits, build_splits
from grasp_lora.data.tasks import Template
from grasp_lora.errors import DataError

Rows = list[dict[str, object]]


def rows(labels: list[str], count: int = 24, name: str = "t") -> Rows:
    return [{"text": f"{name} {i}", "label": labels[i % len(labels)]} for i in range(count)]


@pytest.fixture
def split(tmp_path: Path, tiny_tokenizer) -> Callable[..., Splits]:
    """Give `split(train, test, source, **settings)`, which splits rows of files of their own."""

    def call(train: Rows, test: Rows | None = None, source: Rows | None = None, **settings: object) -> Splits:
        given = {"train": train, "test": rows(["a", "ab"], 6, "other") if test is None else test, "source": source}
        for name, content in given.items():
            (tmp_path / name).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in content or []))
        target = CorpusSettings("jv", files={"train": ("train.jsonl",), "test": ("test.jsonl",)}, micro_dev=0)
        rich = None if source is None else CorpusSettings("en", files={"pool": ("source.jsonl",)}, dev=0)
        data = DataSettings("classification", target, rich, **settings)
        return build_splits(data, tiny_tokenizer, 0, tmp_path)

    return call


def test_the_labels_are_those_of_the_training_rows_with_their_end(split, tiny_tokenizer):
    found = split(rows(["ab", "a"], 24))
    assert list(found.labels) == ["a", "ab"]  # one begins the other: the end tells them apart
    for label, tokens in found.labels.items():
        assert tokens[-1] == tiny_tokenizer.eos_token_id
        assert tiny_tokenizer.decode(tokens[:-1]) == f" {label}"
    assert all(example.completion_ids == found.labels[example.references[0]] for example in found.train)
    assert found.report.labels == {
        label: {"source_train": 0, "source_dev": 0, "train": 12, "dev": 0, "micro_dev": 0, "test": 3}
        for label in ("a", "ab")
    }


def test_labels_are_whole_however_short_examples_have_to_be(tiny_tokenizer):
    template = Template("{text}:", " {label}")
    encoder = Encoder(tiny_tokenizer, "classification", template, max_tokens=4, max_document_tokens=1)
    labels = {"sports": " sports", "politics": " politics"}
    found = encode_labels(labels, encoder)
    assert {label: tiny_tokenizer.decode(tokens[:-1]) for label, tokens in found.items()} == labels


def test_a_label_of_the_recipe_that_no_train_or_test_row_has_is_told_of(split, caplog):
    split(rows(["a", "b"]), rows(["a"], 6, "o"))
    assert list(split(rows(["a"]), rows(["a", "c"], 6, "o"), labels=("c", "a")).labels) == ["a", "c"]
    split(rows(["a", "b"]), rows(["a", "b"], 6, "o"))
    assert [text for text in caplog.messages if "row has" in text] == [
        "no test row has the label b: the scores say nothing of it",
        "no train row has the label c: nothing is learned of it",
    ]


def test_the_source_may_have_labels_of_its_own(split):
    found = split(rows(["a", "ab"]), source=rows(["x", "a"], name="s"))
    assert list(found.labels) == ["a", "ab"]
    assert len(found.source_train) == 24


@pytest.mark.parametrize(
    ("train", "test", "settings", "message"),
    [
        (["ankese", "b"], ["ankesë", "c"], {}, r"line 1 has the label 'ankesë'.*; write it as 'ankese'"),
        (["ankese", "b"], ["ankesë", "c"], {},
         r"the test row test\.jsonl, line 2 has the label 'c', which is not among those of.*; correct it, or name every label"),
        (["a", "ab"], ["A"], {}, r"has the label 'A', .*\(a, ab\); write it as 'a'"),
        (["a", "b"], ["a", "b"], {"labels": ("a", "c")}, r"has the label 'b', .*those of data\.labels \(a, c\); correct it"),
        (["a"], ["a"], {}, r"the training rows of the target: 1 labels, first a; a classification has 2 to 200"),
        ([f"l{i}" for i in range(500)], ["l1"], {}, rf"500 labels, first l0, l1, l10; a classification has 2 to {MOST_LABELS}"),
    ],
)  # fmt: skip
def test_what_no_answer_can_be_chosen_from_is_refused(train, test, settings, message, split):
    with pytest.raises(DataError, match=message) as error:
        split(rows(train, max(24, len(train))), rows(test, len(test), "o"), **settings)
    assert "\n" not in str(error.value)


def test_a_source_label_that_is_written_otherwise_is_refused(split):
    message = r"the source_train row source.jsonl, line \d+ has the label 'AB', .*; write it as 'ab'"
    with pytest.raises(DataError, match=message):
        split(rows(["a", "ab"]), source=rows(["a", "AB"], name="s"))


def test_labels_that_the_tokenizer_confounds_are_refused(tiny_tokenizer, split, monkeypatch):
    whole = type(tiny_tokenizer).__call__
    monkeypatch.setattr(
        type(tiny_tokenizer),
        "__call__",
        lambda self, texts, **options: whole(self, [text.replace("ab", "a") for text in texts], **options),
    )
    with pytest.raises(DataError, match="the labels 'a' and 'ab' are the same tokens; rename one"):
        split(rows(["a", "ab"]))


def test_references_beside_a_label_are_right_answers_too(split):
    found = split([row | {"references": ["a", "b"]} for row in rows(["a", "b"])], rows(["a", "b"], 6, "o"))
    assert list(found.labels) == ["a", "b"]
    assert {example.references for example in found.train} == {("a", "b"), ("b", "a")}


def test_a_whole_number_is_a_label_as_in_csv_and_nothing_else_that_is_no_text(split):
    def numbered(kind: type, count: int = 24) -> Rows:
        return [{"text": f"{kind.__name__} {count} {i}", "label": kind(i % 2)} for i in range(count)]

    assert list(split(numbered(int), numbered(int, 6)).labels) == ["0", "1"]
    for kind in (float, bool):
        with pytest.raises(DataError, match=f"line 1, .*: label must be a text, found {kind.__name__}"):
            split(numbered(kind))


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("qa", ("a", "b"), "the task qa writes its answers; remove them, or set task to classification"),
        ("classification", ("a", "b "), "the label 'b ' is empty or has white space around it"),
        ("classification", ("a", "A"), "the labels 'A' and 'a' differ in case or white space alone; write them alike"),
    ],
)
def test_labels_of_a_recipe_are_checked_with_it(task, labels, message):
    with pytest.raises((DataError, ValueError), match=message):
        DataSettings(task, CorpusSettings("jv", files={"pool": ("a.csv",)}), labels=labels)


def test_joiners_that_belong_to_a_word_stay():
    labels = ("می\u200cخواهم", "അവന്\u200d")  # Persian, and a letter of Malayalam in its older writing
    assert set(check_labels(labels, "here")) == set(labels)


def test_splits_of_one_pool_have_about_the_same_share_of_each_label(tmp_path: Path, tiny_tokenizer):
    counts = {"test": 15, "dev": 12, "micro_dev": 8}
    labels = ["a"] * 30 + ["ab"] * 20 + ["b"] * 9 + ["rare"]
    content = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    settings = DataSettings("classification", CorpusSettings("jv", files={"pool": ("pool.jsonl",)}, **counts))
    drawn = [build_splits(settings, tiny_tokenizer, seed, tmp_path) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0].test != drawn[2].test
    for splits in drawn:
        for label in set(labels):
            by_split = splits.report.labels[label]
            for name, size in {**counts, "train": 25}.items():
                assert abs(by_split[name] - labels.count(label) * size / 60) <= 1, (label, by_split)
        assert splits.report.labels["rare"]["train"] == 1


def test_groups_of_texts_stay_whole_where_splits_are_stratified(tmp_path: Path, tiny_tokenizer):
    content = [
        {"text": f"text {i}", "group": f"g{i // 3}", "label": ("a", "b")[i // 3 % 3 == 0 and i % 3 < 2]}
        for i in range(90)
    ]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    target = CorpusSettings("jv", files={"pool": ("pool.jsonl",)}, test=24, dev=18, micro_dev=9)
    splits = build_splits(DataSettings("classification", target), tiny_tokenizer, 0, tmp_path)
    shares = {name: splits.report.labels["b"][name] / len(getattr(splits, name)) for name in ("train", "dev", "test")}
    assert all(0.15 <= share <= 0.28 for share in shares.values()), shares  # 20 of 90
    for name in ("train", "dev", "micro_dev", "test"):
        assert set(Counter(row.group for row in getattr(splits, name)).values()) == {3}


@pytest.mark.parametrize("count", [60, 900])
def test_labels_of_one_row_teach_also_where_not_all_rows_are_asked_for(count, tmp_path, tiny_tokenizer):
    """In a test set nothing would be said of them; left over, nothing would be learned of them. 900 are not all read."""
    content = rows(["a", "b"], count) + [{"text": f"rare {i}", "label": f"rare{i}"} for i in range(5)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    target = CorpusSettings("jv", files={"pool": ("pool.jsonl",)}, test=10, dev=0, micro_dev=0, train=30)
    for seed in range(5):
        found = build_splits(DataSettings("classification", target), tiny_tokenizer, seed, tmp_path)
        assert (len(found.test), len(found.train)) == (10, 30)
        labels = Counter(example.references[0] for example in found.train)
        assert {f"rare{i}" for i in range(5)} <= set(labels)
        assert {example.references[0] for example in found.test} == {"a", "b"}
        assert labels["a"] + labels["b"] == 25
        assert abs(labels["a"] - labels["b"]) < 5
