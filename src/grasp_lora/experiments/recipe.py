"""The recipe: one typed YAML file that says everything about an experiment.

The settings live beside the code that they steer; the recipe nests them. Unknown keys are errors. `--set a.b=value` changes
single values; the resolved recipe is saved with the run.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from grasp_lora.display import CONTROLS, SURROGATES, escaped, one_line, quoted
from grasp_lora.errors import RecipeError
from grasp_lora.evaluation.bertscore import BertScoreSettings
from grasp_lora.evaluation.generation import GenerationSettings
from grasp_lora.experiments.recipe_text import MOST_BYTES, decode, parse
from grasp_lora.method.masking import MaskSettings
from grasp_lora.method.merging import MergeSettings
from grasp_lora.method.policy import POLICIES, PRESETS, WHOLE_ROUNDS, PolicySettings
from grasp_lora.training.backbone import BackboneSettings
from grasp_lora.training.data import DataSettings
from grasp_lora.training.settings import LoraSettings, TrainingSettings
from grasp_lora.training.untrusted import RefusedError, is_file, read_bounded

RECIPE_FILE = "recipe.yaml"
ELSEWHERE_SHOWN = 3  # of the keys that end as an unknown one does
MOST_WHOLE = 10**9  # of any whole number but a seed
MOST_SEED = 2**63 - 1
MOST_OF = {"rank": 16_384, "candidates": 1_024}  # what would be allocated or tried at once
MOST_TEXT = 1_024  # characters of a text that is no template
MOST_PART = 255  # bytes of a part of a path, as file systems have it
_FREE_TEXTS = ("data.prompt", "data.completion", "generation.stop")  # which may hold any characters, and many
_PLAIN_WORDS = {  # of pydantic's error types, for those who do not know Python
    "string_pattern_mismatch": "use Latin letters, digits, '.', '_' and '-' only, and begin with a letter or digit",
    "tuple_type": "must be a list, such as [first, second]",
    "dataclass_type": "must be a section of keys and values",
    "model_type": "must be a section of keys and values",
    "dict_type": "must be a section of keys and values",
    "string_type": "must be a text",
}


def _policy(value: Any) -> Any:
    """Allow `policy: paper`, and `policy: {preset: paper, max_step: 0.05}`."""
    if isinstance(value, str):
        value = {"preset": value}
    if not isinstance(value, dict) or "preset" not in value:
        return value
    changes = dict(value)
    name = changes.pop("preset")
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"there is no policy preset {quoted(name)}; allowed: {', '.join(PRESETS)}")
    return asdict(PRESETS[name]) | changes


Policy = Annotated[PolicySettings, BeforeValidator(_policy)]


def _to_the_end(value: Any) -> Any:
    """Fill in what a training without a dev set has to be, where nothing is said."""
    return {"patience": None, "keep": "last"} | value if isinstance(value, dict) else value


ControllerTraining = Annotated[TrainingSettings, BeforeValidator(_to_the_end)]


@dataclass(frozen=True)
class SourceStage:
    """The source adapters: existing ones, or one trained on the source data.

    Args:
        adapters: PEFT folders or hub ids to merge; empty trains one.
        training: how that one is trained.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    adapters: tuple[str, ...] = ()
    training: TrainingSettings = field(default_factory=lambda: TrainingSettings(epochs=2, learning_rate=2e-4))

    def __post_init__(self) -> None:
        if not all(adapter.strip() for adapter in self.adapters):
            raise ValueError("adapters names an empty place; give a folder or a hub id")


