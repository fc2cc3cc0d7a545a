"""Which failures a sweep remembers, what it must not go on from, and what a kill at its beginning leaves."""

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recorder import session_of

from grasp_lora import api
from grasp_lora.bench import search as search_module
from grasp_lora.bench.outcomes import Adapter
from grasp_lora.bench.search import SweepSettings, sweep
from grasp_lora.bench.search_space import search_space
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import Record
from grasp_lora.bench.sweep_record import SWEEP_FILE, SweepResult
from grasp_lora.errors import (
    AdapterError,
    DataError,
    DivergedError,
    GraspError,
    LackOfMemoryError,
    ProbeError,
    RecipeError,
    UntrainedError,
)

RATIO = "final.prune_ratio=0.1..0.8"


def run(*overrides: str, param: str = RATIO, trials: int = 1) -> SweepResult:
    return sweep(session_of(*overrides), Path("out"), SweepSettings((param,), trials))


def trials_of(folder: str = "out") -> list[dict[str, Any]]:
    found = json.loads(Path(folder, "sweep", SWEEP_FILE).read_text(encoding="utf-8"))["trials"]
    return list(found)


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], None]:
    """Give `fails(error)`: trials train nothing and end in this error, or well with None."""

    def set_to(error: Exception | None) -> None:
        def finetuned(self: Bench, start: Adapter, prune_ratio: float) -> Adapter:
            if error is not None:
                raise error
            result = {"dev_loss": 1.0, "steps": 3, "best_step": 2}
            return Adapter("key", lambda: None, (Record("final", "key", {}, result, 0.1),))

        monkeypatch.setattr(Bench, "finetuned", finetuned)

    monkeypatch.setattr(Bench, "merged", lambda self: Adapter("merged", lambda: None))
    return set_to


@pytest.mark.parametrize("kind", [DivergedError, ProbeError, AdapterError])
def test_what_the_values_came_to_is_remembered(
    tiny_workspace: Path, fails: Callable[[Exception | None], None], kind: type[GraspError]
) -> None:
    fails(kind("of the values"))
    with pytest.raises(RecipeError, match="none of the 1 trials could be finished; the first says: of the values"):
        run()
    fails(None)
    assert [trial.state for trial in run(trials=2).trials] == ["failed", "complete"]


def unreachable() -> AdapterError:
    error = AdapterError("adapter org/one: the hub gave: timed out")
    error.__cause__ = OSError("timed out")
    return error


