"""The rules that turn rounds into one ratio, on histories whose truth is known."""

import math
import random
from collections.abc import Callable

import pytest
import torch

from grasp_lora.method.rules import RatioEstimate, Round, Rule, best_reward
from grasp_lora.method.search import RULES
from grasp_lora.method.surrogate import RATIOS, settle, surrogate, surrogate_at_end

LOW, HIGH = 0.1, 0.8
GRID_STEP = (HIGH - LOW) / (RATIOS - 1)
Curve = Callable[[float], float]


def quadratic(ratio: float) -> float:
    return (ratio - 0.55) ** 2


def asymmetric(ratio: float) -> float:
    """Falls slowly and rises steeply, as pruning does; minimum at ASYMMETRIC_MINIMUM."""
    return 0.02 * math.exp(10 * (ratio - 0.6)) - 0.15 * ratio


ASYMMETRIC_MINIMUM = 0.6 + math.log(0.15 / 0.2) / 10
both_readings = pytest.mark.parametrize("rule", [surrogate, surrogate_at_end], ids=lambda rule: rule.name)


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


def history(
    curve: Curve, rounds: int, *, noise: float = 0.02, seed: int = 0, examples: int = 16, candidates: int = 3
) -> list[Round]:
    """Rounds at random ratios, whose level moves a lot."""
    draw = random.Random(seed)
    ratios = [(0.4, *(draw.uniform(LOW, HIGH) for _ in range(candidates))) for _ in range(rounds)]
    return rounds_of(lambda ratio, time: curve(ratio), ratios, noise=noise, shift=1.0, examples=examples, seed=seed)


def in_turn(told: list[Round], count: int, baseline_on_all: bool = True) -> list[Round]:
    """The same rounds, had their candidates been measured on `count` examples in turn, and the baseline on all or on those.

    Each round begins three examples after the one before.
    """
    examples = len(told[0].baseline_losses)
    few = []
    for number, one in enumerate(told):
        places = tuple((3 * number + place) % examples for place in range(count))
        alone, *losses = (tuple(row[place] for place in places) for row in one.common_losses)
        baseline = one.baseline_losses if baseline_on_all else alone
        few.append(Round(one.current_ratio, one.candidates, baseline, tuple(losses), places))
    return few


@pytest.mark.parametrize("candidates", [1, 3])
def test_one_round_is_enough_and_none_is_too_few(candidates):
    rounds = history(quadratic, 1, candidates=candidates)
    for rule in RULES.values():
        with pytest.raises(ValueError, match="no round was measured yet"):
            rule([], LOW, HIGH)
        estimate = rule(rounds, LOW, HIGH)
        assert LOW <= estimate.low <= estimate.ratio <= estimate.high <= HIGH
        assert estimate.rounds == 1


def test_candidates_that_all_coincide_give_that_ratio_and_nothing_is_learned():
    estimate = best_reward([Round(0.4, (0.4, 0.4), (1.0, 2.0), ((1.1, 2.0), (0.9, 2.1)))] * 3, LOW, HIGH)
    assert (estimate.low, estimate.ratio, estimate.high) == (LOW, 0.4, HIGH)


@pytest.mark.parametrize("elsewhere", [0, 3])
def test_an_interval_holds_its_ratio_wherever_resampling_goes(elsewhere):
    grid = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    fitted = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    resampled = torch.ones(50, 4, dtype=torch.float64)
    resampled[:, elsewhere] = 0.0
    estimate = settle("surrogate", grid, 5, fitted, resampled)
    assert estimate.ratio == 0.4
    assert (estimate.low, estimate.high) == (min(0.4, float(grid[elsewhere])), max(0.4, float(grid[elsewhere])))


def test_best_reward_takes_the_luckiest_probe():
    rounds = [
        Round(0.4, (0.2, 0.5), (1.0, 1.0), ((0.9, 0.9), (0.8, 0.8))),  # best reward 0.2 at 0.5
        Round(0.5, (0.7, 0.3), (5.0, 5.0), ((4.0, 5.0), (4.9, 4.9))),  # best reward 0.5 at 0.7
        Round(0.6, (0.6, 0.8), (0.1, 0.1), ((0.0, 0.0), (0.3, 0.3))),  # lowest loss, but reward 0.1
    ]
    estimate = best_reward(rounds, LOW, HIGH)
    assert estimate.ratio == 0.7
    assert (estimate.rule, estimate.rounds, estimate.curve) == ("best_reward", 3, ())
    # Without its round (a chance of 8/27) 0.5 wins, without both 0.6 does (1/27).
    assert (estimate.low, estimate.high) == (0.5, 0.7)

    # Where every round agrees the interval is a point; one round agrees with nothing.
    rounds = [Round(0.4, (0.3, 0.6), (1.0,) * 2, ((2.0,) * 2, (0.5 - i / 10,) * 2)) for i in range(4)]
    estimate = best_reward(rounds, LOW, HIGH)
    assert (estimate.low, estimate.ratio, estimate.high) == (0.6, 0.6, 0.6)
    assert not estimate.nothing_learned
    alone = best_reward(rounds[:1], LOW, HIGH)
    assert (alone.low, alone.ratio, alone.high) == (LOW, 0.6, HIGH)


