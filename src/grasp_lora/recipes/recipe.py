"""The recipe: one typed YAML file that says everything about an experiment.

The settings live beside the code that they steer; the recipe nests them. Unknown keys are errors. `--set a.b=value` changes
single values; the resolved recipe is saved with the run.
"""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

from grasp_lora.data.settings import DataSettings
from grasp_lora.evaluation.extras import BertScoreSettings
from grasp_lora.method.masks import MaskSettings
from grasp_lora.method.merging import MergeSettings
from grasp_lora.models.settings import BackboneSettings, GenerationSettings, LoraSettings, Texts
from grasp_lora.recipes.stages import DELIVER, ControllerStage, FinalStage, SourceStage, TargetStage, from_preset
from grasp_lora.text.names import without_place

NO_RESULT = ("report_to", "save_every", "wait_minutes")  # settings that decide nothing of a result


TEXTS = ("prompt", "completion", "stop", "labels", "columns")  # keys of texts that may look like a path


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
        save_every: optimizer steps between checkpoints, >= 1; None for an epoch or a tenth of a training, the shorter one, but at
            least 10.
        wait_minutes: under torchrun, how long a process waits for the others before it counts one as lost, in (0, 1440]; the
            first load of backbone and data has hours.
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
    wait_minutes: float = Field(default=15.0, gt=0.0, le=1440.0)

    @model_validator(mode="before")
    @classmethod
    def _controller_from_preset(cls, content: Any) -> Any:
        stage = content.get("controller", {}) if isinstance(content, dict) else None
        if not isinstance(stage, dict):
            return content
        return content | {"controller": from_preset(stage, _has_dev(content.get("data")))}

    @model_validator(mode="after")
    def _target_on_source_is_added_up(self) -> Self:
        """Refuse another merge than the sum: the target adapter was trained as the second part of it."""
        if self.target.on is not None and (self.merge.rule != "exact" or self.merge.weights is not None):
            found = "merge.rule" if self.merge.rule != "exact" else "merge.weights"
            raise ValueError(
                f"target.on is {self.target.on!r}, so both adapters are added up as they are; remove {found}, or target.on"
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
        """Return a hash of what decides the result: all but places, devices, trackers, checkpoints and what saves memory.

        Keys of the backbone, the data and `final` that came later count only where they are set, so that runs begun before go on.
        """
        content = self.model_dump(
            mode="json",
            exclude={"data": {"root"}, "backbone": {"device", "offline", "shard"}, **dict.fromkeys(NO_RESULT, True)},
        )
        usual = GenerationSettings()
        content["generation"] |= {"batch_size": usual.batch_size, "batch_tokens": usual.batch_tokens}
        for stage in ("source", "target", "controller", "final"):
            content[stage]["training"]["gradient_checkpointing"] = False
        data = content["data"]
        # None was once false; where it means something else now, the run's hash of its examples differs.
        data["chat_template"] = bool(data["chat_template"])
        later: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (  # an older recipe does not have these keys
            (content["backbone"], ("quantise",)),
            (data, ("labels", "skip_unanswered")),
            (data["source"] or {}, ("sheet", "prompt", "completion")),
            (data["target"], ("sheet", "prompt", "completion")),
            (content["target"], ("on",)),
            (content["final"], ("all_rows",)),
        )
        for section, keys in later:
            for key in keys:
                if key in section and not section[key]:
                    del section[key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def choices(self) -> set[str]:
        """Return the fingerprints of all recipes that take the same steps and differ in what becomes of them in the end."""
        return {
            self.model_copy(update={"final": replace(self.final, deliver=deliver, all_rows=all_rows)}).fingerprint()
            for deliver in DELIVER
            for all_rows in (False, True)
        }

    def to_yaml(self, folder: Path | None = None) -> str:
        """Return the resolved recipe, every default filled in; without the place of the data, which is a machine's own.

        Args:
            folder: where it will stand: absolute paths are then written as they are seen from there, or as their last part where
                they have no folder in common with it.
        """
        content = self.model_dump(mode="json", exclude={"data": {"root"}})
        content = content if folder is None else seen_from(folder.absolute(), content)
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def seen_from(folder: Path, value: Any) -> Any:
    """Write absolute paths as they are seen from a folder, or as their last part where they have no folder in common with it."""
    if isinstance(value, dict):
        return {key: part if key in TEXTS else seen_from(folder, part) for key, part in value.items()}
    if isinstance(value, list):
        return [seen_from(folder, part) for part in value]
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    path, real = Path(value), Path(os.path.realpath(folder))
    # Where the folder lies behind a link, `..` leaves it from where that leads, which may be another disk.
    for start, place in ((real, Path(os.path.realpath(path.parent), path.name)), (folder, path)):
        if start.parts[:2] == place.parts[:2]:  # more than the root
            return Path(os.path.relpath(place, start)).as_posix()
    return without_place(value)


def _has_dev(data: Any) -> bool:
    """Whether the target of a recipe's plain values will have a dev set."""
    target = data.get("target") if isinstance(data, dict) else None
    if not isinstance(target, dict):
        return True
    return not _is_zero(target.get("dev")) and (bool(target.get("dev_files")) or not target.get("train_files"))


def _is_zero(value: Any) -> bool:
    """Whether a value will be read as the number 0."""
    try:
        return not isinstance(value, bool) and float(value) == 0.0
    except (TypeError, ValueError):
        return False
