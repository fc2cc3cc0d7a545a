"""The settings of the lab on the real files: nothing that is held out stands in training data, by a count of its own."""

import json
import os
from pathlib import Path

import pytest

from grasp_lora.data.splits import HELD_OUT, build_splits
from grasp_lora.recipes.load import load_recipe

ROOT = Path(os.environ.get("GRASP_LORA_DATA", ""))
SETTINGS = {"mlqa-xquad-ar": 1400, "mlqa-xquad-zh": 1400, "tydiqa-sw": 1000, "tydiqa-ko": 1000}

pytestmark = pytest.mark.skipif(
    not os.environ.get("GRASP_LORA_DATA") or not (ROOT / "xquad").is_dir(), reason="GRASP_LORA_DATA has no XQuAD"
)


def written_one_way(text: str) -> str:
    return " ".join(text.replace("_", " ").casefold().split())


def questions(file: str) -> dict[str, tuple[str, str]]:
    """Title and context of each question of a SQuAD file, by id."""
    articles = json.loads((ROOT / file).read_text(encoding="utf-8"))["data"]
    return {
        question["id"]: (written_one_way(article["title"]), written_one_way(paragraph["context"]))
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_held_out_questions_share_no_id_context_or_article_with_training_data(name, tiny_tokenizer):
    recipe, _ = load_recipe(name, [f"data.root={ROOT}", "data.max_tokens=100000"])  # bytes, so that nothing is left out
    splits, target, source = (
        build_splits(recipe.data, tiny_tokenizer, recipe.seed),
        recipe.data.target,
        recipe.data.source,
    )
    places = {id: place for file in target.all_files for id, place in questions(file).items()}
    held_out = [one for part in HELD_OUT for one in getattr(splits, part)]
    assert len(splits.test) >= SETTINGS[name]
    assert len(splits.train) == 50
    for part, others in {"train": held_out, "dev": [*splits.test, *splits.micro_dev], "micro_dev": splits.test}.items():
        for kind in (0, 1):
            ours = {places[one.id][kind] for one in getattr(splits, part)}
            assert not ours & {places[one.id][kind] for one in others}, (part, kind)
        assert not {one.id for one in getattr(splits, part)} & {one.id for one in others}
    english = {id: place for file in source.all_files for id, place in questions(file).items()}
    taught = [english[one.id] for one in (*splits.source_train, *splits.source_dev)]
    ids = {one.id for one in held_out}
    barred = [english[id] for id in ids & set(english)]  # the English side of what is held out
    if "test" in target.files:
        assert len(barred) > 200
        assert splits.report.source.excluded_for_leak > 400
        assert {one.id for one in splits.test} >= set(questions(target.files["test"][0]))
        assert {one.id for one in (*splits.train, *splits.dev, *splits.micro_dev)} <= set(
            questions(target.files["pool"][0])
        )
        barred += questions("xquad/xquad.en.json").values()
    for kind in (0, 1):
        assert not {place[kind] for place in taught} & {place[kind] for place in barred}
