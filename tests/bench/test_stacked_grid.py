"""A grid whose runs train side by side: as a method beside the grid, and as the controller of a recipe."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from recorder import session_of

from grasp_lora import api
from grasp_lora.bench import stacked as grids
from grasp_lora.bench.compare import ComparisonSettings, compare
from grasp_lora.bench.methods import METHODS
from grasp_lora.errors import ProbeError, RecipeError
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.policy import Stacked
from grasp_lora.method.presets import preset
from grasp_lora.training.controller import GraspController
from grasp_lora.training.probes import ProbeSet

RATIOS = (0.2, 0.5, 0.8)
NO_DROPOUT = "lora.dropout=0"
STACKED = (
    "controller={preset: stacked, policy: {candidates: 3, orders: 2}, training: {epochs: 2, learning_rate: 1.0e-2}}"
)


def records(step: str) -> list[dict]:
    found = [json.loads(file.read_text(encoding="utf-8")) for file in Path("runs").glob("*/store/records/*.json")]
    return [one for one in found if one["step"] == step]


def test_the_stacked_grid_is_the_grid(tiny_workspace):
    settings = ComparisonSettings(("grid", "grid_stacked"), (42,), RATIOS, resamples=100)
    own = session_of(NO_DROPOUT, "final.training.epochs=2", "final.training.patience=1")
    comparison = compare(own, Path("runs/tiny"), settings)
    rows = {row.method: row for row in comparison.rows}
    grid, stacked = rows["grid"], rows["grid_stacked"]
    assert stacked.prune_ratio == grid.prune_ratio
    assert stacked.scores["test_loss"].mean == pytest.approx(grid.scores["test_loss"].mean, abs=1e-4)
    assert stacked.cost.work == grid.cost.work
    assert stacked.cost.seconds > 0


def test_a_recipe_learns_its_ratio_from_stacked_copies(tiny_workspace):
    result = api.run("tiny.yaml", overrides=[STACKED, NO_DROPOUT], folder="runs/tiny")
    rows = [json.loads(line) for line in Path("runs/tiny/controller/rounds.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows][:2] == [0, 10]
    assert all(row["candidates"] == [0.1, 0.4, 0.8] for row in rows)
    for row in rows:
        place = row["candidates"].index(row["ratio_before"])
        assert row["baseline_losses"] == row["candidate_losses"][place]
        means = [sum(losses) / len(losses) for losses in row["candidate_losses"]]
        assert row["ratio"] == row["candidates"][means.index(min(means))]
    assert 0.1 <= result.ratio.low <= result.ratio.ratio <= result.ratio.high <= 0.8
    [record] = records("controller")
    steps = record["result"]["steps"]
    assert record["result"]["trained_examples"] == 3 * 2 * steps
    assert record["result"]["measured_examples"] == 3 * 2 * 6 * len(rows)
    again = api.run("tiny.yaml", overrides=[STACKED, NO_DROPOUT], folder="runs/tiny")
    assert again.ratio == result.ratio
    assert len(records("controller")) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (STACKED, "controller.rounds.in_turn=2"),
            "rounds.in_turn is 2, but stacked adapters measure the whole pool; set controller.rounds.in_turn to null",
        ),
        ((STACKED, "controller.training.gradient_checkpointing=true"), "training.gradient_checkpointing is set"),
        ((STACKED, "controller.policy.orders=0"), "orders is 0; at least 1 is needed"),
        ((STACKED, "controller.training.patience=1"), "this policy trains at many ratios"),
        ((STACKED, "final.start=controller"), "stacked adapters leave none to finish; start from 'merged'"),
        (
            (STACKED, "lora.target_modules=[q_proj, lm_head]"),
            "an adapter on the output layer cannot be stacked; leave that layer out",
        ),
        ((STACKED, "data.target.dev=0"), "data.target.dev is 0; give it examples, or probe elsewhere"),
    ],
)
def test_what_cannot_be_stacked_is_refused_before_anything_is_written(tiny_workspace, cli, overrides, message):
    sets = [part for override in overrides for part in ("--set", override)]
    result = cli("run", "tiny.yaml", *sets)
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert message in result.err
    assert not Path("runs").exists()


def test_several_processes_are_refused(tiny_workspace, monkeypatch):
    monkeypatch.setattr("grasp_lora.bench.checks.world_size", lambda: 2)
    from grasp_lora.bench.checks import check_rounds

    with pytest.raises(RecipeError, match="train in one process, but 2 were started; start without torchrun"):
        check_rounds(session_of(STACKED))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("final.mode=reselect", "holds one mask in each run, but final.mode is 'reselect'"),
        ("final.training.gradient_checkpointing=true", "has no final.training.gradient_checkpointing"),
        ("data.target.dev=0", "needs a dev split"),
    ],
)
def test_a_recipe_without_a_stacked_grid_says_why(tiny_workspace, override, message):
    assert message in (METHODS["grid_stacked"].unavailable(session_of(override)) or "")
    assert METHODS["grid_stacked"].unavailable(session_of()) is None


def test_the_seed_of_the_policy_is_combined_with_that_of_the_recipe(tiny_workspace, monkeypatch, tmp_path):
    seeds = []

    def search(policy, rule):
        seeds.append(policy.seed)
        raise InterruptedError

    monkeypatch.setattr(grids, "RatioSearch", search)
    for seed in (1, 2):
        session = session_of(STACKED, f"seed={seed}")
        with pytest.raises(InterruptedError):
            grids.learn_stacked(session, AdapterWeights({}), tmp_path)
        assert seeds[-1] == session.recipe.seed_of("policy 42")  # as for every other policy
    assert seeds[0] != seeds[1]


def test_a_callback_cannot_stack():
    examples = ProbeSet([type("One", (), {"id": "a", "prompt_ids": (4,), "completion_ids": (5, 2)})()], 0)
    with pytest.raises(ValueError, match=r"regime is 'stacked', which only a recipe has .* take a policy with 'held'"):
        GraspController(examples, preset("stacked"))


@pytest.mark.parametrize(
    ("settings", "ratios"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
        ({"candidates": 3, "ratio_init": 0.25}, [0.25, 0.45, 0.8]),
        ({"candidates": 1}, [0.4]),
    ],
)
def test_the_ratios_of_a_stack_hold_the_first_current_one(settings, ratios):
    policy = Stacked(**settings)
    from grasp_lora.method.presets import RULES
    from grasp_lora.method.search import RatioSearch

    search = RatioSearch(policy, RULES["surrogate"])
    assert search.ask() == pytest.approx(ratios)
    assert search.current_ratio in search.ask()


def test_a_stack_that_loses_all_its_members_at_once_stops(tiny_workspace):
    with pytest.raises(ProbeError, match=r"the run at prune ratio 0.1000: the dev loss is \w+ at step [1-9]"):
        api.run(
            "tiny.yaml", overrides=[STACKED, NO_DROPOUT, "controller.training.learning_rate=1e30"], folder="runs/all"
        )


def test_a_stack_that_loses_a_member_says_so_and_chooses_among_the_others(tiny_workspace, monkeypatch):
    from grasp_lora.training import stacked

    members_of = stacked.members_of

    def one_broken(model, start, ratios, *rest):
        members = members_of(model, start, ratios, *rest)
        pairs = {name: replace(pair, A=pair.A * float("nan")) for name, pair in start.items()}
        members[1].weights = AdapterWeights(pairs)
        return members

    monkeypatch.setattr(stacked, "members_of", one_broken)
    settings = ComparisonSettings(("grid_stacked",), (42,), RATIOS, resamples=100)
    comparison = compare(session_of(NO_DROPOUT), Path("runs/tiny"), settings)
    [row] = [row for row in comparison.rows if row.method == "grid_stacked"]
    assert row.prune_ratio.mean in (0.2, 0.8)
    assert any("is without ratio 0.5, whose run failed: the dev loss is nan" in one for one in comparison.warnings)
    [record] = records("stacked grid")
    assert [one["dev_loss"] is None for one in record["result"]["members"]] == [False, True, False]
    with pytest.raises(ProbeError, match=r"the run at prune ratio 0.1000: the dev loss is nan at step 0"):
        api.run("tiny.yaml", overrides=[STACKED, NO_DROPOUT], folder="runs/other")
