"""Where does learned pruning help? A map over rows, rank, stopping and source adapter.

    python lab/pruning_map.py tydiqa-sw --output FOLDER [--rows 16,50,200] [--ranks 8,64] [--stops early,none]
        [--sources 400,2000] [--seeds 42] [--set KEY=VALUE]... [--rivals] [--answers] [--json map.json] [--figure map.svg]

A cell is one setting of these four. In each, GRASP is compared with the source adapter continued (`continued`) and with the merge
that is fine-tuned as it is (`merge`): test loss, with the paired interval over test rows at 95 %, each by itself. With --answers
the main score is added where a difference of losses leaves out 0. All steps are kept in FOLDER/store; a killed map goes on.
Cells that the file of --json holds stay, so that a map can grow by several commands; table and figure show all of them. These
commands have the same recipe and seeds, but for rows, rank, source and `target.on`, which tell cells apart.

| stopping | what is compared |
|---|---|
| early | five epochs at most, the best by dev loss |
| none | five epochs and their last step, no look at the dev set, as where there are too few rows for one |

--rivals adds, for the merge in place of pruning: weight decay 0.1, a third of the learning rate, and half of the weights pruned
without learning a ratio. It also adds GRASP on a merge with a random adapter of the source's norms.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from candidates import Candidates, benches, measure, save_checkpoints, shown

from grasp_lora.bench.checks import check
from grasp_lora.bench.outcomes import Adapter
from grasp_lora.bench.planned import main_metric
from grasp_lora.bench.run_folder import STORE_FOLDER
from grasp_lora.bench.session import Session
from grasp_lora.bench.store import Store, key_of
from grasp_lora.cli.terminal import log_to_terminal
from grasp_lora.errors import DataError, GraspError
from grasp_lora.evaluation.statistics import PairedComparison, compare_with_baselines
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.presets import PRESETS
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.claims import Workplace, working_in

RANKS: dict[str, tuple[str, ...]] = {
    "8": (),
    "64, all linear": ("lora.rank=64", "lora.alpha=128", "lora.target_modules=[all-linear]"),
}
# Of every cell, so that only what else a recipe says is left to tell two maps apart.
ALIKE = ("data.target.train=1", "data.source.train=1", "target.on=null")
STOPPING = {"early": False, "none": True}  # whether it is free of a dev set


@dataclass(frozen=True)
class Cell:
    """One setting of the map."""

    rows: int
    rank: str
    stopping: str
    source: int
    on: str | None = None  # the recipe's target.on

    def changes(self) -> list[str]:
        """What it sets in the recipe."""
        return [f"data.target.train={self.rows}", f"data.source.train={self.source}", *RANKS[self.rank]]

    def title(self) -> str:
        """What it is called in the table."""
        end = "" if self.on is None else f", target on {self.on}"
        return f"{self.rows} rows, rank {self.rank}, stopping {self.stopping}, source of {self.source}{end}"


def without_dev(bench: Candidates) -> Candidates:
    """A bench that never looks at the dev set: all epochs, the last step, late rounds on the micro-dev set."""
    recipe, late = bench.recipe, PRESETS["late"]
    own = recipe.controller
    bounds = {name: getattr(own.policy, name) for name in ("ratio_min", "ratio_max", "ratio_init")}
    controller = replace(
        own,
        policy=replace(late.policy, **bounds),
        rounds=replace(late.rounds, every=own.rounds.every),
        rule=late.rule,
        training=replace(own.training, patience=None),
    )
    stages = {
        name: replace(stage, training=replace(stage.training, patience=None, keep="last"))
        for name, stage in (("target", recipe.target), ("final", recipe.final))
    }
    session = bench.session.variant(recipe.model_copy(update={**stages, "controller": controller}))
    session.splits = replace(session.splits, dev=())
    return Candidates(session, bench._shared, bench.store, bench.grid)


def contestants(bench: Candidates, rivals: bool) -> dict[str, Callable[[], Adapter]]:
    """What is measured in a cell, GRASP first."""

    def grasp(own: Candidates) -> Adapter:
        learned = own.learned(own.recipe.controller)
        return own.finetuned(learned.start, learned.ratio)

    def merged(ratio: float = 0.0, **training: Any) -> Adapter:
        changes = {"training": replace(bench.recipe.final.training, **training)}
        return bench.finetuned(bench.merged(), ratio, changes)

    found: dict[str, Callable[[], Adapter]] = {
        "GRASP": partial(grasp, bench),
        "continued": lambda: bench.finetuned(bench.source, 0.0),
        "merge": merged,
    }
    if rivals:
        found |= {
            "merge, weight decay 0.1": lambda: merged(weight_decay=0.1),
            "merge, a third of the rate": lambda: merged(learning_rate=bench.recipe.final.training.learning_rate / 3),
            "merge, 0.5 held": lambda: merged(0.5),
            "GRASP, random source": lambda: grasp(with_random_source(bench)),
        }
    return found


def with_random_source(bench: Candidates) -> Candidates:
    """A bench whose source adapter is random, each factor of the norm of the real one's."""
    draws = torch.Generator().manual_seed(bench.recipe.seed_of("random source"))
    pairs = {}
    for name, pair in bench.source.weights.items():
        A, B = (
            (noise := torch.randn(one.shape, generator=draws)) * (one.norm() / noise.norm()) for one in (pair.A, pair.B)
        )
        pairs[name] = replace(pair, A=A, B=B)
    weights = AdapterWeights(pairs)
    key = key_of("random source", {"of": bench.source.key, "seed": bench.recipe.seed})
    other = Candidates(bench.session, bench._shared, bench.store, bench.grid)
    other.__dict__["sources"] = [Adapter(key, lambda: weights, bench.source.records)]
    return other


