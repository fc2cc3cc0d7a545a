"""The paired bootstrap: by hand, against a slow implementation, and on data whose truth is known."""

import math
import random
import statistics
from typing import Any

import pytest
import torch
from scipy import stats

from grasp_lora.engine.comparison import expected_width
from grasp_lora.errors import DataError
from grasp_lora.evaluation.metrics import METRICS, score
from grasp_lora.evaluation.statistics import PairedComparison, compare_all_pairs, compare_with_baselines, half_width


def normal(count: int, seed: int, mean: float = 0.0) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(mean, 1.0) for _ in range(count)]


def compared(ours: Any, theirs: Any, **settings: Any) -> PairedComparison:
    """Against a single baseline, so without correction."""
    return compare_with_baselines(ours, {"theirs": theirs}, **settings)["theirs"]


def mean_of_first(sums: torch.Tensor) -> torch.Tensor:
    return sums[..., 0] / sums[..., 1]


def test_known_answer_of_two_examples():
    # Differences 1 and 3: a draw gives 1, 2 or 3 with shares 1/4, 1/2, 1/4, which is all inside of Student's interval.
    result = compared([3.0, 5.0], [2.0, 2.0], resamples=999)
    assert (result.low, result.high) == pytest.approx((2 - 12.706, 2 + 12.706), rel=0.05)
    assert result == PairedComparison(2.0, result.low, result.high, confidence=0.95, examples=2, resamples=999)
    assert result.verdict == "no difference shown"


def test_rounding_makes_no_winner_of_a_tie():
    result = compared([[0.1, 0.1], [0.2, 0.2]], [[0.3, 0.3], [0.0, 0.0]])  # equal once averaged
    assert (result.difference, result.verdict) == (0, "no difference shown")
    same = compared([[0.1, 0.1], [0.2, 0.2]], [[0.2, 0.2], [0.1, 0.1]], seed=1)
    assert same.by_run == (-0.1, 0.1)


def test_agrees_with_a_slow_implementation():
    ours = [normal(25, seed, 0.3) for seed in (1, 2, 3)]
    theirs = [normal(25, seed) for seed in (4, 5)]
    fast = compared(ours, theirs, resamples=4000)
    differences = [
        statistics.fmean(run[i] for run in ours) - statistics.fmean(run[i] for run in theirs) for i in range(25)
    ]
    drawn = torch.randint(25, (4000, 25), generator=torch.Generator().manual_seed(0)).tolist()
    slow = sorted(statistics.fmean(differences[i] for i in draw) for draw in drawn)
    center = statistics.fmean(differences)
    low, high, spread = [], [], statistics.pstdev(slow)
    for rank in range(1999):
        tail = (rank + 1) / 4001
        student = -stats.t.ppf(tail, 24) * math.sqrt(25 / 24)
        widened = [student / stats.norm.ppf(tail) * (slow[place] - center) for place in (rank, -1 - rank)]
        low.append(center - max(widened[0], student * spread))
        high.append(center + max(-widened[1], student * spread))
    # 100 of 4001 draws, the bound included, lie beyond each bound. Then the runs: three of ours, two of theirs.
    variances = [statistics.pvariance(slow) * 25 / 24, *(
        statistics.variance([statistics.fmean(run) for run in runs]) / len(runs) for runs in (ours, theirs)
    )]  # fmt: skip
    freedom = sum(variances) ** 2 / sum(of**2 / df for of, df in zip(variances, (24, 2, 1), strict=True))
    tail = 0.025
    wider = stats.t.ppf(tail, freedom) * math.sqrt(sum(variances)) / stats.t.ppf(tail, 24) / math.sqrt(variances[0])
    bounds = [center + wider * (bound - center) for bound in (low[99], high[99])]
    assert (fast.difference, fast.low, fast.high) == pytest.approx((center, *bounds), abs=1e-8)
    assert fast.by_run == ()  # not as many


def interval_of(differences: list[float], seed: int = 0) -> PairedComparison:
    """Runs that differ from the others by so much on average, on 200 rows."""
    rows = normal(200, seed)
    theirs = [normal(200, seed + 10 + run) for run in range(len(differences))]
    ours = [
        [value + other + gap - statistics.fmean(rows) for value, other in zip(rows, run, strict=True)]
        for run, gap in zip(theirs, differences, strict=True)
    ]
    return compared(ours, theirs, resamples=2000)


