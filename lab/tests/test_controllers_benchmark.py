"""The benchmark of controllers, on landscapes whose optimum is known: every figure here can be computed by hand."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import controllers as benchmark
import controllers_rivals
import numpy as np
import pytest
from landscape import Cost, FinalRun, Landscape, Trajectory

from grasp_lora.engine.steps import GRID
from grasp_lora.errors import GraspError
from grasp_lora.method.rules import Round
from grasp_lora.method.search import POLICIES, Controller, PaperPolicy, RatioSearch, Rounds, preset

BEST = 0.5
RATIOS = tuple(number / 20 for number in range(17))
STEPS = (0, 20, 40, 60, 80)
EXAMPLES = 4
Curve = Callable[[float | None, float, float], float]


FRACTIONS = benchmark.FRACTIONS


def paper(every: int = 10, patience: int | None = None, **changes: Any) -> Any:
    """The paper's preset with other rounds, and other settings of its policy."""
    policy = replace(preset("paper").policy, **changes)
    return benchmark.Plan(Controller(policy, Rounds(every, patience=patience), "best_reward"))


# Trains all ratios together, else the paper's: what the benchmark reads is seen apart from what preset grasp draws.
@dataclass(frozen=True)
class Together(PaperPolicy):
    regime = "each_step"


def together(**rounds: Any) -> Any:
    return benchmark.Plan(Controller(Together(), Rounds(40, at_ends=True, **rounds), "best_reward"))


def final_loss(ratio: float) -> float:
    return 1 + (ratio - BEST) ** 2


def landscape(curve: Curve, shared: bool = True, noise: float = 0.0) -> Landscape:
    """Micro-dev losses by `curve(train ratio, step, ratio)`; final runs that are best at 0.5, all of one cost."""
    random = np.random.default_rng(0)
    trajectories = []
    for train_ratio in (0.0, 0.4, 0.7, *([None] if shared else [])):
        losses = [[[curve(train_ratio, s, r) + e for e in range(EXAMPLES)] for r in RATIOS] for s in STEPS]
        noisy = np.array(losses) + random.normal(0, noise, (len(STEPS), len(RATIOS), EXAMPLES))
        trajectories.append(Trajectory(train_ratio, STEPS, RATIOS, noisy))
    finals = []
    for ratio in RATIOS:
        losses = {"micro_dev": (final_loss(ratio),) * EXAMPLES, "dev": (final_loss(ratio),) * 3, "test": (2.0, 2.0)}
        finals.append(FinalRun(ratio, 10, 10, losses, trained_examples=100, measured_examples=50))
    return Landscape({"trained_examples": 80, "examples": {"train": 40}}, tuple(trajectories), tuple(finals))


def rising(train_ratio: float | None, step: float, ratio: float) -> float:
    """While the network still learns, pruning more looks worse at once, whatever it is worth later."""
    return 1 + 0.3 * ratio


def telling(train_ratio: float | None, step: float, ratio: float) -> float:
    """The loss has its lowest point where the final loss has it."""
    return final_loss(ratio)


@pytest.fixture(scope="module")
def setting() -> Any:
    return benchmark.Setting("known", landscape(telling))


class TestRegret:
    def test_against_the_smooth_curve_and_the_best_run(self, setting: Any) -> None:
        assert setting.smooth["dev"].ratio == pytest.approx(BEST, abs=1e-3)
        for against in ("smooth", "recorded"):
            assert setting.regret(0.5, "dev", against) == pytest.approx(0.0, abs=1e-4)
            assert setting.regret(0.4, "dev", against) == pytest.approx(1.0, abs=1e-4)
            assert setting.regret(0.8, "dev", against) == pytest.approx(9.0, abs=1e-4)
            assert setting.regret(0.4, "test", against) == pytest.approx(0.0, abs=1e-4)

    def test_a_lucky_run_counts_in_one_of_them_only(self) -> None:
        whole = landscape(telling)
        lucky = replace(whole.finals[14], losses=whole.finals[14].losses | {"dev": (0.9,) * 3})
        spoiled = replace(whole, finals=(*whole.finals[:14], lucky, *whole.finals[15:]))
        one = benchmark.Setting("lucky", spoiled)
        assert one.regret(0.7, "dev", "recorded") == pytest.approx(0.0, abs=1e-9)
        assert one.regret(0.7, "dev", "smooth") > 1.0

    def test_the_range_is_that_of_the_default_policy(self, setting: Any) -> None:
        default = PaperPolicy()
        assert (setting.low, setting.high) == (default.ratio_min, default.ratio_max)
        early = replace(
            setting.landscape, finals=tuple(replace(one, ratio=one.ratio / 2) for one in setting.landscape.finals)
        )
        assert benchmark.Setting("early", early).high == pytest.approx(0.4)

    def test_a_landscape_without_the_facts_is_refused(self) -> None:
        with pytest.raises(GraspError, match="trained_examples"):
            benchmark.Setting("poor", replace(landscape(telling), facts={}))


