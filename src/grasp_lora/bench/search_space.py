"""What a sweep may change: ranges and lists of values for keys of the recipe, as `--param key=...` writes them."""

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

from grasp_lora.errors import RecipeError
from grasp_lora.method.merging import MERGE_RULES, keep_all, merge_rule
from grasp_lora.recipes.load import validate
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.text import parse
from grasp_lora.text.display import escaped, quoted

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

SAMPLERS = ("tpe", "random")
# What the final run rests on, the data and backbone aside.
SECTIONS = ("lora", "source", "target", "merge", "mask", "final")
MOST_POINTS = 1000  # of low..high/n
_NUMBER = r"[-+]?(?:\d{1,30}(?:\.\d{1,30})?|\.\d{1,30})(?:[eE][-+]?\d{1,3})?"
_RANGE = re.compile(rf"({_NUMBER})\s*\.\.\s*({_NUMBER})(?:\s*/\s*(\d{{1,9}}))?(:log)?", re.ASCII)
_FORMS = "low..high, low..high:log, low..high/n for n values, or a list [a, b, c]"
_INSIDE = 0.381966  # of a range: a point that is no round number


@dataclass(frozen=True)
class Parameter:
    """One key of the recipe and the values that it may take.

    Args:
        key: dotted, list entries by their number.
        choices: the values, None for a range.
        low, high: bounds of a range, both of them allowed; whole numbers if both are.
        log: whether a range is to be searched on a logarithmic scale.
    """

    key: str
    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether the range is one of whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def probes(self) -> tuple[Any, ...]:
        """Values that stand for all: every choice, or the bounds of the range and one value inside."""
        if self.choices is not None:
            return self.choices
        inside = self.low + _INSIDE * (self.high - self.low)
        return (self.low, self.high, round(inside) if self.whole else inside)


def search_space(params: Sequence[str], recipe: Recipe) -> tuple[Parameter, ...]:
    """Read parameters and check them against the recipe.

    A value may need another parameter's, as `merge.rank` needs a rule that takes one: it is enough that some combination of the
    two is allowed.

    Args:
        params: `key=low..high`, `key=low..high:log`, `key=low..high/n` (n evenly spaced values, also with `:log`), or
            `key=[a, b, c]`, the values read as YAML. A range is of whole numbers if both bounds are written as such.
        recipe: what they change.

    Raises:
        RecipeError: one line: no such key or one that cannot be swept, no range, or a value that the recipe does not allow.
    """
    if not params:
        raise RecipeError(
            "a sweep needs something to vary; give --param, for example --param final.prune_ratio=0.1..0.8"
        )
    found = [_read(param) for param in params]
    for number, one in enumerate(found):
        for other in found[:number]:
            if f"{one.key}.".startswith(f"{other.key}.") or f"{other.key}.".startswith(f"{one.key}."):
                raise RecipeError(
                    f"--param {escaped(one.key)} and {escaped(other.key)} set the same value; give one of them"
                )
    checked = tuple(_checked(parameter, found, recipe) for parameter in found)
    for one in found:
        if why := _without_effect(one.key, recipe, [other.key for other in found]):
            raise RecipeError(f"--param {escaped(one.key)} changes nothing: {why}")
    return checked