def test_an_interval_holds_the_spread_of_the_runs():
    alike, apart = interval_of([0.5, 0.5, 0.5]), interval_of([1.1, 0.3, 0.1])
    assert alike.by_run == pytest.approx((0.5, 0.5, 0.5))
    assert apart.by_run == pytest.approx((1.1, 0.3, 0.1))
    assert alike.difference == pytest.approx(apart.difference) == pytest.approx(0.5)
    assert (alike.verdict, apart.verdict) == ("better", "no difference shown")
    assert alike.high - alike.low == pytest.approx(2 * half_width(1.0, 200), rel=0.1)
    once = interval_of([0.5])
    assert once.by_run == ()
    assert (once.low, once.high) == pytest.approx((alike.low, alike.high), abs=0.03)


@pytest.mark.parametrize("gaps", [[5.0, -0.1], [100.0, -1e-3], [-3.0, 0.01]])
def test_two_runs_that_disagree_in_sign_never_show_a_difference(gaps: list[float]):
    assert interval_of(gaps).verdict == "no difference shown"


def test_rows_that_all_agree_leave_the_spread_of_the_runs():
    result = compared([[1.0] * 20, [3.0] * 20], [[0.0] * 20, [0.0] * 20])
    assert (result.low, result.high) == pytest.approx((2 - 12.706, 2 + 12.706), abs=0.01)


def test_the_runs_of_a_corpus_score_count_by_their_own_scores():
    ours = [[[2.0, 1.0]] * 10, [[4.0, 1.0]] * 10]
    result = compared(ours, [[[1.0, 1.0]] * 10] * 2, corpus_score=mean_of_first)
    assert result.by_run == (1.0, 3.0)
    assert result.verdict == "no difference shown"


def test_the_interval_of_normal_differences_is_students():
    ours, theirs = normal(12, 3, 0.5), normal(12, 4)
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    result = compare_with_baselines(ours, {str(name): theirs for name in range(20)}, resamples=100_000)["0"]
    reach = stats.t.ppf(1 - 0.025 / 20, 11) * statistics.stdev(differences) / math.sqrt(12)
    assert (result.high - result.low) / 2 == pytest.approx(reach, rel=0.15)


def test_swapping_the_methods_turns_the_result_round():
    ours, theirs = normal(40, 1, 0.4), normal(40, 2)
    one, other = compared(ours, theirs), compared(theirs, ours)
    assert (one.difference, one.low, one.high) == (-other.difference, -other.high, -other.low)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    covered = found = 0
    for seed in range(300):
        result = compared(normal(50, 2 * seed, 0.2), normal(50, 2 * seed + 1), resamples=600, seed=seed)
        covered += result.low <= 0.2 <= result.high
        null = compared(normal(50, 2 * seed), normal(50, 2 * seed + 1), resamples=600, seed=seed)
        found += null.verdict != "no difference shown"
    assert 0.90 <= covered / 300 <= 0.98
    assert found / 300 <= 0.10


def test_many_equal_methods_seldom_look_different():
    families = 0
    for seed in range(60):
        baselines = {str(other): normal(40, 1000 * seed + other) for other in range(1, 11)}
        results = compare_with_baselines(normal(40, 1000 * seed), baselines, resamples=1500, seed=seed)
        families += any(result.verdict != "no difference shown" for result in results.values())
    assert families <= 8  # 5 % of 60 is 3; without correction about 15 families would


