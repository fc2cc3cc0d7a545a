"""Does an object of your own keep the contract of its kind? One call in a test: `check_policy(MyPolicy())`.

Each check raises AssertionError, in one line, where the contract is broken; the objects of this package pass them all.
"""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import wraps
from typing import ParamSpec, get_args

import torch

from grasp_lora.errors import GraspError
from grasp_lora.method.estimate import Rule, smooth_fit
from grasp_lora.method.importance import InputNorms, Score
from grasp_lora.method.lora import AdapterWeights, LoraPair, Segment
from grasp_lora.method.masks import GRANULARITIES, SCOPES, MaskSet, MaskSettings
from grasp_lora.method.merging import MergeRule, MergeSettings, merge
from grasp_lora.method.rounds import Round
from grasp_lora.method.search import RatioPolicy, RatioSearch, Regime
from grasp_lora.text.display import first_line

Given = ParamSpec("Given")

_ROUNDS, _EXAMPLES = 6, 4
_LOSSES: dict[str, Callable[[float, int, int], float]] = {  # of ratio, round and example
    "a valley": lambda ratio, number, example: (ratio - 0.55) ** 2 + 0.1 * example + 0.01 * number,
    "a plain": lambda ratio, number, example: 1.0,
    "huge numbers": lambda ratio, number, example: 3e38 * (-1) ** (number + example) * ratio,
}


def _in_one_line(check: Callable[Given, None]) -> Callable[Given, None]:
    """Let any error of the object that is checked be an AssertionError, which says where it came from."""

    @wraps(check)
    def checked(*args: Given.args, **kwargs: Given.kwargs) -> None:
        try:
            check(*args, **kwargs)
        except AssertionError:
            raise
        except Exception as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
            raise AssertionError(f"{check.__name__} could not go on: {problem}") from error

    return checked


@_in_one_line
def check_policy(policy: RatioPolicy, rule: Rule = smooth_fit) -> None:
    """Check a policy: frozen settings that survive JSON, draws that depend on seed and round alone, ratios within the bounds.

    Args:
        policy: with settings of your choice; it is checked within narrow bounds, too.
        rule: how a ratio is read off the rounds meanwhile.

    Raises:
        AssertionError: the contract is broken.
    """
    name = type(policy).__name__
    allowed = get_args(Regime)
    _require(policy.regime in allowed, f"{name}.regime is {policy.regime!r}; allowed: {', '.join(allowed)}")
    try:
        plain = json.loads(json.dumps(asdict(policy), allow_nan=False))
        again = json.loads(json.dumps(asdict(replace(policy, **plain))))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{name}: settings do not survive JSON: {error}") from error
    _require(again == plain, f"{name}: settings do not survive JSON: {again} is not {plain}")
    for bounded in (policy, replace(policy, ratio_min=0.2, ratio_max=0.3, ratio_init=0.3)):
        for kind, loss in _LOSSES.items():
            with _no_global_draws(name):
                _check_search(f"{name}, with {kind}", bounded, rule, loss)


def _check_search(name: str, policy: RatioPolicy, rule: Rule, loss: Callable[[float, int, int], float]) -> None:
    search, told = RatioSearch(policy, rule), []
    low, high = policy.ratio_min, policy.ratio_max
    for number in range(_ROUNDS):
        before = _state(search)
        candidates = search.ask()
        _require(len(candidates) == policy.candidates, f"{name}: {len(candidates)} candidates, not {policy.candidates}")
        _require(all(low <= one <= high for one in candidates), f"{name}: candidates {candidates} leave the bounds")
        _require(search.ask() == candidates, f"{name}: asked twice, round {number} has other candidates")
        for step in range(10):
            ratio = search.training_ratio(step)
            _require(low <= ratio <= high, f"{name}: step {step} trains at {ratio}, outside [{low}, {high}]")
            _require(search.training_ratio(step) == ratio, f"{name}: asked twice, step {step} trains at other ratios")
        _require(_state(search) == before, f"{name}: asking changes the search")
        told.append(_round(search.current_ratio, candidates, number, loss))
        with _broken(name):
            decision = search.tell(told[-1])
        _require(math.isfinite(search.mean), f"{name}: the mean is {search.mean} after round {number}")
        _require(0 < search.std < math.inf, f"{name}: the deviation is {search.std} after round {number}")
        _require(
            decision.committed or decision.ratio == told[-1].current_ratio,
            f"{name}: the ratio moves to {decision.ratio} although nothing is committed",
        )
        _require(decision.rewards == told[-1].rewards, f"{name}: the decision has other rewards than the round")
    resumed = RatioSearch(policy, rule)
    for one in told:
        resumed.tell(one)
    _require(_state(resumed) == _state(search), f"{name}: told the same rounds again, it is not as it was")
    _require(resumed.ask() == search.ask(), f"{name}: told the same rounds again, it asks for other candidates")


