"""A recipe written for a user's own file: it loads, it fits the data, its comments tell the truth."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from grasp_lora.data.files import Row, Table
from grasp_lora.data.records import Record, make_pool
from grasp_lora.engine.preflight import preflight
from grasp_lora.engine.session import Session
from grasp_lora.errors import AdapterError, DataError, GraspError, RecipeError
from grasp_lora.method.search import PRESETS
from grasp_lora.models.adapter_files import read_adapter
from grasp_lora.recipes import init
from grasp_lora.recipes.corpus import Corpus
from grasp_lora.recipes.init import FEWEST, choose_sizes, write_recipe
from grasp_lora.recipes.load import load_recipe
from grasp_lora.recipes.recipe import schema_text
from grasp_lora.recipes.text import SCHEMA_FILE

Rows = list[dict[str, Any]]


def completion(count: int, name: str = "t") -> Rows:
    return [{"prompt": f"{name} {i}?", "completion": f"{i % 9}"} for i in range(count)]


def questions(count: int) -> Rows:
    return [{"context": f"text {i} says", "question": f"{i}?", "answer": f"text {i}"} for i in range(count)]


def labelled(count: int, labels: list[str]) -> Rows:
    return [{"text": f"t {i}", "label": labels[i % len(labels)]} for i in range(count)]


def turns(name: str, i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{name} {i}?"}, {"role": "assistant", "content": f"{i % 9}"}]


def squad(count: int, name: str = "t", per_article: int = 3) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    for i in range(count):
        if i % per_article == 0:
            context = f"{name} {i // per_article} says yes."
            data.append({"title": f"{name} {i}", "paragraphs": [{"context": context, "qas": []}]})
        answer = {"text": "yes", "answer_start": data[-1]["paragraphs"][0]["context"].index("yes")}
        data[-1]["paragraphs"][0]["qas"].append({"id": f"{name}{i}", "question": f"{i}?", "answers": [answer]})
    return {"data": data}


def write(file: Path, content: Rows | dict[str, Any]) -> Path:
    """Write rows or SQuAD data in the format of the suffix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        file.write_text(json.dumps(content), encoding="utf-8")
    elif file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return file


