"""When is a learned ratio worth having? Dev losses of the grid at each ratio, and what was learned, from all records.

    python lab/worth.py lab/results/worth.svg      # the table to standard output, the figure to the file

The figure needs matplotlib, which comes with `pip install ".[eval]"`.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

RESULTS = Path(__file__).parent / "results"
DRAWS = (
    "draws-tydiqa-sw",
    "draws-tydiqa-sw-apart",
    "draws-tydiqa-sw-auto",
)  # 60 rows each: ratios with their intervals
SEARCHED = 0.7  # from 0.1 to 0.8
UNPRUNED = ("merged", "adaptive_merge")


def curves(comparison: dict[str, Any]) -> dict[int, dict[float, float]]:
    """Of each seed the dev loss at each ratio of the grid, above its lowest one."""
    found: dict[int, dict[float, float]] = defaultdict(dict)
    for point in comparison["curve"]:
        found[point["seed"]][point["prune_ratio"]] = point["dev"]
    return {seed: {ratio: loss - min(of.values()) for ratio, loss in of.items()} for seed, of in found.items()}


def row(name: str, comparison: dict[str, Any]) -> str:
    """A setting: how much the ratio matters by the dev loss, what was learned, and what that was worth on the test."""
    found, rows = curves(comparison), {row["method"]: row for row in comparison["rows"]}
    ratios = [
        ratio
        for ratio in (rows.get("grasp", rows.get("delivered")) or {})["prune_ratio"]["values"]
        if ratio is not None
    ]
    main = next(metric for metric in ("f1", "accuracy", "rougeL") if metric in comparison["metrics"])
    digits = {"test_loss": 3, main: 1}

    def over(method: str, other: str) -> str:
        if other not in rows or "scores" not in rows[other] or not rows[other]["scores"]:
            return "–"
        gaps = {
            key: fmean(
                a - b
                for a, b in zip(
                    rows[method]["scores"][key]["values"], rows[other]["scores"][key]["values"], strict=False
                )
            )
            for key in digits
        }
        return ", ".join(f"{gaps[key]:+.{digits[key]}f}" for key in (main, "test_loss"))

    steep, lowest = (
        fmean(max(of.values()) for of in found.values()),
        [min(of, key=of.__getitem__) for of in found.values()],
    )
    ours = "grasp" if "grasp" in rows else "delivered"
    cells = [name, f"{len(found)}", f"{steep:.3f}", " ".join(f"{ratio:.1f}" for ratio in lowest),
             " ".join(f"{ratio:.2f}" for ratio in ratios), over(ours, "merged"), over(ours, "adaptive_merge")]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def draws(name: str) -> str:
    """How much of the searched range the intervals of ten draws of 60 rows leave open."""
    shares = []
    for file in sorted((RESULTS / name).glob("*/metrics.json")):
        low, high = json.loads(file.read_bytes())["prune_ratio_interval"]
        shares.append((high - low) / SEARCHED)
    return (
        f"| {name} | {len(shares)} | {min(shares):.0%} | {fmean(shares):.0%} | {sum(share < 0.5 for share in shares)} |"
    )


def draw_figure(comparisons: dict[str, dict[str, Any]], file: Path) -> None:
    """One panel a setting: dev loss above the lowest over the ratio, a line a seed, ticks where a ratio was learned."""
    import matplotlib as mpl
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "worth"
    figure, axes = pyplot.subplots(3, 4, figsize=(12, 7), sharex=True, layout="constrained")
    for axis, (name, comparison) in zip(axes.flat, comparisons.items(), strict=False):
        for of in curves(comparison).values():
            axis.plot(list(of), list(of.values()), color="#0f766e", linewidth=1)
        rows = {row["method"]: row for row in comparison["rows"]}
        for ratio in rows.get("grasp", rows.get("delivered", {}))["prune_ratio"]["values"]:
            if ratio is not None:
                axis.axvline(ratio, ymax=0.08, color="#b45309", linewidth=2)
        axis.set_title(name, fontsize=9)
        axis.set_ylim(-0.01, 0.35)
    for axis in list(axes.flat)[len(comparisons) :]:
        axis.set_visible(False)
    figure.supxlabel("prune ratio (short strokes: what was learned)")
    figure.supylabel("dev loss above the lowest of the grid, nats")
    figure.savefig(file, metadata={"Date": None})


def main(file: Path) -> None:
    found = {}
    for place in sorted(RESULTS.glob("compare-*/compare.json")):
        comparison = json.loads(place.read_bytes())
        if place.parent.name == "compare-nusax-jv-handed-over":  # the grid of another row
            continue
        if comparison.get("curve") and {"grasp", "delivered"} & {row["method"] for row in comparison["rows"]}:
            found[place.parent.name.removeprefix("compare-")] = comparison
    heads = ["setting", "seeds", "highest dev loss minus lowest", "lowest at", "learned"]
    heads += ["GRASP minus the untrained merge: score, test loss", "minus the merge, fine-tuned"]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---:|---|---|---|---|"]
    lines += [row(name, comparison) for name, comparison in found.items()]
    lines += [
        "",
        "| draws of 60 rows | runs | narrowest interval, of the searched range | mean | below half |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [draws(name) for name in DRAWS]
    sys.stdout.write("\n".join(lines) + "\n")
    draw_figure(found, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