@contextmanager
def _broken(name: str) -> Iterator[None]:
    """Turn what the package itself refuses into the error of a suite."""
    try:
        yield
    except GraspError as error:
        raise AssertionError(f"{name}: {error}") from error


@_in_one_line
def check_rule(rule: Rule) -> None:
    """Check a rule: an estimate within the bounds from one round on, the same with and without an interval, of a clear valley.

    Raises:
        AssertionError: the contract is broken.
    """
    low, high, name = 0.1, 0.8, rule.name
    draw = random.Random(0)
    for kind, loss in _LOSSES.items():
        for count in (1, 2, 9):
            rounds = [_round(0.4, [draw.uniform(low, high) for _ in range(5)], number, loss) for number in range(count)]
            if rule.compares_rounds and count > 1:  # candidates on some examples, the baseline on all
                rounds[-1] = replace(rounds[-1], places=(1, 3), candidate_losses=_some(rounds[-1], (1, 3)))
            with _no_global_draws(name), _broken(name):
                found, quick = rule(rounds, low, high), rule(rounds, low, high, interval=False)
            where = f"{name}, {count} rounds of {kind}"
            _require(found == rule(rounds, low, high), f"{where}: called twice, it finds another ratio")
            _require(
                (found.rule, found.rounds) == (name, count), f"{where}: it says {found.rule}, {found.rounds} rounds"
            )
            _require(
                quick.low == quick.ratio == quick.high == found.ratio,
                f"{where}: without an interval it finds {quick.ratio}, with one {found.ratio}",
            )
            if kind == "a valley" and count > 2:
                _require(abs(found.ratio - 0.55) < 0.1, f"{where}: it finds {found.ratio}, the valley is at 0.55")
    if not rule.compares_rounds:
        rounds = [_round(0.4, [0.2, 0.5, 0.7], number, _LOSSES["a valley"]) for number in range(4)]
        moved = [_round(0.4, [0.2, 0.5, 0.7], number, lambda p, n, e: (p - 0.55) ** 2 + 8 * n) for number in range(4)]
        one, other = (rule(told, low, high, interval=False).ratio for told in (rounds, moved))
        _require(
            abs(one - other) < 0.01,
            f"{name}: the level of a round moves the ratio from {one} to {other}; set compares_rounds to True",
        )


@_in_one_line
def check_merge_rule(rule: MergeRule) -> None:
    """Check a merge rule: shapes, scaling 1, balance, the same bits each time, one adapter alone stays itself.

    Adapters that are kept apart need no balance.

    Raises:
        AssertionError: the contract is broken.
    """
    adapters = [_adapter(seed, 3, scaling) for seed, scaling in ((0, 2.0), (1, 0.5))]
    settings = MergeSettings(rule)
    before = [pair.A.clone() for one in adapters for pair in one.values()]
    with _no_global_draws("the merge rule"), _broken("the merge rule"):
        merged, twice = merge(adapters, settings), merge(adapters, settings)
    _require(
        all(
            torch.equal(old, pair.A)
            for old, pair in zip(before, (p for a in adapters for p in a.values()), strict=True)
        ),
        "the merge rule changes its inputs",
    )
    with _broken("the merge rule, with another seed"):
        other = merge(adapters, replace(settings, seed=7))
    for module, pair in merged.items():
        finite = bool(pair.A.isfinite().all() and pair.B.isfinite().all())
        _require(finite, f"the merged pair of {module} is not finite")
        same = torch.equal(pair.A, twice[module].A) and torch.equal(pair.B, twice[module].B)
        _require(same, "the merge rule gives other bits when it is called twice")
        _require(
            rule.draws or torch.equal(pair.A, other[module].A),
            "the merge rule depends on the seed; set draws to True",
        )
        _require(pair.shape == adapters[0][module].shape, f"the delta of {module} has shape {pair.shape}")
        _require(pair.scaling == 1.0, f"the merged pair of {module} has scaling {pair.scaling}; it must be 1")
        _require(
            sum(segment.rank for segment in pair.segments) == pair.rank, f"segments of {module} do not make up its rank"
        )
        norms = pair.A.norm(dim=1), pair.B.norm(dim=0)
        balanced = pair.apart or torch.allclose(*norms, rtol=1e-4, atol=1e-6)
        _require(balanced, f"the factors of {module} are not balanced")
    with _broken("the merge rule, of one adapter"):
        alone = merge([_adapter(0, 3, 1.0)], MergeSettings(rule, weights=(1.0,), density=1.0))
    for module, pair in _adapter(0, 3, 1.0).items():
        _require(
            torch.allclose(alone[module].delta(), pair.delta(), rtol=1e-4, atol=1e-5),
            "one adapter of weight 1 and scaling 1 at full density does not stay itself",
        )
    low = [
        AdapterWeights({m: LoraPair(p.A.bfloat16(), p.B.bfloat16(), p.scaling) for m, p in one.items()})
        for one in adapters
    ]
    with _broken("the merge rule, in bfloat16"):
        kept = {factor.dtype for pair in merge(low, settings).values() for factor in (pair.A, pair.B)}
    _require(kept == {torch.bfloat16}, f"factors in bfloat16 come out as {kept}")
    if not rule.space.equal_ranks:
        with _broken("the merge rule, of unequal ranks"):
            merge([_adapter(0, 2, 1.0), _adapter(1, 3, 1.0)], settings)


