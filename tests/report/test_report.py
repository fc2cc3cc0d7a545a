"""The report of a synthetic run: what it says, that it says it safely, and that it copes with what is missing."""

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import yaml

from grasp_lora.bench.run_folder import kept_share, read_run
from grasp_lora.data.tasks import TEMPLATES
from grasp_lora.errors import RecipeError
from grasp_lora.evaluation.statistics import compare_with_baselines
from grasp_lora.method.policy import Gaussian
from grasp_lora.method.presets import RULES
from grasp_lora.method.rounds import Round
from grasp_lora.method.search import RatioSearch
from grasp_lora.report.figures import figures_of
from grasp_lora.report.pages import write_model_card, write_report
from grasp_lora.report.tables import duration, percent, scores_table

LAYERS = 18
ANSWERS = [
    ("120 نخلة", "120 نخلة", "120"),
    ("الريحان", "الريحان", "الريحان بين جذوع النخل"),
    ("قبل ست سنوات", "قبل ست سنوات", "قبل سنوات"),
    ("عين السدر", "قرية عين السدر", "عين السدر"),
    ("سالم الدرعي", "سالم الدرعي", "جده سالم"),
    ("ثلث أشجاره", "ثلث أشجاره", "120 نخلة"),
    ("في عام 1998", "1998", "عام 1989"),
    ("السوسة الحمراء", "السوسة الحمراء", "السوسة"),
]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_run(folder: Path) -> Path:
    """Write a run folder whose numbers behave like those of a real run on Arabic questions."""
    noise = random.Random(7)
    recipe = {
        "name": "demo-ar",
        "seed": 42,
        "backbone": {"name": "google/gemma-3-270m", "dtype": "bfloat16"},
        "data": {
            "task": "qa",
            "source": {"language": "en", "files": [str(folder / "data" / "xquad.en.json")]},
            "target": {"language": "ar", "files": [str(Path.home() / "data" / "xquad.ar.json")]},
        },
        "policy": {"kind": "gaussian", "candidates": 3},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    write_json(
        folder / "run.json",
        {
            "grasp_lora": "0.1.0",
            "recipe_hash": "sha256:4f1e7c0d9a2b83c5",
            "name": "demo-ar",
            "seed": 42,
            "created": "2026-11-24T15:02:11+00:00",
            "backbone": {"name": "google/gemma-3-270m", "fingerprint": "sha256:9d20aa41"},
            "libraries": {"torch": "2.13.0", "transformers": "5.24.0", "peft": "0.21.2"},
        },
    )
    sizes = {"source_train": 765, "source_dev": 80, "train": 50, "dev": 50, "micro_dev": 16, "test": 100}
    write_json(
        folder / "data.json",
        {
            "report": {
                "task": "qa",
                "split_seed": 42,
                "target": {"language": "ar", "read": 230, "excluded_for_leak": 0, "too_long": 3},
                "source": {"language": "en", "read": 1190, "excluded_for_leak": 41, "too_long": 0},
                "splits": {split: {"examples": size, "groups": -(-size // 5)} for split, size in sizes.items()},
            },
            "ids": {split: [f"{split}-{i}" for i in range(size)] for split, size in sizes.items()},
        },
    )
    seconds = {"data": 4.1, "source": 612.4, "target": 88.0, "merge": 2.2}
    seconds |= {"controller": 431.7, "final": 164.9, "evaluate": 240.3}
    for stage, spent in seconds.items():
        write_json(folder / "stages" / f"{stage}.json", {"stage": stage, "seconds": spent, "summary": {}})

    _write_controller(folder / "controller", noise)
    for stage, epochs, steps, start, floor in (
        ("source", 2, 96, 2.1, 0.62),
        ("target", 6, 7, 2.3, 0.86),
        ("controller", 10, 50, 1.1, 0.40),
        ("final", 6, 7, 1.0, 0.82),
    ):
        rows: list[dict[str, Any]] = []
        for step in range(1, epochs * steps + 1):
            decay = math.exp(-2.5 * step / (epochs * steps))
            loss = (floor + (start - floor) * decay) * noise.lognormvariate(0, 0.18)
            if step % max(1, epochs * steps // 60) == 0:
                rows.append({"step": step, "epoch": step / steps, "loss": loss})
            if step % steps == 0 and stage != "controller":
                overfit = 0.02 * max(0, step / steps - 2) ** 1.3
                rows.append({"step": step, "epoch": step / steps, "dev_loss": floor + 0.1 * decay + overfit})
        write_lines(folder / stage / "history.jsonl", rows)
    for side in ("source", "target"):
        (folder / side / "adapter_model.safetensors").write_bytes(f"weights of {side}".encode())
    (folder / "adapter").mkdir()

    sparsity = []
    for layer in range(LAYERS):
        for projection, width in (("q_proj", 1024), ("v_proj", 256)):
            for factor, weights in (("A", 8 * 640), ("B", 8 * width)):
                for segment, kept in (("source", 0.42), ("target", 0.57)):
                    share = kept + 0.12 * math.sin(layer / 4) + noise.gauss(0, 0.03)
                    module = f"model.layers.{layer}.self_attn.{projection}"
                    entry = {"module": module, "factor": factor, "segment": segment}
                    sparsity.append(entry | {"weights": weights, "kept": round(weights * share)})
    write_json(folder / "final" / "sparsity.json", sparsity)

    scores = {
        "source": (0.910, 0.891, {"exact_match": 21.0, "f1": 38.1}),
        "target": (0.932, 0.875, {"exact_match": 20.0, "f1": 35.0}),
        "merged": (0.877, 0.829, {"exact_match": 26.0, "f1": 42.1}),
        "grasp": (0.857, 0.822, {"exact_match": 26.0, "f1": 43.2}),
    }
    for system, (loss, _, _) in scores.items():
        rows = []
        for index in range(sizes["test"]):
            reference, good, weak = ANSWERS[index % len(ANSWERS)]
            answer = good if system in ("grasp", "merged") else weak
            row = {"id": f"test-{index}", "prediction": answer, "references": [reference]}
            rows.append(row | {"loss": loss * noise.lognormvariate(0, 0.3)})
        write_lines(folder / "evaluation" / f"{system}.jsonl", rows)
    learned = json.loads((folder / "controller" / "ratio.json").read_text(encoding="utf-8"))
    write_json(
        folder / "metrics.json",
        {
            "systems": {
                system: {"test_loss": test, "dev_loss": dev, "metrics": metrics}
                for system, (test, dev, metrics) in scores.items()
            },
            "prune_ratio": learned["prune_ratio"],
            "prune_ratio_interval": [learned["low"], learned["high"]],
            "signatures": {
                "exact_match": "refs:best|case:lc|articles:removed|tok:whitespace|version:0.1.0",
                "f1": "refs:best|case:lc|articles:removed|tok:whitespace|version:0.1.0",
            },
            "test_examples": sizes["test"],
            "language": "ar",
        },
    )
    write_json(folder / "cost.json", seconds)
    return folder


def _write_controller(folder: Path, noise: random.Random) -> None:
    """Let the real policy play rounds against a loss that shows its optimum only once the network overfits."""
    policy = RatioSearch(Gaussian(), RULES["smooth_fit"])
    difficulty = [noise.lognormvariate(0, 0.5) for _ in range(16)]
    rounds: list[dict[str, Any]] = []
    timings = []
    for number in range(1, 51):
        progress = number / 50

        def losses(ratio: float, progress: float = progress) -> tuple[float, ...]:
            level = 0.68 + 0.10 * progress - 0.06 * math.sin(4 * progress)
            best = 0.52 * min(1.0, 0.1 + 2.2 * progress)
            bend = 0.35 * (ratio - best) ** 2 + 2.5 * max(0.0, ratio - 0.6) ** 2
            return tuple(scale * (level + bend) + noise.gauss(0, 0.006) for scale in difficulty)

        before = policy.current_ratio
        candidates = tuple(policy.ask())
        measured = Round(before, candidates, losses(before), tuple(losses(ratio) for ratio in candidates))
        decision = policy.tell(measured)
        rounds.append(
            {
                "round": number,
                "step": 10 * number,
                "epoch": number / 5,
                "candidates": candidates,
                "baseline_losses": measured.baseline_losses,
                "candidate_losses": measured.candidate_losses,
                "rewards": decision.rewards,
                "policy_mean": policy.mean,
                "policy_std": policy.std,
                "committed": decision.committed,
                "clipped": decision.clipped,
                "ratio_before": before,
                "ratio": decision.ratio,
                "measured_sparsity": decision.ratio,
            }
        )
        timing = {"probe_seconds": 2.1 + noise.random(), "train_seconds": 5.6 + noise.random()}
        timings.append({"round": number, "step": 10 * number} | timing)
    write_lines(folder / "rounds.jsonl", rounds)
    write_lines(folder / "timings.jsonl", timings)
    estimate = policy.best_ratio()
    ratios, mean, low, high = zip(*estimate.curve, strict=True)
    write_json(
        folder / "ratio.json",
        {
            "prune_ratio": estimate.ratio,
            "low": estimate.low,
            "high": estimate.high,
            "confidence": estimate.confidence,
            "rule": estimate.rule,
            "rounds": estimate.rounds,
            "curve": {"ratios": ratios, "mean": mean, "low": low, "high": high},
            "last_committed_ratio": policy.current_ratio,
        },
    )


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run folder; treat it as read-only."""
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def run_folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the complete run folder, to be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "demo"))


class Page(HTMLParser):
    """The tags, table rows and scripts of a page, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open in ("td", "th", "strong", "div") and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()

    @property
    def figures(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.scripts[0])
        return loaded


def report_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def change(path: Path, edit: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_table_holds_the_numbers_of_metrics_json(run_folder: Path) -> None:
    page = report_of(run_folder)
    metrics = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    ratio = percent(1 - kept_share(read_run(run_folder).sparsity), 1)
    names = {"source": "Source only", "target": "Target only", "merged": "Merged, not pruned", "grasp": "GRASP"}
    markdown = (run_folder / "report.md").read_text(encoding="utf-8").replace("**", "")
    for system, name in names.items():
        scores = metrics["systems"][system]
        expected = [
            name,
            f"{scores['test_loss']:.3f}",
            f"{scores['dev_loss']:.3f}",
            f"{scores['metrics']['f1']:.1f}",
            f"{scores['metrics']['exact_match']:.1f}",
            ratio if system == "grasp" else percent(0),
        ]
        assert expected in page.rows
        assert "| " + " | ".join(expected).replace("\u00a0", " ") + " |" in markdown


def test_best_of_each_column_is_bold(run_folder: Path) -> None:
    text = write_report(run_folder).read_text(encoding="utf-8")
    bold = re.findall(r"<td><strong>([^<]*)</strong></td>", text)
    assert bold == ["26.0", "0.857", "0.822", "43.2", "26.0"]  # exact match is a tie of merged and GRASP


def test_headline_says_what_to_do_and_what_it_gives(run_folder: Path) -> None:
    learned = {"prune_ratio": 0.462, "low": 0.384, "high": 0.549}
    change(run_folder / "controller" / "ratio.json", lambda ratio: ratio.update(learned))
    text = write_report(run_folder).read_text(encoding="utf-8").replace("\u00a0", " ")
    assert (
        "<h1>Prune 46 % of the merged adapter (95 % interval 38 to 55 %). "
        "Test F1 43.2 against 35.0 for the target adapter alone.</h1>" in text
    )
    assert "English to Arabic" in text
    assert "source train 765, source dev 80, train 50, dev 50, micro-dev 16, test 100" in text
    assert "one example is worth 1.00 points" in text


def score_by_example(run_folder: Path, gains: dict[str, list[float]]) -> None:
    """Give every test example an F1: 40 to GRASP, to each other system 40 less its gain, the gains in turn."""
    for system in ("source", "target", "merged", "grasp"):
        file = run_folder / "evaluation" / f"{system}.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        less = gains.get(system, [0.0])
        write_lines(file, [row | {"scores": {"f1": 40 - less[i % len(less)]}} for i, row in enumerate(rows)])
        mean = 40 - sum(less) / len(less)
        change(
            run_folder / "metrics.json",
            lambda metrics, system=system, mean=mean: metrics["systems"][system]["metrics"].update(f1=mean),
        )


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [([30, -26], "no difference shown"), ([3, 1], "better"), ([-3, -1], "worse"), ([0], "no difference shown")],
)
def test_what_a_difference_shows_is_said_where_the_scores_are_there_by_example(
    run_folder: Path, gains: list[float], verdict: str
) -> None:
    score_by_example(run_folder, {"target": gains})
    text = write_report(run_folder).read_text(encoding="utf-8").replace("\u00a0", " ").replace("\u2212", "-")
    theirs = 40 - sum(gains) / len(gains)
    assert f"Test F1 40.0 against {theirs:.1f} for the target adapter alone: {verdict}.</h1>" in text
    [low, high] = re.search(r"GRASP against target only: F1 \S+ points \((\S+) to (\S+)\): " + verdict, text).groups()
    ours = {
        "target": [40.0 - gains[i % len(gains)] for i in range(100)],
        "merged": [40.0] * 100,
        "source": [40.0] * 100,
    }
    expected = compare_with_baselines([40.0] * 100, ours)["target"]
    assert [float(low), float(high)] == pytest.approx([expected.low, expected.high], abs=0.051)
    assert "95 % for all 3 rows together" in text


def test_losses_are_compared_where_scores_are_not_there_by_example(run_folder: Path) -> None:
    rows = [{"id": f"test-{i}", "prediction": "a", "loss": 1.0 + 0.01 * (i % 7)} for i in range(100)]
    for system in ("source", "target", "merged", "grasp"):
        more = 0.5 * (system == "target")
        write_lines(run_folder / "evaluation" / f"{system}.jsonl", [row | {"loss": row["loss"] + more} for row in rows])
    text = write_report(run_folder).read_text(encoding="utf-8").replace("\u2212", "-")
    assert "GRASP against target only: F1 +8.2 points; test loss -0.500 (-0.500 to -0.500): better." in text
    assert (
        "GRASP against merged, not pruned: F1 +1.1 points; test loss +0.000 (+0.000 to +0.000): no difference" in text
    )
    assert "for the target adapter alone.</h1>" in text


@pytest.mark.parametrize("broken", ["other ids", "fewer", "not finite"])
def test_systems_that_answered_other_examples_are_not_compared_by_example(run_folder: Path, broken: str) -> None:
    file = run_folder / "evaluation" / "target.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if broken == "other ids":
        rows[3]["id"] = "another"
    elif broken == "fewer":
        rows.pop()
    else:
        rows[3]["loss"] = math.inf
    write_lines(file, rows)
    text = write_report(run_folder).read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "GRASP against target only: F1 +8.2 points.<" in text
    assert "95 % for all 2 rows together" in text


def test_every_one_of_several_sources_has_its_row(run_folder: Path) -> None:
    def two_sources(metrics: Any) -> None:
        metrics["systems"]["source_2"] = {
            "test_loss": 0.95,
            "dev_loss": 0.9,
            "metrics": {"exact_match": 19.0, "f1": 31.5},
        }

    change(run_folder / "metrics.json", two_sources)
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["source"] = {"adapters": ["owner/first", "owner/second"]}
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

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
    text = write_report(run_folder).read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "GRASP against source 2 only: F1 +11.7 points." in text
    assert re.search(
        r"Of the source adapter \d\d\.\d % of the weights survive, of the source 2 adapter 0\.0 %, of", text
    )
    survival = figures_of(record)["survival"]
    assert [trace["name"] for trace in survival["data"]] == ["source", "source 2", "target"]


def test_given_adapters_stand_in_report_and_card(run_folder: Path) -> None:
    given = [{"name": "owner/english-lora", "sha256": "ab" * 32}]
    change(run_folder / "run.json", lambda run: run.update(parents=given))
    assert "owner/english-lora (sha256:abababababab)" in write_report(run_folder).read_text(encoding="utf-8")
    card = write_model_card(run_folder, run_folder / "adapter").read_text(encoding="utf-8")
    assert f"| Given adapter | owner/english-lora | sha256:{'ab' * 32} |" in card


@pytest.mark.parametrize(("granularity", "alarm"), [("component", False), ("weight", True)])
def test_whole_components_are_no_alarm(run_folder: Path, granularity: str, alarm: bool) -> None:
    def three_of_eight(entries: Any) -> None:
        for entry in entries:
            entry["kept"] = entry["weights"] * 5 // 8

    change(run_folder / "final" / "sparsity.json", three_of_eight)
    change(run_folder / "controller" / "ratio.json", lambda ratio: ratio.update(prune_ratio=0.4335))
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["mask"] = {"granularity": granularity}
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    text = write_report(run_folder).read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "37.50 % of the weights are zero" in text
    assert ("check the final run" in text) == alarm
    assert ("Only whole rank-one components are pruned, as many as the ratio of 43.35 % covers." in text) != alarm
    table = scores_table(read_run(run_folder))
    assert table is not None
    assert table.rows[-1][-1].text == "37.5\u00a0%"


def test_scores_of_an_own_metric_that_runs_to_one_are_told_apart(run_folder: Path) -> None:
    def own(metrics: Any) -> None:
        for value, system in zip((0.41, 0.42, 0.43, 0.436), metrics["systems"].values(), strict=True):
            system["metrics"] = {"own:metric": value}
        metrics["signatures"] = {"own:metric": "mine"}

    change(run_folder / "metrics.json", own)
    text = write_report(run_folder).read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "Test own:metric 0.436 against 0.420 for the target adapter alone" in text
    assert "own:metric +0.016; test loss" in text
    assert "scores run from 0 to 100, those of your own metrics as you define them." in text
    table = scores_table(read_run(run_folder))
    assert table is not None
    assert [row[3] for row in table.rows] == [
        ("0.410", False, 1),
        ("0.420", False, 1),
        ("0.430", False, 1),
        ("0.436", True, 1),
    ]


def test_texts_of_models_and_files_are_escaped(run_folder: Path) -> None:
    attack = "<script>alert(1)</script>"
    breakout = "demo</script><img src=x onerror=alert(2)>\u2028|`"
    predictions = run_folder / "evaluation" / "grasp.jsonl"
    row = {"id": "test-0", "prediction": attack, "references": [attack + "\u2028\u2029"], "loss": 1.0}
    write_lines(predictions, [row])
    change(run_folder / "run.json", lambda run: run.update(name=breakout))
    recipe = {"name": breakout, "data": {"target": {"language": breakout}}}
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

    def rename(entries: Any) -> None:
        entries[0]["module"] = f"model.layers.0.{breakout}"
        entries[1]["segment"] = attack

    change(run_folder / "final" / "sparsity.json", rename)
    write_lines(run_folder / "evaluation" / "target.jsonl", [row])
    harmless = Page(write_report(run_folder).read_text(encoding="utf-8"))
    tags = [tag for tag, _ in harmless.tags]
    assert tags.count("script") == 3
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attributes in harmless.tags for name in attributes)
    assert attack in "".join(cell for cells in harmless.rows for cell in cells)
    assert not set(harmless.scripts[0]) & set("<>&\u2028\u2029")
    for name in ("report.md", "adapter/README.md"):
        write_model_card(run_folder, run_folder / "adapter")
        markdown = (run_folder / name).read_text(encoding="utf-8")
        without_recipe = re.sub(r"(?m)^    .*$", "", markdown)
        assert "<script" not in without_recipe
        assert "<img" not in without_recipe


def test_nothing_is_loaded_from_elsewhere(run_folder: Path) -> None:
    page = report_of(run_folder)
    for tag, attributes in page.tags:
        assert "src" not in attributes
        assert tag not in ("link", "iframe", "object", "embed", "base")
        if "href" in attributes:
            assert tag == "a"
    policy = next(
        attributes["content"]
        for _, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "http" not in policy
    style = write_report(run_folder).read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_plotly_is_inlined_once_and_takes_every_figure(run_folder: Path) -> None:
    page = report_of(run_folder)
    assert sum("plotly.js v" in script for script in page.scripts) == 1
    assert list(page.figures) == [
        "curve", "trajectory", "baseline", "history-source", "history-target", "history-controller",
        "history-final", "sparsity", "survival", "cost",
    ]  # fmt: skip
    placed = [attributes.get("data-figure") for _, attributes in page.tags if "data-figure" in attributes]
    assert sorted(map(str, placed)) == sorted(page.figures)
    assert all(attributes.get("aria-label") for _, attributes in page.tags if "data-figure" in attributes)
    for figure in page.figures.values():
        # Colours are CSS variables until the page resolves them.
        plain = json.loads(re.sub(r"var\(--[\w-]+\)", "#123456", json.dumps(figure)))
        go.Figure(plain)
        for axis in ("xaxis", "yaxis"):
            assert figure["layout"][axis]["title"]["text"]
        assert "%" not in figure["layout"]["xaxis"]["title"]["text"] + figure["layout"]["yaxis"]["title"]["text"]


def test_every_colour_variable_exists_in_both_themes(run_folder: Path) -> None:
    text = write_report(run_folder).read_text(encoding="utf-8")
    used = set(re.findall(r"var\((--[\w-]+)\)", "".join(Page(text).scripts[0])))
    style = text.split("<style>")[1].split("</style>")[0]
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    for name in used:
        assert f"{name}:" in light
        assert f"{name}:" in dark.split("* {")[0]


def test_probes_of_a_round_keep_their_differences_on_the_curve(run_folder: Path) -> None:
    record = read_run(run_folder)
    points = report_of(run_folder).figures["curve"]["data"][1]
    first = record.rounds[0]
    shown = [y for y, number in zip(points["y"], points["customdata"], strict=True) if number == first.round]
    assert len(shown) == 1 + len(first.candidates)
    for loss, reward in zip(shown[1:], first.rewards, strict=True):
        assert shown[0] - loss == pytest.approx(reward)


def test_rule_without_a_curve_is_drawn_as_differences(run_folder: Path) -> None:
    empty: dict[str, list[float]] = {"ratios": [], "mean": [], "low": [], "high": []}
    change(run_folder / "controller" / "ratio.json", lambda ratio: ratio.update(rule="best_reward", curve=empty))
    page = report_of(run_folder)
    [points] = page.figures["curve"]["data"]
    assert points["y"][0] == 0.0
    assert "minus baseline" in page.figures["curve"]["layout"]["yaxis"]["title"]["text"]


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        (["metrics.json", "evaluation", "stages/evaluate.json"], "have not been evaluated yet"),
        (["controller"], "has not chosen a ratio yet"),
        (["controller/rounds.jsonl"], "No round of the controller has been measured yet"),
        (["final"], "sparsity of the result has not been written yet"),
        (["metrics.json", "cost.json", "stages"], "No stage has finished yet"),
        (["source", "target", "controller", "final"], "No losses have been recorded yet"),
    ],
)
def test_half_finished_run_says_what_is_not_there(run_folder: Path, removed: list[str], said: str) -> None:
    for name in removed:
        path = run_folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert said in write_report(run_folder).read_text(encoding="utf-8")
    assert said in (run_folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_explained(run_folder: Path, rule: str) -> None:
    change(run_folder / "controller" / "ratio.json", lambda ratio: ratio.update(rule=rule))
    page = write_report(run_folder).read_text(encoding="utf-8")
    assert "Each round of the controller pruned the adapter" in page
    assert f"by the rule <code>{rule}" not in page


def test_it_says_which_examples_were_probed(run_folder: Path) -> None:
    assert "measured the loss on the micro-dev set." in write_report(run_folder).read_text(encoding="utf-8")
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["controller"] = recipe.get("controller", {}) | {"rounds": {"pool": "both", "in_turn": 3}}
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    page = write_report(run_folder).read_text(encoding="utf-8")
    assert "on the micro-dev and the dev set, other examples in each round." in page
    assert "cannot be compared with each other" in page
    rounds = run_folder / "controller" / "rounds.jsonl"
    rows = [json.loads(line) | {"places": [0, 2]} for line in rounds.read_text(encoding="utf-8").splitlines()]
    rounds.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = write_report(run_folder).read_text(encoding="utf-8")
    assert "on the micro-dev and the dev set, of candidates on 2 of its examples in turn." in page
    assert "cannot be compared with each other" not in page


def test_a_run_of_an_older_version_is_said(run_folder: Path) -> None:
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["controller"] = {"policy": {"kind": "shared"}, "probe_on": "dev"}
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(
        RecipeError, match=r"recipe\.yaml has controller\.probe_on, which is now controller\.rounds\.pool"
    ):
        write_report(run_folder)


@pytest.mark.parametrize(("high", "wide"), [(0.55, False), (0.79, True)])
def test_a_wide_interval_is_called_wide(run_folder: Path, high: float, wide: bool) -> None:
    change(run_folder / "controller" / "ratio.json", lambda ratio: ratio.update(low=0.4, high=high))
    page = write_report(run_folder).read_text(encoding="utf-8")
    assert ("do not settle the ratio" in page) is wide
    assert ("do not settle the ratio" in (run_folder / "report.md").read_text(encoding="utf-8")) is wide


def test_predictions_stand_in_the_page_only(run_folder: Path) -> None:
    # Data sets' licences may forbid to share their texts: the Markdown report can be shared.
    [first, *_] = read_run(run_folder).predictions["grasp"]
    page = write_report(run_folder)
    assert first.prediction in page.read_text(encoding="utf-8")
    markdown = (run_folder / "report.md").read_text(encoding="utf-8")
    assert first.prediction not in markdown
    assert first.references[0] not in markdown
    shutil.rmtree(run_folder / "evaluation")
    assert "No predictions have been written yet" in write_report(run_folder).read_text(encoding="utf-8")


def test_run_that_has_just_begun_gives_a_report(run_folder: Path) -> None:
    for path in run_folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("run.json", "recipe.yaml"):
            path.unlink()
    text = write_report(run_folder).read_text(encoding="utf-8")
    assert "No prune ratio has been learned yet. The result has not been evaluated yet." in text
    assert "Not in its folder: data, source, target, merge, controller, final, evaluate." in text
    assert "Plotly" not in text


def give_ratio(run_folder: Path) -> None:
    """Turn a run into one whose recipe gives the ratio."""
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text(encoding="utf-8"))
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"final": {"prune_ratio": 0.46}}), encoding="utf-8")
    shutil.rmtree(run_folder / "controller")
    (run_folder / "stages" / "controller.json").unlink()
    change(run_folder / "cost.json", lambda cost: cost.pop("controller"))