def test_systems_that_are_alike_get_a_verdict_in_at_most_one_of_twenty_judgements():
    """Answers that are right, half right or wrong, in groups whose rows are alike; three systems, so three pairs."""
    judgements, wrong = 200, 0
    for seed in range(judgements):
        draw = random.Random(seed)
        hardness = [draw.random() for _ in range(20)]
        values = {
            name: [50.0 * sum(draw.random() > hardness[row // 3] for _ in range(2)) for row in range(60)]
            for name in "abc"
        }
        results = compare_all_pairs(values, groups=[row // 3 for row in range(60)], resamples=400, seed=seed)
        wrong += any(result.verdict != "no difference shown" for result in results.values())
    assert wrong <= 0.05 * judgements


def test_every_pair_has_the_interval_of_its_own_correction():
    values = {name: normal(40, seed, 0.6 * seed) for seed, name in enumerate("abc")}
    results = compare_all_pairs(values)
    assert list(results) == [("a", "b"), ("a", "c"), ("b", "c")]
    alone = compare_with_baselines(values["b"], {"c": values["c"]}, confidence=1 - 0.05 / 3)["c"]
    assert (results["b", "c"].low, results["b", "c"].high) == (alone.low, alone.high)
    assert results["a", "c"].verdict == "worse"
    assert {result.comparisons for result in results.values()} == {3}


def test_many_systems_have_intervals_too():
    values = {name: normal(12, name, 0.0) for name in range(24)}  # 276 pairs, whose tails 10,000 draws do not reach
    results = compare_all_pairs(values)
    assert len(results) == 276
    assert all(result.low <= result.difference <= result.high for result in results.values())


@pytest.mark.parametrize("examples", [2, 10])
def test_few_examples_seldom_make_equal_methods_look_different(examples):
    families = 0
    for seed in range(60):
        baselines = {str(other): normal(examples, 1000 * seed + other) for other in range(1, 24)}
        results = compare_with_baselines(normal(examples, 1000 * seed), baselines, resamples=2000, seed=seed)
        families += any(result.verdict != "no difference shown" for result in results.values())
    assert families <= 7  # 5 % of 60 is 3; without widening 60, 41, 16 and 4


@pytest.mark.parametrize(
    ("examples", "baselines", "verdict"),
    [
        (2, 1, "no difference shown"), (5, 1, "no difference shown"), (6, 1, "better"),
        (9, 20, "no difference shown"), (10, 20, "better"),
    ],
)  # fmt: skip
def test_a_handful_of_examples_shows_nothing_even_where_all_agree(examples, baselines, verdict):
    others = {str(number): [0.0] * examples for number in range(baselines)}
    result = compare_with_baselines([100.0] * examples, others)["0"]
    assert result.verdict == verdict
    assert (result.difference, result.high) == (100.0, 100.0)
    assert result.low == (100.0 if verdict == "better" else 0.0)
    exact = stats.binomtest(examples, examples).pvalue * baselines  # by signs, after Bonferroni
    assert (exact <= 0.05) == (verdict == "better")
    worse = compare_with_baselines([0.0] * examples, {name: [100.0] * examples for name in others})["0"]
    assert (worse.low, worse.high) == (-result.high, -result.low)


def test_correction_for_the_number_of_methods():
    ours, close, far = normal(60, 1, -0.2), normal(60, 2), normal(60, 3, -2.0)
    alone = compared(ours, close)
    both = compare_with_baselines(ours, {"close": close, "far": far})
    assert list(both) == ["close", "far"]
    assert both["close"].comparisons == 2
    assert (
        both["close"].low < alone.low < alone.difference == both["close"].difference < alone.high < both["close"].high
    )
    # Two methods at 95 % have the intervals of one at 97.5 %, from the same draws.
    single = compared(ours, close, confidence=0.975)
    assert (both["close"].low, both["close"].high) == (single.low, single.high)


def test_a_mean_through_statistics_equals_the_mean():
    ours, theirs = [normal(30, seed, 0.3) for seed in (1, 2)], [normal(30, 3)]
    rows = [[[[value, 1.0] for value in run] for run in runs] for runs in (ours, theirs)]
    plain, through = compared(ours, theirs), compared(*rows, corpus_score=mean_of_first)
    assert (through.difference, through.low, through.high) == pytest.approx((plain.difference, plain.low, plain.high))
    assert compared(rows[0], rows[1][0], corpus_score=mean_of_first) == through  # a single run, bare


def test_bleu_is_computed_again_for_each_draw_and_averaged_over_runs():
    references = [["the cat sat on the mat"], ["a dog ran in the park today"], ["we saw two birds on a tree"]]
    answers = {
        "first": ["the cat sat on the mat", "a dog ran in a park", "we saw birds"],
        "second": ["the cat sat on a mat", "a dog ran in the park today", "we saw two birds on a roof"],
        "theirs": ["the cat is on the mat", "the dog ran in a park", "we saw two birds on trees"],
    }
    scores = {name: score(["bleu"], texts, references, "en")["bleu"] for name, texts in answers.items()}
    result = compared(
        [scores["first"].statistics, scores["second"].statistics],
        [scores["theirs"].statistics],
        corpus_score=METRICS["bleu"].from_statistics,
    )
    ours = (scores["first"].value + scores["second"].value) / 2
    assert result.difference == pytest.approx(ours - scores["theirs"].value, abs=1e-8)
    # Slowly, over all 27 equally likely draws of three examples.
    possible = []
    for drawn in ((a, b, c) for a in range(3) for b in range(3) for c in range(3)):
        values = {
            name: score(["bleu"], [texts[i] for i in drawn], [references[i] for i in drawn], "en")["bleu"].value
            for name, texts in answers.items()
        }
        possible.append((values["first"] + values["second"]) / 2 - values["theirs"])
    student = stats.t.ppf(0.975, 2) * math.sqrt(3 / 2)
    widening, reach = student / stats.norm.ppf(0.975), student * statistics.pstdev(possible)
    low = result.difference - max(reach, widening * (result.difference - min(possible)))
    high = result.difference + max(reach, widening * (max(possible) - result.difference))
    assert (result.low, result.high) == pytest.approx((low, high), rel=0.03)
    assert result.verdict == "no difference shown"


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([1.0], [1.0], "at least 2 test examples"),
        ([1.0, float("nan")], [1.0, 2.0], "values of ours .* finite"),
        ([1.0, 2.0], [1.0, float("inf")], "values of grid .* finite"),
        ([[[1.0], [2.0]]], [1.0, 2.0], "the values of ours have shape"),
    ],
)
def test_what_cannot_be_compared_is_an_error(ours, theirs, message):
    with pytest.raises(DataError, match=message):
        compare_with_baselines(ours, {"grid": theirs})


def test_what_is_not_looked_at_together_is_taken_alone():
    generator = torch.Generator().manual_seed(5)
    ours, *others = torch.randn(6, 60, generator=generator).tolist()
    names = dict(zip("abcde", others, strict=True))
    found = compare_with_baselines(ours, names, together=("a", "b", "nowhere"))
    both = compare_with_baselines(ours, {name: names[name] for name in "ab"})
    assert {name: found[name] for name in "ab"} == both
    for name in "cde":
        assert found[name] == compare_with_baselines(ours, {name: names[name]})[name]
    assert {name: one.comparisons for name, one in found.items()} == {"a": 2, "b": 2, "c": 1, "d": 1, "e": 1}


def test_the_half_width_foretold_is_that_of_the_bootstrap():
    differences = torch.randn(400, generator=torch.Generator().manual_seed(1)).mul(26.0)
    zeros = {str(number): [0.0] * 400 for number in range(3)}
    found = compare_with_baselines(differences.tolist(), zeros)["0"]
    assert half_width(float(differences.std()), 400, 3) == pytest.approx((found.high - found.low) / 2, rel=0.06)


def test_few_groups_and_fewer_seeds_foretell_wider_intervals():
    assert half_width(26.0, 100, groups=5) > 1.3 * half_width(26.0, 100)

    def reach(**given: int) -> float:
        return float(str(expected_width(["f1"], 400, 3, **given)).split("about ")[1].split()[0])

    assert reach(seeds=1) == pytest.approx(1.3 * reach(seeds=3), abs=0.1)
    assert reach(seeds=3) < reach(seeds=2) < reach(seeds=1)
    assert reach(groups=4) > reach(groups=400) == reach()


def test_a_classification_is_foretold_by_its_accuracy():
    found = str(expected_width(["accuracy", "macro_f1"], 400, 3))
    assert found.startswith(
        "intervals of accuracy will reach about 4.0 points to each side (400 test examples, 3 comparisons"
    )
    assert expected_width(["chrf"], 400, 3) is None


class TestGroups:
    """Examples that belong together are drawn together."""

    def test_examples_in_groups_of_their_own_are_drawn_as_without_groups(self):
        ours, theirs = normal(30, 1, 0.4), normal(30, 2)
        assert compared(ours, theirs, groups=[f"g{number}" for number in range(30)]) == compared(ours, theirs)

    @pytest.mark.parametrize("copies", [2, 5])
    def test_copies_of_examples_tell_nothing_new(self, copies):
        ours, theirs = normal(20, 3, 0.5), normal(20, 4)
        alone, groups = compared(ours, theirs), [number for number in range(20) for _ in range(copies)]
        many = compared(*([one for one in values for _ in range(copies)] for values in (ours, theirs)), groups=groups)
        assert (many.difference, many.low, many.high) == pytest.approx((alone.difference, alone.low, alone.high))
        assert many.examples == 20 * copies

    def test_the_interval_covers_the_truth_where_examples_of_a_group_are_alike(self):
        covered = {True: 0, False: 0}
        groups = [number for number in range(40) for _ in range(4)]
        for seed in range(150):
            own, shared = normal(160, seed), normal(40, 1000 + seed)
            apart = [one + shared[group] for one, group in zip(own, groups, strict=True)]
            for known in covered:
                found = compared(apart, [0.0] * 160, groups=groups if known else None, resamples=400, seed=seed)
                covered[known] += found.low <= 0.0 <= found.high
        assert covered[True] >= 137  # 142.5 are expected
        assert covered[False] <= 125

    def test_a_single_group_shows_nothing(self):
        found = compared([3.0, 2.0, 4.0, 3.0, 4.0, 3.0, 5.0, 6.0], [1.0] * 8, groups=["a"] * 8)
        assert found.verdict == "no difference shown"
