"""The average of trainings in three orders of the same rows, beside each of them. The plan is in `lab/log.md`.

    python lab/soup.py draw SETTING DRAW FOLDER    # settings and draws of few_rows.py; FOLDER holds its steps
    python lab/soup.py table FILE [FILE ...]       # means over draws, with 95 % intervals over the draws

Needs GRASP_LORA_DATA.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from few_rows import measured, steps_of
from scipy.stats import t as student

from grasp_lora.engine.results import Adapter
from grasp_lora.engine.run import make
from grasp_lora.engine.steps import Steps
from grasp_lora.method.merging import MergeSettings
from grasp_lora.storage.claims import Workplace, working_in
from grasp_lora.storage.writing import write_json

SEEDS = (1, 2)  # beside the recipe's own


def draw_of(setting: str, draw: int, folder: Path, work: Workplace) -> None:
    """Train the merge and the source adapter further in other orders, average the three of each, and measure all."""
    steps = steps_of(setting, draw, folder, work)
    made = make(steps)
    kinds: dict[str, list[Adapter]] = {"grasp": [made.grasp], "continued": [steps.continued()]}
    for seed in SEEDS:
        recipe = steps.recipe.model_copy(update={"seed": seed})
        other = Steps(steps.session.variant(recipe), steps.store, steps.session)
        kinds["grasp"].append(other.finetune(made.parents.merged, 0.0))
        kinds["continued"].append(other.continued())
    record: dict[str, Any] = {"setting": setting, "draw": draw, "systems": {}}
    for kind, orders in kinds.items():
        for number, adapter in enumerate(orders, 1):
            record["systems"][f"{kind} {number}"] = measured(steps, adapter)
        record["systems"][f"{kind}, soup"] = measured(steps, averaged(steps, orders))
    record["systems"]["both, soup"] = measured(steps, averaged(steps, [*kinds["grasp"], *kinds["continued"]]))
    write_json(folder / f"soup-{setting}-{draw}.json", record)


def averaged(steps: Steps, adapters: Sequence[Adapter]) -> Adapter:
    """The average of the updates themselves, not of their factors."""
    return steps.merge("soup", adapters, [f"order {number}" for number in range(len(adapters))], MergeSettings("exact"))


def table(draws: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Of each kind the soup minus the mean of its three orders, and how far these lie apart."""
    keys = {"test_scores": 1, "test_losses": 3}
    for kind in ("grasp", "continued"):
        gains: dict[str, list[float]] = {key: [] for key in keys}
        for draw in draws:
            cells = []
            for key, digits in keys.items():
                singles = [fmean(draw["systems"][f"{kind} {number}"][key]) for number in (1, 2, 3)]
                soup = fmean(draw["systems"][f"{kind}, soup"][key])
                gains[key].append(soup - fmean(singles))
                cells.append(f"{' '.join(f'{one:.{digits}f}' for one in singles)} -> {soup:.{digits}f}")
            yield f"{draw['setting']} {draw['draw']}, {kind}: {'; '.join(cells)}"
        yield f"  {kind}: soup minus the mean of three orders: {', '.join(over(gains[key], keys[key]) for key in keys)}"
    for _, group in groupby(sorted(draws, key=lambda draw: str(draw["setting"])), key=lambda draw: draw["setting"]):
        for draw in group:
            both = draw["systems"]["both, soup"]
            yield f"{draw['setting']} {draw['draw']}, all six: {fmean(both['test_scores']):.1f}, {fmean(both['test_losses']):.3f}"


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