def test_run_with_a_given_ratio_is_complete_without_a_controller(run_folder: Path) -> None:
    give_ratio(run_folder)
    page = write_report(run_folder).read_text(encoding="utf-8")
    markdown = (run_folder / "report.md").read_text(encoding="utf-8")
    for text in (page, markdown):
        text = text.replace("\u00a0", " ")
        assert "Prune 46 % of the merged adapter (given, not learned)." in text.replace("\\", "")
        assert "The recipe gives the ratio, 46.0 %" in text
        assert "There is no controller run, because the recipe gives the ratio." in text
        for wrong in ("not complete", "has not chosen a ratio", "No round of the controller", "interval"):
            assert wrong not in text.split("The recipe</h2>")[0].split("<style>")[0]
    assert "curve" not in Page(page).figures
    assert next(cells for cells in Page(page).rows if cells[0] == "GRASP")[-1] == percent(
        1 - kept_share(read_run(run_folder).sparsity), 1
    )
    card = write_model_card(run_folder, run_folder / "adapter").read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "- Prune ratio: 46.0 %, given, not learned\n" in card
    (run_folder / "stages" / "final.json").unlink()
    assert "Not in its folder: final." in write_report(run_folder).read_text(encoding="utf-8")


def test_run_without_a_test_set_has_a_report(run_folder: Path) -> None:
    def empty(metrics: Any) -> None:
        metrics["test_examples"], metrics["signatures"] = 0, {}
        for scores in metrics["systems"].values():
            scores |= {"test_loss": None, "metrics": {}}

    change(run_folder / "metrics.json", empty)
    shutil.rmtree(run_folder / "evaluation")
    page = report_of(run_folder)
    assert next(cells for cells in page.rows if cells[0] == "Source only") == [
        "Source only", "–", "0.891", percent(0)
    ]  # fmt: skip