@_in_one_line
def check_score(score: Score) -> None:
    """Check a score: one number >= 0 for each weight, that depends on weights and norms alone, and masks that nest.

    Raises:
        AssertionError: the contract is broken.
    """
    pairs = dict(_adapter(0, 3, 1.0))
    norms = {
        m: InputNorms(torch.rand(p.shape[1], generator=_generator(5)), torch.ones(p.rank)) for m, p in pairs.items()
    }
    for module, pair in pairs.items():
        before = pair.A.clone(), pair.B.clone()
        given = norms[module] if score.needs_inputs else None
        with _no_global_draws("the score"):
            first, second = score.function(pair, given), score.function(pair, given)
        _require(
            isinstance(first, tuple | list) and len(first) == 2 and all(isinstance(one, torch.Tensor) for one in first),
            "the score must give a pair of tensors, for A and for B",
        )
        for values, again, factor, old in zip(first, second, (pair.A, pair.B), before, strict=True):
            _require(torch.equal(factor, old), "the score changes the weights")
            _require(
                values.shape == factor.shape, f"scores have shape {tuple(values.shape)}, not {tuple(factor.shape)}"
            )
            _require(bool(values.isfinite().all() and (values >= 0).all()), "a score is negative or not finite")
            _require(torch.equal(values, again), "the score gives other numbers when it is called twice")
    for scope in SCOPES:
        for granularity in GRANULARITIES:
            masks = MaskSet(pairs, MaskSettings(score, scope, granularity))
            masks.norms = norms if score.needs_inputs else {}
            kept = [masks.keep_masks(ratio) for ratio in (0.0, 0.3, 0.6, 1.0)]
            for less, more in itertools.pairwise(kept):
                _require(
                    all(bool((less[key] | ~more[key]).all()) for key in less),
                    f"masks do not nest, scope {scope} and granularity {granularity}",
                )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _state(search: RatioSearch) -> tuple[float, float, float, int]:
    return search.mean, search.std, search.current_ratio, len(search.history)


def _round(current: float, candidates: Sequence[float], number: int, loss: Callable[[float, int, int], float]) -> Round:
    baseline, *losses = (
        tuple(loss(ratio, number, example) for example in range(_EXAMPLES)) for ratio in (current, *candidates)
    )
    return Round(current, tuple(candidates), baseline, tuple(losses))


def _some(measured: Round, places: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(losses[place] for place in places) for losses in measured.candidate_losses)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _adapter(seed: int, rank: int, scaling: float) -> AdapterWeights:
    draws = _generator(seed)
    return AdapterWeights(
        {
            module: LoraPair(
                torch.randn(rank, 12, generator=draws),
                0.1 * torch.randn(10, rank, generator=draws),
                scaling,
                (Segment("source", 1), Segment("target", rank - 1)),
            )
            for module in ("layers.0.q_proj", "layers.1.v_proj")
        }
    )


@contextmanager
def _no_global_draws(name: str) -> Iterator[None]:
    before = random.getstate(), torch.get_rng_state()
    yield
    same = random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    _require(same, f"{name} draws from a global generator; use the one that is given")
