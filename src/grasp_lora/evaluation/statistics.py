"""How sure a comparison is: mean and spread over seeds, and the paired bootstrap over test examples.

All methods of a comparison answered the same test examples, so it is the examples that are drawn again, the same ones for
every method; how hard they happen to be cancels out.
"""

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

from grasp_lora.errors import DataError

# What one method got: a value per test example; or such a list per run (seed); or per run and example a row of statistics.
Runs = Sequence[float] | Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]]

_CHUNK = 2**24  # drawn examples held at once; a float64 each
_DECIMALS = 9  # of a difference: sums in floating point must not turn a tie into a win


@dataclass(frozen=True)
class PairedComparison:
    """One method against another on the same examples.

    Args:
        difference: score of ours minus score of theirs.
        low, high: bounds of the difference; see `comparisons`.
        confidence: level in (0, 1) of the interval, or of all intervals of the comparison jointly.
        examples: test examples behind it.
        resamples: how often they were drawn.
        comparisons: how many differences are looked at together.
        higher_is_better: False for a loss.
        by_run: the difference of each run (seed), where both have as many and more than one; the interval holds their spread.
    """

    difference: float
    low: float
    high: float
    confidence: float
    examples: int
    resamples: int
    comparisons: int = 1
    higher_is_better: bool = True
    by_run: tuple[float, ...] = ()

    @property
    def verdict(self) -> str:
        """What the interval shows of ours: "better", "worse", or "no difference shown" where it holds 0."""
        if self.low <= 0.0 <= self.high:
            return "no difference shown"
        return "better" if (self.low > 0.0) == self.higher_is_better else "worse"


def half_width(sd: float, examples: int, comparisons: int = 1, groups: int | None = None) -> float:
    """Return how far an interval of a mean difference at 95 % reaches to each side (Student's, Bonferroni).

    Args:
        sd: standard deviation over examples of the difference.
        examples: at least 2.
        comparisons: how many differences are looked at together, whose intervals then hold jointly.
        groups: how many groups the examples form, at least 2; None: each is by itself.

    >>> round(half_width(26.0, 1000), 2), round(half_width(26.0, 1000, 3), 2)
    (1.61, 1.97)
    """
    tail = 0.025 / comparisons
    return float(-stdtrit((groups or examples) - 1, tail)) * sd / math.sqrt(examples)