def named_values(params: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each value that parameters list by itself, as the part of a recipe that would hold it.

    Raises:
        RecipeError: as `search_space`, of what is seen without a recipe.
    """
    for one in map(_read, params):
        for value in one.choices or ():
            yield reduce(lambda inner, part: {part: inner}, reversed(one.key.split(".")), value)


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return the recipe with some values changed.

    Args:
        recipe: stays as it is.
        values: by dotted key.

    Raises:
        RecipeError: a key does not exist, or a value is not allowed.
    """
    content = recipe.model_dump(mode="json")
    for key, value in values.items():
        _set(content, key, value)
    return validate(content, recipe.name)


def trial_recipe(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a trial: with its values, and without a controller run, so that an unset prune ratio is 0.

    Without that run, a trial starts from a merge.

    Raises:
        RecipeError: a key does not exist, or a value is not allowed.
    """
    changed = with_values(recipe, values)
    final = replace(changed.final, prune_ratio=changed.final.prune_ratio or 0.0, start="merged")
    return changed.model_copy(update={"final": final})


def propose(
    parameters: Sequence[Parameter],
    told: Sequence[tuple[Mapping[str, Any], float | None]],
    sampler: str,
    seed: int,
    others: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the values that Optuna tries next; the same after the same trials with the same seed.

    Args:
        parameters: what is varied.
        told: values and loss of every earlier trial, in order; None for one that failed, which samplers learn from, too.
        sampler: one of `SAMPLERS`.
        seed: of the sampler.
        others: values that were proposed, but are not finished; Optuna takes them for bad ones, so as to try something else.

    Raises:
        ValueError: earlier values are none of these parameters.
    """
    import optuna  # an extra
    from optuna.trial import TrialState, create_trial

    chosen = {one.key for one in parameters if one.choices is not None}
    distributions = {one.key: _distribution(one) for one in parameters}
    samplers: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, constant_liar=bool(others)),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=samplers[sampler]())
        known = [(values, loss, TrialState.PRUNED if loss is None else TrialState.COMPLETE) for values, loss in told]
        for values, loss, state in [*known, *((one, None, TrialState.RUNNING) for one in others)]:
            params = {key: json.dumps(value) if key in chosen else value for key, value in values.items()}
            study.add_trial(create_trial(state=state, value=loss, params=params, distributions=distributions))
        asked = study.ask(distributions).params
    except TypeError as error:
        raise ValueError(str(error)) from error
    finally:
        optuna.logging.set_verbosity(verbosity)
    return {key: json.loads(value) if key in chosen else value for key, value in asked.items()}