def measure_cell(
    sessions: dict[tuple[str, ...], Session], cell: Cell, given: argparse.Namespace, place: Workplace, store: Store
) -> dict[str, Any]:
    """Train and measure one cell; return its row."""
    changes = [*given.set, *cell.changes()]
    session = sessions.get(tuple(changes))
    if session is None:
        session = Session(*load_recipe(given.recipe, changes))
        if sessions:  # the backbone is loaded once
            session.backbone = next(iter(sessions.values())).backbone
        check(session)
        save_checkpoints(session, place)
        sessions[tuple(changes)] = session
    own = benches(session, store, [int(seed) for seed in given.seeds.split(",")])
    tried = [without_dev(bench) if STOPPING[cell.stopping] else bench for bench in own]
    made = [{name: make() for name, make in contestants(bench, given.rivals).items()} for bench in tried]
    losses = {
        name: [measure(bench, one[name], None)[0] for bench, one in zip(own, made, strict=True)] for name in made[0]
    }
    row: dict[str, Any] = {
        "cell": vars(replace(cell, on=session.recipe.target.on)),
        "made_by": made_by(given),
        "test_loss": {name: fmean(map(fmean, runs)) for name, runs in losses.items()},
        "GRASP minus": {},
        "score": {},
    }
    ours, groups = losses.pop("GRASP"), [example.group for example in session.splits.test]
    for name, theirs in losses.items():
        found = compare_with_baselines(ours, {name: theirs}, groups=groups, higher_is_better=False)[name]
        row["GRASP minus"][name] = vars(found)
        if given.answers and not found.low <= 0.0 <= found.high and name in ("continued", "merge"):
            metric = main_metric(list(session.metrics))
            scores = [
                [measure(bench, one[which], metric)[1] for bench, one in zip(own, made, strict=True)]
                for which in ("GRASP", name)
            ]
            compared = compare_with_baselines(scores[0], {name: scores[1]}, groups=groups)[name]
            row["score"][name] = {"metric": metric} | vars(compared)
    return row


def cells(given: argparse.Namespace) -> Iterator[Cell]:
    """All cells, those first that are quick."""
    rows, sources = ([int(one) for one in text.split(",")] for text in (given.rows, given.sources))
    ranks = [rank for rank in RANKS if rank.partition(",")[0] in given.ranks.split(",")]
    stops = [stop for stop in STOPPING if stop in given.stops.split(",")]
    for count, source, rank, stopping in product(rows, sources, ranks, stops):
        yield Cell(count, rank, stopping, source)


def made_by(given: argparse.Namespace) -> str:
    """The seeds and a hash of the recipe, without what tells cells apart."""
    recipe = load_recipe(given.recipe, [*given.set, *ALIKE])[0]
    return f"recipe {recipe.fingerprint()}, seeds {given.seeds}"


