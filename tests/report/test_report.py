"""The report of a run: what it says, and that it says it safely."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import plotly.graph_objects as go
import pytest
from made_runs import (
    SYSTEMS,
    answered,
    compared_anew,
    fixture_run,  # noqa: F401
    fixture_whole_run,  # noqa: F401
    with_delivered,
    with_estimate,
    with_info,
    with_kept,
    with_metrics,
    with_recipe,
    with_report,
    with_rounds,
    with_scores,
)

from grasp_lora.engine.differences import Difference
from grasp_lora.engine.run_folder import Run, SystemScores
from grasp_lora.evaluation.statistics import PairedComparison, compare_with_baselines
from grasp_lora.report.card import write_model_card
from grasp_lora.report.delivered import gain, headline, higher, next_step, verdict, warning_of
from grasp_lora.report.examples import examples_of
from grasp_lora.report.figures import figures_of
from grasp_lora.report.pages import write_report
from grasp_lora.report.tables import (
    confusion,
    kept_share,
    losses_table,
    percent,
    scores_table,
)


def text_of(record: Run, folder: Path) -> str:
    """What the report says, with plain spaces and signs."""
    page = write_report(compared_anew(record), folder).read_text(encoding="utf-8")
    return page.replace("\u00a0", " ").replace("\u2212", "-")


def card(record: Run, folder: Path) -> str:
    return write_model_card(compared_anew(record), folder, folder).read_text(encoding="utf-8").replace("\u00a0", " ")


def with_f1(run: Run, f1: Callable[[str, int], float]) -> Run:
    """Other F1 of all answers, by the system and the place of the row, and the scores that come of it."""
    for name in SYSTEMS:
        values = [f1(name, place) for place in range(8)]
        run = answered(run, name, lambda place, values=values: {"scores": {"f1": values[place]}})
        run = with_scores(run, **{name: {"f1": fmean(values)}})
    return run


class Page(HTMLParser):
    """The tags, table rows and scripts of a page, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open = ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""
        self._in_cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
            return
        self.text += data
        if self._in_cell and self.tags[-1] != ("span", {"class": "unseen"}):
            self.rows[-1][-1] += data.strip()

    @property
    def figures(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.scripts[0])
        return loaded

    def row(self, name: str) -> list[str]:
        return next(cells for cells in self.rows if cells[0] == name)


def page_of(record: Run, folder: Path) -> Page:
    return Page(write_report(compared_anew(record), folder).read_text(encoding="utf-8"))


def test_the_table_holds_the_scores_and_the_measured_ratio(run: Run, tmp_path: Path) -> None:
    page = page_of(run, tmp_path)
    for system, name in zip(SYSTEMS, ("Source only", "Target only", "Merged, not trained", "GRASP"), strict=True):
        scores = run.metrics.systems[system]
        measured = [f"{scores.metrics[key]:.1f}" for key in ("f1", "exact_match")]
        ratio = percent(1 - kept_share(run.sparsity), 1) if system == "grasp" else percent(0)
        marked = f"{name}, handed over" if system == "grasp" else name
        expected = [marked, *measured, f"{scores.test_loss:.3f}", f"{scores.dev_loss:.3f}", ratio]
        assert expected in page.rows


