"""Settings are checked, splits are reproducible, take whole groups and leak nothing."""

import json
import logging
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from hypothesis import given, reject
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from grasp_lora.data.data_settings import CorpusSettings, DataSettings
from grasp_lora.data.encode import Example, Tally
from grasp_lora.data.files import Row, Table
from grasp_lora.data.groups import MOST_CONTINUED, join_groups, keys_with_turns
from grasp_lora.data.records import Record, make_pool
from grasp_lora.data.splits import HELD_OUT, SPLITS, DataReport, Splits, assign, build_splits, check_disjoint
from grasp_lora.errors import DataError


def squad(language: str, articles: int, questions: int = 2, titled: bool = True) -> dict:
    """Build parallel SQuAD data: ids are shared between languages, texts and titles are not."""
    data = []
    for a in range(articles):
        context = f"{language} article {a} says yes"
        qas = [
            {"id": f"q{a}-{q}", "question": f"{language} {q}?", "answers": [{"text": "yes", "answer_start": 0}]}
            for q in range(questions)
        ]
        title = f"{language} title {a}" if titled else ""
        data.append({"title": title, "paragraphs": [{"context": context, "qas": qas}]})
    return {"data": data}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, object], str]:
    """Give `write(name, content)`: rows as JSON lines, an object as JSON; returns the name."""

    def to_file(name: str, content: object) -> str:
        lines = map(json.dumps, content) if isinstance(content, list) else [json.dumps(content)]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        return name

    return to_file


def prompt_rows(names: str | range, completion: str = "ok") -> list[dict[str, str]]:
    return [{"prompt": f"prompt {name}", "completion": completion} for name in names]


def ids(examples: tuple[Example, ...]) -> list[str]:
    return [e.id for e in examples]


def example(identity: str, group: str = "", prompt: str = "") -> Example:
    return Example(identity, prompt or identity, "c", ("c",), group or identity, (1,), (2,))


def splits_of(**named: list[Example]) -> Splits:
    report = DataReport("completion", False, "{prompt}", 0, Tally("ar"), None)
    return Splits(**{name: tuple(named.get(name, ())) for name in SPLITS}, report=report)


class TestGroups:
    @given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 8)), max_size=40), st.randoms())
    def test_equals_a_closure_and_ignores_the_order(self, links, generator):
        keys = [frozenset({f"id:{i}", f"text:{t}", f"article:{a}"}) for i, t, a in links]
        groups = join_groups(keys)
        for start in keys:
            reached = set(start)
            while more := {key for other in keys if other & reached for key in other} - reached:
                reached |= more
            assert {groups[key] for key in reached} == {min(k[5:] for k in reached if k.startswith("text:"))}
        generator.shuffle(keys)
        assert join_groups(keys) == groups


def talk(*said: str) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]}


def table_of(rows: list[dict[str, object]], name: str = "file") -> Table:
    return Table(name, [Row(f"row {place}", row) for place, row in enumerate(rows)])


def groups(*pools: list[dict[str, object]]) -> list[str]:
    """The group of each row, where each list is a file of its own."""
    records: list[Record] = []
    for number, rows in enumerate(pools):
        records += make_pool([table_of(rows, f"file {number}")], "completion").records
    names = join_groups(keys_with_turns(records))
    return [names[min(record.keys)] for record in records]


def test_a_row_and_what_goes_on_after_it_join_also_across_files():
    first, second, third = groups(
        [talk("hi", "hello", "a", "b")], [talk("hi", "hello", "a ", "b", "c", "d"), talk("hi", "hello", "e", "f")]
    )
    assert first == second != third  # the opening that all share joins none


@pytest.mark.parametrize("answer", ["hello", "good morning"])
def test_versions_of_a_conversation_join_where_only_the_longer_have_a_system_turn_or_another_answer(answer):
    short, longer = talk("hi", "hello"), talk("hi", answer, "how are you?", "fine")
    longer = {"messages": [{"role": "system", "content": "Be kind."}, *longer["messages"]]}
    assert len(set(groups([short, longer]))) == 1


