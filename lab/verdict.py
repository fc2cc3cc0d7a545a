"""Which rule should choose the adapter that a run hands over? Replayed on comparisons that are on record.

    python lab/verdict.py RECIPE --output FOLDER --seeds 42,1337,9001 [--set KEY=VALUE]... [--rows 50] [--draws 300]
    python lab/verdict.py --runs RUN_FOLDER... --rows 12

FOLDER is that of a comparison (or holds its records in `store/`); what is on record is not done again. With `--runs` each
finished run counts as a seed. In each draw some test rows play the dev set, and a rule sees them alone. What it chooses is scored
on all other rows. So the rules differ by what they choose, and by nothing else. Two things are kinder than in a run: no training
has stopped early on the rows that choose, and rows of one article may choose and judge.

| rule | what it takes |
|---|---|
| always X | X, whatever the rows say |
| lowest loss, highest score | the best mean; of equal scores the one with the lower loss |
| loss and score | the best sum of both, each in standard errors |
| X unless N SE | X, unless its loss is more than N standard errors behind the lowest one: then that |
| GRASP unless continued scores N SE higher | GRASP's result, unless `continued` scores so many standard errors more |
| GRASP if target N SE ahead | GRASP's result where the target adapter is that far ahead of the source's, else `continued` |
| a run's | `final.deliver: best`: the same with 1, unless the bootstrap, which draws whole groups, shows another to be better |

Of labels a run's rule has the veto of right answers, too. With `target.on: source` there is no target adapter by itself: in the
rules the sum (`merged`) stands in its place. With `auto` that is so in each seed that has taken the sum.

The table on standard output: the mean score of what a rule hands over, minus that of `continued`, minus that of the best of
source, target and merge in hindsight, and how often it hands over what. Of a comparison it also says whether rows of one group
(article, context) differ alike: the variance of a mean difference by groups, over that by single rows. Above 1 intervals from
single rows would be too narrow, so the bootstrap draws whole groups.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from controllers import table

from grasp_lora.bench.checks import check
from grasp_lora.bench.compare import ComparisonSettings, Work, prepared
from grasp_lora.bench.deliver import best_of
from grasp_lora.bench.planned import main_metric
from grasp_lora.bench.records import read_record
from grasp_lora.bench.run_folder import DATA_FILE, DataFacts, TargetOn, predictions_file, read_metrics
from grasp_lora.bench.session import Session
from grasp_lora.bench.steps import Bench
from grasp_lora.cli.terminal import log_to_terminal
from grasp_lora.data.splits import group_numbers
from grasp_lora.errors import DataError, GraspError
from grasp_lora.recipes.load import load_recipe
from grasp_lora.recipes.stages import AUTO
from grasp_lora.storage.claims import working_in

# method of a comparison -> candidate of a run, in the order of deliver.py
CANDIDATES = {
    "continued": "continued",
    "source_only": "source",
    "target_only": "target",
    "merged": "merged",
    "grasp": "grasp",
}
PARENTS = ("source", "target", "merged")
FEWEST = 2  # rows that choose: a standard error needs two
SUM = TargetOn(on="source", splits=[], examples=0, losses={}).merge  # what an outcome says of it
Values = Mapping[str, np.ndarray]
Rule = Callable[[Values, Values], str]  # losses and scores of the rows that choose -> candidate


@dataclass(frozen=True)
class Seed:
    """Losses and scores of the test rows, one array a candidate; and the group of each row, where that is known."""

    losses: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    groups: np.ndarray | None = None

    @property
    def examples(self) -> int:
        """How many test rows there are."""
        return len(next(iter(self.losses.values())))


def lowest_loss(losses: Values, scores: Values) -> str:
    """The candidate with the lowest mean loss."""
    return min(losses, key=lambda name: float(losses[name].mean()))


def highest_score(losses: Values, scores: Values) -> str:
    """The candidate with the highest mean score; of equal ones that with the lower loss."""
    return max(losses, key=lambda name: (float(scores[name].mean()), -float(losses[name].mean())))


def above(apart: np.ndarray, errors: float) -> bool:
    """Whether a paired difference is above 0 by more than so many standard errors."""
    return bool(apart.mean() > errors * apart.std(ddof=1) / len(apart) ** 0.5)


def unless(usual: str, errors: float, losses: Values, scores: Values) -> str:
    """The usual candidate, unless it is more than so many standard errors behind the lowest loss: then that."""
    best = lowest_loss(losses, scores)
    return best if above(losses[usual] - losses[best], errors) else usual


def ahead(errors: float, losses: Values, scores: Values) -> str:
    """GRASP's result, where the target adapter is so many standard errors ahead of the source adapter; else `continued`."""
    target = "target" if "target" in losses else "merged"
    if not {"source", target} <= losses.keys():
        return "continued"
    return "grasp" if above(losses["source"] - losses[target], errors) else "continued"


