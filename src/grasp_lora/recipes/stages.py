"""The stages of a recipe: source, target, controller and final run, with what they check."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, InstanceOf, PlainSerializer, WithJsonSchema

from grasp_lora.method.masks import MASK_MODES, MaskSettings
from grasp_lora.method.search import (
    POLICIES,
    PRESETS,
    WITH_DEV,
    WITHOUT_DEV,
    Controller,
    RatioPolicy,
    plain_policy,
    policy_class,
    preset,
)
from grasp_lora.storage.reading import adapter_of
from grasp_lora.text.display import quoted
from grasp_lora.training.settings import TrainingSettings


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
    return adapter_of(policy_class(kind)).validate_python(settings)


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
        ValueError: the policy is no section, or there is no such preset.
    """
    policy = {} if stage.get("policy") is None else stage["policy"]
    if not isinstance(policy, dict):
        raise ValueError(
            f"controller.policy is {quoted(policy)}, but a policy is a section; set controller.preset to a name"
        )
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
    training: TrainingSettings = field(default_factory=lambda: TrainingSettings(epochs=2.0, learning_rate=3e-4))

    def __post_init__(self) -> None:
        if not all(adapter.strip() for adapter in self.adapters):
            raise ValueError("adapters names an empty place; give a folder or a hub id")


AUTO = "auto"
ON = ("source", AUTO)


@dataclass(frozen=True)
class TargetStage:
    """The target adapter: an existing one, or one trained on the target data.

    Args:
        adapter: PEFT folder or hub id; None trains one.
        on: `source` trains it on top of the source adapter, which stays frozen beneath it; their merge is then the sum of both.
            None trains it on the backbone alone, as the paper does. `auto` does both, and goes on with the merge that has the
            lower loss on all dev and micro-dev rows.
        training: how it is trained.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    adapter: str | None = None
    on: str | None = None
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        if self.on not in (None, *ON):
            raise ValueError(f"on is {quoted(self.on)}; allowed: {', '.join(ON)}, or null for the backbone alone")
        if self.on is not None and self.adapter is not None:
            raise ValueError(
                f"on is {self.on!r}, but an adapter is given, which was trained already; remove one of them"
            )
        if self.adapter is not None and not self.adapter.strip():
            raise ValueError("adapter is empty; give a folder or a hub id, or leave it out to train one")


@dataclass(frozen=True)
class ControllerStage(Controller):
    """The run that learns the ratio.

    In a recipe, `preset` names one (`spread`, `late`, `paper`), and what is left out here is the preset's. The preset
    left out is `spread` where the target has a dev set, else `late`.

    Args:
        policy: who chooses candidates and when the current ratio moves: its `kind` (`gaussian`, `spread` or the import
            path `package.module:name` of a class) and its settings.
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
                "remove it"
            )
        if self.training.patience is not None and self.policy.regime != "held":
            raise ValueError(
                f"training.patience is {self.training.patience}, but this policy trains at many ratios, so "
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


DELIVER = ("best", "grasp")


@dataclass(frozen=True)
class FinalStage:
    """The final run at the learned ratio.

    Args:
        mode: `hold` one mask, or `reselect` after every optimizer step (the paper's final run).
        mask: another score than the controller's; None takes the same.
        prune_ratio: use this fraction, in [0, 1], instead of learning one; the controller run is then left out.
        training: how it is trained.
        deliver: what the run hands over: `best`, which is this run's result where the target adapter is ahead of the source
            adapter, else the source adapter continued on the target rows, unless the dev rows show another to be better; or
            `grasp`, this run's result in any case.
        all_rows: train what is handed over once more, on the target's train, dev and micro-dev rows together, for as many
            optimizer steps as the adapter had that was kept. `compare` leaves this aside.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    mode: str = "hold"
    mask: MaskSettings | None = None
    prune_ratio: float | None = None
    training: TrainingSettings = field(default_factory=TrainingSettings)
    deliver: str = "best"
    all_rows: bool = False

    def __post_init__(self) -> None:
        if self.deliver not in DELIVER:
            raise ValueError(f"deliver is {self.deliver!r}; allowed: {', '.join(DELIVER)}")
        if self.mode not in MASK_MODES:
            raise ValueError(f"mode is {self.mode!r}; allowed: {', '.join(MASK_MODES)}")
        if self.prune_ratio is not None and not 0.0 <= self.prune_ratio <= 1.0:
            ratio = self.prune_ratio
            hint = f"; for {ratio:g} % write {ratio / 100:g}" if 1 < ratio <= 100 else ""
            raise ValueError(f"prune_ratio is {ratio}; it must be a fraction in [0, 1]{hint}")
