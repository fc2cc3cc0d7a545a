"""Averages of trainings: of three orders of the same rows, and of `continued` with `joint`. The plans are in `lab/log.md`.

    python lab/soup.py draw SETTING DRAW FOLDER    # settings and draws of few_rows.py; FOLDER holds its steps
    python lab/soup.py patient SETTING DRAW FOLDER # what the first look at the dev rows ended, once more for all epochs
    python lab/soup.py table FILE [FILE ...]       # soup-*.json and patient-*.json: means over draws, with 95 % intervals
    python lab/soup.py joint SETTING DRAW FOLDER   # `joint`, its average with `continued`, and a third of the learning rate
    python lab/soup.py plain SETTING DRAW FOLDER   # `continued` for all epochs
    python lab/soup.py second SETTING DRAW FOLDER  # `continued` and the merge, where a training ends by a second look alone
    python lab/soup.py looks FILE [FILE ...]       # second-*.json beside the records of their draws: as `few_rows.py table`
    python lab/soup.py beside FILE [FILE ...]      # joint-*.json: their differences from what a run does

Needs GRASP_LORA_DATA.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from choices import chosen
from few_rows import PLAIN, interval, measured, steps_of
from few_rows import table as table_of_draws
from torch import Tensor

from grasp_lora.engine.results import Adapter
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import key_of
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.method.merging import MergeSettings
from grasp_lora.storage.claims import Workplace, working_in
from grasp_lora.storage.writing import write_json

SEEDS = (42, 1, 2)  # the first is the recipe's own
KINDS, ALL = ("grasp", "continued"), "all epochs"
LENGTHS = ("", f", {ALL}")
WAYS = ("average", f"{ALL} 1", f"{ALL}, average")
LOWER_RATE = 3e-5  # a third of the usual one
PAIRS = (
    ("joint", "continued"),
    ("average", "continued"),
    ("continued, slower", "continued"),
    ("grasp, slower", "grasp"),
)
KEYS = {"test_scores": 1, "test_losses": 3}  # and their decimals


def draw_of(setting: str, draw: int, folder: Path, work: Workplace) -> None:
    """Train the merge and the source adapter further in three orders, average the three of each, and measure all."""
    steps = steps_of(setting, draw, folder, work)
    record: dict[str, Any] = {"setting": setting, "draw": draw, "systems": {}}
    for length in LENGTHS:
        kinds: dict[str, list[Adapter]] = {kind: [] for kind in KINDS}
        for seed in SEEDS:
            other = in_order(steps, seed, patience=1 if length == LENGTHS[0] else None)
            kinds["grasp"].append(other.finetune(steps.parents().merged, 0.0))
            kinds["continued"].append(other.continued())
        for kind, orders in kinds.items():
            for number, adapter in enumerate(orders if length == LENGTHS[0] else orders[:1], 1):
                record["systems"][f"{kind}{length} {number}"] = measured(steps, adapter)
            record["systems"][f"{kind}{length}, average"] = measured(steps, average_of(orders))
            write_json(folder / f"soup-{setting}-{draw}.json", record)


def patient(setting: str, draw: int, folder: Path, work: Workplace) -> None:
    """Train once more, for all epochs, what the first look at the dev rows ended; the adapter of the lowest dev loss is kept."""
    steps = steps_of(setting, draw, folder, work)
    record: dict[str, Any] = {"setting": setting, "draw": draw, "systems": {}}
    for seed, kind in product(SEEDS, KINDS):
        start = steps.parents().merged if kind == "grasp" else steps.source()
        stopped = in_order(steps, seed).finetune(start, 0.0)
        if stopped.made is None or stopped.made.result.best_step:
            continue
        record["systems"][f"{kind} {seed}"] = measured(steps, stopped)
        went_on = in_order(steps, seed, patience=99).finetune(start, 0.0)
        record["systems"][f"{kind} {seed}, patient"] = measured(steps, went_on)
        write_json(folder / f"patient-{setting}-{draw}.json", record)


def joint(setting: str, draw: int, folder: Path, work: Workplace) -> None:
    """Train `continued` and the merge with the patience of `init`, at its rate and at a third; `joint`, and its average with
    `continued`."""
    steps = steps_of(setting, draw, folder, work)
    steps = in_order(steps, steps.recipe.seed, patience=2)
    slower = in_order(steps, steps.recipe.seed, patience=2, rate=LOWER_RATE)
    merged, record = steps.parents().merged, {"setting": setting, "draw": draw, "systems": {}}
    systems = {"continued": steps.continued(), "joint": steps.joint(), "grasp": steps.finetune(merged, 0.0)}
    both = [systems["continued"], systems["joint"]]
    systems["average"] = steps.merge("average", both, ("continued", "joint"), MergeSettings("exact"))
    systems |= {"continued, slower": slower.continued(), "grasp, slower": slower.finetune(merged, 0.0)}
    for name, adapter in systems.items():
        record["systems"][name] = measured(steps, adapter)
    write_json(folder / f"joint-{setting}-{draw}.json", record)


def plain(setting: str, draw: int, folder: Path, work: Workplace) -> None:
    """`continued` for all epochs, as it is done without dev rows; the last step is kept."""
    steps = steps_of(setting, draw, folder, work)
    steps = in_order(steps, steps.recipe.seed, patience=None)
    systems = {"continued, all epochs": measured(steps, steps.continued())}
    write_json(folder / f"plain-{setting}-{draw}.json", {"setting": setting, "draw": draw, "systems": systems})


def second(setting: str, draw: int, folder: Path, work: Workplace) -> None:
    """`continued` and the merge, trained further, with the patience that `init` writes for few rows."""
    steps = steps_of(setting, draw, folder, work)
    steps = in_order(steps, steps.recipe.seed, patience=2)
    systems = {"continued": steps.continued(), "grasp": steps.finetune(steps.parents().merged, 0.0)}
    record = {name: measured(steps, adapter) for name, adapter in systems.items()}
    write_json(folder / f"second-{setting}-{draw}.json", {"setting": setting, "draw": draw, "systems": record})


def beside(draws: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What differs from `continued`, and from the usual rate: each draw, then the mean with half of its 95 % interval."""
    for ours, theirs in PAIRS:
        told = []
        for key, digits in KEYS.items():
            gaps = [fmean(draw["systems"][ours][key]) - fmean(draw["systems"][theirs][key]) for draw in draws]
            told.append(f"{' '.join(f'{gap:+.{digits}f}' for gap in gaps)}: {interval(gaps, digits)}")
        yield f"{ours} minus {theirs}: {'; '.join(told)}"