class TestRivals:
    def test_a_fixed_ratio_costs_one_final_run(self, setting: Any) -> None:
        assert benchmark.fixed(0.4, setting, seed=0) == benchmark.Choice(0.4, Cost(100, 50))

    @pytest.mark.parametrize("split", ["dev", "micro_dev"])
    def test_the_grid_finds_the_best_of_eight_and_pays_for_all(self, split: str, setting: Any) -> None:
        assert benchmark.GRID == GRID
        assert benchmark.grid(split, setting, seed=0) == benchmark.Choice(0.5, Cost(800, 400))

    def test_the_micro_dev_grid_sees_the_examples_of_its_seed(self) -> None:
        whole = landscape(telling)
        # One example of four prefers the highest ratio so strongly that two copies of it decide.
        finals = tuple(
            replace(
                run,
                losses=run.losses | {"micro_dev": (*[final_loss(run.ratio)] * 3, final_loss(run.ratio) - run.ratio)},
            )
            for run in whole.finals
        )
        one = benchmark.Setting("uneven", replace(whole, finals=finals))
        chosen = {benchmark.grid("micro_dev", one, seed).ratio for seed in range(20)}
        assert len(chosen) > 1

    @pytest.mark.parametrize("name", benchmark.PROPOSERS)
    def test_a_proposer_takes_the_best_of_what_it_tried(self, name: str, setting: Any) -> None:
        trials, package, _ = benchmark.PROPOSERS[name]
        pytest.importorskip(package)
        for seed in range(3):
            tried = trials(setting, seed)
            assert all(setting.low <= ratio <= setting.high for ratio in tried)
            for budget in (2, 8):
                choice = benchmark.best_of(trials, budget, setting, seed)
                assert choice.ratio == min(tried[:budget], key=lambda ratio: abs(ratio - BEST))
                assert choice.cost == Cost(pytest.approx(budget * 100), pytest.approx(budget * 50))
        assert (trials(setting, 0) != trials(setting, 1)) == (name != "Brent's method")

    def test_brent_needs_few_runs_where_nothing_is_noisy(self, setting: Any) -> None:
        pytest.importorskip("scipy")
        choice = benchmark.best_of(benchmark.brent_trials, 4, setting, seed=0)
        assert choice.ratio == pytest.approx(BEST, abs=0.02)

    @pytest.mark.parametrize("rungs", [1, 2, 3])
    def test_halving_costs_what_it_says_and_keeps_the_better(self, rungs: int, setting: Any) -> None:
        choice = benchmark.halving(rungs, setting, seed=1)
        assert choice.cost.work == pytest.approx((rungs + 1) * (2 * 100 + 50))
        arms = [controllers_rivals.random.Random("halving/1")]
        tried = [arms[0].uniform(setting.low, setting.high) for _ in range(2**rungs)]
        assert choice.ratio == min(tried, key=lambda ratio: abs(ratio - BEST))

    def test_halving_is_misled_where_half_done_runs_are(self) -> None:
        one = benchmark.Setting("misled", landscape(rising))
        seeds = range(30)
        regrets = [one.regret(benchmark.halving(3, one, seed).ratio, "dev", "smooth") for seed in seeds]
        fair = benchmark.Setting("fair", landscape(telling))
        assert np.mean(regrets) > 5 * np.mean(
            [fair.regret(benchmark.halving(3, fair, s).ratio, "dev", "smooth") for s in seeds]
        )


