"""Every shipped recipe loads, and dry-runs through the real command on a tiny model and tiny data of the same format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from grasp_lora.method.masks import MaskSettings
from grasp_lora.method.merging import MergeSettings
from grasp_lora.method.search import PaperPolicy, Rounds
from grasp_lora.models.model_settings import LoraSettings
from grasp_lora.recipes.load import builtin_recipes, load_recipe
from grasp_lora.training.training_settings import TrainingSettings

COUNTS = {"source": {"train": 6, "dev": 3}, "target": {"train": 6, "dev": 3, "micro_dev": 2, "test": 4}}
STAGES = ("source", "target", "controller", "final")
GROUPS = 24
RUN = (  # one of each pair of languages, whose recipes differ in names and files
    "llama3-8b-mlqa-zh", "llama3-8b-xlsum-ar", "mlqa-ar", "mlqa-xquad-zh", "nusax-su", "tydiqa-ko", "xlsum-zh",
)  # fmt: skip


def question_answering(language: str) -> list[dict[str, str]]:
    """Parallel questions as MLQA has them: ids are shared between languages."""
    title = f"{language} {{}}"
    return [
        {"id": f"q{i}", "title": title.format(i), "context": f"{title.format(i)}: it is {i % 7}.", "answer": str(i % 7)}
        | {"question": f"{language}?"}
        for i in range(GROUPS)
    ]


def news(language: str) -> list[dict[str, str]]:
    return [
        {"id": f"{language}-{i}", "url": f"https://example.org/{language}/{i}", "title": f"{language} {i}"}
        | {"text": f"{language} {i} long text {i % 5}", "summary": f"s{i % 5}"}
        for i in range(GROUPS)
    ]


def comments(language: str, name: str) -> str:
    """Labelled sentences as NusaX has them: ids are shared between languages, and each split has its own."""
    rows = [f"{name}{i},{language} {name} {i},{('negative', 'neutral', 'positive')[i % 3]}" for i in range(GROUPS)]
    return "\n".join(["id,text,label", *rows]) + "\n"


def as_squad(rows: list[dict[str, str]]) -> dict[str, Any]:
    data = []
    for row in rows:
        answer = {"text": row["answer"], "answer_start": row["context"].index(row["answer"])}
        questions = [{"id": row["id"], "question": row["question"], "answers": [answer]}]
        data.append({"title": row["title"], "paragraphs": [{"context": row["context"], "qas": questions}]})
    return {"version": "1", "data": data}


def hub_rows(name: str, config: str | None, **options: Any) -> datasets.Dataset:
    """Stand in for `datasets.load_dataset`: rows in the schema of the data set."""
    languages = {"english": "en", "arabic": "ar", "chinese_simplified": "zh"}
    language = languages.get(str(config), str(config).split(".")[-1])
    if name == "csebuetnlp/xlsum":
        return datasets.Dataset.from_list(news(language))
    assert name == "facebook/mlqa", f"there is no stand-in for {name}"
    rows = [
        {key: row[key] for key in ("id", "title", "context", "question")}
        | {"answers": {"text": [row["answer"]], "answer_start": [row["context"].index(row["answer"])]}}
        for row in question_answering(language)
    ]
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def arguments(
    tmp_path: Path, tiny_backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[str]]:
    """Give the `--set` options that put a tiny model and data in place of a recipe's, and cut it short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRASP_LORA_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", hub_rows)

    def settings(name: str) -> list[str]:
        recipe, _ = load_recipe(name)
        changes = [f"backbone.name={tiny_backbone_folder}", "backbone.dtype=float32", "generation.max_new_tokens=4"]
        for role, counts in COUNTS.items():
            corpus = getattr(recipe.data, role)
            if corpus is None:  # english-qa, which is no adapter of the tiny model
                Path("demo").mkdir(exist_ok=True)
                Path("demo/en.json").write_text(json.dumps(as_squad(question_answering("en"))), encoding="utf-8")
                rows = {"language": "en", "files": ["demo/en.json"], **counts}
                changes += ["source.adapters=[]", f"data.source={json.dumps(rows)}"]
                continue
            changes += [f"data.{role}.{split}={count}" for split, count in counts.items()]
            if recipe.data.task == "classification":
                for file in corpus.all_files:
                    Path(file).parent.mkdir(exist_ok=True)
                    name = Path(file).stem.rpartition("-")[2]
                    Path(file).write_text(comments(corpus.language, name), encoding="utf-8")
                continue
            files = []
            for number, file in enumerate(corpus.files.get("pool", ())):
                rows = news(f"{corpus.language}{number}")
                if recipe.data.task == "summarization":
                    content = "".join(json.dumps(row) + "\n" for row in rows)
                else:
                    content = json.dumps(as_squad(question_answering(corpus.language)))
                place = Path(file.replace("demo:", "demo/"))
                place.parent.mkdir(exist_ok=True)
                place.write_text(content, encoding="utf-8")
                files.append(str(place))
            if files:
                changes.append(f"data.{role}.files={json.dumps(files)}")
        for stage in STAGES:
            training = getattr(recipe, stage).training
            changes.append(f"{stage}.training.epochs={2 if training.accumulation == 1 else 1}")
        changes.append("controller.rounds.every=3")
        return [part for change in changes for part in ("--set", change)]

    return settings


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_shipped_recipe_is_named_as_its_file_and_runs_rounds_each_epoch(name):
    recipe, base = load_recipe(name)
    assert (recipe.name, base) == (name, Path())
    if name.startswith("llama3"):  # the paper's
        return
    if name.startswith("demo"):  # no dev set: rounds on micro-dev rows, before training and up to its last step
        assert recipe.controller.round_steps(48) == [0, 32, 64, 96]
        assert (recipe.controller.rounds.pool, recipe.controller.rule) == ("micro_dev", "surrogate_at_end")
        return
    stage, train = recipe.controller, recipe.data.target.train
    epoch = stage.training.steps_per_epoch(train)
    assert stage.round_steps(train) == [number * epoch for number in range(round(stage.training.epochs) + 1)]
    assert (stage.rounds.patience, stage.rounds.in_turn) == (1, 7)
    assert stage.rounds.pool == "dev"


