"""The speed benchmark on a tiny model, by a clock that counts forward passes: every ratio can be worked out by hand."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import busy
import pytest
import speed
import speed_figures
import speed_lab
import torch

from grasp_lora.errors import GraspError
from grasp_lora.method.search import preset
from grasp_lora.models import generation
from grasp_lora.recipes.load import load_recipe

BENCHMARKS = Path(__file__).parents[1]

MICRO_DEV, PROBE_EVERY, CANDIDATES = 4, 3, 3  # of tiny.yaml and the policy below
A_ROUND = (CANDIDATES + 1) * MICRO_DEV
OVERRIDES = (
    "controller.preset=paper",
    "controller.rule=best_reward",
)


@pytest.fixture
def lab(tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[speed_lab.Lab]:
    """A lab whose clock shows how many examples have gone through the decoder; none shares its beginning with another."""
    monkeypatch.setattr(generation, "_groups", lambda prompts, _: [([place], 0) for place in range(len(prompts))])
    recipe, base = load_recipe("tiny.yaml", OVERRIDES)
    passed = 0

    def count(_: torch.nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal passed
        passed += len(named["input_ids"])

    stages = {name: speed.stage_of(recipe, name) for name in ("paper", "grasp")}
    lab = speed_lab.Lab(recipe, base, ["tiny.yaml"], examples=6, pairs=1, stages=stages, now=lambda: passed)
    handle = lab.session.backbone.model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    yield lab
    handle.remove()


def ratios(rows: list[speed_figures.Row]) -> dict[str, float]:
    """The ratio by what it is of; each turn of a counting clock is alike."""
    assert all(one.lowest == one.ratio == one.highest for one in rows)
    return {one.name: one.ratio for one in rows}


class TestFigures:
    def test_ratios_are_taken_turn_by_turn(self) -> None:
        one = speed_figures.row("part", "name", [2.0, 9.0, 4.0], [1.0, 3.0, 1.0], unit="MB", note="so")
        assert (one.ratio, one.lowest, one.highest, one.reference) == (3.0, 2.0, 4.0, 1.0)
        assert "| part | name | 3.000 | 2.000 to 4.000 | 1 MB | so |" in speed_figures.table([one])

    def test_turns_alternate_and_the_warm_up_does_not_count(self) -> None:
        done: list[str] = []

        def work(name: str) -> Callable[[], int]:
            return lambda: done.append(name) or len(done)  # type: ignore[func-returns-value]

        results = speed_figures.take_turns({"a": work("a"), "b": work("b")}, 2)
        assert "".join(done) == "ab" + "ab" + "ba"
        assert results == {"a": [3, 6], "b": [4, 5]}

    def test_a_computed_row_says_so(self) -> None:
        one = speed_figures.row("end", "name", [1.0], [1.0], computed=True)
        assert "computed from measured parts, not run" in speed_figures.table([one])

    def test_a_child_that_fails_is_an_error_with_its_last_line(self) -> None:
        with pytest.raises(GraspError, match=r"ended with status 3: so it is"):
            speed_figures.child(["-c", "import sys; sys.stderr.write('first\\nso it is\\n'); sys.exit(3)"])

    def test_peak_memory_is_that_of_the_process_itself(self) -> None:
        command = (
            f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); from speed_figures import peak_megabytes; "
            "before = peak_megabytes(); x = bytearray(200 * 2**20); x[::4096] = bytes(len(x) // 4096); "
            "print(before, peak_megabytes())"
        )
        own = bytearray(200 * 2**20)
        own[::4096] = bytes(len(own) // 4096)
        before, after = map(float, speed_figures.child(["-c", command])[1].split())
        assert 190 < after - before < 220
        assert before < speed_figures.peak_megabytes() - 190  # nothing of the process that started it

    @pytest.mark.parametrize(
        ("names", "shapes", "kind"),
        [
            (["aten::mm"], [[5, 32], [32, 64]], "matrix products"),
            (["aten::mm"], [[5, 32], [32, 260]], "head and loss"),
            (["aten::_log_softmax"], [[5, 260]], "head and loss"),
            (["aten::index_select", "aten::embedding"], [[260, 32]], "elementwise and copies"),
            (["aten::mul", "Optimizer.step#AdamW.step"], [[8, 32]], "optimizer"),
            (["aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"], [[5, 8]], "attention"),
            (["aten::bmm"], [[4, 5, 8]], "attention"),
            (["aten::copy_", "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"], [], "data"),
            (["aten::add"], [[5, 32]], "elementwise and copies"),
            (["autograd::engine::evaluate_function: MmBackward0"], None, "other"),
        ],
    )
    def test_kinds_of_operations(self, names: list[str], shapes: list[list[int]] | None, kind: str) -> None:
        event = None
        for name in reversed(names):
            event = SimpleNamespace(name=name, cpu_parent=event, input_shapes=shapes)
        assert speed_figures.kind_of(event, vocabulary=260) == kind

    def test_a_profile_shares_out_all_the_time(self) -> None:
        weight = torch.ones(64, 64)
        shares = speed_figures.profile(lambda: (weight @ weight).exp(), vocabulary=260)
        assert sum(shares.values()) == pytest.approx(1.0)
        assert shares["matrix products"] > 0
        assert "| matrix products |" in speed_figures.share_table(shares)


class TestMeasures:
    def test_a_step_and_a_probe_need_no_forward_pass_more(self, lab: speed_lab.Lab) -> None:
        assert ratios(speed.step(lab)) == {"fine-tune / bare loop, 6 examples": 1.0}
        assert ratios(speed.probe(lab)) == {"probe / pure forward, 4 examples": 1.0}

    def test_the_size_of_a_batch_changes_no_count(self, lab: speed_lab.Lab) -> None:
        found = ratios(speed.batches(lab))
        assert found == {f"{one} / 2048 tokens a batch, 8 examples": 1.0 for one in speed.BUDGETS}

    def test_controller_runs_are_compared_with_the_training_alone(self, lab: speed_lab.Lab) -> None:
        lab.pairs = 2
        found = ratios(speed.controller(lab))
        for name, before in (("paper", 0), ("grasp", 1)):  # rounds before the first step, and as many after the tenth
            a_round = (1 + preset(name).policy.candidates) * MICRO_DEV
            rounds = before + 6 // PROBE_EVERY
            size = f"6 examples, {rounds} rounds"
            assert found[f"controller run ({name}) / training without, {size}"] == (6 + rounds * a_round) / 6
            share = rounds * a_round / (6 + rounds * a_round)
            assert found[f"its rounds / controller run ({name}), {size}"] == share
            whole = 10 + (2 * before + 10 // PROBE_EVERY) * a_round  # ten training examples, one epoch
            assert found[f"controller run ({name}) / training without, all epochs"] == pytest.approx(whole / 10)
            with_dev = whole / (10 + 2 * 6)  # 6 dev examples, measured before and after
            assert found[f"controller run ({name}) / training with dev, all epochs"] == pytest.approx(with_dev)

    def test_end_to_end_is_computed_from_the_same_parts(self, lab: speed_lab.Lab) -> None:
        [paper, _] = rows = speed.end_to_end(lab)
        assert all(one.computed for one in rows)
        final, controller = 10 + 2 * 6, 10 + 3 * A_ROUND
        assert paper.name == "grid of 8, or Optuna at 8 trials / controller run (paper) + final run"
        assert paper.ratio == pytest.approx(8 * final / (controller + final))
        work = 8 * (final + 10) / (controller + 10 + final + 10)  # a training example counts as two
        assert paper.note == f"in passes {work:.2f}"

    def test_examples_in_turn_are_timed_and_counted_as_such(self, lab: speed_lab.Lab) -> None:
        preset_stage, policy = lab.stages["grasp"], lab.stages["grasp"].policy
        rounds = replace(preset_stage.rounds, pool="both", in_turn=3)
        turn = replace(preset_stage, rule="surrogate_at_end", rounds=rounds)
        lab.stages = {
            "all": preset_stage, "in turn": turn, "rare": replace(turn, rounds=replace(rounds, every=100)),
            "compared": replace(turn, rule="surrogate"),
        }  # fmt: skip
        whole = MICRO_DEV + len(lab.session.splits.dev)
        assert lab.parts.pools == {"all": MICRO_DEV} | dict.fromkeys(("in turn", "rare", "compared"), whole)
        seconds = {
            name: [run.round_seconds / run.rounds for run in runs] for name, runs in lab.parts.controlled.items()
        }
        probes = 1 + policy.candidates
        assert seconds == {
            "all": [probes * MICRO_DEV],
            "in turn": [probes * 3],
            "rare": [probes * 3],
            "compared": [whole + policy.candidates * 3],  # the baseline on all
        }
        assert lab.parts.whole_controller("rare") == [
            10 + 2 * probes * 3
        ]  # the rounds before the first step and after the last

    def test_whole_runs_follow_the_recipe(self, lab: speed_lab.Lab) -> None:
        final = replace(lab.recipe.final.training, epochs=3, evaluate_every=0.5)
        recipe = lab.recipe.model_copy(update={"final": replace(lab.recipe.final, training=final)})
        parts = replace(lab.parts, recipe=recipe, timed=2, final=[4.0], per_dev=[0.5])
        assert parts.dev_evaluations() == [(1 + 6) * 6 * 0.5]
        assert parts.whole_final() == [30 * 2.0 + (1 + 6) * 6 * 0.5]

    def test_without_a_dev_split_its_evaluations_cost_nothing(self, lab: speed_lab.Lab) -> None:
        lab.session.splits = replace(lab.session.splits, dev=())
        assert lab.parts.dev_evaluations() == [0.0]

    def test_formats_take_turns_on_one_backbone_which_has_its_own_again_after(self, lab: speed_lab.Lab) -> None:
        seen, own = set(), lab.session.backbone.model.dtype
        lab.session.backbone.model.get_decoder().register_forward_pre_hook(lambda model, _: seen.add(model.dtype))
        assert list(ratios(speed.formats(lab)).values()) == [1.0, 1.0]
        assert seen == {torch.bfloat16, torch.float32}
        assert lab.session.backbone.model.dtype == own

    def test_answers_go_through_the_decoder_once_a_token(self, lab: speed_lab.Lab) -> None:
        alone, with_losses = ratios(speed.answers(lab)).values()
        # 6 prompts are read, and then each token of an answer is.
        assert 1 < alone <= 2 + lab.recipe.generation.max_new_tokens
        # Scores and answers both go on from the last token of a prompt, so the rest of it is one row of six more, whose tokens
        # are read once; what the model says itself is not said again.
        assert 0.5 < with_losses <= 1 + 1 / (alone + 1) + 1e-9

    def test_rounds_grow_with_what_is_probed_and_not_with_the_adapter(
        self, lab: speed_lab.Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(speed, "RANKS", (4,))
        found = ratios(speed.growth(lab))
        expected = {"candidates, own 3: 1 / own": 2 / 4, "candidates, own 3: 6 / own": 7 / 4}
        expected |= {"micro-dev examples, own 4: 4 / own": 1.0, "micro-dev examples, own 4: 16 / own": 4.0}
        expected |= {"rank of an adapter, own 2: 4 / own": 1.0, "adapters, own 2: 4 / own": 1.0}
        assert expected.items() <= found.items()
        lengths = {name: ratio for name, ratio in found.items() if name.startswith("tokens of an example")}
        assert list(lengths.values()) == [1.0, 1.0]
        assert any("(shortest third)" in name for name in lengths)
        assert any("(longest third)" in name for name in lengths)

    def test_memory_is_that_of_child_processes_over_the_plain_one(
        self, lab: speed_lab.Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        peaks = {"plain": 100.0, "plain with dev": 110.0, "controller": 120.0, "final": 105.0}

        def child(arguments: list[str]) -> tuple[float, str]:
            file, recipe, option, kind = arguments
            assert (Path(file), recipe, option) == (BENCHMARKS / "speed.py", "tiny.yaml", "--memory-of")
            return 1.0, "what a library says\n" + json.dumps({"loaded": 80.0, "peak": peaks[kind]}) + "\n"

        monkeypatch.setattr(speed, "child", child)
        rows = speed.memory(lab)
        assert ratios(rows) == {"plain with dev / plain": 1.1, "controller / plain": 1.2, "final / plain": 1.05}
        assert {(one.reference, one.unit, one.note) for one in rows} == {(100.0, "MB", "loading alone 80 MB")}

    @pytest.mark.parametrize("kind", speed.MEMORY_KINDS)
    def test_every_kind_of_run_has_a_peak(self, lab: speed_lab.Lab, kind: str) -> None:
        found = speed.memory_of(lab, kind)
        assert 0 < found["loaded"] <= found["peak"]

    def test_start_up_is_compared_with_importing_the_libraries(
        self, lab: speed_lab.Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seconds = {"pass": 0.5, "--help": 1.0, "tiny.yaml": 3.0, "import torch, transformers": 2.0}
        monkeypatch.setattr(speed, "child", lambda arguments: (seconds[arguments[-1]], ""))
        assert [one.ratio for one in speed.start_up(lab)] == [0.25, 0.5, 1.5]


class TestCommand:
    def test_it_writes_one_table_and_all_figures(
        self, tiny_workspace: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = ["--only", "probe,step", "--pairs", "1", "--examples", "2", "--profile", "--output", "speed.json"]
        speed.main(["tiny.yaml", "--set", OVERRIDES[0], *options])
        out = capsys.readouterr().out
        assert out.count("| part | what over what |") == 1
        content = json.loads(Path("speed.json").read_text(encoding="utf-8"))
        assert [one["part"] for one in content["rows"]] == ["step", "probe"]
        assert content["backbone"] == "tiny-llama"
        assert sum(content["profile"].values()) == pytest.approx(1.0)
        assert {"head and loss", "matrix products", "optimizer", "data"} <= set(content["profile"])

    def test_every_row_of_a_measurement_has_a_policy_that_was_asked_for(
        self, tiny_workspace: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        speed.main(["tiny.yaml", "--only", "end", "--policy", "grasp", "--pairs", "1", "--examples", "3"])
        lines = capsys.readouterr().out.splitlines()
        names = ("the recipe's", "grasp")
        assert [name in line for name, line in zip(names, lines[2:], strict=True)] == [True, True]

    def test_a_policy_may_name_its_spacing(self) -> None:
        recipe, _ = load_recipe("demo-ar")
        stage = speed.stage_of(recipe, "paper@10")
        paper = preset("paper")
        assert (stage.policy, stage.rounds, stage.rule) == (paper.policy, paper.rounds, paper.rule)
        assert speed.stage_of(recipe, "paper").rounds.every == recipe.controller.rounds.every

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--only", "step,nothing"], "--only names nothing; allowed: start"),
            (["--pairs", "0"], "at least 1"),
            (["--policy", "paper@often"], "'often' is no number of steps"),
            (["--policy", "quick"], "preset is 'quick'; allowed: grasp"),
        ],
    )
    @pytest.mark.usefixtures("tiny_workspace")
    def test_a_mistake_is_one_line(self, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            speed.main(["tiny.yaml", *options])
        assert message in capsys.readouterr().err.splitlines()[-1]

    @pytest.mark.slow
    def test_child_processes_do_what_they_are_asked(self, tiny_workspace: Path) -> None:
        speed.main(["tiny.yaml", "--only", "start,memory", "--pairs", "1", "--output", "speed.json"])
        rows = json.loads(Path("speed.json").read_text(encoding="utf-8"))["rows"]
        assert [one["part"] for one in rows] == ["start-up"] * 3 + ["memory"] * 3
        assert all(one["reference"] > 0 for one in rows)


def test_times_beside_a_busy_process_become_ratios_within_a_turn() -> None:
    seconds = {"briefly, alone": 1.5, "briefly, beside one busy process": 3.0,
               "3,000 turns, alone": 2.0, "3,000 turns, beside one busy process": 3.0,
               "not, one thread, alone": 4.0, "not, one thread, beside one busy process": 4.0,
               "as torch does, alone": 1.0, "as torch does, beside one busy process": 4.0}  # fmt: skip
    times = {f"{work}, {which}": [[wall, 2 * wall]] * 3 for work in busy.WORKS for which, wall in seconds.items()}
    found = busy.rows(times)
    assert [one.ratio for one in found] == [2.0, 1.5, 1.0, 4.0, 1.5, 2.0, 4.0] * 3
    assert found[0].note == "alone it keeps 2.00 cores busy"
    assert found[0].part == "answering"
