"""The policies: golden trajectories of the paper's, what every policy keeps to, and when rounds come."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_lora.errors import ProbeError, RecipeError
from grasp_lora.method import surrogate as surrogates
from grasp_lora.method.rules import RatioEstimate, Round, Rule
from grasp_lora.method.search import (
    ON_MICRO_DEV,
    POLICIES,
    PRESETS,
    RULES,
    Controller,
    Decision,
    GrpoPolicy,
    PaperPolicy,
    RatioSearch,
    Rounds,
    plain_policy,
    policy_class,
    preset,
    ratio_rule,
)

GOLDEN = json.loads((Path(__file__).parent / "golden_policy.json").read_text(encoding="utf-8"))


def quadratic(ratio: float) -> float:
    return (ratio - 0.55) ** 2


def of_kind(kind: str, rule: str = "surrogate_at_end", **settings_: Any) -> RatioSearch:
    return RatioSearch(POLICIES[kind](**settings_), RULES[rule])


def of_preset(name: str, **settings_: Any) -> RatioSearch:
    chosen = preset(name)
    return RatioSearch(replace(chosen.policy, **settings_), ratio_rule(chosen.rule))


def state(search: RatioSearch) -> tuple[float, float, float, list[Round]]:
    return search.mean, search.std, search.current_ratio, list(search.history)


def run(search: RatioSearch, rounds: int, loss: Callable[[float], float] = quadratic, seed: int = 0) -> list[Round]:
    """Play rounds of four micro-dev examples whose level drifts, and return what was told."""
    noise, told = random.Random(seed), []
    for _ in range(rounds):
        levels, current, candidates = [noise.uniform(0, 3) for _ in range(4)], search.current_ratio, tuple(search.ask())
        baseline, *losses = (tuple(level + loss(ratio) for level in levels) for ratio in (current, *candidates))
        told.append(Round(current, candidates, baseline, tuple(losses)))
        search.tell(told[-1])
    return told


def tell_rewards(search: RatioSearch, candidates: Sequence[float], rewards: Sequence[float]) -> Decision:
    losses = tuple((-reward,) for reward in rewards)
    return search.tell(Round(search.current_ratio, tuple(candidates), (0.0,), losses))


def a_round(search: RatioSearch, **changes: Any) -> Round:
    losses = (1.0, 2.0), ((1.0, 2.0), (0.5, 2.0), (3.0, 2.0))
    return replace(Round(search.current_ratio, (0.3, 0.4, 0.5), *losses), **changes)


every_policy = pytest.mark.parametrize("kind", POLICIES)


@pytest.mark.parametrize("name", GOLDEN)
def test_paper_preset_reproduces_the_golden_trajectory(name):
    policy = of_preset("paper", **GOLDEN[name]["settings"])
    for expected in GOLDEN[name]["rounds"]:
        decision = tell_rewards(policy, expected["candidates"], expected["rewards"])
        assert decision.rewards == tuple(expected["rewards"])
        assert policy.mean == pytest.approx(expected["policy_mean"], rel=0, abs=1e-12)
        assert policy.std == pytest.approx(expected["policy_std"], rel=0, abs=1e-12)
        assert policy.current_ratio == pytest.approx(expected["current_ratio"], rel=0, abs=1e-12)
        assert decision.committed == (expected["committed_ratio"] is not None)
        if decision.committed:
            assert decision.ratio == pytest.approx(expected["committed_ratio"], rel=0, abs=1e-12)


def test_paper_preset_has_the_papers_numbers():
    paper = preset("paper")
    settings_: Any = paper.policy
    assert isinstance(settings_, PaperPolicy)
    assert paper.rule == "best_reward"
    assert paper.rounds == Rounds(10, at_ends=False, pool="micro_dev", in_turn=None, patience=None)
    assert (settings_.ratio_min, settings_.ratio_max, settings_.ratio_init) == (0.10, 0.80, 0.40)
    assert (settings_.candidates, settings_.max_step, settings_.seed) == (3, 0.10, 42)
    assert (settings_.learning_rate, settings_.kl_coef, settings_.entropy_bonus) == (0.05, 0.05, 0.01)
    assert of_preset("paper").std == pytest.approx(0.7 / 6)
    # Pinned: a change of the generator would silently change every run.
    pinned = [0.37736492376755, 0.6142712155187089, 0.4992321985825299]
    assert of_preset("paper").ask() == pytest.approx(pinned, abs=1e-12)
    search = of_preset("paper")
    assert tell_rewards(search, (0.45, 0.7), (0.0, -1.0)).committed  # a reward of 0 is enough
    assert search.current_ratio == 0.45


@every_policy
def test_draws_cover_the_bounds_fairly(kind):
    policy = of_kind(kind, ratio_init=0.45, candidates=4000)
    drawn = torch.tensor(policy.ask(), dtype=torch.float64)
    assert drawn.mean().item() == pytest.approx(0.45, abs=0.015)
    assert drawn.std().item() == pytest.approx(policy.std, rel=0.05)


@every_policy
@pytest.mark.parametrize("candidates", [1, 8])
def test_candidates_lie_within_the_bounds_and_are_others_each_round(kind, candidates):
    wide: dict[str, Any] = {"std_init": 5.0} if kind == "paper" else {}
    policy = of_kind(kind, candidates=candidates)
    narrow = of_kind(kind, ratio_min=0.2, ratio_max=0.3, ratio_init=0.3, candidates=candidates, **wide)
    seen = set()
    for _ in range(20):
        drawn = policy.ask()
        assert policy.ask() == drawn  # asked twice
        assert len(drawn) == candidates
        assert all(0.1 <= ratio <= 0.8 for ratio in drawn)
        assert all(0.2 <= ratio <= 0.3 for ratio in narrow.ask())
        assert tuple(drawn) not in seen
        seen.add(tuple(drawn))
        run(policy, 1)
        run(narrow, 1)


@every_policy
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("before", [0, 1, 7])
def test_a_search_that_is_told_its_rounds_again_goes_on_identically(kind, rule, before):
    search = of_kind(kind, rule, seed=3)
    told = run(search, before)
    resumed = RatioSearch(search.policy, search.rule)
    for one in told:
        resumed.tell(Round.from_json(json.loads(json.dumps(vars(one) | {"ratio_before": one.current_ratio}))))
    for step in range(5):
        assert state(resumed) == state(search)
        assert resumed.ask() == search.ask()
        assert run(resumed, 1, seed=step) == run(search, 1, seed=step)
    assert resumed.best_ratio() == search.best_ratio()


@every_policy
def test_a_policy_comes_back_from_plain_values(kind):
    policy = POLICIES[kind](candidates=5)
    plain = json.loads(json.dumps(plain_policy(policy)))
    assert plain.pop("kind") == kind
    assert policy_class(kind)(**plain) == policy


# The losses of a baseline and of three candidates on two examples each, flat.
ROUND = st.lists(st.floats(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max), min_size=8, max_size=8)


@every_policy
@settings(deadline=None)
@given(rounds=st.lists(ROUND, min_size=1, max_size=6), seed=st.integers(0, 2**64), step=st.floats(0.001, 1.0))
def test_any_finite_losses_keep_the_policy_finite_and_its_steps_short(kind, rounds, seed, step):
    held: dict[str, Any] = {"max_step": step} if POLICIES[kind].regime == "held" else {}
    policy = of_kind(kind, seed=seed, candidates=3, **held)
    for flat in rounds:
        candidates, before = tuple(policy.ask()), policy.current_ratio
        baseline, *losses = (tuple(flat[place : place + 2]) for place in range(0, 8, 2))
        decision = policy.tell(Round(before, candidates, baseline, tuple(losses)))
        assert 0 < policy.std < math.inf
        assert 0.1 <= policy.mean <= 0.8
        assert decision.ratio == policy.current_ratio
        assert 0.1 <= policy.current_ratio <= 0.8
        if POLICIES[kind].regime != "held":
            assert decision.committed == (decision.ratio != before)
            continue
        assert abs(policy.current_ratio - before) <= step + 1e-12
        assert decision.committed == (max(decision.rewards) >= 0)
        if decision.committed:
            winner = candidates[decision.rewards.index(max(decision.rewards))]
            assert decision.clipped == (abs(winner - before) > step)
            if not decision.clipped:
                assert decision.ratio == winner
        else:
            assert (policy.current_ratio, decision.clipped) == (before, False)
    estimate = policy.best_ratio()
    assert 0.1 <= estimate.low <= estimate.ratio <= estimate.high <= 0.8


UNFIT = r"a round measured candidates .* tell the ratios that ask\(\) gave.* as many as in earlier rounds"


@every_policy
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"baseline_losses": (1.0, math.nan)}, ProbeError, "the loss of probed example 1 is nan; it must be finite"),
        ({"candidate_losses": ((1.0, 2.0), (math.inf, 2.0), (3.0, 2.0))}, ProbeError, "example 0 is inf"),
        ({"candidates": (0.3, 0.4)}, ValueError, UNFIT),
        ({"candidate_losses": ((1.0, 2.0), (1.0,), (1.0, 2.0))}, ValueError, UNFIT),
        ({"baseline_losses": (), "candidate_losses": ((), (), ())}, ValueError, UNFIT),
        ({"baseline_losses": (1.0,) * 4, "candidate_losses": ((1.0,) * 4,) * 3}, ValueError, UNFIT),  # there were two
        ({"candidates": (0.3, 0.4, 0.81)}, ValueError, UNFIT),
        ({"current_ratio": 0.41}, ValueError, UNFIT),
        ({"places": (1, 2)}, ValueError, UNFIT),
        ({"places": (1,)}, ValueError, UNFIT),
    ],
)
def test_a_round_that_does_not_fit_is_an_error_and_changes_nothing(kind, changes, error, message):
    policy = of_kind(kind)
    policy.tell(a_round(policy))
    before = state(policy)
    with pytest.raises(error, match=message):
        policy.tell(a_round(policy, **changes))
    assert state(policy) == before
    for places in ((1, 1), (-1, 0)):  # nor are these the places of two examples
        with pytest.raises(ValueError, match=UNFIT):
            of_kind(kind).tell(a_round(policy, places=places))


def test_candidates_on_some_examples_are_compared_on_those():
    told = Round(0.4, (0.3, 0.5), (4.0, 1.0, 2.0, 5.0), ((1.5, 4.0), (0.5, 4.5)), places=(1, 3))
    assert told.common_losses == ((1.0, 5.0), (1.5, 4.0), (0.5, 4.5))
    assert told.rewards == (0.25, 0.5)
    assert told.lowest_loss == 3.0 - 0.5  # the baseline on all four, and what the better one gains on its two
    assert replace(told, candidate_losses=((1.5, 7.0), (1.0, 5.5))).lowest_loss == 3.0
    alone = replace(told, baseline_losses=(1.0, 5.0))  # the baseline on those few only
    assert (alone.common_losses, alone.rewards, alone.lowest_loss) == (told.common_losses, told.rewards, 2.5)
    for measured in (told, alone):
        search = of_kind("grpo", "surrogate")
        search.tell(measured)
        assert 0.1 <= search.best_ratio().ratio <= 0.8


def test_the_surrogate_is_fitted_once_a_round_and_its_dear_root_is_for_intervals_alone(monkeypatch):
    fits, dear = [], []
    fit, root = surrogates.Surrogate._fit, surrogates._root
    monkeypatch.setattr(surrogates.Surrogate, "_fit", lambda self, values: (fits.append(1), fit(self, values)))
    monkeypatch.setattr(
        surrogates,
        "_root",
        lambda matrix: (dear.append(len(matrix) >= surrogates.RATIOS * surrogates.TIMES), root(matrix))[1],
    )
    search = of_kind("grpo", "surrogate")
    surrogates._process.cache_clear()
    for _ in range(4):
        candidates = tuple(search.ask())
        losses = tuple((ratio, ratio**2) for ratio in candidates)
        search.tell(Round(search.current_ratio, candidates, (1.0, 1.0), losses))
    assert len(fits) == 4
    assert not any(dear)
    assert search.best_ratio().low < search.best_ratio().high
    assert len(fits) == 4  # the estimate after the run rests on the fit of the last round
    assert sum(dear) == 1


def test_of_equal_rounds_the_first_is_the_best():
    search = of_kind("grpo")
    for _ in range(3):
        candidates = tuple(search.ask())
        search.tell(Round(search.current_ratio, candidates, (1.0,), tuple((2.0,) for _ in candidates)))
    assert search.rounds_since_best == 2  # an equal loss is no lower one, so patience runs
    even = [Round(0.4, (ratio,), (1.0,), ((0.5,),)) for ratio in (0.3, 0.6)]
    assert RULES["best_reward"](even, 0.1, 0.8).ratio == 0.3


@every_policy
def test_global_seeds_do_not_matter(kind):
    drawn = []
    for seed in (1, 2):
        random.seed(seed)
        torch.manual_seed(seed)
        policy = of_kind(kind)
        run(policy, 3)
        drawn.append((policy.ask(), policy.best_ratio()))
    assert drawn[0] == drawn[1]


# Preset grasp


def test_every_ratio_is_trained_at_equally_often():
    policy = of_preset("grasp")
    for start in (0, 37):
        drawn = sorted(policy.training_ratio(step) for step in range(start, start + 70))
        assert all(0.1 <= ratio <= 0.8 for ratio in drawn)
        gaps = [b - a for a, b in zip([0.1, *drawn], [*drawn, 0.8], strict=True)]
        assert max(gaps) < 0.03  # 70 uniform draws would leave one of about 0.05


@pytest.mark.parametrize(
    ("rewards", "advantages", "step"),
    [
        # In each group the current ratio 0.4 has reward 0; the mean is 0.45.
        ((0.3, -0.3), (math.sqrt(1.5), -math.sqrt(1.5)), -math.sqrt(1.5) * (0.25 + 0.15) / 3),
        ((3.0, 6.0), (0.0, math.sqrt(1.5)), math.sqrt(1.5) * (0.05 + 0.15) / 3),
        ((-1.0, -1.0), (-math.sqrt(0.5), -math.sqrt(0.5)), math.sqrt(2) * (-0.05 + (0.25 - 0.15) / 2) / 3),
        ((2e-9, 0.0), (math.sqrt(2), -math.sqrt(0.5)), (-0.25 * math.sqrt(2) - math.sqrt(0.5) * (0.15 - 0.05)) / 3),
    ],
)
def test_advantages_are_those_of_the_group_with_the_current_ratio_in_it(rewards, advantages, step):
    search = of_kind("grpo", candidates=2)
    mean, std = search.mean, search.std
    assert (mean, std) == pytest.approx((0.45, 0.7 / math.sqrt(12)))
    tell_rewards(search, (0.2, 0.6), rewards)
    assert search.policy.advantages(search.history[0]) == pytest.approx(advantages)
    assert search.mean == pytest.approx(mean + 0.25 * step)
    assert search.std == pytest.approx(0.95 * std)


def test_the_first_round_goes_from_bound_to_bound_and_later_ones_draw_pairs_around_the_mean():
    search = of_kind("grpo", candidates=5)
    assert search.ask() == pytest.approx([0.1, 0.275, 0.45, 0.625, 0.8])
    run(search, 1)
    drawn = list(search.policy.draw(search, random.Random(1)))
    assert len(set(drawn)) == 5
    for one, other in (drawn[:2], drawn[2:4]):
        assert (one + other) / 2 == pytest.approx(search.mean)
    many = [ratio for seed in range(300) for ratio in search.policy.draw(search, random.Random(seed))]
    assert torch.tensor(many).std().item() == pytest.approx(search.std, rel=0.1)


def test_candidates_draw_together_where_losses_are_low():
    search = of_kind("grpo", "best_reward")
    before = search.mean
    run(search, 1)
    assert before < search.mean < 0.55
    run(search, 60)
    assert search.mean == pytest.approx(0.55, abs=0.05)
    assert search.std == 0.05


@pytest.mark.parametrize("lowest", [0.1, 0.3, 0.55, 0.8])
def test_preset_grasp_finds_a_valley_in_a_few_rounds(lowest):
    for name in (PRESETS["grasp"], ON_MICRO_DEV):
        search = RatioSearch(name.policy, name.rule)
        run(search, 3, lambda ratio: (ratio - lowest) ** 2)
        assert search.current_ratio == search.best_ratio().ratio == pytest.approx(lowest, abs=0.04)


def test_where_all_losses_are_equal_nothing_moves_and_the_papers_policy_commits_a_tie():
    search = of_preset("grasp")
    before = state(search)[:3]
    decision = tell_rewards(search, search.ask(), (0.0,) * 4)
    assert not decision.committed
    assert state(search)[:3] == before
    assert search.policy.advantages(search.history[0]) == (0.0,) * 4
    paper = of_preset("paper")
    assert tell_rewards(paper, (0.45, 0.7), (0.0, 0.0)).committed
    assert paper.policy.advantages(paper.history[0]) == (0.0, 0.0)


@dataclass(frozen=True)
class Decided(PaperPolicy):
    """Decides what it is told to."""

    what: Any = None

    def decide(self, search: RatioSearch, measured: Round) -> Decision:
        return self.what  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("decided", "shown"),
    [(Decision((0.0,), True, 0.9), r"0\.9"), (Decision((0.0,), True, math.nan), "nan"), (0.5, r"0\.5"), (None, "None")],
)
def test_a_policy_that_decides_no_ratio_within_its_bounds_is_named(decided, shown):
    search = RatioSearch(Decided(what=decided), RULES["best_reward"])
    with pytest.raises(RecipeError, match=rf"policy Decided decided {shown} after round 1; .* lies in \[0\.1, 0\.8\]"):
        search.tell(a_round(search))
    assert (search.mean, search.std, search.current_ratio, search.history) == (*search.policy.start, 0.4, [])


@pytest.mark.parametrize(
    ("ratio", "low", "high"), [(0.9, 0.9, 0.9), (math.nan, 0.2, 0.6), (0.5, 0.55, 0.6), (0.5, 0.0, 0.6)]
)
def test_a_rule_that_gives_a_ratio_outside_the_bounds_or_its_interval_is_named(ratio, low, high):
    search = RatioSearch(
        PaperPolicy(), Rule("mine", lambda told, *_: RatioEstimate(ratio, low, high, "mine", len(told)))
    )
    search.tell(a_round(search))
    with pytest.raises(RecipeError, match=rf"rule 'mine' gave ratio {ratio} .* must lie in \[0\.1, 0\.8\]"):
        search.best_ratio()


def test_a_search_takes_its_rule_by_name_as_a_controller_does():
    assert RatioSearch(PaperPolicy(), "best_reward").rule is RULES["best_reward"]
    with pytest.raises(ValueError, match="rule is 'smooth'; allowed: "):
        RatioSearch(PaperPolicy(), "smooth")


def test_which_steps_a_round_follows_and_its_spacing_turns_and_splits():
    for at_ends, followed in ((False, [3, 6, 9]), (True, [0, 3, 6, 9, 10])):
        assert Rounds(every=3, at_ends=at_ends).round_steps(10, 3) == followed
    assert Rounds(every=20, at_ends=True).round_steps(10, 20) == [0, 10]
    assert (Rounds(every="epoch").spacing(7), Rounds(every=4).spacing(7)) == (7, 4)
    assert [Rounds(in_turn=5).turn(pool) for pool in (4, 5, 6)] == [None, None, 5]
    assert Rounds().turn(6) is None
    assert [Rounds(pool=pool).splits for pool in ("dev", "both")] == [("dev",), ("micro_dev", "dev")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GrpoPolicy(ratio_min=-0.1), r"ratio_min is -0.1; it must lie in \[0, 1\] and below ratio_max 0.8"),
        (
            lambda: GrpoPolicy(ratio_init=0.05),
            "ratio_init is 0.05; it must lie between ratio_min 0.1 and ratio_max 0.8",
        ),
        (lambda: GrpoPolicy(candidates=0), "candidates is 0; it must be a whole number, at least 1"),
        (lambda: GrpoPolicy(candidates=2.5), "candidates is 2.5; it must be a whole number"),
        (lambda: PaperPolicy(std_init=0.0), "std_init is 0.0; it must be a positive number, or left out"),
        (lambda: PaperPolicy(learning_rate=-0.1), "learning_rate is -0.1; it must be a number >= 0"),
        (lambda: PaperPolicy(max_step=math.nan), r"max_step is nan; it must lie in \(0, 1\]"),
        (lambda: GrpoPolicy(learning_rate=math.inf), "learning_rate is inf; it must be a number >= 0"),
        (lambda: GrpoPolicy(shrink=1.1), r"shrink is 1.1; it must lie in \(0, 1\]"),
        (lambda: GrpoPolicy(std_min=0.0), "std_min is 0.0; it must be a positive number"),
        (lambda: policy_class("grid"), "policy kind is 'grid'; allowed: grpo, paper, or the import path"),
        (
            lambda: policy_class("math:sqrt"),
            "policy kind 'math:sqrt' is a builtin_function_or_method; it must be a type",
        ),
        (lambda: policy_class("pathlib:Path"), "policy kind 'pathlib:Path' is no RatioPolicy; derive it"),
        (lambda: Rounds(every=0), "every is 0; it must be at least 1 optimizer step, a whole number, or 'epoch'"),
        (lambda: Rounds(every="week"), "every is 'week'"),
        (lambda: Rounds(pool="test"), "pool is 'test'; it must be one of micro_dev, dev, both"),
        (lambda: Rounds(in_turn=2.5), "in_turn is 2.5; it must be at least 1 example, a whole number, or null for all"),
        (lambda: Rounds(patience=0), "patience is 0; it must be at least 1 round, a whole number, or null"),
        (lambda: preset("fast"), "preset is 'fast'; allowed: grasp, paper"),
        (lambda: Controller("paper"), r"policy is 'paper'; it must be a policy, such as GrpoPolicy\(\)"),
        (lambda: Controller(rule="mean"), "rule is 'mean'; allowed: surrogate, surrogate_at_end, best_reward"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_presets_are_policy_rounds_and_rule():
    assert set(PRESETS) == {"grasp", "paper"}
    on_dev = Rounds("epoch", at_ends=True, pool="dev", in_turn=7, patience=1)
    assert preset("grasp") == Controller() == Controller(GrpoPolicy(), on_dev, "surrogate")
    assert preset("grasp", dev=False) == ON_MICRO_DEV
    assert Controller(GrpoPolicy(), Rounds(25, at_ends=True, in_turn=8), "surrogate_at_end") == ON_MICRO_DEV
    for dev in (True, False):
        assert preset("paper", dev) == Controller(PaperPolicy(), Rounds(), "best_reward")
        assert preset(ON_MICRO_DEV, dev) is ON_MICRO_DEV
    rule = ratio_rule("surrogate")
    assert ratio_rule(rule) is ratio_rule("grasp_lora.method.surrogate:surrogate") is rule
    assert policy_class("grasp_lora.method.search:GrpoPolicy") is GrpoPolicy


@pytest.mark.parametrize(
    ("rounds", "rule", "pool", "examples"),
    [
        (Rounds(), "surrogate_at_end", 16, 16 + 4 * 16),
        (Rounds(in_turn=12), "surrogate_at_end", 50, 12 + 4 * 12),
        (Rounds(in_turn=12), "surrogate", 50, 50 + 4 * 12),
        (Rounds(in_turn=12, patience=1), "surrogate_at_end", 50, 50 + 4 * 12),
    ],
)
def test_a_baseline_needs_all_examples_where_rounds_are_compared(rounds, rule, pool, examples):
    assert Controller(rounds=rounds, rule=rule).probed_examples(pool) == examples
