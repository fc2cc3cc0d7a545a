"""Files become records; every malformed one is refused with its name and line."""

import csv
import io
import json
import re
from pathlib import Path
from typing import ClassVar

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grasp_lora.data.files import read_file
from grasp_lora.data.records import Pool, make_pool, text_key
from grasp_lora.errors import DataError


def squad(*articles: tuple[str, list[tuple[str, list[tuple[str, str, list[str]]]]]]) -> dict:
    """Build SQuAD data from (title, [(context, [(id, question, answers)])])."""
    return {
        "data": [
            {
                "title": title,
                "paragraphs": [
                    {
                        "context": context,
                        "qas": [
                            {
                                "id": identity,
                                "question": question,
                                "answers": [{"text": a, "answer_start": max(context.find(a), 0)} for a in answers],
                            }
                            for identity, question, answers in questions
                        ],
                    }
                    for context, questions in paragraphs
                ],
            }
            for title, paragraphs in articles
        ]
    }


def read_files(
    files: list[tuple[str, Path]], task: str, format: str = "auto", columns: dict[str, str] | None = None
) -> Pool:
    return make_pool([read_file(name, path, format) for name, path in files], task, format, columns)


def csv_text(rows: list[dict[str, str]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def read(path: Path, content: object, task: str, format: str = "auto", **columns: str) -> Pool:
    """Write content (text, bytes, rows for JSON lines, or an object for JSON) to a file and read it."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, list) and path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return read_files([(path.name, path)], task, format, columns)


class TestSquad:
    def test_reads_fields_references_and_keys(self, tmp_path):
        content = squad(("قط", [("القطة سوداء جدا", [("q1", "ما لونها؟", ["سوداء", "سوداء جدا", "سوداء"])])]))
        (record,) = read(tmp_path / "ar.json", content, "qa").records
        assert record.id == "q1"
        assert record.fields == {"context": "القطة سوداء جدا", "question": "ما لونها؟"}
        assert record.answer == "سوداء"
        assert record.references == ("سوداء", "سوداء جدا")
        assert record.keys == {"id:q1", text_key("القطة سوداء جدا"), "article:قط"}

    def test_an_article_is_one_group_in_all_its_files(self, tmp_path):
        for name, identity in (("one.json", "1"), ("two.json", "2")):
            content = squad(("قط  أسود", [(f"context {identity}", [(identity, "?", ["context"])])]))
            (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        files = [(name, tmp_path / name) for name in ("one.json", "two.json")]
        first, second = read_files(files, "qa", "squad", {}).records
        assert first.keys & second.keys == {"article:قط أسود"}

    def test_untitled_articles_are_told_apart_by_position(self, tmp_path):
        content = squad(("", [("a b", [("1", "?", ["a"])])]), ("", [("c d", [("2", "?", ["c"])])]))
        first, second = read(tmp_path / "x.json", content, "qa").records
        assert not first.keys & second.keys

    def test_a_wrong_offset_is_accepted_but_not_a_foreign_answer(self, tmp_path):
        content = squad(("T", [("one two", [("q7", "?", ["two"])])]))
        answer = content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]
        answer["answer_start"] = 1
        assert len(read(tmp_path / "x.json", content, "qa").records) == 1
        answer["text"] = "three"
        with pytest.raises(DataError, match=r"x\.json, article 1, question q7: the answer 'three' does not stand"):
            read(tmp_path / "x.json", content, "qa")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"data": [{"title": "T"}]}, r"x\.json, article 1: paragraphs must be a list of objects, found None"),
            ({"data": [{"paragraphs": [{"qas": []}]}]}, r"article 1: context must be a text, found NoneType"),
            (
                {"data": [{"paragraphs": [{"context": "c", "qas": [{}]}]}]},
                r"article 1: the id of a question must be a text .*, found None",
            ),
            ({"data": []}, r"x\.json holds no records"),
            (squad(("T", [("c", [("q", "?", [])])])), r"question q: no answer; .* set data\.skip_unanswered to true"),
            (squad(("T", [("c", [("q", " ", ["c"])])])), r"question q: question is empty"),
            (squad(("T", [("c", [("q", "?", [""])])])), r"question q: answer is empty"),
            ({"rows": []}, r"x\.json, article 1: paragraphs must be a list of objects, .*SQuAD data is an object"),
        ],
    )
    def test_malformed(self, tmp_path, content, message):
        with pytest.raises(DataError, match=message):
            read(tmp_path / "x.json", content, "qa", "squad")

    def test_fits_only_the_task_qa(self, tmp_path):
        with pytest.raises(DataError, match="is SQuAD data, which fits the task qa, not summarization"):
            read(tmp_path / "x.json", squad(("T", [("c", [("q", "?", ["c"])])])), "summarization")


class TestXlsum:
    ROW: ClassVar = {
        "id": "z-1",
        "url": "",
        "title": "标题",
        "summary": "摘要",
        "text": "\x93引用\x94\x00文\t章\r\n第二",
    }

    def test_maps_and_removes_control_characters(self, tmp_path):
        pool = read(tmp_path / "zh.jsonl", [self.ROW], "summarization")
        assert pool.records[0].fields == {"document": "“引用”文\t章\n第二"}
        assert pool.records[0].references == ("摘要",)
        assert (pool.characters_mapped, pool.characters_removed) == (2, 1)
        assert {"id:z-1", "article:标题"} < pool.records[0].keys

    def test_characters_of_windows_and_page_breaks_stay_apart(self, tmp_path):
        row = {**self.ROW, "text": "it\x92s 5\x9610 \x91so\x92 a\x97b page1\x0cpage2\x0bend"}
        pool = read(tmp_path / "zh.jsonl", [row], "summarization")
        assert pool.records[0].fields["document"] == "it’s 5–10 ‘so’ a—b page1 page2 end"
        assert (pool.characters_mapped, pool.characters_removed) == (7, 0)
        row = {**self.ROW, "text": "wait\x85foo \x805 \x84ma\x9aina\x93 \x81\x8d\x8f\x90\x9d"}
        pool = read(tmp_path / "hr.jsonl", [row], "summarization")
        assert pool.records[0].fields["document"] == "wait…foo €5 „mašina“ "
        assert (pool.characters_mapped, pool.characters_removed) == (5, 5)

    def test_an_unusual_separator_does_not_end_the_line(self, tmp_path):
        row = {**self.ROW, "text": "a\u2028b\u0085c"}
        assert read(tmp_path / "zh.jsonl", [row], "summarization").records[0].fields["document"] == "a\u2028b…c"

    def test_the_format_may_be_stated(self, tmp_path):
        assert read(tmp_path / "zh.txt", json.dumps(self.ROW), "summarization", "xlsum").records[0].id == "z-1"
        with pytest.raises(DataError, match="XL-Sum data, which fits the task summarization, not completion"):
            read(tmp_path / "zh.jsonl", [self.ROW], "completion", "xlsum")

    def test_missing_key_and_empty_summary(self, tmp_path):
        with pytest.raises(DataError, match=r"zh\.jsonl, line 1: no column 'text'"):
            read(tmp_path / "zh.jsonl", [{"id": "1", "title": "", "summary": "s"}], "summarization", "xlsum")
        with pytest.raises(DataError, match=r"zh\.jsonl, line 2: summary is empty"):
            read(tmp_path / "zh.jsonl", [self.ROW, {**self.ROW, "summary": " "}], "summarization")


class TestRecords:
    @pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
    def test_every_file_type_reads_the_same(self, tmp_path, suffix):
        rows = [{"prompt": 'say "a",\nplease', "completion": "a"}, {"prompt": "قل", "completion": "ب"}]
        path = tmp_path / f"x.{suffix}"
        if suffix in ("csv", "tsv"):
            separator = "," if suffix == "csv" else "\t"
            lines = [["prompt", "completion"], ['"say ""a"",\nplease"', "a"], ["قل", "ب"]]
            path.write_text("\n".join(separator.join(cells) for cells in lines), encoding="utf-8-sig")
        elif suffix == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text(json.dumps(rows) if suffix == "json" else "\n\n".join(map(json.dumps, rows)))
        records = read_files([("x", path)], "completion").records
        assert [(r.fields["prompt"], r.answer) for r in records] == [(r["prompt"], r["completion"]) for r in rows]
        assert [r.id for r in records] == ["x:1", "x:2"]
        assert not any(key.startswith("id:") for r in records for key in r.keys)

    def test_json_lines_saved_as_json(self, tmp_path):
        text = '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'
        assert len(read(tmp_path / "x.json", text, "completion").records) == 2

    def test_columns_ids_groups_and_references(self, tmp_path):
        row = {"key": 7, "text": "doc", "tldr": "s", "topic": "t", "gold": ["s", "short"]}
        pool = read(
            tmp_path / "x.jsonl",
            [row],
            "summarization",
            id="key",
            document="text",
            summary="tldr",
            group="topic",
            references="gold",
        )
        (record,) = pool.records
        assert (record.id, record.answer, record.references) == ("7", "s", ("s", "short"))
        assert record.keys == {"id:7", "group:t", text_key("doc")}

    @pytest.mark.parametrize(
        "answers", ["blue", ["blue", "sky blue"], {"text": ["blue"], "answer_start": [0]}, [{"text": "blue"}]]
    )
    def test_answers_in_the_shapes_of_hub_data(self, tmp_path, answers):
        row = {"context": "c", "question": "?", "title": "T", "answers": answers}
        (record,) = read(tmp_path / "x.jsonl", [row], "qa").records
        assert record.answer == "blue"
        assert "article:T" in record.keys

    def test_messages(self, tmp_path):
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
        rows = [{"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}]
        for record in read(tmp_path / "x.jsonl", rows, "completion").records:
            assert record.messages == (turns[0],)
            assert (record.answer, record.references, record.fields) == ("hello", ("hello",), {})

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"messages": "hi"}], r"line 1: messages must be a list of objects with texts"),
            ([{"messages": [{"role": "user", "content": "hi"}]}], r"line 1: messages must end with an assistant"),
            ([{"prompt": "a"}], r"line 1: no column 'completion'; found: prompt\. .*columns: {completion: NAME}"),
            ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}], "line 2: completion is empty"),
            ([{"prompt": "a", "completion": 3}], "line 1: completion must be a text, found int"),
            ([{"prompt": "a\ud800", "completion": "b"}], "line 1: prompt holds half of a surrogate pair"),
            ([{"prompt": "a", "completion": "b", "references": []}], "line 1: the list of references is empty"),
            ([{"id": 1, "prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}], "line 2: id must be"),
            (["text"], "line 1: expected an object with named fields, found str"),
            (
                [{"id": i // 2, "prompt": "a", "completion": "b"} for i in range(14)],
                "7 ids stand more than once, first 0, 1, 2, 3, 4;",
            ),
        ],
    )
    def test_malformed(self, tmp_path, rows, message):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with pytest.raises(DataError, match=message):
            read(tmp_path / "x.jsonl", text, "completion")

    def test_no_answer_and_unknown_column(self, tmp_path):
        row = {"context": "c", "question": "?", "answers": []}
        with pytest.raises(DataError, match=r"line 1: no answer; .* data\.skip_unanswered"):
            read(tmp_path / "x.jsonl", [row], "qa")
        with pytest.raises(DataError, match=r"no column 'topic' \(columns\.group\); found: context, question"):
            read(tmp_path / "x.jsonl", [row], "qa", group="topic")


class TestLayouts:
    @pytest.mark.parametrize(
        ("row", "prompt"),
        [
            ({"instruction": "Say", "input": "hi", "output": "hi!"}, "Say\nhi"),
            ({"instruction": "Say hi", "input": "", "output": "hi!"}, "Say hi"),
            ({"instruction": "Say hi", "output": "hi!"}, "Say hi"),
            ({"instruction": "Say hi", "input": None, "output": "hi!", "system": " ", "history": []}, "Say hi"),
        ],
    )
    def test_alpaca(self, tmp_path, row, prompt):
        (record,) = read(tmp_path / "x.jsonl", [row], "completion").records
        assert (record.fields, record.answer, record.messages) == ({"prompt": prompt}, "hi!", ())

    def test_what_stands_before_an_alpaca_prompt_makes_a_conversation(self, tmp_path):
        row = {
            "instruction": "And",
            "input": "you?",
            "output": "Well.",
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
        }
        (record,) = read(tmp_path / "x.jsonl", [row], "completion").records
        said = [(turn["role"], turn["content"]) for turn in record.messages]
        assert said == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And\nyou?")]
        assert record.answer == "Well."

    @pytest.mark.parametrize("keys", [("from", "value", "human", "gpt"), ("role", "content", "user", "assistant")])
    @pytest.mark.parametrize("column", ["conversations", "messages"])
    def test_sharegpt(self, tmp_path, keys, column):
        who, what, human, model = keys
        row = {column: [{who: human, what: "hi"}, {who: model, what: "hello"}]}
        (record,) = read(tmp_path / "x.jsonl", [row], "completion").records
        assert (record.messages, record.answer) == (({"role": "user", "content": "hi"},), "hello")

    def test_a_column_system_comes_before_sharegpt_turns(self, tmp_path):
        turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
        (record,) = read(tmp_path / "x.jsonl", [{"system": "Be brief.", "conversations": turns}], "completion").records
        assert record.messages[0] == {"role": "system", "content": "Be brief."}

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"conversations": "hi"}, "conversations must be a list of objects"),
            ({"conversations": [{"from": "tool", "value": "4"}]}, "a turn has the role 'tool'; allowed: human"),
            ({"conversations": [{"from": ["x"], "value": "4"}]}, "conversations must be a list of objects with texts"),
            (
                {"conversations": [{"from": one, "value": "a"} for one in ("system", "system", "human", "gpt")]},
                "conversations has 2 system messages; one is understood, as the first",
            ),
            (
                {"messages": [{"role": one, "content": "a"} for one in ("user", "system", "assistant")]},
                "messages has 1 system messages; one is understood, as the first",
            ),
            ({"instruction": "a", "output": "b", "history": [["c"]]}, "history must be a list of pairs"),
            ({"instruction": "a", "input": 3, "output": "b"}, "input must be a text, found int"),
            ({"instruction": "", "output": "b"}, "prompt is empty"),
        ],
    )
    def test_malformed(self, tmp_path, row, said):
        with pytest.raises(DataError, match=f"x\\.jsonl, line 1: {said}"):
            read(tmp_path / "x.jsonl", [row], "completion")

    def test_they_fit_completion_alone(self, tmp_path):
        with pytest.raises(DataError, match="is Alpaca data, which fits the task completion, not qa"):
            read(tmp_path / "x.jsonl", [{"instruction": "a", "output": "b"}], "qa")


class TestUnanswered:
    ROWS: ClassVar = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "c", "completion": " "},
        {"prompt": "d", "completion": None},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]},
    ]

    def test_such_rows_are_left_out_and_counted_where_the_recipe_says_so(self, tmp_path):
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.ROWS), encoding="utf-8")
        pool = make_pool([read_file("x.jsonl", path)], "completion", skip_unanswered=True)
        assert ([record.answer for record in pool.records], pool.unanswerable) == (["b"], 4)

    @pytest.mark.parametrize("row", ROWS[1:])
    def test_else_the_first_is_named_with_the_key(self, tmp_path, row):
        with pytest.raises(DataError, match=r"x\.jsonl, line 1: .*data\.skip_unanswered to true"):
            read(tmp_path / "x.jsonl", [row], "completion")

    def test_a_column_that_is_not_there_is_no_answer_that_is_missing(self, tmp_path):
        path = tmp_path / "x.csv"
        path.write_text("prompt,answr\na,b\n", encoding="utf-8")
        with pytest.raises(DataError, match="no column 'completion'"):
            make_pool([read_file("x.csv", path)], "completion", skip_unanswered=True)


class TestCleaning:
    def test_control_characters_go_from_every_text_and_are_counted(self, tmp_path):
        rows = [
            {"id": "a", "prompt": "x\x1b[2Jy\r\nz", "completion": "\x93b\x94\x00", "references": ["c\x7f"]},
            {"id": "b", "messages": [{"role": "user", "content": "h\x07i"}, {"role": "assistant", "content": "o\rk"}]},
        ]
        pool = read(tmp_path / "x.jsonl", rows, "completion")
        first, second = pool.records
        assert (first.fields["prompt"], first.answer, first.references) == ("x[2Jy\nz", "“b”", ("c",))
        assert (second.messages[0]["content"], second.answer) == ("hi", "o\nk")
        assert (pool.characters_mapped, pool.characters_removed) == (3, 4)

    def test_squad_answers_are_cleaned_with_their_context(self, tmp_path):
        content = squad(("T", [("one\x01 two", [("q", "which?\x00", ["e\x01 t"])])]))
        pool = read(tmp_path / "x.json", content, "qa")
        assert pool.records[0].answer == "e t"
        assert pool.characters_removed == 3

    @pytest.mark.parametrize(
        "mark", ["\u200e", "\u200f", "\u061c", "\u202b", "\u2067", "\u200d", "\ufeff", "\u2028", "\U000e0041"]
    )
    def test_marks_that_texts_need_stay(self, tmp_path, mark):
        row = {"prompt": f"a{mark}b", "completion": f"c{mark}"}
        pool = read(tmp_path / "x.jsonl", [row], "completion")
        assert (pool.records[0].fields["prompt"], pool.records[0].answer) == (row["prompt"], row["completion"])
        assert pool.characters_removed == 0

    def test_line_ends_may_be_mixed(self, tmp_path):
        row = '{"prompt": "a", "completion": "b"}'
        assert len(read(tmp_path / "x.jsonl", f"{row}\r\n{row}\n\n{row}\r\n", "completion").records) == 3
        assert len(read(tmp_path / "x.csv", "prompt,completion\r\na,b\nc,d\re,f\r\n", "completion").records) == 3

    @pytest.mark.parametrize(
        "text",
        [
            'prompt, completion\nx, "y, z"\n',
            'prompt , completion\nx, "y, z"\n',
            '\u200eprompt,completion\ufeff \nx,"y, z"\n',
            'prompt; completion\r\nx; "y, z"\r\n',
        ],
        ids=["spaces behind commas", "spaces on both sides", "invisible marks", "semicolons"],
    )
    def test_csv_as_people_write_it(self, tmp_path, text):
        (record,) = read(tmp_path / "x.csv", text, "completion").records
        assert (record.fields["prompt"], record.answer) == ("x", "y, z")

    def test_questions_without_an_answer_are_left_out_and_counted(self, tmp_path):
        questions = [
            {"id": "a", "question": "who?", "answers": [{"text": "Ann", "answer_start": 0}], "is_impossible": False},
            {"id": "b", "question": "when?", "answers": [], "is_impossible": True, "plausible_answers": []},
        ]
        squad = {
            "version": "v2.0",
            "data": [{"title": "t", "paragraphs": [{"context": "Ann sang.", "qas": questions}]}],
        }
        pool = read(tmp_path / "x.json", json.dumps(squad), "qa")
        assert ([record.id for record in pool.records], pool.unanswerable) == (["a"], 1)
        rows = [
            {"context": "Ann sang.", "question": "who?", "answers": {"text": ["Ann"], "answer_start": [0]}},
            {"context": "Ann sang.", "question": "when?", "answers": {"text": [], "answer_start": []}},
        ]
        pool = read(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)), "qa")
        assert ([record.id for record in pool.records], pool.unanswerable) == (["x.jsonl:1"], 1)
        with pytest.raises(DataError, match="none of the 1 questions has an answer"):
            read(tmp_path / "x.jsonl", json.dumps(rows[1]), "qa")

    def test_an_answer_that_is_a_list_written_as_text_is_refused(self, tmp_path):
        text = "context,question,answers\nAnn sang.,who?,\"{'text': ['Ann'], 'answer_start': [0]}\"\n"
        with pytest.raises(
            DataError, match=r"x\.csv, line 2: answer is a list that was written as text, \"\{'text'.*give one text"
        ):
            read(tmp_path / "x.csv", text, "qa")
        for column in ("answer", "references"):
            rest = {"context": "c", "question": "q", "answer": "Paris"}
            for wrong in ("['Paris', 'City of Paris']", '["Paris"]', '{"text": ["Paris"], "answer_start": [null]}'):
                content = csv_text([rest | {column: wrong}])
                with pytest.raises(
                    DataError, match=f"{column} is a list that was written as text, .* give one text in a cell"
                ):
                    read(tmp_path / "y.csv", content, "qa")
                (record,) = read(tmp_path / "y.jsonl", [rest | {column: wrong}], "qa").records
                assert record.references == (wrong,)  # there it would be a list if it were meant as one
            for right in ("[Paris]", "[1]", "{}}", "['Paris'", "{{1}}", "{[1]}"):
                (record,) = read(tmp_path / "y.csv", csv_text([rest | {column: right}]), "qa").records
                assert record.references == (right,)

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("prompt;completion\r\nHabari, dunia;x, y\r\n", 2),
            ('prompt;completion\n"Habari; ""dunia""";x\n', 2),
            ("sep=;\r\nprompt;completion\r\nHabari, dunia;x\r\n", 3),
            ("sep=,\nprompt,completion\nHabari,x\n", 3),
            ("prompt\tcompletion\nHabari, dunia\tx\n", 2),
            ("\ufeffprompt,completion\nHabari,x\n,\n ,\n\n", 2),
            ("\n,,\r\nprompt,completion\nHabari,x\n", 4),
            (";;\nprompt;completion\nHabari;x\n", 3),
            ('"","",""\nprompt,completion\nHabari,x\n', 3),
            ("sep=;\n\nprompt;completion\nHabari;x\n", 4),
        ],
    )
    def test_csv_as_excel_writes_it(self, tmp_path, text, line):
        (record,) = read(tmp_path / "x.csv", text, "completion").records
        assert record.fields["prompt"].startswith("Habari")
        assert record.answer.startswith("x")
        with pytest.raises(DataError, match=rf"x\.csv, line {line}: completion is empty"):
            read(tmp_path / "x.csv", re.sub("x(, y)?", "", text, count=1), "completion")

    def test_a_quotation_mark_that_takes_in_rows_of_tabs_is_refused(self, tmp_path):
        text = 'prompt\tcompletion\nHe said\t"Njoo\nAya 1\tAya 2\nSit down\tKaa chini."\n'
        with pytest.raises(DataError, match=r"x\.tsv, line 4: a cell that ends here holds tabs and line breaks"):
            read(tmp_path / "x.tsv", text, "completion")
        text = 'id\ttext\tlabel\tnote\n1\t"Hello there\tpos\t\n2\tBye all"\tneg\t\n'
        with pytest.raises(DataError, match=r"x\.tsv, line 3: a cell that ends here holds tabs and line breaks"):
            read(tmp_path / "x.tsv", text, "classification")
        for cell in ("two\nlines", "def f():\n\treturn 1", "def f():\n\ta()\n\n\t\tb()", "a\tb", "a\tb\n\tc"):
            (record,) = read(tmp_path / "y.tsv", f'prompt\tcompletion\na\t"{cell}"\n', "completion").records
            assert record.answer == cell

    def test_white_space_around_answers_is_removed_and_counted(self, tmp_path):
        rows = [{"context": "a b", "question": "?", "answer": text} for text in (" a ", "b")]
        pool = read(tmp_path / "x.jsonl", rows, "qa")
        assert [(one.answer, one.references) for one in pool.records] == [("a", ("a",)), ("b", ("b",))]
        assert pool.answers_trimmed == 1
        given = [{"source": "a", "target": "b\n", "references": ["b\n", "c "]}]
        (record,) = read(tmp_path / "y.jsonl", given, "translation").records
        assert (record.answer, record.references) == ("b", ("b", "c "))
        kept = [{"prompt": "a", "completion": " b\n"}]  # what the user wants written
        assert read(tmp_path / "z.jsonl", kept, "completion").records[0].answer == " b\n"

    def test_titles_and_groups_join_whatever_their_form(self, tmp_path):
        def keys(start: str, **row: object) -> list[str]:
            content = [{"context": "a", "question": "?", "answer": "a"} | row]
            (record,) = read(tmp_path / "x.jsonl", content, "qa").records
            return [key for key in record.keys if key.startswith(start)]

        assert keys("article:", title=0) == keys("article:", title="0") == keys("article:", Title="0") != []
        assert keys("id:", ID="7") == ["id:7"]
        other = [{"Title": "a b", "question": "?", "answer": "a"}]
        assert read(tmp_path / "x.jsonl", other, "qa", context="Title").records[0].fields["context"] == "a b"
        twice = [{"context": text, "question": "?", "answer": "a", "ID": "7"} for text in "ab"]  # it numbers articles
        assert not any("id:7" in one.keys for one in read(tmp_path / "x.jsonl", twice, "qa").records)
        assert not keys("article:", title=True)
        assert keys("article:", title="cafe\u0301") == keys("article:", title="café")
        assert keys("group:", group="doc1 ") == keys("group:", group="doc1")
        named = [{"prompt": "a", "completion": "b", "title": "T"}]
        assert "article:T" in read(tmp_path / "y.jsonl", named, "completion", title="title").records[0].keys
        assert "article:T" not in read(tmp_path / "y.jsonl", named, "completion").records[0].keys

    def test_a_column_that_the_first_row_lacks_is_seen(self, tmp_path):
        rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"}]
        (_, second) = read(tmp_path / "x.jsonl", rows, "completion").records
        assert second.fields["prompt"] == "c\nd"
        assert read_file("x.jsonl", tmp_path / "x.jsonl").columns == ["instruction", "output", "input"]

    def test_empty_cells_of_optional_columns_say_nothing(self, tmp_path):
        text = "id,prompt,completion,references,group\nk,a,b,,\n,c,d,e,\n"
        first, second = read(tmp_path / "x.csv", text, "completion").records
        assert (first.id, first.references, second.references) == ("k", ("b",), ("e",))
        assert second.id == "x.csv:2"
        assert not any(key.startswith(("id:", "group:")) for key in second.keys)

    def test_two_writings_of_one_text_join(self, tmp_path):
        rows = [{"prompt": text, "completion": "b"} for text in ("\u200fcafé\ufeff", "cafe\u0301", "café ")]
        keys = [record.keys for record in read(tmp_path / "x.jsonl", rows, "completion").records]
        assert len({key for own in keys for key in own if key.startswith("text:")}) == 1

    def test_rows_of_one_file_that_both_languages_read_are_translations(self, tmp_path):
        rows = [{"en": f"good {n}", "sw": f"nzuri {n}", "label": "yes"} for n in range(3)]
        path = tmp_path / "x.jsonl"
        first, second = (
            [set(record.keys) for record in read(path, rows, "classification", text=language).records]
            for language in ("en", "sw")
        )
        assert [len(one & other) for one, other in zip(first, second, strict=True)] == [1, 1, 1]
        other = read(tmp_path / "y.jsonl", rows, "classification", text="sw").records
        assert not set.union(*first) & {key for record in other for key in record.keys}

    def test_a_long_cell_is_a_cell(self, tmp_path):
        text = "x" * 200_000
        assert (
            read(tmp_path / "x.csv", f"prompt,completion\n{text},b\n", "completion").records[0].fields["prompt"] == text
        )

    def test_parquet_in_any_coding_reads_the_same(self, tmp_path):
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
        for options in ({}, *({"use_dictionary": False, "column_encoding": c} for c in ("PLAIN", "DELTA_BYTE_ARRAY"))):
            pq.write_table(pa.table({"messages": [turns] * 600}), tmp_path / "x.parquet", row_group_size=250, **options)
            records = read_files([("x", tmp_path / "x.parquet")], "completion").records
            assert [record.answer for record in records] == ["hello"] * 600


