"""When does it pay? Sixteen of sixty rows: to stop by, to learn a ratio on, or to train on like the others.

    python lab/pays.py draw SETTING DRAW FOLDER    # one draw: FOLDER/SETTING-DRAW.json; it goes on where it was stopped
    python lab/pays.py table FILE [FILE ...]       # every system by cell, and the planned differences

The plan is in `lab/log.md`: what the arms are, and what decides. Needs GRASP_LORA_DATA.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from few_rows import articles_of

from grasp_lora.data.encode import Example
from grasp_lora.engine.check import check
from grasp_lora.engine.results import Adapter, main_metric
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import Store
from grasp_lora.evaluation.statistics import compare_with_baselines
from grasp_lora.method.lora import LoraPair
from grasp_lora.method.masks import MaskSettings, Score
from grasp_lora.method.merging import MergeSettings
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.claims import Workplace, working_in
from grasp_lora.storage.writing import write_json

SIXTEEN, FIFTY, TRAIN, TEST = 16, 50, 44, 400
COMMON = [
    "backbone.dtype=bfloat16", "lora.target_modules=all-linear", "data.target.dev=0", f"data.target.train={TRAIN}",
    f"data.target.micro_dev={SIXTEEN + FIFTY}", f"data.target.test={TEST}",
]  # fmt: skip
QUESTIONS = ["source.adapters=[english-qa]", "data.source=null", "data.max_tokens=256"]
SETTINGS = {
    "swahili": ("tydiqa-sw", QUESTIONS),
    "sundanese": ("nusax-su", []),
}
# What `init` writes, and what somebody takes who tuned nothing.
CELLS = {"own": (2, 3e-5), "wrong": (10, 3e-4)}
STAGES = ("target", "controller", "final")
FIXED = {"own": (0.5, 0.8, 0.95), "wrong": (0.8,)}
# The arms whose names the table has, in its order; the planned differences of each cell.
ARMS = (
    "source", "continued", "continued, stopped by 16", "continued, stopped by 50", "merge", "merge, stopped by 16",
    "merge, stopped by 50", "0.50", "0.80", "0.95", "0.80 at random", "grasp", "grasp, then all rows", "mean with continued",
)  # fmt: skip
PLANNED = (
    ("grasp", "continued"), ("grasp", "continued, stopped by 16"), ("grasp", "merge"), ("grasp", "merge, stopped by 16"),
    ("grasp", "0.80"), ("0.80", "merge"), ("0.80", "0.80 at random"), ("grasp, then all rows", "grasp"),
    ("mean with continued", "continued"),
)  # fmt: skip


def _at_random(pair: LoraPair, norms: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores that say nothing; the same for the same factors."""
    generator = torch.Generator().manual_seed(int(1e6 * pair.A.double().abs().sum()))
    first, second = (torch.rand(factor.shape, generator=generator) for factor in (pair.A, pair.B))
    return first, second


AT_RANDOM = Score(_at_random)


def recipe_of(setting: str, cell: str, draw: int, *more: str) -> Any:
    name, changes = SETTINGS[setting]
    epochs, rate = CELLS[cell]
    trainings = [
        f"{stage}.training.{key}={value}"
        for stage in STAGES
        for key, value in {"epochs": epochs, "learning_rate": rate}.items()
    ]
    return load_recipe(name, [*COMMON, *changes, *trainings, f"seed={draw}", *more])[0]


class Draw:
    """The rows of one draw, and the steps on them: by a recipe without a dev set, or with one."""

    def __init__(self, setting: str, draw: int, folder: Path, work: Workplace) -> None:
        self.setting, self.draw = setting, draw
        self.session = Session(recipe_of(setting, "own", draw), Path.cwd())
        check(self.session)
        self.store = Store(folder / "steps", self.session.progress, work)
        self.work = work
        # One source adapter for all draws, of the first.
        self.shared = self.session.variant(recipe_of(setting, "own", 1))

    def steps(self, cell: str, train: Sequence[Example], dev: Sequence[Example] = (), *more: str) -> Steps:
        rows = self.session.splits
        splits = replace(rows, train=tuple(train), dev=tuple(dev), micro_dev=rows.micro_dev[:SIXTEEN])
        recipe = recipe_of(self.setting, cell, self.draw, *([f"data.target.dev={len(dev)}"] if dev else []), *more)
        return Steps(
            self.session.variant(recipe, splits),
            self.store,
            self.shared,
            stop_requested=lambda: self.work.interruption.asked_by,
        )

    def systems(self, cell: str) -> Iterator[tuple[str, Steps, Adapter, dict[str, Any]]]:
        """Each arm: its name, the steps that measure it, its adapter and what it learned."""
        rows = self.session.splits
        few, sixteen, fifty = rows.train, rows.micro_dev[:SIXTEEN], rows.micro_dev[SIXTEEN:]
        every = self.steps(cell, [*few, *sixteen])
        yield "source", every, every.source(), {}
        ways = {"": every, ", stopped by 16": self.steps(cell, few, sixteen),
                ", stopped by 50": self.steps(cell, [*few, *sixteen], fifty)}  # fmt: skip
        for how, steps in ways.items():
            yield f"continued{how}", steps, steps.continued(), {}
            yield f"merge{how}", steps, steps.finetune(steps.parents().merged, 0.0), {}
        merged = every.parents().merged
        for ratio in FIXED[cell]:
            yield f"{ratio:.2f}", every, every.finetune(merged, ratio), {}
        at_random = every.with_recipe(replace(every.recipe, mask=MaskSettings(score="pays:AT_RANDOM")))
        yield "0.80 at random", at_random, at_random.finetune(merged, 0.8), {}
        probing = self.steps(cell, few)
        start = probing.parents().merged
        learned = probing.learn_ratio(start).result
        found = {"ratio": learned.estimate.ratio, "interval": [learned.estimate.low, learned.estimate.high]}
        grasp = probing.finetune(start, learned.estimate.ratio)
        yield "grasp", probing, grasp, found
        yield "grasp, then all rows", every, every.finetune(merged, learned.estimate.ratio), {}
        halves = MergeSettings("exact", (0.5, 0.5))
        yield (
            "mean with continued",
            every,
            every.merge("mean", [grasp, every.continued()], ["grasp", "continued"], halves),
            {},
        )


