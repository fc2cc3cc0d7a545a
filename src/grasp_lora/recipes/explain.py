"""What is wrong with a recipe, in one line that names the field, what arrived and what is allowed."""

import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from datetime import date
from typing import Any

from pydantic import ValidationError

from grasp_lora.recipes.recipe import Recipe
from grasp_lora.text.display import escaped, one_line, quoted

ELSEWHERE_SHOWN = 3  # of the keys that end as an unknown one does
_PLAIN_WORDS = {  # of pydantic's error types, for those who do not know Python
    "string_pattern_mismatch": "use Latin letters, digits, '.', '_' and '-' only, and begin with a letter or digit",
    "tuple_type": "must be a list, such as [first, second]",
    "dataclass_type": "must be a section of keys and values",
    "model_type": "must be a section of keys and values",
    "dict_type": "must be a section of keys and values",
    "string_type": "must be a text",
}


def explain(error: ValidationError) -> str:
    """The first problem in one line; for an unknown key the nearest one that exists."""
    problem = error.errors(include_url=False)[0]
    place = [str(part) for part in problem["loc"] if not str(part).startswith("function-")]
    path = ".".join(place)
    others = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(place[:-1])
        elsewhere = [key for key in _all_keys() if key.endswith(f".{path}")][:ELSEWHERE_SHOWN]
        near = elsewhere or difflib.get_close_matches(place[-1], known, n=1)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {quoted(path)}; {hint}{others}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{quoted(path)} is missing{others}"
    message = one_line(_PLAIN_WORDS.get(problem["type"], problem["msg"].removeprefix("Value error, ")))
    if problem["type"] == "value_error":
        return f"{escaped(path)}: {message}{others}" if path else f"{message}{others}"
    arrived = problem["input"]
    shown = (
        ""
        if isinstance(arrived, dict | list)
        else f" (it is {arrived if isinstance(arrived, date) else quoted(arrived)})"
    )
    if problem["type"] == "string_type" and isinstance(arrived, bool | int | float | date):
        shown += "; put it in quotes"  # YAML reads the language code `no` as false
    return f"{escaped(path)}: {message[0].lower()}{message[1:]}{shown}{others}"


def _all_keys(place: tuple[str, ...] = ()) -> Iterator[str]:
    """Every key of a recipe by its dotted path, outer ones first."""
    for key in _known_keys(list(place)):
        yield ".".join((*place, key))
        yield from _all_keys((*place, key))


def _known_keys(place: list[str]) -> list[str]:
    node: Any = Recipe
    for key in place:
        hints: dict[str, Any] = (
            {name: info.annotation for name, info in Recipe.model_fields.items()} if node is Recipe else {}
        )
        if is_dataclass(node):
            hints = {entry.name: entry.type for entry in fields(node)}
        node = settings_class(hints.get(key))
        if node is None:
            return []
    return list(Recipe.model_fields) if node is Recipe else [entry.name for entry in fields(node)]


def settings_class(annotation: Any) -> Any:
    """The dataclass inside an annotation such as `X | None` or Annotated[X, ...]."""
    if is_dataclass(annotation):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        if found := settings_class(part):
            return found
    return settings_class(annotation.__origin__) if hasattr(annotation, "__metadata__") else None
