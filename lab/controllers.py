"""Judge controllers on recorded landscapes: which prune ratio each would have chosen, what it is worth and what it cost.

    python lab/controllers.py FOLDER/landscape.parquet... --seeds 200 --output controllers.json
    python lab/controllers.py FOLDER/landscape.parquet... --signals

Landscapes come from `record.py`. No model is loaded: policies are replayed on the recorded losses, and so are the
rivals that choose among final runs. Tables go to standard output as Markdown. With --signals, another question: which
signal, at which moment of training, ranks ratios as the final loss does? What the figures mean and where a replay can mislead:
lab/controllers.md.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from controllers_rivals import (
    BUDGETS,
    FIXED,
    GRID,
    RUNGS,
    Choice,
    Setting,
    best_of,
    brent_trials,
    cma_trials,
    drawn_examples,
    fixed,
    grid,
    halving,
    total,
    tpe_trials,
)
from landscape import Cost, Floats, Landscape
from smoothing import smooth

from grasp_lora.errors import GraspError
from grasp_lora.method.rules import RatioEstimate, Round
from grasp_lora.method.search import (
    GOLDEN,
    ON_MICRO_DEV,
    Controller,
    Decision,
    RatioPolicy,
    RatioSearch,
    Rounds,
    policy_class,
    preset,
)

RESAMPLES = 2000
FRACTIONS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)  # of training, for signals
MEASURES = (("dev", "smooth"), ("dev", "recorded"), ("test", "smooth"), ("test", "recorded"))
# Rivals that propose final runs: their package, and how to get it.
PROPOSERS = {
    "Optuna TPE": (tpe_trials, "optuna", "optuna"),
    "CMA-ES": (cma_trials, "cma", "grasp-lora[compare]"),
    "Brent's method": (brent_trials, "scipy", "grasp-lora"),
}

Contestant = Callable[[Setting, int], Choice]


@dataclass(frozen=True)
class Even(RatioPolicy):
    """Candidates spread evenly over the range, each round beginning at another place: that of the former preset `spread`."""

    regime = "each_step"

    def draw(self, search: RatioSearch, generator: random.Random) -> list[float]:
        width = (self.ratio_max - self.ratio_min) / self.candidates
        offset = (random.Random(f"{self.seed}/candidates").random() + len(search.history) * GOLDEN) % 1.0
        return [self.ratio_min + (place + offset) * width for place in range(self.candidates)]

    def decide(self, search: RatioSearch, measured: Round) -> Decision:
        ratio = search.best_ratio(interval=False).ratio
        return Decision(measured.rewards, ratio != search.current_ratio, ratio)


# What `--policy` begins with, and its title where that says it better.
CONTROLLERS = {
    "grasp": preset("grasp"),
    "grasp_on_micro_dev": ON_MICRO_DEV,
    "paper": preset("paper"),
    "even": Controller(Even(candidates=2), Rounds("epoch", at_ends=True, pool="dev", in_turn=12, patience=1)),
}
TITLES = {
    "grasp": "preset grasp",
    "grasp_on_micro_dev": "preset grasp without dev rows, on micro-dev",
    "paper": "preset paper",
    "even": "even proposals (preset spread as it was)",
}


@dataclass(frozen=True)
class Plan:
    """A controller, and on what it is replayed.

    Args:
        controller: policy, rounds and rule. A pool other than `micro_dev` needs a policy that holds no ratio and a landscape with
            a shared trajectory on dev.
        size: micro-dev examples, drawn with replacement from the recorded ones. None draws as many as there are.
    """

    controller: Controller
    size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            raise ValueError(f"size is {self.size!r}; it must be a whole number, at least 1")
        if self.on_dev and self.controller.policy.regime == "held":
            raise ValueError(
                f"pool is {self.controller.rounds.pool}; dev was measured along the trajectory of all ratios only: take a policy "
                "that holds none"
            )

    @property
    def on_dev(self) -> bool:
        """Whether rounds measure dev."""
        return self.controller.rounds.pool != "micro_dev"


def replay(landscape: Landscape, plan: Plan, seed: int) -> tuple[RatioEstimate, Cost]:
    """Let a policy run through a recorded training.

    It starts at its own first ratio. In each round it is asked for candidates, gets the recorded losses of a network trained at
    its current ratio, and commits as it likes. A policy that holds no ratio gets those of the shared trajectory.

    Args:
        landscape: the recorded losses.
        plan: the policy, whose seed is replaced, and its rounds.
        seed: of the policy, and of the micro-dev examples: as many are drawn with replacement as there are.

    Returns:
        The learned ratio, and the cost of the controller run.
    """
    rounds = plan.controller.rounds
    search = RatioSearch(replace(plan.controller.policy, seed=seed), plan.controller.rule)
    pool = pool_of(landscape, rounds.pool, seed, plan.size)
    last, facts = landscape.last_step, landscape.facts
    every = rounds.every
    if every == "epoch":
        every = round(last * facts["examples"]["train"] / facts["trained_examples"])
    measured = 0
    for number, step in enumerate(rounds.round_steps(last, every)):
        current, candidates = search.current_ratio, tuple(search.ask())
        train_ratio = current if search.policy.regime == "held" else None
        baseline, *others = (pool(train_ratio, step, ratio) for ratio in (current, *candidates))
        size, places = len(baseline), None
        if (turn := rounds.turn(size)) is not None:
            places = tuple((number * turn + place) % size for place in range(turn))
            others = [losses[list(places)] for losses in others]
            baseline = baseline if plan.controller.compares_rounds else baseline[list(places)]
        measured += len(baseline) + len(set(candidates)) * len(others[0])  # a controller measures no candidate twice
        told = tuple(tuple(losses.tolist()) for losses in others)
        search.tell(Round(current, candidates, tuple(baseline.tolist()), told, places))
        if rounds.patience is not None and search.rounds_since_best >= rounds.patience:
            break
    else:
        step = last
    training = landscape.controller_cost(0) * (step / last)
    return search.best_ratio(interval=False), training + Cost(0, measured)


def pool_of(
    landscape: Landscape, name: str, seed: int, size: int | None = None
) -> Callable[[float | None, float, float], Floats]:
    """The losses of the examples of a pool, in the order of a seed, as a function of committed ratio, step and ratio.

    The micro-dev examples are drawn with replacement, `size` or as many as there are; those of dev are all there, as they are
    for rivals that choose by dev loss.

    Raises:
        GraspError: there is no shared trajectory on dev.
    """
    micro_dev, on_dev = drawn_examples(landscape, seed, size), landscape.shared_dev
    if name == "micro_dev":
        return lambda train_ratio, step, ratio: landscape.probe(train_ratio, step, ratio)[micro_dev]
    if on_dev is None:
        raise GraspError(f"a landscape has no shared trajectory on dev, which pool={name} needs; record it with --dev")

    def both(train_ratio: float | None, step: float, ratio: float) -> Floats:
        parts = [on_dev.at(step, ratio)] + ([landscape.probe(None, step, ratio)[micro_dev]] if name == "both" else [])
        losses = np.concatenate(parts)
        return losses[np.random.default_rng(seed).permutation(len(losses))]

    return both


# Contestants


def learned(plan: Plan, setting: Setting, seed: int) -> Choice:
    """A policy's ratio after a controller run."""
    estimate, cost = replay(setting.landscape, plan, seed)
    return Choice(estimate.ratio, cost + setting.landscape.final_cost(estimate.ratio))