class TestReplay:
    def test_a_reward_that_always_falls_with_the_ratio_sends_the_paper_policy_to_the_wrong_place(self) -> None:
        wrong, right = benchmark.Setting("wrong", landscape(rising)), benchmark.Setting("right", landscape(telling))
        learned = partial(benchmark.learned, paper())
        misled = [learned(wrong, seed).ratio for seed in range(10)]
        assert np.mean(misled) < 0.3
        assert np.mean([wrong.regret(ratio, "dev", "smooth") for ratio in misled]) > 4.0
        found = [learned(right, seed).ratio for seed in range(10)]
        assert np.mean([right.regret(ratio, "dev", "smooth") for ratio in found]) < 0.5

    @pytest.mark.parametrize("kind", POLICIES)
    def test_every_policy_finds_what_its_probes_show(self, kind: str, setting: Any) -> None:
        told = benchmark.Plan(Controller(POLICIES[kind](), Rounds(), "surrogate_at_end"))
        ratios = [benchmark.learned(told, setting, seed).ratio for seed in range(2)]
        assert max(setting.regret(ratio, "dev", "smooth") for ratio in ratios) < 0.5

    def test_the_cost_is_training_and_probes(self) -> None:
        one = landscape(telling)
        _, cost = benchmark.replay(one, paper(20, candidates=3), seed=0)
        assert cost == Cost(80, 4 * (1 + 3) * EXAMPLES)  # rounds after steps 20, 40, 60 and 80
        _, cost = benchmark.replay(one, paper(30, candidates=1), seed=0)
        assert cost == Cost(80, 2 * (1 + 1) * EXAMPLES)
        choice = benchmark.learned(paper(40), benchmark.Setting("one", one), 0)
        assert choice.cost.trained_examples == pytest.approx(180)
        assert choice.cost.measured_examples == pytest.approx(2 * 4 * EXAMPLES + 50)

    def test_rounds_may_follow_epochs(self) -> None:
        one = landscape(telling)  # two epochs of 40 steps
        found = [benchmark.replay(one, benchmark.plan_of(f"grasp_on_micro_dev,every={n}"), 0) for n in ("epoch", 40)]
        assert found[0] == found[1]
        assert found[0][1].measured_examples <= 3 * 5 * EXAMPLES  # rounds at 0, 40 and 80

    def test_a_run_may_end_when_no_ratio_gets_lower(self) -> None:
        rising_with_time = landscape(lambda train_ratio, step, ratio: 1 + step / 100 + (ratio - BEST) ** 2)
        _, cost = benchmark.replay(rising_with_time, paper(20, patience=2, candidates=1), seed=0)
        assert cost == Cost(60, 3 * 2 * EXAMPLES)  # the round after 20 steps is the best, those after 40 and 60 are not

    def test_candidates_that_coincide_are_measured_once(self) -> None:
        at_the_bound = paper(80, ratio_max=0.101, ratio_init=0.1, std_init=9.0, candidates=64)
        _, cost = benchmark.replay(landscape(telling), at_the_bound, seed=0)
        assert cost.measured_examples < 5 * EXAMPLES  # nearly all are clamped to one of the two bounds

    def test_the_dev_set_can_be_probed_a_few_examples_in_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told = watch(monkeypatch)
        plain = landscape(telling)
        own = np.arange(6.0)[None, None, :] * 100
        finals = tuple(replace(run, losses={**run.losses, "dev": (1.0,) * 6}) for run in plain.finals)
        on_dev = replace(plain.shared, losses=plain.shared.losses[:, :, :1] + own, split="dev")
        one = replace(plain, trajectories=(*plain.trajectories, on_dev), finals=finals)
        _, cost = benchmark.replay(one, together(pool="dev", in_turn=2), seed=0)
        seen = [tuple(round(loss / 100) for loss in measured.baseline_losses) for measured in told]
        assert len(seen) == 3
        assert all(len(number) == 2 for number in seen)
        assert sorted(sum(seen, ())) == list(range(6))  # each example once
        assert [measured.places for measured in told] == [(0, 1), (2, 3), (4, 5)]
        assert cost == Cost(80, 3 * 4 * 2)
        told.clear()
        _, cost = benchmark.replay(one, together(pool="dev", in_turn=2, patience=9), seed=0)
        assert [(len(measured.baseline_losses), len(measured.candidate_losses[0])) for measured in told] == [(6, 2)] * 3
        assert sorted(place for measured in told for place in measured.places or ()) == list(range(6))
        assert all(min(measured.rewards) > -50 for measured in told)  # on the same examples, whose levels are 100 apart
        assert cost == Cost(80, 3 * (6 + 3 * 2))
        told.clear()
        benchmark.replay(one, together(pool="both"), seed=0)
        assert {len(measured.baseline_losses) for measured in told} == {6 + EXAMPLES}
        with pytest.raises(GraspError, match="no shared trajectory on dev"):
            benchmark.replay(plain, together(pool="dev"), seed=0)

    def test_a_round_is_what_the_network_at_the_current_ratio_shows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told = watch(monkeypatch)
        one = landscape(lambda train_ratio, step, ratio: 10 * (train_ratio or 0) + step / 100 - ratio)
        estimate, _ = benchmark.replay(one, paper(20, ratio_init=0.4), seed=3)
        assert len(told) == 4
        assert told[0].current_ratio == 0.4
        assert len({measured.current_ratio for measured in told}) > 1  # it committed
        drawn = benchmark.drawn_examples(one, 3)
        for number, measured in enumerate(told, start=1):
            for ratio, losses in zip(
                (measured.current_ratio, *measured.candidates),
                (measured.baseline_losses, *measured.candidate_losses),
                strict=True,
            ):
                level = 10 * min(measured.current_ratio, 0.7) + 0.2 * number
                assert losses == pytest.approx([level - ratio + example for example in drawn])
        assert 0.1 <= estimate.ratio <= 0.8

    def test_a_policy_that_holds_no_ratio_reads_the_shared_trajectory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told = watch(monkeypatch)
        one = landscape(lambda train_ratio, step, ratio: 100.0 if train_ratio is None else 1.0)
        benchmark.replay(one, together(), seed=0)
        assert min(min(measured.baseline_losses) for measured in told) >= 100
        with pytest.raises(GraspError, match="no shared trajectory"):
            benchmark.replay(landscape(telling, shared=False), together(), seed=0)

    def test_a_seed_decides_policy_and_examples(self) -> None:
        one = landscape(telling, noise=0.05)
        estimates = [benchmark.replay(one, paper(), seed)[0] for seed in (0, 0, 1)]
        assert estimates[0] == estimates[1] != estimates[2]
        drawn = [benchmark.drawn_examples(one, seed).tolist() for seed in range(5)]
        assert len({tuple(one) for one in drawn}) > 1
        assert all(len(one) == EXAMPLES and max(one) < EXAMPLES for one in drawn)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Round]:
    """Keep what a search is told."""
    told: list[Round] = []
    tell = RatioSearch.tell

    def kept(self: RatioSearch, measured: Round) -> Any:
        told.append(measured)
        return tell(self, measured)

    monkeypatch.setattr(RatioSearch, "tell", kept)
    return told


