"""What rules of choice would have handed over in finished comparisons, minus the source adapter continued.

    python lab/choices.py        # replays, the last of `english-qa`; then ten draws of 60 rows, by what their dev rows said
    python lab/choices.py nusax  # replays of the settings whose names begin so, two at least

The records of `lab/results` have losses and scores of each system on each test row; nothing is trained. In a replay some test
rows choose and all others judge, many times over.
"""

import gzip
import json
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

RESULTS = Path(__file__).parent / "results"
LAYERS = RESULTS / "layers/english-qa-sw-rows.jsonl.gz"
SYSTEMS = ("continued", "merged", "grasp")
SETTINGS = ("tydiqa-sw-on-source", "tydiqa-ko", "tydiqa-ko-auto", "nusax-jv-on-source", "nusax-jv-auto", "nusax-su-on-source",
            "nusax-su-auto", "nusax-min-auto", "mlqa-xquad-ar", "mlqa-xquad-zh", "xlsum-ar-on-source", "xlsum-zh-on-source",
            "xlsum-ar-auto", "xlsum-zh-auto", "mlqa-ar", "mlqa-zh", "nusax-jv", "nusax-su", "tydiqa-sw")  # fmt: skip
APART = ("mlqa-ar", "mlqa-zh", "nusax-jv", "nusax-su", "tydiqa-sw")  # whose target adapter is a candidate
CHOOSING, DRAWS = (15, 25, 45, 50), 60
TEN_DRAWS = ("draws-tydiqa-sw", "draws-tydiqa-sw-apart", "draws-tydiqa-sw-auto")
T_OF_TEN = 2.26  # Student's at 95 % with ten draws
System = tuple[Sequence[float], Sequence[float]]  # losses and scores of the test rows
NEAR = 0.05  # of a loss: the rule of before
AHEAD = 1.0  # standard errors of a difference between scores, where dev answers choose


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def recorded() -> Iterator[tuple[str, dict[str, System]]]:
    """Setting and systems of each seed; the last setting is Swahili on `english-qa`, whose merge was not pruned."""
    losses, scores, by_loss = {}, {}, {}
    for file in sorted(RESULTS.glob("compare-*/records.jsonl.gz")):
        for row in read_lines(file):
            adapter = row["settings"].get("adapter")
            if row["step"] == "test losses":
                losses[adapter] = row["result"]["losses"]
                by_loss.setdefault(round(fmean(losses[adapter]), 12), set()).add(adapter)
            elif row["step"] == "scores":
                scores[adapter] = row["result"]
    for setting in SETTINGS:
        comparison = json.loads((RESULTS / f"compare-{setting}/compare.json").read_text())
        rows = {row["method"]: row["scores"]["test_loss"]["values"] for row in comparison["rows"]}
        metric = next(name for name in ("f1", "accuracy", "rougeL") if name in comparison["metrics"])
        for number in range(len(comparison["seeds"])):
            systems = {}
            for system in (*SYSTEMS, *["target_only"] * (setting in APART)):
                if number < len(rows.get(system, ())):
                    adapters = by_loss.get(round(rows[system][number], 12), set()) & scores.keys()
                    if adapters:
                        adapter = min(adapters)
                        systems[system] = losses[adapter], per_row(scores[adapter], metric)
            if {"continued", "grasp"} <= systems.keys():
                yield setting, systems
    rows = list(read_lines(LAYERS))
    names = {"continued": "continued", "sum, q v": "grasp", "sum, all": "all layers", "source": "source"}
    for seed in (42, 1337):
        yield (
            "english-qa",
            {names[row["system"]]: (row["losses"], row["f1"]) for row in rows if row["seed"] in (seed, None)},
        )


def per_row(result: Mapping[str, Any], metric: str) -> list[float]:
    """Scores of the test rows in points; labels are on record as right or wrong."""
    values = [float(value) for value in result[metric]["per_example"]]
    return [100 * value for value in values] if max(values) <= 1 else values


def nearest(losses: Mapping[str, float], margin: float) -> str:
    """The system of the lowest loss where that is further below GRASP's than the margin, else GRASP's result."""
    lowest = min(losses, key=losses.__getitem__)
    return "grasp" if losses[lowest] >= (1 - margin) * losses["grasp"] else lowest


def chosen(rule: str, systems: Mapping[str, System], rows: Sequence[int]) -> str:
    losses = {name: fmean(of[0][row] for row in rows) for name, of in systems.items()}
    scores = {name: [of[1][row] for row in rows] for name, of in systems.items()}
    if rule == "score":
        return max(scores, key=lambda name: (fmean(scores[name]), -losses[name]))
    pick = rule.partition(",")[0].lower()
    if pick not in systems:
        pick = nearest(losses, NEAR if rule.startswith("near") else 0.0)
    if rule.endswith("answers"):
        pick = clearly_ahead(scores, losses, pick) or pick
    return pick