def test_unavailable_and_non_finite_scores_are_no_numbers(run_folder: Path) -> None:
    def spoil(metrics: Any) -> None:
        metrics["systems"]["grasp"]["metrics"]["bertscore"] = None
        metrics["systems"]["source"]["test_loss"] = math.nan
        del metrics["systems"]["target"]

    change(run_folder / "metrics.json", spoil)
    with (run_folder / "final" / "history.jsonl").open("a", encoding="utf-8") as history:
        history.write('{"step": 99, "epoch": 9.0, "loss": NaN}\n')
    page = report_of(run_folder)
    row = next(cells for cells in page.rows if cells[0] == "GRASP")
    assert row[5] == "unavailable"
    assert next(cells for cells in page.rows if cells[0] == "Source only")[1] == "not finite"
    assert page.figures["history-final"]["data"][0]["y"][-1] is None


def test_even_sparsity_is_explained(run_folder: Path) -> None:
    change(
        run_folder / "final" / "sparsity.json",
        lambda entries: [entry.update(weights=1000, kept=540) for entry in entries],
    )
    text = write_report(run_folder).read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "46.00 % of the weights are zero. Every factor keeps the same share" in text


def test_model_card_says_what_the_adapter_is_and_holds_no_path(run_folder: Path) -> None:
    path = write_model_card(run_folder, run_folder / "adapter")
    assert path == run_folder / "adapter" / "README.md"
    text = path.read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "base_model": "google/gemma-3-270m",
        "tags": ["lora", "grasp-lora", "adapter-merging", "pruning", "cross-lingual-transfer"],
        "pipeline_tag": "text-generation",
        "language": ["ar"],
    }
    for private in (str(run_folder), str(run_folder.parent), str(Path.home()) + "/"):
        assert private not in text
    assert "xquad.en.json, xquad.ar.json" in body
    assert "sha256:9d20aa41" in body
    assert body.count("sha256:") == 4  # backbone, two parents, recipe
    assert "نخلة" not in body
    code = body.split("```python\n")[1].split("```")[0].strip().splitlines()
    assert len(code) == 5
    compile("\n".join(code), "card", "exec")
    assert "| GRASP | **0.857** | **0.822** | **43.2** |" in body
    prompt = TEMPLATES["qa"]["ar"].prompt
    assert (
        "It was trained on prompts of this form:\n\n" + "".join(f"    {line}\n" for line in prompt.split("\n")) in body
    )