@pytest.fixture
def start(tmp_path: Path, tiny_backbone_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Give `start(data, source=[...], ...)`, which writes `mine.yaml` in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRASP_LORA_DATA", raising=False)
    (tmp_path / "tiny-llama").symlink_to(tiny_backbone_folder, target_is_directory=True)

    def call(
        data: Path, source: tuple[str, ...] = ("org/english",), output: Path | None = Path("mine.yaml"), **changes: Any
    ) -> Path:
        options: dict[str, Any] = {"language": "de", "source_language": "en", "backbone": "tiny-llama"} | changes
        return write_recipe(data, output=output, source=source, **options)[0]

    return call


def sizes_of(file: Path, changes: Sequence[str] = ()) -> dict[str, int]:
    """The sizes of the splits."""
    splits = Session(*load_recipe(file, changes)).splits
    names = ("source_train", "source_dev", "train", "dev", "micro_dev", "test")
    return {name: len(getattr(splits, name)) for name in names}


# Of each name the file, and a row of it by the name of its side and its number.
KINDS: dict[str, tuple[str, Callable[[str, int], dict[str, Any]]]] = {
    "csv": ("t.csv", lambda name, i: {"prompt": f"{name} {i}?", "completion": f"{i % 9}"}),
    "messages": ("t.jsonl", lambda name, i: {"messages": turns(name, i)}),
    "answers": ("t.jsonl", lambda name, i: {"context": f"{name}{i} a", "question": "?", "answers": ["a"]}),
    "document": ("t.jsonl", lambda name, i: {"document": f"{name} {i}", "summary": "s"}),
    "alpaca": ("t.jsonl", lambda name, i: {"instruction": f"{name} {i}", "input": "", "output": "s"}),
    "sharegpt": (
        "t.jsonl",
        lambda name, i: {"conversations": [{"from": "human", "value": f"{name} {i}?"}, {"from": "gpt", "value": "s"}]},
    ),
    "renamed": ("t.csv", lambda name, i: {"Text": f"{name} {i}", "SUMMARY ": "s"}),
    "xlsum": (
        "t.jsonl",
        lambda name, i: {"id": f"{name}{i}", "title": f"{name} {i}", "text": f"{name}{i}", "summary": "s"},
    ),
    "label": ("t.csv", lambda name, i: {"id": f"{name}{i}", "Sentence": f"{name} {i}", "Label": "ab"[i % 2]}),
    "response": ("t.csv", lambda name, i: {"Instruction": f"{name} {i}", "response": f"it {i}"}),
    "parallel": ("t.csv", lambda name, i: {"source": f"{name} {i}", "target": f"{name} ada {i}"}),
}


@pytest.mark.parametrize("kind", [*KINDS, "squad"])
def test_the_recipe_passes_the_check(kind: str, start: Callable[..., Path]) -> None:
    name, row = KINDS.get(kind, ("t.json", None))
    target, source = (
        [row(side, i) for i in range(count)] if row else squad(count, side) for side, count in (("t", 90), ("s", 60))
    )
    data, rich = write(Path(name), target), write(Path("s") / name, source)
    file = start(data, (str(rich),))
    if kind in ("csv", "messages"):
        assert all(finding.text for finding in preflight(Session(*load_recipe(file))))
    sizes = sizes_of(file)
    assert sizes["train"] + sizes["test"] <= 90
    assert sizes["dev"] == sizes["micro_dev"] == 0
    assert sizes["test"] >= 18
    assert sizes["train"] >= 28
    assert sizes["source_train"] >= 45
    assert sizes["source_dev"] >= 4


@pytest.mark.parametrize(("count", "train", "test"), [(30, 22, 8), (60, 45, 15), (300, 225, 75), (900, 600, 100)])
def test_what_is_not_held_out_is_for_training(count: int, train: int, test: int, start: Callable[..., Path]) -> None:
    recipe, _ = load_recipe(start(write(Path("t.jsonl"), completion(count))))
    target = recipe.data.target
    assert (target.dev, target.micro_dev, target.test) == (0, 0, test)
    assert target.train == (None if train + test == count else train)


def test_no_row_stays_unused_where_a_few_texts_have_most_rows(start: Callable[..., Path]) -> None:
    """As of a book: some texts have many questions. A dev set can be asked for later."""
    data = squad(0)["data"]
    for text, count in enumerate([25, 20, 15, 10, 5, 3, 2, 2, 1, 1, 1]):
        data += squad(count, f"t{text}", per_article=count)["data"]
    file = start(write(Path("t.json"), {"data": data}), (str(write(Path("s.json"), squad(60, "s"))),))
    sizes = sizes_of(file)
    assert sizes["train"] + sizes["test"] == 85
    assert sizes_of(file, ["data.target.dev=16"])["dev"] >= 16


def test_with_dev_rows_a_ratio_can_be_learned(start: Callable[..., Path]) -> None:
    file = start(write(Path("t.jsonl"), completion(216)))
    assert load_recipe(file)[0].final.prune_ratio == 0
    stage = load_recipe(file, ["data.target.dev=16", "final.prune_ratio=null", "final.deliver=best"])[0].controller
    # Before training and after each of three epochs, as the final run has.
    assert stage.round_steps(100) == [number * 100 for number in range(4)]
    assert (stage.policy, stage.rounds) == (PRESETS["grasp"].policy, PRESETS["grasp"].rounds)


@pytest.mark.parametrize(
    ("rows", "layers", "rates"),
    [
        (questions(200), ("all-linear",), (1e-4, 3e-5)),
        (labelled(200, ["a", "b"]), ("q_proj", "v_proj"), (3e-4, 1e-4)),
    ],
    ids=["questions", "labels"],
)
def test_questions_adapt_all_linear_layers_at_rates_of_their_own(
    rows: Rows, layers: tuple[str, ...], rates: tuple[float, float], start: Callable[..., Path]
) -> None:
    data, source = write(Path("t.jsonl"), rows[:100]), write(Path("s.jsonl"), rows[100:])
    recipe, _ = load_recipe(start(data, (str(source),)))
    assert (recipe.lora.target_modules, recipe.final.prune_ratio) == (layers, 0)
    assert (recipe.source.training.learning_rate, recipe.final.training.learning_rate) == rates
    for stage in (recipe.target, recipe.controller):  # as the final run, so that all are comparable
        assert stage.training.learning_rate == rates[1]


def test_where_no_gain_of_a_merge_was_shown_the_usual_way_is_asked_for(start: Callable[..., Path]) -> None:
    for name, rows in {"best": questions(60), "continued": completion(60)}.items():
        final = load_recipe(start(write(Path(f"{name}.jsonl"), rows), output=Path(f"{name}.yaml")))[0].final
        assert (final.deliver, final.prune_ratio) == (name, 0)


@pytest.mark.parametrize("part", ["context", "system", "history"])
def test_a_prompt_that_would_lose_a_part_is_not_guessed(start: Callable[..., Path], part: str) -> None:
    Path("t.csv").write_text(f"question,{part},response\n" + "a,b,c\n" * 60, encoding="utf-8")
    with pytest.raises(DataError, match=r"which fit no task .* such as .*--column answer=response, or rename them"):
        start(Path("t.csv"))


def test_many_columns_that_fit_no_task_are_listed_once(
    start: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ask for the columns takes a look at each cell: once for each column takes minutes."""
    asked: list[Table] = []
    columns = Table.columns.fget
    monkeypatch.setattr(Table, "columns", property(lambda table: asked.append(table) or columns(table)))
    Path("t.csv").write_text(",".join(f"c{i}" for i in range(500)) + "\n" + ",".join(["a"] * 500), encoding="utf-8")
    with pytest.raises(DataError, match=r"has the columns c0, c1, .* and 480 more, which fit no task"):
        start(Path("t.csv"))
    assert len(asked) < 10


def test_instructions_with_another_name_are_told_the_three(start: Callable[..., Path]) -> None:
    Path("t.csv").write_text("instruction,input,answer\n" + "a,b,c\n" * 60, encoding="utf-8")
    with pytest.raises(DataError, match=r"; instructions: instruction, input, output; or messages\); rename them$"):
        start(Path("t.csv"))


@pytest.mark.parametrize("part", ["system", "Context"])
def test_a_part_of_a_prompt_beside_prompt_and_completion_is_not_dropped(start: Callable[..., Path], part: str) -> None:
    data = write(Path("t.csv"), [{**row, part: "Be brief."} for row in completion(60)])
    message = f"t.csv has {part} beside prompt and completion, .* --column prompt=prompt --col"
    with pytest.raises(DataError, match=message):
        start(data)
    recipe, _ = load_recipe(start(data, columns=["prompt=prompt", "completion=completion"]))
    assert recipe.data.target.columns == {}


def swahili(count: int, name: str = "t", answers: int = 1) -> Rows:
    return [
        {"Muktadha": f"{name} {i} ndiyo", "Swali": f"{i}?", "Jibu": "ndiyo" if i >= count - count * answers else ""}
        for i in range(count)
    ]


COLUMNS = ["context=Muktadha", "question = Swali", "answer=Jibu"]


def test_columns_that_the_user_names_are_those_of_the_recipe_and_of_the_run(start: Callable[..., Path]) -> None:
    data, source = write(Path("t.csv"), swahili(60)), write(Path("s.json"), squad(60, "s"))
    recipe, _ = load_recipe(start(data, (str(source),), language="sw", columns=COLUMNS))
    assert recipe.data.target.columns == {"context": "Muktadha", "question": "Swali", "answer": "Jibu"}
    assert (recipe.data.task, recipe.data.source.columns) == ("qa", {})
    assert sizes_of(Path("mine.yaml"))["train"] == 45


def test_a_source_has_columns_of_its_own_names(start: Callable[..., Path]) -> None:
    data = write(Path("t.csv"), swahili(60))
    english = [dict(zip(("Passage", "Q", "Jibu"), row.values(), strict=True)) for row in swahili(60, "s")]
    source = (str(write(Path("s.csv"), english)),)
    message = r"s\.csv has the columns .* such as --source-column context=Passage --source-column question=Q,"
    with pytest.raises(DataError, match=message):
        start(data, source, columns=COLUMNS)
    with pytest.raises(DataError, match=r"s\.csv has no column 'P', which --source-column names"):
        start(data, source, columns=COLUMNS, source_columns=["context=P"])
    with pytest.raises(DataError, match="--source-column is 'Q'; write FIELD=COLUMN"):
        start(data, source, columns=COLUMNS, source_columns=["Q"])
    own = ["context=Passage", "question=Q", "answer=Jibu"]
    recipe, _ = load_recipe(start(data, source, columns=COLUMNS, source_columns=own))
    assert recipe.data.source is not None
    assert recipe.data.source.columns == {"context": "Passage", "question": "Q", "answer": "Jibu"}
    assert sizes_of(Path("mine.yaml"))["source_train"]


def test_without_a_context_question_and_answer_are_prompt_and_completion(start: Callable[..., Path]) -> None:
    rows = [{"Swali": row["Muktadha"], "Jibu": row["Jibu"], "Nambari": str(i)} for i, row in enumerate(swahili(60))]
    columns = [*COLUMNS[1:], "id=Nambari"]
    recipe, _ = load_recipe(start(write(Path("t.csv"), rows), columns=columns))
    assert recipe.data.target.columns == {"prompt": "Swali", "completion": "Jibu", "id": "Nambari"}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["question"], "--column is 'question'; write FIELD=COLUMN, such as question=Swali"),
        (["swali=Swali"], "'swali=Swali'; write .* Fields: answer, completion, context"),
        (["question=Swali", "question=Jibu"], "--column is 'question=Jibu'; .* each field once"),
        (["question=Suali"], r"t\.csv has no column 'Suali', which --column names; it has Muktadha, Swali, Jibu"),
        (
            ["question=Swali"],
            r"has the columns Muktadha, Swali, Jibu, which fit no task .* --column context=Muktadha --column answer=Jibu, or",
        ),
    ],
)
def test_columns_that_cannot_be_are_refused(columns: list[str], said: str, start: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=said):
        start(write(Path("t.csv"), swahili(60)), columns=columns)
    assert not Path("mine.yaml").exists()


def test_rows_without_an_answer_are_left_out_where_the_user_says_so(start: Callable[..., Path]) -> None:
    data, source = write(Path("t.csv"), swahili(60, answers=0.75)), write(Path("s.json"), squad(60, "s"))
    with pytest.raises(DataError, match=r"t\.csv, line 2, line 3, .* and 11 more: Jibu is empty; .*--skip-unanswered"):
        start(data, (str(source),), columns=COLUMNS)
    file = start(data, (str(source),), columns=COLUMNS, skip_unanswered=True)
    assert "left out and counted, now 15" in file.read_text(encoding="utf-8")
    session = Session(*load_recipe(file))
    [found] = [finding for finding in preflight(session) if finding.topic == "target"]
    assert "unanswerable 15" in found.text
    with pytest.raises(DataError, match=r"Jibu is empty; .*data\.skip_unanswered"):
        preflight(Session(*load_recipe(file, ["data.skip_unanswered=false"])))


def test_a_workbook_with_a_sheet_for_each_language(start: Callable[..., Path]) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    for title, name in (("Kiswahili", "t"), ("English", "s")):
        sheet = book.create_sheet(title)
        for row in [["prompt", "completion"], *([f"{name} {i}?", i] for i in range(60))]:
            sheet.append(row)
    book.save("x.xlsx")
    recipe, _ = load_recipe(start(Path("x.xlsx"), ("x.xlsx",), sheet="Kiswahili", source_sheet="English"))
    assert (recipe.data.target.sheet, recipe.data.source.sheet) == ("Kiswahili", "English")
    assert sizes_of(Path("mine.yaml"))["train"] == 45


def test_a_workbook_whose_first_sheet_is_a_note_names_the_sheet_that_fits(start: Callable[..., Path]) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(["Made by me; ask before you use it"])
    book.create_sheet("Empty")
    hidden = book.create_sheet("Old")
    hidden.sheet_state = "hidden"
    for sheet in (hidden, book.create_sheet("Câu hỏi")):
        for row in [["context", "question", "answer"], *([f"text {i} says", f"{i}?", f"text {i}"] for i in range(60))]:
            sheet.append(row)
    book.save("x.xlsx")
    with pytest.raises(DataError, match=r"--sheet 'Câu hỏi'") as caught:
        start(Path("x.xlsx"))
    assert "Old" not in str(caught.value)
    assert "semicolon" not in str(caught.value)
    assert start(Path("x.xlsx"), sheet="Câu hỏi").is_file()


def test_whole_texts_are_refused_with_a_way_out(start: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"whole texts \(text\).*no language modelling\. Split each text into prompt"):
        start(write(Path("t.jsonl"), [{"text": f"text {i}"} for i in range(60)]))


@pytest.mark.parametrize("language", ["sw", "ar"])
def test_a_language_without_templates_gets_the_english_ones_to_translate(
    language: str, start: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    data, source = write(Path("t.json"), squad(60)), write(Path("s.json"), squad(60, "s"))
    file = start(data, (str(source),), language=language)
    recipe, _ = load_recipe(file)
    english = ("Context: {context}\nQuestion: {question}\nAnswer:", " {answer}")
    assert recipe.data.templates(recipe.data.target) == (english if language == "sw" else (None, None))
    session = Session(*load_recipe(file, ["data.prompt={" + language + ': "{question}: {context} ->"}']))
    assert session.splits.train[0].prompt.endswith(" ->")
    assert session.splits.source_train[0].prompt.startswith("Context: ")
    assert "no built-in" not in caplog.text


def test_prompts_of_translations_name_the_language_to_translate_into(start: Callable[..., Path]) -> None:
    def translations(name: str, count: int) -> Path:
        return write(Path(name), [{"source": f"one {i}", "target": f"satu {i}"} for i in range(count)])

    data, source = translations("t.jsonl", 40), str(translations("s.jsonl", 60))
    with pytest.raises(RecipeError, match=r"give the language that s\.jsonl is translated into with --source-language"):
        start(data, [source], language="ace", source_language=None)
    file = start(data, [source], language="ace", source_language="id")
    splits = Session(*load_recipe(file)).splits
    assert splits.train[0].prompt.endswith("\nTranslation into Acehnese:")
    assert splits.source_train[0].prompt.endswith("\nTranslation into Indonesian:")
    assert splits.train[0].prompt.startswith("Text: one ")


def test_limits_follow_the_lengths_of_the_file(start: Callable[..., Path]) -> None:
    rows = [{"prompt": f"{i} " + "neno " * 300, "completion": "jibu " * 40} for i in range(60)]
    recipe, _ = load_recipe(start(write(Path("t.jsonl"), rows)))
    assert 700 < recipe.data.max_tokens < 1200
    assert recipe.generation.max_new_tokens == 80
    short, _ = load_recipe(start(write(Path("s.jsonl"), completion(60)), output=Path("short.yaml")))
    assert (short.data.max_tokens, short.generation.max_new_tokens) == (512, 32)


def test_too_few_articles_are_refused(start: Callable[..., Path]) -> None:
    with pytest.raises(
        DataError,
        match=r"60 examples of t\.json form 1, the largest of 60; .* texts, or name other columns with --column$",
    ):
        start(write(Path("t.json"), squad(60, per_article=60)))


def test_large_articles_shrink_the_splits(start: Callable[..., Path]) -> None:
    source = write(Path("s.json"), squad(40, "s"))
    assert sizes_of(start(write(Path("t.json"), squad(120, per_article=40)), (str(source),)))["test"] >= 24


def test_the_sizes_fit_in_whatever_order_groups_come(start: Callable[..., Path]) -> None:
    """At full size they would fit in 2 of 20 orders."""
    rows = {"data": [*squad(20, "long", per_article=20)["data"], *squad(120)["data"]]}
    recipe = start(write(Path("t.json"), rows), (str(write(Path("s.json"), squad(40, "s"))),))
    assert {sizes_of(recipe, [f"seed={seed}"])["test"] for seed in range(5)} == {34}


def test_a_parallel_source_leaves_room_for_what_is_excluded(start: Callable[..., Path]) -> None:
    """The source's questions have the target's ids, so those of held-out articles are left out."""
    source = squad(120, "en")
    for i, article in enumerate(source["data"]):
        for j, question in enumerate(article["paragraphs"][0]["qas"]):
            question["id"] = f"t{3 * i + j}"
    write(Path("s.json"), source)
    sizes = sizes_of(start(write(Path("t.json"), squad(120)), ("s.json",)))
    assert sizes["source_train"] + sizes["source_dev"] <= 120 - sizes["test"]


def test_a_source_is_as_small_as_any_order_of_the_groups_may_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def corpus(name: str, articles: dict[str, int]) -> Corpus:
        rows = [(article, i) for article, count in articles.items() for i in range(count)]
        table = Table(name, [Row(f"{name} {i}", {"prompt": f"{name} {i}{article}", "completion": "c", "group": article})
                             for i, (article, _) in enumerate(rows)])  # fmt: skip
        return Corpus(name, "completion", {}, make_pool([table], "completion").records)

    def held_out(groups: Mapping[str, Sequence[Record]], sizes: Mapping[str, int], order: int) -> set[str]:
        wanted = {3: "group:small", 7: "group:large"}.get(order)
        return {name for name, records in groups.items() if wanted in records[0].keys}

    monkeypatch.setattr(init, "_held_out", held_out)
    target = corpus("t", {"small": 10, "large": 10, "other": 40})
    for more, left, alone in (({"rest": 20}, 40, False), ({}, 20, True)):
        sizes = choose_sizes(target, [corpus("s", {"small": 20, "large": 60 if more else 40, **more})])
        assert (sizes.source, sizes.one_source_group) == (left, alone)


def test_a_large_source_is_cut_to_what_two_cores_can_train(start: Callable[..., Path]) -> None:
    recipe, _ = load_recipe(
        start(write(Path("t.jsonl"), completion(60)), (str(write(Path("s.csv"), completion(3000, "s"))),))
    )
    assert (recipe.data.source.train, recipe.data.source.dev) == (1000, 100)


def test_several_source_files_and_a_built_in_text(start: Callable[..., Path]) -> None:
    write(Path("s1.json"), squad(30, "a"))
    recipe, _ = load_recipe(start(write(Path("t.json"), squad(60)), ("s1.json", "demo:en.json")))
    assert recipe.data.source.all_files == ("s1.json", "demo:en.json")


def test_adapters_take_the_place_of_source_data(start: Callable[..., Path]) -> None:
    adapter = Path("models/adapter")
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    recipe, _ = load_recipe(start(write(Path("t.jsonl"), completion(60)), ("models/adapter", "org/some-adapter")))
    assert recipe.source.adapters == ("models/adapter", "org/some-adapter")
    assert recipe.data.source is None


@pytest.mark.parametrize(
    ("prompt", "answer", "separated"),
    [("why {}?", "because", True), ("why {}? ", "because", False), ("{}:", "because", False), ("{}问", "答", False)],
)
@pytest.mark.parametrize("names", [("prompt", "completion"), ("instruction", "output")])
def test_a_line_break_is_put_between_prompts_and_answers_where_nothing_else_is(
    names: tuple[str, str], prompt: str, answer: str, separated: bool, start: Callable[..., Path]
) -> None:
    rows = [dict(zip(names, (prompt.format(i), answer), strict=True)) for i in range(60)]
    write(Path("s.jsonl"), [row | {names[0]: f"source {row[names[0]]}"} for row in rows])
    session = Session(*load_recipe(start(write(Path("t.jsonl"), rows), source=("s.jsonl",))))
    assert session.splits.train[0].prompt.endswith("?\n" if separated else prompt[-1])
    assert session.splits.source_train[0].prompt.endswith("?\n") == separated
    assert not [finding for finding in preflight(session) if finding.topic == "prompt"]


def test_without_a_source_nothing_is_written(start: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=r"there is no source: add --source FILE .* for the task completion$"):
        start(write(Path("t.jsonl"), completion(60)), ())
    assert sorted(path.name for path in Path().iterdir()) == ["t.jsonl", "tiny-llama"]


def test_all_faults_of_a_file_come_at_once(cli: Callable[..., Any], start: Callable[..., Path]) -> None:
    rows = labelled(60, ["good", "bad"])
    for number, change in {
        3: {"text": ""},
        9: {"text": " "},
        20: {"label": ""},
        31: {"id": "7"},
        40: {"id": "7"},
    }.items():
        rows[number] |= change
    data = write(Path("t.csv"), [{"id": str(100 + i)} | row for i, row in enumerate(rows)])
    said = cli("init", data, "-l", "de", "--source", "org/english", "--backbone", "tiny-llama").err
    assert said.splitlines()[0] == "error: 3 faults in the data"
    assert [line.partition(";")[0] for line in said.splitlines()[1:]] == [
        "- t.csv, line 5 and line 11: text is empty",
        "- t.csv, line 22: label is empty",
        "- 1 ids stand more than once, first 7 (t.csv, line 33 and t.csv, line 42)",
    ]
    with pytest.raises(
        DataError, match=r"^3 faults in the data: t\.csv, line 5 and line 11: text is empty.*; t\.csv, line 22"
    ):
        start(data)


def test_of_many_faults_the_first_ten_are_told_and_how_many_there_are(start: Callable[..., Path]) -> None:
    rows = [{"messages": [{"role": f"bot{i}", "content": "x"}, *turns("t", i)]} for i in range(40)]
    with pytest.raises(DataError, match=r"^40 faults in the data") as caught:
        start(write(Path("t.jsonl"), rows))
    assert len(caught.value.lines) == 12
    assert caught.value.lines[-1] == "- and 30 more"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("Teks", "Sentimen"), "'Sentimen' looks like labels: say --column text=Teks --column label=Sentimen, or"),
        (("Teks", "Nomor"), "which fit no task (qa"),
    ],
)
def test_labels_are_offered_where_a_column_repeats_its_values(
    names: tuple[str, str], said: str, start: Callable[..., Path]
) -> None:
    labels = ["positif", "negatif", "netral"] if names[1] == "Sentimen" else [str(i) for i in range(60)]
    rows = [{names[0]: f"teks {i}", names[1]: labels[i % len(labels)]} for i in range(60)]
    with pytest.raises(DataError) as caught:
        start(write(Path("t.csv"), rows))
    assert said in str(caught.value)


def test_a_source_without_a_label_of_the_target_is_refused(start: Callable[..., Path]) -> None:
    data = write(Path("t.csv"), labelled(60, ["positif", "negatif"]))
    source = write(
        Path("s.csv"), [row | {"text": f"s {i}"} for i, row in enumerate(labelled(60, ["positive", "negative"]))]
    )
    fault = "the target has negatif, positif, the source negative, positive; write"
    with pytest.raises(DataError, match=fault):
        start(data, (str(source),))
    same = write(
        Path("same.csv"), [row | {"text": f"s {i}"} for i, row in enumerate(labelled(60, ["positif", "negatif"]))]
    )
    file = start(data, (str(same),))
    same.write_bytes(source.read_bytes())
    with pytest.raises(DataError, match=fault):
        preflight(Session(*load_recipe(file)))


def test_one_text_with_two_labels_is_named_with_its_rows(
    start: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    rows = labelled(60, ["good", "bad"])
    rows[8] = {"text": "T  5!", "label": "good"}
    file = start(write(Path("t.csv"), rows), (str(write(Path("s.csv"), [*map(dict, labelled(60, ["bad", "good"]))])),))
    told = "one text has different labels: 'bad' in t.csv, line 7 and 'good' in t.csv, line 10"
    assert told in caplog.messages
    assert told in [finding.text for finding in preflight(Session(*load_recipe(file)))]


def test_questions_on_the_embedded_model_have_a_source_that_is_included(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, _ = write_recipe(write(Path("q.jsonl"), questions(60)), "sw", None, [], "en")
    recipe, _ = load_recipe(file)
    assert (recipe.source.adapters, recipe.data.source, recipe.backbone.name) == (("english-qa",), None, "gemma3-270m")
    assert "included" in file.read_text(encoding="utf-8")
    assert recipe.lora.target_modules == ("all-linear",)
    with pytest.raises(RecipeError, match="there is no source"):
        write_recipe(Path("q.jsonl"), "sw", Path("other.yaml"), [], "en", "tiny-llama")
    adapter = read_adapter("english-qa")
    assert (adapter.name, adapter.backbone, adapter.info.answers and adapter.info.answers.task) == (
        "english-qa", "gemma3-270m", "qa"
    )  # fmt: skip
    assert len(adapter.info.rows) >= 1000
    assert all(pair.acts for pair in adapter.weights.values())


def test_names_of_files_and_languages_of_every_kind(
    start: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for data, name in (
        ("a" * 150 + ".jsonl", "a" * 100), ("-dash.jsonl", "dash"), ("data/Meine Fragen.jsonl", "Meine-Fragen"),
        ("أسئلة.jsonl", "completion-no"),
    ):  # fmt: skip
        file = start(write(Path(data), completion(60)), output=None, language="no")  # which YAML reads as false
        assert file == Path(Path(data).stem.lstrip("-") + ".yaml")
        recipe, _ = load_recipe(file)
        assert (recipe.name, recipe.data.target.language) == (name, "no")
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "s.jsonl", completion(60, "s"))
    file = start(write(Path("t.jsonl"), completion(60)), ("~/s.jsonl",), Path("home.yaml"))
    assert sizes_of(file)["source_train"]


def adapter(name: str, base: str | None) -> str:
    """Write the config of an adapter of that backbone; return its folder."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    Path(name).mkdir()
    Path(name, "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return name


def test_the_backbone_is_that_of_the_source_adapters(start: Callable[..., Path], tmp_path: Path) -> None:
    data = write(Path("t.jsonl"), completion(60))
    one, other, silent = adapter("one", "org/llama"), adapter("other", "org/gemma"), adapter("silent", None)
    assert load_recipe(start(data, (one,), Path("a.yaml"), backbone=None))[0].backbone.name == "org/llama"
    assert load_recipe(start(data, (one,), Path("b.yaml"), backbone="mine/llama"))[0].backbone.name == "mine/llama"
    source = (str(write(Path("s.jsonl"), completion(60, "s"))),)
    assert load_recipe(start(data, source, Path("c.yaml"), backbone=None))[0].backbone.name == "gemma3-270m"
    hub = adapter("hub", "google/gemma-3-270m")  # another program's, trained on the hub's weights
    assert load_recipe(start(data, (hub,), Path("d.yaml"), backbone=None))[0].backbone.name == "google/gemma-3-270m"
    (tmp_path / "hub/grasp_lora.json").write_text(json.dumps({"embedded": True}))
    assert load_recipe(start(data, (hub,), Path("e.yaml"), backbone=None))[0].backbone.name == "gemma3-270m"
    with pytest.raises(AdapterError, match="name the backbones org/gemma, org/llama; name one with --backbone"):
        start(data, (one, other), backbone=None)
    with pytest.raises(AdapterError, match="name the backbones None; name one with --backbone"):
        start(data, (silent,), backbone=None)


def test_a_learned_ratio_has_rows_to_probe_and_says_how_many_are_missing(start: Callable[..., Path]) -> None:
    recipe, _ = load_recipe(start(write(Path("t.jsonl"), completion(48)), learn_ratio=True))
    target = recipe.data.target
    assert (target.test, target.micro_dev, target.dev, target.train) == (12, 16, 0, None)
    assert (recipe.final.deliver, recipe.final.prune_ratio, recipe.target.adapter) == ("grasp", None, None)
    assert (recipe.controller.rounds.pool, recipe.controller.rule) == ("micro_dev", "surrogate_at_end")
    assert recipe.controller.training.epochs == recipe.final.training.epochs
    with pytest.raises(
        DataError, match=r"has 47 examples; to learn a prune ratio at least 48 are needed.*: 1 are missing$"
    ):
        start(write(Path("few.jsonl"), completion(47)), output=Path("few.yaml"), learn_ratio=True)


def test_two_given_adapters_are_merged_at_a_learned_ratio(start: Callable[..., Path], tmp_path: Path) -> None:
    data = write(Path("t.jsonl"), questions(60))
    english, german = adapter("english", "org/llama"), adapter("german", "org/llama")
    both = {"backbone": None, "target_adapter": german, "language": "de"}
    with pytest.raises(RecipeError, match=r'adapter german does not say what prompt .* such as --prompt "Context: '):
        start(data, (english,), **both)
    asked = {"prompt": r"{question}\nIn: {context}\nA:"}
    elsewhere, _ = load_recipe(start(data, (english,), Path("deep/mine.yaml"), **both, **asked))
    assert elsewhere.target.adapter == "../german"
    recipe, _ = load_recipe(start(data, (english,), **both, **asked))
    assert recipe.data.prompt == "{question}\nIn: {context}\nA:"
    assert (recipe.source.adapters, recipe.target.adapter) == ((english,), german)
    assert (recipe.backbone.name, recipe.final.deliver, recipe.data.target.micro_dev) == ("org/llama", "grasp", 16)
    how = {"task": "qa", "prompt": "Frage: {question} {context}", "completion": " {answer}", "chat_template": False}
    (tmp_path / "german/grasp_lora.json").write_text(json.dumps({"answers": how}))
    said, _ = load_recipe(start(data, (english,), Path("said.yaml"), **both))
    assert (said.data.prompt, said.data.completion) == (how["prompt"], how["completion"])
    write(Path("other.jsonl"), completion(60))
    with pytest.raises(
        RecipeError, match="german was trained for the task qa, and the rows are of the task completion"
    ):
        start(Path("other.jsonl"), (english,), Path("other.yaml"), **both)
    for source, message in (((), "give that with --source$"), (("t.jsonl",), "is the data file t.jsonl now, or leave")):
        with pytest.raises(RecipeError, match=f"--target-adapter german is merged .*{message}"):
            start(data, source, Path("more.yaml"), **both | {"backbone": "org/llama"}, **asked)


def test_the_backbone_of_an_adapter_on_the_hub_is_looked_up(
    start: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, object]] = []

    def download(hub_id: str, allow_patterns: object, **_: object) -> str:
        asked.append((hub_id, allow_patterns))
        if hub_id == "org/none":
            raise OSError("no such repository")
        return adapter("fetched", "org/llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    data = write(Path("t.jsonl"), completion(60))
    assert load_recipe(start(data, ("org/adapter",), backbone=None))[0].backbone.name == "org/llama"
    assert asked == [("org/adapter", ["adapter_config.json", "grasp_lora.json"])]
    with pytest.raises(AdapterError, match="adapter org/none: there is no such folder"):
        start(data, ("org/none",), Path("b.yaml"), backbone=None)
    assert load_recipe(start(data, ("org/none",), Path("c.yaml"), backbone="org/x"))[0].backbone.name == "org/x"


def test_answers_of_several_lines_are_not_cut_at_the_first(start: Callable[..., Path]) -> None:
    rows = [{"prompt": f"t {i}?", "completion": f"1. {i}\n2. {i}"} for i in range(60)]
    file = start(write(Path("t.jsonl"), rows), (str(write(Path("s.jsonl"), completion(60, "s"))),))
    assert load_recipe(file)[0].generation.stop == ()


def test_a_source_of_one_article_has_no_dev_split(start: Callable[..., Path]) -> None:
    source = write(Path("s.json"), squad(60, "s", per_article=60))
    sizes = sizes_of(start(write(Path("t.json"), squad(90)), (str(source),)))
    assert (sizes["source_train"], sizes["source_dev"]) == (60, 0)


def test_paths_start_from_the_folder_of_the_recipe(start: Callable[..., Path], tmp_path: Path) -> None:
    data, source = write(tmp_path / "data/t.jsonl", completion(60)), write(Path("s.csv"), completion(60, "s"))
    file = start(data.absolute(), (str(source),), output=Path("deep/er/mine.yaml"))
    recipe, _ = load_recipe(file)
    assert recipe.data.target.all_files == ("../../data/t.jsonl",)
    assert recipe.data.source.all_files == ("../../s.csv",)
    assert recipe.backbone.name == "../../tiny-llama"
    assert str(tmp_path) not in file.read_text()
    sizes_of(file)


def test_a_file_that_the_recipe_would_find_elsewhere_is_refused(
    start: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "elsewhere/en.jsonl", completion(1))
    monkeypatch.setenv("GRASP_LORA_DATA", str(tmp_path / "elsewhere"))
    data, source = write(Path("t.jsonl"), completion(60)), write(Path("en.jsonl"), completion(60, "s"))
    with pytest.raises(DataError, match=r"'en\.jsonl' is in two places, with different contents"):
        start(data, (str(source),))
    assert not Path("mine.yaml").exists()


def test_labels_are_written_down(start: Callable[..., Path]) -> None:
    file = start(write(Path("t.csv"), labelled(60, ["ya, tentu", "bukan", "ya"])))
    recipe, _ = load_recipe(file)
    assert (recipe.data.task, recipe.data.labels) == ("classification", ("bukan", "ya", "ya, tentu"))
    assert "what an answer may be" in file.read_text(encoding="utf-8")


def test_a_label_that_may_be_a_slip_is_named(start: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    rows = labelled(60, ["ankesë", "tjetër"])
    rows[29]["label"] = "ankese"
    start(write(Path("t.csv"), rows))
    assert caplog.messages == ["ankese in t.csv, line 31: did you mean ankesë, which 30 rows have?"]


def test_an_existing_file_is_never_overwritten(start: Callable[..., Path]) -> None:
    data = write(Path("t.jsonl"), completion(60))
    Path("mine.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"mine\.yaml exists already; remove it, or choose another"):
        start(data)
    assert Path("mine.yaml").read_text() == "mine"
    with pytest.raises(RecipeError, match=r"^\. exists already; remove it, or choose another name with --output"):
        start(data, output=Path())


@pytest.mark.parametrize(
    ("data", "source", "error", "message"),
    [
        ([{"frage": "a", "antwort": "b"}] * 60, (), DataError,
         r"columns frage, antwort, which fit no task .* --column prompt=frage --column completion=antwort, or"),
        (completion(60), ("nowhere.csv",), RecipeError, r"source nowhere\.csv is neither a data file, nor a folder with"),
        (completion(60), ("tiny-llama",), RecipeError, r"source tiny-llama is neither .* adapter_config\.json"),
        (completion(60), ("org/name", "s.jsonl"), RecipeError, "source org/name is neither .* or adapters alone"),
        (completion(60), ("demo:en.json",), DataError, r"data for the task qa by its columns, and the task is completion"),
        (completion(60), ("few.jsonl",), DataError, r"the source has 10 examples, .*at least 20 are needed"),
        (completion(FEWEST - 1), (), DataError, rf"t\.jsonl has {FEWEST - 1} examples; at least {FEWEST} are needed"),
        ({"data": [{"title": "t", "paragraphs": []}]}, (), DataError, r"t\.json has 0 examples; at least"),
        (labelled(60, ["a"]), (), DataError, r"t\.jsonl: 1 labels, first a; a classification has 2 to 200"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_nothing_is_written(
    data: Any, source: tuple[str, ...], error: type[GraspError], message: str, start: Callable[..., Path]
) -> None:
    file = write(Path("t.json" if isinstance(data, dict) else "t.jsonl"), data)
    write(Path("s.jsonl"), completion(60, "s"))
    write(Path("few.jsonl"), completion(10, "s"))
    with pytest.raises(error, match=message):
        start(file, source)
    assert not Path("mine.yaml").exists()


def test_texts_beside_questions_and_answers_are_not_left_out_in_silence(start: Callable[..., Path]) -> None:
    rows = [{"Muktadha": f"Maelezo {i} " * 10, "Swali": f"Nini {i}?", "Jibu": f"{i}"} for i in range(60)]
    file = write(Path("t.jsonl"), rows)
    named = ["question=Swali", "answer=Jibu"]
    message = r"has Muktadha beside Swali and Jibu, .*say --column prompt=Swali .* --column context=Muktadha "
    with pytest.raises(DataError, match=message):
        start(file, columns=named)
    content = yaml.safe_load(start(file, columns=[*named, "context=Muktadha"]).read_text(encoding="utf-8"))
    assert content["data"]["task"] == "qa"


def test_labels_of_both_languages_are_written_alike(start: Callable[..., Path]) -> None:
    write(Path("s.jsonl"), [{"text": f"s {i}", "label": ("Good", "Bad")[i % 2]} for i in range(60)])
    file = write(Path("t.jsonl"), [{"text": f"t {i}", "label": ("good", "bad")[i % 2]} for i in range(60)])
    with pytest.raises(DataError, match=r"t\.jsonl and s\.jsonl: the labels .Bad. and .bad. differ in case"):
        start(file, ["s.jsonl"])


def test_the_command_says_what_comes_next(cli: Callable[..., Any], start: Callable[..., Path]) -> None:
    write(Path("t.jsonl"), completion(60))
    write(Path("s.jsonl"), completion(60, "s"))
    options = ("--source", "s.jsonl", "--backbone", "tiny-llama", "-o", "full.yaml")
    said = cli("init", "t.jsonl", "-l", "de", *options).out
    first, *lines = said.splitlines()
    assert first == f"wrote full.yaml and {SCHEMA_FILE}"
    assert [line.partition(":")[0] for line in lines] == ["task", "rows", "next"]
    assert lines[1] == "rows: all others, about 45, to train on, 15 to test"
    assert lines[-1] == "next: grasp-lora check full.yaml"
    write(Path("named.jsonl"), [{"question": f"{i}?", "answer": "a"} for i in range(60)])
    told = cli("init", "named.jsonl", "-l", "de", "--source", "s.jsonl").out
    assert "task: completion, where prompt is the column question and completion is the column answer\n" in told
    assert Path("full.yaml").read_text().startswith(f"# yaml-language-server: $schema={SCHEMA_FILE}\n")
    assert Path(SCHEMA_FILE).read_text(encoding="utf-8") == schema_text()


def test_a_few_examples_that_are_too_long_do_not_make_the_recipe_fail(start: Callable[..., Path]) -> None:
    rows = completion(120)
    for row in rows[:4]:
        row["prompt"] += " x" * 400
    file = start(write(Path("t.jsonl"), rows), (str(write(Path("s.jsonl"), completion(60, "s"))),))
    target = load_recipe(file)[0].data.target
    assert target.train is None
    sizes = sizes_of(file)
    assert sizes["test"] == target.test
    assert sizes["train"] == 116 - sizes["test"]
