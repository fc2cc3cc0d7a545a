"""What else a run could hand over: candidates beside the source adapter continued on the target rows.

    python lab/candidates.py RECIPE --output FOLDER --seeds 42,1337,9001 [--set KEY=VALUE]... [--answers]

FOLDER is that of a comparison, whose finished steps are taken from its store; what is missing is trained there. The table on
standard output has, per candidate, the test loss and, with --answers, the first score; its difference to `continued` has an
interval at 95 %, each by itself. Candidates that use the test rows for a choice do not exist: choices are made on dev.

| candidate | what it is |
|---|---|
| target, merged, GRASP | with the target adapter trained on the backbone alone, whatever the recipe says |
| average | of the deltas of `continued` and `joint` (a soup: Wortsman et al. 2022) |
| sum | the target adapter trained on top of the frozen source adapter (`target.on: source`); their exact sum |
| sum, GRASP | that sum pruned at a learned ratio and fine-tuned |

Those that lost (replay, a ratio for each part, a shrunk source part, joint before target, other averages) are in lab/log.md.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from grasp_lora.bench.checks import check
from grasp_lora.bench.outcomes import Adapter
from grasp_lora.bench.planned import main_metric
from grasp_lora.bench.run_folder import STORE_FOLDER
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import Store
from grasp_lora.cli.terminal import log_to_terminal
from grasp_lora.errors import GraspError, RecipeError
from grasp_lora.evaluation.statistics import PairedComparison, compare_with_baselines
from grasp_lora.method.merging import MergeSettings
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.checkpoints import Checkpointing
from grasp_lora.storage.claims import Workplace, working_in

BASELINE = "continued"


class Candidates(Bench):
    """The steps of one seed, and the candidates made of them."""

    def all(self) -> dict[str, Callable[[], Adapter]]:
        """Each candidate by its name, those first that others are made of."""
        apart = self.as_in_paper  # whatever the recipe says
        return {
            BASELINE: self.continued,
            "source": lambda: self.source,
            "target": lambda: apart.target,
            "merged": apart.merged,
            "joint": self.trained_jointly,
            "GRASP": apart.grasp,
            "sum": lambda: self._with_target("source").merged(),
            "sum, GRASP": lambda: self._with_target("source").grasp(),
            "average of continued and joint": lambda: self.average([self.continued(), self.trained_jointly()]),
        }

    def grasp(self) -> Adapter:
        """The final run at the ratio that the recipe's controller learns."""
        learned = self.learned(self.recipe.controller)
        return self.finetuned(learned.start, learned.ratio)

    def average(self, parts: Sequence[Adapter]) -> Adapter:
        """The average of adapters' deltas."""
        return self._merged("soup", MergeSettings("exact"), parts, [f"part_{n}" for n in range(1, len(parts) + 1)])


def save_checkpoints(session: Session, place: Workplace) -> None:
    """Let every training save what it needs to go on after a kill."""
    session.checkpoints = Checkpointing(session.recipe.save_every, lambda: place.interruption.asked_by)


def benches(session: Session, store: Store, seeds: Sequence[int]) -> list[Candidates]:
    """One bench a seed, as `compare` has them: the same splits, and the source adapter of the recipe's own seed."""
    recipe = session.recipe
    return [Candidates(session.variant(recipe.model_copy(update={"seed": seed})), session, store) for seed in seeds]


def measure(bench: Candidates, adapter: Adapter, metric: str | None) -> tuple[list[float], list[float]]:
    """Losses of the test rows and, where a metric is given, its value for each row."""
    losses = bench.losses(adapter, "test", answered=metric is not None).result["losses"]
    return losses, bench.scores(adapter).result[metric]["per_example"] if metric else []


def shown(found: PairedComparison | None) -> str:
    """A difference with its interval."""
    return "" if found is None else f"{found.difference:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def table(measured: dict[str, list[tuple[list[float], list[float]]]], metric: str | None, groups: Sequence[str]) -> str:
    """Markdown: a row a candidate, in the order of their test loss."""
    heads = ["candidate", "test loss", f"minus {BASELINE}"] + ([metric, f"minus {BASELINE}"] if metric else [])
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    means = {name: fmean(fmean(losses) for losses, _ in runs) for name, runs in measured.items()}
    for name in sorted(measured, key=means.__getitem__):
        cells = [name, f"{means[name]:.3f}"]
        for index in range(2 if metric else 1):
            ours, theirs = ([run[index] for run in measured[one]] for one in (name, BASELINE))
            found = None
            if name != BASELINE:
                found = compare_with_baselines(ours, {BASELINE: theirs}, groups=groups, higher_is_better=bool(index))[
                    BASELINE
                ]
            cells += ([f"{fmean(map(fmean, ours)):.1f}"] if index else []) + [shown(found)]
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure what is not on record; print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--output", type=Path, required=True, help="folder of a comparison")
    parser.add_argument("--seeds", default="42,1337,9001", help="separated by commas")
    parser.add_argument("--set", action="append", default=[], help="as of grasp-lora compare")
    parser.add_argument("--only", action="append", default=[], help="a candidate; may be repeated")
    parser.add_argument("--answers", action="store_true", help="score the answers, too")
    given = parser.parse_args(arguments)
    log_to_terminal(False)
    try:
        session = Session(*load_recipe(given.recipe, given.set))
        if session.recipe.merge.rule != "exact":
            raise RecipeError(f"merge.rule is {session.recipe.merge.rule!r}; the sum is that of exact: leave it out")
        check(session)
        with working_in(given.output) as place:
            place.begin(shared=True)
            save_checkpoints(session, place)
            store = Store(given.output / STORE_FOLDER, session.progress, place.interruption)
            metric = main_metric(list(session.metrics)) if given.answers else None
            measured: dict[str, list[tuple[list[float], list[float]]]] = {}
            for bench in benches(session, store, [int(seed) for seed in given.seeds.split(",")]):
                for name, make in bench.all().items():
                    if not given.only or name in (BASELINE, *given.only):
                        measured.setdefault(name, []).append(measure(bench, make(), metric))
                        sys.stderr.write(f"{name}, seed {bench.recipe.seed}: {fmean(measured[name][-1][0]):.4f}\n")
    except GraspError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(table(measured, metric, [example.group for example in session.splits.test]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
