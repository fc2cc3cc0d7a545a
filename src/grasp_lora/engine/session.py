"""What an experiment stands on, loaded once: backbone, rows, given adapters, metrics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from grasp_lora.data.encode import Example
from grasp_lora.data.splits import Fold, Splits, build_splits
from grasp_lora.data.tasks import task_fields
from grasp_lora.engine.progress import Progress
from grasp_lora.errors import AdapterError
from grasp_lora.evaluation.metrics import Metric, resolve_metrics, score
from grasp_lora.evaluation.short_answers import MetricScore
from grasp_lora.method.lora import AdapterWeights
from grasp_lora.models.adapter_files import Answers as HowToAnswer
from grasp_lora.models.adapter_files import LoadedAdapter, read_adapter
from grasp_lora.models.adapters import check_fits, save_adapter
from grasp_lora.models.backbone import Backbone, load_backbone
from grasp_lora.models.model_settings import EMBEDDED_NAME, BackboneSettings
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.storage.reading import is_folder
from grasp_lora.text.display import listed
from grasp_lora.text.names import without_place


class Session:
    """One recipe with what it names, each loaded when it is first asked for.

    Args:
        base: folder that relative paths of the recipe start from.
        fold: of a cross-validation, on which the target is tested; None for the recipe's splits.

    Raises:
        GraspError: (from the properties) the backbone, the data or an adapter cannot be used.
    """

    def __init__(self, recipe: Recipe, base: Path, progress: Progress | None = None, fold: Fold | None = None) -> None:
        self.recipe = recipe
        self.base = base
        self.progress = progress or Progress()
        self.fold = fold

    def variant(self, recipe: Recipe | None = None, splits: Splits | None = None) -> "Session":
        """The same with another recipe or other splits; what both have in common is not loaded again."""
        session = Session(recipe or self.recipe, self.base, self.progress, self.fold)
        session.backbone, session.splits, session.given = self.backbone, splits or self.splits, self.given
        return session

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen model; a relative folder starts from that of the recipe, or else from the working one."""
        loaded = load_backbone(self.backbone_settings)
        if self.backbone_settings != self.recipe.backbone:
            loaded.name = without_place(self.recipe.backbone.name)
        return loaded

    @property
    def backbone_settings(self) -> BackboneSettings:
        """Those of the recipe, a folder beside it as a path from here."""
        settings = self.recipe.backbone
        beside_recipe = self.base / settings.name
        if settings.name == EMBEDDED_NAME or not is_folder(beside_recipe):
            return settings
        return replace(settings, name=str(beside_recipe))

    @cached_property
    def splits(self) -> Splits:
        """The tokenised rows."""
        return build_splits(self.recipe.data, self.backbone.tokenizer, self.recipe.seed, self.base, fold=self.fold)

    @cached_property
    def given(self) -> dict[str, LoadedAdapter]:
        """The adapters that the recipe names, by what it calls them; read, and checked against the backbone."""
        places = [*self.recipe.source.adapters, *([self.recipe.target.adapter] if self.recipe.target.adapter else [])]
        found = {place: self.read(place) for place in places}
        if len({adapter.sha256 for adapter in found.values()}) < len(places):  # it would weigh twice as much
            raise AdapterError(f"of the adapters {listed(places)} two are the same; name each once")
        return found

    def read(self, place: str | Path) -> LoadedAdapter:
        """Read an adapter (a folder, relative to the recipe's, or a hub id) and check that it fits the backbone."""
        beside_recipe = self.base / place
        folder = beside_recipe if is_folder(beside_recipe) else place
        adapter = read_adapter(folder)
        check_fits(adapter, self.backbone)
        return adapter

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The metrics of the recipe, or else those of its task, by name."""
        recipe = self.recipe
        names = recipe.metrics or task_fields(recipe.data.task).metrics
        return resolve_metrics(names, recipe.bertscore, base=self.base)

    def score(self, answers: Sequence[str]) -> Mapping[str, MetricScore]:
        """Score answers to the test prompts, in their order, by all metrics."""
        references = [example.references for example in self.splits.test]
        return score(self.metrics, answers, references, self.language, tuple(self.splits.labels))

    @property
    def pad_id(self) -> int:
        return int(self.backbone.tokenizer.pad_token_id)

    @property
    def language(self) -> str:
        """Language of the target."""
        return self.recipe.data.target.language

    @property
    def probe_pool(self) -> list[Example]:
        """The rows that the controller may probe."""
        return [example for split in self.recipe.controller.rounds.splits for example in getattr(self.splits, split)]

    @property
    def ranks(self) -> set[int]:
        """All ranks that occur in the adapters to merge."""
        recipe = self.recipe
        trained = set() if recipe.source.adapters and recipe.target.adapter else {recipe.lora.rank}
        return trained | {pair.rank for adapter in self.given.values() for pair in adapter.weights.values()}

    @property
    def how_to_answer(self) -> HowToAnswer:
        """How the recipe asks and lets answer; an adapter carries it along, for `predict`."""
        report, data, generation = self.splits.report, self.recipe.data, self.recipe.generation
        return HowToAnswer(
            generation.max_new_tokens, generation.stop, report.chat_template, report.task, report.prompt, data.target.columns,
            data.max_document_tokens, tuple(self.splits.labels), report.completion,
        )  # fmt: skip

    def save(self, folder: Path, weights: AdapterWeights, rows: Iterable[str] = ()) -> None:
        """Write an adapter as an ordinary PEFT folder, with the hashes of its training rows."""
        backbone = self.backbone
        save_adapter(
            folder,
            weights,
            backbone.model,
            backbone_name=backbone.base_model,
            fingerprint=backbone.fingerprint,
            dropout=self.recipe.lora.dropout,
            answers=self.how_to_answer,
            quantise=backbone.quantise,
            dtype=str(backbone.model.dtype).removeprefix("torch."),
            embedded=backbone.is_embedded,
            revision=backbone.revision,
            rows=rows,
        )
