"""The report of a finished run: what it says, that it says it safely, and that it copes with what is missing."""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import yaml
from huggingface_hub import ModelCard

from grasp_lora.data.tasks import TEMPLATES
from grasp_lora.errors import RecipeError
from grasp_lora.evaluation.statistics import compare_with_baselines
from grasp_lora.method.presets import RULES
from grasp_lora.report.card import write_model_card
from grasp_lora.report.examples import examples_of
from grasp_lora.report.figures import figures_of
from grasp_lora.report.pages import write_report
from grasp_lora.report.run_record import read_run
from grasp_lora.report.tables import duration, kept_share, percent, probe_note, rounds_table, scores_table

SYSTEMS = ("source", "target", "merged", "grasp")
LEARNED = {"prune_ratio": 0.462, "low": 0.384, "high": 0.549, "confidence": 0.95, "rule": "smooth_fit"}
LEARNED |= {
    "curve": {"ratios": [0.1, 0.4, 0.8], "mean": [0.1, 0.0, 0.2], "low": [0.0, 0.0, 0.1], "high": [0.2, 0.0, 0.3]}
}


@pytest.fixture
def run_folder(reference_run: Path, tmp_path: Path) -> Path:
    """A copy of what a run wrote, with a learned ratio and scores that a test can name."""
    folder = Path(shutil.copytree(reference_run, tmp_path / "demo"))
    change(folder / "controller" / "ratio.json", lambda ratio: ratio.update(LEARNED))
    values = zip(
        SYSTEMS, (0.910, 0.932, 0.877, 0.857), (0.891, 0.875, 0.829, 0.822), (38.1, 35.0, 42.1, 43.2), strict=True
    )
    systems = {name: {"test_loss": test, "dev_loss": dev, "metrics": {"f1": f1}} for name, test, dev, f1 in values}
    for name, exact in zip(SYSTEMS, (21.0, 20.0, 26.0, 26.0), strict=True):
        systems[name]["metrics"]["exact_match"] = exact
    change(folder / "metrics.json", lambda metrics: metrics.update(systems=systems, signatures={"f1": "refs:best"}))
    return folder


def change(path: Path, edit: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def change_recipe(run_folder: Path, **sections: Mapping[str, Any]) -> None:
    """Change keys of some sections of the recipe."""
    file = run_folder / "recipe.yaml"
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    recipe |= {name: (recipe.get(name) or {}) | dict(keys) for name, keys in sections.items()}
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def change_lines(path: Path, edit: Callable[[int, dict[str, Any]], dict[str, Any]]) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(edit(number, row)) + "\n" for number, row in enumerate(rows)), encoding="utf-8")


def remove(run_folder: Path, *names: str) -> None:
    for name in names:
        path = run_folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def texts(run_folder: Path) -> list[str]:
    """What both reports say, with plain spaces and signs."""
    page = write_report(run_folder)
    found = [page.read_text(encoding="utf-8"), (run_folder / "report.md").read_text(encoding="utf-8").replace("\\", "")]
    return [text.replace("\u00a0", " ").replace("\u2212", "-") for text in found]


def card(run_folder: Path) -> str:
    return write_model_card(run_folder, run_folder / "adapter").read_text(encoding="utf-8").replace("\u00a0", " ")


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
        loaded: dict[str, Any] = json.loads(self.scripts[1])
        return loaded

    def row(self, name: str) -> list[str]:
        return next(cells for cells in self.rows if cells[0] == name)


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_table_holds_the_numbers_of_metrics_json(run_folder: Path) -> None:
    page = page_of(run_folder)
    systems = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))["systems"]
    ratio = percent(1 - kept_share(read_run(run_folder).sparsity), 1)
    markdown = (run_folder / "report.md").read_text(encoding="utf-8").replace("**", "")
    for system, name in zip(SYSTEMS, ("Source only", "Target only", "Merged, not pruned", "GRASP"), strict=True):
        scores = systems[system]
        losses = [f"{scores[key]:.3f}" for key in ("test_loss", "dev_loss")]
        measured = [f"{scores['metrics'][key]:.1f}" for key in ("f1", "exact_match")]
        expected = [name, *losses, *measured, ratio if system == "grasp" else percent(0)]
        assert expected in page.rows
        assert "| " + " | ".join(expected).replace("\u00a0", " ") + " |" in markdown


def test_best_of_each_column_is_bold(run_folder: Path) -> None:
    text = write_report(run_folder).read_text(encoding="utf-8")
    bold = re.findall(r"<td><strong>([^<]*)</strong></td>", text)
    assert bold == ["26.0", "0.857", "0.822", "43.2", "26.0"]  # exact match is a tie of merged and GRASP