def clearly_ahead(scores: Mapping[str, Sequence[float]], losses: Mapping[str, float], usual: str) -> str | None:
    """The system whose answers to the same rows score higher than those of the usual one by more than `AHEAD` standard errors of
    the difference: of several the highest, of equal ones the one of the lower loss. So a run chose until 2026-12-02."""

    def leads(name: str) -> bool:
        gaps = [ours - theirs for ours, theirs in zip(scores[name], scores[usual], strict=True)]
        return fmean(gaps) > AHEAD * stdev(gaps) / math.sqrt(len(gaps)) + 1e-9 * max(map(abs, scores[name]))

    ahead = [name for name in scores if leads(name)]
    return max(ahead, key=lambda name: (fmean(scores[name]), -losses[name]), default=None)


RULES = {
    "near, then answers": f"GRASP's result unless another's loss is {NEAR:.0%} lower; then answers, by {AHEAD:g} standard error",
    "near": f"GRASP's result unless another's loss is {NEAR:.0%} lower",
    "lowest, then answers": "the lowest loss; then answers",
    "lowest": "the lowest loss",
    "score": "the highest score",
    "GRASP": "always GRASP's result",
    "GRASP, then answers": "GRASP's result; then answers",
    "continued, then answers": "`continued`; then answers",
}
HINDSIGHT = "the highest score of the rows that judge"  # which no rule can reach


def replay(runs: Sequence[tuple[str, dict[str, System]]], rows: int) -> Iterator[str]:
    """A line of each rule: mean gain on `continued` in the mean of all settings, without the last, in it, and the worst other."""
    shuffled, gains = random.Random(0), {rule: {} for rule in (*RULES, HINDSIGHT)}
    for setting, systems in runs:
        order = list(range(len(systems["continued"][0])))
        for _ in range(DRAWS):
            shuffled.shuffle(order)
            judged = {name: fmean(of[1][row] for row in order[rows:]) for name, of in systems.items()}
            for rule in RULES:
                gain = judged[chosen(rule, systems, order[:rows])] - judged["continued"]
                gains[rule].setdefault(setting, []).append(gain)
            gains[HINDSIGHT].setdefault(setting, []).append(max(judged.values()) - judged["continued"])
    for rule, title in (RULES | {HINDSIGHT: HINDSIGHT}).items():
        means = [fmean(values) for values in gains[rule].values()]
        yield f"| {title} | {fmean(means):+.2f} | {fmean(means[:-1]):+.2f} | {means[-1]:+.1f} | {min(means[:-1]):+.1f} |"


def of_ten_draws(name: str) -> str:
    """Gains on `continued` of what ten runs handed over then, and of rules by dev losses; no dev answers are on record."""
    gains: dict[str, list[float]] = {"then": [], "near": [], "lowest": [], "GRASP": []}
    for file in sorted(RESULTS.glob(f"{name}/*/metrics.json")):
        run = json.loads(file.read_text())
        systems = {key: value for key, value in run["systems"].items() if key not in ("zero_shot", "all_rows")}
        losses = {key: value["dev_loss"] for key, value in systems.items()}
        picks = {"then": run["delivered"]["name"], "near": nearest(losses, NEAR), "lowest": nearest(losses, 0.0)}
        for rule, pick in (picks | {"GRASP": "grasp"}).items():
            gains[rule].append(systems[pick]["metrics"]["f1"] - systems["continued"]["metrics"]["f1"])
    cells = (f"{fmean(of):+.1f} ± {T_OF_TEN * stdev(of) / len(of) ** 0.5:.1f}" for of in gains.values())
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    runs = [run for run in recorded() if run[0].startswith(tuple(sys.argv[1:]) or "")]
    for rows in CHOOSING:
        sys.stdout.write(
            f"\n| {rows} rows choose | mean | without the last setting | the last | worst other |\n|---|---|---|---|---|\n"
        )
        for line in replay(runs, rows):
            sys.stdout.write(f"{line}\n")
    if sys.argv[1:]:
        return
    sys.stdout.write(
        "\n| ten draws | as handed over then | near | the lowest loss | GRASP's result |\n|---|---|---|---|---|\n"
    )
    for name in TEN_DRAWS:
        sys.stdout.write(f"{of_ten_draws(name)}\n")


if __name__ == "__main__":
    main()
