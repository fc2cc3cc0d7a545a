"""The Gaussian process over ratio and time, on histories whose truth is known; and the policies that came with it."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from grasp_lora.method.policy import PolicySettings, Round, make_policy
from grasp_lora.method.surrogate import Surrogate, lowest_surrogate

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
        assert curve(lowest_surrogate(told, LOW, HIGH).ratio) < 0.002


def test_the_best_moment_of_the_run_decides_not_its_mean_or_its_end() -> None:
    told = rounds_of(overfitting, [(0.4, 0.12, 0.3, 0.5, 0.7)] * 7)
    # At time t the lowest ratio is 0.2 + t; the lowest moment of all is near t = 0.3.
    assert lowest_surrogate(told, LOW, HIGH).ratio == pytest.approx(0.5, abs=0.05)


def test_a_level_that_jumps_between_rounds_is_not_taken_for_the_ratio() -> None:
    told = rounds_of(lambda ratio, time: curve(ratio), EVEN, shift=3.0)
    assert curve(lowest_surrogate(told, LOW, HIGH).ratio) < 0.002


def test_a_lone_lucky_probe_at_the_edge_does_not_decide() -> None:
    crowded = [(0.4, 0.35 + 0.01 * number, 0.42, 0.45) for number in range(9)]
    told = rounds_of(lambda ratio, time: 0.2 * (ratio - 0.4) ** 2, crowded, noise=0.02)
    lucky = rounds_of(lambda ratio, time: -0.01 if ratio > 0.7 else 0.0, [(0.4, 0.39, 0.41, 0.75)], noise=0.02)
    assert lowest_surrogate(told + lucky, LOW, HIGH).ratio < 0.7


def test_the_interval_narrows_with_rounds_and_widens_where_examples_disagree() -> None:
    short, long = (rounds_of(lambda ratio, time: curve(ratio), EVEN[:2] * n, noise=0.01, seed=1) for n in (1, 6))
    widths = [one.high - one.low for one in (lowest_surrogate(told, LOW, HIGH) for told in (short, long))]
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
    wide = lowest_surrogate(opposed, LOW, HIGH)
    assert wide.high - wide.low > widths[1]


def test_without_an_interval_the_ratio_is_the_same() -> None:
    told = rounds_of(lambda ratio, time: curve(ratio), EVEN, noise=0.01)
    bare, whole = lowest_surrogate(told, LOW, HIGH, interval=False), lowest_surrogate(told, LOW, HIGH)
    assert bare.ratio == bare.low == bare.high == whole.ratio
    assert whole.low <= whole.ratio <= whole.high
    assert bare.curve == ()
    assert min(fitted for _, fitted, _, _ in whole.curve) >= 0


@pytest.mark.parametrize("losses", [0.0, 1e-30, 1e12])
def test_equal_losses_are_no_reason_to_fail(losses: float) -> None:
    told = rounds_of(lambda ratio, time: losses, [(0.4, 0.4, 0.4)] * 3, examples=1)
    assert LOW <= lowest_surrogate(told, LOW, HIGH).ratio <= HIGH


def test_draws_are_wide_before_and_narrow_after_the_probes_settle_it() -> None:
    def spread(told: list[Round]) -> float:
        drawn = Surrogate(told, LOW, HIGH).lowest(seed=1)
        assert drawn.equal(drawn.sort().values)
        assert drawn.min() >= LOW
        assert drawn.max() <= HIGH
        return float(drawn.std())

    steep = [(0.45, 0.12, 0.3, 0.4, 0.5, 0.6, 0.79)]
    settled = spread(rounds_of(lambda ratio, time: (ratio - 0.5) ** 2, steep * 3))
    assert settled < 0.1
    assert spread(rounds_of(lambda ratio, time: 0.0, [(0.45, 0.44)], noise=0.01)) > 2 * settled


def test_the_policy_probes_where_the_minimum_may_be() -> None:
    policy = make_policy(PolicySettings(kind="surrogate", estimate="surrogate", candidates=4))
    seen = []
    for _ in range(6):
        current, candidates = policy.current_ratio, tuple(policy.ask())
        seen.append(candidates)
        losses = [tuple(1 + curve(ratio) + 0.1 * example for example in range(4)) for ratio in (current, *candidates)]
        policy.tell(Round(current, candidates, losses[0], tuple(losses[1:])))
    assert max(seen[0]) - min(seen[0]) > 0.4
    assert max(seen[-1]) - min(seen[-1]) < 0.3
    assert policy.current_ratio == policy.best_ratio().ratio
    assert curve(policy.current_ratio) < 0.002
    assert policy.mean == pytest.approx(float(torch.tensor(seen[-1]).mean()), abs=0.1)


def adaptive(**changes: object) -> PolicySettings:
    return PolicySettings(kind="adaptive", estimate="surrogate", **changes)  # type: ignore[arg-type]


def told_round(current: float, candidates: tuple[float, ...], gains: tuple[tuple[float, ...], ...]) -> Round:
    """Candidates whose examples are this much better than the baseline's."""
    return Round(current, candidates, (1.0,) * len(gains[0]), tuple(tuple(1 - gain for gain in one) for one in gains))


