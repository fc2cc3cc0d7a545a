"""The recipe: one typed YAML file that says everything about an experiment.

The settings live beside the code that they steer; the recipe nests them. Unknown keys are errors. `--set a.b=value` changes
single values; the resolved recipe is saved with the run.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)

from grasp_lora.data.build import DataSettings
from grasp_lora.evaluation.bertscore import BertScoreSettings
from grasp_lora.method.masks import MaskSettings
from grasp_lora.method.merging import MergeSettings, merge_rule
from grasp_lora.method.policy import POLICIES, plain_policy, policy_class
from grasp_lora.method.presets import PRESETS, WITH_DEV, WITHOUT_DEV, Controller, preset
from grasp_lora.method.search import RatioPolicy
from grasp_lora.models.settings import BackboneSettings, GenerationSettings, LoraSettings, Texts
from grasp_lora.storage.processes import WAIT_MINUTES
from grasp_lora.text.display import quoted
from grasp_lora.text.names import without_place
from grasp_lora.training.settings import TrainingSettings

RECIPE_FILE = "recipe.yaml"
NO_RESULT = ("report_to", "save_every", "wait_minutes")  # settings that decide nothing of a result


TEXTS = ("prompt", "completion", "stop", "labels", "columns")  # keys of texts that may look like a path
LATER_OF_DATA = {"labels", "skip_unanswered"}
LATER_OF_CORPORA = {"sheet", "prompt", "completion"}
RENAMED = {  # keys of a controller as recipes had them once, and where they are now
    "probe_every": "rounds.every (null is now 'epoch')",
    "probe_on": "rounds.pool",
    "probe_examples": "rounds.in_turn",
    "patience": "rounds.patience",
    "policy.preset": "preset",
    "policy.probe_from": "rounds.start",
    "policy.estimate": "rule",
}


def _policy(value: Any) -> Any:
    """Build a policy from its kind, a name or an import path, and its settings."""
    if isinstance(value, RatioPolicy):
        return value
    settings = dict(value)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str):
        raise ValueError(
            f"kind is {quoted(kind)}; allowed: {', '.join(POLICIES)}, or the import path package.module:name"
        )
    return TypeAdapter(policy_class(kind)).validate_python(settings)


KIND = {
    "type": "string",
    "examples": list(POLICIES),
    "description": "Which policy: a name, or the import path of a class.",
}
Policy = Annotated[
    RatioPolicy,
    InstanceOf(),
    BeforeValidator(_policy),
    PlainSerializer(plain_policy, return_type=dict[str, Any]),
    WithJsonSchema({"type": "object", "properties": {"kind": KIND}}),
]


def from_preset(stage: dict[str, Any], dev: bool) -> dict[str, Any]:
    """The plain values of a controller: what the recipe gives, and for the rest what its preset has.

    Args:
        stage: the recipe's.
        dev: whether the target has a dev set, which decides the preset that is taken where none is named.

    Raises:
        ValueError: a key has another name now, or there is no such preset.
    """
    policy = {} if stage.get("policy") is None else stage["policy"]
    if not isinstance(policy, dict):
        raise ValueError(
            f"controller.policy is {quoted(policy)}, but a policy is a section; set controller.preset to a name"
        )
    for key in (*stage, *(f"policy.{key}" for key in policy)):
        if key in RENAMED:
            raise ValueError(f"controller.{key} is now controller.{RENAMED[key]}; rename it")
    stage = {key: value for key, value in stage.items() if value is not None}  # an empty section says nothing
    name = stage.get("preset", WITH_DEV if dev else WITHOUT_DEV)
    if not isinstance(name, str):
        raise ValueError(f"controller.preset is {quoted(name)}; allowed: {', '.join(PRESETS)}")
    base = preset(name)
    own = plain_policy(base.policy)
    other = policy.get("kind", own["kind"]) != own["kind"]  # then it has settings of its own
    values: dict[str, Any] = {"policy": {} if other else own, "rounds": asdict(base.rounds), "rule": base.rule}
    for key, value in stage.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = values[key] | value if both else value
    values.pop("preset", None)
    return values


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


@dataclass(frozen=True)
class ControllerStage(Controller):
    """The run that learns the ratio.

    In a recipe, `preset` names one (`spread`, `late` or `paper`), and what is left out here is the preset's. The preset left out
    is `spread` where the target has a dev set, else `late`.

    Args:
        policy: who chooses candidates and when the current ratio moves: its `kind` (`gaussian`, `uniform`, `spread`, or the
            import path `package.module:name` of a class) and its settings.
        rounds: when rounds come and what they measure.
        rule: how the ratio is read off them: `surrogate`, `smooth_fit`, `best_reward` (the paper's), or the import path of a
            `Rule`.
        training: batch 1 by default. With `patience` the run stops by its dev loss, where one ratio is held; `keep` stays
            `last`, as the masks are those of the last step.

    Raises:
        ValueError: a setting is out of range, or two contradict each other.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    policy: Policy = field(default_factory=lambda: PRESETS[WITH_DEV].policy)
    training: ControllerTraining = field(default_factory=lambda: TrainingSettings(patience=None, keep="last"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.training.keep != "last":
            raise ValueError(
                f"training.keep is {self.training.keep!r}, but the masks of a controller run are those of its last step; "
                "remove it, or set final.start to 'controller', which keeps the best round's adapter"
            )
        if self.training.patience is not None and self.policy.regime != "held":
            raise ValueError(
                f"training.patience is {self.training.patience}, but each step of this policy trains at a ratio of its own, so "
                "no dev loss is that of the run; remove it, or set controller.rounds.patience to stop the run by its rounds"
            )
        if self.training.patience is not None and self.rounds.start > 0.0:
            raise ValueError(
                f"training.patience is {self.training.patience}, but controller.rounds.start {self.rounds.start} leaves rounds "
                "to the end of the run, which may stop before; remove one of them"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """The target's splits that the run measures: what its rounds probe, and dev where its loss can end the run."""
        probed = self.rounds.splits
        return probed if self.training.patience is None or "dev" in probed else (*probed, "dev")

    def spacing(self, train_examples: int) -> int:
        """Optimizer steps between rounds of a run over so many training examples."""
        return self.rounds.spacing(self.training.steps_per_epoch(train_examples))

    def round_steps(self, train_examples: int) -> list[int]:
        """The optimizer steps that a round follows in a run over so many training examples, 0 for one before the first step."""
        return self.rounds.round_steps(self.training.steps(train_examples), self.spacing(train_examples))


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
        deliver: what the run hands over: `best`, the best by dev loss of the source adapter, the target adapter, the merge, the
            source adapter continued on the target rows, and this run's result; or `grasp`, this run's result in any case.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    mode: str = "hold"
    mask: MaskSettings | None = None
    prune_ratio: float | None = None
    training: TrainingSettings = field(default_factory=TrainingSettings)
    start: str = "merged"
    deliver: str = "best"

    def __post_init__(self) -> None:
        if self.deliver not in ("best", "grasp"):
            raise ValueError(f"deliver is {self.deliver!r}; allowed: best, grasp")
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
        report_to: trackers of transformers, such as `tensorboard`, one or a list; none by default.
        save_every: optimizer steps between checkpoints, >= 1; None for an epoch or a tenth of a training, the shorter one.
        wait_minutes: under torchrun, how long a process waits for the others before it counts one as lost, > 0; the first load of
            backbone and data has hours.
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
    report_to: Texts = ()
    save_every: int | None = Field(default=None, ge=1)
    wait_minutes: float = Field(default=WAIT_MINUTES, gt=0.0, le=1440.0)

    @model_validator(mode="before")
    @classmethod
    def _controller_from_preset(cls, content: Any) -> Any:
        stage = content.get("controller", {}) if isinstance(content, dict) else None
        if not isinstance(stage, dict):
            return content
        return content | {"controller": from_preset(stage, _has_dev(content.get("data")))}

    @model_validator(mode="after")
    def _single_run_has_its_mask(self) -> Self:
        """Refuse what contradicts a single run.

        Not in `FinalStage`, where grids and sweeps set a ratio on a stage whose start they then leave aside.
        """
        final = self.final
        if final.start == "controller":
            if merge_rule(self.merge.rule).space.apart:
                raise ValueError(
                    f"final.start is 'controller', whose adapter is saved as one, but merge.rule {quoted(self.merge.rule)} keeps "
                    "adapters apart; start from 'merged', or take another rule, such as 'paper_sum_unscaled' with weights of 1"
                )
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
            if self.controller.rounds.start > 0.0:
                raise ValueError(
                    "final.start is 'controller', which keeps the adapter of the best round, but controller.rounds.start "
                    f"{self.controller.rounds.start} leaves rounds to the end of the run, when it has overfitted; "
                    "set it to 0, or start from 'merged'"
                )
        return self

    @property
    def dropout(self) -> float:
        """Dropout of the controller run and the final runs."""
        return self.lora.dropout if self.merge.dropout is None else self.merge.dropout

    def seed_of(self, part: str) -> int:
        """Return the seed of one part of the experiment, so that no two parts share their random numbers."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{part}".encode()).digest()[:4], "big") >> 1

    def fingerprint(self) -> str:
        """Return a hash of what decides the result: all but the place of the data, devices, processes, trackers and checkpoints.

        Keys of the data that came later count only where they are set, so that runs begun before go on.
        """
        content = self.model_dump(
            mode="json",
            exclude={"data": {"root"}, "backbone": {"device", "offline", "shard"}, **dict.fromkeys(NO_RESULT, True)},
        )
        data = content["data"]
        # None was once false; where it means something else now, the run's hash of its examples differs.
        data["chat_template"] = bool(data["chat_template"])
        for part, later in ((data, LATER_OF_DATA), *((data[side], LATER_OF_CORPORA) for side in ("source", "target"))):
            for key in later & (part or {}).keys():
                if not part[key]:
                    del part[key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self, folder: Path | None = None) -> str:
        """Return the resolved recipe, every default filled in; without the place of the data, which is a machine's own.

        Args:
            folder: where it will stand: absolute paths are then written as they are seen from there, or as their last part where
                they have no folder in common with it.
        """
        content = self.model_dump(mode="json", exclude={"data": {"root"}})
        content = content if folder is None else _seen_from(folder.absolute(), content)
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _seen_from(folder: Path, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: part if key in TEXTS else _seen_from(folder, part) for key, part in value.items()}
    if isinstance(value, list):
        return [_seen_from(folder, part) for part in value]
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    shared = Path(value).parts[:2] == folder.parts[:2]  # more than the root
    return Path(os.path.relpath(value, folder)).as_posix() if shared else without_place(value)


def _has_dev(data: Any) -> bool:
    """Whether the target of a recipe's plain values will have a dev set."""
    target = data.get("target") if isinstance(data, dict) else None
    if not isinstance(target, dict):
        return True
    return target.get("dev") != 0 and (bool(target.get("dev_files")) or not target.get("train_files"))