def test_near_copies_of_a_text_join():
    texts = ("The first text", "THE\u00a0\ufb01rst, text.", "The second text")
    rows = [{"document": text, "summary": "s"} for text in texts]
    first, near, other = make_pool([table_of(rows)], "summarization").records
    assert first.keys & near.keys
    assert not first.keys & other.keys


def test_both_sides_of_a_translation_keep_its_pairs_together():
    """As in a corpus of many languages, where one reference stands in several pairs."""
    rows = [
        {"source": source, "target": target} for source, target in (("un", "one"), ("moja", "One."), ("deux", "two"))
    ]
    first, second, other = make_pool([table_of(rows)], "translation").records
    assert first.keys & second.keys
    assert not first.keys & other.keys


def test_a_translation_has_a_mark_of_its_original_by_its_id_or_its_article_and_another_row_of_its_number_has_none():
    def marks(prompt: str, **columns: str) -> set[str]:
        row = {"prompt": prompt, "completion": "c", **columns}
        [record] = make_pool([table_of([row], prompt)], "completion", {"title": "title"}).records
        return set(record.marks)

    assert marks("one", id="q1", title="Nairobi") & marks("moja", id="q1", title="Mji")
    assert marks("one", id="q1", title="Nairobi") & marks("moja", id="q2", title="nairobi")
    assert marks("one", id="q1", title="a") & marks(
        "moja", id=" q1\u00a0", title="b"
    )  # as cells of a spreadsheet have it
    assert not marks("one", id="1", title="Nairobi") & marks("moja", id="1", title="Mji")


def test_rows_of_prompt_and_history_join():
    plain = {"instruction": "a", "output": "b"}
    first, second = groups([plain, {"instruction": "c", "output": "d", "history": [["a", "b"]]}])
    assert first == second


def test_an_opening_of_many_conversations_is_no_conversation():
    def found(count: int) -> set[str]:
        return set(groups([talk("hi", "hello"), *(talk("hi", "hello", f"q{i}", "a") for i in range(count))]))

    assert len(found(MOST_CONTINUED)) == 1
    assert len(found(MOST_CONTINUED + 1)) == MOST_CONTINUED + 2


class TestAssign:
    @staticmethod
    def groups(sizes: list[int]) -> list[list[Example]]:
        return [[example(f"{g}-{i}", str(g)) for i in range(size)] for g, size in enumerate(sizes)]

    def test_a_group_is_cut_only_where_none_fits(self):
        result = assign(self.groups([3, 2, 4, 1]), {"test": 5, "dev": 2, "train": None})
        assert [e.id for e in result["test"]] == ["0-0", "0-1", "0-2", "1-0", "1-1"]
        assert [e.id for e in result["dev"]] == ["3-0", "2-0"]
        assert result["train"] == []

    def test_spread_takes_little_of_each_group(self):
        result = assign(self.groups([20] * 20), {"test": 20, "micro_dev": 16, "train": 9}, ("micro_dev", "train"))
        groups = {name: Counter(e.group for e in examples) for name, examples in result.items()}
        assert groups["test"] == {"0": 20}
        assert set(groups["micro_dev"].values()) == {2}
        assert max(groups["train"].values()) == 2
        assert sum(groups["train"].values()) == 9

    @given(
        st.lists(st.integers(1, 9), max_size=30),
        st.lists(st.one_of(st.none(), st.integers(0, 20)), min_size=4, max_size=4),
        st.lists(st.sampled_from(["test", "micro_dev", "train"])),
    )
    def test_exact_and_disjoint(self, sizes, asked, spread):
        groups = self.groups(sizes)
        counts = dict(zip(("test", "dev", "micro_dev", "train"), asked, strict=True))
        result = assign(groups, counts, spread)
        taken = [{e.group for e in examples} for examples in result.values()]
        assert sum(map(len, taken)) == len(set().union(*taken))
        for name, count in counts.items():
            chosen = result[name]
            assert len({e.id for e in chosen}) == len(chosen)
            assert count is None or len(chosen) <= count
            if count is not None and len(chosen) < count:  # short only when nothing is left
                assert len(set().union(*taken)) == len(groups)


