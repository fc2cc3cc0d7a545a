"""The paper's table at our scale, beside its own numbers, from recorded comparisons; no model is loaded.

    python lab/paper_table.py        # the tables at the head of docs/results.md

Ours: Gemma 3 270M, from `compare.json` of the records below; those of MLQA are older, with `spread` in the place of `grasp`.
Theirs: Llama 3 8B Instruct, 100 test rows, mean of three seeds (Hassan and Chen 2026, main tables).
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SETTINGS = {
    "xlsum-ar": "paper-xlsum-ar", "mlqa-ar": "compare-mlqa-ar", "xlsum-zh": "paper-xlsum-zh", "mlqa-zh": "compare-mlqa-zh",
}  # fmt: skip
METRICS = {"xlsum": ("bleu", "rougeL"), "mlqa": ("exact_match", "f1")}
ROWS = {  # method -> title; the paper's rows first
    "zero_shot": "zero shot", "target_only": "target only (LoRA)", "ties": "TIES", "lorahub": "LoRAHub",
    "adaptive_merge": "adaptive merge", "grid_paper": "the same, grid of 8", "grasp_paper": "GRASP, preset `paper`",
    "source_only": "source only", "continued": "`continued`", "joint": "joint", "grid": "grid of 8, our final runs",
    "grasp": "GRASP, preset `grasp`; MLQA: `spread`",
}  # fmt: skip
PAPER = {  # method -> the two scores of each setting, in their order
    "zero_shot": ((2.05, 10.60), (0, 11.00), (9.39, 20.87), (0, 6.95)),
    "target_only": ((4.46, 18.17), (29.00, 43.84), (13.73, 28.15), (42.00, 47.17)),
    "ties": ((2.19, 11.99), (2.00, 13.28), (9.37, 21.30), (0, 13.51)),
    "lorahub": ((5.10, 16.85), (29.00, 42.79), (10.35, 24.16), (44.00, 48.10)),
    "adaptive_merge": ((4.46, 18.15), (36.00, 47.77), (14.33, 29.14), (46.00, 49.63)),
    "grid_paper": ((6.18, 20.19), (38.33, 50.29), (14.81, 29.50), (46.50, 50.93)),
    "grasp_paper": ((7.93, 22.32), (41.00, 52.51), (16.54, 30.95), (48.00, 51.60)),
}


def row_of(method: str, found: dict) -> str:
    """One row: ours, and the paper's in brackets, then forward passes beyond the adapters and minutes, as means over settings."""
    cells = []
    for number, setting in enumerate(SETTINGS):
        scores = found[setting][method]["scores"]
        ours = [scores[metric]["mean"] for metric in METRICS[setting.partition("-")[0]]]
        theirs = PAPER.get(method)
        beside = f" ({theirs[number][0]:.1f} / {theirs[number][1]:.1f})" if theirs else ""
        cells.append(f"{ours[0]:.1f} / {ours[1]:.1f}{beside}")
    costs = [found[setting][method]["cost"] for setting in SETTINGS]
    passes, minutes = (sum(cost[key] for cost in costs) / len(costs) for key in ("work", "seconds"))
    return " | ".join([f"| {ROWS[method]}", *cells, f"{passes:,.0f}", f"{minutes / 60:.0f} |"])


def main() -> None:
    """Print the table."""
    files = {name: RESULTS / folder / "compare.json" for name, folder in SETTINGS.items()}
    content = {name: json.loads(file.read_text("utf-8")) for name, file in files.items()}
    found = {name: {row["method"]: row for row in one["rows"]} for name, one in content.items()}
    heads = [
        f"{name} ({len(one['seeds'])} seed{'s' * (len(one['seeds']) > 1)}, {one['test_examples']} rows)"
        for name, one in content.items()
    ]
    lines = [
        f"| | {' | '.join(heads)} | passes | minutes |",
        "|---" * 5 + "|---:|---:|",
        *(row_of(name, found) for name in ROWS),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
