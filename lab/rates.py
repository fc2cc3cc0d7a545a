"""Is every row equally tuned? Each training at several learning rates, the best by dev loss.

    python lab/rates.py RECIPE --output FOLDER --seeds 42 [--factors 0.3,1,3] [--rows target,continued,merge,GRASP]
        [--set KEY=VALUE]... [--answers]

All rows have the same budget: one training a factor, which multiplies the recipe's learning rate; two dev evaluations an epoch,
and an end after one epoch without a lower dev loss. The dev loss chooses the epoch and the rate. The merge and GRASP start from
the adapters of the recipe as it is; the ratio is learned once, at the recipe's own rate.

FOLDER is that of a comparison, whose finished steps are taken from its store. Two tables on standard output: every rate, and the
rate that each row chose, with the difference to `continued` at the rate that it chose, with its own interval at 95 %.
With --answers the chosen ones have the main score, too.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from candidates import BASELINE, Candidates, benches, measure, save_checkpoints, table

from grasp_lora.bench.checks import check
from grasp_lora.bench.outcomes import Adapter
from grasp_lora.bench.planned import main_metric
from grasp_lora.bench.run_folder import STORE_FOLDER
from grasp_lora.bench.session import Session
from grasp_lora.bench.store import Store
from grasp_lora.cli.terminal import log_to_terminal
from grasp_lora.errors import GraspError
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.claims import working_in
from grasp_lora.training.settings import TrainingSettings

EVALUATIONS = 2  # of the dev loss in an epoch


@dataclass(frozen=True)
class Tried:
    """One training of a row."""

    factor: float
    adapter: Adapter

    @property
    def dev_loss(self) -> float:
        """Lowest mean loss of the dev rows on its way."""
        return float(self.adapter.records[-1].result["dev_loss"])


def tuned(training: TrainingSettings, factor: float) -> TrainingSettings:
    """A training's settings at a multiple of its rate, under the budget that all rows have."""
    return replace(
        training,
        learning_rate=training.learning_rate * factor,
        evaluate_every=1 / EVALUATIONS,
        patience=EVALUATIONS,
        keep="best",
    )


def rows(bench: Candidates) -> dict[str, Callable[[float], Adapter]]:
    """What trains each row at a multiple of its rate."""
    bench = bench.as_in_paper
    recipe = bench.recipe

    def final(start: Adapter, ratio: float, factor: float) -> Adapter:
        return bench.finetuned(start, ratio, {"training": tuned(recipe.final.training, factor)})

    def with_grasp(factor: float) -> Adapter:
        learned = bench.learned(recipe.controller)
        return final(learned.start, learned.ratio, factor)

    def of_changed(part: str, factor: float) -> Candidates:
        stage = getattr(recipe, part)
        stage = replace(stage, training=tuned(stage.training, factor))
        session = bench.session.variant(recipe.model_copy(update={part: stage}))
        return Candidates(session, session, bench.store, bench.grid)

    return {
        BASELINE: lambda factor: final(bench.source, 0.0, factor),
        "target": lambda factor: of_changed("target", factor).target,
        "merge": lambda factor: final(bench.merged(), 0.0, factor),
        "GRASP": with_grasp,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure what is not on record; print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--output", type=Path, required=True, help="folder of a comparison")
    parser.add_argument("--seeds", default="42", help="separated by commas")
    parser.add_argument("--factors", default="0.3,1,3", help="of the recipe's learning rate, separated by commas")
    parser.add_argument("--rows", default="continued,target,merge,GRASP", help="separated by commas")
    parser.add_argument("--set", action="append", default=[], help="as of grasp-lora compare")
    parser.add_argument("--answers", action="store_true", help="score the answers of the chosen ones, too")
    given = parser.parse_args(arguments)
    factors = [float(factor) for factor in given.factors.split(",")]
    names = [BASELINE, *(name for name in given.rows.split(",") if name != BASELINE)]
    log_to_terminal(False)
    every = [["row", "seed", "times the rate", "dev loss", "best step", "test loss"], ["---", *["---:"] * 5]]
    chosen: dict[str, list[tuple[list[float], list[float]]]] = {name: [] for name in names}
    try:
        session = Session(*load_recipe(given.recipe, given.set))
        check(session)
        metric = main_metric(list(session.metrics)) if given.answers else None
        with working_in(given.output) as place:
            place.begin(shared=True)
            save_checkpoints(session, place)
            store = Store(given.output / STORE_FOLDER, session.progress, place.interruption)
            for bench in benches(session, store, [int(seed) for seed in given.seeds.split(",")]):
                for name in names:
                    tried = []
                    for factor in factors:
                        tried.append(one := Tried(factor, rows(bench)[name](factor)))
                        step = one.adapter.records[-1].result["best_step"]
                        loss = fmean(measure(bench, one.adapter, None)[0])
                        cells = [
                            name,
                            f"{bench.recipe.seed}",
                            f"{factor:g}",
                            f"{one.dev_loss:.3f}",
                            f"{step}",
                            f"{loss:.3f}",
                        ]
                        every.append(cells)
                        sys.stderr.write(" | ".join(cells) + "\n")
                    best = min(tried, key=lambda one: one.dev_loss)
                    row = every[tried.index(best) - len(tried)]
                    row[2] = f"**{row[2]}**"
                    chosen[name].append(measure(bench, best.adapter, metric))
    except GraspError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    groups = [example.group for example in session.splits.test]
    sys.stdout.write("\n".join(f"| {' | '.join(row)} |" for row in every) + "\n\n")
    sys.stdout.write(table(chosen, metric, groups) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