def looks(files: Sequence[Path]) -> Iterator[str]:
    """What is handed over as the draws were made, nothing pruned, and with the two trainings of `second` in their place."""
    before, after = [], []
    for file in files:
        draw = read(file.with_name(file.name.removeprefix("second-")))
        systems = draw["systems"]
        systems["grasp"] = systems.pop(PLAIN, systems["grasp"])
        before.append(draw)
        after.append(draw | {"systems": systems | read(file)["systems"]})
    for title, draws in (("as they were", before), ("with a second look", after)):
        yield f"{title}:"
        yield from table_of_draws(draws)


def in_order(steps: Steps, seed: int, *, patience: int | None = 1, rate: float | None = None) -> Steps:
    """The same steps with another order of rows; without patience all epochs are trained, and the last step is kept."""
    recipe = steps.recipe.model_copy(update={"seed": seed})
    usual = recipe.final.training
    training = replace(usual, patience=patience, learning_rate=rate or usual.learning_rate)
    recipe = recipe.model_copy(update={"final": replace(recipe.final, training=training)})
    return Steps(steps.session.variant(recipe), steps.store, steps.session, stop_requested=steps._stop_requested)


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
    """Of each kind three orders, stopped early -> their average; one order of all epochs -> the average of three."""
    for draw, kind in product(draws, KINDS):
        systems, cells = draw["systems"], []
        for key, digits in KEYS.items():
            ways = [way for way in WAYS if f"{kind}, {way}" in systems]
            parts = ([f"{kind} {number}" for number in (1, 2, 3)], [f"{kind}, {way}" for way in ways])
            texts = [" ".join(f"{fmean(systems[name][key]):.{digits}f}" for name in names) for names in parts]
            cells.append(" -> ".join(texts))
        yield f"{draw['setting']} {draw['draw']}, {kind}: {'; '.join(cells)}"
    steps = [draw["systems"][f"{kind} {number}"] for draw, kind in product(draws, KINDS) for number in (1, 2, 3)]
    yield f"  ended by the first look: {sum(step['best_step'] == 0 for step in steps)} of {len(steps)} trainings"


