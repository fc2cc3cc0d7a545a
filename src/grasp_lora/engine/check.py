"""What is checked at the door, before a run or a comparison begins: what could be known beforehand stops none half way."""

from collections.abc import Sequence
from typing import Any

from grasp_lora.data.files import resolve_file
from grasp_lora.data.splits import SPLITS
from grasp_lora.data.tasks import task_fields
from grasp_lora.engine.session import Session
from grasp_lora.errors import AdapterError, DataError, RecipeError
from grasp_lora.method.merging import COMPONENTS, merge_rule
from grasp_lora.models.adapters import check_target_modules
from grasp_lora.models.generation import context_of
from grasp_lora.models.model_settings import MOST_RANK
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.stages import ControllerStage
from grasp_lora.storage.processes import world_size


def check(session: Session, *, parents: bool = True) -> None:
    """Load and check everything a run needs, before anything is written; what is quick to check comes first.

    Args:
        parents: whether a source and a target adapter are needed, too.

    Raises:
        GraspError: something does not fit; one line.
    """
    recipe = session.recipe
    for metric in session.metrics.values():
        metric.lacking(session.language)
    _check_trackers(recipe.report_to)
    if parents:
        _check_parents(session)
        _check_processes(session)
    check_files(session)
    if parents:
        _check_adapters(session)
    check_splits(session, rounds=parents and recipe.final.prune_ratio is None)


def check_splits(session: Session, *, rounds: bool = True) -> None:
    """Check that the splits can be trained on and measured, and that the controller has its rounds.

    Raises:
        GraspError: they cannot; one line.
    """
    if not session.splits.train:
        raise DataError("the target has no training examples; give data.target.train at least 1")
    _check_context(session)
    if rounds:
        check_rounds(session)


def _check_parents(session: Session) -> None:
    recipe = session.recipe
    if recipe.data.source is None and not recipe.source.adapters:
        raise RecipeError(
            "there is no source: give data.source to train an adapter, or source.adapters to use one; "
            "`grasp-lora init` writes either with --source"
        )
    weights, parents = recipe.merge.weights, max(1, len(recipe.source.adapters)) + 1
    if weights is not None and len(weights) != parents:
        raise RecipeError(
            f"merge.weights has {len(weights)} numbers for {parents} adapters; "
            "give one for each source adapter and one for the target, or leave it out"
        )
    if weights is not None and not any(weights):  # rule lorahub takes them, as its search begins there
        raise RecipeError("merge.weights are all 0, so that nothing would be merged; give another, or leave them out")


def check_files(session: Session) -> None:
    """Look for the data files before the backbone is loaded, which takes long."""
    data = session.recipe.data
    for corpus in filter(None, (data.source, data.target)):
        for name in corpus.all_files:
            resolve_file(name, data.root, session.base)


def _check_context(session: Session) -> None:
    """Check that the model can read every example, and that an answer fits after every test prompt."""
    context = context_of(session.backbone.model)
    if context is None:
        return
    new = max(session.recipe.generation.max_new_tokens, *map(len, session.splits.labels.values()), 0)
    for name in SPLITS:
        for example in getattr(session.splits, name):
            prompt, answer = len(example.prompt_ids), len(example.completion_ids)
            if prompt + answer > context:
                raise DataError(
                    f"the {name} example {example.id} has {prompt + answer} tokens, but the model's context holds {context}; "
                    f"lower data.max_tokens (now {session.recipe.data.max_tokens}) to {context} or less"
                )
            if name == "test" and prompt + new > context:
                raise DataError(
                    f"the test example {example.id} has a prompt of {prompt} tokens, and up to {new} are generated, but the "
                    f"model's context holds {context}; lower generation.max_new_tokens, or data.max_tokens (now "
                    f"{session.recipe.data.max_tokens}) to {max(context - new, 8)}"
                )