def vetoed(errors: float, losses: Values, scores: Values) -> str:
    """GRASP's result, unless the mean score of `continued` is more than so many standard errors higher: then that."""
    return "continued" if above(scores["continued"] - scores["grasp"], errors) else "grasp"


def both(losses: Values, scores: Values) -> str:
    """The best sum of mean score and mean negative loss, each in standard errors of its difference to `continued`."""

    def gain(name: str) -> float:
        parts = [losses["continued"] - losses[name], scores[name] - scores["continued"]]
        return sum(float(one.mean()) / max(float(one.std(ddof=1)), 1e-12) for one in parts)

    return max(losses, key=gain)


def a_runs(losses: Values, scores: Values, groups: np.ndarray | None, labels: bool) -> str:
    """What a run does with rows of these groups; None takes each row by itself. Of labels the right answers may veto."""
    numbers = None if groups is None else groups.tolist()
    found = best_of({name: own.tolist() for name, own in losses.items()}, "dev", groups=numbers).name
    return vetoed(1.0, losses, scores) if labels and found == "grasp" else found


RULES: dict[str, Rule] = {
    "lowest loss": lowest_loss,
    "highest score": highest_score,
    "loss and score": both,
    "continued unless 2 SE": partial(unless, "continued", 2.0),
    "GRASP unless 1 SE": partial(unless, "grasp", 1.0),
    **{f"GRASP unless continued scores {errors:g} SE higher": partial(vetoed, errors) for errors in (0.0, 1.0)},
    **{f"GRASP if target {errors:g} SE ahead": partial(ahead, errors) for errors in (0.0, 0.5, 1.0, 1.5, 2.0)},
}


def replay(
    seeds: Sequence[Seed], rows: int, draws: int, bootstraps: int, seed: int = 0, labels: bool = False
) -> list[list[str]]:
    """One row of the table a rule.

    Args:
        labels: whether the scores are those of a classification.
        rows: that choose, in each draw.
        draws: for each seed.
        bootstraps: the same for a run's own rule, which draws thousands of times itself.

    Raises:
        DataError: so many rows leave none to judge, or too few to choose.
    """
    examples = min(one.examples for one in seeds)
    if not FEWEST <= rows < examples:
        raise DataError(
            f"--rows is {rows}, but there are {examples} test rows, of which at least {FEWEST} choose and at least one judges; "
            "give another --rows, or more test rows"
        )
    names = [name for name in seeds[0].losses if all(name in seed.losses for seed in seeds)]
    rules: dict[str, tuple[Rule | None, int]] = {f"always {name}": (partial(_always, name), draws) for name in names}
    rules |= {title: (rule, draws) for title, rule in RULES.items()}
    rules["a run's"] = (None, bootstraps)
    found = []
    for title, (rule, times) in rules.items():
        random = np.random.default_rng(
            seed
        )  # the same rows for every rule; a run's, with fewer draws, has others from seed 2 on
        gains, chosen = [], Counter[str]()
        for one in seeds:
            for _ in range(times):
                choosing = np.zeros(one.examples, dtype=bool)
                choosing[random.choice(one.examples, rows, replace=False)] = True
                losses, scores = _of(one.losses, choosing), _of(one.scores, choosing)
                groups = None if one.groups is None else one.groups[choosing]
                name = rule(losses, scores) if rule else a_runs(losses, scores, groups, labels)
                judged = {key: float(values[~choosing].mean()) for key, values in one.scores.items()}
                parent = max(judged[key] for key in PARENTS if key in judged)
                gains.append((judged[name], judged[name] - judged["continued"], judged[name] - parent))
                chosen[name] += 1
        score, against, parents = np.mean(gains, axis=0)
        often = ", ".join(f"{name} {100 * times / chosen.total():.0f} %" for name, times in chosen.most_common())
        found.append([title, f"{score:.1f}", f"{against:+.2f}", f"{parents:+.2f}", often])
    return found


def _always(name: str, losses: Values, scores: Values) -> str:
    return name


def _of(values: Values, mask: np.ndarray) -> dict[str, np.ndarray]:
    return {name: own[mask] for name, own in values.items()}


