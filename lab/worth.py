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
DRAWS = ("draws-tydiqa-sw", "draws-tydiqa-sw-apart", "draws-tydiqa-sw-auto")  # of 60 rows, with their intervals
SEARCHED = 0.7  # from 0.1 to 0.8
AGAIN = "compare-nusax-jv-handed-over"  # the grid of another comparison


def curves(comparison: dict[str, Any]) -> dict[int, dict[float, float]]:
    """Of each seed the dev loss at each ratio of the grid, above its lowest one."""
    found: dict[int, dict[float, float]] = defaultdict(dict)
    for point in comparison["curve"]:
        found[point["seed"]][point["prune_ratio"]] = point["dev"]
    return {seed: {ratio: loss - min(of.values()) for ratio, loss in of.items()} for seed, of in found.items()}


def row(name: str, comparison: dict[str, Any]) -> str:
    """A setting: how much the ratio matters by the dev loss, what was learned, and what that was worth on the test."""
    found, rows = curves(comparison).values(), {row["method"]: row for row in comparison["rows"]}
    metric = next(one for one in ("f1", "accuracy", "rougeL") if one in comparison["metrics"])

    def over(other: str) -> str:
        if other not in rows:
            return "–"
        ours, theirs = rows["grasp"]["scores"], rows[other]["scores"]
        score, loss = (ours[key]["mean"] - theirs[key]["mean"] for key in (metric, "test_loss"))
        return f"{score:+.1f}, {loss:+.3f}"

    lowest = " ".join(f"{min(of, key=of.__getitem__):.1f}" for of in found)
    learned = " ".join(f"{ratio:.2f}" for ratio in rows["grasp"]["prune_ratio"]["values"])
    steep = fmean(max(of.values()) for of in found)
    cells = [name, f"{len(found)}", f"{steep:.3f}", lowest, learned, over("merged"), over("adaptive_merge")]
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

    mpl.rcParams |= {"svg.hashsalt": "worth", "svg.fonttype": "none"}  # the same file each time; text stays text
    figure, axes = pyplot.subplots(3, 4, figsize=(12, 7), sharex=True, layout="constrained")
    for axis, (name, comparison) in zip(axes.flat, comparisons.items(), strict=False):
        for of in curves(comparison).values():
            axis.plot(list(of), list(of.values()), color="#0f766e", linewidth=1)
        for ratio in next(row for row in comparison["rows"] if row["method"] == "grasp")["prune_ratio"]["values"]:
            axis.axvline(ratio, ymax=0.08, color="#b45309", linewidth=2)
        axis.set_title(name, fontsize=9)
        axis.set_ylim(-0.01, 0.35)
    figure.supxlabel("prune ratio (short strokes: what was learned)")
    figure.supylabel("dev loss above the lowest of the grid, nats")
    figure.savefig(file, metadata={"Date": None})


def main(file: Path) -> None:
    found = {}
    for place in sorted(RESULTS.glob("compare-*/compare.json")):
        comparison, name = json.loads(place.read_bytes()), place.parent.name
        if comparison.get("curve") and name != AGAIN:
            found[name.removeprefix("compare-")] = comparison
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
