"""Verdicts that hold the spread of the seeds: how many are false, and what comes of those on record.

    python lab/seeds.py simulate    # share of families with a false verdict, with the spread of the seeds and without
    python lab/seeds.py recorded    # planned comparisons of `results/`, before and after; from compare.json alone
    python lab/seeds.py mlqa        # five epochs without a dev set: GRASP's ratio, 80 %, minus the same with nothing pruned

On record are the scores of each seed and intervals over rows alone, from which a variance over rows is read back.
"""

import gzip
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
from scipy.special import stdtrit

from grasp_lora.evaluation.statistics import _with_spread_of_runs, compare_with_baselines

RESULTS = Path(__file__).parent / "results"
ROWS, METHODS, FAMILIES = 1_000, 3, 400
SPREAD_OF_ROWS, SPREAD_OF_RUN = 20.0, 16.0  # points between two systems: of a row in all seeds, and of a row in one


def simulate() -> Iterator[str]:
    """Families of three comparisons without a difference, by the package's own intervals."""
    yield f"{METHODS} comparisons of equal methods, {ROWS} rows, {FAMILIES} families: share with a false verdict"
    yield "| seeds | spread of a seed, points | rows alone | rows and seeds | half-width |"
    yield "|---:|---:|---:|---:|---:|"
    for seeds in (2, 3, 5):
        for spread in (0.0, 1.0, 2.0):
            false, widths = [0, 0], []
            for family in range(FAMILIES):
                generator = torch.Generator().manual_seed(1000 * seeds + family)
                runs = equal_methods(seeds, spread, generator)
                averaged = [run.mean(dim=0).tolist() for run in runs]
                for index, values in enumerate((averaged, [run.tolist() for run in runs])):
                    others = {str(number): run for number, run in enumerate(values[1:])}
                    found = compare_with_baselines(values[0], others, resamples=1_000, seed=family)
                    false[index] += any(each.verdict != "no difference shown" for each in found.values())
                    widths += [(each.high - each.low) / 2 for each in found.values()] if index else []
            shares = " | ".join(f"{100 * count / FAMILIES:.1f} %" for count in false)
            yield f"| {seeds} | {spread:.0f} | {shares} | {sorted(widths)[len(widths) // 2]:.2f} |"


def equal_methods(seeds: int, spread: float, generator: torch.Generator) -> list[torch.Tensor]:
    """Values [seeds, rows] of the reference and the others; spreads are those of a difference, so each has its share."""
    share = 1 / math.sqrt(2)
    return [
        share
        * (
            spread * torch.randn(seeds, 1, generator=generator, dtype=torch.float64)
            + SPREAD_OF_ROWS * torch.randn(1, ROWS, generator=generator, dtype=torch.float64)
            + SPREAD_OF_RUN * torch.randn(seeds, ROWS, generator=generator, dtype=torch.float64)
        )
        for _ in range(METHODS + 1)
    ]


def recorded() -> Iterator[str]:
    """Each planned comparison of two seeds or more that has a verdict."""
    yield "| comparison | minus | metric | by seed | difference | over rows | with seeds |"
    yield "|---|---|---|---|---:|---|---|"
    changed = count = 0
    for file in sorted(RESULTS.glob("*/compare.json")):
        comparison = json.loads(file.read_bytes())
        rows = {row["method"]: row for row in comparison["rows"]}
        reference = rows.get(comparison["settings"].get("reference") or comparison.get("reference"))
        for row in rows.values() if reference and not comparison.get("folds") else ():
            for metric, against in row.get("against", {}).items():
                pair = [each["scores"][metric]["values"] for each in (reference, row)]
                if against.get("verdict") is None or min(map(len, pair)) < 2 or len(pair[0]) != len(pair[1]):
                    continue
                low, high = with_seeds(against, pair, comparison)
                after = (
                    "no difference shown"
                    if low <= 0 <= high
                    else "better" if (low > 0) == against["higher_is_better"] else "worse"
                )  # fmt: skip
                count, changed = count + 1, changed + (after != against["verdict"])
                gaps = [ours - theirs for ours, theirs in zip(*pair, strict=True)]
                digits = 3 if metric == "test_loss" else 1
                each = " ".join(f"{gap:+.{digits}f}" for gap in gaps)
                before = f"{against['verdict']} ({against['low']:+.{digits}f} to {against['high']:+.{digits}f})"
                now = f"{after} ({low:+.{digits}f} to {high:+.{digits}f})"
                mark = "**" if after != against["verdict"] else ""
                name = file.parent.name.removeprefix("compare-")
                yield (
                    f"| {name} | {row['method']} | {metric} | {each} | {fmean(gaps):+.{digits}f} | {before} "
                    f"| {mark}{now}{mark} |"
                )
    yield f"\n{changed} of {count} verdicts change."


def with_seeds(against: dict, pair: list[list[float]], comparison: dict) -> tuple[float, float]:
    """The bounds on record, widened by the spread of the seeds' differences."""
    tail = (1 - against["confidence"]) / 2 / against["comparisons"]
    freedom = (comparison.get("test_groups") or against["examples"]) - 1
    of_rows = ((against["high"] - against["low"]) / 2 / -stdtrit(freedom, tail)) ** 2
    gaps = torch.tensor(pair[0], dtype=torch.float64) - torch.tensor(pair[1], dtype=torch.float64)
    wider, least = _with_spread_of_runs([gaps], of_rows, freedom, tail)
    center = against["difference"]
    return (
        min(center - wider * (center - against["low"]), center - least),
        max(center + wider * (against["high"] - center), center + least),
    )


def mlqa() -> Iterator[str]:
    """The final runs at 0.80 and at 0 that looked at no dev row; corrected for five comparisons, as they were planned."""
    for code in ("ar", "zh"):
        file = RESULTS / f"compare-mlqa-{code}/records.jsonl.gz"
        rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
        made = {
            ratio: {
                row["settings"]["seed"]: row["key"]
                for row in rows
                if row["step"] == f"final {ratio}" and row["result"]["dev_loss"] is None
            }
            for ratio in ("0.80", "0.00")
        }
        of = {(row["step"], row["settings"].get("adapter")): row["result"] for row in rows}
        seeds = sorted(made["0.80"])
        for what in ("f1", "exact_match", "losses"):
            pair = [
                [
                    of["test losses", made[ratio][seed]]["losses"]
                    if what == "losses"
                    else of["scores", made[ratio][seed]][what]["per_example"]
                    for seed in seeds
                ]
                for ratio in ("0.80", "0.00")
            ]
            averaged = [[fmean(row) for row in zip(*runs, strict=True)] for runs in pair]
            for name, (ours, theirs) in {"rows alone": averaged, "rows and seeds": pair}.items():
                others = {str(number): theirs for number in range(5)}
                found = compare_with_baselines(ours, others, higher_is_better=what != "losses")["0"]
                each = " ".join(f"{gap:+.2f}" for gap in found.by_run)
                bounds = f"{found.difference:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
                yield f"{code} {what}, {name}: {bounds}, {found.verdict} {each}"


if __name__ == "__main__":
    sys.stdout.writelines(
        f"{line}\n" for line in {"simulate": simulate, "recorded": recorded, "mlqa": mlqa}[sys.argv[1]]()
    )
