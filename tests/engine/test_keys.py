"""What decides a step is in its key, and nothing else: each field of a recipe against each kind of step.

`TABLE` was read by a person once. A field stands there with the kinds of steps whose result it may change, given the same
backbone, rows, adapters and answers to start from; what those change is asked below the table.
"""

import copy
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel
from recorder import changed, session_of

from grasp_lora.engine.results import Adapter, Finished
from grasp_lora.engine.session import Session
from grasp_lora.engine.steps import Steps
from grasp_lora.engine.store import Store, key_of
from grasp_lora.method.search import POLICIES, RatioPolicy
from grasp_lora.models.adapter_files import AdapterInfo

NOTHING = ""
TRAINED = "source target controller final"
COMPUTED = f"{TRAINED} losses answers"  # by the backbone
READS = {  # the rows of each kind
    "source": ("source_train", "source_dev"), "target": ("train", "dev"), "controller": ("train", "micro_dev"),
    "final": ("train", "dev"), "losses": ("test",), "answers": ("test",),
}  # fmt: skip
BY_BACKBONE = NOTHING  # by what was loaded
BY_ROWS = NOTHING  # by what was read, drawn and tokenised

TRAINING = ("epochs", "batch_size", "accumulation", "learning_rate", "lr_decay", "max_grad_norm", "patience",
            "evaluate_every")  # fmt: skip
CORPUS = ("files", "sheet", "hub", "columns", "train", "dev", "micro_dev", "test")

TABLE: dict[str, str] = {
    "name": NOTHING,
    "seed": TRAINED,
    **dict.fromkeys((f"backbone.{name}" for name in (
        "name", "dtype", "quantise", "revision", "trust_remote_code", "device", "shard", "gradient_checkpointing",
    )), BY_BACKBONE),
    **dict.fromkeys((f"data.{name}" for name in (
        "root", "max_tokens", "max_document_tokens", "labels", "prompt", "completion", "chat_template", "skip_unanswered",
        "source.language",
    )), BY_ROWS),
    **{f"data.{side}.{name}": BY_ROWS for side in ("source", "target") for name in CORPUS},
    "data.task": "scores",  # by its metrics, where the recipe names none
    "data.target.language": "scores",
    "lora.rank": "source target",
    "lora.alpha": "source target",
    "lora.dropout": TRAINED,  # of the controller run and the final run where merge.dropout is not set
    "lora.target_modules": "source target",
    "source.adapters": "source",
    **{f"source.training.{name}": "source" for name in TRAINING},
    "target.adapter": "target",
    "target.on": "target merge",
    **{f"target.training.{name}": "target" for name in TRAINING},
    **{f"merge.{name}": "merge" for name in ("rule", "weights", "rank", "density", "seed")},
    "merge.dropout": "controller final",
    "mask.score": "controller final",
    "controller.preset": NOTHING,  # by the policy, rounds and rule that it gives
    "controller.policy": "controller",
    **{f"controller.rounds.{name}": "controller" for name in (
        "every", "at_ends", "pool", "in_turn", "patience",
    )},
    "controller.rule": "controller",
    **{f"controller.training.{name}": "controller" for name in TRAINING},
    "final.mode": "final",
    "final.prune_ratio": NOTHING,  # a final run is told its ratio, wherever that comes from
    **{f"final.training.{name}": "final" for name in TRAINING},
    "final.deliver": NOTHING,  # a choice among finished adapters
    "generation.max_new_tokens": "answers",
    "generation.stop": "answers",
    "metrics": "scores",
    "bertscore.models": "scores",
    "report_to": NOTHING,
    # It trades time for memory and no bit of the result, so that who ran out of memory may set it and go on.
    **{f"{stage}.training.gradient_checkpointing": NOTHING for stage in ("source", "target", "controller", "final")},
}  # fmt: skip

OTHER: dict[str, Any] = {  # where not any other value will do
    "source.adapters": ("given",), "target.adapter": "given", "target.on": "source", "merge.rule": "ties",
    "controller.policy": POLICIES["grpo"](), "controller.rounds.pool": "dev",
    "metrics": ("rouge1",), "data.target.language": "fr",
    "data.task": "translation",
}  # fmt: skip