@dataclass(frozen=True)
class TargetStage:
    """The target adapter: an existing one, or one trained on the target data.

    Args:
        adapter: PEFT folder or hub id; None trains one.
        training: how it is trained.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    adapter: str | None = None
    training: TrainingSettings = field(default_factory=lambda: TrainingSettings(learning_rate=2e-4))

    def __post_init__(self) -> None:
        if self.adapter is not None and not self.adapter.strip():
            raise ValueError("adapter is empty; give a folder or a hub id, or leave it out to train one")


PAPER_PROBE_EVERY = 10  # optimizer steps; Paper: controller settings
IN_TURN = 12  # examples of dev that a round measures at each candidate: `docs/results/controllers.md`
# What a controller may probe: the splits of each choice.
PROBE_SPLITS = {"micro_dev": ("micro_dev",), "dev": ("dev",), "both": ("micro_dev", "dev")}


@dataclass(frozen=True)
class ControllerStage:
    """The run that learns the ratio.

    What a recipe leaves out follows from its policy (`Recipe`): where all ratios train together and rounds begin before training,
    a round follows each epoch, its baseline on dev, its candidates on 12 examples of it in turn, and patience is 1; else rounds
    are the paper's.

    Args:
        policy: settings of the policy, a preset's name, or a preset with changes.
        probe_every: optimizer steps between rounds, >= 1; None for an epoch.
        probe_on: examples that are probed: `micro_dev`, `dev`, or `both`. Dev then chooses the ratio and stops the final run.
        probe_examples: how many of them a round measures at each candidate at most, in turn, so that each round has others; None
            takes all. The baseline is measured on all where rounds are compared: by patience, a single run or the estimate
            `surrogate`.
        patience: rounds in a row without a lower loss of the probed examples at any ratio, after which the run stops; None for
            never.
        training: batch 1 by default; `patience` and `keep` do not apply, since the run measures no dev loss of its own.

    Raises:
        ValueError: a setting is out of range, or two contradict each other.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    policy: Policy = field(default_factory=PolicySettings)
    probe_every: int | None = PAPER_PROBE_EVERY
    probe_on: str = "micro_dev"
    probe_examples: int | None = None
    patience: int | None = None
    training: ControllerTraining = field(default_factory=lambda: TrainingSettings(patience=None, keep="last"))

    def __post_init__(self) -> None:
        if self.training.patience is not None or self.training.keep != "last":
            raise ValueError(
                f"training.patience is {self.training.patience} and training.keep {self.training.keep!r}, but the controller run "
                "measures no dev loss; remove both, or set controller.patience to stop it by its rounds"
            )
        if self.probe_every is not None and self.probe_every < 1:
            raise ValueError(
                f"probe_every is {self.probe_every}; it must be at least 1 optimizer step, or null for an epoch"
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}; it must be at least 1 round, or null to train to the end")
        if self.probe_on not in PROBE_SPLITS:
            raise ValueError(f"probe_on is {self.probe_on!r}; allowed: {', '.join(PROBE_SPLITS)}")
        if self.probe_examples is not None and self.probe_examples < 1:
            raise ValueError(f"probe_examples is {self.probe_examples}; it must be at least 1, or null for all")
        if self.probe_examples is not None and self.policy.whole_rounds:
            raise ValueError(
                f"the estimate {self.policy.estimate!r} needs all examples in each round, but probe_examples is "
                f"{self.probe_examples}; set it to null, or policy.estimate to 'surrogate' or 'smooth_fit'"
            )

    def in_turn(self, pool: int) -> int | None:
        """How many examples of a pool of so many a round measures at each candidate, in turn; None for all of them in each."""
        return self.probe_examples if self.probe_examples is not None and self.probe_examples < pool else None

    def probed_examples(self, pool: int, keep_best: bool = False) -> int:
        """Examples measured in a round, with each ratio counted anew, at most; `keep_best` as in a single run."""
        few = self.in_turn(pool) or pool
        whole = self.policy.compares_rounds(self.patience, keep_best)
        return (pool if whole else few) + self.policy.candidates * few

    def spacing(self, train_examples: int) -> int:
        """Optimizer steps between rounds of a run over so many training examples."""
        return self.probe_every or self.training.steps_per_epoch(train_examples)

    def round_steps(self, train_examples: int) -> list[int]:
        """The optimizer steps that a round follows in a run over so many training examples, 0 for one before the first step."""
        return self.policy.round_steps(self.training.steps(train_examples), self.spacing(train_examples))