class TestCheckDisjoint:
    def test_clean_splits_pass(self):
        named = {name: [example(f"{name}{i}") for i in range(3)] for name in SPLITS}
        named["source_train"].append(example("translation", group="train0"))
        check_disjoint(splits_of(**named))

    @pytest.mark.parametrize("kind", ["id", "prompt", "group"])
    @pytest.mark.parametrize(
        "pair",
        [
            ("train", "test"),
            ("train", "dev"),
            ("micro_dev", "dev"),
            ("micro_dev", "test"),
            ("source_train", "test"),
            ("source_train", "micro_dev"),
            ("source_dev", "dev"),
            ("source_train", "source_dev"),
        ],
    )
    def test_planted_leaks(self, pair, kind):
        named = {name: [example(f"{name}{i}") for i in range(3)] for name in SPLITS}
        victim = named[pair[1]][0]
        planted = {
            "id": example(victim.id, group="new", prompt="new"),
            "prompt": example("new", prompt=f"  {victim.prompt}\n"),
            "group": example("new", group=victim.group),
        }
        named[pair[0]].append(planted[kind])
        shared = (int(kind == one) for one in ("id", "prompt", "group"))
        message = "share {} ids, {} prompts and {} groups".format(*shared)
        with pytest.raises(DataError, match=message) as caught:
            check_disjoint(splits_of(**named))
        assert any(f"{a} and {b} share" in str(caught.value) for a, b in (pair, pair[::-1]))

    def test_an_id_twice_in_one_split(self):
        with pytest.raises(DataError, match="dev holds 1 ids twice"):
            check_disjoint(splits_of(dev=[example("a"), example("a", group="b", prompt="c")]))


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"files": {}}, "data of ar is given by nothing; give files or hub"),
            ({"files": {"pool": ("a",), "dev": ("b",)}}, "files has pool, dev; give a list"),
            ({"files": {"dev": ("b",)}}, "files has dev; give a list"),
            ({"hub": ("a/b",)}, "data of ar is given by files and hub"),
            ({"columns": {"body": "text"}}, "columns names body; allowed: answer, completion, context"),
            ({"files": {"train": ("b",)}, "dev": 5}, "dev is 5 but there are no files of dev"),
        ],
    )
    def test_corpus(self, changes, message):
        with pytest.raises(ValueError, match=message):
            CorpusSettings(**{"language": "ar", "files": {"pool": ("a.json",)}, **changes})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"task": "qna"}, "there is no task 'qna'; allowed: qa, summarization, classification"),
            ({"task": "completion", "max_document_tokens": 9}, "the task completion has no document to cut"),
            ({"prompt": "{context} {title}"}, r"names \{title\}; allowed fields: \{context\}, \{question\}"),
            ({"prompt": {"fr": "{context}"}}, "prompt has a template for fr, but the data are of ar"),
            ({"prompt": "{question.__class__}"}, r"names \{question.__class__\}"),
            ({"prompt": "{question"}, r"prompt template '\{question'.*write \{\{ or \}\} for a literal brace"),
            ({"completion": "yes"}, r"completion template 'yes' names no field; allowed fields: \{answer\}"),
            ({"source": CorpusSettings("en", files={"pool": ("a",)}, test=5)}, "source has only train and dev splits"),
        ],
    )
    def test_data(self, changes, message):
        target = CorpusSettings("ar", files={"pool": ("a.json",)})
        with pytest.raises(ValueError, match=message):
            DataSettings(**{"task": "qa", "target": target, **changes})