@pytest.mark.parametrize(("name", "tokens"), [("mlqa-ar", 64), ("mlqa-zh", 64), ("xlsum-ar", 128), ("xlsum-zh", 96)])
def test_the_papers_recipes_are_as_the_released_code_runs(name, tokens):
    recipe, _ = load_recipe(f"llama3-8b-{name}")
    for stage, accumulation, patience in (("source", 8, 4), ("target", 8, 4), ("controller", 1, 3), ("final", 8, 3)):
        assert getattr(recipe, stage).training == TrainingSettings(
            10, 1, accumulation, 1e-4, 0.85, max_grad_norm=0.0, patience=patience
        )
    assert recipe.lora == LoraSettings(8, 32.0, 0.05, ("q_proj", "v_proj"))
    assert recipe.merge == MergeSettings("paper_apart", dropout=0.0)
    assert recipe.mask == MaskSettings("magnitude")
    assert (recipe.controller.policy, recipe.controller.rounds) == (PaperPolicy(), Rounds(10))
    assert recipe.controller.rule == "best_reward"
    assert (recipe.final.mode, recipe.final.mask_of(recipe.mask)) == ("reselect", MaskSettings("gradient_of_delta"))
    assert (recipe.generation.max_new_tokens, recipe.generation.stop) == (tokens, ())


@pytest.mark.parametrize("name", RUN)
def test_a_shipped_recipe_can_be_checked_and_run(name, arguments, cli, tmp_path):
    settings = arguments(name)
    checked = cli("check", name, *settings)
    assert checked.status == 0, checked.err
    assert "source_train 6, source_dev 3, train 6, dev 3, micro_dev 2, test 4" in checked.out
    stage = load_recipe(name)[0].controller
    rounds = 4 + stage.rounds.at_ends  # one before the first step
    most = "" if stage.rounds.patience is None and stage.training.patience is None else "at most "
    assert f"controller will run {most}{rounds} rounds" in checked.out
    result = cli("run", name, *settings)
    assert result.status == 0, result.err
    folder = tmp_path / "runs" / name
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    paper = name.startswith("llama3")  # whose result is handed over in any case
    rival = "target" if paper else "continued"  # the others train it on the source
    rivals = {rival, "unpruned"} if paper else {rival}
    assert set(metrics["systems"]) - {"averaged"} == {"zero_shot", "source", "merged", "grasp", *rivals}
    assert not (paper and "averaged" in metrics["systems"])
    assert (metrics["delivered"]["name"] == "grasp") or not paper
    assert 0.1 <= metrics["prune_ratio"] <= 0.8
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "report.html").is_file()