def design_effects(seeds: Sequence[Seed], groups: Sequence[str]) -> str:
    """The mean over seeds and candidates (each minus `continued`) of the design effect, of losses and of scores, as a line."""
    numbers = np.unique(np.array(groups), return_inverse=True)[1]
    found = []
    for kind in ("losses", "scores"):
        effects = []
        for one in seeds:
            values: dict[str, np.ndarray] = getattr(one, kind)
            for name in values.keys() - {"continued"}:
                apart = values[name] - values["continued"]
                apart = apart - apart.mean()
                if apart.any():  # two systems may answer alike throughout
                    effects.append(float((np.bincount(numbers, apart) ** 2).sum() / (apart**2).sum()))
        if effects:
            found.append(f"{kind} {np.mean(effects):.2f} ({min(effects):.2f} to {max(effects):.2f})")
    return f"Design effect of {numbers.max() + 1} groups of {len(groups)} rows: {', '.join(found)}"


def on_record(session: Session, folder: Path, seeds: tuple[int, ...]) -> list[Seed]:
    """The test rows' losses and first score of every candidate and seed; the tables of the comparison stay as they are.

    Raises:
        DataError: a method has no result.
    """
    metric, on = main_metric(list(session.metrics)), session.recipe.target.on
    named = {method: name for method, name in CANDIDATES.items() if on in (None, AUTO) or name != "target"}
    settings = ComparisonSettings(methods=tuple(named), seeds=seeds)
    with working_in(folder) as place:
        place.begin(shared=True)
        work = Work(prepared(session, folder, settings), place, settings)
        work.run_all(Bench)
    for method in named:
        if (reason := work.rows[method].unavailable) is not None:
            raise DataError(f"{method} has no result in {folder}: {reason}; no rule can choose without it")
    outcomes = {name: work.rows[method].by_number for method, name in named.items()}
    groups, found = np.array(group_numbers(work.session.splits.test)), []
    for seed in seeds:
        summed = outcomes["merged"][seed].merge == SUM
        own = {name: by[seed] for name, by in outcomes.items() if name != "target" or not summed}
        losses = {name: np.array(one.losses.result["losses"]) for name, one in own.items()}
        scores = {name: np.array(one.scores.result[metric]["per_example"]) for name, one in own.items()}
        found.append(Seed(losses, scores, groups))
    return found


def of_runs(folders: Sequence[Path]) -> tuple[str, list[Seed]]:
    """The first metric, and the test rows of each finished run; without `continued` the source adapter stands in its place."""
    found, metric = [], ""
    for folder in folders:
        systems = read_metrics(folder).systems
        metric = main_metric(list(systems["grasp"].metrics))
        losses, scores = {}, {}
        for name in CANDIDATES.values():
            if name == "target" and name not in systems:
                continue  # trained on the source adapter: it is the merge
            file = predictions_file(folder, name if name in systems else "source")
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            losses[name] = np.array([row["loss"] for row in rows])
            scores[name] = np.array([row["scores"][metric] for row in rows])
        facts = read_record(folder / DATA_FILE, DataFacts)
        groups = np.array(facts.test_groups) if facts is not None and facts.test_groups else None
        found.append(Seed(losses, scores, groups))
    return metric, found


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the records and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--output", type=Path, help="folder of a comparison")
    parser.add_argument("--runs", type=Path, nargs="+", help="folders of finished runs, in place of a comparison")
    parser.add_argument("--seeds", default="42,1337,9001", help="separated by commas")
    parser.add_argument("--set", action="append", default=[], help="as of grasp-lora compare")
    parser.add_argument("--rows", type=int, default=50, help="that choose")
    parser.add_argument("--draws", type=int, default=300, help="for each seed")
    given = parser.parse_args(arguments)
    log_to_terminal(False)
    if bool(given.runs) == bool(given.recipe and given.output):
        parser.error("give a recipe and --output, or --runs")
    try:
        if given.runs:
            metric, seeds = of_runs(given.runs)
        else:
            session = Session(*load_recipe(given.recipe, given.set))
            check(session)
            metric = main_metric(list(session.metrics))
            seeds = on_record(session, given.output, tuple(int(seed) for seed in given.seeds.split(",")))
        found = replay(seeds, given.rows, given.draws, bootstraps=min(given.draws, 60), labels=metric == "accuracy")
    except GraspError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if not given.runs:
        sys.stdout.write(design_effects(seeds, [example.group for example in session.splits.test]) + "\n\n")
    sys.stdout.write(
        table(["rule", metric, "minus continued", "minus best parent or merge", "hands over"], found) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