class TestFigures:
    def test_by_hand(self, setting: Any) -> None:
        worse = benchmark.Setting("worse", landscape(telling))
        choice = benchmark.Choice
        choices = [
            [choice(0.4, Cost(10, 5)), choice(0.6, Cost(10, 5))],
            [choice(0.3, Cost(30, 5)), choice(0.3, Cost(30, 5))],
        ]
        row = benchmark.figures([setting, worse], choices)
        regret = row["regret_percent"]["dev_smooth"]
        assert regret["by_setting"] == pytest.approx([1.0, 4.0], abs=1e-4)
        assert regret["mean"] == pytest.approx(2.5, abs=1e-4)
        assert (regret["low"], regret["high"]) == pytest.approx((1.0, 4.0), abs=1e-4)  # both are drawn, or one twice
        assert row["ratio_sd_by_setting"] == pytest.approx([0.1, 0.0])
        assert row["ratio_sd"] == pytest.approx(0.05)
        assert (row["trained_examples"], row["measured_examples"], row["work"]) == pytest.approx((20, 5, 45))
        assert row["share_of_grid"] == pytest.approx(45 / (8 * 250))

    def test_the_interval_covers_settings_and_seeds(self) -> None:
        random = np.random.default_rng(0)
        between, within = random.normal(size=(6, 1)), random.normal(size=(6, 50))
        low, high = benchmark.interval(between + 0 * within)
        assert low < between.mean() < high
        assert benchmark.interval(np.ones((3, 4))) == (1.0, 1.0)
        narrow = benchmark.interval(0 * between + within)
        assert 0 < narrow[1] - narrow[0] < high - low

    def test_all_contestants_stand_in_both_tables(self, setting: Any) -> None:
        on_dev = replace(setting.landscape.shared, split="dev", losses=setting.landscape.shared.losses[:, :, :3])
        whole = replace(setting.landscape, trajectories=(*setting.landscape.trajectories, on_dev))
        rivals, left_out = benchmark.contestants([benchmark.Setting("whole", whole)], ["paper,kind=grpo,candidates=2"])
        own = {*benchmark.TITLES.values(), "paper,kind=grpo,candidates=2"}
        assert own | {"fixed 0.4"} <= set(rivals)
        few = {name: rivals[name] for name in ("preset paper", "fixed 0.4")}
        found = json.loads(json.dumps(benchmark.judge([setting], few, seeds=2)))
        text = benchmark.merit_tables(found)
        assert text.count("| preset paper |") == text.count("| fixed 0.4 |") == 2
        assert "| fixed 0.4 | 1.00 (1.00 to 1.00) |" in text
        assert "at 0.50" in text
        assert {"CMA-ES, 4 final runs", "Brent's method, 4 final runs"} <= set(rivals)
        assert not left_out

    def test_a_smaller_micro_dev_set_costs_less(self, setting: Any) -> None:
        costs = [benchmark.learned(replace(paper(), size=size), setting, 0).cost for size in (None, 2)]
        final = setting.landscape.final_cost(BEST).measured_examples
        assert costs[1].measured_examples - final == (costs[0].measured_examples - final) / 2  # two of four examples
        assert costs[1].trained_examples == costs[0].trained_examples

    def test_policies_are_left_out_where_they_cannot_be_replayed(self) -> None:
        for shared, missing in (
            (False, {"grasp", "grasp_on_micro_dev", "even"}),
            (True, {"grasp", "even"}),
        ):  # none on dev
            one = benchmark.Setting("unshared", landscape(telling, shared))
            rivals, left_out = benchmark.contestants([one])
            titles = {benchmark.TITLES[name] for name in missing}
            assert set(benchmark.TITLES.values()) - set(rivals) == titles
            assert {line.partition(" is left out: not every")[0] for line in left_out} == titles

    def test_a_policy_is_a_controller_with_changes(self) -> None:
        told = benchmark.plan_of("grasp,candidates=2,turn=5,patience=null,every=20,rule=best_reward,size=3")
        assert told.controller == Controller(
            replace(preset("grasp").policy, candidates=2),
            Rounds(20, at_ends=True, pool="dev", in_turn=5),
            "best_reward",
        )
        assert told.size == 3
        assert benchmark.plan_of("paper,kind=grpo,at_ends=true").controller.policy == preset("grasp").policy

    def test_even_proposals_are_evenly_spaced_and_hold_no_ratio(self) -> None:
        search, drawn = RatioSearch(benchmark.Even(candidates=4), "surrogate"), []
        for rounds in range(10):
            search.history = [None] * rounds  # type: ignore[list-item]
            candidates = search.ask()
            assert np.diff(candidates) == pytest.approx([0.7 / 4] * 3)
            drawn += candidates
        assert len({round(ratio, 3) for ratio in drawn}) == 40
        assert np.diff(sorted([0.1, *drawn, 0.8])).max() < 0.05

    @pytest.mark.parametrize(
        "text",
        [
            "nothing",
            "paper,candidates",
            "paper,candidates=0",
            "paper,colour=1",
            "spread",
            "grasp,every=0",
            "grasp,pool=test",
            "grasp,max_step=0.1",
            "paper,kind=grid",
            "paper,pool=dev",
            "paper,patience=epoch",
            "grasp,size=0",
            "grasp,rule=mean",
        ],
    )
    def test_a_policy_that_is_none(self, text: str) -> None:
        with pytest.raises(GraspError, match="--policy"):
            benchmark.plan_of(text)


