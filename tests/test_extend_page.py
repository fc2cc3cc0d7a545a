"""The examples of docs/method/extend.md work as they stand there, and a recipe finds them by import path."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp_lora.errors import RecipeError
from grasp_lora.evaluation.metrics import score
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.merging import MergeSettings, merge
from grasp_lora.method.rules import Round, best_reward
from grasp_lora.method.search import RatioSearch
from grasp_lora.recipes.load import load_recipe

PAGE = Path(__file__).parent.parent / "docs" / "method" / "extend.md"
NAMED = (
    "merge.rule=mine:largest_wins",
    "controller.policy={kind: 'mine:Ladder', step: 0.1}",
    "metrics=[mine:first_letter]",
)


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """All names that the page defines."""
    names: dict[str, Any] = {"__name__": "extend"}
    exec(compile(_code(), str(PAGE), "exec"), names)
    return names


def _code() -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL))


def test_the_policy_moves_to_the_better_candidate(shown: dict[str, Any]) -> None:
    search = RatioSearch(shown["Ladder"](), best_reward)
    low, high = search.ask()
    assert low < search.current_ratio < high
    decision = search.tell(Round(search.current_ratio, (low, high), (1.0,), ((1.5,), (0.5,))))
    assert decision.committed
    assert search.current_ratio == high
    assert search.tell(Round(high, (low, high), (1.0,), ((2.0,), (3.0,)))).ratio == high


def test_the_merge_rule_gives_one_adapter_back_and_takes_the_largest_of_two(shown: dict[str, Any]) -> None:
    pairs = [LoraPair(torch.full((1, 2), value), torch.full((2, 1), value), 1.0) for value in (1.0, -3.0)]
    adapters = [AdapterWeights({"layer": pair}) for pair in pairs]
    alone = merge(adapters[:1], MergeSettings(rule=shown["largest_wins"], weights=(1.0,)))["layer"]
    torch.testing.assert_close(alone.delta(), pairs[0].delta())
    both = merge(adapters, MergeSettings(rule=shown["largest_wins"], weights=(1.0, 1.0)))["layer"]
    torch.testing.assert_close(both.delta(), pairs[1].delta())


def test_a_recipe_names_them_where_code_is_allowed(tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny_workspace / "mine.py").write_text(_code(), encoding="utf-8")
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    for setting in NAMED:
        with pytest.raises(RecipeError, match=r"names code, 'mine:\w+'; read it, then allow it with --allow-code"):
            load_recipe("tiny.yaml", [setting])
    recipe, _ = load_recipe("tiny.yaml", NAMED, allow_code=True)
    assert (type(recipe.controller.policy).__name__, recipe.controller.policy.step) == ("Ladder", 0.1)  # type: ignore[attr-defined]
    found = score(recipe.metrics, ["Paris", "Rome"], [["paris", "Pau"], ["Bern"]], "en")
    assert next(iter(found.values())).value == 50.0
    monkeypatch.delitem(sys.modules, "mine")