def test_headline_says_what_to_do_and_what_it_gives(run_folder: Path) -> None:
    page, _ = texts(run_folder)
    assert (
        "<h1>Prune 46 % of the merged adapter (95 % interval 38 to 55 %). Test F1 43.2 against 35.0 for the target"
        in page
    )
    assert "English to German" in page
    assert "source train 12, source dev 4, train 10, dev 6, micro-dev 4, test 8" in page
    assert "one example is worth 12.50 points" in page


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [([30, -26], "no difference shown"), ([3, 1], "better"), ([-3, -1], "worse"), ([0], "no difference shown")],
)
def test_what_a_difference_shows_is_said_where_the_scores_are_there_by_example(
    run_folder: Path, gains: list[float], verdict: str
) -> None:
    scores = {name: [40.0 - (gains[i % len(gains)] if name == "target" else 0) for i in range(8)] for name in SYSTEMS}
    for name, values in scores.items():
        file = run_folder / "evaluation" / f"{name}.jsonl"
        change_lines(file, lambda number, row, values=values: row | {"scores": {"f1": values[number]}})
    theirs = sum(scores["target"]) / 8
    change(run_folder / "metrics.json", lambda metrics: metrics["systems"]["target"]["metrics"].update(f1=theirs))
    change(run_folder / "metrics.json", lambda metrics: metrics["systems"]["grasp"]["metrics"].update(f1=40.0))
    page, _ = texts(run_folder)
    assert f"Test F1 40.0 against {theirs:.1f} for the target adapter alone: {verdict}.</h1>" in page
    if gains == [0]:
        assert "GRASP against target only: F1 +0.0 points, the same in every draw;" in page
        return
    found = re.search(r"GRASP against target only: F1 \S+ points \((\S+) to (\S+)\): " + verdict, page)
    assert found is not None
    expected = compare_with_baselines(scores.pop("grasp"), scores)["target"]
    assert [float(bound) for bound in found.groups()] == pytest.approx([expected.low, expected.high], abs=0.051)
    assert "95 % for all 3 rows together" in page


def test_losses_are_compared_where_scores_are_not_there_by_example(run_folder: Path) -> None:
    for system in SYSTEMS:
        more = 0.5 * (system == "target")
        file = run_folder / "evaluation" / f"{system}.jsonl"
        change_lines(file, lambda number, row, more=more: row | {"loss": 1.0 + 0.01 * number + more, "scores": {}})
    page, _ = texts(run_folder)
    assert "GRASP against target only: F1 +8.2 points; test loss -0.500 (-0.500 to -0.500): better." in page
    assert "against merged, not pruned: F1 +1.1 points; test loss +0.000, the same in every draw." in page
    assert "for the target adapter alone.</h1>" in page


@pytest.mark.parametrize("broken", [{"id": "another"}, {"loss": math.inf}, None])
def test_systems_that_answered_other_examples_are_not_compared_by_example(
    run_folder: Path, broken: dict[str, Any] | None
) -> None:
    file = run_folder / "evaluation" / "target.jsonl"
    if broken:
        change_lines(file, lambda number, row: row | (broken if number == 3 else {}))
    else:
        file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    page, _ = texts(run_folder)
    assert "GRASP against target only: F1 +8.2 points.<" in page
    assert "95 % for all 2 rows together" in page


def test_what_is_handed_over_is_compared_with_what_there_was_before(run_folder: Path) -> None:
    page, _ = texts(run_folder)
    assert "What is handed over against" not in page  # it is GRASP's result
    change(run_folder / "metrics.json", lambda metrics: metrics["delivered"].update(name="target"))
    for name in ("target", "source"):
        gain = 2.0 * (name == "target")
        change_lines(
            run_folder / "evaluation" / f"{name}.jsonl",
            lambda number, row, gain=gain: row | {"scores": {"f1": 30.0 + gain + number % 2}},
        )
    page, tables = texts(run_folder)
    assert "What is handed over against source only: F1 -3.1 points (+2.0 to +2.0): better; test loss" in page
    assert page.index("What is handed over against") < page.index("GRASP against")
    assert "95 % for all 3 rows together" in page
    assert "What is handed over against target only" not in tables


@pytest.mark.parametrize(("right", "warned"), [(37.5, True), (50.0, False)])
def test_answers_that_are_no_better_than_one_label_have_a_warning(run_folder: Path, right: float, warned: bool) -> None:
    labels = {"nzuri": {"train": 9, "test": 3}, "mbaya": {"train": 5, "test": 5}}
    change(run_folder / "data.json", lambda data: data["report"].update(labels=labels, prompt="Text: {text}"))
    change_lines(
        run_folder / "evaluation" / "grasp.jsonl",
        lambda number, row: row | {"references": ["nzuri" if number < 3 else "mbaya"]},
    )
    change(run_folder / "metrics.json", lambda metrics: metrics["systems"]["grasp"]["metrics"].update(accuracy=right))
    said = "It answers 37.5 % of the 8 test rows right, and nzuri every time would have 37.5 %."
    for text in (*texts(run_folder), card(run_folder)):
        assert (said in text) is warned


def test_every_one_of_several_sources_has_its_row(run_folder: Path) -> None:
    second = {"test_loss": 0.95, "dev_loss": 0.9, "metrics": {"exact_match": 19.0, "f1": 31.5}}
    change(run_folder / "metrics.json", lambda metrics: metrics["systems"].update(source_2=second))
    change_recipe(run_folder, source={"adapters": ["owner/first", "owner/second"]})

    def split(entries: Any) -> None:
        for entry in [one for one in entries if one["segment"] == "source"]:
            entries.append({**entry, "segment": "source_2", "kept": 0})

    change(run_folder / "final" / "sparsity.json", split)
    record = read_run(run_folder)
    table = scores_table(record)
    assert table is not None
    assert [row[0].text for row in table.rows] == [
        "Source 1 only", "Source 2 only", "Target only", "Merged, not pruned", "GRASP",
    ]  # fmt: skip
    page, _ = texts(run_folder)
    assert "GRASP against source 2 only: F1 +11.7 points." in page
    assert re.search(r"Of the source adapter \S+ % of the weights survive, of the source 2 adapter 0\.0 %, of", page)
    survival = figures_of(record)["survival"]
    assert [trace["name"] for trace in survival["data"]] == ["source", "source 2", "target"]


