"""A run folder as one typed record, read as far as the run has got."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from grasp_lora.bench import run_folder as files
from grasp_lora.bench.outcomes import names_of
from grasp_lora.bench.records import check_shape, damaged, read_lines, read_record, read_text
from grasp_lora.errors import RecipeError
from grasp_lora.method.schedule import PROBE_SPLITS, Pool
from grasp_lora.recipes.stages import AUTO
from grasp_lora.recipes.text import RECIPE_FILE, parse

STAGES = ("data", "source", "target", "merge", "controller", "final", "continued", "evaluate", "deliver", "all_rows")

_Row = TypeVar("_Row")


class CorpusFacts(files.Shape):
    """What the report says of the data of one language."""

    language: str = ""
    hub: str | None = None
    files: tuple[str, ...] = ()
    train_files: tuple[str, ...] = ()
    dev_files: tuple[str, ...] = ()
    micro_dev_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    prompt: str | None = None

    @property
    def all_files(self) -> tuple[str, ...]:
        """The files of the pool and of each split."""
        return self.files + self.train_files + self.dev_files + self.micro_dev_files + self.test_files


class DataRecipe(files.Shape):
    """The recipe's `data`."""

    task: str = ""
    source: CorpusFacts | None = None
    target: CorpusFacts = CorpusFacts()
    prompt: str | None = None
    chat_template: bool | None = None

    @property
    def corpora(self) -> list[CorpusFacts]:
        """The data of both languages, the rich one first."""
        return [self.source, self.target] if self.source else [self.target]


class BackboneRecipe(files.Shape):
    """The recipe's `backbone`."""

    trust_remote_code: bool = False


class GenerationRecipe(files.Shape):
    """The recipe's `generation`."""

    max_new_tokens: int = 64
    stop: tuple[str, ...] = ("\n",)


class SourceRecipe(files.Shape):
    """The recipe's `source`."""

    adapters: tuple[str, ...] = ()


class TargetRecipe(files.Shape):
    """The recipe's `target`."""

    on: str | None = None


class MergeRecipe(files.Shape):
    """The recipe's `merge`."""

    rule: str = ""


class MaskRecipe(files.Shape):
    """The recipe's `mask`, or that of its final run."""


class PolicyRecipe(files.Shape):
    """The recipe's `controller.policy`."""

    kind: str = ""


class RoundsRecipe(files.Shape):
    """The recipe's `controller.rounds`."""

    pool: Pool = "micro_dev"
    in_turn: int | None = None


class ControllerRecipe(files.Shape):
    """The recipe's `controller`."""

    policy: PolicyRecipe = PolicyRecipe()
    rounds: RoundsRecipe = RoundsRecipe()


class FinalRecipe(files.Shape):
    """The recipe's `final`."""

    mask: MaskRecipe | None = None
    prune_ratio: float | None = None
    deliver: str | None = None
    all_rows: bool = False

    def missing(self, complete: Container[str]) -> list[str]:
        """Name the stages that a run has yet to do, in order."""
        left_out = {
            "controller": self.prune_ratio is not None,
            "continued": self.deliver != "best",
            "deliver": self.deliver is None,
            "all_rows": not self.all_rows,
        }
        return [stage for stage in STAGES if stage not in complete and not left_out.get(stage)]


class RecipeFacts(files.Shape):
    """What the report reads of recipe.yaml: little, so that it can read what older versions wrote."""

    backbone: BackboneRecipe = BackboneRecipe()
    data: DataRecipe = DataRecipe()
    generation: GenerationRecipe = GenerationRecipe()
    source: SourceRecipe = SourceRecipe()
    target: TargetRecipe = TargetRecipe()
    merge: MergeRecipe = MergeRecipe()
    mask: MaskRecipe = MaskRecipe()
    controller: ControllerRecipe = ControllerRecipe()
    final: FinalRecipe = FinalRecipe()