def test_the_adaptive_policy_learns_where_the_papers_hardly_does() -> None:
    policies = [make_policy(PolicySettings(kind=kind, candidates=4)) for kind in ("adaptive", "gaussian")]
    for policy in policies:
        for _ in range(25):
            candidates = tuple(policy.ask())
            gains = tuple((-0.2 * (ratio - 0.65) ** 2,) * 4 for ratio in candidates)
            policy.tell(told_round(policy.current_ratio, candidates, gains))
    learner, papers = policies
    assert abs(learner.mean - 0.65) < 0.05
    assert learner.std < 0.1
    assert abs(papers.mean - 0.65) > 0.1
    assert papers.std > 0.2


def test_the_adaptive_policy_commits_only_what_the_examples_agree_on() -> None:
    agreed, divided = (make_policy(adaptive()) for _ in range(2))
    assert agreed.tell(told_round(0.4, (0.45, 0.5, 0.3), ((0.1,) * 4, (0.0,) * 4, (-0.1,) * 4))).committed
    split = ((0.5, -0.3, 0.5, -0.3), (0.0,) * 4, (-0.1,) * 4)  # the mean is 0.1 as well
    decision = divided.tell(told_round(0.4, (0.45, 0.5, 0.3), split))
    assert not decision.committed
    assert decision.rewards[0] == pytest.approx(0.1)
    assert divided.current_ratio == 0.4


def test_the_adaptive_policys_deviation_stays_between_its_bounds_and_mean_within() -> None:
    policy = make_policy(adaptive())
    for number in range(200):
        candidates = tuple(policy.ask())
        assert len(set(candidates)) == 3
        gains = tuple((ratio if number < 100 else -ratio,) * 4 for ratio in candidates)
        policy.tell(told_round(policy.current_ratio, candidates, gains))
        assert LOW < policy.mean < HIGH
        assert 0 < policy.std <= 0.7
        assert math.isfinite(policy.std)


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
    whole, turned = lowest_surrogate(told, LOW, HIGH), lowest_surrogate(measured_on(told, 8), LOW, HIGH)
    assert turned.ratio == whole.ratio
    assert (turned.low, turned.high) == pytest.approx((whole.low, whole.high), abs=0.02)


def test_few_examples_do_when_examples_agree_whichever_they_are() -> None:
    """Examples differ in their level, not in what pruning does to them: their differences from the baseline count."""
    told = rounds_of(lambda ratio, time: curve(ratio), EVEN, noise=0.0, shift=0.1)
    whole = lowest_surrogate(told, LOW, HIGH, interval=False).ratio
    for count in (1, 3):
        assert lowest_surrogate(measured_on(told, count), LOW, HIGH, interval=False).ratio == pytest.approx(
            whole, abs=1e-9
        )


def test_fewer_examples_that_disagree_leave_more_open() -> None:
    widths = []
    for count in (24, 3):
        told = rounds_of(lambda ratio, time: curve(ratio), EVEN, noise=0.15, examples=24)
        estimate = lowest_surrogate(measured_on(told, count), LOW, HIGH)
        widths.append(estimate.high - estimate.low)
    assert widths[0] < widths[1]


@pytest.mark.parametrize("spread", [0.0, 1e-9])
@pytest.mark.parametrize("step", [1e3, 1e6])
def test_a_run_that_blows_up_gives_a_ratio_and_no_error_of_linear_algebra(spread: float, step: float) -> None:
    told = rounds_of(lambda ratio, time: spread * ratio + step * time**4, EVEN)
    estimate = lowest_surrogate(told, LOW, HIGH)
    assert LOW <= estimate.low <= estimate.ratio <= estimate.high <= HIGH
