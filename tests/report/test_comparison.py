"""The tables of a comparison: what each method scores and costs, and what its differences show."""

import io
from html import unescape
from pathlib import Path
from typing import Any

from made_runs import compared, fixture_comparison  # noqa: F401
from rich.console import Console

from grasp_lora.engine.comparison import Comparison, FoldSizes, MeanAndSd
from grasp_lora.report.pages import command_of, print_comparison, write_comparison
from grasp_lora.report.tables import comparison_cost, comparison_scores, comparison_verdicts


def text_of(content: Comparison, folder: Path) -> str:
    """What the Markdown file says."""
    return unescape(write_comparison(folder, content).read_text(encoding="utf-8")).replace("\\", "")


def changed(content: Comparison, method: str, **changes: Any) -> Comparison:
    """The same with another row."""
    rows = [row.model_copy(update=changes) if row.method == method else row for row in content.rows]
    return content.model_copy(update={"rows": rows})


def cells_of(content: Comparison) -> dict[str, list[str]]:
    return {row[0].text: [cell.text for cell in row[1:]] for row in comparison_scores(content).rows}


def test_each_method_has_its_scores_and_what_the_reference_leads_it_by(comparison: Comparison) -> None:
    rows = cells_of(comparison)
    assert rows["GRASP"] == ["40.0 ± 10.0 %", "micro-dev", "0.8570 ± 0.0100", "43.20 ± 0.01", "it is the reference"]
    assert rows["source adapter continued on the target"][-1] == "+3.20 F1, better (+2.20 to +4.20)"
    assert rows["merged, not trained"][-1] == "+1.10 F1 (+0.10 to +2.10)"  # not planned: no verdict
    best = [cell.text for row in comparison_scores(comparison).rows for cell in row if cell.best]
    assert best == ["0.8570 ± 0.0100", "43.20 ± 0.01"]


def test_all_that_print_like_the_best_are_best(comparison: Comparison) -> None:
    rows = [compared("continued", 40.0, 0.857), compared("merged", 43.196, 0.857), compared("grasp", 43.2, 0.857)]
    table = comparison_scores(comparison.model_copy(update={"rows": rows}))
    assert [[cell.best for cell in row[3:5]] for row in table.rows] == [[False, False], [False, True], [False, True]]


def test_a_gain_in_the_loss_that_no_answer_shows_is_called_over_confidence_saved(comparison: Comparison) -> None:
    content = comparison.model_copy(update={"rows": [compared("continued", 43.1, 0.9), compared("grasp", 43.2, 0.857)]})
    loss, f1 = (cell.text for cell in comparison_verdicts(content).rows[0][1:])
    assert loss == "-0.0430 nats, better (-0.0530 to -0.0330); over-confidence saved"
    assert f1 == "+0.10 F1, no difference shown (-0.90 to +1.10)"
    assert cells_of(content)["source adapter continued on the target"][-1].endswith("; over-confidence saved")


def test_what_could_not_run_says_why_over_all_columns(comparison: Comparison, tmp_path: Path) -> None:
    [line] = [line for line in text_of(comparison, tmp_path).splitlines() if "nevergrad" in line]
    assert "unavailable: needs nevergrad" in line
    assert line.count("|") == len(comparison_scores(comparison).columns) + 1


def test_speed_ups_name_their_grid_and_count_the_merged_adapters_where_a_row_does_without(
    comparison: Comparison,
) -> None:
    table = comparison_cost(comparison)
    assert "speed-up over grid of GRASP's final runs" in table.columns
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert rows["GRASP"] == ["1", "10", "100", "8.00", "3", "30"]
    assert rows["source adapter continued on the target"][3] == "3.33"  # 1,000 passes against 300


def test_it_says_what_final_runs_use_the_dev_set_for(comparison: Comparison, tmp_path: Path) -> None:
    for changes, told in (
        ({}, "Final runs stop early on the dev set, and keep the adapter with the lowest dev loss."),
        ({"stops_early": False}, "Final runs train to their end, and keep their last step."),
        ({"dev_examples": 0}, "There is no dev set: final runs train to their end."),
    ):
        assert told in text_of(comparison.model_copy(update=changes), tmp_path)


def test_a_cross_validation_says_its_folds(comparison: Comparison, tmp_path: Path) -> None:
    folds = [FoldSizes(test=25, train=60), FoldSizes(test=26, train=59)]
    settings = comparison.settings.model_copy(update={"folds": 4, "seeds": (42,)})
    content = comparison.model_copy(update={"folds": folds, "settings": settings, "seeds": [42]})
    text = text_of(content, tmp_path)
    assert "2 of 4 folds: 100 tested once each; in a fold 25 to 26 test, 6 dev and 4 micro-dev, 59 to 60 train" in text
    assert "over the 100 examples of all folds together" in text
    assert command_of(content) == (
        "grasp-lora compare compare/recipe.yaml --methods continued,lorahub,merged,grid,grasp --seeds 42 "
        "--grid 0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8 --reference grasp --folds 4 --output ."
    )
    assert command_of(content) in text


def test_a_given_ratio_is_called_so(comparison: Comparison, tmp_path: Path) -> None:
    given = "GRASP: the recipe gives the prune ratio, so none was learned"
    assert given not in text_of(comparison, tmp_path)
    assert given in text_of(changed(comparison, "grasp", chosen_on=None), tmp_path)


def test_scores_that_run_to_one_are_told_apart(comparison: Comparison) -> None:
    score = {"own:metric": MeanAndSd(mean=0.4312, sd=0.0021, values=[0.4312])}
    rows = [row.model_copy(update={"scores": score, "against": {}}) for row in comparison.finished]
    content = comparison.model_copy(update={"rows": rows, "metrics": ["own:metric"]})
    assert cells_of(content)["GRASP"][2] == "0.4312 ± 0.0021"


def test_a_table_that_goes_to_a_file_is_wide_and_one_for_a_narrow_terminal_cuts_nothing_off(
    comparison: Comparison,
) -> None:
    content = comparison.model_copy(update={"warnings": ["something [bold]was[/bold] left out"]})
    content = changed(content, "grasp", taken="GRASP's result (42, 1337)")
    printed = {}
    for terminal in (False, True):
        file = io.StringIO()
        print_comparison(content, Console(file=file, width=80, force_terminal=terminal, no_color=True))
        printed[terminal] = file.getvalue()
    assert any(len(line) > 120 for line in printed[False].splitlines())
    assert max(len(line) for line in printed[False].splitlines()) <= 180
    assert "GRASP, by seed: GRASP's result (42, 1337)" in printed[False]
    assert "WARNING: something [bold]was[/bold] left out" in printed[False]
    assert "…" not in printed[True]


def test_names_are_escaped(comparison: Comparison, tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>|*x*"
    content = changed(comparison, "lorahub", unavailable=attack).model_copy(
        update={"name": attack, "warnings": [attack]}
    )
    assert "<script" not in write_comparison(tmp_path, content).read_text(encoding="utf-8")
