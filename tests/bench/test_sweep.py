"""The sweep: Optuna over recipe keys; trials that are final runs, never see the test split, and survive a kill."""

import errno
import importlib.util
import json
import math
import os
import re
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from conftest import write_tiny_workspace
from recorder import Recorder, session_of

from grasp_lora.bench import search as search_module
from grasp_lora.bench import session as session_module
from grasp_lora.bench.outcomes import Adapter
from grasp_lora.bench.search import BEST_FILE, SweepSettings, sweep
from grasp_lora.bench.search_space import Parameter, propose, search_space, trial_recipe
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import Record
from grasp_lora.bench.sweep_record import SWEEP_FILE, SweepResult, Trial
from grasp_lora.errors import DivergedError, RecipeError
from grasp_lora.recipes.load import load_recipe
from grasp_lora.training import trainer as trainer_module
from grasp_lora.training.probes import ProbeSet

RATIO = "final.prune_ratio=0.1..0.8"
RATE = "final.training.learning_rate"
LONGER = ("final.training.epochs=3", "final.training.patience=null")


class Watching(Recorder):
    """Remembers the trials, too."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: tuple[int, int] | None = None
        self.trials: list[dict[str, Any]] = []

    def begin(self, units: float, finished: float = 0.0) -> None:
        self.begun = int(units), int(finished)

    def trial(self, trial: Trial) -> None:
        self.trials.append(dict(trial.values))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint can be written."""
    full = OSError(errno.ENOSPC, "No space left on device", "checkpoint")
    monkeypatch.setattr(trainer_module, "save_file", lambda *_, **__: (_ for _ in ()).throw(full))


def run(folder: str, *params: str, overrides: tuple[str, ...] = (), **settings: Any) -> tuple[SweepResult, Watching]:
    recorder = Watching()
    return sweep(session_of(*overrides, progress=recorder), Path(folder), SweepSettings(params, **settings)), recorder


def outcome(result: SweepResult) -> SweepResult:
    """All but the wall time."""
    return replace(
        result,
        trials=[replace(trial, seconds=0.0) for trial in result.trials],
        parents={key: (0.0, work) for key, (_, work) in result.parents.items()},
        cost=replace(result.cost, seconds=0.0, seconds_with_parents=0.0),
    )


def best_of(result: SweepResult) -> Trial:
    assert result.best is not None
    return result.trials[result.best - 1]


def values_of(result: SweepResult, key: str) -> list[Any]:
    return [trial.values[key] for trial in result.trials]


class TestSearchSpace:
    def read(self, *params: str) -> tuple[Parameter, ...]:
        return search_space(params, session_of().recipe)

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
            ("final.training.keep=[best, last]", Parameter("final.training.keep", ("best", "last"))),
        ],
    )
    def test_forms(self, tiny_workspace, text, expected):
        (found,) = self.read(text)
        assert found == expected
        assert type(found.low) is type(expected.low)

    def test_a_list_entry_can_vary_where_the_list_is_given(self, tiny_workspace):
        recipe = session_of("merge.weights=[0.5, 0.5]").recipe
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