NOTHING = {
    "equal losses": history(lambda _: 0.0, 5, noise=0.0),
    "rounding": history(lambda ratio: 1e-8 * math.sin(1000 * ratio), 5, noise=0.0),
    "one example": history(quadratic, 20, examples=1),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("rounds", NOTHING.values(), ids=NOTHING)
def test_losses_that_say_nothing_leave_the_whole_range_open(rule, rounds):
    estimate, quick = rule(rounds, LOW, HIGH), rule(rounds, LOW, HIGH, interval=False)
    assert (estimate.low, estimate.high) == (LOW, HIGH)
    assert estimate.ratio == quick.ratio
    assert estimate.nothing_learned
    assert estimate.summary.startswith("nothing was learned about the prune ratio (95 % interval 10 to 80 %); ")


@pytest.mark.parametrize(("high", "nothing", "wide"), [(0.49, False, False), (0.7, False, True), (0.74, True, True)])
def test_most_of_the_range_is_three_quarters_of_what_was_searched(high, nothing, wide):
    rule, rounds = Rule("mine", lambda told, *_: RatioEstimate(0.4, 0.2, high, "mine", 2)), history(quadratic, 2)
    estimate = rule(rounds, LOW, HIGH)
    assert (estimate.nothing_learned, estimate.wide) == (nothing, wide)
    assert not rule(rounds, 0.0, 1.0).nothing_learned


# The surrogate, read at the best moment of the run or at its end


def curve(ratio: float, time: float = 0.0) -> float:
    """Falls gently and rises steeply, as pruning does; lowest at 0.5."""
    return (0.1 if ratio < 0.5 else 2.0) * (ratio - 0.5) ** 2


def overfitting(ratio: float, time: float) -> float:
    """Lowest early, where the level is; later the lowest ratio moves up."""
    return (time - 0.3) ** 2 + 0.5 * (ratio - 0.2 - time) ** 2


EVEN = [(0.45, 0.12 + shift, 0.35 + shift, 0.58 + shift) for shift in (0.0, 0.14, 0.07, 0.2, 0.1, 0.17)]


def test_the_worked_example():
    """That at the head of the module."""
    losses = [(1.00, 1.05, 1.60), (1.15, 1.05, 1.35), (1.40, 1.10, 1.15)]
    told = [Round(0.1, (0.45, 0.8), (low,) * 2, ((middle,) * 2, (high,) * 2)) for low, middle, high in losses]
    ratios = [rule(told, LOW, HIGH, interval=False).ratio for rule in (surrogate, surrogate_at_end)]
    assert [round(ratio, 2) for ratio in ratios] == [0.16, 0.49]


def test_the_best_moment_of_the_run_decides_or_its_end_and_never_its_mean():
    told = rounds_of(overfitting, [(0.4, 0.12, 0.3, 0.5, 0.7)] * 7)
    # At time t the lowest ratio is 0.2 + t; the lowest moment of all is near t = 0.3.
    assert surrogate(told, LOW, HIGH).ratio == pytest.approx(0.5, abs=0.05)
    assert surrogate_at_end(told, LOW, HIGH).ratio == HIGH


@both_readings
@pytest.mark.parametrize(("noise", "shift"), [(0.002, 0.0), (0.0, 3.0)], ids=["noise", "levels that jump"])
def test_the_minimum_is_found_from_a_few_rounds(rule, noise, shift):
    for seed in range(5):
        told = rounds_of(curve, EVEN, noise=noise, shift=shift, seed=seed)
        assert curve(rule(told, LOW, HIGH, interval=False).ratio) < 0.002


@both_readings
@pytest.mark.parametrize(("valley", "minimum"), [(quadratic, 0.55), (asymmetric, ASYMMETRIC_MINIMUM)])
def test_the_minimum_is_found_wherever_rounds_probe(rule, valley, minimum):
    for seed in range(5):
        told = history(valley, 12, seed=seed)
        assert rule(told, LOW, HIGH, interval=False).ratio == pytest.approx(minimum, abs=4 * GRID_STEP)


@both_readings
@pytest.mark.parametrize("count", [16, 6])
def test_the_interval_covers_the_truth(rule, count):
    """With 6 of 16 the examples take turns, and the baseline has those of its round only."""
    told = [history(quadratic, 8, seed=seed, noise=0.1) for seed in range(20)]
    estimates = [rule(one if count == 16 else in_turn(one, count, False), LOW, HIGH) for one in told]
    assert sum(one.low <= 0.55 <= one.high for one in estimates) >= 17  # 19 expected
    assert sum(one.high - one.low for one in estimates) / 20 < 0.5


@both_readings
@pytest.mark.parametrize("count", [16, 6])
def test_noise_leaves_most_of_the_range_open_and_a_valley_does_not(rule, count):
    def times(curve: Curve) -> int:
        told = [history(curve, 5, noise=0.03, seed=seed) for seed in range(6)]
        return sum(rule(one if count == 16 else in_turn(one, count, False), LOW, HIGH).nothing_learned for one in told)

    assert times(lambda _: 0.0) >= 4
    assert times(lambda ratio: 3 * quadratic(ratio)) == 0


def test_the_interval_shows_that_examples_disagree():
    """Noise-free losses, but half of the examples want 0.3 and half 0.7: another draw of them decides otherwise."""
    draw, told = random.Random(0), []
    for _ in range(12):
        ratios = (0.4, *(draw.uniform(LOW, HIGH) for _ in range(3)))
        baseline, *losses = (tuple((ratio - (0.3, 0.7)[i % 2]) ** 2 for i in range(16)) for ratio in ratios)
        told.append(Round(0.4, ratios[1:], baseline, tuple(losses)))
    estimate = surrogate_at_end(told, LOW, HIGH)
    assert estimate.ratio == pytest.approx(0.5, abs=2 * GRID_STEP)
    assert 0.1 < estimate.high - estimate.low < 0.4
    turned = surrogate_at_end(in_turn(told, 16, False), LOW, HIGH)  # all of them, each round in another order
    assert turned.ratio == estimate.ratio
    assert (turned.low, turned.high) == pytest.approx((estimate.low, estimate.high), abs=GRID_STEP)


@both_readings
def test_a_lone_lucky_probe_at_the_edge_does_not_decide(rule):
    crowded = [(0.4, 0.35 + 0.01 * number, 0.42, 0.45) for number in range(9)]
    told = rounds_of(lambda ratio, time: 0.2 * (ratio - 0.4) ** 2, crowded, noise=0.02)
    lucky = rounds_of(lambda ratio, time: -0.01 if ratio > 0.7 else 0.0, [(0.4, 0.39, 0.41, 0.75)], noise=0.02)
    assert rule(told + lucky, LOW, HIGH).ratio < 0.7


@both_readings
def test_the_interval_narrows_with_rounds(rule):
    short, long = (rounds_of(curve, EVEN[:2] * n, noise=0.01, seed=1) for n in (1, 6))
    widths = [one.high - one.low for one in (rule(told, LOW, HIGH) for told in (short, long))]
    assert widths[1] < widths[0]


def test_without_an_interval_the_ratio_is_the_same():
    told = rounds_of(curve, EVEN, noise=0.01)
    bare, whole = surrogate(told, LOW, HIGH, interval=False), surrogate(told, LOW, HIGH)
    assert bare.ratio == bare.low == bare.high == whole.ratio
    assert whole.low <= whole.ratio <= whole.high
    assert [point[:2] for point in bare.curve] == [point[:2] for point in whole.curve]
    assert min(fitted for _, fitted, _, _ in whole.curve) >= 0


@pytest.mark.parametrize("count", [1, 3])
def test_few_examples_do_when_examples_agree_whichever_they_are(count):
    """Examples differ in their level, not in what pruning does to them: their differences from the baseline count."""
    told = rounds_of(curve, EVEN, noise=0.0, shift=0.1)
    whole = surrogate(told, LOW, HIGH, interval=False).ratio
    assert surrogate(in_turn(told, count), LOW, HIGH, interval=False).ratio == pytest.approx(whole, abs=1e-9)
    alone = surrogate_at_end(in_turn(told, count, False), LOW, HIGH, interval=False)
    assert curve(alone.ratio) < 0.002


@pytest.mark.parametrize(("spread", "step"), [(0.0, 1e3), (1e-9, 1e6)])
def test_a_run_that_blows_up_gives_a_ratio_and_no_error_of_linear_algebra(spread, step):
    told = rounds_of(lambda ratio, time: spread * ratio + step * time**4, EVEN)
    for rule in (surrogate, surrogate_at_end):
        estimate = rule(told, LOW, HIGH)
        assert LOW <= estimate.low <= estimate.ratio <= estimate.high <= HIGH