class TestEncodings:
    ROW = '{"prompt": "é", "completion": "b"}\n'

    def test_byte_order_mark(self, tmp_path):
        records = read(tmp_path / "x.jsonl", self.ROW.encode("utf-8-sig"), "completion").records
        assert records[0].fields["prompt"] == "é"

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.jsonl", (ROW + ROW).encode() + ROW.encode("latin-1"), r"x\.jsonl, line 3: not UTF-8"),
            ("x.jsonl", ROW + ROW + '{"prompt"\n', r"x\.jsonl, line 3: Expecting ':' delimiter"),
            ("x.json", '{"data":\n [1,}', r"x\.json: Expecting .*: line 2 column 5"),
            ("x.jsonl", b"\xef\xbb\xbf \n", r"x\.jsonl holds no records"),
            ("x.json", "[]", r"x\.json holds no records"),
            ("x.csv", "prompt,completion\n", r"x\.csv holds no records"),
            ("x.csv", "prompt,completion\na,b\nc\n", r"x\.csv, line 3: the number of cells differs from the 2"),
            ("x.csv", "prompt,completion\na,b,c\n", r"x\.csv, line 2: the number of cells differs from the 2"),
            ("x.csv", 'prompt,completion\n"a"b,c\n', r"x\.csv, line 2: not valid CSV"),
            ("x.parquet", "PAR", r"x\.parquet: Could not open Parquet"),
            ("x.csv", b"PK\x03\x04\x8f", r"x\.csv, line 1: not UTF-8 .* give it the suffix \.xlsx or \.parquet"),
            ("x.txt", "hello", r"x\.txt: cannot tell the format from the suffix '\.txt'; allowed: \.json"),
        ],
    )
    def test_malformed(self, tmp_path, name, content, message):
        with pytest.raises(DataError, match=message):
            read(tmp_path / name, content, "completion")

    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match=r"data file 'x\.json' is missing"):
            read_files([("x.json", tmp_path / "x.json")], "qa")