def test_given_adapters_stand_in_report_and_card(run_folder: Path) -> None:
    given = [{"name": "owner/english-lora", "sha256": "ab" * 32}]
    change(run_folder / "run.json", lambda run: run.update(parents=given))
    assert "owner/english-lora (sha256:abababababab)" in texts(run_folder)[0]
    assert f"| Given adapter | owner/english-lora | sha256:{'ab' * 32} |" in card(run_folder)


@pytest.mark.parametrize(
    ("name", "given", "parents", "sides"),
    [
        ("target", 0, ["target"], ["target"]),
        ("source", 0, ["source"], ["source"]),
        ("continued", 0, ["source"], ["source", "target"]),
        ("source", 2, ["first"], []),
        ("source_2", 2, ["second"], []),
        ("target", 2, ["target"], ["target"]),
        ("continued", 2, ["first", "second"], ["target"]),
        ("grasp", 2, ["first", "second", "target"], ["target"]),
        ("target", 3, ["third"], []),
        ("grasp", 3, ["first", "second", "third"], ["target"]),
    ],
)
def test_the_card_names_what_the_adapter_was_made_of_and_trained_on_alone(
    run_folder: Path, name: str, given: int, parents: list[str], sides: list[str]
) -> None:
    """Of three given adapters the third is the target's."""
    adapters = [{"name": f"owner/{one}", "sha256": one} for one in ("first", "second", "third")[:given]]
    if adapters:
        remove(run_folder, "source", *["target"] * (given == 3))
        change_recipe(run_folder, source={"adapters": ["owner/first", "owner/second"]})
    change(run_folder / "run.json", lambda run: run.update(parents=adapters))
    change(run_folder / "metrics.json", lambda metrics: metrics["delivered"].update(name=name))
    codes = {"source": "en", "target": "de"}
    corpora = {side: {"language": code, "hub": f"owner/{code}", "files": []} for side, code in codes.items()}
    change_recipe(run_folder, data=corpora)
    text = card(run_folder)
    front, body = ModelCard(text).data.to_dict(), text.split("## Made of")[1].split("## Scores")[0]
    rows = re.findall(r"\| (?:Given|Source|Target) adapter \| (?:owner/|the run's folder )(\w+) \|", body)
    assert sorted(rows) == sorted(parents)
    assert sorted(front.get("language", [])) == sorted(codes[side] for side in sides)
    assert sorted(front.get("datasets", [])) == sorted(f"owner/{codes[side]}" for side in sides)
    for side, told in {
        "source": ("owner/en", "English", "source train 12"),
        "target": ("owner/de", "German", " train 10"),
    }.items():
        for one in told:
            assert (one in body) == (side in sides), one