class TestBuildSplits:
    COUNTS = ("test", "dev", "micro_dev", "train")

    def qa(self, write: Callable[[str, object], str], **changes: object) -> DataSettings:
        write("en.json", squad("en", 60))
        write("ar.json", squad("ar", 50))
        defaults = {
            "task": "qa",
            "source": CorpusSettings("en", files={"pool": ("en.json",)}),
            "target": CorpusSettings("ar", files={"pool": ("ar.json",)}, test=20, dev=9, micro_dev=8, train=10),
        }
        return DataSettings(**{**defaults, **changes})

    def test_pools(self, write, tiny_tokenizer, tmp_path):
        splits = build_splits(self.qa(write), tiny_tokenizer, seed=1, base=tmp_path)
        assert [len(getattr(splits, name)) for name in self.COUNTS] == [20, 9, 8, 10]
        held_out = {e.id.split("-")[0] for name in HELD_OUT for e in getattr(splits, name)}
        assert not held_out & {e.id.split("-")[0] for e in splits.source_train + splits.source_dev}
        assert not held_out & {e.id.split("-")[0] for e in splits.train}
        source = splits.report.source
        assert source.read == 120
        assert source.excluded_for_leak == 2 * len(held_out)
        assert len(splits.source_dev) == 12
        assert len(splits.source_train) == 120 - 12 - 2 * len(held_out)
        assert source.unused == 0
        assert splits.report.target.unused == 100 - 47
        assert all(e.prompt.startswith("Context: en article") for e in splits.source_dev)
        assert splits.train[0].prompt.startswith("السياق: ar article")
        report = splits.report.to_json()
        assert json.loads(json.dumps(report)) == report

    def test_same_seed_same_splits(self, write, tiny_tokenizer, tmp_path):
        settings = self.qa(write)
        state = random.getstate()
        first, again, other = (build_splits(settings, tiny_tokenizer, seed, tmp_path) for seed in (1, 1, 2))
        assert random.getstate() == state
        assert first == again
        assert first.test != other.test

    def test_the_order_of_the_files_does_not_matter(self, write, tiny_tokenizer, tmp_path):
        content = squad("ar", 50)
        halves = [write(f"{i}.json", {"data": content["data"][i * 25 :][:25]}) for i in (0, 1)]
        found = []
        for files in (halves, halves[::-1]):
            target = CorpusSettings("ar", files={"pool": tuple(files)}, test=20, dev=0, micro_dev=8, train=10)
            found.append(build_splits(DataSettings("qa", target), tiny_tokenizer, 3, tmp_path))
        assert found[0] == found[1]

    def test_dev_free_and_without_source(self, write, tiny_tokenizer, tmp_path):
        target = CorpusSettings("sw", files={"pool": (write("x.jsonl", prompt_rows(range(200))),)}, dev=0)
        splits = build_splits(DataSettings("completion", target), tiny_tokenizer, 0, tmp_path)
        sizes = [len(getattr(splits, name)) for name in ("source_train", "source_dev", *self.COUNTS)]
        assert sizes == [0, 0, 100, 0, 16, 84]

    def test_test_files_beside_a_pool_leave_nothing_related_in_the_pool(self, tiny_tokenizer, write, tmp_path):
        more = squad("fr", 3)
        more["data"][0]["title"] = "de_title_0"  # as XQuAD writes what MLQA calls "de title 0"
        for number, article in enumerate(more["data"]):
            article["paragraphs"][0]["qas"][0]["id"] = f"more{number}"
            article["paragraphs"][0]["qas"][1]["id"] = f"also{number}"
        more["data"][2]["paragraphs"][0]["qas"][1]["id"] = "q5-0"
        files = {"pool": (write("de.json", squad("de", 12)),), "test": (write("more.json", more),)}
        corpus = CorpusSettings("de", files=files, train=6, dev=4, micro_dev=2, test=4)
        source = CorpusSettings("en", files={"pool": (write("en.json", squad("en", 12)),)}, dev=2)
        splits = build_splits(DataSettings("qa", corpus, source), tiny_tokenizer, 0, tmp_path)
        assert len(splits.test) == 6 + 4
        assert {f"{kind}{n}" for kind in ("more", "also") for n in range(2)} | {"more2", "q5-0"} <= set(
            ids(splits.test)
        )
        taught = {*ids(splits.train), *ids(splits.dev), *ids(splits.micro_dev), *ids(splits.source_train)}
        assert not taught & {"q0-0", "q0-1", "q5-0", "q5-1"}
        assert splits.report.target.excluded_for_leak == 4

    def test_a_pool_from_the_hub(self, monkeypatch, tiny_tokenizer):
        def load(name: str, config: str, split: str) -> datasets.Dataset:
            assert (name, config, split) == ("org/talk", "ar", "train")
            return datasets.Dataset.from_list(prompt_rows(range(30)))

        monkeypatch.setattr(datasets, "load_dataset", load)
        target = CorpusSettings("ar", hub=("org/talk", "ar"), test=5, dev=0, micro_dev=4)
        splits = build_splits(DataSettings("completion", target), tiny_tokenizer, 0)
        assert len(splits.train) == 21
        assert splits.train[0].id.startswith("hub:org/talk/ar/train:")

    def test_too_few(self, write, tiny_tokenizer, tmp_path):
        rows = [*prompt_rows(range(30)), {"prompt": "x" * 600, "completion": "y"}]
        target = CorpusSettings("en", files={"pool": (write("x.jsonl", rows),)}, test=20, dev=5, micro_dev=4, train=2)
        with pytest.raises(DataError, match=r"asked for test 20, dev 5, micro_dev 4, train 2 \(together 31") as caught:
            build_splits(DataSettings("completion", target), tiny_tokenizer, 0, tmp_path)
        for part in ("30 examples in 30 groups", "31 read, 1 are longer than max_tokens 512", "train got 1", "Lower"):
            assert part in str(caught.value)

    def test_all_too_long(self, write, tiny_tokenizer, tmp_path):
        target = CorpusSettings("en", files={"pool": (write("x.jsonl", prompt_rows(["a" * 90, "b" * 50])),)})
        # bos + "prompt " + 50 + "ok" + eos
        with pytest.raises(DataError, match="all 2 examples are longer than max_tokens 20; the shortest has 61 tokens"):
            build_splits(DataSettings("completion", target, max_tokens=20), tiny_tokenizer, 0, tmp_path)

    def test_a_large_pool_is_not_read_to_its_end(self, write, tiny_tokenizer, tmp_path):
        rows = [*prompt_rows(range(1000)), *prompt_rows(["x" * 600 + str(i) for i in range(1000)])]
        counts = {"test": 20, "dev": 5, "micro_dev": 4, "train": 2}
        target = CorpusSettings("en", files={"pool": (write("x.jsonl", rows),)}, **counts)
        splits = build_splits(DataSettings("completion", target), tiny_tokenizer, 0, tmp_path)
        assert 0 < splits.report.target.too_long < 300
        target = CorpusSettings("en", files={"pool": ("x.jsonl",)}, **{**counts, "train": 900})
        splits = build_splits(DataSettings("completion", target), tiny_tokenizer, 0, tmp_path)
        assert len(splits.train) == 900

    def test_few_articles_in_micro_dev_are_warned_about(self, write, tiny_tokenizer, tmp_path, caplog):
        write("ar.json", squad("ar", 20, questions=20))
        for train, groups in ((None, 1), (30, 8)):
            target = CorpusSettings("ar", files={"pool": ("ar.json",)}, train=train)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                splits = build_splits(DataSettings("qa", target), tiny_tokenizer, 0, tmp_path)
            assert len({example.group for example in splits.micro_dev}) == groups
            assert ("16 micro-dev examples come from 1 group(s) only" in caplog.text) == (groups == 1)

    def test_a_tokenizer_without_a_chat_template(self, tiny_tokenizer):
        settings = DataSettings("qa", CorpusSettings("ar", files={"pool": ("a.json",)}), chat_template=True)
        with pytest.raises(DataError, match=r"the tokenizer has no chat template, .*set data\.chat_template to false"):
            build_splits(settings, tiny_tokenizer, 0)

    @hypothesis_settings(deadline=None, max_examples=25)
    @given(
        st.lists(st.tuples(st.integers(0, 200), st.integers(0, 300)), min_size=40, max_size=90),
        st.lists(st.tuples(st.integers(0, 200), st.integers(0, 300)), min_size=20, max_size=60),
        st.integers(0, 99),
    )
    def test_random_groups_never_leak(self, tmp_path_factory, tiny_tokenizer, target, source, seed):
        folder = tmp_path_factory.mktemp("random")
        rows = {"ar": target, "en": source}
        for language, links in rows.items():
            lines = [
                json.dumps({"id": f"{language}{i}", "group": g, "prompt": f"{p}", "completion": "c"})
                for i, (g, p) in enumerate(links)
            ]
            (folder / f"{language}.jsonl").write_text("\n".join(lines))
        settings = DataSettings(
            "completion",
            CorpusSettings("ar", files={"pool": ("ar.jsonl",)}, test=6, dev=3, micro_dev=3),
            CorpusSettings("en", files={"pool": ("en.jsonl",)}, dev=0),
        )
        try:
            splits = build_splits(settings, tiny_tokenizer, seed, folder)
        except DataError as error:
            if "available" not in str(error):
                raise
            reject()  # one component holds nearly all
        links_of = {f"{language}{i}": link for language, links in rows.items() for i, link in enumerate(links)}
        for kind in (0, 1):  # neither a group nor a prompt stands in two splits
            values = {name: {links_of[e.id][kind] for e in getattr(splits, name)} for name in SPLITS}
            for name in HELD_OUT:
                assert not values[name] & values["source_train"]
                assert not values[name] & values["train"]
            assert not values["test"] & (values["dev"] | values["micro_dev"])
            assert not values["dev"] & values["micro_dev"]


