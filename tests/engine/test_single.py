"""The single steps give what the whole run gives, and leave ordinary PEFT adapters."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorder import rows_of, session_of, step_folders, steps_of

from grasp_lora.engine.check import check, check_seen
from grasp_lora.engine.predict import predict_texts
from grasp_lora.engine.single import merge_folders
from grasp_lora.errors import AdapterError, GraspError
from grasp_lora.method.merging import MergeSettings
from grasp_lora.models.adapter_files import Answers, read_adapter
from grasp_lora.models.export import export_folder
from grasp_lora.recipes.load import load_recipe

EXACT = MergeSettings("exact")


def test_merge_and_predict_give_what_the_run_gives(finished_run: Path) -> None:
    merge_folders(["run/source", "run/target"], Path("merged"), EXACT)
    merged = read_adapter("merged")
    assert merged.sha256 == read_adapter("run/merged").sha256
    assert merged.base_model == "tiny-llama"
    source, target = ({*read_adapter(place).info.rows} for place in ("run/source", "run/target"))
    assert {*merged.info.rows} == source | target
    assert source - target
    assert target - source
    rows = rows_of("run/evaluation/grasp.jsonl")
    prompts = {example.id: example.prompt for example in session_of().splits.test}
    answers = predict_texts("run/final", [prompts[row["id"]] for row in rows], None, "cpu", max_new_tokens=4)
    assert answers == [row["prediction"] for row in rows]


@pytest.mark.parametrize(
    "step",
    [
        lambda **of: merge_folders(["run/source"], Path("out"), EXACT, **of),
        lambda **of: export_folder("run/adapter", Path("out"), gguf=True, **of),
        lambda **of: predict_texts("run/adapter", ["a"], None, "cpu", max_new_tokens=1, **of),
    ],
    ids=["merge", "export", "predict"],
)
def test_steps_on_adapters_say_which_revision_and_whether_its_code_may_run(
    finished_run: Path, step: Callable[..., object], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(GraspError, match=r"the folder has no revision 'v2'"):
        step(revision="v2")
    assert not Path("out").exists()
    step(trust_remote_code=True)
    assert "trust_remote_code is on" in caplog.text


def test_the_merge_is_the_weighted_sum_of_the_deltas(finished_run: Path) -> None:
    merge_folders(["run/source", "run/target"], Path("merged"), MergeSettings("exact", (0.3, 2.0)), "tiny-llama")
    source, target, merged = (read_adapter(place).weights for place in ("run/source", "run/target", "merged"))
    for module, pair in merged.items():
        expected = 0.3 * source[module].delta() + 2.0 * target[module].delta()
        torch.testing.assert_close(pair.delta(), expected)


def test_what_makes_scores_too_good_or_too_bad_is_said(finished_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(session_of("source.adapters=[run/adapter]"))
    assert not caplog.messages
    check(session_of('data.prompt={de: "Say {prompt}:"}', "source.adapters=[run/adapter]"))
    assert "was trained on prompts of the form '{prompt}', and the recipe asks otherwise" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "warned"), [("Text: {source}\nTranslation into Indonesian:", False), ("Say {source}:", True)]
)
def test_an_adapter_that_translates_into_another_language_was_asked_alike(
    prompt: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ours = Answers(task="translation", prompt="Text: {source}\nTranslation into Acehnese:")
    session: Any = SimpleNamespace(
        how_to_answer=ours,
        recipe=SimpleNamespace(data=SimpleNamespace(task="translation")),
        splits=SimpleNamespace(test=(), dev=(), micro_dev=()),
    )
    adapter: Any = SimpleNamespace(name="a", info=SimpleNamespace(rows=(), answers=replace(ours, prompt=prompt)))
    check_seen(session, adapter)
    assert bool(caplog.messages) is warned


def test_an_adapter_that_was_trained_on_test_rows_is_refused_whatever_their_file(
    finished_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy("target.jsonl", "renamed.jsonl")
    other_splits = ("seed=7", "data.target.files=[renamed.jsonl]")
    for name in ("adapter", "merged", "final"):
        with pytest.raises(AdapterError, match=rf"adapter '{name}' was trained on \d+ of the \d+ test rows"):
            check(session_of(*other_splits, f"source.adapters=[run/{name}]"))
    check(session_of(*other_splits, "source.adapters=[run/source]"))
    assert not caplog.messages
    session = session_of("source.adapters=[run/adapter]")
    session.splits = replace(session.splits, dev=session.splits.train[:2])
    check(session)
    assert "adapter 'adapter' was trained on 2 of the dev and micro-dev rows" in caplog.text
    [first, *_], test = session.splits.train, session.splits.test
    session.splits = replace(session.splits, test=(replace(test[0], marks=("other", first.marks[-1])), *test[1:]))
    check(session)
    assert f"share an id, a text or an article with 1 of the {len(test)} test rows" in caplog.text


def test_an_adapter_that_is_given_twice_is_refused(finished_run: Path) -> None:
    shutil.copytree("run/source", "copy")
    for changes in (
        ["source.adapters=[run/source, run/source]"],
        ["source.adapters=[run/source, ./run/source]"],
        ["source.adapters=[run/source, copy]"],
        ["source.adapters=[run/source]", "target.adapter=copy"],
    ):
        with pytest.raises(AdapterError, match=r"of the adapters run/source, \S+ two are the same; name each once"):
            check(session_of("data.source=null", *changes))


def test_a_chat_template_that_a_given_adapter_brings_along_is_told_of(
    finished_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = "{% for turn in messages %}<{{ turn['content'] }}>{% endfor %}"
    session = session_of("source.adapters=[run/source]", "data.chat_template=true")
    session.backbone.tokenizer.chat_template = template
    for theirs, told in ((template, False), (f"{template} ", True)):
        Path("run/source/chat_template.jinja").write_text(theirs, encoding="utf-8")
        session.__dict__.pop("given", None)
        check(session)
        assert ("adapter 'source' brings a chat template of its own" in caplog.text) == told


def test_a_final_run_marks_the_rows_that_it_was_trained_on(tiny_workspace: Path) -> None:
    steps = steps_of()
    known = {mark for row in steps.splits.train for mark in row.marks}
    source = steps.source()
    assert not known & source.rows
    for adapter, step in ((steps.continued(), "final-0.00"), (steps.finetune(source, 0.3), "final-0.30")):
        assert known | source.rows == adapter.rows
        [folder] = step_folders("", step)
        assert {*read_adapter(folder / "adapter").info.rows} == adapter.rows


class TestBackbone:
    @pytest.fixture
    def adapter(self, finished_run: Path) -> Path:
        return finished_run / "adapter" / "adapter_config.json"

    def rename(self, config: Path, name: str | None) -> None:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))

    def test_an_adapter_that_names_none_needs_one(self, adapter: Path) -> None:
        self.rename(adapter, None)
        with pytest.raises(AdapterError, match="does not name its base model; give it with --backbone"):
            predict_texts("run/adapter", ["a"], None, "cpu", max_new_tokens=2)
        assert len(predict_texts("run/adapter", ["a"], "tiny-llama", "cpu", max_new_tokens=2)) == 1

    def test_an_adapter_that_names_one_that_is_gone(self, adapter: Path) -> None:
        self.rename(adapter, "./gone")
        with pytest.raises(
            GraspError, match=r"'\./gone': there is no such folder.*\(adapter adapter names this .*--backbone"
        ):
            predict_texts("run/adapter", ["a"], None, "cpu", max_new_tokens=2)

    @pytest.mark.parametrize("written", [None, "../../tiny-llama"], ids=["today", "as if there was no link"])
    def test_of_a_run_behind_a_link_it_is_found_from_anywhere(
        self, written: str | None, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "disk/deep").mkdir(parents=True)
        Path("runs").symlink_to(tmp_path / "disk/deep")
        finished_run.rename("runs/tiny")
        recipe, _ = load_recipe("tiny.yaml", {"backbone.name": written or str(Path("tiny-llama").absolute())})
        Path("runs/tiny/recipe.yaml").write_text(recipe.to_yaml(Path("runs/tiny")), encoding="utf-8")
        monkeypatch.chdir(tmp_path)  # where no `tiny-llama` is
        for place in ["work/runs/tiny/adapter"] + ([] if written else ["disk/deep/tiny/adapter"]):
            assert len(predict_texts(place, ["a"], None, "cpu", max_new_tokens=2)) == 1