class Keys(Store):
    """Does nothing, and knows under which key each step would be."""

    def step(self, name: str, inputs: Any, kind: Any, work: Any, *, trains: bool = False, shown: str = "") -> Any:
        return Finished(name, key_of(name, inputs), Path(), None, 0.0, {})  # type: ignore[type-var]


def adapter(key: str) -> Adapter:
    return Adapter(key, lambda: None)


def keys(session: Session, start: str = "start", ratio: float = 0.5) -> dict[str, str]:
    """The key of each kind of step, which all start from the same."""
    steps, before, on = Steps(session, Keys(Path())), adapter(start), session.recipe.target.on
    answers = Finished("answers", start, Path(), None, 0.0, {})  # type: ignore[type-var]
    return {
        "source": steps.source().key,
        "target": steps.target(before if on else None).key,
        "merge": steps.merge_of([before], adapter("target"), on).key,
        "controller": steps.learn_ratio(before).key,
        "final": steps.finetune(before, ratio).key,
        "losses": steps.losses(before, "test").key,
        "answers": steps.tested(before).key,
        "scores": steps.scores(answers).key,
    }


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted name -> value of each field; a policy counts as one, since its fields hang on its kind."""
    if isinstance(value, BaseModel):
        parts = {name: getattr(value, name) for name in type(value).model_fields}
    elif is_dataclass(value) and not isinstance(value, RatioPolicy):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
    else:
        return {path: value}
    return {
        name: leaf
        for key, part in parts.items()
        for name, leaf in leaves(part, f"{path}.{key}" if path else key).items()
    }


def another(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple | dict):
        return (*value, "other") if isinstance(value, tuple) else value | {"de": "other"}
    return "other"


@pytest.fixture
def session(tiny_workspace: Path) -> Session:
    session = session_of("merge.dropout=null")  # as with every preset but that of the paper
    session.given = {
        "given": SimpleNamespace(sha256="sum", facts="facts", name="given", weights=None, info=AdapterInfo())
    }  # type: ignore[dict-item]
    return session


def differ(session: Session, other: Session) -> set[str]:
    before, after = keys(session), keys(other)
    return {kind for kind, key in before.items() if after[kind] != key}


def test_each_field_is_in_the_keys_of_the_steps_that_it_may_change_and_of_no_other(session: Session) -> None:
    recipe = session.recipe
    values = leaves(recipe)
    assert set(values) == set(TABLE), "a field came or went: say in TABLE which steps it may change"
    wrong = {}
    for field, expected in TABLE.items():
        other = changed(recipe, field, OTHER.get(field, another(values[field])))
        assert leaves(other) != values
        found = differ(session, session.variant(other))
        if found != set(expected.split()):
            wrong[field] = f"is in the keys of {sorted(found)}, and may change {sorted(expected.split())}"
    assert not wrong


@pytest.mark.parametrize("kind", POLICIES)
def test_each_field_of_a_policy_is_in_the_key_of_the_controller_run(kind: str, session: Session) -> None:
    policy = POLICIES[kind]()
    first = session.variant(changed(session.recipe, "controller.policy", policy))
    for field in fields(policy):
        other = changed(policy, field.name, another(getattr(policy, field.name)))
        second = session.variant(changed(session.recipe, "controller.policy", other))
        assert differ(first, second) == {"controller"}, field.name


def test_a_rule_that_draws_has_the_seed_in_its_key(session: Session) -> None:
    drawn = session.variant(changed(session.recipe, "merge.rule", "dare_ties"))
    assert "merge" in differ(drawn, session.variant(changed(drawn.recipe, "seed", 7)))


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"prompt_ids": (5, 6)}, "losses answers"),
        ({"completion_ids": (5, 2)}, "losses answers"),  # whose last token is an end of answers
        ({"references": ("other",)}, "scores"),
        ({"id": "other"}, "losses answers"),
    ],
)  # fmt: skip
def test_each_row_counts_in_the_steps_that_read_it(change: dict[str, Any], counts: str, session: Session) -> None:
    splits = session.splits
    for name in ("source_train", "source_dev", "train", "dev", "micro_dev", "test"):
        rows = getattr(splits, name)
        other = session.variant(splits=replace(splits, **{name: (*rows[:-1], replace(rows[-1], **change))}))
        scored = set() if "references" in change else set(READS)  # which only the scores of the test read
        reading = {kind for kind, read in READS.items() if name in read and kind in scored}
        assert differ(session, other) == (set(counts.split()) if name == "test" else reading), name
        fewer = session.variant(splits=replace(splits, **{name: rows[:-1]}))
        assert differ(session, fewer) == {kind for kind, read in READS.items() if name in read} | (
            {"scores"} if name == "test" else set()
        )


def test_dev_rows_that_a_training_does_not_look_at_are_not_in_its_key(session: Session) -> None:
    splits, stages = session.splits, ("source", "target", "final")
    endless = session_of("merge.dropout=null", *(f"{stage}.training.patience=null" for stage in stages))
    endless.given = session.given
    fewer = endless.variant(splits=replace(splits, dev=splits.dev[:-1], source_dev=splits.source_dev[:-1]))
    assert differ(endless.variant(splits=splits), fewer) == set()


def test_rows_that_are_another_split_count(session: Session) -> None:
    splits = session.splits
    other = session.variant(splits=replace(splits, train=splits.dev, dev=splits.train))
    assert differ(session, other) == {"target", "controller", "final"}


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda backbone: setattr(backbone, "fingerprint", "other"), COMPUTED),
        (lambda backbone: setattr(backbone, "quantise", "nf4"), COMPUTED),
        (lambda backbone: backbone.model.bfloat16(), COMPUTED),
        (lambda backbone: setattr(backbone, "weight_sum", 1), COMPUTED),  # of weights that no fingerprint sees
        (lambda backbone: setattr(backbone.model.config, "rms_norm_eps", 0.5), COMPUTED),
        (lambda backbone: setattr(backbone, "stop_ids", (*backbone.stop_ids, 9)), "answers"),
        (lambda backbone: setattr(backbone, "name", "other"), NOTHING),
        (lambda backbone: setattr(backbone, "revision", "other"), NOTHING),
        (lambda backbone: setattr(backbone.model.config, "use_cache", False), NOTHING),
        (lambda backbone: setattr(backbone.model.config, "transformers_version", "9"), NOTHING),
    ],
    ids=["fingerprint", "bits", "dtype", "weights", "config", "ends", "name", "revision", "cache", "version"],
)  # fmt: skip
def test_what_was_loaded_counts(change: Any, counts: str, session: Session) -> None:
    other = session.variant()
    other.backbone = copy.copy(session.backbone)
    other.backbone.model = copy.deepcopy(session.backbone.model)
    assert not differ(session, other)
    change(other.backbone)
    assert differ(session, other) == set(counts.split())


def test_labels_take_the_place_of_settings_of_texts(session: Session) -> None:
    chooses, more = (
        session.variant(splits=replace(session.splits, labels=labels))
        for labels in ({"a": (5, 2)}, {"a": (5, 2), "b": (6, 2)})
    )
    assert differ(chooses, more) == {"answers"}  # which those of scores rest on
    for field in ("max_new_tokens", "stop"):
        value = getattr(session.recipe.generation, field)
        other = chooses.variant(changed(session.recipe, f"generation.{field}", another(value)))
        assert not differ(chooses, other)


def test_what_a_step_starts_from_is_in_its_key(session: Session) -> None:
    kinds = {"merge", "controller", "final", "losses", "answers", "scores"}
    first, other = keys(session), keys(session, start="other")
    assert {kind for kind in first if first[kind] != other[kind]} == kinds
    ratio = keys(session, ratio=0.6)
    assert {kind for kind in first if first[kind] != ratio[kind]} == {"final"}
    on = session.variant(changed(session.recipe, "target.on", "source"))
    assert keys(on)["target"] != keys(on, start="other")["target"]
    steps = Steps(session, Keys(Path()))
    assert steps.losses(adapter("start"), "dev").key != steps.losses(adapter("start"), "test").key
    parents = [adapter("a"), adapter("b")]
    assert steps.merge_of(parents[:1], parents[1], None).key != steps.merge_of(parents[1:], parents[0], None).key


def test_a_given_adapter_counts_by_its_file_and_its_settings(session: Session) -> None:
    given = session.given["given"]
    asked = session.variant(changed(session.recipe, "target.adapter", "given"))
    for name, other, counts in (("sha256", "other", True), ("facts", "other", True), ("name", "other", False)):
        changed_one = asked.variant()
        changed_one.given = {"given": SimpleNamespace(**{**vars(given), name: other})}  # type: ignore[dict-item]
        assert (differ(asked, changed_one) == {"target"}) is counts
