"""A data file is found in the first place that has it; a data set on the hub is read without running its code."""

import json
from typing import ClassVar

import datasets
import pytest

from grasp_lora.data.files import read_file, read_hub, resolve_file
from grasp_lora.data.records import make_pool
from grasp_lora.errors import DataError


class TestResolveFile:
    def test_places_in_order(self, tmp_path, monkeypatch):
        places = [tmp_path / name for name in ("root", "variable", "recipe")]
        for place in places:
            place.mkdir()
            (place / "x.json").write_text("x")
        monkeypatch.setenv("GRASP_LORA_DATA", str(places[1]))
        for place in places:
            assert resolve_file("x.json", root=str(places[0]), base=places[2]) == place / "x.json"
            (place / "x.json").unlink()
        with pytest.raises(DataError, match="missing; tried") as caught:
            resolve_file("x.json", root=str(places[0]), base=places[2])
        for part in (*map(str, places), "data.root", "GRASP_LORA_DATA", "folder of the recipe"):
            assert part in str(caught.value)

    def test_root_is_relative_to_the_recipe_and_absolute_paths_stand_alone(self, tmp_path, monkeypatch):
        monkeypatch.delenv("GRASP_LORA_DATA", raising=False)
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "x.json").write_text("x")
        assert resolve_file("x.json", root="data", base=tmp_path) == tmp_path / "data" / "x.json"
        assert resolve_file(str(tmp_path / "data" / "x.json")) == tmp_path / "data" / "x.json"
        with pytest.raises(DataError, match=r"nowhere\.json \(absolute path\)"):
            resolve_file(str(tmp_path / "nowhere.json"))

    def test_a_variable_does_not_decide_between_different_files(self, tmp_path, monkeypatch):
        for place in ("variable", "recipe", "root"):
            (tmp_path / place).mkdir()
            (tmp_path / place / "x.json").write_text(place)
        monkeypatch.setenv("GRASP_LORA_DATA", str(tmp_path / "variable"))
        message = r"'x\.json' is in two places, with different contents: .*variable/x\.json \(GRASP_LORA_DATA\) and .*recipe/x"
        with pytest.raises(DataError, match=message):
            resolve_file("x.json", base=tmp_path / "recipe")
        assert resolve_file("x.json", root="../root", base=tmp_path / "recipe").read_text() == "root"
        (tmp_path / "recipe/x.json").write_text("variable")
        assert resolve_file("x.json", base=tmp_path / "recipe").parent.name == "variable"

    def test_demo_texts(self):
        records = make_pool([read_file("demo:zh.json", resolve_file("demo:zh.json"))], "qa").records
        assert len(records) > 50
        with pytest.raises(DataError, match=r"^demo:xx\.json: No such file or directory"):
            read_file("demo:xx.json", resolve_file("demo:xx.json"))


class TestHub:
    ROWS: ClassVar = datasets.Dataset.from_list([{"id": "1", "title": "", "summary": "s", "text": "\x93t\x94"}])

    def test_rows(self, monkeypatch):
        calls = []

        def load(*args: object, **kwargs: object) -> datasets.Dataset:
            calls.append((args, kwargs))
            return self.ROWS

        monkeypatch.setattr(datasets, "load_dataset", load)
        pool = make_pool([read_hub("org/sums", "arabic", "train[:10]")], "summarization")
        assert calls == [(("org/sums", "arabic"), {"split": "train[:10]"})]
        assert pool.records[0].fields == {"document": "“t”"}

    def test_a_loading_script_is_replaced_by_the_parquet_export(self, monkeypatch):
        def load(name: str, *args: object, **kwargs: object) -> datasets.Dataset:
            if "revision" not in kwargs:
                raise RuntimeError("Dataset scripts are no longer supported, but found sums.py")
            assert (name, args) == ("org/sums", ())
            assert kwargs == {"data_dir": "arabic", "split": "train", "revision": "refs/convert/parquet"}
            return self.ROWS

        monkeypatch.setattr(datasets, "load_dataset", load)
        assert [row.where for row in read_hub("org/sums", "arabic").rows] == ["hub:org/sums/arabic/train, row 1"]

    def test_what_the_library_says_is_one_line_with_the_name(self):
        with pytest.raises(DataError, match=r"^hub:no/such/train: [^\n]*no/such") as caught:
            read_hub("no/such", None, "train")
        assert "\n" not in str(caught.value)


ROWS = [{"prompt": f"p {i}", "completion": "two\nlines" if i == 1 else f"c {i}"} for i in range(4)]


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        (
            "x.jsonl",
            "\n".join(map(json.dumps, ROWS[:2])) + "\n\n" + json.dumps(ROWS[2]),
            ["line 1", "line 2", "line 4"],
        ),
        ("x.json", json.dumps(ROWS), ["row 1", "row 2", "row 3", "row 4"]),
        ("x.json", json.dumps({"data": ROWS[:2]}), ["row 1", "row 2"]),
        ("x.csv", 'prompt,completion\na,"two\nlines"\n\nb,c\nd,e\n', ["line 2", "line 5", "line 6"]),
        ("x.csv", "sep=;\r\nprompt;completion\r\na;b\r\nc;d\r\n", ["line 3", "line 4"]),
        ("x.tsv", "prompt\tcompletion\na\tb\n", ["line 2"]),
    ],
)
def test_rows_are_numbered_as_an_editor_shows_them_and_the_entries_of_lists_from_1(name, text, places, tmp_path):
    (tmp_path / name).write_bytes(text.encode())
    table = read_file(name, tmp_path / name)
    assert [row.where for row in table.rows] == [f"{name}, {place}" for place in places]
    records = make_pool([table], "completion").records
    assert [record.where for record in records] == [row.where for row in table.rows]
    assert [record.id for record in records] == [f"{name}:{number}" for number in range(1, len(places) + 1)]  # as ever


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_text_is_read_by_its_byte_order_mark_as_excel_writes_it(encoding, tmp_path):
    (tmp_path / "x.tsv").write_bytes("\ufeffprompt\tcompletion\r\nسؤال\tجواب\r\n".encode(encoding))
    assert read_file("x.tsv", tmp_path / "x.tsv").rows == [("x.tsv, line 2", {"prompt": "سؤال", "completion": "جواب"})]