@pytest.mark.parametrize(
    "error",
    [
        LackOfMemoryError("the memory does not suffice"),
        DataError("data.jsonl is missing"),
        RecipeError("a tracker"),
        unreachable(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_fault_of_the_values_ends_the_sweep_and_is_tried_again(
    tiny_workspace: Path, fails: Callable[[Exception | None], None], error: GraspError
) -> None:
    fails(error)
    with pytest.raises(type(error), match=str(error)):
        run()
    assert trials_of() == []
    fails(None)
    assert [trial.state for trial in run().trials] == ["complete"]


def test_memory_that_sufficed_for_another_trial_lacks_by_the_values(
    tiny_workspace: Path, fails: Callable[[Exception | None], None]
) -> None:
    batch = "final.training.batch_size=1..1000"
    fails(None)
    run(param=batch)
    fails(LackOfMemoryError("the memory does not suffice"))
    assert [trial.state for trial in run(param=batch, trials=2).trials] == ["complete", "failed"]
    Path("out").rename("before")
    fails(None)
    run()
    fails(LackOfMemoryError("the memory does not suffice"))
    with pytest.raises(LackOfMemoryError):  # no ratio takes more memory than another
        run(trials=2)


@pytest.mark.parametrize("error", [RecipeError("a tracker does not answer"), DataError("data.jsonl is missing")])
def test_what_cannot_be_reached_before_a_trial_ends_the_sweep(
    tiny_workspace: Path, fails: Callable[[Exception | None], None], monkeypatch: pytest.MonkeyPatch, error: GraspError
) -> None:
    """The check that passes when the sweep begins fails before its second trial."""
    fails(None)
    check, asked = search_module.check, 0

    def later(session: Session, **options: Any) -> None:
        nonlocal asked
        asked += 1
        if trials_of() if Path("out/sweep", SWEEP_FILE).exists() else ():
            raise error
        check(session, **options)

    with monkeypatch.context() as patch:
        patch.setattr(search_module, "check", later)
        with pytest.raises(type(error), match=str(error)):
            run(trials=2)
    assert asked > 1
    assert [trial["state"] for trial in trials_of()] == ["complete"]
    assert [trial.state for trial in run(trials=2).trials] == ["complete"] * 2


def test_a_trial_without_its_tracker_is_checked_for_what_its_values_say(
    tiny_workspace: Path, fails: Callable[[Exception | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracker that stops answering between two checks of one trial is no fault of the values either."""
    fails(None)
    seen: list[tuple[str, ...]] = []
    check = search_module.check

    def spied(session: Session, **options: Any) -> None:
        seen.append(session.recipe.report_to)
        check(session, **options)

    monkeypatch.setattr(search_module, "check", spied)
    pytest.importorskip("tensorboard")
    run("report_to=[tensorboard]")
    assert seen == [("tensorboard",), ("tensorboard",), ()]


def test_a_trial_whose_parents_learned_nothing_fails_and_the_sweep_goes_on(
    tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(self: Bench, weights: Any) -> None:
        raise UntrainedError("the adapters to start from change nothing")

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_check_learned", nothing)
        with pytest.raises(RecipeError, match=r"none of the 1 trials .*change nothing"):
            run()
    assert [trial["state"] for trial in trials_of()] == ["failed"]


def test_a_given_adapter_that_is_gone_for_a_moment_fails_no_trial(finished_run: Path) -> None:
    given = ("source.adapters=[run/source]", "target.adapter=run/target", "data.source=null")
    settings = SweepSettings((RATIO,), 1)
    session = session_of(*given)
    shutil.copytree("run", "kept")

    class Gone(type(session.progress)):  # type: ignore[misc]
        def stage(self, title: str) -> None:
            shutil.rmtree("run/source", ignore_errors=True)

    session.progress = Gone()
    assert [trial.state for trial in sweep(session, Path("out"), settings).trials] == ["complete"]


def test_a_kill_before_the_first_file_is_no_obstacle(
    tiny_workspace: Path, fails: Callable[[Exception | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(self: Any) -> None:
        Path("out/.sweep.lock").touch()
        raise Killed

    fails(None)
    with monkeypatch.context() as patch:
        patch.setattr(search_module._Search, "_remember", killed)
        with pytest.raises(Killed):
            run()
    assert [trial.state for trial in run().trials] == ["complete"]


CODE = "from grasp_lora.method.merging import MERGE_RULES\nrule = MERGE_RULES['exact']\n"
OWN = "merge.rule=own_of_sweep:rule"


@pytest.fixture
def own_code(tiny_workspace: Path) -> Iterator[Callable[[str], None]]:
    """Give `own_code(text)`: a merge rule's file as a process of its own would load it."""

    def write(text: str) -> None:
        Path("own_of_sweep.py").write_text(text)
        shutil.rmtree("__pycache__", ignore_errors=True)
        importlib.invalidate_caches()
        sys.modules.pop("own_of_sweep", None)

    yield write
    sys.modules.pop("own_of_sweep", None)


def test_code_among_the_values_of_a_sweep_is_allowed_and_found_as_that_of_a_recipe(
    own_code: Callable[[str], None], fails: Callable[[Exception | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(None)
    own_code("raise SystemExit('imported')")
    for param in ("merge.rule=[exact,own_of_sweep:rule]", "merge=[{rule: own_of_sweep:rule}]"):
        with pytest.raises(RecipeError, match=r"merge\.rule names code, 'own_of_sweep:rule'; .* --allow-code"):
            api.sweep("tiny.yaml", folder="out", params=(param,), trials=1)
    own_code(CODE)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    _, found = api.sweep(
        "../tiny.yaml", folder="out", params=(f"{OWN.replace('=', '=[')}]",), trials=1, allow_code=True
    )
    assert [trial.values for trial in found.trials] == [{"merge.rule": "own_of_sweep:rule"}]


@pytest.mark.parametrize(
    ("param", "changes", "said"),
    [
        ("merge.seed=1..9", (), "merge.seed changes nothing: merge rule 'exact' draws nothing"),
        ("merge.density=0.1..0.9", (), "merge.density changes nothing: merge rule 'exact' keeps all weights"),
        ("source.nonsense=[1]", ("source.adapters=[somewhere]",), "unknown key 'source.nonsense'"),
        (
            "source.training.learning_rate=1e-5..1e-2:log",
            ("source.adapters=[somewhere]",),
            "source.training.learning_rate changes nothing: source.adapters is given, so that none is trained",
        ),
        (
            "target.training.epochs=[1,2]",
            ("target.adapter=somewhere",),
            "target.training.epochs changes nothing: target.adapter is given",
        ),
        ("mask.score=[magnitude,input_aware]", (), "mask.score changes nothing: a trial prunes nothing without"),
        (
            "final.mode=[hold,reselect]",
            ("final.prune_ratio=0.0",),
            "final.mode changes nothing: a trial prunes nothing",
        ),
        (
            "mask.score=[magnitude,input_aware]",
            ("final.prune_ratio=0.5", "final.mask.score=magnitude"),
            "mask.score changes nothing: final.mask is given",
        ),
    ],
)
def test_a_key_that_changes_nothing_is_not_swept(
    param: str, changes: tuple[str, ...], said: str, tiny_workspace: Path
) -> None:
    recipe = session_of(*changes).recipe
    with pytest.raises(RecipeError, match=re.escape(said)):
        search_space((param,), recipe)
    assert search_space(("merge.rule=[exact,dare_ties]", "merge.seed=1..9", "merge.density=0.1..0.9"), recipe)
    assert search_space(("mask.score=[magnitude,input_aware]", "final.prune_ratio=[0.2,0.5]"), session_of().recipe)
    masked = session_of("final.prune_ratio=0.5", "final.mask.score=magnitude").recipe
    with pytest.raises(RecipeError, match=r"mask.score changes nothing: final.mask is given"):
        search_space(("mask.score=[magnitude,input_aware]", "final.training.epochs=[1,2]"), masked)
    decided = session_of("source.adapters=[a,b]", "target.adapter=c").recipe
    assert search_space(("source.adapters.0=[x,y]",), decided)
    assert search_space(("source.adapters=[[],[a]]", "source.training.epochs=[1,2]"), decided)
    assert search_space(("target.adapter=[null,a]", "target.training.learning_rate=1e-5..1e-3:log"), decided)
