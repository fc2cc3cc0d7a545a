"""Writes docs/guide/recipe.md, every key of a recipe with its default and meaning, from the docstrings of the settings."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from docstring_parser import parse_from_object

from grasp_lora.data.tasks import TASKS, TEMPLATES
from grasp_lora.evaluation.metrics import METRICS
from grasp_lora.method.search import POLICIES, PRESETS, RatioPolicy, plain_policy
from grasp_lora.recipes.load import validate
from grasp_lora.recipes.recipe import Recipe

PAGE = Path(__file__).parent / "guide" / "recipe.md"
INTRO = """\
# Every key of a recipe

Written from the docstrings of the settings by `python docs/make_recipe_page.py`. Keys that are not here are refused.
`--set a.b=value` changes single ones for one command. `grasp-lora init` writes a recipe that fits your data.
`grasp-lora schema` prints all of it as a JSON schema, from which editors complete keys.
The resolved recipe in the folder of a run shows every value that held.
Defaults are those of a recipe that says nothing but its data and has a dev set.
What the presets of the controller say: [which to choose](../method/presets.md).
"""
PROMPTS = """
## What the model sees

The built-in prompts, where the recipe has none of its own; a language that is not here takes the English ones.
Fields in braces are those of the task. The loss counts the completion and the end of text after it.
With `data.chat_template` the prompt is what the user says and the bare answer what the assistant says.
`completion` puts nothing between prompt and completion: end the prompts with a space or a line break.
`grasp-lora check` shows the border of one example.
The model card, `adapter/README.md` in the folder of a run, shows the prompt that `grasp-lora predict` has to be given.
"""
PRESET_INTRO = """
## Presets

What `controller.preset` stands for; where the recipe names none it is `spread` if the target has a dev set, else `late`.
Only what differs from the defaults of the policy (above) and of rounds (`every: 10`, on all of `micro_dev`, to the end) is shown.
"""
METRIC_INTRO = """
## Metrics

Scores run from 0 to 100, higher is better, and each comes with a signature that says how it was computed.
"""
METRIC_END = """

**Two measures are called ROUGE-L.** Scores of one say nothing about scores of the other.
`rougeL`, with `tok:unicode` in its signature, counts characters in Chinese, Japanese, Thai, Lao, Burmese
and Khmer, and words as they stand elsewhere.
Published XL-Sum scores count jieba's words in Chinese and stems in Arabic and fourteen other languages; that is `rougeL_xlsum`.
It is unavailable in Bengali, Burmese, Hindi, Japanese, Thai and Turkish, whose stemmers or word lists it does not bring.
The authors leave stop words unstemmed, by a list that is downloaded; here all words are stemmed.

| XL-Sum articles: what stands for the summary | `rougeL` | `rougeL_xlsum` | with the authors' stop words |
|---|---:|---:|---:|
| Arabic, 165: the first sentence | 11.4 | 14.5 | 14.5 |
| Chinese, 257: the first sentence | 21.0 | 19.6 | 19.6 |
| English, 180: the first sentence | 12.5 | 12.8 | 12.7 |
| Arabic, 50: the best of ten sentences | 18.9 | 21.1 |  |
| Chinese, 50: the best of ten sentences | 31.6 | 28.8 |  |

`similarity` says whether answer and reference are about the same; it hardly sees a negation or another number.
Unrelated texts have about 0 to 20.
`rougeL_xlsum` in Chinese and `similarity` need `pip install 'grasp-lora[eval]'`; `check` says so before a run.