class TestGivenSplits:
    @pytest.fixture
    def build(self, tiny_tokenizer, tmp_path) -> Callable[..., Splits]:
        return lambda files, **sizes: build_splits(
            DataSettings("completion", CorpusSettings("en", files, **sizes)), tiny_tokenizer, 0, tmp_path
        )

    @pytest.fixture
    def sizes(self, build) -> Callable[..., list[int]]:
        """Give `sizes(files, **sizes)`: of train, dev, micro_dev and test."""

        def call(files: dict[str, tuple[str, ...]], **sizes: int) -> list[int]:
            splits = build(files, **sizes)
            return [len(getattr(splits, name)) for name in ("train", "dev", "micro_dev", "test")]

        return call

    @pytest.fixture
    def files(self, write: Callable[[str, object], str]) -> dict[str, tuple[str, ...]]:
        names = {"train": range(9), "dev": range(10, 16), "test": range(30, 37)}
        return {name: (write(f"{name}.jsonl", prompt_rows(span)),) for name, span in names.items()}

    def test_all_of_each_file_or_up_to_the_cap(self, files, sizes):
        assert sizes(files, micro_dev=0) == [9, 6, 0, 7]
        assert sizes(files, micro_dev=0, train=5, dev=50, test=0) == [5, 6, 0, 0]

    def test_micro_dev_comes_from_dev_or_train_and_leaves_most_of_it(self, write, files, build, sizes):
        assert sizes(files) == [9, 4, 2, 7]
        assert {e.id.split(":")[0] for e in build(files).micro_dev} == {"dev.jsonl"}
        with pytest.raises(DataError, match=r"asked for micro_dev 16, dev the rest .*dev got 0"):
            build(files, micro_dev=16)
        files["dev"] = (write("many.jsonl", prompt_rows(range(40, 100))),)
        assert sizes(files) == [9, 44, 16, 7]
        del files["dev"]
        assert sizes(files) == [6, 0, 3, 7]
        assert sizes(files, micro_dev=2) == [7, 0, 2, 7]

    def test_overlaps_are_errors(self, write, files, build):
        write("test.jsonl", prompt_rows(range(7, 12)))
        with pytest.raises(DataError, match="splits overlap") as caught:
            build(files, micro_dev=0)
        assert "train and test share 0 ids, 2 prompts and 2 groups" in str(caught.value)
        assert "dev and test share 0 ids, 2 prompts and 2 groups" in str(caught.value)

    def test_prompts_that_are_alike_once_they_are_cut_are_named(self, write, tiny_tokenizer, tmp_path):
        rows = [{"document": f"{n % 6} " + "a" * 40 + f" {n}", "summary": "s", "id": f"id{n}"} for n in range(12)]
        target = CorpusSettings("en", files={"pool": (write("x.jsonl", rows),)}, train=6, dev=3, micro_dev=0, test=3)
        settings = DataSettings("summarization", target, max_document_tokens=20)
        message = r"the prompts of x\.jsonl, line \d+ and x\.jsonl, line \d+ are the same, after cuts"
        with pytest.raises(DataError, match=message):
            build_splits(settings, tiny_tokenizer, 0, tmp_path)

    def test_the_source_is_checked_where_both_are_given_and_filtered_where_not(
        self, write, files, tiny_tokenizer, tmp_path
    ):
        target = CorpusSettings("en", files, micro_dev=0)
        write("source.jsonl", prompt_rows(range(34, 60)))
        given = CorpusSettings("en", files={"train": ("source.jsonl",)})
        with pytest.raises(DataError, match="source_train and test share 0 ids, 3 prompts and 3 groups"):
            build_splits(DataSettings("completion", target, given), tiny_tokenizer, 0, tmp_path)
        pool = CorpusSettings("en", files={"pool": ("source.jsonl",)})
        splits = build_splits(DataSettings("completion", target, pool), tiny_tokenizer, 0, tmp_path)
        assert splits.report.source.excluded_for_leak == 3
        assert len(splits.source_train) + len(splits.source_dev) == 23


