"""`joint` with as many English rows as target rows, beside the proportion that it had, at one length. Plan: `lab/log.md`.

    python lab/joint.py SETTING FOLDER    # tydiqa-sw or nusax-su; goes on where it was stopped, writes joint-SETTING.json
    python lab/joint.py looks             # at which dev evaluation the recorded trainings of the whole mix were best

The first needs GRASP_LORA_DATA.
"""

import gzip
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from grasp_lora.engine.check import check
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import JOINT_EVALUATIONS, Steps
from grasp_lora.engine.store import Store
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.claims import working_in
from grasp_lora.storage.writing import write_json

SEEDS = (42, 1337, 2024)


def looks() -> str:
    """Count the dev evaluation (1 is after a quarter of the rows) at which each recorded training had its lowest loss."""
    best: dict[str, int] = {}
    for file in sorted(Path(__file__).parent.glob("results/compare-*/records.jsonl.gz")):
        for line in gzip.decompress(file.read_bytes()).splitlines():
            record = json.loads(line)
            if record["step"] == "joint":
                losses = [row["dev_loss"] for row in record["result"]["history"] if "dev_loss" in row]
                best[record["key"]] = losses.index(min(losses))
    return f"{len(best)} trainings, by the look that was best: {dict(sorted(Counter(best.values()).items()))}\n"


def main(setting: str, folder: Path) -> None:
    """Train both mixes with each seed."""
    folder.mkdir(parents=True, exist_ok=True)
    loaded = Session(load_recipe(setting)[0], Path.cwd())
    check(loaded)
    splits, rows = loaded.splits, []
    own = round(loaded.recipe.target.training.epochs)  # times that the target adapter sees a row
    length = 2 * own * len(splits.train)
    target = round(length * own * len(splits.train) / (len(splits.source_train) + own * len(splits.train)))
    mixes = {"half": (length // 2, own), "today": (length - target, max(1, round(target / len(splits.train))))}
    with working_in(folder) as work:
        work.begin(shared=True)
        for seed in SEEDS:
            for name, (english, repeats) in mixes.items():
                recipe = loaded.recipe.model_copy(update={"seed": seed})
                session = loaded.variant(recipe, replace(splits, source_train=splits.source_train[:english]))
                steps = Steps(session, Store(folder / "steps", session.progress, work))
                training = replace(recipe.source.training, epochs=1, evaluate_every=1 / JOINT_EVALUATIONS, patience=99)
                made = steps._train("joint", ("source_train", *["train"] * repeats), ("dev",), training)
                dev_loss = fmean(steps.losses(made, "dev").result.losses)
                row: dict[str, Any] = {
                    "setting": setting,
                    "seed": seed,
                    "mix": name,
                    "english": english,
                    "repeats": repeats,
                }
                row["dev_loss"] = dev_loss
                row["best_step"] = made.made.result.best_step if made.made else None
                rows.append(row)
                sys.stdout.write(f"{row}\n")
                sys.stdout.flush()
                write_json(folder / f"joint-{setting}.json", rows)


if __name__ == "__main__":
    if sys.argv[1:] == ["looks"]:
        sys.stdout.write(looks())
    else:
        main(sys.argv[1], Path(sys.argv[2]))
