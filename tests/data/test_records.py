"""Files become records; a malformed one is refused with its name and line."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grasp_lora.data.files import read_file
from grasp_lora.data.records import Pool, make_pool, text_keys
from grasp_lora.errors import DataError

HI, HELLO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def squad(*articles: tuple[str, list[tuple[str, list[tuple[str, str, list[str]]]]]]) -> dict:
    """Build SQuAD data from (title, [(context, [(id, question, answers)])])."""

    def paragraph(context: str, questions: list[tuple[str, str, list[str]]]) -> dict:
        qas = [
            {"id": identity, "question": question, "answers": [{"text": text, "answer_start": 0} for text in answers]}
            for identity, question, answers in questions
        ]
        return {"context": context, "qas": qas}

    return {
        "data": [
            {"title": title, "paragraphs": [paragraph(*one) for one in paragraphs]} for title, paragraphs in articles
        ]
    }


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Pool]:
    """Give `read(content, task, name, **columns)`: bytes, a text, rows for JSON lines or CSV, an object for JSON."""

    def call(content: object, task: str, name: str = "x.jsonl", **columns: str) -> Pool:
        path = tmp_path / name
        if isinstance(content, list) and path.suffix == ".csv":
            file = io.StringIO()
            writer = csv.DictWriter(file, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
            content = file.getvalue()
        elif isinstance(content, list) and path.suffix == ".jsonl":
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        elif not isinstance(content, str | bytes):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
        return make_pool([read_file(name, path)], task, columns)

    return call


class TestSquad:
    def test_reads_fields_references_and_keys(self, read):
        content = squad(("قط", [("القطة سوداء جدا", [("q1", "ما لونها؟", ["سوداء", "سوداء جدا", "سوداء"])])]))
        (record,) = read(content, "qa", "ar.json").records
        assert (record.id, record.answer, record.references) == ("q1", "سوداء", ("سوداء", "سوداء جدا"))
        assert record.fields == {"context": "القطة سوداء جدا", "question": "ما لونها؟"}
        assert record.keys == {"id:q1", *text_keys("القطة سوداء جدا"), "article:قط"}

    def test_an_article_is_one_group_in_all_its_files_and_untitled_ones_are_told_apart(self, read):
        first, second = (
            read(squad((title, [(f"context {n}", [(n, "?", ["context"])])])), "qa", f"{n}.json").records[0]
            for n, title in (("1", "قط  أسود"), ("2", "قط_أسود"))
        )
        assert first.keys & second.keys == {"article:قطأسود"}
        content = squad(("", [("a b", [("1", "?", ["a"])])]), ("", [("c d", [("2", "?", ["c"])])]))
        first, second = read(content, "qa", "x.json").records
        assert not first.keys & second.keys

    def test_questions_without_an_answer_are_left_out_and_counted(self, read):
        content = squad(("T", [("Ann sang.", [("a", "who?", ["Ann"]), ("b", "when?", [])])]))
        content["data"][0]["paragraphs"][0]["qas"][1]["is_impossible"] = True
        pool = read(content, "qa", "x.json")
        assert ([record.id for record in pool.records], pool.unanswerable) == (["a"], 1)
        rows = [{"context": "Ann sang.", "question": "?", "answers": {"text": texts}} for texts in (["Ann"], [])]
        pool = read(rows, "qa")
        assert ([record.id for record in pool.records], pool.unanswerable) == (["x.jsonl:1"], 1)
        assert read(rows[1:], "qa").records == ()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"data": [{"paragraphs": [{"qas": [{}]}]}]}, r"x\.json, row 1: 'context' is missing"),
            ({"data": []}, r"x\.json holds no records"),
            (
                squad(("T", [("c", [("q", "?", [])])])),
                r"question q: answer is empty; .* set data\.skip_unanswered to true",
            ),
            (squad(("T", [("c", [("q", " ", ["c"])])])), r"question q: question is empty"),
            (squad(("T", [("c", [("q", "?", [""])])])), r"question q: answer is empty"),
        ],
    )
    def test_malformed(self, read, content, message):
        with pytest.raises(DataError, match=message):
            read(content, "qa", "x.json")


def test_characters_of_windows_in_xlsum_are_mapped_and_page_breaks_stay_apart(read):
    text = "it\x92s 5\x9610 a\x97b\tpage1\x0cpage2\x0bend wait\x85foo \x805 \x9a \x81\x8d"
    row = {"id": "z-1", "url": "", "title": "标题", "summary": "摘要", "text": text}
    pool = read([row], "summarization")
    assert pool.records[0].fields == {"document": "it’s 5–10 a—b\tpage1 page2 end wait…foo €5 š "}
    assert pool.records[0].references == ("摘要",)
    assert {"id:z-1", "article:标题"} < pool.records[0].keys
    assert (pool.characters_mapped, pool.characters_removed) == (8, 2)


class TestRecords:
    @pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
    def test_every_file_type_reads_the_same(self, suffix, read):
        rows = [{"prompt": 'say "a",\nplease', "completion": "a"}, {"prompt": "قل", "completion": "ب"}]
        content: object = rows
        if suffix == "tsv":
            content = '\ufeffprompt\tcompletion\n"say ""a"",\nplease"\ta\nقل\tب'
        elif suffix == "parquet":
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), sink)
            content = sink.getvalue()
        records = read(content, "completion", f"x.{suffix}").records
        assert [(r.fields["prompt"], r.answer) for r in records] == [(r["prompt"], r["completion"]) for r in rows]
        assert [r.id for r in records] == [f"x.{suffix}:1", f"x.{suffix}:2"]
        assert not any(key.startswith("id:") for r in records for key in r.keys)

    def test_json_lines_saved_as_json_with_mixed_line_ends(self, read):
        row = '{"prompt": "a", "completion": "b"}'
        assert len(read(f"{row}\r\n{row}\n\n{row}\r\n", "completion", "x.json").records) == 3

    def test_columns_ids_groups_and_references(self, read):
        row = {"key": 7, "text": "doc", "tldr": "s", "topic": "t", "gold": ["s", "short"]}
        columns = {"id": "key", "document": "text", "summary": "tldr", "group": "topic", "references": "gold"}
        (record,) = read([row], "summarization", **columns).records
        assert (record.id, record.answer, record.references) == ("7", "s", ("s", "short"))
        assert record.keys == {"id:7", "group:t", *text_keys("doc")}
        with pytest.raises(DataError, match="no column 'topic'; found: key, text, tldr"):
            read([{"key": 7, "text": "doc", "tldr": "s"}], "summarization", **columns)

    @pytest.mark.parametrize(
        "answers", ["blue", ["blue", "sky blue"], {"text": ["blue"], "answer_start": [0]}, [{"text": "blue"}]]
    )
    def test_answers_in_the_shapes_of_hub_data(self, read, answers):
        (record,) = read([{"context": "c", "question": "?", "title": "T", "answers": answers}], "qa").records
        assert record.answer == "blue"
        assert "article:t" in record.keys

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"prompt": "a"}], r"line 1: no column 'completion'; found: prompt\. .*columns: {completion: NAME}"),
            ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}], "line 2: completion is empty"),
            ([{"prompt": "a", "completion": 3}], "line 1: completion must be a text, found int"),
            ([{"id": 1, "prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}], "line 2: id must be"),
            (
                [{"id": i // 2, "prompt": "a", "completion": "b"} for i in range(14)],
                r"7 ids stand more than once, first 0 \(.*, line 1 and .*, line 2\), 1 \(",
            ),
            ("[1]", "line 1: 'list' object is not a mapping"),
        ],
    )
    def test_malformed(self, read, rows, message):
        with pytest.raises(DataError, match=message):
            read(rows, "completion")

    def test_empty_cells_of_optional_columns_say_nothing(self, read):
        first, second = read("id,prompt,completion,references,group\nk,a,b,,\n,c,d,e,\n", "completion", "x.csv").records
        assert (first.id, first.references, second.references) == ("k", ("b",), ("e",))
        assert second.id == "x.csv:2"
        assert not any(key.startswith(("id:", "group:")) for key in second.keys)

    def test_titles_and_groups_join_whatever_their_form(self, read):
        def keys(start: str, **row: object) -> list[str]:
            (record,) = read([{"context": "a", "question": "?", "answer": "a"} | row], "qa").records
            return [key for key in record.keys if key.startswith(start)]

        assert keys("article:", title=0) == keys("article:", title="0") == keys("article:", Title="0") != []
        assert keys("article:", title="cafe\u0301") == keys("article:", title="café")
        assert not keys("article:", title=True)
        assert keys("group:", group="doc1 ") == keys("group:", group="doc1")
        assert keys("id:", ID="7") == ["id:7"]
        twice = [{"context": text, "question": "?", "answer": "a", "ID": "7"} for text in "ab"]  # it numbers articles
        assert not any("id:7" in record.keys for record in read(twice, "qa").records)
        named = [{"prompt": "a", "completion": "b", "title": "T"}]
        assert "article:t" in read(named, "completion", title="title").records[0].keys
        assert "article:T" not in read(named, "completion").records[0].keys

    def test_two_writings_of_one_text_join(self, read):
        rows = [{"prompt": text, "completion": "b"} for text in ("\u200fcafé\ufeff", "cafe\u0301", "café ")]
        keys = {key for record in read(rows, "completion").records for key in record.keys}
        assert len([key for key in keys if key.startswith("text:")]) == 1

    def test_rows_of_one_file_that_both_languages_read_are_translations(self, read):
        rows = [{"en": f"good {n}", "sw": f"nzuri {n}", "label": "yes"} for n in range(3)]
        english, swahili = (read(rows, "classification", text=code).records for code in ("en", "sw"))
        assert [len(one.keys & other.keys) for one, other in zip(english, swahili, strict=True)] == [1, 1, 1]
        elsewhere = read(rows, "classification", "y.jsonl", text="sw").records
        assert not {key for one in english for key in one.keys} & {key for other in elsewhere for key in other.keys}

    def test_white_space_around_answers_is_removed_and_counted(self, read):
        pool = read([{"context": "a b", "question": "?", "answer": text} for text in (" a ", "b")], "qa")
        assert [(record.answer, record.references) for record in pool.records] == [("a", ("a",)), ("b", ("b",))]
        assert pool.answers_trimmed == 1
        (record,) = read([{"source": "a", "target": "b\n", "references": ["b\n", "c "]}], "translation").records
        assert (record.answer, record.references) == ("b", ("b", "c "))
        kept = [{"prompt": "a", "completion": " b\n"}]  # what the user wants written
        assert read(kept, "completion").records[0].answer == " b\n"


class TestConversations:
    def test_messages(self, read):
        for record in read([{"messages": [HI, HELLO]}, {"prompt": [HI], "completion": [HELLO]}], "completion").records:
            assert (record.messages, record.answer, record.fields) == ((HI,), "hello", {})

    @pytest.mark.parametrize(
        ("row", "prompt"),
        [
            ({"instruction": "Say", "input": "hi", "output": "hi!"}, "Say\nhi"),
            ({"instruction": "Say hi", "input": "", "output": "hi!"}, "Say hi"),
            ({"instruction": "Say hi", "input": None, "output": "hi!", "system": " ", "history": []}, "Say hi"),
        ],
    )
    def test_alpaca(self, read, row, prompt):
        (record,) = read([row], "completion").records
        assert (record.fields, record.answer, record.messages) == ({"prompt": prompt}, "hi!", ())

    def test_what_stands_before_an_alpaca_prompt_makes_a_conversation(self, read):
        row = {"instruction": "And", "input": "you?", "output": "Well."}
        row |= {"system": "Be brief.", "history": [["Hi", "Hello"]]}
        (record,) = read([row], "completion").records
        turns = [(turn["role"], turn["content"]) for turn in record.messages]
        assert turns == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And\nyou?")]
        assert record.answer == "Well."

    @pytest.mark.parametrize("keys", [("from", "value", "human", "gpt"), ("role", "content", "user", "assistant")])
    @pytest.mark.parametrize("column", ["conversations", "messages"])
    def test_sharegpt(self, read, keys, column):
        who, what, human, model = keys
        row = {column: [{who: human, what: "hi"}, {who: model, what: "hello"}]}
        (record,) = read([row], "completion").records
        assert (record.messages, record.answer) == ((HI,), "hello")
        for system in ("Be brief.", " "):  # of a column of its own
            (record,) = read([row | {"system": system}], "completion").records
            assert [turn["role"] for turn in record.messages] == ["system", "user"][not system.strip() :]
        twice = {
            column: [{who: "system", what: "Be brief."}, *row[column]],
            "system": "Be brief.",
        }  # which only repeats it
        assert len(read([twice], "completion").records[0].messages) == 2

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"messages": "hi"}, "messages must be a list that ends with an assistant message"),
            ({"messages": [{**HI, "role": "system"}, HELLO]}, "messages must be a list that .*, and a user's must"),
            (
                {"conversations": [{"from": "tool", "value": "4"}]},
                "a turn has the role 'tool' and .*, and roles are human",
            ),
            ({"conversations": [{"from": "human", "value": 4}]}, "a turn has the role 'user' and the content 4"),
            (
                {"messages": [HI, {**HI, "role": "system"}, HELLO]},
                "messages has a system message that is not the first",
            ),
            ({"instruction": "a", "output": "b", "history": [["c"]]}, "not enough values to unpack"),
            (
                {"instruction": "a", "output": "b", "history": "[]"},
                r"history is a list that was written as text, '\[\]'",
            ),
            ({"instruction": "a", "input": 3, "output": "b"}, "input must be a text, found int"),
            ({"instruction": "", "output": "b"}, "prompt is empty"),
        ],
    )
    def test_malformed(self, read, row, message):
        with pytest.raises(DataError, match=f"x\\.jsonl, line 1: {message}"):
            read([row], "completion")


def test_a_layout_fits_its_task_alone(read):
    with pytest.raises(DataError, match=r"Alpaca .* the task completion, not qa"):
        read([{"instruction": "a", "output": "b"}], "qa")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "c", "completion": " "},
        {"prompt": "d", "completion": None},
        {"messages": [HI]},
        {"messages": [HI, {**HELLO, "content": ""}]},
    ],
)
def test_rows_without_an_answer_are_named_or_left_out_and_counted(row, read, tmp_path):
    with pytest.raises(DataError, match=r"x\.jsonl, line 1: .*data\.skip_unanswered to true"):
        read([row], "completion")
    table = read_file("x.jsonl", tmp_path / "x.jsonl")
    assert make_pool([table], "completion", skip_unanswered=True).unanswerable == 1


class TestCleaning:
    def test_control_characters_go_from_every_text_and_are_counted(self, read):
        rows = [
            {"id": "a", "prompt": "x\x1b[2Jy\r\nz", "completion": "\x93b\x94\x00", "references": ["c\x7f"]},
            {"id": "b", "messages": [{**HI, "content": "h\x07i"}, {**HELLO, "content": "o\rk"}]},
        ]
        pool = read(rows, "completion")
        first, second = pool.records
        assert (first.fields["prompt"], first.answer, first.references) == ("x[2Jy\nz", "“b”", ("c",))
        assert (second.messages[0]["content"], second.answer) == ("hi", "o\nk")
        assert (pool.characters_mapped, pool.characters_removed) == (3, 4)
        pool = read('{"prompt": "a\\ud800", "completion": "b"}', "completion")  # half of a surrogate pair
        assert (pool.records[0].fields["prompt"], pool.characters_removed) == ("a", 1)

    @pytest.mark.parametrize("mark", ["\u200e", "\u200f", "\u061c", "\u202b", "\u2067", "\u200d", "\ufeff", "\u2028"])
    def test_marks_that_texts_need_stay(self, read, mark):
        row = {"prompt": f"a{mark}b", "completion": f"c{mark}"}
        (record,) = read([row], "completion").records
        assert (record.fields["prompt"], record.answer) == (row["prompt"], row["completion"])


class TestCells:
    @pytest.mark.parametrize(
        "text",
        [
            'prompt , completion\nx, "y, z"\n',
            '\u200eprompt,completion\ufeff \nx,"y, z"\n',
            'prompt; completion\r\nx; "y, z"\r\n',
            ',prompt,completion\n0,x,"y, z"\n',  # as pandas writes its index
        ],
    )
    def test_csv_as_people_write_it(self, read, text):
        (record,) = read(text, "completion", "x.csv").records
        assert (record.fields["prompt"], record.answer) == ("x", "y, z")

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
            ('"","",""\nprompt,completion\nHabari,x\n', 3),
            ("sep=;\n\nprompt;completion\nHabari;x\n", 4),
            ("prompt;completion;notes, if any\r\nHabari, dunia;x;\r\n", 2),
        ],
    )
    def test_csv_as_excel_writes_it(self, read, text, line):
        (record,) = read(text, "completion", "x.csv").records
        assert record.fields["prompt"].startswith("Habari")
        assert record.answer.startswith("x")
        with pytest.raises(DataError, match=rf"x\.csv, line {line}: completion is empty"):
            read(re.sub("x(, y)?", "", text, count=1), "completion", "x.csv")

    def test_an_answer_that_is_a_list_written_as_text_is_refused(self, read):
        rest = {"context": "c", "question": "q", "answer": "Paris"}
        for column in ("answer", "references"):
            for wrong in ("['Paris', 'City of Paris']", '["Paris"]', '{"text": ["Paris"], "answer_start": [null]}'):
                message = f"line 2: {column} is a list that was written as text, .* one text in a"
                with pytest.raises(DataError, match=message):
                    read([rest | {column: wrong}], "qa", "y.csv")
                (record,) = read([rest | {column: wrong}], "qa").records
                assert record.references == (wrong,)  # there it would be a list if it were meant as one
            for right in ("[Paris]", "[1]", "{}}", "['Paris'", "{{1}}", "{[1]}"):
                (record,) = read([rest | {column: right}], "qa", "y.csv").records
                assert record.references == (right,)

    def test_a_quotation_mark_that_takes_in_rows_of_tabs_is_refused(self, read):
        for text in (
            'prompt\tcompletion\nb\tc\nHe said\t"Njoo\nSit down\tKaa chini."\n',
            'id\tprompt\tcompletion\tnote\n1\ta\tb\t\n1\t"Hello there\tpos\t\n2\tBye all"\tneg\t\n',
        ):
            with pytest.raises(DataError, match=r"x\.tsv, line [23]: a cell holds tabs and line breaks"):
                read(text, "completion", "x.tsv")
        for cell in ("two\nlines", "def f():\n\treturn 1", "a\tb", "a\tb\n\tc"):
            assert read(f'prompt\tcompletion\na\t"{cell}"\n', "completion", "y.tsv").records[0].answer == cell

    def test_a_long_cell_is_a_cell(self, read):
        (record,) = read(f"prompt,completion\n{'x' * 200_000},b\n", "completion", "x.csv").records
        assert len(record.fields["prompt"]) == 200_000


ROW = '{"prompt": "é", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", (ROW + ROW).encode() + ROW.encode("latin-1"), r"x\.jsonl, line 3: not UTF-8"),
        ("x.jsonl", ROW + ROW + '{"prompt"\n', r"x\.jsonl, line 3: Expecting ':' delimiter"),
        ("x.json", '{"data":\n [1,}', r"x\.json: Expecting .*: line 2 column 5"),
        ("x.jsonl", b"\xef\xbb\xbf \n", r"x\.jsonl holds no records"),
        ("x.csv", "prompt,completion\n", r"x\.csv holds no records"),
        ("x.csv", "prompt,completion\na,b\nc\n", r"x\.csv, line 3: the number of cells differs from the 2"),
        ("x.csv", "prompt,completion\na,b,c\n", r"x\.csv, line 2: the number of cells differs from the 2"),
        ("x.csv", 'prompt,completion\n"a"b,c\n', r"x\.csv, line 2: not valid CSV"),
        (
            "x.csv",
            "prompt,\u200fprompt,completion\na,b,c\n",
            r"x\.csv, line 1: the column 'prompt' stands twice; rename",
        ),
        ("x.csv", b"PK\x03\x04\x8f", r"x\.csv, line 1: not UTF-8 .* give it the suffix \.xlsx or \.parquet"),
        ("x.parquet", "PAR", r"x\.parquet: Parquet file size is 3 bytes"),
        ("x.txt", "hello", r"x\.txt: cannot tell the format from the suffix '\.txt'; allowed: \.json"),
    ],
)
def test_malformed_files(read, name, content, message):
    with pytest.raises(DataError, match=message):
        read(content, "completion", name)


def test_full_width_copies_of_a_text_belong_together():
    assert text_keys("Ｇｌｅｉｓ　９") & text_keys("Gleis 9")
    assert not text_keys("Ｇｌｅｉｓ　９") & text_keys("Gleis 8")


def test_made_up_ids_do_not_depend_on_how_a_path_is_written(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    tables = [read_file(name, tmp_path / "rows.jsonl") for name in ("rows.jsonl", "./rows.jsonl")]
    assert len({make_pool([table], "completion").records[0].id for table in tables}) == 1
