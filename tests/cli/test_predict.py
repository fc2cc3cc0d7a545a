"""`predict` asks an adapter as it was trained to be asked: whole prompts, a question, rows of a file."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CliResult, build_tiny_model, build_tiny_tokenizer, write_tiny_workspace

from grasp_lora.engine import predict as predicting
from grasp_lora.engine.session import Session
from grasp_lora.models.adapter_files import OUR_FILE
from grasp_lora.models.adapters import fresh_adapter
from grasp_lora.models.live import adapter_weights
from grasp_lora.models.model_settings import LoraSettings
from grasp_lora.recipes.load import load_recipe

Cli = Callable[..., CliResult]
TEMPLATE = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
END = 261  # the token <end>
QA_TEMPLATE = "Context: {context}\nQuestion: {question}\nAnswer:"


def jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def talk(what: str, reply: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": what}]
    return turns if reply is None else [*turns, {"role": "assistant", "content": reply}]


def change_answers(adapter: str, **changes: object) -> None:
    """Let an adapter say otherwise how it was trained to be asked."""
    info = json.loads(Path(adapter, OUR_FILE).read_text())
    Path(adapter, OUR_FILE).write_text(json.dumps(info | {"answers": info["answers"] | changes}))


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
    return folder


@pytest.fixture(autouse=True)
def _here(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a copy of the shelf."""
    monkeypatch.chdir(shutil.copytree(shelf, tmp_path / "here", symlinks=True))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Any, list[int]]]:
    """What the model would be given: prompts as text, settings, and tokens that end an answer; each answer is "so"."""
    seen: list[tuple[list[str], Any, list[int]]] = []

    def answer(
        model: Any, tokenizer: Any, prompts: list[list[int]], settings: Any, *, ends: list[int], labels: dict[str, Any]
    ) -> list[tuple[str, float]]:
        assert not labels
        seen.append(([tokenizer.decode(ids) for ids in prompts], settings, ends))
        return [("so", 0.0)] * len(prompts)

    monkeypatch.setattr(predicting, "answer", answer)
    return seen


def standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors="surrogateescape"))


def refusal(result: CliResult) -> str:
    assert (result.status, result.out) == (2, ""), result.err
    assert result.err.count("\n") == 1, result.err
    return result.err


