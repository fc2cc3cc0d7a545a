"""The Gaussian process over ratio and time, on histories whose truth is known."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from grasp_lora.method.rules import Round, surrogate

LOW, HIGH = 0.1, 0.8
BEST = 0.5


def curve(ratio: float) -> float:
    """Falls gently and rises steeply, as pruning does; lowest at 0.5."""
    return 0.1 * (ratio - BEST) ** 2 if ratio < BEST else 2.0 * (ratio - BEST) ** 2


def overfitting(ratio: float, time: float) -> float:
    """Lowest early, where the level is; later the lowest ratio moves up."""
    return (time - 0.3) ** 2 + 0.5 * (ratio - 0.2 - time) ** 2


def rounds_of(
    loss: Callable[[float, float], float],
    ratios: list[tuple[float, ...]],
    *,
    noise: float = 0.0,
    shift: float = 0.0,
    examples: int = 8,
    seed: int = 0,
) -> list[Round]:
    """One round per tuple, evenly spaced in time; the first ratio is the current one. `shift` moves whole rounds."""
    draw = random.Random(seed)
    own = [draw.gauss(1, 0.5) for _ in range(examples)]
    told = []
    for number, (current, *candidates) in enumerate(ratios):
        time = number / max(1, len(ratios) - 1)
        moved = draw.gauss(0, shift)
        levels = [level + moved for level in own]

        def losses(ratio: float, time: float = time, levels: list[float] = levels) -> tuple[float, ...]:
            return tuple(level + loss(ratio, time) + draw.gauss(0, noise) for level in levels)

        told.append(Round(current, tuple(candidates), losses(current), tuple(map(losses, candidates))))
    return told


EVEN = [(0.45, 0.12 + shift, 0.35 + shift, 0.58 + shift) for shift in (0.0, 0.14, 0.07, 0.2, 0.1, 0.17)]


def test_it_finds_the_minimum_from_a_few_rounds() -> None:
    for seed in range(5):
        told = rounds_of(lambda ratio, time: curve(ratio), EVEN, noise=0.002, seed=seed)
        assert curve(surrogate(told, LOW, HIGH).ratio) < 0.002


def test_the_best_moment_of_the_run_decides_not_its_mean_or_its_end() -> None:
    told = rounds_of(overfitting, [(0.4, 0.12, 0.3, 0.5, 0.7)] * 7)
    # At time t the lowest ratio is 0.2 + t; the lowest moment of all is near t = 0.3.
    assert surrogate(told, LOW, HIGH).ratio == pytest.approx(0.5, abs=0.05)


def test_a_level_that_jumps_between_rounds_is_not_taken_for_the_ratio() -> None:
    told = rounds_of(lambda ratio, time: curve(ratio), EVEN, shift=3.0)
    assert curve(surrogate(told, LOW, HIGH).ratio) < 0.002


def test_a_lone_lucky_probe_at_the_edge_does_not_decide() -> None:
    crowded = [(0.4, 0.35 + 0.01 * number, 0.42, 0.45) for number in range(9)]
    told = rounds_of(lambda ratio, time: 0.2 * (ratio - 0.4) ** 2, crowded, noise=0.02)
    lucky = rounds_of(lambda ratio, time: -0.01 if ratio > 0.7 else 0.0, [(0.4, 0.39, 0.41, 0.75)], noise=0.02)
    assert surrogate(told + lucky, LOW, HIGH).ratio < 0.7


def test_the_interval_narrows_with_rounds_and_widens_where_examples_disagree() -> None:
    short, long = (rounds_of(lambda ratio, time: curve(ratio), EVEN[:2] * n, noise=0.01, seed=1) for n in (1, 6))
    widths = [one.high - one.low for one in (surrogate(told, LOW, HIGH) for told in (short, long))]
    assert widths[1] < widths[0]
    opposed = [
        Round(
            one.current_ratio,
            one.candidates,
            *(
                tuple(
                    tuple(loss + (0.4 * ratio if example % 2 else -0.4 * ratio) for example, loss in enumerate(losses))
                    for ratio, losses in zip(
                        (one.current_ratio, *one.candidates),
                        (one.baseline_losses, *one.candidate_losses),
                        strict=True,
                    )
                )[part]
                for part in (0, slice(1, None))
            ),
        )
        for one in long
    ]
    wide = surrogate(opposed, LOW, HIGH)
    assert wide.high - wide.low > widths[1]


def test_without_an_interval_the_ratio_is_the_same() -> None:
    told = rounds_of(lambda ratio, time: curve(ratio), EVEN, noise=0.01)
    bare, whole = surrogate(told, LOW, HIGH, interval=False), surrogate(told, LOW, HIGH)
    assert bare.ratio == bare.low == bare.high == whole.ratio
    assert whole.low <= whole.ratio <= whole.high
    assert bare.curve == ()
    assert min(fitted for _, fitted, _, _ in whole.curve) >= 0


@pytest.mark.parametrize("losses", [0.0, 1e-30, 1e12])
def test_equal_losses_are_no_reason_to_fail(losses: float) -> None:
    told = rounds_of(lambda ratio, time: losses, [(0.4, 0.4, 0.4)] * 3, examples=1)
    assert LOW <= surrogate(told, LOW, HIGH).ratio <= HIGH


def measured_on(told: list[Round], count: int) -> list[Round]:
    """The same rounds, had their candidates been measured on `count` examples in turn."""
    examples = len(told[0].baseline_losses)
    few = []
    for number, one in enumerate(told):
        places = tuple((number * count + place) % examples for place in range(count))
        losses = tuple(tuple(row[place] for place in places) for row in one.candidate_losses)
        few.append(replace(one, candidate_losses=losses, places=places))
    return few


def test_candidates_on_all_examples_in_turn_are_candidates_on_all() -> None:
    told = rounds_of(lambda ratio, time: curve(ratio), EVEN, noise=0.05, shift=0.1)
    whole, turned = surrogate(told, LOW, HIGH), surrogate(measured_on(told, 8), LOW, HIGH)
    assert turned.ratio == whole.ratio
    assert (turned.low, turned.high) == pytest.approx((whole.low, whole.high), abs=0.02)


def test_few_examples_do_when_examples_agree_whichever_they_are() -> None:
    """Examples differ in their level, not in what pruning does to them: their differences from the baseline count."""
    told = rounds_of(lambda ratio, time: curve(ratio), EVEN, noise=0.0, shift=0.1)
    whole = surrogate(told, LOW, HIGH, interval=False).ratio
    for count in (1, 3):
        assert surrogate(measured_on(told, count), LOW, HIGH, interval=False).ratio == pytest.approx(whole, abs=1e-9)


def test_fewer_examples_that_disagree_leave_more_open() -> None:
    widths = []
    for count in (24, 3):
        told = rounds_of(lambda ratio, time: curve(ratio), EVEN, noise=0.15, examples=24)
        estimate = surrogate(measured_on(told, count), LOW, HIGH)
        widths.append(estimate.high - estimate.low)
    assert widths[0] < widths[1]


@pytest.mark.parametrize("spread", [0.0, 1e-9])
@pytest.mark.parametrize("step", [1e3, 1e6])
def test_a_run_that_blows_up_gives_a_ratio_and_no_error_of_linear_algebra(spread: float, step: float) -> None:
    told = rounds_of(lambda ratio, time: spread * ratio + step * time**4, EVEN)
    estimate = surrogate(told, LOW, HIGH)
    assert LOW <= estimate.low <= estimate.ratio <= estimate.high <= HIGH
