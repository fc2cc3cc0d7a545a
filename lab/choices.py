"""What rules would have handed over in finished comparisons, minus the source adapter continued.

    GRASP_LORA_DATA=FOLDER python lab/choices.py        # the settings of the results page, then ten draws of 60 rows

The records of `lab/results` have dev losses and scores of each system; nothing is trained. Each interval is by itself. Where the
split of a comparison is another one today, its interval takes each test row by itself and is too narrow.
"""

import gzip
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from grasp_lora.data.splits import group_numbers
from grasp_lora.engine.deliver import NEAR
from grasp_lora.engine.session import Session
from grasp_lora.evaluation.statistics import compare_with_baselines
from grasp_lora.recipes.load import load_recipe

RESULTS = Path(__file__).parent / "results"
SYSTEMS = ("continued", "merged", "grasp")
# Comparison: the recipe that groups its test rows; None where each is a group, or where its split is another one today.
SETTINGS = {
    "tydiqa-sw-on-source": None,
    "tydiqa-ko-auto": None,
    "nusax-jv-on-source": None,
    "mlqa-xquad-ar": "mlqa-xquad-ar",
    "mlqa-xquad-zh": "mlqa-xquad-zh",
    "xlsum-ar-auto": None,
    "xlsum-zh-auto": None,
}
T_OF_TEN = 2.26  # Student's at 95 % with ten draws
RULES = {"GRASP's result unless another is 5 % lower": NEAR, "the lowest dev loss": 0.0, "always GRASP's result": 1.0}
DRAWS = ("draws-tydiqa-sw", "draws-tydiqa-sw-apart", "draws-tydiqa-sw-auto")


class Records:
    """Finished steps of comparisons, by the adapter that they measured."""

    def __init__(self) -> None:
        self.dev: dict[str, float] = {}
        self.scores: dict[str, Mapping[str, Any]] = {}
        self._by_test_loss: dict[float, set[str]] = {}  # a target adapter on a source has the loss of their sum
        for file in RESULTS.glob("compare-*/records.jsonl.gz"):
            for row in read_lines(file):
                settings, result = row["settings"], row["result"]
                if row["step"] == "dev losses":
                    self.dev[settings["adapter"]] = fmean(result["losses"])
                elif row["step"].startswith(("final", "target")) and result["dev_loss"] is not None:
                    self.dev.setdefault(row["key"], result["dev_loss"])
                elif row["step"] == "test losses":
                    self._by_test_loss.setdefault(fmean(result["losses"]), set()).add(settings["adapter"])
                elif row["step"] == "scores":
                    self.scores[settings["adapter"]] = result

    def of(self, test_loss: float) -> tuple[float, Mapping[str, Any]]:
        """The dev loss and the scores of what has this test loss."""
        keys = next(keys for loss, keys in self._by_test_loss.items() if abs(loss - test_loss) < 1e-12)
        return next(self.dev[key] for key in keys if key in self.dev), next(
            self.scores[key] for key in keys if key in self.scores
        )


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def taken(losses: Mapping[str, float], margin: float) -> str:
    """The system of the lowest loss where that is further below GRASP's than the margin, else GRASP's result."""
    lowest = min(losses, key=losses.__getitem__)
    return "grasp" if losses[lowest] >= (1 - margin) * losses["grasp"] else lowest


def settings_of_results(records: Records, margin: float) -> Iterator[str]:
    for name, recipe in SETTINGS.items():
        comparison = json.loads((RESULTS / f"compare-{name}/compare.json").read_text())
        rows = {row["method"]: row["scores"] for row in comparison["rows"]}
        metric = next(metric for metric in ("f1", "accuracy", "rougeL") if metric in comparison["metrics"])
        chosen, ours, theirs = [], [], []
        for number in range(len(comparison["seeds"])):
            systems = {
                system: records.of(rows[system]["test_loss"]["values"][number]) for system in SYSTEMS if system in rows
            }
            chosen.append(taken({system: loss for system, (loss, _) in systems.items()}, margin))
            ours.append(per_row(systems[chosen[-1]][1], metric))
            theirs.append(per_row(systems["continued"][1], metric))
        groups = None if recipe is None else group_numbers(Session(load_recipe(recipe)[0], Path.cwd()).splits.test)
        lead = compare_with_baselines(ours, {"continued": theirs}, groups=groups)["continued"]
        gain = f"{lead.difference:+.1f} ({lead.low:+.1f} to {lead.high:+.1f})"
        yield f"| {name} | {lead.examples} | {fmean(map(fmean, ours)):.1f} {metric} | {gain} | {', '.join(chosen)} |"


def per_row(result: Mapping[str, Any], metric: str) -> list[float]:
    """Scores of the test rows in points; labels are on record as right or wrong."""
    values = [float(value) for value in result[metric]["per_example"]]
    return [100 * value for value in values] if max(values) <= 1 else values


def draws(name: str) -> str:
    runs = [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{name}/*/metrics.json"))]
    cells = []
    for margin in (None, *RULES.values()):
        leads = []
        for run in runs:
            systems = {key: value for key, value in run["systems"].items() if key not in ("zero_shot", "all_rows")}
            losses = {key: value["dev_loss"] for key, value in systems.items()}
            system = run["delivered"]["name"] if margin is None else taken(losses, margin)
            leads.append(systems[system]["metrics"]["f1"] - systems["continued"]["metrics"]["f1"])
        cells.append(f"{fmean(leads):+.1f} ± {T_OF_TEN * stdev(leads) / len(leads) ** 0.5:.1f}")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    records = Records()
    for rule, margin in RULES.items():
        sys.stdout.write(
            f"{rule}\n\n| setting | test rows | score | minus continued | chosen by seed |\n|---|---:|---:|---|---|\n"
        )
        for line in settings_of_results(records, margin):
            sys.stdout.write(f"{line}\n")
        sys.stdout.write("\n")
    sys.stdout.write(f"| ten draws | as handed over then | {' | '.join(RULES)} |\n|{'---|' * (len(RULES) + 2)}\n")
    for name in DRAWS:
        sys.stdout.write(f"{draws(name)}\n")


if __name__ == "__main__":
    main()
