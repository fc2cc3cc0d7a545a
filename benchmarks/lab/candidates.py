"""What else a run could hand over: candidates beside the source adapter continued on the target rows.

    python benchmarks/lab/candidates.py RECIPE --output FOLDER --seeds 42,1337,9001 [--set KEY=VALUE]... [--answers]

FOLDER is that of a comparison, whose finished steps are taken from its store; what is missing is trained there. The table on
standard output has, per candidate, the test loss and, with --answers, the first score; its difference to `continued` has an
interval at 95 %, each by itself. Candidates that use the test rows for a choice do not exist: choices are made on dev.

| candidate | what it is |
|---|---|
| target, merged, GRASP | with the target adapter trained on the backbone alone, whatever the recipe says |
| soup | average of the deltas of several adapters (Wortsman et al. 2022) |
| greedy soup | of all adapters here, in the order of their dev loss, those that do not raise the dev loss of the average |
| sum | the target adapter trained on top of the frozen source adapter (`target.on: source`); their exact sum |
| sum, GRASP | that sum pruned at a learned ratio and fine-tuned |
| sum, replay | the target adapter of that sum trained with half as many source rows among the target rows |
| sum, 0.6 of both parts | that sum pruned at a given ratio and fine-tuned |
| sum, 0.6 of the source part; of the target part | the same, with one part pruned alone |
| sum, source part times 0.6 | that sum with the source adapter shrunk in place of pruned, and fine-tuned |
| replay | `continued` with half as many source rows among the target rows |
| joint, then target | the joint adapter, continued on the target rows |
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from grasp_lora.bench.checks import check
from grasp_lora.bench.outcomes import Adapter, once
from grasp_lora.bench.planned import main_metric
from grasp_lora.bench.run_folder import STORE_FOLDER
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.bench.store import Store, key_of
from grasp_lora.cli.terminal import log_to_terminal
from grasp_lora.errors import GraspError
from grasp_lora.evaluation.statistics import PairedComparison, compare_with_baselines
from grasp_lora.method.lora import AdapterWeights, LoraPair
from grasp_lora.method.masks import MaskSettings
from grasp_lora.method.merging import MergeSettings
from grasp_lora.method.ranking import prune_count
from grasp_lora.recipes.load import load_recipe
from grasp_lora.storage.checkpoints import Checkpointing
from grasp_lora.storage.folder import Workplace, working_in

BASELINE = "continued"
REPLAYED = 0.5  # source rows for each target row
PRUNED = 0.6  # what GRASP learned of the sum in Swahili with seeds 42 and 1337


class Candidates(Bench):
    """The steps of one seed, and the candidates made of them."""

    def all(self) -> dict[str, Callable[[], Adapter]]:
        """Each candidate by its name, those first that others are made of."""
        apart = self.as_in_paper  # whatever the recipe says
        single: dict[str, Callable[[], Adapter]] = {
            BASELINE: self.continued,
            "source": lambda: self.source,
            "target": lambda: apart.target,
            "merged": apart.merged,
            "joint": self.trained_jointly,
            "joint, then target": lambda: self.finetuned(self.trained_jointly(), 0.0),
            "GRASP": apart.grasp,
            "sum": lambda: self.on_source().merged(),
            "sum, GRASP": lambda: self.on_source().grasp(),
            "replay": lambda: self.with_replay().continued(),
            "sum, replay": lambda: self.with_replay().on_source().merged(),
            f"sum, {PRUNED} of both parts": lambda: self.on_source().pruned_by_part(PRUNED, PRUNED),
            f"sum, {PRUNED} of the source part": lambda: self.on_source().pruned_by_part(PRUNED, 0.0),
            f"sum, {PRUNED} of the target part": lambda: self.on_source().pruned_by_part(0.0, PRUNED),
            f"sum, source part times {PRUNED}": lambda: self.on_source().shrunk(PRUNED),
        }

        def soup(*names: str) -> Callable[[], Adapter]:
            return lambda: self.soup([single[name]() for name in names])

        return single | {
            "soup of continued and joint": soup(BASELINE, "joint"),
            "soup of continued and GRASP": soup(BASELINE, "GRASP"),
            "soup of continued and sum": soup(BASELINE, "sum"),
            "soup of joint and sum": soup("joint", "sum"),
            "soup of continued, joint and GRASP": soup(BASELINE, "joint", "GRASP"),
            "greedy soup": lambda: self.greedy([adapter() for adapter in single.values()]),
        }

    def grasp(self) -> Adapter:
        """The final run at the ratio that the recipe's controller learns."""
        learned = self.learned(self.recipe.controller)
        return self.finetuned(learned.start, learned.ratio)

    def soup(self, parts: Sequence[Adapter]) -> Adapter:
        """The average of adapters' deltas."""
        return self._merged("soup", MergeSettings("exact"), parts, [f"part_{n}" for n in range(1, len(parts) + 1)])

    def greedy(self, parts: Sequence[Adapter]) -> Adapter:
        """Add one adapter after the other, the best by dev loss first, and keep those that do not raise the average's."""
        first, *others = sorted(parts, key=self.dev_loss)
        chosen, best, lowest = [first], first, self.dev_loss(first)
        for part in others:
            trial = self.soup([*chosen, part])
            if (loss := self.dev_loss(trial)) <= lowest:
                chosen, best, lowest = [*chosen, part], trial, loss
        return best

    def dev_loss(self, adapter: Adapter) -> float:
        """Mean dev loss of an adapter."""
        return fmean(self.losses(adapter, "dev").result["losses"])

    def on_source(self) -> "Candidates":
        """A bench whose target adapter is trained on top of the source adapter, and whose merge is their sum."""
        recipe = self.recipe.model_copy(
            update={"merge": MergeSettings("exact"), "target": replace(self.recipe.target, on="source")}
        )
        other = Candidates(self.session.variant(recipe), self._shared, self.store, self.grid)
        other.__dict__["sources"] = self.sources
        return other

    def pruned_by_part(self, source: float, target: float) -> Adapter:
        """The merge of a source and a target adapter of one rank, each pruned at a ratio of its own, and fine-tuned so."""
        merged = self.merged()
        decided = {"of": merged.key, "ratios": [source, target]}
        start = Adapter(
            key_of("pruned by part", decided), once(lambda: by_part(merged.weights, [source, target])), merged.records
        )
        # Among all weights of a factor the zeros are the smallest, so the final run's own mask is this one.
        return self.finetuned(start, (source + target) / 2, {"mask": MaskSettings(scope="tensor")})

    def shrunk(self, source: float) -> Adapter:
        """The sum of one source adapter times a factor and of the target adapter, fine-tuned: a rival of pruning."""
        merge = MergeSettings("exact", (source, 1.0))
        return self.finetuned(self._merged("shrunk", merge, self.parents, self.parent_names), 0.0)

    def with_replay(self) -> "Candidates":
        """A bench whose target rows have source rows among them."""
        splits = self.session.splits
        rows = splits.source_train[: round(REPLAYED * len(splits.train))]
        session = self.session.variant(self.recipe)
        session.splits = replace(splits, train=(*splits.train, *rows))
        other = Candidates(session, self._shared, self.store, self.grid)
        other.__dict__["sources"] = self.sources
        return other


