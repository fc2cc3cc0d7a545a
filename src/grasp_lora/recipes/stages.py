"""The stages of a recipe: source, target, controller and final run, with what they check.

Fields that are no keys have one right answer, or the one of the preset: `HIDDEN`, and the tuples beside each section.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from grasp_lora.method.masks import MaskSettings
from grasp_lora.method.search import (
    POLICIES,
    PRESETS,
    Controller,
    RatioPolicy,
    Rounds,
    plain_policy,
    policy_class,
    preset,
)
from grasp_lora.recipes.section import Based, Section, values_of
from grasp_lora.text.display import quoted
from grasp_lora.training.training_settings import TrainingSettings

HIDDEN = ("lr_decay", "max_grad_norm", "evaluate_every", "gradient_checkpointing")
Training = Annotated[TrainingSettings, Section(HIDDEN)]
# A controller run steps after each batch, so that rounds are as many as the steps say.
ControllerTraining = Annotated[TrainingSettings, Section((*HIDDEN, "accumulation"))]
BOUNDS = ("ratio_min", "ratio_max")
DEFAULT = "grasp"


class PolicySection(Section):
    """The keys of a policy: its kind, the bounds, and all settings of one that is named by import path."""

    def model_of(self, settings: type[Any]) -> type[BaseModel]:
        """The keys of a kind; of the base class those that an editor completes."""
        kind = (str, Field(description="a name, or the import path of a class.", examples=list(POLICIES)))
        model = super().model_of(settings)
        if settings in (*POLICIES.values(), RatioPolicy):
            bounds: Any = {
                name: (float, Field(model.model_fields[name].default, description=model.model_fields[name].description))
                for name in BOUNDS
            }
            extra = ConfigDict(extra="allow" if settings is RatioPolicy else "forbid")
            return create_model("Policy", __config__=extra, __doc__="Who chooses candidates.", kind=kind, **bounds)
        return create_model(settings.__name__, __base__=model, kind=kind)

    def read(self, settings: type[Any], base: Any, keys: Any) -> RatioPolicy:
        """Build a policy of the kind that is named, or of the preset's kind."""
        kind = keys.get("kind", "") if isinstance(keys, Mapping) else ""
        chosen = type(base) if kind == "" and base is not None else policy_class(kind)
        if type(base) is not chosen:
            base = chosen() if chosen in POLICIES.values() else None
        defaults = {} if base is None else self.write(base)
        if isinstance(keys, Mapping):
            keys = {**defaults, **keys}
        values = values_of(self.keys(chosen).model_validate(keys))
        del values["kind"]
        if base is not None and "ratio_init" not in keys:  # the first ratio lies within the bounds
            values["ratio_init"] = min(max(base.ratio_init, values["ratio_min"]), values["ratio_max"])
        return chosen(**{**({} if base is None else vars(base)), **values})

    def write(self, settings: Any) -> dict[str, Any]:
        """The kind and the values of its keys."""
        values = plain_policy(settings)
        return {name: values[name] for name in self.keys(type(settings)).model_fields}


def from_preset(stage: Mapping[str, Any], dev: bool) -> dict[str, Any]:
    """What a controller is built of: the keys of the recipe on top of what its preset has.

    `dev`: whether the target has a dev set, which preset `grasp` then probes.

    Raises:
        ValueError: there is no such preset.
    """
    stage = {key: value for key, value in stage.items() if value is not None}  # an empty section says nothing
    name = stage.get("preset", DEFAULT)
    if str(name) not in PRESETS:  # an import path would run its code
        raise ValueError(f"controller.preset is {quoted(name)}; allowed: {', '.join(PRESETS)}")
    base = preset(name, dev)
    sections = {"policy": base.policy, "rounds": base.rounds, "training": CONTROLLER_TRAINING}
    values = {"preset": name, "rule": base.rule} | stage
    for key, settings in sections.items():
        if isinstance(values.setdefault(key, {}), Mapping | str):
            values[key] = Based(settings, values[key])
    return values


CONTROLLER_TRAINING = TrainingSettings(patience=None)


@dataclass(frozen=True)
class SourceStage:
    """The source adapters: existing ones, or one trained on the source data.

    Args:
        adapters: PEFT folders or hub ids to merge; empty trains one.
        training: how that one is trained.
    """

    adapters: tuple[str, ...] = ()
    training: Training = field(default_factory=lambda: TrainingSettings(epochs=2.0, learning_rate=3e-4))


@dataclass(frozen=True)
class TargetStage:
    """The target adapter: an existing one, or one trained on the target data.

    Args:
        adapter: PEFT folder or hub id; None trains one.
        on: `source` trains it on top of the source adapter, which stays frozen beneath it; their merge is then the sum of both.
            None trains it on the backbone alone, as the paper does, and the merge is their average.
        training: how it is trained.
    """

    adapter: str | None = None
    on: Literal["source"] | None = None
    training: Training = field(default_factory=TrainingSettings)


@dataclass(frozen=True)
class ControllerStage(Controller):
    """The run that learns the ratio; what a recipe leaves out is the preset's.

    Args:
        preset: `grasp`, or `paper` for the paper's, to the letter.
        policy: who chooses candidates and when the current ratio moves: its `kind` (`grpo`, `paper` or the import
            path `package.module:name` of a class) and its settings.
        rounds: when rounds come.
        rule: how the ratio is read off them: `surrogate`, `surrogate_at_end`, `best_reward` (the paper's), or the import path
            of a `Rule`.
        training: batch 1 by default. With `patience` the run stops by its dev loss, where one ratio is held.

    Raises:
        ValueError: a setting is out of range, or two contradict each other.
    """

    policy: Annotated[RatioPolicy, PolicySection()] = field(default_factory=lambda: PRESETS[DEFAULT].policy)
    rounds: Annotated[Rounds, Section(("at_ends", "pool", "in_turn", "patience"))] = field(
        default_factory=lambda: PRESETS[DEFAULT].rounds
    )
    training: ControllerTraining = CONTROLLER_TRAINING
    preset: str = DEFAULT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.training.patience is not None and self.policy.regime != "held":
            raise ValueError(
                f"training.patience is {self.training.patience}, but this policy, or preset {self.preset!r}, needs all steps; "
                "remove it"
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


Deliver = Literal["best", "grasp", "continued"]


@dataclass(frozen=True)
class FinalStage:
    """The final run at the learned ratio.

    Args:
        mode: `hold` one mask, or `reselect` after every optimizer step by the score `gradient_of_delta` (the paper's final run).
        prune_ratio: use this fraction, in [0, 1], instead of learning one; the controller run is then left out.
        training: how it is trained.
        deliver: what the run hands over: `best`, the mean of this run's result and of the source adapter continued; `grasp`,
            this run's result in any case; or `continued`, where nothing else is trained on the target rows.
    """

    mode: Literal["hold", "reselect"] = "hold"
    prune_ratio: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    training: Training = field(default_factory=TrainingSettings)
    deliver: Deliver = "best"

    def mask_of(self, usual: MaskSettings) -> MaskSettings:
        """The mask of a final run: the recipe's, but what is selected anew goes by the paper's score."""
        return MaskSettings("gradient_of_delta") if self.mode == "reselect" else usual