def test_zeros_of_the_merge_itself_are_no_alarm(run_folder: Path) -> None:
    """As TIES leaves them, where the final run kept no step."""
    change(
        run_folder / "final" / "sparsity.json",
        lambda entries: [entry.update(kept=entry["weights"] // 4) for entry in entries],
    )
    assert "check the final run" in texts(run_folder)[0]
    change(run_folder / "metrics.json", lambda metrics: metrics.update(best_step=0))
    page, _ = texts(run_folder)
    assert "check the final run" not in page
    assert "The ratio is 46.20 %: the merge had zeros of its own, and the final run kept no step." in page


def test_scores_of_an_own_metric_that_runs_to_one_are_told_apart(run_folder: Path) -> None:
    def own(metrics: Any) -> None:
        for value, system in zip((0.41, 0.42, 0.43, 0.436), metrics["systems"].values(), strict=True):
            system["metrics"] = {"own:metric": value}
        metrics["signatures"] = {"own:metric": "mine"}

    change(run_folder / "metrics.json", own)
    page, _ = texts(run_folder)
    assert "Test own:metric 0.436 against 0.420 for the target adapter alone" in page
    assert "own:metric +0.016; test loss" in page
    assert "scores run from 0 to 100, those of your own metrics as you define them." in page
    assert [cells[3] for cells in page_of(run_folder).rows[1:5]] == ["0.410", "0.420", "0.430", "0.436"]


def test_an_answer_with_a_low_similarity_is_not_called_wrong(run_folder: Path) -> None:
    change(
        run_folder / "metrics.json",
        lambda metrics: [one.update(metrics={"similarity": -3.0}) for one in metrics["systems"].values()],
    )
    change(run_folder / "metrics.json", lambda metrics: metrics.update(signatures={"similarity": "s"}))
    for file in (run_folder / "evaluation").glob("[a-oq-z]*.jsonl"):
        change_lines(file, lambda number, row: row | {"scores": {"similarity": -3.0}})
    page, tables = texts(run_folder)
    assert "Similarity -3" in page
    assert "✗" not in page
    assert "scores run from 0 to 100, Similarity below 0, too." in tables


def test_the_metric_that_leads_is_the_one_of_comparisons(run_folder: Path) -> None:
    both = {"chrf++": 50.0, "f1": 40.0}
    change(
        run_folder / "metrics.json",
        lambda metrics: [one.update(metrics=both) for one in metrics["systems"].values()],
    )
    page, _ = texts(run_folder)
    assert "Test F1 40.0 against 40.0" in page


def test_what_the_recipe_asks_for_has_its_use_and_its_row(run_folder: Path) -> None:
    change_recipe(run_folder, final={"deliver": "grasp"})
    page, tables = texts(run_folder)
    assert ">Use it</h2>" in page
    assert page.count('<tr class="chosen"><th scope="row">GRASP<span class="unseen"> (handed over)</span></th>') == 1
    assert "grasp-lora predict" in tables


def test_the_card_of_labels_says_how_they_were_chosen(run_folder: Path) -> None:
    change(
        run_folder / "data.json",
        lambda data: data["report"].update(labels={"mbaya": {"test": 3}, "nzuri": {"test": 5}}, prompt="Text: {text}"),
    )
    assert "likeliest of these labels: mbaya, nzuri." in card(run_folder)
    assert '`grasp-lora predict . --context "..."` gives one of the labels' in card(run_folder)
    change(run_folder / "data.json", lambda data: data["report"].update(prompt="{text} or {other}"))
    assert "`grasp-lora predict` with a file of rows gives one of the labels" in card(run_folder)


def test_the_prompt_of_the_card_has_the_braces_that_training_saw(run_folder: Path) -> None:
    asked = "Put it into \\boxed{{}} and {{name}}: {question}"
    change(run_folder / "data.json", lambda data: data["report"].update(prompt=asked))
    assert r'prompt = "Put it into \\boxed{} and {name}: ..."' in snippet_of(card(run_folder))


def test_probes_that_were_not_timed_apart_have_no_share(run_folder: Path) -> None:
    record = read_run(run_folder)
    assert "Probes took" in (probe_note(record) or "")
    timings = [one.model_copy(update={"probe_seconds": 0.0}) for one in record.timings]
    assert probe_note(replace(record, timings=timings)) is None
    longer = {**record.cost, "controller": 1000.0 * record.probe_seconds}
    assert "Probes took 0\xa0%" in (probe_note(replace(record, cost=longer)) or "")


def test_the_date_says_its_zone(run_folder: Path) -> None:
    assert re.search(r"Date[^\n]*\d{4}-\d\d-\d\d \d\d:\d\d UTC", texts(run_folder)[1])


def test_a_language_with_a_script_has_its_name(run_folder: Path) -> None:
    change_recipe(run_folder, data={"target": {"language": "zh_Hans"}})
    assert "Chinese" in texts(run_folder)[0]
    assert 'lang="zh-Hans"' in texts(run_folder)[0]
    assert "- zh\n" in card(run_folder)


def test_texts_of_models_and_files_are_escaped(run_folder: Path) -> None:
    attack = "<script>alert(1)</script>"
    breakout = "demo</script><img src=x onerror=alert(2)>\u2028|`"
    answer = {"prediction": attack, "references": [attack + "\u2028\u2029"]}
    for system in ("grasp", "target"):
        change_lines(run_folder / "evaluation" / f"{system}.jsonl", lambda number, row: row | answer)
    change_lines(run_folder / "evaluation" / "prompts.jsonl", lambda number, row: row | {"prompt": attack})
    change(run_folder / "run.json", lambda run: run.update(name=breakout))
    change_recipe(run_folder, data={"target": {"language": breakout}})

    def rename(entries: Any) -> None:
        entries[0]["module"] = f"model.layers.0.{breakout}"
        entries[1]["segment"] = attack

    change(run_folder / "final" / "sparsity.json", rename)
    page = page_of(run_folder)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 4
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(attack) >= 4
    assert not set(page.scripts[1]) & set("<>&\u2028\u2029")
    for markdown in (card(run_folder), (run_folder / "report.md").read_text(encoding="utf-8")):
        markdown = re.sub(r"\A---\n[\s\S]*?\n---\n", "", markdown)  # YAML, which nobody shows
        without_recipe = re.sub(r"(?m)^    .*$|^(`{3,})yaml\n[\s\S]*?^\1$", "", markdown)
        assert "<script" not in without_recipe
        assert "<img" not in without_recipe


def test_nothing_is_loaded_from_elsewhere(run_folder: Path) -> None:
    text = write_report(run_folder).read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        assert "src" not in attributes
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert tag == "a" or "href" not in attributes
    [policy] = [one["content"] for _, one in page.tags if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "http" not in policy
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_plotly_is_inlined_once_and_takes_every_figure(run_folder: Path) -> None:
    page = page_of(run_folder)
    assert sum("plotly.js v" in script for script in page.scripts) == 1
    assert list(page.figures) == [
        "curve", "trajectory", "baseline", "history-source", "history-target", "history-controller",
        "history-final", "cost",
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


def test_every_colour_variable_exists_in_both_themes(run_folder: Path) -> None:
    text = write_report(run_folder).read_text(encoding="utf-8")
    used = set(re.findall(r"var\((--[\w-]+)\)", Page(text).scripts[1]))
    style = text.split("<style>")[1].split("</style>")[0]
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    for name in used:
        assert f"{name}:" in light
        assert f"{name}:" in dark.split("* {")[0]


def test_probes_of_a_round_keep_their_differences_on_the_curve(run_folder: Path) -> None:
    points = page_of(run_folder).figures["curve"]["data"][1]
    first = read_run(run_folder).rounds[0]
    shown = [y for y, number in zip(points["y"], points["customdata"], strict=True) if number == first.round]
    assert len(shown) == 1 + len(first.candidates)
    for loss, reward in zip(shown[1:], first.rewards, strict=True):
        assert shown[0] - loss == pytest.approx(reward)


def test_rule_without_a_curve_is_drawn_as_differences(run_folder: Path) -> None:
    change(run_folder / "controller" / "ratio.json", lambda ratio: ratio.update(rule="best_reward", curve={}))
    figure = page_of(run_folder).figures["curve"]
    [points] = figure["data"]
    assert points["y"][0] == 0.0
    assert "minus baseline" in figure["layout"]["yaxis"]["title"]["text"]


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        (["metrics.json", "evaluation"], "have not been evaluated yet"),
        (["controller"], "has not chosen a ratio yet"),
        (["controller/rounds.jsonl", "controller/ratio.json"], "No round of the controller has been measured yet"),
        (["final"], "sparsity of the result has not been written yet"),
        (["metrics.json", "cost.json"], "No stage has finished yet"),
        (["source", "target", "controller", "final"], "No losses have been recorded yet"),
    ],
)
def test_half_finished_run_says_what_is_not_there(run_folder: Path, removed: list[str], said: str) -> None:
    remove(run_folder, *removed)
    assert all(said in text for text in texts(run_folder))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_explained(run_folder: Path, rule: str) -> None:
    change(run_folder / "controller" / "ratio.json", lambda ratio: ratio.update(rule=rule))
    page, _ = texts(run_folder)
    assert "Each round of the controller pruned the adapter" in page
    assert f"by the rule <code>{rule}" not in page


def test_it_says_which_examples_were_probed(run_folder: Path) -> None:
    change_recipe(run_folder, controller={"rounds": {"pool": "micro_dev", "in_turn": None}})
    assert "measured the loss on the micro-dev set." in texts(run_folder)[0]
    change_recipe(run_folder, controller={"rounds": {"pool": "both", "in_turn": 3}})
    page, _ = texts(run_folder)
    assert "on the micro-dev and the dev set, other examples in each round." in page
    assert "baseline" not in page_of(run_folder).figures  # its losses cannot be compared with each other
    change_lines(run_folder / "controller" / "rounds.jsonl", lambda number, row: row | {"places": [0, 2]})
    page, _ = texts(run_folder)
    assert "on the micro-dev and the dev set, of candidates on 2 of its examples in turn." in page
    assert "baseline" in page_of(run_folder).figures


def test_a_folder_that_names_no_choice_has_its_report_and_no_verdict(run_folder: Path) -> None:
    change_recipe(run_folder, final={"deliver": None})
    change(run_folder / "metrics.json", lambda metrics: metrics.pop("delivered"))
    change(run_folder / "cost.json", lambda cost: cost.pop("deliver"))
    for text in (*texts(run_folder), card(run_folder)):
        assert "Take this adapter" not in text
        assert "not complete" not in text
        assert re.search("(Prune|It prunes) 46 % of the merged adapter", text)


@pytest.mark.parametrize(("high", "wide"), [(0.55, False), (0.79, True)])
def test_a_wide_interval_is_called_wide(run_folder: Path, high: float, wide: bool) -> None:
    change(run_folder / "controller" / "ratio.json", lambda ratio: ratio.update(low=0.4, high=high))
    assert all(("do not settle the ratio" in text) is wide for text in texts(run_folder))


def test_an_interval_as_wide_as_the_range_is_no_recommendation(run_folder: Path) -> None:
    change(run_folder / "controller" / "ratio.json", lambda ratio: ratio.update(low=0.1, high=0.79))
    for text in (*texts(run_folder), card(run_folder)):
        assert "Nothing was learned about the prune ratio (95 % interval 10 to 79 %); 46 % was taken. Test F1" in text
        assert "Prune 46 %" not in text
    for text in texts(run_folder):
        assert "Nothing was learned about the ratio: the interval leaves most of the searched range open." in text
    assert "95 % interval 10.0 % to 79.0 %: nothing was learned about the ratio\n" in card(run_folder)


@pytest.mark.parametrize("step", [0, 3, None])
def test_a_final_run_that_kept_no_step_says_that_it_was_discarded(run_folder: Path, step: int | None) -> None:
    change(run_folder / "metrics.json", lambda metrics: metrics.update(best_step=step))
    for text in (*texts(run_folder), card(run_folder)):
        assert ("the fine-tuning was discarded (best step 0)" in text) is (step == 0)


def test_predictions_stand_in_the_page_only(run_folder: Path) -> None:
    # Data sets' licences may forbid to share their texts: the Markdown report can be shared.
    answer = {"prediction": "قبل ست سنوات", "references": ["قبل سنوات"]}
    for file in (run_folder / "evaluation").iterdir():
        more = {"prompt": "متى كان ذلك؟"} if file.name == "prompts.jsonl" else answer
        change_lines(file, lambda number, row, more=more: row | more)
    page, markdown = texts(run_folder)
    for text in ("قبل ست سنوات", "قبل سنوات", "متى كان ذلك؟"):
        assert text in page
        assert text not in markdown
        assert text not in card(run_folder)
    remove(run_folder, "evaluation")
    assert "No predictions have been written yet" in texts(run_folder)[0]


def score(run_folder: Path, **scores: list[float]) -> None:
    """Give each answer of some systems an F1; the others have none."""
    for file in (run_folder / "evaluation").glob("*.jsonl"):
        values = scores.get(file.stem)
        if values is None and file.stem != "prompts":
            file.unlink()
        elif values is not None:
            change_lines(file, lambda number, row, values=values: row | {"scores": {"f1": values[number]}})


def test_the_steps_of_the_controller_are_those_of_its_last_round_where_that_logged_no_loss(run_folder: Path) -> None:
    change_lines(run_folder / "controller" / "rounds.jsonl", lambda number, row: row | {"step": 100 + number})
    last = max(one.step for one in read_run(run_folder).rounds)
    assert f"| Controller run | {last} |" in texts(run_folder)[1]


def test_examples_come_with_prompt_and_marks_those_first_in_which_systems_differ(run_folder: Path) -> None:
    score(run_folder, target=[100.0] * 6 + [0.0, 50.0], grasp=[100.0] * 5 + [0.0, 0.0, 60.0])
    change_lines(run_folder / "evaluation" / "prompts.jsonl", lambda number, row: row | {"prompt": f"prompt {number}"})
    found = examples_of(read_run(run_folder))
    assert found.metric == "F1"
    assert [example.number for example in found.shown[:2]] == [6, 8]
    assert sorted(example.number for example in found.shown) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert found.shown[0].prompt == "prompt 5"
    assert [(one.title, one.verdict) for one in found.shown[0].answers] == [
        ("Target only", "right"),
        ("GRASP", "wrong"),
    ]
    page, _ = texts(run_folder)
    assert page.index(">Test example 6<") < page.index(">Test example 8<") < page.index(">Test example 1<")
    assert page.count("✓ right</span>") == 11
    assert page.count("≈ F1 60</span>") == 1
    assert page.count('<div class="text" dir="auto" lang="de">prompt ') == 8


def test_the_headline_names_the_source_adapter_where_continued_training_left_it(run_folder: Path) -> None:
    change_recipe(run_folder, final={"deliver": "best"})
    page, _ = texts(run_folder)
    assert "for the source adapter as it is" in page.split("<h1>")[1].split("</header>")[0]


def test_examples_of_one_id_have_each_its_own_prompt(run_folder: Path) -> None:
    score(run_folder, target=[0.0] * 8, grasp=[0.0] * 8)
    for file in (run_folder / "evaluation").iterdir():
        change_lines(file, lambda number, row: row | {"id": "x.csv:1"})
    change_lines(run_folder / "evaluation" / "prompts.jsonl", lambda number, row: row | {"prompt": f"prompt {number}"})
    found = examples_of(read_run(run_folder))
    assert {one.number: one.prompt for one in found.shown} == {number + 1: f"prompt {number}" for number in range(8)}


def test_of_many_examples_twenty_are_shown_and_systems_that_answered_others_are_left_out(run_folder: Path) -> None:
    score(run_folder, source=[0.0] * 8, target=[0.0] * 8, grasp=[0.0] * 8)
    for file in (run_folder / "evaluation").iterdir():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] * 4
        file.write_text(
            "".join(json.dumps(row | {"id": str(n)}) + "\n" for n, row in enumerate(rows)), encoding="utf-8"
        )
    change_lines(run_folder / "evaluation" / "target.jsonl", lambda number, row: row | {"id": f"other {number}"})
    found = examples_of(read_run(run_folder))
    assert (len(found.shown), found.total) == (20, 32)
    assert [one.system for one in found.shown[0].answers] == ["source", "grasp"]
    assert "20 of 32 test examples" in texts(run_folder)[0]


def test_a_folder_of_an_older_version_shows_its_answers_without_prompts(run_folder: Path) -> None:
    remove(run_folder, "evaluation/prompts.jsonl")
    page, _ = texts(run_folder)
    assert "<summary>Prompt</summary>" not in page
    assert ">Test example 1<" in page


@pytest.mark.parametrize("deliver", ["best", "grasp"])
def test_where_no_adapter_learned_anything_there_is_a_warning_and_no_ratio(run_folder: Path, deliver: str) -> None:
    change_recipe(run_folder, final={"deliver": deliver})
    said = {"nothing_learned": True, "warning": "No adapter learned anything: the backbone is best."}
    change(run_folder / "metrics.json", lambda metrics: metrics["delivered"].update(said))
    for text in (*texts(run_folder), card(run_folder)):
        assert said["warning"] in text
        assert "No adapter is shown to be better than the backbone alone." in text
        assert "Prune 46 %" not in text
        assert "It prunes" not in text
        assert "Take this adapter" not in text


def test_charts_that_can_show_one_value_only_are_left_out(run_folder: Path) -> None:
    def uneven(entries: Any) -> None:
        entries[0]["kept"] = 0

    constant = {"policy_mean": 0.45, "policy_std": 0.2}
    change_lines(run_folder / "controller" / "rounds.jsonl", lambda number, row: row | constant)
    figures = figures_of(read_run(run_folder))
    assert not {"sparsity", "survival"} & figures.keys()
    assert [trace["name"] for trace in figures["trajectory"]["data"]] == ["candidate", "committed ratio"]
    table = rounds_table(read_run(run_folder))
    assert table is not None
    assert "Policy" not in table.columns
    assert {len(row) for row in table.rows} == {len(table.columns)}
    change(run_folder / "final" / "sparsity.json", uneven)
    change_lines(
        run_folder / "controller" / "rounds.jsonl", lambda number, row: row | {"policy_mean": 0.4 + number / 10}
    )
    figures = figures_of(read_run(run_folder))
    assert {"sparsity", "survival"} <= figures.keys()
    assert "Policy" in rounds_table(read_run(run_folder)).columns
    assert len(figures["trajectory"]["data"]) == 4


def test_run_that_has_just_begun_gives_a_report(run_folder: Path) -> None:
    remove(run_folder, *(path.name for path in run_folder.iterdir() if path.name not in ("run.json", "recipe.yaml")))
    page, _ = texts(run_folder)
    assert "No prune ratio has been learned yet. The result has not been evaluated yet." in page
    assert "Not in its folder: data, source, target, merge, controller, final, evaluate, deliver." in page
    assert "Plotly" not in page


def test_run_with_a_given_ratio_is_complete_without_a_controller(run_folder: Path) -> None:
    change_recipe(run_folder, final={"prune_ratio": 0.46})
    remove(run_folder, "controller")
    change(run_folder / "cost.json", lambda cost: cost.pop("controller"))
    for text in texts(run_folder):
        assert "Prune 46 % of the merged adapter (given, not learned)." in text
        assert "The recipe gives the ratio, 46.0 %" in text
        assert "There is no controller run, because the recipe gives the ratio." in text
        for wrong in ("not complete", "has not chosen a ratio", "No round of the controller", "interval"):
            assert wrong not in text.split("The recipe</h2>")[0].split("<style>")[0]
    page = page_of(run_folder)
    assert "curve" not in page.figures
    assert page.row("GRASP")[-1] == percent(1 - kept_share(read_run(run_folder).sparsity), 1)
    assert "- Prune ratio: 46.0 %, given, not learned\n" in card(run_folder)
    change(run_folder / "cost.json", lambda cost: cost.pop("final"))
    assert "Not in its folder: final." in texts(run_folder)[0]


def test_run_without_a_test_set_has_a_report(run_folder: Path) -> None:
    def empty(metrics: Any) -> None:
        metrics["test_examples"], metrics["signatures"] = 0, {}
        for scores in metrics["systems"].values():
            scores |= {"test_loss": None, "metrics": {}}

    change(run_folder / "metrics.json", empty)
    remove(run_folder, "evaluation")
    assert page_of(run_folder).row("Source only") == ["Source only", "–", "0.891", percent(0)]


def test_unavailable_and_non_finite_scores_are_no_numbers(run_folder: Path) -> None:
    def spoil(metrics: Any) -> None:
        metrics["systems"]["grasp"]["metrics"]["bertscore"] = None
        metrics["systems"]["source"]["test_loss"] = math.nan
        del metrics["systems"]["target"]

    change(run_folder / "metrics.json", spoil)
    with (run_folder / "final" / "history.jsonl").open("a", encoding="utf-8") as history:
        history.write('{"step": 99, "epoch": 9.0, "loss": NaN}\n')
    page = page_of(run_folder)
    assert page.row("GRASP")[5] == "unavailable"
    assert page.row("Source only")[1] == "not finite"
    assert page.figures["history-final"]["data"][0]["y"][-1] is None


def test_the_caption_says_how_the_current_ratio_moves(run_folder: Path) -> None:
    held = "moves towards the best candidate of a round"
    change_recipe(run_folder, controller={"policy": {"kind": "gaussian"}})
    assert held in texts(run_folder)[0]
    change_recipe(run_folder, controller={"policy": {"kind": "spread"}})
    page, _ = texts(run_folder)
    assert held not in page
    assert "Each step trained at a ratio of its own" in page


def test_model_card_says_what_the_adapter_is_and_holds_no_path(run_folder: Path) -> None:
    source, target = (str(run_folder / "data" / f"xquad.{code}.json") for code in ("en", "ar"))
    corpora = {"source": {"language": "en", "files": [source]}, "target": {"language": "ar", "files": [target]}}
    change_recipe(run_folder, data={"task": "qa"} | corpora)
    change(run_folder / "data.json", lambda data: data["report"].pop("prompt"))  # as of an earlier version
    name = {"name": "google/gemma-3-270m", "fingerprint": "sha256:9d20aa41", "commit": "9b0cfec892e2"}
    change(run_folder / "run.json", lambda run: run.update(backbone=name, recipe_hash="sha256:4f1e"))
    text = card(run_folder)
    _, front, body = text.split("---\n", 2)
    facts = yaml.safe_load(front)
    [result] = facts.pop("model-index")[0]["results"]
    assert facts == {
        "library_name": "peft",
        "base_model": "google/gemma-3-270m",
        "tags": ["lora", "grasp-lora", "adapter-merging", "pruning", "cross-lingual-transfer"],
        "pipeline_tag": "text-generation",
        "language": ["ar", "en"],
    }
    assert {one["type"]: one["value"] for one in result["metrics"]} == {"loss": 0.857, "f1": 43.2, "exact_match": 26.0}
    assert result["dataset"]["args"] == {"test_rows": 8}
    for private in (str(run_folder), str(run_folder.parent), str(Path.home()) + "/"):
        assert private not in text
    assert "xquad.en.json, xquad.ar.json" in body
    assert "sha256:9d20aa41" in body
    assert body.count("sha256:") == 4  # backbone, two parents, recipe
    assert 'from_pretrained(base, revision="9b0cfec892e2", dtype="float32")' in snippet_of(body)
    compile(snippet_of(body), "card", "exec")
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])["data"]["target"]["files"] == ["xquad.ar.json"]
    assert "| **GRASP** | **0.857** | **0.822** | **43.2** |" in body
    prompt = "".join(f"    {line}\n" for line in TEMPLATES["qa"]["ar"].prompt.split("\n"))
    assert "It was trained on prompts of this form:\n\n" + prompt in body


