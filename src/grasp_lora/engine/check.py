"""What is checked at the door, before a run or a comparison begins: what could be known beforehand stops none half way."""

import logging
from collections.abc import Sequence
from typing import Any

from grasp_lora.data.files import resolve_file
from grasp_lora.data.splits import SPLITS
from grasp_lora.data.tasks import INTO, TEMPLATES, task_fields
from grasp_lora.engine.session import Session
from grasp_lora.errors import AdapterError, DataError, RecipeError
from grasp_lora.method.merging import merge_rule
from grasp_lora.models.adapter_files import LoadedAdapter
from grasp_lora.models.adapters import check_target_modules
from grasp_lora.models.generation import context_of
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.stages import ControllerStage
from grasp_lora.storage.processes import world_size
from grasp_lora.storage.reading import reading
from grasp_lora.text.display import quoted

logger = logging.getLogger(__name__)


def check(session: Session) -> None:
    """Load and check everything a run needs, before anything is written; what is quick to check comes first.

    Raises:
        GraspError: something does not fit; one line.
    """
    recipe = session.recipe
    for metric in session.metrics.values():
        metric.lacking(session.language)
    _check_trackers(recipe.report_to)
    _check_parents(recipe)
    _check_processes(recipe)
    _check_files(session)
    _check_adapters(session)
    check_splits(session)


def check_splits(session: Session) -> None:
    """Check that the splits can be read and measured, and have room for the controller's rounds where it learns the ratio.

    Raises:
        GraspError: they cannot; one line.
    """
    _check_context(session)
    for adapter in session.given.values():
        check_seen(session, adapter)
    recipe = session.recipe
    if recipe.final.prune_ratio is None and (problem := lack_of_rounds(session, recipe.controller)):
        raise RecipeError(problem)


def check_seen(session: Session, adapter: LoadedAdapter) -> None:
    """Refuse an adapter that was trained on rows of the test; warn where it knows what belongs to them, or was asked otherwise.

    Rows are told by what they ask, whatever their file and id. Translations of them are told by ids, texts and articles, which
    may be alike by chance. Only adapters that were written here say what they know.

    Raises:
        AdapterError: it knows test rows; the message says how many.
    """
    rows, splits, name = frozenset(adapter.info.rows), session.splits, quoted(adapter.name)
    test, dev = (sum(row.marks[0] in rows for row in part) for part in (splits.test, (*splits.dev, *splits.micro_dev)))
    related = sum(not rows.isdisjoint(row.marks) for row in splits.test)
    if test:
        raise AdapterError(
            f"adapter {name} was trained on {test} of the {len(splits.test)} test rows, so its scores would be too high; test on "
            "rows of their own (data.target.files.test), or train it without them"
        )
    if related:
        text = (
            "adapter %s was trained on rows that share an id, a text or an article with %d of the %d test rows; where these are "
            "translations or on one article, its scores are too high: test on others"
        )
        logger.warning(text, name, related, len(splits.test))
    if dev:
        text = (
            "adapter %s was trained on %d of the dev and micro-dev rows, so what they choose may be wrong; give others"
        )
        logger.warning(text, name, dev)
    theirs, ours = adapter.info.answers, session.how_to_answer
    if ours.chat_template and adapter.chat_template not in (None, session.backbone.tokenizer.chat_template):
        logger.warning("adapter %s brings a chat template of its own, and prompts stand in the backbone's", name)
    if theirs is None or theirs.task is None:
        return
    alike = (theirs.prompt, theirs.chat_template) == (ours.prompt, ours.chat_template)
    # Each language has a wording of its own, and a source adapter is trained with that of its language.
    built_in = {template.prompt for template in TEMPLATES[session.recipe.data.task].values()}
    both = {theirs.prompt, ours.prompt}
    in_two_languages = both <= built_in or all(str(prompt).startswith(INTO) for prompt in both)
    if not alike and (theirs.chat_template or not in_two_languages):
        text = (
            "adapter %s was trained on prompts of the form %s%s, and the recipe asks otherwise; set data.prompt to it"
        )
        logger.warning(text, name, quoted(theirs.prompt or ""), " in the chat template" if theirs.chat_template else "")


def _check_parents(recipe: Recipe) -> None:
    if recipe.data.source is None and not recipe.source.adapters:
        raise RecipeError(
            "there is no source: give data.source to train an adapter, or source.adapters to use one; "
            "`grasp-lora init` writes either with --source"
        )
    weights, parents = recipe.merge.weights, max(1, len(recipe.source.adapters)) + 1
    if weights is not None and (
        len(weights) != parents or not any(weights)
    ):  # rule lorahub takes zeros, to search from
        raise RecipeError(
            f"merge.weights is {list(weights)}; give {parents} numbers that are not all 0, one for each source adapter and one "
            "for the target, or leave it out"
        )


