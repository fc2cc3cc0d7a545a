"""The examples of docs/method/extend.md work as they stand there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp_lora.method.importance import score_pair
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.merging import MergeSettings, merge
from grasp_lora.method.rounds import Round
from grasp_lora.method.search import RatioSearch

PAGE = Path(__file__).parent.parent / "docs" / "method" / "extend.md"


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """All names that the page defines."""
    names: dict[str, Any] = {"__name__": "extend"}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_policy_moves_to_the_better_candidate(shown: dict[str, Any]) -> None:
    search = RatioSearch(shown["Ladder"](), shown["last"])
    low, high = search.ask()
    assert low < search.current_ratio < high
    decision = search.tell(Round(search.current_ratio, (low, high), (1.0,), ((1.5,), (0.5,))))
    assert decision.committed
    assert search.current_ratio == high
    assert search.tell_rewards((low, high), (-1.0, -2.0)).ratio == high


def test_the_rule_reads_the_last_round(shown: dict[str, Any]) -> None:
    search = RatioSearch(shown["Ladder"](), shown["last"])
    search.tell_rewards((0.35, 0.45), (0.0, 0.1))
    search.tell_rewards((0.40, 0.50), (0.0, -0.1))
    assert search.best_ratio().ratio == pytest.approx(0.45)


def test_the_merge_rule_gives_one_adapter_back_and_takes_the_largest_of_two(shown: dict[str, Any]) -> None:
    pairs = [LoraPair(torch.full((1, 2), value), torch.full((2, 1), value), 1.0) for value in (1.0, -3.0)]
    adapters = [AdapterWeights({"layer": pair}) for pair in pairs]
    alone = merge(adapters[:1], MergeSettings(rule=shown["largest_wins"], weights=(1.0,)))["layer"]
    torch.testing.assert_close(alone.delta(), pairs[0].delta())
    both = merge(adapters, MergeSettings(rule=shown["largest_wins"], weights=(1.0, 1.0)))["layer"]
    torch.testing.assert_close(both.delta(), pairs[1].delta())


def test_the_score_ranks_weights_as_their_magnitude_does(shown: dict[str, Any]) -> None:
    pair = LoraPair(torch.tensor([[0.5, -2.0]]), torch.tensor([[1.0], [-3.0]]), 1.0)
    A, B = score_pair(pair, shown["squared"])
    assert A.tolist() == [[0.25, 4.0]]
    assert B.tolist() == [[1.0], [9.0]]
