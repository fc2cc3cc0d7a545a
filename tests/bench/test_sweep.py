"""The sweep: Optuna over recipe keys; trials that are final runs, never see the test split, and survive a kill."""

import functools
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import pytest
import torch
import yaml
from conftest import write_tiny_workspace
from optuna.trial import TrialState

from grasp_lora.bench import session as session_module
from grasp_lora.bench import sweep as sweep_module
from grasp_lora.bench.search_space import Grid, Parameter, search_space, trial_recipe
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import Record
from grasp_lora.bench.sweep import BEST_FILE, SweepProgress, SweepSettings, sweep
from grasp_lora.bench.trials import JOURNAL_FILE, Trials, _Evaluations, _Halving
from grasp_lora.errors import RecipeError
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.folder import only_writer
from grasp_lora.training.probes import ProbeSet
from grasp_lora.training.settings import TrainingSettings

RATIO = "final.prune_ratio=0.1..0.8"
RATE = "final.training.learning_rate"
LONGER = ("final.training.epochs=3", "final.training.patience=null")


class Recorder(SweepProgress):
    """Remembers what was done."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.begun: tuple[int, int] | None = None
        self.trials: list[dict[str, Any]] = []

    def begin(self, trials: int, finished: int) -> None:
        self.begun = trials, finished

    def trial(self, number: int, values: Mapping[str, Any]) -> None:
        self.trials.append(dict(values))

    def record(self, record: Record, there: bool) -> None:
        if not there:
            self.steps.append(record.step)


def session(*overrides: str) -> Session:
    return Session(*load_recipe("tiny.yaml", overrides))


def run(folder: str, *params: str, overrides: tuple[str, ...] = (), **settings: Any) -> tuple[dict[str, Any], Recorder]:
    recorder = Recorder()
    return sweep(session(*overrides), Path(folder), SweepSettings(params, **settings), recorder), recorder


def outcome(content: dict[str, Any]) -> dict[str, Any]:
    """All but the wall time."""
    content = json.loads(json.dumps(content))
    for one in (*content["trials"], content["cost"]):
        for key in ("seconds", "seconds_with_parents"):
            one.pop(key, None)
    return content


def values_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [row["values"] for row in content["trials"]]


def seed_with_last(param: str, value: Any) -> int:
    """A seed for which the grid tries a value last."""
    recipe = session().recipe
    parameters = search_space([param], recipe)
    return next(seed for seed in range(100) if [*Grid(parameters, seed)][-1][parameters[0].key] == value)


class TestSearchSpace:
    def read(self, *params: str) -> tuple[Parameter, ...]:
        return search_space(params, session().recipe)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("final.prune_ratio=0.1..0.8", Parameter("final.prune_ratio", None, 0.1, 0.8)),
            (f"{RATE}=1e-5..1e-2:log", Parameter(RATE, None, 1e-5, 1e-2, True)),
            ("lora.rank=2..16", Parameter("lora.rank", None, 2, 16)),
            ("lora.rank = 2 .. 32/5:log", Parameter("lora.rank", (2, 4, 8, 16, 32), 2, 32)),
            ("final.prune_ratio=0.1..0.4/4", Parameter("final.prune_ratio", (0.1, 0.2, 0.3, 0.4), 0.1, 0.4)),
            ("final.prune_ratio=.1..1/2", Parameter("final.prune_ratio", (0.1, 1.0), 0.1, 1)),
            (f"{RATE}=[1e-3, 2e-3]", Parameter(RATE, (0.001, 0.002))),
            ("merge.weights=[null, [0.3, 0.7]]", Parameter("merge.weights", (None, [0.3, 0.7]))),
            ("mask.score=[magnitude, input_aware]", Parameter("mask.score", ("magnitude", "input_aware"))),
        ],
    )
    def test_forms(self, tiny_workspace, text, expected):
        (found,) = self.read(text)
        assert found == expected
        assert type(found.low) is type(expected.low)

    def test_a_list_entry_can_vary_where_the_list_is_given(self, tiny_workspace):
        recipe = session("merge.weights=[0.5, 0.5]").recipe
        (weight,) = search_space(["merge.weights.0=0.1..0.9"], recipe)
        assert trial_recipe(recipe, {weight.key: 0.3}).merge.weights == (0.3, 0.5)
        with pytest.raises(RecipeError, match=r"merge.weights has no entry 0; give the whole list first"):
            self.read("merge.weights.0=0.1..0.9")
        with pytest.raises(RecipeError, match="a list of 2 entries, counted from 0"):
            search_space(["merge.weights.2=0.1..0.9"], recipe)

    def test_a_value_may_need_that_of_another_key(self, tiny_workspace):
        with pytest.raises(RecipeError, match="does not take a rank"):
            self.read("merge.rank=1..3")
        rule, _ = self.read("merge.rule=[exact, svd]", "merge.rank=1..3")
        assert rule.choices == ("exact", "svd")

    def test_a_grid_has_every_combination_once_in_an_order_that_the_seed_decides(self, tiny_workspace):
        parameters = self.read("final.prune_ratio=0.1..0.3/3", "lora.rank=[2, 4]")
        rows = [*Grid(parameters, 1)]
        assert sorted((row["final.prune_ratio"], row["lora.rank"]) for row in rows) == [
            (ratio, rank) for ratio in (0.1, 0.2, 0.3) for rank in (2, 4)
        ]
        assert rows == [*Grid(parameters, 1)]
        assert rows != [*Grid(parameters, 2)]


@pytest.fixture
def scripted(monkeypatch) -> None:
    """Trials that train nothing: the dev loss is the distance of the learning rate from 0.01, in powers of ten."""

    def run_trial(self: Trials, trial: Any, session: Session) -> None:
        loss = abs(math.log10(session.recipe.final.training.learning_rate) + 2)
        self._tell(trial, loss, {"dev_loss": loss})

    monkeypatch.setattr(Trials, "_run", run_trial)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_seed_decides_the_trials(tiny_workspace, scripted, sampler):
    param = f"{RATE}=1e-4..10.0:log"
    contents = [
        run(name, param, sampler=sampler, trials=13, seed=seed)[0] for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert outcome(contents[0]) == outcome(contents[1])
    assert values_of(contents[0]) != values_of(contents[2])
    rates = [row["values"][RATE] for row in contents[0]["trials"]]
    assert len(set(rates)) == 13
    assert 1e-4 <= min(rates) < 1e-2
    assert 1.0 < max(rates) <= 10.0
    assert json.loads(Path("a/sweep.json").read_text(encoding="utf-8")) == json.loads(json.dumps(contents[0]))


def test_tpe_learns_from_trials_and_the_best_is_that_of_the_lowest_loss(tiny_workspace, scripted):
    losses = {}
    for sampler in ("tpe", "random"):
        content, _ = run(sampler, f"{RATE}=1e-6..1e2:log", sampler=sampler, trials=40)
        losses[sampler] = [row["dev_loss"] for row in content["trials"]]
        assert losses[sampler][content["best"] - 1] == min(losses[sampler])
    assert losses["tpe"][:10] == losses["random"][:10]  # Optuna's first ten are random
    assert fmean(losses["tpe"][10:]) < 0.7 * fmean(losses["random"][10:])


def test_a_grid_tries_all_or_as_many_as_asked_for_and_shared_steps_are_done_once(tiny_workspace):
    content, recorder = run("out", "final.prune_ratio=[0.2, 0.5, 0.8]", sampler="grid", trials=2)
    assert len(content["trials"]) == 2
    again, resumed = run("out", "final.prune_ratio=[0.2, 0.5, 0.8]", sampler="grid")
    assert resumed.begun == (3, 2)
    assert {row["values"]["final.prune_ratio"] for row in again["trials"]} == {0.2, 0.5, 0.8}
    assert again["trials"][:2] == content["trials"]
    assert recorder.steps.count("source") == recorder.steps.count("target") == 1
    assert len(resumed.steps) == 1
    # A final run: 10 examples counted twice, 6 dev examples before and after; both parents were trained once.
    assert [row["work"] for row in again["trials"]] == [10 * 2 + 6 * 2] * 3
    assert again["cost"]["work"] == 3 * 32
    assert again["cost"]["work_with_parents"] == 3 * 32 + (12 * 2 + 4 * 2) + 32
    assert again["cost"]["runs"] == 3


def test_parents_are_trained_again_only_for_values_that_change_them(tiny_workspace):
    _, recorder = run("out", "target.training.learning_rate=[0.01, 0.02]", sampler="grid")
    assert recorder.steps.count("source") == 1
    assert recorder.steps.count("target") == 2


def test_a_trial_is_the_run_that_best_yaml_gives_by_hand(tiny_workspace, cli, tmp_path, monkeypatch):
    content, _ = run("runs/out", RATIO, "final.training.learning_rate=0.001..0.1:log", trials=2)
    best = content["trials"][content["best"] - 1]
    file = tiny_workspace / "runs/out/best.yaml"
    recipe, _ = load_recipe(file)
    assert recipe.final.prune_ratio == best["values"]["final.prune_ratio"]
    assert recipe.final.training.learning_rate == best["values"][RATE]
    monkeypatch.chdir(tmp_path)  # the recipe stands on its own
    assert cli("check", file).status == 0
    assert cli("run", file, "-o", "by-hand").status == 0
    metrics = json.loads((tmp_path / "by-hand/metrics.json").read_text(encoding="utf-8"))
    assert best["dev_loss"] in [system["dev_loss"] for system in metrics["systems"].values()]


def test_the_best_recipe_finds_data_and_adapters_wherever_they_were(finished_run, tiny_workspace, cli):
    (tiny_workspace / "data").mkdir()
    (tiny_workspace / "target.jsonl").rename(tiny_workspace / "data/target.jsonl")
    overrides = ("source.adapters=[run/source]", "target.adapter=run/target", "data.source=null", "data.root=data")
    content, recorder = run("deep/out", "merge.density=[0.5]", sampler="grid", overrides=overrides)
    assert recorder.steps == ["final 0.00"]  # a ratio that is neither swept nor given is 0
    best = yaml.safe_load(Path("deep/out/best.yaml").read_text(encoding="utf-8"))
    assert best["final"]["prune_ratio"] == 0.0
    assert best["source"]["adapters"] == ["../../run/source"]
    assert str(tiny_workspace) not in json.dumps(best)
    assert cli("check", "deep/out/best.yaml").status == 0
    assert content["best"] == 1


def test_a_sweep_does_not_go_on_with_another_adapter(finished_run, tiny_workspace):
    overrides = ("source.adapters=[run/source]", "target.adapter=run/target", "data.source=null")
    run("out", RATIO, trials=1, overrides=overrides)
    run("out", RATIO, trials=1, overrides=overrides)
    config = Path("run/source/adapter_config.json")
    before = config.read_text(encoding="utf-8")
    content = json.loads(before)
    config.write_text(json.dumps(content | {"lora_alpha": 10 * content["lora_alpha"]}), encoding="utf-8")
    with pytest.raises(RecipeError, match="holds a sweep with other adapters"):
        run("out", RATIO, trials=1, overrides=overrides)
    config.write_text(before, encoding="utf-8")
    shutil.copytree("run/merged", "run/source", dirs_exist_ok=True)
    with pytest.raises(RecipeError, match="holds a sweep with other adapters; give those, or another folder"):
        run("out", RATIO, trials=1, overrides=overrides)


def test_the_trials_of_a_single_run_start_from_a_merge(tiny_workspace):
    run("out", "merge.density=[0.5]", sampler="grid", overrides=("final.start=controller",))
    recipe, _ = load_recipe("out/best.yaml")
    assert (recipe.final.start, recipe.final.prune_ratio) == ("merged", 0.0)


@pytest.mark.parametrize("pruner", ["median", "halving", "wilcoxon"])
def test_each_pruner_stops_a_bad_trial_and_not_the_best(tiny_workspace, pruner):
    param = f"{RATE}=[0.01, 0.011, 0.012, 0.013, 0.014, 1.0e-9]"  # the last learns nothing
    content, _ = run("out", param, sampler="grid", pruner=pruner, seed=seed_with_last(param, 1e-9), overrides=LONGER)
    *sane, bad = content["trials"]
    assert bad["values"] == {RATE: 1e-9}
    assert bad["state"] == "pruned"
    assert 0 < bad["steps"] < 30
    # Stopped after its first epoch: 10 examples counted twice, and 6 dev examples before and after.
    assert bad["work"] == 2 * bad["steps"] + 6 * (1 + bad["steps"] // 10)
    assert sane[0]["state"] == "complete"
    assert content["trials"][content["best"] - 1]["state"] == "complete"
    if pruner == "median":
        assert {row["state"] for row in sane} == {"complete"}


def test_wilcoxon_pairs_the_examples_of_one_evaluation(tiny_workspace):
    """A rival that is better on each example at the same evaluation stops a trial; better on average alone does not."""

    def gives_up(mine: list[float], evaluation: int) -> bool:
        return Trials._gives_up(FakeTrials(), None, mine, evaluation, 1)  # type: ignore[arg-type]

    n = 8
    best = [[2.0 + i for i in range(n)], [1.0 + i for i in range(n)]]

    class FakeTrials:
        _settings = SweepSettings((), pruner="wilcoxon")

        def _finished(self) -> list[Any]:
            attributes = {"losses": best, "facts": {"dev_loss": fmean(best[-1])}}
            return [type("Trial", (), {"user_attrs": attributes})]

    at_first = [loss + 0.1 for loss in best[0]]
    assert gives_up(at_first, 0)  # with the small difference only pairs can show it
    assert gives_up(at_first, 1)
    assert gives_up(at_first, 7)  # the best trial has stopped long before
    between = [loss - 0.5 for loss in best[0]]
    assert not gives_up(between, 0)
    assert gives_up(between, 1)
    assert not gives_up([*best[0][:-1], 100.0], 0)
    assert not gives_up(best[0], 0)


def test_what_a_trial_would_keep_is_what_it_is_judged_by():
    class FakeTrial:
        reported: list[tuple[float, int]] = []  # noqa: RUF012

        def report(self, loss: float, evaluation: int) -> None:
            self.reported.append((loss, evaluation))

    asked: list[tuple[list[float], int, int]] = []

    def gives_up(trial: Any, losses: Any, evaluation: int, looks: int) -> bool:
        asked.append((list(losses), evaluation, looks))
        return False

    for keep, kept in (("best", [1.0, 1.0]), ("last", [3.0, 1.0])):
        trial = FakeTrial()
        trial.reported = []
        asked.clear()
        evaluations = _Evaluations(trial, TrainingSettings(epochs=4, keep=keep), 5, gives_up)  # type: ignore[arg-type]
        for step, losses in ((0, [2.0, 2.0]), (5, [1.0, 1.0]), (10, [3.0, 1.0]), (20, [9.0, 9.0])):
            evaluations.take(step, losses)
        assert [one[1:] for one in asked] == [(1, 3), (2, 3)]  # not before training, not at the last step
        assert asked[-1][0] == kept
        assert trial.reported == [(2.0, 0), (1.0, 1), (2.0, 2), (9.0, 3)]


def test_a_trial_that_diverges_fails_and_the_sweep_goes_on(tiny_workspace):
    content, _ = run("out", f"{RATE}=[0.01, 1e30]", sampler="grid")
    states = {row["values"][RATE]: row for row in content["trials"]}
    assert states[0.01]["state"] == "complete"
    assert states[1e30]["state"] == "failed"
    assert "lower the learning rate" in states[1e30]["error"] or "not a finite number" in states[1e30]["error"]
    assert states[1e30]["dev_loss"] is None
    with pytest.raises(RecipeError, match=r"none of the 1 trials could be finished; the first says: .*"):
        run("other", f"{RATE}=[1e30]", sampler="grid")


def test_values_that_do_not_go_together_fail_their_trial_only(tiny_workspace):
    content, _ = run("out", "merge.rule=[exact, svd]", "merge.rank=[2]", sampler="grid")
    rows = {row["values"]["merge.rule"]: row for row in content["trials"]}
    assert rows["svd"]["state"] == "complete"
    assert rows["exact"]["state"] == "failed"
    assert "does not take a rank" in rows["exact"]["error"]


def test_values_that_come_again_cost_nothing(tiny_workspace):
    content, recorder = run("out", "mask.scope=[factor, global]", sampler="random", trials=5)
    repeats = [row for row in content["trials"] if "repeats" in row]
    assert len(repeats) == 3
    assert {row["work"] for row in repeats} == {0}
    assert {row["dev_loss"] for row in repeats} <= {
        row["dev_loss"] for row in content["trials"] if "repeats" not in row
    }
    assert sum(step.startswith("final") for step in recorder.steps) == content["cost"]["runs"] == 2


class Killed(BaseException):
    """Ends a sweep as a kill would."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_backbone_folder) -> Callable[..., dict[str, Any]]:
    """Give what a sweep of the tiny recipe comes to when nothing stops it."""
    recipe = write_tiny_workspace(tmp_path_factory.mktemp("sweep") / "work", tiny_backbone_folder)

    @functools.cache
    def call(param: str, **settings: Any) -> dict[str, Any]:
        folder = recipe.parent / settings["sampler"]
        return sweep(Session(*load_recipe(recipe)), folder, SweepSettings((param,), **settings))

    return call


