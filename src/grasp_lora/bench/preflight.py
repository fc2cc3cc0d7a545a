"""What will happen before it happens: the checks of `grasp-lora check`, as lines a person reads."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from grasp_lora.bench.checks import check, check_files, expected_rounds
from grasp_lora.bench.measuring import choosing_splits
from grasp_lora.bench.memory import (
    CARDS,
    GIGABYTE,
    QUANTISED,
    by_setting,
    shape_of,
    sizes_of,
    smallest_card,
    stages_of,
)  # fmt: skip
from grasp_lora.bench.plan import time_step
from grasp_lora.bench.planned import PLANNED, expected_width
from grasp_lora.bench.session import Session
from grasp_lora.data.encode import Example, Tally
from grasp_lora.data.splits import SPLITS, group_size
from grasp_lora.errors import GraspError
from grasp_lora.evaluation.answers import taken_for_one
from grasp_lora.models.backbone import skeleton, supports_logits_to_keep
from grasp_lora.models.precision import find_dtype, is_quantised, stored_bytes
from grasp_lora.recipes.advice import advice
from grasp_lora.recipes.recipe import Recipe
from grasp_lora.recipes.stages import AUTO, ControllerStage
from grasp_lora.storage.memory import available_memory
from grasp_lora.text.characters import ENDS_OF_SENTENCES, split_unspaced
from grasp_lora.text.display import listed, one_line, quoted
from grasp_lora.training.settings import TRAINED_AS_MEASURED

FEW_ROUNDS = 10
FEW_INDEPENDENT_ROUNDS = 3  # where no ratio is held, they do not depend on each other
FEW_PROBED = 8
PROMPT_SHOWN = 30  # characters


@dataclass(frozen=True)
class Finding:
    """One line of the preflight: `ok` or `warning`, a topic and what was found."""

    level: str
    topic: str
    text: str


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
    findings += _doubtful(session)
    findings.append(_lengths("train", splits.train))
    findings.append(_label_mask(splits.train[0], backbone.tokenizer))
    if not splits.dev:
        findings.append(
            Finding("warning", "dev", "no dev set: no early stopping, the last step of every fine-tune is kept")
        )
    if recipe.target.on == AUTO and not choosing_splits(sizes):
        text = "too few dev and micro-dev rows choose where the target adapter is trained: it will be on the backbone alone"
        findings.append(Finding("warning", "target.on", text))
    findings += _labels(session) if splits.labels else _cut_answers(session)
    if not splits.test:
        findings.append(Finding("warning", "test", "no test set: nothing will be evaluated"))
    findings += _memory(session)
    findings += _plan(recipe, sizes)
    keeps_best, has_source_rows = recipe.final.training.keep == "best", bool(splits.source_train)
    said = advice(sizes["dev"], keeps_best=keeps_best, on=recipe.target.on, has_source_rows=has_source_rows)
    findings += [Finding("ok", "advice", sentence) for sentence in said]
    width = expected_width(list(session.metrics), len(splits.test), len(PLANNED) - 1, group_size(splits.test))
    if width:
        findings.append(Finding("ok", "power", f"in a comparison, {width}"))
    trained, probed = _cost(recipe, sizes)
    pace = time_step(session)
    text = (
        f"at most {pace.seconds(trained, probed) / 60:.1f} min for that on this machine, where a training example takes "
        f"{pace.trained:.3f} s; dev losses and answers come on top"
    )
    return [*findings, Finding("ok", "time", text)]


def _doubtful(session: Session) -> list[Finding]:
    """Warn of what can be meant, but seldom is."""
    recipe, splits = session.recipe, session.splits
    found = []
    tallies = [tally for tally in (splits.report.source, splits.report.target) if tally is not None]
    numbers, excluded = splits.report.numbers_as_ids, sum(tally.excluded_for_leak for tally in tallies)
    if numbers and excluded:
        text = (
            f"{numbers} ids are whole numbers that stand in source and target, so they count as the same questions, and source "
            f"examples were left out ({excluded} in all); where ids only number the rows, rename that column"
        )
        found.append(Finding("warning", "ids", text))
    repeated = {
        name: len(examples) - len({(one.prompt, one.completion) for one in examples})
        for name in ("train", "dev", "micro_dev", "test")
        if (examples := getattr(splits, name))
    }
    if any(repeated.values()):
        listed = ", ".join(f"{count} of {name}" for name, count in repeated.items() if count)
        text = f"examples that stand there more than once, prompt and answer alike: {listed}; remove them from the data"
        found.append(Finding("warning", "duplicates", text))
    if spelled := sum(tally.control_tokens_kept_as_text for tally in tallies):
        text = (
            f"{spelled} examples spell control tokens, such as the end of a turn, which stay text; for conversations give "
            "messages to a backbone with a chat template, or write the tokens into data.prompt and data.completion"
        )
        found.append(Finding("warning", "control tokens", text))
    talks = sum(tally.conversations for tally in tallies)
    template = getattr(session.backbone.tokenizer, "chat_template", None)
    if talks and template and not splits.report.chat_template:
        text = (
            "the data are conversations and the backbone has a chat template, but data.chat_template is false, so the "
            "messages before the answer are joined as plain text; leave it out"
        )
        found.append(Finding("warning", "chat", text))
    glued = [example for example in splits.train if _are_glued(example)]
    if not splits.report.chat_template and 2 * len(glued) > len(splits.train):
        border = one_line(glued[0].prompt[-8:] + glued[0].completion[:8])
        text = (
            f"nothing stands between prompts and answers, such as {border!r}; end the prompts with a space or a line break, "
            "or set data.prompt"
        )
        found.append(Finding("warning", "prompt", text))
    for name, metric in session.metrics.items():
        if lacking := metric.lacking(session.language):
            advice = "; name one in bertscore.models" if name == "bertscore" else ""
            text = f"{name} has {lacking}, so it will be unavailable{advice}"
            found.append(Finding("warning", "metrics", text))
    if recipe.source.adapters and recipe.data.source is not None:
        text = "source.adapters are given, so no source adapter is trained on data.source"
        found.append(Finding("warning", "source", text))
    elif recipe.data.source is not None and recipe.data.source.language.lower() == session.language.lower():
        text = f"source and target are both in {session.language}; data.source is meant for a language with more data"
        found.append(Finding("warning", "source", text))
    tasks = {place: one.info.answers and one.info.answers.task for place, one in session.existing_adapters.items()}
    if others := sorted(f"{place} ({task})" for place, task in tasks.items() if task not in (None, recipe.data.task)):
        text = (
            f"the recipe's task is {recipe.data.task}, but these adapters were trained for another: {', '.join(others)}"
        )
        found.append(Finding("warning", "adapter", text))
    parents = [adapter.sha256 for adapter in session.existing_adapters.values()]
    given = len(recipe.source.adapters) + (recipe.target.adapter is not None)
    if len(set(parents)) < given:
        text = "the same adapter is given more than once, so it is merged with itself"
        found.append(Finding("warning", "adapter", text))
    return found


def _are_glued(example: Example) -> bool:
    """Whether the last word or sentence of a prompt goes on as the first word of its answer."""
    border = example.prompt[-1:] + example.completion[:1]
    ends = border[:1].isalnum() or border[:1] in ENDS_OF_SENTENCES
    return len(border) == 2 and ends and border[1].isalnum() and split_unspaced(border).strip() == border


def _labels(session: Session) -> list[Finding]:
    """Say what can be chosen, and what choosing the same label always would be worth."""
    splits = session.splits
    counts = splits.report.labels or {}
    listing = ", ".join(f"{label} {found['train']}" for label, found in counts.items())
    text = f"{len(counts)}, how often each stands in train: {listing}"
    if splits.test:
        most = max(counts, key=lambda label: counts[label]["train"])
        share = 100 * counts[most]["test"] / len(splits.test)
        text += f"; to answer the most frequent one, {most}, always has accuracy {share:.1f} on the test"
    found = [Finding("ok", "labels", text)]
    if missing := [label for label, of in counts.items() if not of["train"]]:
        found.append(Finding("warning", "labels", f"no training row has {listed(missing)}; add rows, or remove it"))
    others = {example.references[0] for example in (*splits.source_train, *splits.source_dev)} - counts.keys()
    if others:
        text = f"the source has labels that the target has not, {listed(sorted(others))}; are they the same in other words?"
        found.append(Finding("warning", "labels", text))
    return found


def _cut_answers(session: Session) -> list[Finding]:
    """Warn of written answers that cannot be whole."""
    test, generation = session.splits.test, session.recipe.generation
    found = _answers_too_long(test, generation.max_new_tokens)
    if cut := [stop for stop in generation.stop if _cuts_all_references(test, stop)]:
        text = f"generation.stop {cut} ends answers that test references go on after; their scores cannot be full"
        found.insert(0, Finding("warning", "stop", f"{text}; set generation.stop to []"))
    return [*found, *_answers_alike(session)]


def _answers_alike(session: Session) -> list[Finding]:
    """Warn of a metric that was made for questions, where answers are something else, such as numbers or code."""
    references = (text for example in session.splits.test for text in example.references)
    pair = taken_for_one(references, session.language) if session.recipe.data.task == "completion" else None
    if pair is None or "exact_match" not in session.metrics:
        return []
    text = f"exact_match drops marks and articles, so it takes {pair[0]!r} and {pair[1]!r} for the same answer"
    return [Finding("warning", "metrics", f"{text}; set metrics to others, or to one of your own")]


def _answers_too_long(test: Sequence[Example], most: int) -> list[Finding]:
    """Warn of answers that end before they are whole. The end of text is a token, too, but not one that scores need."""
    lengths = [len(example.completion_ids) - 1 for example in test]
    longer = sum(length > most for length in lengths)
    if not longer:
        return []
    text = (
        f"{longer} of {len(test)} test answers have more than generation.max_new_tokens {most} tokens, so their scores cannot "
        f"be full; the longest has {max(lengths)}"
    )
    return [Finding("warning", "answers", text)]


def _cuts_all_references(test: Sequence[Example], stop: str) -> bool:
    """Whether some test example has no reference that an answer ended by this text could equal."""
    return any(all(stop in reference for reference in example.references) for example in test)


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
    shape = shape_of(skeleton(session.backbone_settings), recipe.lora, longest)
    number, weights = model.dtype.itemsize, float(stored_bytes(model))
    needs = {stage.name: shape.need(stage, number, session.backbone.quantise, weights) for stage in stages}
    parts = ", ".join(
        f"{name} {_gigabytes(need.total)} (activations {_gigabytes(need.activations)}, logits {_gigabytes(need.logits)}, "
        f"adapter {_gigabytes(need.adapter)})"
        for name, need in needs.items()
    )
    text = f"estimates in GB, each with 1 for the process and {_gigabytes(weights)} for the weights: {parts}"
    found = [Finding("ok", "memory", text)]
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
    facts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
    return Finding("ok", side, f"{tally.language}: {facts}")


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