def test_best_of_each_column_is_bold_and_what_is_handed_over_is_marked(run: Run, tmp_path: Path) -> None:
    page = text_of(run, tmp_path)
    bold = re.findall(r"<td><strong>([^<]*)</strong></td>", page)
    assert bold == ["26.0", "43.2", "26.0", "0.857", "0.822"]  # exact match is a tie of merged and GRASP
    assert page.count('<tr class="chosen"><th scope="row">GRASP<small>, handed over</small></th>') == 1
    head = "<h1>Take this adapter: the merge of both adapters, pruned at 46 % and trained (GRASP).</h1>"
    assert head in page.replace("\u00a0", " ")
    learned = (
        "It prunes 46 % of the merged adapter (95 % interval 38 to 55 %). Test F1 43.2 against 35.0 for the target"
    )
    assert learned in page.replace("\u00a0", " ")
    assert "grasp-lora predict" in page


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [([30, -26], "no difference shown"), ([3, 1], "better"), ([-3, -1], "worse"), ([0], "no difference shown")],
)
def test_what_a_difference_shows_is_said(run: Run, tmp_path: Path, gains: list[float], verdict: str) -> None:
    scores = {name: [40.0 - (gains[i % len(gains)] if name == "target" else 0) for i in range(8)] for name in SYSTEMS}
    theirs = fmean(scores["target"])
    page = text_of(with_f1(run, lambda name, place: scores[name][place]), tmp_path)
    assert f"Test F1 40.0 against {theirs:.1f} for the target adapter alone: {verdict}." in page
    better = "The test rows show another to be better (target only): F1 40.0 against 42.0, -2.0 ("
    assert page.partition("</h1>")[0].count(better) == (verdict == "worse")
    if gains == [0]:
        assert "GRASP against target only: F1 +0.0 points, the same in every draw;" in page
        return
    shown = re.search(r"GRASP against target only: F1 \S+ points \((\S+) to (\S+)\): " + verdict, page)
    assert shown is not None
    expected = compare_with_baselines(scores.pop("grasp"), scores)["target"]
    assert [float(bound) for bound in shown.groups()] == pytest.approx([expected.low, expected.high], abs=0.051)
    assert "95 % for all 3 comparisons together" in page


def test_losses_are_compared_where_scores_are_not_there_by_example(run: Run, tmp_path: Path) -> None:
    for system in SYSTEMS:
        more = 0.5 * (system == "target")
        run = answered(run, system, lambda place, more=more: {"loss": 1.0 + 0.01 * place + more, "scores": {}})
    page = text_of(run, tmp_path)
    assert "GRASP against target only: F1 +8.2 points; test loss -0.500 (-0.500 to -0.500): better." in page
    assert "against merged, not trained: F1 +1.1 points; test loss +0.000, the same in every draw." in page
    assert "for the target adapter alone." in page


def test_rows_of_one_group_are_drawn_together(run: Run, tmp_path: Path) -> None:
    run = answered(run, "grasp", lambda place: {"loss": 1.0 + place})
    alone = compared_anew(run).metrics.differences["target"].loss
    together = replace(run, data=replace(run.data, test_groups=[0, 0, 0, 0, 1, 1, 1, 1]))
    grouped = compared_anew(together).metrics.differences["target"].loss
    assert alone is not None
    assert grouped is not None
    assert grouped.high - grouped.low > alone.high - alone.low
    assert "over the test examples in their 2 groups" in text_of(together, tmp_path)