@dataclass(frozen=True)
class RunRecord:
    """A run folder as far as it has got: None or empty where a stage has not written its files."""

    run: files.RunInfo
    recipe_text: str
    recipe: RecipeFacts
    data: files.DataFacts
    rounds: list[files.RoundRow]
    timings: list[files.Timing]
    learned: files.LearnedRatio | None
    history: Mapping[str, list[files.HistoryRow]]
    sparsity: list[files.FactorSparsity]
    predictions: Mapping[str, list[files.Prediction]]
    prompts: list[files.Prompt]  # of the test examples; older versions wrote none
    metrics: files.Metrics | None
    cost: Mapping[str, float]  # seconds of each stage that is complete
    chosen_on: files.TargetOn | None  # with `target.on: auto`, once it is known

    @property
    def in_chat(self) -> bool:
        """Whether prompts stand in the chat template; runs of older versions say so in their recipe alone."""
        return bool(self.data.report.get("chat_template", self.recipe.data.chat_template))

    @property
    def target_on(self) -> str | None:
        """Where the target adapter was trained; with `target.on: auto` that is known after its stage, and None until then."""
        given = None if self.recipe.target.on == AUTO else self.recipe.target.on
        return given if self.chosen_on is None else self.chosen_on.on

    @property
    def sources(self) -> list[str]:
        """The names of the source adapters in files: source, source_2, ..."""
        return list(names_of(len(self.recipe.source.adapters)))

    @property
    def systems(self) -> dict[str, str]:
        """What is evaluated: name in files -> title."""
        titles = _systems(self.sources)
        if self.target_on is not None:
            titles["merged"] = "Target on source, not pruned"
        return titles

    @property
    def given_ratio(self) -> float | None:
        """The recipe's final.prune_ratio; where it is given, the run has no controller by design."""
        return self.recipe.final.prune_ratio

    @property
    def prune_ratio(self) -> float | None:
        """The ratio of the result, given or learned."""
        learned = self.learned.prune_ratio if self.learned else None
        return learned if self.given_ratio is None else self.given_ratio

    @property
    def in_turn(self) -> bool:
        """Whether each round measured other examples, the baseline too, so that the losses of rounds cannot be compared."""
        rounds = self.recipe.controller.rounds
        pool = sum(len(self.data.ids.get(split, ())) for split in PROBE_SPLITS[rounds.pool])
        return rounds.in_turn is not None and rounds.in_turn < pool and not any(one.places for one in self.rounds)

    @property
    def missing(self) -> list[str]:
        """Stages that the run has yet to complete."""
        return self.recipe.final.missing(self.cost)

    @property
    def probe_seconds(self) -> float:
        """Seconds of the controller run that went into probes."""
        return sum(timing.probe_seconds for timing in self.timings)


def read_run(run_folder: Path) -> RunRecord:
    """Read all that a run folder holds.

    A run may still be in progress: the line that it is just writing is left out.

    Raises:
        RecipeError: run.json or recipe.yaml is missing, or a file is damaged; the message names it.
    """
    run, recipe_file = read_record(run_folder / files.RUN_FILE, files.RunInfo), run_folder / RECIPE_FILE
    recipe_text = read_text(recipe_file)
    if run is None or recipe_text is None:
        raise RecipeError(
            f"{run_folder} is no run folder: {files.RUN_FILE if run is None else RECIPE_FILE} is missing."
        )
    recipe = _recipe_facts(recipe_text, recipe_file)
    metrics = read_record(run_folder / files.METRICS_FILE, files.Metrics)
    learned = read_record(run_folder / files.CONTROLLER_FOLDER / files.RATIO_FILE, files.LearnedRatio)
    if learned is not None:
        files.check_rows(run_folder, learned)
    return RunRecord(
        run=run,
        recipe_text=recipe_text,
        recipe=recipe,
        data=read_record(run_folder / files.DATA_FILE, files.DataFacts) or files.DataFacts(),
        rounds=_growing(run_folder, files.ROUNDS_FILE, files.RoundRow),
        timings=_growing(run_folder, files.TIMINGS_FILE, files.Timing),
        learned=learned,
        history={
            stage: read_lines(run_folder / stage / files.HISTORY_FILE, files.HistoryRow, growing=True)
            for stage in files.TRAINED
        },
        sparsity=read_record(run_folder / files.FINAL_FOLDER / files.SPARSITY_FILE, list[files.FactorSparsity]) or [],
        predictions={
            name: read_lines(files.predictions_file(run_folder, name), files.Prediction)
            for name in _systems(names_of(len(recipe.source.adapters)))
        },
        prompts=read_lines(files.prompts_file(run_folder), files.Prompt),
        metrics=metrics,
        cost=read_record(run_folder / files.COST_FILE, dict[str, float]) or {},
        chosen_on=read_record(run_folder / "target" / files.TARGET_ON_FILE, files.TargetOn)
        or (None if metrics is None else metrics.target_on),
    )


def _systems(sources: Sequence[str]) -> dict[str, str]:
    """What a run may evaluate: name in files -> title."""
    of_source = (f"Source {number} only" if len(sources) > 1 else "Source only" for number, _ in enumerate(sources, 1))
    return {
        "zero_shot": "Backbone alone",
        **dict(zip(sources, of_source, strict=True)),
        "target": "Target only",
        "merged": "Merged, not pruned",
        "continued": "Source, continued",
        "grasp": "GRASP",
        "all_rows": "The chosen one, on all rows",
    }


def _growing(run_folder: Path, name: str, shape: type[_Row]) -> list[_Row]:
    """The rows of a file of the controller, or of the step that is about to make it."""
    under_way = (run_folder / files.STORE_FOLDER / files.WORK).glob(f"*/{files.CONTROLLER_FOLDER}*/{name}")
    places = [run_folder / files.CONTROLLER_FOLDER / name, *under_way]
    return next((rows for file in places if (rows := read_lines(file, shape, growing=True))), [])


def _recipe_facts(text: str, file: Path) -> RecipeFacts:
    try:
        content = parse(text, "it")
    except RecipeError as error:
        raise damaged(file, str(error)) from error
    if not isinstance(content, dict):
        raise damaged(file, "it must hold keys and values")
    return check_shape(RecipeFacts.model_validate, content, file)
