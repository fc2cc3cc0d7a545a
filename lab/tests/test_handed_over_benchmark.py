"""Whether runs hand over the best adapter their users could have had, from metrics whose answer is known."""

import json
from pathlib import Path
from typing import Any

import handed_over
import numpy as np
import pytest


def run(folder: Path, chosen: str, **scores: float) -> str:
    folder.mkdir()
    content: dict[str, Any] = {
        "systems": {
            name: {"dev_loss": None, "test_loss": 1.0, "metrics": {"f1": score}} for name, score in scores.items()
        },
        "delivered": {"name": chosen, "title": chosen, "why": "so"},
        "prune_ratio": 0.5,
        "test_examples": 3,
    }
    (folder / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def test_a_row_a_run_and_the_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        run(
            tmp_path / "1",
            "continued",
            zero_shot=90,
            source=40,
            source_2=52,
            target=20,
            merged=30,
            continued=50,
            grasp=45,
        ),
        run(tmp_path / "2", "grasp", zero_shot=1, source=40, target=41, merged=43, continued=50, grasp=45),
        run(tmp_path / "3", "source", zero_shot=1, source=40, merged=44, grasp=45),
    ]
    assert handed_over.main(folders) == 0
    out = capsys.readouterr().out.splitlines()
    lines = [[cell.strip() for cell in line.split("|")[2:-1]] for line in out[2:]]
    assert lines[0] == ["continued", "50.0", "-2.0", "-2.0", "+0.0", "+5.0", "–"]
    assert lines[1] == ["grasp", "45.0", "+4.0", "+2.0", "-5.0", "+0.0", "–"]  # its merge is no parent
    assert lines[2] == ["source", "40.0", "-4.0", "-4.0", "+0.0", "-5.0", "–"]  # on the source the sum is one
    assert lines[3] == [
        "",
        "45.0",
        "-0.7 ± 10.3",
        "-1.3 ± 7.6",
        "-1.7 ± 7.2",
        "+0.0 ± 12.4",
        "–",
    ]  # 4.303 standard errors of three runs
    always = {name: rest for name, *rest in ([cell.strip() for cell in line.split("|")[1:-1]] for line in out[9:])}
    assert list(always) == ["source", "merged", "continued", "grasp"]  # not every run has a target adapter
    assert always["source"] == ["40.0", "+5.0 ± 12.4"]
    assert always["continued"] == ["46.7", "-1.7 ± 7.2"]  # in the third run the source adapter


def test_a_last_training_stands_beside_what_was_chosen_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        run(tmp_path / "1", "grasp", source=40, merged=44, continued=43, grasp=45, all_rows=47),
        run(tmp_path / "2", "continued", source=40, merged=30, continued=35, grasp=42, all_rows=34),
    ]
    file = tmp_path / "1/metrics.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["systems"]["all_rows"]["test_loss"] = 0.8
    file.write_text(json.dumps(content), encoding="utf-8")
    assert handed_over.main(folders) == 0
    after = capsys.readouterr().out
    assert "| 2 | all_rows | 34.0 | -6.0 | -6.0 | -1.0 | -8.0 |" in after.replace(str(tmp_path) + "/", "")
    assert "| the choice, before the last training | 40.0 | +0.5 |" in after
    assert "The last training moves the test loss by -0.100 nats." in after
    assert handed_over.main(["--chosen", *folders]) == 0
    before = capsys.readouterr().out
    assert "| 2 | continued | 35.0 | -5.0 | -5.0 | +0.0 | -7.0 |" in before.replace(str(tmp_path) + "/", "")
    assert "last training" not in before


@pytest.mark.parametrize(
    ("on", "cells"),
    [
        ("source", ["52.0", "+2.0", "+2.0", "+6.0", "+1.0", "–"]),
        ("null", ["52.0", "-8.0", "-8.0", "+6.0", "+1.0", "–"]),
    ],
)
def test_a_comparison_has_a_row_a_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], on: str, cells: list[str]
) -> None:
    # Where the sum is pruned, a target adapter trained apart is no part of it.
    stored = Path(__file__).parents[1] / "results/compare-nusax-jv-on-source/compare.json"
    content = json.loads(stored.read_text(encoding="utf-8"))
    content["seeds"] = content["seeds"][:3]
    known = {
        "source_only": [40.0],
        "target_only": [60.0, 10.0, 10.0],
        "merged": [50.0, 1.0, 1.0],
        "continued": [46.0, 45.0, 45.0],
        "grasp": [51.0, 1.0, 1.0],
        "delivered": [52.0, 44.0, 44.0],
    }
    content["rows"] = [row for row in content["rows"] if row["method"] in known]
    for row in content["rows"]:
        row["scores"]["accuracy"] = {"mean": 1.0, "sd": None, "values": known[row["method"]]}
    wide = json.loads(json.dumps(content["rows"][0])) | {"method": "target_wide"}  # a method that no run has
    content["rows"].append(wide)
    (tmp_path / "compare.json").write_text(json.dumps(content), encoding="utf-8")
    recipe = (stored.parent / "recipe.yaml").read_text(encoding="utf-8")
    assert "'on': source" in recipe
    (tmp_path / "recipe.yaml").write_text(recipe.replace("'on': source", f"'on': {on}"), encoding="utf-8")
    assert handed_over.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out.replace(str(tmp_path), "it")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[2:5]]
    assert [line[0] for line in lines] == ["it, seed 42", "it, seed 1337", "it, seed 9001"]
    assert lines[0][2:] == cells
    assert lines[1][2:] == ["44.0", "+4.0", "+4.0", "-1.0", "+43.0", "–"]
    content["rows"] = [row for row in content["rows"] if row["method"] != "merged"]
    (tmp_path / "compare.json").write_text(json.dumps(content), encoding="utf-8")
    assert handed_over.main([str(tmp_path)]) == 2
    assert "lacks merged; compare again with --methods merged" in capsys.readouterr().err


