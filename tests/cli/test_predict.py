"""`predict` asks an adapter as it was trained to be asked: whole prompts, a question, rows of a file, a conversation."""

import csv
import datetime
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from conftest import CliResult, build_tiny_model, build_tiny_tokenizer, write_tiny_workspace

from grasp_lora.engine import predict as predicting
from grasp_lora.engine.session import Session
from grasp_lora.models.adapters import fresh_adapter
from grasp_lora.models.live import adapter_weights
from grasp_lora.models.reading import OUR_FILE, WEIGHTS_FILE
from grasp_lora.models.settings import LoraSettings
from grasp_lora.recipes.load import load_recipe

Cli = Callable[..., CliResult]
TEMPLATE = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
QA_TEMPLATE = "Context: {context}\nQuestion: {question}\nAnswer:"


def jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def talk(what: str, reply: str | None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": what}]
    return turns if reply is None else [*turns, {"role": "assistant", "content": reply}]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path) -> Path:
    """Adapters `qa` and `talks` of `tiny-llama`, which has no chat template, and `chat` of `tiny-chat`, which has one."""
    folder = tmp_path_factory.mktemp("shelf")
    recipe = write_tiny_workspace(folder, tiny_backbone_folder)
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "<end>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tiny-chat")
    build_tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "tiny-chat")
    jsonl(folder / "talks.jsonl", [{"messages": talk(f"what {i}?", f"that {i}")} for i in range(40)])
    rows = [{"id": f"q{i}", "text": f"here is {i}", "question": "where?", "answer": f"{i}"} for i in range(40)]
    jsonl(folder / "qa.jsonl", rows)
    chats = ["data.target.files=[talks.jsonl]", "data.source=null"]
    asked = ["data.task=qa", "data.target.files=[qa.jsonl]", "data.target.columns={context: text}", "data.source=null",
             "data.target.language=en"]  # fmt: skip
    for name, changes in {"qa": asked, "talks": chats, "chat": [*chats, "backbone.name=tiny-chat"]}.items():
        session = Session(*load_recipe(recipe, changes))
        with fresh_adapter(session.backbone.model, LoraSettings(rank=2, alpha=4), seed=1) as model:
            session.save(folder / name, adapter_weights(model))
        if name == "chat":
            end = tokenizer.convert_tokens_to_ids("<end>")
            assert session.splits.report.chat_template
            assert {one.completion_ids[-1] for one in session.splits.train} == {end}
            assert session.splits.train[0].prompt.startswith("<start>user\nwhat ")
        elif name == "talks":
            assert session.splits.train[0].prompt.endswith("?\n")  # a line break ends each turn
            assert not session.splits.report.chat_template
    return folder


@pytest.fixture
def here(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shelf without the backbones' weights, made the working folder."""
    folder = Path(shutil.copytree(shelf, tmp_path / "here", symlinks=True))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, Any]]]:
    """The prompts that the model would be given, as text, with what ends an answer; each answer is "so"."""
    seen: list[tuple[list[str], dict[str, Any]]] = []

    def generate(model: Any, tokenizer: Any, prompts: list[list[int]], settings: Any, **more: Any) -> list[str]:
        seen.append(([tokenizer.decode(ids) for ids in prompts], more))
        return ["so"] * len(prompts)

    monkeypatch.setattr(predicting, "generate", generate)
    return seen


def refusal(result: CliResult) -> str:
    assert (result.status, result.out) == (2, ""), result.err
    assert result.err.count("\n") == 1, result.err
    return result.err


def test_a_question_is_put_into_the_prompt_of_the_training(cli: Cli, here: Path, asked: list[Any]) -> None:
    result = cli("predict", "qa", "--context", "here is {x}", "--question", "where?")
    assert (result.status, result.out, result.err) == (0, "so\n", "")
    assert asked[-1][0] == ["<bos>" + QA_TEMPLATE.format(context="here is {x}", question="where?")]
    cli("predict", "chat", "--question", "what?<end>")  # a prompt with one field needs one text, which is text
    assert asked[-1][0] == ["<start>user\nwhat?<end><end>\n<start>assistant\n"]
    cli("predict", "talks", "--question", "what?")
    assert asked[-1][0] == ["<bos>what?\n"]


