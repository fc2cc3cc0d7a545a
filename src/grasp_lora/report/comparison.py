"""From `compare.json` to what a person reads: a table in the terminal, compare.md and report.html."""

import secrets
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from grasp_lora.bench.methods import DEFAULT_METHODS, METHODS
from grasp_lora.bench.run_folder import COMPARE_FOLDER
from grasp_lora.recipes.recipe import RECIPE_FILE
from grasp_lora.report.figures import comparison_figure, learned_row, plotly_js
from grasp_lora.report.pages import PAPER, render
from grasp_lora.report.tables import METRIC_NAMES, Cell, Table, scale_note, score_digits
from grasp_lora.storage.files import write_whole

PLUS_MINUS = "±"
CHOSEN_ON = {"dev": "dev", "micro_dev": "micro-dev", "both": "micro-dev and dev", "test": "TEST"}
STEADY = 1.5  # seconds per forward pass of the final runs that may differ this many times before speed-ups in seconds mislead
GRIDS = ("grid", "grid_paper", "grid_dev_free")  # the first of them that was run is what speed-ups refer to
FULL_WIDTH = 180  # of a table that does not go to a terminal


def write_comparison(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write compare.md and report.html into the folder of a comparison; return the path of the latter."""
    view = _view(content)
    write_whole(folder / "compare.md", render("comparison.md.j2", view))
    page = {
        "figures": {"grid": comparison_figure(content)} if content["curve"] else {},
        "plotly_js": plotly_js(),
        "nonce": secrets.token_urlsafe(16),
    }
    path = folder / "report.html"
    write_whole(path, render("comparison.html.j2", view | page))
    return path


def print_comparison(content: Mapping[str, Any], console: Console) -> None:
    """Print the table of a comparison."""
    table = score_table(content)
    printed = RichTable()
    for column in table.columns:
        printed.add_column(column, overflow="fold")  # a narrow terminal cuts no word off
    for row in table.rows:
        # A row that is short, since its text goes over several columns, is filled up.
        printed.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
    # The width of what is printed never exceeds that of its console, which is 80 where there is no terminal.
    (console if console.is_terminal else Console(file=console.file, width=FULL_WIDTH)).print(printed)
    for warning in content["warnings"]:
        console.print(f"WARNING: {warning}", style="bold red", markup=False, soft_wrap=True)


def command_of(content: Mapping[str, Any]) -> str:
    """The command that makes the comparison in the folder of the experiment; with its store there it only writes it anew."""
    settings = content["settings"]
    words = ["grasp-lora", "compare", f"{COMPARE_FOLDER}/{RECIPE_FILE}"]
    if set(settings["methods"]) != set(DEFAULT_METHODS):
        words += ["--methods", ",".join(settings["methods"])]
    words += ["--seeds", ",".join(map(str, settings["seeds"])), "--grid", ",".join(map(str, settings["grid"]))]
    words += ["--reference", settings["reference"]]
    for seed in settings["split_seeds"]:
        words += ["--split-seed", str(seed)]
    return " ".join([*words, "--output", "."])


def score_table(content: Mapping[str, Any]) -> Table:
    """Rows methods, columns the ratio and the metrics, mean and deviation over seeds; the best of a column is marked."""
    metrics, reference = content["metrics"], METHODS[content["reference"]].title
    columns = ["method", "prune ratio", "chosen on", *(_heading(metric) for metric in metrics)]
    columns.append(f"is {reference} better? (test loss)")
    rows = []
    digits = _digits(content)
    best = {metric: _best(content, metric, digits[metric]) for metric in metrics}
    for row in content["rows"]:
        if row["unavailable"]:
            reason = row["unavailable"] if row["failed"] else f"unavailable: {row['unavailable']}"
            rows.append([Cell(row["title"]), Cell(reason, span=len(columns) - 1)])
            continue
        cells = [
            Cell(_spread(row["scores"][metric], digits[metric]), row["method"] in best[metric]) for metric in metrics
        ]
        chosen = Cell("–" if row["chosen_on"] is None else CHOSEN_ON[row["chosen_on"]])
        rows.append([Cell(row["title"]), Cell(_ratio(row)), chosen, *cells, Cell(_verdict(row, content))])
    return Table("Scores of every method, mean and standard deviation over seeds", columns, rows)


def cost_table(content: Mapping[str, Any]) -> Table:
    """What each method needs, in all and beyond the adapters that are merged, and how it compares with the grid search."""
    done = [row for row in content["rows"] if not row["unavailable"]]
    grids = {row["method"]: row for row in done if row["method"] in GRIDS}
    grid = next((grids[name] for name in GRIDS if name in grids), None)
    columns = ["method", "runs", "seconds", "forward passes",
               f"speed-up over {grid['title'] if grid else 'a grid'}, in forward passes", "the same in seconds",
               "runs in all", "seconds in all"]  # fmt: skip
    in_seconds = not _incomparable_seconds(content)
    rows = []
    for row in done:
        cost = row["cost"]
        facts = [f"{cost['runs']:.0f}", f"{cost['seconds']:.0f}", f"{cost['work']:.0f}"]
        than, what = None if grid is None else grid["cost"], "" if row["merges"] else "_in_all"
        facts.append(_speedup(than, cost, f"work{what}"))
        facts.append(_speedup(than, cost, f"seconds{what}") if in_seconds else "–")
        facts += [f"{cost['runs_in_all']:.0f}", f"{cost['seconds_in_all']:.0f}"]
        rows.append([Cell(row["title"]), *map(Cell, facts)])
    return Table("Cost of every method, mean over seeds", columns, rows)


def split_tables(content: Mapping[str, Any]) -> list[Table]:
    """For each further split: test loss with the first seed there and on the usual split, and the difference to the reference."""
    reference = METHODS[content["reference"]].title
    tables = []
    for other in content["other_splits"]:
        names = [f"split {content['split_seed']}", f"split {other['split_seed']}"]
        columns = [
            "method",
            *(f"test loss, {name}" for name in names),
            *(f"{reference} minus it, {name}" for name in names),
        ]
        rows = []
        for row in other["rows"]:
            differences = row["difference"] or [None, None]
            cells = [f"{loss:.4f}" for loss in row["test_loss"]]
            cells += ["–" if one is None else f"{one:+.4f}" for one in differences]
            rows.append([Cell(row["title"]), *map(Cell, cells)])
        for row in other["missing"]:
            rows.append([Cell(row["title"]), Cell(""), Cell(row["reason"]), Cell(""), Cell("")])
        tables.append(Table(f"Seed {other['seed']} on another split of the data", columns, rows))
    return tables


def verdict_table(content: Mapping[str, Any]) -> Table:
    """The reference method minus each other one, with the corrected interval, for every metric."""
    metrics = content["metrics"]
    digits = _digits(content)
    columns = ["method", *(f"{_heading(metric)}: difference, interval, verdict" for metric in metrics)]
    rows = []
    for row in content["rows"]:
        if row["unavailable"] or not row["against"]:
            continue
        cells = []
        for metric in metrics:
            one = row["against"].get(metric)
            if one is None:
                cells.append(Cell("unavailable"))
                continue
            difference, low, high = (f"{one[key]:+.{digits[metric]}f}" for key in ("difference", "low", "high"))
            text = f"{difference} [{low}, {high}] {one['verdict']}"
            cells.append(Cell(text))
        rows.append([Cell(row["title"]), *cells])
    return Table("The reference method against every other one", columns, rows)


def _view(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "version": version("grasp-lora"),
        "paper": PAPER,
        "name": content["name"],
        "content": content,
        "reference": METHODS[content["reference"]].title,
        "scores": score_table(content),
        "cost": cost_table(content),
        "verdicts": verdict_table(content),
        "splits": split_tables(content),
        "confidence": next(
            (f"{one['confidence']:.0%}" for row in content["rows"] for one in row.get("against", {}).values()), "95%"
        ),
        "incomparable_seconds": _incomparable_seconds(content),
        "scale": scale_note(metric for metric in content["metrics"] if metric != "test_loss"),
        "stopping": _stopping(content),
        "marked": (learned_row(content) or {}).get("title"),
        "command": command_of(content),
    }


def _incomparable_seconds(content: Mapping[str, Any]) -> str | None:
    """Why seconds of different rows cannot be compared, in a sentence; None if they can."""
    if (machines := len(content["made_with"])) > 1:
        return (
            f"The records were made in {machines} different environments, so their seconds cannot be compared; "
            "the forward passes can."
        )
    pace = content["pace"]
    if pace and pace["highest"] > STEADY * pace["lowest"]:
        times = pace["highest"] / pace["lowest"]
        return (
            f"A forward pass of one final run took {times:.1f} times the seconds of one of another, so the machine was slower or "
            "busier at times, and seconds cannot be compared; the forward passes can."
        )
    return None


def _stopping(content: Mapping[str, Any]) -> str:
    """What final runs use the dev set for, in a sentence."""
    if not content["dev_examples"]:
        return "There is no dev set: final runs train to their end."
    uses = "Final runs stop early on the dev set" if content["stops_early"] else "Final runs train to their end"
    if content["keeps_best"]:
        uses += " and keep the adapter with the lowest dev loss"
    elif not content["stops_early"]:
        return f"{uses} and keep the last adapter."
    if not any(row["method"].endswith("dev_free") for row in content["rows"]):
        return f"{uses}."
    target = "" if content["given_target"] else ", whose target adapter does not look at it either"
    return f"{uses}, except in the rows “without a dev set”{target}."


def _heading(metric: str) -> str:
    return "test loss" if metric == "test_loss" else METRIC_NAMES.get(metric, metric)


def _digits(content: Mapping[str, Any]) -> dict[str, int]:
    """How many decimals each metric is printed with."""
    found = {}
    for metric in content["metrics"]:
        scores = [row["scores"][metric] for row in content["rows"] if not row["unavailable"]]
        means = [score["mean"] for score in scores if score]
        found[metric] = 4 if metric == "test_loss" else score_digits(metric, means, 2)
    return found


def _best(content: Mapping[str, Any], metric: str, digits: int) -> set[str]:
    """The methods whose mean prints as the best one does; those that chose on the test split are no candidates."""
    fair = [row for row in content["rows"] if not row["unavailable"] and not row["warning"] and row["scores"][metric]]
    means = {row["method"]: f"{row['scores'][metric]['mean']:.{digits}f}" for row in fair}
    choose = min if metric == "test_loss" else max
    return {method for method, text in means.items() if text == choose(means.values(), key=float)}


def _spread(value: Mapping[str, Any] | None, digits: int) -> str:
    if value is None:
        return "unavailable"
    deviation = "" if value["sd"] is None else f" {PLUS_MINUS} {value['sd']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{deviation}"


def _ratio(row: Mapping[str, Any]) -> str:
    ratio = row["prune_ratio"]
    if ratio is None:
        return "–"
    deviation = "" if ratio["sd"] is None else f" {PLUS_MINUS} {100 * ratio['sd']:.1f}"
    return f"{100 * ratio['mean']:.1f}{deviation} %"


def _verdict(row: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    if row["method"] == content["reference"]:
        return "it is the reference"
    one = row["against"].get("test_loss")
    return "–" if one is None else f"{one['verdict']} ({one['difference']:+.4f})"


def _speedup(grid: Mapping[str, float] | None, cost: Mapping[str, float], what: str) -> str:
    return f"{grid[what] / cost[what]:.2f}" if grid and cost[what] else "–"