STORED = Path(__file__).parents[1] / "results/compare-nusax-jv-on-source"
KNOWN = {
    "source_only": [40.0, 41.0, 42.0],
    "target_only": [60.0, 10.0, 70.0],
    "merged": [50.0, 80.0, 50.0],
    "continued": [46.0, 45.0, 44.0],
    "grasp": [51.0, 1.0, 1.0],
    "delivered": [52.0, 44.0, 44.0],
}


def comparison(folder: Path, on: str | None, without: tuple[str, ...] = (), **changes: Any) -> str:
    """A comparison of three seeds whose scores are known; a recipe without the key where `on` is empty."""
    folder.mkdir()
    stored = json.loads((STORED / "compare.json").read_text(encoding="utf-8"))
    content = stored | {"seeds": stored["seeds"][:3]} | changes
    content["rows"] = [row for row in content["rows"] if row["method"] in KNOWN.keys() - set(without)]
    for row in content["rows"]:
        row["scores"]["accuracy"] = {"mean": 1.0, "sd": None, "values": KNOWN[row["method"]]}
    (folder / "compare.json").write_text(json.dumps(content), encoding="utf-8")
    recipe = (STORED / "recipe.yaml").read_text(encoding="utf-8")
    recipe = recipe.replace("  'on': source\n", f"  'on': {on}\n" if on else "")
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return str(folder)


def rows_of(text: str, count: int) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2 : 2 + count]]


def test_with_auto_each_seed_has_the_parents_of_what_it_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = comparison(tmp_path / "it", "auto", merge="the average (42, 9001); the sum (1337)")
    assert handed_over.main([folder]) == 0
    rows = rows_of(capsys.readouterr().out, 3)
    assert [row[3] for row in rows] == ["-8.0", "-36.0", "-26.0"]  # minus target, the sum, target
    without = comparison(tmp_path / "sums", "auto", ("target_only",), merge="the sum (42, 1337, 9001)")
    assert handed_over.main([without]) == 0
    assert [row[3] for row in rows_of(capsys.readouterr().out, 3)] == ["+2.0", "-36.0", "-6.0"]
    without = comparison(tmp_path / "averages", "auto", ("target_only",), merge="the average (42, 1337, 9001)")
    assert handed_over.main([without]) == 2
    assert "lacks target_only; compare again with --methods target_only" in capsys.readouterr().err


def test_a_cross_validation_has_a_row_a_fold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [{"test": 9, "train": 9, "source_train": 9}] * 3
    folder = comparison(tmp_path / "it", "auto", folds=sizes, seeds=[42], merge="the average (1, 3); the sum (2)")
    assert handed_over.main([folder]) == 0
    rows = rows_of(capsys.readouterr().out, 3)
    assert [row[0].removeprefix(folder) for row in rows] == [", fold 1", ", fold 2", ", fold 3"]
    assert [row[2] for row in rows] == ["52.0", "44.0", "44.0"]
    assert [row[3] for row in rows] == ["-8.0", "-36.0", "-26.0"]


def test_an_older_recipe_does_not_say_where_the_target_adapter_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = comparison(tmp_path / "it", None)
    assert "'on'" not in (tmp_path / "it/recipe.yaml").read_text(encoding="utf-8")
    assert handed_over.main([folder]) == 0  # on the backbone alone, as all were then
    assert [row[3] for row in rows_of(capsys.readouterr().out, 3)] == ["-8.0", "+3.0", "-26.0"]
    (tmp_path / "it/recipe.yaml").unlink()
    assert handed_over.main([folder]) == 2
    assert "recipe.yaml cannot be read as a recipe" in capsys.readouterr().err


def test_a_folder_without_metrics_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert handed_over.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_best_in_hindsight_owes_a_part_to_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Two parents of one worth, whose rows differ by chance: the better of them leads by it, until other rows choose.
    folder, random = Path(run(tmp_path / "1", "grasp", source=50, merged=52, grasp=50)), np.random.default_rng(1)
    (folder / "evaluation").mkdir()
    half = random.permutation(np.repeat([0.0, 100.0], 50))
    for name, values in (("source", half), ("merged", random.permutation(half)), ("grasp", random.permutation(half))):
        lines = [json.dumps({"id": "x", "prediction": "", "loss": 1.0, "scores": {"f1": value}}) for value in values]
        (folder / "evaluation" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert handed_over.main([str(folder)]) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[2:-1]]
    assert (cells[2], cells[0]) == ("-2.0", "grasp")  # of the scores in metrics.json
    assert 0 < float(cells[6]) < 6  # of equal totals the one that leads in the rows that choose is behind in the others