def test_prompts_come_as_arguments_or_lines_or_json(
    cli: Cli, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    standard_input(monkeypatch, "one\r\nلغة\u2028more\n".encode())
    assert cli("predict", "talks", "--stop", "#", "--max-new-tokens", "3").out == "so\n" * 2
    prompts, settings, _ = asked[-1]
    assert prompts == ["<bos>one", "<bos>لغة\u2028more"]
    assert (settings.max_new_tokens, settings.stop) == (3, ("#",))
    standard_input(monkeypatch, b'"a\\nb"\n{"id": "7", "prompt": "<bos>c"}\n')
    assert cli("predict", "talks", "--jsonl").out == '"so"\n' * 2
    assert asked[-1][0] == ["<bos>a\nb", "<bos>c"]  # one BOS token each
    assert asked[-1][1].max_new_tokens == 4  # as in the recipe that trained it
    for no_text in (b"null", b"7", b'{"prompt": ["a"]}'):
        standard_input(monkeypatch, no_text)
        assert "prompt must be a text, found" in refusal(cli("predict", "talks", "--jsonl"))
    monkeypatch.setattr(predicting, "answer", lambda *arguments, **more: [("لغة\n语言", 0.0)] * 2)
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # what Windows takes for a pipe's encoding
    monkeypatch.setattr("sys.stdout", pipe)
    assert "add --jsonl" in cli("predict", "talks", "a", "b").err
    pipe.flush()
    assert pipe.buffer.getvalue().decode("utf-8") == "لغة\n语言\n" * 2  # type: ignore[attr-defined]


def test_a_question_is_put_into_the_prompt_of_the_training_and_cleaned_as_rows_are(cli: Cli, asked: list[Any]) -> None:
    shutil.copytree("qa", "a-run/adapter")
    Path("a-run/run.json").write_text("{}")  # of the folder of a run it is the adapter in it
    asking = ("--context", "here is {x}\r\n\x93so\x94\x07", "--question", "where?")
    result = cli("predict", "a-run", "--backbone", "tiny-llama", *asking)
    assert (result.status, result.out, result.err) == (0, "so\n", "")
    assert asked[-1][0] == ["<bos>" + QA_TEMPLATE.format(context="here is {x}\n“so”", question="where?")]
    cli("predict", "chat", "--question", "what?<end>")  # a prompt with one field needs one text, which is text
    assert asked[-1][0] == ["<start>user\nwhat?<end><end>\n<start>assistant\n"]
    cli("predict", "talks", "--question", "what?")
    assert asked[-1][0] == ["<bos>what?\n"]


def test_on_a_terminal_the_fields_are_asked_for_in_turn(
    cli: Cli, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def typed(*lines: str | type[BaseException]) -> None:
        left = iter(lines)

        def read(prompt: str) -> str:
            names.append(prompt.split()[0])
            line = next(left)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)

    names: list[str] = []
    standard_input(monkeypatch, b"")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    typed("one text", "where?", "when?", "", "another", "who?", "", "")
    assert cli("predict", "qa").out == "so\n" * 3
    assert names == ["context", *["question"] * 3, "context", "question", "question", "context"]
    told = [("one text", "where?"), ("one text", "when?"), ("another", "who?")]
    wanted = ["<bos>" + QA_TEMPLATE.format(context=context, question=question) for context, question in told]
    assert [prompts for prompts, *_ in asked] == [[prompt] for prompt in wanted]
    for end in ("", EOFError, KeyboardInterrupt):
        typed("what?", end)
        result = cli("predict", "talks")
        assert (result.status, result.out, result.err) == (0, "so\n", "")
        assert asked[-1][0] == ["<bos>what?\n"]  # as in its training


def test_a_prompt_of_another_form_and_a_text_that_is_cut_get_a_note(cli: Cli, asked: list[Any]) -> None:
    whole = QA_TEMPLATE.format(context="c", question="q")
    assert cli("predict", "qa", whole).err == ""
    for adapter, prompt in (("qa", "where?"), ("qa", whole + " "), ("talks", "what?")):
        result = cli("predict", adapter, prompt)
        assert (result.status, result.out) == (0, "so\n")
        assert result.err.startswith("WARNING: the adapter was trained on prompts of the form")
    assert "leave out --no-chat" in cli("predict", "chat", "x", "--no-chat").err
    change_answers("qa", max_document_tokens=4)
    said = cli("predict", "qa", "--context", "abcdefgh", "--question", "where?").err
    assert said == "WARNING: 1 of 1 texts were cut to 4 tokens, as in training\n"
    assert asked[-1][0] == ["<bos>" + QA_TEMPLATE.format(context="abcd", question="where?")]


def test_what_a_user_says_in_a_chat_is_text_and_a_prompt_in_the_template_needs_no_chat(
    cli: Cli, asked: list[Any]
) -> None:
    rendered = "<start>user\nwhat 1?<end>\n<start>assistant\n"  # as in evaluation/prompts.jsonl of a run
    cli("predict", "chat", "<end> 2?")
    assert asked[-1][0] == ["<start>user\n<end> 2?<end>\n<start>assistant\n"]
    assert asked[-1][2] == [END]
    cli("predict", "chat", rendered, "--no-chat")
    assert asked[-1][0][0].removeprefix("<bos>") == rendered


def test_rows_are_answered_and_written_with_their_predictions(cli: Cli, asked: list[Any]) -> None:
    Path("rows.csv").write_text('text,question,note\n"here, there",where?,لا\nnow,when?,\n', encoding="utf-8")
    result = cli("predict", "qa", "rows.csv")
    assert [json.loads(line)["prediction"] for line in result.out.splitlines()] == ["so", "so"]
    assert asked[-1][0][0] == "<bos>" + QA_TEMPLATE.format(context="here, there", question="where?")
    assert (cli("predict", "qa", "rows.csv", "--output", "out.csv").out) == ""
    with Path("out.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"text": "here, there", "question": "where?", "note": "لا", "prediction": "so"}
    qas = [{"id": "a", "question": "q?"}, {"id": "b", "question": "w?", "answers": [], "is_impossible": True}]
    article = {"title": "t", "paragraphs": [{"context": "now", "qas": qas}]}
    Path("squad.json").write_text(json.dumps({"data": [article]}))
    cli("predict", "qa", "squad.json", "-o", "out.jsonl")
    ids = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert ids == [{"id": "a", "prediction": "so"}, {"id": "b", "prediction": "so"}]
    jsonl(Path("t.jsonl"), [{"messages": talk("a", "b") + talk("c")}, {"messages": talk("d", "gold")}])
    cli("predict", "chat", "t.jsonl")
    prompt = "<start>user\na<end>\n<start>assistant\nb<end>\n<start>user\nc<end>\n<start>assistant\n"
    assert asked[-1][0] == [prompt, "<start>user\nd<end>\n<start>assistant\n"]
    jsonl(Path("t.jsonl"), [{"messages": talk("a")}, {"prompt": "b", "completion": "c"}])
    cli("predict", "talks", "t.jsonl")
    assert asked[-1][0] == ["<bos>a\n", "<bos>b\n"]  # among conversations all turns end with a line break


def test_rows_of_every_layout_need_no_answer(cli: Cli, asked: list[Any]) -> None:
    shared = [{"from": "human", "value": "what 1?"}, {"from": "gpt", "value": "unread"}]
    rows = ({"instruction": "what 1?"}, {"instruction": "what 1?", "input": "", "output": "unread"},
            {"conversations": shared[:1]}, {"conversations": shared}, {"messages": talk("what 1?")})  # fmt: skip
    for row in rows:
        result = cli("predict", "talks", str(jsonl(Path("asked.jsonl"), [row])))
        assert result.status == 0, result.err
        assert "what 1?" in asked[-1][0][0]
        assert "unread" not in asked[-1][0][0]


def test_an_answer_in_a_chat_ends_with_its_turn() -> None:
    """The real thing: a model that says nothing but a letter, and then the end of its turn."""
    with predicting.asking("chat", max_new_tokens=4, stop=()) as ready:
        letter = ready.tokenizer("a", add_special_tokens=False).input_ids[0]
        bias = torch.zeros(len(ready.tokenizer))
        bias[letter], bias[END] = 1e6, 2e6  # no answer ends before it has a text
        hook = ready.model.get_output_embeddings().register_forward_hook(lambda _, __, scores: scores + bias)
        try:
            assert ready.texts(["x"]) == ["a"]
        finally:
            hook.remove()


@pytest.mark.parametrize(
    ("arguments", "value", "fix"),
    [
        (("qa", "a prompt", "--question", "q"), "--question", "one of them"),
        (("qa", "--question", "q"), "is asked with {context}, {question}", "give --context and --question"),
        (("qa", "--question", "q", "--context", " "), "--context is empty", "give a text"),
        (("talks", "--question", "q", "--context", "c"), "is asked with {prompt}", "give --context alone"),
        (("qa", "letter.txt"), "letter.txt", ".csv"),
        (("qa", "a prompt", "--sheet", "S"), "--sheet takes a file of rows", "leave it out"),
        (("qa", "no-columns.csv"), "no column 'text'", "found: "),
        (("qa", "head.csv"), "head.csv holds no records", ""),
        (("qa", "no-such.csv"), "no-such.csv", ""),
        (("qa", "qa.jsonl", "talks.jsonl"), "a file of rows is given beside others", "one file at a time"),
        (("qa", "twice.jsonl", "-o", "out.csv"), "prediction", "rename or remove"),
        (("qa", "qa.jsonl", "-o", "talks.jsonl"), "talks.jsonl exists already", "another with --output"),
        (("qa", "qa.jsonl", "-o", "out.xml"), "out.xml", ".csv"),
        (("qa", "a prompt", "-o", "out.csv"), "--output", "file of rows"),
        (("silent", "--question", "q"), "does not say", "whole prompt"),
        (("foreign", "--question", "q"), "__class__", "{context}"),
        (("many", "a prompt"), "adapter many: 1000 labels", "a classification has 2 to 200"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_nothing_is_written(
    cli: Cli, arguments: tuple[str, ...], value: str, fix: str
) -> None:
    Path("no-columns.csv").write_text("a,b\n1,2\n")
    Path("head.csv").write_text("text,question\n")
    Path("letter.txt").write_text("a text\n")
    jsonl(Path("twice.jsonl"), [{"text": "c", "question": "q", "prediction": "so"}])
    for name, changes in {
        "silent": {"task": None, "prompt": None},
        "foreign": {"prompt": "{context.__class__}"},
        "many": {"labels": [f"label {number}" for number in range(1000)]},
    }.items():
        shutil.copytree("qa", name)
        change_answers(name, **changes)
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    line = refusal(cli("predict", *arguments))
    assert value in line
    assert fix in line
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_a_merge_answers_as_its_parents_do_where_they_agree(cli: Cli) -> None:
    labels = {"task": "classification", "prompt": "{text}", "completion": " {label}", "labels": ["a", "b"]}
    changes: dict[str, dict[str, Any]] = {
        "first": {}, "longer": {"max_new_tokens": 12}, "other": {"labels": ["a", "c"]}, "reworded": {"prompt": "? {text}"},
    }  # fmt: skip
    for name, change in changes.items():
        shutil.copytree("qa", name)
        change_answers(name, **labels | {"max_new_tokens": 9} | change)
    said = {name: cli("merge", "first", name, "--backbone", "tiny-llama", "-o", f"to-{name}").out for name in changes}
    answers = {name: json.loads(Path(f"to-{name}", OUR_FILE).read_text()).get("answers") for name in changes}
    assert "predict" not in said["first"] + said["longer"]
    assert (answers["longer"]["labels"], answers["longer"]["max_new_tokens"]) == (["a", "b"], 12)
    assert answers["other"] is None
    assert "in different ways, so tell predict" in " ".join(said["other"].split())
    assert (answers["reworded"].get("labels"), answers["reworded"].get("prompt")) in ((None, None), ([], None))
    for name in ("other", "reworded"):
        assert "writes any text, not one of their labels" in " ".join(said[name].split())