def contestants(settings: Sequence[Setting], extra: Sequence[str] = ()) -> tuple[dict[str, Contestant], list[str]]:
    """All contestants by name, and what had to be left out.

    Args:
        settings: on which they will be judged.
        extra: more policies, each one of `CONTROLLERS` and changes to it: `paper,candidates=5`; see `plan_of`.

    Raises:
        GraspError: an extra one is none.
    """
    plans = {TITLES[name]: Plan(one) for name, one in CONTROLLERS.items()} | {text: plan_of(text) for text in extra}
    found: dict[str, Contestant] = {}
    missing: list[str] = []
    shared, on_dev = (
        all(getattr(one.landscape, name) is not None for one in settings) for name in ("shared", "shared_dev")
    )
    for name, plan in plans.items():
        if not shared and plan.controller.policy.regime == "each_step":
            missing.append(f"{name} is left out: not every landscape has a shared trajectory.")
        elif not on_dev and plan.on_dev and name not in extra:
            missing.append(f"{name} is left out: not every landscape has a shared trajectory on dev.")
        else:
            found[name] = partial(learned, plan)
    found[f"fixed {FIXED}"] = partial(fixed, FIXED)
    found["grid of 8, by dev"] = partial(grid, "dev")
    found["grid of 8, by micro-dev"] = partial(grid, "micro_dev")
    for name, (trials, package, extra_name) in PROPOSERS.items():
        if find_spec(package) is None:
            missing.append(f'{name} is left out: {package} is not installed (pip install "{extra_name}").')
        else:
            found |= {f"{name}, {budget} final runs": partial(best_of, trials, budget) for budget in BUDGETS}
    found |= {f"successive halving of {2**rungs}": partial(halving, rungs) for rungs in RUNGS}
    return found, missing


