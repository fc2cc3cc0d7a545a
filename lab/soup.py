"""The average of trainings in three orders of the same rows, beside each of them. The plan is in `lab/log.md`.

    python lab/soup.py draw SETTING DRAW FOLDER    # settings and draws of few_rows.py; FOLDER holds its steps
    python lab/soup.py table FILE [FILE ...]       # means over draws, with 95 % intervals over the draws

Needs GRASP_LORA_DATA.
"""

import json
import sys
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
from grasp_lora.method.merging import MergeSettings
from grasp_lora.storage.claims import Workplace, working_in
from grasp_lora.storage.writing import write_json

SEEDS = (42, 1, 2)  # the first is the recipe's own
KINDS, LENGTHS = ("grasp", "continued"), ("", ", all epochs")
WAYS, ONE = ("soup", "factors"), "one order"


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
            for number, adapter in enumerate(orders, 1):
                record["systems"][f"{kind}{length} {number}"] = measured(steps, adapter)
            record["systems"][f"{kind}{length}, soup"] = measured(steps, averaged(steps, orders))
            record["systems"][f"{kind}{length}, factors"] = measured(steps, factors_of(orders))
        both = averaged(steps, [*kinds["grasp"], *kinds["continued"]])
        record["systems"][f"both{length}, soup"] = measured(steps, both)
        write_json(folder / f"soup-{setting}-{draw}.json", record)


def in_order(steps: Steps, seed: int, *, all_epochs: bool) -> Steps:
    """The same steps with another order of rows, and on request without a dev set to stop by: the last step is kept then."""
    recipe, splits = steps.recipe.model_copy(update={"seed": seed}), steps.splits
    if all_epochs:
        training = replace(recipe.final.training, patience=None)
        recipe = recipe.model_copy(update={"final": replace(recipe.final, training=training)})
        splits = replace(splits, dev=())
    return Steps(steps.session.variant(recipe, splits), steps.store, steps.session)


def averaged(steps: Steps, adapters: Sequence[Adapter]) -> Adapter:
    """The average of the updates themselves, not of their factors."""
    return steps.merge("soup", adapters, [f"order {number}" for number in range(len(adapters))], MergeSettings("exact"))


def factors_of(adapters: Sequence[Adapter]) -> Adapter:
    """The average of their factors, which came from the same start: its rank is theirs."""

    def load() -> AdapterWeights:
        weights = [adapter.weights for adapter in adapters]
        means = {
            name: (mean_of(of[name].A for of in weights), mean_of(of[name].B for of in weights)) for name in weights[0]
        }
        return AdapterWeights({name: replace(weights[0][name], A=A, B=B) for name, (A, B) in means.items()})

    return Adapter(key_of("factors", {"parents": [adapter.key for adapter in adapters]}), load)


def mean_of(factors: Iterable[Tensor]) -> Tensor:
    return torch.stack([factor.float() for factor in factors]).mean(0)


def table(draws: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Of each kind three orders -> their average, of the updates and of the factors; then what that gains on their mean."""
    keys = {"test_scores": 1, "test_losses": 3}
    for kind in (f"{kind}{length}" for length in LENGTHS for kind in KINDS):
        if any(f"{kind} 1" not in draw["systems"] for draw in draws):
            continue
        gains: dict[tuple[str, str], list[float]] = {(how, key): [] for how in (ONE, *WAYS) for key in keys}
        for draw in draws:
            cells = []
            for key, digits in keys.items():
                singles = [fmean(draw["systems"][f"{kind} {number}"][key]) for number in (1, 2, 3)]
                soups = [fmean(draw["systems"][f"{kind}, {how}"][key]) for how in WAYS]
                today = [fmean(draw["systems"][f"{kind.partition(',')[0]} {number}"][key]) for number in (1, 2, 3)]
                for how, found in zip((ONE, *WAYS), (fmean(singles), *soups), strict=True):
                    gains[how, key].append(found - fmean(today))
                cells.append(" -> ".join(" ".join(f"{one:.{digits}f}" for one in of) for of in (singles, soups)))
            yield f"{draw['setting']} {draw['draw']}, {kind}: {'; '.join(cells)}"
        for how in (ONE, *WAYS):
            told = ", ".join(over(gains[how, key], keys[key]) for key in keys)
            yield f"  {kind}, {how} minus the mean of three orders, stopped early: {told}"
    for draw, length in product(draws, LENGTHS):
        if both := draw["systems"].get(f"both{length}, soup"):
            score, loss = fmean(both["test_scores"]), fmean(both["test_losses"])
            yield f"{draw['setting']} {draw['draw']}, all six{length}: {score:.1f}, {loss:.3f}"


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