def compare_with_baselines(
    ours: Runs,
    baselines: Mapping[str, Runs],
    *,
    groups: Sequence[Hashable] | None = None,
    together: Collection[str] | None = None,
    corpus_score: Callable[[Tensor], Tensor] | None = None,
    higher_is_better: bool = True,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, PairedComparison]:
    """Compare one method with each baseline by the paired bootstrap, corrected for the number of those looked at together.

    Test examples are drawn with replacement, the same ones for all methods, and in whole groups of those that belong together:
    two systems differ alike on the questions of one article, so single draws would make the interval too narrow. Runs are
    averaged within a draw: each example's values where the score is a mean over examples, the corpus scores of the runs
    otherwise. The interval is about other examples of this kind and, with two runs or more, about other seeds; with one run it is
    about this run. With m baselines together:

    - Draws of few examples spread too little. So each one's distance from the observed difference is widened by what separates
      Student's interval of a mean from the percentile one of normal draws at its level, and is never less than Student's.
    - The interval is the percentile interval at 1 - (1 - confidence) / m (Bonferroni), so all of them hold at once.
    - The spread of the runs' differences widens the interval: its variance is added, and Student's degrees of freedom are those
      of the sum (Satterthwaite). Two runs that disagree in sign never show a difference.
    - Where n groups would say nothing even if all agreed, m 2^(1 - n) > 1 - confidence (the exact test by signs), the
      interval is stretched to hold 0.

    >>> compare_with_baselines([3.0, 2.0, 4.0, 3.0, 4.0, 3.0], {"grid": [1.0, 2.0, 1.0, 2.0, 2.0, 0.0]})["grid"].verdict
    'better'

    Args:
        ours: the method's runs; the values of a single run, or ones already averaged, may come without the outer list.
        baselines: the same of each method by name; the number of runs may differ, examples and their order may not.
        groups: what each example belongs to, such as its article; None takes each by itself.
        together: the baselines that are corrected for each other; each other one is taken alone. None takes all.
        corpus_score: for a score that is no mean, a function from summed statistics [..., k] to scores [...], such as
            `Metric.from_statistics`; an example is then a row of k statistics.
        higher_is_better: False for a loss; it decides the verdict only.
        resamples: how many draws, at least 2 m / (1 - confidence) - 1.
        confidence: in (0, 1).
        seed: of the draws.

    Raises:
        DataError: the examples of a method are fewer than two, or hold a value that is not finite.

    Source: Efron & Tibshirani 1993, chapter 13; Koehn 2004 for the resampling of test sets; Hesterberg 2015 for the widening;
    Davison & Hinkley 1997, section 3.8 for draws of whole groups; Satterthwaite 1946. Simulated in `lab/seeds.py`.
    """
    if not baselines:
        return {}
    corrected = [name for name in baselines if together is None or name in together]
    counts = [len(corrected) if name in corrected else 1 for name in baselines]
    tails = torch.tensor([(1.0 - confidence) / 2.0 / count for count in counts], dtype=torch.float64)
    outside = (tails * (resamples + 1) + 1e-9).floor().long()  # draws beyond a bound, the bound included
    mine, my_runs = _statistics("ours", ours, corpus_score)
    read = {name: _statistics(name, runs, corpus_score) for name, runs in baselines.items()}
    others = {name: values for name, (values, _) in read.items()}
    examples = mine.shape[1]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups or ()))}
    members = torch.tensor([numbers[name] for name in groups] if groups else range(examples))
    units = len(numbers) or examples

    def differences(weights: Tensor) -> Tensor:
        """Ours minus each of the others [draws, methods] when example i counts weights[:, i] times."""
        drawn = weights.sum(dim=1)[:, None]
        evaluate = corpus_score or (lambda sums: sums[..., 0] / drawn)
        scores = [evaluate(torch.einsum("de,rek->drk", weights, of)).mean(dim=1) for of in (mine, *others.values())]
        return torch.stack([scores[0] - score for score in scores[1:]], dim=1).round(decimals=_DECIMALS) + 0.0

    center = differences(torch.ones(1, examples, dtype=torch.float64))
    observed = center[0].tolist()
    draws = torch.cat([differences(weights[:, members]) for weights in _draws(units, examples, resamples, seed)])
    draws = draws.sort(dim=0).values
    units = max(2, units)  # a single group says nothing, as two do
    student, widening = _student(units, resamples)
    reach = student * draws.std(dim=0, correction=0)
    below = torch.minimum(widening * (draws[: len(reach)] - center), -reach)
    above = torch.maximum(widening * (draws.flip(0)[: len(reach)] - center), reach)
    below, above = ((center + bound).round(decimals=_DECIMALS) + 0.0 for bound in (below, above))
    below, above = below.cummax(dim=0).values, above.cummin(dim=0).values
    low, high = (bounds.gather(0, outside[None] - 1)[0] for bounds in (below, above))
    of_rows = (draws.var(dim=0, correction=0) * units / (units - 1)).tolist()
    by_run = [my_runs - runs if len(runs) == len(my_runs) > 1 else my_runs[:0] for _, runs in read.values()]
    held = [
        _with_spread_of_runs([paired] if len(paired) else [my_runs, runs], rows, units - 1, tail)
        for paired, (_, runs), rows, tail in zip(by_run, read.values(), of_rows, tails.tolist(), strict=True)
    ]
    wider, least = torch.tensor(held, dtype=torch.float64).T
    low = torch.minimum(center[0] - wider * (center[0] - low), center[0] - least).round(decimals=_DECIMALS) + 0.0
    high = torch.maximum(center[0] + wider * (high - center[0]), center[0] + least).round(decimals=_DECIMALS) + 0.0
    silent = 2.0 ** (1 - units) > 2.0 * tails
    lows = torch.where(silent, low.clamp(max=0.0), low).tolist()
    highs = torch.where(silent, high.clamp(min=0.0), high).tolist()
    return {
        name: PairedComparison(
            difference=observed[index],
            low=lows[index],
            high=highs[index],
            confidence=confidence,
            examples=examples,
            resamples=resamples,
            comparisons=counts[index],
            higher_is_better=higher_is_better,
            by_run=tuple(by_run[index].round(decimals=_DECIMALS).tolist()),
        )
        for index, name in enumerate(others)
    }