@dataclass(frozen=True)
class FinalStage:
    """The final run at the learned ratio.

    Args:
        mode: `hold` one mask, or `reselect` after every optimizer step (the paper's final run).
        mask: another score, scope or granularity than the controller's; None takes the same.
        prune_ratio: use this fraction instead of learning one; the controller run is then left out.
        training: how it is trained.
        start: `merged`, a fresh merge that is pruned at the learned ratio; or `controller` (single run): the controller run's own
            adapter as it was at the round with the lowest loss, pruned at that ratio, with that mask held.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    mode: str = "hold"
    mask: MaskSettings | None = None
    prune_ratio: float | None = None
    training: TrainingSettings = field(default_factory=TrainingSettings)
    start: str = "merged"

    def __post_init__(self) -> None:
        if self.start not in ("merged", "controller"):
            raise ValueError(f"start is {self.start!r}; allowed: merged, controller")
        if self.mode not in ("hold", "reselect"):
            raise ValueError(f"mode is {self.mode!r}; allowed: hold, reselect")
        if self.prune_ratio is not None and not 0.0 <= self.prune_ratio <= 1.0:
            raise ValueError(f"prune_ratio is {self.prune_ratio}; it must be a fraction in [0, 1]")


class Recipe(BaseModel):
    """Everything about one experiment; see the recipes that come with the package for examples.

    Args:
        name: what the run and its folder are called: Latin letters, digits, `.`, `_` and `-`.
        seed: seed of all that draws random numbers, >= 0; each part gets one of its own from it.
        backbone: the model that stays frozen.
        data: examples of both languages.
        lora: adapters that are trained here.
        source: the adapters of the rich language.
        target: the adapter of the target language.
        merge: how they become one.
        mask: what is pruned first.
        controller: how the prune ratio is learned.
        final: the run that makes the result.
        generation: how the test prompts are answered.
        metrics: what the answers are judged by, names or `package.module:function` for one of your own; empty takes those of
            the task.
        bertscore: models of the metric `bertscore`.
        report_to: trackers of transformers, such as `tensorboard`; none by default.
        save_every: optimizer steps between checkpoints, >= 1; None for an epoch or a tenth of a training, the shorter one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    seed: int = Field(default=42, ge=0)
    backbone: BackboneSettings = BackboneSettings()
    data: DataSettings
    lora: LoraSettings = LoraSettings()
    source: SourceStage = SourceStage()
    target: TargetStage = TargetStage()
    merge: MergeSettings = MergeSettings()
    mask: MaskSettings = MaskSettings()
    controller: ControllerStage = ControllerStage()
    final: FinalStage = FinalStage()
    generation: GenerationSettings = GenerationSettings()
    metrics: tuple[str, ...] = ()
    bertscore: BertScoreSettings = BertScoreSettings()
    report_to: tuple[str, ...] = ()
    save_every: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _rounds_follow_the_policy(cls, content: Any) -> Any:
        """Fill in what the recipe leaves out of its controller, by the policy and whether there is a dev set."""
        stage = content.get("controller", {}) if isinstance(content, dict) else None
        if not isinstance(stage, dict):
            return content
        dev = _has_dev(content.get("data"))
        usual_policy = "shared" if dev else "late"
        stage = {"policy": usual_policy} | stage
        policy = stage["policy"]
        if isinstance(policy, dict) and not {"preset", "kind"} & policy.keys():
            stage["policy"] = {"preset": usual_policy} | policy
        if _follows_the_final_run(stage["policy"]):
            usual = {"probe_every": None, "probe_on": "dev" if dev else "micro_dev", "patience": 1}
            if stage.get("probe_on", usual["probe_on"]) != "micro_dev" and not _needs_whole_rounds(stage["policy"]):
                usual["probe_examples"] = IN_TURN
        else:
            usual = {"probe_every": PAPER_PROBE_EVERY, "probe_on": "micro_dev", "patience": None}
        return content | {"controller": usual | stage}

    @model_validator(mode="after")
    def _single_run_has_its_mask(self) -> Self:
        """Refuse what contradicts a single run.

        Not in `FinalStage`, where grids and sweeps set a ratio on a stage whose start they then leave aside.
        """
        final = self.final
        if final.start == "controller":
            if final.prune_ratio is not None:
                raise ValueError(
                    f"final.start is 'controller', but final.prune_ratio {final.prune_ratio} leaves out the controller run; "
                    "remove one of them"
                )
            if final.mode != "hold" or final.mask is not None:
                raise ValueError(
                    "final.start is 'controller', which holds the controller's mask; "
                    f"remove {'final.mask' if final.mask is not None else 'final.mode'}, or start from 'merged'"
                )
            if self.controller.policy.probe_from > 0.0:
                raise ValueError(
                    "final.start is 'controller', which keeps the adapter of the best round, but the policy's probe_from "
                    f"{self.controller.policy.probe_from} leaves rounds to the end of the run, when it has overfitted; "
                    "set controller.policy.probe_from to 0, or start from 'merged'"
                )
        return self

    def seed_of(self, part: str) -> int:
        """Return the seed of one part of the experiment, so that no two parts share their random numbers."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{part}".encode()).digest()[:4], "big") >> 1

    def fingerprint(self) -> str:
        """Return a hash of what decides the result: all but the place of the data, the device, trackers and checkpoints."""
        content = self.model_dump(
            mode="json",
            exclude={"data": {"root"}, "backbone": {"device", "offline"}, "report_to": True, "save_every": True},
        )
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """Return the resolved recipe, every default filled in; without the place of the data, which is a machine's own."""
        content = self.model_dump(mode="json", exclude={"data": {"root"}})
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _has_dev(data: Any) -> bool:
    """Whether the target of a recipe's plain values will have a dev set."""
    target = data.get("target") if isinstance(data, dict) else None
    if not isinstance(target, dict):
        return True
    return target.get("dev") != 0 and (bool(target.get("dev_files")) or not target.get("train_files"))


