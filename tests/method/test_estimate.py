"""The rules that turn rounds into one ratio, on histories whose truth is known."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_lora.method.rules import RatioEstimate, Round, Rule, best_reward, settle, smooth_fit, surrogate
from grasp_lora.method.search import RULES

LOW, HIGH = 0.1, 0.8
GRID_STEP = (HIGH - LOW) / 280
Curve = Callable[[float], float]


def quadratic(ratio: float) -> float:
    return (ratio - 0.55) ** 2


def asymmetric(ratio: float) -> float:
    """Falls slowly and rises steeply, as pruning does; minimum at ASYMMETRIC_MINIMUM."""
    return 0.02 * math.exp(10 * (ratio - 0.6)) - 0.15 * ratio


ASYMMETRIC_MINIMUM = 0.6 + math.log(0.15 / 0.2) / 10


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


@pytest.mark.parametrize(
    ("curve", "minimum", "tolerance"),
    [
        (quadratic, 0.55, 0.02),
        (lambda ratio: -(quadratic(ratio) ** 2) + 2 * (ratio - 0.3) ** 2, 0.26, 0.03),
        # A cubic is not this curve: its minimum is 0.03 too low, however many rounds there are.
        (asymmetric, ASYMMETRIC_MINIMUM, 0.05),
    ],
)
def test_smooth_fit_finds_the_minimum(curve, minimum, tolerance):
    for seed in range(10):
        assert smooth_fit(history(curve, 30, seed=seed), LOW, HIGH).ratio == pytest.approx(minimum, abs=tolerance)


def test_smooth_fit_without_noise_is_exact_for_a_cubic():
    def cubic(ratio: float) -> float:  # derivative 3 (ratio - 0.6)(ratio + 0.2)
        return ratio**3 - 0.6 * ratio**2 - 0.36 * ratio

    estimate = smooth_fit(history(cubic, 10, noise=0.0), LOW, HIGH)
    assert estimate.ratio == pytest.approx(0.6, abs=GRID_STEP)
    assert estimate.high - estimate.low <= 2 * GRID_STEP
    for ratio, fitted, low, high in estimate.curve:
        assert fitted == pytest.approx(cubic(ratio) - cubic(0.6), abs=1e-4)
        assert low == pytest.approx(high, abs=1e-4)


def test_smooth_fit_interval_covers_the_truth():
    covered = [
        estimate.low <= 0.55 <= estimate.high
        for estimate in (smooth_fit(history(quadratic, 15, seed=seed, noise=0.1), LOW, HIGH) for seed in range(40))
    ]
    assert sum(covered) >= 34  # 38 expected


@pytest.mark.parametrize(("of_examples", "widths"), [(True, (0.1, 0.4)), (False, (0.05, 0.5))])
def test_smooth_fit_interval_shows_that_examples_or_rounds_disagree(of_examples, widths):
    """Noise-free losses, but half of the examples, or of the rounds, want 0.3 and half 0.7: another draw decides otherwise."""
    draw = random.Random(0)
    rounds = []
    for number in range(20):
        ratios = tuple(draw.uniform(LOW, HIGH) for _ in range(3))
        wanted = [(0.3, 0.7)[(example if of_examples else number) % 2] for example in range(16)]
        losses = [tuple((ratio - best) ** 2 for best in wanted) for ratio in (0.4, *ratios)]
        rounds.append(Round(0.4, ratios, losses[0], tuple(losses[1:])))
    estimate = smooth_fit(rounds, LOW, HIGH)
    assert widths[0] < estimate.high - estimate.low < widths[1]
    assert not of_examples or estimate.ratio == pytest.approx(0.5, abs=0.01)


def test_the_ratio_never_leaves_the_probed_range_and_its_interval_is_open_where_that_ends():
    estimate = smooth_fit(probed(lambda p: (p - 0.9) ** 2, (0.42, 0.45, 0.5), noise=0.001), LOW, HIGH)
    assert estimate.ratio == pytest.approx(0.5)
    assert (estimate.low, estimate.high) == (pytest.approx(0.5), HIGH)
    other = smooth_fit(probed(lambda p: p**2, (0.42, 0.45, 0.5), noise=0.001), LOW, HIGH)
    assert (other.low, other.ratio, other.high) == (LOW, pytest.approx(0.4), pytest.approx(0.4))
    inside = smooth_fit(probed(lambda p: 9 * (p - 0.45) ** 2, (0.42, 0.45, 0.5), noise=0.0001), LOW, HIGH)
    assert 0.4 < inside.low <= inside.high < 0.5
    assert estimate.curve[0][0] == pytest.approx(0.4)
    assert estimate.curve[-1][0] == pytest.approx(0.5)


def probed(curve: Curve, ratios: tuple[float, ...], noise: float, seed: int = 0) -> list[Round]:
    """Rounds that all probe these ratios, and 0.4."""
    return rounds_of(lambda ratio, time: curve(ratio), [(0.4, *ratios)] * 6, noise=noise, seed=seed)


def test_noise_in_a_narrow_span_of_probes_leaves_the_whole_range_open():
    rounds = probed(lambda _: 0.0, (0.42, 0.45, 0.5), noise=0.02)
    estimate, quick = smooth_fit(rounds, LOW, HIGH), smooth_fit(rounds, LOW, HIGH, interval=False)
    assert (estimate.low, estimate.high) == (LOW, HIGH)
    assert estimate.nothing_learned
    assert 0.4 <= estimate.ratio == quick.ratio <= 0.5

    # Where all of the range was probed an interval stays as wide as it is.
    estimate = smooth_fit(probed(lambda p: 0.3 * quadratic(p), (LOW, 0.3, 0.6, HIGH), noise=0.1, seed=3), LOW, HIGH)
    assert estimate.nothing_learned
    assert LOW < estimate.low < estimate.ratio < estimate.high


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
    rounds = [Round(0.4, (0.4, 0.4), (1.0, 2.0), ((1.1, 2.0), (0.9, 2.1)))] * 3
    estimate = smooth_fit(rounds, LOW, HIGH)
    assert (estimate.low, estimate.ratio, estimate.high) == (LOW, 0.4, HIGH)


@pytest.mark.parametrize(
    ("minima", "best"),
    [
        ((0.3, 0.5), 0.4),  # of two rounds both count in full
        ((0.2, 0.6, 0.6, 0.6), (0.5 * 0.2 + 3 * 0.6) / 3.5),  # of four the first one counts half
        ((0.2, 0.8, 0.5, 0.5, 0.5, 0.5), (0.2 / 3 + 0.8 * 2 / 3 + 4 * 0.5) / 5),
    ],
)
def test_smooth_fit_weighs_early_rounds_by_their_place_in_the_first_half(minima, best):
    def parabola(ratio: float, time: float) -> float:
        return (ratio - minima[round(time * (len(minima) - 1))]) ** 2

    rounds = rounds_of(parabola, [(0.4, 0.1, 0.3, 0.6, 0.8)] * len(minima))
    assert smooth_fit(rounds, LOW, HIGH).ratio == pytest.approx(best, abs=GRID_STEP)


@pytest.mark.parametrize("elsewhere", [0, 3])
def test_an_interval_holds_its_ratio_wherever_resampling_goes(elsewhere):
    grid = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    fitted = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    resampled = torch.ones(50, 4, dtype=torch.float64)
    resampled[:, elsewhere] = 0.0
    estimate = settle("smooth_fit", grid, 5, fitted, resampled)
    assert estimate.ratio == 0.4
    assert (estimate.low, estimate.high) == (min(0.4, float(grid[elsewhere])), max(0.4, float(grid[elsewhere])))


@settings(deadline=None, max_examples=25)
@given(offsets=st.lists(st.lists(st.floats(-1000, 1000), min_size=4, max_size=4), min_size=6, max_size=6))
def test_smooth_fit_ignores_the_level_of_each_round_and_example(offsets):
    rounds = history(quadratic, 6, examples=4)
    shifted = []
    for one, row in zip(rounds, offsets, strict=True):
        all_losses = (one.baseline_losses, *one.candidate_losses)
        baseline, *rest = (tuple(map(sum, zip(losses, row, strict=True))) for losses in all_losses)
        shifted.append(replace(one, baseline_losses=baseline, candidate_losses=tuple(rest)))
    plain, moved = smooth_fit(rounds, LOW, HIGH), smooth_fit(shifted, LOW, HIGH)
    for number in ("ratio", "low", "high"):
        assert getattr(moved, number) == pytest.approx(getattr(plain, number), abs=1.01 * GRID_STEP)
    for before, after in zip(plain.curve, moved.curve, strict=True):
        assert after == pytest.approx(before, abs=1e-6)


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


@pytest.mark.parametrize("rule", [RULES["surrogate"], smooth_fit], ids=["surrogate", "smooth_fit"])
def test_noise_leaves_most_of_the_range_open_and_a_valley_does_not(rule):
    def times(curve: Curve) -> int:
        return sum(rule(history(curve, 5, noise=0.03, seed=seed), LOW, HIGH).nothing_learned for seed in range(6))

    assert times(lambda _: 0.0) >= 4
    assert times(lambda ratio: 3 * quadratic(ratio)) == 0


@pytest.mark.parametrize(("high", "nothing", "wide"), [(0.49, False, False), (0.7, False, True), (0.74, True, True)])
def test_most_of_the_range_is_three_quarters_of_what_was_searched(high, nothing, wide):
    rule, rounds = Rule("mine", lambda told, *_: RatioEstimate(0.4, 0.2, high, "mine", 2)), history(quadratic, 2)
    estimate = rule(rounds, LOW, HIGH)
    assert (estimate.nothing_learned, estimate.wide) == (nothing, wide)
    assert not rule(rounds, 0.0, 1.0).nothing_learned


def curve(ratio: float, time: float = 0.0) -> float:
    """Falls gently and rises steeply, as pruning does; lowest at 0.5."""
    return (0.1 if ratio < 0.5 else 2.0) * (ratio - 0.5) ** 2


def overfitting(ratio: float, time: float) -> float:
    """Lowest early, where the level is; later the lowest ratio moves up."""
    return (time - 0.3) ** 2 + 0.5 * (ratio - 0.2 - time) ** 2


EVEN = [(0.45, 0.12 + shift, 0.35 + shift, 0.58 + shift) for shift in (0.0, 0.14, 0.07, 0.2, 0.1, 0.17)]


@pytest.mark.parametrize(("noise", "shift"), [(0.002, 0.0), (0.0, 3.0)], ids=["noise", "levels that jump"])
def test_the_surrogate_finds_the_minimum_from_a_few_rounds(noise, shift):
    for seed in range(5):
        told = rounds_of(curve, EVEN, noise=noise, shift=shift, seed=seed)
        assert curve(surrogate(told, LOW, HIGH).ratio) < 0.002


def test_the_best_moment_of_the_run_decides_not_its_mean_or_its_end():
    told = rounds_of(overfitting, [(0.4, 0.12, 0.3, 0.5, 0.7)] * 7)
    # At time t the lowest ratio is 0.2 + t; the lowest moment of all is near t = 0.3.
    assert surrogate(told, LOW, HIGH).ratio == pytest.approx(0.5, abs=0.05)


def test_a_lone_lucky_probe_at_the_edge_does_not_decide():
    crowded = [(0.4, 0.35 + 0.01 * number, 0.42, 0.45) for number in range(9)]
    told = rounds_of(lambda ratio, time: 0.2 * (ratio - 0.4) ** 2, crowded, noise=0.02)
    lucky = rounds_of(lambda ratio, time: -0.01 if ratio > 0.7 else 0.0, [(0.4, 0.39, 0.41, 0.75)], noise=0.02)
    assert surrogate(told + lucky, LOW, HIGH).ratio < 0.7


@pytest.mark.parametrize("rule", [surrogate, smooth_fit], ids=["surrogate", "smooth_fit"])
def test_the_interval_narrows_with_rounds(rule):
    short, long = (rounds_of(curve, EVEN[:2] * n, noise=0.01, seed=1) for n in (1, 6))
    widths = [one.high - one.low for one in (rule(told, LOW, HIGH) for told in (short, long))]
    assert widths[1] < widths[0]


def test_without_an_interval_the_ratio_is_the_same():
    told = rounds_of(curve, EVEN, noise=0.01)
    bare, whole = surrogate(told, LOW, HIGH, interval=False), surrogate(told, LOW, HIGH)
    assert bare.ratio == bare.low == bare.high == whole.ratio
    assert whole.low <= whole.ratio <= whole.high
    assert bare.curve == ()
    assert min(fitted for _, fitted, _, _ in whole.curve) >= 0


def measured_on(told: list[Round], count: int) -> list[Round]:
    """The same rounds, had their candidates been measured on `count` examples in turn."""
    examples = len(told[0].baseline_losses)
    few = []
    for number, one in enumerate(told):
        places = tuple((number * count + place) % examples for place in range(count))
        losses = tuple(tuple(row[place] for place in places) for row in one.candidate_losses)
        few.append(replace(one, candidate_losses=losses, places=places))
    return few


def test_candidates_on_all_examples_in_turn_are_candidates_on_all():
    told = rounds_of(curve, EVEN, noise=0.05, shift=0.1)
    whole, turned = surrogate(told, LOW, HIGH), surrogate(measured_on(told, 8), LOW, HIGH)
    assert turned.ratio == whole.ratio
    assert (turned.low, turned.high) == pytest.approx((whole.low, whole.high), abs=0.02)


def test_few_examples_do_when_examples_agree_whichever_they_are():
    """Examples differ in their level, not in what pruning does to them: their differences from the baseline count."""
    told = rounds_of(curve, EVEN, noise=0.0, shift=0.1)
    whole = surrogate(told, LOW, HIGH, interval=False).ratio
    for count in (1, 3):
        assert surrogate(measured_on(told, count), LOW, HIGH, interval=False).ratio == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize(("spread", "step"), [(0.0, 1e3), (1e-9, 1e6)])
def test_a_run_that_blows_up_gives_a_ratio_and_no_error_of_linear_algebra(spread, step):
    told = rounds_of(lambda ratio, time: spread * ratio + step * time**4, EVEN)
    estimate = surrogate(told, LOW, HIGH)
    assert LOW <= estimate.low <= estimate.ratio <= estimate.high <= HIGH