def _check_adapters(session: Session) -> None:
    """Check the modules to train, and that the merge rule can take the adapters: it would stop a run half way."""
    recipe = session.recipe
    trains = not (recipe.source.adapters and recipe.target.adapter)
    if trains:
        check_target_modules(session.backbone.model, recipe.lora.target_modules)
    parents = session.parent_ranks
    rule = merge_rule(recipe.merge.rule)
    if rule.space is COMPONENTS and sum(parents) > MOST_RANK:
        raise AdapterError(
            f"merge rule {recipe.merge.rule!r} adds up the ranks {parents}, but an adapter has at most rank {MOST_RANK}; "
            "use 'svd', or adapters of lower rank"
        )
    ranks = session.ranks  # given adapters are read here, whatever the rule
    if rule.space.equal_ranks and len(ranks) > 1:
        raise AdapterError(
            f"merge rule {recipe.merge.rule!r} needs equal ranks, but the adapters have {sorted(ranks)}; "
            "use 'exact' or 'svd'" + (", or set lora.rank to the rank of the others" if trains else "")
        )


def _check_processes(session: Session) -> None:
    recipe = session.recipe
    trained = {
        "source": not recipe.source.adapters,
        "target": not recipe.target.adapter,
        "controller": recipe.final.prune_ratio is None,
        "final": True,
    }
    for stage in (stage for stage, trains in trained.items() if trains):
        try:
            getattr(recipe, stage).training.shared_by(world_size())
        except ValueError as error:
            raise RecipeError(f"{stage}.training: {error}, or start fewer processes") from error


def check_rounds(session: Session) -> None:
    stage = session.recipe.controller
    for split in stage.splits:
        if not getattr(session.splits, split):
            needed_by, fix = (
                (f"controller.preset {stage.preset} probes {stage.rounds.pool}", "take another preset")
                if split in stage.rounds.splits
                else (f"controller.training.patience is {stage.training.patience}", "set that to null")
            )
            raise RecipeError(f"{needed_by}, but data.target.{split} is 0; give it examples, or {fix}")
    if problem := lack_of_rounds(stage, len(session.splits.train)):
        raise RecipeError(problem)


def lack_of_rounds(stage: ControllerStage, train_examples: int) -> str | None:
    """Say why a controller run over so many training examples would learn nothing of training, or None if it does."""
    if any(stage.round_steps(train_examples)[-1:]):
        return None
    steps, every = stage.training.steps(train_examples), stage.spacing(train_examples)
    return (
        f"the controller run has {steps} optimizer steps and probes every {every}, so no round follows a step; "
        "raise controller.training.epochs or lower controller.rounds.every"
    )


def _check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are known to transformers and installed.

    Raises:
        RecipeError: one is not.
    """
    if not names:
        return
    from transformers.integrations import integration_utils

    callbacks_of: Any = integration_utils.get_reporting_integration_callbacks

    try:
        for kind in callbacks_of(list(names)):
            kind()
    except (ImportError, RuntimeError, ValueError) as error:
        raise RecipeError(f"report_to is {', '.join(names)}: {error}") from error


def check_can_be_cut(recipe: Recipe) -> None:
    """Check that the target is one pool that can be cut into folds, and that its labels do not hang on a fold.

    Raises:
        RecipeError: it is not.
    """
    target = recipe.data.target
    if recipe.target.adapter is not None:
        raise RecipeError(
            "--folds would test rows that the given target.adapter may have been trained on; leave target.adapter out, so that "
            "one is trained for each fold, or leave --folds out"
        )
    if target.explicit or target.test_files:
        key = "train" if target.explicit else "test"
        raise RecipeError(
            f"folds are cut from one pool, but the target has data.target.files.{key}; give one pool (files or hub), or leave "
            "--folds out"
        )
    if task_fields(recipe.data.task).chooses and not recipe.data.labels:
        raise RecipeError("folds may lack a label in their training rows; write all of them into data.labels")