def _follows_the_final_run(policy: Any) -> bool:
    """Whether a policy's plain values let all ratios train together, with rounds from before the first step on."""
    changes, base = _preset_of(policy)
    if base is None:  # it is refused where it is read
        return False
    kind = changes.get("kind", base.kind)
    shared = isinstance(kind, str) and kind in POLICIES and POLICIES[kind].shared
    return shared and changes.get("probe_from", base.probe_from) == 0


def _needs_whole_rounds(policy: Any) -> bool:
    """Whether the estimate of a policy's plain values needs all examples in each round."""
    changes, base = _preset_of(policy)
    return base is not None and changes.get("estimate", base.estimate) in WHOLE_ROUNDS


def _preset_of(policy: Any) -> tuple[dict[str, Any], PolicySettings | None]:
    """The plain values of a policy, and the preset that they change; None where there is none of that name."""
    changes = policy if isinstance(policy, dict) else {"preset": policy}
    name = changes.get("preset", "default")
    return changes, PRESETS.get(name) if isinstance(name, str) else None


def builtin_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("grasp_lora") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def builtin_text(name: str) -> str:
    """Return a recipe that comes with the package, as it is written.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in builtin_recipes():
        raise RecipeError(f"there is no built-in recipe {quoted(name)}; there are: {', '.join(builtin_recipes())}")
    return (resources.files("grasp_lora") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Path]:
    """Read a recipe by file or built-in name and apply overrides.

    Args:
        recipe: path of a YAML file, or a name of `builtin_recipes()`.
        overrides: `a.b=value`, the value read as YAML.

    Returns:
        The recipe, and the folder that its relative paths start from.

    Raises:
        RecipeError: one line that names the field, what arrived and what is allowed.
    """
    name = f"recipe {escaped(str(recipe))}"
    if is_file(Path(recipe)):
        try:
            text = decode(read_bounded(Path(recipe), MOST_BYTES), name)
        except RefusedError as error:
            raise RecipeError(f"{name}: {error}") from error
        base = Path(recipe).parent
    elif str(recipe) in builtin_recipes():
        text = builtin_text(str(recipe))
        base = Path()
    else:
        raise RecipeError(
            f"there is no recipe {quoted(str(recipe))}: neither a file nor a built-in name ({', '.join(builtin_recipes())})"
        )
    content = parse(text, name)
    if not isinstance(content, dict):
        raise RecipeError(f"{name} must hold keys and values, such as 'name: my-recipe'")
    for override in overrides:
        _apply(content, override)
    return validate(content, escaped(str(recipe))), base


def validate(content: dict[str, Any], name: str) -> Recipe:
    """Build a recipe from plain values.

    Raises:
        RecipeError: one line on the first thing that does not fit, with the dotted path of the field.
    """
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"recipe {name}: {_explain(error)}") from error
    try:
        _check_values(content, recipe, ())
    except ValueError as error:
        raise RecipeError(f"recipe {name}: {error}") from error
    return recipe


def _check_values(given: Any, value: Any, place: tuple[str, ...]) -> None:
    """Check every value by what holds for all of its kind, beside what the settings check themselves.

    Args:
        given: what the recipe says here, or None where it says nothing.
        value: what it was read as.
        place: keys that lead here.

    Raises:
        ValueError: with the dotted path.
    """
    if isinstance(value, Recipe) or is_dataclass(value):
        names = Recipe.model_fields if isinstance(value, Recipe) else [entry.name for entry in fields(value)]
        for name in names:
            inner = given.get(name) if isinstance(given, dict) else None
            _check_values(inner, getattr(value, name), (*place, name))
        return
    if isinstance(value, dict | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            inner = given[key] if isinstance(given, dict | list | tuple) else None
            _check_values(inner, part, (*place, str(key)))
        return
    problem = _problem_of(given, value, place)
    if problem:
        raise ValueError(f"{'.'.join(place)}: {problem}")


def _problem_of(given: Any, value: Any, place: tuple[str, ...]) -> str | None:
    if given is not None and isinstance(given, bool) is not isinstance(value, bool):
        wanted = "true or false" if isinstance(value, bool) else "a number"  # pydantic takes 1 for true, and true for 1
        return f"must be {wanted} (it is {quoted(given)})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number (it is {value})"
    if isinstance(value, int) and not isinstance(value, bool):
        key = place[-1]
        most = MOST_SEED if key.endswith("seed") else MOST_OF.get(key, MOST_WHOLE)
        return f"must be at most {most} (it is {quoted(value)})" if abs(value) > most else None
    if isinstance(value, str):
        free = ".".join(place).startswith(_FREE_TEXTS)
        return _text_problem(value, free)
    return None


def _text_problem(text: str, free: bool) -> str | None:
    """Why a text cannot be a name or a path; a free one may be anything that can be written down."""
    found = SURROGATES.search(text) if free else CONTROLS.search(text)
    if found:
        return f"holds the character U+{ord(found.group()):04X}, which is not allowed here; remove it"
    if free:
        return None
    if len(text) > MOST_TEXT:
        return f"has {len(text)} characters; at most {MOST_TEXT} are allowed"
    if max(len(part.encode()) for part in text.split("/")) > MOST_PART:
        return f"holds a name of more than {MOST_PART} bytes, which no file can have"
    return None


def _apply(content: dict[str, Any], override: str) -> None:
    shown = quoted(override)
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override {shown} must look like a.b=value, for example data.target.train=100")
    try:
        value = parse(text, "the value") if text else None
    except RecipeError as error:
        problem = str(error)
        if "no valid YAML" in problem:
            where = problem.partition("no valid YAML")[2].lstrip(": ")
            problem = f"the value is no valid YAML; put text in quotes ({where})"
        raise RecipeError(f"override {shown}: {problem}") from error
    place = content
    for key in keys[:-1]:
        inner = place.get(key)
        if isinstance(inner, str) and key == "policy":
            inner = {"preset": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"override {shown}: {escaped(key)} is no section of the recipe")
        place[key] = inner
        place = inner
    place[keys[-1]] = value


def _explain(error: ValidationError) -> str:
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