@pytest.mark.parametrize(
    ("sampler", "moment"),
    [
        ("tpe", "trial begins"),
        ("tpe", "dev evaluation"),
        ("tpe", "after the run"),
        ("grid", "dev evaluation"),
        ("grid", "in the queue"),
    ],
)
def test_a_killed_sweep_goes_on_to_the_same_trials(tiny_workspace, monkeypatch, uninterrupted, sampler, moment):
    settings: dict[str, Any] = {"sampler": sampler, "pruner": "wilcoxon", "trials": 2}
    param = "final.prune_ratio=0.1..0.8/4" if sampler == "grid" else RATIO
    calls = 0

    def fail_at_second(original: Callable[..., Any], after: bool = False) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            result = original(*args, **kwargs) if after or calls != 2 else None
            if calls == 2:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patch:
        if moment == "trial begins":
            patch.setattr(Recorder, "trial", fail_at_second(Recorder.trial))
        elif moment == "in the queue":
            patch.setattr(optuna.Study, "ask", fail_at_second(optuna.Study.ask))
        elif moment == "dev evaluation":
            patch.setattr(_Evaluations, "take", fail_at_second(_Evaluations.take))
        else:
            patch.setattr(Bench, "finetuned", fail_at_second(Bench.finetuned, after=True))
        with pytest.raises(Killed):
            run("out", param, **settings)
    with Path("out", JOURNAL_FILE).open("a", encoding="utf-8") as journal:
        journal.write('{"op_code": 9, "half a li')  # which the kill left behind
    content, resumed = run("out", param, **settings)
    assert outcome(content) == outcome(uninterrupted(param, **settings))
    finals = [step for step in resumed.steps if step.startswith("final")]
    assert len(finals) == {"trial begins": 1, "in the queue": 1, "dev evaluation": 2, "after the run": 0}[moment]
    again, nothing = run("out", param, **settings)
    assert nothing.steps == nothing.trials == []
    assert again == content