def test_card_and_reports_name_the_start_of_a_single_run(run_folder: Path) -> None:
    card = write_model_card(run_folder, run_folder / "adapter").read_text(encoding="utf-8")
    assert "- The final run starts from a fresh merge\n" in card
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["final"] = {**recipe.get("final", {}), "start": "controller"}
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    card = write_model_card(run_folder, run_folder / "adapter").read_text(encoding="utf-8")
    write_report(run_folder)
    for text in (card, (run_folder / "report.md").read_text(encoding="utf-8")):
        assert "the controller run's own adapter, at its best round, with its mask held (single run)" in text


def test_model_card_names_a_quantised_backbone_as_the_hub_does(run_folder: Path) -> None:
    name = "google/gemma-3-270m (Q4_K_M GGUF)"
    change(run_folder / "run.json", lambda run: run["backbone"].update(name=name))
    text = write_model_card(run_folder, run_folder / "adapter").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "google/gemma-3-270m"
    assert 'AutoModelForCausalLM.from_pretrained("google/gemma-3-270m")' in text
    assert "Q4\\_K\\_M GGUF" in text


@pytest.mark.parametrize("local", ["/home/someone/models/llama", r"C:\Users\me\llama", "~/models/llama/", "../llama"])
def test_model_card_names_a_local_backbone_without_its_folder(run_folder: Path, local: str) -> None:
    change(run_folder / "run.json", lambda run: run["backbone"].update(name=local))
    text = write_model_card(run_folder, run_folder / "adapter").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "llama"
    assert local not in text