def draw_of(setting: str, number: int, folder: Path, work: Workplace) -> None:
    """Make and measure every system of a draw; a system that is measured twice is read from the store."""
    draw = Draw(setting, number, folder, work)
    record: dict[str, Any] = {
        "setting": setting, "draw": number, "articles": articles_of(draw.session.splits.test), "cells": {},
    }  # fmt: skip
    for cell in CELLS:
        cells = record["cells"][cell] = {}
        for name, steps, adapter, learned in draw.systems(cell):
            made = adapter.made.result if adapter.made else None
            ran = {} if made is None else {"steps": made.steps, "best_step": made.best_step}
            cells[name] = {**learned, **ran, **measured(steps, adapter)}
            write_json(folder / f"{setting}-{number}.json", record)


def measured(steps: Steps, adapter: Adapter) -> dict[str, list[float]]:
    """Scores and losses of the test rows."""
    found = steps.measure(adapter, on_dev=False)
    assert found.test is not None
    scores = found.metrics[main_metric(list(steps.session.metrics))].per_example
    return {
        "scores": [round(float(score), 4) for score in scores],
        "losses": [round(loss, 4) for loss in found.test.result.losses],
    }


def table(draws: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of each setting and cell: the mean of every arm; then the planned differences by setting and over all."""
    settings = list(dict.fromkeys(draw["setting"] for draw in draws))
    for cell, (epochs, rate) in CELLS.items():
        for setting in settings:
            of_setting = [draw for draw in draws if draw["setting"] == setting]
            yield f"\n{setting}, {epochs} epochs at {rate:g}, {len(of_setting)} draws\n"
            yield "| arm | score | loss | p(right answer) | rows with a lower loss than continued |"
            yield "|---|---:|---:|---:|---:|"
            for arm in (arm for arm in ARMS if arm in of_setting[0]["cells"][cell]):
                scores, losses, base = (
                    [value for draw in of_setting for value in draw["cells"][cell][which][what]]
                    for which, what in ((arm, "scores"), (arm, "losses"), ("continued", "losses"))
                )
                right = 100 * fmean(math.exp(-loss) for loss in losses)
                lower = 100 * fmean(ours < theirs for ours, theirs in zip(losses, base, strict=True))
                yield f"| {arm} | {fmean(scores):.1f} | {fmean(losses):.3f} | {right:.1f} % | {lower:.0f} % |"
            ratios = [draw["cells"][cell]["grasp"] for draw in of_setting]
            yield "\nlearned: " + ", ".join(
                f"{one['ratio']:.2f} ({' to '.join(f'{bound:.2f}' for bound in one['interval'])})" for one in ratios
            )
        yield f"\n| {cell}: minus | " + " | ".join(settings) + " |"
        yield "|---|" + "---|" * len(settings)
        for ours, theirs in PLANNED:
            cells = [difference([d for d in draws if d["setting"] == each], cell, ours, theirs) for each in settings]
            yield f"| {ours}, {theirs} | {' | '.join(cells)} |"


def difference(draws: Sequence[Mapping[str, Any]], cell: str, ours: str, theirs: str) -> str:
    """The mean difference of scores, its interval over rows (drawn by article) and draws, and that of each draw.

    The draws have other test rows, so the rows of a draw are a group of their own and their spread is in the interval where
    there are draws enough to show it.
    """
    each = [
        [a - b for a, b in zip(*(draw["cells"][cell][side]["scores"] for side in (ours, theirs)), strict=True)]
        for draw in draws
    ]
    groups = [f"{draw['draw']} {article}" for draw in draws for article in draw["articles"]]
    values = [value for one in each for value in one]
    found = compare_with_baselines(values, {"": [0.0] * len(values)}, groups=groups)[""]
    by_draw = " ".join(f"{fmean(one):+.1f}" for one in each)
    return f"{found.difference:+.1f} ({found.low:+.1f} to {found.high:+.1f}): {by_draw}"


def main(job: str, *words: str) -> None:
    if job == "table":
        sys.stdout.write("\n".join(table([json.loads(Path(file).read_bytes()) for file in words])) + "\n")
        return
    assert job == "draw", job
    setting, draw, place = words
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    with working_in(folder) as work:
        work.begin(shared=True)
        draw_of(setting, int(draw), folder, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
