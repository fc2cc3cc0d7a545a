"""Rules that choose an adapter, on losses and scores whose answer is known."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verdict

from grasp_lora import api
from grasp_lora.bench.deliver import best_of
from grasp_lora.bench.store import Store
from grasp_lora.storage.claims import Busy

ROWS = 40


def values(**means: float) -> dict[str, np.ndarray]:
    """Rows whose paired differences have a standard error of about 0.1."""
    noise = np.where(np.arange(ROWS) % 2, 0.62, -0.62)
    return {name: mean + noise * (number + 1) for number, (name, mean) in enumerate(means.items())}


def test_the_usual_candidate_stays_within_its_standard_errors() -> None:
    scores = values(continued=0.0, target=0.0)
    for behind, chosen in ((0.15, "continued"), (0.25, "target")):
        losses = values(continued=1.0 + behind, target=1.0)
        assert verdict.unless("continued", 2.0, losses, scores) == chosen
        assert verdict.lowest_loss(losses, scores) == "target"


def test_of_equal_scores_the_lower_loss_decides() -> None:
    scores = {"continued": np.ones(4), "grasp": np.ones(4)}
    losses = {"continued": np.full(4, 2.0), "grasp": np.full(4, 1.0)}
    assert verdict.highest_score(losses, scores) == "grasp"
    assert verdict.both(values(continued=1.0, grasp=1.1), values(continued=1.0, grasp=1.5)) == "grasp"


def test_a_rule_is_judged_on_the_rows_that_did_not_choose() -> None:
    # Each candidate is right in one half of the rows, and its loss says so: what chooses well on some rows is wrong on others.
    first = (np.arange(ROWS) < ROWS // 2).astype(float)
    scores = {name: 100 * (first if name == "continued" else 1 - first) for name in ("continued", "grasp", "merged")}
    seed = verdict.Seed({name: -own for name, own in scores.items()}, scores)
    found = {row[0]: row for row in verdict.replay([seed], ROWS // 2, 50, 2)}
    assert float(found["highest score"][1]) < float(found["always continued"][1])
    assert found["always continued"][2] == "+0.00"
    assert found["always grasp"][4] == "grasp 100 %"


def test_the_design_effect_is_the_size_of_groups_that_are_wholly_alike() -> None:
    alike = np.repeat(np.random.default_rng(0).normal(size=10), 4)
    seed = verdict.Seed({"continued": np.zeros(40), "grasp": alike}, {"continued": np.zeros(40), "grasp": np.zeros(40)})
    groups = [f"article {row // 4}" for row in range(40)]
    assert verdict.design_effects([seed], groups) == "Design effect of 10 groups of 40 rows: losses 4.00 (4.00 to 4.00)"


def test_the_table_of_a_comparison(tiny_workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["tiny.yaml", "--output", "f", "--seeds", "1,2", "--rows", "2", "--draws", "5"]
    assert verdict.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Design effect of 8 groups of 8 rows: losses 1.00 (1.00 to 1.00)")
    titles = [line.split(" | ")[0].strip("| ") for line in lines[4:]]
    assert titles == [*(f"always {name}" for name in verdict.CANDIDATES.values()), *verdict.RULES, "a run's"]


def test_a_runs_rule_is_told_the_groups_of_the_rows_that_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    random, seen = np.random.default_rng(3), []
    losses = {name: random.normal(size=ROWS) for name in ("source", "merged", "continued", "grasp")}
    groups = np.arange(ROWS) // 4

    def noted(given: dict[str, list[float]], split: str, **more: Any) -> Any:
        places = [losses["grasp"].tolist().index(one) for one in given["grasp"]]
        seen.append((more["groups"], None if more["groups"] is None else [place // 4 for place in places]))
        return best_of(given, split, **more)

    monkeypatch.setattr(verdict, "best_of", noted)
    verdict.replay([verdict.Seed(losses, losses, groups)], 10, 1, 5)
    assert len(seen) == 5
    assert all(given == expected is not None for given, expected in seen)
    verdict.replay([verdict.Seed(losses, losses)], 10, 1, 1)
    assert seen[-1] == (None, None)


@pytest.mark.parametrize("rows", [0, 1, 8, 50])
def test_rows_that_leave_none_to_judge_are_one_line(
    finished_run: Path, capsys: pytest.CaptureFixture[str], rows: int
) -> None:
    assert verdict.main(["--runs", str(finished_run), "--rows", str(rows)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --rows is {rows}, but there are 8 test rows, of which at least 2 choose")
    assert said.count("\n") == 1


def test_the_groups_of_a_run_are_read(finished_run: Path) -> None:
    file = finished_run / "data.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"test_groups": [0, 0, 1, 1, 2, 2, 3, 3]}), encoding="utf-8")
    [seed] = verdict.of_runs([finished_run])[1]
    assert seed.groups is not None
    assert seed.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    file.write_text(json.dumps({name: one for name, one in content.items() if name != "test_groups"}), encoding="utf-8")
    assert verdict.of_runs([finished_run])[1][0].groups is None  # of an older version


def test_the_table_of_a_comparison_stays_and_what_is_being_done_elsewhere_is_waited_for(
    tiny_workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    api.compare("tiny.yaml", (), "f", methods=("zero_shot",), reference="zero_shot", seeds=(1,))
    before = {file: file.read_bytes() for file in Path("f/compare").iterdir()}
    get, busy = Store.get, []

    def once(self: Store, step: str, *given: Any, **more: Any) -> Any:
        if step == "target" and not busy:
            busy.append(step)
            raise Busy("another process is at it")
        return get(self, step, *given, **more)

    monkeypatch.setattr(Store, "get", once)
    assert verdict.main(["tiny.yaml", "--output", "f", "--seeds", "1", "--rows", "2", "--draws", "2"]) == 0
    assert busy
    assert "| always target |" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in Path("f/compare").iterdir()} == before


def test_with_auto_each_seed_has_a_target_adapter_where_the_average_was_taken(
    tiny_workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    average = ["source.training.learning_rate=0.2", "source.training.epochs=3"]
    total = ["target.training.learning_rate=1e-5", "source.training.epochs=4"]
    for changes, there in ((average, True), (total, False)):
        given = [part for change in ("target.on=auto", *changes) for part in ("--set", change)]
        asked = ["tiny.yaml", "--output", f"of-{there}", "--seeds", "42", "--rows", "4", "--draws", "2", *given]
        assert verdict.main(asked) == 0
        assert ("| always target |" in capsys.readouterr().out) == there


def test_a_method_without_a_result_is_one_line(
    finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(finished_run)
    asked = ["tiny.yaml", "--output", "f", "--seeds", "1", "--rows", "2"]
    nothing = [f"{stage}.training.learning_rate=1e-30" for stage in ("source", "target")]
    assert verdict.main([*asked, *(part for one in nothing for part in ("--set", one))]) == 2
    said = capsys.readouterr().err
    assert "error: grasp has no result in f: failed with seed 1" in said


def test_finished_runs_count_as_seeds(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict.main(["--runs", str(finished_run), "--rows", "4", "--draws", "5"]) == 0
    assert "| always grasp | " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        verdict.main(["--rows", "4"])


def test_ahead_is_more_than_so_many_standard_errors() -> None:
    losses = values(source=1.15, target=1.0)
    assert verdict.ahead(1.0, losses, losses) == "grasp"
    assert verdict.ahead(2.0, losses, losses) == "continued"