def test_a_prompt_of_another_form_gets_a_note(cli: Cli, here: Path, asked: list[Any]) -> None:
    whole = QA_TEMPLATE.format(context="c", question="q")
    assert cli("predict", "qa", whole).err == ""
    for adapter, prompt in (("qa", "where?"), ("qa", whole + " "), ("talks", "what?")):
        result = cli("predict", adapter, prompt)
        assert (result.status, result.out) == (0, "so\n")
        assert result.err.startswith("WARNING: the adapter was trained on prompts of the form")
    assert "leave out --no-chat" in cli("predict", "chat", "x", "--no-chat").err


def test_a_prompt_that_stands_in_the_chat_template_is_asked_as_it_is(
    cli: Cli, here: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those on record in a run's folder do: evaluation/prompts.jsonl."""
    cli("predict", "chat", "<end> what?")  # another control token is what the user says
    assert asked[-1][0] == ["<start>user\n<end> what?<end>\n<start>assistant\n"]
    rendered = "<start>user\nwhat 1?<end>\n<start>assistant\n"
    given = "".join(json.dumps(one) + "\n" for one in (rendered, "what 2?"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    result = cli("predict", "chat", "--jsonl")
    assert asked[-1][0] == [rendered, rendered.replace("1", "2")]
    assert asked[-1][1]["ends"] == [261]
    assert result.err == (
        "WARNING: 1 of 2 prompts begin as the chat template does, with '<start>', so they are taken to stand in it already\n"
    )


def test_rows_are_answered_whatever_their_layout(cli: Cli, here: Path, asked: list[Any]) -> None:
    with Path("rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("text", "question", "note"), ("here, there", "where?", "لا"), ("now", "when?", "")]
        )
    result = cli("predict", "qa", "rows.csv")
    assert [json.loads(line)["prediction"] for line in result.out.splitlines()] == ["so", "so"]
    assert asked[-1][0][0] == "<bos>" + QA_TEMPLATE.format(context="here, there", question="where?")
    assert (cli("predict", "qa", "rows.csv", "--output", "out.csv").out) == ""
    with Path("out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"text": "here, there", "question": "where?", "note": "لا", "prediction": "so"}
    jsonl(Path("squad.json"), [])
    paragraph = {"context": "now", "qas": [{"id": "a", "question": "q?", "answers": [{"text": "now"}]}]}
    Path("squad.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}))
    cli("predict", "qa", "squad.json", "-o", "out.jsonl")
    assert json.loads(Path("out.jsonl").read_text()) == {"id": "a", "prediction": "so"}
    jsonl(Path("t.jsonl"), [{"messages": talk("a", "b") + talk("c", None)}, {"messages": talk("d", "gold")}])
    cli("predict", "chat", "t.jsonl")
    prompt = "<start>user\na<end>\n<start>assistant\nb<end>\n<start>user\nc<end>\n<start>assistant\n"
    assert asked[-1][0] == [prompt, "<start>user\nd<end>\n<start>assistant\n"]


def test_a_text_that_is_cut_gets_a_note(cli: Cli, here: Path, asked: list[Any]) -> None:
    file = Path("qa", OUR_FILE)
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["answers"]["max_document_tokens"] = 4
    file.write_text(json.dumps(facts), encoding="utf-8")
    rows = [{"text": text, "question": "where?"} for text in ("abcd", "abcdefgh", "abcdefgh")]
    said = cli("predict", "qa", str(jsonl(Path("asked.jsonl"), rows))).err
    assert said == "WARNING: 2 of 3 texts were cut to 4 tokens, as in training\n"
    assert asked[-1][0] == ["<bos>" + QA_TEMPLATE.format(context="abcd", question="where?")] * 3
    assert "1 of 1 texts were cut" in cli("predict", "qa", "--context", "abcdefgh", "--question", "where?").err


def test_a_question_is_cleaned_as_rows_are(cli: Cli, here: Path, asked: list[Any]) -> None:
    context, question = "one\r\ntwo \x93so\x94\x07", "wait\x85?"
    cli("predict", "qa", "--context", context, "--question", question)
    cli("predict", "qa", str(jsonl(Path("asked.jsonl"), [{"text": context, "question": question}])))
    expected = "<bos>" + QA_TEMPLATE.format(context="one\ntwo “so”", question="wait…?")
    assert [one[0] for one in asked] == [[expected], [expected]]


def test_columns_of_a_workbook_come_out_with_their_values(cli: Cli, here: Path, asked: list[Any]) -> None:
    day, time = datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2, 3, 4, 5)
    cells = {
        "day": (day, "dd/mm/yyyy"),
        "at": (time, "dd/mm/yyyy hh:mm"),
        "share": (0.25, "0%"),
        "price": (7.5, "0.00"),
        "many": (1200, "#,##0"),
        "done": (True, "General"),
        "fault": ("#N/A", "General"),
        "sum": ("=1+1", "General"),  # without a value
    }
    book = openpyxl.Workbook()
    book.active.append(["text", "question", *cells])
    book.active.append(["here", "where?", *(value for value, _ in cells.values())])
    for place, (_, shown) in enumerate(cells.values(), start=3):
        book.active.cell(2, place).number_format = shown
    book.save("rows.xlsx")
    cli("predict", "qa", "rows.xlsx", "-o", "out.csv")
    with Path("out.csv").open(newline="", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert list(row.values()) == [
        "here", "where?", "2026-01-02", "2026-01-02 03:04:05", "0.25", "7.5", "1200", "TRUE", "", "", "so"
    ]  # fmt: skip


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_conversation_keeps_what_was_said(
    cli: Cli, here: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Keyboard("hello\n\nand now?\n"))
    result = cli("predict", "chat", "--chat")
    assert (result.status, result.err) == (0, "")
    assert result.out.count("so\n") == 2
    assert asked[1][0] == [
        "<start>user\nhello<end>\n<start>assistant\nso<end>\n<start>user\nand now?<end>\n<start>assistant\n"
    ]
    assert asked[1][1]["ends"] == [261]
    monkeypatch.setattr("sys.stdin", Keyboard("hello\n"))
    assert "no chat template" in refusal(cli("predict", "talks", "--chat"))


def test_an_answer_in_a_chat_ends_with_its_turn(here: Path) -> None:
    """The real thing: a model that says nothing but the end of its turn after one letter."""
    import torch

    with predicting.asking("chat", max_new_tokens=4, stop=()) as ready:
        end, letter = 261, ready.tokenizer("a", add_special_tokens=False).input_ids[0]
        head = ready.model.get_output_embeddings()

        def said(_: Any, __: Any, scores: torch.Tensor) -> torch.Tensor:
            scores = torch.zeros_like(scores)
            scores[..., letter], scores[..., end] = 1.0, 2.0
            return scores

        hook = head.register_forward_hook(said)
        try:
            assert ready.texts(["x"]) == ["a"[:1]] or ready.texts(["x"])[0].startswith("a")
        finally:
            hook.remove()


@pytest.mark.parametrize(
    ("arguments", "value", "fix"),
    [
        (("qa", "a prompt", "--question", "q"), "--question", "one of them"),
        (("qa", "--question", "q"), "{context}, {question}", "--context and --question"),
        (("qa", "--question", "q", "--context", " "), "--context is empty", "give a text"),
        (("qa", "--question", "\x00", "--context", "c"), "--question is empty", "give a text"),
        (("talks", "--question", "q", "--context", "c"), "the field {prompt}, and", "give --context alone"),
        (("qa", "letter.txt"), "letter.txt: cannot tell the format from the suffix '.txt'", ".csv"),
        (("qa", "a prompt", "--sheet", "S"), "--sheet is that of a workbook", "leave it out"),
        (("qa", "qa.jsonl", "--sheet", "S"), "qa.jsonl has no sheets", "leave it out"),
        (("qa", "no-columns.csv"), "no column 'text'", "found: "),
        (("qa", "no-such.csv"), "'no-such.csv' is missing", "not a file"),
        (("qa", "qa.jsonl", "talks.jsonl"), "qa.jsonl is a file of rows, and 2 things", "one file at a time"),
        (("talks", "a prompt", "qa.jsonl"), "qa.jsonl is a file of rows, and 2 things", "one file at a time"),
        (("qa", "qa.jsonl", "-o", "qa.jsonl"), "exists already", "--output"),
        (("qa", "qa.jsonl", "-o", "no/such.csv"), "not there", "--output"),
        (("qa", "twice.jsonl", "-o", "out.csv"), "twice.jsonl has a column prediction", "rename or remove that column"),
        (("qa", "qa.jsonl", "-o", "out.xml"), "out.xml", ".csv"),
        (("qa", "a prompt", "-o", "out.csv"), "--output", "file of rows"),
        (("nowhere", "--question", "q"), "nowhere", "no such folder"),
        (("empty", "--question", "q"), "empty", "adapter_config.json"),
        (("a-run", "--question", "q"), "folder of a run", "a-run/adapter"),
        (("silent", "--question", "q"), "does not say", "whole prompt"),
        (("hostile", "--question", "q"), "__class__", "{context}"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_nothing_is_written(
    cli: Cli, here: Path, arguments: tuple[str, ...], value: str, fix: str
) -> None:
    Path("no-columns.csv").write_text("a,b\n1,2\n")
    Path("letter.txt").write_text("a text\n")
    jsonl(Path("twice.jsonl"), [{"text": "c", "question": "q", "prediction": "so"}])
    Path("empty").mkdir()
    Path("a-run").mkdir()
    Path("a-run/run.json").write_text("{}")
    for name, change in {"silent": {}, "hostile": {"task": "qa", "prompt": "{context.__class__}"}}.items():
        shutil.copytree("qa", name)
        info = json.loads((Path(name) / OUR_FILE).read_text())
        kept = {key: info["answers"][key] for key in ("max_new_tokens", "stop")}
        (Path(name) / OUR_FILE).write_text(json.dumps(info | {"answers": kept | change}))
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    line = refusal(cli("predict", *arguments))
    assert value in line
    assert fix in line
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_an_adapter_of_many_linear_modules_is_merged_with_one_of_few(cli: Cli, here: Path) -> None:
    session = Session(*load_recipe("tiny.yaml", ["data.task=completion"]))
    with fresh_adapter(session.backbone.model, LoraSettings(rank=2, target_modules=("all-linear",)), seed=1) as model:
        weights = adapter_weights(model)
        session.save(Path("wide"), weights)
    assert {name.rsplit(".", 1)[-1] for name in weights} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert "all-linear" not in Path("wide/adapter_config.json").read_text()
    result = cli("merge", "wide", "talks", "--backbone", "tiny-llama", "-o", "both")
    assert "14 modules, ranks [2, 4]" in result.out, result.err
    assert Path("both", WEIGHTS_FILE).is_file()
    result = cli("run", "tiny.yaml", "-s", "lora.target_modules=all-linear", "-s", "source.adapters=[talks]", "-o", "r")
    assert result.status == 0, result.err
    assert set(json.loads(Path("r/adapter/adapter_config.json").read_text())["target_modules"]) > {"q_proj", "up_proj"}
    assert "'all-linear' and more" in refusal(cli("check", "tiny.yaml", "-s", "lora.target_modules=[all-linear, a]"))


def test_a_merge_of_differently_worded_prompts_says_what_it_loses(cli: Cli, here: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree("qa", name)
        info = json.loads((Path(name) / OUR_FILE).read_text())
        own = {"task": "classification", "prompt": f"{name} {{text}}", "completion": " {label}", "labels": ["a", "b"]}
        (Path(name) / OUR_FILE).write_text(json.dumps(info | {"answers": info["answers"] | own}))
    said = cli("merge", "first", "second", "--backbone", "tiny-llama", "-o", "both").out
    assert "so predict takes whole prompts and writes any text, not one of their labels" in " ".join(said.split())
    alike = cli("merge", "first", "first", "--backbone", "tiny-llama", "-o", "same")
    assert "whole prompts" not in alike.out
    assert json.loads(Path("same", OUR_FILE).read_text())["answers"]["labels"] == ["a", "b"]


def test_a_merge_keeps_prompts_and_labels_where_only_the_length_of_answers_differs(cli: Cli, here: Path) -> None:
    for name, most, label in (("first", 9, "b"), ("second", 12, "b"), ("third", 12, "c")):
        shutil.copytree("qa", name)
        info = json.loads((Path(name) / OUR_FILE).read_text())
        own = {"task": "classification", "prompt": "{text}", "completion": " {label}", "labels": ["a", label]}
        (Path(name) / OUR_FILE).write_text(
            json.dumps(info | {"answers": info["answers"] | own | {"max_new_tokens": most}})
        )
    assert "predict" not in cli("merge", "first", "second", "--backbone", "tiny-llama", "-o", "both").out
    answers = json.loads(Path("both", OUR_FILE).read_text())["answers"]
    assert (answers["task"], answers["labels"], answers["max_new_tokens"]) == ("classification", ["a", "b"], 12)
    said = " ".join(cli("merge", "first", "third", "--backbone", "tiny-llama", "-o", "other").out.split())
    assert "in different ways, so tell predict" in said
    assert "so predict takes whole prompts and writes any text, not one of their labels" in said
    assert json.loads(Path("other", OUR_FILE).read_text()).get("answers") is None


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "what 1?"},
        {"instruction": "what 1?", "input": "", "output": "unread"},
        {"conversations": [{"from": "human", "value": "what 1?"}, {"from": "chatgpt", "value": "unread"}]},
        {"conversations": [{"role": "user", "content": "what 1?"}, {"role": "assistant", "content": "unread"}]},
        {"messages": [{"from": "human", "value": "what 1?"}, {"from": "gpt", "value": "unread"}]},
        {"conversations": [{"from": "human", "value": "what 1?"}]},
        {"conversations": [{"from": "human", "value": "what 1?"}, {"from": "gpt", "value": "unread"}]},
        {"messages": talk("what 1?", None)},
    ],
)
def test_rows_of_every_layout_need_no_answer(here: Path, cli: Cli, asked: Any, row: dict[str, Any]) -> None:
    result = cli("predict", "talks", str(jsonl(Path("asked.jsonl"), [row])))
    assert result.status == 0, result.err
    assert len(result.out.splitlines()) == 1
    [([prompt], _)] = asked
    assert "what 1?" in prompt
    assert "unread" not in prompt


def test_questions_of_squad_need_no_answer(here: Path, cli: Cli, asked: Any) -> None:
    qas = [{"id": "q1", "question": "where?"}, {"id": "q2", "question": "when?", "answers": [], "is_impossible": True}]
    content = {"data": [{"title": "t", "paragraphs": [{"context": "here and now", "qas": qas}]}]}
    Path("asked.json").write_text(json.dumps(content), encoding="utf-8")
    result = cli("predict", "qa", "asked.json")
    assert result.status == 0, result.err
    assert [json.loads(line)["id"] for line in result.out.splitlines()] == ["q1", "q2"]
    [(prompts, _)] = asked
    assert [("here and now" in prompt, "where?" in prompt) for prompt in prompts] == [(True, True), (True, False)]


def test_a_missing_column_is_named_as_in_the_training(here: Path, cli: Cli) -> None:
    rows = jsonl(Path("asked.jsonl"), [{"Swali": "?", "question": "where?"}])
    assert "no column 'text'; found: Swali, question" in refusal(cli("predict", "qa", str(rows)))


@pytest.mark.parametrize(("task", "column"), [("completion", "prompt"), ("summarization", "document")])
def test_a_missing_column_of_a_task_with_several_layouts_is_named(here: Path, cli: Cli, task: str, column: str) -> None:
    file = Path("qa", OUR_FILE)
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["answers"] |= {"task": task, "prompt": None, "columns": {}}
    file.write_text(json.dumps(facts), encoding="utf-8")
    said = refusal(cli("predict", "qa", str(jsonl(Path("asked.jsonl"), [{"question": "where?", "text": "a"}]))))
    assert f"has no column '{column}'; found: question, text; rename the right one" in said


def test_columns_that_are_called_as_each_other_are_not_mixed_up(here: Path, cli: Cli, asked: Any) -> None:
    """Of a translation whose columns `source` and `target` are meant the other way round."""
    file = Path("qa", OUR_FILE)
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["answers"] |= {"task": "translation", "prompt": "German: {source}\nEnglish:"}
    facts["answers"]["columns"] = {"source": "target", "target": "source"}
    file.write_text(json.dumps(facts), encoding="utf-8")
    result = cli("predict", "qa", str(jsonl(Path("asked.jsonl"), [{"source": "unread", "target": "Fluss"}])))
    assert result.status == 0, result.err
    assert asked[0][0][0].endswith("German: Fluss\nEnglish:")