def test_absolute_paths_give_the_ids_and_splits_of_relative_ones_and_each_row_has_an_id_of_its_own(
    tmp_path, tiny_tokenizer
):
    names = ["rows.jsonl", "first/rows.jsonl", "second/rows.jsonl"]
    for number, name in enumerate(names):
        lines = [json.dumps(row) for row in prompt_rows(range(10 * number, 10 * number + 10))]
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "data" / name).write_text("\n".join(lines), encoding="utf-8")

    def split(files: list[str], base: Path, root: str | None = None) -> dict[str, list[tuple[str, str]]]:
        target = CorpusSettings("en", files={"pool": tuple(files)}, train=8, dev=8, micro_dev=4, test=8)
        splits = build_splits(DataSettings("completion", target, root=root), tiny_tokenizer, seed=1, base=base)
        return {name: [(each.public_id, each.prompt) for each in getattr(splits, name)] for name in SPLITS}

    (tmp_path / "elsewhere").mkdir()
    absolute = [str(tmp_path / "data" / name) for name in names]
    relative = split(names, tmp_path / "data")
    assert relative == split(absolute, tmp_path / "data") == split([names[0], *absolute[1:]], tmp_path, "data")
    outside = split(absolute, tmp_path / "elsewhere")
    found = [identity for rows in outside.values() for identity, _ in rows]
    assert len({*found}) == len(found) == 28
    assert not any("/" in identity for identity in found)
    assert [[prompt for _, prompt in rows] for rows in outside.values()] == [
        [prompt for _, prompt in rows] for rows in relative.values()
    ]