def plan_of(text: str) -> Plan:
    """Read `NAME,KEY=VALUE,...`, a name of `CONTROLLERS`; the keys are those of its policy and rounds, `kind`, `rule` and `size`.

    `turn` is short for `in_turn`.

    Raises:
        GraspError: there is no such controller or setting, or a value is not allowed.
    """
    name, *changes = text.split(",")
    try:
        if name not in CONTROLLERS:
            raise ValueError(f"there is no {name!r}; allowed: {', '.join(CONTROLLERS)}")
        base = CONTROLLERS[name]
        values = {key: yaml.safe_load(value) for key, value in (one.split("=", 1) for one in changes)}
        values = {"in_turn" if key == "turn" else key: value for key, value in values.items()}
        size, rule, kind = (
            values.pop(key, usual) for key, usual in (("size", None), ("rule", base.rule), ("kind", None))
        )
        rounds = {one.name: values.pop(one.name) for one in fields(Rounds) if one.name in values}
        policy = replace(base.policy, **values) if kind is None else policy_class(kind)(**values)
        return Plan(Controller(policy, replace(base.rounds, **rounds), rule), size)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise GraspError(f"--policy {text}: {error}; write NAME,KEY=VALUE,...") from error


# Figures of merit


def judge(settings: Sequence[Setting], rivals: dict[str, Contestant], seeds: int) -> dict[str, Any]:
    """Let every contestant choose on every setting with every seed; return all figures as plain JSON values."""
    rows = {}
    for name, contestant in rivals.items():
        choices = [[contestant(setting, seed) for seed in range(seeds)] for setting in settings]
        rows[name] = figures(settings, choices)
    optima = {
        one.name: {
            split: {"ratio": fit.ratio, "loss": fit.loss, "degree": fit.degree} for split, fit in one.smooth.items()
        }
        for one in settings
    }
    return {"seeds": seeds, "optima": optima, "contestants": rows}