def gains(draws: Sequence[dict[str, Any]], title: str) -> Iterator[str]:
    """What each way gains on the mean of the three orders, after +- half of the 95 % interval over the trainings."""
    for way, of in product(WAYS, (*KINDS, "both")):
        told = []
        for key, digits in KEYS.items():
            found = []
            for draw, kind in product(draws, KINDS if of == "both" else (of,)):
                systems = draw["systems"]
                if f"{kind}, {way}" in systems:
                    singles = fmean(fmean(systems[f"{kind} {number}"][key]) for number in (1, 2, 3))
                    found.append(fmean(systems[f"{kind}, {way}"][key]) - singles)
            told.append(interval(found, digits))
        yield f"  {of}, {way}: minus the mean of three orders, {title}: {', '.join(told)}"


def mended(draw: dict[str, Any], ended: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The draw with the trainings that the first look ended replaced by the same ones that went on."""
    systems = dict(draw["systems"])
    for patient, kind, (number, seed) in product(ended, KINDS, enumerate(SEEDS, 1)):
        if (patient["setting"], patient["draw"]) == (draw["setting"], draw["draw"]):
            systems[f"{kind} {number}"] = patient["systems"].get(f"{kind} {seed}, patient", systems[f"{kind} {number}"])
    return draw | {"systems": systems}


def handed_over(files: Sequence[Path]) -> Iterator[str]:
    """What a run would hand over, mean test score over the draws: by loss and answers as today, and by answers alone."""
    scores: dict[str, list[float]] = defaultdict(list)
    for file in files:
        draw, first = (read(path)["systems"] for path in (file, file.with_name(file.name[5:])))
        if f"continued, {ALL}, average" not in draw:
            continue
        parents = {name: first[name] for name in ("source", "target", "merged") if "dev_losses" in first.get(name, {})}
        ways = {"one order": (" 1", " 2", " 3"), "average": (", average",), f"{ALL}, average": (f", {ALL}, average",)}
        for title, ends in ways.items():
            for rule, by in (("near, then answers", "loss and answers"), ("GRASP, then answers", "answers")):
                found = [score_of(parents | {kind: draw[f"{kind}{end}"] for kind in KINDS}, rule) for end in ends]
                scores[f"{title}, by {by}"].append(fmean(found))
    for title, of in scores.items():
        yield f"  handed over, {title}: {fmean(of):.2f} in {len(of)} draws"


def score_of(systems: dict[str, Any], rule: str) -> float:
    rows = range(len(systems["grasp"]["dev_losses"]))
    pick = chosen(rule, {name: (of["dev_losses"], of["dev_scores"]) for name, of in systems.items()}, rows)
    return fmean(systems[pick]["test_scores"])


def went_on(draws: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What the first look ended, and what all epochs made of it: test score, test loss, step that was kept."""
    for draw in draws:
        for name, patient in draw["systems"].items():
            kind, _, how = name.partition(", ")
            if how == "patient":
                pair = (draw["systems"][kind], patient)
                scores, losses = ([fmean(system[key]) for system in pair] for key in ("test_scores", "test_losses"))
                told = f"score {scores[0]:.1f} -> {scores[1]:.1f}, loss {losses[0]:.3f} -> {losses[1]:.3f}"
                yield f"{draw['setting']} {draw['draw']}, {kind}: {told}, step {patient['best_step']}"


def read(file: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(file.read_bytes())
    return record


def main(job: str, *words: str) -> None:
    if job == "table":
        ended = [file for file in map(Path, words) if file.name.startswith("patient")]
        files = [file for file in map(Path, words) if file not in ended]
        draws, patients = [*map(read, files)], [*map(read, ended)]
        lines = [*table(draws), *gains(draws, "stopped early"), *handed_over(files), *went_on(patients)]
        lines += gains([mended(draw, patients) for draw in draws], "those that the first look ended as they went on")
        sys.stdout.write("\n".join(lines) + "\n")
        return
    if job == "looks":
        sys.stdout.write("\n".join(looks([*map(Path, words)])) + "\n")
        return
    if job == "beside":
        sys.stdout.write("\n".join(beside([*map(read, map(Path, words))])) + "\n")
        return
    setting, draw, place = words
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    with working_in(folder) as work:
        work.begin(shared=True)
        jobs = {"patient": patient, "draw": draw_of, "joint": joint, "plain": plain, "second": second}
        jobs[job](setting, int(draw), folder, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