def on_file(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells that the file of --json holds.

    Raises:
        DataError: they are those of another recipe or of other seeds; older files do not say.
    """
    if not (given.json and given.json.exists()):
        return []
    rows: list[dict[str, Any]] = json.loads(given.json.read_text(encoding="utf-8"))
    own = made_by(given)
    if other := next((one for row in rows if (one := row.get("made_by", own)) != own), None):
        raise DataError(f"{given.json} holds cells of {other}, and these are of {own}; give another file with --json")
    return rows


def together(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that are there with one more, or with it in the place of its predecessor; in the order of their settings."""
    others = [one for one in rows if Cell(**one["cell"]) != Cell(**row["cell"])]
    ranks, stops = list(RANKS), list(STOPPING)

    def place(one: dict[str, Any]) -> tuple[int, ...]:
        cell = Cell(**one["cell"])
        return cell.rows, ranks.index(cell.rank), cell.source, stops.index(cell.stopping)

    return sorted([*others, row], key=place)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a cell, a column a contestant that GRASP is compared with."""
    names = list(dict.fromkeys(name for row in rows for name in row["GRASP minus"]))
    lines = [["cell", "GRASP's test loss", *(f"minus {name}" for name in names), "score"]]
    lines.append(["---", *["---:"] * (len(names) + 2)])
    for row in rows:
        found = row["GRASP minus"]
        differences = [shown(_comparison(found[name])) if name in found else "" for name in names]
        scores = [
            f"{values['metric']} minus {name} {shown(_comparison(values))}" for name, values in row["score"].items()
        ]
        lines.append([Cell(**row["cell"]).title(), f"{row['test_loss']['GRASP']:.3f}", *differences, "; ".join(scores)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _comparison(values: dict[str, Any]) -> PairedComparison:
    return PairedComparison(**{name: value for name, value in values.items() if name != "metric"})


def figure(rows: Sequence[dict[str, Any]], names: Sequence[str] = ("continued", "merge")) -> str:
    """An SVG: per cell the difference of GRASP's test loss to each of two others, with its interval."""
    left, width, top, step = 380, 260, 46, 22
    bounds = [row["GRASP minus"][name][end] for row in rows for name in names for end in ("low", "high")]
    reach = max(map(abs, bounds)) or 1.0
    height = top + step * len(rows) + 30
    parts = []
    for panel, name in enumerate(names):
        begin = left + panel * (width + 60)

        def at(value: float, begin: int = begin) -> float:
            return begin + width / 2 + value / reach * width / 2

        parts.append(f'<text x="{begin + width / 2}" y="20" text-anchor="middle">GRASP minus {name}, nats</text>')
        parts.append(f'<line x1="{at(0)}" x2="{at(0)}" y1="28" y2="{height - 24}" stroke="#9aa5b1"/>')
        for end in (-reach, reach):
            parts.append(f'<text x="{at(end):.1f}" y="{height - 8}" text-anchor="middle">{end:+.2f}</text>')
        for number, row in enumerate(rows):
            found, y = row["GRASP minus"][name], top + step * number
            sure = not found["low"] <= 0.0 <= found["high"]
            color = "#616e7c" if not sure else "#1f5fa8" if found["high"] < 0 else "#c2571a"
            ends = f'x1="{at(found["low"]):.1f}" x2="{at(found["high"]):.1f}"'
            parts.append(f'<line {ends} y1="{y}" y2="{y}" stroke="{color}" stroke-width="2"/>')
            parts.append(f'<circle cx="{at(found["difference"]):.1f}" cy="{y}" r="4" fill="{color}"/>')
    for number, row in enumerate(rows):
        parts.append(f'<text x="10" y="{top + step * number + 4}">{Cell(**row["cell"]).title()}</text>')
    whole = left + len(names) * (width + 60)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {height}" width="{whole}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="11" role="img"><title>Where learned pruning helps</title>'
        f'<rect width="{whole}" height="{height}" fill="#ffffff"/>'
    )
    return head + "\n" + "\n".join(parts) + "\n</svg>\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all cells that are not on record, and print the table after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--output", type=Path, required=True, help="folder of the map; its store keeps all steps")
    parser.add_argument("--rows", default="16,50,200")
    parser.add_argument("--ranks", default=",".join(rank.partition(",")[0] for rank in RANKS))
    parser.add_argument("--stops", default=",".join(STOPPING))
    parser.add_argument("--sources", default="400,2000", help="English rows of the source adapter")
    parser.add_argument("--seeds", default="42", help="separated by commas")
    parser.add_argument("--set", action="append", default=[], help="as of grasp-lora compare")
    parser.add_argument(
        "--rivals", action="store_true", help="weight decay, a lower rate, a held ratio, a random source"
    )
    parser.add_argument("--answers", action="store_true", help="score the answers where losses differ")
    parser.add_argument("--json", type=Path, help="a file for the figures of all cells")
    parser.add_argument("--figure", type=Path, help="an SVG file")
    given = parser.parse_args(arguments)
    log_to_terminal(False)
    rows: list[dict[str, Any]] = []
    try:
        on_file(given)  # refused before anything is trained
        with working_in(given.output) as place:
            place.begin(shared=True)
            sessions: dict[tuple[str, ...], Session] = {}
            store = Store(given.output / STORE_FOLDER, None, place.interruption)
            for cell in cells(given):
                row = measure_cell(sessions, cell, given, place, store)
                sys.stderr.write(table([row]).splitlines()[-1] + "\n")
                rows = together(on_file(given) or rows, row)  # another command may have added to it
                if given.json:
                    given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                if given.figure:
                    given.figure.write_text(figure(rows), encoding="utf-8")
    except GraspError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
