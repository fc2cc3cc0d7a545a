"""By what should the prune ratio be chosen where answers are labels? The final runs of a finished grid, by dev and by test.

    python lab/label_choice.py RECIPE --output FOLDER --seeds 1,2 [--ratios 0.7,0.8] [--set KEY=VALUE]...

FOLDER is that of a comparison with the method `grid`, its adapters still in `store/`. Each of its final runs is asked how likely
each label is after each dev and test prompt. A row a seed and ratio:

| column | what it holds |
|---|---|
| dev loss | of the whole answer, by which the grid and a run choose |
| dev accuracy | in percent |
| calibrated | the dev loss over the labels alone, at the one temperature that makes it lowest |
| Brier | the squared distance of the labels' probabilities from the truth, mean over dev |
| test accuracy | in percent; it chooses nothing |
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from controllers import table

from grasp_lora.bench.session import Session
from grasp_lora.errors import DataError, GraspError
from grasp_lora.models.adapters import attached
from grasp_lora.models.answers import label_scores
from grasp_lora.models.reading import read_adapter
from grasp_lora.recipes.load import load_recipe

TEMPERATURES = np.exp(np.linspace(-1.0, 4.0, 101))


def log_probabilities(scores: np.ndarray) -> np.ndarray:
    """Of each label, from its score; both [rows, labels]."""
    return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)


def accuracy(scores: np.ndarray, gold: np.ndarray) -> float:
    """Percent of rows whose likeliest label is the right one."""
    return float(100 * (scores.argmax(axis=1) == gold).mean())


def calibrated(scores: np.ndarray, gold: np.ndarray) -> float:
    """The mean loss over the labels at the temperature that makes it lowest, in nats."""
    rows = np.arange(len(gold))
    return min(float(-log_probabilities(scores / one)[rows, gold].mean()) for one in TEMPERATURES)


def brier(scores: np.ndarray, gold: np.ndarray) -> float:
    """The mean squared distance of the labels' probabilities from the truth, in [0, 2] (Brier 1950)."""
    truth = np.eye(scores.shape[1])[gold]
    return float(((np.exp(log_probabilities(scores)) - truth) ** 2).sum(axis=1).mean())


def final_runs(folder: Path, seeds: Sequence[int], ratios: Sequence[float]) -> list[tuple[int, float, str, float]]:
    """Seed, ratio, key and dev loss of the pruned final runs on record.

    Raises:
        DataError: there is none.
    """
    found = []
    for file in sorted((folder / "store" / "records").glob("final-*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        seed, ratio = record["settings"]["seed"], record["settings"]["prune_ratio"]
        if seed in seeds and ratio and (not ratios or ratio in ratios):
            found.append((seed, ratio, record["key"], record["result"]["dev_loss"]))
    if not found:
        raise DataError(f"{folder} has no such final runs on record; compare with --methods grid first")
    return sorted(found)


def measure(session: Session, folder: Path, key: str, dev_loss: float) -> list[str]:
    """The cells of one final run."""
    labels, splits = session.splits.labels, session.splits
    names = {label.strip(): number for number, label in enumerate(labels)}
    adapter = read_adapter(folder / "store" / "adapters" / key)
    parts = []
    with attached(session.backbone.model, adapter.weights) as model:
        for examples in (splits.dev, splits.test):
            prompts = [one.prompt_ids for one in examples]
            scores = label_scores(model, prompts, list(labels.values()))
            parts.append((np.array(scores), np.array([names[one.references[0].strip()] for one in examples])))
    (dev, gold), (test, truth) = parts
    return [
        f"{dev_loss:.3f}",
        f"{accuracy(dev, gold):.0f}",
        f"{calibrated(dev, gold):.3f}",
        f"{brier(dev, gold):.3f}",
        f"{accuracy(test, truth):.1f}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the table to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--output", type=Path, required=True, help="folder of the comparison")
    parser.add_argument("--seeds", required=True)
    parser.add_argument("--ratios", default="", help="all that are on record where none is given")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    try:
        session = Session(*load_recipe(options.recipe, options.overrides))
        if not session.splits.labels:
            raise DataError(f"{options.recipe} has no labels to choose from; give a recipe of task classification")
        seeds = [int(seed) for seed in options.seeds.split(",")]
        ratios = [float(ratio) for ratio in options.ratios.split(",") if ratio]
        runs = final_runs(options.output, seeds, ratios)
        rows = [
            [str(seed), f"{ratio:.2f}", *measure(session, options.output, key, dev)] for seed, ratio, key, dev in runs
        ]
    except GraspError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    heads = ["seed", "ratio", "dev loss", "dev accuracy", "calibrated", "Brier", "test accuracy"]
    sys.stdout.write(table(heads, rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
