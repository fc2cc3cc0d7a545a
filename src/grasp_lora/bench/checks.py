"""What is checked before a run or a comparison begins, so that none stops half way for what could be known before."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from grasp_lora.bench import run_folder as files
from grasp_lora.bench.records import read_needed, read_record
from grasp_lora.bench.session import Session
from grasp_lora.bench.store import CONFIGS, PACKED
from grasp_lora.data.places import resolve_file
from grasp_lora.data.splits import SPLITS
from grasp_lora.data.tasks import task_fields
from grasp_lora.errors import AdapterError, DataError, RecipeError
from grasp_lora.method.merging import COMPONENTS, merge_rule
from grasp_lora.models.adapters import check_target_modules
from grasp_lora.models.answers import context_of
from grasp_lora.models.backbone import Backbone, without_peft
from grasp_lora.models.precision import weight_sum
from grasp_lora.models.settings import MOST_RANK
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.stages import ControllerStage
from grasp_lora.recipes.text import RECIPE_FILE, parse
from grasp_lora.storage.claims import claim, make_folder
from grasp_lora.storage.files import write_json
from grasp_lora.storage.processes import world_size
from grasp_lora.text.display import one_line

DIFFERENCES_SHOWN, MOST_SHOWN = 3, 60  # and characters of each value
# What a config says of names, number formats, memory, heads and the weights of a new model: the same computation without it.
IDLE = {
    "architectures", "auto_map", "chunk_size_feed_forward", "distributed_config", "dtype", "id2label", "initializer_range",
    "is_encoder_decoder", "label2id", "problem_type", "quantization_config", "return_dict", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip
IDLE_STARTS, IDLE_ENDS = ("_", "output_", "summary_"), ("_token_id", "_token_index")


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
        for group in (
            corpus.files, corpus.train_files, corpus.dev_files, corpus.micro_dev_files, corpus.test_files
        ):  # fmt: skip
            for name in group:
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
                (f"controller.rounds.pool is {stage.rounds.pool!r}", "probe elsewhere")
                if split in stage.rounds.splits
                else (f"controller.training.patience is {stage.training.patience}", "set that to null")
            )
            raise RecipeError(f"{needed_by}, but data.target.{split} is 0; give it examples, or {fix}")
    if problem := lack_of_rounds(stage, len(session.splits.train)):
        raise RecipeError(problem)


def expected_rounds(recipe: Recipe, train_examples: int) -> int:
    """Rounds of the controller run over so many training examples."""
    return len(recipe.controller.round_steps(train_examples))


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
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise RecipeError(f"report_to names {name!r}; allowed: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
        kind = INTEGRATION_TO_CALLBACK[name]
        callback: Any = object.__new__(kind)
        callback._auto_end_run = False  # else MLflow's raises once more when it goes, where it could not be made
        try:
            callback.__init__()
        except (ImportError, RuntimeError) as error:
            raise RecipeError(
                f"report_to names {name!r}, which cannot be used here: {error}; install it, or leave it out"
            ) from error


def check_config(store: Path, backbone: Backbone, *, note: bool = True) -> None:
    """Check that the records of a store were made with the backbone's config and weights as they are now.

    A store that begins notes both. What one of an older version has not noted is taken as it is now.

    Args:
        store: its folder.
        backbone: as it was loaded.
        note: whether to write what is new.

    Raises:
        RecipeError: the config says something else of a key that it had then, too, or the weights have another sum.
    """
    file, now = store / CONFIGS, _computed_with(backbone)
    if note:
        make_folder(store)
    with claim(file, wait=True) if note else nullcontext():
        noted = read_record(file, dict[str, dict[str, str]])
        if noted is None and any((store / name).exists() for name in (files.RECORDS, PACKED)):
            return
        then = (noted or {}).get(backbone.fingerprint, {})
        # A key that only one of them has may be one that another version of transformers does not fill in.
        keys = [key for key in then if now.get(key, then[key]) != then[key]]
        if note and not keys and now.keys() - then.keys():
            write_json(file, {**(noted or {}), backbone.fingerprint: {**now, **then}})
    if keys:
        shown = [
            f"{one_line(key)} {one_line(then[key])[:MOST_SHOWN]}, now {one_line(now[key])[:MOST_SHOWN]}"
            for key in keys[:DIFFERENCES_SHOWN]
        ]
        raise RecipeError(
            f"the steps in {store} were done with another config or other weights of the backbone ({'; '.join(shown)}); put that "
            "back, or choose another folder with --output"
        )


def _computed_with(backbone: Backbone) -> dict[str, str]:
    """What decides what a backbone computes: its config with all defaults filled in, as JSON, and the sum of its weights."""
    config: Mapping[str, Any] = without_peft(backbone.model).config.get_text_config(decoder=True).to_dict()
    found = {}
    for key, value in sorted(config.items()):
        if key not in IDLE and not key.startswith(IDLE_STARTS) and not key.endswith(IDLE_ENDS):
            with suppress(TypeError, ValueError):  # no plain value
                found[key] = json.dumps(value, sort_keys=True)
    # What lies in a folder may be replaced, and a fingerprint sees 16 weights of each parameter.
    if backbone.commit is None and not backbone.is_embedded and (total := weight_sum(backbone.model)) is not None:
        found[f"weights in {backbone.model.dtype}"] = str(total)
    return found


def check_can_be_cut(recipe: Recipe) -> None:
    """Check that the target may be cut into folds: it is one pool, and its labels do not hang on a fold.

    Raises:
        RecipeError: it may not be, or is none.
    """
    target = recipe.data.target
    if recipe.target.adapter is not None:
        raise RecipeError(
            "--folds would test rows that the given target.adapter may have been trained on; leave target.adapter out, so that "
            "one is trained for each fold, or leave --folds out"
        )
    if target.explicit or target.test_files:
        given = "train_files" if target.explicit else "test_files"
        raise RecipeError(
            f"folds are cut from one pool, but the target has data.target.{given}; give one pool (files or hub), or leave "
            "--folds out"
        )
    if task_fields(recipe.data.task).chooses and not recipe.data.labels:
        raise RecipeError("folds may lack a label in their training rows; write all of them into data.labels")


def check_list(name: str, values: Sequence[Any]) -> None:
    """Check that a list of settings says something, and nothing twice.

    Raises:
        ValueError: it does not.
    """
    if not values:
        raise ValueError(f"{name} is empty; give at least one")
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{name} names {twice[0]} more than once; name each one once")


def check_ratios(name: str, ratios: Sequence[float]) -> None:
    """Check a list of prune ratios.

    Raises:
        ValueError: it is empty, says something twice, or holds something else than fractions in [0, 1].
    """
    check_list(name, ratios)
    for ratio in ratios:
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"{name} holds {ratio}; each prune ratio must be a fraction in [0, 1]")


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Check that a folder is free for a run of the recipe, or holds one, whatever is to become of its result in the end.

    Raises:
        RecipeError: it belongs to a run of another recipe, or holds something else.
    """
    files.check_place(folder)
    if not (folder / files.RUN_FILE).is_file():
        return
    if read_needed(folder / files.RUN_FILE, files.RunInfo).recipe_hash not in recipe.choices():
        advice = "choose another folder with --output, or delete it"
        if not (folder / files.METRICS_FILE).is_file():
            advice = "to finish it, run the recipe that began it with what was set then; else choose another --output"
        raise RecipeError(f"{folder} holds a run of another recipe ({_differences(folder, recipe)}); {advice}")


def _differences(folder: Path, recipe: Recipe) -> str:
    """Which settings differ from those of the run in the folder."""
    try:
        theirs = _flat(parse((folder / RECIPE_FILE).read_text(encoding="utf-8"), "it"))
    except (OSError, ValueError, RecipeError):
        return f"its {RECIPE_FILE} cannot be read"
    ours = _flat(parse(recipe.to_yaml(folder), "the recipe"))
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    shown = [f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here" for key in keys[:DIFFERENCES_SHOWN]]
    more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
    return ", ".join(shown) + more if shown else f"by its hash; its recipe is in {RECIPE_FILE} there"


def _flat(content: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value of every setting."""
    if not isinstance(content, dict) or not content:
        return {path: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{path}.{key}" if path else str(key))
    return flat