def test_a_score_of_the_whole_set_has_its_interval(run: Run, tmp_path: Path) -> None:
    """As chrF++ and macro-F1, which are no means over examples."""
    right, wrong = ((1.0, 1.0, 1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)), (0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    for system in SYSTEMS:  # of two labels, each as often; all systems but GRASP answer the first one always
        rows = [right[place % 2] if system == "grasp" or place % 2 == 0 else wrong for place in range(8)]
        run = answered(run, system, lambda place, rows=rows: {"scores": {}, "statistics": {"macro_f1": rows[place]}})
    run = with_scores(run, **{system: {"macro_f1": 100.0 if system == "grasp" else 100 / 3} for system in SYSTEMS})
    assert re.search(
        r"GRASP against target only: Macro-F1 \+66\.7 points \(\+\S+ to \+\S+\): better; ", text_of(run, tmp_path)
    )


def test_what_is_handed_over_is_compared_with_what_there_was_before(run: Run, tmp_path: Path) -> None:
    """Each difference once, with one interval, for all comparisons together: the line of the gain has those of the notes."""
    assert "What is handed over against" not in text_of(run, tmp_path)  # it is GRASP's result
    run = with_delivered(with_recipe(run, final={"deliver": "best"}), name="target", title="the target adapter")
    run = with_f1(run, lambda name, place: 40.0 + place % 3 + (4.0 + place % 2) * (name == "target"))
    page = text_of(run, tmp_path)
    [interval] = set(re.findall(r"\(\+3\.\S+ to \+5\.\S+\)", page))
    assert f"It answers better than the source adapter: F1 45.4 against 40.9, +4.5 {interval}, of 8 test rows." in page
    assert f"What is handed over against source only: F1 +4.5 points {interval}: better; test loss" in page
    assert f"What is handed over against GRASP: F1 +4.5 points {interval}: better; test loss" in page
    assert "Test F1 40.9 against 45.4 for what is handed over: worse." in page
    assert page.count("95 % for all 3 comparisons together") == 1
    assert "What is handed over against target only" not in page
    assert "show another to be better" not in page


@pytest.mark.parametrize("deliver", ["best", "grasp"])
def test_the_first_line_says_that_the_test_rows_show_another_system_to_be_better(
    run: Run, tmp_path: Path, deliver: str
) -> None:
    run = with_delivered(with_recipe(run, final={"deliver": deliver}), title="this one")
    run = with_f1(run, lambda name, place: 40.0 + place % 3 + (4.0 + place % 2) * (name == "merged"))
    sentence = "The test rows show another to be better (merged, not trained): F1 40.9 against 45.4, -4.5 (-5."
    assert sentence in text_of(run, tmp_path).partition("</h1>")[0]
    assert sentence in verdict(compared_anew(run)).replace("\u2212", "-")  # the terminal's first line
    assert sentence in card(run, tmp_path).replace("\u2212", "-")
    run = with_scores(run, merged={"f1": 40.9})
    run = replace(run, predictions={**run.predictions, "merged": run.predictions["grasp"]})
    assert "show another to be better" not in text_of(run, tmp_path)


def test_a_score_that_is_higher_perhaps_by_chance_is_named_with_the_folder_of_its_adapter(
    run: Run, tmp_path: Path
) -> None:
    run = with_delivered(with_recipe(run, final={"deliver": "best"}), name="target", title="the target adapter")
    run = with_f1(run, lambda name, place: 40.0 + (9.0 * (place % 2) - 4.0) * (name in ("merged", "grasp")))
    said = "A higher test F1 than its 40.0: merged, not trained (40.5, in {}merged/); GRASP (40.5, in {}final/). 8 test rows cannot show"
    assert said.format("", "") in text_of(run, tmp_path)
    assert said.format("runs/a/", "runs/a/") in str(higher(compared_anew(run), Path("runs/a")))
    run = with_scores(run, target={"f1": 41.0})
    assert higher(compared_anew(run)) is None
    assert "A higher test" not in text_of(run, tmp_path)


def test_zeros_of_the_merged_adapters_are_not_called_pruned(run: Run, tmp_path: Path) -> None:
    assert kept_share(run.sparsity) < 1
    learned = with_metrics(run, prune_ratio=0.0)
    assert "Nothing was pruned." in text_of(learned, tmp_path)
    assert page_of(learned, tmp_path).row("GRASP, handed over")[-1] == percent(0)
    # Where the recipe prunes nothing, the report does not speak of it.
    given = with_recipe(learned, final={"prune_ratio": 0.0})
    assert page_of(given, tmp_path).row("Merged, trained further, handed over")
    assert not [part for part in ("Pruned<", "Why this ratio", "What was pruned") if part in text_of(given, tmp_path)]
    assert "Pruned<" in text_of(learned, tmp_path)


@pytest.mark.parametrize(("right", "warned"), [(37.5, True), (50.0, False)])
def test_answers_that_are_no_better_than_one_label_have_a_warning(
    run: Run, tmp_path: Path, right: float, warned: bool
) -> None:
    labels = {"nzuri": {"train": 9, "test": 3}, "mbaya": {"train": 5, "test": 5}}
    run = with_report(run, labels=labels, prompt="Text: {text}")
    run = answered(
        run, "grasp", lambda place: {"references": ("nzuri" if place < 3 else "mbaya",), "prediction": "nzuri"}
    )
    run = with_scores(run, grasp={"accuracy": right})
    warning = "It answers 37.5 % of the 8 test rows right, and nzuri every time would have 37.5 %."
    for text in (text_of(run, tmp_path), card(run, tmp_path)):
        assert (warning in text) is warned
        assert not warned or "What helps most: a larger backbone" in text
        assert "What is handed over answers: nzuri 8, mbaya 0." in text


@pytest.mark.parametrize(("more", "shown"), [(10, True), (11, False)])
def test_labels_have_a_table_of_what_was_answered_to_each(run: Run, tmp_path: Path, more: int, shown: bool) -> None:
    labels = {name: {"train": 5} for name in ("nzuri", "mbaya", *(f"label {number}" for number in range(more)))}
    run = with_report(run, labels=labels, prompt="Text: {text}")
    run = answered(
        run,
        run.metrics.delivered.name,
        lambda place: {"references": ("nzuri" if place < 3 else "mbaya",), "prediction": ("nzuri", "mbaya")[place % 2]},
    )
    table = confusion(run)
    assert ("by the answer of what is handed over" in text_of(run, tmp_path)) is shown
    assert (table is not None) is shown
    if table:
        assert table.columns[:3] == ["True label", "nzuri", "mbaya"]
        assert [[cell.text for cell in row[:3]] for row in table.rows[:2]] == [["nzuri", "2", "1"], ["mbaya", "2", "3"]]
        assert [[cell.best for cell in row[1:3]] for row in table.rows[:2]] == [[True, False], [False, True]]
    assert confusion(with_report(run, labels={})) is None


@pytest.mark.parametrize(("score", "weak"), [(24.9, True), (25.0, False), (math.nan, False), (None, False)])
def test_a_model_that_is_weak_at_its_task_is_told_of_with_what_helps(
    run: Run, tmp_path: Path, score: float | None, weak: bool
) -> None:
    run = with_scores(run, grasp={"exact_match": 13.0, "f1": score})
    text = "Its test F1 is 24.9; below 25 most answers are no use. What helps most: a larger backbone (backbone.name), and more"
    assert (text in (warning_of(run) or "")) is weak
    assert (text in text_of(run, tmp_path)) is weak
    assert verdict(run).startswith("Not usable yet (test F1 24.9): the merge") is weak
    assert verdict(run).startswith("Take this adapter: the merge") is not weak


def test_what_beats_the_backbone_alone_may_not_be_usable_yet(run: Run) -> None:
    run = with_scores(run, grasp={"chrf++": 34.9, "bleu": 40.0})
    assert verdict(run).startswith("Not usable yet (test chrF++ 34.9): ")
    sure = PairedComparison(9.0, 5.0, 13.0, 0.01, 0.95, 100, 1000)
    run = with_metrics(run, differences={"zero_shot": Difference("chrf++", 34.9, 25.9, sure, None)})
    assert verdict(run).startswith("Better than the backbone alone, but not usable yet (test chrF++ 34.9): ")
    assert verdict(with_scores(run, grasp={"chrf++": 35.0})).startswith("Take this adapter: ")


def test_without_a_dev_set_there_is_no_column_of_its_losses(run: Run) -> None:
    without = {name: replace(score, dev_loss=None) for name, score in run.metrics.systems.items()}
    shown = [scores_table(each).columns for each in (run, with_metrics(run, systems=without))]
    assert [column for column in shown[0] if column not in shown[1]] == ["Dev loss\u00a0↓"]


def test_trainings_without_a_dev_set_have_no_columns_of_its_losses() -> None:
    steps = [{"step": 1.0, "loss": 2.0}, {"step": 2.0, "loss": 1.0, "dev_loss": 1.5}]
    with_dev = losses_table(SimpleNamespace(history={"target": steps, "final": steps[:1]}))
    without = losses_table(SimpleNamespace(history={"target": steps[:1]}))
    assert [cell.text for cell in with_dev.rows[1]] == ["Final run", "1", "2.000", "2.000", "–", "–"]
    assert list(without.columns) == list(with_dev.columns)[:4]
    assert [cell.text for cell in without.rows[0]] == ["Target", "1", "2.000", "2.000"]


def test_every_one_of_several_sources_has_its_row(run: Run, tmp_path: Path) -> None:
    second = SystemScores(0.9, 0.95, {"exact_match": 19.0, "f1": 31.5})
    run = with_metrics(run, systems={**run.metrics.systems, "source_2": second})
    run = replace(run, predictions={**run.predictions, "source_2": run.predictions["source"]})
    run = with_recipe(run, source={"adapters": ["owner/first", "owner/second"]})
    names = [row[0].text for row in scores_table(run).rows]
    assert sorted(names) == ["GRASP", "Merged, not trained", "Source 1 only", "Source 2 only", "Target only"]
    page = text_of(run, tmp_path)
    assert "GRASP against source 2 only: F1 +11.7 points" in page


def test_unavailable_and_non_finite_scores_are_no_numbers(run: Run, tmp_path: Path) -> None:
    run = with_scores(run, grasp={"f1": 43.2, "exact_match": 26.0, "bertscore": None})
    systems = dict(run.metrics.systems)
    systems["source"] = replace(systems["source"], test_loss=math.nan)
    page = page_of(with_metrics(run, systems=systems), tmp_path)
    assert page.row("GRASP, handed over")[3] == "unavailable"
    assert page.row("Source only")[4] == "not finite"


def test_a_run_without_test_rows_has_a_report_and_a_card(run: Run, tmp_path: Path) -> None:
    systems = {name: replace(scores, test_loss=None, metrics={}) for name, scores in run.metrics.systems.items()}
    run = with_metrics(run, systems=systems, signatures={}, test_examples=0)
    data = replace(run.data, ids={**run.data.ids, "test": []}, test_groups=[])
    run = replace(run, data=data, predictions={name: [] for name in SYSTEMS}, prompts=[])
    assert page_of(run, tmp_path).row("Source only") == ["Source only", "–", "0.891", percent(0)]
    assert "There is no test set, so nothing was answered." in text_of(run, tmp_path)
    assert "model-index" not in card(run, tmp_path)


def test_a_language_with_a_script_has_its_name_and_its_code(run: Run, tmp_path: Path) -> None:
    run = with_recipe(run, data={"target": {"language": "zh_Hans"}})
    page = text_of(run, tmp_path)
    assert "English (source), Chinese (target)" in page
    assert 'lang="zh-Hans"' in page
    assert "- zh\n" in card(run, tmp_path)


def test_texts_of_models_and_files_are_escaped(run: Run, tmp_path: Path) -> None:
    attack, breakout = "<script>alert(1)</script>", "demo</script><img src=x onerror=alert(2)>\u2028|`"
    for system in ("grasp", "target"):
        run = answered(run, system, lambda place: {"prediction": attack, "references": (attack + "\u2028\u2029",)})
    run = replace(with_info(run, name=breakout), prompts=[attack] * 8)
    run = with_report(run, prompt=f"{attack} {{question}}", labels={attack: {"train": 1}, breakout: {"train": 2}})
    modules = {"model.layers.0.self_attn.q_proj": f"model.layers.0.{breakout}"}
    run = with_kept(
        run, lambda row: {"module": modules.get(row["module"], row["module"]), "kept": 1 if row["factor"] == "A" else 2}
    )
    page = page_of(run, tmp_path)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 3
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(attack) >= 4
    assert not set(page.scripts[0]) & set("<>&\u2028\u2029")
    markdown = re.sub(r"\A---\n[\s\S]*?\n---\n", "", card(run, tmp_path))  # YAML, which nobody shows
    shown = re.sub(r"(?m)^    .*$|^(`{3,})(yaml|python)\n[\s\S]*?^\1$", "", markdown)
    assert "<script" not in shown
    assert "<img" not in shown


def test_nothing_is_loaded_from_elsewhere(run: Run, tmp_path: Path) -> None:
    text = write_report(run, tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        assert "src" not in attributes
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert tag == "a" or "href" not in attributes
    [policy] = [attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "http" not in policy
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_plotly_is_inlined_once_and_takes_every_figure(run: Run, tmp_path: Path) -> None:
    text = write_report(run, tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert sum("plotly.js v" in script for script in page.scripts) == 1
    assert list(page.figures) == [
        "curve", "trajectory", "history-source", "history-target", "history-controller", "history-final",
        "history-unpruned",
    ]  # fmt: skip
    placed = [attributes for _, attributes in page.tags if "data-figure" in attributes]
    assert sorted(str(attributes["data-figure"]) for attributes in placed) == sorted(page.figures)
    assert all(attributes.get("aria-label") for attributes in placed)
    for figure in page.figures.values():
        # Colours are CSS variables until the page resolves them.
        go.Figure(json.loads(re.sub(r"var\(--[\w-]+\)", "#123456", json.dumps(figure))))
        titles = [figure["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis")]
        assert all(titles)
        assert "%" not in "".join(titles)
    style = text.split("<style>")[1].split("</style>")[0]
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    for name in set(re.findall(r"var\((--[\w-]+)\)", page.scripts[0])):
        assert f"{name}:" in light
        assert f"{name}:" in dark.split("* {")[0]


def test_probes_of_a_round_keep_their_differences_on_the_curve(run: Run, tmp_path: Path) -> None:
    points = page_of(run, tmp_path).figures["curve"]["data"][1]
    assert run.learned is not None
    first = run.learned.result.rounds[0]
    shown = [y for y, number in zip(points["y"], points["customdata"], strict=True) if number == first["round"]]
    assert len(shown) == 1 + len(first["candidates"])
    for loss, reward in zip(shown[1:], first["rewards"], strict=True):
        assert shown[0] - loss == pytest.approx(reward)


def test_a_rule_without_a_curve_is_drawn_as_differences(run: Run, tmp_path: Path) -> None:
    figure = page_of(with_estimate(run, rule="best_reward", curve=()), tmp_path).figures["curve"]
    [points] = figure["data"]
    assert points["y"][0] == 0.0
    assert "minus baseline" in figure["layout"]["yaxis"]["title"]["text"]


def test_the_policy_is_drawn_where_it_learns(run: Run) -> None:
    run = with_rounds(run, lambda number: {"policy_mean": 0.45, "policy_std": 0.2})
    assert [trace["name"] for trace in figures_of(run)["trajectory"]["data"]] == ["candidate", "committed ratio"]
    run = with_rounds(run, lambda number: {"policy_mean": 0.4 + number / 10})
    assert len(figures_of(run)["trajectory"]["data"]) == 4


@pytest.mark.parametrize(("high", "is_wide"), [(0.55, False), (0.79, True)])
def test_a_wide_interval_is_called_wide(run: Run, tmp_path: Path, high: float, is_wide: bool) -> None:
    run = with_estimate(run, low=0.4, high=high)
    assert ("do not settle the ratio" in text_of(run, tmp_path)) is is_wide


def test_an_interval_as_wide_as_the_range_is_no_recommendation(run: Run, tmp_path: Path) -> None:
    run = with_estimate(run, low=0.1, high=0.79)
    for text in (text_of(run, tmp_path), card(run, tmp_path)):
        assert "Nothing was learned about the prune ratio (95 % interval 10 to 79 %); 46 % was taken. Test F1" in text
        assert "Prune 46 %" not in text
    assert "Nothing was learned about the ratio: the interval leaves most of the" in text_of(run, tmp_path)
    assert "95 % interval 10.0 % to 79.0 %: nothing was learned about the ratio\n" in card(run, tmp_path)


def test_a_given_ratio_is_called_given(run: Run, tmp_path: Path) -> None:
    run = with_metrics(with_recipe(replace(run, learned=None), final={"prune_ratio": 0.46}), prune_ratio=0.46)
    text = text_of(run, tmp_path)
    assert "Prune 46 % of the merged adapter (given, not learned)." in text
    assert "The recipe gives the ratio, 46.0 %" in text
    assert "Probes took" not in text
    assert not {"curve", "trajectory"} & page_of(run, tmp_path).figures.keys()
    assert "- Prune ratio: 46.0 %, given, not learned\n" in card(run, tmp_path)


@pytest.mark.parametrize("deliver", ["best", "grasp"])
def test_where_no_adapter_learned_anything_there_is_a_warning_and_no_ratio(
    run: Run, tmp_path: Path, deliver: str
) -> None:
    warning = "No adapter learned anything: the backbone is best."
    run = with_delivered(with_recipe(run, final={"deliver": deliver}), nothing_learned=True, warning=warning)
    for text in (text_of(run, tmp_path), card(run, tmp_path)):
        assert warning in text
        assert "No adapter is shown to be better than the backbone alone." in text
        assert "Prune 46 %" not in text
        assert "It prunes" not in text
        assert "Take this adapter" not in text


def test_the_card_shows_no_texts_of_the_data(run: Run, tmp_path: Path) -> None:
    # Data sets' licences may forbid to share their texts: a card can be shared.
    for name in SYSTEMS:
        run = answered(run, name, lambda place: {"prediction": "قبل ست سنوات", "references": ("قبل سنوات",)})
    run = replace(run, prompts=["متى كان ذلك؟"] * 8)
    for text in ("قبل ست سنوات", "قبل سنوات", "متى كان ذلك؟"):
        assert text in text_of(run, tmp_path)
        assert text not in card(run, tmp_path)


def test_examples_come_with_prompt_and_marks_those_first_in_which_systems_differ(run: Run, tmp_path: Path) -> None:
    f1 = {"target": [100.0] * 6 + [0.0, 50.0], "grasp": [100.0] * 5 + [0.0, 0.0, 60.0]}
    for name, values in f1.items():
        run = answered(run, name, lambda place, values=values: {"scores": {"f1": values[place]}, "id": "x.csv:1"})
    run = replace(
        run, predictions={name: run.predictions[name] for name in f1}, prompts=[f"prompt {n}" for n in range(8)]
    )
    run = with_metrics(run, systems={name: run.metrics.systems[name] for name in f1})
    examples = examples_of(run)
    assert examples.metric == "F1"
    assert [question.number for question in examples.shown[:2]] == [6, 8]
    assert sorted(question.number for question in examples.shown) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {question.number: question.prompt for question in examples.shown} == {n + 1: f"prompt {n}" for n in range(8)}
    assert [(answer.title, answer.verdict) for answer in examples.shown[0].answers] == [
        ("Target only", "right"),
        ("GRASP", "wrong"),
    ]
    page = text_of(run, tmp_path)
    assert page.index(">Test example 6<") < page.index(">Test example 8<") < page.index(">Test example 1<")
    assert page.count("✓ right</span>") == 11
    assert page.count("≈ F1 60</span>") == 1
    assert page.count('<div class="text" dir="auto" lang="de">prompt ') == 8


def test_of_many_examples_twenty_are_shown(run: Run, tmp_path: Path) -> None:
    many = {
        name: [replace(row, id=str(n)) for n, row in enumerate([*rows] * 4)] for name, rows in run.predictions.items()
    }
    data = replace(run.data, ids={**run.data.ids, "test": [str(n) for n in range(32)]}, test_groups=list(range(32)))
    run = with_metrics(replace(run, predictions=many, data=data, prompts=[*run.prompts] * 4), test_examples=32)
    assert (len(examples_of(run).shown), examples_of(run).total) == (20, 32)
    assert "20 of 32 test examples" in text_of(run, tmp_path)


def test_what_can_be_done_next_names_what_it_costs(run: Run, tmp_path: Path) -> None:
    given = with_recipe(replace(run, learned=None), final={"deliver": "grasp", "prune_ratio": 0.4})
    assert next_step(given, "tiny.yaml", [], tmp_path, False) is None  # the recipe asks for one run at its ratio
    run = with_recipe(run, final={"deliver": "best"})
    compare = next_step(run, "tiny.yaml", ["seed=1"], tmp_path, True) or ""
    assert compare.startswith(
        "each row tested once, about 4 times this run: grasp-lora compare tiny.yaml --set seed=1 "
    )
    assert compare.endswith("--methods merged,continued,grasp --folds 4")
    alone = (
        next_step(with_recipe(run, final={"deliver": "continued", "prune_ratio": 0}), "tiny.yaml", [], tmp_path, False)
        or ""
    )
    assert alone.endswith("--methods zero_shot,source_only,continued --reference continued --folds 4")
    given = with_recipe(run, target={"adapter": "owner/lora"})
    assert "three seeds, about three times" in (next_step(given, "tiny.yaml", [], tmp_path, False) or "")
    # A given ratio is the row's, too.
    assert "grasp-lora compare" in (next_step(replace(run, learned=None), "tiny.yaml", [], tmp_path, False) or "")


@pytest.mark.parametrize(("theirs", "named_by"), [(49.0, "headline"), (65.0, "higher")])
def test_a_rival_is_named_once(run: Run, theirs: float, named_by: str) -> None:
    run = with_delivered(with_recipe(run, final={"deliver": "best"}), name="grasp")
    sure = PairedComparison(61.0 - theirs, -6.0, 18.0, 0.01, 0.95, 100, 1000)
    run = with_metrics(run, differences={"continued": Difference("f1", 61.0, theirs, sure, None)})
    texts = {"headline": headline(run), "higher": higher(run) or ""}
    assert [name for name, text in texts.items() if f"{theirs:.1f}" in text] == [named_by]


@pytest.mark.parametrize(
    ("source", "backbone", "told"),
    [
        (True, True, r"It answers better than the source adapter: F1 61.0 against 49.0, \+12.0 \(\+6.0 to \+18.0\),"),
        (False, True, "It answers better than the backbone alone: .* No gain over the source adapter is shown."),
        (False, False, "not shown to be better than the source adapter or the backbone alone. Beside the source adapter: F1 61.0 against"),
    ],
)  # fmt: skip
def test_the_first_line_says_over_what_there_is_a_gain(run: Run, source: bool, backbone: bool, told: str) -> None:
    def of(better: bool) -> Difference:
        low = 6.0 if better else -6.0
        return Difference("f1", 61.0, 49.0, PairedComparison(12.0, low, 18.0, 0.01, 0.95, 100, 1000), None)

    text = gain(with_metrics(run, differences={"source": of(source), "zero_shot": of(backbone)}))
    assert re.search(told, (text or "").replace("\u2212", "-"))
    assert gain(with_metrics(run, differences={})) is None


def test_the_gain_stands_first_in_the_report(whole_run: tuple[Run, Path]) -> None:
    run, folder = whole_run
    text = gain(run)
    assert text is not None
    page = write_report(run, folder).read_text(encoding="utf-8")
    assert page.index("<h1>") < page.index(text.split(":")[0]) < page.index("<h2>")
