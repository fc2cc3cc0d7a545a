"""The recipe: one typed YAML file that says everything about an experiment.

The settings live beside the code that they steer; the recipe nests them. Unknown keys are errors. `--set a.b=value` changes
single values; the resolved recipe is saved with the run.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from grasp_lora.data.build import DataSettings
from grasp_lora.evaluation.bertscore import BertScoreSettings
from grasp_lora.method.masks import MaskSettings
from grasp_lora.method.merging import MergeSettings
from grasp_lora.method.policy import POLICIES, PRESETS, WHOLE_ROUNDS, PolicySettings
from grasp_lora.models.settings import BackboneSettings, GenerationSettings, LoraSettings
from grasp_lora.text.display import quoted
from grasp_lora.training.settings import TrainingSettings

RECIPE_FILE = "recipe.yaml"


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
