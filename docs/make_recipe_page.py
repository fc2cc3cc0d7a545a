"""Writes docs/guide/recipe.md, every key of a recipe with its default and meaning, from the docstrings of the settings."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grasp_lora.data.tasks import TASKS, TEMPLATES
from grasp_lora.evaluation.metrics import METRICS
from grasp_lora.method.search import PRESETS, plain_policy
from grasp_lora.recipes.load import validate
from grasp_lora.recipes.recipe import Recipe

PAGE = Path(__file__).parent / "guide" / "recipe.md"
INTRO = """\
# Every key of a recipe

Written from the docstrings of the settings by `python docs/make_recipe_page.py`. Keys that are not here are refused.
`--set a.b=value` changes single ones for one command. `grasp-lora init` writes a recipe that fits your data.
`grasp-lora recipes --schema` prints all of it as a JSON schema, from which editors complete keys.
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

What `controller.preset` stands for, where the target has a dev set.
Without one `grasp` probes the micro-dev rows: [presets](../method/presets.md).
Only what differs from the defaults of the policy and of rounds (`every: 10`, on all of `micro_dev`, to the end) is shown.
All of it but the bounds, the spacing of the rounds and the rule is fixed in a recipe; a script sets it in `Controller`.
With `paper` no training clips its gradients, and the merge is trained without dropout.
"""
METRIC_INTRO = """
## Metrics

Scores run from 0 to 100, higher is better, and each comes with a signature that says how it was computed.
"""
METRIC_END = """

`rougeL`, with `tok:unicode` in its signature, counts characters in Chinese, Japanese, Yi, Thai, Lao, Burmese
and Khmer, and words as they stand elsewhere.
Published XL-Sum scores count jieba's words in Chinese and stems in Arabic: other numbers, also called ROUGE-L.

`bertscore` needs `pip install 'grasp-lora[eval]'`; `check` says so before a run.

[A metric of your own](../method/extend.md#a-metric) is a function.
"""
LONG = 100  # characters of a meaning that is said once
REQUIRED = ("name", "task", "language")
CORPORA = {"target": {"language": "sw", "files": ["rows.csv"]}, "source": {"language": "en", "files": ["rows.csv"]}}
SAYS_NOTHING = {"name": "page", "data": {"task": "qa", **CORPORA}}


def page() -> str:
    """Return the whole page."""
    recipe = validate(SAYS_NOTHING, "page").model_dump(mode="json")
    recipe["data"]["target"]["files"] = recipe["data"]["source"]["files"] = {}
    alike: dict[str, list[tuple[str, ...]]] = defaultdict(list)  # sections of the same keys are shown once
    for place, properties in _sections(Recipe.model_json_schema(), ()):
        alike[json.dumps({key: entry.get("description") for key, entry in properties.items()})].append(place)
    found = dict(_sections(Recipe.model_json_schema(), ()))
    told: dict[str, str] = {}
    sections = "".join(_section(found[places[0]], places, recipe, told) for places in alike.values())
    return INTRO + sections + _presets() + _prompts() + _metrics()


def _sections(schema: dict[str, Any], place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every section and its keys, outer ones first."""
    for part in (schema, *schema.get("anyOf", ())):
        if properties := part.get("properties"):
            yield place, properties
            for key, entry in properties.items():
                yield from _sections(entry, (*place, key))


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


def _section(
    properties: dict[str, Any], places: list[tuple[str, ...]], recipe: dict[str, Any], told: dict[str, str]
) -> str:
    """The table of a section; what a key above means, too, is not said again: `told` has the meanings and their keys."""
    title = ", ".join(f"`{'.'.join(place)}`" for place in places) if places[0] else "The recipe"
    lines = [f"\n## {title}\n", "| key | default | meaning |", "|---|---|---|"]
    for key, entry in properties.items():
        inner = any(_sections(entry, ()))
        required = "default" not in entry and not inner and key in REQUIRED
        default = "see below" if inner else "required" if required else _default(key, places, recipe)
        if not entry.get("description"):
            raise ValueError(f"the docstring of {title} does not say what {key} means")
        meaning = entry["description"].replace("null", "`null`").replace("|", chr(92) + "|")
        first = told.setdefault(meaning, ".".join((*places[0], key)))
        again = first != ".".join((*places[0], key)) and len(meaning) > LONG
        lines.append(f"| `{key}` | {default} | {f'as `{first}`.' if again else meaning} |")
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