def _check_files(session: Session) -> None:
    """Look for the data files before the backbone is loaded, which takes long."""
    data = session.recipe.data
    for corpus in filter(None, (data.source, data.target)):
        for name in corpus.all_files:
            resolve_file(name, data.root, session.base)


def _check_context(session: Session) -> None:
    """Check that the model can read every example, and that an answer fits after every test prompt."""
    context, recipe, labels = context_of(session.backbone.model), session.recipe, session.splits.labels
    if context is None:
        return
    written = recipe.generation.max_new_tokens
    new = max(map(len, labels.values()), default=written)  # a label is scored, not written
    for name in SPLITS:
        for example in getattr(session.splits, name):
            answer = max(len(example.completion_ids), new if name == "test" else 0)
            if len(example.prompt_ids) + answer > context:
                raise DataError(
                    f"the {name} row {example.where} has {len(example.prompt_ids)} tokens and an answer of up to {answer}, "
                    f"but the model's context holds {context}; lower data.max_tokens (now {recipe.data.max_tokens})"
                    + ("" if labels else f", or generation.max_new_tokens (now {written})")
                )


def _check_adapters(session: Session) -> None:
    """Check the modules to train, and that the merge rule can take the adapters: it would stop a run half way."""
    recipe = session.recipe
    trains = not (recipe.source.adapters and recipe.target.adapter)
    if trains:
        check_target_modules(session.backbone.model, recipe.lora.target_modules)
    ranks = session.ranks  # given adapters are read here, whatever the rule
    if merge_rule(recipe.merge.rule).space.equal_ranks and len(ranks) > 1:
        raise AdapterError(
            f"merge rule {recipe.merge.rule!r} needs equal ranks, but the adapters have {sorted(ranks)}; "
            "use 'exact' or 'svd'" + (", or set lora.rank to the rank of the others" if trains else "")
        )


def _check_processes(recipe: Recipe) -> None:
    trained = {
        "source": not recipe.source.adapters,
        "target": not recipe.target.adapter,
        "controller": recipe.final.prune_ratio is None,
        "final": True,
    }
    for stage in (stage for stage, trains in trained.items() if trains):
        with reading(f"{stage}.training", RecipeError):
            getattr(recipe, stage).training.shared_by(world_size())


def lack_of_rounds(session: Session, stage: ControllerStage) -> str | None:
    """Say why a controller run on the session's rows would learn nothing of training, or None if it does."""
    rows, training, splits = len(session.splits.train), stage.training, session.splits
    if not splits.dev and not splits.micro_dev:
        return "a controller probes rows that are held out, and there are none: set data.target.dev, to 16 for instance"
    for split in stage.splits:
        if not getattr(splits, split):
            probes = split in stage.rounds.splits
            needed_by = (
                f"preset {stage.preset} probes {stage.rounds.pool}"
                if probes
                else f"training.patience is {training.patience}"
            )
            fix = "take another preset" if probes else "set that to null"
            return f"controller.{needed_by}, but data.target.{split} is 0; give it examples, or {fix}"
    if any(stage.round_steps(rows)[-1:]):
        return None
    return (
        f"the controller run has {training.steps(rows)} optimizer steps and probes every {stage.spacing(rows)}, so no round "
        "follows a step; raise controller.training.epochs or lower controller.rounds.every"
    )


def _check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are known to transformers and installed."""
    if names:
        from transformers.integrations import integration_utils

        callbacks_of: Any = integration_utils.get_reporting_integration_callbacks
        with reading(f"report_to is {', '.join(names)}", RecipeError):
            for kind in callbacks_of(list(names)):
                kind()


def why_no_folds(recipe: Recipe) -> str | None:
    """Say why the target cannot be cut into folds, or None if it can: it has to be one pool, whose labels hang on no fold."""
    target = recipe.data.target
    if recipe.target.adapter is not None:
        return (
            "--folds would test rows that the given target.adapter may have been trained on; leave target.adapter out, so that "
            "one is trained for each fold, or leave --folds out"
        )
    if target.explicit or "test" in target.files:
        key = "train" if target.explicit else "test"
        return (
            f"folds are cut from one pool, but the target has data.target.files.{key}; give one pool (files or hub), or leave "
            "--folds out"
        )
    if task_fields(recipe.data.task).chooses and not recipe.data.labels:
        return "folds may lack a label in their training rows; write all of them into data.labels"
    return None
