"""What will happen before it happens: the checks of `grasp-lora check`, as lines a person reads."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from grasp_lora.bench.checks import check, check_files, expected_rounds
from grasp_lora.bench.doubts import Finding, doubtful, labels, written_answers
from grasp_lora.bench.measuring import choosing_splits
from grasp_lora.bench.memory import (
    CARDS,
    GIGABYTE,
    PROCESS,
    QUANTISED,
    by_setting,
    shape_of,
    sizes_of,
    smallest_card,
    stages_of,
)  # fmt: skip
from grasp_lora.bench.plan import time_step
from grasp_lora.bench.planned import PLANNED, SEEDS, expected_width
from grasp_lora.bench.session import Session
from grasp_lora.data.encode import Example, Tally
from grasp_lora.data.splits import SPLITS, group_numbers, group_size
from grasp_lora.errors import GraspError
from grasp_lora.method.presets import ratio_rule
from grasp_lora.method.rules import surrogate
from grasp_lora.models.backbone import skeleton, supports_logits_to_keep
from grasp_lora.models.precision import find_dtype, is_quantised, stored_bytes
from grasp_lora.recipes.advice import advice
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.stages import AUTO, ControllerStage
from grasp_lora.storage.memory import available_memory
from grasp_lora.text.display import quoted
from grasp_lora.training.settings import TRAINED_AS_MEASURED

FEW_ROUNDS = 10
MANY_ROUNDS = (
    300  # a decision by rule `surrogate` takes 0.2 s after 100 rounds and 1.6 s after 250, about as their cube
)
FEW_INDEPENDENT_ROUNDS = 3  # where no ratio is held, they do not depend on each other
FEW_PROBED = 8
PROMPT_SHOWN = 30  # characters


def preflight(session: Session) -> list[Finding]:
    """Load and check everything that a run needs and say what to expect; nothing is written.

    Raises:
        GraspError: something does not fit, so that a run would stop.
    """
    check_files(session)
    _check_weights_fit(session)
    check(session)
    recipe, splits, backbone = session.recipe, session.splits, session.backbone
    findings = [_backbone(session)]
    findings += [
        Finding("ok", "adapter", f"{name}: {len(adapter.weights)} modules, ranks {_ranks(adapter.weights.values())}")
        for name, adapter in session.existing_adapters.items()
    ]
    sizes = {name: len(getattr(splits, name)) for name in SPLITS}
    findings.append(Finding("ok", "splits", ", ".join(f"{name} {size}" for name, size in sizes.items())))
    findings.append(
        Finding("ok", "leaks", "no question, context or article is shared with a held-out split, in either language")
    )
    tallies = {"source": splits.report.source, "target": splits.report.target}
    findings += [_counts(side, tally) for side, tally in tallies.items() if tally is not None]
    findings += doubtful(session)
    findings.append(_lengths("train", splits.train))
    findings.append(_label_mask(splits.train[0], backbone.tokenizer))
    if not splits.dev:
        findings.append(
            Finding("warning", "dev", "no dev set: no early stopping, the last step of every fine-tune is kept")
        )
    if recipe.target.on == AUTO and not choosing_splits(sizes):
        text = "too few dev and micro-dev rows choose where the target adapter is trained: it will be on the backbone alone"
        findings.append(Finding("warning", "target.on", text))
    findings += labels(session) if splits.labels else written_answers(session)
    if not splits.test:
        findings.append(Finding("warning", "test", "no test set: nothing will be evaluated"))
    findings += _memory(session)
    findings += _plan(recipe, sizes)
    keeps_best, has_source_rows = recipe.final.training.keep == "best", bool(splits.source_train)
    said = advice(sizes["dev"], keeps_best=keeps_best, on=recipe.target.on, has_source_rows=has_source_rows)
    findings += [Finding("ok", "advice", sentence) for sentence in said]
    test, groups = splits.test, len(set(group_numbers(splits.test)))
    if width := expected_width(
        list(session.metrics), len(test), len(PLANNED) - 1, group_size(test), groups, len(SEEDS)
    ):
        findings.append(Finding("ok", "power", f"in a comparison of {len(SEEDS)} seeds, {width}"))
    trained, probed = _cost(recipe, sizes)
    pace = time_step(session)
    text = (
        f"at most {pace.seconds(trained, probed) / 60:.1f} min for that on this machine, where a training example takes "
        f"{pace.trained:.3f} s; dev losses and answers come on top"
    )
    return [*findings, Finding("ok", "time", text)]


def _backbone(session: Session) -> Finding:
    backbone = session.backbone
    parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
    text = (
        f"{backbone.name}, {parameters / 1e6:.0f} M weights in {backbone.model.dtype}".replace("torch.", "")
        + f", on {backbone.model.device}, fingerprint {backbone.fingerprint}"
    )
    if not supports_logits_to_keep(backbone.model):
        return Finding(
            "warning", "backbone", f"{text}; it computes logits at every position, which costs time and memory"
        )
    if is_quantised(backbone.model.config):
        return Finding(
            "warning", "backbone", f"{text}; it is quantised: adapters are measured on the quantised weights"
        )
    return Finding("ok", "backbone", text)


def _check_weights_fit(session: Session) -> None:
    """Refuse a backbone that this machine cannot hold before it is loaded, which could end the process without a word."""
    settings = session.backbone_settings
    empty: Any = skeleton(settings)
    if is_quantised(empty.config):
        return
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    dtype = (
        find_dtype("cuda" if on_gpu else "cpu", empty.config.model_type) if settings.dtype == "auto" else settings.dtype
    )
    number, sizes = getattr(torch, dtype).itemsize, sizes_of(empty)
    needed, free = sizes.weights(number, settings.quantise), available_memory(on_gpu)
    if needed > free:
        ways = ", ".join(f"{one} {_gigabytes(sizes.weights(number, one))}" for one in QUANTISED)
        raise GraspError(
            f"the weights of {quoted(session.recipe.backbone.name)} need about {_gigabytes(needed)} GB "
            f"({settings.quantise or dtype}), and {_gigabytes(free)} GB are free here; quantised they need about {ways}: set "
            "backbone.quantise, or take a smaller backbone or a larger machine"
        )


def _memory(session: Session) -> list[Finding]:
    """Estimate what each stage needs, and say what that would be on a card in other settings."""
    recipe, splits, model = session.recipe, session.splits, session.backbone.model
    stages = stages_of(recipe, splits, session.parent_ranks)
    longest = max(len(one.prompt_ids) + len(one.completion_ids) for one in (*splits.train, *splits.source_train))
    given, lora = session.existing_adapters.values(), recipe.lora
    if recipe.source.adapters and recipe.target.adapter:  # nothing else is put on the backbone
        lora = replace(lora, target_modules=tuple(sorted({name for one in given for name in one.weights})))
    shape = shape_of(skeleton(session.backbone_settings), lora, longest)
    number, weights = model.dtype.itemsize, float(stored_bytes(model))
    needs = {stage.name: shape.need(stage, number, session.backbone.quantise, weights) for stage in stages}
    parts = ", ".join(
        f"{name} {_gigabytes(need.total)} (activations {_gigabytes(need.activations)}, logits {_gigabytes(need.logits)}, "
        f"adapter {_gigabytes(need.adapter)})"
        for name, need in needs.items()
    )
    text = f"estimates in GB, each with 1 for the process and {_gigabytes(weights)} for the weights: {parts}"
    found = [Finding("ok", "memory", text)]
    most, need = max(needs.items(), key=lambda one: one[1].total)
    more, free = need.total - need.weights - PROCESS, available_memory(model.device.type == "cuda")
    if more > free:  # the weights are there already
        text = (
            f"{most} needs about {_gigabytes(more)} GB more than the weights, and {_gigabytes(free)} GB are free here; a smaller "
            "batch_size, a lower data.max_tokens and numbers of fewer bits take less"
        )
        found.append(Finding("warning", "memory", text))
    if session.backbone.quantise is not None or not is_quantised(model.config):
        sizes = [
            f"{name} {_gigabytes(needed)} ({smallest_card(needed) or 'none'})"
            for name, needed in by_setting(shape, stages).items()
        ]
        cards = ", ".join(map(str, CARDS))
        text = f"estimates in GB, in brackets the smallest of cards of {cards} that holds it: {', '.join(sizes)}"
        found.append(Finding("ok", "cards", text))
    return found


def _gigabytes(size: float) -> str:
    return f"{size / GIGABYTE:.{1 if size >= GIGABYTE else 2}f}"


def _counts(side: str, tally: Tally) -> Finding:
    counts = {name: value for name, value in asdict(tally).items() if isinstance(value, int) and value}
    shortest = counts.pop("shortest_tokens", None)
    facts = [f"{name.replace('_', ' ')} {count}" for name, count in counts.items()]
    facts += [f"the shortest has {shortest} tokens"] if shortest else []
    return Finding("ok", side, f"{tally.language}: {', '.join(facts)}")


def _lengths(name: str, examples: Sequence[Example]) -> Finding:
    lengths = sorted(len(example.prompt_ids) + len(example.completion_ids) for example in examples)
    return Finding(
        "ok", "lengths", f"{name}: {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}"
    )


def _label_mask(example: Example, tokenizer: object) -> Finding:
    answer = tokenizer.decode(list(example.completion_ids))  # type: ignore[attr-defined]
    end = example.prompt[-PROMPT_SHOWN:]
    text = f"loss on the answer only, for example {answer!r} of {example.id}, whose prompt ends with {end!r}"
    return Finding("ok", "label mask", text)


def _cost(recipe: Recipe, sizes: dict[str, int]) -> tuple[float, int]:
    """How many examples are trained on and probed at most."""
    trained, probed = 0.0, 0
    if not recipe.source.adapters:
        trained += recipe.source.training.epochs * sizes["source_train"]
    if not recipe.target.adapter:
        chosen = recipe.target.on == AUTO and choosing_splits(sizes)
        trained += (2 if chosen else 1) * recipe.target.training.epochs * sizes["train"]
    runs = 2 if recipe.final.deliver == "best" else 1  # the final run, and the source adapter continued
    trained += runs * recipe.final.training.epochs * sizes["train"]
    if recipe.final.all_rows:
        epochs = recipe.final.training.epochs + (0.0 if recipe.target.adapter else recipe.target.training.epochs)
        trained += epochs * sizes["train"]  # as many steps as before, whatever the rows
    if recipe.final.prune_ratio is None:
        stage = recipe.controller
        trained += stage.policy.copies * stage.training.epochs * sizes["train"]
        pool = sum(sizes[split] for split in stage.rounds.splits)
        keep_best = recipe.final.start == "controller"
        probed = expected_rounds(recipe, sizes["train"]) * stage.probed_examples(pool, keep_best=keep_best)
    return trained, probed


def _plan(recipe: Recipe, sizes: dict[str, int]) -> list[Finding]:
    rounds = expected_rounds(recipe, sizes["train"])
    findings = []
    if recipe.final.prune_ratio is None:
        stage = recipe.controller
        pool = sum(sizes[split] for split in stage.rounds.splits)
        if pool < FEW_PROBED:
            findings.append(Finding("warning", "probes", f"{pool} examples choose the ratio; 16 are usual"))
        few = FEW_ROUNDS if stage.policy.regime == "held" else FEW_INDEPENDENT_ROUNDS
        level = "warning" if rounds < few else "ok"
        advice = "; raise controller.training.epochs or lower controller.rounds.every" if level == "warning" else ""
        noun = "round" if rounds == 1 else "rounds"
        most = "" if stage.rounds.patience is None and stage.training.patience is None else "at most "
        asked_each_round = stage.policy.regime == "each_step"
        if rounds > MANY_ROUNDS and asked_each_round and ratio_rule(stage.rule) is surrogate:
            level, advice = (
                "warning",
                ", and rule surrogate takes seconds or minutes for each; raise controller.rounds.every",
            )
        findings.append(Finding(level, "rounds", f"the controller will run {most}{rounds} {noun}{advice}"))
        findings += _patience(stage, sizes["train"])
    if recipe.final.start == "controller":
        text = (
            "single run: the controller run's own adapter, of its best round and pruned at the learned ratio, is finished "
            f"for at most {recipe.final.training.steps(sizes['train'])} steps"
        )
        findings.append(Finding("ok", "start", text))
    trained, probed = _cost(recipe, sizes)
    passes = TRAINED_AS_MEASURED * trained + probed
    text = f"at most {trained:.0f} training examples and {probed} probed examples, {passes:.0f} forward passes in all"
    findings.append(Finding("ok", "cost", text))
    return findings


def _patience(stage: ControllerStage, train: int) -> list[Finding]:
    """Warn where a controller run would stop before its probes can tell anything."""
    patience, epoch, every = stage.rounds.patience, stage.training.steps_per_epoch(train), stage.spacing(train)
    if patience is None:
        return []
    if stage.policy.regime == "held" or stage.rounds.start > 0.0:
        text = (
            f"controller.rounds.patience is {patience}, but these rounds are needed to the end of the run; set it to null, or "
            "leave rounds out, which gives what is usual with the preset"
        )
        return [Finding("warning", "patience", text)]
    if patience * every < epoch:
        text = (
            f"the run stops after {patience * every} steps without a lower loss, less than an epoch ({epoch} steps); leave "
            f"controller.rounds.every out for a round after each epoch, or set controller.rounds.patience to "
            f"{math.ceil(epoch / every)}"
        )
        return [Finding("warning", "patience", text)]
    return []


def _ranks(pairs: object) -> str:
    return ", ".join(map(str, sorted({pair.rank for pair in pairs})))  # type: ignore[attr-defined]