class TestSignals:
    def test_rank_correlation(self) -> None:
        assert benchmark.spearman([1, 2, 3, 4], [10, 20, 30, 99]) == pytest.approx(1.0)
        assert benchmark.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
        assert benchmark.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
        assert benchmark.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
        assert benchmark.spearman([1, 1, 1], [1, 2, 3]) == 0.0

    def test_of_the_past_by_hand(self) -> None:
        curves = np.array([[4.0, 0.0], [2.0, 8.0], [6.0, 1.0], [0.0, 3.0]])
        expected = {
            "immediate": curves,
            "running mean": [[4, 0], [3, 4], [4, 3], [3, 3]],
            "running minimum": [[4, 0], [2, 0], [2, 0], [0, 0]],
            "mean of the late half": [[4, 0], [2, 8], [4, 4.5], [3, 2]],
        }
        assert list(benchmark.SIGNALS) == list(expected)
        for name, rule in benchmark.SIGNALS.items():
            assert rule(curves) == pytest.approx(np.array(expected[name])), name

    def test_a_blind_phase_shows(self) -> None:
        """First the loss rises with the ratio, later it is the final loss; only the dense network stays blind."""

        def curve(train_ratio: float | None, step: float, ratio: float) -> float:
            return rising(None, step, ratio) if step < 40 or train_ratio == 0.0 else telling(None, step, ratio)

        found = benchmark.judge_signals([benchmark.Setting("phases", landscape(curve))])
        half = found["fractions"].index(0.5)
        late = found["signals"]["trained at 0.4 / immediate"]["phases"]
        assert late["spearman"][-1] == pytest.approx(1.0)
        assert late["spearman"][0] < 0.0
        assert late["regret_percent"][0] == pytest.approx(16.0, abs=0.01)  # at 0.1
        assert late["regret_percent"][half:] == pytest.approx([0.0] * (len(FRACTIONS) - half), abs=0.01)
        blind = found["signals"]["trained at 0 / immediate"]["phases"]
        assert blind["ratio"] == pytest.approx([0.1] * len(FRACTIONS))
        own = found["signals"]["own / immediate"]["phases"]
        assert own["regret_percent"][-1] < 1.0
        text = benchmark.signal_tables(found)
        assert text.count("| shared / running mean |") == 3
        assert "| trained at 0.4 / immediate | 16.00 |" in text


