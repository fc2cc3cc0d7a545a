"""The model card: what the hub and a stranger read of an adapter, and that its lines of Python answer as `predict` does."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from made_runs import (  # noqa: F401
    compared_anew,
    fixture_run,
    fixture_whole_run,
    with_delivered,
    with_discarded,
    with_estimate,
    with_info,
    with_metrics,
    with_recipe,
    with_report,
)  # fmt: skip

from grasp_lora.engine.run_folder import GivenAdapter, Parent, Run
from grasp_lora.report.card import write_model_card


@pytest.fixture
def folder(whole_run: tuple[Run, Path]) -> Path:
    """Of the run: its adapters are named with their hashes."""
    return whole_run[1]


def card(record: Run, folder: Path, place: Path) -> str:
    return write_model_card(compared_anew(record), folder, place).read_text(encoding="utf-8").replace("\u00a0", " ")


def snippet_of(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


def test_the_card_says_what_the_adapter_is_and_holds_no_path(run: Run, folder: Path, tmp_path: Path) -> None:
    asked = "السياق: {context}\nالسؤال: {question}\nالإجابة:"
    source, target = (str(folder / "data" / f"xquad.{code}.json") for code in ("en", "ar"))
    corpora = {"source": {"language": "en", "files": [source]}, "target": {"language": "ar", "files": [target]}}
    run = with_report(with_recipe(run, data={"task": "qa"} | corpora), prompt=asked)
    backbone = Parent("google/gemma-3-270m", "sha256:9d20aa41", "9b0cfec892e2")
    text = card(with_info(run, backbone=backbone), folder, tmp_path)
    _, front, body = text.split("---\n", 2)
    facts = yaml.safe_load(front)
    [result] = facts.pop("model-index")[0]["results"]
    assert facts == {
        "library_name": "peft",
        "base_model": "google/gemma-3-270m",
        "tags": ["lora", "grasp-lora", "adapter-merging", "pruning", "cross-lingual-transfer"],
        "pipeline_tag": "text-generation",
        "language": ["ar", "en"],
    }
    assert {row["type"]: row["value"] for row in result["metrics"]} == {"loss": 0.857, "f1": 43.2, "exact_match": 26.0}
    assert result["dataset"]["args"] == {"test_rows": 8}
    for private in (str(folder), str(folder.parent), str(Path.home()) + "/"):
        assert private not in text
    assert "xquad.en.json, xquad.ar.json" in body
    assert body.count("sha256:") == 3  # backbone, two parents
    assert 'from_pretrained(base, revision="9b0cfec892e2", dtype="float32")' in snippet_of(body)
    compile(snippet_of(body), "card", "exec")
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])["data"]["target"]["files"]["pool"] == [
        "xquad.ar.json"
    ]
    assert "| GRASP, handed over | **43.2** | **26.0** | **0.857** | **0.822** |" in body
    prompt = "".join(f"    {line}\n" for line in asked.split("\n"))
    assert "It was measured on prompts of this form:\n\n" + prompt in body
    assert body.rstrip().endswith("`hf upload ORG/NAME adapter --private`")


@pytest.mark.parametrize(
    ("name", "given", "parents", "sides"),
    [
        ("averaged", 0, ["source", "target"], ["source", "target"]),
        ("grasp", 2, ["first", "second", "target"], ["target"]),
        ("grasp", 3, ["first", "second", "third"], ["target"]),
    ],
)
def test_the_card_names_what_the_adapter_was_made_of_and_trained_on_alone(
    run: Run, folder: Path, tmp_path: Path, name: str, given: int, parents: list[str], sides: list[str]
) -> None:
    """Of three given adapters the third is the target's."""
    run = with_info(
        run, parents=tuple(GivenAdapter(f"owner/{each}", each, each) for each in ("first", "second", "third")[:given])
    )
    codes = {"source": "en", "target": "de"}
    corpora = {side: {"language": code, "hub": f"owner/{code}", "files": []} for side, code in codes.items()}
    run = with_recipe(run, data=corpora, source={"adapters": ["owner/first", "owner/second"] if given else []})
    more = dict.fromkeys(["averaged", *["source_2"] * bool(given)], run.metrics.systems["source"])
    systems = {**run.metrics.systems, **more}
    predictions = dict.fromkeys(systems, run.predictions["source"])
    run = with_metrics(with_delivered(replace(run, predictions=predictions), name=name), systems=systems)
    text = card(run, folder, tmp_path)
    front, body = ModelCard(text).data.to_dict(), text.split("## Made of")[1].split("## Scores")[0]
    rows = re.findall(r"\| (?:Given|Source|Target) adapter \| (?:owner/|the run's folder )(\w+) \|", body)
    assert sorted(rows) == sorted(parents)
    assert sorted(front.get("language", [])) == sorted(codes[side] for side in sides)
    assert sorted(front.get("datasets", [])) == sorted(f"owner/{codes[side]}" for side in sides)
    facts = {"source": ("owner/en", "source train 12"), "target": ("owner/de", " train 10")}
    for side, words in facts.items():
        for word in words:
            assert (word in body) == (side in sides), word


