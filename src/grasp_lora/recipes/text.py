"""The text of a recipe to plain values: YAML, less what nobody means and what a stranger could do harm with.

No tags, no aliases (of which "anchor bombs" are made), no merge keys, no key twice, text keys only, a bounded
size and depth; and no number that YAML 1.1 reads otherwise than a person does: 010 is 8 there, and 1:30 is 90.
"""

import re
from typing import Any

import yaml

from grasp_lora.errors import RecipeError
from grasp_lora.text.display import one_line, quoted

RECIPE_FILE = "recipe.yaml"  # where a folder keeps it
RUN_FILE = "run.json"  # of a run folder: what it started from
MOST_BYTES = 1_000_000
MOST_LEVELS = 20
_OPENING = (
    yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken
)  # fmt: skip
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
_STR, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


def decode(data: bytes, name: str) -> str:
    """Return the text of a recipe file.

    Raises:
        RecipeError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def parse(text: str, name: str) -> Any:
    """Return what a YAML text says.

    Args:
        text: the YAML.
        name: what it is, for messages, such as "recipe a.yaml".

    Raises:
        RecipeError: one line: where, and what is wrong.
    """
    try:
        loader = _Loader(text, name)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist, a number that is too long
        raise RecipeError(f"{name} is no valid YAML{_problem(error)}") from error


class _Loader(yaml.SafeLoader):
    """Refuses aliases, tags and depth as it reads; keys that stand twice, of which YAML would silently take the last; and numbers
    that are not what they seem.
    """

    def __init__(self, text: str, recipe: str) -> None:
        super().__init__(text)
        self.recipe, self.levels = recipe, 0

    def get_token(self) -> Any:
        """Return the next token, before anything is built of it: what is too deep is not read on."""
        token = super().get_token()  # type: ignore[no-untyped-call]
        line = 0 if token is None else token.start_mark.line + 1
        if isinstance(token, yaml.AliasToken):
            raise RecipeError(f"{self.recipe} uses a YAML alias (*name) in line {line}; write the values out")
        if isinstance(token, yaml.TagToken):
            raise RecipeError(
                f"{self.recipe} uses a YAML tag (!name) in line {line}; write the value without it, or in quotes"
            )
        self.levels += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if self.levels > MOST_LEVELS:
            raise RecipeError(f"{self.recipe} is nested too deeply; a recipe has at most {MOST_LEVELS} levels")
        return token

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping from its node."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == "on":  # target.on, which YAML 1.1 takes for true
                key.tag = _STR
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (_STR, _MERGE):
                shown = quoted(key.value) if isinstance(key, yaml.ScalarNode) else "a list or an object"
                raise _error(key, f"the key {shown} is no text; put it in quotes")
            if key.tag == _MERGE:
                raise _error(key, "merge keys (<<) are not understood; write the values out")
            if key.value in seen:
                raise _error(key, f"the key {quoted(key.value)} stands twice; remove one")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Build a number that means to YAML what it says."""
        text = node.value
        if ":" in text or (re.match(r"[-+]?0[0-9_]", text) and "." not in text):
            raise _error(
                node, f"the number {quoted(text)} would be read in base 60 or 8; write it plainly, or in quotes"
            )
        is_whole = node.tag.endswith("int")
        return self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def _error(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)


def _problem(error: Exception) -> str:
    """Where YAML failed, what it says, and where what it was reading begins: an open bracket shows far below."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f": {one_line(str(error))}"
    begun = (
        f", {error.context} from line {error.context_mark.line + 1} on" if error.context and error.context_mark else ""
    )
    return f" in line {error.problem_mark.line + 1}: {one_line(f'{error.problem}{begun}')}"