class TestCommand:
    def run(self, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["controllers.py", *map(str, arguments)])
        return int(benchmark.main())

    def test_writes_tables_and_figures(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "first").mkdir()
        files = [tmp_path / "first" / "landscape.parquet", tmp_path / "second.parquet"]
        for file in files:
            landscape(telling).save(file)
        monkeypatch.setattr(
            benchmark, "contestants", lambda *_: ({"fixed 0.4": partial(benchmark.fixed, 0.4)}, ["Left out."])
        )
        assert self.run(monkeypatch, *files, "--seeds", 2, "--output", tmp_path / "out.json") == 0
        text = capsys.readouterr().out
        assert "| contestant | first | second |" in text
        assert "Left out." in text
        found = json.loads((tmp_path / "out.json").read_text())
        assert found["contestants"]["fixed 0.4"]["ratios"] == [[0.4, 0.4], [0.4, 0.4]]
        assert self.run(monkeypatch, files[1], "--signals") == 0
        assert "Rank correlation" in capsys.readouterr().out

    def test_says_in_one_line_what_is_wrong(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(monkeypatch, tmp_path / "nothing.parquet") == 2
        assert capsys.readouterr().err.count("\n") == 1
        landscape(telling).save(tmp_path / "one.parquet")
        assert self.run(monkeypatch, tmp_path / "one.parquet", tmp_path / "one.parquet") == 2
        assert "same name" in capsys.readouterr().err
        # known only when the policy is replayed: nothing was measured on dev
        assert self.run(monkeypatch, tmp_path / "one.parquet", "--policy", "grasp,pool=both", "--seeds", 1) == 2
        assert capsys.readouterr().err.startswith("error: a landscape has no shared trajectory on dev")