def compare_all_pairs(
    runs: Mapping[str, Runs], *, confidence: float = 0.95, resamples: int = 10_000, **settings: Any
) -> dict[tuple[str, str], PairedComparison]:
    """Compare each of several systems with each other one, so that all intervals hold at once (Bonferroni over the pairs).

    Nobody has said beforehand which two matter: the best is found on the same examples. Corrected for all pairs, systems that are
    alike come out with any verdict in at most one of 1 / (1 - confidence) judgements.

    Args:
        runs: at least two systems by name, as `compare_with_baselines` takes them.
        confidence: of all intervals together, in (0, 1).
        resamples: how many draws at least; of many pairs the tails are thin, and more draws are made.
        settings: `groups`, `corpus_score`, `higher_is_better` and `seed` of `compare_with_baselines`.

    Returns:
        The first minus the second of each pair, in the order of the names.

    >>> values = {"a": [3.0] * 8, "b": [1.0, 2.0, 1.0, 2.0, 2.0, 0.0, 1.0, 2.0], "c": [3.0] * 8}
    >>> [comparison.verdict for comparison in compare_all_pairs(values).values()]
    ['better', 'no difference shown', 'worse']
    """
    names, compared = list(runs), dict[tuple[str, str], PairedComparison]()
    pairs = len(names) * (len(names) - 1) // 2
    resamples = max(resamples, math.ceil(2 * pairs / (1 - confidence)))
    for place, name in enumerate(names[:-1], start=1):
        each = compare_with_baselines(
            runs[name],
            {later: runs[later] for later in names[place:]},
            together=(),
            confidence=1 - (1 - confidence) / pairs,
            resamples=resamples,
            **settings,
        )
        compared |= {(name, later): comparison for later, comparison in each.items()}
    return {
        pair: replace(comparison, confidence=confidence, comparisons=pairs) for pair, comparison in compared.items()
    }


def _with_spread_of_runs(runs: Sequence[Tensor], of_rows: float, freedom: int, tail: float) -> tuple[float, float]:
    """How many times as wide an interval is that holds the spread of runs, too, and half of Student's interval at that spread.

    Args:
        runs: the differences of the runs, or both methods' scores where they have not as many.
        of_rows: variance of the difference over draws of the rows, `freedom` its degrees of freedom.
        tail: probability beyond one bound.
    """
    spreads = [(float(of.var()) / len(of), len(of) - 1) for of in runs if len(of) > 1]
    total = of_rows + sum(variance for variance, _ in spreads)
    if total == of_rows:
        return 1.0, 0.0
    shares = [(of_rows, freedom), *spreads]
    both = total**2 / sum(variance**2 / degrees for variance, degrees in shares)
    alone, half = (-stdtrit(degrees, tail) * math.sqrt(of) for degrees, of in ((freedom, of_rows), (both, total)))
    return max(1.0, half / alone) if alone else 1.0, half


def _statistics(name: str, runs: Runs, corpus_score: "Callable[[Tensor], Tensor] | None") -> tuple[Tensor, Tensor]:
    """Turn the runs of a method into float64 [runs, examples, k], k being 1 where the score is a mean, and the score of each."""
    values = torch.tensor(runs, dtype=torch.float64)
    if values.dim() == (1 if corpus_score is None else 2):
        values = values.unsqueeze(0)
    shaped = values.dim() == (2 if corpus_score is None else 3)
    if not shaped or values.shape[1] < 2 or not bool(values.isfinite().all()):
        raise DataError(
            f"the values of {name} have shape {list(values.shape)}; give each run a finite number, or a row of statistics, "
            "for each of at least 2 test examples"
        )
    if corpus_score is not None:
        return values, corpus_score(values.sum(dim=1))
    # Averaged first, so that a method of several runs costs no more than one.
    return values.mean(dim=0, keepdim=True).unsqueeze(-1), values.mean(dim=1)


@lru_cache(maxsize=16)
def _student(units: int, resamples: int) -> tuple[Tensor, Tensor]:
    """For the levels that the sorted draws are bounds of, from the outermost to the middle, each [half of draws, 1].

    Returns:
        Half of Student's interval of a mean, in standard deviations of the draws; and how much wider than the percentile interval
        of normal draws that is.
    """
    levels = torch.arange(1, (resamples + 1) // 2 + 1, dtype=torch.float64)[:, None] / (resamples + 1)
    tails = levels.clamp(max=0.499).numpy()  # the ratio is 0 / 0 at a half
    # The spread of draws has n where the standard error has n - 1.
    student = torch.from_numpy(-stdtrit(units - 1, tails)) * math.sqrt(units / (units - 1))
    return student, student / torch.from_numpy(-ndtri(tails))


def _draws(units: int, examples: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each example or group was drawn, in blocks [draws, units], bounded by the examples in them."""
    generator = torch.Generator().manual_seed(seed)
    block = max(1, _CHUNK // examples)
    for start in range(0, resamples, block):
        drawn = torch.randint(units, (min(block, resamples - start), units), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones_like(counts))