def test_a_signal_stops_a_sweep_with_status_75_and_it_goes_on(tiny_workspace, cli, monkeypatch):
    arguments = ("sweep", "tiny.yaml", "--param", RATIO, "--trials", "2", "--sampler", "random", "--seed", "3")
    finetune = Session.finetune_pruned

    def interrupted(self: Session, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return finetune(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "finetune_pruned", interrupted)
        stopped = cli(*arguments)
    assert stopped.status == 75
    assert stopped.err == "stopped by SIGTERM in trial 1 of 2; run the same command again to go on\n"
    resumed = cli(*arguments)
    assert resumed.status == 0
    assert resumed.err == ""
    assert "source adapter" not in resumed.out
    assert "is the best by dev loss" in resumed.out
    assert f"best recipe {Path('runs/tiny-sweep/best.yaml')}" in resumed.out


def test_the_test_split_is_never_looked_at(tiny_workspace, monkeypatch):
    seen: set[str] = set()
    make = ProbeSet.__init__

    def spy(self: ProbeSet, examples: Any, *args: Any, **kwargs: Any) -> None:
        seen.update(example.id for example in examples)
        make(self, examples, *args, **kwargs)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be answered")

    monkeypatch.setattr(ProbeSet, "__init__", spy)
    monkeypatch.setattr(session_module, "generate", fail)
    run("out", RATIO, trials=2, pruner="wilcoxon")
    splits = session().splits
    assert {example.id for example in splits.dev} <= seen
    assert not {example.id for example in splits.test} & seen
    content, _ = run("no-test", RATIO, trials=1, overrides=("data.target.test=0",))
    assert content["best"] == 1


def test_what_the_hook_raises_ends_the_training_and_leaves_the_backbone_clean(tiny_workspace, tmp_path):
    one = session(*LONGER)
    backbone = one.backbone.model
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    use_cache = backbone.config.use_cache
    merged, _ = one.train_adapter("target", one.splits.train, (), one.recipe.target.training, tmp_path / "target")
    whole, _, _ = one.finetune_pruned(merged, 0.3, tmp_path / "whole")
    seen: list[tuple[int, int]] = []

    def stop(step: int, losses: Any) -> None:
        seen.append((step, len(losses)))
        if step == 20:
            raise KeyError("enough")

    one.on_dev = stop
    with pytest.raises(KeyError, match="enough"):
        one.variant(one.recipe).finetune_pruned(merged, 0.3, tmp_path / "stopped")
    assert seen == [(0, 6), (10, 6), (20, 6)]
    assert not backbone.training
    assert backbone.config.use_cache == use_cache
    after = backbone.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    one.on_dev = None
    again, _, _ = one.finetune_pruned(merged, 0.3, tmp_path / "again")
    assert all(torch.equal(whole[name].A, again[name].A) for name in whole)


def test_a_folder_belongs_to_one_sweep_and_one_process(tiny_workspace, cli):
    run("out", RATIO, trials=1)
    with pytest.raises(RecipeError, match="holds a sweep with other params, sampler; give those"):
        run("out", "final.prune_ratio=0.1..0.7", sampler="random", trials=1)
    with pytest.raises(RecipeError, match="holds a sweep with other recipe"):
        run("out", RATIO, trials=1, overrides=("lora.rank=3",))
    with only_writer(Path("out")):
        result = cli("sweep", "tiny.yaml", "--param", RATIO, "--output", "out")
    assert result.status == 2
    assert "is being written by" in result.err
    journal = Path("out", JOURNAL_FILE)
    journal.write_text("no journal\n" + journal.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(RecipeError, match="cannot be read: it was changed"):
        run("out", RATIO, trials=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --param, for example --param final.prune_ratio=0.1..0.8"),
        (("--param", "final.prun_ratio=0.1..0.8"), "did you mean 'prune_ratio'?"),
        (("--param", "finale.prune_ratio=0.1..0.8"), "did you mean 'final'?"),
        (("--param", "final.prune_ratio.x=0.1..0.8"), "prune_ratio is no section of the recipe"),
        (("--param", "lora.rank.x=1..8"), "no section of the recipe"),
        (("--param", "final.prune_ratio"), "must look like key=RANGE"),
        (("--param", "final.start=[merged, controller]"), "a trial has no controller run"),
        (("--param", "final.prune_ratio=0.4"), "'0.4' is no range; write low..high"),
        (("--param", "final.prune_ratio=0.8..0.1"), "must go from a lower to a higher number"),
        (("--param", "final.prune_ratio=0.1..1e999"), "must go from a lower to a higher number"),
        (("--param", "final.prune_ratio=0.1..1.5"), "prune_ratio is 1.5; it must be a fraction in [0, 1]"),
        (("--param", "lora.rank=1.5..8"), "lora.rank"),
        (("--param", f"{RATE}=0..1:log"), "a logarithmic range must begin above 0"),
        (("--param", "lora.rank=2..5/3"), "does not give whole numbers"),
        (("--param", "final.prune_ratio=0..1/1"), "asks for 1 values"),
        (("--param", "mask.score=[]"), "names no values"),
        (("--param", "mask.score=[magnitude"), "no valid YAML"),
        (("--param", "mask.score=[magnitude, size]"), "mask score is 'size'"),
        (("--param", f"{RATE}=[0.001, 1e-3]"), "names 0.001 more than once"),
        (("--param", RATIO, "--param", "final.prune_ratio=[0.1]"), "set the same value"),
        (("--param", "data.target.train=5..9"), "data cannot be swept"),
        (("--param", "backbone.dtype=[float32]"), "backbone cannot be swept"),
        (("--param", "seed=1..9"), "seed cannot be swept"),
        (("--param", RATIO, "--sampler", "grid"), "--sampler grid needs finite choices"),
        (
            ("--param", "final.prune_ratio=0.0..1/900", "--param", "lora.alpha=1.0..2/900", "--sampler", "grid"),
            "combinations",
        ),
        (("--param", RATIO, "--sampler", "bayes"), "sampler is 'bayes'; allowed: tpe, random, grid"),
        (("--param", RATIO, "--pruner", "axe"), "pruner is 'axe'; allowed: none, median"),
        (("--param", RATIO, "--trials", "0"), "trials is 0"),
        (("--param", RATIO, "--seed", "-1"), "seed is -1"),
        (
            ("--param", "final.training.evaluate_every=[0.5, 1.0]", "--pruner", "median"),
            "cannot be swept with a pruner",
        ),
        (("--param", RATIO, "--set", "data.target.dev=0"), "needs a dev split"),
        (("--param", "final.prune_ratio=0..1"), "takes fractions; write 0.0..1.0"),
        (
            (
                "--param",
                "final.training.batch_size=1..4",
                "--pruner",
                "median",
                "--set",
                "final.training.evaluate_every=0.5",
            ),
            "steps of other sizes do not divide an epoch alike",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(refused, arguments, message):
    refused("sweep", arguments, message)


def judged(losses, killed=None):
    """The states of trials of four evaluations each; one is killed after its first and done again."""
    study = optuna.create_study(pruner=_Halving(min_resource=1))
    states = []
    for number, curve in enumerate(losses):
        for again in (False, True) if number == killed else (False,):
            trial = study.ask()
            for step, loss in enumerate(curve[:1] if number == killed and not again else curve):
                trial.report(loss, step + 1)
                if pruned := trial.should_prune():
                    break
            if number == killed and not again:
                study.tell(trial, state=TrialState.FAIL)
                continue
            study.tell(trial, *([] if pruned else [curve[-1]]), state=TrialState.PRUNED if pruned else None)
            states.append("P" if pruned else "C")
    return "".join(states)


@pytest.mark.parametrize("killed", range(8))
def test_a_trial_that_was_killed_does_not_compete_with_its_repetition(killed):
    losses = [[start - 0.01 * step for step in range(8)] for start in (1.0, 0.9, 0.8, 0.7, 0.95, 0.6, 1.2, 0.65)]
    assert "P" in judged(losses)
    assert judged(losses, killed) == judged(losses)


def test_the_best_of_a_single_run_recipe_is_written(tiny_workspace):
    content, _ = run("out", RATIO, trials=2, overrides=("final.start=controller", "controller.rounds.every=2"))
    best, _ = load_recipe(Path("out", BEST_FILE))
    assert best.final.prune_ratio == content["trials"][content["best"] - 1]["values"]["final.prune_ratio"]
    assert best.final.start == "merged"


def test_a_missing_extra_is_named(tiny_workspace, cli, monkeypatch):
    find = sweep_module.importlib.util.find_spec
    monkeypatch.setattr(sweep_module.importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    result = cli("sweep", "tiny.yaml", "--param", RATIO)
    assert result.status == 2
    assert result.err == "error: a sweep needs optuna, which is not installed: pip install 'grasp-lora[sweep]'\n"


def test_processes_that_torchrun_started_are_refused(tiny_workspace, cli, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    result = cli("sweep", "tiny.yaml", "--param", RATIO)
    assert result.status == 2
    assert "start it without torchrun" in result.err
