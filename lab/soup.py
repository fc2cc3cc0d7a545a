"""The average of trainings in three orders of the same rows, beside each of them. The plan is in `lab/log.md`.

    python lab/soup.py draw SETTING DRAW FOLDER    # settings and draws of few_rows.py; FOLDER holds its steps
    python lab/soup.py table FILE [FILE ...]       # means over draws, with 95 % intervals over the draws

Needs GRASP_LORA_DATA.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from few_rows import measured, steps_of
from scipy.stats import t as student
from torch import Tensor

from grasp_lora.engine.results import Adapter
from grasp_lora.engine.run import make
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import key_of
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.storage.claims import Workplace, working_in
from grasp_lora.storage.writing import write_json

SEEDS = (42, 1, 2)  # the first is the recipe's own
KINDS, LENGTHS = ("grasp", "continued"), ("", ", all epochs")


def draw_of(setting: str, draw: int, folder: Path, work: Workplace) -> None:
    """Train the merge and the source adapter further in three orders, average the three of each, and measure all."""
    steps = steps_of(setting, draw, folder, work)
    made = make(steps)
    record: dict[str, Any] = {"setting": setting, "draw": draw, "systems": {}}
    for length in LENGTHS:
        kinds: dict[str, list[Adapter]] = {kind: [] for kind in KINDS}
        for seed in SEEDS:
            other = in_order(steps, seed, all_epochs=length != LENGTHS[0])
            kinds["grasp"].append(other.finetune(made.parents.merged, 0.0))
            kinds["continued"].append(other.continued())
        for kind, orders in kinds.items():
            if length == LENGTHS[0]:
                for number, adapter in enumerate(orders, 1):
                    record["systems"][f"{kind} {number}"] = measured(steps, adapter)
            record["systems"][f"{kind}{length}, average"] = measured(steps, average_of(orders))
            write_json(folder / f"soup-{setting}-{draw}.json", record)


def in_order(steps: Steps, seed: int, *, all_epochs: bool) -> Steps:
    """The same steps with another order of rows, and on request without a dev set to stop by: the last step is kept then."""
    recipe, splits = steps.recipe.model_copy(update={"seed": seed}), steps.splits
    if all_epochs:
        training = replace(recipe.final.training, patience=None)
        recipe = recipe.model_copy(update={"final": replace(recipe.final, training=training)})
        splits = replace(splits, dev=())
    return Steps(steps.session.variant(recipe, splits), steps.store, steps.session)


def average_of(adapters: Sequence[Adapter]) -> Adapter:
    """The average of their factors, which came from the same start: its rank is theirs."""

    def load() -> AdapterWeights:
        weights = [adapter.weights for adapter in adapters]
        means = {
            name: (mean_of(of[name].A for of in weights), mean_of(of[name].B for of in weights)) for name in weights[0]
        }
        return AdapterWeights({name: replace(weights[0][name], A=A, B=B) for name, (A, B) in means.items()})

    return Adapter(key_of("average", {"parents": [adapter.key for adapter in adapters]}), load)


def mean_of(factors: Iterable[Tensor]) -> Tensor:
    return torch.stack([factor.float() for factor in factors]).mean(0)


def table(draws: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Of each kind three orders, stopped early -> the average of each length; then what that gains on the mean of the three."""
    keys = {"test_scores": 1, "test_losses": 3}
    gains: dict[tuple[str, str], list[float]] = defaultdict(list)
    for draw, kind in product(draws, KINDS):
        cells = []
        for key, digits in keys.items():
            singles = [fmean(draw["systems"][f"{kind} {number}"][key]) for number in (1, 2, 3)]
            averages = []
            for length in LENGTHS:
                if system := draw["systems"].get(f"{kind}{length}, average"):
                    averages.append(fmean(system[key]))
                    for of in (kind, "both"):
                        gains[f"{of}{length}", key].append(averages[-1] - fmean(singles))
            cells.append(" -> ".join(" ".join(f"{one:.{digits}f}" for one in of) for of in (singles, averages)))
        yield f"{draw['setting']} {draw['draw']}, {kind}: {'; '.join(cells)}"
    for kind in (f"{of}{length}" for length in LENGTHS for of in (*KINDS, "both")):
        told = ", ".join(over(gains[kind, key], keys[key]) for key in keys if gains[kind, key])
        yield f"  {kind}: the average minus the mean of three orders, stopped early: {told}"


def over(gains: Sequence[float], digits: int) -> str:
    half = student.ppf(0.975, len(gains) - 1) * stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    return f"{fmean(gains):+.{digits}f} ± {half:.{digits}f}"


def main(job: str, *words: str) -> None:
    if job == "table":
        sys.stdout.write("\n".join(table([json.loads(Path(file).read_bytes()) for file in words])) + "\n")
        return
    setting, draw, place = words
    folder = Path(place)
    with working_in(folder) as work:
        work.begin(shared=True)
        draw_of(setting, int(draw), folder, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