[A metric of your own](../method/extend.md#a-metric) is a function.
"""
SAYS_NOTHING = {"name": "page", "data": {"task": "qa", "target": {"language": "sw", "files": ["questions.json"]}}}


def page() -> str:
    """Return the whole page."""
    recipe = validate(SAYS_NOTHING, "page").model_dump(mode="json")
    recipe["data"]["target"]["files"] = []
    places = defaultdict(list)
    for place, settings in _walk(Recipe, ()):
        if settings is not RatioPolicy:
            places[settings].append(place)
    sections = "".join(_section(settings, found, recipe) for settings, found in places.items())
    return INTRO + sections + _policies() + _presets() + _prompts() + _metrics()


def _policies() -> str:
    """The settings of each kind of policy."""
    found = []
    for kind, policy in POLICIES.items():
        recipe = {"controller": {"policy": plain_policy(policy())}}
        text = _section(policy, [("controller", "policy")], recipe)
        found.append(text.replace("## `controller.policy`", f"## `controller.policy` of kind `{kind}`"))
    return "".join(found)


def _presets() -> str:
    """What each preset has that differs from the defaults of its parts."""
    lines = [PRESET_INTRO, "| preset | policy | rounds | rule |", "|---|---|---|---|"]
    for name, chosen in PRESETS.items():
        policy, rounds = ({key: value for key, value in vars(part).items() if value != getattr(type(part)(), key)}
                          for part in (chosen.policy, chosen.rounds))  # fmt: skip
        shown = [", ".join(f"`{key}: {json.dumps(value)}`" for key, value in part.items()) for part in (policy, rounds)]
        kind = f"`{plain_policy(chosen.policy)['kind']}`"
        lines.append(f"| `{name}` | {', '.join(filter(None, (kind, shown[0])))} | {shown[1]} | `{chosen.rule}` |")
    return "\n".join(lines) + "\n"


def _prompts() -> str:
    """What the model sees of an example."""
    lines = [PROMPTS, "| task | language | `data.prompt` | `data.completion` |", "|---|---|---|---|"]
    for task, templates in TEMPLATES.items():
        for language, template in templates.items():
            texts = (json.dumps(text, ensure_ascii=False) for text in (template.prompt, template.completion))
            lines.append(f"| `{task}` | {language} | {' | '.join(f'`{text}`' for text in texts)} |")
    return "\n".join(lines) + "\n"


def _metrics() -> str:
    lines = [METRIC_INTRO, "| metric | what it is | default of |", "|---|---|---|"]
    for name, metric in METRICS.items():
        tasks = ", ".join(f"`{task}`" for task in TASKS if name in TASKS[task].metrics)
        lines.append(f"| `{name}` | {metric.summary} | {tasks} |")
    return "\n".join(lines) + METRIC_END


def _walk(settings: type[Any], place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], type[Any]]]:
    """Every class of settings and where it stands, outer ones first."""
    yield place, settings
    for name, annotation in _annotations(settings).items():
        if inner := settings_class(annotation):
            yield from _walk(inner, (*place, name))


def settings_class(annotation: Any) -> Any:
    """The dataclass inside an annotation such as `X | None` or Annotated[X, ...]."""
    if is_dataclass(annotation):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        if found := settings_class(part):
            return found
    return settings_class(annotation.__origin__) if hasattr(annotation, "__metadata__") else None


def _annotations(settings: type[Any]) -> dict[str, Any]:
    if issubclass(settings, Recipe):
        return {name: info.annotation for name, info in settings.model_fields.items()}
    return {entry.name: entry.type for entry in fields(settings)}


def _required(settings: type[Any]) -> set[str]:
    if issubclass(settings, Recipe):
        return {name for name, info in settings.model_fields.items() if info.is_required()}
    return {entry.name for entry in fields(settings) if entry.default is MISSING and entry.default_factory is MISSING}


def _section(settings: type[Any], places: list[tuple[str, ...]], recipe: dict[str, Any]) -> str:
    parsed = parse_from_object(settings)
    title = ", ".join(f"`{'.'.join(place)}`" for place in places) if places[0] else "The recipe"
    lines = [f"\n## {title}\n", f"{parsed.short_description}\n"]
    if parsed.long_description:
        lines.append(f"{parsed.long_description}\n")
    lines += ["| key | default | meaning |", "|---|---|---|"]
    required, annotations, told = _required(settings), _annotations(settings), set[str]()
    for entry in parsed.params:
        names = entry.arg_name.split(", ")
        told.update(names)
        defaults = []
        for name in names:
            inner = settings_class(annotations[name])
            given = "see below" if inner else "required" if name in required else _default(name, places, recipe)
            defaults.append(given)
        shown = defaults[0] if len(set(defaults)) == 1 else ", ".join(defaults)
        meaning = re.sub(r"\bNone\b", "`null`", " ".join((entry.description or "").split())).replace("|", "\\|")
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {shown} | {meaning} |")
    if missing := annotations.keys() - told:
        raise ValueError(f"the docstring of {settings.__name__} does not say what {', '.join(sorted(missing))} means")
    return "\n".join(lines) + "\n"


def _default(name: str, places: list[tuple[str, ...]], recipe: dict[str, Any]) -> str:
    """The default, or those of each place where they differ."""
    values: dict[str, list[str]] = defaultdict(list)
    for place in places:
        node: Any = recipe
        for key in place:
            node = node and node[key]
        if node is not None:
            values[json.dumps(node[name], ensure_ascii=False)].append(f"`{'.'.join(place)}`")
    if len(values) == 1:
        return f"`{next(iter(values))}`"
    return "; ".join(f"`{value}` in {', '.join(where)}" for value, where in values.items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
