"""What few rows come to: 45 rows a draw, as `init` of 60 splits them, with a test set that tells. The plan is in `lab/log.md`.

    python lab/few_rows.py draw SETTING DRAW FOLDER    # one draw; goes on where it was stopped, writes FOLDER/SETTING-DRAW.json
    python lab/few_rows.py table FILE [FILE ...]       # means over draws, with 95 % intervals over the draws

Draws of a setting share the source adapter and the test rows; their other rows are disjoint. Needs GRASP_LORA_DATA.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from grasp_lora.data.splits import Splits
from grasp_lora.engine.all_rows import train_again
from grasp_lora.engine.check import check
from grasp_lora.engine.results import Adapter, main_metric
from grasp_lora.engine.run import make
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import Store
from grasp_lora.method.merging import MergeSettings
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.claims import Workplace, working_in
from grasp_lora.storage.writing import write_json

ROWS, DEV, DRAWS = 45, 15, 6  # a draw; of it to judge by; draws that the train split has room for
ALL = ", all rows, as many epochs"
COMMON = [  # as `init` writes them for few rows
    "target.on=null", "final.prune_ratio=0", "data.target.dev=2", "data.target.micro_dev=2",
    f"data.target.train={ROWS * DRAWS}", "source.training.epochs=2",
]  # fmt: skip
QUESTIONS = ["data.source=null", "source.adapters=[english-qa]", "data.target.test=150"]
SETTINGS = {
    "sw": ("tydiqa-sw", QUESTIONS),
    "ko": ("tydiqa-ko", QUESTIONS),
    "su": ("nusax-su", ["data.source.train=120", "data.source.dev=12"]),
}


def drawn(splits: Splits, draw: int) -> Splits:
    """The rows of one draw; dev takes the first whole groups."""
    groups = [
        list(rows) for _, rows in groupby(sorted(splits.train, key=lambda row: row.group), key=lambda row: row.group)
    ]
    groups.sort(key=lambda rows: min(splits.train.index(row) for row in rows))
    rows = [row for group in groups for row in group][(draw - 1) * ROWS : draw * ROWS]
    place = DEV
    while rows[place].group == rows[place - 1].group:
        place += 1
    return replace(splits, dev=tuple(rows[:place]), train=tuple(rows[place:]), micro_dev=())


def measured(steps: Steps, adapter: Adapter, *, on_dev: bool) -> dict[str, Any]:
    """Losses and scores of one system, a number a row."""
    found = steps.measure(adapter, on_dev=on_dev)
    metric = main_metric(steps.session.available_metrics)
    record: dict[str, Any] = {
        "test_losses": [round(loss, 4) for loss in found.test.result.losses] if found.test else [],
        "test_scores": [round(float(score), 4) for score in found.metrics[metric].per_example],
    }
    if on_dev and found.dev is not None:
        record["dev_losses"] = [round(loss, 4) for loss in found.dev.result.losses]
        record["dev_scores"] = list(steps.row_scores(adapter, "dev").result.scores)
    if adapter.made is not None:
        record["best_step"] = adapter.made.result.best_step
    return record


def draw_of(setting: str, draw: int, folder: Path, work: Workplace) -> None:
    name, changes = SETTINGS[setting]
    recipe, _ = load_recipe(name, [*COMMON, *changes])
    loaded = Session(recipe, Path.cwd())
    check(loaded)
    session = loaded.variant(splits=drawn(loaded.splits, draw))
    steps = Steps(
        session, Store(folder / "steps", session.progress, work), stop_requested=lambda: work.interruption.asked_by
    )
    made = make(steps)
    systems = dict(made.systems)
    if made.continued is not None:
        systems["continued"] = made.continued
    record: dict[str, Any] = {"setting": setting, "draw": draw, "train": len(session.splits.train)}
    record["delivered"] = made.choose(steps).name
    record["systems"] = {name: measured(steps, adapter, on_dev=True) for name, adapter in systems.items()}
    again: dict[str, Adapter] = {}
    for name in ("continued", "grasp"):
        told, adapter, after = train_again(steps, made.parents, name, systems[name], 0.0)
        if adapter is None:
            record[f"{name}{ALL}"] = told.why
            continue
        again[name] = adapter
        record["systems"][f"{name}{ALL}"] = measured(after, adapter, on_dev=False)
    if len(again) == 2:
        soup = steps.merge("soup", list(again.values()), list(again), MergeSettings("exact"))
        record["systems"][f"soup{ALL}"] = measured(steps, soup, on_dev=False)
    write_json(folder / f"{setting}-{draw}.json", record)


def table(draws: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Each system of each setting, and what all rows change; after +- half of the 95 % interval over the draws."""
    for setting, group in groupby(
        sorted(draws, key=lambda draw: str(draw["setting"])), key=lambda draw: draw["setting"]
    ):
        of_setting = list(group)
        found = [draw["systems"] for draw in of_setting]
        names = [name for name in found[0] if all(name in each for each in found)]
        yield f"{setting}, {len(found)} draws: score (minus continued), test loss (minus continued)"
        for name in names:
            score, loss = ([fmean(each[name][key]) for each in found] for key in ("test_scores", "test_losses"))
            beside = [over(found, name, "continued", key) for key in ("test_scores", "test_losses")]
            yield f"  {name:22} {fmean(score):5.1f} ({beside[0]})   {fmean(loss):.3f} ({beside[1]})"
        for name in names:
            first, _, all_rows = name.partition(", ")
            if all_rows and first in names:
                gains = [over(found, name, first, key) for key in ("test_scores", "test_losses")]
                yield f"  {name} minus {first}: score {gains[0]}, loss {gains[1]}"
        handed = [
            {"before": draw["systems"][draw["delivered"]], "after": draw["systems"][f"{draw['delivered']}{ALL}"]}
            for draw in of_setting
            if f"{draw['delivered']}{ALL}" in draw["systems"]
        ]
        if handed:
            gains = [over(handed, "after", "before", key) for key in ("test_scores", "test_losses")]
            yield f"  what was handed over{ALL}, minus before, {len(handed)} draws: score {gains[0]}, loss {gains[1]}"


def over(found: Sequence[dict[str, Any]], ours: str, theirs: str, key: str) -> str:
    gaps = [fmean(each[ours][key]) - fmean(each[theirs][key]) for each in found]
    half = student.ppf(0.975, len(gaps) - 1) * stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
    digits = 3 if key == "test_losses" else 1
    return f"{fmean(gaps):+.{digits}f} ± {half:.{digits}f}"


def main(job: str, *words: str) -> None:
    if job == "table":
        sys.stdout.write("\n".join(table([json.loads(Path(file).read_bytes()) for file in words])) + "\n")
        return
    setting, draw, place = words
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    with working_in(folder) as work:
        work.begin(shared=True)
        draw_of(setting, int(draw), folder, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