def _distribution(parameter: Parameter) -> "BaseDistribution":
    """The parameter as Optuna knows it; choices as JSON, since it keeps plain values only and takes 1 for true."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.choices is not None:
        return CategoricalDistribution([json.dumps(choice) for choice in parameter.choices])
    if parameter.whole:
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _read(param: str) -> Parameter:
    key, equals, text = (part.strip() for part in param.partition("="))
    if not equals or not all(key.split(".")):
        raise RecipeError(f"--param {quoted(param)} must look like key=RANGE; a range is {_FORMS}")
    section = key.split(".")[0]
    if section in Recipe.model_fields and section not in SECTIONS:
        raise RecipeError(
            f"--param {escaped(key)}: {section} cannot be swept, since trials share seed, data and backbone and are judged by "
            f"their final run; sweep a key of {', '.join(SECTIONS)}"
        )
    if key in ("final.deliver", "final.all_rows"):
        raise RecipeError(f"--param {key}: a trial ends with its final run, which this does not touch")
    if key == "final.start":
        raise RecipeError("--param final.start: a trial has no controller run, so that it always starts from a merge")
    if text.startswith("["):
        return Parameter(key, _listed(key, text))
    match = _RANGE.fullmatch(text)
    if match is None:
        raise RecipeError(f"--param {escaped(key)}: {quoted(text)} is no range; write {_FORMS}")
    low, high = _number(match[1]), _number(match[2])
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise RecipeError(f"--param {escaped(key)}: the range {text} must go from a lower to a higher number")
    if match[4] and low <= 0:
        raise RecipeError(f"--param {escaped(key)}: a logarithmic range must begin above 0 (it is {text})")
    parameter = Parameter(key, None, low, high, bool(match[4]))
    if match[3] is None:
        return parameter
    return replace(parameter, choices=_points(parameter, int(match[3]), text), log=False)


def _without_effect(key: str, recipe: Recipe, swept: Collection[str]) -> str | None:
    """Why all values of a key come to the same, None where they do not, or where another parameter decides it."""
    for section, given, there in (
        ("source", "adapters", recipe.source.adapters),
        ("target", "adapter", recipe.target.adapter),
    ):
        place = f"{section}.{given}"
        decided = any(one == section or f"{one}.".startswith(f"{place}.") for one in swept)
        if key.startswith(f"{section}.") and there and not decided:
            return f"{place} is given, so that none is trained"
    masks = key == "final.mode" or key.partition(".")[0] == "mask" or f"{key}.".startswith("final.mask.")
    if masks and not recipe.final.prune_ratio and not {"final", "final.prune_ratio"} & set(swept):
        return "a trial prunes nothing without a final.prune_ratio above 0; give one, or sweep it, too"
    if key.partition(".")[0] == "mask" and recipe.final.mask is not None and not {"final", "final.mask"} & set(swept):
        return "final.mask is given, and a trial masks by that"
    rule = merge_rule(recipe.merge.rule)
    if "merge" in swept or "merge.rule" in swept or recipe.merge.rule not in MERGE_RULES:  # one's own may read all
        return None
    if key == "merge.seed" and not rule.draws:
        return f"merge rule {quoted(recipe.merge.rule)} draws nothing"
    keeps = rule.sparsify is keep_all
    return f"merge rule {quoted(recipe.merge.rule)} keeps all weights" if key == "merge.density" and keeps else None


def _listed(key: str, text: str) -> tuple[Any, ...]:
    try:
        values = parse(text, "the list")
    except RecipeError as error:
        raise RecipeError(f"--param {escaped(key)}: {error}") from error
    if not isinstance(values, list) or not values:
        raise RecipeError(f"--param {escaped(key)}: {quoted(text)} names no values; write {_FORMS}")
    return tuple(values)


def _number(text: str) -> float:
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


def _points(span: Parameter, count: int, text: str) -> tuple[float, ...]:
    if not 2 <= count <= MOST_POINTS:
        raise RecipeError(f"--param {escaped(span.key)}: {text} asks for {count} values; allowed: 2 to {MOST_POINTS}")
    shares = [number / (count - 1) for number in range(count)]
    if span.log:
        exact = [span.low * (span.high / span.low) ** share for share in shares]
    else:
        exact = [span.low + (span.high - span.low) * share for share in shares]
    points = [float(f"{point:.12g}") for point in exact]  # 0.3, not 0.30000000000000004
    if not span.whole:
        return tuple(points)
    if not all(point.is_integer() for point in points):
        raise RecipeError(
            f"--param {escaped(span.key)}: {text} does not give whole numbers; write a list, or 1.0 for 1 if fractions are meant"
        )
    return tuple(int(point) for point in points)


def _checked(parameter: Parameter, everyone: Sequence[Parameter], recipe: Recipe) -> Parameter:
    """The parameter with its choices as the recipe reads them, `1e-3` as a number."""
    others = [one for one in everyone if one is not parameter]
    settled = [_settled(parameter.key, value, others, recipe) for value in parameter.probes()]
    if parameter.choices is None and parameter.whole and any(isinstance(value, float) for value in settled):
        raise RecipeError(
            f"--param {escaped(parameter.key)}: {parameter.low}..{parameter.high} is a range of whole numbers, but the key takes "
            f"fractions; write {float(parameter.low)}..{float(parameter.high)}"
        )
    if parameter.choices is None:
        return parameter
    texts = [json.dumps(value) for value in settled]
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise RecipeError(
            f"--param {escaped(parameter.key)} names {escaped(twice[0])} more than once; name each value once"
        )
    return replace(parameter, choices=tuple(settled))


def _settled(key: str, value: Any, others: Sequence[Parameter], recipe: Recipe) -> Any:
    """What the recipe reads the value as, alone or together with one value of another parameter."""
    problem: RecipeError | None = None
    for context in _contexts(others):
        try:
            content = with_values(recipe, {**context, key: value}).model_dump(mode="json")
        except RecipeError as error:
            problem = problem or error
            continue
        for part in key.split("."):
            content = content[int(part)] if isinstance(content, list) else content[part]
        return content
    raise RecipeError(f"--param {escaped(key)}: {problem}") from problem


def _contexts(others: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
    yield {}
    for other in others:
        for value in other.probes():
            yield {other.key: value}


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    place: Any = content
    for number, section in enumerate(sections):
        after = [*sections, last][number + 1]
        if isinstance(place, dict) and place.get(section) is None:
            if after.isdecimal():
                name = ".".join(sections[: number + 1])
                raise RecipeError(
                    f"{escaped(name)} has no entry {after}; give the whole list first, with --set {escaped(name)}=[...]"
                )
            place[section] = {}
        place = _entry(place, section, key)
    if isinstance(place, list):
        _entry(place, last, key)
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise RecipeError(f"{escaped(sections[-1])} is no section of the recipe, so that there is no {escaped(key)}")


def _entry(place: Any, name: str, key: str) -> Any:
    if isinstance(place, dict):
        return place[name]
    if isinstance(place, list) and name.isdecimal() and len(name) < 6 and int(name) < len(place):
        return place[int(name)]
    what = f"a list of {len(place)} entries, counted from 0" if isinstance(place, list) else "no section of the recipe"
    raise RecipeError(f"there is no {escaped(key)}: what stands before {quoted(name)} is {what}")