def figures(settings: Sequence[Setting], choices: Sequence[Sequence[Choice]]) -> dict[str, Any]:
    """The figures of one contestant; `choices` is [settings][seeds]."""
    ratios = np.array([[choice.ratio for choice in row] for row in choices])
    costs = np.array(
        [[(c.cost.trained_examples, c.cost.measured_examples, c.cost.work) for c in row] for row in choices]
    )
    grids = np.array([total(one.landscape.final_cost(ratio) for ratio in GRID).work for one in settings])
    regrets = {}
    for split, against in MEASURES:
        values = np.array(
            [[one.regret(ratio, split, against) for ratio in row] for one, row in zip(settings, ratios, strict=True)]
        )
        low, high = interval(values)
        regrets[f"{split}_{against}"] = {
            "mean": float(values.mean()), "low": low, "high": high, "by_setting": values.mean(1).tolist(),
        }  # fmt: skip
    return {
        "regret_percent": regrets,
        "ratio_sd": float(ratios.std(1).mean()),
        "ratio_sd_by_setting": ratios.std(1).tolist(),
        "ratio_mean_by_setting": ratios.mean(1).tolist(),
        "trained_examples": float(costs[..., 0].mean()),
        "measured_examples": float(costs[..., 1].mean()),
        "work": float(costs[..., 2].mean()),
        "share_of_grid": float((costs[..., 2] / grids[:, None]).mean()),
        "ratios": ratios.round(6).tolist(),
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean: settings are drawn with replacement, then the seeds of each; [settings, seeds]."""
    count, seeds = values.shape
    generator = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        rows = generator.integers(count, size=(count, 1))
        means.append(values[rows, generator.integers(seeds, size=(count, seeds))].mean())
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return low, high


# Signals


def signals(landscape: Landscape) -> dict[str, dict[str, tuple[tuple[int, ...], tuple[float, ...], Floats]]]:
    """Every signal along every trajectory: trajectory -> signal -> (steps, ratios, [steps, ratios]).

    `own` is the network that was trained at the very ratio, between the committed ones: what a reward would see if each candidate
    had been in force from the beginning.
    """
    found: dict[str, tuple[tuple[int, ...], tuple[float, ...], Floats]] = {}
    for one in (*([landscape.shared] if landscape.shared else []), *landscape.committed):
        name = "shared" if one.train_ratio is None else f"trained at {one.train_ratio:g}"
        found[name] = (one.steps, one.ratios, one.losses.mean(2))
    if len(landscape.committed) > 1:
        one = landscape.committed[0]
        own = [[landscape.probe(ratio, step, ratio).mean() for ratio in one.ratios] for step in one.steps]
        found["own"] = (one.steps, one.ratios, np.array(own))
    return {
        name: {signal: (steps, ratios, rule(curves)) for signal, rule in SIGNALS.items()}
        for name, (steps, ratios, curves) in found.items()
    }


def running_mean(curves: Floats) -> Floats:
    return np.cumsum(curves, axis=0) / np.arange(1, len(curves) + 1)[:, None]


def late_half(curves: Floats) -> Floats:
    return np.array([curves[(last + 1) // 2 : last + 1].mean(0) for last in range(len(curves))])


SIGNALS: dict[str, Callable[[Floats], Floats]] = {
    "immediate": lambda curves: curves,
    "running mean": running_mean,
    "running minimum": lambda curves: np.minimum.accumulate(curves, axis=0),
    "mean of the late half": late_half,
}


def judge_signals(settings: Sequence[Setting]) -> dict[str, Any]:
    """Rank correlation and regret of every signal: `trajectory / signal` -> setting -> lists over FRACTIONS of training."""
    rows: dict[str, Any] = {}
    for one in settings:
        for trajectory, by_signal in signals(one.landscape).items():
            for signal, (steps, ratios, values) in by_signal.items():
                final = [one.landscape.final_loss(ratio, "dev") for ratio in ratios]
                moments = [int(np.argmin(np.abs(np.array(steps) / steps[-1] - fraction))) for fraction in FRACTIONS]
                chosen = [smooth(ratios, values[moment], one.low, one.high).ratio for moment in moments]
                rows.setdefault(f"{trajectory} / {signal}", {})[one.name] = {
                    "spearman": [spearman(values[moment], final) for moment in moments],
                    "ratio": chosen,
                    "regret_percent": [one.regret(ratio, "dev", "smooth") for ratio in chosen],
                }
    return {"fractions": list(FRACTIONS), "signals": rows}


def spearman(first: Sequence[float] | Floats, second: Sequence[float] | Floats) -> float:
    """Rank correlation; 0 where one of the two ranks nothing."""
    ranks = []
    for values in (np.asarray(first), np.asarray(second)):
        below, same = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
        ranks.append(below + (same - 1) / 2)
    if not all(rank.std() for rank in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


# Tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def merit_tables(found: dict[str, Any]) -> str:
    """The table over settings and the one by setting."""
    header = [
        "contestant", "dev regret % (smooth)", "dev regret % (recorded)", "test regret % (smooth)",
        "test regret % (recorded)", "sd of ratio", "trained examples", "forwards", "total", "of the grid",
    ]  # fmt: skip
    rows = []
    for name, row in found["contestants"].items():
        cells = [row["regret_percent"]["_".join(measure)] for measure in MEASURES]
        rows.append([
            name, *(f"{cell['mean']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})" for cell in cells),
            f"{row['ratio_sd']:.3f}", f"{row['trained_examples']:.0f}", f"{row['measured_examples']:.0f}",
            f"{row['work']:.0f}", f"{100 * row['share_of_grid']:.0f} %",
        ])  # fmt: skip
    names = list(found["optima"])
    by_setting = [
        [f"*lowest smooth {split} loss*", *(f"at {found['optima'][name][split]['ratio']:.2f}" for name in names)]
        for split in ("dev", "test")
    ]
    for name, row in found["contestants"].items():
        triples = zip(
            row["regret_percent"]["dev_smooth"]["by_setting"], row["ratio_mean_by_setting"], row["ratio_sd_by_setting"],
            strict=True,
        )  # fmt: skip
        by_setting.append([name, *(f"{regret:.2f} (at {mean:.2f} ± {sd:.2f})" for regret, mean, sd in triples)])
    return f"{table(header, rows)}\n\nDev regret % (smooth) by setting, with the ratio and its sd:\n\n" + table(
        ["contestant", *names], by_setting
    )


def signal_tables(found: dict[str, Any]) -> str:
    """One table of rank correlations and one of regrets, mean over settings."""
    header = ["trajectory / signal", *(f"{100 * fraction:.0f} %" for fraction in found["fractions"])]
    texts = []
    for key, title, form in (
        ("spearman", "Rank correlation with the final dev loss, by fraction of training", "{:+.2f}"),
        ("regret_percent", "Dev regret % (smooth) at the signal's lowest ratio", "{:.2f}"),
        ("ratio", "The signal's lowest ratio", "{:.2f}"),
    ):
        rows = [
            [name, *(form.format(value) for value in np.mean([one[key] for one in by_setting.values()], axis=0))]
            for name, by_setting in found["signals"].items()
        ]
        texts.append(f"{title}, mean over settings:\n\n{table(header, rows)}")
    return "\n\n".join(texts)


def name_of(file: Path) -> str:
    """The file's own name, or that of its folder if it is called as `record.py` calls all of them."""
    return file.resolve().parent.name if file.stem == "landscape" else file.stem


def main() -> int:
    """Read the landscapes, judge, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--signals", action="store_true", help="judge signals instead of contestants")
    parser.add_argument("--policy", action="append", default=[], help="one more policy: NAME,KEY=VALUE,...")
    parser.add_argument("--output", type=Path, help="write all figures as JSON")
    arguments = parser.parse_args()
    try:
        settings = [Setting(name_of(file), Landscape.load(file)) for file in arguments.files]
        if len({one.name for one in settings}) < len(settings):
            raise GraspError("two landscapes have the same name; give each file a name of its own")
        rivals, missing = contestants(settings, arguments.policy)
        if arguments.signals:
            found = judge_signals(settings)
            text = signal_tables(found)
        else:
            found = judge(settings, rivals, arguments.seeds)
            text = "\n\n".join([merit_tables(found), *missing])
    except GraspError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(text + "\n")
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
