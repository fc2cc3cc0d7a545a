"""The embedded texts: enough of them, well formed, in the right script, and fit for the demo's splits."""

import json
from importlib import resources
from itertools import combinations
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from grasp_lora.data.splits import SPLITS, build_splits
from grasp_lora.recipes.load import load_recipe

FEWEST = {"en": 150, "ar": 200, "zh": 200}
LANGUAGES = tuple(FEWEST)


def load(language: str) -> list[dict[str, Any]]:
    text = (resources.files("grasp_lora.demo") / "texts" / f"{language}.json").read_text(encoding="utf-8")
    articles: list[dict[str, Any]] = json.loads(text)["data"]
    return articles


def passages(language: str) -> list[dict[str, Any]]:
    return [paragraph for article in load(language) for paragraph in article["paragraphs"]]


def questions(language: str) -> list[tuple[str, dict[str, Any]]]:
    """Each question with its passage."""
    return [(passage["context"], question) for passage in passages(language) for question in passage["qas"]]


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_answer_stands_in_its_passage_once_where_it_says(language: str) -> None:
    for passage, question in questions(language):
        assert len(question["answers"]) == 1
        answer = question["answers"][0]
        assert answer["text"] == answer["text"].strip() != ""
        assert passage.count(answer["text"]) == 1, question["id"]
        assert passage.index(answer["text"]) == answer["answer_start"], question["id"]


@pytest.mark.parametrize("language", ["ar", "zh"])
def test_the_splits_of_the_demo_share_no_passage(language: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    recipe, base = load_recipe(f"demo-{language}", ["data.max_tokens=4096"])  # one token a byte
    splits = build_splits(recipe.data, tiny_tokenizer, recipe.seed, base)
    sizes = {name: len(getattr(splits, name)) for name in SPLITS}
    target = recipe.data.target
    assert recipe.source.adapters == ("english-qa",)
    assert sizes == {
        "source_train": 0,
        "source_dev": 0,
        "train": target.train,
        "dev": target.dev,
        "micro_dev": target.micro_dev,
        "test": target.test,
    }
    context_of = {question["id"]: passage for code in LANGUAGES for passage, question in questions(code)}
    used = {name: {context_of[example.id] for example in getattr(splits, name)} for name in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert used[one] & used[other] == set(), f"{one} and {other}"
