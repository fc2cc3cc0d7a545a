"""Presets, when their rounds come, and the rules' names."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from grasp_lora.method.rules import Round
from grasp_lora.method.search import PRESETS, Controller, Gaussian, RatioSearch, Rounds, Spread, preset, ratio_rule


def quadratic(ratio: float) -> float:
    return (ratio - 0.55) ** 2


def run(search: RatioSearch, rounds: int, loss: Callable[[float], float] = quadratic) -> list[Round]:
    told = []
    for _ in range(rounds):
        candidates = tuple(search.ask())
        losses = [(loss(ratio), 1 + loss(ratio)) for ratio in (search.current_ratio, *candidates)]
        told.append(Round(search.current_ratio, candidates, losses[0], tuple(losses[1:])))
        search.tell(told[-1])
    return told


def late(**changes: Any) -> RatioSearch:
    chosen = preset("late")
    return RatioSearch(replace(chosen.policy, **changes), ratio_rule(chosen.rule))


@pytest.mark.parametrize(
    ("before", "start", "followed"),
    [
        (False, 0.0, [3, 6, 9]),
        (True, 0.0, [0, 3, 6, 9]),
        (False, 0.5, [6, 9, 10]),
        (False, 1.0, [10]),
        (False, 0.9, [9, 10]),
    ],
)
def test_which_steps_a_round_follows(before: bool, start: float, followed: list[int]) -> None:
    assert Rounds(every=3, start=start, before_training=before).round_steps(10, 3) == followed


def test_spacing_turns_and_splits() -> None:
    assert (Rounds(every="epoch").spacing(7), Rounds(every=4).spacing(7)) == (7, 4)
    assert [Rounds(in_turn=5).turn(pool) for pool in (4, 5, 6)] == [None, None, 5]
    assert Rounds().turn(6) is None
    assert [Rounds(pool=pool).splits for pool in ("dev", "both")] == [("dev",), ("micro_dev", "dev")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0}, "every is 0; it must be at least 1 optimizer step, a whole number, or 'epoch'"),
        ({"every": True}, "every is True"),
        ({"every": "week"}, "every is 'week'"),
        ({"start": -0.1}, r"start is -0.1; it must be a share of the run, in \[0, 1\]"),
        ({"start": math.nan}, "start is nan"),
        (
            {"start": 0.5, "before_training": True},
            "before_training is True; it must be false where start is 0.5, or start 0",
        ),
        ({"pool": "test"}, "pool is 'test'; allowed: micro_dev, dev, both"),
        ({"in_turn": 0}, "in_turn is 0; it must be at least 1 example, a whole number, or null for all"),
        ({"patience": 0}, "patience is 0; it must be at least 1 round, a whole number, or null"),
    ],
)
def test_rounds_out_of_range_are_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rounds(**changes)


def test_presets_are_policy_rounds_and_rule() -> None:
    assert set(PRESETS) == {"spread", "late", "paper"}
    assert preset("spread") == Controller()
    assert Controller() == Controller(
        Spread(candidates=2), Rounds("epoch", before_training=True, pool="dev", in_turn=12, patience=1), "surrogate"
    )
    assert preset("late") == Controller(Spread(candidates=3, bounds_first=True), Rounds(start=0.5), "smooth_fit")
    assert preset("paper") == Controller(Gaussian(), Rounds(), "best_reward")


def test_a_preset_that_is_none() -> None:
    with pytest.raises(ValueError, match="preset is 'fast'; allowed: spread, late, paper"):
        preset("fast")


def test_a_rule_is_named_or_given() -> None:
    rule = ratio_rule("smooth_fit")
    assert ratio_rule(rule) is rule
    assert ratio_rule("grasp_lora.method.rules:smooth_fit") is rule
    with pytest.raises(ValueError, match="rule is 'mean'; allowed: surrogate, smooth_fit, best_reward"):
        Controller(rule="mean")


@pytest.mark.parametrize(
    ("changes", "pool", "examples"),
    [
        ({"rounds": Rounds(), "rule": "smooth_fit"}, 16, 16 + 2 * 16),
        ({"rounds": Rounds(in_turn=12), "rule": "smooth_fit"}, 50, 12 + 2 * 12),
        ({"rounds": Rounds(in_turn=12), "rule": "surrogate"}, 50, 50 + 2 * 12),
        ({"rounds": Rounds(in_turn=12, patience=1), "rule": "smooth_fit"}, 50, 50 + 2 * 12),
    ],
)
def test_a_baseline_needs_all_examples_where_rounds_are_compared(
    changes: dict[str, Any], pool: int, examples: int
) -> None:
    assert Controller(**changes).probed_examples(pool) == examples


def test_the_late_preset_probes_the_second_half_all_over_the_range() -> None:
    assert preset("late").rounds.round_steps(50, 12) == [36, 48, 50]
    search = late()
    candidates = [ratio for told in run(search, 3) for ratio in told.candidates]
    assert len(set(candidates)) == 9
    assert candidates[:3] == pytest.approx([0.1, 0.45, 0.8])
    assert quadratic(search.best_ratio().ratio) < 0.002


@pytest.mark.parametrize(("slope", "bound"), [(-1.0, 0.8), (1.0, 0.1)])
@pytest.mark.parametrize("seed", range(5))
def test_the_late_preset_can_choose_its_bounds(slope: float, bound: float, seed: int) -> None:
    search = late(seed=seed)
    run(search, 3, lambda ratio: slope * ratio)
    assert search.best_ratio().ratio == bound