def by_part(weights: AdapterWeights, ratios: Sequence[float]) -> AdapterWeights:
    """An adapter whose smallest weights are zero: a share of each segment's, in each factor."""

    def pruned(weight: Tensor, ratio: float) -> Tensor:
        smallest = weight.abs().flatten().argsort(stable=True)[: prune_count(ratio, weight.numel())]
        return weight.flatten().index_fill(0, smallest, 0.0).view_as(weight)

    def pair(whole: LoraPair) -> LoraPair:
        ranks = [segment.rank for segment in whole.segments]
        A, B = whole.A.split(ranks), whole.B.split(ranks, dim=1)
        return replace(
            whole,
            A=torch.cat([pruned(part, ratio) for part, ratio in zip(A, ratios, strict=True)]),
            B=torch.cat([pruned(part, ratio) for part, ratio in zip(B, ratios, strict=True)], dim=1),
        )

    return AdapterWeights({name: pair(whole) for name, whole in weights.items()})


def save_checkpoints(session: Session, place: Workplace) -> None:
    """Let every training save what it needs to go on after a kill."""
    session.checkpoints = Checkpointing(session.recipe.save_every, lambda: place.interruption.asked_by)


def benches(session: Session, store: Store, seeds: Sequence[int]) -> list[Candidates]:
    """One bench a seed, as `compare` has them: the same splits, and the source adapter of the recipe's own seed."""
    recipe = session.recipe
    split_seed = recipe.seed if recipe.data.split_seed is None else recipe.data.split_seed
    shared = session.variant(
        recipe.model_copy(update={"data": replace(recipe.data, split_seed=split_seed)}),
    )
    return [
        Candidates(shared.variant(shared.recipe.model_copy(update={"seed": seed})), shared, store) for seed in seeds
    ]


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