def test_model_card_needs_a_run_and_an_adapter(run_folder: Path) -> None:
    with pytest.raises(RecipeError, match="no adapter folder"):
        write_model_card(run_folder, run_folder / "nowhere")
    (run_folder / "run.json").unlink()
    for write in (write_report, lambda folder: write_model_card(folder, folder / "adapter")):
        with pytest.raises(RecipeError, match=r"is no run folder: run\.json is missing"):
            write(run_folder)


def test_card_of_a_half_finished_run_says_so(run_folder: Path) -> None:
    (run_folder / "metrics.json").unlink()
    shutil.rmtree(run_folder / "controller")
    text = write_model_card(run_folder, run_folder / "adapter").read_text(encoding="utf-8")
    assert "Prune ratio: not learned yet" in text
    assert "has not been evaluated yet" in text


@pytest.mark.parametrize(("seconds", "text"), [(59.96, "1 min 0 s"), (3599.7, "1 h 0 min"), (0.0, "0.0 s")])
def test_duration_carries_over(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_caption_says_how_the_current_ratio_moves(run_folder: Path) -> None:
    held = "moves towards the best candidate of a round"
    write_report(run_folder)
    assert held in (run_folder / "report.html").read_text(encoding="utf-8")
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["controller"] = {"policy": {"kind": "spread"}}
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    write_report(run_folder)
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    assert held not in page
    assert "Each step trained at a ratio of its own" in page