def snippet_of(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


def test_the_snippet_of_the_card_ends_in_the_answer_that_predict_gives(
    finished_run: Path, cli: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = cli("predict", "run/adapter", "source 1: what?")
    assert expected.status == 0, expected.err
    adapter = finished_run / "adapter"
    (adapter / "tiny-llama").symlink_to(Path("tiny-llama").resolve(), target_is_directory=True)
    code = snippet_of((adapter / "README.md").read_text(encoding="utf-8"))
    assert 'prompt = "..."' in code
    monkeypatch.chdir(adapter)
    exec(code.replace("...", "source 1: what?"), {})
    assert capsys.readouterr().out.strip() == expected.out.strip() != ""


def test_the_snippet_of_a_chat_goes_through_the_chat_template(run_folder: Path) -> None:
    assert "eos_token_id" not in snippet_of(card(run_folder))
    chat = {"chat_template": True, "end_of_turn": "<|im_end|>"}
    change(run_folder / "data.json", lambda data: data["report"].update(chat))
    change_recipe(run_folder, generation={"stop": ["\n", '"```'], "max_new_tokens": 9})
    code = card(run_folder).split("```python\n")[1].split("\n```\n")[0]
    compile(code, "card", "exec")
    assert "tokenizer.apply_chat_template(turns, add_generation_prompt=True" in code
    assert "max_new_tokens=9" in code
    assert 'ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]' in code
    assert "do_sample=False, eos_token_id=ends)" in code
    assert 'print(answer.split("\\n")[0].split("\\"```")[0])' in code


def test_what_the_hub_reads_of_a_card(run_folder: Path) -> None:
    """Local names would be taken for those of the hub; what is of the hub stands with its licence, where that is known."""
    front = ModelCard(card(run_folder)).data.to_dict()
    assert "base_model" not in front
    assert "license" not in front
    assert "Put the path of your copy in the place of its name" in card(run_folder)
    change(run_folder / "run.json", lambda run: run["backbone"].update(name="google/gemma-3-270m (Q4_K_M GGUF)"))
    change_recipe(run_folder, data={"target": {"hub": "facebook/mlqa", "language": "ar"}})
    text = card(run_folder)
    front = ModelCard(text).data.to_dict()
    assert (front["base_model"], front["license"], front["datasets"]) == (
        "google/gemma-3-270m", "gemma", ["facebook/mlqa"],
    )  # fmt: skip
    assert {result.dataset_name for result in ModelCard(text).data.eval_results} == {"facebook/mlqa, 8 test rows"}
    assert "base = str(embedded_folder())" in snippet_of(text)


def test_the_recipe_in_the_card_stays_in_its_block_and_names_no_place(run_folder: Path) -> None:
    places = {"root": "../a/root", "target": {"files": [r"C:\Users\me\a.json", "/home/me/b.json", "../../c/d.json"]}}
    change_recipe(run_folder, data=places | {"prompt": "\n````\n<b> /x/y \u202e"}, backbone={"name": "/models/of/me"})
    change(run_folder / "data.json", lambda data: data["report"].update(prompt="\n````\n<b> /x/y \u202e"))
    text = card(run_folder)
    for private in ("Users", "../a", "/home/me", "../c", "/models", "\u202e"):
        assert private not in text
    block = text.split("`````yaml\n")[1].split("\n`````\n")[0]
    recipe = yaml.safe_load(block)
    assert recipe["data"]["prompt"].startswith("\n````\n<b> /x/y ")
    assert recipe["data"]["target"]["files"] == ["a.json", "b.json", "d.json"]
    assert recipe["backbone"]["name"] == "me"


@pytest.mark.parametrize(
    ("name", "base_model"),
    [
        ("/home/someone/models/llama", "llama"),
        (r"C:\Users\me\llama", "llama"),
        ("~/models/llama/", "llama"),
        ("../llama", "llama"),
    ],
)
def test_model_card_names_a_backbone_as_others_know_it(run_folder: Path, name: str, base_model: str) -> None:
    change(run_folder / "run.json", lambda run: run["backbone"].update(name=name))
    text = card(run_folder)
    assert f'base = "{base_model}"' in text
    assert name not in text


def test_report_and_card_need_a_run_and_an_adapter(run_folder: Path) -> None:
    with pytest.raises(RecipeError, match="no adapter folder"):
        write_model_card(run_folder, run_folder / "nowhere")
    remove(run_folder, "run.json")
    for write in (write_report, card):
        with pytest.raises(RecipeError, match=r"is no run folder: run\.json is missing"):
            write(run_folder)


def test_card_of_a_half_finished_run_says_so(run_folder: Path) -> None:
    remove(run_folder, "metrics.json", "controller")
    text = card(run_folder)
    assert "Prune ratio: not learned yet" in text
    assert "has not been evaluated yet" in text


@pytest.mark.parametrize(("seconds", "text"), [(59.96, "1 min 0 s"), (3599.7, "1 h 0 min"), (0.0, "0.0 s")])
def test_duration_carries_over(seconds: float, text: str) -> None:
    assert duration(seconds) == text
