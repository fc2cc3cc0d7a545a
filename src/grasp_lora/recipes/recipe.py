"""The recipe: one typed YAML file that says everything about an experiment.

The settings live beside the code that they steer; the recipe nests them. Unknown keys are errors. `--set a.b=value` changes
single values; the resolved recipe is saved with the run.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from grasp_lora.data.data_settings import CorpusSettings, DataSettings, Texts
from grasp_lora.evaluation.bertscore import BertScoreSettings
from grasp_lora.method.masks import MaskSettings
from grasp_lora.method.merging import MergeSettings
from grasp_lora.models.model_settings import BackboneSettings, GenerationSettings, LoraSettings
from grasp_lora.recipes.section import Based, Section
from grasp_lora.recipes.stages import ControllerStage, Deliver, FinalStage, SourceStage, TargetStage, from_preset
from grasp_lora.text.docstrings import arguments
from grasp_lora.text.names import without_place
from grasp_lora.training.training_settings import TrainingSettings

PAPER = "paper"  # the preset whose trainings are as the released code has them
TEXTS = ("prompt", "completion", "stop", "labels", "columns")  # keys of texts that may look like a path
DATA = Section(
    written={
        "source": Annotated[CorpusSettings, Section(("micro_dev", "test"))] | None,
        "target": Annotated[CorpusSettings, Section()],
    }
)


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
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    seed: int = Field(default=42, ge=0)
    backbone: Annotated[BackboneSettings, Section(("device",))] = Field(default_factory=BackboneSettings)
    data: Annotated[DataSettings, DATA]
    lora: Annotated[LoraSettings, Section()] = Field(default_factory=LoraSettings)
    source: Annotated[SourceStage, Section()] = Field(default_factory=SourceStage)
    target: Annotated[TargetStage, Section()] = Field(default_factory=TargetStage)
    merge: Annotated[MergeSettings, Section(("seed", "dropout"))] = Field(default_factory=MergeSettings)
    mask: Annotated[MaskSettings, Section()] = Field(default_factory=MaskSettings)
    controller: Annotated[ControllerStage, Section()] = Field(default_factory=ControllerStage)
    final: Annotated[FinalStage, Section()] = Field(default_factory=FinalStage)
    generation: Annotated[GenerationSettings, Section()] = Field(default_factory=GenerationSettings)
    metrics: tuple[str, ...] = ()
    bertscore: Annotated[BertScoreSettings, Section()] = Field(default_factory=BertScoreSettings)
    report_to: Texts = ()

    @model_validator(mode="before")
    @classmethod
    def _on_its_preset(cls, content: Any) -> Any:
        """Build every section on what the preset of the controller has, and on what holds for all trainings."""
        if not isinstance(content, Mapping):
            return content
        sections = dict(content)
        controller, backbone = sections.get("controller", {}), sections.get("backbone")
        if not isinstance(controller, Mapping | None):
            return content
        sections["controller"] = from_preset(controller or {}, _has_dev(content.get("data")))
        paper = sections["controller"]["preset"] == PAPER
        common: dict[str, Any] = {
            "max_grad_norm": 0.0 if paper else 1.0,
            "gradient_checkpointing": isinstance(backbone, Mapping) and backbone.get("gradient_checkpointing") is True,
        }
        for name, stage in (("source", SourceStage()), ("target", TargetStage()), ("final", FinalStage())):
            section = sections.get(name, {})
            if isinstance(section, Mapping):  # its keys stand on the usual settings, not on the stage's own
                usual = TrainingSettings() if "training" in section else stage.training
                training = Based(replace(usual, **common), section.get("training", {}))
                sections[name] = {**section, "training": training}
        learned = sections["controller"].get("training")
        if isinstance(learned, Based):
            sections["controller"]["training"] = Based(replace(learned.settings, **common), learned.keys)
        if paper and isinstance(merge := sections.get("merge", {}), Mapping):
            sections["merge"] = Based(MergeSettings(dropout=0.0), merge)
        return sections

    @model_validator(mode="after")
    def _continued_alone_merges_nothing(self) -> Self:
        """Refuse what would be left unused."""
        if self.final.deliver == "continued" and (self.final.prune_ratio != 0 or self.target.adapter):
            raise ValueError(
                "final.deliver is 'continued', which merges nothing; set it to best, or give a final.prune_ratio of 0 and no "
                f"target.adapter (they are {self.final.prune_ratio} and {self.target.adapter})"
            )
        return self

    @model_validator(mode="after")
    def _target_on_source_is_added_up(self) -> Self:
        """Refuse another merge than the sum, whose second part the target adapter is trained as, and one that is given."""
        contrary = {
            "target.adapter": self.target.adapter is not None,
            "merge.rule": self.merge.rule != "exact",
            "merge.weights": self.merge.weights is not None,
        }
        if self.target.on is not None and any(contrary.values()):
            key = next(key for key, present in contrary.items() if present)
            raise ValueError(
                f"target.on is {self.target.on!r}, so the target adapter is trained here, and both are added up as they are; "
                f"remove {key}, or target.on"
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
        """Return a hash of what decides the result: all but places, devices, trackers and what saves memory."""
        content = self.model_dump(mode="json", exclude={"report_to"})
        content["data"].pop("root")
        for key in ("shard", "gradient_checkpointing"):
            content["backbone"].pop(key)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def choices(self) -> set[str]:
        """Return the fingerprints of all recipes that take the same steps and differ in what becomes of them in the end."""
        return {
            self.model_copy(update={"final": replace(self.final, deliver=deliver)}).fingerprint()
            for deliver in get_args(Deliver)
        }

    def to_yaml(self, folder: Path | None = None) -> str:
        """Return the resolved recipe, every default filled in; without the place of the data, which is a machine's own.

        Args:
            folder: where it will stand: absolute paths are then written as they are seen from there, or as their last part where
                they have no folder in common with it.
        """
        content = self.model_dump(mode="json")
        content["data"].pop("root")
        content = content if folder is None else seen_from(folder.absolute(), content)
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


for _name, _meaning in arguments(Recipe.__doc__ or "").items():
    Recipe.model_fields[_name].description = _meaning
Recipe.model_rebuild(force=True)


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
    splits = target.get("files")
    pool = not isinstance(splits, Mapping) or "train" not in splits
    return target.get("dev") != 0 and (pool or "dev" in (splits or {}))


def schema_text() -> str:
    """Return the JSON schema of a recipe, by which editors complete and check its keys."""
    return json.dumps(Recipe.model_json_schema(), indent=1, ensure_ascii=False) + "\n"


def recipe_keys() -> list[str]:
    """Return every key of a recipe by its dotted path, each section before what stands in it."""
    schema = Recipe.model_json_schema()
    return list(_keys(schema, schema.get("$defs", {}), ""))


def _keys(section: dict[str, Any], sections: dict[str, Any], path: str) -> Iterator[str]:
    for name, entry in section.get("properties", {}).items():
        yield path + name
        for part in (entry, *entry.get("anyOf", ())):
            inner = sections[part["$ref"].rpartition("/")[2]] if "$ref" in part else part
            yield from _keys(inner, sections, f"{path}{name}.")