@pytest.fixture
def scripted(monkeypatch) -> None:
    """Trials that train nothing: the loss is the distance of the learning rate from 0.01 in powers of ten; above 1 they fail."""

    def finetuned(self: Bench, start: Adapter, prune_ratio: float) -> Adapter:
        rate = self.recipe.final.training.learning_rate
        if rate > 1:
            raise DivergedError(f"{rate} is too much")
        result = {"dev_loss": abs(math.log10(rate) + 2), "steps": 3, "best_step": 2}
        return Adapter(f"key of {rate}", lambda: None, (Record("final", f"key of {rate}", {}, result, 0.1),))

    monkeypatch.setattr(Bench, "merged", lambda self: Adapter("merged", lambda: None))
    monkeypatch.setattr(Bench, "finetuned", finetuned)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_seed_decides_the_trials_and_parts_of_a_sweep_are_those_of_a_whole_one(tiny_workspace, scripted, sampler):
    param = f"{RATE}=1e-4..10.0:log"
    whole, same, other = (
        run(name, param, sampler=sampler, trials=16, seed=seed)[0] for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert outcome(whole) == outcome(same)
    assert values_of(whole, RATE) != values_of(other, RATE)
    assert len(set(values_of(whole, RATE))) == 16
    assert 1e-4 <= min(values_of(whole, RATE)) < 1e-2
    assert 1.0 < max(values_of(whole, RATE)) <= 10.0
    assert {trial.state for trial in whole.trials} == {"complete", "failed"}
    for trials in (3, 12, 16):
        part, recorder = run("parts", param, sampler=sampler, trials=trials, seed=1)
        assert recorder.begun is not None
        assert recorder.begun[0] == len(part.trials) == trials
    assert outcome(part) == outcome(whole)
    assert json.loads(Path("parts/sweep/sweep.json").read_text(encoding="utf-8"))["trials"] == [
        json.loads(json.dumps(asdict(trial))) for trial in part.trials
    ]


def test_tpe_learns_from_trials_and_the_best_is_that_of_the_lowest_loss(tiny_workspace, scripted):
    losses = {}
    for sampler in ("tpe", "random"):
        result, _ = run(sampler, f"{RATE}=1e-6..1.0:log", sampler=sampler, trials=40)
        losses[sampler] = [trial.dev_loss for trial in result.trials if trial.dev_loss is not None]
        assert result.best is not None
        assert losses[sampler][result.best - 1] == min(losses[sampler])
    assert losses["tpe"][:10] == losses["random"][:10]  # Optuna's first ten are random
    assert fmean(losses["tpe"][10:]) < 0.7 * fmean(losses["random"][10:])


def test_more_trials_go_on_with_a_sweep_and_shared_steps_are_done_once(tiny_workspace):
    first, recorder = run("out", RATIO, sampler="random", trials=2)
    again, resumed = run("out", RATIO, sampler="random", trials=3)
    assert resumed.begun == (3, 2)
    assert again.trials[:2] == first.trials
    assert recorder.did.count("source") == recorder.did.count("target") == 1
    assert len(resumed.did) == 1
    # A final run: 10 examples counted twice, 6 dev examples before and after; both parents were trained once.
    assert [trial.work for trial in again.trials] == [10 * 2 + 6 * 2] * 3
    assert again.cost.work == 3 * 32
    assert again.cost.work_with_parents == 3 * 32 + (12 * 2 + 4 * 2) + 32
    assert again.cost.runs == 3
    assert json.loads(Path("out/sweep/sweep.json").read_text(encoding="utf-8"))["asked"] == 3
    fewer, nothing = run("out", RATIO, sampler="random", trials=1)
    assert fewer == again
    assert nothing.did == []


def test_parents_are_trained_again_only_for_values_that_change_them(tiny_workspace):
    result, recorder = run("out", "target.training.learning_rate=[0.01, 0.02]", sampler="random", trials=4)
    assert set(values_of(result, "target.training.learning_rate")) == {0.01, 0.02}
    assert recorder.did.count("source") == 1
    assert recorder.did.count("target") == 2


def test_a_trial_is_the_run_that_best_yaml_gives_by_hand(tiny_workspace, cli, tmp_path, monkeypatch):
    result, _ = run("runs/out", RATIO, "final.training.learning_rate=0.001..0.1:log", trials=2)
    best = best_of(result)
    file = tiny_workspace / "runs/out/sweep/best.yaml"
    recipe, _ = load_recipe(file)
    assert recipe.final.prune_ratio == best.values["final.prune_ratio"]
    assert recipe.final.training.learning_rate == best.values[RATE]
    monkeypatch.chdir(tmp_path)  # the recipe stands on its own
    assert cli("check", file).status == 0
    assert cli("run", file, "-o", "by-hand").status == 0
    metrics = json.loads((tmp_path / "by-hand/metrics.json").read_text(encoding="utf-8"))
    assert best.dev_loss in [system["dev_loss"] for system in metrics["systems"].values()]


def test_the_best_recipe_finds_data_and_adapters_wherever_they_were(finished_run, tiny_workspace, cli):
    (tiny_workspace / "data").mkdir()
    (tiny_workspace / "target.jsonl").rename(tiny_workspace / "data/target.jsonl")
    overrides = ("source.adapters=[run/source]", "target.adapter=run/target", "data.source=null", "data.root=data")
    result, recorder = run("deep/out", "merge.rule=[exact]", trials=1, overrides=overrides)
    assert recorder.did == ["final 0.00"]  # a ratio that is neither swept nor given is 0
    best = yaml.safe_load(Path("deep/out/sweep/best.yaml").read_text(encoding="utf-8"))
    assert best["final"]["prune_ratio"] == 0.0
    assert best["source"]["adapters"] == ["../../../run/source"]
    assert str(tiny_workspace) not in json.dumps(best)
    assert cli("check", "deep/out/sweep/best.yaml").status == 0
    assert result.best == 1


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
    run("out", "merge.rule=[exact]", trials=1, overrides=("final.start=controller",))
    recipe, _ = load_recipe("out/sweep/best.yaml")
    assert (recipe.final.start, recipe.final.prune_ratio) == ("merged", 0.0)


def test_a_trial_that_diverges_fails_and_the_sweep_goes_on(tiny_workspace):
    result, _ = run("out", f"{RATE}=[0.01, 1e30]", sampler="random", trials=4)
    for trial in result.trials:
        sane = trial.values[RATE] == 0.01
        assert trial.state == ("complete" if sane else "failed")
        assert (trial.dev_loss is None, trial.error is None) == (not sane, sane)
    errors = {trial.error for trial in result.trials if trial.error is not None}
    assert len(errors) == 1
    assert "lower the learning rate" in str(errors) or "not a finite number" in str(errors)
    with pytest.raises(RecipeError, match=r"none of the 2 trials could be finished; the first says: .*"):
        run("other", f"{RATE}=[1e30]", trials=2)


def test_values_that_do_not_go_together_fail_their_trial_only(tiny_workspace):
    result, _ = run("out", "merge.rule=[exact, svd]", "merge.rank=[2]", sampler="random", trials=4)
    trials = {trial.values["merge.rule"]: trial for trial in result.trials}
    assert trials["svd"].state == "complete"
    assert trials["exact"].state == "failed"
    assert "does not take a rank" in str(trials["exact"].error)


def test_values_that_come_again_cost_nothing(tiny_workspace):
    result, recorder = run("out", "final.training.weight_decay=[0.0, 0.1]", sampler="random", trials=5)
    repeats = [trial for trial in result.trials if trial.repeats]
    assert len(repeats) == 3
    assert {(trial.work, trial.seconds) for trial in repeats} == {(0, 0.0)}
    assert {trial.dev_loss for trial in repeats} <= {trial.dev_loss for trial in result.trials if not trial.repeats}
    assert sum(step.startswith("final") for step in recorder.did) == result.cost.runs == 2


class Killed(BaseException):
    """Ends a sweep as a kill would."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_backbone_folder) -> SweepResult:
    """What a sweep of the tiny recipe comes to when nothing stops it."""
    recipe = write_tiny_workspace(tmp_path_factory.mktemp("sweep") / "work", tiny_backbone_folder)
    return sweep(session_of(recipe=recipe), recipe.parent / "out", SweepSettings((RATIO,), trials=2))


@pytest.mark.parametrize(
    ("place", "name", "after", "left"),
    [
        (Watching, "stage", False, 1),
        (Session, "finetune_pruned", False, 1),
        (Session, "finetune_pruned", True, 1),
        (Bench, "finetuned", True, 0),
        (search_module, "write_json", False, 1),
        (search_module, "write_json", True, 1),
    ],
)
def test_a_killed_sweep_goes_on_to_the_same_trials(
    tiny_workspace, monkeypatch, uninterrupted, place, name, after, left
):
    original, calls = getattr(place, name), 0

    def killed_at_second_call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs) if after or calls < 2 else None
        if calls == 2:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(place, name, killed_at_second_call)
        with pytest.raises(Killed):
            run("out", RATIO, trials=2)
    result, resumed = run("out", RATIO, trials=2)
    assert outcome(result) == outcome(uninterrupted)
    assert len([step for step in resumed.did if step.startswith("final")]) == left
    again, nothing = run("out", RATIO, trials=2)
    assert nothing.did == nothing.trials == []
    assert again == result


def test_another_sweep_that_begins_at_the_same_time_is_refused(tiny_workspace, monkeypatch):
    """It began while the first had no trial yet; so it is told by what that wrote at its own beginning."""
    other = "final.prune_ratio=0.3..0.6"
    tried = search_module._Search._tried

    def another_begins(self: Any, number: int, values: Any) -> Trial:
        monkeypatch.setattr(search_module._Search, "_tried", tried)
        with pytest.raises(RecipeError, match="holds a sweep with other params"):
            run("out", other, trials=1)
        return tried(self, number, values)

    monkeypatch.setattr(search_module._Search, "_tried", another_begins)
    result, _ = run("out", RATIO, trials=2)
    assert [trial.state for trial in result.trials] == ["complete"] * 2
    assert json.loads(Path("out/sweep/sweep.json").read_text(encoding="utf-8"))["identity"]["params"] == [RATIO]


def test_a_sweep_whose_record_another_one_replaced_stops(tiny_workspace, monkeypatch):
    tried = search_module._Search._tried

    def replaced(self: Any, number: int, values: Any) -> Trial:
        file = Path("out/sweep/sweep.json")
        content = json.loads(file.read_text(encoding="utf-8"))
        content["identity"]["params"] = ["lora.rank=[1, 2]"]
        file.write_text(json.dumps(content), encoding="utf-8")
        return tried(self, number, values)

    monkeypatch.setattr(search_module._Search, "_tried", replaced)
    with pytest.raises(RecipeError, match="holds a sweep with other params"):
        run("out", RATIO, trials=2)


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
    assert re.match(r"stopped by SIGTERM at final-0\.\d\d step 1; run the same command again to go on\n", stopped.err)
    resumed = cli(*arguments)
    assert resumed.status == 0
    assert resumed.err == ""
    assert "source adapter" not in resumed.out
    assert "is the best by dev loss" in resumed.out
    assert f"best recipe {Path('runs/tiny/sweep/best.yaml')}" in resumed.out
    assert "it prunes nothing" not in resumed.out
    rates = cli("sweep", "tiny.yaml", "--param", f"{RATE}=[0.01]", "--trials", "1", "--output", "rates")
    assert (
        "it prunes nothing, as its trials did; take the line prune_ratio out of it, and `run` learns one"
        in " ".join(rates.out.split())
    )


def test_the_test_split_is_never_looked_at(tiny_workspace, monkeypatch):
    seen: set[str] = set()
    make = ProbeSet.__init__

    def spy(self: ProbeSet, examples: Any, *args: Any, **kwargs: Any) -> None:
        seen.update(example.id for example in examples)
        make(self, examples, *args, **kwargs)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be answered")

    monkeypatch.setattr(ProbeSet, "__init__", spy)
    monkeypatch.setattr(session_module, "Reader", fail)
    run("out", RATIO, trials=2)
    splits = session_of().splits
    assert {example.id for example in splits.dev} <= seen
    assert not {example.id for example in splits.test} & seen
    result, _ = run("no-test", RATIO, trials=1, overrides=("data.target.test=0",))
    assert result.best == 1


def test_a_folder_belongs_to_one_sweep(tiny_workspace):
    run("out", RATIO, trials=1)
    with pytest.raises(RecipeError, match="holds a sweep with other params, sampler; give those"):
        run("out", "final.prune_ratio=0.1..0.7", sampler="random", trials=1)
    with pytest.raises(RecipeError, match="holds a sweep with other recipe"):
        run("out", RATIO, trials=1, overrides=("lora.rank=3",))


@pytest.mark.parametrize(
    ("old", "new"), [('"values": {', '"values": ['), ('"final.prune_ratio": 0.', '"final.prune_ratio": 7.'), ("{", "")]
)
def test_a_sweep_file_that_was_changed_is_refused_in_one_line(tiny_workspace, cli, old, new):
    run("out", RATIO, trials=1)
    file = Path("out/sweep", SWEEP_FILE)
    file.write_text(file.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    before = file.read_bytes()
    result = cli("sweep", "tiny.yaml", "--param", RATIO, "--trials", "2", "--output", "out")
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert "sweep.json cannot be read" in result.err
    assert "remove it to begin the sweep anew" in result.err
    assert file.read_bytes() == before


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
        (("--param", "final.deliver=[best, grasp]"), "a trial ends with its final run, which this does not touch"),
        (("--param", "final.all_rows=[true, false]"), "a trial ends with its final run, which this does not touch"),
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
        (("--param", RATIO, "--sampler", "bayes"), "sampler is 'bayes'; allowed: tpe, random"),
        (("--param", RATIO, "--trials", "0"), "trials is 0"),
        (("--param", RATIO, "--seed", "-1"), "seed is -1"),
        (("--param", RATIO, "--set", "data.target.dev=0"), "needs a dev split"),
        (("--param", "final.prune_ratio=0..1"), "takes fractions; write 0.0..1.0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(refused, arguments, message):
    refused("sweep", arguments, message)


def test_the_best_of_a_single_run_recipe_is_written(tiny_workspace):
    result, _ = run("out", RATIO, trials=2, overrides=("final.start=controller", "controller.rounds.every=2"))
    best, _ = load_recipe(Path("out/sweep", BEST_FILE))
    assert best.final.prune_ratio == best_of(result).values["final.prune_ratio"]
    assert best.final.start == "merged"


def test_a_missing_extra_is_named(tiny_workspace, cli, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    result = cli("sweep", "tiny.yaml", "--param", RATIO)
    assert result.status == 2
    assert result.err == "error: a sweep needs optuna, which is not installed: pip install 'grasp-lora[sweep]'\n"


@pytest.mark.parametrize("workers", ["0", "21"])
def test_more_workers_than_trials_are_refused(refused, workers):
    refused("sweep", ["--param", RATIO, "--workers", workers], f"workers is {workers}; allowed: 1 to 20")


def test_trials_that_are_proposed_at_once_differ(tiny_workspace):
    parameters = (Parameter("final.prune_ratio", None, 0.1, 0.8),)
    told = [({"final.prune_ratio": 0.1 + 0.05 * number}, 1.0 - 0.01 * number) for number in range(12)]
    first = propose(parameters, told, "tpe", 1)
    assert first == propose(parameters, told, "tpe", 1, [])
    second = propose(parameters, told, "tpe", 1, [first])
    assert second != first  # the same seed: what is under way alone tells them apart


def test_processes_that_torchrun_started_are_refused(tiny_workspace, cli, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    result = cli("sweep", "tiny.yaml", "--param", RATIO)
    assert result.status == 2
    assert "start it without torchrun" in result.err


def test_a_full_disk_is_no_fault_of_the_values(
    tiny_workspace: Path, full_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="cannot be written"):
        run("sweep", RATIO, overrides=("save_every=1",), trials=2)
    assert json.loads(next(Path("sweep").rglob(SWEEP_FILE)).read_text(encoding="utf-8"))["trials"] == []
    monkeypatch.undo()
    monkeypatch.chdir(tiny_workspace)
    assert {trial.state for trial in run("sweep", RATIO, overrides=("save_every=1",), trials=2)[0].trials} == {
        "complete"
    }


def test_other_values_that_come_to_the_same_final_run_count_it_once(tiny_workspace):
    result, recorder = run("out", "target.on=[null,source,auto]", trials=6, sampler="random", seed=0)
    assert {trial.values["target.on"] for trial in result.trials} == {None, "source", "auto"}
    assert len({trial.adapter for trial in result.trials}) == result.cost.runs == 2
    assert recorder.did.count("final 0.00") == 2
    done = {trial.adapter: trial for trial in reversed(result.trials)}
    assert result.cost.seconds == pytest.approx(sum(trial.seconds for trial in done.values()))
    assert result.cost.work == sum(trial.work for trial in done.values())
