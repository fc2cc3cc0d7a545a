"""What the ratios that a comparison's methods chose are worth by dev loss: the live counterpart of replays.

    python lab/live_regret.py FOLDER/compare.json...

For every method that learned or chose a ratio, with a grid in the same comparison: how much higher the dev loss of the grid's
final runs is at that ratio (linear between its ratios, constant beyond them) than at the best of them, in percent; mean over
seeds and comparisons. As `dev regret (recorded)` of controllers.py, but every ratio was chosen by a run of its own.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from controllers import table


def regrets(content: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Each method's (ratio, regret in percent), one a seed, of the content of a `compare.json`."""
    curves: dict[int, list[tuple[float, float]]] = {}
    for point in content["curve"]:
        curves.setdefault(point["seed"], []).append((point["prune_ratio"], point["dev"]))
    found = {}
    for row in content["rows"]:
        ratios = (row.get("prune_ratio") or {}).get("values", [])
        if len(ratios) == len(content["seeds"]) and set(content["seeds"]) <= set(curves):
            found[row["title"]] = [
                (ratio, regret(ratio, sorted(curves[seed])))
                for ratio, seed in zip(ratios, content["seeds"], strict=True)
            ]
    return found


def regret(ratio: float, curve: Sequence[tuple[float, float]]) -> float:
    """How much higher a curve of (ratio, loss) is at a ratio than at its lowest point, in percent."""
    ratios, losses = zip(*curve, strict=True)
    return float(100 * (np.interp(ratio, ratios, losses) / min(losses) - 1))


def regret_table(contents: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row a method, one column a comparison, and the mean over all."""
    each = [regrets(content) for content in contents]
    names = [title for title in each[0] if all(title in one for one in each)]
    if not names:
        raise ValueError("no method with a ratio is in all of these comparisons; name fewer of them")
    heads = [f"{content['name']}: ratios, regret %" for content in contents]
    rows = []
    for title in names:
        cells = []
        for one in each:
            ratios = ", ".join(f"{ratio:.2f}" for ratio, _ in one[title])
            cells.append(f"{ratios}; {np.mean([value for _, value in one[title]]):.2f}")
        overall = np.mean([value for one in each for _, value in one[title]])
        rows.append([title, *cells, f"{overall:.2f}"])
    return table(["method", *heads, "mean regret %"], rows)


def main() -> int:
    """Read the comparisons and write the table to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="compare.json of `grasp-lora compare`")
    arguments = parser.parse_args()
    try:
        contents = [json.loads(file.read_text(encoding="utf-8")) for file in arguments.files]
        sys.stdout.write(regret_table(contents) + "\n")
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(
            f"error: {str(error).removesuffix('.')}; give files that `grasp-lora compare` wrote, with the method grid\n"
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