MERGED = "a source and a target adapter were merged"
CONTINUED = "a source adapter was trained further on the target rows"
ON_SOURCE = "a target adapter was trained on top of a source adapter and added to it"


@pytest.mark.parametrize(
    ("name", "ratio", "discarded", "made"),
    [
        ("averaged", 0.4, "", f"{CONTINUED}, and the mean of it and of GRASP's result was taken"),
        ("averaged", 0.4, "final", f"{CONTINUED}, and the mean of it and of GRASP's result was taken"),
        ("grasp", 0.4, "", f"{MERGED}, a share of that was pruned, and the rest was fine-tuned"),
        ("grasp", 0.4, "final", f"{MERGED}, a share of that was pruned, and the fine-tuning was discarded"),
        ("grasp", 0.0, "", f"{MERGED}, nothing was pruned, and the whole was fine-tuned"),
        ("grasp", 0.0, "final", f"{MERGED}, nothing was pruned, and the fine-tuning was discarded"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("on_source", [False, True])
def test_every_sentence_of_the_card_is_true_of_what_is_handed_over(
    run: Run, folder: Path, tmp_path: Path, name: str, ratio: float, discarded: str, made: str, on_source: bool,
) -> None:  # fmt: skip
    run = with_recipe(with_discarded(run, *filter(None, [discarded])), final={"deliver": "best"})
    run = with_estimate(with_recipe(run, target={"on": "source" if on_source else None}), ratio=ratio)
    systems = {**run.metrics.systems, "averaged": run.metrics.systems["source"]}
    run = replace(run, predictions=dict.fromkeys(systems, run.predictions["source"]))
    run = with_metrics(with_delivered(run, name=name, title="this one"), systems=systems)
    text = card(run, folder, tmp_path)
    first = text.split("\n# ")[1].split("\n")[2]
    assert first.partition("2601.06702): ")[2] == f"{made.replace(MERGED, ON_SOURCE) if on_source else made}."
    gone = bool(discarded)
    assert text.count("no step lowered the dev loss, so this training was discarded") == gone
    assert ("It is: this one, not trained further (no step lowered the dev loss)." in text) == (
        gone and name == "grasp"
    )
    assert ("Prune ratio: " in text) == (name == "grasp")
    assert not re.search(r"[Ii]t was (trained and|made|pruned)|trained on (prompts|the weights|a model)", text)
    assert ModelCard(text).data.to_dict()["language"] == ["de", "en"]


def test_the_prompt_of_the_card_has_the_braces_that_training_saw(run: Run, folder: Path, tmp_path: Path) -> None:
    text = card(with_report(run, prompt="Put it into \\boxed{{}} and {{name}}: {question}"), folder, tmp_path)
    assert r'prompt = "Put it into \\boxed{} and {name}: ..."' in snippet_of(text)


def test_the_snippet_of_the_card_answers(
    run: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Path(shutil.copytree(folder / "adapter", tmp_path / "adapter"))
    (adapter / "tiny-llama").symlink_to((folder.parent / "tiny-llama").resolve(), target_is_directory=True)
    code = snippet_of(card(run, folder, adapter))
    assert 'prompt = "..."' in code
    monkeypatch.chdir(adapter)
    exec(code.replace("...", run.prompts[0]), {})
    assert capsys.readouterr().out.strip() == run.predictions["grasp"][0].prediction.strip() != ""


def test_the_snippet_of_a_chat_goes_through_the_chat_template(run: Run, folder: Path, tmp_path: Path) -> None:
    assert "eos_token_id" not in snippet_of(card(run, folder, tmp_path))
    run = with_report(run, chat_template=True, end_of_turn="<|im_end|>")
    run = with_recipe(run, generation={"stop": ["\n", '"```'], "max_new_tokens": 9})
    code = card(run, folder, tmp_path).split("```python\n")[1].split("\n```\n")[0]
    compile(code, "card", "exec")
    assert "tokenizer.apply_chat_template(turns, add_generation_prompt=True" in code
    assert "max_new_tokens=9" in code
    assert 'ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]' in code
    assert "do_sample=False, eos_token_id=ends)" in code
    assert 'print(answer.split("\\n")[0].split("\\"```")[0])' in code


def test_what_the_hub_reads_of_a_card(run: Run, folder: Path, tmp_path: Path) -> None:
    """Local names would be taken for those of the hub; what is of the hub stands with its licence, where that is known."""
    text = card(run, folder, tmp_path)
    assert not {"base_model", "license"} & ModelCard(text).data.to_dict().keys()
    assert "Put the path of your copy in the place of its name" in text
    backbone = replace(run.info.backbone, name="google/gemma-3-270m (Q4_K_M GGUF)")
    run = with_recipe(
        with_info(run, backbone=backbone), data={"target": {"hub": "facebook/mlqa", "files": [], "language": "ar"}}
    )
    text = card(run, folder, tmp_path)
    front = ModelCard(text).data.to_dict()
    assert (front["base_model"], front["license"], front["datasets"]) == (
        "google/gemma-3-270m", "gemma", ["facebook/mlqa"],
    )  # fmt: skip
    assert {result.dataset_name for result in ModelCard(text).data.eval_results} == {"facebook/mlqa, 8 test rows"}
    assert "base = str(embedded_folder())" in snippet_of(text)


@pytest.mark.parametrize(
    ("system", "ratio", "language", "tags"),
    [
        ("continued", 0.0, "ar", ["cross-lingual-transfer"]),
        ("averaged", 0.0, "ar", ["adapter-merging", "cross-lingual-transfer"]),
        ("grasp", 0.4, "en", ["adapter-merging", "pruning"]),
    ],
)
def test_the_tags_say_what_was_done(
    run: Run, folder: Path, tmp_path: Path, system: str, ratio: float, language: str, tags: list[str]
) -> None:
    run = with_recipe(run, data={"source": {"language": "en"}, "target": {"language": language}})
    run = with_metrics(with_delivered(run, name=system), prune_ratio=ratio)
    run = with_metrics(run, systems=run.metrics.systems | {system: run.metrics.systems["grasp"]})
    run = replace(run, predictions=run.predictions | {system: run.predictions["grasp"]})
    front = card(run, folder, tmp_path).split("---\n", 2)[1]
    assert yaml.safe_load(front)["tags"] == ["lora", "grasp-lora", *tags]


def test_the_recipe_in_the_card_stays_in_its_block_and_names_no_place(run: Run, folder: Path, tmp_path: Path) -> None:
    prompt, files = "\n````\n<b> /x/y \u202e {prompt}", [r"C:\Users\me\a.json", "/home/me/b.json", "../../c/d.json"]
    data: dict[str, Any] = {"root": "../a/root", "target": {"files": files}, "prompt": prompt}
    run = with_report(with_recipe(run, data=data, backbone={"name": "/models/of/me"}), prompt=prompt)
    text = card(run, folder, tmp_path)
    for private in ("Users", "../a", "/home/me", "../c", "/models", "\u202e"):
        assert private not in text
    recipe = yaml.safe_load(text.split("`````yaml\n")[1].split("\n`````\n")[0])
    assert recipe["data"]["prompt"].startswith("\n````\n<b> /x/y ")
    assert recipe["data"]["target"]["files"]["pool"] == ["a.json", "b.json", "d.json"]
    assert recipe["backbone"]["name"] == "me"


@pytest.mark.parametrize("name", ["/home/someone/models/llama", r"C:\Users\me\llama", "~/models/llama/", "../llama"])
def test_the_card_names_a_backbone_as_others_know_it(run: Run, folder: Path, tmp_path: Path, name: str) -> None:
    text = card(with_info(run, backbone=replace(run.info.backbone, name=name)), folder, tmp_path)
    assert 'base = "llama"' in text
    assert name not in text
